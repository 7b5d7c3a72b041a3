"""Predicted memory of each GPU and a verdict, from the dimensions of the model and of the partition. Pure.

The models of allocations follow the engines' code: `hf` (transformers' generate), `staged` (labctl_workers/engines/staged) and
vLLM's start (vllm/v1/worker/gpu_worker.py). Bytes are per GPU unless stated otherwise.
tests/benchmarks/fit_truth.py compares the predictions with measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from labctl_orchestrator.models.architecture import Parts, Shape
from labctl_slurm.errors import PreflightError, WrongUseError
from labctl_workers.engines import parallel
from labctl_workers.engines.layers import equal_split, weighed_split
from labctl_workers.engines.parallel import ParallelSizes
from labctl_workers.engines.staged import pipeline
from labctl_workers.record import Refusal

if TYPE_CHECKING:  # a benchmark on a bare GPU node has only the standard library
    from labctl_slurm.partitions import Partition

GIB = 2**30
MIB = 2**20
# Visible share of the nominal memory: 79.2 of an H100's 80 GiB, 31.7 of a V100's 32. The driver keeps the rest.
USABLE = 0.99
# The handout keeps 20-30% of the memory free for overhead. Up to 80% a model fits; beyond that it is tight.
COMFORTABLE = 0.8
# CUDA context with torch's kernels, which torch's memory statistics omit.
CONTEXT_BYTES = 600 * MIB
# torch's cuBLAS workspace per multiplying stream (ATen/cuda/CublasHandlePool.cpp): True from Hopper on.
CUBLAS_WORKSPACE = {True: 32 * MIB, False: 8320 * 1024}
# vLLM's defaults for its offline engine (vllm/config/cache.py, engine/arg_utils.py): True for GPUs of 70 GiB and more.
UTILIZATION = 0.92
UTILIZATION_ON_VOLTA = 0.9  # of vLLM 0.19, its last version for Volta
BATCHED_TOKENS = {True: 16384, False: 8192}
MOST_SEQUENCES = {True: 1024, False: 256}
BLOCK_TOKENS = 16
VOCABULARY_PADDING = 64
# Memory of vLLM's worker outside torch and the CUDA context, such as NCCL's buffers and compiled kernels. Rounded: on two H100s
# NVML counted 1,142 MiB each (tests/benchmarks/vllm_truth.py), including CUDA graphs captured after the cache is allocated.
VLLM_OUTSIDE_TORCH = 1 * GIB


@dataclass(frozen=True)
class Gpus:
    """The GPUs of a model. `memory_bytes`: nominal memory of one. `bandwidth_bytes_s`: its memory bandwidth (None: unknown)."""

    count: int
    name: str
    memory_bytes: int
    capability: float
    bandwidth_bytes_s: float | None = None

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * USABLE)


def gpus_of(partition: Partition, count: int | None = None) -> Gpus:
    """`count` GPUs of the partition (None: its default). Raises WrongUseError if gpu_memory_gib is not set."""
    if partition.gpu_memory_gib is None:
        raise WrongUseError(
            f"gpu_memory_gib is not set for partition {partition.name!r}",
            f"set gpu_memory_gib in [partitions.{partition.name}] of labctl.toml",
        )
    bandwidth = partition.gpu_bandwidth_gb_s
    return Gpus(
        count or partition.gpus,
        partition.gpu,
        int(partition.gpu_memory_gib * GIB),
        float(partition.capability or 8.0),
        None if bandwidth is None else bandwidth * 1e9,
    )


@dataclass(frozen=True)
class Sequences:
    """The load: `batch` concurrent sequences with these numbers of tokens, in a dtype of `itemsize` bytes."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    itemsize: int
    sampled: bool = False

    @property
    def context(self) -> int:
        """Tokens with keys and values at the end: all but the last one."""
        return self.prompt_tokens + self.new_tokens - 1


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU. `kv_cache`: allocated for keys and values. `kv_cache_used`: the part that the load fills. `beside`:
    activations, logits and workspaces at the peak. `peak`: torch's peak allocation."""

    weights: int
    kv_cache: int
    kv_cache_used: int
    beside: int

    @property
    def peak(self) -> int:
        return self.weights + self.kv_cache + self.beside


