"""The weight files of a checkpoint's folder: their names, the headers of safetensors, and whether they are whole."""

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

# safetensors' own bound for a header, in bytes: what is longer is no such file.
LONGEST_HEADER = 100_000_000
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Of the files that hold weights, in any form that transformers knows.
WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# An engine loads one of these as the tokenizer.
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
    """Of a safetensors file: its tensors by name, how many bytes it must have, and how many it has."""

    tensors: Mapping[str, Tensor]
    needed_bytes: int
    size_bytes: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files: those that the index names, else all. Raises OSError or ValueError for an index that cannot be
    read."""
    index = folder / INDEXES[0]
    if index.is_file():
        return [folder / name for name in names_in(index)]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def names_in(index: Path) -> list[str]:
    """The files that an index of shards names. Raises OSError, and ValueError for what is no index."""
    try:
        names = set(msgspec.json.decode(read_bytes(index, LONGEST_HEADER), type=_Index).weight_map.values())
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"{index.name} is no index of weight files: {error}") from None
    if elsewhere := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index.name} names a file outside of the folder: {elsewhere[0][:80]!r}")
    return sorted(names)


def header_of(file: Path) -> Header:
    """The header of a safetensors file: 8 bytes of length, then JSON. Raises OSError, and ValueError for another kind of file.
    Source: https://github.com/huggingface/safetensors (the format)."""
    with open_regular(file) as weights:
        size = os.fstat(weights.fileno()).st_size
        begin = weights.read(8)
        length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else 0
        if not 0 < length <= LONGEST_HEADER:
            raise ValueError(f"{file.name} is no safetensors file")
        text = weights.read(length)
    if len(text) < length:
        raise ValueError(f"{file.name} is cut: it ends within its header")
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        entries = {
            name: msgspec.json.decode(entry, type=_TensorEntry) for name, entry in raw.items() if name != "__metadata__"
        }
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"{file.name} has a header that is not one of safetensors: {error}") from None
    end = max((entry.data_offsets[1] for entry in entries.values()), default=0)
    tensors = {name: Tensor(entry.dtype, tuple(entry.shape)) for name, entry in entries.items()}
    return Header(tensors, 8 + length + end, size)


def check_whole(folder: Path) -> None:
    """Raises WrongUseError for a folder that no engine can load, each reason with its own remedy: a pointer of git-lfs, a shard
    that is missing or cut, GGUF alone, no tokenizer. Reads headers alone."""
    weights = sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS)
    for file in weights:
        try:
            with open_regular(file) as opened:
                begin = opened.read(len(_LFS_POINTER))
        except (OSError, ValueError) as error:
            raise WrongUseError(f"{file} cannot be read: {error}", "make the checkpoint whole") from None
        if begin == _LFS_POINTER:
            raise WrongUseError(f"{file} is a pointer of git-lfs, not the weights", f"git -C {folder} lfs pull")
    if all(file.suffix == ".gguf" for file in weights):
        raise WrongUseError(
            f"{folder} holds its weights as GGUF alone, which labctl's engines do not load",
            "take the checkpoint that it was made of, in safetensors",
        )
    for index in (folder / name for name in INDEXES):
        try:
            names = names_in(index) if index.is_file() else []
        except (OSError, ValueError) as error:
            raise WrongUseError(f"{index} cannot be read: {error}", "copy or download the file again") from None
        for name in names:
            if not (folder / name).exists():
                raise WrongUseError(f"{folder / name} is missing: {index.name} names it", "copy the whole checkpoint")
    for file in weight_files(folder):
        try:
            header = header_of(file)
        except (OSError, ValueError) as error:
            raise WrongUseError(f"{file}: {error}", "copy or download the file again") from None
        if header.size_bytes < header.needed_bytes:
            raise WrongUseError(
                f"{file} is cut: it has {header.size_bytes:,} of {header.needed_bytes:,} bytes",
                "copy or download the file again",
            )
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise WrongUseError(
            f"{folder} has no tokenizer",
            "save it there too: AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)",
        )
