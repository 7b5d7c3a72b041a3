"""Ratios of passes that followed one another: what a machine that others use too lets one say of two programs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Passes = list[dict[str, float]]  # what each pass measured, by metric
# Whose passes are held against whose, as what, in which figures.
Comparison = tuple[str, str, str, Sequence[str]]
RESAMPLED = 1000


def ratio_of(own: Passes, reference: Passes, metric: str) -> tuple[float, float, float]:
    """The mean of the middle half of the pairs' ratios, on the scale of their logarithms, and its 95% interval: the pairs drawn
    again, with replacement (bootstrap)."""
    import numpy

    pairs = numpy.log([mine[metric] / theirs[metric] for mine, theirs in zip(own, reference, strict=True)])
    drawn = pairs[numpy.random.default_rng(0).integers(len(pairs), size=(RESAMPLED, len(pairs)))]
    low, high = numpy.quantile(_middle_half(drawn), (0.025, 0.975))
    return tuple(float(numpy.exp(value)) for value in (_middle_half(pairs), low, high))  # type: ignore[return-value]


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
