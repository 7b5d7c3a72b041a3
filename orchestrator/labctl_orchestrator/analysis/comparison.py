"""The data of a comparison: cells, rows, blocks. `verdicts` has the words."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from labctl_orchestrator.analysis import intervals
from labctl_orchestrator.analysis.doubts import OTHER_CLOCKS, OTHER_CLOCKS_SHARE, OTHER_NODE, VALIDITY, Doubt
from labctl_orchestrator.analysis.metrics import ALL_METRICS, MONEY, OF_A_LOAD, OF_A_TEXT, OF_TASKS, figure

AxisValue = str | int | float | None
Axes = dict[str, AxisValue]
Interval = tuple[float, float]
# The settings of a run, in the order of tables.
AXES = (
    "origin", "partition", "backend", "model", "dtype", "device", "gpus", "parallel", "engine_options", "served",
    "max_new_tokens", "input_len", "output_len", "prefix_len", "dataset", "workload_seed", "batch_size", "request_rate",
    "burstiness", "requests", "sampling", "ignore_eos", "raw_prompt", "prompt_set", "score", "quality",
)  # fmt: skip
# The submission that measured a run. An axis only if the user names it; else loads of several submissions are one cell.
NAME = "name"
REPEATS, LOADS, DOCUMENTS, QUESTIONS = "repeats", "engine loads", "documents", "questions"
GOOD_SHARE = "good_share"


class DocumentSums(NamedTuple):
    """Of each document of a scored text: the sum of the negative log-likelihoods of its tokens (nats, mean over engine loads),
    and the number of these tokens."""

    nll: tuple[float, ...]
    tokens: tuple[int, ...]


class QuestionScores(NamedTuple):
    """Of each question of a run's tasks: its task with a hash of the question, and how right the answer is (0 to 1, mean over
    engine loads)."""

    names: tuple[str, ...]
    correct: tuple[float, ...]


@dataclass(slots=True)
class Cell:
    """One measured run: its settings (`axes`), the values of each metric, and other `facts` that may explain a difference:
    versions, GPUs, effective dtype, tokens generated.

    `values[metric]` has a list per engine load of `loads` (attempt ids, oldest first), with a value per repeat. `remarks` become
    warnings, `doubts` notes. `currency` is the partition's. `defaults` are the partition's defaults of dtype and gpus. `sm_mhz`:
    mean SM clock in the measured windows. `documents` are those of the run's scored text, `questions` those of its tasks.
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
    nodes: tuple[str, ...] = ()
    sm_mhz: float | None = None
    documents: DocumentSums | None = None
    questions: QuestionScores | None = None

    @property
    def backend(self) -> str:
        return str(self.axes["backend"])

    @property
    def partition(self) -> str:
        return str(self.axes["partition"])


class LoadSample(NamedTuple):
    """Mean and variances of one run in one metric, of logarithms or plain values.

    `mean` is the mean of the load means. The variances are relative: those of plain values are divided by `scale` squared.
    `between` is the variance of the load means (n - 1; 0 for one load), `within` that of a repeat in its load, pooled over the
    loads, with `within_df` degrees of freedom. `inverse_repeats` is the mean of 1/repeats over the loads.
    """

    loads: int
    mean: float
    scale: float
    between: float
    within: float
    within_df: int
    inverse_repeats: float


def load_sample(by_load: Sequence[Sequence[float]], as_ratio: bool) -> LoadSample | None:
    """The sample of these values, a list per engine load; None without a value. `as_ratio`: of their logarithms."""
    taken = [of_load for of_load in by_load if of_load]
    if not taken:
        return None
    if as_ratio:
        taken = [list(map(math.log, of_load)) for of_load in taken]
    loads = len(taken)
    means, squares, df, inverse = [], 0.0, 0, 0.0
    for of_load in taken:
        n = len(of_load)
        of_mean = sum(of_load) / n
        means.append(of_mean)
        inverse += 1 / n
        if n > 1:
            squares += sum([(value - of_mean) ** 2 for value in of_load])
            df += n - 1
    mean = sum(means) / loads
    scale = 1.0 if as_ratio else abs(mean)
    share = scale**2 or 1.0
    between = sum([(of_mean - mean) ** 2 for of_mean in means]) / (loads - 1) / share if loads > 1 else 0.0
    return LoadSample(loads, mean, scale, between, squares / df / share if df else 0.0, df, inverse / loads)


