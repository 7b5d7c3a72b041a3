"""The database: an index of the workspace's files. Only labctl on the login node writes it.

It uses a rollback journal: a write-ahead log needs shared memory, which hosts on a network filesystem lack. Every write is one
immediate transaction, so concurrent labctl commands wait for each other, and a killed one leaves no partial write.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from labctl_orchestrator.store import schema
from labctl_orchestrator.store.connection import Connection
from labctl_orchestrator.store.views import metadata, views
from labctl_orchestrator.store.workspace import DATABASE_SCHEMA, Workspace, check_present
from labctl_slurm.errors import LabctlError
from labctl_workers.measure import METRICS
from labctl_workers.record import write_json

BUSY_FOR_S = 60.0
CHARACTER_AFTER_ALL = chr(0x10FFFF)
# SQLite's page cache while writing: large enough to keep a transaction of a large workspace in memory.
WRITE_CACHE_KIB = 64 * 1024
# For more runs, reading the whole tables is faster than a search for each run.
RUNS_SEARCHED_FOR = 20_000
# Tables with rows of records only.
RECORD_TABLES = ("samples", "documents", "questions", "devices", "repeats", "results", "texts")


def add_logarithms(connection: sqlite3.Connection) -> None:
    """Define ln and exp, which the views call, if SQLite lacks them (before 3.35, as on RHEL 9, and in some builds)."""
    try:
        connection.execute("SELECT ln(1.0), exp(0.0)")
    except sqlite3.OperationalError:
        connection.create_function(
            "ln", 1, lambda x: math.log(x) if x is not None and x > 0 else None, deterministic=True
        )
        connection.create_function("exp", 1, lambda x: None if x is None else math.exp(x), deterministic=True)


def is_special(file: Path) -> bool:
    """Whether the file is a pipe, a socket or a device. SQLite would wait for the content of a pipe."""
    try:
        mode = file.stat().st_mode  # once: another process may remove its journal at any time
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def cannot_be_written(error: BaseException) -> bool:
    """Whether the disk is full, read-only or failing, although the database may be intact."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without SQLite's extended code
    return code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)


def of_runs(run_ids: Sequence[str]) -> tuple[str, list[str]]:
    """(an SQL condition that these runs match, its parameters). For more than RUNS_SEARCHED_FOR runs, all runs match."""
    if len(run_ids) > RUNS_SEARCHED_FOR:
        return "1", []
    return "run_id IN (SELECT value FROM json_each(?))", [json.dumps(run_ids)]


class RowMissingError(LookupError):
    """A file adds to a row whose own file has not been read."""


