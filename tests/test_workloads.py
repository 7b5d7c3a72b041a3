"""Requests of given lengths: the same seed gives the same ones everywhere, and every length is exact."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labctl_orchestrator.models.job_fit import load_of
from labctl_orchestrator.request import datasets, lengths
from labctl_orchestrator.request.packing import PREFILL_S, RUN_S, STEP_S, need_s
from labctl_orchestrator.request.plan import Device, Plan, make_plan
from labctl_orchestrator.request.request import WORKLOAD_AXES, build
from labctl_orchestrator.request.settings import request_file
from labctl_orchestrator.request.sweep import Sweep
from labctl_orchestrator.store import take_files
from labctl_slurm.errors import WrongUseError
from labctl_slurm.partitions import Partition
from labctl_workers.measure import Requests
from labctl_workers.record import Dataset, JobSpec, ModelRef, Refusal, RunSpec, Workload
from labctl_workers.workload import Size, TokenLengths, random_prompt, sizes_of, steps_of

from .conftest import Labctl, Records
from .models import smollm2  # noqa: F401  a fixture
from .public_models import PUBLIC

# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("1024", "1024"),
        (" 1 ", "1"),
        ("min=64,max=64", "64"),
        ("max=128, min=64", "min=64,max=128"),
        ("mean=1024,std=100", "mean=1024,std=100,min=1,max=1424"),
        ("std=2.5,mean=10.5,min=4,max=16", "mean=10.5,std=2.5,min=4,max=16"),
    ],
)
def test_a_length_has_one_canonical_form(text: str, canonical: str) -> None:
    assert str(TokenLengths.parse(text)) == canonical
    assert str(TokenLengths.parse(canonical)) == canonical


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0", "not a number of tokens"),
        ("-3", "not a number of tokens"),
        ("many", "not a number of tokens"),
        ("1.5", "not a number of tokens"),
        ("mean=4", "mean and std need each other"),
        ("min=4", "a range needs min and max"),
        ("min=4,max=3", "min above max"),
        ("min=4,max=8,min=5", "min twice"),
        ("median=4", "unknown key 'median'"),
        ("mean=9,std=1,max=8", "mean outside 1 to 8"),
        ("mean=nan,std=1", "mean is not a number"),
    ],
)
def test_a_wrong_length_is_an_error_that_says_why(text: str, problem: str) -> None:
    with pytest.raises(WrongUseError, match=problem):
        lengths.canonical("input_len", text)


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_a_drawn_length_is_within_its_bounds_and_the_same_again(low: int, more: int, seed: int, request: int) -> None:
    for text in (f"min={low},max={low + more}", f"mean={low + more / 2},std={more},min={low},max={low + more}"):
        drawn = TokenLengths.parse(text).draw(seed, request, "input")
        assert low <= drawn <= low + more
        assert TokenLengths.parse(text).draw(seed, request, "input") == drawn


def test_drawn_lengths_have_the_mean_and_the_deviation_that_were_asked() -> None:
    normal = [TokenLengths.parse("mean=500,std=50").draw(1, n, "input") for n in range(4000)]
    assert statistics.fmean(normal) == pytest.approx(500, abs=3)
    assert statistics.stdev(normal) == pytest.approx(50, abs=3)
    uniform = [TokenLengths.parse("min=10,max=19").draw(1, n, "output") for n in range(4000)]
    assert set(uniform) == set(range(10, 20))
    assert statistics.fmean(uniform) == pytest.approx(14.5, abs=0.2)


# ---------------------------------------------------------------- random prompts, on three tokenizers


def text_of_folder(folder: Path) -> Any:
    from labctl_workers.engines.text import Text

    return Text(str(folder), None, raw_prompt=False)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> dict[str, Any]:  # noqa: F811
    """SmolLM2's; one with a token for each byte; one that begins every text with a BOS."""
    pytest.importorskip("transformers")
    from .random_llama import byte_tokenizer
    from .test_hf import word_tokenizer

    byte_tokenizer().save_pretrained(of_bytes := tmp_path_factory.mktemp("bytes"))
    word_tokenizer().save_pretrained(with_bos := tmp_path_factory.mktemp("bos"))
    return {"smollm2": text_of_folder(smollm2), "bytes": text_of_folder(of_bytes), "bos": text_of_folder(with_bos)}


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2", "bytes", "bos"])
def test_the_ordinary_tokens_are_those_of_texts(tokenizers: dict[str, Any], name: str) -> None:
    text = tokenizers[name]
    special = {*text.tokenizer.all_special_ids, *text.tokenizer.get_added_vocab().values()}
    assert len(text.ordinary) == len(text.tokenizer.get_vocab()) - len(special)
    assert special.isdisjoint(text.ordinary)
    assert text.begin == ([1] if name == "bos" else [])


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2", "bytes", "bos"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    length=st.integers(1, 300),
    prefix=st.integers(0, 400),
    seed=st.integers(0, 2**32 - 1),
    repeat=st.integers(-2, 5),
    number=st.integers(0, 1000),
)
def test_a_random_prompt_has_exactly_the_tokens_that_were_asked(
    tokenizers: dict[str, Any], name: str, length: int, prefix: int, seed: int, repeat: int, number: int
) -> None:
    text, workload = tokenizers[name], Workload(input_len=str(length), prefix_len=prefix, seed=seed)

    def made(repeat: int, number: int, length: int = length) -> tuple[int, ...]:
        return random_prompt(Size(number, length, 1), workload, repeat, text.ordinary, text.begin)

    token_ids = made(repeat, number)
    assert len(token_ids) == length
    assert list(token_ids[: len(text.begin)]) == text.begin
    assert set(token_ids[len(text.begin) :]) <= set(text.ordinary)
    assert made(repeat, number) == token_ids
    other = made(repeat + 1, number + 1, 500)
    shared = max(prefix, len(text.begin))
    assert other[: min(shared, length)] == token_ids[:shared]
    if length - shared > 20:
        assert other[shared:length] != token_ids[shared:]
        assert made(repeat + 1, number) != token_ids


