"""The environment that a partition's Python needs: which versions hold its GPU, as data with reasons; and what it has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import msgspec

from labctl_slurm.errors import LabctlError, PreflightError, WrongUseError
from labctl_slurm.partitions import Partition
from labctl_workers import probe

ANSWER_WITHIN_S = 3.0
STDERR = 2


class Package(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One requirement, in pip's form, and why. `holds` bounds the versions that can work at all, but for builds whose local
    version names one of `but`; `needed_by` are backends."""

    requirement: str
    reason: str
    needed_by: tuple[str, ...]
    holds: str = ""
    but: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return re.split(r"[<>=!~ \[]", self.requirement)[0]


class Environment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the Python of a kind of hardware needs. `least` and `below` bound the compute capability ("": no GPU), `python` is
    the first and the last version that will do, `torch_backend` what uv is told."""

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
    """The environment for GPUs of this compute capability, or for a CPU. Raises PreflightError where the capability is not
    known (None), and for GPUs that no version which labctl supports can use."""
    known = shipped()
    if device == "cpu":
        return known["cpu"]
    if capability is None:
        raise PreflightError(
            "the compute capability of the GPU is not known",
            "set capability of the partition in labctl.toml; on a node: nvidia-smi --query-gpu=compute_cap --format=csv",
        )
    for environment in known.values():
        if environment.least and float(environment.least) <= float(capability) < float(environment.below):
            return environment
    raise PreflightError(
        f"no torch and vLLM that labctl supports hold compute capability {capability}",
        "take a partition whose GPUs are a V100 or later",
    )


# ---------------------------------------------------------------- what a Python has


class Installed(msgspec.Struct, frozen=True):
    """A Python as it is: its version, and the version of each package that was asked for and is there, by distribution."""

    python: str
    packages: dict[str, str]


def installed_in(partition: Partition, packages: Sequence[str]) -> Installed | None:
    """What the partition's Python has, asked of it on this machine; nothing of it is imported but the standard library. None
    where it cannot be asked here: it is not seen from this machine, or `setup` is what brings it about."""
    if partition.setup:
        return None
    environment = {**os.environ, **partition.env}
    try:
        done = subprocess.run(
            [partition.python, probe.__file__, "--packages", *packages],
            env=environment,
            capture_output=True,
            text=True,
            timeout=ANSWER_WITHIN_S,
            check=False,
        )
        return msgspec.json.decode(done.stdout, type=Installed)
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None


def unfit(environment: Environment, installed: Installed, backend: str) -> list[tuple[Package, str]]:
    """The packages whose installed version cannot work there, each with that version. What is missing is another matter."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    found = []
    for package in environment.packages_for([backend]):
        text = installed.packages.get(package.name)
        if text is None or not package.holds:
            continue
        try:
            version = Version(text)
        except InvalidVersion:  # of a build of somebody's own: nobody knows
            continue
        excepted = any(mark in (version.local or "") for mark in package.but)
        if not excepted and not SpecifierSet(package.holds).contains(version, prereleases=True):
            found.append((package, text))
    return found


# ---------------------------------------------------------------- build


def commands(environment: Environment, backends: Iterable[str], folder: Path) -> list[list[str]]:
    """The commands that build it: with uv where it is installed, else with venv and pip. Raises PreflightError where no
    Python of a fitting version is here."""
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
    """The newest Python from `first` to `last` on this machine's PATH, this one among them."""
    major = int(first.split(".", maxsplit=1)[0])
    for minor in range(int(last.split(".")[1]), int(first.split(".")[1]) - 1, -1):
        if sys.version_info[:2] == (major, minor):
            return sys.executable
        found = shutil.which(f"python{major}.{minor}")
        if found:
            return found
    raise PreflightError(
        f"no Python from {first} to {last} is on this machine's PATH",
        "load one (module load python), or install uv, which brings its own",
    )


def create(environment: Environment, backends: Iterable[str], folder: Path) -> Path:
    """Build the environment; its output is shown on standard error. Returns its Python. Raises WrongUseError for a folder that
    is there already, LabctlError where a command fails. Nothing is left of an environment that is not whole."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WrongUseError(f"{folder} is there already", "give --create a folder that is not")
    was_there = folder.exists()
    try:
        _make(environment, backends, folder)
    except BaseException:
        _remove_what_was_made(folder, and_itself=not was_there)
        raise
    return folder / "bin" / "python"


def _remove_what_was_made(folder: Path, *, and_itself: bool) -> None:
    """All that is in a folder that was empty before, or was not there."""
    for made in folder.iterdir() if folder.is_dir() else ():
        if made.is_dir() and not made.is_symlink():
            shutil.rmtree(made, ignore_errors=True)
        else:
            made.unlink(missing_ok=True)
    if and_itself and folder.is_dir():
        folder.rmdir()


def _make(environment: Environment, backends: Iterable[str], folder: Path) -> None:
    for command in commands(environment, backends, folder):
        print("$ " + " ".join(command), file=sys.stderr, flush=True)
        done = subprocess.run(command, stdout=STDERR, stdin=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise LabctlError(
                f"{Path(command[0]).name} ended with status {done.returncode}",
                "its own words are above; mend that and try again: nothing is left of it",
            )
