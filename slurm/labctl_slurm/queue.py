"""The states of many jobs: one squeue, then one sacct for jobs that squeue does not show as waiting or running.

A job that neither shows is gone, which is not an end. A job is identified by its mark, in the script's path or the comment: the
user or the site may change its name.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from labctl_slurm import command
from labctl_slurm.command import Cluster
from labctl_slurm.errors import SlurmError

SQUEUE_FIELDS = ("%i", "%T", "%N", "%V", "%S", "%e", "%j", "%r")
# The fields of squeue that may hold a mark: the script's path, and the comment. Reasons do not contain the separator.
MARKED_BY = "\x1f"
SQUEUE_MARKS = f"{MARKED_BY}%o{MARKED_BY}%k"
SACCT_FIELDS = ("JobID", "State", "ExitCode", "Submit", "Start", "End", "NodeList", "JobName")
# SubmitLine holds the script's path and the comment. The UID separates it from the name: both may contain "|".
SACCT_MARKS = ("UID", "SubmitLine")
NO_SUBMIT_LINE = "invalid field requested"  # Slurm before 20.11
COMMENT = "labctl:"  # of labctl's jobs; the mark follows
SCRIPT = "submission_"  # beginning of their scripts' names; the mark follows
_MARK = re.compile(rf"(?:{COMMENT}|/{SCRIPT})([0-9a-f]{{16}})")
# Without a controller, squeue gives up after 9 s.
ANSWER_WITHIN_S = 11.0
SPARED_FOR_SACCT_S = 1.0
LEAST_S = 0.5
CHARACTERS_PER_CALL = 100_000  # Linux allows one argument 131,072 bytes
LOOK_BACK_DAYS = 30
NO_ACCOUNTING = "accounting storage is disabled"

ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)
# Slurm's reason for holding a job that it could not start on its node.
HELD_AFTER_A_FAILED_START = "launch failed requeued held"
ON_A_NODE = frozenset({"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING"})
# EXPEDITING, since 25.11: requeued, and to start before other jobs.
WAITING = frozenset(
    {"PENDING", "EXPEDITING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
)


@dataclass(frozen=True)
class JobState:
    """One job in Slurm. `state` is Slurm's first word for it. Times are ISO 8601 in UTC, of the latest start. `held_before_s` are
    the seconds in which earlier starts held their nodes (None: unknown)."""

    slurm_id: str
    state: str
    name: str = ""
    reason: str = ""
    node: str = ""
    queued_at: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    exit_code: str | None = None
    held_before_s: float | None = None
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Identity:
    """Identifies the job with labctl's `name`, by the mark of its submission, or by its id and the time when it was queued."""

    name: str
    mark: str = ""
    slurm_id: str = ""
    queued_at: str | None = None


Job = tuple[str, str]  # Slurm id and job name: a controller that lost its state gives ids again


@dataclass
class QueueAnswer:
    """Slurm's answer: the states of the queried jobs, and the ids of the queried names (`named`).

    `shown` are all jobs of the user that the controller has. `gone` are queried jobs that the controller no longer has and the
    accounting has no end of, `nowhere` queried names that neither has. `problems` are the errors of commands that failed: jobs
    and names in none of the other fields are then unknown.
    """

    jobs: dict[Job, JobState] = field(default_factory=dict)
    shown: dict[Job, JobState] = field(default_factory=dict)
    named: dict[str, list[str]] = field(default_factory=dict)
    gone: set[Job] = field(default_factory=set)
    nowhere: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def query(
    jobs: Iterable[Job],
    names: Iterable[str] = (),
    *,
    look: bool = False,
    restarted: Collection[Job] = (),
    identities: Iterable[Identity] = (),
    cluster: Cluster | None = None,
) -> QueueAnswer:
    """The states of these jobs ("123" or "123_4", with name), and the ids of jobs with these names. `look` queries the controller
    without any. A job with one of the `identities` has its name in the answer, whatever its name in Slurm. `cluster` None is the
    cluster of the shell.

    Calls squeue once, sacct once for jobs that squeue does not show as waiting or running, and once more for names that it does
    not show. sacct alone has the earlier starts of `restarted` jobs, so they are queried when they have completed too. Errors are
    in `QueueAnswer.problems`. An end in the accounting counts only if the controller has answered: while Slurm requeues a job,
    sacct says NODE_FAIL or TIMEOUT for some seconds.
    """
    wanted, sought = set(jobs), set(names)
    answer = QueueAnswer()
    if not (wanted or sought or look):
        return answer
    deadline = time.monotonic() + ANSWER_WITHIN_S
    queries = _Queries(answer, cluster, tuple(identities))
    queued = queries.run([_squeue_call()], _read_squeue, ANSWER_WITHIN_S - SPARED_FOR_SACCT_S)
    controller_answered = queued is not None
    for job in _with_cancelled_tasks(queued or [], wanted):
        answer.shown[job.slurm_id, job.name] = job
        if (job.slurm_id, job.name) in wanted:
            answer.jobs[job.slurm_id, job.name] = job
        if job.name in sought:
            answer.named.setdefault(job.name, []).append(job.slurm_id)
    # squeue shows an ended job for some minutes, without its exit code.
    unsettled = {job for job in wanted if job not in answer.jobs or _needs_sacct(answer.jobs[job], job in restarted)}
    if unsettled and controller_answered:
        _settle(queries, unsettled, deadline)
    sought -= set(answer.named)
    if sought and controller_answered:
        _find_names(queries, sought, deadline)
    return answer


