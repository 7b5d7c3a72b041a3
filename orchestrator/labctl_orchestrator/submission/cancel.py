"""Cancel the jobs of runs."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from labctl_orchestrator.store import job_rows
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.job_rows import JobRow, slurm_ids_by_cluster
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking import processes, refresh, run_status
from labctl_orchestrator.tracking.run_status import RunStatus
from labctl_slurm import control
from labctl_slurm.errors import LabctlError


@dataclass
class Cancellation:
    """The jobs to cancel with their chosen `runs`, and the ids of other runs in these jobs (`beside`); the chosen runs that have
    ended, and those without a job id yet (`submitting`)."""

    jobs: list[JobRow] = field(default_factory=list)
    runs: list[RunStatus] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    ended: list[RunStatus] = field(default_factory=list)
    submitting: list[RunStatus] = field(default_factory=list)


def planned(store: Store, found: Sequence[RunStatus]) -> Cancellation:
    """All jobs that may still measure these runs. The runs of a job share its engine load, so they are cancelled together."""
    plan = Cancellation()
    by_job = {job.job_id: job for job in job_rows.jobs(store, "slurm_id IS NOT NULL")}
    wanted: dict[str, None] = {}
    for run in found:
        job_ids = [job_id for job_id in run.jobs_to_come if job_id in by_job]
        if not run.may_come:
            plan.ended.append(run)
        elif run.state == run_status.SUBMITTING or not job_ids:
            plan.submitting.append(run)
        else:
            plan.runs.append(run)
            wanted.update(dict.fromkeys(job_ids))
    plan.jobs = [by_job[job_id] for job_id in wanted]
    chosen = {run.run_id for run in found}
    shared = store.tuples(
        "SELECT job_id, run_id FROM job_runs WHERE NOT EXISTS (SELECT 1 FROM results"
        " WHERE results.run_id = job_runs.run_id AND results.job_id = job_runs.job_id)"
    )
    plan.beside = [run_id for job_id, run_id in shared if job_id in wanted and run_id not in chosen]
    return plan


def carry_out(workspace: Workspace, store: Store, plan: Cancellation) -> None:
    """Cancel the jobs. Raises SlurmError, and LabctlError for a local job of another machine."""
    for cluster, slurm_ids in slurm_ids_by_cluster(plan.jobs).items():
        control.cancel(slurm_ids, cluster)
    for job in plan.jobs:
        if not job.is_local:
            continue
        if job.host != socket.gethostname():
            raise LabctlError(
                f"local job {job.slurm_id} of another machine: {job.host}", f"run labctl cancel on {job.host}"
            )
        pid = int(job.slurm_id or 0)
        if processes.is_alive(pid, job.process_start):
            os.kill(pid, signal.SIGTERM)
    refresh.note_cancelled(workspace, store, plan.jobs)
