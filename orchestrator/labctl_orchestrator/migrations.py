"""The database's tables, and how an older database gets them. Imported only where one is to be changed: sqlite-utils loads
numpy where that is installed, which takes longer than most commands."""

from __future__ import annotations

import json

from sqlite_utils import Database, Migrations

from labctl_orchestrator.measured import facts_of

migrations = Migrations("labctl")


@migrations()
def m001_the_files(db: Database) -> None:
    """Which files are in the index, as they were when they were read."""
    db.table("files").create({"path": str, "mtime_ns": int, "size": int}, pk="path")


@migrations()
def m002_what_was_asked(db: Database) -> None:
    db.table("requests").create(
        {"request_id": str, "name": str, "created_at": str, "labctl_version": str, "request": str}, pk="request_id"
    )
    db.table("request_runs").create(
        {"request_id": str, "run_id": str, "position": int, "skipped": int}, pk=("request_id", "run_id")
    )
    db.table("runs").create(
        {
            "run_id": str, "partition": str, "backend": str, "model": str, "revision": str, "dtype": str, "device": str,
            "gpus": int, "parallel": str, "engine_options": str, "raw_prompt": int, "prompt_set": str, "prompts": str,
            "max_new_tokens": int, "batch_size": int, "sampling": str, "ignore_eos": int, "asked": str,
        },
        pk="run_id",
    )  # fmt: skip


@migrations()
def m003_what_was_submitted(db: Database) -> None:
    db.table("batches").create(
        {
            "batch_id": str, "request_id": str, "partition": str, "executor": str, "job_name": str, "created_at": str,
            "intent_at": str, "submitted_at": str, "host": str, "refused": str, "remedy": str,
        },
        pk="batch_id",
    )  # fmt: skip
    db.table("jobs").create(
        {
            "job_id": str, "batch_id": str, "task": int, "slurm_id": str, "process_start": str, "state": str,
            "reason": str, "node": str, "started_at": str, "ended_at": str, "exit_code": str, "observed_at": str,
        },
        pk="job_id",
    )  # fmt: skip
    db.table("job_runs").create({"job_id": str, "run_id": str, "position": int}, pk=("job_id", "run_id"))
    db.table("job_runs").create_index(["run_id"])


@migrations()
def m004_what_came_back(db: Database) -> None:
    """`executions` are jobs that began; `results` one run of one execution; `samples` one request of one repeat."""
    db.table("executions").create(
        {
            "attempt_id": str, "job_id": str, "started_at": str, "host": str, "node": str, "pid": int,
            "slurm_job_id": str, "slurm_partition": str, "restarts": int,
        },
        pk="attempt_id",
    )  # fmt: skip
    db.table("results").create(
        {
            "run_id": str, "attempt_id": str, "job_id": str, "status": str, "started_at": str, "ended_at": str,
            "load_s": float, "init_s": float, "warmup_s": float, "node": str, "failure_kind": str, "failure": str,
            "remedy": str, "fingerprint": str, "path": str,
        },
        pk=("run_id", "attempt_id"),
    )  # fmt: skip
    db.table("results").create_index(["job_id"])
    db.table("repeats").create(
        {"run_id": str, "attempt_id": str, "repeat": int, "wall_s": float, "seed": int},
        pk=("run_id", "attempt_id", "repeat"),
    )
    db.table("devices").create(
        {
            "run_id": str, "attempt_id": str, "repeat": int, "device": str, "name": str, "weights_bytes": int,
            "peak_allocated_bytes": int, "peak_reserved_bytes": int, "device_used_bytes": int,
        },
        pk=("run_id", "attempt_id", "repeat", "device"),
    )  # fmt: skip
    db.table("samples").create(
        {
            "run_id": str, "attempt_id": str, "repeat": int, "request": int, "prompt": int, "prompt_tokens": int,
            "output_tokens": int, "ttft_s": float, "tpot_s": float, "e2e_s": float, "finish_reason": str, "text_id": str,
        },
        pk=("run_id", "attempt_id", "repeat", "request"),
    )  # fmt: skip
    db.table("texts").create({"text_id": str, "text": str}, pk="text_id")


@migrations()
def m005_more_of_memory_and_of_the_queue(db: Database) -> None:
    """`queued_at` is Slurm's own time of submission: the wait is from there to `started_at`."""
    for column in ("kv_cache_used_bytes", "kv_cache_reserved_bytes"):
        db.table("devices").add_column(column, int)
    db.table("jobs").add_column("queued_at", str)
    db.table("runs").add_column("model_content", str)
    for column in ("read_bytes_per_step", "memory_bandwidth_bytes_s"):
        db.table("repeats").add_column(column, float)
    db.table("samples").add_column("mean_log_probability", float)
    db.table("samples").add_column("repeated_bigrams", float)


@migrations()
def m006_requests_that_come_at_a_rate(db: Database) -> None:
    db.table("runs").add_column("request_rate", float)
    db.table("runs").add_column("requests", int)
    for column in ("handed_s", "queued_s", "engine_ttft_s"):
        db.table("samples").add_column(column, float)


@migrations()
def m007_what_slurm_has_no_more(db: Database) -> None:
    """`gone_since`: Slurm answered, and had the job no more; `never_queued`: when it was found that it never had the batch."""
    db.table("jobs").add_column("gone_since", str)
    db.table("batches").add_column("never_queued", str)


