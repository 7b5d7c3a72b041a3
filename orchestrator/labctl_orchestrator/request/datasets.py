"""Datasets: conversations, prompts and traces of requests, read from a file and sampled.

ShareGPT's JSON has conversations, whose first two turns are a prompt and an answer of the length to generate. JSON lines have
"prompt" or "messages", and the length of the answer if they know it. A trace has times and lengths of requests, and no texts.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from labctl_orchestrator.request.paths import expand_home, read_text
from labctl_orchestrator.request.request import is_utf8
from labctl_slurm.errors import WrongUseError
from labctl_workers.record import Dataset, Prompt

DATASET_BYTES_AT_MOST = 2 * 2**30
# More entries need --requests: nobody means to send a whole ShareGPT several times.
ENTRIES_WITHOUT_REQUESTS = 1000
# The job gets more entries than requests: those that are too long for the model are left out on the node.
SPARE = 2
FORMATS = 'give JSON lines with "prompt" or "messages" and "output_tokens", ShareGPT\'s JSON, or a trace with times and lengths'
OUTPUT_KEYS = ("output_tokens", "output_len", "output_length", "max_tokens")


def _iso(value: Any) -> float:
    text = str(value).strip()
    head, dot, fraction = text.partition(".")
    return datetime.fromisoformat(f"{head}{dot}{fraction[:6]}").timestamp()


# Columns of public traces (time, input tokens, output tokens), and how their times become seconds: Mooncake's and BurstGPT's
# numbers, Azure's dates.
TRACES: tuple[tuple[tuple[str, str, str], Callable[[Any], float]], ...] = (
    (("timestamp", "input_length", "output_length"), lambda value: float(value) / 1000),
    (("Timestamp", "Request tokens", "Response tokens"), float),
    (("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _iso),
)


@dataclass(frozen=True)
class Entries:
    """The entries of a file, with its name and SHA-256. `prompts` is empty for a trace."""

    name: str
    sha256: str
    prompts: list[Prompt] = field(default_factory=list)
    dataset: Dataset = field(default_factory=Dataset)

    @property
    def is_trace(self) -> bool:
        return self.dataset.times_s is not None

    def __len__(self) -> int:
        return len(self.dataset.times_s or self.prompts)

    def sampled(self, requests: int | None, seed: int) -> tuple[list[Prompt], Dataset, int | None]:
        """(Prompts, their lengths, requests of a repeat): a trace's first requests; of other files, entries in a random order.

        Raises WrongUseError for a large file without a number of requests.
        """
        if requests is None and len(self) > ENTRIES_WITHOUT_REQUESTS:
            raise WrongUseError(
                f"dataset {self.name} has {len(self):,} entries, and the number of requests is not given",
                "add --requests, such as --requests 500",
            )
        of = self.dataset
        if self.is_trace:
            count = min(requests or len(self), len(self))
            return [], Dataset(of.output_tokens and of.output_tokens[:count], None, of.input_tokens and of.input_tokens[:count],
                               of.times_s and of.times_s[:count]), count  # fmt: skip
        count = min(len(self), SPARE * (requests or len(self)))
        chosen = random.Random(seed).sample(range(len(self)), count)  # noqa: S311  no secret
        answers, tokens = of.answers, of.output_tokens
        return (
            [self.prompts[n] for n in chosen],
            Dataset(tokens and [tokens[n] for n in chosen], answers and [answers[n] for n in chosen]),
            requests,
        )


def read(path: str) -> Entries:
    """The entries of the file. Raises WrongUseError, with the line or the entry, for an unreadable file and another format."""
    file = expand_home(path)
    content, text = read_text("dataset", file, DATASET_BYTES_AT_MOST)
    rows = list(_rows(text, file))
    if not rows:
        raise WrongUseError(f"no entries in dataset: {file}", FORMATS)
    sha256 = hashlib.sha256(content).hexdigest()
    _, first = rows[0]
    for columns, seconds in TRACES:
        if all(column in first for column in columns):
            return Entries(file.name, sha256, [], _trace(rows, columns, seconds))
    prompts, dataset = _conversations(rows) if "conversations" in first else _prompts(rows)
    return Entries(file.name, sha256, prompts, dataset)


Rows = list[tuple[str, Mapping[str, Any]]]


def _rows(text: str, file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(Where it is, the entry) of each JSON object or row of a CSV."""
    if file.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        yield from ((f"{file}, line {reader.line_num}", row) for row in reader)
        return
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise WrongUseError(f"dataset {file} is not JSON: {error}", FORMATS) from None
        numbered = ((f"{file}, entry {number}", value) for number, value in enumerate(found, 1))
    else:
        lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
        numbered = ((where := f"{file}, line {n}", _json(line, where)) for n, line in lines)
    for where, value in numbered:
        if not isinstance(value, dict):
            raise WrongUseError(f"{where} is not a JSON object", FORMATS)
        yield where, value


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WrongUseError(f"{where} is not JSON: {error}", FORMATS) from None


