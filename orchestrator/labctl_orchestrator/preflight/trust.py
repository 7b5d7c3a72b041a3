"""Other users who can change what a workspace runs as you: settings, setup lines, templates and jobs."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Callable
from pathlib import Path

from labctl_orchestrator.store.workspace import Workspace


def others_who_write(workspace: Workspace) -> list[str]:
    """Users and groups with write access besides you and root; "everyone" for world-writable files. Access control lists are not
    considered."""
    paths = (workspace.root, workspace.data, workspace.settings_file, workspace.templates)
    return list(dict.fromkeys(who for path in paths for who in _writers(path)))


def _writers(path: Path) -> list[str]:
    try:
        status = path.stat()
    except OSError:
        return []
    writers = []
    if status.st_uid not in (os.getuid(), 0):
        writers.append(f"user {_or_number(path.owner, status.st_uid)}")
    if status.st_mode & stat.S_IWGRP and status.st_gid != 0 and not _is_private(status.st_gid):
        writers.append(f"group {_or_number(path.group, status.st_gid)}")
    if status.st_mode & stat.S_IWOTH:
        writers.append("everyone")
    return writers


def _is_private(gid: int) -> bool:
    """Whether you are the only member of a group, as of the private group that many systems give each user."""
    try:
        group, me = grp.getgrgid(gid), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return group.gr_gid == me.pw_gid and group.gr_name == me.pw_name and set(group.gr_mem) <= {me.pw_name}


def _or_number(name: Callable[[], str], number: int) -> str:
    """The name of a user or group, or its number if it has none."""
    try:
        return name()
    except KeyError:
        return str(number)
