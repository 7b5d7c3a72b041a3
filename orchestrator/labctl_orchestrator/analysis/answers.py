"""The answers of runs, compared with the first run's token by token, and a summary of each run's answers."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from labctl_orchestrator.store import documents
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import WrongUseError
from labctl_workers.measure import mean_log_probability, repeated_bigrams
from labctl_workers.record import RunResult, Sample, read_bytes


@dataclass(frozen=True)
class AnswerSide:
    """One run's answer to one prompt. `mark` is the place of the first different token in the text: (start, end) in characters;
    None if no token differs, or the answer ends before it."""

    tokens: int
    text: str
    finish_reason: str
    token: str | None
    token_id: int | None
    mark: tuple[int, int] | None


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to one prompt; `equal_tokens` counts equal tokens from the start (the exact-match length)."""

    prompt: str
    equal_tokens: int
    same: bool
    first: AnswerSide
    second: AnswerSide


@dataclass(frozen=True)
class RunAnswers:
    """The answers of one run: for each prompt those of all repeats, the first repeat first; and the text of each token id.
    `settings` is the run in short."""

    run_id: str
    settings: str
    model_content: str
    samples: Mapping[str, list[Sample]]
    tokens: Mapping[str, str]


@dataclass(frozen=True)
class Summary:
    """All answers of one run, compared with the first run's.

    `answers` is their number, `distinct` the number of different ones (mean of the prompts). `tokens`, `mean_log_probability`
    (natural, per token, by the model at temperature 1) and `repeated_bigrams` are medians of the answers. `exact_match` is the
    share of answers with exactly the tokens of the first run's answer to the same prompt, `equal_tokens` the median number of
    equal tokens from the start.
    """

    run_id: str
    settings: str
    answers: int
    distinct: float
    tokens: float
    finish_reasons: dict[str, int]
    mean_log_probability: float | None
    repeated_bigrams: float | None
    exact_match: float
    equal_tokens: float


def read_answers(workspace: Workspace, store: Store, run_id: str) -> RunAnswers:
    """The answers of a run's latest result. Raises WrongUseError if it has none."""
    rows = store.rows(
        "SELECT path FROM results WHERE run_id = ? AND status = 'done' ORDER BY ended_at DESC LIMIT 1", (run_id,)
    )
    if not rows:
        raise WrongUseError(f"no result yet: {run_id}", f"labctl status {run_id} shows its state")
    record = documents.read(read_bytes(workspace.data / rows[0]["path"]), RunResult)
    (run,) = store.rows("SELECT * FROM runs WHERE run_id = ?", (run_id,))
    prompts = json.loads(run["prompts"])
    samples: dict[str, list[Sample]] = {}
    for repeat in record.repeats:
        for sample in repeat.samples:
            # Random prompts have no text.
            prompt = prompts[sample.prompt] if sample.prompt < len(prompts) else f"request {sample.prompt}"
            samples.setdefault(prompt, []).append(sample)
    settings = f"{run['partition']} {run['backend']} {run['model']} {run['dtype']} {run['sampling']}"
    return RunAnswers(run_id, settings, run["model_content"], samples, record.tokens)


def answer_pairs(first: RunAnswers, second: RunAnswers) -> list[AnswerPair]:
    """A pair for each prompt that both answered. Raises WrongUseError if there is none."""
    shared = [prompt for prompt in first.samples if prompt in second.samples]
    if not shared:
        raise WrongUseError(
            f"no common prompt: {first.run_id} and {second.run_id}", "compare runs with the same prompts"
        )
    return [_pair(prompt, first, second) for prompt in shared]


def summaries(runs: Sequence[RunAnswers]) -> list[Summary]:
    """A summary of each run's answers. Raises WrongUseError if a run has no prompt in common with the first."""
    for run in runs[1:]:
        answer_pairs(runs[0], run)
    return [_summary(run, runs[0]) for run in runs]


def _summary(run: RunAnswers, first: RunAnswers) -> Summary:
    answers = [sample for of_prompt in run.samples.values() for sample in of_prompt]
    equal = [
        _equal_tokens(first, first.samples[prompt][0], run, sample)
        for prompt, of_prompt in run.samples.items()
        if prompt in first.samples
        for sample in of_prompt
    ]
    distinct = [len({tuple(sample.token_ids) for sample in of_prompt}) for of_prompt in run.samples.values()]
    return Summary(
        run_id=run.run_id,
        settings=run.settings,
        answers=len(answers),
        distinct=statistics.fmean(distinct),
        tokens=statistics.median(len(sample.token_ids) for sample in answers),
        finish_reasons=dict(Counter(sample.finish_reason for sample in answers)),
        mean_log_probability=_median(mean_log_probability(sample) for sample in answers),
        repeated_bigrams=_median(repeated_bigrams(sample) for sample in answers),
        exact_match=statistics.fmean(same for _, same in equal),
        equal_tokens=statistics.median(tokens for tokens, _ in equal),
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _equal_tokens(first: RunAnswers, one: Sample, second: RunAnswers, two: Sample) -> tuple[int, bool]:
    """(number of equal tokens from the start, whether the answers are equal)."""
    # Ids of two vocabularies cannot be compared; the tokens' texts can.
    same_ids = first.model_content == second.model_content
    ours, theirs = (
        [str(token) if same_ids else answers.tokens.get(str(token), str(token)) for token in sample.token_ids]
        for answers, sample in ((first, one), (second, two))
    )
    equal = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return equal, equal == len(ours) == len(theirs)


def _pair(prompt: str, first: RunAnswers, second: RunAnswers) -> AnswerPair:
    one, two = first.samples[prompt][0], second.samples[prompt][0]
    equal, same = _equal_tokens(first, one, second, two)
    begin = _begin(one, two, equal, first.tokens, second.tokens)
    return AnswerPair(prompt, equal, same, _side(first, one, equal, begin), _side(second, two, equal, begin))


def _begin(one: Sample, two: Sample, equal: int, ours: Mapping[str, str], theirs: Mapping[str, str]) -> int:
    """Where the different tokens begin in the texts: at the first different letter, less the letters that both tokens share."""
    first_different = _common_letters(one.text, two.text)
    pieces = [
        tokens.get(str(sample.token_ids[equal]), "") if equal < len(sample.token_ids) else ""
        for sample, tokens in ((one, ours), (two, theirs))
    ]
    return max(0, first_different - _common_letters(*pieces))


def _common_letters(one: str, two: str) -> int:
    """The number of letters that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _side(answers: RunAnswers, sample: Sample, equal: int, begin: int) -> AnswerSide:
    if equal >= len(sample.token_ids):
        return AnswerSide(len(sample.token_ids), sample.text, sample.finish_reason, None, None, None)
    token = sample.token_ids[equal]
    piece = answers.tokens.get(str(token), "")
    end = min(len(sample.text), begin + len(piece))
    return AnswerSide(len(sample.token_ids), sample.text, sample.finish_reason, piece, token, (begin, end))


def agreement(found: Sequence[AnswerPair]) -> str:
    """One line: the number of equal answers, and the shortest agreement of the others."""
    same = sum(pair.same for pair in found)
    if same == len(found):
        return "the same tokens" if len(found) == 1 else f"all {len(found)} answers have the same tokens"
    if len(found) == 1:
        return f"the same for {found[0].equal_tokens} tokens"
    shortest = min(pair.equal_tokens for pair in found if not pair.same)
    return f"{same} of {len(found)} answers have the same tokens; the others agree for {shortest} tokens or more"
