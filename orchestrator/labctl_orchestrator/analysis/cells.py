"""Rows of the database -> cells to compare."""

from __future__ import annotations

import collections
import functools
import itertools
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from labctl_orchestrator.analysis import accuracy, doubts, goodput, perplexity
from labctl_orchestrator.analysis.comparison import AXES, NAME, Axes, AxisValue, Cell
from labctl_orchestrator.analysis.facts import VARIABLE, Setup, changes_of, facts_in
from labctl_orchestrator.analysis.load_spread import key_of
from labctl_orchestrator.analysis.metrics import (
    ALL_METRICS,
    DERIVED_FROM,
    OF_A_LOAD,
    OF_A_TEXT,
    OF_LEVELS,
    OF_TASKS,
    RATE,
)
from labctl_orchestrator.request.service_levels import ServiceLevel
from labctl_orchestrator.store.database import Store, of_runs
from labctl_orchestrator.store.record_rows import SHOWN_PACKAGES
from labctl_orchestrator.store.views import HELD_S, JOB_GPUS
from labctl_orchestrator.store.window import Window
from labctl_workers.environment import engine_variables
from labctl_workers.measure import METRICS
from labctl_workers.record import ScriptSettings

if TYPE_CHECKING:
    from labctl_orchestrator.analysis.cost import Price


def measured(store: Store, run_ids: Sequence[str]) -> list[str]:
    """The runs with a result, in the order given."""
    these, parameters = of_runs(run_ids)
    sql = f"SELECT DISTINCT run_id FROM results WHERE {these} AND +status = 'done'"  # noqa: S608
    done = {run_id for (run_id,) in store.tuples(sql, parameters)}
    return [run_id for run_id in run_ids if run_id in done]


def engine_loads(store: Store, run_ids: Sequence[str]) -> dict[str, int]:
    """The number of engine loads of each run that `read_cells` takes together: those with the setup of the latest."""
    wanted = set(run_ids)
    facts: dict[str, list[str | None]] = {}
    for run_id, of_load in store.tuples(
        "SELECT run_id, facts FROM results WHERE status = 'done' ORDER BY ended_at, attempt_id"
    ):
        if run_id in wanted:
            facts.setdefault(run_id, []).append(of_load)
    return {run_id: of_run.count(of_run[-1]) for run_id, of_run in facts.items()}


def measured_before(
    store: Store, run_ids: Sequence[str], scripts: Mapping[str, ScriptSettings] | None = None
) -> list[str]:
    """Day and versions of the results of these runs: a line per combination.

    `scripts` are the runs' scripts as labctl renders them now. With them: a line for each difference between the latest result's
    script and variables and those of now.
    """
    measured_with: dict[str, int] = {}
    latest: dict[str, Setup] = {}
    wanted = set(run_ids)
    for row in store.rows("SELECT run_id, ended_at, fingerprint FROM results WHERE status = 'done' ORDER BY ended_at"):
        if row["run_id"] in wanted:
            setup = latest[row["run_id"]] = msgspec.json.decode(row["fingerprint"], type=Setup)
            versions = ", ".join(f"{name} {setup.packages[name]}" for name in SHOWN_PACKAGES if name in setup.packages)
            line = f"on {row['ended_at'][:10]}, with {versions or 'unknown versions'}"
            measured_with[line] = measured_with.get(line, 0) + 1
    lines = [f"{count} measured {line}" for line, count in measured_with.items()]
    changed: dict[str, int] = {}
    for run_id, setup in latest.items() if scripts else ():
        if changes := _changes_since(setup, (scripts or {})[run_id]):
            changed[changes] = changed.get(changes, 0) + 1
    return lines + [f"{count} measured with other settings: {changes}" for changes, count in changed.items()]


def _changes_since(before: Setup, script: ScriptSettings) -> str:
    """The differences between the script and variables of a result and those of now. A variable of the record that this shell
    lacks is none: the node may set it."""
    if before.script is None or before.environment is None:
        return ""
    kept = {name: value for name, value in before.environment.items() if name not in before.script.env}
    environment = {**kept, **engine_variables({**os.environ, **script.env}, script.env)}
    then = Setup(script=before.script, environment=before.environment).of_the_job()
    now = Setup(script=script, environment=environment).of_the_job()
    known = {name for name in {**then, **now} if name.startswith(VARIABLE)} | (then.keys() & now.keys())
    return "; ".join(
        changes_of(*({name: value for name, value in facts.items() if name in known} for facts in (then, now)))
    )


