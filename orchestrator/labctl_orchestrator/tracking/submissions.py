"""The submissions of a workspace, with the states of their runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking import status
from labctl_orchestrator.tracking.run_status import RunStatus


@dataclass(frozen=True)
class SubmissionSummary:
    """One submission. `states` counts its runs by state; `partitions`, `backends` and `models` are sorted and without
    duplicates. `is_latest_of_name`: no later submission has the same name."""

    submission_id: str
    name: str | None
    note: str | None
    created_at: str
    states: Counter[str]
    partitions: list[str]
    backends: list[str]
    models: list[str]
    is_latest_of_name: bool

    @property
    def word(self) -> str:
        """The word by which the command line finds this submission: its name, or its id if a later one has that name."""
        return self.name if self.name and self.is_latest_of_name else self.submission_id


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
    found = {
        submission_id: _summary(
            submission_id,
            name,
            note,
            created_at,
            [by_run[run] for run in runs.get(submission_id, ()) if run in by_run],
            is_latest,
        )
        for submission_id, name, note, created_at, is_latest in rows
    }
    return [found[submission_id] for submission_id in chosen if submission_id in found]


def _summary(
    submission_id: str,
    name: str | None,
    note: str | None,
    created_at: str,
    runs: Sequence[RunStatus],
    is_latest: int,
) -> SubmissionSummary:
    return SubmissionSummary(
        submission_id,
        name,
        note,
        created_at,
        Counter(run.state for run in runs),
        sorted({run.partition for run in runs}),
        sorted({run.backend for run in runs}),
        sorted({run.model for run in runs}),
        bool(is_latest),
    )
