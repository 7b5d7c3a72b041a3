"""What was measured, as files that other programs read: real pandas, pyarrow and Datasette read them here."""

from __future__ import annotations

import asyncio
import builtins
import csv
import io
import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.store.views import REAL, TABLES, TEXT, view_of, views
from labctl_orchestrator.store.workspace import DATABASE_SCHEMA
from labctl_workers.measure import METRICS

from .conftest import Labctl, Records
from .conftest import measured as measured_repeat

NAME = f"labctl-{DATABASE_SCHEMA}"
TABLE_NAMES = [view.table for view in views()]


@pytest.fixture
def measured(records: Records) -> Records:
    """Two measured lengths, in one request of that name; and one run that failed."""
    batch = records.submit(name="lengths", lengths=(16, 32), prompt='Say "a, b"\nand c: naïve')
    attempt = records.attempt(batch)
    for run in batch.runs:
        records.done(batch, attempt, run)
    failed = records.submit("7", lengths=(7,))
    records.failed(failed, records.attempt(failed))
    records.collect()
    return records


def in_the_database(records: Records, table: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(records.workspace.database)) as connection:
        connection.row_factory = sqlite3.Row
        rows = connection.execute(f"SELECT * FROM {view_of(table).name}")
        return sorted((dict(row) for row in rows), key=repr)


@pytest.mark.parametrize("table", TABLE_NAMES)
def test_every_format_holds_the_rows_of_the_view(labctl: Labctl, measured: Records, tmp_path: Path, table: str) -> None:
    import pandas

    expected = in_the_database(measured, table)
    assert expected
    for suffix in ("csv", "jsonl", "json", "parquet"):
        ran = labctl("export", "--table", table, "-o", tmp_path / f"rows.{suffix}")
        assert (ran.code, ran.out) == (0, ""), ran.err
        assert f"wrote {len(expected)} {table} to" in ran.err
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(map(json.loads, lines), key=repr) == expected
    assert sorted(json.loads((tmp_path / "rows.json").read_text(encoding="utf-8")), key=repr) == expected
    with (tmp_path / "rows.csv").open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=repr)
    plain = [{name: "" if value is None else str(value) for name, value in row.items()} for row in expected]
    assert rows == sorted(plain, key=repr)
    frame = pandas.read_parquet(tmp_path / "rows.parquet")
    assert list(frame.columns) == [column.name for column in view_of(table).columns]
    read = [
        {key: None if pandas.isna(value) else value for key, value in row.items()} for row in frame.to_dict("records")
    ]
    for ours, theirs in zip(sorted(read, key=key_of), sorted(expected, key=key_of), strict=True):
        assert ours == pytest.approx(theirs, nan_ok=True)


def key_of(row: dict[str, Any]) -> list[str]:
    return [str(row.get(name)) for name in ("run_id", "attempt_id", "repeat", "request", "device_id")]


def test_a_parquet_file_knows_types_units_and_meanings(labctl: Labctl, measured: Records, tmp_path: Path) -> None:
    from pyarrow import parquet

    labctl("export", "-o", tmp_path / "runs.parquet")
    schema = parquet.read_schema(tmp_path / "runs.parquet")
    assert str(schema.field("energy_j").type) == "double"  # of no row has it a value
    assert str(schema.field("max_new_tokens").type) == "int64"
    assert schema.field("ttft_s").metadata[b"unit"] == b"s"
    assert METRICS["ttft_s"].definition.encode() in schema.field("ttft_s").metadata[b"description"]


