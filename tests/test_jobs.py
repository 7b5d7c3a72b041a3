"""measured_jobs: where the time of a job's GPUs went, reckoned by hand, and nothing told that is not known."""

from __future__ import annotations

from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.exchange import query
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking import refresh
from labctl_workers.record import Attempt, read_json

from .conftest import JobArray, Labctl, Records, Slurm, edit_json, measured, sacct_line, squeue_line

QUEUED, STARTED, ENDED = "2026-01-01T10:00:00Z", "2026-01-01T10:00:30Z", "2026-01-01T10:01:30Z"
PARTS = ("limit", "held", "load", "warmup", "measured", "rest")


def job(records: Records, where: str = "1") -> dict[str, Any]:
    """The one row of measured_jobs."""
    records.collect()
    answer = query.query(records.workspace, f"SELECT * FROM measured_jobs WHERE {where}")
    (row,) = answer.to_json()
    return row


def parts(row: dict[str, Any]) -> list[float | None]:
    return [row[f"{part}_gpu_s"] for part in PARTS]


def ended(records: Records, batch: JobArray, **more: Any) -> None:
    columns = {"state": "COMPLETED", "queued_at": QUEUED, "started_at": STARTED, "ended_at": ENDED, **more}
    records.states(batch, **columns)


def all_done(records: Records, batch: JobArray, attempt: Attempt) -> None:
    """Each run with a repeat of 2 s and one of 3 s, after a load of 12 s, an init of 1 s and a warm-up of 1.5 s."""
    for run in batch.runs:
        repeats = [measured(0), measured(1)]
        repeats[0].wall_s, repeats[1].wall_s = 2.0, 3.0
        records.done(batch, attempt, run, repeats=repeats, load_s=12.0, init_s=1.0)


# ---------------------------------------------------------------- by hand


def test_a_load_is_counted_once_for_all_runs_of_a_start(records: Records) -> None:
    batch = records.submit(name="lengths", lengths=(16, 32, 64))
    all_done(records, batch, records.attempt(batch))
    ended(records, batch)
    row = job(records)
    assert parts(row) == [2 * 3600.0, 2 * 60.0, 2 * 13.0, 2 * 3 * 1.5, 2 * 3 * 5.0, 2 * (60.0 - 13.0 - 4.5 - 15.0)]
    assert (row["gpus"], row["queue_s"], row["held_s"], row["time_s"]) == (2, 30.0, 60.0, 3600)
    assert (row["starts"], row["runs_planned"], row["runs_done"], row["state"]) == (1, 3, 3, "COMPLETED")
    told = (
        "slurm_id",
        "submission",
        "submissions",
        "origin",
        "partition",
        "backend",
        "model",
        "dtype",
        "engine_options",
    )
    assert [row[name] for name in told] == [
        "1000", "lengths", "lengths", "here", "dgxh", "hf", "tiny-llama", "bfloat16", "{}",
    ]  # fmt: skip


def test_a_start_that_measured_a_run_of_a_requeued_job_has_its_own_load(records: Records) -> None:
    batch = records.submit(lengths=(16, 32))
    first = records.attempt(batch, age_s=90)
    second = records.attempt(batch, age_s=30, restarts=1)
    for attempt, run in zip((first, second), batch.runs, strict=True):
        records.done(batch, attempt, run, load_s=12.0, init_s=1.0)
    ended(records, batch, held_before_s=40.0)
    row = job(records)
    assert (row["starts"], row["held_s"], row["held_gpu_s"], row["load_gpu_s"]) == (2, 100.0, 200.0, 2 * 2 * 13.0)


def test_what_a_failed_run_took_is_in_the_rest(records: Records) -> None:
    batch = records.submit(lengths=(16, 32))
    attempt = records.attempt(batch)
    for run in batch.runs:
        records.failed(batch, attempt, run)
    ended(records, batch, state="FAILED")
    row = job(records)
    assert parts(row)[1:] == [120.0, 0.0, 0.0, 0.0, 120.0]
    assert (row["runs_planned"], row["runs_done"]) == (2, 0)


def test_a_request_that_found_a_run_measured_asked_for_it_and_submitted_nothing(records: Records) -> None:
    batch = records.submit(name="first")
    all_done(records, batch, records.attempt(batch))
    records.request(name="second", skipped=[run.run_id for run in batch.runs])
    row = job(records)
    assert (row["submission"], row["submissions"]) == ("first", "first, second")


