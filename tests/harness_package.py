"""lm-evaluation-harness for the tests, in an environment of its own.

Where it is, transformers imports scikit-learn and pandas too, and every worker starts 3 s later.

    python -m tests.harness_package        (after torch and transformers; one minute)
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from labctl_workers.servers.harness import INSTALL
from tests.parts import fail_or_skip

FOLDER = Path(sys.prefix) / "harness"
PYTHON = FOLDER / "bin" / "python"


@pytest.fixture(scope="session")
def harness_python() -> str:
    """The Python that has the harness, and all that this one has. In CI its absence is a failure, elsewhere a skip."""
    if not (FOLDER / "done").exists():
        fail_or_skip("lm-evaluation-harness is not installed (python -m tests.harness_package installs it)")
    return str(PYTHON)


def main() -> None:
    venv.create(FOLDER, clear=True, symlinks=True)
    outer = [path for path in sys.path[1:] if not path.startswith(f"{sys.base_prefix}/lib")]
    inner = sysconfig.get_path("purelib", vars={"base": str(FOLDER), "platbase": str(FOLDER)})
    Path(inner, "outer.pth").write_text("\n".join(outer))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--python", str(PYTHON)]
    subprocess.run([*pip, *shlex.split(INSTALL)[1:]], check=True)
    (FOLDER / "done").touch()


if __name__ == "__main__":
    main()
