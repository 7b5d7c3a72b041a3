"""What a Python, a machine and its GPUs are like: `python -m labctl_workers.probe`, on the login node or in a job.

Answers with one JSON object, on standard output or in the file of --out. Standard library alone; what it asks of torch,
transformers and vLLM it asks of those that this Python has. `labctl doctor` reads it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "sentencepiece", "vllm", "huggingface_hub")
WORKER = ("labctl_workers.job", "submitit", "cloudpickle")
HUB = "https://huggingface.co"
HUB_ANSWER_WITHIN_S = 5.0
NVIDIA_SMI_WITHIN_S = 30.0
SANITY_SIZE = 512

# Filesystems that several hosts see at once. Everything else is taken for a disk of this machine.
SHARED_FILESYSTEMS = frozenset(
    {
        "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "panfs", "pvfs2", "orangefs", "wekafs", "cifs",
        "smb3", "smbfs", "afs", "9p", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "fuse.juicefs", "fuse.beegfs", "gfs2",
        "ocfs2", "virtiofs", "quobyte", "fuse.quobyte", "moosefs", "fuse.mfs", "daos", "fuse.daos", "fuse.dfuse",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Filesystem:
    """Where a path lies: the mount point, the type as the kernel names it, and what is mounted."""

    mount: str
    kind: str
    source: str

    @property
    def shared(self) -> bool:
        """Whether other hosts can see it, as far as its type tells."""
        return self.kind in SHARED_FILESYSTEMS


def filesystem_of(path: Path, mounts: str | None = None) -> Filesystem | None:
    """The filesystem that a path lies on, or would; None where the kernel does not tell. `mounts` is /proc/mounts' text."""
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return None
    place = path.resolve()
    found: Filesystem | None = None
    for line in mounts.splitlines():
        parts = line.split(" ")
        if len(parts) < 3:
            continue
        source, mount, kind = (_unescaped(part) for part in parts[:3])
        # Of two mounts on one folder the later one is seen; autofs is there until the real one is mounted over it.
        if place.is_relative_to(mount) and (found is None or len(mount) >= len(found.mount)):
            found = Filesystem(mount, kind, source)
    return found


def _unescaped(text: str) -> str:
    """The kernel writes space, tab, newline and backslash as octal."""
    for code, sign in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, sign)
    return text


# ---------------------------------------------------------------- the answers


def installed(names: Sequence[str]) -> dict[str, Any]:
    """The version of this Python, and of each of these distributions that it has. Imports none of them."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"python": platform.python_version(), "packages": found}


def probe(*, on_node: bool, gpus: int, folder: str | None) -> dict[str, Any]:
    """Everything, as one JSON object. `on_node` adds what only a job can tell: GPUs, and whether vLLM can be imported."""
    answers: dict[str, Any] = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "host": socket.gethostname(),
        "node": os.environ.get("SLURMD_NODENAME"),
        "packages": {name: _version(name) for name in PACKAGES},
        "worker": _told(_worker),
        "torch": _told(_torch),
        "hub": _told(hub_answer),
    }
    if folder:
        found = filesystem_of(Path(folder))
        answers["filesystem"] = None if found is None else {**asdict(found), "shared": found.shared}
    if on_node:
        answers["slurm_job_id"] = os.environ.get("SLURM_JOB_ID")
        answers["visible"] = os.environ.get("CUDA_VISIBLE_DEVICES")
        answers["nvidia_smi"] = _told(_nvidia_smi)
        answers["gpus"] = _told(_gpus)
        answers["cuda"] = _told(lambda: _cuda(gpus))
        if answers["packages"]["vllm"]:
            answers["vllm"] = _told(_vllm)
    return answers


def _told(ask: Callable[[], Any]) -> dict[str, Any]:
    """{"answer": ...}, or {"error": why not}: one part that fails leaves the others."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # packages print when they are imported
            return {"answer": ask()}
    except BaseException as error:  # a broken torch may end in SystemExit or worse
        lines = traceback.format_exception_only(type(error), error)
        return {"error": " ".join("".join(lines).split())}


def _version(name: str) -> str | None:
    """The version of an installed package; None where it is not there. Imports nothing."""
    try:
        if importlib.util.find_spec(name) is None:
            return None
    except (ImportError, ValueError):
        return None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    # A build under another name, such as vLLM's for CPUs.
    others = importlib.metadata.packages_distributions().get(name, [])
    return importlib.metadata.version(others[0]) if others else "?"


