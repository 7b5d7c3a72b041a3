"""Samples the next token of each sequence on the device."""

from __future__ import annotations

from typing import Any


def draw(logits: Any, noise: Any, *, temperature: float, top_p: float) -> Any:
    """Token ids [N, 1] from logits [N, V] with temperature and top-p sampling, without waiting for the host.

    `noise` [N, V] is exponential with mean 1: the argmax of probability / noise is a token with its probability (the exponential
    form of the Gumbel-max trick).
    """
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # probability of all likelier tokens: 0 for the first, which always stays
        probabilities = probabilities.scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))
    return (probabilities / noise).argmax(-1, keepdim=True)


class Noise:
    """Exponential noise from a seed, the same for a batch with any number of micro-batches."""

    def __init__(self, device: Any, seed: int) -> None:
        import torch

        self.torch = torch
        self.device = device
        self.generator = torch.Generator(device=device)
        self.generator.manual_seed(seed)

    def draw_step(self, sequences: int, vocabulary: int) -> Any:
        """The noise of the next step, [sequences, vocabulary] in float32."""
        empty = self.torch.empty((sequences, vocabulary), dtype=self.torch.float32, device=self.device)
        return empty.exponential_(generator=self.generator).clamp_(min=self.torch.finfo(self.torch.float32).tiny)
