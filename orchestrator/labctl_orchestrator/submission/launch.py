"""Job arrays into Slurm's queue.

What is about to be submitted is on disk before sbatch is called: a crash in between shows as an interrupted submission.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.submission.job_arrays import JobArray, halves, write
from labctl_orchestrator.tracking import processes, run_status
from labctl_orchestrator.tracking.refresh import Refreshed
from labctl_orchestrator.tracking.run_status import RunStatus
from labctl_slurm import command
from labctl_slurm.errors import SlurmError, SubmitLimitError, UnknownOutcomeError
from labctl_workers.record import JobFolder, JobSpec, read_json, utc_now, write_json


@dataclass
class Launched:
    """What became of a submission: the runs that were measured already, those that a job is to run already, the jobs that were
    queued with their Slurm ids, each refusal, and what was learnt of Slurm before."""

    submission_id: str
    run_ids: list[str]
    measured: list[str] = field(default_factory=list)
    on_their_way: list[RunStatus] = field(default_factory=list)
    queued: list[tuple[JobSpec, str]] = field(default_factory=list)
    refusals: list[SlurmError] = field(default_factory=list)
    learnt: Refreshed | None = None

    @property
    def queued_runs(self) -> list[str]:
        """The ids of the runs that were queued, each once."""
        return list(dict.fromkeys(run.run_id for job, _ in self.queued for run in job.runs))


def claim(workspace: Workspace, arrays: Sequence[JobArray], submission_id: str, found: Mapping[str, RunStatus]) -> None:
    """Write the arrays, take their runs over from the jobs that left them unmeasured, and write down that they are about to be
    submitted. To be called in the workspace's turn; `found` are the runs' states there."""
    write(workspace, arrays)
    _take_over(workspace, found, arrays)
    _claim(arrays, submission_id)


def _take_over(workspace: Workspace, found: Mapping[str, RunStatus], arrays: Sequence[JobArray]) -> None:
    """Give the runs that jobs have left unmeasured to these arrays' jobs. Such a job may still start, where Slurm had lost it or
    a person puts it back into the queue: it reads there that the run is no more its own. What is given to a job that is never
    claimed counts as not given: a labctl that is killed in between leaves each run to one job."""
    jobs: dict[str, list[str]] = {}
    for job in (job for array in arrays for job in array.jobs):
        for run in job.runs:
            jobs.setdefault(run.run_id, []).append(job.job_id)
    given = [
        (before, run_id, {"job": after[min(number, len(after) - 1)], "state": state})
        for run_id, after in jobs.items()
        if run_id in found
        for number, (before, state) in enumerate(found[run_id].unmeasured.items())
    ]
    _give(workspace, given)


def _give(workspace: Workspace, given: Sequence[tuple[str, str, dict[str, str]]]) -> None:
    """Write down beside each job, in its array, which of its runs goes to which job: (its id, the run's, what is written)."""
    of_arrays: dict[str, list[tuple[str, str, dict[str, str]]]] = {}
    for each in given:
        of_arrays.setdefault(each[0].rpartition(".")[0], []).append(each)
    for array_id, each_of in of_arrays.items():
        path = JobFolder(workspace.spec(f"{array_id}.0")).given
        document = _document_to_change(path)
        for job_id, run_id, to in each_of:
            document.setdefault(job_id, {})[run_id] = to
        write_json(path, document)


def _document_to_change(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the workspace; empty where there is no file or a damaged one. Raises OSError where it cannot
    be read now: written again, it would lose what it holds."""
    try:
        document = read_json(path)
    except (FileNotFoundError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _claim(arrays: Sequence[JobArray], submission_id: str) -> None:
    """Write down, before sbatch is called, that these arrays are about to be submitted, and by which process."""
    own = os.getpid()
    for array in arrays:
        intent = {
            "submission_id": submission_id,
            "at": utc_now(),
            "host": socket.gethostname(),
            "pid": own,
            "pid_start": processes.start_of(own),
            "mark": array.mark,
            "folder": str(array.folder),
            "clusters": [cluster.to_json() for cluster in command.meant()],
        }
        write_json(array.folder / "intent.json", intent)


def submit_all(workspace: Workspace, arrays: Sequence[JobArray], launched: Launched) -> None:
    """Submit claimed arrays, one after the other. After a limit of the user's is met, no more are tried."""
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
    """Halve an array that is more than Slurm takes of this user now, until what it takes is queued."""
    if len(array.jobs) == 1:
        launched.refusals.append(error)
        return
    parts = halves(workspace, array)
    write(workspace, parts)
    after = [job for half in parts for job in half.jobs]
    _give(
        workspace,
        [
            (job.job_id, run.run_id, {"job": other.job_id, "state": run_status.REFUSED})
            for job, other in zip(array.jobs, after, strict=True)
            for run in job.runs
        ],
    )
    _claim(parts, launched.submission_id)
    submit_all(workspace, parts, launched)


def _submit(array: JobArray) -> list[str]:
    from labctl_slurm import executor

    try:
        queued = executor.submit(array.script.logs, array.script, array.specs, array.mark)
    except UnknownOutcomeError as error:
        # Whoever asks Slurm next completes the submission.
        path = array.folder / "intent.json"
        lost = {"message": error.message, "remedy": error.remedy, "late_s": error.late_s}
        write_json(path, {**_document_to_change(path), "lost_answer": lost})
        raise
    except SlurmError as error:
        _write_refusal(array, error)
        raise
    done: dict[str, Any] = {"ids": queued.ids, "at": utc_now(), "host": socket.gethostname()}
    if queued.cluster is None:
        done["starts"] = [processes.start_of(int(pid)) for pid in queued.ids]
    else:
        done["clusters"] = [queued.cluster.to_json()]
    write_json(array.folder / "submitted.json", done)
    return queued.ids


def _write_refusal(array: JobArray, error: SlurmError) -> None:
    said = {"refused": error.message, "remedy": error.remedy, "at": utc_now()}
    write_json(array.folder / "submitted.json", said)
