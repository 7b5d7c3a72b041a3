"""One job: check the node, load the engine once, measure each run, write each record.

Started by submitit (the pickled callable is `RunJob`, its one argument the path of the job's JSON) or by hand:
`python -m labctl_workers.job [--stream] PATH`, where --stream types each run's text as it comes. A job that Slurm starts
again skips the runs that it has finished. Each engine load has a process of its own: see `start_again`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
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
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from labctl_workers import answers, children, hardware, measure, requeue
from labctl_workers.checkpoint_files import checkpoint_files, stamp
from labctl_workers.engines import make_engine
from labctl_workers.engines.base import Engine, Request
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
    read_json,
    sha256_of_json,
    utc_now,
    write_json,
)

HEARTBEAT_EVERY_S = 5.0
# The job's template asks for USR2 90 s before the time limit; Slurm may send it a minute earlier.
LIMIT_IS_NEAR_S = 180.0
SLURM_ENDS_WITHIN_S = 5.0  # of the limit, as this node's clock counts
# A job whose records cannot be written tries for so long at its end, and before it goes back into the queue.
TRY_AT_THE_END_S = 600.0
TRY_BEFORE_A_REQUEUE_S = 20.0
# Apptainer, Singularity and Slurm name the image here.
CONTAINER_VARIABLES = ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", "SLURM_CONTAINER")
# A job that ends its node each time would be requeued for ever.
STARTS_WITHOUT_A_RUN = 5
BETWEEN_LOADS = "between engine loads"
# What `run_job` returns where the job has engine loads left: no exit status, the process begins again before it has one.
LOADS_LEFT = -1
# What the process of one engine load hands to the next: the attempt's id, the seconds of the time limit that are used and
# whether that is near.
CONTINUED = "LABCTL_CONTINUED"
AS_IT_BEGAN = dict(os.environ)
# Signals that end or requeue a job: they wait until the new process can handle them.
HELD_BACK = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class RunJob:
    """What submitit pickles, by reference, with the path of the job's JSON as its one argument."""

    def __call__(self, path: str) -> int:
        with files_fail_by_name(), answers.apart(), children.none_left():
            status = run_job(Path(path))
        if status == LOADS_LEFT:
            start_again()
        if status != EXIT_ALL_RUNS_DONE:
            # A job with a failed run must not look COMPLETED to Slurm; submitit lets SystemExit pass.
            raise SystemExit(status)
        return status

    def checkpoint(self, path: str) -> Any:
        """Asked for by submitit before the job is requeued: the same job again, which skips what is finished."""
        from submitit.helpers import DelayedSubmission

        _requeued.set()
        return DelayedSubmission(self, path)


