"""Whether Slurm starts this job again. SIGTERM alone does not distinguish preemption, requeue and cancellation."""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

SCONTROL_TIMEOUT_S = 3.0  # after SIGTERM, the processes of a job have six seconds in all
NO_TIME = ("", "None", "Unknown", "N/A")


@dataclass(frozen=True)
class Terms:
    """Slurm's settings of this job: whether Slurm may requeue it, the seconds left until its time limit, and the time of this
    start (ISO 8601, UTC, by the controller's clock). None where Slurm does not answer."""

    may_be_requeued: bool | None = None
    left_s: float | None = None
    started_at: str | None = None


def find_scontrol() -> None:
    """In a container, put the scontrol of container.sh first on PATH, for this module and for submitit."""
    if folder := os.environ.get("LABCTL_SCONTROL"):
        os.environ["PATH"] = os.pathsep.join((folder, os.environ.get("PATH", os.defpath)))


def terms() -> Terms:
    """The terms of the job of this process; all are None outside Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    fields = _job_fields(job) if job else {}
    limit_s = _seconds(fields.get("TimeLimit", ""))
    # scontrol computes RunTime with this node's clock, which may be behind the controller's.
    ran_s = max(_seconds(fields.get("RunTime", "")) or 0.0, _process_age_s())
    return Terms(
        may_be_requeued=fields["Requeue"] == "1" if "Requeue" in fields else None,
        left_s=None if limit_s is None else limit_s - ran_s,
        started_at=_utc(fields.get("StartTime", "")),
    )


def _process_age_s() -> float:
    """Seconds since this process started; the job's script becomes the worker by exec, unless it starts a container."""
    started_ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def requeue() -> bool:
    """Requeue the job of this process, which ends it here. False where Slurm refuses, and outside Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    return job is not None and _scontrol("requeue", job) is not None


def comes_back(restarts: int) -> bool:
    """Whether Slurm starts the job of this process again after SIGTERM; `restarts` is how often Slurm has restarted it so far.

    A preempted job with grace time is requeued at once, which frees its GPUs sooner. False outside Slurm, and where Slurm does
    not answer.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    fields = _job_fields(job)
    if int(fields.get("Restarts") or 0) > restarts:
        return True
    return fields.get("PreemptTime", "") not in NO_TIME and fields.get("Requeue") == "1" and requeue()


def _job_fields(job: str) -> dict[str, str]:
    """The fields of `scontrol show job`, by Slurm's names; empty where it does not answer."""
    return dict(re.findall(r"(\w+)=(\S*)", _scontrol("--oneliner", "show", "job", job) or ""))


def _seconds(text: str) -> float | None:
    """Slurm's [days-]hours:minutes:seconds in seconds; None for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _utc(text: str) -> str | None:
    """Slurm's local time in the form that labctl uses for squeue's times; None for Unknown."""
    try:
        time_utc = datetime.fromisoformat(text).astimezone(timezone.utc)
    except ValueError:
        return None
    return time_utc.isoformat(timespec="seconds").replace("+00:00", "Z")


def _scontrol(*arguments: str) -> str | None:
    """The output of scontrol; None where it fails."""
    try:
        done = subprocess.run(
            ["scontrol", *arguments],
            env={**os.environ, "SLURM_TIME_FORMAT": "standard"},
            capture_output=True,
            text=True,
            timeout=SCONTROL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
