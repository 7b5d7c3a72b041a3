"""The pages of the documentation, and the command lines in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
# A recorded session is not checked for today's options; the pages of the commands are written from them.
WRITTEN = [page for page in PAGES if page.name != "transcript.md" and page.parent.name != "commands"]
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def command_lines(page: Path) -> list[str]:
    """The command lines of labctl in a page's code blocks. In a block with prompts, other lines are output."""
    lines = []
    for block in FENCED.findall(page.read_text(encoding="utf-8")):
        prompt = "$ " if re.search(r"^\$ ", block, re.MULTILINE) else ""
        lines += [line[len(prompt) :] for line in block.splitlines() if line.startswith(f"{prompt}labctl ")]
    return lines


def arguments(line: str) -> list[str]:
    """The arguments of labctl in a command line: no comment, nothing behind a pipe or a redirection."""
    words = shlex.split(line, comments=True)[1:]
    return words[: next((place for place, word in enumerate(words) if word in ("|", "||", "&&", ">", ">>")), None)]
