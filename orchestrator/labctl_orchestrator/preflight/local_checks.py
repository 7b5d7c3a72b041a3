"""Doctor's checks on this machine: Slurm, workspace, Hub, and each partition."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing

from labctl_orchestrator.models import disk_space, hub_cache, resolve, weight_files
from labctl_orchestrator.models.fetch import size_text
from labctl_orchestrator.preflight import hub_checks, python_checks, slurm_checks
from labctl_orchestrator.preflight.finding import Check, Finding, Level
from labctl_orchestrator.preflight.init_proposal import summary
from labctl_orchestrator.request import settings
from labctl_orchestrator.request.paths import expand_home
from labctl_orchestrator.store.connection import Connection
from labctl_orchestrator.store.workspace import LOCKS_REMEDY, NO_LOCKS, ROOM_BYTES, Workspace, mount_of
from labctl_slurm import site
from labctl_slurm.errors import NO_SLURM, LabctlError, SlurmError
from labctl_slurm.partitions import Partition
from labctl_slurm.site import SlurmPartition
from labctl_workers.probe import filesystem_of, reach_hub
from labctl_workers.record import ModelRef

LITTLE_FOR_RECORDS_BYTES = 2**30
SHARED = "if the nodes do not see this folder, use one that they share; --on-node checks this"
LITTLE_BYTES = 20 * 2**30  # a 7B model takes 13 GiB; engines have caches too


def partitions_here(known: settings.Settings) -> list[str]:
    """Configured partitions, and shipped ones that Slurm has; `local` if there are none."""
    try:
        in_slurm = {found.name for found in site.partitions()}
    except SlurmError:
        in_slurm = set()
    described = {name for source, tables in known.partition_tables if source != settings.SHIPPED for name in tables}
    names = [name for name in known.names() if name in described or known.partition(name).slurm_partition in in_slurm]
    return names or ["local"]


# ---------------------------------------------------------------- this machine


def general(workspace: Workspace) -> Iterator[Check]:
    yield from _slurm()
    yield _filesystem(workspace)
    yield _room(workspace)
    yield from _locks(workspace)
    yield from _journal(workspace)
    yield _token()
    yield _network()


def _slurm() -> Iterator[Check]:
    missing = site.missing_commands()
    if missing:
        remedy = "run labctl on the cluster's login node, or use --partition local"
        yield Check("", "slurm", "warn", f"not found: {', '.join(missing)}", remedy)
        return
    try:
        configuration = site.configuration()
    except SlurmError as error:
        level: Level = "warn" if error.remedy == NO_SLURM else "fail"
        yield Check("", "slurm", level, error.message, error.remedy)
        return
    version, cluster = configuration.get("SLURM_VERSION", "?"), configuration.get("ClusterName", "?")
    yield Check("", "slurm", "pass", f"{version}, cluster {cluster}; {', '.join(site.NEEDED)} found")
    size = configuration.get("MaxArraySize", "")
    if size.isdigit():
        yield Check("", "arrays", "pass", f"up to {size} jobs per array (MaxArraySize)")
    else:
        yield Check("", "arrays", "warn", "Slurm reports no MaxArraySize", "no action needed: labctl assumes 1001")
    yield _accounting()


def _accounting() -> Check:
    try:
        accounts = site.accounts()
    except SlurmError as error:
        remedy = "no action needed: labctl uses the queue and its records, and cannot check accounts"
        return Check("", "accounting", "warn", f"does not answer: {error.message}", remedy)
    if not accounts.names:
        return Check("", "accounting", "fail", "you have no account on this cluster", "ask the administrators for one")
    default = f" (Slurm's default: {accounts.default})" if len(accounts.names) > 1 else ""
    return Check("", "accounting", "pass", f"Slurm knows your accounts: {', '.join(accounts.names)}{default}")


def _filesystem(workspace: Workspace) -> Check:
    found = filesystem_of(workspace.root)
    if found is None:
        return Check("", "workspace", "warn", f"{workspace.root}: unknown filesystem", SHARED)
    where = f"{workspace.root}: {found.kind}, mounted at {found.mount}"
    if found.shared:
        return Check("", "workspace", "pass", f"{where}, a shared filesystem")
    return Check("", "workspace", "warn", f"{where}: probably a local disk", SHARED)


def _room(workspace: Workspace) -> Check:
    """Space for records, logs and the database."""
    left = disk_space.left_bytes(workspace.root)
    text = f"{left / 2**30:.1f} GiB left for the workspace on {mount_of(workspace.root)}"
    if left >= LITTLE_FOR_RECORDS_BYTES:
        return Check("", "space", "pass", text)
    level: Level = "warn" if left >= ROOM_BYTES else "fail"
    return Check("", "space", level, text, "free space: labctl du shows usage, labctl clean removes old files")


def _locks(workspace: Workspace) -> Iterator[Check]:
    """File locks, which labctl and SQLite need."""
    try:
        with tempfile.TemporaryFile(dir=workspace.root) as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            what = f"the file system {mount_of(workspace.root)} has no locks: labctl cannot submit from here"
            yield Check("", "locks", "fail", what, LOCKS_REMEDY)
        else:
            yield Check(
                "", "locks", "warn", f"not checked: {workspace.root}: {error.strerror}", "check its permissions"
            )
    else:
        yield Check("", "locks", "pass", "file locks work")


def _journal(workspace: Workspace) -> Iterator[Check]:
    """The database's journal: a write-ahead log breaks if several hosts use it."""
    if not workspace.index.is_file():
        return
    try:
        with closing(sqlite3.connect(f"{workspace.index.as_uri()}?mode=ro", uri=True, factory=Connection)) as database:
            (mode,) = database.execute("PRAGMA journal_mode").fetchone()
    except sqlite3.Error as error:
        yield Check("", "database", "fail", f"{workspace.index}: {error}", "labctl collect --rebuild builds it again")
        return
    if mode == "wal":
        remedy = f"run sqlite3 {workspace.index} 'PRAGMA journal_mode=DELETE'"
        yield Check("", "database", "fail", "a write-ahead log, which breaks on shared filesystems", remedy)
    else:
        yield Check("", "database", "pass", f"rollback journal ({mode}), which works on shared filesystems")


