"""Where each run stands, and why: Slurm's word, the worker's heartbeat and the records, put together.

Nothing is inferred from silence. What cannot be known now is `unknown` and keeps the last known state beside it; a run
fails only where a record, or Slurm, says so.
"""

from __future__ import annotations

import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from labctl_orchestrator import processes
from labctl_orchestrator.collect import STATE_COLUMNS, Collected, collect
from labctl_orchestrator.store import Store
from labctl_orchestrator.workspace import Workspace
from labctl_slurm import diagnose, queue
from labctl_slurm.errors import WrongUseError
from labctl_slurm.queue import JobState
from labctl_workers.record import Heartbeat, read_json, utc_now, write_json

LOOK_AT_FIRST_EVERY_S, LOOK_AT_LAST_EVERY_S = 0.5, 15.0
# A record may reach the login node some seconds after Slurm has called the job ended.
RECORD_MAY_BE_LATE_S = 30.0
HEARTBEAT_IS_OLD_AFTER_S = 60.0
SLURM_SHOWS_A_JOB_WITHIN_S = 30.0
SUBMISSION_TAKES_AT_MOST_S = 120.0

DONE, FAILED, CANCELLED, TIMEOUT, REFUSED = "done", "failed", "cancelled", "timeout", "refused"
PENDING, RUNNING, SUBMITTING, UNKNOWN, INTERRUPTED = "pending", "running", "submitting", "unknown", "interrupted"
FAILURE_STATES = {"cancelled": CANCELLED, "time-limit": TIMEOUT}
ENDED = frozenset({DONE, FAILED, CANCELLED, TIMEOUT, REFUSED, INTERRUPTED})
UNSUCCESSFUL = ENDED - {DONE}

# A batch that labctl submitted, or whose script a person did; one that was only rendered is none yet.
BEGUN = "(intent_at IS NOT NULL OR slurm_id IS NOT NULL OR jobs.job_id IN (SELECT job_id FROM executions))"


@dataclass
class RunStatus:
    """One run: `state` is one of this module's, `detail` why or what phase, `remedy` what to do where it failed."""

    run_id: str
    partition: str
    backend: str
    model: str
    dtype: str
    max_new_tokens: int
    batch_size: int
    sampling: str
    state: str
    detail: str = ""
    remedy: str = ""
    slurm_id: str | None = None
    node: str | None = None
    since: str | None = None
    job_id: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Refreshed:
    """What was learnt on the way: new records, damaged files, and queries that Slurm did not answer."""

    collected: Collected
    problems: list[str]


# ---------------------------------------------------------------- learn


def refresh(workspace: Workspace, store: Store) -> Refreshed:
    """Ask Slurm and the local processes, then read the files: a job that had ended when asked has its records there."""
    first = collect(workspace, store)
    unfinished = store.rows(
        "SELECT job_id, batch_id, slurm_id, process_start, state, executor, job_name, host, submitted_at"
        " FROM jobs JOIN batches USING (batch_id) WHERE slurm_id IS NOT NULL"
    )
    unfinished = [job for job in unfinished if job["state"] not in queue.ENDED]
    answer = queue.query(job["slurm_id"] for job in unfinished if job["executor"] == "slurm")
    observed = {}
    for job in unfinished:
        state = answer.jobs.get(job["slurm_id"]) if job["executor"] == "slurm" else _local_state(job)
        # A lost controller state makes Slurm count from the start again: the same id may be another job.
        if state is not None and (not state.name or state.name == job["job_name"]):
            observed[job["job_id"]] = (job["batch_id"], state)
    _remember(workspace, store, observed)
    if observed and not answer.problems:
        write_json(workspace.last_answer, {"at": utc_now()}, durable=False)
    second = collect(workspace, store) if unfinished else Collected()
    return Refreshed(Collected(first.records + second.records, second.damaged or first.damaged), answer.problems)


def _local_state(job: dict[str, Any]) -> JobState | None:
    if job["host"] != socket.gethostname():
        return None  # another machine's process: its records will tell
    pid = int(job["slurm_id"])
    if processes.is_alive(pid, job["process_start"]):
        return JobState(job["slurm_id"], "RUNNING", node=job["host"], started_at=job["submitted_at"])
    return JobState(job["slurm_id"], "COMPLETED", node=job["host"], started_at=job["submitted_at"], ended_at=utc_now())


