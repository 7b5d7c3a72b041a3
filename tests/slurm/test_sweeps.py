"""Sweeps on a real cluster: what packing spares, two shells at once, limits, engine loads, cancel, requeue.

The runs of SmolLM2 are real; where it says so, an engine that sleeps stands in (tests/slurm/sleeper).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_checkpoint

from .chaos import SLEEPER
from .cluster import SlurmCluster
from .conftest import SLEEPING, Lab, job_of, lengths, sleeping, starts_of, states, until


def queued(lab: Lab) -> list[str]:
    """The names and ids of the jobs of this lab in the queue, a line for each task."""
    names = {f"labctl-{folder.name}" for folder in (lab.root / ".labctl" / "arrays").iterdir()}
    lines = lab.cluster.run("squeue", "--noheader", "--array", "--format=%j %i").stdout.splitlines()
    return [line for line in lines if line.split()[0] in names]


# ---------------------------------------------------------------- what packing spares


def gpu_seconds(lab: Lab, runs: list[dict[str, Any]]) -> float:
    """GPUs x seconds that the jobs of these runs held, by sacct."""
    jobs = ",".join(sorted({run["slurm_id"] for run in runs}))
    held = 0.0
    for line in lab.cluster.run(
        "sacct", "-n", "-X", "-P", "-j", jobs, "--format=ElapsedRaw,AllocTRES"
    ).stdout.splitlines():
        elapsed, _, resources = line.partition("|")
        gpus = [part.partition("=")[2] for part in resources.split(",") if part.startswith("gres/gpu=")]
        held += float(elapsed) * int(gpus[0])
    return held


def measured_ratio(lab: Lab, cells: int, *flags: str) -> float:
    """GPU-seconds of cells in one job over those of the same cells one a job."""
    packed = lab.json("submit", *flags, *lengths(cells), "--wait")["runs"]
    assert len({run["slurm_id"] for run in packed}) == 1
    assert {run["state"] for run in packed} == {"done"}
    alone = ("--runs-per-job=1", "--jobs-at-once=6", "--again", "--wait")
    apart = lab.json("submit", *flags, *lengths(cells), *alone)["runs"]
    assert len({run["slurm_id"] for run in apart}) == cells
    assert {run["state"] for run in apart} == {"done"}
    time.sleep(2)  # the accounting is a second behind
    return gpu_seconds(lab, packed) / gpu_seconds(lab, apart)


@pytest.mark.nightly
def test_twelve_cells_of_a_real_model_in_one_job_hold_gpus_for_less_than_one_a_job(
    fresh_lab: Lab, smollm2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next test is its short form: the same jobs of an engine that sleeps."""
    ratio = measured_ratio(fresh_lab, 12, "-p", "dgxh", "--model-id", str(smollm2), "--repeats=1", "--warmup=0")
    with capsys.disabled():
        print(f"\nGPU-seconds, packed / one a job: SmolLM2-135M on CPUs {ratio:.2f}")
    assert ratio < 0.6


# A 7B model of bfloat16 on two H100: some 60 s from the start of the job to a ready engine (imports, 13.5 GB from a network
# file system), and 4 s for a warm-up and three repeats of 32 tokens at 30 ms each. Here in a thirtieth of the time.
LOAD_7B_S, RUN_7B_S, TIMES_FASTER = 60.0, 4.0, 30.0


