"""What fits: keys and values, the two splits, verdicts with their thresholds, the handout beside them, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labctl_orchestrator.models import fit, handout
from labctl_orchestrator.models.architecture import layer_parameters, parameters, shape_of
from labctl_orchestrator.models.fit import (
    DOES_NOT,
    FITS,
    GIB,
    TIGHT,
    UNSUPPORTED,
    VERDICTS,
    Case,
    Draft,
    Gpus,
    Sequences,
)
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import PreflightError
from labctl_workers.engines import parallel
from labctl_workers.engines.layers import device_map, equal_split
from labctl_workers.engines.parallel import ParallelSizes
from tests.conftest import Labctl
from tests.public_models import PUBLIC
from tests.vllm_package import vllm_installed  # noqa: F401  a fixture

V100 = Gpus(2, "V100", 32 * GIB, 7.0, 900e9)
H100 = Gpus(2, "H100", 80 * GIB, 9.0, 3350e9)
USUAL = Sequences(1, 512, 128, 2)


def case(name: str, gpus: Gpus = H100, backend: str = "hf", itemsize: int = 2) -> Case:
    shape = shape_of(PUBLIC[name][0])
    return Case(shape, parameters(shape).times(itemsize), gpus, backend)


# ---------------------------------------------------------------- keys and values


@pytest.mark.parametrize(
    ("name", "bytes_a_token", "factor"),
    [
        ("TinyLlama-1.1B", 22_528, 8),
        ("Llama-2-7B", 524_288, 1),
        ("Llama-2-13B", 819_200, 1),
        ("Llama-3-8B", 131_072, 4),
        ("Llama-3-70B", 327_680, 8),
        ("Llama-3.2-1B", 32_768, 4),
        ("Mistral-7B", 131_072, 4),
        ("Qwen2.5-32B", 262_144, 5),
    ],
)
def test_keys_and_values_of_a_token_and_what_the_handouts_rule_says_too_much(
    name: str, bytes_a_token: int, factor: int
) -> None:
    shape = shape_of(PUBLIC[name][0])
    assert fit.kv_bytes_per_token(shape, 2) == bytes_a_token
    assert handout.handout_kv_bytes(shape, 2) == factor * bytes_a_token
    assert shape.grouped_by == factor


def test_a_layer_with_a_window_keeps_no_more_than_it() -> None:
    gemma = case("Gemma-3-1B")
    short = fit.by_layers(gemma.shape, gemma.parts, Sequences(1, 400, 112, 2), H100, "hf")
    long = fit.by_layers(gemma.shape, gemma.parts, Sequences(1, 4000, 112, 2), H100, "hf")
    full = sum(window is None for window in gemma.shape.windows)
    grown = sum(own.kv_cache for own in long) - sum(own.kv_cache for own in short)
    assert grown == full * 2 * gemma.shape.kv_heads * gemma.shape.head_dim * 2 * 3600


# ---------------------------------------------------------------- layers split


class Skeleton:
    """Modules of a Llama model by name alone, as `device_map` looks at them."""

    def __init__(self, layers: int) -> None:
        self.model = SimpleNamespace(
            embed_tokens=object(),
            layers=[object()] * layers,
            named_children=lambda: [(name, None) for name in ("embed_tokens", "layers", "norm", "rotary_emb")],
        )


@given(layers=st.integers(1, 100), gpus=st.integers(1, 8))
def test_layers_go_where_hf_puts_them(layers: int, gpus: int) -> None:
    counts = equal_split(layers, gpus)
    assert sum(counts) == layers
    assert max(counts) - min(counts) <= 1
    if layers >= gpus:
        placed = device_map(Skeleton(layers), gpus, tied=False)
        assert counts == [
            sum(place == gpu for name, place in placed.items() if name.startswith("model.layers."))
            for gpu in range(gpus)
        ]


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("backend", ["hf", "staged"])
@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_every_weight_is_on_one_gpu_and_staged_reads_a_tied_head_from_a_copy(
    name: str, backend: str, gpus: int
) -> None:
    own = case(name)
    held = fit.weights_by_layers(own.parts, gpus, backend)
    copied = own.parts.embedding if own.shape.tied and backend == "staged" and gpus > 1 else 0
    assert len(held) == gpus
    assert sum(held) == own.parts.total + copied


def test_more_gpus_than_layers_are_refused() -> None:
    own = case("Llama-3.2-1B")
    with pytest.raises(PreflightError, match="16 layers"):
        fit.by_layers(own.shape, own.parts, USUAL, replace(H100, count=17), "hf")


def test_hf_and_staged_have_memory_of_their_own() -> None:
    """The cache of hf grows with the tokens; that of staged is set aside in steps of slots, all of it from the beginning."""
    load = Sequences(4, 100, 30, 2)
    own = case("TinyLlama-1.1B")
    hf, staged = (fit.by_layers(own.shape, own.parts, load, H100, backend) for backend in ("hf", "staged"))
    assert [gpu.kv_cache for gpu in hf] == [gpu.kv_cache_used for gpu in hf]
    assert sum(gpu.kv_cache_used for gpu in staged) == sum(gpu.kv_cache_used for gpu in hf)
    assert sum(gpu.kv_cache for gpu in staged) > sum(gpu.kv_cache_used for gpu in staged)
    needed = {backend: case("TinyLlama-1.1B", backend=backend).needed_bytes(load) for backend in ("hf", "staged")}
    assert needed == {
        backend: max(gpu.peak for gpu in memory) + fit.CONTEXT_BYTES
        for backend, memory in (("hf", hf), ("staged", staged))
    }


# ---------------------------------------------------------------- tensor parallel


def tensor(own: Case, gpus: int) -> int:
    """Bytes of weights of each GPU."""
    (weights,) = fit.weights_by_stage(own.shape, own.parts, ParallelSizes(tensor=gpus), 2)
    return weights


@pytest.mark.parametrize("name", PUBLIC)
def test_the_shares_of_tensor_parallel_are_all_of_it_and_little_more(name: str) -> None:
    own = case(name)
    if own.shape.heads % 2:
        with pytest.raises(PreflightError, match="2 GPUs do not divide the 9 query and 3 key-value heads"):
            tensor(own, 2)
        return
    whole = tensor(own, 1)
    share = tensor(own, 2)
    assert own.parts.total <= whole <= 1.01 * own.parts.total + 2 * (own.shape.max_tokens or 0) * own.shape.head_dim
    assert whole < 2 * share < 1.1 * whole  # norms, and a lone key-value head, are on both


def test_a_vocabulary_is_padded_to_whole_rows_of_64() -> None:
    config, _ = PUBLIC["Llama-2-7B"]
    even, odd = (shape_of({**config, "vocab_size": rows}) for rows in (32064, 32001))
    two = ParallelSizes(tensor=2)
    held = [fit.weights_by_stage(shape, parameters(shape), two, 2) for shape in (even, odd)]
    assert held[0] == held[1]


def test_key_value_heads_that_are_fewer_than_the_gpus_are_repeated() -> None:
    own = case("TinyLlama-1.1B")  # four of them
    four, eight = (replace(own, gpus=replace(H100, count=count), share=0.9).reservation(USUAL) for count in (4, 8))
    per_block_four = 2 * 22 * 1 * 64 * 2 * fit.BLOCK_TOKENS
    assert four.kv_cache // four.blocks == pytest.approx(per_block_four, rel=1e-3)
    assert eight.kv_cache // eight.blocks == pytest.approx(per_block_four, rel=1e-3)


def test_vllm_makes_blocks_of_all_that_its_share_leaves() -> None:
    own = case("Llama-2-7B", backend="vllm")
    reserved = replace(own, gpus=H100, share=0.5).reservation(USUAL)
    a_block = 16 * 524_288 // 2
    assert reserved.blocks == reserved.kv_cache // a_block
    taken = reserved.weights + reserved.activations + reserved.outside + reserved.kv_cache
    assert taken == int(H100.usable_bytes * 0.5)
    assert reserved.at_once == reserved.blocks // 40  # 640 tokens
    assert replace(own, gpus=V100).reservation(USUAL).share == 0.9
    assert replace(own, gpus=H100).reservation(USUAL).share == 0.92


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_pipeline_holds_every_weight_once_and_a_copy_of_a_tied_head(name: str, stages: int) -> None:
    own = case(name)
    (whole,) = fit.weights_by_stage(own.shape, own.parts, ParallelSizes(), 2)
    held = fit.weights_by_stage(own.shape, own.parts, ParallelSizes(pipeline=stages), 2)
    rows = -(-own.shape.vocabulary // 64) * 64
    rotary = 2 * (own.shape.max_tokens or 0) * own.shape.head_dim
    assert sum(held) == whole + (stages - 1) * rotary + own.shape.tied * 2 * rows * own.shape.hidden


@given(layers=st.integers(1, 200), stages=st.integers(1, 16))
def test_the_layers_of_a_pipeline_are_shared_out_evenly(layers: int, stages: int) -> None:
    counts = parallel.stage_layers(layers, stages)
    assert (len(counts), sum(counts)) == (stages, layers)
    assert max(counts) - min(counts) <= 1
    assert counts[-1] == layers // stages


@pytest.mark.model
@pytest.mark.usefixtures("vllm_installed")
@pytest.mark.parametrize(("layers", "stages"), [(22, 2), (22, 4), (23, 4), (30, 4), (30, 7), (32, 3), (5, 5)])
def test_the_layers_of_a_pipeline_are_vllms_own(layers: int, stages: int) -> None:
    from vllm.distributed.utils import get_pp_indices

    places = [get_pp_indices(layers, stage, stages) for stage in range(stages)]
    assert parallel.stage_layers(layers, stages) == [end - begin for begin, end in places]


def shared(name: str, how: str, gpus: int) -> Case:
    return replace(case(name, replace(H100, count=gpus), "vllm"), parallel=how)


def test_the_fullest_stage_of_a_pipeline_sets_the_blocks_of_all() -> None:
    """Llama-3-8B, 32 layers in two stages: the first has the embeddings, the last the head and the logits of the profile run."""
    own = shared("Llama-3-8B", "pipeline", 2)
    stages = own.stages(USUAL)
    assert [stage.block_bytes for stage in stages] == [16 * 131_072 // 2] * 2
    reserved = own.reservation(USUAL)
    assert reserved.blocks == min(stage.blocks for stage in stages)
    needed = max(stage.weights + stage.activations + stage.outside + 40 * stage.block_bytes for stage in stages)
    assert own.needed_bytes(USUAL) == needed


def test_a_copy_of_the_model_has_its_share_of_the_requests_and_every_weight() -> None:
    one, two = shared("Llama-3-8B", "tensor", 1), shared("Llama-3-8B", "data", 2)
    assert two.needed_bytes(replace(USUAL, batch=64)) == one.needed_bytes(replace(USUAL, batch=32))
    assert two.largest_batch(USUAL) == 2 * one.largest_batch(USUAL)
    mixed = shared("Llama-3-8B", "tensor=2,data=2", 4)
    assert mixed.needed_bytes(replace(USUAL, batch=64)) == shared("Llama-3-8B", "tensor", 2).needed_bytes(
        replace(USUAL, batch=32)
    )


@pytest.mark.parametrize("how", ["tensor", "pipeline"])
def test_quantized_layers_take_their_share_and_what_is_not_quantized_its_own(how: str) -> None:
    """8 bits in the matrices of the layers: half of their 16, on each GPU."""
    own = shared("Llama-3-8B", how, 2)
    matrices, vectors = layer_parameters(own.shape)
    small = replace(own.parts, layers=(matrices + 2 * vectors,) * own.shape.layers)
    held = fit.weights_by_stage(own.shape, own.parts, own.sizes, 2)
    quantized = fit.weights_by_stage(own.shape, small, own.sizes, 2)
    assert {full - less for full, less in zip(held, quantized, strict=True)} == {32 * matrices // 2}


def test_fewer_key_value_heads_than_gpus_are_repeated_quantized_too() -> None:
    own = case("TinyLlama-1.1B")  # four of them
    matrices, vectors = layer_parameters(own.shape)
    small = replace(own.parts, layers=(matrices // 2 + 2 * vectors,) * own.shape.layers)  # 4 bits
    (full,), (less,) = (
        fit.weights_by_stage(own.shape, parts, ParallelSizes(tensor=8), 2) for parts in (own.parts, small)
    )
    of_a_gpu = (2 * 2048 * 4 * 64) + 2 * (2048 * 64) + 3 * 2048 * 704
    assert full - less == 22 * (2 * of_a_gpu - of_a_gpu // 2)


def test_an_fp8_cache_has_half_the_bytes_of_a_block_and_twice_the_batch() -> None:
    own = shared("Llama-3-8B", "tensor", 1)
    half = replace(USUAL, cache_bytes=1)
    assert own.reservation(half).block_bytes * 2 == own.reservation(USUAL).block_bytes == 16 * 131_072
    assert own.reservation(half).at_once in range(
        2 * own.reservation(USUAL).at_once, 2 * own.reservation(USUAL).at_once + 2
    )
    at_length = replace(USUAL, prompt_tokens=4000, batch=64)
    assert fit.tokens_per_second(own, replace(at_length, cache_bytes=1)) > fit.tokens_per_second(own, at_length)


def test_a_shared_prefix_is_in_the_cache_once() -> None:
    own = shared("Llama-3-8B", "tensor", 1)
    load = replace(USUAL, batch=10, shared_tokens=500)  # 31 whole blocks of 40
    assert load.blocks(10) == 31 + 10 * 9
    assert load.blocks(1) == USUAL.blocks(1) == 40
    saved = own.needed_bytes(replace(USUAL, batch=10)) - own.needed_bytes(load)
    assert saved == 9 * 31 * 16 * 131_072
    reserved = own.reservation(load)
    assert load.blocks(reserved.at_once) <= reserved.blocks < load.blocks(reserved.at_once + 1)


def test_a_drafting_model_has_weights_and_a_cache_on_the_last_stage() -> None:
    target, small = shared("Llama-3-8B", "pipeline", 2), case("Llama-3.2-1B")
    drafting = replace(target, draft=Draft(small.shape, small.parts))
    first, last = (
        [b.weights - a.weights for a, b in zip(target.stages(USUAL), drafting.stages(USUAL), strict=True)],
        [b.block_bytes - a.block_bytes for a, b in zip(target.stages(USUAL), drafting.stages(USUAL), strict=True)],
    )
    assert first == [0, fit.weights_by_stage(small.shape, small.parts, ParallelSizes(), 2)[0]]
    assert last == [0, 16 * fit.kv_bytes_per_token(small.shape, 2)]
    assert fit.tokens_per_second(drafting, USUAL) is None  # a step gives several tokens


def test_the_limit_of_the_bandwidth_follows_the_split() -> None:
    """One sequence: stages take turns, copies wait. Many: each way uses both GPUs; copies and stages read the weights once a
    batch each."""

    def rate(how: str, gpus: int, batch: int) -> float:
        return fit.tokens_per_second(shared("Llama-3-8B", how, gpus), replace(USUAL, batch=batch)) or 0.0

    alone = rate("tensor", 1, 1)
    assert rate("tensor", 2, 1) == pytest.approx(2 * alone)
    assert rate("pipeline", 2, 1) == rate("data", 2, 1) == alone
    assert rate("data", 2, 64) == pytest.approx(2 * rate("tensor", 1, 32))
    assert rate("pipeline", 2, 64) == pytest.approx(2 * rate("tensor", 1, 32))
    assert rate("tensor", 2, 64) == pytest.approx(2 * rate("tensor", 1, 64))
    assert rate("tensor=2,pipeline=2", 4, 64) == pytest.approx(2 * rate("tensor", 2, 32))


def test_sizes_that_do_not_divide_the_model_do_not_fit() -> None:
    with pytest.raises(PreflightError) as caught:
        shared("Llama-3.2-1B", "pipeline", 17).needed_bytes(USUAL)
    assert caught.value.message == "a pipeline of 17 stages needs as many layers: the model has 16"
    assert caught.value.remedy == "use --gpus 16"


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("name", "gpus", "backend", "verdict"),
    [
        ("TinyLlama-1.1B", V100, "hf", FITS),
        ("Llama-2-7B", V100, "hf", FITS),
        ("Llama-2-7B", V100, "vllm", FITS),
        ("Llama-2-13B", V100, "hf", FITS),
        ("Qwen2.5-32B", V100, "hf", TIGHT),
        ("Qwen2.5-32B", V100, "vllm", DOES_NOT),
        ("Llama-3-70B", V100, "hf", DOES_NOT),
        ("Llama-2-13B", H100, "hf", FITS),
        ("Qwen2.5-32B", H100, "vllm", FITS),
        ("Llama-3-70B", H100, "hf", TIGHT),
        ("Llama-3-70B", H100, "vllm", TIGHT),
    ],
)
def test_the_verdict_of_public_models(name: str, gpus: Gpus, backend: str, verdict: str) -> None:
    own = case(name, gpus, backend)
    assert own.verdict(USUAL) == verdict
    needed, (comfortable, most) = own.needed_bytes(USUAL), own.limits()
    assert (needed <= comfortable, needed <= most) == (verdict == FITS, verdict != DOES_NOT)
    assert comfortable == int(gpus.usable_bytes * 0.8)


@given(
    name=st.sampled_from(sorted(PUBLIC)), gpus=st.sampled_from([V100, H100]), backend=st.sampled_from(["hf", "staged", "vllm"]),
    batch=st.integers(1, 64), prompt=st.integers(1, 2000), new=st.integers(1, 2000),
)  # fmt: skip
def test_the_largest_that_fits_fits_and_one_more_does_not(
    name: str, gpus: Gpus, backend: str, batch: int, prompt: int, new: int
) -> None:
    own, load = case(name, gpus, backend), Sequences(batch, prompt, new, 2)
    if backend == "vllm" and own.shape.heads % 2:
        return
    largest = own.largest_batch(load)
    if backend != "staged":  # there a batch of four is two micro-batches, which may take less than one
        assert not largest or own.verdict(replace(load, batch=largest)) == FITS
        assert largest >= fit.MOST_BATCH or own.verdict(replace(load, batch=largest + 1)) != FITS
    assert own.largest_batch(load, TIGHT) >= largest
    length = own.largest_length(load)
    assert length <= (own.shape.max_tokens or fit.MOST_TOKENS)
    assert not length or own.verdict(fit._of_length(load, length)) == FITS


@given(name=st.sampled_from(sorted(PUBLIC)), batch=st.integers(1, 64), tokens=st.integers(1, 4000))
def test_more_tokens_never_need_less(name: str, batch: int, tokens: int) -> None:
    own = case(name)
    load = Sequences(batch, 10, tokens, 2)
    assert own.needed_bytes(replace(load, new_tokens=tokens + 100)) >= own.needed_bytes(load)
    assert VERDICTS.index(own.verdict(replace(load, batch=batch + 8))) >= VERDICTS.index(own.verdict(load))


# ---------------------------------------------------------------- speed


def test_the_bandwidth_bounds_the_tokens_a_second() -> None:
    """The facts of one H100: 2.07 GB a token at 3.35 TB/s, 1,619 tokens a second in a row, twice that side by side."""
    short = Sequences(1, 1, 1, 2)
    in_a_row = fit.tokens_per_second(case("TinyLlama-1.1B"), short)
    side_by_side = fit.tokens_per_second(case("TinyLlama-1.1B", backend="vllm"), short)
    assert in_a_row == pytest.approx(1619, rel=0.001)
    assert side_by_side == pytest.approx(3238, rel=0.001)
    unknown = replace(case("TinyLlama-1.1B"), gpus=replace(H100, bandwidth_bytes_s=None))
    assert fit.tokens_per_second(unknown, short) is None


# ---------------------------------------------------------------- the handout


@pytest.mark.parametrize(
    ("name", "gpus", "rule", "said"),
    [
        ("TinyLlama-1.1B", V100, "1B-7B comfortable", "its rule of thumb agrees"),
        ("Llama-2-7B", V100, "1B-7B comfortable", "its rule of thumb agrees"),
        ("Llama-2-13B", V100, "13B tight", "stricter"),
        ("Llama-2-7B", H100, "7B-13B easy", "its rule of thumb agrees"),
        ("Llama-2-13B", H100, "7B-13B easy", "its rule of thumb agrees"),
        ("Qwen2.5-32B", H100, "30B with care", "stricter"),
        ("Llama-3-70B", H100, None, "no rule of thumb for this size"),
        ("Qwen2.5-32B", V100, None, "no rule of thumb for this size"),
    ],
)
def test_the_handouts_rule_is_quoted_and_agrees_or_the_reason_is_told(
    name: str, gpus: Gpus, rule: str | None, said: str
) -> None:
    own = case(name, gpus)
    sums = handout.handout_estimate(own, USUAL, own.parts.total // 2)
    assert (sums.rule.text if sums.rule else None) == (
        f"2 x {gpus.name} {gpus.memory_bytes // GIB} GB: {rule}" if rule else None
    )
    told = handout.agreement(own, USUAL, sums)
    assert said in told
    if said == "stricter":
        batch = int(told.split("batch of ")[1].split(" ")[0].replace(",", ""))
        assert own.verdict(replace(USUAL, batch=batch - 1)) == FITS
        assert own.verdict(replace(USUAL, batch=batch)) == TIGHT


def test_a_batch_that_the_handouts_rule_does_not_count_is_the_reason_why_it_is_too_hopeful() -> None:
    own, load = case("Llama-2-7B", V100), Sequences(64, 2048, 2048, 2)
    told = handout.agreement(own, load, handout.handout_estimate(own, load, own.parts.total // 2))
    assert own.verdict(load) == DOES_NOT
    assert "more optimistic" in told
    assert "the KV cache, which takes 128.0 GiB" in told


# ---------------------------------------------------------------- the command


@pytest.fixture
def models(workspace: Workspace, tmp_path: Path) -> Path:
    """Folders that hold a config.json and nothing else."""
    for name, (config, _) in PUBLIC.items():
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path / "models"


@pytest.mark.parametrize("name", PUBLIC)
def test_fit_tells_parameters_and_a_verdict_for_every_partition_with_gpus(
    labctl: Labctl, models: Path, name: str
) -> None:
    told: dict[str, Any] = labctl("fit", models / name, "--json").json
    assert told["parameters"] == PUBLIC[name][1]
    assert (told["from"], told["counted_from"]) == ("folder", "config")
    rows = [(row["partition"], row["backend"], row["dtype"]) for row in told["cases"]]
    backends = ("hf", "staged", "vllm")
    assert rows == [(partition, backend, dtype) for partition, dtype in (("dgx2", "float16"), ("dgxh", "bfloat16"))
                    for backend in backends]  # fmt: skip
    assert {row["verdict"] for row in told["cases"]} <= {*VERDICTS, UNSUPPORTED}


def test_fit_states_the_context_the_batch_and_the_thresholds_of_its_verdict(labctl: Labctl, models: Path) -> None:
    ran = labctl("fit", models / "Llama-2-13B", "-p", "dgx2", "--batch-size", 64, "--max-new-tokens", 1024)
    assert ran.code == 0
    assert "workload: 64 concurrent requests, each with 512 prompt tokens and 1024 new tokens" in ran.out
    assert "fits = needs at most 80% of a" in ran.out
    assert "13,015,864,320 parameters" in ran.out
    assert "2 x V100 32 GB: 13B tight" in ran.out
    rows = [line.split() for line in ran.out.splitlines() if line.startswith("dgx2") and "float16" in line]
    assert [row[1] for row in rows] == ["hf", "staged", "vllm"]
    assert [row[3:5] for row in rows] == [["too", "big"]] * 3


def test_a_model_whose_heads_cannot_be_shared_out_is_told_and_the_other_rows_stand(
    labctl: Labctl, models: Path
) -> None:
    ran = labctl("fit", models / "SmolLM2-135M", "-p", "dgxh")
    assert ran.code == 0
    assert "do not divide the 9 query and 3 key-value heads" in ran.out
    assert "unsupported: this backend cannot run the model on these GPUs; the reason is below" in ran.out
    assert "does not" not in ran.out
    hf, staged, vllm = labctl("fit", models / "SmolLM2-135M", "-p", "dgxh", "--json").json["cases"]
    assert (hf["verdict"], staged["verdict"], vllm["verdict"]) == (FITS, FITS, UNSUPPORTED)
    assert vllm["remedy"] == "use --parallel pipeline; or --gpus 1"
    (shared,) = labctl(
        "fit", models / "SmolLM2-135M", "-p", "dgxh", "--backend", "vllm", "--parallel", "pipeline=3,data=2", "--json"
    ).json["cases"]
    assert (shared["verdict"], shared["gpus"], shared["parallel"]) == (FITS, 6, "pipeline=3,data=2")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["-p", "local"], "gpu_memory_gib"),
        (["-p", "dgxx"], "dgx"),
        (["--batch-size", "0"], "--batch-size out of range: 0"),
        (["--dtype", "int4"], "unknown --dtype: 'int4'\n  -> give one of auto, float16"),
        (["--gpu-memory-utilization", "0"], "--gpu-memory-utilization out of range: 0"),
        (["--gpus", "0"], "give a number from 1 to 1024"),
        (["--gpus", "2", "--parallel", "tensor=4"], "needs 4 GPUs"),
        (["--backend", "hf", "--parallel", "tensor"], "backend hf has no --parallel tensor"),
    ],
)
def test_what_fit_cannot_answer_is_one_clear_message(labctl: Labctl, models: Path, more: list[str], said: str) -> None:
    ran = labctl("fit", models / "Llama-2-7B", *more)
    assert ran.code == 2
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_a_model_of_another_family_is_refused_with_those_that_are_known(
    workspace: Workspace, labctl: Labctl, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "mamba"}', encoding="utf-8")
    ran = labctl("fit", tmp_path / "m")
    assert ran.code == 3
    assert "'mamba'" in ran.err
    assert "llama" in ran.err


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"model_type": "llama"}', '{"model_type": "llama", "hidden_size": "4096"}']
)
def test_a_config_that_cannot_be_right_is_one_clear_message(
    workspace: Workspace, labctl: Labctl, tmp_path: Path, text: str
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(text, encoding="utf-8")
    ran = labctl("fit", tmp_path / "m")
    assert ran.code in (2, 3)
    assert ran.err.count("\n  -> ") == 1
    assert "Traceback" not in ran.err


# ---------------------------------------------------------------- numbers instead of a model


def test_fit_needs_no_model_but_a_number_of_parameters(labctl: Labctl, workspace: Workspace) -> None:
    told = labctl("fit", "--parameters", "13B", "-p", "dgx2", "--json").json
    assert abs(told["parameters"] - 13e9) < 13e6
    assert told["from"] == "flags"
    assert len(told["parameters_of"]["layers"]) == 40
    assert told["kv_bytes_per_token"] == 819_200  # as of Llama 2 13B


@pytest.mark.parametrize("name", ["Llama-2-7B", "Llama-2-13B", "Llama-3-70B", "TinyLlama-1.1B"])
def test_the_numbers_of_a_model_card_give_the_memory_of_the_model(labctl: Labctl, models: Path, name: str) -> None:
    config, count = PUBLIC[name]
    flags = {
        "--parameters": count, "--layers": config["num_hidden_layers"], "--hidden-size": config["hidden_size"],
        "--heads": config["num_attention_heads"], "--kv-heads": config.get("num_key_value_heads", config["num_attention_heads"]),
    }  # fmt: skip
    words = [str(word) for pair in flags.items() for word in pair]
    by_numbers, by_model = (
        labctl("fit", *one, "-p", "dgxh", "--backend", "hf", "--json").json["cases"][0]
        for one in (words, [models / name])
    )
    assert by_numbers["needed_bytes"] == pytest.approx(by_model["needed_bytes"], rel=0.02)
    assert by_numbers["verdict"] == by_model["verdict"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parameters", "many"], "not a number of parameters"),
        (["--parameters", "0B"], "not a number of parameters"),
        (["--parameters", "7B", "org/model"], "several models given"),
        (["--layers", "32"], "no model given"),
        (["org/model", "--layers", "32"], "dimensions need --parameters"),
        (["--parameters", "7B", "--heads", "7"], "do not fit together"),
        (["--parameters", "1B", "--layers", "900", "--hidden-size", "8192"], "more than 1,000,000,000 parameters"),
    ],
)
def test_numbers_that_describe_no_model_are_one_clear_message(
    labctl: Labctl, workspace: Workspace, flags: list[str], message: str
) -> None:
    ran = labctl("fit", *flags)
    assert ran.code == 2
    assert message in ran.err and ran.err.count("\n  -> ") == 1


def test_fit_takes_the_engine_options_that_change_memory(labctl: Labctl, models: Path) -> None:
    line = ("fit", models / "Llama-2-7B", "-p", "dgxh", "--backend", "vllm", "--json")

    def answer(*more: str) -> dict[str, Any]:
        (found,) = json.loads(labctl(*line, *more).out)["cases"]
        return dict(found)

    plain = answer()
    small = answer("--engine-option", "quantization=fp8_per_tensor", "--engine-option", "kv_cache_dtype=fp8")
    assert small["vllm"]["weights_bytes"] < 0.55 * plain["vllm"]["weights_bytes"]
    assert small["vllm"]["kv_blocks"] > 2 * plain["vllm"]["kv_blocks"]
    assert small["largest_batch"] > 2 * plain["largest_batch"]
    assert answer("--engine-option", "gpu_memory_utilization=0.5") == answer("--gpu-memory-utilization", "0.5")


def test_fit_says_what_a_v100_lacks_instead_of_figures(labctl: Labctl, models: Path) -> None:
    line = ("fit", models / "Llama-2-7B", "-p", "dgx2", "--backend", "vllm", "--engine-option", "kv_cache_dtype=fp8")
    (found,) = json.loads(labctl(*line, "--json").out)["cases"]
    assert found["verdict"] == UNSUPPORTED
    assert found["refused"] == "vLLM's FP8 KV cache needs compute capability 7.5 or later: a V100 has 7.0"
    assert "a V100 has 7.0 -> remove kv_cache_dtype" in " ".join(labctl(*line).out.split())


def test_fit_refuses_an_unknown_engine_option(labctl: Labctl, models: Path) -> None:
    ran = labctl("fit", models / "Llama-2-7B", "--backend", "vllm", "--engine-option", "quantisation=fp8")
    assert ran.code == 2
    assert "no engine option 'quantisation'" in ran.err and "quantization" in ran.err
