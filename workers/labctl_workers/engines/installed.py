"""What this Python has installed, and where what it compiles is kept: without importing any of it."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path

from labctl_workers.record import JobSpec


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed version of each package, by distribution name; those that are missing are left out."""
    found = {package: _installed_version(package) for package in packages}
    return {package: version for package, version in found.items() if version is not None}


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_hint(job: JobSpec) -> str:
    """Where the partition's Python gets the packages for its hardware from: which they are is data of the login node's."""
    return f"labctl env -p {job.partition} prints the environment that fits this GPU, and builds it with --create PATH"


def keep_compiled_in(folder: Path) -> None:
    """Have torch and Triton keep what they compile in `folder`, unless the user chose another place. To be called before
    torch is imported."""
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(variable, str(folder / name))
