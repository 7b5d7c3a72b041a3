"""Files -> store. What is in the index already is skipped, so collecting twice is collecting once.

A workspace may have tens of thousands of files: a look at them is a listing of each folder and a stat of each file, and the
rows of many records go into the database at once.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec

from labctl_orchestrator.store import documents
from labctl_orchestrator.store.database import BUSY_FOR_S, RowMissingError, Store, cannot_be_written
from labctl_orchestrator.store.facts import facts_of
from labctl_orchestrator.store.views import HERE, metadata
from labctl_orchestrator.store.workspace import DATABASE_SCHEMA, Workspace
from labctl_slurm.errors import LabctlError
from labctl_workers import measure
from labctl_workers.record import (
    DeviceMemory,
    JobSpec,
    RunResult,
    Sample,
    Sampling,
    read_bytes,
    write_json,
)


@dataclass
class Collected:
    """How many new records were taken in, and which files could not be read: each with the reason."""

    records: int = 0
    damaged: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _File:
    path: Path
    name: str  # within the workspace: it may be moved
    mtime_ns: int
    size: int
    take: _Take


_Take = Callable[["Store", "_File", bytes], None]
_Known = dict[str, tuple[int, int]]  # name -> (mtime_ns, size), as they were when the file was read


def open_store(workspace: Workspace) -> Store:
    """The workspace's database. Raises LabctlError where the file is no database or cannot be written."""
    is_new = not workspace.index.exists()
    try:
        store = _opened(workspace)
    except sqlite3.DatabaseError as error:
        raise LabctlError(f"{workspace.database}: {error}", "labctl collect --rebuild makes it again") from None
    if (store.changed or not workspace.metadata.exists()) and workspace.writable:
        with contextlib.suppress(OSError):  # what it says is in `labctl query --describe` too
            write_json(workspace.metadata, metadata(), durable=False, parents=False)
    if is_new and workspace.writable:
        _remove_older(workspace)
    return store


def _opened(workspace: Workspace) -> Store:
    try:
        return Store(workspace.database)
    except sqlite3.OperationalError as error:
        if not cannot_be_written(error) or not workspace.writable:
            raise
        workspace.hinder(str(error))
        return Store(workspace.database)


def _remove_older(workspace: Workspace) -> None:
    """Remove the databases of earlier labctls; a later one's stays."""
    for path in workspace.data.glob("labctl-*.db"):
        number = path.stem.removeprefix("labctl-")
        if number.isdecimal() and int(number) < DATABASE_SCHEMA:
            path.unlink(missing_ok=True)


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
    batches: Collection[str] | None = None,
    runs: Collection[str] | None = None,
) -> Collected:
    """Take in every file that is new or was changed, and take out the records that are damaged or gone, in one transaction.

    With `batches` or `runs`, only the files of these batches and the records of these runs are looked at.
    """
    scope = None if batches is None and runs is None else _Scope(batches or (), runs or ())
    return _collected(workspace, store, scope)


def collect_new(workspace: Workspace, store: Store) -> Collected:
    """Take in the requests and batches that the index does not have: two listings, whatever the size of the workspace."""
    scope = _Scope(_new_batches(workspace, store), (), requests=True)
    return _collected(workspace, store, scope)


def _new_batches(workspace: Workspace, store: Store) -> list[str]:
    known = {batch_id for (batch_id,) in store.tuples("SELECT batch_id FROM batches")}
    try:
        return [name for name in os.listdir(workspace.batches) if name not in known]  # noqa: PTH208  a Path each is slow
    except OSError:
        return []


def _collected(workspace: Workspace, store: Store, scope: _Scope | None) -> Collected:
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


def _collect(workspace: Workspace, store: Store, scope: _Scope | None) -> Collected:
    collected = Collected()
    folders = _Folders.of(store) if scope is None else None
    new, gone = _look(workspace, scope, _known(store, scope), folders, collected.damaged)
    if not (new or gone):
        if folders is not None:
            folders.settle(store)
        return collected
    with store.writing():
        # Another labctl may have read them since.
        known = _known_of(store, [*(file.name for file in new), *gone])
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
    new: Sequence[_File],
    gone: Sequence[str],
    known: Collection[str],
    collected: Collected,
) -> None:
    origins = _forget_origins(store, gone)
    new = [file for file in new if _origin(file.name) not in origins]  # with all that is left of them, later
    others = [file for file in new if file.take is not _take_result]
    store.put_values("files", FILE_COLUMNS, [_row_of(file) for file in others if _take(store, file, collected)])
    records = [file for file in new if file.take is _take_result]
    changed = [*gone, *(file.name for file in records if file.name in known)]
    records += [file for name in _forget_records(store, changed) if (file := _record_at(workspace, name))]
    _take_records(store, sorted(records, key=_order), collected)
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


