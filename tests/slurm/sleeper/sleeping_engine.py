"""An engine that sleeps SLEEPER_LOAD_S seconds to load and SLEEPER_RUN_S a pass, and whose token i is i. No measurement: a tenth
of the load is said to be its start.

With SLEEPER_CHILD it has a process as vLLM has, which a signal to all processes of the job ends.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from labctl_workers.engines.base import Generated, Generation, Request
from labctl_workers.record import DeviceMemory, EngineCounts, EngineFingerprint, JobSpec


class SleepingEngine:
    OPTIONS: ClassVar[dict[str, type]] = {}
    PARALLEL: ClassVar[tuple[str, ...]] = ("layers",)
    DEFAULTS: ClassVar[dict[str, object]] = {}
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(self, job: JobSpec, cache: Path) -> None:
        self.load_s = float(os.environ.get("SLEEPER_LOAD_S", "0"))
        self.run_s = float(os.environ.get("SLEEPER_RUN_S", "0"))

    def load(self) -> tuple[float, float]:
        time.sleep(self.load_s)
        self.child = subprocess.Popen(["sleep", "600"]) if "SLEEPER_CHILD" in os.environ else None
        return self.load_s * 0.9, self.load_s * 0.1

    def encode(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        return [tuple(range(len(prompt.split()))) for prompt in prompts]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "asleep"

    def generate(self, requests: Sequence[Request], how: Generation) -> Callable[[], list[Generated]]:
        handed_at = time.perf_counter()
        time.sleep(self.run_s)
        if self.child is not None and self.child.poll() is not None:
            raise RuntimeError(f"the engine's process ended: {self.child.returncode}")
        times = [handed_at + self.run_s / 2, handed_at + self.run_s]
        return lambda: [Generated([0, 1], times, "length", len(r.token_ids), handed_at) for r in requests]

    def log_probabilities(self, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float] | None:
        return None

    def read_bytes_per_step(self, context_tokens: float, requests: int) -> float | None:
        return None

    def gpus_at_once(self, requests: int) -> int:
        return 1

    def reset(self) -> None:
        pass

    def counts(self) -> EngineCounts:
        return EngineCounts()

    def memory(self) -> list[DeviceMemory]:
        return []

    def fingerprint(self) -> EngineFingerprint:
        return EngineFingerprint({"sleeper": "1"})

    def close(self) -> None:
        pass
