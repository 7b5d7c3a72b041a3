"""Which model is meant: a hub id pinned to a revision, or a local folder known by its content."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from labctl_orchestrator.models.file_hashes import Progress, file_hashes
from labctl_orchestrator.models.hub_cache import find
from labctl_orchestrator.models.hub_errors import told_of
from labctl_orchestrator.models.weight_files import WEIGHTS, check_whole
from labctl_orchestrator.request.paths import expand_home
from labctl_slurm.errors import PreflightError, WrongUseError
from labctl_workers.checkpoint_files import checkpoint_files, stamp
from labctl_workers.record import ModelRef, sha256_of_json

HUB_ANSWER_WITHIN_S = 5.0


def resolve(
    model: str, revision: str = "main", offline_caches: Iterable[Path] = (), progress: Progress | None = None
) -> tuple[ModelRef, str | None]:
    """The model and, where it could not be pinned, why. Raises WrongUseError or PreflightError, each with a remedy.

    `offline_caches` are of partitions whose nodes cannot ask the hub: what was fetched into one of them is meant, whatever
    the hub's branch has become since. `progress` is told how many bytes of a folder are read.
    """
    if is_folder(model):
        folder = expand_home(model).resolve()
        check_folder(folder)
        check_whole(folder)
        return of_folder(folder, progress), None
    if model.startswith(("/", "./", "../", "~")):
        raise WrongUseError(
            f"there is no folder {expand_home(model)}", "give the folder of a checkpoint, or a hub id such as org/name"
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
        return expand_home(model).is_dir()
    except OSError as error:
        raise WrongUseError(
            f"{model[:40]}… is no path: {error.strerror}", "give a folder, or a hub id such as org/name"
        ) from None


def check_folder(folder: Path) -> None:
    """Raises WrongUseError for a folder that holds no checkpoint."""
    if not (folder / "config.json").is_file():
        raise WrongUseError(f"{folder} has no config.json", "give the folder of a transformers checkpoint")
    if not any(file.suffix in WEIGHTS for file in folder.iterdir()):
        raise WrongUseError(f"{folder} holds no weights", "save the model there as safetensors (save_pretrained)")


def of_folder(folder: Path, progress: Progress | None = None) -> ModelRef:
    """A local checkpoint, known by SHA-256 over the name and the hash of every file that an engine may load.

    Raises WrongUseError for a folder that is no checkpoint or a file that cannot be read, PreflightError for a file that
    changes while it is read.
    """
    check_folder(folder)
    files = checkpoint_files(folder)
    try:
        before = stamp(files)
        hashes = file_hashes(list(files.values()), progress)
    except OSError as error:
        raise WrongUseError(f"{error.filename or folder}: {error.strerror}", "make the checkpoint whole") from None
    fingerprint = sha256_of_json(list(zip(files, hashes, strict=True)))
    return ModelRef(name=folder.name, path=str(folder), fingerprint=fingerprint, stamp=before)


def check_id(model: str) -> None:
    """Raises WrongUseError for what cannot be the id of a model on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in __all__

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

    if constants.HF_HUB_OFFLINE:
        return None, "HF_HUB_OFFLINE is set and it is not in the cache"
    try:
        return HfApi().model_info(model, revision=revision, timeout=HUB_ANSWER_WITHIN_S).sha, ""
    except Exception as error:
        told = told_of(error, model, revision)
        if isinstance(told, PreflightError):
            raise told from None
        return None, told.message if told else f"the hub did not answer: {type(error).__name__}"


def _in_the_cache(model: str, revision: str) -> str | None:
    from huggingface_hub import constants

    reference = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "refs" / revision
    try:
        return reference.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
