"""Why a job did not bring its result, or does not start: what happened, and what to do about it.

The knowledge is data, reasons.toml: what is here puts it to a job's state, exit code, record and log. What is not known stays
unknown, with the last lines of the log.
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
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import msgspec

from labctl_slurm.queue import JobState
from labctl_workers.record import open_plain

UNKNOWN, AT_A_LIMIT, GPU_OUT_OF_MEMORY = "unknown", "at-a-limit", "gpu-out-of-memory"
NOT_SHARED = "workspace-not-shared"
# A log's end holds its cause: vLLM's processes write some tracebacks after it, which are shorter than this.
TAIL_BYTES = 32 * 1024
LAST_LINES = 5
LONGEST_LINE = 240
# Waiting for these is what a queue is for; most jobs wait for one of them, and no table is read for their sake.
ORDINARY_WAITS = frozenset(
    {"", "None", "Resources", "Priority", "BeginTime", "Dependency", "JobArrayTaskLimit", "Cleaning", "InvalidState"}
)


@dataclass(frozen=True)
class Diagnosis:
    """`kind` is one of reasons.toml, or UNKNOWN; `happened` and `remedy` are for people; `lines` are the last ones of the log,
    where nothing is known."""

    kind: str
    happened: str
    remedy: str
    lines: tuple[str, ...] = ()
    found: Mapping[str, str] = field(default_factory=dict, compare=False)


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of reasons.toml. An empty tuple or text is a key that this kind of entry does not have."""

    kind: str
    remedy: str
    happened: str = ""
    words: tuple[str, ...] = ()
    pattern: str = ""
    state: str = ""
    codes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    def on(self, about: Mapping[str, object], found: Mapping[str, str] | None = None) -> Diagnosis:
        """What it says of a run: the names in braces are filled in; one that is not known is written as manuals do, MODEL."""
        values = {**about, **(found or {})}
        return Diagnosis(self.kind, _filled(self.happened, values), _filled(self.remedy, values), found=found or {})


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    signs: tuple[Entry, ...]
    ends: tuple[Entry, ...]
    exits: tuple[Entry, ...]
    waits: tuple[Entry, ...]
    refusals: tuple[Entry, ...]


@functools.cache
def _source() -> bytes:
    return resources.files("labctl_slurm").joinpath("reasons.toml").read_bytes()


@functools.cache
def table() -> Table:
    """The entries of reasons.toml."""
    return msgspec.convert(tomllib.loads(_source().decode("utf-8")), Table)


def edition() -> int:
    """A number that changes with the table: what was found by another one may be found better now."""
    return zlib.crc32(_source())


def _filled(text: str, values: Mapping[str, object]) -> str:
    parts = []
    for literal, name, _, _ in string.Formatter().parse(text):
        parts.append(literal)
        if name is not None:
            parts.append(str(values[name]) if values.get(name) is not None else name.upper())
    return "".join(parts)


# ---------------------------------------------------------------- of what


def of_end(
    job: JobState, errors: Iterable[str] = (), about: Mapping[str, object] | None = None, log: Sequence[str] = ()
) -> Diagnosis:
    """Of a job that has ended and left no record. The reason comes from `errors`, the ends of its error streams, where
    Slurm's own word does not say it all. `log` is what is quoted of an end that nothing explains: all of its logs' ends."""
    about = about or {}
    for entry in table().ends:
        if entry.state == job.state:
            return entry.on({**about, "by": _by_whom(job.reason)})
    read = list(errors)
    # A failed job's 0:0 is no exit code: a controller that was killed has lost it.
    exit_code = f", exit code {job.exit_code}" if job.exit_code not in (None, "", "0:0") else ""
    fallback = f"the job ended ({job.state}{exit_code}) and left no record"
    known = of_texts(read, about) or _of_exit(job.exit_code, about)
    return known or unknown(fallback, log or read)


def of_texts(texts: Iterable[str], about: Mapping[str, object] | None = None) -> Diagnosis | None:
    """Of the first of these texts (a log's end, an error's message) that says something known; None where none does."""
    for text in texts:
        lowered = text.lower()
        for entry in table().signs:
            found = _found(entry, text, lowered)
            if found is not None:
                return entry.on(about or {}, found)
    return None


def _found(entry: Entry, text: str, lowered: str) -> dict[str, str] | None:
    """The pattern's named groups in the last place where it is found; None where the text does not say this."""
    if not any(word in lowered for word in entry.words):
        return None
    if not entry.pattern:
        return {}
    last = None
    for last in re.finditer(entry.pattern, text):  # noqa: B007  what was said last is nearest to the end
        pass
    return None if last is None else {name: value for name, value in last.groupdict().items() if value is not None}


def _of_exit(exit_code: str | None, about: Mapping[str, object]) -> Diagnosis | None:
    for entry in table().exits:
        if exit_code in entry.codes:
            return entry.on({**about, "exit_code": exit_code})
    return None


def unknown(happened: str, texts: Sequence[str]) -> Diagnosis:
    """Of an end that nothing explains: what is known of it, and the last lines of the first log that has any."""
    lines = next((lines for text in texts if (lines := last_lines(text))), ())
    if lines:
        return Diagnosis(UNKNOWN, f"{happened}; its log ends: {lines[-1]}", "labctl logs shows all of it", lines)
    return Diagnosis(UNKNOWN, f"{happened}; its log says nothing", "labctl retry submits it again")


def of_waiting(reason: str, about: Mapping[str, object] | None = None) -> Diagnosis | None:
    """Of a job that waits for this reason of Slurm's; None where waiting is all that there is to do."""
    if reason in ORDINARY_WAITS:
        return None
    # "(ReqNodeNotAvail, UnavailableNodes:dgxh-1)": the nodes are for the reader.
    for entry in table().waits:
        if any(_is(reason, known) for known in entry.reasons):
            return entry.on(about or {})
    return None


def _is(reason: str, known: str) -> bool:
    """Whether the reason is the known one, where * stands for anything."""
    return re.fullmatch(re.escape(known).replace(r"\*", ".*"), reason, re.DOTALL) is not None


def of_refusal(message: str) -> Diagnosis | None:
    """Of sbatch's words when it took no job; None where they are not known."""
    lowered = message.lower()
    for entry in table().refusals:
        if any(word in lowered for word in entry.words):
            return entry.on({})
    return None


def kind_of_refusal(message: str) -> str:
    """The kind of sbatch's refusal, or UNKNOWN."""
    known = of_refusal(message)
    return UNKNOWN if known is None else known.kind


@functools.cache
def _by_whom(reason: str) -> str:
    """ " by ada" where Slurm tells who cancelled ("by 1000"); any other reason is what the job had waited for."""
    if not reason.startswith("by "):
        return ""
    who = reason.removeprefix("by ").strip()
    if not who.isdecimal():
        return f" by {who}"
    uid = int(who)
    try:
        name = pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return f" by the user with id {uid}"
    return f" by you ({name})" if uid == os.getuid() else f" by {name}"


# ---------------------------------------------------------------- the log


def tail(path: Path, most: int = TAIL_BYTES) -> str:
    """The end of a log, in whole lines; nothing where there is none or it cannot be read."""
    try:
        with open_plain(path) as file:
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
    """The last lines that say something, each as a terminal may show it: no escape sequences, not too long."""
    lines: list[str] = []
    for line in reversed(text.replace("\r", "\n").splitlines()):
        said = _ESCAPES.sub("", line).strip()
        if said:
            lines.append(said if len(said) <= LONGEST_LINE else f"{said[: LONGEST_LINE - 1]}…")
        if len(lines) == most:
            break
    return tuple(reversed(lines))
