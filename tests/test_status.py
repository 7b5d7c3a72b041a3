"""Where each run stands: every source (Slurm, processes, heartbeat, records) and what is told of them together."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from typing import Any

import pytest

from labctl_orchestrator.store import select_runs
from labctl_orchestrator.store.database import Store, open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking import job_status, processes, refresh, run_status, status, wait
from labctl_orchestrator.tracking.refresh import Refreshed
from labctl_orchestrator.tracking.run_status import ENDED, RunStatus
from labctl_slurm import queue
from labctl_slurm.diagnose import LONGEST_DETAIL
from labctl_slurm.errors import WrongUseError
from labctl_workers.record import Attempt, Failure, Heartbeat, JobFolder, read_json, write_json

from .conftest import JobArray, Labctl, Records, Slurm, ago, edit_json, refused, sacct_line, squeue_line


@contextmanager
def opened(workspace: Workspace) -> Iterator[Store]:
    with closing(open_store(workspace)) as store:
        yield store


def looked_at(workspace: Workspace, *names: str) -> tuple[Refreshed, list[RunStatus]]:
    with opened(workspace) as store:
        learnt = refresh.refresh(workspace, store)
        _, run_ids = select_runs.chosen_runs(store, names)
        return learnt, status.statuses(workspace, store, run_ids)


def state_of(workspace: Workspace) -> str:
    (run,) = looked_at(workspace)[1]
    return run.state


def job_name(batch: JobArray) -> str:
    return f"labctl-{batch.array_id}"


# ---------------------------------------------------------------- what is told of which sources together
#
# Each case: what labctl submit left, what Slurm says now, what the worker left -> the state, and a part of the reason.

Step = Callable[[Records, Slurm], None]


class Case:
    """One job of one run as its sources have it. Without a word about them: accepted by Slurm, which shows nothing."""

    def __init__(
        self,
        told: str,
        why: str = "",
        *,
        intent_age_s: float | None = 0,
        accepted: bool = True,
        refusal: str | None = None,
        known: str | None = None,
        squeue: str | None = None,
        reason: str = "None",
        sacct: str | None = None,
        exit_code: str = "0:0",
        ended: str = "2026-01-01T11:00:00",
        silent: bool = False,
        phase: str | None = None,
        records: tuple[str, ...] = (),
    ) -> None:
        self.told, self.why = told, why
        self.intent_age_s, self.accepted, self.refusal, self.known = intent_age_s, accepted, refusal, known
        self.squeue, self.reason, self.sacct, self.exit_code, self.ended = squeue, reason, sacct, exit_code, ended
        self.silent, self.phase, self.records = silent, phase, records

    def write(self, records: Records, slurm: Slurm) -> None:
        submission_id = records.request()
        batch = records.prepare()
        if self.intent_age_s is not None:
            records.intend(batch, submission_id, age_s=self.intent_age_s)
        if self.refusal is not None:
            records.refuse(batch, self.refusal)
        elif self.accepted:
            records.accept(batch, "1000")
        if self.known is not None:
            records.states(batch, state=self.known, started_at=ago(100))
        self._write_slurm(slurm, batch)
        if self.phase is not None or self.records:
            attempt = records.attempt(batch)
            for record in self.records:
                {"done": records.done, "failed": records.failed}[record](batch, attempt)
            if self.phase is not None:
                records.heartbeat(batch, attempt, self.phase)

    def _write_slurm(self, slurm: Slurm, batch: JobArray) -> None:
        if self.silent:
            slurm.is_silent()
            return
        queued = squeue_line("1000", self.squeue, job_name(batch), reason=self.reason) if self.squeue else ""
        exits = {"exit_code": self.exit_code, "ended": self.ended}
        slurm.shows(queued, sacct_line("1000", self.sacct, job_name(batch), **exits) if self.sacct else "")


CASES = {
    # before Slurm knows the job
    "asked for, only rendered": Case("missing", "never queued", intent_age_s=None, accepted=False),
    "about to be submitted": Case("submitting", "about to call sbatch", accepted=False),
    "cut off while it was submitted": Case("interrupted", "before it queued the job", intent_age_s=300, accepted=False),
    "cut off, Slurm is silent": Case("unknown", "has not answered yet", intent_age_s=300, accepted=False, silent=True),
    "cut off, but Slurm has it": Case(
        "pending", "Priority", intent_age_s=300, accepted=False, squeue="PENDING", reason="Priority"
    ),
    "cut off, and it has ended": Case("failed", "node failed", intent_age_s=300, accepted=False, sacct="NODE_FAIL"),
    "cut off, but its worker ran": Case("done", intent_age_s=300, accepted=False, records=("done",)),
    "refused": Case("refused", "Invalid account", refusal="Slurm refused the job: Invalid account"),
    # what squeue says
    "submitted, and shown by nobody": Case("unknown", "not in squeue or sacct; last state: submitted"),
    "pending": Case("pending", "Priority", squeue="PENDING", reason="Priority"),
    "pending for ever": Case("pending", "QOSMaxJobs", squeue="PENDING", reason="QOSMaxJobs"),
    "held after a requeue": Case("pending", squeue="REQUEUE_HOLD"),
    "requeued ahead of others, since Slurm 25.11": Case("pending", squeue="EXPEDITING"),
    "configuring": Case("pending", "Slurm prepares the node (CONFIGURING)", squeue="CONFIGURING"),
    "stopped": Case("suspended", "before: the worker has not started yet", squeue="STOPPED"),
    "a state that labctl does not know": Case("unknown", "unknown Slurm state REVOKED", squeue="REVOKED"),
    "running, no word of the worker": Case("running", "not started yet", squeue="RUNNING"),
    "suspended": Case("suspended", "before: the worker has not started yet", squeue="SUSPENDED"),
    "suspended while it measured": Case("suspended", "before: measuring (0/1", squeue="SUSPENDED", phase="measuring"),
    "completing": Case("running", squeue="COMPLETING", phase="ended"),
    # the worker's heartbeat
    "loading": Case("running", "loading (0/1", squeue="RUNNING", phase="loading"),
    "measuring": Case("running", "measuring (0/1", squeue="RUNNING", phase="measuring"),
    # records
    "done": Case("done", squeue="COMPLETED", records=("done",)),
    "done, the job still runs": Case("done", squeue="RUNNING", phase="measuring", records=("done",)),
    "done, Slurm says failed": Case("done", sacct="FAILED", exit_code="1:0", records=("done",)),
    "done, Slurm says cancelled": Case("done", sacct="CANCELLED by 1000", records=("done",)),
    "done, Slurm says nothing": Case("done", records=("done",)),
    "done, Slurm does not answer": Case("done", silent=True, records=("done",)),
    "failed": Case("failed", "CUDA out of memory", sacct="FAILED", exit_code="1:0", records=("failed",)),
    "failed, the job still runs": Case("failed", "CUDA out", squeue="RUNNING", phase="measuring", records=("failed",)),
    "failed, Slurm says completed": Case("failed", "CUDA out of memory", sacct="COMPLETED", records=("failed",)),
    "failed, then requeued": Case("pending", squeue="PENDING", records=("failed",)),
    # an end without a record
    "cancelled": Case("cancelled", "user id 4123456789", sacct="CANCELLED by 4123456789"),
    "cancelled, both say so": Case("cancelled", squeue="CANCELLED", sacct="CANCELLED by 0"),
    "timeout": Case("timeout", "time limit", sacct="TIMEOUT"),
    "out of memory": Case("failed", "out of host memory", sacct="OUT_OF_MEMORY", exit_code="0:125"),
    "node failed": Case("failed", "node failed", sacct="NODE_FAIL"),
    "preempted": Case("failed", "preempted", sacct="PREEMPTED"),
    "deadline": Case("failed", "deadline", sacct="DEADLINE"),
    "did not boot": Case("failed", "boot", sacct="BOOT_FAIL"),
    "exit code": Case("failed", "exit code 127:0", sacct="FAILED", exit_code="127:0"),
    "completed long ago, no record": Case("failed", "ended without a record", sacct="COMPLETED"),
    "completed just now, no record": Case("running", "has not arrived", sacct="COMPLETED", ended="2099-01-01T00:00:00"),
    "requeued: pending now, failed before": Case("pending", squeue="PENDING", sacct="NODE_FAIL"),
    # Slurm does not answer: nothing is inferred from that
    "silent, nothing known": Case("unknown", silent=True),
    "silent, was pending": Case("pending", silent=True, known="PENDING"),
    "silent, was running": Case("running", silent=True, known="RUNNING"),
    "silent, was running and measuring": Case("running", "measuring", silent=True, known="RUNNING", phase="measuring"),
    "silent, was cancelled": Case("cancelled", silent=True, known="CANCELLED"),
    "silent, was failed": Case("failed", silent=True, known="FAILED"),
    "forgotten, was running": Case("unknown", "last state: running", known="RUNNING"),
    "forgotten, was pending": Case("unknown", "last state: pending", known="PENDING"),
    "forgotten, its worker lives": Case("running", "its worker sends heartbeats", known="RUNNING", phase="measuring"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_state_that_is_told(records: Records, slurm: Slurm, case: Case) -> None:
    case.write(records, slurm)
    (run,) = looked_at(records.workspace)[1]
    assert run.state == case.told
    assert case.why in run.detail
    assert len(run.detail) <= LONGEST_DETAIL


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_told_does_not_change_by_looking_again(records: Records, slurm: Slurm, case: Case) -> None:
    case.write(records, slurm)
    first = looked_at(records.workspace)[1]
    second = looked_at(records.workspace)[1]
    assert [(run.state, run.detail) for run in second] == [(run.state, run.detail) for run in first]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_job_becomes_failed_because_slurm_does_not_answer(records: Records, slurm: Slurm, case: Case) -> None:
    """squeue and sacct fail here: programs of their names that end with status 1."""
    case.write(records, slurm)
    slurm.is_silent()
    (run,) = looked_at(records.workspace)[1]
    if run.state in ENDED:  # then something that is on disk says so
        assert case.records or case.known in {"FAILED", "CANCELLED"} or case.refusal or not case.accepted


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_bad_end_has_a_remedy(records: Records, slurm: Slurm, case: Case) -> None:
    case.write(records, slurm)
    (run,) = looked_at(records.workspace)[1]
    for_ever = run.state == "pending" and run.kind != ""
    assert bool(run.remedy) == (run.state in run_status.UNSUCCESSFUL or for_ever)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            Case("failed", "CUDA out of memory", silent=True, records=("failed",)), id="Slurm does not answer"
        ),
        pytest.param(Case("failed", "CUDA out of memory", records=("failed",)), id="Slurm has forgotten the job"),
        pytest.param(
            Case("failed", "CUDA out", intent_age_s=None, accepted=False, records=("failed",)), id="run by hand"
        ),
    ],
)
def test_a_failed_record_is_believed_where_slurm_says_nothing(records: Records, slurm: Slurm, case: Case) -> None:
    """A site without accounting forgets an ended job in minutes; the record is what is left."""
    case.write(records, slurm)
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.detail) == (case.told, "CUDA out of memory")


def test_a_run_that_failed_before_its_job_was_requeued_runs_again(records: Records, slurm: Slurm) -> None:
    batch = records.submit()
    records.failed(batch, records.attempt(batch, age_s=600))
    slurm.shows(squeue_line("1000", "RUNNING", job_name(batch)))
    records.heartbeat(batch, records.attempt(batch, age_s=5), "loading")
    assert state_of(records.workspace) == "running"


@pytest.mark.parametrize("ahead_s", [600, -600], ids=["node-ahead", "node-behind"])
def test_of_two_starts_on_nodes_whose_clocks_differ_the_later_one_counts(
    records: Records, slurm: Slurm, ahead_s: int
) -> None:
    batch = records.submit()
    for restarts, kind, of_node_s in ((0, "first", 0), (1, "second", ahead_s)):
        attempt = records.attempt(batch, age_s=60 - restarts - of_node_s, restarts=restarts)
        at = ago(30 - of_node_s)
        records._record(batch, attempt, batch.runs[0], "failed", ended_at=at, failure=Failure(kind, ""))
    records.states(batch, state="FAILED", exit_code="1:0", ended_at=ago(5))
    slurm.shows()
    (run,) = looked_at(records.workspace)[1]
    assert run.kind == "second"


def test_a_failure_in_a_later_engine_load_is_told_while_the_job_goes_on(records: Records, slurm: Slurm) -> None:
    batch = records.submit()
    attempt = records.attempt(batch)
    records._record(batch, attempt.in_load(2), batch.runs[0], "failed", failure=Failure("odd", ""))
    records.heartbeat(batch, attempt, "measuring")
    slurm.shows(squeue_line("1000", "RUNNING", job_name(batch)))
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.kind) == ("failed", "odd")


def test_a_workspace_that_is_moved_while_labctl_reads_it_is_named_and_not_made_again(
    labctl: Labctl, records: Records, slurm: Slurm
) -> None:
    batch = records.submit(name="first", lengths=(8, 16))
    records.done(batch, records.attempt(batch))
    labctl("collect")
    root = records.workspace.root
    line = squeue_line("1000", "RUNNING", job_name(batch))
    slurm._write("squeue", f"/bin/mv {root} {root}-moved\nprintf %s {shlex.quote(line)}\n")
    slurm.answers("sacct")
    ran = labctl("status", "first")
    assert (ran.code, ran.out) == (5, "")
    assert f"labctl: workspace was moved or removed meanwhile: {root}" in ran.err
    assert not root.exists()
    slurm.shows(line)
    os.chdir(f"{root}-moved")
    assert [run["state"] for run in labctl("status", "first", "--json").json] == ["done", "running"]


def test_a_script_run_by_hand_without_slurm_is_done_when_its_record_is_there(records: Records) -> None:
    batch = records.prepare()
    records.done(batch, records.attempt(batch, slurm_id=None))
    (run,) = looked_at(records.workspace, batch.runs[0].run_id)[1]
    assert run.state == "done"


def test_a_script_submitted_by_hand_is_asked_for_by_its_workers_id(records: Records, slurm: Slurm) -> None:
    batch = records.prepare()
    records.heartbeat(batch, records.attempt(batch, slurm_id="77"), "loading")
    slurm.shows(squeue_line("77", "RUNNING", job_name(batch)))
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.slurm_id, run.detail) == ("running", "77", "loading (0/1 runs of the job done)")


def test_a_printed_script_that_waits_in_the_queue_is_a_job(records: Records, slurm: Slurm) -> None:
    batch = records.prepare(dtypes=("float16", "float32"))
    slurm.shows("".join(squeue_line(f"77_{task}", "PENDING", job_name(batch), reason="JobHeldUser") for task in (0, 1)))
    first, second = looked_at(records.workspace)[1]
    assert (first.state, first.slurm_id, second.slurm_id) == ("pending", "77_0", "77_1")
    assert first.may_come


def test_an_ended_job_of_an_earlier_script_of_the_same_name_is_no_submission(records: Records, slurm: Slurm) -> None:
    batch = records.prepare()
    slurm.shows(squeue_line("77", "CANCELLED", job_name(batch)))
    (run,) = looked_at(records.workspace, batch.runs[0].run_id)[1]
    assert run.state == "missing"


# ---------------------------------------------------------------- by what a job is known

MARK, OTHER = "0123456789abcdef", "fedcba9876543210"
KEEPERS = {
    "the script's path": f"\x1f/w/submission_{MARK}.sh\x1f(null)\n",
    "the comment": f"\x1f(null)\x1flabctl:{MARK}\n",
    "both": f"\x1f/w/submission_{MARK}.sh\x1flabctl:{MARK}\n",
}


def known_by(records: Records, batch: JobArray, **more: Any) -> None:
    edit_json(batch.folder / "intent.json", mark=MARK, **more)


@pytest.mark.parametrize("keeper", KEEPERS.values(), ids=KEEPERS)
def test_a_renamed_job_is_known_by_its_mark(records: Records, slurm: Slurm, keeper: str) -> None:
    known_by(records, records.submit())
    slurm.shows(squeue_line("1000", "RUNNING", "renamed").rstrip("\n") + keeper)
    assert state_of(records.workspace) == "running"


def test_a_renamed_job_is_known_by_its_mark_in_the_accounting(records: Records, slurm: Slurm) -> None:
    known_by(records, records.submit())
    line = sacct_line("1000", "TIMEOUT", "re|named").rstrip("\n")
    slurm.shows("", f"{line}|1000|sbatch --parsable --comment=x /w/submission_{MARK}.sh\n")
    assert state_of(records.workspace) == "timeout"


def test_a_renamed_job_without_a_mark_is_known_by_its_id_and_its_time(records: Records, slurm: Slurm) -> None:
    batch = records.submit()
    slurm.shows(squeue_line("1000", "PENDING", job_name(batch)))
    assert state_of(records.workspace) == "pending"
    slurm.shows(squeue_line("1000", "RUNNING", "renamed"))
    assert state_of(records.workspace) == "running"


def test_an_id_that_slurm_gave_to_another_submission_of_the_same_name_is_not_this_job(
    records: Records, slurm: Slurm
) -> None:
    batch = records.submit()
    known_by(records, batch)
    line = squeue_line("1000", "RUNNING", job_name(batch)).rstrip("\n")
    slurm.shows(f"{line}\x1f/w/submission_{OTHER}.sh\x1f(null)\n")
    assert state_of(records.workspace) == "unknown"


def test_each_job_is_asked_for_on_its_own_cluster(records: Records, slurm: Slurm) -> None:
    """Fault injection: squeue answers for the cluster east alone, which the shell does not mean any more."""
    batch = records.submit()
    known_by(records, batch, clusters=[{"name": "east", "conf": ""}])
    slurm.shows()
    line = squeue_line("1000", "RUNNING", job_name(batch)).strip()
    slurm._write("squeue", f'[ "$SLURM_CLUSTERS" = east ] && echo "{line}"; exit 0\n')
    assert state_of(records.workspace) == "running"


LOST = {"message": "sbatch gave no job id: Socket timed out", "remedy": "ask", "late_s": 120.0}


def lost_answer(records: Records, age_s: float) -> JobArray:
    submission_id = records.request()
    batch = records.prepare()
    records.intend(batch, submission_id, age_s=age_s)
    # The process that submitted it lives on, as labctl submit --wait does.
    known_by(records, batch, lost_answer=LOST, pid=os.getpid())
    return batch


def test_a_job_whose_answer_was_lost_is_found_and_is_not_queued_again(records: Records, slurm: Slurm) -> None:
    lost_answer(records, 10)
    slurm.shows(squeue_line("4000", "PENDING", "renamed").rstrip("\n") + KEEPERS["the script's path"])
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.slurm_id) == ("pending", "4000")


def test_a_job_whose_answer_was_lost_and_that_has_ended_is_found_by_its_mark(records: Records, slurm: Slurm) -> None:
    lost_answer(records, 10)
    line = sacct_line("4000", "NODE_FAIL", "renamed").rstrip("\n")
    slurm.shows("", f"{line}|0|sbatch --parsable /w/submission_{MARK}.sh\n")
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.slurm_id) == ("failed", "4000")


def test_a_lost_answer_is_unknown_until_what_was_sent_cannot_come_any_more(records: Records, slurm: Slurm) -> None:
    lost_answer(records, 10)
    slurm.shows()
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.detail, run.may_come) == ("unknown", LOST["message"], True)


def test_a_lost_answer_of_a_job_that_slurm_does_not_have_is_a_refusal(records: Records, slurm: Slurm) -> None:
    lost_answer(records, 200)
    slurm.is_silent()
    assert looked_at(records.workspace)[1][0].state == "unknown"
    slurm.shows()
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.may_come) == ("refused", False)
    assert run.detail == "Slurm does not have the job: sbatch gave no job id: Socket timed out"


def test_a_local_job_of_another_machine_is_told_by_its_heartbeat(records: Records) -> None:
    batch = records.submit("77", partition="local")
    edit_json(batch.folder / "intent.json", host="elsewhere")
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.detail) == ("unknown", "local job on elsewhere; no heartbeat")
    records.heartbeat(batch, records.attempt(batch, slurm_id=None), "measuring")
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.detail) == ("running", "measuring (0/1 runs of the job done); local job on elsewhere")


# ---------------------------------------------------------------- the clocks of nodes, minutes before or behind this machine's

SQUEUES_START = str(queue.utc("2026-01-01T10:01:00"))


def beats(batch: JobArray, attempt: Attempt, node_is_behind_s: float, phase: str = "measuring", **values: Any) -> None:
    """A heartbeat of just now, by the clock of a node that is so many seconds behind."""
    beat = Heartbeat(attempt.attempt_id, phase, 0, 1, ago(node_is_behind_s), "node-7", 1, **values)
    write_json(JobFolder(batch.spec(0)).heartbeat, beat.to_json())


@pytest.mark.parametrize("behind_s", [600, 0, -600])
@pytest.mark.parametrize(
    ("start", "phase", "told"),
    [
        (SQUEUES_START, "ended", "failed"),
        (SQUEUES_START, "requeued", "running"),
        ("2026-01-01T01:00:00Z", "ended", "running"),  # Slurm began the job again since
    ],
)
def test_the_clock_of_a_node_does_not_say_in_which_start_a_run_failed(
    records: Records, slurm: Slurm, behind_s: float, start: str, phase: str, told: str
) -> None:
    batch = records.submit()
    attempt = records.attempt(batch)
    edit_json(records.failed(batch, attempt), ended_at=ago(behind_s))
    beats(batch, attempt, behind_s, phase, slurm_started_at=start)
    slurm.shows(squeue_line("1000", "RUNNING", job_name(batch)))
    (run,) = looked_at(records.workspace)[1]
    assert run.state == told
    assert told == "failed" or run.detail == "the worker has not started yet"


@pytest.mark.parametrize("behind_s", [600, -600])
@pytest.mark.parametrize("kind", ["by hand", "gone", "local"])
def test_the_clock_of_a_node_does_not_make_its_worker_lost(
    records: Records, slurm: Slurm, kind: str, behind_s: float
) -> None:
    batch = records.prepare() if kind == "by hand" else records.submit(partition="local" if kind == "local" else "dgxh")
    if kind == "local":
        edit_json(batch.folder / "intent.json", host="node-7")
    if kind == "gone":
        records.states(batch, state="RUNNING", gone_since=ago(3000))
    slurm.shows()
    attempt = records.attempt(batch, slurm_id=None)
    beats(batch, attempt, behind_s)
    (first,) = looked_at(records.workspace, batch.runs[0].run_id)[1]
    assert (first.state, first.may_come) == ("unknown", True)  # nothing is inferred from one look
    beats(batch, attempt, behind_s - 5)
    (second,) = looked_at(records.workspace, batch.runs[0].run_id)[1]
    assert second.state == "running"
    heard = read_json(records.workspace.heard)
    edit_json(records.workspace.heard, **{job: {**one, "seen_at": ago(61)} for job, one in heard.items()})
    (last,) = looked_at(records.workspace, batch.runs[0].run_id)[1]
    assert (last.state, last.may_come) == (("unknown", True) if kind == "local" else ("lost", False))


@pytest.mark.parametrize("behind_s", [600, 0, -600])
def test_the_controllers_clock_does_not_make_a_record_late_or_missing(
    records: Records, slurm: Slurm, behind_s: float
) -> None:
    batch = records.submit()
    records.states(batch, state="COMPLETED", ended_at=ago(behind_s), observed_at=ago(5))
    assert state_of(records.workspace) == "running"  # its record may be on its way
    records.states(batch, state="COMPLETED", ended_at=ago(behind_s), observed_at=ago(40))
    assert state_of(records.workspace) == "failed"


def test_the_runs_of_a_job_wait_for_their_turn(records: Records, slurm: Slurm) -> None:
    batch = records.submit(lengths=(8, 16, 32))
    first, second, third = batch.runs
    attempt = records.attempt(batch)
    records.done(batch, attempt, first)
    records.heartbeat(batch, attempt, "measuring", run_id=second.run_id, done=1)
    slurm.shows(squeue_line("1000", "RUNNING", job_name(batch)))
    found = {run.run_id: run for run in looked_at(records.workspace)[1]}
    assert found[first.run_id].state == "done"
    assert found[second.run_id].detail == "measuring (1/3 runs of the job done)"
    assert found[third.run_id].detail == "waits for its turn in the job (1/3 done)"


def test_a_job_that_a_person_started_counts_after_those_that_failed_before(records: Records, slurm: Slurm) -> None:
    slurm.shows("", "")
    batch = records.submit()
    records.states(batch, state="FAILED", ended_at=ago(400), exit_code="1:0")
    assert state_of(records.workspace) == "failed"
    by_hand = records.prepare()
    records.done(by_hand, records.attempt(by_hand, slurm_id="4000"))
    assert state_of(records.workspace) == "done"


def test_of_several_jobs_of_a_run_the_one_nearest_to_a_result_is_told(records: Records, slurm: Slurm) -> None:
    first, second, third = (records.submit(slurm_id) for slurm_id in ("1000", "2000", "3000"))
    slurm.shows(
        squeue_line("1000", "PENDING", job_name(first), reason="Priority")
        + squeue_line("2000", "RUNNING", job_name(second)),
        sacct_line("3000", "NODE_FAIL", job_name(third)),
    )
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.slurm_id) == ("running", "2000")
    assert run.detail.endswith("engine loads: 2 expected, 1 missing")
    assert run.jobs_to_come == (first.jobs[0].job_id, second.jobs[0].job_id)
    assert run.unmeasured == {third.jobs[0].job_id: "failed"}


def test_a_job_of_several_engine_loads_says_in_which_it_is(records: Records, slurm: Slurm) -> None:
    batch = records.submit()
    edit_json(batch.spec(0), loads=3)
    slurm.shows(squeue_line("1000", "RUNNING", job_name(batch)))
    attempt = records.attempt(batch)
    records.done(batch, attempt)
    beat = Heartbeat(attempt.attempt_id, "measuring", 1, 3, ago(0), attempt.host, 1, batch.runs[0].run_id, load=2)
    write_json(JobFolder(batch.spec(0)).heartbeat, beat.to_json())
    (run,) = looked_at(records.workspace)[1]
    assert run.state == "running"
    assert run.detail == (
        "measuring (1/3 measurements of the job done); engine load 2 of 3; engine loads: 1 measured, 2 expected"
    )


def test_each_task_of_an_array_has_its_own_state(records: Records, slurm: Slurm) -> None:
    batch = records.submit(dtypes=("float16", "bfloat16", "float32"))
    name = job_name(batch)
    slurm.shows(
        squeue_line("1000_0", "RUNNING", name) + squeue_line("1000_2", "PENDING", name, reason="Resources"),
        sacct_line("1000_1", "FAILED", name, exit_code="1:0") + sacct_line("1000_2", "PENDING", name),
    )
    assert [run.state for run in looked_at(records.workspace)[1]] == ["running", "failed", "pending"]


def test_tasks_that_sacct_shows_in_brackets_are_told_one_by_one(records: Records, slurm: Slurm) -> None:
    batch = records.submit(dtypes=("float16", "bfloat16", "float32"))
    slurm.shows("", sacct_line("1000_[0-2%1]", "CANCELLED by 1000", job_name(batch)))
    assert [run.state for run in looked_at(records.workspace)[1]] == ["cancelled"] * 3


def test_the_latest_row_of_a_requeued_job_counts(records: Records, slurm: Slurm) -> None:
    batch = records.submit()
    rows = [
        "1000|NODE_FAIL|0:0|2026-01-01T10:00:00|2026-01-01T10:01:00|2026-01-01T10:05:00|dgxh-1|" + job_name(batch),
        "1000|CANCELLED by 5|0:0|2026-01-01T10:06:00|2026-01-01T10:07:00|2026-01-01T10:09:00|dgxh-2|" + job_name(batch),
    ]
    slurm.shows("", "\n".join(reversed(rows)) + "\n")
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.node) == ("cancelled", "dgxh-2")


def test_a_job_that_sbatch_took_a_moment_ago_is_pending_before_any_list_has_it(records: Records, slurm: Slurm) -> None:
    batch = records.prepare()
    records.intend(batch, records.request())
    records.accept(batch, "1000", at=ago(1))
    slurm.shows()
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.detail) == ("pending", "accepted, not yet in squeue")


def test_another_job_under_a_reused_slurm_id_says_nothing_of_ours(records: Records, slurm: Slurm) -> None:
    records.submit()
    slurm.shows(squeue_line("1000", "RUNNING", "somebody-elses"), sacct_line("1000", "FAILED", "somebody-elses"))
    assert state_of(records.workspace) == "unknown"


def test_a_later_job_under_a_reused_id_changes_nothing_of_one_that_has_ended(records: Records, slurm: Slurm) -> None:
    batch = records.submit()
    slurm.shows("", sacct_line("1000", "TIMEOUT", job_name(batch)))
    assert state_of(records.workspace) == "timeout"
    slurm.shows(squeue_line("1000", "RUNNING", "somebody-elses"))
    assert state_of(records.workspace) == "timeout"


@pytest.mark.parametrize(
    ("queued", "told"), [("PENDING", "pending"), ("RUNNING", "running"), ("CANCELLED", "cancelled")]
)
def test_an_ended_job_that_is_put_back_into_the_queue_is_told_as_alive(
    records: Records, slurm: Slurm, queued: str, told: str
) -> None:
    """By scontrol requeue, or by a controller that was killed and has forgotten that it ended."""
    batch = records.submit()
    slurm.shows("", sacct_line("1000", "FAILED", job_name(batch), ended=ago(60)[:19]))
    assert state_of(records.workspace) == "failed"
    slurm.shows(squeue_line("1000", queued, job_name(batch)))
    assert state_of(records.workspace) == told


def test_slurm_is_not_asked_once_every_job_has_ended_for_long(records: Records, slurm: Slurm) -> None:
    batch = records.submit()
    slurm.shows("", sacct_line("1000", "TIMEOUT", job_name(batch)))
    assert state_of(records.workspace) == "timeout"
    slurm.is_silent()
    assert looked_at(records.workspace)[0].problems == []


def test_what_slurm_did_not_answer_is_a_problem_in_its_own_words(records: Records, slurm: Slurm) -> None:
    records.submit()
    slurm.is_silent()
    problems = looked_at(records.workspace)[0].problems
    assert problems == ["squeue failed: Unable to contact slurm controller"]


def test_a_machine_without_slurm_says_so_and_keeps_what_was_known(records: Records) -> None:
    batch = records.submit()
    records.states(batch, state="RUNNING", started_at=ago(60))
    learnt, (run,) = looked_at(records.workspace)
    assert learnt.problems == ["command not found on this machine: squeue"]
    assert run.state == "running"


def test_what_is_not_understood_in_slurms_answer_is_left_out(records: Records, slurm: Slurm) -> None:
    batch = records.submit()
    noise = "slurm_load_jobs: warning\n\n1000|RUNNING\n|||||||\n9|\xff|\n4+1|RUNNING|n|N/A|N/A|N/A|x|None\n"
    slurm.shows(noise + squeue_line("1000", "PENDING", job_name(batch), reason="a|b|c"), noise)
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.detail) == ("pending", "a|b|c")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        '{"attempt_id":',
        "{}",
        '"text"',
    ],
)
def test_a_heartbeat_that_cannot_be_read_is_no_heartbeat(records: Records, slurm: Slurm, content: str) -> None:
    batch = records.submit()
    records.heartbeat(batch, records.attempt(batch), "loading")
    path = batch.folder / "heartbeats" / "0.json"
    path.write_text(content, encoding="utf-8")
    slurm.shows(squeue_line("1000", "RUNNING", job_name(batch)))
    assert state_of(records.workspace) == "running"


def test_the_last_request_counts_where_a_run_was_asked_for_twice(records: Records, slurm: Slurm) -> None:
    first = records.submit("1000", name="first")
    records.done(first, records.attempt(first, slurm_id="1000"))
    slurm.shows()
    assert state_of(records.workspace) == "done"
    again = records.submit("2000", name="again")
    slurm.shows(squeue_line("2000", "PENDING", job_name(again)))
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.slurm_id) == ("pending", "2000")


def test_a_skipped_run_is_done_by_its_earlier_job(records: Records, slurm: Slurm) -> None:
    batch = records.submit("1000")
    records.done(batch, records.attempt(batch))
    records.request(skipped=[batch.runs[0].run_id], name="later")
    slurm.shows()
    (run,) = looked_at(records.workspace, "later")[1]
    assert (run.state, run.slurm_id) == ("done", "1000")


# ---------------------------------------------------------------- jobs of this machine


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until the test ends."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def on_this_machine(records: Records, pid: int, **more: Any) -> JobArray:
    submission_id = records.request(partition="local")
    batch = records.prepare(partition="local")
    records.intend(batch, submission_id)
    records.accept(batch, str(pid), **more)
    return batch


def ended(sleeper: subprocess.Popen[bytes]) -> None:
    sleeper.kill()
    sleeper.wait()


def test_a_local_job_whose_process_lives_runs(records: Records, sleeper: subprocess.Popen[bytes]) -> None:
    batch = on_this_machine(records, sleeper.pid)
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.detail) == ("pending", "the worker has not started yet")
    records.heartbeat(batch, records.attempt(batch, slurm_id=None), "loading")
    assert looked_at(records.workspace)[1][0].detail.startswith("loading")


def test_a_local_job_that_waits_for_another_is_pending(records: Records, sleeper: subprocess.Popen[bytes]) -> None:
    batch = on_this_machine(records, sleeper.pid)
    records.heartbeat(batch, records.attempt(batch, slurm_id=None), "waiting for another local job")
    assert state_of(records.workspace) == "pending"


def test_a_local_job_whose_process_is_dead_without_a_record_failed(
    records: Records, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The half minute in which a record may still come is shortened to nothing."""
    on_this_machine(records, sleeper.pid)
    assert state_of(records.workspace) == "pending"
    ended(sleeper)
    monkeypatch.setattr(job_status, "RECORD_MAY_BE_LATE_S", 0.0)
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.detail) == ("failed", "worker ended without a record; its log is empty")
    assert "labctl retry" in run.remedy


