"""The whole way of the data on a real Slurm cluster: real sbatch, squeue and sacct, the real engine, a real model."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from labctl_workers.measure import METRICS
from labctl_workers.record import Repeat

from .cluster import SlurmCluster
from .conftest import CPU_PARTITIONS, Lab, sleeping

PROMPT = "Explain tensor parallelism in 5 bullet points."


@pytest.fixture(scope="module")
def request_of_two(lab: Lab, shallow: Path) -> list[dict[str, Any]]:
    """One request over both partitions, run to its end; HF_TOKEN and SBATCH_PARTITION set as a user might have them."""
    answer = lab.json(
        "submit", "-p", "dgxh", "-p", "dgx2", "--model-id", str(shallow), "--dtype", "float32",
        "--max-new-tokens", "16", "--wait", "--name", "both",
        HF_TOKEN="hf_sentinel_0123456789", SBATCH_PARTITION="dgx2", SBATCH_GRES="gpu:1",
    )  # fmt: skip
    runs: list[dict[str, Any]] = answer["runs"]
    return runs


def accounted(cluster: SlurmCluster, slurm_id: str) -> dict[str, str]:
    """sacct's row of an ended job: it comes some seconds late."""
    for _ in range(100):
        row = cluster.job(slurm_id)
        if row.get("State") == "COMPLETED":
            return row
        time.sleep(0.2)
    raise AssertionError(f"sacct does not call {slurm_id} completed: {row}")


def record_of(lab: Lab, run: dict[str, Any]) -> dict[str, Any]:
    (record,) = lab.json("show", run["run_id"])["records"]
    return dict(record)


def test_both_jobs_run_on_their_own_nodes_with_two_gpus_each(lab: Lab, request_of_two: list[dict[str, Any]]) -> None:
    assert [(run["partition"], run["state"]) for run in request_of_two] == [("dgxh", "done"), ("dgx2", "done")]
    for run in request_of_two:
        row = accounted(lab.cluster, run["slurm_id"])
        assert row["NodeList"].startswith(f"{run['partition']}-")
        assert "gres/gpu=2" in row["AllocTRES"].split(",")
        assert record_of(lab, run)["attempt"]["node"] == row["NodeList"]


@pytest.fixture(scope="module")
def expected(shallow: Path) -> dict[str, Any]:
    return generated_by_transformers(shallow, PROMPT, 16)


def test_the_text_of_both_is_what_generate_gives(
    lab: Lab, request_of_two: list[dict[str, Any]], expected: dict[str, Any]
) -> None:
    for run in request_of_two:
        record = record_of(lab, run)
        for repeat in record["repeats"]:
            (sample,) = repeat["samples"]
            assert sample["token_ids"] == expected["token_ids"]
            assert sample["text"] == expected["text"]


@pytest.mark.nightly
def test_staged_on_a_node_without_gpus_says_what_generate_says(
    fresh_lab: Lab, shallow: Path, expected: dict[str, Any]
) -> None:
    """In `make test`: staged's tokens in tests/test_stages.py, and a local job of it in tests/test_exercise.py."""
    answer = fresh_lab.json(
        "submit", "-p", "dgxh", "--model-id", str(shallow), "--dtype", "float32", "--max-new-tokens", "16",
        "--backend", "staged", "--engine-option", "compile=false", "--wait",
    )  # fmt: skip
    (run,) = answer["runs"]
    record = record_of(fresh_lab, run)
    assert record["fingerprint"]["compiled"] is False
    assert len(record["fingerprint"]["stages"]["layers"]) == 2
    for repeat in record["repeats"]:
        (sample,) = repeat["samples"]
        assert sample["token_ids"] == expected["token_ids"]
        assert len(sample["token_times_s"]) == 16
        assert len(sample["log_probabilities"]) == 16


