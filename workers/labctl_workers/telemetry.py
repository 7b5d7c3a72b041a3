"""The state of the job's GPUs and processes, sampled while the engine loads, warms up and measures.

A thread reads a few counters of NVML and of /proc every `EVERY_S` seconds. On an H200 a sample takes 1.5 ms, so the thread can
delay the worker by 0.4% at most (tests/benchmarks/telemetry_cost.py measures both).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from labctl_workers import children, hardware
from labctl_workers.record import GpuTelemetry, Phase, Telemetry

EVERY_S = 0.4
# With more samples, every second one is dropped: 2 hours at full rate.
MOST_SAMPLES = 20_000
# New processes of the engine appear in the samples after this time.
TREE_EVERY_S = 5.0
MIB = 2**20
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Columns of `GpuTelemetry`: one value a sample.
OF_A_GPU = tuple(field.name for field in fields(GpuTelemetry) if field.name not in ("index", "extra"))


@dataclass(frozen=True)
class _Sample:
    """One reading. `at` is a reading of `time.perf_counter`; `gpus` has the values of OF_A_GPU for each GPU."""

    at: float
    cpus_used: float | None
    rss_bytes: int
    gpus: list[tuple[Any, ...]]


class TelemetrySampler:
    """Samples GPUs and the process tree of this process, in a thread, between `start` and `stop`."""

    def __init__(self, gpus: Sequence[hardware.Gpu], every_s: float = EVERY_S) -> None:
        # What NVML tells of a MIG slice is of the whole GPU, which other jobs use too.
        self._gpus = [gpu for gpu in gpus if not gpu.is_slice]
        self._every_s = every_s
        self._stopped = threading.Event()
        # Held during a sample and a fork: a child must not inherit NVML's own locks while they are held.
        self._lock = threading.RLock()
        self._nvml = contextlib.ExitStack()
        self._open: Any = None
        self._processes = _Processes()
        self._reset()

    def _reset(self) -> None:
        self.origin = time.perf_counter()
        self._samples: list[_Sample] = []
        self._phases: list[tuple[str, float]] = []
        self._keep_one_in, self._read = 1, 0

    # ------------------------------------------------------------ the thread

    def start(self) -> None:
        # `os.fork` cannot forget a hook, so each one ends with its sampler.
        os.register_at_fork(
            before=self._before_fork, after_in_parent=self._after_fork, after_in_child=self._stopped.set
        )
        threading.Thread(target=self._run, name="telemetry", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
        with self._lock:
            self._close()

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the main thread handles them
        while not self._stopped.wait(self._every_s):
            try:
                self.sample()
            except Exception as error:  # a measurement does not depend on it
                print(f"telemetry ends: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                return

    def _before_fork(self) -> None:
        if not self._stopped.is_set():
            self._lock.acquire()
            self._close()

    def _after_fork(self) -> None:
        with contextlib.suppress(RuntimeError):  # stopped before the fork
            self._lock.release()

    def _close(self) -> None:
        self._open = None
        self._nvml.close()

    # ------------------------------------------------------------ samples

    def sample(self) -> None:
        """Take a sample now."""
        with self._lock:
            if self._stopped.is_set():
                return
            cpus_used, rss_bytes = self._processes.read()
            sample = _Sample(time.perf_counter(), cpus_used, rss_bytes, self._of_gpus())
            self._read += 1
            if self._read % self._keep_one_in:
                return
            self._samples.append(sample)
            if len(self._samples) > MOST_SAMPLES:
                self._samples = self._samples[::2]
                self._keep_one_in *= 2

    def _of_gpus(self) -> list[tuple[Any, ...]]:
        if self._gpus and self._open is None:
            self._open = self._nvml.enter_context(hardware.open_nvml())
        if self._open is None:
            return []
        return [hardware.gpu_sample(self._open, gpu.index, self._processes.is_own) for gpu in self._gpus]

    def enter(self, phase: str) -> None:
        """Note that a phase of the run begins now."""
        with self._lock:
            self._phases.append((phase, time.perf_counter()))

    def energy_j(self, start: float, end: float) -> float | None:
        """Energy of all GPUs between two readings of `time.perf_counter`, from power samples; None without power."""
        with self._lock:
            samples = list(self._samples)
        power = OF_A_GPU.index("power_w")
        total = 0.0
        for place in range(len(self._gpus)):
            known = [(s.at, s.gpus[place][power]) for s in samples if s.gpus and s.gpus[place][power] is not None]
            of_gpu = integral([at for at, _ in known], [watts for _, watts in known], start, end)
            if of_gpu is None:
                return None
            total += of_gpu
        return total if self._gpus else None

    def take(self) -> Telemetry:
        """All samples and phases since the last `take`; a new list begins."""
        with self._lock:
            samples, phases, origin = self._samples, self._phases, self.origin
            self._reset()
        taken = Telemetry(
            times_s=[round(sample.at - origin, 3) for sample in samples],
            phases=[Phase(name, round(at - origin, 3)) for name, at in phases],
            cpus_used=[sample.cpus_used for sample in samples],
            rss_bytes=[sample.rss_bytes for sample in samples],
        )
        for place, gpu in enumerate(self._gpus):
            rows = [sample.gpus[place] if sample.gpus else (None,) * len(OF_A_GPU) for sample in samples]
            columns = zip(OF_A_GPU, zip(*rows, strict=True), strict=False)
            known: dict[str, Any] = {
                name: list(values) for name, values in columns if any(value is not None for value in values)
            }
            taken.gpus.append(GpuTelemetry(gpu.index, **known))
        return taken


def integral(times_s: Sequence[float], values: Sequence[float], start: float, end: float) -> float | None:
    """The integral of a sampled quantity from `start` to `end`, by the trapezoidal rule; linear between two samples, constant
    before the first and after the last. None without samples. `times_s` ascend."""
    if not times_s:
        return None

    def at(time_s: float) -> float:
        later = next((place for place, known in enumerate(times_s) if known >= time_s), None)
        if later is None:
            return values[-1]
        if later == 0:
            return values[0]
        share = (time_s - times_s[later - 1]) / ((times_s[later] - times_s[later - 1]) or 1.0)
        return values[later - 1] + share * (values[later] - values[later - 1])

    inside = [(time_s, value) for time_s, value in zip(times_s, values, strict=True) if start < time_s < end]
    points = [(start, at(start)), *inside, (end, at(end))]
    return sum((b - a) * (low + high) / 2 for (a, low), (b, high) in itertools.pairwise(points))


class _Processes:
    """This process and its descendants: their CPU time and memory."""

    def __init__(self) -> None:
        self._pids: tuple[int, ...] = (os.getpid(),)
        self._looked_at = -TREE_EVERY_S
        self._before: dict[int, int] = {}  # CPU ticks by process
        self._before_at = 0.0

    def read(self) -> tuple[float | None, int]:
        """(CPU seconds a second since the last call, None in the first one; resident bytes, shared pages once a process)."""
        now = time.perf_counter()
        if now - self._looked_at > TREE_EVERY_S:
            self._look(now)
        ticks: dict[int, int] = {}
        pages = 0
        for pid in self._pids:
            with contextlib.suppress(OSError, ValueError, IndexError):
                of_process = _stat(pid)
                ticks[pid] = int(of_process[11]) + int(of_process[12])
                pages += int(of_process[21])
        since_s = now - self._before_at
        used = sum(now_ticks - self._before.get(pid, now_ticks) for pid, now_ticks in ticks.items()) / TICKS_PER_S
        share = round(used / since_s, 2) if self._before and since_s > 0 else None
        self._before, self._before_at = ticks, now
        return share, round(pages * PAGE_BYTES / MIB) * MIB

    def is_own(self, pid: int) -> bool:
        """Whether this process id is in the tree."""
        if pid not in self._pids:
            self._look(time.perf_counter())
        return pid in self._pids

    def _look(self, now: float) -> None:
        self._looked_at = now
        self._pids = (os.getpid(), *_descendants(os.getpid()))


def _descendants(pid: int) -> Iterator[int]:
    """The kernel lists the children of each thread, which is faster than a search of all processes."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208  Path objects cost more than the reading
    except OSError:
        return
    for thread in threads:
        try:
            below = Path(f"/proc/{pid}/task/{thread}/children").read_text()
        except FileNotFoundError:
            if pid == os.getpid() and thread == str(pid):  # a kernel without this list
                yield from children.descendants()
            continue
        except OSError:
            continue
        for child in map(int, below.split()):
            yield child
            yield from _descendants(child)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, from the state on."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        return file.read().rpartition(")")[2].split()
