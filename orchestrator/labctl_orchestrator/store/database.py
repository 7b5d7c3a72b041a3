"""The database: an index of the workspace's files, kept by labctl on the login node alone.

A rollback journal, not the write-ahead log: that one needs shared memory, which hosts that share a network filesystem do
not have. Every write is one immediate transaction, so two labctl at once wait for each other, and a killed one leaves
nothing half done.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labctl_orchestrator.store.views import metadata, views
from labctl_orchestrator.store.workspace import DATABASE_SCHEMA, Workspace, check_present
from labctl_slurm.errors import LabctlError
from labctl_workers.measure import METRICS
from labctl_workers.record import write_json

BUSY_FOR_S = 60.0
CHARACTER_AFTER_ALL = chr(0x10FFFF)
# Of an index of a million requests, what is written at once is kept in memory until it is whole.
WRITE_CACHE_KIB = 64 * 1024


# Made of records alone.
COMPUTED = ("samples", "devices", "repeats", "results", "texts", "folders")


def add_logarithms(connection: sqlite3.Connection) -> None:
    """Give a connection ln and exp, which the views call, where SQLite has none (before 3.35, as on RHEL 9, and some builds)."""
    try:
        connection.execute("SELECT ln(1.0), exp(0.0)")
    except sqlite3.OperationalError:
        connection.create_function(
            "ln", 1, lambda x: math.log(x) if x is not None and x > 0 else None, deterministic=True
        )
        connection.create_function("exp", 1, lambda x: None if x is None else math.exp(x), deterministic=True)


def cannot_be_written(error: BaseException) -> bool:
    """Whether the disk is full, read-only or failing: the database itself may be whole."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest of it says where
    return code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)


# Of more runs the whole tables are read, which takes less time than a search for each.
RUNS_SEARCHED_FOR = 20_000


def of_runs(run_ids: Sequence[str]) -> tuple[str, list[str]]:
    """A condition that holds for these runs, and its parameters; where there are many, one that holds for all."""
    if len(run_ids) > RUNS_SEARCHED_FOR:
        return "1", []
    return "run_id IN (SELECT value FROM json_each(?))", [json.dumps(run_ids)]


class RowMissingError(LookupError):
    """A file says more of something whose own file has not been read yet."""


