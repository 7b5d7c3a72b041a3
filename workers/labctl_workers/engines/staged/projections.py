"""The products of a decoder layer, computed in forms that a GPU's memory can be kept busy with.

Projections of one input are one product: query, key and value; gate and up. A matrix-vector product of 2048 x 256 ends before
the memory is busy; beside its neighbours it is nearly free. The weights are laid side by side once, and each module's own
weight becomes a view of its part, so that nothing is held twice.

A compiler that is given one row (one token of one sequence) gets sums instead of products, since sums fuse with what stands
before and behind them: the norm before a product is a second sum over the same row, and gate, up and what is made of both are
one kernel. The norm's factor is taken out of the sum, which is the same number but for rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The modules that read one input, by the attribute of a decoder layer that holds them.
TOGETHER = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
# As sums these two are fused by the compiler, with what is made of both; as one product they would be cut apart again.
SUMMED_APART = "mlp"
# What a norm may differ by from the formula that stands in for it.
SAME_NORM = 1e-5


def merge(layer: Any, norms: Mapping[str, Any] | None = None) -> None:
    """Merge the projections of a decoder layer, where it has those of the Llama family as plain linear modules.

    `norms` are the norms whose output nothing but these projections reads, by the attribute of the layer that holds the
    projections: a norm of the usual formula becomes a part of their sums.
    """
    import torch

    for part, names in TOGETHER:
        owner = getattr(layer, part, None)
        modules = [getattr(owner, name, None) for name in names]
        if all(type(module) is torch.nn.Linear for module in modules):
            _merge(modules, part == SUMMED_APART, (norms or {}).get(part))
    for module in layer.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = _classes().row_linear


def unmerge(layer: Any) -> None:
    """Make the projections and norms of a layer plain modules again; their weights stay where they are."""
    import torch

    for module in layer.modules():
        if isinstance(module, _classes().row_linear):
            module.__class__ = torch.nn.Linear
            module.__dict__.pop("shared", None)
        elif "norm_apart" in module.__dict__:
            module.__class__ = module.__dict__.pop("norm_apart")


def _merge(modules: Sequence[Any], summed_apart: bool, norm: Any) -> None:
    import torch

    biases = [module.bias for module in modules]
    if len({bias is None for bias in biases}) > 1:
        return
    weight = torch.cat([module.weight.detach() for module in modules])
    bias = None if biases[0] is None else torch.cat([module.bias.detach() for module in modules])
    shared = Shared(weight, bias, [module.out_features for module in modules], summed_apart, _folded(norm))
    for place, (module, rows) in enumerate(zip(modules, weight.split(shared.sizes), strict=True)):
        module.weight = torch.nn.Parameter(rows, requires_grad=False)
        if bias is not None:
            module.bias = torch.nn.Parameter(bias.split(shared.sizes)[place], requires_grad=False)
        module.shared = shared
        module.place = place
        module.__class__ = _classes().merged_linear


@dataclass
class Norm:
    """x / sqrt(mean(x^2) + epsilon) * factor, over the last dimension: Zhang and Sennrich, "Root Mean Square Layer
    Normalization"."""

    factor: Any
    epsilon: float


class Shared:
    """The weights side by side, [all rows, in], and what of the product its modules have not fetched yet."""

    def __init__(self, weight: Any, bias: Any, sizes: list[int], summed_apart: bool, norm: Norm | None) -> None:
        self.weight = weight
        self.bias = bias
        self.sizes = sizes
        self.summed_apart = summed_apart
        self.norm = norm
        self.waiting: Any = None


# ---------------------------------------------------------------- norms


def watch_norms(layer: Any, found: dict[str, Any]) -> list[Any]:
    """Hooks that note in `found`, while the layer's own forward runs, which norm gives each group of projections its input."""
    held: list[tuple[Any, Any]] = []  # outputs are held, so that none gets another's place in memory

    def left(module: Any, _: Any, output: Any) -> None:
        held.append((module, output))

    def entered(part: str, given: Sequence[Any]) -> None:
        for module, output in held:
            if given and output.data_ptr() == given[0].data_ptr() and output.shape == given[0].shape:
                found[part] = module

    hooks = [child.register_forward_hook(left) for child in layer.children() if _is_a_norm(child)]
    for part, names in TOGETHER:
        first = getattr(getattr(layer, part, None), names[0], None)
        if first is not None:
            hooks.append(first.register_forward_pre_hook(lambda _, given, part=part: entered(part, given)))
    hooks.append(layer.register_forward_hook(lambda *_: held.clear()))
    return hooks


