"""A LoRA adapter as PEFT saves one, and the model with the adapter merged into its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

RANK, ALPHA = 4, 8
MODULES = {"self_attn.q_proj": (576, 768), "self_attn.v_proj": (576, 256), "mlp.down_proj": (1536, 576)}  # of SmolLM2
LAYERS = 30


def make_adapter(folder: Path, *, seed: int = 1, size: float = 0.02) -> Path:
    """Random matrices, large enough to change answers."""
    import torch
    from safetensors.torch import save_file

    drawn = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module, (inputs, outputs) in MODULES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = size * torch.randn(RANK, inputs, generator=drawn)
            tensors[f"{name}.lora_B.weight"] = size * torch.randn(outputs, RANK, generator=drawn)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = [module.rpartition(".")[2] for module in MODULES]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none",
              "target_modules": modules, "base_model_name_or_path": "smollm2"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def merge(model: Path, adapter: Path, folder: Path) -> Path:
    """W + alpha / rank x B A, in float32."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    weights = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    of_adapter = load_file(adapter / "adapter_model.safetensors")
    for name, a in of_adapter.items():
        if name.endswith("lora_A.weight"):
            b = of_adapter[name.replace("lora_A", "lora_B")]
            weights[name.removeprefix("base_model.model.").replace("lora_A.", "")] += ALPHA / RANK * b @ a
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
