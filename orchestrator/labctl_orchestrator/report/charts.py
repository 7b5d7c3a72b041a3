"""The charts of a report as Vega-Lite specifications: one for the page and for its pictures. Pure.

Each takes its rows by name ("cells" or "latencies"), so that the page can show another slice of them. Colours are a look's: the
page gives CSS variables, so that one drawing serves light, dark and paper; a picture gives plain colours.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from labctl_orchestrator.report.layout import MOST_SERIES, axis_words

Spec = dict[str, Any]
LINE: Spec = {"type": "line", "strokeWidth": 2}
RULE: Spec = {"type": "rule", "strokeWidth": 1.5, "opacity": 0.7}
POINT: Spec = {"type": "point", "filled": True, "size": 64, "opacity": 1}
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
# A log axis where the largest value is this many times the smallest.
LOG_FROM = 20.0
HEIGHT = 280
# Of a row with a line of text, and of each further one.
ROW_HEIGHT, LINE_HEIGHT = 22, 14
# Characters after which a row's name is broken, so that a narrow screen shows it whole.
WIDE = 24
SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "triangle-right", "triangle-left")


@dataclass(frozen=True)
class Look:
    """The look of charts. `width` "container" fills the page's column; the page writes unit and legend above the chart
    itself, where they fold on a narrow screen: a picture has them `inside`."""

    ink: str
    faint: str
    grid: str
    series: tuple[str, ...]
    font: str
    width: int | str = "container"
    background: str | None = None
    inside: bool = False


PAGE = Look(
    "var(--ink)",
    "var(--ink-2)",
    "var(--grid)",
    tuple(f"var(--series-{place})" for place in range(1, MOST_SERIES + 1)),
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
)
# The page's light colours: 3:1 on white at least, and apart for the colour-blind too (the tests hold both); shapes tell as well.
LIGHT_SERIES = ("#0b5fad", "#c04a0a", "#752848", "#c67994", "#6531d3", "#54441f", "#9489c7", "#289954")
PICTURE = Look(
    "#1b1f24", "#4a525c", "#e3e6ea", LIGHT_SERIES, "Liberation Sans, Arial, sans-serif", 620, "#ffffff", True
)


@dataclass(frozen=True)
class DataColumn:
    """A column of a chart's data table: the field of a row, its heading, its unit; a value is divided by `scale` for it."""

    field: str
    title: str
    unit: str = ""
    scale: float = 1.0


@dataclass(frozen=True)
class Chart:
    """One chart: `lead` is how it is read, `data` its rows' name, `alternative` its content in words, `columns` its data table's.

    It has those rows that have a value in `needs`, of `metric` where that is given, and of one of `choices` at a time:
    (a row's `measure`, its title). With a `row_height`, in pixels, its height is that of the rows it has."""

    name: str
    title: str
    lead: str
    data: str
    spec: Spec
    alternative: str
    columns: tuple[DataColumn, ...]
    needs: str = ""
    unit: str = ""
    metric: str = ""
    row_height: int = 0
    choices: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Scene:
    """Shared by all charts of a report: the load axis ("" for none) and its values, the series in their order, and the lines
    of the longest label of a row."""

    load: str
    loads: tuple[float, ...]
    series: tuple[str, ...]
    lines: int = 1

    @property
    def load_title(self) -> str:
        return axis_words(self.load)


# ---------------------------------------------------------------- the charts


def against_load(look: Look, scene: Scene, metric: DataColumn, values: Sequence[float]) -> Spec:
    """A metric's means against the load, a line per series, with the lowest and highest repeat; without a load axis a dot per
    series."""
    layers, transform = _against_load(scene, metric, values, 1.0)
    return _spec(look, scene, metric.unit, "cells", transform, layers, HEIGHT if scene.load else None)


def _against_load(
    scene: Scene, metric: DataColumn, values: Sequence[float], scale: float
) -> tuple[list[Spec], list[Spec]]:
    """(layers, transforms): from the lowest to the highest repeat, the line, the means. Stored values are divided by `scale` for
    the unit of the column."""
    value = _value_axis([v / scale for v in values])
    shown, low, high = (f"shown_{metric.field}{end}" for end in ("", "_low", "_high"))
    transform = [_per(scale, f"{metric.field}{end}") for end in ("", "_low", "_high")]
    tooltip = _tooltip(scene, [(shown, metric.title), (low, "lowest repeat"), (high, "highest repeat")], metric.unit)
    way, across = _ways(scene)
    layers: list[Spec] = [
        {"mark": RULE, "encoding": {**across, way: {**value, "field": low}, f"{way}2": {"field": high}}},
        {"mark": POINT, "encoding": {**across, way: {**value, "field": shown}, "tooltip": tooltip}},
    ]
    if scene.load:
        layers.insert(1, {"mark": LINE, "encoding": {**across, way: {**value, "field": shown}}})
    return layers, transform


