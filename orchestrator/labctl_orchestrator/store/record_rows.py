"""A record as rows of the database."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from labctl_workers import measure
from labctl_workers.record import (
    DeviceMemory,
    RunResult,
    Sample,
)

RESULT_COLUMNS = (
    "run_id", "attempt_id", "job_id", "status", "started_at", "ended_at", "load_s", "init_s", "warmup_s", "node",
    "failure_kind", "failure", "remedy", "fingerprint", "path", "facts", "tokens_generated", "finish_reasons", "text_id",
    "prompt_tokens", "empty_answers", "answers_without_tokens",
)  # fmt: skip
SAMPLE_COLUMNS = (
    "run_id", "attempt_id", "repeat", "request", "prompt", "prompt_tokens", "output_tokens", "ttft_s", "tpot_s", "e2e_s",
    "finish_reason", "text_id", "mean_log_probability", "repeated_bigrams", "handed_s", "queued_s", "engine_ttft_s",
)  # fmt: skip
OF_A_DEVICE = tuple(one.name for one in fields(DeviceMemory) if one.name != "extra")
DEVICE_COLUMNS = ("run_id", "attempt_id", "repeat", *OF_A_DEVICE)


def repeat_columns() -> list[str]:
    raw = (
        "run_id", "attempt_id", "repeat", "wall_s", "seed", "read_bytes_per_step", "memory_bandwidth_bytes_s", "thrown_away",
    )  # fmt: skip
    return [*raw, *measure.METRICS]


@dataclass(frozen=True)
class Rows:
    """The rows of one record, by table: values in the order of the columns above."""

    result: tuple[Any, ...]
    repeats: list[tuple[Any, ...]]
    devices: list[tuple[Any, ...]]
    samples: list[tuple[Any, ...]]
    texts: dict[str, str]

    @classmethod
    def of(cls, name: str, result: RunResult) -> Rows:
        key = (result.run_id, result.attempt.attempt_id)
        samples = [sample for repeat in result.repeats for sample in repeat.samples]
        figures = [measure.Figures(repeat) for repeat in result.repeats]
        return cls(
            (*key, *_values_of(result, samples, name)),
            [(*key, *_values_of_a_repeat(of_repeat)) for of_repeat in figures],
            [
                (*key, repeat.repeat, *[getattr(memory, name) for name in OF_A_DEVICE])
                for repeat in result.repeats
                for memory in repeat.devices
            ],
            [
                (*key, of_repeat.repeat.repeat, *values)
                for of_repeat in figures
                for values in _values_of_samples(of_repeat)
            ],
            {_text_id(sample.text): sample.text for sample in samples},
        )


def _values_of(result: RunResult, samples: Sequence[Sample], name: str) -> tuple[Any, ...]:
    failure = result.failure
    return (
        result.attempt.job_id, result.status, result.started_at, result.ended_at, result.load_s, result.init_s,
        result.warmup_s, result.attempt.node, failure.kind if failure else None, failure.message if failure else None,
        failure.remedy if failure else None, _json(result.fingerprint), name,
        _json(facts_of(result.fingerprint)),
        _distinct(len(sample.token_ids) for sample in samples), _distinct(sample.finish_reason for sample in samples),
        _text_id(samples[0].text) if samples else None,
        max((sample.prompt_tokens for sample in samples), default=None),
        sum(bool(sample.token_ids) and not sample.text.strip() for sample in samples),
        sum(not sample.token_ids for sample in samples),
    )  # fmt: skip


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _values_of_a_repeat(figures: measure.Figures) -> tuple[Any, ...]:
    repeat = figures.repeat
    raw = (
        repeat.repeat, repeat.wall_s, repeat.seed, repeat.read_bytes_per_step, repeat.memory_bandwidth_bytes_s,
        repeat.thrown_away,
    )  # fmt: skip
    return (*raw, *measure.metrics_of(figures).values())


def _values_of_samples(figures: measure.Figures) -> Iterator[tuple[Any, ...]]:
    of_each = zip(
        figures.repeat.samples, figures.ttft_s, figures.tpot_s, figures.e2e_s, figures.mean_log_probability,
        figures.repeated_bigrams, strict=True,
    )  # fmt: skip
    for sample, ttft_s, tpot_s, e2e_s, mean_log_probability, repeated_bigrams in of_each:
        yield (
            sample.request, sample.prompt, sample.prompt_tokens, len(sample.token_ids), ttft_s, tpot_s, e2e_s,
            sample.finish_reason, _text_id(sample.text), mean_log_probability, repeated_bigrams, sample.handed_s,
            sample.queued_s, sample.engine_ttft_s,
        )  # fmt: skip


def _distinct(values: Iterable[Any]) -> str:
    return "/".join(str(value) for value in sorted(set(values)))


@functools.lru_cache(maxsize=4096)
def _text_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------- what a comparison reads of a fingerprint

PACKAGES_TO_TELL = ("torch", "transformers", "vllm")
FACTS = (
    "packages", "effective_dtype", "attention", "gpus", "driver", "cuda",
    "cpus", "environment", "script", "container", "prompt_tokens", "model_commit",
)  # fmt: skip
# NVML's bits for a clock that is held back by a fault, or by heat: it measures the room, not the GPU. (A power limit that is
# reached is how a GPU works under load.)
HELD_BACK = {0x8: "hardware slowdown", 0x20: "heat (software)", 0x40: "heat (hardware)", 0x80: "power brake"}


def facts_of(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
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
