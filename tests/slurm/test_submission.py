"""No job twice, none lost from sight: lost and odd answers of sbatch, renamed jobs, scripts sent by hand. On a real cluster."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import write_checkpoint

from .cluster import CLUSTER_NAME
from .conftest import Lab

LATER = ("--sbatch", "begin=now+1hour")
# What a site's wrapper, put before the real sbatch by this test, makes of its answer: fault injections, behind which the job is
# queued in earnest.
ANSWERS = {
    "lost": 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1',
    "nothing": "exit 0",
    "a bare number": 'echo "${out##* }"',
    "a cluster that is none": 'echo "${out##* };somewhere"',
    "a banner with a number": 'echo "Note: this is job 3 of the 50 that you may have"; echo "$out"',
    "the sentence after a number": 'echo 99; echo "Submitted batch job ${out##* }"',
}


@pytest.fixture
def own_lab(fresh_lab: Lab) -> Iterator[Lab]:
    write_checkpoint(fresh_lab.root / "model")
    yield fresh_lab
    for line in in_queue(fresh_lab):
        fresh_lab.cluster.run("scancel", line.split()[0])


def in_queue(lab: Lab) -> list[str]:
    return lab.cluster.run("squeue", "--noheader", "--format=%i %j").stdout.splitlines()


def submit(lab: Lab, *more: str, path: str = "") -> None:
    variables = {"PATH": f"{path}:{lab.cluster.env['PATH']}"} if path else {}
    lab.ok("submit", "-p", "dgxh", "--model-id", str(lab.root / "model"), *LATER, *more, **variables)


def wrapper(folder: Path, path: str, answer: str) -> str:
    folder.mkdir()
    program = folder / "sbatch"
    real = shutil.which("sbatch", path=path)
    trial = f'case " $* " in *" --test-only "*) exec {real} "$@";; esac'
    program.write_text(f'#!/bin/bash\n{trial}\nout=$({real} "$@") || exit $?\n{answer}\n', encoding="utf-8")
    program.chmod(0o755)
    return str(folder)


def test_a_job_whose_answer_is_lost_or_odd_is_queued_once_and_cancelled(own_lab: Lab, tmp_path: Path) -> None:
    path = own_lab.cluster.env["PATH"]
    for number, (name, answer) in enumerate(ANSWERS.items()):
        submit(own_lab, "--max-new-tokens", str(8 + number), path=wrapper(tmp_path / str(number), path, answer))
        (queued,) = in_queue(own_lab)
        (run,) = own_lab.json("status")
        assert (run["state"], run["slurm_id"]) == ("pending", queued.split()[0]), name
        own_lab.ok("retry")
        assert in_queue(own_lab) == [queued], name
        own_lab.ok("cancel", "--yes")
        assert in_queue(own_lab) == [], name


def test_a_renamed_job_is_followed_from_the_queue_to_the_accounting(own_lab: Lab) -> None:
    submit(own_lab)
    (queued,) = in_queue(own_lab)
    job_id = queued.split()[0]
    own_lab.cluster.run("scontrol", "update", f"jobid={job_id}", "jobname=my-llama", "comment=the site's | own")
    assert in_queue(own_lab) == [f"{job_id} my-llama"]
    (run,) = own_lab.json("status")
    assert (run["state"], run["slurm_id"]) == ("pending", job_id)
    own_lab.ok("retry")
    assert in_queue(own_lab) == [f"{job_id} my-llama"]
    own_lab.cluster.run("scancel", job_id)
    until = time.monotonic() + 30
    while (run := own_lab.json("status")[0])["state"] != "cancelled" or "by you" not in run["detail"]:
        assert time.monotonic() < until, run
        time.sleep(1)


def test_a_template_may_name_the_job(own_lab: Lab) -> None:
    (own_lab.root / "templates").mkdir()
    (own_lab.root / "templates" / "dgxh.sbatch.j2").write_text(
        '{% extends "base.sbatch.j2" %}\n{% block options %}\n{{ super() }}\n#SBATCH --job-name=my-llama\n{% endblock %}\n',
        encoding="utf-8",
    )
    submit(own_lab)
    (queued,) = in_queue(own_lab)
    assert queued.endswith(" my-llama")
    (run,) = own_lab.json("status")
    assert (run["state"], run["slurm_id"]) == ("pending", queued.split()[0])


def test_a_script_that_a_person_submitted_is_pending_and_not_queued_again(own_lab: Lab) -> None:
    flags = ("-p", "dgxh", "--model-id", str(own_lab.root / "model"))
    script = own_lab.root / "y"
    script.write_text(own_lab.ok("render", *flags), encoding="utf-8")
    own_lab.cluster.run("sbatch", "--hold", str(script))
    (queued,) = in_queue(own_lab)
    (run,) = own_lab.json("status", "--all")
    assert (run["state"], run["slurm_id"]) == ("pending", queued.split()[0])
    assert "to resubmit: 0" in own_lab.labctl("retry", run["run_id"]).stderr
    own_lab.ok("submit", *flags)
    assert in_queue(own_lab) == [queued]


def test_a_job_is_followed_on_the_cluster_that_the_shell_meant(own_lab: Lab) -> None:
    flags = ("-p", "dgxh", "--model-id", str(own_lab.root / "model"), *LATER)
    own_lab.ok("submit", *flags, SLURM_CLUSTERS=CLUSTER_NAME)
    (queued,) = in_queue(own_lab)
    (submitted,) = (own_lab.root / ".labctl").glob("arrays/*/submitted.json")
    (kept,) = json.loads(submitted.read_text(encoding="utf-8"))["clusters"]
    assert kept == {"name": CLUSTER_NAME, "conf": own_lab.cluster.env["SLURM_CONF"]}
    for meant in ({}, {"SLURM_CLUSTERS": CLUSTER_NAME}, {"SLURM_CLUSTERS": "elsewhere"}):
        (run,) = own_lab.json("status", **meant)
        assert (run["state"], run["slurm_id"]) == ("pending", queued.split()[0]), meant
    own_lab.ok("cancel", "--yes", SLURM_CLUSTERS="elsewhere")
    assert in_queue(own_lab) == []
