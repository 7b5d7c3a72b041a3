"""Like is paired with like, in compare and in the report: sweeps from the real planner, measured into a real workspace."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.report.draw import compared
from labctl_orchestrator.report.findings import Findings, ReportScope, gather
from labctl_orchestrator.report.page import _lead
from labctl_orchestrator.request import sweep as sweeps
from labctl_orchestrator.request.plan import Device, make_plan
from labctl_orchestrator.request.request import Axes, SubmissionSpec
from labctl_orchestrator.store.collect import collect
from labctl_orchestrator.store.database import open_store
from labctl_slurm import partitions
from labctl_workers.record import JobSpec, ModelRef, RunSpec

from .conftest import Labctl, Records, measured

RATE = "output_tok_s"
MODELS = {name: ModelRef(name, path=f"/models/{name}", fingerprint=name * 8) for name in ("one", "two")}
CAPABILITIES = {"dgx2": "7.0", "dgxh": "9.0"}
Names = set[tuple[str, str]]


def plan(**values: Any) -> list[JobSpec]:
    """The jobs of a request, with the shipped partitions; `local` is a machine without a GPU."""
    request = SubmissionSpec(**{"partition": ("dgx2", "dgxh"), "model_id": ("one",), **values})
    tables = {name: partitions.build(name, [("shipped", partitions.shipped()[name])]) for name in request.partition}

    def device(partition: partitions.Partition) -> Device:
        return Device("cpu") if partition.executor == "local" else Device("cuda", CAPABILITIES[partition.name])

    return make_plan(sweeps.Sweep(request), tables, {(name, "main"): ref for name, ref in MODELS.items()}, device).jobs


def named(job: JobSpec, run: RunSpec) -> str:
    """A run in words, by all that differs in this file."""
    options = "".join(f" {key}={value}" for key, value in job.engine_options.items())
    return f"{job.partition} {job.backend} {job.model.name} {job.dtype} {job.gpus} {run.batch_size}{options}"


def measure(
    records: Records, jobs: Sequence[JobSpec], *, without: Sequence[str] = (), name: str = "sweep", first_id: int = 1000
) -> None:
    """Records of all runs but those named: dgxh is three times as fast, vllm twice."""
    for number, (partition, of_partition) in enumerate(groupby(jobs, key=lambda job: job.partition)):
        slurm_id = str(first_id + number)
        batch = records.submit(slurm_id, name=f"{name}-{partition}", planned=list(of_partition))
        for task, job in enumerate(batch.jobs):
            task_id = slurm_id if len(batch.jobs) == 1 else f"{slurm_id}_{task}"
            attempt = records.attempt(batch, task, slurm_id=task_id)
            for run in job.runs:
                if named(job, run) not in without:
                    repeats = [measured(repeat) for repeat in range(3)]
                    for repeat in repeats:
                        times = (3.0 if partition == "dgxh" else 1.0) * (2.0 if job.backend == "vllm" else 1.0)
                        tok_s = times * run.batch_size * (100.0 + repeat.repeat / 10)
                        repeat.wall_s = len(repeat.samples[0].token_ids) / tok_s
                    fingerprint = {
                        "packages": {"torch": "2.9.0"}, "effective_dtype": job.dtype, "attention": "sdpa",
                        "gpus": [{"name": f"GPU of {partition}"}] * job.gpus,
                    }  # fmt: skip
                    records.done(batch, attempt, run, repeats=repeats, fingerprint=fingerprint)


class Sweep:
    """What compare and the report make of a workspace, with runs in words."""

    def __init__(self, labctl: Labctl, records: Records) -> None:
        self.labctl, self.records = labctl, records
        self.words: dict[str, str] = {}

    def measure(self, jobs: Sequence[JobSpec], **more: Any) -> None:
        measure(self.records, jobs, **more)
        self.words |= {run.run_id: named(job, run) for job in jobs for run in job.runs}

    def compare(self, *flags: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.labctl("compare", "--all", "--metric", RATE, "--json", *flags).json
        return answer

    def pairs(self, answer: dict[str, Any]) -> Names:
        """(baseline, row): a row with a ratio is one of a pair with the baseline of its own block and place."""
        assert len(answer["verdicts"]) == sum(
            row["ratio"] is not None and not row["is_baseline"] for block in answer["blocks"] for row in block["rows"]
        )
        return {
            (self.word(row["baseline"]), self.word(row["run_id"]))
            for block in answer["blocks"]
            for row in block["rows"]
            if row["baseline"]
        }

    def word(self, run_id: str) -> str:
        run, at, origin = run_id.partition("@")
        return self.words[run] + at + origin

    def report(self, **subject: Any) -> Findings:
        with closing(open_store(self.records.workspace)) as store:
            collect(self.records.workspace, store)
            return gather(
                self.records.workspace, store, ReportScope(**{"everything": True, "metrics": (RATE,), **subject})
            )

    def pairs_of_the_report(self, **subject: Any) -> Names:
        found = compared(self.report(**subject))
        return {(self.word(baseline.run_id), self.word(row.run_id)) for _, row, baseline in found}


@pytest.fixture
def sweep(labctl: Labctl, records: Records) -> Sweep:
    return Sweep(labctl, records)


def same_but(first: str, second: str, runs: Sequence[str]) -> Names:
    """Pairs of `runs`, each a text with {}."""
    return {(run.format(*first.split("|")), run.format(*second.split("|"))) for run in runs}


# ---------------------------------------------------------------- the sweep over two partitions

FOLLOWS = "dtype follows the partition: float16 on dgx2, bfloat16 on dgxh"
SIX = same_but(
    "dgx2|float16",
    "dgxh|bfloat16",
    [f"{{0}} hf {model} {{1}} 2 {batch}" for model in ("one", "two") for batch in (1, 2, 8)],
)


def partition_sweep() -> list[JobSpec]:
    return plan(model_id=("one", "two"), batch_size=(1, 2, 8))


@pytest.mark.parametrize("flags", [(), ("--by", "partition"), ("--by", "partition,batch_size")])
def test_each_model_and_batch_is_compared_with_its_own_on_the_other_partition(
    sweep: Sweep, flags: tuple[str, ...]
) -> None:
    sweep.measure(partition_sweep())
    answer = sweep.compare(*flags)
    assert sweep.pairs(answer) == SIX
    assert sweep.pairs_of_the_report() == SIX
    assert answer["notes"].count(FOLLOWS) == 1
    assert [warning for warning in answer["warnings"] if "dtype" in warning or "nothing" in warning] == []
    told = {verdict.partition(" in ")[2] for verdict in answer["verdicts"]}
    assert all(verdict.startswith("dgxh is 3x faster (") for verdict in answer["verdicts"])
    assert len(told) == 6
    assert all(re.search(r"batch_size [128]", one) and re.search(r"model (one|two)", one) for one in told)


def test_the_report_opens_with_what_all_pairs_say_and_nothing_else(sweep: Sweep) -> None:
    sweep.measure(partition_sweep())
    found = sweep.report()
    assert [line["text"] for line in _lead(found)] == ["Throughput, dgxh against dgx2: better in 6 of 6 (3x)."]
    assert FOLLOWS in found.comparison.notes


def test_a_run_whose_partner_is_missing_is_compared_with_nothing(sweep: Sweep) -> None:
    sweep.measure(partition_sweep(), without=["dgxh hf two bfloat16 2 8"])
    alone = ("dgx2 hf two float16 2 8", "dgxh hf two bfloat16 2 8")
    for flags in ((), ("--by", "partition")):
        answer = sweep.compare(*flags)
        assert sweep.pairs(answer) == SIX - {alone}
        assert any(note.endswith("(no other run differs only in partition)") for note in answer["notes"])
    assert sweep.pairs_of_the_report() == SIX - {alone}


def test_a_baseline_turns_every_pair_round(sweep: Sweep) -> None:
    sweep.measure(partition_sweep())
    answer = sweep.compare("--by", "partition", "--baseline", "dgxh")
    assert sweep.pairs(answer) == {(row, baseline) for baseline, row in SIX}


# ---------------------------------------------------------------- explicit values beside defaults


def test_equal_values_pair_first_and_defaults_with_defaults_where_there_is_no_equal(sweep: Sweep) -> None:
    sweep.measure(plan(dtype=("auto", "float16"), batch_size=(1, 8)))
    expected = same_but("dgx2", "dgxh", [f"{{0}} hf one float16 2 {batch}" for batch in (1, 8)])
    expected |= same_but("dgx2|float16", "dgxh|bfloat16", [f"{{0}} hf one {{1}} 2 {batch}" for batch in (1, 8)])
    for flags in ((), ("--by", "partition")):
        answer = sweep.compare(*flags)
        assert sweep.pairs(answer) == expected
        assert FOLLOWS in answer["notes"]
    assert sweep.pairs_of_the_report() == expected
    backwards = sweep.compare("--by", "partition", "--baseline", "dgxh")
    assert sweep.pairs(backwards) == {(row, baseline) for baseline, row in expected}


def test_exercise_2_sets_both_dtypes_of_the_h100_against_the_v100(sweep: Sweep) -> None:
    """float16 tells the GPU's part; bfloat16 is each partition at its default."""
    sweep.measure(plan(dtype=("float16", "bfloat16"), exclude=(Axes(partition=("dgx2",), dtype=("bfloat16",)),)))
    expected = {("dgx2 hf one float16 2 1", f"dgxh hf one {dtype} 2 1") for dtype in ("float16", "bfloat16")}
    answer = sweep.compare()
    assert sweep.pairs(answer) == expected
    assert len(answer["blocks"]) == 1
    assert FOLLOWS in answer["notes"]
    assert [verdict.partition(" is 3x faster")[0] for verdict in answer["verdicts"]] == ["dgxh", "dgxh bfloat16"]


