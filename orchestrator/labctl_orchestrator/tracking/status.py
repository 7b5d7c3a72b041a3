"""The status of each run, from Slurm's states, heartbeats and records.

A run fails only by a record or a state of Slurm. Without an answer, it is `unknown` or keeps its last state.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping, Sequence

from labctl_orchestrator.store import job_rows
from labctl_orchestrator.store.database import Store, of_runs
from labctl_orchestrator.store.job_rows import JobOfRun, ResultRow
from labctl_orchestrator.store.select_runs import SUBMITTED
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking.diagnosis import RunDiagnoses
from labctl_orchestrator.tracking.heartbeats import Sources
from labctl_orchestrator.tracking.job_status import set_failure, set_job, set_status
from labctl_orchestrator.tracking.run_status import (
    DONE,
    LOST,
    MISSING,
    PENDING,
    RETRY,
    RUNNING,
    SUBMITTING,
    SUSPENDED,
    UNKNOWN,
    RunStatus,
)


def statuses(workspace: Workspace, store: Store, run_ids: Sequence[str]) -> list[RunStatus]:
    """The status of each run in the store, in the given order. Call `refresh` before."""
    these = json.dumps(run_ids)
    jobs: dict[str, list[JobOfRun]] = {}
    for job in job_rows.jobs_of_runs(store, f"job_runs.{OF_THESE} AND {SUBMITTED}", [these]):
        jobs.setdefault(job.run_id, []).append(job)
    results: dict[str, list[ResultRow]] = {}
    for result in job_rows.results(store, OF_THESE, [these]):
        results.setdefault(result.run_id, []).append(result)
    blank = _blank(store, these)
    sources = Sources(workspace, RunDiagnoses(workspace))
    found = [
        _status(blank[run_id], jobs.get(run_id, []), results.get(run_id, []), sources)
        for run_id in run_ids
        if run_id in blank
    ]
    sources.keep()
    return found


OF_THESE = "run_id IN (SELECT value FROM json_each(?))"


def _blank(store: Store, these: str) -> dict[str, RunStatus]:
    """The definitions of the runs, with state UNKNOWN."""
    columns = (
        "run_id", "partition", "backend", "model", "dtype", "max_new_tokens", "batch_size", "sampling", "gpus", "parallel",
        "request_rate", "served", "engine_options", "input_len", "output_len", "prefix_len", "dataset",
    )  # fmt: skip
    blank = {}
    for row in store.tuples(f"SELECT {', '.join(columns)} FROM runs WHERE {OF_THESE}", [these]):
        values = dict(zip(columns, row, strict=True))
        values["engine_options"] = json.loads(values["engine_options"] or "{}") or {}
        values["served"] = bool(values["served"])
        blank[row[0]] = RunStatus(**values, state=UNKNOWN)
    return blank


def overview(workspace: Workspace, store: Store, run_ids: Sequence[str]) -> tuple[Counter[str], list[RunStatus]]:
    """(The number of runs in each state, the statuses of runs that are not done): `statuses` for many runs."""
    done = _done(store, run_ids)
    found = statuses(workspace, store, [run_id for run_id in run_ids if run_id not in done])
    counts = Counter({DONE: len(done)} if done else {})
    counts.update(run.state for run in found)
    return counts, [run for run in found if run.state != DONE]


def _done(store: Store, run_ids: Sequence[str]) -> set[str]:
    """The runs with a result in each engine load of each of their jobs."""
    these, parameters = of_runs(run_ids)
    sql = f"SELECT DISTINCT run_id FROM results WHERE {these} AND +status = 'done'"
    measured = {run_id for (run_id,) in store.tuples(sql, parameters)}
    left = store.tuples(
        "SELECT run_id FROM job_runs JOIN jobs USING (job_id) JOIN arrays USING (array_id)"
        f" WHERE {these} AND {SUBMITTED} AND loads > (SELECT count(*) FROM results WHERE results.run_id = job_runs.run_id"
        " AND results.status = 'done' AND results.job_id = jobs.job_id)",
        parameters,
    )
    return measured.intersection(run_ids).difference(run_id for (run_id,) in left)


def _status(run: RunStatus, jobs: list[JobOfRun], results: list[ResultRow], sources: Sources) -> RunStatus:
    """A run's status from all its jobs: from those that may bring a result, else from the last that did not, else from its
    results."""
    status = copy.copy(run)
    done = [result for result in results if result.status == "done"]
    left = _left(jobs, Counter(result.job_id for result in done))
    if left:
        by_job = [_status_of_job(run, job, results, sources) for job, _ in left]
        to_come = [one for one in by_job if one.may_come]
        status = min(to_come, key=lambda one: NEAREST_RESULT.index(one.state)) if to_come else by_job[-1]
        loads = {job.job_id: count for job, count in left}
        status.jobs_to_come = tuple([one.job_id for one in to_come if one.job_id])
        status.unmeasured = {one.job_id: one.state for one in by_job if one.job_id and not one.may_come}
        status.loads_to_come = sum(loads[job_id] for job_id in status.jobs_to_come)
        status.loads_unmeasured = sum(loads[job_id] for job_id in status.unmeasured)
    elif done:
        status.state, status.node, status.since = DONE, done[-1].node, done[-1].ended_at
        set_job(status, next((job for job in jobs if job.job_id == done[-1].job_id), None))
    elif results:
        set_failure(status, None, results[-1], sources.diagnoses)
    else:
        status.state, status.detail, status.remedy = MISSING, "never queued", RETRY
    status.loads_measured = len(done)
    status.detail = "; ".join(filter(None, (status.detail, _engine_loads(status), *_set_replaced(status, jobs))))
    return status


# The status of several jobs that may bring a result is that of the nearest to it.
NEAREST_RESULT = (RUNNING, SUSPENDED, PENDING, SUBMITTING, UNKNOWN)


def _left(jobs: Sequence[JobOfRun], done: Mapping[str, int]) -> list[tuple[JobOfRun, int]]:
    """The jobs with unmeasured engine loads of a run, and the number of these. Left out: a job whose run went to another job with
    an intent, a job that replaced one with a result, and all but the last of the jobs around one that a user started."""
    with_intent = {job.job_id for job in jobs}
    replaced_in_vain = {job.moved_to for job in jobs if done[job.job_id] >= job.loads}
    left = []
    for place, job in enumerate(jobs):
        count = job.loads - done[job.job_id]
        by_hand = any(later.intent_at is None for later in jobs[place + 1 :]) or (
            job.intent_at is None and job is not jobs[-1]
        )
        if count > 0 and not (by_hand or job.moved_to in with_intent or job.job_id in replaced_in_vain):
            left.append((job, count))
    return left


def _status_of_job(run: RunStatus, job: JobOfRun, results: list[ResultRow], sources: Sources) -> RunStatus:
    """A run's status in one job that has not measured all of its loads."""
    status = copy.copy(run)
    set_job(status, job)
    failed = [result for result in results if result.job_id == job.job_id and result.status != "done"]
    failed.sort(key=lambda result: result.restarts or 0)  # not by time: clocks of nodes differ
    set_status(status, job, failed, sources)
    return status


def _engine_loads(status: RunStatus) -> str:
    """The numbers of measured and other engine loads, of a run with several."""
    counts = {
        "measured": status.loads_measured, "expected": status.loads_to_come, "missing": status.loads_unmeasured,
    }  # fmt: skip
    if sum(counts.values()) < 2:
        return ""
    return "engine loads: " + ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def _set_replaced(status: RunStatus, jobs: Sequence[JobOfRun]) -> list[str]:
    """Set the jobs from which the run was taken while they might still measure it, and return a sentence for each."""
    slurm_ids = {job.job_id: job.slurm_id or job.job_id for job in jobs}
    lost = [
        job
        for job in jobs
        if job.moved_to and (job.moved_in_state in (LOST, UNKNOWN) or (job.state and not job.has_ended))
    ]
    status.lost_turns = tuple([slurm_ids[job.job_id] for job in lost])
    return [
        f"job {slurm_ids.get(job.moved_to or '', job.moved_to)} replaces job {slurm_ids[job.job_id]}" for job in lost
    ]
