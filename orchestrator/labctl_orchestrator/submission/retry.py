"""The holes of a sweep, and the jobs that fill them: made from the JobSpecs that were kept, not from what is asked for now."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from labctl_orchestrator.request import request as requests
from labctl_orchestrator.request.plan import Plan
from labctl_orchestrator.request.request import Request
from labctl_orchestrator.store import documents
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking import run_status
from labctl_orchestrator.tracking.run_status import RunStatus
from labctl_slurm.errors import LabctlError
from labctl_workers.record import JobSpec, sha256_of_json

FAILED, MISSING, TIMEOUT = "failed", "missing", "timeout"
STATES = {
    FAILED: {run_status.FAILED},
    TIMEOUT: {run_status.TIMEOUT},
    MISSING: {run_status.MISSING, run_status.INTERRUPTED, run_status.REFUSED, run_status.UNKNOWN},
}
MORE_TIME_AFTER_A_TIMEOUT = 2.0


def holes(found: Sequence[RunStatus], kinds: Collection[str] = ()) -> list[RunStatus]:
    """The runs without a result that none is to come of: all, or those of some kinds; a cancelled run is of none."""
    left = [run for run in found if run.state != run_status.DONE and not run.may_come]
    wanted = set().union(*(STATES[kind] for kind in kinds))
    return [run for run in left if not kinds or run.state in wanted]


@dataclass
class Retry:
    """The holes of one request: what it asked of Slurm, the jobs, and the seconds that runs which met their limit need."""

    request_id: str
    request: Request
    plan: Plan
    at_least_s: dict[str, float] = field(default_factory=dict)
    before_s: dict[str, int] = field(default_factory=dict)


def retries(workspace: Workspace, store: Store, left: Sequence[RunStatus]) -> list[Retry]:
    """The holes by the latest request that has them; those that none has (a script sent by hand) are of request ""."""
    rows = store.rows(
        "SELECT run_id, request_id FROM request_runs JOIN requests USING (request_id) ORDER BY created_at"
    )
    request_of = {row["run_id"]: row["request_id"] for row in rows}
    by_request: dict[str, list[RunStatus]] = {}
    for run in left:
        by_request.setdefault(request_of.get(run.run_id, ""), []).append(run)
    jobs_of = {row["run_id"]: row["job_id"] for row in store.rows("SELECT run_id, job_id FROM job_runs")}
    return [_retry(workspace, request_id, runs, jobs_of) for request_id, runs in by_request.items()]


def _retry(workspace: Workspace, request_id: str, left: Sequence[RunStatus], jobs_of: Mapping[str, str]) -> Retry:
    asked = documents.request_at(workspace.requests / f"{request_id}.json") if request_id else None
    specs = _Specs(workspace, asked.jobs if asked else (), jobs_of)
    jobs: dict[str, JobSpec] = {}
    retry = Retry(request_id, _request_of(asked.request if asked else {}), Plan([]))
    for run in left:
        job = specs.of(run)
        if job is None:
            continue
        loads = job.loads
        job = replace(job, loads=run.loads_unmeasured or job.loads)
        together = jobs.setdefault(_identity(job), replace(job, job_id="", runs=[], prompt_sets={}, script=None))
        (spec,) = [spec for spec in job.runs if spec.run_id == run.run_id]
        together.runs.append(spec)
        together.prompt_sets[spec.prompt_set] = job.prompt_sets[spec.prompt_set]
        if run.state == run_status.TIMEOUT:
            retry.before_s[run.run_id] = job.time_limit_s
            retry.at_least_s[run.run_id] = MORE_TIME_AFTER_A_TIMEOUT * job.time_limit_s / (len(job.runs) * loads)
    retry.plan = Plan(list(jobs.values()))
    return retry


def _identity(job: JobSpec) -> str:
    own = ("job_id", "runs", "prompt_sets", "time_limit_s", "script")
    return sha256_of_json({key: value for key, value in job.to_json().items() if key not in own})


def _request_of(request: dict[str, Any]) -> Request:
    """What was asked then; keys that a newer labctl wrote are left out. Raises LabctlError for one that is no request."""
    try:
        return msgspec.convert({key: value for key, value in request.items() if key in requests.KEYS}, Request)
    except ValueError as error:
        raise LabctlError(f"the request's file is damaged: {error}", "submit the sweep again") from None


class _Specs:
    """The JobSpecs that runs were last part of: of their job, else of their request, else of a script that was printed."""

    def __init__(self, workspace: Workspace, asked: Sequence[JobSpec], jobs_of: Mapping[str, str]) -> None:
        self.workspace = workspace
        self._jobs_of = jobs_of
        self._read: dict[str, JobSpec | None] = {}
        self._asked = {run.run_id: job for job in asked for run in job.runs}

    def of(self, run: RunStatus) -> JobSpec | None:
        job = self._of_job(run.job_id) if run.job_id else None
        job = job or self._asked.get(run.run_id)
        return job or (self._of_job(self._jobs_of[run.run_id]) if run.run_id in self._jobs_of else None)

    def _of_job(self, job_id: str) -> JobSpec | None:
        if job_id not in self._read:
            batch, _, task = job_id.rpartition(".")
            self._read[job_id] = documents.job_at(self.workspace.batches / batch / f"{task}.json")
        return self._read[job_id]
