"""Plain words: what a person reads in helps, messages, reasons and names."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from labctl_orchestrator.cli import COMMANDS, labctl

from .documents import ROOT

PACKAGES = ("orchestrator", "slurm", "templates", "workers")
BANNED = (
    "is told", "are told", "is said", "are said", "tells that", "has it that", "what there is", "comes to nothing", "by itself",
    "by themselves", "of one's own", "all the same", "reckoned", "not known is none", "stood in the way", "stands in the way",
    "none of labctl's", "in the way", "such as it is", "put back", "let go", "thrown away", "holds to be", "had enough", "spoilt",
    "somebody else's", "whose it is", "looked at and shown", "is none yet", "without a word", "nobody is there", "for ever",
    "submit again", "submits it again", "submit it again", "submits them again", "submits the rest again",
)  # fmt: skip
VERBS = {
    "Cancel", "Check", "Compare", "Download", "Export", "Find", "Forget", "Import", "List", "Make", "Pack", "Print", "Propose",
    "Remove", "Reserve", "Resubmit", "Run", "Show", "Submit", "Update", "Write",
}  # fmt: skip
ERRORS = {
    "LabctlError", "WrongUseError", "NotYetError", "NoResultsError", "PreflightError", "SlurmError", "UnknownOutcomeError",
    "SubmitLimitError", "NoAnswerError", "UnreachableError",
}  # fmt: skip
# The place of the remedy among the arguments.
REMEDY = dict.fromkeys(ERRORS, 1) | {"Refusal": 2, "fail": 1}
MESSAGES = {*REMEDY, "note", "echo", "text", "Finding", "Check", "confirm", "prompt", "refuse", "doubt", "warn"}
LONGEST_HELP, LONGEST_FIRST_LINE, LONGEST_MESSAGE = 90, 60, 100


def source() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}"


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def calls(module: ast.Module, names: set[str]) -> Iterator[ast.Call]:
    return (node for node in ast.walk(module) if isinstance(node, ast.Call) and name_of(node) in names)


def words_of(call: ast.Call) -> str:
    """The literal text of a call's arguments; a value that is filled in is one sign."""
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    return " | ".join(
        "".join(part.value if isinstance(part, ast.Constant) else "…" for part in text.values)
        if isinstance(text, ast.JoinedStr)
        else text.value
        for argument in arguments
        for text in ast.walk(argument)
        if isinstance(text, ast.JoinedStr) or (isinstance(text, ast.Constant) and isinstance(text.value, str))
    )


def banned_in(text: str) -> list[str]:
    plain = " ".join(text.split()).lower()
    return [words for words in BANNED if re.search(rf"\b{re.escape(words)}\b", plain)]


def commands() -> dict[str, click.Command]:
    group = click.Context(labctl, info_name="labctl")
    found = {name: labctl.get_command(group, name) for name in COMMANDS}
    return {name: command for name, command in found.items() if command is not None}


def options() -> list[tuple[str, str]]:
    """(command and option, its help) of every option."""
    return [
        (f"{name} {parameter.opts[0]}", parameter.help or "")
        for name, command in commands().items()
        for parameter in command.params
        if isinstance(parameter, click.Option)
    ]


# ---------------------------------------------------------------- what is read


def test_helps_have_plain_words() -> None:
    helps = [*options(), *((name, command.help or "") for name, command in commands().items()), ("", labctl.help or "")]
    assert [(name, found) for name, text in helps if (found := banned_in(text))] == []


def test_messages_have_plain_words() -> None:
    wrong = [
        (place(path, call), found)
        for path in source()
        for call in calls(tree(path), MESSAGES)
        if (found := banned_in(words_of(call)))
    ]
    assert wrong == []


def test_reasons_have_plain_words() -> None:
    path = ROOT / "slurm/labctl_slurm/reasons.toml"
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    entries = [entry for part in table.values() for entry in part]
    assert [
        (entry["kind"], found)
        for entry in entries
        if (found := banned_in(f"{entry.get('happened', '')} | {entry.get('remedy', '')}"))
    ] == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("raise WrongUseError(f'nothing of {x} is told', 'y')", ["is told"]),
        ("raise WrongUseError('x', f'it comes to ' f'nothing')", ["comes to nothing"]),
        ("tables.note('it is toldest')", []),
    ],
)
def test_a_banned_word_is_found_in_a_call(code: str, found: list[str]) -> None:
    (call,) = calls(ast.parse(code), MESSAGES)
    assert banned_in(words_of(call)) == found


# ---------------------------------------------------------------- lengths


def test_the_help_of_an_option_is_short() -> None:
    assert [(name, len(text)) for name, text in options() if len(text) > LONGEST_HELP] == []


def test_a_command_begins_with_a_short_imperative() -> None:
    for name in commands():
        line = COMMANDS[name][1]
        assert len(line) <= LONGEST_FIRST_LINE, line
        assert line.split()[0] in VERBS, line
        assert line.endswith("."), line


def messages(module: ast.Module) -> Iterator[tuple[ast.Call, str]]:
    """(call, literal message) of each error; a value that is filled in counts as one letter."""
    for call in calls(module, set(REMEDY)):
        for text in call.args[REMEDY[name_of(call)] - 1 :][:1]:
            if isinstance(text, ast.JoinedStr):
                yield call, "".join(part.value if isinstance(part, ast.Constant) else "…" for part in text.values)
            elif isinstance(text, ast.Constant):
                yield call, text.value


def test_a_message_is_short() -> None:
    found = [(place(p, call), len(text)) for p in source() for call, text in messages(tree(p))]
    assert len(found) > 200  # they are read
    assert [(where, length) for where, length in found if length > LONGEST_MESSAGE] == []


# ---------------------------------------------------------------- remedies


def without_remedy(call: ast.Call) -> bool:
    index = REMEDY[name_of(call)]
    named = [keyword.value for keyword in call.keywords if keyword.arg in ("remedy", None)]
    given = [*call.args[index : index + 1], *named]
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    return not starred and (not given or (isinstance(given[0], ast.Constant) and not given[0].value))


def test_every_error_has_a_remedy() -> None:
    assert [place(p, call) for p in source() for call in calls(tree(p), set(REMEDY)) if without_remedy(call)] == []


@pytest.mark.parametrize("arguments", ["'x'", "'x', ''", "message=x"])
def test_an_error_without_a_remedy_is_found(arguments: str) -> None:
    (call,) = calls(ast.parse(f"raise SlurmError({arguments})"), ERRORS)
    assert without_remedy(call)


def test_the_known_errors_are_all_errors() -> None:
    """A new class of error is one that these tests read."""
    bases = {
        node.name: {getattr(base, "id", getattr(base, "attr", "")) for base in node.bases}
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef)
    }
    assert {name for name, of in bases.items() if of & ERRORS} | {"LabctlError"} == ERRORS


# ---------------------------------------------------------------- names


def test_a_class_name_occurs_once() -> None:
    names = Counter(node.name for path in source() for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_a_function_says_what_it_does() -> None:
    names = [
        (place(path, node), node.name)
        for path in source()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [(where, name) for where, name in names if re.fullmatch(r"_?told\w*|_told\w*|\w*_told", name)] == []
