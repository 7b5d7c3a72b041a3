"""labctl run"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from labctl_orchestrator.cli import options
from labctl_orchestrator.request import settings
from labctl_orchestrator.request.plan import NO_GPU_HERE
from labctl_orchestrator.store import workspace
from labctl_orchestrator.submission.job_arrays import JobArray, write
from labctl_orchestrator.submission.reserve import PARTITION_VARIABLE
from labctl_orchestrator.terminal import tables
from labctl_slurm import site
from labctl_slurm.errors import PreflightError, WrongUseError


@click.command("run")
@options.request_options
@click.option("--gpu-ids", metavar="0,1", help="Which of the visible GPUs to use, in this order.")
def command(file: str | None, gpu_ids: str | None, **flags: Any) -> int:
    """Run one cell here and now, inside an allocation.

    In the foreground, with the partition's Python: types the text as it comes, prints the figures, and writes a record that
    the next collect finds. The partition is that of the allocation, or local, unless --partition says.

    \b
    srun -A eecs -p dgxh --gres=gpu:2 --mem=64G --pty labctl run --max-new-tokens 64
    labctl run -p local --model-id ~/models/tinyllama --gpu-ids 0,1
    """
    if not flags["partition"]:
        flags["partition"] = (_partition_here(),)
    chosen = None if gpu_ids is None else _chosen(gpu_ids)
    if chosen is not None and flags["gpus"] not in ((), (len(chosen),)):
        said = f"--gpu-ids names {len(chosen)} GPUs, --gpus asks for {', '.join(map(str, flags['gpus']))}"
        raise WrongUseError(said, "name as many as you ask for")
    if chosen is not None:
        flags["gpus"] = (len(chosen),)
    try:
        prepared = options.prepared(file, flags, again=True, check=False)
    except PreflightError as error:
        if chosen is None or NO_GPU_HERE not in error.message:
            raise
        raise PreflightError(
            f"{NO_GPU_HERE}, --gpu-ids names {len(chosen)}", "leave --gpu-ids out: the CPU is used"
        ) from None
    if len(prepared.run_ids) != 1:
        raise WrongUseError(f"run takes one cell, this is {len(prepared.run_ids)}", "labctl submit runs several")
    visible = None if chosen is None else _visible(chosen)
    tables.note_new(prepared.workspace)
    write(prepared.workspace, prepared.arrays)
    # Several engine loads, one after another; where one fails, the others would.
    codes = (_run(array, spec, visible) for array in prepared.arrays for spec in array.specs)
    exit_code = next((code for code in codes if code), 0)
    tables.note(f"labctl show {prepared.run_ids[0]} shows all that was measured")
    return exit_code


def _partition_here() -> str:
    """The partition of labctl's that this allocation's Slurm partition is (of several, the one that was reserved); local
    outside of one."""
    here = os.environ.get("SLURM_JOB_PARTITION")
    known = settings.load(workspace.find())
    if here is None:
        return "local"
    reserved = os.environ.get(PARTITION_VARIABLE)
    if reserved in known.names():
        return str(reserved)
    asked = here.split(",")  # srun -p gpu,dgxh: Slurm has chosen one, and names all
    slurms = {
        name: partition.slurm_names
        for name in known.names()
        if (partition := known.partition(name)).executor == "slurm"
    }
    fitting = [name for name, parts in slurms.items() if set(parts) & set(asked)]
    if len(fitting) > 1 and len(asked) > 1:
        of_node = site.partitions_of_node(os.environ.get("SLURMD_NODENAME") or socket.gethostname())
        fitting = [name for name in fitting if set(slurms[name]) & of_node & set(asked)]
    if fitting:
        return fitting[0]
    raise WrongUseError(
        f"this allocation is in Slurm's partition {here!r}, which is none of labctl's",
        f"give --partition ({', '.join(known.names())}), or describe it in labctl.toml",
    )


def _chosen(text: str) -> list[int]:
    try:
        ids = [int(word) for word in text.split(",")]
    except ValueError:
        raise WrongUseError(f"--gpu-ids {text!r} is no list of numbers", "such as --gpu-ids 0,1") from None
    if len(set(ids)) != len(ids):
        raise WrongUseError(
            f"--gpu-ids {text} names a GPU twice", "a model split over one GPU twice is split over one: name two"
        )
    if min(ids) < 0:
        raise WrongUseError(f"--gpu-ids {text} has a negative number", "GPUs count from 0")
    return ids


def _visible(ids: Sequence[int]) -> str:
    """CUDA_VISIBLE_DEVICES for the chosen ids: they count among the GPUs that this shell was given."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return ",".join(str(index) for index in ids)
    names = [name for name in given.split(",") if name.strip()]
    if max(ids) >= len(names):
        raise WrongUseError(
            f"--gpu-ids {max(ids)}: this shell was given {len(names)} GPUs ({given})", "they count from 0"
        )
    return ",".join(names[index] for index in ids)


def _run(array: JobArray, spec: Path, visible: str | None) -> int:
    worker = [array.script.partition.python, "-u", "-m", "labctl_workers.job", "--stream", str(spec)]
    shell, environment = array.script.without_slurm(shlex.join(worker))
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    process = subprocess.Popen(["/bin/bash", "-c", shell], env=environment)  # before: a child inherits what is ignored
    with options.ctrl_c(signal.SIG_IGN):  # the worker writes down that it was ended
        return process.wait()
