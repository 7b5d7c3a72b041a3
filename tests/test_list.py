"""labctl list: the submissions, newest first; and the notes on them."""

from __future__ import annotations

from pathlib import Path

from labctl_orchestrator.cli import list_

from .conftest import Labctl, Records, Slurm, squeue_line


def test_submissions_are_listed_newest_first(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    slurm.shows(squeue_line("2000", "RUNNING", "x"))
    records.request(name="older", age_s=3000, lengths=(4,))
    batch = records.submit("2000", name="newer", lengths=(8, 16), partition="dgx2", backend="vllm")
    records.done(batch, records.attempt(batch, slurm_id="2000"))
    newer, older = labctl("list", "--json").json
    assert (newer["name"], newer["partitions"], newer["backends"]) == ("newer", ["dgx2"], ["vllm"])
    assert newer["models"] == ["tiny-llama"]
    assert newer["states"]["done"] == 1 and sum(newer["states"].values()) == 2
    assert (older["name"], older["states"]) == ("older", {"missing": 1})
    head, *lines = labctl("list").out.splitlines()
    assert head.split() == ["submission", "submitted", "runs", "partition", "backend", "model", "note"]
    assert [line.split()[0] for line in lines] == ["newer", "older"]


def test_the_first_column_is_a_word_for_other_commands(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    """Of two submissions with one name, the name means the later one."""
    slurm.shows()
    first = records.request(name="sweep", age_s=3000, lengths=(4,))
    records.request(name="sweep", age_s=2000, lengths=(8,))
    unnamed = records.request(age_s=1000, lengths=(16,))
    words = [line.split()[0] for line in labctl("list").out.splitlines()[1:]]
    assert words == [unnamed, "sweep", first]
    runs = [labctl("status", word, "--json").json[0]["max_new_tokens"] for word in words]
    assert runs == [16, 8, 4]


def test_older_submissions_are_counted(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    slurm.shows()
    for number in range(list_.LATEST + 2):
        records.request(age_s=number, lengths=(4,))
    ran = labctl("list")
    assert len(ran.out.splitlines()) == list_.LATEST + 1
    assert "2 older submissions: labctl list --all" in ran.err
    assert len(labctl("list", "--all", "--json").json) == list_.LATEST + 2


def test_an_empty_list_says_how_to_begin(labctl: Labctl, records: Records) -> None:
    records.workspace.create()
    assert "no submissions yet" in labctl("list").err


def test_a_note_is_listed_and_shown(labctl: Labctl, records: Records, slurm: Slurm, checkpoint: Path) -> None:
    slurm.accepts()
    asked = ["submit", "-p", "dgxh", "--model-id", checkpoint, "--no-preflight", "--json"]
    (run,) = labctl(*asked, "--note", "after the driver update").json["runs"]
    (again,) = labctl(*asked, "--again", "--note", "another look", "--name", "second").json["runs"]
    assert run["run_id"] == again["run_id"]  # a note is no part of a run
    assert [one["note"] for one in labctl("list", "--json").json] == ["another look", "after the driver update"]
    assert "after the driver update" in labctl("list").out
    shown = labctl("show", run["run_id"]).out
    assert "after the driver update (" in shown and "another look (second)" in shown


def test_a_note_is_one_line(labctl: Labctl, records: Records, checkpoint: Path) -> None:
    ran = labctl("submit", "-p", "dgxh", "--model-id", checkpoint, "--note", "a\nb")
    assert (ran.code, ran.out) == (2, "")
    assert "invalid note" in ran.err
