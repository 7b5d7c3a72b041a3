"""For notebooks and scripts: `import labctl_orchestrator as lab`. The answers are tables that a notebook shows, that print as
`labctl` prints them, and that pandas takes.

Every function asks the workspace of the current folder (or LABCTL_HOME's), or the one at `workspace`; takes in what is new
there, as the commands do; and raises `LabctlError`, with `message` and `remedy`, where a command would end with one.
"""

from __future__ import annotations

import contextlib
import html
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from labctl_orchestrator.analysis import question, verdicts
from labctl_orchestrator.analysis.comparison import Comparison, Row
from labctl_orchestrator.analysis.cost import Price, prices
from labctl_orchestrator.analysis.metrics import figure
from labctl_orchestrator.analysis.question import Question
from labctl_orchestrator.request import settings
from labctl_orchestrator.request.paths import expand_home
from labctl_orchestrator.request.request import AXES, KEYS
from labctl_orchestrator.store import query as queries
from labctl_orchestrator.store import select_runs, views
from labctl_orchestrator.store import workspace as workspaces
from labctl_orchestrator.store.database import Store, open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.terminal import comparison as compare_screen
from labctl_orchestrator.terminal import tables as screen
from labctl_orchestrator.tracking import refresh
from labctl_orchestrator.tracking import status as states
from labctl_slurm.errors import PreflightError, WrongUseError, nearest

if TYPE_CHECKING:
    import pandas

ROWS_SHOWN = 60
Words = str | Sequence[str]


# ---------------------------------------------------------------- tables


class Table(Sequence[dict[str, Any]]):
    """Rows under named columns: a sequence of dictionaries. `table["ttft_s"]` is a column, `table.to_pandas()` a DataFrame."""

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.columns = list(columns)
        self.rows = [tuple(row) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, place: slice) -> Table: ...
    @overload
    def __getitem__(self, place: str) -> list[Any]: ...

    def __getitem__(self, place: int | slice | str) -> Any:
        if isinstance(place, str):
            if place not in self.columns:
                raise KeyError(f"{place}: {nearest(place, self.columns)}")
            column = self.columns.index(place)
            return [row[column] for row in self.rows]
        if isinstance(place, slice):
            return Table(self.columns, self.rows[place])
        return dict(zip(self.columns, self.rows[place], strict=True))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (dict(zip(self.columns, row, strict=True)) for row in self.rows)

    def to_pandas(self) -> pandas.DataFrame:
        """A DataFrame with these columns. Raises WrongUseError where pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise WrongUseError("pandas is not installed beside labctl", "pip install pandas") from None
        return pandas.DataFrame(self.rows, columns=self.columns)

    def __repr__(self) -> str:
        rows = [[queries.cell(value) for value in row] for row in self.rows[:ROWS_SHOWN]]
        right = queries.numeric(self.columns, self.rows)
        more = len(self.rows) - ROWS_SHOWN
        told = f"... and {more} more rows\n" if more > 0 else ""
        return _printed(lambda: screen.table(self.columns, rows, right=right)) + told

    def _repr_html_(self) -> str:
        rows = [[queries.cell(value) for value in row] for row in self.rows[:ROWS_SHOWN]]
        more = len(self.rows) - ROWS_SHOWN
        return _html_table(self.columns, rows) + (f"<p>... and {more} more rows</p>" if more > 0 else "")


class Answer:
    """A comparison: `verdicts` in sentences, `table` with a row a cell and metric, and what has to be said with it
    (`warnings`, `notes`). `comparison` is all of it, as `labctl_orchestrator.analysis.compare` has it."""

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
    def table(self) -> Table:
        """A row a cell and metric, in the metric's own unit; `low` and `high` bound the ratio (or the difference), 95%."""
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
        return Table(columns, rows)

    def to_pandas(self) -> pandas.DataFrame:
        """`table` as a DataFrame."""
        return self.table.to_pandas()

    def __repr__(self) -> str:
        return _printed(lambda: compare_screen.print_comparison(self.comparison, None))

    def _repr_html_(self) -> str:
        answer = self.comparison
        parts = []
        for block in answer.blocks:
            fixed = "".join(f", {axis} {value}" for axis, value in block.fixed.items())
            better = f", {block.better} is better" if block.better else ""
            columns = [*answer.by, "mean", "lowest", "highest", "n", "ratio", "run"]
            rows = [_shown(row, answer.by) for row in block.rows]
            parts.append(_html_table(columns, rows, f"{block.title}{better}{fixed}"))
        parts.append(_html_list("Verdicts", verdicts.sentences(answer)))
        parts.append(_html_list("Warnings", answer.warnings))
        parts.append(_html_list("Notes", answer.notes))
        return "".join(parts)


