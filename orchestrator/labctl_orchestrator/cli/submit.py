"""labctl submit"""

from __future__ import annotations

from typing import Any

import click

from labctl_orchestrator import launch, measured, screen, status
from labctl_orchestrator.cli import fail, options
from labctl_orchestrator.collect import collect, open_store
from labctl_orchestrator.launch import Batch, Launched
from labctl_orchestrator.store import Store
from labctl_orchestrator.workspace import Workspace

EXIT_A_RUN_FAILED = 1


@click.command("submit")
@options.request_options
@click.option("--again", is_flag=True, help="Measure runs that have a result, too.")
@click.option("--wait", is_flag=True, help="Return when every run has ended; exit code 1 if one failed.")
@click.option("--dry-run", is_flag=True, help="Show the runs, jobs and scripts; submit nothing, write nothing.")
@options.json_option
def command(file: str | None, again: bool, wait: bool, dry_run: bool, as_json: bool, **flags: Any) -> int:
    """Ask a question: plan its runs and submit their jobs.

    What may be repeated multiplies. Runs that can share an engine load share a job. Returns at once; labctl status tells
    how far the jobs are. A request file has the same keys as the flags (docs/requests.md); flags beat it.

    \b
    labctl submit -p dgxh                           TinyLlama, 128 new tokens
    labctl submit -p dgx2 -p dgxh --dtype float16   one run on each partition
    labctl submit -p dgxh --max-tokens 128 --max-tokens 256     two, one load
    labctl submit sweep.toml --dry-run              what a file asks for
    """
    asked = options.asked(file, **flags)
    if dry_run:
        return _dry_run(asked, again, as_json)
    launch.planned(asked.workspace, asked.plan, asked.partitions)  # a script that does not render is told first
    screen.note_new(asked.workspace)
    asked.workspace.create()
    store = open_store(asked.workspace)
    run_ids = [run.run_id for run in asked.plan.runs]
    screen.refresh(asked.workspace, store)
    skipped = [] if again else measured.measured(store, run_ids)
    left = [run_id for run_id in run_ids if run_id not in set(skipped)]
    on_their_way = [] if again else _on_their_way(asked.workspace, store, left)
    batches = launch.prepare(asked.workspace, asked.plan.without({*skipped, *on_their_way}), asked.partitions)
    launched = launch.launch(asked.workspace, asked.request, asked.plan, batches, skipped)
    collect(asked.workspace, store)
    _tell_skipped(store, launched.skipped, len(launched.run_ids))
    exit_code = _tell_refusals(launched)
    if wait:
        runs = [run_id for run_id in launched.run_ids if run_id in launched.ids or run_id in on_their_way]
        ended = _waited(asked.workspace, store, runs)
        exit_code = exit_code or (EXIT_A_RUN_FAILED if ended != {status.DONE} and runs else 0)
    found = status.statuses(asked.workspace, store, launched.run_ids)
    if as_json:
        options.print_json({"request_id": launched.request_id, "runs": [run.to_json() for run in found]})
    else:
        screen.print_statuses(found)
        if not wait and launched.ids:
            screen.note("labctl status tells how far they are; labctl compare shows what they measured")
    return exit_code


def _on_their_way(workspace: Workspace, store: Store, run_ids: list[str]) -> list[str]:
    """Those of the runs that a job waits for or runs already: they are not queued twice."""
    found = status.statuses(workspace, store, run_ids) if run_ids else []
    known = [run for run in found if run.state in (status.PENDING, status.RUNNING, status.SUBMITTING)]
    for run in known:
        screen.note(
            f"{run.run_id} is {run.state} already, as job {run.slurm_id}, and is not queued again (--again queues it)"
        )
    return [run.run_id for run in known]


def _waited(workspace: Workspace, store: Store, run_ids: list[str]) -> set[str]:
    try:
        return status.wait(workspace, store, run_ids)
    except KeyboardInterrupt:
        screen.note("the jobs go on: labctl status tells how far they are")
        raise


def _tell_skipped(store: Store, skipped: list[str], total: int) -> None:
    if skipped:
        said = f"{len(skipped)} of {total} runs were measured already and are not run again"
        screen.note(f"{said} (--again measures them again)")
        for line in measured.told_of(store, skipped):
            screen.note(f"  {line}")


def _tell_refusals(launched: Launched) -> int:
    codes = [fail(refusal.message, refusal.remedy, refusal.exit_code) for refusal in launched.refusals]
    return max(codes, default=0)


# ---------------------------------------------------------------- --dry-run


def _dry_run(asked: options.Asked, again: bool, as_json: bool) -> int:
    run_ids = [run.run_id for run in asked.plan.runs]
    skipped: list[str] = []
    if asked.workspace.database.is_file() and not again:  # the index as it is: a dry run takes nothing in
        store = open_store(asked.workspace)
        skipped = measured.measured(store, run_ids)
        _tell_skipped(store, skipped, len(run_ids))
    batches = launch.planned(asked.workspace, asked.plan.without(set(skipped)), asked.partitions)
    if as_json:
        options.print_json([_batch_json(batch) for batch in batches])
        return 0
    for batch in batches:
        runs = sum(len(job.runs) for job in batch.jobs)
        click.echo(f"# partition {batch.script.partition.name}: {len(batch.jobs)} jobs (engine loads), {runs} runs")
        for job in batch.jobs:
            for run in job.runs:
                click.echo(f"#   {run.run_id}  {job.backend} {job.model.name} {job.dtype} {run.max_new_tokens} tokens")
        if batch.script.partition.executor == "slurm":
            click.echo(batch.text_by_hand())
    return 0


def _batch_json(batch: Batch) -> dict[str, Any]:
    script = batch.text_by_hand() if batch.script.partition.executor == "slurm" else None
    return {
        "partition": batch.script.partition.name,
        "script": script,
        "jobs": [job.to_json() for job in batch.jobs],
    }
