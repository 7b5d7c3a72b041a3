"""The perplexity of scored texts, from the sums of their documents, and two runs compared document by document."""

from __future__ import annotations

import math
from collections.abc import Sequence

from labctl_orchestrator.analysis.bootstrap import FEWEST_DOCUMENTS, ratio_of_sums
from labctl_orchestrator.analysis.comparison import DocumentSums
from labctl_orchestrator.analysis.intervals import Estimate
from labctl_orchestrator.store.database import Store, of_runs

OTHER_TOKENS = "the text has other tokens: the models have different tokenizers"


def documents_of(store: Store, run_ids: Sequence[str]) -> dict[tuple[str, str], DocumentSums]:
    """The documents of each attempt of these runs that scored a text, by (run id, attempt id)."""
    these, parameters = of_runs(run_ids)
    found: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for run_id, attempt_id, nll, tokens in store.each(
        f"SELECT run_id, attempt_id, nll, tokens FROM documents WHERE {these} ORDER BY run_id, attempt_id, document",  # noqa: S608
        parameters,
    ):
        found.setdefault((run_id, attempt_id), []).append((nll, tokens))
    return {key: DocumentSums(*zip(*of_attempt, strict=True)) for key, of_attempt in found.items()}


def mean_of_loads(loads: Sequence[DocumentSums]) -> DocumentSums | None:
    """The mean of the sums of each document over engine loads; None without one."""
    if not loads:
        return None
    return DocumentSums(
        tuple(math.fsum(of) / len(of) for of in zip(*(load.nll for load in loads), strict=True)), loads[0].tokens
    )


def values_of(metric: str, text: DocumentSums) -> list[float]:
    """The value of a metric of OF_A_TEXT, over all documents: perplexity = exp(nll / tokens), log-likelihood = -nll / tokens.
    Empty without a scored token."""
    tokens = sum(text.tokens)
    if not tokens:
        return []
    mean = math.fsum(text.nll) / tokens
    return [math.exp(mean) if metric == "perplexity" else -mean]


def interval_of(text: DocumentSums) -> Estimate:
    """The perplexity, with its interval over documents."""
    of = ratio_of_sums(text.nll, text.tokens)
    low, high = (None if bound is None else math.exp(bound) for bound in (of.low, of.high))
    return Estimate(math.exp(of.difference), low, high)


def compared(metric: str, ours: DocumentSums, theirs: DocumentSums) -> Estimate:
    """The difference of our mean log-likelihood from theirs, for the perplexity that of its logarithm, with its interval over the
    documents, paired. The documents must have the same tokens."""
    sign = 1 if metric == "perplexity" else -1
    differences = tuple(sign * (one - other) for one, other in zip(ours.nll, theirs.nll, strict=True))
    return ratio_of_sums(differences, ours.tokens)


def have_interval(text: DocumentSums) -> bool:
    """Whether there are enough documents for an interval."""
    return sum(map(bool, text.tokens)) >= FEWEST_DOCUMENTS
