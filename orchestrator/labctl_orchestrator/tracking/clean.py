"""Files of a workspace that can be deleted without losing a submission or a record, and the disk space of all files."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from labctl_orchestrator.store import job_rows
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.select_runs import runs_by_submission
from labctl_orchestrator.store.worker_code import code_name
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking import run_status, status, times
from labctl_orchestrator.tracking.run_status import RunStatus

# A live writer renames its temporary file within seconds; a submission writes its intent seconds after its code.
LEFT_BEHIND_AFTER_S = 3600.0
BYTES_PER_BLOCK = 512  # the unit of st_blocks


LOGS_AND_SCRIPTS, HEARTBEATS, CODE = "logs, pickles and scripts", "heartbeats", "worker's code"
CACHE, LEFT_BEHIND = "compiled by engines", "left by writers that were killed"
# labctl has not submitted it; the user may have, with an unknown Slurm id.
ONLY_RENDERED = "array_id = ? AND intent_at IS NULL AND submitted_at IS NULL"


@dataclass(frozen=True)
class Rubbish:
    """A file or folder that can be deleted."""

    path: Path
    kind: str
    bytes: int


# ---------------------------------------------------------------- clean


def removable(
    workspace: Workspace, store: Store, run_ids: Collection[str], *, failed: bool = False, cache: bool = False
) -> list[Rubbish]:
    """Files that can be deleted. Call `refresh` before.

    - Logs, pickles, scripts and heartbeats of ended job arrays, if all their runs are in `run_ids` and done (`failed`: or ended).
      An array stays for ten minutes after its end, in which Slurm can requeue its jobs.
    - Temporary files of killed writers.
    - If no job of the workspace can run: copies of the worker's code, and with `cache` the engines' compiled code."""
    found = status.statuses(workspace, store, [row["run_id"] for row in store.rows("SELECT run_id FROM runs")])
    by_run = {run.run_id: run for run in found}
    paths: list[tuple[Path, str]] = []
    may_run = any(run.may_come for run in found)
    for array_id, runs in _arrays(store).items():
        ended = _has_ended(store, array_id)
        done = _is_finished([by_run[run] for run in runs], failed=False)
        may_run |= not (ended or (done and job_rows.arrays(store, ONLY_RENDERED, (array_id,))))
        if ended and set(runs) <= set(run_ids) and _is_finished([by_run[run] for run in runs], failed):
            folder = workspace.arrays / array_id
            paths += [(folder / "submitit", LOGS_AND_SCRIPTS), (folder / "heartbeats", HEARTBEATS)]
    going = {path for path, _ in paths}
    paths += [(path, LEFT_BEHIND) for path in _left_behind(workspace) if path.parent not in going]
    if not may_run:
        copies = workspace.code.iterdir() if workspace.code.is_dir() else ()
        paths += [(path, CODE) for path in copies if path.name != code_name() and _is_old(path)]
        if cache and not workspace.cache.is_symlink():  # a link may lead anywhere
            paths.append((workspace.cache, CACHE))
    return [Rubbish(path, kind, size_of(path)) for path, kind in paths if path.exists()]


def _arrays(store: Store) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in store.rows("SELECT array_id, run_id FROM job_runs JOIN jobs USING (job_id)"):
        found.setdefault(row["array_id"], []).append(row["run_id"])
    return found


def _is_finished(runs: Sequence[RunStatus], failed: bool) -> bool:
    return all(run.state == run_status.DONE or (failed and not run.may_come) for run in runs)


def _has_ended(store: Store, array_id: str) -> bool:
    """Whether no job of the array can write: each was refused, never queued, lost for a day, or ended and cannot be requeued."""
    return all(
        job.refused
        or job.never_queued
        or (job.has_ended and (job.is_local or not times.ended_lately(job)))
        or times.is_forgotten(job)
        for job in job_rows.jobs(store, "array_id = ?", (array_id,))
    )


TEMPORARY = re.compile(r"\..+\.json\.[a-z0-9_]{8}|labctl-\d+\.rebuild-\d+(-journal)?|import-[a-z0-9_]{8}\.partial")


def _left_behind(workspace: Workspace) -> Iterator[Path]:
    """Temporary files of `record.write_json`, `collect.rebuild` and imports that were killed before they renamed them."""
    for folder in (workspace.submissions, workspace.arrays, workspace.results):
        yield from (path for path in _files(folder) if TEMPORARY.fullmatch(path.name) and _is_old(path))
    yield from (path for path in workspace.data.iterdir() if TEMPORARY.fullmatch(path.name) and _is_old(path))


def _is_old(path: Path) -> bool:
    try:
        return path.stat().st_mtime < time.time() - LEFT_BEHIND_AFTER_S
    except FileNotFoundError:
        return False


def remove(rubbish: Sequence[Rubbish]) -> None:
    """Delete the files; ignores missing ones. Raises OSError at the first that cannot be deleted."""
    for item in rubbish:
        if item.path.is_dir() and not item.path.is_symlink():
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(item.path)
        else:
            item.path.unlink(missing_ok=True)


# ---------------------------------------------------------------- du


def sizes(workspace: Workspace, store: Store) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes on disk of all files, by kind and by submission id ("" for an array without one), the largest first. A run's records
    count for its first submission."""
    of_array = {row["array_id"]: row["submission_id"] or "" for row in store.rows("SELECT * FROM arrays")}
    newest_first = reversed(runs_by_submission(store).items())
    of_run = {run_id: submission_id for submission_id, runs in newest_first for run_id in runs}
    kinds: Counter[str] = Counter()
    submissions: Counter[str] = Counter()
    for path in _files(workspace.data):
        parts = path.relative_to(workspace.data).parts
        size = _on_disk(path)
        kinds[_kind(parts)] += size
        if parts[0] in {"arrays", "results"} and len(parts) > 1:
            owners = of_array if parts[0] == "arrays" else of_run
            submissions[owners.get(parts[1], "")] += size
        elif parts[0] == "submissions":
            submissions[Path(parts[-1]).stem] += size
    return dict(kinds.most_common()), dict(submissions.most_common())


KINDS = {
    "results": "records", "submissions": "submissions", "code": CODE, "cache": CACHE, "heartbeats": HEARTBEATS,
    "attempts": "attempts", "imports": "imported",
}  # fmt: skip


def _kind(parts: Sequence[str]) -> str:
    if TEMPORARY.fullmatch(parts[-1]):
        return LEFT_BEHIND
    if parts[0] != "arrays":
        return KINDS.get(parts[0], "database" if parts[0].startswith("labctl-") else "other")
    folder = parts[2] if len(parts) > 3 else ""
    if folder == "submitit":
        return "logs" if Path(parts[-1]).suffix in {".out", ".err"} else "scripts and pickles"
    return KINDS.get(folder, "jobs")


def size_of(path: Path) -> int:
    """Bytes on disk of a file, or of all files below a folder."""
    return sum(_on_disk(file) for file in _files(path)) if path.is_dir() else _on_disk(path)


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent) / name for name in names)


def _on_disk(path: Path) -> int:
    try:
        return path.lstat().st_blocks * BYTES_PER_BLOCK
    except OSError:
        return 0
