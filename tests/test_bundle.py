"""A sweep in one file: the same bytes each time, nothing of its maker's machine, taken in once, and refused once changed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.exchange import bundle, import_bundle
from labctl_orchestrator.store.collect import rebuild
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import WrongUseError
from labctl_workers.record import ModelRef, read_json, write_json

from .conftest import JobArray, Labctl, Records, edit_json, files_below, measured, refused
from .test_collect import contents

RATE = "output_tok_s"


@pytest.fixture
def hers(tmp_path_factory: pytest.TempPathFactory, records: Records) -> Records:
    """Somebody else's workspace, with a sweep of two lengths that was measured there, twice as slow as `measured`."""
    theirs = Records(Workspace(tmp_path_factory.mktemp("ada") / "lab"))
    batch = theirs.submit("500", name="lengths", lengths=(16, 32))
    attempt = theirs.attempt(batch, slurm_id="500")
    for run in batch.runs:
        theirs.done(batch, attempt, run, repeats=[slower(repeat) for repeat in range(3)])
    theirs.states(batch, state="COMPLETED", queued_at="2026-01-01T10:00:00Z", started_at="2026-01-01T10:00:30Z",
                  ended_at="2026-01-01T10:01:30Z")  # fmt: skip
    script = batch.folder / "submitit" / "500_submission.sh"
    script.parent.mkdir()
    script.write_text(
        f"#!/bin/bash\n#SBATCH --output={theirs.workspace.root}/.labctl/x.out\nexport HF_TOKEN='hf_abcdefghijklmnopqrst'\n"
        "export HF_HOME=/home/ada/hub\nsrun python\n",
        encoding="utf-8",
    )
    (script.parent / ".submission_file_1f.sh").write_text("submitit's draft\n", encoding="utf-8")
    (script.parent / "500_0_log.out").write_text("a log\n", encoding="utf-8")
    theirs.collect()
    return theirs


def slower(number: int) -> Any:
    repeat = measured(number, text="a shard each, slowly")
    repeat.wall_s *= 2
    return repeat


@pytest.fixture
def ada(hers: Records, tmp_path: Path) -> Path:
    """Her bundle."""
    return bundled(hers, tmp_path / "ada.labctl.zip")


def bundled(records: Records, path: Path, author: str | None = None) -> Path:
    with closing(open_store(records.workspace)) as store, path.open("wb") as file:
        run_ids = [run_id for (run_id,) in store.tuples("SELECT run_id FROM runs ORDER BY run_id")]
        bundle.write(records.workspace, store, "lengths", run_ids, author, file)
    return path


def own_sweep(records: Records, *, lengths: tuple[int, ...] = (16, 32)) -> JobArray:
    batch = records.submit(name="mine", lengths=lengths)
    attempt = records.attempt(batch)
    for run in batch.runs:
        records.done(batch, attempt, run)
    return batch


# ---------------------------------------------------------------- what is in it


def test_a_bundle_holds_records_requests_jobs_and_scripts_and_no_log(ada: Path, hers: Records) -> None:
    with zipfile.ZipFile(ada) as archive:
        names = archive.namelist()
        kinds = {name.split("/")[0] for name in names}
        assert kinds == {"arrays", "manifest.json", "submissions", "results"}
        assert sum(name.startswith("results/") for name in names) == 2
        assert [name for name in names if name.endswith((".out", ".pkl", "intent.json", "submitted.json"))] == []
        assert any(name.endswith("500_submission.sh") for name in names)
        manifest = json.loads(archive.read("manifest.json"))
        assert (manifest["runs"], manifest["records"], manifest["name"]) == (2, 2, "lengths")
        for name, told in manifest["files"].items():
            assert hashlib.sha256(archive.read(name)).hexdigest() == told["sha256"]


def test_the_same_sweep_makes_the_same_bytes(hers: Records, tmp_path: Path) -> None:
    first = bundled(hers, tmp_path / "one").read_bytes()
    moved = hers.workspace.root.rename(hers.workspace.root.parent / "elsewhere")
    hers.workspace = Workspace(moved)
    rebuild(hers.workspace)
    second = bundled(hers, tmp_path / "two").read_bytes()
    # But for the one line of the script that names the folder it was sent from, which is not there any more.
    assert {name for name, data in unpacked(first).items() if unpacked(second)[name] != data} <= {
        name for name in unpacked(first) if name.endswith(".sh") or name == "manifest.json"
    }
    assert bundled(hers, tmp_path / "three").read_bytes() == second


