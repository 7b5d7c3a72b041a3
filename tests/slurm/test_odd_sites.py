"""Sites that are set up unlike most: no accounting, no arrays, no requeue, one job a user, a talking sbatch, odd time formats."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .chaos import SLEEPER
from .cluster import SlurmCluster
from .conftest import SLEEPING, Lab, let_sleep, sleeping, started, states, until

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
    until(lambda: states(plain_lab) == {"timeout": 1}, timeout_s=200)
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
