"""labctl cancel"""

from __future__ import annotations

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.store import select_runs, workspace
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.submission import cancel
from labctl_orchestrator.terminal import statuses, tables
from labctl_orchestrator.terminal.messages import confirm
from labctl_orchestrator.terminal.tables import counted
from labctl_orchestrator.tracking import run_status, status


@click.command("cancel")
@click.argument("names", nargs=-1, metavar="[RUN|SUBMISSION|SLURM_ID]...")
@click.option("--all", "everything", is_flag=True, help="Unfinished runs of all submissions of this workspace.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
def command(names: tuple[str, ...], everything: bool, yes: bool, as_json: bool) -> int:
    """Cancel the jobs of unfinished runs.

    Default: the latest submission. Other runs in the same jobs are cancelled too: labctl prints their number. Asks first,
    except with --yes. Keeps all results. labctl retry resubmits cancelled runs.

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
        tables.note(f"already ended: {run_status.summary(plan.ended)}")
    if plan.submitting:
        tables.note(f"still being submitted: {counted(len(plan.submitting), 'run')}; repeat the command in a moment")
    jobs = f"{counted(len(plan.jobs), 'job')} with {counted(len(plan.runs) + len(plan.beside), 'run')}"
    if not plan.jobs:
        tables.note(f"{title}: no job to cancel")
    else:
        if plan.beside:
            tables.note(f"these jobs also contain {counted(len(plan.beside), 'other run')}, cancelled with them")
        if not yes:
            confirm(f"Cancel {jobs}")
        cancel.carry_out(here, store, plan)
        statuses.refresh(here, store)
    now = status.statuses(here, store, [*(run.run_id for run in plan.runs), *plan.beside])
    if as_json:
        print_json({"jobs": [job.slurm_id for job in plan.jobs], "runs": [run.to_json() for run in now]})
    elif plan.jobs:
        left = sum(run.may_come for run in now)
        tables.note(f"cancelled {jobs}" + (f"; {counted(left, 'run')} will end soon: labctl status" if left else ""))
    return 0
