"""One job on its node, with an engine that only counts: what is written, when, and what becomes of each failure."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from labctl_slurm import diagnose
from labctl_slurm.queue import JobState
from labctl_workers import engines, job, kept_records
from labctl_workers.checkpoint_files import checkpoint_files, stamp
from labctl_workers.engines.base import Generated, Generation, Request
from labctl_workers.job import RunJob, failure_of, main, run_job
from labctl_workers.measure import draw_seed, output_tokens
from labctl_workers.record import (
    EXIT_A_RUN_FAILED,
    EXIT_ALL_RUNS_DONE,
    Attempt,
    DeviceMemory,
    EngineCounts,
    EngineFingerprint,
    Heartbeat,
    JobFolder,
    JobSpec,
    ModelRef,
    Refusal,
    RunResult,
    RunSpec,
    Sampling,
    ScoredText,
    ScriptSettings,
    TextScores,
    read_json,
    sha256_of_json,
    write_json,
)

ROOT = Path(__file__).parent.parent
PROMPTS = ["one two three", "four five"]


class OutOfMemoryError(RuntimeError):
    """Fault injection: called like torch's, which labctl knows by name."""


class CountingEngine:
    """An engine that only counts: token i of an answer is i. Its options say where it breaks or is slow.

    `fail_in` names a method, `fail_with` an error of ERRORS; "generate" breaks only where `fail_at` new tokens are
    asked, and all of it only as long as the file `while_there` exists.
    """

    OPTIONS: ClassVar[dict[str, type]] = dict.fromkeys(
        ("fail_in", "fail_with", "fail_at", "while_there", "slow_s", "watch", "text", "sets"), str
    )
    ERRORS: ClassVar[dict[str, Callable[[], BaseException]]] = {
        "refusal": lambda: Refusal("does-not-fit", "the model needs 90 GB", "take more GPUs"),
        "memory": lambda: OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words."),
        "value": lambda: ValueError("a shape is wrong\nin layer 3"),
        "exit": lambda: SystemExit(5),
    }
    PARALLEL: ClassVar[tuple[str, ...]] = ("layers",)
    DEFAULTS: ClassVar[dict[str, object]] = {}
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {}
    calls: ClassVar[list[str]] = []
    seen: ClassVar[list[str]] = []
    made: ClassVar[int] = 0

    def __init__(self, asked: JobSpec, cache: Path) -> None:
        self.options = asked.engine_options
        CountingEngine.made += 1
        self.begins_with = os.environ.get("SET_BY_THE_ENGINE")
        self._may_fail("init")

    def load(self) -> tuple[float, float]:
        self._told("load")
        if "sets" in self.options:  # as vLLM and Triton have variables set for their own processes
            os.environ["SET_BY_THE_ENGINE"] = self.options["sets"]
        return 2.0, 1.0

    def encode(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        return [tuple(map(len, prompt.split())) for prompt in prompts]

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.options.get("text", " ".join(map(str, token_ids))))

    def generate(self, requests: Sequence[Request], how: Generation) -> Callable[[], list[Generated]]:
        max_new_tokens = requests[0].max_new_tokens
        self._told("generate", max_new_tokens)
        time.sleep(float(self.options.get("slow_s", 0)))
        handed_at = time.perf_counter()
        for token in range(max_new_tokens) if how.on_token else ():
            how.on_token(token)
        times = [time.perf_counter() for _ in range(max_new_tokens)]
        return lambda: [
            Generated(list(range(max_new_tokens)), times, "length", len(r.token_ids), handed_at) for r in requests
        ]

    def log_probabilities(self, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float] | None:
        return None

    def read_bytes_per_step(self, context_tokens: float, requests: int) -> float | None:
        return None

    def gpus_at_once(self, requests: int) -> int:
        return 1

    def reset(self) -> None:
        self._told("reset")

    def counts(self) -> EngineCounts:
        return EngineCounts()

    def memory(self) -> list[DeviceMemory]:
        return [DeviceMemory("cuda:0", "Counting GPU", peak_allocated_bytes=2**30)]

    def fingerprint(self) -> EngineFingerprint:
        self._told("fingerprint")
        seen = {"engines_of_the_process": CountingEngine.made, "begins_with": self.begins_with}
        return EngineFingerprint({"counting": "1.0"}, extra=seen)

    def close(self) -> None:
        self._told("close")

    def _told(self, what: str, tokens: int | None = None) -> None:
        CountingEngine.calls.append(what if tokens is None else f"{what} {tokens}")
        if "watch" in self.options:
            CountingEngine.seen.append(read_json(Path(self.options["watch"]))["phase"])
        self._may_fail(what, tokens)

    def _may_fail(self, where: str, tokens: int | None = None) -> None:
        options = self.options
        here = options.get("fail_in") == where and str(options.get("fail_at", tokens)) == str(tokens)
        if here and Path(options.get("while_there", "/")).exists():
            raise self.ERRORS[options.get("fail_with", "value")]()


