"""Cells -> comparison: pairs (see `pairs`), means, ratios with their 95% intervals, and values that cannot be compared. Pure."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from labctl_orchestrator.analysis import accuracy, load_spread, perplexity
from labctl_orchestrator.analysis.axes import (
    axes_of,
    check_axes,
    follows_any,
    is_shared,
    leaders_of,
    values_on,
    varying_axes,
)
from labctl_orchestrator.analysis.comparison import (
    NO_ESTIMATE,
    Axes,
    Block,
    Cell,
    Comparison,
    Estimates,
    Row,
    has_ratio,
)
from labctl_orchestrator.analysis.intervals import Estimate
from labctl_orchestrator.analysis.load_spread import LoadSpreads, Side
from labctl_orchestrator.analysis.metrics import ALL_METRICS, MONEY, OF_A_TEXT, OF_TASKS, RESERVED
from labctl_orchestrator.analysis.pairs import Pair, axis_to_compare, pairs
from labctl_orchestrator.analysis.warnings import notes_of, nothing_alike, warnings_of
from labctl_slurm.errors import WrongUseError, nearest


def compare(
    cells: Sequence[Cell],
    by: Sequence[str],
    metrics: Sequence[str],
    baseline: Mapping[str, str] | None = None,
    *,
    load_history: Sequence[Cell] = (),
) -> Comparison:
    """Compare the cells along the first axis of `by`, at each value of the others. Without `by`: along the axis that
    `pairs.axis_to_compare` finds, at each value of all others that vary.

    A row's baseline is the cell with the first value of the compared axis and equal values on all others, except those that
    follow the compared one (see `pairs`). If there is no pair, a warning names the axes that differ. `baseline` names other
    values, by axis; these are then the compared axes. Raises WrongUseError if no cell has them.

    `load_history` are other runs of the workspace with several engine loads (`load_spread`).
    """
    axes, varying = axes_of(cells), varying_axes(cells)
    at_baseline = checked_baseline(cells, list(by) or varying, baseline) if baseline else {}
    by_itself = None if by or at_baseline else axis_to_compare(cells, varying, axes)
    chosen = list(by)
    if not chosen:
        first = [by_itself[0]] if by_itself else list(at_baseline)
        chosen = [*first, *(axis for axis in varying if axis not in first)]
    check_axes(chosen, axes)
    compared = list(at_baseline) or chosen[:1]
    if "backend" in compared:  # engine options with several values distinguish the rows of an engine
        chosen += [axis for axis in varying if axis not in chosen and "backend" in leaders_of(axis, axes)]
    if "gpus" in compared and "parallel" in varying and "parallel" not in chosen:
        chosen.append("parallel")
    if by_itself:
        found = by_itself[1]
    elif varying:
        others = [axis for axis in varying if axis not in compared]
        found = pairs(cells, compared, others, axes, list(at_baseline.values()) if at_baseline else None)
    else:  # nothing but the runs themselves
        found = [Pair(place, 0) for place in range(1, len(cells))]
    warnings = []
    if not found and len(cells) > 1:
        chosen = [axis for axis in axes if axis in chosen or axis in varying]
        tables, warnings = [_CellTable({}, list(cells), [None] * len(cells))], [nothing_alike(cells, compared, varying)]
    else:
        tables = _tables(cells, found, [axis for axis in varying if axis not in chosen])
    if len(chosen) > 1 and not at_baseline:
        at_baseline = {compared[0]: cells[0].axes[compared[0]]}
    followers = [
        axis
        for axis in axes
        if axis not in compared
        and follows_any(axis, compared, axes)
        and any(_set_by_leader(cells[row], cells[baseline], axis) for row, baseline in found)
    ]
    spreads = LoadSpreads(cells, load_history)
    blocks = [_block(metric, table, chosen, spreads) for metric in metrics for table in tables]
    warnings += warnings_of(cells, [table.compared for table in tables], [*chosen, *followers], blocks)
    notes = notes_of(cells, found, compared, followers, metrics, blocks, spreads)
    return Comparison(chosen, blocks, warnings, notes, at_baseline)


def _set_by_leader(cell: Cell, baseline: Cell, axis: str) -> bool:
    """Whether two paired cells differ on a follower. How a model is shared does not matter where a GPU has all of it."""
    if cell.axes[axis] == baseline.axes[axis]:
        return False
    return axis != "parallel" or (is_shared(cell) and is_shared(baseline))


@dataclass(frozen=True)
class _CellTable:
    """The cells of one table, and the place of each one's baseline in it, None without one."""

    fixed: Axes
    cells: list[Cell]
    baselines: list[int | None]

    @property
    def compared(self) -> list[Cell]:
        """The cells that are in a pair."""
        return [cell for cell, baseline in zip(self.cells, self.baselines, strict=True) if baseline is not None]


