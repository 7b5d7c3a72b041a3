"""What preflight costs of `labctl submit`, beside what it asks of Slurm: python -m tests.benchmarks.preflight_slurm_time [MODEL]

On a cluster of the tests' own. Prints the median and the slowest of some passes of preflight in one process, and of each check;
the floor is Slurm's own answers to the same questions, one after the other: sinfo twice, sbatch --test-only, sacctmgr twice,
scontrol. Two cores, Slurm 22.05, 2026-11-25: floor 0.39 s, preflight 0.45 s.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from labctl_orchestrator.preflight import run_checks
from labctl_orchestrator.preflight.finding import Subject
from labctl_orchestrator.request.request import FLAGS
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.submission.submit import prepare
from labctl_slurm import command
from tests.models import ROOT
from tests.slurm.cluster import SlurmCluster, install_slurm

PASSES = 15
ASKED = (
    ["sinfo", "--noheader", "--exact", "--format=%P|%a|%l|%D|%T|%c|%m|%f|%G|%E"],
    ["sinfo", "--noheader", "--partition=dgxh", "--format=%o"],
    ["sbatch", "--test-only", "--partition=dgxh", "--gres=gpu:2", "--mem=64G", "--wrap=true"],
    ["sacctmgr", "--noheader", "--parsable2", "show", "associations", "where", "user=root", "format=Account"],
    ["sacctmgr", "--noheader", "--parsable2", "show", "user", "root", "format=DefaultAccount"],
    ["scontrol", "show", "config"],
)


def timed(what: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(PASSES):
        began = time.perf_counter()
        what()
        times.append(time.perf_counter() - began)
    return times


def floor() -> None:
    for words in ASKED:
        subprocess.run(words, env=command.environment(), capture_output=True, check=True)


def report(name: str, times: list[float], floor_s: float) -> None:
    median = statistics.median(times)
    print(f"{name:28} median {median:6.3f} s, slowest {max(times):6.3f} s, {median / floor_s:5.1f} x the floor")


def main() -> None:
    model = sys.argv[1] if sys.argv[1:] else str(ROOT / ".cache" / "smollm2")
    install_slurm()
    with tempfile.TemporaryDirectory(prefix="preflight-") as folder:
        cluster = SlurmCluster(Path(folder) / "slurm")
        with cluster:
            os.environ["SLURM_CONF"] = cluster.env["SLURM_CONF"]
            (Path(folder) / "lab").mkdir()
            os.chdir(Path(folder) / "lab")
            Path("labctl.toml").write_text('[partitions.dgxh]\ndevice = "cpu"\n', encoding="utf-8")
            layer = (FLAGS, {"partition": "dgxh", "model_id": model})
            prepared = prepare(Workspace(Path.cwd()), [layer], check=False)
            subject = Subject(prepared.workspace, prepared.request, prepared.rules.partitions, prepared.plan)
            run_checks.findings(subject)  # imports
            slurms = timed(floor)
            floor_s = statistics.median(slurms)
            report("floor: Slurm's answers", slurms, floor_s)
            report("preflight", timed(lambda: run_checks.findings(subject)), floor_s)
            for name, check in run_checks.CHECKS.items():
                report(f"  {name}", timed(lambda check=check: list(check(subject))), floor_s)  # type: ignore[misc]
            os.chdir("/")


if __name__ == "__main__":
    main()
