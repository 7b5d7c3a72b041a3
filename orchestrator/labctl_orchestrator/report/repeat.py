"""How to measure again what a report tells: the request, the versions, the commands. Pure."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from labctl_orchestrator.report.findings import Findings, Submitted, is_an_engine
from labctl_orchestrator.request.request import SubmissionSpec

MOST_REQUESTS = 5
# As JSON has it: lists, no tuples.
DEFAULTS: dict[str, object] = json.loads(msgspec.json.encode(SubmissionSpec()))


@dataclass(frozen=True)
class Step:
    """What to do, and what to type or keep for it."""

    told: str
    code: str = ""


def steps(findings: Findings) -> list[Step]:
    """In the order in which a person does them."""
    return [
        _versions(findings),
        *_requests(findings.asked),
        _submit(findings),
        _ask_again(findings),
        _hand_on(findings),
    ]


def _versions(findings: Findings) -> Step:
    """A build's local label ("+cu128") is of another index than most have: the table of versions keeps it."""
    pins = [
        [f"{name}=={version.partition('+')[0]}" for name, version in setting.facts.items() if is_an_engine(name)]
        for setting in findings.settings
    ]
    lines = dict.fromkeys(f"pip install {' '.join(map(shlex.quote, of_setting))}" for of_setting in pins if of_setting)
    return Step("The Python of each partition needs the versions that these were measured with.", "\n".join(lines))


def _requests(asked: list[Submitted]) -> list[Step]:
    if not asked:
        return [Step("These runs were rendered and submitted by hand: labctl show RUN tells what each was asked.")]
    found = []
    for place, one in enumerate(asked[-MOST_REQUESTS:], 1):
        name = "request.toml" if len(asked) == 1 else f"request-{place}.toml"
        when = f"{one.created_at[:10]} {one.created_at[11:16]} UTC"
        called = f", {one.name}" if one.name else ""
        found.append(
            Step(
                f"Keep this as {name}: what was asked on {when} with labctl {one.labctl_version}{called}.",
                toml(one.request),
            )
        )
    if len(asked) > MOST_REQUESTS:
        found.append(Step(f"{len(asked) - MOST_REQUESTS} earlier requests are in the workspace's .labctl/requests."))
    return found


def _submit(findings: Findings) -> Step:
    files = len(findings.asked[-MOST_REQUESTS:])
    names = ["request.toml"] if files == 1 else [f"request-{place}.toml" for place in range(1, files + 1)]
    told = "Submit it. In a workspace that has these runs already, --again measures them once more."
    return Step(told, "\n".join(f"labctl submit {name} --again" for name in names))


def _ask_again(findings: Findings) -> Step:
    subject = findings.subject
    words = _which(findings)
    for flag, values in (("--by", subject.by), ("--where", subject.conditions), ("--metric", subject.metrics)):
        words += [word for value in values for word in (flag, value)]
    words += ["--baseline", subject.baseline] if subject.baseline else []
    line = shlex.join(words)
    return Step("When labctl status says that it is done, ask again.", f"labctl compare {line}\nlabctl report {line}")


def _hand_on(findings: Findings) -> Step:
    told = "These very records, prompts and answers among them, go to somebody else in one file, which labctl import takes in."
    return Step(told, f"labctl bundle {shlex.join(_which(findings))}")


def _which(findings: Findings) -> list[str]:
    """The words that name these runs, later too: the latest request is then another one."""
    if findings.subject.everything or not findings.asked:
        return ["--all"]
    return [*(findings.subject.names or [findings.title])]


def toml(request: Mapping[str, Any]) -> str:
    """A request file of what differs from labctl's own defaults. JSON's texts, numbers, lists and truth values are TOML's."""
    lines = []
    for key, value in json.loads(json.dumps(request)).items():
        if value is None or value == DEFAULTS.get(key) or value in ([], {}):
            continue
        lines.append(f"{key} = {_toml_value(value)}")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        one_of_one = len(value) == 1 and not isinstance(value[0], dict)
        return _toml_value(value[0]) if one_of_one else "[" + ", ".join(map(_toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
