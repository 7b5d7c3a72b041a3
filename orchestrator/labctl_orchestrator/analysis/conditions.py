"""Conditions of `--where`: "dtype=float16", "batch_size>=8", "backend in hf,vllm". Pure."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from labctl_slurm.errors import WrongUseError

_FORM = re.compile(r"\s*(?P<axis>\w+)\s*(?P<how>!=|<=|>=|=|<|>|\s(?:not\s+)?in\s)\s*(?P<value>.*?)\s*", re.DOTALL)
_ORDERS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge,
}  # fmt: skip
_WORDS = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True)
class Condition:
    """One condition: an axis, an operator ("=", "!=", "<", ">", "<=", ">=", "in", "not in") and values."""

    axis: str
    how: str
    values: tuple[str, ...]

    def holds(self, value: Any) -> bool:
        """Whether it holds for a cell's value. Raises WrongUseError for an order of values that are not numbers."""
        if self.how in _ORDERS:
            number = _number(value)
            bound = _number(self.values[0])
            if bound is None or (number is None and value is not None):
                raise WrongUseError(
                    f"{self.axis}{self.how}{self.values[0]} needs a number: {value if bound is not None else self.values[0]!r}",
                    f"use = or !=, or list values: '{self.axis} in A,B'",
                )
            return number is not None and _ORDERS[self.how](number, bound)
        text = str(value)  # it may have commas, as a sampling does
        listed = "," in text and f",{text}," in f",{','.join(self.values)},"
        return (listed or any(_same(value, wanted) for wanted in self.values)) != (self.how in ("!=", "not in"))


def condition(text: str) -> Condition:
    """Parse a condition. Raises WrongUseError for another form."""
    match = _FORM.fullmatch(text)
    if match is None or not match["axis"]:
        raise WrongUseError(
            f"not a condition: {text!r}",
            "write it as dtype=float16, 'batch_size>=8', backend!=vllm or 'dtype in float16,bfloat16'",
        )
    if match["value"].startswith(("=", "<", ">", "~", "!")):
        raise WrongUseError(
            f"unknown operator in condition: {text!r}", "use =, !=, <, <=, >, >=, in or not in: 'batch_size>=8'"
        )
    how = " ".join(match["how"].split())
    values = tuple(part.strip() for part in match["value"].split(",")) if how.endswith("in") else (match["value"],)
    return Condition(match["axis"], how, values)


def _same(value: Any, wanted: str) -> bool:
    """Whether the texts or the numbers are equal: 0.50 is 0.5, true is 1."""
    if str(value) == wanted:
        return True
    number, other = _number(value), _number(wanted)
    return number is not None and number == other


def _number(value: Any) -> float | None:
    if isinstance(value, int | float):
        return float(value)
    try:
        return _WORDS.get(str(value).lower()) if str(value).lower() in _WORDS else float(str(value))
    except ValueError:
        return None
