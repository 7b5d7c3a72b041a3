"""What a comparison reads of a record's fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PACKAGES_TO_TELL = ("torch", "transformers", "vllm")
FACTS = (
    "packages", "effective_dtype", "attention", "gpus", "driver", "cuda",
    "cpus", "environment", "script", "container", "prompt_tokens", "model_commit",
)  # fmt: skip
# NVML's bits for a clock that is held back by a fault, or by heat: it measures the room, not the GPU. (A power limit that is
# reached is how a GPU works under load.)
HELD_BACK = {0x8: "hardware slowdown", 0x20: "heat (software)", 0x40: "heat (hardware)", 0x80: "power brake"}


def facts_of(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """What a comparison reads of a fingerprint: mostly the same for the runs of a sweep, while hosts and ids are not."""
    facts = {name: fingerprint[name] for name in FACTS if name in fingerprint}
    if "packages" in facts:
        facts["packages"] = {name: facts["packages"][name] for name in PACKAGES_TO_TELL if name in facts["packages"]}
    if "gpus" in facts:
        facts["gpus"] = [{"name": gpu["name"]} for gpu in facts["gpus"]]
    clocks = list(dict.fromkeys(map(_clocks, fingerprint.get("clocks") or [])))
    return {**facts, "clocks": clocks} if clocks else facts


def _clocks(gpu: Mapping[str, Any]) -> str:
    """ "at most 1980 MHz, 700 W", and by what they were held back when the run ended."""
    parts = [
        f"at most {gpu['sm_max_mhz']} MHz" if gpu.get("sm_max_mhz") else "",
        f"{gpu['power_limit_w']:g} W" if gpu.get("power_limit_w") else "",
        *(f"held back by {word}" for bit, word in HELD_BACK.items() if (gpu.get("throttle_reasons") or 0) & bit),
    ]
    return ", ".join(filter(None, parts)) or "not known"
