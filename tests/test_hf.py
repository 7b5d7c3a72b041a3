"""The transformers engine on a tiny random Llama, on the CPU: its tokens are transformers' own, its times are its tokens'."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labctl_workers.engines import hf, make_engine
from labctl_workers.engines.architectures import has_kernels
from labctl_workers.engines.base import Arrivals, Generated, Request
from labctl_workers.engines.hf import TransformersEngine
from labctl_workers.engines.layers import device_map
from labctl_workers.measure import Requests, Watch, measure_run
from labctl_workers.probe import installed_versions
from labctl_workers.record import JobSpec, ModelRef, Refusal, RunSpec, Sampling
from tests import reference
from tests.parts import fail_or_skip
from tests.reference import tokens

CACHE = Path("no-such-cache")  # nothing is compiled here
VOCABULARY = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(77))]
PROMPTS = ["w1 w2 w3", "w5", "w9 w8 w7 w6 w5 w4"]
GREEDY = Sampling()


def job(folder: Path | str, **values: Any) -> JobSpec:
    asked: dict[str, Any] = {
        "job_id": "j",
        "partition": "local",
        "executor": "local",
        "backend": "hf",
        "model": ModelRef("tiny", path=str(folder)),
        "dtype": "float32",
        "device": "cpu",
        "gpus": 1,
        "runs": [],
        "prompt_sets": {},
    }
    return JobSpec(**{**asked, **values})


def refusal(action: Callable[[], object]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        action()
    assert caught.value.message
    assert caught.value.remedy
    return caught.value


# ---------------------------------------------------------------- which GPUs a torch build has code for

TODAY = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["sm_70", "sm_80"], (7, 0), True),
        (["sm_80"], (7, 0), False),
        (TODAY, (7, 0), False),
        (["sm_70"], (7, 5), True),
        (["sm_75"], (7, 0), False),
        (["sm_80"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (TODAY, (9, 0), True),
        (["sm_90a"], (9, 0), True),
        (["sm_90a"], (10, 0), False),
        (["sm_100f"], (10, 0), True),
        (["sm_100f"], (10, 3), True),
        (["sm_103f"], (10, 0), False),
        (["sm_100f"], (12, 0), False),
        (["compute_100f"], (12, 0), False),
        (["sm_80", "compute_80"], (9, 0), True),
        (["what", "sm_"], (9, 0), False),
        (TODAY, (10, 3), True),
        (TODAY, (12, 1), True),
        (["compute_70"], (7, 0), True),
        (["compute_70"], (9, 0), True),
        (["sm_50", "compute_60"], (9, 0), True),
        (["compute_80"], (7, 0), False),
        ([], (9, 0), False),
        (["gfx90a"], (9, 0), False),
    ],
)
def test_a_torch_build_runs_on_a_gpu_that_it_has_code_for(
    architectures: list[str], capability: tuple[int, int], runs: bool
) -> None:
    assert has_kernels("{}.{}".format(*capability), architectures) is runs


def test_ptx_of_one_architecture_alone_is_not_compiled_for_a_newer_gpu() -> None:
    assert not has_kernels("10.0", ["compute_90a"])


def fake_torch(*, gpus: int = 2, capability: tuple[int, int] = (7, 0), architectures: Sequence[str] = ()) -> Any:
    """A fake of the part of torch that says what it sees: there is no GPU here."""
    cuda = SimpleNamespace(
        is_available=lambda: gpus > 0,
        device_count=lambda: gpus,
        get_arch_list=lambda: list(architectures),
        get_device_capability=lambda index: capability,
    )
    return SimpleNamespace(__version__="2.13.0+cu130", cuda=cuda, version=SimpleNamespace(cuda="13.0"))


def on_gpus(torch: Any) -> TransformersEngine:
    engine = TransformersEngine(job("m", device="cuda", gpus=2, partition="dgx2"), CACHE)
    engine.torch = torch
    return engine


def test_a_torch_that_sees_too_few_gpus_is_refused() -> None:
    error = refusal(on_gpus(fake_torch(gpus=0))._check_devices)
    assert error.kind == "torch-sees-fewer-gpus"
    assert "sees too few GPUs: 0 of 2" in error.message
    assert "partition dgx2" in error.remedy


def test_a_torch_without_code_for_the_gpu_is_refused_with_one_that_has_it() -> None:
    error = refusal(on_gpus(fake_torch(architectures=TODAY))._check_devices)
    assert error.kind == "no-kernel-image"
    assert "7.0" in error.message
    assert "labctl env -p dgx2" in error.remedy


def test_a_torch_with_code_for_the_gpu_passes() -> None:
    on_gpus(fake_torch(architectures=["sm_70"]))._check_devices()
    on_gpus(fake_torch(architectures=[]))._check_devices()  # a build that does not tell is not refused
    TransformersEngine(job("m"), CACHE)._check_devices()


@pytest.mark.parametrize("elsewhere", ["cpu", "disk"])
def test_a_layer_outside_of_the_gpus_is_refused(elsewhere: str) -> None:
    engine = on_gpus(fake_torch())
    engine.model = SimpleNamespace(hf_device_map={"model.embed_tokens": 0, "model.layers.7": elsewhere})
    error = refusal(engine._check_placement)
    assert error.kind == "offloaded"
    assert "model.layers.7" in error.message
    engine.model = SimpleNamespace(hf_device_map={"model.embed_tokens": 0, "model.layers.7": 1})
    engine._check_placement()


def test_a_python_without_torch_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault injection: importing torch fails."""
    monkeypatch.setitem(sys.modules, "torch", None)
    error = refusal(TransformersEngine(job("m", partition="dgxh"), CACHE).load)
    assert error.kind == "engine-missing"
    assert "torch" in error.message
    assert "labctl env -p dgxh" in error.remedy


