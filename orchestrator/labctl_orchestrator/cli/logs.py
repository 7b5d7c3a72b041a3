"""labctl logs"""

from __future__ import annotations

import codecs
import os
import sys
import time
from pathlib import Path
from typing import IO, TextIO

import click

from labctl_orchestrator.exchange.streams import for_programs
from labctl_orchestrator.store import select_runs, workspace
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.terminal import statuses, tables
from labctl_orchestrator.tracking import refresh, run_status, status, wait
from labctl_slurm.errors import LabctlError, WrongUseError
from labctl_workers.record import open_regular

LOOK_EVERY_S = 1.0
PRINTED_BYTES_AT_MOST = 16 * 2**20
BLOCK_BYTES = 2**20


@click.command("logs")
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Print new lines until the run has ended.")
def command(run: str, follow: bool) -> None:
    """Print the log of a run's job.

    Prints the last 16 MiB of the job's stdout on stdout, and of its stderr on stderr. For a failed run, the reason and the
    remedy follow the log.

    \b
    labctl logs 3f9a12 -f
    """
    here = workspace.existing()
    store = open_store(here)
    statuses.refresh_chosen(here, store, [run])
    run_id = select_runs.one_run(store, run)
    if "@" in run_id:
        raise WrongUseError(
            f"no log of imported run {run_id}: bundles hold no logs",
            f"labctl show {run_id} prints its record",
        )
    (found,) = status.statuses(here, store, [run_id])
    if found.job_id is None or found.slurm_id is None:
        message = f"no log of run {run_id}, which has no job: {found.sentence}"
        raise WrongUseError(message, found.remedy or "labctl status shows when its job starts")
    folder = here.arrays / found.job_id.rpartition(".")[0] / "submitit"
    out = _Tail(folder / f"{found.slurm_id}_0_log.out", for_programs(sys.stdout))
    err = _Tail(folder / f"{found.slurm_id}_0_log.err", for_programs(sys.stderr))
    pause_s = wait.LOOK_AT_FIRST_EVERY_S
    queries = refresh.poll_of(here, store, [run_id], asked=True)
    while True:
        ended = found.state in run_status.ENDED
        out.print_new()
        err.print_new()
        if ended or not follow:
            break
        pause_s = min(1.2 * pause_s, wait.LOOK_AT_LAST_EVERY_S)
        asked_at = time.monotonic()
        while time.monotonic() < asked_at + pause_s:  # read the file often, the other files seldom
            time.sleep(min(LOOK_EVERY_S, pause_s))
            out.print_new()
            err.print_new()
        refresh.refresh(here, store, [run_id], slurm=queries.is_due())
        (found,) = status.statuses(here, store, [run_id])
    if not (out.seen or err.seen):
        cleaned = ended and not folder.is_dir()
        tables.note("labctl clean removed the log" if cleaned else f"no log yet: {found.sentence}")
    if found.state in run_status.UNSUCCESSFUL:
        tables.note(f"run {run_id}: {found.sentence}")
        tables.note(f"  -> {found.remedy}")


class _Tail:
    """Prints the lines added to a file since the last call; of a long file, only the end."""

    def __init__(self, path: Path, stream: TextIO) -> None:
        self.path = path
        self.stream = stream
        self.seen = 0

    def print_new(self) -> None:
        try:
            with open_regular(self.path) as file:
                self._print(file)
        except FileNotFoundError:
            return
        except ValueError as error:
            raise LabctlError(f"{self.path}: {error}", "labctl show prints the failure of the run") from None
        self.stream.flush()

    def _print(self, file: IO[bytes]) -> None:
        size = os.fstat(file.fileno()).st_size
        start = max(self.seen, size - PRINTED_BYTES_AT_MOST)
        file.seek(start)
        if start > self.seen:
            file.readline(BLOCK_BYTES)  # start at a whole line
            tables.note(f"skipped the first {tables.figure(file.tell() - self.seen, 'B')} of {self.path}")
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        while file.tell() < size and (block := file.read(min(BLOCK_BYTES, size - file.tell()))):
            self.stream.write(decoder.decode(block))
        self.stream.write(decoder.decode(b"", final=True))
        self.seen = file.tell()
