"""Sites that want a job in another form: init finds it, submit runs in it, a refusal names it. Real Slurm, behind a wrapper
around sbatch that refuses what such a site refuses: the one fake here."""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_checkpoint
from tests.vllm_package import vllm_installed  # noqa: F401  a fixture

from .conftest import CPU_PARTITIONS, Lab, own_engine_sleeps, own_settings, requested, sleeping, states, until

REFUSES = """\
#!/bin/bash
# Refuses scripts as a site's own rules do, and passes all others on to the real sbatch.
last="${{@: -1}}"
if [ -f "$last" ]; then script=$(cat "$last"); else script=$(cat); fi
{rules}
if [ -f "$last" ]; then exec {sbatch} "$@"; fi
exec {sbatch} "$@" <<< "$script"
"""
RULE = """\
if {no}grep -qE '^#SBATCH {pattern}' <<< "$script"; then
  echo "sbatch: error: {said}" >&2
  echo "sbatch: error: Batch job submission failed: Unspecified error" >&2
  exit 1
fi
"""


@dataclass(frozen=True)
class Site:
    """What a site refuses (pattern of an option -> its words), what it demands, and the keys with which it takes jobs."""

    refuses: Mapping[str, str]
    keys: Mapping[str, str]
    demands: str = ""
    memory: str = ""  # of each GPU

    def wrapper(self, sbatch: str) -> str:
        rules = [RULE.format(no="", pattern=pattern, said=said) for pattern, said in self.refuses.items()]
        if self.demands:
            rules.append(RULE.format(no="! ", pattern=self.demands, said=f"use {self.demands}"))
        if self.memory:
            rules.append(f"export SBATCH_MEM_PER_GPU={self.memory}\n")
        return REFUSES.format(rules="".join(rules), sbatch=sbatch)


SITES = {
    "no gres": Site({"--gres": "use --gpus-per-node instead of --gres"}, {"gpu_request": "gpus-per-node"}),
    "gpus alone": Site(
        {"--gres": "no --gres here", "--gpus-per-node": "no --gpus-per-node here"}, {"gpu_request": "gpus"}
    ),
    "no memory": Site({"--mem": "memory follows from the GPUs"}, {"mem": "none"}),
    "memory of a GPU": Site({}, {"mem": "32768M per-gpu"}, demands="--mem-per-gpu"),
    "memory of a CPU": Site({}, {"mem": "8192M per-cpu"}, demands="--mem-per-cpu"),
    "no CPUs": Site({"--cpus-per-task": "CPUs follow from the GPUs"}, {"cpus_per_task": "none"}),
    "no environment": Site({"--export=ALL": "no environment from login nodes"}, {"export": "NONE"}),
    "no export": Site({"--export": "the option export is refused"}, {"export": "none"}),
    # As the documents of ARCHER2's GPU system demand.
    "GPUs alone": Site(
        {
            "--gres": "use --gpus",
            "--gpus-per-node": "use --gpus",
            "--mem": "memory follows from the GPUs",
            "--cpus-per-task": "CPUs follow from the GPUs",
            "--ntasks": "tasks follow from the GPUs",
        },
        {"gpu_request": "gpus", "mem": "none", "cpus_per_task": "none", "tasks": "none"},
        memory="8G",
    ),
}


@pytest.fixture
def at(fresh_lab: Lab, tmp_path: Path) -> Any:
    """Put the lab's labctl before a site."""

    def site(name: str) -> Lab:
        programs = tmp_path / "site"
        programs.mkdir()
        path = fresh_lab.cluster.env["PATH"]
        (programs / "sbatch").write_text(SITES[name].wrapper(str(shutil.which("sbatch", path=path))), encoding="utf-8")
        (programs / "sbatch").chmod(0o755)
        fresh_lab.environment["PATH"] = f"{programs}:{path}"
        return fresh_lab

    return site


