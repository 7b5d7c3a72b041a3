"""What labctl asks of an engine: load the model once, generate with the time of every token, tell its memory.

An engine gives facts (token ids, clock readings, bytes); `labctl_workers.measure` makes the metrics.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from labctl_workers import stdout
from labctl_workers.record import DeviceMemory, JobSpec, Refusal, Sampling


class Json(str):
    """The type of an engine option whose value is a JSON object, written as text."""

    __slots__ = ()


@dataclass(frozen=True)
class Request:
    """One prompt on its way to the engine: its token ids, and where it stands in the run's prompt set."""

    prompt: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Load:
    """How the requests of a pass come: at most `in_flight` at once in the engine.

    `arrivals_s[i]` is when request i comes, in seconds after the start, in ascending order; None: all wait at the start,
    and the next one is handed over when one has its answer.
    """

    in_flight: int
    arrivals_s: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Generated:
    """What the engine made of one request.

    `token_times` are `time.perf_counter` readings, seconds, one for each token id, taken when the token was known to
    the host; `handed_at` is the reading when the request was handed to the engine, or came, where it has an arrival.
    `finish_reason` is "stop" or "length". `queued_s` is how long the request waited after `handed_at` before work on it began,
    for a free place and in the engine's own queue, in seconds. `engine_ttft_s` and `engine_tpot_s` are the engine's own figures
    for the time to the first token and for each token after it, where it gives some.
    """

    token_ids: list[int]
    token_times: list[float]
    finish_reason: str
    handed_at: float = 0.0
    queued_s: float | None = None
    engine_ttft_s: float | None = None
    engine_tpot_s: float | None = None


Answers = Callable[[], list[Generated]]


class Engine(Protocol):
    """A loaded model on the job's devices.

    OPTIONS are the engine options that a request may set, with the type of their values; PARALLEL is how the model is
    spread over the GPUs: "layers" one after another, or "tensor" at once. An engine may have DEFAULTS, the values of options
    that are left out: an option that is set to its default is the same run. `cache` is a folder of the workspace and the
    partition that outlives the job, for what is compiled; it may not exist yet.
    """

    OPTIONS: ClassVar[dict[str, type]]
    PARALLEL: ClassVar[str]

    def __init__(self, job: JobSpec, cache: Path) -> None: ...

    @classmethod
    def foreseen(cls, job: JobSpec, config: Any, packages: Mapping[str, str] | None) -> Iterator[Refusal]:
        """What the engine would refuse on the node, as far as can be told before: from the job, from the model's configuration
        (its text part, with attributes) and from the versions of the packages in the partition's Python, by distribution; None
        for what is not known. The same checks as when it loads."""

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
        load: Load,
        max_new_tokens: int,
        sampling: Sampling,
        ignore_eos: bool,
        on_token: Callable[[int], None] | None = None,
    ) -> Answers:
        """Generate for all requests, as `load` says, and return when every device is idle again.

        What is returned gives the answers, in order, when it is called, once and before the next `generate`: to put them
        together is no part of the measured window. `on_token` is told each new token of the first request, for a person who
        watches; never while measuring.
        """

    def log_probabilities(self, request: Request, token_ids: Sequence[int]) -> list[float] | None:
        """The model's log-probability (natural, at temperature 1) of each token after those before it; None where the
        engine cannot tell. Called outside the measured window."""

    def reset_peak_memory(self) -> None:
        """Start a new window for the peaks that `memory` reports."""

    def memory(self) -> list[DeviceMemory]:
        """Memory of each device that the model lies on."""

    def read_bytes_per_step(self, context_tokens: float, requests: int) -> float | None:
        """Bytes that one decode step must read from memory, over all devices: every weight that takes part, once for each
        micro-batch, and the keys and values of `requests` sequences of `context_tokens` each. None where the engine cannot
        tell."""

    def micro_batches(self, requests: int) -> int:
        """Into how many parts a batch of so many requests is cut, each of which is in another stage of the layers at a time."""

    def fingerprint(self) -> dict[str, Any]:
        """Versions and effective settings: what else may explain a difference between two records."""

    def close(self) -> None:
        """Give back the devices."""


def refusals_of(check: Callable[[], None]) -> list[Refusal]:
    """The refusal that a check raises, if it does."""
    try:
        check()
    except Refusal as refusal:
        return [refusal]
    return []


def announce_gpus(job: JobSpec) -> None:
    """The line of the handout's script that says which GPUs the model is spread over."""
    ids = ", ".join(str(index) for index in range(job.gpus)) if job.device == "cuda" else "none (cpu)"
    stdout.print_line(f"Tensor/model parallel GPU ids: {ids}")


def in_static_batches(
    requests: Sequence[Request], load: Load, generate_batch: Callable[[Sequence[Request]], list[Generated]]
) -> list[Generated]:
    """Answer the requests a batch at a time, for an engine that can take up no new request before a batch is done.

    A batch is as many as wait, `load.in_flight` at most. A request that has to wait for the batch before it waits since
    its arrival: `handed_at` says since when, `queued_s` how long.
    """
    started = time.perf_counter()
    answered: list[Generated] = []
    while len(answered) < len(requests):
        first = len(answered)
        if load.arrivals_s is None:
            answered += generate_batch(requests[first : first + load.in_flight])
            continue
        time.sleep(max(0.0, started + load.arrivals_s[first] - time.perf_counter()))
        waited_s = time.perf_counter() - started
        there = sum(arrival <= waited_s for arrival in load.arrivals_s[first : first + load.in_flight])
        batch = generate_batch(requests[first : first + max(1, there)])
        came = [started + at for at in load.arrivals_s[first : first + len(batch)]]
        answered += [
            replace(answer, handed_at=at, queued_s=max(0.0, answer.handed_at - at))
            for answer, at in zip(batch, came, strict=True)
        ]
    return answered
