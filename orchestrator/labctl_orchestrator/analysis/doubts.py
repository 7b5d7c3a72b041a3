"""Doubtful measurements, such as passes that are too short, and the thresholds with their reasons. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from labctl_orchestrator.analysis.metrics import ALL_METRICS, OF_A_LOAD, figure

# A pause of 10 ms (a scheduler's time slice, Python's garbage collection, a rising clock) is 1% of a second: as much as the
# difference between two engine loads.
SHORTEST_PASS_S = 1.0
# A prompt, like a decode step, reads each weight once. Arithmetic takes longer than reading only from (peak FLOP/s) / (bytes/s of
# memory) tokens on: about 300 on an H100, 140 on a V100, fewer on a CPU. Below 16 tokens ttft is the fixed cost of a step.
FEWEST_PROMPT_TOKENS = 16

# Above this share of the time, the load generator's one thread cannot send and read faster. Above this lag, as a share of the
# mean gap between arrivals, requests do not arrive as they should.
BUSY_CLIENT_SHARE = 0.8
LATE_CLIENT_SHARE = 0.1
# A smaller growth of the queue in the later half of the arrivals is within chance and a slow start.
GROWING_QUEUE_SHARE = 0.05
# More of the window after the last request was sent shows the end of the load, not the load.
LONGEST_DRAIN_SHARE = 0.25

SHORT_PASS, SHORT_PROMPT, NO_TOKENS = "short pass", "short prompt", "no tokens"
# Of served runs.
FAILED, SATURATED, CLIENT_BUSY, CLIENT_LATE, LONG_DRAIN = (
    "failed requests", "over-saturated", "client busy", "client late", "long drain"
)  # fmt: skip
# Answers with tokens and without text: the model ended at once, or generated the full length.
ENDED_AT_ONCE, TOKENS_WITHOUT_TEXT = "empty answers", "tokens without text"
KINDS = (
    FAILED, SATURATED, CLIENT_BUSY, CLIENT_LATE, LONG_DRAIN, SHORT_PASS, SHORT_PROMPT, ENDED_AT_ONCE, TOKENS_WITHOUT_TEXT,
    NO_TOKENS,
)  # fmt: skip
UNITS_OF_TIME = ("s", "tok/s", "J", "J/tok", "tok/J", "/Mtok")


class Doubt(NamedTuple):
    """One of KINDS and its value: seconds of the shortest pass or of the client's lag, tokens of the longest prompt, a number of
    answers or requests, or a share."""

    kind: str
    value: float

    def concerns(self, metric: str) -> bool:
        """Whether it affects this metric."""
        if metric in OF_A_LOAD:
            return False
        if self.kind == SHORT_PASS:
            return metric == "mbu" or ALL_METRICS[metric].unit in UNITS_OF_TIME
        if self.kind == SHORT_PROMPT:
            return metric.startswith(("ttft", "prefill"))
        return metric != "weights_bytes"


class Serving(NamedTuple):
    """The largest values over a served run's repeats of the metrics with these names; None where a run has none."""

    failed_requests: float | None = None
    client_busy_share: float | None = None
    client_lag_p99_s: float | None = None
    drain_share: float | None = None
    queue_growth: float | None = None


def of_serving(seen: Serving, request_rate: float | None) -> list[Doubt]:
    """The doubts about a served run."""
    gap_s = 1 / request_rate if request_rate else math.inf
    limits = (
        (FAILED, seen.failed_requests, 0.0),
        (SATURATED, seen.queue_growth, GROWING_QUEUE_SHARE),
        (CLIENT_BUSY, seen.client_busy_share, BUSY_CLIENT_SHARE),
        (CLIENT_LATE, seen.client_lag_p99_s, LATE_CLIENT_SHARE * gap_s),
        (LONG_DRAIN, seen.drain_share, LONGEST_DRAIN_SHARE),
    )
    return [Doubt(kind, value) for kind, value, most in limits if value is not None and value > most]


