"""CSV without formulas."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from typing import IO, Any

# First characters of formulas in Excel, LibreOffice and Google Sheets (OWASP, "CSV Injection").
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


class CsvRows:
    """Write rows as CSV to a stream. A text that a spreadsheet would run as a formula gets an apostrophe in front."""

    def __init__(self, stream: IO[str]) -> None:
        self._out = csv.writer(stream, lineterminator="\n")

    def write(self, rows: Iterable[Sequence[Any]]) -> None:
        self._out.writerows(
            [f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell for cell in row]
            for row in rows
        )