def engine_of(text: Any) -> Any:
    """What `Requests` needs of an engine: its tokenizer."""
    return SimpleNamespace(text=text, encode=text.encode)


def run_of(workload: Workload | None, **values: Any) -> RunSpec:
    tokens = values.pop("max_new_tokens", None)
    return RunSpec("r", {}, "p", tokens, workload=workload, **values)


@pytest.mark.model
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(few=st.integers(1, 5), more=st.integers(1, 20), seed=st.integers(0, 2**32 - 1), repeat=st.integers(-1, 3))
def test_a_request_does_not_depend_on_how_many_there_are(
    tokenizers: dict[str, Any], few: int, more: int, seed: int, repeat: int
) -> None:
    workload = Workload("mean=40,std=20", "min=1,max=9", prefix_len=4, seed=seed)
    engine = engine_of(tokenizers["bos"])
    short, long = (Requests(engine, run_of(workload, batch_size=size), []).of(repeat) for size in (few, few + more))
    assert long[:few] == short
    assert [len(request.token_ids) for request in long] == [
        size.prompt_tokens for size in sizes_of(run_of(workload, batch_size=few + more), [])
    ]


@pytest.mark.model
def test_prompts_of_a_dataset_are_texts_and_chats_in_the_models_template(tokenizers: dict[str, Any]) -> None:
    engine = engine_of(tokenizers["smollm2"])
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    dataset = Dataset(answers=["one two three", "yes"])
    made = Requests(engine, run_of(Workload(dataset="d"), batch_size=2), ["Hi", chat], dataset)
    first, second = made.of(0)
    template = tokenizers["smollm2"].tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
    assert list(second.token_ids) == list(template["input_ids"])
    assert (first.token_ids,) == tuple(engine.encode(["Hi"]))
    assert [first.max_new_tokens, second.max_new_tokens] == [
        tokenizers["smollm2"].count(a) for a in dataset.answers or ()
    ]
    with pytest.raises(Refusal, match="need a chat template"):
        Requests(engine_of(tokenizers["bytes"]), run_of(Workload(dataset="d")), [chat], Dataset())


@pytest.mark.model
def test_entries_that_are_too_long_for_the_model_are_left_out_and_counted(tokenizers: dict[str, Any]) -> None:
    engine = engine_of(text := tokenizers["bytes"])
    prompts, dataset = ["a" * 10, "b" * 96, "c" * 20], Dataset(output_tokens=[5, 5, 85])
    text.longest = 100
    try:
        made = Requests(engine, run_of(Workload(dataset="d"), batch_size=1, requests=2), prompts, dataset)
        assert [request.prompt for request in made.of(0)] == [0, 0]
        assert made.fingerprint().left_out == 1 + 1  # 20 + 85 tokens are too many as well
        text.longest = 10
        with pytest.raises(
            Refusal, match="every entry of the dataset is too long: 15 tokens at least, the model has 10"
        ):
            Requests(engine, run_of(Workload(dataset="d")), prompts, dataset)
    finally:
        text.longest = None