def test_a_run_that_lacks_an_equal_on_one_side_still_meets_the_other_default(sweep: Sweep) -> None:
    """dgxh's default was measured on dgx2 too, where it is none: each of the two has a partner."""
    sweep.measure(plan(dtype=("float16", "bfloat16"), exclude=(Axes(partition=("dgxh",), dtype=("float16",)),)))
    expected = {(f"dgx2 hf one {dtype} 2 1", "dgxh hf one bfloat16 2 1") for dtype in ("float16", "bfloat16")}
    for flags in ((), ("--by", "partition")):
        assert sweep.pairs(sweep.compare(*flags)) == expected
    assert sweep.pairs_of_the_report() == expected
    fixed = [block["fixed"] for block in sweep.compare("--by", "partition")["blocks"]]
    assert fixed == [{"dtype": "default"}, {"dtype": "bfloat16"}]


def test_a_value_that_was_named_and_is_not_the_default_pairs_with_its_equal_alone(sweep: Sweep) -> None:
    sweep.measure(plan(dtype=("float32",), partition=("dgx2",)))
    sweep.measure(plan(dtype=("float16",), partition=("dgxh",)), name="other")
    answer = sweep.compare("--by", "partition")
    assert (sweep.pairs(answer), answer["verdicts"]) == (set(), [])
    assert [row["ratio"] for block in answer["blocks"] for row in block["rows"]] == [None, None]
    told = "nothing to compare: runs that differ in partition also differ in dtype (float32, float16)"
    assert answer["warnings"] == [told]
    assert sweep.pairs_of_the_report() == set()
    assert _lead(sweep.report()) == []


