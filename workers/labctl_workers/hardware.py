"""The job's GPUs, from NVIDIA's management library (NVML), before any engine starts.

NVML needs no CUDA context, so an engine can still fork afterwards. It lists every GPU of the node; Slurm sets
CUDA_VISIBLE_DEVICES to those of the job.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from labctl_workers.record import JobSpec, Refusal

T = TypeVar("T")
MIG = "MIG-"  # of a slice's UUID
SLICE_TYPE = re.compile(r"[1-9]g\.[0-9]+gb", re.IGNORECASE)


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG slice: `index` is NVML's on this node (of a slice that of its GPU), `capability` such as "9.0",
    `memory_bytes` its total memory.

    `memory_bandwidth_bytes_s` is the theoretical maximum: memory clock x bus width x 2 (double data rate).
    """

    index: int
    uuid: str
    name: str
    capability: str
    memory_bytes: int
    driver: str
    memory_bandwidth_bytes_s: float | None = None

    @property
    def is_slice(self) -> bool:
        return self.uuid.startswith(MIG)


@dataclass(frozen=True)
class Clocks:
    """The state of one GPU: clocks (MHz), temperature (Celsius), power limit (W) and NVML's bit mask of throttle reasons; None
    where the GPU or the driver does not report it."""

    index: int
    sm_mhz: int | None
    sm_max_mhz: int | None
    memory_mhz: int | None
    temperature_c: int | None
    power_limit_w: float | None
    throttle_reasons: int | None


@dataclass(frozen=True)
class Cpus:
    """The number of CPUs that this process may use, and their model ("" where the kernel does not name it)."""

    available: int
    model: str


def visible_gpus(visible: str | None = None) -> list[Gpu]:
    """The GPUs in CUDA_VISIBLE_DEVICES (or in `visible`), in that order; all GPUs of the node where it is not set."""
    if visible is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    entries = [] if visible is None else list(filter(None, (part.strip() for part in visible.split(","))))
    with open_nvml() as nvml:
        gpus = [] if nvml is None else [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
        slices = {entry: _slice(nvml, entry, gpus) for entry in entries if gpus and entry.startswith(MIG)}
    if visible is None:
        return gpus
    # CUDA stops reading the list at the first entry that names no GPU.
    chosen = []
    for entry in entries:
        match = [gpu for gpu in gpus if entry == str(gpu.index) or (len(entry) > 4 and gpu.uuid.startswith(entry))]
        match += filter(None, [slices.get(entry)])
        if len(match) != 1:
            break
        chosen.append(match[0])
    # CUDA shows no GPU at all if the list names one twice.
    return chosen if len({gpu.uuid for gpu in chosen}) == len(chosen) else []


def used_bytes(uuid: str) -> int | None:
    """Memory in use by all processes on the GPU with this UUID, in bytes; None where NVML does not answer."""
    uuid = uuid if uuid.startswith(("GPU-", MIG)) else f"GPU-{uuid}"
    with open_nvml() as nvml:
        if nvml is None:
            return None
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            return _used(nvml, handle)
        except nvml.NVMLError:
            return None


def check_gpus(job: JobSpec, gpus: list[Gpu]) -> None:
    """Raises Refusal where a GPU job has fewer GPUs than requested, or GPUs of another compute capability."""
    if job.device != "cuda":
        return
    _check_slices(job, gpus)
    if len(gpus) < job.gpus:
        raise Refusal(
            "fewer-gpus",
            f"too few GPUs in the job: {len(gpus)} of {job.gpus}"
            f" (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})",
            f"request them from Slurm ({_gpu_option(job) or f'--gres=gpu:{job.gpus}'}), or submit with fewer --gpus",
        )
    other = [gpu for gpu in gpus[: job.gpus] if job.capability and gpu.capability != job.capability]
    if other:
        raise Refusal(
            "other-capability",
            f"GPU {other[0].index} has compute capability {other[0].capability} ({other[0].name}),"
            f" partition {job.partition} has {job.capability}",
            f"set slurm_partition in [partitions.{job.partition}] to a Slurm partition with only {job.gpu or 'such'} nodes,"
            " or correct its capability",
        )


def _check_slices(job: JobSpec, gpus: Sequence[Gpu]) -> None:
    """Raises Refusal for MIG slices, except one slice whose type the user chose."""
    slices = [gpu for gpu in gpus if gpu.is_slice]
    if not slices:
        return
    if job.gpus > 1:
        raise Refusal(
            "mig-slices",
            f"{len(slices)} GPUs of the job are MIG slices ({slices[0].name}): CUDA shows a process one slice",
            "give --gpus 1, or request whole GPUs",
        )
    if job.backend == "vllm":
        raise Refusal("mig-slices", f"vLLM reads no UUID of a MIG slice ({slices[0].name})", "use --backend hf")
    if job.executor == "slurm" and not SLICE_TYPE.search(_gpu_option(job)):
        raise Refusal(
            "mig-slices",
            f"the GPU of the job is a MIG slice: {slices[0].name}",
            f"set gpu_type of [partitions.{job.partition}] to whole GPUs, or to the type of the slice to measure on it",
        )


def _gpu_option(job: JobSpec) -> str:
    return "" if job.script is None else job.script.gpu_option


def cpus() -> Cpus:
    model = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return Cpus(len(os.sched_getaffinity(0)), model or platform.processor())


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
        memory_bandwidth_bytes_s=_if_supported(nvml, lambda: _bandwidth(nvml, handle)),
    )


