"""What the tests share: an empty workspace, the command line, a checkpoint, programs named like Slurm's, a worker's files."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from labctl_orchestrator.cli import run as run_labctl
from labctl_orchestrator.request.plan import run_definition
from labctl_orchestrator.store.collect import Collected, collect
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking import processes
from labctl_slurm.errors import LabctlError
from labctl_workers.record import (
    Attempt,
    DeviceMemory,
    Failure,
    Heartbeat,
    JobFolder,
    JobSpec,
    ModelRef,
    Repeat,
    RunResult,
    RunSpec,
    Sample,
    read_json,
    run_id_of,
    sha256_of_json,
    write_json,
)

NOT_OF_THE_TESTS = (
    "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "HF_TOKEN",
)  # fmt: skip


# nohup, and a script's &, ignore these signals, and every program that a test starts would ignore them too. A handler that does
# nothing keeps the tests running; a started program begins with the default.
for ignored in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, lambda *_: None)

# The models of the tests are tiny: a second thread would only wait for the first.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A machine that others use too may take its time.
hypothesis.settings.register_profile("labctl", deadline=None)
hypothesis.settings.load_profile("labctl")


# Files that one process runs, as they share a cluster or an engine. They begin first, in this order: they take longest, and the
# other files fill the processors beside them.
TOGETHER = (
    ("slurm/test_vllm_jobs.py",),
    ("slurm/test_served_jobs.py",),
    ("slurm/test_exercises.py",),
    ("slurm/test_sweeps.py",),
    ("slurm/test_diagnosis.py",),
    ("test_vllm.py",),
    ("slurm/test_site.py", "slurm/test_submission.py"),
    ("slurm/test_end_to_end.py",),
    ("slurm/test_outages.py", "slurm/test_cluster.py"),
    ("test_stages.py",),
    ("test_report_page.py",),
    ("test_hf.py", "test_score.py", "test_workloads.py"),  # they share the imports of torch and transformers
    ("test_job.py",),
    ("slurm/test_chaos.py",),  # its deadline is of real time: beside light tests, not beside engines
)
PLACES = {f"tests/{file}": place for place, files in enumerate(TOGETHER) for file in files}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: PLACES.get(file_of(item.nodeid), len(TOGETHER)))


def file_of(nodeid: str) -> str:
    return nodeid.split("::", maxsplit=1)[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What each process of pytest-xdist runs: whole files, and those above together."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = file_of(nodeid)
            return str(PLACES.get(file, file))

    config.option.loadscopereorder = False
    return Together(config, log)


def ago(seconds: float) -> str:
    """That long ago, as labctl writes times."""
    time = datetime.now(UTC) - timedelta(seconds=seconds)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content: two equal answers mean that nothing was written in between."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def environment_of_the_module() -> Iterator[None]:
    """What vLLM and torch set in this process when they are imported must not reach the jobs of later modules."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


# ---------------------------------------------------------------- an empty workspace


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """An empty folder to work in, with nothing of this machine around it: no settings, no hub, no Slurm on PATH."""
    for variable in [name for name in os.environ if name.startswith("LABCTL_")] + list(NOT_OF_THE_TESTS):
        monkeypatch.delenv(variable, raising=False)
    for variable, name in {
        "HOME": "home",
        "XDG_CONFIG_HOME": "config",
        "XDG_CACHE_HOME": "cache",
        "TMPDIR": "tmp",
        "HF_HOME": "hub",
    }.items():
        (tmp_path / name).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / name))
    (tmp_path / "programs").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The shipped partitions have GPUs that this Python's packages need not be built for: tests/test_preflight.py looks.
    monkeypatch.setenv("LABCTL_NO_PREFLIGHT", "1")
    monkeypatch.setattr(tempfile, "tempdir", None)
    here = Workspace(tmp_path / "work")
    here.root.mkdir()
    monkeypatch.chdir(here.root)
    return here


@pytest.fixture
def checkpoint(workspace: Workspace) -> Path:
    """A folder that looks like a checkpoint: a configuration and a safetensors file of one small tensor."""
    return write_checkpoint(workspace.root.parent / "models" / "tiny-llama")


def write_checkpoint(folder: Path, values: Sequence[float] = (1.0, 2.0)) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 2}), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    header = {"weight": {"dtype": "F32", "shape": [len(values)], "data_offsets": [0, 4 * len(values)]}}
    head = json.dumps(header).encode()
    data = struct.pack(f"<{len(values)}f", *values)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    return folder


