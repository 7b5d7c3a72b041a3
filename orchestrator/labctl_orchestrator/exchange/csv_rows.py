"""CSV that a spreadsheet shows and does not run."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from typing import IO, Any

# A cell that begins so is a formula to Excel, LibreOffice and Google Sheets (OWASP, "CSV Injection").
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


class CsvRows:
    """Rows written as CSV to a stream. A text that a spreadsheet would run gets an apostrophe before it; numbers do not."""

    def __init__(self, stream: IO[str]) -> None:
        self._out = csv.writer(stream, lineterminator="\n")

    def write(self, rows: Iterable[Sequence[Any]]) -> None:
        self._out.writerows(
            [f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell for cell in row]
            for row in rows
        )
