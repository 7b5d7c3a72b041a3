"""Are doubtful runs marked on real GPUs? A quiet run, a short pass, a second process on the GPUs, a growing queue.

    python tests/benchmarks/gpu_marks.py FOLDER [--model tinyllama] [--gpus 2] [--cases quiet short second queue]

Each is made to happen around a vLLM run of `labctl submit`; weights are vLLM's dummy ones. Printed: the marks of each run, and at
the end what `labctl compare` says of them. The exit status is 1 where a run failed, has not the mark that it must have, or has
another mark that says its GPUs or its load were not themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [*(str(ROOT / part) for part in ("orchestrator", "slurm", "templates", "workers")), str(ROOT)]

from labctl_orchestrator.analysis import doubts  # noqa: E402
from tests.benchmarks.parallel_scaling import LABCTL, environment, labctl, write_model  # noqa: E402

CASES = ("quiet", "short", "second", "queue")
MADE = (doubts.SHORT_PASS, doubts.SHARED, doubts.SATURATED)
# Reads and writes memory of one GPU until it is killed.
BUSY = """
import sys, torch
a = torch.randn(4096, 4096, device=f"cuda:{sys.argv[1]}")
print("busy", flush=True)
while True:
    a @ a
    torch.cuda.synchronize(a.device)
"""


def main() -> int:
    options = parsed()
    write_model(options.folder / options.model, options.model)
    (options.folder / "prompt.txt").write_text("Explain tensor parallelism in 5 bullet points.\n", encoding="utf-8")
    offline = ["--prompts", "prompt.txt", "--raw-prompt", "--repeats", "5"]
    # 8 places serve about 25 requests/s.
    served = ["--serve", "--lengths", "1024/128", "--request-rate", "80", "--requests", "600", "--repeats", "1"]
    served += ["--engine-option", "max_num_seqs=8"]
    made: dict[str, tuple[list[str], set[str]]] = {
        "quiet": ([*offline, "--max-new-tokens", "1000"], set()),
        "short": ([*offline, "--max-new-tokens", "16"], {doubts.SHORT_PASS}),
        "second": ([*offline, "--max-new-tokens", "1001"], {doubts.SHARED}),
        "queue": (served, {doubts.SATURATED}),
    }
    wrong = []
    for case in options.cases:
        with a_second_process(options.gpus if case == "second" else 0):
            wrong.append(measured(case, *made[case], options))
    print(labctl(options.folder, "compare", "--all", "--metric", "output_tok_s"))
    print(f"wrong: {'; '.join(filter(None, wrong)) or 'none'}")
    return 1 if any(wrong) else 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="tinyllama")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    options = parser.parse_args()
    options.folder = options.folder.absolute()
    return options


def measured(name: str, flags: Sequence[str], wanted: set[str], options: argparse.Namespace) -> str:
    """Measure a run; "" if it has the wanted ones of MADE and no other."""
    model = str(options.folder / options.model)
    command = [
        *LABCTL, "submit", "-p", "local", "--backend", "vllm", "--model-id", model, "--engine-option", "load_format=dummy",
        "--ignore-eos", "--gpus", str(options.gpus), "--dtype", "bfloat16", "--name", name, *flags, "--wait",
    ]  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run(command, cwd=options.folder, env=environment(), check=False)
    answer = json.loads(labctl(options.folder, "compare", name, "--metric", "output_tok_s", "--json") or "{}")
    rows: list[dict[str, Any]] = [row for block in answer.get("blocks", ()) for row in block["rows"]]
    marks = {mark for row in rows for mark in row["doubts"]}
    print(
        f"{name}: exit status {done.returncode} after {time.perf_counter() - started:.0f} s, marks: {sorted(marks)}",
        flush=True,
    )
    found = marks & set(MADE)
    return "" if rows and not done.returncode and found == wanted else f"{name} has {sorted(found)}"


@contextlib.contextmanager
def a_second_process(gpus: int) -> Iterator[None]:
    """Somebody else's process computes on each GPU."""
    others = [
        subprocess.Popen(
            [sys.executable, "-c", BUSY, str(gpu)], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        for gpu in range(gpus)
    ]
    try:
        for other in others:
            assert other.stdout
            other.stdout.readline()
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


if __name__ == "__main__":
    sys.exit(main())
