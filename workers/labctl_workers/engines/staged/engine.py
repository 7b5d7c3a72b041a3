"""The backend `staged`: transformers' modules in pipeline stages, one on each GPU, with captured and compiled steps.

It refuses every model that its checks do not accept; it has no fallback.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from labctl_workers.engines.base import Generated, Request, first_line
from labctl_workers.engines.before_import import set_compile_cache, use_ptxas_of
from labctl_workers.engines.hf import GenerateBatch, TransformersEngine, cut_at_end
from labctl_workers.engines.layers import check_weights_fit, device_map, layers_of, split_of
from labctl_workers.engines.staged import attention, check, pipeline, stages
from labctl_workers.engines.staged.pipeline import Bucket, Pipeline, bucket_of, holds
from labctl_workers.engines.staged.reference import reference_of
from labctl_workers.engines.staged.stages import CHANGING_ROTARY, Unstageable
from labctl_workers.record import EngineFingerprint, JobSpec, Refusal, Sampling, Scalar
from labctl_workers.workload import RunSizes, Size

OTHER_BACKENDS = "use --backend hf or --backend vllm"
NO_GPU = Refusal(
    "no-gpu",
    "backend staged compiles only for GPUs: the device is cpu",
    "add --engine-option compile=false, or use --backend hf",
)


@dataclass
class BucketReport:
    """A prepared shape, and the lengths of the cache that its decode graphs read."""

    micro_batches: int
    rows: int
    length: int
    reads: tuple[int, ...]


@dataclass
class StagesReport:
    """The stages: their layers and buckets, seconds of preparation, errors relative to transformers' own, and predicted bytes by
    device."""

    layers: list[int]
    buckets: list[BucketReport]
    compile_s: float
    capture_s: float
    check_s: float
    error_to_own: dict[str, float]
    predicted_bytes: dict[str, int]
    ahead: int
    slots: int


@dataclass(kw_only=True)
class StagedFingerprint(EngineFingerprint):
    """The fingerprint of backend hf, and that of the stages."""

    compiled: bool
    stages: StagesReport


class StagedEngine(TransformersEngine):
    """transformers' modules in stages. `compile` compiles each step (GPUs only)."""

    OPTIONS: ClassVar[dict[str, type]] = {"attn_implementation": str, "compile": bool}
    DEFAULTS: ClassVar[dict[str, Scalar]] = {"compile": True}
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"attn_implementation": attention.BASES}

    def __init__(self, job: JobSpec, cache: Path) -> None:
        super().__init__(job, cache)
        self.compiled = bool(self.model_options.pop("compile", self.DEFAULTS["compile"]))
        self.pipeline: Pipeline | None = None
        self.checked = check.ErrorRatios()
        self.check_s = 0.0

    @classmethod
    def foreseen(cls, job: JobSpec, config: Any, packages: Mapping[str, str] | None) -> Iterator[Refusal]:
        """See engines.base."""
        yield from super().foreseen(job, config, packages)
        if job.device == "cpu" and job.engine_options.get("compile", cls.DEFAULTS["compile"]):
            yield NO_GPU
        reason = _refused_by(config)
        if reason:
            yield _refusal(reason)

    # ------------------------------------------------------------ load

    def before_import(self) -> None:
        if self.compiled:
            if self.job.device == "cpu":
                raise NO_GPU
            keep_compiled(self.cache)

    def device_map(self, skeleton: Any, tied: bool) -> dict[str, int]:
        placed = device_map(skeleton, self.job.gpus, tied=tied, counts=split_of(skeleton, self.job.gpus))
        free = [int(self.torch.cuda.mem_get_info(gpu)[0]) for gpu in range(self.job.gpus)]
        check_weights_fit(skeleton, placed, getattr(self.torch, self.job.dtype).itemsize, free)
        return placed

    def prepare(self) -> None:
        """Split the model into stages, prepare the shapes of the job's runs, and check the results, before any measurement.

        Raises Refusal where the stages cannot run the model, or compute something else.
        """
        placed = [str(next(layer.parameters()).device) for layer in layers_of(self.model)]
        if self.job.device == "cuda":
            devices = list(dict.fromkeys(placed))
            counts = [placed.count(device) for device in devices]
        else:  # one stage for each requested GPU, all of them on the CPU
            devices = ["cpu"] * max(1, self.job.gpus)
            counts = split_of(self.model, len(devices))
        buckets = needed_buckets(self.sizes(), len(devices))
        try:
            self.pipeline = self._staged(devices, counts, buckets)
        except Unstageable as error:
            raise _refusal(str(error)) from error
        except RuntimeError as error:
            if not self.compiled or isinstance(error, self.torch.OutOfMemoryError):
                raise
            raise Refusal(
                "not-compiled",
                f"cannot compile the steps: {first_line(error)}",
                f"add --engine-option compile=false, or {OTHER_BACKENDS} (full reason: labctl logs)",
            ) from error

    def _staged(self, devices: Sequence[str], counts: Sequence[int], buckets: Sequence[Bucket]) -> Pipeline:
        structure = stages.read_structure(self.model)
        longest = max((bucket.length for bucket in buckets), default=pipeline.SLOTS)
        started = time.perf_counter()
        reference = reference_of(self.model, structure, devices[0], longest)
        self.check_s = time.perf_counter() - started
        stages.use_attention(self.model, compiled=self.compiled)
        _detach(self.model)
        made = Pipeline(stages.build(self.model, structure, devices, counts), compiled=self.compiled)
        made.prepare(_fitting(made, buckets))
        for rows, longest, padded in needed_prompts(self.sizes(), len(devices)):
            made.prepare_prompts(rows, longest, padded=padded)
        started = time.perf_counter()
        self.checked = check.check(made, reference)
        self.check_s += time.perf_counter() - started
        return made

    # ------------------------------------------------------------ generate

    def batches_of(self, sampling: Sampling, ends: set[int]) -> GenerateBatch:
        made = self._ready()
        noise = made.noise(sampling)

        def generate_batch(batch: Sequence[Request], on_token: Callable[[int], None] | None) -> list[Generated]:
            longest = max(len(request.token_ids) for request in batch)
            new_tokens = max(request.max_new_tokens for request in batch)
            prepared = made.ready_for(bucket_of(len(batch), longest, new_tokens, len(made.stages)))
            handed_at = time.perf_counter()
            answers = made.generate(
                prepared,
                batch,
                new_tokens=new_tokens,
                sampling=sampling,
                noise=noise,
                ends=ends,
                on_token=on_token,
            )
            self.kv_cache_bytes = made.cache_bytes()
            return [
                cut_at_end(request, token_ids, times, ends, handed_at=handed_at, prompt_tokens=prompt_tokens)
                for request, (token_ids, times, prompt_tokens) in zip(batch, answers, strict=True)
            ]

        return generate_batch

    def gpus_at_once(self, requests: int) -> int:
        """One for each micro-batch."""
        return bucket_of(requests, 1, 1, len(self._ready().stages)).micro_batches

    def last_logits(self, sequence: list[int], keep: int) -> Any:
        return self._ready().logits(sequence, keep)

    def _ready(self) -> Pipeline:
        if self.pipeline is None:
            raise RuntimeError("the engine is not loaded")
        return self.pipeline

    # ------------------------------------------------------------ the rest

    def fingerprint(self) -> StagedFingerprint:
        made = self._ready()
        return StagedFingerprint(
            **vars(super().fingerprint()),
            compiled=self.compiled,
            stages=StagesReport(
                layers=[len(stage.layers) for stage in made.stages],
                buckets=[
                    BucketReport(b.micro_batches, b.rows, b.length, made.prepared[b].reads[0]) for b in made.prepared
                ],
                compile_s=round(made.compile_s, 3),
                capture_s=round(made.capture_s, 3),
                check_s=round(self.check_s, 3),
                error_to_own={name: round(value, 3) for name, value in vars(self.checked).items()},
                predicted_bytes={str(stage.device): made.predicted_bytes(stage) for stage in made.stages},
                ahead=made.streams.ahead,
                slots=pipeline.SLOTS,
            ),
        )

    def close(self) -> None:
        self.pipeline = None
        super().close()


