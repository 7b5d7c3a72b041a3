"""Which model is meant: a hub id pinned to a revision, or a local folder known by its content."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from labctl_orchestrator.cache import find
from labctl_orchestrator.workspace import at_home
from labctl_slurm.errors import PreflightError, WrongUseError
from labctl_workers.record import ModelRef

HUB_ANSWER_WITHIN_S = 5.0
BLOCKS, BLOCK_BYTES = 64, 65536
_TEXT = (".json", ".jinja", ".model", ".txt")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


def resolve(model: str, revision: str = "main", offline_caches: Iterable[Path] = ()) -> tuple[ModelRef, str | None]:
    """The model and, where it could not be pinned, why. Raises WrongUseError or PreflightError, each with a remedy.

    `offline_caches` are of partitions whose nodes cannot ask the hub: what was fetched into one of them is meant, whatever
    the hub's branch has become since.
    """
    if is_folder(model):
        return _local(at_home(model).resolve()), None
    if model.startswith(("/", "./", "../", "~")):
        raise WrongUseError(
            f"there is no folder {at_home(model)}", "give the folder of a checkpoint, or a hub id such as org/name"
        )
    check_id(model)
    for cache in offline_caches:
        cached = find(cache, model, revision)
        if cached and cached.whole:
            return ModelRef(name=model, revision=cached.commit), None
    return _hub(model, revision)


def is_folder(model: str) -> bool:
    """Whether a model is given by its folder. Raises WrongUseError for what can be no path at all."""
    try:
        return at_home(model).is_dir()
    except OSError as error:
        raise WrongUseError(
            f"{model[:40]}… is no path: {error.strerror}", "give a folder, or a hub id such as org/name"
        ) from None


def _local(folder: Path) -> ModelRef:
    if not (folder / "config.json").is_file():
        raise WrongUseError(f"{folder} has no config.json", "give the folder of a transformers checkpoint")
    if not any(file.suffix in _WEIGHTS for file in folder.iterdir()):
        raise WrongUseError(f"{folder} holds no weights", "save the model there as safetensors (save_pretrained)")
    return ModelRef(name=folder.name, path=str(folder), fingerprint=fingerprint(folder))


def fingerprint(folder: Path) -> str:
    """SHA-256 of a checkpoint: whole text files (configuration, tokenizer); of each weight file its size, its beginning
    (a safetensors header) and 64 blocks of 64 KiB spread evenly over it, so that 140 GB take a second, not ten minutes."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _TEXT or file.suffix in _WEIGHTS:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            for block in _whole(file) if file.suffix in _TEXT else _sampled(file):
                digest.update(block)
    return digest.hexdigest()


def _whole(file: Path) -> Iterator[bytes]:
    yield file.read_bytes()


def _sampled(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as weights:
        yield weights.read(1 << 20)
        for block in range(BLOCKS):
            weights.seek(max(0, size - BLOCK_BYTES) * (block + 1) // BLOCKS)
            yield weights.read(BLOCK_BYTES)


def check_id(model: str) -> None:
    """Raises WrongUseError for what cannot be the id of a model on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(model)
        if not model.isascii():  # older validators let such letters pass
            raise HFValidationError(model)
    except HFValidationError:
        raise WrongUseError(
            f"{model!r} is neither a folder nor a hub id", "give a folder, or an id such as org/name"
        ) from None


def _hub(model: str, revision: str) -> tuple[ModelRef, str | None]:
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return ModelRef(name=model, revision=revision), None
    pinned, why_not = _asked_of_the_hub(model, revision)
    if pinned is None:
        pinned = _in_the_cache(model, revision)
    if pinned is None and "/" not in model:
        raise PreflightError(
            f"there is no folder {model} here, and the hub could not be asked: {why_not}", "give a path"
        )
    if pinned is None:
        return ModelRef(
            name=model, revision=revision
        ), f"{model} could not be pinned ({why_not}): nodes take its {revision!r}"
    return ModelRef(name=model, revision=pinned), None


def _asked_of_the_hub(model: str, revision: str) -> tuple[str | None, str]:
    """(the commit, "") or (None, why the hub gave none)."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return None, "HF_HUB_OFFLINE is set and it is not in the cache"
    try:
        return HfApi().model_info(model, revision=revision, timeout=HUB_ANSWER_WITHIN_S).sha, ""
    except RevisionNotFoundError:
        raise PreflightError(f"{model} has no revision {revision!r} on the hub", "correct the revision") from None
    except RepositoryNotFoundError:
        hint = "check its spelling" + ("" if os.environ.get("HF_TOKEN") else "; for a private model set HF_TOKEN")
        raise PreflightError(f"the hub has no model {model}, or not for you", hint) from None
    except OfflineModeIsEnabled:
        return None, "offline mode is enabled"
    except Exception as error:  # no network has a hundred faces, none of which forbids to submit
        return None, f"the hub did not answer: {type(error).__name__}"


def _in_the_cache(model: str, revision: str) -> str | None:
    from huggingface_hub import constants

    reference = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "refs" / revision
    try:
        return reference.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
