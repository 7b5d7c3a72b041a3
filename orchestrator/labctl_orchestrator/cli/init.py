"""labctl init"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.preflight import init_profile, init_proposal
from labctl_orchestrator.preflight.init_proposal import Account, Proposal, Proposed
from labctl_orchestrator.request.paths import expand_home
from labctl_orchestrator.request.settings import SETTINGS_FILE
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.terminal import tables
from labctl_slurm import forms, partitions, site, site_profiles
from labctl_slurm.command import selected
from labctl_slurm.errors import SlurmError, WrongUseError, nearest
from labctl_slurm.site import SlurmPartition
from labctl_slurm.site_profiles import Profile

ASK_LATER = "later"


@click.command("init")
@click.argument("folder", required=False, default=".")
@click.option("-y", "--yes", is_flag=True, help="Accept the proposal without questions.")
@click.option("-A", "--account", help="Slurm account to charge, if you have several.")
@click.option(
    "--site",
    "site_name",
    metavar="NAME",
    help="Profile to use: a name from labctl sites, or a .toml file.",
)
@click.option("--print", "print_only", is_flag=True, help="Print the labctl.toml; write nothing.")
@json_option
def command(
    folder: str, yes: bool, account: str | None, site_name: str | None, print_only: bool, as_json: bool
) -> None:
    """Make a workspace: a folder to submit from.

    Reads partitions, GPUs, limits and accounts from Slurm, and proposes the settings file labctl.toml. Asks for the default
    partition, the Python of the jobs and the account, if there is a choice. Without Slurm, labctl.toml contains only commented
    examples.

    Also makes the folder .labctl for labctl's own files. Without init, the first labctl submit makes it in the current folder.

    \b
    labctl init ~/lab && cd ~/lab
    labctl init --yes --account eecs     # no questions
    labctl init --site narval            # use the profile of the cluster Narval
    labctl init --print                  # print the proposal, write nothing
    """
    workspace = Workspace(expand_home(folder).absolute())
    new = not workspace.settings_file.exists()
    if not (new or print_only) and workspace.data.is_dir():
        raise WrongUseError(
            f"already a workspace: {workspace.root}",
            f"edit its {SETTINGS_FILE}; labctl init --print prints a new proposal",
        )
    ask = not yes and not as_json and sys.stdin.isatty() and sys.stderr.isatty()
    text, answers = "", dict[str, Any]()
    if site_name is not None and not (new or print_only):
        raise WrongUseError(f"{SETTINGS_FILE} exists already", "labctl init --site NAME --print prints the profile's")
    if new or print_only:
        profile = None if site_name is None else site_profiles.load(site_name)
        text, answers = (
            _from_slurm(workspace, account, ask=ask) if profile is None else _from_profile(profile, account, ask=ask)
        )
    if print_only:
        click.echo(text, nl=False)
        return
    workspace.root.mkdir(parents=True, exist_ok=True)
    workspace.create()
    if new:
        workspace.settings_file.write_text(text, encoding="utf-8")
    if as_json:
        print_json({"workspace": str(workspace.root), "settings": str(workspace.settings_file), **answers})
        return
    click.echo(f"made workspace {workspace.root}: {SETTINGS_FILE} is for settings, .labctl/ for labctl's own files")
    if answers.get("partitions"):
        tables.note("next: labctl doctor checks the partitions and their Python")


def _from_slurm(workspace: Workspace, given: str | None, *, ask: bool) -> tuple[str, dict[str, Any]]:
    """(text of labctl.toml, its sources for --json)."""
    try:
        with tables.working("reading the partitions from Slurm"):
            found, why_cluster = _partitions()
    except SlurmError as error:
        tables.note(f"{error.message}; {SETTINGS_FILE} contains only examples")
        nothing = {"partitions": [], "accounts": [], "account": given, "notes": [error.message]}
        return init_proposal.WITHOUT_SLURM, nothing
    account = _account(given, ask=ask)
    proposed = init_proposal.propose(found)
    accounts = {"": account}
    for cluster in dict.fromkeys(one.slurm.cluster for one in proposed.partitions):
        accounts.setdefault(cluster, _account_on(cluster, account))
    with tables.working("testing job options with sbatch"):
        proposed = replace(proposed, partitions=_tried(proposed, accounts, workspace.templates))
    default, pythons = _asked(proposed) if ask else (None, {})
    text = init_proposal.text(
        proposed,
        account,
        accounts=accounts,
        why_cluster=why_cluster,
        source=_source(),
        default=default,
        pythons=pythons,
    )
    notes = [*proposed.left_out, *filter(None, [account.remedy])]
    if not proposed.partitions:
        notes.append("no Slurm partition has GPUs of a single type: describe one in labctl.toml, or see labctl sites")
    for note in notes:
        tables.note(note)
    for one in proposed.partitions:
        if cluster := one.slurm.cluster:
            tables.note(f"[partitions.{one.name}] has cluster = {json.dumps(cluster)}, because {why_cluster}")
        for change in one.form.changes:
            tables.note(
                f"[partitions.{one.name}] has {change.assignment}, because Slurm refuses {json.dumps(change.before)}"
            )
        if not one.form.accepted:
            tables.note(f"sbatch --test-only refuses a job of {one.name}: {one.form.message}")
        for open_end in one.notes:
            tables.note(f"[partitions.{one.name}] needs {open_end}")
    tables_of_partitions = [
        {
            "name": one.name,
            "slurm_partition": one.slurm.name,
            **one.table,
            **{change.key: change.value for change in one.form.changes},
        }
        for one in proposed.partitions
    ]
    return text, {
        "partitions": tables_of_partitions,
        "default": default or proposed.default,
        "accounts": list(account.names),
        "account": account.chosen,
        "notes": notes,
    }


def _from_profile(profile: Profile, given: str | None, *, ask: bool) -> tuple[str, dict[str, Any]]:
    """(text of labctl.toml, its sources for --json)."""
    for name in profile.partitions:  # a value that cannot be right, in a file of one's own
        partitions.build(name, [(f"site {profile.name}", profile.table(name))])
    account = _account(given, ask=ask)
    notes = init_profile.warnings(profile)
    for note in notes:
        tables.note(note)
    return init_profile.text(profile, account), {
        "site": profile.name,
        "partitions": [{"name": name, **profile.table(name)} for name in profile.partitions],
        "accounts": list(account.names),
        "account": account.chosen,
        "notes": notes,
    }


def _tried(proposed: Proposed, accounts: Mapping[str, Account], templates: Path) -> list[Proposal]:
    """The proposals in the form in which sbatch takes them; as they are where Slurm does not say."""
    search, tried = forms.Search(), list(proposed.partitions)
    for number, one in enumerate(tried):
        if not one.takes_jobs:
            continue
        account = accounts[one.slurm.cluster].for_a_trial
        try:
            tried[number] = replace(one, form=search.of(one.script(account, templates)))
        except SlurmError as error:
            tables.note(f"job options not tested with sbatch: {error.message}")
            break
    return tried


def _partitions() -> tuple[list[SlurmPartition], str]:
    """The partitions of the shell's cluster, then those of others; and why those get the key `cluster`. Raises SlurmError."""
    shell = [cluster.name for cluster in selected()]
    try:
        others = site.clusters()
    except SlurmError:
        others = []  # without accounting, --clusters knows no name
    if shell == ["all"] and others:
        shell = others
    found, why = [], "SLURM_CLUSTERS names several clusters"
    if len(shell) > 1:
        others = [*shell, *others]
    else:
        found, why = site.partitions(), "the shell's cluster has no partition with this name and GPUs"
        own = shell[0] or (site.configuration().get("ClusterName") if others else "")
        others = [name for name in others if name != own]
    for name in dict.fromkeys(others):
        try:
            found += site.partitions(name)
        except SlurmError as error:
            tables.note(f"partitions of cluster {name} not read: {error.message}")
    return found, why