def _refusal(reason: str) -> Refusal:
    return Refusal("not-stageable", f"backend staged cannot run this model: {reason}", OTHER_BACKENDS)


def _refused_by(config: Any) -> str:
    """The part of a model's configuration that the stages do not support; empty without one."""
    if getattr(config, "quantization_config", None):
        return "its weights are quantized"
    rope = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    kind = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, Mapping) else None
    if kind in CHANGING_ROTARY:
        return f"its rotary embedding is {kind}, which changes with the length"
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - {stages.FULL, stages.SLIDING})
    return f"it has layers of {', '.join(unknown)}" if unknown else ""


def keep_compiled(cache: Path) -> None:
    """Keep compiled code below `cache`, separately for each torch version. Call it before torch is imported."""
    use_ptxas_of("torch")
    set_compile_cache((cache / f"torch-{importlib.metadata.version('torch')}").absolute())


def needed_buckets(sizes: Sequence[RunSizes], stage_count: int) -> list[Bucket]:
    """The buckets of the runs' batches. Of a run with batches of many shapes: those that no other of them can replace."""
    found: dict[Bucket, None] = {}
    for of_run in sizes:
        buckets = {
            bucket_of(rows, max(s.prompt_tokens for s in batch), max(s.new_tokens for s in batch), stage_count)
            for rows, batch in _batches(of_run)
        }
        kept: list[Bucket] = []
        for bucket in sorted(buckets, key=lambda bucket: bucket.slots, reverse=True):
            if of_run.run.workload is None or not any(holds(other, bucket) for other in kept):
                kept.append(bucket)
        found.update(dict.fromkeys(kept))
    return list(found)