def _is_a_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 1 and not list(module.children())


def _folded(module: Any) -> Norm | None:
    """The norm as its formula, and the module one that leaves a lone row to the sums; None where it has another formula."""
    import torch

    if module is None:
        return None
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(epsilon, float):
        return None
    weight = module.weight.detach()
    # Of a mean that is not zero: else a norm that takes the mean off would look the same.
    row = torch.linspace(-2, 3, len(weight), device=weight.device, dtype=torch.float64)[None].to(weight.dtype)
    own = module(row).double()
    normed = row.double() / (row.double().square().mean(-1, keepdim=True) + epsilon).sqrt()
    for factor in (weight, 1 + weight.double()):
        if (own - normed * factor).norm() <= max(SAME_NORM, torch.finfo(weight.dtype).eps) * own.norm():
            if "norm_apart" not in module.__dict__:  # one norm may serve both groups
                module.norm_apart = type(module)
                module.__class__ = _classes().norm_apart(type(module))
            return Norm(factor if factor is weight else factor.to(torch.float32), epsilon)
    return None


# ---------------------------------------------------------------- sums


def summed(row: Any, weight: Any, bias: Any, norm: Norm | None) -> Any:
    """`row` [..., K] of one token, normed where there is a norm, times `weight` [N, K] plus `bias` [N]: [..., N]."""
    import torch

    width = row.shape[-1]
    # Read as memory that lies there, the row is computed once, by what comes before, and not by every sum that reads it.
    flat = row.as_strided((width,), (1,)).to(torch.float32)
    given = flat if norm is None else flat * norm.factor
    found = (weight.to(torch.float32) * given).sum(-1)
    if norm is not None:
        # As many sums as there are of the product, all of them the same: so they are one loop with it.
        squares = (flat * flat).expand(weight.shape).sum(-1)
        found = found * torch.rsqrt(squares / width + norm.epsilon)
    if bias is not None:
        found = found + bias
    return found.to(row.dtype).view(*row.shape[:-1], weight.shape[0])


def _sums_pay(entering: Any) -> bool:
    """One token, in the hands of a compiler for GPUs."""
    import torch

    return bool(torch.compiler.is_compiling() and entering.is_cuda and entering.numel() == entering.shape[-1])


# ---------------------------------------------------------------- modules


@dataclass
class Classes:
    """Subclasses of torch's and the model's own modules. `norm_apart` gives that of a norm's class."""

    row_linear: Any
    merged_linear: Any
    norm_apart: Any


@functools.cache
def _classes() -> Classes:
    """Made on first use: this module may be imported where there is no torch."""
    import torch
    from torch.nn.functional import linear

    class RowLinear(torch.nn.Linear):  # type: ignore[misc]
        """A linear module whose product of one row is a sum where that pays."""

        def forward(self, entering: Any) -> Any:
            if _sums_pay(entering):
                return summed(entering, self.weight, self.bias, None)
            return linear(entering, self.weight, self.bias)

    class MergedLinear(RowLinear):
        """The first module of the group computes for all, the others fetch; one that is asked alone computes alone."""

        def forward(self, entering: Any) -> Any:
            shared = self.shared
            sums = _sums_pay(entering)
            if sums and shared.summed_apart:
                return summed(entering, self.weight, self.bias, shared.norm)
            if self.place == 0:
                if sums:
                    product = summed(entering, shared.weight, shared.bias, shared.norm)
                else:
                    product = linear(entering, shared.weight, shared.bias)
                parts = product.split(shared.sizes, dim=-1)
                shared.waiting = parts
                return parts[0]
            parts = shared.waiting
            if parts is None:
                return linear(entering, self.weight, self.bias)
            if self.place == len(shared.sizes) - 1:
                shared.waiting = None
            return parts[self.place]

    @functools.cache
    def norm_apart(kind: Any) -> Any:
        class NormApart(kind):  # type: ignore[misc]
            """A norm that hands a lone row on as it is, where the sums of its projections hold the norm."""

            def forward(self, hidden: Any) -> Any:
                return hidden if _sums_pay(hidden) else super().forward(hidden)

        return NormApart

    return Classes(RowLinear, MergedLinear, norm_apart)
