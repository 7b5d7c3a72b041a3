"""What has to be right before the first submit, one check a line: pass, warn or fail, each with its remedy.

`general` looks at this machine and the workspace, `of_partition` at one partition from here, `on_node` at one of its nodes,
through a short job that is submitted as every other.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from msgspec import structs

from labctl_orchestrator.models import disk_space, fetch, hub_cache
from labctl_orchestrator.preflight import slurm_checks
from labctl_orchestrator.preflight.finding import Finding
from labctl_orchestrator.request import settings
from labctl_orchestrator.request.paths import expand_home
from labctl_orchestrator.store import worker_code
from labctl_orchestrator.store.workspace import LOCKS_REMEDY, NO_LOCKS, ROOM_BYTES, Workspace, mount_of
from labctl_slurm import environments, site
from labctl_slurm.errors import NO_SLURM, LabctlError, SlurmError
from labctl_slurm.partitions import Partition
from labctl_slurm.render import Script
from labctl_slurm.site import SlurmPartition
from labctl_workers.engines import ENGINES
from labctl_workers.probe import filesystem_of, hub_answer
from labctl_workers.record import ModelRef, read_json

Level = Literal["pass", "warn", "fail"]
PROBE_WITHIN_S = 180.0  # torch from a cold network filesystem
NODE_TIME = "0-00:10:00"
NODE_LOOK_S = 1.0
FILES_COME_WITHIN_S = 15.0  # a network filesystem shows another host's file late
LITTLE_FOR_RECORDS_BYTES = 2**30
LITTLE_BYTES = 20 * 2**30  # a 7B model takes 13 GiB, and an engine's caches some


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what was seen, and what to do where that is not right."""

    partition: str
    name: str
    level: Level
    said: str
    remedy: str = ""


def failed(checks: Sequence[Check]) -> bool:
    return any(check.level == "fail" for check in checks)


def partitions_here(known: settings.Settings) -> list[str]:
    """The partitions that somebody described, or that labctl ships and Slurm has; `local` where there are none."""
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
        remedy = "run labctl on the cluster's login node; without Slurm there is --partition local"
        yield Check("", "slurm", "warn", f"not found: {', '.join(missing)}", remedy)
        return
    try:
        configuration = site.configuration()
    except SlurmError as error:
        level: Level = "warn" if error.remedy == NO_SLURM else "fail"
        yield Check("", "slurm", level, error.message, error.remedy)
        return
    version, cluster = configuration.get("SLURM_VERSION", "?"), configuration.get("ClusterName", "?")
    yield Check("", "slurm", "pass", f"{version}, cluster {cluster}; {', '.join(site.NEEDED)} are here")
    yield _array_size(configuration)
    yield _accounting()


def _array_size(configuration: dict[str, str]) -> Check:
    size = configuration.get("MaxArraySize", "")
    if not size.isdigit():
        return Check("", "arrays", "warn", "Slurm does not tell MaxArraySize: labctl goes by 1001")
    return Check("", "arrays", "pass", f"up to {size} jobs each (MaxArraySize)")


def _accounting() -> Check:
    try:
        accounts = site.accounts()
    except SlurmError as error:
        return Check(
            "",
            "accounting",
            "warn",
            f"does not answer: {error.message}",
            "labctl goes by the queue and its own records; your accounts cannot be checked",
        )
    if not accounts.names:
        return Check("", "accounting", "fail", "you have no account on this cluster", "ask the administrators for one")
    default = f" (Slurm's default: {accounts.default})" if len(accounts.names) > 1 else ""
    return Check("", "accounting", "pass", f"answers; your accounts: {', '.join(accounts.names)}{default}")


def _filesystem(workspace: Workspace) -> Check:
    found = filesystem_of(workspace.root)
    if found is None:
        return Check("", "workspace", "warn", f"{workspace.root}: the kernel does not tell its filesystem")
    where = f"{workspace.root}: {found.kind}, mounted at {found.mount}"
    if found.shared:
        return Check("", "workspace", "pass", f"{where}, which hosts share")
    return Check(
        "",
        "workspace",
        "warn",
        f"{where}: a disk of this machine, as far as its type tells",
        "if nodes are other machines, work in a folder that they share; --on-node tells whether they see it",
    )


