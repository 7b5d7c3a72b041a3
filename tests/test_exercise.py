"""The handout's exercises: asked once, answered by the same command, and told what they compare. Real engines: tests/slurm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.cli import exercise as command
from labctl_orchestrator.exercises import EXERCISES, Exercise, growth
from labctl_orchestrator.models import fit
from labctl_orchestrator.request.settings import read_toml
from labctl_orchestrator.store import documents
from labctl_orchestrator.store.workspace import Workspace
from labctl_workers.record import Attempt, Failure, JobSpec, RunResult, read_json, write_json

from .conftest import Labctl, Slurm, ago, files_below, measured, write_checkpoint


@pytest.fixture
def models(checkpoint: Path) -> list[str]:
    """Two checkpoints, as options."""
    other = write_checkpoint(checkpoint.parent / "other-llama", (3.0, 4.0))
    return ["--model-id", str(checkpoint), "--model-id", str(other)]


def finish(workspace: Workspace, *, failed: bool = False) -> None:
    """Write the records of every job that was submitted."""
    for path in workspace.arrays.glob("*/[0-9]*.json"):
        job = JobSpec.from_json(read_json(path))
        attempt = Attempt(f"{job.job_id}.now", job.job_id, "1", ago(5), "login", "dgxh-1", 1, "1000", job.partition)
        write_json(path.parent / "attempts" / f"{attempt.attempt_id}.json", attempt.to_json())
        for run in job.runs:
            end: dict[str, Any] = (
                {"status": "failed", "failure": Failure("gpu-out-of-memory", "CUDA out of memory", "take less")}
                if failed
                else {"status": "done", "repeats": [measured(repeat) for repeat in range(run.repeats)]}
            )
            result = RunResult(
                run.run_id, attempt, definition=run.definition, started_at=ago(4), ended_at=ago(1), **end
            )
            write_json(workspace.results / run.run_id / f"{attempt.attempt_id}.json", result.to_json())


# ---------------------------------------------------------------- what they are


@pytest.mark.parametrize("one", EXERCISES, ids=lambda one: str(one.number))
def test_an_exercise_has_a_question_and_says_how_to_read_it(one: Exercise) -> None:
    assert one.title and one.question.endswith((".", "?"))
    assert "## How to read it" in one.reading and "## What may mislead" in one.reading
    assert one.reading.splitlines()[-1].startswith(f"To go on: labctl exercise {one.number}")
    assert read_toml(one.file)["name"] == one.name
    assert not any("**" in line or "`" in line for line in one.paragraphs())


def test_without_a_number_they_are_listed_with_where_they_stand(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, models: list[str]
) -> None:
    slurm.accepts(1000)
    labctl("exercise", 1, *models[:2])
    listed = labctl("exercise", "--json").json
    assert [one["exercise"] for one in listed] == [1, 2, 3, 4, 5, 6]
    assert [one["state"] for one in listed] == ["2 runs: 2 pending", *["not submitted"] * 5]
    assert "Greedy against sampling" in labctl("exercise").out


@pytest.mark.parametrize(
    ("number", "cells"),
    [
        (1, {("dgxh", "greedy"), ("dgxh", "temperature=0.7,top_p=0.9,seed=1")}),
        (2, {("dgx2", "float16"), ("dgxh", "float16"), ("dgxh", "bfloat16")}),
        (3, {("dgxh", 128), ("dgxh", 256)}),
        (4, {("dgxh", "tiny-llama"), ("dgxh", "other-llama")}),
        (5, {("dgxh", backend, batch) for backend in ("hf", "staged", "vllm") for batch in (1, 16)}),
        (
            6,
            {("dgxh", 1, "tensor", batch) for batch in (1, 64)}
            | {("dgxh", n, how, batch) for n in (2, 4) for how in ("tensor", "pipeline", "data") for batch in (1, 64)},
        ),
    ],
)
def test_each_asks_for_its_cells(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, models: list[str], number: int, cells: set[Any]
) -> None:
    slurm.accepts(1000)
    given = models if number == 4 else models[:2]
    before = files_below(workspace.root)
    shown = labctl("exercise", number, "--dry-run", "--json", *given)
    assert shown.code == 0, shown.err
    assert files_below(workspace.root) == before
    axes = {1: ("sampling",), 2: ("dtype",), 3: ("max_new_tokens",), 4: ("model",), 5: ("backend", "batch_size"),
            6: ("gpus", "parallel", "batch_size")}  # fmt: skip
    runs = labctl("exercise", number, "--json", *given).json["runs"]
    assert {(run["partition"], *(run[axis] for axis in axes[number])) for run in runs} == cells
    planned = {run["run_id"] for batch in shown.json for job in batch["jobs"] for run in job["runs"]}
    assert planned == {run["run_id"] for run in runs}


def test_options_beat_the_request_file(labctl: Labctl, workspace: Workspace, slurm: Slurm, models: list[str]) -> None:
    slurm.accepts(1000)
    (run,) = labctl("exercise", 1, *models[:2], "--greedy", "--dtype", "float16", "-p", "dgx2", "--json").json["runs"]
    assert (run["partition"], run["dtype"], run["sampling"]) == ("dgx2", "float16", "greedy")


def test_the_partition_of_labctl_toml_comes_before_the_exercises_own(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, models: list[str]
) -> None:
    slurm.accepts(1000)
    workspace.settings_file.write_text('[defaults]\npartition = "dgx2"\n', encoding="utf-8")
    runs = labctl("exercise", 1, *models[:2], "--json").json["runs"]
    assert {run["partition"] for run in runs} == {"dgx2"}


def test_of_exercise_4_one_model_takes_the_second_ones_place(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, models: list[str]
) -> None:
    slurm.accepts(1000)
    runs = labctl("exercise", 4, *models[:2], "--no-preflight", "--json").json["runs"]
    assert {run["model"] for run in runs} == {"TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tiny-llama"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("7",), "give one of 1, 2, 3, 4, 5, 6"),
        (("one",), "unknown exercise: 'one'"),
        (("2", "-p", "dgxh"), "too few partitions for exercise 2, which compares 2: dgxh"),
        (("--print",), "--print needs the number of an exercise"),
        (("1", "--dtype", "float15"), "unknown dtype 'float15'"),
    ],
)
def test_what_is_wrong_is_one_clear_message(
    labctl: Labctl, workspace: Workspace, models: list[str], arguments: tuple[str, ...], said: str
) -> None:
    ran = labctl("exercise", *arguments, *models[:2])
    assert ran.code == 2
    assert said in ran.err
    assert not workspace.data.exists()


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6])  # of exercise 4, --model-id replaces one model of two
def test_the_printed_file_is_the_submission_of_the_exercise(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, models: list[str], tmp_path: Path, number: int
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(labctl("exercise", number, "--print").out, encoding="utf-8")
    assert not workspace.data.exists()
    where = [] if number == 2 else ["-p", "dgxh"]
    planned = [
        labctl(*words, *where, "--no-preflight", "--dry-run", "--json").json
        for words in (("exercise", number, *models[:2]), ("submit", file, *models[:2]))
    ]
    assert planned[0] == planned[1] != []


# ---------------------------------------------------------------- asked, waited for, answered


def test_while_jobs_wait_the_command_says_how_to_come_back_and_asks_nothing_twice(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, models: list[str]
) -> None:
    slurm.accepts(1000)
    ran = labctl("exercise", 3, *models[:2])
    assert ran.code == 0
    assert "repeat labctl exercise 3 when the runs have ended" in ran.err
    assert "How to read it" not in ran.out
    batches = sorted(workspace.arrays.iterdir())
    again = labctl("exercise", 3)
    assert (again.code, "when the runs have ended" in again.err) == (0, True)
    assert labctl("exercise", 3, *models[:2]).code == 0
    assert sorted(workspace.arrays.iterdir()) == batches
    assert len(list(workspace.submissions.iterdir())) == 1


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_when_they_are_done_the_same_command_answers(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, models: list[str], number: int
) -> None:
    slurm.accepts(1000)
    given = models if number == 4 else models[:2]
    labctl("exercise", number, *given)
    finish(workspace)
    ran = labctl("exercise", number)
    assert ran.code == 0, ran.err
    title = EXERCISES[number - 1].title
    for words in (
        f"Exercise {number}: {title}",
        "throughput, higher is better",
        "How to read it:",
        "What may mislead:",
    ):
        assert words in ran.out
    told = labctl("exercise", number, "--json").json
    assert told["title"] == title and told["comparison"]["verdicts"]
    assert {run["state"] for run in told["runs"]} == {"done"}
    assert labctl("exercise", number, *given).out == ran.out
    assert f"exercise-{number}: " in labctl("status").err


def test_a_name_of_ones_own_comes_back_with_it(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, models: list[str]
) -> None:
    slurm.accepts(1000)
    assert "repeat labctl exercise 1 --name mine when" in labctl("exercise", 1, *models[:2], "--name", "mine").err
    finish(workspace)
    assert "How to read it:" in labctl("exercise", 1, "--name", "mine").out


def test_what_another_sweep_measured_is_answered_at_once_and_found_by_the_exercises_name(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, models: list[str]
) -> None:
    slurm.accepts(1000)
    labctl(
        "submit",
        "-p",
        "dgxh",
        *models[:2],
        "--ignore-eos",
        "--max-new-tokens",
        128,
        "--max-new-tokens",
        256,
        "--name",
        "mine",
    )
    finish(workspace)
    before = len(list(workspace.arrays.iterdir()))
    assert "How to read it" in labctl("exercise", 3, *models[:2]).out
    assert len(list(workspace.arrays.iterdir())) == before, "nothing is measured twice"
    assert len(labctl("status", "exercise-3", "--json").json) == 2
    requests = len(list(workspace.submissions.iterdir()))
    labctl("exercise", 3, *models[:2])
    assert len(list(workspace.submissions.iterdir())) == requests, "asked again, it is the same request"


def test_what_failed_is_told_and_submitted_again_only_when_that_is_asked_for(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, models: list[str]
) -> None:
    slurm.accepts(1000)
    labctl("exercise", 1, *models[:2])
    finish(workspace, failed=True)
    for given in ((), models[:2]):
        ran = labctl("exercise", 1, *given)
        assert ran.code == 1
        assert "CUDA out of memory" in ran.out and "labctl retry exercise-1" in ran.err
    assert len(list(workspace.arrays.iterdir())) == 1
    assert labctl("exercise", 1, *models[:2], "--again").code == 0
    assert len(list(workspace.arrays.iterdir())) == 2


def test_what_was_cancelled_is_submitted_as_it_was_asked_the_last_time(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, models: list[str]
) -> None:
    slurm.accepts(1000)
    labctl("exercise", 3, "-p", "dgxh", *models[:2], "--batch-size", 7)
    asked = {run["run_id"]: run for run in labctl("status", "exercise-3", "--json").json}
    for path in workspace.arrays.glob("*/[0-9]*.json"):
        job = JobSpec.from_json(read_json(path))
        end = {"state": "CANCELLED", "reason": "by 0", "ended_at": ago(100), "observed_at": ago(100)}
        write_json(path.parent / "states.json", {job.job_id: end})
    slurm.shows()
    slurm.accepts(2000)
    again = labctl("exercise", 3, "--json").json["runs"]
    assert {run["run_id"] for run in again} == set(asked)
    assert {(run["model"], run["batch_size"]) for run in again} == {("tiny-llama", 7)}
    assert {run["state"] for run in again} == {"pending"}


def test_one_run_alone_is_no_comparison(labctl: Labctl, workspace: Workspace, slurm: Slurm, models: list[str]) -> None:
    slurm.accepts(1000)
    labctl("exercise", 1, *models[:2], "--greedy")
    finish(workspace)
    ran = labctl("exercise", 1)
    assert ran.code == 0
    assert "a comparison needs two runs" in ran.err


def test_what_slurm_refuses_keeps_its_exit_code(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, models: list[str]
) -> None:
    slurm.answers("sbatch", status=1, errors="sbatch: error: Invalid account\n")
    for program in ("srun", "squeue", "sacct"):
        slurm.answers(program)
    ran = labctl("exercise", 1, *models[:2], "--no-preflight")
    assert ran.code == 4
    assert "Invalid account" in ran.err


def test_every_option_of_submit_is_one_of_exercise() -> None:
    from labctl_orchestrator.cli import submit

    ours = {parameter.name for parameter in command.command.params}
    assert {parameter.name for parameter in submit.command.params} - {"file"} <= ours


def test_with_staged_the_predicted_peak_counts_the_memory_that_a_jobs_runs_share() -> None:
    """The job of two H100s that measured one sequence of 174 tokens beside 64 of 302: docs/results."""
    one = fit.Sequences(batch=1, prompt_tokens=47, new_tokens=128, itemsize=2)
    alone = fit.Memory(weights=1000, kv_cache=192 * 10, kv_cache_used=174 * 10, beside=50)
    buckets = [
        {"micro_batches": 1, "rows": 1, "length": 192, "reads": [192]},
        {"micro_batches": 2, "rows": 32, "length": 320, "reads": [320]},
    ]
    for expected, of_the_job in ((1000 + 50 + 64 * 320 * 10, buckets), (alone.peak, buckets[:1]), (alone.peak, [])):
        fingerprint = documents.read(json.dumps({"stages": {"buckets": of_the_job}}).encode(), documents.Fingerprint)
        assert growth._peak(alone, one, fingerprint) == expected
    assert growth._peak(alone, one, documents.Fingerprint()) == alone.peak


@pytest.mark.model
@pytest.mark.parametrize("backend", ["hf", "staged"])
def test_on_a_machine_of_ones_own_it_is_run_and_answered_by_one_command(
    labctl: Labctl, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """With the real engines: the cache of hf grows, that of staged is set aside in steps of which a run fills a part."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # the local executor's shell
    pytest.importorskip("torch")
    from .random_llama import build as build_llama

    model = tmp_path / "models" / "tiny"
    build_llama(model, "tiny", tied=True, dtype="float32")
    ran = labctl(
        "exercise", 3, "-p", "local", "--model-id", model, "--max-new-tokens", 4, "--max-new-tokens", 8, "--repeats", 1,
        "--backend", backend, *(["--engine-option", "compile=false"] if backend == "staged" else []),
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "How to read it:" in ran.out
    assert "from 4 to 8 new tokens the KV cache grew by" in ran.out
    told = labctl("exercise", 3, "--json").json
    assert [one["kv_cache"] == one["kv_cache_predicted"] for one in told["memory"]] == [True, True]


def test_the_files_of_the_exercises_are_in_the_wheel() -> None:
    folder = EXERCISES[0].file.parent
    assert {path.name for path in folder.glob("[0-9].*")} == {
        f"{n}.{kind}" for n in range(1, 7) for kind in ("md", "toml")
    }
    assert folder.parent.name == "labctl_orchestrator"  # hatch packs every file of the package
    assert json.dumps([one.reading for one in EXERCISES])