def _worker() -> list[str]:
    for name in WORKER:
        importlib.import_module(name)
    return list(WORKER)


def _torch() -> dict[str, Any] | None:
    if importlib.util.find_spec("torch") is None:
        return None
    torch: Any = importlib.import_module("torch")
    # torch.cuda.get_arch_list() is empty where there is no GPU; what it is made of is not.
    flags = getattr(torch._C, "_cuda_getArchFlags", lambda: None)()
    return {"version": torch.__version__, "cuda": torch.version.cuda, "arch_list": (flags or "").split()}


def _vllm() -> str:
    vllm: Any = importlib.import_module("vllm")
    vllm.LLM  # noqa: B018  loaded when it is asked for
    return str(vllm.__version__)


def hub_answer() -> dict[str, Any]:
    """Whether the hub answers from here; any answer of HTTP's counts."""
    import urllib.error
    import urllib.request

    endpoint = os.environ.get("HF_ENDPOINT") or HUB
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"HF_ENDPOINT is no address of HTTP: {endpoint}")
    request = urllib.request.Request(f"{endpoint}/api/models?limit=1", method="HEAD")  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=HUB_ANSWER_WITHIN_S):  # noqa: S310
            return {"endpoint": endpoint, "reached": True}
    except urllib.error.HTTPError:
        return {"endpoint": endpoint, "reached": True}
    except (urllib.error.URLError, OSError) as error:
        return {"endpoint": endpoint, "reached": False, "why": str(getattr(error, "reason", error))}


def _nvidia_smi() -> str | None:
    """What `nvidia-smi` lists, a GPU a line; None where there is no such command."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = "--query-gpu=index,name,memory.total,driver_version,compute_cap,mig.mode.current"
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=NVIDIA_SMI_WITHIN_S,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"nvidia-smi: exit code {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def _gpus() -> list[dict[str, Any]]:
    """The GPUs that this job was given, as NVML sees them."""
    from labctl_workers.hardware import describe, visible_gpus

    return describe(visible_gpus())


def _cuda(gpus: int) -> dict[str, Any] | None:
    """What torch makes of the GPUs: names, capability, peer access of each pair, and a sum on each."""
    if importlib.util.find_spec("torch") is None:
        return None
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return {"available": False, "count": 0, "arch_list": []}
    count = torch.cuda.device_count()
    places = range(min(count, gpus))
    return {
        "available": True,
        "count": count,
        "arch_list": torch.cuda.get_arch_list(),
        "names": [torch.cuda.get_device_name(place) for place in range(count)],
        "capabilities": ["{}.{}".format(*torch.cuda.get_device_capability(place)) for place in range(count)],
        "peers": [[a, b, torch.cuda.can_device_access_peer(a, b)] for a in places for b in places if a < b],
        "sums": {str(place): _told(lambda place=place: _sum_on(torch, place)) for place in places},  # type: ignore[misc]
        "copies": {f"{a}-{b}": _told(lambda a=a, b=b: _copied(torch, a, b)) for a in places for b in places if a < b},  # type: ignore[misc]
    }


def _sum_on(torch: Any, place: int) -> bool:
    """A product of two matrices of ones: each entry is their size, exactly, in float16 as well."""
    ones = torch.ones(SANITY_SIZE, SANITY_SIZE, dtype=torch.float16, device=f"cuda:{place}")
    return bool(((ones @ ones) == SANITY_SIZE).all().item())


def _copied(torch: Any, a: int, b: int) -> bool:
    """What goes from one GPU to another and back is what it was: broken peer access shows here."""
    there = torch.arange(1 << 16, device=f"cuda:{a}")
    return bool((there.to(f"cuda:{b}").to(f"cuda:{a}") == there).all().item())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="labctl_workers.probe")
    parser.add_argument("--node", action="store_true", help="ask about GPUs, too")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--folder", help="a path whose filesystem is to be told")
    parser.add_argument("--out", help="a file for the answer, instead of standard output")
    parser.add_argument("--packages", nargs="*", help="only tell which of these distributions this Python has")
    asked = parser.parse_args(arguments)
    if asked.packages is not None:
        print(json.dumps(installed(asked.packages)))
        return 0
    answers = probe(on_node=asked.node, gpus=asked.gpus, folder=asked.folder)
    if asked.out is None:
        print(json.dumps(answers))
        return 0
    from labctl_workers.record import write_json

    write_json(Path(asked.out), answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
