"""Request files: every key, a typo in each, wrong types, empty lists, exclusions that leave nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.request import engine_options, sampling
from labctl_orchestrator.request.prompts import prompts_of
from labctl_orchestrator.request.request import AXES, FLAGS, KEYS, MAY_BE_EMPTY, WORKLOAD_AXES, SubmissionSpec, build
from labctl_orchestrator.request.sweep import Sweep
from labctl_slurm.errors import WrongUseError
from labctl_workers.record import Sampling

from .conftest import Labctl

EVERY_KEY = """
name = "all"
note = "for the lab"
partition = ["dgx2", "dgxh"]
backend = "hf"
model_id = "MODEL"
revision = "main"
dtype = ["float16", "float32"]
gpus = [1, 2]
batch_size = [1, 4]
sampling = ["greedy", "temperature=0.7,top_p=0.9,seed=1"]
max_new_tokens = [8, 16]
parallel = "layers"
prompts = "prompts.jsonl"
prompt = "beaten by the file"
raw_prompt = true
ignore_eos = true
repeats = 2
until = "1%"
max_repeats = 3
warmup = 0
request_rate = 2
burstiness = 0.5
serve = false
slo = ["ttft<500ms", "tpot_p90<50ms"]
score = "fables"
score_window = 256
score_stride = 64
runs_per_job = 25
jobs_at_once = 4
loads = 1
requests = 40
seed = 3
account = "lab"
time = "5:00:00"
mem = "32G"
qos = "high"
constraint = "nvlink"
engine_options = { attn_implementation = ["sdpa", "eager"] }
sbatch = { nice = 10, mail-user = "me@lab" }
[[cells]]
partition = "dgxh"
max_new_tokens = 1024
[[exclude]]
partition = "dgx2"
dtype = "float32"
"""


# In test_workloads.py and test_quality.py.
ELSEWHERE = (*WORKLOAD_AXES, "quality")


def write(folder: Path, text: str, checkpoint: Path) -> Path:
    (folder / "prompts.jsonl").write_text('{"prompt": "one"}\n"two"\n', encoding="utf-8")
    file = folder / "request.toml"
    file.write_text(text.replace("MODEL", str(checkpoint)), encoding="utf-8")
    return file


def test_a_file_with_every_key_is_the_request_that_it_says(labctl: Labctl, tmp_path: Path, checkpoint: Path) -> None:
    keys = {
        line.partition("=")[0].strip() for line in EVERY_KEY.splitlines() if "=" in line and not line.startswith("[")
    }
    assert keys | {"cells", "exclude", *ELSEWHERE} == set(KEYS)
    ran = labctl("submit", str(write(tmp_path, EVERY_KEY, checkpoint)), "--dry-run", "--json")
    assert ran.code == 0, ran.err
    batches = ran.json
    jobs = [job for batch in batches for job in batch["jobs"]]
    runs = [run for job in jobs for run in job["runs"]]
    # dgx2: 1 dtype, dgxh: 2; each with 2 numbers of GPUs, 2 attention implementations, 2 batches, 2 samplings, 2 lengths
    assert len(runs) == 3 * 2 * 2 * 2 * 2 * 2 + 1
    assert len(jobs) == 3 * 2 * 2
    assert [run["max_new_tokens"] for run in runs].count(1024) == 1
    assert {tuple(job["prompt_sets"][run["prompt_set"]]) for job in jobs for run in job["runs"]} == {("one", "two")}
    assert {(run["repeats"], run["warmup"], run["ignore_eos"]) for run in runs} == {(2, 0, True)}
    assert {(run["until"], run["max_repeats"]) for run in runs} == {(0.01, 3)}
    assert {(run["request_rate"], run["requests"]) for run in runs} == {(2.0, 40)}
    assert {(run["score"]["name"], run["score"]["window"], run["score"]["stride"]) for run in runs} == {
        ("fables", 256, 64)
    }
    assert {job["raw_prompt"] for job in jobs} == {True}
    for batch in batches:
        for line in (
            "account=lab",
            "time=5:00:00",
            "mem=32G",
            "qos=high",
            "constraint=nvlink",
            "nice=10",
            "mail-user=me@lab",
        ):
            assert f"#SBATCH --{line}\n" in batch["script"]


@pytest.mark.parametrize("key", [key for key in KEYS if key not in ELSEWHERE])
def test_a_typo_in_a_key_is_one_line_that_names_the_key(
    labctl: Labctl, tmp_path: Path, checkpoint: Path, key: str
) -> None:
    wrong = key[:-1] + key[-1] * 3
    text = EVERY_KEY.replace(f"\n{key} =", f"\n{wrong} =").replace(f"[[{key}]]", f"[[{wrong}]]")
    ran = labctl("submit", str(write(tmp_path, text, checkpoint)), "--dry-run")
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.splitlines() == [
        f"labctl: {tmp_path}/request.toml: unknown key {wrong!r}", f"  -> did you mean {key!r}?"
    ]  # fmt: skip


WRONG_TYPES: dict[str, Any] = {
    **dict.fromkeys(
        ("partition", "backend", "model_id", "revision", "dtype", "parallel", "sampling", "slo", "quality"), 3
    ),
    **dict.fromkeys(
        ("prompt", "prompts", "name", "note", "account", "time", "mem", "qos", "constraint", "until", "score"), 3
    ),
    **dict.fromkeys(("gpus", "batch_size", "max_new_tokens"), "many"),
    **dict.fromkeys(
        ("repeats", "max_repeats", "warmup", "requests", "loads", "seed", "score_window", "score_stride"), 1.5
    ),
    **dict.fromkeys(("prefix_len", "input_len", "output_len"), 1.5),
    **dict.fromkeys(("lengths", "dataset"), 3),
    **dict.fromkeys(("request_rate", "burstiness"), "often"),
    "serve": "yes",
    "runs_per_job": "many",
    "jobs_at_once": 1.5,
    **dict.fromkeys(("raw_prompt", "ignore_eos"), "yes"),
    **dict.fromkeys(("engine_options", "sbatch"), "attn_implementation"),
    **dict.fromkeys(("cells", "exclude"), "dgxh"),
}


@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_type_is_one_error_that_names_the_file_and_the_key(key: str) -> None:
    with pytest.raises(WrongUseError) as caught:
        build([("request.toml", {"partition": "dgxh"}), ("request.toml", {key: WRONG_TYPES[key]})])
    assert caught.value.message.startswith(f"request.toml: {key}: expected ")
    assert caught.value.remedy == f"correct {key}"


@pytest.mark.parametrize(
    ("backend", "gpus", "text", "said"),
    [
        ("vllm", [], "tensors", "invalid --parallel: 'tensors' -> give one of tensor, pipeline, data, or sizes"),
        ("vllm", [], "tensor=2,tensor=2", "invalid --parallel"),
        ("vllm", [], "tensor=0", "invalid --parallel"),
        ("vllm", [], "tensor=2,layers=2", "invalid --parallel"),
        ("vllm", [], "", "invalid --parallel"),
        ("vllm", [], "layers", "backend vllm has no --parallel layers -> by backend: hf: layers; staged: layers; vllm: tensor,"),
        ("hf", [], "tensor=2", "backend hf has no --parallel tensor=2"),
        ("vllm", [1, 2], "tensor=2,pipeline=2", "--parallel tensor=2,pipeline=2 needs 4 GPUs: --gpus 1 and 2 -> remove"),
    ],
)  # fmt: skip
def test_a_wrong_parallel_is_one_error_with_the_values_that_are_right(
    backend: str, gpus: list[int], text: str, said: str
) -> None:
    with pytest.raises(WrongUseError) as caught:
        build([("f.toml", {"partition": "dgxh", "backend": backend, "gpus": gpus, "parallel": text})])
    assert f"{caught.value.message} -> {caught.value.remedy}".removeprefix("f.toml: ").startswith(said)


@pytest.mark.parametrize("key", [axis for axis in AXES if axis not in MAY_BE_EMPTY])
def test_an_empty_list_is_one_error(key: str) -> None:
    with pytest.raises(WrongUseError, match=f"{key} is an empty list"):
        build([("request.toml", {"partition": ["dgxh"], key: []})])


@pytest.mark.parametrize(
    ("backend", "option", "value", "said"),
    [
        ("hf", "attn_implementatoin", "sdpa", "did you mean 'attn_implementation'?"),
        ("vllm", "max_model_length", 512, "did you mean 'max_model_len'?"),
        ("vllm", "tensor_parallel_size", 2, "use --gpus"),
        ("vllm", "dtype", "float16", "use --dtype"),
        ("vllm", "max_model_len", "long", "give "),
        ("vllm", "max_model_len", True, "give "),
        ("vllm", "enforce_eager", 1, "give "),
        ("vllm", "gpu_memory_utilization", "most", "give "),
        ("vllm", "compilation_config", "{level: 3}", "give "),
        ("hf", "enforce_eager", True, ""),
    ],
)
def test_a_wrong_engine_option_is_one_error_with_the_remedy(backend: str, option: str, value: Any, said: str) -> None:
    with pytest.raises(WrongUseError) as caught:
        build([("f.toml", {"partition": "dgxh", "backend": backend, "engine_options": {option: value}})])
    assert option in caught.value.message
    assert said in caught.value.remedy


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("gpu_memory_utilization", 1),
        ("max_model_len", 512),
        ("compilation_config", '{"level": 3}'),
        ("enforce_eager", True),
    ],
)
def test_vllms_own_settings_are_taken_by_their_own_names(option: str, value: Any) -> None:
    asked = build([("f.toml", {"partition": "dgxh", "backend": ["hf", "vllm"], "engine_options": {option: value}})])
    assert asked.engine_options == {option: (value,)}


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("exclusive", ("exclusive", True)),
        ("exclusive=true", ("exclusive", True)),
        ("exclusive=user", ("exclusive", "user")),
        ("no-requeue", ("no-requeue", True)),
        ("hold=true", ("hold", True)),
        ("comment=true", ("comment", "true")),
    ],
)
def test_an_option_of_sbatch_without_a_value_is_its_name_alone(text: str, option: tuple[str, object]) -> None:
    assert engine_options.parse_sbatch(text) == option


@pytest.mark.parametrize("text", ["comment", "=x"])
def test_an_option_of_sbatch_that_needs_a_value_is_refused_without_one(text: str) -> None:
    with pytest.raises(WrongUseError, match="key=value"):
        engine_options.parse_sbatch(text)


def test_a_picked_cell_may_have_an_option_of_the_requests_backend() -> None:
    picked = {"max_new_tokens": 8, "engine_options": {"enforce_eager": True}}
    asked = build([("f.toml", {"partition": "dgxh", "backend": "vllm", "cells": [picked]})])
    (cell,) = Sweep(asked).cells
    assert cell.engine_options == (("enforce_eager", True),)


def test_an_empty_list_of_an_engine_option_is_one_error() -> None:
    with pytest.raises(WrongUseError, match="attn_implementation is an empty list"):
        build([("request.toml", {"partition": ["dgxh"], "engine_options": {"attn_implementation": []}})])


def test_exclusions_that_leave_nothing_are_one_error() -> None:
    asked = build([("f", {"partition": ["dgx2", "dgxh"], "exclude": [{"partition": ["dgx2", "dgxh"]}]})])
    with pytest.raises(WrongUseError, match="leave no run"):
        Sweep(asked)


@pytest.mark.parametrize(
    ("table", "value", "said"),
    [
        ("exclude", {"partitoin": "dgx2"}, "number 1: unknown key 'partitoin'"),
        ("exclude", {}, "number 1 is empty"),
        ("cells", {"repeats": 2}, "number 1: unknown key 'repeats'"),
        ("cells", {"dtype": "float15"}, "number 1: unknown dtype 'float15'"),
        ("cells", {"max_new_tokens": 0}, "number 1: --max-new-tokens out of range: 0"),
        (
            "cells",
            {"max_new_tokens": "x"},
            "number 1: max_new_tokens: expected a whole number, got a text in quotes",
        ),
    ],
)
def test_a_rule_or_a_cell_that_cannot_be_right_is_named(table: str, value: dict[str, Any], said: str) -> None:
    with pytest.raises(WrongUseError) as caught:
        Sweep(build([("f", {"partition": ["dgx2"], table: [value]})]))
    assert said in caught.value.message


def found(**values: Any) -> list[tuple[Any, ...]]:
    return [(cell.partition, cell.dtype, cell.max_new_tokens) for cell in Sweep(build([("f", values)])).cells]


def test_hand_picked_cells_alone_are_just_those() -> None:
    assert found(partition="dgxh", cells=[{"max_new_tokens": 1}, {"max_new_tokens": 2, "dtype": "float32"}]) == [
        ("dgxh", "auto", 1), ("dgxh", "float32", 2)
    ]  # fmt: skip


def test_hand_picked_cells_come_beside_a_product() -> None:
    asked = found(partition=["dgx2", "dgxh"], dtype="float16", cells=[{"dtype": "float32"}])
    assert asked == [("dgx2", "float16", 128), ("dgxh", "float16", 128), ("dgx2", "float32", 128)]


def test_a_list_in_a_cell_multiplies_in_that_cell() -> None:
    assert found(partition="dgxh", cells=[{"max_new_tokens": [1, 2]}]) == [("dgxh", "auto", 1), ("dgxh", "auto", 2)]


def test_an_exclusion_of_the_partitions_number_of_gpus_matches_it(
    labctl: Labctl, tmp_path: Path, checkpoint: Path
) -> None:
    """Two GPUs are dgxh's own number: a rule that says two means the cells that say nothing."""
    text = (
        'partition = ["dgxh"]\nmodel_id = "MODEL"\nmax_new_tokens = [1, 2]\n[[exclude]]\ngpus = 2\nmax_new_tokens = 1\n'
    )
    ran = labctl("submit", str(write(tmp_path, text, checkpoint)), "--dry-run", "--json")
    assert [run["max_new_tokens"] for job in ran.json[0]["jobs"] for run in job["runs"]] == [2]


