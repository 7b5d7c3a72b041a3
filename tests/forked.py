"""Run labctl in forks of one process that has its modules: a start of Python for each command takes most of a Slurm test's time.

The server is a process without threads of its own, so that a fork of it is safe; it ends with the process that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

ROOT = Path(__file__).parent.parent


class ForkServer:
    """`labctl` in forks. Each command has its own folder, environment and output, as a process started from a shell has."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", str(theirs.fileno())], cwd=ROOT, pass_fds=[theirs.fileno()]
        )
        theirs.close()

    def run(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Raises subprocess.TimeoutExpired after `timeout` seconds; the command is then killed."""
        order = json.dumps([list(arguments), str(cwd), dict(env)]).encode()
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            read_end, write_end = os.pipe()
            with os.fdopen(read_end, "rb", buffering=0) as answer:
                handles = [out.fileno(), err.fileno(), write_end]
                socket.send_fds(self._socket, [len(order).to_bytes(8, "big")], handles)
                os.close(write_end)
                self._socket.sendall(order)
                code = _exit_code(answer, timeout, arguments)
            return subprocess.CompletedProcess(list(arguments), code, _content(out), _content(err))


def _content(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _exit_code(answer: IO[bytes], timeout: float, arguments: Sequence[str]) -> int:
    """The fork writes its process id when it begins and its exit code when it ends."""
    deadline, text = time.monotonic() + timeout, b""
    while text.count(b"\n") < 2:
        ready, _, _ = select.select([answer], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(text.split()[0]), signal.SIGKILL)
            raise subprocess.TimeoutExpired(list(arguments), timeout)
        part = answer.read(100)
        if not part:
            return -signal.SIGKILL  # it was killed
        text += part
    return int(text.split()[1])


# ---------------------------------------------------------------- the server


def serve(connection: socket.socket) -> None:
    """Run one command in a fork for each order. Returns when the other end is closed."""
    from labctl_orchestrator.cli import compare, retry, show, status, submit  # noqa: F401  what most commands need

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the forks
    while True:
        head, handles, _, _ = socket.recv_fds(connection, 8, 3)
        if not head:
            return
        length, order = int.from_bytes(head, "big"), b""
        while len(order) < length:
            order += connection.recv(length - len(order))
        if os.fork() == 0:
            connection.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _run(*json.loads(order), handles=handles)
        for handle in handles:
            os.close(handle)


def _run(arguments: list[str], cwd: str, env: dict[str, str], *, handles: list[int]) -> NoReturn:
    from labctl_orchestrator.cli import main

    out, err, answer = handles
    os.write(answer, f"{os.getpid()}\n".encode())
    os.setpgid(0, 0)
    code = 70
    try:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        time.tzset()
        random.seed()  # else every fork would draw the same
        nothing = os.open(os.devnull, os.O_RDONLY)
        for handle, number in ((nothing, 0), (out, 1), (err, 2)):
            os.dup2(handle, number)
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            for number, mode in ((0, "r"), (1, "w"), (2, "w"))
        )
        sys.argv = [str(Path(sys.executable).parent / "labctl"), *arguments]
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os.write(answer, f"{code}\n".encode())
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
