"""A sweep through faults: everything that may happen on a cluster happens to it, at random moments, from a seed.

    python -m tests.slurm.chaos --runs 1000 [--seed 4711]

Real labctl, real Slurm, real workers; the engine sleeps (tests/slurm/sleeper). The workspace is a file system of its own, so
that it can be full. At the end every run must have its result, once, and no state may contradict what sacct says.

"Once": one record that is done. A second one is right only where labctl had to take the first for lost: its file was
damaged, or its job was forgotten by a controller that was killed.
"""

from __future__ import annotations

import argparse
import contextlib
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

SLEEPER = Path(__file__).parent / "sleeper"
ALIVE = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}
SETTINGS = """
[defaults]
model_id = "{model}"
repeats = 1
warmup = 0
[partitions.dgx2]
device = "cpu"
setup = ["export PYTHONPATH={sleeper}"]
env = {{ SLEEPER_LOAD_S = "{load_s}", SLEEPER_RUN_S = "{run_s}" }}
[partitions.dgxh]
device = "cpu"
setup = ["export PYTHONPATH={sleeper}"]
env = {{ SLEEPER_LOAD_S = "{load_s}", SLEEPER_RUN_S = "{run_s}" }}
"""


class Contradiction(AssertionError):
    """labctl said something that is not so."""


@dataclass
class Sweep:
    """How many runs, how they are packed, and for how long faults are thrown in."""

    runs: int
    runs_per_job: int
    jobs_at_once: int
    chaos_s: float
    run_s: float = 1.0
    load_s: float = 0.5


