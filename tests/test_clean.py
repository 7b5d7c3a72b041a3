"""Cleaning takes nothing that was asked or measured, and nothing of a job that may still write."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from .conftest import Batch, Labctl, Records, Slurm, files_below, sacct_line, squeue_line


def with_logs(batch: Batch) -> list[Path]:
    folder = batch.folder / "submitit"
    folder.mkdir(exist_ok=True)
    files = [folder / name for name in ("1000_0_log.out", "1000_submitted.pkl", "1000_submission.sh")]
    for file in files:
        file.write_text("x" * 5000, encoding="utf-8")
    return files


@pytest.fixture
def finished(records: Records, slurm: Slurm) -> Batch:
    batch = records.submit()
    records.done(batch, records.attempt(batch))
    with_logs(batch)
    slurm.shows("", sacct_line("1000", "COMPLETED", f"labctl-{batch.batch_id}"))
    return batch


def test_finished_work_loses_its_logs_and_keeps_its_records(labctl: Labctl, records: Records, finished: Batch) -> None:
    labctl("status")
    before = set(files_below(records.workspace.root))
    ran = labctl("clean", "--yes")
    assert ran.code == 0, ran.err
    gone = before - set(files_below(records.workspace.root))
    assert gone == {str(path.relative_to(records.workspace.root)) for path in (
        finished.folder / "submitit" / name for name in ("1000_0_log.out", "1000_submitted.pkl", "1000_submission.sh")
    )}  # fmt: skip
    shown = labctl("show", finished.runs[0].run_id, "--json").json
    labctl("collect", "--rebuild")
    assert labctl("show", finished.runs[0].run_id, "--json").json == shown
    assert "the log was cleaned away" in labctl("logs", finished.runs[0].run_id).err


def test_a_dry_run_tells_and_removes_nothing(labctl: Labctl, records: Records, finished: Batch) -> None:
    labctl("status")
    before = files_below(records.workspace.root)
    ran = labctl("clean", "--dry-run")
    assert "would be freed" in ran.err
    assert "logs, pickles and scripts" in ran.out
    assert set(files_below(records.workspace.root)) == set(before)


def test_nothing_is_removed_without_a_yes(labctl: Labctl, records: Records, finished: Batch) -> None:
    ran = labctl("clean")
    assert ran.code == 2
    assert "give --yes, or --dry-run" in ran.err
    assert (finished.folder / "submitit").is_dir()


@pytest.mark.parametrize(("flags", "kept"), [([], True), (["--failed"], False)])
def test_logs_of_runs_that_failed_stay_unless_they_are_asked_for(
    labctl: Labctl, records: Records, slurm: Slurm, flags: list[str], kept: bool
) -> None:
    batch = records.submit()
    with_logs(batch)
    slurm.shows("", sacct_line("1000", "FAILED", f"labctl-{batch.batch_id}"))
    assert labctl("clean", "--yes", *flags).code == 0
    assert (batch.folder / "submitit").is_dir() == kept


@pytest.mark.parametrize("silent", [True, False])
def test_nothing_of_a_job_that_may_still_write_is_removed(
    labctl: Labctl, records: Records, slurm: Slurm, silent: bool
) -> None:
    """Though each of its runs has its record: it runs, or nobody can tell that it does not."""
    batch = records.submit()
    records.done(batch, records.attempt(batch))
    with_logs(batch)
    slurm.shows(squeue_line("1000", "RUNNING", f"labctl-{batch.batch_id}"))
    if silent:
        slurm.is_silent()
    ran = labctl("clean", "--yes", "--failed")
    assert "there is nothing to remove" in ran.err
    assert (batch.folder / "submitit").is_dir()


def test_what_a_killed_writer_left_goes_after_an_hour(labctl: Labctl, records: Records, finished: Batch) -> None:
    labctl("status")
    old, new = (finished.folder / name for name in (".0.json.abc", ".0.json.def"))
    for path in (old, new):
        path.write_text("{", encoding="utf-8")
    os.utime(old, (time.time() - 7200,) * 2)
    labctl("clean", "--yes")
    assert (old.exists(), new.exists()) == (False, True)


def test_only_the_named_request_is_cleaned(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    batches = [records.submit(str(number), name=f"n{number}", lengths=(number,)) for number in (1, 2)]
    for number, batch in enumerate(batches, 1):
        records.done(batch, records.attempt(batch, slurm_id=str(number)))
        with_logs(batch)
    lines = [sacct_line(str(n), "COMPLETED", f"labctl-{batch.batch_id}") for n, batch in enumerate(batches, 1)]
    slurm.shows("", "".join(lines))
    labctl("clean", "n2", "--yes")
    assert [(batch.folder / "submitit").is_dir() for batch in batches] == [True, False]


def test_what_takes_the_space_is_told_by_kind(labctl: Labctl, records: Records, finished: Batch) -> None:
    labctl("status")
    sizes = labctl("du", "--json").json
    assert {"records", "database", "jobs", "logs, pickles and scripts", "attempts", "requests"} <= set(sizes)
    on_disk = sum(path.lstat().st_blocks * 512 for path in records.workspace.data.rglob("*") if not path.is_dir())
    assert sum(sizes.values()) == on_disk
    assert "labctl clean --dry-run" in labctl("du").err
