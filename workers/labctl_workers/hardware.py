"""The GPUs that this job may use, as NVIDIA's management library (NVML) sees them, before any engine starts.

NVML answers without making a CUDA context, so an engine that forks or starts its own processes is not disturbed.
It lists every GPU of the node: CUDA_VISIBLE_DEVICES, which Slurm sets, says which of them are the job's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from labctl_workers.record import JobSpec, Refusal


@dataclass(frozen=True)
class Gpu:
    """One GPU: `index` is NVML's on this node, `capability` such as "9.0", `memory_bytes` its total."""

    index: int
    uuid: str
    name: str
    capability: str
    memory_bytes: int
    driver: str


def visible_gpus(visible: str | None = None) -> list[Gpu]:
    """The GPUs in CUDA_VISIBLE_DEVICES (or in `visible`), in its order; all of the node's where it is not set."""
    if visible is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    with _nvml() as nvml:
        gpus = [] if nvml is None else [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    if visible is None:
        return gpus
    # CUDA stops reading the list at the first entry that names no GPU.
    chosen = []
    for entry in filter(None, (part.strip() for part in visible.split(","))):
        match = [gpu for gpu in gpus if entry == str(gpu.index) or (len(entry) > 4 and gpu.uuid.startswith(entry))]
        if len(match) != 1:
            break
        chosen.append(match[0])
    return chosen


def used_bytes(uuid: str) -> int | None:
    """Memory in use on the GPU with this UUID, by every process, in bytes; None where NVML does not answer."""
    uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    with _nvml() as nvml:
        if nvml is None:
            return None
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
        except nvml.NVMLError:
            return None


def check_gpus(job: JobSpec, gpus: list[Gpu]) -> None:
    """Refuse a GPU job on a node that gave fewer GPUs than asked for, or GPUs that are not the partition's."""
    if job.device != "cuda":
        return
    if len(gpus) < job.gpus:
        raise Refusal(
            "fewer-gpus",
            f"the job sees {len(gpus)} GPUs, it asked for {job.gpus}"
            f" (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})",
            f"ask Slurm for them (--gres=gpu:{job.gpus}), or ask labctl for fewer (--gpus)",
        )
    other = [gpu for gpu in gpus[: job.gpus] if job.capability and gpu.capability != job.capability]
    if other:
        raise Refusal(
            "other-capability",
            f"GPU {other[0].index} is a {other[0].name} (compute capability {other[0].capability});"
            f" partition {job.partition!r} is of capability {job.capability}",
            f"set slurm_partition of [partitions.{job.partition}] to one that holds {job.gpu or 'its'} nodes alone,"
            " or correct its capability",
        )


def describe(gpus: list[Gpu]) -> list[dict[str, Any]]:
    """The GPUs as JSON objects, for the record."""
    return [asdict(gpu) for gpu in gpus]


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        index=index,
        uuid=nvml.nvmlDeviceGetUUID(handle),
        name=nvml.nvmlDeviceGetName(handle),
        capability=f"{major}.{minor}",
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        driver=nvml.nvmlSystemGetDriverVersion(),
    )


@contextmanager
def _nvml() -> Iterator[Any]:
    """NVML, started; None on a node without NVIDIA's driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()