def test_names_choose_runs_and_the_standard_output_is_csv(labctl: Labctl, measured: Records) -> None:
    batch = measured.submit("8", lengths=(64,))
    measured.done(batch, measured.attempt(batch))
    everything = list(csv.DictReader(io.StringIO(labctl("export").out)))
    assert {row["max_new_tokens"] for row in everything} == {"16", "32", "64"}
    some = list(csv.DictReader(io.StringIO(labctl("export", "lengths", "--table", "repeats").out)))
    assert (
        [row["max_new_tokens"] for row in some].count("16") == [row["max_new_tokens"] for row in some].count("32") == 3
    )
    assert len(some) == 6
    assert [row["max_new_tokens"] for row in labctl("export", "lengths", "--json").json] != []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-o", "runs.xlsx"), "end it in .csv"),
        (("--format", "parquet"), "give -o a file"),
        (("-o", "nowhere/runs.csv"), "no such folder: nowhere"),
        (("nonsense",), "no run, submission, Slurm job or bundle matches"),
        (("--table", "samples"), "unknown --table: 'samples'"),
    ],
)
def test_what_cannot_be_written_is_one_clear_message(
    labctl: Labctl, measured: Records, arguments: tuple[str, ...], said: str
) -> None:
    ran = labctl("export", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err


def test_without_pyarrow_the_error_says_how_to_get_it(
    labctl: Labctl, measured: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow is made missing."""
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    ran = labctl("export", "-o", tmp_path / "runs.parquet")
    assert ran.code == 2
    assert "labctl-slurm[parquet]" in ran.err
    assert not list(tmp_path.glob("*runs.parquet*"))


def test_an_export_that_fails_leaves_the_old_file_and_nothing_else(
    labctl: Labctl, measured: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, injected."""

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    target = tmp_path / "runs.csv"
    target.write_text("before", encoding="utf-8")
    monkeypatch.setitem(__import__("labctl_orchestrator.exchange.export", fromlist=["WRITERS"]).WRITERS, "csv", full)
    assert "No space left" in labctl("export", "-o", target).err
    assert target.read_text(encoding="utf-8") == "before"
    assert [path.name for path in tmp_path.iterdir() if "runs" in path.name] == ["runs.csv"]


# ---------------------------------------------------------------- the database, opened by others


def test_pandas_reads_the_database_as_it_is(measured: Records) -> None:
    import pandas

    with closing(sqlite3.connect(measured.workspace.database)) as connection:
        frame = pandas.read_sql("SELECT * FROM measured_repeats", connection)
    assert len(frame) == 6
    assert frame.groupby("max_new_tokens").output_tok_s.median().notna().all()
    assert str(frame.ttft_s.dtype) == "float64"


def test_every_foreign_key_names_a_row_that_is_there(measured: Records) -> None:
    with closing(sqlite3.connect(measured.workspace.database)) as connection:
        keys = {
            table: {(row[3], row[2], row[4]) for row in connection.execute(f"PRAGMA foreign_key_list({table})")}
            for table in TABLES
        }
        assert list(connection.execute("PRAGMA foreign_key_check")) == []
    assert keys["results"] == {
        ("run_id", "runs", "run_id"), ("attempt_id", "job_starts", "attempt_id"), ("job_id", "jobs", "job_id"),
        ("text_id", "texts", "text_id"),
    }  # fmt: skip
    assert ("array_id", "arrays", "array_id") in keys["jobs"]
    assert ("submission_id", "submissions", "submission_id") in keys["arrays"]


def test_datasette_opens_the_database_with_the_descriptions_beside_it(measured: Records) -> None:
    from datasette import app

    with ThreadPoolExecutor(1) as pool:  # this thread may have the running event loop of a browser
        pages = pool.submit(asyncio.run, pages_of(app, measured)).result()
    assert {address: status for address, (status, _) in pages.items() if status != 200} == {}
    for view in views():
        shown = pages[f"/{NAME}/{view.name}"][1]
        assert view.text in shown.replace("&#39;", "'"), view.name
        for column in view.columns:
            assert f"<dt>{column.name}</dt>" in shown, (view.name, column.name)
    assert "throughput: all output tokens / wall time of the measured window" in pages[f"/{NAME}/measured_runs"][1]
    assert f'href="/{NAME}/runs/' in pages[f"/{NAME}/results"][1]  # a foreign key is followed


async def pages_of(app: Any, records: Records) -> dict[str, tuple[int, str]]:
    metadata = json.loads(records.workspace.metadata.read_text(encoding="utf-8"))
    datasette = app.Datasette([str(records.workspace.database)], metadata=metadata)
    await datasette.invoke_startup()
    addresses = ["/", f"/{NAME}", *(f"/{NAME}/{name}" for name in (*TABLES, *(view.name for view in views())))]
    pages = {}
    for address in addresses:
        answer = await datasette.client.get(address)
        pages[address] = (answer.status_code, answer.text)
    return pages


def test_every_column_of_a_view_is_described_and_every_time_and_size_has_its_unit() -> None:
    for view in views():
        assert view.text
        for column in view.columns:
            assert column.text, (view.name, column.name)
            unit = {"_s": "s", "_bytes": "B", "_j": "J"}
            wanted = next((u for suffix, u in unit.items() if column.name.endswith(suffix)), None)
            if column.kind != TEXT and wanted and not column.name.endswith(("_tok_s", "per_token_j", "requests_s")):
                assert column.unit == wanted, (view.name, column.name)
            if column.name in METRICS:
                assert column.kind in (REAL, "integer")


@pytest.mark.parametrize("begins", ["=", "+", "-", "@", "\t", "\r"])
def test_a_cell_that_a_spreadsheet_would_run_is_text(labctl: Labctl, records: Records, begins: str) -> None:
    text = f'{begins}HYPERLINK("http://x")'
    batch = records.submit()
    records.done(batch, records.attempt(batch), repeats=[measured_repeat(0, text=text)])
    sql = "SELECT text, -1.5 AS number, '-2' AS word FROM texts"
    for ran in (labctl("export", "--table", "requests"), labctl("query", "--csv", sql)):
        (row,) = csv.DictReader(io.StringIO(ran.out, newline=""))
        assert row["text"] == f"'{text}"
    assert (row["number"], row["word"]) == ("-1.5", "'-2")
    assert labctl("export", "--table", "requests", "--json").json[0]["text"] == text
