"""A person's own SQL on the database, which can read and do nothing else."""

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

from labctl_orchestrator.store.database import BUSY_FOR_S, add_logarithms
from labctl_orchestrator.store.views import TABLES, View, views
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import WrongUseError, nearest

# What a statement may do; all else, ATTACH and PRAGMA that set among it, SQLite refuses before it begins.
ALLOWED = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
# Pragmas that only tell.
TELLING = frozenset(
    {"table_info", "table_xinfo", "table_list", "foreign_key_list", "foreign_key_check", "index_list", "index_info",
     "database_list", "compile_options", "function_list", "pragma_list", "integrity_check", "quick_check"}
)  # fmt: skip
TABLE_FUNCTIONS = ("json_each", "json_tree", "pragma_table_info", "pragma_foreign_key_list", "pragma_index_list")
INSTRUCTIONS_BETWEEN_LOOKS = 100_000
ROWS_AT_ONCE = 10_000
BYTES_AT_ONCE = 8 * 2**20
ANSWER_BYTES_AT_MOST = 64 * 2**20
# SQLite would build a text of a gigabyte in one value.
VALUE_BYTES_AT_MOST = 64 * 2**20


@dataclass(frozen=True)
class Answer:
    """The rows of one query, under names that are all different."""

    columns: list[str]
    rows: list[tuple[Any, ...]]

    def to_json(self) -> list[dict[str, Any]]:
        """A list of objects."""
        return [dict(zip(self.columns, map(in_json, row), strict=True)) for row in self.rows]


def in_json(value: Any) -> Any:
    """A value of the database, also where JSON has no word for it: an infinite number is null, bytes are hexadecimal digits."""
    if isinstance(value, bytes):
        return value.hex()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def query(workspace: Workspace, sql: str, parameters: Sequence[Any] = ()) -> Answer:
    """The rows of one SELECT. Raises WrongUseError for what would write, is no SQL, is more than one statement, or has more rows
    than fit in memory (`ANSWER_BYTES_AT_MOST`)."""
    with closing(read_only(workspace)) as connection:
        columns, batches = _run(connection, sql, parameters)
        rows: list[tuple[Any, ...]] = []
        size = 0
        for batch in batches:
            size += sum(_size_of(row) for row in batch)
            if size > ANSWER_BYTES_AT_MOST:
                raise WrongUseError(
                    f"the answer is larger than {ANSWER_BYTES_AT_MOST // 2**20} MiB, after {len(rows)} rows",
                    "add a LIMIT, or --csv, which prints rows as they come",
                )
            rows += batch
        return Answer(columns, rows)


@contextmanager
def stream_of(workspace: Workspace, sql: str) -> Iterator[tuple[list[str], Iterator[list[tuple[Any, ...]]]]]:
    """(the columns, the rows some at once) of one SELECT, which may have any number of rows. Raises as `query`."""
    with closing(read_only(workspace)) as connection:
        yield _run(connection, sql, ())


def _size_of(row: Sequence[Any]) -> int:
    """About the bytes that a row takes in memory."""
    return 64 + sum(64 + (len(value) if isinstance(value, str | bytes) else 0) for value in row)


def stream(workspace: Workspace, sql: str, parameters: Sequence[Any] = ()) -> Iterator[list[tuple[Any, ...]]]:
    """The rows of labctl's own SELECT, some thousands at once: an export may be larger than the memory."""
    with closing(read_only(workspace)) as connection:
        yield from _run(connection, sql, parameters)[1]


def read_only(workspace: Workspace) -> sqlite3.Connection:
    """The database, opened so that nothing can be written: as a file that is read (mode=ro), as a connection (query_only), and
    statement by statement (an authorizer)."""
    path = quote(str(workspace.database.absolute()))
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=BUSY_FOR_S, isolation_level=None)
    connection.execute("PRAGMA query_only = ON")
    add_logarithms(connection)
    for name in TABLE_FUNCTIONS:  # SQLite declares each when it is first named, and asks the authorizer as for a write
        connection.execute(f"EXPLAIN SELECT 1 FROM {name}")  # noqa: S608  names of this module
    connection.set_authorizer(_authorize)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, VALUE_BYTES_AT_MOST)
    # Python looks for Ctrl-C only between its own instructions.
    connection.set_progress_handler(lambda: 0, INSTRUCTIONS_BETWEEN_LOOKS)
    return connection