def generated_by_transformers(model: Path, prompt: str, max_new_tokens: int) -> dict[str, Any]:
    """`model.generate` as its own documentation writes it, in a process of its own."""
    program = textwrap.dedent(
        """
        import json, sys
        from transformers import AutoModelForCausalLM, AutoTokenizer
        folder, prompt, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1]:]
        text = tokenizer.decode(output, skip_special_tokens=True)
        print(json.dumps({"token_ids": output.tolist(), "text": text}))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(model), prompt, str(max_new_tokens)],
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout))


def test_a_record_says_what_was_measured_where_and_with_what(lab: Lab, request_of_two: list[dict[str, Any]]) -> None:
    record = record_of(lab, request_of_two[0])
    assert record["load_s"] > 0
    assert record["warmup_s"] > 0
    assert record["attempt"]["slurm_job_id"] == request_of_two[0]["slurm_id"]
    assert record["fingerprint"]["effective_dtype"] == "float32"
    assert {"torch", "transformers", "accelerate"} <= record["fingerprint"]["packages"].keys()
    batch, _, task = record["attempt"]["job_id"].rpartition(".")
    job = json.loads((lab.root / ".labctl" / "arrays" / batch / f"{task}.json").read_text(encoding="utf-8"))
    assert record["fingerprint"]["script"] == job["script"]
    assert job["script"]["template"] == request_of_two[0]["partition"]
    assert record["fingerprint"]["cpus"]["available"] >= 1
    assert len(record["fingerprint"]["prompt_tokens"]) == 64
    assert len(record["repeats"]) == 3
    for repeat in record["repeats"]:
        (sample,) = repeat["samples"]
        assert len(sample["token_times_s"]) == len(sample["token_ids"]) == 16
        assert sample["token_times_s"] == sorted(sample["token_times_s"])
        metrics = {
            name: METRICS[name].compute(Repeat.from_json(repeat)) for name in ("output_tok_s", "ttft_s", "e2e_s")
        }
        assert metrics["output_tok_s"] == pytest.approx(16 / repeat["wall_s"])
        assert metrics["ttft_s"] < metrics["e2e_s"] <= repeat["wall_s"]


def test_the_log_reads_as_the_handouts_script_does(lab: Lab, request_of_two: list[dict[str, Any]]) -> None:
    log = lab.ok("logs", request_of_two[0]["run_id"])
    assert "Tensor/model parallel GPU ids: none (cpu)" in log
    assert "HF device map GPUs in use: ['cpu']" in log
    assert "Throughput: " in log


def test_no_file_of_the_workspace_holds_the_token(lab: Lab, request_of_two: list[dict[str, Any]]) -> None:
    files = [path for path in lab.root.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if b"hf_sentinel_0123456789" in path.read_bytes()] == []


def test_compare_answers_from_the_latest_request(lab: Lab, request_of_two: list[dict[str, Any]]) -> None:
    answer = lab.json("compare", "--metric", "output_tok_s")
    assert answer["by"] == ["partition"]
    (block,) = answer["blocks"]
    assert [row["at"] for row in block["rows"]] == [{"partition": "dgxh"}, {"partition": "dgx2"}]
    first, second = block["rows"]
    assert first["ratio"] == 1
    means = [statistics.geometric_mean(*row["values"]) for row in (first, second)]
    assert second["ratio"] == pytest.approx(means[1] / means[0])
    assert (second["n"], second["n_of"], len(second["loads"])) == (3, "repeats", 1)
    assert "ratio: throughput relative to partition dgxh (higher is better)" in lab.ok("compare")
    assert answer["verdicts"][0] in lab.ok("compare", "--details")


def test_a_measured_cell_is_not_queued_again(lab: Lab, request_of_two: list[dict[str, Any]], shallow: Path) -> None:
    before = sorted((lab.root / ".labctl" / "arrays").iterdir())
    done = lab.labctl(
        "submit", "-p", "dgxh", "--model-id", str(shallow), "--dtype", "float32", "--max-new-tokens", "16", "--wait"
    )
    assert done.returncode == 0
    assert "skipped 1 of 1 run: already measured" in done.stderr
    assert sorted((lab.root / ".labctl" / "arrays").iterdir()) == before
    assert lab.json("status")[0]["state"] == "done"


def test_rebuild_gives_a_database_equal_row_for_row(lab: Lab, request_of_two: list[dict[str, Any]]) -> None:
    lab.ok("status", "--all")
    before = tables(lab)
    assert before["results"]
    lab.ok("collect", "--rebuild")
    assert tables(lab) == before


def tables(lab: Lab) -> dict[str, list[tuple[Any, ...]]]:
    """Every table of the database, its rows in an order of their own."""
    connection = sqlite3.connect(lab.root / ".labctl" / "labctl-11.db")
    try:
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        # When each was applied, and what spares a listing: what a rebuild may change.
        names = [name for name in names if name != "folders"]
        return {name: sorted(connection.execute(f"SELECT * FROM {name}"), key=repr) for name in names}
    finally:
        connection.close()


# ---------------------------------------------------------------- render


def differing_lines(one: str, other: str) -> list[str]:
    lines = difflib.unified_diff(one.splitlines(), other.splitlines(), lineterm="", n=0)
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


@pytest.mark.parametrize(
    "dtypes", [["float32"], ["float32", "float16", "bfloat16"]], ids=["a job", "an array of three"]
)
def test_render_and_what_submitit_keeps_differ_in_the_command_alone(
    fresh_lab: Lab, shallow: Path, dtypes: list[str]
) -> None:
    flags = ["-p", "dgxh", "--model-id", str(shallow), *(f"--dtype={dtype}" for dtype in dtypes)]
    rendered = fresh_lab.ok("render", *flags)
    submitted = fresh_lab.json("submit", *flags)["runs"]
    fresh_lab.cluster.run("scancel", submitted[0]["slurm_id"].split("_")[0])
    (kept,) = (fresh_lab.root / ".labctl").glob("arrays/*/submitit/*_submission.sh")
    removed, added = differing_lines(rendered, kept.read_text())
    assert removed.startswith("-exec ")
    assert "-m labctl_workers.job " in removed
    assert added.startswith("+exec ")
    assert "-m labctl_workers.start " in added
    assert len(submitted) == len(dtypes)
    assert ("#SBATCH --array=0-2" in rendered) == (len(dtypes) == 3)


def test_a_rendered_script_runs_by_hand_and_its_record_is_collected(fresh_lab: Lab) -> None:
    """An engine that sleeps stands in."""
    flags = ["-p", "dgxh", "--model-id", sleeping(fresh_lab), "--max-new-tokens", "4", "--repeats", "1"]
    script = fresh_lab.root / "x.slurm"
    script.write_text(fresh_lab.ok("render", *flags))
    answer = fresh_lab.cluster.run("sbatch", "--wait", "--parsable", str(script), timeout=120)
    (run,) = fresh_lab.json("status", "--all")
    assert run["state"] == "done"
    assert run["slurm_id"] == answer.stdout.strip()
    (sample,) = record_of(fresh_lab, run)["repeats"][0]["samples"]
    assert sample["token_ids"] == [0, 1]


def test_an_array_runs_each_of_its_jobs(fresh_lab: Lab) -> None:
    """Two lengths would share a load; two dtypes are two loads, and one array. An engine that sleeps stands in."""
    flags = ["--dtype=float32", "--dtype=float16", "--max-new-tokens=2", "--repeats=1"]
    runs = fresh_lab.json("submit", "-p", "dgx2", "--model-id", sleeping(fresh_lab), *flags, "--wait")["runs"]
    parents = {run["slurm_id"].split("_")[0] for run in runs}
    assert [run["state"] for run in runs] == ["done", "done"]
    assert len(parents) == 1
    assert [run["slurm_id"].split("_")[1] for run in runs] == ["0", "1"]
    records = [record_of(fresh_lab, run) for run in runs]
    assert [record["definition"]["dtype"] for record in records] == ["float32", "float16"]
    assert [record["attempt"]["job_id"][-2:] for record in records] == [".0", ".1"]


# ---------------------------------------------------------------- run, in an allocation


def test_run_inside_srun_types_the_text_and_writes_a_record_that_is_collected(fresh_lab: Lab, shallow: Path) -> None:
    """The partition is that of the allocation."""
    command = [str(Path(sys.executable).parent / "labctl"), "run", "--model-id", str(shallow), "--max-new-tokens", "6"]
    allocation = ["srun", "--account=eecs", "--partition=dgx2", "--gres=gpu:2", "--mem=64G"]
    done = subprocess.run(
        [*allocation, *command, "--repeats", "1", "--dtype", "float32"],
        cwd=fresh_lab.root, env={**fresh_lab.cluster.env, **fresh_lab.environment}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Tensor/model parallel GPU ids" in done.stdout
    assert "Throughput: " in done.stdout
    assert "deprecat" not in done.stdout.lower()
    (run,) = fresh_lab.json("status", "--all")
    assert (run["state"], run["partition"]) == ("done", "dgx2")
    record = record_of(fresh_lab, run)
    assert record["attempt"]["node"].startswith("dgx2-")
    assert record["repeats"][0]["samples"][0]["text"] in done.stdout


def test_run_with_fewer_gpus_than_asked_for_is_refused_with_the_remedy(fresh_lab: Lab, shallow: Path) -> None:
    fresh_lab.settings("")  # the partitions as shipped: they want GPUs, and these nodes have none for real
    done = fresh_lab.labctl("run", "-p", "dgxh", "--model-id", str(shallow))
    assert done.returncode == 1
    assert "too few GPUs in the job: 0 of 2" in done.stderr
    assert "--gres=gpu:2" in done.stderr
    (run,) = fresh_lab.json("status", "--all")
    assert run["state"] == "failed"


# ---------------------------------------------------------------- refusals


def test_a_gpu_of_another_capability_is_refused_before_loading(fresh_lab: Lab, shallow: Path) -> None:
    """A fake stands here: NVML, which says V100 on a node of a partition that is to be of capability 9.0."""
    fake = fresh_lab.root / "fake-nvml"
    fake.mkdir()
    (fake / "pynvml.py").write_text(
        textwrap.dedent(
            """
            class NVMLError(Exception): ...
            class Memory: total, used = 32 << 30, 0
            nvmlInit = nvmlShutdown = lambda: None
            nvmlDeviceGetCount = lambda: 16
            nvmlDeviceGetHandleByIndex = lambda index: index
            nvmlDeviceGetCudaComputeCapability = lambda handle: (7, 0)
            nvmlDeviceGetUUID = lambda handle: f"GPU-{handle}"
            nvmlDeviceGetName = lambda handle: "Tesla V100-SXM3-32GB"
            nvmlDeviceGetMemoryInfo = lambda handle: Memory
            nvmlSystemGetDriverVersion = lambda: "535.0"
            """
        )
    )
    python = fresh_lab.root / "python-that-sees-v100s"
    python.write_text(f'#!/bin/bash\nPYTHONPATH={fake}:$PYTHONPATH exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    fresh_lab.settings(f'[partitions.dgxh]\npython = "{python}"\n')
    done = fresh_lab.labctl("submit", "-p", "dgxh", "--no-preflight", "--model-id", str(shallow), "--wait")
    assert done.returncode == 1
    (run,) = fresh_lab.json("status")
    assert run["state"] == "failed"
    assert "has compute capability 7.0 (Tesla V100-SXM3-32GB), partition dgxh has 9.0" in run["detail"]
    assert "slurm_partition" in run["remedy"]
    (record,) = fresh_lab.json("show", run["run_id"])["records"]
    assert record["failure"]["kind"] == "other-capability"
    assert record["load_s"] is None


def test_a_node_without_gpus_is_refused_with_the_remedy(fresh_lab: Lab, shallow: Path) -> None:
    """The cluster's GPUs are in Slurm's books alone: the worker sees none, and says so before it loads."""
    fresh_lab.settings("")
    done = fresh_lab.labctl("submit", "-p", "dgxh", "--no-preflight", "--model-id", str(shallow), "--wait")
    assert done.returncode == 1
    (run,) = fresh_lab.json("status")
    assert "too few GPUs in the job: 0 of 2" in run["detail"]
    assert "--gres=gpu:2" in run["remedy"]


REFUSED = {
    "account": ('account = "nobody"', "Invalid account", "set account"),
    "partition": ('slurm_partition = "nowhere"', "invalid partition", "set slurm_partition"),
    "qos": ('sbatch = { qos = "nope" }', "Invalid qos", "set --qos"),
    "gres": ('gpu_type = "a100"', "Requested node configuration is not available", "request fewer GPUs"),
}


@pytest.mark.parametrize(("setting", "said", "remedy"), REFUSED.values(), ids=REFUSED)
def test_what_slurm_refuses_is_one_message_with_the_remedy(
    fresh_lab: Lab, shallow: Path, setting: str, said: str, remedy: str
) -> None:
    fresh_lab.settings(f"[partitions.dgxh]\n{setting}\n")
    done = fresh_lab.labctl("submit", "-p", "dgxh", "--no-preflight", "--model-id", str(shallow))
    assert done.returncode == 4
    assert said.lower() in done.stderr.lower()
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.lower().count("slurm refused the job") == 1
    (run,) = fresh_lab.json("status")
    assert run["state"] == "refused"


def test_gres_that_slurm_does_not_know_is_refused_in_its_own_words(fresh_lab: Lab, shallow: Path) -> None:
    """A template of one's own can ask for what no site has."""
    templates = fresh_lab.root / "templates"
    templates.mkdir()
    (templates / "odd.sbatch.j2").write_text(
        '{% extends "base.sbatch.j2" %}{% block options %}\n#SBATCH --gres=unicorn:2\n{% endblock %}\n'
    )
    fresh_lab.settings('[partitions.dgxh]\ntemplate = "odd"\n')
    done = fresh_lab.labctl("submit", "-p", "dgxh", "--no-preflight", "--model-id", str(shallow))
    assert done.returncode == 4
    assert "Invalid generic resource (gres) specification" in done.stderr
    assert "gpu_type" in done.stderr


# ---------------------------------------------------------------- accidents


def test_labctl_killed_while_it_calls_sbatch_shows_as_interrupted_not_as_nothing(
    fresh_lab: Lab, shallow: Path, tmp_path: Path
) -> None:
    """A fake stands here: an sbatch that kills its caller, as a lost login node would, before it has queued anything."""
    commands = tmp_path / "bin"
    commands.mkdir()
    sbatch = commands / "sbatch"
    sbatch.write_text("#!/bin/bash\nkill -9 $PPID\n")
    sbatch.chmod(0o755)
    done = fresh_lab.labctl(
        "submit", "-p", "dgxh", "--no-preflight", "--model-id", str(shallow),
        PATH=f"{commands}{os.pathsep}{fresh_lab.cluster.env['PATH']}",
    )  # fmt: skip
    assert done.returncode == -9
    (run,) = fresh_lab.json("status")
    assert run["state"] == "submitting"
    (intent,) = (fresh_lab.root / ".labctl").glob("arrays/*/intent.json")
    document = json.loads(intent.read_text())
    intent.write_text(json.dumps({**document, "at": "2020-01-01T00:00:00Z"}))  # as if it had been long ago
    (run,) = fresh_lab.json("status")
    assert run["state"] == "interrupted"
    assert run["detail"] == "labctl ended before it queued the job"
    (again,) = fresh_lab.json("retry")["runs"]
    assert (again["run_id"], again["state"]) == (run["run_id"], "pending")
    fresh_lab.ok("cancel", "--yes")


def test_a_run_that_waits_in_the_queue_is_not_queued_a_second_time(fresh_lab: Lab, shallow: Path) -> None:
    fresh_lab.settings(
        CPU_PARTITIONS.replace("[partitions.dgxh]", '[partitions.dgxh]\nsbatch = { begin = "now+1hour" }')
    )
    (run,) = fresh_lab.json("submit", "-p", "dgxh", "--model-id", str(shallow))["runs"]
    again = fresh_lab.labctl("submit", "-p", "dgxh", "--model-id", str(shallow))
    assert again.returncode == 0
    assert f"already pending as job {run['slurm_id']}" in again.stderr
    queued = fresh_lab.cluster.run("squeue", "--noheader", f"--name=labctl-{run['job_id'].rpartition('.')[0]}").stdout
    fresh_lab.cluster.run("scancel", run["slurm_id"])
    assert len(queued.splitlines()) == 1
    assert len(list((fresh_lab.root / ".labctl" / "arrays").iterdir())) == 1


def test_a_job_that_ends_without_a_record_is_explained(fresh_lab: Lab, shallow: Path) -> None:
    """scancel of a pending job: no worker ever ran, so Slurm's word is all there is."""
    fresh_lab.settings(
        CPU_PARTITIONS.replace("[partitions.dgxh]", '[partitions.dgxh]\nsbatch = { begin = "now+1hour" }')
    )
    (run,) = fresh_lab.json("submit", "-p", "dgxh", "--model-id", str(shallow))["runs"]
    (pending,) = fresh_lab.json("status")
    assert (pending["state"], pending["detail"]) == ("pending", "BeginTime")
    fresh_lab.cluster.run("scancel", run["slurm_id"])
    for _ in range(50):
        (ended,) = fresh_lab.json("status")
        if ended["state"] != "pending":
            break
        time.sleep(0.2)
    assert ended["state"] == "cancelled"
    assert "cancelled" in ended["detail"]


def test_status_from_a_shell_without_slurm_keeps_what_was_known(lab: Lab, request_of_two: list[dict[str, Any]]) -> None:
    (shutil.which("squeue") is not None) or pytest.skip("no squeue to take away")
    found = lab.json("status", "both", PATH=str(Path(sys.executable).parent))
    assert [run["state"] for run in found] == ["done", "done"]
