"""A comparison on a terminal: an overview, tables, a grid, bars, verdicts and answers; and as CSV and Markdown."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from labctl_orchestrator.analysis import verdicts
from labctl_orchestrator.analysis.axes import SCALING_AXES
from labctl_orchestrator.analysis.comparison import Block, Comparison, Row
from labctl_orchestrator.analysis.metrics import OF_A_TEXT, OF_TASKS, SCALING_RATIOS, figure
from labctl_orchestrator.exchange.streams import for_programs, write_csv
from labctl_orchestrator.terminal import tables

if TYPE_CHECKING:
    from labctl_orchestrator.analysis.answers import AnswerPair, AnswerSide, RunAnswers, Summary
    from labctl_orchestrator.analysis.trend import Series, Trend

TEXT_SHOWN = 240
SENTENCES_SHOWN = TEXTS_SHOWN = 16
# Of one table.
ROWS_SHOWN = 1000
# Below the overview: warnings and notes, then where the rest is.
LINES_BELOW = 5
FEWEST_DIGITS = 6
SHORTEST_BAR, LONGEST_BAR = 8, 40


# ---------------------------------------------------------------- overview


def print_overview(answer: Comparison) -> None:
    """Print one table: a row per run, a column per metric, the ratio of the first metric and its verdict. Below it, on stderr,
    the most important warnings and notes."""
    blocks = answer.blocks_with_values
    by_metric = [
        [block for block in blocks if block.metric == metric] for metric in dict.fromkeys(b.metric for b in blocks)
    ]
    axes = list(dict.fromkeys([*answer.by, *(axis for block in blocks for axis in block.fixed)]))
    # Each metric has the same blocks of the same runs.
    lines = [
        (block, cells)
        for of_table in zip(*by_metric, strict=True)
        for block, cells in ((of_table[0], cells) for cells in zip(*(one.rows for one in of_table), strict=True))
    ]
    rows = [_overview_row(block, cells, axes) for block, cells in lines[:ROWS_SHOWN]]
    for row, run in zip(rows, _short_ids([row[0] for row in rows]), strict=True):
        row[0] = run
    if rows:
        columns = ["run", *axes, *(of_metric[0].title for of_metric in by_metric)]
        columns += [f"{_ratio(answer, blocks[0])} (95% CI)", "verdict"]
        if not any(row.baseline for block in by_metric[0] for row in block.rows):  # nothing is compared
            columns, rows = columns[:-2], [row[:-2] for row in rows]
        elif _scales(answer) and any(of_metric[0].metric == EFFICIENCY for of_metric in by_metric):
            columns.insert(-1, "efficiency")
            for row, (_, cells) in zip(rows, lines, strict=False):
                ratio = next(cell.ratio for cell in cells if cell.metric == EFFICIENCY)
                row.insert(-1, "-" if ratio is None else f"{ratio:.0%}")
        marks = [cells[0].marks for _, cells in lines[:ROWS_SHOWN]]
        if any(marks):
            columns, rows = [*columns, MARKS], [[*row, mark] for row, mark in zip(rows, marks, strict=True)]
        columns, rows = _without_metrics(columns, rows, len(axes), len(by_metric))
        right = [column for column in columns[1 + len(axes) :] if column not in ("verdict", MARKS)]
        tables.table(columns, rows, right=right, title=_ratio_title(answer, blocks[0]))
        print_rest_of_rows(len(lines))
        click.echo()
    _print_recommendations(answer)
    _print_lines_below(answer)


def _print_recommendations(answer: Comparison) -> None:
    lines = [line for one in answer.recommendations for line in one.sentences]
    for line in lines:
        tables.text(line)
    if lines:
        click.echo()


MARKS = "marks"
# Its ratio is speed-up / (GPUs / the baseline's GPUs).
EFFICIENCY = next(metric for metric, name in SCALING_RATIOS.items() if name == "efficiency")


def _ratio(answer: Comparison, block: Block) -> str:
    """The name of the block's ratios."""
    return SCALING_RATIOS.get(block.metric, "ratio") if _scales(answer) else "ratio"


def _scales(answer: Comparison) -> bool:
    """Whether the comparison is of GPUs, or of how they share a model."""
    return bool(answer.by) and answer.by[0] in SCALING_AXES


