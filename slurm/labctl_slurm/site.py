"""The site, as Slurm describes it: partitions with nodes and GPUs, accounts, version, and a trial of a job.

A query without an answer raises SlurmError. `cluster` is the name of the cluster to query; "" is that of the shell.
"""

from __future__ import annotations

import getpass
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from labctl_slurm import command
from labctl_slurm.errors import NO_SLURM, SlurmError
from labctl_slurm.partitions import seconds

NEEDED = ("sinfo", "sbatch", "squeue", "scontrol", "scancel", "srun")
ROOT_ACCOUNT = "root"  # the root of the account tree, which is not charged
# Parts of sinfo's states of nodes that start no new jobs.
OUT_OF_USE = ("down", "drain", "fail", "error", "unknown", "maint", "reboot", "inval", "no_respond")
# A slice of a GPU in a gres type, such as "1g.10gb" and "a100_3g.20gb".
_MIG = re.compile(r"(?<![0-9])[1-9]g\.([0-9]+)gb", re.IGNORECASE)
_GRES = re.compile(r"(?:^|,)gpu:(?:(?!no_consume:)(?P<type>[^:,()]+):)?(?:no_consume:)?(?P<count>[0-9]+)(?![^,(])")


@dataclass(frozen=True)
class Nodes:
    """Equal nodes of one partition. `gpus` are (type, number) per node (type "": the site names none), `memory_mib` and `cpus`
    per node, `state` and `reason` sinfo's, `features` the values of --constraint."""

    count: int
    state: str
    cpus: int
    memory_mib: int
    gpus: tuple[tuple[str, int], ...] = ()
    reason: str = ""
    features: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether they start jobs, now or when others end. A * after the state marks a node that does not answer."""
        state = self.state.lower()
        return not state.endswith("*") and not any(word in state for word in OUT_OF_USE)

    @property
    def gpus_per_node(self) -> int:
        return sum(count for _, count in self.gpus)


@dataclass(frozen=True)
class SlurmPartition:
    """One partition of Slurm. `state` is up, down, drain or inact; `max_time_s` is in seconds, None without a limit. `cluster` is
    the name of its cluster ("": that of the shell)."""

    name: str
    state: str
    max_time_s: int | None
    nodes: tuple[Nodes, ...]
    is_default: bool = False
    cluster: str = ""

    @cached_property
    def gpu_types(self) -> dict[str, int]:
        """The types of GPU, each with the most of one node."""
        types: dict[str, int] = {}
        for nodes in self.nodes:
            for kind, count in nodes.gpus:
                types[kind] = max(count, types.get(kind, 0))
        return types

    @property
    def mig_types(self) -> list[str]:
        """The types that are MIG slices."""
        return [kind for kind in self.gpu_types if mig_memory_gb(kind)]

    @property
    def gpus_per_node(self) -> int:
        """The most GPUs of one node."""
        return max((nodes.gpus_per_node for nodes in self.nodes), default=0)

    @property
    def usable_nodes(self) -> int:
        return sum(nodes.count for nodes in self.nodes if nodes.usable)


@dataclass(frozen=True)
class Accounts:
    """The accounts of a user in sacctmgr's order, and the default account."""

    names: tuple[str, ...]
    default: str = ""


@dataclass(frozen=True)
class Trial:
    """The result of `sbatch --test-only`: whether Slurm accepts the script, its message, and the expected start (ISO 8601 in the
    site's time; "" without one)."""

    accepted: bool
    message: str
    starts_at: str = ""


# ---------------------------------------------------------------- queries


def missing_commands() -> list[str]:
    """The commands of Slurm that labctl needs and PATH lacks."""
    return [name for name in NEEDED if shutil.which(name) is None]


def version() -> str:
    """Slurm's version, such as "22.05.8". Raises SlurmError."""
    return _output("sinfo", "--version").split()[-1]


def configuration(cluster: str = "") -> dict[str, str]:
    """Slurm's configuration by key. Raises SlurmError."""
    lines = _output("scontrol", "show", "config", cluster=cluster).splitlines()
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def clusters() -> list[str]:
    """The names of the clusters with a running controller that Slurm's accounting knows. Raises SlurmError."""
    lines = _output(
        "sacctmgr", "--noheader", "--parsable2", "show", "clusters", "format=Cluster,ControlHost"
    ).splitlines()
    pairs = (line.split("|") for line in lines)
    return [pair[0] for pair in pairs if len(pair) == 2 and all(pair)]  # a controller that ends leaves no host


def partitions(cluster: str = "") -> list[SlurmPartition]:
    """The partitions that this user sees, in Slurm's order. Raises SlurmError."""
    output = _output("sinfo", "--noheader", "--exact", "--format=%P|%a|%l|%D|%T|%c|%m|%f|%G|%E", cluster=cluster)
    rows: dict[str, list[list[str]]] = {}
    for line in output.splitlines():
        parts = line.split("|", 9)
        if len(parts) == 10:
            rows.setdefault(parts[0].strip(), []).append([part.strip() for part in parts])
    return [_partition(name, lines, cluster) for name, lines in rows.items()]


