"""The short form of tests/slurm/chaos.py: 100 runs through every fault. The long form: python -m tests.slurm.chaos."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .chaos import Chaos, Sweep, small_disk
from .cluster import SlurmCluster, SlurmMissing, install_slurm

SEED = int(os.environ.get("LABCTL_TEST_SEED", "20261123"))


def test_a_sweep_through_faults_has_each_result_once_and_tells_no_untruth(tmp_path: Path) -> None:
    """On a cluster of its own: its daemons and nodes are killed."""
    try:
        install_slurm()
        with SlurmCluster(tmp_path / "slurm") as cluster, small_disk(tmp_path / "lab") as root:
            sweep = Sweep(runs=100, runs_per_job=10, jobs_at_once=3, chaos_s=40)
            Chaos(cluster, root, sweep, SEED).run()
    except (SlurmMissing, subprocess.CalledProcessError) as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no Slurm cluster on a disk of its own: {missing}")