class _MeasuredAttempt(NamedTuple):
    """A result of a run. Only metrics of a load or a job need the job's columns. Times are ISO 8601."""

    run_id: str
    attempt_id: str
    ended_at: str
    facts: str | None
    tokens_generated: str | None
    finish_reasons: str | None
    text: str | None
    prompt_tokens: int | None  # of the longest prompt
    empty_answers: int
    answers_without_tokens: int
    node: str | None
    window: str | None
    invalid: str | None
    shortest_pass_s: float | None
    result_id: int
    load_s: float | None
    init_s: float | None
    warmup_s: float | None
    queued_at: str | None
    job_started_at: str | None
    job_gpus: int | None
    job_held_s: float | None
    name: str

    @property
    def queue_s(self) -> float | None:
        """The job's wait in the queue."""
        if self.queued_at is None or self.job_started_at is None:
            return None
        return (datetime.fromisoformat(self.job_started_at) - datetime.fromisoformat(self.queued_at)).total_seconds()

    @property
    def gpu_s(self) -> float | None:
        """GPUs x time that all starts of the job held."""
        return None if self.job_held_s is None or self.job_gpus is None else self.job_held_s * self.job_gpus


# Its id, its axes, its partition's defaults, and the content of its model.
_Run = tuple[str, Axes, Mapping[str, AxisValue], str]
_Attempts = list[_MeasuredAttempt]
_Repeats = list[Sequence[float | None]]  # of an attempt: the row of each repeat
_Known = TypeVar("_Known")


def read_cells(
    store: Store,
    run_ids: Sequence[str],
    metrics: Sequence[str] = tuple(ALL_METRICS),
    *,
    prices: Mapping[str, Price] | None = None,
    by_name: bool = False,
    with_texts: bool = True,
    levels: Sequence[ServiceLevel] = (),
) -> list[Cell]:
    """A cell for each run that has a result, in the order given, with the values of these metrics. `prices` are by partition.

    Its engine loads are the latest attempt and the earlier ones with the same versions, hardware, environment and prompts. The
    cell's remarks name the others. `by_name`: a cell for each submission that measured a run, with its name as an axis.
    `with_texts`: read the first answers too. A few queries for any number of runs; none reads `samples`, except for
    goodput, with service `levels`.
    """
    attempts = _attempts(store, run_ids, metrics, by_name=by_name, with_texts=with_texts)
    runs = _runs(store, run_ids, attempts)
    values = _Values(store, runs, metrics, levels)
    made = []
    for run in runs:
        # Each run's attempts are freed when its cell is made: of 100,000 runs, both would take a lot of memory.
        for alike, others in _like_the_latest(attempts.pop(run[0]), by_name=by_name):
            cell = _cell(run, alike, values, prices or {})
            if others:
                cell.remarks = _left_out(others, alike[-1])
            if by_name:
                cell.axes = {**cell.axes, NAME: alike[-1].name}
            made.append(cell)
    return made


def load_history(
    store: Store,
    compared: Sequence[Cell],
    metrics: Sequence[str],
    *,
    with_these: bool = False,
    levels: Sequence[ServiceLevel] = (),
) -> list[Cell]:
    """The runs with several engine loads on the backends and partitions of these cells, with or without the cells' own runs."""
    known = set() if with_these else {cell.run_id for cell in compared}
    whose = {key_of(cell) for cell in compared}
    found = [
        run_id for run_id, *of in store.tuples(RUNS_WITH_SEVERAL_LOADS) if run_id not in known and tuple(of) in whose
    ]
    if not found:
        return []
    return [one for one in read_cells(store, found, metrics, levels=levels) if len(one.loads) > 1]


RUNS_WITH_SEVERAL_LOADS = (
    "SELECT run_id, origin, partition, backend FROM runs WHERE run_id IN"
    " (SELECT run_id FROM results WHERE +status = 'done' GROUP BY run_id HAVING count(*) > 1)"
)


