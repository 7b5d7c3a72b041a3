"""The backends beside each other through labctl itself, with a bare script of transformers as the floor of `hf`, in one run.

    python tests/benchmarks/backends.py FOLDER [--model llama-3-8b] [--backends hf,staged,vllm] [--batches 1,16,64] [--loads 2]

FOLDER holds the random checkpoints by model (tests/random_llama.py), which are made where they are missing, and a workspace for
each. By turns: the bare script (bare_generate.py), then `labctl submit -p local --loads N` of all backends on two GPUs, then
vLLM on one GPU. Printed: output tokens a second of each backend and batch, their spread between engine loads, the ratio of `hf`
to the bare script, and what `labctl compare` says. The exit status is 1 where a run failed or `hf` is more than 5% off.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SOURCES = [str(ROOT / part) for part in ("orchestrator", "slurm", "templates", "workers")]
LABCTL = (sys.executable, "-c", "from labctl_orchestrator.cli import main; main()")
SENTENCE = "Explain tensor parallelism in 5. "
MOST_OFF = 0.05


def main() -> int:
    options = parsed()
    checkpoint, workspace = options.folder / options.model, options.folder / f"{options.model}-workspace"
    workspace.mkdir(parents=True, exist_ok=True)
    if not (checkpoint / "tokenizer.json").exists():
        script = [sys.executable, str(ROOT / "tests" / "random_llama.py"), str(checkpoint), "--like", options.model]
        subprocess.run(script, check=True)
    prompt = (SENTENCE * (options.prompt_tokens // len(SENTENCE) + 1))[: options.prompt_tokens].strip()
    (workspace / "prompt.txt").write_text(prompt + "\n", encoding="utf-8")
    batches = [int(batch) for batch in options.batches.split(",")]
    bare = {batch: bare_rate(checkpoint, prompt, batch, options) for batch in batches} if options.bare else {}
    failed = submit(workspace, checkpoint, options.backends.split(","), options.gpus, batches, options)
    if options.gpus > 1 and "vllm" in options.backends.split(","):
        failed |= submit(workspace, checkpoint, ["vllm"], 1, batches, options)
    figures = rates(workspace)
    print_table(figures, bare)
    print(labctl(workspace, "compare", "--all", "--by", "backend", "--metric", "output_tok_s", "--metric", "tpot_s"))
    off = [b for b, rate in bare.items() if (found := figures.get(f"hf {b}")) and abs(found[0] / rate - 1) > MOST_OFF]
    for batch in off:
        print(f"hf is more than {MOST_OFF:.0%} off the bare script at batch {batch}")
    return 1 if failed or off else 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--backends", default="hf,staged,vllm")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--loads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=2, help="0: the CPU")
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--no-bare", dest="bare", action="store_false", help="leave the bare script out")
    options = parser.parse_args()
    options.folder = options.folder.absolute()
    return options


def bare_rate(checkpoint: Path, prompt: str, batch: int, options: argparse.Namespace) -> float:
    script = Path(__file__).parent / "bare_generate.py"
    arguments = [str(checkpoint), prompt, *map(str, (options.new_tokens, options.gpus, options.repeats, batch))]
    done = subprocess.run([sys.executable, str(script), *arguments], check=True, capture_output=True, text=True)
    rates = json.loads(done.stdout.splitlines()[-1])["tok_s"]
    print(f"bare script, batch {batch}: {', '.join(f'{rate:.1f}' for rate in rates)} tok/s", flush=True)
    return geometric_mean(rates)


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def submit(
    workspace: Path, checkpoint: Path, backends: list[str], gpus: int, batches: list[int], options: argparse.Namespace
) -> bool:
    """Measure; whether a run failed."""
    flags = ["-p", "local", "--model-id", str(checkpoint), "--prompts", "prompt.txt", "--raw-prompt", "--ignore-eos"]
    flags += [
        "--max-new-tokens",
        str(options.new_tokens),
        "--repeats",
        str(options.repeats),
        "--loads",
        str(options.loads),
    ]
    flags += [word for backend in backends for word in ("--backend", backend)]
    flags += [word for batch in batches for word in ("--batch-size", str(batch))]
    if gpus:
        flags += ["--gpus", str(gpus), "--dtype", "bfloat16"]
    elif "staged" in backends:
        flags += ["--engine-option", "compile=false"]
    started = time.perf_counter()
    done = subprocess.run([*LABCTL, "submit", *flags, "--wait"], cwd=workspace, env=environment(), check=False)
    print(f"labctl submit: exit status {done.returncode} after {time.perf_counter() - started:.0f} s", flush=True)
    return done.returncode != 0


def labctl(workspace: Path, *arguments: str) -> str:
    done = subprocess.run(
        [*LABCTL, *arguments], cwd=workspace, env=environment(), check=False, capture_output=True, text=True
    )
    print(done.stderr, end="", file=sys.stderr)
    return done.stdout


def environment() -> dict[str, str]:
    paths = [*SOURCES, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LABCTL_NO_PREFLIGHT": "1"}


def rates(workspace: Path) -> dict[str, tuple[float, list[float]]]:
    """By "backend batch" (and "on 1 GPU"): the mean of the loads, and each load's."""
    found: dict[str, dict[str, list[float]]] = {}
    query = "SELECT backend, batch_size, gpus, attempt_id, output_tok_s FROM measured_repeats"
    rows: list[dict[str, Any]] = json.loads(labctl(workspace, "query", query, "--json") or "[]")
    for row in rows:
        alone = " on 1 GPU" if row["gpus"] == 1 and row["backend"] == "vllm" else ""
        name = f"{row['backend']} {row['batch_size']}{alone}"
        found.setdefault(name, {}).setdefault(row["attempt_id"], []).append(row["output_tok_s"])
    by_load = {name: [geometric_mean(values) for values in loads.values()] for name, loads in found.items()}
    return {name: (geometric_mean(loads), loads) for name, loads in by_load.items()}


def print_table(figures: dict[str, tuple[float, list[float]]], bare: dict[int, float]) -> None:
    print(f"{'':<20} {'tok/s':>10} {'to hf':>8} {'to vllm':>8} {'to bare':>8}  loads")
    for name, (mean, loads) in figures.items():
        batch = name.split()[1]
        ratios = [
            figures[other][0] if (other := f"{backend} {batch}") in figures else None for backend in ("hf", "vllm")
        ]
        ratios.append(bare.get(int(batch)) if name.startswith("hf ") else None)
        told = " ".join(f"{mean / ratio:>8.3f}" if ratio else f"{'':>8}" for ratio in ratios)
        print(f"{name:<20} {mean:>10.1f} {told}  {', '.join(f'{load:.1f}' for load in loads)}")


if __name__ == "__main__":
    sys.exit(main())
