"""Where each run stands, and why: Slurm's word, the worker's heartbeat and the records, put together.

Nothing is inferred from silence. What cannot be known now is `unknown` and keeps the last known state beside it; a run
fails only where a record, or Slurm, says so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from labctl_orchestrator.store.database import Store, of_runs
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
from labctl_slurm import queue


def statuses(workspace: Workspace, store: Store, run_ids: Sequence[str]) -> list[RunStatus]:
    """The status of each run that the store has, in the order given. Call `refresh` before."""
    these = json.dumps(run_ids)
    jobs = _jobs_of_runs(store, these)
    results = _results(store, these)
    rows = {
        row["run_id"]: row for row in store.rows(f"SELECT {', '.join(RUN_COLUMNS)} FROM runs WHERE {OF_THESE}", [these])
    }
    known = [run_id for run_id in run_ids if run_id in rows]
    for run_id in known:
        rows[run_id]["engine_options"] = json.loads(rows[run_id]["engine_options"] or "{}") or {}
    sources = Sources(workspace, Diagnoses(workspace))
    found = [_status(rows[run_id], jobs.get(run_id, []), results.get(run_id, []), sources) for run_id in known]
    sources.keep()
    return found


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
        "SELECT run_id FROM job_runs JOIN jobs USING (job_id) JOIN batches USING (batch_id)"
        f" WHERE {these} AND {BEGUN} AND loads > (SELECT count(*) FROM results WHERE results.run_id = job_runs.run_id"
        " AND results.status = 'done' AND results.job_id = jobs.job_id)",
        parameters,
    )
    return measured.intersection(run_ids).difference(run_id for (run_id,) in left)


RUN_COLUMNS = ("run_id", "partition", "backend", "model", "dtype", "max_new_tokens", "batch_size", "gpus", "sampling",
               "request_rate", "engine_options")  # fmt: skip


OF_THESE = "run_id IN (SELECT value FROM json_each(?))"


def _jobs_of_runs(store: Store, these: str) -> dict[str, list[dict[str, Any]]]:
    """The jobs that were to measure each run, with their batches, in the order of their submission; jobs that were only rendered
    are no jobs yet."""
    jobs: dict[str, list[dict[str, Any]]] = {}
    for job in store.rows(
        "SELECT job_runs.run_id, jobs.*, batches.executor, batches.intent_at, batches.submitted_at, batches.refused,"
        " batches.remedy, batches.host, batches.never_queued, batches.lost_answer,"
        " (SELECT max(restarts) FROM executions WHERE executions.job_id = jobs.job_id) AS restarts, given_to, given_as"
        " FROM job_runs JOIN jobs USING (job_id) JOIN batches USING (batch_id)"
        " LEFT JOIN given_runs ON given_runs.job_id = jobs.job_id AND given_runs.run_id = job_runs.run_id"
        f" WHERE job_runs.{OF_THESE} AND {BEGUN} ORDER BY coalesce(batches.intent_at, batches.created_at), task",
        [these],
    ):
        jobs.setdefault(job["run_id"], []).append(job)
    return jobs


def _results(store: Store, these: str) -> dict[str, list[dict[str, Any]]]:
    results: dict[str, list[dict[str, Any]]] = {}
    for row in store.rows(
        "SELECT run_id, attempt_id, job_id, status, node, started_at, ended_at, failure_kind, failure, remedy,"
        " (SELECT restarts FROM executions WHERE executions.attempt_id ="
        " substr(results.attempt_id, 1, instr(results.attempt_id || '.load', '.load') - 1)) AS restarts FROM results"
        f" WHERE {OF_THESE} ORDER BY ended_at",
        [these],
    ):
        results.setdefault(row["run_id"], []).append(row)
    return results


def _status(
    run: dict[str, Any], jobs: list[dict[str, Any]], results: list[dict[str, Any]], sources: Sources
) -> RunStatus:
    """A run's status from all jobs that were to measure it: what is still to come before what has failed before what is done."""
    status = RunStatus(**run, state=UNKNOWN)
    done = [result for result in results if result["status"] == "done"]
    left = _left(jobs, Counter(result["job_id"] for result in done))
    if left:
        told = [_status_of_job(run, job, results, sources) for job, _ in left]
        to_come = [one for one in told if one.may_come]
        status = min(to_come, key=lambda one: TOLD_FIRST.index(one.state)) if to_come else told[-1]
        loads = {job["job_id"]: count for job, count in left}
        status.jobs_to_come = tuple([one.job_id for one in to_come if one.job_id])
        status.unmeasured = {one.job_id: one.state for one in told if one.job_id and not one.may_come}
        status.loads_to_come = sum(loads[job_id] for job_id in status.jobs_to_come)
        status.loads_unmeasured = sum(loads[job_id] for job_id in status.unmeasured)
    elif done:
        status.state, status.node, status.since = DONE, done[-1]["node"], done[-1]["ended_at"]
        tell_the_job(status, next((job for job in jobs if job["job_id"] == done[-1]["job_id"]), None))
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


def _left(jobs: Sequence[dict[str, Any]], done: Mapping[str, int]) -> list[tuple[dict[str, Any], int]]:
    """The jobs that were to measure a run and have not in all of their engine loads, with how many these are. Without those whose
    run was given to another job that was claimed (else labctl was killed before), those in whose place another one did come back
    with it, and those after or before a job that a person started: of these the last one counts."""
    claimed = {job["job_id"] for job in jobs}
    brought = {job["given_to"] for job in jobs if done[job["job_id"]] >= job["loads"]}
    left = []
    for place, job in enumerate(jobs):
        count = job["loads"] - done[job["job_id"]]
        by_hand = any(later["intent_at"] is None for later in jobs[place + 1 :]) or (
            job["intent_at"] is None and job is not jobs[-1]
        )
        if count > 0 and not (by_hand or job["given_to"] in claimed or job["job_id"] in brought):
            left.append((job, count))
    return left


def _status_of_job(
    run: dict[str, Any], job: dict[str, Any], results: list[dict[str, Any]], sources: Sources
) -> RunStatus:
    """What one job makes of a run that it has not measured in all of its loads."""
    status = RunStatus(**run, state=UNKNOWN)
    tell_the_job(status, job)
    failed = [result for result in results if result["job_id"] == job["job_id"] and result["status"] != "done"]
    failed.sort(key=lambda result: result["restarts"] or 0)  # two starts may have been on nodes whose clocks differ
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


def _lost_turns(status: RunStatus, jobs: Sequence[dict[str, Any]]) -> list[str]:
    """Which jobs the run was taken from while they might still have measured it, or do so now."""
    slurm_ids = {job["job_id"]: job["slurm_id"] or job["job_id"] for job in jobs}
    lost = [
        job
        for job in jobs
        if job["given_to"] and (job["given_as"] == UNKNOWN or (job["state"] and job["state"] not in queue.ENDED))
    ]
    status.lost_turns = tuple([slurm_ids[job["job_id"]] for job in lost])
    return [
        f"job {slurm_ids[job['job_id']]} lost its turn to job {slurm_ids.get(job['given_to'], job['given_to'])}"
        for job in lost
    ]


# ---------------------------------------------------------------- choose
