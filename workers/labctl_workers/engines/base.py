"""The interface of an engine: load the model, generate with the time of every token, report memory.

An engine returns raw values (token ids, clock readings, bytes); `labctl_workers.measure` computes the metrics.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from labctl_workers import stdout
from labctl_workers.engines.before_import import install_hint
from labctl_workers.record import (
    ClientReport,
    DeviceMemory,
    EngineCounts,
    EngineFingerprint,
    JobSpec,
    Prompt,
    Refusal,
    Sampling,
    Scalar,
)


class Json(str):
    """The type of an engine option whose value is a JSON object, written as text."""

    __slots__ = ()


@dataclass(frozen=True)
class Request:
    """One inference request: the index of its prompt in the run's prompt set, its token ids, and the length of its answer at
    most, in tokens."""

    prompt: int
    token_ids: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Arrivals:
    """The arrivals of a repeat's requests; at most `in_flight` are in the engine at once.

    `times_s[i]` is the time at which request i arrives, in seconds after the start, ascending. None: all wait at the start,
    and the engine gets the next one whenever one finishes.
    """

    in_flight: int
    times_s: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Generation:
    """How requests are answered. `ignore_eos`: an end token ends no answer. `on_token` gets each new token of the first request;
    it is not used while measuring."""

    arrivals: Arrivals
    sampling: Sampling = field(default_factory=Sampling)
    ignore_eos: bool = False
    on_token: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Generated:
    """The answer to one request. Times are readings of `time.perf_counter`, or seconds.

    `token_times`: one reading for each token id, taken when the host has the token. `prompt_tokens`: the engine's own count of
    the prompt's tokens. `handed_at`: when the engine gets the
    request, or when the request arrives, if it has an arrival time. `finish_reason`: "stop" or "length". `queued_s`: from
    `handed_at` until work on the request begins: the wait for a free place and in the engine's queue. `engine_ttft_s` and
    `engine_tpot_s`: the engine's own times to the first token and for each further token, if it reports them. `error` is why a
    served request failed; "" if it did not. A served answer may have times without token ids: these are unknown, and `text` is
    the server's.
    """

    token_ids: list[int]
    token_times: list[float]
    finish_reason: str
    prompt_tokens: int
    handed_at: float = 0.0
    queued_s: float | None = None
    engine_ttft_s: float | None = None
    engine_tpot_s: float | None = None
    error: str = ""
    text: str | None = None


Answers = Callable[[], list[Generated]]


@dataclass(frozen=True)
class ServedAnswers:
    """The answers of a server, with the window that the load generator measured: its start (a reading of `time.perf_counter`),
    its length, and the energy of the GPUs in it."""

    answers: list[Generated]
    started_at: float
    wall_s: float
    energy_j: float | None
    client: ClientReport

    def __call__(self) -> list[Generated]:
        return self.answers


class Tokenizer(Protocol):
    """What a workload needs of a tokenizer.

    `ordinary` are the token ids of random prompts: neither special nor added ones. `begin` are those before every text, such as a
    BOS. `longest` is the model's longest sequence in tokens (None: unknown).
    """

    ordinary: Sequence[int]
    begin: Sequence[int]
    longest: int | None

    def count(self, text: str) -> int:
        """The tokens of a text, without special ones."""

    def token_ids(self, text: str) -> list[int]:
        """The token ids of a text, without a chat template, with the special ones that the tokenizer adds."""


class Engine(Protocol):
    """A loaded model on the job's devices.

    OPTIONS are the engine options, with the types of their values. PARALLEL are the ways to share the model between GPUs (words
    of engines.parallel), the default first. DEFAULTS are the default values of options, as far as the engine declares them:
    setting an option to its default gives the same run. CHOICES are the permitted values of an option; else any of its type.
    `cache` is a folder for compiled code, shared by the jobs of the partition; it may not exist yet. `text` exists after `load`.
    """

    OPTIONS: ClassVar[dict[str, type]]
    PARALLEL: ClassVar[tuple[str, ...]]
    DEFAULTS: ClassVar[dict[str, Scalar]] = {}
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {}
    text: Tokenizer

    def __init__(self, job: JobSpec, cache: Path) -> None: ...

    @classmethod
    def foreseen(cls, job: JobSpec, config: Any, packages: Mapping[str, str] | None) -> Iterator[Refusal]:
        """The refusals that are predictable on the login node, by the same checks as in `load`: from the job, the model's
        configuration (its text part) and the package versions in the partition's Python, by distribution; None for unknown
        ones."""

    def load(self) -> tuple[float | None, float]:
        """Load the model; returns (load_s, init_s), load_s None where the engine does not report it apart. Raises Refusal where
        the job cannot run here as specified."""

    def encode(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """The token ids of each prompt, with the chat template unless the tokenizer has none or the job disables it. Raises
        Refusal for messages without a chat template."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""

    def generate(self, requests: Sequence[Request], how: Generation) -> Answers:
        """Generate the answers of all requests; returns when every device is idle again.

        The returned function gives the answers, in order: assembling them is not part of the measured window. Call it once,
        before the next `generate`.
        """

    def log_probabilities(self, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float] | None:
        """The log-probability (natural, at temperature 1) of each of `token_ids` given the prompt's tokens and those before it;
        None if unknown. Called outside the measured window."""

    def reset(self) -> None:
        """Called before each repeat: reset the peaks that `memory` reports, and empty caches that an earlier repeat filled."""

    def memory(self) -> list[DeviceMemory]:
        """Memory of each device of the model."""

    def counts(self) -> EngineCounts:
        """Of the last `generate`; called after its answers."""

    def read_bytes_per_step(self, context_tokens: float, requests: int) -> float | None:
        """Bytes that one decode step must read from memory, over all devices: the weights, once for each micro-batch, and the
        keys and values of `requests` sequences of `context_tokens` each. None if unknown."""

    def gpus_at_once(self, requests: int) -> int:
        """The number of GPUs that read memory at the same time while so many requests are in flight."""

    def fingerprint(self) -> EngineFingerprint:
        """Versions and effective settings; called after a run."""

    def close(self) -> None:
        """Release the devices."""