def has_ratio(metric: str) -> bool:
    """Whether ratios of this metric mean something; accuracies have differences."""
    return bool(ALL_METRICS[metric].better) and metric not in OF_TASKS


def mean_of(metric: str, by_load: Sequence[Sequence[float]]) -> float | None:
    """The mean of the load means, each the mean of its repeats; None without a value. Geometric if the metric has a better
    direction and all values are above 0, else arithmetic."""
    values = [value for of_load in by_load for value in of_load]
    as_ratio = has_ratio(metric) and all(value > 0 for value in values)
    found = load_sample(by_load, as_ratio)
    return None if found is None else figure_of(found, as_ratio, min(values), max(values))


def figure_of(of: LoadSample, as_ratio: bool, low: float, high: float) -> float:
    """The mean in the metric's unit, clipped to the lowest and highest value against rounding."""
    if low == high:
        return low
    return min(max(math.exp(of.mean) if as_ratio else of.mean, low), high)


class Estimates(NamedTuple):
    """A row compared with its baseline: the quotient of the means, or their difference if a ratio means nothing. Each has a 95%
    interval, None if the spread is unknown."""

    ratio: float | None = None
    ratio_interval: Interval | None = None
    difference: float | None = None
    difference_interval: Interval | None = None


NO_ESTIMATE = Estimates()


