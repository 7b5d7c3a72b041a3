"""Processes that make passes, of labctl's vLLM engine or of vLLM's own; and labctl's: a pass for each line of its input. HOW is
`labctl`, or `generate` for the code of bare_vllm.py on labctl's engine.

python tests/benchmarks/vllm_passes.py CHECKPOINT GPUS ENGINE_OPTIONS PROMPT BATCH ... < LINES OF "HOW BATCH TOKENS"
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCES = [str(HERE.parent.parent / part) for part in ("workers", "")]
sys.path[:0] = SOURCES
MARK = '{"pass"'
CLOSES_WITHIN_S = 60.0
NEW_TOKENS = 128
CACHES = ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def with_sources(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which a new Python finds this checkout's labctl."""
    return {**environment, "PYTHONPATH": os.pathsep.join([*SOURCES, environment.get("PYTHONPATH", "")])}


class Passing:
    """A process that makes passes; between them it and those that it started are stopped."""

    def __init__(self, command: Sequence[str], log: Path, cache: Path) -> None:
        self.log = log
        kept = {variable: str(cache / variable.lower()) for variable in CACHES}
        # Its answers come on its output, all else goes to the log.
        environment = {**with_sources(os.environ), **kept, "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
        with self.log.open("w") as file:
            self.started = subprocess.Popen([sys.executable, "-u", *command], text=True, env=environment, stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=file)  # fmt: skip
        self.processes: list[Any] = []

    def ready(self, cores: Iterable[int]) -> None:
        """It runs on these CPU cores alone from now on."""
        import psutil  # vLLM needs it too

        self._answer()
        itself = psutil.Process(self.started.pid)
        self.processes = [itself, *itself.children(recursive=True)]
        for process in self.processes:
            for thread in process.threads():
                os.sched_setaffinity(thread.id, cores)

    def run(self, how: str, batch: int, tokens: int) -> dict[str, Any]:
        """One pass: what it measured, and `output_tok_s` where it timed the whole."""
        assert self.started.stdin is not None
        self._wake()
        self.started.stdin.write(f"{how} {batch} {tokens}\n")
        self.started.stdin.flush()
        measured: dict[str, Any] = self._answer()
        self.rest()
        return measured | ({"output_tok_s": batch * tokens / measured["took_s"]} if "took_s" in measured else {})

    def rest(self) -> None:
        for process in self.processes:
            process.suspend()

    def end(self) -> None:
        """Its engine closes itself; what is left of it is killed."""
        import psutil

        assert self.started.stdin is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            itself = psutil.Process(self.started.pid)
            self.processes = self.processes or [itself, *itself.children(recursive=True)]
        self._wake()
        with contextlib.suppress(BrokenPipeError):
            self.started.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.started.wait(timeout=CLOSES_WITHIN_S)
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _wake(self) -> None:
        import psutil

        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def _answer(self) -> Any:
        assert self.started.stdout is not None
        for line in self.started.stdout:
            if line.startswith(MARK):
                return json.loads(line)["pass"]
        raise SystemExit(f"{self.log}: ended with {self.started.wait()}\n{self.log.read_text()[-3000:]}")


def job_of(
    checkpoint: str, gpus: int, prompt: str, batches: Sequence[int], options: Mapping[str, Any] | None = None
) -> Any:
    """One job of labctl's worker: a run for each number of requests in flight, all of one prompt."""
    from labctl_workers.record import JobSpec, ModelRef, RunSpec

    runs = [RunSpec(f"b{batch}", {}, "p", NEW_TOKENS, batch, ignore_eos=True) for batch in batches]
    return JobSpec("truth", "here", "local", "vllm", ModelRef("random", path=checkpoint), "bfloat16", "cuda", gpus, runs,
                   {"p": [prompt]}, parallel="tensor", raw_prompt=True, engine_options=dict(options or {}))  # fmt: skip


def loaded(job: Any, cache: Path) -> Any:
    """labctl's engine for the job, ready."""
    from labctl_workers.engines import make_engine

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
    import bare_vllm  # beside this file

    from labctl_workers import children

    checkpoint, gpus, options, prompt, *batches = sys.argv[1:]
    cache = Path(os.environ["VLLM_CACHE_ROOT"]).parent
    job = job_of(checkpoint, int(gpus), prompt, [int(batch) for batch in batches], json.loads(options))
    with children.none_left():
        engine = loaded(job, cache)
        (request,) = engine.encode([prompt])
        print(json.dumps({"pass": "ready"}), flush=True)
        for line in sys.stdin:
            how, batch, tokens = line.split()
            if how == "generate":
                prompt_ids = {"prompt_token_ids": list(request.token_ids)}
                made = bare_vllm.generate(engine.llm, prompt_ids, int(batch), int(tokens))
            else:
                figures, token_ids = measured_pass(engine, request, int(batch), int(tokens))
                made = {**figures, "token_ids": list(token_ids[0])}
            print(json.dumps({"pass": made}), flush=True)
        engine.close()


if __name__ == "__main__":
    main()
