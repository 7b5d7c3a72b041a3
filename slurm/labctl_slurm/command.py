"""The one way to call a command of Slurm: in one environment, so that all ask the same cluster, and for a limited time."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from labctl_slurm.errors import NO_SLURM, SlurmError

# How long a question, a change of jobs in the queue, and sbatch may take. A controller that is down makes a command give up
# after 9 s by itself.
QUESTION_WITHIN_S, CHANGE_WITHIN_S, SBATCH_WITHIN_S = 10.0, 60.0, 120.0
SLOW_S = 5.0  # a failure after this long is a controller that does not answer: it is not asked again
TRY_LATER = "try again later, or ask the administrators"
# They would answer for us: SBATCH_PARTITION beats a script's own line, SINFO_FORMAT another's question, and an enclosing
# job's SLURM_* what the script says.
_ANSWERING = (
    "SLURM_",
    "SLURMD_",
    "SBATCH_",
    "SALLOC_",
    "SRUN_",
    "SINFO_",
    "SQUEUE_",
    "SACCT_",
    "SCONTROL_",
    "SUBMITIT_",
)
# They say which cluster the shell means, and who asks.
_KEPT = ("SLURM_CLUSTERS", "SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")


@dataclass(frozen=True)
class Cluster:
    """Where a job is: the `name` of a cluster as SLURM_CLUSTERS has it ("" for the one of slurm.conf), and the file that
    SLURM_CONF named ("" for Slurm's default)."""

    name: str = ""
    conf: str = ""

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "conf": self.conf}

    @classmethod
    def from_json(cls, document: Mapping[str, str]) -> Cluster:
        return cls(str(document.get("name", "")), str(document.get("conf", "")))


def meant() -> list[Cluster]:
    """The cluster that the shell means; several where SLURM_CLUSTERS names several, of which sbatch takes one."""
    conf = os.environ.get("SLURM_CONF", "")
    names = [name.strip() for name in os.environ.get("SLURM_CLUSTERS", "").split(",")]
    return [Cluster(name, conf) for name in dict.fromkeys(filter(None, names))] or [Cluster("", conf)]


def environment(cluster: Cluster | None = None) -> dict[str, str]:
    """The environment of every command of Slurm: this process's, without the variables that would change the question.
    It asks the cluster that the shell means, or the one that is given."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or not name.startswith(_ANSWERING)}
    if cluster is None:
        return kept
    chosen = {"SLURM_CLUSTERS": cluster.name, "SLURM_CONF": cluster.conf}
    if cluster.conf and not Path(cluster.conf).is_file():
        del chosen["SLURM_CONF"]  # a compute node's own copy: another machine has it elsewhere
    kept = {name: value for name, value in kept.items() if name not in chosen}
    return {**kept, **{name: value for name, value in chosen.items() if value}}


# Answers in English, with absolute times and whole lists of tasks (which are cut to 64 letters otherwise), whatever a site sets.
_READABLE = {"LC_ALL": "C", "SLURM_TIME_FORMAT": "standard", "SLURM_BITSTR_LEN": "0"}


class NoAnswerError(SlurmError):
    """A command of Slurm did not end in time."""


def run(
    arguments: Sequence[str],
    within_s: float,
    cluster: Cluster | None = None,
    *,
    script: str = "",
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """What a command of Slurm printed, and its exit status. `script` is its standard input, `env` another environment than the
    one for questions. Raises SlurmError where the command is not here, NoAnswerError where it does not end within `within_s`."""
    program = arguments[0]
    try:
        return subprocess.run(
            list(arguments),
            env={**environment(cluster), **_READABLE} if env is None else env,
            input=script,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=within_s,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmError(f"{program} was not found on this machine", NO_SLURM) from None
    except OSError as error:
        raise SlurmError(f"{program} cannot be started: {error.strerror}", NO_SLURM) from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"{program} did not answer within {within_s:.3g} s", TRY_LATER) from None


def ask(*arguments: str, script: str = "") -> subprocess.CompletedProcess[str]:
    """`run` a question about the site. Once a question has waited in vain, this process asks no further: it raises SlurmError at
    once."""
    if _waited_in_vain:
        raise SlurmError(_waited_in_vain[0], TRY_LATER)
    began = time.monotonic()
    try:
        done = run(arguments, QUESTION_WITHIN_S, script=script)
    except NoAnswerError as error:
        _waited_in_vain.append(error.message)
        raise
    if done.returncode != 0 and time.monotonic() - began > SLOW_S:
        _waited_in_vain.append(f"{arguments[0]}: {' '.join(done.stderr.split())}")
    return done


_waited_in_vain: list[str] = []  # what the first question that waited said
