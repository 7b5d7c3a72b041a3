"""Memory as it was measured beside what `labctl fit` works out from the model's configuration."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from labctl_orchestrator.analysis.comparison import mean_of
from labctl_orchestrator.models import checkpoint, fit
from labctl_orchestrator.models.architecture import ITEMSIZE
from labctl_orchestrator.request import settings
from labctl_orchestrator.store import documents
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import LabctlError


@dataclass(frozen=True)
class Held:
    """One run's memory of its fullest GPU (or CPU part), in bytes: keys and values that the run used, and torch's peak (None: not
    measured there).

    `tokens` are those of a sequence that have keys and values at the end; `alike` names runs that differ in length alone.
    """

    run_id: str
    alike: str
    max_new_tokens: int
    tokens: int
    batch_size: int
    kv_cache: float
    kv_cache_predicted: int
    peak: float | None
    peak_predicted: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Growth:
    """What more tokens took, from one length to the next: bytes, and bytes a token of one sequence."""

    shorter: int
    longer: int
    measured: float
    predicted: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def held(workspace: Workspace, store: Store, run_ids: Sequence[str]) -> tuple[list[Held], list[str]]:
    """(the runs with their prediction, why others have none)."""
    found, without = [], []
    for run_id in run_ids:
        try:
            found.append(_held(workspace, store, run_id))
        except LabctlError as error:
            without.append(f"no prediction for {run_id}: {error.message}")
    return found, without


def growth(found: Sequence[Held]) -> list[Growth]:
    """Between neighbouring lengths of runs that differ in nothing else."""
    steps = []
    for _, alike in itertools.groupby(sorted(found, key=lambda one: one.alike), key=lambda one: one.alike):
        by_length = sorted(alike, key=lambda one: one.tokens)
        for one, other in itertools.pairwise(by_length):
            more = (other.tokens - one.tokens) * one.batch_size
            steps.append(
                Growth(
                    one.max_new_tokens,
                    other.max_new_tokens,
                    other.kv_cache - one.kv_cache,
                    other.kv_cache_predicted - one.kv_cache_predicted,
                    more,
                )
            )
    return [step for step in steps if step.tokens]


def _held(workspace: Workspace, store: Store, run_id: str) -> Held:
    (run,) = store.rows("SELECT * FROM runs WHERE run_id = ?", (run_id,))
    (result,) = store.rows(
        "SELECT attempt_id, job_id, fingerprint FROM results WHERE run_id = ? AND status = 'done'"
        " ORDER BY ended_at DESC LIMIT 1",
        (run_id,),
    )
    if run["backend"] == "vllm":
        raise LabctlError("vLLM sets its cache aside ahead of the first token")
    key, fingerprint = (run_id, result["attempt_id"]), json.loads(result["fingerprint"])
    gpus = _gpus(store, key, fingerprint)
    (lengths,) = store.rows(
        "SELECT max(prompt_tokens) AS prompt, max(output_tokens) AS new FROM samples WHERE run_id = ? AND attempt_id = ?",
        key,
    )
    known = settings.load(workspace)
    partition = known.partition(run["partition"]) if run["partition"] in known.names() else None
    job = documents.job_at(workspace.spec(result["job_id"]))
    if job is None:
        raise LabctlError("its job's file is not here")
    read = checkpoint.read(job.model, partition, online=False)
    load = fit.Workload(
        run["batch_size"], lengths["prompt"], lengths["new"], ITEMSIZE[run["dtype"]], run["sampling"] != "greedy"
    )
    predicted = fit.by_layers(read.shape, read.bytes_of(load.itemsize), load, gpus, run["backend"])
    repeats = store.rows(
        "SELECT kv_cache_used_bytes AS kv, peak_allocated_bytes AS peak FROM repeats WHERE run_id = ? AND attempt_id = ?",
        key,
    )
    kv_cache = [repeat["kv"] for repeat in repeats if repeat["kv"] is not None]
    peak = [repeat["peak"] for repeat in repeats if repeat["peak"] is not None]
    if not kv_cache:
        raise LabctlError("its keys and values were not measured")
    alike = {name: value for name, value in run.items() if name not in ("run_id", "max_new_tokens", "asked", "prompts")}
    return Held(
        run_id,
        json.dumps(alike, sort_keys=True, default=str),
        run["max_new_tokens"],
        load.context,
        run["batch_size"],
        mean_of("kv_cache_used_bytes", [kv_cache]) or 0.0,
        max(memory.kv_cache_used for memory in predicted),
        mean_of("peak_allocated_bytes", [peak]),
        max(_peak(memory, load, fingerprint) for memory in predicted) if peak else None,
    )


def _peak(memory: fit.Memory, load: fit.Workload, fingerprint: dict[str, Any]) -> int:
    """With `staged` the runs of a job share the memory of keys and values: the largest of them says how much is set aside."""
    buckets = (fingerprint.get("stages") or {}).get("buckets") or []
    slots = max((bucket["micro_batches"] * bucket["rows"] * bucket["length"] for bucket in buckets), default=0)
    of_the_job = slots * memory.kv_cache_used // (load.batch * load.context)
    return memory.peak + max(0, of_the_job - memory.kv_cache)


def _gpus(store: Store, key: tuple[str, str], fingerprint: dict[str, Any]) -> fit.Gpus:
    """The devices that the layers lay on, as their records have them."""
    (count,) = store.rows("SELECT count(DISTINCT device) AS n FROM devices WHERE run_id = ? AND attempt_id = ?", key)
    first = (fingerprint.get("gpus") or [{}])[0]
    return fit.Gpus(
        max(1, count["n"]),
        str(first.get("name", "")),
        int(first.get("memory_bytes") or 0),
        float(first.get("capability") or 0),
    )
