"""Writes a job's records. A record that cannot be written is kept and tried again: before each further run and at the end.

Kept records are in memory, and in a folder on the node's own disk that the log names. Records follow a workspace that was
moved; a workspace that was deleted is not created again.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

from labctl_workers.record import JobFolder, RunResult, write_json

RETRY_EVERY_S = 2.0


class Records:
    """The records of the job at `folder`; `fallback` is the folder for kept records, made with the first of them."""

    def __init__(self, folder: JobFolder) -> None:
        self.folder = folder
        self.fallback: Path | None = None
        self.error: OSError | None = None
        self._kept: dict[str, RunResult] = {}
        # An open folder stays the same one when the workspace is moved.
        self._data = os.open(folder.data, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        os.close(self._data)

    @property
    def unwritten(self) -> int:
        """The number of kept records."""
        return len(self._kept)

    def has(self, run_id: str, attempt_id: str) -> bool:
        """Whether there is such a record, written or kept."""
        return f"{run_id}/{attempt_id}.json" in self._kept or self.folder.record(run_id, attempt_id).exists()

    def write(self, result: RunResult) -> None:
        """Write the record, or keep it where that fails."""
        name = f"{result.run_id}/{result.attempt.attempt_id}.json"
        self._kept[name] = result
        if self.try_again():
            return
        print(f"cannot write record {name}: {self.error}", file=sys.stderr)
        try:
            if self.fallback is None:
                self.fallback = Path(tempfile.mkdtemp(prefix="labctl-records-"))
            write_json(self.fallback / name, result.to_json())
        except OSError as error:
            print(f"record kept in memory only: {error}", file=sys.stderr, flush=True)
        else:
            print(f"record kept in {self.fallback}; labctl tries again until the job ends", file=sys.stderr, flush=True)

    def try_again(self) -> bool:
        """Write the kept records; returns whether all are written."""
        for name, result in list(self._kept.items()):
            try:
                self.follow()
                write_json(self.folder.results / name, result.to_json())
            except OSError as error:
                self.error = error
                return False
            del self._kept[name]
            if self.fallback is not None:
                (self.fallback / name).unlink(missing_ok=True)
        return True

    def finish(self, within_s: float) -> bool:
        """Try for so many seconds; returns whether all records are written. The log reports those that are not."""
        until = time.monotonic() + within_s
        while not self.try_again():
            if time.monotonic() > until:
                where = f"kept on {os.uname().nodename} in {self.fallback}" if self.fallback else "lost"
                print(f"cannot write {self.unwritten} records ({where}): {self.error}", file=sys.stderr, flush=True)
                return False
            time.sleep(RETRY_EVERY_S)
        if self.fallback is not None:
            with contextlib.suppress(OSError):
                for path in self.fallback.iterdir():
                    path.rmdir()
                self.fallback.rmdir()
            print("all kept records are written", file=sys.stderr, flush=True)
        return True

    def follow(self) -> None:
        """Continue in the folder to which the workspace was moved."""
        if self.folder.spec.exists():
            return
        spec = Path(f"/proc/self/fd/{self._data}").readlink() / self.folder.spec.relative_to(self.folder.data)
        if spec.exists():
            print(f"workspace moved: records go to {spec.parents[2]}", file=sys.stderr, flush=True)
            self.folder = JobFolder(spec)
