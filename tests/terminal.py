"""A pseudo-terminal that commands are typed at, for the transcripts in the documentation."""

from __future__ import annotations

import os
import pty
import select
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pyte

LINES = 400


class Terminal:
    """Types commands at a pseudo-terminal, and keeps what was to be seen there.

    `home` is shown as /home/ada, and each key of `shown_as` as its value. What was typed and seen goes to `out`.
    """

    def __init__(
        self, environment: Mapping[str, str], home: Path, *, columns: int = 120, shown_as: Mapping[str, str] | None = None,
        out: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:  # fmt: skip
        self.environment = {**environment, "TERM": "xterm", "COLUMNS": str(columns), "LINES": str(LINES)}
        self.columns = columns
        self.home, self.here = home, home
        self.shown_as = {**(shown_as or {}), str(home): "/home/ada"}
        self.out = out

    def type(self, command: str, *answers: str, within_s: float = 240, shown: bool = True) -> str:
        """Run a command in bash; each answer is typed where a question (a line that ends in ": ") waits.

        Returns what stands on the screen in the end. Raises SystemExit where the command ends with another status than 0 or 1,
        and where it did not end in time: then it is killed.
        """
        started = time.monotonic()
        pid, screen = pty.fork()
        if pid == 0:
            os.chdir(self.here)
            os.execve("/bin/bash", ["bash", "-c", command], self.environment)
        seen, ended = self._seen(screen, list(answers), started + within_s)
        if not ended:
            os.killpg(pid, signal.SIGKILL)
        os.close(screen)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        text = self._plain(seen.decode(errors="replace"))
        if shown:
            self.out(f"$ {self._renamed(command)}\n{text}".rstrip() + "\n")
        if not ended or status not in (0, 1):
            raise SystemExit(f"{command}: " + (f"exit status {status}" if ended else f"not done in {within_s:.0f} s"))
        return text

    def _seen(self, screen: int, answers: list[str], until: float) -> tuple[bytes, bool]:
        """What the command wrote, and whether it ended before `until`."""
        seen = b""
        while time.monotonic() < until:
            ready, _, _ = select.select([screen], [], [], 0.5)
            try:
                block = os.read(screen, 65536) if ready else None
            except OSError:  # the command has ended
                return seen, True
            if block == b"":
                return seen, True
            seen += block or b""
            if block is None and answers and seen.rstrip(b"\x1b[0m").endswith(b": "):
                os.write(screen, answers.pop(0).encode() + b"\n")
        return seen, False

    def _plain(self, text: str) -> str:
        screen = pyte.Screen(self.columns, LINES)
        pyte.Stream(screen).feed(text)
        return self._renamed("\n".join(line.rstrip() for line in screen.display).rstrip())

    def _renamed(self, text: str) -> str:
        for real, shown in self.shown_as.items():
            text = text.replace(real, shown)
        return text