def _slice(nvml: Any, uuid: str, gpus: Sequence[Gpu]) -> Gpu | None:
    """The MIG slice with this UUID; None where NVML does not know it."""
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        index = int(nvml.nvmlDeviceGetIndex(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)))
        name, memory_bytes = nvml.nvmlDeviceGetName(handle), int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    except nvml.NVMLError:
        return None
    return replace(gpus[index], uuid=uuid, name=name, memory_bytes=memory_bytes, memory_bandwidth_bytes_s=None)


def _bandwidth(nvml: Any, handle: Any) -> float:
    clock_hz = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM) * 1e6
    return float(clock_hz * nvml.nvmlDeviceGetMemoryBusWidth(handle) * 2 / 8)


def _if_supported(nvml: Any, query: Callable[[], T]) -> T | None:
    """NVML's answer; None where this GPU or driver does not support the query."""
    try:
        return query()
    except (nvml.NVMLError, AttributeError, TypeError):
        return None


def _used(nvml: Any, handle: Any) -> int:
    """As nvidia-smi counts: without the driver's reserve (480 MiB on an H100), which version 1 of the query includes."""
    used = _if_supported(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2).used)
    return int(nvml.nvmlDeviceGetMemoryInfo(handle).used if used is None else used)


def energy_j(gpus: Sequence[Gpu]) -> float | None:
    """Energy of these GPUs together since their driver was loaded, in joules (NVML counts mJ).

    None without GPUs, where one of them has no counter (before Volta), and for a MIG slice: the counter is that of its GPU.
    """
    if not gpus or any(gpu.is_slice for gpu in gpus):
        return None
    with open_nvml() as nvml:
        if nvml is None:
            return None
        total = 0.0
        for gpu in gpus:
            handle = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
            millijoules = _if_supported(nvml, lambda handle=handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))  # type: ignore[misc]
            if millijoules is None:
                return None
            total += millijoules / 1000
    return total


def clocks(gpus: Sequence[Gpu]) -> list[Clocks]:
    """The present state of each GPU."""
    if not gpus:
        return []
    with open_nvml() as nvml:
        return [] if nvml is None else [_clocks(nvml, gpu) for gpu in gpus]


def _clocks(nvml: Any, gpu: Gpu) -> Clocks:
    handle = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
    return Clocks(
        index=gpu.index,
        sm_mhz=_if_supported(nvml, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        sm_max_mhz=_if_supported(nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
        memory_mhz=_if_supported(nvml, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        temperature_c=_if_supported(nvml, lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        power_limit_w=_if_supported(nvml, lambda: nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000),
        throttle_reasons=_if_supported(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
    )


def gpu_sample(nvml: Any, index: int, is_own: Callable[[int], bool]) -> tuple[Any, ...]:
    """The values of a `record.GpuTelemetry` now, without `index`; `is_own` says whether a process belongs to this job."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    used = _if_supported(nvml, lambda: _used(nvml, handle))
    return (
        _if_supported(nvml, lambda: round(nvml.nvmlDeviceGetPowerUsage(handle) / 1000, 1)),
        _if_supported(nvml, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        _if_supported(nvml, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        _if_supported(nvml, lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        _if_supported(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        None if used is None else round(used / 2**20) * 2**20,
        _if_supported(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        _if_supported(nvml, lambda: _other_processes(nvml, handle, is_own)),
    )


def _other_processes(nvml: Any, handle: Any, is_own: Callable[[int], bool]) -> int | None:
    """None where no process on the GPU is the job's: in a container, NVML may report the host's process ids."""
    pids = {process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    others = sum(not is_own(pid) for pid in pids)
    return None if others and others == len(pids) else others


@contextmanager
def open_nvml() -> Iterator[Any]:
    """NVML, initialised; None on a node without NVIDIA's driver."""
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
