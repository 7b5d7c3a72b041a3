"""Samples of a run's GPUs and processes. Processes and their CPU time are real; NVML is a fake with made-up samples, none
of which was recorded on a GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from labctl_workers import telemetry
from labctl_workers.hardware import Gpu
from labctl_workers.measure import METRICS
from labctl_workers.record import GpuTelemetry, Phase, Repeat, Telemetry
from labctl_workers.telemetry import TelemetrySampler, integral

MADE_GPU = Gpu(0, "GPU-0", "NVIDIA H100 80GB HBM3", "9.0", 80 * 2**30, "580.65.06")


class FakeNvmlError(Exception):
    """What the fake raises where NVML would raise NVMLError."""


@dataclass
class MadeNvml:
    """A fake NVML of one GPU; its values are made up."""

    lacks: tuple[str, ...] = ()
    pids: list[int] = field(default_factory=list)
    open: int = 0
    calls: list[str] = field(default_factory=list)

    def module(self) -> ModuleType:
        module = ModuleType("pynvml")
        answers: dict[str, Any] = {
            "nvmlDeviceGetPowerUsage": 512_340,
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=97),
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x20,
        }
        constants = {
            "NVML_CLOCK_MEM": "memory",
            "NVML_CLOCK_SM": "sm",
            "NVML_TEMPERATURE_GPU": "gpu",
            "nvmlMemory_v2": 2,
        }
        vars(module).update(constants, NVMLError=FakeNvmlError, nvmlInit=self.init, nvmlShutdown=self.shutdown)
        vars(module).update({name: self.answer(name, value) for name, value in answers.items()})
        module.nvmlDeviceGetHandleByIndex = lambda index: index  # type: ignore[attr-defined]
        module.nvmlDeviceGetClockInfo = lambda handle, clock: {"sm": 1755, "memory": 2619}[clock]  # type: ignore[attr-defined]
        module.nvmlDeviceGetMemoryInfo = lambda handle, version=1: SimpleNamespace(used=3 * 2**30 + 17)  # type: ignore[attr-defined]
        module.nvmlDeviceGetComputeRunningProcesses = lambda handle: [SimpleNamespace(pid=p) for p in self.pids]  # type: ignore[attr-defined]
        return module

    def answer(self, name: str, value: Any) -> Any:
        def call(*_: Any) -> Any:
            if name in self.lacks:
                raise FakeNvmlError("Not Supported")
            return value

        return call

    def init(self) -> None:
        self.open += 1
        self.calls.append("open")

    def shutdown(self) -> None:
        self.open -= 1
        self.calls.append("close")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> MadeNvml:
    made = MadeNvml(pids=[os.getpid()])
    monkeypatch.setitem(sys.modules, "pynvml", made.module())
    return made


@pytest.fixture
def burning() -> Iterator[subprocess.Popen[bytes]]:
    """A child process that uses a CPU."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        yield child
        child.kill()


# ---------------------------------------------------------------- processes


def test_cpu_time_and_memory_are_those_of_the_worker_and_its_children(burning: subprocess.Popen[bytes]) -> None:
    sampler = TelemetrySampler(())
    itself = psutil.Process()
    processes = [itself, *itself.children(recursive=True)]  # earlier tests may have left some
    assert burning.pid in [each.pid for each in processes]

    def used_s() -> float:
        return sum(sum(each.cpu_times()[:2]) for each in processes)

    sampler.sample()
    before, started = used_s(), time.perf_counter()
    time.sleep(1.0)
    sampler.sample()
    expected = (used_s() - before) / (time.perf_counter() - started)
    memory = sum(each.memory_info().rss for each in processes)
    taken = sampler.take()
    assert taken.cpus_used[0] is None
    assert taken.cpus_used[1] == pytest.approx(expected, abs=0.06)  # clock ticks of 10 ms
    assert taken.rss_bytes[1] == pytest.approx(memory, rel=0.05)
    assert all(rss % 2**20 == 0 for rss in taken.rss_bytes)


def test_a_process_that_starts_later_is_seen_and_one_that_ends_is_no_error(
    monkeypatch: pytest.MonkeyPatch, burning: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setattr(telemetry, "TREE_EVERY_S", 0.0)
    sampler = TelemetrySampler(())
    sampler.sample()
    burning.kill()
    burning.wait()
    sampler.sample()
    assert (sampler.take().cpus_used[1] or 0.0) >= 0.0


def test_the_thread_samples_at_its_rate_until_it_is_stopped() -> None:
    sampler = TelemetrySampler((), every_s=0.05)
    sampler.start()
    sampler.enter("loading")
    time.sleep(0.6)
    sampler.enter("warm-up")
    sampler.stop()
    taken = sampler.take()
    assert 4 <= len(taken.times_s) <= 13
    assert taken.times_s == sorted(taken.times_s)
    assert [phase.name for phase in taken.phases] == ["loading", "warm-up"]
    assert 0.5 < taken.phases[1].start_s - taken.phases[0].start_s < 2.0
    sampler.sample()
    assert sampler.take().times_s == []


def test_a_long_run_keeps_a_bounded_number_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "MOST_SAMPLES", 8)
    sampler = TelemetrySampler(())
    for _ in range(64):
        sampler.sample()
    times = sampler.take().times_s
    assert 4 <= len(times) <= 9
    assert times == sorted(times)


