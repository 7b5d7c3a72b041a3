"""labctl tune"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import click

from labctl_orchestrator.analysis import doubts
from labctl_orchestrator.analysis.cells import read_cells
from labctl_orchestrator.analysis.comparison import Cell, mean_of
from labctl_orchestrator.analysis.metrics import RATE, figure
from labctl_orchestrator.analysis.recommendation import meets
from labctl_orchestrator.cli import options
from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.cli.submit import launch, open_new, refuse, report_findings, wait_for
from labctl_orchestrator.request import service_levels
from labctl_orchestrator.request.service_levels import LATENCIES, ServiceLevel
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.terminal import tables
from labctl_slurm.errors import WrongUseError
from labctl_workers.measure import METRICS
from labctl_workers.record import JobSpec, RunSpec
from labctl_workers.search import load_of, searches

LOADS = {"request_rate": "--request-rate", "batch_size": "--concurrency"}


@options.without(
    "serve",
    "without_server",
    "runs_per_job",
    "jobs_at_once",
    batch_size="Concurrent requests: the lowest and the highest number to try.",
    request_rate="Mean requests per second: the lowest and the highest rate to try.",
    slo="Service level to meet, such as 'ttft_p99<500ms'.  [required]",
)
@click.command("tune")
@options.submission_options
@click.option(
    "--step",
    type=float,
    default=0.1,
    help="Precision: 0.1 finds the highest request load to within 10%.  [default: 0.1]",
)
@click.option("--no-preflight", is_flag=True, envvar="LABCTL_NO_PREFLIGHT", help="Skip the checks before submission.")
@json_option
def command(file: str | None, step: float, no_preflight: bool, as_json: bool, **flags: Any) -> int:
    """Find the highest request load that meets service levels.

    The request load is a rate (--request-rate) or a concurrency (--concurrency). Give one of these options twice: the lowest and
    the highest value to try. Each configuration has a job with one server. The job measures only the values that bisection
    needs. A value is good if every repeat meets each level (--slo), no request fails, and the queue of requests at the server
    does not grow. Returns when the jobs have ended.

    \b
    labctl tune -p dgxh --backend vllm --slo "ttft_p99<500ms" --slo "tpot_p90<50ms" --request-rate 1 --request-rate 64
    labctl tune -p dgxh --backend vllm --slo "e2e_p99<2s" --concurrency 1 --concurrency 256
    """
    axis = _axis(flags)
    flags = {**flags, "serve": True, axis: tuple(ladder(*_bounds(flags[axis], axis), step, whole=axis == "batch_size"))}
    prepared = options.prepared(file, flags, again=True, check=not no_preflight, search=True)
    refused = report_findings(prepared, force=False)
    if refused:
        return refuse(prepared, refused, as_json)
    with open_new(prepared) as store:
        launched, exit_code = launch(prepared, store)
        exit_code = exit_code or wait_for(prepared.workspace, store, launched.run_ids)
    levels = [service_levels.parse(text) for text in prepared.request.slo]
    with closing(open_store(prepared.workspace)) as store:
        every = read_cells(store, launched.run_ids, levels=levels)
    jobs = [job.job_id for job, _ in launched.queued]
    cells = {cell.run_id: own for cell in every if (own := of_jobs(cell, jobs)) is not None}
    found = [Found(job, runs, cells) for job in prepared.plan.jobs for runs in searches(job.runs)]
    if as_json:
        print_json([one.to_json(axis) for one in found])
    else:
        for one in found:
            one.print(axis, levels)
    return exit_code


def _axis(flags: Mapping[str, Any]) -> str:
    given = [axis for axis in LOADS if flags[axis]]
    if len(given) != 1:
        raise WrongUseError(
            "tune needs the lowest and the highest request load to try",
            "give --request-rate twice, or --concurrency twice: the lowest value, then the highest",
        )
    if len(flags["requests"]) > 1:
        raise WrongUseError("tune takes one number of requests", "give --requests once")
    return given[0]


def _bounds(values: Sequence[float], axis: str) -> tuple[float, float]:
    if len(values) != 2 or not 0 < values[0] < values[1]:
        given = ", ".join(f"{value:g}" for value in values)
        raise WrongUseError(
            f"tune needs the lowest and the highest {LOADS[axis]}, but got {given}",
            f"give {LOADS[axis]} twice: the lowest value, then the highest",
        )
    return values[0], values[1]


def ladder(low: float, high: float, step: float, *, whole: bool) -> list[float]:
    """Request loads from `low` to `high`, each at most `step` above the one before; whole numbers are at least 1 apart."""
    if not 0.001 <= step <= 10:
        raise WrongUseError(f"--step out of range: {step:g}", "give a number from 0.001 to 10")
    count = max(1, math.ceil(math.log(high / low) / math.log1p(step) - 1e-9))
    loads = [low * (high / low) ** (place / count) for place in range(count + 1)]
    if whole:
        return sorted({round(load) for load in loads})
    return [float(f"{load:.4g}") for load in loads[:-1]] + [high]


def of_jobs(cell: Cell, job_ids: Sequence[str]) -> Cell | None:
    """The cell with its engine loads in these jobs alone; None without one. An earlier search may have measured the same run."""
    kept = [place for place, load in enumerate(cell.loads) if load.startswith(tuple(f"{own}." for own in job_ids))]
    if not kept:
        return None
    values = {metric: [of[place] for place in kept] if of else [] for metric, of in cell.values.items()}
    largest = (max(itertools.chain(*values[name]), default=None) for name in doubts.Serving._fields)
    found = [one for one in cell.doubts if one.kind not in (doubts.FAILED, doubts.SATURATED)]
    found += [
        one for one in doubts.of_serving(doubts.Serving(*largest)) if one.kind in (doubts.FAILED, doubts.SATURATED)
    ]
    return replace(cell, loads=tuple(cell.loads[place] for place in kept), values=values, doubts=tuple(found))


def shown(levels: Sequence[ServiceLevel]) -> tuple[str, ...]:
    """The throughput, and each latency at the percentile of its level. Without a metric for it: at the 99th."""
    percents = {level.latency: level.percent or 99 for level in levels}
    at_level = {latency: f"{latency}_p{percents.get(latency, 99):g}_s" for latency in LATENCIES}
    return RATE, *(metric if metric in METRICS else f"{latency}_p99_s" for latency, metric in at_level.items())


class Found:
    """What a search measured: the highest load that meets the levels, and the lowest above it that does not."""

    def __init__(self, job: JobSpec, runs: Sequence[RunSpec], cells: Mapping[str, Cell]) -> None:
        self.job = job
        self.measured = [(run, cells[run.run_id]) for run in runs if run.run_id in cells]
        good = [run for run, cell in self.measured if meets(cell)]
        self.best = good[-1] if good else None
        worse = [run for run, cell in self.measured if not meets(cell)]
        self.next = next((run for run in worse if self.best is None or load_of(run) > load_of(self.best)), None)

    def to_json(self, axis: str) -> dict[str, Any]:
        return {
            "partition": self.job.partition,
            "backend": self.job.backend,
            "axis": axis,
            "highest": None if self.best is None else load_of(self.best),
            "run_id": None if self.best is None else self.best.run_id,
            "next": None if self.next is None else load_of(self.next),
            "measured": [
                {"run_id": run.run_id, axis: load_of(run), "meets": meets(cell)} for run, cell in self.measured
            ],
        }

    def print(self, axis: str, asked: Sequence[ServiceLevel]) -> None:
        levels, metrics = ", ".join(map(str, asked)), shown(asked)
        columns = (axis, *(METRICS[metric].title for metric in metrics), "meets", "run")
        rows = []
        for run, cell in self.measured:
            means = [figure(mean_of(metric, cell.values[metric]), METRICS[metric].unit) for metric in metrics]
            rows.append([f"{load_of(run):g}", *means, "yes" if meets(cell) else "no", run.run_id])
        tables.table(columns, rows, right=columns[:-2])
        if not self.measured:
            click.echo(f"no {axis} was measured: labctl status shows why")
        elif self.best is None:
            click.echo(f"no {axis} of this range meets {levels}")
        elif self.next is None:
            click.echo(f"{axis} {load_of(self.best):g} meets {levels}: the highest of the range; give a higher one")
        else:
            click.echo(f"highest {axis} that meets {levels}: {load_of(self.best):g} ({load_of(self.next):g} does not)")
