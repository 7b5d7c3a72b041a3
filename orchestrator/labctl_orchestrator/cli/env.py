"""labctl env"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
import msgspec

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.request import plan, settings
from labctl_orchestrator.request.paths import expand_home
from labctl_orchestrator.store import workspace
from labctl_orchestrator.terminal import tables
from labctl_orchestrator.terminal.messages import folded
from labctl_slurm import environments
from labctl_slurm.environments import Environment, Installed
from labctl_slurm.errors import LabctlError, WrongUseError
from labctl_slurm.partitions import Partition
from labctl_workers.engines import ENGINES
from labctl_workers.probe import VLLM_FOR_CPUS


@click.command("env")
@click.option("-p", "--partition", "name", help="Partition whose GPUs the environment must support.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(tuple(ENGINES)),
    help="Backend to install.  [default: all]",
)
@click.option("--create", metavar="PATH", help="Build the environment at PATH, with uv if installed, else with pip.")
@json_option
def command(name: str | None, backends: tuple[str, ...], create: str | None, as_json: bool) -> None:
    """Show or build the Python environment of a partition.

    Prints the versions of torch, transformers and vLLM that support the partition's GPUs. Use one environment per partition:
    current torch and vLLM do not support the V100.

    \b
    labctl env -p dgx2
    labctl env -p dgx2 --create ~/envs/v100
    """
    known = settings.load(workspace.find())
    if name is None:
        raise WrongUseError("no partition given", f"add --partition: {', '.join(known.names())}")
    partition = known.partition(name)
    device = plan.device_of(partition)
    if device.kind == "cuda" and device.capability is None:
        raise WrongUseError(
            f"unknown compute capability of partition {name!r}",
            f"set capability in [partitions.{name}] of labctl.toml: nvidia-smi --query-gpu=compute_cap --format=csv",
        )
    environment = environments.environment_for(device.capability, device.kind)
    chosen = backends or tuple(ENGINES)
    if create is not None and partition.image is not None:
        raise WrongUseError(f"partition {name!r} uses the Python in {partition.image.image}", "omit --create")
    if create is not None:
        python = environments.create(environment, chosen, expand_home(create).absolute())
        _print_built(partition, environment, python, as_json)
        return
    packages = [package.name for package in environment.packages_for(chosen)]
    installed = environments.installed_in(partition, [*packages, VLLM_FOR_CPUS])
    if as_json:
        print_json(_json(partition, environment, chosen, installed))
        return
    _print(partition, environment, chosen, installed)


def _print(
    partition: Partition, environment: Environment, backends: tuple[str, ...], installed: Installed | None
) -> None:
    first, last = environment.python
    click.echo(f"{partition.name} has {environment.title}: Python {first} to {last}")
    click.echo(folded(f"dtypes: {environment.dtypes}"))
    click.echo()
    has = {} if installed is None else installed.packages
    rows = [
        [
            package.requirement,
            environments.shown_version(package.name, has) or ("" if installed is None else "none"),
            package.reason,
        ]
        for package in environment.packages_for(backends)
    ]
    tables.table(["required", "installed", "reason"], rows)
    click.echo()
    if installed is None:
        click.echo(
            folded(f"cannot read the packages of {partition.python_name} here; labctl doctor --on-node reads them")
        )
    else:
        click.echo(f"installed: {partition.python_name}, Python {installed.python}")
    click.echo(folded(environment.tried))
    if partition.image is not None:
        return
    click.echo(f"\nlabctl env -p {partition.name} --create PATH runs:")
    try:
        for line in environments.commands(environment, backends, Path("PATH")):
            program = Path(line[0]).name if Path(line[0]).is_absolute() else line[0]
            click.echo(f"  {shlex.join([program, *line[1:]])}")
    except LabctlError as error:
        click.echo(folded(f"  {error.message} -> {error.remedy}"))
    click.echo(f'then set in labctl.toml:\n  [partitions.{partition.name}]\n  python = "PATH/bin/python"')


def _print_built(partition: Partition, environment: Environment, python: Path, as_json: bool) -> None:
    packages = [package.name for package in environment.packages]
    built = environments.installed_in(
        msgspec.structs.replace(partition, python=str(python), setup=[], env={}), packages
    )
    if built is None:
        raise LabctlError(f"{python} does not run", "see its output above")
    if as_json:
        packages_now = dict(built.packages)
        print_json({
            "partition": partition.name, "python": str(python), "version": built.python, "packages": packages_now
        })  # fmt: skip
        return
    click.echo(f"{python}: Python {built.python}, " + ", ".join(f"{n} {v}" for n, v in built.packages.items()))
    click.echo(f'set in labctl.toml:\n  [partitions.{partition.name}]\n  python = "{python}"')


def _json(
    partition: Partition, environment: Environment, backends: tuple[str, ...], installed: Installed | None
) -> dict[str, Any]:
    try:
        build = environments.commands(environment, backends, Path("PATH"))
    except LabctlError:
        build = []
    return {
        "partition": partition.name,
        "title": environment.title,
        "python": list(environment.python),
        "dtypes": environment.dtypes,
        "tried": environment.tried,
        "packages": [msgspec.to_builtins(package) for package in environment.packages_for(backends)],
        "commands": build,
        "installed": None if installed is None else {"python": installed.python, "packages": dict(installed.packages)},
    }
