"""Read-only SQL queries on the database."""

from __future__ import annotations

import difflib
import math
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from labctl_orchestrator.store.connection import Connection
from labctl_orchestrator.store.database import BUSY_FOR_S, add_logarithms
from labctl_orchestrator.store.views import TABLES, View, views
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import WrongUseError, nearest

# Permitted actions of a statement. SQLite refuses all others before it starts, such as ATTACH and PRAGMAs that set a value.
ALLOWED = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
# Pragmas that only read.
READING_PRAGMAS = frozenset(
    {"table_info", "table_xinfo", "table_list", "foreign_key_list", "foreign_key_check", "index_list", "index_info",
     "database_list", "compile_options", "function_list", "pragma_list", "integrity_check", "quick_check"}
)  # fmt: skip
TABLE_FUNCTIONS = ("json_each", "json_tree", "pragma_table_info", "pragma_foreign_key_list", "pragma_index_list")
INSTRUCTIONS_PER_CHECK = 100_000  # of Ctrl-C
ROWS_AT_ONCE = 10_000
BYTES_AT_ONCE = 8 * 2**20
ANSWER_BYTES_AT_MOST = 64 * 2**20
# SQLite's own limit is a gigabyte.
VALUE_BYTES_AT_MOST = 64 * 2**20


@dataclass(frozen=True)
class QueryResult:
    """The rows of one query. Column names are distinct."""

    columns: list[str]
    rows: list[tuple[Any, ...]]

    def to_json(self) -> list[dict[str, object]]:
        """The rows as JSON objects."""
        return [dict(zip(self.columns, map(in_json, row), strict=True)) for row in self.rows]


def in_json(value: Any) -> Any:
    """A database value for JSON: infinity becomes null, bytes become hexadecimal digits."""
    if isinstance(value, bytes):
        return value.hex()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def query(workspace: Workspace, sql: str, parameters: Sequence[Any] = ()) -> QueryResult:
    """The rows of one SELECT. Raises WrongUseError for invalid SQL, several statements, a statement that writes, and results
    above `ANSWER_BYTES_AT_MOST`."""
    with stream_of(workspace, sql, parameters) as (columns, batches):
        rows: list[tuple[Any, ...]] = []
        size = 0
        for batch in batches:
            size += sum(_size_of(row) for row in batch)
            if size > ANSWER_BYTES_AT_MOST:
                raise WrongUseError(
                    f"query result exceeds {ANSWER_BYTES_AT_MOST // 2**20} MiB after {len(rows)} rows",
                    "add a LIMIT; or give --csv, which prints rows as they come",
                )
            rows += batch
        return QueryResult(columns, rows)


@contextmanager
def stream_of(
    workspace: Workspace, sql: str, parameters: Sequence[Any] = ()
) -> Iterator[tuple[list[str], Iterator[list[tuple[Any, ...]]]]]:
    """(columns, batches of rows) of one SELECT with any number of rows. Raises as `query`."""
    with closing(read_only(workspace)) as connection:
        yield _run(connection, sql, parameters)


def _size_of(row: Sequence[Any]) -> int:
    """The approximate size of a row in memory, in bytes."""
    return 64 + sum(64 + (len(value) if isinstance(value, str | bytes) else 0) for value in row)


def read_only(workspace: Workspace) -> sqlite3.Connection:
    """A read-only connection, in three ways: file mode (mode=ro), connection (query_only), and each statement (authorizer)."""
    path = quote(str(workspace.database.absolute()))
    connection = sqlite3.connect(f"file:{path}?mode=ro", BUSY_FOR_S, uri=True, isolation_level=None, factory=Connection)
    connection.execute("PRAGMA query_only = ON")
    add_logarithms(connection)
    for name in TABLE_FUNCTIONS:  # their first use asks the authorizer for a write
        connection.execute(f"EXPLAIN SELECT 1 FROM {name}")  # noqa: S608  names of this module
    connection.set_authorizer(
        lambda action, first, *_: (
            sqlite3.SQLITE_OK
            if action in ALLOWED or (action == sqlite3.SQLITE_PRAGMA and str(first).lower() in READING_PRAGMAS)
            else sqlite3.SQLITE_DENY
        )
    )
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, VALUE_BYTES_AT_MOST)
    # Python handles Ctrl-C only between its own instructions.
    connection.set_progress_handler(lambda: 0, INSTRUCTIONS_PER_CHECK)
    return connection


