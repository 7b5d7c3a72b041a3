"""The login node's side of labctl: ask, plan, submit, collect, compare. Never imports torch, transformers or vllm.

For notebooks, `import labctl_orchestrator as lab`: `lab.compare`, `lab.runs`, `lab.query` and the others of `api`
(docs/python.md). They are loaded when one of them is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

API = ("compare", "runs", "repeats", "requests", "devices", "failures", "jobs", "query", "status", "submit")
# Two of them are modules of this package too: such a module, called, is the function of its name.
MODULES = ("compare", "status")


def __getattr__(name: str) -> Any:
    if name not in API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in MODULES:  # no more than that: whoever imports one in this package asks here first
        return importlib.import_module(f"{__name__}.{name}")
    from labctl_orchestrator import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(API)


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        from labctl_orchestrator import api

        return getattr(api, self.__name__.rpartition(".")[2])(*arguments, **keywords)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in MODULES and type(value) is ModuleType:  # what the import of a submodule does
            value.__class__ = _Callable
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
