"""A job: check the node, load the engine, measure each run, write each record.

submitit starts it (the pickled callable is `RunJob`, with the path of the JobSpec), or a person does:
`python -m labctl_workers.job [--stream] PATH`; --stream prints each run's text while it is generated. When Slurm restarts the
job, it skips finished runs. Each engine load has its own process: see `restart_process`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import io
import json
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import stat
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from labctl_workers import children, hardware, measure, requeue, score, search, stdout, telemetry
from labctl_workers.checkpoint_files import checkpoint_files, stamp
from labctl_workers.engines import make_engine
from labctl_workers.engines.base import Engine
from labctl_workers.engines.served import ServedEngine
from labctl_workers.engines.text import check_window
from labctl_workers.environment import engine_variables
from labctl_workers.kept_records import Records
from labctl_workers.record import (
    EXIT_A_RUN_FAILED,
    EXIT_ALL_RUNS_DONE,
    EXIT_OF_ERRNO,
    Attempt,
    Failure,
    Heartbeat,
    JobFolder,
    JobSpec,
    ModelRef,
    Refusal,
    Repeat,
    RunResult,
    RunSpec,
    ScriptSettings,
    TaskAnswers,
    TextScores,
    json_form,
    read_json,
    sha256_of_json,
    utc_now,
    write_json,
)

HEARTBEAT_EVERY_S = 5.0
# The job's template requests USR2 90 s before the time limit; Slurm may send it a minute earlier.
LIMIT_IS_NEAR_S = 180.0
# This share of the time left is kept for scoring, records and the end of the engine, LIMIT_IS_NEAR_S at most.
KEPT_SHARE = 0.1
SLURM_ENDS_WITHIN_S = 5.0  # of the time limit, by this node's clock
# How long to try to write kept records at the end of the job, and before a requeue.
TRY_AT_THE_END_S = 600.0
TRY_BEFORE_A_REQUEUE_S = 20.0
# container.sh, Apptainer, Singularity and Slurm set these to the image.
CONTAINER_VARIABLES = ("LABCTL_CONTAINER", "APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", "SLURM_CONTAINER")
# Without a limit, Slurm would requeue a job that crashes its node again and again.
STARTS_WITHOUT_A_RUN = 5
NOT_NEEDED = "not-needed"  # the kind of a failure: see tracking.run_status
BETWEEN_LOADS = "between engine loads"
# `run_job` returns this instead of an exit status if engine loads are left: the process restarts itself.
LOADS_LEFT = -1
CONTINUED = "LABCTL_CONTINUED"  # the variable with a Continued, as JSON
INITIAL_ENVIRONMENT = dict(os.environ)
# Signals that end or requeue a job are blocked until the new process can handle them.
BLOCKED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class JobFingerprint:
    """What surrounds the engine and may explain a difference: node, GPUs in use, variables and script, without secrets."""

    python: str
    host: str
    node: str
    slurm_partition: str | None
    parallel: str
    gpus: list[hardware.Gpu]
    clocks: list[hardware.Clocks]
    driver: str | None
    cpus: hardware.Cpus
    environment: dict[str, str]
    script: ScriptSettings | None
    model_commit: str | None
    container: str | None


@dataclass
class Continued:
    """State for the process of the next engine load."""

    attempt_id: str = ""
    used_s: float = 0.0  # of the time limit
    limit_is_near: bool = False
    moved_from: str = ""  # the workspace
    moved_to: str = ""

    def moved(self, text: str) -> str:
        """The text with the new path of a moved workspace."""
        return text.replace(f"{self.moved_from}/", f"{self.moved_to}/") if self.moved_from else text


class RunJob:
    """The callable that submitit pickles by reference; its argument is the path of the JobSpec."""

    def __call__(self, path: str) -> int:
        with exit_by_errno(), stdout.reserve(), children.end_on_exit():
            status = run_job(Path(path))
        if status == LOADS_LEFT:
            restart_process()
        if status != EXIT_ALL_RUNS_DONE:
            # A job with a failed run must not be COMPLETED in Slurm; submitit does not catch SystemExit.
            raise SystemExit(status)
        return status

    def checkpoint(self, path: str) -> Any:
        """submitit calls this before it requeues the job: the same job, which skips finished runs."""
        from submitit.helpers import DelayedSubmission

        _requeued.set()
        return DelayedSubmission(self, path)


@contextmanager
def exit_by_errno() -> Iterator[None]:
    """End the process with an exit status for the error of a file operation: the log may be on the same full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in EXIT_OF_ERRNO:
            raise
        with contextlib.suppress(OSError):
            traceback.print_exc()
            sys.stderr.flush()
        raise SystemExit(EXIT_OF_ERRNO[error.errno]) from error


