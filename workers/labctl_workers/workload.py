"""The requests of a run: its prompts in turn, random tokens of given lengths, or the entries of a dataset.

Everything random follows from a seed, the repeat and the number of the request. So the same seed gives the same requests on every
engine, and request i does not depend on how many there are.
"""

from __future__ import annotations

import hashlib
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from labctl_workers.record import Dataset, JobSpec, Prompt, RunSpec, Workload, requests_per_repeat

# A normal distribution without `max` is cut at so many standard deviations above its mean.
DEVIATIONS_AT_MOST = 4.0
LONGEST = 10_000_000


def draw_seed(seed: int | None, repeat: int, what: str) -> int:
    """The seed of random numbers, the same on every engine: the first 32 bits, big-endian, of the SHA-256 of "WHAT SEED REPEAT"
    in ASCII. `what` is "tokens", "arrivals" or a part of a request; no seed counts as 0; warm-ups are repeats -1, -2, and so on.

    With seed + repeat, repeat 1 of seed 0 would draw the numbers of repeat 0 of seed 1.
    """
    return int.from_bytes(hashlib.sha256(f"{what} {seed or 0} {repeat}".encode("ascii")).digest()[:4], "big")


# ---------------------------------------------------------------- lengths


@dataclass(frozen=True)
class TokenLengths:
    """Lengths in tokens, from `low` to `high`: normal with `mean` and `std`, rounded and clipped, or uniform without a mean."""

    low: int
    high: int
    mean: float | None = None
    std: float = 0.0

    @classmethod
    def parse(cls, text: str) -> TokenLengths:
        """From "1024", "min=64,max=512" or "mean=1024,std=100,min=1,max=2048". Raises ValueError, with the problem."""
        if "=" not in text:
            length = _length(text)
            return cls(length, length)
        given: dict[str, str] = {}
        for part in text.split(","):
            key, _, value = (word.strip() for word in part.partition("="))
            if key not in ("mean", "std", "min", "max"):
                raise ValueError(f"unknown key {key!r}: mean, std, min and max are known")
            if key in given:
                raise ValueError(f"{key} twice")
            given[key] = value
        if ("mean" in given) != ("std" in given):
            raise ValueError("mean and std need each other")
        if "mean" not in given:
            if len(given) < 2:
                raise ValueError("a range needs min and max")
            made = cls(_length(given["min"]), _length(given["max"]))
        else:
            mean, std = _number("mean", given["mean"]), _number("std", given["std"])
            high = _length(given["max"]) if "max" in given else min(LONGEST, int(mean + DEVIATIONS_AT_MOST * std + 0.5))
            made = cls(_length(given.get("min", "1")), high, mean, std)
            if not made.low <= mean <= made.high:
                raise ValueError(f"mean outside {made.low} to {made.high}")
        if made.low > made.high:
            raise ValueError("min above max")
        return made

    def __str__(self) -> str:
        """The canonical form of `parse`."""
        if self.low == self.high:
            return str(self.low)
        bounds = f"min={self.low},max={self.high}"
        return bounds if self.mean is None else f"mean={self.mean:g},std={self.std:g},{bounds}"

    def draw(self, seed: int, request: int, what: str) -> int:
        """The length of this request: the same in every repeat."""
        if self.low == self.high:
            return self.low
        # Python guarantees the same numbers on all versions for random() alone.
        number = random.Random(draw_seed(seed, 0, f"{what} {request}")).random()  # noqa: S311  no secret
        if self.mean is None:
            return self.low + int(number * (self.high - self.low + 1))
        if self.std == 0:
            return round(self.mean)
        drawn = round(statistics.NormalDist(self.mean, self.std).inv_cdf(max(number, 2.0**-53)))
        return min(self.high, max(self.low, drawn))


def _length(text: str) -> int:
    if not (text.strip().isascii() and text.strip().isdigit() and 1 <= int(text) <= LONGEST):
        raise ValueError(f"not a number of tokens from 1 to {LONGEST}: {text!r}")
    return int(text)


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= LONGEST:
        raise ValueError(f"{key} is not a number from 0 to {LONGEST}: {text!r}")
    return value


# ---------------------------------------------------------------- requests


