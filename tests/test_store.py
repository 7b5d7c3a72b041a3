"""The database itself: its journal, its transactions, its columns, and what happens where the file is no database."""

from __future__ import annotations

import multiprocessing
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.store import database as store_module
from labctl_orchestrator.store.collect import rebuild
from labctl_orchestrator.store.database import Store, add_logarithms, open_store
from labctl_orchestrator.store.workspace import DATABASE_SCHEMA, Workspace
from labctl_workers import measure
from labctl_workers.measure import Metric

from .conftest import Labctl, Records, refused


def columns(database: Path, table: str) -> dict[str, str]:
    with closing(sqlite3.connect(database)) as connection:
        return {row[1]: row[2] for row in connection.execute(f"PRAGMA table_info({table})")}


def test_the_journal_is_a_file_that_is_deleted_not_one_in_shared_memory(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "labctl-2.db")) as store:
        assert store.tuples("PRAGMA journal_mode") == [("delete",)]
    assert [path.name for path in tmp_path.iterdir()] == ["labctl-2.db"]


def test_a_database_that_somebody_made_write_ahead_is_made_as_it_was(tmp_path: Path) -> None:
    Store(tmp_path / "labctl-2.db").close()
    with closing(sqlite3.connect(tmp_path / "labctl-2.db")) as connection:
        assert connection.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
    with closing(Store(tmp_path / "labctl-2.db")) as store:
        assert store.tuples("PRAGMA journal_mode") == [("delete",)]


def test_opening_a_database_again_changes_no_byte_of_it(tmp_path: Path) -> None:
    Store(tmp_path / "labctl-2.db").close()
    before = (tmp_path / "labctl-2.db").read_bytes()
    Store(tmp_path / "labctl-2.db").close()
    assert (tmp_path / "labctl-2.db").read_bytes() == before


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "labctl-2.db")) as store:
        with pytest.raises(ZeroDivisionError), store.writing():
            store.put("texts", [{"text_id": "a", "text": "first"}])
            store.add("texts", {"text_id": "b", "text": "second"})
            _ = 1 / 0
        assert store.rows("SELECT * FROM texts") == []


def test_put_replaces_a_row_with_the_same_key_and_add_leaves_it(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "labctl-2.db")) as store:
        store.put("texts", [{"text_id": "a", "text": "first"}])
        store.add("texts", {"text_id": "a", "text": "second"})
        assert store.tuples("SELECT text FROM texts") == [("first",)]
        store.put("texts", [{"text_id": "a", "text": "third"}])
        assert store.tuples("SELECT text FROM texts") == [("third",)]


