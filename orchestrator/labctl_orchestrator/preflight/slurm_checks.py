"""Whether Slurm lets a job in, as far as it tells before it is submitted: checks of preflight and of doctor."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
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
from labctl_slurm.site import SlurmPartition, Trial
from labctl_workers.probe import filesystem_of

NOBODY_HAS_IT = "node configuration is not available"


def partitions(subject: Subject) -> list[Finding]:
    """Preflight's check of each Slurm partition that the plan uses. What Slurm does not answer, sbatch will say."""
    wanted = {(job.partition, job.gpus) for job in subject.plan.jobs if job.executor == "slurm"}
    found: list[Finding] = []
    for name, gpus in sorted(wanted):
        partition = subject.partitions[name]
        try:
            known, unknown = site.find(partition.slurm_names)
        except SlurmError:
            continue
        own = of_partition(partition, gpus, known, unknown)
        if not any(finding.severity == "refuse" for finding in own):
            own += _of_trial(script_of(subject.workspace, partition, gpus), known)
        found += own
        found += of_accounts(subject.workspace, partition)
        found += _of_filesystem(subject.workspace, partition)
    return found


def script_of(workspace: Workspace, partition: Partition, gpus: int) -> Script:
    """The script that a job of this partition has."""
    code = workspace.code / worker_code.code_name()
    return Script(partition, "labctl", gpus, None, Path("logs"), code, workspace.templates)


def of_partition(
    partition: Partition, gpus: int, known: Sequence[SlurmPartition], unknown: Sequence[str]
) -> list[Finding]:
    """What speaks against the partition: it is not there, closed, allows less time, or its nodes have less."""
    where = f"[partitions.{partition.name}]"
    if unknown:
        names = [found.name for found in site.partitions()]
        return [
            refuse(f"Slurm has no partition {name!r}", f"set slurm_partition of {where}: {nearest(name, names)}")
            for name in unknown
        ]
    found = list(_of_state(known))
    too_long = limits.above_limit(partition.time, known)
    if too_long:
        found.append(refuse(f"{too_long}: Slurm would let the job wait for ever", "give a shorter --time"))
    return found + _of_size(partition, gpus, known)


def _of_state(known: Sequence[SlurmPartition]) -> Iterable[Finding]:
    """A partition that is down queues, and so does one without a usable node: the job waits, until somebody mends it."""
    if any(found.state == "up" and found.usable_nodes for found in known):
        return
    for found in known:
        if found.state == "up":
            told = "; ".join(
                f"{nodes.count} {nodes.state}" + (f" ({nodes.reason})" if nodes.reason else "") for nodes in found.nodes
            )
            what = f"no node of Slurm's partition {found.name} takes jobs now: {told or 'it has none'}"
            yield warn(what, "the job waits until one does; labctl status tells")
        elif found.state == "down":
            yield warn(
                f"Slurm's partition {found.name} is down",
                "the job waits until the administrators open it; labctl cancel takes it back",
            )
        else:
            yield refuse(
                f"Slurm's partition {found.name} takes no jobs: it is {found.state}", "choose another, or wait"
            )


def _of_size(partition: Partition, gpus: int, known: Sequence[SlurmPartition]) -> list[Finding]:
    nodes = [node for found in known for node in found.nodes]
    most = max((found.gpus_per_node for found in known), default=0)
    where, found = f"of [partitions.{partition.name}]", []
    names, asked = partition.slurm_partition, partition.resources(gpus)
    if 0 < most < asked.gpus:
        what = f"no node of Slurm's partition {names} has {gpus} GPUs: {most} at most"
        found.append(refuse(what, f"give --gpus {most}, or another partition"))
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


def _of_trial(script: Script, known: Sequence[SlurmPartition]) -> list[Finding]:
    try:
        trial = site.try_script(script.text("true"))
    except (SlurmError, WrongUseError):
        return []
    return [*of_trial(script, known, trial), *_expected_start(script.partition, known, trial)]


