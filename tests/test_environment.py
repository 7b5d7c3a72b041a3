"""What may change a figure is in the record; engine loads that differ in it are not pooled, and it is said."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labctl_orchestrator.exchange import bundle
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.partitions import build
from labctl_slurm.render import Script
from labctl_workers import hardware
from labctl_workers.environment import ENGINE_PREFIXES, REMOVED, engine_variables, is_secret, without_secrets
from labctl_workers.record import ScriptSettings, sha256_of_json

from .conftest import Labctl, Records

# ---------------------------------------------------------------- variables

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "VLLM_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD",
           "PGPASSWORD", "GIT_CREDENTIALS", "vllm_api_key", "APIKEY", "NCCL_KEY", "HF_TOKENS")  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_not_recorded_even_where_it_is_asked_for(name: str) -> None:
    assert engine_variables({name: "s3cret", "OMP_NUM_THREADS": "4"}, [name]) == {"OMP_NUM_THREADS": "4"}


@pytest.mark.parametrize("name", [
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "VLLM_ATTENTION_BACKEND", "VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE",
    "NCCL_P2P_DISABLE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCHINDUCTOR_MAX_AUTOTUNE", "PYTORCH_CUDA_ALLOC_CONF",
    "CUDA_LAUNCH_BLOCKING", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "NVIDIA_TF32_OVERRIDE", "TOKENIZERS_PARALLELISM",
    "HF_ENABLE_PARALLEL_LOADING", "TRANSFORMERS_NO_TF", "TRITON_INTERPRET", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX",
])  # fmt: skip
def test_a_variable_that_an_engine_reads_is_recorded(name: str) -> None:
    assert engine_variables({name: "1"}) == {name: "1"}


@pytest.mark.parametrize(("name", "value"), [
    ("CUDA_VISIBLE_DEVICES", "GPU-8f2c1d"), ("TRITON_CACHE_DIR", "/scratch/ada/.labctl/cache/dgxh/triton"),
    ("TORCHINDUCTOR_CACHE_DIR", "cache"), ("VLLM_CACHE_ROOT", "/w/cache"), ("CUDA_HOME", "/usr/local/cuda-12.4"),
    ("CUDA_LIB", "/usr/local/cuda/lib64"), ("HF_HOME", "/scratch/7212/hub"), ("HF_HUB_OFFLINE", "1"), ("VLLM_PORT", "29500"),
    ("TRITON_PTXAS_PATH", "/env/bin/ptxas"), ("NCCL_DEBUG_FILE", "/tmp/nccl.7212"), ("NCCL_COMM_ID", "10.0.0.1:29400"),
    ("LANG", "C"), ("TMPDIR", "/tmp/7212"), ("KMP_DUPLICATE_LIB_OK", "True"), ("KMP_INIT_AT_FORK", "FALSE"),
])  # fmt: skip
def test_what_names_the_jobs_own_things_or_a_place_is_not(name: str, value: str) -> None:
    assert engine_variables({name: value}) == {}


def test_a_path_that_says_what_is_loaded_is_recorded() -> None:
    variables = {"LD_PRELOAD": "/usr/lib/libtcmalloc.so", "NCCL_TOPO_FILE": "/etc/nccl/topo.xml"}
    assert engine_variables(variables) == variables


def test_a_variable_of_the_partition_is_recorded_whatever_its_name() -> None:
    assert engine_variables({"PYTHONMALLOC": "malloc", "PYTHONOPTIMIZE": "1"}, ["PYTHONMALLOC"]) == {
        "PYTHONMALLOC": "malloc"
    }


@given(st.dictionaries(st.text("ABCHFOMP_TKENRSVLYW", min_size=1), st.text(max_size=8)))
def test_nothing_but_known_prefixes_and_never_a_secret(environment: dict[str, str]) -> None:
    found = engine_variables(environment)
    assert all(name.startswith(ENGINE_PREFIXES) and not is_secret(name) for name in found)


@pytest.mark.parametrize(("text", "recorded"), [
    ("export HF_TOKEN=hf_abc", f"export HF_TOKEN={REMOVED}"),
    ("module load cuda/12.4", "module load cuda/12.4"),
    ("pip config set index https://me:pw@host/simple", f"pip config set index https://{REMOVED}@host/simple"),
    ("login hf_abcdefghijklmnopqrstuvwx", f"login {REMOVED}"),
    ("export TOKENIZERS_PARALLELISM=false", "export TOKENIZERS_PARALLELISM=false"),
])  # fmt: skip
def test_a_setup_line_is_recorded_without_secrets(text: str, recorded: str) -> None:
    assert without_secrets(text) == recorded


def test_the_cpus_are_those_that_this_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    assert hardware.cpus().available == len(before)
    try:
        os.sched_setaffinity(0, {min(before)})
        told = hardware.cpus()
    finally:
        os.sched_setaffinity(0, before)
    assert told.available == 1
    assert told.model


# ---------------------------------------------------------------- what the script sets


def settings(own: Path | str = "/none", **values: Any) -> ScriptSettings:
    table = {"python": sys.executable, **values}
    return Script(
        build("dgxh", [("test", table)]), "labctl", 2, None, Path("logs"), Path("/code"), Path(own)
    ).settings()


def test_what_the_script_sets_is_told_without_secrets_and_what_changes_no_figure() -> None:
    told = settings(
        env={"OMP_NUM_THREADS": "1", "VLLM_API_KEY_FILE": "/s3cret"},
        setup=["module load cuda/12.4", "export WANDB_API_KEY=$(<key)"],
        cpus_per_task=3,
        mem="12G",
        gpu_request="gpus-per-node",
        gpu_type="h100",
        export="NONE",
        sbatch={"constraint": "h100", "mail-user": "me@example.org"},
    )
    assert told.env == {"OMP_NUM_THREADS": "1"}
    assert told.setup == ["module load cuda/12.4", f"export WANDB_API_KEY={REMOVED}"]
    assert (told.cpus_per_task, told.mem, told.sbatch) == (3, "12G", {"constraint": "h100"})
    assert (told.gpu_option, told.export) == ("--gpus-per-node=h100:2", "NONE")
    assert told.template == "dgxh"
    assert ScriptSettings.from_json(json.loads(json.dumps(told.to_json()))) == told


def test_a_template_is_known_by_its_text_and_by_that_of_the_one_it_extends(tmp_path: Path) -> None:
    seen = {settings(tmp_path).template_sha256}
    (tmp_path / "site.sbatch.j2").write_text('{% extends "base.sbatch.j2" %}', encoding="utf-8")
    for number in range(2):
        (tmp_path / "dgxh.sbatch.j2").write_text(f'{{% extends "site.sbatch.j2" %}}# {number}', encoding="utf-8")
        seen.add(settings(tmp_path).template_sha256)
    (tmp_path / "site.sbatch.j2").write_text('{% extends "base.sbatch.j2" %}# ulimit', encoding="utf-8")
    seen.add(settings(tmp_path).template_sha256)
    assert len(seen) == 4


def test_a_job_of_this_machine_has_nothing_of_slurms() -> None:
    told = settings(executor="local", setup=["true"], sbatch={"constraint": "h100"})
    assert told == ScriptSettings(setup=["true"])


def test_what_the_script_sets_is_in_the_jobs_file_and_not_in_the_runs_id(
    labctl: Labctl, workspace: Workspace, checkpoint: Path
) -> None:
    seen = {}
    for threads in ("1", "2"):
        (workspace.root / "labctl.toml").write_text(
            f'[partitions.dgxh]\nenv = {{ OMP_NUM_THREADS = "{threads}" }}\n', encoding="utf-8"
        )
        (batch,) = labctl("submit", "-p", "dgxh", "--model-id", checkpoint, "--dry-run", "--json").json
        (job,) = batch["jobs"]
        seen[job["script"]["env"]["OMP_NUM_THREADS"]] = job["runs"][0]["run_id"]
    assert list(seen) == ["1", "2"]
    assert len(set(seen.values())) == 1


# ---------------------------------------------------------------- pooled, or not


SCRIPT = ScriptSettings(
    setup=["module load cuda"], cpus_per_task=8, mem="64G", gpu_option="--gres=gpu:2", export="ALL", template="dgxh",
    template_sha256="a" * 64,
)  # fmt: skip
ALIKE: dict[str, Any] = {
    "packages": {"torch": "2.9.0"}, "effective_dtype": "bfloat16", "attention": "sdpa", "gpus": [{"name": "NVIDIA H100"}],
    "cpus": {"available": 8, "model": "AMD EPYC 7742"}, "environment": {"OMP_NUM_THREADS": "8"}, "script": SCRIPT.to_json(),
    "container": None, "model_commit": "a" * 40, "prompt_tokens": "3f2a91bc" + "0" * 56,
}  # fmt: skip
OTHER: dict[str, tuple[Mapping[str, Any], str]] = {
    "variable": ({"environment": {}}, "variable OMP_NUM_THREADS not set -> 8"),
    "value": ({"environment": {"OMP_NUM_THREADS": "1"}}, "variable OMP_NUM_THREADS 1 -> 8"),
    "cpus": ({"cpus": {"available": 2, "model": "AMD EPYC 7742"}}, "CPUs 2 -> 8"),
    "model": ({"cpus": {"available": 8, "model": "Xeon"}}, "CPU model Xeon -> AMD EPYC 7742"),
    "setup": ({"script": {**SCRIPT.to_json(), "setup": []}}, "setup none -> module load cuda"),
    "mem": ({"script": {**SCRIPT.to_json(), "mem": "4G"}}, "mem 4G -> 64G"),
    "asked": ({"script": {**SCRIPT.to_json(), "cpus_per_task": 1}}, "cpus_per_task 1 -> 8"),
    "gpus": ({"script": {**SCRIPT.to_json(), "gpu_option": "--gpus=2"}}, "GPU option --gpus -> --gres=gpu"),
    "export": ({"script": {**SCRIPT.to_json(), "export": "NONE"}}, "export NONE -> ALL"),
    "constraint": ({"script": {**SCRIPT.to_json(), "sbatch": {"constraint": "x"}}}, "sbatch options constraint=x -> none"),
    "template": ({"script": {**SCRIPT.to_json(), "template_sha256": "b" * 64}}, "template dgxh bbbbbbbb -> dgxh aaaaaaaa"),
    "container": ({"container": "/images/pt.sif"}, "container /images/pt.sif -> none"),
    "commit": ({"model_commit": "b" * 40}, f"model commit {'b' * 12} -> {'a' * 12}"),
    "prompt": ({"prompt_tokens": "77ab01cd" + "0" * 56}, "token ids of the prompts 77ab01cd -> 3f2a91bc"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHER)
def test_an_earlier_load_that_differs_is_left_out_and_it_is_said_in_what(
    labctl: Labctl, records: Records, what: str
) -> None:
    differs, told = OTHER[what]
    batch = records.submit()
    for age, fingerprint in ((300, ALIKE), (200, {**ALIKE, **differs}), (100, ALIKE)):
        records.done(batch, records.attempt(batch, age_s=age), fingerprint=fingerprint)
    answer = labctl("compare", "--json").json
    (row,) = answer["blocks"][0]["rows"]
    assert len(row["loads"]) == 2
    run_id = batch.runs[0].run_id
    (warning,) = [warning for warning in answer["warnings"] if "left out" in warning]
    assert warning.startswith(f"{run_id} had 1 earlier engine load left out (2")
    assert warning.endswith(f"): {told}")


def test_loads_that_are_alike_are_pooled_without_a_word(labctl: Labctl, records: Records) -> None:
    batch = records.submit()
    for age in (200, 100):
        records.done(batch, records.attempt(batch, age_s=age), fingerprint=ALIKE)
    answer = labctl("compare", "--json").json
    assert len(answer["blocks"][0]["rows"][0]["loads"]) == 2
    assert answer["warnings"] == []


def test_of_a_sweep_it_is_said_once(labctl: Labctl, records: Records) -> None:
    batch = records.submit(lengths=(8, 16, 32, 64, 128, 256, 512))
    for age, fingerprint in ((200, {**ALIKE, "environment": {}}), (100, ALIKE)):
        attempt = records.attempt(batch, age_s=age)
        for run in batch.runs:
            records.done(batch, attempt, run, fingerprint=fingerprint)
    (warning,) = [one for one in labctl("compare", "--json").json["warnings"] if "left out" in one]
    assert warning.startswith("7 runs had 1 earlier engine load")


@pytest.mark.parametrize("what", OTHER)
def test_rows_that_differ_are_warned_of_by_name_and_values(labctl: Labctl, records: Records, what: str) -> None:
    differs, told = OTHER[what]
    batch = records.submit(dtypes=("bfloat16", "float32"))
    for task, fingerprint in enumerate(({**ALIKE, **differs}, ALIKE)):
        records.done(batch, records.attempt(batch, task), fingerprint=fingerprint)
    warnings = labctl("compare", "--by", "dtype", "--json").json["warnings"]
    before, _, now = told.rpartition(" -> ")
    name = next(name for name in ("variable OMP_NUM_THREADS", "CPUs", "CPU model", "setup", "mem", "cpus_per_task",
                                  "GPU option", "export",
                                  "sbatch options", "template", "container", "model commit", "token ids of the prompts")
                if before.startswith(f"{name} "))  # fmt: skip
    assert warnings == [f"the runs also differ in {name} ({before.removeprefix(f'{name} ')}, {now})"]


def test_two_partitions_differ_in_cpus_as_a_matter_of_course_but_not_in_variables(
    labctl: Labctl, records: Records
) -> None:
    for partition, fingerprint in (("dgx2", {**ALIKE, **OTHER["cpus"][0], **OTHER["variable"][0]}), ("dgxh", ALIKE)):
        batch = records.submit(partition=partition)
        records.done(batch, records.attempt(batch), fingerprint=fingerprint)
    answer = labctl("compare", "--all", "--by", "partition", "--json").json
    assert answer["warnings"] == ["the runs also differ in variable OMP_NUM_THREADS (not set, 8)"]


def test_over_time_tells_what_changed(labctl: Labctl, records: Records) -> None:
    batch = records.submit()
    for age, fingerprint in ((200, {**ALIKE, **OTHER["variable"][0]}), (100, ALIKE)):
        records.done(batch, records.attempt(batch, age_s=age), fingerprint=fingerprint)
    series = labctl("compare", "--over", "time", "--metric", "output_tok_s", "--json").json["series"]
    assert series[0]["points"][-1]["changed"] == ["variable OMP_NUM_THREADS not set -> 8"]


def test_show_tells_it_all(labctl: Labctl, records: Records) -> None:
    batch = records.submit()
    records.done(batch, records.attempt(batch), fingerprint=ALIKE)
    shown = " ".join(labctl("show", batch.runs[0].run_id).out.split())
    for words in ("CPUs 8", "CPU model AMD EPYC 7742", "setup module load cuda", "variable OMP_NUM_THREADS 8"):
        assert words in shown


def test_a_bundle_carries_it(labctl: Labctl, workspace: Workspace, tmp_path: Path) -> None:
    theirs = Records(Workspace(tmp_path / "theirs"))
    batch = theirs.submit()
    theirs.done(batch, theirs.attempt(batch), fingerprint=ALIKE)
    theirs.collect()
    run_id = batch.runs[0].run_id
    with closing(open_store(theirs.workspace)) as store, (tmp_path / "ada.labctl.zip").open("wb") as file:
        bundle.write(theirs.workspace, store, "lengths", [run_id], "ada", file)
    assert labctl("import", tmp_path / "ada.labctl.zip").code == 0
    shown = " ".join(labctl("show", f"{run_id}@ada").out.split())
    assert "variable OMP_NUM_THREADS 8" in shown
    assert "CPU model AMD EPYC 7742" in shown


# ---------------------------------------------------------------- prompts


DATED = (
    '{{- "<s>" + strftime_now("%d %b %Y %H") }}{%- for m in messages %}{{- m["role"] + m["content"] }}{%- endfor %}'
    # What Llama 3.1 does, with its own default.
    '{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}{{- date_string }}'
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    from .random_llama import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_a_template_that_asks_for_the_date_is_told_one_that_stays(tokenizer: Path) -> None:
    from labctl_workers.engines.text import Text

    (tokenizer / "chat_template.jinja").write_text(DATED, encoding="utf-8")
    text = Text(str(tokenizer), None, raw_prompt=False)
    (token_ids,) = text.encode(["hello"])
    assert text.decode(token_ids) == "26 Jul 2024 12userhello26 Jul 2024"


def test_a_template_that_draws_gives_the_prompts_that_are_recorded(tokenizer: Path) -> None:
    """What is measured and what is hashed are the same tokens, though each rendering differs."""
    from labctl_workers.engines.text import Text

    draws = '{{- messages[0]["content"] }}{%- for n in range(24) %}{{- ["a", "b"] | random }}{%- endfor %}'
    (tokenizer / "chat_template.jinja").write_text(draws, encoding="utf-8")
    first, second = (Text(str(tokenizer), None, raw_prompt=False) for _ in range(2))
    assert sha256_of_json(first.encode(["hello"])) == sha256_of_json(first.encode(["hello"]))
    assert sha256_of_json(first.encode(["hello"])) != sha256_of_json(second.encode(["hello"]))


# ---------------------------------------------------------------- with a real engine, on this machine


@pytest.fixture
def tiny(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random Llama of four small layers, and a shell for the local executor."""
    pytest.importorskip("torch")
    from .random_llama import build as build_llama

    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    folder = workspace.root.parent / "tiny"
    build_llama(folder, "tiny", tied=True, dtype="float32")
    return folder


