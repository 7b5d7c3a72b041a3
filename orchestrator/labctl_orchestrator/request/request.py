"""The keys of a submission: axes whose values multiply, [[cells]], [[exclude]] rules, and parameters of all runs.

The same keys are flags of `labctl submit`, keys of a submission file, of [defaults] in labctl.toml, and LABCTL_* variables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from labctl_orchestrator.request import engine_options, service_levels
from labctl_orchestrator.request.sampling import GREEDY
from labctl_slurm.errors import WrongUseError, in_words, nearest
from labctl_workers.engines import ENGINES, engine_class, parallel
from labctl_workers.record import DTYPES, REQUESTS_AT_MOST, Scalar

DEFAULT_MODEL = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
DEFAULT_PROMPT = "Explain tensor parallelism in 5 bullet points."
DTYPE_CHOICES = ("auto", *DTYPES)
# The text that labctl ships for --score.
FABLES = "fables"
FLAGS = "flags"  # the source of values of the command line

Layer = tuple[str, Mapping[str, Any]]  # a source and its keys
T = TypeVar("T", bound="Axes")


class Axes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Values that multiply, in this order. Empty `gpus`: the partition's number. A `parallel` is a word or sizes such as
    "tensor=4,pipeline=2", which need that many GPUs; empty: the backend's default. Empty `batch_size`: 1, or no limit for served
    runs at a request rate. Empty `request_rate`: the next request follows when one ends. `requests` of a repeat; empty: a
    default. `serve`: behind the engine's own server. A `sampling` is "greedy" or "temperature=0.7,top_p=0.9,seed=1". An engine
    option applies to the backends that have it. `lengths` are pairs of `input_len` and `output_len`, such as "1024/128" (see
    lengths.py); a `dataset` is a file.

    An empty key of a [[cells]] table is the submission's first value, of an [[exclude]] table any value.
    """

    partition: tuple[str, ...] = ()
    backend: tuple[str, ...] = ()
    model_id: tuple[str, ...] = ()
    revision: tuple[str, ...] = ()
    dtype: tuple[str, ...] = ()
    gpus: tuple[int, ...] = ()
    parallel: tuple[str, ...] = ()
    serve: tuple[bool, ...] = ()
    batch_size: tuple[int, ...] = ()
    request_rate: tuple[float, ...] = ()
    requests: tuple[int, ...] = ()
    sampling: tuple[str, ...] = ()
    max_new_tokens: tuple[int, ...] = ()
    lengths: tuple[str, ...] = ()
    input_len: tuple[int | str, ...] = ()
    output_len: tuple[int | str, ...] = ()
    prefix_len: tuple[int, ...] = ()
    dataset: tuple[str, ...] = ()
    engine_options: dict[str, tuple[Scalar, ...]] = {}

    def __str__(self) -> str:
        """In a form like TOML, to find it in the file."""
        values = {key: value for key in (*AXES, "engine_options") if (value := getattr(self, key))}
        return ", ".join(
            f"{key} = {value[0]!r}" if isinstance(value, tuple) and len(value) == 1 else f"{key} = {value}"
            for key, value in values.items()
        )


AXES = Axes.__struct_fields__[:-1]
# Axes without a value of their own: a run may have none.
WORKLOAD_AXES = ("lengths", "input_len", "output_len", "prefix_len", "dataset")
MAY_BE_EMPTY = ("gpus", "parallel", "batch_size", "request_rate", "requests", *WORKLOAD_AXES)


