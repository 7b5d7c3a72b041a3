"""The layout of a report's charts: the axes shown by colour, the axis along x, and the axes of which a reader picks a value.
Pure."""

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
# Nobody can distinguish more colours.
MOST_SERIES = 8
IN_WORDS = {
    "batch_size": "batch size", "request_rate": "requests a second", "max_new_tokens": "new tokens", "gpus": "GPUs",
    "requests": "requests", "engine_options": "engine options", "prompt_set": "prompts", "ignore_eos": "ignore eos",
    "raw_prompt": "raw prompt",
    "input_len": "input length", "output_len": "output length", "prefix_len": "prefix length",
    "workload_seed": "seed of the requests",
}  # fmt: skip
# Values that need their axis beside them.
WITH_ITS_AXIS = {
    "batch_size": "batch {}", "request_rate": "{} requests/s", "max_new_tokens": "{} new tokens", "gpus": "{} GPUs",
    "requests": "{} requests", "engine_options": "options {}", "prompt_set": "prompts {}", "ignore_eos": "ignore eos: {}",
    "raw_prompt": "raw prompt: {}", "input_len": "{} input tokens", "output_len": "{} output tokens",
    "prefix_len": "{} shared tokens", "workload_seed": "seed {}",
}  # fmt: skip
T = TypeVar("T")
NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class Layout:
    """`series` are the axes whose values have a colour, `load` is the axis along x ("": none). A chart shows one combination of
    the axes `picked` at a time, a slice."""

    series: tuple[str, ...]
    load: str
    picked: tuple[str, ...]

    def series_of(self, cell: Cell) -> str:
        return described(cell, self.series) or "all runs"

    def slice_of(self, cell: Cell) -> tuple[AxisValue, ...]:
        return tuple(cell.axes[axis] for axis in self.picked)


def asked_by(cells: Sequence[Cell]) -> tuple[str, ...]:
    """The axis that `compare` chooses for these cells."""
    found = axis_to_compare(cells, varying_axes(cells), axes_of(cells))
    return () if found is None else (found[0],)


def layout(cells: Sequence[Cell], by: Sequence[str]) -> Layout:
    """Lay out the cells that are compared along the axes `by`."""
    varying = varying_axes(cells)
    load = _load(varying, by)
    series = [axis for axis in by if axis in varying and axis != load]
    # An axis that follows a compared one, such as the options of one engine, pairs no runs alone.
    series += [axis for axis in varying if axis not in (*series, load) and follows_any(axis, series, axes_of(cells))]
    while len({described(cell, series) for cell in cells}) > MOST_SERIES:
        series.pop()
    picked = tuple(axis for axis in varying if axis != load and axis not in series)
    return Layout(tuple(series), load, picked)


def _load(varying: Sequence[str], by: Sequence[str]) -> str:
    able = [axis for axis in ALONG_X if axis in varying]
    return next((axis for axis in able if axis not in by), able[0] if able else "")


def load_of(cell: Cell, axis: str) -> float:
    """The cell's value on the axis along x; 0 without one."""
    value = cell.axes[axis] if axis else 0
    return value if isinstance(value, int | float) else 0


def described(cell: Cell, axes: Sequence[str]) -> str:
    """The cell's values on these axes, in words: "staged, bfloat16", "float16, batch size 8"."""
    return ", ".join(filter(None, (value_in_words(axis, cell.axes[axis]) for axis in axes)))


def axis_words(axis: str) -> str:
    return IN_WORDS.get(axis, axis)


def value_in_words(axis: str, value: AxisValue) -> str:
    """One value in words, with its axis if it needs one: "float16", "batch 8"."""
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
    """Distinct values: numbers by size, others in the given order."""
    distinct = list(dict.fromkeys(values))
    if all(isinstance(value, int | float) for value in distinct):
        distinct.sort(key=lambda value: cast("float", value))
    return distinct


def capital(text: str) -> str:
    """With a capital letter; abbreviations such as ttft in capitals."""
    first, _, rest = text.partition(" ")
    return f"{first.upper()} {rest}".rstrip() if first in ("ttft", "tpot", "itl") else text[:1].upper() + text[1:]
