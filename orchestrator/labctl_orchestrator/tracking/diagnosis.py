"""Diagnoses of failed runs, from records and logs. Each record and log is read once: diagnoses are kept beside the job array."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from labctl_orchestrator.store import documents
from labctl_orchestrator.store.job_rows import JobRow, ResultRow
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking.run_status import RETRY, RunStatus
from labctl_orchestrator.tracking.times import age_s
from labctl_slurm import diagnose, queue
from labctl_slurm.diagnose import UNKNOWN, Diagnosis
from labctl_slurm.errors import LabctlError
from labctl_slurm.queue import JobState
from labctl_workers.record import JobSpec, read_bytes, read_json, write_json

# The log of a job may reach the login node some seconds after its end.
LOG_MAY_BE_LATE_S = 30.0
CANCELLED = "cancelled"
# Kinds of the worker that name the place of a failure, not its reason. So do Python's exceptions, with a capital letter.
VAGUE = frozenset({"engine-died", "engine-not-started", "model-not-loaded", diagnose.GPU_OUT_OF_MEMORY})
# Kinds of runs that exceed GPU memory, for which labctl fit has a remedy.
TOO_LARGE = frozenset({diagnose.GPU_OUT_OF_MEMORY, "kv-cache-too-small", "does-not-fit", "offloaded"})


class RunDiagnoses:
    """The diagnoses of a workspace's runs. `keep` writes new ones."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._kept: dict[str, dict[str, Diagnosis]] = {}
        self._new: set[str] = set()
        self._logs: dict[tuple[str, str | None], list[str]] = {}

    def of_end(self, run: RunStatus, job: JobRow) -> Diagnosis:
        """Why a Slurm job ended without a record of this run."""
        state = _state_of(job)
        if state.state in REASONS:
            return diagnose.of_end(state, (), vars(run))
        key = f"{run.run_id}/{job.job_id} {job.state} {job.ended_at}"
        return self._of_array(job.array_id).get(key) or self._add(
            run, job, key, diagnose.of_end(state, self._errors(job), vars(run), self._log(job))
        )

    def of_local_end(self, run: RunStatus, job: JobRow) -> Diagnosis:
        """Why a worker on this machine ended without a record."""
        key = f"{run.run_id}/{job.job_id} {job.ended_at}"
        if known := self._of_array(job.array_id).get(key):
            return known
        found = diagnose.of_texts(self._errors(job), vars(run))
        return self._add(run, job, key, found or diagnose.unknown("worker ended without a record", self._log(job)))

    def of_failure(self, run: RunStatus, job: JobRow | None, failure: ResultRow) -> Diagnosis:
        """Why a run failed that has a record of failure; `job` None where the job is unknown."""
        kind, message = failure.failure_kind or UNKNOWN, failure.failure or ""
        if kind == CANCELLED and job is not None and job.state in REASONS:
            return diagnose.of_end(_state_of(job), (), vars(run))  # Slurm knows who cancelled, and why
        recorded = Diagnosis(kind, message, failure.remedy or "")
        vague = kind in VAGUE or kind == UNKNOWN or kind != kind.lower()
        if not (vague or kind in TOO_LARGE):
            return recorded
        if job is None:
            return diagnose.of_texts([self._error(run, failure)], vars(run)) or recorded
        key = f"{run.run_id}/{failure.attempt_id}"
        if known := self._of_array(job.array_id).get(key):
            return known
        if not vague:
            return self._add(run, job, key, recorded)
        found = diagnose.of_texts([self._error(run, failure), *self._errors(job)], vars(run))
        return self._add(run, job, key, found or _unexplained(recorded, self._log(job)))

    def keep(self) -> None:
        """Write new diagnoses beside their arrays. Where that is not permitted, they are made again the next time."""
        for array_id in self._new:
            kept = documents.Diagnoses(diagnose.edition(), self._kept[array_id])
            with contextlib.suppress(OSError):
                write_json(self._file(array_id), msgspec.to_builtins(kept), durable=False)
        self._new.clear()

    # ------------------------------------------------------------ files

    def _add(self, run: RunStatus, job: JobRow, key: str, found: Diagnosis) -> Diagnosis:
        """Complete the diagnosis and keep it under this key."""
        earlier = self._moved_from(job) if found.kind in (diagnose.NOT_SHARED, UNKNOWN) else ""
        missed = any(f"No such file or directory: '{earlier}/" in text for text in self._errors(job))
        if earlier and (found.kind == diagnose.NOT_SHARED or missed):
            found = Diagnosis("workspace-moved", f"workspace moved after the submission, from {earlier}", RETRY)
        if found.kind in TOO_LARGE:
            found = replace(found, remedy=self._fitting(run, job) or found.remedy)
        if found.kind != UNKNOWN or age_s(job.ended_at) > LOG_MAY_BE_LATE_S:
            self._of_array(job.array_id)[key] = found
            self._new.add(job.array_id)
        return found

    def _of_array(self, array_id: str) -> dict[str, Diagnosis]:
        if array_id not in self._kept:
            kept = documents.read_at(self._file(array_id), documents.Diagnoses)
            current = kept is not None and kept.edition == diagnose.edition()
            self._kept[array_id] = kept.found if kept is not None and current else {}
        return self._kept[array_id]

    def _file(self, array_id: str) -> Path:
        return self.workspace.arrays / array_id / "diagnoses.json"

    def _log(self, job: JobRow) -> list[str]:
        """The ends of the job's logs: error streams first, its output last."""
        key = (job.array_id, job.slurm_id)
        if key not in self._logs:
            folder = self.workspace.arrays / job.array_id / "submitit"
            names = [f"{job.slurm_id}_0_log.err", "controller.log", f"{job.slurm_id}_0_log.out"]
            self._logs[key] = [diagnose.tail(folder / name) for name in names]
        return self._logs[key]

    def _errors(self, job: JobRow) -> list[str]:
        """The ends of the logs without texts of a model: its answers go to the .out file alone."""
        return self._log(job)[:-1]

    def _moved_from(self, job: JobRow) -> str:
        """The workspace's path at the submission, if it no longer exists; "" otherwise."""
        intent = documents.read_at(self.workspace.arrays / job.array_id / "intent.json", documents.Intent)
        if intent is None or not intent.folder or Path(intent.folder).exists():
            return ""
        above = Path(intent.folder).parents  # of ROOT/.labctl/arrays/ID
        return str(above[2]) if len(above) > 2 else ""

    def _fitting(self, run: RunStatus, job: JobRow) -> str:
        """labctl fit's remedy for the run; "" where this machine lacks the model or the partition, or fit does not know it."""
        from labctl_orchestrator.models import job_fit
        from labctl_orchestrator.request import settings

        try:
            spec = documents.read(read_bytes(self.workspace.spec(job.job_id)), JobSpec)
            (spec_of_run,) = (each for each in spec.runs if each.run_id == run.run_id)
            return job_fit.memory_advice(spec, spec_of_run, settings.load(self.workspace).partition(spec.partition))
        except (LabctlError, OSError, ArithmeticError, LookupError, TypeError, ValueError):
            return ""

    def _error(self, run: RunStatus, failure: ResultRow) -> str:
        """The message and the traceback of the failure, from its record, which outlives the log."""
        try:
            record = read_json(self.workspace.results / run.run_id / f"{failure.attempt_id}.json")
            return f"{failure.failure or ''}\n{record['failure']['traceback']}"
        except (OSError, ValueError, KeyError, TypeError):
            return failure.failure or ""


# States of Slurm that are the reason of the end.
REASONS = queue.ENDED - {"COMPLETED", "FAILED"}


def _state_of(job: JobRow) -> JobState:
    return JobState(job.slurm_id or "", job.state or "", reason=job.reason or "", exit_code=job.exit_code)


def _unexplained(recorded: Diagnosis, log: Sequence[str]) -> Diagnosis:
    """A recorded error that no reason matches, with the log's last lines."""
    lines = next((lines for text in log if (lines := diagnose.last_lines(text))), ())
    own = recorded.kind in VAGUE or recorded.kind == UNKNOWN
    happened = recorded.happened if own else f"{recorded.kind}: {recorded.happened}"
    return Diagnosis(recorded.kind if recorded.kind in VAGUE else UNKNOWN, happened, recorded.remedy, lines)
