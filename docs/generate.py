"""Write docs/commands/, a page a command, from `labctl COMMAND --help`, and docs/troubleshooting.md from the table of reasons.

    python docs/generate.py [FOLDER]

A test compares the pages with what this script writes.
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from pathlib import Path

import click

from labctl_orchestrator.cli import COMMANDS, SECTIONS, labctl
from labctl_slurm import diagnose

HERE = Path(__file__).parent
# click's mark before a paragraph whose lines it does not wrap: an example.
VERBATIM = "\b"


def write(folder: Path) -> None:
    """Write the generated pages into `folder`. Its commands/ is replaced."""
    pages = folder / "commands"
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir(parents=True)
    (folder / "troubleshooting.md").write_text(_troubleshooting(), encoding="utf-8")
    (pages / "README.md").write_text(_index(), encoding="utf-8")
    group = click.Context(labctl, info_name="labctl", **labctl.context_settings)
    for name in COMMANDS:
        command = labctl.get_command(group, name)
        if command is None:
            raise KeyError(name)
        page = _page(click.Context(command, info_name=name, parent=group))
        (pages / f"{name}.md").write_text(page, encoding="utf-8")


# ---------------------------------------------------------------- reasons

TROUBLESHOOTING = """\
# Troubleshooting

Find out why a run failed or waits:

```
labctl status          # the reason and the remedy of each run that failed or cannot start
labctl show 9bc3       # one run, by the first digits of its id
labctl logs 9bc3       # the log of its job
```

`labctl status --json` has the reason as `kind`. Where labctl does not recognise a failure, it prints the last lines of the log.

This page lists every reason. In the tables, words in capitals stand for values of your run, such as PARTITION or MODEL.
A new reason is an entry in `slurm/labctl_slurm/reasons.toml`; `make docs` writes this page from it.

## Not a fault: each GPU is half idle

`hf` splits a model's layers over the GPUs. One GPU waits while the other one works. At batch size 1 `nvidia-smi` shows each GPU
busy for at most half of the time. `labctl show RUN` prints which GPUs hold the model, and the memory that it takes there.
"""
TITLES = {
    "signs": "Errors in the log or in the record",
    "ends": "States in which Slurm ended a job",
    "exits": "Exit codes without a message",
    "queue": "Jobs that Slurm does not start or refuses",
}
# The key by which an entry of "signs" is also one of that part.
KEYS = {"ends": "state", "exits": "codes"}


def _troubleshooting() -> str:
    lines = [TROUBLESHOOTING]
    for part, title in TITLES.items():
        lines += [f"## {title}", "", "| kind | what happened | what to do |", "|---|---|---|"]
        entries = getattr(diagnose.table(), part)
        if part in KEYS:
            entries = [*entries, *(entry for entry in diagnose.table().signs if getattr(entry, KEYS[part]))]
        lines += [*dict.fromkeys(_reason(part, entry) for entry in entries), ""]
    return "\n".join(lines)


def _reason(part: str, entry: diagnose.Entry) -> str:
    reason = entry.diagnosis({"by": " by USER"}, dict.fromkeys(re.compile(entry.pattern).groupindex, "…"))
    happened = reason.happened or f"sbatch says: {entry.words[0]}"
    if names := {"ends": [entry.state], "exits": entry.codes, "queue": entry.reasons}.get(part):
        happened = f"{', '.join(names)}: {happened}"
    return f"| `{reason.kind}` | {_cell(happened)} | {_cell(reason.remedy)} |"


# ---------------------------------------------------------------- commands


def _index() -> str:
    lines = ["# Commands", "", "Each page shows what `labctl COMMAND --help` prints. `make docs` writes the pages.", ""]
    for title, commands in SECTIONS.items():
        rows = [f"| [`labctl {name}`]({name}.md) | {_cell(text)} |" for name, (_, text) in commands.items()]
        lines += [f"## {title}", "", "| command | purpose |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _page(context: click.Context) -> str:
    lines = [f"# {context.command_path}", ""]
    for paragraph, verbatim in _paragraphs(context.command):
        lines += ["```", paragraph, "```", ""] if verbatim else [_prose(paragraph), ""]
    usage = " ".join([context.command_path, *context.command.collect_usage_pieces(context)])
    lines += ["## Usage", "", "```", usage, "```", "", "| option | meaning |", "|---|---|"]
    for option, text in _options(context):
        lines.append(f"| `{_cell(option)}` | {_cell(text)} |")
    return "\n".join([*lines, ""])


def _paragraphs(command: click.Command) -> list[tuple[str, bool]]:
    """(text, whether its lines are an example) of each paragraph of the help."""
    parts = re.split(r"\n{2,}", inspect.cleandoc(command.help or ""))
    return [(part.removeprefix(VERBATIM).strip("\n"), part.startswith(VERBATIM)) for part in parts]


def _options(context: click.Context) -> list[tuple[str, str]]:
    options = [p for p in context.command.get_params(context) if isinstance(p, click.Option)]
    return [record for option in options if (record := option.get_help_record(context)) is not None]


def _prose(text: str) -> str:
    return re.sub(r"(?<![\w`])(_?[A-Z]+_[A-Z_]+\*?|--[a-z][a-z-]*)(?![\w`])", r"`\1`", " ".join(text.split()))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
