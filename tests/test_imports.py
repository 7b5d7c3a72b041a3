"""Imports run one way, and each side loads without what only the other needs."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("labctl_orchestrator", "labctl_slurm", "labctl_templates", "labctl_workers")
# What a package may import of the others.
MAY_IMPORT = {
    "labctl_orchestrator": {"labctl_slurm", "labctl_templates", "labctl_workers"},
    "labctl_slurm": {"labctl_templates", "labctl_workers"},
    "labctl_templates": set(),
    "labctl_workers": set(),
}
OF_THE_WORKERS = {
    "record",
    "engines",
    "measure",
    "job",
    "probe",
    "environment",
    "checkpoint_files",
    "workload",
    "search",
}
ENGINES = {"torch", "transformers", "vllm", "accelerate", "tokenizers", "safetensors", "numpy", "lm_eval"}


@dataclass(frozen=True)
class Import:
    """One import of one module, wherever it stands; `module` is its whole name."""

    file: Path
    line: int
    module: str
    within_a_function: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def imports_in(tree: ast.AST, file: Path, *, within: bool = False, for_types: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if (
            isinstance(node, ast.If)
            and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
            and not for_types
        ):
            continue  # never imported
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, alias.name, within) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute here"
            for alias in node.names:  # "from labctl_workers import measure" imports labctl_workers.measure
                yield Import(file, node.lineno, f"{node.module}.{alias.name}", within)
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_in(node, file, within=within or function, for_types=for_types)


def imports_of(package: str, *, for_types: bool = False) -> list[Import]:
    files = sorted((ROOT / package.removeprefix("labctl_") / package).rglob("*.py"))
    assert files
    return [
        found
        for file in files
        for found in imports_in(ast.parse(file.read_text(encoding="utf-8")), file, for_types=for_types)
    ]


def told(wrong: list[Import]) -> str:
    return "\n".join(map(str, wrong))


# ---------------------------------------------------------------- one way


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_from_the_orchestrator_to_slurm_to_the_templates(package: str) -> None:
    allowed = {package, *MAY_IMPORT[package]}
    wrong = [found for found in imports_of(package) if found.package in PACKAGES and found.package not in allowed]
    assert not wrong, told(wrong)


@pytest.mark.parametrize("package", ["labctl_orchestrator", "labctl_slurm"])
def test_the_login_node_imports_only_the_contract_of_the_worker(package: str) -> None:
    wrong = [
        found
        for found in imports_of(package)
        if found.package == "labctl_workers" and found.module.split(".")[1] not in OF_THE_WORKERS
    ]
    assert not wrong, told(wrong)


def test_only_submitting_imports_the_workers_job() -> None:
    users = {found.file.name for found in imports_of("labctl_slurm") if found.module.startswith("labctl_workers.job")}
    assert users == {"executor.py"}


def test_the_worker_imports_the_standard_library_and_itself_alone() -> None:
    allowed = {*sys.stdlib_module_names, "labctl_workers"}
    outside = [found for found in imports_of("labctl_workers") if found.package not in allowed]
    wrong = [found for found in outside if not found.within_a_function]
    assert not wrong, told(wrong)


def test_the_worker_imports_what_it_was_given_within_functions_and_engines_in_engines() -> None:
    given = {"pynvml", "submitit"}  # labctl copies them beside the worker
    outside = [
        found
        for found in imports_of("labctl_workers")
        if found.package not in {*sys.stdlib_module_names, "labctl_workers", *given}
    ]
    wrong = [f for f in outside if not {"engines", "servers"} & {*f.file.parts} or f.package not in ENGINES]
    assert not wrong, told(wrong)


@pytest.mark.parametrize("package", ["labctl_orchestrator", "labctl_slurm", "labctl_templates"])
def test_nothing_on_the_login_node_imports_an_engine(package: str) -> None:
    wrong = [found for found in imports_of(package) if found.package in ENGINES]
    assert not wrong, told(wrong)


# The folders of the orchestrator, top to bottom: a module imports from its own folder and from those below.
ROOMS = (
    "cli", "exercises", "report", "terminal", "submission", "preflight", "tracking", "analysis", "exchange", "store", "models",
    "request",
)  # fmt: skip


def test_every_folder_of_the_orchestrator_has_its_place() -> None:
    home = ROOT / "orchestrator" / "labctl_orchestrator"
    assert {path.parent.name for path in home.glob("*/__init__.py")} == set(ROOMS)
    assert {path.name for path in home.glob("*.py")} == {"__init__.py", "api.py"}


def test_imports_between_the_folders_of_the_orchestrator_run_downwards() -> None:
    wrong = []
    for found in imports_of("labctl_orchestrator", for_types=True):
        room = found.file.parent.name
        if found.package == "labctl_orchestrator" and room in ROOMS:
            target = found.module.split(".")[1]
            wrong += [found] if target not in ROOMS or ROOMS.index(target) < ROOMS.index(room) else []
    assert not wrong, told(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    """Those inside functions and those for types count too."""
    home = ROOT / package.removeprefix("labctl_")
    names = {
        path.relative_to(home).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
        for path in (home / package).rglob("*.py")
    }
    graph = graphlib.TopologicalSorter[str]()
    for name, path in names.items():
        imported = {
            found.module for found in imports_in(ast.parse(path.read_text(encoding="utf-8")), path, for_types=True)
        }
        imported = {module if module in names else module.rpartition(".")[0] for module in imported}
        graph.add(name, *(imported & set(names) - {name}))
    graph.prepare()  # raises CycleError, which names the circle


# ---------------------------------------------------------------- what is loaded when


def loaded_by(code: str, *flags: str, **environment: str) -> set[str]:
    """The modules that a fresh Python has loaded after this code; what the code prints is dropped."""
    ask = "import atexit, os, sys\natexit.register(lambda: os.write(2, ('loaded ' + ' '.join(sys.modules)).encode()))\n"
    done = subprocess.run(
        [sys.executable, *flags, "-c", ask + code],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    said, found, modules = done.stderr.rpartition("loaded ")
    assert found and done.returncode == 0, said
    return set(modules.split())


HEAVY = {
    "torch",
    "transformers",
    "vllm",
    "numpy",
    "submitit",
    "msgspec",
    "sqlite_utils",
    "rich",
    "jinja2",
    "huggingface_hub",
}


@pytest.mark.parametrize("arguments", ["['--help']", "['--version']"])
def test_the_help_of_labctl_loads_nothing_heavy(arguments: str) -> None:
    loaded = loaded_by(f"from labctl_orchestrator.cli import main\nmain({arguments})")
    assert "click" in loaded
    assert not HEAVY & loaded


def test_the_help_of_no_command_loads_an_engine_or_submitit() -> None:
    from labctl_orchestrator.cli import COMMANDS

    code = "from labctl_orchestrator.cli import run\n"
    code += "".join(f"assert run([{name!r}, '--help']) == 0\n" for name in COMMANDS)
    assert not {"torch", "transformers", "vllm", "submitit"} & loaded_by(code)


def test_the_worker_loads_without_the_login_node_and_without_an_engine() -> None:
    loaded = loaded_by("import labctl_workers.job, labctl_workers.engines.hf")
    assert not {"click", "labctl_orchestrator", "labctl_slurm", "labctl_templates", "pynvml", *HEAVY} & loaded


def test_the_worker_loads_where_only_the_standard_library_is_installed() -> None:
    loaded = loaded_by("import labctl_workers.job", "-S", PYTHONPATH=str(ROOT / "workers"))
    assert "labctl_workers.measure" in loaded


def test_knowing_the_backends_loads_no_engine() -> None:
    asked = "for name in ENGINES: engine_class(name).OPTIONS"
    loaded = loaded_by(f"from labctl_workers.engines import ENGINES, engine_class\n{asked}")
    assert not HEAVY & loaded


def test_the_page_on_architecture_shows_the_imports_as_they_are() -> None:
    draw = [sys.executable, str(ROOT / "docs" / "draw_imports.py"), "--check"]
    assert subprocess.run(draw, check=False).returncode == 0, "run python docs/draw_imports.py"
