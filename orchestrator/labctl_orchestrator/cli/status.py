"""labctl status"""

from __future__ import annotations

import click

from labctl_orchestrator import screen, status, workspace
from labctl_orchestrator.cli import options
from labctl_orchestrator.collect import open_store


@click.command("status")
@click.argument("names", nargs=-1, metavar="[RUN|REQUEST|NAME|SLURM_ID]...")
@click.option("--all", "everything", is_flag=True, help="Every run of this workspace.")
@options.json_option
def command(names: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Tell where each run stands, and why.

    Of the latest request, unless ids or names are given.

    \b
    labctl status
    labctl status 4242_1 --json
    """
    here = workspace.existing()
    store = open_store(here)
    screen.refresh(here, store)
    title, run_ids = status.chosen_runs(store, names, everything=everything)
    found = status.statuses(here, store, run_ids)
    if as_json:
        options.print_json([run.to_json() for run in found])
        return
    screen.note(f"{title}: {status.summary(found)}")
    screen.print_statuses(found)
