"""Space left for the user on a disk: free space, and the user's quota if the site has one. All in bytes."""

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
    """The user's used space on a filesystem, and its limit."""

    used_bytes: int
    limit_bytes: int

    @property
    def left_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


def free_bytes(folder: Path) -> int:
    """Free space on the disk of a folder, or of its nearest existing parent."""
    there = next(above for above in (folder, *folder.parents) if above.exists())
    return shutil.disk_usage(there).free


def left_bytes(folder: Path) -> int:
    """Space left for the user: the free space, or less by quota."""
    quota = quota_of(folder)
    free = free_bytes(folder)
    return free if quota is None else min(free, quota.left_bytes)


def quota_of(folder: Path) -> Quota | None:
    """The user's quota on the filesystem of a folder, from `lfs quota` on Lustre, else from `quota`; None if they report none."""
    found = filesystem_of(folder)
    if found is None:
        return None
    if found.kind == "lustre":
        answer, name = _output("lfs", "quota", "-q", "-u", getpass.getuser(), found.mount), found.mount
    else:
        answer, name = _output("quota", "-w", "-p"), found.source
    return next(filter(None, (_quota(line.split(), name) for line in answer.splitlines())), None)


def _quota(words: list[str], filesystem: str) -> Quota | None:
    """The quota in a line "FILESYSTEM BLOCKS QUOTA LIMIT ...", in KiB. A * marks an exceeded quota. A limit of 0 is no limit."""
    if len(words) < 4 or words[0] != filesystem:
        return None
    try:
        blocks, soft, hard = (int(word.rstrip("*")) for word in words[1:4])
    except ValueError:
        return None
    limit = hard or soft
    return Quota(blocks * 1024, limit * 1024) if limit else None


def _output(*arguments: str) -> str:
    """A command's output, whatever its exit status (it reports an exceeded quota); empty if the command is missing."""
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, timeout=ANSWER_WITHIN_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
