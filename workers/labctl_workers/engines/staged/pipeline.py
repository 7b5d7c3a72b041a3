"""Runs batches through the stages: micro-batches in flight, captured graphs, and asynchronous copies of tokens to the host.

The host runs ahead of the devices. It queues each step of each micro-batch and waits only for the tokens of some steps before,
so it reads the clock when a token arrives while the devices still have work. On a GPU a step is a graph, captured before the
clock starts; events order the copies between devices.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from labctl_workers.engines.base import Request
from labctl_workers.engines.staged import compiling, stages
from labctl_workers.engines.staged.stages import Buffers, Functions, Stage, Storage
from labctl_workers.record import Refusal, Sampling

# Cache lengths are multiples of this number of slots: runs of similar lengths share graphs.
SLOTS = 32
# Steps of the host ahead of the last token that it has: they hide the host's work, and are wasted at the end of an answer.
AHEAD = 2
# Prompt tokens that go through a stage at once; it limits the memory of activations.
PREFILL_TOKENS = 8192
# A shorter cache gets its own graph, or its own compilation, if it saves this share of the bytes of a step.
WORTH_A_GRAPH = 0.1
WORTH_COMPILING = 0.25
WARM_UPS = 2
SHORT_PROMPT = 8


# ---------------------------------------------------------------- shapes


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape of a batch: micro-batches of `rows` sequences each, and a cache of `length` slots."""

    length: int
    rows: int
    micro_batches: int

    @property
    def slots(self) -> int:
        return self.length * self.rows * self.micro_batches


