"""Files -> store. What is in the index already is skipped, so collecting twice is collecting once.

A workspace may have tens of thousands of files: a look at them is a listing of each folder and a stat of each file, and the
rows of many records go into the database at once.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from labctl_orchestrator.store import documents
from labctl_orchestrator.store.database import BUSY_FOR_S, RowMissingError, Store, cannot_be_written
from labctl_orchestrator.store.record_rows import DEVICE_COLUMNS, RESULT_COLUMNS, SAMPLE_COLUMNS, Rows, repeat_columns
from labctl_orchestrator.store.scan import (
    File,
    Folders,
    Kind,
    Scope,
    changed_files,
    known_below,
    known_files,
    known_of,
    order,
    origin_of,
    record_at,
)
from labctl_orchestrator.store.take_files import TAKE, labelled
from labctl_orchestrator.store.views import HERE
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import LabctlError
from labctl_workers.record import (
    read_bytes,
)


@dataclass
class Collected:
    """How many new records were taken in, and which files could not be read: each with the reason."""

    records: int = 0
    damaged: list[str] = field(default_factory=list)


def rebuild(workspace: Workspace) -> Collected:
    """Make the database again from the files, and put it in the old one's place when it is whole. Raises LabctlError where the
    workspace cannot be written to."""
    if not workspace.writable:
        raise LabctlError(workspace.hindrance, "its owner can make the database again, where it has room and locks")
    fresh = workspace.database.with_suffix(f".rebuild-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    try:
        store = Store(fresh)
        try:
            collected = collect(workspace, store)
        finally:
            store.close()
        _replace(workspace.database, fresh)
    finally:
        fresh.unlink(missing_ok=True)
    return collected


def _replace(database: Path, fresh: Path) -> None:
    """Put the new database in the old one's place, with no one writing, and no journal left that would be played back."""
    old = sqlite3.connect(database, timeout=BUSY_FOR_S, isolation_level=None)
    try:
        try:
            old.execute("BEGIN EXCLUSIVE")
        except sqlite3.DatabaseError as error:
            # Any other error may be what has to be mended.
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                raise LabctlError(f"{database}: another process writes it", "try again when it is done") from None
        Path(f"{database}-journal").unlink(missing_ok=True)
        fresh.replace(database)
    finally:
        old.close()


def collect(
    workspace: Workspace,
    store: Store,
    *,
    arrays: Collection[str] | None = None,
    runs: Collection[str] | None = None,
) -> Collected:
    """Take in every file that is new or was changed, and take out the records that are damaged or gone, in one transaction.

    With `arrays` or `runs`, only the files of these arrays and the records of these runs are looked at.
    """
    scope = None if arrays is None and runs is None else Scope(arrays or (), runs or ())
    return _collected(workspace, store, scope)


def collect_new(workspace: Workspace, store: Store) -> Collected:
    """Take in the requests and arrays that the index does not have: two listings, whatever the size of the workspace."""
    scope = Scope(_new_arrays(workspace, store), (), submissions=True)
    return _collected(workspace, store, scope)


def _new_arrays(workspace: Workspace, store: Store) -> list[str]:
    known = {array_id for (array_id,) in store.tuples("SELECT array_id FROM arrays")}
    try:
        return [name for name in os.listdir(workspace.arrays) if name not in known]  # noqa: PTH208  a Path each is slow
    except OSError:
        return []


JOB_IDS_OF_RUNS = "SELECT job_id FROM job_runs WHERE run_id IN (SELECT value FROM json_each(?))"
# To list the folders of more runs takes longer than to look whether any folder changed.
RUNS_LOOKED_AT_APART = 5000


def looked_at_apart(run_ids: Sequence[str]) -> bool:
    return len(run_ids) <= RUNS_LOOKED_AT_APART and not any("@" in run_id for run_id in run_ids)


def collect_of(workspace: Workspace, store: Store, run_ids: Sequence[str]) -> Collected:
    """Take in what is new of these runs, their jobs and arrays, and every request and array that the index does not have."""
    if not looked_at_apart(run_ids):
        return collect(workspace, store)
    new = collect_new(workspace, store)
    found = collect(workspace, store, arrays=arrays_of(store, run_ids), runs=run_ids)
    found.damaged += [damaged for damaged in new.damaged if damaged not in found.damaged]
    return found


