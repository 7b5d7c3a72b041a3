"""The database's tables. A change raises `workspace.DATABASE_SCHEMA`, so that labctl builds a new database from the files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labctl_workers.measure import METRICS

if TYPE_CHECKING:  # it loads numpy if that is installed, which takes longer than most commands
    from sqlite_utils import Database

# table -> (columns, primary key)
TABLES: dict[str, tuple[dict[str, type], str | tuple[str, ...]]] = {
    # Indexed files, with modification time and size when they were read.
    "files": ({"path": str, "mtime_ns": int, "size": int}, "path"),
    # Folders with indexed files, with the modification time when all their files were indexed (0: not all, or lately).
    "folders": ({"path": str, "mtime_ns": int}, "path"),
    # The version of each metric's definition that computed the rows.
    "metric_versions": ({"metric": str, "version": int}, "metric"),
    "texts": ({"text_id": str, "text": str}, "text_id"),
    "submissions": (
        {"submission_id": str, "name": str, "created_at": str, "labctl_version": str, "request": str}, "submission_id",
    ),
    # `origin`: "here", or the label of an imported bundle. `defaults` (JSON): dtype and GPUs that the partition gives to runs
    # without their own. `input_len` and `output_len` hold texts of distributions too. `steps`: decode steps of a repeat in static
    # batches. `score`: the scored text with its window and stride. `quality`: the tasks. `trace`: 1 where requests arrive at the
    # times of a trace.
    "runs": (
        {
            "run_id": str, "partition": str, "backend": str, "model": str, "revision": str, "dtype": str, "device": str,
            "gpus": int, "parallel": str, "engine_options": str, "raw_prompt": int, "prompt_set": str, "prompts": str,
            "max_new_tokens": int, "batch_size": int, "sampling": str, "ignore_eos": int,
            "model_content": str, "served": int, "request_rate": float, "burstiness": float,
            "requests": int, "origin": str, "defaults": str, "input_len": int, "output_len": int, "prefix_len": int,
            "dataset": str, "workload_seed": int, "trace": int, "steps": int, "score": str,
            "quality": str,
        },
        "run_id",
    ),
    "submission_runs": ({"submission_id": str, "run_id": str, "position": int, "skipped": int}, ("submission_id", "run_id")),
    # `time_s` (seconds) and `gpus`: limits in the script. `never_queued`: time of the finding that sbatch queued nothing. `mark`:
    # labctl's id in Slurm's comment field. `clusters` (JSON): where the array may be. `lost_answer` (JSON): sbatch printed no id.
    "arrays": (
        {
            "array_id": str, "submission_id": str, "partition": str, "executor": str, "job_name": str, "created_at": str,
            "intent_at": str, "submitted_at": str, "host": str, "refused": str, "remedy": str, "never_queued": str,
            "time_s": int, "gpus": int, "mark": str, "clusters": str, "lost_answer": str,
        },
        "array_id",
    ),
    # `queued_at`: Slurm's submit time. `gone_since`: since then Slurm answers without this job. `held_before_s`: time that
    # earlier starts held their nodes. `loads`: planned engine loads.
    "jobs": (
        {
            "job_id": str, "array_id": str, "task": int, "slurm_id": str, "process_start": str, "state": str,
            "reason": str, "node": str, "started_at": str, "ended_at": str, "exit_code": str, "observed_at": str,
            "queued_at": str, "gone_since": str, "held_before_s": float, "loads": int,
        },
        "job_id",
    ),
    "job_runs": ({"job_id": str, "run_id": str, "position": int}, ("job_id", "run_id")),
    # Runs that `labctl retry` moved from `job_id` to job `moved_to`; `moved_in_state`: the run's state at that time.
    "moved_runs": ({"job_id": str, "run_id": str, "moved_to": str, "moved_in_state": str}, ("job_id", "run_id")),
    # Starts of jobs: a requeued job has several.
    "job_starts": (
        {
            "attempt_id": str, "job_id": str, "started_at": str, "host": str, "node": str, "pid": int,
            "slurm_job_id": str, "slurm_partition": str, "restarts": int,
        },
        "attempt_id",
    ),
    # Records. `facts` is the part of the fingerprint that comparisons read. The columns after it summarize all requests and
    # samples, so that a comparison need not read them: `window` (JSON) is `window.Window`, `invalid` its kinds, NULL for none.
    # `result_id`: a hash of the key, by which a comparison finds the repeats faster than by two texts.
    "results": (
        {
            "run_id": str, "attempt_id": str, "job_id": str, "status": str, "started_at": str, "ended_at": str,
            "load_s": float, "init_s": float, "warmup_s": float, "node": str, "failure_kind": str, "failure": str,
            "remedy": str, "fingerprint": str, "path": str, "facts": str, "tokens_generated": str, "finish_reasons": str,
            "text_id": str, "prompt_tokens": int, "empty_answers": int, "answers_without_tokens": int,
            "window": str, "invalid": str, "shortest_pass_s": float, "score_error": str, "task_error": str,
            "result_id": int,
        },
        ("run_id", "attempt_id"),
    ),
    # `discarded`: repeats before this one in which Slurm suspended the job.
    "repeats": (
        {
            "run_id": str, "attempt_id": str, "repeat": int, "result_id": int, "wall_s": float, "seed": int,
            "read_bytes_per_step": float, "memory_bandwidth_bytes_s": float, "discarded": int,
        },
        ("run_id", "attempt_id", "repeat"),
    ),
    "devices": (
        {
            "run_id": str, "attempt_id": str, "repeat": int, "device": str, "name": str, "weights_bytes": int,
            "peak_allocated_bytes": int, "peak_reserved_bytes": int, "device_used_bytes": int, "kv_cache_used_bytes": int,
            "kv_cache_reserved_bytes": int,
        },
        ("run_id", "attempt_id", "repeat", "device"),
    ),
    # One request of one repeat.
    "samples": (
        {
            "run_id": str, "attempt_id": str, "repeat": int, "request": int, "prompt": int, "prompt_tokens": int,
            "output_tokens": int, "ttft_s": float, "tpot_s": float, "e2e_s": float, "finish_reason": str, "text_id": str,
            "mean_log_probability": float, "repeated_bigrams": float, "handed_s": float, "queued_s": float,
            "engine_ttft_s": float, "error": str,
        },
        ("run_id", "attempt_id", "repeat", "request"),
    ),
    # One document of a run's scored text: the sum of the negative log-likelihoods of its `tokens`, in nats.
    "documents": (
        {"run_id": str, "attempt_id": str, "document": int, "nll": float, "tokens": int},
        ("run_id", "attempt_id", "document"),
    ),
    # One question of a run's tasks; `correct` is from 0 to 1, by `metric` of the harness.
    "questions": (
        {"run_id": str, "attempt_id": str, "task": str, "question": int, "hash": str, "metric": str, "correct": float},
        ("run_id", "attempt_id", "task", "question"),
    ),
    "bundles": (
        {
            "bundle_id": str, "origin": str, "name": str, "author": str, "labctl_version": str, "records": int,
            "sha256": str,
        },
        "bundle_id",
    ),
}  # fmt: skip
DEFAULTS: dict[str, dict[str, str | int]] = {
    "runs": {"origin": "here", "defaults": "{}"},
    "jobs": {"loads": 1},
    "results": {"empty_answers": 0, "answers_without_tokens": 0},
}
INDEXES = (
    ("runs", ["origin"]),
    ("job_runs", ["run_id"]),
    ("submission_runs", ["run_id"]),
    ("job_starts", ["job_id", "restarts", "slurm_job_id"]),
    ("results", ["job_id"]),
    ("results", ["path"]),
    ("results", ["run_id", "status", "job_id"]),
    # A covering index for comparisons, ordered by time: reading the rows would read the large fingerprints.
    (
        "results",
        [
            "status", "ended_at", "attempt_id", "run_id", "facts", "tokens_generated", "finish_reasons", "text_id",
            "prompt_tokens", "empty_answers", "answers_without_tokens", "node", "window", "invalid", "shortest_pass_s",
            "result_id",
        ],
    ),
)  # fmt: skip
# Datasette makes links of these. SQLite does not enforce them by default, so a record whose job file is damaged stays.
FOREIGN_KEYS = {
    "submission_runs": {"submission_id": "submissions", "run_id": "runs"},
    "arrays": {"submission_id": "submissions"},
    "jobs": {"array_id": "arrays"},
    "job_runs": {"job_id": "jobs", "run_id": "runs"},
    "job_starts": {"job_id": "jobs"},
    "results": {"run_id": "runs", "attempt_id": "job_starts", "job_id": "jobs", "text_id": "texts"},
    "repeats": {"run_id": "runs", "attempt_id": "job_starts"},
    "devices": {"run_id": "runs", "attempt_id": "job_starts"},
    "questions": {"run_id": "runs", "attempt_id": "job_starts"},
    "documents": {"run_id": "runs", "attempt_id": "job_starts"},
    "samples": {"run_id": "runs", "attempt_id": "job_starts", "text_id": "texts"},
}


def columns(table: str) -> list[str]:
    """The columns of a table, in order. Those of `repeats` end with the metrics."""
    return [*TABLES[table][0], *(METRICS if table == "repeats" else ())]


def make(db: Database) -> None:
    """Create the tables in an empty database."""
    for table, (kinds, key) in TABLES.items():
        metrics = dict.fromkeys(METRICS, float) if table == "repeats" else {}
        defaults = DEFAULTS.get(table, {})
        db.table(table).create(
            {**kinds, **metrics},
            pk=key,
            not_null=set(defaults),
            defaults=defaults,
            foreign_keys=[(column, other, column) for column, other in FOREIGN_KEYS.get(table, {}).items()],
        )
    for number, (table, indexed) in enumerate(INDEXES):
        db.table(table).create_index(indexed, index_name=f"{table}_{number}" if len(indexed) < 4 else "results_by_time")
