"""Submit runs: `prepare` plans and checks a submission and writes nothing, `submit` writes it and queues its jobs."""

from __future__ import annotations

import importlib.metadata
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import msgspec

from labctl_orchestrator.analysis import cells
from labctl_orchestrator.models import hub_cache, resolve
from labctl_orchestrator.models.file_hashes import Progress
from labctl_orchestrator.preflight import run_checks
from labctl_orchestrator.preflight.finding import Finding, Subject
from labctl_orchestrator.request import service_levels, settings
from labctl_orchestrator.request.packing import Paces, expected_s
from labctl_orchestrator.request.plan import Plan, device_of, make_plan
from labctl_orchestrator.request.request import Layer, SubmissionSpec, build
from labctl_orchestrator.request.service_levels import LATENCIES
from labctl_orchestrator.request.sweep import Sweep
from labctl_orchestrator.store import collect
from labctl_orchestrator.store.database import Store, open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.submission import launch
from labctl_orchestrator.submission.job_arrays import JobArray, JobRules, pack, script_settings
from labctl_orchestrator.submission.launch import Launched
from labctl_orchestrator.submission.measured_pace import paces
from labctl_orchestrator.tracking import refresh, status
from labctl_slurm.errors import WrongUseError
from labctl_slurm.partitions import Partition
from labctl_workers.record import LatencyLimit, LoadSearch, ModelRef, ScriptSettings, utc_now, write_json

NOTICE_S = 90  # Slurm sends USR2 (--signal of the template) 90 to 150 s before the time limit
Reading = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class PreparedSubmission:
    """A submission before it is queued. `plan` has every run, `arrays` the jobs of unmeasured engine loads, `loads` the number of
    these by run id."""

    workspace: Workspace
    request: SubmissionSpec
    plan: Plan
    rules: JobRules
    again: bool
    loads: dict[str, int]
    arrays: list[JobArray]
    findings: list[Finding]
    warnings: list[str]

    @property
    def run_ids(self) -> list[str]:
        return [run.run_id for run in self.plan.runs]

    @property
    def measured(self) -> list[str]:
        return [run_id for run_id in self.run_ids if self.loads[run_id] <= 0]

    def refusals(self, *, force: bool = False) -> list[Finding]:
        """The findings that forbid the submission."""
        return run_checks.refusals(self.findings, force=force)

    def scripts(self) -> dict[str, ScriptSettings]:
        """The settings of each run's script, by run id."""
        of_partition = {
            name: script_settings(self.workspace, partition) for name, partition in self.rules.partitions.items()
        }
        return {run.run_id: of_partition[job.partition] for job in self.plan.jobs for run in job.runs}


@contextmanager
def _without_progress(what: str) -> Iterator[Progress]:
    yield lambda done, total: None


def prepare(
    workspace: Workspace,
    layers: Iterable[Layer],
    *,
    again: bool = False,
    check: bool = True,
    reading: Reading = _without_progress,
    search: bool = False,
) -> PreparedSubmission:
    """Build the submission of these layers on top of the settings, pack its unmeasured engine loads (`again`: all) into jobs, and
    `check` for failures before the queue. `reading` shows the progress of reading a local checkpoint. `search`: each job
    measures only the loads that a search for the highest within the service levels needs. Writes nothing. Raises LabctlError.
    """
    known = settings.load(workspace)
    request = build([*known.defaults, *layers])
    if not request.partition and not any(cell.partition for cell in request.cells):
        raise WrongUseError("no partition given", f"add --partition: {', '.join(known.names())}")
    load_search = _search(request) if search else None
    sweep = Sweep(request)
    names = dict.fromkeys(cell.partition for cell in sweep.cells)
    partitions = {name: known.partition(name, request.overrides) for name in names}
    _refuse_without_arrays(request, partitions)
    models, warnings = _models(sweep, partitions, reading)
    plan = make_plan(sweep, partitions, models, device_of, _adapters(sweep, reading))
    plan = Plan(
        [
            replace(job, model=hub_cache.on_node(job.model, partitions[job.partition]), search=load_search)
            for job in plan.jobs
        ]
    )
    # The rule may have a misspelt value.
    for number in sweep.idle_rules:
        warnings.append(f"[[exclude]] number {number} matches no run: {request.exclude[number - 1]}")
    rules = JobRules(partitions, request.runs_per_job, request.jobs_at_once)
    with closing(open_store(workspace)) if workspace.database.is_file() else nullcontext() as store:
        loads = _not_measured(store, plan, again)
        left, pace_of = plan.with_loads(loads), paces(store)
        arrays = pack(workspace, left, rules, pace_of)
        warnings += _limit_warnings(arrays, pace_of)
    findings = run_checks.findings(Subject(workspace, request, partitions, left)) if check else []
    return PreparedSubmission(workspace, request, plan, rules, again, loads, arrays, findings, warnings)


def _search(request: SubmissionSpec) -> LoadSearch:
    """The search for the submission's service levels. Raises WrongUseError without one."""
    if not request.slo:
        raise WrongUseError("no service level given", "add --slo, such as 'ttft_p99<500ms'")
    levels = map(service_levels.parse, request.slo)
    return LoadSearch([LatencyLimit(LATENCIES[each.latency], each.limit_s, each.percent or 100.0) for each in levels])


