"""Are labctl's figures of a served vLLM those of `vllm bench serve`? On two GPUs, in one command, by turns.

    python tests/benchmarks/served_truth.py FOLDER [--model tinyllama] [--seconds 560] [--parts turns tune client offline]

FOLDER keeps a model (dimensions of --model, vLLM's dummy weights) and its workspace. The parts, in this order:

- turns: `labctl submit --serve` with all lengths and concurrencies in one job, and `vllm bench serve` with the same loads against
  a `vllm serve` of its own, which has the command line of labctl's server and another port. A pass of labctl's is followed by
  one by hand. By hand, prompts are texts of random tokens, and answers have no token ids: vLLM's client has no other form. With
  `--token-ids` both are token ids, as labctl's. The client by hand imports vLLM once, and not before each pass.
- tune: `labctl tune` at the first lengths, to within 5%. Its levels: 0.5 s for the 99th percentile of ttft, and for the 90th of
  tpot three times that of a single request. `vllm bench serve` then sends 10% less and 10% more than the rate it found, to the
  server by hand.
- client: labctl's load generator alone against a stand-in server (tests/fake_server.py) that streams a token at a time and
  computes nothing: requests a second that it cannot exceed, whatever the server.
- offline: the same runs without a server, and their throughput beside that of served runs: the cost of serving.

What does not fit into --seconds is left out and named. Intervals are 95%, of the mean logarithm of the pairs' ratios, with the
spread of pairs pooled over all loads. `--cpu`: a tiny model, short lengths and low concurrencies on the CPU, to show that the
command works; figures mean nothing. The exit status is 1 where a part failed or was left out, or a ratio's interval excludes
everything within 3% of 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SOURCES = [str(ROOT / part) for part in ("orchestrator", "slurm", "templates", "workers")]
sys.path[:0] = [*SOURCES, str(ROOT)]
LABCTL = (sys.executable, "-c", "from labctl_orchestrator.cli import main; main()")
PARTS = ("turns", "tune", "client", "offline")
NEEDED_S = {"turns": 60, "tune": 150, "client": 35, "offline": 90}  # with less left, a part does not begin
TURNS_SHARE = 0.62  # of --seconds, where other parts follow
BOUND = 0.03
METRICS = ("output_tok_s", "ttft_s", "tpot_s")
KEY = "by-hand"
STUBS, STUBBED_IN_FLIGHT, STUBBED_TOKENS = 8, 64, 40_000
BUSY = 0.8  # share of the window from which the client is the bottleneck, as labctl's note
TTFT_P99_S, TPOT_FACTOR = 0.5, 3.0


@dataclass(frozen=True)
class Load:
    """One load: `requests` of `input_len` and `output_len` tokens, `concurrency` of them at a time."""

    input_len: int
    output_len: int
    concurrency: int
    requests: int

    def __str__(self) -> str:
        return f"{self.input_len}/{self.output_len} at {self.concurrency}"


@dataclass
class Options:
    folder: Path
    model: str
    seconds: int
    parts: list[str]
    repeats: int
    gpus: int
    cpu: bool
    token_ids: bool
    deadline: float = 0.0
    failed: list[str] = field(default_factory=list)

    @property
    def workspace(self) -> Path:
        return self.folder / f"{self.model}-workspace"

    @property
    def checkpoint(self) -> Path:
        return self.folder / self.model

    @property
    def left_s(self) -> int:
        return int(self.deadline - time.monotonic())


def main() -> int:
    if sys.argv[1:2] == ["--by-hand"]:
        return bench_by_hand()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = parsed()
    options.workspace.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("VLLM_CACHE_ROOT", str(options.folder / "cache"))
    kv_bytes = write_model(options)
    if options.cpu:
        (options.workspace / "labctl.toml").write_text('[partitions.local]\ndevice = "cpu"\n', encoding="utf-8")
    with contextlib.ExitStack() as ended:
        hand = Hand(options)
        ended.callback(hand.end)
        for part in options.parts:
            if options.left_s < NEEDED_S[part]:
                options.failed.append(f"{part} (no time left)")
                continue
            started = time.monotonic()
            PART_OF[part](options, hand, kv_bytes)
            print(f"{part}: {time.monotonic() - started:.0f} s, {options.left_s} s left", flush=True)
    print(f"not measured, or failed: {'; '.join(options.failed) or 'nothing'}")
    return 1 if options.failed else 0


def parsed() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="tinyllama", help="dimensions of tests/random_llama.py")
    parser.add_argument("--seconds", type=int, default=560)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--repeats", type=int, default=2, help="passes of each load and side")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--token-ids", action="store_true", help="by hand: prompts and answers as token ids too")
    given = parser.parse_args()
    options = Options(
        folder=given.folder.absolute(),
        model="small" if given.cpu else given.model,
        seconds=given.seconds,
        parts=[part for part in PARTS if part in given.parts],
        repeats=given.repeats,
        gpus=1 if given.cpu else given.gpus,
        cpu=given.cpu,
        token_ids=given.token_ids,
    )
    options.deadline = time.monotonic() + options.seconds - 10
    return options


def loads_of(options: Options) -> list[Load]:
    lengths = ((32, 8), (8, 32)) if options.cpu else ((1024, 128), (128, 1024))
    concurrencies = (1, 4) if options.cpu else (1, 16, 64, 256)
    return [
        Load(*both, at, max(at * (2 if both[0] > both[1] else 1), 16 * min(both) // both[1] or 2))
        for both in lengths
        for at in concurrencies
    ]


def write_model(options: Options) -> int:
    """Configuration and tokenizer, with a file of no weights; returns bytes of keys and values, a GPU, for the largest load."""
    import tokenizers
    import transformers

    from tests.random_llama import DIMENSIONS

    hidden, intermediate, layers, heads, kv_heads, vocabulary, others = DIMENSIONS[options.model]
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2,
        **others,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(options.checkpoint)
    (options.checkpoint / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    # A word for each token of the model: texts of random tokens, which `vllm bench serve` sends, have exact lengths.
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>"])}
    words |= {f"w{number}": number for number in range(3, vocabulary)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(options.checkpoint)
    tokens = max(load.concurrency * (load.input_len + load.output_len + 32) for load in loads_of(options))
    per_token = 2 * layers * kv_heads * (hidden // heads) * (4 if options.cpu else 2)
    return max(2**28, int(1.2 * tokens * per_token / options.gpus))


# ---------------------------------------------------------------- labctl


def environment(**more: str) -> dict[str, str]:
    paths = [*SOURCES, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LABCTL_NO_PREFLIGHT": "1", **more}


def labctl(options: Options, *arguments: str, timeout: float | None = None) -> tuple[int, str]:
    """(Exit status, standard output); after the time limit 124, with the jobs cancelled."""
    try:
        done = subprocess.run(
            [*LABCTL, *arguments], cwd=options.workspace, env=environment(), check=False, text=True, timeout=timeout,
            stdout=subprocess.PIPE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        labctl(options, "cancel", "--yes")
        return 124, ""
    return done.returncode, done.stdout


def common_flags(options: Options, kv_bytes: int) -> list[str]:
    engine = {
        "load_format": "dummy",
        "kv_cache_memory_bytes": kv_bytes,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
    }
    if not options.cpu:  # two servers share the GPUs
        engine["gpu_memory_utilization"] = 0.4
    flags = ["-p", "local", "--backend", "vllm", "--model-id", str(options.checkpoint), "--warmup", "0",
             "--gpus", str(options.gpus), "--dtype", "float32" if options.cpu else "bfloat16",
             "--time", "24:00:00"]  # fmt: skip  # all runs in one job; this script ends it
    return flags + [word for name, value in engine.items() for word in ("--engine-option", f"{name}={value}")]


def write_submission(
    options: Options, name: str, *, serve: bool, repeats: int, loads: Sequence[Load] | None = None
) -> str:
    lines = [f'name = "{name}"', f"repeats = {repeats}"]
    for load in loads or loads_of(options):
        lines += ["[[cells]]", f'lengths = "{load.input_len}/{load.output_len}"', f"batch_size = {load.concurrency}",
                  f"requests = {load.requests}", f"serve = {str(serve).lower()}"]  # fmt: skip
    (options.workspace / f"{name}.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{name}.toml"


def figures_of(options: Options, *, served: bool) -> dict[Load, list[dict[str, float]]]:
    """labctl's own figures of each repeat, by load."""
    if not (options.workspace / ".labctl").exists():
        return {}
    columns = "input_len, output_len, batch_size, requests, output_tok_s, ttft_s, tpot_s, requests_s, client_busy_share"
    query = f"SELECT {columns} FROM measured_repeats WHERE request_rate IS NULL AND served = {int(served)}"
    found: dict[Load, list[dict[str, float]]] = {}
    for row in json.loads(labctl(options, "query", f"{query} ORDER BY started_at, repeat", "--json")[1] or "[]"):
        shape = (int(row.pop("input_len")), int(row.pop("output_len")), row.pop("batch_size"), row.pop("requests"))
        found.setdefault(Load(*shape), []).append(row)
    return found


