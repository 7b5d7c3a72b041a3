"""Whether a job's worker gives signs of life."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

import msgspec

from labctl_orchestrator.store import documents
from labctl_orchestrator.store.documents import try_write
from labctl_orchestrator.store.job_rows import JobRow
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking.diagnosis import Diagnoses
from labctl_orchestrator.tracking.times import CLOCKS_DIFFER_BY_AT_MOST_S, HEARTBEAT_IS_OLD_AFTER_S, age_s
from labctl_slurm import queue
from labctl_workers.record import Heartbeat, read_bytes, utc_now


@dataclass
class Sources:
    """What is looked up beside the store: each job's heartbeat, once, when the last ones were seen, and the logs."""

    workspace: Workspace
    diagnoses: Diagnoses
    _beats: dict[str, Heartbeat | None] = field(default_factory=dict)
    _heard: dict[str, documents.Heard] | None = None
    _heard_anew: bool = False

    def beat(self, job: JobRow) -> Heartbeat | None:
        if job.job_id not in self._beats:
            self._beats[job.job_id] = heartbeat(self.workspace, job) if _may_beat(job) else None
        return self._beats[job.job_id]

    def gives_signs_of_life(self, job: JobRow) -> bool | None:
        """Whether the job's worker goes on, by its heartbeats; None where they do not tell yet. Of a worker on another machine,
        what counts is how long this one has seen no new heartbeat."""
        beat = self.beat(job)
        if beat is None or beat.phase == "ended":
            return False
        old_s = age_s(beat.at)
        if beat.host == socket.gethostname() or old_s > HEARTBEAT_IS_OLD_AFTER_S + CLOCKS_DIFFER_BY_AT_MOST_S:
            return old_s < HEARTBEAT_IS_OLD_AFTER_S
        if self._heard is None:
            self._heard = documents.heard_at(self.workspace.heard)
        last = self._heard.get(job.job_id)
        if last is None or last.at != beat.at:
            last = self._heard[job.job_id] = documents.Heard(beat.at, utc_now(), came_anew=last is not None)
            self._heard_anew = True
        silent = age_s(last.seen_at) > HEARTBEAT_IS_OLD_AFTER_S
        if abs(old_s) < HEARTBEAT_IS_OLD_AFTER_S or (last.came_anew and not silent):
            return True
        return False if silent else None

    def keep(self) -> None:
        """Keep what was found out for the next look."""
        self.diagnoses.keep()
        if self._heard and self._heard_anew and self.workspace.writable:
            try_write(self.workspace.heard, {job: msgspec.structs.asdict(one) for job, one in self._heard.items()})


def _may_beat(job: JobRow) -> bool:
    return job.state not in queue.WAITING and job.state not in queue.ENDED


def heartbeat(workspace: Workspace, job: JobRow) -> Heartbeat | None:
    """The worker's last sign of life in the job's present execution; None where it gave none."""
    path = workspace.arrays / job.array_id / "heartbeats" / f"{job.task}.json"
    try:
        return documents.heartbeat(read_bytes(path))
    except (OSError, ValueError):
        return None
