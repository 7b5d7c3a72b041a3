"""The handout's memory estimate and rules of thumb, beside those of `fit`. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from labctl_orchestrator.models import fit
from labctl_orchestrator.models.architecture import Shape
from labctl_orchestrator.models.fit import COMFORTABLE, DOES_NOT, FITS, GIB, TIGHT, VERDICTS, Case, Sequences


def handout_kv_bytes(shape: Shape, itemsize: int) -> int:
    """The handout's rule per token, 2 x layers x hidden size x bytes. It assumes keys for every query head."""
    return 2 * shape.layers * shape.hidden * itemsize


@dataclass(frozen=True)
class Rule:
    """A rule of thumb of the handout: its verdict for `least` to `most` billion parameters on two GPUs of this memory. A rule for
    7B holds for smaller models too."""

    gpu_gib: int
    least: float
    most: float
    text: str
    verdict: str


RULES = (
    Rule(32, 0.0, 8.1, "2 x V100 32 GB: 1B-7B comfortable", FITS),
    Rule(32, 12.0, 14.0, "2 x V100 32 GB: 13B tight", TIGHT),
    Rule(80, 0.0, 14.0, "2 x H100 80 GB: 7B-13B easy", FITS),
    Rule(80, 27.0, 35.0, "2 x H100 80 GB: 30B with care", TIGHT),
)


@dataclass(frozen=True)
class Handout:
    """The handout's estimate: half of the weights on each of two GPUs, its rule for keys and values, 20-30% kept free."""

    weights: int
    kv_cache: int
    verdict: str
    rule: Rule | None


def handout_estimate(case: Case, load: Sequences, parameters: int) -> Handout:
    copies = case.sizes.data if case.backend == "vllm" else 1
    weights = case.parts.total * copies // case.gpus.count
    kv_cache = handout_kv_bytes(case.shape, load.itemsize) * load.context * load.batch // case.gpus.count
    needed, memory = weights + kv_cache, case.gpus.memory_bytes
    verdict = FITS if needed <= 0.7 * memory else TIGHT if needed <= COMFORTABLE * memory else DOES_NOT
    billions = parameters / 1e9
    applies = case.gpus.count == 2 and copies == 1 and case.parts.total == 2 * parameters  # in 16 bits
    fitting = (r for r in RULES if round(memory / GIB) == r.gpu_gib and r.least <= billions <= r.most)
    rule = next(fitting, None) if applies else None
    return Handout(weights, kv_cache, verdict, rule)


def agreement(case: Case, load: Sequences, handout: Handout) -> str:
    """A sentence: the verdict agrees with the handout's rule of thumb, or why it does not."""
    own = case.verdict(load)
    if handout.rule is None:
        return "it has no rule of thumb for this size on these GPUs"
    if own == handout.rule.verdict:
        return f"its rule of thumb agrees with labctl ({handout.rule.text})"
    share = case.needed_bytes(load) / case.gpus.usable_bytes
    if VERDICTS.index(own) < VERDICTS.index(handout.rule.verdict):
        batch = case.largest_batch(load) + 1
        return (
            f"its rule of thumb is stricter ({handout.rule.text}): this workload needs {share:.0%} of a GPU with {case.backend};"
            f" a batch of {batch:,} would be tight"
        )
    kv_gib = fit.kv_bytes_per_token(case.shape, load.cache_itemsize) * load.context * load.batch / GIB
    return (
        f"its rule of thumb is more optimistic ({handout.rule.text}): it ignores the KV cache, which takes {kv_gib:.1f} GiB over"
        " all GPUs for this workload"
    )
