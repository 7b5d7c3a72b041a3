"""Call a command of Slurm: all in the same environment, which selects the cluster, and each with a time limit."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from labctl_slurm.errors import NO_SLURM, SlurmError

# Time limits of a query, of a change of queued jobs, and of sbatch. Without a controller, a command gives up after 9 s. While the
# controller's queue is full, sbatch tries again for 120 s before it prints the refusal.
QUERY_WITHIN_S, CHANGE_WITHIN_S, SBATCH_WITHIN_S = 10.0, 60.0, 150.0
SLOW_S = 5.0  # a query that fails after this time met a controller that does not answer: no more queries
TRY_LATER = "try again later; if it persists, ask the administrators"
# Variables that override options: SBATCH_PARTITION a line of the script, SINFO_FORMAT --format, SLURM_* of an enclosing job both.
_OVERRIDING = (
    "SLURM_", "SLURMD_", "SBATCH_", "SALLOC_", "SRUN_", "SINFO_", "SQUEUE_", "SACCT_", "SCONTROL_", "SUBMITIT_",
)  # fmt: skip
# Variables that select the cluster and the user.
_KEPT = ("SLURM_CLUSTERS", "SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")


@dataclass(frozen=True)
class Cluster:
    """The cluster of a job: its `name` in SLURM_CLUSTERS ("" for that of slurm.conf), and the path in SLURM_CONF ("" for
    Slurm's default)."""

    name: str = ""
    conf: str = ""


def selected(name: str = "") -> list[Cluster]:
    """The cluster with this name, else the one that the shell's environment selects; with several in SLURM_CLUSTERS, all of them:
    sbatch uses one."""
    conf = os.environ.get("SLURM_CONF", "")
    names = [name.strip() for name in (name or os.environ.get("SLURM_CLUSTERS", "")).split(",")]
    return [Cluster(name, conf) for name in dict.fromkeys(filter(None, names))] or [Cluster("", conf)]


def environment(cluster: Cluster | None = None) -> dict[str, str]:
    """The environment of every command of Slurm: this process's, without variables that override options. It selects
    `cluster`, or without one the cluster of the shell."""
    # Slurm reads an empty SLURM_CLUSTERS as a name.
    kept = {name: value for name, value in os.environ.items() if value or name not in _KEPT}
    kept = {name: value for name, value in kept.items() if name in _KEPT or not name.startswith(_OVERRIDING)}
    if cluster is None:
        return kept
    chosen = {"SLURM_CLUSTERS": cluster.name, "SLURM_CONF": cluster.conf}
    if cluster.conf and not Path(cluster.conf).is_file():
        del chosen["SLURM_CONF"]  # the path of a compute node, which this machine does not have
    kept = {name: value for name, value in kept.items() if name not in chosen}
    return {**kept, **{name: value for name, value in chosen.items() if value}}


def named(name: str) -> Cluster | None:
    """The cluster with this name; None for "", the cluster of the shell."""
    return selected(name)[0] if name else None


# Output in English, with absolute times, and with lists of tasks that are not cut at 64 characters.
_READABLE = {"LC_ALL": "C", "SLURM_TIME_FORMAT": "standard", "SLURM_BITSTR_LEN": "0"}


class NoAnswerError(SlurmError):
    """A command of Slurm exceeded its time limit."""


def run(
    arguments: Sequence[str],
    within_s: float,
    cluster: Cluster | None = None,
    *,
    script: str = "",
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm and return its output and exit status. `script` is its standard input, `env` replaces the
    environment for queries. Raises SlurmError for a command that cannot be started, NoAnswerError after `within_s` seconds."""
    program = arguments[0]
    env = {**environment(cluster), **_READABLE} if env is None else env
    # sacct alone does not read SLURM_CLUSTERS.
    clusters = [f"--clusters={env['SLURM_CLUSTERS']}"] if program == "sacct" and "SLURM_CLUSTERS" in env else []
    try:
        return subprocess.run(
            [program, *clusters, *arguments[1:]],
            env=env,
            input=script,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=within_s,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmError(f"command not found on this machine: {program}", NO_SLURM) from None
    except OSError as error:
        raise SlurmError(f"{program} cannot be started: {error.strerror}", NO_SLURM) from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"{program} did not answer within {within_s:.3g} s", TRY_LATER) from None


def error_text(errors: str) -> str:
    """The error output of a command of Slurm on one line, without the command's name."""
    lines = (re.sub(r"^[a-z]+: (error: )?", "", line).strip() for line in errors.splitlines())
    return " ".join(" ".join(filter(None, lines)).split())


def failed(done: subprocess.CompletedProcess[str], remedy: str = TRY_LATER) -> SlurmError:
    """The error of a command of Slurm that ended with an exit code."""
    return SlurmError(f"{done.args[0]} failed: {error_text(done.stderr) or f'exit code {done.returncode}'}", remedy)


def ask(*arguments: str, cluster: str = "", script: str = "") -> subprocess.CompletedProcess[str]:
    """`run` a query about the site, on the cluster with this name ("": that of the shell). After a query without answer, further
    queries of this process to the cluster raise SlurmError at once."""
    if cluster in _unanswered:
        raise SlurmError(_unanswered[cluster], TRY_LATER)
    began = time.monotonic()
    try:
        done = run(arguments, QUERY_WITHIN_S, named(cluster), script=script)
    except NoAnswerError as error:
        _unanswered[cluster] = error.message
        raise
    if done.returncode != 0 and time.monotonic() - began > SLOW_S:
        _unanswered[cluster] = failed(done).message
    return done


_unanswered: dict[str, str] = {}  # cluster -> error of the first query without answer
