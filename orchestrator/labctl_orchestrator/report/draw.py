"""Findings -> the rows that are drawn, and the charts that have something to show. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from labctl_orchestrator.analysis import verdicts
from labctl_orchestrator.analysis.compare import compare
from labctl_orchestrator.analysis.comparison import Axes, AxisValue, Block, Cell, Row
from labctl_orchestrator.analysis.metrics import ALL_METRICS, figure
from labctl_orchestrator.report import charts
from labctl_orchestrator.report.charts import Chart, DataColumn, Look, Scene
from labctl_orchestrator.report.findings import LATENCIES, Findings, Quantiles, choices
from labctl_orchestrator.report.layout import capital, described, in_order, load_of, told_value

GIB = float(2**30)
DRAWN = ("output_tok_s", "e2e_s", "peak_allocated_bytes", "mbu")
# A forest of more rows is a wood; the table has them all.
MOST_RATIOS = 24


JsonRow = dict[str, object]


@dataclass
class CellRow:
    """A cell as charts have it: where it stands, and `figures`: mean, lowest and highest of what is drawn, by field. `slice` has
    the place of each picked value among its axis's choices; `front`: beaten by none in throughput and latency."""

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
    """The distribution of a cell's requests in one latency, where the cell stands."""

    cell: CellRow
    quantiles: Quantiles

    def to_json(self) -> JsonRow:
        of = self.quantiles
        return {**self.cell.where, "measure": of.measure, "requests": of.requests, **of.seconds}


@dataclass(frozen=True)
class RatioRow:
    """A ratio to the baseline with its interval; `label` says in what the rows of the chart differ."""

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
    """The charts, their rows by name, and a line for each chart that has nothing to show."""

    charts: list[Chart]
    ratios: list[Chart]
    rows: dict[str, list[JsonRow]]
    not_drawn: list[str]
    series: tuple[str, ...]