@pytest.fixture(autouse=True)
def a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node where the engine "counting" is known, no Slurm is around, and no other local job waits for its turn."""
    for variable in list(os.environ):
        if variable.startswith(("SLURM", "SUBMITIT")):
            monkeypatch.delenv(variable)
    monkeypatch.setitem(engines.ENGINES, "counting", f"{__name__}:CountingEngine")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(CountingEngine, "calls", [])
    monkeypatch.setattr(CountingEngine, "seen", [])


def a_run(run_id: str, tokens: int, **values: Any) -> RunSpec:
    values = {"batch_size": 1, "repeats": 2, "warmup": 1, **values}
    return RunSpec(run_id, {"max_new_tokens": tokens}, "p", tokens, **values)


def a_job(tmp_path: Path, *, name: str = "0", runs: Sequence[RunSpec] = (), options: Any = None, **values: Any) -> Path:
    """Write the spec of a job of two runs, "short" of 3 tokens and "long" of 5; its path."""
    asked: dict[str, Any] = {
        "job_id": f"b-1.{name}",
        "partition": "dgxh",
        "executor": "slurm",
        "backend": "counting",
        "model": ModelRef("m"),
        "dtype": "float32",
        "device": "cpu",
        "gpus": 2,
        "runs": list(runs) or [a_run("short", 3), a_run("long", 5)],
        "prompt_sets": {"p": PROMPTS},
        "engine_options": options or {},
    }
    path = tmp_path / ".labctl" / "arrays" / "b-1" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, JobSpec(**{**asked, **values}).to_json())
    return path


def records(path: Path, run_id: str) -> list[RunResult]:
    """The records of a run, oldest first."""
    found = [RunResult.from_json(read_json(file)) for file in JobFolder(path).records(run_id)]
    return sorted(found, key=lambda record: record.started_at)


def the_record(path: Path, run_id: str) -> RunResult:
    (record,) = records(path, run_id)
    return record


def attempts(path: Path) -> list[Attempt]:
    return [Attempt.from_json(read_json(file)) for file in sorted(JobFolder(path).attempts.glob("[!.]*.json"))]


def heartbeat(path: Path) -> Heartbeat:
    return Heartbeat.from_json(read_json(JobFolder(path).heartbeat))


# ---------------------------------------------------------------- a job that goes well


def test_every_run_of_a_job_leaves_one_record(tmp_path: Path) -> None:
    path = a_job(tmp_path)
    assert run_job(path) == EXIT_ALL_RUNS_DONE
    short = the_record(path, "short")
    assert (short.status, short.failure, short.definition) == ("done", None, {"max_new_tokens": 3})
    assert (short.load_s, short.init_s) == (2.0, 1.0)
    assert [repeat.repeat for repeat in short.repeats] == [0, 1]
    assert [sample.token_ids for sample in short.repeats[0].samples] == [[0, 1, 2]] * 2
    assert [sample.prompt_tokens for sample in short.repeats[0].samples] == [3, 2]
    assert output_tokens(short.repeats[0]) == 6
    assert short.started_at <= short.ended_at
    assert output_tokens(the_record(path, "long").repeats[0]) == 10


def test_the_engine_is_loaded_once_for_all_runs_and_closed_at_the_end(tmp_path: Path) -> None:
    run_job(a_job(tmp_path))
    assert CountingEngine.calls.count("load") == 1
    assert CountingEngine.calls[0] == "load"
    assert CountingEngine.calls[-1] == "close"
    generated = [call for call in CountingEngine.calls if call.startswith("generate")]
    assert generated == ["generate 3"] * 3 + ["generate 5"] * 3  # 1 warm-up and 2 repeats


def test_a_record_says_where_and_with_what_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")
    monkeypatch.setenv("SLURMD_NODENAME", "dgxh-1")
    path = a_job(tmp_path)
    run_job(path)
    record = the_record(path, "short")
    assert record.attempt == attempts(path)[0]
    assert (record.attempt.node, record.attempt.slurm_partition) == ("dgxh-1", "gpu")
    assert record.fingerprint["packages"] == {"counting": "1.0"}
    assert record.fingerprint["node"] == "dgxh-1"
    assert record.fingerprint["slurm_partition"] == "gpu"
    assert record.fingerprint["python"] == ".".join(map(str, sys.version_info[:3]))


def test_telemetry_covers_the_phases_of_each_run_and_the_load_with_the_first(tmp_path: Path) -> None:
    path = a_job(tmp_path, options={"slow_s": "0.3"})
    run_job(path)
    short, long = the_record(path, "short"), the_record(path, "long")
    assert short.telemetry
    assert long.telemetry
    assert [phase.name for phase in short.telemetry.phases] == ["loading", "warm-up", "measuring", "scoring"]
    assert [phase.name for phase in long.telemetry.phases] == ["warm-up", "measuring", "scoring"]
    for record in (short, long):
        starts = [phase.start_s for phase in record.telemetry.phases]
        assert starts == sorted(starts)
        first, second = record.repeats
        assert starts[-3] <= first.started_s <= second.started_s - first.wall_s + 0.001
        for repeat in record.repeats:  # a sample at both ends at least, and one each 0.25 s
            inside = [at for at in record.telemetry.times_s if -0.1 < at - repeat.started_s < repeat.wall_s + 0.1]
            assert len(inside) >= 3
        assert all(rss > 0 for rss in record.telemetry.rss_bytes)
        assert len(record.telemetry.cpus_used) == len(record.telemetry.times_s)


def test_repeats_until_an_interval_end_within_the_runs_share_of_the_time_limit(tmp_path: Path) -> None:
    """Real time: passes of 50 ms and more cannot be equal to 0.01%, so the limit of the job ends each run."""
    runs = [a_run("short", 3, until=0.0001), a_run("long", 5, until=0.0001)]
    path = a_job(tmp_path, runs=runs, executor="local", time_limit_s=8, options={"slow_s": "0.05"})
    started = time.monotonic()
    assert run_job(path) == EXIT_ALL_RUNS_DONE
    assert 4.0 < time.monotonic() - started < 8.0
    for run_id in ("short", "long"):
        record = the_record(path, run_id)
        assert record.until
        assert (record.until.target, record.until.stopped_by) == (0.0001, "time")
        assert 5 < len(record.repeats) < 100


def test_an_engine_load_scores_a_text_once_for_all_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Sequence[int], Sequence[int]]] = []

    def log_probabilities(self: CountingEngine, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        asked.append((prompt, token_ids))
        return [-0.5] * len(token_ids)

    text = SimpleNamespace(longest=64, token_ids=lambda text: list(map(len, text.split())))
    monkeypatch.setattr(CountingEngine, "log_probabilities", log_probabilities)
    monkeypatch.setattr(CountingEngine, "text", text, raising=False)
    score = ScoredText("words", "0a", 8, 4)
    runs = [a_run("short", 3, score=score), a_run("long", 5, score=score), a_run("without", 7)]
    path = a_job(tmp_path, runs=runs, texts={"0a": ["a bc def", "one"]})
    assert run_job(path) == EXIT_ALL_RUNS_DONE
    scored = [ids for ids in asked if ids == ([1], [2, 3])]
    assert len(scored) == 1
    for run_id in ("short", "long"):
        assert the_record(path, run_id).scores == TextScores([1.0, 0.0], [2, 0])
    assert the_record(path, "without").scores is None


def test_windows_beyond_the_models_positions_fail_the_job_before_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CountingEngine, "text", SimpleNamespace(longest=8), raising=False)
    path = a_job(tmp_path, runs=[a_run("short", 3, score=ScoredText("words", "0a", 8, 4))], texts={"0a": ["a b"]})
    assert run_job(path) == EXIT_A_RUN_FAILED
    failure = the_record(path, "short").failure
    assert failure is not None
    assert failure.kind == "score-window"
    assert not [call for call in CountingEngine.calls if call.startswith("generate")]


def test_no_sampler_is_left_where_the_engine_fails_or_ends(tmp_path: Path) -> None:
    run_job(a_job(tmp_path, options={"fail_in": "load"}))
    run_job(a_job(tmp_path, name="1"))
    time.sleep(0.3)
    assert not [thread for thread in threading.enumerate() if thread.name == "telemetry"]


def test_a_person_reads_throughput_and_peak_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_job(a_job(tmp_path, options={"text": "ein Flöckchen"}))
    said = capsys.readouterr().out
    assert "Throughput: " in said
    assert "cuda:0 peak allocated: 1.00 GiB (Counting GPU)" in said
    assert "ein Flöckchen" in said


# ---------------------------------------------------------------- attempts


def test_the_attempt_is_on_disk_before_the_engine_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_job(tmp_path)
    on_disk: list[int] = []
    load = CountingEngine.load

    def looks_first(self: CountingEngine) -> tuple[float, float]:
        on_disk.append(len(attempts(path)))
        return load(self)

    monkeypatch.setattr(CountingEngine, "load", looks_first)
    run_job(path)
    assert on_disk == [1]


@pytest.mark.parametrize(
    "fault", [{"backend": "none"}, {"options": {"fail_in": "init"}}, {"device": "cuda", "gpus": 99}]
)
def test_the_attempt_is_written_before_anything_can_fail(tmp_path: Path, fault: dict[str, Any]) -> None:
    path = a_job(tmp_path, **fault)
    assert run_job(path) == EXIT_A_RUN_FAILED
    (attempt,) = attempts(path)
    assert attempt.job_id == "b-1.0"
    assert attempt.pid == os.getpid()


@pytest.mark.parametrize(
    ("environment", "slurm_id", "execution"),
    [
        ({"SLURM_JOB_ID": "77"}, "77", "77"),
        ({"SLURM_JOB_ID": "78", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "0"}, "77_0", "77_0"),
        ({"SUBMITIT_LOCAL_JOB_ID": "4711"}, None, "4711"),
        ({}, None, f"pid{os.getpid()}"),
    ],
    ids=["job", "array", "local", "by hand"],
)
def test_an_attempt_knows_its_slurm_id_as_people_write_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    slurm_id: str | None,
    execution: str,
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    path = a_job(tmp_path)
    run_job(path)
    (attempt,) = attempts(path)
    assert attempt.slurm_job_id == slurm_id
    assert attempt.execution.partition("-")[0] == execution
    assert attempt.attempt_id.startswith("b-1.0.")
    assert JobFolder(path).record("short", attempt.attempt_id).exists()


# ---------------------------------------------------------------- the heartbeat


def test_the_heartbeat_goes_through_the_phases_and_ends(tmp_path: Path) -> None:
    path = a_job(tmp_path, runs=[a_run("short", 3, repeats=1)])
    spec = read_json(path)
    write_json(path, {**spec, "engine_options": {"watch": str(JobFolder(path).heartbeat)}})
    run_job(path)
    phases = [phase for n, phase in enumerate(CountingEngine.seen) if n == 0 or phase != CountingEngine.seen[n - 1]]
    assert phases[:3] == ["loading", "warm-up", "measuring"]
    last = heartbeat(path)
    assert (last.phase, last.done, last.total) == ("ended", 1, 1)
    assert last.attempt_id == attempts(path)[0].attempt_id
    assert last.pid == os.getpid()


def test_the_heartbeat_counts_finished_runs_and_not_failed_ones(tmp_path: Path) -> None:
    path = a_job(tmp_path, options={"fail_in": "generate", "fail_at": "3"})
    run_job(path)
    last = heartbeat(path)
    assert (last.done, last.total, last.run_id) == (1, 2, "long")


def test_the_heart_beats_while_the_engine_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "HEARTBEAT_EVERY_S", 0.02)
    path = a_job(tmp_path, runs=[a_run("short", 3, repeats=1, warmup=0)])
    beats: list[str] = []

    def busy(self: CountingEngine, requests: Sequence[Request], how: Generation) -> list[Generated]:
        for _ in range(3):
            before = heartbeat(path).at
            deadline = time.monotonic() + 5
            while (now := heartbeat(path).at) == before and time.monotonic() < deadline:
                time.sleep(0.005)
            beats.append(now)
        return [Generated([0], [time.perf_counter()], "stop", len(r.token_ids)) for r in requests]

    monkeypatch.setattr(CountingEngine, "generate", busy)
    run_job(path)
    assert len(set(beats)) == len(beats) >= 3


def test_a_heartbeat_that_cannot_be_written_does_not_end_the_measurement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault injection: a file lies where the folder of heartbeats would be."""
    path = a_job(tmp_path)
    (path.parent / "heartbeats").write_text("in the way", encoding="utf-8")
    assert run_job(path) == EXIT_ALL_RUNS_DONE
    assert the_record(path, "long").status == "done"
    assert "cannot write heartbeat" in capsys.readouterr().err