def _overview_row(block: Block, cells: Sequence[Row], axes: Sequence[str]) -> list[str]:
    main = cells[0]
    at = {**block.fixed, **main.at}
    quality = [row for row in cells[1:] if row.metric in OF_A_TEXT or row.metric in OF_TASKS]
    return [
        main.run_id, *(str(at.get(axis, "")) for axis in axes), *map(shown_mean, cells), ratio_to_baseline(main),
        ", ".join([verdicts.in_short(main), *filter(None, map(verdicts.quality_in_short, quality))]),
    ]  # fmt: skip


def _short_ids(run_ids: Sequence[str]) -> list[str]:
    """The shortest unique beginnings of the ids, of one length; commands accept them."""
    parts = [run_id.partition("@") for run_id in run_ids]
    distinct = len(set(run_ids))
    for length in range(FEWEST_DIGITS, max((len(digits) for digits, _, _ in parts), default=0) + 1):
        short = [f"{digits[:length]}{at}{origin}" for digits, at, origin in parts]
        if len(set(short)) == distinct:
            return short
    return list(run_ids)


def _without_metrics(
    columns: list[str], rows: list[list[str]], axes: int, metrics: int
) -> tuple[list[str], list[list[str]]]:
    """The table, without the last metrics if the terminal is too narrow; the first metric stays."""
    if sys.stdout.isatty():
        for place in range(axes + metrics, axes + 1, -1):
            if tables.fits(columns, rows):
                break
            columns, rows = (
                [*columns[:place], *columns[place + 1 :]],
                [[*row[:place], *row[place + 1 :]] for row in rows],
            )
    return columns, rows


def _ratio_title(answer: Comparison, block: Block) -> str:
    first = next((row for row in block.rows if row.is_baseline), None)
    if first is None:
        return ""
    to = answer.baseline or {axis: first.at[axis] for axis in answer.by[:1]}
    words = ", ".join(f"{axis} {value}" for axis, value in to.items()) or first.run_id
    better = f" ({block.better} is better)" if block.better else ""
    return f"{_ratio(answer, block)}: {block.title} relative to {words}{better}"


def print_rest_of_rows(count: int) -> None:
    """Print how many of the rows are not shown."""
    if count > ROWS_SHOWN:
        rest = count - ROWS_SHOWN
        tables.text(f"... and {rest:,} more rows: print all with --csv or --json, or select runs with --where")


def _print_lines_below(answer: Comparison) -> None:
    # Those that explain a * in the table come first.
    notes = sorted(answer.notes, key=lambda note: not note.startswith("*"))
    lines = [*(f"warning: {one}" for one in answer.warnings), *(f"note: {one}" for one in notes)]
    for line in lines[: LINES_BELOW - 1]:
        tables.note(line)
    hidden = len(lines) - (LINES_BELOW - 1)
    more = f"{hidden} more {'note' if hidden == 1 else 'notes'}: " if hidden > 0 else ""
    tables.note(
        f"{more}labctl compare --details prints all metrics, verdicts and answers; --metric NAME prints one metric"
    )


# ---------------------------------------------------------------- details


def print_comparison(answer: Comparison, form: str | None, *, with_texts: bool = True) -> None:
    """Print the comparison as "csv", "markdown", "plot" or tables (None); warnings and notes go to stderr."""
    if form == "csv":
        _print_csv(answer)
    elif form == "plot":
        _plot(answer)
    else:
        for block in answer.blocks_with_values:
            _print_block(answer, block, form)
    if form is None:
        _print_verdicts(answer)
        _print_recommendations(answer)
    if form is None and with_texts:
        _print_texts(answer)
    for warning in answer.warnings:
        tables.note(f"warning: {warning}")
    for remark in answer.notes:
        tables.note(f"note: {remark}")


def _print_csv(answer: Comparison) -> None:
    """A line per row and metric, in the metric's own unit; computed values have six digits."""
    fixed = list(dict.fromkeys(axis for block in answer.blocks for axis in block.fixed))
    figures = (
        "mean", "lowest", "highest", "n", "n_of", "spread", "ratio", "difference", "interval_low", "interval_high",
    )  # fmt: skip
    out = for_programs(sys.stdout)
    write_csv(out, [["metric", "unit", *fixed, *answer.by, *figures, "verdict", "run_id", MARKS]])
    for block in answer.blocks:
        at_block = [block.fixed.get(axis) for axis in fixed]
        write_csv(out, [[block.metric, row.unit, *at_block, *row.at.values(), *_csv_of(row)] for row in block.rows])


