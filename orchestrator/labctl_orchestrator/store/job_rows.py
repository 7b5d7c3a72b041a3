"""Job arrays, jobs and results as the database has them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from labctl_orchestrator.store.database import Store
from labctl_slurm import queue
from labctl_slurm.command import Cluster

T = TypeVar("T", bound=msgspec.Struct)


class ArrayRow(msgspec.Struct, frozen=True):
    """One submission to Slurm, or to this machine (`executor` local); times are ISO 8601, None what is not known."""

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
        """The clusters that may have it, one where it is known; None is the one that the shell means."""
        return [*msgspec.json.decode(self.clusters or "[]", type=list[Cluster])] or [None]


class JobRow(ArrayRow, frozen=True):
    """One job, and the array that it was submitted in; `restarts` is how often Slurm started it again."""

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
        """By what Slurm is asked for it."""
        return self.slurm_id or "", self.job_name


class JobOfRun(JobRow, frozen=True):
    """A job that was to measure a run, and to which other job the run was given, in which state."""

    run_id: str
    given_to: str | None
    given_as: str | None


class ResultRow(msgspec.Struct, frozen=True):
    """One record of a run, without what was measured; `restarts` is of the start of its job that wrote it."""

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


class WholeResult(ResultRow, frozen=True):
    """A record with what was measured of it as a whole; `fingerprint` is JSON, `path` its file's, within the workspace."""

    path: str
    fingerprint: str
    load_s: float | None
    init_s: float | None
    warmup_s: float | None
    prompt_tokens: int | None
    empty_answers: int
    answers_without_tokens: int
    finish_reasons: str | None


_COMPUTED = {
    "restarts": "coalesce((SELECT max(restarts) FROM executions WHERE executions.job_id = jobs.job_id), 0)",
    "array_id": "arrays.array_id", "job_id": "jobs.job_id", "run_id": "job_runs.run_id",
}  # fmt: skip
_RESTARTS_OF_A_RESULT = (
    "(SELECT restarts FROM executions WHERE executions.attempt_id ="
    " substr(results.attempt_id, 1, instr(results.attempt_id || '.load', '.load') - 1))"
)


def _rows(store: Store, kind: type[T], tables: str, parameters: Iterable[Any], **computed: str) -> list[T]:
    names = kind.__struct_fields__
    columns = ", ".join({**_COMPUTED, **computed}.get(name, name) for name in names)
    rows = store.tuples(f"SELECT {columns} FROM {tables}", parameters)
    return [kind(*row) for row in rows]


def arrays(store: Store, where: str, parameters: Iterable[Any] = ()) -> list[ArrayRow]:
    """The arrays for which the condition holds."""
    return _rows(store, ArrayRow, f"arrays WHERE {where}", parameters)


def jobs(store: Store, where: str, parameters: Iterable[Any] = ()) -> list[JobRow]:
    """The jobs for which the condition, on jobs and arrays, holds."""
    return _rows(store, JobRow, f"jobs JOIN arrays USING (array_id) WHERE {where}", parameters)


def jobs_of_runs(store: Store, where: str, parameters: Iterable[Any]) -> list[JobOfRun]:
    """The jobs that were to measure runs, in the order of their submission."""
    tables = (
        "job_runs JOIN jobs USING (job_id) JOIN arrays USING (array_id)"
        " LEFT JOIN given_runs ON given_runs.job_id = jobs.job_id AND given_runs.run_id = job_runs.run_id"
        f" WHERE {where} ORDER BY coalesce(arrays.intent_at, arrays.created_at), task"
    )
    return _rows(store, JobOfRun, tables, parameters)


def results(store: Store, where: str, parameters: Iterable[Any]) -> list[ResultRow]:
    """The records for which the condition holds, the first ended first."""
    return _results(store, ResultRow, where, parameters)


def whole_results(store: Store, run_id: str) -> list[WholeResult]:
    """The records of one run, the first ended first."""
    return _results(store, WholeResult, "run_id = ?", (run_id,))


def _results(store: Store, kind: type[T], where: str, parameters: Iterable[Any]) -> list[T]:
    tables = f"results WHERE {where} ORDER BY ended_at"
    return _rows(store, kind, tables, parameters, restarts=_RESTARTS_OF_A_RESULT, run_id="run_id", job_id="job_id")


def slurm_ids_by_cluster(found: Iterable[JobRow]) -> dict[Cluster | None, list[str]]:
    """The ids of Slurm's jobs among these, by the cluster that has them."""
    ids: dict[Cluster | None, list[str]] = {}
    for job in found:
        if job.slurm_id is not None and not job.is_local:
            ids.setdefault(job.may_be_on[0], []).append(job.slurm_id)
    return ids
