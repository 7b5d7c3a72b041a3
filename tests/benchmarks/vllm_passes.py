"""labctl's vLLM engine in a process of its own, and any such process: a pass for each line of its input, `BATCH TOKENS`.

python tests/benchmarks/vllm_passes.py CHECKPOINT GPUS CACHE ENGINE_OPTIONS PROMPT BATCH ...
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCES = [str(HERE.parent.parent / part) for part in ("workers", "")]
sys.path[:0] = SOURCES
MARK = '{"pass"'


class Passing:
    """A process that makes passes, of labctl's engine or of vLLM's own."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        found = os.pathsep.join([*SOURCES, environment.get("PYTHONPATH", "")])
        # Its answers come on its output, all else goes to the log.
        env = {**environment, "PYTHONPATH": found, "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen([sys.executable, "-u", *command], text=True, env=env, stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=file)  # fmt: skip

    def answer(self) -> Any:
        """Its next answer; it is ready with the first."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line)["pass"]
        raise SystemExit(f"{self.log.name}: ended with {self.process.wait()}\n{self.log.read_text()[-3000:]}")

    def run(self, batch: int, tokens: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{batch} {tokens}\n")
        self.process.stdin.flush()
        measured: dict[str, Any] = self.answer()
        return {**measured, "output_tok_s": batch * tokens / measured["took_s"]}

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def loaded(checkpoint: str, gpus: int, cache: Path, prompt: str, batches: Sequence[int], tokens: int,
           options: Mapping[str, Any] | None = None) -> Any:  # fmt: skip
    """labctl's engine, for requests of one prompt, so many in flight."""
    from labctl_workers.engines import make_engine
    from labctl_workers.record import JobSpec, ModelRef, RunSpec

    runs = [RunSpec(f"b{batch}", {}, "p", tokens, batch, ignore_eos=True) for batch in batches]
    job = JobSpec("passes", "here", "local", "vllm", ModelRef("random", path=checkpoint), "bfloat16", "cuda", gpus, runs,
                  {"p": [prompt]}, parallel="tensor", raw_prompt=True, engine_options=dict(options or {}))  # fmt: skip
    engine = make_engine(job, cache)
    engine.load()
    return engine


def measured_pass(
    engine: Any, request: Any, batch: int, tokens: int, sampling: Any = None
) -> tuple[dict[str, float], Any]:
    """What a pass of labctl's loop measures, and the token ids of its answers."""
    from labctl_workers.engines.base import Load
    from labctl_workers.record import Sampling

    started = time.perf_counter()
    answers = engine.generate([request] * batch, load=Load(batch), max_new_tokens=tokens, sampling=sampling or Sampling(),
                              ignore_eos=True)  # fmt: skip
    took, given = time.perf_counter() - started, answers()
    ttft = statistics.median(a.token_times[0] - a.handed_at for a in given)
    tpot = statistics.median(a.token_times[-1] - a.token_times[0] for a in given) / (tokens - 1)
    figures = {"took_s": took, "output_tok_s": batch * tokens / took, "ttft_s": ttft, "tpot_s": tpot}
    return figures, [a.token_ids for a in given]


def main() -> None:
    from labctl_workers import children

    checkpoint, gpus, cache, options, prompt, *batches = sys.argv[1:]
    with children.none_left():
        engine = loaded(checkpoint, int(gpus), Path(cache), prompt, [int(b) for b in batches], 128, json.loads(options))
        (request,) = engine.encode([prompt])
        print(json.dumps({"pass": "ready"}), flush=True)
        for line in sys.stdin:
            figures, token_ids = measured_pass(engine, request, *map(int, line.split()))
            print(json.dumps({"pass": {**figures, "token_ids": list(token_ids[0])}}), flush=True)
        engine.close()


if __name__ == "__main__":
    main()
