"""Tasks of lm-evaluation-harness: what a submission asks, the answers in the record, and two runs compared by question."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from labctl_orchestrator.analysis import accuracy
from labctl_orchestrator.analysis.comparison import QuestionScores
from labctl_orchestrator.preflight import hub_checks
from labctl_orchestrator.request.plan import Device, Plan, make_plan
from labctl_orchestrator.request.request import build
from labctl_orchestrator.request.settings import request_file
from labctl_orchestrator.request.sweep import Sweep
from labctl_orchestrator.request.tasks import label, parse
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import WrongUseError
from labctl_slurm.partitions import Partition
from labctl_workers.engines import foreseen
from labctl_workers.engines.served import ServedEngine
from labctl_workers.record import JobSpec, ModelRef, QualityTask, RunSpec, Sampling, TaskAnswers
from labctl_workers.servers import harness
from labctl_workers.servers.harness import Evaluation

from .conftest import JobArray, Labctl, Records, Slurm, sacct_line
from .harness_package import harness_python  # noqa: F401  a fixture
from .hub import Hub
from .models import smollm2  # noqa: F401  a fixture

CHOICE = """task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: capitals.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
"""
GENERATION = """task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: sums.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{left}} + {{right}} ="
doc_to_target: "{{total}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 4
filter_list:
  - name: number
    filter:
      - function: regex
        regex_pattern: "([0-9]+)"
      - function: take_first
metric_list:
  - metric: exact_match
