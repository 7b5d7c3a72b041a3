"""What the site allows, read from what real Slurm (22.05) prints; `scontrol` is a fake here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labctl_slurm import command, limits, partitions, site
from labctl_slurm.partitions import Partition

CONFIG = """\
Configuration data as of 2026-11-23T07:10:00
LaunchParameters        = (null)
MaxArraySize            = 101
MaxJobCount             = 10000
"""
PARTITION = """\
PartitionName=dgxh
   AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL
   MaxNodes=UNLIMITED MaxTime={} MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED
"""


@pytest.fixture(autouse=True)
def nothing_is_remembered() -> Iterator[None]:
    cached = (
        limits.max_array_size,
        limits.most_jobs,
        limits._configuration,
        limits._max_time_s,
        limits._most_jobs_of_qos,
    )
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()
    command._unanswered.clear()


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH; the file that a test writes there is scontrol."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "scontrol"


def says(scontrol: Path, output: str, status: int = 0) -> None:
    kept = scontrol.with_name("output")
    kept.write_text(output, encoding="utf-8")
    scontrol.write_text(f"#!/bin/sh\n/bin/cat {kept}\nexit {status}\n", encoding="utf-8")
    scontrol.chmod(0o755)


def dgxh(**values: Any) -> Partition:
    return partitions.build("dgxh", [("shipped", partitions.shipped()["dgxh"]), ("test", values)])


def test_an_array_is_as_long_as_the_site_allows(scontrol: Path) -> None:
    says(scontrol, CONFIG)
    assert limits.max_array_size() == 101


@pytest.mark.parametrize("status", [None, 1], ids=["no scontrol", "no controller"])
def test_a_slurm_that_does_not_answer_is_taken_for_one_with_its_own_default(scontrol: Path, status: int | None) -> None:
    if status is not None:
        says(scontrol, CONFIG, status)
    assert limits.max_array_size() == 1001
    assert limits.time_limit_s(dgxh()) == 3600  # the partition's time: no more is known to be allowed


def test_a_controller_that_lets_us_wait_in_vain_is_asked_once(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "SLOW_S", 0.2)
    calls = scontrol.with_name("calls")
    scontrol.write_text(f"#!/bin/sh\necho x >> {calls}\n/bin/sleep 0.3\nexit 1\n", encoding="utf-8")
    scontrol.chmod(0o755)
    assert limits.time_limit_s(dgxh()) == 3600
    assert limits.max_array_size() == 1001
    assert calls.read_text(encoding="utf-8") == "x\n"


def test_a_site_without_arrays_gets_jobs_one_by_one(scontrol: Path) -> None:
    says(scontrol, CONFIG.replace("101", "0"))
    assert limits.max_array_size() == 1


@pytest.mark.parametrize(
    ("told", "seconds"), [("2-00:00:00", 172800), ("01:30:00", 5400), ("UNLIMITED", 365 * 86400), ("sometimes", 3600)]
)
def test_the_longest_time_is_slurms(scontrol: Path, told: str, seconds: int) -> None:
    says(scontrol, PARTITION.format(told))
    assert limits.time_limit_s(dgxh()) == seconds


def test_a_max_time_of_the_settings_is_believed_and_slurm_not_asked(scontrol: Path) -> None:
    assert limits.time_limit_s(dgxh(max_time="0-04:00:00")) == 4 * 3600


@pytest.mark.parametrize(
    ("enforced", "seconds"), [("NO", 7200), ("ANY", 7200), ("ALL", 3600)], ids=["no", "any", "all"]
)
def test_of_several_partitions_the_longest_counts_but_where_the_site_refuses_what_is_above_one(
    scontrol: Path, enforced: str, seconds: int
) -> None:
    """The question of the launcher and the one of the preflight check have one answer."""
    scontrol.write_text(
        f"#!/bin/sh\ncase $* in *config) echo 'EnforcePartLimits = {enforced}';;"
        " *short) echo MaxTime=01:00:00;; *) echo MaxTime=02:00:00;; esac\n",
        encoding="utf-8",
    )
    scontrol.chmod(0o755)
    assert limits.time_limit_s(dgxh(slurm_partition="short,long")) == seconds
    found = [site.SlurmPartition("short", "up", 3600, ()), site.SlurmPartition("long", "up", 7200, ())]
    assert bool(limits.above_limit(dgxh(time="1:30:00"), found)) == (seconds == 3600)


def test_a_local_partition_has_its_own_time() -> None:
    local = partitions.build("local", [("shipped", partitions.shipped()["local"])])
    assert limits.time_limit_s(local) == local.time_limit_s


@pytest.mark.parametrize(
    ("told", "qos", "most"),
    [
        ("30|normal|normal\n", "|", 30),
        ("30||\n500||\n", "|", 500),
        ("30||\n|normal|normal\n", "|", None),
        ("|normal|normal\n", "|", None),
        ("|normal|normal\n", "2|", 2),
        ("|normal|normal\n", "|3", 3),
        ("30|normal|normal\n", "2|", 2),
        ("1|normal|normal\n", "2|", 1),
        ("||normal\n", "2|", 2),
        ("||normal,long\n", "2|", None),
        ("", "", None),
        ("sacctmgr: no\n", "", None),
    ],
    ids=["a limit", "two accounts", "one account without", "no limit", "of the QOS", "of the QOS by account", "QOS is less",
         "QOS is more", "one QOS", "which QOS is open", "no association", "words"],
)  # fmt: skip
def test_the_most_jobs_are_those_of_the_accounting(scontrol: Path, told: str, qos: str, most: int | None) -> None:
    sacctmgr = scontrol.with_name("sacctmgr")
    sacctmgr.write_text(f"#!/bin/sh\ncase $* in *qos\\ where*) echo '{qos}';; *) printf '{told}';; esac\n")
    sacctmgr.chmod(0o755)
    assert limits.most_jobs() == most


def test_without_accounting_no_limit_is_known(scontrol: Path) -> None:
    assert limits.most_jobs() is None
