"""How fast `staged` generates on two GPUs, beside `hf`, the same by hand, and vLLM: one row a way, in one run.

    python tests/benchmarks/staged_speed.py FOLDER [--rows MODEL:WAY:BATCH[+BATCH...],...] [--prompt-tokens N] [--profile]

FOLDER holds the random checkpoints by model (tests/random_llama.py), which are made where they are missing. Each row is a
process of its own, printed as it ends; one that fails prints its traceback and the next one runs. Ways: `generate`
(transformers as a person writes it, bare_generate.py), `hf`, `captured` (staged with compile=false), `staged`, `vllm`, `vllm1`
(on one GPU); `warm` is staged again, with what the staged rows before it compiled; `float32` holds captured's tokens against
hf's in float32 at full dimensions.

`decode` is batch / tpot; `limit` is what the memory bandwidth of one GPU allows (stages follow one another); `equal` is the
share of the tokens of the first request that are those of the first row of the same model; `util` is NVML's, of each GPU;
`first s` is from the start of the engine to the first measured token. At the end: the ratios to hf and to vLLM of this run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SOURCES = [str(ROOT / part) for part in ("orchestrator", "slurm", "templates", "workers")]
PROMPT = "Explain tensor parallelism in 5."  # 32 bytes, a token each
NEW_TOKENS = 128
DEFAULT_ROWS = (
    "tinyllama:generate:1", "tinyllama:hf:1", "tinyllama:captured:1+64", "tinyllama:staged:1", "tinyllama:warm:1",
    "tinyllama:staged:64", "tinyllama:float32:1", "tinyllama:vllm:1+64",
)  # fmt: skip
RESULT = "RESULT "


def main() -> int:
    options = parsed(sys.argv[1:])
    if options.child:
        return child(options)
    rows = [row for row in (options.rows or ",".join(DEFAULT_ROWS)).split(",") if row]
    if options.rows is None and importlib.util.find_spec("vllm") is None:
        rows = [row for row in rows if ":vllm" not in row]
    for like in dict.fromkeys(checkpoint_of(row) for row in rows):
        make_checkpoint(options.folder / like, like)
    print(HEAD, flush=True)
    kept = options.cache or Path(tempfile.mkdtemp(prefix="labctl-cache-"))
    first_tokens: dict[str, list[int]] = {}
    figures: dict[str, dict[str, Any]] = {}
    failed = 0
    for row in rows:
        found = run_row(row, options, kept)
        failed += not found
        for name, own in found.items():
            print_row(name, own, first_tokens, options.json)
            figures[name] = own
    print_ratios(figures)
    return 1 if failed else 0


def print_ratios(figures: dict[str, dict[str, Any]]) -> None:
    """Of output tokens a second: what a user waits for."""
    rates = {row: found["output_tok_s"] for row, found in figures.items() if "output_tok_s" in found}
    for row, rate in rates.items():
        model, way, batch = row.split(":")
        against = [f"{model}:{other}:{batch}" for other in ("generate", "hf", "vllm1", "vllm")]
        told = [f"{rate / rates[name]:.2f} x {name}" for name in against if name in rates and name != row]
        if way in ("hf", "captured", "staged") and told:
            print(f"{row}: {', '.join(told)}", flush=True)
    for row in figures:
        model, way, batch = row.split(":")
        if way == "warm" and f"{model}:staged:{batch}" in figures:
            cold, warm = figures[f"{model}:staged:{batch}"]["first_s"], figures[row]["first_s"]
            print(
                f"{row}: first measured token after {warm:.1f} s, {warm / cold:.2f} of cold's {cold:.1f} s", flush=True
            )


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", help="of the list above, separated by commas")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=240, help="seconds a row may take")
    parser.add_argument("--cache", type=Path, help="where compiled code is kept  [default: a fresh folder: cold]")
    parser.add_argument("--attention", help="how one token attends: sdpa, matmul, reduce")
    parser.add_argument("--inductor", action="append", default=[], metavar="OPTION=VALUE", help="an option of inductor")
    parser.add_argument("--profile", action="store_true", help="print where a decode step's time goes, by kernel")
    parser.add_argument("--json", type=Path, help="append every row's figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.folder = options.folder.absolute()
    return options


def checkpoint_of(row: str) -> str:
    return row.partition(":")[0]


def make_checkpoint(folder: Path, like: str) -> None:
    if (folder / "tokenizer.json").exists():
        return
    started = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "tests" / "random_llama.py"), str(folder), "--like", like], check=True)
    print(f"made in {time.perf_counter() - started:.0f} s", flush=True)


HEAD = (
    f"{'row':<26} {'decode':>9} {'tok/s':>9} {'ttft ms':>8} {'tpot ms':>8} {'mbu':>6} {'limit':>8}"
    f" {'load s':>7} {'init s':>7} {'warm s':>7} {'first s':>7} {'peak GiB':>9} {'util %':>9} {'equal':>7}"
)


def run_row(row: str, options: argparse.Namespace, kept: Path) -> dict[str, dict[str, Any]]:
    """The row's figures by batch, from a process of its own; none, with what it printed, where it failed."""
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--cache", str(kept), "--child", row]
    try:
        done = subprocess.run(
            command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=options.timeout
        )
    except subprocess.TimeoutExpired as late:
        told = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        print(f"{row}: not done in {options.timeout:.0f} s\n{told[-3000:]}", flush=True)
        return {}
    lines = done.stdout.splitlines()
    results = [line.removeprefix(RESULT) for line in lines if line.startswith(RESULT)]
    told = "\n".join(line for line in lines if not line.startswith((RESULT, "Tensor/model", "HF device map")))
    if not results:
        print(f"{row}: exit status {done.returncode}\n{told[-6000:]}", flush=True)
        return {}
    if options.profile:
        print(told[-12000:], flush=True)
    return dict(json.loads(results[-1]))  # by row-batch


