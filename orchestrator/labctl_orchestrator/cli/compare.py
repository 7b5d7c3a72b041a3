"""labctl compare"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from labctl_orchestrator.analysis import question, verdicts
from labctl_orchestrator.analysis.cells import measured
from labctl_orchestrator.analysis.metrics import ALL_METRICS, COST_METRICS
from labctl_orchestrator.analysis.question import Question
from labctl_orchestrator.analysis.warnings import RUNS_NAMED
from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.store import select_runs, workspace
from labctl_orchestrator.store.database import Store, open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.terminal import comparison, statuses, tables
from labctl_orchestrator.tracking import run_status, status
from labctl_slurm.errors import NotYetError, WrongUseError

if TYPE_CHECKING:
    from labctl_orchestrator.analysis.cost import Price

# The prices, texts and trends are imported where they are asked for: each is a fiftieth of a second.


@click.command("compare")
@click.argument("names", nargs=-1, metavar="[RUN|REQUEST|NAME|SLURM_ID]...")
@click.option(
    "--by",
    multiple=True,
    metavar="AXIS",
    help="Compare along this axis: backend, dtype, batch_size, name, an engine option ... Two (--by backend --by batch_size)"
    " compare the first at each value of the second.  [default: backend, else partition, model, dtype ... that varies]",
)
@click.option(
    "--baseline", metavar="VALUE", help="What the ratios are to, such as hf or backend=hf.  [default: the first row]"
)
@click.option("--metric", "metrics", multiple=True, help=f"What to compare: {', '.join(ALL_METRICS)}.")
@click.option(
    "--where",
    "conditions",
    multiple=True,
    metavar="CONDITION",
    help="Only runs like this: dtype=float16, 'batch_size>=8', backend!=vllm, 'backend in hf,vllm'. May be repeated.",
)
@click.option("--cost", "of_cost", is_flag=True, help=f"Short for --metric {' --metric '.join(COST_METRICS)}.")
@click.option(
    "--over", type=click.Choice(["time"]), help="Each cell over time: its attempts, and what changed between them."
)
@click.option(
    "--fail-on-regression",
    metavar="SHARE",
    help="Exit with 1 where something is worse than its baseline by more than this (5%) and by more than the spread.",
)
@click.option("--text", "as_text", is_flag=True, help="The answers beside one another, and where they first differ.")
@click.option("--plot", is_flag=True, help="Draw bars: to the lowest repeat, and on to the highest.")
@click.option("--all", "everything", is_flag=True, help="Every run of this workspace, imported ones too.")
@click.option("--csv", is_flag=True, help="Print comma-separated values, in plain units.")
@click.option("--markdown", is_flag=True, help="Print Markdown tables.")
@json_option
def command(
    names: tuple[str, ...],
    by: tuple[str, ...],
    baseline: str | None,
    metrics: tuple[str, ...],
    conditions: tuple[str, ...],
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

    Of the latest request, unless ids or names are given. Means over engine loads and their repeats, with the lowest and the
    highest; the ratio to the baseline has a 95% interval, which contains the spread between engine loads, and each row a
    verdict. A row is compared with the one that differs on the compared axis alone; where there is none, the axes that differ
    are named.

    \b
    labctl compare
    labctl compare --by dtype --metric output_tok_s
    labctl compare --by backend --by batch_size --baseline hf
    labctl compare --all --where partition=dgxh --where 'batch_size>=8' --csv
    labctl compare --all --over time --fail-on-regression 5%
    labctl compare --text 3f9a12 77ac01
    """
    forms = {"--plot": plot, "--csv": csv, "--markdown": markdown}
    given = _given({**forms, "--json": as_json})
    if len(given) > 1:
        raise WrongUseError(f"{' and '.join(given)} are forms of the same answer", "give one of them")
    if over and (by or as_text or _given(forms)):
        raise WrongUseError(
            "--over time has its own table", "leave --by, --text, --plot, --csv and --markdown out; --json works"
        )
    beside = _given({"--metric": metrics, "--cost": of_cost, "--fail-on-regression": fail_on_regression, **forms})
    if as_text and beside:
        raise WrongUseError(
            f"--text shows answers, {beside[0]} is about figures", "give one of them; --json works with both"
        )
    allowed = None if fail_on_regression is None else question.share(fail_on_regression)
    asked = Question.of(
        by, (*metrics, *(COST_METRICS if of_cost else ())), conditions, baseline, over_time=over is not None
    )
    here = workspace.existing()
    store = open_store(here)
    statuses.refresh(here, store)  # all of it: other runs show how engine loads spread
    title, run_ids = select_runs.chosen_runs(store, names, everything=everything, imported=True)
    if not run_ids:
        raise WrongUseError("nothing was submitted in this workspace yet", "labctl submit --help shows how")
    if as_text:
        _compare_texts(here, store, title, _runs_asked_for(store, run_ids, asked), as_json)
        return 0
    known_prices = _prices(here, store) if asked.needs_prices else {}
    cells = question.cells_of(store, run_ids, asked, known_prices)
    have = set(measured(store, run_ids)) if asked.where else {cell.run_id for cell in cells}
    without = [run_id for run_id in run_ids if run_id not in have]
    missing = status.statuses(here, store, without) if without else []
    if not cells:
        first = missing[0]
        raise NotYetError(
            f"{title}: none of {len(missing)} runs has a result yet",
            f"{first.run_id} is {first.state}; labctl status tells more, labctl compare --all shows what was measured before",
        )
    unpriced = asked.needs_prices and not known_prices
    notes = ['no partition has a price: set price_per_gpu_hour = "2.50 EUR" in labctl.toml'] if unpriced else []
    if over:
        kept = list(dict.fromkeys(cell.run_id for cell in cells))
        found = question.over_time(store, kept, asked, known_prices, threshold=allowed or 0.0)
        found.notes += notes
        print_json(found.to_json()) if as_json else comparison.print_trend(found)
        return 1 if allowed is not None and found.regressions else 0
    answer = question.answer(store, cells, asked)
    if len(missing) > RUNS_NAMED:
        answer.warnings.append(f"no result of {run_status.summary(missing)}; labctl status tells why")
    else:
        answer.warnings += [
            f"no result of {run.run_id}: {run.state}{run.detail and f', {run.detail}'}" for run in missing
        ]
    answer.notes += notes
    worse = [] if allowed is None else verdicts.regressions(answer, allowed)
    if as_json:
        print_json({**verdicts.to_json(answer), "regressions": worse})
    else:
        comparison.print_comparison(answer, given[0].removeprefix("--") if given else None)
        for sentence in worse:
            tables.note(f"regression: {sentence}")
    return 1 if worse else 0


