"""A first labctl.toml from Slurm's description of the site. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from labctl_orchestrator.request.settings import SETTINGS_FILE
from labctl_slurm import forms, partitions
from labctl_slurm.forms import Form
from labctl_slurm.partitions import slurm_time
from labctl_slurm.render import Script
from labctl_slurm.site import SlurmPartition, mig_memory_gb

# GPU names in gres types and features: (name, compute capability, memory in GiB if the name determines it).
# Capabilities: NVIDIA's list, developer.nvidia.com/cuda-gpus. The longer name first: "l40s" holds "l40".
GPUS: Mapping[str, tuple[str, str, int | None]] = {
    "gh200": ("GH200", "9.0", None), "gb200": ("GB200", "10.0", None), "b200": ("B200", "10.0", None),
    "h200": ("H200", "9.0", 141), "h100": ("H100", "9.0", 80), "h800": ("H800", "9.0", 80),
    "a100": ("A100", "8.0", None), "a800": ("A800", "8.0", 80), "a6000": ("A6000", "8.6", 48), "a5000": ("A5000", "8.6", 24),
    "a40": ("A40", "8.6", 48), "a30": ("A30", "8.0", 24), "a10": ("A10", "8.6", 24), "l40s": ("L40S", "8.9", 48),
    "l40": ("L40", "8.9", 48), "l4": ("L4", "8.9", 24), "rtx4090": ("RTX 4090", "8.9", 24), "rtx3090": ("RTX 3090", "8.6", 24),
    "v100": ("V100", "7.0", None), "t4": ("T4", "7.5", 16), "p100": ("P100", "6.0", 16),
}  # fmt: skip
# Memory in GiB of products, by their NVML names, if it differs from the plain name's. Numbers in other names may be the memory of
# the CPU (GH200 480GB) or of a slice. Source: NVIDIA's data sheets.
PRODUCTS: Mapping[str, int] = {
    "gh200 480gb": 96, "gh200 144g": 144, "h100 nvl": 94, "h100 80gb": 80, "h100 64gb": 64, "h100 94gb": 94, "h100 96gb": 96,
    "a100 sxm4 40gb": 40, "a100 pcie 40gb": 40, "a100 40gb": 40, "a100 sxm 64gb": 64, "a100 sxm4 80gb": 80,
    "a100 pcie 80gb": 80, "a100 80gb": 80, "a800 sxm4 40gb": 40, "a800 40gb": 40, "v100 sxm2 16gb": 16, "v100 sxm2 32gb": 32,
    "v100 sxm3 32gb": 32, "v100 pcie 16gb": 16, "v100 pcie 32gb": 32, "v100s pcie 32gb": 32, "v100 16gb": 16, "v100 32gb": 32,
    "p100 pcie 12gb": 12,
}  # fmt: skip
USUAL_GPUS, USUAL_CPUS, USUAL_MEM_GIB = 2, 8, 64
USUAL_TIME_S = 3600
LEFT_TO_THE_NODE_GIB = 4
UNTRIED = Form(True)
PYTHON_COMMENT = '# python = "/path/to/environment/bin/python"   # with torch and transformers, or vllm (labctl env)'

HEAD = """\
# labctl's settings for submissions from this folder and its subfolders. `labctl config` shows each value and its source.
# Remove the # from lines that you need.
"""
WITHOUT_SLURM = (
    HEAD
    + """
# [defaults]                         # of every submission; keys are the flags of `labctl submit`
# partition = "dgxh"
# model_id = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"

