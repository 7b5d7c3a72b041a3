"""The newcomer's walk of docs/first-day.md, walked: from `pip install` to the first comparison, typed at a terminal.

    python -m tests.slurm.walk             prints the transcript, as the page has it

A cluster of the tests' own, a hub of the tests' own (tests/hub.py) that serves SmolLM2-135M under its real name, a new home and a
new virtual environment. Torch and transformers are those of the Python that runs this.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.hub import Hub
from tests.models import ROOT
from tests.terminal import Terminal

from .cluster import SlurmCluster, install_slurm

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# These nodes only say that they have GPUs.
OWN_SETTINGS = '[partitions.{name}]\ndevice = "cpu"\nenv = {{ OMP_NUM_THREADS = "1" }}\n'


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
    terminal.type(f"labctl fetch {MODEL} -p dgxh")
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
                **kept,
                "HOME": str(home),
                "HF_ENDPOINT": hub.address,
                "HF_HUB_DISABLE_XET": "1",
            }
            walk(Terminal(environment, home), clone)


if __name__ == "__main__":
    main(sys.argv[1:])
