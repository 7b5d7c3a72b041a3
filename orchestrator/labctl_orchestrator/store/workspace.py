"""Where a workspace's files lie, and how it is found: like a git repository, from below."""

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
# Of the tables in the database, which `schema` has: one that another labctl made lies beside it and is left alone.
DATABASE_SCHEMA = 3


@dataclass(frozen=True)
class Workspace:
    """A folder with labctl.toml (a person's) and .labctl/ (labctl's).

    submissions/<id>.json          what was asked for
    arrays/<id>/array.json         one submission to Slurm: a job, or an array of them
    arrays/<id>/<n>.json           the JobSpec of its n-th job
    arrays/<id>/intent.json        written before sbatch is called
    arrays/<id>/submitted.json     written after it: the Slurm ids, or the refusal
    arrays/<id>/states.json        the last known state of each job
    arrays/<id>/given.json         which of its runs other jobs measure now
    arrays/<id>/attempts/, heartbeats/, submitit/     the worker's and submitit's
    results/<run>/<attempt>.json   the records
    imports/<origin>/<bundle>/     what a bundle brought, laid out as it was where it was measured
    import-*.partial/              a bundle that is being imported
    code/<hash>/                   the worker's code, as it was submitted
    doctor/, reserve/              jobs of doctor that found something wrong; how a reserved shell begins
    labctl-<schema>.db             an index of all these files
    metadata.json                  what its tables and columns mean, as Datasette reads it
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
        """The index; where the workspace cannot be written to, a copy of it, which this process alone brings up to date."""
        return self.index if self.writable else _own_copy(self.index)

    @property
    def writable(self) -> bool:
        """Whether labctl may write here. Where there is no workspace yet, it may."""
        return not self.hindrance

    @property
    def hindrance(self) -> str:
        """Why nothing is written here: somebody else's workspace or a snapshot, a full disk, no locks. Empty where labctl may."""
        if not self.data.exists():
            return ""
        return _HINDERED.get(self.data, "") or self._no_right or _no_room(self.data) or _no_locks(self.data)

    @property
    def _no_right(self) -> str:
        may = os.access(self.data, os.W_OK) and (os.access(self.index, os.W_OK) or not self.index.exists())
        return "" if may else f"{self.data} cannot be written to"

    def hinder(self, why: str) -> None:
        """Write nothing more here in this process: its own copy of the database is used instead. Raises LabctlError where the
        workspace is here no more."""
        check_present(self.data)
        _HINDERED[self.data] = f"{self.data}: {why}"

    @property
    def metadata(self) -> Path:
        return self.data / "metadata.json"

    @property
    def submissions(self) -> Path:
        return self.data / "submissions"

    @property
    def arrays(self) -> Path:
        return self.data / "arrays"

    def spec(self, job_id: str) -> Path:
        """The JobSpec of a job."""
        array_id, _, task = job_id.rpartition(".")
        return self.arrays / array_id / f"{task}.json"

    @property
    def results(self) -> Path:
        return self.data / "results"

    @property
    def imports(self) -> Path:
        return self.data / "imports"

    @property
    def code(self) -> Path:
        return self.data / "code"

    @property
    def cache(self) -> Path:
        """What engines compiled, by partition."""
        return self.data / "cache"

    @property
    def last_answer(self) -> Path:
        """When Slurm last answered: tells the age of the states that are known."""
        return self.data / "last-answer.json"

    @property
    def heard(self) -> Path:
        """When the last heartbeats of workers on other machines were first seen here."""
        return self.data / "heard.json"

    @contextmanager
    def turn(self, within_s: float = 60.0) -> Iterator[None]:
        """One labctl at a time: what is looked at inside is still so when something is decided by it. A killed labctl's turn
        ends with it. Raises LabctlError where another one's lasts longer than `within_s` seconds, or nothing may be written."""
        if self.data.exists() and self._no_right:
            raise LabctlError(self._no_right, "work in a folder of your own; this one can be read")
        self.create()
        with _lock_file(self.data / "turn.lock") as file:
            deadline = time.monotonic() + within_s
            while True:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as SQLite locks: it works where that does
                    break
                except OSError as error:
                    if error.errno in NO_LOCKS:
                        raise LabctlError(_without_locks(self.data), LOCKS_REMEDY) from None
                    if error.errno not in (errno.EAGAIN, errno.EACCES):
                        raise
                    if time.monotonic() > deadline:
                        raise LabctlError(
                            f"another labctl has been submitting from {self.root} for {within_s:.0f} s",
                            "try again when it is done; one that is stopped (Ctrl-Z) has to go on or be ended",
                        ) from None
                    time.sleep(0.02)
            yield

    def follow_mode(self) -> None:
        """Let the group write what this process makes where it may write the workspace."""
        follow_mode(self.data if self.data.is_dir() else self.root)

    def create(self) -> None:
        self.follow_mode()
        self.data.mkdir(parents=True, exist_ok=True)
        ignore = self.data / ".gitignore"
        if not ignore.exists():
            ignore.write_text("*\n", encoding="utf-8")


