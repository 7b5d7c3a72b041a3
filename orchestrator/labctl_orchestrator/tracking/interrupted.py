"""The Slurm ids of interrupted submissions, and of scripts that a user submitted with sbatch."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from pathlib import Path

import msgspec

from labctl_orchestrator.store import documents, job_rows
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.job_rows import ArrayRow
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking import processes
from labctl_orchestrator.tracking.run_status import RETRY
from labctl_orchestrator.tracking.slurm_answers import Answers
from labctl_orchestrator.tracking.times import SBATCH_REACHES_SLURM_WITHIN_S, SUBMISSION_TAKES_AT_MOST_S, age_s
from labctl_slurm import queue
from labctl_workers.record import read_bytes, read_json, utc_now, write_json


def not_submitted(store: Store) -> list[ArrayRow]:
    """Job arrays with an intent and without a submission."""
    return job_rows.arrays(store, "intent_at IS NOT NULL AND submitted_at IS NULL")


def submitter_is_gone(workspace: Workspace, array: ArrayRow) -> bool:
    """Whether the labctl that submitted the array has ended, and its sbatch too: nobody else will write the submission."""
    if array.lost_answer:
        return True
    old_s = age_s(array.intent_at)
    folder = workspace.arrays / array.array_id
    intent = documents.read_at(folder / "intent.json", documents.Intent)
    if intent is None or intent.host != socket.gethostname():
        return old_s > SUBMISSION_TAKES_AT_MOST_S
    if processes.is_alive(intent.pid, intent.pid_start):
        return False
    return old_s > SBATCH_REACHES_SLURM_WITHIN_S and not processes.some_runs("sbatch", str(folder))


def rendered(store: Store) -> list[ArrayRow]:
    """Rendered job arrays that labctl has not submitted: the user may have."""
    return job_rows.arrays(
        store,
        "intent_at IS NULL AND submitted_at IS NULL"
        " AND executor = 'slurm' AND array_id NOT IN (SELECT array_id FROM jobs WHERE slurm_id IS NOT NULL)",
    )


def take_by_hand(workspace: Workspace, array: ArrayRow, answer: queue.QueueAnswer) -> bool:
    """Write the Slurm ids of a rendered script that the user submitted; returns whether Slurm has it."""
    folder = workspace.arrays / array.array_id
    seen = [job for (_, name), job in answer.shown.items() if name == array.job_name and job.state not in queue.ENDED]
    if not seen or not workspace.writable or (folder / "submitted.json").exists():
        return False
    ids = _ids_of(folder, [job.slurm_id for job in seen])
    _write(folder, documents.Submitted(at=seen[0].queued_at or utc_now(), ids=ids))
    return True


def settle(workspace: Workspace, array: ArrayRow, answer: Answers) -> bool:
    """Complete an interrupted submission, with its Slurm ids or without; returns whether its outcome is known."""
    folder = workspace.arrays / array.array_id
    if (folder / "submitted.json").exists() or not workspace.writable:
        return False
    submitted = documents.Submitted(at=array.intent_at or utc_now())
    if array.is_local:
        submitted.ids = local_ids(folder)
        submitted.starts = [None if pid is None else processes.start_of(int(pid)) for pid in submitted.ids]
    elif array.job_name in answer.named:
        submitted.ids = _ids_of(folder, answer.named[array.job_name])
        cluster = answer.found_on[array.job_name]
        submitted.clusters = [] if cluster is None else [cluster]
    elif array.job_name in answer.nowhere and array.lost_answer:
        lost = documents.read(array.lost_answer.encode(), documents.LostAnswer)
        if age_s(array.intent_at) < lost.late_s:
            return False  # Slurm may still queue it
        submitted.refused, submitted.remedy = f"Slurm does not have the job: {lost.message}", RETRY
    elif array.job_name in answer.nowhere:
        submitted.never_queued = utc_now()
    else:
        return False  # no answer from Slurm
    _write(folder, submitted)
    return True


def _write(folder: Path, submitted: documents.Submitted) -> None:
    submitted.host = socket.gethostname()
    write_json(folder / "submitted.json", msgspec.to_builtins(submitted))


def _ids_of(folder: Path, seen: Sequence[str]) -> list[str | None]:
    """The ids of all jobs of an array in order, from some of them."""
    tasks = int(read_json(folder / "array.json")["tasks"])
    parent = seen[0].split("_")[0]
    return [parent] if tasks == 1 else [f"{parent}_{task}" for task in range(tasks)]


def local_ids(folder: Path) -> list[str | None]:
    """The process ids of an array's local jobs in order; None for one that has not started. submitit names each pickle after the
    process, and the pickle contains the path of the job's JSON."""
    tasks = int(read_json(folder / "array.json")["tasks"])
    found: dict[int, str] = {}
    for pickle in (folder / "submitit").glob("*_submitted.pkl"):
        try:
            content = read_bytes(pickle)
        except (OSError, ValueError):
            continue
        named = re.search(rb"/(\d+)\.json", content)
        if named is not None:
            found[int(named[1])] = pickle.name.partition("_")[0]
    return [found.get(task) for task in range(tasks)]