def arrays_of(store: Store, run_ids: Sequence[str]) -> set[str]:
    sql = f"SELECT DISTINCT array_id FROM jobs WHERE job_id IN ({JOB_IDS_OF_RUNS})"
    return {array_id for (array_id,) in store.tuples(sql, (json.dumps(run_ids),))}


def _collected(workspace: Workspace, store: Store, scope: Scope | None) -> Collected:
    try:
        with _no_garbage_collection():
            return _collect(workspace, store, scope)
    except sqlite3.OperationalError as error:
        if not cannot_be_written(error) or not workspace.writable or store.path != workspace.index:
            raise
        workspace.hinder(str(error))
        store.move(workspace.database)
        with _no_garbage_collection():
            return _collect(workspace, store, scope)


def _collect(workspace: Workspace, store: Store, scope: Scope | None) -> Collected:
    collected = Collected()
    folders = Folders.of(store) if scope is None else None
    new, gone = changed_files(workspace, scope, known_files(store, scope), folders, collected.damaged)
    if not (new or gone):
        if folders is not None:
            folders.settle(store)
        return collected
    with store.writing():
        # Another labctl may have read them since.
        known = known_of(store, [*(file.name for file in new), *gone])
        new = [file for file in new if known.get(file.name) != (file.mtime_ns, file.size)]
        gone = [name for name in gone if name in known and not (workspace.data / name).exists()]
        _take_in(workspace, store, new, gone, known, collected)
    if any(name.startswith("imports/") for name in gone):
        return collect(workspace, store)
    return collected


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Files and records make millions of objects and no cycles: looking through them for some takes longer than all the rest."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _take_in(
    workspace: Workspace,
    store: Store,
    new: Sequence[File],
    gone: Sequence[str],
    known: Collection[str],
    collected: Collected,
) -> None:
    origins = _forget_origins(store, gone)
    new = [file for file in new if origin_of(file.name) not in origins]  # with all that is left of them, later
    others = [file for file in new if file.kind is not Kind.RECORD]
    store.put_values("files", FILE_COLUMNS, [_row_of(file) for file in others if _take(store, file, collected)])
    records = [file for file in new if file.kind is Kind.RECORD]
    changed = [*gone, *(file.name for file in records if file.name in known)]
    records += [file for name in _forget_records(store, changed) if (file := record_at(workspace, name))]
    _take_records(store, sorted(records, key=order), collected)
    if changed:
        store.remove("texts", "text_id NOT IN (SELECT text_id FROM samples)")


# What a file may make of its reader that is not as labctl writes it; a full disk or a locked database is not among them.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    sqlite3.IntegrityError,
    sqlite3.ProgrammingError,
)
FILE_COLUMNS = ("path", "mtime_ns", "size")


def _row_of(file: File) -> tuple[str, int, int]:
    return (file.name, file.mtime_ns, file.size)


def _take(store: Store, file: File, collected: Collected) -> bool:
    """Whether the file is in the index now."""
    try:
        text = read_bytes(file.path)
        with store.attempt():  # of a damaged file nothing is taken
            TAKE[file.kind](store, file, text)
    except (FileNotFoundError, RowMissingError):
        return False  # gone since the folder was listed; or its turn comes when the file that it adds to can be read
    except (*DAMAGE, OSError) as error:
        _note_damage(file, error, collected)
        return False
    return True


def _note_damage(file: File, error: Exception, collected: Collected) -> None:
    why = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    if isinstance(error, documents.NewerError):
        collected.damaged.append(f"{file.path}: {why}")
    else:
        collected.damaged.append(f"{file.path}: {type(error).__name__}: {why}")


# ---------------------------------------------------------------- records, many at once

FILES_AT_ONCE = 250
BYTES_AT_ONCE = 64 * 2**20


