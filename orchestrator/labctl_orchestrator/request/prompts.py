"""The prompts of a request: its one prompt, or those of a file."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

from labctl_orchestrator.request.paths import expand_home
from labctl_orchestrator.request.request import Request, is_utf8
from labctl_slurm.errors import WrongUseError

PROMPTS_BYTES_AT_MOST = 256 * 2**20
# Structured formats that labctl does not read: their lines are no prompts.
_OTHER_FORMATS = (".yaml", ".yml", ".toml", ".xml", ".html", ".parquet", ".xlsx")
ONE_OF_THE_FORMATS = (
    'give a line each, JSON lines or an array of texts or {"prompt": "..."}, or a CSV with a column prompt'
)


def prompts_of(request: Request) -> list[str]:
    """The prompts of the file, else the one prompt. The content says the format: JSON lines or a JSON array of texts or objects
    with "prompt", a CSV (.tsv: tabs) with a column of that name, else a prompt on each line.

    Raises WrongUseError, with the line, for a file that cannot be read, is structured otherwise, or holds no prompt.
    """
    if request.prompts is None:
        return [request.prompt]
    file = expand_home(request.prompts)
    try:
        with file.open("rb") as opened:
            content = opened.read(PROMPTS_BYTES_AT_MOST + 1)
        text = content.decode("utf-8-sig")  # some editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise WrongUseError(f"prompts file {file} cannot be read: {error}", "give a UTF-8 file") from None
    if len(content) > PROMPTS_BYTES_AT_MOST:
        raise WrongUseError(f"prompts file {file} is larger than 256 MiB", "give a smaller file")
    if file.suffix.lower() in _OTHER_FORMATS or "\0" in text:
        raise WrongUseError(f"prompts file {file} is in a format that labctl does not read", ONE_OF_THE_FORMATS)
    prompts = _prompts_in(text, file)
    if not prompts:
        raise WrongUseError(f"prompts file {file} holds no prompt", "write one on each line")
    return prompts


def _prompts_in(text: str, file: Path) -> list[str]:
    suffix, begins = file.suffix.lower(), text.lstrip()
    # Only line feeds end a line: JSON may hold other separators.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if suffix == ".jsonl":
        return [_json_prompt(line, f"{file}, line {number}") for number, line in lines]
    if suffix == ".json" or _LIKE_AN_ARRAY.match(begins):
        return _json_prompts(text, file)
    if _LIKE_AN_OBJECT.match(begins):
        return [_json_prompt(line, f"{file}, line {number}") for number, line in lines]
    delimiter = "\t" if suffix == ".tsv" else ","
    if suffix in (".csv", ".tsv") or (lines and _is_header(lines[0][1])):
        return _csv_prompts(text, file, delimiter)
    return [line.rstrip("\r") for _, line in lines]


# "[INST] ..." and "{name}" are texts.
_LIKE_AN_ARRAY = re.compile(r"\[\s*[\"{\[\]]")
_LIKE_AN_OBJECT = re.compile(r"\{\s*\"")


def _is_header(line: str) -> bool:
    columns = [column.strip().strip('"') for column in line.split(",")]
    return "prompt" in columns and all(column.isidentifier() for column in columns)


def _json_prompts(text: str, file: Path) -> list[str]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WrongUseError(f"prompts file {file} is not JSON: {error}", ONE_OF_THE_FORMATS) from None
    if isinstance(document, dict):
        document = [document]
    if not isinstance(document, list):
        raise WrongUseError(f"prompts file {file} is no JSON array", ONE_OF_THE_FORMATS)
    return [_prompt_of(value, f"{file}, entry {number}") for number, value in enumerate(document, 1)]


def _csv_prompts(text: str, file: Path, delimiter: str) -> list[str]:
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # the limit is the whole process's
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    prompts = []
    try:
        if "prompt" not in (rows.fieldnames or ()):
            raise WrongUseError(f"prompts file {file} has no column prompt", "call the prompts' column prompt")
        for row in rows:
            where = f"{file}, line {rows.line_num}"
            if None in row:
                raise WrongUseError(f"{where} has more cells than the header", "put a prompt with commas in quotes")
            prompts.append(_prompt_of(row["prompt"], where))
    except csv.Error as error:
        raise WrongUseError(f"{file}, line {rows.line_num} is not CSV: {error}", "correct its quotes") from None
    return prompts


def _json_prompt(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WrongUseError(f"{where} is not JSON: {error}", "write one JSON object on each line") from None
    return _prompt_of(value, where)


def _prompt_of(value: object, where: str) -> str:
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str) or not prompt.strip():
        raise WrongUseError(f"{where} has no prompt", 'write {"prompt": "..."}, or a text in quotes')
    if not is_utf8(prompt):
        raise WrongUseError(f"{where} has half of a character (a lone surrogate)", "write the whole character")
    return prompt
