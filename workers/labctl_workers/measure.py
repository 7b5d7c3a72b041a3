"""The measurement: warm-up, repeats, clocks; and the metrics, by the field's definitions.

A metric is one entry in METRICS. Raw times are kept with every record; a metric is computed from them.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from labctl_workers import hardware
from labctl_workers.engines.base import Engine, Generated, Request
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
    return statistics.fmean(sample.log_probabilities) if sample.log_probabilities else None


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
    """Of each request, prompt tokens / ttft; requests of one batch are prefilled together, so their tokens add up."""
    first_token_s: dict[int, float] = {}
    for sample in repeat.samples:
        first_token_s[sample.batch] = max(first_token_s.get(sample.batch, 0.0), ttft_s(sample) or 0.0)
    prefill_s = sum(first_token_s.values())
    return sum(sample.prompt_tokens for sample in repeat.samples) / prefill_s if prefill_s > 0 else None


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
    "prefill_tok_s": Metric("prefill", "tok/s", "higher", "prompt tokens / time to the first token", _prefill_tok_s),
    "output_tokens": Metric("tokens", "tok", "", "tokens generated by all requests of a repeat", output_tokens),
    "weights_bytes": Metric(
        "weights", "B", "lower", "parameters and buffers, of the fullest GPU", _largest("weights_bytes")
    ),
    "kv_cache_used_bytes": Metric(
        "KV cache", "B", "lower", "keys and values held at the end, of the fullest GPU", _largest("kv_cache_used_bytes")
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
    requests = fill(engine.encode(prompts), run.batch_size)
    watch.on_phase("warm-up")
    started = time.perf_counter()
    for index in range(run.warmup):
        _one_pass(
            engine, run, requests, gpus, repeat=-1 - index, on_tokens=_typist(engine, watch) if index == 0 else None
        )
    warmup_s = time.perf_counter() - started
    watch.on_phase("measuring")
    repeats = [_one_pass(engine, run, requests, gpus, repeat=repeat) for repeat in range(run.repeats)]
    watch.on_phase("scoring")
    _score(engine, requests, repeats)
    for result in repeats:
        result.metrics = {name: metric.compute(result) for name, metric in METRICS.items()}
    return warmup_s, repeats


def fill(requests: Sequence[Request], batch_size: int) -> list[Request]:
    """The requests of one pass: each prompt once, the list repeated from its start to fill whole batches."""
    batches = -(-len(requests) // batch_size)
    return [requests[index % len(requests)] for index in range(batches * batch_size)]


def _typist(engine: Engine, watch: Watch) -> Callable[[list[int]], None] | None:
    """Types the first request's text as its tokens come: the new end of the text so far, since a letter may be two tokens."""
    tell = watch.on_text
    if tell is None:
        return None
    seen: list[int] = []
    typed = ""

    def on_tokens(step: list[int]) -> None:
        nonlocal typed
        seen.append(step[0])
        text = engine.decode(seen)
        if not text.endswith("\ufffd"):
            tell(text[len(typed) :])
            typed = text

    return on_tokens


def _one_pass(
    engine: Engine,
    run: RunSpec,
    requests: Sequence[Request],
    gpus: Sequence[hardware.Gpu],
    *,
    repeat: int,
    on_tokens: Callable[[list[int]], None] | None = None,
) -> Repeat:
    """Generate for every request, `batch_size` in flight at once."""
    sampling = run.sampling
    if not sampling.greedy:  # every repeat draws other tokens, repeatably
        sampling = replace(sampling, seed=(sampling.seed or 0) + repeat)
    engine.reset_peak_memory()
    wall_s, energy_j = 0.0, 0.0
    counted = True
    answered: list[tuple[Request, float, Generated]] = []
    for batch in _batches(requests, run.batch_size):
        energy_before = hardware.energy_j(gpus)
        handed = time.perf_counter()
        generated = engine.generate(
            batch,
            max_new_tokens=run.max_new_tokens,
            sampling=sampling,
            ignore_eos=run.ignore_eos,
            on_tokens=on_tokens,
        )
        wall_s += time.perf_counter() - handed
        energy_after = hardware.energy_j(gpus)
        counted = counted and energy_before is not None and energy_after is not None
        energy_j += (energy_after or 0.0) - (energy_before or 0.0)
        answered += [(request, handed, answer) for request, answer in zip(batch, generated, strict=True)]
        on_tokens = None  # a person reads the first answer, not all of them
    samples = [_sample(engine, run, index, *answer) for index, answer in enumerate(answered)]
    return Repeat(
        repeat=repeat,
        wall_s=wall_s,
        samples=samples,
        devices=engine.memory(),
        seed=sampling.seed,
        energy_j=energy_j if counted else None,
        read_bytes_per_step=_read_bytes_per_step(engine, run, samples),
        memory_bandwidth_bytes_s=gpus[0].memory_bandwidth_bytes_s if gpus else None,
    )


def _batches(requests: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


def _sample(engine: Engine, run: RunSpec, index: int, request: Request, handed: float, answer: Generated) -> Sample:
    return Sample(
        request=index,
        prompt=request.prompt,
        prompt_tokens=len(request.token_ids),
        token_ids=answer.token_ids,
        token_times_s=[reading - handed for reading in answer.token_times],
        finish_reason=answer.finish_reason,
        text=engine.decode(answer.token_ids),
        batch=index // run.batch_size,
    )


def _read_bytes_per_step(engine: Engine, run: RunSpec, samples: Sequence[Sample]) -> float | None:
    """At the mean context of the decode steps: the prompt and half of the answer."""
    contexts = [sample.prompt_tokens + len(sample.token_ids) / 2 for sample in samples]
    return engine.read_bytes_per_step(statistics.fmean(contexts), run.batch_size) if contexts else None


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


def _score(engine: Engine, requests: Sequence[Request], repeats: Sequence[Repeat]) -> None:
    """Log-probabilities of every answer; an answer that several requests share is scored once."""
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], list[float] | None] = {}
    for repeat in repeats:
        for sample, request in zip(repeat.samples, requests, strict=True):
            key = (request.token_ids, tuple(sample.token_ids))
            if key not in known:
                known[key] = _scored(engine, request, sample.token_ids)
            sample.log_probabilities = known[key]