def history(
    store: Store,
    run_ids: Sequence[str],
    metrics: Sequence[str],
    *,
    prices: Mapping[str, Price] | None = None,
    levels: Sequence[ServiceLevel] = (),
) -> list[tuple[str, list[tuple[str, Cell]]]]:
    """Each measured run with a cell per attempt, oldest first: (run id, [(end, cell), ...])."""
    attempts = _attempts(store, run_ids, metrics, by_name=False, with_texts=True)
    runs = _runs(store, run_ids, attempts)
    values, known = _Values(store, runs, metrics, levels), prices or {}
    return [
        (run[0], [(attempt.ended_at, _cell(run, [attempt], values, known)) for attempt in attempts[run[0]]])
        for run in runs
    ]


def _attempts(
    store: Store, run_ids: Sequence[str], metrics: Sequence[str], *, by_name: bool, with_texts: bool
) -> dict[str, _Attempts]:
    """The results of each run, oldest first."""
    wanted = set(run_ids)
    with_job = by_name or any(name in OF_A_LOAD for name in metrics)
    found: dict[str, _Attempts] = {}
    these, parameters = of_runs(run_ids)
    # With a + SQLite uses the index by run, without it the one that has all columns in order.
    status = "+status" if parameters else "status"
    where = f"results.{these}" if parameters else these
    sql = (RESULTS_WITH_JOB if with_job else RESULTS).format(*(TEXT if with_texts else NO_TEXT), where, status)
    for attempt in map(_MeasuredAttempt._make, store.each(sql, parameters)):
        run_id = attempt[0]
        if run_id in found:
            found[run_id].append(attempt)
        elif run_id in wanted:
            found[run_id] = [attempt]
    return found


def _runs(store: Store, run_ids: Sequence[str], attempts: Mapping[str, _Attempts]) -> list[_Run]:
    """The runs with attempts, in the order given, each with its axes."""
    these, parameters = of_runs(run_ids)
    first = store.tuples(f"SELECT {', '.join(_COLUMNS.values())} FROM runs WHERE {these} LIMIT 1", parameters)  # noqa: S608
    if not first:
        return []
    # Most axes of many runs have one value. It is read once.
    others = ", ".join(f"max({column} IS NOT ?)" for column in _COLUMNS.values())
    (differ,) = store.tuples(f"SELECT {others} FROM runs WHERE {these}", [*first[0], *parameters])  # noqa: S608
    common = dict(zip(_COLUMNS, first[0], strict=True))
    names = [name for name, differs in zip(_COLUMNS, differ, strict=True) if differs]
    columns = ", ".join(["run_id", *(_COLUMNS[name] for name in names)])
    found: dict[str, _Run] = {}
    models: set[tuple[str, str]] = set()
    for run_id, *row in store.each(f"SELECT {columns} FROM runs WHERE {these}", parameters):  # noqa: S608
        if run_id in attempts:
            axes = common.copy()
            # Equal texts are one object, which is faster to compare and to hash.
            axes.update(zip(names, [sys.intern(value) if type(value) is str else value for value in row], strict=True))
            content, defaults = axes.pop("model_content"), _defaults(axes.pop("defaults"))
            found[run_id] = run_id, axes, defaults, content
            models.add((axes["model"], content))
    labels = _labels(models)
    for _, axes, _, content in found.values() if labels else ():
        axes["model"] = labels[str(axes["model"]), content]
    return [found[run_id] for run_id in run_ids if run_id in found]


@functools.lru_cache(maxsize=1024)
def _defaults(text: str) -> Mapping[str, AxisValue]:
    defaults: Mapping[str, AxisValue] = json.loads(text)
    return defaults


def _like_the_latest(attempts: _Attempts, *, by_name: bool) -> list[tuple[_Attempts, _Attempts]]:
    """(the attempts with the setup of the latest, the others), one pair; `by_name`: one pair per name."""
    if len(attempts) == 1:
        return [(attempts, [])]
    groups: dict[str, _Attempts] = {}
    for attempt in attempts:
        groups.setdefault(attempt.name if by_name else "", []).append(attempt)
    return [_parted(group) for group in groups.values()]