def print_row(row: str, found: dict[str, Any], first_tokens: dict[str, list[int]], json_file: Path | None) -> None:
    tokens = found.pop("token_ids", None)
    share = ""
    if tokens:
        reference = first_tokens.setdefault(checkpoint_of(row), tokens)
        share = f"{sum(a == b for a, b in zip(tokens, reference, strict=False)) / len(reference):.0%}"
    if json_file:
        with json_file.open("a") as file:
            file.write(json.dumps({"row": row, **found, "equal": share}) + "\n")
    if "told" in found:
        print(f"{row:<26} {found['told']}", flush=True)
        return
    util = "/".join(f"{value:.0f}" for value in found["util"])
    print(
        f"{row:<26} {found['decode_tok_s']:>9.1f} {found['output_tok_s']:>9.1f}"
        f" {1e3 * found['ttft_s']:>8.2f} {1e3 * found['tpot_s']:>8.3f} {found['mbu']:>6.1%} {found['limit_tok_s']:>8.0f}"
        f" {found['load_s']:>7.1f} {found['init_s']:>7.1f} {found['warmup_s']:>7.2f} {found['first_s']:>7.1f}"
        f" {found['peak_bytes'] / 2**30:>9.2f} {util:>9} {share:>7}",
        flush=True,
    )
    if found.get("stages"):
        print(f"{'':<26} {json.dumps(found['stages'])}", flush=True)


# ---------------------------------------------------------------- one row, in its own process


def child(options: argparse.Namespace) -> int:
    sys.path[:0] = [*SOURCES, str(ROOT)]
    model, way, asked = options.child.split(":")
    batches = [int(batch) for batch in asked.split("+")]
    checkpoint = options.folder / model
    try:
        if way == "float32":
            figures = [float32_tokens(checkpoint, options)]
        elif way.startswith("vllm"):
            figures = vllm_rows(checkpoint, batches, 1 if way == "vllm1" else options.gpus, options)
        elif way == "generate":
            figures = [generate_row(checkpoint, batch, options) for batch in batches]
        else:
            figures = labctl_rows(checkpoint, way, batches, options)
    except Exception:
        traceback.print_exc(file=sys.stdout)
        return 1
    found = {f"{model}:{way}:{batch}": own for batch, own in zip(batches, figures, strict=True)}
    print(RESULT + json.dumps(found), flush=True)
    return 0