def _room(workspace: Workspace) -> Check:
    """Records, logs and the database want little; without it a job's records are lost or late."""
    left = disk_space.left_bytes(workspace.root)
    said = f"{left / 2**30:.1f} GiB left for the workspace on {mount_of(workspace.root)}"
    if left >= LITTLE_FOR_RECORDS_BYTES:
        return Check("", "space", "pass", said)
    level: Level = "warn" if left >= ROOM_BYTES else "fail"
    return Check("", "space", level, said, "labctl clean frees what finished work left; labctl du shows what is large")


def _locks(workspace: Workspace) -> Iterator[Check]:
    """labctl and SQLite lock files, so that two commands at once spoil nothing."""
    try:
        with tempfile.TemporaryFile(dir=workspace.root) as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            what = f"the file system {mount_of(workspace.root)} has none: nothing can be submitted from here"
            yield Check("", "locks", "fail", what, LOCKS_REMEDY)
        else:
            yield Check("", "locks", "warn", f"not tried: {workspace.root}: {error.strerror}", "check its permissions")
    else:
        yield Check("", "locks", "pass", "files can be locked")


def _journal(workspace: Workspace) -> Iterator[Check]:
    """SQLite's write-ahead log breaks where hosts share a database."""
    if not workspace.index.is_file():
        return
    try:
        with closing(sqlite3.connect(f"{workspace.index.as_uri()}?mode=ro", uri=True)) as database:
            (mode,) = database.execute("PRAGMA journal_mode").fetchone()
    except sqlite3.Error as error:
        yield Check("", "database", "fail", f"{workspace.index}: {error}", "labctl collect --rebuild makes it again")
        return
    if mode == "wal":
        remedy = f"sqlite3 {workspace.index} 'PRAGMA journal_mode=DELETE'; labctl itself never sets it"
        yield Check("", "database", "fail", "a write-ahead log, which breaks on shared filesystems", remedy)
    else:
        yield Check(
            "", "database", "pass", f"a rollback journal ({mode}), which works where hosts share the filesystem"
        )


def _token() -> Check:
    from huggingface_hub import get_token

    if os.environ.get("HF_TOKEN"):
        return Check(
            "",
            "token",
            "pass",
            "HF_TOKEN is set; jobs inherit it. labctl writes it nowhere; Slurm keeps a job's environment while the job is there",
        )
    if get_token():
        return Check(
            "", "token", "pass", "found where `hf auth login` keeps it: nodes find it where they share HF_HOME"
        )
    return Check(
        "",
        "token",
        "warn",
        "none: enough for public models",
        "for gated ones accept their terms on the hub, and export HF_TOKEN=hf_... in the shell that submits",
    )


def _network() -> Check:
    answer = hub_answer()
    if answer["reached"]:
        return Check("", "network", "pass", f"{answer['endpoint']} answers from here")
    return Check(
        "",
        "network",
        "warn",
        f"{answer['endpoint']} does not answer from here: {answer.get('why', '')}",
        "behind a proxy set HTTPS_PROXY; without any way out, copy the checkpoint here and give its folder as --model-id",
    )


# ---------------------------------------------------------------- a partition, from here


def of_partition(workspace: Workspace, partition: Partition, model: str, revision: str) -> Iterator[Check]:
    """The checks of one partition that can be made on the login node. `model` is the one to look for in its cache."""
    name = partition.name
    if partition.executor == "slurm":
        yield from _of_slurm(workspace, partition)
    yield from _of_python(workspace, partition)
    yield from _of_cache(partition)
    yield _of_model(partition, model, revision, name)


def _of_slurm(workspace: Workspace, partition: Partition) -> Iterator[Check]:
    name = partition.name
    try:
        known, unknown = site.find(partition.slurm_partition)
        findings = slurm_checks.of_partition(partition, partition.gpus, known, unknown)
        yield from _as_checks(name, "partition", findings, _described(known))
        if unknown:
            return
        trial = site.try_script(slurm_checks.script_of(workspace, partition, partition.gpus))
        findings = slurm_checks.of_trial(partition, known, trial)
        # Slurm names a start in a partition that is down, too.
        open_ = any(found.state == "up" and found.usable_nodes for found in known)
        start = f"; it would start at {trial.starts_at}" if trial.starts_at and open_ else ""
        yield from _as_checks(name, "job", findings, f"sbatch --test-only takes it{start}" if trial.accepted else "")
    except SlurmError as error:
        yield Check(name, "partition", "warn", f"not checked: {error.message}", error.remedy)
        return
    except LabctlError as error:
        yield Check(name, "script", "fail", error.message, error.remedy)
        return
    charged = partition.account or "Slurm's default"
    yield from _as_checks(name, "account", slurm_checks.of_accounts(workspace, partition), charged)


