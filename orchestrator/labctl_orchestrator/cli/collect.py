"""labctl collect"""

from __future__ import annotations

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.store import workspace
from labctl_orchestrator.store.collect import rebuild
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.terminal import statuses, tables


@click.command("collect")
@click.option("--rebuild", "again", is_flag=True, help="Rebuild the database from the workspace's files.")
@json_option
def command(again: bool, as_json: bool) -> None:
    """Update or rebuild the database from the records.

    Rarely needed: labctl status, show and compare update the database too. Only a record that you edited by hand needs labctl
    collect. The records are files; the database is an index of them. --rebuild replaces it with a new one.

    \b
    labctl collect --rebuild
    """
    here = workspace.existing()
    if again:
        with tables.working("reading the workspace's files"):
            collected = rebuild(here)
    else:
        collected = statuses.refresh(here, open_store(here), every_file=True).collected
    if as_json:
        print_json({"records": collected.records, "damaged": collected.damaged})
        return
    if not here.writable:
        click.echo(f"database not updated: {here.read_only_reason}")
    else:
        click.echo(f"{collected.records} records added to {here.index}")
    if again:
        for damaged in collected.damaged:
            tables.note(f"warning: file skipped: {damaged}")
