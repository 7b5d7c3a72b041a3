"""Stages give transformers' own tokens: every family, batches of unequal prompts, greedy and sampled, over two CPU devices.

What needs a GPU - captured graphs, streams, copies between devices - is held by tests/benchmarks/staged_tokens.py.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labctl_workers import measure
from labctl_workers.engines import make_engine
from labctl_workers.engines.base import Arrivals, Generated
from labctl_workers.engines.layers import check_weights_fit, device_map, weighed_split
from labctl_workers.engines.staged import check, compiling, pipeline, stages
from labctl_workers.engines.staged import engine as staged
from labctl_workers.engines.staged.engine import StagedEngine
from labctl_workers.engines.staged.pipeline import AHEAD, SLOTS, Bucket, bucket_of, holds, read_lengths
from labctl_workers.record import JobSpec, ModelRef, Refusal, RunSpec, Sampling, Workload

from .families import FAMILIES, build
from .faults import FAULTS
from .models import smollm2  # noqa: F401  a fixture
from .reference import PROMPTS, generated, greedy_tokens, model_of, sampled_tokens
from .reference import answers as answers_of
from .test_hf import edit, needs_torch, quiet  # noqa: F401  a fixture

CACHE = Path("no-such-cache")
NEW_TOKENS = 24
# bfloat16 rounds most: every family and every fault is tried in it; in the others one of each, and the rest in make nightly.
DTYPES = ("float32", "bfloat16", "float16")


def job(
    folder: Path,
    *,
    gpus: int = 2,
    runs: Sequence[RunSpec] = (),
    dtype: str = "float32",
    backend: str = "staged",
    **options: Any,
) -> JobSpec:
    if backend == "staged":
        options = {"compile": False, **options}
    return JobSpec(
        "j", "local", "local", backend, ModelRef("tiny", path=str(folder)), dtype, "cpu", gpus, list(runs),
        {"p": PROMPTS}, engine_options=options, raw_prompt=True,
    )  # fmt: skip


def loaded(folder: Path, **values: Any) -> Any:
    engine = make_engine(job(folder, **values), CACHE)
    engine.load()
    return engine


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoints by family, each made when it is first asked for."""
    needs_torch()
    folder = tmp_path_factory.mktemp("families")
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = build(folder / family, family)
        return made[family]

    return of


@pytest.fixture(scope="module")
def llama(checkpoints: Any) -> Path:
    folder: Path = checkpoints("llama")
    return folder


@pytest.fixture(scope="module")
def engine(llama: Path) -> Any:
    return loaded(llama)


# ---------------------------------------------------------------- where the layers go


@pytest.mark.parametrize(
    ("layers", "head", "count", "expected"),
    [
        ([1] * 4, 0, 2, [2, 2]),
        ([1] * 5, 0, 2, [3, 2]),
        ([88] * 22, 131, 2, [12, 10]),  # TinyLlama's dimensions: the head is as a layer and a half
        ([1] * 4, 10, 2, [3, 1]),  # a stage has a layer, however heavy the head
        ([1] * 7, 0, 3, [3, 2, 2]),
        ([5, 1, 1, 1], 0, 2, [1, 3]),
        ([1] * 3, 0, 1, [3]),
        ([1] * 3, 2, 3, [1, 1, 1]),
    ],
)
def test_layers_are_split_so_that_each_stage_reads_as_much(
    layers: list[int], head: int, count: int, expected: list[int]
) -> None:
    assert weighed_split(layers, head, count) == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 20), st.integers(1, 4))
def test_no_other_split_has_a_lighter_fullest_stage(layers: list[int], head: int, count: int) -> None:
    if count > len(layers):
        with pytest.raises(ValueError, match="cannot be split"):
            weighed_split(layers, head, count)
        return

    def fullest(cuts: Sequence[int]) -> int:
        parts = [sum(layers[a:b]) for a, b in itertools.pairwise([0, *cuts, len(layers)])]
        return max([*parts[:-1], parts[-1] + head])

    found = weighed_split(layers, head, count)
    assert sum(found) == len(layers)
    assert min(found) >= 1
    every = itertools.combinations(range(1, len(layers)), count - 1)
    assert fullest(list(itertools.accumulate(found))[:-1]) == min(map(fullest, every))


# ---------------------------------------------------------------- shapes


