"""Whether Slurm runs this job again: SIGTERM alone does not tell a preemption or a requeue from a cancellation."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping

ANSWER_WITHIN_S = 3.0  # the processes of a job that was told to end have six seconds in all
NEVER = ("", "None", "Unknown", "N/A")


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
    may_be_requeued = told.get("Requeue") == "1"
    preempted = told.get("PreemptTime", "") not in NEVER
    return preempted and may_be_requeued and _scontrol("requeue", job) is not None


def _told_of(job: str) -> Mapping[str, str]:
    """What `scontrol show job` tells, by Slurm's names; empty where it does not answer."""
    output = _scontrol("--oneliner", "show", "job", job)
    return dict(re.findall(r"(\w+)=(\S*)", output or ""))


def _scontrol(*arguments: str) -> str | None:
    """What it printed; None where it failed."""
    try:
        done = subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, timeout=ANSWER_WITHIN_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