"""
CAPITALS = (("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo"), ("Egypt", "Cairo"))


def write_tasks(folder: Path, sums: int = 6) -> Path:
    """A task of each kind, and their data."""
    (folder / "capitals.yaml").write_text(CHOICE)
    (folder / "sums.yaml").write_text(GENERATION)
    choices = [city for _, city in CAPITALS]
    rows = [{"country": country, "choices": choices, "answer": place} for place, (country, _) in enumerate(CAPITALS)]
    (folder / "capitals.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [{"left": one, "right": one + 1, "total": str(2 * one + 1)} for one in range(sums)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return folder


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_tasks(tmp_path)


# ---------------------------------------------------------------- what a submission asks


def test_a_task_is_a_name_or_a_file_with_a_number_of_questions(tasks: Path) -> None:
    assert parse("gsm8k") == QualityTask("gsm8k")
    assert parse(" gsm8k:200 ") == QualityTask("gsm8k", 200)
    found = parse(f"{tasks}/capitals.yaml:3")
    assert (found.name, found.limit, found.file) == ("capitals", 3, f"{tasks}/capitals.yaml")
    assert found.sha256 is not None
    assert label([parse("gsm8k:200"), found]) == f"gsm8k:200, capitals@{found.sha256[:8]}:3"
    assert label([]) is None


def test_the_hash_of_a_task_file_covers_the_files_that_it_names(tasks: Path) -> None:
    file = tasks / "capitals.yaml"
    before = parse(str(file)).sha256
    (tasks / "other.txt").write_text("of no task")
    assert parse(str(file)).sha256 == before
    with (tasks / "capitals.jsonl").open("a") as data:
        data.write("\n")
    changed = parse(str(file)).sha256
    assert changed != before
    (tasks / "functions.py").write_text("def right(doc): ...")
    file.write_text(CHOICE + "process_results: !function functions.right\n")
    with_function = parse(str(file)).sha256
    (tasks / "functions.py").write_text("def right(doc): return 1")
    assert len({before, changed, with_function, parse(str(file)).sha256}) == 4


@pytest.mark.parametrize("text", ["", ":5", "gsm8k:", "gsm8k:0", "gsm8k:-1", "gsm8k:many"])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(WrongUseError, match="not a task") as caught:
        parse(text)
    assert "gsm8k:200" in caught.value.remedy


def test_a_task_file_that_is_missing_or_has_no_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongUseError, match="cannot read task file"):
        parse(str(tmp_path / "none.yaml"))
    (tmp_path / "a.yaml").write_text("output_type: multiple_choice\n")
    with pytest.raises(WrongUseError, match="task file has no name"):
        parse(str(tmp_path / "a.yaml"))


def planned(**keys: Any) -> Plan:
    sweep = Sweep(build([("f", {"partition": "dgxh", "model_id": "m", "backend": "vllm", **keys})]))
    partition = Partition(name="dgxh", dtype="bfloat16", gpu="H100", capability="9.0")
    return make_plan(
        sweep, {"dgxh": partition}, {("m", "main"): ModelRef("m", "c" * 40)}, lambda of: Device("cuda", "9.0")
    )


def test_tasks_are_part_of_the_run_and_of_served_runs_alone(tasks: Path) -> None:
    served, offline = planned(serve=[True, False], quality=["gsm8k:200"]).runs
    assert (served.tasks, offline.tasks) == ([QualityTask("gsm8k", 200)], [])
    ids = {
        run.run_id
        for quality in ([], ["gsm8k"], ["gsm8k:200"], ["gsm8k", "mmlu"], [f"{tasks}/sums.yaml"])
        for run in planned(serve=True, quality=quality).runs
    }
    assert len(ids) == 5
    with pytest.raises(WrongUseError, match="quality needs a server"):
        planned(quality="gsm8k")


def test_a_task_file_lies_beside_its_submission_file(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('serve = true\nquality = ["gsm8k:5", "a.yaml:5"]\n')
    assert request_file(str(file))[1]["quality"] == ["gsm8k:5", f"{tmp_path}/a.yaml:5"]


def test_preflight_says_that_the_harness_is_missing_or_too_old() -> None:
    (job,) = planned(serve=True, quality="gsm8k").jobs
    packages = {"vllm": "0.26.0", "transformers": "5.17.0"}
    kinds = {
        version: [one.kind for one in foreseen(job, None, {**packages, **({"lm_eval": version} if version else {})})]
        for version in ("", "0.4.9", "0.4.13")
    }
    assert kinds == {"": ["harness-missing"], "0.4.9": ["harness-too-old"], "0.4.13": []}


def test_preflight_names_the_tasks_whose_data_offline_nodes_lack(tmp_path: Path, tasks: Path) -> None:
    plan = planned(serve=True, quality=["gsm8k:5", f"{tasks}/sums.yaml"])
    offline = Partition(name="dgxh", offline=True, env={"HF_HOME": str(tmp_path / "hf")})
    subject: Any = SimpleNamespace(plan=plan, partitions={"dgxh": offline})
    (found,) = hub_checks.tasks(subject)
    assert found.what == "data set of task gsm8k was not fetched, and nodes of dgxh cannot reach the Hub"
    assert found.remedy == "run labctl fetch --quality gsm8k -p dgxh"
    hub_checks._marker(offline, "gsm8k").parent.mkdir(parents=True)
    hub_checks._marker(offline, "gsm8k").touch()
    assert list(hub_checks.tasks(subject)) == []


@pytest.mark.model
def test_fetch_loads_the_data_of_a_task_with_the_partitions_python(
    labctl: Labctl,
    workspace: Workspace,
    tasks: Path,
    harness_python: str,  # noqa: F811
) -> None:
    workspace.settings_file.write_text(
        f'[partitions.local]\npython = "{harness_python}"\nenv = {{ HF_HOME = "{tasks}/hf" }}\n'
    )
    ran = labctl("fetch", "--quality", f"{tasks}/sums.yaml", "-p", "local")
    assert ran.code == 0, ran.err
    assert list((tasks / "hf" / "datasets").rglob("*.arrow"))
    (tasks / "lost.yaml").write_text(GENERATION.replace("sums", "lost"))  # without its data
    ran = labctl("fetch", "--quality", f"{tasks}/lost.yaml", "-p", "local")
    assert ran.code == 5
    assert "cannot fetch task lost: " in ran.err
    assert labctl("fetch").code == labctl("fetch", "--quality", "gsm8k").code == 2


@pytest.mark.nightly
@pytest.mark.model
def test_a_task_of_the_hub_is_fetched_by_name_and_answered_offline(
    labctl: Labctl,
    workspace: Workspace,
    tmp_path: Path,
    server: tuple[str, list[dict[str, Any]]],
    smollm2: Path,  # noqa: F811
    harness_python: str,  # noqa: F811
) -> None:
    """gsm8k, with data made here in the files and columns of openai/gsm8k, from a hub on the loopback (tests/hub.py). In `make
    test`: local task files, and preflight's finding."""
    data = tmp_path / "gsm8k"
    data.mkdir()
    rows = {"question": ["What is 1 + 2?", "What is 2 + 2?"], "answer": ["1 + 2 = 3\n#### 3", "2 + 2 = 4\n#### 4"]}
    for split in ("train", "test"):
        parquet.write_table(
            pyarrow.table({name: values * 5 for name, values in rows.items()}), data / f"{split}.parquet"
        )
    files = "".join(f"\n  - split: {split}\n    path: {split}.parquet" for split in ("train", "test"))
    readme = f"---\nconfigs:\n- config_name: main\n  data_files:{files}\n---\n"
    (data / "README.md").write_text(readme)
    home = str(tmp_path / "hf")
    with Hub() as hub:
        hub.add("datasets/openai/gsm8k", data)
        environment = {"HF_HOME": home, "HF_ENDPOINT": hub.address}
        written = "".join(f"{name} = {json.dumps(value)}\n" for name, value in environment.items())
        workspace.settings_file.write_text(
            f"[partitions.local]\npython = {harness_python!r}\noffline = true\n[partitions.local.env]\n{written}"
        )
        ran = labctl("fetch", "--quality", "gsm8k:200", "-p", "local")
        assert ran.code == 0, ran.err
        ran = labctl("fetch", "--quality", "no_such_task", "-p", "local")
        assert (ran.code, "cannot fetch task no_such_task" in ran.err) == (5, True)
    plan = planned(serve=True, quality=["gsm8k:5", "no_such_task"])
    offline = Partition(name="dgxh", offline=True, env={"HF_HOME": home})
    subject: Any = SimpleNamespace(plan=plan, partitions={"dgxh": offline})
    assert [found.what.split()[4] for found in hub_checks.tasks(subject)] == ["no_such_task"]
    # The hub has ended, and a node's harness has its data.
    url, asked = server
    evaluation = Evaluation([parse("gsm8k:4").to_json()], url, "m", str(smollm2), None, 2048, False, True, 0)
    harness.write_evaluation(tmp_path, evaluation)
    words = [harness_python, "-m", "labctl_workers.servers.harness", str(tmp_path)]
    node = {**os.environ, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "k"}
    subprocess.run(words, env=node, cwd=tmp_path, check=True)
    (answered,) = harness.read_answers(tmp_path)
    assert (answered.error, answered.metric, answered.filter) == (None, "exact_match", "strict-match")
    assert answered.correct == [0.0] * 4  # " 3" is not "#### 3"
    ends = sorted(one["prompt"].split("Question: ")[-1] for one in asked)
    assert ends == [f"What is {left} + 2?\nAnswer:" for left in (1, 1, 2, 2)]


