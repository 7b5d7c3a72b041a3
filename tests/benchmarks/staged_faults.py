"""Does the check of `staged` refuse every fault at a real model's dimensions, and nothing without one?

    python tests/benchmarks/staged_faults.py FOLDER [--models llama-3-8b,...] [--dtype bfloat16] [--prompt-tokens 2000]

FOLDER holds the random checkpoints by model (tests/random_llama.py), which are made where they are missing. For each model the
engine is loaded once without a fault, and once with each of tests/faults.py: the exit status is 1 where one is not refused, or
the faultless model is. `ratio` is the largest error of a layer, and of the logits, over transformers' own rounding (at most 1.5).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("orchestrator", "slurm", "templates", "workers", "")]

from labctl_workers.engines import make_engine  # noqa: E402
from labctl_workers.record import JobSpec, ModelRef, Refusal, RunSpec  # noqa: E402
from tests.faults import FAULTS  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", default="llama-3-8b,llama-3.2-1b,qwen2.5-7b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--batches", default="1,64")
    options = parser.parse_args()
    failed = 0
    for model in options.models.split(","):
        folder = options.folder / model
        if not (folder / "tokenizer.json").exists():
            script = str(ROOT / "tests" / "random_llama.py")
            subprocess.run([sys.executable, script, str(folder), "--like", model, "--dtype", options.dtype], check=True)
        for name, fault in {"no fault": contextlib.nullcontext, **FAULTS}.items():
            started = time.perf_counter()
            with fault():
                told, refused = loaded(folder, options)
            as_wanted = refused == (name != "no fault")
            failed += not as_wanted
            verdict = "" if as_wanted else "   FAIL"
            print(f"{model:<14} {name:<38} {told} [{time.perf_counter() - started:.0f} s]{verdict}", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


def loaded(folder: Path, options: argparse.Namespace) -> tuple[str, bool]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = [RunSpec("r", {}, "p", 256, batch_size=int(batch)) for batch in options.batches.split(",")]
    job = JobSpec(
        "faults", "here", "local", "staged", ModelRef("model", path=str(folder)), options.dtype, device, options.gpus, runs,
        {"p": ["a" * options.prompt_tokens]}, engine_options={"compile": False}, raw_prompt=True,
    )  # fmt: skip
    engine: Any = make_engine(job, Path(tempfile.gettempdir()))
    try:
        engine.load()
        return f"ratio {engine.checked.layers:.2f}, {engine.checked.logits:.2f}, {engine.check_s:.1f} s", False
    except Refusal as refusal:
        return refusal.message.partition(": ")[2], refusal.kind == "not-stageable"
    finally:
        engine.close()
        gc.collect()


if __name__ == "__main__":
    sys.exit(main())
