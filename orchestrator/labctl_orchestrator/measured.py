"""The store's rows of measured runs -> cells to compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from labctl_orchestrator.compare import AXES, Cell
from labctl_orchestrator.store import Store
from labctl_workers.measure import METRICS

PACKAGES_TO_TELL = ("torch", "transformers", "vllm")


def measured(store: Store, run_ids: Sequence[str]) -> set[str]:
    """Those of the runs that have a result."""
    done = {row["run_id"] for row in store.rows("SELECT DISTINCT run_id FROM results WHERE status = 'done'")}
    return done.intersection(run_ids)


def cells(store: Store, run_ids: Sequence[str]) -> list[Cell]:
    """A cell for each run that has a result, from its latest attempt, in the order given."""
    latest = {
        row["run_id"]: row
        for row in store.rows(
            "SELECT run_id, attempt_id, fingerprint FROM results WHERE status = 'done' ORDER BY ended_at"
        )
    }
    runs = {row["run_id"]: row for row in store.rows("SELECT * FROM runs")}
    return [_cell(store, runs[run_id], latest[run_id]) for run_id in run_ids if run_id in latest and run_id in runs]


def _cell(store: Store, run: dict[str, Any], result: dict[str, Any]) -> Cell:
    key = (run["run_id"], result["attempt_id"])
    repeats = store.rows("SELECT * FROM repeats WHERE run_id = ? AND attempt_id = ? ORDER BY repeat", key)
    samples = store.rows(
        "SELECT output_tokens, finish_reason, text FROM samples JOIN texts USING (text_id)"
        " WHERE run_id = ? AND attempt_id = ? ORDER BY repeat, request",
        key,
    )
    return Cell(
        run_id=run["run_id"],
        axes={axis: run[axis] for axis in AXES},
        values={name: [row[name] for row in repeats if row[name] is not None] for name in METRICS},
        facts=_facts(json.loads(result["fingerprint"]), samples),
        text=samples[0]["text"] if samples else "",
    )


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