def test_defaults_are_known_by_the_plan_and_not_by_what_else_was_measured(sweep: Sweep) -> None:
    """One run a partition, both dtypes named: as many runs as a sweep that names none, and nothing to pair."""
    sweep.measure(plan(dtype=("float32",), partition=("dgx2",)))
    sweep.measure(plan(partition=("dgxh",)), name="other")
    assert sweep.pairs(sweep.compare("--by", "partition")) == set()


def test_a_number_of_gpus_that_was_named_pairs_with_the_same_number(sweep: Sweep) -> None:
    sweep.measure(plan(gpus=(1, 2)))
    expected = same_but("dgx2|float16", "dgxh|bfloat16", [f"{{0}} hf one {{1}} {gpus} 1" for gpus in (1, 2)])
    assert sweep.pairs(sweep.compare()) == sweep.pairs(sweep.compare("--by", "partition")) == expected


def test_a_machine_without_gpus_is_compared_at_its_defaults(sweep: Sweep) -> None:
    sweep.measure(plan(partition=("local", "dgxh"), backend=("vllm",), batch_size=(1, 2)))
    answer = sweep.compare("--by", "partition")
    assert sweep.pairs(answer) == same_but(
        "local|float32 0", "dgxh|bfloat16 2", [f"{{0}} vllm one {{1}} {batch}" for batch in (1, 2)]
    )
    assert "device follows the partition: cpu on local, cuda on dgxh" in answer["notes"]
    assert "gpus follows the partition: 0 on local, 2 on dgxh" in answer["notes"]