def _authorize(action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
    telling = action == sqlite3.SQLITE_PRAGMA and str(first).lower() in TELLING
    return sqlite3.SQLITE_OK if action in ALLOWED or telling else sqlite3.SQLITE_DENY


def _run(
    connection: sqlite3.Connection, sql: str, parameters: Sequence[Any]
) -> tuple[list[str], Iterator[list[tuple[Any, ...]]]]:
    try:
        cursor = connection.execute(sql, tuple(parameters))
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:  # ValueError: a NUL in the text
        raise _told(error, sql) from None
    if cursor.description is None:
        raise WrongUseError("there is no statement in that", 'such as labctl query "SELECT * FROM measured_runs"')
    return _distinct([column[0] for column in cursor.description]), _batches(cursor, sql)


def _batches(cursor: sqlite3.Cursor, sql: str) -> Iterator[list[tuple[Any, ...]]]:
    try:
        while rows := list(_some(cursor)):
            yield rows
    except sqlite3.Error as error:  # 1/json_extract of no JSON: found when its row is made
        raise _told(error, sql) from None


def _some(cursor: sqlite3.Cursor) -> Iterator[tuple[Any, ...]]:
    """Rows until there are many, or much in them."""
    size = 0
    for count, row in enumerate(cursor, 1):
        yield row
        size += _size_of(row)
        if count == ROWS_AT_ONCE or size > BYTES_AT_ONCE:
            return


def _told(error: Exception, sql: str) -> BaseException:
    """SQLite's error as one that a person can mend; what is wrong with the database itself goes on as it is."""
    said = str(error)
    if said == "interrupted":
        return KeyboardInterrupt()
    if "authoriz" in said or "prohibited" in said or "readonly" in said:
        word = (re.match(r"\s*(\w+)", sql) or [None, "that"])[1]
        return WrongUseError(
            f"labctl query only reads, and {str(word).upper()} would do more",
            "ask with SELECT; the database is an index of .labctl's files, which labctl alone writes",
        )
    if "one statement" in said:
        return WrongUseError("that is more than one statement", "ask one SELECT at a time")
    unknown = re.fullmatch(r"no such (table|column): (?:\w+\.)?(\w+)", said)
    if unknown:
        known = _tables() if unknown[1] == "table" else _columns()
        close = difflib.get_close_matches(unknown[2], known, n=1, cutoff=0.5)
        remedy = (
            f"did you mean {close[0]!r}?" if close else "labctl query lists the tables, --describe VIEW its columns"
        )
        return WrongUseError(f"there is no {unknown[1]} {unknown[2]!r}", remedy)
    of_the_database = isinstance(error, sqlite3.DatabaseError) and "malformed" in said and "JSON" not in said
    if of_the_database or any(word in said for word in ("locked", "open database", "disk I/O", "not a database")):
        return error
    return WrongUseError(
        f"SQLite does not take that: {said}", "labctl query lists the tables, --describe VIEW its columns"
    )


def _tables() -> list[str]:
    return [*(view.name for view in views()), *TABLES]


def _columns() -> list[str]:
    return list(dict.fromkeys(column.name for view in views() for column in view.columns))


def _distinct(names: Sequence[str]) -> list[str]:
    """A second `a` is `a_2`: rows may become objects."""
    taken: dict[str, int] = {}
    found = []
    for name in names:
        taken[name] = taken.get(name, 0) + 1
        found.append(name if taken[name] == 1 else f"{name}_{taken[name]}")
    return found


# ---------------------------------------------------------------- show

LONGEST_CELL = 80


def cell(value: Any) -> str:
    """A value on one line, and not longer than a table bears."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "" if value is None else " ".join(str(value).split())
    return text if len(text) <= LONGEST_CELL else f"{text[: LONGEST_CELL - 1]}…"


def numeric(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The columns that hold numbers alone."""
    return [
        name
        for name, values in zip(columns, zip(*rows, strict=True), strict=False)
        if all(value is None or isinstance(value, int | float) for value in values)
    ]


# ---------------------------------------------------------------- describe


def described(name: str) -> View:
    """The view with this name. Raises WrongUseError where there is none."""
    found = {view.name: view for view in views()}
    if name not in found:
        raise WrongUseError(f"there is no view {name!r}", nearest(name, found))
    return found[name]
