"""labctl du"""

from __future__ import annotations

from contextlib import closing

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.store import workspace
from labctl_orchestrator.store.collect import collect
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.terminal import tables
from labctl_orchestrator.tracking import clean

LARGEST = 5


@click.command("du")
@json_option
def command(as_json: bool) -> None:
    """Show disk usage by kind of file and by submission.

    \b
    labctl du
    """
    here = workspace.existing()
    with closing(open_store(here)) as store:
        collect(here, store)
        kinds, submissions = clean.sizes(here, store)
        names = {
            row["submission_id"]: row["name"] or row["submission_id"] for row in store.rows("SELECT * FROM submissions")
        }
        runs = [row["run_id"] for row in store.rows("SELECT run_id FROM runs")]
        free = sum(item.bytes for item in clean.removable(here, store, runs))
    if as_json:
        print_json({"kinds": kinds, "submissions": submissions, "clean_would_free": free})
        return
    _print("kind", {**kinds, "all": sum(kinds.values())})
    print()
    largest = list(submissions.items())[:LARGEST]
    _print("submission", {names.get(key, key) or "by hand": size for key, size in largest})
    tables.note(f"labctl clean would free {tables.figure(free, 'B')}")


def _print(title: str, sizes: dict[str, int]) -> None:
    tables.table([title, "size"], [[name, tables.figure(size, "B")] for name, size in sizes.items()], right=["size"])
