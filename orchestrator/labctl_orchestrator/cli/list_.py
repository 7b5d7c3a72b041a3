"""labctl list"""

from __future__ import annotations

from contextlib import closing
from datetime import datetime

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.store import workspace
from labctl_orchestrator.store.collect import collect_new
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.store.select_runs import runs_by_submission
from labctl_orchestrator.terminal import statuses, tables
from labctl_orchestrator.tracking import run_status, submissions

LATEST = 20


@click.command("list")
@click.option("--all", "everything", is_flag=True, help=f"All submissions.  [default: the latest {LATEST}]")
@json_option
def command(everything: bool, as_json: bool) -> None:
    """List the submissions, newest first.

    Prints the name (or the id), the date, the states of the runs, partitions, backends, models and the note of each
    submission. Use the name in the first column in other commands, such as labctl status.

    \b
    labctl list
    labctl list --all --json
    """
    here = workspace.existing()
    with closing(open_store(here)) as store:
        collect_new(here, store)
        known = submissions.submission_ids(store)
        chosen = known if everything else known[:LATEST]
        runs = runs_by_submission(store)
        statuses.refresh(here, store, list(dict.fromkeys(run for one in chosen for run in runs.get(one, ()))))
        found = submissions.summaries(here, store, chosen, runs)
    if as_json:
        print_json([{key: value for key, value in vars(one).items() if key != "word"} for one in found])
        return
    columns = ("submission", "submitted", "runs", "partition", "backend", "model", "note")
    tables.table(columns, [_row(one) for one in found])
    if len(chosen) < len(known):
        tables.note(f"{tables.counted(len(known) - len(chosen), 'older submission')}: labctl list --all")
    if not known:
        tables.note("no submissions yet; labctl submit --help shows how to submit")


def _row(one: submissions.SubmissionSummary) -> list[str]:
    submitted = f"{datetime.fromisoformat(one.created_at).astimezone():%Y-%m-%d %H:%M}"
    models = ", ".join(model.rpartition("/")[2] for model in one.models)
    return [
        one.word, submitted, run_status.summary_of(one.states), ", ".join(one.partitions), ", ".join(one.backends), models,
        one.note or "",
    ]  # fmt: skip
