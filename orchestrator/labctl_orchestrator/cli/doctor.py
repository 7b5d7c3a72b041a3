"""labctl doctor"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.exchange.streams import raw, visible
from labctl_orchestrator.request import settings
from labctl_orchestrator.store import workspace
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.terminal import tables
from labctl_slurm.errors import LabctlError, WrongUseError

if TYPE_CHECKING:
    from labctl_orchestrator.preflight.finding import Check

EXIT_A_CHECK_FAILED = 1
COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}
NAME_WIDTH = 14


@click.command("doctor")
@click.option("-p", "--partition", "names", multiple=True, metavar="NAME...", help="Check these partitions only.")
@click.option("--model-id", help="Model to look for in the Hub cache.  [default: that of labctl submit]")
@click.option("--on-node", is_flag=True, help="Also check a node, in a short job on the partition's GPUs.")
@click.option("--within", type=float, default=10.0, show_default=True, help="Minutes to wait for that job.")
@json_option
def command(names: tuple[str, ...], model_id: str | None, on_node: bool, within: float, as_json: bool) -> int:
    """Check Slurm, partitions, Python, disks and the Hub.

    Prints pass, warn or fail for each check, and a remedy. Default: all partitions of labctl.toml, and dgx2 and dgxh if this
    cluster has them; without Slurm: the partition local (this machine). Exit code 1 if a check fails.

    \b
    labctl doctor
    labctl doctor -p dgxh --on-node      # also test the GPUs of a node
    """
    from labctl_orchestrator.preflight import local_checks
    from labctl_orchestrator.preflight.finding import failed

    if within <= 0:
        raise WrongUseError(f"invalid --within: {within:g}", "give minutes, such as --within 10")
    here = workspace.find() or Workspace(Path.cwd())
    tables.note_shared(here)
    known = settings.load(here)
    partitions = [known.partition(name) for name in (names or local_checks.partitions_here(known))]
    defaults = {key: value for key, value, _ in known.explained_defaults()}
    model, revision = (model_id or _first(defaults["model_id"])), _first(defaults["revision"])
    checks: list[Check] = []
    with tables.working("checking this machine"):
        checks += local_checks.general(here)
    if not as_json:
        _print("this machine", checks)
    for partition in partitions:
        with tables.working(f"checking {partition.name}"):
            own = list(local_checks.of_partition(here, partition, model, revision))
        if not as_json:
            _print(partition.name, own)
        if on_node:
            seen = _on_node(here, partition.name, within, known)
            if not as_json:
                _print(f"{partition.name}, on a node", seen)
            own += seen
        checks += own
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        _summary(checks)
    return EXIT_A_CHECK_FAILED if failed(checks) else 0


def _on_node(here: Workspace, name: str, within: float, known: settings.Settings) -> list[Check]:
    from labctl_orchestrator.preflight.finding import Check
    from labctl_orchestrator.preflight.node_job import on_node

    try:
        return on_node(here, known.partition(name), within * 60, tables.note)
    except LabctlError as error:
        return [Check(name, "node", "fail", error.message, error.remedy)]


def _first(value: object) -> str:
    """The first value of an axis; a default may be one value or a list."""
    return str(value[0]) if isinstance(value, list | tuple) and value else str(value)


def _print(title: str, checks: Sequence[Check]) -> None:
    click.echo(click.style(visible(title), bold=True), file=raw(sys.stdout))
    for check in checks:
        level = click.style(check.level, fg=COLOURS[check.level])
        _line(f"  {level}  {visible(check.name).ljust(NAME_WIDTH)} ", check.text)
        if check.remedy and check.level != "pass":
            _line(f"        {' ' * NAME_WIDTH} -> ", check.remedy)


def _line(lead: str, words: str) -> None:
    """Print the words after the lead; on a terminal, wrap them in their own column. Cleans the words: the lead has colours."""
    indent, words, out = len(click.unstyle(lead)), visible(words), raw(sys.stdout)
    if not out.isatty():
        click.echo(lead + words, file=out)
        return
    width = max(40, shutil.get_terminal_size().columns - indent)
    lines = textwrap.wrap(words, width, break_long_words=False, break_on_hyphens=False) or [""]
    click.echo(lead + f"\n{' ' * indent}".join(lines), file=out)


def _summary(checks: Sequence[Check]) -> None:
    counts = {level: sum(check.level == level for check in checks) for level in COLOURS}
    click.echo(f"{counts['pass']} passed, {counts['warn']} warned, {counts['fail']} failed")