def _row_of(file: _File) -> tuple[str, int, int]:
    return (file.name, file.mtime_ns, file.size)


def _take(store: Store, file: _File, collected: Collected) -> bool:
    """Whether the file is in the index now."""
    try:
        text = read_bytes(file.path)
        with store.attempt():  # of a damaged file nothing is taken
            file.take(store, file, text)
    except (FileNotFoundError, RowMissingError):
        return False  # gone since the folder was listed; or its turn comes when the file that it adds to can be read
    except (*DAMAGE, OSError) as error:
        _note_damage(file, error, collected)
        return False
    return True


def _note_damage(file: _File, error: Exception, collected: Collected) -> None:
    why = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    if isinstance(error, documents.NewerError):
        collected.damaged.append(f"{file.path}: {why}")
    else:
        collected.damaged.append(f"{file.path}: {type(error).__name__}: {why}")


# ---------------------------------------------------------------- records, many at once

FILES_AT_ONCE = 250
BYTES_AT_ONCE = 64 * 2**20


def _at_once(records: Sequence[_File]) -> Iterator[list[_File]]:
    """The records in groups that fit in memory; one that is larger than a group is alone."""
    group: list[_File] = []
    size = 0
    for file in records:
        if group and (len(group) == FILES_AT_ONCE or size + file.size > BYTES_AT_ONCE):
            yield group
            group, size = [], 0
        group.append(file)
        size += file.size
    if group:
        yield group


def _take_records(store: Store, records: Sequence[_File], collected: Collected) -> None:
    for group in _at_once(records):
        taken = _take_together(store, group, collected)
        store.put_values("files", FILE_COLUMNS, [_row_of(file) for file in taken])
        collected.records += len(taken)


def _take_together(store: Store, records: Sequence[_File], collected: Collected) -> list[_File]:
    """Put the rows of these records in; returns those that are in. Of a damaged one nothing is."""
    read = [(file, rows) for file in records if (rows := _read(store, file, collected))]
    try:
        _put_records(store, [rows for _, rows in read])
    except DAMAGE:  # one of them holds what the database cannot: by themselves, it is the only one left out
        return [file for file, rows in read if _put_one(store, file, rows, collected)]
    return [file for file, _ in read]


def _read(store: Store, file: _File, collected: Collected) -> _Rows | None:
    try:
        result = _labelled(documents.record(read_bytes(file.path)), _origin(file.name))
        return _Rows.of(file.name, result)
    except FileNotFoundError:
        return None
    except (*DAMAGE, OSError) as error:
        _note_damage(file, error, collected)
        return None


def _put_one(store: Store, file: _File, rows: _Rows, collected: Collected) -> bool:
    try:
        _put_records(store, [rows])
    except DAMAGE as error:
        _note_damage(file, error, collected)
        return False
    return True


def _put_records(store: Store, read: Sequence[_Rows]) -> None:
    with store.attempt():
        store.put_values("results", RESULT_COLUMNS, [rows.result for rows in read])
        store.put_values("repeats", _repeat_columns(), [row for rows in read for row in rows.repeats])
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
        others.update(_known_below(store, [name.rpartition("/")[0]]))
    return sorted(others - set(names))


OF_A_RESULT = ("samples", "devices", "repeats", "results")


# ---------------------------------------------------------------- which files


@dataclass(frozen=True)
class _Scope:
    """What is looked at; of `requests`, only those that the index does not have."""

    batches: Collection[str]
    runs: Collection[str]
    requests: bool = False


def _known(store: Store, scope: _Scope | None) -> _Known:
    if scope is None:
        return {name: (at, size) for name, at, size in store.tuples("SELECT path, mtime_ns, size FROM files")}
    folders = [*(f"batches/{batch}" for batch in scope.batches), *(f"results/{run}" for run in scope.runs)]
    return _known_below(store, [*folders, "requests"] if scope.requests else folders)


