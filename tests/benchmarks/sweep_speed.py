"""How long labctl takes with many runs, beside what can be no faster and beside what others take, all in one run.

    python -m tests.benchmarks.sweep_speed [--cells 1000] [--stored 10000] [--rounds 3]

On the test cluster (tests/slurm/cluster.py), with its partition down, so that what is queued stays queued. Each figure is the
median of the rounds, the wall time of a whole command in a process of its own; "cpu" is the least user and system time of it and
what it started, which other people's work on the machine disturbs less. "own" is the wall time less what squeue and sacct took.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from labctl_orchestrator.store.workspace import Workspace
from labctl_workers.record import read_json, write_json
from tests.conftest import write_checkpoint
from tests.slurm.cluster import SlurmCluster, install_slurm

from .large_workspace import Size, write_workspace

LABCTL = str(Path(sys.executable).parent / "labctl")
COMPETITORS = ("sbatchman", "hydra_plugins.hydra_submitit_launcher")
PARTITION = "dgxh"

SUBMITIT_SUBMIT = """
import sys, submitit
executor = submitit.SlurmExecutor(folder=sys.argv[1])
executor.update_parameters(partition=sys.argv[2], time=60, array_parallelism=1000)
jobs = executor.map_array(abs, range(int(sys.argv[3])))
print(jobs[0].job_id.split("_")[0])
"""
SUBMITIT_STATUS = """
import sys, submitit
jobs = [submitit.SlurmJob(sys.argv[1], f"{sys.argv[2]}_{task}") for task in range(int(sys.argv[3]))]
print({job.state for job in jobs})
"""
BARE_COLLECT = """
import glob, json, sqlite3, sys
database = sqlite3.connect(sys.argv[2], isolation_level=None)
database.execute("CREATE TABLE samples (run TEXT, attempt TEXT, repeat INT, request INT, tokens INT, ttft REAL, e2e REAL,"
                 " text TEXT, PRIMARY KEY (run, attempt, repeat, request))")
database.execute("BEGIN")
for path in sorted(glob.glob(sys.argv[1] + "/results/*/*.json")):
    with open(path, "rb") as file:
        record = json.load(file)
    key = (record["run_id"], record["attempt"]["attempt_id"])
    database.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?)", [
        (*key, repeat["repeat"], sample["request"], len(sample["token_ids"]), sample["token_times_s"][0],
         sample["token_times_s"][-1], sample["text"])
        for repeat in record["repeats"] for sample in repeat["samples"]])
database.execute("COMMIT")
"""
BARE_QUERY = """
import collections, sqlite3, statistics, sys
values = collections.defaultdict(list)
for run, value in sqlite3.connect(sys.argv[1]).execute("SELECT run_id, output_tok_s FROM repeats"):
    values[run].append(value)
print(len({run: statistics.median(of_run) for run, of_run in values.items()}))
"""


def main() -> int:
    """Run everything; the exit status tells whether a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--stored", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=34, help="of a repeat; a record has three")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stored-only", action="store_true", help="only the stored runs: collect, compare and status")
    given = parser.parse_args()
    table = Table()
    with tempfile.TemporaryDirectory(prefix="labctl-speed-") as folder:
        root = Path(folder)
        install_slurm()
        with SlurmCluster(root / "slurm") as cluster:
            cluster.run("scontrol", "update", f"partitionname={PARTITION}", "state=down")
            bench = Bench(root, cluster, given.rounds, table)
            if not given.stored_only:
                bench.sweeps(given.cells)
            bench.stored(Size(given.stored, 25, given.requests), "")
            bench.stored(Size(given.stored, 1, 1), ", one job and one request each")
    for name in COMPETITORS:
        if not _is_there(name):
            print(f"{name.rpartition('.')[2]}: not installed, not measured")
    return table.end()


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


class Took(NamedTuple):
    """Seconds that a command took: on the clock, and of processors."""

    wall_s: float
    cpu_s: float