def _ways(scene: Scene) -> tuple[str, Spec]:
    """The channel of the value, and the other one with its encoding."""
    return ("y", {"x": _load_axis(scene)}) if scene.load else ("x", {"y": _rows(scene.lines)})


def memory(look: Look, scene: Scene, values: Sequence[float], scale: float) -> Spec:
    """Measured peak memory of the fullest GPU and, dashed, the prediction of fit."""
    layers, transform = _against_load(scene, DataColumn("peak_allocated_bytes", "measured", "GiB"), values, scale)
    transform.append(_per(scale, "predicted_bytes"))
    way, across = _ways(scene)
    place = {**across, way: {**_value_axis([v / scale for v in values]), "field": "shown_predicted_bytes"}}
    tooltip = _tooltip(scene, [("shown_predicted_bytes", "predicted by fit")], "GiB")
    if scene.load:
        layers.append({"mark": {**LINE, "strokeWidth": 1.5, "strokeDash": [5, 4]}, "encoding": place})
    tick = {"type": "tick", "thickness": 2, "size": 16, "orient": "horizontal" if scene.load else "vertical"}
    layers.append({"mark": tick, "encoding": {**place, "tooltip": tooltip}})
    return _spec(look, scene, "GiB", "cells", transform, layers, HEIGHT if scene.load else None)


# If all values are below this share, there is no line at 100%: it would press them to the axis.
LIMIT_FROM = 0.25


def bandwidth(look: Look, scene: Scene, values: Sequence[float]) -> Spec:
    """The share of the memory bandwidth, with a line at 100%."""
    layers, transform = _against_load(scene, DataColumn("mbu", "share of the bandwidth", "%"), values, 0.01)
    spec = _spec(look, scene, "%", "cells", transform, layers, HEIGHT if scene.load else None)
    if max(values) >= LIMIT_FROM:
        limit = {
            "data": {"values": [{"limit": 100}]},
            "mark": {"type": "rule", "strokeDash": [2, 3], "color": look.faint, "strokeWidth": 1},
            "encoding": {_ways(scene)[0]: {"field": "limit", "type": "quantitative"}},
        }
        spec["layer"].insert(0, limit)
    return spec


@dataclass(frozen=True)
class Front:
    """A chart of two figures of each cell, with its Pareto front: fields of a cell's row, and which rows are ringed."""

    x: DataColumn
    y: DataColumn
    front: str
    better: str


def pareto(look: Look, scene: Scene, of: Front, xs: Sequence[float], ys: Sequence[float]) -> Spec:
    """Two figures of each cell; cells on the Pareto front are ringed."""
    x = {**_value_axis(xs), "field": of.x.field, "title": f"{of.x.title}, {of.x.unit}"}
    place = {"x": x, "y": {**_value_axis(ys), "field": of.y.field}}
    x["axis"] = {**x["axis"], "grid": True}
    if "zero" in x["scale"]:
        x["scale"] = {**x["scale"], "zero": False}
    named = [(column.field, f"{column.title}, {column.unit}") for column in (of.y, of.x)]
    plain = {"shape": {"value": "circle"}}
    layers: list[Spec] = [
        {"mark": {**LINE, "strokeWidth": 1.5, "opacity": 0.5}, "encoding": {**place, "order": {"field": "load"}}},
        {
            "transform": [{"filter": f"datum.{of.front}"}],
            "mark": {"type": "point", "size": 200, "filled": False, "strokeWidth": 1.5},
            "encoding": {**place, **plain, "color": {"value": look.ink}},
        },
        {"mark": POINT, "encoding": {**place, "tooltip": _tooltip(scene, named, "")}},
    ]
    if scene.load:
        text = {"type": "text", "dx": 9, "dy": -9, "align": "left", "fontSize": 11}
        shown = {"text": {"field": "load", "type": "quantitative"}, "color": {"value": look.faint}}
        layers.append({"mark": text, "encoding": {**place, **shown}})
    return _spec(look, scene, of.y.unit, "cells", [], layers, 320)


