"""Doubtful measurements, such as passes that are too short, and the thresholds with their reasons. Pure."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from labctl_orchestrator.analysis import intervals
from labctl_orchestrator.analysis.metrics import ALL_METRICS, OF_A_LOAD, OF_A_TEXT, OF_TASKS, figure
from labctl_orchestrator.store.window import SHARED, THROTTLED, THROTTLED_SHARE, Window
from labctl_workers.measure import GROWING_QUEUE_SHARE

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
# More of the window after the last request was sent shows the end of the load, not the load.
LONGEST_DRAIN_SHARE = 0.25
# `transformers serve` keeps whole blocks of this many tokens of a prompt, and cannot be told to forget them.
KEPT_TOKENS = 256

# A larger standard error of the mean hides a difference of 5% (two standard errors of two runs).
LARGEST_ERROR = 0.02
# More repeats are not proposed: then the machine must become quieter.
MOST_MORE_REPEATS, MOST_MORE_LOADS = 200, 5
# From this many repeats on, each third has two. A trend is marked where Student's t exceeds its 99.5% quantile for 2 degrees of
# freedom, the fewest of such thirds.
FEWEST_REPEATS_FOR_A_TREND = 6
T_OF_A_TREND = 9.92
SMALLEST_TREND = 0.01
# A clock has steps of 15 MHz (1%), and boost clocks follow the temperature by some of them.
OTHER_CLOCKS_SHARE = 0.05

SHORT_PASS, SHORT_PROMPT, NO_TOKENS = "short pass", "short prompt", "no tokens"
# Of served runs.
FAILED, SATURATED, CLIENT_BUSY, CLIENT_LATE, LONG_DRAIN, CACHE_KEPT = (
    "failed requests", "over-saturated", "client busy", "client late", "long drain", "prefix cache kept"
)  # fmt: skip
# Validity: another measurement of the same run may give another figure. The last two are relative to the baseline.
NOISY, UNSTEADY, TOO_WIDE, OTHER_CLOCKS, OTHER_NODE = (
    "noisy",
    "unsteady",
    "interval too wide",
    "other clocks",
    "other node",
)
TO_MEASURE_AGAIN = (THROTTLED, SHARED, UNSTEADY, NOISY, TOO_WIDE)
VALIDITY = (*TO_MEASURE_AGAIN, OTHER_CLOCKS, OTHER_NODE)
# Answers with tokens and without text: the model ended at once, or generated the full length.
ENDED_AT_ONCE, TOKENS_WITHOUT_TEXT = "empty answers", "tokens without text"
KINDS = (
    *VALIDITY, FAILED, SATURATED, CLIENT_BUSY, CLIENT_LATE, LONG_DRAIN, CACHE_KEPT, SHORT_PASS, SHORT_PROMPT, ENDED_AT_ONCE,
    TOKENS_WITHOUT_TEXT, NO_TOKENS,
)  # fmt: skip
UNITS_OF_TIME = ("s", "tok/s", "tok/s/GPU", "J", "J/tok", "tok/J", "/Mtok")


class Doubt(NamedTuple):
    """One of KINDS and its value: seconds of the shortest pass or of the client's lag, tokens of the longest prompt, a number of
    answers, requests or processes, MHz, or a share. `detail`: reasons, nodes, or what would do, in words."""

    kind: str
    value: float
    detail: str = ""

    def concerns(self, metric: str) -> bool:
        """Whether it affects this metric."""
        return _concerns(self.kind, metric)


@functools.cache
def _concerns(kind: str, metric: str) -> bool:
    if metric in OF_A_LOAD or metric in OF_A_TEXT or metric in OF_TASKS:
        return False
    if kind == SHORT_PASS or kind in VALIDITY:
        return metric == "mbu" or ALL_METRICS[metric].unit in UNITS_OF_TIME
    if kind == SHORT_PROMPT:
        return metric.startswith(("ttft", "prefill"))
    return metric != "weights_bytes"


class Serving(NamedTuple):
    """The largest values over a served run's repeats of the metrics with these names; None where a run has none."""

    failed_requests: float | None = None
    client_busy_share: float | None = None
    client_lag_p99_s: float | None = None
    drain_share: float | None = None
    queue_growth: float | None = None
    arrival_gap_s: float | None = None


