"""New, changed and missing files of a workspace."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.views import HERE
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import LabctlError


class Kind(enum.IntEnum):
    """What a file holds, in reading order: the plan of an array comes before its results."""

    SUBMISSION, ARRAY, JOB, MOVED, INTENT, SUBMITTED, STATES, ATTEMPT = range(8)
    BUNDLE, IMPORTED_JOB, IMPORTED_STATES, IMPORTED_ATTEMPT, RECORD = range(8, 13)


AREAS = ("submissions", "arrays", "results", "imports")
_ARRAY_FILES = {
    "array.json": Kind.ARRAY, "intent.json": Kind.INTENT, "submitted.json": Kind.SUBMITTED, "states.json": Kind.STATES,
    "given.json": Kind.MOVED,
}  # fmt: skip
# The modification time of a younger folder may not show its next change: a filesystem's clock may tick in whole seconds, and
# another machine's clock may be late.
FOLDER_IS_YOUNG_FOR_S = 60.0

Known = dict[str, tuple[int, int]]  # name -> (mtime_ns, size) when the file was read
_Found = tuple[str, str, Kind, os.stat_result]  # path, name in the workspace, kind, status


@dataclass(frozen=True)
class File:
    """A file of the workspace and its status. `name` is its path relative to .labctl."""

    path: Path
    name: str
    mtime_ns: int
    size: int
    kind: Kind


@dataclass(frozen=True)
class Scope:
    """The arrays and runs to look at; with `submissions`, also submissions that are not in the database."""

    arrays: Collection[str]
    runs: Collection[str]
    submissions: bool = False


def known_files(store: Store, scope: Scope | None) -> Known:
    """The indexed files, all or those in scope."""
    if scope is None:
        return _known(store, "files")
    folders = [*(f"arrays/{array}" for array in scope.arrays), *(f"results/{run}" for run in scope.runs)]
    return known_below(store, [*folders, "submissions"] if scope.submissions else folders)


def known_below(store: Store, folders: Sequence[str]) -> Known:
    """The indexed files below these folders."""
    below = "files.path > folder.value || '/' AND files.path < folder.value || '0'"  # 0 follows /
    return _known(store, f"json_each(?) AS folder CROSS JOIN files WHERE {below}", json.dumps(folders))


def known_of(store: Store, names: Sequence[str]) -> Known:
    """The indexed files among these."""
    return _known(store, "files WHERE path IN (SELECT value FROM json_each(?))", json.dumps(names))


def _known(store: Store, source: str, *parameters: str) -> Known:
    rows = store.tuples(f"SELECT files.path, mtime_ns, size FROM {source}", parameters)
    return {name: (at, size) for name, at, size in rows}


def changed_files(
    workspace: Workspace, scope: Scope | None, known: Known, folders: Folders | None, damaged: list[str]
) -> tuple[list[File], list[str]]:
    """(new and changed files in reading order, names of missing records). Unreadable folders are added to `damaged`."""
    new = []
    for path, name, kind, status in _files(Scan(str(workspace.data), damaged), scope, known, folders):
        if known.pop(name, None) != (status.st_mtime_ns, status.st_size):
            new.append(File(Path(path), name, status.st_mtime_ns, status.st_size, kind))
    return sorted(new, key=order), [name for name in known if name.startswith(("results/", "imports/"))]


def order(file: File) -> tuple[int, str, int, str]:
    """The sort key of reading order: submissions first, then array by array."""
    area, _, rest = file.name.partition("/")
    folder, _, name = rest.rpartition("/")
    return AREAS.index(area), folder.partition("/")[0], file.kind, name


@dataclass(frozen=True)
class Scan:
    """One scan of the folders below .labctl (`data`); `damaged` collects what it cannot read."""

    data: str
    damaged: list[str]

    def entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(f"{self.data}/{folder}") as entries:
                return list(entries)
        except OSError as error:
            self.note(folder, error)
            return []

    def folders(self, area: str) -> Iterator[str]:
        for entry in self.entries(area):
            try:
                if entry.is_dir():
                    yield entry.name
            except OSError as error:
                self.note(f"{area}/{entry.name}", error)

    def files(self, folder: str, kind_of: Callable[[str], Kind | None]) -> Iterator[_Found]:
        """The JSON files of a folder that have a kind."""
        for entry in self.entries(folder):
            name = entry.name
            kind = kind_of(name) if name.endswith(".json") and not name.startswith(".") else None
            if kind is None:
                continue
            try:
                yield entry.path, f"{folder}/{name}", kind, entry.stat()
            except OSError as error:
                self.note(f"{folder}/{name}", error)

    def note(self, name: str, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            self.damaged.append(f"{self.data}/{name}: {error.strerror}")


@dataclass
class Folders:
    """Folders of results. A new file changes its folder's modification time, so a folder with the time that it had when all its
    files were indexed (`known`) is `unchanged` and needs no listing. Its known files still need a stat. git does the same for a
    work tree."""

    known: dict[str, int]  # run id -> the folder's mtime_ns
    unchanged: set[str] = field(default_factory=set)
    to_list: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Store) -> Folders:
        return cls(dict(store.tuples("SELECT path, mtime_ns FROM folders")))

    def scan(self, scan: Scan) -> None:
        """Find the folders to list. Their modification time is read before the listing."""
        known, unchanged, to_list = self.known, self.unchanged, self.to_list
        for entry in scan.entries("results"):
            run = entry.name
            try:
                mtime_ns = entry.stat().st_mtime_ns
                if known.get(run) == mtime_ns:
                    unchanged.add(run)
                elif entry.is_dir():
                    to_list[run] = mtime_ns
            except OSError as error:
                scan.note(f"results/{run}", error)

    def settle(self, store: Store) -> None:
        """Save the listed folders that had nothing new, except young ones. A failed write only costs a listing later."""
        old_ns = time.time_ns() - int(FOLDER_IS_YOUNG_FOR_S * 1e9)
        settled = [(run, mtime_ns) for run, mtime_ns in self.to_list.items() if mtime_ns < old_ns]
        if settled:
            with contextlib.suppress(LabctlError, sqlite3.OperationalError), store.writing():
                store.put_values("folders", settled)


def _files(scan: Scan, scope: Scope | None, known: Known, folders: Folders | None) -> Iterator[_Found]:
    """Every file in scope, in any order."""
    if folders is not None:
        folders.scan(scan)
        yield from _records_in_unchanged(scan, known, folders.unchanged)
    if scope is None:
        yield from scan.files("submissions", lambda name: Kind.SUBMISSION)
    elif scope.submissions:
        yield from scan.files("submissions", lambda name: None if f"submissions/{name}" in known else Kind.SUBMISSION)
    for array in scan.folders("arrays") if scope is None else scope.arrays:
        yield from scan.files(f"arrays/{array}", _kind_of_array_file)
        yield from scan.files(f"arrays/{array}/attempts", lambda name: Kind.ATTEMPT)
    for run in folders.to_list if folders is not None else scope.runs if scope is not None else ():
        yield from scan.files(f"results/{run}", lambda name: Kind.RECORD)
    for origin in scan.folders("imports") if scope is None else ():
        for bundle in scan.folders(f"imports/{origin}"):
            yield from _imported(scan, f"imports/{origin}/{bundle}")


def _records_in_unchanged(scan: Scan, known: Known, unchanged: Collection[str]) -> Iterator[_Found]:
    for name in [name for name in known if name.startswith("results/") and name[8 : name.rindex("/")] in unchanged]:
        try:
            path = f"{scan.data}/{name}"
            yield path, name, Kind.RECORD, os.stat(path)  # noqa: PTH116  a Path each would double the time
        except OSError as error:
            scan.note(name, error)


def _imported(scan: Scan, folder: str) -> Iterator[_Found]:
    yield from scan.files(folder, lambda name: Kind.BUNDLE if name == "bundle.json" else None)
    for array in scan.folders(f"{folder}/arrays"):
        yield from scan.files(f"{folder}/arrays/{array}", _kind_of_imported_file)
        yield from scan.files(f"{folder}/arrays/{array}/attempts", lambda name: Kind.IMPORTED_ATTEMPT)
    for run in scan.folders(f"{folder}/results"):
        yield from scan.files(f"{folder}/results/{run}", lambda name: Kind.RECORD)


def record_at(workspace: Workspace, name: str) -> File | None:
    """A record's file; None if it is missing."""
    path = workspace.data / name
    try:
        status = path.stat()
    except OSError:
        return None
    return File(path, name, status.st_mtime_ns, status.st_size, Kind.RECORD)


def origin_of(name: str) -> str:
    """The origin of a file: HERE, or the label of imported bundles."""
    area, _, rest = name.partition("/")
    return rest.partition("/")[0] if area == "imports" else HERE


def _kind_of_array_file(name: str) -> Kind | None:
    return _ARRAY_FILES.get(name) or (Kind.JOB if name.removesuffix(".json").isdigit() else None)


def _kind_of_imported_file(name: str) -> Kind | None:
    if name == "states.json":
        return Kind.IMPORTED_STATES
    return Kind.IMPORTED_JOB if name.removesuffix(".json").isdigit() else None
