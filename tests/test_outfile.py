"""The file that a person names with -o: of export, report and bundle alike."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from labctl_orchestrator.exchange import outfile

from .conftest import Labctl, Records, files_below

COMMANDS = (("export", "--format", "csv"), ("report",), ("bundle",))
by_command = pytest.mark.parametrize("command", COMMANDS, ids=[command[0] for command in COMMANDS])


@pytest.fixture
def measured(records: Records) -> Records:
    batch = records.submit(name="lengths")
    records.done(batch, records.attempt(batch))
    return records


@by_command
def test_a_file_gets_the_rights_that_a_new_file_gets_and_keeps_those_it_has(
    labctl: Labctl, measured: Records, command: tuple[str, ...]
) -> None:
    Path("plain").touch()
    private = Path("private")
    private.touch(0o600)
    for name in ("new", "private"):
        assert labctl(*command, "-o", name).code == 0
        assert Path(name).stat().st_size > 0
    assert stat.S_IMODE(Path("new").stat().st_mode) == stat.S_IMODE(Path("plain").stat().st_mode)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600


@by_command
def test_what_a_link_leads_to_is_written_and_the_link_stays(
    labctl: Labctl, measured: Records, command: tuple[str, ...]
) -> None:
    Path("elsewhere").mkdir()
    for name in ("there", "not-yet"):
        Path(f"link-{name}").symlink_to(f"elsewhere/{name}")
    Path("elsewhere/there").write_text("before")
    for name in ("there", "not-yet"):
        assert labctl(*command, "-o", f"link-{name}").code == 0
        assert Path(f"link-{name}").is_symlink()
        assert Path(f"elsewhere/{name}").stat().st_size > len("before")
    assert sorted(path.name for path in Path("elsewhere").iterdir()) == ["not-yet", "there"]


@by_command
def test_a_pipe_is_written_to_and_stays_a_pipe(labctl: Labctl, measured: Records, command: tuple[str, ...]) -> None:
    os.mkfifo("pipe")
    heard: list[bytes] = []
    reader = threading.Thread(target=lambda: heard.append(Path("pipe").read_bytes()), daemon=True)
    reader.start()
    assert labctl(*command, "-o", "pipe").code == 0
    reader.join(timeout=20)
    assert len(heard[0]) > 100
    assert stat.S_ISFIFO(Path("pipe").stat().st_mode)


@by_command
def test_a_full_device_is_one_message_and_stays_a_device(
    labctl: Labctl, measured: Records, command: tuple[str, ...]
) -> None:
    ran = labctl(*command, "-o", "/dev/full")
    assert ran.code == 5
    assert "No space left on device" in ran.err
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


@by_command
@pytest.mark.parametrize("own", [".labctl/labctl-11.db", ".labctl/new.csv", "labctl.toml", "link"])
def test_what_labctl_keeps_is_never_written_over(
    labctl: Labctl, measured: Records, command: tuple[str, ...], own: str
) -> None:
    Path("labctl.toml").touch()
    Path("link").symlink_to(".labctl/labctl-11.db")
    labctl("status")
    before = files_below(measured.workspace.root)
    ran = labctl(*command, "-o", own)
    assert ran.code == 2
    assert "output path is a file of the workspace" in ran.err
    assert files_below(measured.workspace.root) == before


@by_command
@pytest.mark.parametrize(("path", "said"), [(".", "output path is a folder: ."), ("nowhere/x", "mkdir -p nowhere")])
def test_where_no_file_can_be_is_said_before_anything_is_read(
    labctl: Labctl, measured: Records, command: tuple[str, ...], path: str, said: str
) -> None:
    ran = labctl(*command, "-o", path)
    assert ran.code == 2
    assert said in ran.err


LABCTL = (sys.executable, "-c", "from labctl_orchestrator.cli import main; main()")


@by_command
@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1"])
def test_standard_output_can_be_named_as_a_file(measured: Records, command: tuple[str, ...], path: str) -> None:
    done = subprocess.run([*LABCTL, *command, "-o", path], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 100


@by_command
def test_a_plain_file_below_dev_is_replaced_like_any_other(
    labctl: Labctl, measured: Records, command: tuple[str, ...]
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        target = Path(folder) / "there"
        target.write_text("before\n")
        link = Path(folder) / "link"
        link.symlink_to("there")
        for path in (target, target, link):
            assert labctl(*command, "-o", path).code == 0
        Path("here").touch()
        assert labctl(*command, "-o", "here").code == 0
        assert len(target.read_bytes()) == len(Path("here").read_bytes())
        assert not target.read_bytes().startswith(b"before")


def test_what_is_appended_to_keeps_what_it_had(measured: Records) -> None:
    there = Path("there.csv")
    there.write_text("before\n")
    with there.open("a") as file:
        done = subprocess.run(
            [*LABCTL, "export", "--format", "csv", "-o", "/dev/stdout"],
            stdout=file,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    lines = there.read_text().splitlines()
    assert (lines[0], len(lines)) == ("before", 3)


@by_command
def test_links_in_a_circle_are_one_message(labctl: Labctl, measured: Records, command: tuple[str, ...]) -> None:
    Path("circle").symlink_to("circle")
    ran = labctl(*command, "-o", "circle")
    assert ran.code == 5
    assert "Too many levels of symbolic links" in ran.err


def test_a_pipe_that_nobody_reads_is_an_error(
    labctl: Labctl, measured: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outfile, "READER_WITHIN_S", 0.1)
    os.mkfifo("pipe")
    ran = labctl("export", "--format", "csv", "-o", "pipe")
    assert (ran.code, "no program reads the pipe: pipe" in ran.err) == (5, True), ran.err


def test_a_reader_that_leaves_a_pipe_is_told_as_a_failure(labctl: Labctl, records: Records) -> None:
    batch = records.submit(lengths=range(1, 400))
    attempt = records.attempt(batch)
    for run in batch.runs:
        records.done(batch, attempt, run)
    os.mkfifo("pipe")

    def read_a_little() -> None:
        with Path("pipe").open("rb") as file:
            file.read(10)

    reader = threading.Thread(target=read_a_little, daemon=True)
    reader.start()
    ran = labctl("export", "--format", "csv", "-o", "pipe")
    assert ran.code == 5
    assert "output pipe closed early" in ran.err


def test_nothing_is_left_of_a_file_that_is_not_whole(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("before")
    with pytest.raises(ValueError, match="half"), outfile.output_file(there, binary=False) as file:
        file.write("half")
        raise ValueError("half")
    assert files_below(tmp_path) == {"there": b"before"}
