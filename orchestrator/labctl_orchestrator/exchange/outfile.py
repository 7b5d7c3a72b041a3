"""The file that a person names with -o: it is there when it is whole, and never in the place of what labctl keeps."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import LabctlError, WrongUseError
from labctl_workers.record import atomic_replace


def checked_path(path: Path, workspace: Workspace, example: str) -> Path:
    """The path. Raises WrongUseError if no file can be written there, or labctl owns the file. `example`: a file name."""
    if path.is_dir():
        raise WrongUseError(f"output path is a folder: {path}", f"give a file, such as -o {path / example}")
    if not path.absolute().parent.is_dir():
        raise WrongUseError(f"no such folder: {path.parent}", f"create it: mkdir -p {path.parent}")
    real, data = Path(os.path.realpath(path)), Path(os.path.realpath(workspace.data))
    if real.is_relative_to(data) or real == Path(os.path.realpath(workspace.settings_file)):
        raise WrongUseError(
            f"output path is a file of the workspace: {path}", f"give another file, such as -o {example}"
        )
    return path


MOST_LINKS = 40  # Linux' limit


@contextmanager
def output_file(path: Path, *, binary: bool) -> Iterator[IO[Any]]:
    """A file that replaces `path` when it is complete; an error leaves no file. Text is UTF-8 with unchanged line ends. A link's
    target is replaced. A pipe, a device or an open file (/dev/stdout) is written directly."""
    encoding, newline = (None, None) if binary else ("utf-8", "")
    kind = "b" if binary else ""
    there = _mode_of(path)
    if (there is not None and not stat.S_ISREG(there)) or _is_open_here(path):
        try:
            with open(path, f"a{kind}", encoding=encoding, newline=newline, opener=_open_with_reader) as file:
                yield file
        except BrokenPipeError:
            raise LabctlError(f"output pipe closed early: {path}", "read it to its end") from None
        return
    permissions = None if there is None else stat.S_IMODE(there)
    with atomic_replace(Path(os.path.realpath(path)), f"w{kind}", permissions=permissions, encoding=encoding,
                             newline=newline) as file:  # fmt: skip
        yield file


READER_WITHIN_S = 5.0


def _open_with_reader(path: str, flags: int) -> int:
    """An `opener`, which waits READER_WITHIN_S for the reader of a pipe. Raises LabctlError without one."""
    until = time.monotonic() + READER_WITHIN_S
    while True:
        try:
            handle = os.open(path, flags | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > until:
                raise LabctlError(f"no program reads the pipe: {path}", f"start one, such as cat {path}") from None
            time.sleep(0.05)
        else:
            os.set_blocking(handle, True)
            return handle


def _is_open_here(path: Path) -> bool:
    """Whether the path names an open file of this process: /dev/stdout, /dev/fd/1 or a link to them."""
    folder = Path(os.path.realpath("/dev/fd"))  # /proc/PID/fd
    for _ in range(MOST_LINKS):
        if Path(os.path.realpath(path.parent)) == folder:
            return True
        if not path.is_symlink():
            return False
        path = path.parent / path.readlink()
    return False


def _mode_of(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None
