"""SHA-256 of files, in parallel, with a cache for large files that do not change."""

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
READ_BYTES = 1 << 20  # fits in a core's cache
MOST_THREADS = 8
# Hashing a smaller file takes a millisecond.
CACHED_FROM_BYTES = 1 << 20
# Clocks of file systems may tick every 2 s: a younger file may change and keep its times.
SETTLED_AFTER_S = 2.0
MOST_CACHED = 10_000
# Version of the cache: hashes of other algorithms are ignored.
ALGORITHM = "sha256 of the sha256 of each 16 MiB"

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class _FileIdentity(NamedTuple):
    """The cache key of a file. It has no device number, because that of a network file system differs between nodes, but the
    change time, which no program can set."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def cache_file() -> Path:
    """The cache of hashes, in the user's cache folder."""
    return Path(platformdirs.user_cache_dir("labctl")) / "file-hashes.json"


def file_hashes(files: Sequence[Path], progress: Progress | None = None) -> list[str]:
    """The hash of each file in hexadecimal: SHA-256 of the SHA-256 digests of its chunks of 16 MiB.

    Hashes of completed files are cached even if a later file fails. Raises PreflightError for a file that changes during
    reading, OSError for an unreadable one.
    """
    known = _cached()
    identities = list(map(_identity, files))
    found = {one: known[one] for one in identities if one in known}
    unread = [one for one in dict.fromkeys(identities) if one not in found]
    try:
        _read(unread, found, progress or (lambda done, total: None))
    finally:
        settled = time.time_ns() - SETTLED_AFTER_S * 1e9
        _cache({
            one: found[one] for one in unread
            if one in found and one.size >= CACHED_FROM_BYTES and max(one.mtime_ns, one.ctime_ns) <= settled
        })  # fmt: skip
    return [found[one] for one in identities]


def _identity(file: Path) -> _FileIdentity:
    stat = file.stat()
    return _FileIdentity(str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def _read(files: Sequence[_FileIdentity], found: dict[_FileIdentity, str], progress: Progress) -> None:
    """Hash the files one by one, the chunks of each in parallel: hashlib and reads release the GIL."""
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
    return PreflightError(f"file changes during reading: {file.path}", "submit when its copy or download has finished")


# ---------------------------------------------------------------- the cache


def _cached() -> dict[_FileIdentity, str]:
    """The cached hashes; empty if the cache is missing or damaged."""
    try:
        content = read_json(cache_file())
        if content["algorithm"] != ALGORITHM:
            return {}
        entries = {_FileIdentity(path, *map(int, numbers)): str(sha256) for path, numbers, sha256 in content["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return {file: sha256 for file, sha256 in entries.items() if len(sha256) == hashlib.sha256().digest_size * 2}


def _cache(hashes: dict[_FileIdentity, str]) -> None:
    if not hashes:
        return
    paths = {file.path for file in hashes}
    before = {file: sha256 for file, sha256 in _cached().items() if file.path not in paths}
    latest = list({**before, **hashes}.items())[-MOST_CACHED:]
    content = {"algorithm": ALGORITHM, "files": [(path, numbers, sha256) for (path, *numbers), sha256 in latest]}
    with contextlib.suppress(OSError):  # without a cache, labctl reads the files again
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_json(cache_file(), content, durable=False)
