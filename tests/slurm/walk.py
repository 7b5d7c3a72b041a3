"""The newcomer's walk of docs/first-day.md, walked: from `pip install` to the first comparison, typed at a terminal.

    python -m tests.slurm.walk             prints the transcript, as the page has it

A cluster of the tests' own, a hub of the tests' own (tests/hub.py) that serves SmolLM2-135M under its real name, a new home and a
new virtual environment. Torch and transformers are those of the Python that runs this.
"""

from __future__ import annotations

import os
import pty
import select
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyte

from tests.hub import Hub
from tests.models import ROOT

from .cluster import SlurmCluster, install_slurm

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
COLUMNS, LINES = 120, 100
# These nodes only say that they have GPUs.
OWN_SETTINGS = '[partitions.{name}]\ndevice = "cpu"\nenv = {{ OMP_NUM_THREADS = "1" }}\n'


class Terminal:
    """Types commands at a pseudo-terminal, and keeps what was to be seen there."""

    def __init__(self, environment: Mapping[str, str], home: Path) -> None:
        self.environment, self.home, self.here = dict(environment), home, home

    def type(self, command: str, *answers: str, within_s: float = 240, shown: bool = True) -> str:
        """Run a command in bash; each answer is typed where a question (a line that ends in ": ") waits."""
        pid, screen = pty.fork()
        if pid == 0:
            os.chdir(self.here)
            os.execve("/bin/bash", ["bash", "-c", command], self.environment)
        seen, left = b"", list(answers)
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            ready, _, _ = select.select([screen], [], [], 0.5)
            try:
                block = os.read(screen, 65536) if ready else None
            except OSError:  # the command has ended
                break
            if block == b"":
                break
            seen += block or b""
            if block is None and left and seen.rstrip(b"\x1b[0m").endswith(b": "):
                os.write(screen, left.pop(0).encode() + b"\n")
        os.close(screen)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        text = self._plain(seen.decode(errors="replace"))
        if shown:
            print(f"$ {command}\n{text}".rstrip() + "\n", flush=True)
        if status not in (0, 1):
            raise SystemExit(f"{command}: exit status {status}")
        return text

    def _plain(self, text: str) -> str:
        """What stands on the screen in the end."""
        screen = pyte.Screen(COLUMNS, LINES)
        pyte.Stream(screen).feed(text)
        return "\n".join(line.rstrip() for line in screen.display).rstrip().replace(str(self.home), "/home/ada")


def see_torch(home: Path) -> None:
    """Let the new virtual environment see torch and transformers, which this Python has."""
    site = next((home / "env" / "lib").glob("python3*")) / "site-packages"
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others) + "\n", encoding="utf-8")


def walk(terminal: Terminal, clone: Path) -> None:
    terminal.here = clone
    terminal.type("python3 -m venv ~/env")
    terminal.type("~/env/bin/pip install --quiet .")
    see_torch(terminal.home)
    terminal.environment["PATH"] = f"{terminal.home}/env/bin:{terminal.environment['PATH']}"
    terminal.here = terminal.home
    terminal.type("labctl init lab", "dgxh", "", "")
    terminal.here = terminal.home / "lab"
    terminal.type(f"labctl doctor -p dgxh --model-id {MODEL}")
    terminal.type(f"labctl fetch {MODEL}")
    terminal.type(f"labctl doctor -p dgxh --model-id {MODEL} --on-node | tail -n 7")
    terminal.type(f"labctl fit {MODEL} -p dgxh")
    terminal.type(f"labctl submit --model-id {MODEL} --max-new-tokens 16 --max-new-tokens 32 --name first")
    time.sleep(15)
    terminal.type("labctl status")
    terminal.type("while labctl status --json | grep -qE 'pending|running'; do sleep 1; done", shown=False)
    terminal.type("labctl compare --metric output_tok_s")


def main(arguments: Sequence[str]) -> None:
    model = Path(arguments[0]) if arguments else ROOT / ".cache" / "smollm2"
    install_slurm()
    # As long as /home/ada, which it is shown as, but for a letter: lines break as they would there.
    home = Path(tempfile.gettempdir()) / "adas"
    home.mkdir()
    try:
        _walk_from(home, model)
    finally:
        shutil.rmtree(home)


def _walk_from(home: Path, model: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="walk-") as folder, Hub() as hub:
        (home / ".config" / "labctl").mkdir(parents=True)
        own = "\n".join(OWN_SETTINGS.format(name=name) for name in ("dgx2", "dgxh"))
        (home / ".config" / "labctl" / "labctl.toml").write_text(own, encoding="utf-8")
        hub.add(MODEL, model)
        clone = home / "labctl"
        shutil.copytree(
            ROOT, clone, ignore=shutil.ignore_patterns(".git", ".venv", ".cache", "__pycache__", ".*_cache")
        )
        cluster = SlurmCluster(Path(folder) / "slurm")
        with cluster:
            proxies = [name for name in cluster.env if name.lower().endswith("_proxy")]
            kept = {name: value for name, value in cluster.env.items() if name not in proxies}
            environment = {
                **kept, "HOME": str(home), "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "TERM": "xterm",
                "COLUMNS": str(COLUMNS), "LINES": str(LINES),
            }  # fmt: skip
            walk(Terminal(environment, home), clone)


if __name__ == "__main__":
    main(sys.argv[1:])
