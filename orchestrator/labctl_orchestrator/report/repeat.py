"""The steps to measure a report again: versions, submission files, commands. Pure."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from labctl_orchestrator.report.findings import Findings, ReportedSubmission, is_an_engine
from labctl_orchestrator.request.request import SubmissionSpec

MOST_SUBMISSIONS = 5
# As JSON: lists, no tuples.
DEFAULTS: dict[str, object] = json.loads(msgspec.json.encode(SubmissionSpec()))


@dataclass(frozen=True)
class Step:
    """An instruction, and the commands or the file for it."""

    text: str
    code: str = ""


def steps(findings: Findings) -> list[Step]:
    """The steps in their order."""
    share = "Share these records, with prompts and answers, as one file for labctl import."
    return [
        _versions(findings),
        *_submissions(findings.asked),
        _submit(findings),
        _compare_again(findings),
        Step(share, f"labctl bundle {shlex.join(_which(findings))}"),
    ]


def _versions(findings: Findings) -> Step:
    """Without a build's local label ("+cu128"), which most indexes lack; the table of versions has it."""
    pins = [
        [f"{name}=={version.partition('+')[0]}" for name, version in setting.facts.items() if is_an_engine(name)]
        for setting in findings.settings
    ]
    lines = dict.fromkeys(f"pip install {' '.join(map(shlex.quote, of_setting))}" for of_setting in pins if of_setting)
    return Step("Install these versions in the Python of each partition.", "\n".join(lines))


def _submissions(asked: list[ReportedSubmission]) -> list[Step]:
    if not asked:
        return [Step("These runs were rendered and submitted by hand. labctl show RUN prints the settings of each.")]
    found = []
    for place, one in enumerate(asked[-MOST_SUBMISSIONS:], 1):
        name = "submission.toml" if len(asked) == 1 else f"submission-{place}.toml"
        when = f"{one.created_at[:10]} {one.created_at[11:16]} UTC"
        called = f", {one.name}" if one.name else ""
        text = f"Save this as {name}: the submission of {when} with labctl {one.labctl_version}{called}."
        found.append(Step(text, toml(one.request)))
    if (more := len(asked) - MOST_SUBMISSIONS) > 0:
        found.append(Step(f"{more} earlier submissions are in the workspace's .labctl/submissions."))
    return found


def _submit(findings: Findings) -> Step:
    files = len(findings.asked[-MOST_SUBMISSIONS:])
    names = ["submission.toml"] if files == 1 else [f"submission-{place}.toml" for place in range(1, files + 1)]
    text = "Submit it. With --again labctl also measures runs that this workspace has already."
    return Step(text, "\n".join(f"labctl submit {name} --again" for name in names))


def _compare_again(findings: Findings) -> Step:
    subject = findings.subject
    words = _which(findings)
    given = {"--by": subject.by, "--where": subject.conditions, "--metric": subject.metrics, "--slo": subject.slo}
    words += [word for flag, values in given.items() for value in values for word in (flag, value)]
    words += ["--baseline", subject.baseline] if subject.baseline else []
    line = shlex.join(words)
    return Step(
        "When labctl status shows that all runs are done, compare them.", f"labctl compare {line}\nlabctl report {line}"
    )


def _which(findings: Findings) -> list[str]:
    """Names that mean these runs also after a later submission."""
    if findings.subject.everything or not findings.asked:
        return ["--all"]
    return [*(findings.subject.names or [findings.title])]


def toml(request: Mapping[str, Any]) -> str:
    """A submission file with the keys that differ from the defaults. JSON's strings, numbers, lists and booleans are TOML's."""
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
