"""The Python API: `import labctl_orchestrator as lab`. Returns tables that notebooks render, that print like `labctl`, and that
convert to pandas.

Every function uses the workspace at `workspace`, else that of the current folder (or of LABCTL_HOME). Like the commands, it
first collects new records. It raises `LabctlError`, with `message` and `remedy`, for every error of a command.
"""

from __future__ import annotations

import contextlib
import html
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from labctl_orchestrator.analysis import question, verdicts
from labctl_orchestrator.analysis.comparison import Comparison, Row
from labctl_orchestrator.analysis.cost import prices_here
from labctl_orchestrator.analysis.goodput import levels_of
from labctl_orchestrator.analysis.metrics import figure
from labctl_orchestrator.analysis.question import Question
from labctl_orchestrator.exchange import query as queries
from labctl_orchestrator.request import settings
from labctl_orchestrator.request.paths import expand_home
from labctl_orchestrator.request.request import FLAGS
from labctl_orchestrator.store import select_runs, views
from labctl_orchestrator.store import workspace as workspaces
from labctl_orchestrator.store.database import Store, open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.submission import cancel as cancellations
from labctl_orchestrator.submission import retry as retries
from labctl_orchestrator.submission import submit as submissions
from labctl_orchestrator.submission.launch import Launched
from labctl_orchestrator.terminal import tables
from labctl_orchestrator.terminal.comparison import print_comparison, ratio_to_baseline, title_of
from labctl_orchestrator.tracking import refresh
from labctl_orchestrator.tracking import status as states
from labctl_orchestrator.tracking import wait as waiting
from labctl_orchestrator.tracking.run_status import RunStatus
from labctl_slurm.errors import NotYetError, PreflightError, WrongUseError, nearest

if TYPE_CHECKING:
    import pandas

ROWS_SHOWN = 60
Words = str | Sequence[str]


# ---------------------------------------------------------------- tables


class ResultTable(Sequence[dict[str, Any]]):
    """Rows with named columns: a sequence of dictionaries. `table["ttft_s"]` is a column, `table.to_pandas()` a DataFrame."""

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.columns = list(columns)
        self.rows = [tuple(row) for row in rows]

    @classmethod
    def of(cls, answer: queries.QueryResult) -> ResultTable:
        return cls(answer.columns, answer.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, place: slice) -> ResultTable: ...
    @overload
    def __getitem__(self, place: str) -> list[Any]: ...

    def __getitem__(self, place: int | slice | str) -> Any:
        if isinstance(place, str):
            if place not in self.columns:
                raise KeyError(f"{place}: {nearest(place, self.columns)}")
            column = self.columns.index(place)
            return [row[column] for row in self.rows]
        if isinstance(place, slice):
            return ResultTable(self.columns, self.rows[place])
        return dict(zip(self.columns, self.rows[place], strict=True))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (dict(zip(self.columns, row, strict=True)) for row in self.rows)

    def to_pandas(self) -> pandas.DataFrame:
        """A DataFrame with these columns. Raises WrongUseError if pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise WrongUseError("pandas is not installed", "pip install pandas") from None
        return pandas.DataFrame(self.rows, columns=self.columns)

    def __repr__(self) -> str:
        rows = [[queries.cell(value) for value in row] for row in self.rows[:ROWS_SHOWN]]
        right = queries.numeric(self.columns, self.rows)
        more = len(self.rows) - ROWS_SHOWN
        rest = f"... and {more} more rows\n" if more > 0 else ""
        return _printed(lambda: tables.table(self.columns, rows, right=right)) + rest

    def _repr_html_(self) -> str:
        rows = [[queries.cell(value) for value in row] for row in self.rows[:ROWS_SHOWN]]
        more = len(self.rows) - ROWS_SHOWN
        return _html_table(self.columns, rows) + (f"<p>... and {more} more rows</p>" if more > 0 else "")


class ComparisonResult:
    """A comparison: `verdicts` as sentences, `table` with a row per run and metric, `warnings` and `notes`. `comparison` is
    the underlying `labctl_orchestrator.analysis.comparison.Comparison`."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison

    @property
    def verdicts(self) -> list[str]:
        return verdicts.sentences(self.comparison)

    @property
    def warnings(self) -> list[str]:
        return self.comparison.warnings

    @property
    def notes(self) -> list[str]:
        return self.comparison.notes

    @property
    def table(self) -> ResultTable:
        """A row per run and metric, in the metric's unit; `low` and `high` are the 95% CI of the ratio or the difference."""
        answer = self.comparison
        fixed = list(dict.fromkeys(axis for block in answer.blocks for axis in block.fixed))
        columns = ["metric", "unit", *fixed, *answer.by, *FIGURES, "low", "high", "verdict", "run_id"]
        rows = []
        for block in answer.blocks:
            for row in block.rows:
                at = [*(block.fixed.get(axis) for axis in fixed), *(row.at[axis] for axis in answer.by)]
                bounds = row.ratio_interval or row.difference_interval or (None, None)
                figures = [getattr(row, name) for name in FIGURES]
                rows.append([block.metric, row.unit, *at, *figures, *bounds, verdicts.verdict(row).kind, row.run_id])
        return ResultTable(columns, rows)

    def to_pandas(self) -> pandas.DataFrame:
        """`table` as a DataFrame."""
        return self.table.to_pandas()

    def __repr__(self) -> str:
        return _printed(lambda: print_comparison(self.comparison, None, with_texts=False))

    def _repr_html_(self) -> str:
        answer = self.comparison
        parts = []
        for block in answer.blocks:
            columns = [*answer.by, "mean", "lowest", "highest", "n", "ratio", "run"]
            rows = [_texts(row, answer.by) for row in block.rows]
            parts.append(_html_table(columns, rows, title_of(block)))
        parts.append(_html_list("Verdicts", verdicts.sentences(answer)))
        parts.append(_html_list("Warnings", answer.warnings))
        parts.append(_html_list("Notes", answer.notes))
        return "".join(parts)


