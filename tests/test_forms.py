"""The search for the form of a job asks a bounded number of questions, and none that cannot help. A stub of sbatch refuses; in
tests/slurm a real one answers."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from labctl_slurm import forms
from labctl_slurm.forms import MOST_QUESTIONS, Change, Form, Search
from labctl_slurm.partitions import build
from labctl_slurm.render import Script

from .conftest import Labctl, Slurm

GREP = shutil.which("grep")  # a test has no PATH
Questions = Callable[[], int]


def script(name: str = "a100") -> Script:
    partition = build(name, [("labctl.toml", {"gpu": "A100"})])
    return Script(partition, "labctl", 2, None, Path("logs"), Path("code"), Path("templates"))


@pytest.fixture
def refusing(slurm: Slurm, workspace: object) -> Callable[[str, str], Questions]:
    """An sbatch that refuses scripts with this pattern; how often it was asked."""

    def stub(pattern: str, said: str) -> Questions:
        asked = slurm.folder / "asked"
        lines = [
            f"echo >> {shlex.quote(str(asked))}",
            f"if {GREP} -qE {shlex.quote(pattern)}; then echo 'sbatch: error: {said}' >&2; exit 1; fi",
        ]
        slurm._write("sbatch", "\n".join(lines) + "\n")
        return lambda: len(asked.read_text(encoding="utf-8").splitlines()) if asked.exists() else 0

    return stub


def test_a_job_that_is_accepted_is_one_question(refusing: Callable[[str, str], Questions]) -> None:
    questions = refusing("nothing of it", "no")
    assert Search().of(script()).changes == ()
    assert questions() == 1


def test_the_form_of_one_partition_is_tried_first_for_the_next(refusing: Callable[[str, str], Questions]) -> None:
    questions = refusing("^#SBATCH --mem", "memory follows from the GPUs")
    search = Search()
    assert search.of(script()).changes == (Change("mem", "none", "64G", "memory follows from the GPUs"),)
    before = questions()
    assert search.of(script("b200")).changes[0].value == "none"
    assert questions() - before == 3  # as it is, small, and as the other one


def test_a_site_that_refuses_every_form_is_asked_a_bounded_number_of_questions(
    refusing: Callable[[str, str], Questions],
) -> None:
    questions = refusing(".", "go away")
    search = Search()
    assert search.of(script()) == Form(False, message="go away")
    first = questions()
    for number in range(5):
        assert not search.of(script(f"gpu{number}")).accepted
    assert first <= 20
    assert questions() == MOST_QUESTIONS


@pytest.mark.parametrize("said", ["Invalid account or account/partition combination specified", "Invalid qos"])
def test_a_refusal_that_no_form_mends_is_one_question(refusing: Callable[[str, str], Questions], said: str) -> None:
    questions = refusing(".", said)
    assert Search().of(script()) == Form(False, message=said)
    assert questions() == 1
    assert forms.remedy(script(), said) == ""
    assert questions() == 1


def test_a_remedy_is_found_once_for_all_jobs_that_are_refused_alike(
    refusing: Callable[[str, str], Questions],
) -> None:
    questions = refusing("^#SBATCH --gres", "no gres")
    remedies = {forms.remedy(script("once"), "no gres") for _ in range(3)}
    assert remedies == {'set gpu_request = "gpus-per-node" in [partitions.once]: Slurm accepts it'}
    assert questions() == 3


def test_init_writes_the_form_below_slurms_reason(labctl: Labctl, slurm: Slurm, refusing: object) -> None:
    refusing("^#SBATCH --mem", "memory follows from the GPUs")  # type: ignore[operator]
    slurm.answers("sinfo", "gpu|up|1-00:00:00|2|idle|64|512000|(null)|gpu:a100:4|none\n")
    for program in ("scontrol", "sacctmgr"):
        slurm.answers(program, status=1)
    ran = labctl("init", "--print")
    assert ran.code == 0, ran.err
    assert '\n# Slurm refuses mem = "64G": memory follows from the GPUs\nmem = "none"\n' in ran.out
    assert '[partitions.gpu] has mem = "none"' in ran.err
