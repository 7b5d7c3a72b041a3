"""How Slurm's commands are called: in one environment, so that all of them ask the same cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# They would answer for us: SBATCH_PARTITION beats a script's own line, SINFO_FORMAT another's question, and an enclosing
# job's SLURM_* what the script says.
_ANSWERING = (
    "SLURM_",
    "SLURMD_",
    "SBATCH_",
    "SALLOC_",
    "SRUN_",
    "SINFO_",
    "SQUEUE_",
    "SACCT_",
    "SCONTROL_",
    "SUBMITIT_",
)
# They say which cluster the shell means, and who asks.
_KEPT = ("SLURM_CLUSTERS", "SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")


@dataclass(frozen=True)
class Cluster:
    """Where a job is: the `name` of a cluster as SLURM_CLUSTERS has it ("" for the one of slurm.conf), and the file that
    SLURM_CONF named ("" for Slurm's default)."""

    name: str = ""
    conf: str = ""

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "conf": self.conf}

    @classmethod
    def from_json(cls, document: Mapping[str, str]) -> Cluster:
        return cls(str(document.get("name", "")), str(document.get("conf", "")))


def meant() -> list[Cluster]:
    """The cluster that the shell means; several where SLURM_CLUSTERS names several, of which sbatch takes one."""
    conf = os.environ.get("SLURM_CONF", "")
    names = [name.strip() for name in os.environ.get("SLURM_CLUSTERS", "").split(",")]
    return [Cluster(name, conf) for name in dict.fromkeys(filter(None, names))] or [Cluster("", conf)]


def environment(cluster: Cluster | None = None) -> dict[str, str]:
    """The environment of every command of Slurm: this process's, without the variables that would change the question.
    It asks the cluster that the shell means, or the one that is given."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or not name.startswith(_ANSWERING)}
    if cluster is None:
        return kept
    chosen = {"SLURM_CLUSTERS": cluster.name, "SLURM_CONF": cluster.conf}
    if cluster.conf and not Path(cluster.conf).is_file():
        del chosen["SLURM_CONF"]  # a compute node's own copy: another machine has it elsewhere
    kept = {name: value for name, value in kept.items() if name not in chosen}
    return {**kept, **{name: value for name, value in chosen.items() if value}}
