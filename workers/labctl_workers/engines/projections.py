"""Projections of one input computed as one product: query, key and value; gate and up.

A matrix-vector product of 2048 x 256 ends before the memory is busy; beside its neighbours it is nearly free. The weights are
laid side by side once, and each module's own weight becomes a view of its part, so that nothing is held twice.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

# The modules that read one input, by the attribute of a decoder layer that holds them.
TOGETHER = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


def merge(layer: Any) -> None:
    """Merge the projections of a decoder layer, where it has those of the Llama family as plain linear modules."""
    import torch

    for part, names in TOGETHER:
        owner = getattr(layer, part, None)
        modules = [getattr(owner, name, None) for name in names]
        if all(type(module) is torch.nn.Linear for module in modules):
            _merge(modules)


def unmerge(layer: Any) -> None:
    """Make the projections of a layer plain linear modules again; their weights stay where they are."""
    import torch

    for module in layer.modules():
        if isinstance(module, _merged_class()):
            module.__class__ = torch.nn.Linear
            del module.shared


def _merge(modules: Sequence[Any]) -> None:
    import torch

    biases = [module.bias for module in modules]
    if len({bias is None for bias in biases}) > 1:
        return
    weight = torch.cat([module.weight.detach() for module in modules])
    bias = None if biases[0] is None else torch.cat([module.bias.detach() for module in modules])
    shared = Shared(weight, bias, [module.out_features for module in modules])
    for place, (module, rows) in enumerate(zip(modules, weight.split(shared.sizes), strict=True)):
        module.weight = torch.nn.Parameter(rows, requires_grad=False)
        if bias is not None:
            module.bias = torch.nn.Parameter(bias.split(shared.sizes)[place], requires_grad=False)
        module.shared = shared
        module.place = place
        module.__class__ = _merged_class()


class Shared:
    """The weights side by side, [all rows, in], and what of the product its modules have not fetched yet."""

    def __init__(self, weight: Any, bias: Any, sizes: list[int]) -> None:
        self.weight = weight
        self.bias = bias
        self.sizes = sizes
        self.waiting: Any = None


@functools.cache
def _merged_class() -> Any:
    """A subclass of torch's Linear, made on first use: this module may be imported where there is no torch."""
    import torch

    class MergedLinear(torch.nn.Linear):  # type: ignore[misc]
        """The first module of the group computes for all, the others fetch; one that is asked alone computes alone."""

        def forward(self, entering: Any) -> Any:
            shared = self.shared
            if self.place == 0:
                product = torch.nn.functional.linear(entering, shared.weight)
                if shared.bias is not None:  # apart: a compiler turns a bare product of one row into a reduction
                    product = product + shared.bias
                parts = product.split(shared.sizes, dim=-1)
                shared.waiting = parts
                return parts[0]
            parts = shared.waiting
            if parts is None:
                return torch.nn.functional.linear(entering, self.weight, self.bias)
            if self.place == len(shared.sizes) - 1:
                shared.waiting = None
            return parts[self.place]

    return MergedLinear
