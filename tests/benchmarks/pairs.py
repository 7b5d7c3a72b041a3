"""Ratios of passes that followed one another: what a machine that others use too lets one say of two programs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Passes = list[dict[str, float]]  # what each pass measured, by metric
# Whose passes are held against whose, as what, in which figures.
Comparison = tuple[str, str, str, Sequence[str]]
RESAMPLED = 1000


def ratio_of(own: Passes, reference: Passes, metric: str, engines: int = 1) -> tuple[float, float, float]:
    """The mean of the middle half of the pairs' ratios, on the scale of their logarithms, and its 95% interval: drawn again, with
    replacement (bootstrap). Of several pairs of engines, whose passes lie in turn, it is the mean over these, and engines are
    drawn again too: one start differs from the next."""
    import numpy

    logs = numpy.log([mine[metric] / theirs[metric] for mine, theirs in zip(own, reference, strict=True)])
    pairs = logs[: len(logs) // engines * engines].reshape(-1, engines).T  # by engine, by round
    chance = numpy.random.default_rng(0)
    chosen = (
        chance.integers(engines, size=(RESAMPLED, engines, 1)) if engines > 1 else numpy.zeros((RESAMPLED, 1, 1), int)
    )
    drawn = pairs[chosen, chance.integers(pairs.shape[1], size=(RESAMPLED, engines, pairs.shape[1]))]
    low, high = numpy.quantile(_middle_half(drawn).mean(axis=-1), (0.025, 0.975))
    return tuple(float(numpy.exp(value)) for value in (_middle_half(pairs).mean(), low, high))  # type: ignore[return-value]


def median_of(passes: Passes, metric: str) -> float:
    return statistics.median(passed[metric] for passed in passes)


def settled(figures: Mapping[str, Passes], comparisons: Iterable[Comparison], width: float) -> bool:
    """Whether the passes tell every ratio to an interval no wider than this."""
    for own, reference, _, metrics in comparisons:
        for metric in metrics if reference in figures else ():
            _, low, high = ratio_of(figures[own], figures[reference], metric)
            if high - low > width:
                return False
    return True


def _middle_half(values: Any) -> Any:
    """Their mean, of the last dimension, without the lowest and the highest quarter."""
    import numpy

    cut = values.shape[-1] // 4
    return numpy.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(axis=-1)
