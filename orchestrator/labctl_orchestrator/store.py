"""The database: an index of the workspace's files, kept by labctl on the login node alone.

A rollback journal, not the write-ahead log: that one needs shared memory, which hosts that share a network filesystem do
not have. Every write is one immediate transaction, so two labctl at once wait for each other, and a killed one leaves
nothing half done.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlite_utils import Database, Migrations
from sqlite_utils.db import Table

from labctl_slurm.errors import LabctlError
from labctl_workers.measure import METRICS

BUSY_FOR_S = 60.0

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


class RowMissingError(LookupError):
    """A file says more of something whose own file has not been read yet."""


class Store:
    """The database of one workspace."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # isolation_level None: transactions begin where this class says so, not where sqlite3 thinks they should.
        self._connection = sqlite3.connect(path, timeout=BUSY_FOR_S, isolation_level=None)
        self._connection.row_factory = None
        self._connection.execute("PRAGMA journal_mode=DELETE")
        self.db = Database(self._connection)
        self._migrate()

    def _migrate(self) -> None:
        missing = migrations.pending(self.db) or self._metrics_without_column()
        if not missing:
            return
        with self.writing():
            migrations.apply(self.db)
            for metric in self._metrics_without_column():
                self.table("repeats").add_column(metric, float)

    def _metrics_without_column(self) -> list[str]:
        """A metric is one entry in METRICS: its column follows."""
        table = self.table("repeats")
        present = set(table.columns_dict) if table.exists() else set()
        return [name for name in METRICS if name not in present]

    def table(self, name: str) -> Table:
        return self.db.table(name)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction, alone: all of it or nothing. Raises LabctlError where another labctl holds it too long."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            raise LabctlError(f"{self.path}: {error}", "another labctl is writing: try again when it is done") from None
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def put(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Insert, or replace the rows with the same key. Lists and objects are kept as JSON."""
        self.table(table).insert_all((_plain(row) for row in rows), replace=True)

    def add(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Insert; a row whose key is there already stays as it is."""
        self.table(table).insert_all((_plain(row) for row in rows), ignore=True)

    def rows(self, sql: str, parameters: Iterable[Any] = ()) -> list[dict[str, Any]]:
        """The rows of a query, as dictionaries."""
        cursor = self._connection.execute(sql, tuple(parameters))
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def update(self, table: str, key: str, values: Mapping[str, Any]) -> None:
        """Set columns of the row with this primary key. Raises LookupError where there is none."""
        columns = ", ".join(f"{column} = ?" for column in values)
        (primary,) = self.table(table).pks
        done = self._connection.execute(f"UPDATE {table} SET {columns} WHERE {primary} = ?", (*values.values(), key))
        if done.rowcount == 0:
            raise RowMissingError(f"{table} has no {key}")

    def remove(self, table: str, where: str, parameters: Iterable[Any]) -> None:
        """Delete rows; inside `writing`."""
        self._connection.execute(f"DELETE FROM {table} WHERE {where}", tuple(parameters))

    def close(self) -> None:
        self._connection.close()


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: json.dumps(value, sort_keys=True, ensure_ascii=False) if isinstance(value, dict | list) else value
        for key, value in row.items()
    }
