"""What transformers' own modules compute, in the run's dtype and exactly: what stages are held against (check.py).

Exactly means in float32. Each module's weights are widened while it computes and put back afterwards, so that a GPU has to hold
one layer twice, never the model. For a run in float32 transformers' own is exact.

A whole model hides small faults in its rounding: at Llama-3-8B's dimensions its logits in bfloat16 lie 5% from those in
float32. So each layer is also asked by itself. Its inputs are those of the model's own run, scaled down so that the residual
does not drown what the layer adds to it: the norm in front of a layer's projections takes the scale out again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from labctl_workers.engines.staged.stages import Structure, Unstageable

# Short sequences show a single wrong key or position best; the long one spans every part of a cache that a step may read.
SHORT = (16, 11, 7)
LONGEST = 2048
# Positions of a sequence that are compared: the last ones.
COMPARED = 64
# The size of what goes into a layer, as a share of what the layer adds to it in the model's own run.
INPUT_SHARE = 0.5


@dataclass
class Layer:
    """One layer for one sequence: `inputs` [L, H] in the run's dtype, and `exact`, what the layer adds to the last inputs,
    [COMPARED, H]; `own` are the squared errors of transformers' own layer, of the positions before the last and of the last."""

    inputs: Any
    exact: Any
    own: tuple[float, float]

    @property
    def norms(self) -> tuple[float, float]:
        """The squared norms of what is exact: of the positions before the last, and of the last."""
        return _parts(self.exact)


@dataclass
class Asked:
    """A sequence of token ids, its layers, and the logits of its last positions, [COMPARED, V], exact and transformers' own,
    on the host."""

    token_ids: list[int]
    layers: list[Layer] = field(default_factory=list)
    exact: Any = None
    own: Any = None


@dataclass
class Reference:
    """`short` and `long` sequences. Short ones come first in a batch that is checked."""

    short: list[Asked]
    long: list[Asked]


def _parts(rows: Any) -> tuple[float, float]:
    return float(rows[:-1].square().sum()), float(rows[-1].square().sum())


def reference_of(model: Any, structure: Structure, device: Any, longest: int) -> Reference:
    """The model's own answers, before anything is changed. `longest` is the longest cache that will be used, in tokens.

    Also finds what embeddings are scaled with outside of their module, from what the first layer is given.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    window = structure.window or 0
    lengths = [*SHORT, *([window + 8] if 16 < window + 8 <= LONGEST else [])]
    lengths = [length for length in lengths if length <= longest] or [longest]
    long = [min(longest, LONGEST)] if longest > max(lengths) else []

    def drawn(length: int) -> Asked:
        return Asked(torch.randint(structure.vocabulary, (length,), generator=generator).tolist())

    found = Reference([drawn(length) for length in lengths], [drawn(length) for length in long])
    structure.scale = _scale_of(model, structure, found.short[0].token_ids, device)
    for sequence in (*found.short, *found.long):
        _ask(model, structure, sequence, device)
    return found


def _scale_of(model: Any, structure: Structure, token_ids: Sequence[int], device: Any) -> float:
    """The factor between what the embeddings give and what the first layer gets: 1, or the square root of the width."""
    import torch

    given: list[Any] = []
    hook = _noting(lambda hidden, _: given.append(hidden))
    ids = torch.tensor([list(token_ids)], device=device)
    with _removed([structure.layers[0].register_forward_pre_hook(hook, with_kwargs=True)]), torch.no_grad():
        model(ids, use_cache=False)
        embedded = structure.embed(ids).float()
    entered = given[0].float().to(embedded.device)
    if embedded.equal(entered):
        return 1.0
    width = float(embedded.shape[-1] ** 0.5)
    found = float((entered.norm() / embedded.norm()).item())
    if abs(found / width - 1) > 0.01:
        raise Unstageable(f"its embeddings are scaled by {found:.4g}, which is not the root of their width")
    return width


def _noting(note: Callable[[Any, dict[str, Any]], None]) -> Callable[..., None]:
    """A hook before a layer's forward that notes its hidden state and its other arguments."""

    def hook(module: Any, positional: Sequence[Any], named: dict[str, Any]) -> None:
        others = {name: value for name, value in named.items() if name != "hidden_states"}
        note(positional[0] if positional else named["hidden_states"], others)

    return hook


