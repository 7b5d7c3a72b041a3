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

from labctl_orchestrator.models.architecture import Parts, Shape, layer_parameters
from labctl_slurm.errors import PreflightError, WrongUseError
from labctl_workers.engines import parallel
from labctl_workers.engines.layers import check_layers, equal_split, weighed_split
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
    """The load: `batch` concurrent sequences with these numbers of tokens, in a dtype of `itemsize` bytes. With vLLM, a number of
    its cache may have other `cache_bytes`, and all sequences may share the cache of their first `shared_tokens`."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    itemsize: int
    sampled: bool = False
    cache_bytes: int | None = None
    shared_tokens: int = 0

    @property
    def context(self) -> int:
        """Tokens with keys and values at the end: all but the last one."""
        return self.prompt_tokens + self.new_tokens - 1

    @property
    def cache_itemsize(self) -> int:
        return self.cache_bytes or self.itemsize

    def blocks(self, batch: int) -> int:
        """vLLM's blocks for so many of the sequences, each with one more token: labctl generates it to score the answer."""
        shared, each = self._shared_and_each
        return shared + batch * (each - shared)

    def at_once(self, blocks: int) -> int:
        """The sequences that so many of vLLM's blocks hold."""
        shared, each = self._shared_and_each
        return max(0, blocks - shared) // (each - shared)

    @property
    def _shared_and_each(self) -> tuple[int, int]:
        of_a_sequence = math.ceil((self.prompt_tokens + self.new_tokens) / BLOCK_TOKENS)
        return min(self.shared_tokens, self.prompt_tokens) // BLOCK_TOKENS, of_a_sequence


@dataclass(frozen=True)
class Draft:
    """The drafting model of speculative decoding. `parts` are in bytes."""

    shape: Shape
    parts: Parts


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
    try:
        check_layers(len(parts.layers), gpus)
    except Refusal as refusal:
        raise PreflightError(refusal.message, refusal.remedy) from None
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
    """Weights of a GPU of each pipeline stage: its share of every matrix of the stage's layers, which may be quantized.
    Embeddings are on the first stage, norm and head on the last, which has a copy of embeddings that are its head. The
    vocabulary is padded to a multiple of 64 rows. The rotary table counts too. Raises PreflightError if the sizes do not divide
    the model."""
    tensor, stages = sizes.tensor, sizes.pipeline
    counts = _stage_layers(shape, sizes)
    (all_matrices, all_vectors), (matrices, vectors) = layer_parameters(shape), layer_parameters(shape, tensor)
    # Bytes beside norms and biases, which are never quantized.
    layers = [
        round((of - all_vectors * itemsize) * matrices / all_matrices) + vectors * itemsize for of in parts.layers
    ]
    rotary = (shape.max_tokens or 0) * shape.head_dim
    table = shape.hidden * math.ceil(math.ceil(shape.vocabulary / VOCABULARY_PADDING) * VOCABULARY_PADDING / tensor)
    held = [sum(layers[begin:end]) + rotary * itemsize for begin, end in pairwise(accumulate(counts, initial=0))]
    held[0] += table * itemsize
    held[-1] += (shape.hidden + (table if stages > 1 or not shape.tied else 0)) * itemsize
    return held


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


def _adapter_numbers(shape: Shape, layers: int, rank: int, sizes: ParallelSizes, stage: int) -> int:
    """Numbers of an adapter in a GPU of a stage. vLLM sets two matrices of its rank aside beside each matrix of the layers, the
    embeddings and the head, whichever of them the adapter changes. Of the two, the one on the split side is split
    (vllm/lora/layers)."""
    query, key = shape.heads * shape.head_dim // sizes.tensor, max(1, shape.kv_heads // sizes.tensor) * shape.head_dim
    intermediate = shape.intermediate // sizes.tensor
    of_a_layer = 7 * shape.hidden + 2 * query + 2 * key + 3 * intermediate
    tables = (stage == 0) + (stage == sizes.pipeline - 1)
    return rank * (layers * of_a_layer + tables * (shape.hidden + shape.vocabulary))


