"""Does a model take the memory that `labctl fit` foretells? On two GPUs, against what torch and vLLM really hold.

    python tests/benchmarks/fit_truth.py FOLDER [--like tinyllama llama-2-7b] [--batches 1 16] [--backends hf staged]
        [--without-vllm | --without-transformers] [--within 600]

FOLDER gets the checkpoints (random weights of public dimensions), the jobs and their logs. Each line gives the predicted and
the measured figure of one GPU, their ratio, the bound (5%), and the difference in MiB. hf and staged (compile=false): weights,
keys and values, and torch's peak over the measured passes, of labctl's own engine, a process a job, all jobs at once (a
process's own figures do not depend on the others). vLLM: weights and the tokens that its KV blocks hold, of labctl's own engine,
one job after the other. A row has a time limit of its own; what there is no time left for is told, and fails. Exit status 1
where a bound does not hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("orchestrator", "slurm", "templates", "workers", "")]

from labctl_orchestrator.models import fit  # noqa: E402
from labctl_orchestrator.models.architecture import Parts, Shape, parameters, shape_of  # noqa: E402
from labctl_orchestrator.models.fit import GIB, MIB, Gpus, Sequences  # noqa: E402
from labctl_workers import hardware  # noqa: E402
from labctl_workers.record import JobSpec, ModelRef, RunSpec, write_json  # noqa: E402
from tests.benchmarks.report import Report  # noqa: E402

PROMPT = "Explain tensor parallelism now!!"  # 32 bytes: 32 tokens of random_llama's tokenizer
NEW_TOKENS = 128
BOUND = 0.05
# Processes that share a GPU take turns on it: six of them are ready after minutes, one after ten seconds.
HF_WITHIN_S, VLLM_WITHIN_S, CHECKPOINT_WITHIN_S = 240.0, 200.0, 90.0


@dataclass
class Job:
    """One process of labctl's worker: a checkpoint, a backend, and one run for each batch size."""

    like: str
    backend: str
    batches: list[int]
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return f"{self.like}-{self.backend}-{'-'.join(map(str, self.batches))}"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--like", nargs="+", default=["tinyllama", "llama-2-7b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--backends", nargs="+", default=["hf", "staged"], choices=("hf", "staged"))
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try the benchmark itself")
    parser.add_argument("--without-vllm", action="store_true")
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--within", type=float, default=600.0, help="seconds for all of it")
    options = parser.parse_args()
    options.until = time.monotonic() + options.within
    options.folder = options.folder.absolute()
    options.folder.mkdir(parents=True, exist_ok=True)
    report, began = Report(), time.monotonic()
    gpus = gpus_here(options)
    print(f"{gpus.count} x {gpus.name}, {gpus.memory_bytes / GIB:.0f} GiB, capability {gpus.capability}", flush=True)
    made = checkpoints(report, options)
    print(f"checkpoints: {time.monotonic() - began:.0f} s", flush=True)
    if options.without_transformers:
        print("transformers: left out", flush=True)
    else:
        of_transformers(report, options, gpus, made)
    print(f"transformers: {time.monotonic() - began:.0f} s", flush=True)
    if options.without_vllm or importlib.util.find_spec("vllm") is None:
        print("vLLM: left out" if options.without_vllm else "vLLM: not installed here", flush=True)
    else:
        vllm_reservation(report, options, gpus, made)
    print(f"all: {time.monotonic() - began:.0f} s", flush=True)
    return report.end()


def gpus_here(options: argparse.Namespace) -> Gpus:
    """As a partition would describe them: the nominal memory, in whole GiB."""
    seen = hardware.visible_gpus() if options.device == "cuda" else []
    if options.device == "cuda" and len(seen) < options.gpus:
        raise SystemExit(f"{len(seen)} GPUs are here, {options.gpus} are needed (--gpus)")
    if not seen:
        return Gpus(options.gpus, "CPU", 80 * GIB, 9.0)
    return Gpus(options.gpus, seen[0].name, math.ceil(seen[0].memory_bytes / GIB) * GIB, float(seen[0].capability))


# ---------------------------------------------------------------- checkpoints


