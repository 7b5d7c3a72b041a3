"""The engines, by name. A new backend is one file or folder here, and one line in ENGINES."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from labctl_workers.engines.base import Engine, Json, refusals_of
from labctl_workers.engines.text import check_window, most_tokens
from labctl_workers.record import JobSpec, Refusal, Scalar

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


def normalised_options(backend: str, options: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The options in a canonical form: an integer of a float option as a float, a JSON object with sorted keys and no spaces.
    Other values, and options that the backend does not have, stay unchanged."""
    known = engine_class(backend).OPTIONS
    return {name: _normalised(value, known[name]) if name in known else value for name, value in options.items()}


def _normalised(value: Scalar, kind: type) -> Scalar:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if issubclass(kind, Json) and isinstance(value, str):
        with contextlib.suppress(ValueError):  # a rule's values are not checked
            return json.dumps(json.loads(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return value


def foreseen(job: JobSpec, config: Any, packages: Mapping[str, str] | None) -> Iterator[Refusal]:
    """The refusals of the job's engine that are predictable before it loads (see engines.base)."""
    yield from _class_of(job).foreseen(job, config, packages)
    if config is not None:
        yield from refusals_of(lambda: check_window(job, most_tokens(config)))


def make_engine(job: JobSpec, cache: Path) -> Engine:
    """The job's engine, not yet loaded; `cache` is a folder for compiled code. Raises Refusal for an unknown backend."""
    return _class_of(job)(job, cache)


def _class_of(job: JobSpec) -> type[Engine]:
    if not job.served:
        return engine_class(job.backend)
    from labctl_workers.engines.served import ServedEngine

    return ServedEngine