def refusals_of(check: Callable[[], object]) -> list[Refusal]:
    """The refusal that a check raises, if any."""
    try:
        check()
    except Refusal as refusal:
        return [refusal]
    return []


def import_packages(job: JobSpec, *names: str) -> list[Any]:
    """The modules of these packages. Raises Refusal where one cannot be imported."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise Refusal(
            "engine-missing", f"{sys.executable} cannot import {error.name or names[-1]}: {error}", install_hint(job)
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def announce_gpus(job: JobSpec) -> None:
    """Print the GPUs of the model in the format of the handout's script."""
    ids = ", ".join(str(index) for index in range(job.gpus)) if job.device == "cuda" else "none (cpu)"
    stdout.print_line(f"Tensor/model parallel GPU ids: {ids}")


def in_static_batches(
    requests: Sequence[Request], arrivals: Arrivals, generate_batch: Callable[[Sequence[Request]], list[Generated]]
) -> list[Generated]:
    """Answer the requests batch by batch, for an engine that cannot add requests to a running batch.

    A batch takes all waiting requests, `arrivals.in_flight` at most. A request with an arrival time has that as `handed_at`, and
    `queued_s` until its batch begins.
    """
    started = time.perf_counter()
    answered: list[Generated] = []
    while len(answered) < len(requests):
        first = len(answered)
        if arrivals.times_s is None:
            answered += generate_batch(requests[first : first + arrivals.in_flight])
            continue
        time.sleep(max(0.0, started + arrivals.times_s[first] - time.perf_counter()))
        waited_s = time.perf_counter() - started
        waiting = sum(arrival <= waited_s for arrival in arrivals.times_s[first : first + arrivals.in_flight])
        batch = generate_batch(requests[first : first + max(1, waiting)])
        arrived = [started + at for at in arrivals.times_s[first : first + len(batch)]]
        answered += [
            replace(answer, handed_at=at, queued_s=max(0.0, answer.handed_at - at))
            for answer, at in zip(batch, arrived, strict=True)
        ]
    return answered