def drawing(findings: Findings, look: Look) -> Drawing:
    """Everything that is drawn of the findings, in this look."""
    labels = charts.folded([_label(findings, cell) for cell in findings.cells])
    scene = _scene(findings, labels)
    cells = _cell_rows(findings, scene, labels)
    latencies = [LatencyRow(cells[of.cell], of) for of in findings.quantiles]
    ratios = _ratio_rows(findings)
    made = _Maker(look, scene, cells, latencies)
    found = [made.throughput(), made.latency(), made.pareto(), made.memory(), made.bandwidth()]
    return Drawing(
        [chart for chart in found if isinstance(chart, Chart)],
        list(_ratio_charts(findings, look, ratios)),
        {
            "cells": [row.to_json() for row in cells],
            "latencies": [row.to_json() for row in latencies],
            "ratios": [vars(row) for rows in ratios.values() for row in rows],
        },
        [told for told in found if isinstance(told, str)],
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
    """A cell is on the front of its slice where none has both more throughput and less latency, or one of them and the other
    alike."""
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
    """What a row of its own is called: "vllm, batch 8"."""
    laid_out = findings.layout
    words = [described(cell, laid_out.series), described(cell, [laid_out.load] if laid_out.load else [])]
    return ", ".join(filter(None, words)) or laid_out.series_of(cell)


def _ratio_rows(findings: Findings) -> dict[str, list[RatioRow]]:
    """Of each metric, the rows that have a ratio to their baseline."""
    of_metric: dict[str, list[tuple[Axes, Row, float]]] = {}
    for block, row, _ in compared(findings):
        if row.ratio is not None:
            of_metric.setdefault(block.metric, []).append(({**row.at, **block.fixed}, row, row.ratio))
    return {metric: _labelled(metric, rows) for metric, rows in of_metric.items() if 1 < len(rows) <= MOST_RATIOS}


def _labelled(metric: str, rows: Sequence[tuple[Axes, Row, float]]) -> list[RatioRow]:
    differ = [axis for axis in rows[0][0] if len({repr(at.get(axis)) for at, _, _ in rows}) > 1]
    labels = [", ".join(filter(None, (told_value(axis, at.get(axis)) for axis in differ))) for at, _, _ in rows]
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
    """Each row that is compared with a baseline: its block, the row, the baseline."""
    return [(block, row, row.baseline) for block in findings.comparison.blocks for row in block.rows if row.baseline]


# ---------------------------------------------------------------- charts

RUN = DataColumn("run", "run")
QUANTILE_COLUMNS = tuple(DataColumn(field, title, "s") for field, title in charts.QUANTILES)


@dataclass(frozen=True)
class _Maker:
    """Makes each chart, or says why it is not drawn."""

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
        """Without a load each series is a row of its own."""
        return 0 if self.scene.load else charts.row_height(self.scene.lines)

    def throughput(self) -> Chart | str:
        if not self._values("output_tok_s"):
            return "Throughput is not drawn: no run has one."
        return self._of_metric(
            "throughput", f"Throughput{self._against}", "All output tokens a second. Higher is better.",
            DataColumn("output_tok_s", "throughput", "tok/s"), "tok/s",
        )  # fmt: skip

    def memory(self) -> Chart | str:
        found = [*self._values("peak_allocated_bytes"), *self._values("predicted_bytes")]
        if not self._values("peak_allocated_bytes"):
            return "Memory is not drawn: no run has a peak of a GPU's memory."
        columns = [
            DataColumn(f"peak_allocated_bytes{end}", title, "GiB", GIB)
            for end, title in (("", "measured"), ("_low", "lowest"), ("_high", "highest"))
        ]
        predicted = bool(self._values("predicted_bytes"))
        lead = "Peak of the fullest GPU. " + (
            "Dashed: what fit predicted." if predicted else "Fit has no prediction for these runs."
        )
        told = self._extremes("peak_allocated_bytes", "B", "peak memory")
        return Chart(
            "memory", "Memory, measured and predicted" if predicted else "Memory", lead, "cells",
            charts.memory(self.look, self.scene, found, GIB), told,
            (*self._who, *columns, DataColumn("predicted_bytes", "predicted", "GiB", GIB)),
            needs="peak_allocated_bytes", unit="GiB",
            row_height=self._row_height,
        )  # fmt: skip

    def bandwidth(self) -> Chart | str:
        if not self._values("mbu"):
            return "The share of the hardware's limit is not drawn: no run's GPUs have a known memory bandwidth."
        columns = [
            DataColumn(f"mbu{end}", title, "%", 0.01)
            for end, title in (("", "share"), ("_low", "lowest"), ("_high", "highest"))
        ]
        return Chart(
            "bandwidth", "Share of the hardware's limit",
            "Bytes that a decode step must read, over its time, of the GPUs' memory bandwidth: 100% is all that it gives.",
            "cells", charts.bandwidth(self.look, self.scene, self._values("mbu")),
            self._extremes("mbu", "", "share of the memory bandwidth"), (*self._who, *columns), needs="mbu", unit="%",
            row_height=self._row_height,
        )  # fmt: skip

    def pareto(self) -> Chart | str:
        latencies, rates = self._values("e2e_s"), self._values("output_tok_s")
        if not latencies or not rates:
            return "Latency against throughput is not drawn: no run has both."
        columns = (
            DataColumn("output_tok_s", "throughput", "tok/s"),
            DataColumn("e2e_s", "latency", "s"),
            DataColumn("front", "not beaten"),
        )
        best = [row for row in self.cells if row.front]
        told = (
            f"Scatter of throughput against the latency of a request, a point a run, {self._series_told()}. "
            f"{len(best)} of {len(self.cells)} runs are on the front, beaten by none in both: "
            f"{'; '.join(self._place(row) for row in best[:8])}{' and others' if len(best) > 8 else ''}."
        )
        load = f" Figures beside points: {self.scene.load_title}." if self.scene.load else ""
        return Chart(
            "pareto", "Latency and throughput",
            f"Up and to the left is better. Ringed: beaten by none in both.{load}", "cells",
            charts.pareto(self.look, self.scene, latencies, rates), told, (*self._who, *columns), needs="e2e_s", unit="tok/s",
        )  # fmt: skip

    def latency(self) -> Chart | str:
        if not self.latencies:
            return "Latencies are not drawn: no request has one."
        whole = [row for row in self.latencies if row.quantiles.measure == "e2e_s"]
        slowest = max(whole, key=lambda row: row.quantiles.seconds["q99"], default=None)
        told = f"A row a run with the spread of its requests' latencies, {self._series_told()}."
        if slowest:
            label, seconds = " ".join(slowest.cell.label.split()), slowest.quantiles.seconds
            told += (
                f" The slowest at the 99th percentile is {label}: {figure(seconds['q99'], 's')}, with a median of"
                f" {figure(seconds['q50'], 's')}."
            )
        medians = [row.quantiles.seconds["q50"] for row in whole]
        columns = (*self._who, *QUANTILE_COLUMNS, DataColumn("requests", "requests"))
        return Chart(
            "latency", "Distribution over the requests",
            "Line from the fastest to the slowest, bar over the middle half, tick at the median, point at 99%.", "latencies",
            charts.latency(self.look, self.scene, medians), told, columns,
            row_height=charts.row_height(self.scene.lines), choices=LATENCIES,
        )  # fmt: skip

    def _of_metric(self, name: str, title: str, lead: str, column: DataColumn, unit: str) -> Chart:
        ends = tuple(DataColumn(f"{column.field}_{end}", f"{end}est", column.unit) for end in ("low", "high"))
        spec = charts.against_load(self.look, self.scene, column, self._values(column.field))
        told = self._extremes(column.field, unit, column.title)
        return Chart(
            name, title, lead, "cells", spec, told, (*self._who, column, *ends, DataColumn("n", "values")),
            needs=column.field, unit=unit, row_height=self._row_height,
        )  # fmt: skip

    def _known(self, field: str) -> list[tuple[float, CellRow]]:
        return [(value, row) for row in self.cells if (value := row.figures[field]) is not None]

    def _values(self, field: str) -> list[float]:
        return [value for value, _ in self._known(field)]

    def _series_told(self) -> str:
        names = self.scene.series
        return f"a colour and shape for each of {', '.join(names)}" if len(names) > 1 else "in one series"

    def _place(self, row: CellRow) -> str:
        return row.series if row.load is None else f"{row.series} at {self.scene.load_title} {row.load:g}"

    def _extremes(self, field: str, unit: str, title: str) -> str:
        """What a chart shows, for those who do not see it: its kind, and its highest and lowest value."""
        known = self._known(field)
        (low, lowest), (high, highest) = min(known, key=lambda one: one[0]), max(known, key=lambda one: one[0])
        kind = f"Lines of {title}{self._against}" if self.scene.load else f"Points of {title}"
        return (
            f"{kind}, {self._series_told()}. Highest: {figure(high, unit)}, {self._place(highest)};"
            f" lowest: {figure(low, unit)}, {self._place(lowest)}."
        )


def _ratio_charts(findings: Findings, look: Look, rows: dict[str, list[RatioRow]]) -> Iterator[Chart]:
    for metric, of_metric in rows.items():
        told = ALL_METRICS[metric]
        columns = (
            RUN, DataColumn("label", "cell"), DataColumn("ratio", "ratio"), DataColumn("low", "95% from"),
            DataColumn("high", "95% to"), DataColumn("verdict", "verdict"),
        )  # fmt: skip
        better = f" {told.better.capitalize()} is better." if told.better else ""
        alternative = "; ".join(f"{' '.join(row.label.split())}: {row.ratio:.3g} times" for row in of_metric)
        lines = charts.lines_of(row.label for row in of_metric)
        yield Chart(
            f"ratios-{metric}", f"{capital(told.title)}: ratio to {baseline_of(findings)}",
            f"Point: ratio; bar: its 95% interval. Where it crosses 1 there is no significant difference.{better}", "ratios",
            charts.ratios(look, lines), f"Ratios of {told.title} with 95% intervals. {alternative}.", columns,
            metric=metric, row_height=charts.row_height(lines),
        )  # fmt: skip


def baseline_of(findings: Findings) -> str:
    """What rows are compared with, in words; "the baseline" where that is not the same for all."""
    bases = {apart(row, baseline)[1] for _, row, baseline in compared(findings)}
    return bases.pop() if len(bases) == 1 else "the baseline"


def apart(row: Row, baseline: Row) -> tuple[str, str]:
    """The row and its baseline, each by its values on the axes on which they differ."""
    axes = [axis for axis, value in row.at.items() if baseline.at[axis] != value]
    ours, theirs = (", ".join(told_value(axis, one.at[axis]) for axis in axes) or one.run_id for one in (row, baseline))
    return ours, theirs


def picture(drawn: Drawing, chart: Chart, chosen: Sequence[int]) -> charts.Spec:
    """The whole specification of a picture of the chart, its rows in it: of one slice, and of the first measure."""
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
    """A slice as its rows have it: the place of each value among its axis's choices."""
    return [values.index(value) for value, values in zip(one, choices(findings).values(), strict=True)]