# ---------------------------------------------------------------- sizes


def test_a_trace_has_its_own_lengths_and_times() -> None:
    trace = Dataset(output_tokens=[5, 6, 7], input_tokens=[50, 60, 70], times_s=[0.0, 0.5, 2.0])
    run = run_of(Workload(dataset="t"), batch_size=8, requests=3)
    assert sizes_of(run, [], trace) == [Size(0, 50, 5), Size(1, 60, 6), Size(2, 70, 7)]
    made = Requests(engine_of(SimpleNamespace(encode=lambda prompts: [])), run, [], trace)
    assert made.arrivals(0) == made.arrivals(1)
    assert (made.arrivals(0).in_flight, made.arrivals(0).times_s) == (8, (0.0, 0.5, 2.0))


def test_a_given_output_length_counts_instead_of_the_datasets() -> None:
    run = run_of(Workload(output_len="3", dataset="d"), batch_size=2)
    assert sizes_of(run, [10, 20], Dataset(output_tokens=[50, 60])) == [Size(0, 10, 3), Size(1, 20, 3)]
    assert sizes_of(run_of(Workload(input_len="9"), max_new_tokens=7), []) == [Size(0, 9, 7)]


def test_a_static_batch_has_as_many_steps_as_its_longest_answer() -> None:
    sizes = [Size(n, 1, tokens) for n, tokens in enumerate((3, 9, 2, 4, 5))]
    assert steps_of(sizes, 2) == 9 + 4 + 5
    assert steps_of(sizes, 5) == 9


# ---------------------------------------------------------------- files


def file_of(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


SHAREGPT = [
    {"id": "a", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]},
    {"id": "b", "conversations": [{"from": "human", "value": "alone"}]},
    {"id": "c", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}, {"value": "x"}]},
]


def test_sharegpt_gives_the_first_two_turns_of_conversations_that_have_them(tmp_path: Path) -> None:
    found = datasets.read(file_of(tmp_path, "share.json", json.dumps(SHAREGPT)))
    assert (found.prompts, found.dataset.answers) == (["What?", "Why?"], ["That.", "So."])
    assert len(found) == 2


def test_json_lines_have_prompts_or_messages_and_output_lengths(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    lines = [{"prompt": "one", "output_tokens": 3}, {"messages": chat, "max_tokens": "4"}]
    found = datasets.read(file_of(tmp_path, "d.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n"))
    assert found.prompts == ["one", chat[:1]]  # the model writes the answer
    assert found.dataset.output_tokens == [3, 4]
    without = datasets.read(file_of(tmp_path, "e.jsonl", '{"prompt": "one"}'))
    assert without.dataset == Dataset()


MOONCAKE = [
    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46]},
    {"timestamp": 30535, "input_length": 6472, "output_length": 26},
]
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,6955,52
2023-11-16 18:15:49.7335900,6472,26
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,6955,52,7007,x
8.053,GPT-4,6472,26,6498,x
9,GPT-4,12,0,12,failed
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [("m.jsonl", "\n".join(map(json.dumps, MOONCAKE))), ("azure.csv", AZURE), ("burst.csv", BURSTGPT)],
)
def test_public_traces_have_times_and_lengths(tmp_path: Path, name: str, text: str) -> None:
    found = datasets.read(file_of(tmp_path, name, text))
    assert found.is_trace
    assert (found.dataset.input_tokens, found.dataset.output_tokens) == ([6955, 6472], [52, 26])
    assert found.dataset.times_s == pytest.approx([0.0, 3.053])
    prompts, sampled, requests = found.sampled(1, 0)
    assert (prompts, sampled, requests) == ([], Dataset([52], None, [6955], [0.0]), 1)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("d.jsonl", '{"prompt": "a"}\nnonsense', "d.jsonl, line 2 is not JSON"),
        ("d.jsonl", '{"prompt": "a", "output_tokens": 3}\n{"prompt": "b"}', "d.jsonl, line 2 has no output length"),
        ("d.jsonl", '{"prompt": "a", "output_tokens": 0}', "not a number of output tokens: 0"),
        ("d.jsonl", '{"prompt": " "}', "line 1 has an empty prompt"),
        ("d.jsonl", '{"text": "a"}', "line 1 has no text"),
        ("d.jsonl", '{"messages": []}', "messages is not a list of messages"),
        ("d.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', "no message of a user"),
        ("d.json", "[1]", "entry 1 is not a JSON object"),
        ("d.json", "[", "is not JSON"),
        ("d.json", json.dumps(SHAREGPT[1:2]), "no conversation of the dataset has a prompt and an answer"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "t.csv, line 2 has no TIMESTAMP"),
        ("t.csv", "Timestamp,Request tokens,Response tokens\n1,5,0\n", "no request with an answer"),
        ("d.jsonl", "\n", "no entries in dataset"),
    ],
)
def test_a_wrong_dataset_is_an_error_that_names_the_place(tmp_path: Path, name: str, text: str, problem: str) -> None:
    with pytest.raises(WrongUseError, match=problem):
        datasets.read(file_of(tmp_path, name, text))