def _parted(group: _Attempts) -> tuple[_Attempts, _Attempts]:
    """Invalid attempts count only where the setup of the latest has no valid one."""
    alike = [one for one in group if one.facts == group[-1].facts]
    if any(one.invalid for one in alike) and not all(one.invalid for one in alike):
        alike = [one for one in alike if not one.invalid]
    kept = set(map(id, alike))
    return alike, [one for one in group if id(one) not in kept]


def _left_out(others: _Attempts, latest: _MeasuredAttempt) -> tuple[str, ...]:
    """A remark for each earlier setup: its engine loads, their days, and the differences from the latest setup."""
    by_setup: dict[tuple[str, str], _Attempts] = {}
    for attempt in others:
        invalid = (attempt.invalid or "") if attempt.facts == latest.facts else ""
        by_setup.setdefault((attempt.facts or "{}", invalid), []).append(attempt)
    return tuple(
        f"had {len(loads)} {'' if invalid else 'earlier '}engine {'loads' if len(loads) > 1 else 'load'} left out"
        f" ({' and '.join(dict.fromkeys(load.ended_at[:10] for load in loads[:: max(1, len(loads) - 1)]))}):"
        f" {invalid or '; '.join(_changes(setup, latest.facts or '{}'))}"
        for (setup, invalid), loads in by_setup.items()
    )


@functools.lru_cache(maxsize=1024)
def _changes(before: str, now: str) -> tuple[str, ...]:
    """ "torch 2.9.0 -> 2.10.0" for each different fact."""
    return changes_of(facts_in(before), facts_in(now)) or ("the reason of its mode",)


# Built from this module's own names alone.
_COLUMNS = {name: name for name in (*AXES, "model_content", "defaults")}
_COLUMNS["engine_options"] = "coalesce(nullif(engine_options, ''), '{}')"
_RESULTS = (
    "SELECT run_id, attempt_id, results.ended_at, facts, tokens_generated, finish_reasons, {{}},"
    " prompt_tokens, empty_answers, answers_without_tokens,"
    " results.node, window, invalid, shortest_pass_s, result_id, {} FROM results{{}}{} WHERE {{}} AND {{}} = 'done'"
    " ORDER BY results.ended_at, attempt_id"
)
TEXT, NO_TEXT = ("text", " LEFT JOIN texts USING (text_id)"), ("NULL", "")
RESULTS = _RESULTS.format("NULL, NULL, NULL, NULL, NULL, NULL, NULL, ''", "")
RESULTS_WITH_JOB = _RESULTS.format(
    f"load_s, init_s, warmup_s, jobs.queued_at, jobs.started_at, {JOB_GPUS}, {HELD_S},"
    " coalesce(submissions.name, submissions.submission_id, '')",
    " LEFT JOIN runs USING (run_id) LEFT JOIN jobs USING (job_id) LEFT JOIN arrays USING (array_id)"
    " LEFT JOIN submissions USING (submission_id)",
)


class _Values:
    """The stored values of some metrics by run and attempt; of served runs also those that show doubts about serving."""

    def __init__(
        self, store: Store, runs: Sequence[_Run], metrics: Sequence[str], levels: Sequence[ServiceLevel]
    ) -> None:
        serving = doubts.Serving._fields if any(axes["served"] for _, axes, *_ in runs) else ()
        stored = dict.fromkeys([RATE, *(DERIVED_FROM.get(name, name) for name in metrics), *serving])
        names = [name for name in stored if name in METRICS]
        self._place = {name: place for place, name in enumerate(names, start=1)}  # after the result's id
        self.stored = [name for name in metrics if name in METRICS]
        self.computed = [name for name in metrics if name not in METRICS]
        run_ids = [run_id for run_id, *_ in runs]
        of_levels = any(name in OF_LEVELS for name in metrics)
        self.good = goodput.of_runs_and_attempts(store, run_ids, levels) if of_levels else {}
        self.documents = perplexity.documents_of(store, run_ids) if any(name in OF_A_TEXT for name in metrics) else {}
        self.questions = accuracy.questions_of(store, run_ids) if any(name in OF_TASKS for name in metrics) else {}
        these, parameters = of_runs(run_ids)
        sql = f"SELECT {', '.join(['result_id', *names])} FROM repeats WHERE {these} ORDER BY rowid"  # noqa: S608
        self._repeats: collections.defaultdict[int, _Repeats] = collections.defaultdict(list)
        for row in store.each(sql, parameters):
            self._repeats[row[0]].append(row)

    def repeats_of(self, attempts: _Attempts) -> list[_Repeats]:
        """The repeats of each attempt, in the record's order."""
        return [self._repeats.get(attempt.result_id, []) for attempt in attempts]

    def of(self, metric: str, by_attempt: Sequence[_Repeats]) -> list[list[float]]:
        """The values of a metric, a list for each attempt."""
        place = self._place[metric]
        return [[value for of_repeat in repeats if (value := of_repeat[place]) is not None] for repeats in by_attempt]

    def serving_of(self, by_attempt: Sequence[_Repeats]) -> doubts.Serving:
        """The largest values over these repeats."""
        columns = [itertools.chain(*self.of(name, by_attempt)) for name in doubts.Serving._fields]
        return doubts.Serving(*(max(column, default=None) for column in columns))


