"""What the site has: partitions with their nodes and GPUs, accounts, versions, and whether it would take a job. Asked from Slurm.

Nothing is inferred from silence: what Slurm does not answer raises SlurmError, and is told as not known.
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
ROOT_ACCOUNT = "root"  # the root of the tree of accounts: nobody's to be charged
# sinfo's words for a node that takes no new job, or none at all.
OUT_OF_USE = ("down", "drain", "fail", "error", "unknown", "maint", "reboot", "inval", "no_respond")
_GRES = re.compile(r"(?:^|,)gpu:(?:(?!no_consume:)(?P<type>[^:,()]+):)?(?:no_consume:)?(?P<count>[0-9]+)(?![^,(])")


@dataclass(frozen=True)
class Nodes:
    """Nodes of one partition that are alike: `gpus` is how many of each type a node has ("" where the site names none),
    `memory_mib` and `cpus` are per node, `state` and `reason` as sinfo says them, `features` what --constraint takes."""

    count: int
    state: str
    cpus: int
    memory_mib: int
    gpus: tuple[tuple[str, int], ...] = ()
    reason: str = ""
    features: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether they take jobs, now or when others end. A * behind the state says that a node does not answer."""
        state = self.state.lower()
        return not state.endswith("*") and not any(word in state for word in OUT_OF_USE)

    @property
    def gpus_a_node(self) -> int:
        return sum(count for _, count in self.gpus)


@dataclass(frozen=True)
class SlurmPartition:
    """One partition of Slurm's. `state` is up, down, drain or inact; `max_time_s` None where there is no limit (in seconds)."""

    name: str
    state: str
    max_time_s: int | None
    nodes: tuple[Nodes, ...]
    is_default: bool = False

    @cached_property
    def gpu_types(self) -> dict[str, int]:
        """The types of GPU, each with the most that one node has."""
        types: dict[str, int] = {}
        for nodes in self.nodes:
            for kind, count in nodes.gpus:
                types[kind] = max(count, types.get(kind, 0))
        return types

    @property
    def gpus_a_node(self) -> int:
        """The most GPUs that one node has."""
        return max((nodes.gpus_a_node for nodes in self.nodes), default=0)

    @property
    def usable_nodes(self) -> int:
        return sum(nodes.count for nodes in self.nodes if nodes.usable)


@dataclass(frozen=True)
class Accounts:
    """The accounts that a user may charge, in sacctmgr's order, and the one that Slurm takes where none is named."""

    names: tuple[str, ...]
    default: str = ""


@dataclass(frozen=True)
class Trial:
    """What `sbatch --test-only` says of a script: whether Slurm takes it, in its own words, and when it would start (ISO
    8601, the site's time; "" where it does not say)."""

    accepted: bool
    said: str
    starts_at: str = ""


# ---------------------------------------------------------------- the questions


def missing_commands() -> list[str]:
    """Which of Slurm's commands that labctl needs are not on PATH."""
    return [name for name in NEEDED if shutil.which(name) is None]


def version() -> str:
    """Slurm's version, such as "22.05.8". Raises SlurmError."""
    return _output("sinfo", "--version").split()[-1]


def configuration() -> dict[str, str]:
    """Slurm's configuration by key. Raises SlurmError."""
    lines = _output("scontrol", "show", "config").splitlines()
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def partitions() -> list[SlurmPartition]:
    """The partitions that this user may see, in Slurm's order. Raises SlurmError where Slurm cannot be asked."""
    output = _output("sinfo", "--noheader", "--exact", "--format=%P|%a|%l|%D|%T|%c|%m|%f|%G|%E")
    rows: dict[str, list[list[str]]] = {}
    for line in output.splitlines():
        parts = line.split("|", 9)
        if len(parts) == 10:
            rows.setdefault(parts[0].strip(), []).append([part.strip() for part in parts])
    return [_partition(name, lines) for name, lines in rows.items()]


def find(names: Sequence[str]) -> tuple[list[SlurmPartition], list[str]]:
    """Those of the named partitions that Slurm has, and the names that it does not have. Raises SlurmError."""
    known = {partition.name: partition for partition in partitions()}
    return [known[name] for name in names if name in known], [name for name in names if name not in known]