def test_entries_are_sampled_by_a_seed_and_a_large_file_needs_a_number_of_requests(tmp_path: Path) -> None:
    found = datasets.read(file_of(tmp_path, "d.jsonl", "".join(f'{{"prompt": "p{n}"}}\n' for n in range(2000))))
    prompts, _, requests = found.sampled(20, 1)
    assert (len(prompts), requests) == (datasets.SPARE * 20, 20)
    assert found.sampled(20, 1)[0] == prompts != found.sampled(20, 2)[0]
    assert found.sampled(40, 1)[0][:20] != sorted(prompts)[:20]
    with pytest.raises(WrongUseError, match="2,000 entries, and the number of requests is not given"):
        found.sampled(None, 1)


# ---------------------------------------------------------------- what a submission asks


def planned(folder: Path | None = None, **values: Any) -> Plan:
    sweep = Sweep(build([("f", {"partition": "dgxh", **values})]))
    partition = Partition(name="dgxh", dtype="bfloat16", gpu="H100", capability="9.0")
    models = {(cell.model_id, cell.revision): ModelRef("m", "c" * 40) for cell in sweep.cells}
    return make_plan(sweep, {"dgxh": partition}, models, lambda of: Device("cuda", "9.0"))


def asked(plan: Plan) -> list[tuple[Any, ...]]:
    return [
        (run.workload.input_len, run.workload.output_len, run.workload.prefix_len) if run.workload else (None,)
        for run in plan.runs
    ]


def test_lengths_are_pairs_and_input_and_output_lengths_multiply() -> None:
    assert asked(planned(lengths=["1024/128", "128/1024"])) == [("1024", "128", 0), ("128", "1024", 0)]
    product = asked(planned(input_len=[8, 16], output_len=["min=1,max=4"], prefix_len=[2, 4]))
    assert product == [(n, "min=1,max=4", prefix) for n in ("8", "16") for prefix in (2, 4)]
    assert asked(planned()) == [(None,)]


def test_a_run_with_output_lengths_ignores_the_end_token_and_has_no_other_length() -> None:
    (run,) = planned(lengths="8/4").runs
    assert (run.max_new_tokens, run.ignore_eos, run.definition["max_new_tokens"]) == (None, True, None)
    (run,) = planned(input_len=8, max_new_tokens=5).runs
    assert (run.max_new_tokens, run.ignore_eos) == (5, False)


def test_the_run_id_depends_on_all_that_makes_the_requests_and_on_the_content_of_a_file_not_its_name(
    tmp_path: Path,
) -> None:
    one, same, other = (
        file_of(tmp_path, name, f'{{"prompt": "{text}"}}')
        for name, text in (("a.jsonl", "x"), ("b.jsonl", "x"), ("c.jsonl", "y"))
    )
    ids = [
        planned(**values).runs[0].run_id
        for values in (
            {}, {"lengths": "8/4"}, {"lengths": "8/5"}, {"lengths": "9/4"}, {"lengths": "8/4", "seed": 1},
            {"lengths": "8/4", "prefix_len": 2}, {"input_len": 8}, {"output_len": 4}, {"dataset": one}, {"dataset": other},
        )
    ]  # fmt: skip
    assert len(set(ids)) == len(ids)
    assert planned(dataset=same).runs[0].run_id == planned(dataset=one).runs[0].run_id
    assert planned(lengths="8/4", seed=0).runs[0].run_id == planned(lengths="min=8,max=8/4").runs[0].run_id