def test_an_exclusion_of_a_dtype_matches_what_auto_means(labctl: Labctl, tmp_path: Path, checkpoint: Path) -> None:
    text = 'partition = ["dgx2", "dgxh"]\nmodel_id = "MODEL"\n[[exclude]]\ndtype = "bfloat16"\n'
    ran = labctl("submit", str(write(tmp_path, text, checkpoint)), "--dry-run", "--json")
    assert [batch["partition"] for batch in ran.json] == ["dgx2"]


def test_flags_beat_the_file_key_by_key(labctl: Labctl, tmp_path: Path, checkpoint: Path) -> None:
    file = write(
        tmp_path, 'partition = "dgxh"\nmodel_id = "MODEL"\nmax_new_tokens = [8, 16]\nrepeats = 9\n', checkpoint
    )
    ran = labctl("submit", str(file), "--max-new-tokens", "4", "--dry-run", "--json")
    (run,) = ran.json[0]["jobs"][0]["runs"]
    assert (run["max_new_tokens"], run["repeats"]) == (4, 9)


def test_a_prompt_on_the_command_line_beats_the_files_prompts(labctl: Labctl, tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "prompts.txt").write_text("of the file\n")
    file = write(tmp_path, 'partition = "dgxh"\nmodel_id = "MODEL"\nprompts = "prompts.txt"\n', checkpoint)
    ran = labctl("submit", str(file), "--prompt", "mine", "--dry-run", "--json")
    assert list(ran.json[0]["jobs"][0]["prompt_sets"].values()) == [["mine"]]


