"""From a loaded model to a pipeline that has been held against it, or the reason why there is none."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labctl_workers.engines import compiled, pipeline, projections, stages
from labctl_workers.engines.installed import assemble_with_that_of, keep_compiled_in
from labctl_workers.engines.pipeline import Bucket, Pipeline, bucket_of
from labctl_workers.engines.stages import Reference, Structure, Unstageable
from labctl_workers.record import COMPILED, EAGER, GRAPHS, STAGES, JobSpec, Refusal

# What is tried where a mode cannot be had.
NEXT = {COMPILED: GRAPHS, GRAPHS: EAGER, STAGES: EAGER}
# How the attention of one token is computed in each mode (attention.DECODE_WITH).
DECODE_WITH = {STAGES: "sdpa", GRAPHS: "sdpa", COMPILED: "reduce"}


@dataclass
class Outcome:
    """The mode that runs, its pipeline (None: eager), and why it is not the mode that was asked for ("": it is)."""

    mode: str
    pipeline: Pipeline | None
    reason: str = ""


def keep_compiled(cache: Path) -> None:
    """Keep what is compiled below `cache`, apart for each torch version. To be called before torch is imported."""
    assemble_with_that_of("torch")
    keep_compiled_in((cache / f"torch-{importlib.metadata.version('torch')}-{compiled.FORM}").absolute())


def stage(model: Any, mode: str, devices: Sequence[str], counts: Sequence[int], buckets: Sequence[Bucket]) -> Outcome:
    """Cut the loaded model into stages and make the buckets ready; falls back, with the reason, where that cannot be.

    The model's own forward works again where the outcome is eager, else it is not to be used. A bucket that no GPU can hold
    is left out: its run is refused when its turn comes.
    """
    asked = mode
    reasons: list[str] = []
    try:
        structure = stages.read_structure(model)
        if len(structure.layers) < len(devices):
            raise Unstageable(f"{len(structure.layers)} layers cannot be split over {len(devices)} stages")
        reference = stages.reference_of(model, structure, devices[0])
        own = model.config._attn_implementation
        stages.use_attention(model, DECODE_WITH[mode])
    except Unstageable as error:
        return _told(Outcome(EAGER, None, str(error)), asked)
    _detach(model)
    made: Pipeline | None = None
    try:
        built = stages.build(model, structure, devices, counts)
        while mode != EAGER:
            try:
                made = Pipeline(built, mode)
                _check(made, reference)
                _prepare(made, buckets, reference)
                return _told(Outcome(mode, made, "; ".join(reasons)), asked)
            except Unstageable as error:
                reasons.append(f"{mode}: {error}")
                mode = EAGER
            except Exception as error:
                if not isinstance(error, RuntimeError) or _is_out_of_memory(error):
                    raise
                reasons.append(f"{mode}: {_first_line(error)}")
                mode = NEXT[mode]
            made = None
            if mode != EAGER:
                model.config._attn_implementation = own
                stages.use_attention(model, DECODE_WITH[mode])
    finally:
        if made is None:
            _restore(model, structure, own)
    return _told(Outcome(EAGER, None, "; ".join(reasons)), asked)


def _told(outcome: Outcome, asked: str) -> Outcome:
    if outcome.mode != asked:
        print(f"mode {asked} is not possible, {outcome.mode} runs: {outcome.reason}", file=sys.stderr, flush=True)
    return outcome


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"


def _detach(model: Any) -> None:
    """Take off accelerate's hooks, which move every module's input to its device: stages bring it there themselves."""
    if getattr(model, "hf_device_map", None):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(model, recurse=True)
        for module in model.modules():
            # What is left is the class's own method, but as the module's own attribute: it would hide a merged projection's,
            # and make every layer a function of its own to a compiler.
            own = module.__dict__.get("forward")
            if getattr(own, "__func__", None) is type(module).forward:
                del module.__dict__["forward"]


def _restore(model: Any, structure: Structure, attention: str) -> None:
    model.config._attn_implementation = attention
    for layer in structure.layers:
        projections.unmerge(layer)
    placed = getattr(model, "hf_device_map", None)
    if placed and len(set(placed.values())) > 1:
        from accelerate import dispatch_model

        dispatch_model(model, device_map=placed)


# ---------------------------------------------------------------- held against the model


def _check(made: Pipeline, reference: Reference) -> None:
    """Raises Unstageable where the stages do not give the model's own logits: of a prompt, and of a decoded token."""
    tolerance = _tolerance(made)
    for what, own, expected in (
        ("of a prompt", made.logits(reference.token_ids, len(reference.token_ids)).cpu(), reference.logits),
        ("after a decoded token", made.decoded_logits(reference.token_ids), reference.logits[-1]),
    ):
        found = stages.difference(own, expected)
        if not found <= tolerance:
            raise Unstageable(f"its logits {what} differ from the model's own by {found:.2g} (at most {tolerance:g})")


def _tolerance(made: Pipeline) -> float:
    return stages.TOLERANCE[str(made.stages[0].dtype).removeprefix("torch.")]


def _prepare(made: Pipeline, buckets: Sequence[Bucket], reference: Reference) -> None:
    possible = []
    for bucket in buckets:
        try:
            made.check_fits(bucket)
            possible.append(bucket)
        except Refusal as refusal:
            print(f"{refusal.message}: the run will be refused", file=sys.stderr, flush=True)
    made.prepare(possible)
    if made.mode == STAGES:
        return
    tolerance = _tolerance(made)
    for bucket, prepared in made.prepared.items():
        ids = reference.token_ids[: bucket.length]
        expected = made.decoded_logits(ids)
        for micro in range(bucket.micro_batches):
            found = stages.difference(made.decoded_logits(ids, prepared, micro), expected)
            if not found <= tolerance:
                raise Unstageable(f"a captured step differs from the plain one by {found:.2g} ({bucket})")


# ---------------------------------------------------------------- what will be needed


def foreseen(job: JobSpec, stage_count: int, longest_prompts: Mapping[str, int]) -> list[Bucket]:
    """The buckets of the job's runs; `longest_prompts` are in tokens, by prompt set. Where requests come at a
    rate, a batch may be any part of the largest."""
    found: dict[Bucket, None] = {}
    for run in job.runs:
        longest = longest_prompts[run.prompt_set]
        sizes = [run.batch_size]
        if run.request_rate is not None:
            sizes += [2**power for power in range(run.batch_size.bit_length()) if 2**power < run.batch_size]
        found.update(dict.fromkeys(bucket_of(size, longest, run.max_new_tokens, stage_count) for size in sizes))
    return list(found)


def told(outcome: Outcome, asked: str) -> dict[str, Any]:
    """What a record says of the mode: which ran, which was asked for and why they differ; where the layers lie, what was
    made ready, how long that took, and the memory that was foreseen."""
    said: dict[str, Any] = {"mode": outcome.mode, "mode_asked": asked}
    if outcome.reason:
        said["mode_reason"] = outcome.reason
    made = outcome.pipeline
    if made is not None:
        said["stages"] = {
            "layers": [len(stage.layers) for stage in made.stages],
            "buckets": [
                {
                    "micro_batches": b.micro_batches,
                    "rows": b.rows,
                    "length": b.length,
                    "reads": made.prepared[b].reads[0],
                }
                for b in made.prepared
            ],
            "compile_s": round(made.compile_s, 3),
            "capture_s": round(made.capture_s, 3),
            "predicted_bytes": {str(stage.device): made.predicted_bytes(stage) for stage in made.stages},
            "ahead": made.lanes.ahead,
            "slots": pipeline.SLOTS,
        }
    return said
