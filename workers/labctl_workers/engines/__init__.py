"""The engines, by name. A new backend is one file in this folder and one line here."""

from __future__ import annotations

import importlib
from typing import cast

from labctl_workers.engines.base import Engine, EngineFactory
from labctl_workers.record import JobSpec, Refusal

ENGINES = {
    "hf": "labctl_workers.engines.hf:TransformersEngine",
}


def make_engine(job: JobSpec) -> Engine:
    """The engine that the job names, not yet loaded. Raises Refusal for a name that is not in ENGINES."""
    if job.backend not in ENGINES:
        known = ", ".join(sorted(ENGINES))
        raise Refusal("unknown-backend", f"no backend is called {job.backend!r}", f"the backends are: {known}")
    module, _, name = ENGINES[job.backend].partition(":")
    return cast(EngineFactory, getattr(importlib.import_module(module), name))(job)