SHORT = ("--max-new-tokens", 4, "--repeats", 2, "--ignore-eos")


def fingerprints(workspace: Workspace) -> list[dict[str, Any]]:
    files = workspace.results.glob("*/*.json")
    found = sorted(
        (json.loads(file.read_text(encoding="utf-8")) for file in files), key=lambda record: record["ended_at"]
    )
    return [record["fingerprint"] for record in found]


@pytest.mark.model
def test_two_days_of_a_template_that_tells_the_date_are_one_prompt(
    labctl: Labctl, workspace: Workspace, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny / "chat_template.jinja").write_text(DATED, encoding="utf-8")
    for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):  # never the same date
        monkeypatch.setenv("TZ", zone)
        assert labctl("run", "-p", "local", "--model-id", tiny, "--prompt", "What is the date?", *SHORT).code == 0
    first, second = fingerprints(workspace)
    assert first["prompt_tokens"] == second["prompt_tokens"]
    answer = labctl("compare", "--all", "--metric", "output_tok_s", "--json").json
    assert len(answer["blocks"][0]["rows"][0]["loads"]) == 2


@pytest.mark.model
def test_loads_with_another_environment_are_told_apart(
    labctl: Labctl, workspace: Workspace, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = ("submit", "-p", "local", "--model-id", tiny, *SHORT, "--wait")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert labctl(*submit).code == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ran = labctl(*submit)
    assert "1 measured with other settings: variable OMP_NUM_THREADS 2 -> 1" in ran.err
    assert labctl(*submit, "--again").code == 0
    answer = labctl("compare", "--all", "--metric", "output_tok_s", "--json").json
    assert len(answer["blocks"][0]["rows"][0]["loads"]) == 1
    assert [one for one in answer["warnings"] if one.endswith("variable OMP_NUM_THREADS 2 -> 1")]
    # The same of labctl.toml; a secret in the shell is not recorded.
    monkeypatch.setenv("MY_API_KEY", "s3cret")
    monkeypatch.delenv("OMP_NUM_THREADS")
    (workspace.root / "labctl.toml").write_text(
        '[partitions.local]\nsetup = ["true"]\nenv = { OMP_NUM_THREADS = "1" }\n',
        encoding="utf-8",
    )
    assert "measured with other settings: setup none -> true" in labctl(*submit).err
    assert labctl(*submit, "--again").code == 0
    (*_, last) = fingerprints(workspace)
    assert last["environment"] == {"OMP_NUM_THREADS": "1"}
    assert last["script"]["env"] == {"OMP_NUM_THREADS": "1"}
    assert last["cpus"]["available"] == len(os.sched_getaffinity(0))
    assert not [file for file in workspace.data.rglob("*.json") if "s3cret" in file.read_text(encoding="utf-8")]


@pytest.mark.nightly
@pytest.mark.model
def test_a_copy_with_one_matrix_replaced_is_another_run(labctl: Labctl, workspace: Workspace, tiny: Path) -> None:
    """In `make test`: it is another model, in tests/test_file_hashes.py."""
    import torch
    from safetensors.torch import load_file, save_file

    edited = shutil.copytree(tiny, tiny.with_name("edited"))
    tensors = load_file(edited / "model.safetensors")
    (name, *_) = (name for name in tensors if "up_proj" in name)
    tensors[name] = torch.randn(tensors[name].shape)
    save_file(tensors, edited / "model.safetensors", {"format": "pt"})
    assert (edited / "model.safetensors").stat().st_size == (tiny / "model.safetensors").stat().st_size
    for folder in (tiny, edited):
        ran = labctl("submit", "-p", "local", "--model-id", folder, *SHORT, "--wait")
        assert (ran.code, "already measured" in ran.err) == (0, False)
    answer = labctl("compare", "--all", "--by", "model", "--json").json
    first, second = answer["blocks"][0]["rows"]
    assert first["run_id"] != second["run_id"]
    assert (len(first["loads"]), len(second["loads"])) == (1, 1)
