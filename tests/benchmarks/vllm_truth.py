"""Are labctl's figures of vLLM those of vLLM? On two GPUs, in one run, against vLLM by itself.

    python tests/benchmarks/vllm_truth.py CHECKPOINT [--gpus 2] [--batches 1 64 256] [--seconds 600] [--only starts passes]

Each line gives labctl's figure, the reference, their ratio, and the bound. First two jobs of labctl's, one after the other:
whether the second finds what the first one compiled (in vLLM's own log) and how much sooner it is ready, what of each GPU's
memory is not accounted for, and whether any is in use afterwards. Then passes, by turns:

- of labctl's loop, of vLLM's own `LLM.generate`, and of the code of `vllm bench throughput`, on engines that labctl loaded;
- of a script on vLLM's API alone (bare_vllm.py), in processes and with engines of its own: as vLLM's offline API comes, without
  statistics, and with them, which it needs to tell the time to the first token. How vLLM says that all of these are set up must
  be the same.

A pass has 32 prompt and 128 new tokens, and for the time to the first token, which no later token changes, 8 new ones. labctl
has vLLM's statistics on in vLLM's core, for the times of its own that a record carries, and off in its front end. The rate and
the time per output token are held against the script without them (there it is what a pass of 128 tokens takes longer than one
of 8, by the 120 tokens between), the time to the first token against what vLLM tells the script that has them; beside it, not
judged, stands the script's clock at each step of an engine without. On one engine vLLM's own figure is taken with its front
end's statistics on. labctl's record has what vLLM's core says of the same requests: both are compared too. `vllm bench
throughput` samples at temperature 1, and so does labctl beside it; its prompts are given as token ids, as labctl's are: with
text, the tokenizer would be within its time.

All engines share the GPUs' memory, the same CPU cores, and what the first one compiled; those that wait are stopped, and each
turn begins with a pass that is not counted. On a shared machine one pass differs from one of a minute later by a tenth and
more, from the next one by less: judged are the ratios of passes that followed one another, by the mean of their middle half,
with its 95% interval (bootstrap). One start of an engine may differ from the next: of --engines of each kind the line tells the
ratio of each pair, and for the interval against the script engines are drawn again too (of a few engines it is rather too
narrow). Passes are made until every interval is narrow, or --seconds are over. The checkpoint is made (TinyLlama's dimensions,
random weights) where the folder does not exist.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pairs import Comparison, Passes, is_told, median_of, ratio_of, settled  # these are beside this file
from report import Report
from vllm_passes import HERE, NEW_TOKENS, SHORT_TOKENS, Passing, job_of, with_sources

MIB = 2**20
PROMPT = "Explain tensor parallelism now!!"  # 32 bytes: 32 tokens of random_llama's tokenizer
PARTS = ("starts", "passes")
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
    parser.add_argument("--seconds", type=float, default=600, help="of passes, at the most, for all batches together")
    parser.add_argument("--engines", type=int, default=2, help="of each kind that take turns")
    parser.add_argument("--cores", type=int, default=16, help="that they run on")
    parser.add_argument("--logs", type=Path, help="where the logs are kept (default: a temporary folder)")
    options = parser.parse_args()
    folder = options.logs or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    if not options.checkpoint.exists():
        subprocess.run([sys.executable, str(HERE.parent / "random_llama.py"), str(options.checkpoint)], check=True)
    report = Report()
    if "starts" in options.only:
        two_starts(report, options, folder)
    if "passes" in options.only:
        by_turns(report, options, folder)
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
    spec = folder / ".labctl" / "arrays" / name / "0.json"
    spec.parent.mkdir(parents=True, exist_ok=True)
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
    attempts = {path.stem for path in (folder / ".labctl" / "arrays" / name / "attempts").glob("*.json")}
    return file.stem in attempts


# ---------------------------------------------------------------- passes by turns


BOUND = 0.03
NARROW = 0.02
FEWEST_ROUNDS = 10


@dataclasses.dataclass(frozen=True)
class Made:
    """A pass that one kind of engine makes in each round, or in fewer; vllm_passes.py and bare_vllm.py tell `how`."""

    how: str
    tokens: int = NEW_TOKENS
    every: int = 1


LABCTL, GENERATE, SAMPLED, BENCH = Made("labctl"), Made("generate"), Made("sampled", every=3), Made("bench", every=3)
LABCTL_SHORT, GENERATE_SHORT = Made("labctl", SHORT_TOKENS), Made("generate", SHORT_TOKENS)
COUNTING_SHORT, STEPS_SHORT = Made("counting", SHORT_TOKENS), Made("steps", SHORT_TOKENS)
# What is held against each other lies side by side: the last of labctl's is followed by the first of the script's. The script
# comes twice: as vLLM's offline API comes, and with vLLM counting, that is with its statistics.
TURNS = {
    "counting": (GENERATE, *[GENERATE_SHORT] * 2),
    "labctl": (SAMPLED, BENCH, *[GENERATE_SHORT, COUNTING_SHORT, LABCTL_SHORT] * 2, GENERATE, LABCTL),
    "script": (GENERATE, *[STEPS_SHORT, GENERATE_SHORT] * 2),
}
# labctl's own, and the references: of which kind of engine, which pass.
Kept = tuple[str, Made]
OWN, OWN_SHORT = ("labctl", LABCTL), ("labctl", LABCTL_SHORT)
COMPARED: tuple[Comparison[Kept], ...] = (
    (OWN, ("script", GENERATE), "the script", ("output_tok_s", "tpot_s")),
    (OWN_SHORT, ("counting", GENERATE_SHORT), "vLLM to the script", ("ttft_s",)),
    (OWN, ("labctl", GENERATE), "LLM.generate", ("output_tok_s", "tpot_s")),
    (OWN_SHORT, ("labctl", COUNTING_SHORT), "LLM.generate", ("ttft_s",)),
    (("labctl", SAMPLED), ("labctl", BENCH), "vllm bench throughput", ("output_tok_s",)),
)
# How one engine of vLLM's differs from another, the script's code on both; and what its statistics change.
TOLD: tuple[Comparison[Kept], ...] = (
    (("labctl", GENERATE), ("script", GENERATE), "LLM.generate, both", ("output_tok_s",)),
    (OWN_SHORT, ("script", STEPS_SHORT), "without statistics", ("ttft_s",)),
    (OWN, ("counting", GENERATE), "with statistics", ("output_tok_s", "tpot_s")),
)
# Of the GPUs' memory, for all engines that take turns; keys and values of 256 requests of TinyLlama take 0.5 GiB a GPU.
SHARED, KV_CACHE_BYTES = 0.78, 2**30


def by_turns(report: Report, options: argparse.Namespace, folder: Path) -> None:
    started = time.perf_counter()
    with contextlib.ExitStack() as ended:
        engines = loaded_engines(options, folder, ended)
        print(f"     {len(TURNS) * options.engines} engines ready: {time.perf_counter() - started:.0f} s", flush=True)
        differences = set_up_differently(*(engines[kind][0].log for kind in TURNS))
        report.line("set up as the script's", "", "", str(differences or "in vLLM's own words"), not differences)
        left_s = options.seconds
        for number, batch in enumerate(options.batches):
            started = time.perf_counter()
            # A pass of more requests takes longer: later batches have a larger part of the time.
            parts = range(number + 1, len(options.batches) + 1)
            figures, answers = rounds(engines, batch, left_s * parts[0] / sum(parts))
            left_s -= time.perf_counter() - started
            keep(folder / "passes.jsonl", batch, figures)
            compare(report, batch, figures)
            same = len({answers[OWN], *(answers[kind, GENERATE] for kind in TURNS)}) == 1
            what = f"tokens, batch {batch}: the script's"
            report.line(what, "", "", "the same" if same else "others (batches form differently)", same or batch > 1)


def loaded_engines(options: argparse.Namespace, folder: Path, ended: contextlib.ExitStack) -> dict[str, list[Passing]]:
    """labctl's and the script's, so many of each kind, as processes that make passes; they are ended with `ended`."""
    memory = {
        "gpu_memory_utilization": SHARED / (len(TURNS) * options.engines),
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
    }
    checkpoint, batches = str(options.checkpoint), map(str, options.batches)
    told = {"tensor_parallel_size": options.gpus, "max_model_len": 512, **memory}
    prompt = json.dumps(token_ids(options.checkpoint))
    commands = {
        "labctl": ["vllm_passes.py", checkpoint, str(options.gpus), json.dumps(memory), PROMPT, *batches],
        "script": ["bare_vllm.py", checkpoint, json.dumps(told), prompt],
        "counting": ["bare_vllm.py", checkpoint, json.dumps({**told, "disable_log_stats": False}), prompt],
    }
    # Where labctl's jobs of the first part kept what was compiled, if they ran.
    compiled = next((folder / ".labctl" / "cache" / "here").glob("*torch*"), folder / "compiled")
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    engines: dict[str, list[Passing]] = {kind: [] for kind in commands}
    all_of_them = [*commands] * options.engines
    for kinds in (all_of_them,) if compiled.exists() else (all_of_them[:1], all_of_them[1:]):
        new = []
        for kind in kinds:
            log = folder / f"{kind}-{len(engines[kind])}.log"
            new.append(Passing([str(HERE / commands[kind][0]), *commands[kind][1:]], log, compiled.absolute()))
            engines[kind].append(new[-1])
            ended.callback(new[-1].end)
        for engine in new:
            engine.ready(cores)
        for engine in new:  # now, lest one waits for the GPUs of another
            engine.rest()
    return engines


def token_ids(checkpoint: Path) -> list[int]:
    from labctl_workers.engines.text import Text

    return list(Text(str(checkpoint), None, raw_prompt=True).encode([PROMPT])[0])


SETTING = re.compile(r"(?<=, )(\w+)=(.*?)(?=, \w+=|\Z)")
SET_UP = re.compile(r"Initializing a V1 LLM engine .* with config: (.*)")


def set_up_differently(*logs: Path) -> dict[str, list[str]]:
    """The settings that vLLM tells in two logs, where they differ."""
    told = []
    for log in logs:
        found = SET_UP.search(log.read_text(errors="replace"))
        told.append(dict(SETTING.findall(", " + found[1])) if found else {"its settings": f"not told in {log}"})
    names = dict.fromkeys(name for settings in told for name in settings)
    both = {name: [settings.get(name, "") for settings in told] for name in names}
    return {name: values for name, values in both.items() if len(set(values)) > 1}


Figures = dict[Kept, list[Passes]]  # what passes measured, engine by engine


def rounds(
    engines: dict[str, list[Passing]], batch: int, seconds: float
) -> tuple[Figures, dict[Kept, tuple[int, ...]]]:
    """What the passes measured, and the last answer of each; the first round warms up. There and back again, so that none always
    comes first."""
    figures: Figures = {(kind, made): [[] for _ in engines[kind]] for kind in TURNS for made in TURNS[kind]}
    answers: dict[Kept, tuple[int, ...]] = {}
    started, number, enough = time.perf_counter(), 0, False
    while not enough:
        for index in range(len(engines["labctl"])):
            for kind in list(TURNS)[:: 1 if number % 2 else -1]:
                with engines[kind][index].turn() as run:
                    run("generate", batch, SHORT_TOKENS)  # its memory and its GPUs may be cold
                    for made in TURNS[kind][:: 1 if number % 2 else -1]:
                        if number // 2 % made.every == 0:
                            measured = run(made.how, batch, made.tokens)
                            answers[kind, made] = tuple(measured.pop("token_ids"))
                            figures[kind, made][index] += [measured] if number else []
                if number:
                    add_tpot(figures, kind, index)
        settles = number and number % FEWEST_ROUNDS == 0 and settled(figures, COMPARED, NARROW)
        enough = settles or (number > 1 and time.perf_counter() - started > seconds)
        number += 1
    return figures, answers


def add_tpot(figures: Figures, kind: str, index: int) -> None:
    """To the last pass of `LLM.generate`, where vLLM did not tell it: what a token more took, by the clock around passes."""
    long, short = (figures[kind, made][index] for made in (GENERATE, GENERATE_SHORT))
    if "tpot_s" not in long[-1]:
        long[-1]["tpot_s"] = (long[-1]["took_s"] - median_of([short[-2:]], "took_s")) / (NEW_TOKENS - SHORT_TOKENS)


def keep(file: Path, batch: int, figures: Figures) -> None:
    with file.open("a") as lines:
        for (kind, made), passes in figures.items():
            print(
                json.dumps({"batch": batch, "engine": kind, **dataclasses.asdict(made), "passes": passes}), file=lines
            )


def compare(report: Report, batch: int, figures: Figures) -> None:
    for comparison in COMPARED:
        held_against(report, batch, figures, comparison)
    for comparison in TOLD:
        held_against(report, batch, figures, comparison, judged=False)
    by_the_core(report, batch, figures)


def by_the_core(report: Report, batch: int, figures: Figures) -> None:
    """The same requests by two clocks, labctl's and that of vLLM's core. For labctl a first token is there when the front end has
    it, which is busy with handing in the rest."""
    ours, core = (median_of(figures[OWN], name) for name in ("tpot_s", "engine_tpot_s"))
    said = f"{ours / core:.3f} (within {BOUND:.0%})"
    report.line(
        f"tpot_s, batch {batch}: vLLM's core", f"{ours:,.5g}", f"{core:,.5g}", said, abs(ours / core - 1) <= BOUND
    )
    ours, core = (median_of(figures[OWN_SHORT], name) for name in ("ttft_s", "engine_ttft_s"))
    said = f"{1e3 * (ours - core):.2f} ms on its way from the core (told; not before it)"
    report.line(f"ttft_s, batch {batch}: vLLM's core", f"{ours:,.5g}", f"{core:,.5g}", said, ours >= core)


def held_against(
    report: Report, batch: int, figures: Figures, comparison: Comparison[Kept], *, judged: bool = True
) -> None:
    """A line for each figure, with the ratio of each pair of engines."""
    own, reference, what, metrics = comparison
    for metric in metrics:
        if not is_told(figures[reference], metric):
            report.line(f"{metric}, batch {batch}: {what}", "", "", "it did not run", not judged)
            continue
        others = own[0] != reference[0]  # an engine of its own
        ratio, low, high = ratio_of(figures[own], figures[reference], metric, other_engines=others)
        bound = f"within {BOUND:.0%}" if judged else "told, not judged"
        passes = sum(map(len, figures[own]))
        said = f"{ratio:.3f} ({bound}; 95% interval {low:.3f} to {high:.3f}; {passes} passes each)"
        if others and len(figures[own]) > 1:
            pairs = zip(figures[own], figures[reference], strict=True)
            each = (f"{ratio_of([mine], [theirs], metric)[0]:.3f}" for mine, theirs in pairs)
            said += f", engine by engine {' '.join(each)}"
        medians = (f"{median_of(figures[name], metric):,.5g}" for name in (own, reference))
        report.line(f"{metric}, batch {batch}: {what}", *medians, said, not judged or abs(ratio - 1) <= BOUND)


# ---------------------------------------------------------------- starts and memory


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
    sys.exit(main())
