"""How fast a checkpoint is hashed, beside SHA-256 by one thread and beside reading alone, in GB/s.

    python -m tests.benchmarks.hash_speed [--gigabytes 4] [--files 4] [--folder FOLDER]

Warm: the files are in the page cache. Cold: they are dropped from it before each reading, so the disk's speed counts.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from labctl_orchestrator.models import file_hashes as module
from labctl_orchestrator.models.file_hashes import CHUNK_BYTES, MOST_THREADS, file_hashes

BLOCK = 1 << 20


def write(folder: Path, files: int, size: int) -> list[Path]:
    """Files of bytes that no file system can compress."""
    paths = [folder / f"model-{number}.safetensors" for number in range(files)]
    for path in paths:
        with path.open("wb") as file:
            for _ in range(size // BLOCK):
                file.write(os.urandom(BLOCK))
            os.fsync(file.fileno())
    return paths


def drop(paths: Sequence[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def by_one_thread(paths: Sequence[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")


def read_alone(paths: Sequence[Path]) -> None:
    """The floor: the same threads and chunks, without hashing."""

    def read(path: Path, start: int) -> None:
        buffer = memoryview(bytearray(BLOCK))
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            left = CHUNK_BYTES
            while left > 0 and (count := file.readinto(buffer)):
                left -= count

    with ThreadPoolExecutor(min(MOST_THREADS, 2 * (os.cpu_count() or 1))) as pool:
        chunks = [(path, start) for path in paths for start in range(0, path.stat().st_size, CHUNK_BYTES)]
        list(pool.map(read, *zip(*chunks, strict=True)))


def labctls(paths: Sequence[Path]) -> None:
    module.cache_file().unlink(missing_ok=True)
    file_hashes(paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        paths = write(Path(folder), options.files, int(options.gigabytes * 1e9 / options.files))
        size = sum(path.stat().st_size for path in paths)
        ways: dict[str, Callable[[Sequence[Path]], None]] = {
            "labctl": labctls,
            "sha256, one thread": by_one_thread,
            "reading alone": read_alone,
        }
        print(f"{size / 1e9:.1f} GB in {len(paths)} files, {os.cpu_count()} CPUs")
        for state in ("warm", "cold"):
            for name, way in ways.items():
                if state == "cold":
                    drop(paths)
                else:
                    read_alone(paths)
                started = time.perf_counter()
                way(paths)
                print(f"{state}  {name:20}{size / 1e9 / (time.perf_counter() - started):6.2f} GB/s", flush=True)
        time.sleep(module.SETTLED_AFTER_S)
        file_hashes(paths)
        started = time.perf_counter()
        file_hashes(paths)
        print(f"remembered: {(time.perf_counter() - started) * 1000:.1f} ms")


if __name__ == "__main__":
    main()
