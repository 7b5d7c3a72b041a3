"""What is asked for: axes whose values multiply, hand-picked cells, rules that leave cells out, and what all runs share.

The same keys are flags of `labctl submit`, keys of a request file, of [defaults] in labctl.toml, and LABCTL_* variables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from labctl_orchestrator.request import engine_options
from labctl_orchestrator.request.engine_options import Scalar
from labctl_orchestrator.request.sampling import GREEDY
from labctl_slurm.errors import WrongUseError, in_words, nearest
from labctl_workers.engines import ENGINES
from labctl_workers.record import DTYPES

DEFAULT_MODEL = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
DEFAULT_PROMPT = "Explain tensor parallelism in 5 bullet points."
DTYPE_CHOICES = ("auto", *DTYPES)
FLAGS = "flags"  # the source of what the command line gives

Layer = tuple[str, Mapping[str, Any]]
T = TypeVar("T", bound="Axes")


class Axes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Values that multiply, in this order. `gpus` empty is the partition's number; a `sampling` is "greedy" or
    "temperature=0.7,top_p=0.9,seed=1"; an engine option is for the backends that have it.

    As a [[cells]] table: what is empty is the request's first value. As an [[exclude]] table: any value.
    """

    partition: tuple[str, ...] = ()
    backend: tuple[str, ...] = ()
    model_id: tuple[str, ...] = ()
    revision: tuple[str, ...] = ()
    dtype: tuple[str, ...] = ()
    gpus: tuple[int, ...] = ()
    batch_size: tuple[int, ...] = ()
    sampling: tuple[str, ...] = ()
    max_new_tokens: tuple[int, ...] = ()
    engine_options: dict[str, tuple[Scalar, ...]] = {}

    def __str__(self) -> str:
        """As TOML, near enough to be found in the file."""
        given = {key: value for key in (*AXES, "engine_options") if (value := getattr(self, key))}
        return ", ".join(
            f"{key} = {value[0]!r}" if isinstance(value, tuple) and len(value) == 1 else f"{key} = {value}"
            for key, value in given.items()
        )


AXES = Axes.__struct_fields__[:-1]


