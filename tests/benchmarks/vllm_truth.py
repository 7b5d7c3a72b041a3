"""Are labctl's figures of vLLM those of vLLM? On two GPUs, in one run, against vLLM by itself.

    python tests/benchmarks/vllm_truth.py CHECKPOINT [--gpus 2] [--batches 1 64 256] [--only starts turns script]

Each line gives labctl's figure, the reference, their ratio, and the bound. References: on one loaded engine, by turns with
labctl's loop, vLLM's own `LLM.generate` and the code of `vllm bench throughput`; and a script on vLLM's API alone (bare_vllm.py),
in a process and with an engine of its own, by turns with one of labctl's. Then: whether a second start finds what the first one
compiled (in vLLM's own log) and how much sooner it is ready, what of each GPU's memory is not accounted for, and whether any is
in use afterwards.

vLLM's statistics, which its offline API leaves off by default, cost time at every step. So the references run without them:
their time per output token is what a pass of 128 tokens takes longer than one of 8, by the 120 tokens between. On the one engine
they run with them too, for the figures that vLLM gives itself: the time to the first token is judged, that per token is told.
The script times each step of vLLM's instead. That labctl's engines pass as fast as the script's by the script's own code is told.

Where engines take turns, all of them hold a share of the GPUs' memory, run on the same few CPU cores, and those that wait are
stopped. One start of an engine differs from the next of the same kind by some percent, in all its passes (of three that compiled
at the same time, by 8%; what is compiled is chosen by timing it): so the first of a kind compiles alone, the others take that,
and there are --engines of each. How vLLM says that it is set up is compared. The line tells the ratio of each pair of engines,
and the interval holds for any engines.

What ran by turns is passes of 32 prompt and 128 new tokens, and for the time to the first token, which no later token changes,
many short ones. On a shared machine one pass differs from one of a minute later by a tenth and more, from the next one by less:
judged are the ratios of passes that followed one another, by the mean of their middle half, with its 95% interval (bootstrap).
Passes are made until every interval is as narrow as the bound, or --seconds are over. `vllm bench throughput` samples at
temperature 1, and so does labctl beside it. Its prompts are given as token ids, as labctl's are; with its own prompts, which are
text, the tokenizer is within its time: that is told, not judged. The checkpoint is made (TinyLlama's dimensions, random weights)
where the folder does not exist.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pairs import Comparison, Passes, median_of, ratio_of, settled  # these are beside this file
from report import Report
from vllm_passes import HERE, NEW_TOKENS, Passing, job_of, loaded, measured_pass, with_sources

MIB = 2**20
PROMPT = "Explain tensor parallelism now!!"  # 32 bytes: 32 tokens of random_llama's tokenizer
PARTS = ("starts", "turns", "script")
# What vLLM's versions say when what they compiled before is there.
CACHE_HIT = re.compile(
    r"Directly load (?:the \S+ graph|the compiled graph|AOT compilation)|reusing? (?:the )?cached", re.I
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument(
        "--seconds", type=float, default=120, help="of each kind of passes by turns, at the most, for each batch"
    )
    parser.add_argument("--engines", type=int, default=2, help="of each kind that take turns")
    parser.add_argument("--cores", type=int, default=8, help="that they run on")
    parser.add_argument("--logs", type=Path, help="where the logs are kept (default: a temporary folder)")
    options = parser.parse_args()
    folder = options.logs or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    if not options.checkpoint.exists():
        subprocess.run([sys.executable, str(HERE.parent / "random_llama.py"), str(options.checkpoint)], check=True)
    report = Report()
    if "starts" in options.only:
        two_starts(report, options, folder)
    if "turns" in options.only:
        by_turns(report, options, folder)
    if "script" in options.only:
        against_the_script(report, options, folder)
    return report.end()


def two_starts(report: Report, options: argparse.Namespace, folder: Path) -> None:
    """Two jobs of labctl's worker, one after the other, with the same compile cache."""
    context = context_bytes(options.gpus)
    before = used_bytes(options.gpus)
    print(
        f"CUDA context: {[c // MIB for c in context]} MiB; in use before: {[u // MIB for u in before]} MiB", flush=True
    )
    first = labctl(options, folder, "first")
    second = labctl(options, folder, "second", by_uuid=True)
    left_over(report, before, options.gpus)
    starts(report, folder, first, second)
    memory(report, second, before, context)


