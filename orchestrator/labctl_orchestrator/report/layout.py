"""How the cells of a report are laid out in its charts: which axis is told by colour, which runs along x, and which a reader
picks one value of. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from labctl_orchestrator.analysis.axes import axes_of, follows_any, varying_axes
from labctl_orchestrator.analysis.comparison import AxisValue, Cell
from labctl_orchestrator.analysis.pairs import LOAD_AXES, axis_to_compare

# What can run along x: the load first.
ALONG_X = LOAD_AXES
# More than eight colours are not told apart.
MOST_SERIES = 8
IN_WORDS = {
    "batch_size": "batch size", "request_rate": "requests a second", "max_new_tokens": "new tokens", "gpus": "GPUs",
    "requests": "requests", "engine_options": "engine options", "prompt_set": "prompts", "ignore_eos": "ignore eos",
    "raw_prompt": "raw prompt",
}  # fmt: skip
# A value that does not say what it is a value of, in words; all others do.
WITH_ITS_AXIS = {
    "batch_size": "batch {}", "request_rate": "{} requests/s", "max_new_tokens": "{} new tokens", "gpus": "{} GPUs",
    "requests": "{} requests", "engine_options": "options {}", "prompt_set": "prompts {}", "ignore_eos": "ignore eos: {}",
    "raw_prompt": "raw prompt: {}",
}  # fmt: skip
T = TypeVar("T")
NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class Layout:
    """`series` are the axes whose values have a colour, `load` the one along x ("" where none runs there), `picked` those of
    which a chart shows one combination, a slice, at a time."""

    series: tuple[str, ...]
    load: str
    picked: tuple[str, ...]

    def series_of(self, cell: Cell) -> str:
        return described(cell, self.series) or "all runs"

    def slice_of(self, cell: Cell) -> tuple[AxisValue, ...]:
        return tuple(cell.axes[axis] for axis in self.picked)


def asked_by(cells: Sequence[Cell]) -> tuple[str, ...]:
    """What the cells are compared by where nobody says, as `compare` has it."""
    found = axis_to_compare(cells, varying_axes(cells), axes_of(cells))
    return () if found is None else (found[0],)


def layout(cells: Sequence[Cell], by: Sequence[str]) -> Layout:
    """Lay out the cells that are compared along the axes `by`."""
    varying = varying_axes(cells)
    load = _load(varying, by)
    series = [axis for axis in by if axis in varying and axis != load]
    # What follows a compared axis, such as one engine's own options, has no partner apart from it.
    series += [axis for axis in varying if axis not in (*series, load) and follows_any(axis, series, axes_of(cells))]
    while len({described(cell, series) for cell in cells}) > MOST_SERIES:
        series.pop()
    picked = tuple(axis for axis in varying if axis != load and axis not in series)
    return Layout(tuple(series), load, picked)


def _load(varying: Sequence[str], by: Sequence[str]) -> str:
    able = [axis for axis in ALONG_X if axis in varying]
    return next((axis for axis in able if axis not in by), able[0] if able else "")


def load_of(cell: Cell, axis: str) -> float:
    """The cell's value on the axis that runs along x; 0 without one."""
    value = cell.axes[axis] if axis else 0
    return value if isinstance(value, int | float) else 0


def described(cell: Cell, axes: Sequence[str]) -> str:
    """The cell's values on these axes, in words: "staged, bfloat16", "float16, batch size 8"."""
    told = [told_value(axis, cell.axes[axis]) for axis in axes]
    return ", ".join(word for word in told if word)


def axis_words(axis: str) -> str:
    return IN_WORDS.get(axis, axis)


def told_value(axis: str, value: AxisValue) -> str:
    """One value in words, with its axis where it does not tell that by itself: "float16", "batch 8"."""
    text = shown_value(axis, value)
    return WITH_ITS_AXIS.get(axis, "{}").format(text) if text else ""


def shown_value(axis: str, value: AxisValue) -> str:
    if value is None or value == "":
        return ""
    if axis == "model":
        return str(value).rpartition("/")[2]
    if axis == "sampling":
        return str(value).replace(",", ", ").replace("=", " ").replace("_", "-")
    if axis == "engine_options":
        return ", ".join(f"{name}={value}" for name, value in json.loads(str(value)).items())
    if axis in ("ignore_eos", "raw_prompt"):
        return "yes" if value else "no"
    return str(value)


def in_order(values: Iterable[T]) -> list[T]:
    """Distinct values: numbers by size, all else as it came."""
    distinct = list(dict.fromkeys(values))
    if all(isinstance(value, int | float) for value in distinct):
        distinct.sort(key=lambda value: cast("float", value))
    return distinct


def capital(text: str) -> str:
    """As a heading begins; "ttft" and its like are abbreviations."""
    first, _, rest = text.partition(" ")
    return f"{first.upper()} {rest}".rstrip() if first in ("ttft", "tpot", "itl") else text[:1].upper() + text[1:]
