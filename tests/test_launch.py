"""Engine loads: how many are queued, in which jobs, and who measures what a lost or failed job was to measure."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.store import worker_code
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.submission import launch
from labctl_orchestrator.tracking import refresh, run_status, status, wait
from labctl_orchestrator.tracking.run_status import RunStatus
from labctl_slurm import limits
from labctl_workers.record import NODE_PACKAGES_FOLDER, JobFolder, JobSpec, read_bytes, read_json, write_json

from .conftest import JobArray, Labctl, Records, Slurm, ago, edit_json, refused, sacct_line, squeue_line

Submit = Callable[..., Any]


@pytest.fixture
def submit(labctl: Labctl, slurm: Slurm, checkpoint: Path) -> Submit:
    """labctl submit on a Slurm that takes every script."""
    limits.most_jobs.cache_clear()
    limits.max_array_size.cache_clear()
    limits._configuration.cache_clear()
    slurm.accepts(500)

    def run(*flags: object) -> Any:
        ran = labctl("submit", "-p", "dgxh", "--model-id", checkpoint, *flags, "--json")
        assert ran.code == 0, ran.err
        return ran

    return run


def batches(records: Records) -> list[JobArray]:
    """The batches that labctl has submitted, in the order in which it did."""
    folders = sorted(
        records.workspace.arrays.iterdir(), key=lambda folder: str(read_json(folder / "intent.json")["at"])
    )
    found = []
    for folder in folders:
        specs = sorted(folder.glob("[0-9]*.json"), key=lambda path: int(path.stem))
        jobs = [JobSpec.from_json(read_json(path)) for path in specs]
        found.append(JobArray(folder.name, folder, jobs[0].executor, jobs))
    return found


def measured(records: Records, batch: JobArray, task: int = 0, load: int = 1) -> None:
    attempt = records.attempt(batch, task, slurm_id=str(read_json(batch.folder / "submitted.json")["ids"][task]))
    for run in batch.jobs[task].runs:
        records.done(batch, attempt.in_load(load), run)


def the_status(records: Records) -> RunStatus:
    with closing(open_store(records.workspace)) as store:
        refresh.refresh(records.workspace, store)
        (run_id,) = {run_id for (run_id,) in store.tuples("SELECT run_id FROM runs")}
        (found,) = status.statuses(records.workspace, store, [run_id])
        return found


# ---------------------------------------------------------------- how many


def test_three_loads_are_three_jobs_of_one_array(submit: Submit, records: Records) -> None:
    ran = submit("--loads", 3)
    assert "queued 1 run in 3 engine loads (3 jobs)" in ran.err
    (batch,) = batches(records)
    assert [job.loads for job in batch.jobs] == [1, 1, 1]
    assert len({run.run_id for run in batch.runs}) == 1
    (run,) = ran.json["runs"]
    assert (run["loads_measured"], run["loads_to_come"], len(run["jobs_to_come"])) == (0, 3, 3)


def test_a_submission_reads_the_records_of_its_own_runs_alone(submit: Submit, records: Records) -> None:
    other = records.submit("400", name="other", lengths=(8,))
    records.states(other, state="COMPLETED", exit_code="0:0", ended_at=ago(3600))
    records.done(other, records.attempt(other, slurm_id="400"))
    submit("--max-new-tokens", 16)
    measured(records, next(batch for batch in batches(records) if batch.array_id != other.array_id))
    assert "1 measured" in submit("--max-new-tokens", 16).err
    with closing(open_store(records.workspace)) as store:
        assert len(store.tuples("SELECT run_id FROM results")) == 1


def test_loads_are_no_part_of_what_a_run_is(submit: Submit) -> None:
    (one,), (three,) = (submit("--loads", loads, "--max-new-tokens", 8).json["runs"] for loads in (1, 3))
    assert one["run_id"] == three["run_id"]


@pytest.mark.parametrize("is_measured", [True, False], ids=["measured", "on its way"])
def test_three_loads_after_one_are_two_more(submit: Submit, records: Records, is_measured: bool) -> None:
    submit()
    (first,) = batches(records)
    if is_measured:
        measured(records, first)
    assert "queued 1 run in 2 engine loads (2 jobs)" in submit("--loads", 3).err
    ran = submit("--loads", 3)
    assert "queued" not in ran.err
    assert [len(batch.jobs) for batch in batches(records)] == [1, 2]


def test_a_load_with_other_versions_is_none_that_is_compared_with_the_latest(submit: Submit, records: Records) -> None:
    submit("--loads", 2)
    (batch,) = batches(records)
    attempts = [records.attempt(batch, task, slurm_id=f"500_{task}") for task in (0, 1)]
    records.done(batch, attempts[0], fingerprint={"packages": {"torch": "2.8.0"}}, ended_at=ago(50))
    records.done(batch, attempts[1], fingerprint={"packages": {"torch": "2.9.0"}})
    assert "queued 1 run in 1 engine load (1 job)" in submit("--loads", 2).err


def test_again_adds_its_loads_each_time_also_while_earlier_ones_are_pending(submit: Submit, records: Records) -> None:
    for _ in range(3):
        assert "queued 1 run in 1 engine load (1 job)" in submit("--again").err
    assert "queued 1 run in 2 engine loads (2 jobs)" in submit("--again", "--loads", 2).err
    assert [len(batch.jobs) for batch in batches(records)] == [1, 1, 1, 2]
    assert the_status(records).loads_to_come == 5
    for batch in batches(records):
        for task in range(len(batch.jobs)):
            measured(records, batch, task)
    found = the_status(records)
    assert (found.state, found.loads_measured, found.detail) == ("done", 5, "engine loads: 5 measured")


def test_compare_takes_each_of_them_for_a_load(labctl: Labctl, submit: Submit, records: Records) -> None:
    for _ in range(3):
        submit("--again")
    for batch in batches(records):
        measured(records, batch)
    (row,) = labctl("compare", "--metric", "output_tok_s", "--json").json["blocks"][0]["rows"]
    assert (row["n"], row["n_of"], len(set(row["loads"]))) == (3, "engine loads", 3)


def test_loads_within_a_job_are_loads_too(labctl: Labctl, submit: Submit, records: Records) -> None:
    submit("--loads", 3, "--jobs-at-once", 1)
    (batch,) = batches(records)
    assert [job.loads for job in batch.jobs] == [3]
    attempt = records.attempt(batch, slurm_id="500")
    for load in (1, 2, 3):
        records.done(batch, attempt.in_load(load))
        found = the_status(records)
        assert (found.loads_measured, found.loads_to_come) == (load, 3 - load)
    (row,) = labctl("compare", "--metric", "output_tok_s", "--json").json["blocks"][0]["rows"]
    assert (row["n"], row["n_of"], len(set(row["loads"]))) == (3, "engine loads", 3)


def test_runs_that_need_more_loads_share_those_of_the_others(submit: Submit, records: Records) -> None:
    submit("--max-new-tokens", 8)
    submit("--loads", 2, "--max-new-tokens", 8, "--max-new-tokens", 16)
    _, second = batches(records)
    assert [[run.max_new_tokens for run in job.runs] for job in second.jobs] == [[8, 16], [16]]


# ---------------------------------------------------------------- in which jobs


def site_takes(slurm: Slurm, *, array: int = 1001, jobs: str = "") -> None:
    """A MaxArraySize and a MaxSubmitJobs, as scontrol and sacctmgr print them."""
    slurm.answers("scontrol", f"MaxArraySize            = {array}\n")
    slurm.answers("sacctmgr", "".join(f"{most}||\n" for most in jobs.split("\n")))


@pytest.mark.parametrize(
    ("array", "jobs", "together"),
    [(1001, "", False), (1, "", True), (1001, "2", True), (1001, "3", False), (1001, "2\n500", False)],
)
def test_loads_share_a_job_where_the_site_does_not_take_as_many(
    submit: Submit, slurm: Slurm, records: Records, array: int, jobs: str, together: bool
) -> None:
    site_takes(slurm, array=array, jobs=jobs)
    submit("--loads", 3)
    assert [job.loads for batch in batches(records) for job in batch.jobs] == ([3] if together else [1, 1, 1])


def test_the_two_halves_of_a_batch_of_equal_jobs_are_two_batches(
    submit: Submit, slurm: Slurm, records: Records
) -> None:
    """sbatch is a fake that takes single jobs alone, as a submit limit does."""
    slurm._write(
        "sbatch",
        'case "$*" in *--test-only*) exit 0;; esac\n'
        "for script; do :; done\n"
        'while read -r line; do case "$line" in "#SBATCH --array"*)\n'
        '  echo "sbatch: error: AssocMaxSubmitJobLimit" >&2\n'
        '  echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy" >&2; exit 1;;\n'
        'esac; done < "$script"\n'
        f'read n < {slurm.folder}/next; echo $((n + 1)) > {slurm.folder}/next; echo "Submitted batch job $n"\n',
    )
    ran = submit("--loads", 2)
    assert "queued 1 run in 2 engine loads (2 jobs)" in ran.err
    (run,) = ran.json["runs"]
    assert (run["state"], run["loads_to_come"], run["loads_unmeasured"]) == ("pending", 2, 0)
    assert len(batches(records)) == 3
    for batch in batches(records)[1:]:
        measured(records, batch)
    assert (the_status(records).state, the_status(records).loads_measured) == ("done", 2)


# ---------------------------------------------------------------- what a job has left unmeasured


def given(batch: JobArray) -> dict[str, Any]:
    path = JobFolder(batch.spec(0)).moved
    document: dict[str, Any] = read_json(path) if path.exists() else {}
    return document


def ends(slurm: Slurm, batch: JobArray, state: str) -> None:
    """Slurm says that the batch's one job has ended so."""
    (slurm_id,) = read_json(batch.folder / "submitted.json")["ids"]
    slurm.answers("sacct", sacct_line(slurm_id, state, f"labctl-{batch.array_id}"))


