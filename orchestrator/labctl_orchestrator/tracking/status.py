"""Where each run stands, and why: Slurm's word, the worker's heartbeat and the records, put together.

Nothing is inferred from silence. What cannot be known now is `unknown` and keeps the last known state beside it; a run
fails only where a record, or Slurm, says so.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping, Sequence

from labctl_orchestrator.store import job_rows
from labctl_orchestrator.store.database import Store, of_runs
from labctl_orchestrator.store.job_rows import JobOfRun, ResultRow
from labctl_orchestrator.store.select_runs import BEGUN
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking.diagnosis import Diagnoses
from labctl_orchestrator.tracking.heartbeats import Sources
from labctl_orchestrator.tracking.job_status import tell_failure, tell_from_job, tell_the_job
from labctl_orchestrator.tracking.run_status import (
    DONE,
    MISSING,
    PENDING,
    RUNNING,
    SUBMITTING,
    SUSPENDED,
    UNKNOWN,
    RunStatus,
)


def statuses(workspace: Workspace, store: Store, run_ids: Sequence[str]) -> list[RunStatus]:
    """The status of each run that the store has, in the order given. Call `refresh` before."""
    these = json.dumps(run_ids)
    jobs: dict[str, list[JobOfRun]] = {}
    for job in job_rows.jobs_of_runs(store, f"job_runs.{OF_THESE} AND {BEGUN}", [these]):
        jobs.setdefault(job.run_id, []).append(job)
    results: dict[str, list[ResultRow]] = {}
    for result in job_rows.results(store, OF_THESE, [these]):
        results.setdefault(result.run_id, []).append(result)
    blank = _blank(store, these)
    sources = Sources(workspace, Diagnoses(workspace))
    found = [
        _status(blank[run_id], jobs.get(run_id, []), results.get(run_id, []), sources)
        for run_id in run_ids
        if run_id in blank
    ]
    sources.keep()
    return found


OF_THESE = "run_id IN (SELECT value FROM json_each(?))"


def _blank(store: Store, these: str) -> dict[str, RunStatus]:
    """The runs as they were asked for, of which nothing else is known yet."""
    columns = (
        "run_id", "partition", "backend", "model", "dtype", "max_new_tokens", "batch_size", "sampling", "gpus", "request_rate",
        "engine_options",
    )  # fmt: skip
    blank = {}
    for row in store.tuples(f"SELECT {', '.join(columns)} FROM runs WHERE {OF_THESE}", [these]):
        asked = dict(zip(columns, row, strict=True))
        asked["engine_options"] = json.loads(asked["engine_options"] or "{}") or {}
        blank[row[0]] = RunStatus(**asked, state=UNKNOWN)
    return blank


def overview(workspace: Workspace, store: Store, run_ids: Sequence[str]) -> tuple[Counter[str], list[RunStatus]]:
    """(how many of the runs are in each state, the statuses of those that are not done): `statuses` for many runs."""
    done = _done(store, run_ids)
    found = statuses(workspace, store, [run_id for run_id in run_ids if run_id not in done])
    counts = Counter({DONE: len(done)} if done else {})
    counts.update(run.state for run in found)
    return counts, [run for run in found if run.state != DONE]


def _done(store: Store, run_ids: Sequence[str]) -> set[str]:
    """Those of the runs that have a result in each engine load of each of their jobs."""
    these, parameters = of_runs(run_ids)
    sql = f"SELECT DISTINCT run_id FROM results WHERE {these} AND +status = 'done'"
    measured = {run_id for (run_id,) in store.tuples(sql, parameters)}
    left = store.tuples(
        "SELECT run_id FROM job_runs JOIN jobs USING (job_id) JOIN arrays USING (array_id)"
        f" WHERE {these} AND {BEGUN} AND loads > (SELECT count(*) FROM results WHERE results.run_id = job_runs.run_id"
        " AND results.status = 'done' AND results.job_id = jobs.job_id)",
        parameters,
    )
    return measured.intersection(run_ids).difference(run_id for (run_id,) in left)


def _status(run: RunStatus, jobs: list[JobOfRun], results: list[ResultRow], sources: Sources) -> RunStatus:
    """A run's status from all jobs that were to measure it: what is still to come before what has failed before what is done."""
    status = copy.copy(run)
    done = [result for result in results if result.status == "done"]
    left = _left(jobs, Counter(result.job_id for result in done))
    if left:
        told = [_status_of_job(run, job, results, sources) for job, _ in left]
        to_come = [one for one in told if one.may_come]
        status = min(to_come, key=lambda one: TOLD_FIRST.index(one.state)) if to_come else told[-1]
        loads = {job.job_id: count for job, count in left}
        status.jobs_to_come = tuple([one.job_id for one in to_come if one.job_id])
        status.unmeasured = {one.job_id: one.state for one in told if one.job_id and not one.may_come}
        status.loads_to_come = sum(loads[job_id] for job_id in status.jobs_to_come)
        status.loads_unmeasured = sum(loads[job_id] for job_id in status.unmeasured)
    elif done:
        status.state, status.node, status.since = DONE, done[-1].node, done[-1].ended_at
        tell_the_job(status, next((job for job in jobs if job.job_id == done[-1].job_id), None))
    elif results:
        tell_failure(status, None, results[-1], sources.diagnoses)
    else:
        status.state, status.detail = MISSING, "asked for, and never queued"
        status.remedy = "labctl retry submits it"
    status.loads_measured = len(done)
    status.detail = "; ".join(filter(None, (status.detail, _loads_in_words(status), *_lost_turns(status, jobs))))
    return status