def test_a_record_that_cannot_be_read_is_told_and_not_taken_for_one_that_is_missing(
    records: Records, sleeper: subprocess.Popen[bytes]
) -> None:
    batch = on_this_machine(records, sleeper.pid)
    attempt = records.attempt(batch, slurm_id=None)
    record = records.done(batch, attempt)
    record.write_bytes(record.read_bytes()[:200])
    ended(sleeper)
    states = batch.folder / "states.json"
    looked_at(records.workspace)
    edit_json(states, **{f"{batch.array_id}.0": {"state": "COMPLETED", "ended_at": ago(60), "observed_at": ago(60)}})
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.detail) == ("failed", f"damaged record: {record}")
    assert run.remedy == "resubmit with labctl retry"


def test_a_job_file_with_options_of_null_spoils_no_status(records: Records) -> None:
    batch = records.submit()
    edit_json(batch.spec(0), engine_options=None)
    (run,) = looked_at(records.workspace)[1]
    assert run.engine_options == {}


def test_a_local_job_that_is_dead_for_long_failed(records: Records, sleeper: subprocess.Popen[bytes]) -> None:
    batch = on_this_machine(records, sleeper.pid)
    ended(sleeper)
    assert state_of(records.workspace) in {"running", "failed"}  # its record may be late
    states = batch.folder / "states.json"
    edit_json(states, **{f"{batch.array_id}.0": {"state": "COMPLETED", "ended_at": ago(60), "observed_at": ago(60)}})
    assert state_of(records.workspace) == "failed"