def prompt_of(options: argparse.Namespace) -> str:
    """As many bytes as tokens are asked for: the checkpoints' tokenizer has a token for each."""
    repeated = PROMPT * (options.prompt_tokens // len(PROMPT) + 1)
    return repeated[: options.prompt_tokens]


def engine_of(
    checkpoint: Path, way: str, batches: Sequence[int], options: argparse.Namespace, dtype: str = "bfloat16"
) -> Any:
    import torch

    from labctl_workers.engines import make_engine
    from labctl_workers.engines.staged import compiling, stages
    from labctl_workers.record import JobSpec, ModelRef, RunSpec

    if options.attention:
        stages.DECODE_WITH[way != "captured"] = options.attention
    for setting in options.inductor:
        name, _, value = setting.partition("=")
        compiling.OPTIONS[name] = json.loads(value)
    runs = [
        RunSpec("r", {}, "p", options.new_tokens, batch_size=batch, ignore_eos=True, repeats=options.repeats)
        for batch in batches
    ]
    backend = "hf" if way == "hf" else "staged"
    job = JobSpec(
        "speed", "here", "local", backend, ModelRef("model", path=str(checkpoint)), dtype,
        "cuda" if torch.cuda.is_available() else "cpu", options.gpus, runs, {"p": [prompt_of(options)]},
        engine_options={"compile": False} if way == "captured" else {}, raw_prompt=True,
    )  # fmt: skip
    return make_engine(job, options.cache)


def labctl_rows(
    checkpoint: Path, way: str, batches: Sequence[int], options: argparse.Namespace
) -> list[dict[str, Any]]:
    engine = engine_of(checkpoint, way, batches, options)
    load_s, init_s = engine.load()
    found = []
    for run in engine.job.runs:
        own = labctl_row(engine, way, run, options)
        first_s = load_s + init_s + own["warmup_s"] + own["ttft_s"]
        found.append({"load_s": load_s, "init_s": init_s, "first_s": first_s, **own})
    return found


def labctl_row(engine: Any, way: str, run: Any, options: argparse.Namespace) -> dict[str, Any]:
    from labctl_workers import hardware, measure

    gpus, batch = hardware.visible_gpus()[: options.gpus], run.batch_size
    if way == "hf":
        run.repeats = min(2, run.repeats)
    with Utilization(options.gpus) as utilization:
        warmup_s, repeats = measure.measure_run(
            measure.Requests(engine, run, [prompt_of(options)]),
            gpus,
            measure.Watch(lambda phase: utilization.during(phase == "measuring")),
        )
    by_tpot = sorted(repeats, key=lambda repeat: measure.METRICS["tpot_s"].compute(repeat) or 0.0)
    best = by_tpot[len(repeats) // 2]
    metrics = measure.metrics_of(measure.Figures(best))
    told = engine.fingerprint().to_json()
    if options.profile and way != "hf":
        profile(engine, batch, options)
    bandwidth = best.memory_bandwidth_bytes_s or float("nan")
    return {
        "stages": told.get("stages"),
        "decode_tok_s": batch / metrics["tpot_s"],
        "limit_tok_s": batch * bandwidth / best.read_bytes_per_step,
        "warmup_s": warmup_s,
        "peak_bytes": max(device.peak_allocated_bytes or 0 for device in best.devices),
        "util": utilization.means(),
        "token_ids": best.samples[0].token_ids,
        "mbu": metrics["mbu"] or float("nan"),
        **{name: metrics[name] for name in ("output_tok_s", "ttft_s", "tpot_s")},
    }


class Utilization(threading.Thread):
    """NVML's share of the time in which a GPU had a kernel, read every 100 ms while the measured passes run."""

    def __init__(self, gpus: int) -> None:
        super().__init__(daemon=True)
        import pynvml

        self.nvml = pynvml
        self.handles = []
        with contextlib.suppress(pynvml.NVMLError):  # a trial on a machine without GPUs
            pynvml.nvmlInit()
            self.handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(gpus)]
        self.readings: list[list[int]] = []
        self.on = False
        self._ended = threading.Event()

    def __enter__(self) -> Utilization:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self.join()

    def during(self, on: bool) -> None:
        self.on = on

    def run(self) -> None:
        while not self._ended.wait(0.1):
            if self.on:
                self.readings.append([self.nvml.nvmlDeviceGetUtilizationRates(handle).gpu for handle in self.handles])

    def means(self) -> list[float]:
        later = self.readings[1:] or self.readings or [[0] * len(self.handles)]
        return [sum(column) / len(column) for column in zip(*later, strict=True)]


def generate_row(checkpoint: Path, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """bare_generate.py: transformers with the handout's device map, nothing of labctl."""
    command = [sys.executable, str(Path(__file__).parent / "bare_generate.py"), str(checkpoint), prompt_of(options)]
    command += [str(options.new_tokens), str(options.gpus), str(min(2, options.repeats)), str(batch)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    rate = sum(found["tok_s"]) / len(found["tok_s"])
    told = f"{rate:.1f} tok/s end to end, model.generate over the device map"
    return {"told": told, "token_ids": found["token_ids"], "output_tok_s": rate}


def float32_tokens(checkpoint: Path, options: argparse.Namespace) -> dict[str, Any]:
    """captured against hf in float32: one prompt, and eight of different lengths in a batch."""
    from labctl_workers.engines.base import Arrivals, Generation, Request

    prompts = [PROMPT, "a", "Hello", PROMPT * 2, "why?", "12345 67890", "the sky is blue", "ok ok ok"]
    given: dict[str, list[list[int]]] = {}
    for way in ("hf", "captured"):
        engine = engine_of(checkpoint, way, [1], options, "float32")
        engine.load()
        for batch in (1, 8):
            requests = [
                Request(index, token_ids, options.new_tokens) for index, token_ids in enumerate(engine.encode(prompts))
            ]
            answers = engine.generate(requests, Generation(Arrivals(batch), ignore_eos=True))()
            given[f"{way}-{batch}"] = [answer.token_ids for answer in answers]
        engine.close()
    reference = given["hf-1"]
    told = []
    for name, tokens in given.items():
        pairs = [
            (a, b) for mine, theirs in zip(tokens, reference, strict=True) for a, b in zip(mine, theirs, strict=True)
        ]
        told.append(f"{name}: {sum(a == b for a, b in pairs)} of {len(pairs)} tokens are hf-1's")
    return {"told": "; ".join(told)}


def vllm_rows(checkpoint: Path, batches: Sequence[int], gpus: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    from vllm import LLM

    started = time.perf_counter()
    llm = LLM(
        str(checkpoint), dtype="bfloat16", tensor_parallel_size=gpus, max_model_len=4096, max_num_seqs=256,
        enable_prefix_caching=False, disable_log_stats=False,
    )  # fmt: skip
    init_s = time.perf_counter() - started
    return [vllm_row(llm, batch, init_s, gpus, options) for batch in batches]


def vllm_row(llm: Any, batch: int, init_s: float, gpus: int, options: argparse.Namespace) -> dict[str, Any]:
    from vllm import SamplingParams, TokensPrompt

    wanted = SamplingParams(temperature=0, max_tokens=options.new_tokens, ignore_eos=True)
    ids = llm.get_tokenizer()(prompt_of(options))["input_ids"]
    prompts = [TokensPrompt(prompt_token_ids=ids) for _ in range(batch)]
    found = []
    for _ in range(options.repeats + 1):
        started = time.perf_counter()
        outputs = llm.generate(prompts, wanted, use_tqdm=False)
        wall_s = time.perf_counter() - started
        stats = [output.metrics for output in outputs]
        gaps = [(m.last_token_ts - m.first_token_ts) / (options.new_tokens - 1) for m in stats]
        ttfts = [m.first_token_latency for m in stats]
        found.append((wall_s, sorted(gaps)[len(gaps) // 2], sorted(ttfts)[len(ttfts) // 2]))
    wall_s, tpot_s, ttft_s = sorted(found[1:])[len(found[1:]) // 2]
    rate = batch * options.new_tokens / wall_s
    told = (
        f"decode {batch / tpot_s:.1f} tok/s, {rate:.1f} end to end, tpot {1e3 * tpot_s:.3f} ms, ttft {1e3 * ttft_s:.2f} ms,"
        f" start {init_s:.0f} s, tensor parallel {gpus}"
    )
    tokens = list(outputs[0].outputs[0].token_ids)
    return {"told": told, "token_ids": tokens, "decode_tok_s": batch / tpot_s, "output_tok_s": rate}


# ---------------------------------------------------------------- where the time goes


def profile(engine: Any, batch: int, options: argparse.Namespace) -> None:
    """Kernels of the decode steps by device: microseconds a step, calls a step, and what of the step they fill."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from labctl_workers.engines.base import Arrivals, Generation, Request

    new_tokens = options.new_tokens
    (prompt,) = engine.encode([prompt_of(options)])
    requests, firsts = ([Request(0, prompt, length)] * batch for length in (new_tokens, 1))
    how = Generation(Arrivals(batch), ignore_eos=True)
    one_s, many_s = 0.0, 0.0
    started = time.perf_counter()
    engine.generate(requests, how)
    many_s = time.perf_counter() - started
    started = time.perf_counter()
    engine.generate(firsts, how)
    one_s = time.perf_counter() - started
    steps = new_tokens - 1
    with profiled(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        engine.generate(requests, how)
    totals: dict[tuple[int, str], list[float]] = {}
    for event in seen.events():
        if str(event.device_type).endswith("CUDA"):
            total = totals.setdefault((event.device_index, event.name), [0, 0.0])
            total[0] += 1
            total[1] += event.time_range.elapsed_us()
    step_us = 1e6 * (many_s - one_s) / steps
    print(f"batch {batch}: the prompts take {1e3 * one_s:.1f} ms, a step {step_us:.0f} us, without the profiler;")
    print(f"kernels of {new_tokens} tokens, the prompts' included:")
    for device in sorted({device for device, _ in totals}):
        own = sorted(((n, us, name) for (d, name), (n, us) in totals.items() if d == device), key=lambda row: -row[1])
        busy = sum(us for _, us, _ in own) / steps
        print(f"GPU {device}: {busy:.0f} us a step in {sum(n for n, _, _ in own) / steps:.0f} kernels and copies")
        for count, us, name in own[:24]:
            print(f"  {us / steps:>8.1f} us {count / steps:>7.1f} calls {us / count:>7.2f} us each  {name[:110]}")


if __name__ == "__main__":
    sys.exit(main())
