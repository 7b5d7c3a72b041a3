"""The Tab key: what labctl offers for each word, in a real bash, and in zsh and fish where they are installed."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from labctl_orchestrator.cli import COMMANDS
from labctl_orchestrator.store.workspace import Workspace

from .conftest import JobArray, Labctl, Records

PROGRAM = "import sys; from labctl_orchestrator.cli import main; main(sys.argv[1:])"
SHELLS = {name: shutil.which(name) for name in ("bash", "zsh", "fish")}


@pytest.fixture
def program(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`labctl` on PATH, as a shell finds it, beside what shells themselves need."""
    path = workspace.root.parent / "programs" / "labctl"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{PROGRAM}" "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.defpath}")
    return path


@pytest.fixture
def batch(records: Records) -> JobArray:
    """A request called sweep-3 with two runs, in the database."""
    made = records.submit(name="sweep-3", lengths=(8, 16))
    records.collect()
    return made


def offered(shell: str, *words: str) -> list[str]:
    """What the shell's own machinery offers for the last of these words, after `labctl`."""
    run = {"bash": _bash, "fish": _fish}[shell]
    return run(list(words))


def _bash(words: list[str]) -> list[str]:
    """The function that labctl gives to bash, called by bash as the Tab key calls it."""
    line = ["labctl", *words]
    quoted = " ".join(f'"{word}"' for word in line)
    script = (
        'eval "$(labctl completion bash)"\n'
        "complete -p labctl >/dev/null || exit 9\n"
        f"COMP_WORDS=({quoted}); COMP_CWORD={len(words)}\n"
        "_labctl_completion labctl 2>/dev/null\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    return _run([str(SHELLS["bash"]), "--norc", "-c", script])


def _fish(words: list[str]) -> list[str]:
    line = " ".join(["labctl", *words])
    script = f'labctl completion fish | source; complete --do-complete "{line}"'
    return [found.partition("\t")[0] for found in _run([str(SHELLS["fish"]), "--no-config", "-c", script])]


def _run(command: list[str]) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in {0, 1}, done.stderr
    return [line for line in done.stdout.splitlines() if line]


def installed(shell: str) -> str:
    if SHELLS[shell] is None:
        if shell == "bash":
            pytest.fail("no bash on this machine")
        pytest.skip(f"no {shell} on this machine (apt-get install {shell})")
    return shell


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_every_kind_of_word_is_completed_in_a_real_shell(
    program: Path, batch: JobArray, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    installed(shell)
    (Path(os.environ["HF_HOME"]) / "hub" / "models--org--tiny-llama").mkdir(parents=True)
    workspace.settings_file.write_text("[partitions.dgxa]\ngpu = 'A100'\ncapability = '8.0'\n", encoding="utf-8")
    assert offered(shell, "sta") == ["status"]
    assert offered(shell, "submit", "--max") == ["--max-new-tokens", "--max-tokens", "--max-repeats"]
    assert sorted(offered(shell, "submit", "-p", "dgx")) == ["dgx2", "dgxa", "dgxh"]
    assert offered(shell, "submit", "--model-id", "org") == ["org/tiny-llama"]
    assert offered(shell, "status", "sw") == ["sweep-3"]
    run = batch.runs[0].run_id
    assert offered(shell, "show", run[:6]) == [run]
    assert "tpot_s" in offered(shell, "compare", "--metric", "tp")
    assert offered(shell, "compare", "--by", "dty") == ["dtype"]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_tab_key_itself_completes_at_a_prompt(program: Path, batch: JobArray, shell: str) -> None:
    """The shell on a terminal of its own: what is typed, a tab, and what stands in the line then."""
    name = installed(shell)
    begin = {
        "bash": ["--norc", "--noprofile", "-i"],
        "zsh": ["-f", "-i"],
    }[name]
    load = {
        "bash": 'eval "$(labctl completion bash)"; PS1="ready> "',
        "zsh": 'PS1="ready> "; autoload -Uz compinit; compinit -u -D; eval "$(labctl completion zsh)"',
    }[name]
    with Prompt([str(SHELLS[name]), *begin]) as prompt:
        prompt.send(f"{load}; echo lo''aded\n")
        prompt.until("loaded")
        prompt.send("labctl mat\t")
        prompt.until("labctl matrix")
        prompt.send("swee\t")
        prompt.until("sweep-3")


class Prompt:
    """A program on a pseudo-terminal."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.seen = ""

    def __enter__(self) -> Prompt:
        self.terminal, inner = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "COLUMNS": "120"}
        self.process = subprocess.Popen(
            self.command, stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True
        )
        os.close(inner)
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)

    def send(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def until(self, text: str, timeout_s: float = 30) -> str:
        """What was shown until this text came; it does not count a second time."""
        deadline = time.monotonic() + timeout_s
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.terminal], [], [], 0.2)[0]:
                read = os.read(self.terminal, 65536).decode(errors="replace")
                self.seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x07", "", read)
        shown, _, self.seen = self.seen.partition(text)
        return shown + text


# ---------------------------------------------------------------- what is offered, without a shell


def answer(labctl_words: list[str], incomplete: str) -> list[str]:
    """As click answers a shell: all shells ask in this way."""
    environment = {**os.environ, "_LABCTL_COMPLETE": "zsh_complete", "COMP_CWORD": str(len(labctl_words) + 1)}
    environment["COMP_WORDS"] = " ".join(["labctl", *labctl_words, incomplete])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    return done.stdout.splitlines()[1::3]


def test_nothing_is_said_or_written_where_nothing_can_be_read(workspace: Workspace) -> None:
    assert answer(["status"], "") == []
    workspace.create()
    workspace.database.write_bytes(b"no database" * 100)
    workspace.settings_file.write_text("[partitions\n", encoding="utf-8")
    assert answer(["status"], "") == []
    assert answer(["submit", "-p"], "") == []
    assert answer(["init", "--site"], "nar") == ["narval"]  # shipped with labctl


def test_all_commands_are_offered_and_none_is_loaded_for_it(workspace: Workspace) -> None:
    assert answer([], "") == list(COMMANDS)


def test_the_engine_options_offered_are_those_of_the_backend(workspace: Workspace) -> None:
    assert "compile=" in answer(["submit", "--backend", "staged", "--engine-option"], "")
    assert "compile=" not in answer(["submit", "--backend", "hf", "--engine-option"], "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_that_of_the_shell_that_is_named_or_that_one_is_in(
    labctl: Labctl, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    named = labctl("completion", shell)
    assert (named.code, named.err) == (0, "")
    assert f"_LABCTL_COMPLETE={shell}_complete" in named.out
    monkeypatch.setenv("SHELL", f"/bin/{shell}")
    assert labctl("completion") == named


def test_a_shell_that_is_not_known_is_told_which_are(
    labctl: Labctl, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    ran = labctl("completion")
    assert ran.code == 2
    assert "bash, zsh, fish" in ran.err


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%20b", "a b"])
def test_runs_are_offered_in_a_folder_of_any_name(
    records: Records, batch: JobArray, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    moved = records.workspace.root.rename(records.workspace.root.with_name(name))
    monkeypatch.chdir(moved)
    assert batch.runs[0].run_id in answer(["show"], "")
