"""Pack the runs of a plan into jobs and job arrays, and write their files."""

from __future__ import annotations

import ctypes
import itertools
import os
import secrets
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from msgspec import structs

from labctl_orchestrator.models import hub_cache
from labctl_orchestrator.request.packing import Bounds, Paces, packed
from labctl_orchestrator.request.plan import Plan
from labctl_orchestrator.store import worker_code
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm import limits
from labctl_slurm.partitions import Partition, slurm_time
from labctl_slurm.render import Script, time_limit_of_script_s
from labctl_workers.record import JobSpec, ScriptSettings, sha256_of_json, utc_now, write_json


@dataclass(frozen=True)
class JobRules:
    """How runs become jobs: the partitions by name, the most runs of a job (`runs_per_job`), the most running jobs of an array
    (`at_once`), and the least seconds of runs by id (`at_least_s`)."""

    partitions: Mapping[str, Partition]
    runs_per_job: int | None = None
    at_once: int | None = None
    at_least_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class JobArray:
    """The jobs of one sbatch call, with one script. `time_s` is its time limit in seconds (None: local, or unknown); `mark`
    identifies it in Slurm if its name changes."""

    array_id: str
    folder: Path
    script: Script
    jobs: list[JobSpec]
    time_s: int | None = None
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def begun(self) -> bool:
        """Whether a job of its folder ran, or is about to."""
        return _is_begun(self.folder)

    @property
    def specs(self) -> list[Path]:
        return [self.folder / f"{task}.json" for task in range(len(self.jobs))]

    def text_by_hand(self) -> str:
        """The script with the worker as its command, instead of submitit."""
        worker = self.script.worker_command("-u", "-m", "labctl_workers.job")
        folder = shlex.quote(str(self.folder))
        task = "0" if self.script.tasks is None else '"$SLURM_ARRAY_TASK_ID"'
        return self.script.text(f"{worker} {folder}/{task}.json")


def pack(workspace: Workspace, plan: Plan, rules: JobRules, pace_of: Paces) -> list[JobArray]:
    """Pack the plan's runs into jobs and arrays, and render each script. Writes nothing.

    An array has one partition, one number of GPUs and one time limit, and at most the site's number of tasks.
    """
    groups: dict[tuple[str, int, int], list[JobSpec]] = {}
    for job in _packed(plan, rules, pace_of):
        groups.setdefault((job.partition, job.gpus, job.time_limit_s), []).append(job)
    arrays: list[JobArray] = []
    for (name, _, time_s), together in groups.items():
        partition = rules.partitions[name]
        if time_s != partition.time_limit_s:  # else in the user's form
            partition = structs.replace(partition, time=slurm_time(time_s))
        size = limits.array_size(partition) if partition.executor == "slurm" and len(together) > 1 else len(together)
        for start in range(0, len(together), size):
            jobs = together[start : start + size]
            arrays.append(_job_array(workspace, partition, jobs, rules.at_once, {array.array_id for array in arrays}))
    return arrays


def halves(workspace: Workspace, array: JobArray) -> list[JobArray]:
    """The array's jobs as two new arrays."""
    script, middle = array.script, len(array.jobs) // 2
    found: list[JobArray] = []
    for jobs in (array.jobs[:middle], array.jobs[middle:]):
        plain = [replace(job, job_id="") for job in jobs]
        taken = {half.array_id for half in found}
        found.append(_job_array(workspace, script.partition, plain, script.at_once, taken))
    return found


def script_settings(workspace: Workspace, partition: Partition) -> ScriptSettings:
    """The settings around the worker in the scripts of a partition."""
    return _script(workspace, partition, partition.gpus, None, None).settings()


def _script(
    workspace: Workspace,
    partition: Partition,
    gpus: int,
    tasks: int | None,
    at_once: int | None,
    models: Collection[str] = (),
) -> Script:
    """`models` are paths of checkpoints, which a container sees."""
    code = workspace.code / worker_code.code_name()
    folders = (workspace.root, hub_cache.folder(partition), *map(Path, sorted(models)))
    seen = tuple(folder for folder in folders if folder.exists())
    return Script(partition, "labctl", gpus, tasks, Path("logs"), code, workspace.templates, at_once, seen)