# [partitions.dgxh]                  # overrides keys of a shipped partition, or adds a partition
# account = "my-account"
# python = "/path/to/environment/bin/python"
# setup = ["module load cuda"]
# offline = true                     # if nodes cannot reach the Hub; download models with `labctl fetch MODEL`
"""
)


@dataclass(frozen=True)
class Account:
    """The Slurm account to charge. `chosen` is None if the user has several and chose none, or none is known. `names`: the user's
    accounts. `silent`: why accounting did not answer."""

    chosen: str | None = None
    names: tuple[str, ...] = ()
    silent: str = ""

    @property
    def for_a_trial(self) -> str | None:
        """The account of a job that is not queued: the chosen one, else any."""
        return self.chosen or (self.names[0] if self.names else None)

    @property
    def remedy(self) -> str:
        """How to set the account; "" if it is known."""
        if self.chosen is not None or len(self.names) == 1:
            return ""
        if self.names:
            return f"you have several accounts ({', '.join(self.names)}): set account in {SETTINGS_FILE}, or give --account"
        if self.silent:
            return f"labctl cannot list your accounts ({self.silent}): if the site needs one, set account in {SETTINGS_FILE}"
        return "you have no account on this cluster: ask the administrators for one"


@dataclass(frozen=True)
class Proposal:
    """A [partitions.NAME] table: `table` contains differences from the shipped partition, `notes` keys that the user must set."""

    name: str
    slurm: SlurmPartition
    table: dict[str, str | int]
    notes: tuple[str, ...] = ()
    form: Form = UNTRIED

    def script(self, account: str | None, templates: Path) -> Script:
        """A job of the partition that this table makes, for `sbatch --test-only`."""
        of_account = {} if account is None else {"account": account}
        tables = [("labctl", partitions.shipped().get(self.name, {})), ("Slurm", {**self.table, **of_account})]
        partition = partitions.build(self.name, tables)
        return Script(partition, "labctl-init", partition.gpus, None, Path("logs"), Path("code"), templates)

    @property
    def takes_jobs(self) -> bool:
        return self.slurm.state == "up" and self.slurm.usable_nodes > 0

    @property
    def capability(self) -> float:
        value = self.table.get("capability", partitions.shipped().get(self.name, {}).get("capability"))
        return float(str(value or 0))


@dataclass(frozen=True)
class Proposed:
    """Proposed partitions, and messages about the others."""

    partitions: list[Proposal] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def default(self) -> str | None:
        """The partition with the newest GPU among those that take jobs; the first cluster and shipped partitions come first."""
        usable = [found for found in self.partitions if found.takes_jobs]
        best = max(
            usable,
            key=lambda found: (
                found.slurm.cluster == usable[0].slurm.cluster,
                found.name in partitions.shipped(),
                found.capability,
            ),
            default=None,
        )
        return best.name if best else None


def propose(found: Iterable[SlurmPartition]) -> Proposed:
    """A labctl partition for each Slurm partition with one kind of GPU. Of several clusters' partitions with the same name, the
    first."""
    proposed = Proposed()
    names: set[str] = set()
    for slurm in found:
        kinds = _kinds(slurm)
        if not slurm.gpus_per_node:
            continue
        if slurm.name in names:
            proposed.left_out.append(
                f"partition {slurm.name} of cluster {slurm.cluster}: left out, because another cluster has a partition with"
                f" this name. To use it: a table with another name, slurm_partition = {json.dumps(slurm.name)},"
                f" cluster = {json.dumps(slurm.cluster)}"
            )
            continue
        names.add(slurm.name)
        if not kinds:
            proposed.left_out.append(
                f"partition {slurm.name}: left out, because its GPUs are MIG slices ({', '.join(slurm.mig_types)})."
                f" To measure on one slice: gpu_type = {json.dumps(slurm.mig_types[0])}, gpus = 1"
            )
        elif len(kinds) > 1:
            proposed.left_out.append(
                f"partition {slurm.name}: left out, because its nodes have different GPUs ({', '.join(kinds)}), so results"
                " would not be comparable"
            )
        else:
            (kind,) = kinds
            proposed.partitions.append(_proposal(slurm, kind))
    return proposed


def _kinds(slurm: SlurmPartition) -> list[str]:
    """Kinds of whole GPUs in the partition: gres types, or node features if the gres has no type."""
    kinds: dict[str, None] = {}
    for nodes in slurm.nodes:
        for kind, _ in nodes.gpus:
            if kind and not mig_memory_gb(kind):
                kinds[kind] = None
            elif not kind:
                kinds[next(filter(known_gpu, nodes.features), "")] = None
    return list(kinds)


def known_gpu(text: str) -> tuple[str, str, int | None] | None:
    """(name, capability, memory in GiB or None) of the GPU in a gres type or feature; None for an unknown name."""
    plain = re.sub(r"[^a-z0-9]+", " ", text.lower())
    for word, (name, capability, memory) in GPUS.items():
        if re.search(rf"(?:^|[^0-9a-z]|gtx|tesla|nvidia|geforce){word}s?(?:$|[^0-9a-z])", plain):
            plain = re.sub(r"([0-9]) (gb?)\b", r"\1\2", plain)
            sized = re.search(r"\b([0-9]+)gb?\b", plain)
            usual = memory if sized is None or int(sized[1]) == memory else None
            return name, capability, next((gib for product, gib in PRODUCTS.items() if product in plain), usual)
    return None


def _proposal(slurm: SlurmPartition, kind: str) -> Proposal:
    shipped = partitions.shipped()
    name = slurm.name
    if shipped.get(name, {}).get("executor") == "local":
        name = f"slurm-{name}"  # labctl's own `local`
    table: dict[str, str | int] = {} if name == slurm.name else {"slurm_partition": slurm.name}
    if slurm.cluster:
        table["cluster"] = slurm.cluster
    notes = []
    gpu = known_gpu(kind) if kind else None
    if gpu is None:
        if "gpu" not in shipped.get(name, {}):
            what = f"unknown GPU {kind!r}" if kind else "Slurm does not name the GPU"
            notes.append(
                f'gpu, capability and gpu_memory_gib: {what}; as in gpu = "A100", capability = "8.0", gpu_memory_gib = 80'
            )
    elif gpu[0] != shipped.get(name, {}).get("gpu"):
        table |= {"gpu": gpu[0], "capability": gpu[1]}
        if gpu[2] is None:
            notes.append("gpu_memory_gib: memory of one GPU, from `nvidia-smi` on a node")
        else:
            table["gpu_memory_gib"] = gpu[2]
    return Proposal(name, slurm, table | _smaller(slurm), tuple(notes))


def _smaller(slurm: SlurmPartition) -> dict[str, str | int]:
    """Keys for nodes and time limits that are smaller than labctl's defaults."""
    table: dict[str, str | int] = {}
    with_gpus = [nodes for nodes in slurm.nodes if nodes.gpus_per_node]
    if slurm.gpus_per_node < USUAL_GPUS:
        table["gpus"] = slurm.gpus_per_node
    cpus = max(nodes.cpus for nodes in with_gpus)
    if 0 < cpus < USUAL_CPUS:
        table["cpus_per_task"] = cpus
    memory_gib = max(nodes.memory_mib for nodes in with_gpus) // 1024
    if LEFT_TO_THE_NODE_GIB < memory_gib < USUAL_MEM_GIB:
        table["mem"] = f"{memory_gib - LEFT_TO_THE_NODE_GIB}G"
    if slurm.max_time_s is not None and slurm.max_time_s < USUAL_TIME_S:
        table["time"] = slurm_time(max(60, slurm.max_time_s))
    return table


