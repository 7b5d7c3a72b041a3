"""Whether a local job's process is alive, and not a later process with the same id.

Not psutil: it reports the start of a process as clock time, which moves when the clock is set. The kernel's ticks do not.
"""

from __future__ import annotations

from pathlib import Path


def start_of(pid: int) -> str | None:
    """The start of the process in clock ticks since boot; None without the process."""
    fields = _stat(pid)
    return fields[19] if fields else None


def is_alive(pid: int, start: str | None) -> bool:
    """Whether the process with this start runs. A zombie does not."""
    fields = _stat(pid)
    return fields is not None and fields[0] != "Z" and (start is None or fields[19] == start)


def some_runs(*words: str) -> bool:
    """Whether a process of this machine has all these words in its command line."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if all(word.encode() in line for word in words):
            return True
    return False


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, which may contain spaces and parentheses."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