def test_twelve_cells_at_the_ratio_of_load_to_run_of_a_7b_model_hold_gpus_for_at_most_three_tenths(
    fresh_lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    """An engine that sleeps stands in."""
    model = sleeping(fresh_lab, load_s=LOAD_7B_S / TIMES_FASTER, run_s=RUN_7B_S / TIMES_FASTER)
    ratio = measured_ratio(fresh_lab, 12, "-p", "dgxh", "--model-id", model, "--repeats=1", "--warmup=0")
    with capsys.disabled():
        print(
            f"\nGPU-seconds, packed / one a job: load {LOAD_7B_S:.0f} s to run {RUN_7B_S:.0f} s, as a 7B model: {ratio:.2f}"
        )
    assert ratio <= 0.3


# ---------------------------------------------------------------- two shells, limits


def test_two_shells_that_submit_the_same_cells_at_once_queue_each_once(fresh_lab: Lab) -> None:
    model = sleeping(fresh_lab)
    command = [
        str(Path(sys.executable).parent / "labctl"), "submit", "-p", "dgxh", "--model-id", model, *lengths(200),
        "--runs-per-job=1", "--sbatch=begin=now+1hour", "--json",
    ]  # fmt: skip
    environment = {**fresh_lab.cluster.env, **fresh_lab.environment}
    shells = [
        subprocess.Popen(command, cwd=fresh_lab.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for shell in shells:
        output, errors = shell.communicate(timeout=120)
        assert shell.returncode == 0, errors
        assert len(json.loads(output)["runs"]) == 200
    assert len(queued(fresh_lab)) == 200
    assert states(fresh_lab, "--all") == {"pending": 200}
    fresh_lab.ok("cancel", "--all", "--yes")
    until(lambda: not queued(fresh_lab))
    assert states(fresh_lab, "--all") == {"cancelled": 200}


@pytest.fixture
def at_most_thirty_jobs(cluster: SlurmCluster) -> Iterator[None]:
    """A submit limit of the user's."""
    limit = ["sacctmgr", "-i", "modify", "user", "root", "set"]
    cluster.run(*limit, "MaxSubmitJobs=30")
    time.sleep(1)  # slurmdbd tells slurmctld
    try:
        yield
    finally:
        cluster.run(*limit, "MaxSubmitJobs=-1")
        time.sleep(1)


def test_as_many_jobs_are_queued_as_slurm_takes_and_the_rest_is_retryable(
    fresh_lab: Lab, cluster: SlurmCluster, at_most_thirty_jobs: None
) -> None:
    model = sleeping(fresh_lab)
    held = ["--runs-per-job=1", "--sbatch=begin=now+1hour"]
    done = fresh_lab.labctl("submit", "-p", "dgxh", "--model-id", model, *lengths(50), *held)
    assert done.returncode == 4
    assert "AssocMaxSubmitJobLimit" in done.stderr
    assert "resubmit the rest with labctl retry" in done.stderr
    assert states(fresh_lab) == {"pending": 30, "refused": 20}
    assert len(queued(fresh_lab)) == 30
    cluster.run("sacctmgr", "-i", "modify", "user", "root", "set", "MaxSubmitJobs=-1")
    time.sleep(1)
    assert len(fresh_lab.json("retry", "--missing")["runs"]) == 20
    assert len(queued(fresh_lab)) == 50
    fresh_lab.ok("cancel", "--yes")


# ---------------------------------------------------------------- engine loads


def a_short_run(model: str, tokens: int) -> list[str]:
    return ["-p", "dgxh", "--model-id", model, f"--max-new-tokens={tokens}", "--repeats=2", "--warmup=0"]


def records_of(lab: Lab, run_id: str) -> list[dict[str, Any]]:
    """The run's records, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(lab.root.glob(f".labctl/results/{run_id}/[!.]*.json"))]


def loads_that_compare_pools(lab: Lab, run_id: str) -> tuple[int, str]:
    (row,) = lab.json("compare", run_id, "--metric", "output_tok_s")["blocks"][0]["rows"]
    assert len(set(row["loads"])) == row["n"]
    return row["n"], row["n_of"]


def test_again_three_times_at_once_is_three_jobs_three_records_and_three_loads(fresh_lab: Lab) -> None:
    """An engine that sleeps stands in."""
    asked = a_short_run(sleeping(fresh_lab), 4)
    command = [str(Path(sys.executable).parent / "labctl"), "submit", *asked, "--again", "--json"]
    environment = {**fresh_lab.cluster.env, **fresh_lab.environment}
    shells = [
        subprocess.Popen(command, cwd=fresh_lab.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for shell in shells:
        output, errors = shell.communicate(timeout=120)
        assert shell.returncode == 0, errors
        assert b"queued 1 run in 1 engine load (1 job)" in errors
    (run,) = json.loads(output)["runs"]
    run_id = run["run_id"]
    until(lambda: states(fresh_lab) == {"done": 1}, timeout_s=180)
    found = records_of(fresh_lab, run_id)
    assert [record["status"] for record in found] == ["done"] * 3
    assert len({record["attempt"]["slurm_job_id"] for record in found}) == 3
    assert len(list(fresh_lab.root.glob(".labctl/arrays/*/attempts/*.json"))) == 3
    assert loads_that_compare_pools(fresh_lab, run_id) == (3, "engine loads")


@pytest.mark.parametrize(
    ("flags", "jobs", "real"),
    [
        ([], 3, False),
        (["--jobs-at-once=1"], 1, False),
        pytest.param(["--jobs-at-once=1"], 1, True, marks=pytest.mark.nightly),
    ],
    ids=["three jobs that sleep", "one job that sleeps", "one job"],
)
def test_three_engine_loads_of_a_run(
    fresh_lab: Lab, request: pytest.FixtureRequest, flags: list[str], jobs: int, real: bool
) -> None:
    """Nightly: a real engine, which each load in one job imports anew. In `make test`: engines that sleep."""
    model = str(request.getfixturevalue("shallow")) if real else sleeping(fresh_lab)
    asked = [*a_short_run(model, 4), *flags]
    said = fresh_lab.labctl("submit", *asked, "--loads=3", "--wait").stderr
    assert f"queued 1 run in 3 engine loads ({jobs} job{'s' if jobs > 1 else ''})" in said
    (run,) = fresh_lab.json("status")
    assert (run["state"], run["loads_measured"]) == ("done", 3), run
    found = records_of(fresh_lab, run["run_id"])
    assert len({record["attempt"]["slurm_job_id"] for record in found}) == jobs
    assert sorted(record["attempt"]["load"] for record in found) == ([1] * 3 if jobs == 3 else [1, 2, 3])
    assert len({record["repeats"][0]["samples"][0]["text"] for record in found}) == 1
    assert all(record["load_s"] > 0 for record in found)
    assert not real or all(record["init_s"] > 0.5 for record in found)  # each imports torch anew
    assert loads_that_compare_pools(fresh_lab, run["run_id"]) == (3, "engine loads")
    assert "already measured in 3 engine loads" in fresh_lab.labctl("submit", *asked, "--loads=3").stderr
    said = fresh_lab.labctl("submit", *asked, "--loads=4", "--wait").stderr
    assert "queued 1 run in 1 engine load (1 job)" in said
    assert loads_that_compare_pools(fresh_lab, run["run_id"]) == (4, "engine loads")


def test_a_requeued_job_goes_on_in_the_engine_load_that_it_was_in(fresh_lab: Lab) -> None:
    """An engine that sleeps stands in."""
    model = sleeping(fresh_lab, run_s=2.0)
    asked = ["-p", "dgxh", "--model-id", model, "--max-new-tokens=2", "--repeats=1", "--warmup=0", "--jobs-at-once=1"]
    (run,) = fresh_lab.json("submit", *asked, "--loads=4")["runs"]
    until(lambda: len(records_of(fresh_lab, run["run_id"])) >= 2)
    fresh_lab.cluster.run("scontrol", "requeue", run["slurm_id"])
    until(lambda: states(fresh_lab) == {"done": 1}, timeout_s=180)
    found = records_of(fresh_lab, run["run_id"])
    assert sorted(record["attempt"]["load"] for record in found) == [1, 2, 3, 4]
    assert {record["status"] for record in found} == {"done"}
    assert {record["attempt"]["restarts"] for record in found} == {0, 1}


# ---------------------------------------------------------------- cancel, requeue


def test_a_pending_array_and_a_running_packed_job_are_cancelled_and_retried(fresh_lab: Lab) -> None:
    model = sleeping(fresh_lab, run_s=1.0)
    flags = ["-p", "dgxh", "--model-id", model, "--repeats=1", "--warmup=0", *lengths(12)]
    fresh_lab.json("submit", *flags, "--runs-per-job=4", "--jobs-at-once=1")
    until(lambda: states(fresh_lab)["done"] >= 1)
    fresh_lab.ok("cancel", "--yes")
    until(lambda: states(fresh_lab)["cancelled"] + states(fresh_lab)["done"] == 12)
    done = states(fresh_lab)["done"]
    assert 1 <= done <= 4
    assert len(fresh_lab.json("retry")["runs"]) == 12 - done
    until(lambda: states(fresh_lab) == {"done": 12})


def test_a_pass_in_which_slurm_suspended_the_job_is_measured_again(fresh_lab: Lab) -> None:
    model = sleeping(fresh_lab, run_s=4.0)
    flags = ["-p", "dgxh", "--model-id", model, "--repeats=2", "--warmup=0", "--max-new-tokens=2"]
    (run,) = fresh_lab.json("submit", *flags)["runs"]
    until(lambda: fresh_lab.json("status")[0]["detail"].startswith("measuring"))
    fresh_lab.cluster.run("scontrol", "suspend", run["slurm_id"])
    until(lambda: states(fresh_lab) == {"suspended": 1})
    time.sleep(4.0)
    fresh_lab.cluster.run("scontrol", "resume", run["slurm_id"])
    until(lambda: states(fresh_lab) == {"done": 1})
    (record,) = (fresh_lab.root / ".labctl" / "results").glob("*/[!.]*.json")
    repeats = json.loads(record.read_text())["repeats"]
    assert sum(repeat["discarded"] for repeat in repeats) == 1
    assert all(4.0 <= repeat["wall_s"] < 8.0 for repeat in repeats)


def test_a_requeued_job_goes_on_with_what_is_missing_and_is_told_as_requeued(fresh_lab: Lab) -> None:
    model = sleeping(fresh_lab, run_s=1.5)
    (slurm_id,) = {
        run["slurm_id"]
        for run in fresh_lab.json(
            "submit", "-p", "dgxh", "--model-id", model, "--repeats=1", "--warmup=0", *lengths(4)
        )["runs"]
    }
    until(lambda: states(fresh_lab)["done"] >= 1)
    fresh_lab.cluster.run("scontrol", "requeue", slurm_id)
    until(lambda: states(fresh_lab)["pending"] >= 1)
    waiting = [run for run in fresh_lab.json("status") if run["state"] == "pending"]
    assert not [run for run in fresh_lab.json("status") if run["state"] in ("failed", "cancelled")]
    assert waiting
    until(lambda: states(fresh_lab) == {"done": 4})
    assert {run["requeues"] for run in fresh_lab.json("status")} == {1}
    records = list((fresh_lab.root / ".labctl" / "results").glob("*/[!.]*.json"))
    assert [json.loads(path.read_text())["status"] for path in records] == ["done"] * 4
    until(lambda: job_of(fresh_lab)["held_gpu_s"] is not None)
    first, second = starts_of(fresh_lab, slurm_id)
    job = job_of(fresh_lab)
    assert first > 0
    assert job["held_s"] == first + second
    assert (job["gpus"], job["starts"], job["runs_done"], job["state"]) == (2, 2, 4, "COMPLETED")
    assert (job["held_gpu_s"], job["limit_gpu_s"]) == (2 * (first + second), 2 * 3600)
    spent = [job[f"{part}_gpu_s"] for part in ("load", "warmup", "measured", "rest")]
    assert sum(spent) == pytest.approx(job["held_gpu_s"], abs=0.01)
    assert {row["gpu_s"] for row in fresh_lab.json("query", "SELECT gpu_s FROM measured_runs")} == {job["held_gpu_s"]}
    (row,) = fresh_lab.json("query", "SELECT min(started_at) AS first FROM job_starts")
    # Slurm's time of submission is that of the requeue: queue_s is the latest wait.
    assert job["queued_at"] > row["first"]


# Name: seconds of a load, seconds of a run, whether Slurm may requeue the job.
LIMITED = {
    "requeued": (0.1, 300, True),
    "once": (0.1, 300, False),
    "loading": (300, 1, True),
    "loading_once": (300, 1, False),
}


def test_a_time_limit_is_called_so_in_every_phase_and_without_progress_nothing_is_requeued(fresh_lab: Lab) -> None:
    texts = []
    for name, (load_s, run_s, requeue) in LIMITED.items():
        text = SLEEPING.format(name=name, sleeper=SLEEPER, load_s=load_s, run_s=run_s)
        option = "requeue" if requeue else "no-requeue"
        own = f'device = "cpu"\nslurm_partition = "dgxh"\nsbatch = {{ {option} = true }}'
        texts.append(text.replace('device = "cpu"', own))
    fresh_lab.settings("\n".join(texts))
    flags = ["--model-id", str(write_checkpoint(fresh_lab.root / "model")), "--repeats=1", "--warmup=0"]
    done = fresh_lab.labctl("submit", *(f"--partition={name}" for name in LIMITED), *flags, "--time=0-00:01:00")
    assert done.returncode == 0, done.stderr
    assert "is short: 1 min" in done.stderr
    until(lambda: states(fresh_lab) == {"timeout": len(LIMITED)}, 240)
    told = {(run["partition"], run["kind"], run["requeues"]) for run in fresh_lab.json("status")}
    assert told == {(name, "time-limit", 0) for name in LIMITED}
