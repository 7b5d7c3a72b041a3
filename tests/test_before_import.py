"""Where Python keeps the bytecode of an engine, and with what Triton assembles: real interpreters, a package of two modules."""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKERS = Path(__file__).parent.parent / "workers"
IMPORTING = """
import sys
from pathlib import Path
from labctl_workers.engines.before_import import set_bytecode_cache
set_bytecode_cache(Path(sys.argv[1]), sys.argv[2])
import engine.part
import os, subprocess
subprocess.run([sys.executable, "-c", "import engine.later"], check=True)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "site" / "engine"
    folder.mkdir(parents=True)
    for name in ("__init__", "part", "later"):
        (folder / f"{name}.py").write_text("", encoding="utf-8")
    return folder


def bytecode_after_import(package: Path, tmp_path: Path, name: str = "engine", **variables: str) -> set[str]:
    """The modules whose bytecode lies in the cache after a process and a child of it imported the package."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")}
    environment |= {"PYTHONPATH": f"{WORKERS}:{package.parent}", **variables}
    subprocess.run([sys.executable, "-c", IMPORTING, str(tmp_path / "kept"), name], env=environment, check=True)
    return {found.name.partition(".")[0] for found in (tmp_path / "kept").rglob("engine/*.pyc")}


def test_bytecode_that_may_not_lie_beside_the_source_is_kept_in_the_cache_by_children_too(
    package: Path, tmp_path: Path
) -> None:
    assert bytecode_after_import(package, tmp_path, PYTHONDONTWRITEBYTECODE="1") == {"__init__", "part", "later"}
    assert not (package / "__pycache__").exists()


def test_bytecode_of_an_environment_that_the_user_cannot_write_to_is_kept_in_the_cache(
    package: Path, tmp_path: Path
) -> None:
    """Fault injection: root, which tests may run as, can write everywhere; so the system's answer is another."""
    (package.parent / "sitecustomize.py").write_text("import os; os.access = lambda *_: False", encoding="utf-8")
    assert bytecode_after_import(package, tmp_path) == {"__init__", "part", "later"}


def test_bytecode_lies_beside_the_source_where_that_can_be(package: Path, tmp_path: Path) -> None:
    assert bytecode_after_import(package, tmp_path) == set()
    assert {found.name.partition(".")[0] for found in package.rglob("*.pyc")} == {"__init__", "part", "later"}


def test_an_environment_that_came_with_its_bytecode_is_read_as_it_is(package: Path, tmp_path: Path) -> None:
    compileall.compile_dir(package, quiet=1)
    assert bytecode_after_import(package, tmp_path, PYTHONDONTWRITEBYTECODE="1") == set()


def test_a_place_that_the_user_chose_for_bytecode_stays(package: Path, tmp_path: Path) -> None:
    own = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(tmp_path / "own")}
    assert bytecode_after_import(package, tmp_path, **own) == set()


def test_an_engine_that_is_not_installed_changes_nothing(package: Path, tmp_path: Path) -> None:
    assert bytecode_after_import(package, tmp_path, "no_such_engine", PYTHONDONTWRITEBYTECODE="1") == set()


ASSEMBLING = """
import os, sys
from labctl_workers.engines.before_import import use_ptxas_of
use_ptxas_of(sys.argv[1])
print(os.environ.get("TRITON_PTXAS_PATH", "none"))
"""


def assembler_of(package: Path, name: str = "engine", **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_PTXAS_PATH"}
    environment |= {"PYTHONPATH": f"{WORKERS}:{package.parent}", **variables}
    command = [sys.executable, "-c", ASSEMBLING, name]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def test_triton_assembles_with_torchs_own_ptxas_unless_the_user_chose_another(package: Path) -> None:
    ptxas = package / "bin" / "ptxas"
    ptxas.parent.mkdir()
    ptxas.write_text("#!/bin/sh", encoding="utf-8")
    ptxas.chmod(0o755)
    assert assembler_of(package) == str(ptxas)
    assert assembler_of(package, TRITON_PTXAS_PATH="/chosen/ptxas") == "/chosen/ptxas"


def test_a_torch_without_a_ptxas_that_runs_leaves_triton_its_own(package: Path) -> None:
    assert assembler_of(package) == "none"
    assert assembler_of(package, "not_installed") == "none"
    (package / "bin").mkdir()
    (package / "bin" / "ptxas").write_text("no program", encoding="utf-8")
    assert assembler_of(package) == "none"
