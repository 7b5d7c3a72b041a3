"""The measurement: warm-up, repeats, clocks; and the metrics, by the field's definitions.

A metric is one entry in METRICS. Raw times are kept with every record; a metric is computed from them.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from labctl_workers import hardware
from labctl_workers.engines.base import Engine, Generated, Load, Request
from labctl_workers.record import Repeat, RunSpec, Sample, is_a_stop

# ---------------------------------------------------------------- figures of one request


def ttft_s(sample: Sample) -> float | None:
    """Time to first token: from handing the request to the engine to its first token, in seconds."""
    return sample.token_times_s[0] if sample.token_times_s else None


def e2e_s(sample: Sample) -> float | None:
    """End-to-end latency: from handing the request to the engine to its last token, in seconds."""
    return sample.token_times_s[-1] if sample.token_times_s else None


def tpot_s(sample: Sample) -> float | None:
    """Time per output token after the first: (end-to-end - ttft) / (output tokens - 1), in seconds."""
    tokens = len(sample.token_times_s)
    if tokens < 2:
        return None
    return (sample.token_times_s[-1] - sample.token_times_s[0]) / (tokens - 1)


def itl_s(sample: Sample) -> list[float]:
    """Inter-token latencies: each gap between one token and the next, in seconds."""
    return [later - earlier for earlier, later in itertools.pairwise(sample.token_times_s)]


def mean_log_probability(sample: Sample) -> float | None:
    """Mean natural log-probability of the chosen tokens."""
    return math.fsum(sample.log_probabilities) / len(sample.log_probabilities) if sample.log_probabilities else None


def repeated_bigrams(sample: Sample) -> float | None:
    """Share of the answer's pairs of neighbouring tokens that occurred in it before: 1 - distinct / all."""
    pairs = list(itertools.pairwise(sample.token_ids))
    return 1 - len(set(pairs)) / len(pairs) if pairs else None


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share lies, interpolated between the two nearest, as numpy's default does."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * share
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


# ---------------------------------------------------------------- figures of one repeat


@dataclass(frozen=True)
class Metric:
    """One figure of one repeat. `better` is "higher", "lower" or "" (neither); `compute` gives None where it has no
    meaning, such as the time between tokens of a one-token answer."""

    title: str
    unit: str
    better: str
    definition: str
    compute: Callable[[Repeat], float | None]


def _over_requests(of: Callable[[Sample], float | None], share: float = 0.5) -> Callable[[Repeat], float | None]:
    def compute(repeat: Repeat) -> float | None:
        values = [value for value in map(of, repeat.samples) if value is not None]
        return percentile(values, share) if values else None

    return compute


def _over_gaps(share: float) -> Callable[[Repeat], float | None]:
    def compute(repeat: Repeat) -> float | None:
        gaps = [gap for sample in repeat.samples for gap in itl_s(sample)]
        return percentile(gaps, share) if gaps else None

    return compute


def output_tokens(repeat: Repeat) -> int:
    """All tokens that the repeat's requests generated, end tokens included."""
    return sum(len(sample.token_ids) for sample in repeat.samples)


def _output_tok_s(repeat: Repeat) -> float | None:
    return output_tokens(repeat) / repeat.wall_s if repeat.wall_s > 0 else None


def _prefill_tok_s(repeat: Repeat) -> float | None:
    """Prompt tokens / the time in which at least one request was worked on and had no token yet."""
    spans = sorted(
        (sample.handed_s + (sample.queued_s or 0.0), sample.handed_s + sample.token_times_s[0])
        for sample in repeat.samples
        if sample.token_times_s
    )
    prefill_s, until = 0.0, float("-inf")
    for begin, end in spans:  # those that overlap were prefilled together
        prefill_s += max(0.0, end - max(begin, until))
        until = max(until, end)
    tokens = sum(sample.prompt_tokens for sample in repeat.samples if sample.token_times_s)
    return tokens / prefill_s if prefill_s > 0 else None


def _largest(field: str) -> Callable[[Repeat], float | None]:
    def compute(repeat: Repeat) -> float | None:
        return max((value for d in repeat.devices if (value := getattr(d, field)) is not None), default=None)

    return compute


