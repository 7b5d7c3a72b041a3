"""What a checkpoint says of itself without its weights: config.json and the headers of its safetensors files.

From a local folder, from the hub's cache, else from the hub, by huggingface_hub's own calls: kilobytes, never the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labctl_orchestrator.models import hub_cache, resolve
from labctl_orchestrator.models.architecture import Parts, Shape, Tensor, parameters, parts_in, shape_of
from labctl_orchestrator.models.hub_errors import told_of
from labctl_orchestrator.models.weight_files import header_of, weight_files
from labctl_orchestrator.request.paths import expand_home
from labctl_slurm.errors import LabctlError, PreflightError, WrongUseError
from labctl_slurm.partitions import Partition
from labctl_workers.record import ModelRef, parse_json, read_bytes

FOLDER, CACHE, HUB = "folder", "cache", "hub"
CONFIG_BYTES_AT_MOST = 16 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """`where` is "folder", "cache" or "hub". `tensors` are by name, None where there are no headers to read, for the reason
    `why_not`."""

    name: str
    where: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor] | None
    why_not: str = ""

    @property
    def shape(self) -> Shape:
        return shape_of(self.config)

    def parameters(self) -> Parts:
        """The number of parameters of each part: from the headers where there are any and they hold plain numbers, else from
        the dimensions."""
        shape = self.shape
        if self.tensors is None or shape.quantized:
            return parameters(shape)
        found = parts_in(self.tensors, shape)
        if not found.embedding or not all(found.layers):
            return parameters(shape)  # not the whole model, or under other names
        return found

    def bytes_of(self, itemsize: int) -> Parts:
        """Bytes of each part, loaded in a dtype of `itemsize`; what is quantized stays as it is stored."""
        if self.shape.quantized and self.tensors is not None:
            return parts_in(self.tensors, self.shape, in_bytes=True)
        return self.parameters().times(itemsize)

    @property
    def counted_from(self) -> str:
        counted = self.tensors is not None and not self.shape.quantized
        return "headers" if counted and parts_in(self.tensors or {}, self.shape) == self.parameters() else "config"


def named(model: str, revision: str = "main") -> ModelRef:
    """The model that a person names, as models.resolve finds it; but a folder that holds no weights will do."""
    folder = expand_home(model)
    if (folder / "config.json").is_file():
        return ModelRef(name=folder.resolve().name, path=str(folder.resolve()))
    return resolve.resolve(model, revision)[0]


def read(model: ModelRef, partition: Partition | None = None, *, online: bool = True) -> Checkpoint:
    """The checkpoint of a resolved model; of a hub model, what lies in the cache that nodes of the partition see, else what the
    hub tells, which is asked `online` alone. Raises PreflightError, with the remedy, where its configuration cannot be had."""
    if model.path is not None:
        return _in_folder(model.name, Path(model.path), FOLDER)
    cached = hub_cache.find(hub_cache.folder(partition), model.name, model.revision)
    if cached is not None and (cached.path / "config.json").is_file():
        found = _in_folder(model.name, cached.path, CACHE)
        if found.tensors is not None or not online:
            return found
    if not online:
        raise PreflightError(f"{model.name} is not in the cache", _ELSEWHERE)
    if not hub_cache.COMMIT.fullmatch(model.revision or ""):  # it was asked a moment ago, to pin the model
        raise PreflightError(f"{model.name} is not in the cache, and the hub did not answer", _ELSEWHERE)
    return _on_the_hub(model)


_ELSEWHERE = "give the folder of a checkpoint, or go where the hub can be reached"


# ---------------------------------------------------------------- files


def _in_folder(name: str, folder: Path, where: str) -> Checkpoint:
    config = read_config(folder / "config.json")
    tensors: dict[str, Tensor] = {}
    try:
        for file in weight_files(folder):
            tensors |= header_of(file).tensors
    except (OSError, ValueError) as error:
        return Checkpoint(name, where, config, None, f"its weight files cannot be read: {error}")
    if not tensors:
        return Checkpoint(name, where, config, None, "it has no safetensors files here")
    return Checkpoint(name, where, config, tensors)


def read_config(file: Path) -> dict[str, Any]:
    """Raises WrongUseError for a file that is no JSON object."""
    try:
        config = parse_json(read_bytes(file, CONFIG_BYTES_AT_MOST))
    except (OSError, ValueError) as error:
        raise WrongUseError(f"{file} cannot be read: {error}", "take a whole checkpoint (save_pretrained)") from None
    if not isinstance(config, dict):
        raise WrongUseError(f"{file} is no JSON object", "take a whole checkpoint (save_pretrained)")
    return config


# ---------------------------------------------------------------- the hub


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
    except (LocalEntryNotFoundError, EntryNotFoundError) as error:
        if isinstance(error, LocalEntryNotFoundError):  # nor does the hub answer
            raise PreflightError(f"{model.name} is not in the cache, and the hub did not answer", _ELSEWHERE) from None
        raise PreflightError(f"{model.name} has no config.json on the hub", "take a transformers checkpoint") from None
    except Exception as error:
        raise told_of(error, model.name, model.revision) or PreflightError(
            f"{model.name} is not in the cache, and the hub did not answer ({type(error).__name__})", _ELSEWHERE
        ) from None
    try:
        told = HfApi().get_safetensors_metadata(model.name, revision=model.revision)
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        return Checkpoint(model.name, HUB, config, None, type(error).__name__)
    except Exception as error:
        return Checkpoint(model.name, HUB, config, None, f"the hub did not answer: {type(error).__name__}")
    tensors = {
        name: Tensor(str(tensor.dtype), tuple(tensor.shape))
        for file in told.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    return Checkpoint(model.name, HUB, config, tensors)