class Store:
    """The database of one workspace."""

    def __init__(self, path: Path) -> None:
        self.changed = self._open(path)

    def _open(self, path: Path) -> bool:
        """Open the database and create missing tables and views; returns whether it created any."""
        self.path = path
        for file in (path, path.with_name(f"{path.name}-journal")):
            if is_special(file):
                raise sqlite3.DatabaseError("not a regular file")
        # SQLite creates files with mode 0644 whatever the umask; its journal takes the database's mode.
        with contextlib.suppress(OSError):  # it exists, or SQLite reports the error below
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666))
        # isolation_level None: only this class begins transactions, not the sqlite3 module.
        self._connection = sqlite3.connect(path, BUSY_FOR_S, isolation_level=None, factory=Connection)
        self._connection.execute("PRAGMA journal_mode=DELETE")
        add_logarithms(self._connection)
        return self._make()

    def move(self, path: Path) -> None:
        """Continue in another database: a private copy of one that is not writable."""
        self._connection.close()
        self._open(path)

    def _has_tables(self) -> bool:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        return bool(version == DATABASE_SCHEMA)

    def _make(self) -> bool:
        """Create missing tables, columns of new metrics and this labctl's views; returns whether anything was missing."""
        statements = {view.name: view.sql for view in views()}
        if self._has_tables() and not self._outdated_metrics():
            present = dict(self._connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'view'"))
            if present == present | statements:
                return False
        from sqlite_utils import Database

        with self.writing():
            for name in statements:  # first, because SQLite checks views when their tables change
                self._connection.execute(f"DROP VIEW IF EXISTS {name}")
            db = Database(self._connection)
            if not self._has_tables():  # another labctl may have created them meanwhile
                schema.make(db)
                self._connection.execute(f"PRAGMA user_version = {DATABASE_SCHEMA}")
            outdated = self._outdated_metrics()
            for metric in outdated - set(db.table("repeats").columns_dict):
                db.table("repeats").add_column(metric, float)
            if outdated:
                self._forget_records()
            for statement in statements.values():
                self._connection.execute(statement)
        return True

    def _outdated_metrics(self) -> set[str]:
        """Metrics that the database lacks or has by an earlier definition. A newer labctl's later definitions stay."""
        known = dict(self._connection.execute("SELECT metric, version FROM metric_versions"))
        return {name for name, metric in METRICS.items() if known.get(name, 0) < metric.version}

    def _forget_records(self) -> None:
        """Delete the rows of every record, so that the next `collect` computes them again from the files."""
        for table in RECORD_TABLES:
            self._connection.execute(f"DELETE FROM {table}")
        self._connection.execute("DELETE FROM files WHERE path LIKE 'results/%' OR path LIKE 'imports/%/results/%'")
        self._connection.execute("UPDATE folders SET mtime_ns = 0")
        versions = [(name, metric.version) for name, metric in METRICS.items()]
        self.put_values("metric_versions", versions)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One exclusive transaction. Raises LabctlError if another labctl keeps the database locked for BUSY_FOR_S seconds."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if cannot_be_written(error):
                raise
            raise LabctlError(
                f"{error}: {self.path}", "another labctl command is writing to it: try again when it has finished"
            ) from None
        self._connection.execute(f"PRAGMA cache_size = -{WRITE_CACHE_KIB}")
        try:
            yield
        except BaseException as error:
            self._roll_back(error)
            raise
        try:
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back(error)
            raise

    def _roll_back(self, error: BaseException) -> None:
        if self._connection.in_transaction:  # a full disk may have ended it
            self._connection.execute("ROLLBACK")
        if isinstance(error, sqlite3.Error):
            check_present(self.path.parent)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """A savepoint in a transaction: an error undoes only this part, and is raised."""
        self._connection.execute("SAVEPOINT attempt")
        try:
            yield
        except BaseException:
            # A full disk may have ended the whole transaction.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK TO attempt")
                self._connection.execute("RELEASE attempt")
            raise
        self._connection.execute("RELEASE attempt")

    def put(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Insert rows, and replace rows with the same key. Lists and objects become JSON."""
        for columns, alike in itertools.groupby(rows, key=tuple):
            self._insert("REPLACE", table, columns, [tuple(map(_plain, row.values())) for row in alike])

    def add(self, table: str, row: Mapping[str, Any]) -> None:
        """Insert a row of plain values, unless its key exists."""
        self._insert("IGNORE", table, tuple(row), [tuple(row.values())])

    def put_values(self, table: str, values: Iterable[Sequence[Any]]) -> None:
        """Insert rows of plain values in the order of `schema.columns`, and replace rows with the same key."""
        self._insert("REPLACE", table, schema.columns(table), values)

    def add_values(self, table: str, values: Iterable[Sequence[Any]]) -> None:
        """Insert rows of plain values in the order of `schema.columns`, except rows whose key exists."""
        self._insert("IGNORE", table, schema.columns(table), values)

    def _insert(self, conflict: str, table: str, columns: Sequence[str], values: Iterable[Sequence[Any]]) -> None:
        marks = ", ".join("?" * len(columns))
        sql = f"INSERT OR {conflict} INTO {table} ({', '.join(columns)}) VALUES ({marks})"
        self._connection.executemany(sql, values)

    def rows(self, sql: str, parameters: Iterable[Any] = ()) -> list[sqlite3.Row]:
        """The rows of a query, with values by column name."""
        cursor = self.each(sql, parameters)
        cursor.row_factory = sqlite3.Row
        return cursor.fetchall()

    def tuples(self, sql: str, parameters: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query as tuples, which are faster than `rows`."""
        return self.each(sql, parameters).fetchall()

    def each(self, sql: str, parameters: Iterable[Any] = ()) -> sqlite3.Cursor:
        """The rows of a query as tuples, one at a time: not all of them are in memory."""
        return self._connection.execute(sql, tuple(parameters))

    def update(self, table: str, key: str, values: Mapping[str, Any]) -> None:
        """Set columns of the row whose primary key, the table's first column, is `key`. Raises RowMissingError."""
        columns = ", ".join(f"{column} = ?" for column in values)
        primary = schema.columns(table)[0]
        done = self._connection.execute(f"UPDATE {table} SET {columns} WHERE {primary} = ?", (*values.values(), key))
        if done.rowcount == 0:
            raise RowMissingError(f"{table} has no {key}")

    def remove(self, table: str, where: str, parameters: Iterable[Any] = ()) -> None:
        """Delete rows, inside `writing`."""
        self._connection.execute(f"DELETE FROM {table} WHERE {where}", tuple(parameters))

    def close(self) -> None:
        self._connection.close()


def _plain(value: Any) -> Any:
    return json.dumps(value, sort_keys=True, ensure_ascii=False) if isinstance(value, dict | list) else value


def open_store(workspace: Workspace) -> Store:
    """The workspace's database. Raises LabctlError if the file is not an SQLite database or not writable."""
    is_new = not workspace.index.exists()
    try:
        store = _opened(workspace)
    except sqlite3.DatabaseError as error:
        raise LabctlError(f"{error}: {workspace.database}", "labctl collect --rebuild builds it again") from None
    if (store.changed or not workspace.metadata.exists()) and workspace.writable:
        with contextlib.suppress(OSError):  # only Datasette reads it
            write_json(workspace.metadata, metadata(), durable=False)
    if is_new and workspace.writable:
        _remove_older(workspace)
    return store


def _opened(workspace: Workspace) -> Store:
    try:
        return Store(workspace.database)
    except sqlite3.OperationalError as error:
        if not cannot_be_written(error) or not workspace.writable:
            raise
        workspace.make_read_only(str(error))
        return Store(workspace.database)


def _remove_older(workspace: Workspace) -> None:
    """Remove databases with an earlier schema number; those with a later one stay."""
    for path in workspace.data.glob("labctl-*.db"):
        number = path.stem.removeprefix("labctl-")
        if number.isdecimal() and int(number) < DATABASE_SCHEMA:
            path.unlink(missing_ok=True)