def test_packages_that_are_not_installed_are_left_out_of_the_versions() -> None:
    assert set(installed_versions(["pytest", "no-such-package-of-anybody"])) == {"pytest"}


@pytest.mark.parametrize(
    ("row", "ends", "length", "reason"),
    [
        ([7, 2, 2, 2], {2}, 2, "stop"),
        ([2, 7, 7, 7], {2}, 1, "stop"),
        ([7, 8, 9, 2], {2}, 4, "stop"),
        ([7, 8, 9, 3], {2}, 4, "length"),
        ([7, 2, 9, 3], set(), 4, "length"),
        ([7, 5, 9, 2], {5, 2}, 2, "stop"),
        ([7, 8, 9, 3, 4], {4}, 4, "length"),  # the batch went on for a longer answer
        ([7, 8, 9, 2, 2], {2}, 4, "stop"),
    ],
)
def test_an_answer_is_cut_after_its_first_end_token_or_its_own_length_and_so_are_its_times(
    row: list[int], ends: set[int], length: int, reason: str
) -> None:
    times = [0.1, 0.2, 0.3, 0.4, 0.5]
    cut = hf.cut_at_end(Request(0, (1,), 4), row, times, ends, handed_at=7.0, prompt_tokens=1)
    assert cut == Generated(row[:length], times[:length], reason, 1, 7.0)


# ---------------------------------------------------------------- a tiny Llama, made here


def needs_torch() -> None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        fail_or_skip(f"not installed: {', '.join(missing)}")


def llama_config(**values: Any) -> Any:
    from transformers import LlamaConfig

    small = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "initializer_range": 0.4,  # wide enough that greedy text does not repeat itself
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**small, **values})


def word_tokenizer() -> Any:
    """A tokenizer of 80 words that puts <s> first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def make_checkpoint(folder: Path, **values: Any) -> Path:
    """A random Llama of 80 words and 3 layers; the same one each time."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(**values))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def edit(file: Path, **changes: Any) -> None:
    """Change some keys of a JSON file; None takes a key out."""
    values = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}), encoding="utf-8")


