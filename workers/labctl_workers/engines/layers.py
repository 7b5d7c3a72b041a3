"""Splits a model's layers over GPUs, in contiguous parts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from labctl_workers.record import Refusal


def equal_split(layers: int, gpus: int) -> list[int]:
    """The number of layers of each GPU, in order; they differ by at most one."""
    gpu_of_layer = [index * gpus // layers for index in range(layers)]
    return [gpu_of_layer.count(gpu) for gpu in range(gpus)]


def weighed_split(layers: Sequence[int], head: int, stages: int) -> list[int]:
    """The number of layers of each stage, in order, with the smallest maximum of bytes that a stage reads in a step.

    `layers` are the bytes of each layer; the last stage also reads `head` bytes. Every stage has at least one layer. Among
    equal splits, earlier stages take more. Raises ValueError for fewer layers than stages.
    """
    if len(layers) < stages:
        raise ValueError(f"{len(layers)} layers cannot be split over {stages} stages")
    total = [0]
    for layer in layers:
        total.append(total[-1] + layer)
    # best[stage][n]: (bytes of the fullest stage, sum of squares, minus the last cut) for the first n layers.
    best: list[dict[int, tuple[int, int, int]]] = [{0: (0, 0, 0)}]
    for stage in range(1, stages + 1):
        row = {}
        for end in range(stage, len(layers) - (stages - stage) + 1):
            tried = []
            for begin, (fullest, squares, _) in best[-1].items():
                if begin < end:
                    own = total[end] - total[begin] + (head if stage == stages else 0)
                    tried.append((max(fullest, own), squares + own * own, -begin))
            row[end] = min(tried)
        best.append(row)
    ends = [len(layers)]
    for stage in range(stages, 0, -1):
        ends.append(-best[stage][ends[-1]][2])
    return [end - begin for end, begin in itertools.pairwise(ends)][::-1]


def split_of(skeleton: Any, stages: int) -> list[int]:
    """`weighed_split` of a model on the meta device."""
    head = skeleton.get_output_embeddings()
    return weighed_split(
        [_bytes_of(layer) for layer in skeleton.model.layers], 0 if head is None else _bytes_of(head), stages
    )


def _bytes_of(module: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def layers_of(model: Any) -> list[Any]:
    """The decoder layers of a model of the Llama family; empty for another structure."""
    return list(getattr(getattr(model, "model", None), "layers", ()))


def check_layers(layers: int, gpus: int) -> None:
    """Raises Refusal for fewer layers than GPUs."""
    if layers < gpus:
        problem = f"more GPUs than layers: {gpus} GPUs, {layers} layer{'s' if layers > 1 else ''}"
        raise Refusal("too-many-gpus", problem, f"use --gpus {layers}{' or fewer' if layers > 1 else ''}")


def device_map(skeleton: Any, gpus: int, *, tied: bool, counts: Sequence[int] | None = None) -> dict[str, int]:
    """The GPU of each module of a model of the Llama family; `counts` is the number of layers of each GPU (default: equal).

    A head that is tied to the embeddings is the same tensor and stays on their GPU; any other head is on the last GPU.
    Raises Refusal for a model of another structure, or with fewer layers than GPUs.
    """
    body = getattr(skeleton, "model", None)
    layers = getattr(body, "layers", None)
    if body is None or layers is None or not hasattr(body, "embed_tokens"):
        raise Refusal(
            "unknown-structure",
            f"not a model of the Llama family: {type(skeleton).__name__} (no model.embed_tokens, model.layers, lm_head)",
            "use a model such as Llama, TinyLlama, SmolLM2, Mistral or Qwen2",
        )
    check_layers(len(layers), gpus)
    last = gpus - 1
    placed = {"model.embed_tokens": 0, "lm_head": 0 if tied else last}
    for name, _ in body.named_children():
        if name not in ("embed_tokens", "layers"):
            placed[f"model.{name}"] = 0 if name == "rotary_emb" else last
    split = equal_split(len(layers), gpus) if counts is None else counts
    gpu_of_layer = [gpu for gpu, count in enumerate(split) for _ in range(count)]
    placed.update({f"model.layers.{index}": gpu for index, gpu in enumerate(gpu_of_layer)})
    return placed


def check_weights_fit(skeleton: Any, placed: dict[str, int], itemsize: int, free_bytes: Sequence[int]) -> None:
    """Raises Refusal, before any weights are read, where a GPU cannot hold its modules of `placed`."""
    needed = [0] * len(free_bytes)
    for name, parameter in skeleton.named_parameters():  # a tied tensor has one name
        gpu = next(gpu for module, gpu in placed.items() if name.startswith(f"{module}."))
        needed[gpu] += parameter.numel() * itemsize
    for gpu, (weights, free) in enumerate(zip(needed, free_bytes, strict=True)):
        if weights > free:
            raise Refusal(
                "does-not-fit",
                f"weights do not fit on GPU {gpu}: {weights / 2**30:.2f} GiB of weights, {free / 2**30:.2f} GiB free",
                "use more GPUs, a smaller model or a 16-bit dtype",
            )
