"""Files -> store. What is in the index already is skipped, so collecting twice is collecting once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labctl_orchestrator.store import BUSY_FOR_S, RowMissingError, Store
from labctl_orchestrator.workspace import Workspace
from labctl_slurm.errors import LabctlError
from labctl_workers import measure
from labctl_workers.record import Attempt, JobSpec, Repeat, RunResult, Sampling, read_json


@dataclass
class Collected:
    """How many new records were taken in, and which files could not be read: each with the reason."""

    records: int = 0
    damaged: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _File:
    path: Path
    name: str  # within the workspace: it may be moved
    mtime_ns: int
    size: int
    take: _Take


_Take = Callable[["Store", "_File", Any], None]


def open_store(workspace: Workspace) -> Store:
    """The workspace's database. Raises LabctlError where the file is no database or cannot be written."""
    try:
        return Store(workspace.database)
    except sqlite3.DatabaseError as error:
        raise LabctlError(f"{workspace.database}: {error}", "labctl collect --rebuild makes it again") from None


def rebuild(workspace: Workspace) -> Collected:
    """Make the database again from the files, and put it in the old one's place when it is whole."""
    fresh = workspace.database.with_suffix(f".rebuild-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    try:
        store = Store(fresh)
        try:
            collected = collect(workspace, store)
        finally:
            store.close()
        _replace(workspace.database, fresh)
    finally:
        fresh.unlink(missing_ok=True)
    return collected


def _replace(database: Path, fresh: Path) -> None:
    """Put the new database in the old one's place, with no one writing, and no journal left that would be played back."""
    old = sqlite3.connect(database, timeout=BUSY_FOR_S, isolation_level=None)
    try:
        with contextlib.suppress(sqlite3.DatabaseError):  # the old one may be what has to be mended
            old.execute("BEGIN EXCLUSIVE")
        Path(f"{database}-journal").unlink(missing_ok=True)
        fresh.replace(database)
    finally:
        old.close()


def collect(workspace: Workspace, store: Store) -> Collected:
    """Take in every file that is new or was changed, in one transaction."""
    collected = Collected()
    known = {row["path"]: (row["mtime_ns"], row["size"]) for row in store.rows("SELECT * FROM files")}
    if not any(_is_new(file, known) for file in _files(workspace)):
        return collected
    with store.writing():
        known = {row["path"]: (row["mtime_ns"], row["size"]) for row in store.rows("SELECT * FROM files")}
        for file in _files(workspace):
            if _is_new(file, known):
                _take(store, file, collected)
    return collected


# What a file may make of its reader that is not as labctl writes it; a full disk or a locked database is not among them.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    sqlite3.IntegrityError,
    sqlite3.ProgrammingError,
)


def _is_new(file: _File, known: dict[str, tuple[int, int]]) -> bool:
    return known.get(file.name) != (file.mtime_ns, file.size)


def _take(store: Store, file: _File, collected: Collected) -> None:
    try:
        with store.db.atomic():  # of a damaged file nothing is taken
            file.take(store, file, read_json(file.path))
    except (FileNotFoundError, RowMissingError):
        return  # gone since the folder was listed; or its turn comes when the file that it adds to can be read
    except DAMAGE as error:
        collected.damaged.append(f"{file.path}: {type(error).__name__}: {error}")
        _forget_result(store, file.name)
        return
    store.put("files", [{"path": file.name, "mtime_ns": file.mtime_ns, "size": file.size}])
    collected.records += file.take is _take_result


def _forget_result(store: Store, name: str) -> None:
    """Take out what was read from a record before it was damaged: what is in the index is in the files."""
    for row in store.rows("SELECT run_id, attempt_id FROM results WHERE path = ?", (name,)):
        key = (row["run_id"], row["attempt_id"])
        for table in OF_A_RESULT:
            store.remove(table, "run_id = ? AND attempt_id = ?", key)


OF_A_RESULT = ("samples", "devices", "repeats", "results")


# ---------------------------------------------------------------- which files


def _files(workspace: Workspace) -> Iterator[_File]:
    """Every file of the index, requests first, each kind in the order of its names."""
    yield from _listed(workspace, workspace.requests, lambda name: _take_request)
    for batch in _folders(workspace.batches):
        # In this order: what was planned, then what was said of it.
        found = list(_listed(workspace, batch, _TAKE_OF_A_BATCH.get)) + list(_listed(workspace, batch, _take_numbered))
        yield from sorted(found, key=lambda file: _ORDER_IN_A_BATCH[file.take])
        yield from _listed(workspace, batch / "attempts", lambda name: _take_attempt)
    for run in _folders(workspace.results):
        yield from _listed(workspace, run, lambda name: _take_result)


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(parent) if entry.is_dir())
    except FileNotFoundError:
        return []


