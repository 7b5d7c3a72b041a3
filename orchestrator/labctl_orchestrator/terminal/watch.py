"""labctl status --watch: the states of runs until all have ended.

One thread asks Slurm and reads the files, the other draws. A controller that times out stops neither the clock nor Ctrl-C.
"""

from __future__ import annotations

import sqlite3
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.control import Control
from rich.live import Live
from rich.text import Text

from labctl_orchestrator.store.database import Store, open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.terminal import tables
from labctl_orchestrator.tracking import refresh, run_status, status
from labctl_orchestrator.tracking.run_status import DONE, RUNNING, RunStatus
from labctl_slurm.errors import LabctlError
from labctl_workers.record import read_json

LOOK_AT_FIRST_EVERY_S, LOOK_AT_LAST_EVERY_S = 2.0, 15.0
DRAW_EVERY_S = 0.5
WIDEST_BAR = 40
# The first states get a line if the screen is too low for all jobs.
WAITING = (run_status.UNKNOWN, run_status.SUBMITTING, run_status.PENDING)
ORDER = (RUNNING, run_status.SUSPENDED, *sorted(run_status.UNSUCCESSFUL), *WAITING)


@dataclass(frozen=True)
class Snapshot:
    """The runs at one time, problems with Slurm or files, their begin (seconds of `time.time`), and the estimated seconds left
    (None: no estimate)."""

    found: list[RunStatus]
    problems: list[str] = field(default_factory=list)
    left_s: float | None = None
    silent_since: float | None = None
    at: float = field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        return not any(run.may_come for run in self.found)


def watch(workspace: Workspace, run_ids: Sequence[str], title: str) -> list[RunStatus]:
    """Show the runs until all have ended; returns their last states. Ctrl-C raises KeyboardInterrupt."""
    observer = _Observer(workspace, run_ids)
    observer.start()
    try:
        if sys.stdout.isatty() and not tables.console().is_dumb_terminal:
            return _draw(observer, title)
        return _print_changes(observer, title)
    finally:
        observer.stopped.set()


# ---------------------------------------------------------------- observe


class _Observer(threading.Thread):
    """Takes snapshots, less often while nothing changes; `seen` is the latest."""

    def __init__(self, workspace: Workspace, run_ids: Sequence[str]) -> None:
        super().__init__(name="watch", daemon=True)
        self.workspace, self.run_ids = workspace, list(run_ids)
        self.stopped, self.news = threading.Event(), threading.Event()
        self.seen: Snapshot | None = None
        self.failed: BaseException | None = None

    def run(self) -> None:
        try:
            self._look_until_over()
        except BaseException as error:  # the drawing thread raises it
            self.failed = error
            self.news.set()

    def _look_until_over(self) -> None:
        with closing(open_store(self.workspace)) as store:
            queries = refresh.poll_of(self.workspace, store, self.run_ids, asked=False)
        pause_s = LOOK_AT_FIRST_EVERY_S
        while not self.stopped.is_set():
            before = self.seen
            self.seen = self._look(before, slurm=queries.is_due())
            self.news.set()
            if self.seen.is_over:
                return
            changed = before is None or before.found != self.seen.found
            pause_s = LOOK_AT_FIRST_EVERY_S if changed else min(pause_s * 1.3, LOOK_AT_LAST_EVERY_S)
            self.stopped.wait(pause_s)

    def _look(self, before: Snapshot | None, *, slurm: bool) -> Snapshot:
        """A new snapshot; the one before, with the error, if the database cannot be read."""
        try:
            # A new connection each time: labctl collect --rebuild replaces the file.
            with closing(open_store(self.workspace)) as store:
                problems = self._refresh(store, before, slurm=slurm)
                found = status.statuses(self.workspace, store, self.run_ids)
                return Snapshot(found, problems, left_s(store, found), self._silent_since(before) if problems else None)
        except (LabctlError, OSError, sqlite3.Error) as error:
            if before is None:
                raise
            return replace(before, problems=[str(error)], silent_since=before.silent_since or time.time())

    def _refresh(self, store: Store, before: Snapshot | None, *, slurm: bool) -> list[str]:
        try:
            learnt = refresh.refresh(self.workspace, store, self.run_ids, slurm=slurm)
            return learnt.problems if slurm or before is None else before.problems
        except (LabctlError, OSError, sqlite3.Error) as error:  # temporary: a full disk, or another labctl writes
            return [str(error)]

    def _silent_since(self, before: Snapshot | None) -> float:
        if before is not None and before.silent_since is not None:
            return before.silent_since
        try:
            return datetime.fromisoformat(read_json(self.workspace.last_answer)["at"]).timestamp()
        except (OSError, ValueError, KeyError, TypeError):
            return time.time()

    def next(self, within_s: float) -> Snapshot | None:
        """The latest snapshot, after waiting at most `within_s` for a new one. Raises the observer's error."""
        self.news.wait(within_s)
        self.news.clear()
        if self.failed is not None:
            raise self.failed
        return self.seen