# ---------------------------------------------------------------- labctl


def labctl(options: argparse.Namespace, folder: Path, name: str, *, by_uuid: bool = False) -> dict[str, Any]:
    """One job of labctl's worker over all batches; its records by run."""
    from labctl_workers.record import write_json

    job = job_of(str(options.checkpoint.absolute()), options.gpus, PROMPT, options.batches)
    spec = folder / ".labctl" / "batches" / name / "0.json"
    write_json(spec, job.to_json())
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": uuids(options.gpus)} if by_uuid else {})}
    run_logged(
        [sys.executable, "-u", "-m", "labctl_workers.job", str(spec)], folder / f"labctl-{name}.log", environment
    )
    records = {}
    for run in job.runs:
        (file,) = [f for f in (folder / ".labctl" / "results" / run.run_id).glob("*.json") if ours(f, name, folder)]
        records[run.run_id] = json.loads(file.read_text())
        if records[run.run_id]["status"] != "done":
            raise SystemExit(f"{name}: {records[run.run_id]['failure']['message']}; see {folder}/labctl-{name}.log")
    return records


def ours(file: Path, name: str, folder: Path) -> bool:
    attempts = {path.stem for path in (folder / ".labctl" / "batches" / name / "attempts").glob("*.json")}
    return file.stem in attempts


# ---------------------------------------------------------------- two series of passes


METRICS = ("output_tok_s", "ttft_s", "tpot_s")
BOUND = 0.03
SHORT_TOKENS = 8
SHORT_PASSES = 4  # a round
FEWEST_ROUNDS = 25
ON_ITS_WAY_S = 0.001  # from vLLM's core to the front end
COMPARED: tuple[Comparison, ...] = (
    ("labctl", "vllm", "LLM.generate", ("output_tok_s", "tpot_s")),
    ("labctl, short", "vllm with statistics, short", "LLM.generate", ("ttft_s",)),
    ("sampled", "bench", "vllm bench throughput", ("output_tok_s",)),
)
TOLD: tuple[Comparison, ...] = (
    ("labctl", "vllm with statistics", "LLM.generate, counting", ("output_tok_s", "tpot_s")),
)
# Rounds: those are there for one figure alone, and the last is told, not judged.
EVERY = {"sampled": 2, "bench": 2, "bench with text": 9}


@dataclasses.dataclass(frozen=True)
class Turn:
    """Passes that one kind of engine makes in a round."""

    kind: str
    how: str
    tokens: int = NEW_TOKENS
    passes: int = 1


ROUND = {
    "labctl": Turn("labctl", "labctl"),
    "script": Turn("script", "generate"),
    "script's code, labctl's engine": Turn("labctl", "generate"),
    "labctl, short": Turn("labctl", "labctl", SHORT_TOKENS, SHORT_PASSES),
    "script, short": Turn("script", "generate", SHORT_TOKENS, SHORT_PASSES),
    "script by steps, short": Turn("script", "steps", SHORT_TOKENS, SHORT_PASSES),
}
COMPARED_SCRIPT: tuple[Comparison, ...] = (
    ("labctl", "script", "the script", ("output_tok_s", "tpot_s")),
    ("labctl, short", "script by steps, short", "the script", ("ttft_s",)),
)
TOLD_SCRIPT: tuple[Comparison, ...] = (
    ("script's code, labctl's engine", "script", "both by the script", ("output_tok_s",)),
    ("labctl", "script's code, labctl's engine", "both on labctl's", ("output_tok_s",)),
)
# Of the GPUs' memory, for all engines that take turns; keys and values of 256 requests of TinyLlama take 0.5 GiB a GPU.
SHARED, KV_CACHE_BYTES = 0.78, 2**30


