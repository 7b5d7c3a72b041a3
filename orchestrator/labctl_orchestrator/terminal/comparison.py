"""A comparison as a person sees it: tables, a grid, bars, sentences, texts beside one another; and as comma-separated values."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from labctl_orchestrator.analysis import verdicts
from labctl_orchestrator.analysis.comparison import LOADS, Block, Comparison, Row
from labctl_orchestrator.analysis.metrics import figure
from labctl_orchestrator.exchange.csv_rows import CsvRows
from labctl_orchestrator.exchange.streams import for_programs
from labctl_orchestrator.terminal import tables

if TYPE_CHECKING:
    from labctl_orchestrator.analysis.answers import AnswerPair, AnswerSide, RunAnswers, Summary
    from labctl_orchestrator.analysis.trend import Series, Trend

TEXT_SHOWN = 240
# More rows than these nobody reads as sentences, nor their texts: they are in the table.
SENTENCES_SHOWN = TEXTS_SHOWN = 16
# Of one table.
ROWS_SHOWN = 1000
SHORTEST_BAR, LONGEST_BAR = 8, 40


def print_comparison(answer: Comparison, form: str | None, *, with_texts: bool = True) -> None:
    """Print the answer in a form ("csv", "markdown", "plot", None: tables), and on the error stream what has to be said."""
    if form == "csv":
        _print_csv(answer)
    elif form == "plot":
        _plot(answer)
    else:
        for block in answer.blocks_with_values:
            _print_block(answer, block, form)
    if form is None:
        _print_verdicts(answer)
    if form is None and with_texts:
        _print_texts(answer)
    for warning in answer.warnings:
        tables.note(f"warning: {warning}")
    for remark in answer.notes:
        tables.note(f"note: {remark}")


def _print_csv(answer: Comparison) -> None:
    """One line a row and metric, values in the metric's own unit; what is reckoned from them to six digits."""
    fixed = list(dict.fromkeys(axis for block in answer.blocks for axis in block.fixed))
    figures = (
        "mean",
        "lowest",
        "highest",
        "n",
        "n_of",
        "spread",
        "ratio",
        "difference",
        "interval_low",
        "interval_high",
    )
    out = CsvRows(for_programs(sys.stdout))
    out.write([["metric", "unit", *fixed, *answer.by, *figures, "verdict", "run_id"]])
    for block in answer.blocks:
        at_block = [block.fixed.get(axis) for axis in fixed]
        out.write([[block.metric, row.unit, *at_block, *row.at.values(), *_csv_of(row)] for row in block.rows])


def _csv_of(row: Row) -> tuple[Any, ...]:
    low, high = row.ratio_interval or row.difference_interval or (None, None)
    reckoned = [
        None if value is None else f"{value:.6g}" for value in (row.spread, row.ratio, row.difference, low, high)
    ]
    return (row.mean, row.low, row.high, row.n, row.n_of, *reckoned, verdicts.kind(row), row.run_id)


# ---------------------------------------------------------------- tables


def _print_block(answer: Comparison, block: Block, form: str | None) -> None:
    rest = len(block.rows) - ROWS_SHOWN
    if rest > 0:
        block = replace(block, rows=block.rows[:ROWS_SHOWN])
    if len(answer.by) == 2 and answer.baseline and _is_grid(block):
        columns, rows = _grid(answer.by, block)
        right: list[str] = []
    else:
        columns, rows = _list(answer.by, block)
        if form is None:
            columns, rows = _for_this_width(columns, rows)
        right = columns[len(answer.by) : -1]
    show = tables.markdown if form == "markdown" else tables.table
    show(columns, rows, right=right, title=_title(block))
    if rest > 0:
        tables.text(f"... and {rest:,} more rows: --csv and --json have all; --where and names ask for fewer")
    click.echo()


def _title(block: Block) -> str:
    better = f", {block.better} is better" if block.better else ""
    return f"{block.title}{better}" + "".join(f", {axis} {value}" for axis, value in block.fixed.items())


def _list(by: Sequence[str], block: Block) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            *[str(value) for value in row.at.values()],
            shown_mean(row), figure(row.low, row.unit), figure(row.high, row.unit),
            _count(row), told_against(row), row.run_id,
        ]
        for row in block.rows
    ]  # fmt: skip
    return [*by, "mean", "lowest", "highest", "n", "ratio", "run"], rows


