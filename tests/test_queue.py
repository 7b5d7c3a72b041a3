"""The state of many jobs: Slurm's own output read as it is written, one call of each command, and nothing from silence."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labctl_slurm import queue
from labctl_slurm.queue import JobState, QueueAnswer, _read_sacct, _read_squeue, _sacct_calls, expanded, utc


@pytest.fixture(autouse=True)
def two_hours_east(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cluster's clock is two hours ahead of UTC: Slurm writes local times."""
    monkeypatch.setenv("TZ", "XXX-2")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def by_id(states: Iterator[JobState]) -> dict[str, JobState]:
    """The last state of each id, as query keeps it."""
    return {state.slurm_id: state for state in states}


# ---------------------------------------------------------------- squeue's output
#
# %i|%T|%N|%V|%S|%e|%j|%r, with --array --states=all

SQUEUE = """\
1763|RUNNING|dgxh-1|2026-11-22T23:41:07|2026-11-22T23:41:08|2026-11-23T00:41:08|labctl-3f2a91c0-1|None
1764|PENDING||2026-11-22T23:41:09|2026-11-23T00:41:08|2026-11-23T01:41:08|labctl-77aa01bc-1|Resources
1765_1|RUNNING|dgx2-1|2026-11-22T23:41:10|2026-11-22T23:41:11|2026-11-23T00:41:11|labctl-9e8d7c6b-1|None
1765_2|PENDING||2026-11-22T23:41:10|N/A|N/A|labctl-9e8d7c6b-1|Priority
1765_3|PENDING||2026-11-22T23:41:10|N/A|N/A|labctl-9e8d7c6b-1|JobArrayTaskLimit
1766|PENDING||2026-11-22T23:41:12|N/A|N/A|labctl-00000000-1|PartitionTimeLimit
1767|COMPLETING|dgxh-2|2026-11-22T23:40:00|2026-11-22T23:40:01|2026-11-22T23:41:12|labctl-11111111-1|None
1768|COMPLETED|dgxh-2|2026-11-22T23:38:00|2026-11-22T23:38:01|2026-11-22T23:39:12|labctl-22222222-1|None
1769|CANCELLED||2026-11-22T23:38:00|2026-11-22T23:39:00|2026-11-22T23:39:00|labctl-33333333-1|None
1770|FAILED|dgx2-2|2026-11-22T23:38:00|2026-11-22T23:38:01|2026-11-22T23:38:05|labctl-44444444-1|NonZeroExitCode
1771|CONFIGURING|dgxh-1|2026-11-22T23:41:13|2026-11-22T23:41:13|2026-11-23T00:41:13|labctl-55555555-1|None
1772|REQUEUE_HOLD||2026-11-22T23:41:14|N/A|N/A|labctl-66666666-1|job requeued in held state
1773|PENDING||2026-11-22T23:41:15|N/A|N/A|train my model|Nodes are DOWN, DRAINED or reserved | see status page | now
"""


@pytest.fixture
def shown() -> dict[str, JobState]:
    return by_id(_read_squeue(SQUEUE))


def test_every_line_of_squeue_is_a_job(shown: dict[str, JobState]) -> None:
    assert len(shown) == len(SQUEUE.splitlines())


def test_a_running_job_has_its_node_and_its_times_in_utc(shown: dict[str, JobState]) -> None:
    assert shown["1763"] == JobState(
        "1763",
        "RUNNING",
        name="labctl-3f2a91c0-1",
        node="dgxh-1",
        queued_at="2026-11-22T21:41:07Z",
        started_at="2026-11-22T21:41:08Z",
    )


def test_a_waiting_job_has_its_reason_and_no_start_though_slurm_expects_one(shown: dict[str, JobState]) -> None:
    job = shown["1764"]
    assert (job.state, job.reason, job.node, job.started_at, job.ended_at) == ("PENDING", "Resources", "", None, None)
    assert (shown["1772"].started_at, shown["1772"].reason) == (None, "job requeued in held state")


def test_every_task_of_an_array_has_its_own_line(shown: dict[str, JobState]) -> None:
    assert [shown[f"1765_{task}"].state for task in (1, 2, 3)] == ["RUNNING", "PENDING", "PENDING"]
    assert shown["1765_3"].reason == "JobArrayTaskLimit"


