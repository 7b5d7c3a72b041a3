"""The axes of cells: their names, those on which cells differ, and those that follow another. Pure.

An axis may follow another: a default dtype differs with the partition, the options of an engine differ with the backend.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

from labctl_orchestrator.analysis.comparison import AXES, Cell
from labctl_slurm.errors import WrongUseError, nearest
from labctl_workers.engines import ENGINES, engine_class

# Axis -> the axes that may set it. An imported origin's partition is another machine.
LEADERS = {
    "dtype": ("partition", "origin"), "gpus": ("partition", "origin"), "device": ("partition", "origin"),
    "parallel": ("backend", "gpus"), "engine_options": ("backend",), "burstiness": ("request_rate",),
    "requests": ("batch_size", "request_rate", "served", "dataset"), "output_len": ("input_len",),
    "prompt_set": ("dataset", "workload_seed"), "quality": ("served",),
}  # fmt: skip
# Axes with a default of the partition, which a user may override.
HAVE_DEFAULTS = ("dtype", "gpus")
# Axes that show how a model scales over GPUs.
SCALING_AXES = ("gpus", "parallel")

# Of 100,000 cells, some show most differences.
CELLS_TRIED = 100


def axes_of(cells: Sequence[Cell]) -> list[str]:
    """The axes of these cells: `AXES`, then engine options and the name."""
    return [*AXES, *(axis for axis in (cells[0].axes if cells else ()) if axis not in AXES)]


def varying_axes(cells: Sequence[Cell]) -> list[str]:
    """The axes on which the cells differ, without those that follow another."""
    axes = axes_of(cells)
    differing = [axis for axis in axes if differ(cells, axis)]
    return [axis for axis in differing if not _follows(cells, axis, axes, differing)]


def check_axes(axes: Sequence[str], known: Sequence[str] = AXES) -> None:
    """Raises WrongUseError for an unknown axis."""
    for axis in axes:
        if axis not in known:
            remedy = nearest(axis, known)
            if remedy.startswith("known:"):  # too many to list
                remedy = "give one such as partition, backend, dtype or batch_size; docs/submissions.md lists all keys"
            raise WrongUseError(f"unknown axis: {axis!r}", remedy)


def leaders_of(axis: str, axes: Iterable[str]) -> tuple[str, ...]:
    """The axes that may set this one. An axis outside `axes`, those of every run, is an engine option."""
    return LEADERS.get(axis, () if axis in axes else ("backend",))


def follows_any(axis: str, leaders: Iterable[str], axes: Iterable[str]) -> bool:
    """Whether one of these leaders may set the axis."""
    return not set(leaders_of(axis, axes)).isdisjoint(leaders)


def _follows(cells: Sequence[Cell], axis: str, axes: Iterable[str], differing: Sequence[str]) -> bool:
    """Whether the axis differs only because its leaders do: with its default everywhere, and one value for each of theirs."""
    leaders = leaders_of(axis, axes)
    if not any(leader in differing for leader in leaders):
        return False
    if axis in HAVE_DEFAULTS and not all(is_default(cell, axis) for cell in cells):
        return False
    return goes_by(leaders, cells, [repr(cell.axes[axis]) for cell in cells])


def differ(cells: Sequence[Cell], axis: str) -> bool:
    """Whether the cells have several values on the axis; 1 and True are two."""
    if len(cells) < 2:
        return False
    first = cells[0].axes[axis]
    if any(cell.axes[axis] != first for cell in cells[:: max(1, len(cells) // CELLS_TRIED)]):
        return True
    values = [cell.axes[axis] for cell in cells]
    return values.count(values[0]) < len(values) or len(set(map(type, values))) > 1


def goes_by(axes: Sequence[str], cells: Sequence[Cell], seen: Sequence[str]) -> bool:
    """Whether cells with equal values on these axes have equal values in `seen`."""
    found = set(zip(values_on(axes, cells), seen, strict=True))
    return len(found) == len({values for values, _ in found})


def values_on(axes: Sequence[str], cells: Sequence[Cell]) -> list[Hashable]:
    """The values of each cell on these axes, to group cells by; 1 and True are two."""
    columns: list[list[Hashable]] = []
    for axis in axes:
        column: list[Hashable] = [cell.axes[axis] for cell in cells]
        if len(set(map(type, column))) > 1:
            column = [(type(value), value) for value in column]
        columns.append(column)
    return list(zip(*columns, strict=True)) if columns else [()] * len(cells)


def is_shared(cell: Cell) -> bool:
    """Whether several GPUs share the model."""
    return cell.axes["gpus"] not in (0, 1)


def is_default(cell: Cell, axis: str) -> bool:
    """Whether the cell has its partition's default."""
    return axis in cell.defaults and cell.defaults[axis] == cell.axes[axis]


def engine_options() -> set[str]:
    """The options of all engines."""
    return {option for backend in ENGINES for option in engine_class(backend).OPTIONS}


def with_engine_options(cells: Sequence[Cell], wanted: Sequence[str]) -> list[Cell]:
    """The cells with these engine options as axes, "default" if not set, and `engine_options` without them. Raises WrongUseError
    for a word that is neither an axis nor an option of an engine."""
    known = axes_of(cells)
    own = [name for name in dict.fromkeys(wanted) if name not in known]
    if not own:
        return list(cells)
    options = [json.loads(str(cell.axes["engine_options"] or "{}")) for cell in cells]
    check_axes(wanted, [*known, *sorted({name for of_cell in options for name in of_cell} | engine_options())])
    apart = []
    for cell, of_cell in zip(cells, options, strict=True):
        values = {name: of_cell.pop(name, "default") for name in own}
        rest = json.dumps(of_cell, sort_keys=True, ensure_ascii=False)
        apart.append(replace(cell, axes={**cell.axes, "engine_options": rest, **values}))
    return apart
