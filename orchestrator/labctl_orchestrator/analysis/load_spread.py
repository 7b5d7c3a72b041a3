"""The spread between engine loads: estimated from the runs of a workspace, and its part in a comparison. Pure.

The model, on the logarithms of the values: value = run + engine load + repeat. Loads of one backend on one partition have one
standard deviation in a metric; the repeats of a run have their own. docs/validation.md validates it by simulation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from labctl_orchestrator.analysis import intervals
from labctl_orchestrator.analysis.comparison import AxisValue, Cell, LoadSample, load_sample
from labctl_orchestrator.analysis.intervals import Component, Estimate
from labctl_orchestrator.analysis.metrics import ALL_METRICS, OF_A_LOAD, SAME_IN_EVERY_LOAD
from labctl_workers.engines import ASSUMED_LOAD_SPREAD, LARGEST_LOAD_SPREAD

# With one, the quantile of t is 12.7: the interval would be wider than with the assumed spread.
FEWEST_DF = 2
Key = tuple[AxisValue, AxisValue, AxisValue]  # origin, partition, backend


class Spread(NamedTuple):
    """The relative variance of load means, with its degrees of freedom (infinite: assumed).

    It contains some variance of repeats: `within`, as a relative variance of the same means. `repeat` is the variance of one
    repeat (None: unknown), and `inverse_repeats` the mean of 1/repeats.
    """

    variance: float
    df: float
    within: float = 0.0
    repeat: float | None = None
    inverse_repeats: float = 0.0

    @property
    def assumed(self) -> bool:
        return math.isinf(self.df)

    @property
    def share(self) -> float:
        """The standard deviation, as a share of the mean."""
        return math.sqrt(self.variance)


# The spreads in intervals: by (backend, partition), then by metric, each once.
Used = dict[tuple[str, str], dict[str, dict[Spread, None]]]


# ---------------------------------------------------------------- over the runs of a workspace


@dataclass(slots=True)
class _Sums:
    """Sums over runs that share engine loads, directly or through others; each weighted with loads - 1."""

    loads: set[str] = field(default_factory=set)
    weight: float = 0.0
    between: float = 0.0
    within: float = 0.0
    inverse: float = 0.0
    # Of runs with one repeat per load: the variance of their repeats is unknown.
    inverse_unknown: float = 0.0
    repeat: float = 0.0
    repeat_df: float = 0.0

    @property
    def df(self) -> float:
        """At most n - 1 for n loads, however many runs share them."""
        return min(self.weight, len(self.loads) - 1)

    def add_run(self, of: LoadSample, times: int = 1) -> None:
        weight = times * (of.loads - 1)
        self.weight += weight
        self.between += weight * of.between
        self.inverse += weight * of.inverse_repeats
        if of.within_df:
            self.within += weight * of.within * of.inverse_repeats
            self.repeat += times * of.within_df * of.within
            self.repeat_df += times * of.within_df
        else:
            self.inverse_unknown += weight * of.inverse_repeats

    def add(self, other: _Sums, share: float = 1.0, times: int = 1) -> None:
        """Add the other's sums, the weighted ones times `share`."""
        weight = times * share
        self.weight += weight * other.weight
        self.between += weight * other.between
        self.within += weight * other.within
        self.inverse += weight * other.inverse
        self.inverse_unknown += weight * other.inverse_unknown
        self.repeat += times * other.repeat
        self.repeat_df += times * other.repeat_df

    def add_group(self, group: _Sums, times: int = 1) -> None:
        """Add a group, weighted with its degrees of freedom; -1 times: subtract it."""
        if group.weight > 0:
            self.add(group, group.df / group.weight, times)

    def spread(self) -> Spread | None:
        """The spread from a total of groups, weighted with their degrees of freedom."""
        if self.weight < 1:
            return None
        repeat = self.repeat / self.repeat_df if self.repeat_df > 0 else None
        within = (self.within + (repeat or 0.0) * self.inverse_unknown) / self.weight
        return Spread(max(0.0, self.between / self.weight), self.weight, within, repeat, self.inverse / self.weight)


