"""Findings -> one HTML file that loads nothing."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import resources
from typing import Any, NamedTuple

from labctl_orchestrator.analysis import verdicts
from labctl_orchestrator.analysis.answers import AnswerPair, AnswerSide, RunAnswers, answer_pairs, summaries
from labctl_orchestrator.analysis.axes import axes_of
from labctl_orchestrator.analysis.comparison import AxisValue, Block, Row, mean_of
from labctl_orchestrator.analysis.metrics import ALL_METRICS, figure
from labctl_orchestrator.analysis.verdicts import BETTER, DIFFERS, WORSE, sentence
from labctl_orchestrator.exchange.streams import visible, visible_in
from labctl_orchestrator.report import charts
from labctl_orchestrator.report.draw import Drawing, apart, baseline_of, compared
from labctl_orchestrator.report.findings import (
    MOST_PROMPTS,
    Findings,
    JobTime,
    Pass,
    Setting,
    TextGroup,
    choices,
    slices,
)
from labctl_orchestrator.report.layout import NOTHING, axis_words, capital, in_order, shown_value
from labctl_orchestrator.report.repeat import steps
from labctl_workers.measure import METRICS

# With more repeats the table has a row per run.
MOST_REPEATS = 3000
MOST_CHOICES = 12
SIGNIFICANT = 4
MOST_SETTINGS = 6


@dataclass(frozen=True)
class Heading:
    """A column of a table; `kind` is the CSS class of its cells."""

    title: str
    unit: str = ""
    kind: str = ""
    run: bool = False

    @property
    def number(self) -> bool:
        return self.kind == "n"


@dataclass(frozen=True)
class HtmlTable:
    """A table of text cells; `headed`: the page has its caption already."""

    caption: str
    columns: Sequence[Heading]
    rows: Sequence[Sequence[str]]
    id: str = ""
    shaded: frozenset[int] = frozenset()
    headed: bool = False


@dataclass(frozen=True)
class Choice:
    """A choice for the reader: the option `chosen` at first, or the `column` of the table that it filters."""

    name: str
    options: Sequence[str]
    chosen: int = 0
    column: int = 0


def render(findings: Findings, drawn: Drawing, vega: str, versions: tuple[str, str]) -> str:
    """The HTML of the page. `vega` is the script that draws, `versions` are those of Vega and Vega-Lite."""
    from jinja2 import Environment, StrictUndefined

    raw, raw_values = _raw(findings)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True, finalize=_visible
    )
    template = environment.from_string(_file("page.html.j2"))
    data = {
        "name": findings.title, "charts": [_chart_data(chart) for chart in (*drawn.charts, *drawn.ratios)], **drawn.rows,
        "raw": raw_values,
    }  # fmt: skip
    return template.render(
        page=_page(findings, drawn, raw),
        version=importlib.metadata.version("labctl-slurm"),
        vega_version=versions[0],
        vegalite_version=versions[1],
        css=_as_it_is(_file("page.css")),
        script=_as_it_is(_file("page.js")),
        vega=_as_it_is(f"/*!\n{_file('vega-license.txt')}*/\n{vega}".replace("</script", "<\\/script")),
        # A model's answer may contain "</script>".
        data=_as_it_is(json.dumps(visible_in(data), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")),
    )


def _visible(value: Any) -> Any:
    return visible(value) if type(value) is str else value  # a Markup stays as it is


def _as_it_is(text: str) -> Any:
    """Text that the template does not escape: of this package, or made safe by the caller."""
    from markupsafe import Markup

    return Markup(text)  # noqa: S704


@functools.cache
def _file(name: str) -> str:
    return (resources.files("labctl_orchestrator.report") / name).read_text(encoding="utf-8")


def _chart_data(chart: charts.Chart) -> dict[str, object]:
    names = ("name", "title", "data", "needs", "metric", "spec", "row_height")
    columns = [asdict(column) for column in chart.columns]
    return {**{name: getattr(chart, name) for name in names}, "columns": columns}


def _page(findings: Findings, drawn: Drawing, raw: HtmlTable) -> dict[str, object]:
    texts_of = [_text_group(group) for group in findings.texts]
    sections = [
        ("verdicts", "Verdicts"), ("asked", "Settings"), ("charts", "Charts"), ("texts", "Answers"),
        ("values", "All values"), ("measured", "Versions"), ("repeat", "Repeat"),
    ]  # fmt: skip
    lead, tables = _lead(findings), _verdict_tables(findings)
    values_of = {axis: _values(findings, axis) for axis in axes_of(findings.cells)}
    return {
        "title": findings.title, "subtitle": _subtitle(findings), "tiles": _tiles(findings), "sections": sections,
        "made_at": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "compared": _pairing_text(findings), "lead": lead, "warnings": findings.comparison.warnings,
        "notes": findings.comparison.notes, "ratios": drawn.ratios, "verdict_tables": tables,
        "varying": [
            (axis_words(axis), [shown_value(axis, value) or "none" for value in values])
            for axis, values in values_of.items()
            if len(values) > 1
        ],
        "fixed": _fixed(findings, values_of),
        "prompts": findings.prompts[:MOST_PROMPTS], "more_prompts": max(0, len(findings.prompts) - MOST_PROMPTS),
        "missing": [f"{run.run_id}: {run.state} {run.detail}".strip() for run in findings.missing],
        "legend": _legend(drawn.series), "charts": drawn.charts, "not_drawn": drawn.not_drawn,
        "picks": _picks(findings), "charts_text": MEANING_OF_CHARTS + " Choose the values of the other axes." * bool(
            findings.layout.picked
        ),
        "texts": texts_of, "texts_text": _texts_text(findings),
        "raw": raw, "screen_only": _screen_only(raw),
        "filters": _filters(findings, raw), "values_text": _values_text(findings, raw),
        "settings": _settings_table(findings.settings), "settings_text": _settings_text(findings.settings),
        "gpu_time": _gpu_time_table(findings.jobs) if findings.jobs else None, "gpu_time_text": _gpu_time_text(findings.jobs),
        "steps": steps(findings),
    }  # fmt: skip


# ---------------------------------------------------------------- head


def _subtitle(findings: Findings) -> str:
    first = min(setting.first for setting in findings.settings)[:10]
    last = max(setting.last for setting in findings.settings)[:10]
    when = f"Measured on {first}" if first == last else f"Measured from {first} to {last}"
    conditions = findings.subject.conditions
    return f"{when}{', where ' + ', '.join(conditions) if conditions else ''}."


class Tile(NamedTuple):
    """A number at the head of the page."""

    name: str
    value: str
    more: str


def _tiles(findings: Findings) -> list[Tile]:
    cells, laid_out = findings.cells, findings.layout
    without = f"{len(findings.missing)} without a result" if findings.missing else "all submitted runs"
    tiles = [Tile("measured runs", f"{len(cells):,}", without)]
    for metric, name, best in (("output_tok_s", "highest throughput", max), ("e2e_s", "lowest latency", min)):
        means = [(mean, cell) for cell in cells if (mean := mean_of(metric, cell.values.get(metric, []))) is not None]
        if means:
            mean, cell = best(means, key=lambda one: one[0])
            words = [laid_out.series_of(cell)] if laid_out.series else []
            words += [f"{axis_words(laid_out.load)} {cell.axes[laid_out.load]}"] if laid_out.load else []
            tiles.append(Tile(name, figure(mean, ALL_METRICS[metric].unit), ", ".join(words)))
    gpus = list(dict.fromkeys(setting.facts["GPUs"] for setting in findings.settings))
    kinds = "; ".join(gpus) if len(gpus) < 4 else f"{len(gpus)} kinds"
    return [*tiles, Tile("on", ", ".join(in_order(cell.partition for cell in cells)), f"GPUs: {kinds}")]


# ---------------------------------------------------------------- verdicts


def _pairing_text(findings: Findings) -> str:
    by = findings.comparison.by
    if not by:
        return "All runs have the same settings, so none is compared."
    axes = ", ".join(axis_words(axis) for axis in by)
    if not compared(findings):
        return "No two runs differ on the compared axis alone, so none has a ratio."
    words = "Paired runs are equal on all other axes. Intervals in brackets are 95% confidence intervals."
    return f"Compared by {axes}, each against {baseline_of(findings)}. {words}"


def _lead(findings: Findings) -> list[dict[str, str]]:
    """A line per metric and two compared values: the verdict of one pair, or the number of each kind of verdict. In the order of
    the metrics, for one metric the largest difference first."""
    groups: dict[tuple[str, str, str], list[tuple[Block, Row, Row]]] = {}
    for block, row, baseline in compared(findings):
        if row.has_an_answer:
            groups.setdefault((block.title, *apart(row, baseline)), []).append((block, row, baseline))
    metrics = list(dict.fromkeys(title for title, _, _ in groups))
    ordered = sorted(groups.items(), key=lambda one: (metrics.index(one[0][0]), *_by_difference(one[1])))
    recommended = [line for one in findings.comparison.recommendations for line in one.sentences]
    taken = [{"kind": "better", "text": f"{capital(line.strip())}."} for line in recommended]
    return [*taken, *(_verdict_line(*who, rows) for who, rows in ordered[:MOST_LEAD])]


MOST_LEAD = 6


def _by_difference(rows: Sequence[tuple[Block, Row, Row]]) -> tuple[bool, float]:
    """The sort key: significant differences first, the largest ratio first."""
    shown = [row for _, row, _ in rows if verdicts.kind(row) in (BETTER, WORSE, DIFFERS)]
    return not shown, -max((abs(math.log(row.ratio)) for row in shown if row.ratio), default=0.0)


def _verdict_line(title: str, ours: str, theirs: str, rows: Sequence[tuple[Block, Row, Row]]) -> dict[str, str]:
    """ "Throughput: vllm better than hf in 9 of 10 pairs (1.2x to 13.2x), no significant difference in 1." """
    kinds = Counter(verdicts.kind(row) for _, row, _ in rows).most_common()
    if len(rows) == 1:
        block, row, baseline = rows[0]
        return {"kind": kinds[0][0], "text": f"{capital(sentence(row, baseline, block))}."}
    parts = []
    for kind, count in kinds:
        ratios = sorted(max(row.ratio, 1 / row.ratio) for _, row, _ in rows if verdicts.kind(row) == kind and row.ratio)
        span = (
            f" ({' to '.join(dict.fromkeys(f'{ratio:.3g}x' for ratio in (ratios[0], ratios[-1])))})" if ratios else ""
        )
        parts.append(f"{kind} in {count} of {len(rows)}{span if kind in (BETTER, WORSE) else ''}")
    return {"kind": kinds[0][0], "text": f"{capital(title)}, {ours} against {theirs}: {', '.join(parts)}."}


def _verdict_tables(findings: Findings) -> list[HtmlTable]:
    by_metric: dict[str, list[tuple[Block, Row]]] = {}
    for block in findings.comparison.blocks:
        by_metric.setdefault(block.metric, []).extend((block, row) for row in block.rows)
    return [_verdict_table(rows) for rows in by_metric.values() if any(row.n for _, row in rows)]


def _verdict_table(rows: Sequence[tuple[Block, Row]]) -> HtmlTable:
    block = rows[0][0]
    axes = list(dict.fromkeys(axis for of, row in rows for axis in (*of.fixed, *row.at)))
    shown = [row.mean for _, row in rows]
    unit, form = _unit_of(rows[0][1].unit, [value for value in shown if value is not None])
    if mixed := len({row.unit for _, row in rows}) > 1:  # several currencies: each value has its own unit
        unit = ""
    better = f", {block.better} is better" if block.better else ""
    columns = [
        Heading("run", kind="run", run=True), *(Heading(axis_words(axis)) for axis in axes),
        Heading("mean", unit, "n"), Heading("lowest", unit, "n"), Heading("highest", unit, "n"), Heading("samples", kind="n"),
        Heading("ratio", kind="n"), Heading("95% interval", kind="n"), Heading("verdict", kind="wrap"),
    ]  # fmt: skip
    lines = []
    for of, row in rows:
        at = {**of.fixed, **row.at}
        interval = (
            NOTHING if row.ratio_interval is None else f"{row.ratio_interval[0]:.3f} to {row.ratio_interval[1]:.3f}"
        )
        written = functools.partial(figure, unit=row.unit) if mixed else form
        lines.append([
            row.run_id, *(shown_value(axis, at.get(axis)) or NOTHING for axis in axes),
            written(row.mean) + ("*" if row.doubts else ""), written(row.low), written(row.high), str(row.n),
            NOTHING if row.ratio is None else f"{row.ratio:.3f}", interval, verdicts.verdict(row).text,
        ])  # fmt: skip
    return HtmlTable(f"{capital(block.title)}{better}", columns, lines, headed=True)


# ---------------------------------------------------------------- settings


def _fixed(findings: Findings, values_of: Mapping[str, Sequence[AxisValue]]) -> list[tuple[str, str]]:
    """The settings that all runs share, without the usual ones."""
    fixed = {axis: values[0] for axis, values in values_of.items() if len(values) == 1}
    words = [
        (axis_words(axis), shown_value(axis, value))
        for axis, value in fixed.items()
        if value not in (None, "", "{}") and axis not in NOT_SHOWN and UNREMARKABLE.get(axis) != value
    ]
    repeats = in_order([sum(map(len, cell.values["output_tokens"])) for cell in findings.cells])
    return [*words, ("repeats of a run", ", ".join(map(str, repeats)))]


NOT_SHOWN = ("prompt_set",)  # a hash of the prompts, which the page shows
UNREMARKABLE = {"ignore_eos": False, "raw_prompt": False, "origin": "here"}


def _values(findings: Findings, axis: str) -> list[AxisValue]:
    return in_order([cell.axes[axis] for cell in findings.cells])


# ---------------------------------------------------------------- charts


def _picks(findings: Findings) -> list[Choice]:
    fullest = slices(findings)[0]
    return [
        Choice(
            axis_words(axis),
            [shown_value(axis, value) or "none" for value in values],
            chosen=values.index(fullest[place]),
        )
        for place, (axis, values) in enumerate(choices(findings).items())
    ]


MEANING_OF_CHARTS = (
    "Points are means over engine loads and repeats. Thin lines reach from the lowest to the highest repeat."
)


def _legend(series: Sequence[str]) -> list[dict[str, str]]:
    """Each series with its colour and shape; empty for one series."""
    if len(series) < 2:
        return []
    return [
        {"name": name, "colour": colour, "path": PATHS[shape]}
        for name, colour, shape in zip(series, charts.PAGE.series, charts.SHAPES, strict=False)
    ]


# Vega's shapes, in a square of 10.
PATHS = {
    "circle": "M5 1a4 4 0 1 0 0 8a4 4 0 1 0 0-8z", "square": "M1.5 1.5h7v7h-7z", "diamond": "M5 .5l4 4.5l-4 4.5l-4-4.5z",
    "triangle-up": "M5 1l4.5 8h-9z", "triangle-down": "M5 9l4.5-8h-9z",
    "cross": "M3.5 1h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z",

    "triangle-right": "M9 5l-8 4.5v-9z", "triangle-left": "M1 5l8 4.5v-9z",
}  # fmt: skip


# ---------------------------------------------------------------- texts


def _texts_text(findings: Findings) -> str:
    if not findings.texts:
        return "No answers."
    where = ", at the smallest load" if findings.layout.load else ""
    marked = len(findings.texts[0].sides) > 1
    words = " The first token that differs from the first answer is marked." if marked else ""
    return f"Answers of the first repeat{where}.{words}"


def _text_group(group: TextGroup) -> dict[str, object]:
    (first_name, first), *others = group.sides
    pairs = [(name, {pair.prompt: pair for pair in _pairs(first, other)}) for name, other in others]
    answers = []
    for prompt, (sample, *_) in list(first.samples.items())[:MOST_PROMPTS]:
        sides = [_side(first_name, len(sample.token_ids), sample.finish_reason, sample.text, None, "")]
        for name, of_prompt in pairs:
            if prompt in of_prompt:
                pair = of_prompt[prompt]
                apart = "the same tokens" if pair.same else f"equal for {pair.equal_tokens} tokens"
                two = pair.second
                sides.append(_side(name, two.tokens, two.finish_reason, two.text, two, apart))
        answers.append({"prompt": prompt if len(first.samples) > 1 else "", "sides": sides})
    return {"title": group.title, "answers": answers, "summary": _summary_table(group)}


def _summary_table(group: TextGroup) -> HtmlTable:
    """A summary of all answers of each side."""
    alike = [
        (name, of) for name, of in group.sides if any(prompt in of.samples for prompt in group.sides[0][1].samples)
    ]
    titles = ("answers", "different", "tokens", "exact match", "equal tokens", "log-probability", "repeated bigrams")
    units = (
        "",
        "of a prompt, mean",
        "median",
        f"with {alike[0][0]}" if alike else "",
        "from the start",
        "nat/tok",
        "share",
    )
    columns = [Heading("series"), *(Heading(title, unit, "n") for title, unit in zip(titles, units, strict=True))]
    rows = [
        [
            name, f"{of.answers:,}", f"{of.distinct:.1f}", f"{of.tokens:g}", f"{of.exact_match:.0%}", f"{of.equal_tokens:g}",
            NOTHING if of.mean_log_probability is None else f"{of.mean_log_probability:.3f}",
            NOTHING if of.repeated_bigrams is None else f"{of.repeated_bigrams:.3f}",
        ]
        for (name, _), of in zip(alike, summaries([of for _, of in alike]), strict=True)
    ]  # fmt: skip
    which = f": {group.title}" if group.title else ""
    return HtmlTable(f"All answers of all prompts and repeats{which}", columns, rows)


def _pairs(first: RunAnswers, other: RunAnswers) -> list[AnswerPair]:
    return answer_pairs(first, other) if any(prompt in other.samples for prompt in first.samples) else []


def _side(name: str, tokens: int, ended: str, text: str, side: AnswerSide | None, apart: str) -> dict[str, str]:
    begin, end = (side.mark if side and side.mark else None) or (len(text), len(text))
    facts = ", ".join(word for word in (f"{tokens} tokens", f"ended by {ended}", apart) if word)
    return {"name": name, "facts": facts, "before": text[:begin], "marked": text[begin:end], "after": text[end:]}


# ---------------------------------------------------------------- the raw table


def _raw(findings: Findings) -> tuple[HtmlTable, dict[str, object]]:
    """The table, and its values as numbers for the script: a row per repeat, or per run if there are many."""
    rows = findings.repeats
    by_repeat = len(rows) <= MOST_REPEATS
    if not by_repeat:
        rows = _means(rows)
    axes = [axis for axis in axes_of(findings.cells) if len(_values(findings, axis)) > 1]
    metrics = [name for name in METRICS if any(row.figures[name] is not None for row in rows)]
    several = by_repeat and any(len(cell.loads) > 1 for cell in findings.cells)
    lead = [Heading("run", kind="run", run=True)]
    lead += [Heading("load")] if several else []
    lead += [Heading("repeat", kind="n")] if by_repeat else []
    units = {
        name: _unit_of(METRICS[name].unit, [value for row in rows if (value := row.figures[name]) is not None])
        for name in metrics
    }
    numeric = {axis for axis in axes if all(isinstance(value, int | float) for value in _values(findings, axis))}
    columns = [
        *lead, *(Heading(axis_words(axis), kind="n" if axis in numeric else "") for axis in axes),
        *(Heading(METRICS[name].title, units[name][0], "n") for name in metrics),
    ]  # fmt: skip
    shown, plain = [], []
    for row in rows:
        at = findings.cells[row.cell].axes
        head = [row.run_id, *([row.attempt_id] if several else []), *([row.repeat + 1] if by_repeat else [])]
        shown.append([
            *map(str, head), *(shown_value(axis, at[axis]) or NOTHING for axis in axes),
            *(units[name][1](row.figures[name]) for name in metrics),
        ])  # fmt: skip
        plain.append([*head, *(at[axis] for axis in axes), *(row.figures[name] for name in metrics)])
    what = "repeat" if by_repeat else "run, with means"
    names = ["run_id", *(["attempt_id"] if several else []), *(["repeat"] if by_repeat else []), *axes, *metrics]
    table = HtmlTable(f"A row per {what}", columns, shown, "raw")
    return table, {"columns": names, "rows": plain}


# The metrics that fit on paper.
PRINTED = ("output_tok_s", "ttft_s", "tpot_s", "e2e_s", "peak_allocated_bytes")


def _screen_only(raw: HtmlTable) -> list[int]:
    """The columns that are not printed, counted from 1."""
    left_out = {METRICS[name].title for name in METRICS if name not in PRINTED}
    return [place for place, heading in enumerate(raw.columns, 1) if heading.title in left_out]


def _means(rows: Sequence[Pass]) -> list[Pass]:
    """A row per cell, with the mean of its load means."""
    of_cell: dict[int, dict[str, list[Pass]]] = {}
    for row in rows:
        of_cell.setdefault(row.cell, {}).setdefault(row.attempt_id, []).append(row)
    means = []
    for of_load in of_cell.values():
        figures = {}
        for name in METRICS:
            known = [[v for row in passes if (v := row.figures[name]) is not None] for passes in of_load.values()]
            figures[name] = mean_of(name, known)
        means.append(replace(list(of_load.values())[-1][-1], figures=figures))
    return means


def _unit_of(unit: str, values: Sequence[float]) -> tuple[str, Callable[[float | None], str]]:
    """The unit of a column, and the function that writes its values, with the same number of decimals. The smallest has four
    digits, unless it is less than a thousandth of the largest."""
    sizes = [abs(value) for value in values if value]
    typical, largest = (statistics.median(sizes), max(sizes)) if sizes else (0.0, 0.0)
    scale, shown = 1.0, unit
    if unit == "B":
        scale, shown = (2.0**30, "GiB") if typical >= 2**30 else (2.0**20, "MiB")
    elif unit == "s" and typical < 1:
        scale, shown = 1e-3, "ms"
    whole = scale == 1.0 and all(float(value).is_integer() for value in values)
    decimals = 0
    if sizes and not whole:
        smallest = max(min(sizes), largest / 1000) / scale
        decimals = max(0, SIGNIFICANT - 1 - math.floor(math.log10(smallest)))

    def form(value: float | None) -> str:
        return NOTHING if value is None else f"{value / scale:,.{decimals}f}"

    return shown, form


def _filters(findings: Findings, raw: HtmlTable) -> list[Choice]:
    """A filter for each axis with few values."""
    found = []
    for axis in axes_of(findings.cells):
        values = _values(findings, axis)
        name = axis_words(axis)
        place = next((place for place, column in enumerate(raw.columns) if column.title == name), None)
        if 1 < len(values) <= MOST_CHOICES and place is not None:
            found.append(Choice(name, [shown_value(axis, value) or NOTHING for value in values], column=place))
    return found


def _values_text(findings: Findings, raw: HtmlTable) -> str:
    if len(raw.rows) == len(findings.repeats):
        return "Every repeat, without warm-up. labctl's docs/metrics.md defines each metric."
    return f"The means of {len(findings.repeats):,} repeats. labctl show RUN --json prints each repeat."


# ---------------------------------------------------------------- versions


def _settings_text(settings: Sequence[Setting]) -> str:
    if len(settings) == 1:
        return "All runs have the same versions, hardware and effective settings."
    words = f"{len(settings)} combinations of versions, hardware and effective settings. Shaded rows differ."
    return words if len(settings) <= MOST_SETTINGS else f"{words} The {MOST_SETTINGS} most frequent are shown."


def _settings_table(settings: Sequence[Setting]) -> HtmlTable:
    shown = settings[:MOST_SETTINGS]
    names = list(dict.fromkeys(name for setting in shown for name in setting.facts))
    heads = [
        Heading("what"),
        *(Heading(f"{setting.runs:,} run{'s' if setting.runs != 1 else ''}") for setting in shown),
    ]
    rows = [
        [NAMES_OF_FACTS.get(name, name), *(setting.facts.get(name, NOTHING) for setting in shown)] for name in names
    ]
    ends = [[f"{end[:10]} {end[11:16]}" for end in (setting.first, setting.last)] for setting in shown]
    when = ["measured", *(f"{' to '.join(dict.fromkeys(of))} UTC" for of in ends)]
    differ = frozenset(place for place, (_, *values) in enumerate(rows) if len(set(values)) > 1)
    return HtmlTable("Versions, hardware and effective settings", heads, [*rows, when], shaded=differ)


NAMES_OF_FACTS = {"effective_dtype": "effective dtype", "cuda": "CUDA", "python": "Python"}


# ---------------------------------------------------------------- GPU time

MOST_JOBS = 40
# From this many GPU-seconds on, the table is in hours.
IN_HOURS_FROM_GPU_S = 36_000
TITLES_OF_GPU_TIME = ("requested", "held", "loading", "warm-up", "measured", "other")


def _gpu_time_text(jobs: Sequence[JobTime]) -> str:
    more = f" The table has the {MOST_JOBS} jobs that held GPUs longest." if len(jobs) > MOST_JOBS else ""
    return (
        "GPUs x time of the jobs of these runs, over all starts of a job. A dash is an unknown value; totals are of known"
        f" values.{more}"
    )


def _gpu_time_table(jobs: Sequence[JobTime]) -> HtmlTable:
    known = [[value for value in of if value is not None] for of in zip(*(job.gpu_time for job in jobs), strict=True)]
    totals = [math.fsum(of) if of else None for of in known]
    in_hours = max((total for total in totals if total is not None), default=0.0) >= IN_HOURS_FROM_GPU_S
    unit, scale, decimals = ("GPU h", 3600.0, 2) if in_hours else ("GPU s", 1.0, 0)

    def figures(values: Iterable[float | None]) -> list[str]:
        return [NOTHING if value is None else f"{value / scale:,.{decimals}f}" for value in values]

    columns = [
        Heading("job"), Heading("partition"), Heading("backend"), Heading("state"), Heading("starts", kind="n"),
        Heading("runs", kind="n"), *(Heading(title, unit, "n") for title in TITLES_OF_GPU_TIME),
    ]  # fmt: skip
    rows = [
        [
            job.slurm_id or job.job_id, job.partition, job.backend, job.state or NOTHING, str(job.starts),
            str(job.runs_done) if job.runs_planned is None else f"{job.runs_done} of {job.runs_planned}", *figures(job.gpu_time),
        ]
        for job in jobs[:MOST_JOBS]
    ]  # fmt: skip
    total = [f"all {len(jobs):,} jobs" if len(jobs) > 1 else "in all", "", "", "", "", "", *figures(totals)]
    return HtmlTable("GPU time, a row per job", columns, [*rows, total], shaded=frozenset({len(rows)}))