def test_cells_and_rules_know_lengths() -> None:
    rules = {"exclude": [{"lengths": "16/4"}]}
    assert asked(planned(lengths=["8/4", "16/4"], **rules)) == [("8", "4", 0)]
    assert asked(planned(input_len=[8, 16], exclude=[{"input_len": 8}])) == [("16", None, 0)]
    cells = [{"input_len": 32, "output_len": 2}, {"batch_size": 4}]
    assert asked(planned(lengths=["8/4", "9/4"], cells=cells)) == [
        ("8", "4", 0), ("9", "4", 0), ("32", "2", 0), ("8", "4", 0)
    ]  # fmt: skip


def test_a_later_layer_replaces_lengths_of_an_earlier_one() -> None:
    layers = [("defaults", {"input_len": [8, 16], "partition": "dgxh"}), ("flags", {"lengths": ["1/2"]})]
    assert [(cell.input_len, cell.output_len) for cell in Sweep(build(layers)).cells] == [("1", "2")]
    none = build([*layers, ("file", {"lengths": []})])
    assert [cell.lengths for cell in Sweep(none).cells] == [(None, None)]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"lengths": "8"}, "not input/output"),
        ({"lengths": "8/4", "input_len": 8}, "lengths and input_len or output_len are given"),
        ({"input_len": "x"}, "invalid input_len: x"),
        ({"prefix_len": 4}, "prefix_len needs random prompts"),
        ({"prefix_len": 9, "input_len": 8}, "prefix_len is longer than every prompt: 9 of 8 tokens"),
        ({"prefix_len": 0, "input_len": 8}, "--prefix-len out of range: 0"),
        ({"seed": 3}, "seed has no effect"),
        ({"dataset": "no-such-file"}, "dataset not found"),
    ],
)
def test_settings_without_a_sense_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(WrongUseError, match=problem):
        planned(**values)


def test_a_dataset_has_its_own_prompts_and_a_trace_its_own_times(tmp_path: Path) -> None:
    prompts = file_of(tmp_path, "d.jsonl", '{"prompt": "x"}')
    trace = file_of(tmp_path, "t.jsonl", '{"timestamp": 0, "input_length": 4, "output_length": 2}')
    with pytest.raises(WrongUseError, match="input_len and dataset exclude each other"):
        planned(dataset=prompts, input_len=8)
    with pytest.raises(WrongUseError, match="request_rate and a trace exclude each other"):
        planned(dataset=trace, request_rate=2.0)
    (job,) = planned(dataset=[prompts, trace]).jobs
    assert {len(of) for of in job.prompt_sets.values()} == {0, 1}
    assert [job.datasets[run.prompt_set].times_s for run in job.runs] == [None, [0.0]]
    assert JobSpec.from_json(json.loads(json.dumps(job.to_json()))) == job


@pytest.mark.parametrize("key", WORKLOAD_AXES)
def test_a_typo_in_a_key_gets_a_suggestion(key: str) -> None:
    with pytest.raises(WrongUseError) as caught:
        build([("sweep.toml", {f"{key}s": 1})])
    assert caught.value.message == f"sweep.toml: unknown key '{key}s'"


