"""Quantized forms of a checkpoint in the layouts that vLLM reads, rounded to the nearest without calibration.

    python -m tests.quantized SOURCE FORMAT FOLDER        (needs torch and safetensors)

The tools that make such checkpoints (GPTQModel, AutoAWQ, LLM Compressor) choose better roundings; names, shapes and dtypes of
their tensors are these.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

GROUP = 64
NIBBLES = 8  # 4-bit values in an int32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns in the nibbles of an int32, the lowest first


def _grouped(weight: Any) -> Any:
    """[outputs, inputs] as float32 [groups, GROUP, outputs]."""
    return weight.float().t().reshape(-1, GROUP, weight.shape[0])


def _packed(values: Any, dim: int) -> Any:
    """4-bit values along `dim`, eight to an int32."""
    import torch

    split = values.to(torch.int64).unflatten(dim, (-1, NIBBLES)).movedim(dim + 1, -1)
    words = (split << (4 * torch.arange(NIBBLES))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _gptq(name: str, weight: Any) -> dict[str, Any]:
    import torch

    groups = _grouped(weight)
    scales = (groups.abs().amax(1) / 7).clamp(min=1e-6).to(torch.float16)
    values = (groups / scales.float()[:, None]).round().clamp(-8, 7).flatten(0, 1) + 8
    return {
        f"{name}.qweight": _packed(values, 0),
        f"{name}.scales": scales,
        f"{name}.qzeros": _packed(torch.full(scales.shape, 7), 1),  # the format stores the zero less one
        f"{name}.g_idx": (torch.arange(weight.shape[1]) // GROUP).to(torch.int32),
    }


def _awq(name: str, weight: Any) -> dict[str, Any]:
    import torch

    groups = _grouped(weight)
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-6).to(torch.float16)
    zeros = (-low / scales.float()).round().clamp(0, 15)
    values = ((groups / scales.float()[:, None]).round() + zeros[:, None]).clamp(0, 15).flatten(0, 1)

    def ordered(matrix: Any) -> Any:
        return matrix.unflatten(1, (-1, NIBBLES))[:, :, AWQ_ORDER].flatten(1)

    return {
        f"{name}.qweight": _packed(ordered(values), 1),
        f"{name}.scales": scales,
        f"{name}.qzeros": _packed(ordered(zeros), 1),
    }


def _int8(name: str, weight: Any) -> dict[str, Any]:
    import torch

    scale = (weight.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-6)
    values = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
    return {f"{name}.weight": values, f"{name}.weight_scale": scale.to(torch.bfloat16)}


def _fp8(name: str, weight: Any) -> dict[str, Any]:
    import torch

    scale = (weight.float().abs().amax() / torch.finfo(torch.float8_e4m3fn).max).clamp(min=1e-9)
    return {f"{name}.weight": (weight.float() / scale).to(torch.float8_e4m3fn), f"{name}.weight_scale": scale}


def _int8_config(activations: bool) -> dict[str, Any]:
    shared = {"num_bits": 8, "type": "int", "symmetric": True}
    weights = {**shared, "strategy": "channel", "dynamic": False}
    inputs = {**shared, "strategy": "token", "dynamic": True} if activations else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


FORMATS: dict[str, tuple[Callable[[str, Any], dict[str, Any]], dict[str, Any]]] = {
    "gptq": (_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True,
                     "checkpoint_format": "gptq"}),
    "awq": (_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "fp8": (_fp8, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "w8a8-int8": (_int8, _int8_config(activations=True)),
}  # fmt: skip


def quantize(source: Path, form: str, folder: Path) -> Path:
    """Write the checkpoint in `source` to `folder` with all matrices of its layers quantized; returns the folder."""
    from safetensors.torch import load_file, save_file

    quantized, described = FORMATS[form]
    tensors: dict[str, Any] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".layers." in name and name.endswith("_proj.weight"):
            tensors |= quantized(name.removesuffix(".weight"), tensor)
        else:
            tensors[name] = tensor
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            shutil.copy(file, folder / file.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": described}), encoding="utf-8")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


if __name__ == "__main__":
    quantize(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