def _account_on(cluster: str, account: Account) -> Account:
    """The account to charge on another cluster: the same one if it exists there."""
    try:
        names = site.accounts(cluster).names
    except SlurmError:
        return account
    only = names[0] if len(names) == 1 else None
    return Account(account.chosen if account.chosen in names else only, names)


def _source() -> str:
    try:
        configuration = site.configuration()
    except SlurmError:
        return "Proposed from Slurm's configuration."
    version, cluster = configuration.get("SLURM_VERSION", "?"), configuration.get("ClusterName", "?")
    return f"Proposed from the configuration of cluster {cluster!r}, Slurm {version}."


def _account(given: str | None, *, ask: bool) -> Account:
    try:
        found = site.accounts()
    except SlurmError as error:
        return Account(given, silent=error.message)
    if given is not None:
        if found.names and given not in found.names:
            raise WrongUseError(f"you have no such Slurm account: {given!r}", nearest(given, found.names))
        return Account(given, found.names)
    if len(found.names) == 1:
        return Account(found.names[0], found.names)
    account = Account(None, found.names)
    if not (ask and found.names):
        return account
    tables.note(f"you have {len(found.names)} accounts (Slurm's default: {found.default or 'none'})")
    chosen = _choice("account to charge", (*found.names, ASK_LATER), None)
    return account if chosen == ASK_LATER else replace(account, chosen=chosen)


def _asked(proposed: Proposed) -> tuple[str | None, dict[str, str]]:
    """(default partition, Python of each partition), as the person answers."""
    names = [found.name for found in proposed.partitions]
    if not names:
        return None, {}
    for found in proposed.partitions:
        tables.note(f"{found.name}: {init_proposal.summary(found.slurm)}")
    default = names[0]
    if len(names) > 1:
        default = _choice("default partition", names, proposed.default)
    pythons = {}
    for name in names:
        question = f"Python with torch and transformers, or vLLM, for jobs of {name} (Enter: the Python of labctl)"
        path = click.prompt(question, default="", show_default=False, err=True).strip()
        if path:
            pythons[name] = str(expand_home(path))
    return default, pythons


def _choice(question: str, known: Sequence[str], default: str | None) -> str:
    answer: str = click.prompt(question, type=click.Choice(list(known)), default=default, err=True)
    return answer
