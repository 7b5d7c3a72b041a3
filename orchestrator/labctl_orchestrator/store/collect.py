"""Read new and changed files of a workspace into the database. Collecting twice has the effect of collecting once.

A workspace may have a hundred thousand files. So labctl lists changed folders alone (see `scan.Folders`), and inserts the rows of
many records at once.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from labctl_orchestrator.store import documents, scan
from labctl_orchestrator.store.connection import Connection
from labctl_orchestrator.store.database import BUSY_FOR_S, RowMissingError, Store, cannot_be_written, is_special
from labctl_orchestrator.store.record_rows import Rows
from labctl_orchestrator.store.take_files import TAKE, labelled
from labctl_orchestrator.store.views import HERE
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import LabctlError
from labctl_workers.record import RunResult, read_bytes

RESULT_TABLES = ("samples", "documents", "questions", "devices", "repeats", "results")
# Tables with rows of imported runs, and the column that ends in "@" and the origin.
ORIGIN_KEYS = {**dict.fromkeys((*RESULT_TABLES, "runs"), "run_id"), "jobs": "job_id", "job_starts": "job_id"}
# Errors that a damaged file causes. A full disk or a locked database raises others.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    sqlite3.IntegrityError,
    sqlite3.ProgrammingError,
)
# Records inserted at once: at most so many files and bytes.
FILES_AT_ONCE = 250
BYTES_AT_ONCE = 64 * 2**20
JOB_IDS_OF_RUNS = "SELECT job_id FROM job_runs WHERE run_id IN (SELECT value FROM json_each(?))"
# For more runs, a scan of the whole workspace is faster than listing the folder of each run.
MOST_RUNS_APART = 5000


@dataclass
class Collected:
    """The number of new records, and a message for each unreadable file: path and reason."""

    records: int = 0
    damaged: list[str] = field(default_factory=list)


def rebuild(workspace: Workspace) -> Collected:
    """Build the database again from the files; the new one replaces the old one when it is complete. Raises LabctlError if the
    workspace is not writable."""
    if not workspace.writable:
        raise LabctlError(workspace.read_only_reason, workspace.read_only_remedy)
    fresh = workspace.database.with_suffix(f".rebuild-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    try:
        with contextlib.closing(Store(fresh)) as store:
            collected = collect(workspace, store)
        _replace(workspace.database, fresh)
    finally:
        fresh.unlink(missing_ok=True)
    return collected


def _replace(database: Path, fresh: Path) -> None:
    """Replace the database while no other process writes it, and remove its journal, which SQLite would replay."""
    journal = Path(f"{database}-journal")
    for file in (database, journal):
        if is_special(file):
            file.unlink()
    with contextlib.closing(sqlite3.connect(database, BUSY_FOR_S, isolation_level=None, factory=Connection)) as old:
        try:
            old.execute("BEGIN EXCLUSIVE")
        except sqlite3.DatabaseError as error:
            # Other errors are damage, which the new database repairs.
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                raise LabctlError(
                    f"another process is writing to the database: {database}", "try again when it has finished"
                ) from None
        journal.unlink(missing_ok=True)
        fresh.replace(database)


def collect(
    workspace: Workspace,
    store: Store,
    *,
    arrays: Collection[str] | None = None,
    runs: Collection[str] | None = None,
    every_file: bool = True,
) -> Collected:
    """Read every new or changed file, and delete the rows of missing or damaged records, in one transaction.

    With `arrays` or `runs`, read only the files of these arrays and the records of these runs. Without `every_file`, skip folders
    whose modification time shows no change: this finds what labctl and its workers write, not what a person changed in place.
    """
    if arrays is None and runs is None:
        return _collect(workspace, store, lambda: scan.Folders.of(store, every_file=every_file))
    return _collect(workspace, store, lambda: scan.Scope(arrays or (), runs or ()))


def collect_new(workspace: Workspace, store: Store) -> Collected:
    """Read submissions and arrays that are not in the database yet. This lists two folders, whatever the workspace's size."""
    known = {array_id for (array_id,) in store.tuples("SELECT array_id FROM arrays")}
    new: list[str] = []
    with contextlib.suppress(OSError):
        new = [name for name in os.listdir(workspace.arrays) if name not in known]  # noqa: PTH208  a Path each is slow
    return _collect(workspace, store, lambda: scan.Scope(new, (), submissions=True))


