"""Every reason that can be made to happen on a real cluster, made to happen: real refusals, real jobs that wait for what never
comes, real jobs that fail. What labctl says of each is compared with what was done to it.

All of it happens at once, on a cluster of this file's own: a node is taken down, a partition closed. What no test cluster has (a
V100, a GPU whose memory runs out, the hub itself) is in tests/recorded_messages.toml.
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import sys
import threading
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_checkpoint

from .cluster import SlurmCluster
from .conftest import Lab, started


@dataclass(frozen=True)
class Fault:
    """What is wrong with a partition, and what labctl is to say of it. `settings` are keys of its table in labctl.toml."""

    state: str
    kind: str
    detail: str
    remedy: str
    settings: str = ""
    setup: tuple[str, ...] = ()
    model: str = "MODEL"
    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    slurm_partition: str = "dgx2"

    def table(self, name: str) -> str:
        lines = [f"[partitions.{name}]", f'slurm_partition = "{self.slurm_partition}"', self.settings]
        lines += [f"{key} = {value}" for key, value in SHARED.items() if f"{key} =" not in self.settings]
        lines += (
            [f"setup = {json.dumps(self.setup)}"] if self.setup else []
        )  # a JSON list of texts is one of TOML's too
        lines += [f"env.{key} = {json.dumps(value)}" for key, value in self.env.items()]
        return "\n".join(lines)


SHARED = {
    "dtype": '"float32"',
    "device": '"cpu"',
    "gpus": "1",
    "cpus_per_task": "1",
    "mem": '"2G"',
    "time": '"0:10:00"',
    "account": '"eecs"',
}
LONG = "sleep 300"
TAKES_600_MB = f"{sys.executable} -c 'import time; held = bytearray(600 << 20); time.sleep(60)'"

# ---------------------------------------------------------------- what sbatch refuses

REFUSED = {
    "account": Fault("refused", "bad-account", "Invalid account", "set account", 'account = "nobody"'),
    "partition": Fault("refused", "bad-partition", "nvalid partition name", "sinfo", slurm_partition="nowhere"),
    "qos": Fault("refused", "bad-qos", "Invalid qos", "set --qos", 'sbatch = { qos = "nope" }'),
    "gres": Fault("refused", "no-such-node", "node configuration", "fewer GPUs", 'gpu = "A100"\ngpu_type = "a100"'),
    "memory": Fault("refused", "no-such-node", "", "mem", 'mem = "9000G"'),
    "feature": Fault("refused", "bad-constraint", "nvalid feature", "--constraint", 'sbatch = { constraint = "tpu" }'),
    "option": Fault("refused", "bad-option", "unrecognized option", "remove", "sbatch = { nosuch = 1 }"),
    "reservation": Fault(
        "refused", "bad-reservation", "eservation", "scontrol show", 'sbatch = { reservation = "none" }'
    ),
    "inactive": Fault("refused", "partition-down", "", "sinfo", slurm_partition="dgxh_closed"),
}

# ---------------------------------------------------------------- what waits for ever

WAITING = {
    "time": Fault(
        "pending", "pending-for-ever", "PartitionTimeLimit: time limit above the partition", "labctl cancel",
        'time = "30-00:00:00"\nmax_time = "60-00:00:00"'
    ),
    "closed": Fault("pending", "partition-down", "PartitionDown", "another partition", slurm_partition="gpu"),
    "down": Fault(
        "pending", "nodes-not-available", "ReqNodeNotAvail", "sinfo -R", 'sbatch = { nodelist = "dgxh-2" }',
        slurm_partition="dgxh",
    ),
    "held": Fault("pending", "held", "JobHeldUser", "scontrol release", "sbatch = { hold = true }"),
    "tiny": Fault(
        "pending", "at-a-limit", "QOSMax", "lower --gpus",
        'gpu = "V100"\nsbatch = { qos = "tiny" }', flags=("--gpus", "2"),
    ),
}  # fmt: skip

# ---------------------------------------------------------------- what ends badly

ENDED = {
    "fewer": Fault("failed", "fewer-gpus", "too few GPUs in the job: 0 of 1", "--gres=gpu:1", 'device = "cuda"'),
    "nopython": Fault("failed", "python-missing", "/no/such/bin/python3", "set python", 'python = "/no/such/bin/python3"'),
    "bare": Fault("failed", "engine-missing", "cannot import torch", "labctl env -p ends_bare", 'python = "BARE"'),
    "novllm": Fault(
        "failed", "engine-missing", "vLLM is not installed", "labctl env -p ends_novllm", 'python = "BARE"',
        flags=("--backend", "vllm"),
    ),
    "nomodule": Fault(
        "failed", "workspace-not-shared", "cannot read labctl's code", "must not change PYTHONPATH", 'python = "BARE"',
        setup=("trap 'unset PYTHONPATH' DEBUG",),
    ),
    "memory_of_the_node": Fault(
        "failed", "host-out-of-memory", "not GPU memory", "mem in [partitions.ends_memory_of_the_node]",
        'mem = "200M"\nsbatch = { acctg-freq = "task=1" }',  # Slurm looks each second
        setup=(TAKES_600_MB,),
    ),
    "killed": Fault("failed", "killed", "worker killed", "raise --mem", setup=("kill -KILL $$",)),
    "crashed": Fault("failed", "crashed", "crashed", "labctl logs", setup=("kill -SEGV $$",)),
    "disk": Fault("failed", "disk-full", "no space left on a file system", "HF_HOME", setup=("set -e", "echo x > /dev/full")),
    "module": Fault(
        "failed", "environment-module", "which the node does not define", "/etc/profile",
        setup=("set -e", "unset -f module", "module load cuda"),
    ),
    "line": Fault("failed", "setup-failed", "no-such-program", "correct setup", setup=("set -e", "no-such-program --now")),
    "odd": Fault(
        "failed", "unknown", "(FAILED, exit code 3:0); last log line: Kaboom: 42", "labctl logs",
        setup=("echo Kaboom: 42 >&2", "exit 3"),
    ),
    "time_is_up": Fault("timeout", "time-limit", "time limit", "raise --time", setup=("trap '' USR2", LONG)),
    "slow_setup": Fault(
        "timeout", "time-limit", "during setup of partition", "raise --time", 'time = "0:01:00"\nmax_time = "0:01:00"',
        setup=(LONG,),
    ),
    "by_me": Fault("cancelled", "cancelled", "by you", "labctl retry", setup=(LONG,)),
    "node": Fault(
        "failed", "node-failure", "node failed", "labctl retry",
        'sbatch = { nodelist = "dgxh-2", no-requeue = true }', setup=(LONG,), slurm_partition="dgxh",
    ),
    "urgency": Fault(
        "failed", "preempted", "by a job of higher priority", "labctl retry",
        'gpu = "H100"\nsbatch = { nodelist = "dgxh-1", no-requeue = true }', setup=(LONG,), slurm_partition="dgxh",
    ),
    "nolog": Fault("failed", "workspace-not-shared", "exit code 0:53", "share", "sbatch = { hold = true }"),
    "offline": Fault(
        "failed", "offline-cache-miss", "is incomplete: org/never-downloaded", "labctl fetch org/never-downloaded",
        model="org/never-downloaded", env={"HF_HUB_OFFLINE": "1"},
    ),
    "gated": Fault(
        "failed", "gated-model", "org/gated is gated", "https://huggingface.co/org/gated", model="org/gated",
        env={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "HUB"},
    ),
    "missing": Fault(
        "failed", "missing-model", "not found on the Hub: org/missing", "spelling", model="org/missing",
        env={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "HUB"},
    ),
}  # fmt: skip
FAULTS = {
    **{f"refused_{name}": fault for name, fault in REFUSED.items()},
    **{f"waits_{name}": fault for name, fault in WAITING.items()},
    **{f"ends_{name}": fault for name, fault in ENDED.items()},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """A stand-in for the hub's server, on loopback; it is the hub's own client that asks, and that tells what it was told."""

    def do_HEAD(self) -> None:
        gated = "gated" in self.path
        self.send_response(401 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header(
            "X-Error-Message", "Access to model org/gated is restricted." if gated else "Repository not found"
        )
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        """Nobody reads it."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A cluster whose nodes and partitions may be taken away."""
    yield from started(SlurmCluster(tmp_path_factory.mktemp("faulty"), grace_s=0))


