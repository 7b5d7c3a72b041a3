"""Is it the same model? The stages, held against transformers' own modules (reference.py) before anything is measured.

Rounding makes every way to compute in 16 bits differ from the exact numbers, transformers' own too. So the error of the stages
may be at most `MOST` times that of transformers' own modules in the run's dtype, on the same tokens: of the logits, and of what
each layer adds to the same inputs. A fault - a position or a mask off by one, a stale key, a wrong weight - is an error of
its own beside the rounding, and the layer shows it where the logits do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from labctl_workers.engines.staged.pipeline import Pipeline, Prepared
from labctl_workers.engines.staged.reference import Asked, Reference
from labctl_workers.engines.staged.stages import Functions, Room, Stage, Unstageable, storage_of

MOST = 1.5
# Errors below this share are rounding whatever their ratio: in float32 they are some 1e-6, and transformers' own is exact.
FLOOR = 1e-4
# A whole batch takes up a long sequence only up to so many tokens: the layers are asked about it in any case.
WHOLE_STEP_TOKENS = 32768


@dataclass
class Checked:
    """The largest ratios found of the stages' error to transformers' own: of logits, and of a layer."""

    logits: float = 0.0
    layers: float = 0.0


class Errors:
    """Squared errors and squared norms, summed over what is compared together."""

    def __init__(self) -> None:
        self.error = self.own = self.norm = 0.0

    def add(self, error: float, own: float, norm: float) -> None:
        self.error += error
        self.own += own
        self.norm += norm

    def ratio(self, what: str) -> float:
        """The error over transformers' own. Raises Unstageable where it is too large, or a number is not finite."""
        if not (self.norm > 0 and math.isfinite(self.error + self.own + self.norm)):
            raise Unstageable(f"{what} cannot be compared: the numbers are not finite")
        found, own = math.sqrt(self.error / self.norm), math.sqrt(self.own / self.norm)
        if found > max(MOST * own, FLOOR):
            raise Unstageable(
                f"{what} differ from the exact ones by {found:.2g}, transformers' own by {own:.2g} (at most {MOST:g} times)"
            )
        return found / own if own > FLOOR else 0.0


def check(made: Pipeline, reference: Reference) -> Checked:
    """Raises Unstageable, with the figures, where the stages do not compute the model, in what was made ready."""
    found = Checked()
    with made.torch.no_grad():
        for sequences in filter(None, (reference.long, reference.short)):
            found.logits = max(found.logits, _prompts(made, sequences))
        for where in _plain(made, reference):
            found.layers = max(found.layers, _layers(where))
        for prepared in made.prepared.values():
            # With nothing captured or compiled, a step's functions are those that were asked already.
            for where in _places(made, prepared, reference) if made.on_gpus or made.compiled else ():
                found.layers = max(found.layers, _layers(where))
            found.logits = max(found.logits, _steps(made, prepared, reference))
    return found


# ---------------------------------------------------------------- logits


def _prompts(made: Pipeline, sequences: Sequence[Asked]) -> float:
    sums = Errors()
    for asked in sequences:
        found = made.logits(asked.token_ids, len(asked.exact)).cpu()
        sums.add(_squares(found - asked.exact), _squares(asked.own - asked.exact), _squares(asked.exact))
    return sums.ratio("the logits of a prompt")


def _steps(made: Pipeline, prepared: Prepared, reference: Reference) -> float:
    """Each step that was made ready decodes the last token of the sequences."""
    worst = 0.0
    for micro in range(prepared.bucket.micro_batches):
        for read in sorted({read for reads in prepared.reads for read in reads}):
            for sequences in (reference.long, reference.short):
                rows = prepared.bucket.rows
                fitting = [asked for asked in sequences if len(asked.token_ids) <= read]
                if not fitting or rows * max(len(asked.token_ids) for asked in fitting) > WHOLE_STEP_TOKENS:
                    continue
                sums = Errors()
                for chunk in _chunks(fitting, rows):
                    found = made.decoded_logits([asked.token_ids for asked in chunk], prepared, micro, read)
                    for row, asked in zip(found, chunk, strict=False):
                        exact, own = asked.exact[-1], asked.own[-1]
                        sums.add(_squares(row - exact), _squares(own - exact), _squares(exact))
                worst = max(worst, sums.ratio(f"the logits of a decoded token ({prepared.bucket}, {read} slots)"))
    return worst


def _squares(tensor: Any) -> float:
    return float(tensor.double().square().sum())


def _chunks(sequences: Sequence[Asked], rows: int) -> Iterator[Sequence[Asked]]:
    for first in range(0, len(sequences), rows):
        yield sequences[first : first + rows]


# ---------------------------------------------------------------- layer by layer


@dataclass
class Place:
    """Where layers are asked: a stage, the room that its step reads and writes, how much of the cache it reads, the functions
    that compute a step of it, and sequences that end with the last slot that is read (`at_end`), or begin with the first."""

    pipeline: Pipeline
    stage: Stage
    first_layer: int
    room: Room
    read: int
    functions: Functions
    sequences: Sequence[Asked]
    at_end: bool