def _expected_start(partition: Partition, known: Sequence[SlurmPartition], trial: Trial) -> list[Finding]:
    """Slurm's estimate for one job. Slurm also gives one for a partition that is down; that one is left out."""
    if not (trial.starts_at and any(found.state == "up" and found.usable_nodes for found in known)):
        return []
    start = datetime.fromisoformat(trial.starts_at)
    when = f"at {start:%Y-%m-%d %H:%M}" if start - datetime.now() > timedelta(minutes=1) else "now"
    return [note(f"Slurm expects a job of partition {partition.name} to start {when}")]


def of_trial(script: Script, known: Sequence[SlurmPartition], trial: Trial) -> list[Finding]:
    """What `sbatch --test-only` said against the job. It refuses, too, what no usable node has now: that only waits."""
    if trial.accepted:
        return []
    partition, said = script.partition, trial.message.lower()
    if NOBODY_HAS_IT in said and known and not any(found.state == "up" and found.usable_nodes for found in known):
        return []
    if "invalid account" in said:
        return [refuse(f"Slurm refuses account {partition.account or '(none)'!r}", _other_account(partition))]
    known_refusal = diagnose.of_refusal(trial.message)
    if known_refusal is not None and known_refusal.kind == diagnose.AT_A_LIMIT:
        # Now: what is over the limit is kept, and retry submits it.
        return [warn(f"Slurm would refuse the job now: {trial.message}", "labctl retry submits what it refuses")]
    if other_form := forms.remedy(script, trial.message):
        return [refuse(f"Slurm would refuse the job: {trial.message}", other_form)]
    if known_refusal is None:
        return [doubt(f"Slurm would refuse the job: {trial.message}", "labctl render prints its script")]
    return [refuse(f"Slurm would refuse the job: {trial.message}", known_refusal.remedy)]


def _other_account(partition: Partition) -> str:
    how = f"set account of [partitions.{partition.name}], or give --account"
    try:
        names = site.accounts().names
    except SlurmError:
        return how
    return (
        f"{how}: you have {', '.join(names)}" if names else "you have no account here: ask the administrators for one"
    )


def of_accounts(workspace: Workspace, partition: Partition) -> list[Finding]:
    """A user with several accounts who has not said which is charged: labctl ships one, and tells that it is taken."""
    known = settings.load(workspace)
    chosen = [source for source, table in known.tables_of(partition.name) if "account" in table]
    shipped = partition.account == known.partition(partition.name).account and chosen in ([], [settings.SHIPPED])
    if not shipped:
        return []
    try:
        accounts = site.accounts()
    except SlurmError:
        return []
    if len(accounts.names) < 2:
        return []
    charged = partition.account or accounts.default or "Slurm's default"
    if partition.account and partition.account not in accounts.names:
        return []  # sbatch --test-only says that it is refused
    what = f"you have several accounts ({', '.join(accounts.names)}) and chose none: {charged!r} is charged"
    return [warn(what, f"set account of [partitions.{partition.name}] in {SETTINGS_FILE}, or give --account")]


def _of_filesystem(workspace: Workspace, partition: Partition) -> list[Finding]:
    """A workspace on a disk of this machine, for jobs on others: they find neither their script's folder nor their model."""
    found = filesystem_of(workspace.root)
    if found is None or found.shared or not nodes_elsewhere(partition):
        return []
    what = (
        f"{workspace.root} lies on {found.kind} of this machine (mounted at {found.mount}): other nodes may not see it"
    )
    remedy = (
        f"submit from a folder that they share; labctl doctor -p {partition.name} --on-node tells whether they see it"
    )
    return [warn(what, remedy)]


def nodes_elsewhere(partition: Partition) -> bool:
    """Whether the partition has nodes that are not this machine. False where Slurm does not say."""
    try:
        addresses = site.addresses(partition.slurm_names)
    except SlurmError:
        return False
    own = {"127.0.0.1", "localhost", socket.gethostname(), socket.gethostname().partition(".")[0]}
    return bool(addresses - own)
