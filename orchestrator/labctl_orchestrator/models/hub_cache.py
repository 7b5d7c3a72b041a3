"""The Hub cache, as nodes of a partition see it. It reads files only."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from labctl_orchestrator.models.weight_files import INDEXES, TOKENIZERS, WEIGHTS, names_in
from labctl_slurm.partitions import Partition
from labctl_workers.record import ModelRef

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Cached:
    """A snapshot in the cache. `missing` names files that a load needs and the cache lacks."""

    commit: str
    path: Path
    missing: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return not self.missing


def folder(partition: Partition | None = None) -> Path:
    """The cache folder of huggingface_hub, for jobs of this partition (its `env` may set it), else for this shell.

    HF_HUB_CACHE, else HF_HOME/hub, else XDG_CACHE_HOME/huggingface/hub, as in huggingface_hub.
    """
    variables = {**os.environ, **(partition.env if partition else {})}
    # The partition's HF_HOME takes precedence over this shell's HF_HUB_CACHE.
    if partition and "HF_HOME" in partition.env and "HF_HUB_CACHE" not in partition.env:
        variables.pop("HF_HUB_CACHE", None)
    cache_home = variables.get("XDG_CACHE_HOME") or "~/.cache"
    home = variables.get("HF_HOME") or f"{cache_home}/huggingface"
    return Path(os.path.expandvars(variables.get("HF_HUB_CACHE") or f"{home}/hub")).expanduser()


def repository(cache: Path, model: str) -> Path:
    """The cache folder of one model."""
    return cache / f"models--{model.replace('/', '--')}"


def find(cache: Path, model: str, revision: str | None) -> Cached | None:
    """The snapshot of a model at a commit, or at the last fetched commit of a branch or tag; None if there is none."""
    commit = revision or "main"
    if not COMMIT.fullmatch(commit):
        commit = fetched_commit(cache, model, commit) or ""
    snapshot = repository(cache, model) / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not snapshot.is_dir():
        return None
    return Cached(commit, snapshot, tuple(missing(snapshot)))


def fetched_commit(cache: Path, model: str, revision: str) -> str | None:
    """The last fetched commit of a branch or tag; None without one."""
    try:
        return (repository(cache, model) / "refs" / revision).read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None


def missing(snapshot: Path) -> list[str]:
    """Files that a load needs and this folder lacks. A link to a missing blob counts as missing."""
    absent = [] if (snapshot / "config.json").exists() else ["config.json"]
    if not any((snapshot / name).exists() for name in TOKENIZERS):
        absent.append("a tokenizer")
    for index in (snapshot / name for name in INDEXES):
        with suppress(OSError, ValueError):
            return absent + [shard for shard in names_in(index) if not (snapshot / shard).exists()]
    found = any(file.suffix in WEIGHTS and file.exists() for file in snapshot.iterdir())
    return absent if found else [*absent, "weights"]


def on_node(model: ModelRef, partition: Partition) -> ModelRef:
    """The model as a job of this partition loads it: on offline nodes, a cached Hub model by its snapshot's path.

    A model that is not in the cache stays unchanged; preflight reports it.
    """
    if model.path is not None or not partition.offline:
        return model
    cached = find(folder(partition), model.name, model.revision)
    return replace(model, path=str(cached.path), revision=cached.commit) if cached and cached.complete else model
