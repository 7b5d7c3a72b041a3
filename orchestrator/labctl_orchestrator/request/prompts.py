"""The prompts of a submission: one prompt, or those of a file."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

from labctl_orchestrator.request.paths import expand_home, read_text
from labctl_orchestrator.request.request import SubmissionSpec, is_utf8
from labctl_slurm.errors import WrongUseError

PROMPTS_BYTES_AT_MOST = 256 * 2**20
# Structured formats that labctl does not read.
_OTHER_FORMATS = (".yaml", ".yml", ".toml", ".xml", ".html", ".parquet", ".xlsx")
FORMATS = 'give text lines, JSON texts or {"prompt": "..."} objects, or a CSV with a column prompt'


def prompts_of(request: SubmissionSpec) -> list[str]:
    """The prompts of the file, or the one prompt. The content determines the format: JSON lines or a JSON array of texts or of
    objects with "prompt", a CSV (.tsv: tabs) with a column "prompt", else one prompt per line.

    Raises WrongUseError, with the line, for an unreadable file, another format, and a file without prompts.
    """
    if request.prompts is None:
        return [request.prompt]
    file = expand_home(request.prompts)
    _, text = read_text("prompts file", file, PROMPTS_BYTES_AT_MOST)
    if file.suffix.lower() in _OTHER_FORMATS or "\0" in text:
        raise WrongUseError(f"unsupported format of prompts file: {file}", FORMATS)
    prompts = _prompts_in(text, file)
    if not prompts:
        raise WrongUseError(f"no prompts in file: {file}", "write one per line")
    return prompts


def _prompts_in(text: str, file: Path) -> list[str]:
    suffix, begins = file.suffix.lower(), text.lstrip()
    # Only line feeds: JSON may contain other separators.
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


# Texts may begin with "[INST]" or "{name}".
_LIKE_AN_ARRAY = re.compile(r"\[\s*[\"{\[\]]")
_LIKE_AN_OBJECT = re.compile(r"\{\s*\"")


def _is_header(line: str) -> bool:
    columns = [column.strip().strip('"') for column in line.split(",")]
    return "prompt" in columns and all(column.isidentifier() for column in columns)


def _json_prompts(text: str, file: Path) -> list[str]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WrongUseError(f"prompts file {file} is not JSON: {error}", FORMATS) from None
    if isinstance(document, dict):
        document = [document]
    if not isinstance(document, list):
        raise WrongUseError(f"prompts file is not a JSON array: {file}", FORMATS)
    return [_prompt_of(value, f"{file}, entry {number}") for number, value in enumerate(document, 1)]


def _csv_prompts(text: str, file: Path, delimiter: str) -> list[str]:
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # of the whole process
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    prompts = []
    try:
        if "prompt" not in (rows.fieldnames or ()):
            raise WrongUseError(f"no column prompt in file: {file}", "name the column of the prompts: prompt")
        for row in rows:
            where = f"{file}, line {rows.line_num}"
            if None in row:
                raise WrongUseError(f"{where} has more cells than the header", "quote a prompt with commas")
            prompts.append(_prompt_of(row["prompt"], where))
    except csv.Error as error:
        raise WrongUseError(f"{file}, line {rows.line_num} is not CSV: {error}", "correct the quotes") from None
    return prompts


def _json_prompt(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WrongUseError(f"{where} is not JSON: {error}", "write one JSON object per line") from None
    return _prompt_of(value, where)


def _prompt_of(value: object, where: str) -> str:
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str) or not prompt.strip():
        raise WrongUseError(f"{where} has no prompt", 'write {"prompt": "..."}, or a text in quotes')
    if not is_utf8(prompt):
        raise WrongUseError(
            f"{where} has an incomplete Unicode character (a lone surrogate)", "write the complete character"
        )
    return prompt
