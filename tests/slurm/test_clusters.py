"""A site with two clusters, each with a controller of its own, behind one slurmdbd; and labctl on the login node of the first."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_checkpoint

from .cluster import CLUSTER_NAME, SlurmCluster
from .conftest import Lab, own_engine_sleeps, requested, sleeping, started, states, until

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


# ---------------------------------------------------------------- init


@pytest.fixture
def new_lab(fresh_lab: Lab, east: SlurmCluster) -> Lab:
    """A workspace before init on the login node of the second cluster, which has no dgx2. The own engine sleeps."""
    own_engine_sleeps(fresh_lab)
    return Lab(fresh_lab.root, east, fresh_lab.environment)


def init(lab: Lab, **variables: str) -> tuple[dict[str, dict[str, Any]], str, list[str]]:
    """The tables of the partitions that init wrote, its text, and its notes."""
    answer = lab.json("init", **variables)
    text = (lab.root / "labctl.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["partitions"], text, answer["notes"]


def test_init_proposes_a_partition_that_another_cluster_alone_has_and_submit_runs_there(
    new_lab: Lab, cluster: SlurmCluster
) -> None:
    found, text, notes = init(new_lab)
    assert found["dgx2"] == {"account": "eecs", "cluster": cluster.name}
    assert found["dgxh"] == {"account": "eecs"}
    assert "# Needed, because the shell's cluster has no partition with this name and GPUs:\ncluster = " in text
    assert tomllib.loads(text)["defaults"]["partition"] == "dgxh"
    assert any(note.startswith(f"partition dgxh of cluster {cluster.name}: left out") for note in notes)
    model = str(write_checkpoint(new_lab.root / "model"))
    engines = ("--backend=hf", "--backend=vllm", "--dtype=float16")
    runs = new_lab.json("submit", "-p", "dgx2", *engines, "--model-id", model, "--wait")["runs"]
    assert [run["state"] for run in runs] == ["done", "done"]
    until(lambda: all(cluster.job(run["slurm_id"]).get("State") == "COMPLETED" for run in runs))
    assert requested(new_lab, "-p", "dgx2", model=model)["clusters"] == cluster.name


@pytest.mark.parametrize("names", [f"{EAST},{CLUSTER_NAME}", "all"])
def test_init_gives_each_partition_its_cluster_where_the_shell_names_several(
    new_lab: Lab, cluster: SlurmCluster, names: str
) -> None:
    found, text, _ = init(new_lab, SLURM_CLUSTERS=names)
    assert {name: table["cluster"] for name, table in found.items()} == {
        "gpu": EAST,
        "dgxh": EAST,
        "dgx2": cluster.name,
    }
    assert "# Needed, because SLURM_CLUSTERS names several clusters:" in text


def test_a_partition_of_another_cluster_is_charged_to_an_account_there(new_lab: Lab, east: SlurmCluster) -> None:
    east.add_account("physics")
    try:
        found, _, _ = init(new_lab)
    finally:
        east.remove_account("physics")
    assert ("account" in found["dgxh"], found["dgx2"]["account"]) == (False, "eecs")