def unpacked(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_nothing_of_the_makers_machine_is_in_it(hers: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/data/people/ada")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    hers.model = ModelRef("tiny", path="/scratch/ada/models/tiny", fingerprint="1" * 64)
    batch = hers.submit("501", lengths=(8,))
    record = hers.failed(batch, hers.attempt(batch, slurm_id="501"))
    (request,) = (path for path in hers.workspace.submissions.iterdir() if read_json(path)["name"] is None)
    edit_json(request, request={"model_id": ["/scratch/ada/models/tiny"], "prompts": "/home/ada/prompts.txt"})
    failure = read_json(record)["failure"]
    failure["traceback"] = (
        f"File {hers.workspace.root}/x.py\nFile /data/people/ada/lib.py, File /home/bob/y.py\n"
        "token hf_abcdefghijklmnopqrst, key 0123456789abcdef, no /scratch/ada/models/tiny/config.json"
    )
    edit_json(record, failure=failure)
    hers.collect()
    files = unpacked(bundled(hers, tmp_path / "bundle").read_bytes())
    said = files[str(record.relative_to(hers.workspace.data))].decode()
    assert "File (workspace)/x.py" in said and "File ~/lib.py" in said and "File ~/y.py" in said
    assert "token [removed], key [removed], no tiny/config.json" in said
    assert '"request":{"model_id":["tiny"],"prompts":"~/prompts.txt"}' in files[f"submissions/{request.name}"].decode()
    script = next(data.decode() for name, data in files.items() if name.endswith(".sh"))
    assert "#SBATCH --output=(workspace)/.labctl/x.out" in script
    assert "export HF_TOKEN=[removed]\nexport HF_HOME=~/hub" in script
    everything = b"".join(files.values()).decode()
    for word in (str(hers.workspace.root), "/scratch", "/home", "hf_abc", "0123456789abcdef", "people"):
        assert word not in everything, word


@pytest.mark.parametrize("where", ["environment", "shape"])
def test_a_prompt_that_holds_a_token_is_refused(
    labctl: Labctl, records: Records, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    token = "only-i-know-this" if where == "environment" else "hf_abcdefghijklmnopqrst"
    monkeypatch.setenv("MY_TOKEN", token if where == "environment" else "")
    batch = records.submit(prompt=f"Log in with {token}.")
    records.done(batch, records.attempt(batch))
    ran = labctl("bundle")
    assert ran.code == 5
    assert "possible access token" in ran.err and token not in ran.err
    assert not list(records.workspace.root.glob("*.zip"))


def test_labctl_bundle_writes_a_file_and_says_what_is_in_it(labctl: Labctl, records: Records) -> None:
    own_sweep(records)
    ran = labctl("bundle", "--author", "bob")
    assert ran.code == 0
    assert "mine.labctl.zip: 2 runs, 2 records" in ran.out
    told = labctl("bundle", "mine", "-o", "again.zip", "--author", "bob", "--json").json
    assert told["sha256"] == hashlib.sha256(Path("mine.labctl.zip").read_bytes()).hexdigest()
    assert (told["author"], told["records"]) == ("bob", 2)


def test_of_a_few_runs_no_other_runs_record_or_request_is_handed_on(labctl: Labctl, records: Records) -> None:
    batch = own_sweep(records)
    labctl("bundle", batch.runs[0].run_id, "-o", "one.zip")
    names = list(unpacked(Path("one.zip").read_bytes()))
    assert [name.split("/")[1] for name in names if name.startswith("results/")] == [batch.runs[0].run_id]
    assert not any(name.startswith("submissions/") for name in names)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--author", "a b"), "invalid label: --author"),
        (("-o", "nowhere/x.zip"), "no such folder: nowhere"),
        (("nonsense",), "no run, submission"),
    ],
)
def test_what_cannot_be_bundled_is_one_clear_message(
    labctl: Labctl, records: Records, arguments: tuple[str, ...], said: str
) -> None:
    own_sweep(records)
    ran = labctl("bundle", *arguments)
    assert ran.code == 2
    assert said in ran.err


def test_a_sweep_without_a_record_is_no_bundle(labctl: Labctl, records: Records) -> None:
    records.submit(name="waits")
    ran = labctl("bundle")
    assert ran.code == 2
    assert "no run has a record: waits" in ran.err


def test_a_record_that_no_import_would_take_is_left_out(labctl: Labctl, records: Records) -> None:
    batch = own_sweep(records)
    record = next((records.workspace.results / batch.runs[0].run_id).iterdir())
    document = read_json(record)
    document["repeats"][0]["samples"][0]["log_probabilities"] = [float("nan")] * 4
    write_json(record, document)
    assert labctl("bundle", "-o", "mine.zip").code == 0
    with import_bundle.open_bundle(Path("mine.zip")) as found:
        assert [name.split("/")[1] for name in found.records] == [batch.runs[1].run_id]


# ---------------------------------------------------------------- taken in


def test_an_imported_run_is_compared_with_ones_own(labctl: Labctl, records: Records, ada: Path) -> None:
    own_sweep(records)
    ran = labctl("import", ada)
    assert (ran.code, ran.out) == (0, "ada: 2 records imported\n")
    answer = labctl("compare", "--all", "--by", "origin", "--metric", RATE, "--json").json
    assert [block["fixed"] for block in answer["blocks"]] == [{"max_new_tokens": 16}, {"max_new_tokens": 32}]
    for block in answer["blocks"]:
        ours, theirs = block["rows"]
        assert (ours["at"], theirs["at"]) == ({"origin": "here"}, {"origin": "ada"})
        assert theirs["ratio"] == pytest.approx(0.5)
        assert theirs["run_id"] == f"{ours['run_id']}@ada"
    assert [row["text"] for block in answer["blocks"] for row in block["rows"]] == [
        "a shard each", "a shard each, slowly"
    ] * 2  # fmt: skip


def test_imported_runs_stand_in_the_same_order_in_every_block_whose_first_is_the_baseline(
    labctl: Labctl, records: Records, hers: Records, tmp_path: Path
) -> None:
    for number, dtype in enumerate(("float32", "bfloat16", "float16")):
        batch = hers.submit(str(9000 + number), lengths=(16, 32, 64, 128), dtypes=(dtype,))
        attempt = hers.attempt(batch, slurm_id=str(9000 + number))
        for run in batch.runs:
            hers.done(batch, attempt, run)
    hers.collect()
    own_sweep(records)
    assert labctl("import", bundled(hers, tmp_path / "hers.zip"), "--origin", "ada").code == 0
    answer = labctl("compare", "ada", "--by", "dtype", "--metric", RATE, "--json").json
    rows = [[(row["at"]["dtype"], row["is_baseline"]) for row in block["rows"]] for block in answer["blocks"]]
    assert rows == [[("bfloat16", True), ("float16", False), ("float32", False)]] * 4


def test_an_imported_run_has_no_log_and_says_where_it_is(labctl: Labctl, records: Records, ada: Path) -> None:
    labctl("import", ada)
    run_id = labctl("export", "ada", "--json").json[0]["run_id"]
    ran = labctl("logs", run_id)
    assert ran.code == 2
    assert "bundles hold no logs" in ran.err and "labctl show" in ran.err


def test_a_class_is_one_table(labctl: Labctl, records: Records, ada: Path, hers: Records, tmp_path: Path) -> None:
    bob = bundled(hers, tmp_path / "whatever.zip", author="bob")
    own_sweep(records)
    assert labctl("import", ada, bob).out.splitlines() == ["ada: 2 records imported", "bob: 2 records imported"]
    answer = labctl("compare", "--all", "--by", "origin", "--where", "max_new_tokens=16", "--json").json
    assert [row["at"]["origin"] for row in answer["blocks"][0]["rows"]] == ["here", "ada", "bob"]
    rows = labctl("query", "SELECT origin, count(*) AS n FROM measured_runs GROUP BY 1 ORDER BY 1", "--json").json
    assert rows == [{"origin": "ada", "n": 2}, {"origin": "bob", "n": 2}, {"origin": "here", "n": 2}]
    assert len(labctl("export", "--json").json) == 6
    assert [row["origin"] for row in labctl("export", "ada", "--json").json] == ["ada", "ada"]


def test_an_imported_run_is_named_by_its_id_and_its_origin(labctl: Labctl, records: Records, ada: Path) -> None:
    batch = own_sweep(records)
    labctl("import", ada)
    run_id = batch.runs[0].run_id
    assert labctl("show", run_id[:6], "--json").json["status"]["run_id"] == run_id
    shown = labctl("show", f"{run_id[:6]}@ada", "--json").json
    assert (shown["status"]["run_id"], shown["status"]["state"]) == (f"{run_id}@ada", "done")
    assert shown["records"][0]["run_id"] == run_id
    assert "a shard each, slowly" in labctl("show", f"{run_id}@ada").out
    texts = labctl("compare", "--text", run_id, f"{run_id}@ada", "--json").json
    assert texts["runs"] == [run_id, f"{run_id}@ada"]
    assert labctl("compare", "ada", "--json").json["blocks"][0]["rows"][0]["run_id"].endswith("@ada")


def test_without_a_run_of_ones_own_the_digits_alone_name_the_imported_one(
    labctl: Labctl, records: Records, ada: Path
) -> None:
    labctl("import", ada)
    (first, _) = labctl("query", "SELECT run_id FROM measured_runs", "--json").json
    assert labctl("show", first["run_id"][:6]).code == 0
    assert labctl("compare", "--all").code == 0


def test_what_others_measured_is_not_what_was_measured_here(labctl: Labctl, records: Records, ada: Path) -> None:
    """No status, retry, cancel or clean has to do with it, and Slurm is not asked."""
    own_sweep(records, lengths=(64,))
    labctl("import", ada)
    assert len(labctl("status", "--all", "--json").json) == 1
    with closing(open_store(records.workspace)) as store:
        assert (
            store.rows("SELECT * FROM jobs WHERE job_id LIKE '%@ada' AND (slurm_id IS NOT NULL OR state IS NOT NULL)")
            == []
        )
        assert store.tuples("SELECT count(*) FROM submissions") == [(1,)]
    assert labctl("retry", "ada").code == 0
    assert labctl("bundle", "ada").code == 2
    assert "share the bundle from which it was imported" in labctl("bundle", "ada").err


def test_the_jobs_times_come_with_it(labctl: Labctl, records: Records, ada: Path) -> None:
    labctl("import", ada)
    rows = labctl("query", "SELECT DISTINCT queue_s, gpu_s FROM measured_runs", "--json").json
    assert rows == [{"queue_s": 30.0, "gpu_s": 120.0}]


def test_a_job_that_was_requeued_there_held_what_all_its_starts_held(
    labctl: Labctl, records: Records, hers: Records, tmp_path: Path
) -> None:
    (folder,) = hers.workspace.arrays.iterdir()
    states = read_json(folder / "states.json")
    write_json(folder / "states.json", {job: {**state, "held_before_s": 40.0} for job, state in states.items()})
    labctl("import", bundled(hers, tmp_path / "requeued.labctl.zip"), "--origin", "ada")
    (job,) = labctl("export", "ada", "--table", "jobs", "--json").json
    assert (job["origin"], job["held_s"], job["held_gpu_s"], job["runs_done"]) == ("ada", 100.0, 200.0, 2)
    assert (job["limit_gpu_s"], job["runs_planned"], job["submission"]) == (None, None, None)


@pytest.mark.parametrize("times", [1, 3])
def test_it_is_imported_once_however_often(labctl: Labctl, records: Records, ada: Path, times: int) -> None:
    own_sweep(records)
    labctl("import", ada)
    before = files_below(records.workspace.data)
    for _ in range(times):
        ran = labctl("import", ada)
        assert (ran.code, ran.out) == (0, "ada: bundle already imported\n")
    assert files_below(records.workspace.data) == before


def test_a_name_that_would_colour_the_terminal_is_written_out(labctl: Labctl, records: Records, ada: Path) -> None:
    def coloured(files: dict[str, bytes]) -> None:
        files[bundle.MANIFEST] = json.dumps({**json.loads(files[bundle.MANIFEST]), "name": "\x1b[31mred"}).encode()

    ran = labctl("import", "--check", remade(ada, coloured))
    assert (ran.code, ran.out.split(",")[0]) == (0, "changed: \\x1b[31mred")


def test_another_label_for_what_was_imported_is_refused_and_changes_nothing(
    labctl: Labctl, records: Records, ada: Path
) -> None:
    labctl("import", ada)
    before = files_below(records.workspace.data)
    ran = labctl("import", ada, "--origin", "bea")
    assert ran.code == 2
    assert "was imported already, as ada" in ran.err
    assert f"rm -r {records.workspace.imports / 'ada'}" in ran.err
    assert files_below(records.workspace.data) == before
    assert labctl("import", ada, "--origin", "ada").code == 0


@pytest.mark.parametrize("command", ["compare", "report"])
def test_where_all_is_imported_that_is_what_is_shown(labctl: Labctl, records: Records, ada: Path, command: str) -> None:
    labctl("import", ada)
    ran = labctl(command)
    assert ran.code == 0, ran.err
    nothing_own = labctl("status")
    assert nothing_own.code == 2
    assert "imported runs only" in nothing_own.err


def test_a_later_bundle_of_the_same_person_brings_what_is_new(
    labctl: Labctl, records: Records, hers: Records, ada: Path, tmp_path: Path
) -> None:
    labctl("import", ada)
    batch = hers.submit("502", name="more", lengths=(64,))
    hers.done(batch, hers.attempt(batch, slurm_id="502"))
    hers.collect()
    later = bundled(hers, tmp_path / "later.zip")
    ran = labctl("import", later, "--origin", "ada")
    assert ran.out == "ada: 1 records imported, 2 already imported from another bundle\n"
    assert labctl("query", "SELECT count(*) AS n FROM measured_runs", "--json").json == [{"n": 3}]


def test_ones_own_records_are_left_as_they_are(labctl: Labctl, records: Records, tmp_path: Path) -> None:
    own_sweep(records)
    labctl("bundle", "-o", tmp_path / "mine.zip")
    before = labctl("query", "SELECT count(*) AS n FROM results", "--json").json
    ran = labctl("import", tmp_path / "mine.zip")
    assert ran.out == "mine: 0 records imported, 2 skipped: this workspace's own\n"
    assert labctl("query", "SELECT count(*) AS n FROM results", "--json").json == before


def test_a_database_made_again_is_equal_row_for_row(labctl: Labctl, records: Records, ada: Path) -> None:
    own_sweep(records)
    labctl("import", ada)
    labctl("status")
    before = contents(records.workspace)
    assert len(before["bundles"]) == 1
    labctl("collect", "--rebuild")
    assert contents(records.workspace) == before


@pytest.mark.parametrize("gone", ["", "*/bundle.json", "*/results", "*/arrays"])
def test_what_is_deleted_of_an_import_leaves_the_index(labctl: Labctl, records: Records, ada: Path, gone: str) -> None:
    own_sweep(records)
    labctl("import", ada)
    folder = records.workspace.imports / "ada"
    (path,) = folder.glob(gone) if gone else (folder,)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    labctl("collect")
    now = contents(records.workspace)
    assert {row["run_id"] for row in now["results"] if "@" in row["run_id"]} == set() or gone in (
        "*/bundle.json",
        "*/arrays",
    )
    labctl("collect", "--rebuild")
    assert contents(records.workspace) == now


def test_a_report_shows_a_class_s_results(labctl: Labctl, records: Records, ada: Path) -> None:
    own_sweep(records)
    labctl("import", ada)
    for names in (["--all"], ["ada"]):
        ran = labctl("report", *names, "-o", "report.html")
        assert ran.code == 0, ran.err
        assert "a shard each, slowly" in Path("report.html").read_text(encoding="utf-8")


def test_a_failure_of_somebody_else_is_told_too(
    labctl: Labctl, records: Records, hers: Records, tmp_path: Path
) -> None:
    batch = hers.submit("503", lengths=(8,))
    hers.failed(batch, hers.attempt(batch, slurm_id="503"))
    hers.collect()
    labctl("import", bundled(hers, tmp_path / "ada.zip"))
    (failed,) = labctl("query", "SELECT run_id, failure_kind FROM failed_runs", "--json").json
    assert failed["failure_kind"] == "gpu-out-of-memory"
    shown = labctl("show", failed["run_id"])
    assert shown.code == 0 and "out of memory" in shown.out
    assert labctl("compare", "ada").code == 0


def test_an_import_makes_a_workspace_where_there_is_none(labctl: Labctl, records: Records, ada: Path) -> None:
    assert labctl("import", ada).code == 0
    assert records.workspace.database.is_file()
    assert [one["new"] for one in labctl("import", ada, "--json").json] == [0]


def test_check_takes_nothing_in(labctl: Labctl, records: Records, ada: Path) -> None:
    ran = labctl("import", "--check", ada)
    assert (ran.code, ran.out) == (0, "ada: lengths, 2 records, valid\n")
    assert not records.workspace.data.exists()


# ---------------------------------------------------------------- and refused


def test_changed_by_one_byte_anywhere_it_is_refused_or_holds_the_same(
    labctl: Labctl, records: Records, ada: Path, tmp_path: Path
) -> None:
    """Of a few bytes of the archive, such as a file's date, nothing that is imported depends."""
    content, files = ada.read_bytes(), unpacked(ada.read_bytes())
    places = {0, *range(len(content) - 100, len(content)), *random.Random(7).sample(range(len(content)), 150)}
    refusals = 0
    for place in sorted(places):
        path = tmp_path / "changed.zip"
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x11]) + content[place + 1 :])
        try:
            with import_bundle.open_bundle(path) as found:
                assert {name: found.content(name) for name in found.names} == {
                    name: data for name, data in files.items() if name != bundle.MANIFEST
                }, place
        except WrongUseError as error:
            refusals += 1
            assert error.message.startswith("changed.zip is refused: "), place
    assert refusals > 100
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    ran = labctl("import", tmp_path / "cut.zip")
    assert ran.code == 2
    assert not records.workspace.data.exists()


