"""Checks that Slurm will accept a job, for preflight and doctor."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from labctl_orchestrator.preflight.finding import Finding, Subject, doubt, note, refuse, warn
from labctl_orchestrator.request import settings
from labctl_orchestrator.request.settings import SETTINGS_FILE
from labctl_orchestrator.store import worker_code
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm import diagnose, forms, limits, site
from labctl_slurm.errors import SlurmError, WrongUseError, nearest
from labctl_slurm.partitions import Partition
from labctl_slurm.render import Script
from labctl_slurm.site import SlurmPartition, Trial, mig_memory_gb
from labctl_workers.probe import filesystem_of

NO_USABLE_NODE = "node configuration is not available"


def partitions(subject: Subject) -> list[Finding]:
    """Preflight's check of each Slurm partition of the plan. If Slurm does not answer, sbatch will report problems."""
    wanted = {(job.partition, job.gpus) for job in subject.plan.jobs if job.executor == "slurm"}
    found: list[Finding] = []
    for name, gpus in sorted(wanted):
        partition = subject.partitions[name]
        try:
            known, unknown = site.find(partition.slurm_names, partition.cluster)
        except SlurmError:
            continue  # sbatch will report it
        own = of_partition(partition, gpus, known, unknown)
        if not any(finding.severity == "refuse" for finding in own):
            script = script_of(subject.workspace, partition, gpus)
            with suppress(SlurmError, WrongUseError):
                trial = site.try_script(script.text("true"), partition.cluster)
                own += [*of_trial(script, known, trial), *_expected_start(partition, known, trial)]
        found += own
        found += of_accounts(subject.workspace, partition)
        found += _filesystem(subject.workspace, partition)
        if mig_memory_gb(partition.gpu_type) and any(
            (job.partition, job.backend) == (name, "vllm") for job in subject.plan.jobs
        ):
            found.append(refuse(f"vLLM reads no UUID of a MIG slice: {partition.gpu_type}", "use --backend hf"))
    return found


def script_of(workspace: Workspace, partition: Partition, gpus: int) -> Script:
    """The script of a job in this partition."""
    code = workspace.code / worker_code.code_name()
    return Script(partition, "labctl", gpus, None, Path("logs"), code, workspace.templates)


def of_partition(
    partition: Partition, gpus: int, known: Sequence[SlurmPartition], unknown: Sequence[str]
) -> list[Finding]:
    """Problems of the partition: unknown, closed, a lower time limit, smaller nodes."""
    where = f"[partitions.{partition.name}]"
    if unknown:
        names = [found.name for found in site.partitions(partition.cluster)]
        return [
            refuse(f"Slurm has no partition {name!r}", f"set slurm_partition of {where}: {nearest(name, names)}")
            for name in unknown
        ]
    found = list(_state(known))
    too_long = limits.above_limit(partition, known)
    if too_long:
        found.append(refuse(f"job would never start: {too_long}", "lower --time"))
    return found + _size(partition, gpus, known)


def _state(known: Sequence[SlurmPartition]) -> Iterable[Finding]:
    """Problems of the partition's state. A job waits in a partition that is down or has no usable node."""
    if any(found.state == "up" and found.usable_nodes for found in known):
        return
    for found in known:
        if found.state == "up":
            states = "; ".join(
                f"{nodes.count} {nodes.state}" + (f" ({nodes.reason})" if nodes.reason else "") for nodes in found.nodes
            )
            what = f"no node of Slurm's partition {found.name} takes jobs now: {states or 'it has none'}"
            yield warn(what, "wait for a node, which labctl status shows, or choose another partition")
        elif found.state == "down":
            yield warn(
                f"Slurm's partition {found.name} is down",
                "wait until the administrators open it, or cancel the job with labctl cancel",
            )
        else:
            yield refuse(
                f"Slurm's partition {found.name} takes no jobs: {found.state}", "choose another partition, or wait"
            )


def _size(partition: Partition, gpus: int, known: Sequence[SlurmPartition]) -> list[Finding]:
    nodes = [node for found in known for node in found.nodes]
    most = max((found.gpus_per_node for found in known), default=0)
    where, found = f"of [partitions.{partition.name}]", []
    names, asked = partition.slurm_partition, partition.resources(gpus)
    if 0 < most < asked.gpus:
        what = f"no node of Slurm's partition {names} has {gpus} GPUs: {most} at most"
        found.append(refuse(what, f"give --gpus {most}, or another partition"))
    found += _slices(partition, gpus, known)
    types = {kind for one in known for kind in one.gpu_types if kind}
    if partition.gpu_type and types and partition.gpu_type not in types:
        what = f"no node of Slurm's partition {names} has GPUs of type {partition.gpu_type!r}"
        found.append(refuse(what, f"set gpu_type {where}: {', '.join(sorted(types))}, or leave it empty"))
    cpus = max((node.cpus for node in nodes), default=0)
    if 0 < cpus < (asked.cpus or 0):
        what = f"no node of Slurm's partition {names} has {asked.cpus} CPUs: {cpus} at most"
        found.append(refuse(what, f"lower cpus_per_task {where}"))
    memory = max((node.memory_mib for node in nodes), default=0)
    if 0 < memory < (asked.memory_mib or 0):
        what = f"no node of Slurm's partition {names} has {partition.mem} of memory: {memory}M at most"
        found.append(refuse(what, "lower --mem"))
    return found


