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
@options.submission_options
@json_option
def command(file: str | None, as_json: bool, **flags: Any) -> None:
    """Print the Slurm script of a submission.

    Change the script if you like, then submit it with sbatch: labctl status and labctl compare show its runs. The last
    line starts the worker: the process that measures on the node. The script of labctl submit differs only in this line.

    \b
    labctl render -p dgxh > job.slurm
    sbatch job.slurm
    """
    prepared = options.prepared(file, flags, again=True, check=False)
    if len(prepared.rules.partitions) != 1:
        raise WrongUseError(
            f"a script has one partition, not {len(prepared.rules.partitions)}", "give --partition once"
        )
    (partition,) = prepared.rules.partitions.values()
    if partition.executor != "slurm":
        raise WrongUseError(f"no Slurm script for partition {partition.name!r}", "labctl submit runs it without Slurm")
    if len(prepared.arrays) != 1:
        raise WrongUseError(
            f"this submission has {len(prepared.arrays)} scripts: its jobs differ in GPUs or time limit",
            "labctl submit --dry-run prints all; for one script give one --gpus and a large --time",
        )
    (array,) = prepared.arrays
    tables.note_new(prepared.workspace)
    write(prepared.workspace, [array])
    if as_json:
        runs = [run.run_id for job in array.jobs for run in job.runs]
        print_json({"array_id": array.array_id, "runs": runs, "script": array.text_by_hand()})
    else:
        click.echo(array.text_by_hand(), nl=False)
