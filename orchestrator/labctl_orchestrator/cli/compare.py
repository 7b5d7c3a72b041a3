"""labctl compare"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from labctl_orchestrator.analysis import question, verdicts
from labctl_orchestrator.analysis.cells import measured
from labctl_orchestrator.analysis.goodput import levels_of
from labctl_orchestrator.analysis.metrics import COST_METRICS, MONEY
from labctl_orchestrator.analysis.question import Question
from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.cli.comparison_options import comparison_options
from labctl_orchestrator.request.request import percent
from labctl_orchestrator.store import select_runs, workspace
from labctl_orchestrator.store.database import Store, open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.terminal import comparison, statuses, tables
from labctl_orchestrator.tracking import run_status, status
from labctl_orchestrator.tracking.run_status import RunStatus
from labctl_slurm.errors import WrongUseError

if TYPE_CHECKING:
    from labctl_orchestrator.analysis.cost import Price

# Prices, answers and trends are imported when they are needed: each import takes 20 ms.


@click.command("compare")
@comparison_options
@click.option("--details", is_flag=True, help="Print all metrics, verdicts, answers, warnings and notes.")
@click.option("--cost", "of_cost", is_flag=True, help="Also compare cost, energy, GPU time and wait in the queue.")
@click.option(
    "--over",
    type=click.Choice(["time"]),
    metavar="time",
    help="Compare each run with its earlier attempts; print the versions that changed.",
)
@click.option(
    "--fail-on-regression",
    metavar="PERCENT",
    help="Exit code 1 if a run is worse by more than PERCENT, and the difference is significant.",
)
@click.option(
    "--text", "as_text", is_flag=True, help="Print answers side by side, with the first different token marked."
)
@click.option(
    "--plot", is_flag=True, help="Draw a bar per run: solid up to its lowest repeat, shaded up to its highest."
)
@click.option("--csv", is_flag=True, help="Print CSV, in seconds, bytes, joules and tokens per second.")
@click.option("--markdown", is_flag=True, help="Print Markdown tables.")
@json_option
def command(
    names: tuple[str, ...],
    by: tuple[str, ...],
    baseline: str | None,
    metrics: tuple[str, ...],
    conditions: tuple[str, ...],
    slo: tuple[str, ...],
    details: bool,
    of_cost: bool,
    over: str | None,
    fail_on_regression: str | None,
    as_text: bool,
    plot: bool,
    everything: bool,
    csv: bool,
    markdown: bool,
    as_json: bool,
) -> int:
    """Compare the results of runs.

    Prints a table with a row per run: its main metrics, its throughput relative to the baseline with a 95% confidence interval,
    and a verdict. With --by dtype, labctl compares runs that differ only in dtype. With --baseline float16, the float16 run is
    their baseline (default: the first row). A ratio is the throughput (or --metric) of a run divided by that of its baseline.
    Default: the latest submission. ORIGIN is the label of imported runs.

    Exit code 6: no results yet, because runs are queued or running. Exit code 1: all runs ended without a result.

    An AXIS is a setting such as partition, backend, dtype or batch_size. With --by A --by B, labctl compares A at each value of
    B.

    \b
    labctl compare
    labctl compare --by backend --metric throughput --plot
    labctl compare --by backend --by batch_size --baseline hf
    labctl compare --by gpus
    labctl compare --all --where partition=dgxh --where 'batch_size>=8' --csv
    labctl compare --all --over time --fail-on-regression 5%
    labctl compare --text 3f9a12 77ac01
    """
    forms = {"--plot": plot, "--csv": csv, "--markdown": markdown}
    given = _given({**forms, "--json": as_json})
    if len(given) > 1:
        raise WrongUseError(f"several output formats: {' and '.join(given)}", "give one of them")
    if over and (by or as_text or details or _given(forms)):
        raise WrongUseError(
            "--over time has its own table", "leave out --by, --text, --details, --plot, --csv and --markdown"
        )
    beside = _given({"--metric": metrics, "--cost": of_cost, "--fail-on-regression": fail_on_regression, **forms})
    if as_text and beside:
        raise WrongUseError(f"--text compares answers, not metrics: {beside[0]}", "give one of the two options")
    allowed = None if fail_on_regression is None else percent(fail_on_regression)
    asked = Question.of(
        by, (*metrics, *(COST_METRICS if of_cost else ())), conditions, baseline, over_time=over is not None
    )
    here = workspace.existing()
    store = open_store(here)
    statuses.refresh(here, store)  # of the whole workspace: other runs show how engine loads vary
    title, run_ids = select_runs.chosen_runs(store, names, everything=everything, imported=True)
    if not run_ids:
        raise WrongUseError("no submission in this workspace", "submit runs with labctl submit")
    if as_text:
        _compare_texts(here, store, title, _matching_runs(store, run_ids, asked), as_json)
        return 0
    prices = _prices(here, store) if asked.needs_prices else {}
    asked = asked.with_levels(levels_of(here, store, run_ids, slo))
    cells = question.cells_of(store, run_ids, asked, prices, with_texts=as_json or details)
    have = set(measured(store, run_ids)) if asked.where else {cell.run_id for cell in cells}
    without = [run_id for run_id in run_ids if run_id not in have]
    missing = status.statuses(here, store, without) if without else []
    if not cells:
        raise run_status.no_results(title, missing)
    unpriced = any(metric in MONEY for metric in asked.metrics) and not prices
    notes = ['no partition has a price: set price_per_gpu_hour = "2.50 EUR" in labctl.toml'] if unpriced else []
    if over:
        kept = list(dict.fromkeys(cell.run_id for cell in cells))
        found = question.over_time(store, kept, asked, prices, threshold=allowed or 0.0)
        found.notes += notes
        print_json(found.to_json()) if as_json else comparison.print_trend(found)
        return 1 if allowed is not None and found.regressions else 0
    answer = question.answer(store, cells, asked)
    answer.warnings[:0] = _warnings_of_missing(missing)
    answer.notes += notes
    worse = [] if allowed is None else verdicts.regressions(answer, allowed)
    if as_json:
        print_json({**verdicts.to_json(answer), "regressions": worse})
    elif given or details or asked.metrics:
        comparison.print_comparison(answer, given[0].removeprefix("--") if given else None, with_texts=details)
    else:
        comparison.print_overview(answer)
    for sentence in [] if as_json else worse:
        tables.note(f"regression: {sentence}")
    return 1 if worse else 0


def _given(options: Mapping[str, object]) -> list[str]:
    return [option for option, value in options.items() if value]


def _prices(here: Workspace, store: Store) -> dict[str, Price]:
    from labctl_orchestrator.analysis.cost import prices_here

    return prices_here(here, store)


MISSING_NAMED = 2


def _warnings_of_missing(missing: Sequence[RunStatus]) -> list[str]:
    if len(missing) > MISSING_NAMED:
        return [f"no result for {run_status.summary(missing)}; labctl status shows why"]
    return [f"no result for {run.run_id}: {run.sentence}" for run in missing]


# ---------------------------------------------------------------- --text


MOST_TEXTS = 6


def _matching_runs(store: Store, run_ids: Sequence[str], asked: Question) -> list[str]:
    """The measured runs that match the conditions, the baseline first."""
    cells = question.cells_of(store, run_ids, asked, with_texts=False)
    first = question.at_baseline(cells, asked)
    return list(dict.fromkeys([*(cell.run_id for cell in first), *(cell.run_id for cell in cells)]))


def _compare_texts(here: Workspace, store: Store, title: str, run_ids: list[str], as_json: bool) -> None:
    from labctl_orchestrator.analysis.answers import answer_pairs, read_answers, summaries

    if not 2 <= len(run_ids) <= MOST_TEXTS:
        raise WrongUseError(
            f"--text compares 2 to {MOST_TEXTS} measured runs: {title} has {len(run_ids)}",
            "select runs with labctl compare --text RUN RUN, or with --where",
        )
    answers = [read_answers(here, store, run_id) for run_id in run_ids]
    summarized = summaries(answers)
    pairs = [(other, answer_pairs(answers[0], other)) for other in answers[1:]]
    if not as_json:
        comparison.print_texts_compared(answers, summarized, pairs)
        return
    print_json(
        {
            "runs": run_ids,
            "answers": [asdict(summary) for summary in summarized],
            "pairs": [{"runs": [run_ids[0], other.run_id], **asdict(pair)} for other, found in pairs for pair in found],
        }
    )
