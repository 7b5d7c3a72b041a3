"""Reference results of transformers' own modules, in the run's dtype and exact; check.py compares the stages with them.

Exact means in float32. Each module's weights are float32 only while it computes, so a GPU holds one layer twice, never the model.
For a run in float32, transformers' results are exact.

The rounding of a whole model hides small faults: at Llama-3-8B's dimensions, its logits in bfloat16 differ by 5% from those in
float32. So each layer is also compared alone. Its inputs are those of the model's forward, scaled down: otherwise the residual
would hide the layer's output. The norm before a layer's projections cancels the scale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from labctl_workers.engines.staged.stages import Structure, Tensor, Unstageable

# Short sequences show one wrong key or position best; the long one covers every part of a cache that a step may read.
SHORT = (16, 11, 7)
LONGEST = 2048
# The number of positions to compare, the last ones of a sequence.
COMPARED = 64
# The size of a layer's inputs, relative to the layer's output in the model's forward.
INPUT_SHARE = 0.5


@dataclass
class ReferenceLayer:
    """One layer for one sequence: `inputs` [L, H] in the run's dtype, and the exact output without the residual, [COMPARED, H].
    `own`: squared errors of transformers' own layer, for the positions before the last and for the last."""

    inputs: Tensor
    exact: Tensor
    own: tuple[float, float]

    @property
    def norms(self) -> tuple[float, float]:
        """The squared norms of `exact`, for the positions before the last and for the last."""
        return _squares(self.exact)


@dataclass
class ReferenceSequence:
    """A sequence of token ids, its layers, and the logits of its last positions, [COMPARED, V], exact and transformers' own,
    on the host."""

    token_ids: list[int]
    layers: list[ReferenceLayer] = field(default_factory=list)
    exact: Tensor = None
    own: Tensor = None


@dataclass
class Reference:
    short: list[ReferenceSequence]
    long: list[ReferenceSequence]


@dataclass
class LayerCall:
    """The arguments of a layer's forward: the hidden state [1, L, H], and all others by name."""

    hidden: Tensor
    arguments: dict[str, Any]


def _squares(rows: Tensor) -> tuple[float, float]:
    return float(rows[:-1].square().sum()), float(rows[-1].square().sum())


def reference_of(model: Any, structure: Structure, device: Any, longest: int) -> Reference:
    """The results of the unchanged model; `longest` is the length of the longest cache, in tokens.

    Also sets the structure's scale of the embeddings. Raises Unstageable where that scale is unknown.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    window = structure.window or 0
    lengths = [*SHORT, *([window + 8] if 16 < window + 8 <= LONGEST else [])]
    lengths = [length for length in lengths if length <= longest] or [longest]
    long = [min(longest, LONGEST)] if longest > max(lengths) else []

    def drawn(length: int) -> ReferenceSequence:
        return ReferenceSequence(torch.randint(structure.vocabulary, (length,), generator=generator).tolist())

    found = Reference([drawn(length) for length in lengths], [drawn(length) for length in long])
    structure.scale = _scale_of(model, structure, found.short[0].token_ids, device)
    for sequence in (*found.short, *found.long):
        _compute(model, structure, sequence, device)
    return found


def _scale_of(model: Any, structure: Structure, token_ids: Sequence[int], device: Any) -> float:
    """The factor from the output of the embeddings to the input of the first layer: 1, or the square root of the width."""
    import torch

    calls: list[LayerCall] = []
    ids = torch.tensor([list(token_ids)], device=device)
    with _recording(structure.layers[:1], calls), torch.no_grad():
        model(ids, use_cache=False)
        embedded = structure.embed(ids).float()
    entered = calls[0].hidden.float().to(embedded.device)
    if embedded.equal(entered):
        return 1.0
    width = float(embedded.shape[-1] ** 0.5)
    found = float((entered.norm() / embedded.norm()).item())
    if abs(found / width - 1) > 0.01:
        raise Unstageable(f"its embeddings are scaled by {found:.4g}, not by the root of their width")
    return width


@contextlib.contextmanager
def _recording(layers: Sequence[Any], calls: list[LayerCall]) -> Iterator[None]:
    """Add each call of these layers to `calls`."""

    def hook(module: Any, positional: Sequence[Any], named: dict[str, Any]) -> None:
        arguments = {name: value for name, value in named.items() if name != "hidden_states"}
        calls.append(LayerCall(positional[0] if positional else named["hidden_states"], arguments))

    with _removed([layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]):
        yield


@contextlib.contextmanager
def _removed(hooks: Sequence[Any]) -> Iterator[None]:
    """Remove the hooks at the end of the block."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------- one sequence