def remade(path: Path, change: Callable[[dict[str, bytes]], None], *, manifest: bool = True) -> Path:
    """The bundle with other contents, well made: hashes and order are right."""
    files = unpacked(path.read_bytes())
    change(files)
    if manifest:
        listed = json.loads(files[bundle.MANIFEST])
        listed["files"] = {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            for name, data in files.items()
            if name != bundle.MANIFEST
        }
        files[bundle.MANIFEST] = json.dumps(listed).encode()
    changed = path.with_name("changed.zip")
    with changed.open("wb") as file, zipfile.ZipFile(bundle._Hashed(file), "w") as archive:  # type: ignore[call-overload]
        for name in sorted(files):
            bundle._add(archive, name, files[name])
    return changed


def the_record(files: dict[str, bytes]) -> str:
    return next(name for name in files if name.startswith("results/"))


def a_changed_figure(files: dict[str, bytes]) -> None:
    name = the_record(files)
    files[name] = files[name].replace(b'"load_s":12.5', b'"load_s":11.5')


def a_missing_record(files: dict[str, bytes]) -> None:
    del files[the_record(files)]


def one_more(files: dict[str, bytes]) -> None:
    files["results/0123456789ab/x.json"] = b"{}"


def without_a_manifest(files: dict[str, bytes]) -> None:
    del files[bundle.MANIFEST]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (a_changed_figure, "is not the manifest's"),
        (a_missing_record, "is missing"),
        (one_more, "is not in its manifest"),
        (without_a_manifest, "it has no manifest.json"),
    ],
)
def test_what_the_manifest_does_not_say_is_refused(
    ada: Path, change: Callable[[dict[str, bytes]], None], said: str
) -> None:
    changed = remade(ada, change, manifest=False)
    assert said in refused(lambda: import_bundle.open_bundle(changed), WrongUseError).message