def _remember(workspace: Workspace, store: Store, observed: dict[str, tuple[str, JobState]]) -> None:
    """Write what changed to each batch's states.json, from which the database takes it like any other file."""
    if not observed:
        return
    changed: dict[str, dict[str, JobState]] = {}
    known = {row["job_id"]: row for row in store.rows(f"SELECT job_id, {', '.join(STATE_COLUMNS)} FROM jobs")}
    for job_id, (batch_id, state) in observed.items():
        if any(known[job_id][column] != (getattr(state, column) or None) for column in STATE_COLUMNS[:-1]):
            changed.setdefault(batch_id, {})[job_id] = state
    if not changed:
        return
    now = utc_now()
    with store.writing():  # two labctl at once must not write one another's states away
        for batch_id, states in changed.items():
            path = workspace.batches / batch_id / "states.json"
            document = _states_in(path)
            for job_id, state in states.items():
                if document.get(job_id, {}).get("state") not in queue.ENDED:
                    columns = {column: getattr(state, column) or None for column in STATE_COLUMNS[:-1]}
                    document[job_id] = {**columns, "observed_at": now}
            write_json(path, document)


def _states_in(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = read_json(path)
    except (OSError, ValueError):
        return {}
    return document


# ---------------------------------------------------------------- tell


def statuses(workspace: Workspace, store: Store, run_ids: Sequence[str]) -> list[RunStatus]:
    """The status of each run that the store has, in the order given. Call `refresh` before."""
    jobs = _latest_jobs(store)
    results = _latest_results(store)
    rows = {row["run_id"]: row for row in store.rows("SELECT * FROM runs")}
    known = [run_id for run_id in run_ids if run_id in rows]
    return [_status(workspace, rows[run_id], jobs.get(run_id), results.get(run_id, [])) for run_id in known]


def _latest_jobs(store: Store) -> dict[str, dict[str, Any]]:
    """The last job that was to run each run, with its batch; jobs that were only rendered are no jobs yet."""
    jobs = store.rows(
        "SELECT job_runs.run_id, jobs.*, batches.executor, batches.intent_at, batches.submitted_at, batches.refused,"
        " batches.remedy, batches.host FROM job_runs JOIN jobs USING (job_id) JOIN batches USING (batch_id)"
        f" WHERE {BEGUN} ORDER BY coalesce(batches.intent_at, batches.created_at)"
    )
    return {job["run_id"]: job for job in jobs}


def _latest_results(store: Store) -> dict[str, list[dict[str, Any]]]:
    results: dict[str, list[dict[str, Any]]] = {}
    for row in store.rows(
        "SELECT run_id, attempt_id, job_id, status, node, started_at, ended_at, failure_kind, failure, remedy FROM results"
        " ORDER BY ended_at"
    ):
        results.setdefault(row["run_id"], []).append(row)
    return results


def _status(
    workspace: Workspace, run: dict[str, Any], job: dict[str, Any] | None, results: list[dict[str, Any]]
) -> RunStatus:
    columns = ("run_id", "partition", "backend", "model", "dtype", "max_new_tokens", "batch_size", "sampling")
    status = RunStatus(**{column: run[column] for column in columns}, state=UNKNOWN)
    if job is not None:
        status.job_id, status.slurm_id, status.node = job["job_id"], job["slurm_id"], job["node"]
    of_this_job = [result for result in results if job is not None and result["job_id"] == job["job_id"]]
    done = [result for result in (results if job is None else of_this_job) if result["status"] == "done"]
    if done:
        status.state, status.node, status.since = DONE, done[-1]["node"], done[-1]["ended_at"]
    elif job is None and results:
        _tell_failure(status, results[-1])
    elif job is None:
        status.detail = "neither a job nor a record is known"
    else:
        _tell_from_job(workspace, status, job, of_this_job)
    return status


def _tell_from_job(workspace: Workspace, status: RunStatus, job: dict[str, Any], results: list[dict[str, Any]]) -> None:
    state = job["state"]
    beat = heartbeat(workspace, job)
    failure = results[-1] if results else None
    if failure is not None and beat is not None and beat.attempt_id > failure["attempt_id"]:
        failure = None  # of an execution before the present one
    if job["refused"]:
        status.state, status.detail, status.remedy = REFUSED, job["refused"], job["remedy"] or ""
        status.since = job["submitted_at"]
    elif job["slurm_id"] is None and job["intent_at"] is not None:
        _tell_of_no_id(status, job)
    elif job["slurm_id"] is None:
        _tell_by_hand(status, beat, failure)
    elif state in queue.WAITING:
        status.state, status.detail, status.since = PENDING, job["reason"] or "", job["submitted_at"]
    elif failure is not None:
        _tell_failure(status, failure)
    elif state in queue.ENDED:
        _tell_of_an_end(status, job)
    elif state is None:
        status.since = job["submitted_at"]
        if _age_s(status.since) < SLURM_SHOWS_A_JOB_WITHIN_S:
            local = job["executor"] == "local"
            status.state, status.detail = PENDING, "starting" if local else "accepted, not in the queue's list yet"
        else:
            status.detail = "Slurm does not show this job"
    else:
        _tell_of_running(status, job, beat)


def _tell_failure(status: RunStatus, failure: dict[str, Any]) -> None:
    status.state = FAILURE_STATES.get(failure["failure_kind"], FAILED)
    status.detail, status.remedy = failure["failure"] or "", failure["remedy"] or ""
    status.since, status.node = failure["ended_at"], failure["node"]


def _tell_of_no_id(status: RunStatus, job: dict[str, Any]) -> None:
    status.since = job["intent_at"]
    if _age_s(job["intent_at"]) < SUBMISSION_TAKES_AT_MOST_S:
        status.state, status.detail = SUBMITTING, "labctl submit is about to call sbatch"
        return
    status.state = INTERRUPTED
    status.detail = "labctl was ended while it submitted this job; whether Slurm has it is not known"
    status.remedy = f"squeue --name=labctl-{job['batch_id']} shows it if so; submit again with --again if not"


def _tell_by_hand(status: RunStatus, beat: Heartbeat | None, failure: dict[str, Any] | None) -> None:
    """A worker that a person started without Slurm (labctl run): its records and its heartbeat are all there is."""
    if failure is not None:
        _tell_failure(status, failure)
    elif beat is None or beat.phase == "ended" or _age_s(beat.at) > HEARTBEAT_IS_OLD_AFTER_S:
        status.state = FAILED if beat is not None and beat.phase == "ended" else UNKNOWN
        status.since = None if beat is None else beat.at
        status.detail = "started by hand, and ended or was ended without a record"
    else:
        status.state, status.detail, status.since = RUNNING, f"started by hand: {beat.phase}", beat.at


def _tell_of_an_end(status: RunStatus, job: dict[str, Any]) -> None:
    status.since = job["ended_at"] or job["observed_at"]
    late = job["state"] == "COMPLETED" and _age_s(status.since) < RECORD_MAY_BE_LATE_S
    if late and job["executor"] != "local":  # a local job's files are on this machine
        status.state, status.detail = RUNNING, "the job ended; its record has not reached this machine yet"
        return
    named = {"CANCELLED": CANCELLED, "TIMEOUT": TIMEOUT}
    status.state = named.get(job["state"], FAILED)
    if job["executor"] == "local":
        status.detail, status.remedy = "the worker ended without a record", "labctl logs shows its last words"
        return
    status.detail, status.remedy = diagnose.explain(
        JobState(job["slurm_id"], job["state"], reason=job["reason"] or "", exit_code=job["exit_code"])
    )


def _tell_of_running(status: RunStatus, job: dict[str, Any], beat: Heartbeat | None) -> None:
    status.state, status.since = RUNNING, job["started_at"]
    if beat is None:
        status.state = PENDING if job["executor"] == "local" else RUNNING
        status.detail = "the worker has not started yet"
    elif beat.run_id in (None, status.run_id):
        status.detail = f"{beat.phase} ({beat.done}/{beat.total} runs of the job done)"
    else:
        status.detail = f"waits for its turn in the job ({beat.done}/{beat.total} done)"
    if beat is not None and beat.phase.startswith("waiting"):
        status.state = PENDING
    if beat is not None:
        status.node = status.node or beat.host


def heartbeat(workspace: Workspace, job: dict[str, Any]) -> Heartbeat | None:
    """The worker's last sign of life in the job's present execution; None where it gave none."""
    path = workspace.batches / job["batch_id"] / "heartbeats" / f"{job['task']}.json"
    try:
        return Heartbeat.from_json(read_json(path))
    except (OSError, ValueError, TypeError):
        return None


def _age_s(time: str | None) -> float:
    if time is None:
        return float("inf")
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()


def summary(found: Sequence[RunStatus]) -> str:
    """ "3 runs: 2 done, 1 running"."""
    counts = Counter(run.state for run in found)
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    return f"{len(found)} run{'s' if len(found) != 1 else ''}: {told or 'none'}"


def wait(workspace: Workspace, store: Store, run_ids: Sequence[str]) -> set[str]:
    """Wait until every run has ended; returns the set of their states. Tells each change on the error stream."""
    if not run_ids:
        return set()
    told = ""
    pause_s = LOOK_AT_FIRST_EVERY_S
    while True:
        refresh(workspace, store)
        found = statuses(workspace, store, run_ids)
        now = summary(found)
        if now != told:
            print(now, file=sys.stderr, flush=True)
            told, pause_s = now, LOOK_AT_FIRST_EVERY_S
        if all(run.state in ENDED for run in found):
            return {run.state for run in found}
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.2, LOOK_AT_LAST_EVERY_S)  # a controller has better things to do than to answer us


