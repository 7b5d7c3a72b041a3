"""The resources that a job requests from Slurm, in the form of its site: for scripts, for srun and for preflight."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

GpuRequest = Literal["gres", "gpus-per-node", "gpus", "none"]
NONE = "none"  # omits the option
ALL_OF_THE_NODE = "0"
MIB_OF = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}
_MEMORY = re.compile(r"([0-9]+)([KMGT])(?: per-(gpu|cpu))?")
_CPUS_PER_GPU = re.compile(r"([1-9][0-9]*) per-gpu")


def is_memory(text: str) -> bool:
    """Whether it is "64G", "64G per-gpu", "8G per-cpu", "0" (all of the node) or "none"."""
    return text in (NONE, ALL_OF_THE_NODE) or _MEMORY.fullmatch(text) is not None


def cpus_of(cpus_per_task: int | str, gpus: int) -> int | None:
    """The CPUs of a job with this number of GPUs: of 8, of "16 per-gpu", None of "none". Raises ValueError for any other form."""
    if isinstance(cpus_per_task, int):
        return cpus_per_task
    if cpus_per_task == NONE:
        return None
    match = _CPUS_PER_GPU.fullmatch(cpus_per_task)
    if match is None:
        raise ValueError(f"{cpus_per_task!r} is not a number of CPUs")
    return int(match[1]) * max(gpus, 1)


@dataclass(frozen=True)
class Resources:
    """One node with one task. `cluster`, `partition`, `account` and `gpu_type` "", `cpus` None and `one_task` False omit their
    options; `gpus` is 0 for a job without GPUs; `memory` has a form of `is_memory`."""

    partition: str
    account: str
    time: str
    gpus: int
    gpu_request: GpuRequest
    gpu_type: str
    memory: str
    cpus: int | None
    one_task: bool = True
    cluster: str = ""

    def options(self) -> dict[str, str]:
        """The long options of sbatch and srun with their values, in the order of a script."""
        options = {
            "clusters": self.cluster,
            "partition": self.partition,
            "account": self.account,
            "time": self.time,
            "nodes": "1",
            "ntasks-per-node": "1" if self.one_task else "",
            "cpus-per-task": "" if self.cpus is None else str(self.cpus),
            **self._memory_option(),
            **self._gpu_option(),
        }
        return {name: value for name, value in options.items() if value}

    def lines(self) -> list[str]:
        """The #SBATCH lines of a script."""
        return [f"#SBATCH --{name}={sbatch_quoted(value)}" for name, value in self.options().items()]

    def words(self) -> list[str]:
        """The options of an srun command."""
        return [f"--{name}={value}" for name, value in self.options().items()]

    @property
    def gpu_words(self) -> str:
        """The option for GPUs, such as "--gres=gpu:2"; "" without one."""
        return " ".join(f"--{name}={value}" for name, value in self._gpu_option().items())

    @property
    def memory_mib(self) -> float | None:
        """The requested memory of the node in MiB; None without a size."""
        match = _MEMORY.fullmatch(self.memory)
        if match is None:
            return None
        times = {"gpu": self.gpus, "cpu": self.cpus or 1}.get(match[3], 1)
        return int(match[1]) * MIB_OF[match[2]] * times

    def _gpu_option(self) -> dict[str, str]:
        if not self.gpus or self.gpu_request == "none":
            return {}
        of_gres = "gpu" if self.gpu_request == "gres" else ""
        return {self.gpu_request: ":".join(filter(None, (of_gres, self.gpu_type, str(self.gpus))))}

    def _memory_option(self) -> dict[str, str]:
        if self.memory == NONE:
            return {}
        size, _, per = self.memory.partition(" per-")
        return {f"mem-per-{per}" if per else "mem": size}


def sbatch_quoted(value: object) -> str:
    """A value quoted for an #SBATCH line. sbatch removes quotes like a shell, but reads backslash escapes in all of them."""
    text = str(value)
    if text and not re.search(r"[^A-Za-z0-9_@%+=:,./-]", text):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
