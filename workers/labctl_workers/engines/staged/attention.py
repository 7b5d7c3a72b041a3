"""Attention of one new token for grouped query heads, without copies of keys and values.

transformers repeats each key-value head for the query heads that share it: at TinyLlama's dimensions, every token then reads and
writes the cache eight times. With one query for each sequence there is no causal mask, so the query heads of a group become rows
of one matrix: the same sums, and the cache is read once. Prompts use the model's original attention.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

# The attentions of transformers that this one replaces.
BASES = ("sdpa", "eager")
# A reduction reads the cache once for each query head of a group, so it is slower with more slots: 28 us, batched products
# 15 us, at 2,272 slots of 8 key-value heads for 32 query heads (H200). torch's fused attention, with one block for each
# key-value head and sequence, takes 53 us; with 32 sequences 105 us, batched products 90 us.
REDUCE_UP_TO_SLOTS = 512
PREFIX = "labctl_"


def base_of(name: str) -> str:
    """The attention for prompts, from a name that `register` returned."""
    return name.removeprefix(PREFIX).partition("_")[0]


def register(base: str, decode_with: str) -> str:
    """Register the attention with transformers; returns its name for a model's config.

    `base` ("sdpa" or "eager") is the attention for prompts; only eager caps scores for models with a softcap. `decode_with` is
    for decoded tokens: torch's fused attention ("sdpa"), two batched products ("matmul"), or products and sums that a compiler
    fuses ("reduce", for one sequence and a short cache, else the batched products).
    """
    from transformers import AttentionInterface

    name = f"{PREFIX}{base}_{decode_with}"
    AttentionInterface.register(name, _attention(base, decode_with))
    return name


def _attention(base: str, decode_with: str) -> Callable[..., tuple[Any, None]]:
    import torch
    from torch.nn import functional
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    prompt_attention = ALL_ATTENTION_FUNCTIONS["sdpa"] if base == "sdpa" else _eager_attention

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
            output, _ = prompt_attention(module, query, key, value, attention_mask, scaling=scaling, **others)
            return output, None
        kv_heads, slots = key.shape[1], key.shape[2]
        grouped = query.reshape(batch, kv_heads, heads // kv_heads, width)
        scale = width**-0.5 if scaling is None else scaling
        reduce = decode_with == "reduce" and batch == 1 and slots <= REDUCE_UP_TO_SLOTS
        if base == "eager" or (decode_with != "sdpa" and not reduce):
            scores = _products(grouped, key) * scale
            if softcap is not None and base == "eager":
                scores = (scores / softcap).tanh() * softcap
            weights = functional.softmax(scores + attention_mask, dim=-1, dtype=torch.float32).to(query.dtype)
            output = weights @ value
        elif reduce:
            scores = (grouped.unsqueeze(3).float() * key.unsqueeze(2).float()).sum(-1) * scale + attention_mask
            output = _softmax_product(scores, value.float()).to(query.dtype)
        else:
            output = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scale)
        return output.reshape(batch, 1, heads, width), None

    return attention


def _softmax_product(scores: Any, value: Any) -> Any:
    """softmax(scores) @ value, [B, KV, G, D], of scores [B, KV, G, L] and value [B, KV, L, D].

    It recomputes the maximum and the sum for each element of the output: all three are loops over the same slots, which the
    compiler fuses into one kernel. A separate softmax would be a second kernel.
    """
    spread = scores.unsqueeze(-1).expand(*scores.shape, value.shape[-1])
    weights = (spread - spread.amax(3, keepdim=True)).exp()
    return (weights * value.unsqueeze(2)).sum(3) / weights.sum(3)


def _products(query: Any, key: Any) -> Any:
    """query [B, KV, G, D] times key [B, KV, L, D]: [B, KV, G, L], in float32 on a GPU.

    Large scores in 16 bits would have an error of half a percent, and so would the weights; torch's fused attention does not
    round scores.
    """
    import torch

    if query.is_cuda and query.dtype != torch.float32:
        flat = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
        return flat.unflatten(0, query.shape[:2])
    return query @ key.transpose(2, 3)


def _eager_attention(module: Any, *tensors: Any, **settings: Any) -> tuple[Any, Any]:
    """The eager attention from the model's own file: model families cap and scale differently."""
    found: tuple[Any, Any] = sys.modules[type(module).__module__].eager_attention_forward(module, *tensors, **settings)
    return found
