"""Quantized weights and KV caches: who asks for them, what vLLM's kernels need, and how large they are.

Sources: `get_min_capability` and `get_supported_act_dtypes` of the methods in vllm/model_executor/layers/quantization (vLLM 0.32;
bitsandbytes: 0.11), and of the schemes of compressed-tensors, which are stricter than the method. For Volta also the table
"Supported Hardware" in vLLM's documentation (0.15).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from labctl_workers.record import JobSpec, Refusal

HALF = ("float16", "bfloat16")
ALL = (*HALF, "float32")


@dataclass(frozen=True)
class Kernels:
    """vLLM's kernels of a method: the least compute capability, and the dtypes in which they compute."""

    capability: float
    dtypes: tuple[str, ...] = HALF


KERNELS = {
    "awq": Kernels(7.5),
    "bitsandbytes": Kernels(7.0, ALL),
    "compressed-tensors": Kernels(7.5, ALL),
    "experts_int8": Kernels(8.0),
    "fp8": Kernels(7.5),
    "fp8_per_block": Kernels(7.5),
    "fp8_per_channel": Kernels(7.5),
    "fp8_per_tensor": Kernels(7.5),
    "gptq": Kernels(6.0),
    "gptq_marlin": Kernels(7.5),
    "inc": Kernels(6.0),
    "modelopt": Kernels(8.0),
    "modelopt_fp4": Kernels(7.5),
    "torchao": Kernels(7.5, ALL),
}
INT4_WEIGHTS_WITH_FP8_ACTIVATIONS = 9.0
# Values of the option that read a checkpoint's own method with certain kernels.
READS = {"auto_awq": "awq", "awq_marlin": "awq", "auto_gptq": "gptq", "gptq_marlin": "gptq", "auto-round": "inc"}
ANY_METHOD = ("humming", "inc", "marlin", "moe_wna16")
# These need a checkpoint that is quantized; the others also quantize as they load.
OF_CHECKPOINTS = ("awq", "gptq", "compressed-tensors", "modelopt", "modelopt_fp4", "quark")
# vLLM on GPUs older than that has the attention of Triton alone, which stores no FP8 there (vllm #43914).
FIRST_WITH_FP8_CACHE = 7.5


def method_in(described: Mapping[str, Any] | None) -> str | None:
    """The method in the `quantization_config` of a model's configuration, by vLLM's name."""
    method = described.get("quant_method") if isinstance(described, Mapping) else None
    return READS.get(method, method) if isinstance(method, str) else None


def check_quantization(job: JobSpec, described: Mapping[str, Any] | None) -> None:
    """Raises Refusal where vLLM cannot run the quantization of the checkpoint, or of the job's options, on the job's GPUs or in
    its dtype. `described` is the configuration's `quantization_config`."""
    stored, asked = method_in(described), job.option("quantization", str)
    if asked is not None and stored is None and READS.get(asked, asked) in OF_CHECKPOINTS:
        raise Refusal(
            "not-quantized",
            f"quantization={asked} needs a checkpoint that is quantized so: {job.model.name} is not",
            "remove the option, or quantize as the model loads: --engine-option quantization=fp8_per_tensor",
        )
    if asked is not None and stored is not None and asked not in ANY_METHOD and READS.get(asked, asked) != stored:
        raise Refusal(
            "other-quantization",
            f"quantization={asked}, but {job.model.name} is quantized with {stored}",
            "remove the option: vLLM reads the method from the checkpoint",
        )
    method = asked if asked in KERNELS else stored
    kernels = KERNELS.get(method or "")
    if kernels is None:
        return
    if job.dtype not in kernels.dtypes:
        remedy = f"use --dtype {' or '.join(kernels.dtypes)}"
        raise Refusal("quantization-dtype", f"vLLM does not compute {method} weights in {job.dtype}", remedy)
    least = kernels.capability
    if method == "compressed-tensors" and _int4_with_fp8(described or {}):
        least = INT4_WEIGHTS_WITH_FP8_ACTIVATIONS
    _check_capability(job, f"vLLM's kernels for {method} weights", least, OTHER_WEIGHTS)


def check_cache_dtype(job: JobSpec) -> None:
    """Raises Refusal where the GPUs are too old for the option `kv_cache_dtype`."""
    if (job.option("kv_cache_dtype", str) or "").startswith("fp8"):
        _check_capability(job, "vLLM's FP8 KV cache", FIRST_WITH_FP8_CACHE, "remove kv_cache_dtype")


OTHER_WEIGHTS = "use the unquantized model, or one quantized with GPTQ; or a partition with newer GPUs"


def _check_capability(job: JobSpec, what: str, least: float, remedy: str) -> None:
    if job.device == "cuda" and job.capability is not None and float(job.capability) < least:
        gpu = f"a {job.gpu}" if job.gpu else "the partition's GPU"
        problem = f"{what} need{'' if what.endswith('weights') else 's'} compute capability {least} or later"
        raise Refusal("no-quantization-kernel", f"{problem}: {gpu} has {job.capability}", remedy)


def _int4_with_fp8(described: Mapping[str, Any]) -> bool:
    for group in _groups(described):
        weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
        if (weights.get("num_bits"), weights.get("type"), inputs.get("type")) == (4, "int", "float"):
            return True
    return False


def _groups(described: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = described.get("config_groups")
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []


# ---------------------------------------------------------------- sizes

OPTION_BITS = {
    "bitsandbytes": 4 + 32 / 64, "fp8": 8.0, "fp8_per_block": 8 + 32 / 128**2, "fp8_per_channel": 8.0, "fp8_per_tensor": 8.0,
    "mxfp4": 4 + 8 / 32, "mxfp8": 8 + 8 / 32,
}  # fmt: skip


def bits_of_option(quantization: str | None) -> float | None:
    """Bits of a number in the layers' matrices, with scales, that vLLM quantizes as it loads; None: unknown, or not quantized."""
    return OPTION_BITS.get(quantization or "")


def bits_in(described: Mapping[str, Any] | None) -> float | None:
    """Bits of a number in the quantized matrices, with scales and zero points, by the checkpoint's `quantization_config`; None
    where the method is unknown."""
    method = method_in(described)
    if described is None or method is None:
        return None
    if method in ("awq", "gptq"):
        bits, group = described.get("bits") or described.get("w_bit"), described.get("group_size") or -1
        return None if bits is None else bits + ((16 + bits) / group if group > 0 else 0)
    if method == "bitsandbytes":
        if not described.get("load_in_4bit"):
            return 8.0
        return 4 + (8 / 64 + 32 / (64 * 256) if described.get("bnb_4bit_use_double_quant") else 32 / 64)
    if method == "compressed-tensors":
        weights = [weights for group in _groups(described) if (weights := group.get("weights"))]
        if not weights or not weights[0].get("num_bits"):
            return None
        return float(weights[0]["num_bits"] + 16 / (weights[0].get("group_size") or float("inf")))
    return OPTION_BITS.get(method)


CACHE_BYTES = {"auto": None, "float16": 2, "bfloat16": 2, "float32": 4, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}


def cache_bytes(kv_cache_dtype: object, itemsize: int) -> int:
    """Bytes of a number in vLLM's KV cache, of the model's dtype where the option is not set. Formats with scales beside the
    numbers are not known here: they count as the model's dtype, which is larger."""
    return CACHE_BYTES.get(str(kv_cache_dtype or "auto")) or itemsize