@dataclass(eq=False)
class Row:
    """One cell in one metric, compared with its baseline. Means and estimates are computed when they are read: a terminal shows
    few of 100,000 rows.

    `low` and `high` are the lowest and highest value, None without one. `as_ratio`: the block's figures have ratios, and their
    means are geometric. `estimate` computes the row's estimates, `has_interval` whether they have a 95% interval.
    """

    metric: str
    cell: Cell
    by: Sequence[str]
    low: float | None
    high: float | None
    as_ratio: bool
    is_baseline: bool = False
    not_comparable: str = ""
    baseline: Row | None = field(default=None, repr=False)
    has_interval: bool = False
    estimate: Callable[[Row], Estimates] | None = field(default=None, repr=False)

    @property
    def run_id(self) -> str:
        return self.cell.run_id

    @property
    def at(self) -> Axes:
        axes = self.cell.axes
        return {axis: axes[axis] for axis in self.by}

    @property
    def values(self) -> list[list[float]]:
        """The cell's, a list for each engine load in `loads`."""
        return self.cell.values.get(self.metric, [])

    @property
    def loads(self) -> tuple[str, ...]:
        return self.cell.loads

    @property
    def text(self) -> str:
        return self.cell.text

    @property
    def doubts(self) -> tuple[str, ...]:
        """The kinds of the cell's doubts that concern the metric; none without a value."""
        return tuple([doubt.kind for doubt in self.all_doubts])

    @property
    def all_doubts(self) -> list[Doubt]:
        """The cell's doubts that concern the metric, and those about the comparison with the baseline; none without a value."""
        return [doubt for doubt in self._doubts_of_any_metric if doubt.concerns(self.metric)]

    @property
    def validity_doubts(self) -> list[Doubt]:
        """Those of `all_doubts` about validity, for a metric that such doubts concern."""
        return [doubt for doubt in self._doubts_of_any_metric if doubt.kind in VALIDITY]

    @property
    def _doubts_of_any_metric(self) -> Sequence[Doubt]:
        if self.low is None:
            return ()
        if self.baseline is None:
            return self.cell.doubts
        found = against(self.cell, self.baseline.cell)
        return (*self.cell.doubts, *found) if found else self.cell.doubts

    @property
    def marks(self) -> str:
        """The doubts about the row's validity, in words."""
        return ", ".join(kind for kind in self.doubts if kind in VALIDITY)

    @functools.cached_property
    def sample(self) -> LoadSample | None:
        """Mean and variances; of logarithms `as_ratio`."""
        return load_sample(self.values, self.as_ratio)

    @property
    def mean(self) -> float | None:
        """The mean of the load means."""
        if self.sample is None or self.low is None or self.high is None:
            return None
        return figure_of(self.sample, self.as_ratio, self.low, self.high)

    @property
    def n(self) -> int:
        """Documents of a scored text, or questions of tasks; else engine loads if there are several, else the repeats of one."""
        if self.n_of == DOCUMENTS:
            return len(self.cell.documents.nll) if self.cell.documents else 0
        if self.n_of == QUESTIONS:
            return len(self.cell.questions.names) if self.cell.questions else 0
        taken = [of_load for of_load in self.values if of_load]
        return len(taken[0]) if len(taken) == 1 else len(taken)

    @property
    def n_of(self) -> str:
        if self.metric in OF_A_TEXT:
            return DOCUMENTS
        if self.metric in OF_TASKS:
            return QUESTIONS
        return LOADS if self.metric in OF_A_LOAD or sum(map(bool, self.values)) > 1 else REPEATS

    @functools.cached_property
    def _estimates(self) -> Estimates:
        return self.estimate(self) if self.estimate else NO_ESTIMATE

    @property
    def ratio(self) -> float | None:
        return self._estimates.ratio

    @property
    def ratio_interval(self) -> Interval | None:
        return self._estimates.ratio_interval

    @property
    def difference(self) -> float | None:
        return self._estimates.difference

    @property
    def difference_interval(self) -> Interval | None:
        return self._estimates.difference_interval

    @property
    def currency(self) -> str:
        """Of money; else ""."""
        return self.cell.currency if self.metric in MONEY else ""

    @property
    def unit(self) -> str:
        """Of the values; money in the cell's own currency."""
        return self.currency + ALL_METRICS[self.metric].unit

    @property
    def spread(self) -> float | None:
        """The standard deviation of the n loads' means, or of the n repeats of one load; None for one, and for
        documents and questions."""
        if self.n < 2 or self.n_of in (DOCUMENTS, QUESTIONS):
            return None
        return 0.0 if self.low == self.high else math.sqrt(intervals.variance(samples(self.values)))

    @property
    def has_an_answer(self) -> bool:
        """Whether it can be compared with its baseline."""
        baseline = self.baseline
        return baseline is not None and self.low is not None and baseline.low is not None and not self.not_comparable


def against(cell: Cell, baseline: Cell) -> list[Doubt]:
    """The doubts about a comparison of two runs on equal GPUs of one partition: another clock, another node."""
    found: list[Doubt] = []
    if cell.nodes == baseline.nodes and cell.sm_mhz == baseline.sm_mhz:
        return found
    if cell.partition != baseline.partition or cell.facts.get("GPU") != baseline.facts.get("GPU"):
        return found
    if cell.sm_mhz and baseline.sm_mhz:
        share = cell.sm_mhz / baseline.sm_mhz - 1
        if abs(share) > OTHER_CLOCKS_SHARE:
            found.append(Doubt(OTHER_CLOCKS, share, f"{cell.sm_mhz:.0f} MHz, baseline {baseline.sm_mhz:.0f} MHz"))
    if cell.nodes and baseline.nodes and not set(cell.nodes) & set(baseline.nodes):
        found.append(Doubt(OTHER_NODE, 0.0, f"{', '.join(cell.nodes)}, baseline {', '.join(baseline.nodes)}"))
    return found