def test_a_bucket_just_holds_its_batch() -> None:
    assert bucket_of(1, 32, 128, 2) == Bucket(length=160, rows=1, micro_batches=1)
    assert bucket_of(1, 33, 129, 2) == Bucket(length=192, rows=1, micro_batches=1)
    assert bucket_of(1, 1, 1, 1) == Bucket(length=SLOTS, rows=1, micro_batches=1)
    assert bucket_of(3, 32, 128, 2).micro_batches == 1  # too few for both stages to have work
    assert bucket_of(64, 32, 128, 2) == Bucket(length=160, rows=32, micro_batches=2)
    assert bucket_of(9, 32, 128, 2) == Bucket(length=160, rows=5, micro_batches=2)
    assert bucket_of(64, 32, 128, 1) == Bucket(length=160, rows=64, micro_batches=1)


def test_a_batch_runs_in_a_bucket_that_is_not_much_too_large() -> None:
    needed = Bucket(160, 5, 2)
    assert holds(Bucket(160, 5, 2), needed)
    assert holds(Bucket(320, 10, 2), needed)
    assert not holds(Bucket(128, 5, 2), needed)
    assert not holds(Bucket(160, 4, 2), needed)
    assert not holds(Bucket(160, 11, 2), needed)
    assert not holds(Bucket(160, 5, 1), needed)


def test_a_part_of_the_cache_is_read_where_that_spares_a_share_of_the_step() -> None:
    assert read_lengths(160, 22_528, 2_070_000_000, 0.1) == (160,)  # TinyLlama's dimensions, one sequence
    assert read_lengths(4096, 64 * 22_528, 2_070_000_000, 0.1) == (256, 512, 1024, 2048, 4096)
    assert read_lengths(4096, 64 * 22_528, 2_070_000_000, 0.5) == (4096,)
    assert read_lengths(SLOTS, 1, 0, 0.1) == (SLOTS,)


@given(st.integers(1, 200), st.integers(0, 10**9), st.integers(0, 10**10))
def test_the_reads_of_a_cache_ascend_to_its_length(length: int, a_slot: int, weights: int) -> None:
    reads = read_lengths(length * SLOTS, a_slot, weights, 0.1)
    assert reads == tuple(sorted(set(reads)))
    assert reads[-1] == length * SLOTS
    assert all(read % SLOTS == 0 for read in reads)


# ---------------------------------------------------------------- tokens


@pytest.mark.model
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_every_family_are_generates(checkpoints: Any, family: str) -> None:
    made = loaded(checkpoints(family))
    assert len(made.pipeline.stages) == 2
    prompts = made.encode(PROMPTS)
    expected = greedy_tokens(checkpoints(family), prompts, NEW_TOKENS)
    assert len({tuple(ids) for ids in expected}) > len(PROMPTS) // 2
    assert generated(made, prompts, 1, NEW_TOKENS) == expected
    assert generated(made, prompts, len(PROMPTS), NEW_TOKENS) == expected


@pytest.mark.model
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_the_attention_that_was_asked_for_is_the_one_that_is_stood_in_for(checkpoints: Any, family: str) -> None:
    """Gemma 2 caps its scores in eager attention alone, as transformers does."""
    made = loaded(checkpoints(family), attn_implementation="eager")
    prompts = made.encode(PROMPTS)
    expected = greedy_tokens(checkpoints(family), prompts, NEW_TOKENS, attn_implementation="eager")
    assert generated(made, prompts, len(PROMPTS), NEW_TOKENS) == expected