class Request(Axes, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    """What one submission asks for. `prompts` is a file, which wins over the same source's `prompt`; `request_rate` is in
    requests a second; `runs_per_job` and `jobs_at_once` bound how runs are packed and how many jobs of an array run at the same
    time; each run is measured in `loads` engine loads."""

    backend: tuple[str, ...] = ("hf",)
    model_id: tuple[str, ...] = (DEFAULT_MODEL,)
    revision: tuple[str, ...] = ("main",)
    dtype: tuple[str, ...] = ("auto",)
    batch_size: tuple[int, ...] = (1,)
    sampling: tuple[str, ...] = (GREEDY,)
    max_new_tokens: tuple[int, ...] = (128,)
    prompt: str = DEFAULT_PROMPT
    prompts: str | None = None
    raw_prompt: bool = False
    ignore_eos: bool = False
    request_rate: float | None = None
    requests: int | None = None
    runs_per_job: int | None = None
    jobs_at_once: int | None = None
    loads: int = 1
    repeats: int = 3
    warmup: int = 1
    name: str | None = None
    note: str | None = None
    account: str | None = None
    time: str | None = None
    mem: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sbatch: dict[str, str | int | bool] = {}
    cells: tuple[Axes, ...] = ()
    exclude: tuple[Axes, ...] = ()

    @property
    def overrides(self) -> dict[str, Any]:
        """What the request changes in a partition's table."""
        sbatch = {**self.sbatch, "qos": self.qos, "constraint": self.constraint}
        table = {
            "account": self.account,
            "time": self.time,
            "max_time": self.time,  # who names a time means it, whatever a job may need
            "mem": self.mem,
            "sbatch": {key: value for key, value in sbatch.items() if value is not None} or None,
        }
        return {key: value for key, value in table.items() if value is not None}


KEYS = Request.__struct_fields__
# How Slurm is asked.
SLURM_KEYS = ("runs_per_job", "jobs_at_once", "account", "time", "mem", "qos", "constraint", "sbatch")
# What a labctl.toml may set for every request: not what makes one request this one.
DEFAULT_KEYS = tuple(key for key in KEYS if key not in ("name", "note", "cells", "exclude"))
LIMITS = {
    "max_new_tokens": (1, 10_000_000),
    "batch_size": (1, 1_000_000),
    "gpus": (1, 1024),
    "loads": (1, 1000),
    "repeats": (1, 100_000),
    "warmup": (0, 100_000),
    "requests": (1, 10_000_000),
    "runs_per_job": (1, 1_000_000),
    "jobs_at_once": (1, 1_000_000),
    "request_rate": (1e-6, 1e6),
}
_NOT_IN_A_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # line ends and other control characters


def build(layers: Iterable[Layer]) -> Request:
    """The request that these (source, values) layers make together, later ones winning key by key; one value for an axis
    is a list of one. Raises WrongUseError, naming the source, for a key or a value that cannot be right."""
    merged: dict[str, Any] = {}
    source_of: dict[str, str] = {}
    for source, values in layers:
        if source == FLAGS and "prompt" in values and "prompts" in values:
            raise WrongUseError("--prompt and --prompts are both given", "give one of them")
        if "prompt" in values:  # it beats the file of a weaker source
            merged.pop("prompts", None)
        for key, value in values.items():
            if key not in KEYS:
                raise WrongUseError(f"{_at(source)}there is no key {key!r}", nearest(key, KEYS))
            merged[key] = _tables(key, value) if key in ("cells", "exclude") else value
            source_of[key] = source
    request = _converted(merged, Request, lambda key: source_of.get(key, "request"))

    def at(key: str) -> str:
        return _at(source_of.get(key, FLAGS))

    _check(request, request.backend, at)
    for number, cell in enumerate(request.cells, 1):
        _check(cell, cell.backend or request.backend[:1], lambda _, n=number: f"[[cells]] number {n}: ")  # type: ignore[misc]
    if request.prompts is None and not request.prompt.strip():
        raise WrongUseError(f"{at('prompt')}the prompt is empty", "give --prompt a text")
    for key in ("name", "note"):
        text = getattr(request, key)
        if text is not None and (not text.strip() or _NOT_IN_A_NAME.search(text)):
            raise WrongUseError(f"not a {key}: {text!r}", f"give --{key} a short text on one line")
    return request


def _at(source: str) -> str:
    return "" if source == FLAGS else f"{source}: "


def _tables(key: str, value: Any) -> Any:
    """The tables of [[cells]] or [[exclude]], each read by itself: an error names its number."""
    if not (isinstance(value, list | tuple) and all(isinstance(table, dict) for table in value)):
        return value  # an error, which names the source
    known = (*AXES, "engine_options")
    for number, table in enumerate(value, 1):
        where = f"[[{key}]] number {number}"
        if unknown := next((name for name in table if name not in known), None):
            raise WrongUseError(f"{where} has no key {unknown!r}", nearest(unknown, known))
        if key == "exclude" and not table:
            raise WrongUseError(f"{where} is empty and would leave nothing", "name an axis and a value")
    return tuple(_converted(table, Axes, lambda _, n=n: f"[[{key}]] number {n}") for n, table in enumerate(value, 1))  # type: ignore[misc]


def _converted(values: Mapping[str, Any], into: type[T], source_of: Callable[[str], str]) -> T:
    listed = {key: as_list(key, value) for key, value in values.items()}
    for key in AXES:
        if listed.get(key) in ([], ()) and key != "gpus":
            raise WrongUseError(
                f"{source_of(key)}: {key} is an empty list, so there is nothing to run", "give it a value"
            )
    try:
        return msgspec.convert(listed, into)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$.")
        key = re.split(r"[.\[`]", path)[0]
        raise WrongUseError(f"{source_of(key)}: {key}: {in_words(reason)}", f"correct {key}") from None


def as_list(key: str, value: Any) -> Any:
    """One value of an axis as a list of one."""
    if key in AXES and not isinstance(value, list | tuple):
        return [value]
    if key == "engine_options" and isinstance(value, dict):
        return {name: as_list(AXES[0], choice) for name, choice in value.items()}
    return value


def _check(asked: Axes, backends: tuple[str, ...], at: Callable[[str], str]) -> None:
    """Raises WrongUseError, beginning with `at(key)`, for a value of the right type that makes no sense."""
    for key in asked.__struct_fields__:
        flag = f"{at(key)}--{key.replace('_', '-')}"
        value = getattr(asked, key)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, str):
                _check_text(one, key, at(key), flag)
            elif one is not None and key in LIMITS and not LIMITS[key][0] <= one <= LIMITS[key][1]:
                least, most = LIMITS[key]
                kind = "number" if isinstance(least, float) else "whole number"
                raise WrongUseError(f"{flag} {one} makes no sense", f"give a {kind} from {least} to {most}")
    engine_options.check(asked.engine_options, backends, at("engine_options"))


def _check_text(text: str, key: str, where: str, flag: str) -> None:
    if not is_utf8(text):
        raise WrongUseError(f"{flag} {text!a} is no UTF-8 text", "write it in UTF-8")
    if key in ("partition", "model_id", "revision") and not text.strip():
        raise WrongUseError(f"{flag} is empty", "give it a name, or leave it out")
    for choice, known in (("backend", tuple(ENGINES)), ("dtype", DTYPE_CHOICES)):
        if key == choice and text not in known:
            raise WrongUseError(f"{where}no {key} is called {text!r}", nearest(text, known))


def is_utf8(text: str) -> bool:
    """Bytes of the command line that are no UTF-8 reach Python as lone surrogates, which no file can hold."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