def test_a_local_job_that_is_dead_with_its_record_is_done(records: Records, sleeper: subprocess.Popen[bytes]) -> None:
    batch = on_this_machine(records, sleeper.pid)
    records.done(batch, records.attempt(batch, slurm_id=None))
    ended(sleeper)
    assert state_of(records.workspace) == "done"


def test_a_later_process_of_the_same_number_is_not_the_job(
    records: Records, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_status, "RECORD_MAY_BE_LATE_S", 0.0)
    on_this_machine(records, sleeper.pid, starts=["1"])  # the job began at another time than this process
    assert state_of(records.workspace) == "failed"


def test_a_process_of_another_machine_is_not_looked_for_here(records: Records) -> None:
    batch = on_this_machine(records, os.getpid(), host="another-machine", starts=["1"])
    edit_json(batch.folder / "intent.json", host="another-machine")
    assert state_of(records.workspace) == "unknown"


def test_a_process_is_alive_until_it_ends_a_zombie_is_not() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    start = processes.start_of(process.pid)
    assert processes.is_alive(os.getpid(), processes.start_of(os.getpid()))
    assert not processes.is_alive(os.getpid(), "1")
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has read its status
    assert not processes.is_alive(process.pid, start)
    process.wait()
    assert not processes.is_alive(process.pid, start)
    assert processes.start_of(process.pid) is None