# ---------------------------------------------------------------- the command line


@dataclass(frozen=True)
class Ran:
    """What one command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Labctl = Callable[..., Ran]


@pytest.fixture
def labctl(capsys: pytest.CaptureFixture[str]) -> Labctl:
    """Run a command line in this process."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = run_labctl([str(argument) for argument in arguments])
        spoken = capsys.readouterr()
        return Ran(code, spoken.out, spoken.err)

    return run


# ---------------------------------------------------------------- programs named like Slurm's


class Slurm:
    """Programs of Slurm's names on PATH that say what a test tells them to. Real Slurm is in tests/slurm."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def answers(self, program: str, output: str = "", *, status: int = 0, errors: str = "") -> None:
        says = f"printf %s {shlex.quote(output)}\nprintf %s {shlex.quote(errors)} >&2\nexit {status}\n"
        self._write(program, says)

    def accepts(self, first_id: int = 1000) -> None:
        """sbatch takes every script, and numbers them from `first_id`; squeue and sacct show nothing."""
        counter = shlex.quote(str(self.folder / "next"))
        (self.folder / "next").write_text(f"{first_id}\n", encoding="utf-8")
        trial = 'case "$*" in *--test-only*) exit 0;; esac\n'
        self._write(
            "sbatch", f'{trial}read n < {counter}\necho $((n + 1)) > {counter}\necho "Submitted batch job $n"\n'
        )
        for program in ("srun", "squeue", "sacct"):
            self.answers(program)

    def shows(self, queued: str = "", accounted: str = "") -> None:
        """What squeue and sacct print."""
        self.answers("squeue", queued)
        self.answers("sacct", accounted)

    def is_silent(self) -> None:
        """squeue and sacct fail, as they do when the controller is down."""
        for program in ("squeue", "sacct"):
            self.answers(program, status=1, errors=f"{program}: error: Unable to contact slurm controller")

    def _write(self, program: str, body: str) -> None:
        path = self.folder / program
        path.write_text(f"#!/bin/sh\n{body}", encoding="utf-8")
        path.chmod(0o755)


@pytest.fixture
def slurm(workspace: Workspace) -> Slurm:
    return Slurm(workspace.root.parent / "programs")


def squeue_line(slurm_id: str, state: str, name: str, *, reason: str = "None", node: str = "dgxh-1") -> str:
    return f"{slurm_id}|{state}|{node}|2026-01-01T10:00:00|2026-01-01T10:01:00|2026-01-01T11:00:00|{name}|{reason}\n"


def sacct_line(
    slurm_id: str,
    state: str,
    name: str,
    *,
    exit_code: str = "0:0",
    submitted: str = "2026-01-01T10:00:00",
    started: str = "2026-01-01T10:01:00",
    ended: str = "2026-01-01T11:00:00",
) -> str:
    return f"{slurm_id}|{state}|{exit_code}|{submitted}|{started}|{ended}|dgxh-1|{name}\n"


# ---------------------------------------------------------------- the files of a request, and of its workers


@dataclass(frozen=True)
class JobArray:
    """One submission, as it lies in the workspace."""

    array_id: str
    folder: Path
    executor: str
    jobs: list[JobSpec]

    @property
    def runs(self) -> list[RunSpec]:
        return [run for job in self.jobs for run in job.runs]

    def spec(self, task: int) -> Path:
        return self.folder / f"{task}.json"

    def task_of(self, attempt: Attempt) -> int:
        return [job.job_id for job in self.jobs].index(attempt.job_id)


class Records:
    """Writes what labctl submit and a worker write (see `Workspace`), without Slurm and without an engine."""

    def __init__(self, workspace: Workspace) -> None:
        workspace.root.mkdir(parents=True, exist_ok=True)
        self.workspace = workspace
        self.model = ModelRef("tiny-llama", path="/models/tiny-llama", fingerprint="0" * 64)

    # ------------------------------------------------------------ what labctl submit writes

    def jobs(
        self,
        *,
        partition: str = "dgxh",
        backend: str = "hf",
        model: ModelRef | None = None,
        dtypes: Sequence[str] = ("bfloat16",),
        lengths: Sequence[int] = (128,),
        prompt: str = "Explain tensor parallelism in 5 bullet points.",
        repeats: int = 3,
        change: Callable[[JobSpec, RunSpec], None] = lambda job, run: None,
    ) -> list[JobSpec]:
        """A job for each dtype, with a run for each length; `change` gives it further settings."""
        model = model or self.model
        local = partition == "local"
        jobs = []
        for dtype in dtypes:
            job = JobSpec(
                "", partition, "local" if local else "slurm", backend, model, dtype, "cuda", 2, [], {"p": [prompt]}
            )
            for length in lengths:
                run = RunSpec("", {}, "p", length, repeats=repeats)
                change(job, run)
                run.definition = run_definition(job, run)
                run.run_id = run_id_of(run.definition)
                job.runs.append(run)
            jobs.append(job)
        return jobs

    def prepare(self, **values: Any) -> JobArray:
        """A batch as `labctl render` leaves it: not submitted. `values` are those of `jobs`, or `planned` jobs of a partition."""
        jobs = values["planned"] if "planned" in values else self.jobs(**values)
        content = sha256_of_json([job.to_json() for job in jobs])[:8]
        number = 1
        while (folder := self.workspace.arrays / f"{content}-{number}").exists():
            number += 1
        batch = JobArray(
            folder.name,
            folder,
            jobs[0].executor,
            [replace(job, job_id=f"{folder.name}.{task}") for task, job in enumerate(jobs)],
        )
        self.workspace.create()
        for task, job in enumerate(batch.jobs):
            write_json(batch.spec(task), job.to_json())
        document = {
            "array_id": batch.array_id, "partition": jobs[0].partition, "executor": batch.executor,
            "job_name": f"labctl-{batch.array_id}", "tasks": len(jobs), "created_at": ago(0),
            "time_s": None if batch.executor == "local" else 3600, "gpus": jobs[0].gpus,
        }  # fmt: skip
        write_json(folder / "array.json", document)
        return batch

    def request(self, *, name: str | None = None, skipped: Sequence[str] = (), age_s: float = 0, **values: Any) -> str:
        """The request's own file alone; its id."""
        jobs = values["planned"] if "planned" in values else self.jobs(**values)
        self._requests += 1
        submission_id = f"20260101-000000-{self._requests:04x}"
        document = {
            "submission_id": submission_id, "name": name, "created_at": ago(age_s), "labctl_version": "0.1.0", "request": {},
            "runs": [run.run_id for job in jobs for run in job.runs], "skipped": list(skipped),
            "jobs": [job.to_json() for job in jobs],
        }  # fmt: skip
        self.workspace.create()
        write_json(self.workspace.submissions / f"{submission_id}.json", document)
        return submission_id

    _requests = 0

    def submit(self, slurm_id: str = "1000", *, name: str | None = None, **values: Any) -> JobArray:
        """A request and its one batch, accepted by Slurm (by this machine: `slurm_id` is a process id)."""
        submission_id = self.request(name=name, **values)
        batch = self.prepare(**values)
        self.intend(batch, submission_id)
        self.accept(batch, slurm_id)
        return batch

    def intend(self, batch: JobArray, submission_id: str = "", *, age_s: float = 0) -> None:
        """What is written before sbatch is called, by a labctl that has ended since: no process has its id."""
        intent = {"submission_id": submission_id, "at": ago(age_s), "host": socket.gethostname(), "pid": 2**22 + 1}
        write_json(batch.folder / "intent.json", intent)

    def accept(self, batch: JobArray, slurm_id: str, **more: Any) -> None:
        """What is written after sbatch, or the local executor, took the batch: the tasks of an array are ID_0, ID_1, ..."""
        ids = [slurm_id] if len(batch.jobs) == 1 else [f"{slurm_id}_{task}" for task in range(len(batch.jobs))]
        # A minute ago: long enough for Slurm to have shown it.
        document: dict[str, Any] = {"ids": ids, "at": ago(60), "host": socket.gethostname()}
        if batch.executor == "local":
            document["starts"] = [processes.start_of(int(pid)) for pid in ids]
        write_json(batch.folder / "submitted.json", {**document, **more})

    def refuse(
        self, batch: JobArray, message: str = "Slurm refused the job: no", remedy: str = "ask otherwise"
    ) -> None:
        write_json(batch.folder / "submitted.json", {"refused": message, "remedy": remedy, "at": ago(0)})

    # ------------------------------------------------------------ what a worker writes

    def attempt(
        self, batch: JobArray, task: int = 0, *, slurm_id: str | None = "1000", age_s: float = 60, restarts: int = 0
    ) -> Attempt:
        """The beginning of an execution of the batch's task."""
        job = batch.jobs[task]
        started_at = ago(age_s)
        stamp = started_at[:19].replace("-", "").replace(":", "")
        attempt = Attempt(
            attempt_id=f"{job.job_id}.{stamp}.{slurm_id or 'pid1'}",
            job_id=job.job_id,
            execution=slurm_id or "pid1",
            started_at=started_at,
            host=socket.gethostname(),
            node="dgxh-1",
            pid=1,
            slurm_job_id=slurm_id,
            slurm_partition=job.partition,
            restarts=restarts,
        )
        write_json(JobFolder(batch.spec(task)).attempts / f"{attempt.attempt_id}.json", attempt.to_json())
        return attempt

    def done(self, batch: JobArray, attempt: Attempt, run: RunSpec | None = None, **more: Any) -> Path:
        """The record of a measured run; its path."""
        run = run or batch.jobs[batch.task_of(attempt)].runs[0]
        values = {
            "load_s": 12.5,
            "init_s": 0.5,
            "warmup_s": 1.5,
            "repeats": [measured(repeat) for repeat in range(run.repeats)],
            "fingerprint": {
                "packages": {"torch": "2.9.0", "transformers": "5.0.0"},
                "effective_dtype": "bfloat16",
                "attention": "sdpa",
                "gpus": [{"name": "NVIDIA H100"}, {"name": "NVIDIA H100"}],
            },
        }
        return self._record(batch, attempt, run, "done", **{**values, **more})

    def failed(self, batch: JobArray, attempt: Attempt, run: RunSpec | None = None) -> Path:
        """The record of a run that failed; its path."""
        run = run or batch.jobs[batch.task_of(attempt)].runs[0]
        failure = Failure("gpu-out-of-memory", "CUDA out of memory", "take a smaller batch", "Traceback ...")
        return self._record(batch, attempt, run, "failed", failure=failure)

    def _record(self, batch: JobArray, attempt: Attempt, run: RunSpec, status: str, **more: Any) -> Path:
        times = {"started_at": attempt.started_at, "ended_at": ago(1)}
        result = RunResult(run.run_id, attempt, status, run.definition, **{**times, **more})
        path = JobFolder(batch.spec(0)).record(run.run_id, attempt.attempt_id)
        write_json(path, result.to_json())
        return path

    def heartbeat(
        self, batch: JobArray, attempt: Attempt, phase: str, *, run_id: str | None = None, done: int = 0
    ) -> None:
        task = batch.task_of(attempt)
        total = len(batch.jobs[task].runs)
        beat = Heartbeat(attempt.attempt_id, phase, done, total, ago(0), attempt.host, attempt.pid, run_id)
        write_json(JobFolder(batch.spec(task)).heartbeat, beat.to_json(), durable=False)

    def states(self, batch: JobArray, **columns: Any) -> None:
        """What labctl last knew of every job of the batch."""
        state = {"observed_at": ago(0), **columns}
        write_json(batch.folder / "states.json", {job.job_id: state for job in batch.jobs})

    # ------------------------------------------------------------ what labctl makes of it

    def collect(self) -> Collected:
        with closing(open_store(self.workspace)) as store:
            return collect(self.workspace, store)


def measured(number: int, *, tokens: int = 4, text: str = "a shard each") -> Repeat:
    """One measured pass of one request, a little slower each time."""
    step = 0.02 * (1 + number / 10)
    times = [0.1 + step * token for token in range(tokens)]
    sample = Sample(0, 0, 11, list(range(tokens)), times, "length", text)
    devices = [
        DeviceMemory(f"cuda:{gpu}", "NVIDIA H100", 2**30, 2 * 2**30 + number, 3 * 2**30, 4 * 2**30) for gpu in (0, 1)
    ]
    return Repeat(number, (times or [0])[-1] + 0.001, [sample], devices)


@pytest.fixture
def records(workspace: Workspace) -> Records:
    return Records(workspace)


def refused(action: Callable[[], object], kind: type[LabctlError] = LabctlError) -> LabctlError:
    """The one error that the action ends with: it says what is wrong and what to do about it."""
    with pytest.raises(kind) as caught:
        action()
    assert caught.value.message
    assert caught.value.remedy
    return caught.value


def edit_json(path: Path, **changes: Any) -> None:
    """Change some keys of a JSON file."""
    write_json(path, {**read_json(path), **changes})
