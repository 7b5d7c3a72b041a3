"""The database's tables. A change of them takes the next number in `workspace.DATABASE_SCHEMA`: each labctl then makes its own
database from the files.

Imported only where one is to be made: sqlite-utils loads numpy where that is installed, which takes longer than most commands.
"""

from __future__ import annotations

from sqlite_utils import Database

from labctl_workers.measure import METRICS

# table -> (its columns, its key)
TABLES: dict[str, tuple[dict[str, type], str | tuple[str, ...]]] = {
    # Which files are in the index, as they were when they were read.
    "files": ({"path": str, "mtime_ns": int, "size": int}, "path"),
    # Folders of records whose files are all in the index, as they were when that was seen.
    "folders": ({"path": str, "mtime_ns": int}, "path"),
    # The version of each metric's definition by which the rows were computed.
    "definitions": ({"metric": str, "version": int}, "metric"),
    "texts": ({"text_id": str, "text": str}, "text_id"),
    "submissions": (
        {"submission_id": str, "name": str, "created_at": str, "labctl_version": str, "request": str}, "submission_id",
    ),
    # `origin`: "here" is this workspace, any other the label of imported bundles. `defaults`: which dtype and how many GPUs the
    # partition gives where nobody names them, as JSON.
    "runs": (
        {
            "run_id": str, "partition": str, "backend": str, "model": str, "revision": str, "dtype": str, "device": str,
            "gpus": int, "parallel": str, "engine_options": str, "raw_prompt": int, "prompt_set": str, "prompts": str,
            "max_new_tokens": int, "batch_size": int, "sampling": str, "ignore_eos": int, "asked": str,
            "model_content": str, "request_rate": float, "requests": int, "origin": str, "defaults": str,
        },
        "run_id",
    ),
    "submission_runs": ({"submission_id": str, "run_id": str, "position": int, "skipped": int}, ("submission_id", "run_id")),
    # `time_s` seconds and `gpus` are what the script asks Slurm for; `never_queued`: when it was found that Slurm never had it.
    # `mark` tells a submission from all others at Slurm; `clusters` (JSON) may have it; `lost_answer` (JSON): sbatch gave no id.
    "arrays": (
        {
            "array_id": str, "submission_id": str, "partition": str, "executor": str, "job_name": str, "created_at": str,
            "intent_at": str, "submitted_at": str, "host": str, "refused": str, "remedy": str, "never_queued": str,
            "time_s": int, "gpus": int, "mark": str, "clusters": str, "lost_answer": str,
        },
        "array_id",
    ),
    # `queued_at` is Slurm's own time of submission; `gone_since`: Slurm answered, and had the job no more; `held_before_s`: how
    # long earlier starts held their nodes; `loads`: engine loads.
    "jobs": (
        {
            "job_id": str, "array_id": str, "task": int, "slurm_id": str, "process_start": str, "state": str,
            "reason": str, "node": str, "started_at": str, "ended_at": str, "exit_code": str, "observed_at": str,
            "queued_at": str, "gone_since": str, "held_before_s": float, "loads": int,
        },
        "job_id",
    ),
    "job_runs": ({"job_id": str, "run_id": str, "position": int}, ("job_id", "run_id")),
    # Which runs were given to another job (`given_as`: the state that they were in).
    "given_runs": ({"job_id": str, "run_id": str, "given_to": str, "given_as": str}, ("job_id", "run_id")),
    # Jobs that began.
    "executions": (
        {
            "attempt_id": str, "job_id": str, "started_at": str, "host": str, "node": str, "pid": int,
            "slurm_job_id": str, "slurm_partition": str, "restarts": int,
        },
        "attempt_id",
    ),
    # One run of one execution. `facts` are what is read of the fingerprint; the columns after it are what is compared of all
    # requests, without a look at each.
    "results": (
        {
            "run_id": str, "attempt_id": str, "job_id": str, "status": str, "started_at": str, "ended_at": str,
            "load_s": float, "init_s": float, "warmup_s": float, "node": str, "failure_kind": str, "failure": str,
            "remedy": str, "fingerprint": str, "path": str, "facts": str, "tokens_generated": str, "finish_reasons": str,
            "text_id": str, "prompt_tokens": int, "empty_answers": int, "answers_without_tokens": int,
        },
        ("run_id", "attempt_id"),
    ),
    # `thrown_away`: passes in which the job was suspended.
    "repeats": (
        {
            "run_id": str, "attempt_id": str, "repeat": int, "wall_s": float, "seed": int, "read_bytes_per_step": float,
            "memory_bandwidth_bytes_s": float, "thrown_away": int,
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
            "engine_ttft_s": float,
        },
        ("run_id", "attempt_id", "repeat", "request"),
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
    ("executions", ["job_id", "restarts", "slurm_job_id"]),
    ("results", ["job_id"]),
    ("results", ["path"]),
    ("results", ["run_id", "status", "job_id"]),
    # All that is compared of a result, in order, without a look at the rows, of which the fingerprint takes the most room.
    (
        "results",
        [
            "status", "ended_at", "attempt_id", "run_id", "facts", "tokens_generated", "finish_reasons", "text_id",
            "prompt_tokens", "empty_answers", "answers_without_tokens",
        ],
    ),
)  # fmt: skip
# What a column names a row of: a reader such as Datasette follows it. Written down, not enforced (SQLite's default): a record
# whose job's file is damaged is kept all the same.
FOREIGN_KEYS = {
    "submission_runs": {"submission_id": "submissions", "run_id": "runs"},
    "arrays": {"submission_id": "submissions"},
    "jobs": {"array_id": "arrays"},
    "job_runs": {"job_id": "jobs", "run_id": "runs"},
    "executions": {"job_id": "jobs"},
    "results": {"run_id": "runs", "attempt_id": "executions", "job_id": "jobs", "text_id": "texts"},
    "repeats": {"run_id": "runs", "attempt_id": "executions"},
    "devices": {"run_id": "runs", "attempt_id": "executions"},
    "samples": {"run_id": "runs", "attempt_id": "executions", "text_id": "texts"},
}


def make(db: Database) -> None:
    """Make the tables in an empty database."""
    for table, (columns, key) in TABLES.items():
        metrics = dict.fromkeys(METRICS, float) if table == "repeats" else {}
        defaults = DEFAULTS.get(table, {})
        db.table(table).create(
            {**columns, **metrics},
            pk=key,
            not_null=set(defaults),
            defaults=defaults,
            foreign_keys=[(column, other, column) for column, other in FOREIGN_KEYS.get(table, {}).items()],
        )
    for number, (table, indexed) in enumerate(INDEXES):
        db.table(table).create_index(indexed, index_name=f"{table}_{number}" if len(indexed) < 4 else "results_by_time")
