"""The status of a run in one job that has not measured it: the job waits, runs, failed or was lost."""

from __future__ import annotations

import socket

import msgspec

from labctl_orchestrator.store import documents
from labctl_orchestrator.store.job_rows import JobRow, ResultRow
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking.diagnosis import RunDiagnoses
from labctl_orchestrator.tracking.heartbeats import Sources
from labctl_orchestrator.tracking.run_status import (
    FAILED,
    FAILURE_STATES,
    INTERRUPTED,
    LOST,
    NEWER_RECORD,
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
    LOCAL_JOB_STARTS_WITHIN_S,
    LOST_AFTER_S,
    RECORD_MAY_BE_LATE_S,
    SLURM_SHOWS_A_JOB_WITHIN_S,
    SUBMISSION_TAKES_AT_MOST_S,
    age_s,
    ended_within,
)
from labctl_slurm import diagnose, queue
from labctl_slurm.diagnose import Diagnosis
from labctl_workers.record import Heartbeat, RunResult, read_bytes


def set_status(status: RunStatus, job: JobRow, results: list[ResultRow], sources: Sources) -> None:
    """Set the status from the job, from its failed results (the latest last), and from its heartbeat and logs."""
    beat, diagnoses = sources.beat(job), sources.diagnoses
    state = job.state
    failure = results[-1] if results else None
    if failure is not None and _is_of_earlier_start(failure, job, beat):
        failure = None
    if job.refused:
        status.state, status.detail, status.remedy = REFUSED, job.refused, job.remedy or ""
        status.since = job.submitted_at
        status.kind = diagnose.kind_of_refusal(job.refused)
    elif job.slurm_id is None and job.intent_at is not None:
        _set_without_id(status, job)
    elif job.slurm_id is None:
        _set_started_by_hand(status, job, failure, sources)
    elif state in queue.WAITING and job.gone_since is None:
        _set_waiting(status, job)
    elif failure is not None:
        set_failure(status, job, failure, diagnoses)
    elif state in queue.ENDED:
        _set_ended(status, job, diagnoses)
    elif state is None and job.is_local:
        _set_on_another_machine(status, job, sources)
    elif state is None and age_s(job.submitted_at) < SLURM_SHOWS_A_JOB_WITHIN_S:
        status.state, status.since, status.detail = PENDING, job.submitted_at, "accepted, not yet in squeue"
    elif job.gone_since is not None:
        _set_gone(status, job, sources)
    elif state is None:
        status.since, status.detail = job.submitted_at, "no state from Slurm yet"
    else:
        _set_running(status, job, beat)


def set_job(status: RunStatus, job: JobRow | None) -> None:
    """Set the job of the run."""
    if job is not None:
        status.job_id, status.slurm_id, status.node = job.job_id, job.slurm_id, status.node or job.node
        status.requeues = job.restarts


def set_failure(status: RunStatus, job: JobRow | None, failure: ResultRow, diagnoses: RunDiagnoses) -> None:
    """Set the status from a record of failure; `job` None where the job is unknown."""
    diagnosis = diagnoses.of_failure(status, job, failure)
    status.state = FAILURE_STATES.get(diagnosis.kind, FAILED)
    status.since, status.node = failure.ended_at, failure.node
    _set_diagnosis(status, diagnosis)


def _set_diagnosis(status: RunStatus, diagnosis: Diagnosis) -> None:
    status.kind, status.detail, status.remedy = diagnosis.kind, diagnosis.happened, diagnosis.remedy
    status.last_lines = diagnosis.lines


def _is_of_earlier_start(failure: ResultRow, job: JobRow, beat: Heartbeat | None) -> bool:
    """Whether the job started again after this failure: its last heartbeat is of another start."""
    if beat is None:
        return False
    start, _, _ = failure.attempt_id.partition(".load")  # in any of its engine loads
    return beat.attempt_id != start or _is_of_another_start(beat, job)


def _is_of_another_start(beat: Heartbeat, job: JobRow) -> bool:
    """Whether the heartbeat is of another start of the job than Slurm's. Both times are the controller's: clocks of machines
    differ."""
    known = beat.slurm_started_at is not None and job.started_at is not None
    return beat.phase == "requeued" or (known and beat.slurm_started_at != job.started_at)


def _requeued(requeues: int) -> str:
    return f"requeued {requeues} time{'s' if requeues != 1 else ''}" if requeues else ""


def _set_waiting(status: RunStatus, job: JobRow) -> None:
    reason = job.reason or ""
    status.state, status.since = PENDING, job.submitted_at
    status.held = reason == queue.HELD_AFTER_A_FAILED_START
    diagnosis = diagnose.of_waiting(reason, vars(status))
    if diagnosis is not None:
        reason = f"{reason}: {diagnosis.happened}"
        status.kind, status.remedy = diagnosis.kind, diagnosis.remedy
    status.detail = "; ".join(filter(None, (_requeued(status.requeues), reason)))


def _set_without_id(status: RunStatus, job: JobRow) -> None:
    status.since = job.intent_at
    # A local job with a submission and without an id: labctl ended before its turn.
    if job.lost_answer and not job.submitted_at:
        lost = documents.read(job.lost_answer.encode(), documents.LostAnswer)
        status.detail, status.remedy = lost.message, lost.remedy
    elif job.never_queued or job.submitted_at:
        status.state, status.detail, status.remedy = INTERRUPTED, "labctl ended before it queued the job", RETRY
    elif age_s(job.intent_at) < SUBMISSION_TAKES_AT_MOST_S:
        status.state, status.detail = SUBMITTING, "labctl is about to call sbatch"
    else:
        status.detail = "labctl ended during the submission; Slurm has not answered yet"


