"""labctl collect"""

from __future__ import annotations

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.store import workspace
from labctl_orchestrator.store.collect import rebuild
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.terminal import statuses, tables


@click.command("collect")
@click.option("--rebuild", "again", is_flag=True, help="Make the database again from the workspace's files.")
@json_option
def command(again: bool, as_json: bool) -> None:
    """Take new records into the database, or make it again.

    status, show and compare collect by themselves. The database is an index: with --rebuild it is made again from the
    files, and takes the old one's place when it is whole.

    \b
    labctl collect --rebuild
    """
    here = workspace.existing()
    if again:
        with tables.working("reading the workspace's files"):
            collected = rebuild(here)
    else:
        collected = statuses.refresh(here, open_store(here)).collected
    if as_json:
        print_json({"records": collected.records, "damaged": collected.damaged})
        return
    if not here.writable:
        click.echo(f"nothing is kept: {here.hindrance}")
    else:
        click.echo(f"{collected.records} records taken into {here.index}")
    if again:
        for damaged in collected.damaged:
            tables.note(f"warning: not taken, damaged: {damaged}")
