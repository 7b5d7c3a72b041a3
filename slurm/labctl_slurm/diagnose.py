"""A job's end without a record -> what happened, and what to do about it."""

from __future__ import annotations

from labctl_slurm.queue import JobState

ENDS = {
    "BOOT_FAIL": ("the node did not boot", "submit again"),
    "CANCELLED": ("the job was cancelled {reason}", "submit again if that was not meant"),
    "DEADLINE": ("the job met its deadline", "submit again without one"),
    "NODE_FAIL": ("the node failed", "submit again; tell the administrators if it happens on one node"),
    "OUT_OF_MEMORY": ("the node's memory ran out (not the GPU's)", "raise mem of the partition"),
    "PREEMPTED": ("the job was preempted", "submit again"),
    "TIMEOUT": ("the job did not end within its time limit", "raise time of the partition"),
}


def explain(job: JobState) -> tuple[str, str]:
    """(what happened, what to do) for a job that has ended and left no record."""
    if job.state in ENDS:
        happened, remedy = ENDS[job.state]
        # "by 1000" is sacct's; any other reason is what the job had waited for.
        by = job.reason if job.reason.startswith("by ") else ""
        return happened.format(reason=by).strip(), remedy
    exit_code = f", exit code {job.exit_code}" if job.exit_code else ""
    return f"the job ended ({job.state}{exit_code}) and left no record", "labctl logs shows its last words"
