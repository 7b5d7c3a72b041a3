"""No process of an engine outlives its job. Each test runs a script of its own: what it ends must not be pytest's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

STOP_WITHIN_S = 1.0  # in the scripts: the real one is longer
WAIT_S = 20.0

PREAMBLE = f"""
import ctypes, json, multiprocessing, os, signal, subprocess, sys, threading, time
from multiprocessing import shared_memory
from labctl_workers import children

children.STOP_WITHIN_S = {STOP_WITHIN_S}
libc = ctypes.CDLL(None)


def tell(**told):
    print(json.dumps(told), flush=True)


def sleeper(*prefix, **how):
    return subprocess.Popen([*prefix, "sleep", "300"], **how)


def said(*command):
    'A process that says one number, and what it says: it is ready then.'
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process.pid, int(process.stdout.readline())


def python(code):
    return said(sys.executable, "-c", "import ctypes, os, signal, subprocess, time\\n" + code)


def orphan():
    'Forked twice, in a session of its own: its parent is gone.'
    heard, told = os.pipe()
    if (middle := os.fork()) == 0:
        os.setsid()
        process = sleeper()
        os.write(told, str(process.pid).encode())
        os._exit(0)
    os.waitpid(middle, 0)
    return int(os.read(heard, 20))


def trackers_run():
    'Wait until each resource tracker below this process has come as far as to ignore SIGTERM: it needs no grace to start.'
    for pid in children.descendants():
        while children._is_resource_tracker(pid):
            with open(f"/proc/{{pid}}/status") as status:
                (ignored,) = (int(line.split()[1], 16) for line in status if line.startswith("SigIgn"))
            if ignored >> (signal.SIGTERM - 1) & 1:
                break
            time.sleep(0.01)


def pass_by(*_):
    'A handler that an engine might set: the signal is noted, and nothing ends.'


def leave(*_):
    raise SystemExit(7)
"""


@dataclass
class Script:
    """A script that runs, and what it has told."""

    process: subprocess.Popen[bytes]
    output: Path

    def told(self, name: str) -> Any:
        """What it tells under this name, waited for."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            if name in (told := self._all()):
                return told[name]
            assert not ended, self.output.read_text()
            time.sleep(0.01)
        raise AssertionError(f"{name} was not told: {self.output.read_text()}")

    def status(self) -> int:
        return self.process.wait(WAIT_S)

    def _all(self) -> dict[str, Any]:
        whole = self.output.read_text().rpartition("\n")[0].splitlines()
        return {name: value for line in whole if line.startswith("{") for name, value in json.loads(line).items()}


Run = Callable[[str], Script]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Start a script; what is left of it after the test, where one fails, is ended by id."""
    scripts: list[Script] = []

    def start(body: str) -> Script:
        file, output = tmp_path / f"script{len(scripts)}.py", tmp_path / f"output{len(scripts)}"
        file.write_text(f"{PREAMBLE}\n{body}\n")
        with output.open("wb") as out:  # no pipe: who is left over would hold it open
            process = subprocess.Popen([sys.executable, "-u", str(file)], stdout=out, stderr=subprocess.STDOUT)
        scripts.append(Script(process, output))
        return scripts[-1]

    yield start
    for script in scripts:
        if script.process.poll() is None:
            script.process.kill()
            script.process.wait()
        for pid in filter(alive, script._all().get("pids", {}).values()):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether it runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def left(pids: dict[str, int]) -> list[str]:
    """Those that still run; a killed one may take a moment to go."""
    deadline = time.monotonic() + 0.5
    while (running := [name for name, pid in pids.items() if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return running


def held_in_memory(name: str, within_s: float = 0.0) -> bool:
    """Whether the shared memory of this name is still there then; where it is, the test takes it away."""
    file = Path("/dev/shm") / name
    deadline = time.monotonic() + within_s
    while (found := file.exists()) and time.monotonic() < deadline:
        time.sleep(0.01)
    file.unlink(missing_ok=True)
    return found


# A process of every kind: their ids are told.
ALL_KINDS = """
    pids = {"a child": sleeper().pid, "one in a session of its own": sleeper(start_new_session=True).pid}
    pids["a shell"], pids["a grandchild"] = said("sh", "-c", "sleep 300 & echo $!; wait")
    pids["a shell in a session"], pids["a grandchild in a session"] = said("setsid", "sh", "-c", "sleep 300 & echo $!; wait")
    pids["an orphan"] = orphan()
    pids["one that ignores SIGTERM"], _ = python(
        "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)\\n"
        "print(1, flush=True); time.sleep(300)"
    )
    pids["one that starts another when it is ended"], pids["the one it starts"] = python(
        "while True:\\n  process = subprocess.Popen(['sleep', '300']); print(process.pid, flush=True); process.wait()"
    )
    pids["one with a name like a line of /proc"], _ = python(
        "ctypes.CDLL(None).prctl(15, b'x) R 1 (y', 0, 0, 0); print(1, flush=True); time.sleep(300)"
    )
    pids["one that is stopped"] = sleeper().pid
    os.kill(pids["one that is stopped"], signal.SIGSTOP)
    tell(pids=pids)
