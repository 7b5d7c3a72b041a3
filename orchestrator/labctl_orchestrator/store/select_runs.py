"""Runs that names on the command line select."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from labctl_orchestrator.store.database import CHARACTER_AFTER_ALL, Store
from labctl_orchestrator.store.views import HERE
from labctl_slurm.errors import WrongUseError

# Jobs that labctl submitted, or whose script a person submitted; not those that were only rendered.
SUBMITTED = "(intent_at IS NOT NULL OR slurm_id IS NOT NULL OR jobs.job_id IN (SELECT job_id FROM job_starts))"
ALL_RUNS = "all runs"
_RUNS_BY_TIME = (
    "SELECT run_id FROM job_runs JOIN jobs USING (job_id) JOIN arrays USING (array_id)"
    f" WHERE {SUBMITTED} ORDER BY coalesce(intent_at, arrays.created_at), array_id, task, position"
)
_IMPORTED_RUNS = (
    # Two ranges, so that SQLite uses the index of origins.
    f"SELECT run_id FROM runs WHERE (origin < '{HERE}' OR origin > '{HERE}') "
    " AND EXISTS (SELECT 1 FROM results WHERE results.run_id = runs.run_id)"
    # A bundle does not keep the order of submission. The first run of each group is the baseline of a comparison.
    " ORDER BY origin, partition, backend, model, dtype, max_new_tokens, batch_size, request_rate, sampling, engine_options,"
    " run_id"
)
_RUNS_OF_SUBMISSION = "SELECT run_id FROM submission_runs WHERE submission_id = ? ORDER BY position"
_RUNS_OF_JOB = (
    # CROSS JOIN: SQLite must search the jobs first.
    "SELECT run_id FROM jobs CROSS JOIN job_runs USING (job_id) WHERE slurm_id = ?"
    " OR substr(slurm_id, 1, length(?) + 1) = ? || '_' OR job_id = ? ORDER BY task, position"
)
_RUNS_BY_PREFIX = (
    "SELECT run_id FROM runs WHERE run_id BETWEEN ? AND ? AND (origin = ? OR (? = '' AND NOT EXISTS"
    f" (SELECT 1 FROM runs AS own WHERE +own.origin = '{HERE}' AND own.run_id BETWEEN ? AND ?)))"
)


def chosen_runs(
    store: Store, names: Sequence[str], *, everything: bool = False, imported: bool = False
) -> tuple[str, list[str]]:
    """(a title, the run ids) that the names select; without names, the latest submission. `everything` selects all runs of this
    workspace, with `imported` also those of bundles.

    A name is a run id or its first digits, a submission's id or name, a Slurm id, a job id, or the label of imported bundles.
    Raises WrongUseError for any other name.
    """
    if everything:
        return ALL_RUNS, [*_ids(store, _RUNS_BY_TIME), *(_ids(store, _IMPORTED_RUNS) if imported else [])]
    if names:
        found = [run_id for name in names for run_id in _named(store, name)]
        return ", ".join(names), list(dict.fromkeys(found))
    latest = store.tuples(
        "SELECT submission_id, name FROM submissions ORDER BY created_at DESC, submission_id DESC LIMIT 1"
    )
    for submission_id, name in latest:
        return name or submission_id, _ids(store, _RUNS_OF_SUBMISSION, (submission_id,))
    if runs := _ids(store, _RUNS_BY_TIME):  # of scripts that were rendered and submitted by hand
        return ALL_RUNS, runs
    others = _ids(store, _IMPORTED_RUNS)
    if others and imported:
        return "imported runs", others
    if others:
        raise WrongUseError("this workspace has imported runs only", "labctl compare and labctl report show them")
    raise WrongUseError("this workspace has no runs yet", "submit runs: labctl submit --help")


def runs_by_submission(store: Store) -> dict[str, list[str]]:
    """The run ids of each submission that has any: the oldest submission first, its runs in the order of submission."""
    found: dict[str, list[str]] = {}
    rows = store.tuples(
        "SELECT submission_id, run_id FROM submissions JOIN submission_runs USING (submission_id)"
        " ORDER BY created_at, submission_id, position"
    )
    for submission_id, run_id in rows:
        found.setdefault(submission_id, []).append(run_id)
    return found


def one_run(store: Store, name: str) -> str:
    """The run that `name` selects. Raises WrongUseError if it selects several."""
    runs = _named(store, name)
    if len(runs) > 1:
        some = ", ".join(runs[:4]) + ("…" if len(runs) > 4 else "")
        raise WrongUseError(f"{name!r} selects {len(runs)} runs: {some}", "give one run id")
    return runs[0]


def _named(store: Store, name: str) -> list[str]:
    if not name.strip():
        raise WrongUseError(f"empty name: {name!r}", "give a run id, a submission's name or a Slurm id")
    newest = (
        "SELECT submission_id FROM submissions WHERE submission_id = ? OR name = ? ORDER BY created_at DESC LIMIT 1"
    )
    for submission_id in _ids(store, newest, (name, name)):
        return _ids(store, _RUNS_OF_SUBMISSION, (submission_id,))
    found = _ids(store, _RUNS_OF_JOB, (name,) * 4)
    found = found or _ids(store, _IMPORTED_RUNS.replace("ORDER BY", "AND origin = ? ORDER BY"), (name,))
    return found or _by_prefix(store, name)


def _by_prefix(store: Store, name: str) -> list[str]:
    digits, at, origin = name.partition("@")  # 3f9a is a run of this workspace, 3f9a@ada one of ada's
    between = (digits.lower(), digits.lower() + CHARACTER_AFTER_ALL)
    runs = _ids(store, _RUNS_BY_PREFIX, (*between, origin if at else HERE, at, *between))
    if len(runs) == 1 or (runs and len(digits) >= 4):
        return runs
    if runs:
        raise WrongUseError(f"ambiguous run id: {digits!r} ({len(runs)} runs)", "give at least four digits")
    if not store.tuples("SELECT 1 FROM runs LIMIT 1"):
        raise WrongUseError(
            f"no run matches {name!r}: this workspace has no runs yet", "submit runs: labctl submit --help"
        )
    close = difflib.get_close_matches(
        name, _ids(store, "SELECT DISTINCT name FROM submissions WHERE name IS NOT NULL"), n=1
    )
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise WrongUseError(
        f"no run, submission, Slurm job or bundle matches: {name!r}", f"{hint}labctl status --all lists all runs"
    )


def _ids(store: Store, sql: str, parameters: Iterable[str] = ()) -> list[str]:
    """The distinct values of the first column, in order."""
    return list(dict.fromkeys(row[0] for row in store.tuples(sql, parameters)))