@migrations()
def m008_what_is_told_of_all_requests(db: Database) -> None:
    """What is compared of every result, without a look at its requests or its whole fingerprint: which numbers of tokens
    they have and which ends, and the first one's text; `facts` are what is read of the fingerprint. The records
    are read once more for it."""
    for column in ("facts", "tokens_generated", "finish_reasons", "text_id"):
        db.table("results").add_column(column, str)
    db.table("results").create_index(["path"])
    db.execute("UPDATE files SET mtime_ns = -1 WHERE path LIKE 'results/%'")


@migrations()
def m009_clocks_and_drivers_among_the_facts(db: Database) -> None:
    """What a comparison reads of a fingerprint is taken from it once more."""
    rows = db.execute("SELECT run_id, attempt_id, fingerprint FROM results").fetchall()
    again = [
        (json.dumps(facts_of(json.loads(row[2] or "{}")), sort_keys=True, ensure_ascii=False), *row[:2]) for row in rows
    ]
    db.conn.executemany("UPDATE results SET facts = ? WHERE run_id = ? AND attempt_id = ?", again)


# What a column names a row of: a reader such as Datasette follows it. Written down, not enforced (SQLite's default): a record
# whose job's file is damaged is kept all the same.
FOREIGN_KEYS = (
    ("request_runs", "request_id", "requests", "request_id"),
    ("request_runs", "run_id", "runs", "run_id"),
    ("batches", "request_id", "requests", "request_id"),
    ("jobs", "batch_id", "batches", "batch_id"),
    ("job_runs", "job_id", "jobs", "job_id"),
    ("job_runs", "run_id", "runs", "run_id"),
    ("executions", "job_id", "jobs", "job_id"),
    ("results", "run_id", "runs", "run_id"),
    ("results", "attempt_id", "executions", "attempt_id"),
    ("results", "job_id", "jobs", "job_id"),
    ("results", "text_id", "texts", "text_id"),
    ("repeats", "run_id", "runs", "run_id"),
    ("repeats", "attempt_id", "executions", "attempt_id"),
    ("devices", "run_id", "runs", "run_id"),
    ("devices", "attempt_id", "executions", "attempt_id"),
    ("samples", "run_id", "runs", "run_id"),
    ("samples", "attempt_id", "executions", "attempt_id"),
    ("samples", "text_id", "texts", "text_id"),
)


@migrations()
def m010_what_names_what(db: Database) -> None:
    """Foreign keys, and whose a run is: "here" is this workspace, any other the label of imported bundles."""
    db.add_foreign_keys(FOREIGN_KEYS)
    db.execute("UPDATE batches SET request_id = NULL WHERE request_id = ''")
    db.table("runs").add_column("origin", str, not_null_default="here")
    db.table("bundles").create(
        {
            "bundle_id": str, "origin": str, "name": str, "author": str, "labctl_version": str, "records": int,
            "sha256": str,
        },
        pk="bundle_id",
    )  # fmt: skip


@migrations()
def m011_results_by_time(db: Database) -> None:
    """All that is compared of a result, in order, without a look at the rows, of which the fingerprint takes the most room."""
    columns = "status, ended_at, attempt_id, run_id, facts, tokens_generated, finish_reasons, text_id"
    db.execute(f"CREATE INDEX results_by_time ON results ({columns})")


@migrations()
def m012_folders_that_need_no_listing(db: Database) -> None:
    """Folders of records whose files are all in the index, as they were when that was seen. What is not in the files: a
    database that is made again begins without it."""
    db.table("folders").create({"path": str, "mtime_ns": int}, pk="path")


@migrations()
def m013_gpu_time(db: Database) -> None:
    """What a script asks Slurm for (`time_s` seconds, `gpus`), and how long a job's earlier starts held their nodes."""
    db.table("batches").add_column("time_s", int)
    db.table("batches").add_column("gpus", int)
    db.table("jobs").add_column("held_before_s", float)
    db.table("executions").create_index(["job_id", "restarts", "slurm_job_id"])
    db.table("request_runs").create_index(["run_id"])


@migrations()
def m014_defaults_of_a_partition(db: Database) -> None:
    """Which dtype and how many GPUs a run's partition gives where nobody names them, as JSON."""
    db.table("runs").add_column("defaults", str, not_null_default="{}")


@migrations()
def m015_metrics_by_their_definitions(db: Database) -> None:
    """`definitions`: the version of each metric's definition by which the rows were computed. `thrown_away`: passes in which the
    job was suspended."""
    db.table("definitions").create({"metric": str, "version": int}, pk="metric")
    db.table("repeats").add_column("thrown_away", int)


@migrations()
def m016_what_makes_a_figure_doubtful(db: Database) -> None:
    """Tokens of the longest prompt, and how many answers have no text, or no token. The records are read once more for it."""
    db.table("results").add_column("prompt_tokens", int)
    for column in ("empty_answers", "answers_without_tokens"):
        db.table("results").add_column(column, int, not_null_default=0)
    db.execute("UPDATE files SET mtime_ns = -1 WHERE path LIKE 'results/%'")
    db.execute("DROP INDEX results_by_time")
    columns = "status, ended_at, attempt_id, run_id, facts, tokens_generated, finish_reasons, text_id"
    db.execute(
        f"CREATE INDEX results_by_time ON results ({columns}, prompt_tokens, empty_answers, answers_without_tokens)"
    )


@migrations()
def m017_engine_loads(db: Database) -> None:
    """How many engine loads a job has, and which runs were given to another job (`given_as`: the state that they were in)."""
    db.table("jobs").add_column("loads", int, not_null_default=1)
    db.table("given_runs").create(
        {"job_id": str, "run_id": str, "given_to": str, "given_as": str}, pk=("job_id", "run_id")
    )
