"""Batches through the stages: micro-batches in flight, captured graphs, and tokens that come to the host without a wait.

The host runs ahead of the devices: it queues each step of each micro-batch, and waits only for tokens some steps back, so a
token's clock reading is taken when it arrives while the devices have work. What a device computes in a step is a graph that
was captured before the clock started; between devices go copies that events order.
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
from labctl_workers.engines.staged.sampling import Noise, draw
from labctl_workers.engines.staged.stages import Functions, Room, Stage, Storage
from labctl_workers.record import Refusal, Sampling

# Cache lengths are rounded up to this many slots, so that runs of nearly one length share their graphs.
SLOTS = 32
# Steps that the host may be ahead of the last token it has seen: enough to hide its own work, and all that an end wastes.
AHEAD = 2
# Prompt tokens that go through a stage at once: bounds the memory of activations.
PREFILL_TOKENS = 8192
# A shorter cache has a graph of its own where it spares this share of the bytes of a step, or this one if it is compiled.
WORTH_A_GRAPH = 0.1
WORTH_COMPILING = 0.25
WARM_UPS = 2
SHORT_PROMPT = 8


# ---------------------------------------------------------------- shapes


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape that a batch is run in: micro-batches of `rows` sequences each, and a cache of `length` slots."""

    length: int
    rows: int
    micro_batches: int

    @property
    def slots(self) -> int:
        return self.length * self.rows * self.micro_batches