# ---------------------------------------------------------------- started again


def test_a_finished_run_is_skipped_when_the_job_is_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    trouble = tmp_path / "trouble"
    trouble.touch()
    path = a_job(tmp_path, options={"fail_in": "generate", "fail_at": "5", "while_there": str(trouble)})
    assert run_job(path) == EXIT_A_RUN_FAILED
    trouble.unlink()
    time.sleep(1.05)  # an attempt's id has the second in it, as a requeue has many
    CountingEngine.calls.clear()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run_job(path) == EXIT_ALL_RUNS_DONE
    assert {call for call in CountingEngine.calls if call.startswith("generate")} == {"generate 5"}
    assert the_record(path, "short").attempt.restarts == 0
    assert [(record.status, record.attempt.restarts) for record in records(path, "long")] == [
        ("failed", 0),
        ("done", 1),
    ]


def test_a_job_whose_runs_are_all_finished_does_not_load_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    path = a_job(tmp_path)
    run_job(path)
    CountingEngine.calls.clear()
    capsys.readouterr()
    assert run_job(path) == EXIT_ALL_RUNS_DONE
    assert CountingEngine.calls == []
    assert "no runs left: all" in capsys.readouterr().out
    assert heartbeat(path).phase == "ended"
    assert len(records(path, "short")) == 1


def test_a_script_that_is_submitted_a_second_time_measures_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = a_job(tmp_path)
    for slurm_id in ("77", "78"):
        monkeypatch.setenv("SLURM_JOB_ID", slurm_id)
        assert run_job(path) == EXIT_ALL_RUNS_DONE
    assert {record.attempt.execution for record in records(path, "short")} == {"77", "78"}


def test_a_job_that_is_started_by_hand_a_second_time_measures_again(tmp_path: Path) -> None:
    """The process id is the same here as it is in a container, where the worker is always process 1."""
    path = a_job(tmp_path)
    run_job(path)
    CountingEngine.calls.clear()
    run_job(path)
    assert "load" in CountingEngine.calls


def test_a_run_that_another_job_has_finished_is_measured_here_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    one, other = a_job(tmp_path), a_job(tmp_path, name="1")
    run_job(one)
    run_job(other)
    assert {record.attempt.job_id for record in records(one, "short")} == {"b-1.0", "b-1.1"}


def edited(**changes: Any) -> Callable[[Path], None]:
    return lambda path: write_json(path, {**read_json(path), **changes})


def without(name: str) -> Callable[[Path], None]:
    return lambda path: write_json(path, {key: value for key, value in read_json(path).items() if key != name})


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "empty": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(b"\xff\x00\xfe"),
    "zeroes": lambda path: path.write_bytes(bytes(512)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "without an attempt": without("attempt"),
    "without a status": without("status"),
    "an attempt without its execution": edited(attempt={"job_id": "b-1.0"}),
    "an attempt that is a text": edited(attempt="b-1.0"),
    "a list": lambda path: path.write_text("[]", encoding="utf-8"),
    "null": lambda path: path.write_text("null", encoding="utf-8"),
}


def measured_again(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    path = a_job(tmp_path)
    run_job(path)
    (file,) = JobFolder(path).records("short")
    damage(file)
    moved = file.with_name("earlier.json")
    file.rename(moved)  # the new attempt may have the same second in its id
    CountingEngine.calls.clear()
    assert run_job(path) == EXIT_ALL_RUNS_DONE
    assert {call for call in CountingEngine.calls if call.startswith("generate")} == {"generate 3"}
    assert RunResult.from_json(read_json(file.with_name(f"{attempts(path)[-1].attempt_id}.json"))).status == "done"


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_earlier_record_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    measured_again(tmp_path, damage)


def test_an_earlier_record_whose_attempt_is_null_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    measured_again(tmp_path, edited(attempt=None))


# ---------------------------------------------------------------- what goes wrong


def test_a_run_that_raises_is_recorded_as_failed_and_the_next_is_still_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = a_job(tmp_path, options={"fail_in": "generate", "fail_at": "3"})
    assert run_job(path) == EXIT_A_RUN_FAILED
    record = the_record(path, "short")
    assert record.status == "failed"
    assert record.repeats == []
    assert record.failure is not None
    assert (record.failure.kind, record.failure.message) == ("ValueError", "a shape is wrong")
    assert "in layer 3" in record.failure.traceback
    assert record.failure.remedy
    assert the_record(path, "long").status == "done"
    assert CountingEngine.calls[-1] == "close"
    assert "ValueError: a shape is wrong" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["init", "load"])
def test_an_engine_that_does_not_load_leaves_a_failed_record_for_each_run(tmp_path: Path, where: str) -> None:
    path = a_job(tmp_path, options={"fail_in": where})
    assert run_job(path) == EXIT_A_RUN_FAILED
    for run_id in ("short", "long"):
        record = the_record(path, run_id)
        assert record.status == "failed"
        assert record.failure is not None
        assert record.failure.kind == "ValueError"
    assert heartbeat(path).phase == "ended"


def test_a_refusal_is_kept_as_its_kind_its_message_and_its_remedy(tmp_path: Path) -> None:
    path = a_job(tmp_path, options={"fail_in": "load", "fail_with": "refusal"})
    assert run_job(path) == EXIT_A_RUN_FAILED
    failure = the_record(path, "long").failure
    assert failure is not None
    assert failure.to_json() == {
        "kind": "does-not-fit",
        "message": "the model needs 90 GB",
        "remedy": "take more GPUs",
        "traceback": "",
    }


def test_an_error_called_out_of_memory_is_known_by_its_name(tmp_path: Path) -> None:
    path = a_job(tmp_path, options={"fail_in": "generate", "fail_at": "5", "fail_with": "memory"})
    assert run_job(path) == EXIT_A_RUN_FAILED
    failure = the_record(path, "long").failure
    assert failure is not None
    assert failure.kind == "gpu-out-of-memory"
    assert failure.message == "CUDA out of memory. Tried to allocate 2 GiB."
    assert "smaller batch" in failure.remedy
    assert "OutOfMemoryError" in failure.traceback


def test_an_error_without_words_is_told_by_its_type() -> None:
    failure = failure_of(RuntimeError())
    assert (failure.kind, failure.message) == ("RuntimeError", "RuntimeError")


def test_an_unknown_backend_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    path = a_job(tmp_path, backend="tensorrt")
    assert run_job(path) == EXIT_A_RUN_FAILED
    failure = the_record(path, "short").failure
    assert failure is not None
    assert failure.kind == "unknown-backend"
    assert "counting" in failure.remedy
    assert "hf" in failure.remedy


def test_a_node_with_too_few_gpus_leaves_a_failed_record_before_the_engine_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = a_job(tmp_path, device="cuda")
    assert run_job(path) == EXIT_A_RUN_FAILED
    failure = the_record(path, "short").failure
    assert failure is not None
    assert failure.kind == "fewer-gpus"
    assert CountingEngine.calls == []


def test_an_end_that_is_no_error_leaves_no_record_and_closes_the_engine(tmp_path: Path) -> None:
    """submitit ends a job that is requeued with SystemExit: the run will be measured yet."""
    path = a_job(tmp_path, options={"fail_in": "generate", "fail_at": "5", "fail_with": "exit"})
    with pytest.raises(SystemExit):
        run_job(path)
    assert the_record(path, "short").status == "done"
    assert records(path, "long") == []
    assert CountingEngine.calls[-1] == "close"
    assert heartbeat(path).phase == "ended"


def test_a_run_whose_prompts_are_missing_is_recorded_as_failed_and_the_next_is_still_measured(tmp_path: Path) -> None:
    lost = a_run("lost", 3)
    lost.prompt_set = "not there"
    path = a_job(tmp_path, runs=[lost, a_run("long", 5)])
    assert run_job(path) == EXIT_A_RUN_FAILED
    assert the_record(path, "lost").status == "failed"
    assert the_record(path, "long").status == "done"


def test_a_fingerprint_that_raises_leaves_a_failed_record_for_each_run(tmp_path: Path) -> None:
    path = a_job(tmp_path, options={"fail_in": "fingerprint"})
    assert run_job(path) == EXIT_A_RUN_FAILED
    assert the_record(path, "short").status == "failed"
    assert the_record(path, "long").status == "failed"


def test_a_log_that_cannot_hold_an_answer_does_not_end_the_job(tmp_path: Path) -> None:
    """The log's encoding is ASCII, as on a node with an old locale."""
    path = a_job(tmp_path, options={"text": "ein Flöckchen"})
    done = in_a_process(path, PYTHONIOENCODING="ascii")
    _, said = done.communicate(timeout=30)
    assert the_record(path, "short").status == "done"
    assert records(path, "long"), said.splitlines()[-1]
    assert done.returncode == EXIT_ALL_RUNS_DONE