# ---------------------------------------------------------------- two backends, two partitions


def test_backends_are_compared_on_one_partition_and_partitions_with_one_backend(sweep: Sweep) -> None:
    sweep.measure(plan(backend=("hf", "vllm"), batch_size=(1, 8)))
    by_backend = same_but("hf", "vllm", [f"{p} {{0}} one {d} 2 {b}" for p, d in DTYPE.items() for b in (1, 8)])
    by_partition = same_but(
        "dgx2|float16",
        "dgxh|bfloat16",
        [f"{{0}} {backend} one {{1}} 2 {b}" for backend in ("hf", "vllm") for b in (1, 8)],
    )
    answer = sweep.compare()
    assert sweep.pairs(answer) == sweep.pairs(sweep.compare("--by", "backend")) == by_backend
    assert "parallel follows the backend: layers with hf, tensor with vllm" in answer["notes"]
    assert sweep.pairs(sweep.compare("--by", "partition")) == by_partition
    assert sweep.pairs_of_the_report() == by_backend
    assert sweep.pairs_of_the_report(by=("partition",)) == by_partition


DTYPE = {"dgx2": "float16", "dgxh": "bfloat16"}


def test_an_engine_is_compared_at_each_value_of_an_option_that_the_other_does_not_have(sweep: Sweep) -> None:
    sweep.measure(plan(partition=("dgxh",), backend=("hf", "vllm"), engine_options={"max_num_seqs": (8, 64)}))
    answer = sweep.compare("--by", "backend")
    assert sweep.pairs(answer) == {
        ("dgxh hf one bfloat16 2 1", f"dgxh vllm one bfloat16 2 1 max_num_seqs={n}") for n in (8, 64)
    }
    assert sweep.pairs_of_the_report() == sweep.pairs(answer)


def test_one_stray_run_of_another_engine_does_not_turn_the_question_round(sweep: Sweep) -> None:
    sweep.measure(partition_sweep())
    sweep.measure(plan(partition=("dgxh",), backend=("vllm",)), name="stray")
    assert sweep.pairs(sweep.compare()) == sweep.pairs_of_the_report() == SIX


def test_batches_alone_are_compared_with_the_first(sweep: Sweep) -> None:
    sweep.measure(plan(partition=("dgxh",), batch_size=(1, 2, 8)))
    assert sweep.pairs(sweep.compare()) == {
        ("dgxh hf one bfloat16 2 1", f"dgxh hf one bfloat16 2 {batch}") for batch in (2, 8)
    }


# ---------------------------------------------------------------- somebody else's runs


def test_imported_runs_are_compared_among_themselves_or_with_the_same_runs_here(sweep: Sweep, tmp_path: Path) -> None:
    sweep.measure(plan(batch_size=(1, 8)), first_id=2000)
    bundle = tmp_path / "anna.labctl.zip"
    assert sweep.labctl("bundle", "--all", "--output", bundle).code == 0
    shutil.rmtree(sweep.records.workspace.data)
    sweep.measure(plan(batch_size=(1, 8)))
    assert sweep.labctl("import", bundle, "--origin", "anna").code == 0
    here = same_but("dgx2|float16", "dgxh|bfloat16", [f"{{0}} hf one {{1}} 2 {batch}" for batch in (1, 8)])
    hers = {(f"{baseline}@anna", f"{row}@anna") for baseline, row in here}
    assert sweep.pairs(sweep.compare("--by", "partition")) == here | hers
    assert sweep.pairs_of_the_report() == here | hers
    by_origin = sweep.pairs(sweep.compare("--by", "origin"))
    assert by_origin == {(name, f"{name}@anna") for pair in here for name in pair}


def test_the_answer_is_the_same_json_after_the_index_is_made_again(sweep: Sweep) -> None:
    sweep.measure(partition_sweep())
    before = sweep.compare()
    assert sweep.labctl("collect", "--rebuild").code == 0
    assert json.dumps(sweep.compare()) == json.dumps(before)
