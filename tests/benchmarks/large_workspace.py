"""A workspace as large as a lab's year: what labctl submit and its workers write, written by their own dataclasses.

    python -m tests.benchmarks.large_workspace FOLDER --runs 10000 --requests 34

Nothing touches the database: labctl makes it of these files.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from labctl_orchestrator.workspace import Workspace
from labctl_workers.record import (
    Attempt,
    DeviceMemory,
    JobFolder,
    JobSpec,
    ModelRef,
    Repeat,
    RunResult,
    RunSpec,
    Sample,
    run_id_of,
    write_json,
)

PROMPT = "Explain tensor parallelism in 5 bullet points."
MODEL = ModelRef("meta-llama/Llama-2-7b-chat-hf", revision="f5db02db724555f92da89c216ac04704f23d4590")
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
REPEATS = 3
JOBS_OF_A_BATCH = 1000
KINDS_OF_A_REPEAT = 40  # repeats whose figures differ; each record has three of them


@dataclass(frozen=True)
class Size:
    """How many runs, how many of them a job has, requests of a repeat, tokens of an answer."""

    runs: int
    runs_per_job: int = 25
    requests: int = 34
    tokens: int = 4


def write_workspace(root: Path, size: Size) -> Workspace:
    """Write the requests, batches, attempts and records of a sweep that has ended. Returns its workspace."""
    workspace = Workspace(root)
    workspace.create()
    workspace.results.mkdir()
    repeats = [_repeat(number, size).to_json() for number in range(KINDS_OF_A_REPEAT)]
    for number, jobs in enumerate(_batches(size)):
        _write_batch(workspace, f"{number:08x}-1", number, jobs, repeats)
    for (
        folder
    ) in workspace.results.iterdir():  # as after a while: what was written in the last minute is looked at twice
        os.utime(folder, (time.time(), time.time() - 3600))
    return workspace


def _batches(size: Size) -> Iterator[list[list[RunSpec]]]:
    runs = list(itertools.islice(_runs(), size.runs))
    jobs = [runs[start : start + size.runs_per_job] for start in range(0, len(runs), size.runs_per_job)]
    for start in range(0, len(jobs), JOBS_OF_A_BATCH):
        yield jobs[start : start + JOBS_OF_A_BATCH]


def _runs() -> Iterator[RunSpec]:
    for number in itertools.count():
        length, batch_size = 1 + number // 5, 2 ** (number % 5)
        asked = {"model": MODEL.revision, "prompt": PROMPT, "max_new_tokens": length, "batch_size": batch_size}
        yield RunSpec(run_id_of(asked), asked, "p", length, batch_size=batch_size, repeats=REPEATS)


def _repeat(number: int, size: Size) -> Repeat:
    step = 0.02 * (1 + number / 100)
    times = [0.1 + step * token for token in range(size.tokens)]
    samples = [
        Sample(
            place, 0, 11, [token * 7 + number for token in range(size.tokens)], times, "length",
            f"answer {number} of a shard each", handed_s=0.001 * place, log_probabilities=[-0.5 - step] * size.tokens,
        )
        for place in range(size.requests)
    ]  # fmt: skip
    devices = [
        DeviceMemory(f"cuda:{gpu}", "NVIDIA H100", 2**33, 2**20, 2**20, 2**33 + number, 2**33, 2**34) for gpu in (0, 1)
    ]
    return Repeat(0, times[-1] + 0.001 * size.requests, samples, devices, None, 1000.0 + number, 7e9, 3.35e12)


def _write_batch(
    workspace: Workspace, batch_id: str, number: int, jobs: Sequence[list[RunSpec]], repeats: Sequence[dict[str, Any]]
) -> None:
    folder = workspace.batches / batch_id
    specs = [
        JobSpec(
            f"{batch_id}.{task}", "dgxh", "slurm", "hf", MODEL, "bfloat16", "cuda", 2, runs, {"p": [PROMPT]}, capability="9.0"
        )
        for task, runs in enumerate(jobs)
    ]  # fmt: skip
    at = [_at(number * 3600 + seconds) for seconds in range(4)]
    request = {
        "request_id": f"20260101-000000-{number:04x}", "name": f"sweep-{number}", "created_at": at[0],
        "labctl_version": "0.1.0", "request": {}, "runs": [run.run_id for runs in jobs for run in runs], "skipped": [],
        "jobs": [replace(spec, job_id="").to_json() for spec in specs],
    }  # fmt: skip
    write_json(workspace.requests / f"{request['request_id']}.json", request, durable=False)
    batch = {
        "batch_id": batch_id, "partition": "dgxh", "executor": "slurm", "job_name": f"labctl-{batch_id}",
        "tasks": len(specs), "created_at": at[0], "time_s": 3600, "gpus": 2,
    }  # fmt: skip
    write_json(folder / "batch.json", batch, durable=False)
    slurm_ids = [f"{1000 + number}_{task}" for task in range(len(specs))]
    intent = {"request_id": request["request_id"], "at": at[0], "host": "login", "pid": 1}
    write_json(folder / "intent.json", intent, durable=False)
    write_json(folder / "submitted.json", {"ids": slurm_ids, "at": at[1], "host": "login"}, durable=False)
    state = {
        "state": "COMPLETED", "exit_code": "0:0", "node": "dgxh-1", "queued_at": at[1], "started_at": at[2],
        "ended_at": at[3], "observed_at": at[3],
    }  # fmt: skip
    write_json(folder / "states.json", {spec.job_id: state for spec in specs}, durable=False)
    for task, (spec, slurm_id) in enumerate(zip(specs, slurm_ids, strict=True)):
        write_json(folder / f"{task}.json", spec.to_json(), durable=False)
        _write_what_ran(JobFolder(folder / f"{task}.json"), spec, slurm_id, at, repeats)


def _write_what_ran(
    files: JobFolder, spec: JobSpec, slurm_id: str, at: Sequence[str], repeats: Sequence[dict[str, Any]]
) -> None:
    attempt = Attempt(
        f"{spec.job_id}.20260101T000000.{slurm_id}",
        spec.job_id,
        slurm_id,
        at[2],
        "dgxh-1",
        "dgxh-1",
        1,
        slurm_id,
        "dgxh",
    )
    write_json(files.attempts / f"{attempt.attempt_id}.json", attempt.to_json(), durable=False)
    for run in spec.runs:
        result = RunResult(
            run.run_id, attempt, "done", run.asked, at[2], at[3], 12.5, 0.5, 1.5, fingerprint=_fingerprint(slurm_id)
        )
        kinds = [(int(run.run_id, 16) + place) % len(repeats) for place in range(REPEATS)]
        document = result.to_json()
        document["repeats"] = [{**repeats[kind], "repeat": place} for place, kind in enumerate(kinds)]
        document["tokens"] = {str(token): f" word{token}" for token in range(12)}
        write_json(files.record(run.run_id, attempt.attempt_id), document, durable=False)


def _fingerprint(slurm_id: str) -> dict[str, Any]:
    return {
        "packages": {
            "torch": "2.9.0", "transformers": "5.0.0", "accelerate": "1.12.0", "tokenizers": "0.22.1",
            "safetensors": "0.7.0", "numpy": "2.3.5", "sentencepiece": "0.2.1",
        },
        "effective_dtype": "bfloat16", "attention": "sdpa",
        "gpus": [
            {
                "index": gpu, "name": "NVIDIA H100 80GB HBM3", "uuid": f"GPU-00000000-0000-0000-0000-{gpu:012d}",
                "capability": "9.0", "memory_bytes": 85520809984, "memory_bandwidth_bytes_s": 3.35e12,
            }
            for gpu in (0, 1)
        ],
        "driver": "570.86.15", "cuda": "12.8", "python": "3.11.7", "host": "dgxh-1", "slurm_job_id": slurm_id,
        "model": MODEL.name, "revision": MODEL.revision,
        "device_map": {f"model.layers.{layer}": f"cuda:{layer // 16}" for layer in range(32)},
    }  # fmt: skip


def _at(seconds: float) -> str:
    return (BEGAN + timedelta(seconds=seconds)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--runs-per-job", type=int, default=25)
    parser.add_argument("--requests", type=int, default=34)
    parser.add_argument("--tokens", type=int, default=4)
    given = parser.parse_args()
    write_workspace(given.folder, Size(given.runs, given.runs_per_job, given.requests, given.tokens))


if __name__ == "__main__":
    main()
