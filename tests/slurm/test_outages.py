"""Outages of Slurm, and preemption, on a cluster of this file's own: its daemons are stopped. An engine that sleeps stands in."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import SlurmCluster
from .conftest import Lab, job_of, lengths, sleeping, starts_of, states, until


@pytest.fixture(scope="module")
def shaken(tmp_path_factory: pytest.TempPathFactory, cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """A cluster whose parts these tests take away; `cluster`, which is there, says that one can be started."""
    with SlurmCluster(tmp_path_factory.mktemp("shaken"), grace_s=0) as own:
        yield own


@pytest.fixture
def shaken_lab(shaken: SlurmCluster, tmp_path: Path) -> Lab:
    (tmp_path / "home").mkdir()
    (tmp_path / "lab").mkdir()
    return Lab(tmp_path / "lab", shaken, {"HOME": str(tmp_path / "home")})


def test_a_preempted_job_goes_on_later_with_what_is_missing_and_leaves_no_failure(
    shaken_lab: Lab, shaken: SlurmCluster
) -> None:
    model = sleeping(shaken_lab, run_s=3)
    flags = ["-p", "dgxh", "--model-id", model, "--repeats=1", "--warmup=0", "--sbatch=nodelist=dgxh-1"]
    shaken_lab.json("submit", *flags, *lengths(6))
    until(lambda: states(shaken_lab)["done"] >= 1)
    urgent = ["-A", "eecs", "-p", "urgent", "-w", "dgxh-1", "--gres=gpu:8", "-o", "/dev/null", "--wrap", "sleep 4"]
    job = shaken.run("sbatch", "--parsable", *urgent).stdout.strip()
    until(lambda: shaken.run("squeue", "-h", "-j", job, "-o", "%T").stdout.strip() == "RUNNING")
    assert not {"failed", "cancelled"} & set(states(shaken_lab))
    until(lambda: states(shaken_lab) == {"done": 6}, 150)
    assert {run["requeues"] for run in shaken_lab.json("status")} == {1}
    records = list((shaken_lab.root / ".labctl" / "results").glob("*/[!.]*.json"))
    assert [json.loads(path.read_text())["status"] for path in records] == ["done"] * 6
    until(lambda: job_of(shaken_lab)["held_s"] is not None)
    (slurm_id,) = {run["slurm_id"] for run in shaken_lab.json("status")}
    starts = starts_of(shaken_lab, slurm_id)
    assert (len(starts), job_of(shaken_lab)["held_s"]) == (2, sum(starts))


def test_status_answers_within_twelve_seconds_while_the_controller_is_down_and_is_right_again_after(
    shaken_lab: Lab, shaken: SlurmCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    model = sleeping(shaken_lab, run_s=12)
    flags = ["-p", "dgxh", "--model-id", model, "--repeats=1", "--warmup=0"]
    shaken_lab.json("submit", *flags, *lengths(3), "--runs-per-job=1", "--jobs-at-once=2")
    until(lambda: states(shaken_lab) == {"running": 2, "pending": 1})
    shaken.stop_controller()
    try:
        began = time.monotonic()
        done = shaken_lab.labctl("status", "--json")
        took_s = time.monotonic() - began
        assert Counter(run["state"] for run in json.loads(done.stdout)) == {"running": 2, "pending": 1}
        assert "Slurm did not answer; the states are" in done.stderr
        assert " old" in done.stderr
    finally:
        shaken.start_controller()
    with capsys.disabled():
        print(f"\nlabctl status with slurmctld down: {took_s:.1f} s")
    assert took_s < 12
    seen = states(shaken_lab)  # on a slow machine jobs end within the outage
    assert seen["running"] + seen["pending"] + seen["done"] == 3
    until(lambda: states(shaken_lab) == {"done": 3})


def test_no_state_is_worse_while_the_accounting_is_down(shaken_lab: Lab, shaken: SlurmCluster) -> None:
    model = sleeping(shaken_lab, run_s=5)
    flags = ["-p", "dgxh", "--model-id", model, "--repeats=1", "--warmup=0"]
    shaken_lab.json("submit", *flags, *lengths(3), "--runs-per-job=1", "--jobs-at-once=1")
    until(lambda: states(shaken_lab)["done"] >= 1)
    shaken.stop_database_daemon()
    try:
        seen = Counter[str]()
        while states(shaken_lab) != {"done": 3}:
            seen.update(states(shaken_lab))
            time.sleep(0.5)
            assert sum(seen.values()) < 300
        assert set(seen) <= {"done", "running", "pending"}
    finally:
        shaken.start_database_daemon()
    assert states(shaken_lab) == {"done": 3}
