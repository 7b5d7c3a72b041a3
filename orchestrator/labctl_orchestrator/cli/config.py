"""labctl config"""

from __future__ import annotations

import json

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.request import settings
from labctl_orchestrator.store import workspace
from labctl_orchestrator.terminal import tables


@click.command("config")
@click.option("-p", "--partition", help="Show the keys of this partition instead of the submission defaults.")
@json_option
def command(partition: str | None, as_json: bool) -> None:
    """Show each setting and its source.

    The first source wins: flags, LABCTL_* variables, the workspace's labctl.toml, your own (~/.config/labctl/labctl.toml), the
    site's (/etc/labctl.toml or LABCTL_SITE), labctl's defaults.

    \b
    labctl config
    labctl config -p dgxh
    """
    known = settings.load(workspace.find())
    explained = known.explained_defaults() if partition is None else known.explained_partition(partition)
    if as_json:
        print_json([{"key": key, "value": value, "source": source} for key, value, source in explained])
        return
    rows = [(key, json.dumps(value, ensure_ascii=False), source) for key, value, source in explained]
    tables.table(("key", "value", "source"), rows)
    if partition is None:
        tables.note(f"partitions: {', '.join(known.names())} (labctl config -p NAME)")
