"""The engines' own servers, by backend. A new one is one file here, and one line in SERVERS."""

from __future__ import annotations

import importlib
from typing import cast

from labctl_workers.record import Refusal
from labctl_workers.servers.base import Server

SERVERS = {
    "hf": "labctl_workers.servers.transformers:TransformersServer",
    "vllm": "labctl_workers.servers.vllm:VllmServer",
}


def server_class(backend: str) -> type[Server]:
    """The class of a backend's server; its module imports no engine. Raises Refusal for a backend without a server."""
    if backend not in SERVERS:
        raise Refusal("no-server", f"backend {backend} has no server", f"serve one of {', '.join(sorted(SERVERS))}")
    module, _, name = SERVERS[backend].partition(":")
    return cast("type[Server]", getattr(importlib.import_module(module), name))