DEFAULT = "default"


def _tables(cells: Sequence[Cell], found: Sequence[Pair], fixed_by: Sequence[str]) -> list[_CellTable]:
    """The cells in tables, one for each combination of values on the axes `fixed_by`. A cell with two baselines is in two."""
    tables: dict[str, list[dict[int, int | None]]] = {}  # by what is fixed: the place of each cell, and of its baseline
    fixed_of: dict[str, Axes] = {}

    values = values_on(fixed_by, cells)
    keys: dict[Hashable, str] = {}

    def key_of(one: int, other: int) -> str:
        same = values[one] == values[other]
        if same and values[one] in keys:
            return keys[values[one]]
        ours, theirs = cells[one].axes, cells[other].axes
        fixed = {axis: ours[axis] if ours[axis] == theirs[axis] else DEFAULT for axis in fixed_by}
        key = repr(fixed)
        fixed_of.setdefault(key, fixed)
        if same:
            keys[values[one]] = key
        return key

    in_pairs: set[int] = set()
    for row, baseline in found:
        alike = tables.setdefault(key_of(row, baseline), [])
        for table in alike:
            if table.get(row) in (None, baseline):
                break
        else:
            alike.append(table := {})
        table[row] = baseline
        if table.get(baseline) is None:
            table[baseline] = baseline
        in_pairs.update((row, baseline))
    for place in range(len(cells)):
        if place not in in_pairs:
            alike = tables.setdefault(key_of(place, place), [])
            if not alike:
                alike.append({})
            alike[0][place] = None
    for axis in fixed_by:
        if all(fixed[axis] == DEFAULT for fixed in fixed_of.values()):
            for fixed in fixed_of.values():
                del fixed[axis]
    made = [(fixed_of[key], table) for key, alike in tables.items() for table in alike]
    made.sort(key=lambda one: min(one[1]))
    return [_in_rows(cells, fixed, table) for fixed, table in made]


def _in_rows(cells: Sequence[Cell], fixed: Axes, table: Mapping[int, int | None]) -> _CellTable:
    """The table with its cells in order, those of one baseline together."""
    first: dict[int, int] = {}
    root = {place: place if baseline is None else baseline for place, baseline in table.items()}
    for place in sorted(table):
        first.setdefault(root[place], place)
    ordered = sorted(table, key=lambda place: (first[root[place]], place))
    at = {place: row for row, place in enumerate(ordered)}
    baselines = [None if (baseline := table[place]) is None else at[baseline] for place in ordered]
    return _CellTable(fixed, [cells[place] for place in ordered], baselines)


def checked_baseline(cells: Sequence[Cell], chosen: Sequence[str], asked: Mapping[str, str]) -> Axes:
    """The baseline with the cells' own values: "64" is 64. Axis "": the first compared axis with this value."""
    found: Axes = {}
    for axis, value in asked.items():
        where = [axis] if axis else list(chosen)
        if not where:
            raise WrongUseError(
                f"--baseline needs an axis that varies: {value}",
                "compare more runs, such as labctl compare --all",
            )
        if axis not in chosen and axis in axes_of(cells):
            raise WrongUseError(
                f"baseline on an axis that is not compared: {axis}",
                f"add --by {axis}, or select with --where {axis}={value}",
            )
        check_axes(where, chosen or axes_of(cells))
        known = {str(cell.axes[name]): (name, cell.axes[name]) for name in reversed(where) for cell in cells}
        if str(value) not in known:
            named = axis or ", ".join(chosen)
            raise WrongUseError(f"no measured run for the baseline: {named} {value}", nearest(str(value), known))
        name, own = known[str(value)]
        found[name] = own
    return found


def _block(metric: str, table: _CellTable, by: Sequence[str], spreads: LoadSpreads) -> Block:
    metric_text = ALL_METRICS[metric]
    unit = metric_text.unit
    if metric in MONEY:
        unit = "/".join(dict.fromkeys(cell.currency for cell in table.cells if cell.currency)) + unit
    rows = _rows(metric, table.cells, by, table.baselines, spreads)
    return Block(metric, table.fixed, rows, metric_text.title, unit, metric_text.better)


def row_against(metric: str, cell: Cell, baseline: Cell | None, spreads: LoadSpreads) -> Row:
    """One cell in one metric, compared with a baseline. For the spread, the baseline's loads replace those of its run in the
    history."""
    if baseline is None:
        return _rows(metric, [cell], [], [None], spreads)[0]
    return _rows(metric, [baseline, cell], [], [0, 0], spreads, instead=baseline)[1]