def _known_below(store: Store, folders: Sequence[str]) -> _Known:
    sql = (
        "SELECT files.path, mtime_ns, size FROM json_each(?) AS folder CROSS JOIN files"
        " WHERE files.path > folder.value || '/' AND files.path < folder.value || '0'"  # 0 follows /
    )
    return {name: (at, size) for name, at, size in store.tuples(sql, (json.dumps(folders),))}


def _known_of(store: Store, names: Sequence[str]) -> _Known:
    sql = "SELECT path, mtime_ns, size FROM files WHERE path IN (SELECT value FROM json_each(?))"
    return {name: (at, size) for name, at, size in store.tuples(sql, (json.dumps(names),))}


def _look(
    workspace: Workspace, scope: _Scope | None, known: _Known, folders: _Folders | None, damaged: list[str]
) -> tuple[list[_File], list[str]]:
    """(the files that are new or were changed, in the order in which they are to be read; the records that are gone)."""
    data = str(workspace.data)
    new = []
    look = _Look(data, damaged)
    if folders is not None:
        folders.look(look)
        unlisted = folders.trusted
        for name in [name for name in known if name.startswith("results/") and name[8 : name.rindex("/")] in unlisted]:
            try:
                status = os.stat(f"{data}/{name}")  # noqa: PTH116  a Path each would take longer than the question
            except FileNotFoundError:
                continue  # it is gone
            except OSError as error:
                look.note(name, error)
                continue
            seen = known.pop(name)
            if seen != (status.st_mtime_ns, status.st_size):
                new.append(_File(Path(data) / name, name, status.st_mtime_ns, status.st_size, _take_result))
    if scope is not None and scope.requests:
        requests = _listed(look, "requests", lambda name: None if f"requests/{name}" in known else _take_request)
        new += [
            _File(Path(path), name, status.st_mtime_ns, status.st_size, take) for path, name, take, status in requests
        ]
    for path, name, take, status in _files(look, scope, folders):
        if known.pop(name, None) != (status.st_mtime_ns, status.st_size):
            new.append(_File(Path(path), name, status.st_mtime_ns, status.st_size, take))
    return sorted(new, key=_order), [name for name in known if name.startswith(("results/", "imports/"))]


# A folder that was changed less than so long ago may be changed again without a sign of it, where a filesystem's clock has whole
# seconds or another machine's is behind.
FOLDER_IS_YOUNG_FOR_S = 60.0


@dataclass(frozen=True)
class _Look:
    """One look at the workspace's folders; what cannot be looked at is named."""

    data: str
    damaged: list[str]

    def entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(f"{self.data}/{folder}") as entries:
                return list(entries)
        except OSError as error:
            self.note(folder, error)
            return []

    def note(self, name: str, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            self.damaged.append(f"{self.data}/{name}: {error.strerror}")


@dataclass
class _Folders:
    """The folders of records, and which of them need no listing: a new file changes its folder's time, so one that is as it was
    when all its files were in the index has no other. Its files are looked at all the same: a change of theirs leaves
    no mark on it. As git does it for a work tree."""

    known: dict[str, int]  # run -> the folder's mtime_ns, when all its files were in the index
    trusted: set[str] = field(default_factory=set)
    to_list: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Store) -> _Folders:
        return cls(dict(store.tuples("SELECT path, mtime_ns FROM folders")))

    def look(self, look: _Look) -> None:
        """Find the folders that have to be listed. Their time is taken before they are."""
        known, trusted, to_list = self.known, self.trusted, self.to_list
        for entry in look.entries("results"):
            run = entry.name
            try:
                mtime_ns = entry.stat().st_mtime_ns
                if known.get(run) == mtime_ns:
                    trusted.add(run)
                elif entry.is_dir():
                    to_list[run] = mtime_ns
            except OSError as error:
                look.note(f"results/{run}", error)

    def settle(self, store: Store) -> None:
        """Note the folders that were listed and had nothing new, unless they are young. Not noted is only not spared."""
        old_ns = time.time_ns() - int(FOLDER_IS_YOUNG_FOR_S * 1e9)
        settled = [(run, mtime_ns) for run, mtime_ns in self.to_list.items() if mtime_ns < old_ns]
        if settled:
            with contextlib.suppress(LabctlError, sqlite3.OperationalError), store.writing():
                store.put_values("folders", ("path", "mtime_ns"), settled)


