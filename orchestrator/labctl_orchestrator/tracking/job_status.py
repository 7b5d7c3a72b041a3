"""What one job makes of a run that it has not measured: it waits, runs, failed, or was lost."""

from __future__ import annotations

from pathlib import Path

import msgspec

from labctl_orchestrator.store import documents
from labctl_orchestrator.store.job_rows import JobRow, ResultRow
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking.diagnosis import Diagnoses
from labctl_orchestrator.tracking.heartbeats import Sources
from labctl_orchestrator.tracking.run_status import (
    FAILED,
    FAILURE_STATES,
    INTERRUPTED,
    PENDING,
    REFUSED,
    RETRY,
    RUNNING,
    SUBMITTING,
    SUSPENDED,
    UNKNOWN,
    RunStatus,
)
from labctl_orchestrator.tracking.times import (
    LOST_AFTER_S,
    RECORD_MAY_BE_LATE_S,
    SLURM_SHOWS_A_JOB_WITHIN_S,
    SUBMISSION_TAKES_AT_MOST_S,
    age_s,
    ended_within,
)
from labctl_slurm import diagnose, queue
from labctl_slurm.diagnose import Diagnosis
from labctl_workers.record import Heartbeat, read_bytes


def tell_from_job(
    status: RunStatus,
    job: JobRow,
    results: list[ResultRow],
    sources: Sources,
) -> None:
    beat, diagnoses = sources.beat(job), sources.diagnoses
    state = job.state
    failure = results[-1] if results else None
    if failure is not None and _is_of_an_earlier_start(failure, job, beat):
        failure = None
    if job.refused:
        status.state, status.detail, status.remedy = REFUSED, job.refused, job.remedy or ""
        status.since = job.submitted_at
        status.kind = diagnose.kind_of_refusal(job.refused)
    elif job.slurm_id is None and job.intent_at is not None:
        _tell_of_no_id(status, job)
    elif job.slurm_id is None:
        _tell_by_hand(status, job, failure, sources)
    elif state in queue.WAITING and job.gone_since is None:
        _tell_of_waiting(status, job)
    elif failure is not None:
        tell_failure(status, job, failure, diagnoses)
    elif state in queue.ENDED:
        _tell_of_an_end(status, job, diagnoses)
    elif state is None and age_s(job.submitted_at) < SLURM_SHOWS_A_JOB_WITHIN_S:
        local = job.is_local
        status.state, status.since = PENDING, job.submitted_at
        status.detail = "starting" if local else "accepted, not yet in squeue"
    elif job.gone_since is not None:
        _tell_of_gone(status, job, sources)
    elif state is None and job.is_local:
        _tell_of_another_machine(status, job, sources)
    elif state is None:
        status.since, status.detail = job.submitted_at, "Slurm has not told of this job yet"
    else:
        _tell_of_running(status, job, beat)


def _is_of_an_earlier_start(failure: ResultRow, job: JobRow, beat: Heartbeat | None) -> bool:
    """Whether the job that left this failure was started again since: its last sign of life is of another start, or of none
    that goes on."""
    if beat is None:
        return False
    start, _, _ = failure.attempt_id.partition(".load")  # in whichever of its engine loads
    return beat.attempt_id != start or _is_of_another_start(beat, job)


def _is_of_another_start(beat: Heartbeat, job: JobRow) -> bool:
    """Whether the sign of life is of another start of the job than the one that Slurm tells of. Both times are the controller's:
    the clocks of two machines say nothing of one another."""
    known = beat.slurm_started_at is not None and job.started_at is not None
    return beat.phase == "requeued" or (known and beat.slurm_started_at != job.started_at)


def _requeued(requeues: int) -> str:
    return f"requeued {requeues} time{'s' if requeues != 1 else ''}" if requeues else ""


def _tell_of_waiting(status: RunStatus, job: JobRow) -> None:
    reason = job.reason or ""
    status.state, status.since = PENDING, job.submitted_at
    status.held = reason == queue.HELD_AFTER_A_FAILED_START
    told = diagnose.of_waiting(reason, vars(status))
    if told is not None:
        reason = f"{reason}: {told.happened}"
        status.kind, status.remedy = told.kind, told.remedy
    status.detail = "; ".join(filter(None, (_requeued(status.requeues), reason)))


def tell_failure(status: RunStatus, job: JobRow | None, failure: ResultRow, diagnoses: Diagnoses) -> None:
    told = diagnoses.of_failure(status, job, failure)
    status.state = FAILURE_STATES.get(told.kind, FAILED)
    status.since, status.node = failure.ended_at, failure.node
    _tell(status, told)


def _tell(status: RunStatus, told: Diagnosis) -> None:
    status.kind, status.detail, status.remedy, status.last_lines = told.kind, told.happened, told.remedy, told.lines


def _tell_of_no_id(status: RunStatus, job: JobRow) -> None:
    status.since = job.intent_at
    # Submitted, and without an id: a local job whose turn to start never came.
    if job.lost_answer and not job.submitted_at:
        lost = documents.read(job.lost_answer.encode(), documents.LostAnswer)
        status.detail, status.remedy = lost.message, lost.remedy
    elif job.never_queued or job.submitted_at:
        status.state = INTERRUPTED
        status.detail = "labctl was ended before this job was queued"
        status.remedy = RETRY
    elif age_s(job.intent_at) < SUBMISSION_TAKES_AT_MOST_S:
        status.state, status.detail = SUBMITTING, "labctl submit is about to call sbatch"
    else:
        status.detail = "labctl was ended while it submitted this job; Slurm has not told yet whether it has it"