def _rows(
    metric: str,
    cells: Sequence[Cell],
    by: Sequence[str],
    baselines: Sequence[int | None],
    spreads: LoadSpreads,
    instead: Cell | None = None,
) -> list[Row]:
    """A row for each cell, compared with its baseline, given by place."""
    bounds = [_bounds(cell.values.get(metric, ())) for cell in cells]
    # Ratios need a better direction and positive values.
    as_ratio = has_ratio(metric) and all(low is None or low > 0 for low, _ in bounds)
    rows = [Row(metric, cell, by, low, high, as_ratio) for cell, (low, high) in zip(cells, bounds, strict=True)]
    may_differ_in_kind = metric in (*RESERVED, *MONEY, *OF_A_TEXT, *OF_TASKS)
    estimates: Callable[[Row], Estimates] = functools.partial(_estimates, spreads, instead)
    if metric in OF_A_TEXT or metric in OF_TASKS:
        estimates = _of_items
    for place, (row, of_baseline) in enumerate(zip(rows, baselines, strict=True)):
        if of_baseline is None:
            continue
        if of_baseline == place:
            row.is_baseline = True
            row.estimate = _of_itself if row.low is not None else None
            continue
        row.baseline = baseline = rows[of_baseline]
        if may_differ_in_kind:
            row.not_comparable = _why_not(metric, row.cell, baseline.cell)
        if row.has_an_answer:
            row.estimate = estimates
            if metric in OF_A_TEXT:
                row.has_interval = row.cell.documents is not None and perplexity.have_interval(row.cell.documents)
            elif metric in OF_TASKS:
                row.has_interval = row.cell.questions is not None
            else:
                row.has_interval = load_spread.has_interval(metric, row.cell, baseline.cell, spreads, instead)
    return rows


def _bounds(by_load: Sequence[Sequence[float]]) -> tuple[float, float] | tuple[None, None]:
    """The lowest and the highest value."""
    values = by_load[0] if len(by_load) == 1 else [value for of_load in by_load for value in of_load]
    return (min(values), max(values)) if values else (None, None)


def _of_itself(row: Row) -> Estimates:
    return Estimates(ratio=1.0) if row.as_ratio else Estimates(difference=0.0)


def _estimates(spreads: LoadSpreads, instead: Cell | None, row: Row) -> Estimates:
    baseline = row.baseline
    if baseline is None or row.sample is None or baseline.sample is None:
        return NO_ESTIMATE
    sides = Side(row.cell, row.values, row.sample), Side(baseline.cell, baseline.values, baseline.sample)
    return _as_estimates(row, load_spread.estimate(row.metric, *sides, row.as_ratio, spreads, instead))


def _of_items(row: Row) -> Estimates:
    """Of the documents of a text, or the questions of tasks."""
    ours, theirs = row.cell, row.baseline.cell if row.baseline else None
    if row.metric in OF_A_TEXT and theirs and ours.documents and theirs.documents:
        return _as_estimates(row, perplexity.compared(row.metric, ours.documents, theirs.documents))
    if row.metric in OF_TASKS and theirs and ours.questions and theirs.questions:
        return _as_estimates(row, accuracy.compared(ours.questions, theirs.questions))
    return NO_ESTIMATE


def _as_estimates(row: Row, found: Estimate) -> Estimates:
    interval = None if found.low is None or found.high is None else (found.low, found.high)
    if not row.as_ratio:
        return Estimates(difference=found.difference, difference_interval=interval)
    return Estimates(math.exp(found.difference), interval and (math.exp(interval[0]), math.exp(interval[1])))


def _why_not(metric: str, cell: Cell, baseline: Cell) -> str:
    """The reason why the two cannot be compared in this metric; "" if they can."""
    if metric in RESERVED and cell.backend != baseline.backend:
        return "each engine reserves memory by its own policy (vLLM reserves its KV cache at the start)"
    if metric in MONEY and cell.currency and baseline.currency and cell.currency != baseline.currency:
        return f"prices are in {cell.currency} and in {baseline.currency}"
    ours, theirs = cell.documents, baseline.documents
    if metric in OF_A_TEXT and ours and theirs and ours.tokens != theirs.tokens:
        return perplexity.OTHER_TOKENS
    asked, of_theirs = cell.questions, baseline.questions
    if metric in OF_TASKS and asked and of_theirs and asked.names != of_theirs.names:
        return accuracy.OTHER_QUESTIONS
    return ""
