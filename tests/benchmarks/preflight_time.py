"""What preflight adds to `labctl submit`: the same command with and without it, by turns.

    python tests/benchmarks/preflight_time.py [--rounds 7]

`--dry-run` of four cells, both backends on both shipped partitions, with a model of Llama-2-7B's dimensions in a local folder and
Slurm as it is on this machine. The bound is 2 s of preflight's own time; what Slurm and the hub take to answer is in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.benchmarks.report import Report  # noqa: E402
from tests.public_models import PUBLIC  # noqa: E402

LABCTL = Path(sys.executable).parent / "labctl"
BOUND_S = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "llama-2-7b"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(PUBLIC["Llama-2-7B"][0]), encoding="utf-8")
        (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        (model / "tokenizer.json").write_text("{}", encoding="utf-8")
        line = [str(LABCTL), "submit", "-p", "dgx2", "-p", "dgxh", "--backend", "hf", "--backend", "vllm", "--dry-run",
                "--model-id", str(model)]  # fmt: skip
        took: dict[str, list[float]] = {"with": [], "without": []}
        for _ in range(options.rounds):
            took["with"].append(timed(line, folder))
            took["without"].append(timed([*line, "--no-preflight"], folder))
    own = statistics.median(with_ - without for with_, without in zip(took["with"], took["without"], strict=True))
    floor = statistics.median(took["without"])
    report.line("preflight, four cells", f"{own:.3f} s", f"{floor:.3f} s",
                f"{(own + floor) / floor:.2f} times the command without it (under {BOUND_S:g} s)", own < BOUND_S)  # fmt: skip
    return report.end()


def timed(line: list[str], folder: str) -> float:
    began = time.perf_counter()
    done = subprocess.run(line, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, check=False)
    took = time.perf_counter() - began
    if done.returncode not in (0, 3):  # 3: this machine's Python need not have what the partitions want
        raise SystemExit(done.stderr.decode())
    return took


if __name__ == "__main__":
    sys.exit(main())
