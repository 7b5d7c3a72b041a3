"""What a fingerprint says that may explain a difference, by name and in words, and the differences that nobody asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from labctl_orchestrator.analysis.axes import goes_by
from labctl_orchestrator.analysis.comparison import Cell
from labctl_orchestrator.store.record_rows import SHOWN_PACKAGES
from labctl_workers.record import ScriptSettings

# A variable of the environment: this and its name.
VARIABLE = "variable "
# Other prompts, and other tokenizers, are other tokens.
TOKEN_IDS, TOKEN_IDS_FOLLOW_FROM = "token ids of the prompts", ("model", "prompt_set", "raw_prompt")
# A fact that differs because this axis does is no news where the axis is what is compared.
FOLLOWS_FROM = {
    "effective dtype": "dtype", "GPU": "partition", "clocks": "partition", "CPUs": "partition", "CPU model": "partition",
    "cpus_per_task": "partition", "mem": "partition", "sbatch options": "partition", "setup": "partition",
    "template": "partition", "container": "partition", "model commit": "model", "tokens generated": "max_new_tokens",
    "finish reason": "max_new_tokens",
}  # fmt: skip
# The same, but only as long as every row of one backend has the same.
FACTS_OF_A_BACKEND = ("attention", "vllm")


class _GpuName(msgspec.Struct):
    name: str


class _CpuCount(msgspec.Struct):
    available: int
    model: str | None = None


class Setup(msgspec.Struct):
    """Of a record's fingerprint: what was set around the engine, and what it was given."""

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
        """What its script, its environment and its node set around the worker."""
        facts: dict[str, str] = {}
        if self.cpus:
            facts |= {"CPUs": str(self.cpus.available), "CPU model": self.cpus.model or "not known"}
        if script := self.script:
            facts["setup"] = "; ".join(script.setup) or "none"
            if script.template:
                facts |= {
                    "cpus_per_task": "none" if script.cpus_per_task is None else str(script.cpus_per_task),
                    "mem": script.mem,
                    "sbatch options": ", ".join(f"{name}={value}" for name, value in script.sbatch.items()) or "none",
                    "template": f"{script.template} {script.template_sha256[:8]}",
                }
        if self.environment is not None:
            facts["container"] = self.container or "none"
            facts |= {f"{VARIABLE}{name}": value for name, value in self.environment.items()}
        return facts

    def of_the_input(self) -> dict[str, str]:
        """The commit of a hub model that was loaded, and the prompts as the engine was given them."""
        facts = {"model commit": self.model_commit[:12]} if self.model_commit else {}
        return facts if self.prompt_tokens is None else {**facts, TOKEN_IDS: self.prompt_tokens[:8]}

    @property
    def idle_gpus(self) -> str:
        """What has to be said of a result that ran on fewer GPUs than it was given; else ""."""
        used = self.devices_in_use or []
        if not used or len(used) >= len(self.gpus) or not used[0].startswith("cuda"):
            return ""
        return f"used {len(used)} of its {len(self.gpus)} GPUs ({', '.join(used)}): the others only waited"


class _Stored(Setup):
    """As the database keeps it (`store.facts`)."""

    clocks: list[str] | None = None


_DECODER = msgspec.json.Decoder(_Stored)


def facts_in(text: str) -> dict[str, str]:
    """The facts that the database keeps of a result, by name."""
    told = _DECODER.decode(text)
    facts = {name: told.packages[name] for name in SHOWN_PACKAGES if name in told.packages}
    facts |= {"effective dtype": str(told.effective_dtype), "attention": str(told.attention)}
    facts |= {name: value for name, value in (("driver", told.driver), ("CUDA", told.cuda)) if value}
    if told.clocks is not None:
        facts["clocks"] = "; ".join(told.clocks)
    facts |= told.of_the_job() | told.of_the_input()
    return {**facts, "GPU": " + ".join(gpu.name for gpu in told.gpus) or "none"}


def fact(facts: Mapping[str, str], name: str) -> str:
    """A fact's value in words; a variable that is not among them was not set."""
    return facts.get(name, "not set" if name.startswith(VARIABLE) else "not known")


def changes_of(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    """ "torch 2.9.0 -> 2.10.0", for each of the facts that differ."""
    return tuple(
        f"{name} {fact(before, name)} -> {fact(now, name)}"
        for name in dict.fromkeys([*before, *now])
        if fact(before, name) != fact(now, name)
    )


def unasked_differences(cells: Sequence[Cell], by: Sequence[str]) -> list[str]:
    """The facts in which the cells differ: not those that differ because the axes `by` do."""
    distinct = list({id(cell.facts): cell.facts for cell in cells}.values())  # the cells of a sweep share them
    names = dict.fromkeys(name for facts in distinct for name in facts if FOLLOWS_FROM.get(name) not in by)
    if any(axis in by for axis in TOKEN_IDS_FOLLOW_FROM):
        names.pop(TOKEN_IDS, None)
    found = []
    for name in names:
        if len({fact(facts, name) for facts in distinct}) == 1:
            continue
        seen = [fact(cell.facts, name) for cell in cells]
        if name not in FACTS_OF_A_BACKEND or "backend" not in by or not goes_by(["backend"], cells, seen):
            found.append(f"the rows differ in {name} ({', '.join(dict.fromkeys(seen))})")
    return found
