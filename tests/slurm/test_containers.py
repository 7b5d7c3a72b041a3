"""Jobs inside of a real Apptainer on a real cluster: both engines, doctor, cancel, requeue. pyxis: against a recorded stub."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_checkpoint
from tests.parts import PartMissing, fail_or_skip
from tests.vllm_package import VLLM_CACHE, vllm_installed  # noqa: F401  a fixture

from .apptainer import binds, build_image, install_apptainer
from .chaos import SLEEPER
from .cluster import Process, SlurmCluster
from .conftest import CPU_PARTITIONS, Lab, lengths, states, until
from .test_vllm_jobs import heartbeat, only_failure

INSIDE = "/opt/image/python"  # exists in the image alone
VERSIONS = ("torch", "transformers", "vllm")


@dataclass(frozen=True)
class Image:
    """A SIF file, and the folder of the program that starts it."""

    path: Path
    programs: Path

    def partition(self, name: str, container: str = "", extra: str = "") -> str:
        return f"""
[partitions.{name}]
device = "cpu"
container = "{container or f"apptainer:{self.path}"}"
container_binds = {json.dumps([*binds(), str(SLEEPER), *VLLM_CACHE.values()])}
python = "{INSIDE}"
{extra}
"""


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    """In CI a missing Apptainer is a failure, elsewhere a skip."""
    try:
        programs = install_apptainer()
    except PartMissing as missing:
        fail_or_skip(f"no Apptainer: {missing}")
    # Not below /tmp, which Apptainer binds: the worker sees what labctl binds.
    folder = Path(tempfile.mkdtemp(prefix="labctl-containers-", dir="/var/lib" if os.geteuid() == 0 else Path.home()))
    Path(*VLLM_CACHE.values()).mkdir(parents=True, exist_ok=True)
    try:
        build_image(programs, folder / "image.sif")
        yield Image(folder / "image.sif", programs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def contained(cluster: SlurmCluster, image: Image) -> Iterator[Lab]:
    """A workspace whose partition dgxh runs in the image, and dgx2 does not."""
    root = Path(tempfile.mkdtemp(prefix="lab-", dir=image.path.parent))
    (root / "home").mkdir()
    (root / "lab").mkdir()
    path = f"{image.programs}:{cluster.env['PATH']}"
    lab = Lab(root / "lab", cluster, {"HOME": str(root / "home"), "PATH": path, **VLLM_CACHE})
    lab.settings(image.partition("dgxh"))
    yield lab
    shutil.rmtree(root, ignore_errors=True)


def of_run(lab: Lab, run_id: str) -> dict[str, Any]:
    (record,) = lab.json("show", run_id)["records"]
    return dict(record)


@pytest.mark.parametrize("backends", [["hf"], pytest.param(["hf", "vllm"], marks=pytest.mark.nightly)], ids="-".join)
@pytest.mark.usefixtures("vllm_installed")
def test_an_engine_runs_in_the_container_and_the_record_names_the_image(
    contained: Lab, image: Image, shallow: Path, backends: list[str]
) -> None:
    """vLLM in `make test`: its versions in the image, below."""
    asked = ("--gpus", "1", "--model-id", str(shallow), "--dtype", "float32", "--repeats", "1", "--wait")
    runs = contained.json(
        "submit", "-p", "dgxh", *(f"--backend={name}" for name in backends), *asked, "--max-new-tokens", "4"
    )["runs"]
    assert {run["state"] for run in runs} == {"done"}, contained.labctl("logs").stdout
    named = {of_run(contained, run["run_id"])["fingerprint"]["container"] for run in runs}
    (name,) = named
    path, content = name.split()
    assert (path, len(content)) == (str(image.path), 12)
    texts = [of_run(contained, run["run_id"])["repeats"][0]["samples"][0]["token_ids"] for run in runs]
    assert len(texts) == len(backends)
    assert texts[0] == texts[-1]

    contained.settings(CPU_PARTITIONS)
    contained.json("submit", "-p", "dgxh", *asked, "--max-new-tokens", "5")
    warnings = contained.json("compare", "--all", "--by", "max_new_tokens", "--where", "backend=hf")["warnings"]
    assert f"the runs also differ in container ({name}, none)" in warnings


def runtime_of(worker: Process) -> set[Process]:
    """Apptainer, which was the job's shell, with all that it and that shell started."""
    parent = Process.of(int(Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[1]))
    assert parent is not None
    assert "pptainer" in Path(f"/proc/{parent.pid}/cmdline").read_text()
    return {parent, *parent.descendants()}


