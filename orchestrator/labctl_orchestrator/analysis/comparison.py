"""What a comparison is made of: cells, rows, blocks. Data alone; `verdicts` puts it into words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from labctl_orchestrator.analysis import intervals
from labctl_orchestrator.analysis.doubts import Doubt
from labctl_orchestrator.analysis.metrics import ALL_METRICS

AxisValue = str | int | float | None
Axes = dict[str, AxisValue]
# What may be asked for, in the order in which tables show it.
AXES = (
    "origin", "partition", "backend", "model", "dtype", "device", "gpus", "parallel", "engine_options", "max_new_tokens",
    "batch_size", "request_rate", "requests", "sampling", "ignore_eos", "raw_prompt", "prompt_set",
)  # fmt: skip
# The request that measured it. No part of what a run is: only where it is named do the loads of two requests go apart.
NAME = "name"
REPEATS, LOADS = "repeats", "engine loads"


@dataclass(slots=True)
class Cell:
    """One measured run: what was asked (`axes`), the values of each metric, and `facts`, what else may explain a
    difference: versions, GPUs, effective dtype, tokens generated.

    `values[metric]` has a list for each of the engine loads in `loads` (ids of attempts, oldest first), with a value a repeat.
    `remarks` are what has to be said wherever it is shown; `currency` is the word for money on its partition. `defaults` are
    the values that its partition gives the axes dtype and gpus where nobody names one; `doubts` what makes its figures
    doubtful.
    """

    run_id: str
    axes: Axes
    values: dict[str, list[list[float]]]
    facts: dict[str, str]
    text: str = ""
    remarks: tuple[str, ...] = ()
    loads: tuple[str, ...] = ()
    currency: str = ""
    defaults: Mapping[str, AxisValue] = field(default_factory=dict)
    doubts: tuple[Doubt, ...] = ()

    @property
    def backend(self) -> str:
        return str(self.axes["backend"])

    @property
    def partition(self) -> str:
        return str(self.axes["partition"])


@dataclass
class Row:
    """One cell in one metric, and how it stands to the baseline of its block.

    `values` and `loads` are the cell's; `low` and `high` the lowest and highest value. `mean` is the mean of the load means:
    geometric where the block's figures have ratios, else arithmetic. `n` counts engine loads (`n_of`) where there are several,
    else the repeats of the one. `ratio` is the quotient of the two means, row / baseline; `difference` their difference, where a
    ratio means nothing (log-probabilities, values of 0). Each has a 95% interval, None where the spread is unknown.
    """

    metric: str
    run_id: str
    at: Axes
    values: list[list[float]]
    loads: tuple[str, ...]
    mean: float | None
    low: float | None
    high: float | None
    n: int
    n_of: str
    text: str = ""
    currency: str = ""  # of money
    # No part of __init__: most rows of a large comparison would set each to what it is already.
    is_baseline: bool = field(default=False, init=False)
    ratio: float | None = field(default=None, init=False)
    ratio_interval: tuple[float, float] | None = field(default=None, init=False)
    difference: float | None = field(default=None, init=False)
    difference_interval: tuple[float, float] | None = field(default=None, init=False)
    not_comparable: str = field(default="", init=False)
    doubts: tuple[str, ...] = field(default=(), init=False)  # kinds
    baseline: Row | None = field(default=None, init=False, repr=False)

    @property
    def unit(self) -> str:
        """Of the values; money in the cell's own currency."""
        return self.currency + ALL_METRICS[self.metric].unit

    @property
    def spread(self) -> float | None:
        """The standard deviation of the n loads' means, or of the n repeats of one load; None for one."""
        if self.n < 2:
            return None
        return 0.0 if self.low == self.high else math.sqrt(intervals.variance(samples(self.values)))

    @property
    def has_an_answer(self) -> bool:
        """Whether anything can be said of it and its baseline."""
        return self.baseline is not None and self.n > 0 and self.baseline.n > 0 and not self.not_comparable


@dataclass
class Block:
    """Rows that stand together; `fixed` is what they share and other blocks do not ("default": the partition's own)."""

    metric: str
    fixed: Axes
    rows: list[Row]
    title: str = ""
    unit: str = ""
    better: str = ""


@dataclass
class Comparison:
    """The answer to one question, and what has to be said with it. `baseline` is where each row's baseline stands on the
    compared axes; it is the row's own on those that are not named."""

    by: list[str]
    blocks: list[Block]
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    baseline: Axes = field(default_factory=dict)

    @property
    def blocks_with_values(self) -> list[Block]:
        """The blocks of the metrics of which any row has a value."""
        known = {block.metric for block in self.blocks if any(row.n for row in block.rows)}
        return [block for block in self.blocks if block.metric in known]


def samples(by_load: Sequence[Sequence[float]]) -> list[float]:
    """The mean of each engine load where there are several, else the repeats of the one."""
    taken = [of_load for of_load in by_load if of_load]
    return list(taken[0]) if len(taken) == 1 else [sum(of_load) / len(of_load) for of_load in taken]
