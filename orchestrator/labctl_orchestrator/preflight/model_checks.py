"""Preflight checks of a model against engines and GPUs of its partition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from labctl_orchestrator.models import checkpoint
from labctl_orchestrator.models.architecture import FAMILIES, ITEMSIZE, Shape
from labctl_orchestrator.models.checkpoint import Checkpoint
from labctl_orchestrator.models.fit import DOES_NOT, FITS, GIB, TIGHT
from labctl_orchestrator.models.job_fit import case_of, load_of, smaller_settings
from labctl_orchestrator.models.weight_files import header_of
from labctl_orchestrator.preflight.finding import Finding, Subject, doubt, refuse, warn
from labctl_orchestrator.request.plan import FIRST_CAPABILITY_WITH_BFLOAT16
from labctl_slurm import environments
from labctl_slurm.errors import LabctlError, WrongUseError
from labctl_slurm.partitions import Partition
from labctl_workers.engines import foreseen
from labctl_workers.record import JobSpec


def backends(subject: Subject) -> Iterator[Finding]:
    """Refusals of an engine that depend neither on the model nor on installed packages."""
    for job in subject.plan.jobs:
        yield from (refuse(refusal.message, refusal.remedy) for refusal in foreseen(job, None, None))


def models(subject: Subject) -> Iterator[Finding]:
    """Refusals of an engine for the model, and GPU memory: from its configuration, without weights."""
    read: dict[tuple[str, str | None, str], Checkpoint | LabctlError] = {}
    for job in subject.plan.jobs:
        partition = subject.partitions[job.partition]
        key = (job.model.source, job.model.revision, job.partition)
        if key not in read:
            read[key] = _read(job, partition)
        found = read[key]
        if isinstance(found, LabctlError):
            yield warn(f"cannot tell whether {job.model.name} fits: {found.message}", found.remedy)
            continue
        yield from _unsupported(job, partition, found)
        try:
            shape = found.shape
        except WrongUseError as error:
            yield refuse(f"{job.model.name} cannot be loaded: {error.message}", error.remedy)
            continue
        except LabctlError as error:
            yield warn(f"cannot tell whether {job.model.name} fits: {error.message}", error.remedy)
            continue
        refused = list(foreseen(job, as_configured(found, shape), None))
        yield from (refuse(refusal.message, refusal.remedy) for refusal in refused)
        yield from _adapter(job, shape)
        yield from _bfloat16(job)
        if not refused:
            yield from _length(job, shape)
        if not refused and job.device == "cuda" and partition.gpu_memory_gib is not None:
            yield from _memory(job, partition, found, shape)


# Rotary embeddings of transformers: modeling_rope_utils.py, and those of single models.
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "mrope", "proportional")
# Packages for each quantization, of which transformers needs one. Source: transformers/quantizers.
QUANTIZERS: Mapping[str, tuple[str, ...]] = {
    "awq": ("gptqmodel", "autoawq"), "gptq": ("gptqmodel", "auto-gptq"), "bitsandbytes": ("bitsandbytes",),
    "bitsandbytes_4bit": ("bitsandbytes",), "bitsandbytes_8bit": ("bitsandbytes",), "aqlm": ("aqlm",), "hqq": ("hqq",),
    "compressed-tensors": ("compressed-tensors",), "quanto": ("optimum-quanto",), "eetq": ("eetq",), "torchao": ("torchao",),
    "fbgemm_fp8": ("fbgemm-gpu",), "quark": ("amd-quark",), "auto-round": ("auto-round",), "vptq": ("vptq",),
}  # fmt: skip
# transformers/quantizers/quantizer_finegrained_fp8.py
FP8_FROM = 8.9
WITHOUT_QUANTIZER = ("fp8", "mxfp4", "spqr", "higgs", "bitnet", "finegrained_fp8")


def _unsupported(job: JobSpec, partition: Partition, found: Checkpoint) -> Iterator[Finding]:
    """Features in the configuration that transformers cannot load. vLLM supports more."""
    if job.backend == "vllm":
        return
    name, config = job.model.name, found.config
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        kind = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, dict) else None
        if kind is not None and kind not in ROPE_TYPES:
            remedy = f"set {key} in its config.json to one of {', '.join(ROPE_TYPES)}"
            if kind == "su":
                remedy = f"replace su by longrope, its new name, in {key} of its config.json"
            yield doubt(f"rotary embeddings of {name} have type {kind!r:.40}, which transformers lacks", remedy)
    quantized = config.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    if isinstance(method, str) and method in QUANTIZERS:
        installed = environments.installed_in(partition, QUANTIZERS[method])
        if installed is not None and not installed.packages:
            package = QUANTIZERS[method][0]
            pip = f"install it: {partition.python} -m pip install {package}"
            how = pip if partition.image is None else f"use an image with {package}"
            yield doubt(
                f"{name} is quantized with {method}, and the Python of partition {job.partition!r} lacks {package}",
                f"{how}; or use the unquantized model",
            )
    elif method == "fp8" and (job.device == "cpu" or float(job.capability or FP8_FROM) < FP8_FROM):
        where = "on a CPU" if job.device == "cpu" else f"below compute capability {FP8_FROM}"
        yield doubt(f"transformers unpacks the FP8 weights of {name} to bfloat16 {where}", "use the unquantized model")
    elif method is not None and method not in WITHOUT_QUANTIZER:
        yield doubt(f"{name} is quantized with {method!r:.40}, which transformers lacks", "use another quantization")
    classes = config.get("auto_map")
    if isinstance(classes, dict) and classes and str(config.get("model_type")) not in FAMILIES:
        yield warn(
            f"{name} contains Python code (auto_map), which labctl's engines do not run",
            "use a model whose model_type transformers supports",
        )


def _read(job: JobSpec, partition: Partition) -> Checkpoint | LabctlError:
    try:
        return checkpoint.read(job.model, partition)
    except LabctlError as error:
        return error


def as_configured(found: Checkpoint, shape: Shape) -> SimpleNamespace:
    """The fields of transformers' configuration that engines check, with its defaults."""
    text = found.config.get("text_config")
    config = text if isinstance(text, dict) else found.config
    return SimpleNamespace(
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        max_position_embeddings=shape.max_tokens,
        rope_scaling=config.get("rope_scaling"),
        rope_parameters=config.get("rope_parameters"),
        layer_types=config.get("layer_types"),
        quantization_config=found.config.get("quantization_config"),
    )


