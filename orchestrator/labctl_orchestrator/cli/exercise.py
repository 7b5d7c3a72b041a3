"""labctl exercise"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from labctl_orchestrator import exercises
from labctl_orchestrator.analysis import answers as texts
from labctl_orchestrator.analysis import question, verdicts
from labctl_orchestrator.analysis.comparison import Comparison
from labctl_orchestrator.analysis.metrics import figure
from labctl_orchestrator.analysis.question import Question
from labctl_orchestrator.cli import options, retry, submit
from labctl_orchestrator.cli.as_json import print_json
from labctl_orchestrator.exercises import EXERCISES, PARTITION, Exercise, growth
from labctl_orchestrator.exercises.growth import Growth, Held
from labctl_orchestrator.request import settings
from labctl_orchestrator.store import select_runs, workspace
from labctl_orchestrator.store.database import Store, open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.terminal import comparison as compare_screen
from labctl_orchestrator.terminal import statuses, tables
from labctl_orchestrator.tracking import run_status, status
from labctl_orchestrator.tracking.run_status import RunStatus
from labctl_slurm.errors import WrongUseError

# More answers than these are not read beside one another.
TEXTS_AT_MOST = 6
OWN = ("file", "wait")


def _request_flags() -> set[str]:
    """The flags that make a request, as `labctl submit` has them."""
    names = {parameter.name or "" for parameter in click.command()(options.request_options(lambda: None)).params}
    return names - {"file"}


def _with_submits_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Every option of `labctl submit`, whatever they are, but for how it waits."""
    for parameter in reversed(submit.command.params):
        if parameter.name not in OWN:
            command.__dict__.setdefault("__click_params__", []).append(parameter)
    return command


@click.command("exercise")
@click.argument("number", required=False, metavar="[NUMBER]")
@click.option(
    "--wait/--no-wait",
    default=None,
    help="Return when every run has ended.  [default: wait where it runs on this machine]",
)
@_with_submits_options
@click.pass_context
def command(context: click.Context, /, number: str | None, wait: bool | None, **given: Any) -> int:
    """Run one of the handout's five exercises, and answer it.

    Its request file is in the package; every option of labctl submit changes it. What was measured is not measured again: while
    jobs wait in the queue, the same command later gives the answer. Without a number: which exercises there are.

    \b
    labctl exercise
    labctl exercise 1
    labctl exercise 3 -p local --model-id ~/models/smollm2
    labctl exercise 5 --gpus 1 --wait
    """
    if number is None:
        _list(given["as_json"])
        return 0
    asked = _Asked.of(exercises.exercise(number), given)
    if given["dry_run"]:
        return int(context.invoke(submit.command, file=str(asked.exercise.request), wait=False, **asked.options) or 0)
    here, run_ids = asked.run_ids()
    found = _states(here, run_ids)
    code = 0
    as_before = bool(found) and not (given["again"] or given["loads"]) and _is_asked(here, asked.name, run_ids)
    if as_before and not asked.words:
        code = _submit_again(context, [run.run_id for run in found if _is_to_be_submitted(run)])
    elif not as_before or any(map(_is_to_be_submitted, found)):
        code, found = _submit(context, asked)
        here, run_ids = asked.workspace, [run.run_id for run in found]
        if not found:
            return code
    if code == 0 and (_is_here(found) if wait is None else wait):
        with contextlib.closing(open_store(here)) as store:
            submit.waited_for(here, store, run_ids)
    with contextlib.closing(open_store(here)) as store:
        return max(code, _tell(here, store, asked, run_ids))


# ---------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class _Asked:
    """An exercise with the options that were given: `words` are those that make it another request."""

    exercise: Exercise
    options: dict[str, Any]
    words: tuple[str, ...]

    @classmethod
    def of(cls, exercise: Exercise, given: dict[str, Any]) -> _Asked:
        makes_another = _request_flags() - {"name"}
        words = tuple(name for name in makes_another if given.get(name) not in (None, (), False))
        chosen = dict(given)
        if exercise.number == 4 and len(given["model_id"]) == 1:
            first = settings.read_toml(exercise.request)["model_id"][0]
            chosen["model_id"] = (first, *given["model_id"])
        if not given["partition"] and exercise.partitions == 1 and not _has_a_partition():
            chosen["partition"] = (PARTITION,)
        if given["partition"] and len(given["partition"]) < exercise.partitions:
            raise WrongUseError(
                f"exercise {exercise.number} compares {exercise.partitions} partitions",
                "give --partition once for each, or leave it out for dgx2 and dgxh",
            )
        return cls(exercise, chosen, words)

    @property
    def workspace(self) -> Workspace:
        return workspace.find() or Workspace(Path.cwd())

    @property
    def name(self) -> str:
        """The name of its request: the exercise's, unless another is given."""
        return str(self.options.get("name") or self.exercise.name)

    def run_ids(self) -> tuple[Workspace, list[str]]:
        """The runs that are meant. Without options: those of the last time it was asked here, whatever the options were then."""
        here = self.workspace
        if not self.words and not self.options["again"] and here.data.is_dir():
            with contextlib.closing(open_store(here)) as store:
                statuses.refresh(here, store)
                if store.tuples("SELECT 1 FROM requests WHERE name = ?", (self.name,)):
                    return here, select_runs.chosen_runs(store, [self.name])[1]
        request = {name: self.options[name] for name in _request_flags()}
        planned = options.asked(str(self.exercise.request), **request)
        return planned.workspace, [run.run_id for run in planned.plan.runs]


