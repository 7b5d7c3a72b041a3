"""Real vLLM, tensor parallel over two worker processes, as jobs of a real Slurm cluster: its tokens, its figures, its end."""

from __future__ import annotations

import itertools
import json
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.analysis.intervals import t_975
from labctl_orchestrator.models.architecture import shape_of
from labctl_workers.engines import ASSUMED_LOAD_SPREAD
from labctl_workers.engines.parallel import sizes_of, stage_layers
from labctl_workers.measure import METRICS
from labctl_workers.record import Repeat
from tests.vllm_package import vllm_installed  # noqa: F401  a fixture

from .cluster import Process
from .conftest import Lab

pytestmark = pytest.mark.usefixtures("vllm_installed")

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about computers.",
    "Count from one to ten.",
    "Explain tensor parallelism in 5 bullet points.",
    "Translate to German: good morning.",
    "Name three colours.",
    "Why is the sky blue? Answer in one sentence, and then in three, and then in as many as it takes a child to ask again.",
    "2 + 2 =",
]
# What a GPU alone can tell.
OF_GPUS = {"weights_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes", "energy_j",
           "energy_per_token_j", "mbu"}  # fmt: skip
# What speculative decoding, prefix caching and served runs alone have.
OF_OTHER_RUNS = {"acceptance_rate", "accepted_length", "prefix_hit_rate", "failed_requests", "client_busy_share",
                 "client_lag_p99_s", "arrival_gap_s", "drain_share", "queue_growth"}  # fmt: skip


ASKED = ("-p", "dgxh", "--dtype", "float32", "--prompts", "prompts.txt", "--batch-size", "8")