def checkpoints(report: Report, options: argparse.Namespace) -> dict[str, Path]:
    """Those that could be made, by name; made side by side."""
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    started = {}
    for like in options.like:
        folder = options.folder / like
        if not (folder / "tokenizer_config.json").exists():
            command = [
                sys.executable,
                str(ROOT / "tests" / "random_llama.py"),
                str(folder),
                "--like",
                like,
                "--dtype",
                dtype,
            ]
            started[like] = start(command, options.folder / f"{like}.log")
    for like, process in started.items():
        if not ended(process, min(CHECKPOINT_WITHIN_S, left(options))):
            report.line(f"checkpoint {like}", "", "", told(options.folder / f"{like}.log"), ok=False)
    return {
        like: options.folder / like
        for like in options.like
        if (options.folder / like / "tokenizer_config.json").exists()
    }


def described(folder: Path, itemsize: int) -> tuple[Shape, Parts]:
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    return shape, parameters(shape).times(itemsize)


# ---------------------------------------------------------------- jobs


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "workers"), os.environ.get("PYTHONPATH", "")]),
    }
    with log.open("wb") as out:
        return subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )


def ended(process: subprocess.Popen[bytes], within_s: float) -> bool:
    """Whether it ended well in time; what did not is killed, with all that it started."""
    try:
        return process.wait(max(1.0, within_s)) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def left(options: argparse.Namespace) -> float:
    return float(options.until - time.monotonic())


def told(log: Path) -> str:
    """The last words of a log."""
    lines = (
        [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    )
    return " | ".join(lines[-3:])[-300:] or "no word in its log"


def begin(job: Job, options: argparse.Namespace, checkpoint: Path) -> None:
    runs = [RunSpec(f"b{n}", {}, "p", NEW_TOKENS, n, ignore_eos=True, repeats=1) for n in job.batches]
    own: dict[str, Any] = {"compile": False} if job.backend == "staged" else {}
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    spec = JobSpec(job.name, "here", "local", job.backend, ModelRef(job.like, path=str(checkpoint)), dtype, options.device,
                   options.gpus, runs, {"p": [PROMPT]}, engine_options=own, raw_prompt=True,
                   parallel="tensor" if job.backend == "vllm" else "layers")  # fmt: skip
    path = job.folder / ".labctl" / "arrays" / job.name / "0.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, spec.to_json())
    job.process = start([sys.executable, "-u", "-m", "labctl_workers.job", str(path)], job.log)


def record(job: Job, batch: int) -> dict[str, Any] | None:
    """What this job's process measured of a run; records of other jobs lie in the same folder."""
    for file in (job.folder / ".labctl" / "results" / f"b{batch}").glob("*.json"):
        found: dict[str, Any] = json.loads(file.read_text())
        if found["attempt"]["job_id"] == job.name and found["status"] == "done":
            return found
    return None


@contextmanager
def finished(job: Job, within_s: float) -> Iterator[bool]:
    """Whether the job ended well; nothing of it lives on."""
    assert job.process is not None
    try:
        yield ended(job.process, within_s)
    finally:
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)


# ---------------------------------------------------------------- transformers


def of_transformers(report: Report, options: argparse.Namespace, gpus: Gpus, made: dict[str, Path]) -> None:
    # With staged, a job holds the memory of its largest batch: each batch is a job of its own.
    jobs = []
    for like in made:
        for backend in options.backends:
            parts = [options.batches] if backend == "hf" else [[batch] for batch in options.batches]
            jobs += [Job(like, backend, batches, options.folder) for batches in parts]
    at_once = len(jobs) if options.device == "cuda" else 1
    while jobs:
        now, jobs = jobs[:at_once], jobs[at_once:]
        for job in now:
            begin(job, options, made[job.like])
        for job in now:
            with finished(job, min(HF_WITHIN_S, left(options))) as well:
                for batch in job.batches:
                    of_a_run(report, job, batch, options, gpus, made[job.like], well)