def bucket_of(requests: int, prompt_tokens: int, new_tokens: int, stage_count: int) -> Bucket:
    """The smallest bucket for a batch; the last token needs no slot, since no token follows it."""
    micro_batches = stage_count if requests >= 2 * stage_count else 1
    length = -(-(prompt_tokens + new_tokens - 1) // SLOTS) * SLOTS
    return Bucket(length, -(-requests // micro_batches), micro_batches)


def holds(bucket: Bucket, needed: Bucket) -> bool:
    """Whether a batch for one bucket can run in another: with at most twice the rows and the length, since padding costs time."""
    return (
        bucket.micro_batches == needed.micro_batches
        and needed.rows <= bucket.rows <= 2 * needed.rows
        and needed.length <= bucket.length <= 2 * needed.length
    )


def read_lengths(length: int, slot_bytes: int, weights: int, worth: float) -> tuple[int, ...]:
    """The numbers of slots that a step may read, ascending: all, and each half that saves a share of `worth` of the bytes.

    `slot_bytes`: for all sequences of a micro-batch. `weights`: bytes that every step reads.
    """
    reads = [length]
    while reads[-1] > 2 * SLOTS:
        half = -(-reads[-1] // 2 // SLOTS) * SLOTS
        if (reads[-1] - half) * slot_bytes < worth * (weights + reads[-1] * slot_bytes):
            break
        reads.append(half)
    return tuple(reversed(reads))


def prompt_pieces(rows: int, longest: int) -> list[range]:
    """The rows that go through a stage together, for prompts of `longest` tokens."""
    together = max(1, PREFILL_TOKENS // longest)
    return [range(first, min(first + together, rows)) for first in range(0, rows, together)]


def extra_bytes(stage: Stage, bucket: Bucket) -> int:
    """The maximum bytes of a batch on a stage's device beside the weights, with prompts as long as the bucket."""
    widest = max(
        (module.out_features for module in stage.layers[0].modules() if hasattr(module, "out_features")), default=0
    )
    return bucket.slots * stage.slot_bytes() + bytes_beside_cache(
        tokens=min(PREFILL_TOKENS, bucket.rows * bucket.length),
        read=bucket.length,
        sequences=bucket.rows * bucket.micro_batches,
        hidden=stage.hidden_size,
        widest=widest,
        vocabulary=stage.vocabulary if stage.head is not None else 0,
        itemsize=int(stage.dtype.itemsize),
    )


def bytes_beside_cache(
    *, tokens: int, read: int, sequences: int, hidden: int, widest: int, vocabulary: int, itemsize: int
) -> int:
    """The bytes of the activations of a piece of the prompts, `tokens` in all (hidden states and their norms, outputs of the
    widest projections, the mask over `read` slots), and of logits and sampling (`vocabulary` 0: no head on this stage)."""
    activations = tokens * (6 * hidden + 4 * widest) * itemsize
    mask = tokens * read * (itemsize + 2)
    logits = sequences * vocabulary * (itemsize + 5 * 4)
    return activations + mask + logits


# ---------------------------------------------------------------- devices


class HostStreams:
    """Stages on the CPU: every operation is synchronous."""

    ahead = 0

    def __init__(self, found: Sequence[Stage]) -> None:
        self.torch = found[0].torch

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        yield

    def send(self, source: int, target: int, tensor: Any, into: Any, *, beside: bool) -> Any:
        into.copy_(tensor)

    def wait(self, target: int, arrived: Any) -> None:
        """The copy is complete."""

    def move(self, tensor: Any, target: int) -> Any:
        return tensor

    def host_buffer(self, *shape: int) -> Any:
        return self.torch.zeros(shape, dtype=self.torch.int64)

    def record(self) -> Any:
        return None

    def synchronize(self) -> None:
        """Nothing is pending."""


class CudaStreams:
    """Stages on GPUs: each has a stream for its work, and one in each direction for copies beside that work."""

    ahead = AHEAD

    def __init__(self, found: Sequence[Stage]) -> None:
        self.torch = found[0].torch
        self.devices = [stage.device for stage in found]
        cuda = self.torch.cuda
        self.work = [cuda.Stream(device=device) for device in self.devices]
        self.leaving = [cuda.Stream(device=device) for device in self.devices]
        self.arriving = [cuda.Stream(device=device) for device in self.devices]
        self.pools = [cuda.graph_pool_handle() for _ in self.devices]

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the work stream of each device current, after all work on its default stream."""
        cuda = self.torch.cuda
        with contextlib.ExitStack() as stack:
            for device, stream in zip(self.devices, self.work, strict=True):
                stream.wait_stream(cuda.default_stream(device))
                stack.enter_context(cuda.stream(stream))
            yield

    def send(self, source: int, target: int, tensor: Any, into: Any, *, beside: bool) -> Any:
        """Copy to another stage's device; returns an event for `wait`, None without need.

        torch orders a copy after the work on both devices' current streams. `beside` the work of other micro-batches, the copy
        has streams of its own, so that the devices do not wait for each other. `wait` is separate: until the step that needs a
        token, the device has steps of other micro-batches to do."""
        if not beside:
            into.copy_(tensor, non_blocking=True)
            return None
        leaving, arriving = self.leaving[source], self.arriving[target]
        leaving.wait_stream(self.work[source])
        with self.torch.cuda.stream(arriving), self.torch.cuda.stream(leaving):
            into.copy_(tensor, non_blocking=True)
        return arriving.record_event()

    def wait(self, target: int, arrived: Any) -> None:
        if arrived is not None:
            self.work[target].wait_event(arrived)

    def move(self, tensor: Any, target: int) -> Any:
        return tensor.to(self.devices[target], non_blocking=True)

    def host_buffer(self, *shape: int) -> Any:
        return self.torch.zeros(shape, dtype=self.torch.int64, pin_memory=True)

    def record(self) -> Any:
        """An event after all queued work of the last stage."""
        event = self.torch.cuda.Event()
        event.record(self.work[-1])
        return event

    def synchronize(self) -> None:
        for device in self.devices:
            self.torch.cuda.synchronize(device)

    def capture(self, stage: int, step: Callable[[], None]) -> Any:
        """A graph of `step` on the stage's device. The stream is explicit: torch's default capture stream is on the first device,
        where the graph of another stage would be empty."""
        cuda = self.torch.cuda
        stream = self.work[stage]
        stream.wait_stream(cuda.default_stream(self.devices[stage]))
        with cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
            stream.synchronize()
            graph = cuda.CUDAGraph()
            with cuda.graph(graph, pool=self.pools[stage], stream=stream):
                step()
        return graph


# ---------------------------------------------------------------- buffers and graphs


@dataclass
class Prepared:
    """A prepared bucket: buffers by micro-batch and stage, slots that a step may read by stage, and steps by micro-batch, stage
    and slots read."""

    bucket: Bucket
    buffer_sets: list[list[Buffers]]
    reads: list[tuple[int, ...]]
    steps: list[list[dict[int, Callable[[], Any]]]] = field(default_factory=list)


@dataclass(eq=False)
class MicroBatch:
    """Some sequences of a batch, from its sequence `first` on. `open` are the rows without an end token."""

    buffer_sets: list[Buffers]
    steps: list[dict[int, Callable[[], Any]]]
    reads: list[tuple[int, ...]]
    first: int
    token_ids: list[Sequence[int]]
    host: Any
    prompt_tokens: int = 0
    tokens_arrived: Any = None  # event that the first stage's next step waits for
    open: set[int] = field(default_factory=set)
    answers: list[list[int]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.token_ids)


class Pipeline:
    """Generates with the stages of a model. On GPUs each step is a captured graph, of compiled functions if `compiled`."""

    def __init__(self, found: Sequence[Stage], *, compiled: bool) -> None:
        self.stages = list(found)
        self.torch = found[0].torch
        self.compiled = compiled
        self.on_gpus = found[0].device.type == "cuda"
        self.streams: Any = CudaStreams(found) if self.on_gpus else HostStreams(found)
        self.functions = compiling.functions() if compiled else Functions()
        self.prepared: dict[Bucket, Prepared] = {}
        # Compiled layers for prompts: (1 for one row or 2 for more, with a mask).
        self.prompts: set[tuple[int, bool]] = set()
        self.storage: list[Storage] = []
        self.slots = 0
        self.capture_s = 0.0
        self.compile_s = 0.0
        self.used_slots = 0  # of the last batch, all sequences together

    # ------------------------------------------------------------ prepare

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Allocate buffers for these buckets, and capture their steps. Buckets share memory: only one is in use at a time.

        Raises Refusal before any allocation where a GPU cannot hold a bucket.
        """
        wanted = [bucket for bucket in dict.fromkeys(buckets) if bucket not in self.prepared]
        for bucket in wanted:
            self.check_fits(bucket)
        slots = max((bucket.slots for bucket in wanted), default=0)
        if slots > self.slots:  # existing graphs have the addresses of the old memory
            wanted = [*self.prepared, *wanted]
            self.prepared, self.storage = {}, []
            self.storage = [stages.storage_of(stage, slots) for stage in self.stages]
            self.slots = slots
        for bucket in wanted:
            self.prepared[bucket] = self._prepare(bucket)
        self.streams.synchronize()

    def _prepare(self, bucket: Bucket) -> Prepared:
        rows, length, stored = bucket.rows, bucket.length, list(zip(self.stages, self.storage, strict=True))
        buffer_sets = [
            [Buffers(stage, rows, length, storage, micro * rows) for stage, storage in stored]
            for micro in range(bucket.micro_batches)
        ]
        worth = WORTH_COMPILING if self.compiled else WORTH_A_GRAPH
        reads = [read_lengths(length, stage.slot_bytes() * rows, stage.weights_bytes(), worth) for stage in self.stages]
        made = Prepared(bucket, buffer_sets, reads)
        with self.torch.no_grad():
            if self.compiled:
                self._compile(made)
            started = time.perf_counter()
            for of_micro in buffer_sets:
                steps = zip(self.stages, of_micro, reads, strict=True)
                made.steps.append(
                    [{read: self._step(stage, buffers, read) for read in of} for stage, buffers, of in steps]
                )
            self.capture_s += time.perf_counter() - started
        return made

    def _step(self, stage: Stage, buffers: Buffers, read: int) -> Callable[[], Any]:
        def step() -> None:
            stage.step(buffers, read, self.functions)

        if not self.on_gpus:
            return step
        replay: Callable[[], Any] = self.streams.capture(stage.index, step).replay
        return replay

    def _compile(self, made: Prepared) -> None:
        """Compile the stages for the shapes of the bucket, by running each once."""
        started = time.perf_counter()
        with self.streams.current():
            for stage, buffers, reads in zip(self.stages, made.buffer_sets[0], made.reads, strict=True):
                for read in reads:
                    stage.step(buffers, read, self.functions)
                buffers.slot.zero_()
        self.streams.synchronize()
        self.compile_s += time.perf_counter() - started

    def prepare_prompts(self, rows: int, longest: int, *, padded: bool) -> None:
        """Compile the layers for prompts in micro-batches of `rows` sequences with at most `longest` tokens. One compiled layer
        works for any number of tokens, and for any number of rows except one."""
        masked = {
            stage.needs_mask(kind, start, min(longest, start + PREFILL_TOKENS), padded=padded)
            for stage in self.stages
            for kind in stage.types
            for start in range(0, longest, PREFILL_TOKENS)
        }
        wanted = {(min(2, len(piece)), one) for piece in prompt_pieces(rows, longest) for one in masked} - self.prompts
        if not self.compiled or not wanted:
            return
        started = time.perf_counter()
        self.prompts |= wanted
        with self.torch.no_grad(), self.streams.current():
            for count, with_mask in sorted(wanted):
                buffer_sets = [
                    Buffers(stage, count, SLOTS, stages.storage_of(stage, count * SLOTS)) for stage in self.stages
                ]
                ids = self.torch.zeros((count, SHORT_PROMPT), dtype=self.torch.int64, device=self.stages[0].device)
                self._piece(ids, buffer_sets, 0, 0, padded=with_mask)
        self.streams.synchronize()
        self.compile_s += time.perf_counter() - started

    def prompt_layer(self, rows: int, *, masked: bool) -> Callable[..., Any]:
        """The function of a layer for prompts, compiled if `prepare_prompts` compiled it."""
        ready = (min(2, rows), masked) in self.prompts
        return self.functions.prompt_layer if ready else self.stages[0].plain.prompt_layer

    def ready_for(self, needed: Bucket) -> Prepared:
        """The smallest prepared bucket that holds the batch; prepared now if there is none."""
        fitting = [bucket for bucket in self.prepared if holds(bucket, needed)]
        if not fitting:
            self.prepare([needed])
            fitting = [needed]
        return self.prepared[min(fitting, key=lambda bucket: bucket.slots)]

    # ------------------------------------------------------------ generate

    def noise(self, sampling: Sampling) -> Noise | None:
        """The random numbers of a repeat, for its batches one after another. None for greedy decoding."""
        return None if sampling.greedy else Noise(self.stages[-1].device, sampling.seed or 0)

    def generate(
        self,
        prepared: Prepared,
        batch: Sequence[Request],
        *,
        new_tokens: int,
        sampling: Sampling,
        noise: Noise | None,
        ends: set[int],
        on_token: Callable[[int], None] | None = None,
    ) -> list[tuple[list[int], list[float], int]]:
        """Token ids and clock readings of each request, and the number of its prompt tokens in the cache. There are `new_tokens`
        of them, or as many as until some steps after all requests have ended.

        `noise` None: greedy decoding.
        """
        micro_batches = self._micro_batches(prepared, batch, new_tokens)
        sampler = None if noise is None else Sampler(noise, self.stages[-1].vocabulary, len(batch), sampling)
        pending: deque[tuple[MicroBatch, int, Any]] = deque()
        limit = self.streams.ahead * len(micro_batches)

        def read(until: int) -> None:
            """Read the tokens that have arrived, and wait until at most `until` steps are pending."""
            while pending and (len(pending) > until or pending[0][2].query()):
                micro, step, arrived = pending.popleft()
                self._read(micro, step, arrived, ends, on_token if micro.first == 0 else None)

        with self.torch.no_grad(), self.streams.current():
            for step in range(new_tokens):
                for micro in micro_batches:
                    if step and not micro.open:
                        continue
                    if step == 0:
                        self._prefill(micro)
                    else:
                        self._decode(micro, step, beside=len(micro_batches) > 1)
                    pending.append((micro, step, self._publish(micro, step, sampler, len(micro_batches) > 1)))
                    read(limit)
                if not any(micro.open for micro in micro_batches):
                    break
            read(0)
        self.streams.synchronize()
        self.used_slots = sum(m.rows * (m.prompt_tokens + len(m.times) - 1) for m in micro_batches)
        return [
            ([tokens[row] for tokens in micro.answers], micro.times, micro.prompt_tokens - pad)
            for micro in micro_batches
            for row, pad in enumerate(micro.buffer_sets[-1].pad[: micro.rows].tolist())
        ]

    def _micro_batches(self, prepared: Prepared, batch: Sequence[Request], new_tokens: int) -> list[MicroBatch]:
        rows = -(-len(batch) // prepared.bucket.micro_batches)
        found = []
        for buffer_sets, steps, first in zip(
            prepared.buffer_sets, prepared.steps, range(0, len(batch), rows), strict=False
        ):
            token_ids = [request.token_ids for request in batch[first : first + rows]]
            host = self.streams.host_buffer(new_tokens, len(token_ids))
            made = MicroBatch(buffer_sets, steps, prepared.reads, first, list(token_ids), host)
            made.open = set(range(made.rows))
            found.append(made)
        return found

    def _prefill(self, micro: MicroBatch) -> None:
        """Process the prompts, left-padded to one length, in pieces: rows of whole prompts, or parts of long ones."""
        torch = self.torch
        longest = max(map(len, micro.token_ids))
        rows = micro.buffer_sets[0].rows
        # Unused rows repeat the last sequence.
        prompts = [micro.token_ids[min(row, micro.rows - 1)] for row in range(rows)]
        pad = torch.tensor([longest - len(ids) for ids in prompts])
        padded = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompts])
        for buffers in micro.buffer_sets:
            buffers.pad.copy_(pad)
            buffers.slot.fill_(longest)
        micro.prompt_tokens = longest
        token_ids = padded.to(self.stages[0].device)
        needs_padding = any(len(ids) < longest for ids in prompts)
        for piece in prompt_pieces(rows, longest):
            for start in range(0, longest, PREFILL_TOKENS):
                entering = token_ids[piece.start : piece.stop, start : start + PREFILL_TOKENS]
                hidden = self._piece(entering, micro.buffer_sets, piece.start, start, padded=needs_padding)
            self.stages[-1].end_prompt(hidden, micro.buffer_sets[-1], piece.start)

    def _piece(self, entering: Any, buffer_sets: Sequence[Buffers], first: int, start: int, *, padded: bool) -> Any:
        """The hidden states after all stages, [B, Q, H], for a piece of the prompts."""
        for stage, buffers in zip(self.stages, buffer_sets, strict=True):
            if stage.index:
                entering = self.streams.move(entering, stage.index)
            entering = stage.prefill(entering, buffers, first, start, padded=padded, layer_of=self.prompt_layer)
        return entering

    def _decode(self, micro: MicroBatch, step: int, *, beside: bool) -> None:
        """Queue one step of a micro-batch on every device."""
        slot = micro.prompt_tokens + step - 1
        arrived = micro.tokens_arrived
        for stage, buffers, steps, reads in zip(self.stages, micro.buffer_sets, micro.steps, micro.reads, strict=True):
            if stage.index:
                before = micro.buffer_sets[stage.index - 1]
                arrived = self.streams.send(
                    stage.index - 1, stage.index, before.hidden_out, buffers.hidden_in, beside=beside
                )
            self.streams.wait(stage.index, arrived)
            steps[next(read for read in reads if read > slot)]()

    def _publish(self, micro: MicroBatch, step: int, sampler: Sampler | None, beside: bool) -> Any:
        """Sample the step's tokens unless decoding is greedy, and send them to the first stage and to the host."""
        last = micro.buffer_sets[-1]
        if sampler is not None:
            sampler.choose(last, step, micro.first, micro.rows)
        if len(self.stages) > 1:
            first = micro.buffer_sets[0].tokens_in
            micro.tokens_arrived = self.streams.send(len(self.stages) - 1, 0, last.tokens_out, first, beside=beside)
        micro.host[step].copy_(last.tokens_out[: micro.rows, 0], non_blocking=True)
        return self.streams.record()

    def _read(
        self, micro: MicroBatch, step: int, arrived: Any, ends: set[int], on_token: Callable[[int], None] | None
    ) -> None:
        if arrived is not None:
            arrived.synchronize()
        micro.times.append(time.perf_counter())
        tokens = micro.host[step].tolist()
        micro.answers.append(tokens)
        if ends:
            micro.open -= {row for row in micro.open if tokens[row] in ends}
        if on_token is not None:
            on_token(tokens[0])

    # ------------------------------------------------------------ score

    def logits(self, token_ids: Sequence[int], keep: int) -> Any:
        """Logits [keep, V] in float32 of the last positions of a sequence, on the last stage's device."""
        torch = self.torch
        buffer_sets = [
            Buffers(stage, 1, len(token_ids), stages.storage_of(stage, len(token_ids))) for stage in self.stages
        ]
        with torch.no_grad(), self.streams.current():
            ids = torch.tensor([list(token_ids)], device=self.stages[0].device)
            kept = [
                self._piece(ids[:, start : start + PREFILL_TOKENS], buffer_sets, 0, start, padded=False)[0]
                for start in range(0, len(token_ids), PREFILL_TOKENS)
            ]
            hidden = torch.cat(kept)[-keep:]
            found = torch.cat([self.stages[-1].scores(part).float() for part in hidden.split(PREFILL_TOKENS // 8)])
        self.streams.synchronize()
        return found

    def decoded_logits(
        self, sequences: Sequence[Sequence[int]], prepared: Prepared, micro: int = 0, read: int | None = None
    ) -> Any:
        """Logits [sequences, V] in float32, on the host, after the last token of each sequence: decoded by the bucket's step that
        reads at least `read` slots, after a prefill of the tokens before."""
        reads = [tuple(own for own in of_stage if own >= (read or 0)) for of_stage in prepared.reads]
        before = [ids[:-1] for ids in sequences]
        made = MicroBatch(prepared.buffer_sets[micro], prepared.steps[micro], reads, 0, before, None)
        last = self.torch.tensor([[ids[-1]] for ids in sequences])
        with self.torch.no_grad(), self.streams.current():
            self._prefill(made)
            made.buffer_sets[0].tokens_in[: len(sequences)].copy_(last)
            made.buffer_sets[-1].logits.zero_()
            self._decode(made, 1, beside=False)
        self.streams.synchronize()
        return made.buffer_sets[-1].logits[: len(sequences)].float().cpu()

    # ------------------------------------------------------------ memory

    def check_fits(self, bucket: Bucket) -> None:
        """Raises Refusal where a stage's device cannot hold the bucket beside the weights."""
        for stage in self.stages:
            held = self.slots * stage.slot_bytes()  # freed before a larger one is allocated
            free = self.free_bytes(stage)
            needed = extra_bytes(stage, bucket)
            if free is not None and needed > free + held:
                raise Refusal(
                    "does-not-fit",
                    f"a batch of {bucket.rows * bucket.micro_batches} x {bucket.length} tokens does not fit on {stage.device}:"
                    f" {needed / 2**30:.2f} GiB beside the weights, {(free + held) / 2**30:.2f} GiB free",
                    "use a smaller batch, a shorter output, a 16-bit dtype or more GPUs",
                )

    def free_bytes(self, stage: Stage) -> int | None:
        """Bytes that can be allocated on the stage's device: free memory, and memory that torch has cached; None on a CPU."""
        if not self.on_gpus:
            return None
        cuda = self.torch.cuda
        free, _ = cuda.mem_get_info(stage.device)
        return int(free + cuda.memory_reserved(stage.device) - cuda.memory_allocated(stage.device))

    def predicted_bytes(self, stage: Stage) -> int:
        """The predicted peak of the largest bucket on the stage's device, weights included."""
        return stage.weights_bytes() + max((extra_bytes(stage, bucket) for bucket in self.prepared), default=0)

    def cache_bytes(self) -> dict[str, tuple[int, int]]:
        """Bytes of keys and values by device: (used by the last batch, reserved)."""
        held: dict[str, tuple[int, int]] = {}
        for stage in self.stages:
            used, reserved = held.get(str(stage.device), (0, 0))
            a_slot = stage.slot_bytes()
            held[str(stage.device)] = (used + a_slot * self.used_slots, reserved + a_slot * self.slots)
        return held


# ---------------------------------------------------------------- sampling


class Sampler:
    """Samples the tokens of a batch, with random numbers that do not depend on the micro-batches."""

    def __init__(self, noise: Noise, vocabulary: int, sequences: int, sampling: Sampling) -> None:
        self.noise = noise
        self.vocabulary = vocabulary
        self.sequences = sequences
        self.sampling = sampling
        self.step = -1
        self.step_noise: Any = None

    def choose(self, buffers: Buffers, step: int, first: int, rows: int) -> None:
        while self.step < step:
            self.step_noise = self.noise.draw_step(self.sequences, self.vocabulary)
            self.step += 1
        noise = self.step_noise[first : first + rows]
        chosen = draw(buffers.logits[:rows], noise, temperature=self.sampling.temperature, top_p=self.sampling.top_p)
        buffers.tokens_out[:rows].copy_(chosen)


def draw(logits: Any, noise: Any, *, temperature: float, top_p: float) -> Any:
    """Token ids [N, 1] from logits [N, V] with temperature and top-p sampling, without waiting for the host.

    `noise` [N, V] is exponential with mean 1: the argmax of probability / noise is a token with its probability (the exponential
    form of the Gumbel-max trick).
    """
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # probability of all likelier tokens: 0 for the first, which always stays
        probabilities = probabilities.scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))
    return (probabilities / noise).argmax(-1, keepdim=True)


class Noise:
    """Exponential noise from a seed, the same for a batch with any number of micro-batches."""

    def __init__(self, device: Any, seed: int) -> None:
        import torch

        self.torch = torch
        self.device = device
        self.generator = torch.Generator(device=device)
        self.generator.manual_seed(seed)

    def draw_step(self, sequences: int, vocabulary: int) -> Any:
        """The noise of the next step, [sequences, vocabulary] in float32."""
        empty = self.torch.empty((sequences, vocabulary), dtype=self.torch.float32, device=self.device)
        return empty.exponential_(generator=self.generator).clamp_(min=self.torch.finfo(self.torch.float32).tiny)
