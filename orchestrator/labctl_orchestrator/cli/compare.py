"""labctl compare"""

from __future__ import annotations

import csv
import sys

import click

from labctl_orchestrator import compare, measured, question, screen, settings, status, texts, verdicts, workspace
from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.collect import open_store
from labctl_orchestrator.compare import Block, Comparison, Row
from labctl_orchestrator.cost import Price, prices
from labctl_orchestrator.metrics import ALL_METRICS, COST_METRICS
from labctl_orchestrator.question import Question
from labctl_orchestrator.store import Store
from labctl_orchestrator.texts import Answers, Pair
from labctl_orchestrator.workspace import Workspace
from labctl_slurm.errors import WrongUseError

TEXT_SHOWN = 240
# More rows than these nobody reads as sentences: they are in the table.
SENTENCES_SHOWN = 16


@click.command("compare")
@click.argument("names", nargs=-1, metavar="[RUN|REQUEST|NAME|SLURM_ID]...")
@click.option(
    "--by",
    multiple=True,
    metavar="AXIS",
    help="Compare along this axis: backend, dtype, batch_size, name, an engine option ... Two (--by backend --by batch_size)"
    " compare the first at each value of the second.  [default: every axis that varies]",
)
@click.option(
    "--baseline", metavar="VALUE", help="What the ratios are to, such as hf or backend=hf.  [default: the first row]"
)
@click.option("--metric", "metrics", multiple=True, help=f"What to compare: {', '.join(ALL_METRICS)}.")
@click.option(
    "--where",
    "conditions",
    multiple=True,
    metavar="CONDITION",
    help="Only runs like this: dtype=float16, 'batch_size>=8', mode!=eager, 'backend in hf,vllm'. May be repeated.",
)
@click.option("--cost", "of_cost", is_flag=True, help=f"Short for --metric {' --metric '.join(COST_METRICS)}.")
@click.option("--text", "as_text", is_flag=True, help="The answers of two runs, and where they first differ.")
@click.option("--all", "everything", is_flag=True, help="Every run of this workspace, imported ones too.")
@click.option("--csv", "form", flag_value="csv", help="Print comma-separated values, in plain units.")
@click.option("--markdown", "form", flag_value="markdown", help="Print Markdown tables.")
@json_option
def command(
    names: tuple[str, ...],
    by: tuple[str, ...],
    baseline: str | None,
    metrics: tuple[str, ...],
    conditions: tuple[str, ...],
    of_cost: bool,
    as_text: bool,
    everything: bool,
    form: str | None,
    as_json: bool,
) -> None:
    """Compare what was measured.

    Of the latest request, unless ids or names are given. Medians over the repeats, with the lowest and the highest; the
    ratio to the baseline has a 95% interval, and each row a verdict: "no difference that these repeats can show" is one. Rows
    that differ on more than the compared axis are shown apart, or with a warning.

    \b
    labctl compare
    labctl compare --by dtype --metric output_tok_s
    labctl compare --by backend --by batch_size --baseline hf
    labctl compare --all --where partition=dgxh --where 'batch_size>=8' --csv
    labctl compare --text 3f9a12 77ac01
    """
    asked = Question.of(by, (*metrics, *(COST_METRICS if of_cost else ())), conditions, baseline)
    here = workspace.existing()
    store = open_store(here)
    screen.refresh(here, store)
    title, run_ids = status.chosen_runs(store, names, everything=everything, imported=True)
    if as_text:
        _compare_texts(here, store, title, measured.measured(store, run_ids), as_json)
        return
    if not run_ids:
        raise WrongUseError("nothing was submitted in this workspace yet", "labctl submit --help shows how")
    known_prices = _prices(here, store) if asked.needs_prices else {}
    have = set(measured.measured(store, run_ids))
    without = [run_id for run_id in run_ids if run_id not in have]
    missing = status.statuses(here, store, without) if without else []
    cells = question.cells_of(store, run_ids, asked, known_prices)
    if not cells:
        first = missing[0]
        raise WrongUseError(
            f"{title}: none of {len(missing)} runs has a result yet",
            f"{first.run_id} is {first.state}; labctl status tells more, labctl compare --all shows what was measured before",
        )
    answer = question.answer(cells, asked)
    answer.warnings += [f"no result of {run.run_id}: {run.state} {run.detail}".rstrip() for run in missing]
    if asked.needs_prices and not known_prices:
        answer.notes.append('no partition has a price: set price_per_gpu_hour = "2.50 EUR" in labctl.toml')
    if as_json:
        print_json(answer.to_json())
        return
    if form == "csv":
        _print_csv(answer)
    for block in answer.blocks if form != "csv" else ():
        _print_block(answer, block, form)
    if form is None:
        _print_verdicts(answer)
        _print_texts(answer)
    for warning in answer.warnings:
        screen.note(f"warning: {warning}")
    for remark in answer.notes:
        screen.note(f"note: {remark}")


def _prices(here: Workspace, store: Store) -> dict[str, Price]:
    partitions = [partition for (partition,) in store.tuples("SELECT DISTINCT partition FROM runs")]
    return prices(settings.load(here), partitions)


CSV_OF_A_ROW = ("median", "low", "high", "spread", "n", "n_of", "ratio", "difference")


