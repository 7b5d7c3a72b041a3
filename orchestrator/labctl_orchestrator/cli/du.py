"""labctl du"""

from __future__ import annotations

import click

from labctl_orchestrator import clean, screen, workspace
from labctl_orchestrator.cli import options


@click.command("du")
@options.json_option
def command(as_json: bool) -> None:
    """Tell what takes a workspace's space, by kind.

    \b
    labctl du
    """
    here = workspace.existing()
    sizes = clean.sizes(here)
    if as_json:
        options.print_json(sizes)
        return
    rows = [[kind, screen.figure(size, "B")] for kind, size in sizes.items()]
    screen.table(["what", "size"], [*rows, ["all", screen.figure(sum(sizes.values()), "B")]], right=["size"])
    screen.note("labctl clean --dry-run tells what of it may go")