# ---------------------------------------------------------------- the harness


class Server(BaseHTTPRequestHandler):
    """Completions with made-up probabilities: the likeliest continuation is the one with the smallest sum of token ids; each
    answer is " 3"."""

    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({**body, "key": self.headers["Authorization"]})
        choices: list[dict[str, Any]] = [{"index": 0, "text": " 3\n"}]
        if body.get("echo"):
            scores = [None, *(-float(token) for token in body["prompt"][0][1:]), -1.0]
            top = [None if score is None else {"x": score} for score in scores]
            choices = [{"index": 0, "text": "", "logprobs": {"token_logprobs": scores, "top_logprobs": top}}]
        answer = json.dumps({"choices": choices}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []
    made = ThreadingHTTPServer(("127.0.0.1", 0), type("Asked", (Server,), {"asked": asked}))
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_address[1]}/v1/completions", asked
    made.shutdown()


def answers_of(python: str, folder: Path, asked: Evaluation, *tasks: str) -> list[TaskAnswers]:
    """What the harness answers in a process of its own, as in a job."""
    documents = [parse(task).to_json() for task in tasks]
    harness.write_evaluation(folder, replace(asked, tasks=documents))
    environment = {**os.environ, "OPENAI_API_KEY": "secret", "HF_HOME": str(folder / "hf")}
    words = [python, "-m", "labctl_workers.servers.harness", str(folder)]
    subprocess.run(words, env=environment, cwd=folder, check=True)
    return harness.read_answers(folder)