def loaded(folder: Path, **values: Any) -> Any:
    engine = make_engine(job(folder, **values), CACHE)
    engine.load()
    return engine


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """transformers draws no bars over the test's report, and no test asks a hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs_torch()
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model but that its head is its embeddings."""
    needs_torch()
    return make_checkpoint(tmp_path_factory.mktemp("tied") / "checkpoint", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Any:
    return loaded(tiny)


@pytest.fixture
def variant(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to change."""
    return shutil.copytree(tiny, tmp_path / "variant")


def answers(
    engine: Any,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_new_tokens: int = 12,
    sampling: Sampling = GREEDY,
    ignore_eos: bool = False,
) -> list[Generated]:
    asked = {"max_new_tokens": max_new_tokens, "sampling": sampling, "ignore_eos": ignore_eos}
    return reference.answers(engine, engine.encode(prompts), Arrivals(len(prompts)), **asked)


def argmax_tokens(engine: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy decoding without transformers' generate: the model alone, without a cache, one token after another."""
    import torch

    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(engine.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# ---------------------------------------------------------------- tokens


@pytest.mark.model
def test_requests_beyond_those_in_flight_wait_for_the_next_batch(engine: Any) -> None:
    asked = {"max_new_tokens": 6, "sampling": GREEDY, "ignore_eos": True}
    one_by_one = reference.answers(engine, engine.encode(PROMPTS), Arrivals(1), **asked)
    assert tokens(one_by_one) == tokens(answers(engine, max_new_tokens=6, ignore_eos=True))
    for before, after in itertools.pairwise(one_by_one):
        assert after.handed_at >= before.token_times[-1]


@pytest.mark.model
def test_greedy_tokens_are_those_of_transformers_generate(engine: Any, tiny: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    for token_ids, answer in zip(engine.encode(PROMPTS), answers(engine, max_new_tokens=24), strict=True):
        prompt = torch.tensor([token_ids])
        expected = theirs.generate(prompt, do_sample=False, max_new_tokens=24, pad_token_id=2)
        assert answer.token_ids == expected[0, prompt.shape[1] :].tolist()


@pytest.mark.model
def test_greedy_tokens_are_the_most_likely_ones_of_the_model_alone(engine: Any) -> None:
    for prompt, answer in zip(engine.encode(PROMPTS), answers(engine), strict=True):
        assert answer.token_ids == argmax_tokens(engine, prompt, 12)


@pytest.mark.model
def test_a_padded_batch_of_unequal_prompts_gives_the_tokens_of_each_alone(engine: Any) -> None:
    prompts = [*PROMPTS, "w1", "w70 </s> w3 w3", "w2 " * 40]
    together = tokens(answers(engine, prompts, max_new_tokens=20))
    assert together == [tokens(answers(engine, [prompt], max_new_tokens=20))[0] for prompt in prompts]
    assert len({tuple(ids) for ids in together}) == len(prompts)


@pytest.mark.model
def test_answers_of_different_lengths_in_a_batch_are_the_beginnings_of_the_longest(engine: Any) -> None:
    prompts = engine.encode(PROMPTS)
    longest = answers(engine, max_new_tokens=9, ignore_eos=True)
    given = reference.answers(engine, prompts, Arrivals(8), max_new_tokens=(2, 9, 1), ignore_eos=True)
    assert tokens(given) == [answer.token_ids[:n] for answer, n in zip(longest, (2, 9, 1), strict=True)]
    assert [len(answer.token_times) for answer in given] == [2, 9, 1]
    assert [answer.prompt_tokens for answer in given] == [len(token_ids) for token_ids in prompts]
    assert len(set(map(len, prompts))) > 1


@pytest.mark.model
def test_padding_is_to_the_left_and_masked(engine: Any) -> None:
    assert engine.text.tokenizer.padding_side == "left"
    assert engine.text.tokenizer.pad_token_id is not None


@pytest.mark.model
def test_a_tokenizer_without_an_end_token_serves_a_batch_too(engine: Any, variant: Path) -> None:
    edit(variant / "tokenizer_config.json", eos_token=None)
    assert tokens(answers(loaded(variant))) == tokens(answers(engine))


# ---------------------------------------------------------------- ends


def late_token(engine: Any) -> tuple[int, int]:
    """A token that greedy decoding of the first prompt says for the first time after some others, and where."""
    ids = argmax_tokens(engine, engine.encode(PROMPTS)[0], 12)
    place = next(n for n in range(3, 11) if ids[n] not in ids[:n])
    return ids[place], place


@pytest.mark.model
def test_an_answer_stops_at_the_checkpoints_end_token_and_its_times_with_it(engine: Any, variant: Path) -> None:
    end, place = late_token(engine)
    edit(variant / "generation_config.json", eos_token_id=[2, end])
    stopped, *others = answers(loaded(variant))
    assert stopped.token_ids == tokens(answers(engine))[0][: place + 1]
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_times) == place + 1
    for answer in others:
        assert len(answer.token_times) == len(answer.token_ids)
        assert (answer.finish_reason == "stop") == (answer.token_ids[-1] in (2, end))


@pytest.mark.model
def test_a_checkpoint_that_names_no_end_token_takes_the_tokenizers(variant: Path) -> None:
    edit(variant / "generation_config.json", eos_token_id=None)
    edit(variant / "config.json", eos_token_id=None)
    assert loaded(variant).end_tokens == {2}


@pytest.mark.model
def test_ignoring_the_end_token_gives_every_token_that_was_asked(engine: Any, variant: Path) -> None:
    end, place = late_token(engine)
    edit(variant / "generation_config.json", eos_token_id=end)
    other = loaded(variant)
    given = answers(other, ignore_eos=True)
    assert tokens(given) == tokens(answers(engine))
    assert given[0].token_ids[place] == end
    assert {(len(answer.token_ids), len(answer.token_times), answer.finish_reason) for answer in given} == {
        (12, 12, "length")
    }
    assert answers(other)[0].finish_reason == "stop"  # the next run asks otherwise


@pytest.mark.model
def test_one_new_token_is_one_token(engine: Any) -> None:
    assert [len(answer.token_times) for answer in answers(engine, max_new_tokens=1)] == [1, 1, 1]


LEAKS = {
    "do_sample": True,
    "temperature": 0.2,
    "top_k": 3,
    "top_p": 0.5,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "num_beams": 3,
    "max_new_tokens": 2,
    "min_new_tokens": 5,
    "suppress_tokens": [67, 57, 70],
}


@pytest.mark.model
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_checkpoints_own_generation_settings_do_not_leak_in(engine: Any, variant: Path, file: str) -> None:
    edit(variant / file, **LEAKS)
    assert tokens(answers(loaded(variant))) == tokens(answers(engine))


# ---------------------------------------------------------------- sampling


def sampled(engine: Any, seed: int | None, **values: Any) -> list[list[int]]:
    return tokens(answers(engine, sampling=Sampling(**{"temperature": 1.0, "seed": seed, **values}), max_new_tokens=24))


@pytest.mark.model
def test_a_seed_gives_the_same_text_again_and_another_seed_another(engine: Any) -> None:
    import torch

    first = sampled(engine, 7)
    torch.rand(100)  # whatever was drawn in between
    assert sampled(engine, 7) == first
    assert sampled(engine, 8) != first
    assert first != tokens(answers(engine, max_new_tokens=24))


@pytest.mark.model
def test_nothing_cuts_the_vocabulary_that_is_sampled_from(engine: Any) -> None:
    """transformers would take the best 50 of the 80 words, which nobody asked for."""
    drawn = set(itertools.chain(*tokens(answers(
        engine, ["w1"] * 32, max_new_tokens=32, ignore_eos=True, sampling=Sampling(temperature=1e6, seed=0)
    ))))  # fmt: skip
    assert len(drawn) > 75


@pytest.mark.model
def test_a_tiny_top_p_leaves_the_most_likely_token_alone(engine: Any) -> None:
    assert sampled(engine, 3, top_p=1e-6) == tokens(answers(engine, max_new_tokens=24))


@pytest.mark.model
def test_greedy_follows_sampled_without_a_trace(engine: Any) -> None:
    before = tokens(answers(engine))
    sampled(engine, 1)
    assert tokens(answers(engine)) == before


# ---------------------------------------------------------------- times


@pytest.mark.model
def test_there_is_one_increasing_time_for_each_token_between_hand_over_and_return(engine: Any) -> None:
    import time

    handed = time.perf_counter()
    given = answers(engine, max_new_tokens=24)
    returned = time.perf_counter()
    for answer in given:
        assert len(answer.token_times) == len(answer.token_ids)
        assert all(earlier < later for earlier, later in itertools.pairwise(answer.token_times))
        assert handed < answer.token_times[0]
        assert answer.token_times[-1] < returned


# ---------------------------------------------------------------- prompts and texts


@pytest.mark.model
def test_a_prompt_without_a_chat_template_is_tokenized_as_it_is(engine: Any) -> None:
    assert engine.encode(["w1 w2", "nonsense"]) == [(1, 4, 5), (1, 0)]


@pytest.mark.model
def test_a_chat_template_is_used_once_and_adds_no_special_token_twice(variant: Path) -> None:
    template = "<s> w70 {{ messages[0]['content'] }} w71{% if add_generation_prompt %} w72{% endif %}"
    edit(variant / "tokenizer_config.json", chat_template=template)
    w70, w71, w72 = 73, 74, 75
    assert loaded(variant).encode(["w1"]) == [(1, w70, 4, w71, w72)]
    assert loaded(variant, raw_prompt=True).encode(["w1"]) == [(1, 4)]


@pytest.mark.model
def test_special_tokens_are_left_out_of_the_text(engine: Any) -> None:
    assert engine.decode([1, 4, 5, 2, 2]) == "w1 w2"


# ---------------------------------------------------------------- memory


@pytest.mark.model
def test_tied_tensors_count_once_in_the_weights(tiny: Path, tied: Path) -> None:
    (apart,) = loaded(tiny).memory()
    (together,) = loaded(tied).memory()
    head_bytes = len(VOCABULARY) * 32 * 4
    assert apart.weights_bytes is not None
    assert together.weights_bytes == apart.weights_bytes - head_bytes


@pytest.mark.model
def test_the_weights_are_the_parameters_and_buffers_of_the_model(engine: Any) -> None:
    layer = 32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 64 + 2 * 32
    parameters = 2 * len(VOCABULARY) * 32 + 3 * layer + 32
    buffers = sum(buffer.numel() for buffer in engine.model.buffers())
    (memory,) = engine.memory()
    assert memory.device == "cpu"
    assert memory.weights_bytes == 4 * (parameters + buffers)


@pytest.mark.model
def test_half_precision_halves_the_weights(tiny: Path) -> None:
    half = loaded(tiny, dtype="bfloat16")
    assert half.fingerprint().effective_dtype == "bfloat16"
    (memory,) = half.memory()
    parameters = sum(parameter.numel() for parameter in half.model.parameters())
    assert 2 * parameters <= memory.weights_bytes < 2 * parameters + 1000  # buffers stay in float32


@pytest.mark.model
def test_the_key_value_cache_is_counted_after_a_batch(engine: Any) -> None:
    answers(engine, ["w1 w2 w3", "w5"], max_new_tokens=8)
    (memory,) = engine.memory()
    cached_tokens = 4 + 8 - 1  # <s> w1 w2 w3, and every new token but the last, which nothing follows
    assert memory.kv_cache_used_bytes == 2 * 3 * 2 * 8 * 4 * cached_tokens * 2


@pytest.mark.model
def test_a_step_reads_every_weight_but_the_embeddings_and_the_keys_and_values_so_far(engine: Any, tied: Path) -> None:
    (memory,) = engine.memory()
    embeddings = len(VOCABULARY) * 32 * 4
    a_token = 2 * 3 * 2 * 8 * 4  # keys and values, 3 layers, 2 heads of 8 numbers of 4 bytes
    assert engine.read_bytes_per_step(0, 1) == memory.weights_bytes - embeddings
    assert engine.read_bytes_per_step(10.5, 4) == memory.weights_bytes - embeddings + 10.5 * 4 * a_token
    together = loaded(tied)
    (memory,) = together.memory()
    assert together.read_bytes_per_step(0, 1) == memory.weights_bytes  # the head reads the tensor that they share


# ---------------------------------------------------------------- scores


@pytest.mark.model
def test_log_probabilities_are_those_of_each_token_after_the_ones_before_it(engine: Any) -> None:
    import torch

    (prompt,) = engine.encode(["w1 w2 w3"])
    chosen = [10, 11, 12]
    scores = engine.log_probabilities(prompt, chosen)
    ids = list(prompt)
    for token, score in zip(chosen, scores, strict=True):
        with torch.inference_mode():
            expected = engine.model(torch.tensor([ids])).logits[0, -1].log_softmax(0)[token]
        assert math.isclose(score, float(expected), rel_tol=1e-4, abs_tol=1e-4)
        ids.append(token)


@pytest.mark.model
def test_an_answer_without_tokens_has_no_scores(engine: Any) -> None:
    assert engine.log_probabilities(engine.encode(["w1"])[0], []) == []


# ---------------------------------------------------------------- a person who watches


@pytest.mark.model
def test_the_first_requests_tokens_are_told_as_they_come(engine: Any) -> None:
    steps: list[int] = []
    given = reference.answers(
        engine, engine.encode(PROMPTS), Arrivals(len(PROMPTS)), max_new_tokens=5, ignore_eos=True, on_token=steps.append
    )
    assert steps == tokens(given)[0]


# ---------------------------------------------------------------- engine options


@pytest.mark.model
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_that_was_asked_for_is_the_one_that_is_used(engine: Any, tiny: Path, attention: str) -> None:
    other = loaded(tiny, engine_options={"attn_implementation": attention})
    assert other.fingerprint().attention == attention
    assert tokens(answers(other)) == tokens(answers(engine))


@pytest.mark.model
def test_an_attention_that_is_not_there_is_refused(tiny: Path) -> None:
    asked = job(tiny, engine_options={"attn_implementation": "no_such_attention"})
    assert "no_such_attention" in refusal(TransformersEngine(asked, CACHE).load).message


# ---------------------------------------------------------------- what cannot be loaded


@pytest.mark.model
def test_a_model_that_is_not_there_is_refused(tiny: Path) -> None:
    error = refusal(TransformersEngine(job(tiny.parent / "missing"), CACHE).load)
    assert error.kind == "model-not-loaded"
    assert error.message.startswith("tiny could not be loaded: ")
    assert error.remedy.startswith("check that the folder has config.json")
    assert "\n" not in error.message


BROKEN: dict[str, Callable[[Path], object]] = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "no tokenizer": lambda folder: [(folder / f"tokenizer{part}.json").unlink() for part in ("", "_config")],
    "a configuration that is no JSON": lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"),
    "an unknown kind of model": lambda folder: edit(folder / "config.json", model_type="labctl-unknown"),
}


@pytest.mark.model
@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
def test_a_checkpoint_that_lacks_a_part_is_refused(variant: Path, damage: Callable[[Path], object]) -> None:
    damage(variant)
    assert refusal(TransformersEngine(job(variant), CACHE).load).kind == "model-not-loaded"


@pytest.mark.model
def test_a_weight_file_that_was_cut_off_is_refused(variant: Path) -> None:
    weights = variant / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert refusal(TransformersEngine(job(variant), CACHE).load).kind == "model-not-loaded"


@pytest.mark.model
def test_a_checkpoint_that_lacks_the_weights_of_a_layer_is_refused(variant: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(variant / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, variant / "model.safetensors", metadata={"format": "pt"})
    assert refusal(TransformersEngine(job(variant), CACHE).load).kind == "model-not-loaded"


@pytest.mark.model
def test_a_loaded_engine_says_what_it_is(engine: Any) -> None:
    told = engine.fingerprint().to_json()
    assert told["effective_dtype"] == "float32"
    assert told["model_type"] == "llama"
    assert told["devices_in_use"] == ["cpu"]
    assert {"torch", "transformers", "tokenizers"} <= set(told["packages"])
    json.dumps(told)


@pytest.mark.model
def test_loading_tells_its_times_and_announces_where_the_model_lies(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_s, init_s = make_engine(job(tiny), CACHE).load()
    assert load_s > 0
    assert init_s >= 0
    assert "HF device map GPUs in use: ['cpu']" in capsys.readouterr().out


@pytest.mark.model
def test_a_closed_engine_holds_no_model(tiny: Path) -> None:
    engine = loaded(tiny)
    engine.close()
    assert engine.model is None
    TransformersEngine(job(tiny), CACHE).close()  # one that never loaded


# ---------------------------------------------------------------- layers over GPUs


def skeleton(kind: str = "Llama", **values: Any) -> Any:
    """A small model of this family without memory, as the engine makes it to plan its split."""
    needs_torch()
    import torch
    import transformers

    config = getattr(transformers, f"{kind}Config")
    small = {key: value for key, value in llama_config(**values).to_dict().items() if key in SMALL}
    with torch.device("meta"):
        return getattr(transformers, f"{kind}ForCausalLM")(config(**small))


SMALL = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "tie_word_embeddings",
)  # fmt: skip


def layers_of(placed: dict[str, int]) -> list[int]:
    """The GPU of each layer, in the layers' order."""
    layers = {int(name.rsplit(".", 1)[1]): gpu for name, gpu in placed.items() if name.startswith("model.layers.")}
    assert sorted(layers) == list(range(len(layers)))
    return [layers[index] for index in range(len(layers))]


@pytest.mark.model
@pytest.mark.parametrize(
    ("layers", "gpus", "expected"),
    [
        (4, 2, [0, 0, 1, 1]),
        (5, 2, [0, 0, 0, 1, 1]),
        (22, 2, [0] * 11 + [1] * 11),
        (7, 3, [0, 0, 0, 1, 1, 2, 2]),
        (8, 4, [0, 0, 1, 1, 2, 2, 3, 3]),
        (3, 3, [0, 1, 2]),
        (4, 1, [0, 0, 0, 0]),
        (1, 1, [0]),
    ],
)
def test_layers_are_split_into_contiguous_parts_of_equal_length(layers: int, gpus: int, expected: list[int]) -> None:
    assert layers_of(device_map(skeleton(num_hidden_layers=layers), gpus, tied=False)) == expected


@pytest.mark.model
@pytest.mark.parametrize("gpus", range(1, 8))
@pytest.mark.parametrize("layers", [1, 2, 5, 7])
def test_every_layer_is_placed_once_and_no_gpu_holds_two_more_than_another(layers: int, gpus: int) -> None:
    model = skeleton(num_hidden_layers=layers)
    if gpus > layers:
        error = refusal(lambda: device_map(model, gpus, tied=False))
        assert error.kind == "too-many-gpus"
        assert f"{layers} layer" in error.message
        assert "--gpus" in error.remedy
        return
    placed = layers_of(device_map(model, gpus, tied=False))
    assert len(placed) == layers
    assert placed == sorted(placed)
    held = [placed.count(gpu) for gpu in range(gpus)]
    assert max(held) - min(held) <= 1


@pytest.mark.model
def test_the_first_gpu_holds_the_embeddings_and_the_last_the_norm_and_the_head() -> None:
    placed = device_map(skeleton(num_hidden_layers=6), 3, tied=False)
    assert placed["model.embed_tokens"] == 0
    assert placed["model.norm"] == 2
    assert placed["lm_head"] == 2


@pytest.mark.model
def test_a_head_that_is_tied_to_the_embeddings_stays_with_them() -> None:
    placed = device_map(skeleton(tie_word_embeddings=True), 2, tied=True)
    assert placed["lm_head"] == placed["model.embed_tokens"] == 0
    assert placed["model.norm"] == 1


@pytest.mark.model
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma"])
def test_every_tensor_of_a_llama_like_model_has_its_gpu(kind: str) -> None:
    needs_torch()
    import transformers

    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"this transformers has no {kind}")
    model = skeleton(kind)
    placed = device_map(model, 2, tied=False)
    names = [name for name, _ in itertools.chain(model.named_parameters(), model.named_buffers())]
    homeless = [name for name in names if not any(name.startswith(f"{module}.") for module in placed)]
    assert homeless == []
    modules = {name for name, _ in model.named_modules()}
    assert set(placed) <= modules


@pytest.mark.model
def test_a_model_that_is_not_built_like_llama_is_refused_by_name() -> None:
    needs_torch()
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16))
    error = refusal(lambda: device_map(gpt2, 2, tied=True))
    assert error.kind == "unknown-structure"
    assert "GPT2LMHeadModel" in error.message
    assert "Llama" in error.remedy


