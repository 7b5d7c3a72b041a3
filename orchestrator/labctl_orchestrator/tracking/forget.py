"""Remove runs from a workspace: their records, and their places in submissions and jobs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labctl_orchestrator.store import documents
from labctl_orchestrator.store.collect import rebuild
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.select_runs import runs_by_submission
from labctl_orchestrator.store.workspace import Workspace, document_at
from labctl_orchestrator.tracking import status
from labctl_orchestrator.tracking.clean import size_of
from labctl_slurm.errors import WrongUseError
from labctl_workers.record import JobSpec, write_json


@dataclass(frozen=True)
class Removal:
    """What goes with the runs: folders of records, folders of job arrays and files of submissions without another run; and the
    job specs and submissions that lose these runs only. `bytes` is the size on disk of what is deleted."""

    run_ids: list[str]
    records: int
    result_folders: list[Path]
    array_folders: list[Path]
    submissions: list[Path]
    changed: list[Path]
    bytes: int


def planned(workspace: Workspace, store: Store, run_ids: Sequence[str]) -> Removal:
    """The removal of these runs. Call `refresh` before. Raises WrongUseError for imported runs and for unfinished ones."""
    if imported := [run_id for run_id in run_ids if "@" in run_id]:
        origin = imported[0].partition("@")[2]
        raise WrongUseError(
            f"not a run of this workspace: {imported[0]}",
            f"remove the folder {workspace.imports / origin} to drop all runs of {origin}",
        )
    found = status.statuses(workspace, store, run_ids)
    if (first := next((run for run in found if run.may_come or run.jobs_to_come), None)) is not None:
        job = f" as job {first.slurm_id}" if first.slurm_id else ""
        raise WrongUseError(
            f"cannot forget a run that is {first.state}{job}: {first.run_id}",
            f"labctl cancel {first.run_id}, then repeat the command",
        )
    gone = set(run_ids)
    results = [workspace.results / run_id for run_id in run_ids if (workspace.results / run_id).is_dir()]
    jobs_of: dict[str, dict[str, set[str]]] = {}  # the jobs of each array that has one of the runs, and their runs
    for array_id, job_id, run_id in store.tuples(
        "SELECT array_id, job_id, run_id FROM job_runs JOIN jobs USING (job_id) WHERE array_id IN (SELECT array_id FROM"
        " job_runs JOIN jobs USING (job_id) WHERE run_id IN (SELECT value FROM json_each(?)))",
        [json.dumps(sorted(gone))],
    ):
        jobs_of.setdefault(array_id, {}).setdefault(job_id, set()).add(run_id)
    arrays, kept = _split({array_id: set().union(*jobs.values()) for array_id, jobs in jobs_of.items()}, gone)
    of_submissions = {one: set(runs) for one, runs in runs_by_submission(store).items() if not gone.isdisjoint(runs)}
    empty, shared = _split(of_submissions, gone)
    jobs = [job_id for array_id in kept for job_id, runs in jobs_of[array_id].items() if not gone.isdisjoint(runs)]
    array_folders = [workspace.arrays / array_id for array_id in arrays]
    submissions = [workspace.submissions / f"{submission_id}.json" for submission_id in empty]
    return Removal(
        list(run_ids),
        sum(len(list(folder.glob("*.json"))) for folder in results),
        results,
        array_folders,
        submissions,
        [*map(workspace.spec, jobs), *(workspace.submissions / f"{submission_id}.json" for submission_id in shared)],
        sum(map(size_of, [*results, *array_folders, *submissions])),
    )


def _split(owners: dict[str, set[str]], gone: set[str]) -> tuple[list[str], list[str]]:
    """(owners that have no other run, owners that keep some)."""
    kept = [name for name, runs in owners.items() if not runs <= gone]
    return [name for name in owners if name not in kept], kept


def remove(workspace: Workspace, removal: Removal) -> None:
    """Delete and change the files, then rebuild the database. Call it within `workspace.lock`. Raises OSError; repeating the
    command then removes the rest."""
    gone = set(removal.run_ids)
    for folder in removal.result_folders:
        shutil.rmtree(folder)
    for path in removal.changed:
        kind: Any = documents.Submission if path.parent == workspace.submissions else JobSpec
        if documents.read_at(path, kind) is not None:  # other commands name a damaged one
            write_json(path, _without(document_at(path), gone))
    for folder in removal.array_folders:
        shutil.rmtree(folder)
    for path in removal.submissions:
        path.unlink(missing_ok=True)
    rebuild(workspace)


def _without(document: dict[str, Any], gone: Collection[str]) -> dict[str, Any]:
    """A submission or a job spec without these runs. A submission lists run ids and holds its jobs; a job holds its runs."""
    changed = dict(document)
    for key in ("runs", "skipped"):
        if key in changed:
            changed[key] = [
                run for run in changed[key] if (run["run_id"] if isinstance(run, dict) else run) not in gone
            ]
    if "jobs" in changed:
        jobs = [_without(job, gone) for job in changed["jobs"]]
        changed["jobs"] = [job for job in jobs if job["runs"]]
    return changed