def run_job(path: Path, on_text: Callable[[str], None] | None = None) -> int:
    """Run the next engine load of the JobSpec at `path`; returns EXIT_ALL_RUNS_DONE, LOADS_LEFT, or EXIT_A_RUN_FAILED after
    writing the failure. `on_text` gets the text of each run's warm-up while it is generated.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a log in another encoding must not end the job
    continued = Continued(**json.loads(os.environ.pop(CONTINUED, "{}")))
    path = Path(continued.moved(str(path)))  # submitit's pickle has the old path
    folder = JobFolder(path)
    job = JobSpec.from_json(read_json(path))
    earlier = (attempt for attempt in _attempts(folder) if attempt.attempt_id == continued.attempt_id)
    attempt = next(earlier, None) or start_attempt(job, folder)
    records = Records(folder)
    worker = Worker(job, records, attempt, on_text, continued.used_s)
    worker.limit_is_near = continued.limit_is_near
    with contextlib.closing(records), worker.heartbeat(), handle_signals(worker), local_lock(job, worker) as has_lock:
        began = time.monotonic()
        if has_lock:
            start_timer(job, continued.used_s)
            status = worker.run()
        else:
            status = worker.fail_while_waiting()
        if not worker.finish_records():
            status = EXIT_A_RUN_FAILED
        records.follow()
    if status == LOADS_LEFT:
        used_s = continued.used_s + time.monotonic() - began
        before, now = str(folder.data.parent), str(records.folder.data.parent)
        left = Continued(attempt.attempt_id, used_s, worker.limit_is_near, before, now)
        os.environ[CONTINUED] = json.dumps(asdict(left))
    return status


def restart_process() -> NoReturn:
    """Replace this process with a new one of the same command, for the job's next engine load.

    Allocated memory, chosen kernels, compiled code and imported modules of this process would make the next load more similar
    to this one than the loads of two jobs are. The process id stays: Slurm and submitit see one job.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  a GPU that a library opened would keep its memory
        with contextlib.suppress(OSError):  # the descriptor of the listing is closed
            if int(name) > 2:
                os.set_inheritable(int(name), False)
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    for number in BLOCKED_SIGNALS:  # a thread of the engine may not block them: send them to this thread
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: signal.pthread_kill(threading.get_ident(), number))
    continued = Continued(**json.loads(os.environ[CONTINUED]))
    # Without the variables that the engine set; in a moved workspace, the code has moved too.
    environment = {name: continued.moved(value) for name, value in INITIAL_ENVIRONMENT.items()}
    executable, *arguments = (continued.moved(word) for word in (sys.executable, *sys.orig_argv[1:]))
    os.execve(executable, [executable, *arguments], {**environment, CONTINUED: os.environ[CONTINUED]})  # noqa: S606


def unblock_signals() -> None:
    """Deliver the signals that arrived during `restart_process`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*BLOCKED_SIGNALS, signal.SIGALRM))


def start_attempt(job: JobSpec, folder: JobFolder) -> Attempt:
    """Write the Attempt, before anything can fail."""
    slurm_id = slurm_job_id()
    started_at = utc_now()
    time_stamp = started_at[:19].replace("-", "").replace(":", "")
    # Without Slurm, the process id is not unique: in a container each worker is process 1.
    own = f"pid{os.getpid()}-{secrets.token_hex(3)}"
    attempt = Attempt(
        attempt_id=f"{job.job_id}.{time_stamp}.{slurm_id or own}",
        job_id=job.job_id,
        execution=slurm_id or os.environ.get("SUBMITIT_LOCAL_JOB_ID") or own,
        started_at=started_at,
        host=socket.gethostname(),
        node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        pid=os.getpid(),
        slurm_job_id=slurm_id,
        slurm_partition=os.environ.get("SLURM_JOB_PARTITION"),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        python=platform.python_version(),
    )
    write_json(folder.attempts / f"{attempt.attempt_id}.json", attempt.to_json())
    with contextlib.suppress(OSError):  # the records will be kept, and the log reports it
        folder.results.mkdir(exist_ok=True)
    return attempt


def slurm_job_id() -> str | None:
    """Slurm's id of this job: 1234, or 1234_5 for a task of an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


