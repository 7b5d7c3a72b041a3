"""labctl compare"""

from __future__ import annotations

import csv
import sys

import click

from labctl_orchestrator import compare, measured, screen, status, workspace
from labctl_orchestrator.cli import options
from labctl_orchestrator.collect import open_store
from labctl_orchestrator.compare import ALL_METRICS, Block, Comparison
from labctl_slurm.errors import WrongUseError

TEXT_SHOWN = 240


@click.command("compare")
@click.argument("names", nargs=-1, metavar="[RUN|REQUEST|NAME|SLURM_ID]...")
@click.option(
    "--by",
    multiple=True,
    help="The axis to compare along, such as backend; may be repeated.  [default: every axis that varies]",
)
@click.option("--metric", "metrics", multiple=True, help=f"What to compare: {', '.join(ALL_METRICS)}.")
@click.option(
    "--where", "conditions", multiple=True, metavar="AXIS=VALUE", help="Only runs like this. May be repeated."
)
@click.option("--all", "everything", is_flag=True, help="Every run of this workspace.")
@click.option("--csv", "form", flag_value="csv", help="Print comma-separated values, in plain units.")
@click.option("--markdown", "form", flag_value="markdown", help="Print Markdown tables.")
@options.json_option
def command(
    names: tuple[str, ...],
    by: tuple[str, ...],
    metrics: tuple[str, ...],
    conditions: tuple[str, ...],
    everything: bool,
    form: str | None,
    as_json: bool,
) -> None:
    """Compare what was measured.

    Of the latest request, unless ids or names are given. Medians over the repeats, with the lowest and the highest; the
    ratio is to the first row. Rows that differ on more than the compared axis are shown apart, or with a warning.

    \b
    labctl compare
    labctl compare --by dtype --metric output_tok_s
    labctl compare --all --where partition=dgxh --csv
    """
    compare.check_axes(by)
    compare.check_metrics(metrics)
    here = workspace.existing()
    store = open_store(here)
    screen.refresh(here, store)
    title, run_ids = status.chosen_runs(store, names, everything=everything)
    cells = measured.cells(store, run_ids)
    missing = [
        run for run in status.statuses(here, store, run_ids) if run.run_id not in {cell.run_id for cell in cells}
    ]
    if not run_ids:
        raise WrongUseError("nothing was submitted in this workspace yet", "labctl submit --help shows how")
    if not cells:
        first = missing[0]
        raise WrongUseError(
            f"{title}: none of {len(missing)} runs has a result yet",
            f"{first.run_id} is {first.state}; labctl status tells more, labctl compare --all shows what was measured before",
        )
    cells = compare.where(cells, conditions)
    if not cells:
        raise WrongUseError(
            f"{title}: no measured run is like {', '.join(conditions)}", "labctl show RUN tells its axes"
        )
    shown = metrics or tuple(m for m in compare.DEFAULT_METRICS if any(cell.values[m] for cell in cells))
    answer = compare.compare(cells, by, shown)
    answer.warnings += [f"no result of {run.run_id}: {run.state} {run.detail}".rstrip() for run in missing]
    if as_json:
        options.print_json(answer.to_json())
        return
    if form == "csv":
        _print_csv(answer)
    for block in answer.blocks if form != "csv" else ():
        _print_block(answer, block, form)
    if form is None:
        _print_texts(answer)
    for warning in answer.warnings:
        screen.note(f"warning: {warning}")
    for remark in answer.notes:
        screen.note(f"note: {remark}")


def _print_csv(answer: Comparison) -> None:
    """One line a row and metric, values in the metric's own unit."""
    fixed = list(dict.fromkeys(axis for block in answer.blocks for axis in block.fixed))
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["metric", "unit", *fixed, *answer.by, "median", "lowest", "highest", "n", "ratio", "run_id"])
    for block in answer.blocks:
        for row in block.rows:
            at = [*(block.fixed.get(axis) for axis in fixed), *(row.at[axis] for axis in answer.by)]
            values = [row.median, row.low, row.high, row.n, row.ratio, row.run_id]
            out.writerow([block.metric, ALL_METRICS[block.metric].unit, *at, *values])


def _print_block(answer: Comparison, block: Block, form: str | None) -> None:
    metric = ALL_METRICS[block.metric]
    better = f", {metric.better} is better" if metric.better else ""
    fixed = "".join(f", {axis} {value}" for axis, value in block.fixed.items())
    columns = [*answer.by, "median", "lowest", "highest", "n", "ratio", "run"]
    rows = []
    for row in block.rows:
        spread = [screen.figure(value, metric.unit) for value in (row.median, row.low, row.high)]
        ratio = "-" if row.ratio is None else f"{row.ratio:.3g}x"
        rows.append([*(str(row.at[axis]) for axis in answer.by), *spread, str(row.n), ratio, row.run_id])
    title = f"{metric.title}{better}{fixed}"
    if form == "markdown":
        screen.markdown(columns, rows, right=columns[len(answer.by) : -1], title=title)
    else:
        screen.table(columns, rows, right=columns[len(answer.by) : -1], title=title)
    click.echo()


def _print_texts(answer: Comparison) -> None:
    rows = {row.run_id: (row, {**row.at, **block.fixed}) for block in answer.blocks for row in block.rows}
    for row, axes in rows.values():
        at = ", ".join(f"{axis} {value}" for axis, value in axes.items()) or row.run_id
        text = " ".join(row.text.split())
        screen.text(f"text, {at}: {text[:TEXT_SHOWN]}{'…' if len(text) > TEXT_SHOWN else ''}")