def another_question(files: dict[str, bytes]) -> None:
    name = the_record(files)
    document = json.loads(files[name])
    document["definition"]["max_new_tokens"] = 7
    files[name] = json.dumps(document).encode()


def another_id(files: dict[str, bytes]) -> None:
    files["results/0123456789ab/x.json"] = files.pop(the_record(files))


def no_json(files: dict[str, bytes]) -> None:
    files[the_record(files)] = b'{"run_id": "x", "attempt"'


def no_record(files: dict[str, bytes]) -> None:
    files[the_record(files)] = b"{}"


def a_newer_record(files: dict[str, bytes]) -> None:
    name = the_record(files)
    files[name] = json.dumps({**json.loads(files[name]), "schema": 99}).encode()


def a_newer_format(files: dict[str, bytes]) -> None:
    files[bundle.MANIFEST] = json.dumps({**json.loads(files[bundle.MANIFEST]), "labctl_bundle": 2}).encode()


def a_newer_schema(files: dict[str, bytes]) -> None:
    files[bundle.MANIFEST] = json.dumps({**json.loads(files[bundle.MANIFEST]), "schema": 2}).encode()


def a_schema_that_is_no_number(files: dict[str, bytes]) -> None:
    files[bundle.MANIFEST] = json.dumps({**json.loads(files[bundle.MANIFEST]), "schema": "1"}).encode()


