"""labctl retry"""

from __future__ import annotations

import click

from labctl_orchestrator.cli import submit
from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.store import select_runs, workspace
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.submission import retry
from labctl_orchestrator.submission.launch import Launched
from labctl_orchestrator.terminal import statuses, tables
from labctl_orchestrator.terminal.tables import counted
from labctl_orchestrator.tracking import run_status, status
from labctl_slurm.errors import EXIT_HINDERED


@click.command("retry")
@click.argument("names", nargs=-1, metavar="[RUN|SUBMISSION|SLURM_ID]...")
@click.option("--failed", is_flag=True, help="Only failed runs.")
@click.option("--timeout", is_flag=True, help="Only runs that reached the time limit; doubles it.")
@click.option("--missing", is_flag=True, help="Only runs that were never queued, or whose job Slurm refused or lost.")
@click.option(
    "--invalid",
    is_flag=True,
    help="Only runs with a doubtful result: with a mark, such as noisy (docs/trust.md).",
)
@click.option("--all", "everything", is_flag=True, help="Runs of all submissions of this workspace.")
@click.option(
    "--runs-per-job", type=click.IntRange(min=1), help="Maximum number of runs per job.  [default: as before]"
)
@click.option(
    "-t", "--time", help="Time limit, such as 0-01:00:00.  [default: the submission's, doubled after a timeout]"
)
@click.option("--mem", help="Memory per node, such as 64G.  [default: the submission's]")
@click.option("--dry-run", is_flag=True, help="Show the runs; submit nothing.")
@click.option("--wait", is_flag=True, help="Return when every run has ended; exit code 1 if a run failed.")
@json_option
def command(
    names: tuple[str, ...],
    failed: bool,
    timeout: bool,
    missing: bool,
    invalid: bool,
    everything: bool,
    runs_per_job: int | None,
    time: str | None,
    mem: str | None,
    dry_run: bool,
    wait: bool,
    as_json: bool,
) -> int:
    """Resubmit missing and failed runs.

    Default: the latest submission. Resubmits runs that failed, were cancelled, reached the time limit or were never queued,
    and runs whose job Slurm refused or lost. Skips queued and running runs, and runs in state unknown, whose result may still
    come. The new jobs have the current settings of the partition, and the submission's own Slurm options. --invalid measures
    doubtful results again.

    \b
    labctl retry
    labctl retry --timeout sweep-3
    labctl retry --invalid --dry-run
    labctl retry --time 0-04:00:00 --mem 64G sweep-3
    """
    here = workspace.existing()
    tables.note_shared(here)
    store = open_store(here)
    learnt = statuses.refresh(here, store)
    _, run_ids = select_runs.chosen_runs(store, names, everything=everything)
    found = status.statuses(here, store, run_ids)
    kinds = {retry.FAILED: failed, retry.TIMEOUT: timeout, retry.MISSING: missing}
    chosen = [kind for kind, wanted in kinds.items() if wanted]
    left = retry.without_result(found, chosen) if chosen or not invalid else []
    again = retry.invalid(store, run_ids) if invalid else {}
    left += [run for run in found if run.run_id in again and run.state == run_status.DONE and not run.may_come]
    retries = retry.retries(here, store, left, again)
    planned = sum(len(job.runs) for each in retries for job in each.plan.jobs)
    tables.note(f"{run_status.summary(found)}; to resubmit: {planned}")
    if planned < len(left):
        tables.note(
            f"not resubmitted, job files missing: {counted(len(left) - planned, 'run')}; use labctl submit for these"
        )
    newer = sum(run.kind == run_status.NEWER_RECORD for run in found)
    if newer:
        tables.note(f"not resubmitted, record written by a newer labctl: {counted(newer, 'run')}")
    unknown = sum(run.state == run_status.UNKNOWN for run in found) - newer
    if unknown:
        why = "Slurm did not answer" if learnt.problems else "labctl waits a minute before it calls a job lost"
        tables.note(f"not resubmitted, state unknown: {counted(unknown, 'run')} ({why})")
    held = [run for run in found if run.held and run.slurm_id]
    changed = {key: value for key, value in (("time", time), ("max_time", time), ("mem", mem)) if value is not None}
    launched: list[Launched] = []
    if not dry_run:
        retry.release(store, held)
        launched, warnings = retry.submit(here, store, retries, runs_per_job, changed)
        for warning in warnings:
            tables.note(f"warning: {warning}")
    if held:
        jobs = counted(len({run.slurm_id for run in held}), "job")
        tables.note(f"released {jobs} that Slurm held after a failed start: {counted(len(held), 'run')}")
    exit_code = max((submit.report_refusals(each) for each in launched), default=0)
    exit_code = exit_code or (EXIT_HINDERED if planned < len(left) else 0)
    if wait:
        ended = submit.wait_for(here, store, [run_id for each in launched for run_id in each.queued_runs])
        exit_code = exit_code or ended
    now = status.statuses(here, store, [run.run_id for run in left])
    if as_json:
        print_json({"runs": [run.to_json() for run in now]})
    else:
        statuses.print_runs(now)
    return exit_code