# ---------------------------------------------------------------- keys and values


def kv_bytes_per_token(shape: Shape, itemsize: int) -> int:
    """Keys and values of one token, over all layers and GPUs: 2 x layers x key-value heads x head size x bytes."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * itemsize


def _kv_bytes(shape: Shape, layers: range, tokens: int, load: Sequences) -> int:
    """Keys and values of some layers in transformers' growing cache. A layer with a window keeps at most the window."""
    a_token = 2 * shape.kv_heads * shape.head_dim * load.itemsize
    held = (min(tokens, window - 1) if (window := shape.windows[layer]) else tokens for layer in layers)
    return a_token * load.batch * sum(held)


# ---------------------------------------------------------------- hf and staged: layers split


def layer_counts(parts: Parts, gpus: int, backend: str) -> list[int]:
    """Layers of each GPU, by the engines' own rules. Raises PreflightError for fewer layers than GPUs."""
    if len(parts.layers) < gpus:
        raise PreflightError(f"{len(parts.layers)} layers cannot be split over {gpus} GPUs", "give fewer --gpus")
    if backend == "hf":
        return equal_split(len(parts.layers), gpus)
    return weighed_split(parts.layers, parts.head or parts.embedding, gpus)


def weights_by_layers(parts: Parts, gpus: int, backend: str) -> list[int]:
    """Weights of each GPU: embeddings on the first, norm and head on the last. A tied head stays with the embeddings; with
    `staged` the last GPU has a copy."""
    counts = layer_counts(parts, gpus, backend)
    held = [sum(parts.layers[begin:end]) for begin, end in pairwise(accumulate(counts, initial=0))]
    held[0] += parts.embedding + parts.rest
    held[-1] += parts.norm + parts.head
    if backend == "staged" and not parts.head and gpus > 1:
        held[-1] += parts.embedding
    return held


def by_layers(shape: Shape, parts: Parts, load: Sequences, gpus: Gpus, backend: str) -> list[Memory]:
    """Memory of each GPU with `hf` or `staged`, which split the layers. `parts` are in bytes."""
    counts = layer_counts(parts, gpus.count, backend)
    places = [range(begin, end) for begin, end in pairwise(accumulate(counts, initial=0))]
    weights = weights_by_layers(parts, gpus.count, backend)
    memory_of = _hf_memory if backend == "hf" else _staged_memory
    return [
        replace(memory_of(shape, layers, load, gpus, gpu), weights=held)
        for gpu, (layers, held) in enumerate(zip(places, weights, strict=True))
    ]


def _hf_memory(shape: Shape, layers: range, load: Sequences, gpus: Gpus, gpu: int) -> Memory:
    """`generate` with its growing cache: each new token copies a layer's keys beside the old ones. The peak is during the prefill
    or at the last token."""
    kv_cache = _kv_bytes(shape, layers, load.context, load)
    # The widest place of a layer, its MLP: gate, up and their product, beside four hidden states.
    activations = load.batch * load.prompt_tokens * (4 * shape.hidden + 3 * shape.intermediate) * load.itemsize
    in_prefill = _kv_bytes(shape, layers, load.prompt_tokens, load) + activations
    one_layer = load.batch * load.context * shape.kv_heads * shape.head_dim * load.itemsize
    at_the_end = kv_cache + one_layer + _logits(shape, load, gpus, gpu)
    return Memory(
        0, kv_cache, kv_cache, max(in_prefill, at_the_end) - kv_cache + CUBLAS_WORKSPACE[gpus.capability >= 9.0]
    )


def _logits(shape: Shape, load: Sequences, gpus: Gpus, gpu: int) -> int:
    """Logits: the last GPU computes them, the first selects from a float32 copy; sampling also sorts values and indices."""
    numbers = load.batch * shape.vocabulary
    held = numbers * load.itemsize if gpu in (0, gpus.count - 1) else 0
    if gpu == 0:
        held += numbers * (4 + (24 if load.sampled else 0))
    return held


