"""Metadata of a checkpoint: config.json and the headers of its safetensors files.

Sources: a local folder, the Hub cache, or the Hub through huggingface_hub: kilobytes, never the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labctl_orchestrator.models import hub_cache, resolve
from labctl_orchestrator.models.architecture import Parts, Shape, Tensor, parameters, parts_in, shape_of
from labctl_orchestrator.models.hub_errors import hub_error
from labctl_orchestrator.models.weight_files import header_of, weight_files
from labctl_orchestrator.request.paths import expand_home
from labctl_slurm.errors import LabctlError, PreflightError, WrongUseError
from labctl_slurm.partitions import Partition
from labctl_workers.record import ModelRef, parse_json, read_bytes

FOLDER, CACHE, HUB, FLAGS = "folder", "cache", "hub", "flags"
CONFIG_BYTES_AT_MOST = 16 * 2**20
_COMPLETE = "use a complete checkpoint (save_pretrained)"


@dataclass(frozen=True)
class Checkpoint:
    """`where` is "folder", "cache", "hub", or "flags" for a model that only numbers describe. `tensors` are by name; None if no
    headers are readable, and `why_not` says why."""

    name: str
    where: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor] | None
    why_not: str = ""

    @property
    def shape(self) -> Shape:
        return shape_of(self.config)

    def parameters(self) -> Parts:
        """Parameters of each part: from the headers of an unquantized model, else from the dimensions."""
        shape = self.shape
        if self.tensors is None or shape.quantized:
            return parameters(shape)
        found = parts_in(self.tensors, shape)
        if not found.embedding or not all(found.layers):
            return parameters(shape)  # an incomplete model, or other tensor names
        return found

    def bytes_of(self, itemsize: int) -> Parts:
        """Bytes of each part, loaded in a dtype of `itemsize` bytes. A quantized model keeps its stored size."""
        if self.shape.quantized and self.tensors is not None:
            return parts_in(self.tensors, self.shape, in_bytes=True)
        return self.parameters().times(itemsize)

    @property
    def counted_from(self) -> str:
        counted = self.tensors is not None and not self.shape.quantized
        return "headers" if counted and parts_in(self.tensors or {}, self.shape) == self.parameters() else "config"


def named(model: str, revision: str = "main") -> ModelRef:
    """The model of this name, as `resolve` finds it. A folder needs no weights."""
    folder = expand_home(model)
    if (folder / "config.json").is_file():
        return ModelRef(name=folder.resolve().name, path=str(folder.resolve()))
    return resolve.resolve(model, revision)[0]


def read(model: ModelRef, partition: Partition | None = None, *, online: bool = True) -> Checkpoint:
    """The checkpoint of a resolved model. A Hub model comes from the cache of the partition's nodes, or (`online`)
    from the Hub. Raises PreflightError if its configuration is unavailable."""
    if model.path is not None:
        return _in_folder(model.name, Path(model.path), FOLDER)
    cached = hub_cache.find(hub_cache.folder(partition), model.name, model.revision)
    if cached is not None and (cached.path / "config.json").is_file():
        found = _in_folder(model.name, cached.path, CACHE)
        if found.tensors is not None or not online:
            return found
    if not online:
        raise PreflightError(f"model is not in the cache: {model.name}", _ELSEWHERE)
    if not hub_cache.COMMIT.fullmatch(model.revision or ""):  # the Hub did not answer `resolve` a moment ago
        raise _unavailable(model)
    return _on_the_hub(model)


_ELSEWHERE = "give the folder of a checkpoint, or run labctl where the Hub can be reached"


def _unavailable(model: ModelRef, detail: str = "") -> PreflightError:
    return PreflightError(f"model is not in the cache, and the Hub did not answer: {model.name}{detail}", _ELSEWHERE)


# ---------------------------------------------------------------- files


def _in_folder(name: str, folder: Path, where: str) -> Checkpoint:
    config = read_config(folder / "config.json")
    tensors: dict[str, Tensor] = {}
    try:
        for file in weight_files(folder):
            tensors |= header_of(file).tensors
    except (OSError, ValueError) as error:
        return Checkpoint(name, where, config, None, f"unreadable weight files: {error}")
    if not tensors:
        return Checkpoint(name, where, config, None, "it has no safetensors files")
    return Checkpoint(name, where, config, tensors)


def read_config(file: Path) -> Mapping[str, Any]:
    """The JSON object in config.json. Raises WrongUseError for an unreadable file."""
    try:
        config = parse_json(read_bytes(file, CONFIG_BYTES_AT_MOST))
    except (OSError, ValueError) as error:
        raise WrongUseError(f"cannot read {file}: {error}", _COMPLETE) from None
    if not isinstance(config, dict):
        raise WrongUseError(f"not a JSON object: {file}", _COMPLETE)
    return config


# ---------------------------------------------------------------- the Hub


def _on_the_hub(model: ModelRef) -> Checkpoint:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    try:
        config = read_config(Path(hf_hub_download(model.name, "config.json", revision=model.revision)))
    except LabctlError:
        raise
    except LocalEntryNotFoundError:
        raise _unavailable(model) from None
    except EntryNotFoundError:
        raise PreflightError(
            f"model has no config.json on the Hub: {model.name}", "use a transformers checkpoint"
        ) from None
    except Exception as error:
        raise hub_error(error, model.name, model.revision) or _unavailable(
            model, f" ({type(error).__name__})"
        ) from None
    try:
        metadata = HfApi().get_safetensors_metadata(model.name, revision=model.revision)
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        return Checkpoint(model.name, HUB, config, None, type(error).__name__)
    except Exception as error:
        return Checkpoint(model.name, HUB, config, None, f"the Hub did not answer: {type(error).__name__}")
    tensors = {
        name: Tensor(str(tensor.dtype), tuple(tensor.shape))
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    return Checkpoint(model.name, HUB, config, tensors)
