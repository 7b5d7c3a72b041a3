"""labctl fit"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.models import fit
from labctl_orchestrator.models.architecture import ITEMSIZE, Parts, config_of_size
from labctl_orchestrator.models.checkpoint import FLAGS, Checkpoint, named, read
from labctl_orchestrator.models.fit import GIB, Case, Sequences, gpus_of
from labctl_orchestrator.models.handout import agreement, handout_estimate, handout_kv_bytes
from labctl_orchestrator.models.job_fit import case_of
from labctl_orchestrator.preflight.model_checks import as_configured
from labctl_orchestrator.request import engine_options, plan, settings
from labctl_orchestrator.request.request import DTYPE_CHOICES, check_parallel
from labctl_orchestrator.store import workspace
from labctl_orchestrator.terminal import tables
from labctl_orchestrator.terminal.messages import folded
from labctl_slurm.errors import LabctlError, PreflightError, WrongUseError
from labctl_workers.engines import ENGINES, engine_class, foreseen
from labctl_workers.engines.parallel import normalised
from labctl_workers.engines.quantization import cache_bytes
from labctl_workers.record import JobSpec, ModelRef, Refusal

COUNT = click.IntRange(1, 10_000_000)


@click.command("fit")
@click.argument("model", required=False)
@click.option("--model-id", help="Same as MODEL.")
@click.option("--parameters", metavar="COUNT", help="Instead of MODEL: number of parameters, such as 13B or 350M.")
@click.option("--layers", type=COUNT, help="With --parameters: number of layers.  [default: estimated]")
@click.option("--hidden-size", "hidden", type=COUNT, help="With --parameters: hidden size.  [default: estimated]")
@click.option("--heads", type=COUNT, help="With --parameters: number of attention heads.  [default: estimated]")
@click.option("--kv-heads", type=COUNT, help="With --parameters: number of key-value heads.  [default: as --heads]")
@click.option(
    "-p",
    "--partition",
    "partitions",
    multiple=True,
    metavar="NAME...",
    help="Partition.  [default: all partitions with GPUs]",
)
@click.option(
    "--backend", "backends", multiple=True, type=click.Choice(tuple(ENGINES)), help="Backend.  [default: all]"
)
@click.option("--revision", default="main", show_default=True, help="Branch, tag or commit of a Hub model.")
@click.option(
    "--dtype", default="auto", type=click.Choice(DTYPE_CHOICES), help="Dtype.  [default: auto, the partition's]"
)
@click.option("--gpus", type=click.IntRange(1, 1024), help="GPUs per job.  [default: the partition's]")
@click.option(
    "--parallel", "how", metavar="HOW", help="vLLM: tensor, pipeline, data, or sizes such as tensor=4,pipeline=2."
)
@click.option("--batch-size", type=COUNT, default=1, show_default=True, help="Number of concurrent requests.")
@click.option(
    "--prompt-tokens", "--input-len", type=COUNT, default=512, show_default=True, help="Prompt length in tokens."
)
@click.option(
    "--max-new-tokens",
    "--max-tokens",
    "--output-len",
    type=COUNT,
    default=128,
    show_default=True,
    help="Answer length in tokens.",
)
@click.option(
    "--gpu-memory-utilization",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of each GPU that vLLM takes.",
)
@click.option(
    "--engine-option",
    "given_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="vLLM: quantization, kv_cache_dtype or speculative_config.",
)
@json_option
def command(
    model: str | None,
    model_id: str | None,
    parameters: str | None,
    partitions: tuple[str, ...],
    backends: tuple[str, ...],
    revision: str,
    dtype: str,
    gpus: int | None,
    how: str | None,
    batch_size: int,
    prompt_tokens: int,
    max_new_tokens: int,
    gpu_memory_utilization: float | None,
    given_options: tuple[str, ...],
    as_json: bool,
    **dimensions: int | None,
) -> None:
    """Check whether a model fits the GPUs of a partition.

    Reads config.json and the headers of the weight files, from a folder, the Hub cache or the Hub. Downloads no weights. With
    --parameters it needs no model, and assumes the proportions of a Llama. docs/fit.md explains each figure.

    \b
    labctl fit TinyLlama/TinyLlama-1.1B-Chat-v1.0
    labctl fit ~/models/llama-2-13b -p dgx2 --batch-size 16 --max-new-tokens 2048
    labctl fit --parameters 13B --dtype float16 --batch-size 16
    labctl fit ~/models/llama-2-13b --backend vllm --engine-option kv_cache_dtype=fp8
    """
    given = {"MODEL": model, "--model-id": model_id, "--parameters": parameters}
    named_by = [flag for flag, value in given.items() if value is not None]
    if len(named_by) != 1:
        message = f"several models given: {' and '.join(named_by)}" if named_by else "no model given"
        raise WrongUseError(message, "labctl fit MODEL (Hub id or folder), or labctl fit --parameters 13B")
    if how is not None:
        gpus = check_parallel(how, backends or tuple(ENGINES), () if gpus is None else (gpus,)) or gpus
    options = dict(map(engine_options.parse, given_options))
    if gpu_memory_utilization is not None:
        options["gpu_memory_utilization"] = gpu_memory_utilization
    engine_options.check({name: (value,) for name, value in options.items()}, backends or tuple(ENGINES), "")
    known = settings.load(workspace.find())
    if parameters is not None:
        checkpoint = Checkpoint(parameters, FLAGS, config_of_size(_count(parameters), **dimensions), None)
    elif any(dimensions.values()):
        raise WrongUseError(
            "dimensions need --parameters, not a model", "remove --layers, --hidden-size, --heads and --kv-heads"
        )
    else:
        with tables.working(f"reading {model or model_id}"):
            checkpoint = read(named(model or model_id or "", revision))
    cases = []
    for name in partitions or [name for name in known.names() if known.partition(name).gpu_memory_gib]:
        partition = known.partition(name)
        count = gpus_of(partition, gpus).count
        chosen = plan.resolved_dtype(dtype, partition, plan.Device("cuda", partition.capability))
        for backend in backends or tuple(ENGINES):
            job = JobSpec(
                job_id="",
                partition=name,
                executor=partition.executor,
                backend=backend,
                model=ModelRef(name="the model"),
                dtype=chosen,
                device="cuda",
                gpus=count,
                runs=[],
                prompt_sets={},
                gpu=partition.gpu,
                capability=partition.capability,
                parallel=normalised(how if backend == "vllm" else None, count, engine_class(backend).PARALLEL[0]),
                engine_options=engine_options.of_backend(backend, options),
            )
            itemsize = ITEMSIZE[chosen]
            cache = cache_bytes(job.engine_options.get("kv_cache_dtype"), itemsize)
            load = Sequences(batch_size, prompt_tokens, max_new_tokens, itemsize, cache_bytes=cache)
            refused = next(foreseen(job, as_configured(checkpoint, checkpoint.shape), None), None)
            case = case_of(job, partition, checkpoint, checkpoint.shape)
            cases.append(FitRow(name, chosen, case, load, refused))
    if not cases:
        raise WrongUseError("no partition with a known GPU memory", "set gpu_memory_gib in labctl.toml")
    if as_json:
        print_json(_json(checkpoint, cases))
        return
    _print(checkpoint, cases)


def _count(text: str) -> int:
    """13B, 350M or a plain number as a number of parameters."""
    units = {"M": 10**6, "B": 10**9, "": 1}
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)([MB]?)", text.strip().upper())
    count = round(float(found[1]) * units[found[2]]) if found else 0
    if not 10**6 <= count <= 10**13:
        raise WrongUseError(f"not a number of parameters: {text!r}", "write it like 13B, 1.1B or 350M")
    return count


@dataclass(frozen=True)
class FitRow:
    """One row of the table: a partition and a backend. `refused`: why the engine cannot run the model there."""

    partition: str
    dtype: str
    case: Case
    load: Sequences
    refused: Refusal | None = None

    def check(self) -> None:
        """Raises PreflightError where the engine refuses."""
        if self.refused is not None:
            raise PreflightError(self.refused.message, self.refused.remedy)


# ---------------------------------------------------------------- for people


def _print(checkpoint: Checkpoint, cases: list[FitRow]) -> None:
    shape, counted = checkpoint.shape, checkpoint.parameters()
    where = {"headers": "the headers of its weight files", "config": "its configuration"}[checkpoint.counted_from]
    head = f"output head {counted.head:,}" if counted.head else "no output head of its own (tied to the embeddings)"
    grouped = f", {shape.kv_heads} key-value heads" if shape.kv_heads != shape.heads else ""
    load = cases[0].load
    a_token = fit.kv_bytes_per_token(shape, load.itemsize)
    too_much = handout_kv_bytes(shape, load.itemsize)
    if checkpoint.where == FLAGS:
        _say(
            f"{checkpoint.name}: {counted.total:,} parameters, with the proportions of a Llama: hidden size {shape.hidden:,}"
        )
    else:
        _say(f"{checkpoint.name}: {counted.total:,} parameters, from {where} ({checkpoint.where})")
    _say(f"  {shape.layers} layers of {counted.layers[0]:,}, embeddings {counted.embedding:,}, {head}")
    _say(f"  {shape.heads} attention heads of size {shape.head_dim}{grouped}")
    _say(f"  KV cache: {a_token:,} bytes per token; the handout's rule (2 x layers x hidden size x bytes) gives"
         f" {'the same' if too_much == a_token else f'{too_much:,} ({shape.grouped_by:.3g} times as much)'}")  # fmt: skip
    requests = "concurrent requests, each" if load.batch > 1 else "request"
    _say(f"workload: {load.batch} {requests} with {load.prompt_tokens} prompt tokens and {load.new_tokens} new tokens")
    _say(f"verdict: fits = needs at most {fit.COMFORTABLE:.0%} of a GPU's usable memory; tight = needs more; too big = needs more"
         " than all of it")  # fmt: skip
    click.echo()
    rows = [_row(case) for case in cases]
    columns = [
        "partition",
        "backend",
        "dtype",
        "verdict",
        "needed",
        "usable",
        "weights",
        "KV cache",
        "max batch",
        "max length",
        "max tok/s",
    ]
    tables.table(columns, rows, right=columns[4:])
    click.echo()
    _say(
        "memory in GiB, on the fullest GPU; max batch, max length: the largest that fits if nothing else changes; max tok/s: the"
        " limit of the memory bandwidth"
    )
    if any(row.case.backend == "vllm" for row in cases):
        _say("vllm: KV cache is what vLLM reserves; `needed` counts only the part that this workload fills")
    if any(row[3] == fit.UNSUPPORTED for row in rows):
        _say("unsupported: this backend cannot run the model on these GPUs; the reason is below")
    printed: set[str] = set()
    for case in cases:
        click.echo()
        own, by_handout = _explained(case, counted)
        _say(own)
        if by_handout and by_handout not in printed:  # the same for each backend
            _say(by_handout)
        printed.add(by_handout)


def _say(line: str) -> None:
    click.echo(folded(line))


def _row(row: FitRow) -> list[str]:
    case, load = row.case, row.load
    first = [row.partition, case.backend, row.dtype]
    try:
        row.check()
        weights, kv_cache = _weights_and_cache(case, load)
        rate = fit.tokens_per_second(case, load)
        return [
            *first, case.verdict(load), _gib(case.needed_bytes(load)), _gib(case.gpus.usable_bytes), _gib(weights),
            _gib(kv_cache), _most(case.largest_batch, load), _most(case.largest_length, load),
            "" if rate is None else f"{rate:,.0f}",
        ]  # fmt: skip
    except LabctlError:  # `_explained` prints the reason
        return [*first, fit.UNSUPPORTED, *[""] * 7]


def _explained(row: FitRow, counted: Parts) -> tuple[str, str]:
    """(the parts of a row's memory, the handout's rule of thumb for the same)."""
    case, load = row.case, row.load
    title = f"{row.partition} {case.backend}"
    try:
        row.check()
        handout = handout_estimate(case, load, counted.total)
        parts = f"weights {_gib(handout.weights)}, KV cache {_gib(handout.kv_cache)}, verdict {handout.verdict}"
        own = f"{title}: {_parts(case, load)}"
    except LabctlError as error:
        return f"{title}: {error.message} -> {error.remedy}", ""
    return own, f"  estimate of the handout: {parts}; {agreement(case, load, handout)}"


def _parts(case: Case, load: Sequences) -> str:
    if case.backend == "vllm":
        own = case.reservation(load)
        copies = " in each copy" if case.sizes.data > 1 else ""
        a_token = fit.kv_bytes_per_token(case.shape, load.cache_itemsize)
        in_cache = f" ({a_token:,} bytes per token)" if load.cache_itemsize != load.itemsize else ""
        return (
            f"vLLM takes {own.share:.0%} of each GPU, {case.parallel} parallel: weights {_gib(own.weights)}, activations"
            f" {_gib(own.activations)}, outside torch {_gib(own.outside)}; the rest is KV cache{in_cache}: {own.blocks:,} blocks"
            f" of {fit.BLOCK_TOKENS} tokens, enough for {own.at_once:,} of these requests at once{copies}"
        )
    memory = fit.by_layers(case.shape, case.parts, load, case.gpus, case.backend)
    each = "; ".join(f"GPU {i} {_gib(m.weights)} + {_gib(m.kv_cache)} + {_gib(m.beside)}" for i, m in enumerate(memory))
    return f"layers split over the GPUs (weights + KV cache + activations and logits): {each}"


def _most(largest: Callable[[Sequences, str], int], load: Sequences) -> str:
    """The largest that fits, else the largest that is tight, marked as such."""
    fits = largest(load, fit.FITS)
    tight = 0 if fits else largest(load, fit.TIGHT)
    return f"{tight:,} tight" if tight else f"{fits:,}"


def _weights_and_cache(case: Case, load: Sequences) -> tuple[int, int]:
    if case.backend == "vllm":
        own = case.reservation(load)
        return own.weights, max(0, own.kv_cache)
    memory = max(fit.by_layers(case.shape, case.parts, load, case.gpus, case.backend), key=lambda each: each.peak)
    return memory.weights, memory.kv_cache


def _gib(value: int) -> str:
    return f"{value / GIB:.2f}"


# ---------------------------------------------------------------- for programs


def _json(checkpoint: Checkpoint, cases: list[FitRow]) -> dict[str, object]:
    shape, counted = checkpoint.shape, checkpoint.parameters()
    itemsize = cases[0].load.itemsize
    return {
        "model": checkpoint.name,
        "from": checkpoint.where,
        "counted_from": checkpoint.counted_from,
        "parameters": counted.total,
        "parameters_of": {"embedding": counted.embedding, "layers": list(counted.layers), "norm": counted.norm,
                          "head": counted.head, "rest": counted.rest},
        "kv_bytes_per_token": fit.kv_bytes_per_token(shape, itemsize),
        "handout_kv_bytes_per_token": handout_kv_bytes(shape, itemsize),
        "handout_kv_factor": shape.grouped_by,
        "thresholds": {"fits": fit.COMFORTABLE, "usable": fit.USABLE},
        "cases": [_case_json(case, counted) for case in cases],
    }  # fmt: skip


def _case_json(row: FitRow, counted: Parts) -> dict[str, object]:
    case, load = row.case, row.load
    workload = {
        "partition": row.partition, "backend": case.backend, "dtype": row.dtype, "gpus": case.gpus.count,
        "parallel": case.parallel,
        "batch_size": load.batch, "prompt_tokens": load.prompt_tokens, "max_new_tokens": load.new_tokens,
    }  # fmt: skip
    try:
        row.check()
        handout = handout_estimate(case, load, counted.total)
        found: dict[str, object] = {
            **workload,
            "verdict": case.verdict(load),
            "needed_bytes": case.needed_bytes(load),
            "usable_bytes": case.gpus.usable_bytes,
            "fits_up_to_bytes": case.limits()[0],
            "tight_up_to_bytes": case.limits()[1],
            "largest_batch": case.largest_batch(load),
            "largest_length": case.largest_length(load),
            "largest_batch_tight": case.largest_batch(load, fit.TIGHT),
            "largest_length_tight": case.largest_length(load, fit.TIGHT),
            "tokens_per_second_at_most": fit.tokens_per_second(case, load),
            "handout": {
                "weights_bytes": handout.weights,
                "kv_cache_bytes": handout.kv_cache,
                "verdict": handout.verdict,
                "rule": handout.rule.text if handout.rule else None,
                "agreement": agreement(case, load, handout),
            },
        }
        if case.backend == "vllm":
            own = case.reservation(load)
            found["vllm"] = {
                "gpu_memory_utilization": own.share, "weights_bytes": own.weights, "activations_bytes": own.activations,
                "outside_torch_bytes": own.outside, "kv_cache_bytes": own.kv_cache, "kv_blocks": own.blocks,
                "kv_block_tokens": fit.BLOCK_TOKENS, "sequences_at_once": own.at_once,
            }  # fmt: skip
        else:
            found["devices"] = [
                {
                    "weights_bytes": own.weights,
                    "kv_cache_bytes": own.kv_cache,
                    "beside_bytes": own.beside,
                    "peak_bytes": own.peak,
                }
                for own in fit.by_layers(case.shape, case.parts, load, case.gpus, case.backend)
            ]
    except LabctlError as error:
        return {**workload, "verdict": fit.UNSUPPORTED, "refused": error.message, "remedy": error.remedy}
    return found
