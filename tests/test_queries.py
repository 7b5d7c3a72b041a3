"""A person's own SQL: it reads what is there, and nothing that it is given can change a byte."""

from __future__ import annotations

import csv
import io
import math
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from contextlib import closing

import pytest

from labctl_orchestrator.analysis.comparison import AXES
from labctl_orchestrator.exchange import query
from labctl_orchestrator.store.views import JOB_AXES, TABLES, views
from labctl_slurm.errors import WrongUseError

from .conftest import Labctl, Records, files_below, refused
from .conftest import measured as record_repeat


@pytest.fixture
def measured(records: Records) -> Records:
    """A request of two measured lengths, and one run that failed."""
    batch = records.submit(name="lengths", lengths=(16, 32))
    attempt = records.attempt(batch)
    for run in batch.runs:
        records.done(batch, attempt, run)
    failed = records.submit("7", lengths=(7,))
    records.failed(failed, records.attempt(failed))
    records.states(batch, state="COMPLETED", queued_at="2026-01-01T10:00:00Z", started_at="2026-01-01T10:00:30Z",
                   ended_at="2026-01-01T10:01:30Z")  # fmt: skip
    records.collect()
    return records


# ---------------------------------------------------------------- reading


def test_a_select_is_answered_as_a_table_as_csv_and_as_json(labctl: Labctl, measured: Records) -> None:
    sql = "SELECT max_new_tokens, repeats, text FROM measured_runs ORDER BY 1"
    assert labctl("query", sql).out.splitlines()[1].split(maxsplit=2) == ["16", "3", "a shard each"]
    rows = list(csv.reader(io.StringIO(labctl("query", sql, "--csv").out)))
    assert rows == [["max_new_tokens", "repeats", "text"], ["16", "3", "a shard each"], ["32", "3", "a shard each"]]
    assert labctl("query", sql, "--json").json[1] == {"max_new_tokens": 32, "repeats": 3, "text": "a shard each"}


def test_what_json_has_no_word_for_is_told_as_far_as_it_can(labctl: Labctl, measured: Records) -> None:
    answer = labctl("query", "SELECT x'00ff' AS bytes, 1e400 AS infinite, -1e400 AS other, 1.5 AS plain", "--json").json
    assert answer == [{"bytes": "00ff", "infinite": None, "other": None, "plain": 1.5}]


def test_a_view_and_the_list_of_views_are_described_as_csv_too(labctl: Labctl, measured: Records) -> None:
    for words in ((), ("--describe", "measured_runs")):
        rows = list(csv.DictReader(io.StringIO(labctl("query", *words, "--csv").out)))
        assert [row["name"] for row in rows] == [row["name"] for row in labctl("query", *words, "--json").json]


@pytest.mark.parametrize("words", [("--csv", "--json", "SELECT 1"), ("--describe", "measured_runs", "SELECT 1")])
def test_options_that_exclude_each_other_are_told(labctl: Labctl, measured: Records, words: tuple[str, ...]) -> None:
    ran = labctl("query", *words)
    assert (ran.code, ran.out) == (2, "")
    assert "omit one of them" in ran.err


def test_what_was_measured_since_is_there(labctl: Labctl, measured: Records) -> None:
    batch = measured.submit("8", lengths=(64,))
    measured.done(batch, measured.attempt(batch))
    assert labctl("query", "SELECT count(*) AS n FROM measured_runs", "--json").json == [{"n": 3}]


