"""labctl fit"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.models import fit
from labctl_orchestrator.models.architecture import ITEMSIZE, Parts
from labctl_orchestrator.models.checkpoint import Checkpoint, named, read
from labctl_orchestrator.models.fit import GIB, Case, Workload, gpus_of
from labctl_orchestrator.models.handout import agreement, handout_estimate, handout_kv_bytes
from labctl_orchestrator.request import plan, settings
from labctl_orchestrator.request.request import DTYPE_CHOICES
from labctl_orchestrator.store import workspace
from labctl_orchestrator.terminal import tables
from labctl_orchestrator.terminal.messages import folded
from labctl_slurm.errors import LabctlError, WrongUseError
from labctl_workers.engines import ENGINES

COUNT = click.IntRange(1, 10_000_000)


@click.command("fit")
@click.argument("model", required=False)
@click.option("--model-id", help="Same as MODEL.")
@click.option(
    "-p", "--partition", "partitions", multiple=True, metavar="NAME...", help="Partition.  [default: all with GPUs]"
)
@click.option("--backend", "backends", multiple=True, type=click.Choice(tuple(ENGINES)), help="Engine.  [default: all]")
@click.option("--revision", default="main", show_default=True, help="Branch, tag or commit of a Hub model.")
@click.option("--dtype", default="auto", type=click.Choice(DTYPE_CHOICES), help="Dtype; auto takes the partition's.")
@click.option("--gpus", type=click.IntRange(1, 1024), help="GPUs per job.  [default: the partition's]")
@click.option("--batch-size", type=COUNT, default=1, show_default=True, help="Number of concurrent requests.")
@click.option("--prompt-tokens", type=COUNT, default=512, show_default=True, help="Prompt length in tokens.")
@click.option(
    "--max-new-tokens", "--max-tokens", type=COUNT, default=128, show_default=True, help="Answer length in tokens."
)
@click.option("--gpu-memory-utilization", type=click.FloatRange(0, 1, min_open=True), help="vLLM's share of each GPU.")
@json_option
def command(
    model: str | None,
    model_id: str | None,
    partitions: tuple[str, ...],
    backends: tuple[str, ...],
    revision: str,
    dtype: str,
    gpus: int | None,
    batch_size: int,
    prompt_tokens: int,
    max_new_tokens: int,
    gpu_memory_utilization: float | None,
    as_json: bool,
) -> None:
    """Check whether a model fits the GPUs of a partition.

    Reads config.json and the headers of the weight files, from a folder, the Hub cache or the Hub; downloads no weights.
    docs/fit.md explains each figure.

    \b
    labctl fit TinyLlama/TinyLlama-1.1B-Chat-v1.0
    labctl fit ~/models/llama-2-13b -p dgx2 --batch-size 16 --max-new-tokens 2048
    """
    if (model is None) == (model_id is None):
        message = "no model given" if model is None else "two models given: MODEL and --model-id"
        raise WrongUseError(message, "labctl fit MODEL, with a Hub id or the folder of a checkpoint")
    model = model or model_id or ""
    known = settings.load(workspace.find())
    with tables.working(f"reading {model}"):
        checkpoint = read(named(model, revision))
    cases = []
    for name in partitions or [name for name in known.names() if known.partition(name).gpu_memory_gib]:
        partition = known.partition(name)
        own_gpus = gpus_of(partition, gpus)
        device = plan.Device("cuda", partition.capability)
        chosen = plan.resolved_dtype(dtype, partition, device)
        load = Workload(batch_size, prompt_tokens, max_new_tokens, ITEMSIZE[chosen])
        parts = checkpoint.bytes_of(load.itemsize)
        for backend in backends or tuple(ENGINES):
            case = Case(checkpoint.shape, parts, own_gpus, backend, gpu_memory_utilization)
            cases.append(FitRow(name, chosen, case, load))
    if not cases:
        raise WrongUseError("no partition with a known GPU memory", "set gpu_memory_gib in labctl.toml")
    if as_json:
        print_json(_json(checkpoint, cases))
        return
    _print(checkpoint, cases)


@dataclass(frozen=True)
class FitRow:
    """One row of the table: a partition and a backend."""

    partition: str
    dtype: str
    case: Case
    load: Workload


# ---------------------------------------------------------------- for people


def _print(checkpoint: Checkpoint, cases: list[FitRow]) -> None:
    shape, counted = checkpoint.shape, checkpoint.parameters()
    where = {"headers": "the headers of its weight files", "config": "its configuration"}[checkpoint.counted_from]
    head = f"head {counted.head:,}" if counted.head else "head tied to the embeddings"
    grouped = f", {shape.kv_heads} KV heads" if shape.kv_heads != shape.heads else ""
    load = cases[0].load
    a_token = fit.kv_bytes_per_token(shape, load.itemsize)
    too_much = handout_kv_bytes(shape, load.itemsize)
    _say(f"{checkpoint.name}: {counted.total:,} parameters, from {where} ({checkpoint.where})")
    _say(f"  {shape.layers} layers of {counted.layers[0]:,}, embeddings {counted.embedding:,}, {head}; {shape.heads} heads of"
         f" {shape.head_dim}{grouped}")  # fmt: skip
    _say(f"  KV cache: {a_token:,} bytes per token; the handout's 2 x layers x hidden gives {too_much:,},"
         f" {_times(shape.grouped_by)}")  # fmt: skip
    _say(f"workload: {load.batch} x ({load.prompt_tokens} + {load.new_tokens}) tokens. fits: at most {fit.COMFORTABLE:.0%} of a"
         " GPU's usable memory (the handout keeps 20-30% free); tight: at most all of it (vLLM: of its share)")  # fmt: skip
    click.echo()
    rows = [_row(case) for case in cases]
    columns = [
        "partition",
        "backend",
        "dtype",
        "verdict",
        "needed",
        "of",
        "weights",
        "KV cache",
        "batch",
        "length",
        "tok/s",
    ]
    tables.table(columns, rows, right=columns[4:])
    click.echo()
    _say(
        "GiB of the fullest GPU; batch, length: the largest that fits, all else equal; tok/s: the limit set by memory bandwidth"
    )
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
        weights, kv_cache = _weights_and_cache(case, load)
        rate = fit.tokens_per_second(case, load)
        return [
            *first, case.verdict(load), _gib(case.needed_bytes(load)), _gib(case.gpus.usable_bytes), _gib(weights),
            _gib(kv_cache), _most(case.largest_batch, load), _most(case.largest_length, load),
            "" if rate is None else f"{rate:,.0f}",
        ]  # fmt: skip
    except LabctlError:  # `_explained` prints the reason
        return [*first, fit.DOES_NOT, *[""] * 7]


def _explained(row: FitRow, counted: Parts) -> tuple[str, str]:
    """(the parts of a row's memory, the handout's rule of thumb for the same)."""
    case, load = row.case, row.load
    title = f"{row.partition} {case.backend}"
    try:
        handout = handout_estimate(case, load, counted.total)
        parts = f"weights {_gib(handout.weights)}, KV cache {_gib(handout.kv_cache)}: {handout.verdict}"
        own = f"{title}: {_parts(case, load)}"
    except LabctlError as error:
        return f"{title}: {error.message} -> {error.remedy}", ""
    return own, f"  handout: {parts}; {agreement(case, load, handout)}"


def _parts(case: Case, load: Workload) -> str:
    if case.backend == "vllm":
        own = fit.vllm_reservation(case.shape, case.parts, load, case.gpus, case.share)
        return (
            f"tensor parallel, {own.share:.0%} of each GPU: weights {_gib(own.weights)}, activations {_gib(own.activations)},"
            f" outside torch {_gib(own.outside)}, KV cache: the rest, {own.blocks:,} blocks of {fit.BLOCK_TOKENS} tokens for"
            f" {own.at_once:,} concurrent sequences"
        )
    memory = fit.by_layers(case.shape, case.parts, load, case.gpus, case.backend)
    each = "; ".join(f"GPU {i} {_gib(m.weights)} + {_gib(m.kv_cache)} + {_gib(m.beside)}" for i, m in enumerate(memory))
    return f"layers split: weights + KV cache + activations and logits: {each}"


def _most(largest: Callable[[Workload, str], int], load: Workload) -> str:
    """The largest that fits, else the largest that is tight, marked as such."""
    fits = largest(load, fit.FITS)
    tight = 0 if fits else largest(load, fit.TIGHT)
    return f"{tight:,} tight" if tight else f"{fits:,}"


def _weights_and_cache(case: Case, load: Workload) -> tuple[int, int]:
    if case.backend == "vllm":
        own = fit.vllm_reservation(case.shape, case.parts, load, case.gpus, case.share)
        return own.weights, max(0, own.kv_cache)
    memory = max(fit.by_layers(case.shape, case.parts, load, case.gpus, case.backend), key=lambda each: each.peak)
    return memory.weights, memory.kv_cache


def _times(factor: float) -> str:
    return "as much" if abs(factor - 1) < 0.005 else f"{factor:.3g} times as much"


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
        "batch_size": load.batch, "prompt_tokens": load.prompt_tokens, "max_new_tokens": load.new_tokens,
    }  # fmt: skip
    try:
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
            own = fit.vllm_reservation(case.shape, case.parts, load, case.gpus, case.share)
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
        return {**workload, "verdict": fit.DOES_NOT, "refused": error.message, "remedy": error.remedy}
    return found
