"""The peak memory of the fullest GPU that fit predicts for measured runs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import NamedTuple

from labctl_orchestrator.analysis.comparison import Cell
from labctl_orchestrator.models import checkpoint, fit
from labctl_orchestrator.models.architecture import ITEMSIZE
from labctl_orchestrator.models.checkpoint import Checkpoint
from labctl_orchestrator.models.fit import Gpus, Sequences
from labctl_orchestrator.request import settings
from labctl_orchestrator.store import documents
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import LabctlError
from labctl_workers.record import JobSpec

# A run with the input of its prediction: the model from any of its jobs, the GPUs from any result. An imported run has no array
# here, and its model is on another machine.
_OF_RESULT = "FROM samples WHERE samples.run_id = runs.run_id AND samples.attempt_id = results.attempt_id"
_RUNS = (
    "SELECT runs.run_id, backend, dtype, gpus, parallel, engine_options, batch_size, sampling, array_id, task,"  # noqa: S608
    " fingerprint,"
    f" (SELECT max(prompt_tokens) {_OF_RESULT}),"
    f" coalesce(max_new_tokens, (SELECT max(output_tokens) {_OF_RESULT}))"
    " FROM runs JOIN results USING (run_id) JOIN jobs USING (job_id)"
    " WHERE results.status = 'done' AND device = 'cuda' AND array_id IS NOT NULL"
    " AND runs.run_id IN (SELECT value FROM json_each(?)) ORDER BY results.ended_at"
)


class _Run(NamedTuple):
    """A row of `_RUNS`."""

    run_id: str
    backend: str
    dtype: str
    gpus: int
    parallel: str
    engine_options: str | None
    batch_size: int | None
    sampling: str
    array_id: str
    task: int
    fingerprint: str
    prompt_tokens: int | None  # of the longest prompt
    new_tokens: int | None  # of the longest answer


def peaks(workspace: Workspace, store: Store, cells: Sequence[Cell]) -> dict[str, float]:
    """Peak bytes that torch allocates on the fullest GPU, by run id, without runs that fit cannot predict."""
    rows = store.tuples(_RUNS, [json.dumps([cell.run_id for cell in cells])])
    known = settings.load(workspace)
    models: dict[str, Checkpoint | None] = {}
    found = {}
    for run in {run.run_id: run for run in map(_Run._make, rows)}.values():
        job = documents.read_at(workspace.arrays / run.array_id / f"{run.task}.json", JobSpec)
        if job is None:
            continue
        key = json.dumps([job.model.to_json(), job.partition], sort_keys=True)
        if key not in models:
            models[key] = _model(job, known)
        model, gpus = models[key], _gpus(run)
        if model is not None and gpus is not None and run.prompt_tokens and run.new_tokens:
            with contextlib.suppress(LabctlError):  # more GPUs than layers, or heads that they do not divide
                found[run.run_id] = _peak(run, run.prompt_tokens, run.new_tokens, model, gpus)
    return found


def _model(job: JobSpec, known: settings.Settings) -> Checkpoint | None:
    """The checkpoint of a job's model; None for one on another machine, or of an architecture unknown to fit."""
    partition = known.partition(job.partition) if job.partition in known.names() else None
    try:
        found = checkpoint.read(job.model, partition, online=False)
        return found if found.shape else None
    except LabctlError:
        return None


def _gpus(run: _Run) -> Gpus | None:
    seen = documents.read(run.fingerprint.encode(), documents.Fingerprint).gpus
    if not seen or not seen[0].memory_bytes or not seen[0].capability:
        return None
    return Gpus(run.gpus, seen[0].name, seen[0].memory_bytes, float(seen[0].capability))


def _peak(run: _Run, prompt_tokens: int, new_tokens: int, model: Checkpoint, gpus: Gpus) -> float:
    itemsize, sampled = ITEMSIZE[run.dtype], run.sampling != "greedy"
    load = Sequences(run.batch_size or 1, prompt_tokens, new_tokens, itemsize, sampled)
    parts = model.bytes_of(itemsize)
    if run.backend == "vllm":  # it reserves its share of the GPU, whatever the load
        share = json.loads(run.engine_options or "{}").get("gpu_memory_utilization")
        case = fit.Case(model.shape, parts, gpus, run.backend, share, run.parallel, visible_bytes=gpus.memory_bytes)
        reserved = case.reservation(load)
        return float(reserved.weights + reserved.activations + reserved.kv_cache)
    return float(max(memory.peak for memory in fit.by_layers(model.shape, parts, load, gpus, run.backend)))