def partitions_of_node(node: str) -> set[str]:
    """Slurm's partitions that have this node. Raises SlurmError."""
    return {name.rstrip("*") for name in _output("sinfo", "--noheader", f"--nodes={node}", "--format=%P").split()}


def addresses(names: Sequence[str]) -> set[str]:
    """The addresses by which Slurm reaches the nodes of these partitions, or of all where none is named. Raises SlurmError."""
    which = [f"--partition={','.join(names)}"] if names else []
    return set(_output("sinfo", "--noheader", *which, "--format=%o").split())


def accounts() -> Accounts:
    """The accounts of this user on this cluster. Raises SlurmError where accounting does not answer."""
    user = getpass.getuser()
    cluster = _cluster_name()
    where = ["where", f"user={user}", *([f"cluster={cluster}"] if cluster else [])]
    listed = _output("sacctmgr", "--noheader", "--parsable2", "show", "associations", *where, "format=Account")
    names = list(dict.fromkeys(line.strip() for line in listed.splitlines() if line.strip()))
    if len(names) > 1 and ROOT_ACCOUNT in names:
        names.remove(ROOT_ACCOUNT)
    told = _output("sacctmgr", "--noheader", "--parsable2", "show", "user", user, "format=DefaultAccount").split()
    return Accounts(tuple(names), told[0] if told else "")


def try_script(script: str) -> Trial:
    """Ask `sbatch --test-only`: nothing is queued. Raises SlurmError where the controller does not answer.

    It checks account, partition, QOS and resources. It takes a job for a partition that is down, or with a time above the
    partition's limit: such a job pends for ever.
    """
    done = command.ask("sbatch", "--test-only", script=script)
    said = " ".join(re.sub(r"^sbatch: (error: )?", "", line) for line in done.stderr.splitlines() if line.strip())
    if done.returncode == 0:
        start = re.search(r"to start at (\S+)", said)
        return Trial(True, said, start[1] if start else "")
    if "contact" in said.lower() or "timed out" in said.lower() or "fetch_config" in said.lower():
        raise SlurmError(f"sbatch: {said}", "try again later, or tell the administrators")
    found = re.search(r"allocation failure: (.*)", said)
    return Trial(False, found[1] if found else said or "sbatch --test-only failed without a word")


# ---------------------------------------------------------------- how they are read


def _partition(name: str, rows: list[list[str]]) -> SlurmPartition:
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
    return SlurmPartition(name.rstrip("*"), first[1], _limit_s(first[2]), nodes, is_default=name.endswith("*"))


def gpus_of(gres: str) -> tuple[tuple[str, int], ...]:
    """The GPUs in sinfo's words: "gpu:h100:8(S:0-1),nvme:1" is (("h100", 8),), "gpu:4" is (("", 4),)."""
    found: dict[str, int] = {}
    for match in _GRES.finditer(gres):
        kind = match["type"] or ""
        found[kind] = found.get(kind, 0) + int(match["count"])
    return tuple(found.items())


def _number(text: str) -> int:
    """ "112", and "112+" of nodes that have at least so many."""
    digits = re.match(r"[0-9]+", text)
    return int(digits[0]) if digits else 0


def _limit_s(text: str) -> int | None:
    try:
        return seconds(text)
    except ValueError:  # "infinite"
        return None


def _cluster_name() -> str:
    try:
        return configuration().get("ClusterName", "")
    except SlurmError:
        return ""


def _output(*arguments: str) -> str:
    done = command.ask(*arguments)
    if done.returncode != 0 and "fetch_config" in done.stderr:
        raise SlurmError("this machine knows no Slurm cluster (it finds no slurm.conf)", NO_SLURM)
    if done.returncode != 0:
        said = _without_names(done.stderr, arguments[0]) or f"exit code {done.returncode} without a word"
        raise SlurmError(f"{arguments[0]}: {said}", command.TRY_LATER)
    return done.stdout


def _without_names(said: str, program: str) -> str:
    lines = (re.sub(rf"^{re.escape(program)}: (error: )?", "", line).strip() for line in said.splitlines())
    return " ".join(filter(None, lines))
