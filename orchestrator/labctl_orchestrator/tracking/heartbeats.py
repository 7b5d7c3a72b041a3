"""Heartbeats of workers."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

import msgspec

from labctl_orchestrator.store import documents
from labctl_orchestrator.store.documents import try_write
from labctl_orchestrator.store.job_rows import JobRow
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking.diagnosis import RunDiagnoses
from labctl_orchestrator.tracking.times import CLOCKS_DIFFER_BY_AT_MOST_S, HEARTBEAT_IS_OLD_AFTER_S, age_s
from labctl_slurm import queue
from labctl_workers.record import Heartbeat, utc_now


@dataclass
class Sources:
    """Sources beside the store, each read once: the jobs' heartbeats, when they were first seen, and the logs."""

    workspace: Workspace
    diagnoses: RunDiagnoses
    _beats: dict[str, Heartbeat | None] = field(default_factory=dict)
    _heard: dict[str, documents.Heard] | None = None
    _heard_anew: bool = False

    def beat(self, job: JobRow) -> Heartbeat | None:
        """The worker's last heartbeat in the job's present start; None without one."""
        if job.job_id not in self._beats:
            may_beat = job.state not in queue.WAITING and job.state not in queue.ENDED
            path = self.workspace.arrays / job.array_id / "heartbeats" / f"{job.task}.json"
            self._beats[job.job_id] = documents.read_at(path, Heartbeat) if may_beat else None
        return self._beats[job.job_id]

    def is_alive(self, job: JobRow) -> bool | None:
        """Whether the job's worker runs, by its heartbeats; None where that is not certain yet. For a worker on another machine,
        the time without a new heartbeat counts, by this machine's clock."""
        beat = self.beat(job)
        if beat is None or beat.phase == "ended":
            return False
        old_s = age_s(beat.at)
        if beat.host == socket.gethostname() or old_s > HEARTBEAT_IS_OLD_AFTER_S + CLOCKS_DIFFER_BY_AT_MOST_S:
            return old_s < HEARTBEAT_IS_OLD_AFTER_S
        if self._heard is None:
            self._heard = documents.read_at(self.workspace.heard, dict[str, documents.Heard]) or {}
        last = self._heard.get(job.job_id)
        if last is None or last.at != beat.at:
            last = self._heard[job.job_id] = documents.Heard(beat.at, utc_now(), came_anew=last is not None)
            self._heard_anew = True
        silent = age_s(last.seen_at) > HEARTBEAT_IS_OLD_AFTER_S
        if abs(old_s) < HEARTBEAT_IS_OLD_AFTER_S or (last.came_anew and not silent):
            return True
        return False if silent else None

    def keep(self) -> None:
        """Write the new diagnoses and heartbeats for the next call."""
        self.diagnoses.keep()
        if self._heard and self._heard_anew and self.workspace.writable:
            try_write(self.workspace.heard, {job: msgspec.structs.asdict(one) for job, one in self._heard.items()})
