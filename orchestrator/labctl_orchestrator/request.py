"""What was asked for: settings that do not multiply, and axes whose values do."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from labctl_slurm.errors import WrongUseError, nearest
from labctl_workers.engines import ENGINES
from labctl_workers.record import DTYPES

DEFAULT_MODEL = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
DEFAULT_PROMPT = "Explain tensor parallelism in 5 bullet points."
DEFAULT_MAX_NEW_TOKENS = 128
DEFAULT_REPEATS = 3
DEFAULT_WARMUP = 1
DTYPE_CHOICES = ("auto", *DTYPES)


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One question asked. `gpus` None is the partition's number; counts are whole numbers from 1."""

    partitions: tuple[str, ...]
    backends: tuple[str, ...] = ("hf",)
    models: tuple[str, ...] = (DEFAULT_MODEL,)
    dtypes: tuple[str, ...] = ("auto",)
    max_new_tokens: tuple[int, ...] = (DEFAULT_MAX_NEW_TOKENS,)
    prompts: tuple[str, ...] = (DEFAULT_PROMPT,)
    repeats: int = DEFAULT_REPEATS
    warmup: int = DEFAULT_WARMUP
    gpus: int | None = None
    name: str | None = None


def check(request: Request) -> None:
    """Raises WrongUseError for a value that no plan can be made of."""
    for backend in request.backends:
        _one_of("backend", backend, tuple(ENGINES))
    for dtype in request.dtypes:
        _one_of("dtype", dtype, DTYPE_CHOICES)
    for tokens in request.max_new_tokens:
        _at_least("max-new-tokens", tokens, 1)
    _at_least("repeats", request.repeats, 1)
    _at_least("warmup", request.warmup, 0)
    if request.gpus is not None:
        _at_least("gpus", request.gpus, 1)
    if not all(prompt.strip() for prompt in request.prompts):
        raise WrongUseError("the prompt is empty", "give --prompt a text")
    if request.name is not None and (not request.name.strip() or "\n" in request.name):
        raise WrongUseError("the name is empty or longer than a line", "give --name a short text")


def _one_of(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise WrongUseError(f"no {what} is called {value!r}", nearest(value, known))


def _at_least(what: str, value: int, least: int) -> None:
    if value < least:
        raise WrongUseError(f"--{what} {value} makes no sense", f"give a whole number from {least}")