def test_the_gpu_time_of_a_run_is_that_of_all_starts_of_its_job(labctl: Labctl, records: Records) -> None:
    records.workspace.settings_file.write_text('[partitions.dgxh]\nprice_per_gpu_hour = "36 EUR"\n', encoding="utf-8")
    batch = records.submit()
    all_done(records, batch, records.attempt(batch, restarts=1))
    ended(records, batch, held_before_s=40.0)
    answer = labctl("compare", "--metric", "gpu_s", "--metric", "job_cost", "--json").json
    assert [block["rows"][0]["mean"] for block in answer["blocks"]] == [200.0, pytest.approx(2.0)]
    assert query.query(records.workspace, "SELECT gpu_s FROM measured_runs").rows == [(200.0,)]


# ---------------------------------------------------------------- what is not known is not told


def test_before_its_end_nothing_is_told_of_what_a_job_held(records: Records) -> None:
    batch = records.submit()
    records.attempt(batch)
    ended(records, batch, state="RUNNING", ended_at=None)
    row = job(records)
    assert (row["held_s"], row["held_gpu_s"], row["rest_gpu_s"], row["limit_gpu_s"]) == (None, None, None, 7200.0)


@pytest.mark.parametrize("seen", ["two starts", "the second start alone"])
def test_without_accounting_it_is_not_known_what_a_requeued_job_held(
    labctl: Labctl, records: Records, seen: str
) -> None:
    batch = records.submit()
    if seen == "two starts":
        records.attempt(batch, age_s=90)
    all_done(records, batch, records.attempt(batch, restarts=1))
    ended(records, batch)
    row = job(records)
    assert (row["starts"], row["held_gpu_s"], row["rest_gpu_s"], row["measured_gpu_s"]) == (2, None, None, 10.0)
    (block,) = labctl("compare", "--metric", "gpu_s", "--json").json["blocks"]
    assert block["rows"][0]["n"] == 0


def test_of_a_script_that_was_submitted_twice_by_hand_one_job_of_slurm_is_not_the_whole(records: Records) -> None:
    batch = records.prepare()
    for slurm_id in ("7", "8"):
        all_done(records, batch, records.attempt(batch, slurm_id=slurm_id))
    ended(records, batch, held_before_s=0.0)
    row = job(records)
    assert (row["starts"], row["held_gpu_s"], row["submission"]) == (2, None, None)


def test_a_local_job_holds_no_allocation(records: Records) -> None:
    """It waits for its turn, and its end is when labctl saw it."""
    batch = records.submit("123", partition="local")
    all_done(records, batch, records.attempt(batch, slurm_id=None))
    ended(records, batch)
    assert parts(job(records)) == [None, None, 2 * 13.0, 2 * 1.5, 2 * 5.0, None]


def test_a_job_that_was_cancelled_while_it_waited_held_nothing(records: Records) -> None:
    batch = records.submit()
    ended(records, batch, state="CANCELLED", started_at=None, held_before_s=0.0)
    row = job(records)
    assert (row["starts"], row["held_gpu_s"], row["rest_gpu_s"]) == (0, 0.0, 0.0)


def test_a_job_of_a_partition_without_gpus_takes_none(records: Records) -> None:
    batch = records.submit()
    edit_json(batch.folder / "array.json", gpus=0)
    all_done(records, batch, records.attempt(batch))
    ended(records, batch)
    row = job(records)
    assert row["held_s"] == 60.0
    assert parts(row) == [0.0] * 6


def test_of_a_run_on_cpus_whose_batch_does_not_say_it_is_not_known_how_many_gpus_were_asked_for(
    records: Records,
) -> None:
    batch = records.prepare()
    records.attempt(batch)
    edit_json(batch.folder / "array.json", gpus=None)
    edit_json(batch.spec(0), device="cpu")
    assert job(records)["gpus"] is None


def test_what_slurm_did_not_take_is_no_job(records: Records) -> None:
    records.prepare(lengths=(1,))  # only rendered
    refused = records.prepare(lengths=(2,))
    records.intend(refused)
    records.refuse(refused)
    records.collect()
    assert query.query(records.workspace, "SELECT * FROM measured_jobs").rows == []


# ---------------------------------------------------------------- how it is learnt


def test_a_submission_keeps_what_it_asked_slurm_for(
    labctl: Labctl, slurm: Slurm, records: Records, checkpoint: Path
) -> None:
    slurm.accepts(600)
    line = ("submit", "--model-id", checkpoint, "-p", "dgxh", "--sbatch", "comment=a", "--json")
    assert labctl(*line, "--time", "0-02:00:00").code == 0
    (path,) = records.workspace.arrays.glob("*/array.json")
    assert {key: read_json(path)[key] for key in ("time_s", "gpus")} == {"time_s": 7200, "gpus": 2}
    assert job(records)["limit_gpu_s"] == 2 * 7200.0


