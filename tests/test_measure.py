"""The figures, worked out by hand; and what is, and is not, inside the measured window."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import signal
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labctl_workers import measure
from labctl_workers.engines import base
from labctl_workers.engines.base import Answers, Arrivals, Engine, Generated, Generation, Request, in_static_batches
from labctl_workers.hardware import Gpu
from labctl_workers.job import TimeLimit
from labctl_workers.measure import (
    METRICS,
    Requests,
    Watch,
    arrivals_of,
    draw_seed,
    e2e_s,
    half_width_of,
    itl_s,
    mean_log_probability,
    output_tokens,
    percentile,
    repeated_bigrams,
    tpot_s,
    ttft_s,
    until_of,
)
from labctl_workers.record import (
    DeviceMemory,
    EngineCounts,
    EngineFingerprint,
    JobSpec,
    Prompt,
    Refusal,
    Repeat,
    RunSpec,
    Sample,
    Sampling,
)
from labctl_workers.workload import sizes_of


def sample(*times: float) -> Sample:
    """One answer whose tokens came at these times."""
    return Sample(0, 0, 3, list(range(len(times))), list(times), "length", "text")


def figures(repeat: Repeat) -> dict[str, float | None]:
    return {name: metric.compute(repeat) for name, metric in METRICS.items()}


# ---------------------------------------------------------------- each metric, by hand


def test_the_time_to_first_token_is_the_first_tokens_time() -> None:
    assert ttft_s(sample(0.5, 0.75, 1.5)) == 0.5


def test_the_latency_is_the_last_tokens_time() -> None:
    assert e2e_s(sample(0.5, 0.75, 1.5)) == 1.5


def test_the_time_per_output_token_leaves_the_first_token_out() -> None:
    assert tpot_s(sample(0.5, 0.75, 1.5)) == (1.5 - 0.5) / 2


def test_an_answer_of_one_token_has_a_first_token_and_no_time_per_token() -> None:
    assert (ttft_s(sample(0.5)), e2e_s(sample(0.5)), tpot_s(sample(0.5))) == (0.5, 0.5, None)


def test_an_answer_without_tokens_has_no_times() -> None:
    assert (ttft_s(sample()), e2e_s(sample()), tpot_s(sample())) == (None, None, None)


def test_the_figures_of_a_repeat_are_medians_over_its_requests_and_sums_of_its_tokens() -> None:
    repeat = Repeat(
        repeat=0,
        wall_s=4.0,
        samples=[sample(0.25, 0.5, 0.75), sample(0.5, 1.5), sample(1.0, 1.5, 2.0, 4.0)],
        devices=[DeviceMemory("cuda:0", peak_allocated_bytes=100), DeviceMemory("cuda:1", peak_allocated_bytes=300)],
    )
    by_hand = {
        "output_tok_s": 9 / 4,
        "ttft_s": 0.5,
        "tpot_s": 1.0,  # of 0.25, 1.0 and 1.0
        "e2e_s": 1.5,
        "output_tokens": 9,
        "peak_allocated_bytes": 300,
    }
    assert {name: figures(repeat)[name] for name in by_hand} == by_hand


def test_requests_without_a_figure_are_left_out_of_its_median() -> None:
    repeat = Repeat(0, 1.0, [sample(), sample(0.5), sample(0.25, 0.75), sample(0.75, 1.0)])
    assert METRICS["tpot_s"].compute(repeat) == 0.375
    assert METRICS["ttft_s"].compute(repeat) == 0.5


def test_one_token_answers_have_a_throughput_and_no_time_per_token() -> None:
    repeat = Repeat(0, 0.5, [sample(0.25), sample(0.5)])
    assert METRICS["output_tok_s"].compute(repeat) == 4.0
    assert METRICS["tpot_s"].compute(repeat) is None


def test_a_repeat_of_nothing_has_no_figures_but_zero_tokens() -> None:
    empty = figures(Repeat(0, 0.0, []))
    assert empty["output_tokens"] == 0
    for name in ("output_tok_s", "ttft_s", "tpot_s", "e2e_s", "peak_allocated_bytes"):
        assert empty[name] is None, name


def test_requests_that_generated_nothing_have_a_throughput_of_zero_where_time_passed() -> None:
    assert METRICS["output_tok_s"].compute(Repeat(0, 2.0, [sample(), sample()])) == 0.0


def test_the_peak_is_of_the_fullest_device_that_can_tell() -> None:
    devices = [DeviceMemory("cuda:0"), DeviceMemory("cuda:1", peak_allocated_bytes=7), DeviceMemory("cpu")]
    assert METRICS["peak_allocated_bytes"].compute(Repeat(0, 1.0, [], devices)) == 7
    assert METRICS["peak_allocated_bytes"].compute(Repeat(0, 1.0, [], devices[:1])) is None


def test_every_gap_between_tokens_is_an_inter_token_latency() -> None:
    assert itl_s(sample(0.5, 0.75, 1.5)) == [0.25, 0.75]
    assert itl_s(sample(0.5)) == itl_s(sample()) == []
    repeat = Repeat(0, 1.0, [sample(0.5, 0.75, 1.5), sample(1.0, 1.5)])
    assert METRICS["itl_s"].compute(repeat) == 0.5
    assert METRICS["itl_p99_s"].compute(repeat) == pytest.approx(0.745)
    assert METRICS["itl_s"].compute(Repeat(0, 1.0, [sample(0.5)])) is None


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([3.0], 0.99, 3.0),
        ([4.0, 1.0, 3.0, 2.0], 0.5, 2.5),
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0.9, 4.6),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0.0, 1.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 1.0, 5.0),
        ([0.0, 10.0], 0.99, 9.9),
    ],
)
def test_a_percentile_lies_between_the_two_nearest_values(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), share=st.floats(0, 1))
def test_a_percentile_is_within_its_values_and_half_of_them_is_the_median(values: list[float], share: float) -> None:
    assert min(values) <= percentile(values, share) <= max(values)
    assert percentile(values, 0.5) == pytest.approx(statistics.median(values), abs=1e-6)


def test_the_tails_of_the_requests_are_their_percentiles() -> None:
    repeat = Repeat(0, 1.0, [sample(first, first + 1.0) for first in (1.0, 2.0, 3.0, 4.0, 5.0)])
    tails = figures(repeat)
    assert tails["ttft_p90_s"] == pytest.approx(4.6)
    assert tails["ttft_p99_s"] == pytest.approx(4.96)
    assert tails["e2e_p90_s"] == pytest.approx(5.6)
    assert tails["e2e_p99_s"] == pytest.approx(5.96)
    assert tails["tpot_p90_s"] == tails["tpot_p99_s"] == 1.0


def test_prompts_of_one_batch_are_prefilled_together() -> None:
    together = Repeat(0, 1.0, [sample(0.5, 1.0), sample(0.5, 1.0)])
    assert METRICS["prefill_tok_s"].compute(together) == (3 + 3) / 0.5
    one_after_another = Repeat(0, 1.0, [sample(0.5, 1.0), replace(sample(0.25, 1.0), handed_s=1.0)])
    assert METRICS["prefill_tok_s"].compute(one_after_another) == (3 + 3) / 0.75
    assert METRICS["prefill_tok_s"].compute(Repeat(0, 1.0, [sample()])) is None


def test_the_fullest_device_is_told_for_each_kind_of_memory() -> None:
    devices = [
        DeviceMemory("cuda:0", weights_bytes=1, kv_cache_used_bytes=20, peak_reserved_bytes=3, device_used_bytes=40),
        DeviceMemory("cuda:1", weights_bytes=10, kv_cache_used_bytes=2, peak_reserved_bytes=30, device_used_bytes=4),
    ]
    of = figures(Repeat(0, 1.0, [], devices))
    names = ("weights_bytes", "kv_cache_used_bytes", "peak_reserved_bytes", "device_used_bytes")
    assert [of[name] for name in names] == [10, 20, 30, 40]


def test_energy_is_told_by_repeat_and_by_token() -> None:
    repeat = Repeat(0, 1.0, [sample(0.5, 1.0), sample(0.5, 1.0)], energy_j=600.0)
    assert (figures(repeat)["energy_j"], figures(repeat)["energy_per_token_j"]) == (600.0, 150.0)
    unknown = figures(Repeat(0, 1.0, [sample(0.5)]))
    assert (unknown["energy_j"], unknown["energy_per_token_j"]) == (None, None)
    assert figures(Repeat(0, 1.0, [], energy_j=1.0))["energy_per_token_j"] is None


def test_the_share_of_the_bandwidth_is_bytes_a_step_over_its_time_over_the_bandwidth() -> None:
    repeat = Repeat(0, 1.0, [sample(0.5, 0.75, 1.0)], read_bytes_per_step=1e9, memory_bandwidth_bytes_s=8e9)
    assert METRICS["mbu"].compute(repeat) == 1e9 / 0.25 / 8e9
    for missing in ({"read_bytes_per_step": None}, {"memory_bandwidth_bytes_s": None}, {"samples": [sample(0.5)]}):
        assert METRICS["mbu"].compute(replace(repeat, **missing)) is None


def test_several_tokens_a_step_have_no_share_of_the_bandwidth() -> None:
    """Speculative decoding: two steps of 0.25 s give four tokens after the first. 3 GB / (0.5 s / 4) would be 3 times 8 GB/s."""
    drafted = Repeat(0, 1.0, [sample(0.5, 0.75, 0.75, 1.0, 1.0)], read_bytes_per_step=3e9, memory_bandwidth_bytes_s=8e9)
    assert METRICS["mbu"].compute(drafted) is None
    assert METRICS["tpot_s"].compute(drafted) == 0.125
    assert "speculative" in METRICS["mbu"].no_value_where


def test_the_log_probability_is_the_mean_over_the_tokens_and_the_median_over_the_requests() -> None:
    scored = replace(sample(0.5, 1.0), log_probabilities=[-1.0, -3.0])
    assert mean_log_probability(scored) == -2.0
    assert mean_log_probability(sample(0.5)) is None
    others = [replace(sample(0.5), log_probabilities=[value]) for value in (-1.0, -5.0)]
    assert METRICS["mean_log_probability"].compute(Repeat(0, 1.0, [scored, *others, sample()])) == -2.0


@pytest.mark.parametrize(
    ("token_ids", "share"),
    [([1, 2, 3, 4], 0.0), ([1, 1, 1, 1], 2 / 3), ([1, 2, 1, 2], 1 / 3), ([1, 2], 0.0), ([1], None), ([], None)],
)
def test_the_share_of_repeated_bigrams_is_one_less_the_distinct_ones(token_ids: list[int], share: float | None) -> None:
    assert repeated_bigrams(Sample(0, 0, 3, token_ids, [], "length", "")) == pytest.approx(share)


def test_end_tokens_count_as_output() -> None:
    stopped = Sample(0, 0, 3, [11, 12, 2], [0.1, 0.2, 0.3], "stop", "text")
    assert output_tokens(Repeat(0, 1.0, [stopped])) == 3


def test_every_metric_says_its_title_its_unit_its_direction_and_its_definition() -> None:
    for name, metric in METRICS.items():
        assert metric.title and metric.definition, name
        assert metric.better in ("higher", "lower", ""), name
        suffix = {"s": "_s", "B": "_bytes", "tok/s": "_tok_s", "tok": "_tokens"}.get(metric.unit)
        assert suffix is None or name.endswith(suffix), name


# ---------------------------------------------------------------- whole batches


def requests(count: int) -> list[Request]:
    return [Request(index, (index,), 3) for index in range(count)]


@pytest.mark.parametrize(
    ("prompts", "batch_size", "order"),
    [
        (1, 1, [0]),
        (3, 1, [0, 1, 2]),
        (1, 4, [0, 0, 0, 0]),
        (3, 2, [0, 1, 2, 0]),
        (2, 5, [0, 1, 0, 1, 0]),
        (4, 2, [0, 1, 2, 3]),
        (0, 3, []),
    ],
)
def test_prompts_are_repeated_from_the_start_to_fill_whole_batches(
    prompts: int, batch_size: int, order: list[int]
) -> None:
    assert [size.prompt for size in sizes_of(run_of(batch_size=batch_size), [1] * prompts)] == order


@settings(max_examples=50, deadline=None)
@given(prompts=st.integers(1, 40), batch_size=st.integers(1, 70))
def test_every_prompt_is_asked_and_no_batch_more_than_needed(prompts: int, batch_size: int) -> None:
    filled = [size.prompt for size in sizes_of(run_of(batch_size=batch_size), [1] * prompts)]
    assert filled[:prompts] == list(range(prompts))
    assert len(filled) % batch_size == 0
    assert len(filled) - prompts < batch_size


# ---------------------------------------------------------------- the measured window


@dataclass
class ScriptedClock:
    """A fake clock: it stands still until the engine below moves it."""

    now: float = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class FakeEngine:
    """An engine that computes nothing: it moves the scripted clock by known times, and counts what it was asked.

    The first token of a batch takes `first_s`, each later one `gap_s`, the end of a batch `idle_s`; the first
    `cold_batches` batches take a hundred times as long. All that is not generation takes `aside_s`.
    """

    OPTIONS: ClassVar[dict[str, type]] = {}
    PARALLEL: ClassVar[tuple[str, ...]] = ("layers",)
    DEFAULTS: ClassVar[dict[str, object]] = {}
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {}
    clock: ScriptedClock
    lengths: Sequence[int] = (3,)
    first_s: float = 0.5
    gap_s: float = 0.25
    idle_s: float = 0.125
    aside_s: float = 64.0
    cold_batches: int = 0
    batches: list[list[Request]] = field(default_factory=list)
    loads: list[Arrivals] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)
    asked: list[tuple[int, bool]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    scored: list[tuple[int, int]] = field(default_factory=list)
    contexts: list[tuple[float, int]] = field(default_factory=list)

    @classmethod
    def foreseen(cls, job: JobSpec, config: Any, packages: Mapping[str, str] | None) -> Iterator[Refusal]:
        yield from ()

    def load(self) -> tuple[float, float]:
        return 1.0, 1.0

    def encode(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        self.clock.now += self.aside_s
        return [tuple(map(ord, prompt)) for prompt in prompts]

    def decode(self, token_ids: Sequence[int]) -> str:
        self.clock.now += self.aside_s
        return " ".join(map(str, token_ids))

    def log_probabilities(self, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float] | None:
        self.clock.now += self.aside_s
        self.scored.append((prompt[0] - ord("a"), len(token_ids)))
        return [-0.5 - self.scored[-1][0]] * len(token_ids)

    def generate(self, requests: Sequence[Request], how: Generation) -> Answers:
        self.calls.append("generate")
        self.loads.append(how.arrivals)
        self.seeds.append(how.sampling.seed)
        self.asked.append((requests[0].max_new_tokens, how.ignore_eos))
        for token in range(self.lengths[0]) if how.on_token else ():
            how.on_token(token)
        generated = in_static_batches(requests, replace(how.arrivals, times_s=None), self.generate_batch)

        def answers() -> list[Generated]:
            self.clock.now += self.aside_s
            return generated

        return answers

    def generate_batch(self, requests: Sequence[Request]) -> list[Generated]:
        slow = 100.0 if len(self.batches) < self.cold_batches else 1.0
        self.batches.append(list(requests))
        handed_at = self.clock.now
        lengths = [self.lengths[request.prompt % len(self.lengths)] for request in requests]
        times = [
            self.clock.now + slow * (self.first_s + self.gap_s * token) for token in range(max(lengths, default=0))
        ]
        self.clock.now = (times[-1] if times else self.clock.now) + slow * self.idle_s
        return [
            Generated(list(range(length)), times[:length], "length", len(request.token_ids), handed_at)
            for request, length in zip(requests, lengths, strict=True)
        ]

    def reset(self) -> None:
        self.calls.append("reset")

    def counts(self) -> EngineCounts:
        return EngineCounts()

    def memory(self) -> list[DeviceMemory]:
        self.clock.now += self.aside_s
        self.calls.append("memory")
        return [DeviceMemory("cpu", peak_allocated_bytes=len(self.calls))]

    def read_bytes_per_step(self, context_tokens: float, requests: int) -> float | None:
        self.contexts.append((context_tokens, requests))
        return 1e9

    def gpus_at_once(self, requests: int) -> int:
        return 1

    def fingerprint(self) -> EngineFingerprint:
        return EngineFingerprint()

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ScriptedClock:
    """measure reads this clock instead of the machine's."""
    scripted = ScriptedClock()
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=scripted.perf_counter))
    return scripted


