"""A random checkpoint of a Llama-family model's structure and dimensions: right for speed and memory, meaningless as text.

    python tests/random_llama.py FOLDER [--like tinyllama|llama-3-8b|...|tiny] [--tied] [--dtype bfloat16]

Its tokenizer has a token for every byte (and two special ones), so that any prompt can be encoded.
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path
from typing import Any

# Published dimensions; hidden_size, intermediate_size, layers, heads, key-value heads, vocabulary, and what else differs.
DIMENSIONS: dict[str, tuple[int, int, int, int, int, int, dict[str, Any]]] = {
    "tinyllama": (2048, 5632, 22, 32, 4, 32000, {}),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000, {}),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, {"rope_theta": 500000.0}),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, {"rope_theta": 500000.0, "tie_word_embeddings": True}),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6}),
    "tiny": (64, 128, 4, 4, 2, 300, {}),
    "small": (128, 256, 4, 4, 2, 300, {}),  # vLLM on a CPU has no attention for smaller heads
}


def build(folder: Path, like: str, *, tied: bool, dtype: str, layers: int | None = None) -> None:
    """Write the checkpoint and its tokenizer; weights are drawn with a fixed seed."""
    import torch
    import transformers

    family = "Qwen2" if like.startswith("qwen2") else "Llama"
    hidden, intermediate, own_layers, heads, kv_heads, vocabulary, others = DIMENSIONS[like]
    values = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers or own_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    config = getattr(transformers, f"{family}Config")(**{**values, **others})
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(getattr(torch, dtype))  # drawn as they are kept: half the memory, half the time
    with torch.device(device):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zeros at first: they would hide a bias that is left out
            torch.nn.init.normal_(parameter, std=0.1)
    model.config.dtype = getattr(torch, dtype)
    model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    assert set(string.printable.strip()) <= set(alphabet)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--like", choices=DIMENSIONS, default="tinyllama")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, help="another number of layers")
    options = parser.parse_args()
    build(options.folder, options.like, tied=options.tied, dtype=options.dtype, layers=options.layers)
    size = sum(file.stat().st_size for file in options.folder.glob("*.safetensors"))
    print(f"{options.folder}: {options.like}, {options.dtype}, {size / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
