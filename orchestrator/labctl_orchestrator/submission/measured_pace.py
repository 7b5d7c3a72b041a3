"""Measured times of engine settings in this workspace, from which the time limits of new jobs are computed."""

from __future__ import annotations

import functools
import json
from datetime import datetime

import msgspec

from labctl_orchestrator.request.packing import Pace, Paces
from labctl_orchestrator.store.database import Store
from labctl_workers.record import JobSpec

LATEST = 200  # results of the same settings


class _Timing(msgspec.Struct):
    """The times of a result, in seconds or ISO 8601, and the sizes of its run."""

    started_at: str
    ended_at: str
    load_s: float | None
    init_s: float | None
    warmup_s: float | None
    steps: int
    repeats: int

    @property
    def step_s(self) -> float | None:
        """Seconds per decode step (as `workload.steps_of` counts them), work outside the measured window included."""
        steps = self.steps * self.repeats
        if not steps:
            return None
        took = datetime.fromisoformat(self.ended_at) - datetime.fromisoformat(self.started_at)
        return max(0.0, took.total_seconds() - (self.warmup_s or 0.0)) / steps


def paces(store: Store | None) -> Paces:
    """The pace of a job's engine settings, read once for each; None without results of them."""

    known = functools.cache(lambda *settings: None if store is None else _pace(store, settings))

    def pace_of(job: JobSpec) -> Pace | None:
        options = json.dumps(job.engine_options, sort_keys=True, ensure_ascii=False)
        content = job.model.fingerprint or job.model.revision or ""
        model = (job.model.name, content, job.dtype)
        return known(job.partition, job.backend, *model, job.gpus, job.parallel, options, int(job.served))

    return pace_of


def _pace(store: Store, settings: tuple[str | int, ...]) -> Pace | None:
    rows = store.tuples(
        "SELECT results.started_at, results.ended_at, load_s, init_s, warmup_s, steps,"
        " (SELECT count(*) FROM repeats"
        " WHERE repeats.run_id = results.run_id AND repeats.attempt_id = results.attempt_id)"
        " FROM runs JOIN results USING (run_id) WHERE status = 'done' AND origin = 'here'"
        " AND partition = ? AND backend = ? AND model = ?"
        " AND model_content = ? AND dtype = ? AND gpus = ? AND parallel = ? AND engine_options = ? AND served = ?"
        " AND request_rate IS NULL AND trace = 0"
        " ORDER BY results.ended_at DESC LIMIT ?",
        (*settings, LATEST),
    )
    timings = [_Timing(*row) for row in rows]
    steps = [step for timing in timings if (step := timing.step_s) is not None]
    if not steps:
        return None
    return Pace(max((timing.load_s or 0.0) + (timing.init_s or 0.0) for timing in timings), max(steps))
