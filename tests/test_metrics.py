"""Every metric on times, bytes and joules that a person can reckon with: two batches of two requests each."""

from __future__ import annotations

import heapq
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from labctl_workers.measure import METRICS, percentile
from labctl_workers.record import ClientReport, DeviceMemory, EngineCounts, Repeat, Sample

GIB = 2**30


def repeat() -> Repeat:
    """JobArray 0: first tokens at 0.1 s, four tokens 0.1 s apart, then one of three tokens with gaps of 0.2 s and 0.4 s.
    JobArray 1: first tokens at 0.3 s; an answer of one token, and one of two that repeats itself."""
    samples = [
        Sample(
            0,
            0,
            10,
            [1, 2, 3, 4],
            [0.1, 0.2, 0.3, 0.4],
            "length",
            "",
            queued_s=0.05,
            log_probabilities=[-1.0, -2.0, -3.0, -2.0],
        ),
        Sample(1, 1, 30, [1, 2, 3], [0.1, 0.3, 0.7], "stop", "", log_probabilities=[-0.5, -0.5, -0.5]),
        Sample(2, 2, 20, [5], [0.3], "stop", "", handed_s=1.0, log_probabilities=[-4.0]),
        Sample(3, 3, 20, [7, 7, 7], [0.3, 0.5, 0.7], "length", "", handed_s=1.0),
    ]
    devices = [
        DeviceMemory("cuda:0", "", 1 * GIB, 10, 20, 2 * GIB, 3 * GIB, 4 * GIB),
        DeviceMemory("cuda:1", "", 2 * GIB, 30, 40, 1 * GIB, 2 * GIB, 5 * GIB),
    ]
    return Repeat(
        repeat=0, wall_s=2.0, samples=samples, devices=devices, energy_j=55.0,
        read_bytes_per_step=4e9, memory_bandwidth_bytes_s=1e11, counts=EngineCounts(4, 12, 9, 128, 96),
    )  # fmt: skip


# tpot: (0.4 - 0.1) / 3 = 0.1, (0.7 - 0.1) / 2 = 0.3, none for one token, (0.7 - 0.3) / 2 = 0.2
# gaps: 0.1 0.1 0.1, 0.2 0.4, 0.2 0.2; first tokens: 0.1 0.1 0.3 0.3; last tokens: 0.4 0.7 0.3 0.7
EXPECTED = {
    "output_tok_s": 11 / 2.0,
    "ttft_s": 0.2,
    "ttft_p90_s": 0.3,
    "ttft_p99_s": 0.3,
    "tpot_s": 0.2,
    "tpot_p90_s": 0.2 + 0.8 * 0.1,
    "tpot_p99_s": 0.2 + 0.98 * 0.1,
    "itl_s": 0.2,
    "itl_p99_s": 0.2 + 0.94 * 0.2,
    "e2e_s": 0.55,
    "e2e_p90_s": 0.7,
    "e2e_p99_s": 0.7,
    "prefill_tok_s": (10 + 30 + 20 + 20) / (0.1 + 0.3),  # from 0.0 (one waited until 0.05) and from 1.0
    "queued_s": 0.05,  # the others' engine did not tell
    "output_tokens": 11,
    "weights_bytes": 2 * GIB,
    "kv_cache_used_bytes": 30,
    "kv_cache_reserved_bytes": 40,
    "peak_allocated_bytes": 2 * GIB,
    "peak_reserved_bytes": 3 * GIB,
    "device_used_bytes": 5 * GIB,
    "energy_j": 55.0,
    "energy_per_token_j": 5.0,
    "mbu": 4e9 / 0.2 / 1e11,
    "requests_s": 4 / 2.0,
    "acceptance_rate": 9 / 12,
    "accepted_length": 1 + 9 / 4,
    "prefix_hit_rate": 96 / 128,
    "mean_log_probability": -2.0,  # of -2, -0.5 and -4; the fourth was not scored
    "repeated_bigrams": 0.0,  # of 0, 0 and 1/2; one token has no pair
}