# ---------------------------------------------------------------- GPUs: made-up samples


def test_the_values_of_a_gpu_are_columns_in_their_units(nvml: MadeNvml) -> None:
    sampler = TelemetrySampler([MADE_GPU])
    sampler.sample()
    sampler.sample()
    (gpu,) = sampler.take().gpus
    sampler.stop()
    assert gpu == GpuTelemetry(
        0, [512.3] * 2, [1755] * 2, [2619] * 2, [61] * 2, [97] * 2, [3 * 2**30] * 2, [0x20] * 2, [0] * 2
    )
    assert nvml.open == 0


def test_a_value_that_the_driver_does_not_report_has_no_column(nvml: MadeNvml) -> None:
    nvml.lacks = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetCurrentClocksThrottleReasons")
    sampler = TelemetrySampler([MADE_GPU])
    sampler.sample()
    (gpu,) = sampler.take().gpus
    assert (gpu.power_w, gpu.throttle_reasons, gpu.sm_mhz) == ([], [], [1755])
    assert sampler.energy_j(0.0, 1.0) is None


def test_processes_on_the_gpu_that_are_not_the_jobs_are_counted(
    nvml: MadeNvml, burning: subprocess.Popen[bytes]
) -> None:
    def seen(*pids: int) -> int | None:
        nvml.pids = list(pids)
        sampler = TelemetrySampler([MADE_GPU])
        sampler.sample()
        return sampler.take().gpus[0].other_processes[0]

    own, child, init = os.getpid(), burning.pid, 1
    assert seen(own, child) == 0
    assert seen(own, child, init) == 1


def test_without_a_process_of_the_job_the_count_is_unknown(nvml: MadeNvml) -> None:
    nvml.pids = [1]  # as in a container where NVML reports the host's ids
    sampler = TelemetrySampler([MADE_GPU])
    sampler.sample()
    assert sampler.take().gpus[0].other_processes == []


def test_nvml_is_closed_before_a_fork_and_opened_again_after_it(nvml: MadeNvml) -> None:
    sampler = TelemetrySampler([MADE_GPU], every_s=0.01)
    sampler.start()
    sampler.sample()
    for _ in range(20):
        child = os.fork()
        if child == 0:  # its NVML is closed, and no lock is held by a thread that it does not have
            os._exit(nvml.open)
        assert os.waitpid(child, 0)[1] == 0
        sampler.sample()
    assert nvml.open == 1
    sampler.stop()
    assert nvml.open == 0
    assert nvml.calls.count("open") >= 20


# ---------------------------------------------------------------- energy


def test_the_integral_of_a_line_is_exact_and_its_ends_are_interpolated() -> None:
    times = [0.0, 1.0, 2.0, 4.0]
    assert integral(times, [2 * t for t in times], 0.5, 3.0) == pytest.approx(3.0**2 - 0.5**2)
    assert integral(times, [5.0] * 4, -1.0, 6.0) == pytest.approx(35.0)
    assert integral([], [], 0.0, 1.0) is None


def test_energy_from_made_power_samples_agrees_with_a_made_counter_within_2_percent() -> None:
    """A made-up load: 120 W idle, prefill at 620 W, decode around 410 W with a ripple of 30 W. The counter integrates it at
    1 kHz, the samples come at the sampler's pace and are off by up to 20 ms."""

    def power_w(at: float) -> float:
        if not 1.0 <= at < 13.0:
            return 120.0
        return 620.0 if at < 2.5 else 410.0 + 30.0 * math.sin(2 * math.pi * at / 1.7)

    counter_j = sum(power_w(1.0 + step / 1000) / 1000 for step in range(12_000))
    times = [step * telemetry.EVERY_S + 0.02 * math.sin(step) for step in range(round(15 / telemetry.EVERY_S))]
    sampled_j = integral(times, [round(power_w(at), 1) for at in times], 1.0, 13.0)
    assert sampled_j == pytest.approx(counter_j, rel=0.02)


def test_the_metric_takes_the_counter_and_without_it_the_samples() -> None:
    def energy_j(**values: Any) -> float | None:
        return METRICS["energy_j"].compute(Repeat(0, 1.0, [], **values))

    assert energy_j(energy_j=10.0, sampled_energy_j=10.1) == 10.0
    assert energy_j(sampled_energy_j=10.1) == 10.1
    assert energy_j() is None


def test_a_sampler_integrates_the_power_of_all_gpus(nvml: MadeNvml) -> None:
    sampler = TelemetrySampler([MADE_GPU, MADE_GPU])
    sampler.sample()
    started = time.perf_counter()
    assert sampler.energy_j(started, started + 2.0) == pytest.approx(2 * 2.0 * 512.3)


def test_telemetry_survives_json() -> None:
    made = Telemetry([0.0, 0.25], [Phase("loading", 0.0)], [None, 1.5], [2**20, 2**20], [GpuTelemetry(0, [1.0, None])])
    assert Telemetry.from_json(made.to_json()) == made
