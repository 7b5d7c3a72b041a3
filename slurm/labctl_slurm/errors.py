"""Errors with a remedy. The command line prints each as one message and ends with its exit code."""

from __future__ import annotations

import re
from collections.abc import Iterable

EXIT_WRONG_USE = 2
EXIT_REFUSED_BY_PREFLIGHT = 3
EXIT_SLURM = 4
# I/O error: a file, the database or the Hub. 1 is an answer: a run failed, or a result is worse.
EXIT_HINDERED = 5
EXIT_NOT_YET = 6
NO_SLURM = "run labctl on the cluster's login node, or use --partition local"


class LabctlError(Exception):
    """What happened (`message`), what to do (`remedy`), and the exit code of labctl."""

    exit_code = EXIT_HINDERED

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class WrongUseError(LabctlError):
    """An invalid flag, settings file, submission file or template."""

    exit_code = EXIT_WRONG_USE


class NotYetError(LabctlError):
    """No requested run has a result yet, and some may still get one."""

    exit_code = EXIT_NOT_YET


class NoResultsError(LabctlError):
    """No requested run has a result: all have failed, or were never submitted."""

    exit_code = 1


class PreflightError(LabctlError):
    """A valid submission that would fail on the node."""

    exit_code = EXIT_REFUSED_BY_PREFLIGHT


class SlurmError(LabctlError):
    """A command of Slurm failed: not installed, no answer, or a refused job."""

    exit_code = EXIT_SLURM


class UnknownOutcomeError(SlurmError):
    """sbatch gave no job id, and Slurm may have queued the job. It may appear in the queue within `late_s` seconds."""

    def __init__(self, message: str, remedy: str, late_s: float) -> None:
        super().__init__(message, remedy)
        self.late_s = late_s


class SubmitLimitError(SlurmError):
    """The submission exceeds a limit of the user; a smaller one may not."""


KINDS = {
    "str": "a text in quotes", "int": "a whole number", "float": "a number", "bool": "true or false", "array": "a list",
    "object": "a table",
}  # fmt: skip


def in_words(reason: str) -> str:
    """msgspec's type error in the words of TOML: "Expected `str | null`, got `int`" -> "expected a text in quotes, got a whole
    number"."""
    match = re.fullmatch(r"Expected `([a-z |]+)`, got `([a-z]+)`", reason)
    if match is None:
        return reason.replace("`", "")
    wanted = [KINDS.get(kind, kind) for kind in match[1].split(" | ") if kind != "null"]
    return f"expected {' or '.join(wanted)}, got {KINDS.get(match[2], match[2])}"


def nearest(word: str, known: Iterable[str]) -> str:
    """A remedy for an unknown word: the nearest known word, or all of them where none is near."""
    import difflib  # here, so that `labctl --help` starts faster

    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.65)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
