"""Files become rows: once, whatever happens on the way, and the same rows whenever they are made."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.exchange import bundle, import_bundle
from labctl_orchestrator.store.collect import Collected, collect, rebuild
from labctl_orchestrator.store.database import Store, is_special, open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_workers.record import (
    Attempt,
    JobFolder,
    RunSpec,
    Sampling,
    TaskAnswers,
    TextScores,
    read_json,
    write_json,
)

from .conftest import JobArray, Labctl, Records, ago, edit_json, measured

Contents = dict[str, list[dict[str, Any]]]


def contents(workspace: Workspace) -> Contents:
    """Every row of every table, by table; in an order of its own, not the database's."""
    with closing(sqlite3.connect(workspace.database)) as connection:
        connection.row_factory = sqlite3.Row
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            name: sorted((dict(row) for row in connection.execute(f'SELECT * FROM "{name}"')), key=repr)
            for name in names
            if not name.startswith(("sqlite_", "_sqlite_")) and name != "folders"
        }


def rows(workspace: Workspace, sql: str) -> list[dict[str, Any]]:
    with closing(open_store(workspace)) as store:
        return [dict(row) for row in store.rows(sql)]


def is_whole(workspace: Workspace) -> bool:
    with closing(sqlite3.connect(workspace.database)) as connection:
        return list(connection.execute("PRAGMA integrity_check")) == [("ok",)]


# ---------------------------------------------------------------- the same rows, however they came
#
# Each of these writes one thing that may be in a workspace; between two of them labctl may collect, or not.


def a_measured_run(records: Records) -> None:
    batch = records.submit("1000", name="first")
    records.done(batch, records.attempt(batch, slurm_id="1000"))
    records.states(batch, state="COMPLETED", exit_code="0:0", node="dgxh-1", ended_at=ago(5))


def an_array_half_of_which_failed(records: Records) -> None:
    values: dict[str, Any] = {"dtypes": ("float16", "float32"), "lengths": (8, 16), "partition": "dgx2"}
    batch = records.submit("2000", **values)
    records.states(batch, state="RUNNING")
    first, second = (records.attempt(batch, task, slurm_id=f"2000_{task}") for task in (0, 1))
    for run in batch.jobs[0].runs:
        records.done(batch, first, run)
    for run in batch.jobs[1].runs:
        records.failed(batch, second, run)
    records.heartbeat(batch, second, "ended")


def a_job_that_was_requeued(records: Records) -> None:
    batch = records.submit("3000", lengths=(32,), prompt="Why is the sky blue?")
    records.failed(batch, records.attempt(batch, slurm_id="3000", age_s=600))
    records.done(batch, records.attempt(batch, slurm_id="3000", age_s=60))


def a_script_submitted_by_hand(records: Records) -> None:
    batch = records.prepare(lengths=(64,))
    records.done(batch, records.attempt(batch, slurm_id="4000"))


def a_script_submitted_by_hand_twice(records: Records) -> None:
    batch = records.prepare(lengths=(65,))
    records.failed(batch, records.attempt(batch, slurm_id="4100", age_s=600))
    records.done(batch, records.attempt(batch, slurm_id="4200", age_s=60))


def a_script_that_was_only_rendered(records: Records) -> None:
    records.prepare(lengths=(256,))


def a_batch_that_slurm_refused(records: Records) -> None:
    request = records.request(lengths=(512,))
    batch = records.prepare(lengths=(512,))
    records.intend(batch, request)
    records.refuse(batch)


def a_submission_that_was_cut_off(records: Records) -> None:
    request = records.request(lengths=(1024,))
    batch = records.prepare(lengths=(1024,))
    records.intend(batch, request)


def a_run_that_was_skipped(records: Records) -> None:
    (job,) = records.jobs()
    records.request(skipped=[job.runs[0].run_id], name="again")


def a_run_on_this_machine(records: Records) -> None:
    batch = records.submit(str(os.getpid()), partition="local")
    records.done(batch, records.attempt(batch, slurm_id=None))


def a_run_of_many_requests_with_answers_of_any_kind(records: Records) -> None:
    batch = records.submit("5000", lengths=(2,), prompt="ünïcødé 🙂", repeats=2)
    attempt = records.attempt(batch, slurm_id="5000")
    repeats = [measured(0, tokens=tokens, text=text) for tokens, text in ((0, ""), (1, "🙂\n\0"), (2, "a shard each"))]
    samples = [replace(repeat.samples[0], request=place) for place, repeat in enumerate(repeats)]
    scores = TextScores([12.5, 0.0], [4, 0])
    answers = [TaskAnswers("capitals", "acc", "none", ["0a", "0b"], [1.0, 0.0]), TaskAnswers("sums", error="no")]
    records.done(
        batch, attempt, repeats=[replace(repeats[2], samples=samples)], fingerprint={}, scores=scores, answers=answers
    )


