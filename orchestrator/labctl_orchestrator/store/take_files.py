"""Database rows of the workspace's files, except records."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from labctl_orchestrator.request import lengths, sampling, tasks
from labctl_orchestrator.store import documents, schema
from labctl_orchestrator.store.database import CHARACTER_AFTER_ALL, RowMissingError, Store
from labctl_orchestrator.store.scan import File, Kind, origin_of
from labctl_orchestrator.store.views import HERE
from labctl_workers.record import Attempt, JobSpec, RunResult, RunSpec, ScoredText
from labctl_workers.workload import arrive_over_time, estimated_sizes, is_trace, steps_of, text_of

STATE_COLUMNS = documents.State.__struct_fields__
IMPORTED_STATE_COLUMNS = ("queued_at", "started_at", "ended_at", "held_before_s", "node")
RUN_NAMES = "SELECT run_id, model FROM runs WHERE run_id IN (SELECT value FROM json_each(?))"


def _take_submission(store: Store, file: File, text: bytes) -> None:
    submission = documents.read(text, documents.Submission)
    keys = ("submission_id", "name", "created_at", "labctl_version", "request")
    store.put("submissions", [{key: getattr(submission, key) for key in keys}])
    skipped = set(submission.skipped)
    store.put_values(
        "submission_runs",
        [
            (submission.submission_id, run_id, position, int(run_id in skipped))
            for position, run_id in enumerate(dict.fromkeys(submission.runs))
        ],
    )
    for job in submission.jobs:
        _add_runs(store, job)


def _take_array(store: Store, file: File, text: bytes) -> None:
    store.add("arrays", msgspec.structs.asdict(documents.read(text, documents.ArrayDocument)))


def _as_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _take_intent(store: Store, file: File, text: bytes) -> None:
    intent = documents.read(text, documents.Intent)
    lost = intent.lost_answer
    values = {
        # None: labctl retry resubmits the runs of a script that was submitted by hand.
        "submission_id": intent.submission_id or None, "intent_at": intent.at, "host": intent.host, "mark": intent.mark,
        "clusters": _as_json(intent.clusters), "lost_answer": _as_json(lost) if lost else None,
    }  # fmt: skip
    store.update("arrays", file.path.parent.name, values)


def _take_job(store: Store, file: File, text: bytes) -> None:
    job = documents.read(text, JobSpec)
    task = int(file.path.stem)
    store.add("jobs", {"job_id": job.job_id, "array_id": file.path.parent.name, "task": task, "loads": job.loads})
    runs = [(job.job_id, run.run_id, position) for position, run in enumerate(job.runs)]
    store.put_values("job_runs", runs)
    _add_runs(store, job)


def _take_moved(store: Store, file: File, text: bytes) -> None:
    for job_id, runs in documents.read(text, dict[str, dict[str, documents.Moved]]).items():
        rows = [(job_id, run_id, moved.job, moved.state) for run_id, moved in runs.items()]
        store.put_values("moved_runs", rows)


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


def _take_states(store: Store, file: File, text: bytes) -> None:
    take_states(store, documents.read(text, dict[str, documents.State]))


def take_states(store: Store, states: Mapping[str, documents.State]) -> None:
    """Update the jobs of an array from its states.json."""
    for job_id, state in states.items():
        store.update("jobs", job_id, msgspec.structs.asdict(state))


def _take_attempt(store: Store, file: File, text: bytes) -> None:
    attempt = documents.read(text, Attempt)
    _put_start(store, attempt)
    known = store.tuples("SELECT slurm_id FROM jobs WHERE job_id = ?", (attempt.job_id,))
    if not known or known[0] == (None,):
        # Only the worker knows the Slurm id of a script that a person submitted by hand.
        store.update("jobs", attempt.job_id, {"slurm_id": attempt.slurm_job_id})


def _put_start(store: Store, attempt: Attempt) -> None:
    store.put_values("job_starts", [[getattr(attempt, name) for name in schema.columns("job_starts")]])


def _add_runs(store: Store, job: JobSpec, origin: str = HERE) -> None:
    rows: list[dict[str, Any]] = []
    for run in job.runs:
        shared = {
            "partition": job.partition, "backend": job.backend, "model": job.model.name, "revision": job.model.revision,
            "dtype": job.dtype, "device": job.device, "gpus": job.gpus, "parallel": job.parallel,
            "engine_options": job.engine_options, "raw_prompt": int(job.raw_prompt), "defaults": job.defaults,
            "model_content": job.model.fingerprint or job.model.revision or "",
        }  # fmt: skip
        own = {
            "run_id": label(run.run_id, origin), "origin": origin,
            "prompt_set": run.prompt_set, "prompts": [text_of(prompt) for prompt in job.prompt_sets[run.prompt_set]],
            "max_new_tokens": run.max_new_tokens, "batch_size": None if unlimited(job, run) else run.batch_size,
            "served": int(job.served), "request_rate": run.request_rate,
            "burstiness": None if run.request_rate is None else run.burstiness,
            "requests": run.requests, "sampling": sampling.label(run.sampling),
            "ignore_eos": int(run.ignore_eos), "trace": int(is_trace(job.datasets.get(run.prompt_set))),
            "score": score_label(run.score), "quality": tasks.label(run.tasks),
            "steps": steps_of(estimated_sizes(job, run), run.batch_size),
        }  # fmt: skip
        rows.append({**shared, **own, **lengths.columns(run.workload)})
    # Copies of a checkpoint are one run. It keeps the model name that sorts first, so the reading order does not matter.
    known: dict[str, str] = dict(store.tuples(RUN_NAMES, (json.dumps([row["run_id"] for row in rows]),)))
    store.put("runs", [row for row in rows if row["model"] < known.get(row["run_id"], CHARACTER_AFTER_ALL)])


def score_label(score: ScoredText | None) -> str | None:
    """ "fables@0a1b2c3d 1024/512": the text, with digits of its hash, window and stride."""
    return None if score is None else f"{score.name}@{score.sha256[:8]} {score.window}/{score.stride}"


def unlimited(job: JobSpec, run: RunSpec) -> bool:
    """Whether a served run may have all its requests in flight."""
    return job.served and arrive_over_time(job, run) and run.batch_size >= (run.requests or 1)


def label(name: str, origin: str) -> str:
    """The id of a run, job or attempt in the database: imported ones add @ and their origin."""
    return name if origin == HERE else f"{name}@{origin}"


def labelled(result: RunResult, origin: str) -> RunResult:
    """The record with its ids as `label` writes them."""
    result.run_id = label(result.run_id, origin)
    _label_attempt(result.attempt, origin)
    return result


def _label_attempt(attempt: Attempt, origin: str) -> None:
    attempt.attempt_id, attempt.job_id = label(attempt.attempt_id, origin), label(attempt.job_id, origin)


def _take_bundle(store: Store, file: File, text: bytes) -> None:
    known = msgspec.structs.asdict(documents.read(text, documents.Bundle))
    store.put("bundles", [{**known, "origin": origin_of(file.name)}])


def _take_imported_job(store: Store, file: File, text: bytes) -> None:
    job, origin = documents.read(text, JobSpec), origin_of(file.name)
    store.add("jobs", {"job_id": label(job.job_id, origin), "task": int(file.path.stem)})
    _add_runs(store, job, origin)


def _take_imported_states(store: Store, file: File, text: bytes) -> None:
    for job_id, state in documents.read(text, dict[str, documents.State]).items():
        with contextlib.suppress(RowMissingError):  # a job without records in the bundle
            times = {column: getattr(state, column) for column in IMPORTED_STATE_COLUMNS}
            store.update("jobs", label(job_id, origin_of(file.name)), times)


def _take_imported_attempt(store: Store, file: File, text: bytes) -> None:
    attempt = documents.read(text, Attempt)
    _label_attempt(attempt, origin_of(file.name))
    _put_start(store, attempt)


TAKE: dict[Kind, Callable[[Store, File, bytes], None]] = {
    Kind.SUBMISSION: _take_submission, Kind.ARRAY: _take_array, Kind.JOB: _take_job, Kind.MOVED: _take_moved,
    Kind.INTENT: _take_intent, Kind.SUBMITTED: _take_submitted, Kind.STATES: _take_states, Kind.ATTEMPT: _take_attempt,
    Kind.BUNDLE: _take_bundle, Kind.IMPORTED_JOB: _take_imported_job, Kind.IMPORTED_STATES: _take_imported_states,
    Kind.IMPORTED_ATTEMPT: _take_imported_attempt,
}  # fmt: skip
