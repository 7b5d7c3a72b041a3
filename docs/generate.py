"""Write docs/commands/ (a page a command) and docs/man/ (labctl.1, labctl-submit.1, ...) from what `labctl COMMAND --help` says.

    python docs/generate.py [FOLDER]

A test compares them with what this writes. The man pages are click-man's.
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import click
from click_man.core import generate_man_page

from labctl_orchestrator.cli import COMMANDS, labctl

HERE = Path(__file__).parent
# click writes this before a paragraph whose lines are to stay as they are: an example.
AS_IT_IS = "\b"


def write(folder: Path) -> None:
    """Write every page below `folder`, and nothing else there."""
    for name in ("commands", "man"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    (folder / "commands" / "README.md").write_text(_index(), encoding="utf-8")
    own = click.Context(labctl, info_name="labctl", **labctl.context_settings)
    (folder / "man" / "labctl.1").write_text(_man(own), encoding="utf-8")
    for name in COMMANDS:
        command = labctl.get_command(own, name)
        if command is None:
            raise KeyError(name)
        context = click.Context(command, info_name=name, parent=own)
        (folder / "commands" / f"{name}.md").write_text(_page(context), encoding="utf-8")
        (folder / "man" / f"labctl-{name}.1").write_text(_man(context), encoding="utf-8")


# ---------------------------------------------------------------- Markdown


def _index() -> str:
    rows = [f"| [`labctl {name}`]({name}.md) | {_cell(text)} |" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "# The commands",
            "",
            "Each page is what `labctl COMMAND --help` says, and `man labctl-COMMAND` too; `make docs` writes them from it.",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def _page(context: click.Context) -> str:
    lines = [f"# {context.command_path}", ""]
    for paragraph, as_it_is in _paragraphs(context.command):
        lines += ["```", paragraph, "```", ""] if as_it_is else [_prose(paragraph), ""]
    usage = " ".join([context.command_path, *context.command.collect_usage_pieces(context)])
    lines += ["## Usage", "", "```", usage, "```", "", "| option | |", "|---|---|"]
    for option, text in _options(context):
        lines.append(f"| `{_cell(option)}` | {_cell(text)} |")
    return "\n".join([*lines, ""])


def _paragraphs(command: click.Command) -> list[tuple[str, bool]]:
    """(text, whether its lines stay as they are) of each paragraph of the help."""
    parts = re.split(r"\n{2,}", inspect.cleandoc(command.help or ""))
    return [(part.removeprefix(AS_IT_IS).strip("\n"), part.startswith(AS_IT_IS)) for part in parts]


def _options(context: click.Context) -> list[tuple[str, str]]:
    options = [p for p in context.command.get_params(context) if isinstance(p, click.Option)]
    return [record for option in options if (record := option.get_help_record(context)) is not None]


def _prose(text: str) -> str:
    return re.sub(r"(?<![\w`])(_?[A-Z]+_[A-Z_]+\*?|--[a-z][a-z-]*)(?![\w`])", r"`\1`", " ".join(text.split()))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# ---------------------------------------------------------------- man


def _man(context: click.Context) -> str:
    """click-man's page, with examples left as they are: .nf and .fi are roff's words for that."""
    command = context.command
    had = command.help
    command.help = "\n\n".join(
        f".nf\n{_roff(text)}\n.fi" if as_it_is else _roff(" ".join(text.split()))
        for text, as_it_is in _paragraphs(command)
    )
    command.short_help = (had or "").partition("\n")[0]
    try:
        page = generate_man_page(context, version=f"labctl {version('labctl-slurm')}", date=version("labctl-slurm"))
    finally:
        command.help, command.short_help = had, None
    if isinstance(command, click.Group):
        page += ".SH COMMANDS\n"
        for name, (_, text) in COMMANDS.items():
            page += f".TP\n\\fBlabctl\\-{name}\\fP(1)\n{_roff(text)}\n"
    return page


def _roff(text: str) -> str:
    """No line is read as a request, and no backslash as an escape."""
    lines = text.replace("\\", "\\e").replace("-", "\\-").split("\n")
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in lines)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
