"""Limits of the site: array size, jobs per user, time of a job. Each is queried from Slurm once per process."""

from __future__ import annotations

import getpass
import re
from collections.abc import Collection, Sequence
from functools import cache

from labctl_slurm import command, site
from labctl_slurm.errors import SlurmError
from labctl_slurm.partitions import Partition, seconds, slurm_time
from labctl_slurm.site import SlurmPartition

UNLIMITED_S = 365 * 86400
DEFAULT_MAX_ARRAY_SIZE = 1001  # Slurm's default


@cache
def max_array_size(cluster: str = "") -> int:
    """The most tasks of an array: the site's MaxArraySize, at least 1."""
    size = _configuration(cluster).get("MaxArraySize", "")
    return max(1, int(size)) if size.isdigit() else DEFAULT_MAX_ARRAY_SIZE


def array_size(partition: Partition) -> int:
    """The most tasks of an array of this partition: 1 where it takes no arrays."""
    return max_array_size(partition.cluster) if partition.arrays else 1


@cache
def _configuration(cluster: str) -> dict[str, str]:
    """Slurm's configuration; empty without an answer."""
    try:
        return site.configuration(cluster)
    except SlurmError:
        return {}


@cache
def most_jobs(cluster: str = "") -> int | None:
    """The most jobs of this user in the queue: the lesser MaxSubmitJobs of an association and its default QOS; of several
    associations the largest. None without such a limit, and without an answer of the accounting."""
    cluster = cluster or _configuration(cluster).get("ClusterName", "")
    here = [f"cluster={cluster}"] if cluster else []
    where = ["where", f"user={getpass.getuser()}", *here, "format=MaxSubmitJobs,DefaultQOS,QOS"]
    associations = _output("sacctmgr", "--noheader", "--parsable2", "show", "associations", *where).splitlines()
    limits = [_most_jobs_of(line.split("|")) for line in associations if line.count("|") == 2]
    return max(limit for limit in limits if limit is not None) if limits and None not in limits else None


def _most_jobs_of(association: list[str]) -> int | None:
    """The limit of one association: (MaxSubmitJobs, its default QOS, its allowed QOS)."""
    own, default, allowed = association
    qos = default or (allowed if "," not in allowed else "")
    limits = [own, *(_most_jobs_of_qos(qos) if qos else ())]
    return min((int(limit) for limit in limits if limit.isdigit()), default=None)


@cache
def _most_jobs_of_qos(name: str) -> list[str]:
    """MaxSubmitJobs of a QOS per user and per account."""
    form = "format=MaxSubmitJobsPU,MaxSubmitJobsPA"
    return (
        _output("sacctmgr", "--noheader", "--parsable2", "show", "qos", "where", f"name={name}", form)
        .strip()
        .split("|")
    )


def time_limit_s(partition: Partition) -> int:
    """The largest time limit of a job of this partition, in seconds: its `max_time`, else Slurm's MaxTime (see `_longest`), else
    its `time`."""
    if partition.max_time:
        return seconds(partition.max_time)
    if partition.executor != "slurm":
        return partition.time_limit_s
    limits = [_max_time_s(name, partition.cluster) for name in partition.slurm_names]
    known = [limit for limit in limits if limit is not None]
    return max(_longest(known, partition.cluster), 60) if known else partition.time_limit_s


def _longest(limits: Collection[int], cluster: str) -> int:
    """The largest time limit of a job that several of Slurm's partitions may start: the longest of their limits, or with
    EnforcePartLimits=ALL the shortest."""
    several = len(set(limits)) > 1
    return min(limits) if several and _configuration(cluster).get("EnforcePartLimits") == "ALL" else max(limits)


def above_limit(partition: Partition, found: Sequence[SlurmPartition]) -> str:
    """A message for a time limit above that of these partitions of Slurm, whose job would never start; "" for any other."""
    if not found:
        return ""
    limits = {UNLIMITED_S if one.max_time_s is None else one.max_time_s: one for one in found}
    longest_s = _longest(limits, partition.cluster)
    if partition.time_limit_s <= longest_s or longest_s == UNLIMITED_S:
        return ""
    return f"time limit above that of Slurm's partition {limits[longest_s].name} ({slurm_time(longest_s)}): {partition.time}"


@cache
def _max_time_s(slurm_partition: str, cluster: str) -> int | None:
    """MaxTime in seconds; UNLIMITED_S without a limit, None without an answer."""
    found = re.search(r"\bMaxTime=(\S+)", _output("scontrol", "show", "partition", slurm_partition, cluster=cluster))
    if found is None:
        return None
    if found[1] == "UNLIMITED":
        return UNLIMITED_S
    try:
        return seconds(found[1])
    except ValueError:
        return None


def _output(*arguments: str, cluster: str = "") -> str:
    """The output of a command; "" where it fails."""
    try:
        done = command.ask(*arguments, cluster=cluster)
    except SlurmError:
        return ""
    return done.stdout if done.returncode == 0 else ""
