"""Messages on the error stream, folded between words where that is a terminal; words that leave a terminal as it is."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from typing import Any


def folded(message: str) -> str:
    """The message, `visible`, on lines that fit the terminal, each after the first indented; on its own lines in a pipe."""
    message = visible(message)
    if not sys.stderr.isatty():
        return message
    width = max(20, shutil.get_terminal_size().columns)
    indent = " " * (len(message) - len(message.lstrip()) + 2)
    return textwrap.fill(message, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


# All but line ends and tabs; those that turn the direction of writing; and what is no character, which no SVG can hold.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def visible(words: str) -> str:
    """The text with its control characters written out, but for line ends and tabs: what a model, a log or somebody's bundle
    says must not move the cursor or change the terminal."""
    return words if words.isprintable() else CONTROLS.sub(lambda found: repr(found[0])[1:-1], words)


def visible_in(value: Any) -> Any:
    """A JSON value with `visible` texts: the chart library ends the process at a control character."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {key: visible_in(item) for key, item in value.items()}
    return [visible_in(item) for item in value] if isinstance(value, (list, tuple)) else value