def run_of(**values: Any) -> RunSpec:
    return RunSpec(**{"run_id": "r", "definition": {}, "prompt_set": "p", "max_new_tokens": 3, **values})


SILENT = Watch(lambda phase: None)


def measure_run(
    engine: Engine, run: RunSpec, prompts: Sequence[Prompt], gpus: Sequence[Gpu], watch: Watch
) -> tuple[float | None, list[Repeat]]:
    return measure.measure_run(Requests(engine, run, prompts), gpus, watch)


def test_the_wall_time_is_generation_alone(clock: ScriptedClock) -> None:
    engine = FakeEngine(clock)
    _, (repeat,) = measure_run(engine, run_of(repeats=1), ["a", "b"], (), SILENT)
    one_batch = 0.5 + 2 * 0.25 + 0.125
    assert repeat.wall_s == 2 * one_batch  # not the 64 s of each encoding, decoding and reading of memory
    assert figures(repeat)["output_tok_s"] == 6 / (2 * one_batch)


def test_times_count_from_handing_over_ones_own_batch(clock: ScriptedClock) -> None:
    _, (repeat,) = measure_run(FakeEngine(clock), run_of(repeats=1), ["a", "b"], (), SILENT)
    assert [sample.token_times_s for sample in repeat.samples] == [[0.5, 0.75, 1.0]] * 2
    assert (figures(repeat)["ttft_s"], figures(repeat)["tpot_s"], figures(repeat)["e2e_s"]) == (0.5, 0.25, 1.0)


