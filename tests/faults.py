"""Faults that stages must be refused for: each is put into the code that computes them, in one layer or one place alone.

Used by tests/test_stages.py on tiny models and by tests/benchmarks/staged_faults.py at the dimensions of real ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from labctl_workers.engines.staged import stages


def _layer_number(layer: Any) -> int:
    number: int = layer.self_attn.layer_idx
    return number


@contextlib.contextmanager
def _spoilt(number: int, spoil: Callable[[Any], None]) -> Iterator[None]:
    """One layer is spoilt when the stages are built: after transformers' own modules were asked."""
    build = stages.build

    def build_and_spoil(*given: Any) -> Any:
        made = build(*given)
        for stage in made:
            for layer in stage.layers:
                if _layer_number(layer) == number:
                    spoil(layer)
        return made

    with patch.object(stages, "build", build_and_spoil):
        yield


@contextlib.contextmanager
def weights_off(share: float = 0.03, layer: int = 1, module: str | None = None) -> Iterator[None]:
    """The weights of one layer, or of one of its modules, are too large by a share, after transformers' own forward was
    recorded."""

    def spoil(own: Any) -> None:
        for name, child in own.named_modules():
            if hasattr(child, "in_features") and (module is None or name.endswith(module)):
                child.weight.data.mul_(1 + share)

    with _spoilt(layer, spoil):
        yield


@contextlib.contextmanager
def position_off() -> Iterator[None]:
    """A decoded token's rotary embedding is that of the next position."""
    enter = stages.enter

    def late(stage: Any, entering: Any, slots: Any, pad: Any, read: int) -> Any:
        hidden, masks, turned, positions = enter(stage, entering, slots, pad, read)
        if entering.shape[1] == 1:
            _, _, turned, positions = enter(stage, entering, slots + 1, pad, read)
        return hidden, masks, turned, positions

    with _of_a_step("enter", late):
        yield


@contextlib.contextmanager
def mask_off() -> Iterator[None]:
    """A sequence's first token is masked, as if there was one more slot of padding."""
    enter = stages.enter

    def narrow(stage: Any, entering: Any, slots: Any, pad: Any, read: int) -> Any:
        hidden, _, turned, positions = enter(stage, entering, slots, pad, read)
        _, masks, _, _ = enter(stage, entering, slots, pad + 1, read)
        return hidden, masks, turned, positions

    with _of_a_step("enter", narrow):
        yield


@contextlib.contextmanager
def heads_swapped(layer: int = 1) -> Iterator[None]:
    """Two of a layer's query heads have changed places."""

    def swap(own: Any) -> None:
        width = own.self_attn.head_dim
        weight = own.self_attn.q_proj.weight.data
        first = weight[:width].clone()
        weight[:width] = weight[-width:]
        weight[-width:] = first

    with _spoilt(layer, swap):
        yield


@contextlib.contextmanager
def key_stale(layer: int = 1) -> Iterator[None]:
    """One layer leaves the key of a decoded token as the slot had it before."""
    run_layer = stages.run_layer

    def forgetful(own: Any, hidden: Any, mask: Any, turned: Any, positions: Any, keys: Any, *rest: Any) -> Any:
        if hidden.shape[1] > 1 or _layer_number(own) != layer:
            return run_layer(own, hidden, mask, turned, positions, keys, *rest)
        return run_layer(own, hidden, mask, turned, positions, keys.clone().roll(1, 2), *rest)

    with _of_a_step("run_layer", forgetful):
        yield


@contextlib.contextmanager
def _of_a_step(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """The function takes the place of one that every step goes through."""
    make = stages.Functions.__init__

    def made(self: Any, *positional: Any, **named: Any) -> None:
        make(self, *positional, **named)
        if not positional:
            setattr(self, name, function)

    with patch.object(stages.Functions, "__init__", made):
        yield


FAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "weights of a layer off by 3%": weights_off,
    "weights of one projection off by 3%": lambda: weights_off(module="down_proj"),
    "query weights off by 3%": lambda: weights_off(module="q_proj"),
    "rotary position off by one": position_off,
    "mask off by one": mask_off,
    "two heads swapped": heads_swapped,
    "a stale key in the cache": key_stale,
}