# ---------------------------------------------------------------- choose


def chosen_runs(store: Store, names: Sequence[str], *, everything: bool = False) -> tuple[str, list[str]]:
    """(a title, the run ids) meant by ids or names; by default those of the latest request.

    A word may be a run id or the beginning of one, a request's id or name, or a Slurm id. Raises WrongUseError for one that
    is none of them.
    """
    if everything:
        return "all runs", [row["run_id"] for row in store.rows(_RUNS_BY_TIME)]
    if names:
        found = [run_id for name in names for run_id in _named(store, name)]
        return ", ".join(names), list(dict.fromkeys(found))
    latest = store.rows("SELECT request_id, name FROM requests ORDER BY created_at DESC, request_id DESC LIMIT 1")
    if latest:
        request = latest[0]
        return request["name"] or request["request_id"], _runs_of(store, request["request_id"])
    runs = [row["run_id"] for row in store.rows(_RUNS_BY_TIME)]  # rendered and submitted by hand
    if not runs:
        raise WrongUseError("nothing was submitted in this workspace yet", "labctl submit --help shows how")
    return "all runs", runs


_RUNS_BY_TIME = (
    "SELECT run_id, min(coalesce(intent_at, batches.created_at)) AS at FROM job_runs JOIN jobs USING (job_id)"
    f" JOIN batches USING (batch_id) WHERE {BEGUN} GROUP BY run_id"
    " ORDER BY at, batch_id, task, position"
)