# ---------------------------------------------------------------- references


def engines(options: argparse.Namespace, folder: Path, ended: contextlib.ExitStack) -> dict[str, list[Passing]]:
    """labctl's and the script's, so many of each kind, as processes that make passes; they are ended with `ended`."""
    memory = {"gpu_memory_utilization": SHARED / (2 * options.engines), "kv_cache_memory_bytes": KV_CACHE_BYTES}
    checkpoint, batches = str(options.checkpoint), map(str, options.batches)
    own = [str(HERE / "vllm_passes.py"), checkpoint, str(options.gpus), json.dumps(memory), PROMPT, *batches]

    told = {"tensor_parallel_size": options.gpus, "max_model_len": 512, **memory}
    script = [str(HERE / "bare_vllm.py"), checkpoint, json.dumps(told), json.dumps(token_ids(options.checkpoint))]
    commands = {"labctl": own, "script": script}
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    started: dict[str, list[Passing]] = {name: [] for name in commands}
    for names in (["labctl"], ["script"], [*commands] * (options.engines - 1)):
        new = []
        for name in names:
            log = folder / f"{name}-{len(started[name])}.log"
            new.append(Passing(commands[name], log, folder / f"compiled-{name}"))
            started[name].append(new[-1])
            ended.callback(new[-1].end)
        for engine in new:
            engine.ready(cores)
        for engine in new:  # now, lest one waits for the GPUs of another
            engine.rest()
    return started


def token_ids(checkpoint: Path) -> list[int]:
    from labctl_workers.engines.text import Text

    return list(Text(str(checkpoint), None, raw_prompt=True).encode([PROMPT])[0].token_ids)


# ---------------------------------------------------------------- checks


def by_turns(report: Report, options: argparse.Namespace, folder: Path) -> None:
    """labctl's loop and vLLM's own on one engine, in one process, by turns."""
    log, cache = folder / "turns.log", folder / ".labctl" / "cache" / "here"
    arguments = [
        str(options.checkpoint),
        str(options.gpus),
        str(cache),
        str(options.seconds),
        *map(str, options.batches),
    ]
    run_logged([sys.executable, str(HERE / "vllm_truth.py"), "--turns", *arguments], log, os.environ)
    lines = log.read_text(errors="replace").splitlines()
    told = {t["turns"]: t for t in (json.loads(line) for line in lines if line.startswith('{"turns"'))}
    for batch, figures in told.items():
        held_against(report, batch, figures, COMPARED)
        held_against(report, batch, figures, TOLD, judged=False)
        if figures.get("bench with text"):
            medians = [median_of(figures[name], "output_tok_s") for name in ("sampled", "bench with text")]
            report.line(f"output_tok_s, batch {batch}: bench, text prompts", *(f"{median:,.5g}" for median in medians),
                        f"{medians[0] / medians[1]:.3f} (its tokenizer timed too)", True)  # fmt: skip
        same = figures["same"]
        report.line(
            f"tokens, batch {batch}: LLM.generate's", f"{same:.1%}", "", "of the answers", same == 1.0 or batch > 1
        )
        for metric in METRICS[1:]:  # the same requests by two clocks: no noise is between them
            clocks = figures[metric], figures[f"engine_{metric}"]
            apart = abs(clocks[0] - clocks[1])
            ok = apart <= max(BOUND * clocks[1], ON_ITS_WAY_S if metric == "ttft_s" else 0.0)
            said = f"{clocks[0] / clocks[1]:.3f} (within {BOUND:.0%}, or the ms on its way from the core)"
            report.line(f"{metric}, batch {batch}: vLLM's core", *(f"{clock:,.5g}" for clock in clocks), said, ok)