def a_manifest_of_another(files: dict[str, bytes]) -> None:
    files[bundle.MANIFEST] = b'{"files": {}}'


def named(name: str) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        files[name] = b"{}"

    return change


def a_bomb(files: dict[str, bytes]) -> None:
    files["submissions/bomb.json"] = b" " * (200 * 2**20)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (another_question, "its id is not the hash of its definition"),
        (another_id, "is the record of another run"),
        (no_json, "is invalid"),
        (no_record, "is invalid"),
        (a_newer_record, "newer labctl"),
        (a_newer_format, "made by a newer labctl"),
        (a_newer_schema, "made by a newer labctl"),
        (a_schema_that_is_no_number, "Expected `int`, got `str`"),
        (a_manifest_of_another, "manifest.json is invalid"),
        (named("../../evil.json"), "leads out of it: '../../evil.json'"),
        (named("results/../../../evil.json"), "leads out of it"),
        (named("/etc/evil.json"), "leads out of it"),
        (named("results\\..\\evil.json"), "leads out of it"),
        (named("labctl-11.db"), "unknown file in it"),
        (named("labctl.toml"), "unknown file in it"),
        (named("arrays/b/submitted.json"), "unknown file in it"),
        (a_bomb, "would unpack to"),
    ],
)
def test_what_is_well_made_and_wrong_is_refused_with_what_is_wrong(
    labctl: Labctl, records: Records, ada: Path, change: Callable[[dict[str, bytes]], None], said: str
) -> None:
    manifest = change is not a_manifest_of_another
    ran = labctl("import", remade(ada, change, manifest=manifest))
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err and "Traceback" not in ran.err
    assert not records.workspace.data.exists()


