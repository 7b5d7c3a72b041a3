"""The test cluster behaves as a real one: what the other tests of this folder rest on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from labctl_slurm import queue
from tests.parts import PartMissing

from . import cluster as cluster_module
from .cluster import ACCOUNT, Process, SlurmCluster


@pytest.fixture(autouse=True)
def quiet(cluster: SlurmCluster) -> Iterator[None]:
    """No job on the shared cluster, all nodes idle: so a test finds it, and leaves it."""
    idle(cluster)
    yield
    idle(cluster)


def idle(cluster: SlurmCluster) -> None:
    cluster.run("scancel", "--account", ACCOUNT)
    cluster.wait_idle()


def submit(cluster: SlurmCluster, folder: Path, script: str, *options: str) -> str:
    """Submit a shell command; its output goes to ``folder``/<job id>.out. Returns the job id."""
    arguments = ["--parsable", "--account", ACCOUNT, "--output", str(folder / "%j.out"), *options]
    return cluster.run("sbatch", *arguments, "--wrap", script).stdout.strip()


def queued(cluster: SlurmCluster, job_id: str) -> dict[str, str]:
    """slurmctld's own, current view of a job; sacct's lags behind it."""
    words = cluster.run("scontrol", "--oneliner", "show", "job", job_id).stdout.split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 15) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        time.sleep(0.1)


def start_job_that_tells_its_pid(cluster: SlurmCluster, folder: Path) -> tuple[str, Process]:
    job_id = submit(cluster, folder, "echo $$; sleep 300", "--partition", "dgxh", "--requeue")
    output = folder / f"{job_id}.out"
    wait_until(lambda: output.exists() and output.read_text().endswith("\n"), "the job to run")
    shell = Process.of(int(output.read_text()))
    assert shell is not None
    return job_id, shell


def test_four_nodes_are_idle_in_three_partitions(cluster: SlurmCluster) -> None:
    listing = cluster.run("sinfo", "--noheader", "--Node", "--format=%P %N %T %G %f").stdout.split("\n")
    assert sorted(filter(None, listing)) == [
        "dgx2 dgx2-1 idle gpu:v100:16 v100",
        "dgx2 dgx2-2 idle gpu:v100:16 v100",
        "dgxh dgxh-1 idle gpu:h100:8 h100",
        "dgxh dgxh-2 idle gpu:h100:8 h100",
        "gpu* dgx2-1 idle gpu:v100:16 v100",
        "gpu* dgx2-2 idle gpu:v100:16 v100",
        "gpu* dgxh-1 idle gpu:h100:8 h100",
        "gpu* dgxh-2 idle gpu:h100:8 h100",
    ]


def test_all_programs_are_of_one_slurm(cluster: SlurmCluster) -> None:
    clients = [cluster.run(name, "-V").stdout for name in ("sbatch", "squeue", "sinfo", "sacct", "sacctmgr", "srun")]
    daemons = re.findall(r"SLURM_VERSION\s+= (\S+)", cluster.run("scontrol", "show", "config").stdout)
    daemons += re.findall(r"Version=(\S+)", cluster.run("scontrol", "show", "nodes").stdout)
    assert len({*(text.split()[-1] for text in clients), *daemons}) == 1


def test_labctl_knows_every_state_that_squeue_lists(cluster: SlurmCluster) -> None:
    listed = cluster.run("squeue", "--helpstate", check=False)
    if listed.returncode != 0:
        pytest.skip("this squeue has no --helpstate")
    states = {state.upper() for state in listed.stdout.split()}
    known = {*queue.ENDED, *queue.ON_A_NODE, *queue.WAITING, "CONFIGURING", "SUSPENDED", "STOPPED"}
    assert states - known == {"REVOKED"}  # of a federation, which labctl does not use


def test_a_job_sees_and_is_charged_the_two_gpus_it_asked_for(cluster: SlurmCluster, tmp_path: Path) -> None:
    job_id = submit(cluster, tmp_path, "echo $CUDA_VISIBLE_DEVICES", "--gres=gpu:2", "--partition=dgxh")
    wait_until(lambda: cluster.job(job_id).get("State") == "COMPLETED", "the job to complete")
    record = cluster.job(job_id)
    assert (tmp_path / f"{job_id}.out").read_text() == "0,1\n"
    assert "gres/gpu=2" in record["AllocTRES"].split(",")
    assert record["Account"] == ACCOUNT
    assert record["NodeList"].startswith("dgxh-")


def test_accounting_does_not_know_a_job_that_never_was(cluster: SlurmCluster) -> None:
    assert cluster.job(1) == {}


def test_an_account_the_cluster_does_not_know_is_refused(cluster: SlurmCluster) -> None:
    refused = cluster.run("sbatch", "--account=nobody", "--wrap=true", check=False)
    assert refused.returncode == 1
    assert "Invalid account" in refused.stderr


def test_the_job_of_a_killed_node_dies_with_it_and_is_requeued(cluster: SlurmCluster, tmp_path: Path) -> None:
    job_id, shell = start_job_that_tells_its_pid(cluster, tmp_path)
    node = queued(cluster, job_id)["NodeList"]
    cluster.kill_node(node)
    assert not shell.alive()
    wait_until(lambda: queued(cluster, job_id)["Restarts"] == "1", "the job to be requeued", limit_s=50)
    cluster.start_node(node)


def test_a_pending_job_outlives_the_controller(cluster: SlurmCluster, tmp_path: Path) -> None:
    job_id = submit(cluster, tmp_path, "true", "--hold")
    cluster.stop_controller()
    cluster.start_controller()
    assert queued(cluster, job_id)["JobState"] == "PENDING"
    cluster.release(job_id)
    wait_until(lambda: queued(cluster, job_id)["JobState"] == "COMPLETED", "the released job to complete")


def test_sacct_fails_without_the_database_daemon_and_recovers_with_it(cluster: SlurmCluster) -> None:
    cluster.stop_database_daemon()
    assert cluster.run("sacct", check=False).returncode == 1
    cluster.start_database_daemon()
    assert cluster.run("sacct", check=False).returncode == 0


def test_munge_comes_back_after_a_kill(cluster: SlurmCluster) -> None:
    cluster.stop_munge(signal.SIGKILL)
    cluster.start_munge()
    assert "is UP" in cluster.run("scontrol", "ping").stdout


def test_a_cluster_does_not_outlive_the_killed_process_that_started_it(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Without accounting: a second cluster beside the shared one, and the quicker of the two to start."""
    folder = tmp_path_factory.mktemp("killed")
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tests.slurm.cluster import SlurmCluster\n"
        "SlurmCluster(Path(sys.argv[1]), dgx2_nodes=0, dgxh_nodes=1, accounting=False).start()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parent.parent.parent
    ended = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=root, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    wait_until(lambda: not SlurmCluster.recorded(folder).running_daemons, "the guard to stop every daemon")


def test_a_missing_program_is_reported_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "PROGRAMS", ("slurmctld-of-another-name",))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PartMissing, match=r"^slurmctld-of-another-name not installed; as root: apt-get install"):
        cluster_module.install_slurm()