@pytest.mark.parametrize("name", SITES)
def test_init_finds_the_form_in_which_a_site_takes_jobs_and_submit_runs_in_it(at: Any, name: str) -> None:
    lab = at(name)
    own_engine_sleeps(lab)
    model = str(write_checkpoint(lab.root / "model"))
    lab.ok("init", "--yes")
    text = (lab.root / "labctl.toml").read_text(encoding="utf-8")
    found = tomllib.loads(text)["partitions"]
    assert found["dgxh"] == found["dgx2"] == {"account": "eecs", **SITES[name].keys}
    for said in SITES[name].refuses.values():
        assert said in text or name == "gpus alone"  # whose second refusal nobody has to know
    lab.ok("submit", "-p", "dgxh", "--backend=hf", "--backend=vllm", "--model-id", model, "--wait")
    assert states(lab) == {"done": 2}
    assert not SITES[name].refuses.keys() & {f"--{option}" for option in requested(lab, "-p", "dgxh", model=model)}


@pytest.mark.nightly
@pytest.mark.usefixtures("vllm_installed")
def test_transformers_and_vllm_run_where_a_site_takes_gpus_alone(at: Any, smollm2: Path) -> None:
    """The test above has a stand-in for both engines."""
    lab = at("GPUs alone")
    own_settings(lab, CPU_PARTITIONS)
    lab.ok("init", "--yes")
    engines = ("--backend=hf", "--backend=vllm", "--dtype=float32", "--max-new-tokens=8")
    lab.ok("submit", "-p", "dgxh", *engines, "--model-id", str(smollm2), "--wait")
    assert states(lab) == {"done": 2}


@pytest.mark.parametrize("flags", [[], ["--no-preflight"]], ids=["preflight", "sbatch"])
@pytest.mark.parametrize("name", ["no memory", "GPUs alone"])
def test_a_refusal_names_the_keys_and_the_values_that_would_be_accepted(at: Any, name: str, flags: list[str]) -> None:
    lab = at(name)
    done = lab.labctl("submit", "-p", "dgxh", "--model-id", sleeping(lab), *flags)
    assert done.returncode == (4 if flags else 3), done.stderr
    said = " ".join(done.stderr.split())
    for key, value in SITES[name].keys.items():
        assert f'{key} = "{value}"' in said
    assert "in [partitions.dgxh]: Slurm accepts it" in said


def test_a_size_that_no_node_has_is_no_matter_of_the_form(fresh_lab: Lab) -> None:
    done = fresh_lab.labctl(
        "submit", "-p", "dgxh", "--model-id", sleeping(fresh_lab), "--no-preflight", "--mem", "9000G"
    )
    assert (done.returncode, "Slurm accepts it" in done.stderr) == (4, False)


def test_the_memory_of_a_gpu_is_asked_for_by_its_own_option(fresh_lab: Lab) -> None:
    model = sleeping(fresh_lab)
    settings = (fresh_lab.root / "labctl.toml").read_text(encoding="utf-8")
    keys = 'gpu_request = "gpus"\nmem = "1G per-gpu"\ncpus_per_task = "1 per-gpu"\n'
    fresh_lab.settings(settings.replace("[partitions.dgxh]\n", f"[partitions.dgxh]\n{keys}"))
    fresh_lab.ok("submit", "-p", "dgxh", "--model-id", model, "--wait")
    (run,) = fresh_lab.json("status")

    def accounted() -> set[str]:
        told = fresh_lab.cluster.run("sacct", "-n", "-X", "-P", "-j", run["slurm_id"], "--format=AllocTRES").stdout
        return set(told.strip().split(","))

    until(lambda: accounted() >= {"cpu=2", "mem=2G", "gres/gpu=2"})  # the accounting comes later than the job's end
    seen = fresh_lab.ok(
        "reserve", "-p", "dgxh", "--time", "5", "--", "bash", "-c", "echo $SLURM_CPUS_PER_TASK,$CUDA_VISIBLE_DEVICES"
    )
    assert re.fullmatch(r"2,\d,\d\n", seen)