@pytest.mark.nightly
@pytest.mark.usefixtures("vllm_installed")
def test_scancel_leaves_no_process_of_a_vllm_job(contained: Lab, shallow: Path) -> None:
    assert contained.cluster.kill_wait_s >= 30  # it is not Slurm's SIGKILL that ends them
    (run,) = contained.json(
        "submit", "-p", "dgxh", "--backend", "vllm", "--dtype", "float32", "--model-id", str(shallow),
        "--max-new-tokens", "4000", "--ignore-eos",
    )["runs"]  # fmt: skip
    beats = contained.root / ".labctl" / "arrays"
    until(lambda: any(beats.glob("*/heartbeats/0.json")) and heartbeat(contained)["phase"] == "warm-up", 200)
    worker = Process.of(heartbeat(contained)["pid"])
    assert worker is not None
    processes = runtime_of(worker)
    assert len(processes) >= 6  # Apptainer, the loop that calls scontrol, the worker, vLLM's core and its two workers
    contained.cluster.run("scancel", run["slurm_id"])
    until(lambda: not any(process.alive() for process in processes), 15)
    assert only_failure(contained)["kind"] == "cancelled"
    assert states(contained) == {"cancelled": 1}


def sleeper(run_s: float, *, requeue: bool = True) -> str:
    """An engine that sleeps stands in."""
    variables = f'PYTHONPATH = "{SLEEPER}", SLEEPER_RUN_S = "{run_s}", SLEEPER_CHILD = "1"'
    return f"env = {{ {variables} }}\nsbatch = {{ {'requeue' if requeue else 'no-requeue'} = true }}"


def submitted(lab: Lab, *lengths: str) -> str:
    """The Slurm id of one job with a run of each length."""
    model = str(write_checkpoint(lab.root / "model"))
    runs = lab.json("submit", "-p", "dgxh", "--model-id", model, "--repeats=1", "--warmup=0", *lengths)["runs"]
    (slurm_id,) = {run["slurm_id"] for run in runs}
    return str(slurm_id)


def records(lab: Lab) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (lab.root / ".labctl" / "results").glob("*/[!.]*.json")]


def requeue_twice(lab: Lab) -> None:
    """By USR2, as before the time limit, and by scontrol outside, which sends SIGTERM."""
    slurm_id = submitted(lab, *lengths(6))
    until(lambda: states(lab)["done"] >= 1)
    lab.cluster.run("scancel", "--signal=USR2", "--batch", slurm_id)
    until(lambda: 1 in {record["attempt"]["restarts"] for record in records(lab)})
    lab.cluster.run("scontrol", "requeue", slurm_id)
    until(lambda: states(lab) == {"done": 6}, 150)
    assert {record["attempt"]["restarts"] for record in records(lab)} == {0, 1, 2}
    assert [record["failure"] for record in records(lab) if record["failure"]] == []


def test_a_requeued_job_goes_on(contained: Lab, image: Image) -> None:
    """The image has no scontrol, which the worker needs for both."""
    contained.settings(image.partition("dgxh", extra=sleeper(1.5)))
    requeue_twice(contained)


def check_doctor(lab: Lab) -> None:
    """The job's answer has the versions in the image, and no fault."""
    checks = {
        check["name"]: check for check in json.loads(lab.labctl("doctor", "-p", "dgxh", "--on-node", "--json").stdout)
    }
    assert checks["node"]["text"].startswith("dgxh-")
    assert importlib.metadata.version("torch") in checks["node's torch"]["text"]
    assert checks["node's transformers"]["text"] == importlib.metadata.version("transformers")
    on_node = {
        check["level"] for name, check in checks.items() if name.startswith("node's ") and name != "node's network"
    }
    assert on_node == {"pass"}


@pytest.mark.usefixtures("vllm_installed")
def test_doctor_on_node_reads_the_versions_in_the_image(contained: Lab) -> None:
    check_doctor(contained)


