"""How long `labctl report` takes for 500 runs among 10,000 with 1,000,000 request rows, and how large its page is.

    python -m tests.benchmarks.report_speed [--runs 10000] [--requests 34] [--sweep 500] [--rounds 3]

Beside it, in the same run, what it cannot do without: the script that draws (Vega, made by vl-convert) and reading the sweep's
request rows with bare SQL. Each figure is the median of the rounds, the wall time of a process of its own. Exit code 1 where a
target was missed: 10 s, 5 MB. With Chromium, the time until the last chart of the page is drawn is told too.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from labctl_orchestrator.store.workspace import Workspace
from labctl_workers.record import read_json, write_json

from .large_workspace import Size, write_workspace

LABCTL = str(Path(sys.executable).parent / "labctl")
TARGET_S, TARGET_BYTES = 10.0, 5_000_000
SWEEP = "the sweep"
THE_SCRIPT = "import vl_convert; vl_convert.javascript_bundle('window.vegaEmbed = vegaEmbed;', vl_version='6.4')"
BARE_SQL = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1])
rows = database.execute("SELECT run_id, e2e_s, ttft_s, tpot_s FROM samples WHERE run_id IN"
                        " (SELECT run_id FROM submission_runs JOIN submissions USING (submission_id)"
                        " WHERE name = ?)", (sys.argv[2],))
print(len(rows.fetchall()))
"""


def main() -> int:
    """Run everything; the exit status tells whether a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=34, help="of a repeat; a record has three")
    parser.add_argument("--sweep", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="labctl-report-") as folder:
        workspace = write_workspace(Path(folder), Size(given.runs, 25, given.requests))
        _name_a_sweep(workspace, given.sweep)
        subprocess.run([LABCTL, "collect"], cwd=folder, check=True, capture_output=True)
        print(f"{given.runs:,} runs, {given.runs * 3 * given.requests:,} request rows; a report of {given.sweep} runs")
        script = _median([sys.executable, "-c", THE_SCRIPT], folder, given.rounds)
        rows = _median([sys.executable, "-c", BARE_SQL, str(workspace.database), SWEEP], folder, given.rounds)
        report = _median([LABCTL, "report", SWEEP], folder, given.rounds)
        page = Path(folder) / "report.html"
        size = page.stat().st_size
        print(f"  the script that draws           {script:7.2f} s")
        print(f"  the requests' rows by bare SQL  {rows:7.2f} s")
        print(
            f"  labctl report                   {report:7.2f} s   target {TARGET_S:g} s, {report / (script + rows):.1f} x both"
        )
        print(f"  the page                        {size / 1e6:7.2f} MB  target {TARGET_BYTES / 1e6:g} MB")
        print(f"  drawn in Chromium               {_drawn(page)}")
    missed = (report > TARGET_S) + (size > TARGET_BYTES)
    print(f"{missed} targets missed")
    return int(missed > 0)


def _name_a_sweep(workspace: Workspace, runs: int) -> None:
    """A request of its own for the first of the runs, beside the one that asked for all."""
    (whole, *_) = sorted(workspace.submissions.glob("*.json"))
    document = read_json(whole)
    sweep = {**document, "submission_id": "20260101-000000-ffff", "name": SWEEP, "runs": document["runs"][:runs]}
    write_json(workspace.submissions / "20260101-000000-ffff.json", sweep, durable=False)


def _median(command: Sequence[str], folder: str, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _drawn(page: Path) -> str:
    """From opening the file to the last chart; why not, where there is no browser."""
    from tests.browser import install_chromium
    from tests.parts import PartMissing

    try:
        path = install_chromium()
        from playwright.sync_api import sync_playwright
    except (PartMissing, ImportError) as error:
        return f"not measured: {error}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        opened = browser.new_page()
        began = time.perf_counter()
        opened.goto(page.as_uri())
        opened.evaluate("labctlReport.drawn")
        took = time.perf_counter() - began
        browser.close()
    return f"{took:7.2f} s"


if __name__ == "__main__":
    sys.exit(main())
