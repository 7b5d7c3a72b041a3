"""What fit predicts for runs that were measured: the peak memory of the fullest GPU, to be held against what it was."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from labctl_orchestrator.analysis.comparison import Cell
from labctl_orchestrator.models import checkpoint, fit
from labctl_orchestrator.models.architecture import ITEMSIZE
from labctl_orchestrator.models.checkpoint import Checkpoint
from labctl_orchestrator.models.fit import Gpus, Workload
from labctl_orchestrator.request import settings
from labctl_orchestrator.store import documents
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import LabctlError
from labctl_workers.record import JobSpec

# A run with what its prediction takes: any job that it is in tells where its model is, any result which GPUs it had. (An imported
# run's job has no batch here, and its model lies on somebody else's disk.)
_RUNS = (
    "SELECT runs.run_id, backend, dtype, gpus, engine_options, max_new_tokens, batch_size, sampling, batch_id, task, fingerprint,"
    " (SELECT max(prompt_tokens) FROM samples WHERE samples.run_id = runs.run_id AND samples.attempt_id = results.attempt_id)"
    " AS prompt_tokens FROM runs JOIN results USING (run_id) JOIN jobs USING (job_id)"
    " WHERE results.status = 'done' AND device = 'cuda' AND batch_id IS NOT NULL"
    " AND runs.run_id IN (SELECT value FROM json_each(?)) ORDER BY results.ended_at"
)


def peaks(workspace: Workspace, store: Store, cells: Sequence[Cell]) -> dict[str, float]:
    """Bytes that torch allocates at most on the fullest GPU, by run id; runs that fit knows nothing of are left out."""
    rows = {row["run_id"]: row for row in store.rows(_RUNS, [json.dumps([cell.run_id for cell in cells])])}
    models = _Models(workspace)
    found = {}
    for run_id, row in rows.items():
        job = documents.job_at(workspace.batches / row["batch_id"] / f"{row['task']}.json")
        model = models.of(job) if job is not None else None
        gpus = _gpus(json.loads(row["fingerprint"]), row["gpus"])
        if model is not None and gpus is not None and row["prompt_tokens"]:
            with contextlib.suppress(LabctlError):  # more GPUs than layers, or heads that they do not divide
                found[run_id] = _peak(row, model, gpus)
    return found


class _Models:
    """The checkpoints of jobs' models, each read once: None where it is not on this machine, or of no kind that fit knows."""

    def __init__(self, workspace: Workspace) -> None:
        self._settings = settings.load(workspace)
        self._read: dict[str, Checkpoint | None] = {}

    def of(self, job: JobSpec) -> Checkpoint | None:
        key = json.dumps([job.model.to_json(), job.partition], sort_keys=True)
        if key not in self._read:
            self._read[key] = self._found(job)
        return self._read[key]

    def _found(self, job: JobSpec) -> Checkpoint | None:
        partition = self._settings.partition(job.partition) if job.partition in self._settings.names() else None
        try:
            found = checkpoint.read(job.model, partition, online=False)
            return found if found.shape else None
        except LabctlError:
            return None


def _gpus(fingerprint: Mapping[str, Any], count: int) -> Gpus | None:
    gpus = fingerprint.get("gpus") or []
    if not gpus or not gpus[0].get("memory_bytes") or not gpus[0].get("capability"):
        return None
    return Gpus(count, gpus[0]["name"], gpus[0]["memory_bytes"], float(gpus[0]["capability"]))


def _peak(row: Mapping[str, Any], model: Checkpoint, gpus: Gpus) -> float:
    load = Workload(
        row["batch_size"],
        row["prompt_tokens"],
        row["max_new_tokens"],
        ITEMSIZE[row["dtype"]],
        row["sampling"] != "greedy",
    )
    parts = model.bytes_of(load.itemsize)
    if row["backend"] == "vllm":  # it takes its share of the GPU, whatever is asked of it
        share = json.loads(row["engine_options"] or "{}").get("gpu_memory_utilization")
        reserved = fit.of_vllm(model.shape, parts, load, gpus, share, total_bytes=gpus.memory_bytes)
        return float(reserved.weights + reserved.activations + reserved.kv_cache)
    return float(max(memory.peak for memory in fit.by_layers(model.shape, parts, load, gpus, row["backend"])))
