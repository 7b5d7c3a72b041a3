"""Database rows of a record."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from labctl_orchestrator.store import schema
from labctl_orchestrator.store.window import window_of
from labctl_workers import measure
from labctl_workers.record import RunResult, Sample, TaskAnswers, TextScores


@dataclass(frozen=True)
class Rows:
    """The rows of one record, by table, in the order of `schema.columns`."""

    result: tuple[Any, ...]
    repeats: list[tuple[Any, ...]]
    devices: list[tuple[Any, ...]]
    samples: list[tuple[Any, ...]]
    documents: list[tuple[Any, ...]]
    questions: list[tuple[Any, ...]]
    texts: dict[str, str]

    @classmethod
    def of(cls, name: str, result: RunResult) -> Rows:
        key = (result.run_id, result.attempt.attempt_id)
        result_id = int(hashlib.sha256(" ".join(key).encode()).hexdigest()[:15], 16)
        samples = [sample for repeat in result.repeats for sample in repeat.samples]
        device_columns = schema.columns("devices")[3:]
        figures = [measure.Figures(repeat) for repeat in result.repeats]
        return cls(
            (*key, *_result_values(result, samples, name), result_id),
            [(*key, each.repeat.repeat, result_id, *_repeat_values(each)) for each in figures],
            [
                (*key, repeat.repeat, *[getattr(memory, name) for name in device_columns])
                for repeat in result.repeats
                for memory in repeat.devices
            ],
            [(*key, each.repeat.repeat, *values) for each in figures for values in _sample_values(each)],
            [(*key, *row) for row in _document_rows(result.scores)],
            [(*key, *row) for task in result.answers for row in _question_rows(task)],
            {_text_id(sample.text): sample.text for sample in samples},
        )


def _result_values(result: RunResult, samples: Sequence[Sample], name: str) -> tuple[Any, ...]:
    failure, window = result.failure, window_of(result)
    return (
        result.attempt.job_id, result.status, result.started_at, result.ended_at, result.load_s, result.init_s,
        result.warmup_s, result.attempt.node, failure.kind if failure else None, failure.message if failure else None,
        failure.remedy if failure else None, _json(result.fingerprint), name,
        _facts_json(result.fingerprint),
        _distinct(len(sample.token_times_s) for sample in samples if not sample.error),
        _distinct(sample.finish_reason for sample in samples),
        _text_id(samples[0].text) if samples else None,
        max((sample.prompt_tokens for sample in samples), default=None),
        sum(bool(sample.token_times_s) and not sample.text.strip() for sample in samples),
        sum(not sample.token_times_s and not sample.error for sample in samples),
        msgspec.json.encode(window).decode(), ", ".join(window.invalid) or None,
        min((repeat.wall_s for repeat in result.repeats if not math.isnan(repeat.wall_s)), default=None),
        result.scores.error if result.scores else None,
        "; ".join(f"{task.task}: {task.error}" for task in result.answers if task.error) or None,
    )  # fmt: skip


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _repeat_values(figures: measure.Figures) -> tuple[Any, ...]:
    repeat = figures.repeat
    return (
        repeat.wall_s, repeat.seed, repeat.read_bytes_per_step, repeat.memory_bandwidth_bytes_s,
        repeat.discarded, *measure.metrics_of(figures).values(),
    )  # fmt: skip


def _sample_values(figures: measure.Figures) -> Iterator[tuple[Any, ...]]:
    rows = zip(
        figures.repeat.samples, figures.ttft_s, figures.tpot_s, figures.e2e_s, figures.mean_log_probability,
        figures.repeated_bigrams, strict=True,
    )  # fmt: skip
    for sample, ttft_s, tpot_s, e2e_s, mean_log_probability, repeated_bigrams in rows:
        yield (
            sample.request, sample.prompt, sample.prompt_tokens, len(sample.token_times_s), ttft_s, tpot_s, e2e_s,
            sample.finish_reason, _text_id(sample.text), mean_log_probability, repeated_bigrams, sample.handed_s,
            sample.queued_s, sample.engine_ttft_s, sample.error,
        )  # fmt: skip


def _document_rows(scores: TextScores | None) -> Iterator[tuple[int, float, int]]:
    if scores is not None and all(map(math.isfinite, scores.nll)):  # NaN of a damaged record
        for document, (nll, tokens) in enumerate(zip(scores.nll, scores.tokens, strict=True)):
            yield document, nll, tokens


def _question_rows(task: TaskAnswers) -> Iterator[tuple[str, int, str, str, float]]:
    for question, (of_question, correct) in enumerate(zip(task.questions, task.correct, strict=True)):
        if not math.isnan(correct):
            yield task.task, question, of_question, task.metric, correct


def _distinct(values: Iterable[Any]) -> str:
    return "/".join(str(value) for value in sorted(set(values)))


@functools.lru_cache(maxsize=4096)
def _text_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------- facts: the part of a fingerprint that comparisons read

SHOWN_PACKAGES = ("torch", "transformers", "vllm")
FACTS = (
    "packages", "effective_dtype", "attention", "gpus", "driver", "cuda",
    "cpus", "environment", "script", "container", "prompt_tokens", "model_commit",
)  # fmt: skip


def _facts_json(fingerprint: Mapping[str, Any]) -> str:
    """Facts as JSON. They omit host names and ids, so most runs of a sweep have the same facts."""
    facts = {name: fingerprint[name] for name in FACTS if name in fingerprint}
    if "packages" in facts:
        facts["packages"] = {name: facts["packages"][name] for name in SHOWN_PACKAGES if name in facts["packages"]}
    if "gpus" in facts:
        facts["gpus"] = [{"name": gpu["name"]} for gpu in facts["gpus"]]
    clocks = list(dict.fromkeys(map(_clocks, fingerprint.get("clocks") or [])))
    return _json({**facts, "clocks": clocks} if clocks else facts)


def _clocks(gpu: Mapping[str, Any]) -> str:
    """Clock and power limits at the end of the run, such as "at most 1980 MHz, 700 W"."""
    parts = [
        f"at most {gpu['sm_max_mhz']} MHz" if gpu.get("sm_max_mhz") else "",
        f"{gpu['power_limit_w']:g} W" if gpu.get("power_limit_w") else "",
    ]
    return ", ".join(filter(None, parts)) or "unknown"