def _order(file: _File) -> tuple[int, str, int, str]:
    """Requests first; of a batch, what was planned before what was said of it."""
    area, _, rest = file.name.partition("/")
    folder, _, name = rest.rpartition("/")
    return AREAS.index(area), folder.partition("/")[0], _ORDER[file.take], name


AREAS = ("requests", "batches", "results", "imports")
_Found = tuple[str, str, "_Take", os.stat_result]


def _files(look: _Look, scope: _Scope | None, folders: _Folders | None) -> Iterator[_Found]:
    """Every file that the index is made of, in no order, but for those in folders that need no listing: (path, name within
    the workspace, what it is, its status)."""
    if scope is None:
        yield from _listed(look, "requests", lambda name: _take_request)
    for batch in _folders(look, "batches") if scope is None else scope.batches:
        yield from _listed(look, f"batches/{batch}", _take_of_a_batch)
        yield from _listed(look, f"batches/{batch}/attempts", lambda name: _take_attempt)
    for run in folders.to_list if folders is not None else scope.runs if scope is not None else ():
        yield from _listed(look, f"results/{run}", lambda name: _take_result)
    for origin in _folders(look, "imports") if scope is None else ():
        for bundle in _folders(look, f"imports/{origin}"):
            yield from _imported(look, f"imports/{origin}/{bundle}")


def _imported(look: _Look, folder: str) -> Iterator[_Found]:
    yield from _listed(look, folder, lambda name: _take_bundle if name == "bundle.json" else None)
    for batch in _folders(look, f"{folder}/batches"):
        yield from _listed(look, f"{folder}/batches/{batch}", _take_of_an_imported_batch)
        yield from _listed(look, f"{folder}/batches/{batch}/attempts", lambda name: _take_imported_attempt)
    for run in _folders(look, f"{folder}/results"):
        yield from _listed(look, f"{folder}/results/{run}", lambda name: _take_result)


def _folders(look: _Look, area: str) -> list[str]:
    found = []
    for entry in look.entries(area):
        try:
            if entry.is_dir():
                found.append(entry.name)
        except OSError as error:
            look.note(f"{area}/{entry.name}", error)
    return found


def _listed(look: _Look, folder: str, take_of: Callable[[str], _Take | None]) -> Iterator[_Found]:
    for entry in look.entries(folder):
        name = entry.name
        take = take_of(name) if name.endswith(".json") and not name.startswith(".") else None
        if take is None:
            continue
        try:
            yield entry.path, f"{folder}/{name}", take, entry.stat()
        except OSError as error:
            look.note(f"{folder}/{name}", error)


def _record_at(workspace: Workspace, name: str) -> _File | None:
    path = workspace.data / name
    try:
        status = path.stat()
    except OSError:
        return None
    return _File(path, name, status.st_mtime_ns, status.st_size, _take_result)


# ---------------------------------------------------------------- what is taken from each


def _take_request(store: Store, file: _File, text: bytes) -> None:
    request = documents.read(text, documents.Request)
    keys = ("request_id", "name", "created_at", "labctl_version", "request")
    store.put("requests", [{key: getattr(request, key) for key in keys}])
    skipped = set(request.skipped)
    store.put(
        "request_runs",
        [
            {
                "request_id": request.request_id,
                "run_id": run_id,
                "position": position,
                "skipped": int(run_id in skipped),
            }
            for position, run_id in enumerate(dict.fromkeys(request.runs))
        ],
    )
    for job in request.jobs:
        _add_runs(store, job)


def _take_batch(store: Store, file: _File, text: bytes) -> None:
    store.add("batches", [msgspec.structs.asdict(documents.read(text, documents.Batch))])


def _as_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _take_intent(store: Store, file: _File, text: bytes) -> None:
    intent = documents.read(text, documents.Intent)
    # Of no request: runs of a script that was sent by hand, submitted again.
    lost = intent.lost_answer
    values = {
        "request_id": intent.request_id or None, "intent_at": intent.at, "host": intent.host, "mark": intent.mark,
        "clusters": _as_json(intent.clusters), "lost_answer": _as_json(lost) if lost else None,
    }  # fmt: skip
    store.update("batches", file.path.parent.name, values)


