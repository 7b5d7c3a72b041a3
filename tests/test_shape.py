"""What a configuration and the headers of weight files say of a model's parts."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from labctl_orchestrator.models import architecture
from labctl_orchestrator.models.architecture import Tensor, parameters, parts_in, shape_of
from labctl_slurm.errors import PreflightError, WrongUseError
from tests.parts import fail_or_skip
from tests.public_models import PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_model_has_as_many_parameters_as_its_page_says(name: str) -> None:
    config, published = PUBLIC[name]
    assert parameters(shape_of(config)).total == published


@pytest.mark.model
@pytest.mark.parametrize("name", PUBLIC)
def test_every_part_is_as_large_as_that_of_transformers_own_model(name: str) -> None:
    if importlib.util.find_spec("transformers") is None:
        fail_or_skip("not installed: transformers (make test installs it)")
    import torch
    import transformers

    config = dict(PUBLIC[name][0])
    made = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    own = parameters(shape_of(PUBLIC[name][0]))

    def count(module: Any) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert own.total == count(model)
    assert own.embedding == count(model.model.embed_tokens)
    assert list(own.layers) == [count(layer) for layer in model.model.layers]
    assert own.norm == count(model.model.norm)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert own.head == (0 if tied else count(model.lm_head))
    tensors = {n: Tensor("BF16", tuple(p.shape)) for n, p in model.named_parameters()}
    assert parts_in(tensors, shape_of(PUBLIC[name][0])) == own
    types = getattr(made, "layer_types", None) or ["full_attention"] * own.layers.__len__()
    if PUBLIC[name][0]["model_type"] == "mistral":  # its window is that of every layer
        types = ["sliding_attention" if made.sliding_window else "full_attention"] * len(own.layers)
    windows = shape_of(PUBLIC[name][0]).windows
    assert [window is not None for window in windows] == [kind == "sliding_attention" for kind in types]


def test_biases_count_where_the_configuration_has_them() -> None:
    plain, _ = PUBLIC["TinyLlama-1.1B"]
    own = parameters(shape_of(plain))
    attention = parameters(shape_of({**plain, "attention_bias": True}))
    mlp = parameters(shape_of({**plain, "mlp_bias": True}))
    assert attention.total - own.total == 22 * (2048 + 2 * 256 + 2048)
    assert mlp.total - own.total == 22 * (2 * 5632 + 2048)


def test_a_head_that_is_stored_beside_the_embeddings_it_is_tied_to_counts_once() -> None:
    config, published = PUBLIC["SmolLM2-135M"]
    own = shape_of(config)
    sizes = parameters(own)
    tensors = {
        "model.embed_tokens.weight": Tensor("BF16", (own.vocabulary, own.hidden)),
        "lm_head.weight": Tensor("BF16", (own.vocabulary, own.hidden)),
        "model.norm.weight": Tensor("BF16", (own.hidden,)),
        **{f"model.layers.{n}.all": Tensor("BF16", (size,)) for n, size in enumerate(sizes.layers)},
    }
    assert parts_in(tensors, own).total == published
    assert parts_in(tensors, own, in_bytes=True).total == 2 * published


def test_what_is_in_a_file_and_in_no_part_is_counted_apart() -> None:
    own = shape_of(PUBLIC["SmolLM2-135M"][0])
    found = parts_in(
        {"vision.weight": Tensor("F32", (3, 5)), "model.layers.0.rotary_emb.inv_freq": Tensor("F32", (32,))}, own
    )
    assert (found.rest, found.total) == (15, 15)


def test_a_model_that_also_sees_is_known_by_its_language_part() -> None:
    text, _ = PUBLIC["Gemma-3-1B"]
    whole = shape_of({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert whole == shape_of(text)


def test_a_model_of_another_kind_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(PreflightError) as refused:
        shape_of({"model_type": "mamba"})
    assert "mamba" in refused.value.message
    assert "llama" in refused.value.remedy


@pytest.mark.parametrize("wrong", [None, 0, -1, "many", True, 1.5])
def test_a_dimension_that_is_no_number_is_told_by_its_name(wrong: object) -> None:
    with pytest.raises((PreflightError, WrongUseError), match="hidden_size"):
        shape_of({**PUBLIC["Llama-2-7B"][0], "hidden_size": wrong})


def test_the_rule_of_the_hidden_size_errs_by_the_heads_that_share_keys() -> None:
    factors = {name: shape_of(config).grouped_by for name, (config, _) in PUBLIC.items()}
    assert (factors["TinyLlama-1.1B"], factors["Llama-3-8B"], factors["Llama-2-7B"]) == (8, 4, 1)
    assert architecture.ITEMSIZE["bfloat16"] == 2