def _csv_of(row: Row) -> tuple[Any, ...]:
    low, high = row.ratio_interval or row.difference_interval or (None, None)
    computed = (row.spread, row.ratio, row.difference, low, high)
    digits = [None if value is None else f"{value:.6g}" for value in computed]
    return (row.mean, row.low, row.high, row.n, row.n_of, *digits, verdicts.kind(row), row.run_id, row.marks)


# ---------------------------------------------------------------- tables


def _print_block(answer: Comparison, block: Block, form: str | None) -> None:
    count = len(block.rows)
    block = replace(block, rows=block.rows[:ROWS_SHOWN])
    if len(answer.by) == 2 and answer.baseline and _is_grid(block):
        columns, rows = _grid(answer.by, block)
        right: list[str] = []
    else:
        columns, rows = _rows_of(answer, block)
        if form is None:
            columns, rows = _for_this_width(columns, rows)
        right = columns[len(answer.by) : -1]
    show = tables.markdown if form == "markdown" else tables.table
    show(columns, rows, right=right, title=title_of(block))
    print_rest_of_rows(count)
    click.echo()


def title_of(block: Block) -> str:
    better = f", {block.better} is better" if block.better else ""
    return f"{block.title}{better}" + "".join(f", {axis} {value}" for axis, value in block.fixed.items())


def _rows_of(answer: Comparison, block: Block) -> tuple[list[str], list[list[str]]]:
    samples = _samples_title(block.rows)
    rows = [
        [
            *[str(value) for value in row.at.values()],
            shown_mean(row), figure(row.low, row.unit), figure(row.high, row.unit),
            _count(row, samples), ratio_to_baseline(row), row.run_id,
        ]
        for row in block.rows
    ]  # fmt: skip
    return [*answer.by, "mean", "lowest", "highest", samples, _ratio(answer, block), "run"], rows


