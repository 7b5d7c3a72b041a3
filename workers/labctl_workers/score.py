"""The perplexity of a text: the log-likelihood of its tokens, in sliding windows, by any engine that gives log-probabilities.

Windows as in transformers' documentation, "Perplexity of fixed-length models": each has at most `window` tokens, and begins
`stride` tokens after the one before it. A window scores the tokens that no earlier one has scored, each given those before it in
the window. So the first token of a document is not scored, and with stride = window the first of each window.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from labctl_workers import hardware
from labctl_workers.engines.base import Engine
from labctl_workers.measure import refuse_if_not_finite, scored
from labctl_workers.record import RunSpec, TextScores


class ScoredWindow(NamedTuple):
    """The tokens from `begin` to `end` of a document, of which those from `first` on are scored."""

    begin: int
    first: int
    end: int


def windows(tokens: int, window: int, stride: int) -> Iterator[ScoredWindow]:
    """The windows of a document of so many tokens."""
    end = 0
    for begin in range(0, tokens, stride):
        first, end = max(end, begin + 1), min(begin + window, tokens)
        if first < end:
            yield ScoredWindow(begin, first, end)
        if end == tokens:
            return


def score(engine: Engine, run: RunSpec, documents: Sequence[str], gpus: Sequence[hardware.Gpu]) -> TextScores:
    """Score the documents. Raises Refusal where a log-likelihood is not finite."""
    if run.score is None:
        raise ValueError(f"run {run.run_id} has no text to score")
    found = TextScores()
    for number, document in enumerate(documents):
        ids = engine.text.token_ids(document)
        likelihoods: list[float] = []
        for begin, first, end in windows(len(ids), run.score.window, run.score.stride):
            of_window = scored(engine, ids[begin:first], ids[first:end])
            refuse_if_not_finite(of_window, run, gpus)
            if of_window is None or len(of_window) != end - first:
                why = f"no log-probabilities of document {number}, tokens {begin} to {end}: see the job's log"
                print(f"text not scored: {why}", file=sys.stderr, flush=True)
                return TextScores(error=why)
            likelihoods += of_window
        found.nll.append(-math.fsum(likelihoods) if likelihoods else 0.0)
        found.tokens.append(len(likelihoods))
    return found