def _described(known: Sequence[SlurmPartition]) -> str:
    from labctl_orchestrator.preflight.init_proposal import described

    return "; ".join(f"Slurm's {found.name}: {described(found)}; {_states(found)}" for found in known)


def _states(found: SlurmPartition) -> str:
    counts: dict[str, int] = {}
    for nodes in found.nodes:
        counts[nodes.state] = counts.get(nodes.state, 0) + nodes.count
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def _as_checks(partition: str, name: str, findings: Sequence[Finding], good: str) -> Iterator[Check]:
    for finding in findings:
        level: Level = "warn" if finding.severity == "warn" else "fail"
        yield Check(partition, name, level, finding.what, finding.remedy)
    if not findings and good:
        yield Check(partition, name, "pass", good)


def _of_python(workspace: Workspace, partition: Partition) -> Iterator[Check]:
    answer, problem = probed(workspace, partition)
    if answer is None:
        remedy = (
            f"set python of [partitions.{partition.name}] to one that exists here and on its nodes, and check its setup"
        )
        yield Check(partition.name, "python", "fail", problem, remedy)
        return
    yield from engine_checks(partition, answer)


def probed(workspace: Workspace, partition: Partition) -> tuple[dict[str, Any] | None, str]:
    """(what the partition's Python answers on this machine, with its `setup` and `env`; "") or (None, why it does not)."""
    with tempfile.TemporaryDirectory(prefix="labctl-doctor-") as folder:
        here = Workspace(Path(folder))
        worker_code.keep_code(here)
        script = Script(
            partition, "labctl", 0, None, Path("logs"), here.code / worker_code.code_name(), workspace.templates
        )
        command = [partition.python, "-m", "labctl_workers.probe"]
        shell, environment = script.without_slurm(shlex.join(command))
        try:
            done = subprocess.run(
                ["/bin/bash", "-c", shell],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PROBE_WITHIN_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None, f"{partition.python} did not answer within {PROBE_WITHIN_S:.0f} s"
    with suppress(ValueError, IndexError):
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer, ""
    words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return None, f"{partition.python}: {words[-1] if words else f'exit code {done.returncode} without a word'}"


def engine_checks(partition: Partition, answer: dict[str, Any]) -> Iterator[Check]:
    """What the partition's Python has, and whether that runs on the partition's GPU."""
    name, environment = partition.name, f"labctl env -p {partition.name} prints what fits"
    where = f"{answer['executable']}, Python {answer['python']}"
    old = tuple(int(part) for part in answer["python"].split(".")[:2]) < (3, 10)
    if old or "error" in answer["worker"]:
        why = "older than 3.10" if old else f"labctl's worker does not load: {answer['worker']['error']}"
        yield Check(name, "python", "fail", f"{where}: {why}", f"take another Python; {environment}")
        return
    yield Check(name, "python", "pass", f"{where}: labctl's worker and submitit load")
    packages: dict[str, str | None] = answer["packages"]
    if not packages["torch"]:
        yield Check(name, "torch", "fail", "not installed", f"install it into {answer['executable']}; {environment}")
        return
    unfit = _unfit(partition, answer)
    yield _of_torch(partition, answer["torch"], unfit, environment)
    for package in ("transformers", "vllm"):
        yield _of_engine(partition, package, packages, unfit, environment)


def _unfit(partition: Partition, answer: dict[str, Any]) -> dict[str, str]:
    """The packages whose version cannot work on the partition's hardware, each with why (environments.toml)."""
    device = "cpu" if partition.device == "cpu" else "cuda"
    if device == "cuda" and partition.capability is None:
        return {}
    try:
        environment = environments.environment_for(partition.capability, device)
    except LabctlError as error:
        return {"torch": error.message}
    here = {name: version for name, version in answer["packages"].items() if version is not None}
    installed = environments.Installed(answer["python"], here)
    found = [one for backend in ENGINES for one in environments.unfit(environment, installed, backend)]
    return {package.name: f"needs {package.holds}: {package.reason}" for package, _ in found}


def _of_torch(partition: Partition, told: dict[str, Any], unfit: dict[str, str], environment: str) -> Check:
    name = partition.name
    if "error" in told:
        return Check(name, "torch", "fail", f"cannot be imported: {told['error']}", environment)
    torch = told["answer"]
    said = f"{torch['version']}, CUDA {torch['cuda']}" if torch["cuda"] else f"{torch['version']}, built without CUDA"
    if partition.device == "cpu" or (partition.device == "auto" and not torch["cuda"]):
        return Check(name, "torch", "pass", f"{said}; the partition computes on CPUs")
    if not torch["cuda"]:
        return Check(name, "torch", "fail", f"{said}, and the partition computes on GPUs", environment)
    if partition.capability is None:
        remedy = f"set capability of [partitions.{name}]; --on-node tells it"
        return Check(name, "torch", "warn", f"{said}; whether it knows the GPU is not known", remedy)
    if not runs_on(partition.capability, torch["arch_list"]):
        has = " ".join(torch["arch_list"]) or "none"
        what = f"{said}: no code for compute capability {partition.capability} (it has {has})"
        return Check(name, "torch", "fail", what, environment)
    if "torch" in unfit:
        return Check(name, "torch", "fail", f"{said}: {unfit['torch']}", environment)
    return Check(name, "torch", "pass", f"{said}, with code for compute capability {partition.capability}")


def runs_on(capability: str, architectures: Sequence[str]) -> bool:
    """Whether code for these architectures runs on a GPU of this capability: machine code (sm_80) on its own major version
    from its minor one on, PTX (compute_80) on everything newer, sm_90a on 9.0 alone. NVIDIA's CUDA programming guide,
    "Application compatibility"."""
    major, minor = (int(part) for part in capability.split("."))
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = number.rstrip("af")
        if not digits.isdigit():
            continue
        its_major, its_minor = int(digits[:-1]), int(digits[-1])
        if number.endswith("a"):
            fits = (its_major, its_minor) == (major, minor)
        elif kind == "sm":
            fits = its_major == major and its_minor <= minor
        else:
            fits = (its_major, its_minor) <= (major, minor)
        if fits:
            return True
    return False


def _of_engine(
    partition: Partition, package: str, packages: dict[str, str | None], unfit: dict[str, str], environment: str
) -> Check:
    name, version = partition.name, packages[package]
    backends = "--backend hf and --backend staged" if package == "transformers" else "--backend vllm"
    if version is None:
        level: Level = "warn" if packages["transformers" if package == "vllm" else "vllm"] else "fail"
        return Check(name, package, level, f"not installed: {backends} cannot run here", environment)
    if package in unfit:
        return Check(name, package, "fail", f"{version}: {unfit[package]}", environment)
    if package == "transformers" and not packages.get("accelerate"):
        return Check(name, package, "fail", f"{version}, without accelerate", "install accelerate beside it")
    return Check(name, package, "pass", version)


def _of_cache(partition: Partition) -> Iterator[Check]:
    name, folder = partition.name, hub_cache.folder(partition)
    found = filesystem_of(folder)
    kind = f" ({found.kind})" if found else ""
    left, quota = disk_space.left_bytes(folder), disk_space.quota_of(folder)
    said = f"{folder}{kind}: {fetch.size_text(left)} left for you"
    if quota is not None:
        said += f", by a quota of {fetch.size_text(quota.limit_bytes)}"
    move = f"set HF_HOME in env of [partitions.{name}], and in your shell, to a larger folder that nodes share"
    if left < LITTLE_BYTES:
        yield Check(name, "cache", "warn", said, f"a 7B model takes 13 GiB: {move}")
    elif partition.executor == "slurm" and found and not found.shared and slurm_checks.nodes_elsewhere(partition):
        yield Check(name, "cache", "warn", f"{said}; nodes may not see this disk", move)
    else:
        yield Check(name, "cache", "pass", said)


def _of_model(partition: Partition, model: str, revision: str, name: str) -> Check:
    from labctl_orchestrator.models import resolve, weight_files

    if resolve.is_folder(model):
        try:
            folder = expand_home(model).resolve()
            resolve.check_folder(folder)
            weight_files.check_whole(folder)
        except LabctlError as error:
            return Check(name, "model", "fail", error.message, error.remedy)
        return Check(name, "model", "pass", f"{model} is a checkpoint's folder")
    folder = hub_cache.folder(partition)
    cached = hub_cache.find(folder, model, revision)
    if cached is not None and cached.whole:
        return Check(name, "model", "pass", f"{model} is in the cache, at {cached.commit[:12]}")
    ref = ModelRef(model, revision)
    if partition.offline:
        missing = slurm_checks.not_in_the_cache(ref, partition, folder, cached.missing if cached else ())
        return Check(name, "model", "fail", missing.what, missing.remedy)
    what = f"{model} is not in the cache{' as a whole' if cached else ''}: the first job downloads it, on GPU time"
    return Check(name, "model", "warn", what, f"labctl fetch {model} -p {name}")


# ---------------------------------------------------------------- a partition, from one of its nodes


def on_node(workspace: Workspace, partition: Partition, within_s: float, say: Callable[[str], None]) -> list[Check]:
    """Submit a short job that looks around on a node, wait for it, and tell what it saw. Raises SlurmError where Slurm refuses
    it. A job that has not started in time is cancelled, and so is one whose waiting is interrupted."""
    from labctl_slurm import control, executor

    if partition.executor != "slurm":
        return [Check(partition.name, "node", "pass", "this machine is its node: there is nothing to submit")]
    workspace.create()
    worker_code.keep_code(workspace)
    folder = workspace.data / "doctor" / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{partition.name}"
    answer_file = folder / "answer.json"
    short = structs.replace(partition, time=NODE_TIME)
    code = workspace.code / worker_code.code_name()
    script = Script(short, f"labctl-doctor-{os.getpid()}", partition.gpus, None, folder, code, workspace.templates)
    worker = [partition.python, "-u", "-m", "labctl_workers.probe", "--node", f"--gpus={partition.gpus}"]
    worker += [f"--folder={workspace.root}", f"--out={answer_file}"]
    job_id = executor.submit_command(script, shlex.join(worker))
    say(f"job {job_id} looks around on a node of {partition.name}; Ctrl-C cancels it")
    try:
        ended = _waited(job_id, script, answer_file, within_s, say)
    except BaseException:
        with suppress(LabctlError):
            control.cancel([job_id])
        raise
    if ended.level != "pass":
        if ended.name == "waiting":
            with suppress(LabctlError):
                control.cancel([job_id])
        return [Check(partition.name, "node", "fail", f"job {job_id}: {ended.said}{_last_words(folder)}", ended.remedy)]
    checks = list(node_checks(partition, read_json(answer_file), job_id))
    if not failed(checks):
        shutil.rmtree(folder, ignore_errors=True)
    return checks


def _waited(job_id: str, script: Script, answer: Path, within_s: float, say: Callable[[str], None]) -> Check:
    """The end of the wait: pass where the answer is there, else what became of the job."""
    from labctl_slurm import diagnose, queue

    until = time.monotonic() + within_s
    said, ended_at = "", None
    while True:
        if answer.exists():
            return Check("", "answer", "pass", "")
        now = time.monotonic()
        job = (job_id, script.job_name)
        state = queue.query([job]).jobs.get(job)
        if state is not None and state.state in queue.ENDED:
            ended_at = ended_at or now
            if now - ended_at > FILES_COME_WITHIN_S or state.state != "COMPLETED":
                if state.state != "COMPLETED":
                    errors = map(diagnose.tail, script.logs.glob("*.err"))
                    told = diagnose.of_end(state, errors, {"partition": script.partition.name})
                    return Check("", "end", "fail", told.happened, told.remedy)
                remedy = "work in a folder that login and compute nodes share"
                return Check("", "end", "fail", "it ended well, but what it wrote is not to be seen here", remedy)
        elif now > until:
            why = "" if state is None else f" ({state.state.lower()}: {state.reason})"
            return Check(
                "", "waiting", "fail", f"no answer within {within_s / 60:.0f} min{why}; cancelled", "try again later"
            )
        elif state is not None and (word := f"{state.state.lower()}, {state.reason}") != said:
            said = word
            if state.state == "PENDING" and state.reason not in ("None", ""):
                say(f"job {job_id} waits: {state.reason}")
        time.sleep(NODE_LOOK_S)


def _last_words(folder: Path) -> str:
    """The last line that the job wrote; "" where it wrote none."""
    lines: list[str] = []
    for log in sorted(folder.glob("*.err")) + sorted(folder.glob("*.out")):
        with suppress(OSError):
            lines += [
                line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
            ]
    return f"; it said: {lines[-1]}" if lines else ""


def node_checks(partition: Partition, answer: dict[str, Any], job_id: str) -> Iterator[Check]:
    """What the job saw on its node."""
    name = partition.name
    node = answer["node"] or answer["host"]
    filesystem = answer.get("filesystem") or {}
    yield Check(name, "node", "pass", f"{node}, job {job_id}: it sees the workspace ({filesystem.get('kind', '?')})")
    for check in engine_checks(partition, answer):
        if check.level != "pass":  # the same Python was found good from here
            yield Check(name, f"node's {check.name}", check.level, check.said, check.remedy)
    if partition.device != "cpu":
        yield from _node_gpus(partition, answer)
    if "vllm" in answer and "error" in answer["vllm"]:
        what = f"vllm cannot be imported: {answer['vllm']['error']}"
        yield Check(name, "node's vllm", "fail", what, f"labctl env -p {name} prints what fits")
    yield _node_network(partition, answer)


def _node_gpus(partition: Partition, answer: dict[str, Any]) -> Iterator[Check]:
    name, asked = partition.name, partition.gpus
    listed = answer["nvidia_smi"]
    if "error" in listed:
        yield Check(name, "nvidia-smi", "fail", listed["error"], "the node's driver is broken: tell the administrators")
    elif listed["answer"] is None:
        yield Check(
            name, "nvidia-smi", "fail", "not found on the node", "the node has no NVIDIA driver: check slurm_partition"
        )
    else:
        yield Check(
            name, "nvidia-smi", "pass", "; ".join(" ".join(line.split()) for line in listed["answer"].splitlines())
        )
    gpus = answer["gpus"].get("answer") or []
    visible = answer["visible"] if answer["visible"] is not None else "not set"
    said = f"{len(gpus)} of {asked} (CUDA_VISIBLE_DEVICES={visible})"
    if len(gpus) < asked:
        remedy = f"--gres={partition.gres(asked)} gave fewer: check gpu_type and slurm_partition of [partitions.{name}]"
        yield Check(name, "gpus", "fail", said, remedy)
        return
    names = ", ".join(sorted({f"{gpu['name']} ({gpu['capability']})" for gpu in gpus}))
    others = {gpu["capability"] for gpu in gpus} - {partition.capability or gpus[0]["capability"]}
    if others:
        remedy = f"correct capability of [partitions.{name}], or set slurm_partition to one that holds such nodes alone"
        yield Check(name, "gpus", "fail", f"{said}: {names}, not {partition.capability}", remedy)
        return
    yield Check(name, "gpus", "pass", f"{said}: {names}")
    yield from _node_torch(partition, answer)


def _node_torch(partition: Partition, answer: dict[str, Any]) -> Iterator[Check]:
    """The sanity check: torch sees as many GPUs, computes on each, and copies between them."""
    name, cuda = partition.name, answer["cuda"]
    if "error" in cuda or cuda["answer"] is None or not cuda["answer"]["available"]:
        why = cuda.get("error") or "torch sees no GPU on the node, though it is there"
        remedy = (
            f"its CUDA is newer than the node's driver, or it is a CPU build: labctl env -p {name} prints what fits"
        )
        yield Check(name, "torch on GPUs", "fail", why, remedy)
        return
    seen = cuda["answer"]
    wrong = [f"GPU {place}: {told}" for place, told in seen["sums"].items() if told.get("answer") is not True]
    wrong += [f"copy {pair}: {told}" for pair, told in seen["copies"].items() if told.get("answer") is not True]
    if wrong:
        yield Check(
            name, "torch on GPUs", "fail", "; ".join(wrong), "no code for this GPU, or a broken one: labctl env"
        )
    else:
        good = f"{seen['count']} devices: {', '.join(seen['names'])}; a product on each and the copies between them are right"
        yield Check(name, "torch on GPUs", "pass", good)
    apart = [f"{a}-{b}" for a, b, can in seen["peers"] if not can]
    if apart:
        remedy = "copies go through the host's memory: slower, and right; no other GPUs of this node may do better"
        yield Check(name, "peer access", "warn", f"GPUs {', '.join(apart)} cannot reach each other's memory", remedy)
    elif seen["peers"]:
        yield Check(name, "peer access", "pass", "each GPU reaches the other's memory")


def _node_network(partition: Partition, answer: dict[str, Any]) -> Check:
    name, hub = partition.name, answer["hub"].get("answer") or {"reached": False, "why": answer["hub"].get("error", "")}
    if partition.offline:
        return Check(name, "node's network", "pass", "not needed: offline = true, models come from the cache")
    if hub["reached"]:
        return Check(name, "node's network", "pass", f"{hub['endpoint']} answers from the node")
    remedy = f"set offline = true of [partitions.{name}], and bring models with labctl fetch MODEL -p {name}"
    return Check(name, "node's network", "warn", f"the hub does not answer from the node: {hub.get('why', '')}", remedy)