def estimated_tokens(text: str) -> int:
    """An estimate without a tokenizer: four bytes a token."""
    return max(1, -(-len(text.encode()) // 4))


class Size(NamedTuple):
    """The index of a request's prompt, the tokens of its prompt, and those of its answer at most."""

    prompt: int
    prompt_tokens: int
    new_tokens: int


class RunSizes(NamedTuple):
    """A run, and the sizes of its requests; `over_time`: they arrive one after another."""

    run: RunSpec
    sizes: Sequence[Size]
    over_time: bool


def is_trace(dataset: Dataset | None) -> bool:
    """Whether the dataset has arrival times."""
    return dataset is not None and dataset.times_s is not None


def arrive_over_time(job: JobSpec, run: RunSpec) -> bool:
    """Whether the run's requests arrive at a rate, or at the times of a trace."""
    return run.request_rate is not None or is_trace(job.datasets.get(run.prompt_set))


def sizes_of(
    run: RunSpec,
    prompt_tokens: Sequence[int],
    dataset: Dataset | None = None,
    count: Callable[[str], int] = estimated_tokens,
    longest: int | None = None,
) -> list[Size]:
    """The size of each request of a repeat, in order.

    `prompt_tokens` are the lengths of the run's prompts, `count` gives the tokens of an answer in the dataset. Entries of a
    dataset with more than `longest` tokens are left out.
    """
    if are_random(run, dataset):
        return _sizes_of_random_prompts(run, dataset)
    entries = entries_of(run, prompt_tokens, dataset, count)
    if dataset is not None and longest is not None:
        entries = [each for each in entries if each.prompt_tokens + each.new_tokens <= longest]
    if not entries:
        return []
    requests = requests_per_repeat(run.requests, len(entries), run.batch_size)
    found = [entries[number % len(entries)] for number in range(requests)]
    if run.workload is None or run.workload.output_len is None:
        return found
    own = TokenLengths.parse(run.workload.output_len)
    return [
        each._replace(new_tokens=own.draw(run.workload.seed, number, "output")) for number, each in enumerate(found)
    ]


def are_random(run: RunSpec, dataset: Dataset | None) -> bool:
    """Whether the run's prompts are random tokens."""
    of_a_trace = dataset is not None and dataset.input_tokens is not None
    return of_a_trace or (run.workload is not None and run.workload.input_len is not None)


def entries_of(
    run: RunSpec, prompt_tokens: Sequence[int], dataset: Dataset | None, count: Callable[[str], int]
) -> list[Size]:
    """The prompts with their longest answers."""
    if run.workload is not None and run.workload.output_len is not None:
        answers = [TokenLengths.parse(run.workload.output_len).high] * len(prompt_tokens)
    elif dataset is not None and dataset.output_tokens is not None:
        answers = dataset.output_tokens
    elif dataset is not None and dataset.answers is not None:
        answers = [max(1, count(answer)) for answer in dataset.answers]
    else:
        answers = [run.max_new_tokens or 1] * len(prompt_tokens)
    return [Size(index, *of_entry) for index, of_entry in enumerate(zip(prompt_tokens, answers, strict=True))]


def _sizes_of_random_prompts(run: RunSpec, dataset: Dataset | None) -> list[Size]:
    """With the lengths of the workload, else of the trace; each request has a prompt of its own."""
    workload = run.workload or Workload()
    trace_inputs = (dataset.input_tokens if dataset is not None else None) or [1]
    trace_outputs = (dataset.output_tokens if dataset is not None else None) or [run.max_new_tokens or 1]
    inputs = TokenLengths.parse(workload.input_len) if workload.input_len else None
    outputs = TokenLengths.parse(workload.output_len) if workload.output_len else None
    return [
        Size(
            number,
            inputs.draw(workload.seed, number, "input") if inputs else trace_inputs[number % len(trace_inputs)],
            outputs.draw(workload.seed, number, "output") if outputs else trace_outputs[number % len(trace_outputs)],
        )
        for number in range(requests_per_repeat(run.requests, len(trace_inputs), run.batch_size))
    ]


def estimated_sizes(job: JobSpec, run: RunSpec) -> list[Size]:
    """`sizes_of` without a tokenizer: exact for random prompts and given lengths, an estimate for texts."""
    prompts = [estimated_tokens(text_of(prompt)) for prompt in job.prompt_sets[run.prompt_set]]
    return sizes_of(run, prompts, job.datasets.get(run.prompt_set))


def text_of(prompt: Prompt) -> str:
    """A prompt as a text to read: messages with a line for each."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


def steps_of(sizes: Sequence[Size], batch_size: int) -> int:
    """The decode steps of a repeat in static batches, each with its longest answer."""
    news = [size.new_tokens for size in sizes]
    return sum(max(news[first : first + batch_size]) for first in range(0, len(news), batch_size))


def random_prompt(
    size: Size, workload: Workload, repeat: int, ordinary: Sequence[int], begin: Sequence[int]
) -> tuple[int, ...]:
    """The token ids of a random prompt: `begin` (what the tokenizer puts before every text), then the prefix that all requests
    share, then tokens of this request and repeat alone. `ordinary` are the token ids to draw from.

    Each repeat has other tokens: an engine that caches prefixes would else read the whole prompt from its cache.
    """
    length, prefix = size.prompt_tokens, min(workload.prefix_len, size.prompt_tokens)
    shared = (
        [*begin, *_drawn(draw_seed(workload.seed, 0, "prefix"), prefix - len(begin), ordinary)] if prefix else [*begin]
    )
    own = _drawn(draw_seed(workload.seed, repeat, f"prompt {size.prompt}"), length - len(shared), ordinary)
    return tuple([*shared, *own][:length])


def _drawn(seed: int, count: int, among: Sequence[int]) -> Iterable[int]:
    number = random.Random(seed).random  # noqa: S311  no secret
    size = len(among)
    return [among[int(number() * size)] for _ in range(count)]
