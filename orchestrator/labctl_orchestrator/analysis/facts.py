"""The facts of a fingerprint that may explain a difference, and differences that are not part of the comparison."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

from labctl_orchestrator.analysis.axes import goes_by
from labctl_orchestrator.analysis.comparison import Cell
from labctl_orchestrator.store.record_rows import SHOWN_PACKAGES
from labctl_workers.record import ScriptSettings

# The prefix of a fact about an environment variable.
VARIABLE = "variable "
# Other prompts, and other tokenizers, are other tokens.
TOKEN_IDS, TOKEN_IDS_FOLLOW_FROM = (
    "token ids of the prompts",
    ("model", "prompt_set", "raw_prompt", "input_len", "prefix_len", "workload_seed"),
)
# Fact -> axis: the fact may differ if the axis is compared.
FOLLOWS_FROM = {
    "effective dtype": "dtype", "GPU": "partition", "clocks": "partition", "CPUs": "partition", "CPU model": "partition",
    "cpus_per_task": "partition", "mem": "partition", "GPU option": "partition", "export": "partition",
    "sbatch options": "partition", "setup": "partition", "template": "partition", "container": "partition",
    "model commit": "model",
}  # fmt: skip
# These follow from the lengths of answers.
OF_LENGTHS, LENGTHS = ("tokens generated", "finish reason"), ("max_new_tokens", "input_len", "output_len", "dataset")
# Facts that may differ between backends, not within one.
FACTS_OF_A_BACKEND = ("attention", "vllm")


class _GpuName(msgspec.Struct):
    name: str


class _CpuCount(msgspec.Struct):
    available: int
    model: str | None = None


class Setup(msgspec.Struct):
    """The part of a record's fingerprint with the engine's surroundings and input."""

    packages: dict[str, str] = {}
    gpus: list[_GpuName] = []
    devices_in_use: list[str] | None = None
    cpus: _CpuCount | None = None
    script: ScriptSettings | None = None
    environment: dict[str, str] | None = None
    container: str | None = None
    model_commit: str | None = None
    prompt_tokens: str | None = None
    effective_dtype: str | None = None
    attention: str | None = None
    driver: str | None = None
    cuda: str | None = None

    def of_the_job(self) -> dict[str, str]:
        """The facts of the script, the environment and the node."""
        facts: dict[str, str] = {}
        if self.cpus:
            facts |= {"CPUs": str(self.cpus.available), "CPU model": self.cpus.model or "unknown"}
        if script := self.script:
            facts["setup"] = "; ".join(script.setup) or "none"
            if script.template:
                facts |= {
                    "cpus_per_task": "none" if script.cpus_per_task is None else str(script.cpus_per_task),
                    "mem": script.mem,
                    # Without the number, which is an axis.
                    "GPU option": re.sub(r"[:=]\d+$", "", script.gpu_option) or "none",
                    "export": script.export or "none",
                    "sbatch options": ", ".join(f"{name}={value}" for name, value in script.sbatch.items()) or "none",
                    "template": f"{script.template} {script.template_sha256[:8]}",
                }
        if self.environment is not None:
            facts["container"] = self.container or "none"
            facts |= {f"{VARIABLE}{name}": value for name, value in self.environment.items()}
        return facts

    def of_the_input(self) -> dict[str, str]:
        """The commit of a hub model, and the prompts' tokens."""
        facts = {"model commit": self.model_commit[:12]} if self.model_commit else {}
        return facts if self.prompt_tokens is None else {**facts, TOKEN_IDS: self.prompt_tokens[:8]}

    @property
    def idle_gpus(self) -> str:
        """A remark about a result that used fewer GPUs than its job had; else ""."""
        used = self.devices_in_use or []
        if not used or len(used) >= len(self.gpus) or not used[0].startswith("cuda"):
            return ""
        return f"used {len(used)} of its {len(self.gpus)} GPUs ({', '.join(used)}): the others were idle"


class _Stored(Setup):
    """The column `facts` of the database."""

    clocks: list[str] | None = None


_DECODER = msgspec.json.Decoder(_Stored)


def facts_in(text: str) -> dict[str, str]:
    """The facts of a result by name, from the database's column."""
    setup = _DECODER.decode(text)
    facts = {name: setup.packages[name] for name in SHOWN_PACKAGES if name in setup.packages}
    facts |= {"effective dtype": str(setup.effective_dtype), "attention": str(setup.attention)}
    facts |= {name: value for name, value in (("driver", setup.driver), ("CUDA", setup.cuda)) if value}
    if setup.clocks is not None:
        facts["clocks"] = "; ".join(setup.clocks)
    facts |= setup.of_the_job() | setup.of_the_input()
    return {**facts, "GPU": " + ".join(gpu.name for gpu in setup.gpus) or "none"}


def fact(facts: Mapping[str, str], name: str) -> str:
    """A fact's value in words; a missing variable was not set."""
    return facts.get(name, "not set" if name.startswith(VARIABLE) else "unknown")


def changes_of(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    """ "torch 2.9.0 -> 2.10.0" for each fact that differs."""
    return tuple(
        f"{name} {fact(before, name)} -> {fact(now, name)}"
        for name in dict.fromkeys([*before, *now])
        if fact(before, name) != fact(now, name)
    )


def unasked_differences(cells: Sequence[Cell], by: Sequence[str]) -> list[str]:
    """The facts in which the cells differ, except those that follow the axes `by`."""
    distinct = list({id(cell.facts): cell.facts for cell in cells}.values())  # the cells of a sweep share them
    names = dict.fromkeys(name for facts in distinct for name in facts if FOLLOWS_FROM.get(name) not in by)
    if any(axis in by for axis in TOKEN_IDS_FOLLOW_FROM):
        names.pop(TOKEN_IDS, None)
    if any(axis in by for axis in LENGTHS):
        for name in OF_LENGTHS:
            names.pop(name, None)
    found = []
    for name in names:
        if len({fact(facts, name) for facts in distinct}) == 1:
            continue
        seen = [fact(cell.facts, name) for cell in cells]
        if name not in FACTS_OF_A_BACKEND or "backend" not in by or not goes_by(["backend"], cells, seen):
            found.append(f"the runs also differ in {name} ({', '.join(dict.fromkeys(seen))})")
    return found
