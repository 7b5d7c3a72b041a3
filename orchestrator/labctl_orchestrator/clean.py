"""What a workspace may lose without losing anything that was asked or measured, and what takes its space."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from labctl_orchestrator import status
from labctl_orchestrator.launch import code_name
from labctl_orchestrator.status import RunStatus
from labctl_orchestrator.store import Store
from labctl_orchestrator.workspace import Workspace
from labctl_slurm import queue

# A writer that is alive replaces its temporary file within seconds.
LEFT_BEHIND_AFTER_S = 3600.0
BYTES_A_BLOCK = 512  # st_blocks counts in these, whatever the file system's own block is


@dataclass(frozen=True)
class Rubbish:
    """A file or folder that may go, and what it is."""

    path: Path
    kind: str
    bytes: int


# ---------------------------------------------------------------- clean


def removable(
    workspace: Workspace, store: Store, run_ids: Collection[str], *, failed: bool = False, cache: bool = False
) -> list[Rubbish]:
    """Logs, pickles, scripts and heartbeats of batches whose jobs have ended and whose runs, all among `run_ids`, are done
    (`failed`: or have ended otherwise); and, where no job of the workspace may run any more, copies of the worker's code,
    what killed writers left, and with `cache` what engines compiled. Call `status.refresh` before."""
    found = status.statuses(workspace, store, [row["run_id"] for row in store.rows("SELECT run_id FROM runs")])
    by_run = {run.run_id: run for run in found}
    paths: list[tuple[Path, str]] = []
    for batch_id, runs in _batches(store).items():
        if (
            set(runs) <= set(run_ids)
            and _is_finished([by_run[run] for run in runs], failed)
            and _has_ended(store, batch_id)
        ):
            folder = workspace.batches / batch_id
            paths += [(folder / "submitit", "logs, pickles and scripts"), (folder / "heartbeats", "heartbeats")]
    paths += [(path, "left by writers that were killed") for path in _left_behind(workspace)]
    if not any(run.may_come for run in found):
        paths += [(path, "worker's code") for path in _old_code(workspace)]
        if cache:
            paths.append((workspace.data / "cache", "compiled by engines"))
    return [Rubbish(path, kind, size) for path, kind in paths if path.exists() and (size := size_of(path)) is not None]


def _batches(store: Store) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in store.rows("SELECT batch_id, run_id FROM job_runs JOIN jobs USING (job_id)"):
        found.setdefault(row["batch_id"], []).append(row["run_id"])
    return found


def _is_finished(runs: Sequence[RunStatus], failed: bool) -> bool:
    return all(run.state == status.DONE or (failed and not run.may_come) for run in runs)


def _has_ended(store: Store, batch_id: str) -> bool:
    """Whether none of the batch's jobs may write any more: each has ended, was refused, never queued, or lost for a day."""
    jobs = store.rows(
        "SELECT state, slurm_id, gone_since, refused, never_queued FROM jobs JOIN batches USING (batch_id) WHERE batch_id = ?",
        (batch_id,),
    )
    return all(
        job["refused"] or job["never_queued"] or job["state"] in queue.ENDED or status.is_forgotten(job) for job in jobs
    )


def _old_code(workspace: Workspace) -> Iterator[Path]:
    if workspace.code.is_dir():
        yield from (path for path in workspace.code.iterdir() if path.name != code_name())


def _left_behind(workspace: Workspace) -> Iterator[Path]:
    limit = time.time() - LEFT_BEHIND_AFTER_S
    for pattern in (".*.json.*", "labctl.rebuild-*"):
        for path in workspace.data.rglob(pattern):
            if path.is_file() and path.stat().st_mtime < limit:
                yield path


def remove(rubbish: Sequence[Rubbish]) -> None:
    """Raises OSError for what cannot be removed; the rest of it stays then."""
    for item in rubbish:
        if item.path.is_dir():
            shutil.rmtree(item.path)
        else:
            item.path.unlink(missing_ok=True)


# ---------------------------------------------------------------- du


def sizes(workspace: Workspace) -> dict[str, int]:
    """Bytes on disk by kind, the largest first."""
    found: dict[str, int] = {}
    for path in _files(workspace.data):
        kind = _kind(path.relative_to(workspace.data).parts)
        found[kind] = found.get(kind, 0) + _on_disk(path)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


KINDS = {
    "results": "records", "requests": "requests", "code": "worker's code", "cache": "compiled by engines",
    "submitit": "logs, pickles and scripts", "heartbeats": "heartbeats", "attempts": "attempts",
}  # fmt: skip


def _kind(parts: Sequence[str]) -> str:
    if parts[0] == "batches":
        return KINDS.get(parts[2] if len(parts) > 3 else "", "jobs")
    return KINDS.get(parts[0], "database" if parts[0].startswith("labctl.") else "other")


def size_of(path: Path) -> int:
    """Bytes on disk of a file, or of all files below a folder."""
    return sum(_on_disk(file) for file in _files(path)) if path.is_dir() else _on_disk(path)


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent) / name for name in names)


def _on_disk(path: Path) -> int:
    try:
        return path.lstat().st_blocks * BYTES_A_BLOCK
    except OSError:
        return 0