@dataclass
class Block:
    """Rows of one table; `fixed` are the axis values that they share ("default": the partition's default)."""

    metric: str
    fixed: Axes
    rows: list[Row]
    title: str = ""
    unit: str = ""
    better: str = ""


@dataclass(frozen=True)
class Recommendation:
    """For one workload: `taken` is the configuration with the highest mean of `metric` of the `meeting` runs among `runs`, None
    where none meets the levels; `nearest` has the largest share of good requests then. `alike`: others that meet the levels and
    are not significantly worse. `axes` are those on which the runs differ, `workload` those that tell this workload apart."""

    levels: tuple[str, ...]
    workload: Axes
    axes: tuple[str, ...]
    metric: str
    taken: Cell | None
    alike: tuple[Cell, ...]
    nearest: Cell | None
    meeting: int
    runs: int

    def to_json(self) -> dict[str, object]:
        return {
            "levels": self.levels,
            "workload": self.workload,
            "metric": self.metric,
            "run_id": None if self.taken is None else self.taken.run_id,
            "at": None if self.taken is None else self._at(self.taken),
            "mean": None if self.taken is None else mean_of(self.metric, self.taken.values[self.metric]),
            "alike": [cell.run_id for cell in self.alike],
            "nearest": None if self.nearest is None else self.nearest.run_id,
            "meeting": self.meeting,
            "runs": self.runs,
        }

    @property
    def sentences(self) -> list[str]:
        """What to take, and what does as well."""
        levels = ", ".join(self.levels)
        work = ", ".join(f"{axis} {value}" for axis, value in self.workload.items() if value is not None)
        work = f" with {work}" if work else ""
        if self.taken is None:
            if self.nearest is None:
                return [f"no run{work} meets {levels}"]
            share = mean_of(GOOD_SHARE, self.nearest.values[GOOD_SHARE]) or 0.0
            return [f"no run{work} meets {levels}; nearest: {self.named(self.nearest)}, {share:.0%} good requests"]
        value = figure(mean_of(self.metric, self.taken.values[self.metric]), ALL_METRICS[self.metric].unit)
        title = ALL_METRICS[self.metric].title
        meet = f"{self.meeting} of {self.runs} runs{work} {'meets' if self.meeting == 1 else 'meet'} {levels}"
        found = [f"{meet}; take {self.named(self.taken)}: of these it has the highest {title}, {value}"]
        if self.alike:
            found.append(f"  no significant difference to {'; '.join(map(self.named, self.alike))}")
        return found

    def named(self, cell: Cell) -> str:
        """ "backend vllm, batch_size 64 (3f9a12)"."""
        at = ", ".join(f"{axis} {value}" for axis, value in self._at(cell).items() if value not in (None, ""))
        return f"{at} ({cell.run_id[:6]})" if at else f"run {cell.run_id[:6]}"

    def _at(self, cell: Cell) -> Axes:
        return {axis: cell.axes[axis] for axis in self.axes}


@dataclass
class Comparison:
    """A comparison along the axes `by`, with warnings and notes. `baseline` has the baseline's values on the compared axes. With
    service levels, `recommendations` say which configuration to take."""

    by: list[str]
    blocks: list[Block]
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    baseline: Axes = field(default_factory=dict)
    recommendations: list[Recommendation] = field(default_factory=list)

    @property
    def blocks_with_values(self) -> list[Block]:
        """The blocks of metrics with a value."""
        known = {block.metric for block in self.blocks if any(row.low is not None for row in block.rows)}
        return [block for block in self.blocks if block.metric in known]


def samples(by_load: Sequence[Sequence[float]]) -> list[float]:
    """The mean of each engine load where there are several, else the repeats of the one."""
    taken = [of_load for of_load in by_load if of_load]
    return list(taken[0]) if len(taken) == 1 else [sum(of_load) / len(of_load) for of_load in taken]
