"""Resubmit missing and failed runs, with the JobSpecs of their submissions."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from labctl_orchestrator.analysis import doubts
from labctl_orchestrator.analysis.cells import read_cells
from labctl_orchestrator.analysis.metrics import RATE
from labctl_orchestrator.request import settings
from labctl_orchestrator.request.plan import Plan
from labctl_orchestrator.request.request import SLURM_KEYS, SubmissionSpec
from labctl_orchestrator.store import collect, documents, job_rows, window
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.select_runs import runs_by_submission
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.submission import launch
from labctl_orchestrator.submission.job_arrays import JobRules, pack
from labctl_orchestrator.submission.launch import Launched
from labctl_orchestrator.submission.measured_pace import paces
from labctl_orchestrator.tracking import run_status, status
from labctl_orchestrator.tracking.run_status import RunStatus
from labctl_slurm import control, limits
from labctl_slurm.errors import LabctlError
from labctl_slurm.partitions import Partition
from labctl_workers.record import JobSpec, sha256_of_json

FAILED, MISSING, TIMEOUT = "failed", "missing", "timeout"
STATES = {
    FAILED: {run_status.FAILED},
    TIMEOUT: {run_status.TIMEOUT},
    MISSING: {run_status.MISSING, run_status.INTERRUPTED, run_status.REFUSED, run_status.LOST},
}
MORE_TIME_AFTER_A_TIMEOUT = 2.0
# Fields in which jobs may differ whose runs share the next job.
NOT_SHARED = ("job_id", "runs", "prompt_sets", "time_limit_s", "script")


def without_result(found: Sequence[RunStatus], kinds: Collection[str] = ()) -> list[RunStatus]:
    """The runs that have no result and expect none, of these kinds or (no kinds) all. No kind contains cancelled runs."""
    left = [run for run in found if run.state in run_status.UNSUCCESSFUL]
    wanted = set().union(*(STATES[kind] for kind in kinds))
    return [run for run in left if not kinds or run.state in wanted]


@dataclass(frozen=True)
class Again:
    """What an invalid result needs: engine loads, and repeats in each at least."""

    loads: int
    repeats: int = 0


def invalid(store: Store, run_ids: Sequence[str]) -> dict[str, Again]:
    """The measured runs whose result another measurement may replace or make exact (`doubts.TO_MEASURE_AGAIN`)."""
    found = {}
    for cell in read_cells(store, run_ids, (RATE,), with_texts=False):
        marks = {doubt.kind: doubt for doubt in cell.doubts if doubt.kind in doubts.TO_MEASURE_AGAIN}
        if marks:
            if any(kind in marks for kind in (window.THROTTLED, window.SHARED)):
                found[cell.run_id] = Again(len(cell.loads))
            elif doubts.NOISY in marks:
                repeats = sum(map(len, cell.values[RATE])) + int(marks[doubts.NOISY].detail)
                loads = doubts.more_loads(marks[doubts.NOISY].value, len(cell.loads))
                found[cell.run_id] = Again(loads, min(repeats, doubts.MOST_MORE_REPEATS))
            else:
                found[cell.run_id] = Again(1)
    return found


@dataclass
class Retry:
    """Runs of one submission to resubmit: its options for Slurm, the jobs, and for runs that reached their time limit, by id, the
    seconds that they need (`at_least_s`) and the earlier limit (`before_s`)."""

    submission_id: str
    request: SubmissionSpec
    plan: Plan
    at_least_s: dict[str, float] = field(default_factory=dict)
    before_s: dict[str, int] = field(default_factory=dict)


def retries(
    workspace: Workspace, store: Store, left: Sequence[RunStatus], again: Mapping[str, Again] | None = None
) -> list[Retry]:
    """These runs by their latest submission; those of rendered scripts have the submission "". `again`: measured runs, by id."""
    submission_of = {run_id: one for one, runs in runs_by_submission(store).items() for run_id in runs}
    by_submission: dict[str, list[RunStatus]] = {}
    for run in left:
        by_submission.setdefault(submission_of.get(run.run_id, ""), []).append(run)
    jobs_of = {row["run_id"]: row["job_id"] for row in store.rows("SELECT run_id, job_id FROM job_runs")}
    return [
        _retry(workspace, submission_id, runs, jobs_of, again or {}) for submission_id, runs in by_submission.items()
    ]


def _retry(
    workspace: Workspace,
    submission_id: str,
    left: Sequence[RunStatus],
    jobs_of: Mapping[str, str],
    again: Mapping[str, Again],
) -> Retry:
    """Each run has the latest JobSpec that contains it: its job's, its submission's, or a rendered script's."""
    file = workspace.submissions / f"{submission_id}.json"
    submission = documents.read_at(file, documents.Submission) if submission_id else None
    submitted = {run.run_id: job for job in (submission.jobs if submission else ()) for run in job.runs}

    @functools.cache
    def of_job(job_id: str | None) -> JobSpec | None:
        return documents.read_at(workspace.spec(job_id), JobSpec) if job_id else None

    jobs: dict[str, JobSpec] = {}
    # Without the keys of a newer labctl.
    options = {key: value for key, value in (submission.request if submission else {}).items() if key in SLURM_KEYS}
    try:
        retry = Retry(submission_id, msgspec.convert(options, SubmissionSpec), Plan([]))
    except msgspec.ValidationError as error:
        raise LabctlError(
            f"damaged submission file {submission_id}.json: {error}", "submit the sweep with labctl submit"
        ) from None
    for run in left:
        job = of_job(run.job_id) or submitted.get(run.run_id) or of_job(jobs_of.get(run.run_id))
        if job is None:
            continue
        loads = job.loads
        wanted = again.get(run.run_id)
        job = replace(job, loads=wanted.loads if wanted else run.loads_unmeasured or job.loads)
        identity = sha256_of_json({key: value for key, value in job.to_json().items() if key not in NOT_SHARED})
        together = jobs.setdefault(identity, replace(job, job_id="", runs=[], prompt_sets={}, script=None))
        (spec,) = [spec for spec in job.runs if spec.run_id == run.run_id]
        together.runs.append(replace(spec, repeats=max(spec.repeats, wanted.repeats)) if wanted else spec)
        together.prompt_sets[spec.prompt_set] = job.prompt_sets[spec.prompt_set]
        if run.state == run_status.TIMEOUT:
            retry.before_s[run.run_id] = job.time_limit_s
            retry.at_least_s[run.run_id] = MORE_TIME_AFTER_A_TIMEOUT * job.time_limit_s / (len(job.runs) * loads)
    retry.plan = Plan(list(jobs.values()))
    return retry


