"""Submit scripts to Slurm, or to a local executor that outlives the terminal.

sbatch's answer counts if it is one job id and nothing else. After any other answer, squeue is queried for the submission's mark.
In the job, submitit runs the worker and requeues it after a signal. The job writes submitit's pickle (labctl_workers.start), so
that sbatch is the last step of a submission.
"""

from __future__ import annotations

import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import clean_env

from labctl_slurm import command as slurm_command
from labctl_slurm import diagnose, forms, queue
from labctl_slurm.command import Cluster, NoAnswerError
from labctl_slurm.errors import SlurmError, SubmitLimitError, UnknownOutcomeError
from labctl_slurm.render import Script
from labctl_workers.job import RunJob


def start_command(script: Script, folder: Path) -> str:
    """The command of a job: write submitit's pickle of its JobSpec if Slurm started it, then run submitit."""
    return script.worker_command("-u", "-m", "labctl_workers.start", str(folder))


class DetachedExecutor(submitit.LocalExecutor):
    """submitit's local executor in a new session, which closing the terminal or Ctrl-C does not end.

    The worker enforces the time limit, from the start of its turn; submitit's limit is a year. CUDA_VISIBLE_DEVICES is kept.
    """

    def __init__(self, folder: Path, script: Script) -> None:
        super().__init__(folder, python=shlex.quote(script.partition.python))
        self.script = script

    @property
    def _submitit_command_str(self) -> str:
        return start_command(self.script, self.folder)

    def _submit_command(self, command: str) -> submitit.LocalJob[Any]:
        shell, environment = self.script.without_slurm(f"{_controller()} {shlex.quote(str(self.folder))}")
        environment |= {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_NTASKS": "1",
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "0",
            "SUBMITIT_LOCAL_TIMEOUT_S": str(365 * 86400),
            "SUBMITIT_LOCAL_WITH_SHELL": "",  # the controller replaces the shell below and keeps its pid, the job's id
            "SUBMITIT_STDERR_TO_STDOUT": "",
        }
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "controller.log").open("ab") as log:
            process = subprocess.Popen(
                ["/bin/bash", "-c", shell],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return submitit.LocalJob(folder=self.folder, job_id=str(process.pid), process=process, tasks=[0])


def _controller() -> str:
    return f"{shlex.quote(sys.executable)} -m submitit.local._local"


@dataclass(frozen=True)
class Queued:
    """Queued jobs: their ids in order, and their cluster (None: processes of this machine)."""

    ids: list[str]
    cluster: Cluster | None = None


def submit(folder: Path, script: Script, specs: Sequence[Path], mark: str) -> Queued:
    """Submit one job per spec, several as one array. `mark` (16 hexadecimal digits) identifies the submission.

    Slurm ids are "123" or "123_4"; a local id is the controller's process id. Raises UnknownOutcomeError where the jobs may be
    queued, SlurmError where Slurm does not have them.
    """
    if script.partition.executor == "local":
        with clean_env():  # without the variables of an enclosing job
            jobs = DetachedExecutor(folder, script).map_array(RunJob(), [str(path) for path in specs])
        return Queued([str(job.job_id) for job in jobs])
    job_id, cluster = _sbatch(folder, script, start_command(script, folder), mark)
    return Queued([job_id] if script.tasks is None else [f"{job_id}_{task}" for task in range(len(specs))], cluster)


def submit_command(script: Script, command: str) -> tuple[str, Cluster]:
    """Submit a job that runs this shell command instead of the worker; returns its id and cluster. Raises SlurmError."""
    return _sbatch(script.logs, script, command, new_mark())


def new_mark() -> str:
    """A random identity of a submission. Slurm keeps it in the path of the script and in the comment."""
    return secrets.token_hex(8)


@dataclass(frozen=True)
class _Answer:
    """The output of sbatch; `status` None after its time limit."""

    status: int | None
    output: str
    errors: str

    @property
    def job(self) -> tuple[str, str] | None:
        """The job's id and cluster ("" without one in the output); None after a failure, and with no or several ids."""
        lines = {match.groups(default="") for line in self.output.splitlines() if (match := _ID_LINE.fullmatch(line))}
        if self.status != 0 or len(lines) != 1:
            return None
        ((job_id, cluster),) = lines
        return job_id, cluster

    @property
    def may_be_late(self) -> bool:
        """Whether Slurm may still queue the job: sbatch printed no refusal."""
        lost = not self.text.strip() or any(word in self.errors.lower() for word in ANSWER_WAS_LOST)
        return self.status is None or self.status <= 0 or lost

    @property
    def text(self) -> str:
        if self.status is None:
            return f"no answer within {slurm_command.SBATCH_WITHIN_S:.0f} s"
        return self.errors if self.errors.strip() else self.output


# The output of sbatch with and without --parsable.
_ID_LINE = re.compile(r"\s*(?:Submitted batch job )?([0-9]+)(?:(?:;| on cluster )([A-Za-z0-9_.-]+))?\s*")
ANSWER_WAS_LOST = (
    "timed out", "timeout", "send/recv", "zero bytes", "connection", "communication", "unexpected message", "protocol",
)  # fmt: skip
# Seconds between queries: a controller under load queues a job some seconds after sbatch has given up.
ASKED_AFTER_S = (0.0, 1.0, 3.0)


def _sbatch(folder: Path, script: Script, command: str, mark: str) -> tuple[str, Cluster]:
    """Submit the job and return its id and cluster. Raises the errors of `submit`."""
    folder.mkdir(exist_ok=True)  # not its parents: the workspace may have been moved
    path = folder / f"{queue.SCRIPT}{mark}.sh"
    text = script.text(command)
    path.write_text(text, encoding="utf-8")
    clusters = slurm_command.selected(script.partition.cluster)
    options = [] if "--comment" in text else [f"--comment={queue.COMMENT}{mark}"]
    answer = _call_sbatch(path, options, slurm_command.named(script.partition.cluster))
    try:
        job = _confirmed(answer, script.job_name, mark, clusters)
    except UnknownOutcomeError:
        raise
    except SlurmError as error:
        error.remedy = forms.remedy(script, error.message.removeprefix(REFUSED)) or error.remedy
        raise
    path.rename(folder / f"{job[0]}_submission.sh")
    return job


def _call_sbatch(path: Path, options: list[str], cluster: Cluster | None) -> _Answer:
    words = ["sbatch", "--parsable", *options, str(path)]
    try:
        # The job inherits the environment of sbatch.
        done = slurm_command.run(words, slurm_command.SBATCH_WITHIN_S, env=slurm_command.environment(cluster))
    except NoAnswerError:
        return _Answer(None, "", "")
    return _Answer(done.returncode, done.stdout, done.stderr)


def _confirmed(answer: _Answer, name: str, mark: str, clusters: list[Cluster]) -> tuple[str, Cluster]:
    """The job's id and cluster: sbatch's, where they are certain, else those of the job with this mark in the queue."""
    if answer.job is not None:
        job_id, cluster_name = answer.job
        if len(clusters) == 1 and cluster_name in ("", clusters[0].name):
            return job_id, clusters[0]
        if cluster_name:
            named = next((cluster for cluster in clusters if cluster.name == cluster_name), None)
            if named is not None:
                return job_id, named
            clusters = [*clusters, Cluster(cluster_name, clusters[0].conf)]
    problems: list[str] = []
    refused = not answer.may_be_late and answer.job is None
    for after_s in ASKED_AFTER_S if answer.may_be_late and answer.job is None else ASKED_AFTER_S[:1]:
        time.sleep(after_s)
        problems = []
        for cluster in clusters:
            found, unanswered = _queued_id(name, mark, cluster, refused=refused)
            if found is not None:
                return found, cluster
            problems += unanswered
    if answer.job is not None:
        return answer.job[0], clusters[0]
    if not problems and not answer.may_be_late:
        raise refusal(answer.text)
    message = refusal(answer.text).message.removeprefix(REFUSED)
    late_s = slurm_command.SBATCH_WITHIN_S if answer.may_be_late else 0.0
    raise UnknownOutcomeError(f"sbatch gave no job id: {message}", MAY_BE_QUEUED, late_s)


MAY_BE_QUEUED = "run labctl status, which asks Slurm for the job; if Slurm does not have it, labctl retry"


def _queued_id(name: str, mark: str, cluster: Cluster, refused: bool) -> tuple[str | None, list[str]]:
    """The id of the job with this mark, and the queries without answer. Slurm keeps some `refused` jobs as failed for some
    minutes: one that has ended without a node does not count."""
    answer = queue.query((), look=True, identities=[queue.Identity(name, mark)], cluster=cluster)
    found = [job for (_, job_name), job in answer.shown.items() if job_name == name]
    if refused:
        found = [job for job in found if job.node or job.state not in queue.ENDED]
    certain = [job for job in found if mark in job.marks] or [job for job in found if job.state not in queue.ENDED]
    return (certain[0].slurm_id.partition("_")[0] if certain else None), answer.problems


def refusal(output: str) -> SlurmError:
    """sbatch's error message, with the remedy for it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [slurm_command.error_text(line) for line in lines if "error" in line.lower()] or lines
    message = "; ".join(dict.fromkeys(errors)) or "sbatch failed and printed nothing"
    known = diagnose.of_refusal(message)
    error = SubmitLimitError if known is not None and known.kind == diagnose.AT_A_LIMIT else SlurmError
    remedy = known.remedy if known is not None else "print the script with labctl render, and correct it"
    return error(f"{REFUSED}{message}", remedy)


REFUSED = "Slurm refused the job: "
