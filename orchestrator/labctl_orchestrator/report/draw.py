"""Findings -> the rows and charts of the page. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from labctl_orchestrator.analysis import verdicts
from labctl_orchestrator.analysis.compare import compare
from labctl_orchestrator.analysis.comparison import Axes, AxisValue, Block, Cell, Row
from labctl_orchestrator.analysis.metrics import ALL_METRICS, figure
from labctl_orchestrator.report import charts, timelines
from labctl_orchestrator.report.charts import Chart, DataColumn, Look, Scene
from labctl_orchestrator.report.findings import LATENCIES, Findings, Quantiles, choices
from labctl_orchestrator.report.layout import capital, described, in_order, load_of, value_in_words
from labctl_orchestrator.report.timelines import Timeline

GIB = float(2**30)
DRAWN = ("output_tok_s", "e2e_s", "peak_allocated_bytes", "mbu")
# The most rows of a chart of ratios; the table has all.
MOST_RATIOS = 24


JsonRow = dict[str, object]


@dataclass
class CellRow:
    """A cell of a chart: its place, and `figures`: mean, lowest and highest value by field. `slice` has the place of each picked
    value among the choices of its axis; `front`: on the Pareto front of throughput and latency."""

    run: str
    series: str
    load: float | None
    label: str
    place: int
    slice: tuple[int, ...]
    n: int
    figures: dict[str, float | None]
    front: bool = False

    @property
    def where(self) -> JsonRow:
        load = {} if self.load is None else {"load": self.load}
        return {"run": self.run, "series": self.series, **load, "label": self.label, "place": self.place,
                "slice": list(self.slice)}  # fmt: skip

    def to_json(self) -> JsonRow:
        return {**self.where, **self.figures, "n": self.n, "front": self.front}


@dataclass(frozen=True)
class LatencyRow:
    """The distribution of a cell's requests in one latency."""

    cell: CellRow
    quantiles: Quantiles

    def to_json(self) -> JsonRow:
        of = self.quantiles
        return {**self.cell.where, "measure": of.measure, "requests": of.requests, **of.seconds}


@dataclass(frozen=True)
class RatioRow:
    """A ratio to the baseline with its interval; `label` has the values in which the rows differ."""

    metric: str
    label: str
    place: int
    run: str
    ratio: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Drawing:
    """The charts, their rows by name, and a reason for each chart that is left out."""

    charts: list[Chart]
    ratios: list[Chart]
    rows: dict[str, list[JsonRow]]
    not_drawn: list[str]
    series: tuple[str, ...]


def drawing(findings: Findings, look: Look) -> Drawing:
    """All charts of the findings, in this look."""
    labels = charts.folded([_label(findings, cell) for cell in findings.cells])
    scene = _scene(findings, labels)
    cells = _cell_rows(findings, scene, labels)
    latencies = [LatencyRow(cells[of.cell], of) for of in findings.quantiles]
    ratios = _ratio_rows(findings)
    made = _Maker(look, scene, cells, latencies)
    bands = max((len(one.bands) for one in findings.timelines), default=0)
    found = [
        made.throughput(), made.latency(), made.pareto(), made.memory(), made.bandwidth(),
        _telemetry(findings.timelines, look, cells, bands),
    ]  # fmt: skip
    return Drawing(
        [chart for chart in found if isinstance(chart, Chart)],
        list(_ratio_charts(findings, look, ratios)),
        {
            "cells": [row.to_json() for row in cells],
            "latencies": [row.to_json() for row in latencies],
            "ratios": [vars(row) for rows in ratios.values() for row in rows],
            "telemetry": [row for one in findings.timelines for row in timelines.rows_of(one, str(one.cell), bands)],
        },
        [reason for reason in found if isinstance(reason, str)],
        scene.series,
    )


def _scene(findings: Findings, labels: Sequence[str]) -> Scene:
    laid_out = findings.layout
    loads = in_order(load_of(cell, laid_out.load) for cell in findings.cells) if laid_out.load else []
    series = dict.fromkeys(map(laid_out.series_of, findings.cells))
    return Scene(laid_out.load, tuple(loads), tuple(series), charts.lines_of(labels))


# ---------------------------------------------------------------- rows


