"""The part of labctl on the login node: plan, submit, collect, compare. Never imports torch, transformers or vllm.

For notebooks, `import labctl_orchestrator as lab`: `lab.compare`, `lab.runs`, `lab.query` and the other functions of `api`
(docs/python.md). The first use of one loads them.
"""

from __future__ import annotations

from typing import Any

API = ("compare", "runs", "repeats", "requests", "devices", "failures", "jobs", "query", "status", "submit", "retry",
       "cancel", "wait")  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from labctl_orchestrator import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(API)
