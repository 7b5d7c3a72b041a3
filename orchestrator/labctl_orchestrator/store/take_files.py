"""What is taken from each file of a workspace into the database."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from labctl_orchestrator.request import sampling
from labctl_orchestrator.store import documents
from labctl_orchestrator.store.database import CHARACTER_AFTER_ALL, RowMissingError, Store
from labctl_orchestrator.store.scan import File, Kind, origin_of
from labctl_orchestrator.store.views import HERE
from labctl_workers.record import (
    JobSpec,
    RunResult,
)


def _take_submission(store: Store, file: File, text: bytes) -> None:
    request = documents.read(text, documents.Submission)
    keys = ("submission_id", "name", "created_at", "labctl_version", "request")
    store.put("submissions", [{key: getattr(request, key) for key in keys}])
    skipped = set(request.skipped)
    store.put(
        "submission_runs",
        [
            {
                "submission_id": request.submission_id,
                "run_id": run_id,
                "position": position,
                "skipped": int(run_id in skipped),
            }
            for position, run_id in enumerate(dict.fromkeys(request.runs))
        ],
    )
    for job in request.jobs:
        _add_runs(store, job)


def _take_array(store: Store, file: File, text: bytes) -> None:
    store.add("arrays", [msgspec.structs.asdict(documents.read(text, documents.ArrayDocument))])


def _as_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _take_intent(store: Store, file: File, text: bytes) -> None:
    intent = documents.read(text, documents.Intent)
    # Of no request: runs of a script that was sent by hand, submitted again.
    lost = intent.lost_answer
    values = {
        "submission_id": intent.submission_id or None, "intent_at": intent.at, "host": intent.host, "mark": intent.mark,
        "clusters": _as_json(intent.clusters), "lost_answer": _as_json(lost) if lost else None,
    }  # fmt: skip
    store.update("arrays", file.path.parent.name, values)


def _take_job(store: Store, file: File, text: bytes) -> None:
    job = documents.job(text)
    task = int(file.path.stem)
    store.add("jobs", [{"job_id": job.job_id, "array_id": file.path.parent.name, "task": task, "loads": job.loads}])
    store.put(
        "job_runs",
        [{"job_id": job.job_id, "run_id": run.run_id, "position": position} for position, run in enumerate(job.runs)],
    )
    _add_runs(store, job)


def _take_given(store: Store, file: File, text: bytes) -> None:
    """Which runs of the array's jobs labctl gave to other jobs, and in which state it found them."""
    for job_id, runs in documents.read(text, dict[str, dict[str, documents.Given]]).items():
        for run_id, to in runs.items():
            store.put("given_runs", [{"job_id": job_id, "run_id": run_id, "given_to": to.job, "given_as": to.state}])


def _take_submitted(store: Store, file: File, text: bytes) -> None:
    array_id = file.path.parent.name
    submitted = documents.read(text, documents.Submitted)
    values = {
        "submitted_at": submitted.at, "refused": submitted.refused, "remedy": submitted.remedy,
        "never_queued": submitted.never_queued,
    }  # fmt: skip
    if submitted.clusters:
        values["clusters"] = _as_json(submitted.clusters)
    store.update("arrays", array_id, values)
    starts = submitted.starts or [None] * len(submitted.ids)
    for task, (slurm_id, start) in enumerate(zip(submitted.ids, starts, strict=True)):
        store.update("jobs", f"{array_id}.{task}", {"slurm_id": slurm_id, "process_start": start})


STATE_COLUMNS = documents.State.__struct_fields__


def _take_states(store: Store, file: File, text: bytes) -> None:
    take_states(store, documents.read(text, dict[str, documents.State]))


def take_states(store: Store, states: Mapping[str, documents.State]) -> None:
    """Set the states of an array's jobs, by job, as its states.json holds them."""
    for job_id, state in states.items():
        store.update("jobs", job_id, msgspec.structs.asdict(state))


def _take_attempt(store: Store, file: File, text: bytes) -> None:
    attempt = documents.attempt(text)
    columns = store.columns("executions")
    store.put("executions", [{name: value for name, value in vars(attempt).items() if name in columns}])
    known = store.rows("SELECT slurm_id FROM jobs WHERE job_id = ?", (attempt.job_id,))
    if not known or known[0]["slurm_id"] is None:
        # A script that a person submitted by hand has its Slurm id from here alone.
        store.update("jobs", attempt.job_id, {"slurm_id": attempt.slurm_job_id})


