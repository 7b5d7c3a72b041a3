"""Parts that a test needs and a machine may lack: Slurm, vLLM, torch, Chromium."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


class PartMissing(RuntimeError):
    """This machine lacks a part that a test needs; the message says which, and what would help."""


def fail_or_skip(reason: str) -> NoReturn:
    """In CI a missing part is a failure, elsewhere a skip."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
