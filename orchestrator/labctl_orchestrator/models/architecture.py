"""Dimensions of models of the Llama family, and parameters of each part, from config.json or the headers of weight files. Pure.

The parts are those of transformers' modules (such as LlamaForCausalLM): embeddings, decoder layers, a norm, a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from labctl_slurm.errors import PreflightError, WrongUseError

# Bytes per number, by labctl's dtype names; bits, by those of safetensors.
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
        "U8": 8, "BOOL": 8, "U16": 16, "U32": 32, "U64": 64, "F4": 4}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Defaults of transformers' configuration class for a model type, and the structure of its layers.

    `norms`: norms per layer, each of the hidden size. `qk_norm`: one more norm each for queries and keys, of head size, as in
    Qwen 3 and Gemma 3. `qkv_bias`: query, key and value have biases whatever the configuration says.
    """

    norms: int = 2
    qk_norm: bool = False
    qkv_bias: bool = False
    tied: bool = False
    defaults: Mapping[str, Any] | None = None


# By `model_type`. Source: the configuration and modeling files of transformers 5.
FAMILIES = {
    "llama": Family(),
    "mistral": Family(defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family(qkv_bias=True, defaults={"num_key_value_heads": 32}),
    "qwen3": Family(qk_norm=True, defaults={"head_dim": 128, "num_key_value_heads": 32}),
    "gemma": Family(tied=True, defaults={"head_dim": 256, "num_key_value_heads": 16}),
    "gemma2": Family(norms=4, tied=True, defaults={"head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096}),
    "gemma3_text": Family(
        norms=4,
        qk_norm=True,
        tied=True,
        defaults={
            "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
            "sliding_window": 4096, "sliding_window_pattern": 6,
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The dimensions of a model. `windows`: attention window of each layer in tokens (None: unlimited). `max_tokens`: longest
    sequence that the model supports (None: unspecified)."""

    model_type: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    norms: int
    windows: tuple[int | None, ...]
    max_tokens: int | None
    dtype: str | None
    quantized: bool

    @property
    def grouped_by(self) -> float:
        """Hidden size / size of one token's keys: the factor by which the rule `2 x layers x hidden` overestimates."""
        return self.hidden / (self.kv_heads * self.head_dim)


@dataclass(frozen=True)
class Parts:
    """Parameters or bytes of each part of a model. `head` is 0 if it is tied to the embeddings. `rest`: all other tensors of the
    checkpoint."""

    embedding: int
    layers: tuple[int, ...]
    norm: int
    head: int
    rest: int = 0

    @property
    def total(self) -> int:
        return self.embedding + sum(self.layers) + self.norm + self.head + self.rest

    def times(self, factor: int) -> Parts:
        return Parts(
            self.embedding * factor,
            tuple(layer * factor for layer in self.layers),
            self.norm * factor,
            self.head * factor,
            self.rest * factor,
        )


# ---------------------------------------------------------------- dimensions


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The dimensions in a config.json. Raises PreflightError for a model type outside the Llama family or a missing dimension,
    WrongUseError for an impossible one."""
    text = config.get("text_config")
    if isinstance(text, dict):  # a multimodal model: use its language part
        config = {**text, **{key: config[key] for key in ("quantization_config",) if key in config}}
    model_type = str(config.get("model_type"))[:80]
    model_type = {"gemma3": "gemma3_text", "smollm": "llama"}.get(model_type, model_type)
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise PreflightError(f"unsupported model type: {model_type!r}", f"take a model of the Llama family: {known}")
    family = FAMILIES[model_type]
    values = {**(family.defaults or {}), **{key: value for key, value in config.items() if value is not None}}
    hidden, heads = _whole(values, "hidden_size"), _whole(values, "num_attention_heads")
    layers = _whole(values, "num_hidden_layers")
    if heads > hidden and "head_dim" not in values:
        raise WrongUseError(f"config.json has more heads ({heads}) than hidden_size ({hidden})", "correct one of them")
    dtype = values.get("dtype") or values.get("torch_dtype")
    return Shape(
        model_type=model_type,
        vocabulary=_whole(values, "vocab_size"),
        hidden=hidden,
        intermediate=_whole(values, "intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=_whole(values, "num_key_value_heads") if "num_key_value_heads" in values else heads,
        head_dim=_whole(values, "head_dim") if "head_dim" in values else hidden // heads,
        tied=bool(values.get("tie_word_embeddings", family.tied)),
        qkv_bias=family.qkv_bias or bool(values.get("attention_bias", False)),
        o_bias=bool(values.get("attention_bias", False)) and not family.qkv_bias,
        mlp_bias=bool(values.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        norms=family.norms,
        windows=_windows(model_type, values, config, layers),
        max_tokens=_whole(values, "max_position_embeddings") if "max_position_embeddings" in values else None,
        dtype=dtype if isinstance(dtype, str) else None,
        quantized="quantization_config" in values,
    )


def config_of_size(
    count: int,
    *,
    layers: int | None = None,
    hidden: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
) -> dict[str, Any]:
    """The config.json of a Llama of `count` parameters with these dimensions. Assumed, where they are None: Llama's rule of one
    layer and one head per 128 of the hidden size, and keys and values for each head. Raises WrongUseError for dimensions that do
    not fit together."""
    if hidden is None:
        hidden = min(range(256, 2**16, 256), key=lambda size: abs(_parameters_near(size, layers) - count))
    if layers is None:
        layers = max(1, round((count - 2 * LLAMA_VOCABULARY * hidden) / (12 * hidden**2)))
    heads = heads or max(1, hidden // 128)
    kv_heads = kv_heads or heads
    if hidden % heads or heads % kv_heads:
        raise WrongUseError(
            f"dimensions do not fit together: hidden size {hidden}, {heads} heads, {kv_heads} key-value heads",
            "give --heads that divide --hidden-size, and --kv-heads that divide --heads",
        )
    attention = 2 * hidden**2 + 2 * hidden * (hidden // heads) * kv_heads
    rest = count - (2 * LLAMA_VOCABULARY + 1) * hidden - layers * (attention + 2 * hidden)
    intermediate = round(rest / (3 * hidden * layers))
    if intermediate < 1:
        raise WrongUseError(
            f"more than {count:,} parameters: {layers} layers with hidden size {hidden}",
            "correct --parameters, --layers or --hidden-size",
        )
    return {
        "model_type": "llama", "vocab_size": LLAMA_VOCABULARY, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
    }  # fmt: skip


LLAMA_VOCABULARY = 32000


def _parameters_near(hidden: int, layers: int | None) -> int:
    """Parameters of a Llama of this hidden size: embeddings and head, and 12 x hidden^2 per layer."""
    return 12 * hidden**2 * (layers or hidden // 128) + 2 * LLAMA_VOCABULARY * hidden


# Far beyond any model: larger values would only take memory and time to compute with.
MOST_LAYERS = 4096
MOST = {"num_hidden_layers": MOST_LAYERS, "max_position_embeddings": 2**40, "sliding_window": 2**40}
MOST_OF_OTHERS = 2**24


def _whole(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    most = MOST.get(key, MOST_OF_OTHERS)
    if value is None:
        raise PreflightError(f"config.json has no {key}", "use a complete checkpoint")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise WrongUseError(f"config.json has an invalid {key}: {value!r:.40}", f"give a whole number from 1 to {most}")
    return value


def _windows(
    model_type: str, values: Mapping[str, Any], config: Mapping[str, Any], layers: int
) -> tuple[int | None, ...]:
    """Windows as transformers derives them if the configuration has no `layer_types`."""
    # An explicit null disables the default window.
    if "sliding_window" not in values or ("sliding_window" in config and config["sliding_window"] is None):
        return (None,) * layers
    window = _whole(values, "sliding_window")
    types = values.get("layer_types")
    if isinstance(types, list) and len(types) == layers:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    if model_type == "gemma2":
        return tuple(window if (index + 1) % 2 else None for index in range(layers))
    if model_type == "gemma3_text":
        pattern = _whole({"sliding_window_pattern": 6, **values}, "sliding_window_pattern")
        return tuple(window if (index + 1) % pattern else None for index in range(layers))
    if model_type in ("qwen2", "qwen3"):
        if not values.get("use_sliding_window", False):
            return (None,) * layers
        first = _whole({"max_window_layers": 28, **values}, "max_window_layers")
        return tuple(window if index >= first else None for index in range(layers))
    return (window if model_type == "mistral" else None,) * layers


# ---------------------------------------------------------------- parameters


def parameters(shape: Shape) -> Parts:
    """Parameters of each part, by the shapes of transformers' modules. A tied head counts with the embeddings only."""
    embedding, layer = shape.vocabulary * shape.hidden, sum(layer_parameters(shape))
    return Parts(embedding, (layer,) * shape.layers, shape.hidden, 0 if shape.tied else embedding)


def layer_parameters(shape: Shape, tensor: int = 1) -> tuple[int, int]:
    """(in matrices, in biases and norms) of a layer: the share of each of `tensor` GPUs. Norms and output biases are on all of
    them. Fewer key-value heads than GPUs are repeated."""
    query, key = shape.heads * shape.head_dim // tensor, max(1, shape.kv_heads // tensor) * shape.head_dim
    intermediate = shape.intermediate // tensor
    matrices = shape.hidden * (2 * query + 2 * key) + 3 * shape.hidden * intermediate
    vectors = (query + 2 * key) * shape.qkv_bias + shape.hidden * shape.o_bias + 2 * shape.head_dim * shape.qk_norm
    vectors += (2 * intermediate + shape.hidden) * shape.mlp_bias + shape.norms * shape.hidden
    return matrices, vectors


@dataclass(frozen=True)
class Tensor:
    """One tensor in the header of a weight file; `dtype` is safetensors' name."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numbers * BITS.get(self.dtype, 32) // 8


def parts_in(tensors: Mapping[str, Tensor], shape: Shape, *, in_bytes: bool = False) -> Parts:
    """Parameters (`in_bytes`: stored bytes) of each part of a checkpoint. A stored head that is tied to the embeddings does not
    count: transformers and vLLM keep one tensor."""
    found = Parts(0, (0,) * shape.layers, 0, 0)
    layers = list(found.layers)
    for name, tensor in tensors.items():
        size = tensor.bytes if in_bytes else tensor.numbers
        own = name.removeprefix("language_model.").removeprefix("model.").removeprefix("language_model.")
        first, _, rest = own.partition(".")
        number, _, _ = rest.partition(".")
        if first == "layers" and number.isdigit() and int(number) < shape.layers:
            if not own.endswith("rotary_emb.inv_freq"):  # in old checkpoints; not a parameter
                layers[int(number)] += size
        elif first == "embed_tokens":
            found = replace(found, embedding=found.embedding + size)
        elif first == "norm":
            found = replace(found, norm=found.norm + size)
        elif first == "lm_head":
            found = replace(found, head=found.head + (0 if shape.tied else size))
        else:
            found = replace(found, rest=found.rest + size)
    return replace(found, layers=tuple(layers))
