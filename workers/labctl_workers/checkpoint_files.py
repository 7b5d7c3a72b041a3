"""The files of a checkpoint, and a stamp that shows whether they changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from labctl_workers.record import sha256_of_json

_DOCUMENTS = (".md", ".rst", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".ipynb", ".pyc")
_DOCUMENTS_BY_NAME = ("README", "LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "CHANGELOG")
_TRAINER_STATE = (
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "training_args.bin", "trainer_state.json", "latest",
)  # fmt: skip


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Every file that an engine may load, by its name below the folder, sorted: weights, configuration, tokenizer, chat
    templates, code. Follows links.

    Leaves out hidden files and folders (.git, .cache), documents, pictures, a trainer's state, and subfolders that are
    checkpoints themselves (checkpoint-500).
    """
    found: dict[str, Path] = {}
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(here))
        if Path(here) != folder and {"config.json", "adapter_config.json"}.intersection(names):
            folders.clear()
            continue
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name != "__pycache__" and os.path.realpath(Path(here, name)) not in seen
        )
        for name in names:
            file = Path(here, name)
            if _may_be_loaded(name) and (file.is_file() or file.is_symlink()):  # `stamp` reports a broken link
                found[file.relative_to(folder).as_posix()] = file
    return dict(sorted(found.items()))


def _may_be_loaded(name: str) -> bool:
    document = Path(name).suffix.lower() in _DOCUMENTS or Path(name).stem.upper() in _DOCUMENTS_BY_NAME
    return not (name.startswith((".", "rng_state")) or document or name in _TRAINER_STATE)


def stamp(files: Mapping[str, Path]) -> str:
    """A hash of the files' names, sizes and times. Times are in whole seconds: some shared file systems store no more.
    Raises OSError for a missing file."""
    stats = {name: file.stat() for name, file in files.items()}
    return sha256_of_json([(name, stat.st_size, int(stat.st_mtime)) for name, stat in stats.items()])