def over_a_repeat(look: Look) -> Spec:
    """The latency of each request by the time it was sent, and the median of the requests of each part of the repeat."""
    x = {
        "field": "t", "type": "quantitative", "title": "seconds since the start of the repeat",
        "scale": {"nice": False}, "axis": {"format": FORMAT, "grid": False},
    }  # fmt: skip
    y = {"field": "seconds", "type": "quantitative", "title": "seconds", "axis": {"format": FORMAT, "tickCount": 5}}
    colour = {
        "field": "repeat", "type": "nominal", "title": None, "legend": {"orient": "top", "title": None},
        "scale": {"range": list(look.series)},
    }  # fmt: skip
    tooltip = [
        {"field": "repeat", "title": "repeat"},
        {"field": "t", "type": "quantitative", "title": "sent at, s", "format": FORMAT},
        {"field": "seconds", "type": "quantitative", "title": "latency, s", "format": FORMAT},
    ]
    layers: list[Spec] = [
        {
            "transform": [{"filter": "datum.kind === 'request'"}],
            "mark": {"type": "point", "filled": True, "size": 22, "opacity": 0.6},
            "encoding": {"x": x, "y": y, "color": colour, "tooltip": tooltip},
        },
        {
            "transform": [{"filter": "datum.kind === 'median'"}],
            "mark": {**LINE, "color": look.ink},
            "encoding": {"x": x, "y": y},
        },
    ]
    return _plain(look, "requests", layers, 240)


QUANTILES = (
    ("q0", "fastest"), ("q25", "25%"), ("q50", "median"), ("q75", "75%"), ("q99", "99%"), ("q100", "slowest"),
)  # fmt: skip


def latency(look: Look, scene: Scene, values: Sequence[float]) -> Spec:
    """The distribution over the requests of each cell: all between the ends of the line, half of them in the bar, a point
    at the 99th percentile."""
    x = {**_value_axis(values), "title": "seconds"}
    y = _rows(scene.lines)
    tooltip = [
        {"field": "label", "title": "cell"},
        *(
            {"field": name, "type": "quantitative", "title": f"{title}, s", "format": FORMAT}
            for name, title in QUANTILES
        ),
        {"field": "requests", "title": "requests"},
    ]
    layers: list[Spec] = [
        {"mark": RULE, "encoding": {"x": {**x, "field": "q0"}, "x2": {"field": "q100"}}},
        {
            "mark": {"type": "bar", "size": 8, "opacity": 0.5},
            "encoding": {"x": {**x, "field": "q25"}, "x2": {"field": "q75"}},
        },
        {
            "mark": {"type": "tick", "orient": "vertical", "thickness": 2, "size": 14},
            "encoding": {"x": {**x, "field": "q50"}, "color": {"value": look.ink}},
        },
        {"mark": {**POINT, "size": 44}, "encoding": {"x": {**x, "field": "q99"}, "tooltip": tooltip}},
    ]
    for layer in layers:
        layer["encoding"]["y"] = y
    return _spec(look, scene, "", "latencies", [], layers, None)


def ratios(look: Look, lines: int) -> Spec:
    """Ratios to the baseline with their 95% intervals: one that crosses the line is not significant."""
    scale = {"type": "log", "base": 2, "nice": False, "padding": 16}
    x = {
        "type": "quantitative",
        "title": "times the baseline",
        "scale": scale,
        # A label near an end stays inside the picture, and labels that would run together are left out.
        "axis": {"format": FORMAT, "grid": True, "labelFlush": 16, "labelOverlap": True},
    }
    y = _rows(lines)
    fields = (("ratio", "ratio"), ("low", "95% from"), ("high", "95% to"))
    tooltip = [
        {"field": "label", "title": "cell"},
        *({"field": name, "type": "quantitative", "title": title, "format": FORMAT} for name, title in fields),
        {"field": "verdict", "title": "verdict"},
    ]
    colour = {"value": look.series[0]}
    interval = {"type": "rule", "strokeWidth": 4, "opacity": 0.4, "strokeCap": "round"}
    layers: list[Spec] = [
        {
            "data": {"values": [{"one": 1}]},
            "mark": {"type": "rule", "color": look.faint, "strokeWidth": 1},
            "encoding": {"x": {"field": "one", "type": "quantitative"}},
        },
        {"mark": interval, "encoding": {"y": y, "x": {**x, "field": "low"}, "x2": {"field": "high"}, "color": colour}},
        {"mark": POINT, "encoding": {"y": y, "x": {**x, "field": "ratio"}, "color": colour, "tooltip": tooltip}},
    ]
    return _plain(look, "ratios", layers, None)


