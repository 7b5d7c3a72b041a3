"""Checks of access to models and data sets of tasks on the Hub, for preflight and doctor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from labctl_orchestrator.models import hub_cache
from labctl_orchestrator.models.hub_errors import hub_error
from labctl_orchestrator.preflight.finding import Finding, Subject, doubt, refuse
from labctl_orchestrator.preflight.python_checks import run_worker
from labctl_slurm.errors import LabctlError, PreflightError
from labctl_slurm.partitions import Partition
from labctl_workers.record import ModelRef, QualityTask


def models(subject: Subject) -> list[Finding]:
    """Preflight's check that each Hub model of the plan is in the cache, or that this user may download it."""
    wanted = {(job.model.name, job.model.revision, job.partition): job.model for job in subject.plan.jobs}
    found: list[Finding] = []
    for (_, _, name), ref in wanted.items():
        if ref.path is None:
            found += of_model(ref, subject.partitions[name])
    return found


def of_model(ref: ModelRef, partition: Partition) -> list[Finding]:
    """Problems of loading a Hub model in jobs of this partition."""
    folder = hub_cache.folder(partition)
    cached = hub_cache.find(folder, ref.name, ref.revision)
    if cached is not None and cached.complete:
        return []
    if partition.offline:
        return [not_in_the_cache(ref, partition, folder, cached.missing if cached else ())]
    refused = _hub_refusal(ref)
    return [] if refused is None else [refuse(refused.message, refused.remedy)]


def not_in_the_cache(ref: ModelRef, partition: Partition, folder: Path, missing: Sequence[str]) -> Finding:
    lacks = f" ({', '.join(missing)} missing)" if missing else ""
    what = f"{ref.name} is not in {folder}{lacks}, and nodes of {partition.name} cannot reach the Hub"
    revision = "" if ref.revision in (None, "main") else f" --revision {ref.revision}"
    return refuse(what, f"run labctl fetch {ref.name}{revision} -p {partition.name}")


def _hub_refusal(ref: ModelRef) -> LabctlError | None:
    """The Hub's refusal of this user; None if it grants access or does not answer, which `resolve` reports."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE"):
        return None
    try:
        HfApi().auth_check(ref.name)
    except Exception as error:
        known = hub_error(error, ref.name, ref.revision)
        return known if isinstance(known, PreflightError) else None
    return None


# ---------------------------------------------------------------- data sets of tasks

ONLINE = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}


def fetch_task(partition: Partition, task: QualityTask) -> None:
    """Download the data sets of a task of lm-evaluation-harness with the partition's Python, into the cache of its jobs. Raises
    LabctlError with the harness's reason."""
    words = ("-m", "labctl_workers.servers.harness", "--fetch", task.file or task.name)
    done, last = run_worker(partition, *words, variables=ONLINE)
    if done.returncode != 0:
        raise LabctlError(
            f"cannot fetch task {task.name}: {last or f'exit code {done.returncode}':.200}",
            'check its name (python -m lm_eval ls tasks), and the harness: pip install "lm_eval[api]"',
        )
    marker = _marker(partition, task.name)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()


def tasks(subject: Subject) -> Iterator[Finding]:
    """Tasks whose data sets a partition without network lacks. Local task files have theirs beside them."""
    for job in subject.plan.jobs:
        partition = subject.partitions[job.partition]
        for task in (task for run in job.runs for task in run.tasks):
            if partition.offline and task.file is None and not _marker(partition, task.name).exists():
                yield doubt(
                    f"data set of task {task.name} was not fetched, and nodes of {partition.name} cannot reach the Hub",
                    f"run labctl fetch --quality {task.name} -p {partition.name}",
                )


def _marker(partition: Partition, task: str) -> Path:
    return hub_cache.folder(partition).parent / "labctl-tasks" / task.replace("/", "--")
