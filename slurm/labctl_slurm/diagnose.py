"""Why a job failed or waits, and what to do.

reasons.toml holds the reasons. This module matches them with a job's state, exit code, record and log. A failure that no reason
matches is UNKNOWN, with the last lines of the log.
"""

from __future__ import annotations

import functools
import os
import pwd
import re
import string
import tomllib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import msgspec

from labctl_slurm.queue import JobState
from labctl_workers.record import open_regular

UNKNOWN, AT_A_LIMIT, GPU_OUT_OF_MEMORY = "unknown", "at-a-limit", "gpu-out-of-memory"
NOT_SHARED = "workspace-not-shared"
# vLLM's processes write tracebacks after the cause; together they are shorter than this.
TAIL_BYTES = 32 * 1024
LAST_LINES = 5
LONGEST_LINE = 240
LONGEST_DETAIL = 100  # of a status, in characters
# Reasons of a job that waits for its turn.
ORDINARY_WAITS = frozenset(
    {"", "None", "Resources", "Priority", "BeginTime", "Dependency", "JobArrayTaskLimit", "Cleaning", "InvalidState"}
)


@dataclass(frozen=True)
class Diagnosis:
    """`kind` is one of reasons.toml or of the worker, or UNKNOWN. `lines` are the log's last lines where it is UNKNOWN."""

    kind: str
    happened: str
    remedy: str
    lines: tuple[str, ...] = ()


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of reasons.toml. Empty fields are keys that its table does not have."""

    kind: str
    remedy: str
    happened: str = ""
    words: tuple[str, ...] = ()
    pattern: str = ""
    state: str = ""
    codes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    def diagnosis(self, about: Mapping[str, object], found: Mapping[str, str] | None = None) -> Diagnosis:
        """The entry with the values of a run for the names in braces; unknown names become capitals (MODEL)."""
        values = {**about, **(found or {})}
        return Diagnosis(self.kind, _filled(self.happened, values), _filled(self.remedy, values))


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    signs: tuple[Entry, ...]
    ends: tuple[Entry, ...]
    exits: tuple[Entry, ...]
    queue: tuple[Entry, ...]


@functools.cache
def _source() -> bytes:
    return resources.files("labctl_slurm").joinpath("reasons.toml").read_bytes()


@functools.cache
def table() -> Table:
    """The entries of reasons.toml."""
    return msgspec.convert(tomllib.loads(_source().decode("utf-8")), Table)


def edition() -> int:
    """Checksum of reasons.toml: diagnoses of another edition are made again."""
    return zlib.crc32(_source())


def _filled(text: str, values: Mapping[str, object]) -> str:
    parts = []
    for literal, name, _, _ in string.Formatter().parse(text):
        parts.append(literal)
        if name is not None:
            parts.append(str(values[name]) if values.get(name) is not None else name.upper())
    return "".join(parts)


# ---------------------------------------------------------------- diagnoses


def of_end(
    job: JobState, errors: Iterable[str] = (), about: Mapping[str, object] | None = None, log: Sequence[str] = ()
) -> Diagnosis:
    """Why a job ended without a record: by its state, else by the ends of its error streams (`errors`), else by its exit code.
    `log` are the ends of all its logs; an unknown reason quotes them."""
    about = about or {}
    for entry in (*table().ends, *table().signs):
        if entry.state == job.state:
            return entry.diagnosis({**about, "by": _cancelled_by(job.reason)})
    read = list(errors)
    known = of_texts(read, about)
    if known is not None:
        return known
    for entry in (*table().exits, *table().signs):
        if job.exit_code in entry.codes:
            return entry.diagnosis({**about, "exit_code": job.exit_code})
    # Exit code 0:0 of a failed job: a controller that was killed has lost the real one.
    exit_code = f", exit code {job.exit_code}" if job.exit_code not in (None, "", "0:0") else ""
    return unknown(f"job ended without a record ({job.state}{exit_code})", log or read)


def of_texts(texts: Iterable[str], about: Mapping[str, object] | None = None) -> Diagnosis | None:
    """The reason in the first text (a log's end, an error's message) that has one; None without any."""
    for text in texts:
        lowered = text.lower()
        for entry in table().signs:
            found = _found(entry, text, lowered)
            if found is not None:
                return entry.diagnosis(about or {}, found)
    return None


def _found(entry: Entry, text: str, lowered: str) -> dict[str, str] | None:
    """The named groups of the pattern's last match in the text; None where the entry does not match."""
    if not any(word in lowered for word in entry.words):
        return None
    if not entry.pattern:
        return {}
    last = None
    for last in re.finditer(entry.pattern, text):  # noqa: B007  the last match is nearest to the end
        pass
    return None if last is None else {name: value for name, value in last.groupdict().items() if value is not None}


def unknown(happened: str, texts: Sequence[str]) -> Diagnosis:
    """A failure that no reason matches, with the last lines of the first log that has any."""
    lines = next((lines for text in texts if (lines := last_lines(text))), ())
    if not lines:
        return Diagnosis(UNKNOWN, f"{happened}; its log is empty", "resubmit with labctl retry")
    quoted = f"{happened}; last log line: {lines[-1]}"
    return Diagnosis(UNKNOWN, shortened(quoted, LONGEST_DETAIL), "read labctl logs", lines)


def shortened(text: str, most: int) -> str:
    """The text, cut to `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def of_waiting(reason: str, about: Mapping[str, object] | None = None) -> Diagnosis | None:
    """Why a job waits, by Slurm's reason; None where the job only waits for its turn, and for a reason that no entry matches."""
    if reason in ORDINARY_WAITS:
        return None
    for entry in table().queue:
        if any(re.fullmatch(re.escape(known).replace(r"\*", ".*"), reason, re.DOTALL) for known in entry.reasons):
            return entry.diagnosis(about or {})
    return None


def of_refusal(message: str) -> Diagnosis | None:
    """The reason in an error message of sbatch; None where no entry matches."""
    lowered = message.lower()
    for entry in table().queue:
        if any(word in lowered for word in entry.words):
            return entry.diagnosis({})
    return None


def kind_of_refusal(message: str) -> str:
    """The kind of sbatch's refusal, or UNKNOWN."""
    known = of_refusal(message)
    return UNKNOWN if known is None else known.kind


@functools.cache
def _cancelled_by(reason: str) -> str:
    """ " by ada" for Slurm's "by 1000"; "" for any other reason, which is an earlier one for waiting."""
    if not reason.startswith("by "):
        return ""
    who = reason.removeprefix("by ").strip()
    if not who.isdecimal():
        return f" by {who}"
    uid = int(who)
    try:
        name = pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return f" by user id {uid}"
    return f" by you ({name})" if uid == os.getuid() else f" by {name}"


# ---------------------------------------------------------------- the log


def tail(path: Path, most: int = TAIL_BYTES) -> str:
    """The end of a log in whole lines, at most `most` bytes; "" for a file that does not exist or cannot be read."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most))
            read = file.read(most)
    except (OSError, ValueError):
        return ""
    if size > most:
        read = read.partition(b"\n")[2]
    return read.decode("utf-8", errors="replace")


_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


def last_lines(text: str, most: int = LAST_LINES) -> tuple[str, ...]:
    """The last lines that are not blank, without escape sequences, each at most LONGEST_LINE characters."""
    lines: list[str] = []
    for line in reversed(text.replace("\r", "\n").splitlines()):
        shown = _ESCAPES.sub("", line).strip()
        if shown:
            lines.append(shortened(shown, LONGEST_LINE))
        if len(lines) == most:
            break
    return tuple(reversed(lines))