def test_sql_may_come_from_standard_input(labctl: Labctl, measured: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT 1 AS a,\n 2 AS a -- twice\n"))
    assert labctl("query", "-", "--json").json == [{"a": 1, "a_2": 2}]


def test_the_mean_of_a_view_is_what_compare_and_show_have(labctl: Labctl, measured: Records) -> None:
    """Of two loads with unequal repeats; an older one with other versions is none of them."""
    batch = measured.submit("9", lengths=(128,), repeats=4)
    old = {"fingerprint": {"packages": {"torch": "2.8.0"}}, "ended_at": "2026-01-01T00:00:00.000Z"}
    measured.done(batch, measured.attempt(batch, slurm_id="9", age_s=900), **old)
    three = [record_repeat(number) for number in range(3)]
    for repeat in three:
        repeat.wall_s *= 1.1
    measured.done(
        batch, measured.attempt(batch, slurm_id="9", age_s=600), ended_at="2026-01-02T00:00:00.000Z", repeats=three
    )
    measured.done(batch, measured.attempt(batch, slurm_id="9", age_s=300), ended_at="2026-01-03T00:00:00.000Z")
    measured.collect()
    run_id = batch.runs[0].run_id
    for metric in ("output_tok_s", "ttft_s", "output_tokens", "mean_log_probability"):
        asked = f"SELECT {metric} FROM measured_runs WHERE run_id = '{run_id}'"
        ((shown,),) = query.query(measured.workspace, asked).rows
        (row,) = labctl("compare", run_id, "--metric", metric, "--json").json["blocks"][0]["rows"]
        assert (shown, row["n"]) == (pytest.approx(row["mean"]), 2 if shown is not None else 0)
    (row,) = labctl("compare", run_id, "--metric", "output_tok_s", "--json").json["blocks"][0]["rows"]
    first, second = map(statistics.geometric_mean, row["values"])
    assert row["mean"] == pytest.approx(math.sqrt(first * second))
    assert f"{first:.4g} tok/s" in labctl("show", run_id).out


def test_a_view_tells_the_latest_execution_and_says_which_repeats_are_its(measured: Records) -> None:
    batch = measured.submit("10", lengths=(16,))
    measured.done(batch, measured.attempt(batch, slurm_id="10", age_s=5))
    measured.collect()
    asked = "SELECT latest, count(*) FROM measured_repeats WHERE max_new_tokens = 16 GROUP BY latest ORDER BY latest"
    assert query.query(measured.workspace, asked).rows == [(0, 3), (1, 3)]
    latest = "SELECT attempt_id LIKE '%.10', slurm_id FROM measured_runs WHERE max_new_tokens = 16"
    assert query.query(measured.workspace, latest).rows == [(1, "10")]


def test_a_run_tells_every_request_that_asked_for_it(measured: Records) -> None:
    measured.request(name="again", lengths=(16,))
    measured.collect()
    asked = "SELECT submissions FROM measured_runs ORDER BY max_new_tokens"
    assert query.query(measured.workspace, asked).rows == [("lengths, again",), ("lengths",)]


def test_the_jobs_figures_and_the_failures_have_their_columns(measured: Records) -> None:
    asked = "SELECT queue_s, gpu_s, gpu, torch, effective_dtype FROM measured_runs WHERE max_new_tokens = 16"
    (row,) = query.query(measured.workspace, asked).rows
    assert row == (30.0, 120.0, "NVIDIA H100 + NVIDIA H100", "2.9.0", "bfloat16")
    failures = query.query(measured.workspace, "SELECT failure_kind, remedy FROM failed_runs").rows
    assert failures == [("gpu-out-of-memory", "take a smaller batch")]


def test_every_axis_of_compare_is_a_column_of_every_view_and_of_jobs_those_that_their_runs_share() -> None:
    for view in views():
        axes = {*JOB_AXES, "gpus"} if view.name == "measured_jobs" else set(AXES)
        assert axes <= {column.name for column in view.columns}, view.name
        assert len({column.name for column in view.columns}) == len(view.columns)


def test_without_sql_the_views_and_tables_are_told_and_with_describe_their_columns(
    labctl: Labctl, measured: Records
) -> None:
    with closing(sqlite3.connect(measured.workspace.database)) as connection:
        there = {
            row[0]
            for row in connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
            if not row[0].startswith(("_sqlite", "sqlite"))
        }
    assert {found["name"] for found in labctl("query", "--json").json} == there == {*TABLES, *(v.name for v in views())}
    told = {column["name"]: column for column in labctl("query", "--describe", "measured_runs", "--json").json}
    assert told["tpot_s"]["unit"] == "s"
    assert "(end-to-end - ttft) / (output tokens - 1)" in told["tpot_s"]["description"]
    assert "did you mean 'measured_runs'" in labctl("query", "--describe", "measured_run").err


# ---------------------------------------------------------------- and nothing else


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM runs",
        "UPDATE results SET load_s = 0",
        "INSERT INTO texts VALUES ('a', 'b')",
        "WITH gone AS (SELECT 1) DELETE FROM runs",
        "DROP VIEW measured_runs",
        "CREATE TABLE mine (a)",
        "CREATE TEMP TABLE mine (a)",
        "ATTACH 'other.db' AS other",
        "VACUUM",
        "VACUUM INTO 'other.db'",
        "PRAGMA user_version = 1",
        "PRAGMA query_only = OFF",
        "PRAGMA writable_schema = ON",
        "BEGIN IMMEDIATE",
        "REINDEX",
        "SELECT load_extension('mine')",
    ],
)
def test_what_would_write_is_one_clear_message(labctl: Labctl, measured: Records, sql: str) -> None:
    labctl("query", "SELECT 1")
    before = files_below(measured.workspace.root)
    ran = labctl("query", sql)
    assert (ran.code, ran.out) == (2, "")
    assert "labctl query refuses a statement that writes" in ran.err
    assert files_below(measured.workspace.root) == before


