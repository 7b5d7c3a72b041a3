"""labctl logs"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TextIO

import click

from labctl_orchestrator import screen, status, workspace
from labctl_orchestrator.collect import open_store
from labctl_slurm.errors import WrongUseError

LOOK_EVERY_S = 1.0


@click.command("logs")
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Go on printing until the run has ended.")
def command(run: str, follow: bool) -> None:
    """Print the log of a run's job.

    What the job printed goes to standard output, its errors to standard error; where the run failed, why and what to do come
    last.

    \b
    labctl logs 3f9a12 -f
    """
    here = workspace.existing()
    store = open_store(here)
    screen.refresh(here, store)
    run_id = status.one_run(store, run)
    if "@" in run_id:
        raise WrongUseError(
            f"run {run_id} was imported, and bundles hold no logs",
            f"labctl show {run_id} has its record; the log is where it came from",
        )
    (found,) = status.statuses(here, store, [run_id])
    if found.job_id is None or found.slurm_id is None:
        raise WrongUseError(f"run {run_id} has no job and so no log: {found.state} {found.detail}", found.remedy)
    folder = here.batches / found.job_id.rpartition(".")[0] / "submitit"
    out = _Tail(folder / f"{found.slurm_id}_0_log.out", sys.stdout)
    err = _Tail(folder / f"{found.slurm_id}_0_log.err", sys.stderr)
    while True:
        ended = found.state in status.ENDED
        out.print_new()
        err.print_new()
        if ended or not follow:
            break
        time.sleep(LOOK_EVERY_S)
        status.refresh(here, store)
        (found,) = status.statuses(here, store, [run_id])
    if not (out.seen or err.seen):
        cleaned = ended and not folder.is_dir()
        screen.note("the log was cleaned away" if cleaned else f"no log yet: {found.state} {found.detail}")
    if found.state in status.UNSUCCESSFUL:
        screen.note(f"run {run_id}: {found.state}: {found.detail}")
        screen.note(f"  -> {found.remedy}")


class _Tail:
    """Prints what was added to a file since the last look."""

    def __init__(self, path: Path, stream: TextIO) -> None:
        self.path = path
        self.stream = stream
        self.seen = 0

    def print_new(self) -> None:
        try:
            with self.path.open("rb") as file:
                file.seek(self.seen)
                added = file.read()
        except FileNotFoundError:
            return
        self.seen += len(added)
        self.stream.write(added.decode("utf-8", errors="replace"))
        self.stream.flush()