def a_bundle_of_somebody(records: Records) -> None:
    """Of the first run, which is measured here too, and of one that failed."""
    hers = Records(Workspace(records.workspace.root.parent / "hers"))
    batch = hers.submit("9000", lengths=(128, 7))
    attempt = hers.attempt(batch, slurm_id="9000")
    hers.done(batch, attempt)
    hers.failed(batch, attempt, batch.runs[1])
    hers.states(batch, state="COMPLETED", queued_at=ago(90), started_at=ago(60), ended_at=ago(5))
    hers.collect()
    path = records.workspace.root.parent / "hers.zip"
    with closing(open_store(hers.workspace)) as store, path.open("wb") as file:
        runs = [run_id for (run_id,) in store.tuples("SELECT run_id FROM runs")]
        bundle.write(hers.workspace, store, "hers", runs, "ada", file)
    import_bundle.import_files(records.workspace, import_bundle.open_bundle(path), "ada")


def a_job_whose_runs_were_given_to_another(records: Records) -> None:
    lost, after = records.submit("6000", lengths=(33, 34)), records.submit("6001", lengths=(33, 34))
    given = {run.run_id: {"job": after.jobs[0].job_id, "state": "unknown"} for run in lost.runs}
    write_json(JobFolder(lost.spec(0)).moved, {lost.jobs[0].job_id: given})
    attempt = records.attempt(after, slurm_id="6001")
    for load in (1, 2):
        records.done(after, attempt.in_load(load))


WRITERS = (
    a_measured_run, an_array_half_of_which_failed, a_job_that_was_requeued, a_script_submitted_by_hand,
    a_script_submitted_by_hand_twice, a_script_that_was_only_rendered, a_batch_that_slurm_refused,
    a_submission_that_was_cut_off, a_run_that_was_skipped, a_run_on_this_machine,
    a_run_of_many_requests_with_answers_of_any_kind, a_bundle_of_somebody, a_job_whose_runs_were_given_to_another,
)  # fmt: skip


def write_everything(records: Records) -> None:
    for write in WRITERS:
        write(records)


@pytest.mark.parametrize("write", WRITERS)
def test_rebuild_gives_every_table_row_for_row(records: Records, write: Callable[[Records], None]) -> None:
    records.workspace.create()
    write(records)
    assert records.collect().damaged == []
    before = contents(records.workspace)
    assert rebuild(records.workspace).damaged == []
    assert contents(records.workspace) == before


def test_rows_that_came_one_by_one_are_the_rows_that_rebuild_gives(records: Records) -> None:
    """Collected after every single file, in the order in which the files were written."""
    write_everything(records)
    once = rebuild(records.workspace).records
    at_once = contents(records.workspace)
    records.workspace.database.unlink()
    moved = sorted(
        (path for path in records.workspace.data.rglob("*.json") if "code" not in path.parts),
        key=lambda path: path.stat().st_mtime_ns,
    )
    store = records.workspace.root / "aside"
    records.workspace.data.rename(store)
    taken = 0
    for path in moved:
        place = path.relative_to(records.workspace.data)
        path.parent.mkdir(parents=True, exist_ok=True)
        (store / place).rename(path)
        collected = records.collect()
        assert collected.damaged == []
        taken += collected.records
    assert taken == once
    assert contents(records.workspace) == at_once


def test_the_workspace_has_a_row_of_every_kind(records: Records) -> None:
    """Or the tests above would compare nothing with nothing."""
    write_everything(records)
    records.collect()
    found = contents(records.workspace)
    assert [name for name, of_table in found.items() if not of_table] == []
    assert {row["status"] for row in found["results"]} == {"done", "failed"}


def test_collecting_twice_changes_no_byte(records: Records) -> None:
    write_everything(records)
    first = records.collect()
    before = records.workspace.database.read_bytes()
    second = records.collect()
    assert (first.records, second.records) == (len(contents(records.workspace)["results"]), 0)
    assert records.workspace.database.read_bytes() == before