def server_command(options: Options) -> list[str] | None:
    """The command of the server that labctl's latest job started, from the job's log."""
    logs = sorted(options.workspace.glob(".labctl/**/*.err"), key=lambda path: path.stat().st_mtime, reverse=True)
    logs += sorted(options.workspace.glob(".labctl/**/*.out"), key=lambda path: path.stat().st_mtime, reverse=True)
    for log in logs:
        if found := re.search(r"^server: (\S*python\S* -m .*)$", log.read_text(errors="replace"), re.MULTILINE):
            return shlex.split(found[1])
    return None


# ---------------------------------------------------------------- by hand


class Hand:
    """A server by hand, and `vllm bench serve` in a process that makes a pass for each line of its input."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.server: subprocess.Popen[bytes] | None = None
        self.bench: subprocess.Popen[str] | None = None
        self.port = 0
        self.log = options.workspace / "by-hand.log"

    def start(self, command: Sequence[str], *, own_cache: bool) -> None:
        """With the arguments of labctl's server. Servers that start at the same time must not share a compile cache."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        words = [*command]
        words[words.index("--port") + 1] = str(self.port)
        print(f"server by hand: {shlex.join(words)}", flush=True)
        variables = {"VLLM_API_KEY": KEY, "VLLM_NO_USAGE_STATS": "1"}
        if own_cache:
            variables["VLLM_CACHE_ROOT"] = str(self.options.folder / "cache-by-hand")
        if self.options.cpu:
            variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with self.log.open("wb") as log:
            self.server = subprocess.Popen(
                words, env=environment(**variables), stdout=log, stderr=log, start_new_session=True
            )
            self.bench = subprocess.Popen(
                [sys.executable, "-u", __file__, "--by-hand", *(["--token-ids"] if self.options.token_ids else [])],
                env=environment(OPENAI_API_KEY=KEY), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip

    def wait(self) -> bool:
        """Until both are ready; whether they are."""
        while self.options.left_s > 0 and self.server is not None and self.server.poll() is None:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5),
            ):
                return self.answer() == "ready"
            time.sleep(0.3)
        print(f"server by hand did not start: see {self.log}\n{self.log.read_text(errors='replace')[-3000:]}")
        return False

    def answer(self) -> str:
        assert self.bench is not None
        assert self.bench.stdout is not None
        return self.bench.stdout.readline().strip()

    def measure(self, load: Load, seed: int, rate: float | None = None) -> dict[str, Any]:
        """The JSON of one pass of `vllm bench serve`, with the same names and units as labctl's figures."""
        assert self.bench is not None
        assert self.bench.stdin is not None
        result = self.options.workspace / "by-hand.json"
        words = ["--backend", "openai", "--base-url", f"http://127.0.0.1:{self.port}", "--endpoint", "/v1/completions",
                 "--model", "labctl", "--tokenizer", str(self.options.checkpoint), "--dataset-name", "random",
                 "--random-input-len", str(load.input_len), "--random-output-len", str(load.output_len),
                 "--num-prompts", str(load.requests), "--seed", str(seed), "--ignore-eos", "--temperature", "0",
                 "--save-result", "--save-detailed", "--result-filename", str(result), "--disable-tqdm",
                 "--ready-check-timeout-sec", "0"]  # fmt: skip
        if self.options.token_ids:
            words += ["--extra-body", '{"return_token_ids": true}']
        words += ["--request-rate", str(rate)] if rate else ["--max-concurrency", str(load.concurrency)]
        self.bench.stdin.write(json.dumps(words) + "\n")
        self.bench.stdin.flush()
        if (said := self.answer()) != "done":
            raise RuntimeError(f"vllm bench serve: {said or 'ended'}; see {self.log}")
        found: dict[str, Any] = json.loads(result.read_text())
        if found.get("failed"):
            raise RuntimeError(f"vllm bench serve: {found['failed']} requests failed; see {self.log}")
        tokens = [sum(found["input_lens"]) / load.requests, sum(found["output_lens"]) / load.requests]
        if tokens != [load.input_len, load.output_len]:
            print(f"     by hand, tokens a request: {tokens[0]:.2f} in, {tokens[1]:.2f} out, not {load}", flush=True)
        return found | {
            "output_tok_s": found["output_throughput"],
            "ttft_s": found["median_ttft_ms"] / 1000,
            "tpot_s": found["median_tpot_ms"] / 1000,
        }

    def end(self) -> None:
        for process in (self.bench, self.server):
            if process is not None:
                end_group(process)


