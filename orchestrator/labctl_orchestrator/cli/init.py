"""labctl init"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.preflight import init_proposal
from labctl_orchestrator.preflight.init_proposal import Account, Proposed
from labctl_orchestrator.request.paths import expand_home
from labctl_orchestrator.request.settings import SETTINGS_FILE
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.terminal import tables
from labctl_slurm import site
from labctl_slurm.errors import SlurmError, WrongUseError, nearest

ASK_LATER = "later"


@click.command("init")
@click.argument("folder", required=False, default=".")
@click.option("-y", "--yes", is_flag=True, help="Take what is proposed; ask nothing.")
@click.option("-A", "--account", help="The account to charge, where you have several.")
@click.option("--print", "print_only", is_flag=True, help="Print the labctl.toml; write nothing.")
@json_option
def command(folder: str, yes: bool, account: str | None, print_only: bool, as_json: bool) -> None:
    """Make a workspace: a folder to submit from, with what Slurm says of the site.

    Asks Slurm what partitions, GPUs, limits and accounts there are, proposes a labctl.toml, and asks what only you can say.
    An account is never guessed where you have several. Without Slurm every line of labctl.toml is a comment. Also makes
    .labctl/, where labctl keeps what it does; without init, the first submit makes it in the current folder.

    \b
    labctl init ~/lab && cd ~/lab
    labctl init --yes --account eecs     ask nothing
    labctl init --print                  what would be written
    """
    workspace = Workspace(expand_home(folder).absolute())
    new = not workspace.settings_file.exists()
    if not (new or print_only) and workspace.data.is_dir():
        raise WrongUseError(
            f"{workspace.root} is a workspace already",
            f"edit its {SETTINGS_FILE}; labctl init --print prints what Slurm's answers propose",
        )
    ask = not yes and not as_json and sys.stdin.isatty() and sys.stderr.isatty()
    text, answers = _from_slurm(account, ask=ask) if new or print_only else ("", {})
    if print_only:
        click.echo(text, nl=False)
        return
    workspace.create()
    if new:
        workspace.settings_file.write_text(text, encoding="utf-8")
    if as_json:
        print_json({"workspace": str(workspace.root), "settings": str(workspace.settings_file), **answers})
        return
    click.echo(f"{workspace.root} is a workspace: {SETTINGS_FILE} is yours to edit, .labctl/ is labctl's")
    if answers.get("partitions"):
        tables.note("labctl doctor checks the partitions, their Python and the rest before the first submit")


def _from_slurm(given: str | None, *, ask: bool) -> tuple[str, dict[str, Any]]:
    """The labctl.toml, and what it was made from, for --json."""
    try:
        with tables.working("asking Slurm for its partitions"):
            found = site.partitions()
    except SlurmError as error:
        tables.note(f"nothing is proposed: {error.message}")
        nothing = {"partitions": [], "accounts": [], "account": given, "notes": [error.message]}
        return init_proposal.WITHOUT_SLURM, nothing
    account = _account(given, ask=ask)
    proposed = init_proposal.propose(found)
    default, pythons = _asked(proposed) if ask else (None, {})
    text = init_proposal.text(proposed, account, told_by=_source(), default=default, pythons=pythons)
    notes = [*proposed.left_out, *filter(None, [account.remedy])]
    if not proposed.partitions:
        notes.append("Slurm shows no partition with GPUs of one kind: describe one in labctl.toml")
    for note in notes:
        tables.note(note)
    for one in proposed.partitions:
        for open_end in one.notes:
            tables.note(f"[partitions.{one.name}] wants {open_end}")
    partitions = [{"name": one.name, "slurm_partition": one.slurm.name, **one.table} for one in proposed.partitions]
    return text, {
        "partitions": partitions,
        "default": default or proposed.default,
        "accounts": list(account.names),
        "account": account.chosen,
        "notes": notes,
    }


def _source() -> str:
    try:
        configuration = site.configuration()
    except SlurmError:
        return "Proposed from what Slurm says."
    version, cluster = configuration.get("SLURM_VERSION", "?"), configuration.get("ClusterName", "?")
    return f"Proposed from what Slurm {version} says of its cluster {cluster!r}."


def _account(given: str | None, *, ask: bool) -> Account:
    try:
        found = site.accounts()
    except SlurmError as error:
        return Account(given, silent=error.message)
    if given is not None:
        if found.names and given not in found.names:
            raise WrongUseError(f"you have no account {given!r} on this cluster", nearest(given, found.names))
        return Account(given, found.names)
    if len(found.names) == 1:
        return Account(found.names[0], found.names)
    account = Account(None, found.names)
    if not (ask and found.names):
        return account
    tables.note(f"you have {len(found.names)} accounts (Slurm's own default is {found.default or 'none'})")
    chosen = _choice("the account to charge", (*found.names, ASK_LATER), None)
    return account if chosen == ASK_LATER else replace(account, chosen=chosen)


def _asked(proposed: Proposed) -> tuple[str | None, dict[str, str]]:
    """(the partition to use where none is given, the Python of each)."""
    names = [found.name for found in proposed.partitions]
    if not names:
        return None, {}
    for found in proposed.partitions:
        tables.note(f"{found.name}: {init_proposal.described(found.slurm)}")
    default = names[0]
    if len(names) > 1:
        default = _choice("the partition to use where none is given", names, proposed.default)
    pythons = {}
    for name in names:
        question = f"the Python of {name}, with torch and transformers, or vllm (Enter: the one that runs labctl)"
        path = click.prompt(question, default="", show_default=False, err=True).strip()
        if path:
            pythons[name] = str(expand_home(path))
    return default, pythons


def _choice(question: str, known: Sequence[str], default: str | None) -> str:
    answer: str = click.prompt(question, type=click.Choice(list(known)), default=default, err=True)
    return answer
