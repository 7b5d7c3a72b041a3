"""Preflight: checks of a submission before it queues, in parallel.

A check is a function of the `Subject` and one line in `CHECKS`. It returns findings and writes nothing. A check without an
answer within `ANSWER_WITHIN_S` becomes a warning, and the submission continues.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from labctl_orchestrator.preflight import hub_checks, model_checks, python_checks, slurm_checks
from labctl_orchestrator.preflight.finding import Finding, Subject, refuse, warn
from labctl_slurm.errors import LabctlError

# For all checks together. If Slurm's controller does not answer, sbatch will report it.
ANSWER_WITHIN_S = 5.0
SKIP = "--no-preflight skips the checks"

CheckOfSubject = Callable[[Subject], Iterable[Finding]]

# In the order of their output.
CHECKS: dict[str, CheckOfSubject] = {
    "slurm": slurm_checks.partitions,
    "hub": hub_checks.models,
    "backend": model_checks.backends,
    "versions": python_checks.versions,
    "model": model_checks.models,
    "tasks": hub_checks.tasks,
}


def findings(
    subject: Subject, checks: Mapping[str, CheckOfSubject] | None = None, within_s: float = ANSWER_WITHIN_S
) -> list[Finding]:
    """Distinct findings in the order of the checks, which run in parallel because most of them wait for answers."""
    chosen = CHECKS if checks is None else checks
    answers: dict[str, list[Finding]] = {}
    threads = {
        name: threading.Thread(target=_answer, args=(name, check, subject, answers), name=name, daemon=True)
        for name, check in chosen.items()
    }
    for thread in threads.values():
        thread.start()
    until = time.monotonic() + within_s
    for thread in threads.values():
        thread.join(max(0.0, until - time.monotonic()))
    found: list[Finding] = []
    for name in chosen:
        late = Finding("warn", f"not checked: {name} did not answer within {within_s:g} s", SKIP, name)
        found += answers.get(name, [late])
    return list({(finding.severity, finding.what): finding for finding in reversed(found)}.values())[::-1]


def _answer(name: str, check: CheckOfSubject, subject: Subject, answers: dict[str, list[Finding]]) -> None:
    try:
        found = list(check(subject))
    except LabctlError as error:
        found = [refuse(error.message, error.remedy)]
    except Exception as error:  # a bug in a check is no reason to refuse
        found = [warn(f"not checked: {name} ({type(error).__name__}: {error})", SKIP)]
    answers[name] = [replace(finding, check=name) for finding in found]


def refusals(found: Iterable[Finding], *, force: bool) -> list[Finding]:
    """The findings that prevent the submission."""
    return [finding for finding in found if finding.severity == "refuse" or (finding.severity == "doubt" and not force)]