def test_a_writer_that_waited_too_long_says_that_another_is_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time to wait is shortened from 60 s."""
    monkeypatch.setattr(store_module, "BUSY_FOR_S", 0.1)
    with closing(Store(tmp_path / "labctl-2.db")) as first, closing(Store(tmp_path / "labctl-2.db")) as second:  # noqa: SIM117
        with first.writing():
            error = refused(lambda: second.writing().__enter__())
    assert "locked" in error.message
    assert "another labctl" in error.remedy


def make(path: str) -> None:
    Store(Path(path)).close()


def test_processes_that_make_one_database_at_once_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        pool.map(make, [str(tmp_path / "labctl-2.db")] * 8, chunksize=1)
    with closing(Store(tmp_path / "labctl-2.db")) as store:
        assert store.tuples("PRAGMA user_version") == [(DATABASE_SCHEMA,)]
        assert set(measure.METRICS) <= set(columns(store.path, "repeats"))


def test_a_record_from_before_a_metric_existed_shows_it_after_collect(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = records.submit()
    records.done(batch, records.attempt(batch))
    records.collect()
    assert "letters" not in columns(records.workspace.database, "repeats")
    tokens = Metric("letters", "", "", "letters of the text", lambda of: float(len(of.repeat.samples[0].text)))
    monkeypatch.setitem(measure.METRICS, "letters", tokens)
    records.done(batch, records.attempt(batch, age_s=30))
    records.collect()
    assert columns(records.workspace.database, "repeats")["letters"] in {"FLOAT", "REAL"}
    with closing(open_store(records.workspace)) as store:
        values = [row["letters"] for row in store.rows("SELECT letters FROM repeats ORDER BY attempt_id, repeat")]
    assert values == [12.0] * 6


def first_tokens(workspace: Workspace) -> list[float]:
    with closing(open_store(workspace)) as store:
        return [ttft_s for (ttft_s,) in store.tuples("SELECT ttft_s FROM repeats ORDER BY attempt_id, repeat")]


def test_a_corrected_definition_changes_the_values_of_old_records(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = records.submit()
    records.done(batch, records.attempt(batch))
    records.collect()
    before = measure.METRICS["ttft_s"]
    assert first_tokens(records.workspace) == [0.1] * 3
    corrected = replace(before, of=lambda of: 1000 * (before.of(of) or 0.0), version=before.version + 1)
    monkeypatch.setitem(measure.METRICS, "ttft_s", corrected)
    assert records.collect().records == 1
    assert first_tokens(records.workspace) == [100.0] * 3
    assert records.collect().records == 0  # computed once


def test_a_definition_that_is_older_than_the_databases_changes_nothing(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two versions of labctl that take turns in one workspace."""
    batch = records.submit()
    records.done(batch, records.attempt(batch))
    records.collect()
    with closing(open_store(records.workspace)) as store, store.writing():
        store.put_values("metric_versions", [("ttft_s", 9), ("of_the_future", 1)])
    assert records.collect().records == 0
    assert first_tokens(records.workspace) == [0.1] * 3


def test_a_metric_that_this_labctl_does_not_know_is_left_out(records: Records) -> None:
    """A worker's code that is newer than the login node's."""
    batch = records.submit()
    attempt = records.attempt(batch)
    record = records.done(batch, attempt)
    text = record.read_text(encoding="utf-8").replace('"output_tok_s"', '"of_the_future":1.0,"output_tok_s"')
    record.write_text(text.replace('"devices":[{', '"devices":[{"of_the_future":1,'), encoding="utf-8")
    collected = records.collect()
    assert (collected.records, collected.damaged) == (1, [])
    assert "of_the_future" not in columns(records.workspace.database, "repeats")


# ---------------------------------------------------------------- a file that is no database


def one_measured_run(records: Records) -> Workspace:
    batch = records.submit()
    records.done(batch, records.attempt(batch))
    records.collect()
    return records.workspace


def spoil_all(database: Path) -> None:
    database.write_text("this is no database, whatever its name says\n" * 100, encoding="utf-8")


def spoil_the_inside(database: Path) -> None:
    """A good first page, so that it opens, and rubbish from there on."""
    content = database.read_bytes()
    database.write_bytes(content[:4096] + b"\xa5" * (len(content) - 4096))


