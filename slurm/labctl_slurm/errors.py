"""Errors that a person can mend. The command line turns each into one message with its remedy and an exit code."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

EXIT_WRONG_USE = 2
EXIT_REFUSED_BY_PREFLIGHT = 3
EXIT_SLURM = 4
# I/O error: a file, the database or the Hub. 1 is an answer: a run failed, or a result is worse.
EXIT_HINDERED = 5
NO_SLURM = "run labctl on the cluster's login node, or use --partition local"


class LabctlError(Exception):
    """`message` says what is wrong, `remedy` what to do about it, `exit_code` what the shell sees."""

    exit_code = EXIT_HINDERED

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class WrongUseError(LabctlError):
    """A flag, a settings file, a request file or a template that cannot be right."""

    exit_code = EXIT_WRONG_USE


class NotYetError(LabctlError):
    """There is no answer yet: nothing that was asked for has been measured."""

    exit_code = 1


class PreflightError(LabctlError):
    """A request that is well formed and would fail on the node."""

    exit_code = EXIT_REFUSED_BY_PREFLIGHT


class SlurmError(LabctlError):
    """Slurm cannot be reached, or refused the job."""

    exit_code = EXIT_SLURM


class UnknownOutcomeError(SlurmError):
    """Slurm may have queued the job: its answer was lost, and it has not said otherwise since. `late_s` is how long, in seconds,
    what was sent may take to show in the queue."""

    def __init__(self, message: str, remedy: str, late_s: float) -> None:
        super().__init__(message, remedy)
        self.late_s = late_s


class SubmitLimitError(SlurmError):
    """Slurm takes no more jobs of this user at once; fewer it may take."""


KINDS = {
    "str": "a text in quotes", "int": "a whole number", "float": "a number", "bool": "true or false", "array": "a list",
    "object": "a table",
}  # fmt: skip


def in_words(reason: str) -> str:
    """What msgspec says of a value of a wrong type, as a person who writes TOML would: "Expected `str | null`, got `int`" ->
    "it must be a text in quotes, and is a whole number"."""
    match = re.fullmatch(r"Expected `([a-z |]+)`, got `([a-z]+)`", reason)
    if match is None:
        return reason.replace("`", "")
    wanted = [KINDS.get(kind, kind) for kind in match[1].split(" | ") if kind != "null"]
    return f"it must be {' or '.join(wanted)}, and is {KINDS.get(match[2], match[2])}"


def nearest(word: str, known: Iterable[str]) -> str:
    """A remedy for an unknown word: the nearest known one where there is one, else all that are known."""
    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
