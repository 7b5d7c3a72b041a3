"""Messages wrapped for a terminal."""

from __future__ import annotations

import shutil
import sys
import textwrap


def folded(message: str) -> str:
    """The message wrapped to the terminal, with a hanging indent; unchanged in a pipe."""
    if not sys.stderr.isatty():
        return message
    width = max(20, shutil.get_terminal_size().columns)
    indent = " " * (len(message) - len(message.lstrip()) + 2)
    return textwrap.fill(message, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