def _bfloat16(job: JobSpec) -> Iterator[Finding]:
    """bfloat16 on GPUs before Ampere: vLLM refuses it, torch emulates it."""
    if job.backend == "vllm" or job.dtype != "bfloat16" or job.device != "cuda" or job.capability is None:
        return
    if float(job.capability) < FIRST_CAPABILITY_WITH_BFLOAT16:
        yield doubt(
            f"{job.gpu or 'the GPU'} of partition {job.partition!r} (compute capability {job.capability}) lacks bfloat16: torch"
            " emulates it slowly",
            "give --dtype float16",
        )


def _adapter(job: JobSpec, shape: Shape) -> Iterator[Finding]:
    """A LoRA adapter that was made for a model of other dimensions. Another format than safetensors is left to vLLM."""
    file = Path((job.adapter and job.adapter.path) or "") / "adapter_model.safetensors"
    if job.adapter is None or not file.is_file():
        return
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    hidden, wide = shape.hidden, shape.intermediate
    inputs_and_outputs = {
        "q_proj": (hidden, query), "k_proj": (hidden, key), "v_proj": (hidden, key), "o_proj": (query, hidden),
        "gate_proj": (hidden, wide), "up_proj": (hidden, wide), "down_proj": (wide, hidden),
    }  # fmt: skip
    try:
        tensors = header_of(file).tensors
    except (OSError, ValueError) as error:
        yield refuse(f"unreadable adapter: {error}", "copy or download the adapter again")
        return
    for name, tensor in tensors.items():
        path, _, side = name.removesuffix(".weight").rpartition(".")
        module = path.rpartition(".")[2]
        if module not in inputs_and_outputs or side not in ("lora_A", "lora_B") or len(tensor.shape) != 2:
            continue
        has = tensor.shape[1] if side == "lora_A" else tensor.shape[0]
        needs = inputs_and_outputs[module][side == "lora_B"]
        if has != needs:
            yield refuse(
                f"adapter {job.adapter.name} is for a {module} of size {has}: that of {job.model.name} has {needs}",
                "give the model that base_model_name_or_path of its adapter_config.json names",
            )
            return


def _length(job: JobSpec, shape: Shape) -> Iterator[Finding]:
    """Sequences beyond the model's positions: transformers generates them, vLLM refuses them. A warning, because the number of
    prompt tokens is an estimate."""
    if shape.max_tokens is None:
        return
    loads = [load_of(job, run, ITEMSIZE[job.dtype]) for run in job.runs]
    longest = max(loads, key=lambda load: load.prompt_tokens + load.new_tokens)
    if longest.prompt_tokens + longest.new_tokens > shape.max_tokens:
        then = "vLLM will refuse them" if job.backend == "vllm" else "text beyond the limit is meaningless"
        yield warn(
            f"prompt and answer too long for {job.model.name} (about {longest.prompt_tokens:,} + {longest.new_tokens:,} tokens,"
            f" {then}): {shape.max_tokens:,} tokens at most",
            "give a shorter prompt or a lower --max-new-tokens",
        )


def _memory(job: JobSpec, partition: Partition, found: Checkpoint, shape: Shape) -> Iterator[Finding]:
    """Memory of the job's largest run."""
    try:
        case = case_of(job, partition, found, shape)
    except LabctlError as error:
        yield warn(f"cannot tell whether the drafting model fits: {error.message}", error.remedy)
        return
    loads = [load_of(job, run, ITEMSIZE[job.dtype]) for run in job.runs]
    worst = max(loads, key=case.needed_bytes)
    verdict = case.verdict(worst)
    if verdict == FITS:
        return
    needed, have = case.needed_bytes(worst) / GIB, case.limits()[1] / GIB
    what = (
        f"{needed:.1f} of {have:.1f} GiB per GPU on {job.partition!r}: {job.model.name}, {job.backend}, {job.dtype},"
        f" {worst.batch} x about ({worst.prompt_tokens} + {worst.new_tokens}) tokens"
    )
    details = f"labctl fit {job.model.source} -p {job.partition} shows details"
    if verdict == TIGHT:
        yield warn(f"memory is tight: {what}", details)
    elif job.backend == "vllm" and case.verdict(replace(worst, batch=1)) != DOES_NOT:
        at_once = max(1, case.largest_batch(worst, TIGHT))
        yield warn(f"GPU memory for only about {at_once} of {worst.batch} requests at a time: {what}", details)
    else:
        yield doubt(f"not enough GPU memory: {what}", f"{smaller_settings(case, worst)}; --force submits it anyway")