def _cell_rows(findings: Findings, scene: Scene, labels: Sequence[str]) -> list[CellRow]:
    laid_out, places = findings.layout, choices(findings)
    figures: dict[tuple[str, tuple[str, ...]], dict[str, float | None]] = {}
    for block in compare(findings.cells, findings.comparison.by, DRAWN).blocks:
        for of in block.rows:
            figures.setdefault((of.run_id, of.loads), {}).update(
                {block.metric: of.mean, f"{block.metric}_low": of.low, f"{block.metric}_high": of.high}
            )
    rows = []
    for cell, label in zip(findings.cells, labels, strict=True):
        series = laid_out.series_of(cell)
        load = load_of(cell, scene.load) if scene.load else None
        # Rows of one load stand together, in the order of the series.
        of_load = 0 if load is None else scene.loads.index(load)
        place = of_load * len(scene.series) + scene.series.index(series)
        chosen = tuple(places[axis].index(cell.axes[axis]) for axis in laid_out.picked)
        predicted = {"predicted_bytes": findings.predicted_bytes.get(cell.run_id)}
        n = sum(map(len, cell.values["output_tokens"]))
        rows.append(
            CellRow(
                cell.run_id, series, load, label, place, chosen, n, {**figures[cell.run_id, cell.loads], **predicted}
            )
        )
    _mark_fronts(rows)
    return rows


def _mark_fronts(rows: Sequence[CellRow]) -> None:
    """Mark the Pareto front of each slice: no other cell has more throughput and less latency, or one of them at equal other."""
    slices: dict[tuple[int, ...], list[tuple[float, float, CellRow]]] = {}
    for row in rows:
        latency, rate = row.figures["e2e_s"], row.figures["output_tok_s"]
        if latency is not None and rate is not None:
            slices.setdefault(row.slice, []).append((latency, rate, row))
    for of_slice in slices.values():
        best = float("-inf")
        for _, rate, row in sorted(of_slice, key=lambda one: (one[0], -one[1])):
            row.front = rate > best
            best = max(best, rate)


def _label(findings: Findings, cell: Cell) -> str:
    """The label of a cell: "vllm, batch 8"."""
    laid_out = findings.layout
    words = [described(cell, laid_out.series), described(cell, [laid_out.load] if laid_out.load else [])]
    return ", ".join(filter(None, words)) or laid_out.series_of(cell)


def _ratio_rows(findings: Findings) -> dict[str, list[RatioRow]]:
    """The rows with a ratio, by metric."""
    of_metric: dict[str, list[tuple[Axes, Row, float]]] = {}
    for block, row, _ in compared(findings):
        if row.ratio is not None:
            of_metric.setdefault(block.metric, []).append(({**row.at, **block.fixed}, row, row.ratio))
    return {metric: _labelled(metric, rows) for metric, rows in of_metric.items() if 1 < len(rows) <= MOST_RATIOS}


def _labelled(metric: str, rows: Sequence[tuple[Axes, Row, float]]) -> list[RatioRow]:
    differ = [axis for axis in rows[0][0] if len({repr(at.get(axis)) for at, _, _ in rows}) > 1]
    labels = [", ".join(filter(None, (value_in_words(axis, at.get(axis)) for axis in differ))) for at, _, _ in rows]
    unique = [
        label if label and labels.count(label) == 1 else f"{label} {row.run_id}"
        for label, (_, row, _) in zip(labels, rows, strict=True)
    ]
    return [
        RatioRow(
            metric, label, place, row.run_id, ratio, *(row.ratio_interval or (ratio, ratio)), verdicts.verdict(row).text
        )
        for place, (label, (_, row, ratio)) in enumerate(zip(charts.folded(unique), rows, strict=True))
    ]


def compared(findings: Findings) -> list[tuple[Block, Row, Row]]:
    """(block, row, baseline) of each row with a baseline."""
    return [(block, row, row.baseline) for block in findings.comparison.blocks for row in block.rows if row.baseline]


# ---------------------------------------------------------------- charts

RUN = DataColumn("run", "run")
QUANTILE_COLUMNS = tuple(DataColumn(field, title, "s") for field, title in charts.QUANTILES)


