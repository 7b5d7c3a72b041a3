"""labctl matrix"""

from __future__ import annotations

import json

import click

from labctl_orchestrator.analysis.cells import tell_models_apart
from labctl_orchestrator.analysis.comparison import AXES
from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.store import workspace
from labctl_orchestrator.store.database import Store, open_store
from labctl_orchestrator.terminal import matrix, statuses, tables
from labctl_orchestrator.tracking import run_status, status


@click.command("matrix")
@click.argument("names", nargs=-1, metavar="[RUN|SUBMISSION|SLURM_ID]...")
@click.option("--all", "everything", is_flag=True, help="Runs of all submissions of this workspace.")
@click.option("--across", metavar="AXIS", help="Setting that forms the columns.  [default: the one with most values]")
@json_option
def command(names: tuple[str, ...], everything: bool, across: str | None, as_json: bool) -> None:
    """Show the states of a sweep as a grid.

    Default: the latest submission. Rows and columns are the settings that vary. An empty field is not part of the sweep.

    \b
    labctl matrix
    labctl matrix sweep-3 --across dtype
    """
    here = workspace.existing()
    store = open_store(here)
    title, run_ids = statuses.refresh_chosen(here, store, names, everything=everything)
    found = status.statuses(here, store, run_ids)
    axes = _axes(store, [run.run_id for run in found])
    shown = matrix.grid([(axes[run.run_id], run.state) for run in found], across)
    if as_json:
        cells = [{"run_id": run.run_id, "state": run.state, "axes": axes[run.run_id]} for run in found]
        print_json({"down": shown.down, "across": shown.across, "columns": shown.columns, "runs": cells})
        return
    tables.note(f"{title}: {run_status.summary(found)}")
    _print(shown)


def _axes(store: Store, run_ids: list[str]) -> dict[str, dict[str, object]]:
    """The axes of each run, with the names that labctl compare uses."""
    rows = store.rows("SELECT * FROM runs WHERE run_id IN (SELECT value FROM json_each(?))", [json.dumps(run_ids)])
    runs = {row["run_id"]: row for row in rows}
    chosen = [dict(runs[run_id]) for run_id in run_ids]
    tell_models_apart(chosen)
    found = {}
    for run in chosen:
        found[run["run_id"]] = {**{axis: run[axis] for axis in AXES}, "engine_options": run["engine_options"] or "{}"}
    return found


def _print(shown: matrix.Grid) -> None:
    columns = [
        *shown.down,
        *(f"{shown.across} {column}".lstrip() if place == 0 else column for place, column in enumerate(shown.columns)),
    ]
    in_words, in_letters = (
        [[*values, *(matrix.words(cell, letters=letters) for cell in cells)] for values, cells in shown.rows]
        for letters in (False, True)
    )
    whole = tables.fits(columns, in_words)
    tables.table(columns, in_words if whole else in_letters)
    if not whole:
        tables.note(matrix.legend(shown))
