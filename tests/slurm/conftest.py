"""The Slurm cluster that the tests of this folder share, and their ``slurm`` mark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.models import smollm2  # noqa: F401  a fixture

from .cluster import SlurmCluster, SlurmMissing, install_slurm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # pytest hands every folder's hook the whole session's tests.
    folder = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(folder):
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A started cluster of four idle nodes."""
    yield from started(SlurmCluster(tmp_path_factory.mktemp("slurm"), kill_wait_s=30))


def started(slurm: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster while a fixture is in use. In CI its absence is a failure, elsewhere a skip."""
    try:
        install_slurm()
        slurm.start()
    except SlurmMissing as missing:
        if os.environ.get("CI"):
            pytest.fail(f"no Slurm cluster: {missing}", pytrace=False)
        pytest.skip(f"no Slurm cluster: {missing}")
    try:
        yield slurm
    finally:
        slurm.stop()


@dataclass
class Lab:
    """A workspace on the cluster, and `labctl` as a user calls it there."""

    root: Path
    cluster: SlurmCluster
    environment: dict[str, str] = field(default_factory=dict)

    def labctl(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = Path(sys.executable).parent / "labctl"
        return subprocess.run(
            [str(command), *arguments],
            cwd=self.root,
            env={**self.cluster.env, **self.environment, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )

    def ok(self, *arguments: str, **variables: str) -> str:
        """Standard output of a command that must succeed."""
        done = self.labctl(*arguments, **variables)
        assert done.returncode == 0, f"labctl {' '.join(arguments)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout

    def json(self, *arguments: str, **variables: str) -> Any:
        return json.loads(self.ok(*arguments, "--json", **variables))

    def settings(self, text: str) -> None:
        (self.root / "labctl.toml").write_text(text, encoding="utf-8")


# device = "cpu" runs the real engine on nodes that only say they have GPUs; one thread a job, so that jobs beside one
# another on two cores do not slow each other more than they must.
CPU_PARTITIONS = """
[partitions.dgx2]
device = "cpu"
env = { OMP_NUM_THREADS = "1" }
[partitions.dgxh]
device = "cpu"
env = { OMP_NUM_THREADS = "1" }
"""


@pytest.fixture(scope="module")
def lab(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A workspace that the tests of one module share."""
    root = tmp_path_factory.mktemp("lab")
    lab = Lab(root, cluster, {"HOME": str(tmp_path_factory.mktemp("home"))})
    lab.settings(CPU_PARTITIONS)
    return lab


@pytest.fixture
def fresh_lab(cluster: SlurmCluster, tmp_path: Path) -> Lab:
    """A workspace of a test's own."""
    (tmp_path / "home").mkdir()
    (tmp_path / "lab").mkdir()
    lab = Lab(tmp_path / "lab", cluster, {"HOME": str(tmp_path / "home")})
    lab.settings(CPU_PARTITIONS)
    return lab
