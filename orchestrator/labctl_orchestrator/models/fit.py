"""Does a model fit, before it is queued? Dimensions of the model and of the partition -> memory of each GPU, verdict. Pure.

What an engine allocates is modelled after its code: `hf` (transformers' generate), `staged` (labctl_workers/engines/staged) and
vLLM's start (vllm/v1/worker/gpu_worker.py). Bytes are those of one GPU unless they say otherwise.
tests/benchmarks/fit_truth.py holds them against what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from labctl_orchestrator.models.architecture import Parts, Shape
from labctl_slurm.errors import PreflightError, WrongUseError
from labctl_workers.engines.layers import equal_split, weighed_split
from labctl_workers.engines.staged import pipeline

if TYPE_CHECKING:  # so that the benchmark on a bare GPU node needs the standard library alone
    from labctl_slurm.partitions import Partition

GIB = 2**30
MIB = 2**20
# What a GPU shows of its nominal memory: the driver keeps the rest (79.2 of an H100's 80 GiB, 31.7 of a V100's 32).
USABLE = 0.99
# The handout: keep 20-30% of the memory free for overhead. Up to 80% a model fits, beyond it is tight.
COMFORTABLE = 0.8
# CUDA's context with torch's kernels, which torch's own figures do not hold.
CONTEXT_BYTES = 600 * MIB
# torch's workspace of cuBLAS for each stream that multiplies (ATen/cuda/CublasHandlePool.cpp): from Hopper on, and before.
CUBLAS_WORKSPACE = {True: 32 * MIB, False: 8320 * 1024}
# vLLM's defaults (vllm/config/cache.py, engine/arg_utils.py), of its offline engine, for GPUs of 70 GiB and more and for others.
UTILIZATION = 0.92
UTILIZATION_ON_VOLTA = 0.9  # vLLM 0.19, the last for it
BATCHED_TOKENS = {True: 16384, False: 8192}
MOST_SEQUENCES = {True: 1024, False: 256}
BLOCK_TOKENS = 16
VOCABULARY_PADDING = 64
# NCCL's buffers, the compiled kernels' and what else vLLM's worker holds outside of torch beside a bare context. Rounded: on each
# of two H100s NVML counted 1,142 MiB (tests/benchmarks/vllm_truth.py), with the graphs that are captured when the cache is taken.
VLLM_OUTSIDE_TORCH = 1 * GIB


@dataclass(frozen=True)
class Gpus:
    """The GPUs that a model is spread over. `memory_bytes` is nominal; `bandwidth_bytes_s` the memory's (None: not known)."""

    count: int
    name: str
    memory_bytes: int
    capability: float
    bandwidth_bytes_s: float | None = None

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * USABLE)


