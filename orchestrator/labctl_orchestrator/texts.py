"""The answers of two runs, token by token: where they first differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from labctl_orchestrator.store import Store
from labctl_orchestrator.workspace import Workspace
from labctl_slurm.errors import WrongUseError
from labctl_workers.record import RunResult, Sample, read_json


@dataclass(frozen=True)
class Side:
    """One run's answer to one prompt. `mark` is where the first token that differs stands in the text: (start, end) in
    characters; None where the answer ends before it, or nothing differs."""

    tokens: int
    text: str
    finish_reason: str
    token: str | None
    token_id: int | None
    mark: tuple[int, int] | None


@dataclass(frozen=True)
class Pair:
    """Both answers to one prompt; they are equal for `equal_tokens` tokens from the start (the exact-match length)."""

    prompt: str
    equal_tokens: int
    same: bool
    first: Side
    second: Side

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Answers:
    """What one run answered: a sample of its first repeat for each prompt, and the text of each token id."""

    run_id: str
    told: str
    model_content: str
    samples: Mapping[str, Sample]
    tokens: Mapping[str, str]


def answers(workspace: Workspace, store: Store, run_id: str) -> Answers:
    """The answers of a run's latest result. Raises WrongUseError where it has none."""
    rows = store.rows(
        "SELECT path FROM results WHERE run_id = ? AND status = 'done' ORDER BY ended_at DESC LIMIT 1", (run_id,)
    )
    if not rows:
        raise WrongUseError(f"{run_id} has no result yet", "labctl status tells where it stands")
    record = RunResult.from_json(read_json(workspace.data / rows[0]["path"]))
    (run,) = store.rows("SELECT * FROM runs WHERE run_id = ?", (run_id,))
    prompts = json.loads(run["prompts"])
    samples: dict[str, Sample] = {}
    for sample in record.repeats[0].samples:
        samples.setdefault(prompts[sample.prompt], sample)
    told = f"{run['partition']} {run['backend']} {run['model']} {run['dtype']} {run['sampling']}"
    return Answers(run_id, told, run["model_content"], samples, record.tokens)


def pairs(first: Answers, second: Answers) -> list[Pair]:
    """The prompts that both answered. Raises WrongUseError where there is none."""
    shared = [prompt for prompt in first.samples if prompt in second.samples]
    if not shared:
        raise WrongUseError(
            f"{first.run_id} and {second.run_id} answered different prompts", "compare runs of the same prompts"
        )
    return [_pair(prompt, first, second) for prompt in shared]


def _pair(prompt: str, first: Answers, second: Answers) -> Pair:
    one, two = first.samples[prompt], second.samples[prompt]
    # The ids of two vocabularies mean nothing to each other: the tokens' texts do.
    same_ids = first.model_content == second.model_content
    ours, theirs = (
        [str(token) if same_ids else answers.tokens.get(str(token), str(token)) for token in sample.token_ids]
        for answers, sample in ((first, one), (second, two))
    )
    equal = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    same = equal == len(ours) == len(theirs)
    begin = _begin(one, two, equal, first.tokens, second.tokens)
    return Pair(prompt, equal, same, _side(first, one, equal, begin), _side(second, two, equal, begin))


def _begin(one: Sample, two: Sample, equal: int, ours: Mapping[str, str], theirs: Mapping[str, str]) -> int:
    """Where the differing tokens begin: the texts part there, or earlier by as many letters as both tokens begin with."""
    parting = _common_letters(one.text, two.text)
    pieces = [
        tokens.get(str(sample.token_ids[equal]), "") if equal < len(sample.token_ids) else ""
        for sample, tokens in ((one, ours), (two, theirs))
    ]
    return max(0, parting - _common_letters(*pieces))


def _common_letters(one: str, two: str) -> int:
    """How many letters both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _side(answers: Answers, sample: Sample, equal: int, begin: int) -> Side:
    if equal >= len(sample.token_ids):
        return Side(len(sample.token_ids), sample.text, sample.finish_reason, None, None, None)
    token = sample.token_ids[equal]
    piece = answers.tokens.get(str(token), "")
    end = min(len(sample.text), begin + len(piece))
    return Side(len(sample.token_ids), sample.text, sample.finish_reason, piece, token, (begin, end))


def summary(found: Sequence[Pair]) -> str:
    """In one line: how many answers are the same, and how long the others agree."""
    same = sum(pair.same for pair in found)
    if same == len(found):
        return "the same tokens" if len(found) == 1 else f"all {len(found)} answers have the same tokens"
    if len(found) == 1:
        return f"the same for {found[0].equal_tokens} tokens"
    shortest = min(pair.equal_tokens for pair in found if not pair.same)
    return f"{same} of {len(found)} answers have the same tokens; the others agree for {shortest} tokens or more"
