"""Are the figures true? labctl's against what they claim to be, on two GPUs, in one run.

    python tests/benchmarks/gpu_truth.py CHECKPOINT [--gpus 2] [--new-tokens 32] [--rounds 40] [--processes 3]

Each line gives labctl's figure, the reference, their ratio or difference, and the bound. References: the checkpoint's own
headers, torch's allocator, nvidia-smi, power sampled every 20 ms, and a bare transformers script with the same device map
(bare_generate.py, in processes of its own, by turns with labctl's). Eager decoding waits for the host: on a shared machine
its medians differ from process to process by more than the bound, so the fastest tenth of many short rounds is held against it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from report import Report  # beside this file

HERE = Path(__file__).parent
PROMPT = "Explain tensor parallelism in 5 bullet points."
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=40, help="measured rounds of each process")
    parser.add_argument("--processes", type=int, default=3, help="processes of each side")
    options = parser.parse_args()
    report = Report()
    used_before = used_mib()
    bare, records = [], []
    for _ in range(options.processes):  # by turns: a machine that drifts drifts for both
        bare.append(bare_script(options))
        records.append(labctl_run(options))
    record = records[0]
    check_throughput(report, records, bare)
    check_weights(report, record, options.checkpoint, options.gpus)
    check_peaks(report, record, bare)
    check_in_process(report, options, used_before)
    return report.end()


# ---------------------------------------------------------------- the two sides


def labctl_run(options: argparse.Namespace) -> dict[str, Any]:
    """One `labctl run` in a workspace of its own, and its record."""
    with tempfile.TemporaryDirectory(prefix="labctl-truth-") as folder:
        (Path(folder) / "labctl.toml").write_text(
            '[partitions.here]\nexecutor = "local"\ndevice = "cuda"\ndtype = "bfloat16"\n'
        )
        command = [
            sys.executable, "-c", "from labctl_orchestrator.cli import main; main()", "run", "-p", "here", "--ignore-eos",
            "--model-id", str(options.checkpoint.absolute()), "--gpus", str(options.gpus), "--prompt", PROMPT, "--raw-prompt",
            "--max-new-tokens", str(options.new_tokens), "--repeats", str(options.rounds),
        ]  # fmt: skip
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(folder).glob(".labctl/results/*/*.json")
        return dict(json.loads(path.read_text()))


def bare_script(options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "bare_generate.py"), str(options.checkpoint), PROMPT]
    command += [str(options.new_tokens), str(options.gpus), str(options.rounds)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


# ---------------------------------------------------------------- the checks


def output_tok_s(repeat: dict[str, Any]) -> float:
    return sum(len(sample["token_ids"]) for sample in repeat["samples"]) / float(repeat["wall_s"])


def check_throughput(report: Report, records: list[dict[str, Any]], bare: list[dict[str, Any]]) -> None:
    own = [[output_tok_s(repeat) for repeat in record["repeats"]] for record in records]
    reference = [run["tok_s"] for run in bare]
    print(f"medians of the processes, tok/s: labctl {medians(own)}, bare script {medians(reference)}")
    fastest, other = fastest_tenth([*chain(*own)]), fastest_tenth([*chain(*reference)])
    report.line("output_tok_s: a bare script, fastest tenth", f"{fastest:.2f}", f"{other:.2f}",
                f"{fastest / other:.4f} (within 2%)", abs(fastest / other - 1) <= 0.02)  # fmt: skip
    same = all(record["repeats"][0]["samples"][0]["token_ids"] == bare[0]["token_ids"] for record in records)
    report.line("token ids: the same as the bare script's", "", "", str(same), same)


def fastest_tenth(rates: list[float]) -> float:
    """The rate that one round in ten reaches: what the program does when the machine lets it."""
    return sorted(rates, reverse=True)[len(rates) // 10]


def medians(processes: list[list[float]]) -> str:
    return ", ".join(f"{statistics.median(rates):.2f}" for rates in processes)


def check_weights(report: Report, record: dict[str, Any], checkpoint: Path, gpus: int) -> None:
    expected = weights_by_gpu(checkpoint, gpus)
    for index, device in enumerate(record["repeats"][0]["devices"]):
        own, reference = device["weights_bytes"], expected[index]
        # Rotary frequencies are buffers that no checkpoint holds: a few hundred bytes on the first GPU.
        report.line(f"weights_bytes, GPU {index}: safetensors headers", str(own), str(reference),
                    f"{own - reference} B", 0 <= own - reference < 4096)  # fmt: skip


def weights_by_gpu(checkpoint: Path, gpus: int) -> list[int]:
    """Bytes of each GPU's tensors from the checkpoint's headers: embeddings first, norm and head last, layers in parts."""
    config = json.loads((checkpoint / "config.json").read_text())
    layers, tied = config["num_hidden_layers"], config.get("tie_word_embeddings", False)
    held = [0] * gpus
    for file in checkpoint.glob("*.safetensors"):
        with file.open("rb") as weights:
            header = json.loads(weights.read(int.from_bytes(weights.read(8), "little")))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            start, end = tensor["data_offsets"]
            if name.startswith("model.layers."):
                held[int(name.split(".")[2]) * gpus // layers] += end - start
            elif "embed_tokens" in name or (tied and "lm_head" in name):
                held[0] += end - start
            else:
                held[-1] += end - start
    return held


def check_peaks(report: Report, record: dict[str, Any], bare: list[dict[str, Any]]) -> None:
    for index, device in enumerate(record["repeats"][-1]["devices"]):
        own, reference = device["peak_allocated_bytes"], bare[0]["peak_allocated_bytes"][index]
        report.line(f"peak_allocated_bytes, GPU {index}: torch's", f"{own / MIB:.1f} MiB", f"{reference / MIB:.1f} MiB",
                    f"{(own - reference) / MIB:+.2f} MiB (within 1%)", abs(own / reference - 1) <= 0.01)  # fmt: skip


def check_in_process(report: Report, options: argparse.Namespace, used_before: list[float]) -> None:
    """In one process, on one loaded model, by turns: what the clock disturbs, and energy against sampled power."""
    from labctl_workers import hardware
    from labctl_workers.engines import make_engine
    from labctl_workers.engines.base import Arrivals, Generation, Request
    from labctl_workers.record import JobSpec, ModelRef

    job = JobSpec("truth", "here", "local", "hf", ModelRef("model", path=str(options.checkpoint)), "bfloat16", "cuda",
                  options.gpus, [], {}, raw_prompt=True)  # fmt: skip
    engine: Any = make_engine(job, Path(tempfile.mkdtemp()))
    engine.load()
    (prompt,) = engine.encode([PROMPT])
    requests = [Request(0, prompt, options.new_tokens)]
    inputs = engine.torch.tensor([prompt], device="cuda:0")
    how = Generation(Arrivals(1), ignore_eos=True)

    def with_clock() -> None:
        engine.generate(requests, how)()

    def without_clock() -> None:
        with engine.torch.inference_mode():
            engine.model.generate(inputs, attention_mask=engine.torch.ones_like(inputs))
        engine._synchronize()

    with_clock()
    rates: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(options.rounds // 4):  # ABBA: neither always comes first
        for name in ("with", "without", "without", "with"):
            rates[name].append(options.new_tokens / timed(with_clock if name == "with" else without_clock))
    print(
        f"medians in one process, tok/s: with the clock {medians([rates['with']])}, without {medians([rates['without']])}"
    )
    step_s = 1 / statistics.median(rates["without"])
    own = clock_cost_s(engine)
    report.line("the token clock, of a decoding step", f"{own * 1e6:.1f} us", f"{step_s * 1e3:.1f} ms",
                f"{own / step_s:.3%} (under 1%)", own / step_s < 0.01)  # fmt: skip
    gpus = hardware.visible_gpus()[: options.gpus]
    check_energy(report, gpus, with_clock)
    check_used(report, engine, used_before)


def clock_cost_s(engine: Any, tokens: int = 2000) -> float:
    """What the clock adds to a step, in seconds: fetching the step's token, which transformers does for a streamer alone, and
    reading the clock; the median, with nothing else for the GPU to do. Two whole runs cannot show so little."""
    from labctl_workers.engines.hf import TokenClock

    clock = TokenClock()
    token = engine.torch.ones(1, dtype=engine.torch.long, device=engine.devices()[-1])
    clock.put(token.cpu())
    costs = []
    for _ in range(tokens):
        engine._synchronize()
        started = time.perf_counter()
        clock.put(token.cpu())
        costs.append(time.perf_counter() - started)
    return statistics.median(costs)


def timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def check_energy(report: Report, gpus: Sequence[Any], work: Callable[[], None]) -> None:
    from labctl_workers import hardware

    sampler = PowerSampler([gpu.index for gpu in gpus])
    sampler.start()
    before, started = hardware.energy_j(gpus), time.perf_counter()
    while time.perf_counter() - started < 10:
        work()
    after, ended = hardware.energy_j(gpus), time.perf_counter()
    sampler.stop()
    assert before is not None
    assert after is not None
    own, reference = after - before, sampler.joules(started, ended)
    report.line(f"energy_j over {ended - started:.1f} s: sampled power", f"{own:.1f} J", f"{reference:.1f} J",
                f"{own / reference:.4f} (within 10%)", abs(own / reference - 1) <= 0.10)  # fmt: skip


class PowerSampler(threading.Thread):
    """Reads every GPU's power 50 times a second."""

    def __init__(self, indices: Sequence[int]) -> None:
        super().__init__(daemon=True)
        import pynvml

        pynvml.nvmlInit()
        self.nvml = pynvml
        self.handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in indices]
        self.readings: list[tuple[float, float]] = []
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            watts = sum(self.nvml.nvmlDeviceGetPowerUsage(handle) for handle in self.handles) / 1000
            self.readings.append((time.perf_counter(), watts))

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def joules(self, started: float, ended: float) -> float:
        """The trapezoid rule over the readings between the two times, stretched to the whole of it."""
        kept = [reading for reading in self.readings if started <= reading[0] <= ended]
        pairs = itertools.pairwise(kept)
        area = sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in pairs)
        return area * (ended - started) / (kept[-1][0] - kept[0][0])


def check_used(report: Report, engine: Any, before: list[float]) -> None:
    """The change since before anything was loaded, as labctl and as nvidia-smi see it, with the same model loaded."""
    for index, (memory, seen) in enumerate(zip(engine.memory(), used_mib(), strict=False)):
        own = memory.device_used_bytes / MIB - before[index]
        other = seen - before[index]
        report.line(f"device_used_bytes, change, GPU {index}: nvidia-smi", f"{own:.0f} MiB", f"{other:.0f} MiB",
                    f"{own - other:+.0f} MiB (within 50)", abs(own - other) <= 50)  # fmt: skip


def used_mib() -> list[float]:
    """nvidia-smi's memory.used of each GPU, in MiB."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(line) for line in done.stdout.split()]


if __name__ == "__main__":
    sys.exit(main())
