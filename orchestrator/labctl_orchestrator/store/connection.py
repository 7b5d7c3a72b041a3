"""SQLite connections whose every error is an sqlite3.Error."""

from __future__ import annotations

import sqlite3
from typing import Any


class Connection(sqlite3.Connection):
    """For `sqlite3.connect(..., factory=Connection)`.

    SQLite quotes a damaged definition in its message. Python raises UnicodeDecodeError where that message is not UTF-8.
    """

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        """Like sqlite3.Connection.execute. Raises sqlite3.DatabaseError for a message that is not UTF-8."""
        try:
            return super().execute(sql, parameters)
        except UnicodeDecodeError as error:
            message = error.object.decode(errors="backslashreplace")
            raise sqlite3.DatabaseError(message) from None
