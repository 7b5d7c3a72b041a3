"""Who else can change what a workspace runs as you: its settings, setup lines, templates and jobs."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path

from labctl_orchestrator.request.settings import SETTINGS_FILE
from labctl_orchestrator.store.workspace import Workspace


def others_who_write(workspace: Workspace) -> list[str]:
    """The users and groups besides you and root that may change what runs here; "everyone" where all may. Access control lists
    are not looked at."""
    found: dict[str, None] = {}
    for path in (workspace.root, workspace.data, workspace.root / SETTINGS_FILE, workspace.root / "templates"):
        for who in _writers(path):
            found[who] = None
    return list(found)


def _writers(path: Path) -> list[str]:
    try:
        status = path.stat()
    except OSError:
        return []
    writers = []
    if status.st_uid not in (os.getuid(), 0):
        writers.append(f"user {_user(status.st_uid)}")
    if status.st_mode & stat.S_IWGRP and status.st_gid != 0 and not _is_private(status.st_gid):
        writers.append(f"group {_group(status.st_gid)}")
    if status.st_mode & stat.S_IWOTH:
        writers.append("everyone")
    return writers


def _is_private(gid: int) -> bool:
    """Whether a group is your own alone, as many systems give each user one."""
    try:
        group, me = grp.getgrgid(gid), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return group.gr_gid == me.pw_gid and group.gr_name == me.pw_name and set(group.gr_mem) <= {me.pw_name}


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
