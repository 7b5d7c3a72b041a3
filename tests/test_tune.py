"""The search for the highest load that meets service levels: which loads it measures, what it records, what a person reads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labctl_orchestrator.cli import tune
from labctl_orchestrator.cli.tune import ladder
from labctl_orchestrator.request import service_levels
from labctl_orchestrator.request.packing import Bounds, need_s, packed
from labctl_orchestrator.request.plan import Plan
from labctl_orchestrator.store.collect import collect
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking import run_status
from labctl_workers import engines, hardware
from labctl_workers.engines.base import Generated, Generation, Request
from labctl_workers.job import run_job
from labctl_workers.record import EXIT_ALL_RUNS_DONE, JobSpec, LatencyLimit, LoadSearch, RunSpec, read_json
from labctl_workers.search import bisection, searches

from .test_job import CountingEngine, a_job, a_node, a_run, records, the_record  # noqa: F401  a_node is a fixture


@given(count=st.integers(1, 200), best=st.integers(-1, 200))
def test_bisection_finds_the_last_load_that_meets_and_measures_few(count: int, best: int) -> None:
    runs = [a_run(str(number), 1, batch_size=number + 1) for number in range(count)]
    known: dict[str, bool] = {}
    for run in bisection(runs, lambda run: known.get(run.run_id)):
        assert run.run_id not in known
        known[run.run_id] = int(run.run_id) <= best
    assert len(known) <= math.ceil(math.log2(count + 1))
    good = [number for number in range(count) if number <= best]
    if good:  # it measured the highest that meets, and the one above it
        assert known[str(good[-1])]
    if len(good) < count:
        assert known[str(len(good))] is False


def test_runs_with_other_settings_are_searches_of_their_own() -> None:
    runs = [
        RunSpec(f"{tokens}-{rate}", {"max_new_tokens": tokens, "request_rate": rate, "requests": 20}, "p", tokens,
                request_rate=rate)
        for rate in (4.0, 1.0, 2.0) for tokens in (8, 16)
    ]  # fmt: skip
    assert [[run.run_id for run in of_one] for of_one in searches(runs)] == [
        ["8-1.0", "8-2.0", "8-4.0"],
        ["16-1.0", "16-2.0", "16-4.0"],
    ]


@pytest.mark.parametrize(
    ("low", "high", "step", "whole", "loads"),
    [
        (1, 2, 1.0, False, [1.0, 2.0]),
        (1, 8, 1.0, True, [1, 2, 4, 8]),
        (1, 4, 0.1, True, [1, 2, 3, 4]),
        (10, 13, 0.1, False, [10.0, 10.91, 11.91, 13.0]),
    ],
)
def test_neighbouring_loads_are_at_most_a_step_apart(
    low: float, high: float, step: float, whole: bool, loads: list[float]
) -> None:
    assert ladder(low, high, step, whole=whole) == loads


# ---------------------------------------------------------------- on the node


class LoadedEngine(CountingEngine):
    """The first token takes 0.1 s for each request that may be in flight; nothing waits so long."""

    def generate(self, requests: Sequence[Request], how: Generation) -> Callable[[], list[Generated]]:
        handed_at = time.perf_counter()
        ttft_s = 0.1 * how.arrivals.in_flight
        self._told(f"load {how.arrivals.in_flight}")
        return lambda: [
            Generated([0, 1], [handed_at + ttft_s, handed_at + ttft_s + 0.01], "length", len(r.token_ids), handed_at)
            for r in requests
        ]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines.ENGINES, "counting", f"{__name__}:LoadedEngine")
    monkeypatch.setattr(CountingEngine, "calls", [])


def a_search(tmp_path: Path, most_s: float, loads: Sequence[int] = (1, 2, 4, 8, 16, 32)) -> Path:
    runs = [RunSpec(f"at-{load}", {"batch_size": load}, "p", 2, batch_size=load, repeats=1, warmup=0) for load in loads]
    return a_job(tmp_path, runs=runs, search=LoadSearch([LatencyLimit("ttft_s", most_s)]))


@pytest.mark.usefixtures("loaded")
def test_a_job_measures_what_its_search_needs_and_records_the_rest_as_not_needed(tmp_path: Path) -> None:
    path = a_search(tmp_path, most_s=0.85)
    assert run_job(path) == EXIT_ALL_RUNS_DONE
    measured = {load: the_record(path, f"at-{load}") for load in (1, 2, 4, 8, 16, 32)}
    assert [load for load, record in measured.items() if record.status == "done"] == [4, 8, 16]
    for load in (1, 2, 32):
        failure = measured[load].failure
        assert failure is not None
        assert run_status.FAILURE_STATES[failure.kind] == run_status.SKIPPED
    assert [call for call in CountingEngine.calls if call == "load"] == ["load"]


@pytest.mark.usefixtures("loaded")
def test_a_search_that_was_requeued_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    path = a_search(tmp_path, most_s=0.85)
    assert run_job(path) == EXIT_ALL_RUNS_DONE
    for load in (1, 2, 8, 32):
        (file,) = (tmp_path / ".labctl" / "results" / f"at-{load}").glob("*.json")
        file.unlink()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    CountingEngine.calls.clear()
    assert run_job(path) == EXIT_ALL_RUNS_DONE
    assert [call for call in CountingEngine.calls if call.startswith("load ")] == ["load 8"]


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(("most_s", "done"), [(0.01, ["at-1", "at-4"]), (100.0, ["at-4", "at-16", "at-32"])])
def test_a_range_that_all_or_none_of_its_loads_meet_ends_at_its_end(
    tmp_path: Path, most_s: float, done: list[str]
) -> None:
    path = a_search(tmp_path, most_s)
    run_job(path)
    assert [f"at-{load}" for load in (1, 2, 4, 8, 16, 32) if the_record(path, f"at-{load}").status == "done"] == done


# ---------------------------------------------------------------- before the queue


def test_where_nothing_was_measured_no_load_is_called_too_high(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = JobSpec.from_json(read_json(a_job(tmp_path)))
    tune.Found(job, job.runs, {}).print("batch_size", [service_levels.parse("ttft_p99<500ms")])
    out = capsys.readouterr().out
    assert "no batch_size was measured: labctl status shows why" in out
    assert "meets ttft" not in out


@pytest.mark.parametrize(
    ("levels", "latencies"),
    [
        (["ttft_p90<1s", "e2e_p99<2s"], ("ttft_p90_s", "tpot_p99_s", "e2e_p99_s")),
        (["tpot_p90<50ms", "ttft<1s"], ("ttft_p99_s", "tpot_p90_s", "e2e_p99_s")),
        (["ttft_p95<1s"], ("ttft_p99_s", "tpot_p99_s", "e2e_p99_s")),  # no metric has it
    ],
)
def test_the_table_has_latencies_at_the_percentiles_of_the_levels(
    levels: list[str], latencies: tuple[str, ...]
) -> None:
    assert tune.shown([service_levels.parse(level) for level in levels]) == ("output_tok_s", *latencies)


def test_a_search_is_one_job_with_the_time_of_the_loads_that_it_may_measure() -> None:
    runs = [a_run(str(load), 8, batch_size=load, requests=64) for load in range(1, 32)]
    asked = {"partition": "dgxh", "executor": "slurm", "backend": "vllm", "model": None, "dtype": "float32",
             "device": "cpu", "gpus": 1, "runs": runs, "prompt_sets": {"p": ["x"]}}  # fmt: skip
    job = JobSpec("", **asked, search=LoadSearch([LatencyLimit("ttft_s", 1.0, 99.0)]))  # type: ignore[arg-type]
    (one,) = packed(Plan([job]), {"dgxh": Bounds(60, 3600)}, lambda job: None, runs_per_job=2).jobs
    assert len(one.runs) == 31
    slowest = max(need_s(job, run, None) for run in runs)
    assert one.time_limit_s >= 600 + 5 * slowest
    assert one.time_limit_s < 600 + 6 * slowest + 900


@pytest.fixture
def run_jobs(loaded: None, slurm: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slurm is a stand-in: the worker of each job runs here, with an engine that is slow under load. Gets the exit statuses."""
    slurm.accepts()
    ran: set[Path] = set()
    statuses: list[int] = []

    def runs_the_job(workspace: Workspace, store: Store, run_ids: Sequence[str]) -> int:
        for path in set(workspace.arrays.glob("*/0.json")) - ran:
            ran.add(path)
            statuses.append(run_job(path))
        collect(workspace, store)
        return 0

    monkeypatch.setattr(tune, "wait_for", runs_the_job)
    monkeypatch.setattr(engines, "_class_of", lambda job: LoadedEngine)
    monkeypatch.setattr(hardware, "check_gpus", lambda job, gpus: None)
    return statuses


