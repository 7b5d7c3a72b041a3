"""labctl status --watch, in a real pseudo-terminal (pyte is its screen), in a pipe, and what is reckoned."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import closing

import pyte
import pytest

from labctl_orchestrator import status, watch
from labctl_orchestrator.collect import open_store

from .conftest import Batch, Labctl, Records, Slurm, sacct_line, squeue_line

PROGRAM = "import sys; from labctl_orchestrator.cli import main; main(sys.argv[1:])"


class Terminal:
    """labctl on a pseudo-terminal of this size, and the screen that a person sees."""

    def __init__(self, *arguments: str, width: int, height: int = 24, **environment: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        own = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**own, "TERM": "xterm-256color", **environment},
            preexec_fn=_take_the_terminal,  # noqa: PLW1509  one thread, in a test
        )
        os.close(slave)
        self.screen = pyte.Screen(width, height)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        os.set_blocking(self.master, False)

    def read(self) -> None:
        try:
            while part := os.read(self.master, 65536):
                self.raw += part
                self.stream.feed(part)
        except BlockingIOError:
            pass
        except OSError as error:
            assert error.errno == errno.EIO  # the other end is closed

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def until(self, true: Callable[[], bool], timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.05)
            self.read()

    def ends(self, timeout_s: float = 20) -> int:
        self.until(lambda: self.process.poll() is not None, timeout_s)
        self.read()
        os.close(self.master)
        return self.process.returncode


def _take_the_terminal() -> None:
    """Ctrl-C is for the processes of the terminal that controls them."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def sweep(records: Records, slurm: Slurm) -> Batch:
    """Three jobs of two runs each: one that is half done, one that failed, one that waits."""
    batch = records.submit(dtypes=("float16", "bfloat16", "float32"), lengths=(8, 16), name="lengths")
    first = records.attempt(batch, 0, slurm_id="1000_0")
    records.done(batch, first, batch.jobs[0].runs[0])
    records.heartbeat(batch, first, "measuring", run_id=batch.jobs[0].runs[1].run_id, done=1)
    name = f"labctl-{batch.batch_id}"
    slurm.shows(
        squeue_line("1000_0", "RUNNING", name) + squeue_line("1000_2", "PENDING", name, reason="Resources"),
        sacct_line("1000_1", "NODE_FAIL", name),
    )
    return batch


@pytest.mark.parametrize("width", [80, 40])
def test_each_job_has_a_line_that_fits_and_the_end_is_estimated(sweep: Batch, width: int) -> None:
    terminal = Terminal("status", "--watch", width=width)
    terminal.until(lambda: any("measuring" in line for line in terminal.lines))
    lines = terminal.lines
    assert lines[0].startswith("lengths: 6 runs: 1 done")
    assert any(line.startswith("1000_0  1/2  running  dgxh-1") for line in lines)
    assert any(line.startswith("1000_1  0/2  failed") for line in lines)
    assert any("pending" in line and "Resources" in line for line in lines)
    assert any(line.startswith("about ") and "left, until" in line for line in lines)
    assert any(line.startswith("[###") and line.endswith(" 1/6") for line in lines)
    os.write(terminal.master, b"\x03")
    assert terminal.ends() == 130


def test_ctrl_c_leaves_the_terminal_whole_and_what_was_shown_readable(sweep: Batch) -> None:
    terminal = Terminal("status", "--watch", width=80)
    terminal.until(lambda: any("measuring" in line for line in terminal.lines))
    os.write(terminal.master, b"\x03")
    assert terminal.ends() == 130
    assert terminal.raw.count(b"\x1b[?25h") >= terminal.raw.count(b"\x1b[?25l") > 0  # the cursor is there again
    assert not terminal.screen.cursor.hidden
    assert any("measuring" in line for line in terminal.lines)
    assert terminal.lines[-1].endswith("labctl: interrupted")
    assert "Traceback" not in "\n".join(terminal.lines)


def test_ctrl_c_works_at_once_while_slurm_is_silent(records: Records, slurm: Slurm) -> None:
    records.submit()
    slurm._write("squeue", "exec /bin/sleep 30\n")
    terminal = Terminal("status", "--watch", width=80)
    terminal.until(lambda: any("asking Slurm" in line for line in terminal.lines), timeout_s=30)
    began = time.monotonic()
    os.write(terminal.master, b"\x03")
    assert terminal.ends() == 130
    assert time.monotonic() - began < 5


