"""Update the states of jobs from Slurm and local processes, and collect what workers wrote."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from labctl_orchestrator.request import settings
from labctl_orchestrator.store import documents, job_rows
from labctl_orchestrator.store.collect import (
    JOB_IDS_OF_RUNS,
    Collected,
    arrays_of,
    can_collect_apart,
    collect,
    collect_new,
    collect_runs,
)
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.documents import try_write
from labctl_orchestrator.store.job_rows import JobRow
from labctl_orchestrator.store.select_runs import ALL_RUNS, chosen_runs
from labctl_orchestrator.store.take_files import STATE_COLUMNS, take_states
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking import processes
from labctl_orchestrator.tracking.interrupted import not_submitted, rendered, settle, submitter_is_gone, take_by_hand
from labctl_orchestrator.tracking.slurm_answers import Answers, ask_slurm
from labctl_orchestrator.tracking.times import (
    ACCOUNTING_IS_LATE_AT_MOST_S,
    SLURM_KEEPS_AT_MOST,
    ended_lately,
    ended_within,
    is_forgotten,
)
from labctl_slurm import queue
from labctl_slurm.errors import WrongUseError
from labctl_slurm.poll import Poll
from labctl_slurm.queue import JobState
from labctl_workers.record import read_bytes, utc_now


@dataclass
class Refreshed:
    """The result of an update: new records, damaged files, and the errors of Slurm's commands."""

    collected: Collected
    problems: list[str]


def refresh(
    workspace: Workspace,
    store: Store,
    run_ids: Sequence[str] | None = None,
    *,
    every_file: bool = False,
    slurm: bool = True,
) -> Refreshed:
    """Query Slurm and local processes, then read the files, which then contain the records of ended jobs.

    `run_ids` limits it to these runs, their jobs and arrays, unless there are many, or some were imported. `every_file`: see
    `collect`. `slurm` False leaves out Slurm, for a command that waits (see `Poll`).
    """
    if run_ids is not None and not can_collect_apart(run_ids):
        run_ids = None
    first = (
        collect(workspace, store, every_file=every_file) if run_ids is None else collect_runs(workspace, store, run_ids)
    )
    arrays = None if run_ids is None else arrays_of(store, run_ids)
    jobs = _jobs_that_may_change(store, run_ids)
    open_jobs = [job for job in jobs if _needs_query(job)]
    interrupted = [array for array in not_submitted(store) if submitter_is_gone(workspace, array)]
    by_hand = rendered(store)
    if arrays is not None:
        interrupted = [array for array in interrupted if array.array_id in arrays]
        by_hand = [array for array in by_hand if array.array_id in arrays]
    asked_at = utc_now()
    ended = [job for job in jobs if ended_lately(job)]
    answer = ask_slurm(open_jobs, ended, interrupted, by_hand) if slurm else Answers()
    observed = [*_observed(open_jobs, answer), *_started_again(jobs, answer, asked_at)]
    _remember(workspace, store, observed)
    if observed and slurm and not answer.problems and workspace.writable:
        try_write(workspace.last_answer, {"at": utc_now()})
    settled = [settle(workspace, array, answer) for array in interrupted]
    settled += [take_by_hand(workspace, array, answer) for array in by_hand]
    if any(settled):
        # Queries the jobs that are now known.
        return refresh(workspace, store, run_ids, every_file=every_file, slurm=slurm)
    asked_of = {*(seen.job.job_id for seen in observed), *(job.job_id for job in open_jobs)}
    second = _collect_of(workspace, store, [job for job in jobs if job.job_id in asked_of])
    return Refreshed(Collected(first.records + second.records, second.damaged or first.damaged), answer.problems)


def poll_of(workspace: Workspace, store: Store, run_ids: Sequence[str], *, asked: bool) -> Poll:
    """The queries of a command that waits for these runs; `asked`: it has just refreshed them."""
    partitions = store.tuples(
        "SELECT DISTINCT partition FROM job_runs JOIN jobs USING (job_id) JOIN arrays USING (array_id)"
        " WHERE run_id IN (SELECT value FROM json_each(?))",
        (json.dumps(list(run_ids)),),
    )
    known = settings.load(workspace)
    return Poll((known.partition(name).poll_s for (name,) in partitions if name in known.names()), asked=asked)


def refresh_chosen(
    workspace: Workspace, store: Store, names: Sequence[str], *, everything: bool = False
) -> tuple[Refreshed, str, list[str]]:
    """`refresh` of the chosen runs: (its result, a title, the run ids). Refreshes the whole workspace for `everything`, and for a
    name that the index does not know."""
    if everything:
        return refresh(workspace, store), *chosen_runs(store, (), everything=True)
    collect_new(workspace, store)  # `refresh` reports damaged files
    try:
        title, run_ids = chosen_runs(store, names)
        known = bool(names) or title != ALL_RUNS
    except WrongUseError:
        known = False
    learnt = refresh(workspace, store, run_ids if known else None)
    return learnt, *chosen_runs(store, names)


def _jobs_that_may_change(store: Store, run_ids: Sequence[str] | None) -> list[JobRow]:
    """The jobs with an id, without those that ended long ago."""
    since = (datetime.now(UTC) - SLURM_KEEPS_AT_MOST).date().isoformat()
    ended = ", ".join(f"'{state}'" for state in sorted(queue.ENDED))
    where = f"slurm_id IS NOT NULL AND (state IS NULL OR state NOT IN ({ended}) OR ended_at IS NULL OR ended_at >= ?)"
    if run_ids is None:
        return job_rows.jobs(store, where, (since,))
    return job_rows.jobs(store, f"{where} AND job_id IN ({JOB_IDS_OF_RUNS})", (since, json.dumps(run_ids)))


