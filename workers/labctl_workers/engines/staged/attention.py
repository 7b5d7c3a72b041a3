"""Attention of one new token for grouped heads, without copies of keys and values.

transformers repeats each key-value head for the query heads that share it, which at TinyLlama's dimensions reads and writes
the cache eight times over at every token. With one query a sequence there is nothing causal left to mask inside of it, so the
query heads of a group are laid out as rows of one matrix: the same sums, and the cache is read once. Prompts go through
the attention that the model was loaded with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

# Which transformers attention can be stood in for; and how the scores of one token are computed.
BASES = ("sdpa", "eager")
DECODE_WITH = ("sdpa", "matmul", "reduce")
# Beyond this many slots a reduction, which reads the cache once for each query head of a group, is the slower one: 28 us
# against 15 at 2,272 slots of 8 key-value heads for 32 query heads (H200). torch's fused attention, which has one block for a
# key-value head and a sequence, takes 53 us there, 105 against 90 at 32 sequences.
REDUCE_UP_TO_SLOTS = 512


PREFIX = "labctl_"


def base_of(name: str) -> str:
    """The attention that prompts go through, of a name that `register` gave."""
    return name.removeprefix(PREFIX).partition("_")[0]


def register(base: str, decode_with: str) -> str:
    """Make the attention known to transformers; returns the name that a model's config is to hold.

    `base` ("sdpa" or "eager") is what prompts go through, and whose conventions hold (of the two, eager alone caps scores
    where a model asks for it). `decode_with`: torch's fused attention, two batched products, or products and sums that a
    compiler fuses ("reduce": for one sequence and a short cache, else the batched products).
    """
    from transformers import AttentionInterface

    name = f"{PREFIX}{base}_{decode_with}"
    AttentionInterface.register(name, _attention(base, decode_with))
    return name


def _attention(base: str, decode_with: str) -> Callable[..., tuple[Any, None]]:
    from torch.nn import functional
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    of_prompts = ALL_ATTENTION_FUNCTIONS["sdpa"] if base == "sdpa" else _eager_of_the_module

    def attention(
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[Any, None]:
        """query [B, H, Q, D], key and value [B, KV, L, D], attention_mask additive [B, 1, Q, L]; returns [B, Q, H, D]."""
        batch, heads, queries, width = query.shape
        if queries > 1:
            if base == "eager":
                others["softcap"] = softcap
            output, _ = of_prompts(module, query, key, value, attention_mask, scaling=scaling, **others)
            return output, None
        kv_heads, slots = key.shape[1], key.shape[2]
        grouped = query.reshape(batch, kv_heads, heads // kv_heads, width)
        scale = width**-0.5 if scaling is None else scaling
        reduce = decode_with == "reduce" and batch == 1 and slots <= REDUCE_UP_TO_SLOTS
        if base == "eager" or (decode_with != "sdpa" and not reduce):
            scores = grouped @ key.transpose(2, 3) * scale
            if softcap is not None and base == "eager":
                scores = (scores / softcap).tanh() * softcap
            weights = functional.softmax(scores + attention_mask, dim=-1, dtype=_float32()).to(query.dtype)
            output = weights @ value
        elif reduce:
            scores = (grouped.unsqueeze(3).float() * key.unsqueeze(2).float()).sum(-1) * scale + attention_mask
            output = _mean_by_scores(scores, value.float()).to(query.dtype)
        else:
            output = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scale)
        return output.reshape(batch, 1, heads, width), None

    return attention


def _mean_by_scores(scores: Any, value: Any) -> Any:
    """softmax(scores) @ value, [B, KV, G, D], of scores [B, KV, G, L] and value [B, KV, L, D].

    The greatest score and the sum of the weights are found anew for each number of the output: then all three are loops over
    the same slots, which a compiler makes one kernel of, where the softmax by itself would be another.
    """
    spread = scores.unsqueeze(-1).expand(*scores.shape, value.shape[-1])
    weights = (spread - spread.amax(3, keepdim=True)).exp()
    return (weights * value.unsqueeze(2)).sum(3) / weights.sum(3)


def _float32() -> Any:
    import torch

    return torch.float32


def _eager_of_the_module(module: Any, *tensors: Any, **settings: Any) -> tuple[Any, Any]:
    """The eager attention of the model's own file: its families differ in what they cap and scale."""
    found: tuple[Any, Any] = sys.modules[type(module).__module__].eager_attention_forward(module, *tensors, **settings)
    return found
