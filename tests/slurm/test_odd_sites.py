"""Sites that are set up unlike most: no accounting, no arrays, no requeue, one job a user, MIG slices, a talking sbatch, odd time
formats."""

from __future__ import annotations

import re
import shutil
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_checkpoint

from .chaos import SLEEPER
from .cluster import SlurmCluster
from .conftest import SLEEPING, Lab, let_sleep, own_engine_sleeps, requested, sleeping, started, states, until

APART = ("--runs-per-job=1", "--repeats=1", "--warmup=0")
# How people have Slurm print what they read themselves.
FORMATS = {
    "SLURM_TIME_FORMAT": "relative", "SQUEUE_FORMAT": "%i", "SQUEUE_STATES": "RUNNING", "SQUEUE_SORT": "i",
    "SACCT_FORMAT": "jobid", "SINFO_FORMAT": "%N", "SBATCH_PARTITION": "nowhere", "SLURM_CLUSTERS": "",
}  # fmt: skip
# A site's wrapper around the real sbatch; the job is real.
TALKS = """#!/bin/bash
echo "sbatch: lua: You have 3 jobs and 1234 credits left" >&2
echo "Welcome to the cluster; job 7 of today:"
{sbatch} "$@"
code=$?
echo "Read the news at 127.0.0.1"
exit $code
"""


