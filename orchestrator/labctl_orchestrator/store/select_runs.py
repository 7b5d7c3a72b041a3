"""Which runs a word on the command line means."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from labctl_orchestrator.store.database import CHARACTER_AFTER_ALL, Store
from labctl_orchestrator.store.views import HERE
from labctl_slurm.errors import WrongUseError

# An array that labctl submitted, or whose script a person did; one that was only rendered is none yet.
BEGUN = "(intent_at IS NOT NULL OR slurm_id IS NOT NULL OR jobs.job_id IN (SELECT job_id FROM executions))"
ALL_RUNS = "all runs"


def chosen_runs(
    store: Store, names: Sequence[str], *, everything: bool = False, imported: bool = False
) -> tuple[str, list[str]]:
    """(a title, the run ids) meant by ids or names; by default those of the latest request. `imported`: everything is also
    what bundles brought.

    A word may be a run id or the beginning of one, a request's id or name, a Slurm id, or the label of imported bundles. Raises
    WrongUseError for one that is none of them.
    """
    if everything:
        own = _runs_by_time(store)
        others = [row[0] for row in store.tuples(_IMPORTED_RUNS)] if imported else []
        return ALL_RUNS, [*own, *others]
    if names:
        found = [run_id for name in names for run_id in _named(store, name)]
        return ", ".join(names), list(dict.fromkeys(found))
    latest = store.rows(
        "SELECT submission_id, name FROM submissions ORDER BY created_at DESC, submission_id DESC LIMIT 1"
    )
    if latest:
        request = latest[0]
        return request["name"] or request["submission_id"], _runs_of(store, request["submission_id"])
    if runs := _runs_by_time(store):  # rendered and submitted by hand
        return ALL_RUNS, runs
    others = [row[0] for row in store.tuples(_IMPORTED_RUNS)]
    if others and imported:
        return "imported runs", others
    if others:
        raise WrongUseError(
            "nothing was submitted in this workspace, bundles were imported",
            "labctl compare and labctl report show them",
        )
    raise WrongUseError("nothing was submitted in this workspace yet", "labctl submit --help shows how")


def _runs_by_time(store: Store) -> list[str]:
    """Each run of this workspace once, the first submitted first."""
    return list(dict.fromkeys(run_id for (run_id,) in store.tuples(_RUNS_BY_TIME)))


_RUNS_BY_TIME = (
    "SELECT run_id FROM job_runs JOIN jobs USING (job_id) JOIN arrays USING (array_id)"
    f" WHERE {BEGUN} ORDER BY coalesce(intent_at, arrays.created_at), array_id, task, position"
)


_IMPORTED_RUNS = (
    # As two ranges, which the index of origins finds.
    f"SELECT run_id, origin FROM runs WHERE (origin < '{HERE}' OR origin > '{HERE}')"
    " AND EXISTS (SELECT 1 FROM results WHERE results.run_id = runs.run_id)"
    # A bundle does not tell what was asked for first; the first run of each group is what others are compared with.
    " ORDER BY origin, partition, backend, model, dtype, max_new_tokens, batch_size, request_rate, sampling, engine_options,"
    " run_id"
)


def _named(store: Store, name: str) -> list[str]:
    if not name.strip():
        raise WrongUseError("an empty word names no run", "give a run id, a request's name or a Slurm id")
    requests = store.rows(
        "SELECT submission_id FROM submissions WHERE submission_id = ? OR name = ? ORDER BY created_at DESC",
        (name, name),
    )
    if requests:
        return _runs_of(store, requests[0]["submission_id"])
    jobs = store.rows(
        # The runs of the jobs, not the jobs of all runs.
        "SELECT run_id FROM jobs CROSS JOIN job_runs USING (job_id) WHERE slurm_id = ?"
        " OR substr(slurm_id, 1, length(?) + 1) = ? || '_' OR job_id = ?"
        " ORDER BY task, position",
        (name, name, name, name),
    )
    if jobs:
        return [job["run_id"] for job in jobs]
    of_origin = store.rows(_IMPORTED_RUNS.replace("ORDER BY", "AND origin = ? ORDER BY"), (name,))
    if of_origin:
        return [run["run_id"] for run in of_origin]
    digits, at, origin = name.partition("@")  # 3f9a is a run of this workspace, 3f9a@ada one of ada's
    between = (digits.lower(), digits.lower() + CHARACTER_AFTER_ALL)
    runs = store.rows(
        "SELECT run_id FROM runs WHERE run_id BETWEEN ? AND ? AND (origin = ? OR (? = '' AND NOT EXISTS"
        f" (SELECT 1 FROM runs AS own WHERE +own.origin = '{HERE}' AND own.run_id BETWEEN ? AND ?)))",
        (*between, origin if at else HERE, at, *between),
    )
    if len(runs) == 1 or (runs and len(digits) >= 4):
        return [run["run_id"] for run in runs]
    if runs:
        raise WrongUseError(f"{len(runs)} runs begin with {digits!r}", "give at least four digits of the run id")
    names = [row["name"] for row in store.rows("SELECT DISTINCT name FROM submissions WHERE name IS NOT NULL")]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise WrongUseError(
        f"no run, request, name or Slurm id here is {name!r}",
        f"{hint}labctl status --all lists what this workspace has",
    )


def _runs_of(store: Store, submission_id: str) -> list[str]:
    rows = store.rows("SELECT run_id FROM submission_runs WHERE submission_id = ? ORDER BY position", (submission_id,))
    return [row["run_id"] for row in rows]


def one_run(store: Store, name: str) -> str:
    """The one run that `name` means. Raises WrongUseError where it means several."""
    runs = list(dict.fromkeys(_named(store, name)))
    if len(runs) > 1:
        raise WrongUseError(
            f"{name!r} means {len(runs)} runs: {', '.join(runs[:4])}{'…' if len(runs) > 4 else ''}",
            "give the id of one of them",
        )
    return runs[0]