def _plain(made: Pipeline, reference: Reference) -> Iterator[Place]:
    """As the stages compute with nothing captured, and nothing compiled but the layer for prompts."""
    first = 0
    for stage in made.stages:
        for sequences in filter(None, (reference.long, reference.short)):
            length = max(len(asked.token_ids) for asked in sequences)
            room = Room(stage, len(sequences), length, storage_of(stage, length * len(sequences)))
            yield Place(made, stage, first, room, length, stage.plain, sequences, at_end=False)
        first += len(stage.layers)


def _places(made: Pipeline, prepared: Prepared, reference: Reference) -> Iterator[Place]:
    """As the steps of a bucket compute; the micro-batches share their functions."""
    first = 0
    for stage, room, reads in zip(made.stages, prepared.rooms[0], prepared.reads, strict=True):
        for read in reads:
            # The long ones first: what they leave behind in the cache must not show in the short ones.
            for sequences, at_end in ((reference.long, True), (reference.short, False)):
                fitting = [asked for asked in sequences if len(asked.token_ids) <= read]
                for chunk in _chunks(fitting, room.rows):
                    yield Place(made, stage, first, room, read, made.functions, chunk, at_end)
        first += len(stage.layers)


def _layers(place: Place) -> float:
    """The worst ratio of the layers of a stage. Each gets the same inputs as transformers' own layer did: all but the last one
    at once, as a prompt, and then the last one as a decoded token."""
    stage, room, torch = place.stage, place.room, place.stage.torch
    rows = len(place.sequences)
    longest = max(len(asked.token_ids) for asked in place.sequences)
    start = place.read - longest if place.at_end else 0
    last = start + longest - 1
    pad = [last - (len(asked.token_ids) - 1) for asked in place.sequences]
    room.pad.zero_()
    room.pad[:rows].copy_(torch.tensor(pad))
    room.slot.fill_(last)
    prompt = _entered(place, start, last, rows) if longest > 1 else None
    step = place.functions.enter(stage, _entering(stage, room), room.slot, room.pad, place.read)
    worst = 0.0
    for index, (layer, kind, (keys, values)) in enumerate(zip(stage.layers, stage.types, room.caches, strict=True)):
        layers = [asked.layers[place.first_layer + index] for asked in place.sequences]
        inputs = torch.zeros((room.rows, longest, stage.hidden_size), dtype=stage.dtype, device=stage.device)
        for row, own in enumerate(layers):
            inputs[row, longest - len(own.inputs) :] = own.inputs.to(stage.device)
        sums = Errors(), Errors()
        if prompt is not None:
            slots = torch.arange(start, last, device=stage.device)
            before = _run(
                stage,
                place.pipeline.prompt_layer(rows, masked=prompt[1][kind] is not None),
                prompt,
                layer,
                kind,
                inputs[:rows, :-1].clone(memory_format=torch.contiguous_format),
                keys[:rows],
                values[:rows],
                slots,
                last,
            )
            _add(sums[0], before, inputs[:rows, :-1], layers, 0)
        # As it lies in a step: with other strides a compiler would make another function, and that one would be checked.
        token = torch.empty((room.rows, 1, stage.hidden_size), dtype=stage.dtype, device=stage.device)
        token.copy_(inputs[:, -1:])
        after = _run(stage, place.functions.run_layer, step, layer, kind, token, keys, values, room.slot, place.read)
        _add(sums[1], after[:rows], token[:rows], layers, 1)
        name = f"layer {place.first_layer + index}"
        if prompt is not None:
            worst = max(worst, sums[0].ratio(f"the outputs of {name} for a prompt"))
        worst = max(worst, sums[1].ratio(f"the outputs of {name} for a decoded token"))
    room.slot.zero_()
    return worst


def _entering(stage: Stage, room: Room) -> Any:
    return room.hidden_in if stage.embed is None else room.tokens_in


def _entered(place: Place, start: int, last: int, rows: int) -> tuple[Any, Any, Any, Any]:
    """Mask, rotary embeddings and positions of a prompt in slots `start` to `last`."""
    stage, torch = place.stage, place.stage.torch
    entering = torch.zeros((rows, last - start), dtype=torch.int64, device=stage.device)
    if stage.embed is None:
        entering = torch.zeros((rows, last - start, stage.hidden_size), dtype=stage.dtype, device=stage.device)
    padded = len({len(asked.token_ids) for asked in place.sequences}) > 1
    return stage.enter_prompts(entering, place.room.pad[:rows], start, padded=padded)[1:]


def _run(
    stage: Stage,
    function: Callable[..., Any],
    entered: tuple[Any, Any, Any, Any],
    layer: Any,
    kind: str,
    inputs: Any,
    keys: Any,
    values: Any,
    slots: Any,
    read: int,
) -> Any:
    _, masks, turned, positions = entered
    named = stage.rotations(turned, kind)
    return function(layer, inputs, masks[kind], named, positions, keys, values, slots, read)


def _add(sums: Errors, outputs: Any, inputs: Any, layers: Sequence[Any], part: int) -> None:
    """Add what a layer's outputs [rows, Q, H] are off by: of the positions before the last (part 0), or of the last (1)."""
    for output, given, layer in zip(outputs, inputs, layers, strict=True):
        exact = layer.exact[:-1] if part == 0 else layer.exact[-1:]
        if not len(exact):
            continue
        added = output[-len(exact) :].to(exact.dtype) - given[-len(exact) :].to(exact.dtype)
        sums.add(_squares(added - exact.to(added.device)), layer.own[part], layer.norms[part])
