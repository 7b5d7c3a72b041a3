"""A sweep through faults: everything that may happen on a cluster happens to it, at random moments, from a seed.

    python -m tests.slurm.chaos --runs 1000 [--seed 4711]

Real labctl, real Slurm, real workers; the engine sleeps (tests/slurm/sleeper). The workspace lies on a file system of its own, so
that it can be full. At the end every run must have its result, once, no state may contradict what sacct says, and every
failure that labctl told was one that was made to happen.

Faults of files and clocks are injected (fault_injector.c, by LD_PRELOAD): writing fails with ENOSPC, EROFS or EACCES, or
everything with ESTALE; the clocks of the dgx2 nodes are 10 minutes ahead of the login node's, those of the dgxh nodes 10 minutes
behind. The site requeues no job that does not ask for it (JobRequeue=0): those of dgx2 do, those of dgxh do not.

"Once": one record that is done. A second one is right only where labctl had to take the first for lost: its file was
damaged, or its job was forgotten by a controller that was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import write_checkpoint

from .cluster import Process, SlurmCluster, _living_processes, install_slurm
from .fault_injector import FaultInjector

SLEEPER = Path(__file__).parent / "sleeper"
ALIVE = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}
SETTINGS = """
[defaults]
model_id = "{model}"
repeats = 1
warmup = 0
"""
PARTITION = """
[partitions.{name}]
device = "cpu"
setup = ["export PYTHONPATH={sleeper}"]
env = {{ SLEEPER_LOAD_S = "{load_s}", SLEEPER_RUN_S = "{run_s}", {variables} }}
sbatch = {{ {options} }}
"""
CLOCK_IS_AHEAD_S = {"dgx2": 600, "dgxh": -600}
REQUEUED, NOT_REQUEUED = "dgx2", "dgxh"
# What labctl is to call a job's end that a fault of the files has brought about.
KINDS_OF_ERRNO = {
    errno.ENOSPC: {"disk-full"},
    errno.EROFS: {"read-only"},
    errno.EACCES: {"permission-denied"},
    # The latter where labctl's own code could not be read: Python says no more than that there is none.
    errno.ESTALE: {"file-system-away", "workspace-not-shared"},
}


class Contradiction(AssertionError):
    """labctl said something that is not so."""


@dataclass
class Sweep:
    """How many runs, how they are packed, for how long faults are thrown in, and at most how long after one another; `slow` are
    those too after which Slurm, or labctl, waits up to a minute."""

    runs: int
    runs_per_job: int
    jobs_at_once: int
    chaos_s: float
    run_s: float = 1.0
    load_s: float = 0.5
    pause_s: float = 3.0
    slow: bool = True


@dataclass
class Chaos:
    """One sweep on one cluster, in a workspace on the file system `disk`, which may be full for a while."""

    cluster: SlurmCluster
    disk: Path
    injector: FaultInjector
    sweep: Sweep
    seed: int
    began: float = field(default_factory=time.monotonic)
    counts: Counter[str] = field(default_factory=Counter)
    excused: set[str] = field(default_factory=set)
    later: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    disk_is_full: bool = False
    controller_is_up: bool = True
    violations: list[str] = field(default_factory=list)
    former_roots: list[Path] = field(default_factory=list)
    disturbances: int = 0
    # The kinds of failure that were made to happen: to a job, by its Slurm id, or to any.
    made: dict[str, set[str]] = field(default_factory=dict)
    made_to_any: set[str] = field(default_factory=set)
    hung: set[str] = field(default_factory=set)
    told_kinds: dict[tuple[str, str], tuple[str, str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.root = self.disk / "lab"
        self._stopped = threading.Event()
        self._in_the_workspace = threading.Lock()

    # ------------------------------------------------------------ the whole

    def run(self) -> None:
        """Raises Contradiction where something was lost, done twice, or told wrongly."""
        self.tell(f"seed {self.seed}, {self.sweep}")
        self.prepare()
        self.submit_while_it_is_killed()
        watcher = threading.Thread(target=self.watch, daemon=True)
        watcher.start()
        self.throw_faults()
        self.heal()
        self._stopped.set()
        watcher.join(60)
        self.retry_until_whole()
        self.check()
        self.tell(f"faults: {dict(self.counts)}")

    def prepare(self) -> None:
        self.root.mkdir()
        model = write_checkpoint(self.disk / "model")
        text = SETTINGS.format(model=model)
        for name, ahead_s in CLOCK_IS_AHEAD_S.items():
            variables = self.injector.environment("node", ahead_s)
            text += PARTITION.format(
                name=name,
                sleeper=SLEEPER,
                load_s=self.sweep.load_s,
                run_s=self.sweep.run_s,
                variables=", ".join(f'{key} = "{value}"' for key, value in variables.items()),
                options="requeue = true" if name == REQUEUED else "",
            )
        (self.root / "labctl.toml").write_text(text, encoding="utf-8")
        lengths = list(range(1, self.sweep.runs // 2 + 1))
        (self.root / "sweep.toml").write_text(
            f'name = "chaos"\npartition = ["dgx2", "dgxh"]\nmax_new_tokens = {lengths}\n'
            f"runs_per_job = {self.sweep.runs_per_job}\njobs_at_once = {self.sweep.jobs_at_once}\n",
            encoding="utf-8",
        )

    def submit_while_it_is_killed(self) -> None:
        """kill -9 of labctl in the middle of submit, at some moments; then once in peace."""
        for _ in range(3 if self.sweep.slow else 1):
            self.kill_labctl("submit", "sweep.toml", within_s=1.5)
        done = self.labctl("submit", "sweep.toml")
        if done.returncode != 0:
            raise Contradiction(f"submit: {done.returncode} {done.stderr}")

    def throw_faults(self) -> None:
        faults = [
            self.results_full, self.results_read_only, self.results_away, self.move_the_workspace, self.end_the_time_of_a_job,
            self.kill_labctl_status, self.kill_labctl_collect, self.kill_a_worker, self.requeue_a_job, self.cancel_some,
            self.fill_the_disk, self.retry_in_the_middle, self.retry_in_the_middle, self.kill_labctl_retry,
        ]  # fmt: skip
        if self.sweep.slow:
            faults += [self.kill_a_node, self.kill_the_controller, self.stop_the_accounting, self.truncate_a_record]
        order: list[Callable[[], None]] = []
        until = time.monotonic() + self.sweep.chaos_s
        while order or time.monotonic() < until:
            if not order:  # each fault once before any comes again
                order = self.random.sample(faults, len(faults))
                if not self.counts:  # Slurm looks at time limits every half minute
                    order.remove(self.end_the_time_of_a_job)
                    order.append(self.end_the_time_of_a_job)
            fault = order.pop()
            self.tell(fault.__name__)
            self.counts[fault.__name__] += 1
            fault()
            pause_until = time.monotonic() + self.random.uniform(self.sweep.pause_s / 6, self.sweep.pause_s)
            while time.monotonic() < pause_until:
                self.mend_what_is_due()
                time.sleep(0.1)

    def mend_what_is_due(self) -> None:
        for due, mend in list(self.later):
            if time.monotonic() >= due:
                self.later.remove((due, mend))
                mend()

    def heal(self) -> None:
        while self.later:
            self.mend_what_is_due()
            time.sleep(0.1)
        for name in self.cluster.nodes:
            self.cluster.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
        self.tell("all is mended")

    def retry_until_whole(self) -> None:
        """labctl retry, again and again, as a person does."""
        deadline = time.monotonic() + 240 + self.sweep.runs * self.sweep.run_s
        while True:
            found = self.statuses()
            states = Counter(run["state"] for run in found)
            why = Counter(run["detail"][:70] for run in found if run["state"] not in ("done", "running", "pending"))
            self.tell(f"{dict(states)} {dict(why) if why else ''}")
            if states == {"done": self.sweep.runs}:
                return
            if time.monotonic() > deadline:
                odd = [run for run in found if run["state"] != "done"][:3]
                raise Contradiction(f"after four minutes of retries: {dict(states)}, such as {odd}")
            done = self.labctl("retry", "chaos", "--json")
            if done.returncode != 0:
                raise Contradiction(f"retry: {done.returncode} {done.stderr}")
            time.sleep(3)

    # ------------------------------------------------------------ the faults

    def kill_labctl(self, *arguments: str, within_s: float) -> None:
        """Its sbatch, if it has come to that, lives on."""
        process = self.start_labctl(*arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(self.random.uniform(0.1, within_s))
        process.kill()
        process.wait()

    def kill_labctl_status(self) -> None:
        self.kill_labctl("status", within_s=0.8)

    def kill_labctl_collect(self) -> None:
        self.kill_labctl("collect", *self.random.choice([(), ("--rebuild",)]), within_s=0.8)

    def kill_labctl_retry(self) -> None:
        self.kill_labctl("retry", "chaos", within_s=1.2)

    def retry_in_the_middle(self) -> None:
        """No fault, but what a person does all the time, and what gives the faults something to hit."""
        done, disturbed = self.labctl_and_whether_disturbed("retry", "chaos")
        if "Traceback" in done.stderr or (done.returncode != 0 and self.controller_is_up and not disturbed):
            self.violations.append(f"retry: {done.returncode} {done.stderr}")

    def kill_a_worker(self) -> None:
        workers = [p for p in self.workers() if self.job_of(p) not in self.hung]
        if workers:
            worker = self.random.choice(workers)
            self.will_be_told("killed", self.job_of(worker))
            worker.send(signal.SIGKILL)

    def workers(self) -> list[Process]:
        return [process for process in _living_processes() if self.is_a_worker(process)]

    def is_a_worker(self, process: Process) -> bool:
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            return b"labctl_workers.start" in line and os.fsencode(self.disk) in line
        return False

    def job_of(self, worker: Process) -> str:
        variables = worker.environment()
        array, task = variables.get("SLURM_ARRAY_JOB_ID"), variables.get("SLURM_ARRAY_TASK_ID")
        return f"{array}_{task}" if array else variables.get("SLURM_JOB_ID", "")

    def will_be_told(self, kind: str, *jobs: str) -> None:
        for job in jobs:
            self.made.setdefault(job, set()).add(kind)

    def end_the_time_of_a_job(self) -> None:
        """A worker hangs, and its job's time is up in some seconds."""
        until = time.monotonic() + 10
        while not (workers := self.workers()) and time.monotonic() < until:
            time.sleep(0.1)
        here = [p for p in workers if p.environment().get("SLURM_JOB_PARTITION") == NOT_REQUEUED] or workers
        if here and self.controller_is_up:
            worker = self.random.choice(here)
            self.will_be_told("time-limit", self.job_of(worker))
            self.hung.add(self.job_of(worker))
            worker.send(signal.SIGSTOP)
            self.slurm("scontrol", "update", f"jobid={self.job_of(worker)}", "EndTime=now+1")

    def results_full(self) -> None:
        self.break_files(errno.ENOSPC)

    def results_read_only(self) -> None:
        self.break_files(self.random.choice([errno.EROFS, errno.EACCES]))

    def results_away(self) -> None:
        self.break_files(errno.ESTALE)

    def break_files(self, code: int) -> None:
        """The folder of results, or all that is labctl's, fails for one side; for the nodes more often."""
        side = self.random.choice(["node", "node", "login"])
        part = self.random.choice(["/.labctl/results", "/.labctl/results", "/.labctl"])
        if not self.injector.is_on(side):
            self.tell(f"  {errno.errorcode[code]} of {part} on the {side} side")
            self.disturbances += 1
            self.made_to_any |= KINDS_OF_ERRNO[code]
            self.injector.begin(side, code, part)
            self.after(1, 2 * self.sweep.pause_s, lambda: self.injector.end(side))

    def move_the_workspace(self) -> None:
        self.made_to_any.add("workspace-moved")
        with self._in_the_workspace:
            self.disturbances += 1
            self.former_roots.append(self.root)
            self.root = self.root.rename(self.disk / f"lab-{len(self.former_roots)}")

    def kill_a_node(self) -> None:
        name = self.random.choice(self.cluster.nodes)
        if not self.controller_is_up or f"slurmd-{name}" not in self.cluster.running_daemons:
            return
        for kind in ("node-failure", "killed"):
            self.will_be_told(kind, *self.slurm("squeue", "--noheader", "--array", f"-w{name}", "--format=%i").split())
        self.cluster.kill_node(name)
        self.cluster.run("scontrol", "update", f"nodename={name}", "state=down", "reason=chaos", check=False)
        self.after(3, 8, lambda: self.bring_back(name))

    def bring_back(self, name: str) -> None:
        if not self.controller_is_up:  # it would not hear that the node is back
            self.after(1, 2, lambda: self.bring_back(name))
            return
        self.cluster.start_node(name)
        self.cluster.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)

    def kill_the_controller(self) -> None:
        if not self.controller_is_up:
            return
        self.controller_is_up = False
        self.made_to_any.add("slurm-silent")
        self.cluster.stop_controller(signal.SIGKILL)
        self.after(2, 6, self.start_the_controller)

    def start_the_controller(self) -> None:
        self.start_the_accounting()  # slurmctld does not start without it before it has saved what it knew of users
        self.cluster.start_controller()
        self.controller_is_up = True

    def stop_the_accounting(self) -> None:
        if "slurmdbd" in self.cluster.running_daemons:
            self.cluster.stop_database_daemon()
            self.after(2, 6, self.start_the_accounting)

    def start_the_accounting(self) -> None:
        if "slurmdbd" not in self.cluster.running_daemons:
            self.cluster.start_database_daemon()

    def requeue_a_job(self) -> None:
        for job in [job for job in self.queued("RUNNING") if job not in self.hung][:1]:
            self.slurm("scontrol", "requeue", job)

    def cancel_some(self) -> None:
        # Slurm keeps no word of an array's task that is cancelled while it waits: it is taken for lost after a minute.
        states = "RUNNING,PENDING" if self.sweep.slow else "RUNNING"
        for job in [job for job in self.queued(states) if job not in self.hung][:2]:
            self.will_be_told("cancelled", job)
            self.slurm("scancel", job)

    def truncate_a_record(self) -> None:
        records = sorted(self.root.glob(".labctl/results/*/[!.]*.json"))
        if records:
            record = self.random.choice(records)
            os.truncate(record, record.stat().st_size // 2)
            self.excused.add(record.parent.name)

    def fill_the_disk(self) -> None:
        if self.disk_is_full:
            return
        self.disk_is_full = True
        self.disturbances += 1
        self.made_to_any |= KINDS_OF_ERRNO[errno.ENOSPC]
        ballast = self.disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
        self.after(1, 4, lambda: self.empty_the_disk(ballast))

    def empty_the_disk(self, ballast: Path) -> None:
        ballast.unlink()
        self.disk_is_full = False

    def after(self, least_s: float, most_s: float, mend: Callable[[], None]) -> None:
        self.later.append((time.monotonic() + self.random.uniform(least_s, most_s), mend))

    # ------------------------------------------------------------ what must always hold

    def watch(self) -> None:
        while not self._stopped.is_set():
            try:
                self.look()
            except Contradiction as error:
                self.violations.append(str(error))
                self.tell(f"CONTRADICTION: {error}")
            time.sleep(1.0)

    def look(self) -> None:
        moves = len(self.former_roots)
        done, disturbed = self.labctl_and_whether_disturbed("status", "chaos", "--json")
        if "Traceback" in done.stderr or done.returncode not in (0, 5):
            raise Contradiction(f"status: {done.returncode}\n{done.stderr}")
        if done.returncode == 5:
            if not disturbed:
                raise Contradiction(f"status failed, and no fault was there: {done.stderr}")
            return
        found = json.loads(done.stdout)
        self.note_kinds(found)
        failed = {run["slurm_id"] for run in found if run["state"] == "failed" and not self.has_record(run)}
        alive = failed & set(self.queued("RUNNING,PENDING"))
        if alive and moves == len(self.former_roots):  # it may have been put back into the queue since
            again = {
                run["slurm_id"] for run in self.statuses() if run["state"] == "failed" and not self.has_record(run)
            }
            still = alive & again & set(self.queued("RUNNING,PENDING"))
            if still and moves == len(self.former_roots):
                raise Contradiction(f"told as failed, and alive in the queue: {still}")

    def note_kinds(self, found: list[dict[str, Any]]) -> None:
        """Keep what each failure was called, of each job the last word."""
        for run in found:
            if run["state"] in ("failed", "cancelled", "timeout", "refused"):
                self.told_kinds[run["run_id"], run["slurm_id"] or run["job_id"]] = (
                    run["kind"], run["detail"], "\n    ".join(run["last_lines"]),
                )  # fmt: skip

    def has_record(self, run: dict[str, Any]) -> bool:
        return any(self.root.glob(f".labctl/results/{run['run_id']}/[!.]*.json"))

    def statuses(self) -> list[dict[str, Any]]:
        done, disturbed = self.labctl_and_whether_disturbed("status", "chaos", "--json")
        if done.returncode != 0:
            if disturbed:
                return []
            raise Contradiction(f"status: {done.returncode}\n{done.stderr}")
        found: list[dict[str, Any]] = json.loads(done.stdout)
        self.note_kinds(found)
        return found

    # ------------------------------------------------------------ what must hold in the end

    def check(self) -> None:
        problems = [*self.violations, *self.wrong_results(), *self.standing(self.wrong_states), *self.wrong_kinds()]
        problems += [f"{root} was made again after it had been moved" for root in self.former_roots if root.exists()]
        if problems:
            raise Contradiction("\n".join([f"seed {self.seed}:", *problems]))

    def standing(self, look: Callable[[], Iterator[str]], for_s: float = 30) -> set[str]:
        """What is wrong at every look for a while: labctl and sacct are asked one after the other, and things move on."""
        wrong = set(look())
        deadline = time.monotonic() + for_s
        while wrong and time.monotonic() < deadline:
            time.sleep(3)
            wrong &= set(look())
        return wrong

    def wrong_results(self) -> Iterator[str]:
        """Runs without one done record, or with more than one and no reason for it."""
        asked = {run["run_id"] for run in self.statuses()}
        if len(asked) != self.sweep.runs:
            yield f"{len(asked)} runs are known, {self.sweep.runs} were asked for"
        twice = []
        for run_id in sorted(asked):
            done = [record for record in self.records(run_id) if record["status"] == "done"]
            if not done:
                yield f"run {run_id} has no result"
            if len(done) > 1 and run_id not in self.excused:
                twice.append((run_id, [record["attempt"]["attempt_id"] for record in done]))
        self.tell(f"measured twice and not excused: {len(twice)}; {len(self.excused)} runs are excused")
        lost = self.jobs_that_were_lost()
        for run_id, attempts in twice:
            if not any(".".join(attempt.split(".")[:2]) in lost for attempt in attempts):
                yield f"run {run_id} was measured twice: {attempts}"

    def wrong_kinds(self) -> Iterator[str]:
        """Failures that were called by another name than that of what was made to happen."""
        told = Counter(kind for kind, _, _ in self.told_kinds.values())
        self.tell(f"told: {dict(told)}")
        wrong: dict[tuple[str, str], list[str]] = {}
        # Those too that a controller which was killed gave to a node after that had died.
        on_a_dead_node = {job for (job, _), state in self.accounted().items() if state == "NODE_FAIL"}
        for (run_id, job), (kind, detail, lines) in self.told_kinds.items():
            right = self.made.get(job, set()) | self.made_to_any
            right |= {"damaged-record"} if run_id in self.excused else set()
            right |= {"node-failure"} if job in on_a_dead_node and self.counts["kill_a_node"] else set()
            not_told_yet = kind == "unknown" and "exit code" not in detail  # the accounting was away, or late
            if kind not in right and not not_told_yet:
                said = f"told as {kind!r} ({detail}); what happened: {sorted(right)}\n    {lines}"
                wrong.setdefault((job, said), []).append(run_id)
        log = (self.cluster.directory / "log" / "slurmctld.log").read_text(errors="replace").splitlines()
        for (job, said), runs in wrong.items():
            of_slurm = "\n    ".join([line for line in log if f"JobId={job}" in line][-8:])
            yield f"{len(runs)} runs of job {job}, such as {runs[0]}: {said}\n    {of_slurm}"

        ended_by_time = {job for (job, _), state in self.accounted().items() if state == "TIMEOUT"} & self.hung
        called: dict[str, set[str]] = {}
        for (_, job), (kind, *_) in self.told_kinds.items():
            called.setdefault(job, set()).add(kind)
        self.tell(f"{len(ended_by_time)} jobs met their time limit")
        if not ended_by_time:
            yield "no job met its time limit"
        for job in ended_by_time & set(called):
            if "time-limit" not in called[job]:
                yield f"job {job} met its time limit, and was told as {called[job]}"

    def records(self, run_id: str) -> Iterator[dict[str, Any]]:
        for path in self.root.glob(f".labctl/results/{run_id}/[!.]*.json"):
            with contextlib.suppress(ValueError):
                yield json.loads(path.read_text(encoding="utf-8"))

    def jobs_that_were_lost(self) -> set[str]:
        """Those that labctl found Slurm to have no more."""
        return {job_id for job_id, state in self.told().items() if state.get("gone_since")}

    def told(self) -> dict[str, dict[str, Any]]:
        """What labctl has kept of each job's state."""
        found: dict[str, dict[str, Any]] = {}
        for path in self.root.glob(".labctl/arrays/*/states.json"):
            found.update(json.loads(path.read_text(encoding="utf-8")))
        return found

    def wrong_states(self) -> Iterator[str]:
        """Jobs of which labctl has kept another end than sacct tells."""
        self.statuses()
        accounted = self.accounted()
        queued = set(self.queued("RUNNING,PENDING,COMPLETING"))  # sacct may not tell yet that one waits again
        compared = 0
        for folder in self.root.glob(".labctl/arrays/*"):
            try:
                ids = json.loads((folder / "submitted.json").read_text(encoding="utf-8")).get("ids", [])
            except OSError:
                continue
            told = json.loads((folder / "states.json").read_text()) if (folder / "states.json").exists() else {}
            for task, slurm_id in enumerate(ids):
                own = told.get(f"{folder.name}.{task}", {})
                theirs = accounted.get((slurm_id, f"labctl-{folder.name}"))
                if own.get("gone_since") or theirs is None:
                    continue
                compared += 1
                if own.get("state") in ALIVE and theirs not in ALIVE and slurm_id not in queued:
                    yield f"job {slurm_id}: labctl says {own.get('state')}, sacct {theirs}"
                if own.get("state") not in ALIVE and own.get("state") != theirs and theirs not in ALIVE:
                    yield f"job {slurm_id}: labctl says {own.get('state')}, sacct {theirs}"

        self.tell(f"{compared} jobs' states compared with sacct's")
        if not compared:
            yield "no job's state could be compared with sacct's"

    def accounted(self) -> dict[tuple[str, str], str]:
        """sacct's last word of each job, by id and name."""
        form = "--format=JobID%40,State,JobName%60,Submit,Start"
        done = self.cluster.run("sacct", "-n", "-X", "-D", "-P", "-S", "now-1days", form)
        rows = [line.split("|") for line in done.stdout.splitlines()]
        return {(row[0], row[2]): row[1].split()[0] for row in sorted(rows, key=lambda row: (row[3], row[4]))}

    # ------------------------------------------------------------ hands

    def labctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start_labctl(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def labctl_and_whether_disturbed(self, *arguments: str) -> tuple[subprocess.CompletedProcess[str], bool]:
        """What it did, and whether the workspace was full, away or moved meanwhile."""
        before = self.disturbances
        broken = self.disk_is_full or self.injector.is_on("login")
        done = self.labctl(*arguments)
        return done, broken or before != self.disturbances

    def start_labctl(self, *arguments: str, **options: Any) -> subprocess.Popen[Any]:
        command = [str(Path(sys.executable).parent / "labctl"), *arguments]
        with self._in_the_workspace:  # it has begun before the workspace moves
            return subprocess.Popen(command, cwd=self.root, env=self.environment(), **options)

    def environment(self) -> dict[str, str]:
        return {**self.cluster.env, **self.injector.environment("login"), "HOME": str(self.disk.parent)}

    def slurm(self, *arguments: str) -> str:
        if not self.controller_is_up:
            return ""
        return self.cluster.run(*arguments, check=False).stdout

    def queued(self, states: str) -> list[str]:
        """The ids of jobs in these states, shuffled."""
        jobs = sorted(self.slurm("squeue", "--noheader", "--array", f"--states={states}", "--format=%i").split())
        return self.random.sample(jobs, len(jobs))

    def tell(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", flush=True)


@contextlib.contextmanager
def small_disk(folder: Path, mib: int = 64) -> Iterator[Path]:
    """A file system of its own, which can be full. Raises CalledProcessError where this user may not mount one."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--chaos-s", type=float, default=None)
    parser.add_argument("--runs-per-job", type=int, default=25)
    parser.add_argument("--jobs-at-once", type=int, default=6)
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    chaos_s = arguments.chaos_s or arguments.runs / 8
    sweep = Sweep(arguments.runs, arguments.runs_per_job, arguments.jobs_at_once, chaos_s)
    install_slurm()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        cluster = stack.enter_context(SlurmCluster(folder / "slurm", job_requeue=False))
        disk = stack.enter_context(small_disk(folder / "disk"))
        try:
            Chaos(cluster, disk, FaultInjector(folder / "faults"), sweep, seed).run()
        except Contradiction as error:
            print(error, file=sys.stderr)
            again = f"python -m tests.slurm.chaos --runs {arguments.runs} --seed {seed}"
            print(f"the same faults again (their moments differ): {again}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
