"""Submitting: the script is labctl's, for arrays too; Slurm's refusals have remedies; the environment is put aside.

sbatch and srun are fakes here (`FakeSbatch`); a real cluster is in tests/slurm. The local executor is real.
"""

from __future__ import annotations

import os
import pickle
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from labctl_slurm import command, executor
from labctl_slurm.command import Cluster
from labctl_slurm.diagnose import table
from labctl_slurm.errors import EXIT_SLURM, NO_SLURM, SlurmError, SubmitLimitError, UnknownOutcomeError
from labctl_slurm.executor import Queued, refusal
from labctl_slurm.partitions import build, shipped
from labctl_slurm.render import Script
from labctl_workers import start
from labctl_workers.job import RunJob
from labctl_workers.record import JobSpec, ModelRef, RunSpec, read_json, write_json

ROOT = Path(__file__).parent.parent


def refused(action: Callable[[], object]) -> SlurmError:
    with pytest.raises(SlurmError) as caught:
        action()
    assert caught.value.remedy
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == EXIT_SLURM
    return caught.value


# ---------------------------------------------------------------- what Slurm says when it refuses
#
# Slurm's own words (slurm_errno.c and sbatch), and a word of the remedy that belongs to them.

FAILED = "sbatch: error: Batch job submission failed: "
REFUSALS = {
    f"{FAILED}Invalid account or account/partition combination specified": "account",
    f"{FAILED}Invalid partition name specified": "slurm_partition",
    f"sbatch: error: invalid partition specified: dgxx\n{FAILED}Invalid partition name specified": "slurm_partition",
    f"{FAILED}Invalid qos specification": "qos",
    f"{FAILED}Requested node configuration is not available": "fewer GPUs",
    f"{FAILED}Invalid job array specification": "MaxArraySize",
    f"{FAILED}Job violates accounting/QOS policy": "resubmit the rest with labctl retry",
    f"{FAILED}Requested time limit is invalid (missing or exceeds some limit)": "time",
    f"{FAILED}Unable to contact slurm controller (connect failure)": "controller",
    "sbatch: error: Invalid generic resource (gres) specification": "gpu_type",
    "sbatch: error: Invalid --time specification": "days-hours",
    "sbatch: unrecognized option '--nosuch=1'\nTry \"sbatch --help\" for more information": "remove the option",
}


@pytest.mark.parametrize(("spoken", "remedy"), REFUSALS.items())
def test_every_known_refusal_has_its_own_remedy(spoken: str, remedy: str) -> None:
    error = refused(lambda: _raise(refusal(spoken)))
    assert error.message.startswith("Slurm refused the job: ")
    assert spoken.splitlines()[0].rpartition(": ")[2].split("'")[0] in error.message
    assert "sbatch: error" not in error.message
    assert remedy in error.remedy


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("words", "remedy"), [(words, entry.remedy) for entry in table().queue for words in entry.words]
)
def test_every_remedy_is_reached_by_its_own_words(words: str, remedy: str) -> None:
    assert refusal(f"sbatch: error: {words.capitalize()}").remedy == remedy


def test_a_limit_of_the_account_is_not_mistaken_for_one_of_the_time() -> None:
    spoken = f"{FAILED}Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
    assert "resubmit the rest with labctl retry" in refusal(spoken).remedy


def test_an_unknown_option_that_begins_like_time_is_an_unknown_option() -> None:
    assert "remove" in refusal("sbatch: unrecognized option '--timelimit=3'").remedy


def test_an_unknown_refusal_is_told_in_slurms_words_with_where_to_look() -> None:
    error = refusal("sbatch: error: JobArray script contains DOS line breaks")
    assert error.message == "Slurm refused the job: JobArray script contains DOS line breaks"
    assert "labctl render" in error.remedy


def test_a_refusal_without_a_word_is_told_as_that() -> None:
    assert refusal("").message == "Slurm refused the job: sbatch failed and printed nothing"
    assert refusal(" \n ").remedy