def _compute(model: Any, structure: Structure, sequence: ReferenceSequence, device: Any) -> None:
    """Set the sequence's logits and layers."""
    import torch

    ids = torch.tensor([sequence.token_ids], device=device)
    compared = min(COMPARED, len(sequence.token_ids))
    with torch.no_grad():
        logits, calls, last = _run(model, structure, ids, compared)
        sequence.own = sequence.exact = logits.float().cpu()
        exact_calls = calls
        if logits.dtype != torch.float32:
            with _in_float32(structure):
                logits, exact_calls, _ = _run(model, structure, ids, compared)
            sequence.exact = logits.cpu()
        outputs = [*(call.hidden for call in calls[1:]), last]
        for layer, call, exact_call, output in zip(structure.layers, calls, exact_calls, outputs, strict=True):
            inputs = _scaled(call.hidden, output, next(layer.parameters()).device)
            residual = inputs[-compared:].float()
            own = exact = _output(layer(inputs[None], **call.arguments))[0, -compared:].float() - residual
            if inputs.dtype != torch.float32:
                with float32_weights(layer):
                    exact = _output(layer(inputs[None].float(), **exact_call.arguments))[0, -compared:] - residual
            sequence.layers.append(ReferenceLayer(inputs, exact, _squares(own - exact)))


def _output(given: Any) -> Any:
    return given[0] if isinstance(given, tuple) else given


def _scaled(before: Any, after: Any, device: Any) -> Any:
    """A layer's inputs [L, H], of one size for all tokens: INPUT_SHARE of the layer's output, at most their mean size."""
    dtype, before, after = before.dtype, before[0].float().to(device), after[0].float().to(device)
    size = before.square().mean(-1, keepdim=True).sqrt()
    added = (after - before).square().mean().sqrt()
    wanted = (INPUT_SHARE * added).clamp(max=size.mean())
    return (before * (wanted / size.clamp(min=1e-12))).to(dtype)


def _run(model: Any, structure: Structure, ids: Tensor, compared: int) -> tuple[Tensor, list[LayerCall], Tensor]:
    """Logits [compared, V], the call of each layer, and the hidden state after the last layer, [1, L, H]."""
    calls: list[LayerCall] = []
    last: list[Tensor] = []
    hook = structure.layers[-1].register_forward_hook(lambda *given: last.append(_output(given[-1])))
    with _recording(structure.layers, calls), _removed([hook]):
        logits = model(ids, use_cache=False, logits_to_keep=compared).logits[0]
    return logits, calls, last[0]


# ---------------------------------------------------------------- exact results


@contextlib.contextmanager
def float32_weights(module: Any) -> Iterator[None]:
    """Make the module's parameters float32 inside the block."""
    kept = {parameter: parameter.data for parameter in module.parameters()}
    try:
        for parameter, data in kept.items():
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data


@contextlib.contextmanager
def _in_float32(structure: Structure) -> Iterator[None]:
    """Make embeddings, layers, norm and head compute in float32, each with float32 weights only while it computes."""
    hooks = []
    for module in (structure.embed, *structure.layers, structure.norm, structure.head):
        entered: list[Any] = []

        def enter(module: Any, *_: Any, entered: list[Any] = entered) -> None:
            entered.append(float32_weights(module))
            entered[-1].__enter__()

        def leave(*_: Any, entered: list[Any] = entered) -> None:
            entered.pop().__exit__(None, None, None)

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    with _removed(hooks):
        yield
