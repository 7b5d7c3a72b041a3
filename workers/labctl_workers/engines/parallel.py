"""How the GPUs of a job share a model: the values of `--parallel`.

"layers": each GPU has consecutive layers, and a token passes them in order (`hf`, `staged`). Of vLLM: "tensor", each GPU has a
slice of every matrix; "pipeline", each GPU has consecutive layers; "data", each GPU has a copy of the model and answers other
requests. ParallelSizes combine them: "tensor=4,pipeline=2".
"""

from __future__ import annotations

import math
from dataclasses import asdict, astuple, dataclass, fields

from labctl_workers.record import Refusal

LAYERS = "layers"


@dataclass(frozen=True)
class ParallelSizes:
    """The size of each kind of vLLM's parallelism; their product is the number of GPUs. Each of the `data` copies of the model
    has `tensor` x `pipeline` GPUs."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def gpus(self) -> int:
        return math.prod(astuple(self))


KINDS = tuple(field.name for field in fields(ParallelSizes))
WORDS = (LAYERS, *KINDS)


def parse(text: str) -> str | ParallelSizes:
    """One of WORDS, or sizes. Raises ValueError for any other text."""
    if text in WORDS:
        return text
    sizes: dict[str, int] = {}
    for part in text.split(","):
        kind, _, size = (word.strip() for word in part.partition("="))
        if kind not in KINDS or kind in sizes or not (size.isascii() and size.isdigit()) or int(size) < 1:
            raise ValueError(text)
        sizes[kind] = int(size)
    return ParallelSizes(**sizes)


def kinds_in(text: str) -> set[str]:
    """The words that the text names, without kinds of size 1."""
    found = parse(text)
    return {found} if isinstance(found, str) else {kind for kind in KINDS if getattr(found, kind) > 1}


def gpus_in(text: str) -> int | None:
    """The number of GPUs that sizes need; None for a word, which takes all GPUs."""
    found = parse(text)
    return None if isinstance(found, str) else found.gpus


def normalised(text: str | None, gpus: int, default: str) -> str:
    """The form in a run's definition: one kind as its word, several as sizes in the order of KINDS. `default` for None, and
    where nothing is shared. "tensor=2" and "tensor" on two GPUs are the same run."""
    if text is None or gpus <= 1:
        return default
    found = parse(text)
    if isinstance(found, str):
        return found
    kinds = [kind for kind in KINDS if getattr(found, kind) > 1]
    return kinds[0] if len(kinds) == 1 else text_of(found)


def text_of(sizes: ParallelSizes) -> str:
    """ "tensor=4,pipeline=2", without kinds of size 1."""
    return ",".join(f"{kind}={size}" for kind, size in asdict(sizes).items() if size > 1)


def sizes_of(parallel: str, gpus: int) -> ParallelSizes:
    """The sizes of a normalised value other than "layers" on this number of GPUs."""
    found = parse(parallel)
    return ParallelSizes(**{found: max(1, gpus)}) if isinstance(found, str) else found


# ---------------------------------------------------------------- what sizes divide


def divides(gpus: int, heads: int, kv_heads: int) -> bool:
    """Whether tensor parallelism can distribute the heads: equally, or a key-value head to several GPUs."""
    return heads % gpus == 0 and (kv_heads % gpus == 0 or gpus % kv_heads == 0)


def check_division(
    parallel: str, gpus: int, model: str, *, heads: int, kv_heads: int, intermediate: int, layers: int | None
) -> None:
    """Raises Refusal, with the nearest that works, where tensor parallelism does not divide the heads or the MLP of a model, or
    a stage of a pipeline has no layer. `layers` None: unknown."""
    sizes = sizes_of(parallel, gpus)

    def possible(tensor: int, pipeline: int) -> bool:
        enough = layers is None or pipeline <= layers
        return enough and divides(tensor, heads, kv_heads) and intermediate % tensor == 0

    if possible(sizes.tensor, sizes.pipeline):
        return
    of_copy = sizes.tensor * sizes.pipeline
    nearest = []
    for tensor in range(of_copy, 0, -1):
        if of_copy % tensor == 0 and possible(tensor, of_copy // tensor):
            other = text_of(ParallelSizes(tensor, of_copy // tensor, sizes.data))
            nearest.append(f"--parallel {normalised(other, gpus, '')}")
            break
    for fewer in range(of_copy - 1, 0, -1):
        if parallel in ("tensor", "pipeline") and possible(**{"tensor": 1, "pipeline": 1, parallel: fewer}):
            nearest.append(f"--gpus {fewer}")
            break
    remedy = f"use {'; or '.join(nearest) or 'fewer GPUs'}"
    if layers is not None and sizes.pipeline > layers:
        problem = f"a pipeline of {sizes.pipeline} stages needs as many layers: {model} has {layers}"
        raise Refusal("too-few-layers", problem, remedy)
    what = f"{heads} query and {kv_heads} key-value heads"
    if divides(sizes.tensor, heads, kv_heads):
        what = f"intermediate size {intermediate}"
    raise Refusal("heads-not-divisible", f"{sizes.tensor} GPUs do not divide the {what} of {model}", remedy)


def stage_layers(layers: int, stages: int) -> list[int]:
    """The layers of each stage of vLLM's pipeline (vllm/distributed/utils.py): those left over go to the stages before the last,
    from its neighbour backwards."""
    counts = [layers // stages] * stages
    for place in range(2, layers % stages + 2):
        counts[-place] += 1
    return counts
