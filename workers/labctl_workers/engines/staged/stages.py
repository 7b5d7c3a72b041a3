"""Pipeline stages, one on each device, that run transformers' own modules over a static cache.

Each stage has rotary embeddings, positions, masks, keys and values on its own device. Stages exchange only hidden states, and the
last stage sends the chosen tokens to the first. The structure of a model is read from its modules; check.py compares the stages
with the model's own forward before they are used.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from labctl_workers.engines.staged import attention

FULL, SLIDING = "full_attention", "sliding_attention"
# The attention of a decoded token (attention.register), by whether the step is compiled.
DECODE_WITH = {False: "sdpa", True: "reduce"}
# These rotary embeddings read the longest position on the host, which a CUDA graph cannot do.
CHANGING_ROTARY = ("dynamic", "longrope")

Tensor = Any  # torch.Tensor: mypy does not see torch


class Unstageable(Exception):
    """The model cannot run in stages; the text says why."""


# ---------------------------------------------------------------- the structure of a model


@dataclass
class Rotary:
    """The rotary embeddings of one device. `names` are the arguments of a layer for them, one for each module; with `by_type`
    one module computes them for each type of attention."""

    modules: list[Any]
    names: tuple[str, ...]
    by_type: bool

    def on(self, device: Any) -> Rotary:
        return Rotary([copy.deepcopy(module).to(device) for module in self.modules], self.names, self.by_type)


@dataclass
class Structure:
    """The parts of a model of the Llama family. `types`: the attention of each layer; `softcap`: bound of the logits; `scale`:
    factor of the embeddings outside their module."""

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
    """Raises Unstageable, with the reason, for a model without the Llama family's parts."""
    body: Any = getattr(model, "model", None)
    parts = {name: getattr(body, name, None) for name in ("embed_tokens", "layers", "norm", "rotary_emb")}
    parts["lm_head"] = model.get_output_embeddings()
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise Unstageable(f"{type(model).__name__} has no {', '.join(missing)}")
    layers, config = list(body.layers), model.config
    types = list(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not types:
        types = [SLIDING if window else FULL] * len(layers)
    unknown = sorted(set(types) - {FULL, SLIDING})
    if unknown:
        raise Unstageable(f"{type(model).__name__} has layers of {', '.join(unknown)}")
    if getattr(config, "use_bidirectional_attention", False):
        raise Unstageable("its attention is bidirectional")
    for layer in layers:
        _check_layer(layer)
    return Structure(
        embed=body.embed_tokens,
        layers=layers,
        norm=body.norm,
        head=model.get_output_embeddings(),
        rotary=_rotary(body, layers[0]),
        types=types,
        window=window if SLIDING in types else None,
        softcap=getattr(config, "final_logit_softcapping", None),
        vocabulary=model.get_output_embeddings().weight.shape[0],
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
    """Keys and values of one layer, [B, KV, L, D], with the interface of a transformers cache: `update` writes new ones to
    `slots`, [Q], in place, and returns the first `read` slots."""

    def __init__(self, keys: Any, values: Any, slots: Any, read: int) -> None:
        self.keys = keys
        self.values = values
        self.slots = slots
        self.read = read

    def update(self, key: Any, value: Any, *others: Any, **named: Any) -> tuple[Any, Any]:
        self.keys.index_copy_(2, self.slots, key)
        self.values.index_copy_(2, self.slots, value)
        return self.keys[:, :, : self.read], self.values[:, :, : self.read]


# ---------------------------------------------------------------- the computation of a stage


def enter(
    stage: Stage, entering: Tensor, slots: Tensor, pad: Tensor, read: int
) -> tuple[Tensor, dict[str, Tensor], list[Tensor], Tensor]:
    """The inputs of the layers: hidden state, mask by type of attention, rotary embeddings, positions.

    `entering` has tokens [B, Q] on the first stage, else hidden states [B, Q, H]. The queries are at `slots` [Q] of the cache;
    the first `pad` [B] slots of each sequence are empty.
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
        rotations: list[Any] = [{kind: rotary.modules[0](hidden, positions, kind) for kind in stage.windows}]
    else:
        rotations = [module(hidden, positions) for module in rotary.modules]
    return hidden, masks, rotations, positions


def _mask(stage: Stage, slots: Tensor, pad: Tensor, read: int, window: int | None, dtype: Any) -> Tensor:
    """The additive mask of the scores, [B, 1, Q, read]: 0 for visible slots, else the smallest number of the dtype.

    A query always sees its own slot, also in padding: a row without any visible slot would become NaN.
    """
    torch = stage.torch
    positions = torch.arange(read, device=slots.device)
    own = slots[None, :, None]
    seen = (positions <= own) & (positions >= pad[:, None, None])
    if window is not None:
        seen = seen & (positions > own - window)
    seen = seen | (positions == own)
    # torch.where would copy two constants from the host, which a graph capture forbids.
    return ((~seen).to(dtype) * torch.finfo(dtype).min).unsqueeze(1)


def run_layer(
    layer: Any,
    hidden: Tensor,
    mask: Tensor,
    rotations: dict[str, Tensor],
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    read: int,
) -> Tensor:
    """Run one decoder layer of transformers over a part of the static cache."""
    given = layer(
        hidden,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=SlotCache(keys, values, slots, read),
        **rotations,
    )
    return given[0] if isinstance(given, tuple) else given


class PromptInputs(NamedTuple):
    """The inputs of the layers for a piece of prompts; `masks` by type of attention, None where not needed."""

    slots: Tensor
    hidden: Tensor
    masks: dict[str, Tensor | None]
    rotations: list[Tensor]
    positions: Tensor


def leave(norm: Any, head: Any, softcap: float | None, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, V] of the last position, and the likeliest token of each sequence, [B, 1]."""
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
    """The three parts of a decode step, and a layer for prompts; plain or compiled."""

    enter: Callable[..., Any] = enter
    run_layer: Callable[..., Any] = run_layer
    leave: Callable[..., Any] = leave
    prompt_layer: Callable[..., Any] = run_layer


@dataclass(eq=False)
class Stage:
    """The part of the model on one device. `windows`: the window of each type of attention (None: unlimited)."""

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

    def rotary_arguments(self, rotations: Sequence[Tensor], kind: str) -> dict[str, Tensor]:
        """The rotary embeddings for a type of attention, by the name of a layer's argument."""
        found = [each[kind] if self.rotary.by_type else each for each in rotations]
        return dict(zip(self.rotary.names, found, strict=True))

    def step(self, buffers: Buffers, read: int, functions: Functions | None = None) -> None:
        """Decode one token of each sequence; inputs and outputs are in the buffers."""
        functions = functions or self.plain
        hidden, masks, rotations, positions = functions.enter(self, buffers.entering, buffers.slot, buffers.pad, read)
        for layer, kind, (keys, values) in zip(self.layers, self.types, buffers.caches, strict=True):
            named = self.rotary_arguments(rotations, kind)
            hidden = functions.run_layer(layer, hidden, masks[kind], named, positions, keys, values, buffers.slot, read)
        if self.head is None:
            buffers.hidden_out.copy_(hidden)
        else:
            logits, tokens = functions.leave(self.norm, self.head, self.softcap, hidden)
            buffers.logits.copy_(logits)
            buffers.tokens_out.copy_(tokens)
        buffers.slot.add_(1)

    def prefill(
        self, entering: Any, buffers: Buffers, first: int, start: int, *, padded: bool, layer_of: Callable[..., Any]
    ) -> Any:
        """Process a piece of the prompts, [B, Q], for rows from `first` on and slots from `start` on; returns hidden states
        [B, Q, H]. `padded`: some prompts are shorter than the longest. `layer_of` returns the function of a layer, by its number
        of rows and whether there is a mask."""
        rows, end = slice(first, first + entering.shape[0]), start + entering.shape[1]
        slots, hidden, masks, rotations, positions = self.enter_prompts(
            entering, buffers.pad[rows], start, padded=padded
        )
        for layer, kind, (keys, values) in zip(self.layers, self.types, buffers.caches, strict=True):
            named, mask = self.rotary_arguments(rotations, kind), masks[kind]
            run_prompts = layer_of(len(hidden), masked=mask is not None)
            hidden = run_prompts(layer, hidden, mask, named, positions, keys[rows], values[rows], slots, end)
        return hidden

    def enter_prompts(self, entering: Tensor, pad: Tensor, start: int, *, padded: bool) -> PromptInputs:
        """The inputs of the layers for a piece of prompts [B, Q] at slots from `start` on."""
        end = start + entering.shape[1]
        slots = self.torch.arange(start, end, device=self.device)
        hidden, masks, rotations, positions = self.plain.enter(self, entering, slots, pad, end)
        needed = {
            kind: mask if self.needs_mask(kind, start, end, padded=padded) else None for kind, mask in masks.items()
        }
        return PromptInputs(slots, hidden, needed, rotations, positions)

    def needs_mask(self, kind: str, start: int, end: int, *, padded: bool) -> bool:
        """Whether prompts in slots `start` to `end` need a mask. Without one, the attention kernel is faster and reads each key
        once for all query heads of a group. But it supports neither padding nor windows, and eager attention without a mask is
        not causal."""
        window = self.windows[kind]
        causal = self.causal_kernel and start == 0 and end > 1 and (window is None or end <= window)
        return padded or not causal

    def end_prompt(self, hidden: Any, buffers: Buffers, first: int) -> None:
        """Choose the first token of rows from `first` on, from the hidden states of their prompts [B, Q, H]."""
        if self.head is not None:
            rows = slice(first, first + hidden.shape[0])
            logits, tokens = self.plain.leave(self.norm, self.head, self.softcap, hidden[:, -1:])
            buffers.logits[rows].copy_(logits)
            buffers.tokens_out[rows].copy_(tokens)

    def scores(self, hidden: Any) -> Any:
        """Logits of hidden states; for the last stage."""
        return scores(self.norm, self.head, self.softcap, hidden)

    # ------------------------------------------------------------ bytes

    def weights_bytes(self) -> int:
        """Bytes of this stage's parameters."""
        modules = [module for module in (self.embed, *self.layers, self.norm, self.head) if module is not None]
        held = {parameter.data_ptr(): parameter for module in modules for parameter in module.parameters()}
        return sum(parameter.numel() * parameter.element_size() for parameter in held.values())

    def slot_bytes(self) -> int:
        """Bytes of the keys and values of one token of one sequence."""
        numbers = sum(heads * width for heads, width in zip(self.kv_heads, self.head_dims, strict=True))
        return 2 * numbers * int(self.dtype.itemsize)


class Buffers:
    """The tensors of one micro-batch on one stage, at fixed addresses for captured graphs.

    `caches` are (keys, values) of each layer, [B, KV, L, D], in `storage` from sequence `first` on; `slot` [1] is the slot of the
    next token; `pad` [B] is the number of empty slots before each sequence. Tokens are [B, 1], hidden states [B, 1, H], logits
    [B, V].
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
            # With one stage, the chosen token is the input of the next step.
            self.tokens_out = torch.zeros((rows, 1), **whole) if self.tokens_in is None else self.tokens_in
        self.caches = [
            (_part(keys, rows, first, heads, length, width), _part(values, rows, first, heads, length, width))
            for (keys, values), heads, width in zip(storage, stage.kv_heads, stage.head_dims, strict=True)
        ]

    @property
    def entering(self) -> Tensor:
        """The input of the stage: tokens on the first one, else hidden states."""
        return self.hidden_in if self.tokens_in is None else self.tokens_in


# The flat memory of the keys and of the values of each layer. One memory for both would make the compiler assume that its writes
# overlap.
Storage = list[tuple[Tensor, Tensor]]


def storage_of(stage: Stage, slots: int) -> Storage:
    """Memory for so many slots, all sequences together. Zeros, since NaN in an unused slot would pass through the mask."""
    kind = {"dtype": stage.dtype, "device": stage.device}
    return [
        (stage.torch.zeros(slots * heads * width, **kind), stage.torch.zeros(slots * heads * width, **kind))
        for heads, width in zip(stage.kv_heads, stage.head_dims, strict=True)
    ]


def _part(flat: Tensor, rows: int, first: int, heads: int, length: int, width: int) -> Tensor:
    size = heads * length * width
    return flat[first * size : (first + rows) * size].view(rows, heads, length, width)


# ---------------------------------------------------------------- build


def build(model: Any, structure: Structure, devices: Sequence[Any], counts: Sequence[int]) -> list[Stage]:
    """The stages of a loaded model: `counts[i]` of its layers, whose weights are already on `devices[i]`.

    Afterwards, the model's own forward no longer works on several devices.
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
    """Replace the attention of the model's layers by labctl's. Raises Unstageable for an attention without a replacement."""
    base = model.config._attn_implementation
    if base not in attention.BASES:
        raise Unstageable(f"its attention is {base}, not {' or '.join(attention.BASES)}")
    model.config._attn_implementation = attention.register(base, DECODE_WITH[compiled])
