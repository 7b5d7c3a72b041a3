"""An interactive allocation: the srun that a person would type, made from the partition's settings, and the shell inside it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import WrongUseError
from labctl_slurm.partitions import Partition

PARTITION_VARIABLE = "LABCTL_PARTITION"


def command(partition: Partition, gpus: int, inside: list[str], *, pty: bool = True) -> list[str]:
    """srun with what the partition says, and what is to run inside. Raises WrongUseError for a partition without Slurm."""
    if partition.executor != "slurm":
        raise WrongUseError(
            f"partition {partition.name!r} is this machine: there is nothing to reserve", "use labctl run -p local"
        )
    further = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in partition.sbatch.items()
        if name not in _SBATCHS_OWN and value != ""
    ]
    words = [*partition.resources(gpus).words(), f"--job-name=labctl-reserve-{partition.name}", *further]
    return ["srun", *words, *(["--pty"] if pty else []), *inside]


# Options of sbatch that srun does not have, or that would make no sense for a shell.
_SBATCHS_OWN = ("requeue", "no-requeue", "begin", "mail-type", "mail-user", "ignore-pbs", "get-user-env", "export-file")


def shell_file(workspace: Workspace, partition: Partition) -> Path:
    """Where the commands lie that make the reserved shell; in the workspace, which nodes share."""
    return workspace.data / "reserve" / f"{partition.name}.bashrc"


def write_shell(workspace: Workspace, partition: Partition, gpus: int) -> Path:
    """Write the file that the reserved bash begins with; its path."""
    path = shell_file(workspace, partition)
    workspace.create()
    path.parent.mkdir(exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(shell(partition, gpus), encoding="utf-8")
    staging.replace(path)
    return path


def shell(partition: Partition, gpus: int) -> str:
    """What makes a bash one of this partition: the user's own start-up first, then `setup` and `env` as a job has them, the
    partition's Python before others, labctl behind them, which takes this partition where none is given."""
    python = Path(partition.python)
    home = python.parent.parent
    # As `activate` would set it.
    active = [f"export VIRTUAL_ENV={shlex.quote(str(home))}"] if (home / "pyvenv.cfg").is_file() else []
    greeting = (
        f"{partition.name}: labctl run measures one cell here; python is {partition.python}; exit gives the node back"
    )
    first = f'{shlex.quote(str(python.parent))}:"$PATH"' if python.is_absolute() else '"$PATH"'
    lines = [
        "# Written by labctl reserve, each time anew.",
        "[ -r ~/.bashrc ] && . ~/.bashrc",
        *partition.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(partition.env.items())),
        f"export PATH={first}:{shlex.quote(str(Path(sys.executable).parent))}",
        *active,
        f"export {PARTITION_VARIABLE}={shlex.quote(partition.name)}",
        # srun of Slurm 22.05 and later does not inherit --cpus-per-task.
        *([f"export SRUN_CPUS_PER_TASK={cpus}"] if (cpus := partition.resources(gpus).cpus) is not None else []),
        f'if [ -n "$PS1" ]; then PS1={shlex.quote(f"[{partition.name} $SLURM_JOB_ID] ")}"$PS1"; echo {shlex.quote(greeting)}; fi',
    ]
    return "\n".join(lines) + "\n"
