"""SIGTERM: whether a job comes back is asked from Slurm. `scontrol` is a fake that prints what Slurm 22.05 prints."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from labctl_slurm import queue
from labctl_workers import requeue
from labctl_workers.requeue import comes_back, terms

SHOWN = (
    "JobId=77 JobName=labctl-x-1 UserId=me(1000) JobState={state} Reason=None Dependency=(null)"
    " RunTime={ran} TimeLimit=01:00:00 StartTime={start}"
    " Requeue={requeue} Restarts={restarts} BatchFlag=1 PreemptEligibleTime=2026-11-23T07:00:00 PreemptTime={preempt}"
)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    return tmp_path


def shows(
    folder: Path,
    *,
    state: str = "RUNNING",
    restarts: int = 0,
    requeue: int = 1,
    preempt: str = "None",
    may: bool = True,
    start: str = "2026-11-23T07:00:00",
    ran: str = "00:10:00",
) -> None:
    text = SHOWN.format(state=state, restarts=restarts, requeue=requeue, preempt=preempt, start=start, ran=ran)
    body = f'echo "$*" >> {folder}/calls\n[ "$1" = requeue ] && exit {0 if may else 1}\necho "{text}"\n'
    (folder / "scontrol").write_text(f"#!/bin/sh\n{body}", encoding="utf-8")
    (folder / "scontrol").chmod(0o755)


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text(encoding="utf-8").splitlines()


def test_a_cancelled_job_does_not_come_back(scontrol: Path) -> None:
    shows(scontrol, state="COMPLETING")
    assert not comes_back(0)
    assert calls(scontrol) == ["--oneliner show job 77"]


def test_a_job_that_slurm_has_put_back_already_comes_back(scontrol: Path) -> None:
    shows(scontrol, state="COMPLETING", restarts=3)
    assert comes_back(2)
    assert not comes_back(3)


def test_a_job_that_is_preempted_with_a_time_of_grace_is_handed_back_at_once(scontrol: Path) -> None:
    shows(scontrol, preempt="2026-11-23T07:10:00")
    assert comes_back(0)
    assert calls(scontrol)[-1] == "requeue 77"


def test_a_preempted_job_that_may_not_be_requeued_does_not_come_back(scontrol: Path) -> None:
    shows(scontrol, preempt="2026-11-23T07:10:00", requeue=0)
    assert not comes_back(0)
    shows(scontrol, preempt="2026-11-23T07:10:00", may=False)
    assert not comes_back(0)


@pytest.mark.parametrize("ran", ["00:00:00", "INVALID", ""], ids=["behind", "before the start", "no time"])
def test_a_clock_that_is_behind_slurms_gives_a_job_no_more_time(scontrol: Path, ran: str) -> None:
    """scontrol reckons how long the job has run with the node's clock; this process is a job's oldest."""
    (booted,) = re.findall(r"^btime (\d+)", Path("/proc/stat").read_text(encoding="utf-8"), re.MULTILINE)
    ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    age_s = time.time() - int(booted) - ticks / os.sysconf("SC_CLK_TCK")
    shows(scontrol, ran=ran)
    assert terms().left_s == pytest.approx(3600 - age_s, abs=5)


def test_without_slurm_or_its_answer_nothing_comes_back(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not comes_back(0)  # no scontrol
    monkeypatch.delenv("SLURM_JOB_ID")
    shows(scontrol, restarts=5)
    assert not comes_back(0)
    assert not (scontrol / "calls").exists()


def test_a_job_knows_its_terms_and_when_slurm_began_it_as_squeue_tells_it(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requeue, "_process_age_s", float)  # this process, which may be older than the job in the answer
    shows(scontrol)
    told = terms()
    assert (told.may_be_requeued, told.left_s) == (True, 3000.0)
    assert told.started_at == queue.utc("2026-11-23T07:00:00")
    shows(scontrol, start="Unknown")
    assert terms().started_at is None