class SubmissionSpec(Axes, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    """One submission. `prompts` is a file, which overrides `prompt` of the same source. `request_rate` is in requests per second,
    `burstiness` the shape of the arrivals' gamma distribution. The service levels `slo` (see `service_levels`) do not change a
    run. `seed` is that of random prompts, drawn lengths and sampled entries of datasets. `runs_per_job` limits the runs of a job,
    `jobs_at_once` the running jobs of an array. Each run is measured in `loads` engine loads, with `repeats` measured and
    `warmup` unmeasured repeats in each. `score` is a file whose perplexity each run computes, or FABLES, in windows of
    `score_window` tokens that begin `score_stride` tokens apart. `until` ("1%") adds repeats until the 95% interval of the mean
    is that narrow, up to `max_repeats`. `quality` are tasks of lm-evaluation-harness for served runs (see `tasks`)."""

    backend: tuple[str, ...] = ("hf",)
    model_id: tuple[str, ...] = (DEFAULT_MODEL,)
    revision: tuple[str, ...] = ("main",)
    dtype: tuple[str, ...] = ("auto",)
    serve: tuple[bool, ...] = (False,)
    sampling: tuple[str, ...] = (GREEDY,)
    max_new_tokens: tuple[int, ...] = (128,)
    prompt: str = DEFAULT_PROMPT
    prompts: str | None = None
    raw_prompt: bool = False
    ignore_eos: bool = False
    burstiness: float = 1.0
    slo: tuple[str, ...] = ()
    score: str | None = None
    score_window: int = 1024
    score_stride: int = 512
    quality: tuple[str, ...] = ()
    seed: int | None = None
    runs_per_job: int | None = None
    jobs_at_once: int | None = None
    loads: int = 1
    repeats: int = 3
    until: str | None = None
    max_repeats: int = 100
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
    def overrides(self) -> Mapping[str, object]:
        """The keys of a partition's table that the submission overrides."""
        sbatch = {**self.sbatch, "qos": self.qos, "constraint": self.constraint}
        table = {
            "account": self.account,
            "time": self.time,
            "max_time": self.time,  # an explicit time limit is exact
            "mem": self.mem,
            "sbatch": {key: value for key, value in sbatch.items() if value is not None} or None,
        }
        return {key: value for key, value in table.items() if value is not None}


KEYS = SubmissionSpec.__struct_fields__
# Keys for Slurm, which do not change a run.
SLURM_KEYS = ("runs_per_job", "jobs_at_once", "account", "time", "mem", "qos", "constraint", "sbatch")
# Keys of [defaults].
DEFAULT_KEYS = tuple(key for key in KEYS if key not in ("name", "note", "cells", "exclude"))
LIMITS = {
    "max_new_tokens": (1, 10_000_000),
    "batch_size": (1, 1_000_000),
    "gpus": (1, 1024),
    "loads": (1, 1000),
    "repeats": (1, 100_000),
    "max_repeats": (2, 100_000),
    "warmup": (0, 100_000),
    "requests": (1, REQUESTS_AT_MOST),
    "runs_per_job": (1, 1_000_000),
    "jobs_at_once": (1, 1_000_000),
    "request_rate": (1e-6, 1e6),
    "burstiness": (1e-3, 1e3),
    "prefix_len": (1, 10_000_000),
    "seed": (0, 2**32 - 1),
    "score_window": (2, 10_000_000),
    "score_stride": (1, 10_000_000),
}
# Of `until`.
NARROWEST, WIDEST = 0.0001, 0.5
# Keys that replace others of an earlier layer.
REPLACES = {
    "prompt": ("prompts",), "lengths": ("input_len", "output_len"), "input_len": ("lengths",), "output_len": ("lengths",),
}  # fmt: skip
_NOT_IN_A_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # line ends and other control characters


def build(layers: Iterable[Layer]) -> SubmissionSpec:
    """The submission of these layers, later ones overriding earlier ones key by key; an axis may have a single value. Raises
    WrongUseError with the source of an unknown key or an invalid value."""
    merged: dict[str, object] = {}
    source_of: dict[str, str] = {}
    for source, values in layers:
        _override(merged, source, values)
        for key, value in values.items():
            if key not in KEYS:
                raise WrongUseError(f"{_at(source)}unknown key {key!r}", nearest(key, KEYS))
            merged[key] = _tables(key, value) if key in ("cells", "exclude") else value
            source_of[key] = source
    request = _converted(merged, SubmissionSpec, lambda key: source_of.get(key, "request"))

    def at(key: str) -> str:
        return _at(source_of.get(key, FLAGS))

    _check(request, request.backend, at)
    for number, cell in enumerate(request.cells, 1):
        _check(cell, cell.backend or request.backend[:1], lambda _, n=number: f"[[cells]] number {n}: ")  # type: ignore[misc]
    if request.prompts is None and not request.prompt.strip():
        raise WrongUseError(f"{at('prompt')}empty prompt", "give --prompt a text")
    axes = (request, *request.cells)
    draws = any(getattr(of, axis) for of in axes for axis in WORKLOAD_AXES) or any(
        set(of.sampling) - {GREEDY} for of in axes
    )
    if request.seed is not None and not draws:
        raise WrongUseError(
            "seed has no effect: nothing is drawn", "add --temperature, --input-len, --lengths or --dataset"
        )
    if request.quality and not any(True in of.serve for of in axes):
        raise WrongUseError(f"{at('quality')}quality needs a server: tasks are sent to it", "add --serve")
    if request.score_stride > request.score_window:
        raise WrongUseError(
            f"{at('score_stride')}score_stride is longer than a window: {request.score_stride} of {request.score_window} tokens",
            "give a smaller --score-stride, or a larger --score-window",
        )
    for key in ("name", "note"):
        text = getattr(request, key)
        if text is not None and (not text.strip() or _NOT_IN_A_NAME.search(text)):
            raise WrongUseError(f"invalid {key}: {text!r}", f"give --{key} a short text on one line")
    return request


def _override(merged: dict[str, object], source: str, values: Mapping[str, Any]) -> None:
    """Remove the keys of earlier layers that keys of this layer replace. Raises WrongUseError where it has both."""
    if source == FLAGS and "prompt" in values and "prompts" in values:
        raise WrongUseError("--prompt and --prompts are both given", "give one of them")
    if "lengths" in values and ("input_len" in values or "output_len" in values):
        raise WrongUseError(f"{_at(source)}lengths and input_len or output_len are given", "give lengths, or these two")
    for key, replaced in REPLACES.items():
        if key in values:
            for other in replaced:
                merged.pop(other, None)


def _at(source: str) -> str:
    return "" if source == FLAGS else f"{source}: "


def _tables(key: str, value: object) -> object:
    """The tables of [[cells]] or [[exclude]], converted one by one: an error names the number."""
    if not (isinstance(value, list | tuple) and all(isinstance(table, dict) for table in value)):
        return value  # a type error, which `build` reports with the source
    known = (*AXES, "engine_options")
    for number, table in enumerate(value, 1):
        where = f"[[{key}]] number {number}"
        if unknown := next((name for name in table if name not in known), None):
            raise WrongUseError(f"{where}: unknown key {unknown!r}", nearest(unknown, known))
        if key == "exclude" and not table:
            raise WrongUseError(f"{where} is empty and matches every run", "give it an axis and a value")
    return tuple(_converted(table, Axes, lambda _, n=n: f"[[{key}]] number {n}") for n, table in enumerate(value, 1))  # type: ignore[misc]


def _converted(values: Mapping[str, Any], into: type[T], source_of: Callable[[str], str]) -> T:
    listed = {key: as_list(key, value) for key, value in values.items()}
    for key in AXES:
        if listed.get(key) in ([], ()) and key not in MAY_BE_EMPTY:
            raise WrongUseError(f"{source_of(key)}: {key} is an empty list", "give it a value")
    try:
        return msgspec.convert(listed, into)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$.")
        key = re.split(r"[.\[`]", path)[0]
        raise WrongUseError(f"{source_of(key)}: {key}: {in_words(reason)}", f"correct {key}") from None


def as_list(key: str, value: Any) -> Any:
    """A single value of an axis or service level as a list."""
    if key in (*AXES, "slo", "quality") and not isinstance(value, list | tuple):
        return [value]
    if key == "engine_options" and isinstance(value, dict):
        return {name: as_list(AXES[0], choice) for name, choice in value.items()}
    return value


def _check(asked: Axes, backends: tuple[str, ...], at: Callable[[str], str]) -> None:
    """Raises WrongUseError, beginning with `at(key)`, for an invalid value of the right type."""
    for key in asked.__struct_fields__:
        flag = f"{at(key)}--{key.replace('_', '-')}"
        value = getattr(asked, key)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, str):
                _check_text(one, key, at(key), flag)
            elif one is not None and key in LIMITS and not LIMITS[key][0] <= one <= LIMITS[key][1]:
                least, most = LIMITS[key]
                kind = "number" if isinstance(least, float) else "whole number"
                raise WrongUseError(f"{flag} out of range: {one}", f"give a {kind} from {least} to {most}")
    for text in asked.parallel:
        check_parallel(text, backends, asked.gpus, at("parallel"))
    engine_options.check(asked.engine_options, backends, at("engine_options"))


