"""Whether the engines and the GPUs of a partition can run the model: checks of preflight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace

from labctl_orchestrator.models import checkpoint
from labctl_orchestrator.models.architecture import FAMILIES, ITEMSIZE, Shape
from labctl_orchestrator.models.checkpoint import Checkpoint
from labctl_orchestrator.models.fit import DOES_NOT, FITS, GIB, TIGHT
from labctl_orchestrator.models.job_fit import case_of, load_of, smaller
from labctl_orchestrator.preflight.finding import Finding, Subject, doubt, refuse, warn
from labctl_orchestrator.request.plan import FIRST_CAPABILITY_WITH_BFLOAT16
from labctl_slurm import environments
from labctl_slurm.errors import LabctlError, WrongUseError
from labctl_slurm.partitions import Partition
from labctl_workers.engines import foreseen
from labctl_workers.record import JobSpec


def backends(subject: Subject) -> Iterator[Finding]:
    """What an engine refuses of a job, whatever its model is and whichever packages are there."""
    for job in subject.plan.jobs:
        yield from (refuse(refusal.message, refusal.remedy) for refusal in foreseen(job, None, None))


def models(subject: Subject) -> Iterator[Finding]:
    """What an engine would refuse of the model, and what does not fit: from its configuration, without weights."""
    read: dict[tuple[str, str | None, str], Checkpoint | LabctlError] = {}
    for job in subject.plan.jobs:
        partition = subject.partitions[job.partition]
        key = (job.model.source, job.model.revision, job.partition)
        if key not in read:
            read[key] = _read(job, partition)
        found = read[key]
        if isinstance(found, LabctlError):
            yield warn(f"whether {job.model.name} fits is not known: {found.message}", found.remedy)
            continue
        yield from _of_the_configuration(job, partition, found)
        try:
            shape = found.shape
        except WrongUseError as error:
            yield refuse(f"{job.model.name} cannot be loaded: {error.message}", error.remedy)
            continue
        except LabctlError as error:
            yield warn(f"whether {job.model.name} fits is not known: {error.message}", error.remedy)
            continue
        refused = list(foreseen(job, _as_configured(found, shape), None))
        yield from (refuse(refusal.message, refusal.remedy) for refusal in refused)
        yield from _of_the_gpu(job)
        if not refused:
            yield from _of_the_length(job, shape)
        if not refused and job.device == "cuda" and partition.gpu_memory_gib is not None:
            yield from _of_memory(job, partition, found, shape)


# The rotary embeddings of transformers (modeling_rope_utils.py), and those that its models know beside.
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "mrope", "proportional")
# What transformers needs beside itself for weights of a quantization: one of these packages. Source: transformers/quantizers.
QUANTIZERS: Mapping[str, tuple[str, ...]] = {
    "awq": ("gptqmodel", "autoawq"), "gptq": ("gptqmodel", "auto-gptq"), "bitsandbytes": ("bitsandbytes",),
    "bitsandbytes_4bit": ("bitsandbytes",), "bitsandbytes_8bit": ("bitsandbytes",), "aqlm": ("aqlm",), "hqq": ("hqq",),
    "compressed-tensors": ("compressed-tensors",), "quanto": ("optimum-quanto",), "eetq": ("eetq",), "torchao": ("torchao",),
    "fbgemm_fp8": ("fbgemm-gpu",), "quark": ("amd-quark",), "auto-round": ("auto-round",), "vptq": ("vptq",),
}  # fmt: skip
WITHOUT_QUANTIZER = ("fp8", "mxfp4", "spqr", "higgs", "bitnet", "finegrained_fp8")


def _of_the_configuration(job: JobSpec, partition: Partition, found: Checkpoint) -> Iterator[Finding]:
    """What the configuration alone tells that transformers will not load, each with its own remedy; vLLM knows more types."""
    if job.backend == "vllm":
        return
    name, config = job.model.name, found.config
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        kind = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, dict) else None
        if kind is not None and kind not in ROPE_TYPES:
            remedy = f"correct {key} in its config.json: one of {', '.join(ROPE_TYPES)}"
            if kind == "su":
                remedy = f"write longrope for su in {key} of its config.json: it was renamed"
            yield doubt(f"{name} has rotary embeddings of the type {kind!r:.40}, which transformers lacks", remedy)
    quantized = config.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    if isinstance(method, str) and method in QUANTIZERS:
        installed = environments.installed_in(partition, QUANTIZERS[method])
        if installed is not None and not installed.packages:
            package = QUANTIZERS[method][0]
            yield doubt(
                f"{name} is quantized by {method}, and the Python of partition {job.partition!r} has no {package}",
                f"{partition.python} -m pip install {package}; or take the model that is not quantized",
            )
    elif method is not None and method not in WITHOUT_QUANTIZER:
        yield doubt(f"{name} is quantized by {method!r:.40}, which transformers lacks", "take another quantization")
    classes = config.get("auto_map")
    if isinstance(classes, dict) and classes and str(config.get("model_type")) not in FAMILIES:
        yield warn(
            f"{name} brings code of its own (auto_map), which labctl's engines do not run",
            "it loads only where transformers itself knows its model_type",
        )


def _read(job: JobSpec, partition: Partition) -> Checkpoint | LabctlError:
    try:
        return checkpoint.read(job.model, partition)
    except LabctlError as error:
        return error


def _as_configured(found: Checkpoint, shape: Shape) -> SimpleNamespace:
    """What the engines look at of transformers' configuration, with what its classes take for granted."""
    text = found.config.get("text_config")
    told = text if isinstance(text, dict) else found.config
    return SimpleNamespace(
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        max_position_embeddings=shape.max_tokens,
        rope_scaling=told.get("rope_scaling"),
        rope_parameters=told.get("rope_parameters"),
        layer_types=told.get("layer_types"),
    )


