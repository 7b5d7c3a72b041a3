"""labctl reserve"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from typing import Any

import click

from labctl_orchestrator.cli import options
from labctl_orchestrator.cli.submit import note_warning
from labctl_orchestrator.preflight import slurm_checks
from labctl_orchestrator.request import settings
from labctl_orchestrator.request.request import build
from labctl_orchestrator.submission import reserve
from labctl_orchestrator.terminal import tables
from labctl_slurm import command as slurm_command
from labctl_slurm import site
from labctl_slurm.errors import NO_SLURM, PreflightError, SlurmError, WrongUseError
from labctl_slurm.partitions import Partition


@click.command("reserve")
@click.option("-p", "--partition", "name", help="Partition.  [default: that of labctl submit]")
@click.option("--gpus", type=click.IntRange(min=1), help="GPUs of the allocation.  [default: the partition's]")
@options.slurm_options
@click.option("--print", "print_only", is_flag=True, help="Print the srun command; reserve nothing.")
@click.argument("program", nargs=-1, metavar="[-- COMMAND...]", type=click.UNPROCESSED)
def command(name: str | None, gpus: int | None, print_only: bool, program: tuple[str, ...], **flags: Any) -> int:
    """Reserve a node and open a shell on it.

    Runs srun with the partition's account, time, GPUs, CPUs and memory. The shell starts as jobs do: with the partition's
    setup lines, variables and Python (labctl.toml). With COMMAND: run it there and return its exit code.

    \b
    labctl reserve -p dgxh
    labctl reserve -p dgxh --time 0-02:00:00 --gpus 4
    labctl reserve -p dgxh -- labctl run --max-new-tokens 64
    labctl reserve -p dgxh --print       # print the srun command
    """
    here = options.here()
    known = settings.load(here)
    partition = known.partition(name or _default(known), options.overrides(flags))
    gpus = gpus or partition.gpus
    begin = str(reserve.shell_file(here, partition))
    inside = (
        ["bash", "-c", f". {shlex.quote(begin)}; {shlex.join(program)}"]
        if program
        else ["bash", "--rcfile", begin, "-i"]
    )
    srun = reserve.command(partition, gpus, inside, pty=not program or sys.stdin.isatty())
    if not print_only:
        _check_startable(partition, gpus)
    tables.note_new(here)
    reserve.write_shell(here, partition, gpus)
    if print_only:
        click.echo(shlex.join(srun))
        return 0
    try:
        with options.ctrl_c(signal.SIG_IGN):  # srun handles it: once reaches the shell, twice ends the wait
            return subprocess.run(srun, env=slurm_command.environment(), check=False).returncode
    except FileNotFoundError:
        raise SlurmError("command not found on this machine: srun", NO_SLURM) from None


def _default(known: settings.Settings) -> str:
    partitions = build(known.defaults).partition
    if not partitions:
        raise WrongUseError("no partition given", f"add --partition: {', '.join(known.names())}")
    return partitions[0]


def _check_startable(partition: Partition, gpus: int) -> None:
    """Raises PreflightError for a job that never starts: srun would wait, or refuse it in words of its own."""
    for finding in slurm_checks.of_partition(partition, gpus, *site.find(partition.slurm_names, partition.cluster)):
        if finding.severity == "refuse":
            raise PreflightError(finding.what, finding.remedy)
        note_warning(finding)
