"""labctl status"""

from __future__ import annotations

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.store import select_runs, workspace
from labctl_orchestrator.store.collect import collect
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.terminal import statuses, tables
from labctl_orchestrator.tracking import run_status, status
from labctl_slurm.errors import WrongUseError


@click.command("status")
@click.argument("names", nargs=-1, metavar="[RUN|SUBMISSION|SLURM_ID]...")
@click.option("--all", "everything", is_flag=True, help="Runs of all submissions of this workspace.")
@click.option(
    "--every-run", is_flag=True, help=f"Print a line per run, even for more than {statuses.RUNS_LISTED} runs."
)
@click.option("-w", "--watch", "live", is_flag=True, help="Update the screen until every run has ended.")
@json_option
def command(names: tuple[str, ...], everything: bool, every_run: bool, live: bool, as_json: bool) -> None:
    """Show the state of each run, and why it waits or failed.

    Default: the latest submission. For more than 100 runs, prints the number of runs in each state and the first failures.

    \b
    labctl status
    labctl status 4242_1 --json
    labctl status -w sweep-3
    """
    if live and as_json:
        raise WrongUseError("--watch and --json exclude each other", "omit one of them")
    here = workspace.existing()
    store = open_store(here)
    if live:
        collect(here, store)  # without Slurm: the watching thread asks it
        title, run_ids = select_runs.chosen_runs(store, names, everything=everything)
        _watch(here, run_ids, title)
        return
    title, run_ids = statuses.refresh_chosen(here, store, names, everything=everything)
    if len(run_ids) > statuses.RUNS_LISTED and not (every_run or as_json):
        counts, left = status.overview(here, store, run_ids)
        tables.note(f"{title}: {run_status.summary_of(counts)}")
        statuses.print_overview(counts, left)
        return
    found = status.statuses(here, store, run_ids)
    if as_json:
        print_json([run.to_json() for run in found])
        return
    tables.note(f"{title}: {run_status.summary(found)}")
    statuses.print_statuses(found)


def _watch(here: Workspace, run_ids: list[str], title: str) -> None:
    from labctl_orchestrator.terminal import watch

    ended = watch.watch(here, run_ids, title)
    for remedy in dict.fromkeys(run.remedy for run in ended if run.remedy):
        tables.note(f"  -> {remedy}")