def _for_this_width(columns: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The table; less the lowest and the highest where a terminal has no room for all: an interval says more than they do."""
    if not sys.stdout.isatty() or tables.fits(columns, rows):
        return columns, rows
    kept = [place for place, column in enumerate(columns) if column not in ("lowest", "highest")]
    return [columns[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _is_grid(block: Block) -> bool:
    """Whether no two rows stand at one place, and each is on the line of its baseline."""
    on_one_line = all(
        row.baseline is None or list(row.at.values())[1:] == list(row.baseline.at.values())[1:] for row in block.rows
    )
    return on_one_line and len({repr(row.at) for row in block.rows}) == len(block.rows)


def _grid(by: Sequence[str], block: Block) -> tuple[list[str], list[list[str]]]:
    """The first axis across, the second down: means, and the ratio to the baseline of the same row."""
    across, down = by
    columns = list(dict.fromkeys(str(row.at[across]) for row in block.rows))
    lines: dict[str, dict[str, str]] = {}
    for row in block.rows:
        ratio = "" if row.baseline is None else f"  {told_against(row)}"
        told = f"{shown_mean(row)}{ratio}"
        lines.setdefault(str(row.at[down]), {})[str(row.at[across])] = told
    return [down, *columns], [[place, *(line.get(column, "") for column in columns)] for place, line in lines.items()]


def shown_mean(row: Row) -> str:
    """The mean, with a * where a note says what makes it doubtful."""
    return f"{figure(row.mean, row.unit)}{'*' if row.doubts else ''}"


def _count(row: Row) -> str:
    return f"{row.n} loads" if row.n_of == LOADS else str(row.n)


def told_against(row: Row) -> str:
    """ "13.2x (12.8-13.5)"; a difference where a ratio means nothing."""
    if row.ratio is not None:
        return verdicts.ratio_with_interval(row.ratio, row.ratio_interval)
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
        tables.text(f"... and {rest:,} more: --json has all; --where, --metric and --by ask for fewer")
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
        tables.text(
            f"... and {len(rows) - TEXTS_SHOWN:,} more texts: labctl show RUN has each, labctl compare --text compares them"
        )


# ---------------------------------------------------------------- bars


def _plot(answer: Comparison) -> None:
    """A bar a row, on one scale for each metric: full to the lowest value, shaded on to the highest."""
    for metric in dict.fromkeys(block.metric for block in answer.blocks_with_values):
        blocks = [block for block in answer.blocks if block.metric == metric]
        longest = max((abs(row.high or 0) for block in blocks for row in block.rows), default=0)
        for block in blocks:
            told = [_beside_a_bar(answer.by, row) for row in block.rows]
            width = _bar_width([" ".join(answer.by) or "run", "mean", "ratio"], told)
            rows = [[at, _bar(row, longest, width), *rest] for row, (at, *rest) in zip(block.rows, told, strict=True)]
            columns = [" ".join(answer.by) or "run", "", "mean", "ratio"]
            tables.table(columns, rows, right=("mean",), title=_title(block))
            click.echo()


def _beside_a_bar(by: Sequence[str], row: Row) -> list[str]:
    at = " ".join(str(row.at[axis]) for axis in by) or row.run_id
    return [at, shown_mean(row), "" if row.baseline is None else told_against(row)]


def _bar_width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """What a terminal leaves beside the other columns."""
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
    """A table for each metric and cell, an attempt a line; regressions below."""
    for series in found.series:
        _print_series(series)
    for regression in found.regressions:
        tables.text(regression)
    if found.series and not found.regressions:
        tables.text("no regression beyond the spread")
    for remark in found.notes:
        tables.note(f"note: {remark}")


def _print_series(series: Series) -> None:
    unit, better = series.told.unit, f", {series.told.better} is better" if series.told.better else ""
    at = "".join(f", {axis} {value}" for axis, value in series.at.items())
    rows = []
    for point in series.points:
        row = point.row
        spread = [figure(value, unit) for value in (row.mean, row.low, row.high)]
        against = "" if row.baseline is None else told_against(row)
        mark = "REGRESSION" if point.is_regression else ""
        rows.append([point.at[:16].replace("T", " "), *spread, _count(row), against, mark, "; ".join(point.changed)])
    columns = ["measured", "mean", "lowest", "highest", "n", "ratio", "", "changed"]
    columns, rows = _for_this_width(columns, rows)
    tables.table(
        columns,
        rows,
        right=("mean", "lowest", "highest", "n", "ratio"),
        title=f"{series.told.title}{better}, {series.run_id}{at}",
    )
    click.echo()


# ---------------------------------------------------------------- texts


def print_texts_compared(
    answers: Sequence[RunAnswers], summaries: Sequence[Summary], pairs: Sequence[tuple[RunAnswers, list[AnswerPair]]]
) -> None:
    """The answers' figures in a table, then the texts: of one prompt beside one another, of several a line each."""
    from labctl_orchestrator.analysis.answers import agreement

    _print_summaries(summaries)
    for (other, found), summary in zip(pairs, summaries[1:], strict=True):
        name = f"{other.run_id}: " if len(pairs) > 1 else ""
        drawn = f" (of the first of {summary.answers} answers)" if summary.distinct > 1 else ""
        tables.text(f"{name}{agreement(found)}{drawn}")
    if any(other.model_content != answers[0].model_content for other in answers):
        tables.note("note: the models differ: their tokens are compared by their texts")
    click.echo()
    if all(len(found) == 1 for _, found in pairs):
        _print_side_by_side(answers[0], [(other, found[0]) for other, found in pairs])
        return
    for other, found in pairs:
        _print_pairs(found, f"{answers[0].run_id} | {other.run_id}")


def _print_summaries(summaries: Sequence[Summary]) -> None:
    columns = ["run", "answers", "distinct", "tokens", "ends", "log-prob", "repeats", "same", "equal", "what"]
    rows = [
        [
            one.run_id, str(one.answers), f"{one.distinct:.3g}", f"{one.tokens:g}",
            ", ".join(f"{count} {reason}" for reason, count in one.finish_reasons.items()),
            figure(one.mean_log_probability, ""), figure(one.repeated_bigrams, ""),
            f"{one.exact_match:.0%}", f"{one.equal_tokens:g}", one.told,
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
    # Where there are several, each has its own place at which it leaves the first.
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