def of_a_run(
    report: Report, job: Job, batch: int, options: argparse.Namespace, gpus: Gpus, checkpoint: Path, well: bool
) -> None:
    what = f"{job.like} {job.backend} batch {batch}"
    found = record(job, batch)
    if found is None:
        report.line(what, "", "", ("no record: " if well else "ended badly: ") + told(job.log), ok=False)
        return
    itemsize = 2 if options.device == "cuda" else 4
    shape, parts = described(checkpoint, itemsize)
    prompt_tokens = found["repeats"][0]["samples"][0]["prompt_tokens"]
    load = Sequences(batch, prompt_tokens, NEW_TOKENS, itemsize)
    devices = {device["device"]: device for device in found["repeats"][0]["devices"]}
    on = gpus if options.device == "cuda" else Gpus(1, "CPU", gpus.memory_bytes, 9.0)
    foretold = fit.by_layers(shape, parts, load, on, job.backend)
    for index, own in enumerate(foretold):
        device = devices.get(f"cuda:{index}") or devices.get("cpu", {})
        where = f"{what} GPU {index}"
        held(report, f"{where} weights", own.weights, device.get("weights_bytes"))
        held(report, f"{where} KV cache", own.kv_cache, device.get("kv_cache_reserved_bytes"))
        held(report, f"{where} peak", own.peak, device.get("peak_allocated_bytes"))


def held(report: Report, what: str, own: int, measured: int | None) -> None:
    if not measured:
        print(f"     {what:<44} {own:>16,}       no figure", flush=True)
        return
    ratio = own / measured
    difference = (own - measured) / MIB
    report.line(what, f"{own:,}", f"{measured:,}", f"{ratio:.4f} (within {BOUND:.0%}; {difference:+.1f} MiB)",
                abs(ratio - 1) <= BOUND)  # fmt: skip


# ---------------------------------------------------------------- vLLM


def vllm_reservation(report: Report, options: argparse.Namespace, gpus: Gpus, made: dict[str, Path]) -> None:
    for like, checkpoint in made.items():
        if left(options) < 30:
            report.line(f"{like} vllm", "", "", "no time left for it (--within)", ok=False)
            continue
        batch = max(options.batches)
        job = Job(like, "vllm", [batch], options.folder)
        began = time.monotonic()
        begin(job, options, checkpoint)
        with finished(job, min(VLLM_WITHIN_S, left(options))):
            of_a_vllm_run(report, job, batch, options, gpus, checkpoint)
        print(f"     {like} vllm took {time.monotonic() - began:.0f} s", flush=True)


def of_a_vllm_run(
    report: Report, job: Job, batch: int, options: argparse.Namespace, gpus: Gpus, checkpoint: Path
) -> None:
    found = record(job, batch)
    if found is None:
        report.line(f"{job.like} vllm", "", "", told(job.log), ok=False)
        return
    said = found["fingerprint"]["vllm"]
    itemsize = 2 if options.device == "cuda" else 4
    shape, parts = described(checkpoint, itemsize)
    load = Sequences(batch, found["repeats"][0]["samples"][0]["prompt_tokens"], NEW_TOKENS, itemsize)
    foretold = fit.Case(shape, parts, gpus, "vllm", said["gpu_memory_utilization"]).reservation(load)
    print(f"     {job.like} vllm {found['fingerprint']['packages'].get('vllm')}: share {said['gpu_memory_utilization']},"
          f" {said['max_num_batched_tokens']} tokens a step, {said['max_num_seqs']} sequences; predicted activations"
          f" {foretold.activations // MIB} MiB, outside torch {foretold.outside // MIB} MiB", flush=True)  # fmt: skip
    for index, device in enumerate(found["repeats"][0]["devices"]):
        held(report, f"{job.like} vllm GPU {index} weights", foretold.weights, device.get("weights_bytes"))
        if options.device == "cuda":
            held(
                report,
                f"{job.like} vllm GPU {index} KV cache",
                foretold.kv_cache,
                device.get("kv_cache_reserved_bytes"),
            )
    tokens = said["kv_blocks"] * said["kv_block_tokens"]
    if options.device != "cuda":
        print(f"     {job.like} vllm: {tokens:,} tokens in KV blocks, of memory that a CPU is given", flush=True)
        return
    in_blocks = f"{job.like} vllm KV blocks of {said['kv_block_tokens']} tokens"
    held(report, in_blocks, foretold.blocks * fit.BLOCK_TOKENS // said["kv_block_tokens"], said["kv_blocks"])


if __name__ == "__main__":
    sys.exit(main())