# ---------------------------------------------------------------- which runs are meant


@pytest.fixture
def chosen(records: Records) -> Iterator[Callable[..., list[str]]]:
    """The runs that these words mean."""

    def choose(*names: str, everything: bool = False) -> list[str]:
        with opened(records.workspace) as store:
            return select_runs.chosen_runs(store, names, everything=everything)[1]

    yield choose


Chosen = Callable[..., list[str]]


def runs_of(batch: JobArray) -> list[str]:
    return [run.run_id for run in batch.runs]


def test_without_a_word_the_latest_request_is_meant(records: Records, chosen: Chosen) -> None:
    records.request(lengths=(8,), age_s=60)
    latest = records.submit(lengths=(16, 32))
    records.collect()
    assert chosen() == runs_of(latest)


def test_ids_names_slurm_ids_tasks_and_job_ids_choose_their_runs(records: Records, chosen: Chosen) -> None:
    one = records.submit("1000", name="first", lengths=(8,))
    array = records.submit("2000", name="second", lengths=(16, 32), dtypes=("float16", "float32"))
    records.submit("20001", name="third", lengths=(64,))  # an id that begins like the array's
    records.collect()
    assert chosen("first") == runs_of(one)
    assert chosen("20260101-000000-0002") == runs_of(array)
    assert chosen("1000") == runs_of(one)
    assert chosen("2000") == runs_of(array)
    assert chosen("2000_1") == [run.run_id for run in array.jobs[1].runs]
    assert chosen(f"{array.array_id}.0") == [run.run_id for run in array.jobs[0].runs]
    (run,) = runs_of(one)
    assert chosen(run) == chosen(run[:6]) == chosen(run.upper()) == [run]