FIGURES = ("mean", "spread", "n", "n_of", "ratio", "difference")


def _shown(row: Row, by: Sequence[str]) -> list[str]:
    figures = [figure(value, row.unit) for value in (row.mean, row.low, row.high)]
    return [
        *(str(row.at[axis]) for axis in by), *figures, f"{row.n} {row.n_of}", compare_screen.told_against(row), row.run_id
    ]  # fmt: skip


def _printed(show: Callable[[], None]) -> str:
    """What a command prints for this, its notes after it."""
    out, notes = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(notes):
        show()
    return out.getvalue() + notes.getvalue()


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    head = "".join(f"<th scope='col'>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    told = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{told}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _html_list(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<p><b>{title}</b></p><ul>{items}</ul>" if lines else ""


# ---------------------------------------------------------------- ask


def compare(
    *names: str,
    by: Words = (),
    metric: Words = (),
    where: Words = (),
    baseline: str | None = None,
    everything: bool = False,
    workspace: str | Path | None = None,
) -> Answer:
    """What `labctl compare` answers: of the latest request, unless names or ids are given, or `everything`.

    `by` are axes, `metric` metrics, `where` conditions such as "dtype=float16"; one word or several.
    """
    asked = Question.of(_words(by), _words(metric), _words(where), baseline)
    here = _workspace(workspace)
    with _store(here) as (store, _):
        run_ids = select_runs.chosen_runs(store, names, everything=everything, imported=True)[1]
        return Answer(question.asked(store, run_ids, asked, _prices(here, store) if asked.needs_prices else {}))


def _prices(here: Workspace, store: Store) -> dict[str, Price]:
    partitions = [partition for (partition,) in store.tuples("SELECT DISTINCT partition FROM runs")]
    return prices(settings.load(here), partitions)


def runs(*names: str, workspace: str | Path | None = None) -> Table:
    """A row a measured run, with the mean of every metric; of all runs, unless names or ids are given."""
    return _view("runs", names, workspace)


def repeats(*names: str, workspace: str | Path | None = None) -> Table:
    """A row a measured pass, with every metric."""
    return _view("repeats", names, workspace)


def requests(*names: str, workspace: str | Path | None = None) -> Table:
    """A row a request of a measured pass: its times, how it ended, its text."""
    return _view("requests", names, workspace)


def devices(*names: str, workspace: str | Path | None = None) -> Table:
    """A row a device of a measured pass: its memory, by kind."""
    return _view("devices", names, workspace)


def failures(*names: str, workspace: str | Path | None = None) -> Table:
    """A row a failed execution of a run: why, and what to do."""
    return _view("failures", names, workspace)


def jobs(*names: str, workspace: str | Path | None = None) -> Table:
    """A row a job: what it was to do, and where the time of its GPUs went."""
    return _view("jobs", names, workspace)


def _view(table: str, names: Sequence[str], workspace: str | Path | None) -> Table:
    here = _workspace(workspace)
    with _store(here) as (store, _):
        run_ids = select_runs.chosen_runs(store, names)[1] if names else None
    view = views.view_of(table)
    if run_ids is None:
        return _table(queries.query(here, f"SELECT * FROM {view.name}"))  # noqa: S608  a name of `tables`
    return _table(queries.query(here, f"SELECT * FROM {view.name} WHERE {view.chosen}", (json.dumps(run_ids),)))  # noqa: S608


def query(sql: str, parameters: Sequence[Any] = (), *, workspace: str | Path | None = None) -> Table:
    """The rows of one SELECT; a ? in it takes the next of the parameters. Raises WrongUseError for what would write."""
    here = _workspace(workspace)
    with _store(here):
        return _table(queries.query(here, sql, parameters))


def _table(answer: queries.Answer) -> Table:
    return Table(answer.columns, answer.rows)


def status(*names: str, everything: bool = False, workspace: str | Path | None = None) -> Table:
    """Where each run stands, and why: of the latest request, unless names or ids are given."""
    here = _workspace(workspace)
    with _store(here) as (store, silent):
        for problem in silent:
            warnings.warn(f"{problem}; states are the last known ones", stacklevel=2)
        found = states.statuses(here, store, select_runs.chosen_runs(store, names, everything=everything)[1])
    return _of_documents([run.to_json() for run in found])


def _of_documents(documents: Sequence[Mapping[str, Any]]) -> Table:
    columns = list(dict.fromkeys(key for document in documents for key in document))
    return Table(columns, [[document.get(column) for column in columns] for document in documents])


# ---------------------------------------------------------------- submit


def submit(file: str | None = None, *, wait: bool = False, again: bool = False, **keys: Any) -> Table:
    """What `labctl submit` does from the current folder: a row a run, with its state.

    `file` is a request file; the keys are those of one (docs/requests.md), and beat it: partition="dgxh", dtype=["float16",
    "bfloat16"]. Raises PreflightError for what would fail after hours in the queue, SlurmError where Slurm refuses.
    """
    from labctl_orchestrator.cli import labctl
    from labctl_orchestrator.cli import submit as command

    out = io.StringIO()
    parent = labctl.make_context("labctl", ["submit"])
    with (
        command.command.make_context("submit", [], parent=parent, resilient_parsing=True) as context,
        contextlib.redirect_stdout(out),
    ):
        given = {**context.params, **_flags(keys), "file": file, "wait": wait, "again": again, "as_json": True}
        code = context.invoke(command.command, **given)
    answer = json.loads(out.getvalue())
    found = answer.get("findings", [])
    if not answer["runs"] and code == PreflightError.exit_code:
        forbids = [finding for finding in found if finding["severity"] != "warn"]
        raise PreflightError("; ".join(f["what"] for f in forbids), "; ".join(f["remedy"] for f in forbids))
    return _of_documents(answer["runs"])


def _flags(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a request as the command's flags."""
    flags: dict[str, Any] = {}
    for key, value in keys.items():
        if key in ("cells", "exclude"):
            raise WrongUseError(f"{key} is for request files", "write one, and give its name")
        if key not in KEYS:
            raise WrongUseError(f"there is no key {key!r}", nearest(key, KEYS))
        if key == "engine_options":
            flags["engine_option"] = tuple(f"{name}={one}" for name, some in value.items() for one in _several(some))
        elif key == "sbatch":
            flags[key] = tuple(f"{name}={one}" for name, one in value.items())
        else:
            flags[key] = _several(value) if key in AXES else value
    return flags


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


# ---------------------------------------------------------------- where


def _workspace(given: str | Path | None) -> Workspace:
    if given is None:
        return workspaces.existing()
    here = Workspace(expand_home(str(given)).absolute())
    if not here.data.is_dir():
        raise WrongUseError(f"nothing was submitted from {here.root}", "give the folder that was submitted from")
    return here


@contextlib.contextmanager
def _store(here: Workspace) -> Iterator[tuple[Store, list[str]]]:
    """The workspace's database, with what is new in it; and what Slurm did not answer."""
    with closing(open_store(here)) as store:
        learnt = refresh.refresh(here, store)
        for damaged in learnt.collected.damaged:
            warnings.warn(f"not taken, damaged: {damaged}", stacklevel=4)
        yield store, learnt.problems


def _words(words: Words) -> Sequence[str]:
    return (words,) if isinstance(words, str) else words
