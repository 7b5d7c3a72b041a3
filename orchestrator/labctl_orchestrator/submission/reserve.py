"""An interactive allocation: the srun command of a partition, and the shell that it starts."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import WrongUseError
from labctl_slurm.partitions import Partition
from labctl_workers.record import write_bytes

PARTITION_VARIABLE = "LABCTL_PARTITION"


def command(partition: Partition, gpus: int, inside: list[str], *, pty: bool = True) -> list[str]:
    """srun with the partition's options, and the command `inside`. Raises WrongUseError for a partition without Slurm."""
    if partition.executor != "slurm":
        raise WrongUseError(f"partition without Slurm: {partition.name}", f"use labctl run -p {partition.name}")
    further = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in partition.sbatch.items()
        if name not in _SBATCHS_OWN and value != ""
    ]
    words = [*partition.resources(gpus).words(), f"--job-name=labctl-reserve-{partition.name}", *further]
    return ["srun", *words, *(["--pty"] if pty else []), *inside]


# Options of sbatch that srun lacks, or that are useless for a shell.
_SBATCHS_OWN = ("requeue", "no-requeue", "begin", "mail-type", "mail-user", "ignore-pbs", "get-user-env", "export-file")


def shell_file(workspace: Workspace, partition: Partition) -> Path:
    """The start-up file of the reserved shell, in the workspace, which nodes share."""
    return workspace.data / "reserve" / f"{partition.name}.bashrc"


def write_shell(workspace: Workspace, partition: Partition, gpus: int) -> None:
    """Write the start-up file of the reserved shell."""
    workspace.create()
    write_bytes(shell_file(workspace, partition), shell(partition, gpus).encode(), durable=False)


def shell(partition: Partition, gpus: int) -> str:
    """The start-up of the reserved bash: ~/.bashrc, then `setup` and `env` of the partition, with its Python first on PATH and
    labctl last. labctl run uses this partition by default."""
    python = Path(partition.python)
    home = python.parent.parent
    outside = python.is_absolute() and partition.image is None
    # As `activate` sets it.
    active = [f"export VIRTUAL_ENV={shlex.quote(str(home))}"] if outside and (home / "pyvenv.cfg").is_file() else []
    greeting = (
        f"{partition.name}: labctl run measures one run here; python is {partition.python_name}; exit releases the node"
    )
    first = f'{shlex.quote(str(python.parent))}:"$PATH"' if outside else '"$PATH"'
    lines = [
        "# Written by labctl reserve, which overwrites it.",
        "[ -r ~/.bashrc ] && . ~/.bashrc",
        *partition.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(partition.env.items())),
        f"export PATH={first}:{shlex.quote(str(Path(sys.executable).parent))}",
        *active,
        f"export {PARTITION_VARIABLE}={shlex.quote(partition.name)}",
        # Since Slurm 22.05, srun does not inherit --cpus-per-task.
        *([f"export SRUN_CPUS_PER_TASK={cpus}"] if (cpus := partition.resources(gpus).cpus) is not None else []),
        f'if [ -n "$PS1" ]; then PS1={shlex.quote(f"[{partition.name} $SLURM_JOB_ID] ")}"$PS1"; echo {shlex.quote(greeting)}; fi',
    ]
    return "\n".join(lines) + "\n"
