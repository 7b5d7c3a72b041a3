"""The measurement (warm-up, repeats, clock readings), and the metrics.

A metric is one entry in METRICS. Records hold raw values only; metrics are computed when a record is read. So a new metric or
a corrected definition also applies to old records.
"""

from __future__ import annotations

import itertools
import math
import operator
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import FrameType
from typing import TYPE_CHECKING

from labctl_workers import hardware
from labctl_workers.engines.base import Arrivals, Engine, Generated, Generation, Request, ServedAnswers
from labctl_workers.record import (
    ClientReport,
    Dataset,
    EngineCounts,
    InputFingerprint,
    LatencyLimit,
    Prompt,
    Refusal,
    Repeat,
    RunSpec,
    Sample,
    Until,
    Workload,
    sha256_of_json,
)
from labctl_workers.workload import Size, are_random, draw_seed, entries_of, random_prompt, sizes_of

if TYPE_CHECKING:
    from labctl_workers.telemetry import TelemetrySampler

# ---------------------------------------------------------------- values of one request


def ttft_s(sample: Sample) -> float | None:
    """Time to first token: from sending the request to its first token, in seconds."""
    return sample.token_times_s[0] if sample.token_times_s else None


def e2e_s(sample: Sample) -> float | None:
    """End-to-end latency: from sending the request to its last token, in seconds."""
    return sample.token_times_s[-1] if sample.token_times_s else None


def tpot_s(sample: Sample) -> float | None:
    """Time per output token after the first: (end-to-end - ttft) / (output tokens - 1), in seconds."""
    tokens = len(sample.token_times_s)
    if tokens < 2:
        return None
    return (sample.token_times_s[-1] - sample.token_times_s[0]) / (tokens - 1)


def itl_s(sample: Sample) -> list[float]:
    """Inter-token latencies: the gaps between neighbouring tokens, in seconds."""
    times = sample.token_times_s
    return list(map(operator.sub, times[1:], times))


def mean_log_probability(sample: Sample) -> float | None:
    """Mean natural log-probability of the generated tokens."""
    return math.fsum(sample.log_probabilities) / len(sample.log_probabilities) if sample.log_probabilities else None


def repeated_bigrams(sample: Sample) -> float | None:
    """Share of token pairs that occurred earlier in the answer: 1 - distinct / all."""
    pairs = list(itertools.pairwise(sample.token_ids))
    return 1 - len(set(pairs)) / len(pairs) if pairs else None


def percentile(values: Sequence[float], share: float) -> float:
    """The percentile, interpolated between the two nearest values as numpy does by default; `share` is from 0 to 1."""
    return _percentile_of_sorted(sorted(values), share)


def _percentile_of_sorted(ordered: Sequence[float], share: float) -> float:
    position = (len(ordered) - 1) * share
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


# ---------------------------------------------------------------- metrics of one repeat


class Figures:
    """The values that the metrics of one repeat share, each computed once.

    Lists have one value for each sample, in order; None where a request has no such value.
    """

    def __init__(self, repeat: Repeat) -> None:
        self.repeat = repeat
        self.ttft_s = [ttft_s(sample) for sample in repeat.samples]
        self.tpot_s = [tpot_s(sample) for sample in repeat.samples]
        self.e2e_s = [e2e_s(sample) for sample in repeat.samples]
        self.queued_s = [sample.queued_s for sample in repeat.samples]
        self._ordered: dict[str, list[float]] = {}

    @cached_property
    def mean_log_probability(self) -> list[float | None]:
        return [mean_log_probability(sample) for sample in self.repeat.samples]

    @cached_property
    def repeated_bigrams(self) -> list[float | None]:
        return [repeated_bigrams(sample) for sample in self.repeat.samples]

    @cached_property
    def gaps_s(self) -> list[float]:
        """The inter-token latencies of all requests, ascending."""
        return sorted(itertools.chain.from_iterable(map(itl_s, self.repeat.samples)))

    @cached_property
    def output_tokens(self) -> int:
        return output_tokens(self.repeat)

    def ordered(self, name: str) -> list[float]:
        """The values of this list that are not None, ascending."""
        if name not in self._ordered:
            values: Iterable[float | None] = getattr(self, name)
            self._ordered[name] = sorted([value for value in values if value is not None])
        return self._ordered[name]


