"""Checks before any measurement that the stages compute the same model as transformers' own modules (reference.py).

In 16 bits, every way to compute has rounding errors, also transformers' own. So the error of the stages may be at most
`MAX_RATIO` times that of transformers' modules in the run's dtype, for the same tokens: of the logits, and of each layer's output
for the same inputs. A fault (a position or a mask off by one, a stale key, a wrong weight) adds an error that exceeds the
rounding of one layer, even if it disappears in the rounding of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from labctl_workers.engines.staged.pipeline import Pipeline, Prepared
from labctl_workers.engines.staged.reference import Reference, ReferenceLayer, ReferenceSequence
from labctl_workers.engines.staged.stages import (
    Buffers,
    Functions,
    PromptInputs,
    Stage,
    Tensor,
    Unstageable,
    storage_of,
)

MAX_RATIO = 1.5
# Relative errors below this are rounding: in float32 they are about 1e-6, and transformers' own error is 0.
FLOOR = 1e-4
# Steps of a whole batch are compared for sequences of at most so many tokens together; layers are always compared.
WHOLE_STEP_TOKENS = 32768


@dataclass
class ErrorRatios:
    """The largest ratios of the stages' error to transformers' own, for logits and for layers."""

    logits: float = 0.0
    layers: float = 0.0


class Errors:
    """Sums of squared errors and squared norms."""

    def __init__(self) -> None:
        self.error = self.own = self.norm = 0.0

    def add(self, error: float, own: float, norm: float) -> None:
        self.error += error
        self.own += own
        self.norm += norm

    def ratio(self, what: str) -> float:
        """The stages' error divided by transformers' own. Raises Unstageable where it is too large or not finite."""
        if not (self.norm > 0 and math.isfinite(self.error + self.own + self.norm)):
            raise Unstageable(f"{what} are not finite")
        found, own = math.sqrt(self.error / self.norm), math.sqrt(self.own / self.norm)
        if found > max(MAX_RATIO * own, FLOOR):
            raise Unstageable(
                f"{what} differ from exact ones by {found:.2g}, transformers' own by {own:.2g} (limit: {MAX_RATIO:g} times)"
            )
        return found / own if own > FLOOR else 0.0


def check(pipeline: Pipeline, reference: Reference) -> ErrorRatios:
    """Check the stages and every prepared step. Raises Unstageable, with the errors, where they do not compute the model."""
    found = ErrorRatios()
    with pipeline.torch.no_grad():
        for sequences in filter(None, (reference.long, reference.short)):
            found.logits = max(found.logits, _check_prompts(pipeline, sequences))
        for where in _plain_checks(pipeline, reference):
            found.layers = max(found.layers, _check_layers(where))
        for prepared in pipeline.prepared.values():
            # Without graphs and compilation, a step has the same functions as the plain stages.
            for where in _step_checks(pipeline, prepared, reference) if pipeline.on_gpus or pipeline.compiled else ():
                found.layers = max(found.layers, _check_layers(where))
            found.logits = max(found.logits, _check_steps(pipeline, prepared, reference))
    return found


# ---------------------------------------------------------------- logits


def _check_prompts(pipeline: Pipeline, sequences: Sequence[ReferenceSequence]) -> float:
    sums = Errors()
    for sequence in sequences:
        found = pipeline.logits(sequence.token_ids, len(sequence.exact)).cpu()
        exact = sequence.exact
        sums.add(_squares(found - exact), _squares(sequence.own - exact), _squares(exact))
    return sums.ratio("the logits of a prompt")


def _check_steps(pipeline: Pipeline, prepared: Prepared, reference: Reference) -> float:
    """Decode the last token of the sequences with each prepared step."""
    worst = 0.0
    for micro in range(prepared.bucket.micro_batches):
        for read in sorted({read for reads in prepared.reads for read in reads}):
            for sequences in (reference.long, reference.short):
                rows = prepared.bucket.rows
                fitting = [sequence for sequence in sequences if len(sequence.token_ids) <= read]
                if not fitting or rows * max(len(sequence.token_ids) for sequence in fitting) > WHOLE_STEP_TOKENS:
                    continue
                sums = Errors()
                for chunk in _chunks(fitting, rows):
                    found = pipeline.decoded_logits([sequence.token_ids for sequence in chunk], prepared, micro, read)
                    for row, sequence in zip(found, chunk, strict=False):
                        exact, own = sequence.exact[-1], sequence.own[-1]
                        sums.add(_squares(row - exact), _squares(own - exact), _squares(exact))
                worst = max(worst, sums.ratio(f"the logits of a decoded token ({prepared.bucket}, {read} slots)"))
    return worst


def _squares(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def _chunks(sequences: Sequence[ReferenceSequence], rows: int) -> Iterator[Sequence[ReferenceSequence]]:
    for first in range(0, len(sequences), rows):
        yield sequences[first : first + rows]


# ---------------------------------------------------------------- layer by layer


@dataclass
class LayerCheck:
    """Layers to check: those of a stage, with the buffers of its step, the `read` first slots of the cache, and the functions of
    a step. The sequences end at the last of these slots (`at_end`), or begin at the first."""

    pipeline: Pipeline
    stage: Stage
    first_layer: int
    buffers: Buffers
    read: int
    functions: Functions
    sequences: Sequence[ReferenceSequence]
    at_end: bool


def _plain_checks(pipeline: Pipeline, reference: Reference) -> Iterator[LayerCheck]:
    """The stages without graphs, where only the layer for prompts may be compiled."""
    first = 0
    for stage in pipeline.stages:
        for sequences in filter(None, (reference.long, reference.short)):
            length = max(len(sequence.token_ids) for sequence in sequences)
            buffers = Buffers(stage, len(sequences), length, storage_of(stage, length * len(sequences)))
            yield LayerCheck(pipeline, stage, first, buffers, length, stage.plain, sequences, at_end=False)
        first += len(stage.layers)


def _step_checks(pipeline: Pipeline, prepared: Prepared, reference: Reference) -> Iterator[LayerCheck]:
    """The steps of a bucket; its micro-batches share their functions."""
    first = 0
    for stage, buffers, reads in zip(pipeline.stages, prepared.buffer_sets[0], prepared.reads, strict=True):
        for read in reads:
            # The long ones first: their keys and values stay in the cache and must not affect the short ones.
            for sequences, at_end in ((reference.long, True), (reference.short, False)):
                fitting = [sequence for sequence in sequences if len(sequence.token_ids) <= read]
                for chunk in _chunks(fitting, buffers.rows):
                    yield LayerCheck(pipeline, stage, first, buffers, read, pipeline.functions, chunk, at_end)
        first += len(stage.layers)


def _check_layers(where: LayerCheck) -> float:
    """The worst error ratio of the layers of a stage, with the inputs of transformers' own layers: all but the last position as
    a prompt, then the last one as a decoded token."""
    stage, buffers, torch = where.stage, where.buffers, where.stage.torch
    rows = len(where.sequences)
    longest = max(len(sequence.token_ids) for sequence in where.sequences)
    start = where.read - longest if where.at_end else 0
    last = start + longest - 1
    pad = [last - (len(sequence.token_ids) - 1) for sequence in where.sequences]
    buffers.pad.zero_()
    buffers.pad[:rows].copy_(torch.tensor(pad))
    buffers.slot.fill_(last)
    prompt = _prompt_inputs(where, start, last, rows) if longest > 1 else None
    _, masks, rotations, positions = where.functions.enter(
        stage, buffers.entering, buffers.slot, buffers.pad, where.read
    )
    worst = 0.0
    for index, (layer, kind, (keys, values)) in enumerate(zip(stage.layers, stage.types, buffers.caches, strict=True)):
        layers = [sequence.layers[where.first_layer + index] for sequence in where.sequences]
        name = f"layer {where.first_layer + index}"
        inputs = torch.zeros((buffers.rows, longest, stage.hidden_size), dtype=stage.dtype, device=stage.device)
        for row, own in enumerate(layers):
            inputs[row, longest - len(own.inputs) :] = own.inputs.to(stage.device)
        errors_of_prompt = Errors()
        if prompt is not None:
            mask, rotary = prompt.masks[kind], stage.rotary_arguments(prompt.rotations, kind)
            run_prompt = where.pipeline.prompt_layer(rows, masked=mask is not None)
            hidden = inputs[:rows, :-1].clone(memory_format=torch.contiguous_format)
            hidden = run_prompt(
                layer, hidden, mask, rotary, prompt.positions, keys[:rows], values[:rows], prompt.slots, last
            )
            _add(errors_of_prompt, hidden, inputs[:rows, :-1], layers, 0)
        # With the strides of a real step: for other strides, the compiler would make another function.
        token = torch.empty((buffers.rows, 1, stage.hidden_size), dtype=stage.dtype, device=stage.device)
        token.copy_(inputs[:, -1:])
        rotary = stage.rotary_arguments(rotations, kind)
        after = where.functions.run_layer(
            layer, token, masks[kind], rotary, positions, keys, values, buffers.slot, where.read
        )
        errors_of_token = Errors()
        _add(errors_of_token, after[:rows], token[:rows], layers, 1)
        if prompt is not None:
            worst = max(worst, errors_of_prompt.ratio(f"the outputs of {name} for a prompt"))
        worst = max(worst, errors_of_token.ratio(f"the outputs of {name} for a decoded token"))
    buffers.slot.zero_()
    return worst


def _prompt_inputs(where: LayerCheck, start: int, last: int, rows: int) -> PromptInputs:
    """`Stage.enter_prompts` for a prompt in slots `start` to `last`; its hidden state is not used."""
    stage, torch = where.stage, where.stage.torch
    entering = torch.zeros((rows, last - start), dtype=torch.int64, device=stage.device)
    if stage.embed is None:
        entering = torch.zeros((rows, last - start, stage.hidden_size), dtype=stage.dtype, device=stage.device)
    padded = len({len(sequence.token_ids) for sequence in where.sequences}) > 1
    return stage.enter_prompts(entering, where.buffers.pad[:rows], start, padded=padded)


def _add(sums: Errors, outputs: Tensor, inputs: Tensor, layers: Sequence[ReferenceLayer], part: int) -> None:
    """Add the errors of a layer's outputs [rows, Q, H]: of the positions before the last (part 0), or of the last (1)."""
    for output, given, layer in zip(outputs, inputs, layers, strict=True):
        exact = layer.exact[:-1] if part == 0 else layer.exact[-1:]
        if not len(exact):
            continue
        added = output[-len(exact) :].to(exact.dtype) - given[-len(exact) :].to(exact.dtype)
        sums.add(_squares(added - exact.to(added.device)), layer.own[part], layer.norms[part])
