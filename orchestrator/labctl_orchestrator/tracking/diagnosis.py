"""Why runs failed: each one's record and log are read once, and what was found is kept beside them.

`labctl_slurm.diagnose` knows what the words mean; this knows where they lie. A workspace of a thousand failed runs is told
about without opening a log, once it has been looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from labctl_orchestrator.store import documents
from labctl_orchestrator.store.job_rows import JobRow, ResultRow
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking.run_status import RunStatus
from labctl_orchestrator.tracking.times import age_s
from labctl_slurm import diagnose, queue
from labctl_slurm.diagnose import UNKNOWN, Diagnosis
from labctl_slurm.errors import LabctlError
from labctl_slurm.queue import JobState
from labctl_workers.record import read_bytes, read_json, write_json

# The log of a job may reach the login node some seconds after its end.
LOG_MAY_BE_LATE_S = 30.0
CANCELLED = "cancelled"
# Kinds by which a worker says where it failed, not why; Python's exceptions (a capital letter in them) say no more.
VAGUE = frozenset({"engine-died", "engine-not-started", "model-not-loaded", diagnose.GPU_OUT_OF_MEMORY})
# What is too large for the GPUs' memory: labctl fit tells by how much.
TOO_LARGE = frozenset({diagnose.GPU_OUT_OF_MEMORY, "kv-cache-too-small", "does-not-fit", "offloaded"})


class Diagnoses:
    """The diagnoses of a workspace's runs, as far as they are asked for; `keep` writes down what is new."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._kept: dict[str, dict[str, Diagnosis]] = {}
        self._new: set[str] = set()
        self._logs: dict[tuple[str, str | None], list[str]] = {}

    def of_end(self, run: RunStatus, job: JobRow) -> Diagnosis:
        """Of a job of Slurm that has ended and left no record for this run."""
        state = _state_of(job)
        if state.state in SAYS_ALL:
            return diagnose.of_end(state, (), vars(run))
        key = f"{run.run_id}/{job.job_id} {job.state} {job.ended_at}"
        known = self._of(job.array_id).get(key)
        return known or self._found(run, job, key, diagnose.of_end(state, self._errors(job), vars(run), self._log(job)))

    def of_local_end(self, run: RunStatus, job: JobRow) -> Diagnosis:
        """Of a worker on this machine that has ended and left no record."""
        key = f"{run.run_id}/{job.job_id} {job.ended_at}"
        known = self._of(job.array_id).get(key)
        if known is not None:
            return known
        read = self._log(job)
        found = diagnose.of_texts(self._errors(job), vars(run))
        found = found or diagnose.unknown("the worker ended without a record", read)
        return self._found(run, job, key, found)

    def of_failure(self, run: RunStatus, job: JobRow | None, failure: ResultRow) -> Diagnosis:
        """Of a run whose record tells of a failure; `job` None where no job is known to have run it."""
        kind, message = failure.failure_kind or UNKNOWN, failure.failure or ""
        if kind == CANCELLED and job is not None and job.state in SAYS_ALL:
            return diagnose.of_end(_state_of(job), (), vars(run))  # who told it to end, and why
        told = Diagnosis(kind, message, failure.remedy or "")
        vague = kind in VAGUE or kind == UNKNOWN or kind != kind.lower()
        if not (vague or kind in TOO_LARGE):
            return told
        if job is None:
            return diagnose.of_texts([self._error(run, failure)], vars(run)) or told
        key = f"{run.run_id}/{failure.attempt_id}"
        known = self._of(job.array_id).get(key)
        if known is not None:
            return known
        if not vague:
            return self._found(run, job, key, told)
        found = diagnose.of_texts([self._error(run, failure), *self._errors(job)], vars(run))
        return self._found(run, job, key, found or _not_known(told, self._log(job)))

    def keep(self) -> None:
        """Write what was found beside its array. Without the right to, it is found again the next time."""
        for array_id in self._new:
            kept = documents.Diagnoses(diagnose.edition(), self._kept[array_id])
            with contextlib.suppress(OSError):
                write_json(self._file(array_id), msgspec.to_builtins(kept), durable=False, parents=False)
        self._new.clear()

    # ------------------------------------------------------------ where it lies

    def _found(self, run: RunStatus, job: JobRow, key: str, told: Diagnosis) -> Diagnosis:
        before = self._moved_from(job) if told.kind in (diagnose.NOT_SHARED, UNKNOWN) else ""
        missed = any(f"No such file or directory: '{before}/" in text for text in self._errors(job))
        if before and (told.kind == diagnose.NOT_SHARED or missed):
            moved = f"the workspace was moved from {before} after the job was submitted"
            told = Diagnosis("workspace-moved", moved, "labctl retry submits it again from here")
        if told.kind in TOO_LARGE:
            told = replace(told, remedy=self._what_fits(run, job) or told.remedy)
        if told.kind != UNKNOWN or age_s(job.ended_at) > LOG_MAY_BE_LATE_S:
            self._of(job.array_id)[key] = told
            self._new.add(job.array_id)
        return told

    def _of(self, array_id: str) -> dict[str, Diagnosis]:
        if array_id not in self._kept:
            self._kept[array_id] = self._read(array_id)
        return self._kept[array_id]

    def _read(self, array_id: str) -> dict[str, Diagnosis]:
        kept = documents.diagnoses_at(self._file(array_id))
        return kept.found if kept is not None and kept.edition == diagnose.edition() else {}

    def _file(self, array_id: str) -> Path:
        return self.workspace.arrays / array_id / "diagnoses.json"

    def _log(self, job: JobRow) -> list[str]:
        """The ends of the job's logs, those of its errors first."""
        key = (job.array_id, job.slurm_id)
        if key not in self._logs:
            folder = self.workspace.arrays / job.array_id / "submitit"
            names = [f"{job.slurm_id}_0_log.err", "controller.log", f"{job.slurm_id}_0_log.out"]
            self._logs[key] = [diagnose.tail(folder / name) for name in names]
        return self._logs[key]

    def _errors(self, job: JobRow) -> list[str]:
        """The ends of the logs in which no text of a model or a user is: its answers go to the .out file, all else does not."""
        return self._log(job)[:-1]

    def _moved_from(self, job: JobRow) -> str:
        """Where the workspace was when the job was submitted, which is no more; "" where it has not been moved."""
        intent = documents.intent_at(self.workspace.arrays / job.array_id / "intent.json")
        if intent is None or not intent.folder or Path(intent.folder).exists():
            return ""
        above = Path(intent.folder).parents  # of ROOT/.labctl/arrays/ID
        return str(above[2]) if len(above) > 2 else ""

    def _what_fits(self, run: RunStatus, job: JobRow) -> str:
        """labctl fit's word on the run, from what is on this machine; nothing where that does not suffice."""
        from labctl_orchestrator.models import job_fit
        from labctl_orchestrator.request import settings

        try:
            spec = documents.job(read_bytes(self.workspace.arrays / job.array_id / f"{job.task}.json"))
            (spec_of_run,) = (each for each in spec.runs if each.run_id == run.run_id)
            return job_fit.what_fits(spec, spec_of_run, settings.load(self.workspace).partition(spec.partition))
        except (LabctlError, OSError, ArithmeticError, LookupError, TypeError, ValueError):
            return ""  # a model or a partition that is not here any more, or is none that fit knows

    def _error(self, run: RunStatus, failure: ResultRow) -> str:
        """The message and the traceback of the failure, from its record: they stay when the log is cleaned away."""
        try:
            record = read_json(self.workspace.results / run.run_id / f"{failure.attempt_id}.json")
            return f"{failure.failure or ''}\n{record['failure']['traceback']}"
        except (OSError, ValueError, KeyError, TypeError):
            return failure.failure or ""


# Where Slurm's own word for the end is the reason.
SAYS_ALL = queue.ENDED - {"COMPLETED", "FAILED"}


def _state_of(job: JobRow) -> JobState:
    return JobState(job.slurm_id or "", job.state or "", reason=job.reason or "", exit_code=job.exit_code)


def _not_known(told: Diagnosis, log: Sequence[str]) -> Diagnosis:
    """An error that no entry of the table explains: in its own words, with the log's last lines."""
    lines = next((lines for text in log if (lines := diagnose.last_lines(text))), ())
    own = told.kind in VAGUE or told.kind == UNKNOWN
    happened = told.happened if own else f"{told.kind}: {told.happened}"
    return Diagnosis(told.kind if told.kind in VAGUE else UNKNOWN, happened, told.remedy, lines)
