"""Where each run stands, and why: Slurm's word, the worker's heartbeat and the records, put together.

Nothing is inferred from silence. What cannot be known now is `unknown` and keeps the last known state beside it; a run
fails only where a record, or Slurm, says so.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from labctl_orchestrator.store import documents
from labctl_orchestrator.store.collect import (
    CHARACTER_AFTER_ALL,
    STATE_COLUMNS,
    Collected,
    collect,
    collect_new,
    take_states,
)
from labctl_orchestrator.store.database import Store, of_runs
from labctl_orchestrator.store.views import HERE
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking import processes
from labctl_orchestrator.tracking.diagnosis import Diagnoses
from labctl_slurm import diagnose, queue
from labctl_slurm.command import Cluster
from labctl_slurm.diagnose import Diagnosis
from labctl_slurm.errors import WrongUseError
from labctl_slurm.queue import Identity, JobState
from labctl_workers.record import Heartbeat, read_bytes, read_json, utc_now, write_json

LOOK_AT_FIRST_EVERY_S, LOOK_AT_LAST_EVERY_S = 0.5, 15.0
# A record may reach the login node some seconds after Slurm has called the job ended.
RECORD_MAY_BE_LATE_S = 30.0
HEARTBEAT_IS_OLD_AFTER_S = 60.0
# The clocks of two machines say nothing of less than this.
CLOCKS_DIFFER_BY_AT_MOST_S = 900.0
SLURM_SHOWS_A_JOB_WITHIN_S = 30.0
SUBMISSION_TAKES_AT_MOST_S = 120.0
# Long enough for what a killed sbatch had sent to show in the queue.
SBATCH_REACHES_SLURM_WITHIN_S = 5.0
# A job that Slurm has no more may still be in what its accounting has yet to write.
LOST_AFTER_S = 60.0
FORGET_AFTER_S = 86400.0
ACCOUNTING_IS_LATE_AT_MOST_S = 120.0
# The controller keeps an ended job for some minutes (MinJobAge), in which it can be put back into the queue.
MAY_BE_REQUEUED_S = 600.0

DONE, FAILED, CANCELLED, TIMEOUT, REFUSED = "done", "failed", "cancelled", "timeout", "refused"
PENDING, RUNNING, SUBMITTING, UNKNOWN = "pending", "running", "submitting", "unknown"
SUSPENDED = "suspended"
INTERRUPTED, MISSING = "interrupted", "missing"
FAILURE_STATES = {"cancelled": CANCELLED, "time-limit": TIMEOUT}
ENDED = frozenset({DONE, FAILED, CANCELLED, TIMEOUT, REFUSED, INTERRUPTED, MISSING})
UNSUCCESSFUL = ENDED - {DONE}

# A batch that labctl submitted, or whose script a person did; one that was only rendered is none yet.
BEGUN = "(intent_at IS NOT NULL OR slurm_id IS NOT NULL OR jobs.job_id IN (SELECT job_id FROM executions))"


@dataclass
class RunStatus:
    """One run: `state` is one of this module's, `detail` why or what phase, `remedy` what to do where it failed, or waits for
    what never comes; `kind` is the reason for programs (labctl_slurm/reasons.toml, or the worker's own), `last_lines` the log's
    where it is not known; `requeues` is how often Slurm started its job again; a run that is `lost` is unknown, and nothing more
    is to come of its job; the job of one that is `held` waits until it is released. `loads_measured`,
    `loads_to_come` and `loads_unmeasured` are engine loads: with a result, still expected of `jobs_to_come`, and missing from the
    jobs that ended or were lost (`unmeasured`: their ids with their states); `lost_turns` are the Slurm ids of jobs that the run
    was taken from."""

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
    kind: str = ""
    last_lines: tuple[str, ...] = ()
    slurm_id: str | None = None
    node: str | None = None
    since: str | None = None
    job_id: str | None = None
    requeues: int = 0
    lost: bool = False
    held: bool = False
    loads_measured: int = 0
    loads_to_come: int = 0
    loads_unmeasured: int = 0
    jobs_to_come: tuple[str, ...] = ()
    unmeasured: dict[str, str] = field(default_factory=dict)
    lost_turns: tuple[str, ...] = ()
    gpus: int = 0
    request_rate: float | None = None
    engine_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def may_come(self) -> bool:
        """Whether a result may yet come without anything being done."""
        return self.state not in ENDED and not self.lost

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# Jobs that Slurm has started more than once.
RESTARTED = "SELECT job_id FROM executions WHERE restarts > 0"


@dataclass
class Refreshed:
    """What was learnt on the way: new records, damaged files, and queries that Slurm did not answer."""

    collected: Collected
    problems: list[str]


# ---------------------------------------------------------------- learn


# To list the folders of more runs takes longer than to look whether any folder changed.
RUNS_LOOKED_AT_APART = 5000


def refresh(workspace: Workspace, store: Store, run_ids: Sequence[str] | None = None) -> Refreshed:
    """Ask Slurm and the local processes, then read the files: a job that had ended when asked has its records there.

    With `run_ids`, only of these runs, their jobs and batches; of all where there are many, or some were imported.
    """
    if run_ids is not None and not _looked_at_apart(run_ids):
        run_ids = None
    first = collect(workspace, store) if run_ids is None else collect_of(workspace, store, run_ids)
    batches = None if run_ids is None else _batches_of(store, run_ids)
    jobs = _jobs_that_may_change(store, run_ids)
    open_jobs = [job for job in jobs if _is_asked_for(job)]
    half_made = [batch for batch in _not_submitted(store) if _submitter_is_gone(workspace, batch)]
    by_hand = rendered(store)
    if batches is not None:
        half_made = [batch for batch in half_made if batch["batch_id"] in batches]
        by_hand = [batch for batch in by_hand if batch["batch_id"] in batches]
    asked_at = utc_now()
    answer = _ask_slurm(open_jobs, [job for job in jobs if ended_lately(job)], half_made, by_hand)
    observed = _observed(open_jobs, answer) | _started_again(jobs, answer, asked_at)
    _remember(workspace, store, observed)
    if observed and not answer.problems and workspace.writable:
        _is_written(workspace.last_answer, {"at": utc_now()})
    settled = [_settle(workspace, batch, answer) for batch in half_made]
    settled += [_take_by_hand(workspace, batch, answer) for batch in by_hand]
    if any(settled):
        return refresh(workspace, store, run_ids)  # the jobs that are known of now are asked for
    asked_of = {*observed, *(job["job_id"] for job in open_jobs)}
    second = _collect_of(workspace, store, [job for job in jobs if job["job_id"] in asked_of])
    return Refreshed(Collected(first.records + second.records, second.damaged or first.damaged), answer.problems)


# A controller keeps what has ended for some minutes, or as long as its MinJobAge says.
SLURM_KEEPS_AT_MOST = timedelta(days=7)


def _jobs_that_may_change(store: Store, run_ids: Sequence[str] | None) -> list[dict[str, Any]]:
    """The jobs that have an id, but for those that ended long ago."""
    since = (datetime.now(UTC) - SLURM_KEEPS_AT_MOST).date().isoformat()
    ended = ", ".join(f"'{state}'" for state in sorted(queue.ENDED))
    sql = (
        "SELECT job_id, batch_id, slurm_id, process_start, state, exit_code, ended_at, gone_since, observed_at, executor,"
        f" job_name, host, submitted_at, queued_at, mark, clusters, job_id IN ({RESTARTED}) AS restarted"
        " FROM jobs JOIN batches USING (batch_id) WHERE slurm_id IS NOT NULL"
        f" AND (state IS NULL OR state NOT IN ({ended}) OR ended_at IS NULL OR ended_at >= ?)"
    )
    if run_ids is None:
        return store.rows(sql, (since,))
    return store.rows(f"{sql} AND job_id IN ({JOBS_OF_RUNS})", (since, json.dumps(run_ids)))


JOBS_OF_RUNS = "SELECT job_id FROM job_runs WHERE run_id IN (SELECT value FROM json_each(?))"


def _looked_at_apart(run_ids: Sequence[str]) -> bool:
    return len(run_ids) <= RUNS_LOOKED_AT_APART and not any("@" in run_id for run_id in run_ids)


def collect_of(workspace: Workspace, store: Store, run_ids: Sequence[str]) -> Collected:
    """Take in what is new of these runs, their jobs and batches, and every request and batch that the index does not have."""
    if not _looked_at_apart(run_ids):
        return collect(workspace, store)
    new = collect_new(workspace, store)
    found = collect(workspace, store, batches=_batches_of(store, run_ids), runs=run_ids)
    found.damaged += [damaged for damaged in new.damaged if damaged not in found.damaged]
    return found


def _batches_of(store: Store, run_ids: Sequence[str]) -> set[str]:
    sql = f"SELECT DISTINCT batch_id FROM jobs WHERE job_id IN ({JOBS_OF_RUNS})"
    return {batch_id for (batch_id,) in store.tuples(sql, (json.dumps(run_ids),))}


def refresh_chosen(
    workspace: Workspace, store: Store, names: Sequence[str], *, everything: bool = False
) -> tuple[Refreshed, str, list[str]]:
    """(what `refresh` learnt, a title, the run ids of `chosen_runs`): the rest of the workspace is not looked at, but
    where everything is asked for, or a name that the index does not know."""
    if everything:
        return refresh(workspace, store), *chosen_runs(store, (), everything=True)
    collect_new(workspace, store)  # what it could not read, `refresh` names
    try:
        title, run_ids = chosen_runs(store, names)
        known = bool(names) or title != ALL_RUNS
    except WrongUseError:
        known = False
    learnt = refresh(workspace, store, run_ids if known else None)
    return learnt, *chosen_runs(store, names)


def _collect_of(workspace: Workspace, store: Store, jobs: Sequence[dict[str, Any]]) -> Collected:
    """What the workers of these jobs have written since."""
    if not jobs:
        return Collected()
    of_jobs = "SELECT DISTINCT run_id FROM job_runs WHERE job_id IN (SELECT value FROM json_each(?))"
    runs = [run_id for (run_id,) in store.tuples(of_jobs, (json.dumps([job["job_id"] for job in jobs]),))]
    return collect(workspace, store, batches={job["batch_id"] for job in jobs}, runs=runs)


def _ask_slurm(
    open_jobs: Sequence[dict[str, Any]],
    ended_lately: Sequence[dict[str, Any]],
    half_made: Sequence[dict[str, Any]],
    by_hand: Sequence[dict[str, Any]],
) -> _Answers:
    """What each cluster says of its jobs. A submission that may be on several is looked for on each."""
    jobs = [job for job in open_jobs if job["executor"] == "slurm"]
    lost = [batch for batch in half_made if batch["executor"] == "slurm"]
    looked_at = [*by_hand, *(job for job in ended_lately if job["executor"] == "slurm")]
    answers = _Answers()
    for cluster in dict.fromkeys(cluster for row in (*jobs, *lost, *looked_at) for cluster in clusters_of(row)):
        here = [job for job in jobs if cluster in clusters_of(job)]
        names = [batch["job_name"] for batch in lost if cluster in clusters_of(batch)]
        look = [row for row in looked_at if cluster in clusters_of(row)]
        answers.add(
            cluster,
            queue.query(
                [(job["slurm_id"], job["job_name"]) for job in here],
                names,
                look=bool(look),
                restarted={(job["slurm_id"], job["job_name"]) for job in here if job["restarted"]},
                identities=[
                    Identity(row["job_name"], row["mark"] or "", row.get("slurm_id") or "", row.get("queued_at"))
                    for row in (*here, *lost, *look)
                ],
                cluster=cluster,
            ),
        )
    for batch in lost:
        name = batch["job_name"]
        if all(name in answers.nowhere_on.get(cluster, ()) for cluster in clusters_of(batch)):
            answers.nowhere.add(name)
    return answers


@dataclass
class _Answers(queue.Answer):
    """What all clusters said. `found_on` is the cluster of each name that was found; `nowhere` are the names that none has."""

    found_on: dict[str, Cluster | None] = field(default_factory=dict)
    nowhere_on: dict[Cluster | None, set[str]] = field(default_factory=dict)

    def add(self, cluster: Cluster | None, answer: queue.Answer) -> None:
        self.jobs |= answer.jobs
        self.shown |= answer.shown
        self.gone |= answer.gone
        self.problems += [problem for problem in answer.problems if problem not in self.problems]
        self.nowhere_on[cluster] = answer.nowhere
        for name, ids in answer.named.items():
            self.named.setdefault(name, ids)
            self.found_on.setdefault(name, cluster)


def clusters_of(row: Mapping[str, Any]) -> list[Cluster | None]:
    """The clusters that a batch may be on, one where it is known; None is the one that the shell means."""
    return [*map(Cluster.from_json, json.loads(row["clusters"] or "[]"))] or [None]


def _is_asked_for(job: dict[str, Any]) -> bool:
    """Whether Slurm has more to tell of this job: it has not ended, or only the controller has told of its end so far, which
    knows neither an exit code, nor who cancelled it, nor for how long earlier starts held the node; the accounting, where there
    is one, tells some seconds later."""
    if job["state"] not in queue.ENDED:
        return not is_forgotten(job)
    more_to_tell = job["state"] != "COMPLETED" or job["restarted"]
    told_in_part = job["executor"] == "slurm" and more_to_tell and job["exit_code"] is None
    return told_in_part and _ended_within(ACCOUNTING_IS_LATE_AT_MOST_S, job)


def is_forgotten(job: dict[str, Any]) -> bool:
    """Whether Slurm has had this job no more for so long that it is not asked for again."""
    return job["gone_since"] is not None and _age_s(job["gone_since"]) > FORGET_AFTER_S


def ended_lately(job: dict[str, Any]) -> bool:
    """Whether the controller may still have this job, which has ended, and put it back into the queue."""
    return job["state"] in queue.ENDED and _ended_within(MAY_BE_REQUEUED_S, job)


def _ended_within(seconds: float, job: dict[str, Any]) -> bool:
    """Whether a job has ended so lately: labctl has known of its end for less, and the controller's clock does not tell of one
    long ago."""
    known_s, told_s = _age_s(job["observed_at"]), _age_s(job["ended_at"] or job["observed_at"])
    return known_s < seconds and told_s < seconds + CLOCKS_DIFFER_BY_AT_MOST_S


def _observed(open_jobs: Sequence[dict[str, Any]], answer: queue.Answer) -> dict[str, _Observed]:
    """What is known now of the jobs that had not ended: (batch, columns) by job."""
    found = {}
    for job in open_jobs:
        local = job["executor"] == "local"
        state = _local_state(job) if local else answer.jobs.get((job["slurm_id"], job["job_name"]))
        if state is not None:
            found[job["job_id"]] = _Observed(job["batch_id"], _columns(state))
        elif (job["slurm_id"], job["job_name"]) in answer.gone and job["gone_since"] is None:
            found[job["job_id"]] = _Observed(job["batch_id"], {"gone_since": utc_now()})
    return found


def _started_again(jobs: Sequence[dict[str, Any]], answer: queue.Answer, asked_at: str) -> dict[str, _Observed]:
    """Jobs that had ended before Slurm was asked, and of which it says otherwise now: somebody has put them back into the queue
    (scontrol requeue), or the controller was killed, forgot that they ended, and ran them again."""
    found = {}
    for job in jobs:
        state = answer.shown.get((job["slurm_id"], job["job_name"])) if job["state"] in queue.ENDED else None
        if state is None or state.state == job["state"]:
            continue
        if _comes_before(job["observed_at"], asked_at):
            found[job["job_id"]] = _Observed(job["batch_id"], _columns(state), revives=True)
    return found


@dataclass(frozen=True)
class _Observed:
    batch_id: str
    columns: dict[str, str | float | None]
    revives: bool = False


def _columns(state: JobState) -> dict[str, str | float | None]:
    told = {column: getattr(state, column) for column in STATE_COLUMNS if hasattr(state, column)}
    return {column: None if value == "" else value for column, value in told.items()}


def _local_state(job: dict[str, Any]) -> JobState | None:
    if job["host"] != socket.gethostname():
        return None  # another machine's process: its records will tell
    pid = int(job["slurm_id"])
    if processes.is_alive(pid, job["process_start"]):
        return JobState(job["slurm_id"], "RUNNING", node=job["host"], started_at=job["submitted_at"])
    return JobState(job["slurm_id"], "COMPLETED", node=job["host"], started_at=job["submitted_at"], ended_at=utc_now())


def _remember(workspace: Workspace, store: Store, observed: dict[str, _Observed]) -> None:
    """Write what changed to each batch's states.json, from which the database takes it like any other file."""
    if not observed:
        return
    changed: dict[str, dict[str, _Observed]] = {}
    sql = f"SELECT job_id, {', '.join(STATE_COLUMNS)} FROM jobs WHERE job_id IN (SELECT value FROM json_each(?))"
    known = {row["job_id"]: row for row in store.rows(sql, (json.dumps(list(observed)),))}
    for job_id, seen in observed.items():
        told = {"gone_since": None, **seen.columns}
        if any(known[job_id][column] != value for column, value in told.items()):
            changed.setdefault(seen.batch_id, {})[job_id] = seen
    if not changed:
        return
    now = utc_now()
    with store.writing():  # two labctl at once must not write one another's states away
        for batch_id, states in changed.items():
            path = workspace.batches / batch_id / "states.json"
            try:
                document = _states_at(path)
            except OSError:  # written again, it would lose what it holds: Slurm is asked again
                continue
            for job_id, seen in states.items():
                before = document.get(job_id, {})
                if before.get("state") in queue.ENDED and not (seen.revives or _completes(before, seen)):
                    continue
                # A job that is gone keeps what was last known of it, and when.
                document[job_id] = (
                    {**before, **seen.columns}
                    if "state" not in seen.columns
                    else {**seen.columns, "gone_since": None, "observed_at": now}
                )
            # What cannot be written is kept for this answer: the index takes it, and Slurm is asked again.
            if not workspace.writable or not _is_written(path, document):
                take_states(store, document)


def _is_written(path: Path, document: Any) -> bool:
    try:
        write_json(path, document, parents=False)
    except OSError:
        return False
    return True


def _states_at(path: Path) -> dict[str, Any]:
    """The states that are known of a batch's jobs; none where there is no file or a damaged one: Slurm is asked for them again.
    Raises OSError where it cannot be read now."""
    try:
        known = documents.read(read_bytes(path), dict[str, documents.State])
    except (FileNotFoundError, ValueError):
        return {}
    return {job_id: msgspec.structs.asdict(state) for job_id, state in known.items()}


def _completes(before: dict[str, Any], seen: _Observed) -> bool:
    """Whether what was seen is the same end, told by the accounting after the controller."""
    same = seen.columns.get("state") == before["state"]
    return same and before.get("exit_code") is None and seen.columns.get("exit_code") is not None


def note_cancelled(workspace: Workspace, store: Store, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Write down that these local jobs were cancelled: of Slurm's jobs Slurm tells it, a process leaves no word."""
    now = utc_now()
    end = {"state": "CANCELLED", "reason": f"by {os.getuid()}", "ended_at": now}
    observed = {
        job["job_id"]: _Observed(job["batch_id"], {**end, "node": job["host"], "started_at": job["started_at"]})
        for job in jobs
        if job["executor"] == "local"
    }
    _remember(workspace, store, observed)


# ---------------------------------------------------------------- submissions that were cut off


def _not_submitted(store: Store) -> list[dict[str, Any]]:
    return store.rows(
        "SELECT batch_id, executor, job_name, intent_at, mark, clusters, lost_answer FROM batches"
        " WHERE intent_at IS NOT NULL AND submitted_at IS NULL"
    )


def _submitter_is_gone(workspace: Workspace, batch: dict[str, Any]) -> bool:
    """Whether nobody will write down any more what Slurm said: the labctl that submitted it has ended, and its sbatch too."""
    if batch["lost_answer"]:
        return True
    age_s = _age_s(batch["intent_at"])
    folder = workspace.batches / batch["batch_id"]
    try:
        intent = documents.read(read_bytes(folder / "intent.json"), documents.Intent)
    except (OSError, ValueError):
        return age_s > SUBMISSION_TAKES_AT_MOST_S
    if intent.host != socket.gethostname():
        return age_s > SUBMISSION_TAKES_AT_MOST_S
    if processes.is_alive(intent.pid, intent.pid_start):
        return False
    return age_s > SBATCH_REACHES_SLURM_WITHIN_S and not processes.some_runs("sbatch", str(folder))


def rendered(store: Store) -> list[dict[str, Any]]:
    """Batches of Slurm's whose script was printed and that labctl has not submitted: a person may have done so."""
    return store.rows(
        "SELECT batch_id, executor, job_name, mark, clusters FROM batches WHERE intent_at IS NULL AND submitted_at IS NULL"
        " AND executor = 'slurm' AND batch_id NOT IN (SELECT batch_id FROM jobs WHERE slurm_id IS NOT NULL)"
    )


def _take_by_hand(workspace: Workspace, batch: dict[str, Any], answer: queue.Answer) -> bool:
    """Write down the Slurm ids of a script that labctl printed and a person submitted, where Slurm has it."""
    path = workspace.batches / batch["batch_id"] / "submitted.json"
    seen = [
        job for (_, name), job in answer.shown.items() if name == batch["job_name"] and job.state not in queue.ENDED
    ]
    if not seen or not workspace.writable or path.exists():
        return False
    ids = _ids_of(path.parent, [job.slurm_id for job in seen])
    write_json(path, {"ids": ids, "at": seen[0].queued_at or utc_now(), "host": socket.gethostname()}, parents=False)
    return True


def _settle(workspace: Workspace, batch: dict[str, Any], answer: _Answers) -> bool:
    """Write down what became of a submission that was cut off, where that is known now: its Slurm ids, or that it has none."""
    folder = workspace.batches / batch["batch_id"]
    if (folder / "submitted.json").exists() or not workspace.writable:
        return False
    told: dict[str, Any] = {"at": batch["intent_at"], "host": socket.gethostname()}
    if batch["executor"] == "local":
        told["ids"] = local_ids(folder)
        told["starts"] = [None if pid is None else processes.start_of(int(pid)) for pid in told["ids"]]
    elif batch["job_name"] in answer.named:
        told["ids"] = _ids_of(folder, answer.named[batch["job_name"]])
        cluster = answer.found_on[batch["job_name"]]
        told |= {"clusters": [cluster.to_json()]} if cluster is not None else {}
    elif batch["job_name"] in answer.nowhere and batch["lost_answer"]:
        lost = json.loads(batch["lost_answer"])
        if _age_s(batch["intent_at"]) < lost["late_s"]:
            return False  # what sbatch sent may still be on its way
        told |= {"refused": f"Slurm does not have this job: {lost['message']}", "remedy": RETRY}
    elif batch["job_name"] in answer.nowhere:
        told["never_queued"] = utc_now()
    else:
        return False  # Slurm did not answer: not known yet
    write_json(folder / "submitted.json", told, parents=False)
    return True


RETRY = "labctl retry submits it"


def _ids_of(folder: Path, seen: Sequence[str]) -> list[str]:
    """The ids of a batch's jobs in order, from those of some of them."""
    tasks = int(read_json(folder / "batch.json")["tasks"])
    parent = seen[0].split("_")[0]
    return [parent] if tasks == 1 else [f"{parent}_{task}" for task in range(tasks)]


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except (OSError, ValueError):
        return b""


def local_ids(folder: Path) -> list[str | None]:
    """The process ids of a batch's local jobs, in order; None for one that was not started. submitit names each job's pickle
    after its process, and the pickle holds the path of the job's JSON."""
    tasks = int(read_json(folder / "batch.json")["tasks"])
    found: dict[int, str] = {}
    for pickle in (folder / "submitit").glob("*_submitted.pkl"):
        named = re.search(rb"/(\d+)\.json", _content(pickle))
        if named is not None:
            found[int(named[1])] = pickle.name.partition("_")[0]
    return [found.get(task) for task in range(tasks)]


# ---------------------------------------------------------------- tell


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
    sources = _Sources(workspace, Diagnoses(workspace))
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


@dataclass
class _Sources:
    """What is looked up beside the store: each job's heartbeat, once, when the last ones were seen, and the logs."""

    workspace: Workspace
    diagnoses: Diagnoses
    _beats: dict[str, Heartbeat | None] = field(default_factory=dict)
    _heard: dict[str, documents.Heard] | None = None
    _heard_anew: bool = False

    def beat(self, job: dict[str, Any]) -> Heartbeat | None:
        if job["job_id"] not in self._beats:
            self._beats[job["job_id"]] = heartbeat(self.workspace, job) if _may_beat(job) else None
        return self._beats[job["job_id"]]

    def gives_signs_of_life(self, job: dict[str, Any]) -> bool | None:
        """Whether the job's worker goes on, by its heartbeats; None where they do not tell yet. Of a worker on another machine,
        what counts is how long this one has seen no new heartbeat."""
        beat = self.beat(job)
        if beat is None or beat.phase == "ended":
            return False
        age_s = _age_s(beat.at)
        if beat.host == socket.gethostname() or age_s > HEARTBEAT_IS_OLD_AFTER_S + CLOCKS_DIFFER_BY_AT_MOST_S:
            return age_s < HEARTBEAT_IS_OLD_AFTER_S
        if self._heard is None:
            self._heard = documents.heard_at(self.workspace.heard)
        last = self._heard.get(job["job_id"])
        if last is None or last.at != beat.at:
            last = self._heard[job["job_id"]] = documents.Heard(beat.at, utc_now(), came_anew=last is not None)
            self._heard_anew = True
        silent = _age_s(last.seen_at) > HEARTBEAT_IS_OLD_AFTER_S
        if abs(age_s) < HEARTBEAT_IS_OLD_AFTER_S or (last.came_anew and not silent):
            return True
        return False if silent else None

    def keep(self) -> None:
        """Keep what was found out for the next look."""
        self.diagnoses.keep()
        if self._heard and self._heard_anew and self.workspace.writable:
            _is_written(self.workspace.heard, {job: msgspec.structs.asdict(one) for job, one in self._heard.items()})


RUN_COLUMNS = ("run_id", "partition", "backend", "model", "dtype", "max_new_tokens", "batch_size", "gpus", "sampling",
               "request_rate", "engine_options")  # fmt: skip


def _may_beat(job: dict[str, Any]) -> bool:
    return job["state"] not in queue.WAITING and job["state"] not in queue.ENDED


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
    run: dict[str, Any], jobs: list[dict[str, Any]], results: list[dict[str, Any]], sources: _Sources
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
        _tell_the_job(status, next((job for job in jobs if job["job_id"] == done[-1]["job_id"]), None))
    elif results:
        _tell_failure(status, None, results[-1], sources.diagnoses)
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
    run: dict[str, Any], job: dict[str, Any], results: list[dict[str, Any]], sources: _Sources
) -> RunStatus:
    """What one job makes of a run that it has not measured in all of its loads."""
    status = RunStatus(**run, state=UNKNOWN)
    _tell_the_job(status, job)
    failed = [result for result in results if result["job_id"] == job["job_id"] and result["status"] != "done"]
    failed.sort(key=lambda result: result["restarts"] or 0)  # two starts may have been on nodes whose clocks differ
    _tell_from_job(status, job, failed, sources)
    return status


def _tell_the_job(status: RunStatus, job: dict[str, Any] | None) -> None:
    if job is not None:
        status.job_id, status.slurm_id, status.node = job["job_id"], job["slurm_id"], status.node or job["node"]
        status.requeues = job["restarts"] or 0


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


def _tell_from_job(
    status: RunStatus,
    job: dict[str, Any],
    results: list[dict[str, Any]],
    sources: _Sources,
) -> None:
    beat, diagnoses = sources.beat(job), sources.diagnoses
    state = job["state"]
    failure = results[-1] if results else None
    if failure is not None and _is_of_an_earlier_start(failure, job, beat):
        failure = None
    if job["refused"]:
        status.state, status.detail, status.remedy = REFUSED, job["refused"], job["remedy"] or ""
        status.since = job["submitted_at"]
        status.kind = diagnose.kind_of_refusal(job["refused"])
    elif job["slurm_id"] is None and job["intent_at"] is not None:
        _tell_of_no_id(status, job)
    elif job["slurm_id"] is None:
        _tell_by_hand(status, job, failure, sources)
    elif state in queue.WAITING and job["gone_since"] is None:
        _tell_of_waiting(status, job)
    elif failure is not None:
        _tell_failure(status, job, failure, diagnoses)
    elif state in queue.ENDED:
        _tell_of_an_end(status, job, diagnoses)
    elif state is None and _age_s(job["submitted_at"]) < SLURM_SHOWS_A_JOB_WITHIN_S:
        local = job["executor"] == "local"
        status.state, status.since = PENDING, job["submitted_at"]
        status.detail = "starting" if local else "accepted, not yet in squeue"
    elif job["gone_since"] is not None:
        _tell_of_gone(status, job, sources)
    elif state is None and job["executor"] == "local":
        _tell_of_another_machine(status, job, sources)
    elif state is None:
        status.since, status.detail = job["submitted_at"], "Slurm has not told of this job yet"
    else:
        _tell_of_running(status, job, beat)


def _is_of_an_earlier_start(failure: dict[str, Any], job: dict[str, Any], beat: Heartbeat | None) -> bool:
    """Whether the job that left this failure was started again since: its last sign of life is of another start, or of none
    that goes on."""
    if beat is None:
        return False
    start, _, _ = failure["attempt_id"].partition(".load")  # in whichever of its engine loads
    return beat.attempt_id != start or _is_of_another_start(beat, job)


def _is_of_another_start(beat: Heartbeat, job: dict[str, Any]) -> bool:
    """Whether the sign of life is of another start of the job than the one that Slurm tells of. Both times are the controller's:
    the clocks of two machines say nothing of one another."""
    known = beat.slurm_started_at is not None and job["started_at"] is not None
    return beat.phase == "requeued" or (known and beat.slurm_started_at != job["started_at"])


def _requeued(requeues: int) -> str:
    return f"requeued {requeues} time{'s' if requeues != 1 else ''}" if requeues else ""


def _tell_of_waiting(status: RunStatus, job: dict[str, Any]) -> None:
    reason = job["reason"] or ""
    status.state, status.since = PENDING, job["submitted_at"]
    status.held = reason == queue.HELD_AFTER_A_FAILED_START
    told = diagnose.of_waiting(reason, asdict(status))
    if told is not None:
        reason = f"{reason}: {told.happened}"
        status.kind, status.remedy = told.kind, told.remedy
    status.detail = "; ".join(filter(None, (_requeued(status.requeues), reason)))


def _tell_failure(status: RunStatus, job: dict[str, Any] | None, failure: dict[str, Any], diagnoses: Diagnoses) -> None:
    told = diagnoses.of_failure(asdict(status), job, failure)
    status.state = FAILURE_STATES.get(told.kind, FAILED)
    status.since, status.node = failure["ended_at"], failure["node"]
    _tell(status, told)


def _tell(status: RunStatus, told: Diagnosis) -> None:
    status.kind, status.detail, status.remedy, status.last_lines = told.kind, told.happened, told.remedy, told.lines


def _tell_of_no_id(status: RunStatus, job: dict[str, Any]) -> None:
    status.since = job["intent_at"]
    # Submitted, and without an id: a local job whose turn to start never came.
    if job["lost_answer"] and not job["submitted_at"]:
        lost = json.loads(job["lost_answer"])
        status.detail, status.remedy = lost["message"], lost["remedy"]
    elif job["never_queued"] or job["submitted_at"]:
        status.state = INTERRUPTED
        status.detail = "labctl was ended before this job was queued"
        status.remedy = RETRY
    elif _age_s(job["intent_at"]) < SUBMISSION_TAKES_AT_MOST_S:
        status.state, status.detail = SUBMITTING, "labctl submit is about to call sbatch"
    else:
        status.detail = "labctl was ended while it submitted this job; Slurm has not told yet whether it has it"


def _tell_by_hand(status: RunStatus, job: dict[str, Any], failure: dict[str, Any] | None, sources: _Sources) -> None:
    """A worker that a person started without Slurm (labctl run): its records and its heartbeat are all there is."""
    beat, lives = sources.beat(job), sources.gives_signs_of_life(job)
    if failure is not None:
        _tell_failure(status, job, failure, sources.diagnoses)
    elif lives is None and beat is not None:
        status.since, status.detail = beat.at, f"started by hand: {beat.phase}; {NOT_HEARD_TWICE}"
    elif beat is None or not lives:
        status.state = FAILED if beat is not None and beat.phase == "ended" else UNKNOWN
        status.since, status.lost = None if beat is None else beat.at, True
        status.detail = "started by hand, and ended or was ended without a record"
    else:
        status.state, status.detail, status.since = RUNNING, f"started by hand: {beat.phase}", beat.at


NOT_HEARD_TWICE = "whether it goes on shows within a minute"


def _tell_of_an_end(status: RunStatus, job: dict[str, Any], diagnoses: Diagnoses) -> None:
    status.since = job["ended_at"] or job["observed_at"]
    local = job["executor"] == "local"
    late = job["state"] == "COMPLETED" and _ended_within(RECORD_MAY_BE_LATE_S, job)
    if late and not local:  # a local job's files are on this machine
        status.state, status.detail = RUNNING, "the job ended; its record has not reached this machine yet"
        return
    damaged = _damaged_record(diagnoses.workspace, status.run_id, job) if local or job["state"] == "COMPLETED" else None
    if damaged is not None:
        status.state, status.kind = FAILED, DAMAGED_RECORD
        status.detail, status.remedy = f"its record cannot be read: {damaged}", "labctl retry measures it again"
        return
    about = asdict(status)
    without_a_word = local and job["state"] != "CANCELLED"
    _tell(status, diagnoses.of_local_end(about, job) if without_a_word else diagnoses.of_end(about, job))
    status.state = FAILURE_STATES.get(status.kind, FAILED)


DAMAGED_RECORD = "damaged-record"


def _damaged_record(workspace: Workspace, run_id: str, job: dict[str, Any]) -> Path | None:
    """The record of this job's run that is there and cannot be read."""
    for path in sorted((workspace.results / run_id).glob(f"{job['job_id']}.*.json"), reverse=True):
        try:
            documents.record(read_bytes(path))
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return path
    return None


def _tell_of_gone(status: RunStatus, job: dict[str, Any], sources: _Sources) -> None:
    """Slurm answers and has the job no more, but its accounting tells no end: it was lost, or the accounting is late."""
    beat, lives = sources.beat(job), sources.gives_signs_of_life(job)
    if beat is not None and lives:
        status.state, status.since, status.node = RUNNING, beat.at, beat.host
        status.detail = f"{beat.phase}; Slurm has this job no more, its worker gives signs of life"
        return
    status.since = job["observed_at"] or job["submitted_at"]
    last = f"last known: {(job['state'] or 'submitted').lower()}"
    status.detail = f"Slurm has this job no more and tells no end of it ({last})"
    if lives is False and _age_s(job["gone_since"]) > LOST_AFTER_S:
        status.lost, status.remedy = True, "labctl retry submits it again"


def _tell_of_another_machine(status: RunStatus, job: dict[str, Any], sources: _Sources) -> None:
    """A local job whose process is on another machine: its heartbeat and its records are all that is seen of it here."""
    beat, lives = sources.beat(job), sources.gives_signs_of_life(job)
    if beat is None or not lives:
        status.since = job["submitted_at"] if beat is None else beat.at
        last = "no heartbeat" if beat is None else f"last heartbeat: {beat.phase}"
        status.detail, status.remedy = f"a local job of {job['host']}; {last}", f"run labctl status on {job['host']}"
    else:
        _tell_of_running(status, {**job, "state": "RUNNING"}, beat)
        status.detail += f"; a local job of {job['host']}"


def _tell_of_running(status: RunStatus, job: dict[str, Any], beat: Heartbeat | None) -> None:
    status.state, status.since = RUNNING, job["started_at"]
    if beat is not None and _is_of_another_start(beat, job):
        beat = None
    if beat is None:
        status.state = PENDING if job["executor"] == "local" else RUNNING
        status.detail = "the worker has not started yet"
    elif beat.run_id in (None, status.run_id):
        what = "runs" if job["loads"] == 1 else "measurements"
        status.detail = f"{beat.phase} ({beat.done}/{beat.total} {what} of the job done)"
    else:
        status.detail = f"waits for its turn in the job ({beat.done}/{beat.total} done)"
    if beat is not None and job["loads"] > 1:
        status.detail += f"; engine load {beat.load} of {job['loads']}"
    if job["state"] in ("SUSPENDED", "STOPPED"):
        status.state, status.detail = SUSPENDED, f"Slurm has stopped the job's processes; before: {status.detail}"
    elif job["state"] == "CONFIGURING":
        status.state, status.detail = PENDING, "configuring: Slurm prepares the node"
    elif job["state"] not in queue.ON_A_NODE:
        status.state = UNKNOWN
        status.detail = f"Slurm calls its state {job['state']}; last sign of the worker: {status.detail}"
    elif beat is not None and beat.phase.startswith("waiting"):
        status.state = PENDING
    if beat is not None:
        status.node = status.node or beat.host
    status.detail += f"; {_requeued(status.requeues)}" if status.requeues else ""


def heartbeat(workspace: Workspace, job: dict[str, Any]) -> Heartbeat | None:
    """The worker's last sign of life in the job's present execution; None where it gave none."""
    path = workspace.batches / job["batch_id"] / "heartbeats" / f"{job['task']}.json"
    try:
        return documents.heartbeat(read_bytes(path))
    except (OSError, ValueError):
        return None


def _age_s(time: str | None) -> float:
    if time is None:
        return float("inf")
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()


def _comes_before(one: str | None, other: str | None) -> bool:
    """Whether both times are known, and the one is earlier. Slurm's are whole seconds, cut off: never later than they were."""
    if one is None or other is None:
        return False
    return datetime.fromisoformat(one) < datetime.fromisoformat(other)


def summary(found: Sequence[RunStatus]) -> str:
    """ "3 runs: 2 done, 1 running"."""
    return summary_of(Counter(run.state for run in found))


def summary_of(counts: Counter[str]) -> str:
    """`summary`, of how many runs are in each state."""
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    return f"{counts.total()} run{'s' if counts.total() != 1 else ''}: {told or 'none'}"


def wait(workspace: Workspace, store: Store, run_ids: Sequence[str]) -> set[str]:
    """Wait until every run has ended; returns the set of their states. Tells each change on the error stream."""
    if not run_ids:
        return set()
    told = ""
    pause_s = LOOK_AT_FIRST_EVERY_S
    while True:
        refresh(workspace, store, run_ids)
        found = statuses(workspace, store, run_ids)
        now = summary(found)
        if now != told:
            print(now, file=sys.stderr, flush=True)
            told, pause_s = now, LOOK_AT_FIRST_EVERY_S
        if not any(run.may_come for run in found):
            return {run.state for run in found}
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.2, LOOK_AT_LAST_EVERY_S)  # a controller has better things to do than to answer us


