"""Jobs -> files in the workspace, a script, and an entry in Slurm's queue.

What is about to be submitted is on disk before sbatch is called: a crash in between shows as an interrupted submission.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import itertools
import os
import secrets
import shlex
import socket
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from msgspec import structs

from labctl_orchestrator.analysis import cells
from labctl_orchestrator.request.packing import Bounds, Paces, packed
from labctl_orchestrator.request.plan import Plan
from labctl_orchestrator.request.request import Request
from labctl_orchestrator.store import collect, worker_code
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.submission.measured_pace import paces
from labctl_orchestrator.tracking import interrupted, processes, refresh, run_status, status
from labctl_orchestrator.tracking.run_status import RunStatus
from labctl_slurm import command, limits
from labctl_slurm.errors import SlurmError, SubmitLimitError, UnknownOutcomeError
from labctl_slurm.partitions import Partition, in_slurms_form
from labctl_slurm.render import Script, time_asked_for_s
from labctl_workers.record import JobFolder, JobSpec, read_json, sha256_of_json, utc_now, write_json


@dataclass(frozen=True)
class Batch:
    """One submission to Slurm: a job, or an array of jobs that share a script, which asks for `time_s` seconds (None: of
    no Slurm, or for no time that is known). `mark` tells it from all other submissions, whatever its name becomes."""

    batch_id: str
    folder: Path
    script: Script
    jobs: list[JobSpec]
    time_s: int | None = None
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

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
    """What became of a request: runs that were measured already, those that a job is to run already, the jobs that were queued
    with their Slurm ids, and each refusal."""

    request_id: str
    run_ids: list[str]
    skipped: list[str] = field(default_factory=list)
    on_their_way: list[RunStatus] = field(default_factory=list)
    queued: list[tuple[JobSpec, str]] = field(default_factory=list)
    refusals: list[SlurmError] = field(default_factory=list)

    @property
    def queued_runs(self) -> list[str]:
        """The ids of the runs that were queued, each once."""
        return list(dict.fromkeys(run.run_id for job, _ in self.queued for run in job.runs))


# ---------------------------------------------------------------- prepare


@dataclass(frozen=True)
class Shape:
    """How jobs go into batches: the partitions, how many jobs of an array may run at once, and the times that runs need."""

    partitions: Mapping[str, Partition]
    runs_per_job: int | None = None
    at_once: int | None = None
    at_least_s: Mapping[str, float] = field(default_factory=dict)


def planned(workspace: Workspace, plan: Plan, shape: Shape, pace_of: Paces) -> list[Batch]:
    """The plan's runs packed into jobs, in batches that share a script, each rendered once to see that it renders.

    An array is one script: one partition, one number of GPUs, one time; and no longer than the site allows. Writes nothing.
    """
    code = workspace.code / worker_code.code_name()
    names = dict.fromkeys(job.partition for job in plan.jobs)
    bounds = {name: _bounds(shape.partitions[name]) for name in names}
    jobs = _packed(plan, bounds, shape, pace_of).jobs
    groups: dict[tuple[str, int, int], list[JobSpec]] = {}
    for job in jobs:
        groups.setdefault((job.partition, job.gpus, job.time_limit_s), []).append(job)
    batches: list[Batch] = []
    for (name, _, time_s), together in groups.items():
        partition = _with_time(shape.partitions[name], time_s)
        for part in _chunks(together, partition):
            batches.append(
                _batch(workspace, partition, part, code, shape.at_once, {batch.batch_id for batch in batches})
            )
    return batches


def _packed(plan: Plan, bounds: Mapping[str, Bounds], shape: Shape, pace_of: Paces) -> Plan:
    """Each engine load is a job, which may have a node of its own; those of a partition share jobs where they would run one
    after another all the same, or where the site does not take as many jobs."""
    apart = packed(plan, bounds, pace_of, shape.runs_per_job, shape.at_least_s)
    several = {job.partition for job in plan.jobs if job.loads > 1}
    jobs = Counter(job.partition for job in apart.jobs)
    shared = {name for name in several if _loads_share_jobs(shape.partitions[name], shape.at_once, jobs[name])}
    return packed(plan, bounds, pace_of, shape.runs_per_job, shape.at_least_s, shared) if shared else apart


def _loads_share_jobs(partition: Partition, at_once: int | None, jobs: int) -> bool:
    if partition.executor != "slurm" or at_once == 1:
        return True
    most = limits.most_jobs()
    return limits.max_array_size() == 1 or (most is not None and jobs > most)


def _with_time(partition: Partition, time_s: int) -> Partition:
    if time_s == partition.time_limit_s:
        return partition  # as the user wrote it
    return structs.replace(partition, time=in_slurms_form(time_s))


def _bounds(partition: Partition) -> Bounds:
    return Bounds(usual_s=partition.time_limit_s, longest_s=limits.time_limit_s(partition))


def _chunks(jobs: list[JobSpec], partition: Partition) -> Iterator[list[JobSpec]]:
    size = limits.max_array_size() if partition.executor == "slurm" and len(jobs) > 1 else len(jobs)
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


def prepare(workspace: Workspace, plan: Plan, shape: Shape, pace_of: Paces) -> list[Batch]:
    """Plan the batches and write all that their jobs need into the workspace."""
    batches = planned(workspace, plan, shape, pace_of)
    workspace.create()
    worker_code.keep_code(workspace)
    for batch in batches:
        _write(batch)
    _force_to_disk(workspace.data)
    return batches


def _batch(
    workspace: Workspace,
    partition: Partition,
    jobs: list[JobSpec],
    code: Path,
    at_once: int | None,
    taken: Collection[str],
) -> Batch:
    tasks = len(jobs) if len(jobs) > 1 else None
    script = Script(partition, "labctl", jobs[0].gpus, tasks, Path("logs"), code, workspace.templates, at_once)
    text = script.text("command")
    content = [text, *(job.to_json() for job in jobs)]
    batch_id, folder = _free_folder(workspace, sha256_of_json(content)[:8], taken)
    script = replace(script, job_name=f"labctl-{batch_id}", logs=folder / "submitit")
    time_s = time_asked_for_s(text) if partition.executor == "slurm" else None
    jobs = [replace(job, job_id=f"{batch_id}.{n}", script=script.settings()) for n, job in enumerate(jobs)]
    return Batch(batch_id, folder, script, jobs, time_s)


def _write(batch: Batch) -> None:
    """Write the batch's files, unless `labctl render` did. Not durably, each by itself: the caller sees to all at once."""
    batch.script.logs.mkdir(parents=True, exist_ok=True)
    for path, job in zip(batch.specs, batch.jobs, strict=True):
        if not path.exists():  # its folder's name is the hash of its content
            write_json(path, job.to_json(), durable=False)
    if not (batch.folder / "batch.json").exists():
        document = {
            "batch_id": batch.batch_id,
            "partition": batch.script.partition.name,
            "executor": batch.script.partition.executor,
            "job_name": batch.script.job_name,
            "tasks": len(batch.jobs),
            "time_s": batch.time_s,
            "gpus": batch.script.gpus if batch.script.partition.gres(batch.script.gpus) else 0,
            "created_at": utc_now(),
        }
        write_json(batch.folder / "batch.json", document, durable=False)


