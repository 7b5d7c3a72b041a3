"""The short form of tests/slurm/chaos.py: 40 runs, and the faults that are over in half a minute. The long form:
python -m tests.slurm.chaos."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.parts import PartMissing

from .chaos import Chaos, Sweep, small_disk
from .cluster import SlurmCluster, install_slurm
from .fault_injector import FaultInjector

SEED = int(os.environ.get("LABCTL_TEST_SEED", "20261123"))


def test_a_sweep_through_faults_has_each_result_once_and_tells_no_untruth(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """On a cluster of its own: its daemons and nodes are killed."""
    tmp_path = tmp_path_factory.mktemp("chaos")
    try:
        install_slurm()
        injector = FaultInjector(tmp_path / "faults")
        cluster = SlurmCluster(tmp_path / "slurm", job_requeue=False, cred_expire_s=5)
        with cluster, small_disk(tmp_path / "disk") as disk:
            sweep = Sweep(
                runs=40, runs_per_job=4, jobs_at_once=3, chaos_s=10, run_s=0.4, load_s=0.2, pause_s=1, slow=False
            )
            Chaos(cluster, disk, injector, sweep, SEED).run()
    except (PartMissing, subprocess.CalledProcessError) as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no Slurm cluster on a disk of its own: {missing}")
