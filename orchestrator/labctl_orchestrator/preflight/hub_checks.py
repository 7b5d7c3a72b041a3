"""Whether the hub lets a job have its model, as far as it tells before it is submitted: checks of preflight and of doctor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from labctl_orchestrator.models import hub_cache
from labctl_orchestrator.models.hub_errors import told_of
from labctl_orchestrator.preflight.finding import Finding, Subject, refuse
from labctl_slurm.errors import LabctlError, PreflightError
from labctl_slurm.partitions import Partition
from labctl_workers.record import ModelRef


def models(subject: Subject) -> list[Finding]:
    """Preflight's check of each hub model that the plan uses: in the cache, or to be had, by those who may have it."""
    wanted = {(job.model.name, job.model.revision, job.partition): job.model for job in subject.plan.jobs}
    found: list[Finding] = []
    for (_, _, name), ref in wanted.items():
        if ref.path is None:
            found += of_model(ref, subject.partitions[name])
    return found


def of_model(ref: ModelRef, partition: Partition) -> list[Finding]:
    """What keeps jobs of this partition from loading a hub model."""
    folder = hub_cache.folder(partition)
    cached = hub_cache.find(folder, ref.name, ref.revision)
    if cached is not None and cached.whole:
        return []
    if partition.offline:
        return [not_in_the_cache(ref, partition, folder, cached.missing if cached else ())]
    refused = _refused_by_the_hub(ref)
    return [] if refused is None else [refuse(refused.message, refused.remedy)]


def not_in_the_cache(ref: ModelRef, partition: Partition, folder: Path, missing: Sequence[str]) -> Finding:
    lacks = f" ({', '.join(missing)} missing)" if missing else ""
    what = f"{ref.name} is not in {folder}{lacks}, and nodes of {partition.name} cannot reach the hub"
    revision = "" if ref.revision in (None, "main") else f" --revision {ref.revision}"
    return refuse(what, f"labctl fetch {ref.name}{revision} -p {partition.name}")


def _refused_by_the_hub(ref: ModelRef) -> LabctlError | None:
    """What the hub says against this user; None where it lets them in, or does not answer (which the pinning has told)."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE"):
        return None
    try:
        HfApi().auth_check(ref.name)
    except Exception as error:
        told = told_of(error, ref.name, ref.revision)
        return told if isinstance(told, PreflightError) else None
    return None
