"""The job's standard output: answers, their figures, and labctl's own lines. All else goes to the error stream.

Reasons of failures are looked for in the error stream, where no text of a model stands.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

_stream: TextIO | None = None  # None: standard output


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Leave standard output to `tell`; what anything else writes to it goes to the error stream."""
    global _stream  # noqa: PLW0603  as sys.stdout is
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as kept:
        _stream = kept
        os.dup2(2, 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(kept.fileno(), 1)  # as it was, for the process of the next engine load
            _stream = None


def stream() -> TextIO:
    """Where answers go."""
    return _stream or sys.stdout


def tell(line: str) -> None:
    """Print a line beside the answers."""
    print(line, file=stream(), flush=True)
