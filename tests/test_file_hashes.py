"""Hashes of large files: every byte counts, and a file is read once as long as it stays as it is."""

from __future__ import annotations

import hashlib
import os
import pty
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labctl_orchestrator.models import file_hashes as module
from labctl_orchestrator.models.file_hashes import CHUNK_BYTES, READ_BYTES, cache_file, file_hashes
from labctl_orchestrator.models.resolve import of_folder
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import PreflightError

from .conftest import refused

SIZE = 2 * CHUNK_BYTES + 4099  # two chunks and a part of one


@pytest.fixture
def large(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of three chunks that counts as settled at once."""
    monkeypatch.setattr(module, "SETTLED_AFTER_S", 0.0)
    path = workspace.root / "model.safetensors"
    path.write_bytes(os.urandom(4096) * (SIZE // 4096) + b"end")
    return path


Read = Callable[[], list[str]]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the chunks that were read from disk."""
    paths: list[str] = []
    digest = module._digest

    def noted(file: module._Identity, start: int) -> bytes:
        paths.append(file.path)
        return digest(file, start)

    monkeypatch.setattr(module, "_digest", noted)
    return paths


def by_definition(content: bytes) -> str:
    chunks = (content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES))
    return hashlib.sha256(b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)).hexdigest()


@pytest.mark.parametrize("size", [0, 1, READ_BYTES + 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES - 1])
def test_a_hash_is_that_of_its_definition(workspace: Workspace, size: int) -> None:
    path = workspace.root / "file"
    content = (os.urandom(1021) * (size // 1021 + 1))[:size]
    path.write_bytes(content)
    assert file_hashes([path]) == [by_definition(content)]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, SIZE - 4096), st.integers(0, 7))
def test_any_bit_anywhere_counts(large: Path, place: int, bit: int) -> None:
    (before,) = file_hashes([large])
    with large.open("r+b") as file:
        file.seek(place)
        was = file.read(1)
        file.seek(place)
        file.write(bytes([was[0] ^ 1 << bit]))
    (changed,) = file_hashes([large])
    with large.open("r+b") as file:
        file.seek(place)
        file.write(was)
    assert changed != before
    assert file_hashes([large]) == [before]


def test_a_copy_with_one_matrix_replaced_is_another_model(checkpoint: Path) -> None:
    """The matrix lies where the sampled blocks of an earlier fingerprint did not look: 48 tensors of 1 MiB."""
    tensors, size = 48, 1 << 20
    header = b'{"__metadata__":{}}'
    (checkpoint / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + b"".join(bytes([number]) * size for number in range(tensors))
    )
    seen = {of_folder(checkpoint).fingerprint}
    for number in range(0, tensors, 7):
        copy = shutil.copytree(checkpoint, checkpoint.parent / f"edited-{number}")
        with (copy / "model.safetensors").open("r+b") as weights:
            weights.seek(8 + len(header) + number * size + size // 3)
            weights.write(b"\xff" * 1000)
        seen.add(of_folder(copy).fingerprint)
    assert len(seen) == 1 + len(range(0, tensors, 7))


# ---------------------------------------------------------------- remembered


def test_a_file_is_read_once(large: Path, read: list[str]) -> None:
    first = file_hashes([large])
    assert len(read) == 3
    assert file_hashes([large]) == first
    assert len(read) == 3


def test_a_small_file_is_not_remembered(large: Path, read: list[str]) -> None:
    small = large.with_name("config.json")
    small.write_text("{}", encoding="utf-8")
    file_hashes([small])
    assert not cache_file().exists()


def test_a_file_that_was_written_just_now_is_not_remembered(
    large: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may change again within one tick of its file system's clock."""
    monkeypatch.setattr(module, "SETTLED_AFTER_S", 3600.0)
    file_hashes([large])
    file_hashes([large])
    assert len(read) == 6


def test_other_content_with_the_old_size_and_time_is_seen(large: Path) -> None:
    """`cp -p`, `rsync -t` and `touch -r` set a file's time; none sets the time of its last change."""
    before, stat = file_hashes([large]), large.stat()
    large.write_bytes(bytes(stat.st_size))
    os.utime(large, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_hashes([large]) != before


def test_another_file_moved_to_the_name_is_seen(large: Path) -> None:
    before, stat = file_hashes([large]), large.stat()
    other = large.with_name("other")
    other.write_bytes(bytes(stat.st_size))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(large)
    assert file_hashes([large]) != before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"algorithm": "sha256 of the sha256 of each 16 MiB"}',
    b'{"algorithm": "sha256 of the sha256 of each 16 MiB", "files": [["x", [1], "y"]]}',
    b'{"algorithm": "md5", "files": []}', b"\xff\xfe\x00"])  # fmt: skip
def test_a_damaged_cache_is_ignored_and_made_anew(large: Path, read: list[str], content: bytes) -> None:
    cache_file().parent.mkdir(parents=True, exist_ok=True)
    cache_file().write_bytes(content)
    first = file_hashes([large])
    assert file_hashes([large]) == first
    assert len(read) == 3


def test_a_cache_that_cannot_be_written_only_costs_time(large: Path, read: list[str]) -> None:
    cache_file().parent.parent.mkdir(parents=True, exist_ok=True)
    cache_file().parent.write_text("a file where the folder would be", encoding="utf-8")
    assert file_hashes([large]) == file_hashes([large])
    assert len(read) == 6


def test_what_is_finished_is_remembered_when_a_later_file_fails(large: Path, read: list[str]) -> None:
    other = large.with_name("other")
    other.write_bytes(bytes(SIZE))
    grows = threading.Event()

    def progress(done: int, total: int) -> None:
        if done > SIZE and not grows.is_set():
            grows.set()
            with other.open("ab") as file:
                file.write(b"more")

    assert (
        "file changes during reading" in refused(lambda: file_hashes([large, other], progress), PreflightError).message
    )
    read.clear()
    file_hashes([large])
    assert read == []


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = module._identity(large)
    os.truncate(large, CHUNK_BYTES)
    assert "changes" in refused(lambda: module._digest(identity, 2 * CHUNK_BYTES), PreflightError).message


def test_progress_ends_with_all_bytes(large: Path) -> None:
    told: list[tuple[int, int]] = []
    file_hashes([large], lambda done, total: told.append((done, total)))
    size = large.stat().st_size
    assert told[-1] == (size, size)
    assert told == sorted(told)


# ---------------------------------------------------------------- shown


TELL = """
import sys, time
from labctl_orchestrator.terminal.tables import bytes_read
with bytes_read("reading model") as tell:
    for done in range(1, 9):
        time.sleep(float(sys.argv[1]))
        tell(done * 10**9, 8 * 10**9)
print("end")
"""


def seen_on_a_terminal(seconds: float) -> str:
    """What is written to a terminal by eight steps of this length."""
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", TELL, str(seconds)],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    ) as process:
        os.close(follower)
        seen = b""
        while part := read_of(leader):
            seen += part
        os.close(leader)
    assert process.returncode == 0
    return seen.decode()


def read_of(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""


def test_a_bar_shows_on_a_terminal_what_takes_longer_than_a_second(workspace: Workspace) -> None:
    seen = seen_on_a_terminal(0.3)
    assert "reading model" in seen
    assert "8.0/8.0 GB" in seen


def test_nothing_is_shown_of_what_is_quick_nor_in_a_pipe(workspace: Workspace) -> None:
    assert seen_on_a_terminal(0.0) == "end\r\n"
    piped = subprocess.run([sys.executable, "-c", TELL, "0.2"], capture_output=True, text=True, check=True)
    assert (piped.stdout, piped.stderr) == ("end\n", "")