def test_a_moved_workspace_has_the_same_rows(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    write_everything(records)
    records.collect()
    before = contents(records.workspace)
    monkeypatch.chdir("/")
    moved = Workspace(records.workspace.root.rename(records.workspace.root.parent / "moved"))
    with closing(open_store(moved)) as store:
        assert collect(moved, store).records == 0
    assert contents(moved) == before
    rebuild(moved)
    assert contents(moved) == before


def test_a_run_of_two_equal_folders_has_one_row_whichever_was_seen_first(records: Records) -> None:
    """Copies of one checkpoint have the same run id: the name that the table shows must not depend on the order."""
    copy = replace(records.model, name="copy", path="/elsewhere/copy")
    records.prepare(model=copy)  # rendered, with a collect after it
    records.collect()
    records.request()
    records.collect()
    before = contents(records.workspace)["runs"]
    rebuild(records.workspace)
    assert contents(records.workspace)["runs"] == before


def test_settings_and_prompts_are_told_apart_in_the_rows(records: Records) -> None:
    batch = records.submit(prompt="first")
    records.collect()
    (row,) = rows(records.workspace, "SELECT * FROM runs")
    assert json.loads(row["prompts"]) == ["first"]
    assert row["sampling"] == "greedy"
    assert row["run_id"] == batch.jobs[0].runs[0].run_id


def test_sampling_is_shown_as_it_was_asked(records: Records) -> None:
    batch = records.prepare()
    (run,) = batch.jobs[0].runs
    sampled = replace(run, run_id="0" * 12, sampling=Sampling(0.7, 0.9, 3))
    write_json(batch.spec(0), replace(batch.jobs[0], runs=[sampled]).to_json())
    records.collect()
    (row,) = rows(records.workspace, "SELECT sampling FROM runs WHERE run_id = '000000000000'")
    assert row["sampling"] == "temperature=0.7,top_p=0.9,seed=3"


# ---------------------------------------------------------------- damaged files


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[:1],
        lambda text: text[: len(text) // 2],
        lambda text: text[:-3],
        lambda text: b"null",
        lambda text: b"[]",
        lambda text: b"7",
        lambda text: b"{}",
        lambda text: b"\xff\xfe",
        lambda text: text.replace(b'"attempt":{', b'"attempt":["', 1),
        lambda text: text.replace(b'"run_id"', b'"other"', 1),
    ],
)
def test_a_damaged_record_is_reported_and_taken_once_it_is_whole(
    records: Records, damage: Callable[[bytes], bytes]
) -> None:
    batch = records.submit()
    record = records.done(batch, records.attempt(batch))
    whole = record.read_bytes()
    record.write_bytes(damage(whole))
    for _ in range(2):  # it is reported as long as it is damaged
        collected = records.collect()
        assert collected.records == 0
        assert [line.startswith(f"{record}: ") for line in collected.damaged] == [True]
        assert rows(records.workspace, "SELECT * FROM results") == []
    record.write_bytes(whole)
    collected = records.collect()
    assert (collected.records, collected.damaged) == (1, [])
    assert len(rows(records.workspace, "SELECT * FROM results")) == 1


def test_a_damaged_record_does_not_keep_the_others_out(labctl: Labctl, records: Records) -> None:
    batch = records.submit(
        lengths=(
            8,
            16,
        )
    )
    attempt = records.attempt(batch)
    first, second = (records.done(batch, attempt, run) for run in batch.jobs[0].runs)
    first.write_bytes(first.read_bytes()[:100])
    ran = labctl("collect", "--json")
    assert ran.json["records"] == 1
    assert [str(first) in line for line in ran.json["damaged"]] == [True]
    assert ran.err.count(str(first)) == 1
    assert second.exists()


def test_the_temporary_file_of_a_worker_that_is_writing_is_no_record(records: Records) -> None:
    batch = records.submit()
    record = records.done(batch, records.attempt(batch))
    record.rename(record.with_name(f".{record.name}.abc123"))
    collected = records.collect()
    assert (collected.records, collected.damaged) == (0, [])


def test_nothing_of_a_record_with_a_damaged_part_is_taken(records: Records) -> None:
    batch = records.submit()
    record = records.done(batch, records.attempt(batch))
    text = record.read_text(encoding="utf-8")
    record.write_text(re.sub(r'"token_times_s":\[[^\]]*\]', '"token_times_s":["soon","later"]', text), encoding="utf-8")
    assert len(records.collect().damaged) == 1
    assert rows(records.workspace, "SELECT status FROM results") == []


def test_a_request_with_a_damaged_part_does_not_break_status(labctl: Labctl, records: Records) -> None:
    """A labctl of another version may write jobs that this one cannot read."""
    records.submit()
    other = records.request(lengths=(16,))
    edit_json(records.workspace.submissions / f"{other}.json", jobs=[{"of": "the future"}])
    ran = labctl("status", "--json")
    assert ran.code == 0, ran.err
    assert len(ran.json) == 1


@pytest.mark.parametrize("name", ["array.json", "0.json"])
def test_a_batch_is_whole_once_its_damaged_file_is(records: Records, name: str) -> None:
    """intent.json and submitted.json only add to the rows of array.json and 0.json, which come back after them."""
    batch = records.submit()
    whole = (batch.folder / name).read_bytes()
    (batch.folder / name).write_bytes(whole[:10])
    records.collect()
    (batch.folder / name).write_bytes(whole)
    assert records.collect().damaged == []
    before = contents(records.workspace)
    rebuild(records.workspace)
    assert before == contents(records.workspace)


@pytest.mark.parametrize("content", ["[]", '{"a job": []}', "7"])
def test_states_of_no_job_are_a_damaged_file_and_do_not_break_status(
    labctl: Labctl, records: Records, content: str
) -> None:
    batch = records.submit()
    (batch.folder / "states.json").write_text(content, encoding="utf-8")
    ran = labctl("status")
    assert ran.code == 0, ran.err
    assert "file skipped" in ran.err and "states.json" in ran.err


def test_a_number_too_large_for_the_database_is_a_damaged_file(records: Records) -> None:
    good = records.submit()
    records.done(good, records.attempt(good))
    records.request(lengths=(10**20,))
    collected = records.collect()
    assert (collected.records, len(collected.damaged)) == (1, 1)


