"""Folders that no engine can load are refused before the queue, each with its own remedy; odd configurations are one message."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.models import checkpoint as checkpoints
from labctl_orchestrator.preflight import local_checks
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.partitions import build, shipped
from labctl_workers.record import ModelRef
from tests.conftest import Labctl
from tests.test_shape import PUBLIC

LLAMA: dict[str, Any] = PUBLIC["Llama-2-7B"][0]


def _pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 6600000\n"
    (folder / "model.safetensors").write_text(text, encoding="utf-8")


def _shards(folder: Path, names: list[str]) -> None:
    weights = {f"weight{number}": name for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}), encoding="utf-8")


def _missing(folder: Path) -> None:
    _shards(folder, ["model.safetensors", "model-00002-of-00002.safetensors"])


def _outside(folder: Path) -> None:
    _shards(folder, ["../other.safetensors"])


def _cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])


def _cut_in_the_header(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:20])


def _gguf(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "tiny.gguf").write_bytes(b"GGUF" + bytes(64))


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def _weight_map_is_a_list(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}', encoding="utf-8")


def _header(header: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)

    return write


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pointer of git-lfs": (_pointer, "lfs pull"),
    "a shard is missing": (_missing, "copy the complete checkpoint"),
    "a shard lies elsewhere": (_outside, "outside of the folder"),
    "a shard is cut": (_cut, "copy or download the file again"),
    "a header is cut": (_cut_in_the_header, "copy or download the file again"),
    "GGUF alone": (_gguf, "use the original checkpoint in safetensors"),
    "no tokenizer": (_no_tokenizer, "AutoTokenizer"),
    "a pipe": (_pipe, "not a regular file"),
    "an index of another kind": (_weight_map_is_a_list, "not an index of weight files"),
    "a shape that is no list": (_header({"w": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}), "again"),
    "offsets that are none": (_header({"w": {"dtype": "F32", "shape": [1], "data_offsets": ["a", -1]}}), "again"),
    "a dimension of 10^30": (_header({"w": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]}}), "again"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_folder_that_no_engine_can_load_is_refused_at_submit_and_fails_in_doctor(
    workspace: Workspace, labctl: Labctl, checkpoint: Path, kind: str
) -> None:
    spoil, said = BROKEN[kind]
    assert labctl("submit", "-p", "dgxh", "--model-id", checkpoint, "--dry-run").code == 0
    spoil(checkpoint)
    refused = labctl("submit", "-p", "dgxh", "--model-id", checkpoint, "--dry-run")
    assert refused.code == 2
    assert said in refused.err.replace("\n", " ")
    assert refused.err.count("\n  -> ") == 1
    partition = build("dgxh", [("shipped", shipped()["dgxh"])])
    assert local_checks._model(partition, str(checkpoint), "main").level == "fail"


def test_a_shard_of_all_its_bytes_is_whole_whatever_else_lies_beside(
    workspace: Workspace, labctl: Labctl, checkpoint: Path
) -> None:
    _shards(checkpoint, ["model.safetensors"])
    (checkpoint / "old.gguf").write_bytes(b"GGUF")
    assert labctl("submit", "-p", "dgxh", "--model-id", checkpoint, "--dry-run").code == 0


# ---------------------------------------------------------------- odd configurations

ABSURD = [
    {"num_hidden_layers": 10**30}, {"num_hidden_layers": 10**9}, {"hidden_size": 10**400}, {"vocab_size": 2**40},
    {"max_position_embeddings": 2048.0}, {"max_position_embeddings": "4k"}, {"num_attention_heads": 10_000},
    {"head_dim": 0}, {"num_key_value_heads": -1}, {"model_type": "gemma3_text", "sliding_window_pattern": 0},
    {"model_type": "gemma2", "sliding_window": 10**400}, {"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": True,
                                                         "max_window_layers": "x"},
]  # fmt: skip


@pytest.mark.parametrize("values", ABSURD, ids=lambda values: "-".join(map(str, values))[:40])
def test_an_absurd_configuration_is_one_message(
    workspace: Workspace, labctl: Labctl, tmp_path: Path, values: dict[str, Any]
) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**LLAMA, **values}), encoding="utf-8")
    ran = labctl("fit", tmp_path / "odd")
    assert ran.code == 2
    assert ran.err.count("\n  -> ") == 1
    assert len(ran.err) < 400


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 10_000, '{"model_type": ' + "9" * 5000 + "}"])
def test_a_configuration_that_is_nested_too_deep_is_one_message(
    workspace: Workspace, labctl: Labctl, tmp_path: Path, text: str
) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(text, encoding="utf-8")
    ran = labctl("fit", tmp_path / "odd")
    assert ran.code == 2
    assert ran.err.count("\n  -> ") == 1


@pytest.mark.parametrize("spoil", [_pipe, _weight_map_is_a_list, _outside, _cut_in_the_header])
def test_fit_counts_from_the_configuration_where_weights_cannot_be_read(
    checkpoint: Path, spoil: Callable[[Path], None]
) -> None:
    (checkpoint / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    spoil(checkpoint)
    found = checkpoints.read(ModelRef("odd", path=str(checkpoint)))
    assert found.tensors is None
    assert found.parameters().total > 6e9


@pytest.mark.parametrize("line", ["gpu_memory_gib = inf", "gpu_memory_gib = 1e300", "gpu_memory_gib = nan",
                                  "gpu_bandwidth_gb_s = inf", 'capability = "99999999.0"'])  # fmt: skip
def test_a_partition_of_absurd_figures_is_refused(
    workspace: Workspace, labctl: Labctl, tmp_path: Path, line: str
) -> None:
    (workspace.root / "labctl.toml").write_text(f"[partitions.dgxh]\n{line}\n", encoding="utf-8")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    ran = labctl("fit", tmp_path / "odd", "-p", "dgxh")
    assert ran.code == 2
    assert ran.err.count("\n  -> ") == 1