# ---------------------------------------------------------------- whose run it is


def test_a_record_of_another_job_is_not_this_jobs_whatever_its_time(tmp_path: Path) -> None:
    """The clock of the login node is ten minutes behind: what was measured before the job was submitted looks newer than it."""
    other = a_job(tmp_path, name="1")
    assert run_job(other) == EXIT_ALL_RUNS_DONE
    path = a_job(tmp_path)
    behind = datetime.now(UTC) - timedelta(minutes=10)
    write_json(path.parent / "intent.json", {"at": behind.isoformat(timespec="milliseconds").replace("+00:00", "Z")})
    assert run_job(path) == EXIT_ALL_RUNS_DONE
    for run_id in ("short", "long"):
        assert [record.attempt.job_id for record in records(path, run_id)] == ["b-1.1", "b-1.0"]


def give(path: Path, *run_ids: str, job_id: str = "b-1.0", to: str = "b-2.0") -> None:
    runs = {run_id: {"job": to, "state": "unknown"} for run_id in run_ids}
    write_json(JobFolder(path).moved, {job_id: runs, "b-1.7": {"long": {"job": "b-3.0", "state": "failed"}}})


def test_a_job_that_comes_back_leaves_the_runs_that_were_given_to_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = a_job(tmp_path)
    give(path, "short")
    assert run_job(path) == EXIT_A_RUN_FAILED
    assert records(path, "short") == []
    assert the_record(path, "long").status == "done"
    assert "run short skipped: labctl moved it to job b-2.0" in capsys.readouterr().out


def test_a_run_that_is_given_away_while_another_is_measured_is_left(tmp_path: Path) -> None:
    path = a_job(tmp_path, options={"slow_s": "0.3"})
    process = in_a_process(path)
    wait_until(lambda: phase_of(path) == "measuring")
    give(path, "long")
    process.communicate(timeout=30)
    assert process.returncode == EXIT_A_RUN_FAILED
    assert the_record(path, "short").status == "done"
    assert records(path, "long") == []


def test_a_job_that_lost_its_turn_says_so_and_does_not_look_completed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = a_job(tmp_path)
    give(path, "short", "long")
    assert run_job(path) == EXIT_A_RUN_FAILED
    assert CountingEngine.calls == []
    said = capsys.readouterr().out
    assert "no runs left: labctl moved them to other jobs" in said
    assert "no runs left: all" not in said


@pytest.mark.parametrize("damage", ["", "[]", '{"b-1.0": {"short": "b-2.0"}}', '{"b-1.0": []}'])
def test_what_cannot_be_read_gives_no_run_away(tmp_path: Path, damage: str) -> None:
    path = a_job(tmp_path)
    JobFolder(path).moved.write_text(damage, encoding="utf-8")
    assert run_job(path) == EXIT_ALL_RUNS_DONE


def test_a_record_that_was_written_when_the_job_was_told_to_end_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal is injected: it comes when the record is in its place and the folder is being forced to disk."""
    path = a_job(tmp_path)
    write = kept_records.write_json

    def told_to_end_after(file: Path, document: Any, **how: Any) -> None:
        is_new = not file.exists()
        write(file, document, **how)
        if file.parent.name == "short" and is_new:
            raise job.Stopped("told to end")

    monkeypatch.setattr(kept_records, "write_json", told_to_end_after)
    assert run_job(path) == EXIT_A_RUN_FAILED
    assert the_record(path, "short").status == "done"
    failure = the_record(path, "long").failure
    assert failure is not None
    assert failure.kind == "cancelled"


# ---------------------------------------------------------------- the end of a Slurm job's time

# Engines that load for ever.
RUN_WITH_A_SLOW_LOAD = """
import time
import tests.test_job
tests.test_job.CountingEngine.load = lambda self: time.sleep(60)
"""
NEAR, FAR = "RunTime=00:03:00 TimeLimit=00:03:00", "RunTime=00:00:01 TimeLimit=1-00:00:00"


class SlurmJob:
    """A worker in a process of its own. scontrol is a fake: it says what Slurm 22.05 says of the job, and notes what it is
    asked."""

    def __init__(self, tmp_path: Path, path: Path, said: str, code: str = "") -> None:
        self.path = path
        self.calls = tmp_path / "calls"
        self.calls.touch()
        scontrol = tmp_path / "bin" / "scontrol"
        scontrol.parent.mkdir()
        scontrol.write_text(f'#!/bin/sh\necho "$*" >> {self.calls}\necho "{said}"\n', encoding="utf-8")
        scontrol.chmod(0o755)
        slurm = {"SLURM_JOB_ID": "77", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
        self.process = in_a_process(path, code + RUN_WITH_THE_COUNTING_ENGINE, **slurm)

    def ends(self) -> str:
        """What it wrote to its error stream."""
        _, errors = self.process.communicate(timeout=40)
        assert self.process.returncode == EXIT_A_RUN_FAILED, errors
        return errors

    def was_handed_back(self) -> bool:
        return "requeue 77" in self.calls.read_text(encoding="utf-8").splitlines()

    def kinds(self, run_id: str) -> list[str]:
        """The status of each of its records, or the kind of its failure."""
        return [record.failure.kind if record.failure else record.status for record in records(self.path, run_id)]


@pytest.mark.parametrize("requeue", [0, 1])
def test_a_time_limit_while_the_engine_loads_is_called_so(tmp_path: Path, requeue: int) -> None:
    one = SlurmJob(tmp_path, a_job(tmp_path), f"Requeue={requeue} Restarts=0 {NEAR}", RUN_WITH_A_SLOW_LOAD)
    wait_until(lambda: phase_of(one.path) == "loading")
    one.process.send_signal(signal.SIGUSR2)
    time.sleep(0.5)
    assert one.process.poll() is None  # it goes on
    one.process.send_signal(signal.SIGTERM)
    errors = one.ends()
    assert one.kinds("short") == one.kinds("long") == ["time-limit"]
    assert ("has not finished a run" if requeue else "does not requeue this job") in errors
    assert not one.was_handed_back()


@pytest.mark.parametrize("requeue", [0, 1])
def test_a_time_limit_in_the_first_run_is_called_so_where_none_was_finished(tmp_path: Path, requeue: int) -> None:
    path = a_job(tmp_path, options={"slow_s": "30"})
    one = SlurmJob(tmp_path, path, f"Requeue={requeue} Restarts=0 {NEAR}")
    wait_until(lambda: phase_of(path) == "warm-up")
    one.process.send_signal(signal.SIGUSR2)
    time.sleep(0.5)
    one.process.send_signal(signal.SIGTERM)
    one.ends()
    assert one.kinds("short") == one.kinds("long") == ["time-limit"]
    assert not one.was_handed_back()


def test_a_job_near_its_limit_goes_back_as_soon_as_it_has_finished_a_run(tmp_path: Path) -> None:
    path = a_job(tmp_path, options={"slow_s": "0.5"})
    one = SlurmJob(tmp_path, path, f"Requeue=1 Restarts=0 {NEAR}")
    wait_until(lambda: phase_of(path) == "warm-up")
    one.process.send_signal(signal.SIGUSR2)
    one.ends()
    assert (one.kinds("short"), one.kinds("long")) == (["done"], [])
    assert one.was_handed_back()
    assert heartbeat(path).phase == "requeued"


@pytest.mark.parametrize("requeue", [0, 1])
def test_a_time_limit_after_a_finished_run_fails_the_rest_only_without_requeue(tmp_path: Path, requeue: int) -> None:
    path = a_job(tmp_path, options={"slow_s": "0.5"})
    one = SlurmJob(tmp_path, path, f"Requeue={requeue} Restarts=0 {NEAR}")
    wait_until(lambda: len(records(path, "short")) == 1)
    one.process.send_signal(signal.SIGUSR2)
    if not requeue:
        time.sleep(0.2)
        one.process.send_signal(signal.SIGTERM)
    one.ends()
    assert one.kinds("short") == ["done"]
    assert one.kinds("long") == ([] if requeue else ["time-limit"])
    assert one.was_handed_back() == bool(requeue)


def test_a_job_that_is_to_make_room_long_before_its_limit_goes_back_at_once(tmp_path: Path) -> None:
    path = a_job(tmp_path, options={"slow_s": "30"})
    one = SlurmJob(tmp_path, path, f"Requeue=1 Restarts=0 {FAR}")
    wait_until(lambda: phase_of(path) == "warm-up")
    one.process.send_signal(signal.SIGUSR2)
    one.ends()
    assert (one.kinds("short"), one.was_handed_back()) == ([], True)


def test_a_job_whose_scontrol_is_ended_by_the_requeue_that_it_asked_for_leaves_no_failure(tmp_path: Path) -> None:
    path = a_job(tmp_path, options={"slow_s": "30"})
    done = tmp_path / "requeued"
    killed = f'$([ "$1" != requeue ] || {{ touch {done}; kill $$; }})'
    one = SlurmJob(tmp_path, path, f"{killed}Requeue=1 Restarts=$([ -e {done} ] && echo 1 || echo 0) {FAR}")
    wait_until(lambda: phase_of(path) == "warm-up")
    one.process.send_signal(signal.SIGUSR2)
    one.ends()
    assert (one.kinds("short"), one.was_handed_back()) == ([], True)
    assert heartbeat(path).phase == "requeued"


def test_a_job_that_a_person_cancels_after_slurms_warning_is_cancelled(tmp_path: Path) -> None:
    path = a_job(tmp_path, options={"slow_s": "30"})
    one = SlurmJob(tmp_path, path, "Requeue=0 Restarts=0 RunTime=00:01:30 TimeLimit=00:03:00")
    wait_until(lambda: phase_of(path) == "warm-up")
    one.process.send_signal(signal.SIGUSR2)
    time.sleep(0.5)
    one.process.send_signal(signal.SIGTERM)
    one.ends()
    assert one.kinds("short") == ["cancelled"]


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_that_arrives_several_times_counts_once(tmp_path: Path, number: int) -> None:
    """Slurm may signal all processes of a job, and a container's runtime then passes on its own signal."""
    path = a_job(tmp_path, options={"slow_s": "30"})
    one = SlurmJob(tmp_path, path, f"Requeue=1 Restarts=0 {FAR}$(sleep 1)")
    wait_until(lambda: phase_of(path) == "warm-up")
    for _ in range(3):
        one.process.send_signal(number)
        time.sleep(0.3)
    one.ends()
    requeued = number == signal.SIGUSR2
    assert one.was_handed_back() == requeued
    assert one.kinds("short") == one.kinds("long") == ([] if requeued else ["cancelled"])