def of_serving(seen: Serving) -> list[Doubt]:
    """The doubts about a served run."""
    gap_s = seen.arrival_gap_s or math.inf  # 0: all requests arrive at once
    limits = (
        (FAILED, seen.failed_requests, 0.0),
        (SATURATED, seen.queue_growth, GROWING_QUEUE_SHARE),
        (CLIENT_BUSY, seen.client_busy_share, BUSY_CLIENT_SHARE),
        (CLIENT_LATE, seen.client_lag_p99_s, LATE_CLIENT_SHARE * gap_s),
        (LONG_DRAIN, seen.drain_share, LONGEST_DRAIN_SHARE),
    )
    return [Doubt(kind, value) for kind, value, most in limits if value is not None and value > most]


def of_cache(backend: str, *, served: bool, prompt_tokens: int | None) -> list[Doubt]:
    """The doubt about a served run whose repeats find prompts of earlier ones in a cache, from its longest prompt (tokens)."""
    if served and backend == "hf" and (prompt_tokens or 0) > KEPT_TOKENS:
        return [Doubt(CACHE_KEPT, float(prompt_tokens or 0))]
    return []


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


def of_windows(windows: Sequence[Window]) -> list[Doubt]:
    """The doubts about the state of the GPUs in the windows of a run's engine loads."""
    found = []
    throttled = [window for window in windows if THROTTLED in window.invalid]
    if throttled:
        reasons = dict.fromkeys(reason for window in throttled for reason in window.throttle_reasons)
        share = max(window.throttled_share or 0.0 for window in throttled)
        found.append(Doubt(THROTTLED, share, " and ".join(reasons)))
    missed = [w.until for w in windows if w.until and (w.until.half_width or 0.0) > w.until.target]
    if missed:
        widest = max(missed, key=lambda until: until.half_width or 0.0)
        why = f"--until {widest.target * 100:g}% ended by the limit of {widest.stopped_by}"
        found.append(Doubt(TOO_WIDE, widest.half_width or 0.0, why))
    others = max((window.other_processes or 0 for window in windows), default=0)
    if others:
        found.append(Doubt(SHARED, others))
    return found


def of_rates(by_load: Sequence[Sequence[float]]) -> list[Doubt]:
    """The doubts about the scatter of a run's throughput, a list per engine load with a value per repeat in their order."""
    if not any(map(_may_scatter, by_load)):
        return []
    logs = [list(map(math.log, of_load)) for of_load in by_load if len(of_load) > 1 and min(of_load) > 0]
    if not logs:
        return []
    found = []
    trends = [trend for of_load in logs if (trend := _trend(of_load)) is not None]
    if trends:
        found.append(Doubt(UNSTEADY, max(trends, key=abs)))
    # The error within loads; that between loads is part of a comparison's interval.
    error = math.sqrt(sum(intervals.variance(of_load) / len(of_load) for of_load in logs)) / len(logs)
    if error > LARGEST_ERROR:
        found.append(Doubt(NOISY, error, str(more_repeats(error, sum(map(len, logs))))))
    return found


def _may_scatter(of_load: Sequence[float]) -> bool:
    """Whether the values of a load may have a trend or a standard error above LARGEST_ERROR."""
    n = len(of_load)
    if n < 2 or n >= FEWEST_REPEATS_FOR_A_TREND:
        return n > 1
    # n values that lie up to a factor f apart have a standard error of at most (f - 1) / 2 / sqrt(n - 1).
    low = min(of_load)
    return max(of_load) - low >= 2 * LARGEST_ERROR * math.sqrt(n - 1) * low


def more_repeats(error: float, repeats: int) -> int:
    """The repeats beyond these with which the standard error of the mean falls to LARGEST_ERROR, if the scatter stays."""
    return math.ceil(repeats * ((error / LARGEST_ERROR) ** 2 - 1) - 1e-9)