def _set_started_by_hand(status: RunStatus, job: JobRow, failure: ResultRow | None, sources: Sources) -> None:
    """A worker that a user started without Slurm (labctl run): only its records and its heartbeat are known."""
    beat, alive = sources.beat(job), sources.is_alive(job)
    if failure is not None:
        set_failure(status, job, failure, sources.diagnoses)
    elif alive is None and beat is not None:
        status.since, status.detail = beat.at, f"started by hand: {beat.phase}; next heartbeat due within a minute"
    elif beat is not None and alive:
        status.state, status.detail, status.since = RUNNING, f"started by hand: {beat.phase}", beat.at
    else:
        status.state = FAILED if beat is not None and beat.phase == "ended" else LOST
        status.since = None if beat is None else beat.at
        status.detail, status.remedy = "started by hand: the worker ended without a record", RETRY


def _set_ended(status: RunStatus, job: JobRow, diagnoses: RunDiagnoses) -> None:
    status.since = job.ended_at or job.observed_at
    local = job.is_local  # whose files are on this machine
    if job.state == "COMPLETED" and not local and ended_within(RECORD_MAY_BE_LATE_S, job):
        status.state, status.detail = RUNNING, "job ended; its record has not arrived yet"
        return
    if (local or job.state == "COMPLETED") and _set_unreadable_record(status, diagnoses.workspace, job):
        return
    by_worker = local and job.state != "CANCELLED"
    _set_diagnosis(status, diagnoses.of_local_end(status, job) if by_worker else diagnoses.of_end(status, job))
    status.state = FAILURE_STATES.get(status.kind, FAILED)


DAMAGED_RECORD = "damaged-record"


def _set_unreadable_record(status: RunStatus, workspace: Workspace, job: JobRow) -> bool:
    """Whether this job left a record of the run that cannot be read; sets the status then."""
    for path in sorted((workspace.results / status.run_id).glob(f"{job.job_id}.*.json"), reverse=True):
        try:
            documents.read(read_bytes(path), RunResult)
        except FileNotFoundError:
            continue
        except documents.NewerError:
            status.state, status.kind = UNKNOWN, NEWER_RECORD
            status.detail, status.remedy = f"record written by a newer labctl: {path}", "update this labctl"
            return True
        except (OSError, ValueError):
            status.state, status.kind = FAILED, DAMAGED_RECORD
            status.detail, status.remedy = f"damaged record: {path}", RETRY
            return True
    return False


def _set_gone(status: RunStatus, job: JobRow, sources: Sources) -> None:
    """The controller no longer has the job, and the accounting has no end of it: Slurm lost it, or the accounting is late."""
    beat, alive = sources.beat(job), sources.is_alive(job)
    if beat is not None and alive:
        status.state, status.since, status.node = RUNNING, beat.at, beat.host
        status.detail = f"{beat.phase}; not in squeue or sacct, but its worker sends heartbeats"
        return
    status.since = job.observed_at or job.submitted_at
    status.detail = f"not in squeue or sacct; last state: {(job.state or 'submitted').lower()}"
    if alive is False and age_s(job.gone_since) > LOST_AFTER_S:
        status.state, status.remedy = LOST, RETRY


def _set_on_another_machine(status: RunStatus, job: JobRow, sources: Sources) -> None:
    """A local job of another machine, or one that has just been submitted: only its heartbeat and its records are known here."""
    beat, alive = sources.beat(job), sources.is_alive(job)
    if beat is None and age_s(job.submitted_at) < LOCAL_JOB_STARTS_WITHIN_S:
        status.state, status.since, status.detail = PENDING, job.submitted_at, "starting"
    elif beat is None or not alive:
        status.since = job.submitted_at if beat is None else beat.at
        last = "no heartbeat" if beat is None else f"last heartbeat: {beat.phase}"
        status.detail, status.remedy = f"local job on {job.host}; {last}", f"run labctl status on {job.host}"
    else:
        _set_running(status, msgspec.structs.replace(job, state="RUNNING"), beat)
        status.detail += "" if job.host == socket.gethostname() else f"; local job on {job.host}"


def _set_running(status: RunStatus, job: JobRow, beat: Heartbeat | None) -> None:
    status.state, status.since = RUNNING, job.started_at
    if beat is not None and _is_of_another_start(beat, job):
        beat = None
    if beat is None:
        status.state = PENDING if job.is_local else RUNNING
        status.detail = "the worker has not started yet"
    elif beat.run_id in (None, status.run_id):
        unit = "runs" if job.loads == 1 else "measurements"
        status.detail = f"{beat.phase} ({beat.done}/{beat.total} {unit} of the job done)"
    else:
        status.detail = f"waits for its turn in the job ({beat.done}/{beat.total} done)"
    if beat is not None and job.loads > 1:
        status.detail += f"; engine load {beat.load} of {job.loads}"
    if job.state in ("SUSPENDED", "STOPPED"):
        status.state, status.detail = SUSPENDED, f"suspended by Slurm; before: {status.detail}"
    elif job.state == "CONFIGURING":
        status.state, status.detail = PENDING, "Slurm prepares the node (CONFIGURING)"
    elif job.state not in queue.ON_A_NODE:
        status.state, status.detail = UNKNOWN, f"unknown Slurm state {job.state}; worker: {status.detail}"
    elif beat is not None and beat.phase.startswith("waiting"):
        status.state = PENDING
    if beat is not None:
        status.node = status.node or beat.host
    status.detail += f"; {_requeued(status.requeues)}" if status.requeues else ""
