"""What telemetry costs: the CPU time of the sampler's thread, in a small and in a large worker.

    python tests/benchmarks/telemetry_cost.py [CHECKPOINT] [--backend hf] [--gpus 0] [--pairs 30] [--new-tokens 48]

With a checkpoint also passes of a backend, by turns with and without the thread: the ratio of the times (with / without) over
the pairs with its 95% interval, in wall time and in CPU time of the process. With --gpus the thread samples NVML too.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "workers"))

from labctl_workers import hardware, telemetry
from labctl_workers.engines import make_engine
from labctl_workers.engines.base import Generation, Request
from labctl_workers.measure import arrivals_of
from labctl_workers.record import JobSpec, ModelRef, RunSpec

T_975 = {5: 2.571, 10: 2.228, 20: 2.086, 30: 2.042, 40: 2.021}  # quantiles of Student's t


class TimedSampler(telemetry.TelemetrySampler):
    """Adds up the CPU time of its samples."""

    cpu_s = wall_s = 0.0
    samples = 0

    def sample(self) -> None:
        cpu, wall = time.thread_time(), time.perf_counter()
        super().sample()
        self.cpu_s += time.thread_time() - cpu
        self.wall_s += time.perf_counter() - wall
        self.samples += 1


def thread_alone(processes: int, threads: int, seconds: float = 15.0) -> None:
    """Sample a worker with so many child processes and further threads, which do nothing."""
    children = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(processes)]
    ended = threading.Event()
    for _ in range(threads):
        threading.Thread(target=ended.wait, daemon=True).start()
    sampler = TimedSampler(())
    started = time.perf_counter()
    sampler.start()
    time.sleep(seconds)
    sampler.stop()
    share = sampler.cpu_s / (time.perf_counter() - started)
    print(f"{processes} child processes, {threads} more threads: {sampler.samples} samples,"
          f" {sampler.cpu_s / sampler.samples * 1000:.2f} ms CPU each, {share:.3%} of one CPU", flush=True)  # fmt: skip
    ended.set()
    for child in children:
        child.kill()
        child.wait()


def by_turns(options: argparse.Namespace) -> None:
    pairs, new_tokens, gpus = options.pairs, options.new_tokens, options.gpus
    run = RunSpec("cost", {}, "prompts", new_tokens, ignore_eos=True)
    prompts = {"prompts": ["Explain tensor parallelism in 5 bullet points."]}
    job = JobSpec(
        "cost.0", "here", "local", options.backend, ModelRef("cost", path=options.checkpoint),
        "bfloat16" if gpus else "float32", "cuda" if gpus else "cpu", gpus, [run], prompts,
        parallel="tensor" if options.backend == "vllm" else "layers",
    )  # fmt: skip
    engine = make_engine(job, Path(options.checkpoint))
    engine.load()
    visible = hardware.visible_gpus()[:gpus] if gpus else []
    requests = [Request(0, engine.encode(prompts["prompts"])[0], new_tokens)]

    def one_pass() -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        engine.generate(requests, Generation(arrivals_of(run, 1, 0), run.sampling, ignore_eos=True))()
        return time.perf_counter() - wall, time.process_time() - cpu

    one_pass()
    ratios: list[tuple[float, float]] = []
    cpu_s = wall_s = sampled_s = 0.0
    samples = 0
    for pair in range(pairs):
        took: dict[bool, tuple[float, float]] = {}
        for sampled in (True, False) if pair % 2 else (False, True):
            if not sampled:
                took[sampled] = one_pass()
                continue
            sampler = TimedSampler(visible)
            sampler.start()
            took[sampled] = one_pass()
            sampler.stop()
            cpu_s, wall_s, samples = cpu_s + sampler.cpu_s, wall_s + sampler.wall_s, samples + sampler.samples
            sampled_s += took[sampled][0]
        ratios.append((math.log(took[True][0] / took[False][0]), math.log(took[True][1] / took[False][1])))
    for name, logs in zip(("wall time", "CPU time"), zip(*ratios, strict=True), strict=True):
        print(f"{name}, with / without over {pairs} pairs of {sampled_s / pairs:.2f} s: {_interval(logs)}")
    print(f"the thread: {samples} samples in {sampled_s:.1f} s, {cpu_s / samples * 1000:.2f} ms CPU each,"
          f" {cpu_s / sampled_s:.3%} of the time; {wall_s / samples * 1000:.2f} ms from start to end")  # fmt: skip
    engine.close()


def _interval(logs: Sequence[float]) -> str:
    t = T_975.get(len(logs) - len(logs) % 5, 2.0)
    mean, half = statistics.fmean(logs), t * statistics.stdev(logs) / math.sqrt(len(logs))
    return f"{math.exp(mean):.4f} ({math.exp(mean - half):.4f}-{math.exp(mean + half):.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--backend", default="hf", choices=("hf", "vllm"))
    parser.add_argument("--gpus", type=int, default=0, help="0: the CPU")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--new-tokens", type=int, default=48)
    options = parser.parse_args()
    thread_alone(0, 0)
    thread_alone(8, 100)
    if options.checkpoint:
        by_turns(options)


if __name__ == "__main__":
    main()
