"""labctl forget: a run is out of every file and row, and everything else is as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Labctl, Records, Slurm, ago, edit_json, files_below, sacct_line, squeue_line


def table_rows(labctl: Labctl, table: str) -> list[dict[str, object]]:
    answer: list[dict[str, object]] = labctl("query", f"SELECT * FROM {table} ORDER BY 1, 2", "--json").json
    return answer


def test_a_forgotten_run_is_nowhere_and_the_rest_stays(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    slurm.shows()
    kept = records.submit("1", name="kept", lengths=(4,))
    records.done(kept, records.attempt(kept, slurm_id="1"))
    shared = records.submit("2", name="shared", lengths=(8, 16))
    attempt = records.attempt(shared, slurm_id="2")
    for run in shared.runs:
        records.done(shared, attempt, run)
    gone, stays = shared.runs
    ran = labctl("forget", gone.run_id, "--yes")
    assert (ran.code, ran.out) == (0, "")
    assert "removed 1 run, 1 record (" in ran.err
    with_it = [name for name, text in files_below(records.workspace.data).items() if gone.run_id.encode() in text]
    assert with_it == []
    for table in ("runs", "submission_runs", "job_runs", "results", "repeats", "samples"):
        assert gone.run_id not in str(table_rows(labctl, table)), table
    left = labctl("status", "--all", "--json").json
    assert {(run["run_id"], run["state"]) for run in left} == {(stays.run_id, "done"), (kept.runs[0].run_id, "done")}
    assert [run["run_id"] for run in labctl("status", "shared", "--json").json] == [stays.run_id]


def test_a_submission_without_another_run_goes_with_its_jobs(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    slurm.shows()
    batch = records.submit("1", name="mine", lengths=(4, 8))
    attempt = records.attempt(batch, slurm_id="1")
    records.done(batch, attempt, batch.runs[0])
    slurm.shows(accounted=sacct_line("1", "FAILED", f"labctl-{batch.array_id}"))
    said = labctl("forget", "mine", "--yes", "--json").json
    assert (len(said["runs"]), said["records"], said["arrays"], len(said["submissions"])) == (2, 1, [batch.array_id], 1)
    assert not batch.folder.exists() and list(records.workspace.submissions.iterdir()) == []
    assert table_rows(labctl, "arrays") == table_rows(labctl, "runs") == []


def test_one_task_of_an_array_can_go(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    """The other tasks keep their Slurm ids, which submitted.json lists by place."""
    slurm.shows()
    batch = records.submit("1", lengths=(4,), dtypes=("float16", "bfloat16"))
    for task in range(2):
        records.done(batch, records.attempt(batch, task, slurm_id=f"1_{task}"))
    labctl("forget", batch.jobs[0].runs[0].run_id, "--yes")
    (run,) = labctl("status", "--json").json
    assert (run["run_id"], run["state"], run["slurm_id"]) == (batch.jobs[1].runs[0].run_id, "done", "1_1")
    for command in (("list",), ("du",), ("clean", "--dry-run"), ("collect", "--rebuild"), ("compare",), ("export",)):
        assert labctl(*command).code == 0, command


@pytest.mark.parametrize("odd", [None, 1.5, "text", [None], [{}], {"a": 1}])
def test_a_run_is_forgotten_beside_files_of_odd_types(labctl: Labctl, records: Records, odd: object) -> None:
    shared = records.submit("2", name="shared", lengths=(8, 16))
    attempt = records.attempt(shared, slurm_id="2")
    for run in shared.runs:
        records.done(shared, attempt, run)
    labctl("status", "--all")
    (submission,) = records.workspace.submissions.iterdir()
    edit_json(submission, runs=odd)
    edit_json(shared.folder / "0.json", runs=odd)
    ran = labctl("forget", shared.runs[0].run_id, "--yes")
    assert (ran.code, "removed 1 run, 1 record (" in ran.err) == (0, True)
    assert not (records.workspace.results / shared.runs[0].run_id).exists()


def test_a_run_that_is_queued_is_not_forgotten(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    batch = records.submit("1")
    slurm.shows(squeue_line("1", "PENDING", f"labctl-{batch.array_id}"))
    labctl("status")
    before = files_below(records.workspace.arrays)
    ran = labctl("forget", batch.runs[0].run_id, "--yes")
    assert (ran.code, ran.out) == (2, "")
    assert f"cannot forget a run that is pending as job 1: {batch.runs[0].run_id}\n  -> labctl cancel" in ran.err
    assert files_below(records.workspace.arrays).keys() == before.keys()


def test_nothing_is_forgotten_without_a_yes(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    slurm.shows()
    batch = records.submit("1")
    path = records.done(batch, records.attempt(batch, slurm_id="1"))
    ran = labctl("forget", batch.runs[0].run_id)
    assert (ran.code, path.exists()) == (2, True)
    assert (
        "cannot ask without a terminal: Remove 1 run, 1 record, 1 job array, 1 submission (" in ran.err
        and "-> add --yes" in ran.err
    )


def test_a_forgotten_run_is_measured_again(labctl: Labctl, records: Records, slurm: Slurm, checkpoint: Path) -> None:
    slurm.accepts()
    asked = ["submit", "-p", "dgxh", "--model-id", checkpoint, "--no-preflight", "--json"]
    (run,) = labctl(*asked).json["runs"]
    (array,) = records.workspace.arrays.iterdir()
    (array / "states.json").write_text(
        f'{{"{array.name}.0": {{"state": "CANCELLED", "ended_at": "{ago(3600)}"}}}}', encoding="utf-8"
    )
    assert labctl("forget", run["run_id"], "--yes").code == 0
    (again,) = labctl(*asked).json["runs"]
    assert again["run_id"] == run["run_id"]
    (new,) = records.workspace.arrays.iterdir()
    assert (new / "submitted.json").is_file()