# ---------------------------------------------------------------- as text


def text(
    proposed: Proposed,
    account: Account,
    *,
    accounts: Mapping[str, Account] | None = None,
    why_cluster: str = "",
    source: str = "",
    default: str | None = None,
    pythons: Mapping[str, str] | None = None,
) -> str:
    """The text of labctl.toml. `accounts`: those on other clusters, by the cluster's name. `why_cluster`: why a partition has the
    key `cluster`. `source`: a line about its origin. `pythons`: the Python of each partition that has one."""
    default = default or proposed.default
    lines = [HEAD, *([f"# {source}", ""] if source else [])]
    lines.append("[defaults]                           # of every submission; keys are the flags of `labctl submit`")
    if default is not None:
        lines.append(f"partition = {json.dumps(default)}")
    lines.append('# model_id = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"')
    for found in proposed.partitions:
        own_account = (accounts or {}).get(found.slurm.cluster, account)
        lines += ["", *_table(found, own_account, why_cluster, (pythons or {}).get(found.name))]
    if proposed.left_out:
        lines += ["", "# Other partitions:", *(f"# {reason}" for reason in proposed.left_out)]
    return "\n".join(lines) + "\n"


def _table(found: Proposal, account: Account, why_cluster: str, python: str | None) -> list[str]:
    key = found.name if re.fullmatch(r"[A-Za-z0-9_-]+", found.name) else json.dumps(found.name)
    lines = [f"[partitions.{key}]".ljust(37) + f"# {summary(found.slurm)}", *account_lines(account)]
    for name, value in found.table.items():
        lines += [f"# Needed, because {why_cluster}:"] if name == "cluster" else []
        lines.append(f"{name} = {json.dumps(value)}")
    lines += forms.comments(found.form.changes)
    lines += [f"# {note}" for note in found.notes]
    if not found.form.accepted:
        lines.append(f"# sbatch --test-only refuses a job of this partition: {found.form.message}")
    if python:
        lines.append(f"python = {json.dumps(python)}")
    else:
        lines.append(PYTHON_COMMENT)
    lines.append('# setup = ["module load cuda"]')
    lines.append(
        "# offline = true                     # if nodes cannot reach the Hub; download models with labctl fetch"
    )
    return lines


def account_lines(account: Account) -> list[str]:
    chosen = account.names[0] if account.chosen is None and len(account.names) == 1 else account.chosen
    if chosen is not None:
        return [f"account = {json.dumps(chosen)}"]
    if account.names:
        return [
            "# Choose the account to charge; remove its #:",
            *(f"# account = {json.dumps(n)}" for n in account.names),
        ]
    return ['# account = "my-account"']


def summary(slurm: SlurmPartition) -> str:
    """A partition in short: "2 nodes, each with 8 h100, 112 CPUs, 1953 GiB; time limit 2-00:00:00"."""
    parts = []
    for (gpus, cpus, memory_mib), count in _alike(slurm).items():
        kinds = " + ".join(f"{number} {kind or 'GPUs'}" for kind, number in gpus) or "no GPU"
        parts.append(f"{count} node{'s, each' * (count != 1)} with {kinds}, {cpus} CPUs, {memory_mib // 1024} GiB")
    limit = "no time limit" if slurm.max_time_s is None else f"time limit {slurm_time(slurm.max_time_s)}"
    state = "" if slurm.state == "up" else f"{slurm.state}; "
    return f"{state}{', '.join(parts) or 'no node'}; {limit}"


def _alike(slurm: SlurmPartition) -> dict[tuple[tuple[tuple[str, int], ...], int, int], int]:
    counts: dict[tuple[tuple[tuple[str, int], ...], int, int], int] = {}
    for nodes in slurm.nodes:
        kind = (nodes.gpus, nodes.cpus, nodes.memory_mib)
        counts[kind] = counts.get(kind, 0) + nodes.count
    return counts