@pytest.fixture(scope="module")
def sweep(lab: Lab, smollm2: Path) -> list[dict[str, Any]]:
    """Both engines, two lengths, three repeats; some answers end by themselves before the longer one."""
    (lab.root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    answer = lab.json(
        "submit", *ASKED, "--model-id", str(smollm2), "--backend", "hf", "--backend", "vllm", "--greedy",
        "--max-new-tokens", "4", "--max-new-tokens", "16", "--name", "engines", "--wait",
    )  # fmt: skip
    assert [run["state"] for run in answer["runs"]] == ["done"] * 4
    return list(answer["runs"])


@pytest.fixture(scope="module")
def both_backends(lab: Lab, sweep: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The records of the longer runs, by backend."""
    records = {}
    for run in sweep:
        if run["max_new_tokens"] == 16:
            (records[run["backend"]],) = lab.json("show", run["run_id"])["records"]
    assert list(records) == ["hf", "vllm"]
    return records


def samples(record: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = record["repeats"][0]["samples"]
    return found


def test_both_engines_give_the_same_tokens(both_backends: dict[str, dict[str, Any]]) -> None:
    hf, vllm = (samples(both_backends[backend]) for backend in ("hf", "vllm"))
    assert len(hf) == len(vllm) == len(PROMPTS)
    for ours, theirs in zip(hf, vllm, strict=True):
        assert ours["token_ids"] == theirs["token_ids"]
        assert (ours["text"], ours["finish_reason"]) == (theirs["text"], theirs["finish_reason"])
        assert ours["prompt_tokens"] == theirs["prompt_tokens"]
        assert ours["log_probabilities"] == pytest.approx(theirs["log_probabilities"], abs=2e-3)
    assert {sample["finish_reason"] for sample in vllm} == {"stop", "length"}
    assert len({tuple(sample["token_ids"]) for sample in vllm}) == len(PROMPTS)


def test_a_token_of_vllm_has_its_own_time(both_backends: dict[str, dict[str, Any]]) -> None:
    for sample in samples(both_backends["vllm"]):
        times = sample["token_times_s"]
        assert len(times) == len(sample["token_ids"])
        assert all(earlier < later for earlier, later in itertools.pairwise(times))
        assert 0 <= sample["queued_s"] < times[0]
        assert 0 < sample["engine_ttft_s"] < times[0] + 0.05  # other work may hold up the process that reads the tokens


def test_vllm_ran_in_two_worker_processes_as_it_was_asked_to(both_backends: dict[str, dict[str, Any]]) -> None:
    fingerprint = both_backends["vllm"]["fingerprint"]
    assert fingerprint["devices_in_use"] == ["cpu:0", "cpu:1"]
    assert fingerprint["parallel"] == "tensor"
    assert fingerprint["effective_dtype"] == "float32"
    assert fingerprint["vllm"]["prefix_caching"] is False
    assert fingerprint["vllm"]["max_model_len"] == 512  # for what the run needs, not the model's 8192
    devices = both_backends["vllm"]["repeats"][0]["devices"]
    assert [device["device"] for device in devices] == ["cpu:0", "cpu:1"]
    per_token = 2 * 30 * 2 * 64 * 4  # keys and values, 30 layers, 2 of the 4 heads, 64 numbers of 4 bytes
    reserved = fingerprint["vllm"]["kv_blocks"] * fingerprint["vllm"]["kv_block_tokens"] * per_token
    assert [device["kv_cache_reserved_bytes"] for device in devices] == [reserved, reserved]
    used, as_much = (device["kv_cache_used_bytes"] for device in devices)
    assert 0 < used == as_much < reserved
    assert both_backends["vllm"]["load_s"] > 0
    assert both_backends["vllm"]["init_s"] > 0


def test_compare_by_backend_shows_both_with_all_metrics(lab: Lab, both_backends: dict[str, dict[str, Any]]) -> None:
    names = [name for name in METRICS if name not in OF_GPUS | OF_OTHER_RUNS]
    chosen = [word for name in names for word in ("--metric", name)]
    answer = lab.json("compare", "engines", "--by", "backend", "--where", "max_new_tokens=16", *chosen)
    assert [block["metric"] for block in answer["blocks"]] == names
    for block in answer["blocks"]:
        assert [row["at"]["backend"] for row in block["rows"]] == ["hf", "vllm"], block["metric"]
        hf, vllm = (row["mean"] for row in block["rows"])
        assert vllm is not None
        assert hf is not None or block["metric"] == "queued_s"  # transformers has no queue
    assert not [warning for warning in answer["warnings"] if "differ" in warning]
    shown = lab.ok("compare", "engines", "--by", "backend", "--where", "max_new_tokens=16")
    assert "ratio: throughput relative to backend hf (higher is better)" in shown


def test_compare_text_tells_that_the_answers_are_the_same(lab: Lab, both_backends: dict[str, dict[str, Any]]) -> None:
    shown = lab.ok("compare", "engines", "--text", "--by", "backend", "--where", "max_new_tokens=16")
    assert f"all {len(PROMPTS)} answers have the same tokens" in shown
    assert PROMPTS[0] in shown


@pytest.mark.nightly
def test_requests_that_come_at_a_rate_have_their_queue_in_their_latency(lab: Lab, smollm2: Path) -> None:
    """In `make test`: the same of vLLM's engine in tests/test_vllm.py, of the arrivals in tests/test_measure.py."""
    answer = lab.json(
        "submit", "-p", "dgxh", "--backend", "hf", "--backend", "vllm", "--dtype", "float32", "--model-id", str(smollm2),
        "--max-new-tokens", "8", "--ignore-eos", "--request-rate", "20", "--requests", "12", "--batch-size", "4",
        "--repeats", "1", "--engine-option", "max_num_seqs=4", "--wait",
    )  # fmt: skip
    for run in answer["runs"]:
        (record,) = lab.json("show", run["run_id"])["records"]
        taken = samples(record)
        assert len(taken) == 12
        handed = [sample["handed_s"] for sample in taken]
        assert handed == sorted(handed)
        assert handed[-1] > 0.1
        assert all(len(sample["token_ids"]) == 8 for sample in taken)
        ends = [(s["handed_s"] + s["token_times_s"][0], s["handed_s"] + s["token_times_s"][-1]) for s in taken]
        for begun, _ in ends:  # never more than four with a token and without their last
            assert sum(first <= begun < last for first, last in ends) <= 4


# ---------------------------------------------------------------- verdicts on real runs


def raw_values(lab: Lab, run_id: str, metric: str) -> list[float]:
    """From the record itself."""
    (record,) = lab.json("show", run_id)["records"]
    values = [METRICS[metric].compute(Repeat.from_json(repeat)) for repeat in record["repeats"]]
    return [value for value in values if value is not None]


def test_the_verdicts_on_a_sweep_are_what_the_raw_rows_support(lab: Lab, sweep: list[dict[str, Any]]) -> None:
    metrics = ("output_tok_s", "ttft_s")
    answer = lab.json(
        "compare", "engines", "--by", "backend", *(word for name in metrics for word in ("--metric", name))
    )
    assert len(answer["blocks"]) == 4  # two lengths, two metrics
    for block in answer["blocks"]:
        hf, vllm = block["rows"]
        ours, theirs = (
            [math.log(value) for value in raw_values(lab, row["run_id"], block["metric"])] for row in (vllm, hf)
        )
        assert len(ours) == len(theirs) == 3
        # One engine load a side and none of any run to measure their spread by: it is assumed, and the repeats add theirs.
        parts = [statistics.variance(values) / 3 for values in (ours, theirs)]
        variance = sum(parts) + ASSUMED_LOAD_SPREAD["hf"] ** 2 + ASSUMED_LOAD_SPREAD["vllm"] ** 2
        half = t_975(variance**2 / sum(part**2 / 2 for part in parts)) * math.sqrt(variance)
        difference = statistics.fmean(ours) - statistics.fmean(theirs)
        expected = [math.exp(difference - half), math.exp(difference + half)]
        assert vllm["ratio"] == pytest.approx(math.exp(difference))
        assert vllm["ratio_interval"] == pytest.approx(expected, rel=1e-3)
        higher_is_better = block["better"] == "higher"
        if expected[0] <= 1 <= expected[1]:
            assert vllm["verdict"]["kind"] == "no significant difference"
        else:
            assert vllm["verdict"]["kind"] == ("better" if (difference > 0) == higher_is_better else "worse")
    shown = lab.ok("compare", "engines", "--by", "backend", "--where", "max_new_tokens=16", "--details")
    sentences = lab.json("compare", "engines", "--by", "backend", "--where", "max_new_tokens=16")["verdicts"]
    assert sentences
    assert [sentence for sentence in sentences if sentence not in shown] == []


def test_memory_of_the_two_engines_is_said_not_to_be_comparable(lab: Lab, sweep: list[dict[str, Any]]) -> None:
    answer = lab.json("compare", "engines", "--by", "backend", "--metric", "kv_cache_reserved_bytes")
    assert {row["verdict"]["kind"] for block in answer["blocks"] for row in block["rows"]} == {
        "baseline",
        "not comparable",
    }
    assert any("KV cache reserved cannot be compared" in warning for warning in answer["warnings"])


def test_an_early_stop_is_warned_of(lab: Lab, sweep: list[dict[str, Any]]) -> None:
    warnings = lab.json("compare", "engines", "--by", "max_new_tokens")["warnings"]
    assert ["answers ended before max_new_tokens" in warning for warning in warnings].count(True) == 1
    assert any("of 16 tokens" in warning for warning in warnings)


def test_runs_of_another_length_are_not_compared_and_that_is_said(lab: Lab, sweep: list[dict[str, Any]]) -> None:
    chosen = [run["run_id"] for run in sweep if (run["backend"], run["max_new_tokens"]) in (("hf", 4), ("vllm", 16))]
    answer = lab.json("compare", *chosen, "--by", "backend")
    assert answer["verdicts"] == []
    assert any("also differ in max_new_tokens (4, 16)" in warning for warning in answer["warnings"]), answer["warnings"]


def test_another_version_is_warned_of(lab: Lab, sweep: list[dict[str, Any]]) -> None:
    """The fault is injected: a version in a record that was never installed here."""
    chosen = [run["run_id"] for run in sweep if run["backend"] == "hf"]
    (record,) = (lab.root / ".labctl" / "results" / chosen[0]).glob("*.json")
    document = json.loads(record.read_text(encoding="utf-8"))
    real = document["fingerprint"]["packages"]["torch"]
    document["fingerprint"]["packages"]["torch"] = "1.2.3"
    record.write_text(json.dumps(document), encoding="utf-8")
    warnings = lab.json("compare", *chosen, "--by", "max_new_tokens")["warnings"]
    assert any("differ in torch" in warning and "1.2.3" in warning and real in warning for warning in warnings)


@pytest.mark.nightly
def test_the_same_sweep_measured_again_is_a_trend(lab: Lab, sweep: list[dict[str, Any]], smollm2: Path) -> None:
    """One cell of it: a second engine load. In `make test`: trends of made-up records, in tests/test_trend.py."""
    lab.ok(
        "submit", *ASKED, "--backend", "hf", "--model-id", str(smollm2), "--max-new-tokens", "16", "--name", "again",
        "--again", "--wait",
    )  # fmt: skip
    (run_id,) = [run["run_id"] for run in sweep if (run["backend"], run["max_new_tokens"]) == ("hf", 16)]
    (series,) = lab.json("compare", run_id, "--over", "time", "--metric", "output_tok_s")["series"]
    assert [point["n"] for point in series["points"]] == [3, 3]
    assert series["points"][1]["ratio"] > 0
    assert lab.labctl("compare", run_id, "--over", "time", "--fail-on-regression", "99%").returncode == 0
    by_name = lab.json(
        "compare", "--all", "--by", "name", "--where", "name in engines,again", "--metric", "output_tok_s"
    )
    pairs = [block for block in by_name["blocks"] if len(block["rows"]) == 2]
    assert [[row["at"]["name"] for row in block["rows"]] for block in pairs] == [["engines", "again"]]


# ---------------------------------------------------------------- how GPUs share a model

WAYS = {(1, "tensor"), (2, "tensor"), (2, "pipeline"), (2, "data"), (4, "tensor=2,pipeline=2")}
SHARED = """
name = "shared"
partition = "dgxh"
backend = "vllm"
dtype = "float32"
prompts = "prompts.txt"
batch_size = 8
max_new_tokens = 16
repeats = 1
[[cells]]
gpus = 1
[[cells]]
gpus = 2
parallel = ["tensor", "pipeline", "data"]
[[cells]]
parallel = "tensor=2,pipeline=2"
"""


@pytest.fixture(scope="module")
def ways(lab: Lab, smollm2: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """The records of one worker, of two in three ways, and of four: each worker takes the place of a GPU."""
    (lab.root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    (lab.root / "shared.toml").write_text(f'model_id = "{smollm2}"{SHARED}', encoding="utf-8")
    answer = lab.json("submit", "shared.toml", "--wait")
    assert [run["state"] for run in answer["runs"]] == ["done"] * len(WAYS)
    return {(run["gpus"], run["parallel"]): lab.json("show", run["run_id"])["records"][0] for run in answer["runs"]}


@pytest.mark.nightly
def test_every_way_to_share_a_model_gives_the_tokens_of_one_worker(ways: dict[tuple[int, str], dict[str, Any]]) -> None:
    """In `make test`: tensor parallel, above; the arguments, steps, copies and buffers of the others, in tests/test_vllm.py."""
    assert set(ways) == WAYS
    alone = samples(ways[1, "tensor"])
    for way, record in ways.items():
        for ours, theirs in zip(samples(record), alone, strict=True):
            assert ours["token_ids"] == theirs["token_ids"], way
            assert ours["finish_reason"] == theirs["finish_reason"]
            assert ours["log_probabilities"] == pytest.approx(theirs["log_probabilities"], abs=2e-3)
            assert len(ours["token_times_s"]) == len(ours["token_ids"])


@pytest.mark.nightly
def test_the_memory_of_every_worker_is_its_part_as_fit_says(
    ways: dict[tuple[int, str], dict[str, Any]], smollm2: Path
) -> None:
    """The CPU build reports no weights. Blocks of 8 sequences of one length: each worker has its layers and heads of them; a copy
    of the model has the sequences of half of the requests."""
    config = json.loads((smollm2 / "config.json").read_text(encoding="utf-8"))
    shape = shape_of(config)
    for (gpus, parallel), record in ways.items():
        devices = record["repeats"][0]["devices"]
        assert [device["device"] for device in devices] == [f"cpu:{worker}" for worker in range(gpus)]
        assert record["fingerprint"]["devices_in_use"] == [f"cpu:{worker}" for worker in range(gpus)]
        sizes = sizes_of(parallel, gpus)
        layers = stage_layers(shape.layers, sizes.pipeline)
        parts = [layers[rank % (sizes.tensor * sizes.pipeline) // sizes.tensor] / sizes.tensor for rank in range(gpus)]
        used = [device["kv_cache_used_bytes"] for device in devices]
        alone = ways[1, "tensor"]["repeats"][0]["devices"][0]["kv_cache_used_bytes"]
        if sizes.data == 1:
            assert used == pytest.approx([alone * part / shape.layers for part in parts])
        else:
            assert sum(used) == pytest.approx(alone, rel=0.25)  # the copies reach their maxima at times of their own


def test_sizes_that_do_not_divide_the_model_are_refused_before_the_queue(lab: Lab, smollm2: Path) -> None:
    ran = lab.labctl(
        "submit", "-p", "dgxh", "--backend", "vllm", "--model-id", str(smollm2), "--parallel", "tensor=8,pipeline=1"
    )
    assert ran.returncode == 3
    assert "8 GPUs do not divide the 12 query and 4 key-value heads" in ran.stderr
    assert "use --parallel tensor=4,pipeline=2" in ran.stderr


@pytest.mark.nightly
def test_compare_by_gpus_has_the_speed_up_and_efficiency_of_every_way(
    lab: Lab, ways: dict[tuple[int, str], dict[str, Any]]
) -> None:
    """In `make test`: of made-up records, in tests/test_compare.py."""
    answer = lab.json("compare", "shared", "--by", "gpus")
    rows = {
        (row["at"]["gpus"], row["at"]["parallel"], block["metric"]): row
        for block in answer["blocks"]
        for row in block["rows"]
    }
    rate = {way: rows[(*way, "output_tok_s")]["mean"] for way in WAYS}
    for gpus, parallel in WAYS - {(1, "tensor")}:
        speed_up = rows[gpus, parallel, "output_tok_s"]["ratio"]
        assert speed_up == pytest.approx(rate[gpus, parallel] / rate[1, "tensor"])
        assert rows[gpus, parallel, "output_tok_s_per_gpu"]["ratio"] == pytest.approx(speed_up / gpus)
    shown = lab.ok("compare", "shared", "--by", "gpus")
    assert "speed-up" in shown and "efficiency" in shown


# ---------------------------------------------------------------- every way out


@dataclass(frozen=True)
class RunningJob:
    """A job in the middle of a run, and the processes that it has then. (vLLM's overwrite their environment, so Slurm's id
    in it does not tell.)"""

    slurm_id: str
    processes: set[Process]

    def left(self) -> list[Process]:
        return [process for process in self.processes if process.alive()]


def heartbeat(lab: Lab) -> dict[str, Any]:
    (file,) = (lab.root / ".labctl" / "arrays").glob("*/heartbeats/0.json")
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return told


def until(what: Callable[[], bool], within_s: float) -> float:
    """Wait for it; returns the seconds that it took."""
    started = time.monotonic()
    while not what():
        assert time.monotonic() - started < within_s, "it did not happen in time"
        time.sleep(0.1)
    return time.monotonic() - started


@pytest.fixture
def running(fresh_lab: Lab, shallow: Path) -> Iterator[RunningJob]:
    """A vLLM job in the middle of a run that would take minutes."""
    (run,) = fresh_lab.json(
        "submit", "-p", "dgxh", "--backend", "vllm", "--dtype", "float32", "--model-id", str(shallow),
        "--max-new-tokens", "4000", "--ignore-eos",
    )["runs"]  # fmt: skip

    def begun() -> bool:
        beats = any((fresh_lab.root / ".labctl" / "arrays").glob("*/heartbeats/0.json"))
        return beats and heartbeat(fresh_lab)["phase"] == "warm-up"

    try:
        until(begun, 150)
        time.sleep(1)
        worker = Process.of(heartbeat(fresh_lab)["pid"])
        assert worker is not None
        processes = {worker, *worker.descendants()}
        assert len(processes) >= 4  # the worker, vLLM's core, and its two workers
        yield RunningJob(run["slurm_id"], processes)
    finally:
        fresh_lab.cluster.run("scancel", run["slurm_id"], check=False)


def only_failure(lab: Lab) -> dict[str, Any]:
    (record,) = (lab.root / ".labctl" / "results").glob("*/*.json")
    failure: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))["failure"]
    return failure


def python_segments(processes: set[Process]) -> set[Path]:
    """The shared memory of Python's multiprocessing that these processes have open."""
    maps = "".join(Path(f"/proc/{process.pid}/maps").read_text() for process in processes)
    return {Path(f"/dev/shm/{word.removeprefix('/dev/shm/')}") for word in maps.split() if "/dev/shm/psm_" in word}


def test_scancel_leaves_no_process_and_no_shared_memory_of_the_job_within_ten_seconds(
    fresh_lab: Lab, running: RunningJob
) -> None:
    assert fresh_lab.cluster.kill_wait_s >= 30  # it is not Slurm's SIGKILL that ends them
    segments = python_segments(running.processes)
    assert segments
    fresh_lab.cluster.run("scancel", running.slurm_id)
    assert until(lambda: not running.left(), 10) < 10
    assert sorted(segment for segment in segments if segment.exists()) == []
    assert only_failure(fresh_lab)["kind"] == "cancelled"
    (run,) = fresh_lab.json("status")
    assert run["state"] == "cancelled"


@pytest.mark.nightly
def test_an_engine_that_dies_leaves_no_process_and_a_record_of_why(fresh_lab: Lab, running: RunningJob) -> None:
    """In `make test`: a killed process of vLLM is the failure, in tests/test_vllm.py; no process is left, above."""
    (core,) = [p for p in running.processes if b"VLLM::EngineCore" in Path(f"/proc/{p.pid}/cmdline").read_bytes()]
    core.send(signal.SIGKILL)
    assert until(lambda: not running.left(), 10) < 10
    failure = only_failure(fresh_lab)
    assert failure["kind"] == "engine-died"
    assert "VLLM::EngineCor" in failure["message"]


@pytest.mark.nightly
def test_usr2_leaves_no_process_and_the_job_goes_back_to_the_queue(fresh_lab: Lab, running: RunningJob) -> None:
    """In `make test`: the same way out by scancel above, and by USR2 in tests/test_job.py."""
    fresh_lab.cluster.run("scancel", "--signal=USR2", "--batch", running.slurm_id)
    assert until(lambda: not running.left(), 10) < 10
    until(lambda: fresh_lab.cluster.run("squeue", "-h", "-j", running.slurm_id, "-o", "%T").stdout.strip() != "", 10)
    assert not list((fresh_lab.root / ".labctl" / "results").glob("*/*.json"))  # nothing failed: it goes on