def of_run(
    pass_s: float | None, prompt_tokens: int | None, empty_answers: int, without_tokens: int, finish_reasons: str | None
) -> list[Doubt]:
    """The doubts about a run, from its shortest pass (s), longest prompt (tokens, with chat template), number of answers without
    text and without tokens, and finish reasons ("length/stop"). None: unknown."""
    found = []
    if pass_s is not None and pass_s < SHORTEST_PASS_S:
        found.append(Doubt(SHORT_PASS, pass_s))
    if prompt_tokens is not None and prompt_tokens < FEWEST_PROMPT_TOKENS:
        found.append(Doubt(SHORT_PROMPT, prompt_tokens))
    if empty_answers:
        ended = "stop" in (finish_reasons or "")
        found.append(Doubt(ENDED_AT_ONCE if ended else TOKENS_WITHOUT_TEXT, empty_answers))
    if without_tokens:
        found.append(Doubt(NO_TOKENS, without_tokens))
    return found


def sentence(kind: str, values: Sequence[float], of: str = "") -> str:
    """The doubt with its remedy: "shortest repeat 0.4 s: times under 1 s are not exact; raise max_new_tokens or batch_size".
    `of` names the runs."""
    low, high = min(values), max(values)
    if kind == SHORT_PASS:
        seen = " to ".join(dict.fromkeys(_seconds(value) for value in (low, high)))
        remedy = f"times under {SHORTEST_PASS_S:g} s are not exact; raise max_new_tokens or batch_size"
        return f"shortest repeat{'s' if len(values) > 1 else ''} {seen}{of}: {remedy}"
    if kind == SHORT_PROMPT:
        seen = " to ".join(dict.fromkeys(f"{value:g}" for value in (low, high)))
        remedy = f"below {FEWEST_PROMPT_TOKENS}, ttft and prefill_tok_s show only the fixed cost of a step; use a longer prompt"
        return f"prompt of {seen} tokens{of}: {remedy}"
    if kind in REMEDIES_OF_SERVING:
        seen = " to ".join(dict.fromkeys(_of_serving(kind, value) for value in (low, high)))
        what, remedy = REMEDIES_OF_SERVING[kind]
        return f"{what.format(seen)}{of}: {remedy}"
    total = sum(values)
    what = f"{total:g} answer{'s' if total != 1 else ''}"
    if kind == TOKENS_WITHOUT_TEXT:
        return f"{what} without text{of}: all tokens are special tokens or spaces; check the prompt and the model"
    if kind == ENDED_AT_ONCE:
        return f"{what} without text{of}: the model ended at once; check the prompt, or use --ignore-eos"
    return f"{what} of 0 tokens{of}: no speed was measured; check the prompt"


# What was seen, and what it means.
REMEDIES_OF_SERVING = {
    FAILED: ("{} requests failed", "metrics are of the others; labctl show names the first reason"),
    SATURATED: (
        "server over-saturated, its queue grew by {} of the later arrivals",
        "latencies grow with the length of the run; use a lower request_rate",
    ),
    CLIENT_BUSY: (
        "load generator was busy for {} of the window",
        "it is the bottleneck, not the server; use a lower request_rate or batch_size, or more cpus_per_task",
    ),
    CLIENT_LATE: (
        "load generator was {} behind the schedule",
        "the arrivals were not those of the request_rate; use a lower one, or a node with more free CPUs",
    ),
    LONG_DRAIN: (
        "{} of the window is after the last request was sent",
        "throughput includes this end of the load; raise requests",
    ),
}


def _of_serving(kind: str, value: float) -> str:
    if kind == FAILED:
        return f"{value:g}"
    return _seconds(value) if kind == CLIENT_LATE else f"{value:.0%}"


def _seconds(value: float) -> str:
    """ "0.4 s"; below a hundredth in ms."""
    return f"{value:.2g} s" if value >= 0.01 else figure(value, "s")