def _token() -> Check:
    from huggingface_hub import get_token

    if os.environ.get("HF_TOKEN"):
        text = "HF_TOKEN is set, and jobs inherit it; labctl does not store it, Slurm stores it with the job"
        return Check("", "token", "pass", text)
    if get_token():
        text = "stored by `hf auth login`; nodes find it if they share HF_HOME"
        return Check("", "token", "pass", text)
    remedy = "for gated models, accept their terms on the Hub, and export HF_TOKEN=hf_... in this shell"
    return Check("", "token", "warn", "none; public models need none", remedy)


def _network() -> Check:
    answer = reach_hub()
    if answer.reached:
        return Check("", "network", "pass", f"this machine can reach {answer.endpoint}")
    text = f"{answer.endpoint} does not answer from here: {answer.why}"
    remedy = (
        "behind a proxy, set HTTPS_PROXY; without a network, copy a checkpoint here and give its folder as --model-id"
    )
    return Check("", "network", "warn", text, remedy)


# ---------------------------------------------------------------- a partition, from here


def of_partition(workspace: Workspace, partition: Partition, model: str, revision: str) -> Iterator[Check]:
    """Checks of one partition on the login node. `model`: the model to look for in its cache."""
    if partition.executor == "slurm":
        yield from _slurm_partition(workspace, partition)
    yield from python_checks.of_python(partition)
    yield from _cache(partition)
    yield _model(partition, model, revision)


