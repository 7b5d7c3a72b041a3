"""Settings that take effect only before torch is imported: caches of compiled code and bytecode, and Triton's assembler."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

from labctl_workers.record import JobSpec


def install_hint(job: JobSpec) -> str:
    """The remedy for a Python without suitable packages."""
    return f"run labctl env -p {job.partition} to see the packages for this GPU; --create PATH installs them"


def set_compile_cache(folder: Path) -> None:
    """Make torch and Triton keep compiled code in `folder`, unless the user chose a folder. Call it before torch is imported."""
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(variable, str(folder / name))


def use_ptxas_of(package: str) -> None:
    """Make Triton use torch's ptxas, if torch has one and the user chose none. Call it before torch is imported.

    torch sets this itself, but late: code that it compiles before has Triton's own ptxas in its cache key, so the next job
    compiles it again.
    """
    with contextlib.suppress(ValueError):  # already imported, or blocked
        found = importlib.util.find_spec(package)
        if found is not None and found.origin:
            assembler = Path(found.origin).parent / "bin" / "ptxas"
            if assembler.is_file() and os.access(assembler, os.X_OK):
                os.environ.setdefault("TRITON_PTXAS_PATH", str(assembler))


def set_bytecode_cache(folder: Path, package: str) -> None:
    """Make Python keep bytecode in `folder`, if it cannot keep it beside the package's source.

    Otherwise, in a read-only environment or a container with PYTHONDONTWRITEBYTECODE, every job compiles thousands of modules
    while its GPUs wait. Call it before the package is imported; the engine's processes inherit it. A PYTHONPYCACHEPREFIX of
    the user takes precedence.
    """
    if sys.pycache_prefix is not None or _has_bytecode(package):
        return
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder)
    sys.pycache_prefix, sys.dont_write_bytecode = str(folder), False


def _has_bytecode(package: str) -> bool:
    """Whether the package's bytecode is beside its source, or will be after the first import; True for a missing package."""
    try:
        found = importlib.util.find_spec(package)
    except ValueError:  # already imported, or blocked
        return True
    if found is None or not found.submodule_search_locations:
        return True
    beside = Path(next(iter(found.submodule_search_locations)))
    if not sys.dont_write_bytecode and os.access(beside, os.W_OK):
        return True
    return all(Path(importlib.util.cache_from_source(str(source))).exists() for source in beside.glob("*.py"))
