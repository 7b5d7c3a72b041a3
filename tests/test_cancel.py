"""Cancelling: which jobs are named to Slurm, what is asked before, and what is said of the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labctl_slurm.control import compressed
from labctl_slurm.queue import expanded
from labctl_workers.record import Failure

from .conftest import JobArray, Labctl, Records, Slurm, sacct_line, squeue_line


@pytest.fixture
def scancel(slurm: Slurm) -> Path:
    """A fake scancel that keeps what it is told; squeue says afterwards what it said before."""
    kept = slurm.folder / "scancelled"
    slurm._write("scancel", f'echo "$*" >> {kept}\n')
    return kept


def running(slurm: Slurm, batch: JobArray, state: str = "RUNNING") -> None:
    name = f"labctl-{batch.array_id}"
    ids = ["1000"] if len(batch.jobs) == 1 else [f"1000_{task}" for task in range(len(batch.jobs))]
    slurm.shows("".join(squeue_line(slurm_id, state, name) for slurm_id in ids))


def test_the_jobs_of_the_latest_request_are_cancelled(
    labctl: Labctl, records: Records, slurm: Slurm, scancel: Path
) -> None:
    batch = records.submit(dtypes=("float16", "bfloat16", "float32"))
    running(slurm, batch, "PENDING")
    ran = labctl("cancel", "--yes")
    assert ran.code == 0, ran.err
    assert scancel.read_text(encoding="utf-8") == "1000_[0-2]\n"
    assert "cancelled 3 jobs with 3 runs" in ran.err


def test_nothing_is_cancelled_without_a_yes(labctl: Labctl, records: Records, slurm: Slurm, scancel: Path) -> None:
    running(slurm, records.submit())
    ran = labctl("cancel")
    assert ran.code == 2
    assert ran.err.splitlines()[-2:] == [
        "labctl: cannot ask without a terminal: Cancel 1 job with 1 run?", "  -> add --yes"
    ]  # fmt: skip
    assert not scancel.exists()


def test_a_run_that_shares_its_job_takes_the_others_along_and_that_is_said(
    labctl: Labctl, records: Records, slurm: Slurm, scancel: Path
) -> None:
    batch = records.submit(lengths=(8, 16, 32))
    records.done(batch, records.attempt(batch), batch.runs[0])
    running(slurm, batch)
    ran = labctl("cancel", batch.runs[1].run_id, "--yes")
    assert "these jobs also contain 1 other run, cancelled with them" in ran.err
    assert scancel.read_text(encoding="utf-8") == "1000\n"


def test_what_has_ended_is_left_as_it_is_and_told(
    labctl: Labctl, records: Records, slurm: Slurm, scancel: Path
) -> None:
    batch = records.submit()
    records.done(batch, records.attempt(batch))
    slurm.shows("", sacct_line("1000", "COMPLETED", f"labctl-{batch.array_id}"))
    ran = labctl("cancel", "--yes")
    assert ran.code == 0
    assert "already ended: 1 run: 1 done" in ran.err
    assert not scancel.exists()


def test_a_slurm_that_does_not_cancel_is_told_in_its_words(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    running(slurm, records.submit())
    slurm.answers("scancel", status=1, errors="scancel: error: Unable to contact slurm controller\n")
    ran = labctl("cancel", "--yes")
    assert ran.code == 4
    assert "Unable to contact slurm controller" in ran.err


def test_a_job_that_ends_in_the_meantime_is_no_error(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    running(slurm, records.submit())
    said = "scancel: error: Kill job error on job id 1000: Job/step already completing or completed\n"
    slurm.answers("scancel", status=1, errors=said)
    assert labctl("cancel", "--yes").code == 0


def test_a_local_job_is_told_to_end(labctl: Labctl, records: Records) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        records.submit(str(process.pid), partition="local")
        assert labctl("cancel", "--yes").code == 0
        assert process.wait(timeout=10) == -15
        assert "cancelled" in labctl("status").out  # though the worker wrote no record
    finally:
        process.kill()


@given(st.lists(st.tuples(st.integers(1, 9), st.none() | st.integers(0, 30)), max_size=60))
def test_the_short_form_of_ids_means_the_same_jobs(jobs: list[tuple[int, int | None]]) -> None:
    ids = {str(parent) if task is None else f"{parent}_{task}" for parent, task in jobs}
    assert {each for word in compressed(sorted(ids)) for each in expanded(word)} == ids


def test_a_cancelled_run_has_one_state_one_reason_and_one_remedy(
    labctl: Labctl, records: Records, slurm: Slurm
) -> None:
    """Where the worker wrote a record of it, too."""
    batch = records.submit()
    more = {"kind": "cancelled", "message": "job cancelled before it measured the run", "remedy": "run labctl retry"}
    records._record(batch, records.attempt(batch), batch.runs[0], "failed", failure=Failure(**more))
    slurm.shows(accounted=sacct_line("1000", "CANCELLED by 4123456789", f"labctl-{batch.array_id}"))
    shown = labctl("show", batch.runs[0].run_id).out
    lines = shown.splitlines()
    assert lines[0] == f"run {batch.runs[0].run_id}: cancelled by user id 4123456789"
    assert shown.count("labctl retry") == 1
    assert "job cancelled before" not in shown
    (attempt,) = (line for line in lines if line.startswith("attempt "))
    assert ": cancelled on " in attempt
    assert labctl("logs", batch.runs[0].run_id).err.splitlines()[-2:] == [
        f"run {batch.runs[0].run_id}: cancelled by user id 4123456789",
        "  -> resubmit with labctl retry if you still need it",
    ]
    ran = labctl("compare")
    assert (ran.code, "all runs ended without a result (1 cancelled)" in ran.err) == (1, True)
