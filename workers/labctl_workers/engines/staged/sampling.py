"""The next token of each sequence, drawn on the device from random numbers that are given."""

from __future__ import annotations

from typing import Any


def draw(logits: Any, noise: Any, *, temperature: float, top_p: float) -> Any:
    """Token ids [N, 1] from logits [N, V] at this temperature, out of the most likely tokens that hold `top_p` together.

    `noise` [N, V] is exponential with mean 1: the largest of probability / noise falls on each token as often as its
    probability says. Nothing waits for the host.
    """
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # what the more likely ones hold: the first token always stays
        probabilities = probabilities.scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))
    return (probabilities / noise).argmax(-1, keepdim=True)


class Noise:
    """Exponential noise from a seed, the same for a batch however it is cut into micro-batches."""

    def __init__(self, device: Any, seed: int) -> None:
        import torch

        self.torch = torch
        self.device = device
        self.generator = torch.Generator(device=device)
        self.generator.manual_seed(seed)

    def of_a_step(self, sequences: int, vocabulary: int) -> Any:
        """[sequences, vocabulary] in float32."""
        empty = self.torch.empty((sequences, vocabulary), dtype=self.torch.float32, device=self.device)
        return empty.exponential_(generator=self.generator).clamp_(min=self.torch.finfo(self.torch.float32).tiny)