@dataclass(frozen=True)
class _Maker:
    """Makes each chart; a method returns the reason if there is nothing to draw."""

    look: Look
    scene: Scene
    cells: list[CellRow]
    latencies: list[LatencyRow]

    @property
    def _who(self) -> tuple[DataColumn, ...]:
        load = (DataColumn("load", self.scene.load_title),) if self.scene.load else ()
        return (RUN, DataColumn("series", "series"), *load)

    @property
    def _against(self) -> str:
        return f" against {self.scene.load_title}" if self.scene.load else ""

    @property
    def _row_height(self) -> int:
        """Without a load each series has its own row."""
        return 0 if self.scene.load else charts.row_height(self.scene.lines)

    def throughput(self) -> Chart | str:
        if not self._values("output_tok_s"):
            return "No throughput chart: no run has a value."
        return self._of_metric(
            "throughput", f"Throughput{self._against}", "All output tokens a second. Higher is better.",
            DataColumn("output_tok_s", "throughput", "tok/s"), "tok/s",
        )  # fmt: skip

    def memory(self) -> Chart | str:
        found = [*self._values("peak_allocated_bytes"), *self._values("predicted_bytes")]
        if not self._values("peak_allocated_bytes"):
            return "No memory chart: no run has a peak of GPU memory."
        columns = [
            DataColumn(f"peak_allocated_bytes{end}", title, "GiB", GIB)
            for end, title in (("", "measured"), ("_low", "lowest"), ("_high", "highest"))
        ]
        predicted = bool(self._values("predicted_bytes"))
        lead = "Peak of the fullest GPU. " + (
            "Dashed: prediction of labctl fit." if predicted else "labctl fit has no prediction for these runs."
        )
        alternative = self._extremes("peak_allocated_bytes", "B", "peak memory")
        return Chart(
            "memory", "Memory, measured and predicted" if predicted else "Memory", lead, "cells",
            charts.memory(self.look, self.scene, found, GIB), alternative,
            (*self._who, *columns, DataColumn("predicted_bytes", "predicted", "GiB", GIB)),
            needs="peak_allocated_bytes", unit="GiB",
            row_height=self._row_height,
        )  # fmt: skip

    def bandwidth(self) -> Chart | str:
        if not self._values("mbu"):
            return "No bandwidth chart: the memory bandwidth of the GPUs is unknown."
        columns = [
            DataColumn(f"mbu{end}", title, "%", 0.01)
            for end, title in (("", "share"), ("_low", "lowest"), ("_high", "highest"))
        ]
        return Chart(
            "bandwidth", "Share of the hardware's limit",
            "Bytes that a decode step must read, divided by its time, as a share of the GPUs' memory bandwidth.",
            "cells", charts.bandwidth(self.look, self.scene, self._values("mbu")),
            self._extremes("mbu", "", "share of the memory bandwidth"), (*self._who, *columns), needs="mbu", unit="%",
            row_height=self._row_height,
        )  # fmt: skip

    def pareto(self) -> Chart | str:
        latencies, rates = self._values("e2e_s"), self._values("output_tok_s")
        if not latencies or not rates:
            return "No chart of latency against throughput: no run has both."
        columns = (
            DataColumn("output_tok_s", "throughput", "tok/s"),
            DataColumn("e2e_s", "latency", "s"),
            DataColumn("front", "on the front"),
        )
        best = [row for row in self.cells if row.front]
        alternative = (
            f"Scatter of throughput against the latency of a request, a point a run, {self._series_text()}. "
            f"{len(best)} of {len(self.cells)} runs are on the Pareto front: "
            f"{'; '.join(self._place(row) for row in best[:8])}{' and others' if len(best) > 8 else ''}."
        )
        load = f" Figures beside points: {self.scene.load_title}." if self.scene.load else ""
        return Chart(
            "pareto", "Latency and throughput",
            f"Up and to the left is better. Ringed: on the Pareto front.{load}", "cells",
            charts.pareto(self.look, self.scene, latencies, rates), alternative, (*self._who, *columns),
            needs="e2e_s", unit="tok/s",
        )  # fmt: skip

    def latency(self) -> Chart | str:
        if not self.latencies:
            return "No latency chart: no request has a value."
        whole = [row for row in self.latencies if row.quantiles.measure == "e2e_s"]
        slowest = max(whole, key=lambda row: row.quantiles.seconds["q99"], default=None)
        alternative = f"A row per run with the distribution of its requests' latencies, {self._series_text()}."
        if slowest:
            label, seconds = " ".join(slowest.cell.label.split()), slowest.quantiles.seconds
            alternative += (
                f" The slowest at the 99th percentile is {label}: {figure(seconds['q99'], 's')}, with a median of"
                f" {figure(seconds['q50'], 's')}."
            )
        medians = [row.quantiles.seconds["q50"] for row in whole]
        columns = (*self._who, *QUANTILE_COLUMNS, DataColumn("requests", "requests"))
        return Chart(
            "latency", "Distribution over the requests",
            "Line from the fastest to the slowest request, bar over the middle half, tick at the median, point at 99%.",
            "latencies",
            charts.latency(self.look, self.scene, medians), alternative, columns,
            row_height=charts.row_height(self.scene.lines), choices=LATENCIES,
        )  # fmt: skip

    def _of_metric(self, name: str, title: str, lead: str, column: DataColumn, unit: str) -> Chart:
        ends = tuple(DataColumn(f"{column.field}_{end}", f"{end}est", column.unit) for end in ("low", "high"))
        spec = charts.against_load(self.look, self.scene, column, self._values(column.field))
        alternative = self._extremes(column.field, unit, column.title)
        return Chart(
            name, title, lead, "cells", spec, alternative, (*self._who, column, *ends, DataColumn("n", "values")),
            needs=column.field, unit=unit, row_height=self._row_height,
        )  # fmt: skip

    def _known(self, field: str) -> list[tuple[float, CellRow]]:
        return [(value, row) for row in self.cells if (value := row.figures[field]) is not None]

    def _values(self, field: str) -> list[float]:
        return [value for value, _ in self._known(field)]

    def _series_text(self) -> str:
        names = self.scene.series
        return f"a colour and shape for each of {', '.join(names)}" if len(names) > 1 else "in one series"

    def _place(self, row: CellRow) -> str:
        return row.series if row.load is None else f"{row.series} at {self.scene.load_title} {row.load:g}"

    def _extremes(self, field: str, unit: str, title: str) -> str:
        """The text alternative of a chart: its kind, highest and lowest value."""
        known = self._known(field)
        (low, lowest), (high, highest) = min(known, key=lambda one: one[0]), max(known, key=lambda one: one[0])
        kind = f"Lines of {title}{self._against}" if self.scene.load else f"Points of {title}"
        return (
            f"{kind}, {self._series_text()}. Highest: {figure(high, unit)}, {self._place(highest)};"
            f" lowest: {figure(low, unit)}, {self._place(lowest)}."
        )


