"""Runs packed into jobs: each once, none longer than it may be, and the time that is asked for is the time that is needed."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labctl_orchestrator.request.packing import (
    LOAD_S,
    MARGIN,
    PREFILL_S,
    QUARTER_S,
    RUN_S,
    STEP_S,
    Bounds,
    Pace,
    need_s,
    packed,
)
from labctl_orchestrator.request.plan import Plan
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.submission.measured_pace import paces
from labctl_workers.record import JobSpec, ModelRef, RunSpec
from labctl_workers.workload import estimated_sizes, sizes_of, steps_of

from .conftest import Records

HOUR, DAY = 3600, 86400


def a_run(number: int, tokens: int = 128, **values: object) -> RunSpec:
    return RunSpec(f"{number:012x}", {}, "p", tokens, **values)  # type: ignore[arg-type]


def a_job(runs: list[RunSpec], partition: str = "dgxh") -> JobSpec:
    return JobSpec("", partition, "slurm", "hf", ModelRef("m"), "float16", "cuda", 2, runs, {"p": ["one", "two"]})


def jobs_of(
    runs: list[RunSpec], bounds: Bounds, pace: Pace | None = None, per_job: int | None = None, **more: object
) -> list[JobSpec]:
    return packed(Plan([a_job(runs)]), {"dgxh": bounds}, lambda job: pace, per_job, **more).jobs  # type: ignore[arg-type]


@given(
    tokens=st.lists(st.integers(1, 5000), min_size=1, max_size=60),
    per_job=st.none() | st.integers(1, 30),
    longest_s=st.integers(HOUR, 2 * DAY),
    measured=st.booleans(),
)
def test_every_run_is_in_one_job_in_order_and_none_is_too_long(
    tokens: list[int], per_job: int | None, longest_s: int, measured: bool
) -> None:
    runs = [a_run(number, count) for number, count in enumerate(tokens)]
    pace = Pace(20.0, 0.02) if measured else None
    jobs = jobs_of(runs, Bounds(HOUR, longest_s), pace, per_job)
    assert [run for job in jobs for run in job.runs] == runs
    for job in jobs:
        start_s = MARGIN * 20.0 if measured else LOAD_S
        needed = start_s + sum(need_s(job, run, pace) for run in job.runs)
        assert len(job.runs) <= (per_job or len(runs))
        assert HOUR <= job.time_limit_s <= longest_s
        assert needed <= job.time_limit_s or len(job.runs) == 1
        assert job.time_limit_s <= max(HOUR, needed + QUARTER_S)


def test_a_pass_is_planned_with_as_many_requests_as_the_worker_sends() -> None:
    """65 prompts in batches of 64 are filled up to two whole batches."""
    job, run = a_job([]), a_run(1, batch_size=64, request_rate=2.0, repeats=1, warmup=0)
    job.prompt_sets["p"] = ["prompt"] * 65
    sent = len(sizes_of(run, [1] * 65))
    assert sent == 128
    assert steps_of(estimated_sizes(job, run), run.batch_size) == 2 * 128
    prompt_s = 2 * PREFILL_S  # of "prompt", about two tokens
    needed = RUN_S + sent / 2.0 + sent * prompt_s + MARGIN * 2 * 128 * 0.01
    assert need_s(job, run, Pace(1.0, 0.01)) == pytest.approx(needed)
    needed = RUN_S + 5 / 2.0 + 5 * prompt_s + MARGIN * 128 * 0.01
    assert need_s(job, replace(run, requests=5), Pace(1.0, 0.01)) == pytest.approx(needed)


@given(
    tokens=st.lists(st.integers(1, 5000), min_size=1, max_size=20),
    loads=st.integers(1, 40),
    longest_s=st.integers(HOUR, 2 * DAY),
    together=st.booleans(),
)
def test_every_run_has_its_engine_loads_and_a_job_asks_for_the_time_of_all_of_its_own(
    tokens: list[int], loads: int, longest_s: int, together: bool
) -> None:
    runs = [a_run(number, count) for number, count in enumerate(tokens)]
    plan = Plan([replace(a_job(runs), loads=loads)])
    shared = {"dgxh"} if together else set()
    jobs = packed(plan, {"dgxh": Bounds(HOUR, longest_s)}, lambda job: None, loads_share_jobs=shared).jobs
    for run in runs:
        assert sum(job.loads for job in jobs if run in job.runs) == loads
    for job in jobs:
        needed = job.loads * (LOAD_S + sum(need_s(job, run, None) for run in job.runs))
        assert job.loads == 1 or together
        assert needed <= job.time_limit_s or (len(job.runs) == 1 and job.loads == 1)
        assert job.time_limit_s <= min(longest_s, max(HOUR, needed + QUARTER_S))


def test_loads_that_do_not_fit_into_one_job_are_spread_evenly() -> None:
    plan = Plan([replace(a_job([a_run(1)]), loads=7)])
    a_load = LOAD_S + need_s(a_job([]), a_run(1), None)
    bounds = {"dgxh": Bounds(HOUR, int(3.5 * a_load))}
    jobs = packed(plan, bounds, lambda job: None, loads_share_jobs={"dgxh"}).jobs
    assert [job.loads for job in jobs] == [3, 2, 2]


def test_few_runs_ask_for_the_partitions_usual_time_and_many_for_what_they_need() -> None:
    assert [job.time_limit_s for job in jobs_of([a_run(1)], Bounds(HOUR, DAY))] == [HOUR]
    runs = [a_run(number) for number in range(100)]
    (job,) = jobs_of(runs, Bounds(HOUR, DAY))
    each = RUN_S + 4 * 2 * (128 * STEP_S + PREFILL_S)  # three repeats and a warm-up, two prompts one after the other
    assert job.time_limit_s == -(-(LOAD_S + 100 * each) // QUARTER_S) * QUARTER_S


def test_what_was_measured_is_believed_rather_than_the_rule() -> None:
    runs = [a_run(number) for number in range(100)]
    (slow,) = jobs_of(runs, Bounds(HOUR, DAY))
    (fast,) = jobs_of(runs, Bounds(HOUR, DAY), Pace(30.0, 0.005))
    assert fast.time_limit_s < slow.time_limit_s
    assert fast.time_limit_s >= MARGIN * (30 + 100 * 4 * 2 * 128 * 0.005)


def test_a_run_that_met_its_limit_gets_the_seconds_that_it_is_said_to_need() -> None:
    (job,) = jobs_of([a_run(1)], Bounds(HOUR, DAY), at_least_s={a_run(1).run_id: 2.0 * HOUR})
    assert job.time_limit_s >= 2 * HOUR


def test_a_usual_time_above_what_slurm_allows_is_lowered_to_it() -> None:
    assert [job.time_limit_s for job in jobs_of([a_run(1)], Bounds(2 * HOUR, HOUR))] == [HOUR]


def test_requests_that_come_at_a_rate_take_at_least_as_long_as_they_take_to_come() -> None:
    run = a_run(1, requests=600, request_rate=1.0, batch_size=64)
    assert need_s(a_job([run]), run, None) >= 4 * 600


def test_a_batch_is_one_walk_of_decode_steps() -> None:
    job = a_job([])

    def steps(**values: Any) -> int:
        run = a_run(1, 10, **values)
        return steps_of(estimated_sizes(job, run), run.batch_size)

    assert steps(batch_size=1) == 20  # two prompts
    assert steps(batch_size=2) == 10
    assert steps(batch_size=64) == 10  # filled up
    assert steps(batch_size=4, requests=9) == 30


# ---------------------------------------------------------------- what was measured


def test_the_pace_of_an_engine_is_the_slowest_that_was_measured_of_it(records: Records) -> None:
    batch = records.submit()
    attempt = records.attempt(batch)
    records.done(batch, attempt, load_s=12.0, init_s=8.0)
    records.collect()
    job = batch.jobs[0]
    with closing(open_store(records.workspace)) as store:
        pace = paces(store)(job)
        assert pace is not None
        assert pace.load_s == 20.0
        assert pace.step_s > 0
        assert paces(store)(replace(job, dtype="float64")) is None
        assert paces(store)(replace(job, engine_options={"attn_implementation": "eager"})) is None


def test_nothing_was_measured_in_a_new_workspace(records: Records) -> None:
    batch = records.prepare()
    records.collect()
    with closing(open_store(records.workspace)) as store:
        assert paces(store)(batch.jobs[0]) is None


@pytest.mark.parametrize("pace", [None, Pace(30.0, 0.01)])
def test_one_run_is_one_job_however_long_it_is(pace: Pace | None) -> None:
    (job,) = jobs_of([a_run(1, 10_000_000)], Bounds(HOUR, DAY), pace)
    assert job.time_limit_s == DAY