# ---------------------------------------------------------------- choose


ALL_RUNS = "all runs"


def chosen_runs(
    store: Store, names: Sequence[str], *, everything: bool = False, imported: bool = False
) -> tuple[str, list[str]]:
    """(a title, the run ids) meant by ids or names; by default those of the latest request. `imported`: everything is also
    what bundles brought.

    A word may be a run id or the beginning of one, a request's id or name, a Slurm id, or the label of imported bundles. Raises
    WrongUseError for one that is none of them.
    """
    if everything:
        own = _runs_by_time(store)
        others = [row[0] for row in store.tuples(_IMPORTED_RUNS)] if imported else []
        return ALL_RUNS, [*own, *others]
    if names:
        found = [run_id for name in names for run_id in _named(store, name)]
        return ", ".join(names), list(dict.fromkeys(found))
    latest = store.rows("SELECT request_id, name FROM requests ORDER BY created_at DESC, request_id DESC LIMIT 1")
    if latest:
        request = latest[0]
        return request["name"] or request["request_id"], _runs_of(store, request["request_id"])
    if runs := _runs_by_time(store):  # rendered and submitted by hand
        return ALL_RUNS, runs
    others = [row[0] for row in store.tuples(_IMPORTED_RUNS)]
    if others and imported:
        return "imported runs", others
    if others:
        raise WrongUseError(
            "nothing was submitted in this workspace, bundles were imported",
            "labctl compare and labctl report show them",
        )
    raise WrongUseError("nothing was submitted in this workspace yet", "labctl submit --help shows how")


