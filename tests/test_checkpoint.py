"""What a checkpoint says of itself without its weights: from a folder, from the cache, from the hub (tests/hub.py)."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.models import checkpoint
from labctl_orchestrator.models.architecture import Tensor, parameters, shape_of
from labctl_orchestrator.store.workspace import Workspace
from labctl_workers.record import ModelRef
from tests.hub import Hub

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 4096,
}  # fmt: skip
LABCTL = Path(sys.executable).parent / "labctl"


def tensors() -> dict[str, tuple[int, ...]]:
    """Those of a Llama model of the dimensions above."""
    layer = {
        "self_attn.q_proj": (256, 256), "self_attn.k_proj": (64, 256), "self_attn.v_proj": (64, 256),
        "self_attn.o_proj": (256, 256), "mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256), "mlp.down_proj": (256, 512),
        "input_layernorm": (256,), "post_attention_layernorm": (256,),
    }  # fmt: skip
    return {
        "model.embed_tokens.weight": (4096, 256),
        **{f"model.layers.{n}.{name}.weight": shape for n in range(2) for name, shape in layer.items()},
        "model.norm.weight": (256,),
        "lm_head.weight": (4096, 256),
    }


def write_safetensors(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """As the format has it; the numbers are zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = Tensor(dtype, shape).bytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint in two files, with their index."""
    home = tmp_path / "tiny"
    home.mkdir()
    (home / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    names = list(tensors())
    index = {}
    for number, part in enumerate((names[:7], names[7:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        write_safetensors(home / file, {name: tensors()[name] for name in part})
        index.update(dict.fromkeys(part, file))
    (home / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    return home


def of(folder: Path) -> ModelRef:
    return ModelRef("tiny", path=str(folder))


# ---------------------------------------------------------------- a folder


def test_parameters_are_counted_from_the_headers_of_all_files(folder: Path) -> None:
    found = checkpoint.read(of(folder))
    assert found.parameters() == parameters(shape_of(CONFIG))
    assert (found.where, found.counted_from) == ("folder", "headers")
    assert found.bytes_of(2).total == 2 * found.parameters().total


def test_a_file_that_the_index_names_and_is_not_there_is_no_reason_to_guess(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    found = checkpoint.read(of(folder))
    assert found.tensors is None
    assert found.counted_from == "config"
    assert found.parameters() == parameters(shape_of(CONFIG))


@pytest.mark.parametrize(
    "content", [b"", b"1234567", struct.pack("<Q", 2**40), struct.pack("<Q", 10) + b"no json at all"]
)
def test_what_is_no_safetensors_file_is_told_and_the_configuration_counts(folder: Path, content: bytes) -> None:
    (folder / "model-00001-of-00002.safetensors").write_bytes(content)
    found = checkpoint.read(of(folder))
    assert found.tensors is None
    assert found.counted_from == "config"


def test_other_weights_than_safetensors_leave_the_configuration_to_count(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert checkpoint.read(of(folder)).counted_from == "config"


def test_tensors_of_other_names_leave_the_configuration_to_count(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    write_safetensors(folder / "model.safetensors", {"transformer.wte.weight": (4096, 256)})
    found = checkpoint.read(of(folder))
    assert (found.counted_from, found.parameters()) == ("config", parameters(shape_of(CONFIG)))


QUANTIZED = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}


def test_quantized_layers_are_as_large_as_they_are_stored_and_the_rest_as_it_is_loaded(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": QUANTIZED}), encoding="utf-8")
    layers = {name: shape for name, shape in tensors().items() if ".layers." in name}
    write_safetensors(folder / "model-1.safetensors", layers, "I8")
    write_safetensors(folder / "model-2.safetensors", {n: s for n, s in tensors().items() if n not in layers})
    found, counted = checkpoint.read(of(folder)), parameters(shape_of(CONFIG))
    stored = found.bytes_of(4)
    assert stored.layers == counted.layers  # a byte a number
    assert (stored.embedding, stored.norm) == (4 * counted.embedding, 4 * counted.norm)
    assert found.parameters() == counted


def test_without_headers_quantized_layers_have_the_bits_of_the_configuration(folder: Path) -> None:
    """4 bits, and for each 32 a scale of 16 bits and a zero point of 4."""
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": QUANTIZED}), encoding="utf-8")
    counted, found = parameters(shape_of(CONFIG)), checkpoint.read(of(folder)).bytes_of(2)
    matrices = 2 * (256 * 256 + 64 * 256) + 3 * 256 * 512
    assert found.layers == ((4 + 20 / 32) / 8 * matrices + 2 * 2 * 256,) * 2
    assert (found.embedding, found.head) == (2 * counted.embedding, 2 * counted.head)


@pytest.mark.parametrize(
    ("option", "bits"), [("fp8_per_tensor", 8), ("mxfp4", 4.25), ("bitsandbytes", 4.5), (None, 16)]
)
def test_an_option_that_quantizes_as_the_model_loads_makes_layers_smaller(
    folder: Path, option: str | None, bits: float
) -> None:
    found = checkpoint.read(of(folder)).bytes_of(2, option)
    matrices = 2 * (256 * 256 + 64 * 256) + 3 * 256 * 512
    assert found.layers == (bits / 8 * matrices + 2 * 2 * 256,) * 2


# ---------------------------------------------------------------- the hub and its cache


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    with Hub() as running:
        running.add("org/tiny", folder)
        yield running


def fit(workspace: Workspace, hub: Hub, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`labctl fit` as a user calls it: the hub's client reads its environment when it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    kept.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [str(LABCTL), "fit", "org/tiny", *more],
        cwd=workspace.root,
        env={**kept, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_model_of_the_hub_is_counted_from_its_headers_and_no_weights_are_downloaded(
    workspace: Workspace, hub: Hub, folder: Path
) -> None:
    # The client asks for the first 100 kB of a file, which is all of so small a one.
    write_safetensors(folder / "model-00002-of-00002.safetensors", {**dict(list(tensors().items())[7:])})
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    ran = fit(workspace, hub, "--json")
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert (told["from"], told["counted_from"]) == ("hub", "headers")
    assert told["parameters"] == parameters(shape_of(CONFIG)).total
    sent = sum(count for name, count in hub.sent.items() if name.endswith(".safetensors"))
    assert sent <= 2 * 100_001 < size / 4
    again = fit(workspace, hub, "--json", HF_HUB_OFFLINE="1")
    assert again.returncode == 3  # its configuration is in the cache by now, its commit is not known to be
    assert "Traceback" not in again.stderr


def test_a_fetched_model_is_counted_from_the_cache(workspace: Workspace, hub: Hub, folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    kept.pop("HF_HUB_OFFLINE", None)
    environment = {**kept, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [str(LABCTL), "fetch", "org/tiny"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    hub.sent.clear()
    for offline in ("0", "1"):
        told = json.loads(fit(workspace, hub, "--json", HF_HUB_OFFLINE=offline).stdout)
        assert (told["from"], told["counted_from"]) == ("cache", "headers")
    assert not [name for name in hub.sent if name.endswith(".safetensors")]


def test_a_gated_model_is_refused_with_where_to_accept_its_terms(workspace: Workspace, hub: Hub) -> None:
    hub.repositories["org/tiny"].gated = 403
    ran = fit(workspace, hub)
    assert ran.returncode == 3
    assert "gated" in ran.stderr
    assert f"{hub.address}/org/tiny" in " ".join(ran.stderr.split())
    assert "HF_TOKEN" in ran.stderr
    hub.repositories["org/tiny"].let_in = ("secret",)
    told = fit(workspace, hub, HF_TOKEN="secret")
    assert told.returncode == 0, told.stderr
    assert "secret" not in told.stdout + told.stderr


def test_a_hub_that_is_down_is_one_clear_message(workspace: Workspace, hub: Hub) -> None:
    hub.status = 503
    ran = fit(workspace, hub)
    assert ran.returncode == 3
    assert "did not answer" in ran.stderr
    assert "Traceback" not in ran.stderr