def test_warm_up_is_never_counted(clock: ScriptedClock) -> None:
    engine = FakeEngine(clock, cold_batches=2)
    warmup_s, repeats = measure_run(engine, run_of(warmup=2, repeats=3), ["a"], (), SILENT)
    one_pass = 0.5 + 2 * 0.25 + 0.125
    assert [repeat.wall_s for repeat in repeats] == [one_pass] * 3
    assert [repeat.repeat for repeat in repeats] == [0, 1, 2]
    assert warmup_s >= 2 * 100 * one_pass
    assert len(engine.batches) == 5


def test_a_run_without_warm_up_measures_its_first_pass(clock: ScriptedClock) -> None:
    engine = FakeEngine(clock, cold_batches=1)
    warmup_s, repeats = measure_run(engine, run_of(warmup=0, repeats=2), ["a"], (), SILENT)
    assert warmup_s == 0
    assert [repeat.wall_s for repeat in repeats] == [112.5, 1.125]


def test_the_phases_are_told_before_they_begin(clock: ScriptedClock) -> None:
    engine = FakeEngine(clock)
    told: list[tuple[str, int]] = []
    watch = Watch(lambda phase: told.append((phase, len(engine.batches))))
    measure_run(engine, run_of(warmup=2, repeats=1), ["a"], (), watch)
    assert told == [("warm-up", 0), ("measuring", 2), ("scoring", 3)]