def _print_csv(answer: Comparison) -> None:
    """One line a row and metric, values in the metric's own unit."""
    fixed = list(dict.fromkeys(axis for block in answer.blocks for axis in block.fixed))
    out = csv.writer(sys.stdout, lineterminator="\n")
    figures = ("median", "lowest", "highest", "spread", "n", "n_of", "ratio", "difference")
    interval = ("interval_low", "interval_high", "verdict")
    out.writerow(["metric", "unit", *fixed, *answer.by, *figures, *interval, "run_id"])
    for block in answer.blocks:
        for row in block.rows:
            at = [*(block.fixed.get(axis) for axis in fixed), *(row.at[axis] for axis in answer.by)]
            values = [getattr(row, name) for name in CSV_OF_A_ROW]
            bounds = row.ratio_interval or row.difference_interval or (None, None)
            out.writerow([block.metric, block.unit, *at, *values, *bounds, row.verdict.kind, row.run_id])


def _print_block(answer: Comparison, block: Block, form: str | None) -> None:
    better = f", {block.better} is better" if block.better else ""
    fixed = "".join(f", {axis} {value}" for axis, value in block.fixed.items())
    columns = [*answer.by, "median", "lowest", "highest", "n", "ratio", "run"]
    rows = []
    for row in block.rows:
        spread = [screen.figure(value, block.unit) for value in (row.median, row.low, row.high)]
        count = f"{row.n} loads" if row.n_of == compare.LOADS else str(row.n)
        rows.append([*(str(row.at[axis]) for axis in answer.by), *spread, count, _ratio(row, block.unit), row.run_id])
    title = f"{block.title}{better}{fixed}"
    if form == "markdown":
        screen.markdown(columns, rows, right=columns[len(answer.by) : -1], title=title)
    else:
        screen.table(columns, rows, right=columns[len(answer.by) : -1], title=title)
    click.echo()


def _ratio(row: Row, unit: str) -> str:
    """ "13.2x (12.8-13.5)"; a difference where a ratio means nothing."""
    if row.ratio is not None:
        return verdicts.ratio_with_interval(row.ratio, row.ratio_interval)
    if row.difference is not None and not row.is_baseline:
        return verdicts.signed(row.difference, unit)
    return "-"


def _print_verdicts(answer: Comparison) -> None:
    found = answer.verdicts
    if not found:
        return
    for sentence in found[:SENTENCES_SHOWN]:
        screen.text(sentence)
    if len(found) > SENTENCES_SHOWN:
        screen.text(
            f"... and {len(found) - SENTENCES_SHOWN} more: --json has all; --where, --metric and --by ask for fewer"
        )
    click.echo()


def _print_texts(answer: Comparison) -> None:
    rows = {row.run_id: (row, {**row.at, **block.fixed}) for block in answer.blocks for row in block.rows}
    for row, axes in rows.values():
        at = ", ".join(f"{axis} {value}" for axis, value in axes.items()) or row.run_id
        text = " ".join(row.text.split())
        screen.text(f"text, {at}: {text[:TEXT_SHOWN]}{'…' if len(text) > TEXT_SHOWN else ''}")


# ---------------------------------------------------------------- --text


def _compare_texts(here: Workspace, store: Store, title: str, run_ids: list[str], as_json: bool) -> None:
    if len(run_ids) != 2:
        found = f"{title} has {len(run_ids)}" if title else f"{len(run_ids)} were named"
        raise WrongUseError(f"--text compares two measured runs, {found}", "labctl compare --text RUN RUN")
    first, second = (texts.answers(here, store, run_id) for run_id in run_ids)
    found_pairs = texts.pairs(first, second)
    if as_json:
        print_json({"runs": run_ids, "pairs": [pair.to_json() for pair in found_pairs]})
        return
    for name, answers in (("first", first), ("second", second)):
        screen.field(name, f"{answers.run_id}  {answers.told}")
    screen.field("answers", texts.summary(found_pairs))
    if first.model_content != second.model_content:
        screen.note("note: the models differ: their tokens are compared by their texts")
    click.echo()
    if len(found_pairs) == 1:
        _print_side_by_side(first, second, found_pairs[0])
    else:
        _print_pairs(found_pairs)


def _print_side_by_side(first: Answers, second: Answers, pair: Pair) -> None:
    if not pair.same:
        click.echo(f"token {pair.equal_tokens + 1}: {_token(pair.first)} | {_token(pair.second)}\n")
    sides = ((first.run_id, pair.first), (second.run_id, pair.second))
    screen.side_by_side(
        [(f"{run_id}: {side.tokens} tokens, {side.finish_reason}", side.text, side.mark) for run_id, side in sides]
    )


def _print_pairs(found: list[Pair]) -> None:
    columns = ("prompt", "tokens", "equal", "first difference", "text")
    rows = []
    for number, pair in enumerate(found, 1):
        apart = "" if pair.same else f"{_token(pair.first)} | {_token(pair.second)}"
        tokens = (
            str(pair.first.tokens)
            if pair.first.tokens == pair.second.tokens
            else f"{pair.first.tokens} | {pair.second.tokens}"
        )
        shown = " ".join(pair.prompt.split())
        rows.append([str(number), tokens, "all" if pair.same else str(pair.equal_tokens), apart, shown[:60]])
    screen.table(columns, rows, right=("prompt", "tokens", "equal"))


def _token(side: texts.Side) -> str:
    return "(end)" if side.token_id is None else f"{side.token!r} ({side.token_id})"
