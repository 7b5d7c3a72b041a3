"""labctl run"""

from __future__ import annotations

import os
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


@options.without(
    "without_server",
    "runs_per_job",
    "jobs_at_once",
    "account",
    "time",
    "mem",
    "qos",
    "constraint",
    "sbatch",
    dots=False,
)
@click.command("run")
@options.submission_options
@click.option("--gpu-ids", metavar="0,1", help="Numbers of the GPUs to use, in this order.  [default: the first ones]")
def command(file: str | None, gpu_ids: str | None, **flags: Any) -> int:
    """Run one configuration here, in the foreground.

    Prints the answer token by token, then the metrics, and writes a record. Uses the partition's Python. Give one value of each
    setting: labctl run measures one run. Default partition: that of the current Slurm allocation, else local.

    \b
    srun -A eecs -p dgxh --gres=gpu:2 --mem=64G --pty labctl run --max-new-tokens 64
    labctl run -p local --model-id ~/models/tinyllama --gpu-ids 0,1
    """
    if not flags["partition"]:
        flags["partition"] = (_partition_here(),)
    chosen = None if gpu_ids is None else _chosen(gpu_ids)
    if chosen is not None and flags["gpus"] not in ((), (len(chosen),)):
        message = f"--gpus differs from the {len(chosen)} GPUs of --gpu-ids: {', '.join(map(str, flags['gpus']))}"
        raise WrongUseError(message, "omit --gpus")
    if chosen is not None:
        flags["gpus"] = (len(chosen),)
    try:
        prepared = options.prepared(file, flags, again=True, check=False)
    except PreflightError as error:
        if chosen is None or NO_GPU_HERE not in error.message:
            raise
        raise PreflightError(
            f"{NO_GPU_HERE}, but --gpu-ids names some: {gpu_ids}", "omit --gpu-ids to use the CPU"
        ) from None
    if len(prepared.run_ids) != 1:
        raise WrongUseError(f"labctl run takes one run, not {len(prepared.run_ids)}", "labctl submit takes several")
    visible = None if chosen is None else _visible(chosen)
    tables.note_new(prepared.workspace)
    write(prepared.workspace, prepared.arrays)
    # One engine load after another, until one fails.
    codes = (_run(array, spec, visible) for array in prepared.arrays for spec in array.specs)
    exit_code = next((code for code in codes if code), 0)
    tables.note(f"labctl show {prepared.run_ids[0]} prints all results")
    return exit_code


def _partition_here() -> str:
    """The labctl partition of this allocation (of several, the reserved one); local outside of an allocation."""
    here = os.environ.get("SLURM_JOB_PARTITION")
    known = settings.load(workspace.find())
    if here is None:
        return "local"
    reserved = os.environ.get(PARTITION_VARIABLE)
    if reserved in known.names():
        return str(reserved)
    requested = here.split(",")  # after srun -p gpu,dgxh Slurm names both
    slurms = {
        name: partition.slurm_names
        for name in known.names()
        if (partition := known.partition(name)).executor == "slurm"
    }
    fitting = [name for name, parts in slurms.items() if set(parts) & set(requested)]
    if len(fitting) > 1 and len(requested) > 1:
        of_node = site.partitions_of_node(os.environ.get("SLURMD_NODENAME") or socket.gethostname())
        fitting = [name for name in fitting if set(slurms[name]) & of_node & set(requested)]
    if fitting:
        return fitting[0]
    raise WrongUseError(
        f"labctl knows no Slurm partition {here!r}",
        f"add --partition ({', '.join(known.names())}), or describe it in labctl.toml",
    )


def _chosen(text: str) -> list[int]:
    try:
        ids = [int(word) for word in text.split(",")]
    except ValueError:
        raise WrongUseError(f"not a list of numbers: --gpu-ids {text!r}", "write --gpu-ids 0,1") from None
    if len(set(ids)) != len(ids):
        raise WrongUseError(f"the same GPU twice: --gpu-ids {text}", "name different GPUs")
    if min(ids) < 0:
        raise WrongUseError(f"negative GPU number: --gpu-ids {text}", "GPU numbers start at 0")
    return ids


def _visible(ids: Sequence[int]) -> str:
    """CUDA_VISIBLE_DEVICES for the chosen ids, which count among the GPUs that this shell can see."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return ",".join(str(index) for index in ids)
    names = [name for name in given.split(",") if name.strip()]
    if max(ids) >= len(names):
        raise WrongUseError(f"no GPU {max(ids)}: this shell has {len(names)} GPUs ({given})", "GPU numbers start at 0")
    return ",".join(names[index] for index in ids)


def _run(array: JobArray, spec: Path, visible: str | None) -> int:
    worker = array.script.worker_command("-u", "-m", "labctl_workers.job", "--stream", str(spec))
    shell, environment = array.script.without_slurm(worker)
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    process = subprocess.Popen(["/bin/bash", "-c", shell], env=environment)  # first: a child inherits SIG_IGN
    with options.ctrl_c(signal.SIG_IGN):  # the worker records the interruption
        return process.wait()
