"""What the site allows: how long an array may be, how long a job of a partition may last. Asked from Slurm, once a process."""

from __future__ import annotations

import getpass
import re
import subprocess
import time
from functools import cache

from labctl_slurm import command
from labctl_slurm.partitions import Partition, seconds

ANSWER_WITHIN_S = 10.0
SLOW_S = 2.0  # a failure after this long is a controller that does not answer: it is not asked again
DEFAULT_MAX_ARRAY_SIZE = 1001  # Slurm's own, where it does not answer


@cache
def max_array_size() -> int:
    """The most tasks that one array may have: the site's MaxArraySize; 1 where it allows no arrays."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _scontrol("show", "config"), re.MULTILINE)
    return max(1, int(found[1])) if found else DEFAULT_MAX_ARRAY_SIZE


@cache
def most_jobs() -> int | None:
    """The most jobs that this user may have in the queue: MaxSubmitJobs of the associations, or of the QOS that an association
    takes by default, whichever is less; of several associations the largest. None where the accounting sets no such limit, or
    does not answer."""
    cluster = re.search(r"^ClusterName\s*=\s*(\S+)", _scontrol("show", "config"), re.MULTILINE)
    here = [f"cluster={cluster[1]}"] if cluster else []
    where = ["where", f"user={getpass.getuser()}", *here, "format=MaxSubmitJobs,DefaultQOS,QOS"]
    told = _output("sacctmgr", "--noheader", "--parsable2", "show", "associations", *where).splitlines()
    limits = [_least(line.split("|")) for line in told if line.count("|") == 2]
    return max(limit for limit in limits if limit is not None) if limits and None not in limits else None


def _least(association: list[str]) -> int | None:
    """The limit of one association: (MaxSubmitJobs, its default QOS, the QOS that it may take)."""
    own, default, allowed = association
    named = default or (allowed if "," not in allowed else "")
    limits = [own, *(_of_qos(named) if named else ())]
    return min((int(limit) for limit in limits if limit.isdigit()), default=None)


@cache
def _of_qos(name: str) -> list[str]:
    """MaxSubmitJobs of a QOS, for each user and for each account."""
    told = _output(
        "sacctmgr", "--noheader", "--parsable2", "show", "qos", "where", f"name={name}",
        "format=MaxSubmitJobsPU,MaxSubmitJobsPA",
    )  # fmt: skip
    return told.strip().split("|")


def time_limit_s(partition: Partition) -> int:
    """The longest time that a job of this partition may ask for, in seconds: its `max_time`, else Slurm's MaxTime (of
    several Slurm partitions, the shortest). Where neither says, the partition's `time`: no more is known to be allowed."""
    if partition.max_time:
        return seconds(partition.max_time)
    if partition.executor != "slurm":
        return partition.time_limit_s
    limits = [_max_time_s(name) for name in partition.slurm_partition.split(",")]
    known = [limit for limit in limits if limit is not None]
    return max(min(known), 60) if known else partition.time_limit_s


@cache
def _max_time_s(slurm_partition: str) -> int | None:
    """None where Slurm does not tell; a year where it sets no limit."""
    found = re.search(r"\bMaxTime=(\S+)", _scontrol("show", "partition", slurm_partition))
    if found is None:
        return None
    if found[1] == "UNLIMITED":
        return 365 * 86400
    try:
        return seconds(found[1])
    except ValueError:
        return None


def _scontrol(*arguments: str) -> str:
    """What it printed; nothing where it failed, or where the controller has let us wait in vain before."""
    if _waited_in_vain:
        return ""
    began = time.monotonic()
    output = _output("scontrol", *arguments)
    if not output and time.monotonic() - began > SLOW_S:
        _waited_in_vain.append(arguments)
    return output


_waited_in_vain: list[tuple[str, ...]] = []


def _output(*arguments: str) -> str:
    try:
        done = subprocess.run(
            arguments,
            env={**command.environment(), "LC_ALL": "C"},
            capture_output=True,
            text=True,
            timeout=ANSWER_WITHIN_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
