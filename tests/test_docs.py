"""The documentation that is written from the help, and the examples in it."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from labctl_orchestrator.cli import COMMANDS

from .conftest import files_below

DOCS = Path(__file__).parent.parent / "docs"
GENERATED = ("commands", "man")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    runpy.run_path(str(DOCS / "generate.py"))["write"](folder)
    return folder


@pytest.mark.parametrize("part", GENERATED)
def test_the_pages_of_the_commands_are_what_their_help_says_now(fresh: Path, part: str) -> None:
    written, now = files_below(DOCS / part), files_below(fresh / part)
    assert set(written) == set(now)
    assert [name for name in now if written[name] != now[name]] == [], "python docs/generate.py writes them again"


def test_the_page_of_reasons_is_the_table_of_now(fresh: Path) -> None:
    assert (DOCS / "troubleshooting.md").read_bytes() == (fresh / "troubleshooting.md").read_bytes()


def test_every_command_has_its_page_and_its_man_page(fresh: Path) -> None:
    assert {path.stem for path in (fresh / "commands").iterdir()} == {"README", *COMMANDS}
    assert {path.name for path in (fresh / "man").iterdir()} == {"labctl.1", *(f"labctl-{name}.1" for name in COMMANDS)}


def test_no_page_holds_a_sign_that_only_a_terminal_means(fresh: Path) -> None:
    for name, content in files_below(fresh).items():
        assert not re.search(rb"[\x00-\x08\x0b-\x1f]", content), name


@pytest.mark.skipif(shutil.which("groff") is None, reason="no groff on this machine (apt-get install groff)")
@pytest.mark.parametrize("page", ["labctl.1", "labctl-submit.1", "labctl-completion.1"])
def test_a_man_page_is_set_without_a_complaint(fresh: Path, page: str) -> None:
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tascii", "-P-cbou", str(fresh / "man" / page)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "SYNOPSIS" in done.stdout
    assert "labctl" in done.stdout
