"""Rows become an answer: medians and ratios of what is alike, and a warning of what is not."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labctl_orchestrator.compare import AXES, Block, Cell, check_axes, check_metrics, compare, varying_axes
from labctl_orchestrator.measured import mode_and_others
from labctl_slurm.errors import WrongUseError
from labctl_workers.measure import METRICS

from .conftest import Labctl, Records, measured, refused, write_checkpoint

RATE = "output_tok_s"
FACTS = {"torch": "2.9.0", "GPU": "NVIDIA H100", "effective dtype": "bfloat16", "tokens generated": "128"}


def cell(run_id: str, values: Sequence[float] = (), *, facts: dict[str, str] | None = None, **axes: Any) -> Cell:
    same: dict[str, Any] = {**dict.fromkeys(AXES, "same"), "partition": "dgxh", "backend": "hf", "dtype": "bfloat16"}
    return Cell(
        run_id,
        {**same, **axes},
        {RATE: [list(values)] if values else []},
        {**FACTS, **(facts or {})},
        text=f"text of {run_id}",
    )


def only(blocks: list[Block]) -> Block:
    (block,) = blocks
    return block


# ---------------------------------------------------------------- figures


def test_a_row_is_the_median_with_the_lowest_the_highest_and_how_many() -> None:
    (row,) = only(compare([cell("a", [5.0, 1.0, 2.0])], [], [RATE]).blocks).rows
    assert (row.median, row.low, row.high, row.n) == (2.0, 1.0, 5.0, 3)


def test_the_median_of_an_even_number_is_between_the_middle_two() -> None:
    (row,) = only(compare([cell("a", [1.0, 2.0, 4.0, 100.0])], [], [RATE]).blocks).rows
    assert row.median == 3.0


def test_the_ratio_is_to_the_first_row() -> None:
    cells = [cell("a", [2.0], backend="hf"), cell("b", [5.0], backend="vllm"), cell("c", [1.0], backend="other")]
    answer = compare(cells, ["backend"], [RATE])
    assert [row.ratio for row in only(answer.blocks).rows] == [1.0, 2.5, 0.5]
    assert [row.at for row in only(answer.blocks).rows] == [{"backend": name} for name in ("hf", "vllm", "other")]


@pytest.mark.parametrize("first", [[], [0.0]])
def test_without_a_first_value_there_is_no_ratio(first: list[float]) -> None:
    answer = compare([cell("a", first, backend="hf"), cell("b", [5.0], backend="vllm")], [], [RATE])
    assert [row.ratio for row in only(answer.blocks).rows] == [None, None]


def test_a_row_without_a_value_keeps_its_place_and_says_so() -> None:
    answer = compare([cell("a", [2.0], backend="hf"), cell("b", [], backend="vllm")], [], [RATE])
    first, second = only(answer.blocks).rows
    assert (first.n, second.n) == (1, 0)
    assert (second.median, second.low, second.high, second.ratio) == (None, None, None, None)


def test_a_metric_that_no_cell_has_gives_a_block_of_rows_without_values() -> None:
    answer = compare([cell("a", [2.0])], [], ["ttft_s"])
    assert [(row.median, row.n) for row in only(answer.blocks).rows] == [(None, 0)]


def test_one_cell_is_one_row_without_any_warning() -> None:
    answer = compare([cell("a", [2.0])], [], [RATE])
    (row,) = only(answer.blocks).rows
    assert (answer.by, answer.warnings, row.at, row.ratio, row.text) == ([], [], {}, 1.0, "text of a")


def test_every_metric_has_its_blocks_in_the_order_asked_for() -> None:
    answer = compare([cell("a", [2.0])], [], ["ttft_s", RATE])
    assert [block.metric for block in answer.blocks] == ["ttft_s", RATE]


@given(st.lists(st.floats(0.001, 1e9), min_size=1), st.lists(st.floats(0.001, 1e9), min_size=1))
def test_a_median_lies_between_and_a_ratio_turns_round_with_the_rows(one: list[float], other: list[float]) -> None:
    cells = [cell("a", one, backend="hf"), cell("b", other, backend="vllm")]
    forth = only(compare(cells, [], [RATE]).blocks).rows
    back = only(compare(cells[::-1], [], [RATE]).blocks).rows
    for row in forth:
        assert row.low is not None and row.median is not None and row.high is not None
        assert row.low <= row.median <= row.high
    assert forth[1].ratio is not None and back[1].ratio is not None
    assert math.isclose(forth[1].ratio, 1 / back[1].ratio, rel_tol=1e-9)


# ---------------------------------------------------------------- like with like


def grid() -> list[Cell]:
    """Two backends on two partitions."""
    return [
        cell(f"{partition}-{backend}", [float(rate)], partition=partition, backend=backend)
        for partition, backend, rate in (
            ("dgx2", "hf", 1),
            ("dgx2", "vllm", 2),
            ("dgxh", "hf", 10),
            ("dgxh", "vllm", 30),
        )
    ]


def test_only_rows_that_differ_on_the_compared_axis_alone_are_in_one_block() -> None:
    answer = compare(grid(), ["backend"], [RATE])
    assert [(block.fixed, [row.ratio for row in block.rows]) for block in answer.blocks] == [
        ({"partition": "dgx2"}, [1.0, 2.0]),
        ({"partition": "dgxh"}, [1.0, pytest.approx(3.0)]),
    ]
    assert answer.warnings == []


def test_without_an_axis_every_axis_that_varies_is_compared() -> None:
    answer = compare(grid(), [], [RATE])
    assert answer.by == ["partition", "backend"]
    assert [row.at["backend"] for row in only(answer.blocks).rows] == ["hf", "vllm", "hf", "vllm"]


def test_the_axes_that_vary_are_told_in_the_tables_order() -> None:
    assert varying_axes(grid()) == ["partition", "backend"]
    assert varying_axes(grid()[:1]) == varying_axes([]) == []
    assert varying_axes([cell("a", gpus=1), cell("b", gpus=True)]) == ["gpus"]


def test_a_cell_without_a_fellow_has_a_block_of_its_own() -> None:
    answer = compare(grid()[:3], ["backend"], [RATE])
    assert [len(block.rows) for block in answer.blocks] == [2, 1]


def test_rows_that_are_alike_nowhere_are_shown_together_with_a_warning_of_each_other_axis() -> None:
    cells = [
        cell("a", [1.0], backend="hf", dtype="float16", gpus=1),
        cell("b", [2.0], backend="vllm", dtype="bfloat16", gpus=2),
    ]
    answer = compare(cells, ["backend"], [RATE])
    assert [row.ratio for row in only(answer.blocks).rows] == [1.0, 2.0]
    assert len(answer.warnings) == 2
    assert "dtype" in answer.warnings[0]
    assert "float16, bfloat16" in answer.warnings[0]
    assert "gpus" in answer.warnings[1]


def test_an_axis_that_does_not_vary_shows_the_others_with_a_warning() -> None:
    answer = compare(grid()[:2], ["dtype"], [RATE])
    assert [row.at for row in only(answer.blocks).rows] == [{"dtype": "bfloat16"}] * 2
    assert ["backend" in warning for warning in answer.warnings] == [True]


@given(st.permutations(grid()))
def test_the_blocks_do_not_depend_on_the_order_of_the_cells(cells: list[Cell]) -> None:
    answer = compare(cells, ["backend"], [RATE])
    found = {frozenset(row.run_id for row in block.rows) for block in answer.blocks}
    assert found == {frozenset({"dgx2-hf", "dgx2-vllm"}), frozenset({"dgxh-hf", "dgxh-vllm"})}


# ---------------------------------------------------------------- what else differs


def test_a_fact_that_differs_within_a_block_is_warned_of_once() -> None:
    cells = [cell("a", [1.0], backend="hf"), cell("b", [2.0], backend="vllm", facts={"torch": "2.8.0"})]
    answer = compare(cells, [], [RATE, "ttft_s"])
    assert answer.warnings == ["the rows differ in torch (2.9.0, 2.8.0)"]


def test_a_fact_that_one_row_does_not_know_is_warned_of() -> None:
    cells = [cell("a", backend="hf"), cell("b", backend="vllm", facts={"xformers": "0.1"})]
    assert compare(cells, [], [RATE]).warnings == ["the rows differ in xformers (not known, 0.1)"]


def test_what_one_backend_has_and_another_has_not_is_no_news_where_backends_are_compared() -> None:
    hf, vllm = cell("a", backend="hf"), cell("b", backend="vllm", facts={"vllm": "0.11"})
    assert compare([hf, vllm], [], [RATE]).warnings == []
    other = cell("c", backend="vllm", batch_size=2, facts={"vllm": "0.12"})
    assert compare([hf, vllm, other], [], [RATE]).warnings == ["the rows differ in vllm (not known, 0.11, 0.12)"]


def test_a_backends_own_way_of_splitting_and_its_own_options_do_not_keep_it_from_being_compared() -> None:
    hf = cell("a", backend="hf", parallel="layers", engine_options="{}")
    vllm = cell("b", backend="vllm", parallel="tensor", engine_options='{"enforce_eager": true}')
    answer = compare([hf, vllm], [], [RATE])
    assert answer.by == ["backend"]
    assert len(answer.blocks) == 1
    assert answer.warnings == []
    assert answer.notes[0] == 'the engine options differ with the backend: hf {}, vllm {"enforce_eager": true}'
    plain = cell("c", backend="vllm", parallel="tensor", engine_options="{}")
    assert compare([hf, vllm, plain], [], [RATE]).by == ["backend", "engine_options"]


def test_a_fact_that_differs_between_blocks_alone_is_not_warned_of() -> None:
    cells = [replace(c, facts={**c.facts, "driver": c.axes["partition"]}) for c in grid()]
    assert compare(cells, ["backend"], [RATE]).warnings == []


@pytest.mark.parametrize(
    ("axis", "fact"),
    [("dtype", "effective dtype"), ("partition", "GPU"), ("max_new_tokens", "tokens generated")],
)
def test_a_fact_that_follows_from_the_compared_axis_is_no_news_and_on_another_it_is(axis: str, fact: str) -> None:
    cells = [cell("a", **{axis: "one"}), cell("b", **{axis: "two"}, facts={fact: "other"})]
    assert compare(cells, [axis], [RATE]).warnings == []
    others = [cell("a", backend="one"), cell("b", backend="two", facts={fact: "other"})]
    assert [fact in warning for warning in compare(others, ["backend"], [RATE]).warnings] == [True]


# ---------------------------------------------------------------- words that are none


def test_an_unknown_axis_is_named_with_the_nearest() -> None:
    error = refused(lambda: check_axes(["dtyp"]), WrongUseError)
    assert ("'dtyp'" in error.message, "'dtype'" in error.remedy) == (True, True)
    check_axes(AXES)


def test_an_unknown_metric_is_named_with_the_nearest() -> None:
    error = refused(lambda: check_metrics(["output_toks"]), WrongUseError)
    assert ("'output_toks'" in error.message, "'output_tok_s'" in error.remedy) == (True, True)
    check_metrics(list(METRICS))


# ---------------------------------------------------------------- the command


def two_dtypes(records: Records) -> None:
    batch = records.submit(dtypes=("float16", "bfloat16"), name="dtypes")
    for task, job in enumerate(batch.jobs):
        repeats = [measured(repeat + 5 * task, text=f"text of {job.dtype}") for repeat in range(3)]
        records.done(batch, records.attempt(batch, task, slurm_id=f"1000_{task}"), job.runs[0], repeats=repeats)


def test_the_command_answers_of_the_latest_request_by_what_varies_in_it(labctl: Labctl, records: Records) -> None:
    old = records.submit("999", lengths=(8,), name="old")
    records.done(old, records.attempt(old, slurm_id="999"))
    two_dtypes(records)
    answer = labctl("compare", "--json").json
    assert answer["by"] == ["dtype"]
    assert [row["at"] for row in answer["blocks"][0]["rows"]] == [{"dtype": "float16"}, {"dtype": "bfloat16"}]
    assert [row["n"] for row in answer["blocks"][0]["rows"]] == [3, 3]
    shown = labctl("compare", "--metric", RATE).out
    assert "throughput, higher is better" in shown
    assert "text, dtype float16: text of float16" in shown


def test_the_command_prints_values_for_a_spreadsheet(labctl: Labctl, records: Records) -> None:
    two_dtypes(records)
    blocks = labctl("compare", "--metric", RATE, "--json").json["blocks"]
    rows = list(csv.DictReader(io.StringIO(labctl("compare", "--metric", RATE, "--csv").out)))
    assert [(row["metric"], row["unit"], row["dtype"]) for row in rows] == [
        (RATE, "tok/s", "float16"),
        (RATE, "tok/s", "bfloat16"),
    ]
    assert [float(row["median"]) for row in rows] == [row["median"] for row in blocks[0]["rows"]]


def test_the_command_compares_only_what_a_condition_leaves(labctl: Labctl, records: Records) -> None:
    two_dtypes(records)
    (block,) = labctl("compare", "--metric", RATE, "--where", "dtype=float16", "--json").json["blocks"]
    assert len(block["rows"]) == 1
    for condition in ("dtype=float32", "dtype", "dtyp=float16"):
        ran = labctl("compare", "--where", condition)
        assert (ran.code, ran.out, ran.err.count("labctl: ")) == (2, "", 1)


def test_the_command_names_what_has_no_result(labctl: Labctl, records: Records) -> None:
    batch = records.submit(lengths=(8, 16))
    records.done(batch, records.attempt(batch), batch.runs[0])
    warnings = labctl("compare", "--json").json["warnings"]
    assert [batch.runs[1].run_id in warning for warning in warnings] == [True]


def test_without_any_result_the_command_says_how_far_the_runs_are(labctl: Labctl, records: Records) -> None:
    batch = records.submit()
    ran = labctl("compare")
    assert (ran.code, ran.out) == (2, "")
    assert "none of 1 runs has a result yet" in ran.err
    assert f"{batch.runs[0].run_id} is unknown" in ran.err


OLD_VERSIONS = {"packages": {"torch": "2.8.0"}, "effective_dtype": "bfloat16", "gpus": [{"name": "NVIDIA H100"}]}


def test_attempts_with_the_latest_ones_versions_are_engine_loads_of_one_cell(labctl: Labctl, records: Records) -> None:
    batch = records.submit()
    times = ("2026-01-01T00:00:00.000Z", "2026-01-02T00:00:00.000Z", "2026-01-03T00:00:00.000Z")
    for age_s, ended_at in zip((600, 400, 200), times, strict=True):
        more = {"fingerprint": OLD_VERSIONS} if age_s == 600 else {}
        records.done(batch, records.attempt(batch, age_s=age_s), ended_at=ended_at, **more)
    (row,) = labctl("compare", "--metric", RATE, "--json").json["blocks"][0]["rows"]
    assert (row["n"], row["n_of"]) == (2, "engine loads")
    assert [len(of_load) for of_load in row["values"]] == [3, 3]
    assert len(row["loads"]) == 2


def test_two_checkpoints_of_one_folder_name_are_told_apart(
    labctl: Labctl, records: Records, checkpoint: Path, tmp_path: Path
) -> None:
    """step-100/model and step-200/model: their runs differ, and nothing that is compared does."""
    for step, slurm_id in ((100, "100"), (200, "200")):
        folder = write_checkpoint(tmp_path / f"step-{step}" / "model", [float(step)])
        model = replace(records.model, name=folder.name, path=str(folder), fingerprint=f"{step:064}")
        batch = records.submit(slurm_id, model=model, name=f"step-{step}")
        records.done(batch, records.attempt(batch, slurm_id=slurm_id))
    answer = labctl("compare", "step-100", "step-200", "--json").json
    first, second = answer["blocks"][0]["rows"]
    assert first["run_id"] != second["run_id"]
    assert first["at"] != second["at"] or answer["warnings"], json.dumps(answer["by"])


def test_all_of_a_workspace_without_runs_is_one_clear_error(labctl: Labctl, records: Records) -> None:
    records.prepare()  # rendered, and never submitted
    ran = labctl("compare", "--all")
    assert ran.code == 2, ran.err


# ---------------------------------------------------------------- mode


def test_a_result_of_another_mode_than_the_one_asked_for_is_warned_of(labctl: Labctl, records: Records) -> None:
    batch = records.submit()
    fell_back = {"mode": "eager", "mode_asked": "graphs", "mode_reason": "its rotary embedding is dynamic"}
    records.done(batch, records.attempt(batch), fingerprint=fell_back)
    run_id = batch.runs[0].run_id
    told = f"{run_id} ran in mode eager, not graphs: its rotary embedding is dynamic"
    assert told in labctl("compare", "--json").json["warnings"]
    shown = labctl("show", run_id)
    assert "this attempt ran in mode eager, not graphs: its rotary embedding is dynamic" in " ".join(shown.err.split())


def test_the_mode_is_an_axis_apart_from_the_other_engine_options() -> None:
    row = {"backend": "hf", "engine_options": '{"attn_implementation": "sdpa", "mode": "graphs"}'}
    assert mode_and_others(row) == ("graphs", '{"attn_implementation": "sdpa"}')
    assert mode_and_others({"backend": "hf", "engine_options": "{}"}) == ("eager", "{}")
    assert mode_and_others({"backend": "vllm", "engine_options": '{"x": 1}'}) == ("", '{"x": 1}')
    cells = [cell("a", [2.0], mode="eager"), cell("b", [5.0], mode="graphs")]
    assert compare(cells, [], [RATE]).by == ["mode"]