def _energy_per_token_j(repeat: Repeat) -> float | None:
    tokens = output_tokens(repeat)
    return repeat.energy_j / tokens if repeat.energy_j is not None and tokens else None


def _mbu(repeat: Repeat) -> float | None:
    tpot = _over_requests(tpot_s)(repeat)
    if not (tpot and repeat.read_bytes_per_step and repeat.memory_bandwidth_bytes_s):
        return None
    return repeat.read_bytes_per_step / tpot / repeat.memory_bandwidth_bytes_s


METRICS: dict[str, Metric] = {
    "output_tok_s": Metric(
        "throughput", "tok/s", "higher", "all output tokens / wall time of the measured window", _output_tok_s
    ),
    "ttft_s": Metric(
        "ttft", "s", "lower", "from handing the request to its first token, median of requests", _over_requests(ttft_s)
    ),
    "ttft_p90_s": Metric(
        "ttft p90", "s", "lower", "the same, 90th percentile of requests", _over_requests(ttft_s, 0.9)
    ),
    "ttft_p99_s": Metric(
        "ttft p99", "s", "lower", "the same, 99th percentile of requests", _over_requests(ttft_s, 0.99)
    ),
    "tpot_s": Metric(
        "tpot", "s", "lower", "(end-to-end - ttft) / (output tokens - 1), median of requests", _over_requests(tpot_s)
    ),
    "tpot_p90_s": Metric(
        "tpot p90", "s", "lower", "the same, 90th percentile of requests", _over_requests(tpot_s, 0.9)
    ),
    "tpot_p99_s": Metric(
        "tpot p99", "s", "lower", "the same, 99th percentile of requests", _over_requests(tpot_s, 0.99)
    ),
    "itl_s": Metric("itl", "s", "lower", "gap between one token and the next, median of all gaps", _over_gaps(0.5)),
    "itl_p99_s": Metric("itl p99", "s", "lower", "the same, 99th percentile of all gaps", _over_gaps(0.99)),
    "e2e_s": Metric(
        "latency", "s", "lower", "from handing the request to its last token, median of requests", _over_requests(e2e_s)
    ),
    "e2e_p90_s": Metric(
        "latency p90", "s", "lower", "the same, 90th percentile of requests", _over_requests(e2e_s, 0.9)
    ),
    "e2e_p99_s": Metric(
        "latency p99", "s", "lower", "the same, 99th percentile of requests", _over_requests(e2e_s, 0.99)
    ),
    "prefill_tok_s": Metric(
        "prefill",
        "tok/s",
        "higher",
        "prompt tokens / time with a request that is worked on and has no token yet",
        _prefill_tok_s,
    ),
    "queued_s": Metric(
        "engine queue",
        "s",
        "lower",
        "wait in the engine before work on a request begins, median of requests",
        _over_requests(lambda sample: sample.queued_s),
    ),
    "output_tokens": Metric("tokens", "tok", "", "tokens generated by all requests of a repeat", output_tokens),
    "weights_bytes": Metric(
        "weights", "B", "lower", "parameters and buffers, of the fullest GPU", _largest("weights_bytes")
    ),
    "kv_cache_used_bytes": Metric(
        "KV cache", "B", "lower", "keys and values held at the end, of the fullest GPU", _largest("kv_cache_used_bytes")
    ),
    "kv_cache_reserved_bytes": Metric(
        "KV cache reserved",
        "B",
        "lower",
        "memory that the engine sets aside for keys and values, of the fullest GPU",
        _largest("kv_cache_reserved_bytes"),
    ),
    "peak_allocated_bytes": Metric(
        "peak memory",
        "B",
        "lower",
        "torch's peak over the window, of the fullest GPU",
        _largest("peak_allocated_bytes"),
    ),
    "peak_reserved_bytes": Metric(
        "reserved memory", "B", "lower", "torch's peak reservation, of the fullest GPU", _largest("peak_reserved_bytes")
    ),
    "device_used_bytes": Metric(
        "used memory", "B", "lower", "NVML's figure, all processes, of the fullest GPU", _largest("device_used_bytes")
    ),
    "energy_j": Metric(
        "energy", "J", "lower", "NVML's counter over the window, all GPUs of the job", lambda r: r.energy_j
    ),
    "energy_per_token_j": Metric("energy per token", "J/tok", "lower", "energy / output tokens", _energy_per_token_j),
    "mbu": Metric(
        "bandwidth share", "", "higher", "bytes a decode step must read / tpot / the memory's bandwidth", _mbu
    ),
    "mean_log_probability": Metric(
        "log-probability",
        "nat/tok",
        "",
        "mean of the chosen tokens', median of requests",
        _over_requests(mean_log_probability),
    ),
    "repeated_bigrams": Metric(
        "repeated bigrams",
        "",
        "",
        "share of token pairs seen before, median of requests",
        _over_requests(repeated_bigrams),
    ),
}


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Watch:
    """What is told while a run is measured. `on_phase`: "warm-up", "measuring", "scoring". `on_text`: the warm-up's text as
    it comes, where a person watches; the measured passes are left alone."""

    on_phase: Callable[[str], None]
    on_text: Callable[[str], None] | None = None


