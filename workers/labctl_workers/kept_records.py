"""The records of one job: a record that cannot be written is kept, and written when it can be.

It is kept in memory, and in a folder on the node's own disk that the log names. It is tried again before each further run and
at the job's end. A workspace that was moved is followed; one that has gone is never made again.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from labctl_workers.record import JobFolder, RunResult, write_json

TRY_EVERY_S = 2.0


class Records:
    """Writes the records of the job at `folder`; `fallback` is where they are kept on the node, once one is."""

    def __init__(self, folder: JobFolder) -> None:
        self.folder = folder
        self.fallback: Path | None = None
        self.error: OSError | None = None
        self._kept: dict[str, dict[str, Any]] = {}
        # An open folder is the same one wherever it is moved.
        self._data = os.open(folder.data, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        """No more is written."""
        os.close(self._data)

    @property
    def waiting(self) -> int:
        """How many records wait to be written."""
        return len(self._kept)

    def has(self, run_id: str, attempt_id: str) -> bool:
        """Whether there is such a record, written or kept."""
        return f"{run_id}/{attempt_id}.json" in self._kept or self.folder.record(run_id, attempt_id).exists()

    def write(self, result: RunResult) -> None:
        """Write the record, or keep it where that fails."""
        name = f"{result.run_id}/{result.attempt.attempt_id}.json"
        self._kept[name] = result.to_json()
        if not self.try_again():
            print(f"the record {name} could not be written: {self.error}", file=sys.stderr)
            self._keep_on_the_node(name)

    def try_again(self) -> bool:
        """Write what is kept; whether nothing is left to write."""
        for name, document in list(self._kept.items()):
            try:
                self.follow()
                write_json(self.folder.results / name, document, parents=False)
            except OSError as error:
                self.error = error
                return False
            del self._kept[name]
            if self.fallback is not None:
                (self.fallback / name).unlink(missing_ok=True)
        return True

    def finish(self, within_s: float) -> bool:
        """Try for so many seconds; whether nothing is left to write. The log says what is."""
        until = time.monotonic() + within_s
        while not self.try_again():
            if time.monotonic() > until:
                where = f"they are on {os.uname().nodename} in {self.fallback}" if self.fallback else "they are lost"
                print(
                    f"{len(self._kept)} records could not be written: {self.error}; {where}",
                    file=sys.stderr,
                    flush=True,
                )
                return False
            time.sleep(TRY_EVERY_S)
        if self.fallback is not None:
            with contextlib.suppress(OSError):
                for path in self.fallback.iterdir():
                    path.rmdir()
                self.fallback.rmdir()
            print("every record that was kept has been written", file=sys.stderr, flush=True)
        return True

    def follow(self) -> None:
        """Go on in the folder to which the workspace was moved."""
        if self.folder.spec.exists():
            return
        spec = Path(f"/proc/self/fd/{self._data}").readlink() / self.folder.spec.relative_to(self.folder.data)
        if spec.exists():
            print(f"the workspace was moved: records go to {spec.parents[2]}", file=sys.stderr, flush=True)
            self.folder = JobFolder(spec)

    def _keep_on_the_node(self, name: str) -> None:
        try:
            if self.fallback is None:
                self.fallback = Path(tempfile.mkdtemp(prefix="labctl-records-"))
            write_json(self.fallback / name, self._kept[name])
        except OSError as error:
            print(f"it is kept in memory alone: {error}", file=sys.stderr, flush=True)
        else:
            print(f"it is kept in {self.fallback} and tried again until the job ends", file=sys.stderr, flush=True)
