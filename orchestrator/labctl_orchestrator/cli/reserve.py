"""labctl reserve"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import click

from labctl_orchestrator.cli import options
from labctl_orchestrator.request import settings
from labctl_orchestrator.request.request import build
from labctl_orchestrator.submission import reserve
from labctl_orchestrator.terminal import tables
from labctl_slurm import command as slurm_command
from labctl_slurm import limits, site
from labctl_slurm.errors import NO_SLURM, PreflightError, SlurmError, WrongUseError, nearest


@click.command("reserve")
@click.option("-p", "--partition", "name", help="The partition; else the one that submit takes where none is given.")
@click.option("--gpus", type=click.IntRange(min=1), help="GPUs of the allocation.")
@options.how_options
@click.option("--print", "print_only", is_flag=True, help="Print the srun command; reserve nothing.")
@click.argument("program", nargs=-1, metavar="[-- COMMAND...]", type=click.UNPROCESSED)
def command(name: str | None, gpus: int | None, print_only: bool, program: tuple[str, ...], **flags: Any) -> int:
    """Reserve a node and open a shell on it.

    srun with the partition's account, time, GPUs, CPUs and memory; inside, a bash with the partition's setup, env and
    Python, and labctl run ready. Or runs a COMMAND there and returns its exit code.

    \b
    labctl reserve -p dgxh
    labctl reserve -p dgxh --time 0-02:00:00 --gpus 4
    labctl reserve -p dgxh -- labctl run --max-new-tokens 64
    labctl reserve -p dgxh --print       the srun command alone
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
    words = reserve.command(partition, gpus, inside, pty=not program or sys.stdin.isatty())
    if not print_only:
        _refuse_what_never_starts(partition.slurm_names, partition.time)
    tables.note_new(here)
    reserve.write_shell(here, partition, gpus)
    if print_only:
        click.echo(shlex.join(words))
        return 0
    try:
        with options.ctrl_c(signal.SIG_IGN):  # for srun: twice ends the wait, once reaches the shell
            return subprocess.run(words, env=slurm_command.environment(), check=False).returncode
    except FileNotFoundError:
        raise SlurmError("command not found on this machine: srun", NO_SLURM) from None


def _default(known: settings.Settings) -> str:
    partitions = build(known.defaults).partition
    if not partitions:
        raise WrongUseError("no partition was given", f"give --partition: {', '.join(known.names())}")
    return partitions[0]


def _refuse_what_never_starts(slurm_names: Sequence[str], time: str) -> None:
    """srun would wait for ever, without a word."""
    found, unknown = site.find(slurm_names)
    if unknown:
        names = [partition.name for partition in site.partitions()]
        raise PreflightError(f"Slurm has no partition {unknown[0]!r}", nearest(unknown[0], names))
    too_long = limits.above_limit(time, found)
    if too_long:
        raise PreflightError(f"{too_long}: srun would wait for ever", "give a shorter --time")