# Of the jobs that are still to bring a result, the one that is told: the nearest to it.
TOLD_FIRST = (RUNNING, SUSPENDED, PENDING, SUBMITTING, UNKNOWN)


def _left(jobs: Sequence[JobOfRun], done: Mapping[str, int]) -> list[tuple[JobOfRun, int]]:
    """The jobs that were to measure a run and have not in all of their engine loads, with how many these are. Without those whose
    run was given to another job that was claimed (else labctl was killed before), those in whose place another one did come back
    with it, and those after or before a job that a person started: of these the last one counts."""
    claimed = {job.job_id for job in jobs}
    brought = {job.given_to for job in jobs if done[job.job_id] >= job.loads}
    left = []
    for place, job in enumerate(jobs):
        count = job.loads - done[job.job_id]
        by_hand = any(later.intent_at is None for later in jobs[place + 1 :]) or (
            job.intent_at is None and job is not jobs[-1]
        )
        if count > 0 and not (by_hand or job.given_to in claimed or job.job_id in brought):
            left.append((job, count))
    return left


def _status_of_job(run: RunStatus, job: JobOfRun, results: list[ResultRow], sources: Sources) -> RunStatus:
    """What one job makes of a run that it has not measured in all of its loads."""
    status = copy.copy(run)
    tell_the_job(status, job)
    failed = [result for result in results if result.job_id == job.job_id and result.status != "done"]
    failed.sort(key=lambda result: result.restarts or 0)  # two starts may have been on nodes whose clocks differ
    tell_from_job(status, job, failed, sources)
    return status


def _loads_in_words(status: RunStatus) -> str:
    """Where a run is measured in several engine loads, how many are done and how many are not."""
    counts = {
        "measured": status.loads_measured, "to come": status.loads_to_come, "not measured": status.loads_unmeasured,
    }  # fmt: skip
    if sum(counts.values()) < 2:
        return ""
    return "engine loads: " + ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def _lost_turns(status: RunStatus, jobs: Sequence[JobOfRun]) -> list[str]:
    """Which jobs the run was taken from while they might still have measured it, or do so now."""
    slurm_ids = {job.job_id: job.slurm_id or job.job_id for job in jobs}
    lost = [job for job in jobs if job.given_to and (job.given_as == UNKNOWN or (job.state and not job.has_ended))]
    status.lost_turns = tuple([slurm_ids[job.job_id] for job in lost])
    return [
        f"job {slurm_ids[job.job_id]} lost its turn to job {slurm_ids.get(job.given_to or '', job.given_to)}"
        for job in lost
    ]