def _trace(rows: Rows, columns: tuple[str, str, str], seconds: Callable[[Any], float]) -> Dataset:
    arrivals: list[tuple[float, int, int]] = []
    for where, row in rows:
        try:
            at_s, (tokens_in, tokens_out) = seconds(row[columns[0]]), (int(row[name]) for name in columns[1:])
        except (KeyError, TypeError, ValueError):
            raise WrongUseError(f"{where} has no {', '.join(columns)}", "correct the line") from None
        if tokens_in > 0 and tokens_out > 0:  # BurstGPT has failed requests, without an answer
            arrivals.append((at_s, tokens_in, tokens_out))
    arrivals.sort()
    if not arrivals:
        raise WrongUseError("the trace has no request with an answer", FORMATS)
    return Dataset(
        output_tokens=[tokens_out for _, _, tokens_out in arrivals],
        input_tokens=[tokens_in for _, tokens_in, _ in arrivals],
        times_s=[at_s - arrivals[0][0] for at_s, _, _ in arrivals],
    )


def _conversations(rows: Rows) -> tuple[list[Prompt], Dataset]:
    """The first two turns of each conversation that has two, as other load generators take them."""
    prompts: list[Prompt] = []
    answers = []
    for where, row in rows:
        turns = row.get("conversations")
        if not isinstance(turns, list):
            raise WrongUseError(f"{where} has no conversations", FORMATS)
        if len(turns) < 2:
            continue
        prompt, answer = (_text(turn.get("value") if isinstance(turn, dict) else None, where) for turn in turns[:2])
        if prompt and answer:
            prompts.append(prompt)
            answers.append(answer)
    if not prompts:
        raise WrongUseError("no conversation of the dataset has a prompt and an answer", FORMATS)
    return prompts, Dataset(answers=answers)


def _prompts(rows: Rows) -> tuple[list[Prompt], Dataset]:
    prompts: list[Prompt] = []
    lengths: list[int | None] = []
    for where, row in rows:
        messages = row.get("messages")
        if messages is not None:
            prompts.append(_messages(messages, where))
        else:
            text = _text(row.get("prompt"), where)
            if not text.strip():
                raise WrongUseError(f"{where} has an empty prompt", FORMATS)
            prompts.append(text)
        length = next((row[key] for key in OUTPUT_KEYS if row.get(key) not in (None, "")), None)
        if length is not None and not (str(length).isdigit() and int(length) > 0):
            raise WrongUseError(f"{where}: not a number of output tokens: {length!r}", "give a whole number above 0")
        lengths.append(None if length is None else int(length))
    known = [length for length in lengths if length is not None]
    if known and len(known) < len(lengths):
        where = rows[lengths.index(None)][0]
        raise WrongUseError(f"{where} has no output length, other entries have one", "give it output_tokens")
    return prompts, Dataset(output_tokens=known or None)


def _messages(messages: object, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise WrongUseError(f"{where}: messages is not a list of messages", FORMATS)
    found = []
    for message in messages:
        if not isinstance(message, dict):
            raise WrongUseError(f"{where}: messages is not a list of messages", FORMATS)
        found.append({key: _text(message.get(key), where) for key in ("role", "content")})
    if found[-1]["role"] == "assistant":  # the recorded answer: the model is to write its own
        found.pop()
    if not found:
        raise WrongUseError(f"{where}: messages has no message of a user", FORMATS)
    return found


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not is_utf8(value):
        raise WrongUseError(f"{where} has no text where a prompt or message should be", FORMATS)
    return value