@contextmanager
def files_fail_by_name() -> Iterator[None]:
    """End the process with an exit status that names the error of a file: the log may be on the same full disk."""
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
    """Run the next engine load of the job described at `path`; returns EXIT_ALL_RUNS_DONE, EXIT_A_RUN_FAILED after writing
    why, or LOADS_LEFT.

    `on_text` is told the text of each run's warm-up as it comes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a log in another encoding must not end the job
    continued = json.loads(os.environ.pop(CONTINUED, "{}"))
    path = Path(_moved(str(path), continued.get("moved")))  # submitit's pickle keeps where it was
    folder = JobFolder(path)
    job = JobSpec.from_json(read_json(path))
    attempt = _attempt_of(folder, continued.get("attempt_id")) or start_attempt(job, folder)
    used_s = float(continued.get("used_s", 0.0))
    records = Records(folder)
    worker = Worker(job, records, attempt, on_text)
    worker.limit_is_near = bool(continued.get("limit_is_near"))
    with contextlib.closing(records), worker.heartbeat(), told_to_end(worker), local_turn(job, worker) as is_its_turn:
        began = time.monotonic()
        if is_its_turn:
            start_the_clock(job, used_s)
            status = worker.run()
        else:
            status = worker.ended_in_the_queue()
        if not worker.written():
            status = EXIT_A_RUN_FAILED
        records.follow()
    if status == LOADS_LEFT:
        used_s += time.monotonic() - began
        left = {"attempt_id": attempt.attempt_id, "used_s": used_s, "limit_is_near": worker.limit_is_near}
        moved = {"from": str(folder.data.parent), "to": str(records.folder.data.parent)}
        os.environ[CONTINUED] = json.dumps({**left, "moved": moved})
    return status


def _attempt_of(folder: JobFolder, attempt_id: str | None) -> Attempt | None:
    """The attempt that an earlier process of this execution wrote down."""
    return next((attempt for attempt in _attempts(folder) if attempt.attempt_id == attempt_id), None)


def start_again() -> NoReturn:
    """Replace this process by a new one of the same command, for the job's next engine load.

    What a process keeps - allocated memory, chosen kernels, compiled code, imported modules - would make the next load differ
    less from this one than two jobs do. The process id stays: Slurm and submitit see one job.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  a library's open GPU would keep its memory
        with contextlib.suppress(OSError):  # the listing's own
            if int(name) > 2:
                os.set_inheritable(int(name), False)
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    for number in HELD_BACK:  # a thread of the engine's may take what this one does not
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: signal.pthread_kill(threading.get_ident(), number))
    moved = json.loads(os.environ[CONTINUED])["moved"]
    # Not what an engine has set for its own processes; where the workspace was moved, its code is there too.
    environment = {name: _moved(value, moved) for name, value in AS_IT_BEGAN.items()}
    executable, *arguments = (_moved(word, moved) for word in (sys.executable, *sys.orig_argv[1:]))
    os.execve(executable, [executable, *arguments], {**environment, CONTINUED: os.environ[CONTINUED]})  # noqa: S606


def _moved(text: str, moved: dict[str, str] | None) -> str:
    """The text with the paths of a workspace that was moved `from` a folder `to` another."""
    return text if moved is None else text.replace(f"{moved['from']}/", f"{moved['to']}/")


def let_signals_come() -> None:
    """Those that came while the process began again for the next engine load are delivered now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*HELD_BACK, signal.SIGALRM))


def start_attempt(job: JobSpec, folder: JobFolder) -> Attempt:
    """Write down that this execution has begun, before anything can fail."""
    slurm_id = slurm_job_id()
    started_at = utc_now()
    stamp = started_at[:19].replace("-", "").replace(":", "")
    # By hand, the process id alone will not do: in a container each worker is process 1.
    own = f"pid{os.getpid()}-{secrets.token_hex(3)}"
    attempt = Attempt(
        attempt_id=f"{job.job_id}.{stamp}.{slurm_id or own}",
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
    write_json(folder.attempts / f"{attempt.attempt_id}.json", attempt.to_json(), parents=False)
    with contextlib.suppress(OSError):  # then its records are kept, and the log says so
        folder.results.mkdir(exist_ok=True)
    return attempt


def slurm_job_id() -> str | None:
    """The Slurm id as people write it: 1234, or 1234_5 for a task of an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


