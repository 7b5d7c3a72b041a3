"""The fault injector of fault_injector.c, built, and switched by a file for each side: the login node and the compute nodes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.parts import PartMissing

SOURCE = Path(__file__).with_suffix(".c")


class FaultInjector:
    """Faults of files under `folder`: "login" and "node" are the sides."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            raise PartMissing("cc not installed; on Debian: apt-get install gcc libc6-dev")
        folder.mkdir()
        self.folder = folder
        self.library = folder / "fault_injector.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", self.library, SOURCE, "-ldl"], check=True)

    def environment(self, side: str, ahead_s: int = 0) -> dict[str, str]:
        """What a process of this side is started with; its clock is `ahead_s` seconds ahead."""
        switch, ahead = str(self._switch(side)), str(ahead_s)
        return {"LD_PRELOAD": str(self.library), "FAULT_INJECTOR_FILE": switch, "FAULT_INJECTOR_CLOCK_S": ahead}

    def is_on(self, side: str) -> bool:
        return self._switch(side).exists()

    def begin(self, side: str, code: int, part: str) -> None:
        """From now on calls on paths with this part fail with the errno `code`, as the C source says."""
        whole = self.folder / "next"
        whole.write_text(f"{code} {part}", encoding="ascii")
        whole.replace(self._switch(side))

    def end(self, side: str) -> None:
        self._switch(side).unlink()

    def _switch(self, side: str) -> Path:
        return self.folder / side