BAND_HEIGHT = 56
LINES = {"orient": "top", "title": None, "symbolType": "stroke", "symbolStrokeWidth": 3}


def telemetry(look: Look, bands: int) -> Spec:
    """The quantities of one run over time, in bands, with its phases and repeats behind them."""
    x = {
        "field": "t", "type": "quantitative", "title": "seconds",
        "scale": {"nice": False, "zero": False}, "axis": {"format": FORMAT, "grid": False},
    }  # fmt: skip
    y = {
        "field": "at", "type": "quantitative", "title": None, "scale": {"domain": [0, bands + 0.4], "nice": False},
        "axis": {"values": list(range(bands + 1)), "labels": False, "grid": True},
    }  # fmt: skip
    devices = {"field": "device", "type": "nominal", "title": None, "legend": LINES}
    colours = {**devices, "scale": {"range": list(look.series)}}
    tooltip = [
        {"field": "what", "title": "quantity"}, {"field": "device", "title": "device"}, {"field": "value", "title": "value"},
        {"field": "t", "type": "quantitative", "title": "time, s", "format": FORMAT},
    ]  # fmt: skip

    held = {"condition": {"test": "datum.held", "value": 1}, "value": 0}

    def of(kind: str) -> list[Spec]:
        return [{"filter": f"datum.kind === '{kind}'"}]

    span = {"x": x, "x2": {"field": "end"}}
    text = {"type": "text", "align": "left", "fontSize": 11, "color": look.faint}
    layers: list[Spec] = [
        {
            "transform": of("repeat"), "mark": {"type": "rect", "opacity": 0.14, "color": look.series[0]},
            "encoding": {**span, "tooltip": [{"field": "what", "title": "measured"}]},
        },
        {
            "transform": of("phase"), "mark": {"type": "rule", "strokeDash": [2, 3], "color": look.faint},
            "encoding": {"x": x},
        },
        {
            "transform": of("phase"), "mark": {**text, "dx": 4, "baseline": "bottom"},
            "encoding": {"x": x, "y": y, "text": {"field": "name"}},
        },
        {
            "transform": of("sample"), "mark": {**LINE, "strokeWidth": 1.5},
            "encoding": {"x": x, "y": y, "color": colours, "detail": {"field": "what"}, "tooltip": tooltip},
        },
        {
            "transform": of("sample"), "mark": {"type": "point", "filled": True, "size": 30, "color": look.ink},
            "encoding": {"x": x, "y": y, "tooltip": tooltip, "opacity": held},
        },
        {
            "transform": of("label"), "mark": {**text, "dx": 4, "dy": -4, "baseline": "bottom", "color": look.ink},
            "encoding": {"x": x, "y": y, "text": {"field": "what"}},
        },
    ]  # fmt: skip
    return _plain(look, "telemetry", layers, max(1, bands) * BAND_HEIGHT)


# ---------------------------------------------------------------- their parts

FORMAT = ",.4~r"


def _plain(look: Look, data: str, layers: list[Spec], height: int | None) -> Spec:
    """A height of None is that of the rows that are shown: see `with_rows`."""
    return {
        "$schema": SCHEMA, "background": look.background, "width": look.width, **({"height": height} if height else {}),
        "autosize": {"type": "fit-x", "contains": "padding"}, "data": {"name": data}, "layer": layers, "config": _config(look),
    }  # fmt: skip


def _spec(
    look: Look, scene: Scene, unit: str, data: str, transform: list[Spec], layers: list[Spec], height: int | None
) -> Spec:
    """The layers with a colour and a shape a series, under a line that names the unit."""
    legend = {
        "orient": "top",
        "direction": "horizontal",
        "title": None,
        "columns": {"expr": "max(1, floor(width / 150))"},
    }
    several = len(scene.series) > 1 and look.inside
    common = {"field": "series", "type": "nominal", "legend": legend if several else None}
    domain = list(scene.series)
    ranges = {"color": list(look.series[: len(domain)]), "shape": list(SHAPES[: len(domain)])}
    told_apart = {channel: {**common, "scale": {"domain": domain, "range": of}} for channel, of in ranges.items()}
    for layer in layers:
        channels = told_apart if layer["mark"]["type"] == "point" else {"color": told_apart["color"]}
        layer["encoding"] = {**channels, **layer["encoding"]}
    spec = {**_plain(look, data, layers, height), "transform": transform}
    if unit and look.inside:
        spec["title"] = {
            "text": unit, "anchor": "start", "frame": "group", "fontSize": 12, "fontWeight": "normal", "color": look.faint,
            "offset": 8,
        }  # fmt: skip
    return spec