"""


# ---------------------------------------------------------------- each way out


@pytest.mark.parametrize(
    ("way", "status"),
    [
        ("pass", 0),
        ("raise RuntimeError('the engine failed')", 1),
        ("sys.exit(3)", 3),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(300)", -signal.SIGINT),
    ],
)
def test_every_process_that_was_started_inside_ends_on_each_way_out(run: Run, way: str, status: int) -> None:
    script = run(f"with children.end_on_exit():\n{ALL_KINDS}\n    {way}")
    assert script.status() == status
    assert left(script.told("pids")) == []


def test_they_are_gone_before_the_next_line_runs(run: Run) -> None:
    script = run(f"with children.end_on_exit():\n{ALL_KINDS}\ntell(below=children.descendants())")
    assert script.told("below") == []


def test_a_block_in_another_thread_ends_its_processes_too(run: Run) -> None:
    script = run(
        f"def work():\n  with children.end_on_exit():\n{ALL_KINDS}\n"
        "thread = threading.Thread(target=work)\nthread.start(); thread.join()\ntell(below=children.descendants())"
    )
    assert script.told("below") == []


def test_those_that_were_there_before_are_spared(run: Run) -> None:
    script = run("""
own = sleeper()
shell, grandchild = said("sh", "-c", "sleep 300 & echo $!; wait")
other = orphan()
pids = {"own": own.pid, "shell": shell, "grandchild": grandchild}
tell(pids={**pids, "other": other})
with children.end_on_exit():
    inside = sleeper()
tell(running=[name for name, pid in pids.items() if pid in children.descendants()], inside=inside.pid)
""")
    assert script.told("running") == ["own", "shell", "grandchild"]
    assert not alive(script.told("inside"))


def test_the_exit_status_of_one_that_was_there_before_is_left_to_who_started_it(run: Run) -> None:
    script = run("""
before = subprocess.Popen(["sh", "-c", "read line; exit 5"], stdin=subprocess.PIPE)
with children.end_on_exit():
    sleeper()
    before.stdin.close()
    while open(f"/proc/{before.pid}/stat").read().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
tell(status=before.wait())
""")
    assert script.told("status") == 5


def test_a_block_may_come_after_a_block_and_holds_no_file_open(run: Run) -> None:
    script = run("""
def open_files():
    return len(os.listdir("/proc/self/fd"))
before = open_files()
for _ in range(5):
    with children.end_on_exit():
        sleeper()
deadline = time.monotonic() + 5
while (open_files(), threading.active_count()) != (before, 1) and time.monotonic() < deadline:
    time.sleep(0.01)  # the thread that listens closes its end by itself
tell(more=open_files() - before, threads=threading.active_count())
""")
    assert script.told("more") == 0
    assert script.told("threads") == 1


def test_who_was_woken_by_signals_before_is_woken_again_after(run: Run) -> None:
    script = run("""
heard, told = os.pipe()
os.set_blocking(told, False)
signal.set_wakeup_fd(told)
with children.end_on_exit():
    pass
tell(same=signal.set_wakeup_fd(-1) == told)
""")
    assert script.told("same") is True


def test_a_process_has_a_name_until_it_has_ended(run: Run) -> None:
    script = run("""
pid, _ = python("ctypes.CDLL(None).prctl(15, b'x) R 1 (y', 0, 0, 0); print(1, flush=True); time.sleep(300)")
named = children.name_of(pid)
os.kill(pid, signal.SIGKILL)
while open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z":
    time.sleep(0.01)
zombie = children.name_of(pid)
os.waitpid(pid, 0)
tell(names=[named, zombie, children.name_of(pid)])
""")
    assert script.told("names") == ["x) R 1 (y", None, None]


# ---------------------------------------------------------------- zombies


def test_zombies_are_no_reason_to_wait(run: Run) -> None:
    """One that nobody has waited for, one below a process that never waits."""
    script = run("""
with children.end_on_exit():
    own = os.fork()
    if own == 0:
        os._exit(0)
    parent, below = python(
        "pid = os.fork()\\nif pid == 0: os._exit(0)\\n"
        "while open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0] != 'Z': time.sleep(0.01)\\n"
        "print(pid, flush=True); time.sleep(300)"
    )
    tell(pids={"parent": parent})
    started = time.monotonic()
