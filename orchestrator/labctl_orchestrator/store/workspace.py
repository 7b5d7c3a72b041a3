"""The files of a workspace, and the search for the workspace of the current folder."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labctl_orchestrator.request.paths import expand_home
from labctl_orchestrator.request.settings import SETTINGS_FILE
from labctl_slurm.errors import LabctlError, WrongUseError
from labctl_workers.record import follow_mode, open_regular, read_json

DATA_FOLDER = ".labctl"
# Version of the tables in `schema`. Each version has its own database file.
DATABASE_SCHEMA = 11


@dataclass(frozen=True)
class _DataPath:
    """A path in .labctl, as an attribute of the workspace."""

    name: str

    def __get__(self, workspace: Workspace, owner: type[Workspace]) -> Path:
        return workspace.data / self.name


@dataclass(frozen=True)
class Workspace:
    """A folder with labctl.toml, which the user writes, and .labctl/, which labctl writes.

    submissions/<id>.json          one labctl submit
    arrays/<id>/array.json         one sbatch call
    arrays/<id>/<n>.json           the JobSpec of its n-th job
    arrays/<id>/intent.json        written before the sbatch call
    arrays/<id>/submitted.json     written after it: Slurm ids, or sbatch's error
    arrays/<id>/states.json        the last known state of each job
    arrays/<id>/moved.json         runs that moved to other jobs
    arrays/<id>/attempts/, heartbeats/, submitit/     files of the worker and submitit
    results/<run>/<attempt>.json   records
    imports/<origin>/<bundle>/     files of an imported bundle, in the layout of its own workspace
    import-*.partial/              an unfinished import
    code/<hash>/                   the worker package, as submitted
    cache/<partition>/             files that engines compiled
    doctor/, reserve/              jobs of doctor that found a problem; scripts of reserved shells
    labctl-<schema>.db             an index of all these files
    metadata.json                  descriptions of its tables and columns for Datasette
    last-answer.json               time of Slurm's last answer, hence the age of the states
    heard.json                     time when labctl first saw the last heartbeat of each remote worker
    """

    root: Path

    @property
    def settings_file(self) -> Path:
        return self.root / SETTINGS_FILE

    @property
    def templates(self) -> Path:
        return self.root / "templates"

    @property
    def data(self) -> Path:
        return self.root / DATA_FOLDER

    @property
    def index(self) -> Path:
        return self.data / f"labctl-{DATABASE_SCHEMA}.db"

    @property
    def database(self) -> Path:
        """The index; for a read-only workspace a temporary copy, which only this process updates."""
        return self.index if self.writable else _private_copy(self.index)

    @property
    def writable(self) -> bool:
        """Whether labctl may write here. True if .labctl does not exist yet."""
        return not self.read_only_reason

    @property
    def read_only_reason(self) -> str:
        """Why labctl writes nothing here: missing permission, a full disk or no locks; "" if it may write."""
        if not self.data.exists():
            return ""
        return _READ_ONLY.get(self.data, "") or self._permission_problem or _no_room(self.data) or _no_locks(self.data)

    @property
    def read_only_remedy(self) -> str:
        """What makes it writable."""
        if self._permission_problem:
            return "ask its owner to run this command"
        return LOCKS_REMEDY if _no_locks(self.data) else "labctl du shows the usage, labctl clean frees space"

    @property
    def _permission_problem(self) -> str:
        # In this order: another labctl may create the database meanwhile.
        may = os.access(self.data, os.W_OK) and (not self.index.exists() or os.access(self.index, os.W_OK))
        return "" if may else f"no write permission: {self.data}"

    def make_read_only(self, why: str) -> None:
        """Write nothing more here in this process; use a private copy of the database. Raises LabctlError if .labctl is gone."""
        check_present(self.data)
        _READ_ONLY[self.data] = f"{why}: {self.data}"

    metadata = _DataPath("metadata.json")
    submissions = _DataPath("submissions")
    arrays = _DataPath("arrays")
    results = _DataPath("results")
    imports = _DataPath("imports")
    code = _DataPath("code")
    cache = _DataPath("cache")
    last_answer = _DataPath("last-answer.json")
    heard = _DataPath("heard.json")

    def spec(self, job_id: str) -> Path:
        """The JobSpec of a job."""
        array_id, _, task = job_id.rpartition(".")
        return self.arrays / array_id / f"{task}.json"

    @contextmanager
    def lock(self, within_s: float = 60.0) -> Iterator[None]:
        """Lock the workspace against other labctl commands. A killed process releases its lock. Raises LabctlError if another
        labctl keeps the lock for `within_s` seconds, or the workspace is not writable."""
        if self.data.exists() and self._permission_problem:
            raise LabctlError(self._permission_problem, "work in a folder of your own; this one is read-only for you")
        self.create()
        with _lock_file(self.data / "workspace.lock") as file:
            deadline = time.monotonic() + within_s
            while True:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # SQLite uses the same kind of lock
                    break
                except OSError as error:
                    if error.errno in NO_LOCKS:
                        raise LabctlError(_no_locks_message(self.data), LOCKS_REMEDY) from None
                    if error.errno not in (errno.EAGAIN, errno.EACCES):
                        raise
                    if time.monotonic() > deadline:
                        raise LabctlError(
                            f"workspace locked by another labctl command for {within_s:.0f} s: {self.root}",
                            "try again when it has finished; if you stopped one with Ctrl-Z, continue it (fg) or end it",
                        ) from None
                    time.sleep(0.02)
            yield

    def follow_mode(self) -> None:
        """Let this process create group-writable files if the workspace is group-writable."""
        follow_mode(self.data if self.data.is_dir() else self.root)

    def create(self) -> None:
        """Make .labctl, but not the workspace's folder, which may have been moved meanwhile. Raises LabctlError if it is gone."""
        self.follow_mode()
        if not self.data.is_dir():
            for folder in (self.submissions, self.arrays, self.results):
                self.make_folder(folder)
        ignore = self.data / ".gitignore"
        if not ignore.exists():
            ignore.write_text("*\n", encoding="utf-8")

    def make_folder(self, folder: Path) -> None:
        """Make a folder in the workspace, and those on the way to it. Raises LabctlError if the workspace is gone."""
        way = [folder, *folder.parents]
        for step in reversed(way[: way.index(self.root)]):
            try:
                step.mkdir(exist_ok=True)
            except FileNotFoundError:
                raise _gone(self.root) from None


