"""Messages on the error stream, folded between words where that is a terminal; words that leave a terminal as it is."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap


def folded(message: str) -> str:
    """The message, `visible`, on lines that fit the terminal, each after the first indented; on its own lines in a pipe."""
    message = visible(message)
    if not sys.stderr.isatty():
        return message
    width = max(20, shutil.get_terminal_size().columns)
    indent = " " * (len(message) - len(message.lstrip()) + 2)
    return textwrap.fill(message, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


# All but line ends and tabs; and those that turn the direction of writing.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(words: str) -> str:
    """The text with its control characters written out, but for line ends and tabs: what a model, a log or somebody's bundle
    says must not move the cursor or change the terminal."""
    return words if words.isprintable() else CONTROLS.sub(lambda found: repr(found[0])[1:-1], words)
