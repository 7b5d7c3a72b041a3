"""Two GPUs for one model: tensor against pipeline against data parallelism of vLLM, and one GPU beside them, in one command.

    python tests/benchmarks/parallel_scaling.py FOLDER [--model llama-3-8b] [--gpus 2] [--batches 1,16,64,256] [--seconds 520]

labctl measures each way in a job of its own, all batches in one engine load. The weights are vLLM's dummy ones, which are drawn
on the GPU: speed and memory are those of the model's dimensions, tokens have no meaning. Ways that do not end within --seconds
are named as not measured. Printed: tokens/s of each way and batch, then what `labctl compare --by gpus` and `--by parallel` say;
FOLDER/report.html is the report. `--cpu`: worker processes take the places of GPUs, and figures mean nothing; it shows that the
command works. The exit status is 1 where a run failed or was not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SOURCES = [str(ROOT / part) for part in ("orchestrator", "slurm", "templates", "workers")]
LABCTL = (sys.executable, "-c", "from labctl_orchestrator.cli import main; main()")
SENTENCE = "Explain tensor parallelism in 5. "
LEAST_S = 60  # less is too little for a start of vLLM
AT_THE_END_S = 15  # comparisons and report


def main() -> int:
    options = parsed()
    deadline = time.monotonic() + options.seconds - AT_THE_END_S
    model = options.folder / options.model
    write_model(model, options.model)
    prompt = (SENTENCE * (options.prompt_tokens // len(SENTENCE) + 1))[: options.prompt_tokens].strip()
    (options.folder / "prompt.txt").write_text(prompt + "\n", encoding="utf-8")
    if options.cpu:
        (options.folder / "labctl.toml").write_text('[partitions.local]\ndevice = "cpu"\n', encoding="utf-8")
    missing = [
        f"{gpus} GPUs {parallel}"
        for gpus, parallel in [(options.gpus, way) for way in options.parallel.split(",")] + [(1, "tensor")]
        if not measured(model, gpus, parallel, int(deadline - time.monotonic()), options)
    ]
    print_rates(options.folder)
    for axis in ("gpus", "parallel"):
        print(labctl(options.folder, "compare", "--all", "--by", axis))
    print(labctl(options.folder, "report", "--all", "--by", "gpus", "-o", "report.html"))
    print(f"not measured: {'; '.join(missing) or 'none'}")
    return 1 if missing else 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--parallel", default="tensor,pipeline,data", help="words")
    parser.add_argument("--batches", default="1,16,64,256")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--seconds", type=int, default=520)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    options.folder = options.folder.absolute()
    return options


def write_model(folder: Path, like: str) -> None:
    """Configuration and tokenizer of a model, with a file of no weights: labctl refuses a folder without such a file."""
    sys.path.insert(0, str(ROOT))
    import transformers

    from tests.random_llama import DIMENSIONS, byte_tokenizer

    hidden, intermediate, layers, heads, kv_heads, vocabulary, others = DIMENSIONS[like]
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2,
        **others,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    byte_tokenizer().save_pretrained(folder)


def measured(model: Path, gpus: int, parallel: str, left_s: int, options: argparse.Namespace) -> bool:
    """Measure one way within the time that is left; whether every run has a result."""
    if left_s < LEAST_S:
        return False
    flags = [
        "-p", "local", "--backend", "vllm", "--model-id", str(model), "--engine-option", "load_format=dummy",
        "--prompts", "prompt.txt", "--raw-prompt", "--ignore-eos", "--max-new-tokens", str(options.new_tokens),
        "--repeats", str(options.repeats), "--gpus", str(gpus), "--parallel", parallel,
        "--dtype", "float32" if options.cpu else "bfloat16", "--time", f"{left_s // 60}:{left_s % 60:02}",
    ]  # fmt: skip
    flags += [word for batch in options.batches.split(",") for word in ("--batch-size", batch)]
    started = time.perf_counter()
    done = subprocess.run([*LABCTL, "submit", *flags, "--wait"], cwd=options.folder, env=environment(), check=False)
    took_s = time.perf_counter() - started
    print(f"{gpus} GPUs {parallel}: exit status {done.returncode} after {took_s:.0f} s", flush=True)
    return done.returncode == 0


def labctl(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [*LABCTL, *arguments], cwd=folder, env=environment(), check=False, capture_output=True, text=True
    )
    print(done.stderr, end="")
    return done.stdout


def environment() -> dict[str, str]:
    paths = [*SOURCES, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LABCTL_NO_PREFLIGHT": "1"}


def print_rates(folder: Path) -> None:
    """A line for each way and batch: tokens/s and ms a token of each pass."""
    columns = "gpus, parallel, batch_size, output_tok_s, tpot_s, mbu, energy_per_token_j"
    query = f"SELECT {columns} FROM measured_repeats ORDER BY gpus, parallel, batch_size"
    rows = json.loads(labctl(folder, "query", query, "--json") or "[]")
    print(f"{'GPUs':>4} {'parallel':<10} {'batch':>5} {'tok/s':>9} {'ms/token':>9} {'mbu':>6} {'J/token':>8}")
    for row in rows:
        mbu, energy = (f"{row[name]:.3f}" if row[name] else "-" for name in ("mbu", "energy_per_token_j"))
        rate, pace = row["output_tok_s"], 1000 * row["tpot_s"]
        print(
            f"{row['gpus']:>4} {row['parallel']:<10} {row['batch_size']:>5} {rate:>9.1f} {pace:>9.2f} {mbu:>6} {energy:>8}"
        )


if __name__ == "__main__":
    sys.exit(main())