def _block_bytes(shape: Shape, layers: int, load: Sequences, sizes: ParallelSizes) -> int:
    heads = max(1, shape.kv_heads // sizes.tensor)
    return layers * BLOCK_TOKENS * 2 * heads * shape.head_dim * load.cache_itemsize


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

FITS, TIGHT, DOES_NOT = "fits", "tight", "too big"
UNSUPPORTED = "unsupported"  # the backend cannot run this on these GPUs
VERDICTS = (FITS, TIGHT, DOES_NOT)


@dataclass(frozen=True)
class Case:
    """One model on the GPUs of one partition with one backend. `parts` are in bytes. What follows counts with vLLM alone.
    `share`: gpu_memory_utilization (None: the default). `adapter_rank`: vLLM's rank of a LoRA adapter (0: none).
    `visible_bytes`: a GPU's memory as vLLM sees it, if known."""

    shape: Shape
    parts: Parts
    gpus: Gpus
    backend: str
    share: float | None = None
    parallel: str = "tensor"
    draft: Draft | None = None
    adapter_rank: int = 0
    visible_bytes: int | None = None

    @property
    def sizes(self) -> ParallelSizes:
        """Of vLLM."""
        return parallel.sizes_of(self.parallel, self.gpus.count)

    def reservation(self, load: Sequences) -> Reservation:
        """vLLM's reservation on each GPU. A negative `kv_cache` is a shortage."""
        return min(self.stages(load), key=lambda stage: (stage.blocks, stage.kv_cache))

    def stages(self, load: Sequences) -> list[Reservation]:
        """vLLM's reservation on a GPU of each stage of a pipeline, each with its own number of blocks. The last one has the
        drafting model."""
        shape, gpus, sizes, share = self.shape, self.gpus, self.sizes, self.share
        if share is None:
            share = UTILIZATION if gpus.capability >= 7.5 else UTILIZATION_ON_VOLTA
        total = int((self.visible_bytes or gpus.usable_bytes) * share)
        outside = CONTEXT_BYTES + (VLLM_OUTSIDE_TORCH if sizes.tensor * sizes.pipeline > 1 else 0)
        counts = _stage_layers(shape, sizes)
        found = []
        for stage, of_model in enumerate(weights_by_stage(shape, self.parts, sizes, load.itemsize)):
            last = stage == sizes.pipeline - 1
            activations = _profiled(shape, load, gpus, sizes, has_head=last)
            weights, a_block = of_model, _block_bytes(shape, counts[stage], load, sizes)
            if (draft := self.draft) is not None and last:
                weights += weights_by_stage(draft.shape, draft.parts, ParallelSizes(sizes.tensor), load.itemsize)[0]
                a_block += _block_bytes(draft.shape, draft.shape.layers, load, sizes)
            weights += load.itemsize * _adapter_numbers(shape, counts[stage], self.adapter_rank, sizes, stage)
            left = total - weights - activations - outside
            blocks = max(0, left // a_block)
            found.append(Reservation(share, weights, activations, outside, left, a_block, blocks, load.at_once(blocks)))
        return found

    def needed_bytes(self, load: Sequences) -> int:
        """Memory that the fullest GPU needs, with the CUDA context."""
        if self.backend == "vllm":
            blocks = load.blocks(_of_a_copy(load.batch, self.sizes))
            return max(s.weights + s.activations + s.outside + blocks * s.block_bytes for s in self.stages(load))
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
    unknown, and with speculative decoding, whose steps give several tokens."""
    bandwidth = case.gpus.bandwidth_bytes_s
    if bandwidth is None or case.draft is not None:
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
    cache = kv_bytes_per_token(shape, load.cache_itemsize) * tokens * batch * max(1, sizes.tensor / shape.kv_heads)
    return load.batch / ((read + cache / micro_batches) / (bandwidth * sizes.tensor))