class Worker:
    """The state of one attempt; runs its engine load and writes its heartbeat."""

    def __init__(
        self,
        job: JobSpec,
        records: Records,
        attempt: Attempt,
        on_text: Callable[[str], None] | None = None,
        used_s: float = 0.0,
    ) -> None:
        self.job = job
        self.records = records
        self.attempt = attempt
        self.on_text = on_text
        self.phase = "starting"
        self.current: RunSpec | None = None
        records_so_far = _records_of(self.folder, job, attempt)
        done = [record for record in records_so_far if record.status == "done"]
        self.finished = {(record.run_id, record.attempt.load) for record in done}
        self.finished_in_this_start = sum(record.attempt.started_at == attempt.started_at for record in done)
        # A run that failed in an earlier load of this start would fail again; after a restart it may succeed.
        self.failed = {
            record.run_id
            for record in records_so_far
            if record.status == "failed" and record.attempt.started_at == attempt.started_at
        }
        self.moved: set[str] = set()  # runs that labctl moved to other jobs
        self.skipped: set[str] = set()  # runs that a search did not need
        self.meets: dict[str, bool] = {}  # of a search, by run id
        for record in done:
            self._judge(record.run_id, record.repeats)
        self.scores: dict[str, TextScores] = {}  # of the texts that this engine load has scored
        self.answers: dict[str, list[TaskAnswers]] = {}  # to the tasks that this engine load has answered
        self.sampler: telemetry.TelemetrySampler | None = None
        self.load = 1
        # Before an engine adds variables for its own processes.
        self.variables = engine_variables(os.environ, job.script.env if job.script else ())
        self._beat_lock = threading.Lock()
        self._ended = threading.Event()
        self.stop: Stopped | None = None  # the exception of the signal that ended the job
        self.limit_is_near = False
        self.terms = requeue.terms() if job.executor == "slurm" else requeue.Terms(may_be_requeued=False)
        left_s = job.time_limit_s - used_s if self.terms.left_s is None else self.terms.left_s
        self._limit_at = time.monotonic() + left_s

    @property
    def folder(self) -> JobFolder:
        """The job's files, also after the workspace was moved."""
        return self.records.folder

    # ------------------------------------------------------------ the job

    def run(self) -> int:
        """Run the next engine load; returns the exit code."""
        try:
            return self._run()
        except STOPS as error:  # while the engine closed
            self._end(self._next_load(), error, utc_now())
            return EXIT_A_RUN_FAILED

    def _run(self) -> int:
        pending = self._next_load()
        if not pending:
            why = "labctl moved them to other jobs" if self.moved else "all runs of this job have records"
            print(f"no runs left: {why}", flush=True)
            return EXIT_A_RUN_FAILED if self.failed | self.moved else EXIT_ALL_RUNS_DONE
        if self.job.loads > 1:
            stdout.print_line(f"engine load {self.load} of {self.job.loads}")
        started_at = utc_now()
        try:
            unblock_signals()
            self._check_starts()
            gpus = hardware.visible_gpus() if self.job.device == "cuda" else []
            hardware.check_gpus(self.job, gpus)
            self._check_files()
            self.sampler = telemetry.TelemetrySampler(gpus[: self.job.gpus])
            self.sampler.start()
            self.enter("loading")
            engine = make_engine(self.job, self.folder.cache(self.job.partition))
            load_s, init_s = engine.load()
            self._check_files()
            check_window(self.job, engine.text.longest if any(run.score for run in self.job.runs) else None)
        except (Exception, *STOPS) as error:
            self._stop_sampler()
            self._end(pending, self.stop or error, started_at)
            return EXIT_A_RUN_FAILED
        try:
            for run in self._to_measure(pending):
                self._check_stop()
                if self._is_here(run):
                    self._measure(engine, run, load_s, init_s, gpus)
            self._skip([run for run in pending if self._is_pending(run)])
            if self.load < self.job.loads and any(run.run_id not in self.failed | self.moved for run in self.job.runs):
                self._check_stop()
        except STOPS as error:  # perhaps after the last run of this load: then the runs of the next one get the reason
            self._end(self._next_load(), error, started_at)
            return EXIT_A_RUN_FAILED
        finally:
            self._stop_sampler()
            engine.close()
        if self._next_load():
            self.phase = BETWEEN_LOADS
            return LOADS_LEFT
        return EXIT_A_RUN_FAILED if self.failed | self.moved else EXIT_ALL_RUNS_DONE

    def _to_measure(self, pending: Sequence[RunSpec]) -> Iterator[RunSpec]:
        """The pending runs; of a search, those that it needs."""
        if self.job.search is None:
            yield from pending
            return
        here = [run for run in self.job.runs if self._is_here(run)]
        for runs in search.searches(here):
            yield from search.bisection(runs, self._meets)

    def _judge(self, run_id: str, repeats: Sequence[Repeat]) -> None:
        if self.job.search is not None:
            self.meets[run_id] = measure.meets(repeats, self.job.search.limits)

    def _meets(self, run: RunSpec) -> bool | None:
        """Whether the run meets the service levels; None if it is not measured. A failed run does not."""
        return False if run.run_id in self.failed | self.moved else self.meets.get(run.run_id)

    def _skip(self, runs: list[RunSpec]) -> None:
        """Record the runs that a search did not need. Without a search, none is left."""
        if self.job.search is None:
            return
        attempt, now = self.attempt.in_load(self.load), utc_now()
        failure = Failure(NOT_NEEDED, "the search did not need this load")
        for run in runs:
            self.skipped.add(run.run_id)
            self.records.write(RunResult(run.run_id, attempt, "failed", run.definition, now, now, failure=failure))

    def _stop_sampler(self) -> None:
        if self.sampler is not None:
            self.sampler.stop()

    def fail_while_waiting(self) -> int:
        """Fail the runs of a local job that was cancelled while it waited for another one."""
        self._fail(self._next_load(), Stopped("SIGTERM"), utc_now())
        return EXIT_A_RUN_FAILED

    def _next_load(self) -> list[RunSpec]:
        """Go to the first engine load with runs left to measure; returns these runs, or none."""
        here = [run for run in self.job.runs if self._is_here(run)]
        for load in range(1, self.job.loads + 1):
            self.load = load
            pending = [run for run in here if self._is_pending(run)]
            if pending:
                return pending
        return []

    def _check_stop(self) -> None:
        """Between two runs: try again to write kept records. Raises Stopped if an engine's code caught it before, and
        RequeueWanted where the time limit is near and another start can continue."""
        self.records.try_again()
        if self.stop is not None:
            raise self.stop
        if self.limit_is_near and self._can_continue_later():
            raise RequeueWanted("time limit is near")

    def _can_continue_later(self) -> bool:
        """Whether another start would get further: at a time limit, only if this start has finished a run."""
        return self.terms.may_be_requeued is not False and (self.finished_in_this_start > 0 or not self.limit_is_near)

    def _is_pending(self, run: RunSpec) -> bool:
        left_out = self.failed | self.moved | self.skipped
        return (run.run_id, self.load) not in self.finished and run.run_id not in left_out

    def _is_here(self, run: RunSpec) -> bool:
        """Whether the run still belongs to this job: labctl moves the runs of a job that it considers lost to another job."""
        try:
            other = read_json(self.folder.moved)[self.job.job_id][run.run_id]["job"]
        except (OSError, ValueError, LookupError, TypeError):
            return True
        if run.run_id not in self.moved:
            self.moved.add(run.run_id)
            print(f"run {run.run_id} skipped: labctl moved it to job {other}", flush=True)
        return False

    def _measure(
        self, engine: Engine, run: RunSpec, load_s: float | None, init_s: float, gpus: list[hardware.Gpu]
    ) -> None:
        self.current = run
        started_at = utc_now()
        try:
            dataset = self.job.datasets.get(run.prompt_set)
            requests = measure.Requests(engine, run, self.job.prompt_sets[run.prompt_set], dataset)
            deadline = self._deadline((load_s or 0.0) + init_s)
            watch = measure.Watch(self.enter, self.on_text, self.sampler, deadline)
            warmup_s, repeats = measure.measure_run(requests, gpus[: self.job.gpus], watch)
            scores = self._scores(engine, run, gpus)
            answers = self._answers(engine, run)
            fingerprint = {
                name: value
                for part in (engine.fingerprint(), self._job_fingerprint(gpus), requests.fingerprint())
                for name, value in json_form(part).items()
            }
            tokens = measure.token_texts(engine, repeats)
        except STOPS:
            raise  # fails together with the runs after it
        except Exception as error:
            if self.stop is not None:
                raise self.stop from error  # a consequence of the stop
            self._fail([run], error, started_at)
            return
        result = RunResult(
            run_id=run.run_id,
            attempt=self.attempt.in_load(self.load),
            status="done",
            definition=run.definition,
            started_at=started_at,
            ended_at=utc_now(),
            load_s=load_s,
            init_s=init_s,
            warmup_s=warmup_s,
            repeats=repeats,
            fingerprint=fingerprint,
            tokens=tokens,
            until=measure.until_of(run, repeats),
            scores=scores,
            answers=answers,
            telemetry=None if self.sampler is None else self.sampler.take(),
        )
        self.records.write(result)
        self._judge(run.run_id, repeats)
        self.finished.add((run.run_id, self.load))
        self.finished_in_this_start += 1
        print_result(run, repeats, text_was_typed=self.on_text is not None and run.warmup > 0)

    def _scores(self, engine: Engine, run: RunSpec, gpus: list[hardware.Gpu]) -> TextScores | None:
        """The scores of the run's text. An engine load scores a text once, for all its runs."""
        if run.score is None:
            return None
        key = sha256_of_json(run.score.to_json())
        if key not in self.scores:
            self.enter("scoring")
            self.scores[key] = score.score(engine, run, self.job.texts[run.score.sha256], gpus[: self.job.gpus])
        return self.scores[key]

    def _answers(self, engine: Engine, run: RunSpec) -> list[TaskAnswers]:
        """The answers to the run's tasks. Runs with equal sampling share those of an engine load."""
        if not run.tasks or not isinstance(engine, ServedEngine):
            return []
        key = sha256_of_json([run.sampling.to_json(), [task.to_json() for task in run.tasks]])
        if key not in self.answers:
            self.enter("answering tasks")
            self.answers[key] = engine.evaluate(run)
        return self.answers[key]

    def _deadline(self, load_s: float) -> float:
        """When the present run has used its share of the job's time limit, as a reading of `time.perf_counter`. The measurements
        that are left have equal shares, after the loads that are left (`load_s` each)."""
        left_s = self._limit_at - time.monotonic()
        left_s -= min(LIMIT_IS_NEAR_S, KEPT_SHARE * left_s) + load_s * (self.job.loads - self.load)
        ended = len(self.finished) + len(self.failed) * (self.job.loads - self.load + 1)
        return time.perf_counter() + left_s / max(1, len(self.job.runs) * self.job.loads - ended)

    def _check_starts(self) -> None:
        """Raises Refusal where Slurm starts this job again and again without finishing a run."""
        records = _records_of(self.folder, self.job, self.attempt)
        last = max((record.attempt.restarts for record in records if record.status == "done"), default=-1)
        earlier = (each for each in _attempts(self.folder) if _same_execution(each, self.attempt))
        starts = sum(each.restarts > last for each in earlier)
        if starts > STARTS_WITHOUT_A_RUN:
            raise Refusal(
                "requeued-too-often",
                f"job started too often without finishing a run: {starts} times",
                "run labctl logs to see why it ended, then labctl retry to resubmit it",
            )

    def _end(self, runs: list[RunSpec], error: BaseException, started_at: str) -> None:
        """End the job early: the remaining runs fail, unless Slurm starts the job again."""
        if isinstance(error, Stopped) and self._comes_back(error):
            self.enter("requeued")
            done, total = len(self.finished), len(self.job.runs) * self.job.loads
            print(f"job requeued: {done} of {total} measurements done", flush=True)
            return
        if isinstance(error, Stopped) and self._is_the_limit(error):
            error = TimeLimit("job reached its time limit")
        self._fail(runs, error, started_at)

    def _comes_back(self, error: Stopped) -> bool:
        if isinstance(error, TimeLimit):
            return False
        if not isinstance(error, RequeueWanted):
            return requeue.comes_back(self.attempt.restarts)
        self.records.finish(TRY_BEFORE_A_REQUEUE_S)
        _requeued.set()
        # Slurm's SIGTERM for the requeue may end scontrol before it has its answer.
        if requeue.requeue() or requeue.comes_back(self.attempt.restarts):
            return True
        _requeued.clear()
        return False

    def _is_the_limit(self, error: Stopped) -> bool:
        """Whether the time limit ends the job; after Slurm's warning a person may also cancel it."""
        over = self.terms.left_s is None or time.monotonic() > self._limit_at - SLURM_ENDS_WITHIN_S
        return self.limit_is_near and (over or isinstance(error, RequeueWanted))

    def handle_usr2(self) -> None:
        """Slurm's USR2: the time limit is near, or Slurm preempts the job. Raises RequeueWanted where another start can
        continue; else the job measures until Slurm ends it. A second USR2 does not disturb the requeue."""
        if isinstance(self.stop, RequeueWanted):
            return
        self.limit_is_near = self.limit_is_near or time.monotonic() > self._limit_at - LIMIT_IS_NEAR_S
        if self._can_continue_later():
            self.stop = RequeueWanted("USR2")
            raise self.stop
        requeues = self.terms.may_be_requeued is not False
        why = "this start has not finished a run" if requeues else "Slurm does not requeue this job"
        # Not print: the signal may interrupt one.
        os.write(2, f"received USR2, the job ends soon; no requeue: {why}\n".encode())

    def finish_records(self) -> bool:
        """Try for some minutes to write kept records; returns whether all are written."""
        before = self.phase
        if self.records.unwritten and before != "requeued":
            self.enter("writing")
        try:
            return self.records.finish(TRY_AT_THE_END_S)
        except STOPS:
            return self.records.finish(0.0)
        finally:
            self.phase = before

    def _fail(self, runs: list[RunSpec], error: BaseException, started_at: str) -> None:
        """Write a record of the failure for each of the runs."""
        failure = failure_of(error)
        print(f"{failure.kind}: {failure.message}\n  -> {failure.remedy}", file=sys.stderr)
        if failure.traceback:
            print(failure.traceback, file=sys.stderr, flush=True)
        attempt = self.attempt.in_load(self.load)
        for run in runs:
            if self.records.has(run.run_id, attempt.attempt_id):
                continue  # done: the signal arrived right after its record was written
            self.failed.add(run.run_id)
            self.records.write(
                RunResult(run.run_id, attempt, "failed", run.definition, started_at, utc_now(), failure=failure)
            )

    def _check_files(self) -> None:
        for files in (self.job.model, self.job.adapter):
            if files is not None:
                check_model(files)

    def _job_fingerprint(self, gpus: list[hardware.Gpu]) -> JobFingerprint:
        script = self.job.script
        if script is not None and "SUBMITIT_EXECUTOR" not in os.environ:
            # Without the script (`labctl run`), the allocation has other CPUs and memory.
            script = ScriptSettings(env=script.env, setup=script.setup)
        used = gpus[: self.job.gpus]
        return JobFingerprint(
            python=platform.python_version(),
            host=self.attempt.host,
            node=self.attempt.node,
            slurm_partition=self.attempt.slurm_partition,
            parallel=self.job.parallel,
            gpus=used,
            clocks=hardware.clocks(used),
            driver=gpus[0].driver if gpus else None,
            cpus=hardware.cpus(),
            environment=self.variables,
            script=script,
            model_commit=model_commit(self.job.model),
            container=next(filter(None, map(os.environ.get, CONTAINER_VARIABLES)), None),
        )

    # ------------------------------------------------------------ the heartbeat

    def enter(self, phase: str) -> None:
        """Enter a phase, and write a heartbeat."""
        self.phase = phase
        if self.sampler is not None:
            self.sampler.enter(phase)
        self._beat()

    @contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Write a heartbeat every HEARTBEAT_EVERY_S seconds, in a thread."""

        def beat() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the main thread handles them
            while not self._ended.wait(HEARTBEAT_EVERY_S):
                self._beat()

        self._beat()
        threading.Thread(target=beat, name="heartbeat", daemon=True).start()
        try:
            yield
        finally:
            self._ended.set()
            self.enter(self.phase if self.phase in ("requeued", BETWEEN_LOADS) else "ended")

    def _beat(self) -> None:
        beat = Heartbeat(
            attempt_id=self.attempt.attempt_id,
            phase=self.phase,
            done=len(self.finished),
            total=len(self.job.runs) * self.job.loads,
            at=utc_now(),
            host=self.attempt.host,
            pid=self.attempt.pid,
            run_id=self.current.run_id if self.current else None,
            slurm_job_id=self.attempt.slurm_job_id,
            load=self.load,
            slurm_started_at=self.terms.started_at,
        )
        try:
            with self._beat_lock:
                write_json(self.folder.heartbeat, beat.to_json(), durable=False)
        except OSError as error:  # a full disk must not end a measurement because of a heartbeat
            print(f"cannot write heartbeat: {error}", file=sys.stderr, flush=True)


def model_commit(model: ModelRef) -> str | None:
    """The commit of the loaded Hub model; if its revision is a branch, the branch's commit in this node's cache."""
    if model.fingerprint is not None or model.revision is None:
        return None
    if re.fullmatch("[0-9a-f]{40}", model.revision):
        return model.revision
    # The worker does not need huggingface_hub: this is how it finds its cache.
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    try:
        reference = cache / f"models--{model.name.replace('/', '--')}" / "refs" / model.revision
        return reference.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def check_model(model: ModelRef) -> None:
    """Raises Refusal where a local checkpoint has changed since the submission."""
    if model.stamp is None or model.path is None:
        return
    try:
        unchanged = stamp(checkpoint_files(Path(model.path))) == model.stamp
    except OSError:
        unchanged = False
    if not unchanged:
        raise Refusal(
            "model-changed",
            f"checkpoint changed after the submission: {model.path}",
            "resubmit the sweep: labctl treats the changed checkpoint as another model",
        )


def _same_execution(other: Attempt, attempt: Attempt) -> bool:
    return (other.job_id, other.execution) == (attempt.job_id, attempt.execution)


def _attempts(folder: JobFolder) -> Iterator[Attempt]:
    for path in folder.attempts.glob("[!.]*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            yield Attempt.from_json(read_json(path))


def _records_of(folder: JobFolder, job: JobSpec, attempt: Attempt) -> list[RunResult]:
    """The records of this execution; damaged ones do not count."""
    found = []
    for run in job.runs:
        for path in folder.records(run.run_id):
            with contextlib.suppress(OSError, ValueError, TypeError):
                record = RunResult.from_json(read_json(path))
                if _same_execution(record.attempt, attempt):
                    found.append(record)
    return found


# ---------------------------------------------------------------- signals and failures


class Stopped(BaseException):
    """SIGTERM (scancel, kill). A BaseException, so that no engine's `except Exception` catches it."""


