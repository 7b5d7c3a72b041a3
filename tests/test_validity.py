"""Runs that need another measurement: marked in compare and show, and measured again by `labctl retry --invalid`. The NVML
samples here are made up in NVML's units; none was recorded on a GPU."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest

from labctl_orchestrator.analysis import doubts
from labctl_orchestrator.store.window import Window, window_of
from labctl_workers.measure import queue_growth
from labctl_workers.record import (
    Attempt,
    GpuTelemetry,
    Phase,
    Repeat,
    RunResult,
    RunSpec,
    Sample,
    Telemetry,
    Until,
    read_json,
)

from .conftest import JobArray, Labctl, Records, Slurm, ago, measured, sacct_line

HEAT, POWER_CAP, IDLE = 0x20, 0x4, 0x1


def passes(rates: Sequence[float] = (1.0, 1.001, 0.999)) -> list[Repeat]:
    """Repeats of ten seconds each at these relative speeds, ten seconds apart on the clock of the telemetry."""
    found = [measured(number, tokens=4) for number in range(len(rates))]
    for number, (repeat, rate) in enumerate(zip(found, rates, strict=True)):
        repeat.wall_s = 10.0 / rate
        repeat.started_s = 100.0 + 20.0 * number
        repeat.samples[0].prompt_tokens = 64
    return found


def made_telemetry(*, throttled: float = 0.0, others: int = 0, sm_mhz: int = 1755, reasons: int = HEAT) -> Telemetry:
    """Four samples a second for 200 s on one GPU; heat holds it back in the first share of each window, and always outside."""
    times = [place * 0.25 for place in range(800)]
    bits = [
        POWER_CAP | (reasons if (at % 20.0) / 10.0 < throttled or not 0 <= at % 20.0 <= 10.0 else 0) for at in times
    ]
    gpu = GpuTelemetry(
        0,
        power_w=[500.0] * 800,
        sm_mhz=[sm_mhz] * 800,
        temperature_c=[70] * 800,
        throttle_reasons=list(bits),
        other_processes=[others if 120 < at < 121 else 0 for at in times],
    )
    return Telemetry(times, [Phase("measuring", 99.0)], [1.5] * 800, [2**30] * 800, [gpu])


def result_of(telemetry: Telemetry | None, repeats: Sequence[Repeat] = (), **asked: Any) -> RunResult:
    attempt = Attempt("a", "j", "e", ago(1), "h", "n", 1)
    return RunResult(
        "r", attempt, "done", asked, ago(1), ago(0), repeats=list(repeats or passes()), telemetry=telemetry
    )


# ---------------------------------------------------------------- the window


def test_only_samples_in_the_measured_windows_count() -> None:
    window = window_of(result_of(made_telemetry(throttled=0.12)))
    assert window.throttled_share == pytest.approx(0.12, abs=0.01)
    assert window.throttle_reasons == ["heat (software)"]
    assert (window.sm_mhz, window.power_w, window.temperature_c, window.cpus_used) == (1755, 500, 70, 1.5)
    assert window.invalid == ["throttled"]
    assert (
        window_of(result_of(made_telemetry(throttled=0.0))).invalid == []
    )  # heat outside the windows, the power limit in them
    assert window_of(result_of(made_telemetry(throttled=0.04))).invalid == []
    assert window_of(result_of(None)) == Window()


def test_a_process_of_another_in_one_repeat_makes_the_result_invalid() -> None:
    assert window_of(result_of(made_telemetry(others=2))).invalid == ["shared GPU"]
    outside = [dataclasses.replace(repeat, started_s=30.0 * number) for number, repeat in enumerate(passes())]
    window = window_of(result_of(made_telemetry(others=2, reasons=0), outside))
    assert (window.other_processes, window.invalid) == (0, [])


@pytest.mark.parametrize(("service_s", "grows"), [(0.2, False), (1.0, True)])
def test_the_queue_of_a_run_with_a_request_rate_grows_where_the_engine_is_too_slow(
    service_s: float, grows: bool
) -> None:
    """One server, 200 Poisson arrivals at 2/s: it needs less or more than the time between two of them."""
    draw, at, free_at = random.Random(7), 0.0, 0.0
    samples = []
    for number in range(200):
        at += draw.expovariate(2.0)
        free_at = max(free_at, at) + service_s
        samples.append(Sample(number, 0, 8, [1], [free_at - at], "length", "x", handed_s=at))
    repeat = Repeat(0, free_at, samples)
    window = window_of(result_of(None, [repeat], request_rate=2.0))
    assert ((window.queue_growth or 0.0) > doubts.GROWING_QUEUE_SHARE) == grows
    assert window_of(result_of(None, [repeat])).queue_growth is None


def batch_server(rate: float, seconds: float, seed: int) -> Repeat:
    """128 tokens for each of the Poisson arrivals. A step gives a token to every request in the server, after the prompts of new
    ones. Its time is that of an 8B model on one H200: 4.7 ms, 24 ms more for a prompt, 0.03 ms more for a request. The server
    keeps up with 35.9 requests/s."""
    draw, count = random.Random(seed), round(rate * seconds)
    arrivals = list(itertools.accumulate(draw.expovariate(rate) for _ in range(count)))
    now, place, in_server, samples = 0.0, 0, [], []
    while place < count or in_server:
        if not in_server:
            now = max(now, arrivals[place])
        new = 0
        while place < count and arrivals[place] <= now and new < 8:
            in_server.append([place, 128])
            place, new = place + 1, new + 1
        now += 4.7e-3 + 24e-3 * new + 3e-5 * len(in_server)
        for request in in_server:
            request[1] -= 1
            if not request[1]:
                at = arrivals[request[0]]
                samples.append(Sample(request[0], 0, 8, [1], [now - at], "length", "x", handed_s=at))
        in_server = [request for request in in_server if request[1]]
    return Repeat(0, now, samples)


@pytest.mark.parametrize(("rate", "seconds", "least", "most"), [(25.0, 60, 0, 0), (28.8, 30, 0, 2), (39.5, 60, 18, 20)])
def test_a_server_that_keeps_up_is_rarely_called_over_saturated_and_one_that_does_not_is(
    rate: float, seconds: float, least: int, most: int
) -> None:
    grows = [
        (queue_growth(batch_server(rate, seconds, seed)) or 0.0) > doubts.GROWING_QUEUE_SHARE for seed in range(20)
    ]
    assert least <= sum(grows) <= most


# ---------------------------------------------------------------- the scatter of repeats


def test_repeats_that_are_too_few_for_their_scatter_name_how_many_more_would_do() -> None:
    rates = [[100.0, 108.0, 93.0]]
    error = statistics.stdev(map(math.log, rates[0])) / math.sqrt(3)
    (doubt,) = doubts.of_rates(rates)
    assert (doubt.kind, doubt.value) == (doubts.NOISY, pytest.approx(error))
    more = int(doubt.detail)
    assert error * math.sqrt(3 / (3 + more)) <= 0.02 < error * math.sqrt(3 / (3 + more - 1))
    assert doubts.of_rates([[100.0, 101.0, 99.0]]) == []
    assert doubts.of_rates([[100.0]]) == []  # one repeat has no scatter: compare notes that
    assert f"{more} more repeats would bring it to 2%" in doubts.of_validity([doubt])


def test_a_trend_over_the_repeats_is_unsteady_and_scatter_is_not() -> None:
    rising = [100.0, 100.1, 103.0, 104.0, 106.0, 106.1]
    (doubt,) = doubts.of_rates([rising])
    assert (doubt.kind, doubt.value) == (doubts.UNSTEADY, pytest.approx(0.06, abs=0.002))
    assert "+6.0%" in doubts.of_validity([doubt])
    draw = random.Random(3)
    marked = sum(
        any(doubt.kind == doubts.UNSTEADY for doubt in doubts.of_rates([[100 * math.exp(draw.gauss(0, 0.02)) for _ in range(9)]]))
        for _ in range(2000)
    )  # fmt: skip
    assert marked / 2000 < 0.01


def test_another_load_with_the_proposed_repeats_makes_the_error_small_enough() -> None:
    first = [100.0, 108.0, 93.0]
    (doubt,) = doubts.of_rates([first])
    repeats, loads = 3 + int(doubt.detail), doubts.more_loads(doubt.value, 1)
    later = [(first * 10)[:repeats]] * loads

    def is_noisy(by_load: list[list[float]]) -> bool:
        return any(one.kind == doubts.NOISY for one in doubts.of_rates(by_load))

    assert loads > 1
    assert is_noisy([first])
    assert is_noisy([first, *later[:-1]])
    assert not is_noisy([first, *later])


# ---------------------------------------------------------------- compare, show, retry


@pytest.fixture
def pair(records: Records, slurm: Slurm) -> JobArray:
    """Two runs of one partition, in a job each."""
    slurm.accepts(2000)
    batch = records.submit(dtypes=("float16", "bfloat16"), lengths=(8,))
    name = f"labctl-{batch.array_id}"
    slurm.shows("", "".join(sacct_line(f"1000_{task}", "COMPLETED", name) for task in (0, 1)))
    return batch


def measure(records: Records, batch: JobArray, task: int, telemetry: Telemetry | None = None, **more: Any) -> RunSpec:
    run = batch.jobs[task].runs[0]
    values = {"repeats": passes(), "telemetry": telemetry, **more}
    records.done(batch, records.attempt(batch, task, slurm_id=f"1000_{task}"), run, **values)
    return run


def notes(labctl: Labctl) -> list[str]:
    return [note for note in labctl("compare", "--json").json["notes"] if note.startswith("* ")]


def test_a_throttled_run_has_a_mark_beside_its_row_and_the_command_that_measures_it_again(
    labctl: Labctl, records: Records, pair: JobArray
) -> None:
    measure(records, pair, 0, made_telemetry())
    run = measure(records, pair, 1, made_telemetry(throttled=0.12))
    shown = labctl("compare")
    head, first, second = (line.split() for line in shown.out.strip().splitlines()[-3:])
    assert head[-1] == "marks"
    assert second[-1] == "throttled"
    assert first[-1] != "throttled"
    assert notes(labctl) == [
        (
            f"* GPU clocks were reduced in 12% of the measured time ({run.run_id}): heat (software);"
            " above 5% results are not reliable; measure again"
        ),
        f"* to measure again: labctl retry --invalid {run.run_id}",
    ]
    told = " ".join(labctl("show", run.run_id).out.split())
    assert "power 500 W, SM clock 1755 MHz, temperature 70 C, CPUs used 1.5, clocks reduced 12%" in told
    assert "* GPU clocks were reduced in 12%" in told
    assert "throttled" in labctl("compare", "--csv", "--metric", "throughput").out


def test_a_run_without_marks_has_no_column(labctl: Labctl, records: Records, pair: JobArray) -> None:
    for task in (0, 1):
        measure(records, pair, task, made_telemetry())
    assert "marks" not in labctl("compare").out
    assert notes(labctl) == []


def test_another_clock_and_another_node_than_the_baselines_are_marked(
    labctl: Labctl, records: Records, pair: JobArray
) -> None:
    measure(records, pair, 0, made_telemetry(sm_mhz=1980))
    measure(records, pair, 1, made_telemetry(sm_mhz=1410))
    for path in records.workspace.results.glob(f"{pair.jobs[1].runs[0].run_id}/*.json"):
        path.write_text(path.read_text().replace('"node":"', '"node":"other-'))
    labctl("collect", "--rebuild")
    found = notes(labctl)
    assert any("mean SM clock differs by -29% from the baseline's" in note and "1410 MHz" in note for note in found)
    assert any("another node" in note and "--sbatch nodelist" in note for note in found)
    assert not any("retry --invalid" in note for note in found)
    assert "other clocks, other node" in labctl("compare").out


def test_retry_invalid_measures_marked_runs_again_and_the_valid_result_replaces_them(
    labctl: Labctl, records: Records, pair: JobArray
) -> None:
    measure(records, pair, 0, made_telemetry())
    run = measure(records, pair, 1, made_telemetry(others=1), repeats=passes((0.5, 0.5, 0.5)))
    ran = labctl("retry", "--invalid", "--json")
    assert ran.code == 0, ran.err
    assert [one["run_id"] for one in ran.json["runs"]] == [run.run_id]
    (job,) = [
        read_json(path) for path in records.workspace.arrays.glob("*/[0-9]*.json") if path.parent.name != pair.array_id
    ]
    assert [one["run_id"] for one in job["runs"]] == [run.run_id]
    assert job["loads"] == 1
    # The second result, written here: its GPU was its own.
    later = records.attempt(pair, 1, slurm_id="2000_0")
    records.done(pair, later, run, repeats=passes(), telemetry=made_telemetry(), ended_at=ago(0))
    answer = labctl("compare", "--json").json
    row = next(row for row in answer["blocks"][0]["rows"] if row["run_id"] == run.run_id)
    assert (len(row["loads"]), row["mean"]) == (1, pytest.approx(0.4, rel=0.01))
    assert any("had 1 engine load left out" in warning and "shared GPU" in warning for warning in answer["warnings"])
    assert notes(labctl) == []
    query = f"SELECT output_tok_s FROM measured_runs WHERE run_id = '{run.run_id}'"
    assert labctl("query", "--json", query).json[0]["output_tok_s"] == pytest.approx(row["mean"])
    assert labctl("retry", "--invalid", "--dry-run", "--json").json == {"runs": []}


def test_retry_invalid_gives_a_noisy_run_the_repeats_that_it_needs(
    labctl: Labctl, records: Records, pair: JobArray
) -> None:
    measure(records, pair, 0)
    run = measure(records, pair, 1, repeats=passes((1.0, 1.3, 0.8)))
    (note, again) = notes(labctl)
    (more,) = [int(word) for word in note.split() if word.isdigit()]
    assert again.endswith(f"retry --invalid {run.run_id}")
    labctl("retry", "--invalid")
    jobs = [
        read_json(path) for path in records.workspace.arrays.glob("*/[0-9]*.json") if path.parent.name != pair.array_id
    ]
    assert {(job["runs"][0]["run_id"], job["runs"][0]["repeats"]) for job in jobs} == {(run.run_id, 3 + more)}
    assert 3 + more > 20
    assert sum(job["loads"] for job in jobs) == doubts.MOST_MORE_LOADS


def test_repeats_that_a_limit_ended_before_their_interval_was_narrow_are_marked(
    labctl: Labctl, records: Records, pair: JobArray
) -> None:
    measure(records, pair, 0, until=Until(0.01, 0.009, "target"))
    run = measure(records, pair, 1, until=Until(0.01, 0.013, "repeats"))
    assert notes(labctl)[0].startswith(
        f"* 95% interval of the mean is +-1.3% ({run.run_id}): --until 1% ended by the limit of repeats"
    )
    told = " ".join(labctl("show", run.run_id).out.split())
    assert "until target 1.00%, reached +-1.30%, ended by the limit of repeats" in told
