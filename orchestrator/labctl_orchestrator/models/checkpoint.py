"""Metadata of a checkpoint: config.json and the headers of its safetensors files.

Sources: a local folder, the Hub cache, or the Hub through huggingface_hub: kilobytes, never the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from labctl_orchestrator.models import hub_cache, resolve
from labctl_orchestrator.models.architecture import (
    Parts,
    Shape,
    Tensor,
    layer_parameters,
    parameters,
    parts_in,
    shape_of,
)
from labctl_orchestrator.models.hub_errors import hub_error
from labctl_orchestrator.models.weight_files import header_of, weight_files
from labctl_orchestrator.request.paths import expand_home
from labctl_slurm.errors import LabctlError, PreflightError, WrongUseError
from labctl_slurm.partitions import Partition
from labctl_workers.engines.quantization import bits_in, bits_of_option
from labctl_workers.record import ModelRef, parse_json, read_bytes

FOLDER, CACHE, HUB, FLAGS = "folder", "cache", "hub", "flags"
CONFIG_BYTES_AT_MOST = 16 * 2**20
_COMPLETE = "use a complete checkpoint (save_pretrained)"


@dataclass(frozen=True)
class Checkpoint:
    """`where` is "folder", "cache", "hub", or "flags" for a model that only numbers describe. `tensors` are by name; None if no
    headers are readable."""

    name: str
    where: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor] | None

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

    def bytes_of(self, itemsize: int, quantization: str | None = None) -> Parts:
        """Bytes of each part, loaded in a dtype of `itemsize` bytes. The layers of a quantized checkpoint keep their stored size;
        without headers, they have the bits of its `quantization_config`. Those of any other have the bits of vLLM's option
        `quantization`."""
        shape = self.shape
        loaded = self.parameters().times(itemsize)
        if shape.quantized and self.tensors is not None:
            stored = parts_in(self.tensors, shape, in_bytes=True)
            return replace(stored, embedding=loaded.embedding, norm=loaded.norm)
        bits = bits_in(self.config.get("quantization_config")) if shape.quantized else bits_of_option(quantization)
        if bits is None:
            return loaded
        saved = round(layer_parameters(shape)[0] * (itemsize - bits / 8))
        return replace(loaded, layers=tuple(layer - saved for layer in loaded.layers))

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
        raise PreflightError(f"model {model.name} is not in the cache", _ELSEWHERE)
    if not hub_cache.COMMIT.fullmatch(model.revision or ""):  # the Hub did not answer `resolve` a moment ago
        raise _unavailable(model)
    return _on_the_hub(model)


_ELSEWHERE = "give the folder of a checkpoint, or run labctl where the Hub can be reached"


def _unavailable(model: ModelRef, detail: str = "") -> PreflightError:
    return PreflightError(f"model {model.name} is not in the cache, and the Hub did not answer{detail}", _ELSEWHERE)


# ---------------------------------------------------------------- files


def _in_folder(name: str, folder: Path, where: str) -> Checkpoint:
    config = read_config(folder / "config.json")
    tensors: dict[str, Tensor] = {}
    try:
        for file in weight_files(folder):
            tensors |= header_of(file).tensors
    except (OSError, ValueError):
        return Checkpoint(name, where, config, None)
    return Checkpoint(name, where, config, tensors or None)


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
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
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
    except Exception:  # no safetensors, or no answer of the Hub
        return Checkpoint(model.name, HUB, config, None)
    tensors = {
        name: Tensor(str(tensor.dtype), tuple(tensor.shape))
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    return Checkpoint(model.name, HUB, config, tensors)