def _add_runs(store: Store, job: JobSpec, origin: str = HERE) -> None:
    rows = []
    for run in job.runs:
        shared = {
            "partition": job.partition, "backend": job.backend, "model": job.model.name, "revision": job.model.revision,
            "dtype": job.dtype, "device": job.device, "gpus": job.gpus, "parallel": job.parallel,
            "engine_options": job.engine_options, "raw_prompt": int(job.raw_prompt), "defaults": job.defaults,
            "model_content": job.model.fingerprint or job.model.revision or "",
        }  # fmt: skip
        own = {
            "run_id": label(run.run_id, origin), "origin": origin,
            "prompt_set": run.prompt_set, "prompts": job.prompt_sets[run.prompt_set],
            "max_new_tokens": run.max_new_tokens, "batch_size": run.batch_size,
            "request_rate": run.request_rate, "requests": run.requests, "sampling": sampling.label(run.sampling),
            "ignore_eos": int(run.ignore_eos), "asked": run.asked,
        }  # fmt: skip
        rows.append({**shared, **own})
    # Copies of one checkpoint make one run: it goes by the name that sorts first, whichever was seen first.
    known = {
        row["run_id"]: row["model"] for row in store.rows(RUN_NAMES, (json.dumps([row["run_id"] for row in rows]),))
    }
    store.put("runs", [row for row in rows if row["model"] < known.get(row["run_id"], CHARACTER_AFTER_ALL)])


RUN_NAMES = "SELECT run_id, model FROM runs WHERE run_id IN (SELECT value FROM json_each(?))"


def label(name: str, origin: str) -> str:
    return name if origin == HERE else f"{name}@{origin}"


def labelled(result: RunResult, origin: str) -> RunResult:
    if origin != HERE:
        attempt = result.attempt
        result.run_id = label(result.run_id, origin)
        attempt.attempt_id, attempt.job_id = label(attempt.attempt_id, origin), label(attempt.job_id, origin)
    return result


def _take_bundle(store: Store, file: File, text: bytes) -> None:
    known = msgspec.structs.asdict(documents.read(text, documents.Bundle))
    store.put("bundles", [{**known, "origin": origin_of(file.name)}])


def _take_imported_job(store: Store, file: File, text: bytes) -> None:
    job, origin = documents.job(text), origin_of(file.name)
    store.add("jobs", [{"job_id": label(job.job_id, origin), "task": int(file.path.stem)}])
    _add_runs(store, job, origin)


TIME_COLUMNS = ("queued_at", "started_at", "ended_at", "held_before_s", "node")


def _take_imported_states(store: Store, file: File, text: bytes) -> None:
    """The times of the jobs that the bundle has records of."""
    for job_id, state in documents.read(text, dict[str, documents.State]).items():
        with contextlib.suppress(RowMissingError):
            times = {column: getattr(state, column) for column in TIME_COLUMNS}
            store.update("jobs", label(job_id, origin_of(file.name)), times)


def _take_imported_attempt(store: Store, file: File, text: bytes) -> None:
    attempt, origin = documents.attempt(text), origin_of(file.name)
    attempt.attempt_id, attempt.job_id = label(attempt.attempt_id, origin), label(attempt.job_id, origin)
    columns = store.columns("executions")
    store.put("executions", [{name: value for name, value in vars(attempt).items() if name in columns}])


TAKE: dict[Kind, Callable[[Store, File, bytes], None]] = {
    Kind.SUBMISSION: _take_submission, Kind.ARRAY: _take_array, Kind.JOB: _take_job, Kind.GIVEN: _take_given,
    Kind.INTENT: _take_intent, Kind.SUBMITTED: _take_submitted, Kind.STATES: _take_states, Kind.ATTEMPT: _take_attempt,
    Kind.BUNDLE: _take_bundle, Kind.IMPORTED_JOB: _take_imported_job, Kind.IMPORTED_STATES: _take_imported_states,
    Kind.IMPORTED_ATTEMPT: _take_imported_attempt,
}  # fmt: skip