def held_against(
    report: Report, batch: int, figures: Any, compared: Sequence[Comparison], *, judged: bool = True, engines: int = 1
) -> None:
    """A line for each comparison; of several engines of a kind, whose passes lie in turn, the ratio of each pair besides."""
    for own, reference, what, metrics in compared:
        for metric in metrics if reference in figures else ():
            ratio, low, high = ratio_of(figures[own], figures[reference], metric, engines)
            bound = f"within {BOUND:.0%}" if judged else "told, not judged"
            said = f"{ratio:.3f} ({bound}; 95% interval {low:.3f} to {high:.3f}; {len(figures[own])} passes each)"
            if engines > 1:
                each = (
                    ratio_of(figures[own][i::engines], figures[reference][i::engines], metric)[0]
                    for i in range(engines)
                )
                said += f", engine by engine {' '.join(f'{pair:.3f}' for pair in each)}"
            medians = (f"{median_of(figures[name], metric):,.5g}" for name in (own, reference))
            report.line(f"{metric}, batch {batch}: {what}", *medians, said, not judged or abs(ratio - 1) <= BOUND)


def turns(arguments: Sequence[str]) -> None:
    """In a process of its own: figures of both, by turns, as a JSON line for each batch."""
    from labctl_workers import children

    checkpoint, gpus, cache, seconds, *numbers = arguments
    batches = [int(number) for number in numbers]
    with children.none_left():
        engine = loaded(job_of(checkpoint, int(gpus), PROMPT, batches), Path(cache))
        for batch in batches:
            sides = sides_of(engine, checkpoint, batch)
            try:
                sides["bench"]()
            except Exception as error:  # its own dependencies may be missing: the other references stand
                print(f"vllm bench throughput did not run: {type(error).__name__}: {error}", flush=True)
                del sides["bench"], sides["bench with text"], sides["sampled"]
            told = rounds(sides, batch, float(seconds)) | own_words(engine, sides["labctl"])
            print(json.dumps({"turns": batch, **told}), flush=True)
        engine.close()


Side = Callable[[], tuple[dict[str, float], Any]]  # what a pass measured, and the token ids of its answers


def sides_of(engine: Any, checkpoint: str, batch: int) -> dict[str, Side]:
    from vllm import SamplingParams

    from labctl_workers.record import Sampling

    (request,) = engine.encode([PROMPT])
    prompt: Any = {"prompt_token_ids": list(request.token_ids)}

    def reference(tokens: int, *, with_statistics: bool) -> tuple[dict[str, float], Any]:
        theirs = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        engine.llm.llm_engine.log_stats = with_statistics  # labctl leaves them off
        started = time.perf_counter()
        outputs = engine.llm.generate([prompt] * batch, theirs, use_tqdm=False)
        took = time.perf_counter() - started
        measured = {"took_s": took, "output_tok_s": batch * tokens / took}
        engine.llm.llm_engine.log_stats = False
        if with_statistics:
            told = [output.metrics for output in outputs]
            measured["ttft_s"] = statistics.median(m.first_token_latency for m in told)
            measured["tpot_s"] = statistics.median(m.last_token_ts - m.first_token_ts for m in told) / (tokens - 1)
        return measured, [list(output.outputs[0].token_ids) for output in outputs]

    return {
        "labctl": lambda: measured_pass(engine, request, batch, NEW_TOKENS),
        "vllm": lambda: reference(NEW_TOKENS, with_statistics=False),
        "vllm with statistics": lambda: reference(NEW_TOKENS, with_statistics=True),
        "labctl, short": lambda: measured_pass(engine, request, batch, SHORT_TOKENS),
        "vllm, short": lambda: reference(SHORT_TOKENS, with_statistics=False),
        "vllm with statistics, short": lambda: reference(SHORT_TOKENS, with_statistics=True),
        "sampled": lambda: measured_pass(engine, request, batch, NEW_TOKENS, Sampling(temperature=1.0, seed=0)),
        "bench": lambda: bench(engine.llm, checkpoint, batch, as_text=False),
        "bench with text": lambda: bench(engine.llm, checkpoint, batch, as_text=True),
    }


