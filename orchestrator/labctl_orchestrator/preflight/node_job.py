"""A short Slurm job that checks a node of a partition, and the checks of its answer."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from labctl_orchestrator.preflight.finding import Check, failed
from labctl_orchestrator.preflight.python_checks import of_answer
from labctl_orchestrator.store import worker_code
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm import control, diagnose, executor, queue
from labctl_slurm.command import Cluster
from labctl_slurm.errors import LabctlError
from labctl_slurm.partitions import Partition
from labctl_slurm.poll import Poll
from labctl_slurm.render import Script
from labctl_workers.probe import Hub, ProbeAnswer, TorchOnGpus
from labctl_workers.record import read_bytes

NODE_TIME = "0-00:10:00"
LOOK_EVERY_S = 1.0
FILES_COME_WITHIN_S = 15.0  # delay of another host's files on a network filesystem


class _NoAnswerError(Exception):
    """The job gave no answer; `ended`: it has ended."""

    def __init__(self, message: str, remedy: str, *, ended: bool) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.ended = ended


def on_node(workspace: Workspace, partition: Partition, within_s: float, say: Callable[[str], None]) -> list[Check]:
    """Submit a short job to a node, wait for it and check its answer. A late or interrupted job is cancelled. Raises SlurmError
    if Slurm refuses the job."""
    name = partition.name
    if partition.executor != "slurm":
        return [Check(name, "node", "pass", "this machine is the node; no job needed")]
    workspace.create()
    worker_code.keep_code(workspace)
    folder = workspace.data / "doctor" / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}"
    workspace.make_folder(folder)
    answer_file = folder / "answer.json"
    short = msgspec.structs.replace(partition, time=NODE_TIME)
    code = workspace.code / worker_code.code_name()
    script = Script(short, f"labctl-doctor-{os.getpid()}", partition.gpus, None, folder, code, workspace.templates)
    script = replace(script, folders=(workspace.root,))
    asked = [f"--gpus={partition.gpus}", f"--folder={workspace.root}", f"--out={answer_file}"]
    worker = script.worker_command("-u", "-m", "labctl_workers.probe", "--node", *asked)
    job_id, cluster = executor.submit_command(script, worker)
    say(f"job {job_id} checks a node of {name}; Ctrl-C cancels it")
    try:
        _wait(job_id, cluster, script, answer_file, within_s, say)
    except BaseException as error:
        if not (isinstance(error, _NoAnswerError) and error.ended):
            with suppress(LabctlError):
                control.cancel([job_id], cluster)
        if isinstance(error, _NoAnswerError):
            return [Check(name, "node", "fail", f"job {job_id}: {error}{_last_words(folder)}", error.remedy)]
        raise
    checks = list(of_node(partition, msgspec.json.decode(read_bytes(answer_file), type=ProbeAnswer), job_id))
    if not failed(checks):
        shutil.rmtree(folder, ignore_errors=True)
    return checks


def _wait(
    job_id: str, cluster: Cluster, script: Script, answer: Path, within_s: float, say: Callable[[str], None]
) -> None:
    """Wait for the answer. Raises _NoAnswerError if the job ends without one or takes too long."""
    until = time.monotonic() + within_s
    text, ended_at = "", None
    job = (job_id, script.job_name)
    state, queries = None, Poll([script.partition.poll_s])
    while not answer.exists():
        now = time.monotonic()
        if queries.is_due():
            state = queue.query([job], cluster=cluster).jobs.get(job)
        if state is not None and state.state in queue.ENDED:
            ended_at = ended_at or now
            if state.state != "COMPLETED":
                errors = map(diagnose.tail, script.logs.glob("*.err"))
                told = diagnose.of_end(state, errors, {"partition": script.partition.name})
                raise _NoAnswerError(told.happened, told.remedy, ended=True)
            if now - ended_at > FILES_COME_WITHIN_S:
                what = "the job completed, but its answer is not visible here"
                raise _NoAnswerError(what, "work in a folder that login and compute nodes share", ended=True)
        elif now > until:
            why = "" if state is None else f" ({state.state.lower()}: {state.reason})"
            what = f"no answer within {within_s / 60:.0f} min{why}; cancelled"
            raise _NoAnswerError(what, "run it again when the partition is less busy", ended=False)
        elif state is not None and (word := f"{state.state.lower()}, {state.reason}") != text:
            text = word
            if state.state == "PENDING" and state.reason not in ("None", ""):
                say(f"job {job_id} waits: {state.reason}")
        time.sleep(LOOK_EVERY_S)


def _last_words(folder: Path) -> str:
    """The last line of the job's output, if any."""
    lines: list[str] = []
    for log in sorted(folder.glob("*.err")) + sorted(folder.glob("*.out")):
        with suppress(OSError):
            lines += filter(None, map(str.strip, log.read_text(encoding="utf-8", errors="replace").splitlines()))
    return f"; its last line: {lines[-1]}" if lines else ""


