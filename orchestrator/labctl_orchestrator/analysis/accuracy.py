"""The accuracy of answers to the questions of tasks, and two runs compared question by question.

Sources. The interval of a difference: D. Bonett, R. Price, "Adjusted Wald confidence interval for a difference of binomial
proportions based on paired data", Journal of Educational and Behavioral Statistics 37 (2012). That of one accuracy: E. Wilson,
"Probable inference, the law of succession, and statistical inference", JASA 22 (1927). The test, here exact: Q. McNemar, "Note on
the sampling error of the difference between correlated proportions or percentages", Psychometrika 12 (1947).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from labctl_orchestrator.analysis.comparison import QuestionScores
from labctl_orchestrator.analysis.intervals import NORMAL_975, Estimate
from labctl_orchestrator.store.database import Store, of_runs

OTHER_QUESTIONS = "the questions differ: a task has no answers in one run, or its data set has another version"


def questions_of(store: Store, run_ids: Sequence[str]) -> dict[tuple[str, str], QuestionScores]:
    """The questions of each attempt of these runs that answered tasks, by (run id, attempt id)."""
    these, parameters = of_runs(run_ids)
    found: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for run_id, attempt_id, task, of_question, correct in store.each(
        "SELECT run_id, attempt_id, task, hash, correct FROM questions"  # noqa: S608
        f" WHERE {these} ORDER BY run_id, attempt_id, task, question",
        parameters,
    ):
        found.setdefault((run_id, attempt_id), []).append((f"{task} {of_question}", correct))
    return {key: QuestionScores(*zip(*of_attempt, strict=True)) for key, of_attempt in found.items()}


def mean_of_loads(loads: Sequence[QuestionScores]) -> QuestionScores | None:
    """The mean of each question over engine loads; None without one, or where their questions differ."""
    if not loads or any(load.names != loads[0].names for load in loads):
        return None
    return QuestionScores(
        loads[0].names, tuple(sum(of) / len(of) for of in zip(*(load.correct for load in loads), strict=True))
    )


def accuracy(questions: QuestionScores) -> float:
    return sum(questions.correct) / len(questions.correct)


def interval_of(questions: QuestionScores) -> Estimate:
    """The accuracy, with Wilson's interval over questions."""
    n, share, z = len(questions.correct), accuracy(questions), NORMAL_975
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def compared(ours: QuestionScores, theirs: QuestionScores) -> Estimate:
    """The difference of two accuracies, with the interval of Bonett and Price: Wald's with two questions more, one that only we
    answer, and one that only they do. The questions must be the same."""
    differences = [one - other for one, other in zip(ours.correct, theirs.correct, strict=True)]
    n, total = len(differences) + 2, math.fsum(differences)
    middle = total / n
    half = NORMAL_975 * math.sqrt(((math.fsum(d * d for d in differences) + 2) / n - middle**2) / n)
    return Estimate(total / len(differences), middle - half, middle + half)


class Discordant(NamedTuple):
    """The questions that one of two runs alone answers right, and the p-value of McNemar's exact test that both are as likely."""

    ours: int
    theirs: int

    @property
    def p_value(self) -> float:
        n, fewer = self.ours + self.theirs, min(self.ours, self.theirs)
        return float(min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n))


def discordant(ours: QuestionScores, theirs: QuestionScores) -> Discordant:
    """A question counts as right from 0.5 on, as a mean over engine loads."""
    pairs = [(one >= 0.5, other >= 0.5) for one, other in zip(ours.correct, theirs.correct, strict=True)]
    return Discordant(pairs.count((True, False)), pairs.count((False, True)))
