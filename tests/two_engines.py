"""A sweep over two engines as a cluster leaves it, written by the dataclasses that labctl and its workers write: for what reads
records and needs more of them, and other ones, than a test can measure. Its figures are made up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from labctl_orchestrator.store.workspace import Workspace
from labctl_workers.record import (
    Attempt,
    DeviceMemory,
    GpuTelemetry,
    JobFolder,
    JobSpec,
    ModelRef,
    Phase,
    Repeat,
    RunResult,
    RunSpec,
    Sample,
    Telemetry,
    run_id_of,
    write_json,
)  # fmt: skip

PROMPTS = ("Explain tensor parallelism in 5 bullet points.", "Is 17 < 19? </script><script>window.broken = 1</script>")
NAME = "two engines"
BATCHES = (1, 4, 16, 64)
LENGTHS = (64, 128)
GIB = 2**30
AT = [f"2026-03-01T10:0{minute}:00.000Z" for minute in range(4)]
# Of a model with a head for each key: what fit takes of a configuration.
CONFIG = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048, "torch_dtype": "bfloat16",
}  # fmt: skip
# Seconds a token at batch 1, and what each request of a batch adds to it.
PACES = {"hf": (0.024, 0.0006), "vllm": (0.008, 0.00012)}
REPEATS = 5


def write_two_engines(root: Path, *, failed: int = 1) -> Workspace:
    """Runs of transformers and vLLM at four batch sizes and two lengths; the last `failed` of them have no result."""
    model = ModelRef("org/tiny-llama", path=str(_checkpoint(root.parent / "tiny-llama")), fingerprint="ab" * 32)
    workspace = Workspace(root)
    root.mkdir(parents=True, exist_ok=True)
    workspace.create()
    jobs = [_job(f"aaaaaaaa-1.{task}", backend, model) for task, backend in enumerate(PACES)]
    _write_request(workspace, jobs)
    folder = workspace.arrays / "aaaaaaaa-1"
    slurm_ids = [f"100_{task}" for task in range(len(jobs))]
    write_json(
        folder / "intent.json",
        {"submission_id": "20260301-100000-0001", "at": AT[0], "host": "login", "pid": 1},
        durable=False,
    )
    write_json(folder / "submitted.json", {"ids": slurm_ids, "at": AT[1], "host": "login"}, durable=False)
    state = {"state": "COMPLETED", "exit_code": "0:0", "node": "dgxh-1", "queued_at": AT[1], "started_at": AT[2],
             "ended_at": AT[3], "observed_at": AT[3]}  # fmt: skip
    write_json(folder / "states.json", {job.job_id: state for job in jobs}, durable=False)
    last = jobs[-1].runs[-failed:] if failed else []
    for task, (job, slurm_id) in enumerate(zip(jobs, slurm_ids, strict=True)):
        write_json(folder / f"{task}.json", job.to_json(), durable=False)
        files = JobFolder(folder / f"{task}.json")
        attempt = Attempt(
            f"{job.job_id}.20260301T1002.{slurm_id}",
            job.job_id,
            slurm_id,
            AT[2],
            "dgxh-1",
            "dgxh-1",
            1,
            slurm_id,
            "dgxh",
        )
        write_json(files.attempts / f"{attempt.attempt_id}.json", attempt.to_json(), durable=False)
        for run in job.runs:
            if run not in last:
                write_json(
                    files.record(run.run_id, attempt.attempt_id), _record(job, run, attempt).to_json(), durable=False
                )
    return workspace


def _checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


def _job(job_id: str, backend: str, model: ModelRef) -> JobSpec:
    runs = [_run(backend, batch, length) for length in LENGTHS for batch in BATCHES]
    parallel = "tensor" if backend == "vllm" else "layers"
    return JobSpec(
        job_id, "dgxh", "slurm", backend, model, "bfloat16", "cuda", 2, runs, {"p": list(PROMPTS)}, capability="9.0",
        parallel=parallel,
    )  # fmt: skip


def _run(backend: str, batch: int, length: int) -> RunSpec:
    asked = {"backend": backend, "model": "tiny-llama", "batch_size": batch, "max_new_tokens": length}
    return RunSpec(run_id_of(asked), asked, "p", length, batch_size=batch, repeats=REPEATS)


def _write_request(workspace: Workspace, jobs: Sequence[JobSpec]) -> None:
    request = {
        "partition": ["dgxh"], "backend": list(PACES), "model_id": ["org/tiny-llama"], "batch_size": list(BATCHES),
        "max_new_tokens": list(LENGTHS), "prompts": "two.txt", "repeats": REPEATS, "name": NAME,
    }  # fmt: skip
    document = {
        "submission_id": "20260301-100000-0001", "name": NAME, "created_at": AT[0], "labctl_version": "0.1.0", "request": request,
        "runs": [run.run_id for job in jobs for run in job.runs], "skipped": [],
        "jobs": [replace(job, job_id="").to_json() for job in jobs],
    }  # fmt: skip
    write_json(workspace.submissions / "20260301-100000-0001.json", document, durable=False)
    batch = {"array_id": "aaaaaaaa-1", "partition": "dgxh", "executor": "slurm", "job_name": "labctl-aaaaaaaa-1",
             "tasks": len(jobs), "created_at": AT[0], "time_s": 3600, "gpus": 2}  # fmt: skip
    write_json(workspace.arrays / "aaaaaaaa-1" / "array.json", batch, durable=False)


def _record(job: JobSpec, run: RunSpec, attempt: Attempt) -> RunResult:
    repeats = [_repeat(job, run, number) for number in range(run.repeats)]
    tokens = {str(token): f" w{token}" for repeat in repeats for sample in repeat.samples for token in sample.token_ids}
    return RunResult(
        run.run_id,
        attempt,
        "done",
        run.definition,
        AT[2],
        AT[3],
        12.5,
        0.5,
        1.5,
        repeats,
        _fingerprint(job, attempt),
        tokens,
        telemetry=_telemetry(repeats),
    )


def _telemetry(repeats: Sequence[Repeat]) -> Telemetry:
    """Made up, in NVML's units: 20 s of loading, 4 s of warm-up, then the repeats with 0.5 s between them."""
    at = 24.0
    for repeat in repeats:
        repeat.started_s, at = at, at + repeat.wall_s + 0.5
    ends = [(repeat.started_s or 0.0, (repeat.started_s or 0.0) + repeat.wall_s) for repeat in repeats]
    times = [round(0.25 * place, 2) for place in range(int(at / 0.25) + 2)]
    busy = [any(start <= at <= end for start, end in ends) or 20 <= at < 24 for at in times]
    phases = [Phase("loading", 0.0), Phase("warm-up", 20.0), Phase("measuring", 24.0), Phase("scoring", at)]
    gpus = [
        GpuTelemetry(
            index,
            power_w=[480.0 + 20 * index + place % 7 if one else 110.0 for place, one in enumerate(busy)],
            sm_mhz=[1755 if one else 345 for one in busy],
            memory_mhz=[2619] * len(times),
            temperature_c=[min(68, 38 + int(at)) for at in times],
            utilisation_percent=[96 if one else 0 for one in busy],
            memory_used_bytes=[int(min(1.0, at / 20) * 40) * GIB for at in times],
            throttle_reasons=[0x4 if one else 0x1 for one in busy],
            other_processes=[0] * len(times),
        )
        for index in (0, 1)
    ]
    cpus = [None, *([1.02] * (len(times) - 1))]
    return Telemetry(times, phases, cpus, [3 * GIB] * len(times), gpus)