def rounds(sides: dict[str, Side], batch: int, seconds: float) -> dict[str, Any]:
    """The passes of each side, and the share of the answers that are the same; the first round warms up."""
    figures: dict[str, Passes] = {name: [] for name in sides}
    same = pairs = 0
    started = time.perf_counter()
    for number in itertools.count():
        answers: dict[str, list[list[int]]] = {}
        names = [name for name in sides if number % EVERY.get(name, 1) == 0]
        names += [name for name in sides if name.endswith(", short")] * (SHORT_PASSES - 1)
        for name in names[:: 1 if number % 2 else -1]:  # there and back again, so that none always comes first
            measured, answers[name] = sides[name]()
            figures[name] += [measured] if number else []
        if number:
            figures["vllm"][-1]["tpot_s"] = tpot_of(figures["vllm"][-1:], figures["vllm, short"][-SHORT_PASSES:])
        same += sum(a == b for a, b in zip(answers["labctl"], answers["vllm"], strict=True))
        pairs += batch
        enough = number and number % FEWEST_ROUNDS == 0 and settled(figures, COMPARED, BOUND)
        if enough or (number > 1 and time.perf_counter() - started > seconds):
            break
    return {"same": same / pairs, **figures}


def tpot_of(long: Passes, short: Passes) -> float:
    """Seconds a token more takes, by the clock around whole passes."""
    return (median_of(long, "took_s") - median_of(short, "took_s")) / (NEW_TOKENS - SHORT_TOKENS)


def own_words(engine: Any, own: Any) -> dict[str, float]:
    """Times as labctl measures them, and as vLLM does, of the same requests."""
    kept: list[Any] = []
    generate = engine.generate

    def keeping(*arguments: Any, **named: Any) -> Any:
        answers = generate(*arguments, **named)
        return lambda: kept.extend(answers()) or kept

    engine.generate = keeping
    own()
    engine.generate = generate
    gaps = NEW_TOKENS - 1
    return {
        "ttft_s": statistics.median(a.token_times[0] - a.handed_at for a in kept),
        "engine_ttft_s": statistics.median(a.engine_ttft_s for a in kept),
        "tpot_s": statistics.median((a.token_times[-1] - a.token_times[0]) / gaps for a in kept),
        "engine_tpot_s": statistics.median(a.engine_tpot_s for a in kept),
    }


def bench(llm: Any, checkpoint: str, batch: int, *, as_text: bool) -> tuple[dict[str, float], Any]:
    """Output tokens a second by the code of `vllm bench throughput`, with the engine that is loaded already."""
    from vllm import LLM
    from vllm.benchmarks import throughput
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    throughput.add_cli_args(parser)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        arguments = parser.parse_args([
            "--model", checkpoint, "--dataset-name", "random", "--random-input-len", "32", "--random-output-len",
            str(NEW_TOKENS), "--random-range-ratio", "0", "--num-prompts", str(batch), "--disable-detokenize",
            "--max-model-len", "512", "--output-json", str(answer),
        ])  # fmt: skip
        usual, LLM.from_engine_args = LLM.from_engine_args, lambda arguments: llm
        made = throughput.get_requests
        if not as_text:
            throughput.get_requests = lambda arguments, tokenizer: as_token_ids(made(arguments, tokenizer), tokenizer)
        try:
            throughput.main(arguments)
        finally:
            LLM.from_engine_args, throughput.get_requests = usual, made
        return {"output_tok_s": json.loads(answer.read_text())["requests_per_second"] * NEW_TOKENS}, []


