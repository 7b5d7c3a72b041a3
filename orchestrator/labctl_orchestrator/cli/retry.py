"""labctl retry"""

from __future__ import annotations

import json

import click

from labctl_orchestrator.cli import options, submit
from labctl_orchestrator.request import settings
from labctl_orchestrator.request.request import overrides_of
from labctl_orchestrator.store import job_rows, select_runs, workspace
from labctl_orchestrator.store.collect import collect
from labctl_orchestrator.store.database import Store, open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.submission import launch, retry
from labctl_orchestrator.submission.launch import Launched, Shape
from labctl_orchestrator.submission.retry import Retry
from labctl_orchestrator.terminal import statuses, tables
from labctl_orchestrator.tracking import run_status, status
from labctl_orchestrator.tracking.run_status import RunStatus
from labctl_slurm import control, limits
from labctl_slurm.errors import EXIT_HINDERED
from labctl_slurm.partitions import Partition


@click.command("retry")
@click.argument("names", nargs=-1, metavar="[NAME|RUN|REQUEST|SLURM_ID]...")
@click.option("--failed", is_flag=True, help="Only runs that failed.")
@click.option("--timeout", is_flag=True, help="Only runs whose job met its time limit; they get twice the time.")
@click.option("--missing", is_flag=True, help="Only runs that were never queued, were refused, or that Slurm lost.")
@click.option("--all", "everything", is_flag=True, help="The holes of every request of this workspace.")
@click.option("--runs-per-job", type=click.IntRange(min=1), help="Most runs that share a job; else as then.")
@click.option("-t", "--time", help="The time limit, such as 0-01:00:00 [as then; doubled where a run met it].")
@click.option("--mem", help="Memory of the node, such as 64G [as then].")
@click.option("--dry-run", is_flag=True, help="Show what would be submitted; submit nothing.")
@click.option("--wait", is_flag=True, help="Return when every run has ended; exit code 1 if one failed.")
@options.json_option
def command(
    names: tuple[str, ...],
    failed: bool,
    timeout: bool,
    missing: bool,
    everything: bool,
    runs_per_job: int | None,
    time: str | None,
    mem: str | None,
    dry_run: bool,
    wait: bool,
    as_json: bool,
) -> int:
    """Submit the holes of a sweep again, and nothing else.

    A hole is a run without a result that none is to come of: it failed, was cancelled, met its time limit, was refused, was
    never queued, or Slurm has lost its job. Runs that are done or on their way are left alone, and so are those of which
    Slurm cannot tell now. Of the latest request, unless names are given. The partition's settings are those of now.

    \b
    labctl retry
    labctl retry --timeout sweep-3
    labctl retry --time 0-04:00:00 --mem 64G sweep-3
    """
    here = workspace.existing()
    tables.note_shared(here)
    store = open_store(here)
    learnt = statuses.refresh(here, store)
    _, run_ids = select_runs.chosen_runs(store, names, everything=everything)
    found = status.statuses(here, store, run_ids)
    kinds = [
        kind for kind, wanted in ((retry.FAILED, failed), (retry.TIMEOUT, timeout), (retry.MISSING, missing)) if wanted
    ]
    left = retry.holes(found, kinds)
    retries = retry.retries(here, store, left)
    planned = sum(len(job.runs) for each in retries for job in each.plan.jobs)
    tables.note(f"{run_status.summary(found)}; to submit again: {planned}")
    if planned < len(left):
        tables.note(
            f"not submitted, since their jobs' files are gone (labctl submit makes them again): {len(left) - planned}"
        )
    _tell_unknown(found, bool(learnt.problems))
    _release(store, [run for run in found if run.held], dry_run)
    changed = {key: value for key, value in (("time", time), ("max_time", time), ("mem", mem)) if value is not None}
    launched = [] if dry_run else _relaunched(here, store, retries, runs_per_job, changed)
    exit_code = max((submit.tell_refusals(each) for each in launched), default=0)
    exit_code = exit_code or (EXIT_HINDERED if planned < len(left) else 0)
    if wait and not dry_run:
        queued = [run_id for each in launched for run_id in each.queued_runs]
        ended = submit.waited_for(here, store, queued)
        exit_code = exit_code or ended
    chosen = [run.run_id for run in left]
    now = status.statuses(here, store, chosen)
    if as_json:
        options.print_json({"runs": [run.to_json() for run in now]})
    else:
        statuses.print_statuses(now)
    return exit_code


def _release(store: Store, held: list[RunStatus], dry_run: bool) -> None:
    """Let jobs go that Slurm holds because it could not start them: they are in the queue already."""
    jobs = list(dict.fromkeys(run.slurm_id for run in held if run.slurm_id))
    if jobs and not dry_run:
        rows = job_rows.jobs(store, "slurm_id IN (SELECT value FROM json_each(?))", (json.dumps(jobs),))
        for cluster, slurm_ids in job_rows.slurm_ids_by_cluster(rows).items():
            control.release(slurm_ids, cluster)
    if jobs:
        tables.note(
            f"held by Slurm, which could not start them, and let go again: {tables.counted(len(jobs), 'job')}, "
            f"{tables.counted(len(held), 'run')}"
        )


def _tell_unknown(found: list[RunStatus], slurm_is_silent: bool) -> None:
    unknown = sum(run.state == run_status.UNKNOWN and not run.lost for run in found)
    if unknown:
        why = "Slurm did not answer" if slurm_is_silent else "a minute has to pass before a job counts as lost"
        tables.note(f"left alone, since what became of them is not known ({why}): {unknown}")


def _relaunched(
    here: Workspace, store: Store, retries: list[Retry], runs_per_job: int | None, changed: dict[str, str]
) -> list[Launched]:
    """Submit the holes; `changed` is what their partitions' tables have now."""
    known = settings.load(here)
    launched = []
    for each in retries:
        names = dict.fromkeys(job.partition for job in each.plan.jobs)
        overrides = {**overrides_of(each.request), **changed}
        if each.at_least_s and "time" not in changed:
            overrides.pop("max_time", None)  # the time that was asked for then was too short
        partitions = {name: known.partition(name, overrides) for name in names}
        _tell_of_limits(each, partitions)
        per_job = runs_per_job or each.request.runs_per_job
        shape = Shape(partitions, per_job, each.request.jobs_at_once, each.at_least_s)
        launched.append(launch.relaunch(here, each.request_id, each.plan, shape, store))
    collect(here, store)
    return launched


def _tell_of_limits(each: Retry, partitions: dict[str, Partition]) -> None:
    """Say which runs had the longest time that there is: they meet it again unless something has changed."""
    for job in each.plan.jobs:
        longest_s = limits.time_limit_s(partitions[job.partition])
        again = [run.run_id for run in job.runs if each.before_s.get(run.run_id, 0) >= longest_s]
        if again:
            tables.note(
                f"warning: {', '.join(again)} met the longest time that {job.partition} allows ({longest_s // 60} min)"
                " and get no more; fewer repeats or fewer runs in a job (--runs-per-job) need less"
            )
