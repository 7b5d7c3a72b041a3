"""labctl exercise"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from labctl_orchestrator import exercises
from labctl_orchestrator.analysis import question, verdicts
from labctl_orchestrator.analysis.answers import answer_pairs, read_answers, summaries
from labctl_orchestrator.analysis.comparison import Comparison
from labctl_orchestrator.analysis.metrics import figure
from labctl_orchestrator.analysis.question import Question
from labctl_orchestrator.cli import options, submit
from labctl_orchestrator.cli.as_json import print_json
from labctl_orchestrator.exercises import EXERCISES, PARTITION, Exercise, growth
from labctl_orchestrator.exercises.growth import GrowthStep, MeasuredMemory
from labctl_orchestrator.request import settings
from labctl_orchestrator.store import select_runs, workspace
from labctl_orchestrator.store.database import Store, open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.submission import retry
from labctl_orchestrator.terminal import statuses, tables
from labctl_orchestrator.terminal.comparison import print_comparison, print_texts_compared
from labctl_orchestrator.tracking import run_status, status
from labctl_orchestrator.tracking.run_status import RunStatus
from labctl_slurm.errors import WrongUseError

TEXTS_AT_MOST = 6  # answers shown side by side
SUBMIT_OPTIONS = [parameter for parameter in submit.command.params if parameter.name not in ("file", "wait")]
# Options that do not change the runs of an exercise.
SAME_RUNS = {"again", "dry_run", "no_preflight", "force", "as_json", "name", "note"}


def _submit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command.__dict__.setdefault("__click_params__", []).extend(reversed(SUBMIT_OPTIONS))
    return command


@click.command("exercise")
@click.argument("number", required=False, metavar="[NUMBER]")
@click.option(
    "--wait/--no-wait",
    default=None,
    help="Return when every run has ended.  [default: wait only with -p local]",
)
@click.option("--print", "print_only", is_flag=True, help="Print the exercise's submission file; submit nothing.")
@_submit_options
def command(number: str | None, wait: bool | None, print_only: bool, as_json: bool, **given: Any) -> int:
    """Run one of six exercises, and print its answer.

    The exercises are those of the handout of an LLM lab (docs/exercises.md). Submits the runs and returns. Repeat the command
    after the jobs have ended: it prints the comparison and measures nothing new. With -p local it waits, then prints the
    comparison. Accepts every option of labctl submit. Without NUMBER: list the exercises.

    \b
    labctl exercise
    labctl exercise 1
    labctl exercise 3 -p local --model-id ~/models/smollm2
    labctl exercise 5 --gpus 1 --wait
    labctl exercise 3 --print > mine.toml && labctl submit mine.toml -p dgxh
    """
    if number is None and print_only:
        raise WrongUseError("--print needs the number of an exercise", "labctl exercise 1 --print")
    if number is None:
        _list(as_json)
        return 0
    exercise = exercises.exercise(number)
    if print_only:
        click.echo(exercise.file.read_text(encoding="utf-8"), nl=False)
        return 0
    name = str(given["name"] or exercise.name)
    here = workspace.find() or Workspace(Path.cwd())
    finish = functools.partial(_finish, exercise=exercise, name=name, wait=wait, as_json=as_json)
    changed = [key for key, value in given.items() if key not in SAME_RUNS and value not in (None, (), False)]
    if not (changed or given["again"] or given["dry_run"]) and here.data.is_dir():
        with closing(open_store(here)) as store:
            statuses.refresh(here, store)
            if run_ids := _runs_named(store, name):
                return finish(here, store, run_ids=run_ids, code=_resubmit(here, store, run_ids))
    prepared = options.prepared(
        str(exercise.file), _flags(exercise, given), again=given["again"], check=not given["no_preflight"]
    )
    if not (given["again"] or given["loads"] or given["dry_run"]) and here.data.is_dir():
        with closing(open_store(here)) as store:
            if _are_submitted(here, store, prepared.run_ids) and set(_runs_named(store, name)) == set(prepared.run_ids):
                return finish(here, store, run_ids=prepared.run_ids, code=0)
    refused = submit.report_findings(prepared, force=given["force"])
    if given["dry_run"]:
        submit.preview(prepared, as_json)
        return refused
    if refused:
        return submit.refuse(prepared, refused, as_json)
    with submit.open_new(prepared) as store:
        _, code = submit.launch(prepared, store)
        return finish(prepared.workspace, store, run_ids=prepared.run_ids, code=code)


# ---------------------------------------------------------------- submission


def _flags(exercise: Exercise, given: dict[str, Any]) -> dict[str, Any]:
    """The flags of `labctl submit` for the exercise's submission file."""
    flags = dict(given)
    if exercise.number == 4 and len(given["model_id"]) == 1:
        flags["model_id"] = (settings.read_toml(exercise.file)["model_id"][0], *given["model_id"])
    if given["partition"] and len(given["partition"]) < exercise.partitions:
        raise WrongUseError(
            f"too few partitions for exercise {exercise.number}, which compares {exercise.partitions}: {given['partition'][0]}",
            "give --partition for each one, or omit --partition to use dgx2 and dgxh",
        )
    if not given["partition"] and exercise.partitions == 1:
        defaults = settings.load(workspace.find() or Workspace(Path.cwd())).defaults
        flags["partition"] = () if any("partition" in values for _, values in defaults) else (PARTITION,)
    return flags