@pytest.mark.model
def test_the_harness_asks_each_question_and_says_which_answers_are_right(
    tasks: Path,
    server: tuple[str, list[dict[str, Any]]],
    smollm2: Path,  # noqa: F811
    harness_python: str,  # noqa: F811
) -> None:
    """A task that fails leaves its reason beside the answers of the others."""
    from transformers import AutoTokenizer

    (tasks / "lost.yaml").write_text(GENERATION.replace("sums", "lost"))  # without its data
    url, asked = server
    evaluation = Evaluation(
        [], url, "labctl", str(smollm2), None, 256, sends_tokens=True, scores=True, seed=3,
        generation={"temperature": 0.7, "top_p": 0.9, "do_sample": True},
    )  # fmt: skip
    names = (f"{tasks}/lost.yaml", f"{tasks}/capitals.yaml:4", f"{tasks}/sums.yaml")
    lost, choice, sums = answers_of(harness_python, tasks, evaluation, *names)
    assert (lost.task, "lost.jsonl" in (lost.error or "")) == ("lost", True)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    cost = {city: sum(tokenizer(f" {city}", add_special_tokens=False)["input_ids"]) for _, city in CAPITALS}
    chosen = min(cost, key=lambda city: cost[city])
    assert (choice.task, choice.metric, choice.filter, choice.error) == ("capitals", "acc", "none", None)
    assert choice.correct == [float(city == chosen) for _, city in CAPITALS[:4]]
    assert len(set(choice.questions)) == 4
    assert {request["key"] for request in asked} == {"Bearer secret"}
    assert (sums.metric, sums.filter) == ("exact_match", "number")
    assert sums.correct == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]  # 1 + 2 = 3
    generated = [one for one in asked if not one.get("echo")]
    assert {(one["temperature"], one["top_p"], one["seed"], one["max_tokens"]) for one in generated} == {
        (0.7, 0.9, 3, 4)
    }


@pytest.mark.nightly
@pytest.mark.model
def test_a_server_without_log_probabilities_is_asked_by_text(
    tasks: Path,
    server: tuple[str, list[dict[str, Any]]],
    smollm2: Path,  # noqa: F811
    harness_python: str,  # noqa: F811
) -> None:
    """In `make test`: a server that gives them, above."""
    url, asked = server
    texts = Evaluation([], url, "labctl", str(smollm2), None, 256, sends_tokens=False, scores=False, seed=0)
    names = (f"{tasks}/capitals.yaml", f"{tasks}/sums.yaml:2")
    choice, sums = answers_of(harness_python, tasks, texts, *names)
    assert choice.error == "capitals needs log-probabilities, which this server does not give"
    assert sums.correct == [0.0, 1.0]
    assert sorted(one["prompt"] for one in asked) == ["0 + 1 =", "1 + 2 ="]


