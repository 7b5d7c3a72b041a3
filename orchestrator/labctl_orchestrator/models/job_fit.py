"""Memory that the runs of a job need, and smaller settings that fit. It estimates tokens."""

from __future__ import annotations

import json
from dataclasses import replace

from labctl_orchestrator.models import checkpoint, fit, resolve
from labctl_orchestrator.models.architecture import ITEMSIZE, Shape
from labctl_orchestrator.models.checkpoint import Checkpoint
from labctl_orchestrator.models.fit import DOES_NOT, FITS, GIB, TIGHT, Case, Draft, Sequences
from labctl_slurm.errors import LabctlError
from labctl_slurm.partitions import Partition
from labctl_workers.engines.lora import rank_of
from labctl_workers.engines.quantization import cache_bytes
from labctl_workers.record import JobSpec, ModelRef, RunSpec
from labctl_workers.workload import arrive_over_time, estimated_sizes


def case_of(job: JobSpec, partition: Partition, found: Checkpoint, shape: Shape, *, online: bool = True) -> Case:
    """Raises LabctlError if the drafting model of speculative decoding is unreadable."""
    parts = found.bytes_of(ITEMSIZE[job.dtype], job.option("quantization", str))
    draft = draft_of(job, partition, online=online)
    return Case(
        shape,
        parts,
        fit.gpus_of(partition, job.gpus),
        job.backend,
        job.option("gpu_memory_utilization", float),
        job.parallel,
        draft,
        0 if job.adapter is None else rank_of(job.adapter),
    )


def draft_of(job: JobSpec, partition: Partition, *, online: bool) -> Draft | None:
    """The drafting model that the option `speculative_config` names; None without one, as for n-grams. Raises LabctlError if its
    configuration is unreadable."""
    name = json.loads(job.option("speculative_config", str) or "{}").get("model")
    if not isinstance(name, str) or name in ("ngram", "[ngram]"):
        return None
    model = checkpoint.named(name) if online or resolve.is_folder(name) else ModelRef(name=name)
    found = checkpoint.read(model, partition, online=online)
    return Draft(found.shape, found.bytes_of(ITEMSIZE[job.dtype]))


def memory_advice(job: JobSpec, run: RunSpec, partition: Partition) -> str:
    """Advice for a run that ran out of GPU memory: settings that fit, or that this run should fit. It does not ask the Hub.

    Raises LabctlError if the model is not on this machine, or the partition has no gpu_memory_gib.
    """
    found = checkpoint.read(job.model, partition, online=False)
    case = case_of(job, partition, found, found.shape, online=False)
    load = load_of(job, run, ITEMSIZE[job.dtype])
    if case.verdict(load) == FITS:
        needed, have = case.needed_bytes(load) / GIB, case.gpus.usable_bytes / GIB
        return f"labctl fit expects {needed:.1f} of {have:.1f} GiB: nvidia-smi on the node shows other users of the GPU"
    return f"by labctl fit: {smaller_settings(case, load)}"


def load_of(job: JobSpec, run: RunSpec, itemsize: int) -> Sequences:
    """The sequences of a run, as long as its longest request; the tokens of texts are an estimate."""
    sizes = estimated_sizes(job, run)
    prompt_tokens = max((size.prompt_tokens for size in sizes), default=1)
    new_tokens = max((size.new_tokens for size in sizes), default=1)
    # A server queues the requests that do not fit.
    at_once = 1 if job.served and (job.backend == "hf" or arrive_over_time(job, run)) else run.batch_size
    options, workload = job.engine_options, run.workload
    prefix = workload.prefix_len if workload is not None and options.get("enable_prefix_caching") else 0
    return Sequences(
        at_once,
        prompt_tokens,
        new_tokens,
        itemsize,
        not run.sampling.greedy,
        cache_bytes(options.get("kv_cache_dtype"), itemsize),
        prefix,
    )


MOST_GPUS_PROPOSED = 16


def smaller_settings(case: Case, load: Sequences) -> str:
    """Settings that would fit, the smallest change first."""
    options = []
    batch = case.largest_batch(load, TIGHT)
    if batch:
        options.append(f"--batch-size {batch} at most")
    else:
        length = case.largest_length(replace(load, batch=1), TIGHT)
        if length > load.prompt_tokens:
            options.append(f"--batch-size 1 and --max-new-tokens {length - load.prompt_tokens} at most")
    if load.itemsize == ITEMSIZE["float32"]:
        options.append("a 16-bit --dtype")
    grows = case.backend != "vllm" or case.parallel in ("tensor", "pipeline")  # a copy or fixed sizes need the same
    for count in range(case.gpus.count + 1, MOST_GPUS_PROPOSED + 1) if grows else ():
        larger = replace(case, gpus=replace(case.gpus, count=count))
        try:
            if larger.verdict(load) != DOES_NOT:
                options.append(f"--gpus {count} (if a node has them)")
                break
        except LabctlError:  # so many GPUs do not divide the heads, or exceed the layers
            continue
    options.append("a partition with more memory, or a smaller model")
    return "; ".join(options)
