"""labctl status --watch on a real pseudo-terminal, as a terminal emulator shows it, and in a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import pyte
import pytest

from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.terminal import watch
from labctl_orchestrator.tracking import refresh, status, times
from labctl_orchestrator.tracking.run_status import RunStatus

from .conftest import JobArray, Labctl, Records, Slurm, sacct_line, squeue_line

CODE = "import sys; from labctl_orchestrator.cli import main; main(sys.argv[1:])"


@dataclass
class Terminal:
    """A labctl in a terminal, and what its screen shows."""

    columns: int = 80
    lines: int = 24
    env: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ("status", "--watch")
    sent: bytes = b""

    def __post_init__(self) -> None:
        self.screen = pyte.Screen(self.columns, self.lines)
        self.stream = pyte.ByteStream(self.screen)
        self.master, slave = pty.openpty()
        self.size(self.columns, self.lines)
        environment = {**os.environ, "TERM": "xterm-256color", **self.env}
        environment.pop("COLUMNS", None)
        environment.pop("LINES", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE, *self.arguments], stdin=slave, stdout=slave, stderr=slave, env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )  # fmt: skip
        os.close(slave)

    def size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.screen.resize(lines, columns)

    def read(self, for_s: float) -> None:
        end = time.monotonic() + for_s
        while (left := end - time.monotonic()) > 0:
            if select.select([self.master], [], [], left)[0]:
                try:
                    data = os.read(self.master, 65536)
                except OSError:
                    return
                self.sent += data
                self.stream.feed(data)

    @property
    def shown(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def until(self, holds: Callable[[str], bool], within_s: float = 20) -> str:
        end = time.monotonic() + within_s
        while not holds(self.shown):
            assert time.monotonic() < end, self.shown
            self.read(0.1)
        return self.shown

    def ends(self, within_s: float = 20) -> int:
        end = time.monotonic() + within_s
        while self.process.poll() is None:
            assert time.monotonic() < end, self.shown
            self.read(0.1)
        self.read(0.2)
        return self.process.returncode

    def interrupt(self) -> None:
        os.write(self.master, b"\x03")


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(**values: object) -> Terminal:
        started.append(Terminal(**values))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait()
        os.close(one.master)


@pytest.fixture
def sweep(records: Records, slurm: Slurm) -> JobArray:
    """Two jobs of two runs: one runs and has one run done, one waits."""
    batch = records.submit(dtypes=("float16", "bfloat16"), lengths=(8, 16), name="sweep")
    attempt = records.attempt(batch, 0)
    records.done(batch, attempt, batch.jobs[0].runs[0])
    records.heartbeat(batch, attempt, "measuring", run_id=batch.jobs[0].runs[1].run_id, done=1)
    name = f"labctl-{batch.array_id}"
    queued = squeue_line("1000_0", "RUNNING", name)
    queued += squeue_line("1000_1", "PENDING", name, reason="Resources", node="")
    slurm.shows(queued)
    return batch


def finish(records: Records, slurm: Slurm, batch: JobArray) -> None:
    for task in (0, 1):
        attempt = records.attempt(batch, task, age_s=30)
        for run in batch.jobs[task].runs:
            records.done(batch, attempt, run)
    name = f"labctl-{batch.array_id}"
    slurm.shows("", "".join(sacct_line(f"1000_{task}", "COMPLETED", name) for task in (0, 1)))


def whole(terminal: Terminal) -> bool:
    """The cursor is visible again, and below what was written."""
    return b"\x1b[?25h" in terminal.sent.rpartition(b"\x1b[?25l")[2] and not terminal.screen.cursor.hidden


@pytest.mark.parametrize("columns", [80, 40])
def test_the_frame_tells_counts_jobs_and_an_end(
    terminal: Callable[..., Terminal], sweep: JobArray, columns: int
) -> None:
    shown = terminal(columns=columns).until(lambda shown: "1000_0" in shown)
    assert "sweep: 4 runs: 1 done" in shown
    assert any(line.startswith("about ") and "left, until" in line for line in shown.splitlines())
    line = next(line for line in shown.splitlines() if line.startswith("1000_0"))
    assert line.startswith("1000_0  1/2  running  dgxh-1  measur")
    assert any(line.startswith("1000_1  0/2  pending") for line in shown.splitlines())


def test_it_ends_by_itself_and_leaves_the_last_frame(
    terminal: Callable[..., Terminal], records: Records, slurm: Slurm, sweep: JobArray
) -> None:
    one = terminal()
    one.until(lambda shown: "1000_0" in shown)
    finish(records, slurm, sweep)
    assert one.ends() == 0
    assert "sweep: 4 runs: 4 done" in one.shown
    assert "1 running" not in one.shown
    assert whole(one)


def test_ctrl_c_ends_it_at_once_with_the_terminal_whole(terminal: Callable[..., Terminal], sweep: JobArray) -> None:
    one = terminal()
    one.until(lambda shown: "1000_0" in shown)
    begun = time.monotonic()
    one.interrupt()
    assert one.ends() == 130
    assert time.monotonic() - begun < 3
    assert whole(one)
    assert "1000_0  1/2" in one.shown
    assert one.shown.count("sweep: 4 runs") == 1
    assert "Traceback" not in one.shown


def test_ctrl_c_works_while_slurm_is_silent_and_the_clock_goes_on(
    terminal: Callable[..., Terminal], slurm: Slurm, sweep: JobArray
) -> None:
    one = terminal()
    one.until(lambda shown: "1000_0" in shown)
    for program in ("squeue", "sacct"):
        slurm._write(program, "exec /bin/sleep 30\n")
    one.read(3)
    before = len(one.sent)
    one.read(2)
    assert len(one.sent) > before
    begun = time.monotonic()
    one.interrupt()
    assert one.ends() == 130
    assert time.monotonic() - begun < 3


def test_an_outage_keeps_the_last_known_states_tells_since_when_and_passes(
    terminal: Callable[..., Terminal], records: Records, slurm: Slurm, sweep: JobArray
) -> None:
    one = terminal()
    one.until(lambda shown: "1000_0" in shown)
    slurm.is_silent()
    shown = one.until(lambda shown: "did not answer" in shown.replace("\n", " "))
    assert "1000_0  1/2  running" in shown
    finish(records, slurm, sweep)
    assert one.ends(30) == 0
    assert "did not answer" not in one.shown


def test_the_database_made_again_by_another_labctl_does_not_end_it(
    terminal: Callable[..., Terminal], labctl: Labctl, records: Records, slurm: Slurm, sweep: JobArray
) -> None:
    one = terminal()
    one.until(lambda shown: "1000_0" in shown)
    assert labctl("collect", "--rebuild").code == 0
    finish(records, slurm, sweep)
    assert one.ends() == 0
    assert "4 done" in one.shown


def test_a_terminal_made_narrower_shows_one_frame(terminal: Callable[..., Terminal], sweep: JobArray) -> None:
    one = terminal()
    one.until(lambda shown: "1000_0" in shown)
    one.size(40, 24)
    one.process.send_signal(signal.SIGWINCH)
    one.read(2)
    assert one.shown.count("sweep: 4 runs") == 1
    assert one.shown.count("1000_0 ") == 1


def test_without_colour_no_colour_is_sent(terminal: Callable[..., Terminal], sweep: JobArray) -> None:
    one = terminal(env={"NO_COLOR": "1"})
    one.until(lambda shown: "1000_0" in shown)
    for colour in (b"\x1b[3", b"\x1b[9", b";3", b"\x1b[38"):
        assert colour not in one.sent.replace(b"\x1b[3J", b"").replace(b"\x1b[3m", b"")


def test_in_a_pipe_a_plain_line_tells_each_change(records: Records, slurm: Slurm, sweep: JobArray) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CODE, "status", "-w"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "sweep: 4 runs: 1 done, 1 running, 2 pending\n"
        finish(records, slurm, sweep)
        rest, _ = process.communicate(timeout=30)
    assert rest == "sweep: 4 runs: 4 done\n"
    assert process.returncode == 0


def test_a_dumb_terminal_gets_plain_lines(
    terminal: Callable[..., Terminal], records: Records, slurm: Slurm, sweep: JobArray
) -> None:
    one = terminal(env={"TERM": "dumb"})
    one.until(lambda shown: "1 running" in shown)
    finish(records, slurm, sweep)
    assert one.ends() == 0
    assert b"\x1b" not in one.sent


def run(job: int, state: str, number: int = 0) -> RunStatus:
    return RunStatus(
        f"{job}-{number}", "dgxh", "hf", "m", "float16", 8, 1, "greedy", state, slurm_id=f"7_{job}", job_id=f"b.{job}"
    )


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (40, 10), (40, 8)])
def test_a_frame_is_never_higher_than_the_screen_and_tells_what_it_leaves_out(columns: int, lines: int) -> None:
    from rich.console import Console

    out = Console(width=columns, height=lines, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    found = [run(job, "failed" if job % 2 else "running") for job in range(100)]
    frame = watch.frame(watch.Snapshot(found, ["squeue does not answer"], None, time.time() - 60), "sweep", out)
    drawn = out.render_lines(frame, pad=False)
    assert len(drawn) < lines
    text = ["".join(segment.text for segment in line) for line in drawn]
    assert "more jobs" in text[-1]
    assert any("no estimate yet" in line for line in text)


def test_watching_and_json_are_not_for_the_same_reader(labctl: Labctl, sweep: JobArray) -> None:
    ran = labctl("status", "--watch", "--json")
    assert ran.code == 2
    assert "--watch and --json exclude each other" in ran.err


def test_the_estimate_is_the_median_of_what_ended_over_the_jobs_that_run(records: Records, slurm: Slurm) -> None:
    batch = records.submit(dtypes=("float16", "bfloat16"), lengths=(8, 16))
    records.done(batch, records.attempt(batch, 0, slurm_id="1000_0"), batch.jobs[0].runs[0], load_s=7.0)
    name = f"labctl-{batch.array_id}"
    slurm.shows(squeue_line("1000_0", "RUNNING", name) + squeue_line("1000_1", "PENDING", name))
    with closing(open_store(records.workspace)) as store:
        refresh.refresh(records.workspace, store)
        found = status.statuses(records.workspace, store, [run.run_id for run in batch.runs])
        (row,) = store.rows("SELECT started_at, ended_at, load_s, init_s FROM results")
        run_s = times.age_s(row["started_at"]) - times.age_s(row["ended_at"])
        # one run runs and two wait in a job that has yet to load; one job runs at once
        expected = 3 * run_s + 7.0 + (row["init_s"] or 0)
        assert watch.left_s(store, found) == pytest.approx(expected, abs=0.05)
        assert watch.left_s(store, [run for run in found if run.state == "pending"]) is None
