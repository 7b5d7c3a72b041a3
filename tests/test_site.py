"""What Slurm says of a site is read as it is meant, and becomes a labctl.toml that works. Real Slurm: tests/slurm."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.preflight import init_proposal
from labctl_orchestrator.preflight.init_proposal import Account, known_gpu, propose
from labctl_orchestrator.request import settings
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm import limits, partitions, site
from labctl_slurm.errors import SlurmError
from labctl_slurm.site import Accounts, Nodes, SlurmPartition, gpus_of

from .conftest import Labctl, Slurm, refused

H100 = Nodes(2, "idle", 112, 2_000_000, (("h100", 8),))


def partition(name: str = "dgxh", *nodes: Nodes, state: str = "up", max_time_s: int | None = 86400) -> SlurmPartition:
    return SlurmPartition(name, state, max_time_s, nodes or (H100,))


def toml_of(*found: SlurmPartition, account: Account | None = None, **more: Any) -> dict[str, Any]:
    return tomllib.loads(init_proposal.text(propose(found), account or Account("eecs", ("eecs",)), **more))


# ---------------------------------------------------------------- what sinfo says


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:h100:8", (("h100", 8),)),
        ("gpu:4", (("", 4),)),
        ("gpu:h100:8(S:0-1),nvme:1", (("h100", 8),)),
        ("gpu:a100:4(IDX:0-3)", (("a100", 4),)),
        ("gpu:v100:2,gpu:h100:2", (("v100", 2), ("h100", 2))),
        ("gpu:a100_1g.10gb:7(S:0),craynetwork:4", (("a100_1g.10gb", 7),)),
        ("(null)", ()),
        ("nvme:1", ()),
        ("shard:h100:8", ()),
        ("gpu:h100:2,shard:gpu:8", (("h100", 2),)),
        ("gpu:a100:no_consume:4", (("a100", 4),)),
        ("gpu:no_consume:4", (("", 4),)),
    ],
)
def test_gres_is_read_in_all_its_forms(gres: str, gpus: tuple[tuple[str, int], ...]) -> None:
    assert gpus_of(gres) == gpus


def test_sinfos_lines_become_partitions_with_their_nodes(slurm: Slurm) -> None:
    slurm.answers(
        "sinfo",
        "batch*|up|infinite|4|idle|64|256000|(null)|(null)|none\n"
        "gpu|up|2-00:00:00|2|mixed|112+|2000000+|h100,nvlink|gpu:h100:8(S:0-1)|none\n"
        "gpu|up|2-00:00:00|1|drained*|112|2000000|h100|gpu:h100:8|fan | broken\n"
        "empty|down|1:00:00|0|n/a|0|0|(null)|(null)|none\n"
        "not a line of sinfo\n",
    )
    batch, gpu, empty = site.partitions()
    assert (batch.name, batch.is_default, batch.max_time_s, batch.gpus_per_node) == ("batch", True, None, 0)
    assert (gpu.max_time_s, gpu.usable_nodes, gpu.gpus_per_node) == (2 * 86400, 2, 8)
    assert gpu.nodes[0].features == ("h100", "nvlink")
    assert (gpu.nodes[0].cpus, gpu.nodes[1].reason) == (112, "fan | broken")
    assert (empty.state, empty.nodes) == ("down", ())


@pytest.mark.parametrize("state", ["down", "drained", "draining", "idle*", "fail", "maint", "reboot^", "mixed-drain"])
def test_a_node_that_takes_no_job_is_not_usable(state: str) -> None:
    assert not Nodes(1, state, 1, 1).usable


@pytest.mark.parametrize("state", ["idle", "mixed", "allocated", "idle~", "completing", "planned", "powering_up"])
def test_a_node_that_will_take_one_is(state: str) -> None:
    assert Nodes(1, state, 1, 1).usable


def test_accounts_come_once_each_without_the_root_of_their_tree(slurm: Slurm) -> None:
    slurm.answers("scontrol", "ClusterName             = labctl\n")
    slurm._write(
        "sacctmgr", 'case "$*" in *associations*) printf "root\\neecs\\nphysics\\neecs\\n";; *) echo eecs;; esac\n'
    )
    assert site.accounts() == Accounts(("eecs", "physics"), "eecs")


def test_a_command_that_is_missing_or_fails_is_told_in_its_own_words(slurm: Slurm) -> None:
    assert "not found" in refused(site.partitions, SlurmError).message
    slurm.answers("sinfo", status=1, errors="sinfo: error: slurm_load_partitions: Unable to contact slurm controller\n")
    assert "Unable to contact slurm controller" in refused(site.partitions, SlurmError).message
    slurm.answers(
        "sinfo", status=1, errors="sinfo: error: fetch_config: DNS SRV lookup failed\nsinfo: fatal: Could not\n"
    )
    assert "no Slurm cluster configured" in refused(site.partitions, SlurmError).message


def test_a_trial_tells_refusals_from_silence(slurm: Slurm) -> None:
    slurm.answers(
        "sbatch", errors="sbatch: Job 7 to start at 2026-01-01T10:00:00 using 8 processors on nodes n in partition p\n"
    )
    assert site.try_script("") == site.Trial(True, site.try_script("").message, "2026-01-01T10:00:00")
    slurm.answers("sbatch", status=1, errors="allocation failure: Invalid qos specification\n")
    assert site.try_script("") == site.Trial(False, "Invalid qos specification")
    own_words = (
        "sbatch: error: memory follows from the GPUs\nallocation failure: Unspecified error\n"  # of a job_submit plugin
    )
    slurm.answers("sbatch", status=1, errors=own_words)
    assert site.try_script("") == site.Trial(False, "memory follows from the GPUs Unspecified error")
    slurm.answers("sbatch", status=1, errors="sbatch: error: Unable to contact slurm controller (connect failure)\n")
    refused(lambda: site.try_script(""), SlurmError)


def test_a_time_is_held_against_the_partition_that_allows_the_most() -> None:
    short, long, endless = (
        partition(name, max_time_s=limit) for name, limit in (("a", 3600), ("b", 7200), ("c", None))
    )

    def above(time: str, *found: site.SlurmPartition) -> str:
        return limits.above_limit(partitions.build("dgxh", [("test", {"time": time})]), found)

    assert above("2:00:00", short) == "time limit above that of Slurm's partition a (0-01:00:00): 2:00:00"
    assert above("2:00:00", short, long) == ""
    assert "partition b (0-02:00:00): 2:00:01" in above("2:00:01", short, long)
    assert above("99-00:00:00", short, endless) == ""
    assert above("1:00:00") == ""


# ---------------------------------------------------------------- what is proposed


@pytest.mark.parametrize(
    ("text", "gpu"),
    [
        ("h100", ("H100", "9.0", 80)),
        ("nvidia_h200_141gb_hbm3", ("H200", "9.0", 141)),
        ("tesla_v100-sxm2-32gb", ("V100", "7.0", 32)),
        ("a100-80gb", ("A100", "8.0", 80)),
        ("l40s", ("L40S", "8.9", 48)),
        ("NVIDIA-A40", ("A40", "8.6", 48)),
        ("gh200", ("GH200", "9.0", None)),
        ("nvidia_gh200_480gb", ("GH200", "9.0", 96)),
        ("nvidia_gh200_144g_hbm3e", ("GH200", "9.0", 144)),
        ("nvidia_gh200_999gb", ("GH200", "9.0", None)),
        ("nvidia_h100_nvl", ("H100", "9.0", 94)),
        ("nvidia_h100_80gb_hbm3", ("H100", "9.0", 80)),
        ("nvidia_a100-sxm4-80gb", ("A100", "8.0", 80)),
        ("NVIDIA A100 80 GB PCIe", ("A100", "8.0", 80)),
        ("tesla_v100s-pcie-32gb", ("V100", "7.0", 32)),
        ("a100", ("A100", "8.0", None)),
        ("mi250", None),
        ("ssd", None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_sites_give_it(text: str, gpu: tuple[str, str, int | None] | None) -> None:
    assert known_gpu(text) == gpu


def test_a_partition_of_a_shipped_name_gets_only_what_differs() -> None:
    assert toml_of(partition("dgxh"))["partitions"] == {"dgxh": {"account": "eecs"}}
    h200 = Nodes(1, "idle", 96, 1_000_000, (("h200", 8),))
    assert toml_of(partition("dgxh", h200))["partitions"]["dgxh"] == {
        "account": "eecs", "gpu": "H200", "capability": "9.0", "gpu_memory_gib": 141,
    }  # fmt: skip


def test_another_partition_is_described_as_far_as_slurm_tells() -> None:
    small = Nodes(3, "idle", 6, 48_000, (("a30", 1),))
    table = toml_of(partition("teach", small, max_time_s=1800))["partitions"]["teach"]
    assert table == {
        "account": "eecs", "gpu": "A30", "capability": "8.0", "gpu_memory_gib": 24, "gpus": 1, "cpus_per_task": 6,
        "mem": "42G", "time": "0-00:30:00",
    }  # fmt: skip


def test_a_kind_that_only_the_features_tell_is_found_and_one_that_nothing_tells_is_asked_for() -> None:
    told = Nodes(1, "idle", 64, 500_000, (("", 4),), features=("avx512", "a100-40gb"))
    silent = Nodes(1, "idle", 64, 500_000, (("", 4),))
    (found,) = propose([partition("one", told)]).partitions
    assert (found.table["gpu"], found.table["gpu_memory_gib"]) == ("A100", 40)
    (unknown,) = propose([partition("two", silent)]).partitions
    assert "gpu" not in unknown.table
    assert "capability" in unknown.notes[0]


def test_partitions_with_several_kinds_or_slices_or_no_gpu_are_left_out_and_say_why() -> None:
    mixed = partition("gpu", H100, Nodes(1, "idle", 48, 1_000_000, (("v100", 16),)))
    sliced = partition("mig", Nodes(1, "idle", 64, 500_000, (("a100_1g.10gb", 7),)))
    plain = partition("cpu", Nodes(9, "idle", 64, 500_000))
    proposed = propose([mixed, sliced, plain])
    assert proposed.partitions == []
    assert [reason.partition(":")[0] for reason in proposed.left_out] == ["partition gpu", "partition mig"]
    assert "MIG slices (a100_1g.10gb)" in proposed.left_out[1]
    assert 'gpu_type = "a100_1g.10gb", gpus = 1' in proposed.left_out[1]


# Gres of sites with MIG, made up, in the form that sinfo prints for Slurm's AutoDetect=nvml.
@pytest.mark.parametrize(
    ("gres", "slices"),
    [
        ("gpu:1g.10gb:14(S:0-1)", ["1g.10gb"]),
        ("gpu:a100_3g.20gb:2(S:0),gpu:a100_1g.5gb:2(S:0)", ["a100_3g.20gb", "a100_1g.5gb"]),
        ("gpu:h100:4(S:0-1),gpu:nvidia_h100_80gb_hbm3_1g.10gb:7(S:1)", ["nvidia_h100_80gb_hbm3_1g.10gb"]),
        ("gpu:nvidia_a100_80gb_pcie:2", []),
        ("gpu:h100-40g:2", []),
        ("gpu:4", []),
    ],
)
def test_slices_are_known_by_the_names_of_nvidia(gres: str, slices: list[str]) -> None:
    assert partition("mig", Nodes(1, "idle", 64, 500_000, gpus_of(gres))).mig_types == slices


def test_the_default_is_the_newest_gpu_that_takes_jobs() -> None:
    v100 = Nodes(1, "idle", 48, 1_000_000, (("v100", 16),))
    assert propose([partition("dgx2", v100), partition("dgxh")]).default == "dgxh"
    assert propose([partition("dgx2", v100), partition("dgxh", state="down")]).default == "dgx2"
    drained = Nodes(2, "drained", 112, 2_000_000, (("h100", 8),))
    assert propose([partition("dgx2", v100), partition("dgxh", drained)]).default == "dgx2"
    assert propose([]).default is None


def test_a_name_that_toml_or_labctl_has_a_meaning_for_is_written_so_that_it_works(workspace: Workspace) -> None:
    text = init_proposal.text(propose([partition("gpu.h100"), partition("local")]), Account("a b", ("a b",)))
    workspace.settings_file.write_text(text, encoding="utf-8")
    known = settings.load(workspace)
    assert known.partition("gpu.h100").slurm_partition == "gpu.h100"
    assert known.partition("slurm-local").slurm_partition == "local"
    assert known.partition("local").executor == "local"
    assert known.partition("gpu.h100").account == "a b"


@pytest.mark.parametrize(
    ("account", "said"),
    [
        (Account("a", ("a", "b")), ""),
        (Account(None, ("a",)), ""),
        (Account(None, ("a", "b")), "several accounts (a, b)"),
        (Account(None, (), "sacctmgr: no"), "cannot list your accounts (sacctmgr: no)"),
        (Account(None, ()), "no account on this cluster"),
    ],
)
def test_what_is_open_about_the_account_is_said(account: Account, said: str) -> None:
    assert said in account.remedy
    assert bool(said) == bool(account.remedy)
    chosen = toml_of(partition(), account=account)["partitions"]["dgxh"].get("account")
    assert chosen == (account.chosen or ("a" if account.names == ("a",) else None))


# ---------------------------------------------------------------- labctl init without Slurm


def test_without_slurm_init_makes_the_workspace_with_every_line_a_comment(workspace: Workspace, labctl: Labctl) -> None:
    ran = labctl("init")
    assert ran.code == 0
    assert "command not found on this machine: sinfo" in ran.err
    assert tomllib.loads(workspace.settings_file.read_text(encoding="utf-8")) == {}
    assert workspace.data.is_dir()


def test_the_lines_of_the_template_are_right_when_their_signs_are_taken_away(workspace: Workspace) -> None:
    lines = [
        line
        for line in init_proposal.WITHOUT_SLURM.splitlines()
        if line.startswith("# ") and ("=" in line or "[" in line)
    ]
    text = "\n".join(line[2:] for line in lines if "labctl's settings" not in line)
    workspace.settings_file.write_text(text, encoding="utf-8")
    known = settings.load(workspace)
    assert known.partition("dgxh").offline
    assert known.partition("dgxh").account == "my-account"


def test_a_controller_that_is_silent_leaves_a_workspace_all_the_same(
    workspace: Workspace, labctl: Labctl, slurm: Slurm
) -> None:
    slurm.answers("sinfo", status=1, errors="sinfo: error: Unable to contact slurm controller\n")
    ran = labctl("init", "--yes", "--json")
    assert ran.code == 0
    assert ran.json["partitions"] == []
    assert Path(ran.json["settings"]).is_file()