def test_an_expected_end_is_no_end(shown: dict[str, JobState]) -> None:
    assert shown["1763"].ended_at is None
    assert shown["1767"].ended_at is None
    assert shown["1768"].ended_at is not None


def test_a_reason_may_hold_the_sign_between_the_fields(shown: dict[str, JobState]) -> None:
    assert shown["1773"].reason.endswith("DRAINED or reserved | see status page | now")
    assert shown["1773"].name == "train my model"


def test_squeue_says_none_for_no_reason(shown: dict[str, JobState]) -> None:
    assert shown["1763"].reason == ""


@pytest.mark.parametrize("output", ["", "\n", "slurm_load_jobs error: Unable to contact\n", "1|RUNNING|node\n"])
def test_lines_that_are_no_jobs_are_passed_over(output: str) -> None:
    assert list(_read_squeue(output)) == []
    assert list(_read_sacct(output)) == []


# ---------------------------------------------------------------- sacct's output
#
# JobID|State|ExitCode|Submit|Start|End|NodeList|JobName, with --parsable2 --allocations --duplicates

SACCT = """\
4_[1-3,7%2]|PENDING|0:0|2026-11-22T23:41:07|Unknown|Unknown|None assigned|labctl-a-1
4_0|RUNNING|0:0|2026-11-22T23:41:07|2026-11-22T23:41:08|Unknown|dgxh-1|labctl-a-1
5|COMPLETED|0:0|2026-11-22T23:30:00|2026-11-22T23:30:01|2026-11-22T23:35:00|dgxh-1|labctl-b-1
6|FAILED|1:0|2026-11-22T23:30:00|2026-11-22T23:30:01|2026-11-22T23:30:09|dgx2-1|labctl-c-1
7|CANCELLED by 1000|0:0|2026-11-22T23:30:00|None|2026-11-22T23:31:00|None assigned|labctl-d-1
8|CANCELLED by 0|0:15|2026-11-22T23:30:00|2026-11-22T23:30:01|2026-11-22T23:31:00|dgx2-1|labctl-e-1
9|TIMEOUT|0:0|2026-11-22T20:30:00|2026-11-22T20:30:01|2026-11-22T21:30:21|dgx2-1|labctl-f-1
10|OUT_OF_MEMORY|0:125|2026-11-22T20:30:00|2026-11-22T20:30:01|2026-11-22T20:31:00|dgx2-1|labctl-g-1
11|NODE_FAIL|0:0|2026-11-22T23:20:00|2026-11-22T23:20:01|2026-11-22T23:21:00|dgx2-1|labctl-h-1
11|REQUEUED|0:0|2026-11-22T23:21:00|2026-11-22T23:21:30|2026-11-22T23:22:00|dgx2-2|labctl-h-1
11|COMPLETED|0:0|2026-11-22T23:22:00|2026-11-22T23:22:30|2026-11-22T23:29:00|dgx2-2|labctl-h-1
12|FAILED|1:0|2025-01-02T10:00:00|2025-01-02T10:00:01|2025-01-02T10:01:00|dgx2-1|somebody|else
"""


@pytest.fixture
def accounted() -> dict[str, JobState]:
    return by_id(_read_sacct(SACCT))


def test_a_waiting_array_is_told_task_by_task(accounted: dict[str, JobState]) -> None:
    tasks = ["4_1", "4_2", "4_3", "4_7"]
    assert {accounted[task].state for task in tasks} == {"PENDING"}
    assert accounted["4_7"] == JobState(
        "4_7", "PENDING", name="labctl-a-1", queued_at="2026-11-22T21:41:07Z", exit_code="0:0"
    )
    assert accounted["4_0"].state == "RUNNING"
    assert "4_[1-3,7%2]" not in accounted


def test_an_unknown_time_is_no_time(accounted: dict[str, JobState]) -> None:
    assert (accounted["4_0"].started_at, accounted["4_0"].ended_at) == ("2026-11-22T21:41:08Z", None)
    assert accounted["7"].started_at is None


def test_a_cancelled_job_says_by_whom(accounted: dict[str, JobState]) -> None:
    assert (accounted["7"].state, accounted["7"].reason) == ("CANCELLED", "by 1000")
    assert (accounted["8"].state, accounted["8"].reason, accounted["8"].exit_code) == ("CANCELLED", "by 0", "0:15")


