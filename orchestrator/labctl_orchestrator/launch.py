"""Jobs -> files in the workspace, a script, and an entry in Slurm's queue.

What is about to be submitted is on disk before sbatch is called: a crash in between shows as an interrupted submission.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import secrets
import shlex
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from labctl_orchestrator import processes
from labctl_orchestrator.plan import Plan
from labctl_orchestrator.request import Request
from labctl_orchestrator.workspace import Workspace
from labctl_slurm.errors import SlurmError
from labctl_slurm.partitions import Partition
from labctl_slurm.render import Script
from labctl_workers.record import JobSpec, sha256_of_json, utc_now, write_json

# What the partition's Python is given: the worker, and what submitit needs to start it.
NODE_PACKAGES = ("labctl_workers", "submitit", "cloudpickle", "typing_extensions", "pynvml")


@dataclass(frozen=True)
class Batch:
    """One submission to Slurm: a job, or an array of jobs that share a script."""

    batch_id: str
    folder: Path
    script: Script
    jobs: list[JobSpec]

    @property
    def specs(self) -> list[Path]:
        return [self.folder / f"{task}.json" for task in range(len(self.jobs))]

    def text_by_hand(self) -> str:
        """The script as submitted, but for its command: the worker itself instead of submitit's entry."""
        python = shlex.quote(self.script.partition.python)
        folder = shlex.quote(str(self.folder))
        task = "0" if self.script.tasks is None else '"$SLURM_ARRAY_TASK_ID"'
        return self.script.text(f"{python} -u -m labctl_workers.job {folder}/{task}.json")


@dataclass
class Launched:
    """What became of a request: ids by run, and each refusal."""

    request_id: str
    run_ids: list[str]
    skipped: list[str]
    ids: dict[str, str] = field(default_factory=dict)
    refusals: list[SlurmError] = field(default_factory=list)


# ---------------------------------------------------------------- prepare


def planned(workspace: Workspace, plan: Plan, partitions: Mapping[str, Partition]) -> list[Batch]:
    """The plan's jobs in batches that share a script, each rendered once to see that it renders. Writes nothing."""
    code = workspace.code / code_name()
    groups: dict[tuple[str, int], list[JobSpec]] = {}
    for job in plan.jobs:  # an array is one script: one partition, one number of GPUs
        groups.setdefault((job.partition, job.gpus), []).append(job)
    return [_batch(workspace, partitions[name], jobs, code) for (name, _), jobs in groups.items()]


def prepare(workspace: Workspace, plan: Plan, partitions: Mapping[str, Partition]) -> list[Batch]:
    """Plan the batches and write all that their jobs need into the workspace."""
    batches = planned(workspace, plan, partitions)
    workspace.create()
    keep_code(workspace)
    for batch in batches:
        _write(batch)
    return batches


def _batch(workspace: Workspace, partition: Partition, jobs: list[JobSpec], code: Path) -> Batch:
    tasks = len(jobs) if len(jobs) > 1 else None
    script = Script(partition, "labctl", jobs[0].gpus, tasks, Path("logs"), code, workspace.templates)
    content = [script.text("command"), *(job.to_json() for job in jobs)]
    batch_id, folder = _free_folder(workspace, sha256_of_json(content)[:8])
    script = replace(script, job_name=f"labctl-{batch_id}", logs=folder / "submitit")
    return Batch(batch_id, folder, script, [replace(job, job_id=f"{batch_id}.{n}") for n, job in enumerate(jobs)])


def _write(batch: Batch) -> None:
    batch.script.logs.mkdir(parents=True, exist_ok=True)
    for path, job in zip(batch.specs, batch.jobs, strict=True):
        if not path.exists():  # its folder's name is the hash of its content
            write_json(path, job.to_json())
    if not (batch.folder / "batch.json").exists():
        document = {
            "batch_id": batch.batch_id,
            "partition": batch.script.partition.name,
            "executor": batch.script.partition.executor,
            "job_name": batch.script.job_name,
            "tasks": len(batch.jobs),
            "created_at": utc_now(),
        }
        write_json(batch.folder / "batch.json", document)