def bucket_of(requests: int, prompt_tokens: int, new_tokens: int, stage_count: int) -> Bucket:
    """The bucket that just holds a batch: the last token chosen is never looked back at, so it needs no slot."""
    micro_batches = stage_count if requests >= 2 * stage_count else 1
    length = -(-(prompt_tokens + new_tokens - 1) // SLOTS) * SLOTS
    return Bucket(length, -(-requests // micro_batches), micro_batches)


def holds(bucket: Bucket, needed: Bucket) -> bool:
    """Whether a batch that needs one bucket can be run in another; padding costs, so at most twice its rows."""
    return (
        bucket.micro_batches == needed.micro_batches
        and needed.rows <= bucket.rows <= 2 * needed.rows
        and needed.length <= bucket.length <= 2 * needed.length
    )


def reads_of(length: int, bytes_of_a_slot: int, weights: int, worth: float) -> tuple[int, ...]:
    """How many of a cache's slots a step may read, ascending: all, and each half of it that spares a `worth` share.

    `bytes_of_a_slot` are those of all sequences of a micro-batch, `weights` the bytes that every step reads.
    """
    reads = [length]
    while reads[-1] > 2 * SLOTS:
        half = -(-reads[-1] // 2 // SLOTS) * SLOTS
        if (reads[-1] - half) * bytes_of_a_slot < worth * (weights + reads[-1] * bytes_of_a_slot):
            break
        reads.append(half)
    return tuple(reversed(reads))


def pieces_of(rows: int, longest: int) -> list[range]:
    """The rows that go through a stage together, of prompts of `longest` tokens: as many as bound the memory of activations."""
    together = max(1, PREFILL_TOKENS // longest)
    return [range(first, min(first + together, rows)) for first in range(0, rows, together)]


def extra_bytes(stage: Stage, bucket: Bucket) -> int:
    """What a batch takes at most on a stage's device beside the weights: its prompts may be as long as the bucket."""
    widest = max(
        (module.out_features for module in stage.layers[0].modules() if hasattr(module, "out_features")), default=0
    )
    return bucket.slots * stage.cache_bytes_of_a_slot() + bytes_beside_cache(
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
    """The activations of a piece of the prompts, of `tokens` in all (hidden states and their norms, what the widest
    projections give, the mask over `read` slots), and logits with what is made of them (`vocabulary` 0: no head here)."""
    activations = tokens * (6 * hidden + 4 * widest) * itemsize
    mask = tokens * read * (itemsize + 2)
    logits = sequences * vocabulary * (itemsize + 5 * 4)
    return activations + mask + logits


# ---------------------------------------------------------------- devices


class HostLanes:
    """Stages on the CPU: everything happens in the order in which it is called."""

    ahead = 0

    def __init__(self, found: Sequence[Stage]) -> None:
        self.torch = found[0].torch

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        yield

    def hop(self, source: int, target: int, tensor: Any, into: Any, *, beside: bool) -> Any:
        into.copy_(tensor)

    def wait(self, target: int, arrived: Any) -> None:
        """What hopped is there."""

    def move(self, tensor: Any, target: int) -> Any:
        return tensor

    def host_buffer(self, *shape: int) -> Any:
        return self.torch.zeros(shape, dtype=self.torch.int64)

    def mark(self) -> Any:
        return None

    def synchronize(self) -> None:
        """Nothing is pending."""


class CudaLanes:
    """Stages on GPUs: a stream for the work of each, and one each way for what crosses while others work."""

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
        """Each device's work stream is its current one, after all that was queued on its default stream."""
        cuda = self.torch.cuda
        with contextlib.ExitStack() as stack:
            for device, stream in zip(self.devices, self.work, strict=True):
                stream.wait_stream(cuda.default_stream(device))
                stack.enter_context(cuda.stream(stream))
            yield

    def hop(self, source: int, target: int, tensor: Any, into: Any, *, beside: bool) -> Any:
        """Copy to another stage's device; `wait` makes its work wait for what is returned.

        torch orders a copy after what both devices' current streams hold; `beside` other micro-batches' work, streams of their
        own keep the devices from waiting for each other. The wait is apart, since between a token's way back and the step that
        needs it the device has the other micro-batches' steps to do."""
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

    def mark(self) -> Any:
        """An event after all that the last stage's device has been given."""
        event = self.torch.cuda.Event()
        event.record(self.work[-1])
        return event

    def synchronize(self) -> None:
        for device in self.devices:
            self.torch.cuda.synchronize(device)

    def capture(self, stage: int, step: Callable[[], None]) -> Any:
        """A graph of what `step` does on the stage's device. The stream is given: torch's own one for captures is on the
        first device, where nothing of another stage would be captured, and an empty graph is the fastest of all."""
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


# ---------------------------------------------------------------- rooms and graphs


@dataclass
class Prepared:
    """A bucket made ready: rooms by micro-batch and stage; what a step reads at most; the step of each, by the same."""

    bucket: Bucket
    rooms: list[list[Room]]
    reads: list[tuple[int, ...]]
    steps: list[list[dict[int, Callable[[], Any]]]] = field(default_factory=list)


@dataclass(eq=False)
class MicroBatch:
    """Some sequences of a batch: `first` is the place of their first in it. `open` are those that have not ended."""

    rooms: list[Room]
    steps: list[dict[int, Callable[[], Any]]]
    reads: list[tuple[int, ...]]
    first: int
    token_ids: list[Sequence[int]]
    host: Any
    prompt_tokens: int = 0
    tokens_arrived: Any = None  # what the first stage's next step has to wait for
    open: set[int] = field(default_factory=set)
    answers: list[list[int]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.token_ids)


class Pipeline:
    """The stages of a model, ready to generate. On GPUs each step is a captured graph, of compiled functions if `compiled`."""

    def __init__(self, found: Sequence[Stage], *, compiled: bool) -> None:
        self.stages = list(found)
        self.torch = found[0].torch
        self.compiled = compiled
        self.on_gpus = found[0].device.type == "cuda"
        self.lanes: Any = CudaLanes(found) if self.on_gpus else HostLanes(found)
        self.functions = compiling.functions() if compiled else Functions()
        self.prepared: dict[Bucket, Prepared] = {}
        self.prompts: set[tuple[int, bool]] = set()  # what is compiled: for one row or several, with a mask or without
        self.storage: list[Storage] = []
        self.slots = 0
        self.capture_s = 0.0
        self.compile_s = 0.0
        self.used_slots = 0  # of the last batch, all sequences together

    # ------------------------------------------------------------ make ready

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Make rooms for these buckets, and capture their steps. Buckets share their memory: one is in use at a time.

        Raises Refusal, with the figures, before anything is allocated where a GPU cannot hold one.
        """
        wanted = [bucket for bucket in dict.fromkeys(buckets) if bucket not in self.prepared]
        for bucket in wanted:
            self.check_fits(bucket)
        slots = max((bucket.slots for bucket in wanted), default=0)
        if slots > self.slots:  # graphs hold on to the places of the old memory
            wanted = [*self.prepared, *wanted]
            self.prepared, self.storage = {}, []
            self.storage = [stages.storage_of(stage, slots) for stage in self.stages]
            self.slots = slots
        for bucket in wanted:
            self.prepared[bucket] = self._prepare(bucket)
        self.lanes.synchronize()

    def _prepare(self, bucket: Bucket) -> Prepared:
        rooms = [
            [Room(stage, bucket.rows, bucket.length, storage, micro * bucket.rows) for stage, storage in self._stored()]
            for micro in range(bucket.micro_batches)
        ]
        reads = [
            reads_of(
                bucket.length,
                stage.cache_bytes_of_a_slot() * bucket.rows,
                stage.weights_bytes(),
                WORTH_COMPILING if self.compiled else WORTH_A_GRAPH,
            )
            for stage in self.stages
        ]
        made = Prepared(bucket, rooms, reads)
        with self.torch.no_grad():
            if self.compiled:
                self._compile(made)
            started = time.perf_counter()
            for of_micro in rooms:
                steps = zip(self.stages, of_micro, reads, strict=True)
                made.steps.append([{read: self._step(stage, room, read) for read in of} for stage, room, of in steps])
            self.capture_s += time.perf_counter() - started
        return made

    def _stored(self) -> Iterator[tuple[Stage, Storage]]:
        return zip(self.stages, self.storage, strict=True)

    def _step(self, stage: Stage, room: Room, read: int) -> Callable[[], Any]:
        def step() -> None:
            stage.step(room, read, self.functions)

        if not self.on_gpus:
            return step
        replay: Callable[[], Any] = self.lanes.capture(stage.index, step).replay
        return replay

    def _compile(self, made: Prepared) -> None:
        """Run each stage once, which compiles its parts for the shapes of the bucket."""
        started = time.perf_counter()
        with self.lanes.current():
            for stage, room, reads in zip(self.stages, made.rooms[0], made.reads, strict=True):
                for read in reads:
                    stage.step(room, read, self.functions)
                room.slot.zero_()
        self.lanes.synchronize()
        self.compile_s += time.perf_counter() - started

    def prepare_prompts(self, rows: int, longest: int, *, padded: bool) -> None:
        """Compile what takes up prompts in micro-batches of `rows` sequences, of `longest` tokens at most. One compiled layer
        serves any number of tokens, and any number of rows but one."""
        masked = {
            stage.needs_mask(kind, start, min(longest, start + PREFILL_TOKENS), padded=padded)
            for stage in self.stages
            for kind in stage.types
            for start in range(0, longest, PREFILL_TOKENS)
        }
        wanted = {(min(2, len(piece)), one) for piece in pieces_of(rows, longest) for one in masked} - self.prompts
        if not self.compiled or not wanted:
            return
        started = time.perf_counter()
        self.prompts |= wanted
        with self.torch.no_grad(), self.lanes.current():
            for count, with_mask in sorted(wanted):
                rooms = [Room(stage, count, SLOTS, stages.storage_of(stage, count * SLOTS)) for stage in self.stages]
                ids = self.torch.zeros((count, SHORT_PROMPT), dtype=self.torch.int64, device=self.stages[0].device)
                self._piece(ids, rooms, 0, 0, padded=with_mask)
        self.lanes.synchronize()
        self.compile_s += time.perf_counter() - started

    def prompt_layer(self, rows: int, *, masked: bool) -> Callable[..., Any]:
        """What computes a layer for prompts: compiled where it was made ready."""
        ready = (min(2, rows), masked) in self.prompts
        return self.functions.prompt_layer if ready else self.stages[0].plain.prompt_layer

    def ready_for(self, needed: Bucket) -> Prepared:
        """A bucket that holds the batch; made now, where none was foreseen."""
        fitting = [bucket for bucket in self.prepared if holds(bucket, needed)]
        if not fitting:
            self.prepare([needed])
            fitting = [needed]
        return self.prepared[min(fitting, key=lambda bucket: bucket.slots)]

    # ------------------------------------------------------------ generate

    def noise(self, sampling: Sampling) -> Noise | None:
        """The random numbers of a pass: its batches draw from them one after another. None where nothing is drawn."""
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
    ) -> list[tuple[list[int], list[float]]]:
        """Token ids and clock readings of each request, `new_tokens` of them or up to some steps after every one's end.

        `noise` is what sampled tokens are drawn from; None: greedy.
        """
        micro_batches = self._micro_batches(prepared, batch, new_tokens)
        sampler = None if noise is None else Sampler(noise, self.stages[-1].vocabulary, len(batch), sampling)
        pending: deque[tuple[MicroBatch, int, Any]] = deque()
        limit = self.lanes.ahead * len(micro_batches)

        def read(until: int) -> None:
            """Take up the tokens that have come, and wait until no more than `until` are on their way."""
            while pending and (len(pending) > until or pending[0][2].query()):
                micro, step, arrived = pending.popleft()
                self._read(micro, step, arrived, ends, on_token if micro.first == 0 else None)

        with self.torch.no_grad(), self.lanes.current():
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
        self.lanes.synchronize()
        self.used_slots = sum(m.rows * (m.prompt_tokens + len(m.times) - 1) for m in micro_batches)
        return [
            ([tokens[row] for tokens in micro.answers], micro.times)
            for micro in micro_batches
            for row in range(micro.rows)
        ]

    def _micro_batches(self, prepared: Prepared, batch: Sequence[Request], new_tokens: int) -> list[MicroBatch]:
        rows = -(-len(batch) // prepared.bucket.micro_batches)
        found = []
        for rooms, steps, first in zip(prepared.rooms, prepared.steps, range(0, len(batch), rows), strict=False):
            token_ids = [request.token_ids for request in batch[first : first + rows]]
            host = self.lanes.host_buffer(new_tokens, len(token_ids))
            made = MicroBatch(rooms, steps, prepared.reads, first, list(token_ids), host)
            made.open = set(range(made.rows))
            found.append(made)
        return found

    def _prefill(self, micro: MicroBatch) -> None:
        """Take up the prompts, padded to the left to one length, in pieces that bound the memory of activations: some rows
        with their whole prompts, or parts of a longer one."""
        torch = self.torch
        longest = max(map(len, micro.token_ids))
        rows = micro.rooms[0].rows
        # Rows beyond those asked for repeat the last one: as much a sequence as any.
        prompts = [micro.token_ids[min(row, micro.rows - 1)] for row in range(rows)]
        pad = torch.tensor([longest - len(ids) for ids in prompts])
        padded = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompts])
        for room in micro.rooms:
            room.pad.copy_(pad)
            room.slot.fill_(longest)
        micro.prompt_tokens = longest
        token_ids = padded.to(self.stages[0].device)
        needs_padding = any(len(ids) < longest for ids in prompts)
        for piece in pieces_of(rows, longest):
            for start in range(0, longest, PREFILL_TOKENS):
                entering = token_ids[piece.start : piece.stop, start : start + PREFILL_TOKENS]
                hidden = self._piece(entering, micro.rooms, piece.start, start, padded=needs_padding)
            self.stages[-1].end_prompt(hidden, micro.rooms[-1], piece.start)

    def _piece(self, entering: Any, rooms: Sequence[Room], first: int, start: int, *, padded: bool) -> Any:
        """The hidden state after all stages, [B, Q, H], of a piece of the prompts of some rows."""
        for stage, room in zip(self.stages, rooms, strict=True):
            if stage.index:
                entering = self.lanes.move(entering, stage.index)
            entering = stage.prefill(entering, room, first, start, padded=padded, layer_of=self.prompt_layer)
        return entering

    def _decode(self, micro: MicroBatch, step: int, *, beside: bool) -> None:
        """Queue one step of a micro-batch on every device."""
        slot = micro.prompt_tokens + step - 1
        arrived = micro.tokens_arrived
        for stage, room, steps, reads in zip(self.stages, micro.rooms, micro.steps, micro.reads, strict=True):
            if stage.index:
                before = micro.rooms[stage.index - 1]
                arrived = self.lanes.hop(stage.index - 1, stage.index, before.hidden_out, room.hidden_in, beside=beside)
            self.lanes.wait(stage.index, arrived)
            steps[next(read for read in reads if read > slot)]()

    def _publish(self, micro: MicroBatch, step: int, sampler: Sampler | None, beside: bool) -> Any:
        """Choose the step's tokens where they are sampled, send them to the first stage and to the host."""
        last = micro.rooms[-1]
        if sampler is not None:
            sampler.choose(last, step, micro.first, micro.rows)
        if len(self.stages) > 1:
            first = micro.rooms[0].tokens_in
            micro.tokens_arrived = self.lanes.hop(len(self.stages) - 1, 0, last.tokens_out, first, beside=beside)
        micro.host[step].copy_(last.tokens_out[: micro.rows, 0], non_blocking=True)
        return self.lanes.mark()

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
        """Logits [keep, V] in float32 of the last positions of one sequence, on the last stage's device."""
        torch = self.torch
        rooms = [Room(stage, 1, len(token_ids), stages.storage_of(stage, len(token_ids))) for stage in self.stages]
        with torch.no_grad(), self.lanes.current():
            ids = torch.tensor([list(token_ids)], device=self.stages[0].device)
            kept = [
                self._piece(ids[:, start : start + PREFILL_TOKENS], rooms, 0, start, padded=False)[0]
                for start in range(0, len(token_ids), PREFILL_TOKENS)
            ]
            hidden = torch.cat(kept)[-keep:]
            found = torch.cat([self.stages[-1].scores(part).float() for part in hidden.split(PREFILL_TOKENS // 8)])
        self.lanes.synchronize()
        return found

    def decoded_logits(
        self, sequences: Sequence[Sequence[int]], prepared: Prepared, micro: int = 0, read: int | None = None
    ) -> Any:
        """Logits [sequences, V] in float32, on the host, after the last token of each, which is decoded after the others were
        taken up, as a step of the bucket computes them that reads at least `read` slots of the cache."""
        reads = [tuple(own for own in of_stage if own >= (read or 0)) for of_stage in prepared.reads]
        before = [ids[:-1] for ids in sequences]
        made = MicroBatch(prepared.rooms[micro], prepared.steps[micro], reads, 0, before, None)
        last = self.torch.tensor([[ids[-1]] for ids in sequences])
        with self.torch.no_grad(), self.lanes.current():
            self._prefill(made)
            made.rooms[0].tokens_in[: len(sequences)].copy_(last)
            made.rooms[-1].logits.zero_()
            self._decode(made, 1, beside=False)
        self.lanes.synchronize()
        return made.rooms[-1].logits[: len(sequences)].float().cpu()

    # ------------------------------------------------------------ memory

    def check_fits(self, bucket: Bucket) -> None:
        """Raises Refusal where a stage's device cannot hold what the bucket takes beside the weights."""
        for stage in self.stages:
            held = self.slots * stage.cache_bytes_of_a_slot()  # given back before a larger one is made
            free = self.free_bytes(stage)
            needed = extra_bytes(stage, bucket)
            if free is not None and needed > free + held:
                raise Refusal(
                    "does-not-fit",
                    f"{stage.device}: a batch of {bucket.rows * bucket.micro_batches} with {bucket.length} tokens each needs"
                    f" {needed / 2**30:.2f} GiB beside the weights, {(free + held) / 2**30:.2f} GiB are free",
                    "take a smaller batch, a shorter output, a 16-bit dtype, or more GPUs",
                )

    def free_bytes(self, stage: Stage) -> int | None:
        """What can be allocated on the stage's device: what the driver has, and what torch holds unused."""
        if not self.on_gpus:
            return None
        cuda = self.torch.cuda
        free, _ = cuda.mem_get_info(stage.device)
        return int(free + cuda.memory_reserved(stage.device) - cuda.memory_allocated(stage.device))

    def predicted_bytes(self, stage: Stage) -> int:
        """The peak that the largest bucket will come to on the stage's device, weights included."""
        return stage.weights_bytes() + max((extra_bytes(stage, bucket) for bucket in self.prepared), default=0)

    def cache_bytes(self) -> dict[str, tuple[int, int]]:
        """By device: bytes of keys and values that the last batch used, and that are held for them."""
        held: dict[str, tuple[int, int]] = {}
        for stage in self.stages:
            used, reserved = held.get(str(stage.device), (0, 0))
            a_slot = stage.cache_bytes_of_a_slot()
            held[str(stage.device)] = (used + a_slot * self.used_slots, reserved + a_slot * self.slots)
        return held


class Sampler:
    """Draws the tokens of a batch: the random numbers of a step are the whole batch's, whichever micro-batch comes first."""

    def __init__(self, noise: Noise, vocabulary: int, sequences: int, sampling: Sampling) -> None:
        self.noise = noise
        self.vocabulary = vocabulary
        self.sequences = sequences
        self.sampling = sampling
        self.step = -1
        self.of_the_step: Any = None

    def choose(self, room: Room, step: int, first: int, rows: int) -> None:
        while self.step < step:
            self.of_the_step = self.noise.of_a_step(self.sequences, self.vocabulary)
            self.step += 1
        noise = self.of_the_step[first : first + rows]
        chosen = draw(room.logits[:rows], noise, temperature=self.sampling.temperature, top_p=self.sampling.top_p)
        room.tokens_out[:rows].copy_(chosen)
