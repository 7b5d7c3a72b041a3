"""The state of a run's GPUs in its measured windows, and what makes its result invalid; from the record's telemetry. Pure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import msgspec

from labctl_workers.measure import queue_growth
from labctl_workers.record import GpuTelemetry, Repeat, RunResult, Telemetry, Until

# Bits of NVML's throttle reasons that show a fault or heat. Reaching the power limit is normal under load.
THROTTLE_REASONS = {0x8: "hardware slowdown", 0x20: "heat (software)", 0x40: "heat (hardware)", 0x80: "power brake"}
MASK = sum(THROTTLE_REASONS)
# A GPU that slows down by a third in a share of 5% makes the window 2.5% longer: more than two engine loads differ.
THROTTLED_SHARE = 0.05
# Kinds of invalid results: another load of such a run replaces them.
THROTTLED, SHARED = "throttled", "shared GPU"


class Window(msgspec.Struct, omit_defaults=True):
    """The state in the measured windows of one record; None where unknown.

    `throttled_share`: of the samples, of the GPU with the most; `throttle_reasons`: their names. `other_processes`: the most at
    a time. `sm_mhz`, `power_w` (sum of the GPUs) and `cpus_used` are means, `temperature_c` is the highest.
    `until`: the record's.
    `queue_growth`: the largest of the repeats of a run with a request rate and no server (`measure.queue_growth`).
    """

    throttled_share: float | None = None
    throttle_reasons: list[str] = []
    other_processes: int | None = None
    sm_mhz: float | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    cpus_used: float | None = None
    queue_growth: float | None = None
    until: Until | None = None

    @property
    def invalid(self) -> list[str]:
        """The kinds of reasons why the result is invalid."""
        found = [THROTTLED] if (self.throttled_share or 0.0) > THROTTLED_SHARE else []
        return [*found, SHARED] if self.other_processes else found


def window_of(result: RunResult) -> Window:
    """The state in the windows of all repeats of a record."""
    window = Window(until=result.until)
    if result.definition.get("request_rate"):
        growths = [queue_growth(repeat) for repeat in result.repeats if repeat.client is None]
        window.queue_growth = max((growth for growth in growths if growth is not None), default=None)
    telemetry = result.telemetry
    if telemetry is None:
        return window
    inside = _inside(telemetry, result.repeats)
    window.cpus_used = _mean(_chosen(telemetry.cpus_used, inside), 2)
    gpus = telemetry.gpus
    for gpu in gpus:
        of_gpu = [reasons & MASK for reasons in _chosen(gpu.throttle_reasons, inside)]
        if of_gpu:
            share = round(sum(map(bool, of_gpu)) / len(of_gpu), 4)
            window.throttled_share = max(share, window.throttled_share or 0.0)
            seen = [why for bit, why in THROTTLE_REASONS.items() if any(reasons & bit for reasons in of_gpu)]
            window.throttle_reasons = list(dict.fromkeys([*window.throttle_reasons, *seen]))
    window.other_processes = max(_of_all(gpus, "other_processes", inside), default=None)
    window.temperature_c = max(_of_all(gpus, "temperature_c", inside), default=None)
    window.sm_mhz = _mean(_of_all(gpus, "sm_mhz", inside), 1)
    powers = [mean for gpu in gpus if (mean := _mean(_chosen(gpu.power_w, inside), 1)) is not None]
    window.power_w = round(sum(powers), 1) if powers and len(powers) == len(gpus) else None
    return window


def _inside(telemetry: Telemetry, repeats: Sequence[Repeat]) -> list[bool]:
    """Whether each sample is in a measured window."""
    windows = [
        (repeat.started_s, repeat.started_s + repeat.wall_s) for repeat in repeats if repeat.started_s is not None
    ]
    return [any(start <= at <= end for start, end in windows) for at in telemetry.times_s]


def _chosen(values: Sequence[Any], inside: Sequence[bool]) -> list[Any]:
    return [value for value in itertools.compress(values, inside) if value is not None]


def _of_all(gpus: Sequence[GpuTelemetry], name: str, inside: Sequence[bool]) -> list[Any]:
    return [value for gpu in gpus for value in _chosen(getattr(gpu, name), inside)]


def _mean(values: Sequence[float], digits: int) -> float | None:
    return round(statistics.fmean(values), digits) if values else None