@dataclass
class Chaos:
    """One sweep on one cluster, in the folder `root`, which may be full for a while."""

    cluster: SlurmCluster
    root: Path
    sweep: Sweep
    seed: int
    began: float = field(default_factory=time.monotonic)
    counts: Counter[str] = field(default_factory=Counter)
    excused: set[str] = field(default_factory=set)
    later: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    disk_is_full: bool = False
    controller_is_up: bool = True
    violations: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._stopped = threading.Event()

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
        model = write_checkpoint(self.root / "model")
        text = SETTINGS.format(model=model, sleeper=SLEEPER, load_s=self.sweep.load_s, run_s=self.sweep.run_s)
        (self.root / "labctl.toml").write_text(text, encoding="utf-8")
        lengths = list(range(1, self.sweep.runs // 2 + 1))
        (self.root / "sweep.toml").write_text(
            f'name = "chaos"\npartition = ["dgx2", "dgxh"]\nmax_new_tokens = {lengths}\n'
            f"runs_per_job = {self.sweep.runs_per_job}\njobs_at_once = {self.sweep.jobs_at_once}\n",
            encoding="utf-8",
        )

    def submit_while_it_is_killed(self) -> None:
        """kill -9 of labctl in the middle of submit, at three moments; then once in peace."""
        for _ in range(3):
            self.kill_labctl("submit", "sweep.toml", within_s=1.5)
        done = self.labctl("submit", "sweep.toml")
        if done.returncode != 0:
            raise Contradiction(f"submit: {done.returncode} {done.stderr}")

    def throw_faults(self) -> None:
        faults = [
            self.kill_labctl_status, self.kill_labctl_collect, self.kill_a_worker, self.kill_a_node, self.kill_the_controller,
            self.stop_the_accounting, self.requeue_a_job, self.cancel_some, self.truncate_a_record, self.fill_the_disk,
            self.retry_in_the_middle, self.retry_in_the_middle, self.kill_labctl_retry,
        ]  # fmt: skip
        order: list[Callable[[], None]] = []
        until = time.monotonic() + self.sweep.chaos_s
        while time.monotonic() < until:
            if not order:  # each fault once before any comes again
                order = self.random.sample(faults, len(faults))
            fault = order.pop()
            self.tell(fault.__name__)
            self.counts[fault.__name__] += 1
            fault()
            pause_until = time.monotonic() + self.random.uniform(0.5, 3.0)
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
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "labctl"), *arguments],
            cwd=self.root,
            env=self.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
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
        full_before = self.disk_is_full
        done = self.labctl("retry", "chaos")
        bad = "Traceback" in done.stderr or (done.returncode != 0 and self.controller_is_up and not full_before)
        if bad and not self.disk_is_full:
            self.violations.append(f"retry: {done.returncode} {done.stderr}")

    def kill_a_worker(self) -> None:
        workers = [p for p in _living_processes() if self.is_a_worker(p)]
        if workers:
            self.random.choice(workers).send(signal.SIGKILL)

    def is_a_worker(self, process: Process) -> bool:
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            return b"labctl_workers.start" in line and os.fsencode(self.root) in line
        return False

    def kill_a_node(self) -> None:
        name = self.random.choice(self.cluster.nodes)
        if not self.controller_is_up or f"slurmd-{name}" not in self.cluster.running_daemons:
            return
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
        for job in self.queued("RUNNING")[:1]:
            self.slurm("scontrol", "requeue", job)

    def cancel_some(self) -> None:
        for job in self.queued("RUNNING,PENDING")[:2]:
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
        ballast = self.root / "ballast"
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
        full_before = self.disk_is_full
        done = self.labctl("status", "chaos", "--json")
        if "Traceback" in done.stderr or done.returncode not in (0, 5):
            raise Contradiction(f"status: {done.returncode}\n{done.stderr}")
        if done.returncode == 5:
            if not (full_before or self.disk_is_full):
                raise Contradiction(f"status failed, and the disk had room: {done.stderr}")
            return
        failed = {
            run["slurm_id"] for run in json.loads(done.stdout) if run["state"] == "failed" and not self.has_record(run)
        }
        alive = failed & set(self.queued("RUNNING,PENDING"))
        if alive:  # it may have been put back into the queue since
            again = {
                run["slurm_id"] for run in self.statuses() if run["state"] == "failed" and not self.has_record(run)
            }
            if still := alive & again & set(self.queued("RUNNING,PENDING")):
                raise Contradiction(f"told as failed, and alive in the queue: {still}")

    def has_record(self, run: dict[str, Any]) -> bool:
        return any(self.root.glob(f".labctl/results/{run['run_id']}/[!.]*.json"))

    def statuses(self) -> list[dict[str, Any]]:
        done = self.labctl("status", "chaos", "--json")
        if done.returncode != 0:
            if self.disk_is_full:
                return []
            raise Contradiction(f"status: {done.returncode}\n{done.stderr}")
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    # ------------------------------------------------------------ what must hold in the end

    def check(self) -> None:
        problems = [*self.violations, *self.wrong_results(), *self.standing(self.wrong_states)]
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
        for path in self.root.glob(".labctl/batches/*/states.json"):
            found.update(json.loads(path.read_text(encoding="utf-8")))
        return found

    def wrong_states(self) -> Iterator[str]:
        """Jobs of which labctl has kept another end than sacct tells."""
        self.statuses()
        accounted = self.accounted()
        queued = set(self.queued("RUNNING,PENDING,COMPLETING"))  # sacct may not tell yet that one waits again
        compared = 0
        for folder in self.root.glob(".labctl/batches/*"):
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
        return subprocess.run(
            [str(Path(sys.executable).parent / "labctl"), *arguments],
            cwd=self.root,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def environment(self) -> dict[str, str]:
        return {**self.cluster.env, "HOME": str(self.root.parent)}

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
        cluster = stack.enter_context(SlurmCluster(folder / "slurm"))
        root = stack.enter_context(small_disk(folder / "lab"))
        try:
            Chaos(cluster, root, sweep, seed).run()
        except Contradiction as error:
            print(error, file=sys.stderr)
            again = f"python -m tests.slurm.chaos --runs {arguments.runs} --seed {seed}"
            print(f"the same faults again (their moments differ): {again}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
