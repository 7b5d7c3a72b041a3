"""Served runs as jobs of a real Slurm cluster: vLLM's server over two worker processes, and `transformers serve`."""

from __future__ import annotations

import json
import math
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness_package import harness_python  # noqa: F401  a fixture
from tests.reference import greedy_tokens, model_of
from tests.test_quality import CAPITALS, write_tasks
from tests.vllm_package import vllm_installed  # noqa: F401  a fixture

from .cluster import Process
from .conftest import CPU_PARTITIONS, Lab

pytestmark = pytest.mark.usefixtures("vllm_installed")

PROMPTS = ["What is the capital of France?", "Count from one to ten.", "2 + 2 =", "Name three colours."]
# Three concurrencies and two rates; and offline, which the tokens are held against.
SUBMISSION = """
name = "served"
partition = "dgxh"
model_id = "{model}"
dtype = "float32"
gpus = 1
prompts = "prompts.txt"
max_new_tokens = 6
requests = 4
repeats = 1
warmup = 0

[[cells]]
backend = ["hf", "vllm"]
serve = true
batch_size = [1, 2, 4]

[[cells]]
backend = ["hf", "vllm"]
serve = true
request_rate = [1, 4]

[[cells]]
backend = "hf"
batch_size = 4
"""


@pytest.fixture(scope="module")
def runs(lab: Lab, shallow: Path) -> list[dict[str, Any]]:
    (lab.root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    (lab.root / "served.toml").write_text(SUBMISSION.format(model=shallow), encoding="utf-8")
    answer = lab.json("submit", "served.toml", "--wait")
    assert [run["state"] for run in answer["runs"]] == ["done"] * 11, answer["runs"]
    return list(answer["runs"])


@pytest.fixture(scope="module")
def records(lab: Lab, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for run in runs:
        (record,) = lab.json("show", run["run_id"])["records"]
        found.append(record)
    return found


def samples(record: dict[str, Any]) -> list[dict[str, Any]]:
    (repeat,) = record["repeats"]
    taken: list[dict[str, Any]] = repeat["samples"]
    return taken


def test_one_server_start_serves_all_load_points_of_a_job(lab: Lab, runs: list[dict[str, Any]]) -> None:
    jobs = {run["job_id"]: run for run in runs if run["served"]}
    assert len(jobs) == 2
    for run in jobs.values():
        log = lab.ok("logs", run["run_id"])
        assert log.count("server: ") == 1, log  # its command


def test_tokens_of_a_served_greedy_request_are_those_of_the_offline_engine(
    records: list[dict[str, Any]],
) -> None:
    (offline,) = [record for record in records if not record["definition"].get("served")]
    expected = {sample["prompt"]: (sample["token_ids"], sample["text"]) for sample in samples(offline)}
    assert len(expected) == len(PROMPTS)
    for record in records:
        for sample in samples(record):
            assert (sample["token_ids"], sample["text"]) == expected[sample["prompt"]], record["definition"]
            assert sample["prompt_tokens"] == samples(offline)[sample["prompt"]]["prompt_tokens"]


def test_every_request_of_the_client_is_in_the_database_with_its_times(lab: Lab, records: list[dict[str, Any]]) -> None:
    rows = lab.json("export", "--table", "requests")
    assert len(rows) == 11 * 4
    assert [row["error"] for row in rows if row["error"]] == []
    for record in records:
        (repeat,) = record["repeats"]
        for sample in samples(record):
            assert len(sample["token_times_s"]) == len(sample["token_ids"])
            assert sample["token_times_s"] == sorted(sample["token_times_s"])
            assert sample["handed_s"] + sample["token_times_s"][-1] <= repeat["wall_s"] + 1e-3
        assert (repeat["client"] is not None) == record["definition"].get("served", False)


def test_at_a_rate_both_engines_get_their_requests_at_the_same_times(records: list[dict[str, Any]]) -> None:
    at_a_rate: dict[float, list[list[float]]] = {}
    for record in records:
        if rate := record["definition"].get("request_rate"):
            at_a_rate.setdefault(rate, []).append([sample["handed_s"] for sample in samples(record)])
    assert sorted(at_a_rate) == [1.0, 4.0]
    for hf, vllm in at_a_rate.values():
        assert hf == pytest.approx(vllm, abs=1e-6)
        assert hf == sorted(hf)


def test_compare_shows_the_cost_of_serving_and_of_more_requests(lab: Lab, runs: list[dict[str, Any]]) -> None:
    served = lab.json("compare", "served", "--by", "served", "--where", "batch_size=4", "--where", "backend=hf")
    assert sorted(row["at"]["served"] for row in served["blocks"][0]["rows"]) == [0, 1]
    loads = lab.json("compare", "served", "--by", "batch_size", "--where", "served=1", "--where", "backend=vllm",
                     "--where", "batch_size in 1,2,4", "--metric", "output_tok_s")  # fmt: skip
    assert [row["at"]["batch_size"] for row in loads["blocks"][0]["rows"]] == [1, 2, 4]
    rates = lab.json("compare", "served", "--by", "backend", "--where", "request_rate>0", "--metric", "ttft_s")
    assert [len(block["rows"]) for block in rates["blocks"]] == [2, 2]


# ---------------------------------------------------------------- tasks


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("backend", "axis"),
    [("vllm", 'sampling = ["greedy", "temperature=1.5,seed=3"]'), ("hf", 'dtype = ["float32", "bfloat16"]')],
)
def test_a_server_answers_tasks_as_transformers_does_and_two_runs_are_compared_by_question(
    fresh_lab: Lab,
    smollm2: Path,
    harness_python: str,  # noqa: F811
    backend: str,
    axis: str,
) -> None:
    """In `make test`: the harness beside made-up servers, and two runs of made-up answers, in tests/test_quality.py."""
    fresh_lab.settings(CPU_PARTITIONS.replace("[partitions.dgxh]", f'[partitions.dgxh]\npython = "{harness_python}"'))
    write_tasks(fresh_lab.root, sums=30)
    (fresh_lab.root / "tasks.toml").write_text(
        f'partition = "dgxh"\nmodel_id = "{smollm2}"\ngpus = 1\nmax_new_tokens = 2\nrequests = 2\nrepeats = 1\nwarmup = 0\n'
        f'serve = true\nquality = ["capitals.yaml", "sums.yaml"]\nbackend = "{backend}"\n{axis}\n'
        + ('dtype = "float32"\n' if "dtype" not in axis else "")
    )
    runs = fresh_lab.json("submit", "tasks.toml", "--wait")["runs"]
    records = [fresh_lab.json("show", run["run_id"])["records"][0] for run in runs]
    assert all(record["fingerprint"]["packages"]["lm_eval"] for record in records)
    first, second = ({one["task"]: one for one in record["answers"]} for record in records)
    expected = {"sums": sums_of_transformers(smollm2, 30)}
    if backend == "vllm":
        expected["capitals"] = capitals_of_transformers(smollm2)
    else:
        assert first["capitals"]["error"] == "capitals needs log-probabilities, which this server does not give"
    assert {name: one["correct"] for name, one in first.items() if one["correct"]} == expected
    pairs = [
        (one, other)
        for name in expected
        for one, other in zip(first[name]["correct"], second[name]["correct"], strict=True)
    ]
    lost, won = pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0))
    compared = fresh_lab.json("compare", "--by", axis.partition(" ")[0], "--metric", "accuracy")
    _, row = compared["blocks"][0]["rows"]
    assert row["run_id"] == runs[1]["run_id"]
    assert row["difference"] == pytest.approx((won - lost) / len(pairs))
    n = len(pairs) + 2  # Bonett and Price
    half = 1.959964 * math.sqrt(((lost + won + 2) / n - ((won - lost) / n) ** 2) / n)
    low, high = row["difference_interval"]
    assert (low, high) == pytest.approx(((won - lost) / n - half, (won - lost) / n + half))
    assert row["verdict"]["kind"] == ("worse" if high < 0 else "better" if low > 0 else "no significant difference")
    tail = sum(math.comb(lost + won, k) for k in range(min(lost, won) + 1))  # McNemar's exact test
    p_value = min(1.0, 2 * tail * 0.5 ** (lost + won))
    assert (
        f"questions answered right only by {runs[1]['run_id']}: {won}, only by its baseline: {lost}, of {len(pairs)}"
        f" (McNemar's exact test: p = {p_value:.2g})" in compared["notes"]
    )


