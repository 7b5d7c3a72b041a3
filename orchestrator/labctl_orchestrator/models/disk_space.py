"""What a user may still write to a disk: its free space and, where the site says, the user's quota. All in bytes."""

from __future__ import annotations

import getpass
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from labctl_workers.probe import filesystem_of

ANSWER_WITHIN_S = 10.0


@dataclass(frozen=True)
class Quota:
    """What the user has on a filesystem, and may have at most, in bytes."""

    used_bytes: int
    limit_bytes: int

    @property
    def left_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


def free_bytes(folder: Path) -> int:
    """What is free on the disk that a folder lies on, or would: the nearest folder above it that exists is looked at."""
    there = next(above for above in (folder, *folder.parents) if above.exists())
    return shutil.disk_usage(there).free


def left_bytes(folder: Path) -> int:
    """What the user may still write: what is free, or less where a quota says so."""
    quota = quota_of(folder)
    free = free_bytes(folder)
    return free if quota is None else min(free, quota.left_bytes)


def quota_of(folder: Path) -> Quota | None:
    """The user's quota on the filesystem of a folder, by `lfs quota` on Lustre, else by `quota`; None where neither says."""
    found = filesystem_of(folder)
    if found is None:
        return None
    if found.kind == "lustre":
        answer = _output("lfs", "quota", "-q", "-u", getpass.getuser(), found.mount)
        return next(filter(None, (_quota(line.split(), found.mount) for line in answer.splitlines())), None)
    answer = _output("quota", "-w", "-p")
    return next(filter(None, (_quota(line.split(), found.source) for line in answer.splitlines())), None)


def _quota(words: list[str], filesystem: str) -> Quota | None:
    """A line "FILESYSTEM BLOCKS QUOTA LIMIT ...", in KiB; a * marks what is over. A limit of 0 is none."""
    if len(words) < 4 or words[0] != filesystem:
        return None
    try:
        blocks, soft, hard = (int(word.rstrip("*")) for word in words[1:4])
    except ValueError:
        return None
    limit = hard or soft
    return Quota(blocks * 1024, limit * 1024) if limit else None


def _output(*arguments: str) -> str:
    """What a command prints, though it says by its exit status that a quota is met; nothing where there is no such command."""
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, timeout=ANSWER_WITHIN_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