def test_each_repeat_of_a_sampled_run_draws_with_another_seed_and_records_it(clock: ScriptedClock) -> None:
    engine = FakeEngine(clock)
    run = run_of(warmup=1, repeats=3, sampling=Sampling(temperature=0.7, seed=40))
    _, repeats = measure_run(engine, run, ["a"], (), SILENT)
    expected = [draw_seed(40, repeat, "tokens") for repeat in (0, 1, 2)]
    assert [repeat.seed for repeat in repeats] == expected
    assert engine.seeds == [draw_seed(40, -1, "tokens"), *expected]
    assert run.sampling.seed == 40


def test_a_sampled_run_without_a_seed_records_the_seeds_that_it_took(clock: ScriptedClock) -> None:
    engine = FakeEngine(clock)
    _, repeats = measure_run(engine, run_of(repeats=3, sampling=Sampling(temperature=1.0)), ["a"], (), SILENT)
    seeds = [repeat.seed for repeat in repeats]
    assert None not in seeds
    assert len(set(seeds)) == 3
    assert engine.seeds[1:] == seeds


def test_a_seed_of_draws_is_the_beginning_of_a_sha256() -> None:
    assert draw_seed(7, 2, "tokens") == int(hashlib.sha256(b"tokens 7 2").hexdigest()[:8], 16) == 3561595034
    assert draw_seed(None, 0, "arrivals") == draw_seed(0, 0, "arrivals")


def test_no_two_seeds_share_a_repeats_draws() -> None:
    drawn = [
        draw_seed(seed, repeat, what)
        for seed in range(40)
        for repeat in range(-2, 8)
        for what in ("tokens", "arrivals")
    ]
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= seed < 2**32 for seed in drawn)


def test_seeds_have_arrivals_of_their_own_and_greedy_runs_those_of_seed_0() -> None:
    def arrivals(repeat: int, **sampling: Any) -> Any:
        return arrivals_of(run_of(request_rate=4.0, sampling=Sampling(**sampling)), 5, repeat).times_s

    assert arrivals(0, temperature=1.0, seed=1) != arrivals(1, temperature=1.0, seed=0)
    assert arrivals(2) == arrivals(2, temperature=1.0, seed=0) != arrivals(3)


def test_a_greedy_run_keeps_the_seed_that_was_asked(clock: ScriptedClock) -> None:
    engine = FakeEngine(clock)
    _, repeats = measure_run(engine, run_of(repeats=2), ["a"], (), SILENT)
    assert [repeat.seed for repeat in repeats] == [None, None]