def as_token_ids(requests: Sequence[Any], tokenizer: Any) -> list[Any]:
    return [
        dataclasses.replace(request, prompt={"prompt_token_ids": list(tokenizer(request.prompt)["input_ids"])})
        for request in requests
    ]


def against_the_script(report: Report, options: argparse.Namespace, folder: Path) -> None:
    started = time.perf_counter()
    with contextlib.ExitStack() as ended:
        of_kinds = engines(options, folder, ended)
        print(f"     {2 * options.engines} engines ready: {time.perf_counter() - started:.0f} s", flush=True)
        print(
            f"     set up differently: {set_up_differently(*(of_kinds[name][0].log for name in of_kinds))}", flush=True
        )
        for batch in options.batches:
            figures, same = rounds_of_engines(of_kinds, batch, options.seconds)
            with (folder / "script.jsonl").open("a") as file:
                print(json.dumps({"batch": batch, **figures}), file=file)
            held_against(report, batch, figures, COMPARED_SCRIPT, engines=options.engines)
            held_against(report, batch, figures, TOLD_SCRIPT, judged=False, engines=options.engines)
            what = f"tokens, batch {batch}: the script's"
            report.line(what, "", "", "the same" if same else "others", same or batch > 1)


def rounds_of_engines(of_kinds: dict[str, list[Passing]], batch: int, seconds: float) -> tuple[dict[str, Passes], bool]:
    """The passes of each kind of engine, long and short, engine by engine, and whether their answers are the same; the first
    round warms up."""
    figures: dict[str, Passes] = {name: [] for name in ROUND}
    engines = len(of_kinds["script"])
    started, answers = time.perf_counter(), set()
    for number in itertools.count():
        for side_by_side in order_of(number):
            for engine in range(engines):
                for name in side_by_side:
                    turn = ROUND[name]
                    made = of_kinds[turn.kind][engine].run(turn.how, batch, turn.tokens)
                    token_ids = tuple(made.pop("token_ids"))
                    answers |= {token_ids} if turn.tokens == NEW_TOKENS else set()
                    figures[name] += [made] if number else []
        for engine in range(engines) if number else ():
            short = figures["script, short"][-SHORT_PASSES * engines :][engine::engines]
            long = figures["script"][engine - engines]
            long["tpot_s"] = tpot_of([long], short)
        enough = number and number % FEWEST_ROUNDS == 0 and settled(figures, COMPARED_SCRIPT, BOUND)
        if enough or (number and time.perf_counter() - started > seconds):
            break
    return figures, len(answers) == 1


def order_of(number: int) -> list[list[str]]:
    """The passes of a round: those that are held against each other follow one another, there and back again by turns, so that
    none always comes first."""
    by_length = (
        [name for name, turn in ROUND.items() if turn.tokens == tokens] for tokens in (NEW_TOKENS, SHORT_TOKENS)
    )
    long, short = (names[:: 1 if number % 2 else -1] for names in by_length)
    return [long, *[short] * SHORT_PASSES]


SETTING = re.compile(r"(?<=, )(\w+)=(.*?)(?=, \w+=|\Z)")
SET_UP = re.compile(r"Initializing a V1 LLM engine .* with config: (.*)")


def set_up_differently(*logs: Path) -> dict[str, list[str]]:
    """The settings that vLLM tells in two logs, where they differ."""
    told = []
    for log in logs:
        found = SET_UP.search(log.read_text(errors="replace"))
        told.append(dict(SETTING.findall(", " + found[1])) if found else {})
    return {
        name: [settings.get(name, "") for settings in told] for name in told[0] if told[0][name] != told[1].get(name)
    }


