"""Checks of a partition's Python and its packages, for preflight and doctor."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from labctl_orchestrator.preflight.finding import Check, Finding, Level, Subject, doubt, refuse, warn
from labctl_orchestrator.store import worker_code
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm import environments
from labctl_slurm.containers import Container
from labctl_slurm.errors import LabctlError
from labctl_slurm.partitions import Partition
from labctl_slurm.render import Script
from labctl_workers.engines import ENGINES, foreseen
from labctl_workers.engines.architectures import has_kernels
from labctl_workers.probe import VLLM_FOR_CPUS, Part, ProbeAnswer, Torch
from labctl_workers.record import JobSpec

PROBE_WITHIN_S = 180.0  # torch from a cold network filesystem


def versions(subject: Subject) -> Iterator[Finding]:
    """Packages that the partition's Python lacks, or has in a version that cannot use its GPU."""
    found: dict[str, environments.Installed | None] = {}
    for job in {(job.partition, job.backend, job.served): job for job in subject.plan.jobs}.values():
        partition = subject.partitions[job.partition]
        if job.partition not in found:
            found[job.partition] = environments.installed_in(partition, PACKAGES)
        installed = found[job.partition]
        if partition.python == sys.executable and any(map(ACTIVATES.search, partition.setup)):
            yield warn(
                f"setup in [partitions.{partition.name}] activates an environment, but jobs use labctl's Python",
                'set python = "python" there to use the activated environment',
            )
        if installed is not None:
            yield from _of_packages(job, installed)
        elif partition.image is not None:
            yield from _of_container(partition, partition.image)
        elif not partition.setup and "/" in partition.python and not Path(partition.python).exists():
            here = partition.executor == "local"
            yield Finding(
                "refuse" if here else "warn",
                f"Python of partition {partition.name!r} does not exist on this machine: {partition.python}",
                f"correct python in labctl.toml{'' if here else ', unless it exists on the nodes'}",
            )


ACTIVATES = re.compile(r"\b(?:conda|mamba|micromamba) activate\b|(?:^|[;&]\s*)(?:source|\.)\s+\S*/activate\b")
PACKAGES = ("torch", "transformers", "accelerate", "sentencepiece", "vllm", VLLM_FOR_CPUS, "lm_eval")


def _of_container(partition: Partition, container: Container) -> Iterator[Finding]:
    """Why labctl cannot inspect the container here."""
    name = partition.name
    if container.path is not None and not container.path.exists():
        yield refuse(
            f"image of partition {name!r} does not exist: {container.image}", "correct container in labctl.toml"
        )
    elif container.kind == "apptainer" and not partition.setup:
        if shutil.which("apptainer") is None:
            here = partition.executor == "local"
            yield Finding(
                "refuse" if here else "warn",
                "command not found on this machine: apptainer",
                "install it, or load its module in setup"
                if here
                else f"check the nodes: labctl doctor -p {name} --on-node",
            )
        else:
            yield warn(f"cannot run {partition.python_name}", f"labctl doctor -p {name} prints the error")


def _of_packages(job: JobSpec, installed: environments.Installed) -> Iterator[Finding]:
    refused = list(foreseen(job, None, installed.packages))
    yield from (refuse(refusal.message, refusal.remedy) for refusal in refused)
    if refused:
        return
    without_cuda = [name for name in ("torch", VLLM_FOR_CPUS) if _is_cpu_build(name, installed, job)]
    for name in without_cuda:
        yield refuse(
            f"the Python of partition {job.partition!r} has a CPU build of {name}: {installed.packages[name]}",
            f"create an environment for the partition's GPUs: labctl env -p {job.partition} --create PATH",
        )
    if without_cuda or (job.device == "cuda" and job.capability is None):
        return
    environment = environments.environment_for(job.capability, job.device)
    for package, version in environments.unfit(environment, installed, job.backend):
        yield doubt(
            f"Python of partition {job.partition!r} has {package.name} {version}; its GPUs need {package.name}{package.holds}",
            f"build a matching environment: labctl env -p {job.partition} --create PATH ({package.reason})",
        )


def _is_cpu_build(name: str, installed: environments.Installed, job: JobSpec) -> bool:
    """Whether a GPU job would use a CPU build of this package."""
    if job.device != "cuda" or name not in installed.packages:
        return False
    if name == "torch":
        return installed.packages[name].endswith("+cpu")
    return job.backend == "vllm" and "vllm" not in installed.packages


# ---------------------------------------------------------------- doctor


def of_python(partition: Partition) -> Iterator[Check]:
    """Checks of the partition's Python on this machine, with its `setup` and `env`."""
    name, image = partition.name, partition.image
    if image is not None and image.kind == "pyxis":
        remedy = f"labctl doctor -p {name} --on-node inspects the image"
        yield Check(name, "python", "warn", "pyxis starts containers in Slurm jobs only", remedy)
        return
    try:
        answer = _probe(partition)
    except ValueError as error:
        remedy = f"set python in [partitions.{name}] to a Python that exists here and on its nodes; check setup"
        if image is not None:
            remedy = f"check container, and set python in [partitions.{name}] to the Python in the image; check setup"
        yield Check(partition.name, "python", "fail", str(error), remedy)
    else:
        yield from of_answer(partition, answer)