def test_what_slurm_says_twice_or_beside_its_error_is_told_once() -> None:
    spoken = f"sbatch: Welcome to the cluster\n{FAILED}Invalid qos specification\n{FAILED}Invalid qos specification\n"
    assert refusal(spoken).message == "Slurm refused the job: Batch job submission failed: Invalid qos specification"


# ---------------------------------------------------------------- the environment

OF_AN_ENCLOSING_JOB = {
    "SBATCH_PARTITION": "gpu",
    "SBATCH_ACCOUNT": "other",
    "SBATCH_TIMELIMIT": "1",
    "SLURM_JOB_ID": "77",
    "SLURM_CPUS_PER_TASK": "1",
    "SLURM_MEM_PER_NODE": "1",
}


@pytest.fixture
def in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """As within a Slurm job of a user who has defaults of their own."""
    for variable in [name for name in os.environ if name.startswith(("SLURM", "SBATCH", "SUBMITIT"))]:
        monkeypatch.delenv(variable)
    for variable, value in OF_AN_ENCLOSING_JOB.items():
        monkeypatch.setenv(variable, value)


MEANT = {"SLURM_CLUSTERS": "gpuc", "SLURM_JWT": "a-token", "SLURM_CONF": "/etc/slurm/other.conf"}


def test_every_command_of_slurm_asks_the_cluster_that_the_shell_means(
    in_a_job: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**MEANT, "HF_TOKEN": "hf_abc"}.items():
        monkeypatch.setenv(name, value)
    own = command.environment()
    assert {name: value for name, value in own.items() if name.startswith(("SLURM_", "SBATCH_"))} == MEANT
    assert own["HF_TOKEN"] == "hf_abc"
    assert command.selected() == [Cluster("gpuc", "/etc/slurm/other.conf")]


def test_a_job_is_asked_for_on_its_own_cluster_whatever_the_shell_means_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    conf = tmp_path / "slurm.conf"
    conf.touch()
    for name, value in MEANT.items():
        monkeypatch.setenv(name, value)
    own = command.environment(Cluster("", ""))
    assert [name for name in MEANT if name in own] == ["SLURM_JWT"]
    own = command.environment(Cluster("east", str(conf)))
    assert (own["SLURM_CLUSTERS"], own["SLURM_CONF"]) == ("east", str(conf))
    assert command.environment(Cluster("", "/run/slurm/conf/gone"))["SLURM_CONF"] == MEANT["SLURM_CONF"]


# ---------------------------------------------------------------- sbatch


