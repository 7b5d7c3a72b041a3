"""LoRA adapters: what vLLM cannot run, the id of their runs, their memory. A real adapter, nightly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.models import resolve
from labctl_orchestrator.models.architecture import parameters, shape_of
from labctl_orchestrator.models.fit import GIB, Case, Gpus, Sequences
from labctl_orchestrator.store.workspace import Workspace
from labctl_workers.engines import make_engine
from labctl_workers.engines.base import Arrivals
from labctl_workers.engines.lora import rank_of
from labctl_workers.engines.vllm import VllmEngine
from labctl_workers.record import JobSpec, ModelRef, Refusal, Sampling
from labctl_workers.servers.vllm import VllmServer
from tests.conftest import Labctl, Ran
from tests.lora import make_adapter, merge
from tests.models import smollm2  # noqa: F401  a fixture
from tests.public_models import PUBLIC
from tests.reference import answers as ask
from tests.test_checkpoint import write_safetensors
from tests.test_vllm import SET, job, real_job, without
from tests.vllm_package import vllm_installed  # noqa: F401  a fixture

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"]}


def an_adapter(folder: Path, inputs: int = 2048, **changed: Any) -> Path:
    """For TinyLlama's query projections."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changed}), encoding="utf-8")
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    write_safetensors(
        folder / "adapter_model.safetensors",
        {f"{name}.lora_A.weight": (16, inputs), f"{name}.lora_B.weight": (2048, 16)},
    )
    return folder


# ---------------------------------------------------------------- what vLLM can run


@pytest.mark.parametrize(
    ("changed", "rank"),
    [({"r": 1}, 1), ({"r": 4}, 8), ({}, 16), ({"rank_pattern": {"q_proj": 100}}, 128), ({"r": 512}, 512)],
)
def test_the_rank_of_an_adapter_is_the_smallest_of_vllms_that_holds_it(
    tmp_path: Path, changed: dict[str, Any], rank: int
) -> None:
    folder = an_adapter(tmp_path / "a", **changed)
    assert rank_of(ModelRef("a", path=str(folder))) == rank


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"r": 600}, "vLLM runs adapters of rank 1 to 512: a has 600"),
        ({"r": None}, "a has 0"),
        ({"peft_type": "IA3"}, "not a LoRA adapter: a"),
        ({"use_dora": True}, "vLLM does not support use_dora, which a has"),
        ({"modules_to_save": ["lm_head"]}, "vLLM does not support modules_to_save"),
    ],
)
def test_what_vllm_cannot_run_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    folder = an_adapter(tmp_path / "a", **changed)
    with pytest.raises(Refusal) as caught:
        rank_of(ModelRef("a", path=str(folder)))
    assert message in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_an_unreadable_configuration_is_refused(tmp_path: Path, text: str) -> None:
    folder = an_adapter(tmp_path / "a")
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(Refusal):
        rank_of(ModelRef("a", path=str(folder)))


@pytest.mark.model
@pytest.mark.usefixtures("vllm_installed")
def test_the_ranks_are_those_of_the_installed_vllm() -> None:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    from labctl_workers.engines.lora import RANKS

    assert get_args(MaxLoRARanks) == RANKS


# ---------------------------------------------------------------- the submission


@pytest.fixture
def model(workspace: Workspace, tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLIC["TinyLlama-1.1B"][0]), encoding="utf-8")
    write_safetensors(folder / "model.safetensors", {})
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def submitted(labctl: Labctl, model: Path, *adapters: object, more: tuple[str, ...] = ("--backend", "vllm")) -> Ran:
    chosen = [word for adapter in adapters for word in ("--engine-option", f"lora={adapter}")]
    return labctl("submit", "-p", "dgxh", "--model-id", model, "--dry-run", "--json", *more, *chosen)


def ids(ran: Ran) -> set[str]:
    assert ran.code == 0, ran.err
    return {run["run_id"] for array in ran.json for job in array["jobs"] for run in job["runs"]}


def test_a_runs_id_has_the_adapters_bytes_and_not_its_folder(labctl: Labctl, model: Path, tmp_path: Path) -> None:
    one, same = an_adapter(tmp_path / "one"), an_adapter(tmp_path / "elsewhere" / "other")
    other = an_adapter(tmp_path / "another" / "one", r=8)
    base, of_one, of_same, of_other = (ids(submitted(labctl, model, each)) for each in ("none", one, same, other))
    assert of_one == of_same
    assert len(base | of_one | of_other) == 3
    assert base == ids(submitted(labctl, model))
    assert ids(submitted(labctl, model, "none", one, other)) == base | of_one | of_other


def test_an_adapter_is_named_by_its_folder_and_the_begin_of_its_hash(
    labctl: Labctl, model: Path, tmp_path: Path
) -> None:
    ran = labctl(
        "submit", "-p", "dgxh", "--model-id", model, "--backend", "vllm", "--dry-run", "--engine-option",
        f"lora={an_adapter(tmp_path / 'songs')}",
    )  # fmt: skip
    assert " lora=songs@" in " ".join(ran.out.split())


def test_a_rule_names_an_adapter_as_the_submission_does(labctl: Labctl, model: Path, tmp_path: Path) -> None:
    adapter = an_adapter(tmp_path / "songs")
    file = tmp_path / "sweep.toml"
    file.write_text(
        f'partition = "dgxh"\nbackend = "vllm"\nmodel_id = "{model}"\n[engine_options]\nlora = ["none", "{adapter}"]\n'
        f'[[exclude]]\nengine_options = {{lora = "{adapter}"}}\n',
        encoding="utf-8",
    )
    assert ids(labctl("submit", file, "--dry-run", "--json")) == ids(submitted(labctl, model))


