"""labctl render"""

from __future__ import annotations

from typing import Any

import click

from labctl_orchestrator.cli import options
from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.submission.job_arrays import write
from labctl_orchestrator.terminal import tables
from labctl_slurm.errors import WrongUseError


@click.command("render")
@options.request_options
@json_option
def command(file: str | None, as_json: bool, **flags: Any) -> None:
    """Print the Slurm script of a request, without submitting it.

    The script is the one that labctl submit would send, but for its command: submit runs the worker through submitit, this
    one runs it itself. Its records are collected like any other.

    \b
    labctl render -p dgxh > x.slurm && sbatch x.slurm
    """
    prepared = options.prepared(file, flags, again=True, check=False)
    if len(prepared.rules.partitions) != 1:
        raise WrongUseError("one script is for one partition", "give --partition once")
    (partition,) = prepared.rules.partitions.values()
    if partition.executor != "slurm":
        raise WrongUseError(f"partition {partition.name!r} has no Slurm script", "labctl submit runs it without Slurm")
    if len(prepared.arrays) != 1:
        raise WrongUseError(
            f"this request makes {len(prepared.arrays)} scripts: its jobs differ in GPUs or in time",
            "labctl submit --dry-run shows them all; one value of --gpus and a large --time make them one",
        )
    (array,) = prepared.arrays
    tables.note_new(prepared.workspace)
    write(prepared.workspace, [array])
    if as_json:
        runs = [run.run_id for job in array.jobs for run in job.runs]
        print_json({"array_id": array.array_id, "runs": runs, "script": array.text_by_hand()})
    else:
        click.echo(array.text_by_hand(), nl=False)
