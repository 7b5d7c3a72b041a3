"""The submissions of a workspace, with the states of their runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking import status


@dataclass(frozen=True)
class SubmissionSummary:
    """One submission. `states` counts its runs by state; `partitions`, `backends` and `models` are sorted and without
    duplicates. `word` is that by which the command line finds it: its name, or its id if a later one has that name."""

    submission_id: str
    name: str | None
    note: str | None
    created_at: str
    word: str
    states: Counter[str]
    partitions: list[str]
    backends: list[str]
    models: list[str]


def submission_ids(store: Store) -> list[str]:
    """All submissions, newest first."""
    rows = store.tuples("SELECT submission_id FROM submissions ORDER BY created_at DESC, submission_id DESC")
    return [submission_id for (submission_id,) in rows]


def summaries(
    workspace: Workspace, store: Store, chosen: Sequence[str], runs: Mapping[str, Sequence[str]]
) -> list[SubmissionSummary]:
    """The summaries of these submissions, in this order; `runs` are those of each. Call `refresh` before."""
    run_ids = list(dict.fromkeys(run_id for submission_id in chosen for run_id in runs.get(submission_id, ())))
    by_run = {run.run_id: run for run in status.statuses(workspace, store, run_ids)}
    rows = store.tuples(
        "SELECT submission_id, name, json_extract(request, '$.note'), created_at, name IS NOT NULL AND NOT EXISTS"
        " (SELECT 1 FROM submissions AS later WHERE later.name = submissions.name"
        " AND (later.created_at, later.submission_id) > (submissions.created_at, submissions.submission_id))"
        " FROM submissions WHERE submission_id IN (SELECT value FROM json_each(?))",
        [json.dumps(list(chosen))],
    )
    found = {}
    for submission_id, name, note, created_at, is_latest in rows:
        own = [by_run[run] for run in runs.get(submission_id, ()) if run in by_run]
        of_runs = (sorted({getattr(run, key) for run in own}) for key in ("partition", "backend", "model"))
        word = name if name and is_latest else submission_id
        states = Counter(run.state for run in own)
        found[submission_id] = SubmissionSummary(submission_id, name, note, created_at, word, states, *of_runs)
    return [found[submission_id] for submission_id in chosen if submission_id in found]
