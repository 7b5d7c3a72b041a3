"""All metrics: of a repeat, of an engine load and its job, and metrics computed from those; and the text of a value. Pure."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from labctl_slurm.errors import WrongUseError
from labctl_workers.measure import METRICS


@dataclass(frozen=True)
class MetricText:
    """The words for a metric: title, unit, better direction ("higher", "lower" or ""), and when it has no value."""

    title: str
    unit: str
    better: str
    no_value_where: str = ""


# Of one engine load or of its job, not of a repeat.
OF_A_LOAD = {
    "load_s": MetricText("load", "s", "lower"),
    "init_s": MetricText("init", "s", "lower"),
    "warmup_s": MetricText("warm-up", "s", "lower"),
    "queue_s": MetricText("wait in the queue", "s", "lower"),
    "gpu_s": MetricText("GPU time of the job", "s", "lower"),
    "job_cost": MetricText("cost of the job", "", "lower"),
}
# Of a run's scored text, with an interval over its documents.
OF_A_TEXT = {
    "perplexity": MetricText("perplexity", "", "lower", "no text is scored (--score)"),
    "mean_log_likelihood": MetricText("log-likelihood", "nat/tok", "higher", "no text is scored (--score)"),
}
# Of the questions of a run's tasks, with an interval over them.
OF_TASKS = {"accuracy": MetricText("accuracy", "", "higher", "no task is asked (--quality)")}
# Metrics of a repeat that are computed from a stored one: name -> stored metric.
DERIVED_FROM = {
    "output_tok_s_per_gpu": "output_tok_s", "tokens_per_j": "energy_per_token_j", "cost_per_mtok": "output_tok_s",
}  # fmt: skip
DERIVED = {
    "output_tok_s_per_gpu": MetricText("throughput per GPU", "tok/s/GPU", "higher"),
    "tokens_per_j": MetricText("tokens per joule", "tok/J", "higher"),
    "cost_per_mtok": MetricText("cost per million tokens", "/Mtok", "lower"),
}
# Metrics of a repeat that service levels give, from each request's latencies.
OF_LEVELS = {
    "goodput": MetricText("goodput", "req/s", "higher", "no service level is given (--slo)"),
    "good_share": MetricText("good share", "", "higher", "no service level is given (--slo)"),
}
# Equal in every engine load: they follow from the model, the prompts and the draws.
SAME_IN_EVERY_LOAD = ("output_tokens", "weights_bytes", "kv_cache_used_bytes")
# Their unit begins with the partition's currency.
MONEY = ("cost_per_mtok", "job_cost")
RATE = "output_tok_s"
# Memory that an engine reserves by its own policy: vLLM takes its whole share of the GPU before the first request.
RESERVED = ("kv_cache_reserved_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes")

ALL_METRICS = {
    **{name: MetricText(m.title, m.unit, m.better, m.no_value_where) for name, m in METRICS.items()},
    **DERIVED,
    **OF_LEVELS,
    **OF_A_LOAD,
    **OF_A_TEXT,
    **OF_TASKS,
}
DEFAULT_METRICS = ("output_tok_s", "ttft_s", "tpot_s", "peak_allocated_bytes", "perplexity", "accuracy")
# Of a comparison of GPUs or of how they share a model.
SCALING_METRICS = ("output_tok_s", "output_tok_s_per_gpu", "tpot_s", "cost_per_mtok", "peak_allocated_bytes")
# What the ratios of these metrics are called there: throughput / that of the baseline, and the same of throughputs per GPU.
SCALING_RATIOS = {"output_tok_s": "speed-up", "output_tok_s_per_gpu": "efficiency"}
COST_METRICS = ("cost_per_mtok", "tokens_per_j", "energy_j", "gpu_s", "queue_s", "job_cost")


# Other names of metrics, beside their titles.
NAMES = {
    "tokens per second": "output_tok_s", "tok/s": "output_tok_s", "output tokens per second": "output_tok_s",
    "time to first token": "ttft_s", "first token": "ttft_s", "time per output token": "tpot_s",
    "inter-token latency": "itl_s", "inter token latency": "itl_s", "end-to-end latency": "e2e_s",
    "end to end latency": "e2e_s", "request latency": "e2e_s", "memory": "peak_allocated_bytes",
    "bandwidth": "mbu", "model bandwidth utilization": "mbu", "cost": "cost_per_mtok", "queue": "queue_s",
    "queue time": "queue_s", "gpu time": "gpu_s", "load time": "load_s", "warmup": "warmup_s",
    "speed-up": "output_tok_s", "good requests": "good_share", "efficiency": "output_tok_s_per_gpu",
}  # fmt: skip


def metric_named(word: str) -> str:
    """The metric with this name, title or other name in any case. Raises WrongUseError for another word."""
    if word in ALL_METRICS:
        return word
    known = {**NAMES, **{metric.title.lower(): name for name, metric in ALL_METRICS.items()}}
    plain = " ".join(word.lower().replace("_", " ").split())
    if plain in known:
        return known[plain]
    by_plain_name = {name.replace("_", " "): name for name in ALL_METRICS}
    if plain in by_plain_name:
        return by_plain_name[plain]
    close = difflib.get_close_matches(word.lower(), [*ALL_METRICS, *known], n=1, cutoff=0.5)
    guess = f"did you mean {close[0]!r}? " if close else "give one such as throughput, ttft, tpot or memory; "
    raise WrongUseError(f"unknown metric: {word!r}", f"{guess}docs/metrics.md lists all metrics")


def figure(value: float | None, unit: str) -> str:
    """A value in a readable unit: bytes as GiB, MiB or KiB, seconds below 1 as ms; "-" for None."""
    if value is None:
        return "-"
    if unit == "B":
        if abs(value) >= 2**30:
            return f"{value / 2**30:.2f} GiB"
        return f"{value / 2**20:.1f} MiB" if abs(value) >= 2**20 or value == 0 else f"{value / 2**10:.1f} KiB"
    if unit == "s" and abs(value) < 1:
        return f"{value * 1000:.1f} ms"
    return f"{value:.4g} {unit}".rstrip() if abs(value) < 9999.5 else f"{value:,.0f} {unit}".rstrip()
