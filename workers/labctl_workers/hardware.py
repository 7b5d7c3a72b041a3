"""The GPUs that this job may use, as NVIDIA's management library (NVML) sees them, before any engine starts.

NVML answers without making a CUDA context, so an engine that forks or starts its own processes is not disturbed.
It lists every GPU of the node: CUDA_VISIBLE_DEVICES, which Slurm sets, says which of them are the job's.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from labctl_workers.record import JobSpec, Refusal

T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """One GPU: `index` is NVML's on this node, `capability` such as "9.0", `memory_bytes` its total.

    `memory_bandwidth_bytes_s` is the highest that its memory can give: clock x bus width x 2 (both edges of the clock).
    """

    index: int
    uuid: str
    name: str
    capability: str
    memory_bytes: int
    driver: str
    memory_bandwidth_bytes_s: float | None = None


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
    # CUDA shows no GPU at all where one is named twice.
    return chosen if len({gpu.uuid for gpu in chosen}) == len(chosen) else []


def used_bytes(uuid: str) -> int | None:
    """Memory in use on the GPU with this UUID, by every process, in bytes; None where NVML does not answer."""
    uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    with _nvml() as nvml:
        if nvml is None:
            return None
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            return _used(nvml, handle)
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


def cpus() -> dict[str, Any]:
    """The CPUs that this process may use: how many are `available`, and their `model` ("" where the kernel tells none)."""
    model = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {"available": len(os.sched_getaffinity(0)), "model": model or platform.processor()}


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
        memory_bandwidth_bytes_s=_told(nvml, lambda: _bandwidth(nvml, handle)),
    )


def _bandwidth(nvml: Any, handle: Any) -> float:
    clock_hz = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM) * 1e6
    return float(clock_hz * nvml.nvmlDeviceGetMemoryBusWidth(handle) * 2 / 8)


def _told(nvml: Any, ask: Callable[[], T]) -> T | None:
    """What NVML answers; None where this GPU or driver does not support the question."""
    try:
        return ask()
    except (nvml.NVMLError, AttributeError, TypeError):
        return None


def _used(nvml: Any, handle: Any) -> int:
    """As nvidia-smi counts it: without what the driver has set aside (480 MiB on an H100), which the older answer includes."""
    newer = _told(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2).used)
    return int(nvml.nvmlDeviceGetMemoryInfo(handle).used if newer is None else newer)


def energy_j(gpus: Sequence[Gpu]) -> float | None:
    """Energy that these GPUs have taken together since their driver was loaded, in joules (NVML's counter, in mJ).

    None without GPUs, or where one of them does not count (before Volta).
    """
    if not gpus:
        return None
    with _nvml() as nvml:
        if nvml is None:
            return None
        total = 0.0
        for gpu in gpus:
            handle = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
            counted = _told(nvml, lambda handle=handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))  # type: ignore[misc]
            if counted is None:
                return None
            total += counted / 1000
    return total


def clocks(gpus: Sequence[Gpu]) -> list[dict[str, Any]]:
    """Clocks (MHz), temperature (Celsius), power limit (W) and the reasons for which clocks are held back, now."""
    if not gpus:
        return []
    with _nvml() as nvml:
        return [] if nvml is None else [_clocks(nvml, gpu) for gpu in gpus]


def _clocks(nvml: Any, gpu: Gpu) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
    return {
        "index": gpu.index,
        "sm_mhz": _told(nvml, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        "sm_max_mhz": _told(nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
        "memory_mhz": _told(nvml, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        "temperature_c": _told(nvml, lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        "power_limit_w": _told(nvml, lambda: nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000),
        "throttle_reasons": _told(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
    }


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