def gpus_of(partition: Partition, count: int | None = None) -> Gpus:
    """`count` of them, or the partition's number. Raises WrongUseError where the partition does not say their memory."""
    if partition.gpu_memory_gib is None:
        raise WrongUseError(
            f"partition {partition.name!r} does not say how much memory its GPUs have",
            f"set gpu_memory_gib of [partitions.{partition.name}] in labctl.toml",
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
class Workload:
    """What is asked of the model: `batch` sequences at once, each of so many tokens, in a dtype of `itemsize` bytes."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    itemsize: int
    sampled: bool = False

    @property
    def context(self) -> int:
        """Tokens that have keys and values at the end: the last token chosen is never looked back at."""
        return self.prompt_tokens + self.new_tokens - 1


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU. `kv_cache` is set aside for keys and values, `kv_cache_used` is what of it the load fills; `beside` are
    activations, logits and workspaces at the peak; `peak` is what torch allocates at most."""

    weights: int
    kv_cache: int
    kv_cache_used: int
    beside: int

    @property
    def peak(self) -> int:
        return self.weights + self.kv_cache + self.beside


# ---------------------------------------------------------------- keys and values


def kv_bytes_per_token(shape: Shape, itemsize: int) -> int:
    """Of one token of one sequence, over all layers and GPUs: 2 x layers x key-value heads x head size x bytes."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * itemsize


def _kv_bytes(shape: Shape, layers: range, tokens: int, load: Workload) -> int:
    """Keys and values of some layers as transformers' growing cache holds them: a layer with a window keeps no more than it."""
    a_token = 2 * shape.kv_heads * shape.head_dim * load.itemsize
    held = (min(tokens, window - 1) if (window := shape.windows[layer]) else tokens for layer in layers)
    return a_token * load.batch * sum(held)


# ---------------------------------------------------------------- hf and staged: layers split


def layer_counts(parts: Parts, gpus: int, backend: str) -> list[int]:
    """How many layers each GPU takes: the engines' own rules. Raises PreflightError for fewer layers than GPUs."""
    if len(parts.layers) < gpus:
        raise PreflightError(f"{len(parts.layers)} layers cannot be split over {gpus} GPUs", "ask for fewer --gpus")
    if backend == "hf":
        return equal_split(len(parts.layers), gpus)
    return weighed_split(parts.layers, parts.head or parts.embedding, gpus)


def weights_by_layers(parts: Parts, gpus: int, backend: str) -> list[int]:
    """Of each GPU: embeddings on the first, norm and head on the last. A tied head stays with the embeddings; with `staged` the
    last GPU reads a copy of it."""
    counts = layer_counts(parts, gpus, backend)
    held = [sum(parts.layers[begin:end]) for begin, end in pairwise(accumulate(counts, initial=0))]
    held[0] += parts.embedding + parts.rest
    held[-1] += parts.norm + parts.head
    if backend == "staged" and not parts.head and gpus > 1:
        held[-1] += parts.embedding
    return held


def by_layers(shape: Shape, parts: Parts, load: Workload, gpus: Gpus, backend: str) -> list[Memory]:
    """The memory of each GPU with `hf` or `staged`, which split the layers; `parts` in bytes."""
    counts = layer_counts(parts, gpus.count, backend)
    places = [range(begin, end) for begin, end in pairwise(accumulate(counts, initial=0))]
    weights = weights_by_layers(parts, gpus.count, backend)
    of_a_gpu = _of_hf if backend == "hf" else _of_staged
    return [
        replace(of_a_gpu(shape, layers, load, gpus, gpu), weights=held)
        for gpu, (layers, held) in enumerate(zip(places, weights, strict=True))
    ]


def _of_hf(shape: Shape, layers: range, load: Workload, gpus: Gpus, gpu: int) -> Memory:
    """`generate` with a cache that grows: each new token makes a layer's keys anew beside the old ones. The peak is while the
    prompts are taken up, or at the last token."""
    kv_cache = _kv_bytes(shape, layers, load.context, load)
    taken_up = _kv_bytes(shape, layers, load.prompt_tokens, load) + _activations(shape, load)
    one_layer = load.batch * load.context * shape.kv_heads * shape.head_dim * load.itemsize
    at_the_end = kv_cache + one_layer + _logits(shape, load, gpus, gpu)
    return Memory(
        0, kv_cache, kv_cache, max(taken_up, at_the_end) - kv_cache + CUBLAS_WORKSPACE[gpus.capability >= 9.0]
    )


def _activations(shape: Shape, load: Workload) -> int:
    """Of a layer's multi-layer perceptron, the widest place: gate, up and their product, beside four hidden states."""
    return load.batch * load.prompt_tokens * (4 * shape.hidden + 3 * shape.intermediate) * load.itemsize


def _logits(shape: Shape, load: Workload, gpus: Gpus, gpu: int) -> int:
    """The last GPU makes them, the first chooses from a float32 copy; sampling sorts them besides, with their places."""
    numbers = load.batch * shape.vocabulary
    held = numbers * load.itemsize if gpu in (0, gpus.count - 1) else 0
    if gpu == 0:
        held += numbers * (4 + (24 if load.sampled else 0))
    return held


def _of_staged(shape: Shape, layers: range, load: Workload, gpus: Gpus, gpu: int) -> Memory:
    """A cache of fixed length, shared by the micro-batches (staged/pipeline.py)."""
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
    # Two streams multiply: the model's own forward, which the stages are held against, has been on the default one.
    used = load.batch * load.context * a_slot
    return Memory(0, bucket.slots * a_slot, used, beside + 2 * CUBLAS_WORKSPACE[gpus.capability >= 9.0])


# ---------------------------------------------------------------- vLLM: tensor parallel


def weights_by_tensor(shape: Shape, parts: Parts, gpus: int, itemsize: int) -> int:
    """Of each GPU, all alike: a share of every matrix. Norms and the biases of what is summed are on all of them; key-value
    heads that are fewer than the GPUs are repeated; the vocabulary is padded to a multiple of 64 rows. Its rotary table counts
    too. Raises PreflightError where the heads cannot be shared out."""
    if shape.heads % gpus or (shape.kv_heads % gpus and gpus % shape.kv_heads):
        raise PreflightError(
            f"{gpus} GPUs do not divide the {shape.heads} query and {shape.kv_heads} key-value heads",
            "ask for another number of --gpus; or --backend hf, which splits by layers",
        )
    query, key = shape.heads * shape.head_dim // gpus, max(1, shape.kv_heads // gpus) * shape.head_dim
    intermediate = shape.intermediate // gpus
    attention = shape.hidden * (2 * query + 2 * key) + (query + 2 * key) * shape.qkv_bias + shape.hidden * shape.o_bias
    attention += 2 * shape.head_dim * shape.qk_norm
    mlp = 3 * shape.hidden * intermediate + (2 * intermediate + shape.hidden) * shape.mlp_bias
    layers = shape.layers * (attention + mlp + shape.norms * shape.hidden)
    if shape.quantized:  # its layers are stored smaller than their shapes say
        layers = sum(parts.layers) // gpus // itemsize
    rows = math.ceil(math.ceil(shape.vocabulary / VOCABULARY_PADDING) * VOCABULARY_PADDING / gpus)
    tables = (1 if shape.tied else 2) * rows * shape.hidden
    rotary = (shape.max_tokens or 0) * shape.head_dim
    return (layers + tables + shape.hidden + rotary) * itemsize


@dataclass(frozen=True)
class Reservation:
    """What vLLM makes of one GPU: it takes `share` of its memory, and what weights and activations leave becomes KV blocks.

    `blocks` hold `BLOCK_TOKENS` tokens each; `at_once` is how many sequences of the load's length they hold together.
    """

    share: float
    weights: int
    activations: int
    outside: int
    kv_cache: int
    blocks: int
    at_once: int


def of_vllm(
    shape: Shape, parts: Parts, load: Workload, gpus: Gpus, share: float | None = None, total_bytes: int | None = None
) -> Reservation:
    """vLLM's reservation on each GPU. `share` is its gpu_memory_utilization (None: its default there); `total_bytes` what the
    GPU shows, where that is known. A negative `kv_cache` is what is missing."""
    if share is None:
        share = UTILIZATION if gpus.capability >= 7.5 else UTILIZATION_ON_VOLTA
    weights = weights_by_tensor(shape, parts, gpus.count, load.itemsize)
    activations = _profiled(shape, load, gpus)
    outside = CONTEXT_BYTES + (VLLM_OUTSIDE_TORCH if gpus.count > 1 else 0)
    left = int((total_bytes or gpus.usable_bytes) * share) - weights - activations - outside
    a_block = BLOCK_TOKENS * 2 * shape.layers * max(1, shape.kv_heads // gpus.count) * shape.head_dim * load.itemsize
    blocks = max(0, left // a_block)
    # The token after the longest sequence has a place too: labctl asks for it to score the answer.
    of_a_sequence = math.ceil((load.prompt_tokens + load.new_tokens) / BLOCK_TOKENS)
    return Reservation(share, weights, activations, outside, left, blocks, blocks // of_a_sequence)


def _profiled(shape: Shape, load: Workload, gpus: Gpus) -> int:
    """The peak of vLLM's trial run with as many tokens as a step may have: hidden states and the projections of a layer, or
    the logits (the model's dtype, and float32 twice) of as many sequences as may run."""
    large = gpus.memory_bytes >= 70 * GIB and "A100" not in gpus.name.upper()
    tokens, sequences = BATCHED_TOKENS[large], max(MOST_SEQUENCES[large], load.batch)
    wide = 3 * shape.intermediate // gpus.count
    layer = tokens * (4 * shape.hidden + wide) * load.itemsize
    logits = sequences * shape.vocabulary * (load.itemsize + 8)
    return max(layer, logits + tokens * shape.hidden * load.itemsize) + CUBLAS_WORKSPACE[gpus.capability >= 9.0]


# ---------------------------------------------------------------- verdict

FITS, TIGHT, DOES_NOT = "fits", "tight", "does not"
VERDICTS = (FITS, TIGHT, DOES_NOT)


@dataclass(frozen=True)
class Case:
    """One model on one partition's GPUs with one backend: all that a verdict is made of. `parts` are in bytes."""

    shape: Shape
    parts: Parts
    gpus: Gpus
    backend: str
    share: float | None = None

    def needed_bytes(self, load: Workload) -> int:
        """Of the fullest GPU, the context of CUDA included. With vLLM: what one sequence at least needs, since others wait."""
        if self.backend == "vllm":
            reserved = of_vllm(self.shape, self.parts, load, self.gpus, self.share)
            cache = _vllm_sequence_bytes(self.shape, load, self.gpus) * load.batch
            return reserved.weights + reserved.activations + reserved.outside + cache
        memory = by_layers(self.shape, self.parts, load, self.gpus, self.backend)
        return max(each.peak for each in memory) + CONTEXT_BYTES

    def limits(self) -> tuple[int, int]:
        """Bytes up to which it fits, and up to which it is tight."""
        if self.backend != "vllm":
            return int(self.gpus.usable_bytes * COMFORTABLE), self.gpus.usable_bytes
        share = self.share or of_vllm(self.shape, self.parts, Workload(1, 1, 1, 2), self.gpus).share
        return int(self.gpus.usable_bytes * min(share, COMFORTABLE)), int(self.gpus.usable_bytes * share)

    def verdict(self, load: Workload) -> str:
        needed = self.needed_bytes(load)
        comfortable, most = self.limits()
        return FITS if needed <= comfortable else TIGHT if needed <= most else DOES_NOT

    def largest_batch(self, load: Workload, verdict: str = FITS) -> int:
        """Most sequences at once, of the load's length, for which the verdict is this one or better; 0: none."""
        return _largest(lambda batch: self._is(replace(load, batch=batch), verdict), MOST_BATCH)

    def largest_length(self, load: Workload, verdict: str = FITS) -> int:
        """The longest sequence, prompt and answer in the load's proportion, for which the verdict is this one or better."""
        most = self.shape.max_tokens or MOST_TOKENS
        return _largest(lambda tokens: self._is(_of_length(load, tokens), verdict), most)

    def _is(self, load: Workload, verdict: str) -> bool:
        return VERDICTS.index(self.verdict(load)) <= VERDICTS.index(verdict)


MOST_BATCH = 1 << 20
MOST_TOKENS = 1 << 20


def _of_length(load: Workload, tokens: int) -> Workload:
    """The same load with sequences of `tokens` in all."""
    prompt = tokens * load.prompt_tokens // (load.prompt_tokens + load.new_tokens)
    return replace(load, prompt_tokens=max(1, prompt), new_tokens=max(1, tokens - max(1, prompt)))


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` for which `holds` is true, 0 where it is for none; it is true up to some number."""
    low, high = 0, 1
    while high <= most and holds(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _vllm_sequence_bytes(shape: Shape, load: Workload, gpus: Gpus) -> int:
    blocks = math.ceil((load.prompt_tokens + load.new_tokens) / BLOCK_TOKENS)
    heads = max(1, shape.kv_heads // gpus.count)
    return blocks * BLOCK_TOKENS * 2 * shape.layers * heads * shape.head_dim * load.itemsize


# ---------------------------------------------------------------- speed


def tokens_per_second(case: Case, load: Workload) -> float | None:
    """What the memory's bandwidth allows at most when decoding, all sequences together: each step reads every weight but the
    embeddings (a row of them) and the keys and values so far. GPUs in a row read one after the other, GPUs in tensor parallel
    at once. None where the bandwidth is not known."""
    bandwidth = case.gpus.bandwidth_bytes_s
    if bandwidth is None:
        return None
    tokens = load.prompt_tokens + load.new_tokens / 2
    parts, shape, count = case.parts, case.shape, case.gpus.count
    read = parts.total - (parts.embedding if parts.head else 0)
    cache = kv_bytes_per_token(shape, load.itemsize) * tokens * load.batch
    at_once = count if case.backend == "vllm" else 1
    if case.backend == "vllm" and shape.kv_heads < count:
        cache *= count / shape.kv_heads
    return load.batch / ((read + cache) / (bandwidth * at_once))