class TimeLimit(Stopped):
    """The job reached its time limit."""


class RequeueWanted(Stopped):
    """Slurm announced the end of the job: requeue it, and continue in another start."""


STOPS = (Stopped, KeyboardInterrupt)
_requeued = threading.Event()  # submitit or the worker is requeueing the job


def failure_of(error: BaseException) -> Failure:
    """The failure for the record, with a traceback unless the cause is known."""
    if isinstance(error, Refusal):
        return Failure(error.kind, error.message, error.remedy)
    text = str(error).strip() or type(error).__name__
    trace = traceback.format_exc()
    if isinstance(error, TimeLimit):
        return Failure("time-limit", text, "run labctl retry, which doubles the time limit, or give it --time")
    if isinstance(error, STOPS):
        return Failure("cancelled", "job cancelled before it measured the run", "run labctl retry to resubmit the run")
    if type(error).__name__ == "OutOfMemoryError":
        remedy = "use a smaller batch, a shorter output, a 16-bit dtype or more GPUs"
        return Failure("gpu-out-of-memory", text.splitlines()[0], remedy, trace)
    remedy = "read the traceback in the job's log (labctl logs)"
    return Failure(type(error).__name__, text.splitlines()[0], remedy, trace)


@contextmanager
def handle_signals(worker: Worker) -> Iterator[None]:
    """Turn SIGTERM, Slurm's warning (USR2), and a local job's time limit into exceptions, so that records are written. Count
    SIGCONT: a repeat with a suspension is measured again.

    submitit ignores SIGTERM: a cancelled job would occupy its GPUs until Slurm kills it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    job = worker.job

    def on_alarm(signum: int, frame: FrameType | None) -> None:
        worker.stop = TimeLimit(f"job reached its time limit: {job.time_limit_s} s")
        raise worker.stop

    def on_term(signum: int, frame: FrameType | None) -> None:
        # Slurm also sends SIGTERM for a requeue. In a container it arrives twice: the runtime passes on its own.
        if not _requeued.is_set() and str(worker.stop) != "SIGTERM":
            worker.stop = Stopped("SIGTERM")
            raise worker.stop

    handlers: dict[int, Callable[[int, FrameType | None], None]]
    handlers = {signal.SIGTERM: on_term, signal.SIGCONT: measure.suspensions.note}
    if job.executor == "local":
        handlers[signal.SIGALRM] = on_alarm
    else:
        handlers[signal.SIGUSR2] = lambda signum, frame: worker.handle_usr2()
    before = {number: signal.signal(number, act) for number, act in handlers.items()}
    try:
        yield
    finally:
        signal.alarm(0)
        if job.executor == "local":
            signal.signal(signal.SIGALRM, signal.SIG_IGN)  # drops a pending one
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM,))
        for number, act in before.items():
            signal.signal(number, act)


def start_timer(job: JobSpec, used_s: float) -> None:
    """Start the time limit of a local job, minus `used_s` seconds; the wait for other local jobs does not count."""
    if job.executor == "local" and threading.current_thread() is threading.main_thread():
        signal.pthread_sigmask(
            signal.SIG_BLOCK, (signal.SIGALRM,)
        )  # `unblock_signals` follows when a failure can be recorded
        signal.setitimer(signal.ITIMER_REAL, max(0.001, job.time_limit_s - used_s))


@contextmanager
def local_lock(job: JobSpec, worker: Worker) -> Iterator[bool]:
    """Wait until no other local job of this user runs: two at a time would disturb each other's measurements. False if the job
    was cancelled while it waited."""
    if job.executor != "local":
        yield True
        return
    try:
        lock = _open_lock(Path(tempfile.gettempdir()) / f"labctl-local-{os.getuid()}.lock")
    except OSError as error:  # another user's file of this name must not stop the job
        print(f"local jobs may run at the same time: {error}", file=sys.stderr, flush=True)
        yield True
        return
    try:
        try:
            unblock_signals()
            worker.enter("waiting for another local job")
            fcntl.flock(lock, fcntl.LOCK_EX)
            worker.enter("starting")
            locked = True
        except STOPS:
            locked = False
        yield locked
    finally:
        os.close(lock)


def _open_lock(path: Path) -> int:
    """Open or create this user's lock file. Everyone can write the folder, so links are not followed and existing files not
    changed. Raises OSError unless it is a regular file of this user."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
        os.close(handle)
        raise PermissionError(errno.EPERM, "not a regular file of this user", str(path))
    return handle


