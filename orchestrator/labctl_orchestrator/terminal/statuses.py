"""States of runs on a terminal: a line per run or counts; and warnings when Slurm does not answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.terminal import tables
from labctl_orchestrator.tracking import refresh as refreshing
from labctl_orchestrator.tracking import run_status
from labctl_orchestrator.tracking.refresh import Refreshed
from labctl_orchestrator.tracking.run_status import RunStatus
from labctl_workers.record import read_json


def refresh(
    workspace: Workspace, store: Store, run_ids: Sequence[str] | None = None, *, every_file: bool = False
) -> Refreshed:
    """`tracking.refresh.refresh`, with a spinner and with warnings about missing answers."""
    with tables.working("asking Slurm"):
        learnt = refreshing.refresh(workspace, store, run_ids, every_file=every_file)
    note_problems(learnt, workspace)
    return learnt


def refresh_chosen(
    workspace: Workspace, store: Store, names: Sequence[str], *, everything: bool = False
) -> tuple[str, list[str]]:
    """`refresh` of the runs that `names` select; returns (title, run ids)."""
    with tables.working("asking Slurm"):
        learnt, title, run_ids = refreshing.refresh_chosen(workspace, store, names, everything=everything)
    note_problems(learnt, workspace)
    return title, run_ids


def note_problems(learnt: Refreshed, workspace: Workspace) -> None:
    """Warn about missing answers of Slurm, with the age of the last known states, and about unreadable files."""
    for problem in learnt.problems:
        tables.note(f"warning: Slurm did not answer; the states are {_age_of_states(workspace)} ({problem})")
    for damaged in learnt.collected.damaged:
        tables.note(f"warning: file skipped: {damaged}")
    if learnt.collected.records and not workspace.writable:
        records = tables.counted(learnt.collected.records, "new record")
        tables.note(f"{records} read but not stored: {workspace.read_only_reason}")
    elif FULL in workspace.read_only_reason:
        tables.note(f"warning: {workspace.read_only_reason}; labctl du shows the usage, labctl clean frees space")


FULL = " is full"


def _age_of_states(workspace: Workspace) -> str:
    try:
        return f"{since(read_json(workspace.last_answer)['at'])} old"
    except (OSError, ValueError, KeyError, TypeError):
        return "the last known ones"


def print_statuses(found: Sequence[RunStatus]) -> None:
    """Print a line per run; below, each remedy once."""
    columns = ("run", "state", "where", "settings", "job", "since", "reason")
    rows = [
        (
            run.run_id,
            run.state,
            f"{run.partition} {run.node or ''}".rstrip(),
            short_settings(vars(run)),
            run.slurm_id or "",
            since(run.since),
            run.detail,
        )
        for run in found
    ]
    tables.table(columns, rows)
    for remedy in dict.fromkeys(run.remedy for run in found if run.remedy):
        tables.note(f"  -> {remedy}")


# Of more runs than these, print counts and the first failures.
RUNS_LISTED = 100
FAILURES_SHOWN = 10


def print_runs(found: Sequence[RunStatus]) -> None:
    """`print_statuses`; for more than RUNS_LISTED runs `print_overview`."""
    if len(found) <= RUNS_LISTED:
        print_statuses(found)
    else:
        print_overview(Counter(run.state for run in found), found)


def print_overview(counts: Mapping[str, int], left: Sequence[RunStatus]) -> None:
    """Print the number of runs in each state; below, the first failures. `left` has all runs that are not done."""
    tables.table(("state", "runs"), [(state, f"{count:,}") for state, count in counts.items()], right=("runs",))
    failed = [run for run in left if run.state in run_status.UNSUCCESSFUL]
    if failed:
        print()
        print_statuses(failed[:FAILURES_SHOWN])
    if len(failed) > FAILURES_SHOWN:
        tables.note(f"... and {len(failed) - FAILURES_SHOWN:,} more failed; labctl status --every-run lists every run")


def _lengths_in_words(axes: Mapping[str, Any]) -> str:
    """The lengths of a run: "128 tokens", "1024/128 tokens" with a workload, "sharegpt.json@0a1b2c3d" of a dataset."""
    output_len = axes["max_new_tokens"] if axes["output_len"] is None else axes["output_len"]
    lengths = [str(length) for length in (axes["input_len"], output_len) if length is not None]
    words = [*filter(None, [axes["dataset"]]), *([f"{'/'.join(lengths)} tokens"] if lengths else [])]
    return " ".join([*words, *([f"prefix {axes['prefix_len']}"] if axes["prefix_len"] else [])])


def short_settings(run: Mapping[str, Any]) -> str:
    """The settings of a run in a few words: backend, model, dtype and lengths, then every value that is not the default. Its
    keys are fields of RunStatus."""
    words = [run["backend"], run["model"].rpartition("/")[2], run["dtype"], _lengths_in_words(run)]
    if run["served"]:
        words.append("served")
    if run["parallel"] not in ("layers", "tensor"):  # the backends' defaults
        words.append(f"{run['gpus']} GPUs {run['parallel']}")
    if run["batch_size"] not in (1, None):
        words.append(f"batch {run['batch_size']}")
    if run["sampling"] != "greedy":
        words.append(run["sampling"])
    if run["request_rate"] is not None:
        words.append(f"rate {run['request_rate']:g}/s")
    return " ".join([*words, *(f"{name}={value}" for name, value in run["engine_options"].items())])


def since(time: str | None) -> str:
    """The age of an ISO time: "12 s", "5 min", "3 h", "2 d"; "" if unknown."""
    if time is None:
        return ""
    try:
        age = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds())
    except (TypeError, ValueError):  # a person edited the file: no time, or no time zone
        return ""
    for limit, unit, divisor in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if age < limit:
            return f"{age / divisor:.0f} {unit}"
    return f"{age / 86400:.0f} d"
