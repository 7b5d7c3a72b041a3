"""labctl export"""

from __future__ import annotations

from pathlib import Path

import click

from labctl_orchestrator.cli.as_json import json_option
from labctl_orchestrator.exchange import export, outfile
from labctl_orchestrator.store import select_runs, views, workspace
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.terminal import statuses, tables


@click.command("export")
@click.argument("names", nargs=-1, metavar="[RUN|SUBMISSION|SLURM_ID]...")
@click.option(
    "--table",
    type=click.Choice([view.table for view in views.views()]),
    default="runs",
    show_default=True,
    help="Table to export: a row per run, repeat, request, device, failure or job.",
)
@click.option(
    "-o", "--output", metavar="FILE", help="Output file: .csv, .jsonl, .json or .parquet.  [default: CSV on stdout]"
)
@click.option(
    "--format", "form", type=click.Choice(export.FORMATS), help="File format.  [default: from the suffix of FILE]"
)
@json_option
def command(names: tuple[str, ...], table: str, output: str | None, form: str | None, as_json: bool) -> None:
    """Export results as CSV, JSON, JSON lines or Parquet.

    Default: all runs of this workspace and all imported runs. labctl query --describe explains each column.

    \b
    labctl export > runs.csv
    labctl export sweep-3 --table requests -o requests.parquet
    """
    here = workspace.existing()
    if output is not None:
        outfile.checked_path(Path(output), here, f"{table}.csv")
    store = open_store(here)
    statuses.refresh(here, store)
    run_ids = select_runs.chosen_runs(store, names)[1] if names else None
    store.close()
    view = views.view_of(table)
    form = export.JSON if as_json else export.format_of(output, form)
    count = export.export(here, view, run_ids, output, form)
    if output:
        tables.note(f"wrote {count} {table} to {output}")
