"""The state of many jobs: one squeue, then one sacct for those that squeue does not show alive.

Nothing is inferred from silence: a job that neither shows is gone, which is no end. A job is known by the mark that labctl
gives it, wherever Slurm keeps it; its name, which its user or the site may change, is a help.
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
# Where squeue shows a mark: the path of the script, and the comment. Behind a sign that no reason has.
MARKED_BY = "\x1f"
SQUEUE_MARKS = f"{MARKED_BY}%o{MARKED_BY}%k"
SACCT_FIELDS = ("JobID", "State", "ExitCode", "Submit", "Start", "End", "NodeList", "JobName")
# The call of sbatch holds the script's path and the comment. A number stands between it and the name: both may hold a "|".
SACCT_MARKS = ("UID", "SubmitLine")
NO_SUBMIT_LINE = "invalid field requested"  # Slurm before 20.11
COMMENT = "labctl:"  # the beginning of the comment of labctl's jobs; the mark follows
SCRIPT = "submission_"  # the beginning of their scripts' names
_MARK = re.compile(rf"(?:{COMMENT}|/{SCRIPT})([0-9a-f]{{16}})")
# A controller that is down makes squeue give up after 9 s by itself; a person waits no longer for the last known states.
ANSWER_WITHIN_S = 11.0
SPARED_FOR_SACCT_S = 1.0
LEAST_S = 0.5
LETTERS_A_CALL = 100_000  # Linux allows one argument 131,072 bytes
LOOK_BACK_DAYS = 30
NO_ACCOUNTING = "accounting storage is disabled"

ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)
# Why Slurm holds a job that it could not start on the node it had chosen, in its words.
HELD_AFTER_A_FAILED_START = "launch failed requeued held"
ON_A_NODE = frozenset({"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING"})
WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})


@dataclass(frozen=True)
class JobState:
    """What Slurm says of one job. `state` is Slurm's word without what follows it; times are ISO 8601 in UTC, of its latest
    start; `held_before_s` is how long its earlier starts held their nodes, in seconds (None: the accounting was not asked, or
    does not tell)."""

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
    """By what a job is known that labctl calls `name`: the mark of its submission, or its id and the time when it was queued."""

    name: str
    mark: str = ""
    slurm_id: str = ""
    queued_at: str | None = None


Job = tuple[str, str]  # a Slurm id and the job's name: after a lost controller state an id may be another job's


@dataclass
class Answer:
    """What Slurm said: the state of each job that it has or whose end it tells, and the ids behind wanted names.

    `shown` are all jobs of the user that the controller has. `gone` are those that it, which answered, has no more, while the
    accounting tells no end of them; `nowhere` the wanted names that neither knows, both having answered. `problems` are
    the commands that failed, in their own words: what is in none of the others then is not known.
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
) -> Answer:
    """The state of these jobs ("123" or "123_4", and its name), and the ids of jobs with these names. Where nothing is wanted,
    Slurm is asked only to `look` what it has. A job that one of the `identities` fits has that name in the answer, whatever
    Slurm calls it. `cluster` None is the one that the shell means.

    One squeue; one sacct for the jobs that it does not show alive, one more for names that it does not show. The `restarted`
    jobs are among those that sacct is asked for when they have completed: it alone tells of their earlier starts. Never raises
    for Slurm's sake: see `Answer.problems`. An end that only the accounting tells counts only where the controller has
    answered: of a job that is being requeued the accounting says NODE_FAIL or TIMEOUT for some seconds.
    """
    wanted, sought = set(jobs), set(names)
    answer = Answer()
    if not (wanted or sought or look):
        return answer
    deadline = time.monotonic() + ANSWER_WITHIN_S
    asking = _Asking(answer, cluster, tuple(identities))
    queued = asking.ask([_squeue_call()], _read_squeue, ANSWER_WITHIN_S - SPARED_FOR_SACCT_S)
    controller_answered = queued is not None
    for job in _with_cancelled_tasks(queued or [], wanted):
        answer.shown[job.slurm_id, job.name] = job
        if (job.slurm_id, job.name) in wanted:
            answer.jobs[job.slurm_id, job.name] = job
        if job.name in sought:
            answer.named.setdefault(job.name, []).append(job.slurm_id)
    # squeue shows an ended job for some minutes, but not with which exit code.
    unsettled = {job for job in wanted if job not in answer.jobs or _asks_for_more(answer.jobs[job], job in restarted)}
    if unsettled and controller_answered:
        _settle(asking, unsettled, deadline)
    sought -= set(answer.named)
    if sought and controller_answered:
        _look_for(asking, sought, deadline)
    return answer


