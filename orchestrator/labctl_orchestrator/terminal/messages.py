"""Messages wrapped for a terminal, and the question before something is lost."""

from __future__ import annotations

import shutil
import sys
import textwrap

import click

from labctl_slurm.errors import WrongUseError


def folded(message: str) -> str:
    """The message wrapped to the terminal, with a hanging indent; unchanged in a pipe."""
    if not sys.stderr.isatty():
        return message
    width = max(20, shutil.get_terminal_size().columns)
    indent = " " * (len(message) - len(message.lstrip()) + 2)
    return textwrap.fill(message, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def confirm(what: str, remedy: str = "add --yes") -> None:
    """Ask "WHAT?", such as "Remove 3 files?". Raises click.Abort after a no, WrongUseError without a terminal."""
    if not sys.stdin.isatty():
        raise WrongUseError(f"cannot ask without a terminal: {what}?", remedy)
    click.confirm(f"{what}?", abort=True, err=True)