took_s = time.monotonic() - started
tell(took_s=took_s, below=children.descendants(), zombies=[p for p in (own, below) if os.path.exists(f"/proc/{p}")])
""")
    assert script.told("took_s") < 2  # to wait for them would take three
    assert script.told("below") == []
    assert script.told("zombies") == []


def test_nothing_to_end_takes_no_time(run: Run) -> None:
    script = run(
        "started = time.monotonic()\nwith children.end_on_exit(): pass\ntell(took_s=time.monotonic() - started)"
    )
    assert script.told("took_s") < 0.9  # no grace of a second


# ---------------------------------------------------------------- SIGTERM


@pytest.mark.parametrize(
    "deed",
    [
        "while True: pass",
        "time.sleep(300)",
        "lock = threading.Lock(); lock.acquire(); lock.acquire()",
        "sleeper().wait()",
        "while True: libc.usleep(1000)",
        "while True: libc.pause()",
    ],
)
def test_a_main_thread_that_comes_back_to_python_leaves_by_its_own_handler(run: Run, deed: str) -> None:
    script = run(
        "children.STOP_WITHIN_S = 60.0\n"
        f"with children.end_on_exit():\n    signal.signal(signal.SIGTERM, leave)\n{ALL_KINDS}\n    {deed}"
    )
    pids = script.told("pids")
    script.process.terminate()
    assert script.status() == 7
    assert left(pids) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_a_main_thread_that_waits_leaves_too_where_the_signal_reached_another_thread(run: Run, name: str) -> None:
    """Linux does so while the main thread has another signal pending."""
    script = run(
        "children.STOP_WITHIN_S = 60.0\n"
        f"def other():\n    time.sleep(0.3); signal.pthread_kill(threading.get_ident(), signal.{name}); time.sleep(300)\n"
        f"with children.end_on_exit():\n    signal.signal(signal.{name}, leave)\n"
        "    threading.Thread(target=other, daemon=True).start()\n"
        "    lock = threading.Lock(); lock.acquire(); lock.acquire()"
    )
    assert script.status() == 7


STUCK = {
    "busy in Python, where the signal is passed by": ("pass_by", "while True: pass"),
    "asleep, where the signal is passed by": ("pass_by", "time.sleep(300)"),
    "in code that swallows every exception": (
        "leave",
        "while True:\n      try: time.sleep(300)\n      except BaseException: pass",
    ),
    "in C code that no signal interrupts": (
        "leave",
        "mutex = ctypes.create_string_buffer(64); libc.pthread_mutex_lock(mutex); libc.pthread_mutex_lock(mutex)",
    ),
    "in a cleanup that does not end": ("leave", "\n    try: time.sleep(300)\n    finally: threading.Event().wait()"),
}


@pytest.mark.parametrize(("handler", "deed"), STUCK.values(), ids=STUCK.keys())
def test_what_has_not_ended_some_time_after_sigterm_is_killed(run: Run, handler: str, deed: str) -> None:
    script = run(f"with children.end_on_exit():\n    signal.signal(signal.SIGTERM, {handler})\n{ALL_KINDS}\n    {deed}")
    pids = script.told("pids")
    time.sleep(0.2)  # it is stuck by now
    sent = time.monotonic()
    script.process.terminate()
    assert script.status() == 128 + signal.SIGTERM
    assert STOP_WITHIN_S - 0.1 < time.monotonic() - sent < STOP_WITHIN_S + 2
    assert left(pids) == []


def test_what_was_there_before_outlives_the_deadline(run: Run) -> None:
    script = run("""
tell(pids={"before": sleeper().pid})
with children.end_on_exit():
    signal.signal(signal.SIGTERM, pass_by)
    tell(inside=sleeper().pid)
    time.sleep(300)
""")
    inside = script.told("inside")
    script.process.terminate()
    assert script.status() == 128 + signal.SIGTERM
    assert left({"inside": inside}) == []
    assert alive(script.told("pids")["before"])


def test_other_signals_start_no_deadline(run: Run) -> None:
    script = run("""
with children.end_on_exit():
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, pass_by)
        os.kill(os.getpid(), number)
    time.sleep(children.STOP_WITHIN_S + 0.5)
tell(alive=True)
""")
    assert script.status() == 0
    assert script.told("alive") is True


FORKS = {
    "os.fork": """
    pid = os.fork()
    if pid == 0:
        asleep()
    os.read(heard, 1)
    os.kill(pid, signal.SIGTERM)
    ended_by = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
""",
    "os.fork in another thread": """
    pids = []
    def fork():
        pids.append(os.fork())
        if pids[0] == 0:
            asleep()
    thread = threading.Thread(target=fork); thread.start(); thread.join()
    os.read(heard, 1)
    os.kill(pids[0], signal.SIGTERM)
    ended_by = os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1])
""",
    "a child of a forked child": """
    def child():
        below = multiprocessing.get_context("fork").Process(target=asleep); below.start()
        os.read(heard, 1)
        below.terminate(); below.join()
        os._exit(-below.exitcode)
    process = multiprocessing.get_context("fork").Process(target=child); process.start(); process.join()
    ended_by = -process.exitcode
