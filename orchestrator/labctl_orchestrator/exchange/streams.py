"""Output that harms no reader: no control characters for a terminal, no formulas in CSV."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, TextIO, cast

# Control characters except newline and tab; changes of the writing direction; code points that are invalid in SVG.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")

# First characters of formulas in Excel, LibreOffice and Google Sheets (OWASP, "CSV Injection").
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def visible(words: str) -> str:
    """The text with escaped control characters, except newline and tab. Answers, logs and imported texts must not move the
    cursor."""
    return words if words.isprintable() else CONTROLS.sub(lambda found: repr(found[0])[1:-1], words)


def visible_in(value: Any) -> Any:
    """A JSON value with `visible` texts: the chart library crashes on control characters."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {key: visible_in(item) for key, item in value.items()}
    return [visible_in(item) for item in value] if isinstance(value, (list, tuple)) else value


class CleanedStream:
    """A text stream that escapes control characters (see `visible`) and writes to `stream`."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        # A carriage return would overwrite the line.
        self.stream.write(visible(text.replace("\r\n", "\n").replace("\r", "\n")))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def cleaned_streams() -> Iterator[None]:
    """Make standard output and error `CleanedStream`s while a command runs."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast("TextIO", CleanedStream(out)), cast("TextIO", CleanedStream(err))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err


def raw(stream: TextIO) -> TextIO:
    """The stream below a `CleanedStream`."""
    return stream.stream if isinstance(stream, CleanedStream) else stream


def for_programs(stream: TextIO) -> TextIO:
    """The stream for data: unchanged for a pipe or file, cleaned for a terminal."""
    return stream if stream.isatty() else raw(stream)


def write_csv(stream: IO[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows as CSV. A text that a spreadsheet would run as a formula gets an apostrophe in front."""
    import csv  # here, so that `labctl --help` starts faster

    csv.writer(stream, lineterminator="\n").writerows(
        [f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell for cell in row]
        for row in rows
    )
