"""What `labctl_workers.probe` answers of a Python, a machine and its GPUs."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from labctl_workers.probe import Filesystem

T = TypeVar("T")


class Part(msgspec.Struct, Generic[T]):
    """One part of the answer, or why there is none; None where there is nothing to ask."""

    answer: T | None = None
    error: str = ""


class Torch(msgspec.Struct):
    """A build of torch: its CUDA (None: built without), and the architectures that it has code for."""

    version: str
    cuda: str | None
    arch_list: list[str]


class Hub(msgspec.Struct):
    reached: bool = False
    endpoint: str = "the hub"
    why: str = ""


class SeenGpu(msgspec.Struct):
    name: str
    capability: str


class TorchOnGpus(msgspec.Struct):
    """What torch makes of the GPUs: a product on each (`sums`), copies between each two, which reach each other's memory."""

    available: bool
    count: int = 0
    names: list[str] = []
    sums: dict[str, Part[bool]] = {}
    copies: dict[str, Part[bool]] = {}
    peers: list[tuple[int, int, bool]] = []


class ProbeAnswer(msgspec.Struct):
    """Everything; what only a job can tell is empty elsewhere. `visible` is CUDA_VISIBLE_DEVICES."""

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
    nvidia_smi: Part[str] = msgspec.field(default_factory=Part)
    gpus: Part[list[SeenGpu]] = msgspec.field(default_factory=Part)
    cuda: Part[TorchOnGpus] = msgspec.field(default_factory=Part)
    vllm: Part[str] = msgspec.field(default_factory=Part)