def test_it_ends_by_itself_when_every_run_has_ended(sweep: Batch, records: Records, slurm: Slurm) -> None:
    terminal = Terminal("status", "--watch", width=80)
    terminal.until(lambda: any("measuring" in line for line in terminal.lines))
    for task in (0, 2):
        attempt = records.attempt(sweep, task, slurm_id=f"1000_{task}")
        for run in sweep.jobs[task].runs:
            records.done(sweep, attempt, run)
    name = f"labctl-{sweep.batch_id}"
    rows = ("COMPLETED", "NODE_FAIL", "COMPLETED")
    slurm.shows("", "".join(sacct_line(f"1000_{task}", state, name) for task, state in enumerate(rows)))
    assert terminal.ends() == 0
    assert any(line.startswith("lengths: 6 runs: 4 done, 2 failed") for line in terminal.lines)
    assert any("2 jobs done, 4 runs" in line for line in terminal.lines)
    assert any("all have ended" in line for line in terminal.lines)


def test_a_silent_slurm_keeps_the_last_known_states_and_is_heard_again(sweep: Batch, slurm: Slurm) -> None:
    terminal = Terminal("status", "--watch", width=80)
    terminal.until(lambda: any("measuring" in line for line in terminal.lines))
    shown = (slurm.folder / "squeue").read_text(encoding="utf-8")
    slurm.is_silent()
    terminal.until(lambda: any("last known ones" in line for line in terminal.lines))
    assert any(line.startswith("1000_0  1/2  running") for line in terminal.lines)
    slurm._write("squeue", shown.partition("\n")[2])
    terminal.until(lambda: not any("last known ones" in line for line in terminal.lines), timeout_s=40)
    os.write(terminal.master, b"\x03")
    assert terminal.ends() == 130


def test_a_low_terminal_shows_what_runs_and_how_much_more_there_is(records: Records, slurm: Slurm) -> None:
    batch = records.submit(lengths=(8,), dtypes=tuple(f"float{bits}" for bits in range(30)))
    name = f"labctl-{batch.batch_id}"
    slurm.shows("".join(squeue_line(f"1000_{task}", "RUNNING", name) for task in range(30)))
    terminal = Terminal("status", "--watch", width=80, height=12)
    terminal.until(lambda: any("more jobs" in line for line in terminal.lines))
    time.sleep(1.5)  # some frames
    terminal.read()
    assert terminal.lines[0].startswith("2026") or "30 runs: 30 running" in terminal.lines[0]
    assert sum("running" in line for line in terminal.lines[1:]) >= 5
    os.write(terminal.master, b"\x03")
    terminal.ends()


def test_no_colour_is_no_colour(sweep: Batch) -> None:
    terminal = Terminal("status", "--watch", width=80, NO_COLOR="1")
    terminal.until(lambda: any("measuring" in line for line in terminal.lines))
    os.write(terminal.master, b"\x03")
    terminal.ends()
    coloured = [f"\x1b[{code}".encode() for code in range(30, 38)]
    assert not [code for code in coloured if code in terminal.raw]


def test_in_a_pipe_each_change_is_one_plain_line(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    batch = records.submit()
    records.done(batch, records.attempt(batch))
    slurm.shows("", sacct_line("1000", "COMPLETED", f"labctl-{batch.batch_id}"))
    ran = labctl("status", "--watch")
    assert ran.code == 0
    (line,) = ran.out.splitlines()
    assert line.endswith(": 1 run: 1 done")


def test_watching_and_json_are_not_for_the_same_reader(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    records.submit()
    ran = labctl("status", "--watch", "--json")
    assert ran.code == 2
    assert "--json for programs" in ran.err


def test_the_estimate_is_the_median_of_what_ended_over_the_jobs_that_run(sweep: Batch, records: Records) -> None:
    with closing(open_store(records.workspace)) as store:
        status.refresh(records.workspace, store)
        found = status.statuses(records.workspace, store, [run.run_id for run in sweep.runs])
        (row,) = store.rows("SELECT started_at, ended_at, load_s, init_s FROM results")
        run_s = status._age_s(row["started_at"]) - status._age_s(row["ended_at"])
        load_s = (row["load_s"] or 0) + (row["init_s"] or 0)
        # one run runs, two wait in a job that has yet to load; one job runs at once
        assert watch.left_s(store, found) == pytest.approx(3 * run_s + load_s, abs=0.05)
        assert watch.left_s(store, [run for run in found if run.state == "pending"]) is None
