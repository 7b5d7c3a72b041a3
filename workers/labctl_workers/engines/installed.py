"""What this Python has installed, and where what it compiles is kept: without importing any of it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

from labctl_workers.record import JobSpec


def install_hint(job: JobSpec) -> str:
    """Where the partition's Python gets the packages for its hardware from: which they are is data of the login node's."""
    return f"labctl env -p {job.partition} prints the environment that fits this GPU, and builds it with --create PATH"


def keep_compiled_in(folder: Path) -> None:
    """Have torch and Triton keep what they compile in `folder`, unless the user chose another place. To be called before
    torch is imported."""
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(variable, str(folder / name))


def assemble_with_that_of(package: str) -> None:
    """Have Triton assemble with the ptxas that torch brings, where it brings one and the user chose none.

    torch says so itself, but in the middle of its work: what it compiled before then has Triton's own assembler in its
    key, and is compiled again by the next job, which looks for it under torch's. To be called before torch is imported.
    """
    with contextlib.suppress(ValueError):  # it was imported, or kept from being so, before
        found = importlib.util.find_spec(package)
        if found is not None and found.origin:
            assembler = Path(found.origin).parent / "bin" / "ptxas"
            if assembler.is_file() and os.access(assembler, os.X_OK):
                os.environ.setdefault("TRITON_PTXAS_PATH", str(assembler))


def keep_bytecode_in(folder: Path, package: str) -> None:
    """Have Python keep the bytecode of what it imports in `folder`, where none can be kept beside the package's source.

    In a shared environment that the user may not write to, or a container that sets PYTHONDONTWRITEBYTECODE, every job
    else compiles some thousands of modules anew while its GPUs wait. To be called before the package is imported; the
    processes that an engine starts do the same. PYTHONPYCACHEPREFIX of the user's own wins.
    """
    if sys.pycache_prefix is not None or _has_bytecode(package):
        return
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder)
    sys.pycache_prefix, sys.dont_write_bytecode = str(folder), False


def _has_bytecode(package: str) -> bool:
    """Whether the package's bytecode lies beside its source, or will after the first import; also for no such package."""
    try:
        found = importlib.util.find_spec(package)
    except ValueError:  # it was imported, or kept from being so, before
        return True
    if found is None or not found.submodule_search_locations:
        return True
    beside = Path(next(iter(found.submodule_search_locations)))
    if not sys.dont_write_bytecode and os.access(beside, os.W_OK):
        return True
    return all(Path(importlib.util.cache_from_source(str(source))).exists() for source in beside.glob("*.py"))