def tell_models_apart(runs: Sequence[dict[str, Any]]) -> None:
    """Add digits of the content to the name of models that share it: step-100/model and step-200/model, or two revisions."""
    labels = _labels([(run["model"], run["model_content"]) for run in runs])
    for run in runs if labels else ():
        run["model"] = labels[run["model"], run["model_content"]]


def _labels(models: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The label of each (name, content); empty if each name has one content."""
    contents: dict[str, set[str]] = {}
    distinct = set(models)
    for name, content in distinct:
        contents.setdefault(name, set()).add(content)
    if all(len(several) == 1 for several in contents.values()):
        return {}
    labels = {}
    for name, content in distinct:
        several = contents[name]
        short = len({one[:8] for one in several}) == len(several)
        labels[name, content] = name if len(several) == 1 else f"{name}@{content[:8] if short else content}"
    return labels


def _cell(
    run: _Run,
    attempts: _Attempts,
    values: _Values,
    prices: Mapping[str, Price],
) -> Cell:
    """The cell of a run: text and facts of the last attempt, values of all."""
    run_id, axes, defaults, _ = run
    latest = attempts[-1]
    price = prices.get(str(axes["partition"])) if prices else None
    repeats = values.repeats_of(attempts)
    by_metric = {name: values.of(name, repeats) for name in values.stored}
    for name in values.computed:
        by_metric[name] = _computed(name, attempts, repeats, values, axes, price)
    if len(attempts) == 1:  # as of most runs
        tokens, reasons = latest.tokens_generated or "", latest.finish_reasons or ""
        shortest_s, prompt_tokens = latest.shortest_pass_s, latest.prompt_tokens
        empty, without_tokens = latest.empty_answers, latest.answers_without_tokens
        loads: tuple[str, ...] = (latest.attempt_id,)
        nodes: tuple[str, ...] = (latest.node,) if latest.node else ()
    else:
        tokens = _all_of([attempt.tokens_generated for attempt in attempts])
        reasons = _all_of([attempt.finish_reasons for attempt in attempts])
        shortest_s = min((one.shortest_pass_s for one in attempts if one.shortest_pass_s is not None), default=None)
        prompt_tokens = max((one.prompt_tokens for one in attempts if one.prompt_tokens is not None), default=None)
        empty = sum(one.empty_answers for one in attempts)
        without_tokens = sum(one.answers_without_tokens for one in attempts)
        loads = tuple(one.attempt_id for one in attempts)
        nodes = tuple(dict.fromkeys(one.node for one in attempts if one.node))
    texts = _of_each(values.documents, attempts) if values.documents else []
    answered = _of_each(values.questions, attempts) if values.questions else []
    facts = _facts(latest.facts or "{}", tokens, reasons)
    of_windows, growth, sm_mhz = _of_windows(*[attempt.window for attempt in attempts])
    found = [
        *of_windows,
        *doubts.of_rates(by_metric[RATE] if RATE in by_metric else values.of(RATE, repeats)),
        *doubts.of_run(shortest_s, prompt_tokens, empty, without_tokens, reasons),
    ]
    if axes["served"] or growth is not None:
        serving = values.serving_of(repeats) if axes["served"] else doubts.Serving(queue_growth=growth)
        found += doubts.of_serving(serving)
    if axes["served"]:
        found += doubts.of_cache(str(axes["backend"]), served=True, prompt_tokens=prompt_tokens)
    currency = price.currency if price else ""
    return Cell(
        run_id, axes, by_metric, facts, latest.text or "", (), loads, currency, defaults, tuple(found), nodes, sm_mhz,
        perplexity.mean_of_loads([text for text in texts if text is not None]) if texts else None,
        accuracy.mean_of_loads([questions for questions in answered if questions is not None]) if answered else None,
    )  # fmt: skip


def _computed(
    name: str,
    attempts: _Attempts,
    by_attempt: Sequence[_Repeats],
    values: _Values,
    axes: Axes,
    price: Price | None,
) -> list[list[float]]:
    """The values of a metric that the database does not store, a list for each attempt."""
    if name in OF_A_LOAD:
        return [_of_the_load(name, attempt, price) for attempt in attempts]
    if name in DERIVED_FROM:
        return [_derived(name, stored, axes, price) for stored in values.of(DERIVED_FROM[name], by_attempt)]
    if name in OF_A_TEXT:
        texts = _of_each(values.documents, attempts)
        return [[] if text is None else perplexity.values_of(name, text) for text in texts]
    if name in OF_TASKS:
        answered = _of_each(values.questions, attempts)
        return [[] if questions is None else [accuracy.accuracy(questions)] for questions in answered]
    return [good[name] if good else [] for good in _of_each(values.good, attempts)]


def _of_each(known: Mapping[tuple[str, str], _Known], attempts: _Attempts) -> list[_Known | None]:
    """What is known of each attempt, by the ids of its run and its own."""
    return [known.get((attempt.run_id, attempt.attempt_id)) for attempt in attempts]


@functools.lru_cache(maxsize=1024)
def _of_windows(*texts: str | None) -> tuple[tuple[doubts.Doubt, ...], float | None, float | None]:
    """(the doubts, the largest growth of a queue, the mean SM clock) of the windows of a run's attempts."""
    windows = [msgspec.json.decode(text or "{}", type=Window) for text in texts]
    growth = max((window.queue_growth for window in windows if window.queue_growth is not None), default=None)
    clocks = [window.sm_mhz for window in windows if window.sm_mhz is not None]
    return tuple(doubts.of_windows(windows)), growth, sum(clocks) / len(clocks) if clocks else None


def _all_of(values: Sequence[str | None]) -> str:
    """ "17/24": the distinct values of the attempts."""
    parts = {part for of_attempt in values for part in (of_attempt or "").split("/")}
    return "/".join(sorted(parts, key=lambda part: (not part.isdigit(), int(part) if part.isdigit() else 0, part)))


def _derived(name: str, stored: Sequence[float], axes: Axes, price: Price | None) -> list[float]:
    """The values of a metric that is computed from a stored one; none without a price or a GPU."""
    if name == "tokens_per_j":
        return [1 / value for value in stored if value]
    gpus = int(axes["gpus"] or 0)
    if name == "output_tok_s_per_gpu":
        return [value / gpus for value in stored if gpus]
    if price is None or not gpus:
        return []
    return [price.per_million_tokens(value, gpus) for value in stored if value]


def _of_the_load(name: str, attempt: _MeasuredAttempt, price: Price | None) -> list[float]:
    """The value of the load, or of its job, which its runs share. Empty until Slurm reports the job's times."""
    value: float | None = getattr(attempt, "gpu_s" if name == "job_cost" else name)
    if name == "job_cost":
        value = price.of_gpu_seconds(value) if price and value else None
    return [] if value is None else [value]


@functools.lru_cache(maxsize=1024)
def _facts(text: str, tokens_generated: str, finish_reasons: str) -> dict[str, str]:
    """A cell's facts. Runs of a sweep share one dictionary."""
    return {**facts_in(text), "tokens generated": tokens_generated, "finish reason": finish_reasons}
