"""Served runs as jobs of a real Slurm cluster: vLLM's server over two worker processes, and `transformers serve`."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm_package import vllm_installed  # noqa: F401  a fixture

from .cluster import Process
from .conftest import Lab

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
def runs(lab: Lab, smollm2: Path) -> list[dict[str, Any]]:
    (lab.root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    (lab.root / "served.toml").write_text(SUBMISSION.format(model=smollm2), encoding="utf-8")
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


@pytest.fixture(params=["hf", pytest.param("vllm", marks=pytest.mark.nightly)])
def running(request: pytest.FixtureRequest, fresh_lab: Lab, smollm2: Path) -> Iterator[Running]:
    """A job whose server works on a run that would take minutes: its Slurm id, and its processes."""
    (run,) = fresh_lab.json(
        "submit", "-p", "dgxh", "--backend", request.param, "--dtype", "float32", "--gpus", "1",
        "--model-id", str(smollm2), "--serve", "--concurrency", "2", "--requests", "2", "--max-new-tokens", "4000",
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


def test_scancel_leaves_no_process_of_server_and_load_generator(fresh_lab: Lab, running: Running) -> None:
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
def test_tune_measures_what_bisection_needs(fresh_lab: Lab, smollm2: Path) -> None:
    """In `make test`: the search on a node and before the queue, in tests/test_tune.py."""
    (found,) = fresh_lab.json(
        "tune", "-p", "dgxh", "--backend", "hf", "--gpus", "1", "--dtype", "float32", "--model-id", str(smollm2),
        "--max-new-tokens", "4", "--requests", "4", "--repeats", "1", "--warmup", "0", "--slo", "e2e_p99<1000s",
        "--concurrency", "1", "--concurrency", "4", "--step", "1",
    )  # fmt: skip
    assert [point["batch_size"] for point in found["measured"]] == [2, 4]
    assert (found["highest"], found["next"]) == (4, None)
    assert sorted(run["state"] for run in fresh_lab.json("status")) == ["done", "done", "skipped"]
