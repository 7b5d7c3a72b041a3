"""The store's rows of measured runs -> cells to compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from labctl_orchestrator.compare import AXES, Cell
from labctl_orchestrator.store import Store
from labctl_workers.measure import METRICS
from labctl_workers.record import EAGER

PACKAGES_TO_TELL = ("torch", "transformers", "vllm")


def measured(store: Store, run_ids: Sequence[str]) -> list[str]:
    """Those of the runs that have a result, in the order given."""
    done = {row["run_id"] for row in store.rows("SELECT DISTINCT run_id FROM results WHERE status = 'done'")}
    return [run_id for run_id in run_ids if run_id in done]


def told_of(store: Store, run_ids: Sequence[str]) -> list[str]:
    """When, and with which versions, the results of these runs were measured: a line for each such combination."""
    told: dict[str, int] = {}
    for row in store.rows("SELECT run_id, ended_at, fingerprint FROM results WHERE status = 'done' ORDER BY ended_at"):
        if row["run_id"] in run_ids:
            packages = json.loads(row["fingerprint"]).get("packages", {})
            versions = ", ".join(f"{name} {packages[name]}" for name in PACKAGES_TO_TELL if name in packages)
            line = f"on {row['ended_at'][:10]}, with {versions or 'versions that are not known'}"
            told[line] = told.get(line, 0) + 1
    return [f"{count} measured {line}" for line, count in told.items()]


def cells(store: Store, run_ids: Sequence[str]) -> list[Cell]:
    """A cell for each run that has a result, from its latest attempt, in the order given."""
    latest = {
        row["run_id"]: row
        for row in store.rows(
            "SELECT results.*, jobs.queued_at, jobs.started_at AS job_started_at, jobs.ended_at AS job_ended_at"
            " FROM results LEFT JOIN jobs USING (job_id) WHERE status = 'done' ORDER BY results.ended_at"
        )
    }
    runs = {row["run_id"]: row for row in store.rows("SELECT * FROM runs")}
    tell_models_apart([runs[run_id] for run_id in run_ids if run_id in runs])
    return [_cell(store, runs[run_id], latest[run_id]) for run_id in run_ids if run_id in latest and run_id in runs]


def tell_models_apart(runs: Sequence[dict[str, Any]]) -> None:
    """Two contents of one name (step-100/model, step-200/model; two revisions) get their content's digits beside it."""
    contents: dict[str, set[str]] = {}
    for run in runs:
        contents.setdefault(run["model"], set()).add(run["model_content"])
    for run in runs:
        several = contents[run["model"]]
        if len(several) > 1:
            short = len({content[:8] for content in several}) == len(several)
            run["model"] = f"{run['model']}@{run['model_content'][:8] if short else run['model_content']}"


def _cell(store: Store, run: dict[str, Any], result: dict[str, Any]) -> Cell:
    key = (run["run_id"], result["attempt_id"])
    repeats = store.rows("SELECT * FROM repeats WHERE run_id = ? AND attempt_id = ? ORDER BY repeat", key)
    samples = store.rows(
        "SELECT output_tokens, finish_reason, text FROM samples JOIN texts USING (text_id)"
        " WHERE run_id = ? AND attempt_id = ? ORDER BY repeat, request",
        key,
    )
    mode, others = mode_and_others(run)
    run = {**run, "mode": mode, "engine_options": others}
    fingerprint = json.loads(result["fingerprint"])
    return Cell(
        run_id=run["run_id"],
        axes={axis: run[axis] for axis in AXES},
        values={
            **{name: [row[name] for row in repeats if row[name] is not None] for name in METRICS},
            **{name: [] if value is None else [value] for name, value in of_a_load(run, result).items()},
        },
        facts=_facts(fingerprint, samples),
        text=samples[0]["text"] if samples else "",
        remarks=tuple(remarks_on(fingerprint)),
    )


def mode_and_others(run: dict[str, Any]) -> tuple[str, str]:
    """The mode that was asked for ("" where the backend has none; none written is eager), and the other engine options."""
    options = json.loads(run["engine_options"] or "{}")
    mode = options.pop("mode", EAGER if run["backend"] == "hf" else "")
    return mode, json.dumps(options, sort_keys=True, ensure_ascii=False)


def remarks_on(fingerprint: dict[str, Any]) -> list[str]:
    """What has to be said of a result: that it ran in another mode than the one asked for, and why."""
    ran, asked = fingerprint.get("mode"), fingerprint.get("mode_asked")
    if ran == asked:
        return []
    return [f"ran in mode {ran}, not {asked}: {fingerprint.get('mode_reason', 'no reason is known')}"]


def of_a_load(run: dict[str, Any], result: dict[str, Any]) -> dict[str, float | None]:
    """Seconds of loading, and of the job that held the GPUs: its wait in the queue, and GPUs x time held, load included.

    The job's figures are the whole job's, which its runs share; None until Slurm has told its times.
    """
    held = _between(result["job_started_at"], result["job_ended_at"])
    return {
        **{name: result[name] for name in ("load_s", "init_s", "warmup_s")},
        "queue_s": _between(result["queued_at"], result["job_started_at"]),
        "gpu_s": None if held is None else held * run["gpus"],
    }


def _between(start: str | None, end: str | None) -> float | None:
    if start is None or end is None:
        return None
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def _facts(fingerprint: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, str]:
    packages = fingerprint.get("packages", {})
    facts = {name: packages[name] for name in PACKAGES_TO_TELL if name in packages}
    facts["effective dtype"] = str(fingerprint.get("effective_dtype"))
    facts["attention"] = str(fingerprint.get("attention"))
    facts["GPU"] = " + ".join(gpu["name"] for gpu in fingerprint.get("gpus", [])) or "none"
    facts["tokens generated"] = _distinct(sample["output_tokens"] for sample in samples)
    facts["finish reason"] = _distinct(sample["finish_reason"] for sample in samples)
    return facts


def _distinct(values: Any) -> str:
    return "/".join(str(value) for value in sorted(set(values)))
