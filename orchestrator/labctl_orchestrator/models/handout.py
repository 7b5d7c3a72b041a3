"""The handout's own sums and rules of thumb, beside those of `fit`. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from labctl_orchestrator.models.architecture import Shape
from labctl_orchestrator.models.fit import (
    COMFORTABLE,
    DOES_NOT,
    FITS,
    GIB,
    TIGHT,
    VERDICTS,
    Case,
    Workload,
    kv_bytes_per_token,
)


def kv_bytes_by_the_handout(shape: Shape, itemsize: int) -> int:
    """The handout's rule, 2 x layers x hidden size x bytes: right where every query head has keys of its own."""
    return 2 * shape.layers * shape.hidden * itemsize


@dataclass(frozen=True)
class Rule:
    """A line of the handout's rules of thumb: so many billion parameters on two GPUs of this memory are this. What is easy
    for 7B is so for less."""

    gpu_gib: int
    least: float
    most: float
    said: str
    means: str


RULES = (
    Rule(32, 0.0, 8.1, "2 x V100 32 GB: 1B-7B comfortable", FITS),
    Rule(32, 12.0, 14.0, "2 x V100 32 GB: 13B tight", TIGHT),
    Rule(80, 0.0, 14.0, "2 x H100 80 GB: 7B-13B easy", FITS),
    Rule(80, 27.0, 35.0, "2 x H100 80 GB: 30B with care", TIGHT),
)


@dataclass(frozen=True)
class Handout:
    """What the handout's sums say: half of the weights on each of two GPUs, its rule for keys and values, 20-30% kept free."""

    weights: int
    kv_cache: int
    verdict: str
    rule: Rule | None


def by_the_handout(case: Case, load: Workload, parameters: int) -> Handout:
    weights = case.parts.total // case.gpus.count
    kv_cache = kv_bytes_by_the_handout(case.shape, load.itemsize) * load.context * load.batch // case.gpus.count
    needed, memory = weights + kv_cache, case.gpus.memory_bytes
    verdict = FITS if needed <= 0.7 * memory else TIGHT if needed <= COMFORTABLE * memory else DOES_NOT
    billions = parameters / 1e9
    rule = next(
        (
            rule
            for rule in RULES
            if case.gpus.count == 2
            and round(memory / GIB) == rule.gpu_gib
            and load.itemsize == 2
            and rule.least <= billions <= rule.most
        ),
        None,
    )
    return Handout(weights, kv_cache, verdict, rule)


def agreement(case: Case, load: Workload, handout: Handout) -> str:
    """Whether the verdict is that of the handout's rule of thumb; else, in figures, why not."""
    own = case.verdict(load)
    if handout.rule is None:
        return "the handout's rules of thumb say nothing of this size on these GPUs"
    if own == handout.rule.means:
        return f"as the handout says ({handout.rule.said})"
    share = case.needed_bytes(load) / case.gpus.usable_bytes
    if VERDICTS.index(own) < VERDICTS.index(handout.rule.means):
        batch = case.largest_batch(load) + 1
        return (
            f"the handout is more careful ({handout.rule.said}): {load.batch} x {load.context + 1} tokens take {share:.0%} of a"
            f" GPU with {case.backend}; it becomes tight from a batch of {batch:,} of that length on"
        )
    kv_gib = kv_bytes_per_token(case.shape, load.itemsize) * load.context * load.batch / GIB
    return (
        f"the handout is more hopeful ({handout.rule.said}): it counts no batch and no length, and"
        f" {load.batch} x {load.context + 1} tokens have {kv_gib:.1f} GiB of keys and values over all GPUs"
    )
