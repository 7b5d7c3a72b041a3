"""Measured memory beside the prediction of `labctl fit` from the model's configuration."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from labctl_orchestrator.analysis.comparison import mean_of
from labctl_orchestrator.models import checkpoint, fit
from labctl_orchestrator.models.architecture import ITEMSIZE
from labctl_orchestrator.request import settings
from labctl_orchestrator.store import documents
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.documents import Fingerprint
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import LabctlError
from labctl_workers.record import JobSpec

# Columns of a run that differ where the length of its answers does.
FOLLOW_THE_LENGTH = ("run_id", "max_new_tokens", "output_len", "steps", "prompts")


@dataclass(frozen=True)
class MeasuredMemory:
    """Memory of one run in bytes, on its fullest GPU (or CPU part): the KV cache that the run used, and torch's peak (None: not
    measured).

    `tokens` is the number of tokens per sequence with keys and values at the end. `alike` is equal for runs that differ only in
    length.
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


@dataclass(frozen=True)
class GrowthStep:
    """Growth of the KV cache from one length to the next, in bytes; `tokens` counts the tokens added over all sequences."""

    shorter: int
    longer: int
    measured: float
    predicted: int
    tokens: int


def measured_memory(
    workspace: Workspace, store: Store, run_ids: Sequence[str]
) -> tuple[list[MeasuredMemory], list[str]]:
    """(memory of the runs that have a prediction, one message for each run without)."""
    found, without = [], []
    for run_id in run_ids:
        try:
            one = _of_run(workspace, store, run_id)
        except LabctlError as error:
            one = error.message
        if isinstance(one, str):
            without.append(f"no prediction for {run_id}: {one}")
        else:
            found.append(one)
    return found, without


def growth(found: Sequence[MeasuredMemory]) -> list[GrowthStep]:
    """Growth between neighbouring lengths of runs that differ only in length."""
    return [
        GrowthStep(
            one.max_new_tokens,
            other.max_new_tokens,
            other.kv_cache - one.kv_cache,
            other.kv_cache_predicted - one.kv_cache_predicted,
            (other.tokens - one.tokens) * one.batch_size,
        )
        for one, other in itertools.pairwise(sorted(found, key=lambda one: (one.alike, one.tokens)))
        if one.alike == other.alike and one.tokens < other.tokens
    ]


def _of_run(workspace: Workspace, store: Store, run_id: str) -> MeasuredMemory | str:
    """The run's memory, or why it has no prediction."""
    (run,) = store.rows("SELECT * FROM runs WHERE run_id = ?", (run_id,))
    if run["backend"] == "vllm":
        return "vLLM reserves its KV cache before the first token"
    ((attempt_id, job_id, fingerprint_json),) = store.tuples(
        "SELECT attempt_id, job_id, fingerprint FROM results WHERE run_id = ? AND status = 'done'"
        " ORDER BY ended_at DESC LIMIT 1",
        (run_id,),
    )
    key, fingerprint = (run_id, attempt_id), documents.read(fingerprint_json.encode(), Fingerprint)
    job = documents.read_at(workspace.spec(job_id), JobSpec)
    if job is None:
        return f"job file is missing: {workspace.spec(job_id)}"
    memory = store.tuples(
        "SELECT kv_cache_used_bytes, peak_allocated_bytes FROM repeats WHERE run_id = ? AND attempt_id = ?", key
    )
    kv_cache, peak = ([value for value in values if value is not None] for values in zip(*memory, strict=True))
    if not kv_cache:
        return "its KV cache was not measured"
    known = settings.load(workspace)
    partition = known.partition(run["partition"]) if run["partition"] in known.names() else None
    read = checkpoint.read(job.model, partition, online=False)
    ((prompt_tokens, new_tokens),) = store.tuples(
        "SELECT max(prompt_tokens), max(output_tokens) FROM samples WHERE run_id = ? AND attempt_id = ?", key
    )
    load = fit.Sequences(
        run["batch_size"], prompt_tokens, new_tokens, ITEMSIZE[run["dtype"]], run["sampling"] != "greedy"
    )
    gpus = _gpus(store, key, fingerprint)
    predicted = fit.by_layers(read.shape, read.bytes_of(load.itemsize), load, gpus, run["backend"])
    return MeasuredMemory(
        run_id,
        str([run[name] for name in run.keys() if name not in FOLLOW_THE_LENGTH]),  # noqa: SIM118
        run["max_new_tokens"],
        load.context,
        run["batch_size"],
        mean_of("kv_cache_used_bytes", [kv_cache]) or 0.0,
        max(memory.kv_cache_used for memory in predicted),
        mean_of("peak_allocated_bytes", [peak]),
        max(_peak(memory, load, fingerprint) for memory in predicted) if peak else None,
    )


def _peak(memory: fit.Memory, load: fit.Sequences, fingerprint: Fingerprint) -> int:
    """Predicted peak. With `staged` all runs of a job share one KV cache, sized for the largest bucket."""
    buckets = fingerprint.stages.buckets if fingerprint.stages else []
    slots = max((bucket.micro_batches * bucket.rows * bucket.length for bucket in buckets), default=0)
    shared = slots * memory.kv_cache_used // (load.batch * load.context)
    return memory.peak + max(0, shared - memory.kv_cache)


def _gpus(store: Store, key: tuple[str, str], fingerprint: Fingerprint) -> fit.Gpus:
    """The devices that the record lists."""
    ((count,),) = store.tuples("SELECT count(DISTINCT device) FROM devices WHERE run_id = ? AND attempt_id = ?", key)
    if not fingerprint.gpus:
        return fit.Gpus(max(1, count), "", 0, 0.0)
    first = fingerprint.gpus[0]
    return fit.Gpus(max(1, count), first.name, first.memory_bytes or 0, float(first.capability or 0))