def more_loads(error: float, loads: int) -> int:
    """The further engine loads, MOST_MORE_LOADS at most, with which the error falls to LARGEST_ERROR. Each has the repeats so far
    and `more_repeats`. A run's figure is the mean of its loads, so the first ones keep their weight."""
    more = 1
    while more < MOST_MORE_LOADS and (loads * error) ** 2 > LARGEST_ERROR**2 * ((loads + more) ** 2 - more):
        more += 1
    return more


def _trend(logs: Sequence[float]) -> float | None:
    """The relative change from the first third of the repeats to the last one, where it is beyond their scatter."""
    third = len(logs) // 3
    if len(logs) < FEWEST_REPEATS_FOR_A_TREND:
        return None
    first, last = logs[:third], logs[-third:]
    difference = sum(last) / third - sum(first) / third
    error = math.sqrt((intervals.variance(first) + intervals.variance(last)) / third)
    change = math.expm1(difference)
    return change if abs(difference) > T_OF_A_TREND * error and abs(change) > SMALLEST_TREND else None


def of_validity(found: Sequence[Doubt], of: str = "") -> str:
    """A sentence on doubts of one kind of VALIDITY, with its remedy. `of` names the runs."""
    kind, details = found[0].kind, " and ".join(dict.fromkeys(one.detail for one in found if one.detail))
    worst = max(found, key=lambda one: abs(one.value))
    if kind == THROTTLED:
        what = f"GPU clocks were reduced in {worst.value:.0%} of the measured time{of}: {details or 'unknown reason'}"
        return f"{what}; above {THROTTLED_SHARE:.0%} results are not reliable; measure again"
    if kind == SHARED:
        count = f"{worst.value:g} other process{'es' if worst.value != 1 else ''}"
        return f"{count} used the job's GPUs{of}: measure again on GPUs that no other process uses"
    if kind == UNSTEADY:
        return f"throughput changed by {worst.value:+.1%} from the first to the last third of the repeats{of}: raise --warmup"
    if kind == NOISY:
        more, up_to = max(int(one.detail) for one in found), "up to " * (len(found) > 1)
        enough = (
            f"{up_to}{more} more repeats would bring it to {LARGEST_ERROR:.0%}"
            if more <= MOST_MORE_REPEATS
            else f"only a quieter machine or longer repeats bring it to {LARGEST_ERROR:.0%}"
        )
        return f"mean throughput is too uncertain{of}: standard error {up_to}{worst.value:.1%}; {enough}"
    if kind == TOO_WIDE:
        return (
            f"95% interval of the mean is +-{worst.value:.1%}{of}: {details}; use longer repeats or a quieter machine"
        )
    if kind == OTHER_CLOCKS:
        return f"mean SM clock differs by {worst.value:.0%} from the baseline's{of}: {details}; measure both again in one job"
    return f"measured on another node than the baseline{of}: {details}; measure both on one node with --sbatch nodelist=NODE"


def sentence(kind: str, values: Sequence[float], of: str = "") -> str:
    """The doubt with its remedy: "shortest repeat 0.4 s: times under 1 s are not exact; raise max_new_tokens or batch_size".
    `of` names the runs. For kinds of VALIDITY see `of_validity`."""
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
        "requests arrived later than they should; use a lower request_rate, or a node with more free CPUs",
    ),
    LONG_DRAIN: (
        "{} of the window is after the last request was sent",
        "throughput includes this time of fewer requests; raise requests",
    ),
    CACHE_KEPT: (
        "prompts of {} tokens, of which transformers serve keeps blocks of 256 between repeats",
        "ttft and throughput are partly those of its cache; use prompts of at most 256 tokens, or --backend vllm",
    ),
}


def _of_serving(kind: str, value: float) -> str:
    if kind in (FAILED, CACHE_KEPT):
        return f"{value:g}"
    return _seconds(value) if kind == CLIENT_LATE else f"{value:.0%}"


def _seconds(value: float) -> str:
    """ "0.4 s"; below a hundredth in ms."""
    return f"{value:.2g} s" if value >= 0.01 else figure(value, "s")