# ---------------------------------------------------------------- records that cannot be written


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        (errno.ENOSPC, 73, "disk-full"), (errno.EDQUOT, 73, "disk-full"), (errno.EROFS, 74, "read-only"),
        (errno.ESTALE, 75, "file-system-away"), (errno.EACCES, 77, "permission-denied"),
    ],
)  # fmt: skip
def test_a_job_that_cannot_begin_on_its_file_system_says_so_by_its_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, status: int, kind: str
) -> None:
    """The fault is injected: the attempt cannot be written, and neither can the log."""

    def fails(*arguments: Any, **named: Any) -> None:
        raise OSError(code, os.strerror(code))

    path = a_job(tmp_path)
    monkeypatch.setattr(job, "write_json", fails)
    monkeypatch.setattr(job.traceback, "print_exc", fails)
    with pytest.raises(SystemExit) as ended:
        RunJob()(str(path))
    assert ended.value.code == status
    assert diagnose.of_end(JobState("77", "FAILED", exit_code=f"{status}:0")).kind == kind


def test_a_results_folder_that_is_away_for_a_while_loses_nothing(tmp_path: Path) -> None:
    path = a_job(tmp_path, options={"slow_s": "0.4"})
    results, away = JobFolder(path).results, tmp_path / "away"
    process = in_a_process(path)
    wait_until(lambda: phase_of(path) == "warm-up")
    results.rename(away)
    wait_until(lambda: bool(list(tmp_path.glob("labctl-records-*/long/*.json"))))
    assert not results.exists()
    away.rename(results)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == EXIT_ALL_RUNS_DONE, errors
    assert the_record(path, "short").status == the_record(path, "long").status == "done"
    assert f"kept in {tmp_path}/labctl-records-" in errors
    assert not list(tmp_path.glob("labctl-records-*"))


def test_a_workspace_that_is_moved_while_a_job_runs_is_followed(tmp_path: Path) -> None:
    path = a_job(tmp_path / "lab", options={"slow_s": "0.4"})
    process = in_a_process(path)
    wait_until(lambda: phase_of(path) == "warm-up")
    (tmp_path / "lab").rename(tmp_path / "moved")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == EXIT_ALL_RUNS_DONE, errors
    moved = tmp_path / "moved" / path.relative_to(tmp_path / "lab")
    assert the_record(moved, "short").status == the_record(moved, "long").status == "done"
    assert heartbeat(moved).phase == "ended"
    assert not (tmp_path / "lab").exists()


def test_a_workspace_that_has_gone_is_not_made_again_and_its_records_are_kept(tmp_path: Path) -> None:
    path = a_job(tmp_path / "lab", options={"slow_s": "0.4"})
    process = in_a_process(
        path, "from labctl_workers import job\njob.TRY_AT_THE_END_S = 0.5\n" + RUN_WITH_THE_COUNTING_ENGINE
    )
    wait_until(lambda: phase_of(path) == "warm-up")
    shutil.rmtree(tmp_path / "lab")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == EXIT_A_RUN_FAILED, errors
    assert not (tmp_path / "lab").exists()
    assert {file.parent.name for file in tmp_path.glob("labctl-records-*/*/*.json")} == {"short", "long"}
    assert "cannot write 2 records" in errors


