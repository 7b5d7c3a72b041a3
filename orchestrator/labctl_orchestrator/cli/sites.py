"""labctl sites"""

from __future__ import annotations

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.terminal import tables
from labctl_slurm import site_profiles


@click.command("sites")
@json_option
def command(as_json: bool) -> None:
    """List the clusters for which labctl has a profile.

    A profile is a ready labctl.toml for a public cluster: how to request its GPUs, memory and CPUs. A comment at each
    setting quotes the cluster's documentation.

    \b
    labctl sites
    labctl init --site narval            # make a workspace from a profile
    """
    profiles = [site_profiles.load(name) for name in site_profiles.names()]
    if as_json:
        found = [
            {
                "name": one.name,
                "title": one.title,
                "gpus": one.gpus,
                "partitions": list(one.partitions),
                "checked": one.checked.isoformat(),
            }
            for one in profiles
        ]
        print_json(found)
        return
    rows = [(one.name, one.title, ", ".join(one.gpus), one.checked.isoformat()) for one in profiles]
    tables.table(("name", "title", "GPUs", "checked"), rows)
    tables.note("labctl init --site NAME makes a workspace from a profile")