def test_several_words_mean_all_of_theirs_and_no_run_twice(records: Records, chosen: Chosen) -> None:
    one = records.submit("1000", name="first", lengths=(8,))
    two = records.submit("2000", name="second", lengths=(8, 16))
    records.collect()
    assert chosen("second", "first") == runs_of(two)
    assert chosen("first", "second") == [*runs_of(one), *runs_of(two)[1:]]


def test_the_latest_request_of_a_name_is_meant(records: Records, chosen: Chosen) -> None:
    records.request(name="same", lengths=(8,), age_s=60)
    later = records.submit(name="same", lengths=(16,))
    records.collect()
    assert chosen("same") == runs_of(later)


def test_all_means_every_run_that_was_submitted(records: Records, chosen: Chosen) -> None:
    submitted = records.submit(lengths=(8, 16))
    by_hand = records.prepare(lengths=(32,))
    records.attempt(by_hand, slurm_id="5")
    records.prepare(lengths=(64,))  # rendered, and that was that
    records.collect()
    assert chosen(everything=True) == [*runs_of(submitted), *runs_of(by_hand)]


def test_the_beginning_of_several_ids_is_one_clear_error(records: Records, chosen: Chosen, labctl: Labctl) -> None:
    batch = records.submit(lengths=range(1, 40))
    records.collect()
    first = runs_of(batch)[0][0]
    assert sum(run.startswith(first) for run in runs_of(batch)) > 1
    error = refused(lambda: chosen(first), WrongUseError)
    assert f"ambiguous run id: {first!r}" in error.message
    ran = labctl("show", first)
    assert (ran.code, ran.out, ran.err.count("labctl: ")) == (2, "", 1)