def starts(report: Report, folder: Path, first: dict[str, Any], second: dict[str, Any]) -> None:
    cold, warm = (next(iter(records.values())) for records in (first, second))
    for name, record in (("first", cold), ("second", warm)):
        parts = {part: round(seconds, 1) for part, seconds in record["fingerprint"]["startup"].items()}
        print(f"{name} start: load_s {record['load_s']:.1f}, init_s {record['init_s']:.1f}, parts {parts}", flush=True)
    hits = CACHE_HIT.findall((folder / "labctl-second.log").read_text(errors="replace"))
    missed = not CACHE_HIT.search((folder / "labctl-first.log").read_text(errors="replace"))
    report.line(
        "the second start finds what was compiled", f"{len(hits)} hits", "", "in vLLM's own log", bool(hits) and missed
    )
    ratio = warm["init_s"] / cold["init_s"]
    report.line("init_s, second start / first", f"{warm['init_s']:.1f}", f"{cold['init_s']:.1f}", f"{ratio:.2f} (at most 0.7)",
                ratio <= 0.7)  # fmt: skip


def memory(report: Report, own: dict[str, Any], before: Sequence[int], context: Sequence[int]) -> None:
    """NVML's change of each GPU against what its worker reports and the bare context."""
    devices = next(iter(own.values()))["repeats"][-1]["devices"]
    for index, device in enumerate(devices):
        change = device["device_used_bytes"] - before[index]
        told = device["peak_reserved_bytes"] + context[index]
        rest, bound = abs(change - told), max(0.03 * change, 300 * MIB)
        report.line(f"memory of GPU {index}: change by NVML, accounted for", f"{change / MIB:,.0f} MiB", f"{told / MIB:,.0f} MiB",
                    f"rest {rest / MIB:.0f} MiB (at most {bound / MIB:.0f})", rest <= bound)  # fmt: skip
        parts = {name: f"{(device[name] or 0) / MIB:,.0f} MiB" for name in ("weights_bytes", "kv_cache_reserved_bytes")}
        print(f"     of it {parts}", flush=True)


def left_over(report: Report, before: Sequence[int], gpus: int) -> None:
    time.sleep(2)
    rest = max(now - then for now, then in zip(used_bytes(gpus), before, strict=True))
    report.line("memory in use after the jobs", f"{rest / MIB:.0f} MiB", "", "more than before", rest < 50 * MIB)


# ---------------------------------------------------------------- the machine


def run_logged(command: Sequence[str], log: Path, environment: Any, *, check: bool = True) -> None:
    started = time.perf_counter()
    with log.open("w") as file:
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=with_sources(environment), check=False
        )
    print(f"     {log.name}: {time.perf_counter() - started:.0f} s", flush=True)
    if check and done.returncode:
        print("\n".join(log.read_text(errors="replace").splitlines()[-25:]))
        raise SystemExit(f"{' '.join(command[:4])} ended with {done.returncode}: see {log}")


def used_bytes(gpus: int) -> list[int]:
    from labctl_workers import hardware

    return [hardware.used_bytes(gpu.uuid) or 0 for gpu in hardware.visible_gpus()[:gpus]]


def uuids(gpus: int) -> str:
    from labctl_workers import hardware

    return ",".join(gpu.uuid for gpu in hardware.visible_gpus()[:gpus])


CONTEXT = """
import json, sys, torch
sys.path.insert(0, sys.argv[2])
import vllm_truth
before = vllm_truth.used_bytes(int(sys.argv[1]))
held = [torch.ones(1, device=f"cuda:{i}") + 1 for i in range(int(sys.argv[1]))]
after = vllm_truth.used_bytes(int(sys.argv[1]))
print(json.dumps([a - b - torch.cuda.memory_reserved(i) for i, (a, b) in enumerate(zip(after, before))]))
"""


def context_bytes(gpus: int) -> list[int]:
    """What a process that has done no more than one addition on each GPU takes there, beside torch's own memory."""
    command = [sys.executable, "-c", CONTEXT, str(gpus), str(HERE)]
    answer: list[int] = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    )
    return answer


if __name__ == "__main__":
    sys.exit(turns(sys.argv[2:]) if sys.argv[1:2] == ["--turns"] else main())
