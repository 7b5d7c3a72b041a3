"""The engines, by name. A new backend is one file or folder here, and one line in ENGINES."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from labctl_workers.engines.base import Engine, Json
from labctl_workers.record import JobSpec, Refusal

ENGINES = {
    "hf": "labctl_workers.engines.hf:TransformersEngine",
    "staged": "labctl_workers.engines.staged.engine:StagedEngine",
    "vllm": "labctl_workers.engines.vllm:VllmEngine",
}

# The assumed standard deviation between engine loads, relative to the mean, until a workspace has measured its own. If loads
# differ less, intervals are wider than necessary; if they differ more, too narrow. Measured on two H200 (docs/staged.md;
# docs/metrics.md, "Of vLLM"): hf 3 to 15%, since eager decoding waits for the host; staged 0.1 to 0.3%; vLLM 0.1 to 0.5% within
# a day, about 3% over engines with the same settings.
LARGEST_LOAD_SPREAD = 0.05
ASSUMED_LOAD_SPREAD = {"hf": 0.10, "staged": LARGEST_LOAD_SPREAD, "vllm": LARGEST_LOAD_SPREAD}


def engine_class(backend: str) -> type[Engine]:
    """The class of a backend; its module imports no engine until it loads. Raises Refusal for an unknown name."""
    if backend not in ENGINES:
        raise Refusal("unknown-backend", f"unknown backend: {backend!r}", f"use one of {', '.join(sorted(ENGINES))}")
    module, _, name = ENGINES[backend].partition(":")
    return cast("type[Engine]", getattr(importlib.import_module(module), name))


def options_of(backend: str) -> dict[str, type]:
    """The engine options of a backend, and the types of their values."""
    return engine_class(backend).OPTIONS


def normalised_options(backend: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a canonical form: an integer of a float option as a float, a JSON object with sorted keys and no spaces.
    Other values, and options that the backend does not have, stay unchanged."""
    known = options_of(backend)
    return {name: _normalised(value, known[name]) if name in known else value for name, value in options.items()}


def _normalised(value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if issubclass(kind, Json):
        with contextlib.suppress(TypeError, ValueError):  # a rule's values are not checked
            return json.dumps(json.loads(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return value


def defaults_of(backend: str) -> dict[str, Any]:
    """The default values of a backend's options, as far as the engine declares them."""
    defaults: dict[str, Any] = getattr(engine_class(backend), "DEFAULTS", {})
    return defaults


def parallel_of(backend: str) -> tuple[str, ...]:
    """How a backend can share a model between GPUs (words of engines.parallel), the default first."""
    return engine_class(backend).PARALLEL


def choices_of(backend: str, option: str) -> tuple[str, ...] | None:
    """The permitted values of an engine option; None: any of its type."""
    choices: dict[str, tuple[str, ...]] = getattr(engine_class(backend), "CHOICES", {})
    return choices.get(option)


def foreseen(job: JobSpec, config: Any, packages: Mapping[str, str] | None) -> Iterator[Refusal]:
    """The refusals of the job's engine that are predictable before it loads (see engines.base)."""
    return _class_of(job).foreseen(job, config, packages)


def make_engine(job: JobSpec, cache: Path) -> Engine:
    """The job's engine, not yet loaded; `cache` is a folder for compiled code. Raises Refusal for an unknown backend."""
    return _class_of(job)(job, cache)


def _class_of(job: JobSpec) -> type[Engine]:
    if not job.served:
        return engine_class(job.backend)
    from labctl_workers.engines.served import ServedEngine

    return ServedEngine