def _repeat(job: JobSpec, run: RunSpec, number: int) -> Repeat:
    """A few percent apart, in an order that is not that of the repeats."""
    first, more = PACES[job.backend]
    pace = (first + more * run.batch_size) * (1 + 0.01 * ((number * 2) % REPEATS))
    count = max(run.batch_size, len(PROMPTS))
    samples = [_sample(job, run, place, pace) for place in range(count)]
    passes = -(-count // run.batch_size)
    wall_s = passes * max(sample.token_times_s[-1] for sample in samples) + 0.002
    weights, cache = (
        (1.1 * GIB, 44.0 * run.batch_size * (20 + run.max_new_tokens) * 512)
        if job.backend == "hf"
        else (1.05 * GIB, 70.0 * GIB)
    )
    devices = [
        DeviceMemory(f"cuda:{gpu}", "NVIDIA H100 80GB HBM3", int(weights), int(cache), int(cache),
                     int(weights + cache + 0.2 * GIB * (1 - gpu / 2)), int(weights + cache + 0.4 * GIB),
                     int(weights + cache + GIB))
        for gpu in (0, 1)
    ]  # fmt: skip
    bandwidth = 3.35e12 * (2 if job.backend == "vllm" else 1)
    return Repeat(
        number,
        wall_s,
        samples,
        devices,
        energy_j=900.0 * wall_s,
        read_bytes_per_step=2.3e9,
        memory_bandwidth_bytes_s=bandwidth,
    )


def _sample(job: JobSpec, run: RunSpec, place: int, pace: float) -> Sample:
    """vLLM's answers part from transformers' at the sixth token; each request is a little slower than the one before."""
    prompt = place % len(PROMPTS)
    parts = job.backend == "vllm"
    ids = [token if token < 5 or not parts else token + 500 for token in range(run.max_new_tokens)]
    times = [3 * pace + pace * (1 + 0.004 * place) * token for token in range(run.max_new_tokens)]
    text = "".join(f" w{token}" for token in ids)
    return Sample(
        place,
        prompt,
        14 + prompt,
        ids,
        times,
        "length",
        text,
        0.0001 * place,
        log_probabilities=[-0.4 - pace] * len(ids),
    )


def _fingerprint(job: JobSpec, attempt: Attempt) -> dict[str, Any]:
    packages = {"torch": "2.9.0+cu128", "transformers": "5.0.0"} | (
        {"vllm": "0.17.0"} if job.backend == "vllm" else {"accelerate": "1.12.0"}
    )
    gpu = {
        "name": "NVIDIA H100 80GB HBM3",
        "capability": "9.0",
        "memory_bytes": 85520809984,
        "memory_bandwidth_bytes_s": 3.35e12,
    }
    return {
        "packages": packages, "effective_dtype": "bfloat16", "attention": "sdpa" if job.backend == "hf" else "FLASH_ATTN",
        "gpus": [{**gpu, "index": index, "uuid": f"GPU-{index}"} for index in (0, 1)], "driver": "570.86.15", "cuda": "12.8",
        "python": "3.11.7", "host": attempt.host,
    }  # fmt: skip