def _staged_memory(shape: Shape, layers: range, load: Sequences, gpus: Gpus, gpu: int) -> Memory:
    """A cache of fixed length that the micro-batches share (staged/pipeline.py)."""
    bucket = pipeline.bucket_of(load.batch, load.prompt_tokens, load.new_tokens, gpus.count)
    a_slot = 2 * len(layers) * shape.kv_heads * shape.head_dim * load.itemsize
    beside = pipeline.bytes_beside_cache(
        tokens=min(pipeline.PREFILL_TOKENS, bucket.rows * load.prompt_tokens),
        read=load.prompt_tokens,
        sequences=bucket.rows * bucket.micro_batches,
        hidden=shape.hidden,
        widest=max(shape.intermediate, shape.heads * shape.head_dim),
        vocabulary=shape.vocabulary if gpu == gpus.count - 1 else 0,
        itemsize=load.itemsize,
    )
    # Two streams multiply: the reference forward, which checks the stages, used the default stream.
    used = load.batch * load.context * a_slot
    return Memory(0, bucket.slots * a_slot, used, beside + 2 * CUBLAS_WORKSPACE[gpus.capability >= 9.0])


# ---------------------------------------------------------------- vLLM: tensor, pipeline and data parallel


def weights_by_stage(shape: Shape, parts: Parts, sizes: ParallelSizes, itemsize: int) -> list[int]:
    """Weights of a GPU of each pipeline stage: its share of every matrix of the stage's layers. Embeddings are on the first
    stage, norm and head on the last, which has a copy of embeddings that are its head. Norms and output biases are on all GPUs.
    Fewer key-value heads than GPUs are repeated. The vocabulary is padded to a multiple of 64 rows. The rotary table counts too.
    Raises PreflightError if the sizes do not divide the model."""
    tensor, stages = sizes.tensor, sizes.pipeline
    query, key = shape.heads * shape.head_dim // tensor, max(1, shape.kv_heads // tensor) * shape.head_dim
    intermediate = shape.intermediate // tensor
    attention = shape.hidden * (2 * query + 2 * key) + (query + 2 * key) * shape.qkv_bias + shape.hidden * shape.o_bias
    attention += 2 * shape.head_dim * shape.qk_norm
    mlp = 3 * shape.hidden * intermediate + (2 * intermediate + shape.hidden) * shape.mlp_bias
    layers = [attention + mlp + shape.norms * shape.hidden] * shape.layers
    if shape.quantized:  # stored layers are smaller than their shapes
        layers = [layer // tensor // itemsize for layer in parts.layers]
    rotary = (shape.max_tokens or 0) * shape.head_dim
    table = shape.hidden * math.ceil(math.ceil(shape.vocabulary / VOCABULARY_PADDING) * VOCABULARY_PADDING / tensor)
    places = pairwise(accumulate(_stage_layers(shape, sizes), initial=0))
    held = [sum(layers[begin:end]) + rotary for begin, end in places]
    held[0] += table
    held[-1] += shape.hidden + (table if stages > 1 or not shape.tied else 0)
    return [numbers * itemsize for numbers in held]


def _stage_layers(shape: Shape, sizes: ParallelSizes) -> list[int]:
    """The layers of each stage. Raises PreflightError if the sizes do not divide the model."""
    try:
        parallel.check_division(
            parallel.normalised(parallel.text_of(sizes), sizes.gpus, "tensor"),
            sizes.gpus,
            "the model",
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            intermediate=shape.intermediate,
            layers=shape.layers,
        )
    except Refusal as refusal:
        raise PreflightError(refusal.message, refusal.remedy) from None
    return parallel.stage_layers(shape.layers, sizes.pipeline)


@dataclass(frozen=True)
class Reservation:
    """vLLM's use of one GPU: it takes `share` of the memory and turns what weights and activations leave into KV blocks.

    Of the fullest stage of a pipeline: all stages have its number of blocks. Each of the `blocks` holds `BLOCK_TOKENS` tokens of
    `block_bytes`. `at_once`: sequences of the load's length that fit together, in one copy of the model.
    """

    share: float
    weights: int
    activations: int
    outside: int
    kv_cache: int
    block_bytes: int
    blocks: int
    at_once: int


def vllm_reservation(
    shape: Shape,
    parts: Parts,
    load: Sequences,
    gpus: Gpus,
    share: float | None = None,
    total_bytes: int | None = None,
    sizes: ParallelSizes | None = None,
) -> Reservation:
    """vLLM's reservation on each GPU. `share`: gpu_memory_utilization (None: the default). `total_bytes`: the GPU's visible
    memory, if known. `sizes` None: tensor parallel over all GPUs. A negative `kv_cache` is a shortage."""
    stages = vllm_stages(shape, parts, load, gpus, share, total_bytes, sizes or ParallelSizes(tensor=gpus.count))
    return min(stages, key=lambda stage: (stage.blocks, stage.kv_cache))


def vllm_stages(
    shape: Shape,
    parts: Parts,
    load: Sequences,
    gpus: Gpus,
    share: float | None,
    total_bytes: int | None,
    sizes: ParallelSizes,
) -> list[Reservation]:
    """`vllm_reservation` of each stage of a pipeline, each with its own number of blocks."""
    if share is None:
        share = UTILIZATION if gpus.capability >= 7.5 else UTILIZATION_ON_VOLTA
    total = int((total_bytes or gpus.usable_bytes) * share)
    outside = CONTEXT_BYTES + (VLLM_OUTSIDE_TORCH if sizes.tensor * sizes.pipeline > 1 else 0)
    # One more token than the longest sequence: labctl generates it to score the answer.
    of_a_sequence = math.ceil((load.prompt_tokens + load.new_tokens) / BLOCK_TOKENS)
    a_layer = BLOCK_TOKENS * 2 * max(1, shape.kv_heads // sizes.tensor) * shape.head_dim * load.itemsize
    counts = _stage_layers(shape, sizes)
    found = []
    for stage, weights in enumerate(weights_by_stage(shape, parts, sizes, load.itemsize)):
        activations = _profiled(shape, load, gpus, sizes, has_head=stage == sizes.pipeline - 1)
        left = total - weights - activations - outside
        a_block = a_layer * counts[stage]
        blocks = max(0, left // a_block)
        found.append(Reservation(share, weights, activations, outside, left, a_block, blocks, blocks // of_a_sequence))
    return found


def _profiled(shape: Shape, load: Sequences, gpus: Gpus, sizes: ParallelSizes, *, has_head: bool) -> int:
    """The peak of vLLM's profile run with the most tokens and sequences of a step: hidden states and projections of a layer, or
    logits (once in the model's dtype, twice in float32)."""
    large = gpus.memory_bytes >= 70 * GIB and "A100" not in gpus.name.upper()
    tokens, sequences = BATCHED_TOKENS[large], max(MOST_SEQUENCES[large], _of_a_copy(load.batch, sizes))
    wide = 3 * shape.intermediate // sizes.tensor
    layer = tokens * (4 * shape.hidden + wide) * load.itemsize
    logits = sequences * shape.vocabulary * (load.itemsize + 8) if has_head else 0
    return max(layer, logits + tokens * shape.hidden * load.itemsize) + CUBLAS_WORKSPACE[gpus.capability >= 9.0]


def _of_a_copy(batch: int, sizes: ParallelSizes) -> int:
    """The sequences of a batch that a copy of the model has at most."""
    return math.ceil(batch / sizes.data)


# ---------------------------------------------------------------- verdict

FITS, TIGHT, DOES_NOT = "fits", "tight", "does not"
VERDICTS = (FITS, TIGHT, DOES_NOT)


@dataclass(frozen=True)
class Case:
    """One model on the GPUs of one partition with one backend. `parts` are in bytes. `parallel` counts with vLLM alone."""

    shape: Shape
    parts: Parts
    gpus: Gpus
    backend: str
    share: float | None = None
    parallel: str = "tensor"

    @property
    def sizes(self) -> ParallelSizes:
        """Of vLLM."""
        return parallel.sizes_of(self.parallel, self.gpus.count)

    def reservation(self, load: Sequences) -> Reservation:
        """See `vllm_reservation`."""
        return vllm_reservation(self.shape, self.parts, load, self.gpus, self.share, sizes=self.sizes)

    def needed_bytes(self, load: Sequences) -> int:
        """Memory that the fullest GPU needs, with the CUDA context."""
        if self.backend == "vllm":
            blocks = math.ceil((load.prompt_tokens + load.new_tokens) / BLOCK_TOKENS)
            blocks *= _of_a_copy(load.batch, self.sizes)
            stages = vllm_stages(self.shape, self.parts, load, self.gpus, self.share, None, self.sizes)
            return max(s.weights + s.activations + s.outside + blocks * s.block_bytes for s in stages)
        memory = by_layers(self.shape, self.parts, load, self.gpus, self.backend)
        return max(each.peak for each in memory) + CONTEXT_BYTES

    def limits(self) -> tuple[int, int]:
        """(bytes up to which it fits, bytes up to which it is tight)."""
        if self.backend != "vllm":
            return int(self.gpus.usable_bytes * COMFORTABLE), self.gpus.usable_bytes
        share = self.share or self.reservation(Sequences(1, 1, 1, 2)).share
        return int(self.gpus.usable_bytes * min(share, COMFORTABLE)), int(self.gpus.usable_bytes * share)

    def verdict(self, load: Sequences) -> str:
        needed = self.needed_bytes(load)
        comfortable, most = self.limits()
        return FITS if needed <= comfortable else TIGHT if needed <= most else DOES_NOT

    def largest_batch(self, load: Sequences, verdict: str = FITS) -> int:
        """The largest batch of the load's length with this verdict or a better one; 0 if there is none."""
        return _largest(lambda batch: self._is(replace(load, batch=batch), verdict), MOST_BATCH)

    def largest_length(self, load: Sequences, verdict: str = FITS) -> int:
        """The longest sequence with this verdict or a better one; prompt and answer keep the load's proportion."""
        most = self.shape.max_tokens or MOST_TOKENS
        return _largest(lambda tokens: self._is(_of_length(load, tokens), verdict), most)

    def _is(self, load: Sequences, verdict: str) -> bool:
        return VERDICTS.index(self.verdict(load)) <= VERDICTS.index(verdict)


MOST_BATCH = 1 << 20
MOST_TOKENS = 1 << 20


def _of_length(load: Sequences, tokens: int) -> Sequences:
    """The load with sequences of `tokens` in total."""
    prompt = tokens * load.prompt_tokens // (load.prompt_tokens + load.new_tokens)
    return replace(load, prompt_tokens=max(1, prompt), new_tokens=max(1, tokens - max(1, prompt)))


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` for which `holds` is true, by bisection; 0 if it is false for 1."""
    low, high = 0, 1
    while high <= most and holds(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


# ---------------------------------------------------------------- speed


def tokens_per_second(case: Case, load: Sequences) -> float | None:
    """Upper bound of the decoding throughput by memory bandwidth, over all sequences. Each step reads every weight except the
    embeddings, and the keys and values so far. GPUs of a tensor group read at once. Stages read in turn, but each at the same
    time as the others if they have different micro-batches, which then read the weights once each. None if the bandwidth is
    unknown."""
    bandwidth = case.gpus.bandwidth_bytes_s
    if bandwidth is None:
        return None
    tokens = load.prompt_tokens + load.new_tokens / 2
    parts, shape, count = case.parts, case.shape, case.gpus.count
    read = parts.total - (parts.embedding if parts.head else 0)
    sizes, batch, micro_batches = ParallelSizes(), load.batch, 1
    if case.backend == "vllm":
        sizes = case.sizes
        batch = _of_a_copy(load.batch, sizes)
        micro_batches = min(sizes.pipeline, batch)
    elif case.backend == "staged":
        micro_batches = pipeline.bucket_of(batch, load.prompt_tokens, load.new_tokens, count).micro_batches
    cache = kv_bytes_per_token(shape, load.itemsize) * tokens * batch * max(1, sizes.tensor / shape.kv_heads)
    return load.batch / ((read + cache / micro_batches) / (bandwidth * sizes.tensor))