def served() -> Repeat:
    """Eight requests arrive a second apart at a server that answers one in four seconds; the last one fails."""
    samples = [
        Sample(number, 0, 5, [1], [4.0 * (number + 1) - number], "length", "", handed_s=float(number))
        for number in range(7)
    ]
    samples.append(Sample(7, 0, 5, [], [], "error", "", handed_s=7.0, error="HTTP 500"))
    return Repeat(0, 28.0, samples, client=ClientReport("c", busy_s=7.0, lag_s=[0.0] * 7 + [1.0]))


EXPECTED_OF_SERVED = {
    "failed_requests": 1,
    "client_busy_share": 0.25,
    "client_lag_p99_s": 0.93,
    "arrival_gap_s": 1.0,
    "drain_share": 0.75,
    "queue_growth": None,  # the first answer takes longer than half of the arrivals
}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_what_its_definition_says(name: str) -> None:
    if name in EXPECTED_OF_SERVED:
        assert METRICS[name].compute(served()) == pytest.approx(EXPECTED_OF_SERVED[name])
        assert METRICS[name].compute(repeat()) is None
    else:
        assert METRICS[name].compute(repeat()) == pytest.approx(EXPECTED[name])


def test_every_metric_has_its_example_here() -> None:
    assert EXPECTED.keys() | EXPECTED_OF_SERVED.keys() == METRICS.keys()


def at_a_server(rate: float, places: int, answer_s: float, requests: int, *, seed: int) -> Repeat:
    """Poisson arrivals at a server with so many places, each of which answers a request in `answer_s`."""
    draw, at = random.Random(seed), 0.0
    free = [0.0] * places
    samples = []
    for number in range(requests):
        begins = max(at, free[0])
        heapq.heapreplace(free, begins + answer_s)
        samples.append(Sample(number, 0, 5, [1], [begins + answer_s - at], "length", "", handed_s=at))
        at += draw.expovariate(rate)
    return Repeat(0, max(free), samples, client=ClientReport("c", 0.0, [0.0] * requests))


@pytest.mark.parametrize("seed", range(50))
def test_a_queue_grows_where_more_requests_arrive_than_a_server_answers(seed: int) -> None:
    growth = METRICS["queue_growth"]
    # Four places of a second each: four requests a second.
    assert growth.compute(at_a_server(8.0, 4, 1.0, 200, seed=seed)) > 0.1  # type: ignore[operator]
    assert growth.compute(at_a_server(3.0, 4, 1.0, 200, seed=seed)) == 0.0
    # An answer takes longer than half of the arrivals: the server still fills up.
    assert growth.compute(at_a_server(8.0, 400, 30.0, 200, seed=seed)) is None


def test_a_client_that_waits_for_answers_has_no_growing_queue() -> None:
    closed = replace(served(), client=ClientReport("c", 1.0))
    assert METRICS["queue_growth"].compute(closed) is None
    assert METRICS["client_lag_p99_s"].compute(closed) is None
    assert METRICS["arrival_gap_s"].compute(closed) is None


@pytest.mark.parametrize("name", sorted(METRICS.keys() - {"output_tokens"}))
def test_a_repeat_of_nothing_has_no_figure_rather_than_a_wrong_one(name: str) -> None:
    assert METRICS[name].compute(Repeat(0, 0.0, [])) is None


def test_a_percentile_is_numpys() -> None:
    assert percentile([3.0], 0.99) == 3.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 0.9) == pytest.approx(4.6)


def test_the_documentation_defines_every_metric_and_names_no_other() -> None:
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = page[page.index("| metric") : page.index("\n\n", page.index("| metric"))]
    first_cells = " ".join(line.split("|")[1] for line in table.splitlines() if "|" in line)
    assert set(re.findall(r"`([a-z0-9_]+)`", first_cells)) == set(METRICS)
