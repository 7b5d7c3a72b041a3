"""A workspace on a full disk, or on one without locks: it is read whole, `clean` frees space, and the file system is named."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.preflight import local_checks
from labctl_orchestrator.store import collect as collecting
from labctl_orchestrator.store.collect import rebuild
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.store.workspace import Workspace

from .conftest import Labctl, Records, refused

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")


@pytest.fixture
def small(workspace: Workspace) -> Iterator[Records]:
    """A workspace with a measured run in its index, on a file system of 4 MB."""
    programs = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(workspace.root)]
    if subprocess.run(mount, capture_output=True, check=False, env=programs).returncode:
        pytest.skip("nothing may be mounted here")
    before = Path.cwd()
    try:
        os.chdir(workspace.root)
        yield measured_and_logged(Records(workspace))
    finally:
        os.chdir("/")
        subprocess.run(["umount", "-l", str(workspace.root)], check=True, env=programs)
        os.chdir(before)


def measured_and_logged(records: Records) -> Records:
    batch = records.submit(name="first")
    records.done(batch, records.attempt(batch))
    records.states(batch, state="COMPLETED", ended_at="2026-01-01T00:00:00Z", exit_code="0:0")
    logs = batch.folder / "submitit"
    logs.mkdir()
    (logs / "1000_0_log.out").write_bytes(b"x" * 2**20)
    records.collect()
    return records


def fill(folder: Path) -> None:
    """Write until there is no byte of room."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC


READERS = ["status --all", "compare --all", "show {run}", "matrix", "export", "du", "logs {run}", "collect",
           "report --all -o {elsewhere}"]  # fmt: skip


@NEEDS_ROOT
@pytest.mark.parametrize("new", [False, True], ids=["nothing-new", "a-new-record"])
@pytest.mark.parametrize("command", READERS)
def test_every_reading_command_works_on_a_full_disk(small: Records, labctl: Labctl, command: str, new: bool) -> None:
    batch = small.submit("2000", name="second", lengths=(32,))
    if new:
        small.done(batch, small.attempt(batch))
    fill(small.workspace.root)
    run, elsewhere = batch.runs[0].run_id if new else first_run(small), small.workspace.root.parent / "report.html"
    ran = labctl(*command.format(run=run, elsewhere=elsewhere).split())
    assert ran.code == 0, ran.err
    if command != "du":
        assert f"the file system {small.workspace.root} is full" in ran.err


def first_run(records: Records) -> str:
    with closing(open_store(records.workspace)) as store:
        ((run_id,),) = store.tuples("SELECT run_id FROM results")
    return str(run_id)


@NEEDS_ROOT
def test_clean_frees_a_full_disk(small: Records, labctl: Labctl) -> None:
    fill(small.workspace.root)
    ran = labctl("clean", "--yes")
    assert ran.code == 0, ran.err
    assert not list(small.workspace.arrays.glob("*/submitit"))


@NEEDS_ROOT
def test_a_rebuild_on_a_full_disk_names_it_and_leaves_the_database(small: Records, labctl: Labctl) -> None:
    before = small.workspace.index.read_bytes()
    fill(small.workspace.root)
    ran = labctl("collect", "--rebuild")
    assert ran.code == 5
    assert f"the file system {small.workspace.root} is full" in ran.err
    assert "labctl clean frees space" in ran.err
    assert small.workspace.index.read_bytes() == before


@NEEDS_ROOT
def test_a_quota_that_is_met_in_a_transaction_ends_no_command(
    small: Records, labctl: Labctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a quota, which the free space of the file system does not tell: the room is looked at before the disk is full."""
    monkeypatch.setattr("labctl_orchestrator.store.workspace.ROOM_BYTES", 0)
    batch = small.submit("2000", name="second", lengths=(32,))
    small.done(batch, small.attempt(batch))
    fill(small.workspace.root)
    ran = labctl("status", "--all", "--json")
    assert (ran.code, len(ran.json)) == (0, 2), ran.err
    assert "disk is full" in ran.err


def test_a_rebuild_while_another_process_holds_the_database_is_refused(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time to wait is shortened from 60 s."""
    monkeypatch.setattr(collecting, "BUSY_FOR_S", 0.1)
    records.submit()
    records.collect()
    with closing(sqlite3.connect(records.workspace.index, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        holder.execute("INSERT INTO texts VALUES ('a', 'b')")
        assert "another process is writing" in refused(lambda: rebuild(records.workspace)).message
        holder.execute("COMMIT")
        assert holder.execute("SELECT text FROM texts WHERE text_id = 'a'").fetchall() == [("b",)]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_read_and_named(
    labctl: Labctl, records: Records, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The fault is injected: locks of Python are refused, as on Lustre without -o flock."""
    batch = records.submit(name="first")
    records.done(batch, records.attempt(batch))

    def lockf(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    ran = labctl("status", "--all")
    assert ran.code == 0, ran.err
    assert "has no locks" in ran.err
    assert not records.workspace.index.exists()
    error = refused(lambda: records.workspace.lock().__enter__())
    assert "has no locks" in error.message
    assert "move the workspace" in error.remedy
    assert "move the workspace" in refused(lambda: rebuild(records.workspace)).remedy


def test_a_first_submission_where_there_are_no_locks_says_so(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is injected, as above; nothing could be asked before there was a file."""

    def lockf(*arguments: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    records.workspace.data.mkdir()
    assert records.workspace.writable
    assert "has no locks" in refused(lambda: records.workspace.lock().__enter__()).message


@NEEDS_ROOT
def test_doctor_says_that_a_disk_is_full(small: Records) -> None:
    assert local_checks._room(small.workspace).level == "warn"  # 4 MB in all
    fill(small.workspace.root)
    check = local_checks._room(small.workspace)
    assert (check.level, check.text) == ("fail", f"0.0 GiB left for the workspace on {small.workspace.root}")
    assert "labctl clean" in check.remedy


@pytest.mark.parametrize("code", [None, errno.ENOSYS, errno.ENOLCK])
def test_doctor_says_whether_files_can_be_locked(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    """The fault is injected, as above."""

    def lockf(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code or 0))

    if code is not None:
        monkeypatch.setattr(fcntl, "lockf", lockf)
    (check,) = local_checks._locks(workspace)
    assert check.level == ("pass" if code is None else "fail")
    assert code is None or "has no locks" in check.text


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_plain_file_is_refused_and_nothing_truncated(records: Records, kind: str) -> None:
    records.workspace.create()
    lock, other = records.workspace.data / "workspace.lock", records.workspace.root / "other"
    other.write_text("somebody's", encoding="utf-8")
    {"link": lambda: lock.symlink_to(other), "pipe": lambda: os.mkfifo(lock), "folder": lock.mkdir}[kind]()
    assert "not a plain file" in refused(lambda: records.workspace.lock().__enter__()).message
    assert other.read_text(encoding="utf-8") == "somebody's"
