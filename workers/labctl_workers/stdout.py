"""The job's standard output: generated texts, their metrics and labctl's own lines. Everything else goes to standard error.

labctl looks for the reasons of failures in standard error, so no generated text may be there.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

_stream: TextIO | None = None  # None: standard output


@contextlib.contextmanager
def reserve() -> Iterator[None]:
    """Reserve standard output for `print_line` and `stream`; all other writes to it go to standard error."""
    global _stream  # noqa: PLW0603  as sys.stdout is
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as kept:
        _stream = kept
        os.dup2(2, 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(kept.fileno(), 1)  # the process of the next engine load inherits it
            _stream = None


def stream() -> TextIO:
    """The stream for generated texts."""
    return _stream or sys.stdout


def print_line(line: str) -> None:
    """Print a line to that stream."""
    print(line, file=stream(), flush=True)