@pytest.mark.model
@pytest.mark.parametrize("decode_with", ["matmul", "reduce"])
def test_every_way_to_attend_gives_the_same_tokens(
    llama: Path, engine: Any, decode_with: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(stages.DECODE_WITH, False, decode_with)
    other = loaded(llama)
    assert other.model.config._attn_implementation.endswith(decode_with)
    prompts = engine.encode(PROMPTS)
    for batch in (1, 8):
        assert generated(other, prompts, batch, NEW_TOKENS) == generated(engine, prompts, batch, NEW_TOKENS)


@pytest.mark.model
@pytest.mark.parametrize("gpus", [0, 1, 3, 5])
def test_any_number_of_stages_gives_the_same_tokens(llama: Path, engine: Any, gpus: int) -> None:
    made = loaded(llama, gpus=gpus)
    assert len(made.pipeline.stages) == max(1, gpus)
    prompts = engine.encode(PROMPTS)
    for batch in (1, 7, 8):
        assert generated(made, prompts, batch, NEW_TOKENS) == generated(engine, prompts, 1, NEW_TOKENS)


@pytest.mark.model
@pytest.mark.parametrize("batch", [2, 3, 4, 5, 8])
def test_micro_batches_and_padding_change_no_token(engine: Any, batch: int) -> None:
    prompts = engine.encode(PROMPTS)
    assert generated(engine, prompts, batch, NEW_TOKENS) == generated(engine, prompts, 1, NEW_TOKENS)


@pytest.mark.model
def test_a_long_prompt_is_taken_up_in_pieces(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = engine.encode(PROMPTS)
    whole = generated(engine, prompts, 4, NEW_TOKENS)
    scores = engine.log_probabilities(prompts[5], whole[5])
    monkeypatch.setattr(pipeline, "PREFILL_TOKENS", 10)
    assert generated(engine, prompts, 4, NEW_TOKENS) == whole
    assert engine.log_probabilities(prompts[5], whole[5]) == pytest.approx(scores, abs=1e-4)


@pytest.mark.model
def test_a_step_that_reads_a_part_of_the_cache_gives_the_same_tokens(
    llama: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "WORTH_A_GRAPH", 0.0)
    made = loaded(llama)
    prompts = engine.encode(PROMPTS)
    assert generated(made, prompts, 4, 100) == generated(engine, prompts, 4, 100)
    assert any(len(reads) > 1 for prepared in made.pipeline.prepared.values() for reads in prepared.reads)


@pytest.mark.model
def test_a_real_model_over_two_stages_says_what_generate_says(smollm2: Path) -> None:  # noqa: F811
    made = make_engine(JobSpec(**{**vars(job(smollm2)), "raw_prompt": False}), CACHE)
    made.load()
    prompts = made.encode(["Explain tensor parallelism in 5 bullet points.", "Hi"])
    assert generated(made, prompts, 2, 16) == greedy_tokens(smollm2, prompts, 16)


# ---------------------------------------------------------------- sampling


@pytest.mark.model
@pytest.mark.parametrize("sampling", [Sampling(0.8, 0.9, 5), Sampling(1.3, 1.0, 0), Sampling(1.0, 0.3, 2**32 - 1)])
def test_sampled_tokens_are_those_of_a_plain_sampler_with_the_same_random_numbers(
    llama: Path, engine: Any, sampling: Sampling
) -> None:
    prompts = engine.encode(PROMPTS)
    expected = sampled_tokens(llama, prompts, NEW_TOKENS, sampling)
    assert generated(engine, prompts, len(PROMPTS), NEW_TOKENS, sampling) == expected
    assert expected != generated(engine, prompts, len(PROMPTS), NEW_TOKENS)


@pytest.mark.model
def test_micro_batches_draw_what_the_whole_batch_would(llama: Path, engine: Any) -> None:
    sampling = Sampling(1.0, 0.95, 3)
    prompts = engine.encode(PROMPTS)
    alone = loaded(llama, gpus=1)  # one stage has no micro-batches
    assert generated(engine, prompts, 8, NEW_TOKENS, sampling) == generated(alone, prompts, 8, NEW_TOKENS, sampling)


@pytest.mark.model
def test_a_seed_draws_the_same_again_and_another_seed_other_tokens(engine: Any) -> None:
    prompts = engine.encode(PROMPTS)
    first = generated(engine, prompts, 4, NEW_TOKENS, Sampling(1.0, 1.0, 7))
    assert generated(engine, prompts, 4, NEW_TOKENS, Sampling(1.0, 1.0, 7)) == first
    assert generated(engine, prompts, 4, NEW_TOKENS, Sampling(1.0, 1.0, 8)) != first


@pytest.mark.model
def test_a_tiny_top_p_leaves_the_most_likely_token_alone(engine: Any) -> None:
    prompts = engine.encode(PROMPTS)
    assert generated(engine, prompts, 8, NEW_TOKENS, Sampling(1.0, 1e-6, 3)) == generated(
        engine, prompts, 8, NEW_TOKENS
    )


@pytest.mark.model
def test_tokens_are_drawn_as_often_as_their_probabilities_say() -> None:
    needs_torch()
    import torch

    from labctl_workers.engines.staged.pipeline import Noise, draw

    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(40_000, 4)
    noise = Noise("cpu", 1).draw_step(40_000, 4)
    drawn = draw(logits, noise, temperature=0.5, top_p=1.0).flatten().bincount(minlength=4) / 40_000
    assert drawn.tolist() == pytest.approx((logits[0] / 0.5).softmax(0).tolist(), abs=0.01)
    cut = draw(logits, noise, temperature=0.5, top_p=0.9).flatten().bincount(minlength=4) / 40_000
    assert cut.tolist() == pytest.approx([0.881, 0.119, 0, 0], abs=0.01)  # 0.865 alone are not 0.9


# ---------------------------------------------------------------- ends and times


@pytest.mark.model
def test_an_answer_ends_with_its_end_token_and_ignoring_it_goes_on(llama: Path, engine: Any, tmp_path: Path) -> None:
    import shutil

    prompts = engine.encode(PROMPTS)
    whole = generated(engine, prompts, 8, NEW_TOKENS)
    end = whole[2][9]
    other = shutil.copytree(llama, tmp_path / "other")
    edit(other / "generation_config.json", eos_token_id=[2, end])
    made = loaded(other)
    answers: list[Generated] = answers_of(made, prompts, Arrivals(8), max_new_tokens=NEW_TOKENS)
    for answer, ids in zip(answers, whole, strict=True):
        ended = next((place for place, token in enumerate(ids) if token in (2, end)), None)
        assert answer.token_ids == (ids if ended is None else ids[: ended + 1])
        assert answer.finish_reason == ("length" if ended is None else "stop")
        assert len(answer.token_times) == len(answer.token_ids)
    assert answers[2].finish_reason == "stop"
    assert generated(made, prompts, 8, NEW_TOKENS) == whole


@pytest.mark.model
def test_nothing_is_decoded_long_after_every_sequence_has_ended(
    llama: Path, tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    (prompt, *_) = engine.encode(PROMPTS)
    ids = generated(engine, [prompt], 1, NEW_TOKENS)[0]
    other = shutil.copytree(llama, tmp_path / "other")
    edit(other / "generation_config.json", eos_token_id=ids[4])
    made = loaded(other)
    steps = 0
    count = stages.Stage.step

    def counted(stage: Any, *positional: Any) -> None:
        nonlocal steps
        steps += stage.index == 0
        count(stage, *positional)

    monkeypatch.setattr(stages.Stage, "step", counted)
    answers_of(made, [prompt], Arrivals(1), max_new_tokens=200)
    assert steps <= ids.index(ids[4]) + AHEAD


@pytest.mark.model
def test_there_is_one_ascending_time_for_each_token(engine: Any) -> None:
    import time

    handed = time.perf_counter()
    answers = answers_of(engine, engine.encode(PROMPTS), Arrivals(8), max_new_tokens=NEW_TOKENS, ignore_eos=True)
    returned = time.perf_counter()
    for answer in answers:
        assert len(answer.token_times) == len(answer.token_ids) == NEW_TOKENS
        assert all(earlier < later for earlier, later in itertools.pairwise(answer.token_times))
        assert handed <= answer.handed_at < answer.token_times[0]
        assert answer.token_times[-1] <= returned


@pytest.mark.model
def test_the_first_requests_tokens_are_told_as_they_come(engine: Any) -> None:
    told: list[int] = []
    answers = answers_of(
        engine, engine.encode(PROMPTS), Arrivals(8), max_new_tokens=5, ignore_eos=True, on_token=told.append
    )
    assert told == answers[0].token_ids


@pytest.mark.model
def test_answers_of_different_lengths_in_a_batch_are_the_beginnings_of_the_longest(engine: Any) -> None:
    prompts = engine.encode(PROMPTS)
    longest = generated(engine, prompts, 8, NEW_TOKENS)
    lengths = [1, NEW_TOKENS, 3, 5, 2, 1, 4, 6]
    answers = answers_of(engine, prompts, Arrivals(8), max_new_tokens=lengths, ignore_eos=True)
    assert [a.token_ids for a in answers] == [ids[:n] for ids, n in zip(longest, lengths, strict=True)]
    assert [len(answer.token_times) for answer in answers] == lengths
    assert [answer.prompt_tokens for answer in answers] == [len(token_ids) for token_ids in prompts]


@pytest.mark.model
def test_one_new_token_is_one_token(engine: Any) -> None:
    assert [len(ids) for ids in generated(engine, engine.encode(PROMPTS), 8, 1)] == [1] * 8


# ---------------------------------------------------------------- scores and memory


@pytest.mark.model
@pytest.mark.parametrize("family", ["llama-tied", "gemma2"])
def test_log_probabilities_are_those_of_the_models_own_forward(checkpoints: Any, family: str) -> None:
    import torch

    made = loaded(checkpoints(family))
    (prompt, *_) = made.encode(PROMPTS)
    chosen = [10, 11, 200]
    ids = [*prompt, *chosen]
    with torch.no_grad():
        logits = model_of(checkpoints(family), "cpu")(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(chosen)]
    assert made.log_probabilities(prompt, chosen) == pytest.approx(expected, abs=1e-4)
    assert made.log_probabilities(prompt, []) == []


@pytest.mark.model
def test_stages_hold_as_many_weights_as_the_model_has(llama: Path, engine: Any) -> None:
    hf = loaded(llama, backend="hf")
    (staged_memory,), (hf_memory,) = engine.memory(), hf.memory()
    assert staged_memory.weights_bytes == hf_memory.weights_bytes
    weights, caches = hf.read_bytes_per_step(0, 1), hf.read_bytes_per_step(10, 4) - hf.read_bytes_per_step(0, 1)
    assert engine.read_bytes_per_step(10, 3) == hf.read_bytes_per_step(10, 3)
    # From 4 sequences on, two stages have two micro-batches: each reads all weights, and its own half of the caches.
    assert [engine.gpus_at_once(3), engine.gpus_at_once(4), hf.gpus_at_once(4)] == [1, 2, 1]
    assert engine.read_bytes_per_step(10, 4) == 2 * weights + caches


@pytest.mark.model
def test_the_cache_is_as_long_as_the_run_needs(engine: Any) -> None:
    prompts = engine.encode(["hello"])
    generated(engine, prompts, 1, 8)
    (memory,) = engine.memory()
    a_token = 2 * 5 * 2 * 16 * 4  # keys and values of 5 layers, 2 heads of 16 numbers of 4 bytes
    assert memory.kv_cache_used_bytes == a_token * (len(prompts[0]) + 8 - 1)
    assert memory.kv_cache_reserved_bytes == a_token * engine.pipeline.slots


def run_of(new_tokens: int | None, batch_size: int = 1, **values: Any) -> RunSpec:
    return RunSpec("r", {}, "p", new_tokens, batch_size=batch_size, **values)


@pytest.mark.model
def test_what_the_jobs_runs_need_is_ready_when_the_engine_is(llama: Path) -> None:
    made = loaded(llama, runs=[run_of(8), run_of(24, 8)])
    longest = max(map(len, made.encode(PROMPTS)))
    ready = set(made.pipeline.prepared)
    assert ready == {bucket_of(1, longest, 8, 2), bucket_of(8, longest, 24, 2)}
    generated(made, made.encode(PROMPTS), 8, 24)
    generated(made, made.encode(PROMPTS)[5:6], 1, 8)
    assert set(made.pipeline.prepared) == ready


@pytest.mark.model
def test_requests_that_come_at_a_rate_find_buckets_for_small_batches_too(llama: Path) -> None:
    made = make_engine(job(llama, runs=[run_of(8, 6, request_rate=2.0)]), CACHE)
    made.load()
    sizes = {bucket.rows * bucket.micro_batches for bucket in made.pipeline.prepared}
    assert sizes == {1, 2, 4, 6}


@pytest.mark.model
def test_a_run_that_cannot_fit_is_refused_with_the_figures_and_others_are_not(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault injection: a device with little memory left."""
    monkeypatch.setattr(pipeline.Pipeline, "free_bytes", lambda self, stage: 2 * 2**20)
    made = loaded(llama, runs=[run_of(8), run_of(24, 4000)])
    assert "a run will fail" in capsys.readouterr().out
    prompts = made.encode(PROMPTS)
    assert len(generated(made, prompts[:1], 1, 8)) == 1
    with pytest.raises(Refusal) as caught:
        generated(made, [prompts[0]] * 4000, 4000, 24)
    assert caught.value.kind == "does-not-fit"
    assert "GiB" in caught.value.message
    assert "smaller batch" in caught.value.remedy


@pytest.mark.model
def test_weights_that_no_gpu_can_hold_are_refused_before_they_are_read(llama: Path) -> None:
    model = model_of(llama, "cpu")
    placed = device_map(model, 2, tied=False, counts=[3, 2])
    layer = 64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 96 + 2 * 64
    first, last = 2 * (259 * 64 + 3 * layer), 2 * (259 * 64 + 2 * layer + 64)
    check_weights_fit(model, placed, 2, [first, last])
    for free in ([first - 1, last], [first, last - 1]):
        with pytest.raises(Refusal) as caught:
            check_weights_fit(model, placed, 2, free)
        assert caught.value.kind == "does-not-fit"
        assert "GiB of weights" in caught.value.message


@pytest.mark.model
@pytest.mark.parametrize("modules", ["every", "all but the layers' own"])
def test_what_accelerates_hooks_leave_behind_hides_nothing(llama: Path, modules: str) -> None:
    """On GPUs the model is loaded with a hook on every module; here they are put on by hand."""
    import torch
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = model_of(llama, "cpu")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = model(ids).logits
    for module in model.modules() if modules == "every" else [model, model.model, *model.model.layers]:
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    model.hf_device_map = {"": "cpu"}
    staged._detach(model)
    assert not any("forward" in module.__dict__ or "_hf_hook" in module.__dict__ for module in model.modules())
    with torch.no_grad():
        assert model(ids).logits.equal(expected)


# ---------------------------------------------------------------- what is refused


def refused(load: Callable[[], Any]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        load()
    return caught.value


@pytest.mark.model
@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "rotary embedding")],
)
def test_a_model_that_stages_cannot_run_is_refused_and_nothing_else_runs(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    needs_torch()
    folder = build(tmp_path / "checkpoint", "llama", **changes)
    error = refused(lambda: loaded(folder))
    assert error.kind == "not-stageable"
    assert reason in error.message
    assert "--backend hf" in error.remedy


def test_what_the_configuration_tells_is_refused_before_the_queue(tmp_path: Path) -> None:
    def kinds(config: dict[str, Any], **options: Any) -> list[str]:
        asked = job(tmp_path, **options)
        return [refusal.kind for refusal in StagedEngine.foreseen(asked, SimpleNamespace(**config), None)]

    assert kinds({"num_hidden_layers": 4}) == []
    assert kinds({"num_hidden_layers": 1}) == ["too-many-gpus"]
    assert kinds({"rope_scaling": {"rope_type": "longrope"}}) == ["not-stageable"]
    assert kinds({"rope_scaling": {"rope_type": "llama3"}}) == []
    assert kinds({"layer_types": ["full_attention", "linear_attention"]}) == ["not-stageable"]
    assert kinds({}, compile=True) == ["no-gpu"]


@pytest.mark.model
def test_an_architecture_without_the_parts_is_refused() -> None:
    needs_torch()
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(stages.Unstageable, match="GPT2LMHeadModel has no"):
        stages.read_structure(model)


@pytest.mark.model
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(family, dtype, marks=[] if family == "llama" or dtype == "bfloat16" else pytest.mark.nightly)
        for family, dtype in itertools.product(FAMILIES, DTYPES)
    ],
)
def test_no_family_is_refused_for_its_rounding(checkpoints: Any, family: str, dtype: str) -> None:
    made = loaded(checkpoints(family), dtype=dtype, runs=[run_of(NEW_TOKENS), run_of(NEW_TOKENS, 8)])
    assert 0 <= made.checked.layers <= check.MAX_RATIO
    assert 0 <= made.checked.logits <= check.MAX_RATIO


@pytest.mark.model
@pytest.mark.parametrize(
    ("fault", "dtype"),
    [
        pytest.param(fault, dtype, marks=[] if place == 0 or dtype == "bfloat16" else pytest.mark.nightly)
        for (place, fault), dtype in itertools.product(enumerate(FAULTS), DTYPES)
    ],
)
def test_every_fault_is_refused_in_every_dtype(llama: Path, dtype: str, fault: str) -> None:
    """Fault injection: what an engine of its own may get wrong, each in one layer or one place alone."""
    runs = [run_of(NEW_TOKENS), run_of(NEW_TOKENS, 8)]
    with FAULTS[fault]():
        error = refused(lambda: loaded(llama, dtype=dtype, runs=runs))
    assert error.kind == "not-stageable"
    assert "differ" in error.message


# ---------------------------------------------------------------- what is told


@pytest.mark.model
def test_a_record_tells_the_split_what_was_made_ready_and_how_close_it_came(llama: Path) -> None:
    made = loaded(llama, runs=[run_of(8)])
    told = json.loads(json.dumps(made.fingerprint().to_json()))
    assert told["compiled"] is False
    assert sum(told["stages"]["layers"]) == 5
    assert [bucket["rows"] for bucket in told["stages"]["buckets"]] == [1]
    assert told["stages"]["compile_s"] == 0
    assert told["stages"]["check_s"] > 0
    assert set(told["stages"]["error_to_own"]) == {"logits", "layers"}
    assert all(math.isfinite(value) for value in told["stages"]["predicted_bytes"].values())


# ---------------------------------------------------------------- compiled


@pytest.mark.model
def test_a_run_of_many_lengths_needs_few_shapes_and_gives_the_tokens_of_transformers(llama: Path) -> None:
    workload = Workload("min=5,max=120", "min=2,max=40", prefix_len=3, seed=1)
    run = run_of(None, 4, requests=40, repeats=1, warmup=0, ignore_eos=True, workload=workload)
    made, hf = loaded(llama, runs=[run]), loaded(llama, backend="hf")
    ready = set(made.pipeline.prepared)
    assert len(ready) <= 3
    ours, theirs = (measure.Requests(engine, run, []) for engine in (made, hf))
    assert ours.of(0) == theirs.of(0)
    _, (measured,) = measure.measure_run(ours, [], measure.Watch(lambda phase: None))
    assert set(made.pipeline.prepared) == ready  # nothing is prepared while a clock runs
    _, (expected,) = measure.measure_run(theirs, [], measure.Watch(lambda phase: None))
    assert [sample.token_ids for sample in measured.samples] == [sample.token_ids for sample in expected.samples]
    lengths = [(len(request.token_ids), request.max_new_tokens) for request in ours.of(0)]
    assert [(sample.prompt_tokens, len(sample.token_ids)) for sample in measured.samples] == lengths


@pytest.mark.model
def test_every_part_of_a_step_compiles_whole_and_one_layer_serves_all(
    llama: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without inductor, which needs minutes here: what is proved is that the graphs have no breaks, and how few they are; the
    check must ask the functions that the steps have, and not have others compiled."""
    import torch
    from torch._dynamo.utils import counters

    def traced() -> stages.Functions:
        compiling.allow_many_shapes()
        parts = [
            torch.compile(part, fullgraph=True, dynamic=False, backend="eager")
            for part in (stages.enter, stages.run_layer, stages.leave)
        ]
        return stages.Functions(*parts, torch.compile(stages.run_layer, fullgraph=True, dynamic=True, backend="eager"))

    monkeypatch.setattr(compiling, "functions", traced)
    torch._dynamo.reset()
    counters.clear()
    made = make_engine(job(llama, runs=[run_of(NEW_TOKENS)]), CACHE)
    made.compiled = True
    monkeypatch.setattr(made, "before_import", lambda: None)  # it refuses a CPU
    made.load()
    # Two entries (of tokens, of a hidden state), one layer of five, one end; and one layer for prompts of one row.
    assert counters["stats"]["unique_graphs"] == 5
    prompts = engine.encode(PROMPTS)
    assert generated(made, prompts, 1, NEW_TOKENS) == generated(engine, prompts, 1, NEW_TOKENS)
    assert counters["stats"]["unique_graphs"] == 5  # what was not made ready is not compiled while a clock runs


@pytest.mark.model
def test_compiled_steps_need_a_gpu(llama: Path) -> None:
    assert refused(lambda: loaded(llama, compile=True)).kind == "no-gpu"


def test_what_is_compiled_is_kept_below_the_cache_unless_the_user_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_torch()
    import importlib.metadata
    import os

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    staged.keep_compiled(tmp_path)
    version = importlib.metadata.version("torch")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / f"torch-{version}" / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
