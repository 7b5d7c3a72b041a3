"""New, changed and missing files of a workspace."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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
    "moved.json": Kind.MOVED,
}  # fmt: skip
# The modification time of a younger folder may not show its next change: a filesystem's clock may tick in whole seconds, and
# another machine's clock may be minutes late.
FOLDER_IS_YOUNG_FOR_S = 900.0

# Stands for the modification time of a folder that needs a listing.
TO_LIST = 0

Known = dict[str, tuple[int, int]]  # name -> (mtime_ns, size) when the file was read
_Found = tuple[str, str, os.stat_result]  # path, name in the workspace, status
_KindOf = Callable[[str], Kind | None]


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


@dataclass
class Folders:
    """All folders of the workspace. A file that is new, removed or renamed into place changes its folder's modification time.
    So a folder with the time that it had when all its files were indexed (`known`) is `unchanged` and needs no listing.

    All writers of labctl rename. `every_file` adds a stat of each file, which also finds what a person changed in place.
    """

    known: dict[str, int]  # each folder with an indexed file, relative to .labctl -> its mtime_ns, or TO_LIST
    every_file: bool
    unchanged: set[str] = field(default_factory=set)
    listed: dict[str, int] = field(default_factory=dict)
    incomplete: set[str] = field(default_factory=set)  # listed ones with a file that is not indexed

    @classmethod
    def of(cls, store: Store, *, every_file: bool) -> Folders:
        return cls(dict(store.tuples("SELECT path, mtime_ns FROM folders")), every_file)

    def indexed(self) -> list[tuple[str, int]]:
        """The listed folders whose files are all indexed, without young ones."""
        old_ns = time.time_ns() - int(FOLDER_IS_YOUNG_FOR_S * 1e9)
        return [
            (folder, mtime_ns)
            for folder, mtime_ns in self.listed.items()
            if mtime_ns < old_ns and folder not in self.incomplete
        ]

    def save(self, store: Store) -> None:
        """Save the indexed folders. A failed write only costs a listing later."""
        if indexed := self.indexed():
            with contextlib.suppress(LabctlError, sqlite3.OperationalError), store.writing():
                store.put_values("folders", indexed)


def folder_of(name: str) -> str:
    return name[: name.rindex("/")]


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
    workspace: Workspace, store: Store, where: Scope | Folders, damaged: list[str]
) -> tuple[list[File], list[str]]:
    """(new and changed files in reading order, names of missing records). Unreadable folders are added to `damaged`."""
    data = str(workspace.data)
    if isinstance(where, Scope):
        folders = [*(f"arrays/{array}" for array in where.arrays), *(f"results/{run}" for run in where.runs)]
        known = known_below(store, [*folders, "submissions"] if where.submissions else folders)
        found = list(_in_scope(Scan(data, damaged, set()), where, known))
    else:
        scan = Scan(data, damaged, where.incomplete)
        found = list(_in_changed_folders(scan, where))
        if where.every_file:
            known = _known(store, "files")
            found += _status_of_each(scan, [name for name in known if folder_of(name) in where.unchanged])
        else:
            known = known_below(store, list(where.listed.keys() | (where.known.keys() - where.unchanged)))
            known = {name: seen for name, seen in known.items() if folder_of(name) not in where.unchanged}
    new = []
    for path, name, status in found:
        kind = None if known.pop(name, None) == (status.st_mtime_ns, status.st_size) else _kind_of(name)
        if kind is not None:
            new.append(File(Path(path), name, status.st_mtime_ns, status.st_size, kind))
    return sorted(new, key=order), [name for name in known if name.startswith(("results/", "imports/"))]


def order(file: File) -> tuple[int, str, int, str]:
    """The sort key of reading order: submissions first, then array by array."""
    area, _, rest = file.name.partition("/")
    folder, _, name = rest.rpartition("/")
    return AREAS.index(area), folder.partition("/")[0], file.kind, name


@dataclass(frozen=True)
class Scan:
    """One scan of the folders below .labctl (`data`). `damaged` collects what it cannot read, `incomplete` the folders with
    such files, and with links."""

    data: str
    damaged: list[str]
    incomplete: set[str]

    def entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(f"{self.data}/{folder}") as entries:
                return list(entries)
        except OSError as error:
            self.incomplete.add(folder)
            self.note(folder, error)
            return []

    def folders(self, area: str) -> Iterator[tuple[str, int]]:
        """The folders in this one, each with its modification time."""
        try:
            handle = os.open(f"{self.data}/{area}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            self.note(area, error)
            return
        try:
            for name in os.listdir(handle):  # noqa: PTH208  a Path each would take longer
                try:
                    status = os.stat(name, dir_fd=handle)
                except OSError as error:
                    self.note(f"{area}/{name}", error)
                else:
                    if stat.S_ISDIR(status.st_mode):
                        yield f"{area}/{name}", status.st_mtime_ns
        finally:
            os.close(handle)

    def itself(self, folder: str) -> Iterator[tuple[str, int]]:
        """The folder with its modification time; nothing if it is missing."""
        try:
            yield folder, os.stat(f"{self.data}/{folder}").st_mtime_ns  # noqa: PTH116  a Path each would take longer
        except OSError as error:
            self.note(folder, error)

    def files(self, folder: str, kind_of: _KindOf) -> Iterator[_Found]:
        """The JSON files of a folder that have a kind."""
        for entry in self.entries(folder):
            name = entry.name
            if not name.endswith(".json") or name.startswith(".") or kind_of(name) is None:
                continue
            if entry.is_symlink():  # its file may change elsewhere
                self.incomplete.add(folder)
            try:
                yield entry.path, f"{folder}/{name}", entry.stat()
            except OSError as error:
                self.incomplete.add(folder)
                self.note(f"{folder}/{name}", error)

    def note(self, name: str, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            self.damaged.append(f"{self.data}/{name}: {error.strerror}")


def _in_scope(scan: Scan, scope: Scope, known: Known) -> Iterator[_Found]:
    """The files of these arrays and runs, and the submissions that are not known."""
    if scope.submissions:
        yield from scan.files("submissions", lambda name: None if f"submissions/{name}" in known else Kind.SUBMISSION)
    arrays = (f"arrays/{array}{below}" for array in scope.arrays for below in ("", "/attempts"))
    for folder in (*arrays, *(f"results/{run}" for run in scope.runs)):
        yield from scan.files(folder, _kind_in(folder))


def _in_changed_folders(scan: Scan, folders: Folders) -> Iterator[_Found]:
    """The files of all folders that may have changed. Notes which these are, and which have not changed."""
    for folder, mtime_ns in _folders(scan):
        if folders.known.get(folder) == mtime_ns:
            folders.unchanged.add(folder)
        else:
            folders.listed[folder] = mtime_ns  # read before the listing
            yield from scan.files(folder, _kind_in(folder))


def _folders(scan: Scan) -> Iterator[tuple[str, int]]:
    """Every folder with files to index, and its modification time."""
    yield from scan.itself("submissions")
    yield from _arrays(scan, "arrays")
    yield from scan.folders("results")
    for origin, _ in scan.folders("imports"):
        for bundle, mtime_ns in scan.folders(origin):
            yield bundle, mtime_ns
            yield from _arrays(scan, f"{bundle}/arrays")
            yield from scan.folders(f"{bundle}/results")


def _arrays(scan: Scan, area: str) -> Iterator[tuple[str, int]]:
    for array, mtime_ns in scan.folders(area):
        yield array, mtime_ns
        yield from scan.itself(f"{array}/attempts")


def _status_of_each(scan: Scan, names: Iterable[str]) -> Iterator[_Found]:
    for name in names:
        try:
            path = f"{scan.data}/{name}"
            yield path, name, os.stat(path)  # noqa: PTH116  a Path each would double the time
        except OSError as error:
            scan.note(name, error)


def _kind_of(name: str) -> Kind | None:
    folder, _, file = name.rpartition("/")
    return _kind_in(folder)(file)


def _kind_in(folder: str) -> _KindOf:
    """The kinds of a folder's files, by name."""
    area, *below = folder.split("/")
    if area == "submissions":
        return lambda name: Kind.SUBMISSION
    if area == "results":
        return lambda name: Kind.RECORD
    if area == "arrays":
        return _kind_of_array_file if len(below) == 1 else lambda name: Kind.ATTEMPT
    if len(below) == 2:
        return lambda name: Kind.BUNDLE if name == "bundle.json" else None
    if below[2] == "results":
        return lambda name: Kind.RECORD
    return _kind_of_imported_file if len(below) == 4 else lambda name: Kind.IMPORTED_ATTEMPT


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