def test_an_exit_code_is_slurms_own(accounted: dict[str, JobState]) -> None:
    assert [accounted[job].exit_code for job in ("5", "6", "10")] == ["0:0", "1:0", "0:125"]


def test_a_requeued_job_is_in_its_latest_state(accounted: dict[str, JobState]) -> None:
    assert (accounted["11"].state, accounted["11"].node) == ("COMPLETED", "dgx2-2")
    assert accounted["11"].ended_at == "2026-11-22T21:29:00Z"


def test_the_latest_state_does_not_depend_on_the_order_of_the_rows() -> None:
    rows = SACCT.splitlines()
    for turned in (rows[::-1], rows[5:] + rows[:5], sorted(rows)):
        assert by_id(_read_sacct("\n".join(turned)))["11"].state == "COMPLETED"


def test_a_requeued_job_that_waits_again_is_not_called_failed() -> None:
    output = (
        "11|PENDING|0:0|2026-11-22T23:21:00|Unknown|Unknown|None assigned|labctl-h-1\n"
        "11|NODE_FAIL|0:0|2026-11-22T23:20:00|2026-11-22T23:20:01|2026-11-22T23:21:00|dgx2-1|labctl-h-1\n"
    )
    assert by_id(_read_sacct(output))["11"].state == "PENDING"
    same_time = output.replace("23:20:00", "23:21:00")  # one submission, two starts
    assert by_id(_read_sacct(same_time))["11"].state == "PENDING"


def test_a_name_may_hold_the_sign_between_the_fields(accounted: dict[str, JobState]) -> None:
    assert accounted["12"].name == "somebody|else"


def test_sacct_is_asked_for_jobs_and_not_for_their_steps() -> None:
    (call,) = _sacct_calls("--jobs", ["7", "12", "100"])
    assert "--allocations" in call
    assert "--duplicates" in call
    assert "--jobs=7,12,100" in call


def test_many_jobs_are_asked_in_calls_that_a_command_line_can_hold() -> None:
    asked = [str(10**9 + job) for job in range(20_000)]
    calls = list(_sacct_calls("--jobs", asked))
    assert len(calls) == 3
    assert max(len(word) for call in calls for word in call) < 128 * 1024  # Linux's limit of one argument
    assert [job for call in calls for job in call[-1].removeprefix("--jobs=").split(",")] == asked


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize(
    ("job", "tasks"),
    [
        ("4", ["4"]),
        ("4_1", ["4_1"]),
        ("4_[1]", ["4_1"]),
        ("4_[1-3]", ["4_1", "4_2", "4_3"]),
        ("4_[1-3,7%2]", ["4_1", "4_2", "4_3", "4_7"]),
        ("4_[1,5]", ["4_1", "4_5"]),
        ("4_[0-6:2]", ["4_0", "4_2", "4_4", "4_6"]),
        ("4_[0-5:2%1]", ["4_0", "4_2", "4_4"]),
        ("4_[0-4:4,9,11-12%3]", ["4_0", "4_4", "4_9", "4_11", "4_12"]),
        ("4+1", ["4+1"]),
        ("4_[1,3,5,...]", ["4_[1,3,5,...]"]),
        ("4.batch", ["4.batch"]),
        ("", [""]),
    ],
)
def test_an_id_of_slurm_is_expanded_to_its_tasks(job: str, tasks: list[str]) -> None:
    assert expanded(job) == tasks


@settings(max_examples=60, deadline=None)
@given(tasks=st.sets(st.integers(0, 300), min_size=1, max_size=40), limit=st.none() | st.integers(1, 99))
def test_any_set_of_tasks_comes_back_from_slurms_way_to_write_it(tasks: set[int], limit: int | None) -> None:
    parts: list[list[int]] = []
    for task in sorted(tasks):
        if parts and parts[-1][-1] == task - 1:
            parts[-1].append(task)
        else:
            parts.append([task])
    written = ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    form = f"1234_[{written}{'' if limit is None else f'%{limit}'}]"
    assert expanded(form) == [f"1234_{task}" for task in sorted(tasks)]


# ---------------------------------------------------------------- times


