"""How fast an engine's settings were in this workspace: what the times of new jobs are reckoned from."""

from __future__ import annotations

import functools
import json
from datetime import datetime
from typing import Any

from labctl_orchestrator.request.packing import Pace, Paces
from labctl_orchestrator.store.database import Store
from labctl_workers.record import JobSpec, requests_per_repeat

LATEST = 200  # results of one kind that are looked at


def paces(store: Store | None) -> Paces:
    """The pace of a job's engine settings, asked from the store once for each; None where nothing was measured of them."""

    @functools.cache
    def of_settings(*settings: str | int) -> Pace | None:
        return None if store is None else _pace(store, settings)

    def pace_of(job: JobSpec) -> Pace | None:
        options = json.dumps(job.engine_options, sort_keys=True, ensure_ascii=False)
        content = job.model.fingerprint or job.model.revision or ""
        return of_settings(job.partition, job.backend, job.model.name, content, job.dtype, job.gpus, options)

    return pace_of


def _pace(store: Store, settings: tuple[str | int, ...]) -> Pace | None:
    rows = store.rows(
        "SELECT results.started_at, results.ended_at, load_s, init_s, warmup_s, max_new_tokens, batch_size, requests,"
        " json_array_length(prompts) AS prompts, (SELECT count(*) FROM repeats"
        " WHERE repeats.run_id = results.run_id AND repeats.attempt_id = results.attempt_id) AS repeats"
        " FROM runs JOIN results USING (run_id) WHERE status = 'done' AND origin = 'here'"
        " AND partition = ? AND backend = ? AND model = ?"
        " AND model_content = ? AND dtype = ? AND gpus = ? AND engine_options = ? AND request_rate IS NULL"
        " ORDER BY results.ended_at DESC LIMIT ?",
        (*settings, LATEST),
    )
    steps = [step for row in rows if (step := _step_s(row)) is not None]
    loads = [(row["load_s"] or 0.0) + (row["init_s"] or 0.0) for row in rows]
    return Pace(max(loads), max(steps)) if steps else None


def _step_s(row: dict[str, Any]) -> float | None:
    """Seconds of a decode step, what is done outside the measured window included; as `packing.steps_of` counts them."""
    requests = requests_per_repeat(row["requests"], row["prompts"], row["batch_size"])
    steps = -(-requests // row["batch_size"]) * row["max_new_tokens"] * row["repeats"]
    if not steps:
        return None
    took = datetime.fromisoformat(row["ended_at"]) - datetime.fromisoformat(row["started_at"])
    return float(max(0.0, took.total_seconds() - (row["warmup_s"] or 0.0)) / steps)