@pytest.mark.parametrize("key", ["requests", "batch_size"])
@pytest.mark.parametrize("kind", ["job", "submission"])
def test_more_requests_than_a_run_can_have_are_a_damaged_file(records: Records, key: str, kind: str) -> None:
    """labctl lists the requests of a run: of 10**30 it would not end."""
    batch = records.submit()
    (submission,) = records.workspace.submissions.iterdir()
    file = batch.spec(0) if kind == "job" else submission
    document = read_json(file)
    (document if kind == "job" else document["jobs"][0])["runs"][0][key] = 10**15
    write_json(file, document)
    (damaged,) = records.collect().damaged
    assert str(file) in damaged and "more than 10,000,000 requests" in damaged


# ---------------------------------------------------------------- several processes at once, and killed ones


def many_records(records: Records, requests: int = 6, lengths: int = 8, text: str = "a shard each") -> int:
    """Write records of many runs; returns how many."""
    for request in range(requests):
        batch = records.submit(str(6000 + request), lengths=range(1, lengths + 1), prompt=f"question {request}")
        attempt = records.attempt(batch, slurm_id=str(6000 + request))
        for place, run in enumerate(batch.jobs[0].runs):
            repeats = [measured(repeat, text=f"{text} {request} {place} {repeat}") for repeat in range(3)]
            records.done(batch, attempt, run, repeats=repeats)
    return requests * lengths


def collect_at_once(root: str, start: Barrier, rounds: int) -> int:
    start.wait(60)
    workspace = Workspace(Path(root))
    taken = 0
    for _ in range(rounds):
        with closing(open_store(workspace)) as store:
            taken += collect(workspace, store).records
    return taken


def _collect_into(root: str, start: Barrier, rounds: int, answers: Any) -> None:
    answers.put(collect_at_once(root, start, rounds))


def test_two_processes_that_collect_at_once_lose_nothing_and_double_nothing(records: Records) -> None:
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(3), context.Queue()
    root = str(records.workspace.root)
    records.workspace.create()
    collectors = [context.Process(target=_collect_into, args=(root, start, 40, answers)) for _ in range(2)]
    for collector in collectors:
        collector.start()
    start.wait(60)
    written = many_records(records)  # while they look
    taken = sum(answers.get(timeout=60) for _ in collectors)
    for collector in collectors:
        collector.join(60)
        assert collector.exitcode == 0
    taken += records.collect().records
    assert taken == written
    before = contents(records.workspace)
    assert len(before["results"]) == written
    rebuild(records.workspace)
    assert contents(records.workspace) == before