def test_a_batch_size_is_the_number_of_requests_in_flight_at_once(clock: ScriptedClock) -> None:
    engine = FakeEngine(clock, lengths=(3, 1, 2))
    _, (repeat,) = measure_run(engine, run_of(warmup=0, repeats=1, batch_size=2), ["a", "bb", "ccc"], (), SILENT)
    assert [[request.prompt for request in batch] for batch in engine.batches] == [[0, 1], [2, 0]]
    assert [sample.request for sample in repeat.samples] == [0, 1, 2, 3]
    assert [sample.handed_s for sample in repeat.samples] == [0, 0, 1.125, 1.125]
    assert [sample.prompt for sample in repeat.samples] == [0, 1, 2, 0]
    assert [sample.prompt_tokens for sample in repeat.samples] == [1, 2, 3, 1]
    assert [len(sample.token_ids) for sample in repeat.samples] == [3, 1, 2, 3]
    assert [sample.text for sample in repeat.samples] == ["0 1 2", "0", "0 1", "0 1 2"]
    assert figures(repeat)["output_tokens"] == 9
    assert figures(repeat)["output_tok_s"] == 9 / (2 * (0.5 + 2 * 0.25 + 0.125))


def test_the_run_is_asked_for_as_it_was_specified(clock: ScriptedClock) -> None:
    engine = FakeEngine(clock)
    measure_run(engine, run_of(max_new_tokens=17, ignore_eos=True, warmup=1, repeats=1), ["a"], (), SILENT)
    assert engine.asked == [(17, True)] * 2


def test_the_peak_of_memory_begins_anew_with_every_pass_and_is_read_after_it(clock: ScriptedClock) -> None:
    engine = FakeEngine(clock)
    _, repeats = measure_run(engine, run_of(warmup=1, repeats=2), ["a", "b"], (), SILENT)
    assert engine.calls == ["reset", "generate", "memory"] * 3
    assert [repeat.devices[0].peak_allocated_bytes for repeat in repeats] == [6, 9]


def test_a_repeat_is_recorded_as_raw_values_and_no_metrics(clock: ScriptedClock) -> None:
    _, repeats = measure_run(FakeEngine(clock, lengths=(4, 2)), run_of(batch_size=2), ["a", "b"], (), SILENT)
    for repeat in repeats:
        assert "metrics" not in repeat.to_json()
        assert Repeat.from_json(repeat.to_json()) == repeat


def test_log_probabilities_are_asked_outside_the_window_and_once_for_equal_answers(clock: ScriptedClock) -> None:
    engine = FakeEngine(clock, lengths=(3, 1))
    _, repeats = measure_run(engine, run_of(repeats=3, batch_size=4), ["a", "b"], (), SILENT)
    assert engine.scored == [(0, 3), (1, 1)]
    for repeat in repeats:
        assert repeat.wall_s == 1.125
        assert [sample.log_probabilities for sample in repeat.samples] == [[-0.5] * 3, [-1.5]] * 2
        assert figures(repeat)["mean_log_probability"] == -1.0


def test_at_a_request_rate_requests_come_as_a_poisson_process_the_same_in_every_run(clock: ScriptedClock) -> None:
    asked = run_of(request_rate=4.0, requests=2000, batch_size=8)
    first, again, other = (arrivals_of(asked, 2000, repeat) for repeat in (0, 0, 1))
    assert first == again != other
    assert first.in_flight == 8
    assert first.times_s is not None
    gaps = [later - earlier for earlier, later in itertools.pairwise(first.times_s)]
    assert first.times_s[0] == 0.0
    assert statistics.fmean(gaps) == pytest.approx(1 / 4, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 4, rel=0.1)  # of exponential gaps, mean and deviation are one
    assert arrivals_of(run_of(batch_size=3), 9, 0) == Arrivals(3)