def _has_a_partition() -> bool:
    known = settings.load(workspace.find() or Workspace(Path.cwd()))
    return any("partition" in values for _, values in known.defaults)


def _states(here: Workspace, run_ids: Sequence[str]) -> list[RunStatus]:
    """Where these runs stand; empty where one of them is not known here."""
    if not here.data.is_dir():
        return []
    with contextlib.closing(open_store(here)) as store:
        statuses.refresh(here, store)
        known = {run_id for (run_id,) in store.tuples("SELECT run_id FROM runs")}
        return status.statuses(here, store, run_ids) if set(run_ids) <= known else []


def _is_asked(here: Workspace, name: str, run_ids: Sequence[str]) -> bool:
    """Whether these runs are the request of that name: those that another request brought here have no name to be found by."""
    with contextlib.closing(open_store(here)) as store:
        if not store.tuples("SELECT 1 FROM requests WHERE name = ?", (name,)):
            return False
        return set(select_runs.chosen_runs(store, [name])[1]) == set(run_ids)


def _is_to_be_submitted(run: RunStatus) -> bool:
    """What never ran. What failed is told, and submitted again when that is asked for."""
    return run.state in (run_status.MISSING, run_status.INTERRUPTED, run_status.REFUSED, run_status.CANCELLED)


def _submit_again(context: click.Context, run_ids: Sequence[str]) -> int:
    """Submit runs that never ran as they were asked for the last time; the exit code."""
    if not run_ids:
        return 0
    with contextlib.redirect_stdout(io.StringIO()):
        return int(context.invoke(retry.command, names=tuple(run_ids), as_json=True) or 0)