@dataclass(frozen=True)
class Metric:
    """A metric of one repeat. `better` is "higher", "lower" or "" (neither). `of` returns None where the metric is undefined,
    such as the time between tokens of a one-token answer; `no_value_where` explains the less obvious cases.

    Raise `version` by one with every change of `of`: databases then compute the metric again.
    """

    title: str
    unit: str
    better: str
    definition: str
    of: Callable[[Figures], float | None]
    version: int = 1
    no_value_where: str = ""

    def compute(self, repeat: Repeat) -> float | None:
        return self.of(Figures(repeat))


def metrics_of(figures: Figures) -> dict[str, float | None]:
    """Every metric of a repeat, by name. A value that is not finite (from a damaged record) becomes None."""
    return {
        name: value if (value := metric.of(figures)) is None or math.isfinite(value) else None
        for name, metric in METRICS.items()
    }


def _over_requests(name: str, share: float = 0.5) -> Callable[[Figures], float | None]:
    def of(figures: Figures) -> float | None:
        ordered = figures.ordered(name)
        return _percentile_of_sorted(ordered, share) if ordered else None

    return of


def _over_gaps(share: float) -> Callable[[Figures], float | None]:
    def of(figures: Figures) -> float | None:
        return _percentile_of_sorted(figures.gaps_s, share) if figures.gaps_s else None

    return of


def output_tokens(repeat: Repeat) -> int:
    """The generated tokens of all requests, end tokens included."""
    return sum(len(sample.token_times_s) for sample in repeat.samples)


def _output_tok_s(figures: Figures) -> float | None:
    wall_s = figures.repeat.wall_s
    return figures.output_tokens / wall_s if wall_s > 0 else None


def _prefill_tok_s(figures: Figures) -> float | None:
    """Prompt tokens / the time in which at least one request is in prefill."""
    answered = [sample for sample in figures.repeat.samples if sample.token_times_s]
    spans = sorted((each.handed_s + (each.queued_s or 0.0), each.handed_s + each.token_times_s[0]) for each in answered)
    prefill_s, until = 0.0, float("-inf")
    for begin, end in spans:  # overlapping spans are one prefill
        begin_alone = max(begin, until)
        if end > begin_alone:
            prefill_s += end - begin_alone
            until = end
    tokens = sum(sample.prompt_tokens for sample in answered)
    return tokens / prefill_s if prefill_s > 0 else None


def _largest(field: str) -> Callable[[Figures], float | None]:
    def of(figures: Figures) -> float | None:
        devices = figures.repeat.devices
        return max((value for d in devices if (value := getattr(d, field)) is not None), default=None)

    return of


def _energy_j(figures: Figures) -> float | None:
    """From the counters; without them from power samples."""
    repeat = figures.repeat
    return repeat.sampled_energy_j if repeat.energy_j is None else repeat.energy_j


def _energy_per_token_j(figures: Figures) -> float | None:
    energy_j, tokens = _energy_j(figures), figures.output_tokens
    return energy_j / tokens if energy_j is not None and tokens else None


# A smaller growth of the queue is within chance and a slow start.
GROWING_QUEUE_SHARE = 0.05


def meets(repeats: Sequence[Repeat], limits: Sequence[LatencyLimit]) -> bool:
    """Whether every repeat is within all limits, without a failed request and with a server that keeps up."""
    return bool(repeats) and all(_meets(Figures(repeat), limits) for repeat in repeats)


def _meets(figures: Figures, limits: Sequence[LatencyLimit]) -> bool:
    if METRICS["failed_requests"].of(figures) or (METRICS["queue_growth"].of(figures) or 0.0) > GROWING_QUEUE_SHARE:
        return False
    for limit in limits:
        ordered = figures.ordered(limit.latency)
        if ordered and _percentile_of_sorted(ordered, limit.percent / 100) > limit.most_s:
            return False
    return all(sample.token_times_s for sample in figures.repeat.samples)


def _of_client(of: Callable[[Repeat, ClientReport], float | None]) -> Callable[[Figures], float | None]:
    """A metric of served runs; None of others."""
    return lambda figures: None if figures.repeat.client is None else of(figures.repeat, figures.repeat.client)


def _client_busy_share(repeat: Repeat, client: ClientReport) -> float | None:
    return client.busy_s / repeat.wall_s if repeat.wall_s > 0 else None


