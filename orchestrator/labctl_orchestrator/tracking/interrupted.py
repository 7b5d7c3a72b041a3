"""Submissions that were cut off, and scripts that a person submitted: which Slurm ids their jobs have."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labctl_orchestrator.store import documents
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking import processes
from labctl_orchestrator.tracking.run_status import RETRY
from labctl_orchestrator.tracking.slurm_answers import Answers
from labctl_orchestrator.tracking.times import SBATCH_REACHES_SLURM_WITHIN_S, SUBMISSION_TAKES_AT_MOST_S, age_s
from labctl_slurm import queue
from labctl_workers.record import read_bytes, read_json, utc_now, write_json


def not_submitted(store: Store) -> list[dict[str, Any]]:
    return store.rows(
        "SELECT batch_id, executor, job_name, intent_at, mark, clusters, lost_answer FROM batches"
        " WHERE intent_at IS NOT NULL AND submitted_at IS NULL"
    )


def submitter_is_gone(workspace: Workspace, batch: dict[str, Any]) -> bool:
    """Whether nobody will write down any more what Slurm said: the labctl that submitted it has ended, and its sbatch too."""
    if batch["lost_answer"]:
        return True
    old_s = age_s(batch["intent_at"])
    folder = workspace.batches / batch["batch_id"]
    try:
        intent = documents.read(read_bytes(folder / "intent.json"), documents.Intent)
    except (OSError, ValueError):
        return old_s > SUBMISSION_TAKES_AT_MOST_S
    if intent.host != socket.gethostname():
        return old_s > SUBMISSION_TAKES_AT_MOST_S
    if processes.is_alive(intent.pid, intent.pid_start):
        return False
    return old_s > SBATCH_REACHES_SLURM_WITHIN_S and not processes.some_runs("sbatch", str(folder))


def rendered(store: Store) -> list[dict[str, Any]]:
    """Batches of Slurm's whose script was printed and that labctl has not submitted: a person may have done so."""
    return store.rows(
        "SELECT batch_id, executor, job_name, mark, clusters FROM batches WHERE intent_at IS NULL AND submitted_at IS NULL"
        " AND executor = 'slurm' AND batch_id NOT IN (SELECT batch_id FROM jobs WHERE slurm_id IS NOT NULL)"
    )


def take_by_hand(workspace: Workspace, batch: dict[str, Any], answer: queue.Answer) -> bool:
    """Write down the Slurm ids of a script that labctl printed and a person submitted, where Slurm has it."""
    path = workspace.batches / batch["batch_id"] / "submitted.json"
    seen = [
        job for (_, name), job in answer.shown.items() if name == batch["job_name"] and job.state not in queue.ENDED
    ]
    if not seen or not workspace.writable or path.exists():
        return False
    ids = _ids_of(path.parent, [job.slurm_id for job in seen])
    write_json(path, {"ids": ids, "at": seen[0].queued_at or utc_now(), "host": socket.gethostname()}, parents=False)
    return True


def settle(workspace: Workspace, batch: dict[str, Any], answer: Answers) -> bool:
    """Write down what became of a submission that was cut off, where that is known now: its Slurm ids, or that it has none."""
    folder = workspace.batches / batch["batch_id"]
    if (folder / "submitted.json").exists() or not workspace.writable:
        return False
    told: dict[str, Any] = {"at": batch["intent_at"], "host": socket.gethostname()}
    if batch["executor"] == "local":
        told["ids"] = local_ids(folder)
        told["starts"] = [None if pid is None else processes.start_of(int(pid)) for pid in told["ids"]]
    elif batch["job_name"] in answer.named:
        told["ids"] = _ids_of(folder, answer.named[batch["job_name"]])
        cluster = answer.found_on[batch["job_name"]]
        told |= {"clusters": [cluster.to_json()]} if cluster is not None else {}
    elif batch["job_name"] in answer.nowhere and batch["lost_answer"]:
        lost = json.loads(batch["lost_answer"])
        if age_s(batch["intent_at"]) < lost["late_s"]:
            return False  # what sbatch sent may still be on its way
        told |= {"refused": f"Slurm does not have this job: {lost['message']}", "remedy": RETRY}
    elif batch["job_name"] in answer.nowhere:
        told["never_queued"] = utc_now()
    else:
        return False  # Slurm did not answer: not known yet
    write_json(folder / "submitted.json", told, parents=False)
    return True


def _ids_of(folder: Path, seen: Sequence[str]) -> list[str]:
    """The ids of a batch's jobs in order, from those of some of them."""
    tasks = int(read_json(folder / "batch.json")["tasks"])
    parent = seen[0].split("_")[0]
    return [parent] if tasks == 1 else [f"{parent}_{task}" for task in range(tasks)]


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except (OSError, ValueError):
        return b""


def local_ids(folder: Path) -> list[str | None]:
    """The process ids of a batch's local jobs, in order; None for one that was not started. submitit names each job's pickle
    after its process, and the pickle holds the path of the job's JSON."""
    tasks = int(read_json(folder / "batch.json")["tasks"])
    found: dict[int, str] = {}
    for pickle in (folder / "submitit").glob("*_submitted.pkl"):
        named = re.search(rb"/(\d+)\.json", _content(pickle))
        if named is not None:
            found[int(named[1])] = pickle.name.partition("_")[0]
    return [found.get(task) for task in range(tasks)]
