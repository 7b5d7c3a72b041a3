"""What labctl query, export and bundle cost in a large workspace, each beside the bare work.

    python -m tests.benchmarks.export_speed --runs 10000 --requests 34

The floor of an export is Python's csv over the same rows of the same view; of the Parquet file, that CSV; of a median over all
runs, the plain average of the same rows.
"""

from __future__ import annotations

import argparse
import csv
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from labctl_orchestrator.store.collect import collect
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.store.views import view_of
from labctl_orchestrator.store.workspace import Workspace

from .large_workspace import Size, write_workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=34)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = write_workspace(Path(folder) / "lab", Size(options.runs, requests=options.requests))
        with closing(open_store(workspace)) as store:
            collect(workspace, store)
            ((rows,),) = store.tuples("SELECT count(*) FROM samples")
        print(
            f"{options.runs} runs, {rows:,} request rows, {workspace.database.stat().st_size / 2**20:.0f} MiB of database"
        )
        measure(workspace)


def measure(workspace: Workspace) -> None:
    root = workspace.root
    labctl(workspace, "query", "SELECT 1")  # the folders are settled, the pages are in memory
    floor = took(lambda: bare_csv(workspace, root / "bare.csv"))
    print(f"bare csv of the requests' view               {floor:7.2f} s")
    for name in ("requests.csv", "requests.parquet"):
        seconds = took(lambda name=name: labctl(workspace, "export", "--table", "requests", "-o", root / name))  # type: ignore[misc]
        size = (root / name).stat().st_size / 2**20
        print(
            f"labctl export {name:<18}             {seconds:7.2f} s, {seconds / floor:.2f} of the floor, {size:.0f} MiB"
        )
    average = "SELECT avg(output_tok_s) FROM measured_repeats WHERE latest"
    bare = took(lambda: bare_sql(workspace, "SELECT avg(output_tok_s) FROM repeats"))
    print(f"bare SQL, the average of a metric            {bare:7.2f} s")
    for told, sql in (
        ("its average, of the view", average),
        ("its median a run, of the view", "SELECT sum(output_tok_s) FROM measured_runs"),
    ):
        seconds = took(lambda sql=sql: labctl(workspace, "query", sql))  # type: ignore[misc]
        print(f"labctl query, {told:<30} {seconds:7.2f} s, {seconds / bare:.1f} of the floor")


def bare_csv(workspace: Workspace, path: Path) -> None:
    with (
        closing(sqlite3.connect(workspace.database)) as connection,
        path.open("w", newline="", encoding="utf-8") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows(connection.execute(f"SELECT * FROM {view_of('requests').name}"))


def bare_sql(workspace: Workspace, sql: str) -> None:
    with closing(sqlite3.connect(workspace.database)) as connection:
        connection.execute(sql).fetchall()


def labctl(workspace: Workspace, *arguments: object) -> None:
    command = [sys.executable, "-c", "from labctl_orchestrator.cli import main; main()", *map(str, arguments)]
    subprocess.run(command, cwd=workspace.root, env={**os.environ, "PATH": ""}, capture_output=True, check=True)


def took(work: Callable[[], object]) -> float:
    """Seconds, the best of three."""
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    main()
