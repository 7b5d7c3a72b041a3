"""Each command line of the documents, run on a real cluster in a workspace that has what they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documents import WRITTEN, arguments, command_lines
from tests.lora import make_adapter

from .conftest import CPU_PARTITIONS, Lab

SWEEP = """
partition = ["dgx2", "dgxh"]
model_id = "~/models/smollm2"
dtype = ["float32", "bfloat16"]
max_new_tokens = [16, 32]
batch_size = [1, 4]
repeats = 1
"""
# They need a hub, a terminal, a free node, a virtual environment or an engine: tests/slurm/walk.py, test_fetch.py,
# test_environments.py, test_served_jobs.py.
ELSEWHERE = ("fetch", "init", "env --create", "tune")
# The first entries of the datasets that the documents name, made up.
DATASETS = {
    "ShareGPT_V3_unfiltered_cleaned_split.json": '[{"conversations": [{"from": "human", "value": "Hello"},'
    ' {"from": "gpt", "value": "Good morning"}]}]',
    "AzureLLMInferenceTrace_conv.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,8,4\n",
}
NAMES = ("sweep-3", "first", "batches", "server", "rates", "weights", "plain", "drafts", "prefixes", "deploy")
TWO_RUNS = ("cache", "adapters")  # --text takes six at most


def adapted(words: list[str], run_ids: list[str], root: Path) -> list[str]:
    """The words with this workspace's runs, models and files; what would queue jobs only says what it would queue."""
    named = {word for word in words if re.fullmatch(r"(?=.*[a-f])[0-9a-f]{4}", word)}
    runs = dict(zip(sorted(named), run_ids, strict=False))
    words = [runs.get(word, word) for word in words]
    words = [
        re.sub(r"^(meta-llama/.*|HuggingFaceTB/.*|\./Llama.*|(~/models|\.)/smollm2)$", str(root / "model"), word)
        for word in words
    ]
    words = [
        name for word in words for name in (sorted(map(str, root.glob(word))) if "*.labctl.zip" in word else [word])
    ]
    if words[0] == "submit":
        words = ["submit", *(word for word in words[1:] if word != "--wait"), "--dry-run", "--no-preflight"]
    elif words[0] == "retry" or (words[0] == "exercise" and len(words) > 1):
        words = [*words, "--dry-run"]
    elif words[0] == "forget":
        words = [*words, "--yes"]
    return words


@pytest.mark.nightly
def test_every_command_line_of_the_documents_runs(lab: Lab, smollm2: Path) -> None:
    lab.settings(CPU_PARTITIONS + 'account = "eecs"\nprice_per_gpu_hour = "2.50 EUR"\n[defaults]\npartition = "dgxh"\n')
    (lab.root / "model").symlink_to(smollm2)
    for name in ("sweep.toml", "mine.toml", "deploy.toml"):
        (lab.root / name).write_text(SWEEP.replace("~/models/smollm2", str(lab.root / "model")), encoding="utf-8")
    shortest = ("--max-new-tokens", "2", "--repeats", "1", "--model-id", str(lab.root / "model"))
    lab.ok("submit", "-p", "dgx2", *shortest, "--name", "sweep-2")
    lab.ok("submit", "sweep.toml", "--name", "sweep", "--wait")
    lab.ok("submit", "-p", "dgx2", *shortest, "--batch-size", "2", "--name", "lengths", "--wait")
    for name in TWO_RUNS:
        lab.ok("submit", "-p", "dgx2", *shortest, "--batch-size", "1", "--batch-size", "2", "--name", name, "--wait")
    for name in NAMES:
        lab.ok("submit", "sweep.toml", "--name", name)
    for name, text in DATASETS.items():
        (lab.root / name).write_text(text, encoding="utf-8")
    (lab.root / "class").mkdir()
    for author in ("bob", "eve"):
        lab.ok("bundle", "sweep", "--author", author, "-o", f"class/{author}.labctl.zip")
    make_adapter(lab.root / "songs")
    run_ids = [run["run_id"] for run in lab.json("status", "sweep")]
    lines = dict.fromkeys(line for page in WRITTEN for line in command_lines(page))
    assert len(lines) > 50
    failed = []
    for line in sorted(lines, key=lambda line: "forget" in line):  # last: it removes runs that others show
        if any(all(word in arguments(line) for word in command.split()) for command in ELSEWHERE):
            continue
        done = lab.labctl(*adapted(arguments(line), run_ids, lab.root))
        fine = (0, 1) if "doctor" in line or "--fail-on-regression" in line else (0,)
        if done.returncode not in fine:
            failed.append(f"{line}: {done.returncode}: {done.stderr}")
    assert not failed, "\n".join(failed)
