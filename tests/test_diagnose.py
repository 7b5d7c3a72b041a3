"""An end without a record: what happened, and what to do about it."""

from __future__ import annotations

import pytest

from labctl_slurm.diagnose import ENDS, explain
from labctl_slurm.partitions import KEYS
from labctl_slurm.queue import ENDED, JobState


@pytest.mark.parametrize("state", sorted(ENDED))
def test_every_end_that_slurm_knows_has_its_words_and_its_remedy(state: str) -> None:
    happened, remedy = explain(JobState("77", state, reason="by 1000", exit_code="1:0"))
    assert happened
    assert remedy
    assert "{" not in happened + remedy
    assert happened == happened.strip()


@pytest.mark.parametrize(
    ("state", "happened", "remedy"),
    [
        ("TIMEOUT", "time limit", "time"),
        ("OUT_OF_MEMORY", "memory ran out", "mem"),
        ("NODE_FAIL", "node failed", "again"),
        ("PREEMPTED", "preempted", "again"),
        ("BOOT_FAIL", "did not boot", "again"),
        ("DEADLINE", "deadline", "without"),
    ],
)
def test_a_known_end_is_told_in_words(state: str, happened: str, remedy: str) -> None:
    told = explain(JobState("77", state, exit_code="0:0"))
    assert happened in told[0]
    assert remedy in told[1]


def test_the_memory_that_ran_out_is_not_mistaken_for_the_gpus() -> None:
    assert "not the GPU" in explain(JobState("77", "OUT_OF_MEMORY"))[0]


def test_a_setting_that_a_remedy_names_is_one() -> None:
    for state in ("TIMEOUT", "OUT_OF_MEMORY"):
        setting = ENDS[state][1].removeprefix("raise ").split()[0]
        assert setting in KEYS


def test_a_cancelled_job_is_told_by_whom_where_slurm_says_it() -> None:
    assert explain(JobState("77", "CANCELLED", reason="by 1000"))[0] == "the job was cancelled by 1000"
    assert explain(JobState("77", "CANCELLED"))[0] == "the job was cancelled"


@pytest.mark.parametrize("reason", ["Resources", "Priority", "JobHeldUser"])
def test_a_cancelled_job_is_not_told_by_what_it_had_waited_for(reason: str) -> None:
    assert reason not in explain(JobState("77", "CANCELLED", reason=reason))[0]


def test_a_reason_with_braces_is_told_as_it_is() -> None:
    assert explain(JobState("77", "CANCELLED", reason="by {name}"))[0] == "the job was cancelled by {name}"


@pytest.mark.parametrize("state", ["FAILED", "COMPLETED", "REVOKED"])
def test_any_other_end_is_told_with_its_exit_code_and_where_to_look(state: str) -> None:
    happened, remedy = explain(JobState("77", state, exit_code="1:0"))
    assert happened == f"the job ended ({state}, exit code 1:0) and left no record"
    assert "labctl logs" in remedy
    assert explain(JobState("77", state))[0] == f"the job ended ({state}) and left no record"
