"""Findings -> the rows and charts of the page. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from labctl_orchestrator.analysis import verdicts
from labctl_orchestrator.analysis.compare import compare
from labctl_orchestrator.analysis.comparison import Axes, AxisValue, Block, Cell, Row
from labctl_orchestrator.analysis.metrics import ALL_METRICS, figure
from labctl_orchestrator.report import charts, timelines
from labctl_orchestrator.report.charts import Chart, DataColumn, Look, Scene
from labctl_orchestrator.report.findings import LATENCIES, Findings, Quantiles, SentRequest, choices
from labctl_orchestrator.report.layout import Layout, capital, described, in_order, load_of, value_in_words
from labctl_orchestrator.report.timelines import Timeline

GIB = float(2**30)
DRAWN = (
    "output_tok_s", "e2e_s", "peak_allocated_bytes", "mbu", "output_tok_s_per_gpu", "tpot_s", "ttft_p99_s", "goodput",
)  # fmt: skip
# The most rows of a chart of ratios; the table has all.
MOST_RATIOS = 24


JsonRow = dict[str, object]


@dataclass
class CellRow:
    """A cell of a chart: its place, and `figures`: mean, lowest and highest value by field. `slice` has the place of each picked
    value among the choices of its axis; `fronts` the Pareto fronts that it is on, by their names in FRONTS."""

    run: str
    series: str
    load: float | None
    label: str
    place: int
    slice: tuple[int, ...]
    n: int
    figures: dict[str, float | None]
    fronts: frozenset[str] = frozenset()

    @property
    def where(self) -> JsonRow:
        load = {} if self.load is None else {"load": self.load}
        return {"run": self.run, "series": self.series, **load, "label": self.label, "place": self.place,
                "slice": list(self.slice)}  # fmt: skip

    def to_json(self) -> JsonRow:
        return {**self.where, **self.figures, "n": self.n, **{name: name in self.fronts for name in FRONTS}}


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
    labels = charts.folded([_label(findings.layout, cell) for cell in findings.cells])
    laid_out = findings.layout
    loads = in_order(load_of(cell, laid_out.load) for cell in findings.cells) if laid_out.load else []
    names = tuple(dict.fromkeys(map(laid_out.series_of, findings.cells)))
    scene = Scene(laid_out.load, tuple(loads), names, charts.lines_of(labels))
    cells = _cell_rows(findings, scene, labels)
    latencies = [LatencyRow(cells[of.cell], of) for of in findings.quantiles]
    ratios = _ratio_rows(findings)
    levels = [level for one in findings.comparison.recommendations[:1] for level in one.levels]
    has_gpus = any(cell.axes["gpus"] for cell in findings.cells)
    served = any(cell.axes["served"] for cell in findings.cells)
    made = _Maker(look, scene, cells, latencies, levels, has_gpus, served)
    bands = max((len(one.bands) for one in findings.timelines), default=0)
    found = [
        made.throughput(), *made.goodput(), made.latency(), *_over_a_repeat(findings, look, cells), made.pareto(),
        *made.load_curves(), made.memory(), made.bandwidth(),
        _telemetry(findings.timelines, look, cells, bands),
    ]  # fmt: skip
    return Drawing(
        [chart for chart in found if isinstance(chart, Chart)],
        list(_ratio_charts(findings, look, ratios)),
        {
            "cells": [row.to_json() for row in cells],
            "latencies": [row.to_json() for row in latencies],
            "ratios": [vars(row) for rows in ratios.values() for row in rows],
            "requests": list(_rows_of_requests(findings)),
            "telemetry": [row for one in findings.timelines for row in timelines.rows_of(one, str(one.cell), bands)],
        },
        [reason for reason in found if isinstance(reason, str)],
        scene.series,
    )


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
        own = figures[cell.run_id, cell.loads]
        tpot_s = own["tpot_s"]
        own["request_tok_s"] = 1 / tpot_s if tpot_s else None
        if not cell.axes["gpus"]:
            own["output_tok_s_per_gpu"] = own["output_tok_s"]
        n = sum(map(len, cell.values["output_tokens"]))
        rows.append(CellRow(cell.run_id, series, load, label, place, chosen, n, {**own, **predicted}))
    _mark_fronts(rows)
    return rows


# By name: the field that is better when it is lower, and the one that is better when it is higher.
FRONTS = {
    "front": ("e2e_s", "output_tok_s"), "front_of_tpot": ("tpot_s", "output_tok_s_per_gpu"),
    "front_of_ttft": ("ttft_p99_s", "output_tok_s_per_gpu"),
}  # fmt: skip


def _mark_fronts(rows: Sequence[CellRow]) -> None:
    """Mark the Pareto fronts of each slice: no other cell has more throughput and less latency, or one of them at equal other."""
    for name, (lower, higher) in FRONTS.items():
        slices: dict[tuple[int, ...], list[tuple[float, float, CellRow]]] = {}
        for row in rows:
            latency, rate = row.figures[lower], row.figures[higher]
            if latency is not None and rate is not None:
                slices.setdefault(row.slice, []).append((latency, rate, row))
        for of_slice in slices.values():
            best = float("-inf")
            for _, rate, row in sorted(of_slice, key=lambda one: (one[0], -one[1])):
                if rate > best:
                    row.fronts |= {name}
                best = max(best, rate)


def _label(laid_out: Layout, cell: Cell) -> str:
    """The label of a cell: "vllm, batch 8"."""
    axes = [*laid_out.series, *([laid_out.load] if laid_out.load else [])]
    return described(cell, axes) or laid_out.series_of(cell)


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


def _with_ends(column: DataColumn) -> list[DataColumn]:
    """The column, and those of the lowest and the highest repeat."""
    return [column, *(replace(column, field=f"{column.field}_{end}", title=f"{end}est") for end in ("low", "high"))]


RUN = DataColumn("run", "run")
QUANTILE_COLUMNS = tuple(DataColumn(field, title, "s") for field, title in charts.QUANTILES)


@dataclass(frozen=True)
class _Maker:
    """Makes each chart; a method returns the reason if there is nothing to draw."""

    look: Look
    scene: Scene
    cells: list[CellRow]
    latencies: list[LatencyRow]
    levels: Sequence[str]
    has_gpus: bool
    served: bool

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
        columns = _with_ends(DataColumn("peak_allocated_bytes", "measured", "GiB", GIB))
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
        columns = _with_ends(DataColumn("mbu", "share", "%", 0.01))
        return Chart(
            "bandwidth", "Share of the hardware's limit",
            "Bytes that a decode step must read, divided by its time, as a share of the GPUs' memory bandwidth.",
            "cells", charts.bandwidth(self.look, self.scene, self._values("mbu")),
            self._extremes("mbu", "", "share of the memory bandwidth"), (*self._who, *columns), needs="mbu", unit="%",
            row_height=self._row_height,
        )  # fmt: skip

    def pareto(self) -> Chart | str:
        if not self._values("e2e_s") or not self._values("output_tok_s"):
            return "No chart of latency against throughput: no run has both."
        of = charts.Front(
            DataColumn("e2e_s", "latency of a request", "s"), DataColumn("output_tok_s", "throughput", "tok/s"), "front",
            "Up and to the left is better.",
        )  # fmt: skip
        return self._front("pareto", "Latency and throughput", of)

    def load_curves(self) -> list[Chart]:
        """Of served runs: throughput per GPU against the speed of a request, and against the time to its first token. Without
        GPUs: throughput."""
        if not self.served:
            return []
        rate = DataColumn("output_tok_s_per_gpu", "throughput per GPU", "tok/s/GPU")
        if not self.has_gpus:
            rate = DataColumn("output_tok_s_per_gpu", "throughput", "tok/s")
        speed = charts.Front(
            DataColumn("request_tok_s", "speed of a request, 1 / tpot", "tok/s"), rate, "front_of_tpot",
            "Up and to the right is better.",
        )  # fmt: skip
        first = charts.Front(
            DataColumn("ttft_p99_s", "ttft p99", "s"), rate, "front_of_ttft", "Up and to the left is better."
        )
        titles = (
            ("load-tpot", "Throughput and speed of a request", speed),
            ("load-ttft", "Throughput and first token", first),
        )
        return [
            self._front(name, title, of)
            for name, title, of in titles
            if self._values(of.x.field) and self._values(of.y.field)
        ]

    def _front(self, name: str, title: str, of: charts.Front) -> Chart:
        best = [row for row in self.cells if of.front in row.fronts]
        alternative = (
            f"Scatter of {of.y.title} against {of.x.title}, a point per run, {self._series_text()}. "
            f"{len(best)} of {len(self.cells)} runs are on the Pareto front: "
            f"{'; '.join(self._place(row) for row in best[:8])}{' and others' if len(best) > 8 else ''}."
        )
        load = f" Figures beside points: {self.scene.load_title}." if self.scene.load else ""
        return Chart(
            name, title, f"{of.better} Ringed: on the Pareto front.{load}", "cells",
            charts.pareto(self.look, self.scene, of, self._values(of.x.field), self._values(of.y.field)), alternative,
            (*self._who, of.y, of.x, DataColumn(of.front, "on the front")), needs=of.x.field, unit=of.y.unit,
        )  # fmt: skip

    def goodput(self) -> list[Chart]:
        """Of runs with service levels."""
        if not self._values("goodput"):
            return []
        return [
            self._of_metric(
                "goodput", f"Goodput{self._against}", f"Good requests a second: those that meet {', '.join(self.levels)}.",
                DataColumn("goodput", "goodput", "req/s"), "req/s",
            )
        ]  # fmt: skip

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
        columns = (*self._who, *_with_ends(column), DataColumn("n", "values"))
        spec = charts.against_load(self.look, self.scene, column, self._values(column.field))
        alternative = self._extremes(column.field, unit, column.title)
        return Chart(
            name, title, lead, "cells", spec, alternative, columns,
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


PARTS_OF_A_REPEAT = 12


def _rows_of_requests(findings: Findings) -> Iterator[JsonRow]:
    """A row for each request and latency, and the median of the requests of each part of the repeats."""
    by_cell: dict[int, list[SentRequest]] = {}
    for one in findings.sent:
        by_cell.setdefault(one.cell, []).append(one)
    for place, sent in by_cell.items():
        end_s = max(one.sent_s for one in sent)
        for at, (measure, _) in enumerate(LATENCIES):
            parts: dict[int, list[float]] = {}
            for one in sent:
                if (seconds := one.seconds[at]) is not None:
                    key = f"{place} {measure}"
                    yield {"measure": key, "kind": "request", "t": round(one.sent_s, 3), "seconds": round(seconds, 5),
                           "repeat": f"repeat {one.repeat}"}  # fmt: skip
                    part = int(PARTS_OF_A_REPEAT * one.sent_s / end_s) if end_s else 0
                    parts.setdefault(min(part, PARTS_OF_A_REPEAT - 1), []).append(seconds)
            for part, values in sorted(parts.items()):
                middle_s = (part + 0.5) * end_s / PARTS_OF_A_REPEAT
                yield {"measure": f"{place} {measure}", "kind": "median", "t": round(middle_s, 3),
                       "seconds": round(statistics.median(values), 5)}  # fmt: skip


def _over_a_repeat(findings: Findings, look: Look, cells: Sequence[CellRow]) -> list[Chart]:
    """Of served runs."""
    if not findings.sent:
        return []
    places = list(dict.fromkeys(one.cell for one in findings.sent))
    names = {place: f"{' '.join(cells[place].label.split())} ({cells[place].run[:6]})" for place in places}
    columns = (
        DataColumn("kind", "row"), DataColumn("repeat", "repeat"), DataColumn("t", "sent at", "s"),
        DataColumn("seconds", "latency", "s"),
    )  # fmt: skip
    return [
        Chart(
            "steady", "Latencies over a repeat",
            "Points: requests. Line: median of the requests sent at about that time. It rises where requests pile up.",
            "requests", charts.over_a_repeat(look),
            f"Points of the latencies of requests by the time they were sent: {'; '.join(names.values())}.", columns,
            choices=tuple((f"{place} {measure}", f"{title}: {names[place]}") for place in places for measure, title in LATENCIES),
        )
    ]  # fmt: skip


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