FIGURES = ("mean", "spread", "n", "n_of", "ratio", "difference")


def _texts(row: Row, by: Sequence[str]) -> list[str]:
    figures = [figure(value, row.unit) for value in (row.mean, row.low, row.high)]
    return [
        *(str(row.at[axis]) for axis in by), *figures, f"{row.n} {row.n_of}", ratio_to_baseline(row), row.run_id
    ]  # fmt: skip


def _printed(show: Callable[[], None]) -> str:
    """The output of `show`: stdout, then stderr."""
    out, notes = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(notes):
        show()
    return out.getvalue() + notes.getvalue()


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    head = "".join(f"<th scope='col'>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _html_list(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<p><b>{title}</b></p><ul>{items}</ul>" if lines else ""


# ---------------------------------------------------------------- results


def compare(
    *names: str,
    by: Words = (),
    metric: Words = (),
    where: Words = (),
    baseline: str | None = None,
    slo: Words = (),
    everything: bool = False,
    workspace: str | Path | None = None,
) -> ComparisonResult:
    """The comparison of `labctl compare`, by default of the latest submission.

    `by` are axes, `metric` metrics, `where` conditions such as "dtype=float16", `slo` service levels such as "ttft<500ms"; one
    word or several.
    """
    wanted = Question.of(_words(by), _words(metric), _words(where), baseline)
    here = _workspace(workspace)
    with _store(here) as (store, _):
        run_ids = select_runs.chosen_runs(store, names, everything=everything, imported=True)[1]
        wanted = wanted.with_levels(levels_of(here, store, run_ids, _words(slo)))
        cells = question.cells_of(store, run_ids, wanted, prices_here(here, store) if wanted.needs_prices else {})
        if not cells:
            raise NotYetError("none of these runs has a result yet", "labctl status shows their states")
        return ComparisonResult(question.answer(store, cells, wanted))


def _rows_of(table: str, what: str) -> Callable[..., ResultTable]:
    def rows(*names: str, workspace: str | Path | None = None) -> ResultTable:
        here = _workspace(workspace)
        with _store(here) as (store, _):
            run_ids = select_runs.chosen_runs(store, names)[1] if names else None
        view = views.view_of(table)
        sql = f"SELECT * FROM {view.name}"  # noqa: S608  a name of `views`
        if run_ids is None:
            return ResultTable.of(queries.query(here, sql))
        return ResultTable.of(queries.query(here, f"{sql} WHERE {view.chosen}", (json.dumps(run_ids),)))

    rows.__name__ = rows.__qualname__ = table
    rows.__doc__ = f"A row per {what}; by default of all runs."
    return rows


runs = _rows_of("runs", "measured run, with the mean of every metric")
repeats = _rows_of("repeats", "repeat, with every metric")
requests = _rows_of("requests", "request of a repeat: times, finish reason, text")
devices = _rows_of("devices", "device of a repeat: memory, by kind")
failures = _rows_of("failures", "failed attempt of a run: reason and remedy")
jobs = _rows_of("jobs", "job: its settings, and the use of its GPU time")


def query(sql: str, parameters: Sequence[Any] = (), *, workspace: str | Path | None = None) -> ResultTable:
    """The rows of one SELECT; each ? takes the next parameter. Raises WrongUseError for SQL that writes."""
    here = _workspace(workspace)
    with _store(here):
        return ResultTable.of(queries.query(here, sql, parameters))


def status(*names: str, everything: bool = False, workspace: str | Path | None = None) -> ResultTable:
    """The state of each run and the reason, by default of the latest submission."""
    here = _workspace(workspace)
    with _store(here) as (store, silent):
        for problem in silent:
            warnings.warn(f"{problem}; returning the last known states", stacklevel=2)
        return _states_of(here, store, select_runs.chosen_runs(store, names, everything=everything)[1])


# ---------------------------------------------------------------- submit


def submit(
    file: str | None = None, *, wait: bool = False, again: bool = False, force: bool = False, **keys: Any
) -> ResultTable:
    """Submit from the current folder, like `labctl submit`; a row per run, with its state.

    `file` is a submission file. The keys are those of a file (docs/submissions.md) and override it: partition="dgxh",
    dtype=["float16", "bfloat16"]. Raises PreflightError if a check expects a failure, SlurmError if Slurm refuses all jobs.
    """
    layers = [settings.request_file(file)] if file else []
    here = workspaces.find() or Workspace(Path.cwd())
    check = "LABCTL_NO_PREFLIGHT" not in os.environ
    prepared = submissions.prepare(here, [*layers, (FLAGS, keys)], again=again, check=check)
    if refusals := prepared.refusals(force=force):
        raise PreflightError("; ".join(f.what for f in refusals), "; ".join(f.remedy for f in refusals))
    for warning in (*prepared.warnings, *(found.what for found in prepared.findings if found.severity != "note")):
        warnings.warn(warning, stacklevel=2)
    prepared.workspace.create()
    with closing(open_store(prepared.workspace)) as store:
        launched = submissions.submit(prepared, store)
        _raise_refusals([launched])
        if wait:
            waiting.wait(prepared.workspace, store, launched.run_ids)
        return _states_of(prepared.workspace, store, launched.run_ids)


def retry(
    *names: str,
    failed: bool = False,
    timeout: bool = False,
    missing: bool = False,
    everything: bool = False,
    workspace: str | Path | None = None,
) -> ResultTable:
    """Resubmit missing and failed runs, like `labctl retry`, by default of the latest submission; a row per run."""
    here = _workspace(workspace)
    kinds = {retries.FAILED: failed, retries.TIMEOUT: timeout, retries.MISSING: missing}
    with _store(here) as (store, _):
        found = states.statuses(here, store, select_runs.chosen_runs(store, names, everything=everything)[1])
        left = retries.without_result(found, [kind for kind, wanted in kinds.items() if wanted])
        launched, messages = retries.submit(here, store, retries.retries(here, store, left))
        for warning in messages:
            warnings.warn(warning, stacklevel=2)
        _raise_refusals(launched)
        return _states_of(here, store, [run.run_id for run in left])


def cancel(*names: str, everything: bool = False, workspace: str | Path | None = None) -> ResultTable:
    """Cancel unfinished jobs, like `labctl cancel --yes`, by default of the latest submission; a row per run of these jobs."""
    here = _workspace(workspace)
    with _store(here) as (store, _):
        found = states.statuses(here, store, select_runs.chosen_runs(store, names, everything=everything)[1])
        plan = cancellations.planned(store, found)
        cancellations.carry_out(here, store, plan)
        refresh.refresh(here, store)
        return _states_of(here, store, [*(run.run_id for run in plan.runs), *plan.beside])


def wait(*names: str, everything: bool = False, workspace: str | Path | None = None) -> ResultTable:
    """Wait until the runs have ended, by default those of the latest submission; a row per run, with its state."""
    here = _workspace(workspace)
    with _store(here) as (store, _):
        run_ids = select_runs.chosen_runs(store, names, everything=everything)[1]
        waiting.wait(here, store, run_ids)
        return _states_of(here, store, run_ids)


def _raise_refusals(launched: Sequence[Launched]) -> None:
    for each in launched:
        if each.refusals and not each.queued:
            raise each.refusals[0]


def _states_of(here: Workspace, store: Store, run_ids: Sequence[str]) -> ResultTable:
    rows = [run.to_json() for run in states.statuses(here, store, run_ids)]
    columns = [field.name for field in fields(RunStatus)]
    return ResultTable(columns, [[row[column] for column in columns] for row in rows])


# ---------------------------------------------------------------- workspace


def _workspace(given: str | Path | None) -> Workspace:
    if given is None:
        return workspaces.existing()
    here = Workspace(expand_home(str(given)).absolute())
    if not here.data.is_dir():
        raise WrongUseError(f"not a workspace: {here.root}", "give a folder from which you submitted")
    return here


@contextlib.contextmanager
def _store(here: Workspace) -> Iterator[tuple[Store, list[str]]]:
    """The workspace's database with all new records, and problems with Slurm's answers."""
    with closing(open_store(here)) as store:
        learnt = refresh.refresh(here, store)
        for damaged in learnt.collected.damaged:
            warnings.warn(f"file skipped: {damaged}", stacklevel=4)
        yield store, learnt.problems


def _words(words: Words) -> Sequence[str]:
    return (words,) if isinstance(words, str) else words
