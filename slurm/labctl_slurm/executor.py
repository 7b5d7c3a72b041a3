"""submitit's executors, made to submit labctl's script and to outlive the terminal.

submitit keeps what it does well: the script file kept beside the logs, the call of sbatch, the running of the call in the
job, the requeue after a signal. What it writes into the script is labctl's, for arrays too.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env

from labctl_slurm import diagnose
from labctl_slurm.errors import NO_SLURM, SlurmError, SubmitLimitError
from labctl_slurm.render import Script
from labctl_workers.job import RunJob


class ScriptExecutor(submitit.SlurmExecutor):
    """Submits `script`, a text with submitit's command in it.

    submitit pickles each call and moves the pickle to a name with the job's id after sbatch: whoever is killed in between
    leaves jobs in the queue that find none. Here the job makes its own (labctl_workers.start), and sbatch is the last step.
    """

    def __init__(self, folder: Path, script: Script) -> None:
        super().__init__(folder, python=shlex.quote(script.partition.python))
        self.script = script

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.script.text(command)

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[submitit.Job[Any]]:
        """One job, or one array: submitit would make a plain SlurmExecutor for an array, which writes its own script."""
        self.folder.mkdir(parents=True, exist_ok=True)
        first = self._submit_command(start_command(self.script, self.folder))
        if self.script.tasks is None:
            return [first]
        return [self.job_class(self.folder, f"{first.job_id}_{task}") for task in range(len(delayed_submissions))]


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


def submit(folder: Path, script: Script, specs: Sequence[Path]) -> list[str]:
    """Submit one job a spec, as one array where there are several, and return their ids in order.

    Slurm ids look like "123" or "123_4"; a local id is the controller's process id. Raises SlurmError where Slurm cannot
    be reached or refuses; nothing is queued then.
    """
    local = script.partition.executor == "local"
    make: Callable[[Path, Script], submitit.SlurmExecutor | submitit.LocalExecutor]
    make = DetachedExecutor if local else ScriptExecutor
    with _refusals():
        jobs = make(folder, script).map_array(RunJob(), [str(path) for path in specs])
    return [str(job.job_id) for job in jobs]


def submit_command(script: Script, command: str) -> str:
    """Submit a single job that runs this shell command where a worker's would stand, and return its id. Raises SlurmError
    where Slurm cannot be reached or refuses."""
    script.logs.mkdir(parents=True, exist_ok=True)
    with _refusals():
        job = ScriptExecutor(script.logs, script)._submit_command(command)
    return str(job.job_id)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Slurm's refusals, and its absence, as SlurmError. submitit prints Slurm's complaint as well as raising it: one message
    is enough."""
    try:
        with environment_for_slurm(), contextlib.redirect_stderr(io.StringIO()):
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        raise refusal(str(error)) from None
    except FileNotFoundError as error:
        if error.filename not in ("sbatch", "srun"):
            raise
        raise SlurmError(f"{error.filename} was not found on this machine", NO_SLURM) from None
    except RuntimeError as error:
        if "srun" not in str(error):
            raise
        raise SlurmError("Slurm's commands were not found on this machine", NO_SLURM) from None


@contextlib.contextmanager
def environment_for_slurm() -> Iterator[None]:
    """Take SBATCH_* and an enclosing job's SLURM_* out of the environment: they would beat what the script says.

    SLURM_CONF says which cluster this is, so it stays.
    """
    conf = os.environ.get("SLURM_CONF")
    with clean_env():
        if conf is not None:
            os.environ["SLURM_CONF"] = conf
        yield


def refusal(spoken: str) -> SlurmError:
    """Slurm's own words and what to change."""
    lines = [line.strip() for line in spoken.splitlines() if line.strip()]
    said = [re.sub(r"^(sbatch|srun): (error: )?", "", line) for line in lines if "error" in line.lower()] or lines
    message = "; ".join(dict.fromkeys(said)) or "sbatch failed without a word"
    known = diagnose.of_refusal(message)
    error = SubmitLimitError if known is not None and known.kind == diagnose.AT_A_LIMIT else SlurmError
    remedy = known.remedy if known is not None else "labctl render prints the script: correct what Slurm names"
    return error(f"Slurm refused the job: {message}", remedy)