class _Pool:
    """The runs with several loads, in one metric: groups of runs that share loads, and their total, by backend and partition."""

    def __init__(self, metric: str, cells: Iterable[Cell]) -> None:
        self._metric = metric
        self._group_of_load: dict[str, _Sums] = {}
        self._group_of_run: dict[str, tuple[_Sums, LoadSample]] = {}
        groups: dict[Key, dict[int, _Sums]] = {}
        for cell in cells:
            found = self._sampled(cell) if len(cell.values.get(metric, ())) > 1 else None
            if found is None:
                continue
            of, loads = found
            of_key = groups.setdefault(key_of(cell), {})
            group = _Sums()
            shared = [self._group_of_load[load] for load in loads if load in self._group_of_load]
            for other in {id(one): one for one in shared}.values():
                of_key.pop(id(other), None)
                group.add(other)
                group.loads |= other.loads
            of_key[id(group)] = group
            group.add_run(of)
            group.loads.update(loads)
            self._group_of_load.update(dict.fromkeys(group.loads, group))
            self._group_of_run[cell.run_id] = group, of
        self._totals = {key: _Sums() for key in groups}
        for key, of_key in groups.items():
            for group in of_key.values():
                self._totals[key].add_group(group)

    def _sampled(self, cell: Cell) -> tuple[LoadSample, list[str]] | None:
        """On the logarithmic scale; with values of 0 or less, relative to the mean. None for fewer than two loads."""
        values = cell.values.get(self._metric, [])
        if len(values) < 2:
            return None
        of = load_sample(values, all(min(of_load) > 0 for of_load in values if of_load))
        if of is None or of.loads < 2 or not of.scale:
            return None
        # A cell without a database behind it need not name its loads.
        names = cell.loads or [f"{cell.run_id}.{place}" for place in range(len(values))]
        return of, [name for name, of_load in zip(names, values, strict=True) if of_load]

    def spread(self, key: Key, instead: Cell | None = None) -> Spread | None:
        """The pooled spread; with the loads of `instead` in place of those of its run."""
        total = self._totals.get(key)
        if instead is None:
            return total.spread() if total else None
        adjusted, group = _Sums(), _Sums()
        if total:
            adjusted.add(total)
        if instead.run_id in self._group_of_run:
            known, of_run = self._group_of_run[instead.run_id]
            adjusted.add_group(known, -1)
            group.add(known)
            group.add_run(of_run, -1)
            if group.weight > 0:  # of other runs of these loads
                group.loads |= known.loads
        found = self._sampled(instead)
        if found:
            group.add_run(found[0])
            group.loads.update(found[1])
        adjusted.add_group(group)
        return adjusted.spread()


class LoadSpreads:
    """The spread between engine loads by backend and partition, from the compared cells and from `history`, other runs of the
    workspace with several loads. `used` are the spreads in intervals, by backend and partition, then by metric."""

    def __init__(self, cells: Iterable[Cell], history: Iterable[Cell] = ()) -> None:
        compared = list(cells)
        run_ids = {cell.run_id for cell in compared} if history else set()
        self._compared = compared
        self._history = [cell for cell in history if cell.run_id not in run_ids]
        self._pools: dict[str, _Pool] = {}
        self._known: dict[tuple[str, Key], Spread | None] = {}
        self.used: Used = {}
        # Metrics and pairs of keys with both spreads in `used`: two measured ones, or at least one that is assumed.
        self.measured: set[tuple[str, Key, Key]] = set()
        self.assumed: set[tuple[str, Key, Key]] = set()

    def of(self, metric: str, cell: Cell, instead: Cell | None = None) -> Spread | None:
        """The spread of this cell's loads in a metric. The loads of `instead` replace those of its run in the history. None if
        unknown: for a metric of a load, of which no compared cell has several."""
        key = key_of(cell)
        if instead is None and (metric, key) in self._known:
            return self._known[metric, key]
        if metric not in self._pools:
            # The wait or load time of one run says nothing about another run's.
            history = [] if metric in OF_A_LOAD else self._history
            self._pools[metric] = _Pool(metric, [*self._compared, *history])
        spread = self._pools[metric].spread(key, instead if instead and key_of(instead) == key else None)
        if metric not in OF_A_LOAD:
            spread = _or_assumed(spread, cell.backend)
        if instead is None:
            self._known[metric, key] = spread
        return spread


def key_of(cell: Cell) -> Key:
    """The key of cells that share one spread between loads."""
    axes = cell.axes
    return axes["origin"], axes["partition"], axes["backend"]


def _or_assumed(measured: Spread | None, backend: str) -> Spread:
    assumed = ASSUMED_LOAD_SPREAD.get(backend, LARGEST_LOAD_SPREAD) ** 2
    if measured is not None and (measured.df >= FEWEST_DF or measured.variance > assumed):
        return measured
    return Spread(assumed, math.inf)


# ---------------------------------------------------------------- of two cells


class Side(NamedTuple):
    """One of two compared cells in a metric: its values by load, and their sample."""

    cell: Cell
    values: Sequence[Sequence[float]]
    sample: LoadSample


def estimate(
    metric: str, ours: Side, theirs: Side, as_ratio: bool, spreads: LoadSpreads, instead: Cell | None = None
) -> Estimate:
    """Our mean minus theirs, with its interval if the spread is known.

    The variance of a cell's mean is (S + x) / loads. S is the variance of load means on its backend and partition, and contains
    some variance of repeats. x is the variance of this cell's repeats beyond that (`_excess`).
    """
    difference = ours.sample.mean - theirs.sample.mean
    if metric in SAME_IN_EVERY_LOAD:
        return _of_repeats(difference, ours.values, theirs.values, as_ratio)
    known = _known_spreads(metric, ours.cell, theirs.cell, spreads, instead)
    if known is None:
        return Estimate(difference)
    between: dict[Key, Component] = {}
    within = []
    for (cell, _, of), spread in zip((ours, theirs), known, strict=True):
        share = of.scale**2 / of.loads
        key = key_of(cell)
        # One estimate for both sides, not two independent ones.
        before = between[key].variance if key in between else 0.0
        between[key] = Component(before + share * spread.variance, spread.df)
        excess = _excess(of, spread)
        if excess > 0:
            within.append(Component(share * excess, of.within_df or spread.df))
    return intervals.estimate(difference, list(between.values()), within)


