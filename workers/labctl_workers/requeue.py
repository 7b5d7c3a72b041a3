"""Whether Slurm runs this job again: SIGTERM alone does not tell a preemption or a requeue from a cancellation."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

ANSWER_WITHIN_S = 3.0  # the processes of a job that was told to end have six seconds in all
NEVER = ("", "None", "Unknown", "N/A")


@dataclass(frozen=True)
class Terms:
    """What Slurm says of this job: whether it may be put back into the queue, the seconds left until its time limit, and when
    this start of it began (ISO 8601, UTC, by the controller's clock). None where Slurm does not say."""

    may_be_requeued: bool | None = None
    left_s: float | None = None
    started_at: str | None = None


def terms() -> Terms:
    """The terms of the job that this process runs in; nothing is known outside of Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    told = _told_of(job) if job else {}
    limit_s = _seconds(told.get("TimeLimit", ""))
    # scontrol reckons with this node's clock, which may be behind the controller's.
    ran_s = max(_seconds(told.get("RunTime", "")) or 0.0, _own_age_s())
    return Terms(
        may_be_requeued=told["Requeue"] == "1" if "Requeue" in told else None,
        left_s=None if limit_s is None else limit_s - ran_s,
        started_at=_utc(told.get("StartTime", "")),
    )


def _own_age_s() -> float:
    """For how long this process has been there; the job's script becomes the worker."""
    started_ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def hand_back() -> bool:
    """Put the job that this process runs in back into Slurm's queue, which ends it here; whether Slurm has taken it."""
    job = os.environ.get("SLURM_JOB_ID")
    return job is not None and _scontrol("requeue", job) is not None


def comes_back(restarts: int) -> bool:
    """Whether the job that this process runs in, which was told to end, is started again; `restarts` is how often it was.

    A job that is being preempted with a time of grace is handed back to the queue at once: its GPUs are free the sooner.
    False outside Slurm, and where Slurm does not say.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    told = _told_of(job)
    if int(told.get("Restarts") or 0) > restarts:
        return True
    preempted = told.get("PreemptTime", "") not in NEVER
    return preempted and told.get("Requeue") == "1" and hand_back()


def _told_of(job: str) -> Mapping[str, str]:
    """What `scontrol show job` tells, by Slurm's names; empty where it does not answer."""
    output = _scontrol("--oneliner", "show", "job", job)
    return dict(re.findall(r"(\w+)=(\S*)", output or ""))


def _seconds(text: str) -> float | None:
    """Slurm's [days-]hours:minutes:seconds in seconds; None for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _utc(text: str) -> str | None:
    """Slurm's local time as labctl has it from squeue; None for Unknown."""
    try:
        return (
            datetime.fromisoformat(text).astimezone(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
        )
    except ValueError:
        return None


def _scontrol(*arguments: str) -> str | None:
    """What it printed; None where it failed."""
    environment = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
    try:
        done = subprocess.run(
            ["scontrol", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=ANSWER_WITHIN_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