@pytest.fixture(scope="module")
def plain(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A cluster without accounting, arrays and requeue. `cluster` first: it installs Slurm."""
    folder = tmp_path_factory.mktemp("plain")
    settings = {"accounting": False, "max_array_size": 1, "job_requeue": False, "dgx2_nodes": 0, "dgxh_nodes": 1}
    yield from started(SlurmCluster(folder, **settings))


@pytest.fixture
def plain_lab(plain: SlurmCluster, tmp_path: Path) -> Iterator[Lab]:
    for name in ("home", "lab"):
        (tmp_path / name).mkdir()
    yield Lab(tmp_path / "lab", plain, {"HOME": str(tmp_path / "home")})
    plain.run("scancel", "--account=eecs", check=False)


def test_runs_in_jobs_of_their_own_are_single_jobs_where_the_site_takes_no_arrays(plain_lab: Lab) -> None:
    model = sleeping(plain_lab)
    flags = ("-p", "dgxh", "--model-id", model, "--max-new-tokens=1", "--max-new-tokens=2", "--max-new-tokens=3")
    runs = plain_lab.json("submit", *flags, *APART, "--wait")["runs"]
    assert [run["state"] for run in runs] == ["done"] * 3
    assert len({run["slurm_id"] for run in runs}) == 3
    assert not any("_" in run["slurm_id"] for run in runs)


def test_init_finds_such_a_site_and_both_engines_run_as_reserve_and_render_say(plain_lab: Lab) -> None:
    own_engine_sleeps(plain_lab)
    model = str(write_checkpoint(plain_lab.root / "model"))
    plain_lab.ok("init", "--yes")
    engines = ("--backend=hf", "--backend=vllm", "--runs-per-job=1")
    runs = plain_lab.json("submit", "-p", "dgxh", *engines, "--model-id", model, "--wait")["runs"]
    assert [run["state"] for run in runs] == ["done", "done"]
    assert requested(plain_lab, "-p", "dgxh", model=model)["gres"] == "gpu:2"


def test_without_accounting_an_end_without_a_record_is_told_from_the_queue_and_the_log(plain_lab: Lab) -> None:
    model = sleeping(plain_lab, run_s=60)
    plain_lab.ok("submit", "-p", "dgxh", "--model-id", model)
    until(lambda: plain_lab.json("status")[0]["detail"].startswith("measuring"))
    plain_lab.ok("cancel", "--yes")
    until(lambda: states(plain_lab) == {"cancelled": 1})
    text = SLEEPING.format(name="dgxh", sleeper=SLEEPER, load_s=0, run_s=0)
    plain_lab.settings(text.replace("setup = [", 'setup = ["false", '))
    plain_lab.ok("submit", "-p", "dgxh", "--model-id", model, "--max-new-tokens=2")
    until(lambda: states(plain_lab) == {"failed": 1})
    (run,) = plain_lab.json("status")
    assert (run["kind"], "false" in run["detail"]) == ("setup-failed", True), run


def test_a_time_limit_where_no_job_is_requeued_is_a_timeout_and_retry_goes_on(plain_lab: Lab) -> None:
    model = sleeping(plain_lab, run_s=300)
    plain_lab.ok("submit", "-p", "dgxh", "--model-id", model, *APART, "--time=0-00:01:00")
    until(lambda: states(plain_lab) == {"timeout": 1}, timeout_s=400)
    (run,) = plain_lab.json("status")
    assert (run["state"], run["requeues"]) == ("timeout", 0), run
    let_sleep(plain_lab)
    plain_lab.ok("retry", "--timeout")
    until(lambda: states(plain_lab) == {"done": 1})


@pytest.fixture
def one_job_a_user(cluster: SlurmCluster) -> Iterator[None]:
    limit = ["sacctmgr", "-i", "modify", "user", "root", "set"]
    cluster.run(*limit, "MaxSubmitJobs=1")
    time.sleep(1)  # slurmdbd tells slurmctld
    try:
        yield
    finally:
        cluster.run(*limit, "MaxSubmitJobs=-1")
        time.sleep(1)


def test_where_a_user_may_have_one_job_retry_submits_one_after_the_other(
    fresh_lab: Lab, cluster: SlurmCluster, one_job_a_user: None
) -> None:
    until(lambda: not cluster.run("squeue", "--noheader", "--me").stdout)
    model = sleeping(fresh_lab)
    lengths = ("--max-new-tokens=1", "--max-new-tokens=2")
    done = fresh_lab.labctl("submit", "-p", "dgxh", "--model-id", model, *lengths, *APART, "--wait")
    assert done.returncode == 4, done.stderr
    assert "AssocMaxSubmitJobLimit" in done.stderr
    assert states(fresh_lab) == {"done": 1, "refused": 1}
    until(lambda: not cluster.run("squeue", "--noheader", "--me").stdout)
    fresh_lab.ok("retry", "--missing", "--wait")
    assert states(fresh_lab, "--all") == {"done": 2}


def test_loads_share_a_job_where_a_user_may_have_one(
    fresh_lab: Lab, cluster: SlurmCluster, one_job_a_user: None
) -> None:
    until(lambda: not cluster.run("squeue", "--noheader", "--me").stdout)
    flags = ("-p", "dgxh", "--model-id", sleeping(fresh_lab), "--loads=3", "--repeats=1", "--warmup=0")
    (run,) = fresh_lab.json("submit", *flags, "--wait")["runs"]
    assert run["state"] == "done"


def test_a_talking_sbatch_and_odd_formats_change_nothing(fresh_lab: Lab, tmp_path: Path) -> None:
    programs, path = tmp_path / "site", fresh_lab.cluster.env["PATH"]
    programs.mkdir()
    (programs / "sbatch").write_text(TALKS.format(sbatch=shutil.which("sbatch", path=path)), encoding="utf-8")
    (programs / "sbatch").chmod(0o755)
    variables = {**FORMATS, "PATH": f"{programs}:{path}"}
    model = sleeping(fresh_lab)
    flags = ("-p", "dgxh", "-p", "dgx2", "--dtype=float16", "--model-id", model)
    found = {check["name"]: check["level"] for check in fresh_lab.json("doctor", "-p", "dgxh", **variables)}
    assert (found["partition"], found["job"]) == ("pass", "pass")
    runs = fresh_lab.json("submit", *flags, "--wait", **variables)["runs"]
    assert {run["state"] for run in runs} == {"done"}
    fresh_lab.ok("submit", *flags, "--max-new-tokens=5", "--sbatch", "begin=now+1hour", **variables)
    assert states(fresh_lab) == {"pending": 2}
    fresh_lab.ok("cancel", "--yes", **variables)
    until(lambda: {run["state"] for run in fresh_lab.json("status", **variables)} == {"cancelled"})
    until(lambda: all("by you" in run["detail"] for run in fresh_lab.json("status", **variables)))
    for run in fresh_lab.json("status", **variables):
        assert run["since"].startswith("20"), run


# A site's rules as Slurm's own plugin has them: it talks, refuses --mem, and changes the name and the partition of what it takes.
RULES = """
function slurm_job_submit(job, partitions, user)
  slurm.log_user("You have 1234 credits left")
  if job.pn_min_memory ~= nil and job.pn_min_memory ~= slurm.NO_VAL64 then
    slurm.log_user("memory follows from the GPUs")
    return slurm.ERROR
  end
  job.name = "checked"
  job.partition = "gpu"
  return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, user)
  return slurm.SUCCESS