def _force_to_disk(folder: Path) -> None:
    """All that was written to the folder's file system: one call instead of one for each of a thousand files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(handle) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    except AttributeError:  # no Linux
        os.sync()
    finally:
        os.close(handle)


def _free_folder(workspace: Workspace, content: str, taken: Collection[str]) -> tuple[str, Path]:
    """The first folder of this content that nothing ran from. One that `labctl render` prepared is used: the script that
    it printed is then the script that is submitted."""
    for number in itertools.count(1):
        folder = workspace.batches / f"{content}-{number}"
        begun = any((folder / name).exists() for name in ("intent.json", "submitted.json", "attempts"))
        if not begun and folder.name not in taken:
            return folder.name, folder
    raise AssertionError("itertools.count ends")


# ---------------------------------------------------------------- launch


def launch(workspace: Workspace, request: Request, plan: Plan, shape: Shape, again: bool, store: Store) -> Launched:
    """Write the request down, queue the engine loads of its runs that are neither measured nor on their way (`again`: all of
    them, whatever there is), and submit their jobs.

    Two labctl at once take turns from the look at what there is until their intents are written: no load is queued twice.
    What is refused leaves the rest as it is. Raises LabctlError where another labctl holds its turn too long.
    """
    launched = Launched(new_request_id(), [run.run_id for run in plan.runs])
    with workspace.turn():
        collect.collect_of(workspace, store, launched.run_ids)
        if interrupted.rendered(store):
            refresh.refresh(workspace, store, launched.run_ids)  # a person may have submitted them
        found = {run.run_id: run for run in status.statuses(workspace, store, launched.run_ids)}
        wanted = {run.run_id: job.loads for job in plan.jobs for run in job.runs}
        if not again:
            done = cells.engine_loads(store, launched.run_ids)
            launched.skipped = [run_id for run_id in launched.run_ids if done.get(run_id, 0) >= wanted[run_id]]
            for run_id in launched.run_ids:
                wanted[run_id] -= done.get(run_id, 0) + (found[run_id].loads_to_come if run_id in found else 0)
            launched.on_their_way = [
                run
                for run_id in launched.run_ids
                if wanted[run_id] <= 0 and (run := found.get(run_id)) and run_id not in launched.skipped
            ]
        batches = prepare(workspace, plan.with_loads(wanted), shape, paces(store))
        document = _request_document(launched, request, plan)
        write_json(workspace.requests / f"{launched.request_id}.json", document)
        _take_over(workspace, found, batches)
        _claim(batches, launched.request_id)
        collect.collect_of(workspace, store, launched.run_ids)
    submit_all(workspace, batches, launched)
    return launched


def relaunch(workspace: Workspace, request_id: str, plan: Plan, shape: Shape, store: Store) -> Launched:
    """Queue these runs of a request once more, but for those that another labctl has put on their way since."""
    launched = Launched(request_id, [run.run_id for run in plan.runs])
    with workspace.turn():
        collect.collect_of(workspace, store, launched.run_ids)
        found = {run.run_id: run for run in status.statuses(workspace, store, launched.run_ids)}
        launched.on_their_way = [run for run in found.values() if run.may_come]
        left = plan.without({run.run_id for run in launched.on_their_way})
        batches = prepare(workspace, left, shape, paces(store))
        _take_over(workspace, found, batches)
        _claim(batches, request_id)
        collect.collect_of(workspace, store, launched.run_ids)
    submit_all(workspace, batches, launched)
    return launched


def _take_over(workspace: Workspace, found: Mapping[str, RunStatus], batches: Sequence[Batch]) -> None:
    """Give the runs that jobs have left unmeasured to these batches' jobs. Such a job may still start, where Slurm had lost it or
    a person puts it back into the queue: it reads there that the run is no more its own. What is given to a job that is never
    claimed counts as not given: a labctl that is killed in between leaves each run to one job."""
    jobs: dict[str, list[str]] = {}
    for job in (job for batch in batches for job in batch.jobs):
        for run in job.runs:
            jobs.setdefault(run.run_id, []).append(job.job_id)
    given = [
        (before, run_id, {"job": after[min(number, len(after) - 1)], "state": state})
        for run_id, after in jobs.items()
        if run_id in found
        for number, (before, state) in enumerate(found[run_id].unmeasured.items())
    ]
    _give(workspace, given)


def _give(workspace: Workspace, given: Sequence[tuple[str, str, dict[str, str]]]) -> None:
    """Write down beside each job, in its batch, which of its runs goes to which job: (its id, the run's, what is written)."""
    of_batches: dict[str, list[tuple[str, str, dict[str, str]]]] = {}
    for each in given:
        of_batches.setdefault(each[0].rpartition(".")[0], []).append(each)
    for batch_id, each_of in of_batches.items():
        path = JobFolder(workspace.batches / batch_id / "0.json").given
        document = _document_to_change(path)
        for job_id, run_id, to in each_of:
            document.setdefault(job_id, {})[run_id] = to
        write_json(path, document)


def _document_to_change(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the workspace; empty where there is no file or a damaged one. Raises OSError where it cannot
    be read now: written again, it would lose what it holds."""
    try:
        document = read_json(path)
    except (FileNotFoundError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _claim(batches: Sequence[Batch], request_id: str) -> None:
    """Write down, before sbatch is called, that these batches are about to be submitted, and by which process."""
    own = os.getpid()
    for batch in batches:
        intent = {
            "request_id": request_id,
            "at": utc_now(),
            "host": socket.gethostname(),
            "pid": own,
            "pid_start": processes.start_of(own),
            "mark": batch.mark,
            "folder": str(batch.folder),
            "clusters": [cluster.to_json() for cluster in command.meant()],
        }
        write_json(batch.folder / "intent.json", intent)


def submit_all(workspace: Workspace, batches: Sequence[Batch], launched: Launched) -> None:
    """Submit claimed batches, one after the other. After a limit of the user's is met, no more are tried."""
    for batch in batches:
        full = next((error for error in launched.refusals if isinstance(error, SubmitLimitError)), None)
        if full is not None:
            _write_refusal(batch, full)
            continue
        try:
            ids = _submit(batch)
        except SubmitLimitError as error:
            _submit_parts(workspace, batch, launched, error)
        except SlurmError as error:
            launched.refusals.append(error)
        else:
            launched.queued += zip(batch.jobs, ids, strict=True)


def _submit_parts(workspace: Workspace, batch: Batch, launched: Launched, error: SubmitLimitError) -> None:
    """Halve a batch that is more than Slurm takes of this user now, until what it takes is queued."""
    if len(batch.jobs) == 1:
        launched.refusals.append(error)
        return
    script = batch.script
    middle = len(batch.jobs) // 2
    halves: list[Batch] = []
    for jobs in (batch.jobs[:middle], batch.jobs[middle:]):
        plain = [replace(job, job_id="") for job in jobs]
        taken = {half.batch_id for half in halves}
        half = _batch(workspace, script.partition, plain, script.code, script.at_once, taken)
        _write(half)
        halves.append(half)
    _force_to_disk(workspace.data)
    after = [job for half in halves for job in half.jobs]
    _give(
        workspace,
        [
            (job.job_id, run.run_id, {"job": other.job_id, "state": run_status.REFUSED})
            for job, other in zip(batch.jobs, after, strict=True)
            for run in job.runs
        ],
    )
    _claim(halves, launched.request_id)
    submit_all(workspace, halves, launched)


def _submit(batch: Batch) -> list[str]:
    from labctl_slurm import executor

    try:
        queued = executor.submit(batch.script.logs, batch.script, batch.specs, batch.mark)
    except UnknownOutcomeError as error:
        _write_unknown(batch, error)
        raise
    except SlurmError as error:
        _write_refusal(batch, error)
        raise
    done: dict[str, Any] = {"ids": queued.ids, "at": utc_now(), "host": socket.gethostname()}
    if queued.cluster is None:
        done["starts"] = [processes.start_of(int(pid)) for pid in queued.ids]
    else:
        done["clusters"] = [queued.cluster.to_json()]
    write_json(batch.folder / "submitted.json", done)
    return queued.ids


def _write_unknown(batch: Batch, error: UnknownOutcomeError) -> None:
    """Write beside the intent what sbatch said: whoever asks Slurm next completes the submission."""
    path = batch.folder / "intent.json"
    lost = {"message": error.message, "remedy": error.remedy, "late_s": error.late_s}
    write_json(path, {**_document_to_change(path), "lost_answer": lost})


def _write_refusal(batch: Batch, error: SlurmError) -> None:
    said = {"refused": error.message, "remedy": error.remedy, "at": utc_now()}
    write_json(batch.folder / "submitted.json", said)


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