def _take_job(store: Store, file: _File, text: bytes) -> None:
    job = documents.job(text)
    task = int(file.path.stem)
    store.add("jobs", [{"job_id": job.job_id, "batch_id": file.path.parent.name, "task": task, "loads": job.loads}])
    store.put(
        "job_runs",
        [{"job_id": job.job_id, "run_id": run.run_id, "position": position} for position, run in enumerate(job.runs)],
    )
    _add_runs(store, job)


def _take_given(store: Store, file: _File, text: bytes) -> None:
    """Which runs of the batch's jobs labctl gave to other jobs, and in which state it found them."""
    for job_id, runs in documents.read(text, dict[str, dict[str, documents.Given]]).items():
        for run_id, to in runs.items():
            store.put("given_runs", [{"job_id": job_id, "run_id": run_id, "given_to": to.job, "given_as": to.state}])


def _take_submitted(store: Store, file: _File, text: bytes) -> None:
    batch_id = file.path.parent.name
    submitted = documents.read(text, documents.Submitted)
    values = {
        "submitted_at": submitted.at, "refused": submitted.refused, "remedy": submitted.remedy,
        "never_queued": submitted.never_queued,
    }  # fmt: skip
    if submitted.clusters:
        values["clusters"] = _as_json(submitted.clusters)
    store.update("batches", batch_id, values)
    starts = submitted.starts or [None] * len(submitted.ids)
    for task, (slurm_id, start) in enumerate(zip(submitted.ids, starts, strict=True)):
        store.update("jobs", f"{batch_id}.{task}", {"slurm_id": slurm_id, "process_start": start})


STATE_COLUMNS = documents.State.__struct_fields__


def _take_states(store: Store, file: _File, text: bytes) -> None:
    _put_states(store, documents.read(text, dict[str, documents.State]))


def take_states(store: Store, document: Any) -> None:
    """Set the states of a batch's jobs, by job, as its states.json holds them. Raises ValueError where it holds none."""
    _put_states(store, documents.read(msgspec.json.encode(document), dict[str, documents.State]))


def _put_states(store: Store, states: Mapping[str, documents.State]) -> None:
    for job_id, state in states.items():
        store.update("jobs", job_id, msgspec.structs.asdict(state))


def _take_attempt(store: Store, file: _File, text: bytes) -> None:
    attempt = documents.attempt(text)
    columns = store.columns("executions")
    store.put("executions", [{name: value for name, value in vars(attempt).items() if name in columns}])
    known = store.rows("SELECT slurm_id FROM jobs WHERE job_id = ?", (attempt.job_id,))
    if not known or known[0]["slurm_id"] is None:
        # A script that a person submitted by hand has its Slurm id from here alone.
        store.update("jobs", attempt.job_id, {"slurm_id": attempt.slurm_job_id})


def _take_of_a_batch(name: str) -> _Take | None:
    return _TAKE_BY_NAME.get(name) or (_take_job if name.removesuffix(".json").isdigit() else None)


_TAKE_BY_NAME: dict[str, _Take] = {
    "batch.json": _take_batch,
    "intent.json": _take_intent,
    "submitted.json": _take_submitted,
    "states.json": _take_states,
    "given.json": _take_given,
}


def _add_runs(store: Store, job: JobSpec, origin: str = HERE) -> None:
    rows = []
    for run in job.runs:
        shared = {
            "partition": job.partition, "backend": job.backend, "model": job.model.name, "revision": job.model.revision,
            "dtype": job.dtype, "device": job.device, "gpus": job.gpus, "parallel": job.parallel,
            "engine_options": job.engine_options, "raw_prompt": int(job.raw_prompt), "defaults": job.defaults,
            "model_content": job.model.fingerprint or job.model.revision or "",
        }  # fmt: skip
        own = {
            "run_id": _label(run.run_id, origin), "origin": origin,
            "prompt_set": run.prompt_set, "prompts": job.prompt_sets[run.prompt_set],
            "max_new_tokens": run.max_new_tokens, "batch_size": run.batch_size,
            "request_rate": run.request_rate, "requests": run.requests, "sampling": sampling_label(run.sampling),
            "ignore_eos": int(run.ignore_eos), "asked": run.asked,
        }  # fmt: skip
        rows.append({**shared, **own})
    _put_runs(store, rows)


