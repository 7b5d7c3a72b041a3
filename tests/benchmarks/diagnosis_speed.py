"""What it costs `labctl status` to say why a thousand runs failed: the first time, when each log is read, and every time after.

    python -m tests.benchmarks.diagnosis_speed [--jobs 1000] [--rounds 5]

Each job is a task of one array, with a log of 64 KiB whose end tells the reason. Programs named squeue and sacct fail, as they
do where Slurm is silent. Floors, in the same run: opening the same logs and reading their ends, and the status of as many runs
that are pending. Figures are medians, in seconds of a whole command in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm import diagnose
from labctl_workers.record import JobSpec, ModelRef, RunSpec, run_id_of, write_json

PROGRAM = "import sys; from labctl_orchestrator.cli import main; main(sys.argv[1:])"
LINE = "INFO 11-20 10:00:00 [core.py:123] an ordinary line of a log, of which there are many\n"
OOM = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.11 GiB of which 1.20 GiB is free."
)
ENDS = (
    f"torch.OutOfMemoryError: {OOM}\n",
    "slurmstepd: error: Detected 1 oom_kill event in StepId=1.batch.\n",
    "OSError: [Errno 28] No space left on device\n",
    "something that no entry of the table knows\n",
)


def write_workspace(root: Path, jobs: int, state: dict[str, str]) -> Workspace:
    workspace = Workspace(root)
    root.mkdir(parents=True, exist_ok=True)
    workspace.create()
    batch = workspace.arrays / "0badcafe-1"
    (batch / "submitit").mkdir(parents=True)
    model = ModelRef("org/model", revision="0" * 40)
    runs, specs = [], []
    for task in range(jobs):
        asked = {"max_new_tokens": task + 1}
        run = RunSpec(run_id_of(asked), asked, "p", task + 1)
        spec = JobSpec(
            f"{batch.name}.{task}", "dgxh", "slurm", "hf", model, "bfloat16", "cuda", 2, [run], {"p": ["why?"]}
        )
        write_json(batch / f"{task}.json", spec.to_json(), durable=False)
        runs.append(run.run_id)
        specs.append(spec.to_json())
        for kind, text in (("err", LINE * (65536 // len(LINE)) + ENDS[task % len(ENDS)]), ("out", "")):
            (batch / "submitit" / f"1000_{task}_0_log.{kind}").write_text(text, encoding="utf-8")
    at = "2026-01-01T00:00:00.000Z"
    write_json(batch / "array.json", {
        "array_id": batch.name, "partition": "dgxh", "executor": "slurm", "job_name": f"labctl-{batch.name}", "tasks": jobs,
        "created_at": at,
    })  # fmt: skip
    write_json(batch / "intent.json", {"submission_id": "20260101-000000-0001", "at": at, "host": "login", "pid": 1})
    ids = [f"1000_{task}" for task in range(jobs)]
    write_json(batch / "submitted.json", {"ids": ids, "at": at, "host": "login"})
    write_json(batch / "states.json", {f"{batch.name}.{task}": {**state, "observed_at": at} for task in range(jobs)})
    write_json(workspace.submissions / "20260101-000000-0001.json", {
        "submission_id": "20260101-000000-0001", "name": "sweep", "created_at": at, "labctl_version": "0", "request": {},
        "runs": runs, "skipped": [], "jobs": specs,
    })  # fmt: skip
    return workspace


def programs(folder: Path) -> dict[str, str]:
    for name in ("squeue", "sacct"):
        path = folder / name
        path.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.defpath}", "HOME": str(folder)}


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = programs(folder)
        failed = {"state": "FAILED", "exit_code": "1:0", "ended_at": "2026-01-01T01:00:00Z"}
        bad = write_workspace(folder / "failed", asked.jobs, failed)
        waits = write_workspace(folder / "pending", asked.jobs, {"state": "PENDING", "reason": "Priority"})

        def status(workspace: Workspace) -> None:
            command = [sys.executable, "-c", PROGRAM, "status"]
            subprocess.run(command, cwd=workspace.root, env=environment, capture_output=True, check=True)

        def forget() -> None:
            (bad.arrays / "0badcafe-1" / "diagnoses.json").unlink()

        for workspace in (bad, waits):
            status(workspace)  # makes the database
        first, later, pending, floor = [], [], [], []
        logs = list((bad.arrays / "0badcafe-1" / "submitit").iterdir())
        for _ in range(asked.rounds):
            forget()
            first.append(seconds(lambda: status(bad)))
            later.append(seconds(lambda: status(bad)))
            pending.append(seconds(lambda: status(waits)))
            floor.append(seconds(lambda: [diagnose.tail(log) for log in logs]))
    told = {
        "status, as many pending (floor)": pending, "status, all failed, told before": later,
        "status, all failed, the first time": first, "reading the ends of their logs (floor)": floor,
    }  # fmt: skip
    base = statistics.median(pending)
    for what, values in told.items():
        print(f"{what:<42} {statistics.median(values):.3f} s   {statistics.median(values) / base:.2f} of the first")


if __name__ == "__main__":
    main()