end
"""
SLICE = "1g.10gb"


def another_site(tmp_path: Path, factory: pytest.TempPathFactory, **settings: Any) -> Iterator[Lab]:
    """A workspace on a cluster of its own with one node."""
    for name in ("home", "lab"):
        (tmp_path / name).mkdir()
    slurm = SlurmCluster(factory.mktemp("site"), accounting=False, dgx2_nodes=0, dgxh_nodes=1, **settings)
    for cluster in started(slurm):
        yield Lab(tmp_path / "lab", cluster, {"HOME": str(tmp_path / "home")})


@pytest.fixture
def ruled_lab(cluster: SlurmCluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    yield from another_site(tmp_path, tmp_path_factory, job_submit=RULES)


@pytest.fixture
def sliced_lab(cluster: SlurmCluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """GPUs with the name that Slurm gives MIG slices."""
    yield from another_site(tmp_path, tmp_path_factory, dgxh_gpu=SLICE)


def test_a_plugin_that_talks_refuses_and_rewrites_is_obeyed(ruled_lab: Lab) -> None:
    own_engine_sleeps(ruled_lab)
    model = str(write_checkpoint(ruled_lab.root / "model"))
    ruled_lab.ok("init", "--yes")
    text = (ruled_lab.root / "labctl.toml").read_text(encoding="utf-8")
    assert tomllib.loads(text)["partitions"]["dgxh"] == {"mem": "none"}
    assert "memory follows from the GPUs" in text
    submit = ("submit", "-p", "dgxh", "--backend=hf", "--backend=vllm", "--model-id", model)
    assert [run["state"] for run in ruled_lab.json(*submit, "--wait")["runs"]] == ["done", "done"]
    assert "mem" not in requested(ruled_lab, "-p", "dgxh", model=model)
    ruled_lab.ok(*submit, "--max-new-tokens=5", "--sbatch", "begin=now+1hour")
    queued = ruled_lab.cluster.run("squeue", "--noheader", "--array", "--format=%j %P").stdout.split("\n")
    assert queued[:2] == ["checked gpu"] * 2
    assert states(ruled_lab) == {"pending": 2}
    ruled_lab.ok("cancel", "--yes")
    until(lambda: states(ruled_lab) == {"cancelled": 2})


def test_slices_are_left_out_by_init_and_refused_until_one_is_chosen(sliced_lab: Lab) -> None:
    sliced_lab.ok("init", "--yes")
    text = (sliced_lab.root / "labctl.toml").read_text(encoding="utf-8")
    assert f"partition dgxh: left out, because its GPUs are MIG slices ({SLICE})" in text
    model = sleeping(sliced_lab)
    submit = ("submit", "-p", "dgxh", "--model-id", model)
    refused = sliced_lab.labctl(*submit)
    assert (refused.returncode, f"are MIG slices: {SLICE}" in refused.stderr) == (3, True), refused.stderr
    keys = f'gpu_type = "{SLICE}"\ngpus = 1\ngpu_memory_gib = 10\n'
    sliced_lab.settings(
        SLEEPING.format(name="dgxh", sleeper=SLEEPER, load_s=0, run_s=0).replace("]\n", f"]\n{keys}", 1)
    )
    (run,) = sliced_lab.json(*submit, "--wait")["runs"]
    assert run["state"] == "done"
    assert requested(sliced_lab, "-p", "dgxh", model=model)["gres"] == f"gpu:{SLICE}:1"
    refused = sliced_lab.labctl(*submit, "--backend=vllm")
    assert (refused.returncode, "vLLM reads no UUID of a MIG slice" in refused.stderr) == (3, True), refused.stderr


@pytest.fixture
def full_lab(cluster: SlurmCluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A queue for two jobs, with two in it."""
    for lab in another_site(tmp_path, tmp_path_factory, max_array_size=1, max_job_count=2):
        for _ in range(2):
            words = ("--partition=dgxh", "--mem=1G", "--begin=now+1hour", "--wrap=true")
            lab.cluster.run("timeout", "5", "sbatch", *words, check=False)  # 22.05 has room for one alone
        yield lab


@pytest.mark.nightly
def test_a_full_queue_is_a_refusal_in_the_words_of_slurm(full_lab: Lab) -> None:
    """After the 120 s in which sbatch tries again."""
    done = full_lab.labctl("submit", "-p", "dgxh", "--model-id", sleeping(full_lab), "--no-preflight")
    assert done.returncode == 4, done.stderr
    assert re.search("MaxJobCount limit reached|Resource temporarily unavailable", " ".join(done.stderr.split()))
    assert states(full_lab) == {"refused": 1}
