"""The answers of all clusters about a workspace's jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from labctl_orchestrator.store.job_rows import ArrayRow, JobRow
from labctl_slurm import queue
from labctl_slurm.command import Cluster
from labctl_slurm.queue import Identity


def ask_slurm(
    open_jobs: Sequence[JobRow],
    ended_lately: Sequence[JobRow],
    interrupted: Sequence[ArrayRow],
    by_hand: Sequence[ArrayRow],
) -> Answers:
    """Query each cluster about its jobs; a submission that may be on several, on each."""
    jobs = [job for job in open_jobs if not job.is_local]
    lost = [array for array in interrupted if not array.is_local]
    looked_at = [*by_hand, *(job for job in ended_lately if not job.is_local)]
    answers = Answers()
    for cluster in dict.fromkeys(cluster for row in (*jobs, *lost, *looked_at) for cluster in row.may_be_on):
        here = [job for job in jobs if cluster in job.may_be_on]
        names = [array.job_name for array in lost if cluster in array.may_be_on]
        look = [row for row in looked_at if cluster in row.may_be_on]
        answers.add(
            cluster,
            queue.query(
                [job.named for job in here],
                names,
                look=bool(look),
                restarted={job.named for job in here if job.restarts},
                identities=[
                    Identity(row.job_name, row.mark or "", row.slurm_id or "", row.queued_at)
                    if isinstance(row, JobRow)
                    else Identity(row.job_name, row.mark or "")
                    for row in (*here, *lost, *look)
                ],
                cluster=cluster,
            ),
        )
    for array in lost:
        name = array.job_name
        if all(name in answers.nowhere_on.get(cluster, ()) for cluster in array.may_be_on):
            answers.nowhere.add(name)
    return answers


@dataclass
class Answers(queue.QueueAnswer):
    """The answers of all clusters. `found_on` is the cluster of each found name; `nowhere` are names that no cluster has."""

    found_on: dict[str, Cluster | None] = field(default_factory=dict)
    nowhere_on: dict[Cluster | None, set[str]] = field(default_factory=dict)

    def add(self, cluster: Cluster | None, answer: queue.QueueAnswer) -> None:
        self.jobs |= answer.jobs
        self.shown |= answer.shown
        self.gone |= answer.gone
        self.problems += [problem for problem in answer.problems if problem not in self.problems]
        self.nowhere_on[cluster] = answer.nowhere
        for name, ids in answer.named.items():
            self.named.setdefault(name, ids)
            self.found_on.setdefault(name, cluster)
