"""The documentation: its links, its command lines, its length, the generated pages and the site."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import click
import pytest

from labctl_orchestrator.cli import COMMANDS, labctl

from .conftest import files_below
from .documents import DOCS, FENCED, PAGES, ROOT, WRITTEN, arguments, command_lines

LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    runpy.run_path(str(DOCS / "generate.py"))["write"](folder)
    return folder


def test_the_pages_of_the_commands_are_what_their_help_says_now(fresh: Path) -> None:
    written, now = files_below(DOCS / "commands"), files_below(fresh / "commands")
    assert set(written) == set(now)
    assert [name for name in now if written[name] != now[name]] == [], "run make docs"


def test_the_page_of_reasons_is_the_table_of_now(fresh: Path) -> None:
    assert (DOCS / "troubleshooting.md").read_bytes() == (fresh / "troubleshooting.md").read_bytes(), "run make docs"


def test_every_command_has_its_page(fresh: Path) -> None:
    assert {path.stem for path in (fresh / "commands").iterdir()} == {"README", *COMMANDS}


def test_no_generated_page_holds_control_characters(fresh: Path) -> None:
    for name, content in files_below(fresh).items():
        assert not re.search(rb"[\x00-\x08\x0b-\x1f]", content), name


# ---------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_link_to_a_missing_page_or_heading_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](page.md#one) [b](gone.md) [c](#two)\n```\n[d](code.md)\n```\n", encoding="utf-8")
    assert broken_links(page) == ["gone.md", "#two"]


# ---------------------------------------------------------------- command lines


def check_options(line: str) -> None:
    """Raises click.UsageError for a command or an option that labctl does not have."""
    words = arguments(line)
    group = click.Context(labctl, info_name="labctl")
    if words[0].startswith("-"):
        labctl.make_parser(group).parse_args(words)
        return
    command = labctl.get_command(group, words[0])
    if command is None:
        raise click.UsageError(f"no command {words[0]}")
    command.make_parser(click.Context(command, parent=group)).parse_args(words[1:])


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_line_has_options_that_exist(page: Path) -> None:
    wrong = []
    for line in command_lines(page):
        try:
            check_options(line)
        except (click.UsageError, ValueError) as error:
            wrong.append(f"{line}: {error}")
    assert wrong == []


def test_a_command_line_with_an_unknown_option_is_found() -> None:
    check_options("labctl compare --by backend | less")
    for line in ("labctl compare --bye backend", "labctl comprae"):
        with pytest.raises(click.UsageError):
            check_options(line)


# ---------------------------------------------------------------- length, and the site


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_changelog_has_one_line_a_change() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("- ") for line in lines) <= 80  # 60 in November 2026, and one for each change since
    assert [line for line in lines if line.startswith(" ")] == []


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None and not os.environ.get("CI"), reason="no mkdocs: pip install '.[docs]'"
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "commands" / "submit" / "index.html").is_file()