def check_present(data: Path) -> None:
    """Raise LabctlError where the workspace of this folder .labctl is here no more."""
    if not data.is_dir():
        raise LabctlError(
            f"{data.parent} was moved or removed while labctl read it", "run labctl again where it is now"
        )


_HINDERED: dict[Path, str] = {}
# A journal and the pages of a few new records.
ROOM_BYTES = 2**20
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
LOCKS_REMEDY = "move the workspace to a file system with locks; Lustre has them where it is mounted with -o flock"


def mount_of(path: Path) -> Path:
    """Where the file system of a file is mounted."""
    path = path.absolute()
    while not path.is_mount() and path != path.parent:
        path = path.parent
    return path


def _no_room(folder: Path) -> str:
    try:
        room = shutil.disk_usage(folder).free
    except OSError:
        return ""
    return f"{folder}: the file system {mount_of(folder)} is full" if room < ROOM_BYTES else ""


def _without_locks(folder: Path) -> str:
    return f"{folder}: the file system {mount_of(folder)} has no locks"


@functools.cache
def _no_locks(folder: Path) -> str:
    """Asked of a file that nothing else locks: SQLite waits a minute for a lock that no one holds."""
    try:
        with open_regular(folder / ".gitignore") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _without_locks(folder) if error.errno in NO_LOCKS else ""
    except ValueError:
        pass
    return ""


@contextmanager
def _lock_file(path: Path) -> Iterator[int]:
    """Open a lock, made where there is none. What it is, is never changed: it may be somebody's link to another file."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise LabctlError(f"{path} is not a plain file", "remove it") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise LabctlError(f"{path} is not a plain file", "remove it")
        yield handle
    finally:
        os.close(handle)


def _folder_with_room(wanted: int) -> str | None:
    """A folder for temporary files; None for the usual one."""
    shared_memory = Path("/dev/shm")  # noqa: S108  tempfile makes a folder of its own in it
    if shutil.disk_usage(tempfile.gettempdir()).free < wanted and os.access(shared_memory, os.W_OK):
        return str(shared_memory)
    return None


@functools.cache
def _own_copy(index: Path) -> Path:
    """A copy of the database that goes with this process; an empty one where it cannot be read: the files tell it all."""
    import atexit
    import contextlib
    import sqlite3
    from urllib.parse import quote

    size = index.stat().st_size if index.is_file() else 0
    folder = tempfile.mkdtemp(prefix="labctl-", dir=_folder_with_room(2 * size + 16 * ROOM_BYTES))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = Path(folder) / index.name
    how = "&immutable=1" if _no_locks(index.parent) else ""  # where nobody can lock, nobody writes
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{quote(str(index))}?mode=ro{how}", uri=True)) as source,
    ):
        source.execute("VACUUM INTO ?", (str(copy),))
    return copy


def document_at(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the workspace; empty where there is none that can be read."""
    try:
        document = read_json(path)
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def find(start: Path | None = None) -> Workspace | None:
    """LABCTL_HOME where it is set, else the nearest folder at or above `start` that is a workspace. What this process makes from
    now on follows its mode."""
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
    """The workspace here. Raises WrongUseError where there is none, or nothing was ever submitted in it."""
    workspace = find()
    if workspace is None or not workspace.data.is_dir():
        where = Path.cwd() if workspace is None else workspace.root
        raise WrongUseError(
            f"nothing was submitted from {where}", "go to the folder you submitted from, or set LABCTL_HOME to it"
        )
    return workspace
