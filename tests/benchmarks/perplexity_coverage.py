"""How often the bootstrap interval of a change in perplexity holds the true change, over the number of documents.

python -m tests.benchmarks.perplexity_coverage [TEXTS]

The intervals are those of analysis/bootstrap.py in numpy's arrays, 30 times as fast. The first texts of each case are computed by
both: their bounds, from other draws, must agree within a fifth of the interval.
"""

from __future__ import annotations

import sys

import numpy

from labctl_orchestrator.analysis.bootstrap import DRAWS, ratio_of_sums

# A change in the log-likelihood of a token, and its standard deviation between documents: those of a 16-bit dtype.
CHANGE, BETWEEN = 0.003, 0.004
OF_A_TOKEN = 0.02
BY_BOTH = 3


def coverage(texts: int, documents: int, *, skewed: bool) -> float:
    """The share of made-up texts whose interval holds CHANGE; documents have 20 and more tokens, about 180."""
    held = 0
    draw = numpy.random.default_rng([documents, skewed])
    for text in range(texts):
        tokens = numpy.maximum(20, draw.lognormal(5.2, 0.5, documents).round())
        apart = draw.exponential(1.0, documents) - 1 if skewed else draw.normal(0.0, 1.0, documents)
        of_tokens = draw.normal(0.0, OF_A_TOKEN * tokens**0.5)
        changes = tokens * (CHANGE + BETWEEN * apart) + of_tokens
        low, high = interval(changes, tokens, draw)
        held += low <= CHANGE <= high
        if text < BY_BOTH:
            found = ratio_of_sums.__wrapped__(tuple(map(float, changes)), tuple(map(int, tokens)))
            differences = (abs((found.low or 0.0) - low), abs((found.high or 0.0) - high))
            assert max(differences) < (high - low) / 5, (found, low, high)
    return held / texts


def interval(changes: numpy.ndarray, tokens: numpy.ndarray, draw: numpy.random.Generator) -> tuple[float, float]:
    (ratio,), (error,) = ratios(changes[None], tokens[None])
    drawn = draw.integers(0, len(tokens), (DRAWS, len(tokens)))
    of_draws, errors = ratios(changes[drawn], tokens[drawn])
    studentized = numpy.sort(((of_draws - ratio) / errors)[errors > 0])
    tail = round(0.025 * len(studentized))
    return float(ratio - error * studentized[-1 - tail]), float(ratio - error * studentized[tail])


def ratios(changes: numpy.ndarray, tokens: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(Ratios of sums, their standard errors) of the rows."""
    n = tokens.shape[1]
    found = changes.sum(1) / tokens.sum(1)
    residuals = ((changes - found[:, None] * tokens) ** 2).sum(1)
    return found, numpy.sqrt(residuals * n / (n - 1)) / tokens.sum(1)


def main(texts: int = 3000) -> None:
    print("documents  normal  skewed")
    for documents in (10, 12, 20, 40):
        shares = [coverage(texts, documents, skewed=skewed) for skewed in (False, True)]
        print(f"{documents:9}  {shares[0]:6.1%}  {shares[1]:6.1%}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