def find(names: Sequence[str], cluster: str = "") -> tuple[list[SlurmPartition], list[str]]:
    """The partitions with these names, and the names that Slurm does not know. Raises SlurmError."""
    known = {partition.name: partition for partition in partitions(cluster)}
    return [known[name] for name in names if name in known], [name for name in names if name not in known]


def partitions_of_node(node: str) -> set[str]:
    """The names of Slurm's partitions with this node. Raises SlurmError."""
    return {name.rstrip("*") for name in _output("sinfo", "--noheader", f"--nodes={node}", "--format=%P").split()}


def addresses(names: Sequence[str], cluster: str = "") -> set[str]:
    """Slurm's addresses of the nodes of these partitions, without names of all nodes. Raises SlurmError."""
    which = [f"--partition={','.join(names)}"] if names else []
    return set(_output("sinfo", "--noheader", *which, "--format=%o", cluster=cluster).split())


def accounts(cluster: str = "") -> Accounts:
    """The accounts of this user on the cluster. Raises SlurmError."""
    user = getpass.getuser()
    try:
        cluster = cluster or configuration().get("ClusterName", "")
    except SlurmError:
        cluster = ""
    where = ["where", f"user={user}", *([f"cluster={cluster}"] if cluster else [])]
    listed = _output("sacctmgr", "--noheader", "--parsable2", "show", "associations", *where, "format=Account")
    names = list(dict.fromkeys(line.strip() for line in listed.splitlines() if line.strip()))
    if len(names) > 1 and ROOT_ACCOUNT in names:
        names.remove(ROOT_ACCOUNT)
    default = _output("sacctmgr", "--noheader", "--parsable2", "show", "user", user, "format=DefaultAccount").split()
    return Accounts(tuple(names), default[0] if default else "")


def try_script(script: str, cluster: str = "") -> Trial:
    """Run `sbatch --test-only`, which checks account, partition, QOS and resources, and queues nothing. Raises SlurmError without
    an answer of the controller.

    It accepts a job for a partition that is down, and one with a time limit above the partition's.
    """
    done = command.ask("sbatch", "--test-only", script=script, cluster=cluster)
    message = command.error_text(done.stderr)
    if done.returncode == 0:
        start = re.search(r"to start at (\S+)", message)
        return Trial(True, message, start[1] if start else "")
    if any(words in message.lower() for words in ("contact", "timed out", "fetch_config")):
        raise command.failed(done)
    # A site's plugin explains itself on earlier lines: the last line is "allocation failure: Unspecified error".
    reason = message.replace("allocation failure: ", "")
    return Trial(False, reason or f"sbatch --test-only failed with exit code {done.returncode}")


# ---------------------------------------------------------------- output


def _partition(name: str, rows: list[list[str]], cluster: str) -> SlurmPartition:
    first = rows[0]
    nodes = tuple(
        Nodes(
            count=_number(count),
            state=state,
            cpus=_number(cpus),
            memory_mib=_number(memory),
            gpus=gpus_of(gres),
            reason="" if reason in ("none", "(null)") else reason,
            features=() if features == "(null)" else tuple(features.split(",")),
        )
        for _, _, _, count, state, cpus, memory, features, gres, reason in rows
        if _number(count)  # a partition without nodes has a row of zeros
    )
    limit_s = _limit_s(first[2])
    return SlurmPartition(name.rstrip("*"), first[1], limit_s, nodes, is_default=name.endswith("*"), cluster=cluster)


def gpus_of(gres: str) -> tuple[tuple[str, int], ...]:
    """The (type, number) of GPUs in sinfo's GRES: "gpu:h100:8(S:0-1),nvme:1" is (("h100", 8),), "gpu:4" is (("", 4),)."""
    found: dict[str, int] = {}
    for match in _GRES.finditer(gres):
        kind = match["type"] or ""
        found[kind] = found.get(kind, 0) + int(match["count"])
    return tuple(found.items())


def mig_memory_gb(gpu_type: str) -> int | None:
    """The memory of a MIG slice, from its gres type: 10 of "1g.10gb". None for a whole GPU."""
    found = _MIG.search(gpu_type)
    return None if found is None else int(found[1])


def _number(text: str) -> int:
    """ "112", or "112+" for nodes with 112 and more."""
    digits = re.match(r"[0-9]+", text)
    return int(digits[0]) if digits else 0


def _limit_s(text: str) -> int | None:
    try:
        return seconds(text)
    except ValueError:  # "infinite"
        return None


def _output(*arguments: str, cluster: str = "") -> str:
    done = command.ask(*arguments, cluster=cluster)
    if done.returncode != 0 and "fetch_config" in done.stderr:
        raise SlurmError("no Slurm cluster configured on this machine (slurm.conf not found)", NO_SLURM)
    if done.returncode != 0:
        raise command.failed(done)
    return done.stdout