def _listed(workspace: Workspace, folder: Path, take_of: Callable[[str], _Take | None]) -> Iterator[_File]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        take = None if entry.name.startswith(".") or not entry.name.endswith(".json") else take_of(entry.name)
        if take is None:
            continue
        try:
            status = entry.stat()
        except FileNotFoundError:
            continue
        name = os.path.relpath(entry.path, workspace.data)
        yield _File(Path(entry.path), name, status.st_mtime_ns, status.st_size, take)


# ---------------------------------------------------------------- what is taken from each


def _take_request(store: Store, file: _File, document: Any) -> None:
    request_id = document["request_id"]
    store.put(
        "requests", [{key: document[key] for key in ("request_id", "name", "created_at", "labctl_version", "request")}]
    )
    skipped = set(document["skipped"])
    order = list(dict.fromkeys(document["runs"]))
    store.put(
        "request_runs",
        [
            {"request_id": request_id, "run_id": run_id, "position": position, "skipped": int(run_id in skipped)}
            for position, run_id in enumerate(order)
        ],
    )
    for job in document["jobs"]:
        _add_runs(store, JobSpec.from_json(job))


def _take_batch(store: Store, file: _File, document: Any) -> None:
    store.add(
        "batches", [{key: document[key] for key in ("batch_id", "partition", "executor", "job_name", "created_at")}]
    )


def _take_intent(store: Store, file: _File, document: Any) -> None:
    values = {"request_id": document["request_id"], "intent_at": document["at"], "host": document["host"]}
    store.update("batches", file.path.parent.name, values)


def _take_job(store: Store, file: _File, document: Any) -> None:
    job = JobSpec.from_json(document)
    store.add("jobs", [{"job_id": job.job_id, "batch_id": file.path.parent.name, "task": int(file.path.stem)}])
    store.put(
        "job_runs",
        [{"job_id": job.job_id, "run_id": run.run_id, "position": position} for position, run in enumerate(job.runs)],
    )
    _add_runs(store, job)


def _take_submitted(store: Store, file: _File, document: Any) -> None:
    batch_id = file.path.parent.name
    values = {
        "submitted_at": document["at"], "refused": document.get("refused"), "remedy": document.get("remedy"),
        "never_queued": document.get("never_queued"),
    }  # fmt: skip
    store.update("batches", batch_id, values)
    ids = document.get("ids", [])
    starts = document.get("starts") or [None] * len(ids)
    for task, (slurm_id, start) in enumerate(zip(ids, starts, strict=True)):
        store.update("jobs", f"{batch_id}.{task}", {"slurm_id": slurm_id, "process_start": start})


STATE_COLUMNS = (
    "state",
    "reason",
    "node",
    "queued_at",
    "started_at",
    "ended_at",
    "exit_code",
    "gone_since",
    "observed_at",
)


def _take_states(store: Store, file: _File, document: Any) -> None:
    for job_id, state in document.items():
        store.update("jobs", job_id, {column: state.get(column) for column in STATE_COLUMNS})


def _take_attempt(store: Store, file: _File, document: Any) -> None:
    attempt = Attempt.from_json(document)
    columns = store.table("executions").columns_dict
    store.put("executions", [{name: value for name, value in attempt.to_json().items() if name in columns}])
    known = store.rows("SELECT slurm_id FROM jobs WHERE job_id = ?", (attempt.job_id,))
    if not known or known[0]["slurm_id"] is None:
        # A script that a person submitted by hand has its Slurm id from here alone.
        store.update("jobs", attempt.job_id, {"slurm_id": attempt.slurm_job_id})


def _take_numbered(name: str) -> _Take | None:
    return _take_job if name.removesuffix(".json").isdigit() else None


_TAKE_OF_A_BATCH: dict[str, _Take] = {
    "batch.json": _take_batch,
    "intent.json": _take_intent,
    "submitted.json": _take_submitted,
    "states.json": _take_states,
}
_ORDER_IN_A_BATCH: dict[_Take, int] = {
    take: place for place, take in enumerate((_take_batch, _take_job, _take_intent, _take_submitted, _take_states))
}


