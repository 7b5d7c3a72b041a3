"""Quantization: what kernels need and how large numbers are, held against the installed vLLM and against real checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.models import checkpoint, fit
from labctl_workers.engines.base import Arrivals
from labctl_workers.engines.parallel import ParallelSizes
from labctl_workers.engines.quantization import CACHE_BYTES, KERNELS, bits_in, cache_bytes, method_in
from labctl_workers.record import ModelRef, Sampling
from tests.models import smollm2  # noqa: F401  a fixture
from tests.quantized import FORMATS, quantize
from tests.test_vllm import SET, ask, make_engine, real_job, without
from tests.vllm_package import vllm_installed  # noqa: F401  a fixture

GIVEN: dict[str, tuple[dict[str, Any] | None, float | None]] = {
    "no quantization": (None, None),
    "an unknown method": ({"quant_method": "odd"}, None),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
    "awq, older names": ({"quant_method": "awq", "w_bit": 4, "group_size": 64}, 4 + 20 / 64),
    "gptq without groups": ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, 8),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
    "nf4, scales quantized": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 4 + 1 / 8 + 1 / 512
    ),
    "int8 of bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
    "w4a16": (
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 128}}}}, 4.125
    ),
    "w8a8": ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8}}}}, 8),
    "no groups": ({"quant_method": "compressed-tensors"}, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", GIVEN)
def test_the_bits_of_a_number_contain_its_share_of_scales_and_zero_points(kind: str) -> None:
    described, bits = GIVEN[kind]
    assert bits_in(described) == bits


@pytest.mark.parametrize("described", [[], "awq", {}, {"quant_method": 8}])
def test_a_quantization_config_of_another_form_is_no_quantization(described: Any) -> None:
    assert method_in(described) is None


def test_a_cache_of_an_unknown_format_counts_in_the_models_dtype() -> None:
    assert [cache_bytes(name, 2) for name in (None, "auto", "fp8", "fp8_e5m2", "turboquant_4bit_nc")] == [2, 2, 1, 1, 2]


@pytest.mark.model
@pytest.mark.usefixtures("vllm_installed")
def test_capabilities_and_dtypes_are_those_of_the_installed_vllm() -> None:
    import torch
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
    from vllm.model_executor.layers.quantization.compressed_tensors import schemes

    # Volta's vLLM had kernels of their own for gptq_marlin; today's reads "gptq" by it.
    known = {
        name: get_quantization_config(name) for name in KERNELS.keys() & set(QUANTIZATION_METHODS) - {"gptq_marlin"}
    }
    assert {"awq", "gptq", "fp8", "compressed-tensors", "fp8_per_tensor"} <= known.keys()
    for name, config in known.items():
        least = config.get_min_capability()
        if name == "compressed-tensors":  # the schemes ask for more
            of_schemes = [
                schemes.CompressedTensorsW8A16Fp8,
                schemes.CompressedTensorsWNA16,
                schemes.CompressedTensorsW8A8Int8,
            ]
            assert least < min(scheme.get_min_capability() for scheme in of_schemes)
            least = min(scheme.get_min_capability() for scheme in of_schemes)
        assert least == 10 * KERNELS[name].capability, name
        dtypes = {getattr(torch, dtype) for dtype in KERNELS[name].dtypes}
        assert dtypes == set(object.__new__(config).get_supported_act_dtypes()) & {
            torch.float16,
            torch.bfloat16,
            torch.float32,
        }, name


@pytest.mark.model
@pytest.mark.usefixtures("vllm_installed")
def test_the_bytes_of_a_cache_are_those_of_the_installed_vllm() -> None:
    from vllm.utils.torch_utils import get_kv_cache_torch_dtype

    for name, size in CACHE_BYTES.items():
        if size is not None and name != "float32":
            assert get_kv_cache_torch_dtype(name).itemsize == size


# ---------------------------------------------------------------- real checkpoints


@pytest.fixture(scope="module")
def checkpoints(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: F811
    home = tmp_path_factory.mktemp("quantized")
    return {"bfloat16": smollm2, **{form: quantize(smollm2, form, home / form) for form in FORMATS}}


@pytest.mark.nightly
@pytest.mark.model
@pytest.mark.parametrize("form", FORMATS)
def test_a_quantized_checkpoint_is_as_large_as_its_configuration_says(checkpoints: dict[str, Path], form: str) -> None:
    folder = checkpoints[form]
    found = checkpoint.read(ModelRef(name=form, path=str(folder)))
    stored, computed = found.bytes_of(2), checkpoint.Checkpoint(form, "flags", found.config, None).bytes_of(2)
    assert stored.total == pytest.approx((folder / "model.safetensors").stat().st_size, rel=1e-3)
    assert computed.total == pytest.approx(stored.total, rel=0.01)
    assert stored.total < found.parameters().total * 2 * 0.65
    whole = checkpoint.read(ModelRef(name="whole", path=str(checkpoints["bfloat16"])))
    (quantized,), (full,) = (
        fit.weights_by_stage(each.shape, each.bytes_of(2), ParallelSizes(), 2) for each in (found, whole)
    )
    assert full - quantized == pytest.approx(whole.bytes_of(2).total - stored.total, rel=0.01)


# The CPU build of vLLM 0.32 lacks an operator of FP8 weights, stored or quantized as they load: static_scaled_fp8_quant.
OF_AN_ENGINE: dict[str, tuple[str, dict[str, str]]] = {
    **{form: (form, {}) for form in FORMATS if form != "fp8"},
    "an FP8 cache": ("bfloat16", {"kv_cache_dtype": "fp8"}),
}


@pytest.mark.nightly
@pytest.mark.model
@pytest.mark.usefixtures("vllm_installed")
@pytest.mark.parametrize("kind", OF_AN_ENGINE)
def test_vllm_answers_with_quantized_weights_and_caches(
    checkpoints: dict[str, Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers of the CPU build. In `make test`: the refusals, and sizes of made-up configurations."""
    without(monkeypatch, SET)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    form, options = OF_AN_ENGINE[kind]
    made = make_engine(real_job(checkpoints[form], gpus=2, dtype="bfloat16", engine_options=options), tmp_path)
    made.load()
    try:
        given = ask(
            made,
            made.encode(["What is the capital of France?"]),
            Arrivals(1),
            max_new_tokens=12,
            sampling=Sampling(),
            ignore_eos=False,
        )
        assert "Paris" in made.decode(given[0].token_ids)
        said = made.fingerprint().to_json()["vllm"]
        described = json.loads((checkpoints[form] / "config.json").read_text(encoding="utf-8")).get(
            "quantization_config"
        )
        assert (said["quantization"] or "").removeprefix("auto_") == (method_in(described) or "")
        assert said["kv_cache_dtype"] == options.get("kv_cache_dtype", "auto")
        per_token = [report.kv_token_bytes for report in made.reports]
        of_a_number = cache_bytes(options.get("kv_cache_dtype"), 2)
        assert per_token == [2 * 30 * 4 * 64 * of_a_number / 2] * 2
    finally:
        made.close()
