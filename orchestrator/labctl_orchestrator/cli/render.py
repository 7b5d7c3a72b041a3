"""labctl render"""

from __future__ import annotations

from typing import Any

import click

from labctl_orchestrator.cli import options
from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.submission import launch
from labctl_orchestrator.submission.measured_pace import stored_paces
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
    asked = options.asked(file, **flags)
    if len(asked.partitions) != 1:
        raise WrongUseError("one script is for one partition", "give --partition once")
    (partition,) = asked.partitions.values()
    if partition.executor != "slurm":
        raise WrongUseError(f"partition {partition.name!r} has no Slurm script", "labctl submit runs it without Slurm")
    pace_of = stored_paces(asked.workspace)
    scripts = len(launch.planned(asked.workspace, asked.plan, asked.shape, pace_of))
    if scripts != 1:
        remedy = "labctl submit --dry-run shows them all; one value of --gpus and a large --time make them one"
        raise WrongUseError(f"this request makes {scripts} scripts: its jobs differ in GPUs or in time", remedy)
    tables.note_new(asked.workspace)
    (batch,) = launch.prepare(asked.workspace, asked.plan, asked.shape, pace_of)
    if as_json:
        runs = [run.run_id for job in batch.jobs for run in job.runs]
        print_json({"batch_id": batch.batch_id, "runs": runs, "script": batch.text_by_hand()})
    else:
        click.echo(batch.text_by_hand(), nl=False)
