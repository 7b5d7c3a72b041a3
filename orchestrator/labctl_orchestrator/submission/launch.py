"""Submit job arrays. The intent is on disk before sbatch is called, so a crash shows as an interrupted submission."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from labctl_orchestrator.store import documents
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.submission.job_arrays import JobArray, halves, write
from labctl_orchestrator.tracking import processes, run_status
from labctl_orchestrator.tracking.refresh import Refreshed
from labctl_orchestrator.tracking.run_status import RunStatus
from labctl_slurm import command
from labctl_slurm.errors import SlurmError, SubmitLimitError, UnknownOutcomeError
from labctl_workers.record import JobFolder, JobSpec, read_bytes, utc_now, write_json


@dataclass
class Launched:
    """The result of a submission: runs that are measured already, runs that queued jobs measure already (`on_their_way`), the
    queued jobs with their Slurm ids, each refusal, and the state of the jobs before (`learnt`)."""

    submission_id: str
    run_ids: list[str]
    measured: list[str] = field(default_factory=list)
    on_their_way: list[RunStatus] = field(default_factory=list)
    queued: list[tuple[JobSpec, str]] = field(default_factory=list)
    refusals: list[SlurmError] = field(default_factory=list)
    learnt: Refreshed | None = None

    @property
    def queued_runs(self) -> list[str]:
        """The ids of the queued runs, each once."""
        return list(dict.fromkeys(run.run_id for job, _ in self.queued for run in job.runs))


def claim(workspace: Workspace, arrays: Sequence[JobArray], submission_id: str, found: Mapping[str, RunStatus]) -> None:
    """Write the arrays' files, give their jobs the runs that earlier jobs left unmeasured, and write the intents. Call it
    with the workspace locked, with the runs' states then (`found`)."""
    write(workspace, arrays)
    _take_over(workspace, found, arrays)
    _write_intents(arrays, submission_id)


# A run that goes from one job to another: (the earlier job's id, the run's id, the later job and the earlier one's state).
Transfer = tuple[str, str, documents.Moved]


def _take_over(workspace: Workspace, found: Mapping[str, RunStatus], arrays: Sequence[JobArray]) -> None:
    """Give the runs that jobs have left unmeasured to these arrays' jobs. An earlier job that still starts (Slurm had lost it, or
    a user requeued it) then skips the run. A transfer to a job without an intent does not count: if labctl is killed between the
    two writes, each run still has one job."""
    later: dict[str, list[str]] = {}
    for array in arrays:
        for job in array.jobs:
            for run in job.runs:
                later.setdefault(run.run_id, []).append(job.job_id)
    transfers = [
        (earlier, run_id, documents.Moved(job_ids[min(number, len(job_ids) - 1)], state))
        for run_id, job_ids in later.items()
        if run_id in found
        for number, (earlier, state) in enumerate(found[run_id].unmeasured.items())
    ]
    _write_transfers(workspace, transfers)


def _write_transfers(workspace: Workspace, transfers: Sequence[Transfer]) -> None:
    """Add the transfers to the moved.json of each earlier job's array."""
    by_array: dict[str, list[Transfer]] = {}
    for transfer in transfers:
        by_array.setdefault(transfer[0].rpartition(".")[0], []).append(transfer)
    for array_id, of_array in by_array.items():
        path = JobFolder(workspace.spec(f"{array_id}.0")).moved
        try:
            given = documents.read(read_bytes(path), dict[str, dict[str, documents.Moved]])
        except (FileNotFoundError, ValueError):
            given = {}
        for job_id, run_id, later in of_array:
            given.setdefault(job_id, {})[run_id] = later
        write_json(path, msgspec.to_builtins(given))


def _write_intents(arrays: Sequence[JobArray], submission_id: str) -> None:
    """Write, before sbatch is called, that this process is about to submit these arrays."""
    own = os.getpid()
    for array in arrays:
        intent = documents.Intent(
            submission_id=submission_id,
            at=utc_now(),
            host=socket.gethostname(),
            pid=own,
            pid_start=processes.start_of(own),
            mark=array.mark,
            folder=str(array.folder),
            clusters=command.selected(array.script.partition.cluster),
        )
        write_json(array.folder / "intent.json", msgspec.to_builtins(intent))


def submit_all(workspace: Workspace, arrays: Sequence[JobArray], launched: Launched) -> None:
    """Submit claimed arrays one after the other; refuse the rest after a limit of the user."""
    for array in arrays:
        full = next((error for error in launched.refusals if isinstance(error, SubmitLimitError)), None)
        if full is not None:
            _write_refusal(array, full)
            continue
        try:
            ids = _submit(array)
        except SubmitLimitError as error:
            _submit_parts(workspace, array, launched, error)
        except SlurmError as error:
            launched.refusals.append(error)
        else:
            launched.queued += zip(array.jobs, ids, strict=True)


def _submit_parts(workspace: Workspace, array: JobArray, launched: Launched, error: SubmitLimitError) -> None:
    """Halve an array that exceeds the user's limit, and submit the halves."""
    if len(array.jobs) == 1:
        launched.refusals.append(error)
        return
    parts = halves(workspace, array)
    write(workspace, parts)
    later_jobs = [job for part in parts for job in part.jobs]
    transfers = [
        (job.job_id, run.run_id, documents.Moved(later.job_id, run_status.REFUSED))
        for job, later in zip(array.jobs, later_jobs, strict=True)
        for run in job.runs
    ]
    _write_transfers(workspace, transfers)
    _write_intents(parts, launched.submission_id)
    submit_all(workspace, parts, launched)


def _submit(array: JobArray) -> list[str]:
    from labctl_slurm import executor

    try:
        queued = executor.submit(array.script.logs, array.script, array.specs, array.mark)
    except UnknownOutcomeError as error:
        # The next labctl that asks Slurm completes the submission.
        path = array.folder / "intent.json"
        intent = documents.read(read_bytes(path), documents.Intent)
        intent.lost_answer = documents.LostAnswer(error.message, error.remedy, error.late_s)
        write_json(path, msgspec.to_builtins(intent))
        raise
    except SlurmError as error:
        _write_refusal(array, error)
        raise
    submitted = documents.Submitted(at=utc_now(), host=socket.gethostname(), ids=list(queued.ids))
    if queued.cluster is None:
        submitted.starts = [processes.start_of(int(pid)) for pid in queued.ids]
    else:
        submitted.clusters = [queued.cluster]
    write_json(array.folder / "submitted.json", msgspec.to_builtins(submitted))
    return queued.ids


def _write_refusal(array: JobArray, error: SlurmError) -> None:
    submitted = documents.Submitted(at=utc_now(), refused=error.message, remedy=error.remedy)
    write_json(array.folder / "submitted.json", msgspec.to_builtins(submitted))
