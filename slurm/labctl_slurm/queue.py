"""The state of many jobs: one squeue, then one sacct for those that squeue no longer shows.

Nothing is inferred from silence: a job that neither shows is simply not in the answer.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

SQUEUE_FIELDS = ("%i", "%T", "%N", "%V", "%S", "%e", "%j", "%r")
SACCT_FIELDS = ("JobID", "State", "ExitCode", "Submit", "Start", "End", "NodeList", "JobName")
ANSWER_WITHIN_S = 20
IDS_A_CALL = 2000  # well below the length that Linux allows a command line

ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)
WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})


@dataclass(frozen=True)
class JobState:
    """What Slurm says of one job. `state` is Slurm's word without what follows it; times are ISO 8601 in UTC."""

    slurm_id: str
    state: str
    name: str = ""
    reason: str = ""
    node: str = ""
    queued_at: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    exit_code: str | None = None


@dataclass
class Answer:
    """The states by Slurm id, and why some may be missing: a command that failed, in its own words."""

    jobs: dict[str, JobState] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def query(slurm_ids: Iterable[str]) -> Answer:
    """The state of these jobs ("123" or "123_4"). Never raises for Slurm's sake: see `Answer.problems`."""
    wanted = set(slurm_ids)
    answer = Answer()
    if not wanted:
        return answer
    _ask(answer, wanted, _squeue)
    # squeue shows an ended job for some minutes, but not with which exit code.
    missing = {job for job in wanted if job not in answer.jobs or answer.jobs[job].state in ENDED - {"COMPLETED"}}
    if missing:
        _ask(answer, missing, _sacct)
    return answer


def _ask(answer: Answer, wanted: set[str], command: _Command) -> None:
    for arguments in command.calls(wanted):
        try:
            output = _run(arguments)
        except SlurmSilentError as error:
            answer.problems.append(str(error))
            return
        for job in command.read(output):
            known = answer.jobs.get(job.slurm_id)
            # The accounting lags behind the controller: it does not bring an ended job back.
            if job.slurm_id in wanted and (known is None or known.state not in ENDED or job.state in ENDED):
                answer.jobs[job.slurm_id] = job


class SlurmSilentError(Exception):
    """A query that Slurm did not answer; the text says which and why, on one line."""


def _run(arguments: Sequence[str]) -> str:
    # Sites set these variables to print relative times and their own columns; a long list of tasks is cut to 64 letters
    # unless SLURM_BITSTR_LEN is 0.
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SACCT_", "SLURM_TIME_FORMAT"))}
    try:
        done = subprocess.run(
            arguments,
            env={**own, "SLURM_TIME_FORMAT": "standard", "SLURM_BITSTR_LEN": "0", "LC_ALL": "C"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_WITHIN_S,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmSilentError(f"{arguments[0]} was not found on this machine") from None
    except OSError as error:
        raise SlurmSilentError(f"{arguments[0]} cannot be started: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise SlurmSilentError(f"{arguments[0]} did not answer within {ANSWER_WITHIN_S} s") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise SlurmSilentError(f"{arguments[0]}: {said}")
    return done.stdout


class _Command:
    """How to ask, and how to read the answer."""

    def calls(self, wanted: set[str]) -> Iterator[list[str]]:
        raise NotImplementedError

    def read(self, output: str) -> Iterator[JobState]:
        raise NotImplementedError


class _Squeue(_Command):
    def calls(self, wanted: set[str]) -> Iterator[list[str]]:
        # All of the user's jobs, those that just ended too: naming an id that Slurm has forgotten is an error to squeue.
        # --array gives a line to every task, pending ones included.
        form = "|".join(SQUEUE_FIELDS)
        yield ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", f"--format={form}"]

    def read(self, output: str) -> Iterator[JobState]:
        for line in output.splitlines():
            parts = line.split("|", len(SQUEUE_FIELDS) - 1)  # the reason is last: an administrator may write anything
            if len(parts) != len(SQUEUE_FIELDS):
                continue
            job, state, node, submitted, started, ended, name, reason = (part.strip() for part in parts)
            begun = state not in WAITING  # for a waiting job the times are Slurm's expectations
            yield JobState(
                slurm_id=job,
                state=state,
                name=name,
                reason="" if reason == "None" else reason,
                node=node,
                queued_at=utc(submitted),
                started_at=utc(started) if begun else None,
                ended_at=utc(ended) if state in ENDED else None,
            )


class _Sacct(_Command):
    def calls(self, wanted: set[str]) -> Iterator[list[str]]:
        # A task's array id asks for all its tasks: one short list instead of a thousand long ones.
        parents = sorted({job.split("_")[0] for job in wanted}, key=int)
        for start in range(0, len(parents), IDS_A_CALL):
            chosen = ",".join(parents[start : start + IDS_A_CALL])
            form = ",".join(SACCT_FIELDS)
            # --duplicates: a requeued job has a row for each time it ran.
            yield [
                "sacct",
                "--noheader",
                "--parsable2",
                "--allocations",
                "--duplicates",
                f"--format={form}",
                f"--jobs={chosen}",
            ]

    def read(self, output: str) -> Iterator[JobState]:
        """The latest row of each job, in the order of their submission."""
        rows = [line.split("|", len(SACCT_FIELDS) - 1) for line in output.splitlines()]
        rows = [row for row in rows if len(row) == len(SACCT_FIELDS)]
        for job, state, exit_code, submitted, started, ended, node, name in sorted(
            rows, key=lambda row: (row[3], row[4])
        ):
            word, _, rest = state.partition(" ")
            for task in expanded(job):
                yield JobState(
                    slurm_id=task,
                    state=word,
                    name=name,
                    reason=rest,  # "by 1000" after CANCELLED
                    node="" if node == "None assigned" else node,
                    queued_at=utc(submitted),
                    started_at=utc(started),
                    ended_at=utc(ended),
                    exit_code=exit_code or None,
                )


_squeue = _Squeue()
_sacct = _Sacct()


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