def end_group(process: subprocess.Popen[Any]) -> None:
    """SIGTERM, then SIGKILL, to the process and those of its group."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(8)


def bench_by_hand() -> int:
    """The process that makes the passes by hand: the `main` of `vllm bench serve`, with the arguments of each line."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm.benchmarks import serve

    if "--token-ids" in sys.argv:
        serve.get_samples = with_token_ids(serve.get_samples)
    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    print("ready", file=channel, flush=True)
    for line in sys.stdin:
        try:
            serve.main(parser.parse_known_args(json.loads(line))[0])  # a version may lack one
        except (Exception, SystemExit) as error:
            print(f"{type(error).__name__}: {error}".replace("\n", " "), file=channel, flush=True)
        else:
            print("done", file=channel, flush=True)
    return 0


def with_token_ids(get_samples: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's requests, with prompts as token ids."""

    def samples(arguments: Any, tokenizer: Any) -> Any:
        made = get_samples(arguments, tokenizer)
        for one in made:
            one.prompt = tokenizer(one.prompt)["input_ids"]
        return made

    return samples


# ---------------------------------------------------------------- by turns


def turns(options: Options, hand: Hand, kv_bytes: int) -> None:
    folder = options.workspace / "turns"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    file = write_submission(options, "served", serve=True, repeats=options.repeats)
    command = [*LABCTL, "submit", file, *common_flags(options, kv_bytes), "--again", "--wait"]
    paths = [str(Path(__file__).parent / "turns"), *SOURCES, *filter(None, [os.environ.get("PYTHONPATH")])]
    own = environment(SERVED_TURNS=str(folder), PYTHONPATH=os.pathsep.join(paths))
    until = time.monotonic() + (options.left_s if len(options.parts) == 1 else TURNS_SHARE * options.seconds)
    by_hand: dict[Load, list[dict[str, Any]]] = {}
    asked_at = time.time()
    submitted = subprocess.Popen(command, cwd=options.workspace, env=own)
    try:
        while server_command_since(options, asked_at) is None:
            if submitted.poll() is not None or time.monotonic() > until:
                options.failed.append("turns (labctl's server was not started)")
                return
            time.sleep(0.3)
        hand.start(server_command_since(options, asked_at) or [], own_cache=True)
        if not hand.wait():
            options.failed.append("turns (server by hand)")
            return
        for number, load in passes(folder, submitted, until):
            began = time.monotonic()
            figures = hand.measure(load, seed=number)
            by_hand.setdefault(load, []).append(figures)
            wall_s = json.loads((folder / f"{number}.done").read_text())["wall_s"]
            own_rate = load.requests * load.output_len / wall_s
            print(f"{load!s:<18} labctl {own_rate:>9,.1f} tok/s, by hand {figures['output_tok_s']:>9,.1f} tok/s, ratio"
                  f" {own_rate / figures['output_tok_s']:.3f}; ttft by hand {1e3 * figures['ttft_s']:.1f} ms, tpot"
                  f" {1e3 * figures['tpot_s']:.2f} ms ({time.monotonic() - began:.0f} s)", flush=True)  # fmt: skip
    finally:
        if submitted.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                submitted.wait(
                    20 if all(len(by_hand.get(load, ())) == options.repeats for load in loads_of(options)) else 0
                )
        if submitted.poll() is None:
            labctl(options, "cancel", "--yes")
            submitted.kill()
    compare(options, by_hand)


def server_command_since(options: Options, asked_at: float) -> list[str] | None:
    """`server_command`, of a job whose log is newer."""
    logs = [path for path in options.workspace.glob(".labctl/**/*.err") if path.stat().st_mtime > asked_at]
    return server_command(options) if logs else None


def passes(folder: Path, submitted: subprocess.Popen[bytes], until: float) -> Iterator[tuple[int, Load]]:
    """Each pass of labctl's, when it has ended; the next one waits until this iterator goes on."""
    number = 0
    while True:
        number += 1
        asked = folder / f"{number}.asked"
        while not asked.exists():
            if submitted.poll() is not None or time.monotonic() > until:
                return
            time.sleep(0.02)
        if time.monotonic() > until:
            return
        (folder / f"{number}.go").touch()
        while not (folder / f"{number}.done").exists():
            if submitted.poll() is not None:
                return
            time.sleep(0.02)
        yield number, Load(**json.loads(asked.read_text()))


def compare(options: Options, by_hand: Mapping[Load, list[dict[str, Any]]]) -> None:
    """A line for each load and metric; then all loads together."""
    own = figures_of(options, served=True)
    logs: dict[str, dict[Load, list[float]]] = {metric: {} for metric in METRICS}
    print(f"{'':<18} {'labctl':>36} {'by hand':>30}")
    print(
        f"{'':<18} {'tok/s':>10} {'ttft ms':>9} {'tpot ms':>9} {'busy':>5} {'tok/s':>10} {'ttft ms':>9} {'tpot ms':>9}"
    )
    for load in loads_of(options):
        pairs = list(zip(own.get(load, ())[-len(by_hand.get(load, ())) :], by_hand.get(load, ()), strict=False))
        if len(pairs) < options.repeats:
            options.failed.append(f"turns {load}: {len(pairs)} of {options.repeats} pairs")
        for metric in METRICS:
            if pairs:
                logs[metric][load] = [math.log(mine[metric] / theirs[metric]) for mine, theirs in pairs]
        if pairs:
            means = [
                [statistics.fmean(side[metric] for side in sides) for metric in METRICS]
                for sides in zip(*pairs, strict=True)
            ]
            busy = statistics.fmean(mine["client_busy_share"] for mine, _ in pairs)
            (rate, ttft, tpot), (other_rate, other_ttft, other_tpot) = means
            print(f"{load!s:<18} {rate:>10,.1f} {1e3 * ttft:>9.1f} {1e3 * tpot:>9.2f} {busy:>5.0%}"
                  f" {other_rate:>10,.1f} {1e3 * other_ttft:>9.1f} {1e3 * other_tpot:>9.2f}")  # fmt: skip
    for metric in METRICS:
        ratios(options, metric, logs[metric])


def ratios(options: Options, metric: str, logs: Mapping[Load, list[float]]) -> None:
    from labctl_orchestrator.analysis.intervals import t_975

    df = sum(len(values) - 1 for values in logs.values())
    if not logs or not df:
        print(f"{metric}: too few pairs for an interval")
        return
    pooled = sum((len(values) - 1) * statistics.variance(values) for values in logs.values() if len(values) > 1) / df
    every = [value for values in logs.values() for value in values]
    loads = {str(load): values for load, values in logs.items()}
    for name, values in [*loads.items(), ("all loads", every)]:
        half = t_975(df) * math.sqrt(pooled / len(values))
        ratio, low, high = (math.exp(statistics.fmean(values) + by) for by in (0, -half, half))
        holds = low <= 1 + BOUND and high >= 1 - BOUND
        if not holds and not options.cpu:
            options.failed.append(f"{metric} {name}: {ratio:.3f} is more than {BOUND:.0%} off")
        said = "" if holds else f", more than {BOUND:.0%} off"
        print(
            f"{metric:<13} {name:<18} labctl / by hand {ratio:.3f} (95% {low:.3f}-{high:.3f}; {len(values)} pairs{said})"
        )


# ---------------------------------------------------------------- tune


def tune(options: Options, hand: Hand, kv_bytes: int) -> None:
    """`labctl tune`, and its rate checked by hand."""
    first, *others = loads_of(options)
    fullest = [load for load in others if load.input_len == first.input_len][-1]
    served = figures_of(options, served=True)
    if not {first, fullest} <= served.keys():
        file = write_submission(options, "first", serve=True, repeats=1, loads=[first, fullest])
        labctl(options, "submit", file, *common_flags(options, kv_bytes), "--wait", timeout=options.left_s)
        served = figures_of(options, served=True)
    if not {first, fullest} <= served.keys():
        options.failed.append("tune (no served run says which rates to try)")
        return
    most = max(row["requests_s"] for row in served[fullest])
    slower = 10 if options.cpu else 1
    tpot_s = slower * TPOT_FACTOR * min(row["tpot_s"] for row in served[first])
    limits = {"ttft": (0.99, slower * TTFT_P99_S), "tpot": (0.9, float(f"{tpot_s:.2g}"))}
    levels = [f"{name}_p{100 * share:g}<{1000 * limit:g}ms" for name, (share, limit) in limits.items()]
    low, high = 0.3 * most, 1.3 * most
    requests = max(20, min(800, round(most * (5 if options.cpu else 20))))
    flags = [
        "tune", *common_flags(options, kv_bytes), "--lengths", f"{first.input_len}/{first.output_len}", "--requests",
        str(requests), "--repeats", "1", "--request-rate", f"{low:.3g}", "--request-rate", f"{high:.3g}", "--step", "0.05",
        "--json", *(word for level in levels for word in ("--slo", level)),
    ]  # fmt: skip
    print(f"labctl tune: {low:.3g} to {high:.3g} requests/s, {requests} requests, {', '.join(levels)}", flush=True)
    status, said = labctl(options, *flags, timeout=max(30, options.left_s - 15))
    try:
        (found,) = json.loads(said)
    except ValueError:
        options.failed.append(f"tune (exit status {status})")
        return
    for one in found["measured"]:
        print(
            f"  {one['request_rate']:.4g} requests/s: {'meets' if one['meets'] else 'does not meet'} them", flush=True
        )
    print(f"labctl tune: highest {found['highest']}, next {found['next']}", flush=True)
    if not found["highest"]:
        options.failed.append("tune (no rate of the range meets the levels)")
        return
    if hand.server is None:
        hand.start(server_command(options) or [], own_cache=False)
        if not hand.wait():
            options.failed.append("tune (server by hand)")
            return
    for factor, wanted in ((0.9, True), (1.1, False)):
        if options.left_s < 2 * requests / found["highest"]:
            options.failed.append(f"tune: check at {factor} (no time left)")
            continue
        rate = factor * found["highest"]
        load = Load(first.input_len, first.output_len, 0, requests)
        met, text = within(limits, hand.measure(load, seed=1, rate=rate))
        print(
            f"  by hand, {rate:.4g} requests/s ({factor - 1:+.0%}): {text}: {'meets' if met else 'does not meet'} them",
            flush=True,
        )
        if met != wanted and not options.cpu:
            options.failed.append(f"tune: {factor - 1:+.0%} by hand {'meets' if met else 'does not meet'} the levels")


def within(limits: Mapping[str, tuple[float, float]], figures: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether a pass by hand is within (percentile, seconds) of each latency, and what it has there."""
    from labctl_workers.measure import percentile

    of = {"ttft": figures["ttfts"], "tpot": [sum(gaps) / len(gaps) for gaps in figures["itls"] if gaps]}
    reached = {name: percentile(of[name], share) for name, (share, _) in limits.items()}
    text = ", ".join(f"{name} p{100 * limits[name][0]:g} {1e3 * value:.1f} ms" for name, value in reached.items())
    return all(value <= limits[name][1] for name, value in reached.items()), text


# ---------------------------------------------------------------- the client's limit


def client(options: Options, hand: Hand, kv_bytes: int) -> None:
    from labctl_workers.servers.base import ClientProcess, free_port

    port = free_port()
    command = [sys.executable, "-m", "tests.fake_server", str(port)]
    variables = {"FAKE_SERVER_KEY": KEY, "PYTHONPATH": os.pathsep.join([str(ROOT), environment()["PYTHONPATH"]])}
    stubs = [
        subprocess.Popen(command, env=environment(**variables), start_new_session=True)
        for _ in range(2 if options.cpu else STUBS)
    ]
    process = ClientProcess(KEY)
    try:
        process.expect("ready", lambda: None)
        for input_len, output_len in dict.fromkeys((load.input_len, load.output_len) for load in loads_of(options)):
            requests = max(2 * STUBBED_IN_FLIGHT, STUBBED_TOKENS // output_len)
            for count in (STUBBED_IN_FLIGHT, requests):  # the first pass warms up
                rate, busy = stubbed(options, process, port, input_len, output_len, count)
            least = "" if busy >= BUSY else "at least "
            said = f"{least}{rate:,.1f} requests/s, {rate * output_len:,.0f} tok/s, busy {busy:.0%}"
            print(f"labctl's client, {input_len}/{output_len}, {STUBBED_IN_FLIGHT} in flight, against {len(stubs)} processes of a"
                  f" stand-in server: {said}", flush=True)  # fmt: skip
    finally:
        process.close()
        for stub in stubs:
            end_group(stub)


def stubbed(
    options: Options, process: Any, port: int, input_len: int, output_len: int, count: int
) -> tuple[float, float]:
    """(Requests a second, busy share) of one load against the stand-in server."""
    from dataclasses import asdict

    from labctl_workers.servers import client as driver

    body = {"temperature": 0.0, "ignore_eos": True, "stop_token_ids": [], "return_token_ids": True}
    load = driver.Load(
        base_url=f"http://127.0.0.1:{port}", model="fake",
        prompts=[[7] * input_len] * count, prompt_tokens=[input_len] * count, max_tokens=[output_len] * count,
        bodies=[body] * count, folder=str(options.workspace), concurrency=STUBBED_IN_FLIGHT,
    )  # fmt: skip
    process.send(json.dumps(asdict(load)))
    process.expect("ready", lambda: None)
    process.send("go")
    for word in ("ended", "done"):
        process.expect(word, lambda: None)
    outcome = driver.read_outcome(options.workspace)
    if failed := [answer.error for answer in outcome.answers if answer.error]:
        raise RuntimeError(f"stand-in server: {len(failed)} requests failed: {failed[0]}")
    return count / outcome.wall_s, outcome.busy_s / outcome.wall_s


# ---------------------------------------------------------------- offline


def offline(options: Options, hand: Hand, kv_bytes: int) -> None:
    hand.end()
    file = write_submission(options, "offline", serve=False, repeats=1)
    status, _ = labctl(options, "submit", file, *common_flags(options, kv_bytes), "--wait", timeout=options.left_s)
    served, without = (figures_of(options, served=served) for served in (True, False))
    print("cost of serving: throughput of served runs / offline")
    for load in loads_of(options):
        if load not in without or load not in served:
            options.failed.append(f"offline {load}" + (f" (exit status {status})" if status else ""))
            continue
        sides = [statistics.geometric_mean(row["output_tok_s"] for row in of[load]) for of in (served, without)]
        ttfts = [1e3 * statistics.fmean(row["ttft_s"] for row in of[load]) for of in (served, without)]
        print(f"{load!s:<18} served {sides[0]:>9,.1f} tok/s, offline {sides[1]:>9,.1f} tok/s, ratio {sides[0] / sides[1]:.3f};"
              f" ttft {ttfts[0]:.1f} and {ttfts[1]:.1f} ms", flush=True)  # fmt: skip
    print(labctl(options, "compare", "served", "offline", "--by", "served")[1])


PART_OF: dict[str, Callable[[Options, Hand, int], None]] = {
    "turns": turns, "tune": tune, "client": client, "offline": offline,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
