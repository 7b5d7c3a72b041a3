"""One workspace, used from two login nodes: the second is this machine under another host name (a UTS namespace)."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .chaos import SLEEPER
from .conftest import Lab, sleeping, until

SECOND = "login2"
LABCTL = str(Path(sys.executable).parent / "labctl")

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="another host name needs root and unshare"
)


def on_second(lab: Lab, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["unshare", "--uts", "bash", "-c", f'hostname {SECOND} && exec "$@"', "bash", LABCTL, *arguments]
    environment = {**lab.cluster.env, **lab.environment}
    return subprocess.run(
        command, cwd=lab.root, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def seen_from_second(lab: Lab) -> dict[str, Any]:
    done = on_second(lab, "status", "--json")
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(done.stdout)
    return dict(run)


@pytest.fixture
def local_model(fresh_lab: Lab, tmp_path: Path) -> str:
    """A model for jobs of the login node itself, with an engine that sleeps. They wait for no other local job of this machine."""
    fresh_lab.environment["TMPDIR"] = str(tmp_path)
    model = sleeping(fresh_lab)
    text = (fresh_lab.root / "labctl.toml").read_text(encoding="utf-8")
    local = f'[partitions.local]\ndevice = "cpu"\nenv = {{ PYTHONPATH = "{SLEEPER}", SLEEPER_RUN_S = "8" }}\n'
    fresh_lab.settings(text + local)
    return model


def test_a_local_job_of_the_first_is_followed_on_the_second_by_its_heartbeat(fresh_lab: Lab, local_model: str) -> None:
    here = socket.gethostname()
    fresh_lab.ok("submit", "-p", "local", "--model-id", local_model, "--repeats=2", "--warmup=1")
    until(lambda: "measuring" in seen_from_second(fresh_lab)["detail"])
    seen = seen_from_second(fresh_lab)
    assert (seen["state"], seen["detail"][:9]) == ("running", "measuring")
    assert seen["detail"].endswith(f"local job on {here}")
    cancelled = on_second(fresh_lab, "cancel", "--yes")
    assert (cancelled.returncode, f"run labctl cancel on {here}" in cancelled.stderr) == (5, True), cancelled.stderr
    until(lambda: seen_from_second(fresh_lab)["state"] == "done")


def test_a_slurm_job_of_the_first_is_followed_and_cancelled_on_the_second(fresh_lab: Lab) -> None:
    flags = ("-p", "dgxh", "--model-id", sleeping(fresh_lab), "--sbatch", "begin=now+1hour")
    fresh_lab.ok("submit", *flags)
    assert seen_from_second(fresh_lab)["state"] == "pending"
    assert "to resubmit: 0" in on_second(fresh_lab, "retry", "--missing").stderr
    assert on_second(fresh_lab, "cancel", "--yes").returncode == 0
    until(lambda: [run["state"] for run in fresh_lab.json("status")] == ["cancelled"])
