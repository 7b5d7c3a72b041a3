"""labctl submit"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from labctl_orchestrator.analysis import cells
from labctl_orchestrator.cli import fail, options
from labctl_orchestrator.preflight import run_checks
from labctl_orchestrator.preflight.finding import Finding, Subject
from labctl_orchestrator.request.packing import Paces, expected_s
from labctl_orchestrator.store import collect
from labctl_orchestrator.store.database import Store, open_store
from labctl_orchestrator.store.take_files import sampling_label
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.submission import launch
from labctl_orchestrator.submission.launch import Batch, Launched
from labctl_orchestrator.submission.measured_pace import stored_paces
from labctl_orchestrator.terminal import statuses, tables
from labctl_orchestrator.tracking import run_status, status, wait
from labctl_orchestrator.tracking.run_status import RunStatus
from labctl_slurm.errors import EXIT_REFUSED_BY_PREFLIGHT
from labctl_workers.record import JobSpec, RunSpec, ScriptSettings

EXIT_A_RUN_FAILED = 1
NOTICE_S = 90  # before the time limit Slurm sends USR2 (the template's --signal), or up to a minute earlier


@click.command("submit")
@options.request_options
@click.option("--again", is_flag=True, help="Measure anew, also what has a result or is on its way.")
@click.option("--wait", is_flag=True, help="Return when every run has ended; exit code 1 if one failed.")
@click.option("--dry-run", is_flag=True, help="Show the runs, jobs and scripts; submit nothing, write nothing.")
@click.option(
    "--no-preflight",
    is_flag=True,
    envvar="LABCTL_NO_PREFLIGHT",
    help="Submit without looking first at what would fail.",
)
@click.option(
    "--force", is_flag=True, help="Submit what preflight holds to be impossible, such as a model that does not fit."
)
@options.json_option
def command(
    file: str | None,
    again: bool,
    wait: bool,
    dry_run: bool,
    no_preflight: bool,
    force: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    """Ask a question: plan its runs and submit their jobs.

    What may be repeated multiplies. Runs that can share an engine load share a job. Returns at once; labctl status tells
    how far the jobs are. A request file has the same keys as the flags (docs/requests.md); flags beat it.

    What would fail after hours in the queue is said before it: exit code 3, and nothing is submitted or written.

    \b
    labctl submit -p dgxh                           TinyLlama, 128 new tokens
    labctl submit -p dgx2 -p dgxh --dtype float16   one run on each partition
    labctl submit -p dgxh --max-tokens 128 --max-tokens 256     two, one load
    labctl submit sweep.toml --dry-run              what a file asks for
    """
    asked = options.asked(file, **flags)
    # A script that does not render is told before anything is written.
    batches = launch.planned(asked.workspace, asked.plan, asked.shape, lambda job: None)
    scripts = _scripts(batches)
    _tell_idle_rules(asked)
    _tell_short_limits(batches, stored_paces(asked.workspace))
    found = [] if no_preflight else run_checks.findings(_subject(asked, again))
    refused = _tell_findings(found, force=force)
    if dry_run:
        return _dry_run(asked, again, as_json, scripts) or refused
    if refused:
        if as_json:
            options.print_json({"request_id": None, "runs": [], "findings": [asdict(finding) for finding in found]})
        return refused
    tables.note_new(asked.workspace)
    asked.workspace.create()
    store = open_store(asked.workspace)
    statuses.refresh(asked.workspace, store, [run.run_id for run in asked.plan.runs])
    launched = launch.launch(asked.workspace, asked.request, asked.plan, asked.shape, again, store)
    collect.collect_of(asked.workspace, store, launched.run_ids)
    _tell_skipped(store, launched.skipped, len(launched.run_ids), asked.request.loads, scripts)
    _tell_on_their_way(launched.on_their_way)
    _tell_queued(launched)
    exit_code = tell_refusals(launched)
    if wait:
        known = {*launched.queued_runs, *(run.run_id for run in launched.on_their_way)}
        ended = waited_for(asked.workspace, store, [run for run in launched.run_ids if run in known])
        exit_code = exit_code or ended
    now = status.statuses(asked.workspace, store, launched.run_ids)
    if as_json:
        runs = [run.to_json() for run in now]
        options.print_json({"request_id": launched.request_id, "runs": runs, "findings": [asdict(f) for f in found]})
    else:
        statuses.print_statuses(now)
        if not wait and launched.queued:
            tables.note("labctl status tells how far they are; labctl compare shows what they measured")
    return exit_code


def _tell_idle_rules(asked: options.Asked) -> None:
    """A rule with a misspelt value leaves nothing out, and what it was to leave out takes GPU time."""
    for number in asked.plan.idle_rules:
        rule = ", ".join(f"{key} = {value!r}" for key, value in asked.request.exclude[number - 1].items())
        tables.note(f"warning: [[exclude]] number {number} leaves nothing out: no cell has {rule}")


def _tell_short_limits(batches: list[Batch], pace_of: Paces) -> None:
    """Warn of a time limit that the runs are likely to meet."""
    for batch in batches:
        partition = batch.script.partition
        if partition.executor != "slurm":
            continue
        limit_s = batch.jobs[0].time_limit_s
        needed_s = max((expected_s(job, pace) for job in batch.jobs if (pace := pace_of(job)) is not None), default=0.0)
        if needed_s and needed_s > limit_s - NOTICE_S:
            what = f"time limit of partition {partition.name} is too short: {_minutes(limit_s)}, expected {_minutes(needed_s)}"
            tables.note(f"warning: {what} -> raise --time, or lower --repeats or --runs-per-job")
        elif limit_s <= 2 * NOTICE_S:
            what = f"time limit of partition {partition.name} is short: {_minutes(limit_s)}"
            why = f"Slurm warns of its end {NOTICE_S} to {NOTICE_S + 60} s before it"
            tables.note(f"warning: {what}, and {why} -> raise --time to 10 min or more")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}".removesuffix(".0") + " min"


def _subject(asked: options.Asked, again: bool) -> Subject:
    """What is to be queued: a run that was measured has shown that it can be."""
    plan = asked.plan
    if asked.workspace.database.is_file() and not again:
        store = open_store(asked.workspace)
        plan = plan.without(set(cells.measured(store, [run.run_id for run in plan.runs])))
    return Subject(asked.workspace, asked.request, asked.partitions, plan)


def _tell_findings(found: list[Finding], *, force: bool) -> int:
    """Say what preflight found; returns the exit code of it: 0 where it forbids nothing."""
    refused = run_checks.refusals(found, force=force)
    for finding in found:
        if finding not in refused:
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            tables.note(f"warning: {finding.what}{remedy}")
    for finding in refused:
        fail(finding.what, finding.remedy, EXIT_REFUSED_BY_PREFLIGHT)
    if any(finding.severity == "doubt" for finding in refused):
        tables.note("nothing was submitted; --force submits what labctl only thinks impossible")
    return EXIT_REFUSED_BY_PREFLIGHT if refused else 0


def waited_for(workspace: Workspace, store: Store, run_ids: list[str]) -> int:
    """Wait until these runs have ended; returns the exit code that their ends make."""
    try:
        ended = wait.wait(workspace, store, run_ids)
    except KeyboardInterrupt:
        tables.note("the jobs go on: labctl status tells how far they are")
        raise
    return EXIT_A_RUN_FAILED if run_ids and ended != {run_status.DONE} else 0


MOST_TOLD = 5


def _tell_on_their_way(runs: list[RunStatus]) -> None:
    for run in runs[:MOST_TOLD]:
        job = f", as job {run.slurm_id}," if run.slurm_id else ""
        tables.note(f"{run.run_id} is {run.state} already{job} and is not queued again (--again queues it)")
    if len(runs) > MOST_TOLD:
        tables.note(f"and so are {len(runs) - MOST_TOLD} more")


def _scripts(batches: list[Batch]) -> dict[str, ScriptSettings]:
    """What the script of each run would set, by run id."""
    return {run.run_id: job.script for batch in batches for job in batch.jobs if job.script for run in job.runs}


def _tell_queued(launched: Launched) -> None:
    if launched.queued:
        jobs, runs = len(launched.queued), len(launched.queued_runs)
        loads = sum(job.loads for job, _ in launched.queued)
        tables.note(f"queued {_count(runs, 'run')} in {_count(loads, 'engine load')} ({_count(jobs, 'job')})")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' if number != 1 else ''}"


def _tell_skipped(store: Store, skipped: list[str], total: int, loads: int, scripts: dict[str, ScriptSettings]) -> None:
    if skipped:
        in_loads = f" in {loads} engine loads" if loads > 1 else ""
        said = f"{len(skipped)} of {total} runs were measured already{in_loads} and are not run again"
        tables.note(f"{said} (--again measures them again)")
        for line in cells.told_of(store, skipped, scripts):
            tables.note(f"  {line}")


def tell_refusals(launched: Launched) -> int:
    """Say what was refused; returns the exit code of it."""
    codes = [fail(refusal.message, refusal.remedy, refusal.exit_code) for refusal in launched.refusals]
    return max(codes, default=0)


# ---------------------------------------------------------------- --dry-run


def _dry_run(asked: options.Asked, again: bool, as_json: bool, scripts: dict[str, ScriptSettings]) -> int:
    run_ids = [run.run_id for run in asked.plan.runs]
    loads = dict.fromkeys(run_ids, asked.request.loads)
    if asked.workspace.database.is_file() and not again:  # the index as it is: a dry run takes nothing in
        store = open_store(asked.workspace)
        for run_id, count in cells.engine_loads(store, run_ids).items():
            loads[run_id] -= count
        skipped = [run_id for run_id, count in loads.items() if count <= 0]
        _tell_skipped(store, skipped, len(run_ids), asked.request.loads, scripts)
    batches = launch.planned(asked.workspace, asked.plan.with_loads(loads), asked.shape, stored_paces(asked.workspace))
    if as_json:
        options.print_json([_batch_json(batch) for batch in batches])
        return 0
    for batch in batches:
        runs = len({run.run_id for job in batch.jobs for run in job.runs})
        of_batch = sum(job.loads for job in batch.jobs)
        counts = ", ".join((_count(len(batch.jobs), "job"), _count(of_batch, "engine load"), _count(runs, "run")))
        click.echo(f"# partition {batch.script.partition.name}: {counts}")
        for job in batch.jobs:
            for run in job.runs:
                click.echo(f"#   {run.run_id}  {_in_short(job, run)}")
        if batch.script.partition.executor == "slurm":
            click.echo(batch.text_by_hand())
    return 0


def _in_short(job: JobSpec, run: RunSpec) -> str:
    at = (run.max_new_tokens, run.batch_size, sampling_label(run.sampling), run.request_rate)
    return statuses.in_short(job.backend, job.model.name, job.dtype, *at, job.engine_options)


def _batch_json(batch: Batch) -> dict[str, Any]:
    script = batch.text_by_hand() if batch.script.partition.executor == "slurm" else None
    return {
        "partition": batch.script.partition.name,
        "script": script,
        "jobs": [job.to_json() for job in batch.jobs],
    }