def test_a_dataset_lies_beside_the_submission_file(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text('dataset = ["a.jsonl", "/b.jsonl"]\n[[cells]]\ndataset = "c.jsonl"\n', encoding="utf-8")
    _, values = request_file(str(file))
    assert values["dataset"] == [str(tmp_path / "a.jsonl"), "/b.jsonl"]
    assert values["cells"][0]["dataset"] == [str(tmp_path / "c.jsonl")]


# ---------------------------------------------------------------- what follows from lengths


def test_time_and_memory_are_those_of_the_lengths() -> None:
    (job,) = planned(lengths="1000/50", batch_size=8, requests=16).jobs
    (run,) = job.runs
    each = 2 * 50 * STEP_S + 16 * 1000 * PREFILL_S
    assert need_s(job, run, None) == pytest.approx(RUN_S + (run.repeats + run.warmup) * each)
    load = load_of(job, run, 2)
    assert (load.batch, load.prompt_tokens, load.new_tokens) == (8, 1000, 50)


def test_a_trace_takes_as_long_as_its_requests_take_to_come(tmp_path: Path) -> None:
    line = '{{"timestamp": {}, "input_length": 4, "output_length": 2}}\n'
    trace = file_of(tmp_path, "t.jsonl", line.format(0) + line.format(600_000))
    (job,) = planned(dataset=trace, batch_size=64).jobs
    assert need_s(job, job.runs[0], None) > 4 * 600


def test_a_served_trace_has_any_number_of_requests_in_flight_unless_it_has_a_concurrency(tmp_path: Path) -> None:
    line = '{{"timestamp": {}, "input_length": 4, "output_length": 2}}\n'
    trace = file_of(tmp_path, "t.jsonl", "".join(line.format(1000 * second) for second in range(300)))
    prompts = file_of(tmp_path, "d.jsonl", '{"prompt": "x"}')

    def run_of(**values: Any) -> tuple[JobSpec, RunSpec]:
        (job,) = planned(backend="vllm", **values).jobs
        return job, job.runs[0]

    job, run = run_of(dataset=trace, serve=True)
    assert (run.batch_size, run.requests) == (300, 300)
    assert take_files.unlimited(job, run)
    assert load_of(job, run, 2).batch == 1  # the server queues what does not fit
    job, run = run_of(dataset=trace, serve=True, batch_size=4)
    assert (run.batch_size, take_files.unlimited(job, run)) == (4, False)
    assert run_of(dataset=trace)[1].batch_size == 1  # an engine without a server
    assert run_of(dataset=prompts, serve=True)[1].batch_size == 1


def test_what_vllm_cannot_hold_is_refused_before_the_queue(
    labctl: Labctl, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TinyLlama's longest sequence is 2048 tokens: the length of random prompts is known without a tokenizer."""
    monkeypatch.delenv("LABCTL_NO_PREFLIGHT")
    (checkpoint / "config.json").write_text(json.dumps(PUBLIC["TinyLlama-1.1B"][0]), encoding="utf-8")
    command = ("submit", "-p", "dgxh", "--backend", "vllm", "--model-id", checkpoint, "--dry-run", "--lengths")
    assert "too long" not in labctl(*command, "2000/48").err
    ran = labctl(*command, "2000/49")
    assert ran.code == 3
    assert "prompt and answer are too long: 2049 tokens" in ran.err
    assert "too long" in labctl(*command, "mean=1000,std=900,max=2048/1", "--batch-size", "64").err


@pytest.fixture
def of_two_lengths(records: Records) -> Callable[[], None]:
    def measure() -> None:
        for backend in ("hf", "vllm"):
            plan = planned(backend=backend, lengths=["1024/128", "128/1024"], prefix_len=64)
            batch = records.submit(planned=plan.jobs)
            attempt = records.attempt(batch)
            for run in batch.runs:
                records.done(batch, attempt, run)
        records.collect()

    return measure


def test_runs_are_compared_and_shown_by_their_lengths(labctl: Labctl, of_two_lengths: Callable[[], None]) -> None:
    of_two_lengths()
    rows = labctl(
        "query", "SELECT DISTINCT max_new_tokens, input_len, output_len, prefix_len FROM measured_runs", "--json"
    )
    assert [tuple(row.values()) for row in rows.json] == [(None, 1024, 128, 64), (None, 128, 1024, 64)]
    by_backend = labctl("compare", "--all", "--by", "backend", "--json").json
    assert {block["fixed"].get("input_len") for block in by_backend["blocks"]} <= {1024, 128}
    ran = labctl("compare", "--all", "--by", "lengths", "--where", "backend=hf", "--details")
    assert ran.code == 0
    assert "input_len" in ran.out
    assert "output_len" in ran.out
    assert "1024/128 tokens prefix 64" in labctl("status", "--all").out
    run_id = labctl("query", "SELECT run_id FROM measured_runs WHERE input_len = 1024", "--json").json[0]["run_id"]
    shown = " ".join(labctl("show", run_id).out.split())
    assert (
        "input_len 1,024 output_len 128 prefix_len 64" in shown
        or "input_len 1024 output_len 128 prefix_len 64" in shown
    )
    assert labctl("matrix", "--all").code == 0
    assert {row["input_len"] for row in labctl("export", "--json").json} == {1024, 128}
