"""Why a job did not bring its result: what is made of Slurm's words, exit codes and logs. tests/slurm/test_diagnosis.py makes
what can be made happen on a real cluster; what cannot is here, in the words that real programs were seen to use."""

from __future__ import annotations

import os
import pwd
import re
import string
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labctl_orchestrator.cli import COMMANDS, labctl
from labctl_slurm import diagnose
from labctl_slurm.diagnose import LONGEST_DETAIL, ORDINARY_WAITS, UNKNOWN, Entry, table
from labctl_slurm.partitions import KEYS
from labctl_slurm.queue import ENDED, HELD_AFTER_A_FAILED_START, JobState
from labctl_workers.engines import engine_class

LONGEST_REMEDY = 125
RECORDED: list[dict[str, str]] = tomllib.loads(
    (Path(__file__).parent / "recorded_messages.toml").read_text(encoding="utf-8")
)["messages"]
ABOUT = {
    "partition": "dgx2", "model": "org/model", "backend": "vllm", "dtype": "float16", "gpus": 2, "batch_size": 8,
    "max_new_tokens": 128, "slurm_id": "4711",
}  # fmt: skip


@pytest.mark.parametrize("message", RECORDED, ids=[f"{m['kind']}: {m['source']}" for m in RECORDED])
def test_a_message_that_was_really_seen_gets_its_reason_and_its_remedy(message: dict[str, str]) -> None:
    log = f"INFO loading\n{message['text']}\nsrun: error: dgx2-1: task 0: Exited with exit code 1\n"
    told = diagnose.of_end(JobState("77", "FAILED", exit_code="1:0"), ["", log], ABOUT)
    assert told.kind == message["kind"]
    assert message["happened"] in told.happened
    assert message["remedy"] in told.remedy
    assert not re.search(r"\{\w+\}", told.happened + told.remedy)


def test_a_failed_job_whose_exit_code_slurm_has_lost_is_told_without_one() -> None:
    told = diagnose.of_end(JobState("77", "FAILED", exit_code="0:0"))
    assert (told.kind, told.happened) == (UNKNOWN, "job ended without a record (FAILED); its log is empty")


# ---------------------------------------------------------------- the table


def entries() -> list[Any]:
    of = table()
    groups = {"signs": of.signs, "ends": of.ends, "exits": of.exits, "queue": of.queue}
    return [
        pytest.param(group, entry, id=f"{group} {number}: {entry.kind}")
        for group, listed in groups.items()
        for number, entry in enumerate(listed)
    ]


@pytest.mark.parametrize(("group", "entry"), entries())
def test_every_entry_says_what_happened_and_what_to_do_with_names_that_are_known(group: str, entry: Entry) -> None:
    assert re.fullmatch(r"[a-z0-9-]+", entry.kind)
    assert entry.remedy
    assert entry.happened or (group == "queue" and not entry.reasons)  # a refusal has sbatch's own words
    given_by = {"ends": {"by"}, "exits": {"exit_code"}}.get(group, set()) | set(re.compile(entry.pattern).groupindex)
    for text in (entry.happened, entry.remedy):
        names = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
        assert names <= set(ABOUT) | given_by
        assert text == text.strip()
    # A path or a line of a log has any length.
    about = ABOUT | {"by": " by ada", "exit_code": "137:0", "model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0"}
    diagnosis = entry.diagnosis(about, dict.fromkeys(re.compile(entry.pattern).groupindex, "12345678"))
    assert len(diagnosis.happened) <= LONGEST_DETAIL
    assert len(entry.remedy) <= LONGEST_REMEDY


@pytest.mark.parametrize(("group", "entry"), entries())
def test_every_setting_of_a_partition_that_a_remedy_names_is_one(group: str, entry: Entry) -> None:
    for setting in re.findall(
        r"(\w+)(?:\.\w+)?(?: = \S+)? (?:in \[partitions\.\{partition\}\]|of the partition)", entry.remedy
    ):
        assert setting in {*KEYS, "Python"}


@pytest.mark.parametrize(("group", "entry"), entries())
def test_every_option_that_a_remedy_names_is_one(group: str, entry: Entry) -> None:
    """Of labctl's commands; sinfo's and the like have one dash."""
    context = click.Context(labctl)
    commands = [labctl.get_command(context, name) for name in COMMANDS]
    known = {option for command in commands if command is not None for param in command.params for option in param.opts}
    for option in re.findall(r"--[a-z][a-z-]*", re.sub(r"--gres=gpu\S*", "", entry.remedy)):
        assert option in known
    for option in re.findall(r"--engine-option (\w+)=", entry.remedy):
        assert option in {**engine_class("vllm").OPTIONS, **engine_class("hf").OPTIONS}
    for command in re.findall(r"labctl ([a-z]+)", entry.remedy):
        assert command in COMMANDS or command in {"does", "on"}