def _arrival_gap_s(repeat: Repeat, client: ClientReport) -> float | None:
    arrivals = [sample.handed_s for sample in repeat.samples]
    if client.lag_s is None or len(arrivals) < 2:
        return None
    return (max(arrivals) - min(arrivals)) / (len(arrivals) - 1)


def _drain_share(repeat: Repeat, client: ClientReport) -> float | None:
    last = max((sample.handed_s for sample in repeat.samples), default=0.0)
    return max(0.0, 1 - last / repeat.wall_s) if repeat.wall_s > 0 else None


def _queue_growth(repeat: Repeat, client: ClientReport) -> float | None:
    return None if client.lag_s is None else queue_growth(repeat)


def queue_growth(repeat: Repeat) -> float | None:
    """At a request rate: the growth of the mean number of requests in the server, from the second quarter of the arrivals to the
    last quarter, as a share of the arrivals in the second half. A mean depends less on chance than the number at a moment.

    Two standard deviations of a Poisson count are subtracted: less is chance. None where a request that arrives early takes
    longer than half of the arrivals: then the server still fills up.
    """
    spans = sorted((s.handed_s, s.handed_s + e2e) for s in repeat.samples if (e2e := e2e_s(s)) is not None)
    if not spans:
        return None
    end = spans[-1][0]
    half = end / 2
    early = [ended - arrived for arrived, ended in spans[: max(1, len(spans) // 10)]]
    later = sum(arrived > half for arrived, _ in spans)
    if not later or percentile(early, 0.5) > half:
        return None
    growth = _in_server(spans, 0.75 * end, end) - _in_server(spans, 0.25 * end, half)
    return max(0.0, growth - 2 * math.sqrt(later)) / later


def _in_server(spans: Sequence[tuple[float, float]], since: float, until: float) -> float:
    """The mean number of requests in the server, from the arrival and the end of each."""
    return sum(max(0.0, min(ended, until) - max(arrived, since)) for arrived, ended in spans) / (until - since)


def _mbu(figures: Figures) -> float | None:
    """None where a step gives a request several tokens, which share one time: then tpot is not the time of a step."""
    repeat, tpot = figures.repeat, _over_requests("tpot_s")(figures)
    if not (tpot and repeat.read_bytes_per_step and repeat.memory_bandwidth_bytes_s):
        return None
    if figures.gaps_s[0] <= 0:
        return None
    return repeat.read_bytes_per_step / tpot / repeat.memory_bandwidth_bytes_s


def _quotient(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


def _accepted_length(counts: EngineCounts) -> float | None:
    more = _quotient(counts.accepted_tokens, counts.drafts)
    return None if more is None else 1 + more


def _latency(name: str, title: str, definition: str) -> dict[str, Metric]:
    """The median, the 90th and the 99th percentile over requests of the latency `name`."""
    made = {name: Metric(title, "s", "lower", f"{definition}, median of requests", _over_requests(name))}
    for percent in (90, 99):
        of = _over_requests(name, percent / 100)
        words = f"{definition}, {percent}th percentile of requests"
        made[f"{name.removesuffix('_s')}_p{percent}_s"] = Metric(f"{title} p{percent}", "s", "lower", words, of)
    return made


def _memory(title: str, definition: str, field: str) -> dict[str, Metric]:
    return {field: Metric(title, "B", "lower", f"{definition}, fullest GPU", _largest(field))}


METRICS: dict[str, Metric] = {
    "output_tok_s": Metric(
        "throughput", "tok/s", "higher", "all output tokens / wall time of the measured window", _output_tok_s
    ),
    **_latency("ttft_s", "ttft", "from sending a request to its first token"),
    **_latency("tpot_s", "tpot", "(end-to-end - ttft) / (output tokens - 1)"),
    "itl_s": Metric("itl", "s", "lower", "gap between neighbouring tokens, median of all gaps", _over_gaps(0.5)),
    "itl_p99_s": Metric(
        "itl p99", "s", "lower", "gap between neighbouring tokens, 99th percentile of all gaps", _over_gaps(0.99)
    ),
    **_latency("e2e_s", "latency", "from sending a request to its last token"),
    "prefill_tok_s": Metric(
        "prefill", "tok/s", "higher", "prompt tokens / time with at least one request in prefill", _prefill_tok_s
    ),
    "queued_s": Metric(
        "engine queue",
        "s",
        "lower",
        "wait until the engine starts work on a request, median of requests",
        _over_requests("queued_s"),
    ),
    "output_tokens": Metric(
        "tokens", "tok", "", "tokens generated by all requests of a repeat", lambda figures: figures.output_tokens
    ),
    **_memory("weights", "parameters and buffers", "weights_bytes"),
    **_memory("KV cache", "keys and values at the end of the repeat", "kv_cache_used_bytes"),
    **_memory("KV cache reserved", "memory that the engine reserves for keys and values", "kv_cache_reserved_bytes"),
    **_memory("peak memory", "torch's peak allocation in the window", "peak_allocated_bytes"),
    **_memory("reserved memory", "torch's peak reservation in the window", "peak_reserved_bytes"),
    **_memory("used memory", "NVML's memory of all processes", "device_used_bytes"),
    "energy_j": Metric(
        "energy",
        "J",
        "lower",
        "NVML's counter over the window (without one: power samples), all GPUs of the job",
        _energy_j,
        version=2,
    ),
    "energy_per_token_j": Metric(
        "energy per token", "J/tok", "lower", "energy / output tokens", _energy_per_token_j, version=2
    ),
    "mbu": Metric(
        "bandwidth share",
        "",
        "higher",
        "bytes a decode step must read / tpot / bandwidth of the GPUs that work at once",
        _mbu,
        no_value_where="a step gives several tokens at once (speculative decoding), or bytes or bandwidth are unknown",
    ),
    "requests_s": Metric(
        "requests per second",
        "req/s",
        "higher",
        "answered requests / wall time of the measured window",
        lambda f: sum(not s.error for s in f.repeat.samples) / f.repeat.wall_s if f.repeat.wall_s > 0 else None,
    ),
    "failed_requests": Metric(
        "failed requests",
        "",
        "lower",
        "served requests without an answer",
        _of_client(lambda repeat, client: sum(bool(sample.error) for sample in repeat.samples)),
    ),
    "client_busy_share": Metric(
        "client busy share",
        "",
        "",
        "share of the window in which the load generator works or waits for a CPU; near 1 it is the bottleneck",
        _of_client(_client_busy_share),
    ),
    "client_lag_p99_s": Metric(
        "client lag p99",
        "s",
        "",
        "from the arrival of a request by the schedule until the load generator turns to it, 99th percentile",
        _of_client(lambda repeat, client: percentile(client.lag_s, 0.99) if client.lag_s else None),
        no_value_where="requests have no arrival times",
    ),
    "arrival_gap_s": Metric(
        "arrival gap",
        "s",
        "",
        "mean time between the arrivals of neighbouring requests",
        _of_client(_arrival_gap_s),
        no_value_where="requests have no arrival times",
    ),
    "drain_share": Metric(
        "drain share",
        "",
        "",
        "share of a served run's window after the last request was sent or arrived",
        _of_client(_drain_share),
    ),
    "queue_growth": Metric(
        "queue growth",
        "",
        "lower",
        "growth of the number of requests in the server, beyond chance / arrivals in the second half",
        _of_client(_queue_growth),
        version=2,
        no_value_where="requests have no arrival times, or take longer than half of the arrivals",
    ),
    "acceptance_rate": Metric(
        "acceptance rate",
        "",
        "higher",
        "accepted tokens / drafted tokens of speculative decoding",
        lambda f: _quotient(f.repeat.counts.accepted_tokens, f.repeat.counts.draft_tokens),
        no_value_where="the engine does not decode speculatively",
    ),
    "accepted_length": Metric(
        "accepted length",
        "tok/step",
        "higher",
        "tokens that a drafting step gives a request: 1 + accepted tokens / drafts, as vLLM counts",
        lambda f: _accepted_length(f.repeat.counts),
        no_value_where="the engine does not decode speculatively",
    ),
    "prefix_hit_rate": Metric(
        "prefix cache hits",
        "",
        "higher",
        "prompt tokens found in the prefix cache / prompt tokens looked up",
        lambda f: _quotient(f.repeat.counts.cached_tokens, f.repeat.counts.queried_tokens),
        no_value_where="prefix caching is off",
    ),
    "mean_log_probability": Metric(
        "log-probability",
        "nat/tok",
        "",
        "mean log-probability of the generated tokens, median of requests",
        _over_requests("mean_log_probability"),
    ),
    "repeated_bigrams": Metric(
        "repeated bigrams",
        "",
        "",
        "share of token pairs that occurred before, median of requests",
        _over_requests("repeated_bigrams"),
    ),
}


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Watch:
    """Callbacks of a run. `on_phase` gets "warm-up", "measuring", "scoring". `on_text` gets the text of the warm-up while it is
    generated; repeats have no callback. `sampler` samples the devices meanwhile. After
    `deadline`, a reading of `time.perf_counter`, no repeat ends that `RunSpec.until` alone asks for."""

    on_phase: Callable[[str], None]
    on_text: Callable[[str], None] | None = None
    sampler: TelemetrySampler | None = None
    deadline: float | None = None


class Suspensions:
    """Counts the suspensions of this process: `scontrol suspend` and gang scheduling send SIGSTOP and SIGCONT."""

    def __init__(self) -> None:
        self.count = 0

    def note(self, signum: int, frame: FrameType | None) -> None:
        """The handler of SIGCONT."""
        self.count += 1


suspensions = Suspensions()
# Gang scheduling suspends a job again and again: a repeat that is longer than a time slice can never be measured.
MAX_SUSPENSIONS = 5


def measure_run(requests: Requests, gpus: Sequence[hardware.Gpu], watch: Watch) -> tuple[float | None, list[Repeat]]:
    """Warm up, then measure the repeats (see `is_enough`); returns (warmup_s, repeats), warmup_s None if the job was suspended in
    it.

    Encoding, decoding, log-probabilities and all bookkeeping are outside the measured window. Raises Refusal where the model's
    logits are not finite, and where every attempt at a repeat is suspended.
    """
    engine, run = requests.engine, requests.run
    watch.on_phase("warm-up")
    if not run.sampling.greedy or requests.are_random:
        # On some GPUs, sampling from such logits ends the process without a reason. Random prompts are not scored later.
        for first in requests.of(0)[:1]:
            refuse_if_not_finite(scored(engine, first.token_ids, first.token_ids[-1:]), run, gpus)
    before, started = suspensions.count, time.perf_counter()
    for index in range(run.warmup):
        _generate_all(
            requests,
            gpus,
            repeat=-1 - index,
            sampler=watch.sampler,
            on_token=_text_printer(engine, watch) if index == 0 else None,
        )
    warmup_s = time.perf_counter() - started if suspensions.count == before else None
    watch.on_phase("measuring")
    repeats: list[Repeat] = []
    while not is_enough(run, repeats, watch.deadline):
        repeats.append(_measure_repeat(requests, gpus, watch.sampler, repeat=len(repeats)))
    if not requests.are_random:  # what a model answers to random tokens says nothing about it
        watch.on_phase("scoring")
        _score(engine, run, requests.of(0), repeats, gpus)
    return warmup_s, repeats


# With fewer repeats, an interval that is narrow by chance ends them too often.
FEWEST_REPEATS_OF_AN_INTERVAL = 5


def is_enough(run: RunSpec, repeats: Sequence[Repeat], deadline: float | None) -> bool:
    """Whether these repeats are all that the run asks for: `run.repeats`; with `until`, until the interval is narrow, or a limit
    comes first."""
    count = len(repeats)
    if run.until is None or count < run.repeats:
        return count >= run.repeats
    if count >= run.max_repeats:
        return True
    if count < FEWEST_REPEATS_OF_AN_INTERVAL:
        return _is_late(repeats, deadline)
    half_width = half_width_of(repeats)
    return (half_width is not None and half_width <= run.until) or _is_late(repeats, deadline)


def _is_late(repeats: Sequence[Repeat], deadline: float | None) -> bool:
    """Whether another repeat, as long as the longest so far, would end after the deadline."""
    return deadline is not None and time.perf_counter() + max(repeat.wall_s for repeat in repeats) > deadline


def until_of(run: RunSpec, repeats: Sequence[Repeat]) -> Until | None:
    """How the repeats of a run with `until` ended."""
    if run.until is None:
        return None
    half_width = half_width_of(repeats)
    enough = len(repeats) >= min(FEWEST_REPEATS_OF_AN_INTERVAL, run.max_repeats)
    if enough and half_width is not None and half_width <= run.until:
        return Until(run.until, half_width, "target")
    return Until(run.until, half_width, "repeats" if len(repeats) >= run.max_repeats else "time")


def half_width_of(repeats: Sequence[Repeat]) -> float | None:
    """Half of the 95% interval of the mean throughput, as a share of it: exp(t(0.975, n - 1) * s / sqrt(n)) - 1 for the standard
    deviation s of the logarithms. None for fewer than two repeats with tokens."""
    rates = [METRICS["output_tok_s"].compute(repeat) for repeat in repeats]
    logs = [math.log(rate) for rate in rates if rate]
    if len(logs) < 2:
        return None
    return math.expm1(_t_975(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs)))


def _t_975(df: int) -> float:
    """The 97.5% quantile of Student's t: M. Abramowitz, I. Stegun, Handbook of Mathematical Functions, 26.7.5. From 4 degrees of
    freedom on it is right to 0.03%."""
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )  # fmt: skip
    return math.fsum(term / df**power for power, term in enumerate(terms))


def _measure_repeat(
    requests: Requests, gpus: Sequence[hardware.Gpu], sampler: TelemetrySampler | None, *, repeat: int
) -> Repeat:
    """Measure a repeat, again if the job is suspended in it."""
    for discarded in range(MAX_SUSPENSIONS + 1):
        before = suspensions.count
        measured = _generate_all(requests, gpus, repeat=repeat, sampler=sampler)
        if suspensions.count == before:
            measured.discarded = discarded
            return measured
        print(f"job suspended in repeat {repeat}: measuring it again", file=sys.stderr, flush=True)
    raise Refusal(
        "suspended",
        f"job suspended in every attempt at repeat {repeat}: {MAX_SUSPENSIONS + 1} times",
        "use a partition or QOS that does not suspend jobs, or shorten the repeat (--max-new-tokens, --requests)",
    )


class Requests:
    """The requests of a run's repeats. `prompts` and `dataset` are those of its prompt set; `left_out` counts the entries of the
    dataset that are too long for the model. Raises Refusal where all are."""

    def __init__(self, engine: Engine, run: RunSpec, prompts: Sequence[Prompt], dataset: Dataset | None = None) -> None:
        self.engine = engine
        self.run = run
        self.encoded = engine.encode(prompts)
        self.are_random = are_random(run, dataset)
        self.times_s = dataset.times_s if dataset is not None else None
        self.left_out = 0
        lengths = [len(token_ids) for token_ids in self.encoded]
        if dataset is None or self.are_random:
            self.sizes = sizes_of(run, lengths, dataset)
            return
        text = engine.text
        self.sizes = sizes_of(run, lengths, dataset, text.count, text.longest)
        totals = [each.prompt_tokens + each.new_tokens for each in entries_of(run, lengths, dataset, text.count)]
        self.left_out = sum(text.longest is not None and total > text.longest for total in totals)
        if not self.sizes:
            raise Refusal(
                "too-long",
                f"every entry of the dataset is too long: {min(totals, default=0)} tokens at least, the model has {text.longest}",
                "use a model with longer sequences, another dataset, or a smaller --output-len",
            )

    def of(self, repeat: int) -> list[Request]:
        """The requests of one repeat, in order. Prompts of random tokens are new in each."""
        return [Request(size.prompt, self._token_ids(size, repeat), size.new_tokens) for size in self.sizes]

    def _token_ids(self, size: Size, repeat: int) -> tuple[int, ...]:
        if not self.are_random:
            return self.encoded[size.prompt]
        text = self.engine.text
        return random_prompt(size, self.run.workload or Workload(), repeat, text.ordinary, text.begin)

    def arrivals(self, repeat: int) -> Arrivals:
        """The arrivals of a repeat's requests: those of a trace, else at the run's rate."""
        if self.times_s is None:
            return arrivals_of(self.run, len(self.sizes), repeat)
        return Arrivals(self.run.batch_size, tuple(self.times_s[: len(self.sizes)]))

    def fingerprint(self) -> InputFingerprint:
        prompts = [each.token_ids for each in self.of(0)[:1]] if self.are_random else self.encoded
        return InputFingerprint(sha256_of_json(prompts), self.left_out)


def arrivals_of(run: RunSpec, requests: int, repeat: int) -> Arrivals:
    """The arrivals of a repeat's requests. At a request rate: gaps after the first, drawn for each repeat, the same on every
    engine. They have a gamma distribution with the shape `burstiness`: 1 is a Poisson process, less is burstier. They are scaled
    to a mean of exactly 1 / rate: by chance, that of 12 gaps may be half of it. Source: `vllm bench serve` does both."""
    if run.request_rate is None:
        return Arrivals(run.batch_size)
    seed = run.sampling.seed if run.workload is None else run.workload.seed
    draw = random.Random(draw_seed(seed, repeat, "arrivals"))  # noqa: S311  no secret
    mean_s, shape = 1 / run.request_rate, run.burstiness
    gaps = [_gap(draw, mean_s, shape) for _ in range(requests - 1)]
    scale = len(gaps) * mean_s / (math.fsum(gaps) or 1.0)
    return Arrivals(run.batch_size, tuple(itertools.accumulate([0.0, *(gap * scale for gap in gaps)])))


def _gap(draw: random.Random, mean_s: float, shape: float) -> float:
    return draw.expovariate(1 / mean_s) if shape == 1 else draw.gammavariate(shape, mean_s / shape)


def _text_printer(engine: Engine, watch: Watch) -> Callable[[int], None] | None:
    """A callback that passes on the first request's text. It decodes all tokens so far, since a letter may be two tokens."""
    on_text = watch.on_text
    if on_text is None:
        return None
    seen: list[int] = []
    typed = ""

    def on_token(token: int) -> None:
        nonlocal typed
        seen.append(token)
        text = engine.decode(seen)
        if not text.endswith("\ufffd"):
            on_text(text[len(typed) :])
            typed = text

    return on_token


def _generate_all(
    made: Requests,
    gpus: Sequence[hardware.Gpu],
    *,
    repeat: int,
    sampler: TelemetrySampler | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Repeat:
    """Generate the answers of all requests once, and record times, memory and energy."""
    engine, run = made.engine, made.run
    sampling = run.sampling
    if not sampling.greedy:  # each repeat draws its own tokens, reproducibly
        sampling = replace(sampling, seed=draw_seed(sampling.seed, repeat, "tokens"))
    requests, how = made.of(repeat), Generation(made.arrivals(repeat), sampling, run.ignore_eos, on_token)
    engine.reset()
    if sampler is not None:  # a short window has a sample at each end too
        sampler.sample()
    energy_before = hardware.energy_j(gpus)
    started = time.perf_counter()
    answers = engine.generate(requests, how)
    wall_s = time.perf_counter() - started
    energy_after = hardware.energy_j(gpus)
    if sampler is not None:
        sampler.sample()
    energy_j = None if energy_before is None or energy_after is None else energy_after - energy_before
    client = None
    if isinstance(answers, ServedAnswers):  # the load generator measured its own window
        started, wall_s, energy_j, client = answers.started_at, answers.wall_s, answers.energy_j, answers.client
    answered = enumerate(zip(requests, answers(), strict=True))
    samples = [_sample(engine, index, request, answer, started) for index, (request, answer) in answered]
    in_flight = _in_flight(run, samples, wall_s)
    return Repeat(
        repeat=repeat,
        wall_s=wall_s,
        samples=samples,
        devices=engine.memory(),
        seed=sampling.seed,
        energy_j=energy_j,
        sampled_energy_j=None if sampler is None else sampler.energy_j(started, started + wall_s),
        started_s=None if sampler is None else started - sampler.origin,
        read_bytes_per_step=_read_bytes_per_step(engine, samples, in_flight),
        memory_bandwidth_bytes_s=_bandwidth(engine, gpus, in_flight),
        client=client,
        counts=engine.counts(),
    )


def _bandwidth(engine: Engine, gpus: Sequence[hardware.Gpu], in_flight: int) -> float | None:
    """Of the GPUs that read at the same time."""
    at_once = gpus[: engine.gpus_at_once(in_flight)]
    bandwidths = [gpu.memory_bandwidth_bytes_s for gpu in at_once]
    return sum(b for b in bandwidths if b is not None) if bandwidths and None not in bandwidths else None


def _sample(engine: Engine, index: int, request: Request, answer: Generated, started: float) -> Sample:
    """Raises Refusal where the engine's prompt has another number of tokens than the request's."""
    if answer.prompt_tokens != len(request.token_ids):
        raise Refusal(
            "prompt-length",
            f"engine changed the prompt of request {index}: {len(request.token_ids)} tokens sent, {answer.prompt_tokens} read",
            "use another version of the engine, and report this to its developers",
        )
    return Sample(
        request=index,
        prompt=request.prompt,
        prompt_tokens=answer.prompt_tokens,
        token_ids=answer.token_ids,
        token_times_s=[reading - answer.handed_at for reading in answer.token_times],
        finish_reason=answer.finish_reason,
        text=engine.decode(answer.token_ids) if answer.text is None else answer.text,
        handed_s=answer.handed_at - started,
        queued_s=answer.queued_s,
        engine_ttft_s=answer.engine_ttft_s,
        engine_tpot_s=answer.engine_tpot_s,
        error=answer.error or None,
    )


def _in_flight(run: RunSpec, samples: Sequence[Sample], wall_s: float) -> int:
    """The sequences of a decode step: the batch size. At a request rate and with a workload at most that, the mean by Little's
    law: seconds of all requests / the window."""
    if (run.request_rate is None and run.workload is None) or wall_s <= 0:
        return run.batch_size
    busy_s = sum((e2e_s(sample) or 0.0) - (sample.queued_s or 0.0) for sample in samples)
    return max(1, min(run.batch_size, round(busy_s / wall_s)))


def _read_bytes_per_step(engine: Engine, samples: Sequence[Sample], in_flight: int) -> float | None:
    """At the mean context length of the decode steps: the prompt and half of the answer, weighted by the steps of each."""
    steps = [len(sample.token_times_s) for sample in samples]
    contexts = [(sample.prompt_tokens + tokens / 2) * tokens for sample, tokens in zip(samples, steps, strict=True)]
    return engine.read_bytes_per_step(sum(contexts) / sum(steps), in_flight) if any(steps) else None


def scored(engine: Engine, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float] | None:
    """None where scoring fails, such as for lack of memory: the measurement itself stays valid."""
    try:
        return engine.log_probabilities(prompt, token_ids)
    except Exception as error:
        print(f"cannot compute log-probabilities: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return None


FIRST_CAPABILITY_WITH_BFLOAT16 = 8.0


def refuse_if_not_finite(scores: Sequence[float] | None, run: RunSpec, gpus: Sequence[hardware.Gpu]) -> None:
    """Raises Refusal where a log-probability is not finite: the logits overflow or are NaN, and the answer repeats one token."""
    if scores is None or all(map(math.isfinite, scores)):
        return
    dtype = run.definition.get("dtype")
    has_bfloat16 = bool(gpus) and float(gpus[0].capability) >= FIRST_CAPABILITY_WITH_BFLOAT16
    if dtype == "float32":
        remedy = "check the checkpoint: its weights overflow float32, or some are NaN"
    elif dtype == "float16" and has_bfloat16:
        remedy = "use --dtype bfloat16, which has float32's range, or --dtype float32"
    else:
        remedy = "use --dtype float32"
    raise Refusal("logits-not-finite", f"the model's logits are not finite: dtype {dtype}", remedy)


def token_texts(engine: Engine, repeats: Sequence[Repeat]) -> dict[str, str]:
    """The text of each generated token id."""
    distinct = {token for repeat in repeats for sample in repeat.samples for token in sample.token_ids}
    return {str(token): engine.decode([token]) for token in sorted(distinct)}


def _score(
    engine: Engine,
    run: RunSpec,
    requests: Sequence[Request],
    repeats: Sequence[Repeat],
    gpus: Sequence[hardware.Gpu],
) -> None:
    """Add the log-probabilities of every answer; equal answers to equal prompts are scored once. Raises Refusal where they are
    not finite."""
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], list[float] | None] = {}
    for repeat in repeats:
        for sample, request in zip(repeat.samples, requests, strict=True):
            key = (request.token_ids, tuple(sample.token_ids))
            if key not in known:
                known[key] = scored(engine, request.token_ids, sample.token_ids)
                refuse_if_not_finite(known[key], run, gpus)
            sample.log_probabilities = known[key]