def test_the_harness_gets_the_runs_sampling_and_its_end_without_answers_is_a_reason(
    tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault: its process finds no tasks. Real answers of both engines: tests/slurm/test_served_jobs.py."""
    engine: Any = ServedEngine.__new__(ServedEngine)
    engine.job = SimpleNamespace(model=ModelRef("m", path="a-model"))
    engine.kind = SimpleNamespace(model="labctl", longest=lambda: 256, TAKES_TOKENS=True)
    engine.server = SimpleNamespace(url="http://h", key="of the server", check=lambda: None, status=lambda path: 200)
    engine.folder = tasks
    run = RunSpec("r", {}, "p", 8, sampling=Sampling(0.7, 0.9, 5), tasks=[parse(f"{tasks}/sums.yaml:2")])
    sent: list[Evaluation] = []
    monkeypatch.setattr(harness, "write_evaluation", lambda folder, evaluation: sent.append(evaluation))
    (failed,) = engine.evaluate(run)
    assert failed == TaskAnswers("sums", error="the harness ended with status 1")
    (evaluation,) = sent
    assert (evaluation.url, evaluation.seed) == ("http://h/v1/completions", 5)
    assert evaluation.generation == {"temperature": 0.7, "top_p": 0.9, "do_sample": True}


# ---------------------------------------------------------------- intervals and tests, by hand


def scores(correct: Sequence[float]) -> QuestionScores:
    return QuestionScores(tuple(f"t {place}" for place in range(len(correct))), tuple(correct))


def of_counts(both: int, ours: int, theirs: int, neither: int) -> tuple[QuestionScores, QuestionScores]:
    one = [1.0] * (both + ours) + [0.0] * (theirs + neither)
    other = [1.0] * both + [0.0] * ours + [1.0] * theirs + [0.0] * neither
    return scores(one), scores(other)


def test_the_interval_of_a_difference_is_that_of_bonett_and_price() -> None:
    """12 and 4 discordant questions of 50: (13 - 5) / 52 -+ 1.96 sqrt((13/52 + 5/52 - (8/52)^2) / 52)."""
    found = accuracy.compared(*of_counts(20, 12, 4, 14))
    assert found.difference == pytest.approx(8 / 50)
    half = 1.959964 * math.sqrt((18 / 52 - (8 / 52) ** 2) / 52)
    assert (found.low, found.high) == pytest.approx((8 / 52 - half, 8 / 52 + half), abs=1e-6)


@pytest.mark.parametrize(
    ("ours", "theirs", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (12, 4, 0.076813), (3, 3, 1.0), (20, 5, 0.004077)],
)
def test_mcnemars_exact_test_is_a_binomial_of_the_discordant_questions(ours: int, theirs: int, p: float) -> None:
    found = accuracy.discordant(*of_counts(7, ours, theirs, 3))
    assert (found.ours, found.theirs) == (ours, theirs)
    assert found.p_value == pytest.approx(p, rel=1e-3)


def test_the_interval_of_an_accuracy_is_wilsons() -> None:
    """8 of 10: NIST/SEMATECH e-Handbook, 7.2.4.1, with z = 1.96."""
    found = accuracy.interval_of(scores([1.0] * 8 + [0.0] * 2))
    assert (found.difference, found.low, found.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)


def test_the_interval_of_a_difference_holds_the_true_one_as_often_as_it_says() -> None:
    """2,000 tasks of 100 questions; two runs whose answers are alike on most."""
    draw, held = random.Random(1), 0
    for _ in range(2000):
        counts = [0, 0, 0, 0]
        for kind in draw.choices(range(4), (0.5, 0.12, 0.06, 0.32), k=100):
            counts[kind] += 1
        found = accuracy.compared(*of_counts(*counts))
        held += (found.low or 0) <= 0.06 <= (found.high or 0)
    assert 0.935 <= held / 2000 <= 0.97


# ---------------------------------------------------------------- compare, show, query

TASKS = [QualityTask("capitals", 50), QualityTask("sums")]


@pytest.fixture
def pair(records: Records, slurm: Slurm) -> JobArray:
    """Two runs that answered tasks, in a job each."""
    slurm.accepts(2000)

    def answers_tasks(job: JobSpec, run: RunSpec) -> None:
        run.tasks = TASKS

    batch = records.submit(dtypes=("float32", "bfloat16"), lengths=(8,), change=answers_tasks)
    name = f"labctl-{batch.array_id}"
    slurm.shows("", "".join(sacct_line(f"1000_{task}", "COMPLETED", name) for task in (0, 1)))
    return batch


def answers(correct: Sequence[float], task: str = "capitals") -> TaskAnswers:
    return TaskAnswers(task, "acc", "none", [f"{place:04x}" for place in range(len(correct))], list(correct))


def measure(records: Records, batch: JobArray, task: int, found: list[TaskAnswers]) -> RunSpec:
    run = batch.jobs[task].runs[0]
    records.done(batch, records.attempt(batch, task, slurm_id=f"1000_{task}"), run, answers=found)
    return run


def test_two_runs_are_compared_question_by_question(labctl: Labctl, records: Records, pair: JobArray) -> None:
    ours, theirs = of_counts(20, 2, 14, 14)
    measure(records, pair, 0, [answers(theirs.correct)])
    run = measure(records, pair, 1, [answers(ours.correct)])
    answer = labctl("compare", "--by", "dtype", "--metric", "accuracy", "--json").json
    row = next(row for row in answer["blocks"][0]["rows"] if row["run_id"] == run.run_id)
    assert (row["mean"], row["difference"]) == pytest.approx((22 / 50, -12 / 50))
    half = 1.959964 * math.sqrt((18 / 52 - (12 / 52) ** 2) / 52)
    assert row["difference_interval"] == pytest.approx([-12 / 52 - half, -12 / 52 + half])
    assert (row["n"], row["n_of"], row["verdict"]["kind"], row["ratio"]) == (50, "questions", "worse", None)
    note = (
        f"questions answered right only by {run.run_id}: 2, only by its baseline: 14, of 50"
        " (McNemar's exact test: p = 0.0042)"
    )
    assert note in answer["notes"]
    last = labctl("compare", "--by", "dtype").out.strip().splitlines()[-1]
    assert "not significant, accuracy -0.24 (-0.3779 to -0.08367)" in last


def test_other_questions_are_not_compared(labctl: Labctl, records: Records, pair: JobArray) -> None:
    measure(records, pair, 0, [answers([1.0] * 10)])
    measure(records, pair, 1, [answers([1.0] * 10, "sums")])
    answer = labctl("compare", "--by", "dtype", "--metric", "accuracy", "--json").json
    assert [row["not_comparable"] for row in answer["blocks"][0]["rows"]] == ["", accuracy.OTHER_QUESTIONS]


def test_show_has_the_accuracy_of_each_task_or_why_it_has_none(
    labctl: Labctl, records: Records, pair: JobArray
) -> None:
    failed = TaskAnswers("sums", error="the server is gone")
    run = measure(records, pair, 0, [answers([1.0] * 8 + [0.0] * 2), failed])
    told = " ".join(labctl("show", run.run_id).out.split())
    assert "quality capitals:50, sums" in told
    assert "accuracy 0.8 (95% CI 0.4902-0.9433), capitals, 10 questions" in told
    assert "tasks not answered: sums: the server is gone" in told
    query = "SELECT accuracy, quality FROM measured_runs"
    assert labctl("query", "--json", query).json == [{"accuracy": 0.8, "quality": "capitals:50, sums"}]


def test_runs_without_tasks_have_no_accuracy_and_no_note(labctl: Labctl, records: Records, pair: JobArray) -> None:
    for task in (0, 1):
        measure(records, pair, task, [])
    answer = labctl("compare", "--by", "dtype")
    assert "accuracy" not in answer.out + answer.err