def _named(store: Store, name: str) -> list[str]:
    if not name.strip():
        raise WrongUseError("an empty word names no run", "give a run id, a request's name or a Slurm id")
    requests = store.rows(
        "SELECT request_id FROM requests WHERE request_id = ? OR name = ? ORDER BY created_at DESC", (name, name)
    )
    if requests:
        return _runs_of(store, requests[0]["request_id"])
    jobs = store.rows(
        "SELECT run_id FROM job_runs JOIN jobs USING (job_id) WHERE slurm_id = ?"
        " OR substr(slurm_id, 1, length(?) + 1) = ? || '_' OR job_id = ?"
        " ORDER BY task, position",
        (name, name, name, name),
    )
    if jobs:
        return [job["run_id"] for job in jobs]
    runs = store.rows("SELECT run_id FROM runs WHERE substr(run_id, 1, ?) = ?", (len(name), name.lower()))
    if len(runs) == 1 or (runs and len(name) >= 4):
        return [run["run_id"] for run in runs]
    if runs:
        raise WrongUseError(f"{len(runs)} runs begin with {name!r}", "give at least four digits of the run id")
    raise WrongUseError(
        f"no run, request, name or Slurm id here is {name!r}", "labctl status --all lists what this workspace has"
    )


def _runs_of(store: Store, request_id: str) -> list[str]:
    rows = store.rows("SELECT run_id FROM request_runs WHERE request_id = ? ORDER BY position", (request_id,))
    return [row["run_id"] for row in rows]


def one_run(store: Store, name: str) -> str:
    """The one run that `name` means. Raises WrongUseError where it means several."""
    runs = list(dict.fromkeys(_named(store, name)))
    if len(runs) > 1:
        raise WrongUseError(f"{name!r} means {len(runs)} runs: {', '.join(runs[:4])}…", "give the id of one of them")
    return runs[0]