def check_parallel(text: str, backends: Sequence[str], gpus: Sequence[int], where: str = "") -> int | None:
    """The number of GPUs that sizes need, None for a word. Raises WrongUseError, beginning with `where`, for another text, for
    one that no backend has, and for sizes that need another number of GPUs than all of `gpus`."""
    try:
        kinds = parallel.kinds_in(text)
    except ValueError:
        remedy = f"give one of {', '.join(parallel.KINDS)}, or sizes such as tensor=4,pipeline=2"
        raise WrongUseError(f"{where}invalid --parallel: {text!r}", remedy) from None
    if not any(kinds <= set(engine_class(backend).PARALLEL) for backend in backends):
        known = "; ".join(f"{backend}: {', '.join(engine_class(backend).PARALLEL)}" for backend in ENGINES)
        raise WrongUseError(f"{where}backend {' or '.join(backends)} has no --parallel {text}", f"by backend: {known}")
    needed = parallel.gpus_in(text)
    if needed is not None and gpus and needed not in gpus:
        raise WrongUseError(
            f"{where}--parallel {text} needs {needed} GPUs: --gpus {' and '.join(map(str, gpus))}",
            f"remove --gpus, add --gpus {needed}, or give --parallel other sizes",
        )
    return needed


def _check_text(text: str, key: str, where: str, flag: str) -> None:
    if not is_utf8(text):
        raise WrongUseError(f"{flag} is not UTF-8: {text!a}", "write it in UTF-8")
    if key in ("partition", "model_id", "revision", "score") and not text.strip():
        raise WrongUseError(f"{flag} is empty", f"give {flag} a value, or remove it")
    if key == "until" and not NARROWEST <= percent(text) <= WIDEST:
        raise WrongUseError(f"{flag} out of range: {text}", f"give a percentage from {NARROWEST:.2%} to {WIDEST:.0%}")
    if key == "slo":
        service_levels.parse(text, where)
    known = {"backend": tuple(ENGINES), "dtype": DTYPE_CHOICES}.get(key)
    if known is not None and text not in known:
        raise WrongUseError(f"{where}unknown {key} {text!r}", nearest(text, known))


def percent(text: str) -> float:
    """ "5%" -> 0.05. Raises WrongUseError for other text."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", text)
    if match is None:
        raise WrongUseError(f"not a percentage: {text!r}", "write it as 5%")
    return float(match[1]) / 100


def is_utf8(text: str) -> bool:
    """Whether the text has no lone surrogates, as which Python reads other bytes of the command line."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