def _ratio_charts(findings: Findings, look: Look, rows: dict[str, list[RatioRow]]) -> Iterator[Chart]:
    for metric, of_metric in rows.items():
        metric_text = ALL_METRICS[metric]
        columns = (
            RUN, DataColumn("label", "cell"), DataColumn("ratio", "ratio"), DataColumn("low", "95% from"),
            DataColumn("high", "95% to"), DataColumn("verdict", "verdict"),
        )  # fmt: skip
        better = f" {metric_text.better.capitalize()} is better." if metric_text.better else ""
        alternative = "; ".join(f"{' '.join(row.label.split())}: {row.ratio:.3g} times" for row in of_metric)
        lines = charts.lines_of(row.label for row in of_metric)
        yield Chart(
            f"ratios-{metric}", f"{capital(metric_text.title)}: ratio to {baseline_of(findings)}",
            f"Point: ratio; bar: its 95% interval. No significant difference where it crosses 1.{better}", "ratios",
            charts.ratios(look, lines), f"Ratios of {metric_text.title} with 95% intervals. {alternative}.", columns,
            metric=metric, row_height=charts.row_height(lines),
        )  # fmt: skip


def _telemetry(found: Sequence[Timeline], look: Look, cells: Sequence[CellRow], bands: int) -> Chart | str:
    if not found:
        return "No telemetry chart: no record has samples."
    of_runs = [cells[one.cell] for one in found]
    names = [f"{' '.join(cell.label.split())} ({cell.run[:6]})" for cell in of_runs]
    columns = (
        DataColumn("what", "quantity or phase"), DataColumn("device", "device"), DataColumn("t", "time", "s"),
        DataColumn("end", "until", "s"), DataColumn("value", "value"),
    )  # fmt: skip
    titles = ", ".join(title for title, _, _ in max((one.bands for one in found), key=len))
    return Chart(
        "telemetry", "A run over time",
        "Shaded: measured repeats. Points: heat or a fault holds the clock back. Runs with a mark come first.",
        "telemetry", charts.telemetry(look, bands),
        f"Lines of {titles} over the phases of a run: {'; '.join(names)}.", columns,
        choices=tuple((str(one.cell), name) for one, name in zip(found, names, strict=True)),
    )  # fmt: skip


def baseline_of(findings: Findings) -> str:
    """The baseline in words; "the baseline" if rows have several."""
    bases = {apart(row, baseline)[1] for _, row, baseline in compared(findings)}
    return bases.pop() if len(bases) == 1 else "the baseline"


def apart(row: Row, baseline: Row) -> tuple[str, str]:
    """The names of the row and its baseline: their values on the axes on which they differ."""
    axes = [axis for axis, value in row.at.items() if baseline.at[axis] != value]
    ours, theirs = (
        ", ".join(value_in_words(axis, one.at[axis]) for axis in axes) or one.run_id for one in (row, baseline)
    )
    return ours, theirs


def picture(drawn: Drawing, chart: Chart, chosen: Sequence[int]) -> charts.Spec:
    """The specification of a picture of the chart with its rows: of one slice, and of the first measure."""
    measure = chart.choices[0][0] if chart.choices else None
    rows = [
        row
        for row in drawn.rows[chart.data]
        if row.get("slice", list(chosen)) == list(chosen)
        and (measure is None or row["measure"] == measure)
        and (not chart.needs or row.get(chart.needs) is not None)
        and (not chart.metric or row["metric"] == chart.metric)
    ]
    height = {"height": chart.row_height * max(1, len(rows))} if chart.row_height else {}
    return {**chart.spec, **height, "datasets": {chart.data: rows}}


def places_of(findings: Findings, one: Sequence[AxisValue]) -> list[int]:
    """A slice as in the rows: the place of each value among the choices of its axis."""
    return [values.index(value) for value, values in zip(one, choices(findings).values(), strict=True)]