def test_a_name_of_several_runs_is_one_clear_error_where_one_is_wanted(records: Records) -> None:
    batch = records.submit(name="several", lengths=(8, 16))
    records.collect()
    with opened(records.workspace) as store:
        error = refused(lambda: select_runs.one_run(store, "several"), WrongUseError)
    assert "selects 2 runs" in error.message
    assert runs_of(batch)[0] in error.message


@pytest.mark.parametrize("name", ["nonsense", "9999", "9999_1", "2000_9", "ffffffffffff", "'; --", "_", "first "])
def test_a_word_that_means_nothing_here_is_one_clear_error(records: Records, chosen: Chosen, name: str) -> None:
    records.submit("2000", name="first", lengths=(8,))
    records.collect()
    assert repr(name) in refused(lambda: chosen(name), WrongUseError).message


@pytest.mark.parametrize("name", ["%", "200_", "____"])
def test_a_word_is_no_pattern(records: Records, chosen: Chosen, name: str) -> None:
    records.submit("2000", dtypes=("float16", "float32"))
    records.collect()
    refused(lambda: chosen(name), WrongUseError)


def test_an_empty_word_means_nothing(records: Records, chosen: Chosen) -> None:
    """As in labctl show "$RUN", with RUN not set."""
    records.submit("2000")
    records.collect()
    refused(lambda: chosen(""), WrongUseError)


