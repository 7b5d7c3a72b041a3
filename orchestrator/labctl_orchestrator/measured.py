"""The store's rows of measured runs -> cells to compare."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from labctl_orchestrator.compare import ALL_METRICS, AXES, OF_A_LOAD, Cell
from labctl_orchestrator.store import Store
from labctl_workers.measure import METRICS
from labctl_workers.record import EAGER

PACKAGES_TO_TELL = ("torch", "transformers", "vllm")


def measured(store: Store, run_ids: Sequence[str]) -> list[str]:
    """Those of the runs that have a result, in the order given."""
    done = {run_id for (run_id,) in store.tuples("SELECT DISTINCT run_id FROM results WHERE status = 'done'")}
    return [run_id for run_id in run_ids if run_id in done]


def told_of(store: Store, run_ids: Sequence[str]) -> list[str]:
    """When, and with which versions, the results of these runs were measured: a line for each such combination."""
    told: dict[str, int] = {}
    wanted = set(run_ids)
    for row in store.rows("SELECT run_id, ended_at, fingerprint FROM results WHERE status = 'done' ORDER BY ended_at"):
        if row["run_id"] in wanted:
            packages = json.loads(row["fingerprint"]).get("packages", {})
            versions = ", ".join(f"{name} {packages[name]}" for name in PACKAGES_TO_TELL if name in packages)
            line = f"on {row['ended_at'][:10]}, with {versions or 'versions that are not known'}"
            told[line] = told.get(line, 0) + 1
    return [f"{count} measured {line}" for line, count in told.items()]


def cells(store: Store, run_ids: Sequence[str], metrics: Sequence[str] = tuple(ALL_METRICS)) -> list[Cell]:
    """A cell for each run that has a result, from its latest attempt, in the order given, with the values of these metrics.

    A few queries for any number of runs, none of which reads the requests' own rows.
    """
    wanted = set(run_ids)
    with_load = any(name in OF_A_LOAD for name in metrics)
    query = LATEST_WITH_LOAD if with_load else LATEST
    latest = {row["run_id"]: row for row in store.rows(query) if row["run_id"] in wanted}
    runs = {row["run_id"]: row for row in store.rows(RUNS) if row["run_id"] in latest}
    measured = [runs[run_id] for run_id in run_ids if run_id in runs]
    tell_models_apart(measured)
    values = _values(store, latest, [name for name in METRICS if name in metrics])
    return [_cell(run, latest[run["run_id"]], values[run["run_id"]], metrics) for run in measured]


# Both are put together of this module's own words.
RUNS = f"SELECT {', '.join(['run_id', 'model_content', *(axis for axis in AXES if axis != 'mode')])} FROM runs"  # noqa: S608
_LATEST = (
    "SELECT run_id, attempt_id, facts, tokens_generated, finish_reasons, text{} FROM results"
    " LEFT JOIN texts USING (text_id){} WHERE status = 'done' ORDER BY results.ended_at"
)
# The last row of a run is the one that counts.
LATEST = _LATEST.format("", "")
LATEST_WITH_LOAD = _LATEST.format(
    ", load_s, init_s, warmup_s, jobs.queued_at, jobs.started_at AS job_started_at, jobs.ended_at AS job_ended_at",
    " LEFT JOIN jobs USING (job_id)",
)
_axes = operator.itemgetter(*AXES)


def _values(
    store: Store, latest: Mapping[str, dict[str, Any]], metrics: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """The metrics' values, one a repeat, of each run's latest attempt."""
    found: dict[str, dict[str, list[float]]] = {run_id: {name: [] for name in metrics} for run_id in latest}
    attempts = {run_id: row["attempt_id"] for run_id, row in latest.items()}
    columns = ", ".join(["run_id", "attempt_id", *metrics])  # names of METRICS
    query = f"SELECT {columns} FROM repeats ORDER BY run_id, attempt_id, repeat"  # noqa: S608
    for run_id, attempt_id, *values in store.tuples(query):
        if attempts.get(run_id) == attempt_id:
            of_run = found[run_id]
            for name, value in zip(metrics, values, strict=True):
                if value is not None:
                    of_run[name].append(value)
    return found


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


def _cell(run: dict[str, Any], result: dict[str, Any], values: dict[str, list[float]], metrics: Sequence[str]) -> Cell:
    run["mode"], run["engine_options"] = mode_and_others(run)
    facts, remarks = _told_with(
        result["facts"] or "{}", result["tokens_generated"] or "", result["finish_reasons"] or ""
    )
    if "load_s" in result:
        of_load = of_a_load(run, result).items()
        values |= {name: [] if value is None else [value] for name, value in of_load if name in metrics}
    return Cell(
        run_id=run["run_id"],
        axes=dict(zip(AXES, _axes(run), strict=True)),
        values=values,
        facts=facts,
        text=result["text"] or "",
        remarks=remarks,
    )


FACTS = ("packages", "effective_dtype", "attention", "gpus", "mode", "mode_asked", "mode_reason")


def facts_of(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """What a comparison reads of a fingerprint: mostly the same for the runs of a sweep, while hosts and ids are not."""
    facts = {name: fingerprint[name] for name in FACTS if name in fingerprint}
    if "packages" in facts:
        facts["packages"] = {name: facts["packages"][name] for name in PACKAGES_TO_TELL if name in facts["packages"]}
    if "gpus" in facts:
        facts["gpus"] = [{"name": gpu["name"]} for gpu in facts["gpus"]]
    return facts


@functools.lru_cache(maxsize=1024)
def _told_with(facts: str, tokens_generated: str, finish_reasons: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """A cell's facts and remarks: the runs of a sweep share them."""
    fingerprint = json.loads(facts)
    told = {**_facts(fingerprint), "tokens generated": tokens_generated, "finish reason": finish_reasons}
    return told, tuple(remarks_on(fingerprint))


def mode_and_others(run: dict[str, Any]) -> tuple[str, str]:
    """The mode that was asked for ("" where the backend has none; none written is eager), and the other engine options."""
    return _mode_and_others(run["engine_options"] or "{}", run["backend"])


@functools.cache
def _mode_and_others(engine_options: str, backend: str) -> tuple[str, str]:
    options = json.loads(engine_options)
    mode = options.pop("mode", EAGER if backend == "hf" else "")
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


def _facts(fingerprint: dict[str, Any]) -> dict[str, str]:
    packages = fingerprint.get("packages", {})
    facts = {name: packages[name] for name in PACKAGES_TO_TELL if name in packages}
    facts["effective dtype"] = str(fingerprint.get("effective_dtype"))
    facts["attention"] = str(fingerprint.get("attention"))
    facts["GPU"] = " + ".join(gpu["name"] for gpu in fingerprint.get("gpus", [])) or "none"
    return facts