""",
    "multiprocessing, forked": """
    process = multiprocessing.get_context("fork").Process(target=asleep); process.start()
    os.read(heard, 1)
    process.terminate(); process.join()
    ended_by = process.exitcode
""",
}


@pytest.mark.parametrize("fork", FORKS.values(), ids=FORKS.keys())
def test_a_sigterm_to_a_forked_child_alone_ends_that_child_and_not_its_parent(run: Run, fork: str) -> None:
    """The child has its parent's handlers and its end of the pipe, but the signal is not the parent's."""
    script = run(f"""
heard, told = os.pipe()
def asleep():
    os.write(told, b"x")
    time.sleep(300)
    os._exit(0)
with children.end_on_exit():
    signal.signal(signal.SIGTERM, pass_by)
{fork}
    time.sleep(children.STOP_WITHIN_S + 0.7)
    signal.signal(signal.SIGTERM, leave)
    tell(ended_by=ended_by)
    time.sleep(300)
""")
    assert script.told("ended_by") == -signal.SIGTERM
    script.process.terminate()  # and its own it still hears
    assert script.status() == 7


# ---------------------------------------------------------------- who tidies up

SEGMENTS = {
    "this process": """
    name = shared_memory.SharedMemory(create=True, size=4096).name
""",
    "a forked child": """
    shared_memory.SharedMemory(create=True, size=4096).unlink()  # this process has a tracker, which the child shares
    def hold(told):
        held = shared_memory.SharedMemory(create=True, size=4096)
        told.send(held.name)
        time.sleep(300)
    heard, told = multiprocessing.Pipe()
    multiprocessing.get_context("fork").Process(target=hold, args=(told,)).start()
    name = heard.recv()
""",
    "another program": """
    program = subprocess.Popen([sys.executable, "-c", "from multiprocessing import shared_memory; import time\\n"
        "held = shared_memory.SharedMemory(create=True, size=4096); print(held.name, flush=True); time.sleep(300)"],
        stdout=subprocess.PIPE, text=True)
    name = program.stdout.readline().strip()
""",
}


@pytest.mark.parametrize("way", ["pass", "raise RuntimeError"])
@pytest.mark.parametrize("segment", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_shared_memory_that_nobody_has_removed_is_removed(run: Run, segment: str, way: str) -> None:
    """Python's resource tracker has its grace to do so, and is gone then."""
    script = run(
        f"with children.end_on_exit():\n{segment}\n    trackers_run()\n    tell(name=name.lstrip('/'))\n    {way}"
    )
    script.status()
    assert not held_in_memory(script.told("name"))


@pytest.mark.parametrize("segment", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_it_is_removed_after_a_sigterm_that_was_not_heeded_too(run: Run, segment: str) -> None:
    """It lies in the node's memory, where nothing else would ever remove it."""
    script = run(
        f"with children.end_on_exit():\n    signal.signal(signal.SIGTERM, pass_by)\n{segment}\n"
        "    trackers_run()\n    tell(name=name.lstrip('/'))\n    time.sleep(300)"
    )
    name = script.told("name")
    script.process.terminate()
    assert script.status() == 128 + signal.SIGTERM
    assert not held_in_memory(name)


def test_a_tracker_that_was_there_before_tracks_on(run: Run) -> None:
    script = run("""
before = shared_memory.SharedMemory(create=True, size=4096)
with children.end_on_exit():
    sleeper()
from multiprocessing import resource_tracker
tell(tracked=before.name.lstrip("/"), running=resource_tracker._resource_tracker._pid in children.descendants())
""")
    assert script.told("running") is True
    assert script.status() == 0
    assert not held_in_memory(script.told("tracked"), within_s=5)  # it ends after the script, by itself


def test_shared_memory_can_be_had_again_after_the_block(run: Run) -> None:
    script = run("""
import warnings
warnings.simplefilter("error")
with children.end_on_exit():
    shared_memory.SharedMemory(create=True, size=4096)
after = shared_memory.SharedMemory(create=True, size=4096)
tell(name=after.name.lstrip("/"))
""")
    assert script.status() == 0
    assert not held_in_memory(script.told("name"), within_s=5)


def test_a_process_that_only_looks_like_the_one_that_tidies_up_is_killed_after_its_grace(run: Run) -> None:
    script = run("""
started = time.monotonic()
with children.end_on_exit():
    pid, _ = said(sys.executable, "-c", "import time; print(1, flush=True); time.sleep(300)", "multiprocessing.resource_tracker")
    started = time.monotonic()
tell(took_s=time.monotonic() - started, below=children.descendants())
""")
    assert script.told("below") == []
    assert 0.9 < script.told("took_s") < 4
