"""A model cut into stages, one on each device, that run transformers' own modules over a static cache.

Each stage has what it needs on its own device: rotary embedding, positions, mask, keys and values. Between stages the
hidden state crosses, from the last to the first the chosen token, and nothing else. What a model is built of is read from its
modules, and what comes of it is held against the model's own forward before it is used.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from labctl_workers.engines.staged import attention

FULL, SLIDING = "full_attention", "sliding_attention"
# How the attention of one token is computed (attention.DECODE_WITH), by whether the step is compiled.
DECODE_WITH = {False: "sdpa", True: "reduce"}
# Rotary embeddings that change with the longest position seen look at it on the host: no graph can hold that.
CHANGING_ROTARY = ("dynamic", "longrope")


class Unstageable(Exception):
    """This model cannot be run in stages; the text says why."""


# ---------------------------------------------------------------- what a model is built of


@dataclass
class Rotary:
    """The rotary embeddings of one device. `names` are the arguments of a layer that take them, one for each module; with
    `by_type` there is one module, which is asked for each type of attention."""

    modules: list[Any]
    names: tuple[str, ...]
    by_type: bool

    def on(self, device: Any) -> Rotary:
        return Rotary([copy.deepcopy(module).to(device) for module in self.modules], self.names, self.by_type)


@dataclass
class Structure:
    """What a Llama-shaped model is built of, as its modules tell. `scale` is what embeddings are multiplied with outside of
    their module; `softcap` bounds the logits; `types` is the attention of each layer."""

    embed: Any
    layers: list[Any]
    norm: Any
    head: Any
    rotary: Rotary
    types: list[str]
    window: int | None
    softcap: float | None
    vocabulary: int
    scale: float = 1.0


def read_structure(model: Any) -> Structure:
    """Raises Unstageable, with the reason, for a model that has not the Llama family's parts."""
    body = getattr(model, "model", None)
    parts: dict[str, Any] = {
        name: getattr(body, name, None) for name in ("embed_tokens", "layers", "norm", "rotary_emb")
    }
    parts["lm_head"] = model.get_output_embeddings()
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise Unstageable(f"{type(model).__name__} has no {', '.join(missing)}")
    layers, config = list(parts["layers"]), model.config
    types = list(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not types:
        types = [SLIDING if window else FULL] * len(layers)
    unknown = sorted(set(types) - {FULL, SLIDING})
    if unknown:
        raise Unstageable(f"{type(model).__name__} has layers of {', '.join(unknown)}")
    if getattr(config, "use_bidirectional_attention", False):
        raise Unstageable("its attention looks ahead")
    for layer in layers:
        _check_layer(layer)
    return Structure(
        embed=parts["embed_tokens"],
        layers=layers,
        norm=parts["norm"],
        head=parts["lm_head"],
        rotary=_rotary(body, layers[0]),
        types=types,
        window=window if SLIDING in types else None,
        softcap=getattr(config, "final_logit_softcapping", None),
        vocabulary=parts["lm_head"].weight.shape[0],
    )


def _check_layer(layer: Any) -> None:
    own = getattr(layer, "self_attn", None)
    if not all(hasattr(own, name) for name in ("head_dim", "k_proj", "layer_idx")):
        raise Unstageable(f"{type(layer).__name__} has no self_attn with head_dim and k_proj")
    if not {"attention_mask", "past_key_values"} <= _arguments(layer).keys():
        raise Unstageable(f"{type(layer).__name__} takes no attention_mask or past_key_values")


def _arguments(module: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(type(module).forward).parameters)


def _rotary(body: Any, layer: Any) -> Rotary:
    taken = _arguments(layer)
    rope_types = getattr(body.rotary_emb, "rope_type", "default")
    for rope_type in rope_types.values() if isinstance(rope_types, dict) else (rope_types,):
        if rope_type in CHANGING_ROTARY:
            raise Unstageable(f"its rotary embedding is {rope_type}: it changes with the length")
    if "position_embeddings" in taken:
        by_type = "layer_type" in _arguments(body.rotary_emb)
        return Rotary([body.rotary_emb], ("position_embeddings",), by_type)
    both = ("position_embeddings_global", "position_embeddings_local")
    if set(both) <= taken.keys() and hasattr(body, "rotary_emb_local"):  # Gemma 3 before transformers 5
        return Rotary([body.rotary_emb, body.rotary_emb_local], both, by_type=False)
    raise Unstageable(f"{type(layer).__name__} takes no position_embeddings")


# ---------------------------------------------------------------- the cache


class SlotCache:
    """Keys and values of one layer as transformers' attention asks for a cache: new ones go to `slots`, [Q], in place; the
    first `read` slots come back. keys and values are [B, KV, L, D]."""

    def __init__(self, keys: Any, values: Any, slots: Any, read: int) -> None:
        self.keys = keys
        self.values = values
        self.slots = slots
        self.read = read

    def update(self, key: Any, value: Any, *others: Any, **named: Any) -> tuple[Any, Any]:
        self.keys.index_copy_(2, self.slots, key)
        self.values.index_copy_(2, self.slots, value)
        return self.keys[:, :, : self.read], self.values[:, :, : self.read]


# ---------------------------------------------------------------- what a stage computes


def enter(stage: Stage, entering: Any, slots: Any, pad: Any, read: int) -> tuple[Any, dict[str, Any], list[Any], Any]:
    """What the layers are given: hidden state, mask by type of attention, rotary embeddings, positions.

    `entering` is tokens [B, Q] on the first stage, else a hidden state [B, Q, H]. The queries are at `slots` [Q] of the
    cache, whose first `pad` [B] slots hold nothing of a sequence.
    """
    hidden = entering
    if stage.embed is not None:
        hidden = stage.embed(entering)
        if stage.scale != 1.0:
            hidden = hidden * stage.scale
    positions = (slots[None, :] - pad[:, None]).clamp(min=0)
    masks = {kind: _mask(stage, slots, pad, read, window, hidden.dtype) for kind, window in stage.windows.items()}
    rotary = stage.rotary
    if rotary.by_type:
        turned: list[Any] = [{kind: rotary.modules[0](hidden, positions, kind) for kind in stage.windows}]
    else:
        turned = [module(hidden, positions) for module in rotary.modules]
    return hidden, masks, turned, positions


def _mask(stage: Stage, slots: Any, pad: Any, read: int, window: int | None, dtype: Any) -> Any:
    """What is added to the scores, [B, 1, Q, read]: 0 where a query may look, else the least number.

    A query may always look at its own slot: rows that see nothing are no numbers, also those of padding.
    """
    torch = stage.torch
    places = torch.arange(read, device=slots.device)
    at = slots[None, :, None]
    seen = (places <= at) & (places >= pad[:, None, None])
    if window is not None:
        seen = seen & (places > at - window)
    seen = seen | (places == at)
    # A choice between two numbers would bring them from the host, which no capture allows.
    return ((~seen).to(dtype) * torch.finfo(dtype).min).unsqueeze(1)


def run_layer(
    layer: Any,
    hidden: Any,
    mask: Any,
    turned: dict[str, Any],
    positions: Any,
    keys: Any,
    values: Any,
    slots: Any,
    read: int,
) -> Any:
    """One decoder layer, transformers' own, over a part of the static cache."""
    given = layer(
        hidden,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=SlotCache(keys, values, slots, read),
        **turned,
    )
    return given[0] if isinstance(given, tuple) else given


def leave(norm: Any, head: Any, softcap: float | None, hidden: Any) -> tuple[Any, Any]:
    """Logits [B, V] of the last position, and the most likely token of each sequence, [B, 1]."""
    logits = scores(norm, head, softcap, hidden[:, -1])
    return logits, logits.argmax(-1, keepdim=True)


def scores(norm: Any, head: Any, softcap: float | None, hidden: Any) -> Any:
    """Logits [..., V] of hidden states [..., H]."""
    logits = head(norm(hidden))
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    return logits


@dataclass
class Functions:
    """The three parts of a step, and a layer for prompts, plain or compiled."""

    enter: Callable[..., Any] = enter
    run_layer: Callable[..., Any] = run_layer
    leave: Callable[..., Any] = leave
    prompt_layer: Callable[..., Any] = run_layer


@dataclass(eq=False)
class Stage:
    """The part of the model on one device. `windows` is the reach of each type of attention in it (None: all)."""

    torch: Any
    index: int
    device: Any
    embed: Any
    scale: float
    layers: list[Any]
    types: list[str]
    windows: dict[str, int | None]
    rotary: Rotary
    norm: Any
    head: Any
    softcap: float | None
    hidden_size: int
    vocabulary: int
    dtype: Any
    kv_heads: list[int]
    head_dims: list[int]
    causal_kernel: bool = False
    plain: Functions = field(default_factory=Functions)

    def rotations(self, turned: Sequence[Any], kind: str) -> dict[str, Any]:
        """The rotary embeddings of a type of attention, by the argument of a layer that takes them."""
        found = [each[kind] if self.rotary.by_type else each for each in turned]
        return dict(zip(self.rotary.names, found, strict=True))

    def step(self, room: Room, read: int, functions: Functions | None = None) -> None:
        """Decode one token of each sequence of the room: all that goes in and comes out is in the room's tensors."""
        functions = functions or self.plain
        entering = room.hidden_in if self.embed is None else room.tokens_in
        hidden, masks, turned, positions = functions.enter(self, entering, room.slot, room.pad, read)
        for layer, kind, (keys, values) in zip(self.layers, self.types, room.caches, strict=True):
            named = self.rotations(turned, kind)
            hidden = functions.run_layer(layer, hidden, masks[kind], named, positions, keys, values, room.slot, read)
        if self.head is None:
            room.hidden_out.copy_(hidden)
        else:
            logits, tokens = functions.leave(self.norm, self.head, self.softcap, hidden)
            room.logits.copy_(logits)
            room.tokens_out.copy_(tokens)
        room.slot.add_(1)

    def prefill(
        self, entering: Any, room: Room, first: int, start: int, *, padded: bool, layer_of: Callable[..., Any]
    ) -> Any:
        """Take up a piece of the prompts of the room's rows from `first` on, [B, Q], that begins at slot `start`; returns the
        hidden state [B, Q, H]. `padded` says whether any of the room's prompts is shorter than the longest; `layer_of` gives what
        computes a layer for so many rows, with a mask or without."""
        rows, end = slice(first, first + entering.shape[0]), start + entering.shape[1]
        slots, hidden, masks, turned, positions = self.enter_prompts(entering, room.pad[rows], start, padded=padded)
        for layer, kind, (keys, values) in zip(self.layers, self.types, room.caches, strict=True):
            named, mask = self.rotations(turned, kind), masks[kind]
            run_prompts = layer_of(len(hidden), masked=mask is not None)
            hidden = run_prompts(layer, hidden, mask, named, positions, keys[rows], values[rows], slots, end)
        return hidden

    def enter_prompts(
        self, entering: Any, pad: Any, start: int, *, padded: bool
    ) -> tuple[Any, Any, dict[str, Any], Any, Any]:
        """The slots of a piece of prompts [B, Q] that begins at `start`, and what the layers are given of it: hidden state, the
        mask of each type of attention (None: it needs none), rotary embeddings, positions."""
        end = start + entering.shape[1]
        slots = self.torch.arange(start, end, device=self.device)
        hidden, masks, turned, positions = self.plain.enter(self, entering, slots, pad, end)
        needed = {
            kind: mask if self.needs_mask(kind, start, end, padded=padded) else None for kind, mask in masks.items()
        }
        return slots, hidden, needed, turned, positions

    def needs_mask(self, kind: str, start: int, end: int, *, padded: bool) -> bool:
        """Whether prompts in slots `start` to `end` need a mask. Without one attention has a faster kernel, and reads each key
        once for all the query heads that share it; but it knows no padding and no window, and eager attention looks ahead."""
        window = self.windows[kind]
        causal_alone = self.causal_kernel and start == 0 and end > 1 and (window is None or end <= window)
        return padded or not causal_alone

    def end_prompt(self, hidden: Any, room: Room, first: int) -> None:
        """Choose the first token of the rows from `first` on, after the last hidden state of their prompts [B, Q, H]."""
        if self.head is not None:
            rows = slice(first, first + hidden.shape[0])
            logits, tokens = self.plain.leave(self.norm, self.head, self.softcap, hidden[:, -1:])
            room.logits[rows].copy_(logits)
            room.tokens_out[rows].copy_(tokens)

    def scores(self, hidden: Any) -> Any:
        """Logits of hidden states, on the last stage."""
        return scores(self.norm, self.head, self.softcap, hidden)

    # ------------------------------------------------------------ bytes

    def weights_bytes(self) -> int:
        """What is held of this stage's parameters."""
        modules = [module for module in (self.embed, *self.layers, self.norm, self.head) if module is not None]
        held = {parameter.data_ptr(): parameter for module in modules for parameter in module.parameters()}
        return sum(parameter.numel() * parameter.element_size() for parameter in held.values())

    def cache_bytes_of_a_slot(self) -> int:
        """Keys and values of one token of one sequence."""
        numbers = sum(heads * width for heads, width in zip(self.kv_heads, self.head_dims, strict=True))
        return 2 * numbers * int(self.dtype.itemsize)


class Room:
    """The tensors of one micro-batch on one stage, at fixed places: what a captured graph reads and writes.

    `caches` are (keys, values) of each layer, [B, KV, L, D], in `storage` from sequence `first` on; `slot` [1] is where the
    next token goes; `pad` [B] how many slots before each sequence are empty. Tokens are [B, 1], hidden states [B, 1, H],
    logits [B, V].
    """

    def __init__(self, stage: Stage, rows: int, length: int, storage: Storage, first: int = 0) -> None:
        torch = stage.torch
        whole = {"dtype": torch.int64, "device": stage.device}
        numbers = {"dtype": stage.dtype, "device": stage.device}
        self.rows = rows
        self.length = length
        self.pad = torch.zeros(rows, **whole)
        self.slot = torch.zeros(1, **whole)
        self.tokens_in: Any = torch.zeros((rows, 1), **whole) if stage.embed is not None else None
        self.hidden_in: Any = torch.zeros((rows, 1, stage.hidden_size), **numbers) if stage.embed is None else None
        self.hidden_out: Any = torch.zeros((rows, 1, stage.hidden_size), **numbers) if stage.head is None else None
        self.logits: Any = None
        self.tokens_out: Any = None
        if stage.head is not None:
            self.logits = torch.zeros((rows, stage.vocabulary), **numbers)
            # With one stage the chosen token is the next step's input.
            self.tokens_out = torch.zeros((rows, 1), **whole) if self.tokens_in is None else self.tokens_in
        self.caches = [
            (_part(keys, rows, first, heads, length, width), _part(values, rows, first, heads, length, width))
            for (keys, values), heads, width in zip(storage, stage.kv_heads, stage.head_dims, strict=True)
        ]


# Of each layer, the flat memory of its keys and of its values. Apart: a compiler that is handed two parts of one memory, and
# writes to them, has to think that they overlap.
Storage = list[tuple[Any, Any]]


def storage_of(stage: Stage, slots: int) -> Storage:
    """Memory for so many slots, all sequences together. Zeros: what was never written is masked, but a mask lets no
    number that is none pass as nothing."""
    made = {"dtype": stage.dtype, "device": stage.device}
    return [
        (stage.torch.zeros(slots * heads * width, **made), stage.torch.zeros(slots * heads * width, **made))
        for heads, width in zip(stage.kv_heads, stage.head_dims, strict=True)
    ]


def _part(flat: Any, rows: int, first: int, heads: int, length: int, width: int) -> Any:
    of_a_sequence = heads * length * width
    return flat[first * of_a_sequence : (first + rows) * of_a_sequence].view(rows, heads, length, width)


# ---------------------------------------------------------------- build


def build(model: Any, structure: Structure, devices: Sequence[Any], counts: Sequence[int]) -> list[Stage]:
    """The stages of a loaded model: `counts[i]` of its layers on `devices[i]`, where their weights are already.

    The model's own forward is of no use afterwards where its devices differ.
    """
    import torch

    model.requires_grad_(False)
    head = structure.head
    if head.weight.device != torch.device(devices[-1]):  # tied to the embeddings: the last device reads a copy
        head = copy.deepcopy(head).to(devices[-1])
    norm = structure.norm.to(devices[-1])
    stages, begin = [], 0
    for index, (device, count) in enumerate(zip(devices, counts, strict=True)):
        layers, types = structure.layers[begin : begin + count], structure.types[begin : begin + count]
        begin += count
        first, last = index == 0, index == len(devices) - 1
        widths = [layer.self_attn.head_dim for layer in layers]
        stages.append(
            Stage(
                torch=torch,
                index=index,
                device=torch.device(device),
                embed=structure.embed if first else None,
                scale=float(
                    torch.tensor(structure.scale, dtype=structure.embed.weight.dtype)
                ),  # as the models round it
                layers=layers,
                types=types,
                windows={kind: structure.window if kind == SLIDING else None for kind in sorted(set(types))},
                rotary=structure.rotary.on(device),
                norm=norm if last else None,
                head=head if last else None,
                softcap=structure.softcap,
                hidden_size=structure.embed.weight.shape[1],
                vocabulary=structure.vocabulary,
                dtype=structure.embed.weight.dtype,
                kv_heads=[
                    layer.self_attn.k_proj.out_features // width for layer, width in zip(layers, widths, strict=True)
                ],
                head_dims=widths,
                causal_kernel=attention.base_of(model.config._attn_implementation) == "sdpa",
            )
        )
    return stages


def use_attention(model: Any, *, compiled: bool) -> None:
    """Make the model's layers attend through labctl's attention. Raises Unstageable where it cannot stand in."""
    base = model.config._attn_implementation
    if base not in attention.BASES:
        raise Unstageable(f"its attention is {base}, stages have {' and '.join(attention.BASES)}")
    model.config._attn_implementation = attention.register(base, DECODE_WITH[compiled])