def _slurm_partition(workspace: Workspace, partition: Partition) -> Iterator[Check]:
    name = partition.name
    try:
        known, unknown = site.find(partition.slurm_names, partition.cluster)
        findings = slurm_checks.of_partition(partition, partition.gpus, known, unknown)
        yield from _as_checks(name, "partition", findings, _states(known))
        if unknown:
            return
        script = slurm_checks.script_of(workspace, partition, partition.gpus)
        trial = site.try_script(script.text("true"), partition.cluster)
        findings = slurm_checks.of_trial(script, known, trial)
        # Slurm reports a start time even for a partition that is down.
        open_ = any(found.state == "up" and found.usable_nodes for found in known)
        start = f"; it would start at {trial.starts_at}" if trial.starts_at and open_ else ""
        yield from _as_checks(name, "job", findings, f"sbatch --test-only accepts it{start}" if trial.accepted else "")
    except SlurmError as error:
        yield Check(name, "partition", "warn", f"not checked: {error.message}", error.remedy)
        return
    except LabctlError as error:
        yield Check(name, "script", "fail", error.message, error.remedy)
        return
    charged = partition.account or "Slurm's default"
    yield from _as_checks(name, "account", slurm_checks.of_accounts(workspace, partition), charged)


def _states(known: Sequence[SlurmPartition]) -> str:
    lines = []
    for found in known:
        counts: dict[str, int] = {}
        for nodes in found.nodes:
            counts[nodes.state] = counts.get(nodes.state, 0) + nodes.count
        states = ", ".join(f"{count} {state}" for state, count in counts.items())
        lines.append(f"Slurm's {found.name}: {summary(found)}; {states}")
    return "; ".join(lines)


def _as_checks(partition: str, name: str, findings: Sequence[Finding], good: str) -> Iterator[Check]:
    for finding in findings:
        level: Level = "warn" if finding.severity == "warn" else "fail"
        yield Check(partition, name, level, finding.what, finding.remedy)
    if not findings and good:
        yield Check(partition, name, "pass", good)


def _cache(partition: Partition) -> Iterator[Check]:
    name, folder = partition.name, hub_cache.folder(partition)
    found = filesystem_of(folder)
    kind = f" ({found.kind})" if found else ""
    left, quota = disk_space.left_bytes(folder), disk_space.quota_of(folder)
    text = f"{folder}{kind}: {size_text(left)} left"
    if quota is not None:
        text += f" (quota {size_text(quota.limit_bytes)})"
    move = f"set env.HF_HOME in [partitions.{name}], and HF_HOME in your shell, to a larger folder that nodes share"
    if left < LITTLE_BYTES:
        yield Check(name, "cache", "warn", text, f"{move}: a 7B model takes 13 GiB")
    elif partition.executor == "slurm" and found and not found.shared and slurm_checks.nodes_elsewhere(partition):
        yield Check(name, "cache", "warn", f"{text}; nodes may not see this disk", move)
    else:
        yield Check(name, "cache", "pass", text)


def _model(partition: Partition, model: str, revision: str) -> Check:
    name = partition.name
    if resolve.is_folder(model):
        try:
            folder = expand_home(model).resolve()
            resolve.check_folder(folder)
            weight_files.check_complete(folder)
        except LabctlError as error:
            return Check(name, "model", "fail", error.message, error.remedy)
        return Check(name, "model", "pass", f"{model} is a complete checkpoint")
    folder = hub_cache.folder(partition)
    cached = hub_cache.find(folder, model, revision)
    if cached is not None and cached.complete:
        return Check(name, "model", "pass", f"{model} is in the cache, at {cached.commit[:12]}")
    ref = ModelRef(model, revision)
    if partition.offline:
        missing = hub_checks.not_in_the_cache(ref, partition, folder, cached.missing if cached else ())
        return Check(name, "model", "fail", missing.what, missing.remedy)
    what = f"{model} is {'only partly' if cached else 'not'} in the cache: the first job would download it"
    return Check(name, "model", "warn", what, f"run labctl fetch {model} -p {name}")