class FakeSbatch:
    """Fakes of sbatch and srun on PATH: sbatch keeps the script and the environment of each call, and says what it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program("squeue", "exit 0")
        self.program("sacct", "exit 0")
        self.says("4711")

    def program(self, name: str, shell: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{shell}\n", encoding="utf-8")
        path.chmod(0o755)

    def says(self, output: str, errors: str = "", status: int = 0) -> None:
        kept = shlex.quote(str(self.folder))
        self.program(
            "sbatch",
            f'for script; do :; done\n/bin/cat "$script" > {kept}/script\necho "$*" > {kept}/words\n/usr/bin/env > {kept}/env\n'
            f"printf '%s\\n' {shlex.quote(output)}\n"
            f"printf '%s' {shlex.quote(errors)} >&2\nexit {status}",
        )

    def kept(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8")


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSbatch:
    (tmp_path / "programs").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    return FakeSbatch(tmp_path / "programs")


def script(folder: Path, *, name: str = "dgxh", tasks: int | None = None, **values: Any) -> Script:
    partition = build(name, [("shipped", shipped()[name]), ("labctl.toml", values)])
    return Script(partition, "labctl-b-1", 2, tasks, folder, ROOT / "workers", folder / "none")


MARK = "0123456789abcdef"


def submit(folder: Path, made: Script, paths: list[Path]) -> list[str]:
    return executor.submit(folder, made, paths, MARK).ids


def specs(folder: Path, count: int) -> list[Path]:
    return [folder / f"{task}.json" for task in range(count)]


def pickled(folder: Path, job_id: str) -> Any:
    return pickle.loads((folder / f"{job_id}_submitted.pkl").read_bytes())


def started(folder: Path, monkeypatch: pytest.MonkeyPatch, job_id: str) -> Any:
    """What the job with this Slurm id pickles for submitit when it starts."""
    parent, _, task = job_id.partition("_")
    names = {"SLURM_ARRAY_JOB_ID": parent, "SLURM_ARRAY_TASK_ID": task} if task else {}
    for variable in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(variable, raising=False)
    given = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": parent, "SUBMITIT_FOLDER": str(folder), **names}
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    start.make_pickle(folder)
    return pickled(folder, job_id)


def test_one_job_is_submitted_with_labctls_script(sbatch: FakeSbatch, tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    made = script(folder, python="/env of dgxh/bin/python")
    assert submit(folder, made, specs(tmp_path, 1)) == ["4711"]
    text = sbatch.kept("script")
    command = text.splitlines()[-1].removeprefix("exec ")
    assert shlex.split(command) == ["/env of dgxh/bin/python", "-u", "-m", "labctl_workers.start", str(folder)]
    assert text == made.text(command)
    # No option that would beat what is in the script, but for the comment, by which Slurm knows the submission.
    path = f"{folder}/submission_{MARK}.sh"
    assert sbatch.kept("words").split() == ["--parsable", f"--comment=labctl:{MARK}", path]
    assert (folder / "4711_submission.sh").read_text(encoding="utf-8") == text


def written(folder: Path, count: int = 1, **more: Any) -> Path:
    """A batch's folder of logs, with the JobSpecs above it."""
    for task in range(count):
        job = JobSpec(
            job_id=f"b-1.{task}", partition="dgxh", executor="slurm", backend="hf", model=ModelRef("m"), dtype="float16",
            device="cuda", gpus=2, runs=[], prompt_sets={}, **more,
        )  # fmt: skip
        write_json(folder / f"{task}.json", job.to_json())
    (folder / "submitit").mkdir(exist_ok=True)
    return folder / "submitit"


