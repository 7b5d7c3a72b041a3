"""labctl clean"""

from __future__ import annotations

from collections import Counter

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.store import select_runs, workspace
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.terminal import statuses, tables
from labctl_orchestrator.terminal.messages import confirm
from labctl_orchestrator.tracking import clean


@click.command("clean")
@click.argument("names", nargs=-1, metavar="[RUN|SUBMISSION]...")
@click.option("--failed", is_flag=True, help="Also remove logs of failed runs.")
@click.option("--cache", is_flag=True, help="Also remove code that engines compiled; the next job compiles it again.")
@click.option("--dry-run", is_flag=True, help="List what would be removed; remove nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
def command(names: tuple[str, ...], failed: bool, cache: bool, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Remove logs and scripts of finished jobs.

    Default: the whole workspace. Cleans a job array only if all its jobs have ended and all its runs were successful. Also
    removes temporary files. Keeps records, the database and the state of each run.

    \b
    labctl clean --dry-run
    labctl clean sweep-3 --failed --yes
    """
    here = workspace.existing()
    store = open_store(here)
    learnt = statuses.refresh(here, store)
    _, run_ids = select_runs.chosen_runs(store, names, everything=not names)
    rubbish = clean.removable(here, store, run_ids, failed=failed, cache=cache)
    if learnt.problems:
        tables.note("jobs of unknown state are not cleaned")
    if cache and here.cache.is_symlink():
        target = here.cache.resolve()
        tables.note(f"not removed: {here.cache} is a link to {target}")
    total = sum(item.bytes for item in rubbish)
    if rubbish and not dry_run:
        if not yes:
            what = f"Remove {len(rubbish)} folders and files, {tables.figure(total, 'B')}"
            confirm(what, "add --yes or --dry-run")
        with (
            here.lock()
        ):  # the prompt may have waited for long: look again, and keep other commands from submitting now
            statuses.refresh(here, store)
            still = clean.removable(here, store, run_ids, failed=failed, cache=cache)
            rubbish = [item for item in still if item.path in {shown.path for shown in rubbish}]
            clean.remove(rubbish)
        total = sum(item.bytes for item in rubbish)
    if as_json:
        removed = [{"path": str(item.path), "kind": item.kind, "bytes": item.bytes} for item in rubbish]
        print_json({"removed": not dry_run, "items": removed})
        return
    _print(rubbish, total, dry_run)


def _print(rubbish: list[clean.Rubbish], total: int, dry_run: bool) -> None:
    counts = Counter(item.kind for item in rubbish)
    sizes = {kind: sum(item.bytes for item in rubbish if item.kind == kind) for kind in counts}
    if rubbish:
        rows = [[kind, str(count), tables.figure(sizes[kind], "B")] for kind, count in counts.items()]
        tables.table(["kind", "count", "size"], rows, right=["count", "size"])
    would = "would be freed" if dry_run else "freed"
    tables.note(f"{tables.figure(total, 'B')} {would}" if rubbish else "nothing to remove")
