"""init, doctor, submit, reserve at sites of different kinds: without accounting, with two accounts, a partition that is down,
nodes that are full or drained. On a real cluster."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from labctl_slurm import site
from tests.conftest import write_checkpoint

from .cluster import SlurmCluster
from .conftest import CPU_PARTITIONS, Lab
from .walk import Terminal

OTHER_ACCOUNT = "physics"


@pytest.fixture
def site_lab(fresh_lab: Lab) -> Lab:
    """A workspace without a labctl.toml, as it is on the first day; that these nodes compute on CPUs, the user's own says."""
    (fresh_lab.root / "labctl.toml").unlink()
    own_settings(fresh_lab.environment["HOME"])
    return fresh_lab


def own_settings(home: str) -> None:
    folder = Path(home) / ".config" / "labctl"
    folder.mkdir(parents=True)
    (folder / "labctl.toml").write_text(CPU_PARTITIONS, encoding="utf-8")


@pytest.fixture
def asked_here(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    """The cluster, which this process's own questions go to."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.env[name])
    return cluster


@pytest.fixture
def two_accounts(cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    cluster.add_account(OTHER_ACCOUNT)
    yield cluster
    cluster.remove_account(OTHER_ACCOUNT)


@contextmanager
def partition(cluster: SlurmCluster, name: str, state: str) -> Iterator[None]:
    cluster.run("scontrol", "update", f"partitionname={name}", f"state={state}")
    try:
        yield
    finally:
        cluster.run("scontrol", "update", f"partitionname={name}", "state=up")


def settings_of(lab: Lab) -> dict[str, Any]:
    return tomllib.loads((lab.root / "labctl.toml").read_text(encoding="utf-8"))


def submitted(lab: Lab, *arguments: str) -> subprocess.CompletedProcess[str]:
    model = lab.root / "model"
    if not model.exists():
        write_checkpoint(model)
    return lab.labctl("submit", "--model-id", str(model), *arguments)


def checks(lab: Lab, *arguments: str, **variables: str) -> dict[str, dict[str, str]]:
    """doctor's checks by partition and name; its exit code says whether one failed."""
    done = lab.labctl("doctor", *arguments, "--json", **variables)
    found = json.loads(done.stdout)
    assert done.returncode == int(any(check["level"] == "fail" for check in found)), done.stderr
    assert "Traceback" not in done.stderr
    return {f"{check['partition']} {check['name']}".strip(): check for check in found}


# ---------------------------------------------------------------- what Slurm says


def test_what_slurm_says_of_its_partitions_is_read(asked_here: SlurmCluster) -> None:
    found = {partition.name: partition for partition in site.partitions()}
    assert set(found) == {"gpu", "dgx2", "dgxh"}
    assert (found["dgxh"].gpu_types, found["dgxh"].max_time_s, found["dgxh"].usable_nodes) == (
        {"h100": 8},
        2 * 86400,
        2,
    )
    assert found["gpu"].is_default
    assert found["gpu"].gpu_types == {"v100": 16, "h100": 8}
    assert site.accounts() == site.Accounts(("eecs",), "eecs")
    assert site.version() == asked_here.run("sinfo", "--version").stdout.split()[-1]


def test_what_answers_for_a_script_in_the_environment_does_not_answer_for_labctl(
    asked_here: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SINFO_FORMAT", "%N")
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    assert site.try_script("#!/bin/bash\n#SBATCH --partition=dgxh\ntrue\n").accepted
    refused = site.try_script("#!/bin/bash\n#SBATCH --partition=nowhere\ntrue\n")
    assert (refused.accepted, "partition" in refused.message) == (False, True)
    assert site.partitions()[0].nodes


# ---------------------------------------------------------------- init


def test_init_proposes_the_shipped_names_and_the_only_account(site_lab: Lab) -> None:
    answer = site_lab.json("init")
    assert [found["name"] for found in answer["partitions"]] == ["dgx2", "dgxh"]
    assert (answer["account"], answer["default"]) == ("eecs", "dgxh")
    assert any(
        note.startswith("partition gpu: left out, because its nodes have different GPUs") for note in answer["notes"]
    )
    settings = settings_of(site_lab)
    assert settings == {
        "defaults": {"partition": "dgxh"},
        "partitions": {"dgx2": {"account": "eecs"}, "dgxh": {"account": "eecs"}},
    }
    assert submitted(site_lab, "--dry-run").returncode == 0


def test_init_with_two_accounts_takes_none_and_says_how_to_choose(site_lab: Lab, two_accounts: SlurmCluster) -> None:
    done = site_lab.labctl("init", "--yes")
    assert done.returncode == 0
    assert "set account in labctl.toml, or give --account" in done.stderr
    assert settings_of(site_lab)["partitions"] == {"dgx2": {}, "dgxh": {}}
    text = (site_lab.root / "labctl.toml").read_text(encoding="utf-8")
    assert '# account = "physics"' in text
    assert '# account = "eecs"' in text


def test_init_takes_the_account_that_is_given_and_no_other_than_ones_own(
    site_lab: Lab, two_accounts: SlurmCluster
) -> None:
    wrong = site_lab.labctl("init", "--account", "phisics")
    assert (wrong.returncode, "did you mean 'physics'?" in wrong.stderr) == (2, True)
    assert not (site_lab.root / "labctl.toml").exists()
    site_lab.ok("init", "--yes", "--account", OTHER_ACCOUNT)
    assert settings_of(site_lab)["partitions"]["dgxh"] == {"account": OTHER_ACCOUNT}
    assert checks(site_lab, "-p", "dgxh")["dgxh account"]["text"] == OTHER_ACCOUNT


def test_init_asks_at_a_terminal_for_what_only_a_person_can_say(site_lab: Lab, two_accounts: SlurmCluster) -> None:
    programs = f"{Path(sys.executable).parent}:{two_accounts.env['PATH']}"
    terminal = Terminal({**two_accounts.env, **site_lab.environment, "PATH": programs, "TERM": "xterm"}, site_lab.root)
    seen = terminal.type("labctl init", "nobodys", OTHER_ACCOUNT, "dgx2", "", "~/h100/bin/python", shown=False)
    assert "you have 2 accounts (Slurm's default: eecs)" in seen
    assert settings_of(site_lab) == {
        "defaults": {"partition": "dgx2"},
        "partitions": {
            "dgx2": {"account": OTHER_ACCOUNT},
            "dgxh": {"account": OTHER_ACCOUNT, "python": f"{site_lab.environment['HOME']}/h100/bin/python"},
        },
    }


def test_init_of_a_workspace_that_is_one_changes_nothing_and_print_writes_nothing(site_lab: Lab) -> None:
    printed = site_lab.ok("init", "--print")
    assert not (site_lab.root / ".labctl").exists()
    site_lab.ok("init")
    assert (site_lab.root / "labctl.toml").read_text(encoding="utf-8") == printed
    again = site_lab.labctl("init")
    assert (again.returncode, "already a workspace" in again.stderr) == (2, True)


# ---------------------------------------------------------------- two accounts, a partition that is down, a full node


def test_submit_with_two_accounts_names_the_one_that_is_charged(site_lab: Lab, two_accounts: SlurmCluster) -> None:
    unsaid = submitted(site_lab, "-p", "dgxh", "--dry-run")
    assert (unsaid.returncode, "so Slurm charges: eecs" in unsaid.stderr) == (0, True)
    assert "Slurm charges" not in submitted(site_lab, "-p", "dgxh", "-A", OTHER_ACCOUNT, "--dry-run").stderr
    assert checks(site_lab, "-p", "dgxh")["dgxh account"]["level"] == "warn"


def test_an_account_of_others_is_refused_before_the_queue_with_ones_own_named(site_lab: Lab) -> None:
    done = submitted(site_lab, "-p", "dgxh", "-A", "nobodys")
    assert done.returncode == 3
    assert "Slurm refuses account 'nobodys'" in done.stderr
    assert "you have eecs" in done.stderr
    assert not (site_lab.root / ".labctl").exists()


def test_a_partition_that_is_down_is_told_and_the_job_waits_in_it(site_lab: Lab, cluster: SlurmCluster) -> None:
    with partition(cluster, "dgx2", "down"):
        assert checks(site_lab, "-p", "dgx2")["dgx2 partition"]["level"] == "warn"
        assert "down; 2 nodes" in site_lab.ok("init", "--print")
        done = submitted(site_lab, "-p", "dgx2", "--dtype=float16")
        assert (done.returncode, "Slurm's partition dgx2 is down" in done.stderr) == (0, True)
        (run,) = site_lab.json("status")
        assert run["state"] == "pending"
        site_lab.ok("cancel", "--yes")


def test_a_partition_that_takes_no_jobs_is_refused(site_lab: Lab, cluster: SlurmCluster) -> None:
    with partition(cluster, "dgx2", "drain"):
        done = submitted(site_lab, "-p", "dgx2", "--dtype=float16")
        assert (done.returncode, "takes no jobs: drain" in done.stderr) == (3, True)
        assert checks(site_lab, "-p", "dgx2")["dgx2 partition"]["level"] == "fail"


def test_drained_nodes_are_told_with_their_reason_and_do_not_forbid_to_queue(
    site_lab: Lab, cluster: SlurmCluster
) -> None:
    cluster.run("scontrol", "update", "nodename=dgx2-1,dgx2-2", "state=drain", "reason=disk broken")
    try:
        done = submitted(site_lab, "-p", "dgx2", "--dtype=float16", "--dry-run")
        assert done.returncode == 0
        assert "disk broken" in done.stderr
        assert checks(site_lab, "-p", "dgx2")["dgx2 partition"]["level"] == "warn"
    finally:
        cluster.run("scontrol", "update", "nodename=dgx2-1,dgx2-2", "state=resume")


def test_full_nodes_are_no_reason_to_refuse_and_doctor_tells_when_a_job_would_start(
    site_lab: Lab, cluster: SlurmCluster
) -> None:
    before = checks(site_lab, "-p", "dgxh")["dgxh job"]["text"]
    taken = [
        cluster.run(
            "sbatch",
            "--parsable",
            "--output=/dev/null",
            "-p",
            "dgxh",
            "--exclusive",
            "--gres=gpu:8",
            "-t",
            "60",
            "--wrap",
            "sleep 600",
        ).stdout.strip()
        for _ in range(2)
    ]
    try:
        deadline = time.monotonic() + 30
        while cluster.run("sinfo", "-h", "-p", "dgxh", "-o", "%T").stdout.split() != ["allocated"]:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        found = checks(site_lab, "-p", "dgxh")
        assert found["dgxh job"]["level"] == "pass"
        assert "2 allocated" in found["dgxh partition"]["text"]
        assert start_in(found["dgxh job"]["text"]) > start_in(before)
        done = submitted(site_lab, "-p", "dgxh")
        assert (done.returncode, "takes jobs" in done.stderr) == (0, False)
        (run,) = site_lab.json("status")
        assert run["state"] == "pending"
        site_lab.ok("cancel", "--yes")
        late = site_lab.labctl("doctor", "-p", "dgxh", "--on-node", "--within", "0.05", "--json")
        node = next(check for check in json.loads(late.stdout) if check["name"] == "node")
        assert "no answer within" in node["text"]
        assert cluster.run("squeue", "-h", "-t", "pending", "-o", "%j").stdout == ""
    finally:
        cluster.run("scancel", *taken)
        cluster.wait_idle(60)


def start_in(said: str) -> str:
    """The time that doctor says a job would start at; ISO 8601 sorts."""
    return said.rpartition("start at ")[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--time", "3-00:00:00"], "time limit above that of Slurm's partition dgxh (2-00:00:00)"),
        (["--gpus", "9"], "has 9 GPUs: 8 at most"),
        (["--mem", "9000G"], "9000G of memory"),
        (["--qos", "nobodys"], "Invalid qos"),
    ],
)
def test_what_would_wait_for_ever_or_be_refused_is_refused_at_once(
    site_lab: Lab, arguments: list[str], said: str
) -> None:
    done = submitted(site_lab, "-p", "dgxh", *arguments)
    assert (done.returncode, said in done.stderr) == (3, True), done.stderr
    assert not (site_lab.root / ".labctl").exists()


# ---------------------------------------------------------------- doctor on a node, reserve


def test_doctor_on_a_node_tells_what_a_real_job_saw_there(site_lab: Lab) -> None:
    """These nodes have devices that stand in for GPUs: Slurm gives them, and no driver sees one. A Python without torch, which
    is slow to load."""
    bare = Path(sys.base_prefix) / "bin" / "python3"
    site_lab.settings(f'[partitions.dgxh]\ndevice = "cuda"\npython = "{bare}"\n')
    found = checks(site_lab, "-p", "dgxh", "--on-node")
    assert found["dgxh node"]["level"] == "pass"
    assert "dgxh-" in found["dgxh node"]["text"]
    assert found["dgxh gpus"]["level"] == "fail"
    assert found["dgxh gpus"]["text"] == "0 of 2 (CUDA_VISIBLE_DEVICES=0,1)"
    assert found["dgxh nvidia-smi"]["level"] == "fail"
    assert found["dgxh node's torch"]["text"] == "not installed"
    assert list((site_lab.root / ".labctl" / "doctor").iterdir())  # kept where something is wrong


def test_doctor_on_a_node_tells_a_python_that_is_not_there(site_lab: Lab) -> None:
    site_lab.settings('[partitions.dgxh]\npython = "/no/such/python"\ndevice = "cpu"\n')
    found = checks(site_lab, "-p", "dgxh", "--on-node")
    assert found["dgxh python"]["level"] == "fail"
    assert "/no/such/python" in found["dgxh node"]["text"]
    assert "No such file" in found["dgxh node"]["text"] or "not found" in found["dgxh node"]["text"]


def test_doctor_on_a_node_tells_a_setup_line_that_fails(site_lab: Lab) -> None:
    site_lab.settings(
        '[partitions.dgxh]\ndevice = "cpu"\nsetup = ["export A=1", "conda-that-is-not-there activate x"]\n'
    )
    found = checks(site_lab, "-p", "dgxh", "--on-node")
    assert found["dgxh node"]["level"] == "fail"
    assert "setup of partition dgxh failed (exit code 127)" in found["dgxh node"]["text"]
    assert "conda-that-is-not-there activate x" in found["dgxh node"]["text"]
    assert "|| true" in found["dgxh node"]["remedy"]


def test_a_reserved_shell_has_the_partitions_environment_and_ends_with_the_commands_status(site_lab: Lab) -> None:
    site_lab.settings('[partitions.dgxh]\nsetup = ["export FROM_SETUP=1"]\nenv = { FROM_ENV = "a b" }\n')
    tell = "echo $FROM_SETUP,$FROM_ENV,$LABCTL_PARTITION,$CUDA_VISIBLE_DEVICES; command -v labctl; exit 7"
    done = site_lab.labctl("reserve", "-p", "dgxh", "--time", "5", "--", "bash", "-c", tell)
    assert done.returncode == 7
    first, second = done.stdout.splitlines()
    assert re.fullmatch(r"1,a b,dgxh,\d,\d", first)  # the job before may still hold the first two
    assert second.endswith("/labctl")


def test_reserve_prints_the_srun_that_it_would_run(site_lab: Lab) -> None:
    words = site_lab.ok("reserve", "-p", "dgxh", "--gpus", "4", "--print").split()
    for word in (
        "srun",
        "--account=eecs",
        "--time=0-01:00:00",
        "--partition=dgxh",
        "--gres=gpu:4",
        "--mem=64G",
        "--pty",
    ):
        assert word in words
    assert Path(words[words.index("--rcfile") + 1]).is_file()


def test_reserve_refuses_what_srun_would_wait_for_without_a_word(site_lab: Lab) -> None:
    done = site_lab.labctl("reserve", "-p", "dgxh", "--time", "9-00:00:00")
    assert (done.returncode, "dgxh (2-00:00:00): 9-00:00:00" in done.stderr) == (3, True)
    done = site_lab.labctl("reserve", "-p", "dgxh", "--gpus", "9")
    assert (done.returncode, "has 9 GPUs: 8 at most" in done.stderr) == (3, True), done.stderr


# ---------------------------------------------------------------- a site without accounting


@pytest.fixture(scope="module")
def bare(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A cluster that keeps no accounting, as some sites' do not. `cluster` first: it sees that Slurm is installed."""
    slurm = SlurmCluster(tmp_path_factory.mktemp("bare"), accounting=False, dgx2_nodes=0, dgxh_nodes=1)
    with slurm:
        yield slurm


def test_a_site_without_accounting_is_taken_as_it_is(bare: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "lab").mkdir()
    lab = Lab(tmp_path / "lab", bare, {"HOME": str(tmp_path / "home")})
    own_settings(lab.environment["HOME"])
    done = lab.labctl("init", "--yes")
    assert done.returncode == 0
    assert "labctl cannot list your accounts" in done.stderr
    settings = settings_of(lab)
    assert settings["defaults"] == {"partition": "dgxh"}
    assert settings["partitions"]["dgxh"] == {}
    found = checks(lab, "-p", "dgxh")
    assert found["accounting"]["level"] == "warn"
    assert found["dgxh job"]["level"] == "pass"
    queued = submitted(lab)
    assert queued.returncode == 0, queued.stderr
    assert lab.json("status")[0]["state"] in ("pending", "running", "submitting", "failed")