def _given(options: Mapping[str, object]) -> list[str]:
    return [option for option, value in options.items() if value]


def _prices(here: Workspace, store: Store) -> dict[str, Price]:
    from labctl_orchestrator.analysis.cost import prices_here

    return prices_here(here, store)


# ---------------------------------------------------------------- --text


# More answers than these are not read beside one another.
TEXTS_AT_MOST = 6


def _runs_asked_for(store: Store, run_ids: Sequence[str], asked: Question) -> list[str]:
    """The measured runs that the conditions leave, the baseline first."""
    cells = question.cells_of(store, run_ids, asked)
    first = question.at_baseline(cells, asked)
    return list(dict.fromkeys([*(cell.run_id for cell in first), *(cell.run_id for cell in cells)]))


def _compare_texts(here: Workspace, store: Store, title: str, run_ids: list[str], as_json: bool) -> None:
    from labctl_orchestrator.analysis.answers import answer_pairs, read_answers, summaries

    if not 2 <= len(run_ids) <= TEXTS_AT_MOST:
        found = f"{title} has {len(run_ids)}" if title else f"{len(run_ids)} were named"
        raise WrongUseError(
            f"--text compares two to {TEXTS_AT_MOST} measured runs, {found}",
            "labctl compare --text RUN RUN, or --where to ask for fewer",
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