def _asks_for_more(job: JobState, restarted: bool) -> bool:
    return job.state in ENDED and (job.state != "COMPLETED" or restarted)


def _settle(asking: _Asking, unsettled: set[Job], deadline: float) -> None:
    answer = asking.answer
    parents = sorted({slurm_id.split("_")[0] for slurm_id, _ in unsettled}, key=int)
    accounted = asking.ask(_sacct_calls("--jobs", parents), _read_sacct, deadline - time.monotonic())
    # The accounting lags behind the controller: it does not bring an ended job back.
    told = _latest(_with_cancelled_tasks(accounted or [], unsettled))
    for job in unsettled:
        if job in told and told[job].state in ENDED:
            answer.jobs[job] = told[job]
        elif job not in answer.jobs and accounted is not None:
            answer.gone.add(job)


def _latest(rows: Iterable[JobState]) -> dict[Job, JobState]:
    """The last row of each job, which is the job as it is; those before it are its earlier starts."""
    found: dict[Job, JobState] = {}
    for row in rows:
        job = (row.slurm_id, row.name)
        before = found.get(job)
        found[job] = replace(row, held_before_s=0.0 if before is None else _held_s(before))
    return found


def _held_s(job: JobState) -> float | None:
    """How long this start and those before it held their nodes; None where one of them has no end."""
    if job.started_at is None or job.held_before_s is None:
        return job.held_before_s  # it never began
    if job.ended_at is None:
        return None
    held = datetime.fromisoformat(job.ended_at) - datetime.fromisoformat(job.started_at)
    return job.held_before_s + max(0.0, held.total_seconds())


def _with_cancelled_tasks(found: list[JobState], wanted: set[Job]) -> list[JobState]:
    """The jobs, and the tasks that Slurm tells of as one: those of an array that are cancelled before they begin become one
    row with the array's own id."""
    arrays = {(job.slurm_id, job.name): job for job in found if job.state in ENDED and "_" not in job.slurm_id}
    told = {(job.slurm_id, job.name) for job in found}
    tasks = [(slurm_id, arrays.get((slurm_id.partition("_")[0], name))) for slurm_id, name in wanted - told]
    return [*found, *(replace(array, slurm_id=slurm_id) for slurm_id, array in tasks if array is not None)]


def _look_for(asking: _Asking, names: set[str], deadline: float) -> None:
    # All jobs of the user: one that was renamed is found by its mark. Without a start time sacct looks at today alone.
    answer = asking.answer
    calls = _sacct_calls("--user", [str(os.getuid())], f"--starttime=now-{LOOK_BACK_DAYS}days")
    accounted = asking.ask(calls, _read_sacct, deadline - time.monotonic())
    if accounted is None:
        return
    for job in accounted:
        if job.name in names:
            ids = answer.named.setdefault(job.name, [])
            ids += [] if job.slurm_id in ids else [job.slurm_id]
    answer.nowhere |= names - set(answer.named)