@pytest.mark.parametrize("burstiness", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("repeat", range(4))
def test_the_mean_rate_of_few_requests_is_the_one_that_was_asked(repeat: int, burstiness: float) -> None:
    """As the gaps were drawn, 12 requests of repeat 0 came at more than twice the rate."""
    times_s = arrivals_of(run_of(request_rate=0.1, burstiness=burstiness), 12, repeat).times_s
    assert times_s is not None
    assert times_s[-1] == pytest.approx(11 / 0.1)
    assert arrivals_of(run_of(request_rate=0.1), 1, repeat).times_s == (0.0,)


def test_a_pass_sends_as_many_requests_as_were_asked_for(clock: ScriptedClock) -> None:
    engine = FakeEngine(clock)
    _, (repeat,) = measure_run(engine, run_of(warmup=0, repeats=1, batch_size=2, requests=5), ["a", "b"], (), SILENT)
    assert [sample.prompt for sample in repeat.samples] == [0, 1, 0, 1, 0]
    assert [len(batch) for batch in engine.batches] == [2, 2, 1]


def test_a_request_that_comes_while_a_static_batch_runs_waits_since_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ScriptedClock()
    monkeypatch.setattr(base, "time", clock)
    batches: list[list[int]] = []

    def generate_batch(batch: Sequence[Request]) -> list[Generated]:
        batches.append([request.prompt for request in batch])
        handed_at = clock.now
        clock.sleep(0.05)
        return [Generated([1], [clock.now], "stop", 1, handed_at) for _ in batch]

    came = (0.0, 0.01, 0.02, 0.03, 0.2)
    given = in_static_batches(requests(5), Arrivals(2, came), generate_batch)
    assert batches == [[0], [1, 2], [3], [4]]
    waits = [answer.token_times[0] - answer.handed_at for answer in given]
    assert [answer.handed_at - given[0].handed_at for answer in given] == pytest.approx(came)
    assert waits == pytest.approx([0.05, 0.09, 0.08, 0.12, 0.05])
    # The first batch ends at 0.05 and the second at 0.10, which is when the next one begins.
    assert [answer.queued_s for answer in given] == pytest.approx([0.0, 0.04, 0.03, 0.07, 0.0])


def test_in_batches_a_request_is_handed_over_when_there_is_a_place_and_waits_for_nothing() -> None:
    given = in_static_batches(
        requests(3), Arrivals(2), lambda batch: [Generated([1], [2.0], "stop", 1, 1.0) for _ in batch]
    )
    assert [answer.queued_s for answer in given] == [None] * 3


def test_waiting_in_the_engine_is_no_prefill() -> None:
    late = replace(sample(0.5, 1.0), queued_s=0.25)
    assert METRICS["prefill_tok_s"].compute(Repeat(0, 1.0, [late])) == 3 / 0.25
    assert METRICS["queued_s"].compute(Repeat(0, 1.0, [late])) == 0.25


def test_static_batches_at_a_rate_prefill_at_the_engines_speed_and_not_at_that_of_the_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1000 prompt tokens a request, one request at a time: 0.1 s to its first token, 3 s for the rest; four come in the first
    second. By hand: 4 x 1000 tokens in 4 x 0.1 s of prefill."""
    clock = ScriptedClock()
    monkeypatch.setattr(base, "time", clock)

    def generate_batch(batch: Sequence[Request]) -> list[Generated]:
        handed_at = clock.now
        clock.sleep(0.1)
        first = clock.now
        clock.sleep(3.0)
        return [Generated([1, 2], [first, clock.now], "length", 1000, handed_at) for _ in batch]

    asked = [Request(number, (7,) * 1000, 2) for number in range(4)]
    given = in_static_batches(asked, Arrivals(1, (0.0, 0.25, 0.5, 0.75)), generate_batch)
    names = FakeEngine(clock, aside_s=0.0)
    samples = [measure._sample(names, n, asked[n], answer, 1000.0) for n, answer in enumerate(given)]
    repeat = Repeat(0, clock.now - 1000.0, samples)
    assert figures(repeat)["prefill_tok_s"] == pytest.approx(4 * 1000 / (4 * 0.1))
    # Request n comes at n / 4 and begins at n x 3.1: waits of 0, 2.85, 5.7 and 8.55 s.
    assert figures(repeat)["queued_s"] == pytest.approx((2.85 + 5.7) / 2)
    assert figures(repeat)["ttft_s"] == pytest.approx((2.85 + 5.7) / 2 + 0.1)


def test_a_prompt_of_another_length_in_the_engine_fails_the_run(clock: ScriptedClock) -> None:
    """Fault injection: the engine's tokenizer adds a token."""

    class AddsOne(FakeEngine):
        def generate_batch(self, requests: Sequence[Request]) -> list[Generated]:
            return [
                replace(answer, prompt_tokens=answer.prompt_tokens + 1) for answer in super().generate_batch(requests)
            ]

    with pytest.raises(Refusal, match="engine changed the prompt of request 0: 2 tokens sent, 3 read"):
        measure_run(AddsOne(clock), run_of(), ["ab"], (), SILENT)


def test_gpus_that_work_at_once_read_with_all_their_bandwidth(clock: ScriptedClock) -> None:
    class Tensor(FakeEngine):
        def gpus_at_once(self, requests: int) -> int:
            return 2

    _, (repeat,) = measure_run(Tensor(clock), run_of(repeats=1), ["a"], GPUS, SILENT)
    assert repeat.memory_bandwidth_bytes_s == 8e12


def test_micro_batches_read_the_weights_once_each_and_every_sequence_once(clock: ScriptedClock) -> None:
    """Two stages on two GPUs with 4 sequences in two micro-batches: a step of all 4 takes 0.25 s, in which each GPU reads its
    half of 1 GB of weights twice and the keys and values of all 4 sequences (0.1 GB each, both halves). By hand: (2 x 1 GB +
    4 x 0.1 GB) / 0.25 s / (2 x 4 TB/s)."""

    class TwoStages(FakeEngine):
        def gpus_at_once(self, requests: int) -> int:
            return 2 if requests >= 4 else 1

        def read_bytes_per_step(self, context_tokens: float, requests: int) -> float | None:
            return self.gpus_at_once(requests) * 1e9 + requests * 1e8

    _, (repeat,) = measure_run(TwoStages(clock), run_of(repeats=1, batch_size=4), ["a"], GPUS, SILENT)
    assert (repeat.read_bytes_per_step, repeat.memory_bandwidth_bytes_s) == (2.4e9, 8e12)
    assert figures(repeat)["mbu"] == pytest.approx(2.4e9 / 0.25 / 8e12)
    _, (repeat,) = measure_run(TwoStages(clock), run_of(repeats=1, batch_size=2), ["a"], GPUS, SILENT)
    assert figures(repeat)["mbu"] == pytest.approx(1.2e9 / 0.25 / 4e12)  # one after the other: one GPU's bandwidth


def test_the_bytes_of_a_step_are_asked_at_the_mean_context(clock: ScriptedClock) -> None:
    engine = FakeEngine(clock, lengths=(4, 2))
    _, (repeat,) = measure_run(engine, run_of(warmup=0, repeats=1, batch_size=2), ["aa", "bbbb"], (), SILENT)
    assert engine.contexts == [((4 * (2 + 4 / 2) + 2 * (4 + 2 / 2)) / 6, 2)]  # 4 steps of one, 2 of the other
    assert repeat.read_bytes_per_step == 1e9
    assert repeat.memory_bandwidth_bytes_s is None


GPUS = [Gpu(index, f"GPU-{index}", "H100", "9.0", 80 * 2**30, "580", 4e12) for index in (0, 1)]


def test_energy_is_counted_around_generation_alone(clock: ScriptedClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake counter: the GPUs take 100 W together, whatever they do."""
    monkeypatch.setattr(measure.hardware, "energy_j", lambda gpus: 100.0 * clock.now)
    _, (repeat,) = measure_run(FakeEngine(clock), run_of(repeats=1), ["a", "b"], GPUS, SILENT)
    assert repeat.energy_j == pytest.approx(100 * repeat.wall_s)
    assert figures(repeat)["mbu"] == 1e9 / 0.25 / 4e12


@pytest.mark.parametrize("answers", [[1.0, None], [None] * 2, [None, 1.0]])
def test_energy_that_was_not_counted_all_the_time_is_not_known(
    clock: ScriptedClock, monkeypatch: pytest.MonkeyPatch, answers: list[float | None]
) -> None:
    """A fake counter that does not always answer."""
    told = iter(answers)
    monkeypatch.setattr(measure.hardware, "energy_j", lambda gpus: next(told))
    _, (repeat,) = measure_run(FakeEngine(clock), run_of(warmup=0, repeats=1), ["a", "b"], GPUS, SILENT)
    assert repeat.energy_j is None
    assert figures(repeat)["energy_per_token_j"] is None


def test_the_text_is_typed_as_it_comes_in_the_first_warm_up_alone(clock: ScriptedClock) -> None:
    engine = FakeEngine(clock)
    typed: list[tuple[int, str]] = []
    watch = Watch(lambda phase: None, lambda text: typed.append((len(engine.loads), text)))
    _, repeats = measure_run(engine, run_of(warmup=2, repeats=2), ["a", "b"], (), watch)
    assert "".join(text for _, text in typed) == repeats[0].samples[0].text == "0 1 2"
    assert {pass_ for pass_, _ in typed} == {1}
    assert [repeat.wall_s for repeat in repeats] == [2 * 1.125] * 2


def test_a_letter_that_is_two_tokens_is_typed_when_it_is_whole(clock: ScriptedClock) -> None:
    class HalfLetters(FakeEngine):
        def decode(self, token_ids: Sequence[int]) -> str:
            return "ö" * (len(token_ids) // 2) + "\ufffd" * (len(token_ids) % 2)

    typed: list[str] = []
    watch = Watch(lambda phase: None, typed.append)
    measure_run(HalfLetters(clock, lengths=(6,)), run_of(warmup=1, repeats=1), ["a"], (), watch)
    assert typed == ["ö", "ö", "ö"]


def test_two_batches_that_took_equally_long_are_two_batches(clock: ScriptedClock) -> None:
    _, (repeat,) = measure_run(FakeEngine(clock), run_of(repeats=1), ["abc", "def"], (), SILENT)
    assert figures(repeat)["prefill_tok_s"] == (3 + 3) / (0.5 + 0.5)


def test_a_run_whose_scoring_fails_keeps_what_was_measured(clock: ScriptedClock) -> None:
    """Fault injection: the memory is too small for the logits of a whole answer."""

    class NoRoomToScore(FakeEngine):
        def log_probabilities(self, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float] | None:
            raise RuntimeError("CUDA out of memory")

    _, repeats = measure_run(NoRoomToScore(clock), run_of(repeats=2), ["a"], (), SILENT)
    assert [figures(repeat)["output_tokens"] for repeat in repeats] == [3, 3]
    assert figures(repeats[0])["mean_log_probability"] is None


class Overflowing(FakeEngine):
    """Fault injection: the logits are not numbers, as where a bfloat16 checkpoint overflows in float16."""

    def log_probabilities(self, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float] | None:
        return [math.nan, -math.inf, -1.0][-len(token_ids) :]


@pytest.mark.parametrize(
    ("dtype", "capability", "remedy"),
    [
        ("float16", "9.0", "use --dtype bfloat16, which has float32's range, or --dtype float32"),
        ("float16", "7.0", "use --dtype float32"),
        ("float16", None, "use --dtype float32"),
        ("bfloat16", "9.0", "use --dtype float32"),
        ("float32", "9.0", "check the checkpoint: its weights overflow float32, or some are NaN"),
    ],
)
def test_logits_that_are_not_finite_fail_the_run_and_name_a_dtype_that_does(
    clock: ScriptedClock, dtype: str, capability: str | None, remedy: str
) -> None:
    gpus = [] if capability is None else [replace(GPUS[0], capability=capability)]
    with pytest.raises(Refusal) as refusal:
        measure_run(Overflowing(clock), run_of(definition={"dtype": dtype}), ["a"], gpus, SILENT)
    assert refusal.value.kind == "logits-not-finite"
    assert refusal.value.message == f"the model's logits are not finite: dtype {dtype}"
    assert refusal.value.remedy == remedy


def test_nothing_is_drawn_from_logits_that_are_not_finite(clock: ScriptedClock) -> None:
    class OnlyNan(Overflowing):
        def log_probabilities(self, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float] | None:
            return [math.nan] * len(token_ids)

    engine = OnlyNan(clock)
    with pytest.raises(Refusal, match="not finite"):
        measure_run(engine, run_of(sampling=Sampling(temperature=1.0)), ["a"], (), SILENT)
    assert engine.batches == []


@dataclass
class SuspendedEngine(FakeEngine):
    """Fault injection: the job is suspended in passes number `suspended`, warm-ups included; each then takes a minute longer."""

    suspended: Sequence[int] = ()

    def generate(self, requests: Sequence[Request], how: Generation) -> Answers:
        if len(self.seeds) in self.suspended:
            self.clock.now += 60.0
            measure.suspensions.note(signal.SIGCONT, None)
        return super().generate(requests, how)


def test_a_repeat_in_which_the_job_was_suspended_is_discarded_and_measured_again(clock: ScriptedClock) -> None:
    engine = SuspendedEngine(clock, suspended=(2, 3))
    run = run_of(warmup=1, repeats=3, sampling=Sampling(temperature=1.0, seed=5))
    warmup_s, repeats = measure_run(engine, run, ["a"], (), SILENT)
    assert [repeat.wall_s for repeat in repeats] == [1.125] * 3
    assert [(repeat.repeat, repeat.discarded) for repeat in repeats] == [(0, 0), (1, 2), (2, 0)]
    assert engine.seeds == [draw_seed(5, repeat, "tokens") for repeat in (-1, 0, 1, 1, 1, 2)]
    assert warmup_s is not None


def test_a_warm_up_in_which_the_job_was_suspended_has_no_time(clock: ScriptedClock) -> None:
    warmup_s, repeats = measure_run(SuspendedEngine(clock, suspended=(0,)), run_of(repeats=1), ["a"], (), SILENT)
    assert warmup_s is None
    assert [repeat.wall_s for repeat in repeats] == [1.125]


def test_a_job_that_is_suspended_in_every_pass_fails_and_says_so(clock: ScriptedClock) -> None:
    engine = SuspendedEngine(clock, suspended=range(100))
    with pytest.raises(Refusal, match="suspended in every attempt at repeat 0: 6 times") as refusal:
        measure_run(engine, run_of(warmup=0), ["a"], (), SILENT)
    assert (refusal.value.kind, len(engine.batches)) == ("suspended", 6)


def test_a_time_limit_that_comes_while_scoring_ends_the_run(clock: ScriptedClock) -> None:
    """Fault injection: the alarm goes off in the scoring pass."""

    class TooLate(FakeEngine):
        def log_probabilities(self, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float] | None:
            raise TimeLimit("the job did not end within its 1 s")

    with pytest.raises(TimeLimit):
        measure_run(TooLate(clock), run_of(repeats=1), ["a"], (), SILENT)


def test_an_engine_that_answers_fewer_requests_than_it_was_given_is_an_error(clock: ScriptedClock) -> None:
    """Fault injection: the engine loses a request."""

    class Forgetful(FakeEngine):
        def generate(self, requests: Sequence[Request], how: Generation) -> Answers:
            answers = super().generate(requests, how)
            return lambda: answers()[1:]

    with pytest.raises(ValueError, match="shorter"):
        measure_run(Forgetful(clock), run_of(batch_size=2), ["a", "b"], (), SILENT)


def test_the_fake_engine_has_all_that_labctl_asks_of_an_engine() -> None:
    assert {name for name in vars(Engine) if not name.startswith("_")} <= set(dir(FakeEngine))


# ---------------------------------------------------------------- repeats until the interval is narrow


@dataclass
class Scattering(FakeEngine):
    """Each pass takes a time of its own, drawn with this relative deviation."""

    deviation: float = 0.0
    draw: random.Random = field(default_factory=lambda: random.Random(5))

    def generate_batch(self, requests: Sequence[Request]) -> list[Generated]:
        self.idle_s = max(0.0, 0.125 + self.draw.gauss(0.0, self.deviation * 1.125))
        return super().generate_batch(requests)


@pytest.mark.parametrize(("deviation", "fewest", "most"), [(0.001, 5, 5), (0.01, 5, 12), (0.03, 20, 60)])
def test_repeats_end_where_the_interval_is_as_narrow_as_asked(
    clock: ScriptedClock, deviation: float, fewest: int, most: int
) -> None:
    run = run_of(until=0.01)
    _, repeats = measure_run(Scattering(clock, deviation=deviation), run, ["a"], (), SILENT)
    assert fewest <= len(repeats) <= most
    found = until_of(run, repeats)
    assert found
    assert (found.target, found.stopped_by, found.reached) == (0.01, "target", True)
    # Checked with Student's t from a table, and without logarithms.
    rates = [3 / repeat.wall_s for repeat in repeats]
    t_975 = {4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 11: 2.201}.get(len(rates) - 1, 2.02)
    expected = t_975 * statistics.stdev(rates) / math.sqrt(len(rates)) / statistics.fmean(rates)
    assert found.half_width == pytest.approx(expected, rel=0.05)
    assert found.half_width <= 0.01
    if len(repeats) > 5:  # one repeat fewer was not enough
        assert (half_width_of(repeats[:-1]) or 1.0) > 0.01


def test_a_noisy_engine_ends_at_the_most_repeats_and_the_record_says_so(clock: ScriptedClock) -> None:
    run = run_of(until=0.01, max_repeats=9)
    _, repeats = measure_run(Scattering(clock, deviation=0.1), run, ["a"], (), SILENT)
    found = until_of(run, repeats)
    assert (len(repeats), found.stopped_by, found.reached) == (9, "repeats", False)
    assert found.half_width > 0.01


def test_a_noisy_engine_ends_before_its_deadline_and_the_record_says_so(clock: ScriptedClock) -> None:
    run = run_of(until=0.001, warmup=0)
    watch = replace(SILENT, deadline=clock.now + 1500.0)
    _, repeats = measure_run(Scattering(clock, deviation=0.05), run, ["a"], (), watch)
    found = until_of(run, repeats)
    assert clock.now <= 1500.0 + 1000.0 + 64.0 * len(repeats)
    assert (found.stopped_by, found.reached) == ("time", False)
    assert 3 <= len(repeats) < 30


def test_the_repeats_that_were_asked_for_are_measured_also_after_the_deadline(clock: ScriptedClock) -> None:
    run = run_of(until=0.01, repeats=4)
    watch = replace(SILENT, deadline=clock.now)
    _, repeats = measure_run(Scattering(clock, deviation=0.05), run, ["a"], (), watch)
    assert len(repeats) == 4
    assert until_of(run, repeats).stopped_by == "time"


def test_without_until_the_number_of_repeats_is_as_asked_whatever_their_scatter(clock: ScriptedClock) -> None:
    run = run_of(repeats=2)
    watch = replace(SILENT, deadline=clock.now)
    _, repeats = measure_run(Scattering(clock, deviation=0.3), run, ["a"], (), watch)
    assert len(repeats) == 2
    assert until_of(run, repeats) is None
