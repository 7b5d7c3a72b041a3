"""The age of states, and how late records, heartbeats and Slurm's answers may be."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from labctl_orchestrator.store.job_rows import JobRow

# From Slurm's end of a job to its record on the login node.
RECORD_MAY_BE_LATE_S = 30.0
HEARTBEAT_IS_OLD_AFTER_S = 60.0
# Of two machines.
CLOCKS_DIFFER_BY_AT_MOST_S = 900.0
SLURM_SHOWS_A_JOB_WITHIN_S = 30.0
LOCAL_JOB_STARTS_WITHIN_S = 30.0
SUBMISSION_TAKES_AT_MOST_S = 120.0
# From a killed sbatch to its job in the queue.
SBATCH_REACHES_SLURM_WITHIN_S = 5.0
# A job that the controller no longer has may still reach the accounting.
LOST_AFTER_S = 60.0
FORGET_AFTER_S = 86400.0
ACCOUNTING_IS_LATE_AT_MOST_S = 120.0
# The controller can requeue an ended job for some minutes (MinJobAge).
MAY_BE_REQUEUED_S = 600.0
# Longer than any MinJobAge.
SLURM_KEEPS_AT_MOST = timedelta(days=7)


def age_s(time: str | None) -> float:
    if time is None:
        return float("inf")
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()


def is_forgotten(job: JobRow) -> bool:
    """Whether the job has been gone from Slurm for so long that labctl no longer queries it."""
    return job.gone_since is not None and age_s(job.gone_since) > FORGET_AFTER_S


def ended_lately(job: JobRow) -> bool:
    """Whether the job has ended, and the controller may still requeue it."""
    return job.has_ended and ended_within(MAY_BE_REQUEUED_S, job)


def ended_within(seconds: float, job: JobRow) -> bool:
    """Whether labctl saw the end of the job in the last `seconds`, and the controller's clock does not contradict it."""
    seen_s, ended_s = age_s(job.observed_at), age_s(job.ended_at or job.observed_at)
    return seen_s < seconds and ended_s < seconds + CLOCKS_DIFFER_BY_AT_MOST_S
