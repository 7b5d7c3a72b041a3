"""Memory that the runs of a job need, and smaller settings that fit. It estimates tokens."""

from __future__ import annotations

from dataclasses import replace

from labctl_orchestrator.models import checkpoint, fit
from labctl_orchestrator.models.architecture import ITEMSIZE, Shape
from labctl_orchestrator.models.checkpoint import Checkpoint
from labctl_orchestrator.models.fit import DOES_NOT, FITS, GIB, TIGHT, Case, Sequences
from labctl_slurm.errors import LabctlError
from labctl_slurm.partitions import Partition
from labctl_workers.record import JobSpec, RunSpec
from labctl_workers.workload import estimated_sizes


def case_of(job: JobSpec, partition: Partition, found: Checkpoint, shape: Shape) -> Case:
    parts = found.bytes_of(ITEMSIZE[job.dtype])
    share = job.engine_options.get("gpu_memory_utilization")
    return Case(shape, parts, fit.gpus_of(partition, job.gpus), job.backend, share, job.parallel)


def memory_advice(job: JobSpec, run: RunSpec, partition: Partition) -> str:
    """Advice for a run that ran out of GPU memory: settings that fit, or that this run should fit. It does not ask the Hub.

    Raises LabctlError if the model is not on this machine, or the partition has no gpu_memory_gib.
    """
    found = checkpoint.read(job.model, partition, online=False)
    case, load = case_of(job, partition, found, found.shape), load_of(job, run, ITEMSIZE[job.dtype])
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
    at_once = 1 if job.served and (job.backend == "hf" or run.request_rate is not None) else run.batch_size
    return Sequences(at_once, prompt_tokens, new_tokens, itemsize, not run.sampling.greedy)


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