def search_words(checkpoint: Path) -> list[Any]:
    return ["tune", "-p", "dgxh", "--backend", "vllm", "--model-id", checkpoint, "--repeats", 1, "--warmup", 0,
            "--requests", 32, "--step", 1, "--concurrency", 1, "--concurrency", 32]  # fmt: skip


def test_a_person_reads_the_highest_load_and_the_next_one(labctl: Any, checkpoint: Path, run_jobs: list[int]) -> None:
    ran = labctl(*search_words(checkpoint), "--slo", "ttft<850ms")
    assert ran.code == 0, ran.err
    assert run_jobs == [EXIT_ALL_RUNS_DONE]
    assert "highest batch_size that meets ttft<850ms: 8 (16 does not)" in ran.out
    assert [line.split()[0] for line in ran.out.splitlines() if " yes " in line or " no " in line] == ["4", "8", "16"]


@pytest.mark.usefixtures("run_jobs")
def test_a_search_judges_what_its_own_job_measured(labctl: Any, checkpoint: Path) -> None:
    """The second search has other levels, and the runs of the first."""
    for levels, loads, answer in (
        ("ttft<850ms", ["4", "8", "16"], "8 (16 does not)"),
        ("ttft<250ms", ["1", "2", "4"], "2 (4 does not)"),
    ):
        out = labctl(*search_words(checkpoint), "--slo", levels).out
        assert f"highest batch_size that meets {levels}: {answer}" in out
        assert [line.split()[0] for line in out.splitlines() if " yes " in line or " no " in line] == loads


@pytest.mark.parametrize(
    "words",
    [
        "tune -p dgxh --backend vllm --request-rate 1 --request-rate 8",
        "tune -p dgxh --backend vllm --slo ttft<1s",
        "tune -p dgxh --backend vllm --slo ttft<1s --request-rate 8",
        "tune -p dgxh --backend vllm --slo ttft<1s --request-rate 8 --request-rate 1",
        "tune -p dgxh --backend vllm --slo ttft<1s --request-rate 1 --request-rate 8 --concurrency 4",
        "tune -p dgxh --backend vllm --slo ttft<1s --concurrency 1 --concurrency 8 --step 0",
        "tune -p dgxh --backend vllm --slo ttft<1s --concurrency 1 --concurrency 8 --requests 20 --requests 40",
    ],
)
def test_a_search_without_levels_or_a_range_is_refused(labctl: Any, checkpoint: Path, words: str) -> None:
    ran = labctl(*words.split(), "--model-id", checkpoint)
    assert ran.code == 2
    assert ran.err.count("\n") <= 3