def test_a_journal_that_another_process_removes_meanwhile_is_a_regular_file(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = workspace.root / "journal"
    journal.touch()
    stat = Path.stat

    def stat_and_remove(path: Path, **options: Any) -> os.stat_result:
        status = stat(path, **options)
        if path == journal:
            path.unlink()
        return status

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", stat_and_remove)
        special = is_special(journal)
    assert not special


def test_a_database_that_another_process_creates_meanwhile_is_writable(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = records.workspace
    workspace.create()
    access = os.access

    def access_and_create(path: Path, mode: int) -> bool:
        answer = access(path, mode)
        if path == workspace.index:
            path.touch()
        return answer

    monkeypatch.setattr(os, "access", access_and_create)
    assert workspace.writable


def _collect_slowly(root: str, rows: int, reached: Event) -> None:
    """The fault that is injected: after some rows the process stops in the middle of its transaction, and of an insert."""
    insert, count = Store._insert, 0

    def slow(store: Store, where_known: str, table: str, columns: Any, values: Any) -> None:
        insert(store, where_known, table, columns, stopping(values))

    def stopping(values: Any) -> Any:
        nonlocal count
        for value in values:
            yield value
            count += 1
            if count == rows:
                reached.set()
                time.sleep(600)

    Store._insert = slow  # type: ignore[method-assign]
    workspace = Workspace(Path(root))
    with closing(open_store(workspace)) as store:
        collect(workspace, store)


def kill_while_collecting(workspace: Workspace, rows: int) -> None:
    context = multiprocessing.get_context("spawn")
    reached = context.Event()
    collector = context.Process(target=_collect_slowly, args=(str(workspace.root), rows, reached))
    collector.start()
    assert reached.wait(60)
    assert collector.pid is not None
    os.kill(collector.pid, signal.SIGKILL)
    collector.join(60)
    assert collector.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("stop_after", [1, 100, 300])
def test_a_process_killed_while_it_collects_loses_nothing_and_doubles_nothing(
    records: Records, stop_after: int
) -> None:
    batch = records.submit("5999", name="before")
    records.done(batch, records.attempt(batch, slurm_id="5999"))
    records.collect()
    before = contents(records.workspace)
    written = many_records(records, requests=2)
    kill_while_collecting(records.workspace, stop_after)
    with closing(Store(records.workspace.database)) as store:  # opening it rolls back
        assert len(store.rows("SELECT * FROM results")) == 1
    assert contents(records.workspace) == before
    assert is_whole(records.workspace)
    assert records.collect().records == written
    after = contents(records.workspace)
    assert len(after["results"]) == written + 1
    rebuild(records.workspace)
    assert contents(records.workspace) == after


def large_records(records: Records) -> int:
    """More than SQLite keeps in memory, so that a transaction has reached the file, with its journal beside it."""
    return many_records(records, requests=1, lengths=8, text="x" * 400_000)


def test_rebuild_after_a_killed_process_gives_a_whole_database(records: Records) -> None:
    batch = records.submit("5999", name="before")
    records.done(batch, records.attempt(batch, slurm_id="5999"))
    records.collect()
    written = large_records(records)
    kill_while_collecting(records.workspace, 60)
    assert Path(f"{records.workspace.database}-journal").stat().st_size > 0
    assert rebuild(records.workspace).records == written + 1
    assert is_whole(records.workspace)
    assert len(contents(records.workspace)["results"]) == written + 1


def test_collecting_after_a_killed_process_with_a_large_journal_loses_nothing(records: Records) -> None:
    batch = records.submit("5999", name="before")
    records.done(batch, records.attempt(batch, slurm_id="5999"))
    records.collect()
    written = large_records(records)
    kill_while_collecting(records.workspace, 60)
    assert records.collect().records == written
    assert is_whole(records.workspace)


def test_two_command_lines_at_once_answer_both(records: Records) -> None:
    """The whole program, twice: `labctl collect` by two people who share a workspace."""
    written = many_records(records, requests=2)
    code = "import sys; from labctl_orchestrator.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "collect", "--json"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert sum(json.loads(out)["records"] for out, _ in answers) == written


# ---------------------------------------------------------------- what a row says


def test_the_rows_of_a_record_say_what_the_record_says(records: Records) -> None:
    batch = records.submit()
    attempt = records.attempt(batch)
    records.done(batch, attempt)
    records.collect()
    (run,) = batch.jobs[0].runs
    result = only(records, "results")
    assert (result["run_id"], result["attempt_id"], result["status"]) == (run.run_id, attempt.attempt_id, "done")
    assert (result["load_s"], result["init_s"], result["warmup_s"]) == (12.5, 0.5, 1.5)
    repeats = rows(records.workspace, "SELECT * FROM repeats ORDER BY repeat")
    assert [row["repeat"] for row in repeats] == [0, 1, 2]
    assert repeats[0]["ttft_s"] == pytest.approx(0.1)
    assert repeats[0]["tpot_s"] == pytest.approx(0.02)
    assert repeats[0]["output_tok_s"] == pytest.approx(4 / repeats[0]["wall_s"])
    devices = rows(records.workspace, "SELECT * FROM devices")
    assert len(devices) == 3 * 2
    assert {row["weights_bytes"] for row in devices} == {2**30}
    samples = rows(records.workspace, "SELECT * FROM samples JOIN texts USING (text_id)")
    assert {(row["output_tokens"], row["text"], row["finish_reason"]) for row in samples} == {
        (4, "a shard each", "length")
    }
    assert len(rows(records.workspace, "SELECT * FROM texts")) == 1  # an equal text is kept once


def only(records: Records, table: str) -> dict[str, Any]:
    (row,) = rows(records.workspace, f"SELECT * FROM {table}")
    return row


def test_the_rows_of_a_failed_run_say_why(records: Records) -> None:
    batch = records.submit()
    records.failed(batch, records.attempt(batch))
    records.collect()
    result = only(records, "results")
    assert (result["status"], result["failure_kind"]) == ("failed", "gpu-out-of-memory")
    assert (result["failure"], result["remedy"]) == ("CUDA out of memory", "take a smaller batch")
    assert rows(records.workspace, "SELECT * FROM repeats") == []


def test_a_job_submitted_by_hand_has_its_slurm_id_from_its_worker(records: Records) -> None:
    batch = records.prepare()
    records.collect()
    assert only(records, "jobs")["slurm_id"] is None
    records.attempt(batch, slurm_id="4242")
    records.collect()
    assert only(records, "jobs")["slurm_id"] == "4242"


def test_a_worker_does_not_change_the_id_that_slurm_gave(records: Records) -> None:
    """A worker inside somebody's allocation sees that one's id."""
    batch = records.submit("1000")
    records.attempt(batch, slurm_id="9999")
    records.collect()
    assert only(records, "jobs")["slurm_id"] == "1000"


@pytest.mark.parametrize("count", [1, 3])
def test_the_tasks_of_an_array_have_their_own_ids(records: Records, count: int) -> None:
    dtypes = ("float16", "bfloat16", "float32")[:count]
    batch = records.submit("1000", dtypes=dtypes)
    records.collect()
    found = [row["slurm_id"] for row in rows(records.workspace, "SELECT slurm_id FROM jobs ORDER BY task")]
    assert found == (["1000"] if count == 1 else ["1000_0", "1000_1", "1000_2"])
    assert len(batch.jobs) == count


def test_a_record_whose_job_is_not_here_is_taken_all_the_same(records: Records) -> None:
    """Records copied from another workspace."""
    batch = records.submit()
    elsewhere: JobArray = replace(batch, jobs=[replace(batch.jobs[0], job_id="elsewhere.0")])
    attempt: Attempt = records.attempt(elsewhere)
    run: RunSpec = batch.jobs[0].runs[0]
    records.done(elsewhere, attempt, run)
    assert records.collect().records == 1
    assert only(records, "results")["job_id"] == "elsewhere.0"


# ---------------------------------------------------------------- records that are damaged or deleted after they were read

OF_A_RECORD = ("results", "repeats", "devices", "samples", "documents", "questions", "texts")


def rows_of_records(workspace: Workspace) -> int:
    found = contents(workspace)
    return sum(len(found[table]) for table in OF_A_RECORD)


def two_measured_runs(records: Records) -> tuple[Path, Path]:
    batch = records.submit(lengths=(8, 16))
    attempt = records.attempt(batch)
    first, second = (
        records.done(batch, attempt, run, repeats=[measured(0, text=f"answer {place}")])
        for place, run in enumerate(batch.jobs[0].runs)
    )
    records.collect()
    return first, second


def is_as_rebuilt(workspace: Workspace) -> bool:
    before = contents(workspace)
    rebuild(workspace)
    return contents(workspace) == before


def test_a_record_that_is_truncated_after_it_was_read_leaves_the_index(labctl: Labctl, records: Records) -> None:
    """Its run is a hole then, which labctl retry fills."""
    first, _ = two_measured_runs(records)
    whole, before = first.read_bytes(), contents(records.workspace)
    first.write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        assert [str(first) in line for line in records.collect().damaged] == [True]
    assert rows_of_records(records.workspace) == 1 + 1 + 2 + 1 + 1
    assert sorted(run["state"] for run in labctl("status", "--json").json) != ["done", "done"]
    assert is_as_rebuilt(records.workspace)
    first.write_bytes(whole)
    assert records.collect().records == 1
    after = contents(records.workspace)
    assert {name: after[name] for name in OF_A_RECORD} == {name: before[name] for name in OF_A_RECORD}


def test_a_record_that_is_deleted_leaves_the_index(records: Records) -> None:
    first, second = two_measured_runs(records)
    first.unlink()
    collected = records.collect()
    assert (collected.records, collected.damaged) == (0, [])
    assert [row["path"] for row in contents(records.workspace)["results"]] == [
        str(second.relative_to(records.workspace.data))
    ]
    assert is_as_rebuilt(records.workspace)
    second.unlink()
    records.workspace.results.rename(records.workspace.data / "elsewhere")
    records.collect()
    assert rows_of_records(records.workspace) == 0
    assert is_as_rebuilt(records.workspace)


def test_a_copy_of_a_deleted_record_takes_its_place(records: Records) -> None:
    first, _ = two_measured_runs(records)
    copy = first.with_name(f"z-{first.name}")
    copy.write_bytes(first.read_bytes())
    records.collect()
    copy.unlink()
    records.collect()
    assert len(contents(records.workspace)["results"]) == 2
    assert is_as_rebuilt(records.workspace)


def test_a_record_that_was_made_shorter_leaves_no_row_of_before(records: Records) -> None:
    batch = records.submit(lengths=(8,))
    attempt = records.attempt(batch)
    records.done(batch, attempt, repeats=[measured(0, text="one"), measured(1, text="two")])
    records.collect()
    records.done(batch, attempt, repeats=[measured(0, text="three")])
    assert records.collect().records == 1
    found = contents(records.workspace)
    assert [row["text"] for row in found["texts"]] == ["three"]
    assert (len(found["repeats"]), len(found["samples"]), len(found["devices"])) == (1, 1, 2)
    assert is_as_rebuilt(records.workspace)


def test_one_record_among_many_that_the_database_cannot_hold_is_the_only_one_left_out(records: Records) -> None:
    """Their rows go in together; what SQLite refuses (a number of more than 64 bits) is found by itself."""
    batch = records.submit(lengths=range(1, 30))
    attempt = records.attempt(batch)
    paths = [records.done(batch, attempt, run) for run in batch.jobs[0].runs]
    bad = paths[11]
    bad.write_text(bad.read_text(encoding="utf-8").replace('"prompt_tokens":11', f'"prompt_tokens":{10**30}'), "utf-8")
    collected = records.collect()
    assert collected.records == len(paths) - 1
    assert [line.startswith(f"{bad}: OverflowError") for line in collected.damaged] == [True]
    assert is_as_rebuilt(records.workspace)


def test_what_json_allows_and_the_fast_reader_does_not_is_read_all_the_same(records: Records) -> None:
    batch = records.submit()
    record = records.done(batch, records.attempt(batch), load_s=float("inf"))
    assert "Infinity" in record.read_text(encoding="utf-8")
    assert (records.collect().records, only(records, "results")["load_s"]) == (1, float("inf"))


def test_a_narrow_look_takes_what_is_asked_for_and_nothing_else(records: Records) -> None:
    first = records.submit("1000", lengths=(8,))
    second = records.submit("2000", lengths=(16,))
    records.collect()
    for batch in (first, second):
        records.done(batch, records.attempt(batch))
        records.states(batch, state="COMPLETED")
    run_id = first.runs[0].run_id
    with closing(open_store(records.workspace)) as store:
        assert collect(records.workspace, store, arrays=[first.array_id], runs=[run_id]).records == 1
        assert [row["run_id"] for row in store.rows("SELECT run_id FROM results")] == [run_id]
        assert [
            row["state"] for row in store.rows("SELECT state FROM jobs ORDER BY array_id = ?", (first.array_id,))
        ] == [
            None,
            "COMPLETED",
        ]
        assert collect(records.workspace, store, arrays=[], runs=[]).records == 0
        assert collect(records.workspace, store).records == 1
    assert is_as_rebuilt(records.workspace)


# ---------------------------------------------------------------- folders that need no listing


def long_ago(folder: Path) -> None:
    """As if the folder had been changed last an hour ago."""
    os.utime(folder, (time.time() - 3600,) * 2)


def listed(monkeypatch: pytest.MonkeyPatch, records: Records) -> list[str]:
    """The runs whose folders a look lists."""
    seen: list[str] = []
    scandir = os.scandir

    def watched(path: Any) -> Any:
        if Path(path).parent == records.workspace.results:
            seen.append(Path(path).name)
        return scandir(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", watched)
        records.collect()
    return seen


def settled_run(records: Records) -> tuple[JobArray, Path]:
    """A run whose folder needs no listing."""
    batch = records.submit()
    record = records.done(batch, records.attempt(batch, age_s=600))
    records.collect()
    long_ago(record.parent)
    records.collect()
    return batch, record


def test_a_folder_that_is_as_it_was_is_not_listed_again(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    _, record = settled_run(records)
    assert listed(monkeypatch, records) == []
    record.parent.joinpath("something").touch()
    assert listed(monkeypatch, records) == [record.parent.name]


def test_a_young_folder_is_listed_every_time(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = records.submit()
    records.done(batch, records.attempt(batch))
    records.collect()
    assert listed(monkeypatch, records) == listed(monkeypatch, records) == [batch.runs[0].run_id]


def test_a_new_record_in_such_a_folder_is_found(records: Records) -> None:
    batch, _ = settled_run(records)
    records.done(batch, records.attempt(batch, age_s=10))
    assert records.collect().records == 1


def test_a_record_that_is_gone_from_such_a_folder_is_forgotten(records: Records) -> None:
    _, record = settled_run(records)
    record.unlink()
    records.collect()
    assert rows(records.workspace, "SELECT * FROM results") == []


def test_a_record_that_is_changed_damaged_and_mended_in_place_is_seen_each_time(records: Records) -> None:
    """None of it leaves a mark on the folder."""
    _, record = settled_run(records)
    whole, folder_time = record.read_bytes(), record.parent.stat().st_mtime_ns
    record.write_bytes(whole.replace(b'"load_s":12.5', b'"load_s":13.25'))
    assert records.collect().records == 1
    assert rows(records.workspace, "SELECT load_s FROM results") == [{"load_s": 13.25}]
    record.write_bytes(whole[:100])
    assert len(records.collect().damaged) == 1
    assert rows(records.workspace, "SELECT * FROM results") == []
    assert len(records.collect().damaged) == 1  # and it is still told of
    record.write_bytes(whole)
    assert records.collect().records == 1
    assert record.parent.stat().st_mtime_ns == folder_time


def changed_only(records: Records) -> Collected:
    """Collect as status and compare do: from changed folders alone."""
    with closing(open_store(records.workspace)) as store:
        return collect(records.workspace, store, every_file=False)


def settle(records: Records) -> None:
    """Index everything, in folders that changed last an hour ago."""
    for folder in records.workspace.data.rglob("*"):
        if folder.is_dir():
            long_ago(folder)
    assert changed_only(records).damaged == []
    (folders,) = rows(records.workspace, "SELECT count(*) AS n FROM folders")
    assert folders["n"] > 0


@pytest.mark.parametrize("write", WRITERS)
def test_files_of_any_kind_are_found_beside_folders_that_need_no_listing(
    records: Records, write: Callable[[Records], None]
) -> None:
    for other in WRITERS:
        if other is not write:
            other(records)
    settle(records)
    write(records)
    assert changed_only(records).damaged == []
    assert is_as_rebuilt(records.workspace)


def test_a_change_in_an_array_that_needed_no_listing_is_found(records: Records) -> None:
    batch = records.submit("1000", lengths=(8, 16))
    settle(records)
    records.states(batch, state="RUNNING")  # array and job are indexed, states.json is new
    changed_only(records)
    settle(records)
    first = records.attempt(batch, slurm_id="1000")  # a new folder
    changed_only(records)
    settle(records)
    second = records.attempt(batch, slurm_id="1000", age_s=1)  # a new file in it
    records.done(batch, first)
    records.done(batch, second, batch.runs[1])
    assert changed_only(records).records == 2
    settle(records)
    records.states(batch, state="COMPLETED", exit_code="0:0", ended_at=ago(5))  # a file renamed into place
    changed_only(records)
    assert [row["state"] for row in rows(records.workspace, "SELECT state FROM jobs")] == ["COMPLETED"]
    assert len(rows(records.workspace, "SELECT * FROM job_starts")) == 2
    assert is_as_rebuilt(records.workspace)


def test_a_record_that_another_replaces_is_read_again(records: Records) -> None:
    """Of the same size."""
    _, record = settled_run(records)
    times = record.stat()
    other = record.with_name("other")
    other.write_bytes(record.read_bytes().replace(b'"load_s":12.5', b'"load_s":99.5'))
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    other.replace(record)
    assert changed_only(records).records == 1
    assert rows(records.workspace, "SELECT load_s FROM results") == [{"load_s": 99.5}]


def test_a_folder_of_records_that_is_gone_is_forgotten_and_found_again_with_its_old_time(records: Records) -> None:
    _, record = settled_run(records)
    aside = records.workspace.root / "aside"
    record.parent.rename(aside)
    changed_only(records)
    assert rows(records.workspace, "SELECT * FROM results") == []
    aside.rename(record.parent)  # its own modification time stays
    assert changed_only(records).records == 1


@pytest.mark.parametrize("age_s", [10, -3600])
def test_a_change_in_the_same_tick_as_the_scan_is_found(records: Records, age_s: float) -> None:
    """The folder's time is as before: the clock of the filesystem ticks slowly, or another machine's clock is wrong."""
    batch = records.submit(lengths=(8,))
    folder = records.done(batch, records.attempt(batch, age_s=60)).parent
    tick = (time.time() - age_s,) * 2
    os.utime(folder, tick)
    assert changed_only(records).records == 1
    assert changed_only(records).records == 0
    records.done(batch, records.attempt(batch, age_s=10))
    os.utime(folder, tick)
    assert changed_only(records).records == 1


def test_a_damaged_record_is_named_by_each_scan_and_read_when_it_is_mended_in_place(records: Records) -> None:
    batch = records.submit()
    record = records.done(batch, records.attempt(batch))
    whole = record.read_bytes()
    record.write_bytes(whole[:100])
    long_ago(record.parent)
    for _ in range(3):
        assert len(changed_only(records).damaged) == 1
    record.write_bytes(whole)
    assert changed_only(records).records == 1


def test_a_damaged_record_beside_a_replaced_one_is_named_by_each_scan(records: Records) -> None:
    batch, record = settled_run(records)
    other = records.done(batch, records.attempt(batch, age_s=10))
    settle(records)
    other.write_bytes(other.read_bytes()[:100])  # in place, so that no scan of changed folders sees it yet
    record.write_bytes(record.read_bytes() + b" ")
    record.rename(record.with_suffix(".aside")).rename(record)
    long_ago(record.parent)
    for _ in range(2):
        assert [str(other) in line for line in changed_only(records).damaged] == [True]


def test_a_record_behind_a_link_is_looked_at_each_time(records: Records) -> None:
    _, record = settled_run(records)
    elsewhere = record.rename(records.workspace.root / "elsewhere.json")
    record.symlink_to(elsewhere)
    long_ago(record.parent)
    changed_only(records)
    elsewhere.write_bytes(elsewhere.read_bytes().replace(b'"load_s":12.5', b'"load_s":99.5'))
    assert changed_only(records).records == 1
    assert rows(records.workspace, "SELECT load_s FROM results") == [{"load_s": 99.5}]


def test_labctl_collect_finds_a_record_that_was_changed_in_place(labctl: Labctl, records: Records) -> None:
    _, record = settled_run(records)
    record.write_bytes(record.read_bytes().replace(b'"load_s":12.5', b'"load_s":99.5'))
    assert changed_only(records).records == 0  # a change that no writer of labctl makes
    assert labctl("collect", "--json").json["records"] == 1


def test_a_workspace_that_was_read_once_needs_no_listing(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = records.submit()
    long_ago(records.done(batch, records.attempt(batch)).parent)
    assert len(listed(monkeypatch, records)) == 1
    assert listed(monkeypatch, records) == []


def test_a_database_that_is_made_again_lists_every_folder(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    settled_run(records)
    rebuild(records.workspace)
    records.workspace.database.unlink()
    assert len(listed(monkeypatch, records)) == 1


@pytest.mark.parametrize("damage", [5e-323, -math.inf, math.nan])
def test_a_figure_that_is_no_finite_number_is_no_value(labctl: Labctl, records: Records, damage: float) -> None:
    batch = records.submit(name="damaged", lengths=(16, 32))
    attempt = records.attempt(batch)
    for run in batch.runs:
        repeat = measured(0)
        repeat.wall_s = damage if run.max_new_tokens == 16 else len(repeat.samples[0].token_ids) / 10
        records.done(batch, attempt, run, repeats=[repeat, replace(repeat, repeat=1)])
    answer = labctl("compare", "damaged", "--metric", "output_tok_s", "--json").json
    assert [row["mean"] for row in answer["blocks"][0]["rows"]] == [None, 10.0]