def can_collect_apart(run_ids: Sequence[str]) -> bool:
    """Whether `collect_runs` reads less than the whole workspace for these runs."""
    return len(run_ids) <= MOST_RUNS_APART and not any("@" in run_id for run_id in run_ids)


def collect_runs(workspace: Workspace, store: Store, run_ids: Sequence[str]) -> Collected:
    """Read new files of these runs, their jobs and arrays, and all new submissions and arrays."""
    if not can_collect_apart(run_ids):
        return collect(workspace, store, every_file=False)
    new = collect_new(workspace, store)
    found = collect(workspace, store, arrays=arrays_of(store, run_ids), runs=run_ids)
    found.damaged += [damaged for damaged in new.damaged if damaged not in found.damaged]
    return found


def arrays_of(store: Store, run_ids: Sequence[str]) -> set[str]:
    """The arrays with jobs of these runs."""
    sql = f"SELECT DISTINCT array_id FROM jobs WHERE job_id IN ({JOB_IDS_OF_RUNS})"
    return {array_id for (array_id,) in store.tuples(sql, (json.dumps(run_ids),))}


def _collect(workspace: Workspace, store: Store, where: Callable[[], scan.Scope | scan.Folders]) -> Collected:
    """Collect; if the workspace turns out to be full or read-only, go on in a private copy of the database."""
    with _no_garbage_collection():
        try:
            return _collect_once(workspace, store, where())
        except sqlite3.OperationalError as error:
            if not cannot_be_written(error) or not workspace.writable or store.path != workspace.index:
                raise
            workspace.make_read_only(str(error))
            store.move(workspace.database)
            return _collect_once(workspace, store, where())


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Records make millions of objects and no cycles: searching them for cycles would take longer than everything else."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _collect_once(workspace: Workspace, store: Store, where: scan.Scope | scan.Folders) -> Collected:
    collected = Collected()
    new, gone = scan.changed_files(workspace, store, where, collected.damaged)
    folders = where if isinstance(where, scan.Folders) else None
    if not (new or gone):
        if folders is not None:
            folders.save(store)
        return collected
    with store.writing():
        # Another labctl may have read some of them meanwhile.
        known = scan.known_of(store, [*(file.name for file in new), *gone])
        new = [file for file in new if known.get(file.name) != (file.mtime_ns, file.size)]
        gone = [name for name in gone if name in known and not (workspace.data / name).exists()]
        left = _apply(workspace, store, new, gone, known, collected)
        if folders is not None:
            folders.incomplete.update(map(scan.folder_of, left))
            store.put_values("folders", folders.indexed())
    if any(name.startswith("imports/") for name in gone):
        return collect(workspace, store)
    return collected


def _apply(
    workspace: Workspace,
    store: Store,
    new: Sequence[scan.File],
    gone: Sequence[str],
    known: Collection[str],
    collected: Collected,
) -> set[str]:
    """Update the rows of these files. Returns the names of files that have no rows: damaged ones, and those to read later."""
    origins = _forget_origins(store, gone)
    # The next pass reads the files of these origins.
    read = [file for file in new if scan.origin_of(file.name) not in origins]
    left = {file.name for file in new}
    others = [file for file in read if file.kind is not scan.Kind.RECORD and _take(store, file, collected)]
    _index(store, others)
    left.difference_update(file.name for file in others)
    records = [file for file in read if file.kind is scan.Kind.RECORD]
    changed = [*gone, *(file.name for file in records if file.name in known)]
    records += [file for name in _forget_records(store, changed) if (file := scan.record_at(workspace, name))]
    for group in _groups(sorted(records, key=scan.order)):
        taken = _take_records(store, group, collected)
        _index(store, taken)
        left.difference_update(file.name for file in taken)
        collected.records += len(taken)
    if changed:
        store.remove("texts", "text_id NOT IN (SELECT text_id FROM samples)")
    return left


def _index(store: Store, files: Sequence[scan.File]) -> None:
    store.put_values("files", [(file.name, file.mtime_ns, file.size) for file in files])
    store.put_values("folders", {(scan.folder_of(file.name), scan.TO_LIST) for file in files})