# ---------------------------------------------------------------- standard output


def print_result(run: RunSpec, repeats: list[Repeat], *, text_was_typed: bool) -> None:
    """Print the text, unless it was streamed, and the results in the format of the handout's script."""
    out = stdout.stream()
    print("" if text_was_typed else repeats[-1].samples[0].text, file=out)
    rates = [value for repeat in repeats if (value := measure.METRICS["output_tok_s"].compute(repeat)) is not None]
    last = repeats[-1]
    if rates:
        spread = f" (min {min(rates):.2f}, max {max(rates):.2f})" if len(rates) > 1 else ""
        longest = max(len(sample.token_ids) for sample in last.samples) if run.workload else run.max_new_tokens
        print(f"Run {run.run_id}: {longest} new tokens at most, {len(repeats)} repeats", file=out)
        print(f"Throughput: {statistics.geometric_mean(rates):.2f} tokens/s{spread}", file=out)
    for memory in last.devices:
        if memory.peak_allocated_bytes is not None:
            print(
                f"{memory.device} peak allocated: {memory.peak_allocated_bytes / 2**30:.2f} GiB ({memory.name})",
                file=out,
            )
    print("-" * min(shutil.get_terminal_size().columns, 80), file=out, flush=True)


def main(arguments: list[str]) -> int:
    stream = arguments[:1] == ["--stream"]
    arguments = arguments[stream:]
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m labctl_workers.job [--stream] JOBSPEC_PATH", file=sys.stderr)
        return 2
    requeue.find_scontrol()
    path = Path(arguments[0])
    try:
        wait_for(path)
    except FileNotFoundError as error:
        print(error.strerror, file=sys.stderr)
        return 2
    on_text = functools.partial(print, end="", flush=True) if stream else None
    with contextlib.nullcontext() if stream else stdout.reserve(), children.end_on_exit():
        status = run_job(path, on_text)
    if status == LOADS_LEFT:
        restart_process()
    return status


def wait_for(path: Path) -> None:
    """Wait up to ten seconds for a shared file system to show a new file. Raises FileNotFoundError, with the node's name."""
    for _ in range(10):
        if path.exists():
            return
        time.sleep(1)
    message = f"{path} does not exist on {socket.gethostname()}: does this node see the workspace?"
    raise FileNotFoundError(errno.ENOENT, message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