def _of_the_gpu(job: JobSpec) -> Iterator[Finding]:
    """bfloat16 before Ampere: vLLM refuses it itself, transformers computes it another way."""
    if job.backend == "vllm" or job.dtype != "bfloat16" or job.device != "cuda" or job.capability is None:
        return
    if float(job.capability) < FIRST_CAPABILITY_WITH_BFLOAT16:
        yield doubt(
            f"{job.gpu or 'the GPU'} of partition {job.partition!r} (compute capability {job.capability}) has no bfloat16: torch"
            " emulates it, slowly, and a row that is called bfloat16 would mean something else there than on an H100",
            "--dtype float16",
        )


def _of_the_length(job: JobSpec, shape: Shape) -> Iterator[Finding]:
    """transformers generates beyond the positions that a model knows, and the worker's vLLM refuses to; how long a prompt is in
    tokens is guessed here, so it is a warning."""
    if shape.max_tokens is None:
        return
    loads = [load_of(job, run, ITEMSIZE[job.dtype]) for run in job.runs]
    longest = max(loads, key=lambda load: load.prompt_tokens + load.new_tokens)
    if longest.prompt_tokens + longest.new_tokens > shape.max_tokens:
        then = "vLLM will refuse it" if job.backend == "vllm" else "what is said beyond them is not the model's"
        yield warn(
            f"prompt and answer of about {longest.prompt_tokens:,} + {longest.new_tokens:,} tokens are longer than the"
            f" {shape.max_tokens:,} positions of {job.model.name}: {then}",
            "a shorter prompt or fewer --max-new-tokens",
        )


def _of_memory(job: JobSpec, partition: Partition, found: Checkpoint, shape: Shape) -> Iterator[Finding]:
    """The worst of the job's runs: they share an engine, and what the largest of them does not get, it does not get."""
    case = case_of(job, partition, found, shape)
    loads = [load_of(job, run, ITEMSIZE[job.dtype]) for run in job.runs]
    worst = max(loads, key=case.needed_bytes)
    verdict = case.verdict(worst)
    if verdict == FITS:
        return
    needed, have = case.needed_bytes(worst) / GIB, case.limits()[1] / GIB
    what = (
        f"{job.model.name} with {job.backend} in {job.dtype}, {worst.batch} x (about {worst.prompt_tokens} + {worst.new_tokens})"
        f" tokens: {needed:.1f} GiB of the fullest of {job.gpus} GPUs, where {have:.1f} GiB can be used on {job.partition!r}"
    )
    if verdict == TIGHT:
        yield warn(f"it is tight: {what}", f"labctl fit {job.model.source} -p {job.partition} shows the sums")
    elif job.backend == "vllm" and case.verdict(replace(worst, batch=1)) != DOES_NOT:
        at_once = max(1, case.largest_batch(worst, TIGHT))
        yield warn(f"about {at_once} of {worst.batch} requests run at once, the others wait: {what}", "")
    else:
        yield doubt(f"it does not fit: {what}", f"{smaller(case, worst)}; --force submits it all the same")