def _runs_named(store: Store, name: str) -> list[str]:
    """The runs of the latest submission with that name."""
    known = store.tuples("SELECT 1 FROM submissions WHERE name = ?", (name,))
    return select_runs.chosen_runs(store, [name])[1] if known else []


def _are_submitted(here: Workspace, store: Store, run_ids: Sequence[str]) -> bool:
    """Whether each of these runs is done, failed, queued or running. Only labctl retry resubmits failed runs."""
    statuses.refresh(here, store)
    known = {run_id for (run_id,) in store.tuples("SELECT run_id FROM runs")}
    return set(run_ids) <= known and not any(map(_never_ran, status.statuses(here, store, run_ids)))


def _never_ran(run: RunStatus) -> bool:
    return run.state in (run_status.MISSING, run_status.INTERRUPTED, run_status.REFUSED, run_status.CANCELLED)


def _resubmit(here: Workspace, store: Store, run_ids: Sequence[str]) -> int:
    """Resubmit the runs that never ran, with their last settings; returns the exit code."""
    left = [run for run in status.statuses(here, store, run_ids) if _never_ran(run)]
    launched, warnings = retry.submit(here, store, retry.retries(here, store, left))
    for warning in warnings:
        tables.note(f"warning: {warning}")
    return max(map(submit.report_refusals, launched), default=0)


def _are_local(found: Sequence[RunStatus]) -> bool:
    """Whether all these runs run on this machine."""
    known = settings.load(workspace.find())
    names = {run.partition for run in found}
    return all(name in known.names() and known.partition(name).executor == "local" for name in names)


# ---------------------------------------------------------------- show


def _list(as_json: bool) -> None:
    here = workspace.find()
    states = dict.fromkeys((one.number for one in EXERCISES), "not submitted")
    if here is not None and here.database.is_file():
        with closing(open_store(here)) as store:
            for one in EXERCISES:
                if run_ids := _runs_named(store, one.name):
                    states[one.number] = run_status.summary(status.statuses(here, store, run_ids))
    if as_json:
        print_json([
            {"exercise": one.number, "title": one.title, "question": one.question, "state": states[one.number],
             "request": str(one.file)}
            for one in EXERCISES
        ])  # fmt: skip
        return
    rows = [[str(one.number), one.title, states[one.number]] for one in EXERCISES]
    tables.table(("exercise", "comparison", "state"), rows)
    tables.note("start with: labctl exercise 1 (--dry-run shows its runs and scripts)")


def _finish(
    here: Workspace,
    store: Store,
    *,
    exercise: Exercise,
    name: str,
    run_ids: list[str],
    code: int,
    wait: bool | None,
    as_json: bool,
) -> int:
    """Print the comparison if all runs have ended, else the states of the runs; returns the exit code."""
    if code == 0 and (_are_local(status.statuses(here, store, run_ids)) if wait is None else wait):
        submit.wait_for(here, store, run_ids)
    statuses.refresh(here, store)
    found = status.statuses(here, store, run_ids)
    done = [run.run_id for run in found if run.state == run_status.DONE]
    answer = None
    if len(done) > 1 and not any(run.may_come for run in found):
        answer = _answer(here, store, exercise, done)
    if as_json:
        print_json(_json(exercise, found, answer))
    else:
        _print(here, store, exercise, name, found, answer, done)
    return max(code, int(any(run.state != run_status.DONE and not run.may_come for run in found)))


