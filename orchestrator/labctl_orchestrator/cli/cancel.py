"""labctl cancel"""

from __future__ import annotations

import sys

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.store import select_runs, workspace
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.submission import cancel
from labctl_orchestrator.terminal import statuses, tables
from labctl_orchestrator.terminal.tables import counted
from labctl_orchestrator.tracking import run_status, status
from labctl_slurm.errors import WrongUseError


@click.command("cancel")
@click.argument("names", nargs=-1, metavar="[NAME|RUN|REQUEST|SLURM_ID]...")
@click.option("--all", "everything", is_flag=True, help="Every run of this workspace that has not ended.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
def command(names: tuple[str, ...], everything: bool, yes: bool, as_json: bool) -> int:
    """Cancel the jobs of runs that have not ended.

    Of the latest request, unless names are given. Runs that share a job share its engine: cancelling one of them cancels the
    others, and says so before. What was measured stays; labctl retry submits the rest again.

    \b
    labctl cancel sweep-3
    labctl cancel 3f9a12 --yes
    """
    here = workspace.existing()
    store = open_store(here)
    statuses.refresh(here, store)
    title, run_ids = select_runs.chosen_runs(store, names, everything=everything)
    plan = cancel.planned(store, status.statuses(here, store, run_ids))
    if plan.ended:
        tables.note(f"ended already: {run_status.summary(plan.ended)}")
    if plan.submitting:
        tables.note(f"being submitted now: {counted(len(plan.submitting), 'run')}; cancel again in a moment")
    jobs = f"{counted(len(plan.jobs), 'job')} with {counted(len(plan.runs) + len(plan.beside), 'run')}"
    if not plan.jobs:
        tables.note(f"{title}: there is no job to cancel")
    else:
        if plan.beside:
            tables.note(f"{len(plan.beside)} more runs share these jobs and are cancelled with them")
        if not yes and not sys.stdin.isatty():
            raise WrongUseError(f"{jobs} would be cancelled, and nobody is there to ask", "give --yes")
        if not yes:
            click.confirm(f"Cancel {jobs}?", abort=True, err=True)
        cancel.carry_out(here, store, plan)
        statuses.refresh(here, store)
    now = status.statuses(here, store, [*(run.run_id for run in plan.runs), *plan.beside])
    if as_json:
        print_json({"jobs": [job.slurm_id for job in plan.jobs], "runs": [run.to_json() for run in now]})
    elif plan.jobs:
        tables.note(f"cancelled {jobs}; so far {run_status.summary(now)}")
    return 0