def cut_in_half(database: Path) -> None:
    content = database.read_bytes()
    database.write_bytes(content[: len(content) // 2 // 4096 * 4096])


def spoil_two_tables(database: Path) -> None:
    """The database opens: what is spoilt is met by a query. (Some commands read the results from an index alone.)"""
    with closing(sqlite3.connect(database)) as connection:
        query = "SELECT rootpage FROM sqlite_master WHERE name IN ('results', 'repeats')"
        pages = [page for (page,) in connection.execute(query)]
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    content = bytearray(database.read_bytes())
    for page in pages:
        content[(page - 1) * size : page * size] = b"\xa5" * size
    database.write_bytes(content)


Spoil = Callable[[Path], None]
WAYS = (spoil_all, spoil_the_inside, cut_in_half)


@pytest.mark.parametrize("spoil", WAYS)
@pytest.mark.parametrize("command", ["status", "compare", "collect"])
def test_a_database_that_is_none_is_one_error_that_names_the_way_out(
    labctl: Labctl, records: Records, spoil: Spoil, command: str
) -> None:
    spoil(one_measured_run(records).database)
    ran = labctl(command)
    assert (ran.code, ran.out) == (5, "")
    assert ran.err.count("labctl: ") == 1
    assert "labctl collect --rebuild" in ran.err


@pytest.mark.parametrize("command", ["status", "compare"])
def test_damage_that_a_query_meets_is_the_same_one_error(labctl: Labctl, records: Records, command: str) -> None:
    spoil_two_tables(one_measured_run(records).database)
    ran = labctl(command)
    assert (ran.code, ran.out) == (5, "")
    assert "labctl collect --rebuild" in ran.err


@pytest.mark.parametrize("spoil", [*WAYS, spoil_two_tables])
def test_rebuild_mends_a_database_that_is_none(labctl: Labctl, records: Records, spoil: Spoil) -> None:
    spoil(one_measured_run(records).database)
    assert labctl("collect", "--rebuild").code == 0
    assert [run["state"] for run in labctl("status", "--json").json] == ["done"]


def test_an_empty_file_or_no_file_is_made_a_database(labctl: Labctl, records: Records) -> None:
    database = one_measured_run(records).database
    database.write_bytes(b"")
    assert [run["state"] for run in labctl("status", "--json").json] == ["done"]
    database.unlink()
    assert [run["state"] for run in labctl("status", "--json").json] == ["done"]


def test_rebuild_leaves_only_the_database(records: Records) -> None:
    data = one_measured_run(records).data
    before = {path.name for path in data.iterdir()}
    rebuild(records.workspace)
    assert {path.name for path in data.iterdir()} == before


def test_an_error_of_rebuild_leaves_the_old_database(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is injected: a disk that is full in the middle."""
    database = one_measured_run(records).database
    before = database.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "_insert", full)
    with pytest.raises(OSError, match="No space left"):
        rebuild(records.workspace)
    assert database.read_bytes() == before
    assert not list(records.workspace.data.glob("*.rebuild-*"))


def test_a_folder_in_the_databases_place_is_named_and_the_files_are_read(labctl: Labctl, records: Records) -> None:
    here = one_measured_run(records)
    here.index.unlink()
    here.index.mkdir()
    ran = labctl("status", "--json")
    assert (ran.code, len(ran.json)) == (0, 1)
    assert f"unable to open database file: {here.data}" in ran.err


def test_a_database_that_is_up_to_date_is_opened_without_sqlite_utils(records: Records) -> None:
    """It loads numpy, where that is installed: a tenth of a second of every command."""
    here = one_measured_run(records)
    code = (
        "import sys; from pathlib import Path; from labctl_orchestrator.store.database import Store; "
        f"Store(Path({str(here.database)!r})).close(); print('sqlite_utils' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_a_newer_database_is_left_alone_and_an_older_one_removed(records: Records) -> None:
    here = one_measured_run(records)
    newer = here.data / f"labctl-{DATABASE_SCHEMA + 1}.db"
    older = here.data / f"labctl-{DATABASE_SCHEMA - 1}.db"
    for other in (newer, older):
        here.database.rename(other)
        other.write_bytes(other.read_bytes())
        before = other.read_bytes()
        assert records.collect().records == 1
        assert not older.exists()
        assert newer.read_bytes() == before if other == newer else newer.exists()


def test_views_have_their_logarithms_where_sqlite_has_none() -> None:
    """A fault that is injected: this SQLite has both functions, so its connection here says that it has not."""

    class Old(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            if sql.startswith("SELECT ln(1.0)"):
                raise sqlite3.OperationalError("no such function: ln")
            return super().execute(sql, *parameters)

    with closing(sqlite3.connect(":memory:", factory=Old)) as connection:
        add_logarithms(connection)
        (row,) = connection.execute("SELECT ln(exp(2.5)), ln(0.0), ln(NULL), exp(NULL), typeof(exp(1))")
    assert row == (pytest.approx(2.5), None, None, None, "real")