def measure_run(
    engine: Engine, run: RunSpec, prompts: Sequence[str], gpus: Sequence[hardware.Gpu], watch: Watch
) -> tuple[float, list[Repeat]]:
    """Warm up, then measure `run.repeats` passes; returns (warmup_s, repeats).

    Encoding, decoding of text, log-probabilities and every other bookkeeping are outside the measured window.
    """
    requests = requests_of(run, engine.encode(prompts))
    watch.on_phase("warm-up")
    started = time.perf_counter()
    for index in range(run.warmup):
        _one_pass(
            engine, run, requests, gpus, repeat=-1 - index, on_token=_typist(engine, watch) if index == 0 else None
        )
    warmup_s = time.perf_counter() - started
    watch.on_phase("measuring")
    repeats = [_one_pass(engine, run, requests, gpus, repeat=repeat) for repeat in range(run.repeats)]
    watch.on_phase("scoring")
    _score(engine, requests, repeats)
    for result in repeats:
        result.metrics = {name: metric.compute(result) for name, metric in METRICS.items()}
    return warmup_s, repeats


def requests_of(run: RunSpec, prompts: Sequence[Request]) -> list[Request]:
    """The requests of one pass: as many as asked for, else each prompt once, filled up to whole batches; the prompts are
    repeated from their start."""
    batches = -(-len(prompts) // run.batch_size)
    count = run.requests or batches * run.batch_size
    return [prompts[index % len(prompts)] for index in range(count)]


def load_of(run: RunSpec, requests: int, repeat: int) -> Load:
    """How a pass's requests come. At a request rate: exponential gaps, the first at once; every repeat draws its own,
    the same whenever it is run."""
    if run.request_rate is None:
        return Load(run.batch_size)
    draw = random.Random(repeat)  # noqa: S311  no secret
    gaps = [0.0, *(draw.expovariate(run.request_rate) for _ in range(requests - 1))]
    return Load(run.batch_size, tuple(itertools.accumulate(gaps)))


def _typist(engine: Engine, watch: Watch) -> Callable[[int], None] | None:
    """Types the first request's text as its tokens come: the new end of the text so far, since a letter may be two tokens."""
    tell = watch.on_text
    if tell is None:
        return None
    seen: list[int] = []
    typed = ""

    def on_token(token: int) -> None:
        nonlocal typed
        seen.append(token)
        text = engine.decode(seen)
        if not text.endswith("\ufffd"):
            tell(text[len(typed) :])
            typed = text

    return on_token


def _one_pass(
    engine: Engine,
    run: RunSpec,
    requests: Sequence[Request],
    gpus: Sequence[hardware.Gpu],
    *,
    repeat: int,
    on_token: Callable[[int], None] | None = None,
) -> Repeat:
    """Generate for every request once."""
    sampling = run.sampling
    if not sampling.greedy:  # every repeat draws other tokens, repeatably
        sampling = replace(sampling, seed=(sampling.seed or 0) + repeat)
    load = load_of(run, len(requests), repeat)
    engine.reset_peak_memory()
    energy_before = hardware.energy_j(gpus)
    started = time.perf_counter()
    answers = engine.generate(
        requests,
        load=load,
        max_new_tokens=run.max_new_tokens,
        sampling=sampling,
        ignore_eos=run.ignore_eos,
        on_token=on_token,
    )
    wall_s = time.perf_counter() - started
    energy_after = hardware.energy_j(gpus)
    answered = enumerate(zip(requests, answers(), strict=True))
    samples = [_sample(engine, index, request, answer, started) for index, (request, answer) in answered]
    return Repeat(
        repeat=repeat,
        wall_s=wall_s,
        samples=samples,
        devices=engine.memory(),
        seed=sampling.seed,
        energy_j=None if energy_before is None or energy_after is None else energy_after - energy_before,
        read_bytes_per_step=_read_bytes_per_step(engine, run, samples, wall_s),
        memory_bandwidth_bytes_s=_bandwidth(engine, gpus),
    )


def _bandwidth(engine: Engine, gpus: Sequence[hardware.Gpu]) -> float | None:
    """Of the GPUs that read at once: all of them in tensor parallel, one where the layers follow one another."""
    at_once = gpus if engine.PARALLEL == "tensor" else gpus[:1]
    bandwidths = [gpu.memory_bandwidth_bytes_s for gpu in at_once]
    return sum(b for b in bandwidths if b is not None) if bandwidths and None not in bandwidths else None


def _sample(engine: Engine, index: int, request: Request, answer: Generated, started: float) -> Sample:
    return Sample(
        request=index,
        prompt=request.prompt,
        prompt_tokens=len(request.token_ids),
        token_ids=answer.token_ids,
        token_times_s=[reading - answer.handed_at for reading in answer.token_times],
        finish_reason=answer.finish_reason,
        text=engine.decode(answer.token_ids),
        handed_s=answer.handed_at - started,
        queued_s=answer.queued_s,
        engine_ttft_s=answer.engine_ttft_s,
        engine_tpot_s=answer.engine_tpot_s,
    )


def _read_bytes_per_step(engine: Engine, run: RunSpec, samples: Sequence[Sample], wall_s: float) -> float | None:
    """At the mean context of the decode steps: the prompt and half of the answer. Of whole batches, but at a request rate
    of the mean number in flight (never more than the batch size): Little's law, seconds of all requests / the window."""
    contexts = [sample.prompt_tokens + len(sample.token_ids) / 2 for sample in samples]
    if not contexts:
        return None
    in_flight = run.batch_size
    if run.request_rate is not None and wall_s > 0:
        busy_s = sum((e2e_s(sample) or 0.0) - (sample.queued_s or 0.0) for sample in samples)
        in_flight = max(1, min(run.batch_size, round(busy_s / wall_s)))
    return engine.read_bytes_per_step(sum(contexts) / len(contexts), in_flight)


def _scored(engine: Engine, request: Request, token_ids: Sequence[int]) -> list[float] | None:
    """None where scoring fails, for want of memory say: what was measured is worth more than its log-probabilities."""
    try:
        scores = engine.log_probabilities(request, token_ids)
        if scores is not None and not all(math.isfinite(score) for score in scores):
            print("no log-probabilities: some are no numbers (does the dtype overflow?)", file=sys.stderr, flush=True)
            return None
        return scores
    except Exception as error:
        if is_a_stop(error):
            raise
        print(f"no log-probabilities: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return None


def token_texts(engine: Engine, repeats: Sequence[Repeat]) -> dict[str, str]:
    """The text of each token id of the answers, by itself; JSON's keys are texts."""
    distinct = {token for repeat in repeats for sample in repeat.samples for token in sample.token_ids}
    return {str(token): engine.decode([token]) for token in sorted(distinct)}


def _score(engine: Engine, requests: Sequence[Request], repeats: Sequence[Repeat]) -> None:
    """Log-probabilities of every answer; an answer that several requests share is scored once."""
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], list[float] | None] = {}
    for repeat in repeats:
        for sample, request in zip(repeat.samples, requests, strict=True):
            key = (request.token_ids, tuple(sample.token_ids))
            if key not in known:
                known[key] = _scored(engine, request, sample.token_ids)
            sample.log_probabilities = known[key]