def needed_prompts(sizes: Sequence[RunSizes], stage_count: int) -> Iterator[tuple[int, int, bool]]:
    """For each batch of the runs: rows of a micro-batch, tokens of the longest prompt, whether others may be shorter."""
    for of_run in sizes:
        for rows, batch in _batches(of_run):
            lengths = [size.prompt_tokens for size in batch]
            in_a_micro_batch = bucket_of(rows, max(lengths), 1, stage_count).rows
            yield in_a_micro_batch, max(lengths), rows > 1 and len(set(lengths)) > 1


def _batches(of_run: RunSizes) -> Iterator[tuple[int, Sequence[Size]]]:
    """The static batches of a run: how many requests, and which may be in them.

    Prompts in turn: any, since the longest fits all. Requests that arrive over time: any, also in batches of all powers of two
    below the largest.
    """
    size = of_run.run.batch_size
    if of_run.run.workload is not None and not of_run.over_time:
        for first in range(0, len(of_run.sizes), size):
            batch = of_run.sizes[first : first + size]
            yield len(batch), batch
    elif of_run.sizes:
        parts = [2**power for power in range(size.bit_length()) if 2**power < size]
        yield from ((rows, of_run.sizes) for rows in [size, *(parts if of_run.over_time else ())])


def _fitting(made: Pipeline, buckets: Sequence[Bucket]) -> list[Bucket]:
    """The buckets that the GPUs can hold; runs of the others fail when they start."""
    fitting = []
    for bucket in buckets:
        try:
            made.check_fits(bucket)
            fitting.append(bucket)
        except Refusal as refusal:
            print(f"a run will fail: {refusal.message}", flush=True)
    return fitting


def _detach(model: Any) -> None:
    """Remove accelerate's hooks, which move every module's input to its device: the stages do this themselves."""
    if getattr(model, "hf_device_map", None):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(model, recurse=True)
        for module in model.modules():
            # accelerate leaves the class's method as an attribute of the module: it would hide the forward of a merged
            # projection, and make the compiler treat every layer as a different function.
            own = module.__dict__.get("forward")
            if getattr(own, "__func__", None) is type(module).forward:
                del module.__dict__["forward"]
