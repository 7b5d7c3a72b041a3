"""The exercises, end to end on a real cluster: asked, waited for in the queue, answered.

transformers and staged are real where their answers or memory are looked at. transformers beside vLLM: test_vllm_jobs.py.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests import random_llama

from .conftest import CPU_PARTITIONS, Lab, let_sleep

Answers = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random Llama, and one of half the layers."""
    folder = tmp_path_factory.mktemp("models")
    return llama(folder / "random"), llama(folder / "random-short", layers=2)


def llama(folder: Path, layers: int = 4) -> Path:
    """Written in a process of its own: what torch holds stays with it."""
    program = Path(random_llama.__file__)
    command = [sys.executable, str(program), str(folder), "--like", "small", "--layers", str(layers)]
    subprocess.run([*command, "--dtype", "float32"], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def answers(lab: Lab, models: tuple[Path, Path]) -> Answers:
    """All asked at once, as a class would, then each asked for its answer."""
    short = ["--max-new-tokens", "8", "--repeats", "2", "--model-id", str(models[0])]
    options = {
        1: [*short, "--dtype", "float32"],
        2: short,
        3: ["--max-new-tokens", "8", "--max-new-tokens", "16", *short[2:], "--dtype", "float32"],
        4: [*short, "--model-id", str(models[1]), "--dtype", "float32"],
        5: [*short, "--dtype", "float32", "--batch-size", "1", "--batch-size", "2", "--engine-option", "compile=false"],
        6: [*short, "--batch-size", "2"],
    }
    for number, words in options.items():
        # Of the others only what is compared with what is looked at: an engine that sleeps stands in for transformers and vLLM.
        lab.settings(CPU_PARTITIONS) if number in (1, 3) else let_sleep(lab)
        asked = lab.labctl("exercise", str(number), *words)
        assert asked.returncode == 0, asked.stderr
        assert f"repeat labctl exercise {number} when the runs have ended" in asked.stderr
    return {number: lab.json("exercise", str(number), "--wait") for number in options}


def figures(answer: dict[str, Any], metric: str) -> list[float]:
    """The means of a metric, row for row; each of them measured."""
    rows = [row for block in answer["comparison"]["blocks"] if block["metric"] == metric for row in block["rows"]]
    assert rows and all(row["mean"] is not None for row in rows)
    return [row["mean"] for row in rows]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_each_is_answered_with_its_comparison_and_how_to_read_it(lab: Lab, answers: Answers, number: int) -> None:
    assert {run["state"] for run in answers[number]["runs"]} == {"done"}
    assert answers[number]["comparison"]["verdicts"]
    assert min(figures(answers[number], "output_tok_s")) > 0
    shown = lab.ok("exercise", str(number))
    assert "How to read it:" in shown and "throughput, higher is better" in shown
    assert lab.json("compare", f"exercise-{number}")["blocks"]


def test_1_greedy_says_the_same_each_time_and_samples_do_not(lab: Lab, answers: Answers) -> None:
    shown = lab.ok("exercise", "1")
    lines = [line.split() for line in shown.splitlines() if "float32 greedy" in line or "float32 temperature" in line]
    assert [line[1:3] for line in lines] == [["2", "1"], ["2", "2"]]  # answers, distinct ones
    assert len(figures(answers[1], "mean_log_probability")) == 2


def test_2_has_the_row_between_the_two(answers: Answers) -> None:
    rows = answers[2]["comparison"]["blocks"][0]["rows"]
    assert [(row["at"]["partition"], row["at"]["dtype"]) for row in rows] == [
        ("dgx2", "float16"), ("dgxh", "float16"), ("dgxh", "bfloat16")
    ]  # fmt: skip


def test_3_the_keys_and_values_are_what_fit_predicts(answers: Answers) -> None:
    shorter, longer = answers[3]["memory"]
    for one in (shorter, longer):
        assert one["kv_cache"] == one["kv_cache_predicted"] > 0
    assert longer["tokens"] - shorter["tokens"] == 8
    (step,) = answers[3]["growth"]
    assert step["measured"] == step["predicted"] > 0


def test_4_compares_the_two_models(answers: Answers) -> None:
    rows = answers[4]["comparison"]["blocks"][0]["rows"]
    assert [row["at"]["model"] for row in rows] == ["random", "random-short"]


def test_5_the_three_engines_are_compared_at_each_batch_size(lab: Lab, answers: Answers) -> None:
    rows = answers[5]["comparison"]["blocks"][0]["rows"]
    assert sorted((row["at"]["backend"], row["at"]["batch_size"]) for row in rows) == [
        ("hf", 1), ("hf", 2), ("staged", 1), ("staged", 2), ("vllm", 1), ("vllm", 2)
    ]  # fmt: skip
    assert min(figures(answers[5], "init_s")) > 0


def test_6_compares_every_way_to_share_the_model_with_one_gpu(lab: Lab, answers: Answers) -> None:
    rows = answers[6]["comparison"]["blocks"][0]["rows"]
    assert [(row["at"]["gpus"], row["at"]["parallel"]) for row in rows] == [
        (1, "tensor"), *((gpus, way) for gpus in (2, 4) for way in ("tensor", "pipeline", "data"))
    ]  # fmt: skip
    assert all(row["ratio"] for row in rows)
    shown = lab.ok("exercise", "6")
    assert "speed-up" in shown and "efficiency" in shown


def test_what_was_measured_can_be_handed_on_and_compared(lab: Lab, fresh_lab: Lab, answers: Answers) -> None:
    """The real records of a sweep, as a bundle, in another workspace."""
    made = lab.json("bundle", "exercise-1", "--author", "ada", "-o", str(fresh_lab.root / "ada.zip"))
    assert made["records"] == 2
    assert "ada: 2 records imported" in fresh_lab.ok("import", "ada.zip")
    theirs = fresh_lab.json("query", "SELECT run_id, output_tok_s, queue_s FROM measured_runs ORDER BY 1")
    asked = "SELECT run_id, output_tok_s, queue_s FROM measured_runs WHERE submissions LIKE '%exercise-1%' ORDER BY 1"
    ours = lab.json("query", asked)
    assert len(ours) == 2
    assert [{**row, "run_id": row["run_id"] + "@ada"} for row in ours] == theirs
    with zipfile.ZipFile(fresh_lab.root / "ada.zip") as archive:
        contents = {name: archive.read(name).decode() for name in archive.namelist()}
    assert any(name.endswith("_submission.sh") for name in contents)
    for folder in (lab.root, lab.environment["HOME"], Path.home()):
        assert not [name for name, text in contents.items() if f"{folder}/" in text], folder