def test_a_job_pickles_the_worker_and_the_path_of_its_own_json_as_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, when it starts: whoever submitted it may have been killed as soon as sbatch had it."""
    folder = written(tmp_path, 3)
    for job_id, task in (("4711", 0), ("4712_0", 0), ("4712_2", 2)):
        delayed = started(folder, monkeypatch, job_id)
        assert isinstance(delayed.function, RunJob)
        assert delayed.args == (str(tmp_path / f"{task}.json"),)
        assert delayed.kwargs == {}
    assert len(list(folder.glob("*.pkl"))) == 3  # and none of a temporary name


def test_a_requeued_job_keeps_what_submitit_pickled_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path)
    delayed = started(folder, monkeypatch, "4711")
    delayed.set_timeout(60, 1)
    delayed.dump(folder / "4711_submitted.pkl")
    assert started(folder, monkeypatch, "4711")._timeout_countdown == 1


def test_several_jobs_are_one_array_with_labctls_script(sbatch: FakeSbatch, tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    made = script(folder, tasks=3)
    assert submit(folder, made, specs(tmp_path, 3)) == ["4711_0", "4711_1", "4711_2"]
    text = sbatch.kept("script")
    assert "#SBATCH --array=0-2\n" in text
    assert text == made.text(text.splitlines()[-1].removeprefix("exec "))
    assert list(folder.glob("*.pkl")) == []


@pytest.mark.parametrize(("seconds", "minutes"), [(3600, 60), (5401, 91), (30, 1), (172800, 2880)])
def test_submitit_knows_the_time_limit_in_minutes_for_its_requeue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int, minutes: int
) -> None:
    folder = written(tmp_path, time_limit_s=seconds)
    assert started(folder, monkeypatch, "4711")._timeout_min == minutes


def test_a_limit_of_the_user_is_told_apart_from_other_refusals() -> None:
    assert isinstance(refusal(f"{FAILED}Job violates accounting/QOS policy"), SubmitLimitError)
    assert not isinstance(refusal(f"{FAILED}Invalid qos specification"), SubmitLimitError)


def test_a_hundred_jobs_are_one_call_of_sbatch(sbatch: FakeSbatch, tmp_path: Path) -> None:
    started = time.monotonic()
    ids = submit(tmp_path / "logs", script(tmp_path / "logs", tasks=100), specs(tmp_path, 100))
    assert ids[-1] == "4711_99"
    assert time.monotonic() - started < 10  # one by one they take submitit 20 s


def test_sbatch_does_not_see_the_variables_that_would_beat_the_script(
    sbatch: FakeSbatch, in_a_job: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/other.conf")
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    submit(tmp_path / "logs", script(tmp_path / "logs"), specs(tmp_path, 1))
    lines = sbatch.kept("env").splitlines()
    assert [line for line in lines if line.startswith(("SBATCH_", "SLURM_"))] == ["SLURM_CONF=/etc/slurm/other.conf"]
    assert "HF_TOKEN=hf_abc" in lines
    assert "hf_abc" not in sbatch.kept("script")
    assert os.environ["SBATCH_PARTITION"] == "gpu"


@pytest.mark.parametrize("tasks", [None, 3], ids=["single", "array"])
@pytest.mark.parametrize(("spoken", "remedy"), REFUSALS.items())
def test_a_refused_job_is_one_error_with_a_remedy_and_nothing_on_the_screen(
    sbatch: FakeSbatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    spoken: str,
    remedy: str,
    tasks: int | None,
) -> None:
    sbatch.says("", spoken, 1)
    error = refused(
        lambda: submit(tmp_path / "logs", script(tmp_path / "logs", tasks=tasks), specs(tmp_path, tasks or 1))
    )
    assert remedy in error.remedy
    assert capfd.readouterr() == ("", "")


def test_an_sbatch_that_fails_without_a_word_is_told(sbatch: FakeSbatch, tmp_path: Path) -> None:
    sbatch.says("", "", 255)
    error = refused(lambda: submit(tmp_path / "logs", script(tmp_path / "logs"), specs(tmp_path, 1)))
    assert "printed nothing" in error.message


def test_an_answer_of_sbatch_without_an_id_is_told(sbatch: FakeSbatch, tmp_path: Path) -> None:
    sbatch.says("Welcome!")
    error = refused(lambda: submit(tmp_path / "logs", script(tmp_path / "logs"), specs(tmp_path, 1)))
    assert "Welcome!" in error.message


def test_a_machine_without_slurm_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = refused(lambda: submit(tmp_path / "logs", script(tmp_path / "logs"), specs(tmp_path, 1)))
    assert error.message == "command not found on this machine: sbatch"
    assert error.remedy == NO_SLURM
    assert "--partition local" in error.remedy


# ---------------------------------------------------------------- what sbatch answers, and what Slurm has
#
# Fault injections: sbatch is a fake that answers as real ones do (Slurm 22.05 to 24.05, sites' wrappers); squeue is one that has
# the job, has it not, or does not answer.

HAS = "4711|PENDING||2026-11-22T23:41:09|N/A|N/A|{name}|Priority\x1f{path}\x1f{comment}"
TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
SUBMITTED = "Submitted batch job 4711"
CLEAR = {
    "bare number": "4711",
    "the sentence": SUBMITTED,
    "a banner with another number": f"Note: this is job 3 of the 50 that you may have\n{SUBMITTED}",
    "a banner that begins like an id": f"job 99 of 100\n{SUBMITTED}\nGood luck!",
    "a number between words": "3 jobs are yours\n4711",
}
UNCLEAR = {
    "the answer is lost": ("", TIMED_OUT, 1),
    "no word": ("", "", 1),
    "no word, and no error": ("", "", 0),
    "a banner alone": ("Welcome!", "", 0),
    "two numbers": ("3\n4711", "", 0),
    "another number in a line of its own": ("12\nSubmitted batch job 4711", "", 0),
    "killed": ("", "", 137),
    "an error that is none": ("", f"{FAILED}Invalid account or account/partition combination specified", 1),
    "a cluster that nobody named": ("4711;somewhere", "", 0),
}


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "ASKED_AFTER_S", (0.0, 0.0, 0.0))


def queued(sbatch: FakeSbatch, folder: Path, tasks: int | None = None) -> Queued:
    return executor.submit(folder / "logs", script(folder / "logs", tasks=tasks), specs(folder, tasks or 1), MARK)


@pytest.mark.parametrize("output", CLEAR.values(), ids=CLEAR)
def test_an_answer_that_is_one_job_id_counts(sbatch: FakeSbatch, tmp_path: Path, output: str) -> None:
    sbatch.says(output)
    sbatch.program("squeue", "exit 1")  # nobody has to be asked
    assert queued(sbatch, tmp_path).ids == ["4711"]


@pytest.mark.parametrize("tasks", [None, 2], ids=["single", "array"])
@pytest.mark.parametrize("kept", ["the script's path", "the comment", "the name"])
@pytest.mark.parametrize("answer", UNCLEAR.values(), ids=UNCLEAR)
def test_a_job_that_slurm_has_is_queued_whatever_sbatch_said(
    sbatch: FakeSbatch, no_pause: None, tmp_path: Path, answer: tuple[str, str, int], kept: str, tasks: int | None
) -> None:
    sbatch.says(*answer)
    shows = {
        "name": "labctl-b-1" if kept == "the name" else "eecs-renamed",
        "path": f"/w/submission_{MARK}.sh" if kept == "the script's path" else "(null)",
        "comment": f"labctl:{MARK}" if kept == "the comment" else "the site's own",
    }
    sbatch.program("squeue", f"echo {shlex.quote(HAS.format(**shows))}")
    assert queued(sbatch, tmp_path, tasks).ids == (["4711"] if tasks is None else ["4711_0", "4711_1"])


def test_a_job_of_the_same_name_and_of_another_submission_is_not_taken_for_this_one(
    sbatch: FakeSbatch, no_pause: None, tmp_path: Path
) -> None:
    sbatch.says("", TIMED_OUT, 1)
    other = HAS.format(name="labctl-b-1", path="/w/submission_fedcba9876543210.sh", comment="(null)")
    sbatch.program("squeue", f"echo {shlex.quote(other)}")
    with pytest.raises(UnknownOutcomeError):
        queued(sbatch, tmp_path)


@pytest.mark.parametrize("errors", [TIMED_OUT, f"{FAILED}Invalid qos specification"], ids=["lost", "refused"])
def test_where_slurm_does_not_answer_nobody_says_that_nothing_was_queued(
    sbatch: FakeSbatch, no_pause: None, tmp_path: Path, errors: str
) -> None:
    sbatch.says("", errors, 1)
    sbatch.program("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(UnknownOutcomeError) as caught:
        queued(sbatch, tmp_path)
    assert errors.rpartition(": ")[2] in caught.value.message
    assert "labctl status" in caught.value.remedy
    assert caught.value.late_s == (150.0 if errors == TIMED_OUT else 0.0)


def test_a_refused_job_that_slurm_keeps_as_failed_is_refused(sbatch: FakeSbatch, tmp_path: Path) -> None:
    sbatch.says("", f"{FAILED}Requested node configuration is not available", 1)
    line = HAS.format(name="labctl-b-1", path=f"/w/submission_{MARK}.sh", comment="").replace("PENDING", "FAILED")
    sbatch.program("squeue", f"echo {shlex.quote(line)}")
    error = refused(lambda: queued(sbatch, tmp_path))
    assert not isinstance(error, UnknownOutcomeError)
    assert "fewer GPUs" in error.remedy


def test_an_sbatch_that_hangs_is_ended_and_its_job_is_looked_for(
    sbatch: FakeSbatch, no_pause: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SBATCH_WITHIN_S", 0.5)
    sbatch.program("sbatch", "exec /bin/sleep 60")
    line = HAS.format(name="x", path=f"/w/submission_{MARK}.sh", comment="")
    sbatch.program("squeue", f"echo {shlex.quote(line)}")
    assert queued(sbatch, tmp_path).ids == ["4711"]


@pytest.mark.parametrize(
    ("said", "cluster"),
    [("4711;east", "east"), ("Submitted batch job 4711 on cluster west", "west")],
)
def test_of_several_clusters_the_one_that_took_the_job_is_kept(
    sbatch: FakeSbatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, cluster: str
) -> None:
    monkeypatch.setenv("SLURM_CLUSTERS", "east,west")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    sbatch.says(said)
    assert queued(sbatch, tmp_path) == Queued(["4711"], Cluster(cluster))


def test_a_lost_answer_is_looked_for_on_each_cluster_that_the_shell_means(
    sbatch: FakeSbatch, no_pause: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CLUSTERS", "east,west")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    sbatch.says("", TIMED_OUT, 1)
    line = HAS.format(name="x", path=f"/w/submission_{MARK}.sh", comment="")
    sbatch.program("squeue", f'[ "$SLURM_CLUSTERS" = west ] && echo {shlex.quote(line)}; exit 0')
    assert queued(sbatch, tmp_path) == Queued(["4711"], Cluster("west"))


# ---------------------------------------------------------------- this machine


@pytest.fixture
def local_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Ids of local jobs, each ended after the test; no other local job of this machine makes them wait."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for variable in [name for name in os.environ if name.startswith(("SLURM", "SUBMITIT"))]:
        monkeypatch.delenv(variable)
    ids: list[str] = []
    yield ids
    for pid in map(int, ids):
        if not ended(pid):
            os.killpg(pid, signal.SIGKILL)
            wait_for(partial(ended, pid), 10)


def ended(pid: int) -> bool:
    """Whether this child of ours is gone; it is reaped here where submitit's own handle has not done it."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def wait_for(true: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def local_spec(folder: Path) -> Path:
    """A job that fails at once and writes why: no backend is called none."""
    path = folder / ".labctl" / "arrays" / "b-1" / "0.json"
    run = RunSpec("0123456789ab", {}, "p", 4)
    job = JobSpec("b-1.0", "local", "local", "none", ModelRef("m"), "float32", "cpu", 1, [run], {"p": ["a"]})
    path.parent.mkdir(parents=True)
    write_json(path, job.to_json())
    return path


