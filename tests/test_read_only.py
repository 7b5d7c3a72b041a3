"""Somebody else's workspace: it is read whole, also what its database does not have yet, and nothing in it is written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Ran, Records, files_below

# Root may write anywhere, unless this right is taken from it.
WITHOUT_THE_RIGHT = ("/usr/bin/setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-dac_override")


@pytest.fixture
def foreign(records: Records) -> Iterator[Records]:
    """A workspace with a measured run in its database, one more in its files, and no right to write."""
    for name, length in (("first", 16), ("second", 32)):
        batch = records.submit(name=name, lengths=(length,))
        records.done(batch, records.attempt(batch))
        if name == "first":
            records.collect()
    folders = [records.workspace.data, *(path for path in records.workspace.data.rglob("*") if path.is_dir())]
    for path in [*records.workspace.data.rglob("*"), *folders]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield records
    for folder in folders:
        folder.chmod(0o755)


def by_somebody(*arguments: str) -> Ran:
    command = [sys.executable, "-c", "from labctl_orchestrator.cli import main; main()", *arguments]
    if os.geteuid() == 0:
        command = [*WITHOUT_THE_RIGHT, *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


READ = "1 new record read but not stored"


@pytest.mark.parametrize(
    "command",
    ["status --all", "compare --all", "show second", "matrix", "query 'SELECT * FROM runs'", "export", "collect"],
)
def test_what_the_database_does_not_have_is_read_from_the_files(foreign: Records, command: str) -> None:
    before = files_below(foreign.workspace.data)
    ran = by_somebody(*command.replace("'", "").split(" ", maxsplit=1 if command.startswith("query") else -1))
    assert ran.code == 0, ran.err
    assert READ in ran.err
    assert files_below(foreign.workspace.data) == before


def test_both_runs_are_exported(foreign: Records) -> None:
    assert {row["max_new_tokens"] for row in by_somebody("export", "--json").json} == {16, 32}


def test_nothing_of_it_is_left_in_the_temporary_folder(foreign: Records, tmp_path: Path) -> None:
    by_somebody("status")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_where_there_is_no_workspace_yet_none_is_copied(records: Records, checkpoint: Path, tmp_path: Path) -> None:
    ran = by_somebody("submit", "-p", "local", "--model-id", str(checkpoint), "--dry-run")
    assert ran.code == 0, ran.err
    assert not records.workspace.data.exists()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_what_is_not_kept_is_said_on_standard_output_too(foreign: Records) -> None:
    assert f"database not updated: no write permission: {foreign.workspace.data}" in by_somebody("collect").out


def test_a_database_that_nobody_made_yet_is_made_for_the_answer(foreign: Records) -> None:
    foreign.workspace.data.chmod(0o755)
    foreign.workspace.index.unlink()
    foreign.workspace.data.chmod(0o555)
    ran = by_somebody("status", "--all", "--json")
    assert len(ran.json) == 2
    assert not foreign.workspace.index.exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("submit -p local --model-id checkpoint", "work in a folder of your own"),
        ("collect --rebuild", "ask its owner to run this command"),
    ],
)
def test_what_would_write_is_refused_in_one_message(
    foreign: Records, checkpoint: Path, command: str, said: str
) -> None:
    before = files_below(foreign.workspace.data)
    ran = by_somebody(*command.replace("checkpoint", str(checkpoint)).split())
    assert ran.code != 0
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert files_below(foreign.workspace.data) == before
