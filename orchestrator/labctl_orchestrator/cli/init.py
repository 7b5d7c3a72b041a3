"""labctl init"""

from __future__ import annotations

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.workspace import SETTINGS_FILE, Workspace, at_home
from labctl_slurm.errors import WrongUseError

TEMPLATE = """\
# labctl's settings for what is submitted from this folder and those below it. `labctl config` shows what applies, and where
# each value comes from. Take the # away from what you need.

# [defaults]                         # of every request; the keys are those of the flags of `labctl submit`
# partition = "dgxh"
# model_id = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"

# [partitions.dgxh]                  # overrides keys of a shipped partition, or adds a partition of your own
# account = "my-account"
# python = "/path/to/environment/bin/python"
# setup = ["module load cuda"]
"""


@click.command("init")
@click.argument("folder", required=False, default=".")
@json_option
def command(folder: str, as_json: bool) -> None:
    """Make a workspace: a folder to submit from.

    Writes labctl.toml, with every line a comment, and .labctl/, where labctl keeps what it does. Without it, the first
    submit makes .labctl/ in the current folder.

    \b
    labctl init ~/lab && cd ~/lab
    """
    workspace = Workspace(at_home(folder).absolute())
    if workspace.settings_file.exists() and workspace.data.is_dir():
        raise WrongUseError(f"{workspace.root} is a workspace already", f"edit its {SETTINGS_FILE}")
    workspace.create()
    if not workspace.settings_file.exists():
        workspace.settings_file.write_text(TEMPLATE, encoding="utf-8")
    if as_json:
        print_json({"workspace": str(workspace.root), "settings": str(workspace.settings_file)})
        return
    click.echo(f"{workspace.root} is a workspace: {SETTINGS_FILE} is yours to edit, .labctl/ is labctl's")
