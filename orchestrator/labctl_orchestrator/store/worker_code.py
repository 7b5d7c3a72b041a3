"""A copy of the worker package in the workspace, named by its hash: it documents what ran, and nodes need no labctl."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from labctl_orchestrator.store.workspace import Workspace
from labctl_workers.record import NODE_PACKAGES_FOLDER

# submitit needs NODE_PACKAGES to start the worker. They lie in a folder of their own: the worker adds it to sys.path after the
# packages of the partition's Python.
WORKER = "labctl_workers"
NODE_PACKAGES = ("submitit", "cloudpickle", "typing_extensions", "pynvml")


@cache
def code_name() -> str:
    """The name of the current worker code: the hash of its content, computed once per process."""
    digest = hashlib.sha256()
    for name, source in sorted(_code_files()):
        digest.update(f"{name}\0".encode() + source.read_bytes())
    return digest.hexdigest()[:12]


def keep_code(workspace: Workspace) -> None:
    """Copy the worker's code into the workspace, if it is not there."""
    folder = workspace.code / code_name()
    if folder.is_dir():
        return
    workspace.make_folder(workspace.code)
    staging = Path(tempfile.mkdtemp(prefix=".", dir=workspace.code))
    for name, source in _code_files():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, staging / name)
    staging.chmod(0o755)
    try:
        staging.rename(folder)
    except OSError:  # another labctl made the same copy meanwhile
        shutil.rmtree(staging)


def _code_files() -> Iterator[tuple[str, Path]]:
    for package in (WORKER, *NODE_PACKAGES):
        place = "" if package == WORKER else f"{NODE_PACKAGES_FOLDER}/"
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise RuntimeError(f"{package} is not installed beside labctl")
        origin = Path(spec.origin)
        if origin.name != "__init__.py":
            yield place + origin.name, origin
            continue
        for source in sorted([*origin.parent.rglob("*.py"), *origin.parent.glob("*.sh")]):
            if not source.name.startswith(("test_", "conftest")):
                yield f"{place}{package}/{source.relative_to(origin.parent)}", source
