"""The Slurm cluster that the tests of this folder share, and their ``slurm`` mark."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_checkpoint
from tests.forked import ForkServer
from tests.models import shallow, smollm2  # noqa: F401  fixtures
from tests.parts import PartMissing, fail_or_skip
from tests.vllm_package import VLLM_CACHE

from .chaos import SLEEPER
from .cluster import SlurmCluster, install_slurm


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
    except PartMissing as missing:
        fail_or_skip(f"no Slurm cluster: {missing}")
    try:
        yield slurm
    finally:
        slurm.stop()


@functools.cache
def fork_server() -> ForkServer:
    return ForkServer()


@dataclass
class Lab:
    """A workspace on the cluster, and `labctl` as a user calls it there."""

    root: Path
    cluster: SlurmCluster
    environment: dict[str, str] = field(default_factory=dict)

    def labctl(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.cluster.env, **self.environment, **variables}
        return fork_server().run(arguments, cwd=self.root, env=environment, timeout=500)

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


SLEEPING = """
[partitions.{name}]
device = "cpu"
setup = ["export PYTHONPATH={sleeper}"]
env = {{ SLEEPER_LOAD_S = "{load_s}", SLEEPER_RUN_S = "{run_s}" }}
"""


def sleeping(lab: Lab, *, load_s: float = 0.1, run_s: float = 0.1) -> str:
    """Make the lab's engine sleep instead; the checkpoint that it does not load."""
    let_sleep(lab, load_s=load_s, run_s=run_s)
    return str(write_checkpoint(lab.root / "model"))


def let_sleep(lab: Lab, *, load_s: float = 0.1, run_s: float = 0.1) -> None:
    texts = [SLEEPING.format(name=name, sleeper=SLEEPER, load_s=load_s, run_s=run_s) for name in ("dgx2", "dgxh")]
    lab.settings("\n".join(texts))


def own_engine_sleeps(lab: Lab) -> None:
    """The lab's engines sleep by the user's own settings, so that init has a workspace to make."""
    own_settings(
        lab, "\n".join(SLEEPING.format(name=name, sleeper=SLEEPER, load_s=0.1, run_s=0.1) for name in ("dgx2", "dgxh"))
    )


def own_settings(lab: Lab, text: str) -> None:
    (lab.root / "labctl.toml").unlink(missing_ok=True)
    folder = Path(lab.environment["HOME"]) / ".config" / "labctl"
    folder.mkdir(parents=True)
    (folder / "labctl.toml").write_text(text, encoding="utf-8")


def requested(lab: Lab, *flags: str, model: str) -> dict[str, str]:
    """The resources that a script requests: the same as those of a reservation."""
    script = lab.ok("render", *flags, "--model-id", model).splitlines()
    lines = [line.removeprefix("#SBATCH ") for line in script if line.startswith("#SBATCH ")]
    found = _resources(lines)
    assert found == _resources(lab.ok("reserve", *flags, "--print").split())
    return found


def _resources(words: list[str]) -> dict[str, str]:
    pairs = (word.removeprefix("--").partition("=") for word in words if word.startswith("--"))
    kinds = r"partition|account|time|nodes|ntasks.*|cpus-.*|mem.*|gres|gpus.*|clusters"
    return {name: value for name, _, value in pairs if re.fullmatch(kinds, name)}


def lengths(count: int) -> list[str]:
    return [f"--max-new-tokens={length}" for length in range(1, count + 1)]


def states(lab: Lab, *arguments: str) -> Counter[str]:
    return Counter(run["state"] for run in lab.json("status", *arguments))


def until(true: Callable[[], bool], timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.3)


def job_of(lab: Lab) -> dict[str, Any]:
    """The lab's one job. Its look at Slurm is that of labctl status."""
    lab.ok("status")
    (job,) = lab.json("export", "--table", "jobs")
    return dict(job)


def starts_of(lab: Lab, slurm_id: str) -> list[float]:
    """How long each start of the job held its node, in seconds, by sacct's own reckoning."""
    told = lab.cluster.run("sacct", "-n", "-X", "-P", "--duplicates", "-j", slurm_id, "--format=ElapsedRaw").stdout
    return [float(line) for line in told.split()]


@pytest.fixture(scope="module")
def lab(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A workspace that the tests of one module share."""
    root = tmp_path_factory.mktemp("lab")
    lab = Lab(root, cluster, {"HOME": str(tmp_path_factory.mktemp("home")), **VLLM_CACHE})
    lab.settings(CPU_PARTITIONS)
    return lab


@pytest.fixture
def fresh_lab(cluster: SlurmCluster, tmp_path: Path) -> Lab:
    """A workspace of a test's own."""
    (tmp_path / "home").mkdir()
    (tmp_path / "lab").mkdir()
    lab = Lab(tmp_path / "lab", cluster, {"HOME": str(tmp_path / "home"), **VLLM_CACHE})
    lab.settings(CPU_PARTITIONS)
    return lab
