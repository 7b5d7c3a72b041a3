"""What a check looks at, and what it finds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from labctl_orchestrator.request.plan import Plan
from labctl_orchestrator.request.request import SubmissionSpec
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.partitions import Partition

# "refuse": it cannot work. "doubt": it cannot as far as labctl can tell, and --force submits it all the same. "warn": it may.
Severity = Literal["refuse", "doubt", "warn", "note"]
Level = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing that speaks against submitting, and what to do about it. `check` is the name of the check that found it."""

    severity: Severity
    what: str
    remedy: str = ""
    check: str = ""


def refuse(what: str, remedy: str) -> Finding:
    return Finding("refuse", what, remedy)


def doubt(what: str, remedy: str) -> Finding:
    return Finding("doubt", what, remedy)


def warn(what: str, remedy: str) -> Finding:
    return Finding("warn", what, remedy)


def note(what: str) -> Finding:
    """A fact for the person who submits; it speaks against nothing."""
    return Finding("note", what)


@dataclass(frozen=True)
class Subject:
    """What is to be submitted, resolved: `plan` holds the runs that are to be queued, `partitions` are by name."""

    workspace: Workspace
    request: SubmissionSpec
    partitions: Mapping[str, Partition]
    plan: Plan


@dataclass(frozen=True)
class Check:
    """A line of doctor: what was looked at, what was seen, and what to do where that is not right."""

    partition: str
    name: str
    level: Level
    said: str
    remedy: str = ""


def failed(checks: Iterable[Check]) -> bool:
    return any(check.level == "fail" for check in checks)
