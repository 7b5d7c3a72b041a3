"""labctl query"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.exchange import query
from labctl_orchestrator.exchange.query import QueryResult
from labctl_orchestrator.exchange.streams import for_programs, write_csv
from labctl_orchestrator.store import workspace
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.store.views import TABLES, views
from labctl_orchestrator.terminal import statuses, tables
from labctl_slurm.errors import WrongUseError


@click.command("query")
@click.argument("sql", required=False, metavar="[SQL|-]")
@click.option("--describe", metavar="VIEW", help="Print the meaning and unit of each column of a view.")
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values.")
@json_option
def command(sql: str | None, describe: str | None, as_csv: bool, as_json: bool) -> None:
    """Run a read-only SQL query.

    Without SQL, lists the views and tables. SQL can be `-`: labctl then reads the statement from standard input.

    \b
    labctl query
    labctl query --describe measured_runs
    labctl query "SELECT backend, batch_size, output_tok_s FROM measured_runs ORDER BY output_tok_s DESC"
    labctl query --csv "SELECT * FROM measured_requests" > requests.csv
    """
    if as_csv and as_json:
        raise WrongUseError("--csv and --json exclude each other", "omit one of them")
    if sql is not None and describe is not None:
        raise WrongUseError("--describe and SQL exclude each other", "omit one of them")
    if sql is None:
        _describe(describe, as_csv, as_json)
        return
    here = workspace.existing()
    store = open_store(here)
    statuses.refresh(here, store)
    store.close()
    text = sys.stdin.read() if sql == "-" else sql
    if as_csv:
        with query.stream_of(here, text) as (columns, batches):
            _print_csv(columns, batches)
        return
    answer = query.query(here, text)
    if as_json:
        print_json(answer.to_json())
        return
    rows = [[query.cell(value) for value in row] for row in answer.rows]
    tables.table(answer.columns, rows, right=query.numeric(answer.columns, answer.rows))
    tables.note(tables.counted(len(rows), "row"))


def _print_csv(columns: Sequence[str], batches: Iterable[Sequence[Sequence[Any]]]) -> None:
    out = for_programs(sys.stdout)
    write_csv(out, [columns])
    for rows in batches:
        write_csv(out, rows)


def _describe(name: str | None, as_csv: bool, as_json: bool) -> None:
    if name is None:
        found = QueryResult(["name", "description"], [*((view.name, view.text) for view in views()), *TABLES.items()])
        shown: tuple[str, ...] = ("view or table", "content")
        rows = [list(row) for row in found.rows]
    else:
        columns = query.view_named(name).columns
        found = QueryResult(
            ["name", "kind", "unit", "description"], [(c.name, c.kind, c.unit, c.text) for c in columns]
        )
        shown, rows = ("column", "unit", "meaning"), [[c.name, c.unit, c.text] for c in columns]
    if as_json:
        print_json(found.to_json())
    elif as_csv:
        _print_csv(found.columns, [found.rows])
    else:
        tables.table(shown, rows)
        if name is None:
            tables.note("labctl query --describe measured_runs explains the columns of a view")