def _packed(plan: Plan, rules: JobRules, pace_of: Paces) -> list[JobSpec]:
    """Jobs of one engine load each, which can run at the same time. On partitions where they cannot, or with a limit below their
    number, engine loads share jobs."""
    bounds = {
        name: Bounds(usual_s=partition.time_limit_s, longest_s=limits.time_limit_s(partition))
        for name, partition in rules.partitions.items()
        if any(job.partition == name for job in plan.jobs)
    }
    apart = packed(plan, bounds, pace_of, rules.runs_per_job, rules.at_least_s).jobs
    jobs = Counter(job.partition for job in apart)
    several = {job.partition for job in plan.jobs if job.loads > 1}
    shared = {name for name in several if _loads_share_jobs(rules.partitions[name], rules.at_once, jobs[name])}
    return packed(plan, bounds, pace_of, rules.runs_per_job, rules.at_least_s, shared).jobs if shared else apart


def _loads_share_jobs(partition: Partition, at_once: int | None, jobs: int) -> bool:
    if partition.executor != "slurm" or at_once == 1:
        return True
    most = limits.most_jobs(partition.cluster)
    return limits.array_size(partition) == 1 or (most is not None and jobs > most)


def _job_array(
    workspace: Workspace, partition: Partition, jobs: Sequence[JobSpec], at_once: int | None, taken: Collection[str]
) -> JobArray:
    models = {files.path for job in jobs for files in (job.model, job.adapter) if files is not None and files.path}
    script = _script(workspace, partition, jobs[0].gpus, len(jobs) if len(jobs) > 1 else None, at_once, models)
    text = script.text("command")
    content = sha256_of_json([text, *(job.to_json() for job in jobs)])[:8]
    # The first folder of this content without a job. It may be one of `labctl render`, whose script is then submitted.
    folders = (workspace.arrays / f"{content}-{number}" for number in itertools.count(1))
    folder = next(folder for folder in folders if folder.name not in taken and not _is_begun(folder))
    script = replace(script, job_name=f"labctl-{folder.name}", logs=folder / "submitit")
    time_s = time_limit_of_script_s(text) if partition.executor == "slurm" else None
    settings = script.settings()
    jobs = [replace(job, job_id=f"{folder.name}.{task}", script=settings) for task, job in enumerate(jobs)]
    return JobArray(folder.name, folder, script, jobs, time_s)


def _is_begun(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("intent.json", "submitted.json", "attempts"))


def write(workspace: Workspace, arrays: Sequence[JobArray]) -> None:
    """Write the files of these arrays and the worker's code into the workspace, and sync them."""
    workspace.create()
    worker_code.keep_code(workspace)
    for array in arrays:
        _write(workspace, array)
    _sync(workspace.data)


def _write(workspace: Workspace, array: JobArray) -> None:
    """Write the array's files, unless `labctl render` did: the folder's name is the hash of their content."""
    workspace.make_folder(array.script.logs)
    for path, job in zip(array.specs, array.jobs, strict=True):
        if not path.exists():
            write_json(path, job.to_json(), durable=False)
    if not (array.folder / "array.json").exists():
        partition = array.script.partition
        document = {
            "array_id": array.array_id,
            "partition": partition.name,
            "executor": partition.executor,
            "job_name": array.script.job_name,
            "tasks": len(array.jobs),
            "time_s": array.time_s,
            "gpus": partition.resources(array.script.gpus).gpus,
            "created_at": utc_now(),
        }
        write_json(array.folder / "array.json", document, durable=False)


def _sync(folder: Path) -> None:
    """Sync the folder's file system, instead of each of a thousand files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(handle) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    except AttributeError:  # not Linux
        os.sync()
    finally:
        os.close(handle)