def _free_folder(workspace: Workspace, content: str) -> tuple[str, Path]:
    """The first folder of this content that nothing ran from. One that `labctl render` prepared is used: the script that
    it printed is then the script that is submitted."""
    for number in itertools.count(1):
        folder = workspace.batches / f"{content}-{number}"
        if not (folder / "intent.json").exists() and not (folder / "attempts").exists():
            return folder.name, folder
    raise AssertionError("itertools.count ends")


@cache
def code_name() -> str:
    """The name of the worker's code as it is now: the hash of its content, read once in a process."""
    digest = hashlib.sha256()
    for name, source in sorted(_code_files()):
        digest.update(f"{name}\0".encode() + source.read_bytes())
    return digest.hexdigest()[:12]


def keep_code(workspace: Workspace) -> None:
    """Copy the worker's code into the workspace: what ran is kept, and the node needs no install of labctl."""
    folder = workspace.code / code_name()
    if folder.is_dir():
        return
    workspace.code.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".", dir=workspace.code))
    for name, source in _code_files():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, staging / name)
    staging.chmod(0o755)
    try:
        staging.rename(folder)
    except OSError:  # another labctl was faster: its copy is the same
        shutil.rmtree(staging)


def _code_files() -> Iterator[tuple[str, Path]]:
    for package in NODE_PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise RuntimeError(f"{package} is not installed beside labctl")
        origin = Path(spec.origin)
        if origin.name != "__init__.py":
            yield origin.name, origin
            continue
        for source in sorted(origin.parent.rglob("*.py")):
            if not source.name.startswith(("test_", "conftest")):
                yield f"{package}/{source.relative_to(origin.parent)}", source


# ---------------------------------------------------------------- launch


def launch(
    workspace: Workspace, request: Request, plan: Plan, batches: Sequence[Batch], skipped: Sequence[str]
) -> Launched:
    """Write the request down and submit its batches. A refusal of one batch leaves the others as they are."""
    launched = Launched(new_request_id(), [run.run_id for run in plan.runs], list(skipped))
    write_json(workspace.requests / f"{launched.request_id}.json", _request_document(launched, request, plan))
    for batch in batches:
        try:
            ids = _submit(batch, launched.request_id)
        except SlurmError as error:
            launched.refusals.append(error)
            continue
        for job, slurm_id in zip(batch.jobs, ids, strict=True):
            launched.ids.update({run.run_id: slurm_id for run in job.runs})
    return launched


def _submit(batch: Batch, request_id: str) -> list[str]:
    from labctl_slurm import executor

    intent = {"request_id": request_id, "at": utc_now(), "host": socket.gethostname(), "pid": os.getpid()}
    _claim(batch.folder / "intent.json", intent)
    try:
        ids = executor.submit(batch.script.logs, batch.script, batch.specs)
    except SlurmError as error:
        said = {"refused": error.message, "remedy": error.remedy, "at": utc_now()}
        write_json(batch.folder / "submitted.json", said)
        raise
    done: dict[str, Any] = {"ids": ids, "at": utc_now(), "host": socket.gethostname()}
    if batch.script.partition.executor == "local":
        done["starts"] = [processes.start_of(int(pid)) for pid in ids]
    write_json(batch.folder / "submitted.json", done)
    return ids


def _claim(path: Path, intent: Mapping[str, Any]) -> None:
    """Take the batch: of two labctl that prepared the same one, the second is told."""
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(intent, file)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise SlurmError(
            f"another labctl is submitting the same jobs now ({path.parent.name})", "labctl status shows them"
        ) from None


def new_request_id() -> str:
    """Sorts by time, and two made in one second differ: 20261231-235959-1f3a."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _request_document(launched: Launched, request: Request, plan: Plan) -> dict[str, Any]:
    return {
        "request_id": launched.request_id,
        "name": request.name,
        "created_at": utc_now(),
        "labctl_version": importlib.metadata.version("labctl-slurm"),
        "request": msgspec.to_builtins(request),
        "runs": launched.run_ids,
        "skipped": launched.skipped,
        "jobs": [job.to_json() for job in plan.jobs],
    }
