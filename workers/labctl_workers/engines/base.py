"""What labctl asks of an engine: load the model once, generate with the time of every token, tell its memory.

An engine gives facts (token ids, clock readings, bytes); `labctl_workers.measure` makes the metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from labctl_workers.record import DeviceMemory, JobSpec, Sampling


@dataclass(frozen=True)
class Request:
    """One prompt on its way to the engine: its token ids, and where it stands in the run's prompt set."""

    prompt: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Generated:
    """What the engine made of one request.

    `token_times` are `time.perf_counter` readings, seconds, one for each token id, taken when the token was known to
    the host. `finish_reason` is "stop" or "length".
    """

    token_ids: list[int]
    token_times: list[float]
    finish_reason: str


class Engine(Protocol):
    """A loaded model on the job's devices. OPTIONS are the engine options that a request may set, with their types."""

    OPTIONS: ClassVar[dict[str, type]]

    def __init__(self, job: JobSpec) -> None: ...

    def load(self) -> tuple[float, float]:
        """Load the model; returns (load_s, init_s). Raises Refusal where the job cannot run here as asked."""

    def encode(self, prompts: Sequence[str]) -> list[Request]:
        """Token ids of each prompt, through the chat template where the tokenizer has one and the job wants it."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        ignore_eos: bool,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> list[Generated]:
        """Generate for all requests at once and return when every device is idle again.

        `on_tokens` is told each step's new token of every request, for a person who watches; never while measuring.
        """

    def log_probabilities(self, request: Request, token_ids: Sequence[int]) -> list[float] | None:
        """The model's log-probability (natural, at temperature 1) of each token after those before it; None where the
        engine cannot tell. Called outside the measured window."""

    def reset_peak_memory(self) -> None:
        """Start a new window for the peaks that `memory` reports."""

    def memory(self) -> list[DeviceMemory]:
        """Memory of each device that the model lies on."""

    def read_bytes_per_step(self, context_tokens: float, requests: int) -> float | None:
        """Bytes that one decode step must read from memory: every weight that takes part, and the keys and values of
        `requests` sequences of `context_tokens` each. None where the engine cannot tell."""

    def fingerprint(self) -> dict[str, Any]:
        """Versions and effective settings: what else may explain a difference between two records."""

    def close(self) -> None:
        """Give back the devices."""
