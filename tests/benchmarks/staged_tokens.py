"""Are the tokens of captured stages generate's? Every family, in float32, on the GPUs of this machine.

    python tests/benchmarks/staged_tokens.py [--ways captured,staged] [--families llama,gemma2,...] [--gpus 2]

Tiny random checkpoints (tests/families.py). For each way, captured (compile=false) and staged: prompts of different lengths one
by one and in a batch of eight, greedy, against `model.generate`; and sampled, against a plain sampler over the model's own
forward that is given the same random numbers. The exit status is 1 where a token differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("orchestrator", "slurm", "templates", "workers", "")]

from tests.families import FAMILIES, build  # noqa: E402
from tests.reference import PROMPTS, generated, greedy_tokens, sampled_tokens  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default="captured,staged")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=40)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="labctl-families-"))
    failed = 0
    for family in options.families.split(","):
        checkpoint = build(folder / family, family)
        for way in options.ways.split(","):
            started = time.perf_counter()
            try:
                told = compared(checkpoint, way, options)
            except Exception:
                traceback.print_exc(file=sys.stdout)
                told = "FAIL"
            failed += "FAIL" in told
            print(f"{family:<15} {way:<9} {told} in {time.perf_counter() - started:.1f} s", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


def compared(checkpoint: Path, way: str, options: argparse.Namespace) -> str:
    import torch

    from labctl_workers.engines import make_engine
    from labctl_workers.record import JobSpec, ModelRef, RunSpec, Sampling

    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = [RunSpec("r", {}, "p", options.new_tokens, batch_size=size) for size in (1, len(PROMPTS))]
    job = JobSpec(
        "tokens", "here", "local", "staged", ModelRef("model", path=str(checkpoint)), "float32", device, options.gpus, runs,
        {"p": PROMPTS}, engine_options={"compile": way == "staged"}, raw_prompt=True,
    )  # fmt: skip
    engine: Any = make_engine(job, Path(tempfile.mkdtemp(prefix="labctl-cache-")))
    engine.load()
    hot = Sampling(temperature=0.8, top_p=0.9, seed=5)
    prompts = engine.encode(PROMPTS)
    expected = greedy_tokens(checkpoint, prompts, options.new_tokens, device)
    told = [
        share(f"batch {batch}", generated(engine, prompts, batch, options.new_tokens), expected)
        for batch in (1, len(PROMPTS))
    ]
    drawn = generated(engine, prompts, len(PROMPTS), options.new_tokens, hot)
    told.append(share("sampled", drawn, sampled_tokens(checkpoint, prompts, options.new_tokens, hot, device)))
    engine.close()
    return ", ".join(told)


def share(what: str, own: list[list[int]], expected: list[list[int]]) -> str:
    pairs = [(a, b) for mine, theirs in zip(own, expected, strict=True) for a, b in zip(mine, theirs, strict=True)]
    equal = sum(a == b for a, b in pairs)
    return f"{what}: {equal} of {len(pairs)} equal" + ("" if equal == len(pairs) else " FAIL")


if __name__ == "__main__":
    sys.exit(main())
