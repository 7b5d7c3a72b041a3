"""The processes that an engine starts: none of them is left on the node, whatever way the job ends.

Slurm ends a job's processes too, but only after its KillWait, and a local job has no Slurm.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
STOP_WITHIN_S = 6.0
ENDED_WITHIN_S = 1.0  # how long a process that was killed may take to go
# Python's multiprocessing keeps one process that removes shared memory; it ends by itself when the others have.
TIDIES_UP = b"multiprocessing.resource_tracker"


@contextlib.contextmanager
def none_left() -> Iterator[None]:
    """End every process that was started below this one inside the block, on each way out of it.

    SIGTERM is the way out that cannot wait: what has not ended STOP_WITHIN_S seconds after it is killed, this process
    included, even where the main thread is deep in an engine's code.
    """
    _adopt_orphans()
    before = set(descendants())
    with _deadline_after_sigterm(before):
        try:
            yield
        finally:
            end(before)


def descendants() -> list[int]:
    """The ids of all processes below this one."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                _, (_, parent, *_) = _stat(int(entry.name))
                children.setdefault(int(parent), []).append(int(entry.name))
    found: list[int] = []
    left = [os.getpid()]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


def name_of(pid: int) -> str | None:
    """What a process is called; None where it has ended, also where nobody has taken it away yet."""
    try:
        name, (state, *_) = _stat(pid)
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else name


def _stat(pid: int) -> tuple[str, list[str]]:
    """A process's name, which may hold anything and stands in parentheses, and what follows: its state, its parent's id."""
    before, _, after = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")
    return before.partition("(")[2], after.split()


def end(spared: set[int], grace_s: float = 1.0) -> None:
    """Kill the processes below this one but for `spared`; those that tidy up after them have `grace_s` to do so first."""
    given_up, deadline, ended = time.monotonic() + grace_s + 2.0, None, None
    while below := [pid for pid in descendants() if pid not in spared]:
        left = _alive(below)
        over = time.monotonic() > given_up
        if not left:
            # They look ended, but the threads of one may still be on their way out and hold its memory; only then is it
            # taken away. One whose parent is spared stays until that parent looks.
            ended = ended or time.monotonic()
            if over or time.monotonic() > ended + ENDED_WITHIN_S:
                return
            time.sleep(0.005)
            continue
        late = over or (deadline is not None and time.monotonic() > deadline)
        killed = [pid for pid in left if late or not _tidies_up(pid)]
        for pid in killed:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not killed and deadline is None:  # those that it tidies up after have ended
            deadline = time.monotonic() + grace_s
            _dismiss_own_tracker(spared)
        if over:
            return  # in the kernel's hands: a process that waits for a device dies when the device answers
        time.sleep(0.02)


def _alive(pids: list[int]) -> list[int]:
    """Those that have not ended. Zombies of ours are taken away, so that none waits for its parent."""
    alive = []
    for pid in pids:
        if name_of(pid) is not None:
            alive.append(pid)
            continue
        with contextlib.suppress(ChildProcessError, OSError):
            os.waitpid(pid, os.WNOHANG)
    return alive


def shared_memory_of(pids: Iterable[int]) -> set[str]:
    """The names of the shared memory of Python's multiprocessing that these processes have mapped."""
    names: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            names |= set(re.findall(r"/dev/shm/(psm_\w+)", Path(f"/proc/{pid}/maps").read_text(errors="replace")))  # noqa: S108
    return names


def remove_shared_memory(names: Iterable[str]) -> None:
    """Remove what is left of shared memory whose processes have ended.

    Python's resource tracker does so when the last process that writes to it ends; one that this process had before it
    started them lives on, and so would what they left.
    """
    for name in names:
        with contextlib.suppress(OSError):
            segment = shared_memory.SharedMemory(name)
            segment.close()
            segment.unlink()  # and the tracker forgets it


def _dismiss_own_tracker(spared: set[int]) -> None:
    """Close this process's end of the pipe to its resource tracker, which then removes what is left of shared memory and
    ends; the next shared memory starts another one."""
    tracker = getattr(resource_tracker, "_resource_tracker", None)
    pipe = getattr(tracker, "_fd", None)
    if tracker is None or pipe is None or getattr(tracker, "_pid", None) in spared:
        return
    tracker._fd = tracker._pid = None
    with contextlib.suppress(OSError):
        os.close(pipe)


def _tidies_up(pid: int) -> bool:
    try:
        return TIDIES_UP in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _adopt_orphans() -> None:
    """Become the parent of grandchildren whose parent dies, so that `descendants` still finds them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@contextlib.contextmanager
def _deadline_after_sigterm(spared: set[int]) -> Iterator[None]:
    """A thread that hears of SIGTERM at once: Python itself calls a handler only when its main thread comes back to it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)
    before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    owner = os.getpid()

    def forget() -> None:  # in a forked child: its signals are not ours, nor are our handlers its own
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    os.register_at_fork(after_in_child=lambda: forget() if os.getppid() == owner else None)
    threading.Thread(target=_watch, args=(heard, spared), name="end-after-sigterm", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(told)  # the thread reads the end of the pipe, and ends


def _watch(heard: int, spared: set[int]) -> None:
    while number := os.read(heard, 1):
        if number[0] == signal.SIGTERM:
            time.sleep(STOP_WITHIN_S)
            sys.setswitchinterval(0.0001)  # a main thread that is busy in Python would hold each look at /proc up
            end(spared)
            os._exit(128 + signal.SIGTERM)
    os.close(heard)