@pytest.mark.usefixtures("vllm_installed")
def test_preflight_and_env_ask_the_python_in_the_image(contained: Lab, image: Image) -> None:
    model = str(write_checkpoint(contained.root / "model"))

    def found(text: str, **variables: str) -> tuple[int, str]:
        contained.settings(text)
        done = contained.labctl("submit", "-p", "dgxh", "--model-id", model, "--dry-run", **variables)
        return done.returncode, done.stderr

    there = image.partition("dgxh")
    assert found(there.replace(image.path.name, "gone.sif"))[0] == 3
    assert "image of partition 'dgxh' does not exist" in found(there.replace(image.path.name, "gone.sif"))[1]
    code, text = found(there.replace(INSIDE, "/usr/bin/python3"))  # this machine's, without an engine
    assert (code, "packages missing in the Python of partition dgxh: torch" in text) == (3, True)
    code, text = found(there.replace(INSIDE, "/opt/no-python"))
    assert (code, f"cannot run /opt/no-python in {image.path}" in text) == (0, True)
    if shutil.which("apptainer", path=(path := contained.cluster.env["PATH"])) is None:
        code, text = found(there, PATH=path)
        assert (code, "command not found on this machine: apptainer" in text) == (0, True)
    code, text = found(there)
    assert (code, "apptainer" in text, str(image.path) in text) == (0, False, False)
    installed = contained.json("env", "-p", "dgxh")["installed"]
    assert installed["packages"]["torch"] == importlib.metadata.version("torch")


# ---------------------------------------------------------------- pyxis, of which an own srun stands in


@pytest.fixture
def pyxis(contained: Lab, image: Image) -> Lab:
    path = f"{Path(__file__).parent / 'pyxis_stub'}:{contained.environment['PATH']}"
    contained.environment |= {"PATH": path, "PYXIS_STUB_LOG": str(contained.root / "srun.jsonl")}
    contained.settings(image.partition("dgxh", f"pyxis:{image.path}", sleeper(1.5)))
    return contained


def test_a_job_of_pyxis_is_requeued(pyxis: Lab, image: Image) -> None:
    requeue_twice(pyxis)
    calls = [json.loads(line) for line in (pyxis.root / "srun.jsonl").read_text().splitlines()]
    assert len(calls) == 3
    assert {call["--container-image"] for call in calls} == {str(image.path)}
    assert f"{pyxis.root}:{pyxis.root}" in calls[0]["--container-mounts"].split(",")
    assert {record["fingerprint"]["container"].split()[0] for record in records(pyxis)} == {str(image.path)}


@pytest.mark.nightly
@pytest.mark.usefixtures("vllm_installed")
def test_doctor_reads_the_image_of_pyxis_on_a_node_alone(pyxis: Lab) -> None:
    """In `make test`: doctor with Apptainer's image, and a job of pyxis, above."""
    check_doctor(pyxis)


def test_usr2_reaches_the_worker_alone_under_srun(pyxis: Lab, image: Image) -> None:
    """A job that cannot be requeued measures on."""
    pyxis.settings(image.partition("dgxh", f"pyxis:{image.path}", sleeper(6, requeue=False)))
    slurm_id = submitted(pyxis, "--max-new-tokens=2")
    until(lambda: pyxis.json("status")[0]["detail"].startswith("measuring"))
    pyxis.cluster.run("scancel", "--signal=USR2", "--batch", slurm_id)
    until(lambda: states(pyxis) == {"done": 1})
    assert "received USR2" in pyxis.labctl("logs", pyxis.json("status")[0]["run_id"]).stderr


def test_scancel_ends_a_job_of_pyxis(pyxis: Lab, image: Image) -> None:
    pyxis.settings(image.partition("dgxh", f"pyxis:{image.path}", sleeper(300)))
    slurm_id = submitted(pyxis, "--max-new-tokens=2")
    until(lambda: pyxis.json("status")[0]["detail"].startswith("measuring"))
    pyxis.cluster.run("scancel", slurm_id)
    until(lambda: states(pyxis) == {"cancelled": 1})
    assert only_failure(pyxis)["kind"] == "cancelled"