def test_the_handouts_defaults() -> None:
    asked = SubmissionSpec(partition=("dgxh",))
    assert asked.model_id == ("TinyLlama/TinyLlama-1.1B-Chat-v1.0",)
    assert asked.prompt == "Explain tensor parallelism in 5 bullet points."
    (cell,) = Sweep(asked).cells
    assert (cell.max_new_tokens, cell.batch_size, cell.sampling, cell.dtype, cell.backend) == (
        128,
        1,
        Sampling(),
        "auto",
        "hf",
    )


@pytest.mark.parametrize(
    "text",
    ["hot", "temperature", "temperature=x", "temperature=0", "top_p=0", "top_p=2", "seed=-1", "seed=1.5", "", "a=1"],
)
def test_a_sampling_that_cannot_be_right_is_refused(text: str) -> None:
    with pytest.raises(WrongUseError, match="sampling"):
        sampling.parse(text)


def test_the_source_of_a_flag_is_not_told_as_if_it_were_a_file() -> None:
    with pytest.raises(WrongUseError) as caught:
        build([(FLAGS, {"dtype": ["float15"]})])
    assert caught.value.message == "unknown dtype 'float15'"


# ---------------------------------------------------------------- files of prompts

TWO = ["What is a GPU, and why?", "What is a CPU?"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", '[\n  {"prompt": "What is a GPU, and why?"},\n  {"prompt": "What is a CPU?", "id": 2}\n]\n'),
        ("p.json", '["What is a GPU, and why?", "What is a CPU?"]'),
        ("p.txt", '[{"prompt": "What is a GPU, and why?"}, "What is a CPU?"]'),
        ("p", '{"prompt": "What is a GPU, and why?"}\n\n{"prompt": "What is a CPU?"}\n'),
        ("p.jsonl", '"What is a GPU, and why?"\n{"prompt": "What is a CPU?"}\n'),
        ("p.csv", 'prompt,answer\n"What is a GPU, and why?",x\nWhat is a CPU?,y\n'),
        ("p.txt", 'id,prompt\n1,"What is a GPU, and why?"\n2,What is a CPU?\n'),
        ("p.tsv", "id\tprompt\n1\tWhat is a GPU, and why?\n2\tWhat is a CPU?\n"),
        ("p.CSV", '\ufeffprompt\r\n"What is a GPU, and why?"\r\nWhat is a CPU?\r\n'),
        ("p.txt", "What is a GPU, and why?\r\n\nWhat is a CPU?\n"),
    ],
)
def test_the_content_of_a_file_says_how_its_prompts_are_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert prompts_of(SubmissionSpec(prompts=str(tmp_path / name))) == TWO


