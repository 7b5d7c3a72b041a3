"""Inputs and results of checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from labctl_orchestrator.request.plan import Plan
from labctl_orchestrator.request.request import SubmissionSpec
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.partitions import Partition

# "refuse": it would fail. "doubt": it would probably fail; --force submits it. "warn": it may fail. "note": information.
Severity = Literal["refuse", "doubt", "warn", "note"]
Level = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One problem and its remedy. `check` is the name of the check that found it."""

    severity: Severity
    what: str
    remedy: str = ""
    check: str = ""


refuse, doubt, warn = partial(Finding, "refuse"), partial(Finding, "doubt"), partial(Finding, "warn")


def note(what: str) -> Finding:
    """Information about the submission, not a problem."""
    return Finding("note", what)


@dataclass(frozen=True)
class Subject:
    """A submission to check: `plan` contains the runs to queue; `partitions` are by name."""

    workspace: Workspace
    request: SubmissionSpec
    partitions: Mapping[str, Partition]
    plan: Plan


@dataclass(frozen=True)
class Check:
    """A line of doctor: subject, observation, and a remedy for a problem."""

    partition: str
    name: str
    level: Level
    text: str
    remedy: str = ""


def failed(checks: Iterable[Check]) -> bool:
    return any(check.level == "fail" for check in checks)