def _runs_by_time(store: Store) -> list[str]:
    """Each run of this workspace once, the first submitted first."""
    return list(dict.fromkeys(run_id for (run_id,) in store.tuples(_RUNS_BY_TIME)))


_RUNS_BY_TIME = (
    "SELECT run_id FROM job_runs JOIN jobs USING (job_id) JOIN batches USING (batch_id)"
    f" WHERE {BEGUN} ORDER BY coalesce(intent_at, batches.created_at), batch_id, task, position"
)


_IMPORTED_RUNS = (
    # As two ranges, which the index of origins finds.
    f"SELECT run_id, origin FROM runs WHERE (origin < '{HERE}' OR origin > '{HERE}') AND run_id IN (SELECT run_id FROM results)"
    # A bundle does not tell what was asked for first; the first run of each group is what others are compared with.
    " ORDER BY origin, partition, backend, model, dtype, max_new_tokens, batch_size, request_rate, sampling, engine_options,"
    " run_id"
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
        # The runs of the jobs, not the jobs of all runs.
        "SELECT run_id FROM jobs CROSS JOIN job_runs USING (job_id) WHERE slurm_id = ?"
        " OR substr(slurm_id, 1, length(?) + 1) = ? || '_' OR job_id = ?"
        " ORDER BY task, position",
        (name, name, name, name),
    )
    if jobs:
        return [job["run_id"] for job in jobs]
    of_origin = store.rows(_IMPORTED_RUNS.replace("ORDER BY", "AND origin = ? ORDER BY"), (name,))
    if of_origin:
        return [run["run_id"] for run in of_origin]
    digits, at, origin = name.partition("@")  # 3f9a is a run of this workspace, 3f9a@ada one of ada's
    between = (digits.lower(), digits.lower() + CHARACTER_AFTER_ALL)
    runs = store.rows(
        "SELECT run_id FROM runs WHERE run_id BETWEEN ? AND ? AND (origin = ? OR (? = '' AND NOT EXISTS"
        f" (SELECT 1 FROM runs AS own WHERE +own.origin = '{HERE}' AND own.run_id BETWEEN ? AND ?)))",
        (*between, origin if at else HERE, at, *between),
    )
    if len(runs) == 1 or (runs and len(digits) >= 4):
        return [run["run_id"] for run in runs]
    if runs:
        raise WrongUseError(f"{len(runs)} runs begin with {digits!r}", "give at least four digits of the run id")
    names = [row["name"] for row in store.rows("SELECT DISTINCT name FROM requests WHERE name IS NOT NULL")]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise WrongUseError(
        f"no run, request, name or Slurm id here is {name!r}",
        f"{hint}labctl status --all lists what this workspace has",
    )


def _runs_of(store: Store, request_id: str) -> list[str]:
    rows = store.rows("SELECT run_id FROM request_runs WHERE request_id = ? ORDER BY position", (request_id,))
    return [row["run_id"] for row in rows]


def one_run(store: Store, name: str) -> str:
    """The one run that `name` means. Raises WrongUseError where it means several."""
    runs = list(dict.fromkeys(_named(store, name)))
    if len(runs) > 1:
        raise WrongUseError(
            f"{name!r} means {len(runs)} runs: {', '.join(runs[:4])}{'…' if len(runs) > 4 else ''}",
            "give the id of one of them",
        )
    return runs[0]
