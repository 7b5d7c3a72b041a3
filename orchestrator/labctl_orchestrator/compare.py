"""Rows -> comparison: medians with their spread, ratios, and what may not be compared. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from labctl_slurm.errors import WrongUseError, nearest
from labctl_workers.measure import METRICS

# What may be asked for, in the order in which tables show it.
AXES = (
    "partition", "backend", "model", "dtype", "device", "gpus", "parallel", "mode", "engine_options", "max_new_tokens",
    "batch_size", "request_rate", "requests", "sampling", "ignore_eos", "raw_prompt", "prompt_set",
)  # fmt: skip
# A fact that differs because this axis does is no news where the axis is what is compared.
FOLLOWS_FROM = {
    "effective dtype": "dtype",
    "GPU": "partition",
    "tokens generated": "max_new_tokens",
    "finish reason": "max_new_tokens",
}

# The same, but only as long as every row of one backend has the same.
FACTS_OF_A_BACKEND = ("attention", "vllm")
# An axis that may be another one's doing: a backend splits a model in its way, and has options of its own.
COMES_WITH = {"parallel": "backend", "mode": "backend", "engine_options": "backend"}


@dataclass(frozen=True)
class Told:
    """How a metric is told: its title, unit, and which way is better."""

    title: str
    unit: str
    better: str


# Figures of one engine load or of its job, not of a repeat.
OF_A_LOAD = {
    "load_s": Told("load", "s", "lower"),
    "init_s": Told("init", "s", "lower"),
    "warmup_s": Told("warm-up", "s", "lower"),
    "queue_s": Told("wait in the queue", "s", "lower"),
    "gpu_s": Told("GPU time of the job", "s", "lower"),
}
ALL_METRICS = {**{name: Told(m.title, m.unit, m.better) for name, m in METRICS.items()}, **OF_A_LOAD}
DEFAULT_METRICS = ("output_tok_s", "ttft_s", "tpot_s", "peak_allocated_bytes")


@dataclass(frozen=True)
class Cell:
    """One measured run: what was asked (`axes`), a value a repeat of each metric, and `facts`, what else may explain a
    difference: versions, GPUs, effective dtype, tokens generated. `remarks` are what has to be said wherever it is shown."""

    run_id: str
    axes: dict[str, Any]
    values: dict[str, list[float]]
    facts: dict[str, str]
    text: str = ""
    remarks: tuple[str, ...] = ()


@dataclass
class Row:
    """One line of a comparison. `ratio` is to the first row of its block; None where either has no value."""

    run_id: str
    at: dict[str, Any]
    median: float | None
    low: float | None
    high: float | None
    n: int
    ratio: float | None = None
    text: str = ""


@dataclass
class Block:
    """Rows that differ on the compared axes alone; `fixed` is what they share and other blocks do not."""

    metric: str
    fixed: dict[str, Any]
    rows: list[Row]


@dataclass
class Comparison:
    """The answer to one question, and what has to be said with it."""

    by: list[str]
    blocks: list[Block]
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values; by hand, for `asdict` copies every value of every row."""
        blocks = [{**vars(block), "rows": [vars(row) for row in block.rows]} for block in self.blocks]
        return {**vars(self), "blocks": blocks}


def varying_axes(cells: Sequence[Cell]) -> list[str]:
    """The axes on which the cells differ, but for those that only follow from another."""
    return [axis for axis in AXES if _differ(cells, axis) and not follows(cells, axis)]


def _differ(cells: Sequence[Cell], axis: str) -> bool:
    values = [cell.axes[axis] for cell in cells]
    return len(set(values)) > 1 or len(set(map(type, values))) > 1  # 1 is True


def follows(cells: Sequence[Cell], axis: str) -> bool:
    """Whether the axis differs only where the one that it comes with does, in the same way for all cells."""
    leader = COMES_WITH.get(axis)
    if leader is None or not _differ(cells, leader):
        return False
    return _goes_by(leader, cells, [repr(cell.axes[axis]) for cell in cells])


def _goes_by(axis: str, cells: Sequence[Cell], seen: Sequence[str]) -> bool:
    """Whether cells that are equal on the axis are equal in what is seen of them."""
    pairs = {(repr(cell.axes[axis]), of_cell) for cell, of_cell in zip(cells, seen, strict=True)}
    return len(pairs) == len({value for value, _ in pairs})


def check_axes(axes: Sequence[str]) -> None:
    """Raises WrongUseError for a word that is no axis."""
    for axis in axes:
        if axis not in AXES:
            raise WrongUseError(f"there is no axis {axis!r}", nearest(axis, AXES))


def check_metrics(metrics: Sequence[str]) -> None:
    """Raises WrongUseError for a word that is no metric."""
    for metric in metrics:
        if metric not in ALL_METRICS:
            raise WrongUseError(f"there is no metric {metric!r}", nearest(metric, ALL_METRICS))


