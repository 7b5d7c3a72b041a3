"""lm-evaluation-harness, in a process of its own: tasks against a server of completions, by its model `local-completions`.

    python -m labctl_workers.servers.harness FOLDER         reads FOLDER/evaluation.json, writes FOLDER/answers.json
    python -m labctl_workers.servers.harness --fetch TASK   loads the data sets of a task, a name or a file

It runs in the engine's environment, without a GPU. Prompts have no chat template, as is the harness's default.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from labctl_workers.record import QualityTask, Refusal, TaskAnswers

MODEL = "local-completions"
DISTRIBUTION = "lm_eval"
OLDEST = (0, 4, 13)
INSTALL = 'pip install "lm_eval[api]>=0.4.13"'
CONCURRENCY = 16
EVALUATION, ANSWERS = "evaluation.json", "answers.json"
# The metrics that are a question's accuracy, the preferred ones first.
ACCURACIES = ("acc", "exact_match")
MAX_REASON_CHARACTERS = 300


@dataclass
class Evaluation:
    """Tasks, and the server that answers them. `url` is that of its completions, `max_length` the longest sequence in tokens.
    `sends_tokens`: prompts are token ids, not texts. `scores`: the server gives log-probabilities of a prompt. `generation` are
    settings of tasks that generate, which replace a task's own."""

    tasks: list[dict[str, Any]]
    url: str
    model: str
    tokenizer: str
    revision: str | None
    max_length: int
    sends_tokens: bool
    scores: bool
    seed: int
    generation: dict[str, Any] = field(default_factory=dict)


def main(arguments: Sequence[str]) -> int:
    if arguments[0] == "--fetch":
        for name in arguments[1:]:
            loaded = _load(name)
            print(f"{name}: {', '.join(sorted(loaded))}", flush=True)
        return 0
    folder = Path(arguments[0])
    evaluation = Evaluation(**json.loads((folder / EVALUATION).read_text(encoding="utf-8")))
    found: list[TaskAnswers] = []
    for document in evaluation.tasks:
        task = QualityTask.from_json(document)
        try:
            found += evaluated(evaluation, task)
        except Exception as error:
            print(f"task {task.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            text = " ".join(str(error.args[0] if error.args else error).split()) or type(error).__name__
            found.append(TaskAnswers(task.name, error=text[:MAX_REASON_CHARACTERS]))
    (folder / ANSWERS).write_text(json.dumps([answers.to_json() for answers in found]), encoding="utf-8")
    return 0


def evaluated(evaluation: Evaluation, task: QualityTask) -> list[TaskAnswers]:
    """The answers of a task; of a group, of each of its tasks."""
    from lm_eval import simple_evaluate

    loaded = _load(task.file or task.name)
    for name, one in loaded.items():
        if not evaluation.scores and one.OUTPUT_TYPE != "generate_until":
            raise ValueError(f"{name} needs log-probabilities, which this server does not give")
    results = simple_evaluate(
        model=MODEL,
        model_args={
            "base_url": evaluation.url,
            "model": evaluation.model,
            "tokenizer": evaluation.tokenizer,
            "revision": evaluation.revision or "main",
            "tokenizer_backend": "huggingface",
            "tokenized_requests": evaluation.sends_tokens,
            "max_length": evaluation.max_length,
            "num_concurrent": CONCURRENCY,
            "seed": evaluation.seed,
        },
        tasks=list(loaded.values()),
        limit=task.limit,
        gen_kwargs=dict(evaluation.generation),
        bootstrap_iters=0,
        log_samples=True,
    )
    if results is None:
        raise RuntimeError("the harness returned no results")
    return [_answers(name, results["samples"][name]) for name in sorted(results["samples"])]


def _load(task: str) -> dict[str, Any]:
    """The harness's tasks by name: one, or those of a group. A file's folder becomes the working folder, so that it may name its
    data by relative paths."""
    from lm_eval.tasks import TaskManager

    if task.endswith((".yaml", ".yml")):
        path = Path(task).absolute()
        os.chdir(path.parent)
        manager = TaskManager(include_defaults=False)
        return dict(manager.load([str(path)])["tasks"])
    return dict(TaskManager().load([task])["tasks"])


def _answers(task: str, samples: Iterable[Mapping[str, Any]]) -> TaskAnswers:
    """Whether each question's answer is right, by the task's first filter. Raises ValueError for a task without a metric of
    single answers."""
    rows = list(samples)
    first = rows[0]["filter"]
    rows = sorted((row for row in rows if row["filter"] == first), key=lambda row: row["doc_id"])
    known = [name for name in (*ACCURACIES, *rows[0]["metrics"]) if isinstance(rows[0].get(name), int | float)]
    if not known:
        raise ValueError(f"{task} has no metric of single answers: {', '.join(rows[0]['metrics'])}")
    return TaskAnswers(
        task, known[0], first, [row["doc_hash"][:16] for row in rows], [float(row[known[0]]) for row in rows]
    )


def check_version(installed: str | None, partition: str) -> None:
    """Raises Refusal where the harness is missing or too old."""
    if installed is None:
        what = f"lm-evaluation-harness is not installed in the Python of partition {partition}"
        raise Refusal("harness-missing", what, f"install it there: {INSTALL}")
    if tuple(int(part) for part in installed.split(".")[:3] if part.isdigit()) < OLDEST:
        raise Refusal(
            "harness-too-old", f"lm-evaluation-harness is older than 0.4.13: {installed}", f"update it: {INSTALL}"
        )


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write what `main` reads."""
    (folder / EVALUATION).write_text(json.dumps(asdict(evaluation)), encoding="utf-8")


def read_answers(folder: Path) -> list[TaskAnswers]:
    """What `main` wrote. Raises OSError where it ended before."""
    return [TaskAnswers.from_json(one) for one in json.loads((folder / ANSWERS).read_text(encoding="utf-8"))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