@pytest.fixture(scope="module")
def told(
    own: SlurmCluster, hub: str, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, dict[str, Any]]]:
    """Make everything happen, and what labctl says of each in the end, by its partition's name."""
    home, lab = tmp_path_factory.mktemp("home"), Lab(tmp_path_factory.mktemp("lab"), own)
    lab.environment = {"HOME": str(home), "HF_HOME": str(home / "hub"), "HF_HUB_OFFLINE": "1"}
    venv.create(lab.root / "bare", symlinks=True)
    real = {"BARE": str(lab.root / "bare" / "bin" / "python"), "HUB": hub, "MODEL": str(checkpoint(lab))}
    text = "\n".join(fault.table(name) for name, fault in FAULTS.items())
    for word, value in real.items():
        text = text.replace(f'"{word}"', f'"{value}"')
    lab.settings(text)
    own.run("sacctmgr", "-i", "add", "qos", "tiny", "set", "MaxTRESPerUser=gres/gpu=1")
    own.run("sacctmgr", "-i", "modify", "account", "eecs", "set", "qos+=tiny")
    own.run("scontrol", "create", "PartitionName=dgxh_closed", "Nodes=dgxh-1", "State=INACTIVE")
    submit(lab, [name for name in FAULTS if not name.startswith("waits_")], real)
    disturb(lab)
    submit(lab, [name for name in FAULTS if name.startswith("waits_")], real)
    yield settled(lab)
    own.run("scancel", "--user", str(os.getuid()), check=False)


