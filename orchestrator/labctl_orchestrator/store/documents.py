"""Typed readers of the workspace's JSON files: the only place that checks their types.

A file with a missing field or a wrong type is unreadable as a whole; unknown fields are ignored. Readers raise ValueError
(msgspec.ValidationError, NewerError).
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from labctl_slurm.command import Cluster
from labctl_slurm.diagnose import Diagnosis
from labctl_workers import record
from labctl_workers.record import REQUESTS_AT_MOST, SCHEMA, Attempt, Heartbeat, JobSpec, RunResult

T = TypeVar("T")
DONE, FAILED = "done", "failed"


class NewerError(ValueError):
    """A newer labctl wrote this file; labctl leaves it unchanged."""


class _Timed(msgspec.Struct):
    """A document whose fields `at`, `..._at` and `..._since` are ISO 8601 times with a time zone."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if name == "at" or name.endswith(("_at", "_since")):
                check_time(name, getattr(self, name))


class Submission(_Timed):
    """submissions/<id>.json"""

    submission_id: str
    created_at: str
    runs: list[str]
    skipped: list[str]
    jobs: list[JobSpec]
    labctl_version: str = ""
    name: str | None = None
    request: dict[str, Any] = {}


class ArrayDocument(_Timed):
    """arrays/<id>/array.json"""

    array_id: str
    partition: str
    executor: str
    job_name: str
    created_at: str
    time_s: int | None = None
    gpus: int | None = None


class LostAnswer(msgspec.Struct):
    """sbatch's error when it printed no job id. Its job may appear in the queue up to `late_s` seconds later."""

    message: str
    remedy: str
    late_s: float


class Intent(_Timed):
    """arrays/<id>/intent.json"""

    submission_id: str | None
    at: str
    host: str
    pid: int = 0
    pid_start: str | None = None
    mark: str | None = None
    folder: str | None = None
    clusters: list[Cluster] = []
    lost_answer: LostAnswer | None = None


class Submitted(_Timed):
    """arrays/<id>/submitted.json"""

    at: str
    host: str = ""
    ids: list[str | None] = []
    starts: list[str | None] | None = None
    refused: str | None = None
    remedy: str | None = None
    never_queued: str | None = None
    clusters: list[Cluster] = []


class State(_Timed):
    """The last known state of one job, in arrays/<id>/states.json."""

    state: str | None = None
    reason: str | None = None
    node: str | None = None
    queued_at: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    exit_code: str | None = None
    held_before_s: float | None = None
    gone_since: str | None = None
    observed_at: str | None = None


class Moved(msgspec.Struct):
    """The job that a run moved to, and the run's state then, in arrays/<id>/moved.json."""

    job: str
    state: str


class Diagnoses(msgspec.Struct):
    """arrays/<id>/diagnoses.json: reasons of failures by run and attempt, from this `edition` of the table of reasons."""

    edition: int
    found: dict[str, Diagnosis]


class Bundle(msgspec.Struct):
    """imports/<origin>/bundles/<id>.json"""

    bundle_id: str
    sha256: str
    records: int
    name: str | None = None
    author: str | None = None
    labctl_version: str | None = None


class Heard(_Timed):
    """A worker's last heartbeat: its time `at` by the worker's clock, `seen_at` by this machine's. `came_anew`: labctl saw an
    earlier heartbeat of this worker too."""

    at: str
    seen_at: str
    came_anew: bool = False


class GpuFacts(msgspec.Struct):
    name: str
    memory_bytes: int | None = None
    capability: str | None = None


class _Clocks(msgspec.Struct):
    sm_max_mhz: float | None = None
    power_limit_w: float | None = None


class _Cpus(msgspec.Struct):
    available: int
    model: str | None = None


class _Bucket(msgspec.Struct):
    micro_batches: int
    rows: int
    length: int


class _Stages(msgspec.Struct):
    buckets: list[_Bucket] = []


class Fingerprint(msgspec.Struct):
    """The fields of a record's fingerprint that labctl reads; engines may add more."""

    packages: dict[str, str] = {}
    gpus: list[GpuFacts] = []
    clocks: list[_Clocks] | None = None
    devices_in_use: list[str] | None = None
    cpus: _Cpus | None = None
    script: record.ScriptSettings | None = None
    environment: dict[str, str] = {}
    container: str | None = None
    model_commit: str | None = None
    prompt_tokens: str = ""
    effective_dtype: str | None = None
    attention: str | None = None
    driver: str | None = None
    cuda: str | None = None
    stages: _Stages | None = None


class _Schema(msgspec.Struct):
    schema: int = SCHEMA


def check_time(name: str, time: str | None) -> None:
    """Raises ValueError unless the time is None or an ISO 8601 time with a time zone."""
    if time is not None and datetime.fromisoformat(time).tzinfo is None:
        raise ValueError(f"{name} has no time zone: {time}")


@functools.cache
def _decoder(kind: Hashable) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(cast("type[Any]", kind))


def read(text: bytes, kind: type[T]) -> T:
    """A JSON text as a value of `kind`, checked."""
    try:
        found = _decode(text, kind)
    except ValueError:
        if kind in (JobSpec, RunResult) and _schema_of(text) > SCHEMA:
            raise NewerError("written by a newer labctl") from None
        raise
    _check(found)
    return found


def _decode(text: bytes, kind: type[T]) -> T:
    try:
        return cast("T", _decoder(cast("Hashable", kind)).decode(text))
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, RecursionError):  # NaN, which only Python's json accepts; or no JSON
        return msgspec.convert(record.parse_json(text), kind)


def _schema_of(text: bytes) -> int:
    try:
        return _decode(text, _Schema).schema
    except ValueError:
        return SCHEMA


def _check(found: object) -> None:
    """Check what the types of the worker's documents do not say."""
    if isinstance(found, JobSpec | RunResult) and found.schema > SCHEMA:
        raise NewerError("written by a newer labctl")
    if isinstance(found, JobSpec):
        for run in found.runs:
            if run.prompt_set not in found.prompt_sets:
                raise ValueError(f"run {run.run_id} has no prompt set {run.prompt_set!r}")
            if max(run.requests or 1, run.batch_size) > REQUESTS_AT_MOST:  # labctl lists them to count decode steps
                raise ValueError(f"run {run.run_id} has more than {REQUESTS_AT_MOST:,} requests")
            if run.score is not None and run.score.sha256 not in found.texts:
                raise ValueError(f"run {run.run_id} has no text {run.score.sha256!r}")
    elif isinstance(found, Submission):
        for job in found.jobs:
            _check(job)
    elif isinstance(found, RunResult):
        if found.status not in (DONE, FAILED):
            raise ValueError(f"unknown status {found.status!r}")
        msgspec.convert(found.fingerprint, Fingerprint)
        check_time("started_at", found.started_at)
        check_time("ended_at", found.ended_at)
        _check(found.attempt)
    elif isinstance(found, Attempt):
        check_time("attempt.started_at", found.started_at)
    elif isinstance(found, Heartbeat):
        check_time("at", found.at)


def read_at(path: Path, kind: type[T]) -> T | None:
    """The document in a file; None if the file is missing or unreadable."""
    try:
        return read(record.read_bytes(path), kind)
    except (OSError, ValueError):
        return None


def try_write(path: Path, document: Any) -> bool:
    """Write the document; returns whether that worked."""
    try:
        record.write_json(path, document)
    except OSError:
        return False
    return True
