"""labctl completion"""

from __future__ import annotations

import os
from pathlib import Path

import click

from labctl_slurm.errors import WrongUseError

SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS), required=False)
def command(shell: str | None) -> None:
    """Print the completion script of a shell.

    The Tab key then completes commands, options and values, such as partitions, cached models, runs and metrics. Default: your
    current shell.

    \b
    eval "$(labctl completion bash)"          # in ~/.bashrc
    labctl completion zsh > "${fpath[1]}/_labctl"
    labctl completion fish > ~/.config/fish/completions/labctl.fish
    """
    from click.shell_completion import get_completion_class

    from labctl_orchestrator.cli import COMPLETION_VARIABLE, labctl

    shell = shell or Path(os.environ.get("SHELL", "")).name
    kind = get_completion_class(shell) if shell in SHELLS else None
    if kind is None:
        raise WrongUseError(f"no completion for this shell: {shell!r}", f"name one of {', '.join(SHELLS)}")
    made = kind(labctl, {}, "labctl", COMPLETION_VARIABLE)
    click.echo(made.source_template % made.source_vars(), nl=False)