class Worker:
    """The state of one execution: what is done, and how it is told."""

    def __init__(
        self, job: JobSpec, records: Records, attempt: Attempt, on_text: Callable[[str], None] | None = None
    ) -> None:
        self.job = job
        self.records = records
        self.attempt = attempt
        self.on_text = on_text
        self.phase = "starting"
        self.current: RunSpec | None = None
        done = [
            record
            for run in job.runs
            for record in _records(self.folder, run)
            if record.status == "done" and _is_of(record.attempt, attempt)
        ]
        self.finished = {(record.run_id, record.attempt.load) for record in done}
        self.finished_in_this_start = sum(record.attempt.started_at == attempt.started_at for record in done)
        # What failed in an earlier load of this start fails again; Slurm's next start may do better.
        self.failed = {
            run.run_id
            for run in job.runs
            for record in _records(self.folder, run)
            if record.status == "failed" and _is_of(record.attempt, attempt)
            if record.attempt.started_at == attempt.started_at
        }
        self.given: set[str] = set()
        self.load = 1
        # Before an engine adds what it wants its own processes to have.
        self.variables = engine_variables(os.environ, job.script.env if job.script else ())
        self._beat_lock = threading.Lock()
        self._stopped = threading.Event()
        self.told_to_stop: Stopped | None = None
        self.limit_is_near = False
        self.terms = requeue.terms() if job.executor == "slurm" else requeue.Terms(may_be_requeued=False)
        left_s = job.time_limit_s if self.terms.left_s is None else self.terms.left_s
        self._limit_at = time.monotonic() + left_s

    @property
    def folder(self) -> JobFolder:
        """The job's files, also where the workspace was moved."""
        return self.records.folder

    # ------------------------------------------------------------ the job

    def run(self) -> int:
        pending = self._next_load()
        if not pending:
            return self._nothing_to_measure()
        if self.job.loads > 1:
            answers.tell(f"engine load {self.load} of {self.job.loads}")
        started_at = utc_now()
        try:
            let_signals_come()
            self._check_starts()
            gpus = hardware.visible_gpus() if self.job.device == "cuda" else []
            hardware.check_gpus(self.job, gpus)
            check_model(self.job.model)
            self.enter("loading")
            engine = make_engine(self.job, self.folder.cache(self.job.partition))
            load_s, init_s = engine.load()
            check_model(self.job.model)
        except (Exception, *STOPS) as error:
            self._stop(pending, self.told_to_stop or error, started_at)
            return EXIT_A_RUN_FAILED
        try:
            for run in pending:
                self._may_go_on()
                if self._is_mine(run):
                    self._measure(engine, run, load_s, init_s, gpus)
            if self._loads_left():
                self._may_go_on()
        except STOPS as error:
            self._stop([run for run in pending if self._is_left(run)], error, started_at)
            return EXIT_A_RUN_FAILED
        finally:
            engine.close()
        if self._next_load():
            self.phase = BETWEEN_LOADS
            return LOADS_LEFT
        return EXIT_A_RUN_FAILED if self.failed | self.given else EXIT_ALL_RUNS_DONE

    def ended_in_the_queue(self) -> int:
        """The end of a local job that was told to end while it waited for its turn."""
        self._fail(self._next_load(), Stopped("told to end"), utc_now())
        return EXIT_A_RUN_FAILED

    def _next_load(self) -> list[RunSpec]:
        """Go to the first engine load that has runs left to measure; these runs, none where none has."""
        mine = [run for run in self.job.runs if self._is_mine(run)]
        for load in range(1, self.job.loads + 1):
            self.load = load
            pending = [run for run in mine if self._is_left(run)]
            if pending:
                return pending
        return []

    def _loads_left(self) -> bool:
        return self.load < self.job.loads and any(run.run_id not in self.failed | self.given for run in self.job.runs)

    def _may_go_on(self) -> None:
        """Between two runs: try again to write what could not be written. Raises Stopped where an engine's code has swallowed
        that, and HandedBack where the time limit is near and the job can go on in another start."""
        self.records.try_again()
        if self.told_to_stop is not None:
            raise self.told_to_stop
        if self.limit_is_near and self._can_go_back():
            raise HandedBack("the time limit is near")

    def _can_go_back(self) -> bool:
        """Whether another start would get further: at a time limit, only where this one has finished a run."""
        return self.terms.may_be_requeued is not False and (self.finished_in_this_start > 0 or not self.limit_is_near)

    def _is_left(self, run: RunSpec) -> bool:
        return (run.run_id, self.load) not in self.finished and run.run_id not in self.failed | self.given

    def _is_mine(self, run: RunSpec) -> bool:
        """Whether this job is still to measure the run. One that was thought lost may start after its runs were given away."""
        other = given_to(self.folder, self.job, run)
        if other is not None and run.run_id not in self.given:
            self.given.add(run.run_id)
            print(f"run {run.run_id} was given to job {other}: it is not measured here", flush=True)
        return other is None

    def _nothing_to_measure(self) -> int:
        if self.given:
            print("this job lost its turn: labctl gave its runs to other jobs", flush=True)
            return EXIT_A_RUN_FAILED
        print("every run of this job has its record: nothing to do", flush=True)
        return EXIT_A_RUN_FAILED if self.failed else EXIT_ALL_RUNS_DONE

    def _measure(self, engine: Engine, run: RunSpec, load_s: float, init_s: float, gpus: list[hardware.Gpu]) -> None:
        self.current = run
        started_at = utc_now()
        try:
            prompts = self.job.prompt_sets[run.prompt_set]
            watch = measure.Watch(self.enter, self.on_text)
            warmup_s, repeats = measure.measure_run(engine, run, prompts, gpus[: self.job.gpus], watch)
            fingerprint = {
                **engine.fingerprint(),
                **self._surroundings(gpus),
                "prompt_tokens": hash_of_tokens(engine.encode(prompts)),
            }
            tokens = measure.token_texts(engine, repeats)
        except STOPS:
            raise  # told of with the runs whose turn has not come
        except Exception as error:
            if self.told_to_stop is not None:
                raise self.told_to_stop from error  # it is what came of the stop
            self._fail([run], error, started_at)
            return
        result = RunResult(
            run_id=run.run_id,
            attempt=self.attempt.in_load(self.load),
            status="done",
            asked=run.asked,
            started_at=started_at,
            ended_at=utc_now(),
            load_s=load_s,
            init_s=init_s,
            warmup_s=warmup_s,
            repeats=repeats,
            fingerprint=fingerprint,
            tokens=tokens,
        )
        self.records.write(result)
        self.finished.add((run.run_id, self.load))
        self.finished_in_this_start += 1
        print_result(run, repeats, text_was_typed=self.on_text is not None and run.warmup > 0)

    def _check_starts(self) -> None:
        """Raise Refusal where Slurm has started this job again and again, and no run of it was finished."""
        starts = starts_without_a_run(self.attempt, self.folder, self.job)
        if starts > STARTS_WITHOUT_A_RUN:
            raise Refusal(
                "requeued-too-often",
                f"the job was started {starts} times and finished no further run",
                "labctl logs shows what ended it; labctl retry submits it again",
            )

    def _stop(self, runs: list[RunSpec], error: BaseException, started_at: str) -> None:
        """The runs that are left when an error, or whoever told the job to end, ends it: failed, unless it comes back."""
        if isinstance(error, Stopped) and self._comes_back(error):
            self.enter("requeued")
            done, total = len(self.finished), len(self.job.runs) * self.job.loads
            print(f"Slurm takes the job back into its queue: {done} of {total} measurements are done", flush=True)
            return
        if isinstance(error, Stopped) and self._is_the_limit(error):
            error = TimeLimit("the job did not end within its time limit")
        self._fail(runs, error, started_at)

    def _comes_back(self, error: Stopped) -> bool:
        if isinstance(error, TimeLimit):
            return False
        if not isinstance(error, HandedBack):
            return requeue.comes_back(self.attempt.restarts)
        self.records.finish(TRY_BEFORE_A_REQUEUE_S)
        _requeued.set()
        if requeue.hand_back():
            return True
        _requeued.clear()
        return False

    def _is_the_limit(self, error: Stopped) -> bool:
        """Whether the time limit is what ends the job, and not a person after Slurm's warning."""
        over = self.terms.left_s is None or time.monotonic() > self._limit_at - SLURM_ENDS_WITHIN_S
        return self.limit_is_near and (over or isinstance(error, HandedBack))

    def warned_by_slurm(self) -> None:
        """Slurm's USR2: the time limit is near, or the job is to make room. Raises HandedBack where the job can go on in another
        start; else it measures on until Slurm ends it."""
        self.limit_is_near = self.limit_is_near or time.monotonic() > self._limit_at - LIMIT_IS_NEAR_S
        if self._can_go_back():
            self.told_to_stop = HandedBack("Slurm has sent USR2")
            raise self.told_to_stop
        why = (
            "this start has finished no run yet"
            if self.terms.may_be_requeued is not False
            else "Slurm does not requeue it"
        )
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"the end of the job is near (USR2); it measures on, since {why}\n".encode())

    def written(self) -> bool:
        """Whether every record is written, after some minutes of trying where one is not."""
        before = self.phase
        if self.records.waiting and before != "requeued":
            self.enter("writing")
        try:
            return self.records.finish(TRY_AT_THE_END_S)
        except STOPS:
            return self.records.finish(0.0)
        finally:
            self.phase = before

    def _fail(self, runs: list[RunSpec], error: BaseException, started_at: str) -> None:
        """Write a record of the failure for each of the runs: an end without a record says nothing."""
        failure = failure_of(error)
        print(f"{failure.kind}: {failure.message}\n{failure.remedy}", file=sys.stderr)
        if failure.traceback:
            print(failure.traceback, file=sys.stderr, flush=True)
        attempt = self.attempt.in_load(self.load)
        for run in runs:
            if self.records.has(run.run_id, attempt.attempt_id):
                continue  # measured: the job was told to end before it took note of it
            self.failed.add(run.run_id)
            self.records.write(
                RunResult(run.run_id, attempt, "failed", run.asked, started_at, utc_now(), failure=failure)
            )

    def _surroundings(self, gpus: list[hardware.Gpu]) -> dict[str, Any]:
        return {
            "python": platform.python_version(),
            "host": self.attempt.host,
            "node": self.attempt.node,
            "slurm_partition": self.attempt.slurm_partition,
            "parallel": self.job.parallel,
            "gpus": hardware.describe(gpus[: self.job.gpus]),
            "clocks": hardware.clocks(gpus[: self.job.gpus]),
            "driver": gpus[0].driver if gpus else None,
            "cpus": hardware.cpus(),
            "environment": self.variables,
            "script": self._script(),
            "model_commit": model_commit(self.job.model),
            "container": next(filter(None, map(os.environ.get, CONTAINER_VARIABLES)), None),
        }

    def _script(self) -> dict[str, Any] | None:
        """What the script has set. Without a script (`labctl run`), an allocation has other CPUs and memory than it."""
        script = self.job.script
        if script is not None and "SUBMITIT_EXECUTOR" not in os.environ:
            script = ScriptSettings(env=script.env, setup=script.setup)
        return None if script is None else script.to_json()

    # ------------------------------------------------------------ the heartbeat

    def enter(self, phase: str) -> None:
        """Go into a phase and say so at once."""
        self.phase = phase
        self._beat()

    @contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Tell the login node, every few seconds, what this job is doing."""
        thread = threading.Thread(target=self._beat_until_stopped, name="heartbeat", daemon=True)
        self._beat()
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            self.enter(self.phase if self.phase in ("requeued", BETWEEN_LOADS) else "ended")

    def _beat_until_stopped(self) -> None:
        while not self._stopped.wait(HEARTBEAT_EVERY_S):
            self._beat()

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
                write_json(self.folder.heartbeat, beat.to_json(), durable=False, parents=False)
        except OSError as error:  # a full disk must not end a measurement over a sign of life
            print(f"no heartbeat could be written: {error}", file=sys.stderr, flush=True)


def model_commit(model: ModelRef) -> str | None:
    """The commit of a hub model that was loaded: where it could not be pinned, what its branch is in this node's cache."""
    if model.fingerprint is not None or model.revision is None:
        return None
    if re.fullmatch("[0-9a-f]{40}", model.revision):
        return model.revision
    # As huggingface_hub finds it, which the worker itself does not need.
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    try:
        reference = cache / f"models--{model.name.replace('/', '--')}" / "refs" / model.revision
        return reference.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def check_model(model: ModelRef) -> None:
    """Raises Refusal where a local checkpoint is no longer the one that was submitted."""
    if model.stamp is None or model.path is None:
        return
    try:
        unchanged = stamp(checkpoint_files(Path(model.path))) == model.stamp
    except OSError:
        unchanged = False
    if not unchanged:
        raise Refusal(
            "model-changed",
            f"{model.path} was changed after it was submitted",
            "labctl submit takes it as it is now, as another model",
        )


