"""Which files of a workspace are new, were changed or are gone."""

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
    """What a file holds, in the order in which the files are read: of an array, what was planned before what was said of it."""

    SUBMISSION, ARRAY, JOB, GIVEN, INTENT, SUBMITTED, STATES, ATTEMPT = range(8)
    BUNDLE, IMPORTED_JOB, IMPORTED_STATES, IMPORTED_ATTEMPT, RECORD = range(8, 13)


@dataclass(frozen=True)
class File:
    """A file of the workspace as it was when it was looked at; `name` is its path within the workspace, which may be moved."""

    path: Path
    name: str
    mtime_ns: int
    size: int
    kind: Kind


Known = dict[str, tuple[int, int]]  # name -> (mtime_ns, size), as they were when the file was read


@dataclass(frozen=True)
class Scope:
    """What is looked at; of `requests`, only those that the index does not have."""

    arrays: Collection[str]
    runs: Collection[str]
    submissions: bool = False


def known_files(store: Store, scope: Scope | None) -> Known:
    if scope is None:
        return {name: (at, size) for name, at, size in store.tuples("SELECT path, mtime_ns, size FROM files")}
    folders = [*(f"arrays/{array}" for array in scope.arrays), *(f"results/{run}" for run in scope.runs)]
    return known_below(store, [*folders, "submissions"] if scope.submissions else folders)


def known_below(store: Store, folders: Sequence[str]) -> Known:
    sql = (
        "SELECT files.path, mtime_ns, size FROM json_each(?) AS folder CROSS JOIN files"
        " WHERE files.path > folder.value || '/' AND files.path < folder.value || '0'"  # 0 follows /
    )
    return {name: (at, size) for name, at, size in store.tuples(sql, (json.dumps(folders),))}


def known_of(store: Store, names: Sequence[str]) -> Known:
    sql = "SELECT path, mtime_ns, size FROM files WHERE path IN (SELECT value FROM json_each(?))"
    return {name: (at, size) for name, at, size in store.tuples(sql, (json.dumps(names),))}


def changed_files(
    workspace: Workspace, scope: Scope | None, known: Known, folders: Folders | None, damaged: list[str]
) -> tuple[list[File], list[str]]:
    """(the files that are new or were changed, in the order in which they are to be read; the records that are gone)."""
    data = str(workspace.data)
    new = []
    look = Look(data, damaged)
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
                new.append(File(Path(data) / name, name, status.st_mtime_ns, status.st_size, Kind.RECORD))
    if scope is not None and scope.submissions:
        requests = _listed(
            look, "submissions", lambda name: None if f"submissions/{name}" in known else Kind.SUBMISSION
        )
        new += [
            File(Path(path), name, status.st_mtime_ns, status.st_size, kind) for path, name, kind, status in requests
        ]
    for path, name, kind, status in _files(look, scope, folders):
        if known.pop(name, None) != (status.st_mtime_ns, status.st_size):
            new.append(File(Path(path), name, status.st_mtime_ns, status.st_size, kind))
    return sorted(new, key=order), [name for name in known if name.startswith(("results/", "imports/"))]


# A folder that was changed less than so long ago may be changed again without a sign of it, where a filesystem's clock has whole
# seconds or another machine's is behind.
FOLDER_IS_YOUNG_FOR_S = 60.0


@dataclass(frozen=True)
class Look:
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
class Folders:
    """The folders of records, and which of them need no listing: a new file changes its folder's time, so one that is as it was
    when all its files were in the index has no other. Its files are looked at all the same: a change of theirs leaves
    no mark on it. As git does it for a work tree."""

    known: dict[str, int]  # run -> the folder's mtime_ns, when all its files were in the index
    trusted: set[str] = field(default_factory=set)
    to_list: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Store) -> Folders:
        return cls(dict(store.tuples("SELECT path, mtime_ns FROM folders")))

    def look(self, look: Look) -> None:
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


def order(file: File) -> tuple[int, str, int, str]:
    """Requests first; of an array, what was planned before what was said of it."""
    area, _, rest = file.name.partition("/")
    folder, _, name = rest.rpartition("/")
    return AREAS.index(area), folder.partition("/")[0], file.kind, name


AREAS = ("submissions", "arrays", "results", "imports")


_Found = tuple[str, str, Kind, os.stat_result]


def _files(look: Look, scope: Scope | None, folders: Folders | None) -> Iterator[_Found]:
    """Every file that the index is made of, in no order, but for those in folders that need no listing: (path, name within
    the workspace, what it is, its status)."""
    if scope is None:
        yield from _listed(look, "submissions", lambda name: Kind.SUBMISSION)
    for array in _folders(look, "arrays") if scope is None else scope.arrays:
        yield from _listed(look, f"arrays/{array}", _kind_of_an_array_file)
        yield from _listed(look, f"arrays/{array}/attempts", lambda name: Kind.ATTEMPT)
    for run in folders.to_list if folders is not None else scope.runs if scope is not None else ():
        yield from _listed(look, f"results/{run}", lambda name: Kind.RECORD)
    for origin in _folders(look, "imports") if scope is None else ():
        for bundle in _folders(look, f"imports/{origin}"):
            yield from _imported(look, f"imports/{origin}/{bundle}")


def _imported(look: Look, folder: str) -> Iterator[_Found]:
    yield from _listed(look, folder, lambda name: Kind.BUNDLE if name == "bundle.json" else None)
    for array in _folders(look, f"{folder}/arrays"):
        yield from _listed(look, f"{folder}/arrays/{array}", _kind_of_an_imported_file)
        yield from _listed(look, f"{folder}/arrays/{array}/attempts", lambda name: Kind.IMPORTED_ATTEMPT)
    for run in _folders(look, f"{folder}/results"):
        yield from _listed(look, f"{folder}/results/{run}", lambda name: Kind.RECORD)


def _folders(look: Look, area: str) -> list[str]:
    found = []
    for entry in look.entries(area):
        try:
            if entry.is_dir():
                found.append(entry.name)
        except OSError as error:
            look.note(f"{area}/{entry.name}", error)
    return found


def _listed(look: Look, folder: str, kind_of: Callable[[str], Kind | None]) -> Iterator[_Found]:
    for entry in look.entries(folder):
        name = entry.name
        kind = kind_of(name) if name.endswith(".json") and not name.startswith(".") else None
        if kind is None:
            continue
        try:
            yield entry.path, f"{folder}/{name}", kind, entry.stat()
        except OSError as error:
            look.note(f"{folder}/{name}", error)


def record_at(workspace: Workspace, name: str) -> File | None:
    path = workspace.data / name
    try:
        status = path.stat()
    except OSError:
        return None
    return File(path, name, status.st_mtime_ns, status.st_size, Kind.RECORD)


def origin_of(name: str) -> str:
    """Whose a file is, by where it lies."""
    area, _, rest = name.partition("/")
    return rest.partition("/")[0] if area == "imports" else HERE


_BATCH_FILES = {
    "array.json": Kind.ARRAY, "intent.json": Kind.INTENT, "submitted.json": Kind.SUBMITTED, "states.json": Kind.STATES,
    "given.json": Kind.GIVEN,
}  # fmt: skip


def _kind_of_an_array_file(name: str) -> Kind | None:
    return _BATCH_FILES.get(name) or (Kind.JOB if name.removesuffix(".json").isdigit() else None)


def _kind_of_an_imported_file(name: str) -> Kind | None:
    if name == "states.json":
        return Kind.IMPORTED_STATES
    return Kind.IMPORTED_JOB if name.removesuffix(".json").isdigit() else None
