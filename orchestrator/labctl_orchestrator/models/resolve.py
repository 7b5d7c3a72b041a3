"""The model that a name selects: a Hub id pinned to a commit, or a local folder identified by its content."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from labctl_orchestrator.models.file_hashes import Progress, file_hashes
from labctl_orchestrator.models.hub_cache import fetched_commit, find
from labctl_orchestrator.models.hub_errors import hub_error
from labctl_orchestrator.models.weight_files import WEIGHTS, check_complete
from labctl_orchestrator.request.paths import expand_home
from labctl_slurm.errors import PreflightError, WrongUseError
from labctl_workers.checkpoint_files import checkpoint_files, stamp
from labctl_workers.engines.lora import CONFIG as ADAPTER_CONFIG
from labctl_workers.record import ModelRef, sha256_of_json

HUB_ANSWER_WITHIN_S = 5.0
FOLDER_OR_ID = "give a folder, or a Hub id such as org/name"


def resolve(
    model: str, revision: str = "main", offline_caches: Iterable[Path] = (), progress: Progress | None = None
) -> tuple[ModelRef, str | None]:
    """(the model, why it could not be pinned or None). Raises WrongUseError or PreflightError.

    `offline_caches`: caches of partitions whose nodes cannot reach the Hub; a model in one of them is used at its fetched
    commit, even if the Hub's branch has moved. `progress` receives the bytes read of a folder.
    """
    if is_folder(model):
        folder = expand_home(model).resolve()
        check_folder(folder)
        check_complete(folder)
        return of_folder(folder, progress), None
    if model.startswith(("/", "./", "../", "~")):
        remedy = "give the folder of a checkpoint, or a Hub id such as org/name"
        raise WrongUseError(f"no such folder: {expand_home(model)}", remedy)
    check_id(model)
    for cache in offline_caches:
        cached = find(cache, model, revision)
        if cached and cached.complete:
            return ModelRef(name=model, revision=cached.commit), None
    return _hub(model, revision)


def is_folder(model: str) -> bool:
    """Whether a model is given by its folder. Raises WrongUseError for an invalid path."""
    try:
        return expand_home(model).is_dir()
    except OSError as error:
        raise WrongUseError(f"invalid model path: {model[:40]}…: {error.strerror}", FOLDER_OR_ID) from None


def check_folder(folder: Path) -> None:
    """Raises WrongUseError for a folder without a checkpoint."""
    if not (folder / "config.json").is_file():
        raise WrongUseError(f"no config.json in {folder}", "give the folder of a transformers checkpoint")
    if not any(file.suffix in WEIGHTS for file in folder.iterdir()):
        raise WrongUseError(f"no weights in {folder}", "save the model there as safetensors (save_pretrained)")


def adapter(folder: str, progress: Progress | None = None) -> ModelRef:
    """A LoRA adapter, identified as a local checkpoint is. Raises WrongUseError for a folder without one, PreflightError for a
    file that changes during reading."""
    path = expand_home(folder).resolve()
    if not is_folder(folder) or not (path / ADAPTER_CONFIG).is_file():
        remedy = "give the folder of an adapter; of a Hub adapter: hf download ORG/NAME --local-dir FOLDER"
        raise WrongUseError(f"no {ADAPTER_CONFIG} in {folder}", remedy)
    return of_folder(path, progress)


def of_folder(folder: Path, progress: Progress | None = None) -> ModelRef:
    """A local checkpoint or adapter, identified by the SHA-256 of names and hashes of all files that an engine may load.

    Raises WrongUseError for an unreadable file, PreflightError for a file that changes during reading.
    """
    files = checkpoint_files(folder)
    try:
        before = stamp(files)
        hashes = file_hashes(list(files.values()), progress)
    except OSError as error:
        raise WrongUseError(
            f"cannot read {error.filename or folder}: {error.strerror}", "repair the checkpoint"
        ) from None
    fingerprint = sha256_of_json(list(zip(files, hashes, strict=True)))
    return ModelRef(name=folder.name, path=str(folder), fingerprint=fingerprint, stamp=before)


def check_id(model: str) -> None:
    """Raises WrongUseError for an invalid Hub id."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in __all__

    try:
        validate_repo_id(model)
        if not model.isascii():  # older validators accept such letters
            raise HFValidationError(model)
    except HFValidationError:
        raise WrongUseError(f"neither a folder nor a Hub id: {model!r}", FOLDER_OR_ID) from None


def _hub(model: str, revision: str) -> tuple[ModelRef, str | None]:
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return ModelRef(name=model, revision=revision), None
    from huggingface_hub import constants

    pinned, why_not = _hub_commit(model, revision)
    pinned = pinned or fetched_commit(Path(constants.HF_HUB_CACHE), model, revision)
    if pinned is not None:
        return ModelRef(name=model, revision=pinned), None
    if "/" not in model:
        raise PreflightError(
            f"no folder {model} here, and {why_not}", "give the path of a folder, or org/name of a Hub model"
        )
    unpinned = f"{model} is not pinned to a commit, because {why_not}; each job loads the newest {revision!r}"
    return ModelRef(name=model, revision=revision), unpinned


def _hub_commit(model: str, revision: str) -> tuple[str | None, str]:
    """(the commit, "") or (None, why the Hub gave none)."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None, "HF_HUB_OFFLINE is set"
    try:
        return HfApi().model_info(model, revision=revision, timeout=HUB_ANSWER_WITHIN_S).sha, ""
    except Exception as error:
        known = hub_error(error, model, revision)
        if isinstance(known, PreflightError):
            raise known from None
        return None, known.message if known else f"the Hub did not answer ({type(error).__name__})"
