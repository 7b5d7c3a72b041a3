"""Tiny random checkpoints of the families that stages are tested with; wide weights, so that greedy text does not repeat.

python tests/families.py FOLDER        writes one folder for each
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
GEMMA: dict[str, Any] = {"query_pre_attn_scalar": 16, "sliding_window": 8}
# Name of the family: (transformers' names of it, what differs from TINY).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", {**GEMMA, "sliding_window_pattern": 2}),
}


def build(folder: Path, family: str, **values: Any) -> Path:
    """Write the checkpoint of a family and a tokenizer of bytes to `folder`, the same one each time."""
    import torch
    import transformers

    from tests.random_llama import byte_tokenizer

    name, own = FAMILIES[family]
    config_name = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(**{**TINY, **own, **values})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):  # zeros at first: they would hide a bias that is left out
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    for family_name in FAMILIES:
        print(build(Path(sys.argv[1]) / family_name, family_name))