def test_a_local_job_runs_without_slurm_and_sees_the_gpus_that_the_user_does(
    local_jobs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    spec = local_spec(tmp_path)
    logs = spec.parent / "submitit"
    setup = [f"env > {shlex.quote(str(tmp_path))}/environment"]
    made = script(logs, name="local", setup=setup, env={"OMP_NUM_THREADS": "1"})
    (job_id,) = submit(logs, made, [spec])
    local_jobs.append(job_id)
    record = tmp_path / ".labctl" / "results" / "0123456789ab"
    wait_for(lambda: record.exists() and any(record.glob("[!.]*.json")), 30)
    (document,) = [read_json(path) for path in record.glob("[!.]*.json")]
    assert document["failure"]["kind"] == "unknown-backend"
    assert document["attempt"]["slurm_job_id"] is None
    assert document["attempt"]["execution"] == job_id
    environment = dict(
        line.split("=", 1)
        for line in (tmp_path / "environment").read_text(encoding="utf-8").splitlines()
        if "=" in line
    )
    assert environment["CUDA_VISIBLE_DEVICES"] == "5"  # submitit would have hidden it
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["PYTHONPATH"].split(os.pathsep)[-1] == str(ROOT / "workers")
    wait_for(partial(ended, int(job_id)), 30)
    assert (logs / f"{job_id}_0_log.err").read_text(encoding="utf-8").count("unknown-backend") >= 1


def test_a_local_jobs_group_is_its_own_so_that_ctrl_c_does_not_reach_it(local_jobs: list[str], tmp_path: Path) -> None:
    spec = local_spec(tmp_path)
    logs = spec.parent / "submitit"
    (job_id,) = submit(logs, script(logs, name="local", setup=["sleep 30"]), [spec])
    local_jobs.append(job_id)
    assert os.getpgid(int(job_id)) == int(job_id) != os.getpgid(0)
    assert os.getsid(int(job_id)) == int(job_id)


def test_the_controller_of_a_local_job_is_labctls_own_python() -> None:
    assert shlex.split(executor._controller())[0] == sys.executable
