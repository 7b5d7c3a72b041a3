"""What may be thrown away, and that nothing else is."""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.store.database import Store, open_store

from .conftest import JobArray, Labctl, Records, Slurm, ago, squeue_line

TWO_HOURS_S = 7200


def write(path: Path, size: int = 5000, *, age_s: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def ended(records: Records, slurm: Slurm, *, minutes_ago: float = 60, fails: bool = False, **values: Any) -> JobArray:
    """A batch of one job that Slurm has ended, with the files of its work."""
    batch = records.submit(**values)
    attempt = records.attempt(batch)
    records.failed(batch, attempt) if fails else records.done(batch, attempt)
    records.heartbeat(batch, attempt, "ended", done=1)
    records.states(
        batch, state="FAILED" if fails else "COMPLETED", started_at=ago(7000), ended_at=ago(minutes_ago * 60)
    )
    write(batch.folder / "submitit" / "1000_0_log.out")
    write(batch.folder / "submitit" / "1000_submitted.pkl")
    slurm.shows()
    return batch


def kept(records: Records) -> dict[str, bytes]:
    """Every file that is a record of what was asked, submitted, seen or measured."""
    data = records.workspace.data
    return {
        str(path.relative_to(data)): path.read_bytes()
        for path in data.rglob("*.json")
        if not {"heartbeats", "submitit"} & set(path.parts)
        and path not in (records.workspace.last_answer, records.workspace.metadata)
    }


def rows(store: Store) -> dict[str, list[Any]]:
    return {
        name: sorted(map(repr, store.tuples(f"SELECT * FROM {name}")))
        for (name,) in store.tuples("SELECT name FROM sqlite_master WHERE type = 'table'")
        if not name.startswith(("_", "sqlite"))
    }


def test_the_files_of_finished_work_go_and_every_record_stays(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    batch = ended(records, slurm)
    before = kept(records)
    assert labctl("clean", "--yes").code == 0
    assert not (batch.folder / "submitit").exists()
    assert not (batch.folder / "heartbeats").exists()
    assert kept(records) == before
    assert batch.spec(0).name in {Path(name).name for name in before}


def test_rebuild_gives_the_same_rows_after_it(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    ended(records, slurm)
    labctl("clean", "--yes")
    with closing(open_store(records.workspace)) as store:
        before = rows(store)
    assert before["results"]
    assert labctl("collect", "--rebuild").code == 0
    with closing(open_store(records.workspace)) as store:
        assert rows(store) == before


def test_logs_says_that_the_log_was_cleaned_away(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    batch = ended(records, slurm)
    labctl("clean", "--yes")
    assert "labctl clean removed the log" in labctl("logs", batch.runs[0].run_id).err


def test_a_dry_run_tells_the_bytes_and_removes_nothing(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    batch = ended(records, slurm)
    told = labctl("clean", "--dry-run", "--json").json
    assert told["removed"] is False
    logs = next(item for item in told["items"] if item["path"].endswith("submitit"))
    on_disk = sum(path.stat().st_blocks * 512 for path in (batch.folder / "submitit").iterdir())
    assert logs["bytes"] == on_disk > 0
    assert "would be freed" in labctl("clean", "--dry-run").err
    assert len(list((batch.folder / "submitit").iterdir())) == 2


def test_without_somebody_to_ask_nothing_is_removed(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    batch = ended(records, slurm)
    ran = labctl("clean")
    assert ran.code == 2
    assert "--yes" in ran.err
    assert (batch.folder / "submitit").exists()


def test_logs_of_failed_runs_stay_unless_they_are_asked_for(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    batch = ended(records, slurm, fails=True)
    labctl("clean", "--yes")
    assert (batch.folder / "submitit").exists()
    labctl("clean", "--failed", "--yes")
    assert not (batch.folder / "submitit").exists()


def test_a_job_that_ended_minutes_ago_may_be_requeued_and_stays(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    batch = ended(records, slurm, minutes_ago=5)
    labctl("clean", "--yes", "--failed", "--cache")
    assert (batch.folder / "submitit").exists()


@pytest.mark.parametrize("state", ["RUNNING", "PENDING"])
def test_nothing_of_a_job_that_may_run_goes_nor_the_code_it_needs(
    labctl: Labctl, records: Records, slurm: Slurm, state: str
) -> None:
    batch = records.submit()
    records.done(batch, records.attempt(batch))
    write(batch.folder / "submitit" / "1000_submitted.pkl")
    code = write(records.workspace.code / "0123456789ab" / "a.py", age_s=TWO_HOURS_S).parent
    os.utime(code, (time.time() - TWO_HOURS_S,) * 2)
    cache = write(records.workspace.data / "cache" / "kernel")
    slurm.shows(squeue_line("1000", state, f"labctl-{batch.array_id}"))
    labctl("clean", "--yes", "--failed", "--cache")
    assert (batch.folder / "submitit" / "1000_submitted.pkl").exists()
    assert (code.exists(), cache.exists()) == (True, True)


def test_code_that_nothing_needs_goes_and_what_is_being_written_stays(
    labctl: Labctl, records: Records, slurm: Slurm
) -> None:
    ended(records, slurm)
    old = write(records.workspace.code / "0123456789ab" / "a.py").parent
    os.utime(old, (time.time() - TWO_HOURS_S,) * 2)
    new = write(records.workspace.code / ".staging" / "a.py").parent
    labctl("clean", "--yes")
    assert (old.exists(), new.exists()) == (False, True)


def test_caches_go_only_when_they_are_named(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    ended(records, slurm)
    cache = write(records.workspace.data / "cache" / "dgxh" / "kernel")
    labctl("clean", "--yes")
    assert cache.exists()
    labctl("clean", "--yes", "--cache")
    assert not cache.exists()


def test_a_cache_that_is_a_link_is_named_and_left_alone(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    ended(records, slurm)
    elsewhere = write(records.workspace.root.parent / "elsewhere" / "kernel")
    (records.workspace.data / "cache").symlink_to(elsewhere.parent)
    ran = labctl("clean", "--yes", "--cache")
    assert ran.code == 0
    assert f"cache is a link to {elsewhere.parent}" in ran.err
    assert elsewhere.exists()


def test_what_killed_writers_left_goes_after_an_hour(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    batch = ended(records, slurm)
    data = records.workspace.data
    old = [
        write(data / "results" / "r" / ".a.json.ab_3x9kz", age_s=TWO_HOURS_S),
        write(batch.folder / ".states.json.ab_3x9kz", age_s=TWO_HOURS_S),
        write(data / "labctl-9.rebuild-77", age_s=TWO_HOURS_S),
        write(data / "labctl-9.rebuild-77-journal", age_s=TWO_HOURS_S),
    ]
    young = write(data / "results" / "r" / ".b.json.ab_3x9kz")
    foreign = write(data / "results" / "r" / ".notes.json.of-mine", age_s=TWO_HOURS_S)
    labctl("clean", "--yes")
    assert [path.exists() for path in (*old, young, foreign)] == [False] * 4 + [True] * 2


def test_names_choose_whose_work_is_cleaned(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    first = ended(records, slurm, name="first", lengths=(8,))
    second = ended(records, slurm, name="second", lengths=(16,))
    labctl("clean", "--yes", "first")
    assert not (first.folder / "submitit").exists()
    assert (second.folder / "submitit").exists()


def test_a_second_clean_finds_nothing(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    ended(records, slurm)
    labctl("clean", "--yes")
    assert "nothing to remove" in labctl("clean", "--yes").err


# ---------------------------------------------------------------- du


def test_du_accounts_for_every_block_and_tells_what_clean_would_free(
    labctl: Labctl, records: Records, slurm: Slurm
) -> None:
    ended(records, slurm, name="first")
    write(records.workspace.data / "cache" / "kernel", 100_000)
    labctl("status")
    told = labctl("du", "--json").json
    files = [path for path in records.workspace.data.rglob("*") if path.is_file()]
    assert sum(told["kinds"].values()) == sum(path.stat().st_blocks * 512 for path in files)
    for kind in ("records", "logs", "scripts and pickles", "database", "compiled by engines"):
        assert told["kinds"][kind] > 0
    freed = labctl("clean", "--dry-run", "--json").json
    assert told["clean_would_free"] == sum(item["bytes"] for item in freed["items"]) > 0


def test_du_names_the_largest_requests_first(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    ended(records, slurm, name="small", lengths=(8,))
    large = ended(records, slurm, name="large", lengths=(16,))
    write(large.folder / "submitit" / "1000_0_log.err", 500_000)
    out = labctl("du").out
    assert out.index("large") < out.index("small")
