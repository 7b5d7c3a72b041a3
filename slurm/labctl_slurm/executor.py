"""Submitting: labctl's script to Slurm, or to a local executor that outlives the terminal.

The outcome of a submission is unknown until Slurm has said so. sbatch's own answer counts where it is a job id and nothing else;
any other is followed by a question to squeue for the submission's mark. submitit runs the call in the job, and
requeues it after a signal; the job makes submitit's pickle itself (labctl_workers.start), so that sbatch is the last step.
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
from labctl_slurm import diagnose, queue
from labctl_slurm.command import Cluster, NoAnswerError
from labctl_slurm.errors import SlurmError, SubmitLimitError, UnknownOutcomeError
from labctl_slurm.render import Script
from labctl_workers.job import RunJob


def start_command(script: Script, folder: Path) -> str:
    """What a job runs: makes submitit's pickle of its JobSpec where Slurm started it and there is none, then submitit itself."""
    return f"{shlex.quote(script.partition.python)} -u -m labctl_workers.start {shlex.quote(str(folder))}"


class DetachedExecutor(submitit.LocalExecutor):
    """submitit's local executor, in a session of its own: closing the terminal or Ctrl-C does not end the job.

    The worker keeps its own time limit, which begins when its turn comes; submitit's is set out of the way. Unlike
    submitit's, it leaves CUDA_VISIBLE_DEVICES as the user has it.
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
            "SUBMITIT_LOCAL_WITH_SHELL": "",  # the shell below is replaced by the controller: its pid is the job's
            "SUBMITIT_STDERR_TO_STDOUT": "",
        }
        self.folder.mkdir(parents=True, exist_ok=True)
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
    """Jobs in a queue: their ids in order, and the cluster that has them (None: this machine's processes)."""

    ids: list[str]
    cluster: Cluster | None = None


def submit(folder: Path, script: Script, specs: Sequence[Path], mark: str) -> Queued:
    """Submit one job a spec, as one array where there are several, which `mark` (16 hexadecimal digits) tells from all others.

    Slurm ids look like "123" or "123_4"; a local id is the controller's process id. Raises UnknownOutcomeError where the jobs may
    be queued, and SlurmError where Slurm cannot be reached or refuses and, asked, does not have them.
    """
    if script.partition.executor == "local":
        with clean_env():  # an enclosing job's variables are not this job's
            jobs = DetachedExecutor(folder, script).map_array(RunJob(), [str(path) for path in specs])
        return Queued([str(job.job_id) for job in jobs])
    job_id, cluster = _sbatch(folder, script, start_command(script, folder), mark)
    return Queued([job_id] if script.tasks is None else [f"{job_id}_{task}" for task in range(len(specs))], cluster)


def submit_command(script: Script, command: str) -> str:
    """Submit a single job that runs this shell command where a worker's would stand, and return its id. Raises SlurmError
    where Slurm cannot be reached or refuses."""
    return _sbatch(script.logs, script, command, new_mark())[0]


def new_mark() -> str:
    """What tells one submission from all others: it is in the path of its script and in its comment, which Slurm keeps."""
    return secrets.token_hex(8)


@dataclass(frozen=True)
class _Answer:
    """What sbatch printed; `status` None where it did not end in time."""

    status: int | None
    output: str
    errors: str

    @property
    def said(self) -> tuple[str, str] | None:
        """The job's id and the cluster ("" where it names none); None where it failed, or says no id, or several."""
        lines = {match.groups(default="") for line in self.output.splitlines() if (match := _ID_LINE.fullmatch(line))}
        if self.status != 0 or len(lines) != 1:
            return None
        ((job_id, cluster),) = lines
        return job_id, cluster

    @property
    def may_be_late(self) -> bool:
        """Whether what was sent may reach Slurm later: sbatch did not say that Slurm refused."""
        lost = not self.text.strip() or any(word in self.errors.lower() for word in ANSWER_WAS_LOST)
        return self.status is None or self.status <= 0 or lost

    @property
    def text(self) -> str:
        if self.status is None:
            return f"no answer within {slurm_command.SBATCH_WITHIN_S:.0f} s"
        return self.errors if self.errors.strip() else self.output


# What --parsable prints, and what sbatch says without it.
_ID_LINE = re.compile(r"\s*(?:Submitted batch job )?([0-9]+)(?:(?:;| on cluster )([A-Za-z0-9_.-]+))?\s*")
ANSWER_WAS_LOST = (
    "timed out", "timeout", "send/recv", "zero bytes", "connection", "communication", "unexpected message", "protocol",
)  # fmt: skip
# A controller under load takes a submission some seconds after sbatch has given up.
ASKED_AFTER_S = (0.0, 1.0, 3.0)


def _sbatch(folder: Path, script: Script, command: str, mark: str) -> tuple[str, Cluster]:
    """The id and the cluster of the job that is submitted. Errors are those of `submit`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{queue.SCRIPT}{mark}.sh"
    text = script.text(command)
    path.write_text(text, encoding="utf-8")
    answer = _call_sbatch(path, [] if "--comment" in text else [f"--comment={queue.COMMENT}{mark}"])
    job = _confirmed(answer, script.job_name, mark)
    path.rename(folder / f"{job[0]}_submission.sh")
    return job


def _call_sbatch(path: Path, options: list[str]) -> _Answer:
    words = ["sbatch", "--parsable", *options, str(path)]
    try:
        # A job has sbatch's environment: nothing is added to it.
        done = slurm_command.run(words, slurm_command.SBATCH_WITHIN_S, env=slurm_command.environment())
    except NoAnswerError:
        return _Answer(None, "", "")
    return _Answer(done.returncode, done.stdout, done.stderr)


def _confirmed(answer: _Answer, name: str, mark: str) -> tuple[str, Cluster]:
    """The job's id and cluster: as sbatch said where that is beyond doubt, else as Slurm says when it is asked for the mark."""
    clusters = slurm_command.selected()
    said = answer.said
    if said is not None and len(clusters) == 1 and said[1] in ("", clusters[0].name):
        return said[0], clusters[0]
    if said is not None and (named := [cluster for cluster in clusters if cluster.name == said[1] != ""]):
        return said[0], named[0]
    if said is not None and said[1]:
        clusters = [*clusters, Cluster(said[1], clusters[0].conf)]
    problems: list[str] = []
    for after_s in ASKED_AFTER_S if answer.may_be_late and said is None else ASKED_AFTER_S[:1]:
        time.sleep(after_s)
        problems = []
        for cluster in clusters:
            job_id, unanswered = _shown(name, mark, cluster, refused=not answer.may_be_late and said is None)
            if job_id is not None:
                return job_id, cluster
            problems += unanswered
    if said is not None:
        return said[0], clusters[0]
    if not problems and not answer.may_be_late:
        raise refusal(answer.text)
    words = refusal(answer.text).message.removeprefix(REFUSED)
    late_s = slurm_command.SBATCH_WITHIN_S if answer.may_be_late else 0.0
    raise UnknownOutcomeError(f"sbatch gave no job id: {words}", ASK_AGAIN, late_s)


ASK_AGAIN = "the job may be queued: labctl status asks Slurm, and labctl retry submits it if it is not"


def _shown(name: str, mark: str, cluster: Cluster, refused: bool) -> tuple[str | None, list[str]]:
    """The id of the job with this mark, and what kept Slurm from answering. Slurm keeps some of the jobs that it has `refused`
    as failed for some minutes: one that has ended and never had a node is not queued."""
    answer = queue.query((), look=True, identities=[queue.Identity(name, mark)], cluster=cluster)
    found = [job for (_, called), job in answer.shown.items() if called == name]
    if refused:
        found = [job for job in found if job.node or job.state not in queue.ENDED]
    sure = [job for job in found if mark in job.marks] or [job for job in found if job.state not in queue.ENDED]
    return (sure[0].slurm_id.partition("_")[0] if sure else None), answer.problems


def refusal(spoken: str) -> SlurmError:
    """Slurm's own words and what to change."""
    lines = [line.strip() for line in spoken.splitlines() if line.strip()]
    said = [re.sub(r"^(sbatch|srun): (error: )?", "", line) for line in lines if "error" in line.lower()] or lines
    message = "; ".join(dict.fromkeys(said)) or "sbatch failed without a word"
    known = diagnose.of_refusal(message)
    error = SubmitLimitError if known is not None and known.kind == diagnose.AT_A_LIMIT else SlurmError
    remedy = known.remedy if known is not None else "labctl render prints the script: correct what Slurm names"
    return error(f"{REFUSED}{message}", remedy)


REFUSED = "Slurm refused the job: "
