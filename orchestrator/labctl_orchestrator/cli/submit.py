"""labctl submit"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import click

from labctl_orchestrator.analysis import cells
from labctl_orchestrator.cli import fail, options
from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.preflight.finding import Finding
from labctl_orchestrator.request import lengths, sampling
from labctl_orchestrator.store import take_files
from labctl_orchestrator.store.database import Store, open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.submission.launch import Launched
from labctl_orchestrator.submission.submit import PreparedSubmission, submit
from labctl_orchestrator.terminal import statuses, tables
from labctl_orchestrator.terminal.tables import counted
from labctl_orchestrator.tracking import run_status, status
from labctl_orchestrator.tracking import wait as waiting
from labctl_slurm.errors import EXIT_REFUSED_BY_PREFLIGHT
from labctl_workers.record import JobSpec

EXIT_A_RUN_FAILED = 1
RUNS_LISTED = 5


@click.command("submit")
@options.submission_options
@click.option("--again", is_flag=True, help="Also submit runs that are done, queued or running.")
@click.option("--wait", is_flag=True, help="Return when every run has ended; exit code 1 if a run failed.")
@click.option("--dry-run", is_flag=True, help="Show the runs, jobs and scripts; do not submit or write anything.")
@click.option(
    "--no-preflight",
    is_flag=True,
    envvar="LABCTL_NO_PREFLIGHT",
    help="Skip the checks before submission.",
)
@click.option(
    "--force", is_flag=True, help="Submit even if the checks expect a failure, such as a model that is too big."
)
@json_option
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
    """Submit runs to Slurm.

    A run is one configuration. Options with dots (NAME...) can be given several times: labctl measures every combination of
    their values. --slo, --quality and --sbatch are different: all their values apply to every run. Runs with the same model
    and engine share a job, which loads the model once (one engine load). A submission file has the same keys as the options
    (docs/submissions.md); options override it. labctl.toml can change the defaults (labctl config).

    First, labctl checks the runs (preflight). If a check fails, labctl exits with code 3 and submits nothing. Otherwise it
    returns when the jobs are queued; labctl status shows the progress.

    \b
    labctl submit -p dgxh                            # the default model, 128 new tokens
    labctl submit -p dgx2 -p dgxh --dtype float16    # one run on each partition
    labctl submit -p dgxh --max-new-tokens 128 --max-new-tokens 256    # two runs, one job
    labctl submit sweep.toml --dry-run               # show the runs of a file
    """
    prepared = options.prepared(file, flags, again=again, check=not no_preflight)
    refused = report_findings(prepared, force=force)
    if dry_run:
        preview(prepared, as_json)
        return refused
    if refused:
        return refuse(prepared, refused, as_json)
    with open_new(prepared) as store:
        launched, exit_code = launch(prepared, store)
        if wait:
            known = {*launched.queued_runs, *(run.run_id for run in launched.on_their_way)}
            ended = wait_for(prepared.workspace, store, [run for run in launched.run_ids if run in known])
            exit_code = exit_code or ended
        now = status.statuses(prepared.workspace, store, launched.run_ids)
    if as_json:
        found, runs = list(map(asdict, prepared.findings)), [run.to_json() for run in now]
        print_json({"submission_id": launched.submission_id, "runs": runs, "findings": found})
    else:
        statuses.print_runs(now)
        if not wait and launched.queued:
            tables.note("labctl status shows the progress; labctl compare shows the results")
    return exit_code


def open_new(prepared: PreparedSubmission) -> closing[Store]:
    """The database of the workspace; makes the workspace if it is new."""
    tables.note_new(prepared.workspace)
    prepared.workspace.create()
    return closing(open_store(prepared.workspace))


def launch(prepared: PreparedSubmission, store: Store) -> tuple[Launched, int]:
    """Submit, and print the outcome; returns (outcome, exit code)."""
    with tables.working("submitting"):
        launched = submit(prepared, store)
    if launched.learnt:
        statuses.note_problems(launched.learnt, prepared.workspace)
    _note_measured(prepared, store, launched.measured)
    for run in launched.on_their_way[:RUNS_LISTED]:
        job = f" as job {run.slurm_id}" if run.slurm_id else ""
        tables.note(f"skipped {run.run_id}: already {run.state}{job} (--again submits it)")
    if len(launched.on_their_way) > RUNS_LISTED:
        tables.note(f"... and {len(launched.on_their_way) - RUNS_LISTED} more")
    if launched.queued:
        runs, loads = len(launched.queued_runs), sum(job.loads for job, _ in launched.queued)
        jobs = counted(len(launched.queued), "job")
        limit = _gpu_hours([job for job, _ in launched.queued])
        tables.note(f"queued {counted(runs, 'run')} in {counted(loads, 'engine load')} ({jobs}){limit}")
    return launched, report_refusals(launched)


def _gpu_hours(jobs: Sequence[JobSpec]) -> str:
    """ ", at most 2 GPU-hours": GPUs times time limit of the Slurm jobs on GPUs; "" without one."""
    hours = sum(job.gpus * job.time_limit_s for job in jobs if job.executor == "slurm" and job.device == "cuda") / 3600
    amount = f"{hours:,.1f}".removesuffix(".0")
    return f", at most {amount} GPU-hour{'' if amount == '1' else 's'}" if hours else ""


def report_findings(prepared: PreparedSubmission, *, force: bool) -> int:
    """Print the findings of preflight; returns the exit code, 0 if the submission may go on."""
    refused = prepared.refusals(force=force)
    for finding in prepared.findings:
        if finding.severity == "note":
            tables.note(finding.what)
        elif finding not in refused:
            note_warning(finding)
    for finding in refused:
        fail(finding.what, finding.remedy, EXIT_REFUSED_BY_PREFLIGHT)
    if any(finding.severity == "doubt" for finding in refused):
        tables.note("nothing was submitted; --force submits although labctl expects a failure")
    return EXIT_REFUSED_BY_PREFLIGHT if refused else 0


def note_warning(finding: Finding) -> None:
    tables.note(f"warning: {finding.what}")
    if finding.remedy:
        tables.note(f"  -> {finding.remedy}")


def refuse(prepared: PreparedSubmission, exit_code: int, as_json: bool) -> int:
    """Print the JSON of a submission that preflight refused; returns the exit code."""
    if as_json:
        print_json({"submission_id": None, "runs": [], "findings": list(map(asdict, prepared.findings))})
    return exit_code


def report_refusals(launched: Launched) -> int:
    """Print Slurm's refusals; returns the exit code."""
    codes = [fail(refusal.message, refusal.remedy, refusal.exit_code) for refusal in launched.refusals]
    return max(codes, default=0)