def left_s(store: Store, found: Sequence[RunStatus]) -> float | None:
    """Estimated seconds until the last run ends: the median time of ended runs for each run left, and a median engine load for
    each job that has not started, divided by the number of running jobs. None before the first run has ended."""
    done = [run.run_id for run in found if run.state == DONE]
    left = [run for run in found if run.may_come]
    at_once = len({run.job_id for run in left if run.state == RUNNING})
    took = _seconds_of(store, done)
    if not (left and at_once and took):
        return None
    to_begin = len({run.job_id for run in left} - {run.job_id for run in left if run.state == RUNNING})
    run_s = statistics.median(run_s for run_s, _ in took)
    load_s = statistics.median(load_s for _, load_s in took)
    return (len(left) * run_s + to_begin * load_s) / at_once


LATEST = 200


def _seconds_of(store: Store, run_ids: Sequence[str]) -> list[tuple[float, float]]:
    """(run, load) seconds of these runs, of the last LATEST that ended."""
    wanted = set(run_ids)
    rows = store.rows(
        "SELECT run_id, started_at, ended_at, load_s, init_s FROM results WHERE status = 'done' ORDER BY ended_at DESC"
    )
    return [
        (
            (datetime.fromisoformat(row["ended_at"]) - datetime.fromisoformat(row["started_at"])).total_seconds(),
            (row["load_s"] or 0.0) + (row["init_s"] or 0.0),
        )
        for row in [row for row in rows if row["run_id"] in wanted][:LATEST]
    ]


# ---------------------------------------------------------------- in a pipe


def _print_changes(observer: _Observer, title: str) -> list[RunStatus]:
    """Print a line whenever the counts change."""
    printed = ""
    while True:
        seen = observer.next(LOOK_AT_LAST_EVERY_S)
        if seen is None:
            continue
        line = f"{title}: {run_status.summary(seen.found)}"
        if seen.problems:
            line += f" (last known: {seen.problems[0]})"
        if line != printed:
            print(line, flush=True)
            printed = line
        if seen.is_over:
            return seen.found


# ---------------------------------------------------------------- on a terminal


def _draw(observer: _Observer, title: str) -> list[RunStatus]:
    out = tables.console()
    width = out.width
    with Live(Text("asking Slurm"), console=out, auto_refresh=False, transient=False) as live:
        while True:
            seen = observer.next(DRAW_EVERY_S)
            if seen is None:
                continue
            if out.width != width:  # after a resize the terminal has rewrapped the old lines: clear all
                out.control(Control.clear(), Control.home())
                width = out.width
            live.update(frame(seen, title, out), refresh=True)
            if seen.is_over:
                return seen.found


