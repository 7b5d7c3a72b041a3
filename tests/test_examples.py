"""Every example in every help text: run by a real shell as it stands there, in a workspace that has what it names; parsed, where
it needs a cluster, a GPU or the hub. Slurm's programs are stand-ins that only say so."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from labctl_orchestrator import cli
from labctl_orchestrator.cli import COMMANDS
from labctl_orchestrator.store.workspace import Workspace

from .conftest import Labctl, Records, Slurm, write_checkpoint
from .test_cli import PROGRAM, worker_is_done

# What none of the examples below can do here, by the words that they hold.
NEEDS = {
    "srun ": "an allocation",
    "labctl run ": "an engine",
    "labctl exercise ": "an engine",
    "labctl fetch ": "the hub",
    "labctl fit TinyLlama": "the hub",
    "--on-node": "a node",
    "labctl reserve ": "a cluster",
    "--create": "a package index",
    "labctl doctor": "a cluster",
    "labctl init": "a cluster, or a person to ask",
    "labctl forget 3f9a12": "a person to ask",
    "labctl tune": "a cluster: it waits for what it measures",
}
FOR_THE_SHELL = re.compile(r"^(labctl|srun|eval|[A-Z_]+=)\s?\S*")


def examples() -> list[tuple[str, str]]:
    """(command, line) of each example: the lines of the paragraphs that click leaves as they are."""
    context = click.Context(cli.labctl)
    helps = {"": cli.labctl.help or ""}
    for name in COMMANDS:
        command = cli.labctl.get_command(context, name)
        assert command is not None
        helps[name] = command.help or ""
    found = []
    for name, text in helps.items():
        for paragraph in re.findall(r"\x08\n(.*?)(?:\n\s*\n|\Z)", text, re.DOTALL):
            lines = [line.strip() for line in paragraph.splitlines()]
            found += [(name, line) for line in lines if FOR_THE_SHELL.match(line)]
    return found


def without_remark(line: str) -> str:
    """What stands behind two spaces says what the line does."""
    return re.split(r"\s{2,}", line)[0]


def need_of(line: str) -> str | None:
    return next((need for words, need in NEEDS.items() if words in line and "--print" not in line), None)


TO_RUN = [line for _, line in examples() if need_of(line) is None]
TO_PARSE = [line for _, line in examples() if need_of(line) is not None]


def test_every_command_has_an_example() -> None:
    assert {name for name, _ in examples()} == {"", *COMMANDS}


@pytest.mark.parametrize("line", TO_PARSE)
def test_an_example_that_needs_more_than_this_machine_has_is_a_right_command_line(line: str) -> None:
    for part in re.split(r"&&|>", without_remark(line)):
        words = shlex.split(part)
        if "labctl" not in words:
            continue
        words = words[words.index("labctl") + 1 :]
        own = click.Context(cli.labctl, info_name="labctl", **cli.labctl.context_settings)
        command = cli.labctl.get_command(own, words[0])
        assert command is not None, words[0]
        command.make_context(words[0], words[1:], parent=own)


@pytest.fixture
def shell(
    labctl: Labctl, records: Records, slurm: Slurm, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> tuple[Workspace, dict[str, str]]:
    """A request called sweep-3 whose runs are done, the model that submit takes unless one is named, and what to write for the
    examples' run ids."""
    programs = slurm.folder
    (programs / "labctl").write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{PROGRAM}" "$@"\n', encoding="utf-8")
    (programs / "labctl").chmod(0o755)
    slurm.accepts(4242)
    home = Path(os.environ["HOME"])
    model = write_checkpoint(home / "models" / "llama-2-13b")
    (model / "config.json").write_text(
        (Path(__file__).parent / "llama.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    monkeypatch.setenv("LABCTL_MODEL_ID", str(model))
    monkeypatch.setenv("LABCTL_MAX_NEW_TOKENS", "8")
    (workspace.root / "sweep.toml").write_text("partition = ['dgxh']\ndtype = ['float16']\n", encoding="utf-8")
    flags = ["--dtype=float16", "--dtype=bfloat16", "--batch-size=1", "--batch-size=8", "--no-preflight"]
    runs = labctl("submit", "-p", "dgxh", *flags, "--name", "sweep-3", "--json").json["runs"]
    for job_id in dict.fromkeys(run["job_id"] for run in runs):
        worker_is_done(records, job_id)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.defpath}")
    return workspace, {"3f9a12": runs[0]["run_id"], "77ac01": runs[1]["run_id"]}


@pytest.mark.parametrize("line", TO_RUN)
def test_an_example_runs_as_it_stands_in_the_help(
    labctl: Labctl, shell: tuple[Workspace, dict[str, str]], line: str
) -> None:
    workspace, ids = shell
    if "labctl import" in line:  # what somebody else sent
        (workspace.root / "class").mkdir()
        for author, file in (("ada", "ada.labctl.zip"), ("ben", "class/ben.labctl.zip")):
            assert labctl("bundle", "sweep-3", "--author", author, "-o", file).code == 0
    command = without_remark(line)
    for written, real in ids.items():
        command = command.replace(written, real)
    command = command.replace('"${fpath[1]}/_labctl"', "_labctl")  # zsh's own
    Path("~/.config/fish/completions").expanduser().mkdir(parents=True)
    done = subprocess.run(
        ["bash", "-c", command], cwd=workspace.root, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
