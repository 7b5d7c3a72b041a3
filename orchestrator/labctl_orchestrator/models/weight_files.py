"""The weight files in a checkpoint's folder: names, safetensors headers, completeness."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from labctl_orchestrator.models.architecture import Tensor
from labctl_slurm.errors import WrongUseError
from labctl_workers.record import open_regular, read_bytes

# safetensors' own limit of a header, in bytes.
LONGEST_HEADER = 100_000_000
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Suffixes of weight files in all formats that transformers knows.
WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Tokenizer files; an engine needs one of them.
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "tiktoken.model", "qwen.tiktoken", "tokenizer_config.json",
)  # fmt: skip


class _TensorEntry(msgspec.Struct):
    dtype: str
    shape: Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=2**48)]], msgspec.Meta(max_length=16)]
    data_offsets: tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=0, le=2**60)]]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


@dataclass(frozen=True)
class Header:
    """Header of a safetensors file: tensors by name, and expected and actual size of the file."""

    tensors: Mapping[str, Tensor]
    needed_bytes: int
    size_bytes: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files: those in the index, else all. Raises OSError or ValueError for an unreadable index."""
    index = folder / INDEXES[0]
    if index.is_file():
        return [folder / name for name in names_in(index)]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def names_in(index: Path) -> list[str]:
    """The shard files in an index. Raises OSError, and ValueError for an invalid index."""
    try:
        names = set(msgspec.json.decode(read_bytes(index, LONGEST_HEADER), type=_Index).weight_map.values())
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"{index.name} is not an index of weight files: {error}") from None
    if elsewhere := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index.name} names a file outside of the folder: {elsewhere[0][:80]!r}")
    return sorted(names)


def header_of(file: Path) -> Header:
    """The header of a safetensors file: 8 bytes of length, then JSON. Raises OSError, and ValueError for other files.
    Source: https://github.com/huggingface/safetensors (the format)."""
    with open_regular(file) as weights:
        size = os.fstat(weights.fileno()).st_size
        begin = weights.read(8)
        length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else 0
        if not 0 < length <= LONGEST_HEADER:
            raise ValueError(f"{file.name} is not a safetensors file")
        text = weights.read(length)
    if len(text) < length:
        raise ValueError(f"{file.name} is truncated within its header")
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        entries = {
            name: msgspec.json.decode(entry, type=_TensorEntry) for name, entry in raw.items() if name != "__metadata__"
        }
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"{file.name} has an invalid safetensors header: {error}") from None
    end = max((entry.data_offsets[1] for entry in entries.values()), default=0)
    tensors = {name: Tensor(entry.dtype, tuple(entry.shape)) for name, entry in entries.items()}
    return Header(tensors, 8 + length + end, size)


def check_complete(folder: Path) -> None:
    """Raises WrongUseError for a checkpoint that no engine can load: git-lfs pointers, missing or truncated shards, only GGUF,
    no tokenizer. Reads headers only."""
    weights = sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS)
    for file in weights:
        try:
            with open_regular(file) as opened:
                begin = opened.read(len(_LFS_POINTER))
        except (OSError, ValueError) as error:
            raise WrongUseError(f"cannot read {file}: {error}", "repair the checkpoint") from None
        if begin == _LFS_POINTER:
            raise WrongUseError(
                f"git-lfs pointer instead of weights: {file}", f"download them: git -C {folder} lfs pull"
            )
    if all(file.suffix == ".gguf" for file in weights):
        raise WrongUseError(
            f"only GGUF weights, which labctl's engines cannot load: {folder}",
            "use the original checkpoint in safetensors",
        )
    for index in (folder / name for name in INDEXES):
        try:
            names = names_in(index) if index.is_file() else []
        except (OSError, ValueError) as error:
            raise WrongUseError(f"cannot read {index}: {error}", "copy or download the file again") from None
        for name in names:
            if not (folder / name).exists():
                raise WrongUseError(
                    f"shard of {index.name} is missing: {folder / name}", "copy the complete checkpoint"
                )
    for file in weight_files(folder):
        try:
            header = header_of(file)
        except (OSError, ValueError) as error:
            raise WrongUseError(f"{file}: {error}", "copy or download the file again") from None
        if header.size_bytes < header.needed_bytes:
            raise WrongUseError(
                f"truncated weight file: {file} ({header.size_bytes:,} of {header.needed_bytes:,} bytes)",
                "copy or download the file again",
            )
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise WrongUseError(
            f"no tokenizer in {folder}",
            "save it there: AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)",
        )