# ---------------------------------------------------------------- checks of the answer


def of_node(partition: Partition, answer: ProbeAnswer, job_id: str) -> Iterator[Check]:
    """Checks of the job's answer."""
    name = partition.name
    kind = answer.filesystem.kind if answer.filesystem else "?"
    yield Check(name, "node", "pass", f"{answer.node or answer.host}, job {job_id}: it sees the workspace ({kind})")
    for check in of_answer(partition, answer):
        # A Python that was found good from here is the same on the node; the login node may be unable to start its container.
        if check.level != "pass" or partition.image is not None:
            yield Check(name, f"node's {check.name}", check.level, check.text, check.remedy)
    if partition.device != "cpu":
        yield from _gpus(partition, answer)
    if answer.vllm.error:
        what = f"cannot import vllm: {answer.vllm.error}"
        yield Check(name, "node's vllm", "fail", what, f"labctl env -p {name} prints a matching environment")
    yield _network(partition, answer)


def _gpus(partition: Partition, answer: ProbeAnswer) -> Iterator[Check]:
    name, asked, listed = partition.name, partition.gpus, answer.nvidia_smi
    if listed.error:
        yield Check(name, "nvidia-smi", "fail", listed.error, "report the node's broken driver to the administrators")
    elif listed.answer is None:
        remedy = "check slurm_partition: the node has no NVIDIA driver"
        yield Check(name, "nvidia-smi", "fail", "not found on the node", remedy)
    else:
        lines = "; ".join(" ".join(line.split()) for line in listed.answer.splitlines())
        yield Check(name, "nvidia-smi", "pass", lines)
    gpus = answer.gpus.answer or []
    text = f"{len(gpus)} of {asked} (CUDA_VISIBLE_DEVICES={'not set' if answer.visible is None else answer.visible})"
    if len(gpus) < asked:
        option = partition.resources(asked).gpu_words or 'gpu_request = "none"'
        remedy = f"check gpu_type, gpu_request and slurm_partition in [partitions.{name}]: {option} gave fewer"
        yield Check(name, "gpus", "fail", text, remedy)
        return
    text = f"{text}: {', '.join(sorted({f'{gpu.name} ({gpu.capability})' for gpu in gpus}))}"
    if {gpu.capability for gpu in gpus} - {partition.capability or gpus[0].capability}:
        remedy = f"correct capability in [partitions.{name}], or set slurm_partition to one with equal nodes"
        yield Check(name, "gpus", "fail", f"{text}, not {partition.capability}", remedy)
        return
    yield Check(name, "gpus", "pass", text)
    seen = answer.cuda.answer
    if seen is None or not seen.available:
        why = answer.cuda.error or "torch finds no GPU on the node"
        remedy = f"install torch from labctl env -p {name}: this one needs a newer driver, or is a CPU build"
        yield Check(name, "torch on GPUs", "fail", why, remedy)
    else:
        yield from _torch(name, seen)


def _torch(name: str, seen: TorchOnGpus) -> Iterator[Check]:
    """Results of torch on each GPU, and of copies between GPUs."""
    wrong = [
        f"{what} {where}: {part.error or 'wrong result'}"
        for what, parts in (("GPU", seen.sums), ("copy", seen.copies))
        for where, part in parts.items()
        if part.answer is not True
    ]
    if wrong:
        remedy = "check the environment with labctl env; if it is right, the GPU may be broken"
        yield Check(name, "torch on GPUs", "fail", "; ".join(wrong), remedy)
    else:
        good = f"{seen.count} devices: {', '.join(seen.names)}; products and copies are correct"
        yield Check(name, "torch on GPUs", "pass", good)
    apart = [f"{a}-{b}" for a, b, can in seen.peers if not can]
    if apart:
        remedy = "no action needed: copies go through the host's memory, which is slower"
        yield Check(name, "peer access", "warn", f"GPUs {', '.join(apart)} cannot access each other's memory", remedy)
    elif seen.peers:
        yield Check(name, "peer access", "pass", "GPUs access each other's memory")


def _network(partition: Partition, answer: ProbeAnswer) -> Check:
    name, hub = partition.name, answer.hub.answer or Hub(why=answer.hub.error)
    if partition.offline:
        return Check(name, "node's network", "pass", "not needed (offline = true)")
    if hub.reached:
        return Check(name, "node's network", "pass", f"the node can reach {hub.endpoint}")
    remedy = f"set offline = true in [partitions.{name}], and download models with labctl fetch MODEL -p {name}"
    return Check(name, "node's network", "warn", f"the Hub does not answer from the node: {hub.why}", remedy)