def run_worker(
    partition: Partition, *words: str, within_s: float | None = None, variables: Mapping[str, str] | None = None
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run the partition's Python with these arguments and labctl's worker here, with its `setup` and `env`; also returns the last
    line of its standard error. Raises subprocess.TimeoutExpired."""
    with tempfile.TemporaryDirectory(prefix="labctl-worker-") as folder:
        here = Workspace(Path(folder))
        worker_code.keep_code(here)
        code = here.code / worker_code.code_name()
        script = Script(partition, "labctl", 0, None, Path("logs"), code, here.templates)
        shell, environment = script.without_slurm(script.worker_command(*words))
        done = subprocess.run(
            ["/bin/bash", "-c", shell],
            env={**environment, **(variables or {})},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
        )
    return done, next(filter(None, map(str.strip, reversed(done.stderr.splitlines()))), "")


def _probe(partition: Partition) -> ProbeAnswer:
    """Run the probe in the partition's Python. Raises ValueError if it does not answer."""
    try:
        done, last = run_worker(partition, "-m", "labctl_workers.probe", within_s=PROBE_WITHIN_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{partition.python_name} did not answer within {PROBE_WITHIN_S:.0f} s") from None
    try:
        return msgspec.json.decode(done.stdout.splitlines()[-1], type=ProbeAnswer)
    except (ValueError, IndexError):
        reason = last or f"exit code {done.returncode}, no output"
        raise ValueError(f"{partition.python_name}: {reason}") from None


def of_answer(partition: Partition, answer: ProbeAnswer) -> Iterator[Check]:
    """Checks of a probe's answer: Python, torch, transformers, vllm."""
    name, environment = partition.name, f"labctl env -p {partition.name} prints a matching environment"
    where = f"{answer.executable}, Python {answer.python}"
    old = tuple(int(part) for part in answer.python.split(".")[:2]) < (3, 10)
    if old or answer.worker.error:
        why = "older than 3.10" if old else f"cannot import labctl's worker: {answer.worker.error}"
        yield Check(name, "python", "fail", f"{where}: {why}", f"use another Python; {environment}")
        return
    yield Check(name, "python", "pass", f"{where}: it can run labctl's worker")
    if not answer.packages["torch"]:
        yield Check(name, "torch", "fail", "not installed", f"install it into {answer.executable}; {environment}")
        return
    unfit = _unfit(partition, answer)
    yield _of_torch(partition, answer.torch, unfit.get("torch"), environment)
    for package, other, backends in (
        ("transformers", "vllm", "--backend hf and --backend staged"),
        ("vllm", "transformers", "--backend vllm"),
    ):
        version = answer.packages[package]
        if version is None:
            level: Level = "warn" if answer.packages[other] else "fail"
            yield Check(name, package, level, f"not installed: {backends} cannot run", environment)
        elif package in unfit:
            yield Check(name, package, "fail", f"{version}: {unfit[package]}", environment)
        elif package == "transformers" and not answer.packages.get("accelerate"):
            yield Check(
                name,
                package,
                "fail",
                f"{version}, without accelerate",
                f"install it: {answer.executable} -m pip install accelerate",
            )
        else:
            shown = environments.shown_version(package, answer.packages) or version
            if shown == version or _uses_cpus(partition, answer.torch.answer):
                yield Check(name, package, "pass", shown)
            else:
                yield Check(name, package, "fail", f"{shown}, but the partition uses GPUs", environment)


def _unfit(partition: Partition, answer: ProbeAnswer) -> dict[str, str]:
    """Packages whose version cannot work on the partition's hardware, with the reason (environments.toml)."""
    device = "cpu" if partition.device == "cpu" else "cuda"
    if device == "cuda" and partition.capability is None:
        return {}
    try:
        environment = environments.environment_for(partition.capability, device)
    except LabctlError as error:
        return {"torch": error.message}
    here = {name: version for name, version in answer.packages.items() if version is not None}
    installed = environments.Installed(answer.python, here)
    found = [one for backend in ENGINES for one in environments.unfit(environment, installed, backend)]
    return {package.name: f"needs {package.holds}: {package.reason}" for package, _ in found}


def _uses_cpus(partition: Partition, torch: Torch | None) -> bool:
    return partition.device == "cpu" or (partition.device == "auto" and torch is not None and not torch.cuda)


def _of_torch(partition: Partition, found: Part[Torch], unfit: str | None, environment: str) -> Check:
    name, torch, capability = partition.name, found.answer, partition.capability
    if torch is None:
        return Check(name, "torch", "fail", f"cannot import torch: {found.error}", environment)
    text = f"{torch.version}, CUDA {torch.cuda}" if torch.cuda else f"{torch.version}, built without CUDA"
    if _uses_cpus(partition, torch):
        return Check(name, "torch", "pass", f"{text}; the partition uses CPUs")
    if not torch.cuda:
        return Check(name, "torch", "fail", f"{text}, but the partition uses GPUs", environment)
    if capability is None:
        remedy = f"set capability in [partitions.{name}]; --on-node shows it"
        return Check(name, "torch", "warn", f"{text}; cannot tell whether torch supports the GPU", remedy)
    if not has_kernels(capability, torch.arch_list):
        has = " ".join(torch.arch_list) or "none"
        what = f"{text}: no kernels for compute capability {capability} (only {has})"
        return Check(name, "torch", "fail", what, environment)
    if unfit:
        return Check(name, "torch", "fail", f"{text}: {unfit}", environment)
    return Check(name, "torch", "pass", f"{text}, with kernels for compute capability {capability}")
