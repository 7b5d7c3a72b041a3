"""Doubtful measurements, such as passes that are too short, and the thresholds with their reasons. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from labctl_orchestrator.analysis.metrics import ALL_METRICS, OF_A_LOAD, figure

# A pause of 10 ms (a scheduler's time slice, Python's garbage collection, a rising clock) is 1% of a second: as much as the
# difference between two engine loads.
SHORTEST_PASS_S = 1.0
# A prompt, like a decode step, reads each weight once. Arithmetic takes longer than reading only from (peak FLOP/s) / (bytes/s of
# memory) tokens on: about 300 on an H100, 140 on a V100, fewer on a CPU. Below 16 tokens ttft is the fixed cost of a step.
FEWEST_PROMPT_TOKENS = 16

SHORT_PASS, SHORT_PROMPT, NO_TOKENS = "short pass", "short prompt", "no tokens"
# Answers with tokens and without text: the model ended at once, or generated the full length.
ENDED_AT_ONCE, TOKENS_WITHOUT_TEXT = "empty answers", "tokens without text"
KINDS = (SHORT_PASS, SHORT_PROMPT, ENDED_AT_ONCE, TOKENS_WITHOUT_TEXT, NO_TOKENS)
UNITS_OF_TIME = ("s", "tok/s", "J", "J/tok", "tok/J", "/Mtok")


class Doubt(NamedTuple):
    """One of KINDS and its value: seconds of the shortest pass, tokens of the longest prompt, or a number of answers."""

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
    total = sum(values)
    what = f"{total:g} answer{'s' if total != 1 else ''}"
    if kind == TOKENS_WITHOUT_TEXT:
        return f"{what} without text{of}: all tokens are special tokens or spaces; check the prompt and the model"
    if kind == ENDED_AT_ONCE:
        return f"{what} without text{of}: the model ended at once; check the prompt, or use --ignore-eos"
    return f"{what} of 0 tokens{of}: no speed was measured; check the prompt"


def _seconds(value: float) -> str:
    """ "0.4 s"; below a hundredth in ms."""
    return f"{value:.2g} s" if value >= 0.01 else figure(value, "s")
