"""SHA-256 of every byte of files, in parallel; the hash of a large file is remembered as long as the file stays as it is."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import platformdirs

from labctl_slurm.errors import PreflightError
from labctl_workers.record import read_json, write_json

CHUNK_BYTES = 16 << 20
READ_BYTES = 1 << 20  # stays in a core's cache between reading and hashing
MOST_THREADS = 8
# A smaller file is read again each time: that takes a millisecond.
REMEMBERED_FROM_BYTES = 1 << 20
# Clocks of file systems may tick every 2 s: a file that was written just now may change and keep its times.
SETTLED_AFTER_S = 2.0
MOST_REMEMBERED = 10_000
# Hashes that were made in another way are not taken for these.
ALGORITHM = "sha256 of the sha256 of each 16 MiB"

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class _FileIdentity(NamedTuple):
    """What a file is known by. Not its device: the number of a network file system differs between nodes and mounts. The
    change time, which no program can set, takes its place."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def cache_file() -> Path:
    """Where hashes are remembered, in the user's cache folder."""
    return Path(platformdirs.user_cache_dir("labctl")) / "file-hashes.json"


def file_hashes(files: Sequence[Path], progress: Progress | None = None) -> list[str]:
    """The hash of each file as hexadecimal digits: SHA-256 of the SHA-256 digests of its chunks of 16 MiB.

    Hashes of files that were finished are remembered even where a later file fails. Raises PreflightError for a file that
    changes while it is read, OSError for one that cannot be read.
    """
    known = _remembered()
    identities = list(map(_identity, files))
    found = {one: known[one] for one in identities if one in known}
    unread = [one for one in dict.fromkeys(identities) if one not in found]
    try:
        _read(unread, found, progress or (lambda done, total: None))
    finally:
        _remember({one: found[one] for one in unread if one in found and _may_be_remembered(one)})
    return [found[one] for one in identities]


def _identity(file: Path) -> _FileIdentity:
    stat = file.stat()
    return _FileIdentity(str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def _read(files: Sequence[_FileIdentity], found: dict[_FileIdentity, str], progress: Progress) -> None:
    """Hash these files, one after the other, their chunks at the same time; hashlib and reads leave the GIL to others."""
    total, done = sum(file.size for file in files), 0
    pool = ThreadPoolExecutor(min(MOST_THREADS, 2 * (os.cpu_count() or 1)), thread_name_prefix="hash")
    try:
        chunks: list[tuple[_FileIdentity, list[Future[bytes]]]] = [
            (file, [pool.submit(_digest, file, start) for start in range(0, file.size, CHUNK_BYTES)]) for file in files
        ]
        for file, futures in chunks:
            digest = hashlib.sha256()
            for number, future in enumerate(futures):
                digest.update(future.result())
                done += min(CHUNK_BYTES, file.size - number * CHUNK_BYTES)
                progress(done, total)
            if _identity(Path(file.path)) != file:
                raise _changes(file)
            found[file] = digest.hexdigest()
    finally:
        pool.shutdown(cancel_futures=True)


_buffers = threading.local()


def _digest(file: _FileIdentity, start: int) -> bytes:
    """SHA-256 of the chunk that begins at this byte."""
    if not hasattr(_buffers, "bytes"):
        _buffers.bytes = memoryview(bytearray(READ_BYTES))
    buffer: memoryview = _buffers.bytes
    digest = hashlib.sha256()
    left = min(CHUNK_BYTES, file.size - start)
    with Path(file.path).open("rb", buffering=0) as content:
        content.seek(start)
        while left:
            count = content.readinto(buffer[: min(left, READ_BYTES)])
            if not count:
                raise _changes(file)
            digest.update(buffer[:count])
            left -= count
    return digest.digest()


def _changes(file: _FileIdentity) -> PreflightError:
    return PreflightError(f"{file.path} changes while it is read", "submit when its copy or download is finished")


# ---------------------------------------------------------------- the cache


def _may_be_remembered(file: _FileIdentity) -> bool:
    settled = time.time_ns() - SETTLED_AFTER_S * 1e9
    return file.size >= REMEMBERED_FROM_BYTES and max(file.mtime_ns, file.ctime_ns) <= settled


def _remembered() -> dict[_FileIdentity, str]:
    """Empty where there is no cache, or a damaged one: then everything is read once more."""
    try:
        content = read_json(cache_file())
        if content["algorithm"] != ALGORITHM:
            return {}
        entries = {_FileIdentity(path, *map(int, numbers)): str(sha256) for path, numbers, sha256 in content["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return {file: sha256 for file, sha256 in entries.items() if len(sha256) == hashlib.sha256().digest_size * 2}


def _remember(hashes: dict[_FileIdentity, str]) -> None:
    if not hashes:
        return
    paths = {file.path for file in hashes}
    before = {file: sha256 for file, sha256 in _remembered().items() if file.path not in paths}
    latest = list({**before, **hashes}.items())[-MOST_REMEMBERED:]
    content = {"algorithm": ALGORITHM, "files": [(path, numbers, sha256) for (path, *numbers), sha256 in latest]}
    with contextlib.suppress(OSError):  # without a place to remember it, it is read again
        write_json(cache_file(), content, durable=False)
