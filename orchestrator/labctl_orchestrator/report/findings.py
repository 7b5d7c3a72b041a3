"""The content of a report, from the database and the records: settings, cells, comparison, latencies, answers, versions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import msgspec

from labctl_orchestrator.analysis import question
from labctl_orchestrator.analysis.answers import RunAnswers, read_answers
from labctl_orchestrator.analysis.cells import measured
from labctl_orchestrator.analysis.comparison import AxisValue, Cell, Comparison
from labctl_orchestrator.analysis.cost import prices_here
from labctl_orchestrator.analysis.facts import Setup
from labctl_orchestrator.analysis.goodput import levels_of
from labctl_orchestrator.analysis.metrics import ALL_METRICS
from labctl_orchestrator.analysis.question import Question
from labctl_orchestrator.report import predicted
from labctl_orchestrator.report.layout import Layout, asked_by, described, in_order, layout, load_of
from labctl_orchestrator.report.timelines import Timeline, timelines
from labctl_orchestrator.store import select_runs
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.views import JOBS_OF_RUNS
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking import run_status, status
from labctl_orchestrator.tracking.run_status import RunStatus
from labctl_slurm.errors import WrongUseError
from labctl_workers.measure import METRICS, percentile

# A larger page is slow in a browser.
MOST_RUNS = 5000
# Latencies of a request whose distribution a chart shows: (column of `samples`, title).
LATENCIES = (("e2e_s", "latency"), ("ttft_s", "ttft"), ("tpot_s", "tpot"))
QUANTILES = {"q0": 0.0, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q99": 0.99, "q100": 1.0}
MOST_TEXT_GROUPS, MOST_TEXTS, MOST_PROMPTS = 6, 4, 8
# Fields of a fingerprint that may explain a difference.
FACTS = ("effective_dtype", "attention", "driver", "cuda", "python")


@dataclass(frozen=True)
class ReportScope:
    """The subject of a report: names of runs (none: the latest submission) and the options as a person wrote them."""

    names: tuple[str, ...] = ()
    everything: bool = False
    by: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    baseline: str | None = None
    slo: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReportedSubmission:
    """One `labctl submit`: its time, the version of labctl, and the resolved settings."""

    name: str
    created_at: str
    labctl_version: str
    request: Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """A setup: facts by name, the number of its runs, first and last end (ISO 8601)."""

    facts: Mapping[str, str]
    runs: int
    first: str
    last: str


@dataclass(frozen=True)
class TextGroup:
    """Answers of cells that differ only in their series; the first is compared with each other one."""

    title: str
    sides: list[tuple[str, RunAnswers]]


@dataclass(frozen=True)
class Quantiles:
    """The quantiles of one of LATENCIES over the requests of a cell (its place): seconds by name of QUANTILES."""

    cell: int
    measure: str
    requests: int
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class SentRequest:
    """A request of a cell (its place): when it was sent or arrived, in seconds of its repeat, and its latencies in the order of
    LATENCIES."""

    cell: int
    repeat: int
    sent_s: float
    seconds: tuple[float | None, ...]


@dataclass(frozen=True)
class Pass:
    """One repeat of a cell (its place), with its metrics."""

    cell: int
    run_id: str
    attempt_id: str
    repeat: int
    figures: Mapping[str, float | None]


class JobTime(NamedTuple):
    """A job and the use of its GPU time, in GPU-seconds: a row of measured_jobs."""

    job_id: str
    slurm_id: str | None
    partition: str
    backend: str
    state: str | None
    starts: int
    runs_planned: int | None
    runs_done: int
    limit_gpu_s: float | None
    held_gpu_s: float | None
    load_gpu_s: float | None
    warmup_gpu_s: float | None
    measured_gpu_s: float | None
    rest_gpu_s: float | None

    @property
    def gpu_time(self) -> tuple[float | None, ...]:
        """Requested and held; then loading, warm-up, measured and the rest of the held time."""
        return self[8:]


@dataclass
class Findings:
    """The content of the page. `predicted_bytes` is fit's peak of the fullest GPU, by run id; `jobs` are the jobs with GPUs,
    sorted by the time that they held them."""

    title: str
    subject: ReportScope
    asked: list[ReportedSubmission]
    cells: list[Cell]
    missing: list[RunStatus]
    comparison: Comparison
    layout: Layout
    quantiles: list[Quantiles]
    sent: list[SentRequest]
    repeats: list[Pass]
    settings: list[Setting]
    texts: list[TextGroup]
    prompts: list[str]
    predicted_bytes: Mapping[str, float] = field(default_factory=dict)
    jobs: list[JobTime] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)


def gather(workspace: Workspace, store: Store, subject: ReportScope) -> Findings:
    """Gather the content. Raises WrongUseError for no run or too many, NotYetError or NoResultsError if no run has a result."""
    asked = Question.of(subject.by, subject.metrics, subject.conditions, subject.baseline)
    title, run_ids = select_runs.chosen_runs(store, subject.names, everything=subject.everything, imported=True)
    if not run_ids:
        raise WrongUseError("no submission in this workspace", "submit runs with labctl submit")
    asked = asked.with_levels(levels_of(workspace, store, run_ids, subject.slo))
    have = set(measured(store, run_ids))
    without = [run_id for run_id in run_ids if run_id not in have]
    missing = status.statuses(workspace, store, without) if without else []
    known_prices = prices_here(workspace, store) if asked.needs_prices else {}
    cells = question.cells_of(store, run_ids, replace(asked, metrics=tuple(ALL_METRICS)), known_prices)
    if not cells:
        raise run_status.no_results(title, missing)
    if len(cells) > MOST_RUNS:
        raise WrongUseError(
            f"{title}: {len(cells):,} runs, more than a page can show: {MOST_RUNS:,}",
            "select runs by name or with --where, or print all with labctl compare --csv",
        )
    by = asked.by or asked_by(cells)
    laid_out = layout(cells, by)
    chosen = list(dict.fromkeys(cell.run_id for cell in cells))
    # The place of the cell of each attempt.
    attempts = {(cell.run_id, load): place for place, cell in enumerate(cells) for load in cell.loads}
    return Findings(
        title=title,
        subject=subject,
        asked=_asked(store, chosen),
        cells=cells,
        missing=missing,
        comparison=question.answer(store, cells, replace(asked, by=by)),
        layout=laid_out,
        quantiles=_quantiles(store, attempts),
        sent=_sent(store, cells),
        repeats=_repeats(store, attempts),
        settings=_settings(store, attempts),
        texts=_texts(workspace, store, cells, laid_out),
        prompts=_prompts(store, chosen),
        predicted_bytes=predicted.peaks(workspace, store, cells),
        jobs=_jobs(store, [*chosen, *(run.run_id for run in missing)]),
        timelines=timelines(workspace, store, cells),
    )


# ---------------------------------------------------------------- rows of the store
#
# A JSON list of ids is one parameter, whatever its length.

OF_THESE = "run_id IN (SELECT value FROM json_each(?))"
OF_THESE_ATTEMPTS = (
    "(run_id, attempt_id) IN (SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(?))"
)
Attempts = dict[tuple[str, str], int]  # the place of a cell, by (run id, attempt id)


def _asked(store: Store, run_ids: Sequence[str]) -> list[ReportedSubmission]:
    """The submissions of these runs, oldest first: a smallest set that covers the runs, found greedily."""
    rows = {row["submission_id"]: row for row in store.rows("SELECT * FROM submissions")}
    covers = {
        submission_id: set(run_ids).intersection(runs)
        for submission_id, runs in select_runs.runs_by_submission(store).items()
    }
    chosen = []
    while best := max(covers, key=lambda submission_id: (len(covers[submission_id]), submission_id), default=None):
        covered = covers.pop(best)
        if not covered:
            break
        chosen.append(best)
        covers = {one: runs - covered for one, runs in covers.items()}
    return [
        ReportedSubmission(row["name"] or "", row["created_at"], row["labctl_version"], json.loads(row["request"]))
        for row in map(rows.__getitem__, sorted(chosen))
    ]


def _prompts(store: Store, run_ids: Sequence[str]) -> list[str]:
    sets = store.tuples(f"SELECT DISTINCT prompts FROM runs WHERE {OF_THESE}", [json.dumps(run_ids)])  # noqa: S608
    return list(dict.fromkeys(prompt for (prompts,) in sets for prompt in json.loads(prompts)))


def _repeats(store: Store, attempts: Attempts) -> list[Pass]:
    """The repeats of the cells, in their order."""
    columns = ", ".join(["run_id", "attempt_id", "repeat", *METRICS])
    rows = store.tuples(f"SELECT {columns} FROM repeats WHERE {OF_THESE_ATTEMPTS}", [json.dumps(list(attempts))])  # noqa: S608
    passes = [
        Pass(attempts[run_id, attempt_id], run_id, attempt_id, repeat, dict(zip(METRICS, figures, strict=True)))
        for run_id, attempt_id, repeat, *figures in rows
    ]
    return sorted(passes, key=lambda one: (one.cell, one.attempt_id, one.repeat))


def _jobs(store: Store, run_ids: Sequence[str]) -> list[JobTime]:
    """The jobs of these runs."""
    rows = store.tuples(
        f"SELECT {', '.join(JobTime._fields)} FROM measured_jobs WHERE {JOBS_OF_RUNS} AND gpus > 0"  # noqa: S608
        " ORDER BY held_gpu_s DESC NULLS LAST, limit_gpu_s DESC, job_id",
        [json.dumps(run_ids)],
    )
    return list(map(JobTime._make, rows))


def _quantiles(store: Store, attempts: Attempts) -> list[Quantiles]:
    """The quantiles of each of LATENCIES for each cell, over all its repeats."""
    names = [name for name, _ in LATENCIES]
    found: dict[int, list[list[float]]] = {}
    rows = store.tuples(
        f"SELECT run_id, attempt_id, {', '.join(names)} FROM samples WHERE {OF_THESE_ATTEMPTS}",  # noqa: S608
        [json.dumps(list(attempts))],
    )
    for run_id, attempt_id, *values in rows:
        of_cell = found.setdefault(attempts[run_id, attempt_id], [[] for _ in names])
        for seen, value in zip(of_cell, values, strict=True):
            if value is not None:
                seen.append(value)
    return [
        Quantiles(place, name, len(seen), {quantile: percentile(seen, share) for quantile, share in QUANTILES.items()})
        for place, of_cell in sorted(found.items())
        for name, seen in zip(names, of_cell, strict=True)
        if seen
    ]


# Fewer requests show no course over time; more runs and points make the page large.
FEWEST_SENT, MOST_SENT_RUNS, MOST_SENT = 20, 8, 400


def _sent(store: Store, cells: Sequence[Cell]) -> list[SentRequest]:
    """Requests of the latest engine load of up to MOST_SENT_RUNS served cells, in the order in which they were sent; of many
    requests, some at equal distances."""
    found: list[SentRequest] = []
    served = [place for place, cell in enumerate(cells) if cell.axes["served"]]
    columns = ", ".join(name for name, _ in LATENCIES)
    for place in served[:MOST_SENT_RUNS]:
        rows = store.tuples(
            f"SELECT repeat, handed_s, {columns} FROM samples WHERE run_id = ? AND attempt_id = ? AND ttft_s IS NOT NULL"  # noqa: S608
            " ORDER BY repeat, handed_s",
            (cells[place].run_id, cells[place].loads[-1]),
        )
        if len(rows) >= FEWEST_SENT:
            kept = rows[:: -(-len(rows) // MOST_SENT)]
            found += [SentRequest(place, repeat, sent_s, tuple(seconds)) for repeat, sent_s, *seconds in kept]
    return found


# ---------------------------------------------------------------- setups


def _settings(store: Store, attempts: Attempts) -> list[Setting]:
    """The distinct combinations of versions, hardware and effective settings, the most frequent first."""
    rows = store.tuples(
        f"SELECT run_id, fingerprint, ended_at FROM results WHERE {OF_THESE_ATTEMPTS}",  # noqa: S608
        [json.dumps(list(attempts))],
    )
    ends_of: dict[str, dict[str, list[str]]] = {}  # by setup and run
    for run_id, fingerprint, ended_at in rows:
        key = json.dumps(_facts(json.loads(fingerprint)))
        ends_of.setdefault(key, {}).setdefault(run_id, []).append(ended_at)
    found = []
    for key, by_run in ends_of.items():
        ends = [end for of_run in by_run.values() for end in of_run]
        found.append(Setting(json.loads(key), len(by_run), min(ends), max(ends)))
    return sorted(found, key=lambda setting: -setting.runs)


def _facts(fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """The facts of a fingerprint, in the order of the page."""
    gpus = fingerprint.get("gpus") or []
    names = [gpu["name"] for gpu in gpus]
    counted = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    facts = {"GPUs": ", ".join(counted) or "none"}
    facts |= {name: str(fingerprint[name]) for name in FACTS if fingerprint.get(name)}
    facts |= msgspec.convert(fingerprint, Setup).of_the_job()
    packages = fingerprint.get("packages", {})
    return facts | {name: packages[name] for name in sorted(packages, key=lambda name: (not is_an_engine(name), name))}


def is_an_engine(package: str) -> bool:
    """Whether the package is an engine; builds of vLLM have names such as vllm-rocm."""
    return package in ("torch", "transformers") or package.partition("-")[0] == "vllm"


# ---------------------------------------------------------------- texts


def _texts(workspace: Workspace, store: Store, cells: Sequence[Cell], laid_out: Layout) -> list[TextGroup]:
    """For each slice the answers of each series at its smallest load."""
    groups: dict[tuple[AxisValue, ...], dict[str, Cell]] = {}
    for cell in sorted(cells, key=lambda cell: load_of(cell, laid_out.load)):
        groups.setdefault(laid_out.slice_of(cell), {}).setdefault(laid_out.series_of(cell), cell)
    found = []
    for of_slice in list(groups.values())[:MOST_TEXT_GROUPS]:
        chosen = list(of_slice.items())[:MOST_TEXTS]
        sides = [(name, read_answers(workspace, store, cell.run_id)) for name, cell in chosen]
        found.append(TextGroup(described(chosen[0][1], laid_out.picked), sides))
    return found


def slices(findings: Findings) -> list[tuple[AxisValue, ...]]:
    """The slices, the one with the most cells first."""
    of_cells = [findings.layout.slice_of(cell) for cell in findings.cells]
    return sorted(dict.fromkeys(of_cells), key=lambda one: -of_cells.count(one))


def choices(findings: Findings) -> dict[str, list[AxisValue]]:
    """The values of each axis that a reader picks a value of."""
    return {axis: in_order([cell.axes[axis] for cell in findings.cells]) for axis in findings.layout.picked}