def _needs_sacct(job: JobState, restarted: bool) -> bool:
    return job.state in ENDED and (job.state != "COMPLETED" or restarted)


def _settle(queries: _Queries, unsettled: set[Job], deadline: float) -> None:
    answer = queries.answer
    parents = sorted({slurm_id.split("_")[0] for slurm_id, _ in unsettled}, key=int)
    accounted = queries.run(_sacct_calls("--jobs", parents), _read_sacct, deadline - time.monotonic())
    # The accounting lags behind the controller, so only an end counts.
    states = _latest(_with_cancelled_tasks(accounted or [], unsettled))
    for job in unsettled:
        if job in states and states[job].state in ENDED:
            answer.jobs[job] = states[job]
        elif job not in answer.jobs and accounted is not None:
            answer.gone.add(job)


def _latest(rows: Iterable[JobState]) -> dict[Job, JobState]:
    """The last row of each job, its latest start, with the time that the rows before it held nodes."""
    found: dict[Job, JobState] = {}
    for row in rows:
        job = (row.slurm_id, row.name)
        before = found.get(job)
        found[job] = replace(row, held_before_s=0.0 if before is None else _held_s(before))
    return found


def _held_s(job: JobState) -> float | None:
    """Seconds in which this start and those before it held nodes; None where one has no end."""
    if job.started_at is None or job.held_before_s is None:
        return job.held_before_s
    if job.ended_at is None:
        return None
    held = datetime.fromisoformat(job.ended_at) - datetime.fromisoformat(job.started_at)
    return job.held_before_s + max(0.0, held.total_seconds())


def _with_cancelled_tasks(found: list[JobState], wanted: set[Job]) -> list[JobState]:
    """The jobs, and the array tasks that were cancelled before they began: Slurm shows these as one row with the array's id."""
    arrays = {(job.slurm_id, job.name): job for job in found if job.state in ENDED and "_" not in job.slurm_id}
    shown = {(job.slurm_id, job.name) for job in found}
    tasks = [(slurm_id, arrays.get((slurm_id.partition("_")[0], name))) for slurm_id, name in wanted - shown]
    return [*found, *(replace(array, slurm_id=slurm_id) for slurm_id, array in tasks if array is not None)]


def _find_names(queries: _Queries, names: set[str], deadline: float) -> None:
    # All jobs of the user: a renamed one is found by its mark. Without a start time, sacct shows today's alone.
    answer = queries.answer
    calls = _sacct_calls("--user", [str(os.getuid())], f"--starttime=now-{LOOK_BACK_DAYS}days")
    accounted = queries.run(calls, _read_sacct, deadline - time.monotonic())
    if accounted is None:
        return
    for job in accounted:
        if job.name in names:
            ids = answer.named.setdefault(job.name, [])
            ids += [] if job.slurm_id in ids else [job.slurm_id]
    answer.nowhere |= names - set(answer.named)


@dataclass
class _Queries:
    """Queries to one cluster. In their results, labctl's jobs have labctl's names."""

    answer: QueueAnswer
    cluster: Cluster | None
    identities: tuple[Identity, ...]

    def run(
        self, calls: Iterable[Sequence[str]], read: Callable[[str], Iterable[JobState]], within_s: float
    ) -> list[JobState] | None:
        """The jobs of all calls; None, and an error in `QueueAnswer.problems`, where one fails."""
        found: list[JobState] = []
        try:
            for arguments in calls:
                found += read(_output(arguments, max(within_s, LEAST_S), self.cluster))
        except SlurmError as error:
            self.answer.problems.append(error.message)
            return None
        return self._with_labctl_names(found)

    def _with_labctl_names(self, found: Iterable[JobState]) -> list[JobState]:
        of_mark = {known.mark: known.name for known in self.identities if known.mark}
        of_time = {(known.slurm_id, known.queued_at): known.name for known in self.identities}
        marked = set(of_mark.values())
        named = []
        for job in found:
            name = next((of_mark[mark] for mark in job.marks if mark in of_mark), None)
            if name is None and job.marks and job.name in marked:
                name = ""  # another submission with the same name
            elif name is None and not job.marks and job.queued_at is not None:
                name = of_time.get((job.slurm_id, job.queued_at))
            named.append(job if name is None else replace(job, name=name))
        return named


