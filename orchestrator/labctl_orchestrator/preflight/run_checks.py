"""What would fail after hours in the queue, said before the queue: checks that look at what is asked, side by side.

A check is a function of the `Subject`, and one line in `CHECKS`. It returns what it finds; it writes nothing, and answers
within `ANSWER_WITHIN_S`, else submit goes on and says that it was not checked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from labctl_orchestrator.preflight import hub_checks, model_checks, python_checks, slurm_checks
from labctl_orchestrator.preflight.finding import Finding, Subject, refuse, warn
from labctl_slurm.errors import LabctlError

# For all checks together: a controller that does not answer must not keep anybody waiting here, sbatch will say it.
ANSWER_WITHIN_S = 5.0

CheckOfSubject = Callable[[Subject], Iterable[Finding]]

# In the order in which they are told.
CHECKS: dict[str, CheckOfSubject] = {
    "slurm": slurm_checks.partitions,
    "hub": hub_checks.models,
    "backend": model_checks.backends,
    "versions": python_checks.versions,
    "model": model_checks.models,
}


def findings(
    subject: Subject, checks: Mapping[str, CheckOfSubject] | None = None, within_s: float = ANSWER_WITHIN_S
) -> list[Finding]:
    """What the checks find, in their order, each thing once. They run at the same time: most of them wait for others."""
    asked = CHECKS if checks is None else checks
    answers: dict[str, list[Finding]] = {}
    threads = {
        name: threading.Thread(target=_answer, args=(name, check, subject, answers), name=name, daemon=True)
        for name, check in asked.items()
    }
    for thread in threads.values():
        thread.start()
    until = time.monotonic() + within_s
    for thread in threads.values():
        thread.join(max(0.0, until - time.monotonic()))
    found: list[Finding] = []
    for name in asked:
        late = Finding("warn", f"not checked: {name} did not answer within {within_s:g} s", "", name)
        found += answers.get(name, [late])
    return list({(finding.severity, finding.what): finding for finding in reversed(found)}.values())[::-1]


def _answer(name: str, check: CheckOfSubject, subject: Subject, answers: dict[str, list[Finding]]) -> None:
    try:
        found = list(check(subject))
    except LabctlError as error:
        found = [refuse(error.message, error.remedy)]
    except Exception as error:  # a check that fails says nothing about the request
        found = [warn(f"not checked: {name} ({type(error).__name__}: {error})", "--no-preflight leaves it out")]
    answers[name] = [replace(finding, check=name) for finding in found]


def refusals(found: Iterable[Finding], *, force: bool) -> list[Finding]:
    """Those of the findings that forbid to submit."""
    return [finding for finding in found if finding.severity == "refuse" or (finding.severity == "doubt" and not force)]
