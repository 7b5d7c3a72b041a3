"""What the clusters say of a workspace's jobs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from labctl_slurm import queue
from labctl_slurm.command import Cluster
from labctl_slurm.queue import Identity


def ask_slurm(
    open_jobs: Sequence[dict[str, Any]],
    ended_lately: Sequence[dict[str, Any]],
    half_made: Sequence[dict[str, Any]],
    by_hand: Sequence[dict[str, Any]],
) -> Answers:
    """What each cluster says of its jobs. A submission that may be on several is looked for on each."""
    jobs = [job for job in open_jobs if job["executor"] == "slurm"]
    lost = [batch for batch in half_made if batch["executor"] == "slurm"]
    looked_at = [*by_hand, *(job for job in ended_lately if job["executor"] == "slurm")]
    answers = Answers()
    for cluster in dict.fromkeys(cluster for row in (*jobs, *lost, *looked_at) for cluster in clusters_of(row)):
        here = [job for job in jobs if cluster in clusters_of(job)]
        names = [batch["job_name"] for batch in lost if cluster in clusters_of(batch)]
        look = [row for row in looked_at if cluster in clusters_of(row)]
        answers.add(
            cluster,
            queue.query(
                [(job["slurm_id"], job["job_name"]) for job in here],
                names,
                look=bool(look),
                restarted={(job["slurm_id"], job["job_name"]) for job in here if job["restarted"]},
                identities=[
                    Identity(row["job_name"], row["mark"] or "", row.get("slurm_id") or "", row.get("queued_at"))
                    for row in (*here, *lost, *look)
                ],
                cluster=cluster,
            ),
        )
    for batch in lost:
        name = batch["job_name"]
        if all(name in answers.nowhere_on.get(cluster, ()) for cluster in clusters_of(batch)):
            answers.nowhere.add(name)
    return answers


@dataclass
class Answers(queue.Answer):
    """What all clusters said. `found_on` is the cluster of each name that was found; `nowhere` are the names that none has."""

    found_on: dict[str, Cluster | None] = field(default_factory=dict)
    nowhere_on: dict[Cluster | None, set[str]] = field(default_factory=dict)

    def add(self, cluster: Cluster | None, answer: queue.Answer) -> None:
        self.jobs |= answer.jobs
        self.shown |= answer.shown
        self.gone |= answer.gone
        self.problems += [problem for problem in answer.problems if problem not in self.problems]
        self.nowhere_on[cluster] = answer.nowhere
        for name, ids in answer.named.items():
            self.named.setdefault(name, ids)
            self.found_on.setdefault(name, cluster)


def clusters_of(row: Mapping[str, Any]) -> list[Cluster | None]:
    """The clusters that a batch may be on, one where it is known; None is the one that the shell means."""
    return [*map(Cluster.from_json, json.loads(row["clusters"] or "[]"))] or [None]