@dataclass
class Table:
    """Prints a line as it is known; counts the targets that were missed."""

    missed: int = 0

    def head(self, title: str) -> None:
        print(f"\n{title}\n{'':44} {'seconds':>9} {'cpu':>8} {'target':>8}", flush=True)

    def line(self, what: str, took: Took, target_s: float | None = None, floor: Took | None = None) -> None:
        late = target_s is not None and took.wall_s > target_s
        self.missed += late
        target = "" if target_s is None else f"{target_s:8.2f}"
        times = "" if floor is None else f"  {took.wall_s / floor.wall_s:.1f} x the floor"
        figures = f"{took.wall_s:9.3f} {took.cpu_s:8.3f} {target:>8}"
        print(f"  {what:<42} {figures} {'MISSED' if late else ''}{times}", flush=True)

    def note(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def end(self) -> int:
        print(f"{self.missed} targets missed")
        return 1 if self.missed else 0


@dataclass
class Bench:
    """The measurements on one cluster, with their files in the folder `root`."""

    root: Path
    cluster: SlurmCluster
    rounds: int
    table: Table
    calls: Path = field(init=False)

    def __post_init__(self) -> None:
        self.calls = self.root / "calls"
        programs = self.root / "counted"
        programs.mkdir()
        for name in ("squeue", "sacct"):
            real = shutil.which(name)
            (programs / name).write_text(
                f'#!/bin/sh\nbegan=$(date +%s%N)\n{real} "$@"\nstatus=$?\n'
                f'echo {name} $(($(date +%s%N) - began)) >> {self.calls}\nexit $status\n'
            )  # fmt: skip
            (programs / name).chmod(0o755)
        (self.root / "home").mkdir()
        self.environment = {**self.cluster.env, "HOME": str(self.root / "home")}
        # pip compiles what it installs; here the first run does, which is not timed.
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self.counted = {**self.environment, "PATH": f"{programs}:{self.environment['PATH']}"}

    # ------------------------------------------------------------ a sweep in the queue

    def sweeps(self, cells: int) -> None:
        """Submit the sweep, and ask where it stands."""
        self.table.head(f"submit {cells:,} cells, an engine load each")
        sbatch = self.median(lambda: self.timed(self.sbatch(cells)), after=self.empty_queue)
        self.table.line("sbatch --array", sbatch)
        script = [sys.executable, "-c", SUBMITIT_SUBMIT, str(self.root / "submitit"), PARTITION, str(cells)]
        self.table.line("submitit map_array", self.median(lambda: self.timed(script), after=self.empty_queue))
        labs = (self.lab(f"lab{number}", cells) for number in range(self.rounds))
        submit = [LABCTL, "submit", "sweep.toml", "--json"]
        took = self.median(lambda: self.timed(submit, cwd=next(labs)), after=self.empty_queue)
        self.table.line("labctl submit", took, 2.0 * cells / 1000, sbatch)
        self.status_of_a_queue(cells)

    def status_of_a_queue(self, cells: int) -> None:
        self.table.head(f"status of {cells:,} live cells")
        lab = self.lab("live", cells)
        self.timed([LABCTL, "submit", "sweep.toml", "--json"], cwd=lab)
        squeue = self.median(lambda: self.timed(["squeue", "--array", "--noheader", "--me"]))
        sacct = self.median(lambda: self.timed(["sacct", "--noheader", "--allocations"]))
        self.table.line("squeue", squeue)
        self.table.line("sacct", sacct)
        (ids,) = {
            line.split("_")[0] for line in self.output(["squeue", "--array", "--noheader", "--format=%i"]).split()
        }
        script = [sys.executable, "-c", SUBMITIT_STATUS, str(self.root / "submitit"), ids, str(cells)]
        self.table.line("submitit, state of each job", self.median(lambda: self.timed(script)))
        took = self.median(lambda: self.timed([LABCTL, "status"], cwd=lab))
        self.table.line("labctl status", took, 0.5, squeue)
        self.empty_queue()

    def lab(self, name: str, cells: int) -> Path:
        """A workspace to submit from."""
        lab = self.root / name
        lab.mkdir()
        model = write_checkpoint(lab / "model")
        (lab / "labctl.toml").write_text(f'[partitions.{PARTITION}]\ndevice = "cpu"\n', encoding="utf-8")
        (lab / "sweep.toml").write_text(
            textwrap.dedent(f"""
            partition = ["{PARTITION}"]
            model_id = "{model}"
            max_new_tokens = {list(range(1, cells + 1))}
            runs_per_job = 1
            """),
            encoding="utf-8",
        )
        return lab

    def sbatch(self, cells: int) -> list[str]:
        script = self.root / "nothing.sh"
        script.write_text("#!/bin/sh\ntrue\n", encoding="utf-8")
        return ["sbatch", f"--array=0-{cells - 1}", f"--partition={PARTITION}", "--output=/dev/null", str(script)]

    def empty_queue(self) -> None:
        self.cluster.run("scancel", f"--partition={PARTITION}")
        while self.output(["squeue", "--noheader", f"--partition={PARTITION}"]).strip():
            time.sleep(0.2)

    # ------------------------------------------------------------ a year of results

    def stored(self, size: Size, how: str) -> None:
        """Collect a large workspace, ask for its status, and compare its runs."""
        root = self.root / f"stored-{size.requests}"
        workspace = write_workspace(root, size)
        samples = size.runs * 3 * size.requests
        self.table.head(f"collect {size.runs:,} records, {samples:,} requests{how}")
        bare = self.median(lambda: self.timed(self.bare_collect(workspace)))
        self.table.line("json, sqlite3 executemany of the samples alone", bare)
        took = self.median(lambda: self.collect_anew(workspace))
        self.table.line("labctl collect", took, 5.0, bare)
        self.table.line("labctl collect, nothing new", self.median(lambda: self.timed([LABCTL, "collect"], cwd=root)))
        self.compare(workspace, size)
        self.status_of_what_is_stored(workspace, size)
        shutil.rmtree(root)

    def bare_collect(self, workspace: Workspace) -> list[str]:
        database = self.root / "bare.db"
        database.unlink(missing_ok=True)
        return [sys.executable, "-c", BARE_COLLECT, str(workspace.data), str(database)]

    def collect_anew(self, workspace: Workspace) -> Took:
        workspace.database.unlink(missing_ok=True)
        return self.timed([LABCTL, "collect"], cwd=workspace.root)

    def compare(self, workspace: Workspace, size: Size) -> None:
        self.table.head(f"compare one metric of {size.runs:,} runs")
        query = [sys.executable, "-c", BARE_QUERY, str(workspace.database)]
        bare = self.median(lambda: self.timed(query))
        self.table.line("the bare query and medians, in a new Python", bare)
        command = [LABCTL, "compare", "--all", "--metric", "output_tok_s"]
        for shown in ([], ["--csv"], ["--by", "max_new_tokens"]):
            took = self.median(lambda shown=shown: self.timed([*command, *shown], cwd=workspace.root))  # type: ignore[misc]
            self.table.line(" ".join(["labctl compare", *shown]), took, 0.5, bare)

    def status_of_what_is_stored(self, workspace: Workspace, size: Size) -> None:
        """One batch still runs, as far as labctl knows: Slurm, which never had it, has to be asked."""
        self.table.head(f"status of {size.runs:,} stored runs")
        states = workspace.arrays / "00000000-1" / "states.json"
        document = read_json(states)
        for state in document.values():
            state.update(state="RUNNING", ended_at=None)
        write_json(states, document)
        own, counts = [], set()
        for _ in range(self.rounds):
            self.calls.unlink(missing_ok=True)
            took = self.timed([LABCTL, "status", "--all"], cwd=workspace.root, environment=self.counted)
            calls = [line.split() for line in self.calls.read_text(encoding="utf-8").splitlines()]
            own.append(took._replace(wall_s=took.wall_s - sum(int(nanoseconds) for _, nanoseconds in calls) / 1e9))
            counts.add(" ".join(sorted(name for name, _ in calls)))
        rounds = iter(own)
        self.table.line("labctl status --all, own", self.median(lambda: next(rounds)), 1.0)
        self.table.note(f"asked: {', '.join(counts)}")
        self.table.missed += counts != {"sacct squeue"}

    # ------------------------------------------------------------ the clock

    def median(self, measure: Callable[[], Took], *, after: Callable[[], None] = lambda: None) -> Took:
        """The median of the wall times, and the least of the processors'."""
        times = []
        for _ in range(self.rounds):
            times.append(measure())
            after()
        return Took(statistics.median(took.wall_s for took in times), min(took.cpu_s for took in times))

    def timed(self, command: list[str], *, cwd: Path | None = None, environment: dict[str, str] | None = None) -> Took:
        """What a command takes that must succeed."""
        cpu_before, began = _cpu_s(), time.perf_counter()
        done = subprocess.run(
            command,
            cwd=cwd or self.root,
            env=environment or self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        took = Took(time.perf_counter() - began, _cpu_s() - cpu_before)
        if done.returncode != 0:
            raise SystemExit(
                f"{' '.join(command)[:200]}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            )
        return took

    def output(self, command: list[str]) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout


def _cpu_s() -> float:
    """User and system time of all processes that have been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    os.umask(0o022)
    raise SystemExit(main())