def _refuse_without_arrays(request: SubmissionSpec, partitions: Mapping[str, Partition]) -> None:
    """Slurm limits the number of running jobs only within an array."""
    for name, partition in partitions.items():
        if request.jobs_at_once is not None and partition.executor == "slurm" and not partition.arrays:
            raise WrongUseError(
                f"jobs_at_once needs job arrays: arrays = false in [partitions.{name}]",
                "remove jobs_at_once, or set arrays = true",
            )


def _models(
    sweep: Sweep, partitions: Mapping[str, Partition], reading: Reading
) -> tuple[dict[tuple[str, str], ModelRef], list[str]]:
    """(The models by id and revision, warnings about models without a pinned revision)."""
    offline = [hub_cache.folder(partition) for partition in partitions.values() if partition.offline]
    found: dict[tuple[str, str], ModelRef] = {}
    warnings = []
    for model, revision in dict.fromkeys((cell.model_id, cell.revision) for cell in sweep.cells):
        with reading(f"reading {model}") as progress:
            found[model, revision], warning = resolve.resolve(model, revision, offline, progress)
        if warning:
            warnings.append(warning)
    return found, warnings


def _adapters(sweep: Sweep, reading: Reading) -> dict[str, ModelRef]:
    """The LoRA adapters by the engine option that names them."""
    named = dict.fromkeys(str(value) for cell in sweep.cells for name, value in cell.engine_options if name == "lora")
    found = {}
    for folder in named:
        if folder != "none":
            with reading(f"reading {folder}") as progress:
                found[folder] = resolve.adapter(folder, progress)
    return found


def _not_measured(store: Store | None, plan: Plan, again: bool) -> dict[str, int]:
    """The number of engine loads of each run without a result (`again`: of all)."""
    loads = {run.run_id: job.loads for job in plan.jobs for run in job.runs}
    if store is not None and not again:
        for run_id, count in cells.engine_loads(store, list(loads)).items():
            loads[run_id] -= count
    return loads


def _limit_warnings(arrays: Iterable[JobArray], pace_of: Paces) -> Iterator[str]:
    """Warnings about time limits that the jobs are likely to reach."""
    for array in arrays:
        partition, limit_s = array.script.partition, array.jobs[0].time_limit_s
        if partition.executor != "slurm":
            continue
        needed_s = max((expected_s(job, pace) for job in array.jobs if (pace := pace_of(job)) is not None), default=0.0)
        if needed_s and needed_s > limit_s - NOTICE_S:
            yield (
                f"time limit of partition {partition.name} is too short: {_minutes(limit_s)}, expected"
                f" {_minutes(needed_s)} -> raise --time, or lower --repeats or --runs-per-job"
            )
        elif limit_s <= 2 * NOTICE_S:
            yield (
                f"time limit of partition {partition.name} is short: {_minutes(limit_s)}, and the worker stops"
                f" {NOTICE_S} to {NOTICE_S + 60} s before it -> raise --time to 10 min or more"
            )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}".removesuffix(".0") + " min"


def submit(prepared: PreparedSubmission, store: Store) -> Launched:
    """Write the submission, and queue its engine loads that are neither measured nor queued (prepared `again`: all).

    Two labctl take turns, each from reading the states until its intents are written, so no load is queued twice. A refused array
    does not stop the others. Raises LabctlError where another labctl keeps its turn too long.
    """
    workspace, plan, run_ids = prepared.workspace, prepared.plan, prepared.run_ids
    launched = Launched(f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}", run_ids)  # sorts by time
    with workspace.lock():
        launched.learnt = refresh.refresh(workspace, store, run_ids)
        found = {run.run_id: run for run in status.statuses(workspace, store, run_ids)}
        left = _not_measured(store, plan, prepared.again)
        on_their_way = {} if prepared.again else {run_id: run.loads_to_come for run_id, run in found.items()}
        wanted = {run_id: count - on_their_way.get(run_id, 0) for run_id, count in left.items()}
        launched.measured = [run_id for run_id in run_ids if left[run_id] <= 0]
        launched.on_their_way = [
            found[run_id] for run_id in run_ids if run_id in found and wanted[run_id] <= 0 < left[run_id]
        ]
        arrays = prepared.arrays
        if wanted != prepared.loads or any(array.begun for array in arrays):  # since it was prepared
            arrays = pack(workspace, plan.with_loads(wanted), prepared.rules, paces(store))
        document = {
            "submission_id": launched.submission_id,
            "name": prepared.request.name,
            "created_at": utc_now(),
            "labctl_version": importlib.metadata.version("labctl-slurm"),
            "request": msgspec.to_builtins(prepared.request),
            "runs": run_ids,
            "skipped": launched.measured,
            "jobs": [job.to_json() for job in plan.jobs],
        }
        write_json(workspace.submissions / f"{launched.submission_id}.json", document)
        launch.claim(workspace, arrays, launched.submission_id, found)
    launch.submit_all(workspace, arrays, launched)
    collect.collect_runs(workspace, store, run_ids)
    return launched
