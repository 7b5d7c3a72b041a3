"""Ratios of passes that followed one another: what a machine that others use too lets one say of two programs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

Name = TypeVar("Name")
Passes = list[dict[str, float]]  # what each pass measured, by metric
# Whose passes are held against whose, as what, in which figures.
Comparison = tuple[Name, Name, str, Sequence[str]]
RESAMPLED = 1000


def ratio_of(
    own: Sequence[Passes], reference: Sequence[Passes], metric: str, *, other_engines: bool = False
) -> tuple[float, float, float]:
    """The mean of the middle half of the pairs' ratios, on the scale of their logarithms, over engines, and its 95% interval:
    passes are drawn again, with replacement (bootstrap). Where the reference ran on engines of its own, pairs of engines are
    drawn again too: one start differs from the next."""
    import numpy

    logs = [
        numpy.log([mine[metric] / theirs[metric] for mine, theirs in zip(*passes, strict=True)])
        for passes in zip(own, reference, strict=True)
    ]
    chance = numpy.random.default_rng(0)
    again = [_middle_half(of[chance.integers(len(of), size=(RESAMPLED, len(of)))]) for of in logs]
    means = numpy.stack(again)  # engine, draw
    if other_engines:
        means = means[chance.integers(len(logs), size=means.shape), numpy.arange(RESAMPLED)]
    low, high = numpy.quantile(means.mean(axis=0), (0.025, 0.975))
    ratio = numpy.mean([_middle_half(of) for of in logs])
    return tuple(float(numpy.exp(value)) for value in (ratio, low, high))  # type: ignore[return-value]


def median_of(engines: Sequence[Passes], metric: str) -> float:
    return statistics.median(passed[metric] for passes in engines for passed in passes)


def is_told(engines: Sequence[Passes], metric: str) -> bool:
    """Whether each engine's passes have that figure."""
    return all(passes and metric in passes[0] for passes in engines)


def settled(figures: Mapping[Name, Sequence[Passes]], comparisons: Iterable[Comparison[Name]], width: float) -> bool:
    """Whether the passes tell every ratio, of these engines, to an interval no wider than this."""
    for own, reference, _, metrics in comparisons:
        for metric in metrics:
            if not is_told(figures[reference], metric):
                continue
            _, low, high = ratio_of(figures[own], figures[reference], metric)
            if high - low > width:
                return False
    return True


def _middle_half(values: Any) -> Any:
    """Their mean, of the last dimension, without the lowest and the highest quarter."""
    import numpy

    cut = values.shape[-1] // 4
    return numpy.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(axis=-1)