class Store:
    """The database of one workspace."""

    def __init__(self, path: Path) -> None:
        self._tables: dict[str, _Table] = {}
        self.changed = self._open(path)

    def _open(self, path: Path) -> bool:
        """Whether tables or views were made."""
        self.path = path
        # SQLite makes 0644 whatever the umask is, and gives its journal the database's mode.
        with contextlib.suppress(OSError):  # it is there, or SQLite says why it cannot be made
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666))
        # isolation_level None: transactions begin where this class says so, not where sqlite3 thinks they should.
        self._connection = sqlite3.connect(path, timeout=BUSY_FOR_S, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode=DELETE")
        add_logarithms(self._connection)
        return self._make()

    def move(self, path: Path) -> None:
        """Go on with another database: the process's own copy, where this one cannot be written."""
        self._connection.close()
        self._tables.clear()
        self._open(path)

    def _is_made(self) -> bool:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        return bool(version == DATABASE_SCHEMA)

    def _make(self) -> bool:
        """Make the tables where there are none, and the views as this labctl has them; whether there was anything to do."""
        if self._is_made() and not self._outdated_metrics() and self._views_are_as(_view_statements()):
            return False
        from sqlite_utils import Database

        from labctl_orchestrator.store import schema

        with self.writing():
            statements = _view_statements()
            for name in statements:  # before the tables: one that a view names cannot be made again
                self._connection.execute(f"DROP VIEW IF EXISTS {name}")
            db = Database(self._connection)
            if not self._is_made():  # another labctl may have made it since
                schema.make(db)
                self._connection.execute(f"PRAGMA user_version = {DATABASE_SCHEMA}")
            outdated = self._outdated_metrics()
            for metric in outdated - set(db.table("repeats").columns_dict):
                db.table("repeats").add_column(metric, float)
            if outdated:
                self._forget_what_was_computed()
            for statement in statements.values():
                self._connection.execute(statement)
        self._tables.clear()
        return True

    def _views_are_as(self, statements: Mapping[str, str]) -> bool:
        present = dict(self._connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'view'"))
        return all(present.get(name) == statement for name, statement in statements.items())

    def _outdated_metrics(self) -> set[str]:
        """The metrics that the database does not have, or has by an earlier definition. Later ones are a newer labctl's."""
        known = dict(self._connection.execute("SELECT metric, version FROM definitions"))
        return {name for name, metric in METRICS.items() if known.get(name, 0) < metric.version}

    def _forget_what_was_computed(self) -> None:
        """Take out the rows of every record, so that the next `collect` computes them again from the files."""
        for table in COMPUTED:
            self._connection.execute(f"DELETE FROM {table}")
        self._connection.execute("DELETE FROM files WHERE path LIKE 'results/%' OR path LIKE 'imports/%/results/%'")
        versions = [(name, metric.version) for name, metric in METRICS.items()]
        self._insert("REPLACE", "definitions", ("metric", "version"), versions)

    def columns(self, table: str) -> Sequence[str]:
        """The names of a table's columns, in its order."""
        return self._table(table).columns

    def _table(self, name: str) -> _Table:
        if name not in self._tables:
            info = self._connection.execute(f"PRAGMA table_info({name})").fetchall()
            self._tables[name] = _Table([row[1] for row in info], [row[1] for row in info if row[5]])
        return self._tables[name]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction, alone: all of it or nothing. Raises LabctlError where another labctl holds it too long."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if cannot_be_written(error):
                raise
            raise LabctlError(f"{self.path}: {error}", "another labctl is writing: try again when it is done") from None
        self._connection.execute(f"PRAGMA cache_size = -{WRITE_CACHE_KIB}")
        try:
            yield
        except BaseException as error:
            if self._connection.in_transaction:  # a full disk may have ended it
                self._connection.execute("ROLLBACK")
            if cannot_be_written(error):
                check_present(self.path.parent)
            raise
        try:
            self._connection.execute("COMMIT")
        except sqlite3.Error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            check_present(self.path.parent)
            raise

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """A part of a transaction that may fail by itself: its error goes on, and nothing of the part is left."""
        self._connection.execute("SAVEPOINT attempt")
        try:
            yield
        except BaseException:
            # A full disk may have ended the whole transaction already.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK TO attempt")
                self._connection.execute("RELEASE attempt")
            raise
        self._connection.execute("RELEASE attempt")

    def put(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Insert, or replace the rows with the same key. Lists and objects are kept as JSON."""
        self._insert_rows("REPLACE", table, rows)

    def add(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Insert; a row whose key is there already stays as it is."""
        self._insert_rows("IGNORE", table, rows)

    def _insert_rows(self, where_known: str, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows of one call may have different columns: those with the same go together."""
        alike: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}
        for row in rows:
            alike.setdefault(tuple(row), []).append(tuple(map(_plain, row.values())))
        for columns, values in alike.items():
            self._insert(where_known, table, columns, values)

    def put_values(self, table: str, columns: Sequence[str], values: Iterable[Sequence[Any]]) -> None:
        """`put` for many rows of the same columns, as plain values in their order."""
        self._insert("REPLACE", table, columns, values)

    def add_values(self, table: str, columns: Sequence[str], values: Iterable[Sequence[Any]]) -> None:
        """`add` for many rows of the same columns, as plain values in their order."""
        self._insert("IGNORE", table, columns, values)

    def _insert(self, where_known: str, table: str, columns: Sequence[str], values: Iterable[Sequence[Any]]) -> None:
        marks = ", ".join("?" * len(columns))
        sql = f"INSERT OR {where_known} INTO {table} ({', '.join(columns)}) VALUES ({marks})"
        self._connection.executemany(sql, values)

    def rows(self, sql: str, parameters: Iterable[Any] = ()) -> list[dict[str, Any]]:
        """The rows of a query, as dictionaries."""
        cursor = self._connection.execute(sql, tuple(parameters))
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def tuples(self, sql: str, parameters: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query, as tuples: for those of which there are many."""
        return self.each(sql, parameters).fetchall()

    def each(self, sql: str, parameters: Iterable[Any] = ()) -> sqlite3.Cursor:
        """`tuples` one by one: of some 100,000 rows not all are in memory at once."""
        return self._connection.execute(sql, tuple(parameters))

    def update(self, table: str, key: str, values: Mapping[str, Any]) -> None:
        """Set columns of the row with this primary key. Raises LookupError where there is none."""
        columns = ", ".join(f"{column} = ?" for column in values)
        (primary,) = self._table(table).keys
        done = self._connection.execute(f"UPDATE {table} SET {columns} WHERE {primary} = ?", (*values.values(), key))
        if done.rowcount == 0:
            raise RowMissingError(f"{table} has no {key}")

    def remove(self, table: str, where: str, parameters: Iterable[Any] = ()) -> None:
        """Delete rows; inside `writing`."""
        self._connection.execute(f"DELETE FROM {table} WHERE {where}", tuple(parameters))

    def close(self) -> None:
        self._connection.close()


def _view_statements() -> dict[str, str]:
    return {view.name: view.sql for view in views()}


@dataclass(frozen=True)
class _Table:
    columns: list[str]
    keys: list[str]


def _plain(value: Any) -> Any:
    return json.dumps(value, sort_keys=True, ensure_ascii=False) if isinstance(value, dict | list) else value


def open_store(workspace: Workspace) -> Store:
    """The workspace's database. Raises LabctlError where the file is no database or cannot be written."""
    is_new = not workspace.index.exists()
    try:
        store = _opened(workspace)
    except sqlite3.DatabaseError as error:
        raise LabctlError(f"{workspace.database}: {error}", "labctl collect --rebuild makes it again") from None
    if (store.changed or not workspace.metadata.exists()) and workspace.writable:
        with contextlib.suppress(OSError):  # what it says is in `labctl query --describe` too
            write_json(workspace.metadata, metadata(), durable=False, parents=False)
    if is_new and workspace.writable:
        _remove_older(workspace)
    return store


def _opened(workspace: Workspace) -> Store:
    try:
        return Store(workspace.database)
    except sqlite3.OperationalError as error:
        if not cannot_be_written(error) or not workspace.writable:
            raise
        workspace.hinder(str(error))
        return Store(workspace.database)


def _remove_older(workspace: Workspace) -> None:
    """Remove the databases of earlier labctls; a later one's stays."""
    for path in workspace.data.glob("labctl-*.db"):
        number = path.stem.removeprefix("labctl-")
        if number.isdecimal() and int(number) < DATABASE_SCHEMA:
            path.unlink(missing_ok=True)
