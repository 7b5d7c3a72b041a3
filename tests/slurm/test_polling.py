"""How often a command that waits queries a real Slurm: wrappers around the real squeue and sacct write down each call."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .chaos import SLEEPER
from .conftest import SLEEPING, Lab, sleeping

LABCTL = str(Path(sys.executable).parent / "labctl")
WAITING = {"submit --wait": ("submit", "-p", "dgxh", "--wait", "--model-id"), "status -w": ("status", "-w")}
PASSES = 4  # a warm-up and three repeats


def wrappers(folder: Path, path: str) -> str:
    """A PATH with the wrappers first; each writes its name and the time to folder/calls, and then is the real program."""
    folder.mkdir()
    for name in ("squeue", "sacct"):
        real = shutil.which(name, path=path)
        script = f'#!/bin/bash\necho {name} $EPOCHREALTIME >> {folder}/calls\nexec {real} "$@"\n'
        (folder / name).write_text(script, encoding="utf-8")
        (folder / name).chmod(0o755)
    return f"{folder}:{path}"


def calls(folder: Path, name: str) -> list[float]:
    lines = (line.split() for line in (folder / "calls").read_text(encoding="utf-8").splitlines())
    return [float(at) for called, at in lines if called == name]


def query_times(lab: Lab, folder: Path, run_s: float, keys: str = "") -> dict[str, list[float]]:
    """The seconds from the first to each squeue of the two commands that wait for one job, which takes `PASSES` times `run_s`."""
    model = sleeping(lab)
    lab.settings(
        SLEEPING.format(name="dgxh", sleeper=SLEEPER, load_s=0.1, run_s=run_s).replace("]\n", f"]\n{keys}\n", 1)
    )
    lab.ok("submit", "-p", "dgxh", "--model-id", model)
    running = {}
    for name, arguments in WAITING.items():
        own = folder / name.split()[0]
        path = wrappers(own, lab.cluster.env["PATH"])
        words = [LABCTL, *arguments, *([model] if "submit" in arguments else [])]
        environment = {**lab.cluster.env, **lab.environment, "PATH": path}
        running[own] = subprocess.Popen(
            words, cwd=lab.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    found = {}
    for own, process in running.items():
        output, errors = process.communicate(timeout=PASSES * run_s + 120)
        assert process.returncode == 0, (output, errors)
        times = calls(own, "squeue")
        assert len(calls(own, "sacct") if (own / "calls").exists() else []) <= len(times)
        found[own.name] = [at - times[0] for at in times]
    return found


def test_a_command_that_waits_queries_slurm_once_in_poll_s(fresh_lab: Lab, tmp_path: Path) -> None:
    for name, times in query_times(fresh_lab, tmp_path, run_s=4, keys="poll_s = 5").items():
        assert len(times) >= 3, (name, times)
        assert all(later - earlier >= 4.9 for earlier, later in itertools.pairwise(times)), (name, times)


@pytest.mark.nightly
@pytest.mark.timeout(1000)
def test_in_ten_minutes_slurm_is_queried_once_in_ten_seconds(
    fresh_lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without `poll_s`; the test above is its short form."""
    for name, times in query_times(fresh_lab, tmp_path, run_s=150).items():
        with capsys.disabled():
            print(
                f"\n{name}: {len(times)} squeue in {times[-1]:.0f} s, {sum(at > 60 for at in times)} after the first minute"
            )
        late = [at for at in times if at > 60]
        assert all(later - earlier >= 9.9 for earlier, later in itertools.pairwise(late)), (name, times)
        assert all(later - earlier >= 0.9 for earlier, later in itertools.pairwise(times)), (name, times)