def hash_of_tokens(requests: Sequence[Request]) -> str:
    """SHA-256 of the token ids of each prompt, in order: what the engine was given in the end."""
    return sha256_of_json([request.token_ids for request in requests])


def given_to(folder: JobFolder, job: JobSpec, run: RunSpec) -> str | None:
    """The job that labctl gave the run to, since it took this one for lost; None where the run is this job's."""
    try:
        other: str = read_json(folder.given)[job.job_id][run.run_id]["job"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return other


def starts_without_a_run(attempt: Attempt, folder: JobFolder, job: JobSpec) -> int:
    """How often this execution was started since the start that last finished a run, this start included."""
    finished = [
        record.attempt.restarts
        for run in job.runs
        for record in _records(folder, run)
        if _is_of(record.attempt, attempt) and record.status == "done"
    ]
    starts = [start.restarts for start in _attempts(folder) if _is_of(start, attempt)]
    return sum(start > max(finished, default=-1) for start in starts)


def _is_of(other: Attempt, attempt: Attempt) -> bool:
    return (other.job_id, other.execution) == (attempt.job_id, attempt.execution)


def _attempts(folder: JobFolder) -> Iterator[Attempt]:
    for path in folder.attempts.glob("[!.]*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            yield Attempt.from_json(read_json(path))


def _records(folder: JobFolder, run: RunSpec) -> Iterator[RunResult]:
    """The records of a run that can be read: a damaged one is no result."""
    for path in folder.records(run.run_id):
        with contextlib.suppress(OSError, ValueError, TypeError):
            yield RunResult.from_json(read_json(path))


# ---------------------------------------------------------------- ends


class Stopped(BaseException):
    """The job was told to end (SIGTERM: scancel, kill). No `except Exception` on the way may keep it."""


class TimeLimit(Stopped):
    """The job's time is up."""


class HandedBack(Stopped):
    """Slurm has said that the job's end is near: it goes back into the queue, and on in another start."""


STOPS = (Stopped, KeyboardInterrupt)
_requeued = threading.Event()  # submitit is handing the job back to Slurm's queue


def failure_of(error: BaseException) -> Failure:
    """The failure for the record: a refusal speaks for itself, anything else keeps its traceback."""
    if isinstance(error, Refusal):
        return Failure(error.kind, error.message, error.remedy)
    text = str(error).strip() or type(error).__name__
    trace = traceback.format_exc()
    if isinstance(error, TimeLimit):
        return Failure("time-limit", text, "labctl retry asks for twice the time, or for --time")
    if isinstance(error, STOPS):
        return Failure("cancelled", "the job was told to end before the run was measured", "submit it again")
    if type(error).__name__ == "OutOfMemoryError":
        remedy = "take a smaller batch, a shorter output, a 16-bit dtype, or more GPUs"
        return Failure("gpu-out-of-memory", text.splitlines()[0], remedy, trace)
    return Failure(type(error).__name__, text.splitlines()[0], "the traceback is in the job's log (labctl logs)", trace)


@contextmanager
def told_to_end(worker: Worker) -> Iterator[None]:
    """Make SIGTERM, Slurm's warning (USR2), and on a partition without Slurm the time limit, end the job by an exception:
    records get written. Count SIGCONT: a suspended job is not measured.

    submitit lets SIGTERM pass by, so a cancelled job would hold its GPUs until Slurm kills it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    job = worker.job

    def on_alarm(signum: int, frame: FrameType | None) -> None:
        worker.told_to_stop = TimeLimit(f"the job did not end within its {job.time_limit_s} s")
        raise worker.told_to_stop

    def on_term(signum: int, frame: FrameType | None) -> None:
        if not _requeued.is_set():  # then Slurm's SIGTERM is how the requeue goes on
            worker.told_to_stop = Stopped("told to end")
            raise worker.told_to_stop

    handlers: dict[int, Callable[[int, FrameType | None], None]]
    handlers = {signal.SIGTERM: on_term, signal.SIGCONT: measure.suspensions.note}
    if job.executor == "local":
        handlers[signal.SIGALRM] = on_alarm
    else:
        handlers[signal.SIGUSR2] = lambda signum, frame: worker.warned_by_slurm()
    before = {number: signal.signal(number, act) for number, act in handlers.items()}
    try:
        yield
    finally:
        signal.alarm(0)
        if job.executor == "local":
            signal.signal(signal.SIGALRM, signal.SIG_IGN)  # one that came since is forgotten
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM,))
        for number, act in before.items():
            signal.signal(number, act)


def start_the_clock(job: JobSpec, used_s: float) -> None:
    """Start the time limit of a local job, of which `used_s` seconds are used: waiting for one's turn is free."""
    if job.executor == "local" and threading.current_thread() is threading.main_thread():
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGALRM,))  # until its end can be recorded
        signal.setitimer(signal.ITIMER_REAL, max(0.001, job.time_limit_s - used_s))


