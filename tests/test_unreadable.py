"""Any file of a workspace may be unreadable, no plain file, huge, of a newer schema, or nonsense: it is named and left out, and
all else works."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from labctl_workers.record import UnreadableError, read_bytes, read_json

from .conftest import JobArray, Labctl, Records, edit_json


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def nested(path: Path) -> None:
    path.write_text("[" * 100_000, encoding="utf-8")


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


Odd = Callable[[Path], None]
ODD: list[Odd] = [a_pipe, a_folder, a_loop, endless, huge, nested, no_text]


@pytest.fixture
def two(records: Records) -> tuple[JobArray, JobArray]:
    """Two measured runs, whose jobs have ended."""
    batches = records.submit("1000", name="first", lengths=(16,)), records.submit("2000", name="second", lengths=(32,))
    for batch in batches:
        records.done(batch, records.attempt(batch))
        records.states(batch, state="COMPLETED", ended_at="2026-01-01T00:00:00Z", exit_code="0:0")
    return batches


def record_of(records: Records, batch: JobArray) -> Path:
    (path,) = (records.workspace.results / batch.runs[0].run_id).iterdir()
    return path


# What is made odd, of the first batch -> whether its run is still done.
FILES: dict[str, bool] = {
    "record": False, "array.json": False, "0.json": True, "states.json": True, "submitted.json": True, "intent.json": True,
    "moved.json": True, "diagnoses.json": True, "heartbeats/0.json": True, "attempts/odd.json": True,
}  # fmt: skip


def file_of(records: Records, batch: JobArray, name: str) -> Path:
    return record_of(records, batch) if name == "record" else batch.folder / name


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.__name__)
@pytest.mark.parametrize("name", FILES)
def test_one_file_of_an_odd_kind_is_no_other_runs_trouble(
    labctl: Labctl, records: Records, two: tuple[JobArray, JobArray], name: str, odd: Odd
) -> None:
    path = file_of(records, two[0], name)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    odd(path)
    ran = labctl("status", "--all", "--json")
    assert ran.code == 0, ran.err
    states = {run["run_id"]: run["state"] for run in ran.json}
    assert states[two[1].runs[0].run_id] == "done"
    for command in ("compare --all", "matrix", "collect", "show " + two[1].runs[0].run_id, "clean --dry-run", "du"):
        assert labctl(*command.split()).code in (0, 2), command
    if name not in ("diagnoses.json", "heartbeats/0.json"):
        assert ran.err.count(f"{path}: ") == 1


@pytest.mark.parametrize("folder", ["results", "arrays", "submissions", "results/RUN", "arrays/ARRAY"])
def test_a_folder_that_is_a_file_is_named_or_gone(
    labctl: Labctl, records: Records, two: tuple[JobArray, JobArray], folder: str
) -> None:
    name = folder.replace("RUN", two[0].runs[0].run_id).replace("ARRAY", two[0].array_id)
    path = records.workspace.data / name
    shutil.rmtree(path)
    path.write_text("a file", encoding="utf-8")
    ran = labctl("status", "--all", "--json")
    assert ran.code == 0, ran.err


def change_at(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    document[path[0]] = change_at(document[path[0]], path[1:], value) if path[1:] else value
    return document


NONSENSE: list[tuple[str, tuple[Any, ...], Any]] = [
    ("record", ("ended_at",), None),
    ("record", ("ended_at",), "2026-13-01T00:00:00Z"),
    ("record", ("ended_at",), "2026-01-01T00:00:00"),
    ("record", ("load_s",), "text"),
    ("record", ("status",), "odd"),
    ("record", ("repeats", 0, "samples", 0, "token_ids"), "text"),
    ("record", ("attempt", "attempt_id"), -1),
    ("record", ("fingerprint", "gpus"), [{"name": None}]),
    ("record", ("fingerprint", "packages"), ["torch"]),
    ("record", ("fingerprint", "environment"), None),
    ("record", ("fingerprint", "cpus"), {"model": "x"}),
    ("record", ("fingerprint", "script"), {"setup": 5}),
    ("0.json", ("model",), -1),
    ("0.json", ("runs", 0, "prompt_set"), "none"),
    ("array.json", ("created_at",), 5),
    ("submitted.json", ("at",), "yesterday"),
]


@pytest.mark.parametrize(("name", "leaf", "value"), NONSENSE)
def test_a_value_of_another_type_is_named_and_left_out(
    labctl: Labctl, records: Records, two: tuple[JobArray, JobArray], name: str, leaf: tuple[Any, ...], value: Any
) -> None:
    path = file_of(records, two[0], name)
    path.write_text(json.dumps(change_at(read_json(path), leaf, value)), encoding="utf-8")
    ran = labctl("status", "--all", "--json")
    assert ran.code == 0, ran.err
    assert ran.err.count(f"{path}: ") == 1
    assert [run["state"] for run in ran.json if run["run_id"] == two[1].runs[0].run_id] == ["done"]


@pytest.mark.parametrize("column", ["ended_at", "queued_at", "gone_since", "observed_at"])
def test_a_month_13_in_the_states_is_named(
    labctl: Labctl, records: Records, two: tuple[JobArray, JobArray], column: str
) -> None:
    records.states(two[0], state="COMPLETED", **{column: "2026-13-01T00:00:00Z"})
    ran = labctl("status", "--all")
    assert ran.code == 0, ran.err
    assert f"{two[0].folder / 'states.json'}: ValidationError: month must be in 1..12" in ran.err


def test_a_newer_record_is_said_left_alone_and_never_pooled(
    labctl: Labctl, records: Records, two: tuple[JobArray, JobArray]
) -> None:
    path = record_of(records, two[0])
    edit_json(path, schema=99)
    before = path.read_bytes()
    ran = labctl("compare", "--all", "--json")
    assert f"{path}: written by a newer labctl" in ran.err
    assert [row["run_id"] for row in ran.json["blocks"][0]["rows"]] == [two[1].runs[0].run_id]
    path.write_text('{"schema":99,"all":"is otherwise"}', encoding="utf-8")
    assert f"{path}: written by a newer labctl" in labctl("status", "--all").err
    path.write_bytes(before)
    (run, _) = labctl("status", "--all", "--json").json
    assert (run["state"], run["kind"]) == ("unknown", "newer-record")
    assert run["detail"] == f"record written by a newer labctl: {path}"
    ran = labctl("retry", "--all", "--dry-run")
    assert "to resubmit: 0" in ran.err
    assert "not resubmitted, record written by a newer labctl: 1 run" in ran.err
    assert path.read_bytes() == before


def test_only_plain_files_are_read_and_no_more_than_the_bound(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UnreadableError, match="not a regular file"):
            read_bytes(path)
    (tmp_path / "file").write_bytes(b"x" * 11)
    assert read_bytes(tmp_path / "file", at_most=11) == b"x" * 11
    with pytest.raises(UnreadableError, match="larger"):
        read_bytes(tmp_path / "file", at_most=10)


@pytest.mark.parametrize("odd", [a_pipe, a_folder, a_loop, endless, huge, no_text], ids=lambda odd: odd.__name__)
def test_settings_of_an_odd_kind_are_one_message(
    labctl: Labctl, records: Records, two: tuple[JobArray, JobArray], odd: Odd
) -> None:
    odd(records.workspace.settings_file)
    ran = labctl("config")
    assert ran.code == 2 or odd is a_loop
    assert odd is a_loop or f"cannot read {records.workspace.settings_file}" in ran.err


@pytest.mark.parametrize("suffix", ["", "-journal"])
@pytest.mark.parametrize("odd", [a_pipe, endless], ids=lambda odd: odd.__name__)
def test_a_database_of_an_odd_kind_is_one_message_and_is_built_again(
    labctl: Labctl, two: tuple[JobArray, JobArray], records: Records, odd: Odd, suffix: str
) -> None:
    """SQLite itself would wait for a pipe's content."""
    assert labctl("status", "--all").code == 0
    index = records.workspace.index
    index.with_name(f"{index.name}{suffix}").unlink(missing_ok=True)
    odd(index.with_name(f"{index.name}{suffix}"))
    ran = labctl("status", "--all")
    assert (ran.code, "not a regular file" in ran.err, "collect --rebuild" in ran.err) == (5, True, True)
    assert labctl("collect", "--rebuild").code == 0
    assert labctl("status", "--all").code == 0


def test_a_damaged_definition_whose_bytes_are_no_text_is_one_message_and_is_built_again(
    labctl: Labctl, two: tuple[JobArray, JobArray], records: Records
) -> None:
    """SQLite quotes the definition, and Python raises UnicodeDecodeError for such a message."""
    assert labctl("status", "--all").code == 0
    index = records.workspace.index
    index.write_bytes(index.read_bytes().replace(b"CREATE TABLE", b"CREATE \xf4ABLE"))
    for command in (("status", "--all"), ("compare", "--all"), ("query", "SELECT 1")):
        ran = labctl(*command)
        assert (ran.code, "malformed" in ran.err, "collect --rebuild" in ran.err) == (5, True, True), ran.err
    assert "malformed" in labctl("doctor").out
    assert labctl("collect", "--rebuild").code == 0
    assert labctl("status", "--all").code == 0
