"""Holes of a sweep: which they are, and that just they are submitted again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.request.packing import Pace
from labctl_orchestrator.submission import submit
from labctl_workers.record import Failure, JobSpec, read_json

from .conftest import JobArray, Labctl, Records, Slurm, ago, sacct_line, squeue_line

LENGTHS = (8, 16, 32, 64)


def fail(records: Records, batch: JobArray, task: int, kind: str) -> None:
    records.failed(batch, records.attempt(batch, task), batch.jobs[task].runs[0])
    for path in records.workspace.results.glob(f"{batch.jobs[task].runs[0].run_id}/*.json"):
        document = read_json(path)
        document["failure"] = Failure(kind, "it ended", "do otherwise").to_json()
        path.write_text(json.dumps(document), encoding="utf-8")


@pytest.fixture
def sweep(records: Records, slurm: Slurm) -> JobArray:
    """Four jobs of one run each: done, failed, met its limit, cancelled."""
    slurm.accepts(2000)
    batch = records.submit(dtypes=("float16", "bfloat16", "float32", "float64"), lengths=(8,))
    records.done(batch, records.attempt(batch, 0), batch.jobs[0].runs[0])
    for task, kind in ((1, "ValueError"), (2, "time-limit"), (3, "cancelled")):
        fail(records, batch, task, kind)
    name = f"labctl-{batch.array_id}"
    rows = [sacct_line(f"1000_{task}", state, name) for task, state in enumerate(("COMPLETED", *["FAILED"] * 3))]
    slurm.shows("", "".join(rows))
    return batch


def run_ids(batch: JobArray) -> list[str]:
    return [job.runs[0].run_id for job in batch.jobs]


def submitted(records: Records, before: JobArray) -> list[dict[str, Any]]:
    """The JobSpecs of the batches that are there besides one."""
    folders = [folder for folder in records.workspace.arrays.iterdir() if folder.name != before.array_id]
    return [read_json(path) for folder in folders for path in sorted(folder.glob("[0-9]*.json"))]


@pytest.mark.parametrize(
    ("flags", "tasks"),
    [
        ([], {1, 2, 3}),
        (["--failed"], {1}),
        (["--timeout"], {2}),
        (["--failed", "--timeout"], {1, 2}),
        (["--missing"], set()),
    ],
)
def test_the_holes_are_submitted_and_nothing_else(
    labctl: Labctl, records: Records, sweep: JobArray, flags: list[str], tasks: set[int]
) -> None:
    ran = labctl("retry", *flags, "--json")
    assert ran.code == 0, ran.err
    wanted = {run_ids(sweep)[task] for task in tasks}
    assert {run["run_id"] for run in ran.json["runs"]} == wanted
    assert {run["run_id"] for job in submitted(records, sweep) for run in job["runs"]} == wanted


def test_what_is_retried_belongs_to_the_request_that_asked_for_it(
    labctl: Labctl, records: Records, sweep: JobArray
) -> None:
    labctl("retry")
    (request,) = records.workspace.submissions.iterdir()
    for intent in records.workspace.arrays.glob("*/intent.json"):
        assert read_json(intent)["submission_id"] == request.stem
    assert len(labctl("status", "--json").json) == 4


def test_a_run_on_its_way_is_not_a_hole(labctl: Labctl, records: Records, sweep: JobArray) -> None:
    assert len(labctl("retry", "--json").json["runs"]) == 3
    again = labctl("retry", "--json")
    assert again.json["runs"] == []
    assert "to resubmit: 0" in again.err


def test_a_run_that_met_its_limit_gets_twice_the_time(labctl: Labctl, records: Records, sweep: JobArray) -> None:
    (records.workspace.root / "labctl.toml").write_text('[partitions.dgxh]\nmax_time = "1-0"\n', encoding="utf-8")
    labctl("retry", "--timeout")
    (job,) = submitted(records, sweep)
    assert job["time_limit_s"] >= 2 * sweep.jobs[2].time_limit_s
    (script,) = [
        path for path in records.workspace.arrays.glob("*/submitit/[!.]*.sh") if sweep.array_id not in str(path)
    ]
    assert "#SBATCH --time=0-02:" in script.read_text(encoding="utf-8")


def test_time_and_memory_of_a_retry_are_those_that_are_given(labctl: Labctl, records: Records, sweep: JobArray) -> None:
    ran = labctl("retry", "--timeout", "--time", "0-05:00:00", "--mem", "99G")
    assert ran.code == 0, ran.err
    (job,) = submitted(records, sweep)
    assert job["time_limit_s"] == 5 * 3600
    (script,) = [
        path for path in records.workspace.arrays.glob("*/submitit/[!.]*.sh") if sweep.array_id not in str(path)
    ]
    assert "#SBATCH --time=0-05:00:00" in script.read_text(encoding="utf-8")
    assert "#SBATCH --mem=99G" in script.read_text(encoding="utf-8")


def test_a_run_that_met_the_time_it_was_submitted_with_gets_twice_that(
    labctl: Labctl, records: Records, slurm: Slurm, checkpoint: Path
) -> None:
    slurm.accepts(2000)
    (records.workspace.root / "labctl.toml").write_text('[partitions.dgxh]\nmax_time = "1-0"\n', encoding="utf-8")
    ran = labctl("submit", "-p", "dgxh", "--model-id", checkpoint, "--time", "0-02:00:00", "--json")
    (run,) = ran.json["runs"]
    (spec,) = records.workspace.arrays.glob("*/0.json")
    job = JobSpec.from_json(read_json(spec))
    batch = JobArray(spec.parent.name, spec.parent, "slurm", [job])
    fail(records, batch, 0, "time-limit")
    slurm.shows("", sacct_line("2000", "FAILED", f"labctl-{batch.array_id}"))
    slurm.accepts(3000)
    again = labctl("retry", "--json")
    assert [one["run_id"] for one in again.json["runs"]] == [run["run_id"]]
    (second,) = submitted(records, batch)
    assert second["time_limit_s"] >= 2 * job.time_limit_s


def test_many_runs_are_counted_and_not_listed(labctl: Labctl, slurm: Slurm, checkpoint: Path) -> None:
    slurm.accepts(2000)
    many = [f"--max-new-tokens={length}" for length in range(1, 121)]
    ran = labctl("submit", "-p", "dgxh", "--model-id", checkpoint, *many)
    assert ran.code == 0, ran.err
    assert ran.out.split() == ["state", "runs", "pending", "120"]
    assert len(labctl("submit", "-p", "dgxh", "--model-id", checkpoint, *many[:100], "--again").out.splitlines()) == 101


def test_a_short_time_limit_is_told_of_before_the_queue(labctl: Labctl, slurm: Slurm, checkpoint: Path) -> None:
    slurm.accepts(2000)
    ran = labctl("submit", "-p", "dgxh", "--model-id", checkpoint, "--time", "0-00:01:00", "--dry-run")
    assert "warning: time limit of partition dgxh is short: 1 min" in ran.err
    assert "time limit" not in labctl("submit", "-p", "dgxh", "--model-id", checkpoint, "--dry-run").err


def test_a_time_limit_below_what_was_measured_is_told_of(
    labctl: Labctl, slurm: Slurm, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.accepts(2000)
    monkeypatch.setattr(submit, "paces", lambda store: lambda job: Pace(load_s=1200.0, step_s=0.01))
    ran = labctl("submit", "-p", "dgxh", "--model-id", checkpoint, "--time", "0-00:20:00", "--dry-run")
    assert "warning: time limit of partition dgxh is too short: 20 min, expected 20" in ran.err


def test_a_run_that_had_the_longest_time_is_told_of(labctl: Labctl, records: Records, sweep: JobArray) -> None:
    (records.workspace.root / "labctl.toml").write_text('[partitions.dgxh]\nmax_time = "1:00:00"\n', encoding="utf-8")
    ran = labctl("retry", "--timeout")
    assert f"reached the largest time limit of dgxh (60 min): {run_ids(sweep)[2]}" in ran.err


def test_a_dry_run_tells_the_holes_and_submits_nothing(labctl: Labctl, records: Records, sweep: JobArray) -> None:
    ran = labctl("retry", "--dry-run", "--json")
    assert len(ran.json["runs"]) == 3
    assert submitted(records, sweep) == []


def test_runs_that_shared_a_job_share_one_again(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    slurm.accepts(2000)
    batch = records.submit(lengths=LENGTHS)
    attempt = records.attempt(batch)
    records.done(batch, attempt, batch.runs[1])
    slurm.shows("", sacct_line("1000", "NODE_FAIL", f"labctl-{batch.array_id}"))
    labctl("retry")
    (job,) = submitted(records, batch)
    assert [run["max_new_tokens"] for run in job["runs"]] == [8, 32, 64]
    labctl("retry")
    assert len(submitted(records, batch)) == 1


def test_a_request_whose_labctl_died_before_it_had_batches_is_a_hole(
    labctl: Labctl, records: Records, slurm: Slurm
) -> None:
    slurm.accepts(2000)
    records.request(lengths=LENGTHS)
    assert {run["state"] for run in labctl("status", "--json").json} == {"missing"}
    ran = labctl("retry", "--missing", "--json")
    assert [run["state"] for run in ran.json["runs"]] == ["pending"] * len(LENGTHS)


def test_what_slurm_cannot_tell_now_is_left_alone(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    records.submit()
    slurm.is_silent()
    ran = labctl("retry", "--json")
    assert ran.json["runs"] == []
    assert "not resubmitted, state unknown: 1 run (Slurm did not answer)" in ran.err


def test_a_job_that_slurm_has_lost_is_a_hole_after_a_minute(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    slurm.accepts(2000)
    batch = records.submit()
    records.states(batch, state="RUNNING", gone_since=ago(30))
    assert labctl("retry", "--json").json["runs"] == []
    records.states(batch, state="RUNNING", gone_since=ago(90))
    (run,) = labctl("retry", "--missing", "--json").json["runs"]
    assert (run["run_id"], run["state"]) == (batch.runs[0].run_id, "pending")


def test_a_job_that_slurm_holds_since_it_could_not_start_it_is_let_go(
    labctl: Labctl, records: Records, slurm: Slurm
) -> None:
    """As Slurm 22.05 left a job of a node that was killed while it started it."""
    batch = records.submit()
    slurm.shows(squeue_line("1000", "PENDING", f"labctl-{batch.array_id}", reason="launch failed requeued held"))
    kept = slurm.folder / "released"
    slurm._write("scontrol", f'[ "$1" = release ] && echo "$*" >> {kept}\nexit 0\n')
    (run,) = labctl("status", "--json").json
    assert run["state"] == "pending"
    assert "release it with labctl retry" in run["remedy"]
    ran = labctl("retry")
    assert ran.code == 0
    assert "released 1 job that Slurm held after a failed start: 1 run" in ran.err
    assert kept.read_text(encoding="utf-8") == "release 1000\n"


def test_a_sweep_without_holes_is_told_so(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    batch = records.submit()
    records.done(batch, records.attempt(batch))
    slurm.shows(squeue_line("1000", "COMPLETED", f"labctl-{batch.array_id}"))
    ran = labctl("retry")
    assert ran.code == 0
    assert "1 run: 1 done; to resubmit: 0" in ran.err


def test_a_run_whose_script_was_printed_and_never_sent_is_submitted(
    labctl: Labctl, records: Records, slurm: Slurm
) -> None:
    batch = records.prepare()
    slurm.accepts(700)
    ran = labctl("retry", batch.runs[0].run_id)
    assert ran.code == 0, ran.err
    assert "to resubmit: 1" in ran.err
    assert [job["runs"][0]["run_id"] for job in submitted(records, batch)] == [batch.runs[0].run_id]


def test_retry_counts_what_it_submits(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    batch = records.submit()
    records.states(batch, state="FAILED", ended_at=ago(400), exit_code="1:0")
    labctl("status")
    batch.spec(0).unlink()
    for request in records.workspace.submissions.iterdir():
        request.unlink()
    slurm.accepts(700)
    ran = labctl("retry", batch.runs[0].run_id)
    assert "to resubmit: 0" in ran.err
    assert "not resubmitted, job files missing: 1 run" in ran.err
    assert ran.code == 5