@pytest.mark.parametrize("command", ["retry", "submit", "again"])
def test_what_a_failed_job_left_is_given_to_the_next(
    labctl: Labctl, submit: Submit, slurm: Slurm, records: Records, command: str
) -> None:
    submit()
    (first,) = batches(records)
    ends(slurm, first, "NODE_FAIL")
    assert the_status(records).state == "failed"
    ran = labctl("retry", "--json") if command == "retry" else submit(*(["--again"] if command == "again" else []))
    assert [(run["state"], run["slurm_id"]) for run in ran.json["runs"]] == [("pending", "501")]
    _, second = batches(records)
    run_id = first.runs[0].run_id
    assert given(first) == {first.jobs[0].job_id: {run_id: {"job": second.jobs[0].job_id, "state": "failed"}}}
    measured(records, second)
    found = the_status(records)
    assert (found.state, found.loads_measured, found.lost_turns) == ("done", 1, ())


@pytest.mark.parametrize("step", ["_take_over", "_write_intents", "submit_all"])
def test_a_retry_that_is_killed_leaves_each_run_to_one_job(
    labctl: Labctl, submit: Submit, slurm: Slurm, records: Records, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The fault is injected: labctl ends right before this step, and is called again."""

    def is_killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    submit()
    (first,) = batches(records)
    ends(slurm, first, "NODE_FAIL")
    with monkeypatch.context() as killed:
        killed.setattr(launch, step, is_killed)
        labctl("retry")
    for intent in records.workspace.arrays.glob("*/intent.json"):
        edit_json(intent, pid=2**22 + 1, at=ago(200))
    found = the_status(records)
    assert (found.may_come, found.loads_unmeasured) == (False, 1)
    labctl("retry")
    submitted = [path for path in records.workspace.arrays.glob("*/submitted.json") if read_json(path).get("ids")]
    (queued,) = [path.parent for path in submitted if path.parent != first.folder]
    assert [read_json(path)["loads"] for path in queued.glob("[0-9]*.json")] == [1]


def test_what_was_given_is_not_lost_where_it_cannot_be_read(
    labctl: Labctl, submit: Submit, slurm: Slurm, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is injected: the file cannot be read now, as on a file system that is away for a moment."""
    submit()
    (first,) = batches(records)
    ends(slurm, first, "NODE_FAIL")
    path = JobFolder(first.spec(0)).moved
    path.write_text('{"other.0": {"run": {"job": "later.0", "state": "failed"}}}', encoding="utf-8")

    def away(path: Path) -> Any:
        if path.name == "moved.json":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return read_bytes(path)

    monkeypatch.setattr(launch, "read_bytes", away)
    assert labctl("retry").code == 5
    assert given(first) == {"other.0": {"run": {"job": "later.0", "state": "failed"}}}


def lost_and_retried(labctl: Labctl, submit: Submit, records: Records) -> tuple[JobArray, JobArray]:
    """Slurm has lost a job, and its run was submitted again."""
    submit()
    (first,) = batches(records)
    records.states(first, state="RUNNING", gone_since=ago(90))
    labctl("retry")
    first, second = batches(records)
    return first, second


def test_status_says_which_job_lost_its_turn(labctl: Labctl, submit: Submit, records: Records, slurm: Slurm) -> None:
    first, second = lost_and_retried(labctl, submit, records)
    assert given(first)[first.jobs[0].job_id][first.runs[0].run_id] == {
        "job": second.jobs[0].job_id, "state": "lost",
    }  # fmt: skip
    slurm.shows(
        squeue_line("500", "RUNNING", f"labctl-{first.array_id}")
        + squeue_line("501", "PENDING", f"labctl-{second.array_id}", reason="Priority")
    )
    found = the_status(records)
    assert (found.state, found.slurm_id, found.lost_turns) == ("pending", "501", ("500",))
    assert found.detail == "Priority; job 501 replaces job 500"
    (line,) = [line for line in labctl("status").out.splitlines() if first.runs[0].run_id in line]
    assert "job 501 replaces job 500" in line


def test_a_job_that_was_put_back_into_the_queue_after_its_run_was_retried_has_lost_its_turn(
    labctl: Labctl, submit: Submit, records: Records, slurm: Slurm
) -> None:
    submit()
    (first,) = batches(records)
    ends(slurm, first, "NODE_FAIL")
    labctl("retry")
    _, second = batches(records)
    records.states(first, state="RUNNING", started_at=ago(5))
    measured(records, second)
    slurm.shows(squeue_line("500", "RUNNING", f"labctl-{first.array_id}"))
    found = the_status(records)
    assert (found.state, found.detail) == ("done", "job 501 replaces job 500")


def test_a_job_that_was_taken_for_lost_and_brings_its_record_is_an_answer(
    labctl: Labctl, submit: Submit, records: Records, slurm: Slurm
) -> None:
    """It was measuring when its run was given away. The job in its place has failed."""
    first, second = lost_and_retried(labctl, submit, records)
    measured(records, first)
    ends(slurm, second, "NODE_FAIL")
    found = the_status(records)
    assert (found.state, found.loads_measured, found.loads_unmeasured) == ("done", 1, 0)


def test_a_record_of_an_earlier_job_is_no_answer_to_a_later_submission(submit: Submit, records: Records) -> None:
    """Its node's clock is ten minutes ahead: the record looks newer than the job that is to measure again."""
    submit()
    (first,) = batches(records)
    attempt = records.attempt(first, slurm_id="500")
    records.done(first, attempt, ended_at=ago(-600))
    submit("--again")
    assert the_status(records).state == "pending"


def test_of_three_loads_the_one_that_failed_is_retried(
    labctl: Labctl, submit: Submit, records: Records, slurm: Slurm
) -> None:
    submit("--loads", 3)
    (batch,) = batches(records)
    measured(records, batch, 0)
    measured(records, batch, 2)
    name = f"labctl-{batch.array_id}"
    states = ("COMPLETED", "NODE_FAIL", "COMPLETED")
    slurm.answers("sacct", "".join(sacct_line(f"500_{task}", state, name) for task, state in enumerate(states)))
    found = the_status(records)
    assert (found.state, found.loads_measured, found.loads_unmeasured) == ("failed", 2, 1)
    assert found.detail.endswith("engine loads: 2 measured, 1 missing")
    labctl("retry")
    _, second = batches(records)
    assert [job.loads for job in second.jobs] == [1]
    measured(records, second)
    assert (the_status(records).state, the_status(records).loads_measured) == ("done", 3)


def test_of_a_job_with_three_loads_those_that_are_missing_are_retried(
    labctl: Labctl, submit: Submit, records: Records, slurm: Slurm
) -> None:
    submit("--loads", 3, "--jobs-at-once", 1)
    (batch,) = batches(records)
    measured(records, batch)
    ends(slurm, batch, "NODE_FAIL")
    labctl("retry")
    _, second = batches(records)
    assert [job.loads for job in second.jobs] == [2]  # as then, one after another


def test_all_jobs_that_are_to_measure_a_run_are_cancelled(labctl: Labctl, submit: Submit, slurm: Slurm) -> None:
    for _ in range(2):
        submit("--again", "--loads", 2)
    told = slurm.folder / "cancelled"
    slurm._write("scancel", f'echo "$*" >> {told}\n')
    ran = labctl("cancel", "--yes", "--json")
    assert sorted(ran.json["jobs"]) == ["500_0", "500_1", "501_0", "501_1"]


def test_what_was_given_away_is_in_a_database_that_is_made_again(
    labctl: Labctl, submit: Submit, records: Records
) -> None:
    lost_and_retried(labctl, submit, records)
    before = the_status(records)
    labctl("collect", "--rebuild")
    assert the_status(records) == before


def test_a_damaged_file_of_what_was_given_away_is_told(labctl: Labctl, submit: Submit, records: Records) -> None:
    submit()
    (batch,) = batches(records)
    write_json(JobFolder(batch.spec(0)).moved, {batch.jobs[0].job_id: ["a list"]})
    assert "moved.json" in labctl("status").err


# ---------------------------------------------------------------- the worker's code


def test_what_labctl_brings_along_stands_behind_the_nodes_own_packages(tmp_path: Path) -> None:
    here = Workspace(tmp_path)
    worker_code.keep_code(here)
    code = here.code / worker_code.code_name()
    assert {path.name for path in code.iterdir()} == {"labctl_workers", NODE_PACKAGES_FOLDER}
    own = tmp_path / "site-packages"
    own.mkdir()
    (own / "typing_extensions.py").write_text("", encoding="utf-8")
    program = (
        f"import sys; sys.path.append({str(own)!r})\n"  # as a node's site-packages: behind PYTHONPATH
        "import labctl_workers.start, typing_extensions, cloudpickle\n"
        "print(typing_extensions.__file__)\nprint(cloudpickle.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={"PYTHONPATH": str(code)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        f"{own}/typing_extensions.py",
        f"{code}/{NODE_PACKAGES_FOLDER}/cloudpickle/__init__.py",
    ]


def test_wait_waits_for_what_was_queued_where_a_part_was_refused(
    labctl: Labctl, slurm: Slurm, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault injection: an sbatch that takes one job and no more, as MaxSubmitJobs=1 does."""
    slurm.accepts(500)
    refusal = "Batch job submission failed: Job violates accounting/QOS policy"
    slurm._write(
        "sbatch",
        'case "$*" in *--test-only*) exit 0;; esac\n'
        f'refuse() {{ echo "sbatch: error: {refusal}" >&2; exit 1; }}\n'
        "for script; do :; done\n"
        'while read -r line; do case "$line" in "#SBATCH --array"*) refuse;; esac; done < "$script"\n'
        f"[ -e {slurm.folder}/one ] && refuse\n"
        f": > {slurm.folder}/one; echo 500\n",
    )
    waited: list[list[str]] = []

    def ends_at_once(workspace: Workspace, store: Any, run_ids: list[str]) -> set[str]:
        waited.append(run_ids)
        return {run_status.DONE}

    monkeypatch.setattr(wait, "wait", ends_at_once)
    flags = ["submit", "-p", "dgxh", "--model-id", checkpoint, "--dtype", "float16", "--dtype", "float32", "--wait"]
    ran = labctl(*flags)
    assert ran.code == 4
    assert "resubmit the rest with labctl retry" in ran.err
    ((run_id,),) = waited
    assert run_id in ran.out


# ---------------------------------------------------------------- a site without arrays


def without_arrays(records: Records) -> None:
    records.workspace.settings_file.write_text("[partitions.dgxh]\narrays = false\n", encoding="utf-8")


def test_a_partition_without_arrays_submits_each_job_by_itself(submit: Submit, records: Records) -> None:
    without_arrays(records)
    submit("--max-new-tokens", 1, "--max-new-tokens", 2, "--max-new-tokens", 3, "--runs-per-job", 1)
    assert [len(batch.jobs) for batch in batches(records)] == [1, 1, 1]
    for batch in batches(records):
        (script,) = (batch.folder / "submitit").glob("*_submission.sh")
        assert "--array" not in script.read_text(encoding="utf-8")


def test_a_partition_without_arrays_cannot_limit_how_many_jobs_run_at_once(labctl: Labctl, records: Records) -> None:
    without_arrays(records)
    ran = labctl("submit", "-p", "dgxh", "--model-id", "a/b", "--jobs-at-once", 2)
    assert (ran.code, "arrays = false" in ran.err, "arrays = true" in ran.err) == (2, True, True)


# ---------------------------------------------------------------- a workspace that is moved


def test_a_workspace_that_is_moved_while_sbatch_runs_is_not_made_again_and_finds_its_job(
    labctl: Labctl, slurm: Slurm, records: Records, checkpoint: Path
) -> None:
    root, moved = records.workspace.root, records.workspace.root.with_name("moved")
    slurm.shows()
    slurm._write("sbatch", f"/bin/mv {root} {moved}\nprintf '500\\n'\n")
    ran = labctl("submit", "-p", "dgxh", "--model-id", checkpoint, "--name", "mine")
    assert (ran.code, root.exists()) == (5, False), ran.err
    assert "Traceback" not in ran.err
    os.chdir(moved)
    (folder,) = (moved / ".labctl" / "arrays").iterdir()
    edit_json(folder / "intent.json", pid_start=0)  # that labctl has ended
    slurm.shows(squeue_line("500", "PENDING", f"labctl-{folder.name}"))
    (run,) = labctl("status", "mine", "--json").json
    assert (run["state"], run["slurm_id"]) == ("pending", "500")


def test_a_workspace_that_is_gone_is_not_locked_and_not_made_again(records: Records) -> None:
    workspace = records.workspace
    workspace.create()
    workspace.root.rename(workspace.root.with_name("moved"))
    error = refused(lambda: workspace.lock().__enter__())
    assert error.message == f"workspace was moved or removed meanwhile: {workspace.root}"
    assert not workspace.root.exists()