def test_a_full_disk_at_one_record_ends_neither_the_job_nor_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault injection: the file system of the results has no space for the first three writes."""
    path = a_job(tmp_path)
    write, failed = kept_records.write_json, []

    def full(file: Path, document: Any, **how: Any) -> None:
        if file.is_relative_to(JobFolder(path).results) and len(failed) < 3:
            failed.append(file)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        write(file, document, **how)

    monkeypatch.setattr(kept_records, "write_json", full)
    monkeypatch.setattr(kept_records, "RETRY_EVERY_S", 0.01)
    assert run_job(path) == EXIT_ALL_RUNS_DONE
    assert len(failed) == 3
    assert the_record(path, "short").status == the_record(path, "long").status == "done"
    assert "No space left on device" in capsys.readouterr().err


# ---------------------------------------------------------------- several engine loads


def all_loads(path: Path) -> int:
    """The job as its processes would run it, one after another, in this one."""
    while (status := run_job(path)) == job.LOADS_LEFT:
        pass
    return status


def loads_of(path: Path, run_id: str) -> list[int]:
    return [record.attempt.load for record in records(path, run_id) if record.status == "done"]


def test_each_run_is_measured_in_each_engine_load_of_its_job(tmp_path: Path) -> None:
    path = a_job(tmp_path, loads=3)
    assert all_loads(path) == EXIT_ALL_RUNS_DONE
    assert [call for call in CountingEngine.calls if call in ("load", "close")] == ["load", "close"] * 3
    for run_id in ("short", "long"):
        assert loads_of(path, run_id) == [1, 2, 3]
        assert len({record.attempt.attempt_id for record in records(path, run_id)}) == 3
    (attempt,) = attempts(path)  # it is one start of one job
    assert records(path, "short")[0].attempt == attempt
    last = heartbeat(path)
    assert (last.phase, last.done, last.total) == ("ended", 6, 6)


def test_between_two_loads_a_job_has_not_ended(tmp_path: Path) -> None:
    path = a_job(tmp_path, loads=2)
    assert run_job(path) == job.LOADS_LEFT
    last = heartbeat(path)
    assert (last.phase, last.done, last.total) == ("between engine loads", 2, 4)


def test_a_run_that_fails_in_one_load_is_not_tried_in_the_next(tmp_path: Path) -> None:
    path = a_job(tmp_path, loads=3, options={"fail_in": "generate", "fail_at": "5"})
    assert all_loads(path) == EXIT_A_RUN_FAILED
    assert loads_of(path, "short") == [1, 2, 3]
    assert the_record(path, "long").status == "failed"


def test_an_engine_that_does_not_load_fails_the_runs_once(tmp_path: Path) -> None:
    path = a_job(tmp_path, loads=3, options={"fail_in": "load"})
    assert all_loads(path) == EXIT_A_RUN_FAILED
    assert [the_record(path, run_id).status for run_id in ("short", "long")] == ["failed", "failed"]


def test_a_requeued_job_goes_on_in_the_load_that_it_was_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    trouble = tmp_path / "trouble"
    path = a_job(tmp_path, loads=2, options={"fail_in": "generate", "fail_at": "5", "while_there": str(trouble)})
    assert run_job(path) == job.LOADS_LEFT
    trouble.touch()
    assert run_job(path) == EXIT_A_RUN_FAILED
    assert (loads_of(path, "short"), loads_of(path, "long")) == ([1, 2], [1])
    trouble.unlink()
    time.sleep(1.05)  # an attempt's id has the second in it, as a requeue has many
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    CountingEngine.calls.clear()
    assert all_loads(path) == EXIT_ALL_RUNS_DONE
    assert {call for call in CountingEngine.calls if call.startswith("generate")} == {"generate 5"}
    assert (loads_of(path, "short"), loads_of(path, "long")) == ([1, 2], [1, 2])


def test_each_engine_load_has_a_process_of_its_own_with_the_same_id(tmp_path: Path) -> None:
    path = a_job(tmp_path, loads=2, options={"sets": "by load 1"})
    process = in_a_process(path, RUN_ALL_LOADS)
    out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_ALL_RUNS_DONE, err
    assert loads_of(path, "short") == [1, 2]
    assert {record.attempt.pid for record in records(path, "short")} == {process.pid}
    # What a process counts begins anew: the engine of each load is the first of its process.
    assert [record.fingerprint["engines_of_the_process"] for record in records(path, "short")] == [1, 1]
    assert [record.fingerprint["begins_with"] for record in records(path, "short")] == [None, None]
    assert out.index("engine load 1 of 2") < out.index("engine load 2 of 2")


def test_a_workspace_that_is_moved_between_two_engine_loads_is_followed(tmp_path: Path) -> None:
    path = a_job(tmp_path / "lab", loads=2, runs=[a_run("short", 3)], options={"slow_s": "0.4"})
    code = JobFolder(path).data / "code" / "1f"
    shutil.copytree(ROOT / "workers", code)  # the worker's own code is moved with it
    process = in_a_process(path, RUN_ALL_LOADS, PYTHONPATH=os.pathsep.join([str(code), str(ROOT)]))
    wait_until(lambda: phase_of(path) == "warm-up")
    (tmp_path / "lab").rename(tmp_path / "moved")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_ALL_RUNS_DONE, errors
    assert loads_of(tmp_path / "moved" / path.relative_to(tmp_path / "lab"), "short") == [1, 2]
    assert not (tmp_path / "lab").exists()


def test_a_time_limit_between_two_loads_is_the_failure_of_the_next_load(tmp_path: Path) -> None:
    path = a_job(tmp_path, loads=2, runs=[a_run("short", 3, repeats=1, warmup=0)], executor="local", time_limit_s=60)
    process = in_a_process(path, AT_ITS_LIMIT_BETWEEN_LOADS)
    process.communicate(timeout=60)
    assert process.returncode == EXIT_A_RUN_FAILED
    found = {record.attempt.load: record.failure and record.failure.kind for record in records(path, "short")}
    assert found == {1: None, 2: "time-limit"}


def test_the_time_limit_of_a_local_job_is_that_of_all_its_loads(tmp_path: Path) -> None:
    runs = [a_run("short", 3, repeats=1, warmup=0)]
    path = a_job(tmp_path, loads=9, runs=runs, executor="local", time_limit_s=3, options={"slow_s": "0.8"})
    process = in_a_process(path, RUN_ALL_LOADS)
    process.communicate(timeout=60)
    assert process.returncode == EXIT_A_RUN_FAILED
    failures = [record.failure.kind for record in records(path, "short") if record.failure]
    assert failures == ["time-limit"]
    assert 1 <= len(loads_of(path, "short")) <= 4


def test_a_job_that_is_told_to_end_between_two_loads_leaves_a_record(tmp_path: Path) -> None:
    path = a_job(tmp_path, loads=2, runs=[a_run("short", 3)])
    process = in_a_process(path, TOLD_TO_END_BETWEEN_LOADS)
    process.communicate(timeout=60)
    assert process.returncode == EXIT_A_RUN_FAILED
    assert loads_of(path, "short") == [1]
    assert [record.failure.kind for record in records(path, "short") if record.failure] == ["cancelled"]


# ---------------------------------------------------------------- local jobs

RUN_WITH_THE_COUNTING_ENGINE = """
import sys
from pathlib import Path
from labctl_workers import engines, job
engines.ENGINES["counting"] = "tests.test_job:CountingEngine"
sys.exit(job.run_job(Path(sys.argv[1])))
"""
# submitit lets SIGTERM pass by, as here.
UNDER_SUBMITIT = f"import signal\nsignal.signal(signal.SIGTERM, lambda *_: None)\n{RUN_WITH_THE_COUNTING_ENGINE}"
RUN_ALL_LOADS = RUN_WITH_THE_COUNTING_ENGINE.replace("job.run_job(Path(sys.argv[1]))", "job.main(sys.argv[1:])")
# Fault injection: the time limit is reached while the engine closes.
AT_ITS_LIMIT_BETWEEN_LOADS = RUN_ALL_LOADS.replace(
    "sys.exit",
    """
import os, signal
from tests.test_job import CountingEngine
close = CountingEngine.close
def close_at_the_limit(engine):
    close(engine)
    os.kill(os.getpid(), signal.SIGALRM)
CountingEngine.close = close_at_the_limit
sys.exit""",
)
# Fault injection: the process is told to end when it is about to begin again.
TOLD_TO_END_BETWEEN_LOADS = RUN_ALL_LOADS.replace(
    "sys.exit",
    """