def _output(arguments: Sequence[str], within_s: float, cluster: Cluster | None) -> str:
    """The output of a command. Raises SlurmError."""
    done = command.run(arguments, within_s, cluster)
    if done.returncode != 0 and NO_ACCOUNTING in done.stderr:
        return ""  # squeue and the records have to suffice
    if (
        done.returncode != 0
        and NO_SUBMIT_LINE in done.stderr.lower()
        and any(SACCT_MARKS[1] in word for word in arguments)
    ):
        return _output([word.replace(SACCT_MARKS[1], "WorkDir") for word in arguments], within_s, cluster)
    if done.returncode != 0:
        raise command.failed(done)
    return done.stdout


def _squeue_call() -> list[str]:
    # All jobs of the user, ended ones too: squeue fails for an id that Slurm has forgotten. --array prints a line per task.
    form = "|".join(SQUEUE_FIELDS) + SQUEUE_MARKS
    return ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", f"--format={form}"]


def _read_squeue(output: str) -> Iterator[JobState]:
    for line in output.splitlines():
        parts = line.split("|", len(SQUEUE_FIELDS) - 1)  # the reason is last: it may contain "|"
        if len(parts) != len(SQUEUE_FIELDS):
            continue
        job, state, node, submitted, started, ended, name, reason = (part.strip() for part in parts)
        reason, _, marked_by = reason.partition(MARKED_BY)
        marks = tuple(_MARK.findall(marked_by))
        begun = state not in WAITING  # times of a waiting job are estimates
        for task in expanded(job):
            yield JobState(
                slurm_id=task,
                state=state,
                name=name,
                marks=marks,
                reason="" if reason.strip() == "None" else reason.strip(),
                node=node,
                queued_at=utc(submitted),
                started_at=utc(started) if begun else None,
                ended_at=utc(ended) if state in ENDED else None,
            )


def _sacct_calls(key: str, values: Sequence[str], *more: str) -> Iterator[list[str]]:
    """One call, or several where the values would make an argument longer than Linux allows."""
    # --duplicates: a requeued job has a row per start.
    form = f"--format={','.join((*SACCT_FIELDS, *SACCT_MARKS))}"
    shared = ["sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", form]
    for part in in_calls(values):
        yield [*shared, *more, f"{key}={','.join(part)}"]


def in_calls(words: Iterable[str]) -> Iterator[list[str]]:
    """The words in as few parts as possible of CHARACTERS_PER_CALL characters, one between two words included."""
    part: list[str] = []
    length = 0
    for word in words:
        if part and length + 1 + len(word) > CHARACTERS_PER_CALL:
            yield part
            part, length = [], 0
        length += len(word) + (1 if part else 0)
        part.append(word)
    if part:
        yield part


def _read_sacct(output: str) -> Iterator[JobState]:
    """The rows of jobs, in the order of submission and start."""
    rows = [line.split("|", len(SACCT_FIELDS) - 1) for line in output.splitlines()]
    rows = [row for row in rows if len(row) == len(SACCT_FIELDS)]
    for job, state, exit_code, submitted, started, ended, node, name in sorted(rows, key=lambda row: (row[3], row[4])):
        word, _, rest = state.partition(" ")
        called = _WITH_SUBMIT_LINE.fullmatch(name)
        for task in expanded(job):
            yield JobState(
                slurm_id=task,
                state=word,
                name=name if called is None else called[1],
                marks=() if called is None else tuple(_MARK.findall(called[2])),
                reason=rest,  # "by 1000" after CANCELLED
                node="" if node == "None assigned" else node,
                queued_at=utc(submitted),
                started_at=utc(started),
                ended_at=utc(ended),
                exit_code=exit_code or None,
            )


_WITH_SUBMIT_LINE = re.compile(r"(.*)\|\d+\|(.*)")


def expanded(job: str) -> list[str]:
    """The ids in one of Slurm's: "4_[1-3,7%2]" is 4_1, 4_2, 4_3 and 4_7. Other forms ("4_1", "4+1") are returned as they are."""
    match = re.fullmatch(r"(\d+)_\[([\d,\-:]+)(?:%\d+)?\]", job)
    if match is None:
        return [job]
    tasks: list[str] = []
    for part in match[2].split(","):
        bounds, _, step = part.partition(":")
        first, _, last = bounds.partition("-")
        tasks += [f"{match[1]}_{task}" for task in range(int(first), int(last or first) + 1, int(step or 1))]
    return tasks


def utc(time: str) -> str | None:
    """Slurm's local time as ISO 8601 in UTC; None for "Unknown", "N/A" and any other text."""
    try:
        local = datetime.fromisoformat(time)
    except ValueError:
        return None
    return local.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