def test_a_link_is_refused(ada: Path) -> None:
    with zipfile.ZipFile(ada, "a") as archive:
        entry = zipfile.ZipInfo("submissions/link.json")
        entry.create_system, entry.external_attr = 3, 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    assert "is not a plain file" in refused(lambda: import_bundle.open_bundle(ada), WrongUseError).message


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no zip at all" * 100])
def test_a_file_that_is_no_bundle_is_refused(labctl: Labctl, records: Records, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.zip").write_bytes(content)
    ran = labctl("import", tmp_path / "x.zip")
    assert ran.code == 2
    assert "x.zip is refused: not a bundle" in ran.err


def test_a_refused_bundle_does_not_keep_the_others_out(
    labctl: Labctl, records: Records, ada: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.zip").write_bytes(b"no zip")
    ran = labctl("import", tmp_path / "x.zip", tmp_path / "missing.zip", ada)
    assert (ran.code, ran.out) == (2, "ada: 2 records imported\n")
    assert "missing.zip: No such file" in ran.err


def test_another_persons_record_under_the_same_label_is_refused(labctl: Labctl, records: Records, ada: Path) -> None:
    labctl("import", ada)
    changed = remade(ada, a_changed_figure)
    ran = labctl("import", changed, "--origin", "ada")
    assert ran.code == 2
    assert "differs from ada's earlier bundle" in ran.err
    assert labctl("import", changed, "--origin", "ada-2").code == 0


@pytest.mark.parametrize("label", ["here", "HERE", "", "a/b", "..", "a@b", "x" * 41])
def test_a_label_that_can_be_none_is_refused(labctl: Labctl, records: Records, ada: Path, label: str) -> None:
    assert labctl("import", ada, "--origin", label).code == 2


def test_a_label_is_made_of_the_files_name(ada: Path) -> None:
    found = import_bundle.open_bundle(ada.rename(ada.with_name("Ada's sweep (v2).labctl.zip")))
    assert import_bundle.origin_of(found, None) == "Ada-s-sweep-v2"


def imported_files(records: Records) -> dict[str, bytes]:
    """What imports keep, and what they may leave behind."""
    found = files_below(records.workspace.data)
    return {name: data for name, data in found.items() if name.startswith("import")}


def test_a_full_disk_leaves_nothing_of_a_bundle(
    labctl: Labctl, records: Records, ada: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injected: the disk is full after four files."""
    real, written = os.fsync, []

    def full(handle: int) -> None:
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        written.append(handle)
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    ran = labctl("import", ada)
    assert ran.code == 5
    assert "ada.labctl.zip was not imported: No space left on device" in ran.err
    assert imported_files(records) == {}
    monkeypatch.setattr(os, "fsync", real)
    assert labctl("import", ada).code == 0
    assert labctl("query", "SELECT count(*) AS n FROM measured_runs", "--json").json == [{"n": 2}]
    before = contents(records.workspace)
    labctl("collect", "--rebuild")
    assert contents(records.workspace) == before


def test_a_killed_import_leaves_nothing_that_is_read_and_clean_removes_it(
    labctl: Labctl, records: Records, ada: Path
) -> None:
    """Injected: the import is killed before its last step."""
    own_sweep(records)
    killed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, pathlib; pathlib.Path.rename = lambda *_: os.kill(os.getpid(), 9); "  # noqa: ISC004
            "from labctl_orchestrator.cli import main; main()",
            "import",
            str(ada),
        ],
        cwd=records.workspace.root,
        check=False,
    )
    assert killed.returncode == -9
    (left,) = records.workspace.data.glob("import-*.partial")
    assert labctl("query", "SELECT count(*) AS n FROM measured_runs", "--json").json == [{"n": 2}]
    os.utime(left, (0, 0))
    assert labctl("clean", "--yes").code == 0
    assert imported_files(records) == {}


def test_a_damaged_imported_record_is_the_only_one_left_out(labctl: Labctl, records: Records, ada: Path) -> None:
    labctl("import", ada)
    record = next((records.workspace.imports / "ada").glob("*/results/*/*.json"))
    write_json(record, {"run_id": 1})
    assert labctl("query", "SELECT count(*) AS n FROM measured_runs", "--json").json == [{"n": 1}]


# ---------------------------------------------------------------- what is shown is what was hashed


def the_job(files: dict[str, bytes]) -> str:
    return next(name for name in files if re.fullmatch(r"arrays/[^/]+/0\.json", name))


def in_the_job(**changes: Any) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        files[the_job(files)] = json.dumps({**json.loads(files[the_job(files)]), **changes}).encode()

    return change


def in_its_runs(**changes: Any) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        job = json.loads(files[the_job(files)])
        runs = [{**run, **changes} for run in job["runs"]]
        files[the_job(files)] = json.dumps({**job, "runs": runs}).encode()

    return change


def in_the_record(**changes: Any) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        name = the_record(files)
        files[name] = json.dumps({**json.loads(files[name]), **changes}).encode()

    return change


def a_number_that_no_database_holds(files: dict[str, bytes]) -> None:
    name = the_record(files)
    record = json.loads(files[name])
    record["repeats"][0]["discarded"] = 2**70
    files[name] = json.dumps(record).encode()


def in_the_states(**changes: Any) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        name = next(name for name in files if name.endswith("states.json"))
        states = {job: {**state, **changes} for job, state in json.loads(files[name]).items()}
        files[name] = json.dumps(states).encode()

    return change


def in_the_attempt(**changes: Any) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        name = next(name for name in files if "/attempts/" in name)
        files[name] = json.dumps({**json.loads(files[name]), **changes}).encode()

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (in_the_job(dtype="float32"), "dtype was"),
        (in_the_job(backend="vllm"), "backend was"),
        (in_the_job(partition="local"), "partition was"),
        (in_the_job(gpus=1), "gpus was"),
        (in_the_job(prompt_sets={"p": ["another prompt"]}), "prompts was"),
        (in_the_job(engine_options={"a": 1}), "engine_options"),
        (in_the_job(model={"name": "tiny-llama", "fingerprint": "1" * 64}), "model.fingerprint was"),
        (in_its_runs(max_new_tokens=7), "max_new_tokens was"),
        (in_its_runs(batch_size=4), "batch_size was"),
        (in_its_runs(request_rate=2.0), "request_rate was"),
        (in_the_job(job_id="another.0"), "job id another.0"),
        (in_the_job(runs=[]), "has no run"),
        (in_the_attempt(attempt_id="another"), "attempt id another"),
        (in_the_attempt(job_id="another.0"), "belongs to job another.0"),
        (in_the_record(ended_at=None), "Expected `str`, got `null` - at `$.ended_at`"),
        (in_the_record(ended_at="2026-13-01T00:00:00Z"), "month must be in 1..12"),
        (in_the_record(load_s="text"), "Expected `float | null`, got `str` - at `$.load_s`"),
        (in_the_record(status="odd"), "unknown status 'odd'"),
        (in_the_record(status="failed"), "status failed without a failure"),
        (in_the_record(schema="1"), "Expected `int`, got `str` - at `$.schema`"),
        (a_number_that_no_database_holds, "this labctl cannot read"),
        (in_the_states(started_at="soon"), "Invalid isoformat string"),
        (in_the_states(held_before_s="long"), "Expected `float | null`"),
    ],
)
def test_what_the_target_could_not_hold_or_was_not_hashed_is_refused_whole(
    labctl: Labctl, records: Records, ada: Path, change: Callable[[dict[str, bytes]], None], said: str
) -> None:
    own_sweep(records)
    ran = labctl("import", remade(ada, change))
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert imported_files(records) == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (a_changed_figure, "load_s was 12.5, is 11.5"),
        (
            in_the_job(model={"name": "a-better-one", "fingerprint": "0" * 64}),
            'was "tiny-llama", is "a-better-one"',
        ),
        (in_the_job(defaults={"gpus": 4}), "defaults"),
        (in_the_attempt(node="dgxh-9"), 'node was "dgxh-1", is "dgxh-9"'),
        (in_the_states(started_at="2026-01-01T09:00:00Z"), "started_at was"),
    ],
)
def test_a_later_bundle_that_disagrees_is_refused_with_what_differs_and_changes_nothing(
    labctl: Labctl, records: Records, ada: Path, change: Callable[[dict[str, bytes]], None], said: str
) -> None:
    labctl("import", ada)
    before, index = imported_files(records), contents(records.workspace)

    def changed(files: dict[str, bytes]) -> None:
        change(files)
        if change is not a_changed_figure:  # it brings a record that is new, too
            attempt, name = "another", the_record(files)
            record = json.loads(files[name])
            record["attempt"]["attempt_id"] = attempt
            files[f"{name.rpartition('/')[0]}/{attempt}.json"] = json.dumps(record).encode()

    ran = labctl("import", remade(ada, changed), "--origin", "ada")
    assert ran.code == 2
    assert "differs from ada's earlier bundle" in ran.err and said in ran.err
    assert imported_files(records) == before
    assert contents(records.workspace) == index


def test_another_job_of_the_same_run_cannot_rename_its_model(labctl: Labctl, records: Records, ada: Path) -> None:
    labctl("import", ada)

    def another_job(files: dict[str, bytes]) -> None:
        for name in [name for name in files if name != bundle.MANIFEST]:
            data = files.pop(name).decode()
            job = re.search(r"[0-9a-f]{8}-1", the_name := name)
            assert job or name.startswith("submissions/"), the_name
            changed = re.sub(r"[0-9a-f]{8}-1(?=[./])", "feedbeef-1", name)
            if not name.startswith("submissions/"):
                files[changed] = (
                    re.sub(r"[0-9a-f]{8}-1(?=\.)", "feedbeef-1", data).replace("tiny-llama", "a-model").encode()
                )

    ran = labctl("import", remade(ada, another_job), "--origin", "ada")
    assert ran.code == 2
    assert 'model was "tiny-llama", is "a-model"' in ran.err


@pytest.mark.parametrize("odd", [1.5, None, "RUNNING", [], {"state": 7}])
def test_states_of_an_odd_type_are_left_out_of_a_bundle(hers: Records, tmp_path: Path, odd: object) -> None:
    (folder,) = hers.workspace.arrays.iterdir()
    job, *_ = read_json(folder / "states.json")
    edit_json(folder / "states.json", **{job: odd})
    with zipfile.ZipFile(bundled(hers, tmp_path / "ada.labctl.zip")) as file:
        assert not [name for name in file.namelist() if name.endswith("states.json")]


@pytest.mark.parametrize("odd", [1.5, None, "text", [], {"name": 7}])
def test_records_whose_job_has_an_odd_model_are_left_out(hers: Records, tmp_path: Path, odd: object) -> None:
    (folder,) = hers.workspace.arrays.iterdir()
    edit_json(folder / "0.json", model=odd)
    with pytest.raises(WrongUseError, match="no run has a record"):
        bundled(hers, tmp_path / "ada.labctl.zip")


def test_of_a_job_that_goes_on_a_bundle_holds_no_state_so_that_a_later_one_agrees(
    labctl: Labctl, records: Records, hers: Records, tmp_path: Path
) -> None:
    (folder,) = hers.workspace.arrays.iterdir()
    ended = read_json(folder / "states.json")
    write_json(
        folder / "states.json", {job: {**state, "state": "RUNNING", "ended_at": None} for job, state in ended.items()}
    )
    assert labctl("import", bundled(hers, tmp_path / "ada.labctl.zip")).code == 0
    write_json(folder / "states.json", ended)
    batch = hers.submit("504", name="more", lengths=(64,))
    hers.done(batch, hers.attempt(batch, slurm_id="504"))
    hers.collect()
    assert labctl("import", bundled(hers, tmp_path / "later.zip"), "--origin", "ada").code == 0
    rows = labctl("query", "SELECT DISTINCT queue_s FROM measured_runs WHERE queue_s IS NOT NULL", "--json").json
    assert rows == [{"queue_s": 30.0}]


@pytest.mark.parametrize("length", [250, 300])
def test_a_name_that_is_too_long_leaves_nothing_behind(
    labctl: Labctl, records: Records, ada: Path, length: int
) -> None:
    def long(files: dict[str, bytes]) -> None:
        name = the_record(files)
        record = json.loads(files.pop(name))
        record["attempt"]["attempt_id"] = "x" * (length - len(".json"))
        files[f"{name.rpartition('/')[0]}/{'x' * (length - len('.json'))}.json"] = json.dumps(record).encode()

    own_sweep(records)
    ran = labctl("import", remade(ada, long))
    if length > os.pathconf(records.workspace.data, "PC_NAME_MAX"):
        assert ran.code == 2
        assert "a file name is longer than the file system's 255 bytes" in ran.err
        assert imported_files(records) == {}
    else:
        assert ran.code == 0
        assert labctl("query", "SELECT count(*) AS n FROM measured_runs", "--json").json == [{"n": 4}]


def test_the_author_is_shown_as_the_files_own_claim(
    labctl: Labctl, records: Records, hers: Records, tmp_path: Path
) -> None:
    path = bundled(hers, tmp_path / "x.zip", author="ada")
    ran = labctl("import", path)
    assert "the bundle claims author ada (unverified)" in ran.err
    run_id = labctl("export", "ada", "--json").json[0]["run_id"]
    assert "ada, as given by the bundle" in labctl("show", run_id).out


# ---------------------------------------------------------------- bounded


def test_a_file_that_has_no_end_or_no_content_is_refused(labctl: Labctl, records: Records, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path):
        ran = labctl("import", path)
        assert ran.code == 2, path
        assert "not a plain file" in ran.err or "Is a directory" in ran.err


def test_a_file_packed_in_another_way_is_refused(ada: Path) -> None:
    """bzip2 is unpacked whole, whatever size it claims."""
    files = unpacked(ada.read_bytes())
    with zipfile.ZipFile(ada, "w", zipfile.ZIP_BZIP2) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    assert "unsupported compression" in refused(lambda: import_bundle.open_bundle(ada), WrongUseError).message


def test_a_file_that_is_longer_than_it_says_is_refused(ada: Path) -> None:
    content = ada.read_bytes()
    with zipfile.ZipFile(ada) as archive:
        entry = archive.getinfo(bundle.MANIFEST)
    there = content.rindex(b"PK\1\2", 0, content.rindex(bundle.MANIFEST.encode()))
    size = there + 24
    assert int.from_bytes(content[size : size + 4], "little") == entry.file_size
    ada.write_bytes(content[:size] + (16).to_bytes(4, "little") + content[size + 4 :])
    assert "changed or damaged" in refused(lambda: import_bundle.open_bundle(ada), WrongUseError).message


def many_values(files: dict[str, bytes]) -> None:
    files["submissions/many.json"] = b'{"a":[' + b"[]," * (41 * 10**6) + b"[]]}"


def more_values_than_a_file_may_have(files: dict[str, bytes]) -> None:
    files["submissions/many.json"] = b'{"a":[' + b"[]," * (16 * 10**6) + b"[]]}"


def many_values_of_a_record(files: dict[str, bytes]) -> None:
    """As many as are read at all, where they become objects."""
    name = the_record(files)
    empty = b'"fingerprint":{"a":[' + b"[]," * (3_900_000) + b"[]],"
    files[name] = files[name].replace(b'"fingerprint":{', empty, 1)


MOST_MEMORY = 2**30  # as docs/sharing.md says


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (many_values, 2, "would unpack to"),
        (more_values_than_a_file_may_have, 2, "has 32,000,003 values, more than 8,000,000"),
        (many_values_of_a_record, 0, ""),
    ],
)
def test_an_import_takes_a_bounded_memory(
    records: Records, ada: Path, change: Callable[[dict[str, bytes]], None], code: int, said: str
) -> None:
    """The limit is on address space, of which Python and its libraries take some more than is in memory."""
    path = remade(ada, change)
    done = subprocess.run(
        [sys.executable, "-c", "from labctl_orchestrator.cli import main; main()", "import", str(path)],
        cwd=records.workspace.root,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY)),
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert bool(list(records.workspace.root.glob(".labctl/imports/*"))) == (code == 0)


def test_a_bundle_takes_the_memory_of_one_record_however_many_it_holds(records: Records, tmp_path: Path) -> None:
    batch = records.submit("500", lengths=tuple(range(1, 9)))
    attempt = records.attempt(batch)
    answer = "".join(random.Random(0).choices("abcdefghijklmnop", k=2**16)) * 128
    for run in batch.runs:
        records.done(batch, attempt, run, repeats=[measured(0, text=answer)])
    records.collect()
    peaks = []
    for names in ([batch.runs[0].run_id], []):
        code = (
            "import re\nfrom labctl_orchestrator.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n"
            "    assert not end.code\nprint(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "bundle", *names, "-o", str(tmp_path / f"{len(peaks)}.zip")],
            cwd=records.workspace.root,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(1024 * int(done.stdout.split()[-1]))
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert sum(entry.file_size for entry in archive.infolist()) > 8 * len(answer)
    assert peaks[1] - peaks[0] < 2 * len(answer)


def test_the_commands_of_the_documentation_run(labctl: Labctl, records: Records, hers: Records) -> None:
    """Those of docs/data.md and docs/sharing.md, in order, in a workspace that has what they name."""
    batch = records.submit(name="lengths", lengths=(16, 32))
    attempt = records.attempt(batch)
    for run in batch.runs:
        records.done(batch, attempt, run)
    (records.workspace.root / "class").mkdir()
    bundled(hers, records.workspace.root / "class" / "bob.labctl.zip")
    docs = Path(__file__).parent.parent / "docs"
    text = "".join((docs / page).read_text(encoding="utf-8") for page in ("data.md", "sharing.md"))
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("labctl ")]
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        words = words[: words.index(">")] if ">" in words else words
        places = [place for place, word in enumerate(words) if "*" in word and word.startswith("class/")]
        for place in places:  # as a shell does
            words[place : place + 1] = map(str, sorted(Path().glob(words[place])))
        ran = labctl(*words)
        assert ran.code == 0, (line, ran.err)
        assert ran.out, line
