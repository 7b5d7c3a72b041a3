"""Preflight: what it finds, and what submit does with it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from labctl_orchestrator.preflight import run_checks
from labctl_orchestrator.preflight.finding import Finding, Subject
from labctl_orchestrator.request import plan
from labctl_orchestrator.request.request import SubmissionSpec
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import PreflightError

from .conftest import Labctl, Slurm


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return Subject(Workspace(tmp_path), SubmissionSpec(), {}, plan.Plan([]))


def test_findings_come_in_the_order_of_the_checks_and_each_once(subject: Subject) -> None:
    twice = [Finding("warn", "a"), Finding("warn", "a")]
    found = run_checks.findings(subject, {"one": lambda s: twice, "two": lambda s: [Finding("refuse", "b", "do c")]})
    assert found == [Finding("warn", "a", "", "one"), Finding("refuse", "b", "do c", "two")]


def test_checks_run_at_the_same_time(subject: Subject) -> None:
    both = threading.Barrier(2, timeout=5)

    def check(asked: Subject) -> list[Finding]:
        both.wait()
        return []

    assert run_checks.findings(subject, {"one": check, "two": check}) == []


def test_a_check_that_does_not_answer_is_told_of_and_not_waited_for(subject: Subject) -> None:
    ended = threading.Event()

    def silent(asked: Subject) -> list[Finding]:
        ended.wait(30)
        return []

    began = time.monotonic()
    (found,) = run_checks.findings(subject, {"slurm": silent}, within_s=0.05)
    assert time.monotonic() - began < 5
    assert (found.severity, found.check) == ("warn", "slurm")
    assert "0.05 s" in found.what
    ended.set()


def test_an_error_with_a_remedy_is_a_refusal_and_any_other_is_no_reason_to_refuse(subject: Subject) -> None:
    def refusing(asked: Subject) -> list[Finding]:
        raise PreflightError("it cannot", "do otherwise")

    def broken(asked: Subject) -> list[Finding]:
        raise KeyError("x")

    refused, warned = run_checks.findings(subject, {"one": refusing, "two": broken})
    assert refused == Finding("refuse", "it cannot", "do otherwise", "one")
    assert warned.severity == "warn"
    assert "KeyError" in warned.what


def test_force_overrides_what_labctl_only_thinks_impossible() -> None:
    found = [Finding("refuse", "a"), Finding("doubt", "b"), Finding("warn", "c")]
    assert [f.what for f in run_checks.refusals(found, force=False)] == ["a", "b"]
    assert [f.what for f in run_checks.refusals(found, force=True)] == ["a"]


# ---------------------------------------------------------------- what a submission takes, and when it starts

SINFO = "dgxh|{}|2-00:00:00|4|idle|128|1000000|(null)|gpu:h100:8|none\n"
ESTIMATE = "sbatch: Job 7 to start at {} using 8 processors on nodes dgxh-1 in partition dgxh\n"


@pytest.mark.parametrize(
    ("state", "start", "said"),
    [
        ("up", "2031-05-06T07:08:09", "Slurm expects a job of partition dgxh to start at 2031-05-06 07:08\n"),
        ("up", "2021-05-06T07:08:09", "Slurm expects a job of partition dgxh to start now\n"),
        ("down", "2031-05-06T07:08:09", ""),
        ("up", "", ""),
    ],
)
def test_the_expected_start_is_printed(
    labctl: Labctl,
    slurm: Slurm,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    start: str,
    said: str,
) -> None:
    monkeypatch.delenv("LABCTL_NO_PREFLIGHT")
    slurm.answers("sinfo", SINFO.format(state))
    slurm.answers("sbatch", errors=ESTIMATE.format(start) if start else "")
    ran = labctl("submit", "-p", "dgxh", "--model-id", checkpoint, "--dry-run")
    assert ("Slurm expects" in ran.err, said in ran.err) == (bool(said), True)
    assert f"warning: {said}" not in ran.err or not said


SLICED = "dgxh|up|2-00:00:00|4|idle|128|1000000|(null)|{}|none\n"  # as sinfo prints it at a site with MIG; recorded
SLICES, BOTH = "gpu:1g.10gb:14(S:0-1)", "gpu:h100:4(S:0-1),gpu:h100_1g.10gb:7(S:1)"
CHOSEN = 'gpu_type = "1g.10gb"\ngpu_memory_gib = 10'


@pytest.mark.parametrize(
    ("gres", "settings", "flags", "said"),
    [
        (SLICES, "", (), "labctl: the GPUs of Slurm's partition dgxh are MIG slices: 1g.10gb"),
        (BOTH, "", (), "warning: some GPUs of Slurm's partition dgxh are MIG slices: h100_1g.10gb"),
        (BOTH, 'gpu_type = "h100"', (), ""),
        (SLICES, CHOSEN, (), "labctl: gpu_type '1g.10gb' is a MIG slice: CUDA shows a process one slice, not 2"),
        (SLICES, CHOSEN, ("--gpus", "1"), ""),
        (
            SLICES,
            'gpu_type = "1g.10gb"',
            ("--gpus", "1"),
            "warning: gpu_memory_gib of [partitions.dgxh] is 80, but a slice",
        ),
        (SLICES, CHOSEN, ("--gpus", "1", "--backend", "vllm"), "labctl: vLLM reads no UUID of a MIG slice"),
    ],
    ids=["slices", "both", "whole ones", "two slices", "one slice", "its memory", "vllm"],
)
def test_mig_slices_are_refused_unless_one_was_chosen(
    labctl: Labctl, slurm: Slurm, workspace: Workspace, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, gres: str,
    settings: str, flags: tuple[str, ...], said: str,
) -> None:  # fmt: skip
    monkeypatch.delenv("LABCTL_NO_PREFLIGHT")
    workspace.settings_file.write_text(f"[partitions.dgxh]\n{settings}\n", encoding="utf-8")
    slurm.answers("sinfo", SLICED.format(gres))
    slurm.answers("sbatch")
    ran = labctl("submit", "-p", "dgxh", "--model-id", checkpoint, "--dry-run", *flags)
    assert said in " ".join(ran.err.split())
    assert said or "MIG" not in ran.err


@pytest.mark.parametrize(
    ("flags", "hours"),
    [
        (("-t", "0-01:00:00"), ", at most 2 GPU-hours"),
        (("-t", "0-00:15:00", "--gpus", 1, "--gpus", 4), ", at most 1.2 GPU-hours"),
        (
            (
                "-t",
                "0-00:30:00",
            ),
            ", at most 1 GPU-hour",
        ),
    ],
)
def test_the_gpu_hours_are_time_limits_times_gpus(
    labctl: Labctl, slurm: Slurm, checkpoint: Path, flags: tuple[str, ...], hours: str
) -> None:
    slurm.accepts()
    ran = labctl("submit", "-p", "dgxh", "--model-id", checkpoint, "--no-preflight", *flags)
    (line,) = [line for line in ran.err.splitlines() if line.startswith("queued")]
    assert line.endswith(f"){hours}")


def test_a_job_without_slurm_has_no_gpu_hours(labctl: Labctl, checkpoint: Path) -> None:
    ran = labctl("submit", "-p", "local", "--model-id", checkpoint, "--no-preflight", "--dry-run")
    assert "GPU-hour" not in ran.out + ran.err
