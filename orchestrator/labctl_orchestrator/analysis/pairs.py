"""Pairs of cells that differ on the compared axes alone. Pure.

Differences on axes that follow the compared ones (see `axes`) are allowed; a note names these axes.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

from labctl_orchestrator.analysis.axes import HAVE_DEFAULTS, LEADERS, follows_any, is_default, is_shared, values_on
from labctl_orchestrator.analysis.comparison import AxisValue, Cell
from labctl_workers.engines import ENGINES, engine_class

# The axes to compare by default, in this order. The load is compared only if nothing else varies.
DEFAULT_AXES = ("backend", "partition", "model", "dtype", "sampling", "engine_options", "parallel", "device")
LOAD_AXES = (
    "batch_size", "request_rate", "burstiness", "max_new_tokens", "input_len", "output_len", "gpus", "requests",
)  # fmt: skip


class Pair(NamedTuple):
    """The places of a cell and its baseline."""

    row: int
    baseline: int


def _alike(one: Cell, other: Cell, axis: str) -> bool:
    """Whether two cells with different leaders may form a pair, by their values on this follower."""
    if one.axes[axis] == other.axes[axis]:
        return True
    if axis in HAVE_DEFAULTS:
        return is_default(one, axis) and is_default(other, axis)
    if axis == "parallel":  # of one backend: alike if one of the two has a single GPU
        return one.backend != other.backend or not (is_shared(one) and is_shared(other))
    if axis in LEADERS and axis != "engine_options":
        return True
    known_to_both = _options_of(one.backend) & _options_of(other.backend)
    if axis != "engine_options":
        return axis not in known_to_both
    ours, theirs = (_read(str(cell.axes[axis] or "{}")) for cell in (one, other))
    return all(ours.get(option) == theirs.get(option) for option in known_to_both)


@functools.cache
def _options_of(backend: str) -> frozenset[str]:
    return frozenset(engine_class(backend).OPTIONS) if backend in ENGINES else frozenset()


@functools.lru_cache(maxsize=1024)
def _read(engine_options: str) -> dict[str, object]:
    options: dict[str, object] = json.loads(engine_options)
    return options


# ---------------------------------------------------------------- pairs


NOWHERE = "no cell has the baseline's values"


def pairs(
    cells: Sequence[Cell],
    compared: Sequence[str],
    others: Sequence[str],
    axes: Iterable[str],
    baseline: Sequence[AxisValue] | None = None,
) -> list[Pair]:
    """The pairs that differ on the `compared` axes and are alike on all `others`.

    A cell's baseline is the first cell like it with the first value of the compared axes, or with the values `baseline`. On
    followers, equal values pair first, then defaults with defaults. So a cell may be in two pairs.
    """
    loose = [axis for axis in others if follows_any(axis, compared, axes)]
    strict = [axis for axis in others if axis not in loose]
    values = values_on(compared, cells)
    wanted: Hashable = None
    if baseline is not None:
        given = [(type(value), value) for value in baseline]
        of_cells = ([(type(cell.axes[axis]), cell.axes[axis]) for axis in compared] for cell in cells)
        wanted = next((value for value, of_cell in zip(values, of_cells, strict=True) if of_cell == given), NOWHERE)
    order: dict[Hashable, int] = {}
    groups: dict[Hashable, dict[Hashable, list[int]]] = {}
    for place, (value, of_others) in enumerate(zip(values, values_on(strict, cells), strict=True)):
        order.setdefault(value, -1 if value == wanted else place)
        groups.setdefault(of_others, {}).setdefault(value, []).append(place)
    found: list[Pair] = []
    for by_value in groups.values():
        if len(by_value) > 1 and (wanted is None or wanted in by_value):
            in_order = [by_value[value] for value in sorted(by_value, key=order.__getitem__)]
            found += _in_a_group(cells, in_order, loose, only_first=wanted is not None)
    return found


def _in_a_group(
    cells: Sequence[Cell], by_value: Sequence[list[int]], loose: Sequence[str], *, only_first: bool
) -> Iterator[Pair]:
    """The pairs in a group. `by_value`: the places of cells with the first value of the compared axes, with the second, ..."""
    if not loose:
        yield from (Pair(place, by_value[0][0]) for places in by_value[1:] for place in places)
        return
    without_baseline: list[tuple[int, int]] = []  # a cell's place, and that of its value
    partners: dict[int, set[int]] = {}  # the values of a baseline's partners
    for value, places in enumerate(by_value):
        for place in places:
            earlier = by_value[:value][:1] if only_first else by_value[:value]
            baseline = next(
                (b for of_value in earlier if (b := _best(cells, place, of_value, loose)) is not None), None
            )
            if baseline is None:
                without_baseline.append((place, value))
            else:
                partners.setdefault(baseline, set()).add(value)
                yield Pair(place, baseline)
    for place, value in without_baseline:
        for later in range(value + 1, len(by_value)) if value == 0 or not only_first else ():
            if later not in partners.get(place, ()):
                row = _best(cells, place, by_value[later], loose)
                if row is not None:
                    yield Pair(row, place)


def _best(cells: Sequence[Cell], place: int, among: Sequence[int], loose: Sequence[str]) -> int | None:
    """The first alike cell with the most equal values."""
    cell = cells[place]
    alike = [other for other in among if all(_alike(cell, cells[other], axis) for axis in loose)]
    return max(alike, key=lambda other: sum(cell.axes[a] == cells[other].axes[a] for a in loose), default=None)


def axis_to_compare(
    cells: Sequence[Cell], varying: Sequence[str], axes: Iterable[str]
) -> tuple[str, list[Pair]] | None:
    """The default axis to compare along, with its pairs: the first of DEFAULT_AXES that varies and pairs cells, the load last.

    An axis that pairs less than half as many cells as another is skipped: one vLLM run does not turn a sweep over partitions into
    a comparison of backends. None if nothing varies.
    """
    ordered = [
        *(axis for axis in DEFAULT_AXES if axis in varying),
        *(axis for axis in varying if axis not in DEFAULT_AXES),
    ]
    ordered.sort(key=lambda axis: axis in LOAD_AXES)
    tried: list[tuple[str, list[Pair], int]] = []  # with how many cells each of them pairs
    for axis in ordered:
        found = pairs(cells, [axis], [other for other in varying if other != axis], axes)
        count = len(set(itertools.chain.from_iterable(found)))
        tried.append((axis, found, count))
        if count * 2 >= len(cells):
            break
    most = max((count for _, _, count in tried), default=0)
    return next(((axis, found) for axis, found, count in tried if count * 2 >= most), None)