# The comparison; of exercise 3 also measured and predicted memory.
_Answer = tuple[Comparison, list[MeasuredMemory], list[GrowthStep]]


def _answer(here: Workspace, store: Store, exercise: Exercise, run_ids: Sequence[str]) -> _Answer:
    wanted = Question.of(exercise.by, exercise.metrics)
    cells = question.cells_of(store, run_ids, wanted)
    measured = tuple(name for name in exercise.metrics if any(values for cell in cells for values in cell.values[name]))
    comparison = question.answer(store, cells, replace(wanted, metrics=measured))
    if not exercise.memory:
        return comparison, [], []
    held, without = growth.measured_memory(here, store, run_ids)
    comparison.notes.extend(without)
    return comparison, held, growth.growth(held)


def _json(exercise: Exercise, found: Sequence[RunStatus], answer: _Answer | None) -> dict[str, Any]:
    comparison, held, steps = answer or (None, [], [])
    document: dict[str, Any] = {
        "exercise": exercise.number,
        "title": exercise.title,
        "question": exercise.question,
        "runs": [run.to_json() for run in found],
        "comparison": verdicts.to_json(comparison) if comparison else None,
        "reading": exercise.reading,
    }
    if exercise.memory:
        document |= {"memory": list(map(asdict, held)), "growth": list(map(asdict, steps))}
    return document


def _print(
    here: Workspace,
    store: Store,
    exercise: Exercise,
    name: str,
    found: Sequence[RunStatus],
    answer: _Answer | None,
    done: Sequence[str],
) -> None:
    tables.text(f"Exercise {exercise.number}: {exercise.title}")
    tables.text(exercise.question)
    click.echo()
    if any(run.state != run_status.DONE for run in found):
        statuses.print_statuses(list(found))
    if answer is not None:
        _print_answer(here, store, exercise, answer, done)
    elif len(done) == len(found):
        tables.note(f"a comparison needs two runs; labctl show {done[0]} prints the results of this one")
    elif any(run.may_come for run in found):
        named = ["--name", name] if name != exercise.name else []
        again = shlex.join(["labctl", "exercise", str(exercise.number), *named])
        tables.note(f"repeat {again} when the runs have ended; labctl status -w shows their progress")
    if any(run.state in run_status.UNSUCCESSFUL for run in found):
        tables.note(f"labctl logs RUN prints the log; labctl retry {shlex.quote(name)} resubmits the failed runs")


def _print_answer(here: Workspace, store: Store, exercise: Exercise, answer: _Answer, done: Sequence[str]) -> None:
    comparison, held, steps = answer
    print_comparison(comparison, None, with_texts=False)
    if held:
        _print_memory(held, steps)
    if exercise.texts and 2 <= len(done) <= TEXTS_AT_MOST:
        click.echo()
        answers = [read_answers(here, store, run_id) for run_id in done]
        pairs = [(other, answer_pairs(answers[0], other)) for other in answers[1:]]
        print_texts_compared(answers, summaries(answers), pairs)
    for line in exercise.paragraphs():
        if not line.startswith("- "):
            click.echo()
        tables.text(line)


def _print_memory(held: Sequence[MeasuredMemory], steps: Sequence[GrowthStep]) -> None:
    click.echo()
    prediction = ["predicted", "measured/predicted"]
    columns = ["max_new_tokens", "KV cache", *prediction, "peak", *prediction, "run"]
    rows = [
        [
            str(one.max_new_tokens),
            *_measured_and_predicted(one.kv_cache, one.kv_cache_predicted),
            *_measured_and_predicted(one.peak, one.peak_predicted),
            one.run_id,
        ]
        for one in held
    ]
    tables.table(
        columns, rows, right=columns[:-1], title="memory of the fullest GPU, measured and predicted by labctl fit"
    )
    click.echo()
    for step in steps:
        tables.text(
            f"from {step.shorter} to {step.longer} new tokens the KV cache grew by {figure(step.measured, 'B')}:"
            f" {step.measured / step.tokens:,.0f} bytes per token (predicted: {step.predicted / step.tokens:,.0f})"
        )


def _measured_and_predicted(measured: float | None, predicted: float | None) -> list[str]:
    ratio = "-" if measured is None or not predicted else f"{measured / predicted:.3f}"
    return [figure(measured, "B"), figure(predicted, "B"), ratio]
