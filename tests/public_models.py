"""Published dimensions of models, as their config.json has them, and how many parameters their pages tell."""

from __future__ import annotations

from typing import Any


def _config(
    model_type: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": model_type, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary, **more,
    }  # fmt: skip


TIED: dict[str, Any] = {"tie_word_embeddings": True}

# name: (config, parameters)
PUBLIC: dict[str, tuple[dict[str, Any], int]] = {
    "TinyLlama-1.1B": (_config("llama", 2048, 5632, 22, 32, 4, 32000, max_position_embeddings=2048), 1_100_048_384),
    "Llama-2-7B": (_config("llama", 4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096), 6_738_415_616),
    "Llama-2-13B": (_config("llama", 5120, 13824, 40, 40, 40, 32000, max_position_embeddings=4096), 13_015_864_320),
    "Llama-3-8B": (_config("llama", 4096, 14336, 32, 32, 8, 128256, max_position_embeddings=8192), 8_030_261_248),
    "Llama-3-70B": (_config("llama", 8192, 28672, 80, 64, 8, 128256, max_position_embeddings=8192), 70_553_706_496),
    "Llama-3.2-1B": (
        _config("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64, max_position_embeddings=131072, **TIED),
        1_235_814_400,
    ),
    "Mistral-7B": (_config("mistral", 4096, 14336, 32, 32, 8, 32000, max_position_embeddings=32768), 7_241_732_096),
    "Qwen2.5-32B": (_config("qwen2", 5120, 27648, 64, 40, 8, 152064, max_position_embeddings=32768), 32_763_876_352),
    "Qwen2.5-0.5B": (_config("qwen2", 896, 4864, 24, 14, 2, 151936, **TIED), 494_032_768),
    "SmolLM2-135M": (_config("llama", 576, 1536, 30, 9, 3, 49152, **TIED), 134_515_008),
    "Qwen3-8B": (_config("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128), 8_190_735_360),
    "Gemma-2B": (_config("gemma", 2048, 16384, 18, 8, 1, 256000, head_dim=256), 2_506_172_416),
    "Gemma-2-9B": (_config("gemma2", 3584, 14336, 42, 16, 8, 256000, head_dim=256), 9_241_705_984),
    "Gemma-3-1B": (_config("gemma3_text", 1152, 6912, 26, 4, 1, 262144, head_dim=256, sliding_window=512), 999_885_952),
}