@pytest.mark.model
def test_a_split_is_read_from_the_checkpoints_configuration_alone(variant: Path, engine: Any) -> None:
    import transformers

    (variant / "model.safetensors").unlink()
    on_two = TransformersEngine(job(variant, device="cuda", gpus=2), CACHE)
    on_two.torch = engine.torch
    placed = on_two._device_map(transformers, str(variant), None)
    assert placed is not None
    assert layers_of(placed) == [0, 0, 1]
    assert TransformersEngine(job(variant), CACHE)._device_map(transformers, str(variant), None) is None


@pytest.mark.model
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0)], ids=["greedy", "sampled"])
def test_a_model_that_overflows_float16_fails_in_it_and_runs_in_float32(variant: Path, sampling: Sampling) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(variant / "model.safetensors")
    large = {
        name: w * 2000 if name.endswith(("up_proj.weight", "down_proj.weight")) else w for name, w in weights.items()
    }
    save_file(large, variant / "model.safetensors", metadata={"format": "pt"})
    for dtype in ("float16", "float32"):
        run = RunSpec("r", {"dtype": dtype}, "p", 4, sampling=sampling, repeats=1)
        requests = Requests(loaded(variant, dtype=dtype), run, PROMPTS)
        measured = functools.partial(measure_run, requests, [], Watch(lambda phase: None))
        if dtype == "float16":
            found = refusal(measured)
            assert (found.kind, found.remedy) == ("logits-not-finite", "use --dtype float32")
            assert "float16" in found.message
        else:
            assert all(map(math.isfinite, measured()[1][0].samples[0].log_probabilities))