def has_interval(metric: str, ours: Cell, theirs: Cell, spreads: LoadSpreads, instead: Cell | None = None) -> bool:
    """Whether `estimate` gives an interval for two cells that have values; `spreads.used` then has the spreads in it."""
    if metric in SAME_IN_EVERY_LOAD:
        return min(_repeats(cell.values[metric]) for cell in (ours, theirs)) > 1
    pair = metric, key_of(ours), key_of(theirs)
    if instead is None and (
        pair in spreads.measured
        or (pair in spreads.assumed and len(ours.values[metric][0]) > 1 and len(theirs.values[metric][0]) > 1)
    ):
        return True
    known = _known_spreads(metric, ours, theirs, spreads, instead)
    if known is None:
        return False
    if metric not in OF_A_LOAD:
        for cell, spread in zip((ours, theirs), known, strict=True):
            spreads.used.setdefault((cell.backend, cell.partition), {}).setdefault(metric, {})[spread] = None
        # An assumed spread needs cells with several repeats in a load, a measured one does not.
        (spreads.assumed if any(spread.assumed for spread in known) else spreads.measured).add(pair)
    return True


def _known_spreads(
    metric: str, ours: Cell, theirs: Cell, spreads: LoadSpreads, instead: Cell | None
) -> tuple[Spread, Spread] | None:
    """The spreads of the two cells' loads; None if one is unknown, or is assumed and the cell has single repeats."""
    if metric in OF_A_LOAD and not any(sum(map(bool, cell.values[metric])) > 1 for cell in (ours, theirs)):
        return None
    found = []
    for cell in (ours, theirs):
        spread = spreads.of(metric, cell, instead)
        if spread is None or (spread.assumed and all(len(of_load) < 2 for of_load in cell.values[metric])):
            return None
        found.append(spread)
    return found[0], found[1]


def _excess(of: LoadSample, spread: Spread) -> float:
    """The addition of a cell's repeats to the relative variance of its load means. With fewer repeats than the spread's runs: the
    missing part of a repeat's variance. With a larger variance of repeats: the difference. At least 0: a subtraction, based on
    few degrees of freedom, would make the interval too narrow."""
    if spread.repeat is None and not spread.assumed:  # from single repeats: it contains the variance of one
        return 0.0
    fewer = (of.inverse_repeats - spread.inverse_repeats) * (spread.repeat or 0.0)
    wider = of.within * of.inverse_repeats - spread.within
    return max(fewer, wider, 0.0)


def _repeats(by_load: Sequence[Sequence[float]]) -> int:
    """The samples of `_of_repeats`."""
    longest = max(map(len, by_load))
    return longest if longest > 1 else sum(map(bool, by_load))


def _of_repeats(
    difference: float, ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], as_ratio: bool
) -> Estimate:
    """The difference in a metric that a load cannot change. Its repeats draw with the same seeds in each load, so a repeat's mean
    over the loads is one sample. With one repeat per load, the loads are the samples."""
    components = []
    for values in (ours, theirs):
        taken = [[math.log(value) for value in of_load] if as_ratio else of_load for of_load in values if of_load]
        places = [
            [of_load[place] for of_load in taken if place < len(of_load)] for place in range(max(map(len, taken)))
        ]
        samples = [sum(of_place) / len(of_place) for of_place in places] if len(places) > 1 else places[0]
        if len(samples) < 2:
            return Estimate(difference)
        components.append(Component(intervals.variance(samples) / len(samples), len(samples) - 1))
    return intervals.estimate(difference, components, [])


# ---------------------------------------------------------------- in words


def sources(used: Used) -> list[str]:
    """The origin of the spread between engine loads: a line for each backend and partition, and one for assumed ones."""
    assumed: dict[float, dict[str, None]] = {}
    lines = []
    for (backend, partition), by_metric in used.items():
        measured = {metric: [spread for spread in found if not spread.assumed] for metric, found in by_metric.items()}
        named = [
            f"{_span([spread.share for spread in found], '.1%')} in {ALL_METRICS[metric].title}"
            for metric, found in measured.items()
            if found
        ]
        if named:
            listed = ", ".join(named[:METRICS_NAMED])
            if len(named) > METRICS_NAMED:
                listed += f" and {len(named) - METRICS_NAMED} other metrics"
            lines.append(f"engine loads of {backend} on {partition} differ by {listed}, as measured in this workspace")
        for spread in dict.fromkeys(spread for found in by_metric.values() for spread in found if spread.assumed):
            assumed.setdefault(spread.share, {})[f"{backend} on {partition}"] = None
    for share, whose in assumed.items():
        lines.append(
            f"spread between engine loads of {', '.join(whose)} is assumed: a standard deviation of {share:.0%};"
            " --loads 3 measures it"
        )
    return lines


def _span(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


# More metrics than these are counted.
METRICS_NAMED = 4