def test_a_workspace_without_runs_says_so(records: Records, chosen: Chosen) -> None:
    records.workspace.create()
    refused(chosen, WrongUseError)
    assert chosen(everything=True) == []


# ---------------------------------------------------------------- many runs


def test_many_runs_are_counted_and_the_first_failures_shown(labctl: Labctl, records: Records) -> None:
    batch = records.submit(lengths=range(1, 121))
    records.states(batch, state="COMPLETED", exit_code="0:0", ended_at=ago(3600))
    attempt = records.attempt(batch)
    for place, run in enumerate(batch.runs):
        (records.failed if place % 10 == 0 else records.done)(batch, attempt, run)
    ran = labctl("status")
    failed = runs_of(batch)[::10]
    assert "120 runs: 108 done, 12 failed" in ran.err
    assert [line.split() for line in ran.out.splitlines()[:3]] == [["state", "runs"], ["done", "108"], ["failed", "12"]]
    assert [run for run in runs_of(batch) if run in ran.out] == failed[:10]
    assert "... and 2 more failed; labctl status --every-run lists every run" in ran.err
    every = labctl("status", "--every-run").out
    assert all(run in every for run in runs_of(batch))
    assert len(labctl("status", "--json").json) == 120


def test_a_hundred_runs_have_a_line_each(labctl: Labctl, records: Records) -> None:
    batch = records.submit(lengths=range(1, 101))
    records.states(batch, state="PENDING")
    out = labctl("status").out
    assert all(run in out for run in runs_of(batch))