@contextmanager
def local_turn(job: JobSpec, worker: Worker) -> Iterator[bool]:
    """Local jobs of one user run one after another: two measurements at once on one machine measure each other. False where
    the job was told to end while it waited."""
    if job.executor != "local":
        yield True
        return
    try:
        lock = _own_lock(Path(tempfile.gettempdir()) / f"labctl-local-{os.getuid()}.lock")
    except OSError as error:  # somebody else's file of this name must not keep us from working
        print(f"local jobs may run beside one another: {error}", file=sys.stderr, flush=True)
        yield True
        return
    try:
        try:
            let_signals_come()
            worker.enter("waiting for another local job")
            fcntl.flock(lock, fcntl.LOCK_EX)
            worker.enter("starting")
            has_it = True
        except STOPS:
            has_it = False
        yield has_it
    finally:
        os.close(lock)


def _own_lock(path: Path) -> int:
    """Open a lock of this user's, made where there is none. Everyone can write the folder: no link is followed, and nothing that
    is there is changed. Raises OSError for what is no plain file of this user's."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
        os.close(handle)
        raise PermissionError(errno.EPERM, "not a plain file of this user's", str(path))
    return handle


# ---------------------------------------------------------------- what a person reads in the log


def print_result(run: RunSpec, repeats: list[Repeat], *, text_was_typed: bool) -> None:
    """The text, where it was not typed as it came, and the figures as the handout's script prints them."""
    out = answers.stream()
    print("" if text_was_typed else repeats[-1].samples[0].text, file=out)
    rates = [value for repeat in repeats if (value := measure.METRICS["output_tok_s"].compute(repeat)) is not None]
    last = repeats[-1]
    if rates:
        spread = f" (min {min(rates):.2f}, max {max(rates):.2f})" if len(rates) > 1 else ""
        print(f"Run {run.run_id}: {run.max_new_tokens} new tokens at most, {len(repeats)} repeats", file=out)
        print(f"Throughput: {statistics.geometric_mean(rates):.2f} tokens/s{spread}", file=out)
    for memory in last.devices:
        if memory.peak_allocated_bytes is not None:
            print(
                f"{memory.device} peak allocated: {memory.peak_allocated_bytes / 2**30:.2f} GiB ({memory.name})",
                file=out,
            )
    print("-" * min(shutil.get_terminal_size().columns, 80), file=out, flush=True)


def _type(text: str) -> None:
    print(text, end="", flush=True)


def main(arguments: list[str]) -> int:
    stream = arguments[:1] == ["--stream"]
    arguments = arguments[stream:]
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m labctl_workers.job [--stream] PATH_OF_THE_JOBS_JSON", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    try:
        wait_for(path)
    except FileNotFoundError as error:
        print(error.strerror, file=sys.stderr)
        return 2
    with contextlib.nullcontext() if stream else answers.apart(), children.none_left():
        status = run_job(path, _type if stream else None)
    if status == LOADS_LEFT:
        start_again()
    return status


def wait_for(path: Path) -> None:
    """Give a shared file system some seconds to show a new file. Raises FileNotFoundError, which says on which node."""
    for _ in range(10):
        if path.exists():
            return
        time.sleep(1)
    said = f"{path} does not exist on {socket.gethostname()}: does this node see the workspace?"
    raise FileNotFoundError(errno.ENOENT, said)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