def _value_axis(values: Sequence[float]) -> Spec:
    """From zero, or logarithmic where the values span more than a linear axis can show."""
    positive = [value for value in values if value > 0]
    log = bool(positive) and min(positive) * LOG_FROM < max(positive)
    scale: Spec = {"type": "log", "nice": False, "padding": 16} if log else {"zero": True, "nice": True}
    axis = {"format": FORMAT, **({"values": _log_ticks(min(positive), max(positive))} if log else {"tickCount": 5})}
    return {"type": "quantitative", "title": None, "scale": scale, "axis": axis}


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 10, 100 ...; over fewer than three decades 2 and 5 between them."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high < 1000 * low else (1,)
    return [float(f"{step}e{decade}") for decade in decades for step in steps]


def _load_axis(scene: Scene) -> Spec:
    low, high = scene.loads[0], scene.loads[-1]
    log = low > 0 and high / low >= 4
    scale: Spec = {"type": "log", "base": 2, "nice": False} if log else {"zero": False, "nice": False}
    return {
        "field": "load", "type": "quantitative", "title": scene.load_title, "scale": {**scale, "padding": 14},
        "axis": {"values": list(scene.loads), "format": FORMAT, "grid": False, "labelOverlap": True},
    }  # fmt: skip


def _rows(lines: int) -> Spec:
    """A row a label, in the order of their places; its lines to the left, those of the longest centred on the row."""
    axis = {
        "ticks": False, "domain": False, "labelPadding": 8, "labelLimit": 0, "labelLineHeight": LINE_HEIGHT,
        "labelExpr": "split(datum.label, '\\n')", "labelOffset": -LINE_HEIGHT * (lines - 1) / 2,
    }  # fmt: skip
    return {"field": "label", "type": "nominal", "sort": {"field": "place"}, "title": None, "axis": axis}


def folded(labels: Sequence[str]) -> list[str]:
    """Labels in lines of `WIDE` characters, broken between words; short ones begin lower, for their middle to be the row's."""
    lines = [textwrap.wrap(label, WIDE, break_on_hyphens=False) or [""] for label in labels]
    most = max(map(len, lines), default=1)
    return ["\n" * ((most - len(of_label)) // 2) + "\n".join(of_label) for of_label in lines]


def lines_of(labels: Iterable[str]) -> int:
    """How many lines the longest of these labels has."""
    return max((label.strip("\n").count("\n") + 1 for label in labels), default=1)


def row_height(lines: int) -> int:
    """Pixels of a row that has room for so many lines of text."""
    return ROW_HEIGHT + (LINE_HEIGHT * (lines - 1) + 6 if lines > 1 else 0)


def _tooltip(scene: Scene, fields: Sequence[tuple[str, str]], unit: str) -> list[Spec]:
    head = [{"field": "series", "title": "series"}] if len(scene.series) > 1 else []
    if scene.load:
        head.append({"field": "load", "type": "quantitative", "title": scene.load_title})
    named = [
        {"field": field, "type": "quantitative", "title": f"{title}, {unit}" if unit else title, "format": FORMAT}
        for field, title in fields
    ]
    return [*head, *named, {"field": "n", "title": "values"}, {"field": "run", "title": "run"}]


def _per(scale: float, field: str) -> Spec:
    """A stored value in the unit that is shown; none stays none."""
    return {"calculate": f"isValid(datum.{field}) ? datum.{field} / {scale!r} : null", "as": f"shown_{field}"}


def _config(look: Look) -> Spec:
    return {
        "font": look.font, "aria": False, "view": {"stroke": None},
        "axis": {
            "labelColor": look.faint, "titleColor": look.faint, "gridColor": look.grid, "domainColor": look.grid,
            "tickColor": look.grid, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "labelPadding": 6,
            "titlePadding": 8, "tickSize": 4,
        },
        "axisY": {"domain": False, "ticks": False},
        "legend": {
            "labelColor": look.ink, "labelFontSize": 12, "symbolSize": 70, "symbolStrokeWidth": 0, "symbolOpacity": 1,
            "labelLimit": 220,
            "rowPadding": 4, "columnPadding": 18, "padding": 0, "offset": 10,
        },
    }  # fmt: skip
