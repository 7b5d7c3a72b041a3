"""The Slurm cluster that the tests of this folder share, and their ``slurm`` mark."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import SlurmCluster, SlurmMissing, install_slurm


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slurm: needs a real Slurm cluster, which the test run starts itself")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # pytest hands every folder's hook the whole session's tests.
    folder = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(folder):
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A started cluster of four idle nodes. In CI its absence is a failure, elsewhere a skip."""
    slurm = SlurmCluster(tmp_path_factory.mktemp("slurm"))
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
