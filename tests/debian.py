"""Programs of Debian packages that tests need: installed as root, by one test process at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.parts import PartMissing

SYSTEM_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
LOG_TAIL_LINES: Final = 15


def install(packages: Sequence[str], missing: Callable[[], Sequence[str]]) -> None:
    """Install the packages while `missing()` names programs. Raises PartMissing if programs are still missing."""
    if not (names := missing()):
        return
    remedy = f"apt-get install --no-install-recommends {' '.join(packages)}"
    if os.geteuid() != 0:
        raise PartMissing(f"{', '.join(names)} not installed; as root: {remedy}")
    if shutil.which("apt-get", path=SYSTEM_PATH) is None:
        raise PartMissing(f"{', '.join(names)} not installed, and no apt-get here; on Debian 12: {remedy}")
    # Two `apt-get update` at once fail: apt waits for dpkg's lock, not for the lock of its lists.
    with (Path(tempfile.gettempdir()) / "labctl-tests-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not missing():
            return
        with _services_kept_stopped():
            _apt_get("update")
            _apt_get("install", "-y", "--no-install-recommends", *packages)
        if names := missing():
            raise PartMissing(f"apt-get ran, but {', '.join(names)} not found; check: {remedy}")


@contextmanager
def _services_kept_stopped() -> Iterator[None]:
    """Keep Debian's package scripts from starting the system-wide daemons."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


def _apt_get(*arguments: str) -> None:
    command = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120", *arguments]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-LOG_TAIL_LINES:])
        raise PartMissing(f"`{' '.join(command)}` exited with {done.returncode}:\n{tail}")
