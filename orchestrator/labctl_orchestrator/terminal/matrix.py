"""A sweep as a grid: one axis across, the other axes down, the states of the runs in the cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from labctl_orchestrator.analysis.comparison import AXES
from labctl_orchestrator.tracking import run_status
from labctl_slurm.errors import WrongUseError, nearest

# For terminals that are too narrow for the words.
LETTERS = {
    run_status.DONE: "D", run_status.RUNNING: "R", run_status.PENDING: "P", run_status.SUBMITTING: "S",
    run_status.FAILED: "F", run_status.TIMEOUT: "T", run_status.CANCELLED: "C", run_status.REFUSED: "X",
    run_status.INTERRUPTED: "I", run_status.MISSING: "M", run_status.SUSPENDED: "H", run_status.SKIPPED: "-",
    run_status.LOST: "L", run_status.UNKNOWN: "?",
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """`down` and `across` are axes; `rows` are (values of the axes down, states of the runs for each value across). A cell
    without states is not part of the sweep. If no two runs share a row, all axes are down and `across` is empty."""

    down: tuple[str, ...]
    across: str
    columns: list[str]
    rows: list[tuple[tuple[str, ...], list[Counter[str]]]]


def grid(runs: Sequence[tuple[Mapping[str, Any], str]], across: str | None = None) -> Grid:
    """The grid of (axes, state) of each run. `across` defaults to the axis with most values.

    Raises WrongUseError for an unknown axis.
    """
    varying = [axis for axis in AXES if len({str(axes[axis]) for axes, _ in runs}) > 1]
    if across is not None and across not in AXES:
        raise WrongUseError(f"unknown axis: {across!r}", nearest(across, AXES))
    chosen = across
    across = across or max(varying, key=lambda axis: len({str(axes[axis]) for axes, _ in runs}), default="partition")
    down = tuple(axis for axis in varying if axis != across) or ("model",)
    columns = _values(axes[across] for axes, _ in runs)
    found = Grid(down, across, columns, _rows(runs, down, columns, lambda axes: str(axes[across])))
    if chosen is None and len(found.rows) > 1 and all(sum(map(bool, states)) == 1 for _, states in found.rows):
        # A row per combination: axes that change together would make a diagonal grid.
        return Grid(tuple(varying), "", ["state"], _rows(runs, varying, ["state"], lambda axes: "state"))
    return found


def _rows(
    runs: Sequence[tuple[Mapping[str, Any], str]],
    down: Sequence[str],
    columns: Sequence[str],
    column_of: Callable[[Mapping[str, Any]], str],
) -> list[tuple[tuple[str, ...], list[Counter[str]]]]:
    cells: dict[tuple[str, ...], dict[str, Counter[str]]] = {}
    for axes, state in sorted(runs, key=lambda run: [_order(run[0][axis]) for axis in down]):
        row = cells.setdefault(tuple(str(axes[axis]) for axis in down), {})
        row.setdefault(column_of(axes), Counter())[state] += 1
    return [(values, [row.get(column, Counter()) for column in columns]) for values, row in cells.items()]


def _values(values: Any) -> list[str]:
    return list(dict.fromkeys(str(value) for value in sorted(set(values), key=_order)))


def _order(value: Any) -> tuple[bool, Any]:
    number = isinstance(value, int | float)
    return (not number, value if number else str(value))


def words(states: Counter[str], *, letters: bool = False) -> str:
    """The states of a cell: "done" or "3 done, 1 failed"; as letters "D" or "3D 1F"; "" for an empty cell."""
    several = sum(states.values()) > 1
    if letters:
        named = [(LETTERS.get(state, state), count) for state, count in sorted(states.items())]
        return " ".join(f"{count}{state}" if several else state for state, count in named)
    return ", ".join(f"{count} {state}" if several else state for state, count in sorted(states.items()))


def legend(shown: Grid) -> str:
    """The meaning of the letters in this grid."""
    states = sorted({state for _, cells in shown.rows for cell in cells for state in cell})
    return ", ".join(f"{LETTERS.get(state, state)} {state}" for state in states)
