"""labctl config"""

from __future__ import annotations

import json
import re

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.request import settings
from labctl_orchestrator.store import workspace
from labctl_orchestrator.terminal import tables


def _defaults_in_words() -> dict[str, str]:
    """What happens if a setting has no value, from the help of its option: "the partition's, usually 2"."""
    from labctl_orchestrator.cli import submit

    helps = {
        str(option.name): option.help or "" for option in submit.command.params if isinstance(option, click.Option)
    }
    return {key: found[1] for key, text in helps.items() if (found := re.search(r"\[default: (.*)\]", text))}


@click.command("config")
@click.option("-p", "--partition", help="Show the settings of this partition. Without -p: defaults of labctl submit.")
@json_option
def command(partition: str | None, as_json: bool) -> None:
    """Show each setting and its source.

    \b
    If several sources have a setting, the first one wins:
      1. flags of the command
      2. LABCTL_* variables
      3. labctl.toml of the workspace
      4. ~/.config/labctl/labctl.toml
      5. the site's file: LABCTL_SITE, else /etc/labctl.toml
      6. labctl's defaults

    \b
    labctl config
    labctl config -p dgxh
    """
    known = settings.load(workspace.find())
    explained = known.explained_defaults() if partition is None else known.explained_partition(partition)
    if as_json:
        print_json([{"key": key, "value": value, "source": source} for key, value, source in explained])
        return
    unset = _defaults_in_words() if partition is None else {}
    rows = [
        (key, unset.get(key, "none") if value in (None, [], {}, ()) else json.dumps(value, ensure_ascii=False), source)
        for key, value, source in explained
    ]
    tables.table(("key", "value", "source"), rows)
    if partition is None:
        tables.note(f"partitions: {', '.join(known.names())} (labctl config -p NAME)")