def sums_of_transformers(checkpoint: Path, count: int) -> list[float]:
    """Whether the first number in the first four greedy tokens of each answer is right, in float32."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    asked = [tokenizer(f"{one} + {one + 1} =")["input_ids"] for one in range(count)]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in greedy_tokens(checkpoint, asked, 4)]
    numbers = [re.search("[0-9]+", text.split("\n")[0]) for text in texts]
    return [float(found is not None and found[0] == str(2 * one + 1)) for one, found in enumerate(numbers)]


def capitals_of_transformers(checkpoint: Path) -> list[float]:
    """Whether the likeliest city is the country's own, by the sum of its tokens' log-probabilities, in float32."""
    import torch
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    model = model_of(checkpoint, "cpu")

    def likelihood(country: str, city: str) -> float:
        prompt = tokenizer(f"The capital of {country} is")["input_ids"]
        ids = torch.tensor([tokenizer(f"The capital of {country} is {city}")["input_ids"]])
        with torch.no_grad():
            scores = model(ids).logits[0].log_softmax(-1)
        return float(sum(scores[place - 1, ids[0, place]] for place in range(len(prompt), ids.shape[1])))

    chosen = [max((likelihood(country, city), city) for _, city in CAPITALS)[1] for country, _ in CAPITALS]
    return [float(city == own) for city, (_, own) in zip(chosen, CAPITALS, strict=True)]


# ---------------------------------------------------------------- every way out


def until(what: Callable[[], bool], within_s: float) -> None:
    started = time.monotonic()
    while not what():
        assert time.monotonic() - started < within_s, "it did not happen in time"
        time.sleep(0.1)


def heartbeat(lab: Lab) -> dict[str, Any]:
    found = list((lab.root / ".labctl" / "arrays").glob("*/heartbeats/0.json"))
    told: dict[str, Any] = json.loads(found[0].read_text(encoding="utf-8")) if found else {"phase": ""}
    return told


Running = tuple[str, set[Process]]


@pytest.fixture(params=["hf", "vllm"])
def running(request: pytest.FixtureRequest, fresh_lab: Lab, shallow: Path) -> Iterator[Running]:
    """A job whose server works on a run that would take minutes: its Slurm id, and its processes."""
    (run,) = fresh_lab.json(
        "submit", "-p", "dgxh", "--backend", request.param, "--dtype", "float32", "--gpus", "1",
        "--model-id", str(shallow), "--serve", "--concurrency", "2", "--requests", "2", "--max-new-tokens", "4000",
        "--ignore-eos",
    )["runs"]  # fmt: skip
    try:
        until(lambda: heartbeat(fresh_lab)["phase"] == "warm-up", 150)
        time.sleep(2)
        worker = Process.of(heartbeat(fresh_lab)["pid"])
        assert worker is not None
        yield run["slurm_id"], {worker, *worker.descendants()}
    finally:
        fresh_lab.cluster.run("scancel", run["slurm_id"], check=False)


def of_module(processes: set[Process], words: bytes) -> Process:
    (found,) = [p for p in processes if words in Path(f"/proc/{p.pid}/cmdline").read_bytes().replace(b"\0", b" ")]
    return found


def only_failure(lab: Lab) -> dict[str, Any]:
    (record,) = (lab.root / ".labctl" / "results").glob("*/*.json")
    failure: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))["failure"]
    return failure


def all_end(processes: set[Process]) -> None:
    until(lambda: not any(process.alive() for process in processes), 12)


@pytest.mark.nightly
def test_scancel_leaves_no_process_of_server_and_load_generator(fresh_lab: Lab, running: Running) -> None:
    """In `make test`: scancel of a vLLM job in test_vllm_jobs.py; killed servers and load generators in tests/test_served.py."""
    slurm_id, processes = running
    assert len(processes) >= 3
    fresh_lab.cluster.run("scancel", slurm_id)
    all_end(processes)
    assert only_failure(fresh_lab)["kind"] == "cancelled"


@pytest.mark.nightly
def test_a_killed_server_leaves_no_process_and_a_record_of_why(fresh_lab: Lab, running: Running) -> None:
    """In `make test`: the same by a stand-in server, in tests/test_served.py; and the two tests below."""
    _, processes = running
    (server,) = [p for p in processes if b"--port" in Path(f"/proc/{p.pid}/cmdline").read_bytes()]
    server.send(signal.SIGKILL)
    all_end(processes)
    assert only_failure(fresh_lab)["kind"] == "server-ended"


@pytest.mark.nightly
def test_a_killed_load_generator_leaves_no_process_and_a_record_of_why(fresh_lab: Lab, running: Running) -> None:
    _, processes = running
    of_module(processes, b"labctl_workers.servers.client").send(signal.SIGKILL)
    all_end(processes)
    assert only_failure(fresh_lab)["kind"] == "client-ended"


@pytest.mark.nightly
def test_usr2_leaves_no_process_and_the_job_goes_back_to_the_queue(fresh_lab: Lab, running: Running) -> None:
    slurm_id, processes = running
    fresh_lab.cluster.run("scancel", "--signal=USR2", "--batch", slurm_id)
    all_end(processes)
    assert not list((fresh_lab.root / ".labctl" / "results").glob("*/*.json"))  # nothing failed: it goes on


@pytest.mark.nightly
def test_tune_measures_what_bisection_needs(fresh_lab: Lab, shallow: Path) -> None:
    """In `make test`: the search on a node and before the queue, in tests/test_tune.py."""
    (found,) = fresh_lab.json(
        "tune", "-p", "dgxh", "--backend", "hf", "--gpus", "1", "--dtype", "float32", "--model-id", str(shallow),
        "--max-new-tokens", "4", "--requests", "4", "--repeats", "1", "--warmup", "0", "--slo", "e2e_p99<1000s",
        "--concurrency", "1", "--concurrency", "4", "--step", "1",
    )  # fmt: skip
    assert [point["batch_size"] for point in found["measured"]] == [2, 4]
    assert (found["highest"], found["next"]) == (4, None)
    assert sorted(run["state"] for run in fresh_lab.json("status")) == ["done", "done", "skipped"]
