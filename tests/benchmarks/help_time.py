"""How long `labctl --help` takes beside `import click`, which it cannot do without.

    python tests/benchmarks/help_time.py

Both are started in turn, so that what else this machine does falls on both; the median of 15 each. Exit code 1 where the
ratio is above 2, or where a package is imported that only an engine or a submission needs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

TIMES = 15
TARGET = 2.0
HEAVY = ("torch", "transformers", "vllm", "numpy", "submitit")
LABCTL_HELP = "from labctl_orchestrator.cli import main; main(['--help'])"
IMPORT_CLICK = "import click"
IMPORTED = (
    "import json, sys\n"
    "from labctl_orchestrator.cli import run\n"
    "run(['--help'])\n"
    f"print(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))), file=sys.stderr)\n"
)


def seconds(code: str) -> float:
    """How long a fresh Python takes for this code, its own start included."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def in_turn(*codes: str) -> list[float]:
    """The median time of each, started one after another, over and over."""
    for code in codes:
        seconds(code)  # not counted: it fills the file cache
    rounds = [[seconds(code) for code in codes] for _ in range(TIMES)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def heavy_modules() -> list[str]:
    """Those of HEAVY that `labctl --help` has imported by its end."""
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stderr)
    return found


def main() -> int:
    of_help, of_click = in_turn(LABCTL_HELP, IMPORT_CLICK)
    ratio = of_help / of_click
    heavy = heavy_modules()
    print(f"labctl --help   {of_help * 1000:6.1f} ms  (median of {TIMES})")
    print(f"import click    {of_click * 1000:6.1f} ms  (median of {TIMES}, in turn)")
    print(f"ratio           {ratio:6.2f}     (target: at most {TARGET:g})")
    print(f"heavy modules   {', '.join(heavy) or 'none'}  (looked for: {', '.join(HEAVY)})")
    return int(ratio > TARGET or bool(heavy))


if __name__ == "__main__":
    sys.exit(main())
