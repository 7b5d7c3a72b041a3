"""The files of a workspace as typed values: the one place where their types are checked.

Strict: a field that is missing or of another type makes the whole file one that cannot be read. A field that this labctl does not
know is left out. Every reader here raises ValueError (msgspec.ValidationError, NewerError) for what it does not take.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from labctl_slurm.command import Cluster
from labctl_slurm.diagnose import Diagnosis
from labctl_workers.record import (
    SCHEMA,
    Attempt,
    Heartbeat,
    JobSpec,
    RunResult,
    ScriptSettings,
    parse_json,
    read_bytes,
    write_json,
)

T = TypeVar("T")
DONE, FAILED = "done", "failed"


class NewerError(ValueError):
    """A file that a newer labctl wrote; it is left as it is."""


class _Timed(msgspec.Struct):
    """A document whose fields named `at` or `..._at` are ISO 8601 times with their zone."""

    def __post_init__(self) -> None:
        check_times((name, getattr(self, name)) for name in self.__struct_fields__ if name.endswith("at"))


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
    """What sbatch said where it gave no job id; what it sent may take `late_s` seconds to show in the queue."""

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
    """The last known state of one job, of arrays/<id>/states.json."""

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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_times([("gone_since", self.gone_since)])


class Given(msgspec.Struct):
    """To which job a run was given, of arrays/<id>/given.json."""

    job: str
    state: str


class Diagnoses(msgspec.Struct):
    """arrays/<id>/diagnoses.json: why runs failed, by run and attempt, as the reasons of that `edition` explain it."""

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


class _Gpu(msgspec.Struct):
    name: str
    memory_bytes: int | None = None
    capability: str | None = None


class _Clocks(msgspec.Struct):
    sm_max_mhz: float | None = None
    power_limit_w: float | None = None
    throttle_reasons: int | None = None


class _Cpus(msgspec.Struct):
    available: int
    model: str | None = None


class _Bucket(msgspec.Struct):
    micro_batches: int
    rows: int
    length: int


class _Stages(msgspec.Struct):
    buckets: list[_Bucket] = []


class _Fingerprint(msgspec.Struct):
    """What is read of a record's fingerprint; an engine may put more there."""

    packages: dict[str, str] = {}
    gpus: list[_Gpu] = []
    clocks: list[_Clocks] | None = None
    devices_in_use: list[str] | None = None
    cpus: _Cpus | None = None
    script: ScriptSettings | None = None
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


def check_times(times: Iterable[tuple[str, str | None]]) -> None:
    """Raises ValueError where one of these is no ISO 8601 time with a zone."""
    for name, time in times:
        if time is not None and datetime.fromisoformat(time).tzinfo is None:
            raise ValueError(f"{name} has no time zone: {time}")


@functools.cache
def _decoder(kind: Hashable) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(cast("type[Any]", kind))


def read(text: bytes, kind: type[T]) -> T:
    """A JSON text as a value of `kind`."""
    try:
        found: T = _decoder(cast("Hashable", kind)).decode(text)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, RecursionError):  # no JSON, or a NaN: Python's json writes and reads that
        found = msgspec.convert(parse_json(text), kind)
    return found


V = TypeVar("V", JobSpec, RunResult)


def _of_this_schema(text: bytes, kind: type[V]) -> V:
    try:
        found = read(text, kind)
    except ValueError:
        if _schema_of(text) > SCHEMA:
            raise NewerError("written by a newer labctl") from None
        raise
    if found.schema > SCHEMA:
        raise NewerError("written by a newer labctl")
    return found


def _schema_of(text: bytes) -> int:
    try:
        return read(text, _Schema).schema
    except ValueError:
        return SCHEMA


def job(text: bytes) -> JobSpec:
    """A job's file."""
    found = _of_this_schema(text, JobSpec)
    for run in found.runs:
        if run.prompt_set not in found.prompt_sets:
            raise ValueError(f"run {run.run_id} has no prompt set {run.prompt_set!r}")
    return found


def submission_at(path: Path) -> Submission | None:
    """A request's file; None where there is none that can be read."""
    try:
        return read(read_bytes(path), Submission)
    except (OSError, ValueError):
        return None


def job_at(path: Path) -> JobSpec | None:
    """A job's file; None where there is none that can be read."""
    try:
        return job(read_bytes(path))
    except (OSError, ValueError):
        return None


def attempt(text: bytes) -> Attempt:
    """An attempt's file."""
    found = read(text, Attempt)
    check_times([("started_at", found.started_at)])
    return found


def heartbeat(text: bytes) -> Heartbeat:
    """A worker's heartbeat."""
    found = read(text, Heartbeat)
    check_times([("at", found.at)])
    return found


class Heard(msgspec.Struct):
    """A worker's last heartbeat, which was written `at` by its machine's clock and first seen `seen_at` by this one's; whether
    it came after another one that was seen."""

    at: str
    seen_at: str
    came_anew: bool = False


def diagnoses_at(path: Path) -> Diagnoses | None:
    """The kept diagnoses of a job array; None where there are none that can be read."""
    try:
        return read(read_bytes(path), Diagnoses)
    except (OSError, ValueError):
        return None


def intent_at(path: Path) -> Intent | None:
    """The intent of a job array; None where there is none that can be read."""
    try:
        return read(read_bytes(path), Intent)
    except (OSError, ValueError):
        return None


def heard_at(path: Path) -> dict[str, Heard]:
    """The last heartbeats that were seen, by job; none where they cannot be read."""
    try:
        found = read(read_bytes(path), dict[str, Heard])
        check_times([("seen_at", heard.seen_at) for heard in found.values()])
    except (OSError, ValueError):
        return {}
    return found


def record(text: bytes) -> RunResult:
    """A record. Raises NewerError for one of a later schema."""
    found = _of_this_schema(text, RunResult)
    if found.status not in (DONE, FAILED):
        raise ValueError(f"unknown status {found.status!r}")
    msgspec.convert(found.fingerprint, _Fingerprint)
    check_times([("started_at", found.started_at), ("ended_at", found.ended_at)])
    check_times([("attempt.started_at", found.attempt.started_at)])
    return found


def try_write(path: Path, document: Any) -> bool:
    """Write the document; returns whether it could be written."""
    try:
        write_json(path, document, parents=False)
    except OSError:
        return False
    return True
