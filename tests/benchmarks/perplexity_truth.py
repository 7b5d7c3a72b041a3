"""Are labctl's perplexities and its verdicts those of transformers alone? On CPUs, in one command.

python -m tests.benchmarks.perplexity_truth CHECKPOINT FOLDER [--backends hf vllm] [--documents N]        (needs SciPy)

FOLDER is the workspace; a second call goes on where the first one ended. The text is that of --score, or its first N documents,
in the default windows. `labctl submit` measures the checkpoint in float32 and bfloat16, and in float32 a copy in the W8A8
layout of compressed-tensors (tests/quantized.py). The reference: bare_perplexity.py, and SciPy's paired bootstrap (BCa) over
documents. transformers computes a W8A8 checkpoint with weights of 8 bits alone, vLLM rounds the layers' inputs too: each engine
has the reference that rounds as it does. Rounded inputs carry the smallest differences on, so that reference in float64 stands
beside it. The exit status is 1 where a perplexity in float32 is not within 1e-4 of the
reference, or a verdict is another one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
from scipy import stats

from labctl_orchestrator.request.request import SubmissionSpec
from labctl_orchestrator.request.text_file import SHIPPED
from tests.quantized import quantize

REFERENCE = Path(__file__).with_name("bare_perplexity.py")
LABCTL = (sys.executable, "-c", "from labctl_orchestrator.cli import main; main()")
DEFAULTS = SubmissionSpec()
BOUND = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backends", nargs="+", default=["hf", "vllm"])
    parser.add_argument("--documents", type=int)
    options = parser.parse_args()
    checkpoint, folder = options.checkpoint.absolute(), options.folder.absolute()
    int8 = folder / "int8"
    if not int8.exists():
        quantize(checkpoint, "w8a8-int8", int8)
    windows = (str(DEFAULTS.score_window), str(DEFAULTS.score_stride))
    text = folder / "text.txt"
    documents = SHIPPED.read_text(encoding="utf-8").strip().split("\n\n\n")
    text.write_text("\n\n\n".join(documents[: options.documents]), encoding="utf-8")

    def reference(of: Path, dtype: str, *rounding: str) -> tuple[Any, Any]:
        """(Negative log-likelihoods, scored tokens) of the documents."""
        kept = folder / f"reference-{'-'.join((of.name, dtype, *rounding))}.json"
        if not kept.exists():
            words = [sys.executable, str(REFERENCE), str(of), str(text), dtype, *windows, *rounding]
            kept.write_text(_output(words, folder).splitlines()[-1])
        scores = json.loads(kept.read_text())
        return numpy.array(scores["nll"]), numpy.array(scores["tokens"])

    shared = f"--score {text} --max-new-tokens 2 --requests 1 --batch-size 1 --repeats 1 --warmup 0 --wait -p local"
    shared += "".join(f" --backend {name}" for name in options.backends)
    _labctl(folder, f"submit --model-id {checkpoint} --dtype float32 --dtype bfloat16 {shared}")
    _labctl(folder, f"submit --model-id {int8} --dtype float32 {shared}")
    base, tokens = reference(checkpoint, "float32")
    print(f"{len(tokens)} documents, {sum(tokens)} scored tokens, windows of {'/'.join(windows)}")
    held = True
    for backend in options.backends:
        rounding = ("round-inputs",) if backend == "vllm" else ()
        of_backend = f"compare --all --json --metric perplexity --where backend={backend}"
        rows = _rows(folder, f"{of_backend} --by dtype --where model={checkpoint.name} --baseline float32")
        rows |= _rows(folder, f"{of_backend} --by model --where dtype=float32 --baseline {checkpoint.name}")
        ours = math.exp(sum(base) / sum(tokens))
        apart = rows["float32"]["mean"] / ours - 1
        held &= abs(apart) < BOUND
        print(f"{backend} float32: {rows['float32']['mean']:.5f}, reference {ours:.5f}: {apart:+.1e}", flush=True)
        for name, (nll, _) in (
            ("bfloat16", reference(checkpoint, "bfloat16")),
            ("int8", reference(int8, "float32", *rounding)),
        ):
            ours, row = math.exp(sum(nll) / sum(tokens)), rows[name]
            print(f"{backend} {name}: {row['mean']:.5f}, reference {ours:.5f}: {row['mean'] / ours - 1:+.1e}")
            interval = _interval(nll - base, tokens)
            print(f"  labctl:    {_change(row['ratio'], row['ratio_interval'])}, {row['verdict']['kind']}")
            if rounding and name == "int8":
                nll_64, _ = reference(int8, "float64", *rounding)
                print(
                    f"  the reference in float64 is {math.exp(sum(nll_64 - nll) / sum(tokens)) - 1:+.1e} from it in float32"
                )
            verdict = _verdict(interval)
            print(f"  reference: {_change(math.exp(sum(nll - base) / sum(tokens)), interval)}, {verdict}", flush=True)
            held &= verdict == row["verdict"]["kind"]
    sys.exit(not held)


def _interval(differences: Any, tokens: Any) -> list[float]:
    """Of the ratio of the perplexities."""
    ratio = lambda d, t, axis=-1: d.sum(axis=axis) / t.sum(axis=axis)  # noqa: E731
    drawn = stats.bootstrap((differences, tokens), ratio, paired=True, method="BCa", rng=numpy.random.default_rng(0))
    return [math.exp(bound) for bound in drawn.confidence_interval]


def _verdict(interval: list[float]) -> str:
    if interval[0] <= 1 <= interval[1]:
        return "no significant difference"
    return "worse" if interval[0] > 1 else "better"


def _change(ratio: float, interval: list[float]) -> str:
    low, high = (bound - 1 for bound in interval)
    return f"{ratio - 1:+.4%} ({low:+.3%} to {high:+.3%})"


def _rows(folder: Path, command: str) -> dict[str, Any]:
    """The rows of a comparison, by the value of its axis."""
    (block,) = json.loads(_labctl(folder, command))["blocks"]
    return {str(next(iter(row["at"].values()))): row for row in block["rows"]}


def _labctl(folder: Path, command: str) -> str:
    return _output([*LABCTL, *shlex.split(command)], folder)


def _output(words: list[str], folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    main()
