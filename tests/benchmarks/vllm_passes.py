"""Processes that make passes, of labctl's vLLM engine or of vLLM's own; and labctl's: a pass for each line of its input.

python tests/benchmarks/vllm_passes.py CHECKPOINT GPUS ENGINE_OPTIONS PROMPT BATCH ... < LINES OF "HOW BATCH TOKENS"

HOW, all on one engine that labctl loaded: `labctl` and `sampled` by labctl's loop; `generate` by the code of bare_vllm.py;
`counting` by `LLM.generate` with vLLM's statistics on, in the front end; `bench` by the code of `vllm bench throughput`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCES = [str(HERE.parent.parent / part) for part in ("workers", "")]
sys.path[:0] = SOURCES
MARK = '{"pass"'
CLOSES_WITHIN_S = 60.0
NEW_TOKENS = 128
SHORT_TOKENS = 8
# As labctl's jobs keep what is compiled.
KEPT_IN = {"VLLM_CACHE_ROOT": "vllm", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


def with_sources(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which a new Python finds this checkout's labctl."""
    return {**environment, "PYTHONPATH": os.pathsep.join([*SOURCES, environment.get("PYTHONPATH", "")])}


class Passing:
    """A process that makes passes; between them it and those that it started are stopped."""

    def __init__(self, command: Sequence[str], log: Path, cache: Path) -> None:
        self.log = log
        kept = {variable: str(cache / name) for variable, name in KEPT_IN.items()}
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

    @contextlib.contextmanager
    def turn(self) -> Iterator[Callable[[str, int, int], dict[str, Any]]]:
        """It runs, and makes the passes that it is given."""
        self._wake()
        yield self._run
        self.rest()

    def _run(self, how: str, batch: int, tokens: int) -> dict[str, Any]:
        """One pass: what it measured, and `output_tok_s` where it timed the whole."""
        assert self.started.stdin is not None
        self.started.stdin.write(f"{how} {batch} {tokens}\n")
        self.started.stdin.flush()
        measured: dict[str, Any] = self._answer()
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


class Sides:
    """The ways to make a pass on one engine that labctl loaded."""

    def __init__(self, engine: Any, checkpoint: str, prompt: str) -> None:
        self.engine = engine
        self.checkpoint = checkpoint
        (self.token_ids,) = engine.encode([prompt])
        self.prompt: Any = {"prompt_token_ids": list(self.token_ids)}

    def labctl(self, batch: int, tokens: int) -> dict[str, Any]:
        from labctl_workers.record import Sampling

        return self._measured(batch, tokens, Sampling())

    def sampled(self, batch: int, tokens: int) -> dict[str, Any]:
        from labctl_workers.record import Sampling

        return self._measured(batch, tokens, Sampling(temperature=1.0, seed=0))

    def _measured(self, batch: int, tokens: int, sampling: Any) -> dict[str, Any]:
        from labctl_workers.engines.base import Arrivals, Generation, Request

        requests = [Request(0, self.token_ids, tokens)] * batch
        started = time.perf_counter()
        answers = self.engine.generate(requests, Generation(Arrivals(batch), sampling, ignore_eos=True))
        took, given = time.perf_counter() - started, answers()
        return {
            "took_s": took,
            "ttft_s": statistics.median(a.token_times[0] - a.handed_at for a in given),
            "tpot_s": statistics.median(a.token_times[-1] - a.token_times[0] for a in given) / (tokens - 1),
            "engine_ttft_s": statistics.median(a.engine_ttft_s for a in given),
            "engine_tpot_s": statistics.median(a.engine_tpot_s for a in given),
            "token_ids": list(given[0].token_ids),
        }

    def generate(self, batch: int, tokens: int) -> dict[str, Any]:
        import bare_vllm  # beside this file

        made: dict[str, Any] = bare_vllm.generate(self.engine.llm, self.prompt, batch, tokens)
        return made

    def counting(self, batch: int, tokens: int) -> dict[str, Any]:
        self.engine.llm.llm_engine.log_stats = True  # labctl leaves them off in the front end
        try:
            return self.generate(batch, tokens)
        finally:
            self.engine.llm.llm_engine.log_stats = False

    def bench(self, batch: int, tokens: int) -> dict[str, Any]:
        """`vllm bench throughput`: its arguments, its requests, its clock; the engine is the one that is there."""
        import gc
        import tempfile

        from vllm import LLM
        from vllm.benchmarks import throughput
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        throughput.add_cli_args(parser)
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            arguments = parser.parse_args([
                "--model", self.checkpoint, "--dataset-name", "random", "--random-input-len", "32", "--random-output-len",
                str(tokens), "--random-range-ratio", "0", "--num-prompts", str(batch), "--disable-detokenize",
                "--max-model-len", "512", "--output-json", str(answer),
            ])  # fmt: skip
            usual, LLM.from_engine_args = LLM.from_engine_args, lambda _: self.engine.llm
            made = throughput.get_requests
            throughput.get_requests = lambda told, tokenizer: _as_token_ids(made(told, tokenizer), tokenizer)
            gc.freeze()  # what it imports need not be looked at in the middle of a pass
            try:
                throughput.main(arguments)
            finally:
                LLM.from_engine_args, throughput.get_requests = usual, made
            told = json.loads(answer.read_text())
        return {"took_s": batch / told["requests_per_second"], "token_ids": []}


def _as_token_ids(requests: Sequence[Any], tokenizer: Any) -> list[Any]:
    return [
        dataclasses.replace(request, prompt={"prompt_token_ids": list(tokenizer(request.prompt)["input_ids"])})
        for request in requests
    ]


def main() -> None:
    from labctl_workers import children
    from labctl_workers.engines import make_engine

    checkpoint, gpus, options, prompt, *batches = sys.argv[1:]
    job = job_of(checkpoint, int(gpus), prompt, [int(batch) for batch in batches], json.loads(options))
    with children.end_on_exit():
        engine = make_engine(job, Path(os.environ["VLLM_CACHE_ROOT"]).parent)
        engine.load()
        sides = Sides(engine, checkpoint, prompt)
        print(json.dumps({"pass": "ready"}), flush=True)
        for line in sys.stdin:
            how, batch, tokens = line.split()
            try:
                made = getattr(sides, how)(int(batch), int(tokens))
            except Exception as error:
                if how != "bench":
                    raise
                # Its own dependencies may be missing: the other references stand.
                print(
                    f"vllm bench throughput did not run: {type(error).__name__}: {error}", file=sys.stderr, flush=True
                )
                made = {"token_ids": []}
            print(json.dumps({"pass": made}), flush=True)
        engine.close()


if __name__ == "__main__":
    main()