def frame(seen: Snapshot, title: str, out: Console) -> RenderableType:
    """A frame that fits the terminal; rich cannot redraw one that has scrolled."""
    done = sum(run.state == DONE for run in seen.found)
    parts: list[RenderableType] = [
        Text(f"{title}: {run_status.summary(seen.found)}", style="bold"),
        Text(_bar(done, len(seen.found), out.width), no_wrap=True),
        Text(_estimate(seen), style="dim"),
    ]
    if seen.problems:
        parts.append(Text(_silence(seen), style="yellow"))
    used = sum(len(part.wrap(out, out.width)) if isinstance(part, Text) else 1 for part in parts)
    jobs = _job_lines(seen.found)
    room = max(out.height - used - 2, 1)
    shown = jobs[:room] if len(jobs) <= room else jobs[: max(room - 1, 0)]
    parts += [Text(line, style=style, no_wrap=True, overflow="ellipsis") for line, style in shown]
    if len(shown) < len(jobs):
        parts.append(Text(f"… and {len(jobs) - len(shown)} more jobs", style="dim", no_wrap=True))
    return Group(*parts)


def _bar(done: int, total: int, width: int) -> str:
    """A progress bar without colour: "[####------] 12/30"."""
    count = f" {done}/{total}"
    room = max(min(WIDEST_BAR, width - len(count) - 2), 4)
    filled = room * done // max(total, 1)
    return f"[{'#' * filled}{'-' * (room - filled)}]{count}"


def _estimate(seen: Snapshot) -> str:
    if seen.is_over:
        return "all runs have ended"
    if seen.left_s is None:
        return "no estimate yet"
    left_s_now = max(0.0, seen.left_s - (time.monotonic() - seen.at))
    ends = datetime.fromtimestamp(time.time() + left_s_now)
    return f"about {_duration(left_s_now)} left, until {ends:%H:%M}" + (
        "" if left_s_now < 43200 else f" on {ends:%d %b}"
    )


def _silence(seen: Snapshot) -> str:
    since = seen.silent_since or time.time()
    age = _duration(max(0.0, time.time() - since))
    at = f"{datetime.fromtimestamp(since):%H:%M:%S}"
    return f"Slurm did not answer; the states are those of {at}, {age} ago ({seen.problems[0]})"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _job_lines(found: Sequence[RunStatus]) -> list[tuple[str, str]]:
    """(line, style) of each job in `ORDER`; all pending jobs share one line, all finished jobs another."""
    jobs: dict[str | None, list[RunStatus]] = {}
    for run in found:
        jobs.setdefault(run.job_id, []).append(run)
    by_state: dict[str, list[list[RunStatus]]] = {}
    for runs in jobs.values():
        by_state.setdefault(_state_of(runs), []).append(runs)
    lines = []
    for state in ORDER:
        group = by_state.get(state, [])
        if state == run_status.PENDING and len(group) > 1:
            lines.append((_waiting_line(group), tables.STYLES.get(state, "")))
        else:
            lines += [(_job_line(runs, state), tables.STYLES.get(state, "")) for runs in group]
    if done := by_state.get(DONE, []):
        counts = f"{tables.counted(len(done), 'job')} done, {tables.counted(sum(map(len, done)), 'run')}"
        lines.append((counts, tables.STYLES[DONE]))
    return lines


def _state_of(runs: Sequence[RunStatus]) -> str:
    """The state of a job: the first in `ORDER` that one of its runs has."""
    states = {run.state for run in runs}
    return next((state for state in ORDER if state in states), DONE)


def _job_line(runs: Sequence[RunStatus], state: str) -> str:
    first = next(run for run in runs if run.state == state)
    explained = next((run for run in runs if run.state == state and not run.detail.startswith("waits")), first)
    done = sum(run.state == DONE for run in runs)
    detail = explained.detail.partition(" (")[0]
    return "  ".join(filter(None, (first.slurm_id or "-", f"{done}/{len(runs)}", state, first.node, detail)))


def _waiting_line(jobs: Sequence[Sequence[RunStatus]]) -> str:
    runs = [run for job in jobs for run in job if run.state == run_status.PENDING]
    reasons = ", ".join(dict.fromkeys(run.detail for run in runs if run.detail))
    counts = f"{tables.counted(len(jobs), 'job')} pending, {tables.counted(len(runs), 'run')}"
    return f"{counts}  {reasons}" if reasons else counts