@pytest.mark.parametrize("time", ["Unknown", "N/A", "None", "", "tomorrow", "2026-13-01T00:00:00"])
def test_what_is_no_time_is_none(time: str) -> None:
    assert utc(time) is None


def test_a_local_time_becomes_utc_at_the_offset_of_its_own_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    assert utc("2026-01-15T12:00:00") == "2026-01-15T11:00:00Z"
    assert utc("2026-07-15T12:00:00") == "2026-07-15T10:00:00Z"


# ---------------------------------------------------------------- asking


class FakeSlurm:
    """Fake squeue and sacct on PATH, nothing else of Slurm's: they log each call and do what a test says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "calls"
        self.does("squeue", "")
        self.does("sacct", "")

    def does(self, program: str, shell: str) -> None:
        path = self.folder / program
        path.write_text(
            f'#!/bin/sh\necho "{program} $*" >> {self.log}\n/usr/bin/env > {self.folder}/{program}.env\n{shell}\n',
            encoding="utf-8",
        )
        path.chmod(0o755)

    def prints(self, program: str, output: str) -> None:
        (self.folder / f"{program}.out").write_text(output, encoding="utf-8")
        self.does(program, f"/bin/cat {self.folder}/{program}.out")

    @property
    def calls(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []

    def environment(self, program: str) -> dict[str, str]:
        lines = (self.folder / f"{program}.env").read_text(encoding="utf-8").splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def slurm_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    (tmp_path / "programs").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    return FakeSlurm(tmp_path / "programs")


# The jobs of SQUEUE and SACCT by id, with the names that they have there.
NAMES = {
    **{state.slurm_id: state.name for state in _read_sacct(SACCT)},
    **{state.slurm_id: state.name for state in _read_squeue(SQUEUE)},
}


def asked(slurm_ids: Iterable[str]) -> QueueAnswer:
    return queue.query((job, NAMES.get(job, "labctl-x-1")) for job in slurm_ids)


def states(answer: QueueAnswer) -> dict[str, str]:
    return {job: state.state for (job, _), state in answer.jobs.items()}


def test_no_jobs_are_no_question(slurm_on_path: FakeSlurm) -> None:
    assert asked([]) == QueueAnswer()
    assert slurm_on_path.calls == []


def test_a_thousand_jobs_are_one_squeue_and_one_sacct(slurm_on_path: FakeSlurm) -> None:
    wanted = [f"20_{task}" for task in range(1000)] + [str(job) for job in range(5000, 5500)]
    assert asked(wanted).jobs == {}
    assert [call.split()[0] for call in slurm_on_path.calls] == ["squeue", "sacct"]


def test_squeue_is_asked_for_the_users_own_jobs_of_every_state_and_task(slurm_on_path: FakeSlurm) -> None:
    asked(["5"])
    words = slurm_on_path.calls[0].split()
    assert {"--noheader", "--array", "--states=all", f"--user={os.getuid()}"} <= set(words)
    assert not any(word.startswith(("--jobs", "-j")) for word in words)  # an id that Slurm forgot is an error to squeue


def test_sacct_is_not_asked_where_squeue_knows_every_job(slurm_on_path: FakeSlurm) -> None:
    slurm_on_path.prints("squeue", SQUEUE)
    assert states(asked(["1763", "1764", "1768"])) == {
        "1763": "RUNNING",
        "1764": "PENDING",
        "1768": "COMPLETED",
    }
    assert len(slurm_on_path.calls) == 1


def test_sacct_is_asked_for_those_that_squeue_no_longer_shows(slurm_on_path: FakeSlurm) -> None:
    slurm_on_path.prints("squeue", SQUEUE)
    slurm_on_path.prints("sacct", SACCT)
    assert states(asked(["1763", "5", "4_3"])) == {"1763": "RUNNING", "5": "COMPLETED"}
    assert slurm_on_path.calls[1].endswith("--jobs=4,5")


def test_sacct_says_how_a_job_ended_that_squeue_still_shows(slurm_on_path: FakeSlurm) -> None:
    slurm_on_path.prints("squeue", SQUEUE)
    slurm_on_path.prints(
        "sacct", f"1770|FAILED|2:0|2026-11-22T23:38:00|2026-11-22T23:38:01|2026-11-22T23:38:05|dgx2-2|{NAMES['1770']}\n"
    )
    assert asked(["1770"]).jobs["1770", NAMES["1770"]].exit_code == "2:0"


@pytest.mark.parametrize("late", ["RUNNING", "PENDING"])
def test_an_accounting_that_lags_behind_does_not_bring_an_ended_job_back(slurm_on_path: FakeSlurm, late: str) -> None:
    slurm_on_path.prints("squeue", SQUEUE)
    slurm_on_path.prints(
        "sacct", f"1770|{late}|0:0|2026-11-22T23:38:00|2026-11-22T23:38:01|Unknown|dgx2-2|{NAMES['1770']}\n"
    )
    assert states(asked(["1770"])) == {"1770": "FAILED"}


def test_the_accounting_tells_how_long_earlier_starts_held_their_nodes(slurm_on_path: FakeSlurm) -> None:
    """11 was lost with its node after 59 s, requeued after 30 s more, and then ran to its end."""
    slurm_on_path.prints("sacct", SACCT)
    answer = asked(["5", "11"])
    assert answer.jobs["11", "labctl-h-1"].held_before_s == 89.0
    assert answer.jobs["5", "labctl-b-1"].held_before_s == 0.0


def test_of_an_earlier_start_without_an_end_it_is_not_known_how_long_it_held_its_node(slurm_on_path: FakeSlurm) -> None:
    slurm_on_path.prints("sacct", SACCT.replace("2026-11-22T23:22:00|dgx2-2", "Unknown|dgx2-2"))
    assert asked(["11"]).jobs["11", "labctl-h-1"].held_before_s is None


def test_an_earlier_wait_that_was_no_start_held_nothing(slurm_on_path: FakeSlurm) -> None:
    slurm_on_path.prints("sacct", SACCT.replace("23:21:30|2026-11-22T23:22:00", "XX|2026-11-22T23:22:00"))
    assert asked(["11"]).jobs["11", "labctl-h-1"].held_before_s == 59.0


def test_a_completed_job_is_asked_from_the_accounting_only_where_it_was_started_again(slurm_on_path: FakeSlurm) -> None:
    slurm_on_path.prints("squeue", SQUEUE)
    times = "2026-11-22T23:38:00|2026-11-22T23:38:01"
    slurm_on_path.prints(
        "sacct",
        f"1768|PREEMPTED|0:0|2026-11-22T23:30:00|2026-11-22T23:30:00|2026-11-22T23:31:40|dgxh-1|{NAMES['1768']}\n"
        f"1768|COMPLETED|0:0|{times}|2026-11-22T23:39:12|dgxh-2|{NAMES['1768']}\n",
    )
    job = ("1768", NAMES["1768"])
    assert queue.query([job]).jobs[job].held_before_s is None
    assert [call.split()[0] for call in slurm_on_path.calls] == ["squeue"]
    told = queue.query([job], restarted={job}).jobs[job]
    assert (told.state, told.node, told.held_before_s, told.exit_code) == ("COMPLETED", "dgxh-2", 100.0, "0:0")
    assert [call.split()[0] for call in slurm_on_path.calls] == ["squeue", "squeue", "sacct"]


def test_a_running_job_that_was_started_again_is_not_asked_from_the_accounting(slurm_on_path: FakeSlurm) -> None:
    slurm_on_path.prints("squeue", SQUEUE)
    job = ("1763", NAMES["1763"])
    assert queue.query([job], restarted={job}).jobs[job].state == "RUNNING"
    assert len(slurm_on_path.calls) == 1


def test_jobs_of_others_are_left_out(slurm_on_path: FakeSlurm) -> None:
    slurm_on_path.prints("squeue", SQUEUE)
    slurm_on_path.prints("sacct", SACCT)
    assert set(states(asked(["1763", "5"]))) == {"1763", "5"}


def test_a_job_that_neither_shows_is_gone_and_nothing_is_wrong(slurm_on_path: FakeSlurm) -> None:
    slurm_on_path.prints("squeue", SQUEUE)
    slurm_on_path.prints("sacct", SACCT)
    answer = asked(["99"])
    assert (answer.jobs, answer.problems, answer.gone) == ({}, [], {("99", "labctl-x-1")})


def test_tasks_that_were_cancelled_before_they_began_are_one_row_with_the_arrays_id(slurm_on_path: FakeSlurm) -> None:
    """As Slurm 22.05 told them: squeue --array and sacct alike."""
    queued = "2765_1|RUNNING|dgx2-1|2026-11-22T23:41:10|2026-11-22T23:41:11|N/A|labctl-x-1|None\n"
    times = "2026-11-22T23:41:10|2026-11-22T23:42:00|2026-11-22T23:42:00"
    slurm_on_path.prints("squeue", f"{queued}2765|CANCELLED||{times}|labctl-x-1|BeginTime\n")
    slurm_on_path.prints("sacct", f"2765|CANCELLED by 0|0:0|{times}|None assigned|labctl-x-1\n")
    answer = asked(["2765_0", "2765_1", "2765_2"])
    assert states(answer) == {"2765_0": "CANCELLED", "2765_1": "RUNNING", "2765_2": "CANCELLED"}
    assert answer.jobs["2765_2", "labctl-x-1"].reason == "by 0"


def test_a_job_that_waits_by_the_accounting_alone_is_gone(slurm_on_path: FakeSlurm) -> None:
    """The controller lost it (4_3 waits in SACCT), and will never tell the accounting that it ended."""
    slurm_on_path.prints("sacct", SACCT)
    answer = asked(["4_3"])
    assert (answer.jobs, answer.gone) == ({}, {("4_3", NAMES["4_3"])})


def test_a_job_of_another_name_under_the_same_id_is_another_job(slurm_on_path: FakeSlurm) -> None:
    """A controller that lost its state counts from an earlier number again."""
    slurm_on_path.prints("squeue", SQUEUE)
    slurm_on_path.prints("sacct", SACCT)
    ours = [("1763", "labctl-before-1"), ("5", "labctl-before-1"), ("1764", NAMES["1764"])]
    answer = queue.query(ours)
    assert states(answer) == {"1764": "PENDING"}
    assert answer.gone == set(ours[:2])


def test_the_ids_behind_a_name_are_found_in_the_queue_or_in_the_accounting(slurm_on_path: FakeSlurm) -> None:
    slurm_on_path.prints("squeue", SQUEUE)
    slurm_on_path.prints("sacct", SACCT)
    answer = queue.query([], [NAMES["1765_1"], NAMES["5"], "labctl-never-1"])
    assert answer.named == {NAMES["1765_1"]: ["1765_1", "1765_2", "1765_3"], NAMES["5"]: ["5"]}
    assert answer.nowhere == {"labctl-never-1"}
    assert "--starttime=now-30days" in slurm_on_path.calls[1]


def test_a_name_is_nowhere_only_where_both_have_answered(slurm_on_path: FakeSlurm) -> None:
    slurm_on_path.does("sacct", "exit 1")
    assert queue.query([], ["labctl-never-1"]).nowhere == set()
    slurm_on_path.does("squeue", "exit 1")
    slurm_on_path.prints("sacct", SACCT)
    assert queue.query([], ["labctl-never-1"]).nowhere == set()


def test_all_that_the_controller_has_is_told_where_slurm_is_only_to_be_looked_at(slurm_on_path: FakeSlurm) -> None:
    slurm_on_path.prints("squeue", SQUEUE)
    answer = queue.query([], look=True)
    assert answer.shown["1763", NAMES["1763"]].state == "RUNNING"
    assert answer.shown["1768", NAMES["1768"]].state == "COMPLETED"
    assert len(slurm_on_path.calls) == 1


def test_a_site_without_accounting_is_no_problem(slurm_on_path: FakeSlurm) -> None:
    slurm_on_path.prints("squeue", SQUEUE)
    slurm_on_path.does("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    answer = asked(["1770", "99"])
    assert (states(answer), answer.problems) == ({"1770": "FAILED"}, [])
    assert answer.gone == {("99", "labctl-x-1")}


def test_a_sites_own_formats_are_put_aside_and_its_cluster_is_kept(
    slurm_on_path: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"SLURM_TIME_FORMAT": "relative", "SQUEUE_FORMAT": "%i", "SQUEUE_STATES": "R", "SACCT_FORMAT": "jobid"}
    for variable, value in {**own, "SLURM_CONF": "/etc/slurm/other.conf", "LC_ALL": "de_DE.UTF-8"}.items():
        monkeypatch.setenv(variable, value)
    asked(["5"])
    for program in ("squeue", "sacct"):
        environment = slurm_on_path.environment(program)
        assert environment["SLURM_TIME_FORMAT"] == "standard"
        assert environment["SLURM_CONF"] == "/etc/slurm/other.conf"
        assert environment["LC_ALL"] == "C"
        assert not [variable for variable in environment if variable.startswith(("SQUEUE_", "SACCT_"))]
    assert os.environ["SQUEUE_FORMAT"] == "%i"


def test_slurm_is_asked_to_write_all_tasks_of_an_array(slurm_on_path: FakeSlurm) -> None:
    asked(["5"])
    for program in ("squeue", "sacct"):
        assert slurm_on_path.environment(program).get("SLURM_BITSTR_LEN") == "0"


def test_output_that_is_not_utf_8_is_read_all_the_same(slurm_on_path: FakeSlurm) -> None:
    slurm_on_path.does("squeue", r"printf '5|RUNNING|dgxh-1|N/A|N/A|N/A|gr\366\337e|None\n'")
    assert states(queue.query([("5", "gr\ufffd\ufffde")])) == {"5": "RUNNING"}


# ---------------------------------------------------------------- when Slurm does not answer (faults are injected)

UNREACHABLE = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"


def test_an_end_that_the_accounting_tells_alone_is_not_believed_while_the_controller_is_silent(
    slurm_on_path: FakeSlurm,
) -> None:
    """For some seconds after Slurm requeued a job of a dead node, sacct tells NODE_FAIL: only the controller knows better."""
    slurm_on_path.does("squeue", UNREACHABLE)
    slurm_on_path.prints("sacct", SACCT)
    answer = asked(["5", "99"])
    assert (answer.jobs, answer.gone) == ({}, set())
    assert answer.problems == [
        "squeue failed: slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    ]


def test_a_sacct_that_fails_is_told_and_no_job_becomes_failed(slurm_on_path: FakeSlurm) -> None:
    slurm_on_path.prints("squeue", SQUEUE)
    slurm_on_path.does("sacct", "echo 'sacct: error: Problem talking to the database' >&2; exit 1")
    answer = asked(["1763", "99"])
    assert states(answer) == {"1763": "RUNNING"}
    assert answer.problems == ["sacct failed: Problem talking to the database"]


def test_a_command_that_hangs_is_told_and_given_up(slurm_on_path: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "ANSWER_WITHIN_S", 1.3)
    slurm_on_path.does("squeue", "exec /bin/sleep 60")
    started = time.monotonic()
    answer = asked(["5"])
    assert time.monotonic() - started < 10
    assert answer.problems == ["squeue did not answer within 0.5 s"]
    assert answer.jobs == {}


def test_what_a_failing_command_printed_before_is_not_believed(slurm_on_path: FakeSlurm) -> None:
    slurm_on_path.does("squeue", f"echo '5|FAILED|dgxh-1|N/A|N/A|N/A|labctl-b-1|None'; {UNREACHABLE}")
    assert asked(["5"]).jobs == {}


def test_a_command_that_fails_without_a_word_tells_its_exit_status(slurm_on_path: FakeSlurm) -> None:
    slurm_on_path.does("squeue", "exit 7")
    assert asked(["5"]).problems == ["squeue failed: exit code 7"]


def test_what_slurm_says_on_several_lines_is_one_problem_on_one_line(slurm_on_path: FakeSlurm) -> None:
    slurm_on_path.does("squeue", "printf 'first\\n\\n  second\\n' >&2; exit 1")
    assert asked(["5"]).problems == ["squeue failed: first second"]


def test_a_machine_without_slurm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert asked(["5"]).problems == ["command not found on this machine: squeue"]


@pytest.mark.parametrize("fault", ["not executable", "not a program"])
def test_a_command_that_cannot_be_started_is_told(slurm_on_path: FakeSlurm, fault: str) -> None:
    program = slurm_on_path.folder / "squeue"
    program.write_bytes(b"\x00\x01\x02")
    program.chmod(0o755 if fault == "not a program" else 0o644)
    answer = asked(["5"])
    assert answer.jobs == {}
    assert answer.problems[0].startswith("squeue")
