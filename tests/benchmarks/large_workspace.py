"""A workspace as large as a lab's year: what labctl submit and its workers write, written by their own dataclasses.

    python -m tests.benchmarks.large_workspace FOLDER --runs 10000 --requests 34

Nothing touches the database: labctl makes it of these files. How long labctl's commands take in a workspace of 100,000 runs:

    python -m tests.benchmarks.large_workspace FOLDER --time [--rounds 3]

writes the workspace where FOLDER does not exist, collects it, and runs each command as a person does, beside what can be no
faster. A figure is the median of the rounds: the wall time of a process, its user and system time, its peak of memory. The exit
code is 1 where a target was missed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from labctl_orchestrator.store.workspace import Workspace
from labctl_workers.record import (
    Attempt,
    DeviceMemory,
    Failure,
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
MODELS = (
    MODEL,
    ModelRef("meta-llama/Llama-2-13b-chat-hf", revision="a2cb7a712bb6e5e736ca7f8cd98167f81a0b5bd8"),
    ModelRef("meta-llama/Llama-3.1-8B-Instruct", revision="0e9e39f249a16976918f6564b8830bc894c89659"),
)
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
GPUS = {"dgxh": "NVIDIA H100 80GB HBM3", "dgx2": "Tesla V100-SXM3-32GB"}
REPEATS = 3
JOBS_OF_A_BATCH = 1000
KINDS_OF_A_REPEAT = 40  # repeats whose figures differ; each record has three of them


@dataclass(frozen=True)
class Size:
    """How many runs, how many of them a job has, requests of a repeat, tokens of an answer.

    `per_submission`: how many runs a submission asks for; None: one sweep of one model on one partition. The submissions cross
    backends and partitions; models and prompts take turns. Every 10th measures in three engine loads and asks for the runs
    of the one before it too, which are measured already; about one run in a hundred failed.
    """

    runs: int
    runs_per_job: int = 25
    requests: int = 34
    tokens: int = 4
    per_submission: int | None = None


@dataclass(frozen=True)
class Setup:
    """What the runs of a job share."""

    partition: str = "dgxh"
    backend: str = "hf"
    dtype: str = "bfloat16"
    capability: str = "9.0"
    model: ModelRef = field(default_factory=lambda: MODEL)
    prompt_set: str = "p"
    prompt: str = PROMPT
    loads: int = 1

    def job(self, job_id: str, runs: list[RunSpec]) -> JobSpec:
        return JobSpec(
            job_id, self.partition, "slurm", self.backend, self.model, self.dtype, "cuda", 2, runs,
            {self.prompt_set: [self.prompt]}, capability=self.capability, loads=self.loads,
        )  # fmt: skip


OF_A_LAB = (
    Setup("dgxh", "hf", "bfloat16", "9.0"),
    Setup("dgxh", "vllm", "bfloat16", "9.0"),
    Setup("dgx2", "hf", "float16", "7.0"),
    Setup("dgx2", "vllm", "float16", "7.0"),
)
# The files of a sweep's batches are of one array each.
JobArray = tuple[Setup, list[list[RunSpec]]]


def write_workspace(root: Path, size: Size) -> Workspace:
    """Write the requests, batches, attempts and records of submissions that have ended. Returns their workspace."""
    workspace = Workspace(root)
    root.mkdir(parents=True, exist_ok=True)
    workspace.create()
    repeats = [_repeat(number, size).to_json() for number in range(KINDS_OF_A_REPEAT)]
    skipped: list[str] = []
    batch_number = itertools.count()
    for number, batches in enumerate(_submissions(size)):
        again = skipped if size.per_submission and number % 10 == 0 else []
        _write_request(workspace, number, batches, again)
        for setup, jobs in batches:
            place = next(batch_number)
            _write_batch(workspace, f"{place:08x}-1", place, number, setup, jobs, repeats)
        skipped = [run.run_id for _, jobs in batches for runs in jobs for run in runs]
    # As after a while: labctl looks twice at folders that changed a short time ago.
    for folder, _, _ in os.walk(workspace.data):
        os.utime(folder, (time.time(), time.time() - 3600))
    return workspace


def _submissions(size: Size) -> Iterator[list[JobArray]]:
    if size.per_submission is None:
        jobs = _jobs(_runs(Setup(), size.runs), size)
        for start in range(0, len(jobs), JOBS_OF_A_BATCH):
            yield [(Setup(), jobs[start : start + JOBS_OF_A_BATCH])]
        return
    for number in range(size.runs // size.per_submission):
        its_own = {
            "model": MODELS[number % len(MODELS)],
            "prompt_set": f"{number:012x}",
            "prompt": f"{PROMPT} Audience {number}.",
            "loads": 1 if number % 10 else 3,
        }
        setups = [replace(setup, **its_own) for setup in OF_A_LAB]
        yield [(setup, _jobs(_runs(setup, size.per_submission // len(setups)), size)) for setup in setups]


def _jobs(runs: list[RunSpec], size: Size) -> list[list[RunSpec]]:
    return [runs[start : start + size.runs_per_job] for start in range(0, len(runs), size.runs_per_job)]


def _runs(setup: Setup, count: int) -> list[RunSpec]:
    runs = []
    for number in range(count):
        length, batch_size = 1 + number // 5, 2 ** (number % 5)
        asked = {
            "model": setup.model.revision, "prompt": setup.prompt, "max_new_tokens": length, "batch_size": batch_size,
        }  # fmt: skip
        if setup != Setup():
            asked |= {"partition": setup.partition, "backend": setup.backend}
        runs.append(RunSpec(run_id_of(asked), asked, setup.prompt_set, length, batch_size=batch_size, repeats=REPEATS))
    return runs


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


def _write_request(workspace: Workspace, number: int, batches: Sequence[JobArray], again: list[str]) -> None:
    own = [run.run_id for _, jobs in batches for runs in jobs for run in runs]
    request = {
        "submission_id": f"20260101-000000-{number:04x}", "name": f"sweep-{number}", "created_at": _at(number * 3600),
        "labctl_version": "0.1.0", "request": {}, "runs": [*own, *again], "skipped": again,
        "jobs": [setup.job("", runs).to_json() for setup, jobs in batches for runs in jobs],
    }  # fmt: skip
    write_json(workspace.submissions / f"{request['submission_id']}.json", request, durable=False)


def _write_batch(
    workspace: Workspace,
    array_id: str,
    number: int,
    submission: int,
    setup: Setup,
    jobs: Sequence[list[RunSpec]],
    repeats: Sequence[dict[str, Any]],
) -> None:
    folder = workspace.arrays / array_id
    specs = [setup.job(f"{array_id}.{task}", runs) for task, runs in enumerate(jobs)]
    at = [_at(submission * 3600 + seconds) for seconds in range(4)]
    batch = {
        "array_id": array_id, "partition": setup.partition, "executor": "slurm", "job_name": f"labctl-{array_id}",
        "tasks": len(specs), "created_at": at[0], "time_s": 3600, "gpus": 2,
    }  # fmt: skip
    write_json(folder / "array.json", batch, durable=False)
    slurm_ids = [f"{1000 + number}_{task}" for task in range(len(specs))]
    intent = {"submission_id": f"20260101-000000-{submission:04x}", "at": at[0], "host": "login", "pid": 1}
    write_json(folder / "intent.json", intent, durable=False)
    write_json(folder / "submitted.json", {"ids": slurm_ids, "at": at[1], "host": "login"}, durable=False)
    state = {
        "state": "COMPLETED", "exit_code": "0:0", "node": f"{setup.partition}-1", "queued_at": at[1],
        "started_at": at[2], "ended_at": at[3], "observed_at": at[3],
    }  # fmt: skip
    write_json(folder / "states.json", {spec.job_id: state for spec in specs}, durable=False)
    for task, (spec, slurm_id) in enumerate(zip(specs, slurm_ids, strict=True)):
        write_json(folder / f"{task}.json", spec.to_json(), durable=False)
        _write_what_ran(JobFolder(folder / f"{task}.json"), spec, slurm_id, at, repeats)


def _write_what_ran(
    files: JobFolder, spec: JobSpec, slurm_id: str, at: Sequence[str], repeats: Sequence[dict[str, Any]]
) -> None:
    node = f"{spec.partition}-1"
    attempt = Attempt(
        f"{spec.job_id}.20260101T000000.{slurm_id}",
        spec.job_id,
        slurm_id,
        at[2],
        node,
        node,
        1,
        slurm_id,
        spec.partition,
    )
    write_json(files.attempts / f"{attempt.attempt_id}.json", attempt.to_json(), durable=False)
    for run in spec.runs:
        for load in range(1, spec.loads + 1):
            _write_record(files, spec, run, attempt.in_load(load), at, repeats)


def _write_record(
    files: JobFolder,
    spec: JobSpec,
    run: RunSpec,
    attempt: Attempt,
    at: Sequence[str],
    repeats: Sequence[dict[str, Any]],
) -> None:
    drawn = int(run.run_id, 16)
    failed = run.prompt_set != "p" and drawn % 97 == 0
    result = RunResult(
        run.run_id, attempt, "failed" if failed else "done", run.definition, at[2], at[3], 12.5, 0.5, 1.5,
        fingerprint=_fingerprint(spec, attempt.slurm_job_id or ""), failure=OUT_OF_MEMORY if failed else None,
    )  # fmt: skip
    document = result.to_json()
    if not failed:
        kinds = [(drawn + attempt.load + place) % len(repeats) for place in range(REPEATS)]
        document["repeats"] = [{**repeats[kind], "repeat": place} for place, kind in enumerate(kinds)]
        document["tokens"] = {str(token): f" word{token}" for token in range(12)}
    write_json(files.record(run.run_id, attempt.attempt_id), document, durable=False)


OUT_OF_MEMORY = Failure(
    "out-of-memory",
    "CUDA out of memory: tried to allocate 2.00 GiB",
    "use a smaller batch (--batch-size), or --parallel over more GPUs",
)


def _fingerprint(spec: JobSpec, slurm_id: str) -> dict[str, Any]:
    return {
        "packages": {
            "torch": "2.9.0", "transformers": "5.0.0", "accelerate": "1.12.0", "tokenizers": "0.22.1",
            "safetensors": "0.7.0", "numpy": "2.3.5", "sentencepiece": "0.2.1",
        },
        "effective_dtype": spec.dtype, "attention": "sdpa",
        "gpus": [
            {
                "index": gpu, "name": GPUS[spec.partition], "uuid": f"GPU-00000000-0000-0000-0000-{gpu:012d}",
                "capability": spec.capability, "memory_bytes": 85520809984, "memory_bandwidth_bytes_s": 3.35e12,
            }
            for gpu in (0, 1)
        ],
        "driver": "570.86.15", "cuda": "12.8", "python": "3.11.7", "host": f"{spec.partition}-1", "slurm_job_id": slurm_id,
        "model": spec.model.name, "revision": spec.model.revision,
        "device_map": {f"model.layers.{layer}": f"cuda:{layer // 16}" for layer in range(32)},
    }  # fmt: skip


def _at(seconds: float) -> str:
    return (BEGAN + timedelta(seconds=seconds)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# ---------------------------------------------------------------- how long commands take

LABCTL = str(Path(sys.executable).parent / "labctl")
LAB = Size(100_000, requests=4, tokens=8, per_submission=200)
OF_ONE_SUBMISSION = (
    "run_id IN (SELECT run_id FROM submission_runs WHERE submission_id = (SELECT max(submission_id) FROM submissions))"
)
PYTHON = "import click"
STAT_ALL = """
import os, sys
def files(folder):
    for entry in os.scandir(folder):
        yield from files(entry.path) if entry.is_dir() else [entry.stat()]
