"""labctl forget"""

from __future__ import annotations

from contextlib import closing

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.store import select_runs, workspace
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.terminal import statuses, tables
from labctl_orchestrator.terminal.messages import confirm
from labctl_orchestrator.terminal.tables import counted
from labctl_orchestrator.tracking import forget
from labctl_orchestrator.tracking.forget import Removal


@click.command("forget")
@click.argument("names", nargs=-1, required=True, metavar="RUN|SUBMISSION|SLURM_ID...")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
def command(names: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Remove runs and their records for good.

    Also deletes submissions and job arrays that have no other runs, with their logs. Lists everything and asks first. Refuses
    runs that are queued or running. labctl submit can measure a forgotten run again.

    \b
    labctl forget 3f9a12
    labctl forget sweep-3 --yes
    """
    here = workspace.existing()
    with closing(open_store(here)) as store:
        statuses.refresh(here, store)
        _, run_ids = select_runs.chosen_runs(store, names)
        removal = forget.planned(here, store, run_ids)
        if not yes:
            confirm(f"Remove {_summary(removal)}")
        # The prompt may have waited long: look again, and keep other commands from submitting now.
        with here.lock():
            statuses.refresh(here, store)
            removal = forget.planned(here, store, run_ids)
            forget.remove(here, removal)
    if as_json:
        print_json(
            {
                "runs": removal.run_ids,
                "records": removal.records,
                "arrays": [folder.name for folder in removal.array_folders],
                "submissions": [path.stem for path in removal.submissions],
                "bytes": removal.bytes,
            }
        )
    else:
        tables.note(f"removed {_summary(removal)}")


def _summary(removal: Removal) -> str:
    parts = [counted(len(removal.run_ids), "run"), counted(removal.records, "record")]
    parts += [counted(len(removal.array_folders), "job array")] if removal.array_folders else []
    parts += [counted(len(removal.submissions), "submission")] if removal.submissions else []
    return f"{', '.join(parts)} ({tables.figure(removal.bytes, 'B')})"
