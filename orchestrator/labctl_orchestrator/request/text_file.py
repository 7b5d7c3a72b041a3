"""The text whose perplexity a run computes: a text file, JSON lines, or the fables that labctl ships."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from labctl_orchestrator.request.paths import expand_home
from labctl_orchestrator.request.request import FABLES, is_utf8
from labctl_slurm.errors import WrongUseError
from labctl_workers.record import sha256_of_json

# Joseph Jacobs, The Fables of Aesop, 1894: in the public domain.
SHIPPED = Path(__file__).with_name("fables.txt")
# The text is part of each job's file.
TEXT_BYTES_AT_MOST = 64 * 2**20
FORMATS = 'give a text with two empty lines between documents, or JSON lines with "text"'


@dataclass(frozen=True)
class TextFile:
    """The documents of a file, with its name and their SHA-256."""

    name: str
    sha256: str
    documents: list[str]


def read(path: str) -> TextFile:
    """The documents of the file, or of the shipped text. Raises WrongUseError, with the line, for an unreadable file and another
    format."""
    file = SHIPPED if path == FABLES else expand_home(path)
    if file.suffix.lower() == ".toml":
        raise WrongUseError(
            f"not a text to score: {file}", "put the submission file first, or give --score a text file"
        )
    try:
        with file.open("rb") as opened:
            content = opened.read(TEXT_BYTES_AT_MOST + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise WrongUseError(f"cannot read text {file}: {error}", "give a readable UTF-8 file") from None
    if len(content) > TEXT_BYTES_AT_MOST:
        raise WrongUseError(f"text larger than 64 MiB: {file}", "give a part of it: some thousand documents do")
    if file.suffix.lower() in (".jsonl", ".json"):
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        documents = [_document(line, f"{file}, line {number}") for number, line in lines]
    else:
        documents = [part.strip() for part in re.split(r"\r?\n(?:[ \t]*\r?\n){2,}", text) if part.strip()]
    if not documents:
        raise WrongUseError(f"no documents in text: {file}", FORMATS)
    return TextFile(path if path == FABLES else file.name, sha256_of_json(documents), documents)


def _document(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WrongUseError(f"{where} is not JSON: {error}", FORMATS) from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip() or not is_utf8(text):
        raise WrongUseError(f"{where} has no text", 'write {"text": "..."}')
    return text