@contextlib.contextmanager
def _removed(hooks: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------- one sequence


def _ask(model: Any, structure: Structure, sequence: Asked, device: Any) -> None:
    """Fill in the sequence's logits and layers."""
    import torch

    ids = torch.tensor([sequence.token_ids], device=device)
    compared = min(COMPARED, len(sequence.token_ids))
    with torch.no_grad():
        logits, hiddens, own_named = _run(model, structure, ids, compared)
        sequence.own = sequence.exact = logits.float().cpu()
        exact_named = own_named
        if logits.dtype != torch.float32:
            with _widening(structure):
                logits, _, exact_named = _run(model, structure, ids, compared)
            sequence.exact = logits.cpu()
        for layer, before, after, named, widened in zip(
            structure.layers, hiddens[:-1], hiddens[1:], own_named, exact_named, strict=True
        ):
            inputs = _scaled(before, after, next(layer.parameters()).device)
            given = inputs[-compared:].float()
            own = exact = _output(layer(inputs[None], **named))[0, -compared:].float() - given
            if inputs.dtype != torch.float32:
                with widened_weights(layer):
                    exact = _output(layer(inputs[None].float(), **widened))[0, -compared:] - given
            sequence.layers.append(Layer(inputs, exact, _parts(own - exact)))


def _output(given: Any) -> Any:
    return given[0] if isinstance(given, tuple) else given


def _scaled(before: Any, after: Any, device: Any) -> Any:
    """A layer's inputs [L, H], each token's of one size: a share of what the layer adds, and no more than they were."""
    dtype, before, after = before.dtype, before[0].float().to(device), after[0].float().to(device)
    size = before.square().mean(-1, keepdim=True).sqrt()
    added = (after - before).square().mean().sqrt()
    wanted = (INPUT_SHARE * added).clamp(max=size.mean())
    return (before * (wanted / size.clamp(min=1e-12))).to(dtype)


def _run(model: Any, structure: Structure, ids: Any, compared: int) -> tuple[Any, list[Any], list[dict[str, Any]]]:
    """Logits [compared, V]; the hidden state before each layer and after the last, [1, L, H]; each layer's other arguments."""
    hiddens: list[Any] = []
    named: list[dict[str, Any]] = []

    def note(hidden: Any, others: dict[str, Any]) -> None:
        hiddens.append(hidden)
        named.append(others)

    hooks = [layer.register_forward_pre_hook(_noting(note), with_kwargs=True) for layer in structure.layers]
    last = structure.layers[-1].register_forward_hook(lambda *given: hiddens.append(_output(given[-1])))
    with _removed([*hooks, last]):
        logits = model(ids, use_cache=False, logits_to_keep=compared).logits[0]
    return logits, hiddens, named


# ---------------------------------------------------------------- exact


@contextlib.contextmanager
def widened_weights(module: Any) -> Iterator[None]:
    """The module's parameters in float32, for as long as it computes."""
    kept = {parameter: parameter.data for parameter in module.parameters()}
    try:
        for parameter, data in kept.items():
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data


@contextlib.contextmanager
def _widening(structure: Structure) -> Iterator[None]:
    """Embeddings, layers, norm and head widen their weights, each while it computes."""
    hooks = []
    for module in (structure.embed, *structure.layers, structure.norm, structure.head):
        held: list[Any] = []

        def enter(module: Any, *_: Any, held: list[Any] = held) -> None:
            held.append(widened_weights(module))
            held[-1].__enter__()

        def leave(*_: Any, held: list[Any] = held) -> None:
            held.pop().__exit__(None, None, None)

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    with _removed(hooks):
        yield