@pytest.mark.parametrize(("group", "entry"), entries())
def test_words_are_in_lower_case_or_they_would_never_be_found(group: str, entry: Entry) -> None:
    assert [word for word in entry.words if word != word.lower()] == []


@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.kind) for entry in table().signs])
def test_every_sign_is_reached_by_its_own_words(entry: Entry) -> None:
    """No entry before it takes them away; one with a pattern is shown by a recorded message, or on the cluster."""
    if entry.pattern:
        return
    for word in entry.words:
        told = diagnose.of_texts([f"x {word} y"], ABOUT)
        assert told is not None
        assert told.kind == entry.kind, word


# ---------------------------------------------------------------- ends


@pytest.mark.parametrize("state", sorted(ENDED))
def test_every_end_that_slurm_knows_has_its_words_and_its_remedy(state: str) -> None:
    told = diagnose.of_end(JobState("77", state, reason="by 1000", exit_code="1:0"), (), ABOUT)
    assert told.happened
    assert told.remedy
    assert "{" not in told.happened + told.remedy
    assert told.happened == told.happened.strip()


@pytest.mark.parametrize(
    ("state", "kind", "happened", "remedy"),
    [
        ("TIMEOUT", "time-limit", "time limit", "time in [partitions.dgx2]"),
        ("OUT_OF_MEMORY", "host-out-of-memory", "not GPU memory", "mem in [partitions.dgx2]"),
        ("NODE_FAIL", "node-failure", "node failed", "labctl retry"),
        ("PREEMPTED", "preempted", "preempted", "labctl retry"),
        ("BOOT_FAIL", "node-failure", "did not boot", "labctl retry"),
        ("DEADLINE", "deadline", "deadline", "without"),
    ],
)
def test_a_known_end_is_told_in_words(state: str, kind: str, happened: str, remedy: str) -> None:
    told = diagnose.of_end(JobState("77", state, exit_code="0:0"), (), ABOUT)
    assert told.kind == kind
    assert happened in told.happened
    assert remedy in told.remedy


def test_a_cancelled_job_is_told_by_whom_where_slurm_says_it() -> None:
    def told(reason: str) -> str:
        return diagnose.of_end(JobState("77", "CANCELLED", reason=reason)).happened

    own = pwd.getpwuid(os.getuid()).pw_name
    other = next(user for user in pwd.getpwall() if user.pw_uid != os.getuid())
    assert told(f"by {os.getuid()}") == f"cancelled by you ({own})"
    assert told(f"by {other.pw_uid}") == f"cancelled by {other.pw_name}"
    assert told("by 4123456789") == "cancelled by user id 4123456789"
    assert told("by ada") == "cancelled by ada"
    assert told("") == "cancelled"


@pytest.mark.parametrize("reason", ["Resources", "Priority", "JobHeldUser"])
def test_a_cancelled_job_is_not_told_by_what_it_had_waited_for(reason: str) -> None:
    assert reason not in diagnose.of_end(JobState("77", "CANCELLED", reason=reason)).happened


@pytest.mark.parametrize(
    ("exit_code", "kind"),
    [
        ("0:125", "host-out-of-memory"), ("0:9", "killed"), ("137:0", "killed"), ("127:0", "command-missing"),
        ("126:0", "command-missing"), ("0:53", "workspace-not-shared"), ("0:11", "crashed"),
    ],
)  # fmt: skip
def test_an_exit_code_tells_where_the_log_does_not(exit_code: str, kind: str) -> None:
    told = diagnose.of_end(JobState("77", "FAILED", exit_code=exit_code), ["nothing to see\n"], ABOUT)
    assert told.kind == kind
    assert "{" not in told.happened + told.remedy


def test_the_log_beats_the_exit_code_and_the_errors_beat_what_was_printed() -> None:
    job = JobState("77", "FAILED", exit_code="137:0")
    oom, disk = "slurmstepd: error: Detected 1 oom_kill event in StepId=1.batch.\n", "No space left on device\n"
    assert diagnose.of_end(job, [oom, disk]).kind == "host-out-of-memory"
    assert diagnose.of_end(job, ["", disk]).kind == "disk-full"


def test_what_is_not_known_stays_unknown_with_the_logs_last_lines() -> None:
    log = "\n".join([f"line {number}" for number in range(20)]) + "\n\n"
    told = diagnose.of_end(JobState("77", "FAILED", exit_code="3:0"), ["", log])
    assert told.kind == UNKNOWN
    assert told.happened == "job ended without a record (FAILED, exit code 3:0); last log line: line 19"
    assert told.lines == ("line 15", "line 16", "line 17", "line 18", "line 19")
    silent = diagnose.of_end(JobState("77", "FAILED"), ["", " \n"])
    assert (silent.kind, silent.lines) == (UNKNOWN, ())
    assert "log is empty" in silent.happened