def _for_this_width(columns: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The table, without lowest and highest where the terminal is too narrow: the interval says more."""
    if not sys.stdout.isatty() or tables.fits(columns, rows):
        return columns, rows
    kept = [place for place, column in enumerate(columns) if column not in ("lowest", "highest")]
    return [columns[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _is_grid(block: Block) -> bool:
    """Whether each place of the grid has one row, and each row its baseline on the same line."""
    on_one_line = all(
        row.baseline is None or list(row.at.values())[1:] == list(row.baseline.at.values())[1:] for row in block.rows
    )
    return on_one_line and len({repr(row.at) for row in block.rows}) == len(block.rows)


def _grid(by: Sequence[str], block: Block) -> tuple[list[str], list[list[str]]]:
    """The first axis across, the second down: means, with the ratio to the baseline of the same line."""
    across, down = by
    columns = list(dict.fromkeys(str(row.at[across]) for row in block.rows))
    bases = {str(row.at[across]): str(row.baseline.at[across]) for row in block.rows if row.baseline is not None}
    titles = [f"{column} (ratio to {bases[column]})" if column in bases else column for column in columns]
    lines: dict[str, dict[str, str]] = {}
    for row in block.rows:
        ratio = "" if row.baseline is None else f"  {ratio_to_baseline(row)}"
        lines.setdefault(str(row.at[down]), {})[str(row.at[across])] = f"{shown_mean(row)}{ratio}"
    return [down, *titles], [[place, *(line.get(column, "") for column in columns)] for place, line in lines.items()]


def shown_mean(row: Row) -> str:
    """The mean, with a * where a note explains a doubt about it."""
    return f"{figure(row.mean, row.unit)}{'*' if row.doubts else ''}"


def _samples_title(rows: Sequence[Row]) -> str:
    """The title of the column with the number of samples: their kind, if all rows have the same."""
    kinds = {row.n_of for row in rows}
    return kinds.pop().split()[-1] if len(kinds) == 1 else "samples"


def _count(row: Row, title: str) -> str:
    return f"{row.n} {row.n_of.split()[-1]}" if title == "samples" else str(row.n)


def ratio_to_baseline(row: Row) -> str:
    """ "13.2x (12.8-13.5)"; a difference where a ratio means nothing; else "-"."""
    if row.ratio is not None and row.metric in OF_A_TEXT and not row.is_baseline:
        return verdicts.percent_change(row.ratio, row.ratio_interval)
    if row.ratio is not None:
        return verdicts.ratio_with_interval(row.ratio, row.ratio_interval)
    if row.metric in OF_TASKS and row.difference is not None and not row.is_baseline:
        return verdicts.signed_with_interval(row)
    if row.difference is not None and not row.is_baseline:
        return verdicts.signed(row.difference, row.unit)
    return "-"


def _print_verdicts(answer: Comparison) -> None:
    rows = [(row, block) for block in answer.blocks for row in block.rows if row.has_an_answer]
    for row, block in rows[:SENTENCES_SHOWN]:
        if row.baseline is not None:
            tables.text(verdicts.sentence(row, row.baseline, block))
    if len(rows) > SENTENCES_SHOWN:
        rest = len(rows) - SENTENCES_SHOWN
        tables.text(f"... and {rest:,} more verdicts: print all with --json, or select with --where, --metric and --by")
    if rows:
        click.echo()


def _print_texts(answer: Comparison) -> None:
    rows = {row.run_id: (row, block) for block in answer.blocks for row in block.rows}
    for row, block in list(rows.values())[:TEXTS_SHOWN]:
        axes = {**row.at, **block.fixed}
        at = ", ".join(f"{axis} {value}" for axis, value in axes.items()) or row.run_id
        text = " ".join(row.text.split())
        tables.text(f"text, {at}: {text[:TEXT_SHOWN]}{'…' if len(text) > TEXT_SHOWN else ''}")
    if len(rows) > TEXTS_SHOWN:
        rest = len(rows) - TEXTS_SHOWN
        tables.text(f"... and {rest:,} more texts: print one with labctl show RUN, compare with labctl compare --text")


# ---------------------------------------------------------------- bars


def _plot(answer: Comparison) -> None:
    """A bar per row, on one scale per metric: solid up to the lowest value, shaded up to the highest."""
    for metric in dict.fromkeys(block.metric for block in answer.blocks_with_values):
        blocks = [block for block in answer.blocks if block.metric == metric]
        longest = max((abs(row.high or 0) for block in blocks for row in block.rows), default=0)
        for block in blocks:
            first = " ".join(answer.by) or "run"
            beside = [
                [
                    " ".join(map(str, row.at.values())) or row.run_id,
                    shown_mean(row),
                    "" if row.baseline is None else ratio_to_baseline(row),
                ]
                for row in block.rows
            ]
            width = _bar_width([first, "mean", "ratio"], beside)
            rows = [[at, _bar(row, longest, width), *rest] for row, (at, *rest) in zip(block.rows, beside, strict=True)]
            tables.table([first, "", "mean", "ratio"], rows, right=("mean",), title=title_of(block))
            click.echo()


def _bar_width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """The width that the other columns leave."""
    if not sys.stdout.isatty():
        return LONGEST_BAR
    others = sum(max(map(len, column)) for column in zip(columns, *rows, strict=True))
    return max(SHORTEST_BAR, min(LONGEST_BAR, shutil.get_terminal_size().columns - others - 2 * len(columns)))


def _bar(row: Row, longest: float, width: int) -> str:
    if row.low is None or row.high is None or not longest:
        return ""
    full, shaded = ("█", "▒") if (sys.stdout.encoding or "").lower().startswith("utf") else ("#", "-")
    nearest, furthest = sorted((abs(row.low), abs(row.high)))
    solid = max(1, round(nearest / longest * width))
    return full * solid + shaded * (round(furthest / longest * width) - solid)


# ---------------------------------------------------------------- over time


def print_trend(found: Trend) -> None:
    """Print a table per metric and run, a line per attempt; regressions below."""
    for series in found.series:
        _print_series(series)
    for regression in found.regressions:
        tables.text(regression)
    if found.series and not found.regressions:
        tables.text("no significant regression")
    for remark in found.notes:
        tables.note(f"note: {remark}")


def _print_series(series: Series) -> None:
    unit = series.metric_text.unit
    better = f", {series.metric_text.better} is better" if series.metric_text.better else ""
    at = "".join(f", {axis} {value}" for axis, value in series.at.items())
    rows = []
    samples = _samples_title([point.row for point in series.points])
    for point in series.points:
        row = point.row
        spread = [figure(value, unit) for value in (row.mean, row.low, row.high)]
        against = "" if row.baseline is None else ratio_to_baseline(row)
        mark = "REGRESSION" if point.is_regression else ""
        at_time, changed = point.at[:16].replace("T", " "), "; ".join(point.changed)
        rows.append([at_time, *spread, _count(row, samples), against, mark, changed])
    columns = ["measured", "mean", "lowest", "highest", samples, "ratio", "", "changed"]
    right, title = columns[1:6], f"{series.metric_text.title}{better}, {series.run_id}{at}"
    columns, rows = _for_this_width(columns, rows)
    tables.table(columns, rows, right=right, title=title)
    click.echo()


# ---------------------------------------------------------------- texts


def print_texts_compared(
    answers: Sequence[RunAnswers], summaries: Sequence[Summary], pairs: Sequence[tuple[RunAnswers, list[AnswerPair]]]
) -> None:
    """Print a summary of each run's answers, then the texts: side by side for one prompt, a line each for several."""
    from labctl_orchestrator.analysis.answers import agreement

    _print_summaries(summaries)
    for (other, found), summary in zip(pairs, summaries[1:], strict=True):
        name = f"{other.run_id}: " if len(pairs) > 1 else ""
        drawn = f" (of the first of {summary.answers} answers)" if summary.distinct > 1 else ""
        tables.text(f"{name}{agreement(found)}{drawn}")
    if any(other.model_content != answers[0].model_content for other in answers):
        tables.note("note: different models: tokens are compared by text")
    click.echo()
    if all(len(found) == 1 for _, found in pairs):
        _print_side_by_side(answers[0], [(other, found[0]) for other, found in pairs])
        return
    for other, found in pairs:
        _print_pairs(found, f"{answers[0].run_id} | {other.run_id}")


def _print_summaries(summaries: Sequence[Summary]) -> None:
    columns = ["run", "answers", "distinct", "tokens", "ends", "log-prob", "repeated", "same", "equal", "settings"]
    rows = [
        [
            one.run_id, str(one.answers), f"{one.distinct:.3g}", f"{one.tokens:g}",
            ", ".join(f"{count} {reason}" for reason, count in one.finish_reasons.items()),
            figure(one.mean_log_probability, ""), figure(one.repeated_bigrams, ""),
            f"{one.exact_match:.0%}", f"{one.equal_tokens:g}", one.settings,
        ]
        for one in summaries
    ]  # fmt: skip
    tables.table(columns, rows, right=[column for column in columns[1:-1] if column != "ends"])


def _print_side_by_side(first: RunAnswers, others: Sequence[tuple[RunAnswers, AnswerPair]]) -> None:
    for other, pair in others:
        if not pair.same:
            name = f"{other.run_id}, " if len(others) > 1 else ""
            click.echo(f"{name}token {pair.equal_tokens + 1}: {_token(pair.first)} | {_token(pair.second)}\n")
    pair = others[0][1]
    # Of several, each first differs at a place of its own.
    mark = pair.first.mark if len(others) == 1 else None
    sides = [(first.run_id, replace(pair.first, mark=mark)), *((other.run_id, pair.second) for other, pair in others)]
    tables.side_by_side(
        [(f"{run_id}: {side.tokens} tokens, {side.finish_reason}", side.text, side.mark) for run_id, side in sides]
    )


def _print_pairs(found: Sequence[AnswerPair], title: str) -> None:
    columns = ("prompt", "tokens", "equal", "first difference", "text")
    rows = []
    for number, pair in enumerate(found, 1):
        apart = "" if pair.same else f"{_token(pair.first)} | {_token(pair.second)}"
        same_length = pair.first.tokens == pair.second.tokens
        tokens = str(pair.first.tokens) if same_length else f"{pair.first.tokens} | {pair.second.tokens}"
        shown = " ".join(pair.prompt.split())
        rows.append([str(number), tokens, "all" if pair.same else str(pair.equal_tokens), apart, shown[:60]])
    tables.table(columns, rows, right=("prompt", "tokens", "equal"), title=title)


def _token(side: AnswerSide) -> str:
    return "(end)" if side.token_id is None else f"{side.token!r} ({side.token_id})"