def _put_runs(store: Store, rows: list[dict[str, Any]]) -> None:
    """Copies of one checkpoint make one run: it goes by the name that sorts first, whichever was seen first."""
    known = {
        row["run_id"]: row["model"] for row in store.rows(RUN_NAMES, (json.dumps([row["run_id"] for row in rows]),))
    }
    store.put("runs", [row for row in rows if row["model"] < known.get(row["run_id"], CHARACTER_AFTER_ALL)])


RUN_NAMES = "SELECT run_id, model FROM runs WHERE run_id IN (SELECT value FROM json_each(?))"
CHARACTER_AFTER_ALL = chr(0x10FFFF)


def sampling_label(sampling: Sampling) -> str:
    """ "greedy", or the settings as they are written on the command line."""
    if sampling.greedy:
        return "greedy"
    return f"temperature={sampling.temperature:g},top_p={sampling.top_p:g},seed={sampling.seed or 0}"


def _take_result(store: Store, file: _File, text: bytes) -> None:
    result = _labelled(documents.record(text), _origin(file.name))
    _put_records(store, [_Rows.of(file.name, result)])


# ---------------------------------------------------------------- what was imported
#
# A bundle's jobs have no batch here, and no id in this site's Slurm: nothing asks what became of them. Every id of an origin has
# its label, so that the same run of two people is two.


def _origin(name: str) -> str:
    """Whose a file is, by where it lies."""
    area, _, rest = name.partition("/")
    return rest.partition("/")[0] if area == "imports" else HERE


def _label(name: str, origin: str) -> str:
    return name if origin == HERE else f"{name}@{origin}"


def _labelled(result: RunResult, origin: str) -> RunResult:
    if origin != HERE:
        attempt = result.attempt
        result.run_id = _label(result.run_id, origin)
        attempt.attempt_id, attempt.job_id = _label(attempt.attempt_id, origin), _label(attempt.job_id, origin)
    return result


def _take_bundle(store: Store, file: _File, text: bytes) -> None:
    known = msgspec.structs.asdict(documents.read(text, documents.Bundle))
    store.put("bundles", [{**known, "origin": _origin(file.name)}])


def _take_imported_job(store: Store, file: _File, text: bytes) -> None:
    job, origin = documents.job(text), _origin(file.name)
    store.add("jobs", [{"job_id": _label(job.job_id, origin), "task": int(file.path.stem)}])
    _add_runs(store, job, origin)


TIME_COLUMNS = ("queued_at", "started_at", "ended_at", "held_before_s", "node")


def _take_imported_states(store: Store, file: _File, text: bytes) -> None:
    """The times of the jobs that the bundle has records of."""
    for job_id, state in documents.read(text, dict[str, documents.State]).items():
        with contextlib.suppress(RowMissingError):
            times = {column: getattr(state, column) for column in TIME_COLUMNS}
            store.update("jobs", _label(job_id, _origin(file.name)), times)


def _take_imported_attempt(store: Store, file: _File, text: bytes) -> None:
    attempt, origin = documents.attempt(text), _origin(file.name)
    attempt.attempt_id, attempt.job_id = _label(attempt.attempt_id, origin), _label(attempt.job_id, origin)
    columns = store.columns("executions")
    store.put("executions", [{name: value for name, value in vars(attempt).items() if name in columns}])


def _take_of_an_imported_batch(name: str) -> _Take | None:
    if name == "states.json":
        return _take_imported_states
    return _take_imported_job if name.removesuffix(".json").isdigit() else None


def _forget_origins(store: Store, gone: Sequence[str]) -> set[str]:
    """Take out all of each origin that files are gone of: what is left of it is read again. Returns these origins."""
    origins = {_origin(name) for name in gone} - {HERE}
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