def _at_once(records: Sequence[File]) -> Iterator[list[File]]:
    """The records in groups that fit in memory; one that is larger than a group is alone."""
    group: list[File] = []
    size = 0
    for file in records:
        if group and (len(group) == FILES_AT_ONCE or size + file.size > BYTES_AT_ONCE):
            yield group
            group, size = [], 0
        group.append(file)
        size += file.size
    if group:
        yield group


def _take_records(store: Store, records: Sequence[File], collected: Collected) -> None:
    for group in _at_once(records):
        taken = _take_together(store, group, collected)
        store.put_values("files", FILE_COLUMNS, [_row_of(file) for file in taken])
        collected.records += len(taken)


def _take_together(store: Store, records: Sequence[File], collected: Collected) -> list[File]:
    """Put the rows of these records in; returns those that are in. Of a damaged one nothing is."""
    read = [(file, rows) for file in records if (rows := _read(store, file, collected))]
    try:
        _put_records(store, [rows for _, rows in read])
    except DAMAGE:  # one of them holds what the database cannot: by themselves, it is the only one left out
        return [file for file, rows in read if _put_one(store, file, rows, collected)]
    return [file for file, _ in read]


def _read(store: Store, file: File, collected: Collected) -> Rows | None:
    try:
        result = labelled(documents.record(read_bytes(file.path)), origin_of(file.name))
        return Rows.of(file.name, result)
    except FileNotFoundError:
        return None
    except (*DAMAGE, OSError) as error:
        _note_damage(file, error, collected)
        return None


def _put_one(store: Store, file: File, rows: Rows, collected: Collected) -> bool:
    try:
        _put_records(store, [rows])
    except DAMAGE as error:
        _note_damage(file, error, collected)
        return False
    return True


def _put_records(store: Store, read: Sequence[Rows]) -> None:
    with store.attempt():
        store.put_values("results", RESULT_COLUMNS, [rows.result for rows in read])
        store.put_values("repeats", repeat_columns(), [row for rows in read for row in rows.repeats])
        store.put_values("devices", DEVICE_COLUMNS, [row for rows in read for row in rows.devices])
        store.put_values("samples", SAMPLE_COLUMNS, [row for rows in read for row in rows.samples])
        store.add_values("texts", ("text_id", "text"), {text for rows in read for text in rows.texts.items()})


def _forget_records(store: Store, names: Sequence[str]) -> list[str]:
    """Take out what was read from these records: what is in the index is in the files. Returns the other records of their
    runs, which are to be read again: a copy of one that is gone may be among them."""
    others: set[str] = set()
    for name in names:
        for key in store.tuples("SELECT run_id, attempt_id FROM results WHERE path = ?", (name,)):
            for table in OF_A_RESULT:
                store.remove(table, "run_id = ? AND attempt_id = ?", key)
        store.remove("files", "path = ?", (name,))
        store.remove("folders", "path = ?", (name.split("/")[1],))  # it has a file that is not in the index
        others.update(known_below(store, [name.rpartition("/")[0]]))
    return sorted(others - set(names))


OF_A_RESULT = ("samples", "devices", "repeats", "results")


# ---------------------------------------------------------------- which files


# ---------------------------------------------------------------- what is taken from each


# ---------------------------------------------------------------- what was imported
#
# A bundle's jobs have no array here, and no id in this site's Slurm: nothing asks what became of them. Every id of an origin has
# its label, so that the same run of two people is two.


def _forget_origins(store: Store, gone: Sequence[str]) -> set[str]:
    """Take out all of each origin that files are gone of: what is left of it is read again. Returns these origins."""
    origins = {origin_of(name) for name in gone} - {HERE}
    for origin in origins:
        for table, key in OF_AN_ORIGIN.items():
            store.remove(table, f"substr({key}, instr({key}, '@') + 1) = ? AND instr({key}, '@') > 0", (origin,))
        store.remove("bundles", "origin = ?", (origin,))
        store.remove("files", "path > ? AND path < ?", (f"imports/{origin}/", f"imports/{origin}0"))  # 0 follows /
    return origins


OF_AN_ORIGIN = {
    "samples": "run_id", "devices": "run_id", "repeats": "run_id", "results": "run_id", "runs": "run_id", "jobs": "job_id",
    "executions": "job_id",
}  # fmt: skip