def _slices(partition: Partition, gpus: int, known: Sequence[SlurmPartition]) -> Iterable[Finding]:
    """Problems with MIG slices. A job uses one slice, if the user chose its type."""
    where, memory_gb = f"[partitions.{partition.name}]", mig_memory_gb(partition.gpu_type)
    slices = [kind for one in known for kind in one.mig_types]
    if memory_gb is not None:
        if gpus > 1:
            what = f"gpu_type {partition.gpu_type!r} is a MIG slice: CUDA shows a process one slice, not {gpus}"
            yield refuse(what, "give --gpus 1, or choose whole GPUs")
        if partition.gpu_memory_gib is not None and partition.gpu_memory_gib > memory_gb:
            what = f"gpu_memory_gib of {where} is {partition.gpu_memory_gib:g}, but a slice {partition.gpu_type} has {memory_gb}"
            yield warn(what, f"set gpu_memory_gib = {memory_gb}, and gpu_bandwidth_gb_s to that of the slice")
        return
    if not slices or partition.gpu_type or not partition.resources(gpus).gpus:
        return
    whole = any(kind not in slices for one in known for kind in one.gpu_types)
    use_one = f'set gpu_type = "{slices[0]}" and gpus = 1 of {where} to measure on one slice'
    if whole:
        what = f"some GPUs of Slurm's partition {partition.slurm_partition} are MIG slices: {', '.join(slices)}"
        yield warn(what, f"set gpu_type of {where} to whole GPUs")
    else:
        what = f"the GPUs of Slurm's partition {partition.slurm_partition} are MIG slices: {', '.join(slices)}"
        yield refuse(what, f"use another partition with whole GPUs, or {use_one}")


def _expected_start(partition: Partition, known: Sequence[SlurmPartition], trial: Trial) -> list[Finding]:
    """A note with Slurm's estimated start of one job, unless the partition is down."""
    if not (trial.starts_at and any(found.state == "up" and found.usable_nodes for found in known)):
        return []
    start = datetime.fromisoformat(trial.starts_at)
    when = f"at {start:%Y-%m-%d %H:%M}" if start - datetime.now() > timedelta(minutes=1) else "now"
    return [note(f"Slurm expects a job of partition {partition.name} to start {when}")]


def of_trial(script: Script, known: Sequence[SlurmPartition], trial: Trial) -> list[Finding]:
    """Problems that `sbatch --test-only` reports, except a lack of usable nodes, for which the job only waits."""
    if trial.accepted:
        return []
    partition, message = script.partition, trial.message.lower()
    if NO_USABLE_NODE in message and known and not any(found.state == "up" and found.usable_nodes for found in known):
        return []
    if "invalid account" in message:
        return [refuse(f"Slurm refuses account {partition.account or '(none)'!r}", _other_account(partition))]
    known_refusal = diagnose.of_refusal(trial.message)
    if known_refusal is not None and known_refusal.kind == diagnose.AT_A_LIMIT:
        # labctl keeps jobs above the limit, and retry submits them.
        return [warn(f"Slurm would refuse the job now: {trial.message}", "submit it later with labctl retry")]
    if other_form := forms.remedy(script, trial.message):
        return [refuse(f"Slurm would refuse the job: {trial.message}", other_form)]
    if known_refusal is None:
        return [doubt(f"Slurm would refuse the job: {trial.message}", "check its script with labctl render")]
    return [refuse(f"Slurm would refuse the job: {trial.message}", known_refusal.remedy)]


def _other_account(partition: Partition) -> str:
    how = f"set account in [partitions.{partition.name}], or give --account"
    try:
        names = site.accounts(partition.cluster).names
    except SlurmError:
        return how
    return (
        f"{how}: you have {', '.join(names)}" if names else "you have no account here: ask the administrators for one"
    )


def of_accounts(workspace: Workspace, partition: Partition) -> list[Finding]:
    """A warning for a user with several accounts and no choice: which account is charged."""
    known = settings.load(workspace)
    chosen = [source for source, table in known.tables_of(partition.name) if "account" in table]
    shipped = partition.account == known.partition(partition.name).account and chosen in ([], [settings.SHIPPED])
    if not shipped:
        return []
    try:
        accounts = site.accounts(partition.cluster)
    except SlurmError:
        return []
    if len(accounts.names) < 2:
        return []
    charged = partition.account or accounts.default or "Slurm's default"
    if partition.account and partition.account not in accounts.names:
        return []  # sbatch --test-only reports it
    what = f"no account chosen of several ({', '.join(accounts.names)}), so Slurm charges: {charged}"
    return [warn(what, f"set account in [partitions.{partition.name}] of {SETTINGS_FILE}, or give --account")]


def _filesystem(workspace: Workspace, partition: Partition) -> list[Finding]:
    """A warning for a workspace on a local disk, which jobs on other machines do not see."""
    found = filesystem_of(workspace.root)
    if found is None or found.shared or not nodes_elsewhere(partition):
        return []
    what = f"{workspace.root} is on a local disk ({found.kind}, {found.mount}): other nodes may not see it"
    remedy = f"submit from a shared folder; labctl doctor -p {partition.name} --on-node checks this"
    return [warn(what, remedy)]


def nodes_elsewhere(partition: Partition) -> bool:
    """Whether the partition has nodes other than this machine. False if Slurm does not answer."""
    try:
        addresses = site.addresses(partition.slurm_names, partition.cluster)
    except SlurmError:
        return False
    own = {"127.0.0.1", "localhost", socket.gethostname(), socket.gethostname().partition(".")[0]}
    return bool(addresses - own)