@dataclass
class _Asking:
    """Questions to one cluster, whose answers have labctl's names for labctl's jobs."""

    answer: Answer
    cluster: Cluster | None
    identities: tuple[Identity, ...]

    def ask(
        self, calls: Iterable[Sequence[str]], read: Callable[[str], Iterable[JobState]], within_s: float
    ) -> list[JobState] | None:
        """What the calls answered; None, and a problem more, where one of them did not."""
        found: list[JobState] = []
        try:
            for arguments in calls:
                found += read(_run(arguments, max(within_s, LEAST_S), self.cluster))
        except SlurmError as error:
            self.answer.problems.append(error.message)
            return None
        return self._as_labctl_calls_them(found)

    def _as_labctl_calls_them(self, found: Iterable[JobState]) -> list[JobState]:
        of_mark = {known.mark: known.name for known in self.identities if known.mark}
        of_time = {(known.slurm_id, known.queued_at): known.name for known in self.identities}
        marked = set(of_mark.values())
        named = []
        for job in found:
            name = next((of_mark[mark] for mark in job.marks if mark in of_mark), None)
            if name is None and job.marks and job.name in marked:
                name = ""  # another submission of the same name, by its mark
            elif name is None and not job.marks and job.queued_at is not None:
                name = of_time.get((job.slurm_id, job.queued_at))
            named.append(job if name is None else replace(job, name=name))
        return named


def _run(arguments: Sequence[str], within_s: float, cluster: Cluster | None) -> str:
    """What it printed. Raises SlurmError where it is not here, does not answer or fails."""
    done = command.run(arguments, within_s, cluster)
    if done.returncode != 0 and NO_ACCOUNTING in done.stderr:
        return ""  # nothing is kept at this site: squeue and the records have to do
    if (
        done.returncode != 0
        and NO_SUBMIT_LINE in done.stderr.lower()
        and any(SACCT_MARKS[1] in word for word in arguments)
    ):
        return _run([word.replace(SACCT_MARKS[1], "WorkDir") for word in arguments], within_s, cluster)
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise SlurmError(f"{arguments[0]}: {said}")
    return done.stdout


def _squeue_call() -> list[str]:
    # All of the user's jobs, those that just ended too: naming an id that Slurm has forgotten is an error to squeue.
    # --array gives a line to every task, pending ones included.
    form = "|".join(SQUEUE_FIELDS) + SQUEUE_MARKS
    return ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", f"--format={form}"]


def _read_squeue(output: str) -> Iterator[JobState]:
    for line in output.splitlines():
        parts = line.split("|", len(SQUEUE_FIELDS) - 1)  # the reason is last: an administrator may write anything
        if len(parts) != len(SQUEUE_FIELDS):
            continue
        job, state, node, submitted, started, ended, name, reason = (part.strip() for part in parts)
        reason, _, marked_by = reason.partition(MARKED_BY)
        marks = tuple(_MARK.findall(marked_by))
        begun = state not in WAITING  # for a waiting job the times are Slurm's expectations
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
    """One call, or several where the values would make one argument longer than Linux allows.

    A task's array id asks for all its tasks: one short list instead of a thousand long ones.
    """
    # --duplicates: a requeued job has a row for each time it ran.
    shared = [
        "sacct",
        "--noheader",
        "--parsable2",
        "--allocations",
        "--duplicates",
        f"--format={','.join((*SACCT_FIELDS, *SACCT_MARKS))}",
    ]
    for part in in_calls(values):
        yield [*shared, *more, f"{key}={','.join(part)}"]


def in_calls(words: Iterable[str]) -> Iterator[list[str]]:
    """The words in as few parts as a command line can hold, each counted with one sign between its words."""
    part: list[str] = []
    length = 0
    for word in words:
        if part and length + 1 + len(word) > LETTERS_A_CALL:
            yield part
            part, length = [], 0
        length += len(word) + (1 if part else 0)
        part.append(word)
    if part:
        yield part


def _read_sacct(output: str) -> Iterator[JobState]:
    """The rows of jobs, in the order in which they were submitted and began."""
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
    """The ids behind one of Slurm's: "4_[1-3,7%2]" is 4_1, 4_2, 4_3 and 4_7; "4_1" and "4" are themselves.

    A form that is not known (a heterogeneous job's "4+1") is given back as it is.
    """
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
    """Slurm's local time as ISO 8601 in UTC; None for "Unknown", "N/A" and anything else that is no time."""
    try:
        local = datetime.fromisoformat(time)
    except ValueError:
        return None
    return local.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