@contextlib.contextmanager
def _skip_damaged(file: scan.File, collected: Collected) -> Iterator[None]:
    """Suppress the errors of a damaged file, and note them."""
    try:
        yield
    except (FileNotFoundError, RowMissingError):
        pass  # removed meanwhile; or read later, when the file that it adds to is readable
    except (*DAMAGE, OSError) as error:
        why = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        kind = "" if isinstance(error, documents.NewerError) else f"{type(error).__name__}: "
        collected.damaged.append(f"{file.path}: {kind}{why}")


def _take(store: Store, file: scan.File, collected: Collected) -> bool:
    """Insert the rows of a file other than a record; returns whether it was readable."""
    with _skip_damaged(file, collected):
        text = read_bytes(file.path)
        with store.attempt():  # a damaged file leaves no rows
            TAKE[file.kind](store, file, text)
        return True
    return False


# ---------------------------------------------------------------- records


def _groups(records: Sequence[scan.File]) -> Iterator[list[scan.File]]:
    """The records in groups within FILES_AT_ONCE and BYTES_AT_ONCE; a larger record is a group of its own."""
    group: list[scan.File] = []
    size = 0
    for file in records:
        if group and (len(group) == FILES_AT_ONCE or size + file.size > BYTES_AT_ONCE):
            yield group
            group, size = [], 0
        group.append(file)
        size += file.size
    if group:
        yield group


def _take_records(store: Store, records: Sequence[scan.File], collected: Collected) -> list[scan.File]:
    """Insert the rows of these records; returns the readable ones. A damaged record leaves no rows."""
    read = [(file, rows) for file in records if (rows := _read(file, collected))]
    try:
        _put_records(store, [rows for _, rows in read])
    except DAMAGE:  # SQLite cannot store a value of one record: insert one by one to find it
        return [file for file, rows in read if _put_one(store, file, rows, collected)]
    return [file for file, _ in read]


def _read(file: scan.File, collected: Collected) -> Rows | None:
    with _skip_damaged(file, collected):
        return Rows.of(file.name, labelled(documents.read(read_bytes(file.path), RunResult), scan.origin_of(file.name)))
    return None


def _put_one(store: Store, file: scan.File, rows: Rows, collected: Collected) -> bool:
    with _skip_damaged(file, collected):
        _put_records(store, [rows])
        return True
    return False


def _put_records(store: Store, read: Sequence[Rows]) -> None:
    with store.attempt():
        store.put_values("results", [rows.result for rows in read])
        store.put_values("repeats", [row for rows in read for row in rows.repeats])
        store.put_values("devices", [row for rows in read for row in rows.devices])
        store.put_values("samples", [row for rows in read for row in rows.samples])
        store.put_values("documents", [row for rows in read for row in rows.documents])
        store.put_values("questions", [row for rows in read for row in rows.questions])
        store.add_values("texts", {text for rows in read for text in rows.texts.items()})


def _forget_records(store: Store, names: Sequence[str]) -> list[str]:
    """Delete the rows of these records. Returns the other records of their runs, which must be read again: one of them may be a
    copy of a deleted record."""
    others: set[str] = set()
    for name in names:
        for key in store.tuples("SELECT run_id, attempt_id FROM results WHERE path = ?", (name,)):
            for table in RESULT_TABLES:
                store.remove(table, "run_id = ? AND attempt_id = ?", key)
        store.remove("files", "path = ?", (name,))
        folder = scan.folder_of(name)
        if beside := scan.known_below(store, [folder]):
            store.put_values("folders", [(folder, scan.TO_LIST)])
            others.update(beside)
        else:
            store.remove("folders", "path = ?", (folder,))
    return sorted(others - set(names))


def _forget_origins(store: Store, gone: Sequence[str]) -> set[str]:
    """Delete all rows of imported origins that lost files; the next pass reads their remaining files. Returns these origins."""
    origins = {scan.origin_of(name) for name in gone} - {HERE}
    for origin in origins:
        for table, key in ORIGIN_KEYS.items():
            store.remove(table, f"substr({key}, instr({key}, '@') + 1) = ? AND instr({key}, '@') > 0", (origin,))
        store.remove("bundles", "origin = ?", (origin,))
        for table in ("files", "folders"):
            store.remove(table, "path > ? AND path < ?", (f"imports/{origin}/", f"imports/{origin}0"))  # 0 follows /
    return origins