def wait_for(workspace: Workspace, store: Store, run_ids: list[str]) -> int:
    """Wait until these runs have ended; returns the exit code."""
    try:
        ended = waiting.wait(workspace, store, run_ids)
    except KeyboardInterrupt:
        tables.note("the jobs continue; labctl status shows the progress")
        raise
    return EXIT_A_RUN_FAILED if run_ids and ended - {run_status.DONE, run_status.SKIPPED} else 0


def _note_measured(prepared: PreparedSubmission, store: Store, measured: list[str]) -> None:
    if not measured:
        return
    loads = prepared.request.loads
    in_loads = f" in {loads} engine loads" if loads > 1 else ""
    count = f"{len(measured)} of {counted(len(prepared.run_ids), 'run')}"
    tables.note(f"skipped {count}: already measured{in_loads} (--again measures again)")
    for line in cells.measured_before(store, measured, prepared.scripts()):
        tables.note(f"  {line}")


# ---------------------------------------------------------------- --dry-run


def preview(prepared: PreparedSubmission, as_json: bool) -> None:
    """Print the runs, jobs and scripts of --dry-run."""
    if measured := prepared.measured:
        with closing(open_store(prepared.workspace)) as store:
            _note_measured(prepared, store, measured)
    scripts = {
        array.array_id: array.text_by_hand() if array.script.partition.executor == "slurm" else None
        for array in prepared.arrays
    }
    if as_json:
        print_json(
            [
                {
                    "partition": array.script.partition.name,
                    "script": scripts[array.array_id],
                    "jobs": [job.to_json() for job in array.jobs],
                }
                for array in prepared.arrays
            ]
        )
        return
    for array in prepared.arrays:
        runs = len({run.run_id for job in array.jobs for run in job.runs})
        loads = sum(job.loads for job in array.jobs)
        counts = f"{counted(len(array.jobs), 'job')}, {counted(loads, 'engine load')}, {counted(runs, 'run')}"
        click.echo(f"# partition {array.script.partition.name}: {counts}{_gpu_hours(array.jobs)}")
        for job in array.jobs:
            for run in job.runs:
                settings = {
                    **vars(job), **vars(run), **lengths.columns(run.workload), "model": job.model.name,
                    "batch_size": None if take_files.unlimited(job, run) else run.batch_size,
                    "sampling": sampling.label(run.sampling),
                }  # fmt: skip
                click.echo(f"#   {run.run_id}  {statuses.short_settings(settings)}")
        if script := scripts[array.array_id]:
            click.echo(script)