def test_the_file_itself_is_opened_for_reading(measured: Records) -> None:
    """Whatever the authorizer lets through: here it is taken away."""
    with closing(query.read_only(measured.workspace)) as connection:
        connection.set_authorizer(None)
        for undo in ("", "PRAGMA query_only = OFF"):
            connection.execute(undo)
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                connection.execute("DELETE FROM runs")


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT 1; SELECT 2", "more than one statement"),
        ("", "empty SQL statement"),
        ("/* nothing */", "empty SQL statement"),
        ("SELECT * FROM measured_run", "did you mean 'measured_runs'"),
        ("SELECT ttft FROM measured_runs", "did you mean 'ttft_s'"),
        ("SELECT zzzzzz FROM measured_runs", "labctl query lists the tables"),
        ("SELECT json_extract('no json', '$.a') FROM runs", "malformed JSON"),
        ("SELECT ?", "SQLite error"),
        ("SELECT 1\x00", "SQLite error"),
    ],
)
def test_what_is_no_query_is_one_clear_message(labctl: Labctl, measured: Records, sql: str, said: str) -> None:
    ran = labctl("query", sql)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err


def test_a_workspace_with_an_odd_name_can_be_asked(measured: Records) -> None:
    moved = measured.workspace.root.rename(measured.workspace.root.parent / "50% of? it#1")
    here = type(measured.workspace)(moved)
    assert query.query(here, "SELECT count(*) FROM measured_runs").rows == [(2,)]


def test_without_a_workspace_the_error_says_where_to_go(labctl: Labctl, records: Records) -> None:
    assert labctl("query", "SELECT 1").code == 2


def test_ctrl_c_ends_a_query_that_would_never_end(measured: Records) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    code = f"import sys; from labctl_orchestrator.cli import main; main(['query', {endless!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=measured.workspace.root, env=os.environ, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            time.sleep(2)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in said


@pytest.mark.parametrize("first", ["json_each('[1, 2]')", "json_tree('[1]')", "pragma_table_info('texts')"])
def test_a_function_that_gives_rows_may_be_the_first_thing_that_is_named(measured: Records, first: str) -> None:
    assert query.query(measured.workspace, f"SELECT count(*) FROM {first}").rows == [(2,)]


def test_parameters_take_the_place_of_question_marks(measured: Records) -> None:
    asked = "SELECT run_id FROM measured_runs WHERE max_new_tokens = ?"
    assert len(query.query(measured.workspace, asked, (16,)).rows) == 1
    assert "SQLite error" in refused(lambda: query.query(measured.workspace, asked), WrongUseError).message