def _submit(context: click.Context, asked: _Asked) -> tuple[int, list[RunStatus]]:
    """Submit what is missing; (the exit code, where its runs stand)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):  # what labctl submit prints is told at the end, with the rest
        given = {**asked.options, "as_json": True}
        code = context.invoke(submit.command, file=str(asked.exercise.request), wait=False, **given)
    answer = json.loads(out.getvalue())
    if asked.options["as_json"] and not answer["runs"]:
        print_json(answer)  # what preflight found
    return int(code or 0), [RunStatus(**run) for run in answer["runs"]]


def _is_here(found: Sequence[RunStatus]) -> bool:
    """Whether all of it runs on this machine."""
    known = settings.load(workspace.find())
    names = {run.partition for run in found}
    return all(name in known.names() and known.partition(name).executor == "local" for name in names)


# ---------------------------------------------------------------- tell


def _list(as_json: bool) -> None:
    found = workspace.find()
    rows = [[str(one.number), one.title, _state_of(found, one)] for one in EXERCISES]
    if as_json:
        print_json([
            {"exercise": one.number, "title": one.title, "question": one.question, "state": row[2], "request": str(one.request)}
            for one, row in zip(EXERCISES, rows, strict=True)
        ])  # fmt: skip
        return
    tables.table(("exercise", "what is compared", "here"), rows)
    tables.note("labctl exercise 1 runs the first and answers it; --dry-run shows what it would submit")


def _state_of(here: Workspace | None, one: Exercise) -> str:
    if here is None or not here.database.is_file():
        return "not asked yet"
    with contextlib.closing(open_store(here)) as store:
        if not store.tuples("SELECT 1 FROM requests WHERE name = ?", (one.name,)):
            return "not asked yet"
        return run_status.summary(status.statuses(here, store, select_runs.chosen_runs(store, [one.name])[1]))


def _tell(here: Workspace, store: Store, asked: _Asked, run_ids: Sequence[str]) -> int:
    """The answer where there is one, else where its runs stand and how to come back; returns the exit code."""
    statuses.refresh(here, store)
    found = status.statuses(here, store, run_ids)
    done = [run.run_id for run in found if run.state == run_status.DONE]
    waiting = [run for run in found if run.may_come]
    answer = _answer(here, store, asked.exercise, done) if not waiting and len(done) > 1 else None
    if asked.options["as_json"]:
        print_json(_json(asked.exercise, found, answer))
    else:
        _print(here, store, asked, found, answer, done)
    return 1 if any(run.state != run_status.DONE and not run.may_come for run in found) else 0


@dataclass(frozen=True)
class _Answer:
    """The comparison, and of exercise 3 the memory beside its prediction."""

    comparison: Comparison
    held: list[Held]
    steps: list[Growth]


def _answer(here: Workspace, store: Store, exercise: Exercise, run_ids: Sequence[str]) -> _Answer:
    asked = Question.of(exercise.by, exercise.metrics)
    cells = question.cells_of(store, run_ids, asked)
    measured = tuple(name for name in exercise.metrics if any(values for cell in cells for values in cell.values[name]))
    comparison = question.answer(store, cells, replace(asked, metrics=measured))
    if not exercise.memory:
        return _Answer(comparison, [], [])
    held, without = growth.held(here, store, run_ids)
    comparison.notes.extend(without)
    return _Answer(comparison, held, growth.growth(held))


def _json(exercise: Exercise, found: Sequence[RunStatus], answer: _Answer | None) -> dict[str, Any]:
    told: dict[str, Any] = {
        "exercise": exercise.number,
        "title": exercise.title,
        "question": exercise.question,
        "runs": [run.to_json() for run in found],
        "comparison": verdicts.to_json(answer.comparison) if answer else None,
        "reading": exercise.reading,
    }
    if exercise.memory:
        told["memory"] = [one.to_json() for one in answer.held] if answer else []
        told["growth"] = [step.to_json() for step in answer.steps] if answer else []
    return told


def _print(
    here: Workspace,
    store: Store,
    asked: _Asked,
    found: Sequence[RunStatus],
    answer: _Answer | None,
    done: Sequence[str],
) -> None:
    exercise = asked.exercise
    tables.text(f"Exercise {exercise.number}: {exercise.title}")
    tables.text(exercise.question)
    click.echo()
    if any(run.state != run_status.DONE for run in found):
        statuses.print_statuses(list(found))
    if answer is not None:
        _print_answer(here, store, exercise, answer, done)
    elif len(done) == len(found):
        tables.note(f"one run is no comparison: labctl show {done[0]} has what was measured")
    elif any(run.may_come for run in found):
        named = ["--name", asked.name] if asked.name != exercise.name else []
        again = shlex.join(["labctl", "exercise", str(exercise.number), *named])
        tables.note(f"{again} gives the answer when they are done; labctl status -w shows how far they are")
    if any(run.state in run_status.UNSUCCESSFUL for run in found):
        tables.note(f"labctl logs RUN has their last words; labctl retry {shlex.quote(asked.name)} submits them again")


def _print_answer(here: Workspace, store: Store, exercise: Exercise, answer: _Answer, done: Sequence[str]) -> None:
    compare_screen.print_comparison(answer.comparison, None, with_texts=False)
    if answer.held:
        _print_memory(answer)
    if exercise.texts and 2 <= len(done) <= TEXTS_AT_MOST:
        click.echo()
        answers = [texts.answers(here, store, run_id) for run_id in done]
        pairs = [(other, texts.pairs(answers[0], other)) for other in answers[1:]]
        compare_screen.print_texts_compared(answers, texts.summaries(answers), pairs)
    for line in exercise.paragraphs():
        if not line.startswith("- "):
            click.echo()
        tables.text(line)


def _print_memory(answer: _Answer) -> None:
    click.echo()
    of_each = ["predicted", "measured/predicted"]
    columns = ["max_new_tokens", "KV cache", *of_each, "peak", *of_each, "run"]
    rows = [_memory_row(one) for one in answer.held]
    tables.table(columns, rows, right=columns[:-1], title="memory of the fullest GPU, beside what labctl fit predicts")
    click.echo()
    for step in answer.steps:
        tables.text(
            f"from {step.shorter} to {step.longer} new tokens the keys and values grew by {figure(step.measured, 'B')}:"
            f" {step.measured / step.tokens:,.0f} bytes a token; predicted were {step.predicted / step.tokens:,.0f}"
        )


def _memory_row(one: Held) -> list[str]:
    kv_cache = [
        figure(one.kv_cache, "B"),
        figure(one.kv_cache_predicted, "B"),
        _share(one.kv_cache, one.kv_cache_predicted),
    ]
    peak = [figure(one.peak, "B"), figure(one.peak_predicted, "B"), _share(one.peak, one.peak_predicted)]
    return [str(one.max_new_tokens), *kv_cache, *peak, one.run_id]


def _share(measured: float | None, predicted: float | None) -> str:
    return "-" if measured is None or not predicted else f"{measured / predicted:.3f}"