def test_runs_are_counted_as_each_of_them_is_told(records: Records, slurm: Slurm) -> None:
    """Measured, in some of its loads, given to another job, failed and then measured, waiting, never queued, imported."""
    ended = {"state": "COMPLETED", "exit_code": "0:0", "ended_at": ago(3600)}
    several = records.submit("1000", lengths=(8, 16), name="several")
    edit_json(several.spec(0), loads=2)
    records.states(several, **ended)
    attempt = records.attempt(several)
    records.done(several, attempt, several.runs[0])
    records.done(several, attempt.in_load(2), several.runs[0])
    records.done(several, attempt, several.runs[1])
    failed = records.submit("2000", lengths=(32,))
    records.states(failed, **ended)
    records.failed(failed, records.attempt(failed, slurm_id="2000"))
    again = records.submit("3000", lengths=(32,))
    records.states(again, **ended)
    records.done(again, records.attempt(again, slurm_id="3000"))
    lost = records.submit("4000", lengths=(64,))
    records.states(lost, **ended)
    instead = records.submit("5000", lengths=(64,))
    records.states(instead, **ended)
    records.done(instead, records.attempt(instead, slurm_id="5000"))
    given = {lost.jobs[0].job_id: {lost.runs[0].run_id: {"job": instead.jobs[0].job_id, "state": "failed"}}}
    write_json(lost.folder / "moved.json", given)
    waiting = records.submit("6000", lengths=(128,))
    slurm.shows(squeue_line("6000", "PENDING", job_name(waiting)))
    records.request(lengths=(256,))
    with opened(records.workspace) as store:
        refresh.refresh(records.workspace, store)
        run_ids = [run_id for (run_id,) in store.tuples("SELECT run_id FROM runs")]
        told = status.statuses(records.workspace, store, run_ids)
        counts, left = status.overview(records.workspace, store, run_ids)
    assert len(run_ids) == 6
    assert {run.state for run in told} >= {"done", "failed", "pending", "missing"}
    assert counts == Counter(run.state for run in told)
    assert left == [run for run in told if run.state != "done"]


# ---------------------------------------------------------------- what is looked at


def two_measured(records: Records) -> tuple[str, str]:
    """Two runs of two requests, with records that no labctl has read."""
    found = []
    for slurm_id, length in (("1000", 8), ("2000", 16)):
        batch = records.submit(slurm_id, lengths=(length,))
        records.states(batch, state="COMPLETED", exit_code="0:0", ended_at=ago(3600))
        records.done(batch, records.attempt(batch, slurm_id=slurm_id))
        found += runs_of(batch)
    return found[0], found[1]


def indexed(records: Records) -> set[str]:
    with opened(records.workspace) as store:
        return {run_id for (run_id,) in store.tuples("SELECT run_id FROM results")}


@pytest.mark.parametrize("command", [("show",), ("status",), ("matrix",)])
def test_a_command_about_one_run_reads_the_records_of_no_other(
    labctl: Labctl, records: Records, command: tuple[str, ...]
) -> None:
    one, other = two_measured(records)
    assert labctl(*command, one).code == 0
    assert indexed(records) == {one}
    labctl("collect")
    assert indexed(records) == {one, other}


def test_a_word_that_the_index_does_not_know_is_looked_for_in_all_files(labctl: Labctl, records: Records) -> None:
    """A script that was printed, then submitted by hand: its Slurm id comes with its first start."""
    records.submit(lengths=(8,))
    by_hand = records.prepare(lengths=(16,))
    records.collect()
    records.attempt(by_hand, slurm_id="77")
    assert runs_of(by_hand)[0] in labctl("status", "77").out


def test_waiting_for_a_run_sees_the_job_of_a_later_retry(records: Records, slurm: Slurm) -> None:
    """Of another labctl, whose batch this one has not read yet."""
    first = records.submit("1000")
    records.states(first, state="FAILED", exit_code="1:0", ended_at=ago(3600))
    records.failed(first, records.attempt(first))
    with opened(records.workspace) as store:
        refresh.refresh(records.workspace, store, runs_of(first))
        again = records.submit("2000")
        slurm.shows(squeue_line("2000", "PENDING", job_name(again)))
        refresh.refresh(records.workspace, store, runs_of(first))
        (run,) = status.statuses(records.workspace, store, runs_of(first))
    assert (run.state, run.slurm_id) == ("pending", "2000")


LARGE_TABLES = (
    "files",
    "folders",
    "results",
    "repeats",
    "samples",
    "devices",
    "texts",
    "runs",
    "job_runs",
    "submission_runs",
)


@pytest.mark.parametrize("command", [("show",), ("status",), ("matrix",), ("logs",)])
def test_one_run_is_found_by_index_in_every_large_table(
    labctl: Labctl, records: Records, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    one, _ = two_measured(records)
    records.collect()
    asked: list[tuple[str, tuple[Any, ...]]] = []
    execute = Store.tuples

    def noted(store: Store, sql: str, parameters: Iterable[Any] = ()) -> list[Any]:
        asked.append((sql, tuple(parameters)))
        return execute(store, sql, parameters)

    def noted_rows(store: Store, sql: str, parameters: Iterable[Any] = ()) -> list[Any]:
        asked.append((sql, tuple(parameters)))
        return rows(store, sql, parameters)

    rows = Store.rows
    monkeypatch.setattr(Store, "tuples", noted)
    monkeypatch.setattr(Store, "rows", noted_rows)
    assert labctl(*command, one).code == 0
    monkeypatch.undo()
    assert len(asked) > 5
    with opened(records.workspace) as store:
        plans = [(step[3], sql) for sql, given in asked for step in store.tuples(f"EXPLAIN QUERY PLAN {sql}", given)]
    scans = [(step, sql) for step, sql in plans if step.startswith("SCAN") and step.split()[1] in LARGE_TABLES]
    assert scans == []


# ---------------------------------------------------------------- waiting


def test_waiting_ends_when_every_run_has_ended(
    records: Records, slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = records.submit(lengths=(8, 16))
    attempt = records.attempt(batch)
    first, second = batch.runs
    records.done(batch, attempt, first)
    records.failed(batch, attempt, second)
    slurm.shows("", sacct_line("1000", "FAILED", job_name(batch), exit_code="1:0"))
    with opened(records.workspace) as store:
        assert wait.wait(records.workspace, store, runs_of(batch)) == {"done", "failed"}
    assert capsys.readouterr().err == "2 runs: 1 done, 1 failed\n"


def test_an_exit_code_that_the_accounting_tells_after_the_controller_is_taken_in(
    records: Records, slurm: Slurm
) -> None:
    batch = records.submit()
    name = f"labctl-{batch.array_id}"
    now = datetime.now().isoformat(timespec="seconds")
    slurm.shows(squeue_line("1000", "FAILED", name).replace("2026-01-01T11:00:00", now))
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.kind) == ("failed", "unknown")
    slurm.shows("", sacct_line("1000", "FAILED", name, exit_code="0:9", ended=now))
    (run,) = looked_at(records.workspace)[1]
    assert (run.state, run.kind) == ("failed", "killed")
