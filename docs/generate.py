"""Write docs/commands/ (a page a command) and docs/man/ (labctl.1, labctl-submit.1, ...) from what `labctl COMMAND --help` says,
and docs/troubleshooting.md from the table of reasons.

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
from labctl_slurm import diagnose

HERE = Path(__file__).parent
# click writes this before a paragraph whose lines are to stay as they are: an example.
AS_IT_IS = "\b"


def write(folder: Path) -> None:
    """Write every page below `folder`, and nothing else there."""
    for name in ("commands", "man"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    (folder / "troubleshooting.md").write_text(_troubleshooting(), encoding="utf-8")
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


# ---------------------------------------------------------------- reasons

TROUBLESHOOTING = """\
# What went wrong

`labctl status` says of each run that failed, or that waits for what never comes, why and what to do; `labctl show RUN` and
`labctl logs RUN` do too, and `--json` has the `kind`. What is not known stays `unknown`, with the log's last lines. This page
is the table behind it (`slurm/labctl_slurm/reasons.toml`; `make docs` writes the page): a new reason is an entry there.

With layers split over two GPUs, one of them works while the other waits for it: at batch 1 `nvidia-smi` shows each of them busy
half of the time at most. That is how it works, not a fault: `labctl show` tells on which GPUs a model lay, and how much of their
memory it took.

Names in capitals are the run's: labctl writes the partition, the model and the figures in their place.
"""
TITLES = {
    "signs": "In the log, or in the error of a record",
    "ends": "How Slurm says that a job ended",
    "exits": "By its exit code alone",
    "waits": "Waiting, where waiting alone does not help",
    "refusals": "Refused by sbatch, or foreseen by submit",
}


def _troubleshooting() -> str:
    lines = [TROUBLESHOOTING]
    for part, title in TITLES.items():
        lines += [f"## {title}", "", "| kind | what happened | what to do |", "|---|---|---|"]
        rows = [_reason(part, entry) for entry in getattr(diagnose.table(), part)]
        lines += [*dict.fromkeys(rows), ""]
    return "\n".join(lines)


def _reason(part: str, entry: diagnose.Entry) -> str:
    told = entry.on({"by": " by USER"}, dict.fromkeys(re.compile(entry.pattern).groupindex, "…"))
    happened = told.happened or f"sbatch says: {entry.words[0]}"
    if part == "waits":
        happened = f"{', '.join(entry.reasons)}: {happened}"
    return f"| `{told.kind}` | {_cell(happened)} | {_cell(told.remedy)} |"


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
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")


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
