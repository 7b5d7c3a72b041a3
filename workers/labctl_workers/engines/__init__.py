"""The engines, by name. A new backend is one file or folder here, and one line."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from labctl_workers.engines.base import Engine
from labctl_workers.record import JobSpec, Refusal

ENGINES = {
    "hf": "labctl_workers.engines.hf:TransformersEngine",
    "staged": "labctl_workers.engines.staged.engine:StagedEngine",
    "vllm": "labctl_workers.engines.vllm:VllmEngine",
}


def engine_class(backend: str) -> type[Engine]:
    """The class behind a name: its module imports no engine until it loads. Raises Refusal for an unknown name."""
    if backend not in ENGINES:
        known = ", ".join(sorted(ENGINES))
        raise Refusal("unknown-backend", f"no backend is called {backend!r}", f"the backends are: {known}")
    module, _, name = ENGINES[backend].partition(":")
    return cast("type[Engine]", getattr(importlib.import_module(module), name))


def options_of(backend: str) -> dict[str, type]:
    """The engine options of a backend, each with the type of its value."""
    return engine_class(backend).OPTIONS


def parallel_of(backend: str) -> str:
    """How a backend spreads a model over GPUs: "layers" or "tensor"."""
    return engine_class(backend).PARALLEL


def defaults_of(backend: str) -> dict[str, Any]:
    """The engine options that a backend has a value for where none is given."""
    return getattr(engine_class(backend), "DEFAULTS", {})


def choices_of(backend: str, option: str) -> tuple[str, ...] | None:
    """The values that an engine option may have; None: any of its type."""
    choices: dict[str, tuple[str, ...]] = getattr(engine_class(backend), "CHOICES", {})
    return choices.get(option)


def foreseen(job: JobSpec, config: Any, packages: Mapping[str, str] | None) -> Iterator[Refusal]:
    """What the job's engine would refuse on the node, as far as can be told before (engines.base)."""
    return engine_class(job.backend).foreseen(job, config, packages)


def make_engine(job: JobSpec, cache: Path) -> Engine:
    """The engine that the job names, not yet loaded; `cache` is where it may keep what it compiles.

    Raises Refusal for a name that is not in ENGINES.
    """
    return engine_class(job.backend)(job, cache)
