"""The backends beside each other through labctl itself, with a bare script of transformers as the floor of `hf`, in one run.

    python tests/benchmarks/backends.py FOLDER [--model llama-3-8b] [--backends hf,staged,vllm] [--batches 1,16,64] [--loads 2]

FOLDER holds the random checkpoints by model (tests/random_llama.py), which are made where they are missing, and a workspace for
each. The bare script (bare_generate.py), `labctl submit -p local --loads N` of all backends on two GPUs, the bare script once
more, then vLLM on one GPU. Printed: output tokens a second of each backend and batch, their spread between engine loads, the
ratio of `hf` to the bare script, and what `labctl compare` says. Eager decoding waits for the host, and one process of the bare
script differs from the next by more than 5%: the fastest passes of both are compared. The exit status is 1 where a run failed
or the fastest pass of `hf` is more than 5% off the bare script's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from itertools import chain
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
    bare: dict[int, list[float]] = {}
    if options.bare:
        add_bare_passes(bare, checkpoint, prompt, options)
    failed = submit(workspace, checkpoint, options.backends.split(","), options.gpus, batches, options)
    if options.bare:
        add_bare_passes(bare, checkpoint, prompt, options)
    if options.gpus > 1 and "vllm" in options.backends.split(","):
        failed |= submit(workspace, checkpoint, ["vllm"], 1, batches, options)
    figures = passes_of_loads(workspace)
    print_table(figures, bare)
    print(labctl(workspace, "compare", "--all", "--by", "backend", "--metric", "output_tok_s", "--metric", "tpot_s"))
    off = 0
    for batch, passes in bare.items():
        if loads := figures.get(f"hf {batch}"):
            ratio = max(chain(*loads)) / max(passes)
            off += abs(ratio - 1) > MOST_OFF
            print(f"batch {batch}: the fastest pass of hf is {ratio:.3f} of the bare script's (within {MOST_OFF:.0%})")
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


def add_bare_passes(bare: dict[int, list[float]], checkpoint: Path, prompt: str, options: argparse.Namespace) -> None:
    """One process of the bare script: output tokens a second of each pass, by batch."""
    script = Path(__file__).parent / "bare_generate.py"
    arguments = [
        str(checkpoint),
        prompt,
        *map(str, (options.new_tokens, options.gpus, options.repeats)),
        options.batches,
    ]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"batch"')]
    if done.returncode:
        print(done.stdout[-2000:])
    for each in found:
        bare.setdefault(each["batch"], []).extend(each["tok_s"])
        print(
            f"bare script, batch {each['batch']}: {', '.join(f'{rate:.1f}' for rate in each['tok_s'])} tok/s",
            flush=True,
        )


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


def passes_of_loads(workspace: Path) -> dict[str, list[list[float]]]:
    """By "backend batch" (and "on 1 GPU"): output tokens a second of each pass of each engine load."""
    found: dict[str, dict[str, list[float]]] = {}
    query = "SELECT backend, batch_size, gpus, attempt_id, output_tok_s FROM measured_repeats"
    rows: list[dict[str, Any]] = json.loads(labctl(workspace, "query", query, "--json") or "[]")
    for row in rows:
        alone = " on 1 GPU" if row["gpus"] == 1 and row["backend"] == "vllm" else ""
        name = f"{row['backend']} {row['batch_size']}{alone}"
        found.setdefault(name, {}).setdefault(row["attempt_id"], []).append(row["output_tok_s"])
    return {name: list(loads.values()) for name, loads in found.items()}


def print_table(figures: dict[str, list[list[float]]], bare: dict[int, list[float]]) -> None:
    means = {name: geometric_mean([geometric_mean(load) for load in loads]) for name, loads in figures.items()}
    print(f"{'':<20} {'tok/s':>10} {'to hf':>8} {'to vllm':>8} {'to bare':>8}  loads")
    for name, loads in figures.items():
        batch = name.split()[1]
        ratios = [means.get(f"{backend} {batch}") for backend in ("hf", "vllm")]
        ratios.append(geometric_mean(bare[int(batch)]) if name.startswith("hf ") and int(batch) in bare else None)
        told = " ".join(f"{means[name] / ratio:>8.3f}" if ratio else f"{'':>8}" for ratio in ratios)
        print(f"{name:<20} {means[name]:>10.1f} {told}  {', '.join(f'{geometric_mean(load):.1f}' for load in loads)}")


if __name__ == "__main__":
    sys.exit(main())
