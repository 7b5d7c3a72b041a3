"""What the site allows: how long an array may be, how long a job of a partition may last. Asked from Slurm, once a process."""

from __future__ import annotations

import getpass
import re
from collections.abc import Collection, Sequence
from functools import cache

from labctl_slurm import command, site
from labctl_slurm.errors import SlurmError
from labctl_slurm.partitions import Partition, in_slurms_form, seconds
from labctl_slurm.site import SlurmPartition

UNLIMITED_S = 365 * 86400
DEFAULT_MAX_ARRAY_SIZE = 1001  # Slurm's own, where it does not answer


@cache
def max_array_size() -> int:
    """The most tasks that one array may have: the site's MaxArraySize; 1 where it allows no arrays."""
    told = _configuration().get("MaxArraySize", "")
    return max(1, int(told)) if told.isdigit() else DEFAULT_MAX_ARRAY_SIZE


def array_size(partition: Partition) -> int:
    """The most tasks of an array of this partition: 1 where it takes no arrays."""
    return max_array_size() if partition.arrays else 1


@cache
def _configuration() -> dict[str, str]:
    """Slurm's configuration; empty where Slurm does not answer."""
    try:
        return site.configuration()
    except SlurmError:
        return {}


@cache
def most_jobs() -> int | None:
    """The most jobs that this user may have in the queue: MaxSubmitJobs of the associations, or of the QOS that an association
    takes by default, whichever is less; of several associations the largest. None where the accounting sets no such limit, or
    does not answer."""
    cluster = _configuration().get("ClusterName")
    here = [f"cluster={cluster}"] if cluster else []
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
    """The longest time that a job of this partition may ask for, in seconds: its `max_time`, else Slurm's MaxTime (see
    `_longest`). Where neither says, the partition's `time`: no more is known to be allowed."""
    if partition.max_time:
        return seconds(partition.max_time)
    if partition.executor != "slurm":
        return partition.time_limit_s
    limits = [_max_time_s(name) for name in partition.slurm_names]
    known = [limit for limit in limits if limit is not None]
    return max(_longest(known), 60) if known else partition.time_limit_s


def _longest(limits: Collection[int]) -> int:
    """What a job may ask for that may start in any of several partitions of Slurm's: the longest of their limits, for one that
    allows the time is enough; the shortest where the site refuses a job that is above any of them (EnforcePartLimits=ALL)."""
    several = len(set(limits)) > 1
    return min(limits) if several and _configuration().get("EnforcePartLimits") == "ALL" else max(limits)


def above_limit(time: str, found: Sequence[SlurmPartition]) -> str:
    """Why a job of this time would pend for ever in these partitions of Slurm's, or be refused; "" where it would not."""
    if not found:
        return ""
    limits = {UNLIMITED_S if partition.max_time_s is None else partition.max_time_s: partition for partition in found}
    longest_s = _longest(limits)
    if seconds(time) <= longest_s or longest_s == UNLIMITED_S:
        return ""
    return (
        f"the time limit {time} is above the {in_slurms_form(longest_s)} of Slurm's partition {limits[longest_s].name}"
    )


@cache
def _max_time_s(slurm_partition: str) -> int | None:
    """None where Slurm does not tell; UNLIMITED_S where it sets no limit."""
    found = re.search(r"\bMaxTime=(\S+)", _output("scontrol", "show", "partition", slurm_partition))
    if found is None:
        return None
    if found[1] == "UNLIMITED":
        return UNLIMITED_S
    try:
        return seconds(found[1])
    except ValueError:
        return None


def _output(*arguments: str) -> str:
    """What it printed; nothing where it failed."""
    try:
        done = command.ask(*arguments)
    except SlurmError:
        return ""
    return done.stdout if done.returncode == 0 else ""