def submit(
    workspace: Workspace,
    store: Store,
    retries: Sequence[Retry],
    runs_per_job: int | None = None,
    changed: Mapping[str, str] | None = None,
) -> tuple[list[Launched], list[str]]:
    """(The result of each submission, warnings). `changed` overrides keys of the partitions and of the earlier submission."""
    known, changed = settings.load(workspace), changed or {}
    launched: list[Launched] = []
    warnings: list[str] = []
    for each in retries:
        overrides = {**each.request.overrides, **changed}
        if each.at_least_s and "time" not in changed:
            overrides.pop("max_time", None)  # the earlier time limit was too short
        names = dict.fromkeys(job.partition for job in each.plan.jobs)
        partitions = {name: known.partition(name, overrides) for name in names}
        warnings += _limit_warnings(each, partitions)
        per_job = runs_per_job or each.request.runs_per_job
        rules = JobRules(partitions, per_job, each.request.jobs_at_once, each.at_least_s)
        launched.append(_submit(workspace, store, each, rules))
    return launched, warnings


def _limit_warnings(retry: Retry, partitions: Mapping[str, Partition]) -> Iterator[str]:
    """Warnings about runs that have already reached the partition's largest time limit."""
    for job in retry.plan.jobs:
        longest_s = limits.time_limit_s(partitions[job.partition])
        again = [run.run_id for run in job.runs if retry.before_s.get(run.run_id, 0) >= longest_s]
        if again:
            yield (
                f"reached the largest time limit of {job.partition} ({longest_s // 60} min): {', '.join(again)}"
                " -> lower --runs-per-job, or submit with lower --repeats"
            )


def _submit(workspace: Workspace, store: Store, retry: Retry, rules: JobRules) -> Launched:
    """Queue the runs, except those that another labctl has queued since."""
    launched = Launched(retry.submission_id, [run.run_id for run in retry.plan.runs])
    with workspace.lock():
        collect.collect_runs(workspace, store, launched.run_ids)
        found = {run.run_id: run for run in status.statuses(workspace, store, launched.run_ids)}
        launched.on_their_way = [run for run in found.values() if run.may_come]
        left = retry.plan.without({run.run_id for run in launched.on_their_way})
        arrays = pack(workspace, left, rules, paces(store))
        launch.claim(workspace, arrays, retry.submission_id, found)
    launch.submit_all(workspace, arrays, launched)
    collect.collect_runs(workspace, store, launched.run_ids)
    return launched


def release(store: Store, held: Sequence[RunStatus]) -> None:
    """Release queued jobs that Slurm holds because it could not start them."""
    ids = json.dumps(sorted({run.slurm_id for run in held if run.slurm_id}))
    rows = job_rows.jobs(store, "slurm_id IN (SELECT value FROM json_each(?))", (ids,))
    for cluster, slurm_ids in job_rows.slurm_ids_by_cluster(rows).items():
        control.release(slurm_ids, cluster)