_ORDER: dict[_Take, int] = {
    take: place
    for place, take in enumerate(
        (
            _take_request, _take_batch, _take_job, _take_given, _take_intent, _take_submitted, _take_states, _take_attempt,
            _take_bundle, _take_imported_job, _take_imported_states, _take_imported_attempt, _take_result,
        )
    )
}  # fmt: skip
RESULT_COLUMNS = (
    "run_id", "attempt_id", "job_id", "status", "started_at", "ended_at", "load_s", "init_s", "warmup_s", "node",
    "failure_kind", "failure", "remedy", "fingerprint", "path", "facts", "tokens_generated", "finish_reasons", "text_id",
    "prompt_tokens", "empty_answers", "answers_without_tokens",
)  # fmt: skip
SAMPLE_COLUMNS = (
    "run_id", "attempt_id", "repeat", "request", "prompt", "prompt_tokens", "output_tokens", "ttft_s", "tpot_s", "e2e_s",
    "finish_reason", "text_id", "mean_log_probability", "repeated_bigrams", "handed_s", "queued_s", "engine_ttft_s",
)  # fmt: skip
OF_A_DEVICE = tuple(one.name for one in fields(DeviceMemory) if one.name != "extra")
DEVICE_COLUMNS = ("run_id", "attempt_id", "repeat", *OF_A_DEVICE)


def _repeat_columns() -> list[str]:
    raw = (
        "run_id", "attempt_id", "repeat", "wall_s", "seed", "read_bytes_per_step", "memory_bandwidth_bytes_s", "thrown_away",
    )  # fmt: skip
    return [*raw, *measure.METRICS]


@dataclass(frozen=True)
class _Rows:
    """The rows of one record, by table: values in the order of the columns above."""

    result: tuple[Any, ...]
    repeats: list[tuple[Any, ...]]
    devices: list[tuple[Any, ...]]
    samples: list[tuple[Any, ...]]
    texts: dict[str, str]

    @classmethod
    def of(cls, name: str, result: RunResult) -> _Rows:
        key = (result.run_id, result.attempt.attempt_id)
        samples = [sample for repeat in result.repeats for sample in repeat.samples]
        figures = [measure.Figures(repeat) for repeat in result.repeats]
        return cls(
            (*key, *_values_of(result, samples, name)),
            [(*key, *_values_of_a_repeat(of_repeat)) for of_repeat in figures],
            [
                (*key, repeat.repeat, *[getattr(memory, name) for name in OF_A_DEVICE])
                for repeat in result.repeats
                for memory in repeat.devices
            ],
            [
                (*key, of_repeat.repeat.repeat, *values)
                for of_repeat in figures
                for values in _values_of_samples(of_repeat)
            ],
            {_text_id(sample.text): sample.text for sample in samples},
        )


def _values_of(result: RunResult, samples: Sequence[Sample], name: str) -> tuple[Any, ...]:
    failure = result.failure
    return (
        result.attempt.job_id, result.status, result.started_at, result.ended_at, result.load_s, result.init_s,
        result.warmup_s, result.attempt.node, failure.kind if failure else None, failure.message if failure else None,
        failure.remedy if failure else None, _json(result.fingerprint), name,
        _json(facts_of(result.fingerprint)),
        _distinct(len(sample.token_ids) for sample in samples), _distinct(sample.finish_reason for sample in samples),
        _text_id(samples[0].text) if samples else None,
        max((sample.prompt_tokens for sample in samples), default=None),
        sum(bool(sample.token_ids) and not sample.text.strip() for sample in samples),
        sum(not sample.token_ids for sample in samples),
    )  # fmt: skip


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _values_of_a_repeat(figures: measure.Figures) -> tuple[Any, ...]:
    repeat = figures.repeat
    raw = (
        repeat.repeat, repeat.wall_s, repeat.seed, repeat.read_bytes_per_step, repeat.memory_bandwidth_bytes_s,
        repeat.thrown_away,
    )  # fmt: skip
    return (*raw, *measure.metrics_of(figures).values())


def _values_of_samples(figures: measure.Figures) -> Iterator[tuple[Any, ...]]:
    of_each = zip(
        figures.repeat.samples, figures.ttft_s, figures.tpot_s, figures.e2e_s, figures.mean_log_probability,
        figures.repeated_bigrams, strict=True,
    )  # fmt: skip
    for sample, ttft_s, tpot_s, e2e_s, mean_log_probability, repeated_bigrams in of_each:
        yield (
            sample.request, sample.prompt, sample.prompt_tokens, len(sample.token_ids), ttft_s, tpot_s, e2e_s,
            sample.finish_reason, _text_id(sample.text), mean_log_probability, repeated_bigrams, sample.handed_s,
            sample.queued_s, sample.engine_ttft_s,
        )  # fmt: skip


def _distinct(values: Iterable[Any]) -> str:
    return "/".join(str(value) for value in sorted(set(values)))


@functools.lru_cache(maxsize=4096)
def _text_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
