"""What has no bound of its own is read in a bounded memory: logs, queries; and the short form of the fuzzer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from labctl_orchestrator.cli import logs
from labctl_orchestrator.exchange import query

from .conftest import JobArray, Labctl, Ran, Records

# A process's own peak: that of a process that a test started holds the test's own.
COMMAND = (
    "import sys; from labctl_orchestrator.cli import run; code = run(sys.argv[1:]); sys.stdout.flush();"
    " print([l for l in open('/proc/self/status') if 'VmHWM' in l][0], file=sys.stderr); sys.exit(code)"
)


def run(*arguments: object) -> tuple[Ran, int]:
    """A command in a process of its own, and the MiB that it took at most."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )
    peak = int(done.stderr.rpartition("VmHWM:")[2].split()[0]) // 1024
    return Ran(done.returncode, done.stdout, done.stderr), peak


def logged(records: Records) -> tuple[JobArray, Path]:
    batch = records.submit()
    records.done(batch, records.attempt(batch))
    folder = batch.folder / "submitit"
    folder.mkdir()
    return batch, folder / "1000_0_log.out"


def test_a_log_of_a_gigabyte_is_shown_from_its_end(records: Records) -> None:
    batch, log = logged(records)
    with log.open("wb") as file:
        file.truncate(2**30)
        file.seek(2**30)
        file.write(b"\nthe last line\n")
    ran, peak = run("logs", batch.runs[0].run_id)
    assert ran.code == 0, ran.err
    assert ran.out.endswith("\nthe last line\n")
    assert re.search(rf"skipped the first .* of {re.escape(str(log))}", ran.err)
    assert peak < 300


def test_of_a_long_log_whole_lines_are_shown(labctl: Labctl, records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is shortened from 16 MiB, the blocks from 1 MiB."""
    monkeypatch.setattr(logs, "PRINTED_BYTES_AT_MOST", 25)
    monkeypatch.setattr(logs, "BLOCK_BYTES", 7)
    batch, log = logged(records)
    log.write_text("".join(f"line é {number}\n" for number in range(10)), encoding="utf-8")
    ran = labctl("logs", batch.runs[0].run_id)
    assert ran.out == "line é 8\nline é 9\n"
    log.write_text("ÿé" * 5, encoding="utf-8")
    assert labctl("logs", batch.runs[0].run_id).out == "ÿé" * 5


def test_a_log_that_is_a_pipe_is_refused(labctl: Labctl, records: Records) -> None:
    batch, log = logged(records)
    os.mkfifo(log)
    ran = labctl("logs", batch.runs[0].run_id)
    assert ran.code == 5
    assert f"{log}: not a regular file" in ran.err


ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x, 'text' FROM n"


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_an_endless_query_ends_with_a_remedy(records: Records, form: list[str]) -> None:
    records.submit()
    ran, peak = run("query", ENDLESS, *form)
    assert ran.code == 2
    assert "--csv, which prints rows as they come" in ran.err
    assert peak < 300


def test_csv_prints_rows_as_they_come(records: Records) -> None:
    records.submit()
    ran, peak = run("query", f"{ENDLESS} LIMIT 2000000", "--csv")
    assert ran.code == 0, ran.err
    assert ran.out.count("\n") == 2_000_001
    assert peak < 200


def test_one_value_has_a_bound(labctl: Labctl, records: Records) -> None:
    records.submit()
    ran = labctl("query", "SELECT length(hex(zeroblob(1000000000)))")
    assert ran.code == 2
    assert "too big" in ran.err


def test_rows_are_made_some_at_once(records: Records) -> None:
    records.submit()
    records.collect()
    with query.stream_of(records.workspace, f"{ENDLESS} LIMIT 25000") as (columns, batches):
        assert columns == ["x", "'text'"]
        assert [len(rows) for rows in batches] == [10_000, 10_000, 5_000]


def test_no_change_of_a_workspaces_files_is_a_defect_a_hang_or_much_memory() -> None:
    """The short form; python -m tests.fuzz is the long one."""
    command = [sys.executable, "-m", "tests.fuzz", "--seed", "1", "--mutations", "30", "--commands", "2"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
