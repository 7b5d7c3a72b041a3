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
@click.argument("names", nargs=-1, metavar="[RUN|SUBMISSION|SLURM_ID]...")
@click.option("-o", "--output", metavar="FILE", help="Output file.  [default: NAME.labctl.zip]")
@click.option("--author", help="Your name or label, which importers see.  [default: the file's name]")
@click.option("--all", "everything", is_flag=True, help="Runs of all submissions of this workspace.")
@json_option
def command(names: tuple[str, ...], output: str | None, author: str | None, everything: bool, as_json: bool) -> None:
    """Pack the records of runs into one file.

    Default: the latest submission. The file holds all records (with prompts and answers), jobs, scripts, node names, Slurm
    ids, Slurm options and versions. It holds no logs, no access tokens, and no paths of checkpoints or home folders. Bundling
    the same runs again writes an identical file.

    \b
    labctl bundle
    labctl bundle sweep-3 --author ada -o ada.labctl.zip
    """
    if author is not None and not import_bundle.ORIGIN.fullmatch(author):
        raise WrongUseError(f"invalid label: --author {author!r}", "use at most 40 letters, digits and . _ -")
    here = workspace.existing()
    store = open_store(here)
    statuses.refresh(here, store)
    title, run_ids = select_runs.chosen_runs(store, names, everything=everything)
    path = Path(output or f"{re.sub(r'[^A-Za-z0-9._-]+', '-', title).strip('-.') or 'sweep'}{bundle.SUFFIX}")
    with outfile.output_file(outfile.checked_path(path, here, f"sweep{bundle.SUFFIX}"), binary=True) as file:
        made = bundle.write(here, store, title, run_ids, author, file)
    for reason in made.left_out:
        tables.note(f"warning: left out: {reason}")
    manifest = made.manifest
    if as_json:
        facts = {key: getattr(manifest, key) for key in ("name", "author", "runs", "records")}
        print_json({"file": str(path), "sha256": made.sha256, "bytes": made.bytes, **facts})
        return
    size = tables.figure(made.bytes, "B")
    counts = f"{tables.counted(manifest.runs, 'run')}, {tables.counted(manifest.records, 'record')}"
    click.echo(f"{path}: {counts}, {size}, SHA-256 {made.sha256}")
    tables.note(f"in another workspace: labctl import {path}, then labctl compare --by origin")
