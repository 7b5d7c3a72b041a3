"""Options that choose the runs and the question of a comparison: labctl compare and labctl report have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.argument("names", nargs=-1, metavar="[RUN|SUBMISSION|SLURM_ID|ORIGIN]..."),
    click.option(
        "--by",
        multiple=True,
        metavar="AXIS...",
        help="Setting to compare, such as backend.  [default: the first that varies]",
    ),
    click.option(
        "--baseline",
        metavar="VALUE",
        help="Value to which ratios refer, such as hf or backend=hf.  [default: the first row]",
    ),
    click.option(
        "--metric",
        "metrics",
        multiple=True,
        metavar="NAME...",
        help="Metric to compare, such as throughput or ttft (docs/metrics.md).",
    ),
    click.option(
        "--where",
        "conditions",
        multiple=True,
        metavar="CONDITION...",
        help="Only runs that match, such as dtype=float16, 'batch_size>=8' or 'backend in hf,vllm'.",
    ),
    click.option(
        "--slo",
        multiple=True,
        metavar="LEVEL...",
        help="Service level, such as 'ttft_p99<500ms', for goodput.  [default: the submission's]",
    ),
    click.option("--all", "everything", is_flag=True, help="All runs of this workspace and all imported runs."),
)


def comparison_options(command: F) -> F:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