def test_of_several_places_in_a_log_the_last_one_is_told() -> None:
    oom = "CUDA out of memory. Tried to allocate {} GiB. GPU {} has a total capacity of 80.00 GiB of which 1.00 GiB is free."
    told = diagnose.of_texts([f"{oom.format(1, 0)}\n{oom.format(2, 1)}\n"], ABOUT)
    assert told is not None
    assert told.happened.startswith("CUDA out of memory on GPU 1: 2 GiB requested")


# ---------------------------------------------------------------- waiting


@pytest.mark.parametrize("reason", sorted(ORDINARY_WAITS))
def test_waiting_for_ones_turn_needs_no_remedy(reason: str) -> None:
    assert diagnose.of_waiting(reason) is None


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("PartitionTimeLimit", "pending-for-ever"),
        ("PartitionNodeLimit", "pending-for-ever"),
        ("BadConstraints", "pending-for-ever"),
        ("QOSMaxGRESPerJob", "pending-for-ever"),
        ("AssocMaxWallDurationPerJobLimit", "pending-for-ever"),
        ("QOSMaxWallDurationPerJobLimit", "pending-for-ever"),
        ("QOSMinGRES", "pending-for-ever"),
        ("DependencyNeverSatisfied", "pending-for-ever"),
        ("AssocGrpGRES", "at-a-limit"),
        ("AssocGrpCpuLimit", "at-a-limit"),
        ("AssocGrpGRESRunMinutes", "at-a-limit"),
        ("QOSMaxGRESRunMinutesPerUser", "at-a-limit"),
        ("AssocGrpBillingMinutes", "allowance-used-up"),
        ("QOSGrpGRESMinutes", "allowance-used-up"),
        ("QOSMaxGRESPerUser", "at-a-limit"),
        ("QOSMaxJobsPerUserLimit", "at-a-limit"),
        ("MaxGRESPerAccount", "at-a-limit"),
        ("ReqNodeNotAvail", "nodes-not-available"),
        ("ReqNodeNotAvail, UnavailableNodes:dgxh-[1-2]", "nodes-not-available"),
        ("ReqNodeNotAvail, Reserved for maintenance", "nodes-not-available"),
        (
            "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",
            "nodes-not-available",
        ),
        ("PartitionDown", "partition-down"),
        ("PartitionInactive", "partition-down"),
        ("AccountNotAllowed", "bad-account"),
        ("InvalidAccount", "bad-account"),
        ("InvalidQOS", "bad-qos"),
        ("JobHeldUser", "held"),
        ("JobHeldAdmin", "held"),
        (HELD_AFTER_A_FAILED_START, "held-after-a-failed-start"),
    ],
)
def test_waiting_for_what_does_not_come_by_itself_is_told_with_a_way_out(reason: str, kind: str) -> None:
    told = diagnose.of_waiting(reason, ABOUT)
    assert told is not None
    assert told.kind == kind
    assert "{" not in told.happened + told.remedy
    assert " " in reason or len(f"{reason}: {told.happened}") <= LONGEST_DETAIL  # a sentence of Slurm's has any length


def test_a_reason_that_is_not_known_is_left_to_slurms_word() -> None:
    assert diagnose.of_waiting("SomethingThatANewSlurmSays") is None


# ---------------------------------------------------------------- the log's end


def test_only_the_end_of_a_log_is_read_in_whole_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"".join(b"%06d\n" % number for number in range(100_000)))
    read = diagnose.tail(log)
    assert len(read) <= diagnose.TAIL_BYTES
    assert read.endswith("099999\n")
    assert len(read.splitlines()[0]) == 6
    assert diagnose.tail(tmp_path / "none") == ""
    assert diagnose.tail(tmp_path) == ""


def test_last_lines_are_fit_for_a_terminal() -> None:
    lines = diagnose.last_lines("\x1b[31mred\x1b[0m\n 10%\r 50%\r100%\n\a\n" + "x" * 1000)
    assert lines[:-1] == ("red", "10%", "50%", "100%")
    assert len(lines[-1]) == diagnose.LONGEST_LINE
    assert lines[-1].endswith("…")


@given(st.text(), st.text(), st.sampled_from(sorted(ENDED)))
def test_any_log_of_any_end_is_told_of(text: str, reason: str, state: str) -> None:
    told = diagnose.of_end(JobState("77", state, reason=reason, exit_code="1:0"), [text, text], ABOUT)
    assert told.kind
    assert told.happened
    assert told.remedy
    assert len(told.lines) <= diagnose.LAST_LINES
    assert not any("\n" in line or "\x1b" in line for line in told.lines)


@given(st.binary())
def test_any_file_has_an_end(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    log = tmp_path_factory.getbasetemp() / "any.log"
    log.write_bytes(content)
    assert diagnose.tail(log) == content.decode("utf-8", errors="replace")
