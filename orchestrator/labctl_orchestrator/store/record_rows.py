"""A record as rows of the database."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from labctl_orchestrator.store.facts import facts_of
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