def test_a_partition_without_gpus_is_asked_for_none(
    labctl: Labctl, slurm: Slurm, records: Records, checkpoint: Path
) -> None:
    records.workspace.settings_file.write_text('[partitions.cpus]\ndevice = "cpu"\n', encoding="utf-8")
    slurm.accepts(600)
    assert labctl("submit", "--model-id", checkpoint, "-p", "cpus", "--json").code == 0
    row = job(records)
    assert (row["gpus"], row["time_s"], row["limit_gpu_s"]) == (0, 3600, 0.0)


def refreshed(workspace: Workspace) -> None:
    with closing(open_store(workspace)) as store:
        refresh.refresh(workspace, store)


def counted(slurm: Slurm, program: str) -> int:
    log = slurm.folder / f"{program}.calls"
    return len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0


def shows(slurm: Slurm, queued: str, accounted: str) -> None:
    """squeue and sacct print these; sacct counts its calls."""
    slurm.shows(queued, accounted)
    program = slurm.folder / "sacct"
    text = program.read_text(encoding="utf-8").replace(
        "#!/bin/sh\n", f"#!/bin/sh\necho >> {slurm.folder}/sacct.calls\n"
    )
    program.write_text(text, encoding="utf-8")


@pytest.fixture
def of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times of the fixtures' lines are long past: the accounting is still thought to be late."""
    monkeypatch.setattr(refresh, "ACCOUNTING_IS_LATE_AT_MOST_S", float("inf"))
    monkeypatch.setattr(refresh, "SLURM_KEEPS_AT_MOST", timedelta(days=3650))


def test_the_end_of_a_requeued_job_is_asked_from_the_accounting_until_that_tells_it(
    records: Records, slurm: Slurm, of_now: None
) -> None:
    batch = records.submit()
    records.attempt(batch, age_s=90)
    all_done(records, batch, records.attempt(batch, restarts=1))
    name = f"labctl-{batch.array_id}"
    queued = squeue_line("1000", "COMPLETED", name)
    shows(slurm, queued, "")
    refreshed(records.workspace)
    assert job(records)["held_gpu_s"] is None
    before = sacct_line("1000", "NODE_FAIL", name, submitted="2026-01-01T09:00:00", started="2026-01-01T09:10:00",
                        ended="2026-01-01T09:11:30")  # fmt: skip
    shows(slurm, queued, before + sacct_line("1000", "COMPLETED", name))
    refreshed(records.workspace)
    row = job(records)
    assert (row["held_s"], row["state"]) == (90.0 + 59 * 60.0, "COMPLETED")
    asked = counted(slurm, "sacct")
    assert asked == 2
    refreshed(records.workspace)
    assert counted(slurm, "sacct") == asked


def test_a_job_that_ran_once_and_completed_is_never_asked_from_the_accounting(
    records: Records, slurm: Slurm, of_now: None
) -> None:
    batch = records.submit()
    all_done(records, batch, records.attempt(batch))
    shows(slurm, squeue_line("1000", "COMPLETED", f"labctl-{batch.array_id}"), "")
    refreshed(records.workspace)
    refreshed(records.workspace)
    assert job(records)["held_s"] == 59 * 60.0
    assert counted(slurm, "sacct") == 0


# ---------------------------------------------------------------- as a user asks


def test_the_jobs_of_some_runs_are_exported_by_their_names(labctl: Labctl, records: Records) -> None:
    for place, name in enumerate(("one", "two")):
        batch = records.submit(str(place + 1), name=name, lengths=(place + 1,))
        all_done(records, batch, records.attempt(batch, slurm_id=str(place + 1)))
    (row,) = labctl("export", "two", "--table", "jobs", "--json").json
    assert row["slurm_id"] == "2"
    assert len(labctl("export", "--table", "jobs", "--json").json) == 2


def test_the_query_of_the_documentation_sums_what_there_is(labctl: Labctl, records: Records) -> None:
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    (sql,) = [part for part in text.split('"') if "measured_jobs GROUP BY" in part]
    batch = records.submit(lengths=(16, 32))
    all_done(records, batch, records.attempt(batch))
    ended(records, batch)
    (row,) = labctl("query", sql, "--json").json
    assert (row["partition"], row["backend"], row["jobs"]) == ("dgxh", "hf", 1)
    assert row["held"] == pytest.approx(120 / 3600, abs=0.01)
