"""A site with two clusters, each with a controller of its own, behind one slurmdbd; and labctl on the login node of the first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import SlurmCluster
from .conftest import Lab, sleeping, started, states, until

EAST = "east"


@pytest.fixture(scope="module")
def east(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    folder = tmp_path_factory.mktemp("east")
    yield from started(
        SlurmCluster(folder, accounting_of=str(cluster.directory), name=EAST, dgx2_nodes=0, dgxh_nodes=1)
    )


@pytest.fixture
def east_lab(fresh_lab: Lab, east: SlurmCluster) -> Lab:
    """A lab on the first cluster, whose dgxh is on the second."""
    sleeping(fresh_lab)
    text = (fresh_lab.root / "labctl.toml").read_text(encoding="utf-8")
    fresh_lab.settings(text.replace("[partitions.dgxh]\n", f'[partitions.dgxh]\ncluster = "{EAST}"\n'))
    return fresh_lab


def in_queue(cluster: SlurmCluster) -> list[str]:
    return cluster.run("squeue", "--noheader", "--format=%i").stdout.split()


def test_a_partition_of_another_cluster_is_used_from_submission_to_record(east_lab: Lab, east: SlurmCluster) -> None:
    model = str(east_lab.root / "model")
    runs = east_lab.json("submit", "-p", "dgxh", "-p", "dgx2", "--dtype=float16", "--model-id", model, "--wait")["runs"]
    assert [run["state"] for run in runs] == ["done", "done"]
    of = {run["partition"]: run["slurm_id"] for run in runs}
    until(lambda: east.job(of["dgxh"]).get("State") == "COMPLETED")
    assert east.job(of["dgxh"])["NodeList"] == "dgxh-1"
    until(lambda: east_lab.cluster.job(of["dgx2"]).get("State") == "COMPLETED")


def test_its_jobs_are_followed_and_cancelled_there_whatever_the_shell_means(east_lab: Lab, east: SlurmCluster) -> None:
    flags = ("-p", "dgxh", "--model-id", str(east_lab.root / "model"), "--sbatch", "begin=now+1hour")
    east_lab.ok("submit", *flags, SLURM_CLUSTERS="nowhere")
    (queued,) = in_queue(east)
    assert in_queue(east_lab.cluster) == []
    (run,) = east_lab.json("status", SLURM_CLUSTERS="nowhere")
    assert (run["state"], run["slurm_id"]) == ("pending", queued)
    east_lab.ok("cancel", "--yes")
    assert in_queue(east) == []
    until(lambda: "by you" in east_lab.json("status")[0]["detail"])  # which the accounting of that cluster alone knows
    assert states(east_lab) == {"cancelled": 1}


def test_doctor_and_reserve_mean_that_cluster(east_lab: Lab, east: SlurmCluster) -> None:
    checks = {check["name"]: check for check in east_lab.json("doctor", "-p", "dgxh", "--on-node")}
    assert "1 node" in checks["partition"]["text"]  # the first cluster's dgxh has two
    assert "dgxh-1" in checks["node"]["text"]
    seen = east_lab.ok("reserve", "-p", "dgxh", "--time", "5", "--", "bash", "-c", "echo $SLURM_CLUSTER_NAME")
    assert seen == f"{EAST}\n"


def test_a_cluster_that_slurm_does_not_know_is_refused(fresh_lab: Lab, tmp_path: Path) -> None:
    model = sleeping(fresh_lab)
    text = (fresh_lab.root / "labctl.toml").read_text(encoding="utf-8")
    fresh_lab.settings(text.replace("[partitions.dgxh]\n", '[partitions.dgxh]\ncluster = "west"\n'))
    done = fresh_lab.labctl("submit", "-p", "dgxh", "--model-id", model)
    assert done.returncode == 4, done.stderr
    assert "west" in done.stderr