def _add_runs(store: Store, job: JobSpec) -> None:
    rows = []
    for run in job.runs:
        shared = {
            "partition": job.partition, "backend": job.backend, "model": job.model.name, "revision": job.model.revision,
            "dtype": job.dtype, "device": job.device, "gpus": job.gpus, "parallel": job.parallel,
            "engine_options": job.engine_options, "raw_prompt": int(job.raw_prompt),
            "model_content": job.model.fingerprint or job.model.revision or "",
        }  # fmt: skip
        own = {
            "run_id": run.run_id, "prompt_set": run.prompt_set, "prompts": job.prompt_sets[run.prompt_set],
            "max_new_tokens": run.max_new_tokens, "batch_size": run.batch_size,
            "request_rate": run.request_rate, "requests": run.requests, "sampling": sampling_label(run.sampling),
            "ignore_eos": int(run.ignore_eos), "asked": run.asked,
        }  # fmt: skip
        rows.append({**shared, **own})
    _put_runs(store, rows)


def _put_runs(store: Store, rows: list[dict[str, Any]]) -> None:
    """Copies of one checkpoint make one run: it goes by the name that sorts first, whichever was seen first."""
    known = {
        row["run_id"]: row["model"] for row in store.rows(RUN_NAMES, (json.dumps([row["run_id"] for row in rows]),))
    }
    store.put("runs", [row for row in rows if row["model"] < known.get(row["run_id"], CHARACTER_AFTER_ALL)])


RUN_NAMES = "SELECT run_id, model FROM runs WHERE run_id IN (SELECT value FROM json_each(?))"
CHARACTER_AFTER_ALL = chr(0x10FFFF)


def sampling_label(sampling: Sampling) -> str:
    """ "greedy", or the settings as they are written on the command line."""
    if sampling.greedy:
        return "greedy"
    return f"temperature={sampling.temperature:g},top_p={sampling.top_p:g},seed={sampling.seed or 0}"


def _take_result(store: Store, file: _File, document: Any) -> None:
    result = RunResult.from_json(document)
    key = {"run_id": result.run_id, "attempt_id": result.attempt.attempt_id}
    failure = result.failure
    store.put(
        "results",
        [
            {
                **key, "job_id": result.attempt.job_id, "status": result.status, "started_at": result.started_at,
                "ended_at": result.ended_at, "load_s": result.load_s, "init_s": result.init_s,
                "warmup_s": result.warmup_s, "node": result.attempt.node,
                "failure_kind": failure.kind if failure else None, "failure": failure.message if failure else None,
                "remedy": failure.remedy if failure else None, "fingerprint": result.fingerprint, "path": file.name,
            }
        ],
    )  # fmt: skip
    metrics = set(measure.METRICS)
    for repeat in result.repeats:
        at = {**key, "repeat": repeat.repeat}
        known = {name: value for name, value in repeat.metrics.items() if name in metrics}
        raw = {name: getattr(repeat, name) for name in RAW_OF_A_REPEAT}
        store.put("repeats", [{**at, **raw, **known}])
        columns = store.table("devices").columns_dict
        devices = [{k: v for k, v in memory.to_json().items() if k in columns} for memory in repeat.devices]
        store.put("devices", [{**at, **memory} for memory in devices])
        store.put("samples", _sample_rows(at, repeat))
        store.add("texts", [{"text_id": _text_id(sample.text), "text": sample.text} for sample in repeat.samples])


RAW_OF_A_REPEAT = ("wall_s", "seed", "read_bytes_per_step", "memory_bandwidth_bytes_s")


def _sample_rows(at: dict[str, Any], repeat: Repeat) -> list[dict[str, Any]]:
    return [
        {
            **at, "request": sample.request, "prompt": sample.prompt, "prompt_tokens": sample.prompt_tokens,
            "output_tokens": len(sample.token_ids), "ttft_s": measure.ttft_s(sample), "tpot_s": measure.tpot_s(sample),
            "e2e_s": measure.e2e_s(sample), "finish_reason": sample.finish_reason, "text_id": _text_id(sample.text),
            "mean_log_probability": measure.mean_log_probability(sample),
            "repeated_bigrams": measure.repeated_bigrams(sample), "handed_s": sample.handed_s,
            "queued_s": sample.queued_s, "engine_ttft_s": sample.engine_ttft_s,
        }
        for sample in repeat.samples
    ]  # fmt: skip


def _text_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