import os, signal
execute = os.execve
def told_to_end(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    execute(*arguments)
os.execve = told_to_end
sys.exit""",
)


def in_a_process(path: Path, code: str = RUN_WITH_THE_COUNTING_ENGINE, **environment: str) -> subprocess.Popen[str]:
    """The job in a process of its own, which knows the engine that only counts."""
    found = os.pathsep.join([str(ROOT), str(ROOT / "workers"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "PYTHONPATH": found, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(true: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def phase_of(path: Path) -> str:
    return heartbeat(path).phase if JobFolder(path).heartbeat.exists() else ""


def test_two_local_jobs_run_one_after_another_and_waiting_costs_no_time_limit(tmp_path: Path) -> None:
    one_run = [a_run("short", 3, repeats=1, warmup=0)]
    first = a_job(tmp_path, runs=one_run, executor="local", options={"slow_s": "6"})
    second = a_job(tmp_path, name="1", runs=one_run, executor="local", time_limit_s=5)
    one = in_a_process(first)
    wait_until(lambda: phase_of(first) == "measuring")
    other = in_a_process(second)
    wait_until(lambda: phase_of(second) == "waiting for another local job")
    assert one.wait(timeout=30) == EXIT_ALL_RUNS_DONE, one.communicate()
    assert other.wait(timeout=30) == EXIT_ALL_RUNS_DONE, other.communicate()
    for process in (one, other):
        process.communicate()
    earlier, later = records(first, "short")
    assert earlier.attempt.job_id == "b-1.0"
    assert earlier.ended_at <= later.started_at
    assert later.attempt.started_at < earlier.ended_at  # it was there, and waited


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_local_job_that_is_told_to_end_while_it_waits_ends_at_once_as_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    import fcntl

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    path = a_job(tmp_path, executor="local", time_limit_s=1)
    with (tmp_path / f"labctl-local-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = in_a_process(path, UNDER_SUBMITIT)
        wait_until(lambda: phase_of(path) == "waiting for another local job")
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == EXIT_A_RUN_FAILED, errors
    assert heartbeat(path).phase == "ended"
    for run_id in ("short", "long"):
        failure = the_record(path, run_id).failure
        assert failure is not None
        assert failure.kind == "cancelled"


def test_jobs_of_slurm_do_not_wait_for_a_local_one(tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / f"labctl-local-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_job(a_job(tmp_path)) == EXIT_ALL_RUNS_DONE


def test_a_lock_of_local_jobs_that_is_a_link_empties_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    other = tmp_path / "other"
    other.write_text("somebody's", encoding="utf-8")
    (tmp_path / f"labctl-local-{os.getuid()}.lock").symlink_to(other)
    assert run_job(a_job(tmp_path, executor="local")) == EXIT_ALL_RUNS_DONE
    assert "local jobs may run at the same time" in capfd.readouterr().err
    assert other.read_text(encoding="utf-8") == "somebody's"


def slow_local_job(tmp_path: Path, **values: Any) -> Path:
    return a_job(tmp_path, executor="local", time_limit_s=1, options={"slow_s": "30"}, **values)


def test_a_local_job_ends_when_its_time_is_up_and_says_so(tmp_path: Path) -> None:
    path = slow_local_job(tmp_path)
    started = time.monotonic()
    assert run_job(path) == EXIT_A_RUN_FAILED
    assert time.monotonic() - started < 10
    record = the_record(path, "short")
    assert record.status == "failed"
    assert record.failure is not None
    assert record.failure.kind == "time-limit"
    assert "1 s" in record.failure.message
    assert "time" in record.failure.remedy
    assert CountingEngine.calls[-1] == "close"
    assert heartbeat(path).phase == "ended"


def test_every_run_of_a_local_job_whose_time_is_up_has_a_record_that_says_so(tmp_path: Path) -> None:
    path = slow_local_job(tmp_path)
    assert run_job(path) == EXIT_A_RUN_FAILED
    for run_id in ("short", "long"):
        failure = the_record(path, run_id).failure
        assert failure is not None
        assert failure.kind == "time-limit"


def test_time_that_is_up_while_the_engine_loads_fails_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CountingEngine, "load", lambda self: time.sleep(30))
    path = slow_local_job(tmp_path)
    assert run_job(path) == EXIT_A_RUN_FAILED
    for run_id in ("short", "long"):
        failure = the_record(path, run_id).failure
        assert failure is not None
        assert failure.kind == "time-limit"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["kill", "Ctrl-C"])
def test_a_local_job_that_is_told_to_end_writes_down_that_it_was(tmp_path: Path, number: int) -> None:
    path = a_job(tmp_path, executor="local", options={"slow_s": "30"})
    process = in_a_process(path)
    wait_until(lambda: JobFolder(path).heartbeat.exists() and heartbeat(path).phase == "warm-up")
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == EXIT_A_RUN_FAILED
    for run_id in ("short", "long"):
        failure = the_record(path, run_id).failure
        assert failure is not None
        assert failure.kind == "cancelled"


@pytest.mark.parametrize("restarts", [0, 1], ids=["cancelled", "put back into the queue"])
def test_a_job_that_comes_back_leaves_no_failure_of_what_it_has_yet_to_do(tmp_path: Path, restarts: int) -> None:
    """scontrol is a fake: it says how often Slurm has started the job, as real Slurm does while it requeues one."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho JobState=COMPLETING Requeue=1 Restarts={restarts}\n", encoding="utf-8")
    scontrol.chmod(0o755)
    path = a_job(tmp_path, options={"slow_s": "0.5"})
    slurm = {"SLURM_JOB_ID": "77", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    process = in_a_process(path, **slurm)
    wait_until(lambda: len(records(path, "short")) == 1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == EXIT_A_RUN_FAILED
    assert the_record(path, "short").status == "done"
    if restarts:
        assert records(path, "long") == []
        assert heartbeat(path).phase == "requeued"
        again = in_a_process(path, **slurm, SLURM_RESTART_COUNT="1")
        again.communicate(timeout=30)
        assert again.returncode == EXIT_ALL_RUNS_DONE
        assert the_record(path, "long").attempt.restarts == 1
        assert len(records(path, "short")) == 1  # not measured again
    else:
        assert [record.failure.kind for record in records(path, "long") if record.failure] == ["cancelled"]


def test_a_job_that_is_started_again_and_again_without_finishing_a_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    path = a_job(tmp_path, options={"fail_in": "generate", "fail_at": "3", "fail_with": "exit"})
    for _ in range(job.STARTS_WITHOUT_A_RUN):
        with pytest.raises(SystemExit):  # as a node that takes the job with it, for labctl
            run_job(path)
        time.sleep(1.05)  # an attempt's name has the second in it
    assert run_job(path) == EXIT_A_RUN_FAILED
    failure = the_record(path, "short").failure
    assert failure is not None
    assert failure.kind == "requeued-too-often"
    assert f"{job.STARTS_WITHOUT_A_RUN + 1} times" in failure.message


def test_a_job_that_finishes_a_run_at_each_start_may_be_requeued_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "STARTS_WITHOUT_A_RUN", 1)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    runs = [a_run(f"run{tokens}", tokens) for tokens in (2, 3, 4)]
    for tokens in (3, 4):
        path = a_job(tmp_path, runs=runs, options={"fail_in": "generate", "fail_at": str(tokens), "fail_with": "exit"})
        with pytest.raises(SystemExit):
            run_job(path)
        time.sleep(1.05)
    assert run_job(a_job(tmp_path, runs=runs)) == EXIT_ALL_RUNS_DONE


def test_slurm_keeps_the_time_of_its_own_jobs(tmp_path: Path) -> None:
    path = a_job(tmp_path, runs=[a_run("short", 3, repeats=1, warmup=0)], time_limit_s=1, options={"slow_s": "0.6"})
    assert run_job(path) == EXIT_ALL_RUNS_DONE  # 1.2 s


def test_a_local_job_leaves_no_alarm_behind(tmp_path: Path) -> None:
    import signal

    before = signal.getsignal(signal.SIGALRM)
    run_job(a_job(tmp_path, executor="local"))
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.alarm(0) == 0


# ---------------------------------------------------------------- by hand


def by_hand(
    *arguments: str, python: str = sys.executable, flags: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """`python -m labctl_workers.job` with nothing but the worker package to import."""
    return subprocess.run(
        [python, *flags, "-m", "labctl_workers.job", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "workers"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("arguments", [(), ("one", "two"), ("--help",), ("-x",)])
def test_a_wrong_command_line_is_told_the_right_one(arguments: tuple[str, ...]) -> None:
    done = by_hand(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m labctl_workers.job ")
    assert done.stderr.endswith("JOBSPEC_PATH\n")


def test_the_worker_runs_by_hand_with_the_standard_library_alone(tmp_path: Path) -> None:
    path = a_job(tmp_path, backend="tensorrt")
    done = by_hand(str(path), flags=["-S"])  # no site-packages
    assert done.returncode == EXIT_A_RUN_FAILED, done.stderr
    assert "unknown-backend: unknown backend: 'tensorrt'" in done.stderr
    assert the_record(path, "long").status == "failed"


def test_a_path_that_never_appears_is_waited_for_and_then_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The waiting is injected: no second passes."""
    naps: list[float] = []
    monkeypatch.setattr(job, "time", SimpleNamespace(sleep=naps.append))
    assert main([str(tmp_path / "0.json")]) == 2
    assert sum(naps) == 10
    assert "0.json does not exist on" in capsys.readouterr().err


def test_a_path_that_appears_late_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The waiting is injected: the file appears in it, as on a slow shared file system."""
    path = a_job(tmp_path)
    hidden = path.rename(path.with_suffix(".hidden"))
    time_that_helps = SimpleNamespace(
        sleep=lambda seconds: hidden.rename(path), monotonic=time.monotonic, perf_counter=time.perf_counter
    )
    monkeypatch.setattr(job, "time", time_that_helps)
    assert main([str(path)]) == EXIT_ALL_RUNS_DONE


def test_the_text_is_typed_once_as_it_comes_where_a_person_asks_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = a_job(tmp_path, runs=[a_run("short", 3)])
    assert main(["--stream", str(path)]) == EXIT_ALL_RUNS_DONE
    said = capsys.readouterr().out
    assert said.count("0 1 2") == 1
    assert said.index("0 1 2") < said.index("Throughput: ")


# ---------------------------------------------------------------- what submitit calls


def test_a_job_that_is_requeued_is_submitted_again_with_its_path() -> None:
    from submitit.helpers import DelayedSubmission

    again = RunJob().checkpoint("/lab/.labctl/arrays/b-1/0.json")
    assert isinstance(again, DelayedSubmission)
    assert isinstance(again.function, RunJob)
    assert again.args == ("/lab/.labctl/arrays/b-1/0.json",)


def test_standard_output_is_left_to_answers_and_figures(tmp_path: Path) -> None:
    path = a_job(tmp_path, options={"text": "CUDA out of memory"})
    code = (
        "import os\nimport tests.test_job as t\nfrom labctl_workers import engines, job\n"
        "engines.ENGINES['counting'] = 'tests.test_job:CountingEngine'\n"
        "load = t.CountingEngine.load\n"
        "def loud(self):\n    print('engine says', flush=True)\n    os.system('echo process says')\n    return load(self)\n"
        f"t.CountingEngine.load = loud\njob.RunJob()({str(path)!r})\nprint('afterwards')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("CUDA out of memory") == done.stdout.count("Throughput") == 2
    assert done.stdout.endswith("afterwards\n")
    assert "says" not in done.stdout
    assert "CUDA out of memory" not in done.stderr
    assert "engine says" in done.stderr
    assert "process says" in done.stderr


def test_a_job_with_a_failed_run_does_not_look_completed_to_slurm(tmp_path: Path) -> None:
    path = a_job(tmp_path, options={"fail_in": "generate", "fail_at": "3"})
    with pytest.raises(SystemExit) as ended:
        RunJob()(str(path))
    assert ended.value.code == EXIT_A_RUN_FAILED
    assert the_record(path, "long").status == "done"


def test_a_job_whose_runs_are_done_returns_zero(tmp_path: Path) -> None:
    assert RunJob()(str(a_job(tmp_path))) == 0


def test_what_is_pickled_is_a_reference_to_the_worker_and_a_text() -> None:
    import cloudpickle

    pickled = cloudpickle.dumps((RunJob(), "path"))
    assert b"labctl_workers.job" in pickled
    assert len(pickled) < 200
    assert isinstance(pickle.loads(pickled)[0], RunJob)


# ---------------------------------------------------------------- a job that is suspended


def test_a_pass_in_which_the_job_was_stopped_is_measured_again(tmp_path: Path) -> None:
    """A real worker process, stopped and continued as `scontrol suspend` and `resume` do."""
    path = a_job(tmp_path, runs=[a_run("short", 3, repeats=2, warmup=0)], options={"slow_s": "3"})
    worker = in_a_process(path)
    wait_until(lambda: phase_of(path) == "measuring")
    time.sleep(1)  # the phase is told just before the pass begins
    worker.send_signal(signal.SIGSTOP)
    time.sleep(4)
    worker.send_signal(signal.SIGCONT)
    _, errors = worker.communicate(timeout=60)
    assert worker.returncode == EXIT_ALL_RUNS_DONE, errors
    assert "job suspended in repeat 0: measuring it again" in errors
    record = the_record(path, "short")
    assert sum(repeat.discarded for repeat in record.repeats) == 1
    assert [repeat.repeat for repeat in record.repeats] == [0, 1]
    assert all(3 <= repeat.wall_s < 6 for repeat in record.repeats)  # the pause would make it 7


# ---------------------------------------------------------------- an old Python


def other_python(name: str) -> str | None:
    """A Python of this name that starts: on PATH, or one of pyenv's."""
    import shutil

    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    version = name.removeprefix("python")
    try:
        found = sorted(pyenv.glob(f"versions/{version}.*/bin/{name}"))
    except OSError:  # another user's
        found = []
    for candidate in [shutil.which(name), *found]:
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            return str(candidate)
    return None


IMPORT_EVERY_MODULE = """
import importlib, json, pkgutil, labctl_workers
names = [module.name for module in pkgutil.walk_packages(labctl_workers.__path__, "labctl_workers.")]
for name in names:
    importlib.import_module(name)
print(json.dumps(names))
"""


def test_the_worker_runs_in_the_oldest_python_that_a_partition_may_have(tmp_path: Path) -> None:
    python = other_python("python3.10")
    if python is None:
        pytest.skip("there is no python3.10 on this machine")
    done = subprocess.run(
        [python, "-S", "-c", IMPORT_EVERY_MODULE],
        env={**os.environ, "PYTHONPATH": str(ROOT / "workers"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {"labctl_workers.job", "labctl_workers.record", "labctl_workers.engines.hf"} <= set(json.loads(done.stdout))
    path = a_job(tmp_path, backend="tensorrt")
    ran = by_hand(str(path), python=python, flags=["-S"])
    assert ran.returncode == EXIT_A_RUN_FAILED, ran.stderr
    record = the_record(path, "short")
    assert record.attempt.python.startswith("3.10.")
    assert record.failure is not None
    assert record.failure.kind == "unknown-backend"


def test_a_sampled_run_records_the_seed_of_each_repeat(tmp_path: Path) -> None:
    path = a_job(tmp_path, runs=[a_run("warm", 3, sampling=Sampling(temperature=0.7, seed=7))])
    run_job(path)
    assert [repeat.seed for repeat in the_record(path, "warm").repeats] == [draw_seed(7, n, "tokens") for n in (0, 1)]


# ---------------------------------------------------------------- what may change a figure


def test_a_record_has_what_was_around_the_worker_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("MY_SWITCH", "on")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7f")
    monkeypatch.setenv("APPTAINER_CONTAINER", "/images/torch.sif")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    script = ScriptSettings(env={"MY_SWITCH": "on"}, setup=["true"], cpus_per_task=3, mem="4G", template="dgxh")
    path = a_job(tmp_path, script=script)
    run_job(path)
    told = the_record(path, "short").fingerprint
    names = {"OMP_NUM_THREADS", "MY_SWITCH", "HF_TOKEN", "CUDA_VISIBLE_DEVICES"}
    recorded = {name: value for name, value in told["environment"].items() if name in names}
    assert recorded == {"OMP_NUM_THREADS": "3", "MY_SWITCH": "on"}
    assert ScriptSettings.from_json(told["script"]) == script
    assert told["container"] == "/images/torch.sif"
    assert told["cpus"]["available"] == len(os.sched_getaffinity(0))
    assert told["prompt_tokens"] == sha256_of_json([(3, 3, 5), (4, 4)])
    assert "hf_secret" not in json.dumps(told)


def test_without_a_script_an_allocation_is_not_told_to_have_its_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    path = a_job(tmp_path, script=ScriptSettings(setup=["true"], cpus_per_task=3, mem="4G", template="dgxh"))
    run_job(path)
    assert the_record(path, "short").fingerprint["script"] == ScriptSettings(setup=["true"]).to_json()


def test_what_an_engine_sets_for_itself_is_not_taken_for_the_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's environment on a CPU has OMP_NUM_THREADS, by labctl: two backends would be unlike by labctl's own doing."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(
        CountingEngine, "load", lambda self: (monkeypatch.setenv("OMP_NUM_THREADS", "2"), (2.0, 1.0))[1]
    )
    path = a_job(tmp_path)
    run_job(path)
    assert "OMP_NUM_THREADS" not in the_record(path, "short").fingerprint["environment"]


def a_model(tmp_path: Path) -> ModelRef:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}", encoding="utf-8")
        os.utime(folder / name, (1e9, 1e9))
    return ModelRef("model", path=str(folder), fingerprint="0" * 64, stamp=stamp(checkpoint_files(folder)))


def test_a_model_that_is_as_it_was_is_measured(tmp_path: Path) -> None:
    path = a_job(tmp_path, model=a_model(tmp_path))
    (tmp_path / "model" / "README.md").write_text("documents may change", encoding="utf-8")
    assert run_job(path) == EXIT_ALL_RUNS_DONE


def weights_edited(folder: Path) -> None:
    (folder / "model.safetensors").write_text("[]", encoding="utf-8")  # of the same size


def grown(folder: Path) -> None:
    (folder / "model-2.safetensors").write_text("{}", encoding="utf-8")


def gone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def broken(folder: Path) -> None:
    gone(folder)
    (folder / "model.safetensors").symlink_to("nowhere")


@pytest.mark.parametrize("change", [weights_edited, grown, gone, broken])
@pytest.mark.parametrize("when", ["in the queue", "while it loads"])
def test_a_model_that_was_changed_since_it_was_submitted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], when: str
) -> None:
    path = a_job(tmp_path, model=a_model(tmp_path))
    if when == "in the queue":
        change(tmp_path / "model")
    else:
        monkeypatch.setattr(CountingEngine, "load", lambda self: (change(tmp_path / "model"), (2.0, 1.0))[1])
    assert run_job(path) == EXIT_A_RUN_FAILED
    failure = the_record(path, "short").failure
    assert failure is not None
    assert failure.kind == "model-changed"
    assert ("load" in CountingEngine.calls) is False


def test_an_adapter_that_was_changed_since_it_was_submitted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "of").mkdir()
    path = a_job(tmp_path, model=a_model(tmp_path), adapter=a_model(tmp_path / "of"))
    weights_edited(tmp_path / "of" / "model")
    assert run_job(path) == EXIT_A_RUN_FAILED
    failure = the_record(path, "short").failure
    assert failure is not None
    assert (failure.kind, str(tmp_path / "of" / "model") in failure.message) == ("model-changed", True)


def test_a_branch_of_the_hub_is_recorded_by_the_commit_that_is_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the hub could not be asked, a run's id has the branch alone: it may be another model tomorrow."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    reference = tmp_path / "models--org--name" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text("a" * 40, encoding="utf-8")
    assert job.model_commit(ModelRef("org/name", revision="main")) == "a" * 40
    assert job.model_commit(ModelRef("org/name", revision="gone")) is None
    assert job.model_commit(ModelRef("org/name", revision="b" * 40)) == "b" * 40
    assert job.model_commit(ModelRef("name", revision="main", path="/m", fingerprint="0" * 64)) is None


def test_a_stop_right_after_a_record_was_written_leaves_it_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault injection: SIGTERM comes between the writing of the record and the worker's own note of it."""
    write = kept_records.Records.write

    def written_then_stopped(kept: kept_records.Records, result: RunResult) -> None:
        write(kept, result)
        if result.status == "done":
            raise job.Stopped("told to end")

    monkeypatch.setattr(kept_records.Records, "write", written_then_stopped)
    path = a_job(tmp_path)
    assert run_job(path) == EXIT_A_RUN_FAILED
    assert the_record(path, "short").status == "done"
    assert the_record(path, "long").status == "failed"