print(sum(1 for _ in files(sys.argv[1])))
"""
SQL = "import sqlite3, sys; print(len(sqlite3.connect(sys.argv[1]).execute(sys.argv[2]).fetchall()))"
VEGA = "import vl_convert; vl_convert.javascript_bundle('window.vegaEmbed = vegaEmbed;', vl_version='6.4')"


class Took(NamedTuple):
    """What a process took."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


def time_commands(root: Path, rounds: int) -> int:
    """Print how long each command takes; the exit status tells whether a target was missed."""
    workspace = Workspace(root)
    run = min(os.listdir(workspace.results))  # noqa: PTH208  a Path for each of 100,000 takes longer
    print(f"{'':44} {'wall s':>8} {'cpu s':>8} {'peak MB':>8} {'target s':>9}", flush=True)
    if not workspace.database.exists():
        _line("labctl collect, the first", _timed([LABCTL, "collect"], root))
        _timed([LABCTL, "collect"], root)  # notes which folders need no listing
    database = str(workspace.database)

    def sql(query: str) -> list[str]:
        return [sys.executable, "-c", SQL, database, query]

    python = [sys.executable, "-c", PYTHON]
    metric = ["--metric", "output_tok_s"]
    # A command, its target in seconds, and what it cannot do without.
    asked: list[tuple[list[str], float, list[list[str]]]] = [
        (["collect"], 2.0, [[sys.executable, "-c", STAT_ALL, str(workspace.data)]]),
        (
            ["show", run],
            0.5,
            [python, sql(f"SELECT * FROM results JOIN repeats USING (run_id) WHERE run_id = '{run}'")],
        ),
        (["status"], 2.0, [python, sql(f"SELECT * FROM runs JOIN results USING (run_id) WHERE {OF_ONE_SUBMISSION}")]),
        (["status", "--all"], 2.0, [python, sql("SELECT run_id, job_id, status FROM results")]),
        (["compare", *metric], 5.0, [python, sql(f"SELECT output_tok_s FROM repeats WHERE {OF_ONE_SUBMISSION}")]),
        (["compare", "--all", *metric], 5.0, [python, sql("SELECT run_id, output_tok_s FROM repeats")]),
        (
            ["report", "-o", "/dev/shm/labctl-large-workspace.html"],
            10.0,
            [[sys.executable, "-c", VEGA], sql(f"SELECT * FROM samples WHERE {OF_ONE_SUBMISSION}")],
        ),
    ]
    missed = 0
    for command, target_s, floors in asked:
        took = _median([LABCTL, *command], root, rounds)
        floor_s = sum(_median(floor, root, rounds).wall_s for floor in floors)
        missed += took.wall_s > target_s
        _line(f"labctl {' '.join(command[:4])}", took, target_s, floor_s)
    print(f"{missed} targets missed")
    return int(missed > 0)


