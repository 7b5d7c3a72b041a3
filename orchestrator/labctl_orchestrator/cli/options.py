"""Options that several commands share, and how they become a plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from labctl_orchestrator import models, plan, request, settings, workspace
from labctl_orchestrator.plan import Plan
from labctl_orchestrator.request import Request
from labctl_orchestrator.screen import note
from labctl_orchestrator.workspace import Workspace
from labctl_slurm.partitions import Partition

F = TypeVar("F", bound=Callable[..., Any])


def request_options(command: F) -> F:
    """The options that make a request."""
    options = [
        click.option(
            "-p",
            "--partition",
            "partitions",
            multiple=True,
            required=True,
            help="Where to run: dgx2, dgxh, local, or one of yours.",
        ),
        click.option("--backend", "backends", multiple=True, default=("hf",), show_default=True, help="The engine."),
        click.option(
            "--model-id",
            "models",
            multiple=True,
            default=(request.DEFAULT_MODEL,),
            show_default=True,
            help="A hub id, or the folder of a checkpoint.",
        ),
        click.option(
            "--dtype",
            "dtypes",
            multiple=True,
            default=("auto",),
            show_default=True,
            help="auto, float16, bfloat16 or float32; auto is the partition's.",
        ),
        click.option("--prompt", default=request.DEFAULT_PROMPT, show_default=True, help="The text to answer."),
        click.option(
            "--max-new-tokens",
            "--max-tokens",
            "max_new_tokens",
            type=int,
            multiple=True,
            default=(request.DEFAULT_MAX_NEW_TOKENS,),
            show_default=True,
            help="Longest answer, in tokens.",
        ),
        click.option(
            "--repeats",
            type=int,
            default=request.DEFAULT_REPEATS,
            show_default=True,
            help="Measured passes of each run.",
        ),
        click.option("--gpus", type=int, help="GPUs of a job.  [default: the partition's, two as shipped]"),
        click.option("--name", help="A name for this request, to find it by."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on standard output.")


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


@dataclass(frozen=True)
class Asked:
    """A request with all that it resolves to."""

    workspace: Workspace
    request: Request
    partitions: dict[str, Partition]
    plan: Plan


def asked(prompt: str, **values: Any) -> Asked:
    """Check the request, resolve its partitions and models, and plan it. Raises LabctlError; writes nothing."""
    wanted = Request(prompts=(prompt,), **values)
    request.check(wanted)
    here = workspace.find() or Workspace(Path.cwd())
    known = settings.load(here)
    partitions = {name: known.partition(name) for name in wanted.partitions}
    resolved = {}
    for model in dict.fromkeys(wanted.models):
        resolved[model], warning = models.resolve(model)
        if warning:
            note(f"warning: {warning}")
    return Asked(here, wanted, partitions, plan.make_plan(wanted, partitions, resolved, plan.device_of))