def checkpoint(lab: Lab) -> Path:
    return write_checkpoint(lab.root / "model")


def submit(lab: Lab, names: list[str], real: dict[str, str]) -> None:
    """Those that are asked for in the same way, in one request."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        fault = FAULTS[name]
        alike.setdefault(("--model-id", real.get(fault.model, fault.model), *fault.flags), []).append(name)
    for flags, partitions in alike.items():
        # What preflight sees is let through: here it is to happen.
        done = lab.labctl("submit", "--no-preflight", *(f"--partition={name}" for name in partitions), *flags)
        assert "Traceback" not in done.stderr
        refused = any(name.startswith("refused_") for name in partitions)
        assert done.returncode == (4 if refused else 0), done.stderr


def disturb(lab: Lab) -> None:
    """Take from the jobs that run what they are to lose."""
    jobs = {run["partition"]: run for run in lab.json("status", "--all")}
    log = lab.root / ".labctl" / "arrays" / jobs["ends_nolog"]["job_id"].rpartition(".")[0] / "submitit"
    shutil.rmtree(log)
    log.write_text("newer Slurm makes a folder that is missing", encoding="utf-8")
    lab.cluster.release(jobs["ends_nolog"]["slurm_id"])
    until_they_run(lab, ["ends_by_me", "ends_node", "ends_urgency", "ends_time_is_up"])
    # The clock is put forward: its time is up now.
    lab.cluster.run("scontrol", "update", f"JobId={jobs['ends_time_is_up']['slurm_id']}", "EndTime=now+2")
    lab.cluster.run("scancel", jobs["ends_by_me"]["slurm_id"])
    lab.cluster.run("scontrol", "update", "NodeName=dgxh-2", "State=DOWN", "Reason=test")
    lab.cluster.run("scontrol", "update", "NodeName=dgxh-2", "State=DRAIN", "Reason=test")  # or it comes back by itself
    lab.cluster.run("scontrol", "update", "PartitionName=gpu", "State=DOWN")
    everything = ["--partition=urgent", "--account=eecs", "--nodelist=dgxh-1", "--gres=gpu:8", "--time=5"]
    lab.cluster.run("sbatch", *everything, "--output=/dev/null", "--wrap=sleep 20")


def until_they_run(lab: Lab, names: list[str], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while {run["state"] for run in lab.json("status", "--all") if run["partition"] in names} != {"running"}:
        assert time.monotonic() < deadline, lab.ok("status", "--all")
        time.sleep(0.3)


def settled(lab: Lab, timeout_s: float = 150) -> dict[str, dict[str, Any]]:
    """What is told of each once nothing more is to come but from those that wait."""
    deadline = time.monotonic() + timeout_s
    while True:  # and until the accounting has told how each ended, some seconds after the controller
        runs = {run["partition"]: run for run in lab.json("status", "--all")}
        open_ends = [
            name for name, run in runs.items() if run["state"] in {"pending", "running", "submitting", "unknown"}
        ]
        told = [run["kind"] not in ("", "unknown") or "exit code" in run["detail"] for run in runs.values()]
        if all(name.startswith("waits_") for name in open_ends) and all(told):
            return runs
        assert time.monotonic() < deadline, lab.ok("status", "--all")
        time.sleep(1)


@pytest.mark.model
@pytest.mark.parametrize("name", FAULTS)
def test_what_really_happened_is_told_with_what_to_do_about_it(told: dict[str, dict[str, Any]], name: str) -> None:
    fault, run = FAULTS[name], told[name]
    assert (run["state"], run["kind"]) == (fault.state, fault.kind), run
    assert fault.detail in run["detail"]
    assert fault.remedy in run["remedy"]
    assert "{" not in run["detail"] + run["remedy"]