def _collect_of(workspace: Workspace, store: Store, jobs: Sequence[JobRow]) -> Collected:
    """Collect the new files of these jobs."""
    if not jobs:
        return Collected()
    of_jobs = "SELECT DISTINCT run_id FROM job_runs WHERE job_id IN (SELECT value FROM json_each(?))"
    runs = [run_id for (run_id,) in store.tuples(of_jobs, (json.dumps([job.job_id for job in jobs]),))]
    return collect(workspace, store, arrays={job.array_id for job in jobs}, runs=runs)


def _needs_query(job: JobRow) -> bool:
    """Whether to query the job: it has not ended, or its end is the controller's alone, without exit code, canceller and time of
    earlier starts. The accounting has these some seconds later."""
    if not job.has_ended:
        return not is_forgotten(job)
    incomplete = not job.is_local and job.exit_code is None and (job.state != "COMPLETED" or job.restarts > 0)
    return incomplete and ended_within(ACCOUNTING_IS_LATE_AT_MOST_S, job)


def _observed(open_jobs: Sequence[JobRow], answer: queue.QueueAnswer) -> list[_Observed]:
    """The observations of the jobs that had not ended."""
    found = []
    for job in open_jobs:
        state = _local_state(job) if job.is_local else answer.jobs.get(job.named)
        if state is not None:
            found.append(_Observed(job, _document(state)))
        elif job.named in answer.gone and job.gone_since is None:
            found.append(_Observed(job, None))
    return found


def _started_again(jobs: Sequence[JobRow], answer: queue.QueueAnswer, asked_at: str) -> list[_Observed]:
    """Jobs that had ended before this query and have another state now: a user requeued them, or a killed controller lost their
    end and ran them again."""
    found = []
    for job in jobs:
        state = answer.shown.get(job.named) if job.has_ended else None
        if state is None or state.state == job.state or job.observed_at is None:
            continue
        if datetime.fromisoformat(job.observed_at) < datetime.fromisoformat(asked_at):
            found.append(_Observed(job, _document(state), revives=True))
    return found


@dataclass(frozen=True)
class _Observed:
    """An observation of a job: its state (None: gone from Slurm), and whether it `revives` an ended job."""

    job: JobRow
    state: documents.State | None
    revives: bool = False

    @property
    def is_new(self) -> bool:
        if self.state is None or self.job.gone_since is not None:
            return True
        return any(getattr(self.job, name) != getattr(self.state, name) for name in COLUMNS_OF_SLURM)


# The columns from Slurm; the other two are labctl's.
COLUMNS_OF_SLURM = [name for name in STATE_COLUMNS if name not in ("gone_since", "observed_at")]


def _document(state: JobState) -> documents.State:
    values = {name: getattr(state, name) for name in COLUMNS_OF_SLURM}
    return documents.State(**{name: None if value == "" else value for name, value in values.items()})


def _local_state(job: JobRow) -> JobState | None:
    if job.host != socket.gethostname() or job.slurm_id is None:
        return None  # a process of another machine
    state = JobState(job.slurm_id, "RUNNING", node=job.host, started_at=job.submitted_at)
    if processes.is_alive(int(job.slurm_id), job.process_start):
        return state
    return replace(state, state="COMPLETED", ended_at=utc_now())


def _remember(workspace: Workspace, store: Store, observed: Sequence[_Observed]) -> None:
    """Write the changes to each array's states.json, from which the database reads them."""
    changed: dict[str, list[_Observed]] = {}
    for seen in observed:
        if seen.is_new:
            changed.setdefault(seen.job.array_id, []).append(seen)
    if not changed:
        return
    now = utc_now()
    with store.writing():  # a lock between two labctl
        for array_id, jobs in changed.items():
            path = workspace.arrays / array_id / "states.json"
            try:
                states = _states_at(path)
            except OSError:  # writing it now would lose its content; the next refresh asks Slurm again
                continue
            for seen in jobs:
                before = states.get(seen.job.job_id, documents.State())
                # The accounting may complete the controller's end of the job.
                completes = (
                    seen.state is not None
                    and seen.state.state == before.state
                    and before.exit_code is None
                    and seen.state.exit_code is not None
                )
                if before.state in queue.ENDED and not (seen.revives or completes):
                    continue
                # A job that is gone keeps its last state and the time of it.
                states[seen.job.job_id] = (
                    msgspec.structs.replace(before, gone_since=now)
                    if seen.state is None
                    else msgspec.structs.replace(seen.state, observed_at=now)
                )
            # States that cannot be written go to the index alone; the next refresh asks Slurm again.
            if not workspace.writable or not try_write(path, msgspec.to_builtins(states)):
                take_states(store, states)


def _states_at(path: Path) -> dict[str, documents.State]:
    """The known states of an array's jobs; none without a file, and from a damaged one. Raises OSError for an unreadable file."""
    try:
        return documents.read(read_bytes(path), dict[str, documents.State])
    except (FileNotFoundError, ValueError):
        return {}


def note_cancelled(workspace: Workspace, store: Store, jobs: Sequence[JobRow]) -> None:
    """Write the cancellation of these local jobs. Slurm reports that of its jobs."""
    end = documents.State(state="CANCELLED", reason=f"by {os.getuid()}", ended_at=utc_now())
    observed = [
        _Observed(job, msgspec.structs.replace(end, node=job.host, started_at=job.started_at))
        for job in jobs
        if job.is_local
    ]
    _remember(workspace, store, observed)
