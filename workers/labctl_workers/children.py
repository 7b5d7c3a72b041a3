"""Ends the processes that an engine starts, however the job ends.

Slurm ends a job's processes only after its KillWait, and a local job has no Slurm.
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
WAKE = signal.SIGURG
REAPED_WITHIN_S = 1.0  # until a killed process disappears
# The process of Python's multiprocessing that removes shared memory; it ends when the processes that use it have ended.
RESOURCE_TRACKER = b"multiprocessing.resource_tracker"


@contextlib.contextmanager
def end_on_exit() -> Iterator[None]:
    """End all descendants of this process that started inside the block, however the block ends.

    STOP_WITHIN_S seconds after a SIGTERM, all of them and this process are killed, even while the main thread is busy in an
    engine's code.
    """
    _adopt_orphans()
    before = set(descendants())
    with _deadline_after_sigterm(before):
        try:
            yield
        finally:
            end(before)


def descendants() -> list[int]:
    """The ids of all descendants of this process."""
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
    """The name of a process; None where it has ended, also while it is a zombie."""
    try:
        name, (state, *_) = _stat(pid)
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else name


def _stat(pid: int) -> tuple[str, list[str]]:
    """The name of a process, and the fields after it: its state, its parent's id, and so on."""
    # The name is in parentheses and may contain parentheses itself.
    before, _, after = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")
    return before.partition("(")[2], after.split()


def end(spared: set[int], grace_s: float = 1.0) -> None:
    """Kill the descendants of this process except `spared`; resource trackers get `grace_s` seconds to remove shared memory."""
    give_up_at, tracker_deadline, ended_at = time.monotonic() + grace_s + 2.0, None, None
    while below := [pid for pid in descendants() if pid not in spared]:
        left = _alive(below)
        over = time.monotonic() > give_up_at
        if not left:
            # Zombies: threads of one may still be exiting and hold its memory; then it cannot be reaped yet. A zombie with a
            # spared parent stays until that parent reaps it.
            ended_at = ended_at or time.monotonic()
            if over or time.monotonic() > ended_at + REAPED_WITHIN_S:
                return
            time.sleep(0.005)
            continue
        late = over or (tracker_deadline is not None and time.monotonic() > tracker_deadline)
        killed = [pid for pid in left if late or not _is_resource_tracker(pid)]
        for pid in killed:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not killed and tracker_deadline is None:  # only resource trackers are left
            tracker_deadline = time.monotonic() + grace_s
            _close_own_tracker(spared)
        if over:
            return  # a process that waits for a device dies when the device answers
        time.sleep(0.02)


def _alive(pids: list[int]) -> list[int]:
    """The processes that have not ended. Reaps zombies that are children of this process."""
    alive = []
    for pid in pids:
        if name_of(pid) is not None:
            alive.append(pid)
            continue
        with contextlib.suppress(ChildProcessError, OSError):
            os.waitpid(pid, os.WNOHANG)
    return alive


def shared_memory_of(pids: Iterable[int]) -> set[str]:
    """The names of the shared memory segments of Python's multiprocessing that these processes map."""
    names: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            names |= set(re.findall(r"/dev/shm/(psm_\w+)", Path(f"/proc/{pid}/maps").read_text(errors="replace")))  # noqa: S108
    return names


def remove_shared_memory(names: Iterable[str]) -> None:
    """Remove the shared memory segments of processes that have ended.

    Python's resource tracker removes them when its last client ends. A tracker of this process lives on, and so would they.
    """
    for name in names:
        with contextlib.suppress(OSError):
            segment = shared_memory.SharedMemory(name)
            segment.close()
            segment.unlink()  # also unregisters it from the tracker


def _close_own_tracker(spared: set[int]) -> None:
    """Close the pipe to this process's resource tracker, which then removes shared memory and ends. The next shared memory
    starts a new tracker."""
    tracker = getattr(resource_tracker, "_resource_tracker", None)
    pipe = getattr(tracker, "_fd", None)
    if tracker is None or pipe is None or getattr(tracker, "_pid", None) in spared:
        return
    tracker._fd = tracker._pid = None
    with contextlib.suppress(OSError):
        os.close(pipe)


def _is_resource_tracker(pid: int) -> bool:
    try:
        return RESOURCE_TRACKER in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _adopt_orphans() -> None:
    """Become the parent of orphaned descendants: `descendants` still finds them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@contextlib.contextmanager
def _deadline_after_sigterm(spared: set[int]) -> Iterator[None]:
    """Watch for SIGTERM in a thread: Python calls handlers only when the main thread returns to Python code."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    owner = os.getpid()

    def reset() -> None:  # a forked child must not react to its signals as this process does
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    os.register_at_fork(after_in_child=lambda: reset() if os.getppid() == owner else None)
    watch = threading.Thread(
        target=_watch, args=(reader, spared, threading.get_ident()), name="end-after-sigterm", daemon=True
    )
    ignored = signal.signal(WAKE, lambda *_: None)  # a signal without a handler interrupts no wait
    watch.start()
    try:
        yield
    finally:
        signal.signal(WAKE, ignored)
        signal.set_wakeup_fd(before)
        os.close(writer)  # the thread reads end of file, and ends


def _watch(reader: int, spared: set[int], main: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the main thread handles them
    while number := os.read(reader, 1):
        # Linux gives a signal to another thread while the main one has one pending, such as Slurm's SIGCONT before SIGTERM. Then
        # a main thread that waits goes on waiting, and does not run its handler.
        if number[0] != WAKE:
            signal.pthread_kill(main, WAKE)
        if number[0] == signal.SIGTERM:
            time.sleep(STOP_WITHIN_S)
            sys.setswitchinterval(0.0001)  # else a busy main thread delays each read of /proc
            end(spared)
            os._exit(128 + signal.SIGTERM)
    os.close(reader)