def _line(what: str, took: Took, target_s: float | None = None, floor_s: float | None = None) -> None:
    target = "" if target_s is None else f"{target_s:9.1f}"
    late = " MISSED" if target_s is not None and took.wall_s > target_s else ""
    floor = "" if floor_s is None else f"  {took.wall_s / floor_s:.1f} x the floor ({floor_s:.2f} s)"
    print(
        f"{what:<44} {took.wall_s:8.2f} {took.cpu_s:8.2f} {took.peak_bytes / 1e6:8.0f} {target}{late}{floor}",
        flush=True,
    )


def _median(command: list[str], root: Path, rounds: int) -> Took:
    """The median of the wall times; the least of the rest, which other people's work on the machine disturbs less."""
    times = [_timed(command, root) for _ in range(rounds)]
    return Took(
        statistics.median(took.wall_s for took in times),
        min(took.cpu_s for took in times),
        min(took.peak_bytes for took in times),
    )


def _timed(command: list[str], root: Path) -> Took:
    # pip compiles what it installs; here the first process does.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=output)
        _, status, used = os.wait4(process.pid, 0)
        took = Took(time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)}: {process.returncode}\n{output.read()[-2000:].decode()}")
    return took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--runs-per-job", type=int, default=25)
    parser.add_argument("--requests", type=int, default=34)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--time", action="store_true", help="time labctl's commands in a workspace of 100,000 runs")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if not given.time:
        write_workspace(given.folder, Size(given.runs, given.runs_per_job, given.requests, given.tokens))
        return 0
    if not given.folder.exists():
        write_workspace(given.folder, LAB)
    return time_commands(given.folder, given.rounds)


if __name__ == "__main__":
    raise SystemExit(main())