@pytest.mark.parametrize(
    "line", ["[INST] hello [/INST]", "{name} is a name", "Tell me: prompt, answer", '"quoted" text']
)
def test_a_text_that_only_begins_like_a_format_is_a_text(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.txt").write_text(line, encoding="utf-8")
    assert prompts_of(SubmissionSpec(prompts=str(tmp_path / "p.txt"))) == [line]


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("p.json", '[{"prompt": "a"},', "is not JSON"),
        ("p.txt", '[\n  {"prompt": "a"}\n  {"prompt": "b"}\n]', "is not JSON"),
        ("p.json", '[{"text": "a"}]', "entry 1 has no prompt"),
        ("p.json", "3", "is not a JSON array"),
        ("p.json", "[" * 100_000, "is not JSON"),
        ("p.txt", '{"prompt": "a"}\nplain\n', "line 2 is not JSON"),
        ("p.csv", "question,answer\na,b\n", "no column prompt"),
        ("p.csv", "prompt,answer\na, and b,c\n", "line 2 has more cells than the header"),
        ("p.csv", 'prompt,answer\n"a,b\n', "is not CSV"),
        ("p.csv", "prompt,answer\n,b\n", "line 2 has no prompt"),
        ("p.yaml", "- prompt: a\n", "unsupported format"),
        ("p.bin", "a\0b", "unsupported format"),
        ("p.json", "[]", "no prompts in file"),
    ],
)
def test_a_structured_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str, text: str, what: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(WrongUseError, match=what) as refused:
        prompts_of(SubmissionSpec(prompts=str(tmp_path / name)))
    assert refused.value.remedy


def test_an_interval_to_repeat_until_is_a_percentage_and_no_part_of_the_run_id(labctl: Labctl) -> None:
    def submitted(*flags: str) -> Any:
        return labctl("submit", "-p", "dgxh", *flags, "--dry-run", "--json", "--no-preflight")

    plain, until = submitted(), submitted("--until", "0.5%", "--max-repeats", "20")
    (run,), (with_until,) = (ran.json[0]["jobs"][0]["runs"] for ran in (plain, until))
    assert with_until["run_id"] == run["run_id"]
    assert (run["until"], with_until["until"], with_until["max_repeats"]) == (None, 0.005, 20)
    for text in ("1", "0%", "90%", "narrow"):
        assert submitted("--until", text).code == 2
