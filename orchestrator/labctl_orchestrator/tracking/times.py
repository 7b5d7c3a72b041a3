"""How old what is known is, and how late what is missing may still come."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from labctl_orchestrator.store.job_rows import JobRow

# A record may reach the login node some seconds after Slurm has called the job ended.
RECORD_MAY_BE_LATE_S = 30.0
HEARTBEAT_IS_OLD_AFTER_S = 60.0
# The clocks of two machines say nothing of less than this.
CLOCKS_DIFFER_BY_AT_MOST_S = 900.0
SLURM_SHOWS_A_JOB_WITHIN_S = 30.0
SUBMISSION_TAKES_AT_MOST_S = 120.0
# Long enough for what a killed sbatch had sent to show in the queue.
SBATCH_REACHES_SLURM_WITHIN_S = 5.0
# A job that Slurm has no more may still be in what its accounting has yet to write.
LOST_AFTER_S = 60.0
FORGET_AFTER_S = 86400.0
ACCOUNTING_IS_LATE_AT_MOST_S = 120.0
# The controller keeps an ended job for some minutes (MinJobAge), in which it can be put back into the queue.
MAY_BE_REQUEUED_S = 600.0
# A controller keeps what has ended for some minutes, or as long as its MinJobAge says.
SLURM_KEEPS_AT_MOST = timedelta(days=7)


def age_s(time: str | None) -> float:
    if time is None:
        return float("inf")
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()


def comes_before(one: str | None, other: str | None) -> bool:
    """Whether both times are known, and the one is earlier. Slurm's are whole seconds, cut off: never later than they were."""
    if one is None or other is None:
        return False
    return datetime.fromisoformat(one) < datetime.fromisoformat(other)


def is_forgotten(job: JobRow) -> bool:
    """Whether Slurm has had this job no more for so long that it is not asked for again."""
    return job.gone_since is not None and age_s(job.gone_since) > FORGET_AFTER_S


def ended_lately(job: JobRow) -> bool:
    """Whether the controller may still have this job, which has ended, and put it back into the queue."""
    return job.has_ended and ended_within(MAY_BE_REQUEUED_S, job)


def ended_within(seconds: float, job: JobRow) -> bool:
    """Whether a job has ended so lately: labctl has known of its end for less, and the controller's clock does not tell of one
    long ago."""
    known_s, told_s = age_s(job.observed_at), age_s(job.ended_at or job.observed_at)
    return known_s < seconds and told_s < seconds + CLOCKS_DIFFER_BY_AT_MOST_S