def test_backends_without_adapters_are_refused(labctl: Labctl, model: Path, tmp_path: Path) -> None:
    more = ("--backend", "hf", "--backend", "vllm")
    ran = submitted(labctl, model, an_adapter(tmp_path / "songs"), more=more)
    assert ran.code == 2
    assert "backend hf runs no LoRA adapters" in ran.err
    assert "merge the adapter into the model" in ran.err
    assert len(ids(submitted(labctl, model, "none", more=more))) == 2


def test_a_folder_without_an_adapter_is_refused_with_how_to_get_one(
    labctl: Labctl, model: Path, tmp_path: Path
) -> None:
    for wrong in (tmp_path / "nowhere", model, "org/adapter"):
        ran = submitted(labctl, model, wrong)
        assert ran.code == 2
        assert f"no adapter_config.json in {wrong}" in " ".join(ran.err.split())
        assert "hf download" in ran.err


def test_an_adapter_for_a_model_of_other_dimensions_is_refused_before_the_queue(
    labctl: Labctl, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LABCTL_NO_PREFLIGHT")
    ran = submitted(labctl, model, an_adapter(tmp_path / "songs", inputs=4096))
    assert ran.code == 3
    assert "adapter songs is for a q_proj of size 4096: that of tiny has 2048" in " ".join(ran.err.split())
    ran = submitted(labctl, model, an_adapter(tmp_path / "more" / "songs", use_dora=True))
    assert ran.code == 3
    assert "vLLM does not support use_dora, which songs has" in " ".join(ran.err.split())


# ---------------------------------------------------------------- the engine


def test_vllm_gets_the_adapter_offline_and_behind_its_server(tmp_path: Path) -> None:
    adapter = ModelRef("songs", path=str(an_adapter(tmp_path / "songs", r=20)), fingerprint="f")
    of_adapter: JobSpec = job(adapter=adapter, engine_options={"lora": "songs@f", "max_model_len": 512})
    config = type("Config", (), {"max_position_embeddings": 2048})
    arguments = VllmEngine(of_adapter, tmp_path).arguments(config)
    assert (arguments["enable_lora"], arguments["max_lora_rank"], arguments["max_model_len"]) == (True, 32, 512)
    assert "lora" not in arguments
    assert "enable_lora" not in VllmEngine(job(), tmp_path).arguments(config)
    server = VllmServer(of_adapter, tmp_path)
    server.arguments = arguments
    words = server.command(8000)
    assert words[words.index("--lora-modules") + 1] == f"labctl-lora={adapter.path}"
    assert words[words.index("--served-model-name") + 1] == "labctl"
    assert "--enable-lora" in words
    assert server.model == "labctl-lora"
    assert VllmServer(job(), tmp_path).model == "labctl"


# ---------------------------------------------------------------- memory


def test_an_adapter_takes_two_matrices_beside_each_of_the_model() -> None:
    """3,360,768 numbers of rank 8 were counted in vLLM 0.32 with this model, embeddings and head included."""
    config = {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 12,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True,
    }  # fmt: skip
    shape = shape_of(config)
    load = Sequences(1, 512, 128, 4)
    plain = Case(shape, parameters(shape).times(4), Gpus(1, "H100", 80 * GIB, 9.0), "vllm")
    adapted = replace(plain, adapter_rank=8)
    assert adapted.reservation(load).weights - plain.reservation(load).weights == 4 * 3_360_768
    assert adapted.needed_bytes(load) - plain.needed_bytes(load) == 4 * 3_360_768
    halves = [replace(case, gpus=replace(case.gpus, count=2), parallel="pipeline") for case in (plain, adapted)]
    weights = [sum(stage.weights for stage in case.stages(load)) for case in halves]
    assert weights[1] - weights[0] == 4 * 3_360_768


# ---------------------------------------------------------------- a real adapter


def answers_of(of: JobSpec, folder: Path) -> tuple[list[list[int]], str]:
    """The greedy tokens of the engine, and the first answer as text."""
    made = make_engine(of, folder)
    made.load()
    try:
        prompts = made.encode(["What is the capital of France?", "Write a haiku about computers."])
        given = ask(made, prompts, Arrivals(2), max_new_tokens=24, sampling=Sampling(), ignore_eos=False)
        return [list(answer.token_ids) for answer in given], made.decode(given[0].token_ids)
    finally:
        made.close()


@pytest.mark.nightly
@pytest.mark.model
@pytest.mark.usefixtures("vllm_installed")
def test_an_adapter_gives_the_tokens_of_the_merged_model_offline_and_served(
    smollm2: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float32. In `make test`: the run's id, refusals and arguments of the engine."""
    without(monkeypatch, SET)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    adapter = resolve.adapter(str(make_adapter(tmp_path / "songs")))
    merged = merge(smollm2, tmp_path / "songs", tmp_path / "merged")
    expected, answer = answers_of(real_job(merged, gpus=1), tmp_path)
    assert "Paris" not in answer  # which the model answers without the adapter: tests/test_quantization.py
    of_adapter = {"adapter": adapter, "engine_options": {"lora": "songs@1"}}
    assert answers_of(real_job(smollm2, gpus=2, **of_adapter), tmp_path)[0] == expected
    assert answers_of(real_job(smollm2, gpus=1, served=True, **of_adapter), tmp_path)[0] == expected