def where(cells: Sequence[Cell], conditions: Sequence[str]) -> list[Cell]:
    """The cells for which every "axis=value" holds. Raises WrongUseError for another form or an unknown axis."""
    kept = list(cells)
    for condition in conditions:
        axis, equals, value = condition.partition("=")
        if not equals:
            raise WrongUseError(f"{condition!r} is not of the form axis=value", "such as dtype=float16")
        check_axes([axis])
        kept = [cell for cell in kept if str(cell.axes[axis]) == value]
    return kept


def compare(cells: Sequence[Cell], by: Sequence[str], metrics: Sequence[str]) -> Comparison:
    """Compare the cells along the axes `by` (all that vary, where it is empty).

    Cells that are equal on every other axis make a block, so that only like is compared with like. Where no two cells are
    alike but for `by`, all are shown together and every other difference is warned of.
    """
    varying = varying_axes(cells)
    chosen = list(by) or varying
    others = [axis for axis in varying if axis not in chosen]
    groups = _alike(cells, others)
    warnings = []
    if others and all(len(group) == 1 for _, group in groups):
        groups = [({}, list(cells))]
        warnings = [_axis_warning(axis, cells) for axis in others]
    for _, group in groups:
        warnings += _fact_warnings(group, chosen)
    warnings += [f"{cell.run_id} {remark}" for cell in cells for remark in cell.remarks]
    blocks = [_block(metric, fixed, group, chosen) for metric in metrics for fixed, group in groups]
    notes = _of_followers(cells, chosen)
    notes += _of_the_spread([row for block in blocks if block.metric == metrics[0] for row in block.rows])
    return Comparison(chosen, blocks, list(dict.fromkeys(warnings)), notes)


def _alike(cells: Sequence[Cell], others: Sequence[str]) -> list[tuple[dict[str, Any], list[Cell]]]:
    groups: dict[str, tuple[dict[str, Any], list[Cell]]] = {}
    for cell in cells:
        fixed = {axis: cell.axes[axis] for axis in others}
        groups.setdefault(repr(fixed), (fixed, []))[1].append(cell)
    return list(groups.values())


def _block(metric: str, fixed: dict[str, Any], cells: Sequence[Cell], by: Sequence[str]) -> Block:
    rows = [_row(metric, cell, by) for cell in cells]
    first = rows[0].median
    for row in rows:
        if (
            row.median is not None and first and ALL_METRICS[metric].better
        ):  # a ratio of log-probabilities tells nothing
            row.ratio = row.median / first
    return Block(metric, fixed, rows)


def _row(metric: str, cell: Cell, by: Sequence[str]) -> Row:
    values = cell.values.get(metric, [])
    at = {axis: cell.axes[axis] for axis in by}
    if not values:
        return Row(cell.run_id, at, None, None, None, 0, text=cell.text)
    return Row(cell.run_id, at, statistics.median(values), min(values), max(values), len(values), text=cell.text)


def _of_followers(cells: Sequence[Cell], chosen: Sequence[str]) -> list[str]:
    """What differs because of a compared axis, and is a setting, not its nature."""
    differ = _differ(cells, "engine_options") and follows(cells, "engine_options")
    if "backend" not in chosen or "engine_options" in chosen or not differ:
        return []
    options = _listed(f"{cell.axes['backend']} {cell.axes['engine_options']}" for cell in cells)
    return [f"the engine options differ with the backend: {options}"]


def _of_the_spread(rows: Sequence[Row]) -> list[str]:
    """What the repeats of the first metric say of themselves."""
    notes = []
    for row in rows:
        if row.median is None or row.low is None or row.high is None:
            continue
        spread = (row.high - row.low) / abs(row.median) if row.median else 0.0
        if spread > WIDE_SPREAD:
            notes.append(f"the {row.n} repeats of {row.run_id} lie {spread:.0%} apart: was the machine busy?")
    once = [row.run_id for row in rows if row.n == 1]
    if once:
        notes.append(f"measured once, so nothing is known of the spread: {_listed(once)}")
    return notes


WIDE_SPREAD = 0.2


def _axis_warning(axis: str, cells: Sequence[Cell]) -> str:
    return f"the rows differ on {axis} too ({_listed(str(cell.axes[axis]) for cell in cells)}): not its effect alone"


def _fact_warnings(cells: Sequence[Cell], by: Sequence[str]) -> list[str]:
    """Differences that nobody asked for: not those that the compared axis makes by itself."""
    names = dict.fromkeys(name for cell in cells for name in cell.facts if FOLLOWS_FROM.get(name) not in by)
    warnings = []
    for name in names:
        seen = [cell.facts.get(name, "not known") for cell in cells]
        if name in FACTS_OF_A_BACKEND and "backend" in by and _goes_by("backend", cells, seen):
            continue
        if len(set(seen)) > 1:
            warnings.append(f"the rows differ in {name} ({_listed(seen)})")
    return warnings


def _listed(values: Any) -> str:
    return ", ".join(dict.fromkeys(values))
