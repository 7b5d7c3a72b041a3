"""labctl bundle"""

from __future__ import annotations

import re
from pathlib import Path

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.exchange import bundle, import_bundle, outfile
from labctl_orchestrator.store import select_runs, workspace
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.terminal import statuses, tables
from labctl_slurm.errors import WrongUseError


@click.command("bundle")
@click.argument("names", nargs=-1, metavar="[RUN|REQUEST|NAME|SLURM_ID]...")
@click.option("-o", "--output", metavar="FILE", help="The file to write.  [default: NAME.labctl.zip, here]")
@click.option("--author", help="Whose it is: the label under which others compare it.  [default: the file's name]")
@click.option("--all", "everything", is_flag=True, help="Every run of this workspace.")
@json_option
def command(names: tuple[str, ...], output: str | None, author: str | None, everything: bool, as_json: bool) -> None:
    """Put a sweep's records in one file, for somebody else's labctl.

    Of the latest request, unless ids or names are given. In it: the records of every attempt, prompts and answers among them,
    the jobs, the scripts, names of nodes, Slurm's ids and options, versions. Not in it: logs, where checkpoints lie, home
    folders, tokens. The same sweep makes the same bytes.

    \b
    labctl bundle
    labctl bundle sweep-3 --author ada -o ada.labctl.zip
    """
    if author is not None and not import_bundle.ORIGIN.fullmatch(author):
        raise WrongUseError(f"--author {author!r} is no label", "letters, digits and . _ - make one, 40 at most")
    here = workspace.existing()
    store = open_store(here)
    statuses.refresh(here, store)
    title, run_ids = select_runs.chosen_runs(store, names, everything=everything)
    path = Path(output or f"{re.sub(r'[^A-Za-z0-9._-]+', '-', title).strip('-.') or 'sweep'}{bundle.SUFFIX}")
    with outfile.whole(outfile.checked(path, here, f"sweep{bundle.SUFFIX}"), binary=True) as file:
        made = bundle.write(here, store, title, run_ids, author, file)
    for reason in made.left_out:
        tables.note(f"warning: left out: {reason}")
    manifest = made.manifest
    if as_json:
        told = {key: getattr(manifest, key) for key in ("name", "author", "runs", "records")}
        print_json({"file": str(path), "sha256": made.sha256, "bytes": made.bytes, **told})
        return
    size = tables.figure(made.bytes, "B")
    counts = f"{tables.counted(manifest.runs, 'run')}, {tables.counted(manifest.records, 'record')}"
    click.echo(f"{path}: {counts}, {size}, SHA-256 {made.sha256}")
    tables.note(f"labctl import {path} takes it into another workspace; labctl compare --by origin compares")