def _run(
    connection: sqlite3.Connection, sql: str, parameters: Sequence[Any]
) -> tuple[list[str], Iterator[list[tuple[Any, ...]]]]:
    try:
        cursor = connection.execute(sql, tuple(parameters))
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:  # ValueError: a NUL in the text
        raise _labctl_error(error, sql) from None
    if cursor.description is None:
        raise WrongUseError("empty SQL statement", 'give one, such as labctl query "SELECT * FROM measured_runs"')
    return _distinct([column[0] for column in cursor.description]), _batches(cursor, sql)


def _batches(cursor: sqlite3.Cursor, sql: str) -> Iterator[list[tuple[Any, ...]]]:
    try:
        while rows := list(_some(cursor)):
            yield rows
    except sqlite3.Error as error:  # such as json_extract of a text that is not JSON
        raise _labctl_error(error, sql) from None


def _some(cursor: sqlite3.Cursor) -> Iterator[tuple[Any, ...]]:
    """A batch: at most ROWS_AT_ONCE rows, about BYTES_AT_ONCE bytes."""
    size = 0
    for count, row in enumerate(cursor, 1):
        yield row
        size += _size_of(row)
        if count == ROWS_AT_ONCE or size > BYTES_AT_ONCE:
            return


_TABLES_REMEDY = "labctl query lists the tables, --describe VIEW its columns"


def _labctl_error(error: Exception, sql: str) -> BaseException:
    """SQLite's error as a WrongUseError with a remedy; a fault of the database itself stays as it is."""
    message = str(error)
    if message == "interrupted":
        return KeyboardInterrupt()
    if "authoriz" in message or "prohibited" in message or "readonly" in message:
        word = re.match(r"\s*(\w+)", sql)
        return WrongUseError(
            f"labctl query refuses a statement that writes: {word[1].upper() if word else sql!r:.60}",
            "use SELECT; only labctl writes the database, from the files in .labctl",
        )
    if "one statement" in message:
        return WrongUseError("more than one statement", "give one SELECT at a time")
    unknown = re.fullmatch(r"no such (table|column): (?:\w+\.)?(\w+)", message)
    if unknown:
        columns = dict.fromkeys(column.name for view in views() for column in view.columns)
        known = [*(view.name for view in views()), *TABLES] if unknown[1] == "table" else list(columns)
        close = difflib.get_close_matches(unknown[2], known, n=1, cutoff=0.5)
        return WrongUseError(
            f"unknown {unknown[1]}: {unknown[2]!r}", f"did you mean {close[0]!r}?" if close else _TABLES_REMEDY
        )
    damaged = isinstance(error, sqlite3.DatabaseError) and "malformed" in message and "JSON" not in message
    if damaged or any(word in message for word in ("locked", "open database", "disk I/O", "not a database")):
        return error
    return WrongUseError(f"SQLite error: {message}", f"correct the statement; {_TABLES_REMEDY}")


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with `a_2` for a second `a`: rows may become JSON objects."""
    taken: dict[str, int] = {}
    found = []
    for name in names:
        taken[name] = taken.get(name, 0) + 1
        found.append(name if taken[name] == 1 else f"{name}_{taken[name]}")
    return found


# ---------------------------------------------------------------- show

LONGEST_CELL = 80


def cell(value: Any) -> str:
    """A value on one line, at most LONGEST_CELL characters."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "" if value is None else " ".join(str(value).split())
    return text if len(text) <= LONGEST_CELL else f"{text[: LONGEST_CELL - 1]}…"


def numeric(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The columns that contain only numbers and NULL."""
    return [
        name
        for name, values in zip(columns, zip(*rows, strict=True), strict=False)
        if all(value is None or isinstance(value, int | float) for value in values)
    ]


# ---------------------------------------------------------------- describe


def view_named(name: str) -> View:
    """The view with this name. Raises WrongUseError for an unknown name."""
    found = {view.name: view for view in views()}
    if name not in found:
        raise WrongUseError(f"unknown view: {name!r}", nearest(name, found))
    return found[name]
