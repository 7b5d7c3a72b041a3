"""Typed rows of job arrays, jobs and results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from labctl_orchestrator.store.database import Store
from labctl_slurm import queue
from labctl_slurm.command import Cluster

T = TypeVar("T", bound=msgspec.Struct)


class ArrayRow(msgspec.Struct, frozen=True):
    """One job array, in Slurm or on this machine (`executor` local). Times are ISO 8601; None means unknown."""

    array_id: str
    executor: str
    job_name: str
    intent_at: str | None
    submitted_at: str | None
    host: str | None
    refused: str | None
    remedy: str | None
    never_queued: str | None
    mark: str | None
    clusters: str | None
    lost_answer: str | None

    @property
    def is_local(self) -> bool:
        return self.executor == "local"

    @property
    def may_be_on(self) -> list[Cluster | None]:
        """The clusters that may have it, or the one that does. None is the shell's default cluster."""
        return [*msgspec.json.decode(self.clusters or "[]", type=list[Cluster])] or [None]


class JobRow(ArrayRow, frozen=True):
    """One job and its array; `restarts` counts Slurm's restarts."""

    job_id: str
    task: int
    loads: int
    slurm_id: str | None
    process_start: str | None
    state: str | None
    reason: str | None
    node: str | None
    queued_at: str | None
    started_at: str | None
    ended_at: str | None
    exit_code: str | None
    held_before_s: float | None
    observed_at: str | None
    gone_since: str | None
    restarts: int

    @property
    def has_ended(self) -> bool:
        return self.state in queue.ENDED

    @property
    def named(self) -> queue.Job:
        """The job's id and name, for queries to Slurm."""
        return self.slurm_id or "", self.job_name


class JobOfRun(JobRow, frozen=True):
    """A run's job; and if the run moved to another job, that job (`moved_to`) and the run's state then."""

    run_id: str
    moved_to: str | None
    moved_in_state: str | None


class ResultRow(msgspec.Struct, frozen=True):
    """One record of a run without its measurements; `restarts` is the restart count of the job start that wrote it."""

    run_id: str
    attempt_id: str
    job_id: str
    status: str
    node: str | None
    started_at: str | None
    ended_at: str | None
    failure_kind: str | None
    failure: str | None
    remedy: str | None
    restarts: int | None


class ResultDetails(ResultRow, frozen=True):
    """One record with its load times and answer counts. `fingerprint` is JSON; `path` is relative to .labctl."""

    path: str
    fingerprint: str
    load_s: float | None
    init_s: float | None
    warmup_s: float | None
    prompt_tokens: int | None
    empty_answers: int
    answers_without_tokens: int
    finish_reasons: str | None
    window: str | None
    score_error: str | None
    task_error: str | None


_COMPUTED = {
    "restarts": "coalesce((SELECT max(restarts) FROM job_starts WHERE job_starts.job_id = jobs.job_id), 0)",
    "array_id": "arrays.array_id", "job_id": "jobs.job_id", "run_id": "job_runs.run_id",
}  # fmt: skip
_RESULT_RESTARTS = (
    "(SELECT restarts FROM job_starts WHERE job_starts.attempt_id ="
    " substr(results.attempt_id, 1, instr(results.attempt_id || '.load', '.load') - 1))"
)


def _rows(store: Store, kind: type[T], tables: str, parameters: Iterable[Any], **computed: str) -> list[T]:
    names = kind.__struct_fields__
    columns = ", ".join({**_COMPUTED, **computed}.get(name, name) for name in names)
    rows = store.tuples(f"SELECT {columns} FROM {tables}", parameters)
    return [kind(*row) for row in rows]


def arrays(store: Store, where: str, parameters: Iterable[Any] = ()) -> list[ArrayRow]:
    """The arrays that match the SQL condition."""
    return _rows(store, ArrayRow, f"arrays WHERE {where}", parameters)


def jobs(store: Store, where: str, parameters: Iterable[Any] = ()) -> list[JobRow]:
    """The jobs that match the SQL condition on jobs and arrays."""
    return _rows(store, JobRow, f"jobs JOIN arrays USING (array_id) WHERE {where}", parameters)


def jobs_of_runs(store: Store, where: str, parameters: Iterable[Any]) -> list[JobOfRun]:
    """The jobs of the runs that match the SQL condition, in submission order."""
    tables = (
        "job_runs JOIN jobs USING (job_id) JOIN arrays USING (array_id)"
        " LEFT JOIN moved_runs ON moved_runs.job_id = jobs.job_id AND moved_runs.run_id = job_runs.run_id"
        f" WHERE {where} ORDER BY coalesce(arrays.intent_at, arrays.created_at), task"
    )
    return _rows(store, JobOfRun, tables, parameters)


def results(store: Store, where: str, parameters: Iterable[Any]) -> list[ResultRow]:
    """The records that match the SQL condition, by end time."""
    return _results(store, ResultRow, where, parameters)


def result_details(store: Store, run_id: str) -> list[ResultDetails]:
    """The records of one run, by end time."""
    return _results(store, ResultDetails, "run_id = ?", (run_id,))


def _results(store: Store, kind: type[T], where: str, parameters: Iterable[Any]) -> list[T]:
    tables = f"results WHERE {where} ORDER BY ended_at"
    return _rows(store, kind, tables, parameters, restarts=_RESULT_RESTARTS, run_id="run_id", job_id="job_id")


def slurm_ids_by_cluster(found: Iterable[JobRow]) -> dict[Cluster | None, list[str]]:
    """The Slurm ids of these jobs, by cluster; local jobs are left out."""
    ids: dict[Cluster | None, list[str]] = {}
    for job in found:
        if job.slurm_id is not None and not job.is_local:
            ids.setdefault(job.may_be_on[0], []).append(job.slurm_id)
    return ids
