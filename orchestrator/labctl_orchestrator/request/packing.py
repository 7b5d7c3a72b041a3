"""Pack runs that can share an engine load into jobs that fit their time limit.

A job needs the time of a load and of its runs, once per engine load: twice the measured times of the same engine settings, or
without measurements LOAD_S, and STEP_S per decode step. Each prompt token needs PREFILL_S besides. Its time limit is the
partition's `time`, or the time that it needs if longer, rounded up to QUARTER_S. Runs beyond the partition's largest time limit
go to another job.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from labctl_orchestrator.request.plan import Plan
from labctl_workers.record import JobSpec, RunSpec
from labctl_workers.search import searches
from labctl_workers.workload import estimated_sizes, estimated_tokens, steps_of

# Without measurements: slower than a 7B model in float16 with transformers on two V100.
LOAD_S = 600.0
STEP_S = 0.1
PREFILL_S = 1 / 2000
# Repeats with which a scatter of 2% gives an interval of 1%. The worker keeps to the time limit where it needs more.
REPEATS_UNTIL = 20
RUN_S = 10.0
# Of tasks: a question, and the questions of a task without a number.
QUESTION_S, QUESTIONS = 0.5, 2000
MARGIN = 2.0
QUARTER_S = 900


@dataclass(frozen=True)
class Pace:
    """Measured times of engine settings: the longest load and start, and the slowest decode step, in seconds."""

    load_s: float = LOAD_S
    step_s: float = STEP_S


@dataclass(frozen=True)
class Bounds:
    """The least (`usual_s`) and the largest time limit (`longest_s`) of a partition's jobs, in seconds."""

    usual_s: int
    longest_s: int


Paces = Callable[[JobSpec], Pace | None]


def packed(
    plan: Plan,
    bounds: Mapping[str, Bounds],
    pace_of: Paces,
    runs_per_job: int | None = None,
    at_least_s: Mapping[str, float] | None = None,
    loads_share_jobs: Collection[str] = (),
) -> Plan:
    """Split the plan's jobs at the largest time limit and at `runs_per_job` runs, and set their time limits.

    `bounds` are by partition, `at_least_s` the least seconds of runs by id. Each engine load is a job; on the partitions
    `loads_share_jobs`, a job has as many as its largest time limit allows.
    """
    jobs = []
    for job in plan.jobs:
        pace = pace_of(job)
        needs = {run.run_id: max(need_s(job, run, pace), (at_least_s or {}).get(run.run_id, 0.0)) for run in job.runs}
        start_s = MARGIN * pace.load_s if pace else LOAD_S
        of_partition = bounds[job.partition]
        if job.search is not None:
            # Bisection measures so many runs at most.
            of_search_s = sum(
                math.ceil(math.log2(len(runs) + 1)) * max(needs[run.run_id] for run in runs)
                for runs in searches(job.runs)
            )
            jobs.append(replace(job, time_limit_s=_time_s(start_s + of_search_s, of_partition)))
            continue
        for runs in _parts(job.runs, needs, of_partition.longest_s - start_s, runs_per_job):
            load_s = start_s + sum(needs[run.run_id] for run in runs)
            most = max(1, int(of_partition.longest_s // load_s)) if job.partition in loads_share_jobs else 1
            for loads in _loads_of_jobs(job.loads, most):
                time_s = _time_s(loads * load_s, of_partition)
                jobs.append(replace(job, runs=runs, loads=loads, time_limit_s=time_s))
    return Plan(jobs)


def _loads_of_jobs(loads: int, most: int) -> list[int]:
    """The engine loads of each job: at most `most`, and evenly distributed."""
    jobs = -(-loads // most)
    return [loads // jobs + (number < loads % jobs) for number in range(jobs)]


def _parts(
    runs: list[RunSpec], needs: Mapping[str, float], room_s: float, runs_per_job: int | None
) -> Iterator[list[RunSpec]]:
    part: list[RunSpec] = []
    filled_s = 0.0
    for run in runs:
        if part and (filled_s + needs[run.run_id] > room_s or len(part) == runs_per_job):
            yield part
            part, filled_s = [], 0.0
        part.append(run)
        filled_s += needs[run.run_id]
    if part:
        yield part


def _time_s(needed_s: float, bounds: Bounds) -> int:
    if needed_s <= bounds.usual_s:
        return min(bounds.usual_s, bounds.longest_s)
    return min(int(-(-needed_s // QUARTER_S)) * QUARTER_S, bounds.longest_s)


def need_s(job: JobSpec, run: RunSpec, pace: Pace | None) -> float:
    """Seconds that a run needs in a job, with a margin."""
    return _seconds(job, run, MARGIN * pace.step_s if pace else STEP_S, PREFILL_S)


def _seconds(job: JobSpec, run: RunSpec, step_s: float, prefill_s: float) -> float:
    sizes = estimated_sizes(job, run)
    prompts_s = prefill_s * sum(size.prompt_tokens for size in sizes)
    steps_s = step_s * steps_of(sizes, run.batch_size)
    repeats = run.repeats + run.warmup
    if run.until is not None:
        repeats = max(run.repeats, min(run.max_repeats, REPEATS_UNTIL)) + run.warmup
    # Only the harness knows how many questions a whole task has.
    tasks_s = QUESTION_S * sum(task.limit or QUESTIONS for task in run.tasks)
    arrivals_s = _arrivals_s(job, run, len(sizes))
    return RUN_S + _score_s(job, run) + tasks_s + repeats * (arrivals_s + prompts_s + steps_s)


def _score_s(job: JobSpec, run: RunSpec) -> float:
    """Seconds to score the run's text; windows overlap."""
    if run.score is None:
        return 0.0
    tokens = sum(map(estimated_tokens, job.texts[run.score.sha256]))
    return PREFILL_S * tokens * run.score.window / run.score.stride


def _arrivals_s(job: JobSpec, run: RunSpec, requests: int) -> float:
    """Seconds until the last request of a repeat arrives."""
    dataset = job.datasets.get(run.prompt_set)
    if dataset is not None and dataset.times_s:
        return dataset.times_s[-1]
    return requests / run.request_rate if run.request_rate else 0.0


def expected_s(job: JobSpec, pace: Pace) -> float:
    """Seconds that a job takes by measured times, without a margin."""
    needs = sum(_seconds(job, run, pace.step_s, 0.0) for run in job.runs)  # a measured step contains its prompts
    return job.loads * (pace.load_s + needs)