def _tell_by_hand(status: RunStatus, job: JobRow, failure: ResultRow | None, sources: Sources) -> None:
    """A worker that a person started without Slurm (labctl run): its records and its heartbeat are all there is."""
    beat, lives = sources.beat(job), sources.gives_signs_of_life(job)
    if failure is not None:
        tell_failure(status, job, failure, sources.diagnoses)
    elif lives is None and beat is not None:
        status.since, status.detail = beat.at, f"started by hand: {beat.phase}; {NOT_HEARD_TWICE}"
    elif beat is None or not lives:
        status.state = FAILED if beat is not None and beat.phase == "ended" else UNKNOWN
        status.since, status.lost = None if beat is None else beat.at, True
        status.detail = "started by hand, and ended or was ended without a record"
    else:
        status.state, status.detail, status.since = RUNNING, f"started by hand: {beat.phase}", beat.at


NOT_HEARD_TWICE = "whether it goes on shows within a minute"


def _tell_of_an_end(status: RunStatus, job: JobRow, diagnoses: Diagnoses) -> None:
    status.since = job.ended_at or job.observed_at
    local = job.is_local
    late = job.state == "COMPLETED" and ended_within(RECORD_MAY_BE_LATE_S, job)
    if late and not local:  # a local job's files are on this machine
        status.state, status.detail = RUNNING, "the job ended; its record has not reached this machine yet"
        return
    damaged = _damaged_record(diagnoses.workspace, status.run_id, job) if local or job.state == "COMPLETED" else None
    if damaged is not None:
        status.state, status.kind = FAILED, DAMAGED_RECORD
        status.detail, status.remedy = f"its record cannot be read: {damaged}", "labctl retry measures it again"
        return
    without_a_word = local and job.state != "CANCELLED"
    _tell(status, diagnoses.of_local_end(status, job) if without_a_word else diagnoses.of_end(status, job))
    status.state = FAILURE_STATES.get(status.kind, FAILED)


DAMAGED_RECORD = "damaged-record"


def _damaged_record(workspace: Workspace, run_id: str, job: JobRow) -> Path | None:
    """The record of this job's run that is there and cannot be read."""
    for path in sorted((workspace.results / run_id).glob(f"{job.job_id}.*.json"), reverse=True):
        try:
            documents.record(read_bytes(path))
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return path
    return None


def _tell_of_gone(status: RunStatus, job: JobRow, sources: Sources) -> None:
    """Slurm answers and has the job no more, but its accounting tells no end: it was lost, or the accounting is late."""
    beat, lives = sources.beat(job), sources.gives_signs_of_life(job)
    if beat is not None and lives:
        status.state, status.since, status.node = RUNNING, beat.at, beat.host
        status.detail = f"{beat.phase}; Slurm has this job no more, its worker gives signs of life"
        return
    status.since = job.observed_at or job.submitted_at
    last = f"last known: {(job.state or 'submitted').lower()}"
    status.detail = f"Slurm has this job no more and tells no end of it ({last})"
    if lives is False and age_s(job.gone_since) > LOST_AFTER_S:
        status.lost, status.remedy = True, "labctl retry submits it again"


def _tell_of_another_machine(status: RunStatus, job: JobRow, sources: Sources) -> None:
    """A local job whose process is on another machine: its heartbeat and its records are all that is seen of it here."""
    beat, lives = sources.beat(job), sources.gives_signs_of_life(job)
    if beat is None or not lives:
        status.since = job.submitted_at if beat is None else beat.at
        last = "no heartbeat" if beat is None else f"last heartbeat: {beat.phase}"
        status.detail, status.remedy = f"a local job of {job.host}; {last}", f"run labctl status on {job.host}"
    else:
        _tell_of_running(status, msgspec.structs.replace(job, state="RUNNING"), beat)
        status.detail += f"; a local job of {job.host}"


def _tell_of_running(status: RunStatus, job: JobRow, beat: Heartbeat | None) -> None:
    status.state, status.since = RUNNING, job.started_at
    if beat is not None and _is_of_another_start(beat, job):
        beat = None
    if beat is None:
        status.state = PENDING if job.is_local else RUNNING
        status.detail = "the worker has not started yet"
    elif beat.run_id in (None, status.run_id):
        what = "runs" if job.loads == 1 else "measurements"
        status.detail = f"{beat.phase} ({beat.done}/{beat.total} {what} of the job done)"
    else:
        status.detail = f"waits for its turn in the job ({beat.done}/{beat.total} done)"
    if beat is not None and job.loads > 1:
        status.detail += f"; engine load {beat.load} of {job.loads}"
    if job.state in ("SUSPENDED", "STOPPED"):
        status.state, status.detail = SUSPENDED, f"Slurm has stopped the job's processes; before: {status.detail}"
    elif job.state == "CONFIGURING":
        status.state, status.detail = PENDING, "configuring: Slurm prepares the node"
    elif job.state not in queue.ON_A_NODE:
        status.state = UNKNOWN
        status.detail = f"Slurm calls its state {job.state}; last sign of the worker: {status.detail}"
    elif beat is not None and beat.phase.startswith("waiting"):
        status.state = PENDING
    if beat is not None:
        status.node = status.node or beat.host
    status.detail += f"; {_requeued(status.requeues)}" if status.requeues else ""


def tell_the_job(status: RunStatus, job: JobRow | None) -> None:
    if job is not None:
        status.job_id, status.slurm_id, status.node = job.job_id, job.slurm_id, status.node or job.node
        status.requeues = job.restarts