def check_present(data: Path) -> None:
    """Raises LabctlError if this folder .labctl is gone."""
    if not data.is_dir():
        raise _gone(data.parent)


def _gone(root: Path) -> LabctlError:
    return LabctlError(f"workspace was moved or removed meanwhile: {root}", "run labctl in its new place")


_READ_ONLY: dict[Path, str] = {}
# Room for a journal and a few new records.
ROOM_BYTES = 2**20
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
LOCKS_REMEDY = "move the workspace to a file system with locks; Lustre has them where it is mounted with -o flock"


def mount_of(path: Path) -> Path:
    """The mount point of a file's file system."""
    path = path.absolute()
    while not path.is_mount() and path != path.parent:
        path = path.parent
    return path


def _no_room(folder: Path) -> str:
    try:
        room = shutil.disk_usage(folder).free
    except OSError:
        return ""
    return f"the file system {mount_of(folder)} is full: {folder}" if room < ROOM_BYTES else ""


def _no_locks_message(folder: Path) -> str:
    return f"the file system {mount_of(folder)} has no locks: {folder}"


@functools.cache
def _no_locks(folder: Path) -> str:
    """An error message if the file system has no locks, else "". It locks .gitignore, which no other code locks."""
    try:
        with open_regular(folder / ".gitignore") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _no_locks_message(folder) if error.errno in NO_LOCKS else ""
    except ValueError:
        pass
    return ""


@contextmanager
def _lock_file(path: Path) -> Iterator[int]:
    """Open or create a lock file, and refuse a link: it may be somebody's link to another file."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise LabctlError(f"not a plain file: {path}", "remove it") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise LabctlError(f"not a plain file: {path}", "remove it")
        yield handle
    finally:
        os.close(handle)


@functools.cache
def _private_copy(index: Path) -> Path:
    """A temporary copy of the database for this process. If the original is unreadable, the copy is new, built from the files."""
    import atexit
    import contextlib
    import sqlite3
    from urllib.parse import quote

    from labctl_orchestrator.store.connection import Connection

    size = index.stat().st_size if index.is_file() else 0
    place = tempfile.gettempdir()
    if shutil.disk_usage(place).free < 2 * size + 16 * ROOM_BYTES and os.access("/dev/shm", os.W_OK):  # noqa: S108
        place = "/dev/shm"  # noqa: S108  mkdtemp makes a private folder in it
    folder = tempfile.mkdtemp(prefix="labctl-", dir=place)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = Path(folder) / index.name
    how = "&immutable=1" if _no_locks(index.parent) else ""  # without locks nobody writes it
    if not index.is_file():
        return copy
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(
            sqlite3.connect(f"file:{quote(str(index))}?mode=ro{how}", uri=True, factory=Connection)
        ) as source,
    ):
        source.execute("VACUUM INTO ?", (str(copy),))
    return copy


def document_at(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is missing or unreadable."""
    try:
        document = read_json(path)
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def find(start: Path | None = None) -> Workspace | None:
    """LABCTL_HOME if it is set, else the nearest workspace at or above `start`. From now on this process creates files with its
    mode (see `follow_mode`)."""
    found = _find(start)
    if found is not None:
        found.follow_mode()
    return found


def _find(start: Path | None) -> Workspace | None:
    home = os.environ.get("LABCTL_HOME")
    if home:
        return Workspace(expand_home(home).absolute())
    start = (start or Path.cwd()).absolute()
    for folder in (start, *start.parents):
        if (folder / SETTINGS_FILE).exists() or (folder / DATA_FOLDER).is_dir():
            return Workspace(folder)
    return None


def existing() -> Workspace:
    """The workspace of the current folder. Raises WrongUseError if there is none, or it has no .labctl."""
    workspace = find()
    if workspace is None or not workspace.data.is_dir():
        where = Path.cwd() if workspace is None else workspace.root
        raise WrongUseError(
            f"no labctl workspace: {where}",
            "cd to the folder that you submitted from (or set LABCTL_HOME to it), or make one: labctl init",
        )
    return workspace
