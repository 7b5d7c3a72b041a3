"""Rows become an answer: means and ratios of what is alike, and a warning of what is not."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labctl_orchestrator.analysis import verdicts
from labctl_orchestrator.analysis.axes import check_axes, varying_axes, with_engine_options
from labctl_orchestrator.analysis.compare import compare
from labctl_orchestrator.analysis.comparison import AXES, Block, Cell
from labctl_orchestrator.analysis.metrics import ALL_METRICS, metric_named
from labctl_orchestrator.analysis.question import Question
from labctl_orchestrator.analysis.question import answer as answer_to
from labctl_orchestrator.analysis.verdicts import ratio_figure
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.terminal import comparison
from labctl_slurm.errors import WrongUseError
from labctl_workers.record import run_id_of

from .conftest import Labctl, Records, measured, refused, write_checkpoint
from .test_screen import lines_of, on_a_terminal

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


def test_a_row_is_the_mean_with_the_lowest_the_highest_and_how_many() -> None:
    (row,) = only(compare([cell("a", [4.0, 1.0, 2.0])], [], [RATE]).blocks).rows
    assert (row.mean, row.low, row.high, row.n) == (pytest.approx(2.0), 1.0, 4.0, 3)


def test_the_mean_is_of_the_loads_whatever_repeats_each_has() -> None:
    loads = replace(cell("a"), values={RATE: [[2.0, 8.0], [16.0]]})  # geometric: 4 and 16
    (row,) = only(compare([loads], [], [RATE]).blocks).rows
    assert (row.mean, row.low, row.high, row.n) == (pytest.approx(8.0), 2.0, 16.0, 2)


def test_the_quotient_of_two_figures_is_the_ratio_beside_them() -> None:
    first = replace(cell("a", backend="hf"), values={RATE: [[1.0, 9.0], [4.0]], "queue_s": [[0.0], [5.0]]})
    second = replace(cell("b", backend="vllm"), values={RATE: [[7.0, 8.0, 31.0]], "queue_s": [[2.0]]})
    rate, wait = compare([first, second], [], [RATE, "queue_s"]).blocks
    assert rate.rows[1].ratio == pytest.approx((rate.rows[1].mean or 0) / (rate.rows[0].mean or 0))
    assert (wait.rows[0].mean, wait.rows[1].ratio, wait.rows[1].difference) == (2.5, None, -0.5)


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
    assert (second.mean, second.low, second.high, second.ratio) == (None, None, None, None)


def test_a_metric_that_no_cell_has_gives_a_block_of_rows_without_values() -> None:
    answer = compare([cell("a", [2.0])], [], ["ttft_s"])
    assert [(row.mean, row.n) for row in only(answer.blocks).rows] == [(None, 0)]


def test_one_cell_is_one_row_without_any_warning() -> None:
    answer = compare([cell("a", [2.0])], [], [RATE])
    (row,) = only(answer.blocks).rows
    assert (answer.by, answer.warnings, row.at, row.ratio, row.text) == ([], [], {}, None, "text of a")


def test_every_metric_has_its_blocks_in_the_order_asked_for() -> None:
    answer = compare([cell("a", [2.0])], [], ["ttft_s", RATE])
    assert [block.metric for block in answer.blocks] == ["ttft_s", RATE]


@given(st.lists(st.floats(0.001, 1e9), min_size=1), st.lists(st.floats(0.001, 1e9), min_size=1))
def test_a_mean_lies_between_and_a_ratio_turns_round_with_the_rows(one: list[float], other: list[float]) -> None:
    cells = [cell("a", one, backend="hf"), cell("b", other, backend="vllm")]
    forth = only(compare(cells, [], [RATE]).blocks).rows
    back = only(compare(cells[::-1], [], [RATE]).blocks).rows
    for row in forth:
        assert row.low is not None and row.mean is not None and row.high is not None
        assert row.low <= row.mean <= row.high
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


def test_without_an_axis_backends_are_compared_and_what_else_varies_is_laid_out() -> None:
    answer = compare(grid(), [], [RATE])
    assert answer.by == ["backend", "partition"]
    rows = only(answer.blocks).rows
    assert [row.at["backend"] for row in rows] == ["hf", "vllm", "hf", "vllm"]
    assert [row.ratio for row in rows] == [1.0, 2.0, 1.0, pytest.approx(3.0)]


def test_the_axes_that_vary_are_told_in_the_tables_order() -> None:
    assert varying_axes(grid()) == ["partition", "backend"]
    assert varying_axes(grid()[:1]) == varying_axes([]) == []
    assert varying_axes([cell("a", gpus=1), cell("b", gpus=True)]) == ["gpus"]


def test_a_cell_without_a_fellow_has_a_block_of_its_own() -> None:
    answer = compare(grid()[:3], ["backend"], [RATE])
    assert [len(block.rows) for block in answer.blocks] == [2, 1]


def test_where_no_two_rows_are_alike_the_axes_are_named_and_nothing_is_compared() -> None:
    cells = [
        cell("a", [1.0], backend="hf", dtype="float16", gpus=1),
        cell("b", [2.0], backend="vllm", dtype="bfloat16", gpus=2),
    ]
    answer = compare(cells, ["backend"], [RATE])
    rows = only(answer.blocks).rows
    assert [row.at for row in rows] == [
        {"backend": "hf", "dtype": "float16", "gpus": 1},
        {"backend": "vllm", "dtype": "bfloat16", "gpus": 2},
    ]
    assert [(row.mean, row.ratio, row.baseline, row.is_baseline) for row in rows] == [
        (1.0, None, None, False),
        (2.0, None, None, False),
    ]
    assert verdicts.sentences(answer) == []
    assert answer.warnings == [
        "nothing to compare: runs that differ in backend also differ in dtype (float16, bfloat16) and gpus (1, 2)"
    ]


def test_an_axis_that_does_not_vary_shows_the_others_and_says_so() -> None:
    answer = compare(grid()[:2], ["dtype"], [RATE])
    rows = only(answer.blocks).rows
    assert [(row.at["backend"], row.ratio) for row in rows] == [("hf", None), ("vllm", None)]
    assert answer.warnings == ["nothing to compare: all runs have the same dtype; they differ in backend (hf, vllm)"]


@given(st.permutations(grid()))
def test_the_blocks_do_not_depend_on_the_order_of_the_cells(cells: list[Cell]) -> None:
    answer = compare(cells, ["backend"], [RATE])
    found = {frozenset(row.run_id for row in block.rows) for block in answer.blocks}
    assert found == {frozenset({"dgx2-hf", "dgx2-vllm"}), frozenset({"dgxh-hf", "dgxh-vllm"})}


# ---------------------------------------------------------------- what else differs


def test_a_fact_that_differs_within_a_block_is_warned_of_once() -> None:
    cells = [cell("a", [1.0], backend="hf"), cell("b", [2.0], backend="vllm", facts={"torch": "2.8.0"})]
    answer = compare(cells, [], [RATE, "ttft_s"])
    assert answer.warnings == ["the runs also differ in torch (2.9.0, 2.8.0)"]


def test_a_fact_that_one_row_does_not_know_is_warned_of() -> None:
    cells = [cell("a", backend="hf"), cell("b", backend="vllm", facts={"xformers": "0.1"})]
    assert compare(cells, [], [RATE]).warnings == ["the runs also differ in xformers (unknown, 0.1)"]


def test_what_one_backend_has_and_another_has_not_is_no_news_where_backends_are_compared() -> None:
    hf, vllm = cell("a", backend="hf"), cell("b", backend="vllm", facts={"vllm": "0.11"})
    assert compare([hf, vllm], [], [RATE]).warnings == []
    others = [cell("c", backend="hf", batch_size=2), cell("d", backend="vllm", batch_size=2, facts={"vllm": "0.12"})]
    assert compare([hf, vllm, *others], [], [RATE]).warnings == ["the runs also differ in vllm (unknown, 0.11, 0.12)"]


def test_a_backends_own_way_of_splitting_and_its_own_options_do_not_keep_it_from_being_compared() -> None:
    hf = cell("a", backend="hf", parallel="layers", engine_options="{}")
    vllm = cell("b", backend="vllm", parallel="tensor", engine_options='{"enforce_eager": true}')
    answer = compare([hf, vllm], [], [RATE])
    assert answer.by == ["backend"]
    assert len(answer.blocks) == 1
    assert answer.warnings == []
    assert answer.notes[:2] == [
        "parallel follows the backend: layers with hf, tensor with vllm",
        'engine_options follows the backend: {} with hf, {"enforce_eager": true} with vllm',
    ]
    plain = cell("c", backend="vllm", parallel="tensor", engine_options="{}")
    assert compare([hf, vllm, plain], [], [RATE]).by == ["backend", "engine_options"]


def test_tasks_that_served_runs_alone_answer_do_not_keep_them_from_being_compared_with_others() -> None:
    offline, served = cell("a", served=0, quality=None), cell("b", served=1, quality="sums")
    answer = compare([offline, served], [], [RATE])
    assert (answer.by, len(only(answer.blocks).rows)) == (["served"], 2)
    assert answer.notes[0] == "quality follows the served: None with 0, sums with 1"
    assert compare([offline, served, cell("c", served=1, quality=None)], [], [RATE]).by == ["served", "quality"]


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


def test_lengths_that_were_not_reached_are_warned_of_where_lengths_are_compared() -> None:
    ends = {"tokens generated": "9", "finish reason": "stop"}
    cells = [cell("a", max_new_tokens=4, facts={"finish reason": "length"}), cell("b", max_new_tokens=24, facts=ends)]
    told = "answers ended before max_new_tokens (9 of 24 tokens): --ignore-eos generates the full length"
    assert compare(cells, [], [RATE]).warnings == [told]
    assert compare(cells[:1], ["max_new_tokens"], [RATE]).warnings == []


# ---------------------------------------------------------------- verdicts


def verdict_of(first: Sequence[float], second: Sequence[float], metric: str = RATE, **axes: Any) -> tuple[str, str]:
    cells = [
        replace(cell(backend, backend=backend, **axes), values={metric: [list(values)]})
        for backend, values in (("hf", first), ("vllm", second))
    ]
    answer = compare(cells, ["backend"], [metric])
    (sentence,) = verdicts.sentences(answer) or [""]
    return verdicts.verdict(only(answer.blocks).rows[1]).kind, sentence


def test_a_side_that_lacks_what_is_compared_is_named_by_that() -> None:
    cells = [cell("a", [10.0, 10.1], request_rate=None), cell("b", [20.0, 20.1], request_rate=5.0)]
    (sentence,) = verdicts.sentences(compare(cells, ["request_rate"], [RATE]))
    assert sentence.startswith("request_rate 5.0 is ")
    assert " than no request_rate in throughput" in sentence


def test_a_verdict_is_a_sentence_with_the_ratio_and_its_interval() -> None:
    kind, sentence = verdict_of([10.0, 10.1, 9.9], [132.0, 133.0, 131.0])
    assert (kind, sentence) == ("better", "vllm is 13.2x faster (10.6-16.4) than hf in throughput")


def test_half_the_throughput_is_told_as_twice_as_slow() -> None:
    kind, sentence = verdict_of([10.0, 10.1, 9.9], [5.0, 5.1, 4.9])
    assert kind == "worse"
    assert sentence.startswith("vllm is 2x slower (1.6-2.49)")


def test_less_of_what_is_better_low_is_better() -> None:
    assert verdict_of([1.0, 1.01, 0.99], [0.5, 0.51, 0.49], "ttft_s")[0] == "better"
    kind, sentence = verdict_of([100.0, 101.0, 99.0], [200.0, 201.0, 199.0], "weights_bytes")
    assert (kind, "2x higher" in sentence) == ("worse", True)


def test_a_small_difference_is_told_in_percent() -> None:
    told = verdict_of([100.0, 100.1, 99.9], [105.0, 105.1, 104.9], "kv_cache_used_bytes")[1]
    assert told.startswith("vllm is 5% higher (4.")


def test_no_significant_difference_is_an_answer() -> None:
    kind, sentence = verdict_of([10.0, 12.0, 11.0], [10.5, 12.5, 11.5])
    assert kind == "no significant difference"
    assert sentence.startswith("vllm vs hf in throughput: no significant difference (1.046x, 95% CI 0.799-1.37)")


def test_what_is_the_same_in_every_repeat_is_called_so() -> None:
    assert verdict_of([7.0, 7.0], [7.0, 7.0, 7.0], "weights_bytes") == (
        "no significant difference",
        "vllm vs hf in weights: the same in every repeat",
    )


# ---------------------------------------------------------------- the spread between engine loads


def in_loads(run_id: str, *loads: Sequence[float], metric: str = RATE, **axes: Any) -> Cell:
    names = tuple(f"{run_id}.{place}" for place in range(len(loads)))
    return replace(cell(run_id, **axes), values={metric: list(map(list, loads))}, loads=names)


def test_repeats_of_one_load_show_no_difference_below_the_spread_that_is_assumed() -> None:
    cells = [cell("a", [100.0, 100.1, 99.9], backend="hf"), cell("b", [105.0, 105.1, 104.9], backend="vllm")]
    answer = compare(cells, [], [RATE])
    assert verdicts.kind(only(answer.blocks).rows[1]) == "no significant difference"
    assert answer.notes == [
        "spread between engine loads of vllm on dgxh is assumed: a standard deviation of 5%; --loads 3 measures it",
        ("spread between engine loads of hf on dgxh is assumed: a standard deviation of 10%; --loads 3 measures it"),
    ]


def test_other_runs_of_the_workspace_show_how_loads_spread() -> None:
    """The loads of eight runs differ by 1%: standard deviation 0.72% of the logarithms, on 8 degrees of freedom."""
    cells = [cell("a", [100.0, 100.1, 99.9], dtype="one"), cell("b", [105.0, 105.1, 104.9], dtype="two")]
    known = [in_loads(f"h{n}", [50.0 * n, 50.1 * n, 49.9 * n], [50.5 * n, 50.6 * n, 50.4 * n]) for n in range(1, 9)]
    answer = compare(cells, [], [RATE], load_history=known)
    row = only(answer.blocks).rows[1]
    assert verdicts.kind(row) == "better"
    half = (
        2.306 * math.sqrt(2) * math.log(1.01) / math.sqrt(2)
    )  # t(0.975, 8); the scatter of repeats is as large on all sides
    assert row.ratio_interval == pytest.approx((1.05 * math.exp(-half), 1.05 * math.exp(half)), rel=1e-3)
    assert answer.notes == ["engine loads of hf on dgxh differ by 0.7% in throughput, as measured in this workspace"]
    elsewhere = [replace(one, axes={**one.axes, "partition": "dgx2"}) for one in known]
    assert (
        verdicts.kind(only(compare(cells, [], [RATE], load_history=elsewhere).blocks).rows[1])
        == "no significant difference"
    )


def test_runs_that_share_their_loads_have_the_degrees_of_freedom_of_the_loads() -> None:
    """Twenty runs of three jobs: what differs between these three loads is in all of them."""
    runs = [in_loads(f"h{n}", [50.0, 50.1], [51.0, 51.1], [52.0, 52.1]) for n in range(20)]
    jobs = [replace(run, loads=("job 1", "job 2", "job 3")) for run in runs]
    found = [compare([*cells[:2]], ["batch_size"], [RATE], load_history=cells[2:]) for cells in (runs, jobs)]
    (_, of_runs), (_, of_jobs) = ([row.ratio_interval for row in only(one.blocks).rows] for one in found)
    assert of_runs and of_jobs
    assert (of_jobs[1] - of_jobs[0]) / (of_runs[1] - of_runs[0]) == pytest.approx(
        4.303 / 2.021, rel=0.05
    )  # t(0.975) of 2 and 40


def test_each_of_two_backends_has_its_own_spread() -> None:
    """hf's loads lie together, vllm's do not: hf against itself is told apart, vllm against itself is not."""
    hf = [in_loads(f"hf{n}", *([100.0 + n + load / 10] * 2 for load in range(4)), dtype=str(n)) for n in (0, 6)]
    vllm = [
        in_loads(f"v{n}", *([100.0 + n + 8 * load] * 2 for load in range(4)), dtype=str(n), backend="vllm")
        for n in (0, 6)
    ]
    blocks = compare([*hf, *vllm], ["dtype"], [RATE]).blocks
    assert [verdicts.kind(block.rows[1]) for block in blocks] == ["better", "no significant difference"]


def test_a_metric_of_a_load_has_an_interval_only_where_a_side_has_several() -> None:
    once = [in_loads("a", [4.0], metric="init_s", dtype="one"), in_loads("b", [8.0], metric="init_s", dtype="two")]
    other = [in_loads("h", [4.0], [4.1], [4.2], metric="init_s")]
    row = only(compare(once, [], ["init_s"], load_history=other).blocks).rows[1]
    assert (row.ratio_interval, verdicts.kind(row)) == (None, "measured once")
    several = in_loads("a", [4.0], [4.1], [4.2], metric="init_s", dtype="one")
    assert verdicts.kind(only(compare([several, once[1]], [], ["init_s"]).blocks).rows[1]) == "worse"


def test_what_a_load_cannot_change_needs_no_spread_between_loads() -> None:
    cells = [in_loads(name, [n, n], metric="output_tokens", dtype=name) for name, n in (("one", 100.0), ("two", 101.0))]
    answer = compare(cells, [], ["output_tokens"])
    assert (verdicts.kind(only(answer.blocks).rows[1]), answer.notes) == ("differs", [])


def test_log_probabilities_are_compared_by_their_difference() -> None:
    cells = [
        replace(cell(name, sampling=name), values={"mean_log_probability": [values]})
        for name, values in (("greedy", [-0.5, -0.5, -0.5]), ("sampled", [-1.5, -1.4, -1.6]))
    ]
    answer = compare(cells, [], ["mean_log_probability"])
    row = only(answer.blocks).rows[1]
    assert (row.ratio, row.difference) == (None, pytest.approx(-1.0))
    assert verdicts.verdict(row).kind == "differs"
    assert verdicts.sentences(answer)[0].startswith("sampled is 1 nat/tok lower (-1.")


def test_a_metric_with_values_of_nought_is_compared_by_the_difference() -> None:
    kind, sentence = verdict_of([0.0, 0.0, 0.0], [3.0, 3.1, 2.9], "queued_s")
    assert kind == "worse"
    assert "3 s higher (+2." in sentence


@pytest.mark.parametrize("metric", ["peak_allocated_bytes", "kv_cache_reserved_bytes", "device_used_bytes"])
def test_memory_that_engines_set_aside_is_not_compared_between_engines(metric: str) -> None:
    cells = [replace(cell(name, backend=name), values={metric: [[9.0, 9.0]]}) for name in ("hf", "vllm")]
    answer = compare(cells, [], [metric])
    row = only(answer.blocks).rows[1]
    assert (verdicts.verdict(row).kind, row.ratio, row.mean) == ("not comparable", None, 9.0)
    assert ["cannot be compared" in warning for warning in answer.warnings] == [True]
    assert verdicts.sentences(answer) == []
    same_engine = [replace(cell(str(n), batch_size=n), values={metric: [[9.0 * n] * 2]}) for n in (1, 2)]
    assert only(compare(same_engine, [], [metric]).blocks).rows[1].ratio == pytest.approx(2.0)


# ---------------------------------------------------------------- the baseline, and two axes


def test_the_baseline_may_be_any_value_of_the_axis() -> None:
    answer = compare(grid(), ["backend"], [RATE], {"": "vllm"})
    assert [[row.ratio for row in block.rows] for block in answer.blocks] == [
        [pytest.approx(0.5), 1.0],
        [pytest.approx(1 / 3), 1.0],
    ]
    assert [row.is_baseline for row in answer.blocks[0].rows] == [False, True]


def test_of_two_axes_the_first_is_compared_at_each_value_of_the_second() -> None:
    answer = compare(grid(), ["backend", "partition"], [RATE])
    rows = {(row.at["partition"], row.at["backend"]): row for row in only(answer.blocks).rows}
    assert rows["dgx2", "vllm"].ratio == pytest.approx(2.0)
    assert rows["dgxh", "vllm"].ratio == pytest.approx(3.0)
    assert rows["dgxh", "hf"].is_baseline
    assert answer.baseline == {"backend": "hf"}


PLAIN, EAGER = '{"compile": false}', '{"enforce_eager": true}'


def staged_twice_and_vllm() -> list[Cell]:
    return [
        cell("plain", [10.0, 10.1, 9.9], backend="staged", engine_options=PLAIN),
        cell("compiled", [13.0, 13.1, 12.9], backend="staged", engine_options="{}"),
        cell("vllm", [132.0, 133.0, 131.0], backend="vllm", engine_options=EAGER),
    ]


def test_one_cell_of_two_axes_may_be_the_baseline_of_all() -> None:
    asked = {"backend": "staged", "engine_options": PLAIN}
    answer = compare(staged_twice_and_vllm(), ["backend", "engine_options"], [RATE], asked)
    assert [sentence.partition(" (")[0] for sentence in verdicts.sentences(answer)] == [
        "engine_options {} is 1.3x faster",
        f"vllm {EAGER} is 13.2x faster",
    ]
    assert verdicts.sentences(answer)[0].endswith(f" than {PLAIN} in throughput at backend staged")
    assert verdicts.sentences(answer)[1].endswith(f" than staged {PLAIN} in throughput")


def test_an_axis_that_only_one_engine_has_does_not_keep_the_other_from_its_baseline() -> None:
    blocks = compare(staged_twice_and_vllm(), ["backend", "engine_options"], [RATE]).blocks
    paired = [(row.run_id, row.baseline.run_id) for block in blocks for row in block.rows if row.baseline]
    assert paired == [("vllm", "plain"), ("vllm", "compiled")]


def test_a_row_whose_baseline_was_not_measured_has_no_ratio() -> None:
    rows = only(compare(grid()[1:], ["backend", "partition"], [RATE], {"backend": "hf"}).blocks).rows
    assert [(row.run_id, row.ratio) for row in rows] == [
        ("dgx2-vllm", None),
        ("dgxh-hf", 1.0),
        ("dgxh-vllm", pytest.approx(3.0)),
    ]


def test_a_number_is_a_baseline_as_it_is_written() -> None:
    cells = [cell(str(n), [float(n)], batch_size=n) for n in (1, 8, 64)]
    for asked in ({"": "8"}, {"batch_size": "8"}):
        rows = only(compare(cells, [], [RATE], asked).blocks).rows
        assert [row.ratio for row in rows] == [pytest.approx(1 / 8), 1.0, pytest.approx(8.0)]


def test_a_baseline_that_nothing_is_names_what_there_is() -> None:
    error = refused(lambda: compare(grid(), ["backend"], [RATE], {"": "vlm"}), WrongUseError)
    assert ("backend vlm" in error.message, "'vllm'" in error.remedy) == (True, True)


def test_a_baseline_on_an_axis_that_is_not_compared_says_how_it_would_be() -> None:
    error = refused(lambda: compare(grid(), ["backend"], [RATE], {"dtype": "bfloat16"}), WrongUseError)
    assert error.message == "baseline on an axis that is not compared: dtype"
    assert "--by dtype" in error.remedy


def test_of_a_single_cell_no_axis_is_compared_and_so_none_has_a_baseline() -> None:
    error = refused(lambda: compare([cell("a", [1.0, 1.1])], [], [RATE], {"dtype": "bfloat16"}), WrongUseError)
    assert error.message == "baseline on an axis that is not compared: dtype"
    rows = only(compare([cell("a", [1.0, 1.1])], ["dtype"], [RATE], {"dtype": "bfloat16"}).blocks).rows
    assert [(row.is_baseline, row.ratio) for row in rows] == [(False, None)]


def test_a_sampling_may_be_the_baseline_under_the_name_of_its_axis(tmp_path: Path) -> None:
    store = Store(tmp_path / "labctl-11.db")
    sampled = "temperature=0.7,top_p=0.9,seed=1"
    for text in (sampled, f"sampling={sampled}"):
        asked = Question.of(by=["sampling"], metrics=[RATE], baseline=text)
        cells = [cell("a", [1.0, 1.1], sampling="greedy"), cell("b", [2.0, 2.1], sampling=sampled)]
        assert [row.is_baseline for row in only(answer_to(store, cells, asked).blocks).rows] == [False, True]
    assert Question.of(by=["sampling", "gpus"], baseline=f"sampling={sampled},gpus=1").baseline == {
        "sampling": sampled,
        "gpus": "1",
    }


def test_equal_figures_are_the_same_also_where_they_were_measured_once() -> None:
    cells = [cell("a", [4.0], dtype="float16"), cell("b", [4.0], dtype="float32")]
    answer = compare(cells, ["dtype"], [RATE])
    assert verdicts.verdict(only(answer.blocks).rows[1]).text == "the same, but measured only once: no interval"


def test_a_difference_below_a_hundredth_of_a_percent_is_told_as_such() -> None:
    cells = [cell("a", [4.0], dtype="float16"), cell("b", [4.0001], dtype="float32")]
    row = only(compare(cells, ["dtype"], [RATE]).blocks).rows[1]
    assert verdicts.verdict(row).text.startswith("<0.01% faster")


def test_notes_on_many_runs_count_them() -> None:
    wide = [cell(f"run{n}", [1.0, 1.0 + n / 10], batch_size=n) for n in range(3, 13)]
    once = [cell(f"once{n}", [1.0], batch_size=n) for n in range(20, 30)]
    notes = compare([*wide, *once], ["batch_size"], [RATE]).notes
    (spread,) = [note for note in notes if "slowed" in note]
    assert "of 10 runs" in spread and "run12" in spread
    assert any(note.endswith("the spread is unknown: 10 runs") for note in notes)


def test_the_spread_of_engine_loads_is_called_theirs() -> None:
    loads = replace(cell("a"), values={"load_s": [[4.0], [4.1], [6.0]]}, loads=("1", "2", "3"))
    notes = compare([loads], [], ["load_s"]).notes
    assert any(note.startswith("the 3 engine loads of a differ by up to ") for note in notes)


def test_an_engine_option_is_an_axis_too() -> None:
    cells = [
        cell(str(n), [float(n)], engine_options=json.dumps({"max_num_seqs": n, "block_size": 16})) for n in (8, 64)
    ]
    apart = with_engine_options(cells, ["max_num_seqs"])
    answer = compare(apart, ["max_num_seqs"], [RATE])
    assert [row.at for row in only(answer.blocks).rows] == [{"max_num_seqs": 8}, {"max_num_seqs": 64}]
    assert answer.warnings == []
    refused(lambda: with_engine_options(cells, ["max_num_seq"]), WrongUseError)
    unset = compare(with_engine_options(cells, ["kv_cache_dtype"]), ["kv_cache_dtype"], [RATE])
    assert any("all runs have the same kv_cache_dtype" in text for text in unset.warnings)


def test_many_intervals_are_told_to_hold_by_themselves_only() -> None:
    cells = [cell(str(n), [float(n), n + 0.1], batch_size=n) for n in range(1, 23)]
    assert ["by chance" in note for note in compare(cells, [], [RATE]).notes] == [False, True]
    assert ["by chance" in note for note in compare(cells[:5], [], [RATE]).notes] == [False]


# ---------------------------------------------------------------- words that are none


def test_an_unknown_axis_is_named_with_the_nearest() -> None:
    error = refused(lambda: check_axes(["dtyp"]), WrongUseError)
    assert ("'dtyp'" in error.message, "'dtype'" in error.remedy) == (True, True)
    check_axes(AXES)


def test_an_unknown_metric_is_named_with_the_nearest_and_the_page_of_all() -> None:
    error = refused(lambda: metric_named("output_toks"), WrongUseError)
    assert ("'output_toks'" in error.message, "'output_tok_s'" in error.remedy) == (True, True)
    assert "docs/metrics.md" in error.remedy
    assert len(error.remedy) < 100


@pytest.mark.parametrize(
    ("word", "metric"),
    [
        ("throughput", RATE), ("Tokens per second", RATE), ("latency", "e2e_s"), ("time to first token", "ttft_s"),
        ("TTFT", "ttft_s"), ("ttft_s", "ttft_s"), ("peak memory", "peak_allocated_bytes"), ("load", "load_s"),
        ("latency p99", "e2e_p99_s"), ("kv cache", "kv_cache_used_bytes"), ("Output Tok S", RATE),
    ],
)  # fmt: skip
def test_a_metric_has_its_title_and_plain_words_as_names(word: str, metric: str) -> None:
    assert metric_named(word) == metric
    assert Question.of(metrics=[word, metric]).metrics == (metric,)


def test_no_two_metrics_have_one_name() -> None:
    assert all(metric_named(metric.title) == name for name, metric in ALL_METRICS.items())


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
    assert "text, " not in shown
    assert "text, dtype float16: text of float16" in labctl("compare", "--metric", RATE, "--details").out


def test_the_command_prints_values_for_a_spreadsheet(labctl: Labctl, records: Records) -> None:
    two_dtypes(records)
    blocks = labctl("compare", "--metric", RATE, "--json").json["blocks"]
    rows = list(csv.DictReader(io.StringIO(labctl("compare", "--metric", RATE, "--csv").out)))
    assert [(row["metric"], row["unit"], row["dtype"]) for row in rows] == [
        (RATE, "tok/s", "float16"),
        (RATE, "tok/s", "bfloat16"),
    ]
    assert [float(row["mean"]) for row in rows] == [row["mean"] for row in blocks[0]["rows"]]


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
    records.submit()
    ran = labctl("compare")
    assert (ran.code, ran.out) == (6, "")
    assert "no results yet (1 unknown)" in ran.err


def test_where_all_runs_failed_the_exit_code_is_of_a_failure(labctl: Labctl, records: Records) -> None:
    batch = records.submit()
    records.failed(batch, records.attempt(batch))
    ran = labctl("compare")
    assert (ran.code, ran.out) == (1, "")
    assert "all runs ended without a result (1 failed)" in ran.err
    assert "labctl retry" in ran.err


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


def test_the_workspaces_other_runs_show_how_loads_spread(labctl: Labctl, records: Records) -> None:
    """A run with three loads, of another request, is found by the command; one with a load alone says nothing."""
    loads = records.submit("1", lengths=(8,), name="loads")
    for age_s, times in ((600, 1.0), (400, 1.01), (200, 0.99)):
        repeats = [measured(repeat) for repeat in range(3)]
        for repeat in repeats:
            repeat.wall_s = len(repeat.samples[0].token_ids) / (times * (100.0 + repeat.repeat / 10))
        records.done(loads, records.attempt(loads, slurm_id="1", age_s=age_s), repeats=repeats)
    two_dtypes(records)
    notes = labctl("compare", "--metric", RATE, "--json").json["notes"]
    told = "engine loads of hf on dgxh differ by 1.0% in throughput, as measured in this workspace"
    assert told in notes


def test_many_runs_without_a_result_are_counted(labctl: Labctl, records: Records) -> None:
    batch = records.submit(lengths=range(1, 10))
    attempt = records.attempt(batch)
    for place, run in enumerate(batch.runs):
        (records.done if place < 3 else records.failed)(batch, attempt, run)
    assert "warning: no result for 6 runs: 6 failed; labctl status shows why" in labctl("compare").err.splitlines()


def test_of_a_table_of_many_rows_the_first_are_shown(
    labctl: Labctl, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number that is shown is lowered from 1,000."""
    monkeypatch.setattr(comparison, "ROWS_SHOWN", 4)
    batch = records.submit(lengths=range(1, 8))
    attempt = records.attempt(batch)
    for run in batch.runs:
        records.done(batch, attempt, run)
    shown = labctl("compare", "--metric", RATE).out
    assert [run.run_id for run in batch.runs if run.run_id in shown] == [run.run_id for run in batch.runs[:4]]
    assert "... and 3 more rows: print all with --csv or --json, or select runs with --where" in shown
    assert len(labctl("compare", "--metric", RATE, "--csv").out.splitlines()) == 8


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


# ---------------------------------------------------------------- the command's questions


def four_cells(records: Records) -> list[str]:
    """Two backends at two lengths; vllm is four times as fast as hf at 16, and as fast at 8."""
    ids = []
    for number, backend in enumerate(("hf", "vllm")):
        batch = records.submit(str(1000 + number), backend=backend, lengths=(8, 16), name=backend)
        attempt = records.attempt(batch, slurm_id=str(1000 + number))
        for run in batch.runs:
            repeats = [measured(repeat) for repeat in range(3)]
            for repeat in repeats:
                times = 4.0 if backend == "vllm" and run.max_new_tokens == 16 else 1.0
                repeat.wall_s = len(repeat.samples[0].token_ids) / (times * (100.0 + repeat.repeat / 10))
            records.done(batch, attempt, run, repeats=repeats)
            ids.append(run.run_id)
    return ids


def test_two_axes_make_a_grid(labctl: Labctl, records: Records) -> None:
    four_cells(records)
    ran = labctl("compare", "--all", "--by", "backend", "--by", "max_new_tokens", "--metric", RATE)
    lines = ran.out.splitlines()
    assert lines[1].split() == ["max_new_tokens", "hf", "vllm", "(ratio", "to", "hf)"]
    assert lines[2].split()[:6] == ["8", "100.1", "tok/s*", "100.1", "tok/s*", "1x"]
    assert lines[3].split()[:6] == ["16", "100.1", "tok/s*", "400.4", "tok/s*", "4x"]
    assert "vllm is 4x faster (3.21-4.98) than hf in throughput at max_new_tokens 16" in ran.out
    assert "vllm vs hf in throughput at max_new_tokens 8: no significant difference" in ran.out
    written = labctl("compare", "--all", "--by", "backend,max_new_tokens", "--metric", RATE).out
    assert written == ran.out


def test_the_baseline_is_named_on_the_command_line(labctl: Labctl, records: Records) -> None:
    four_cells(records)
    flags = ["--all", "--by", "backend", "--metric", RATE, "--where", "max_new_tokens>8"]
    ran = labctl("compare", *flags, "--baseline", "vllm")
    assert "hf is 4x slower (3.21-4.98) than vllm in throughput" in ran.out
    assert labctl("compare", *flags, "--baseline", "backend=vllm").out == ran.out
    assert labctl("compare", *flags, "--baseline", "other").code == 2


def test_conditions_leave_what_they_say(labctl: Labctl, records: Records) -> None:
    ids = four_cells(records)
    for conditions, left in (
        (["max_new_tokens<16"], [0, 2]),
        (["backend in vllm,other", "max_new_tokens>=16"], [3]),
        (["backend!=hf"], [2, 3]),
    ):
        flags = [word for condition in conditions for word in ("--where", condition)]
        blocks = labctl("compare", "--all", "--metric", RATE, "--json", *flags).json["blocks"]
        assert [row["run_id"] for block in blocks for row in block["rows"]] == [ids[place] for place in left]


def test_without_a_metric_one_table_has_a_row_for_each_run(labctl: Labctl, records: Records) -> None:
    ids = four_cells(records)
    ran = labctl("compare", "--all", "--by", "backend")
    assert ran.out.count("higher is better") == 1
    head, *lines = ran.out.strip().splitlines()[1:]
    for column in ("run", "backend", "max_new_tokens", "throughput", "ttft", "tpot", "ratio (95% CI)", "verdict"):
        assert column in head
    ends = {line.split()[0]: line for line in lines}
    assert list(ends) == [ids[place][:6] for place in (0, 2, 1, 3)]
    assert ends[ids[1][:6]].endswith(" 1x  baseline")
    assert ends[ids[3][:6]].endswith(" 4x (3.21-4.98)  faster")
    assert ends[ids[2][:6]].endswith("not significant")  # as fast: the interval contains 1
    assert "faster" not in ends[ids[2][:6]] and "(0." in ends[ids[2][:6]]


def test_one_run_has_no_ratio_in_the_overview(labctl: Labctl, records: Records) -> None:
    batch = records.submit()
    records.done(batch, records.attempt(batch))
    head, line = labctl("compare").out.strip().splitlines()
    assert head.split()[:3] == ["run", "throughput", "ttft"]
    assert "ratio" not in head and line.startswith(batch.runs[0].run_id[:6])


def test_below_the_overview_are_few_lines_and_where_the_rest_is(
    labctl: Labctl, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of lines is lowered from 5."""
    monkeypatch.setattr(comparison, "LINES_BELOW", 3)
    batch = records.submit(lengths=range(1, 10))
    attempt = records.attempt(batch)
    for place, run in enumerate(batch.runs):
        (records.done if place < 3 else records.failed)(batch, attempt, run)
    brief, whole = labctl("compare"), labctl("compare", "--details")
    _, *lines = brief.err.splitlines()  # the first is about Slurm
    _, *all_lines = whole.err.splitlines()
    assert len(lines) == 3
    assert lines[0] == all_lines[0] == "warning: no result for 6 runs: 6 failed; labctl status shows why"
    assert lines[1].startswith("note: * mean throughput is too uncertain")
    assert lines[2].startswith(f"{len(all_lines) - 2} more notes: ")
    assert "labctl compare --details" in lines[2]


def test_the_name_of_the_request_is_an_axis(labctl: Labctl, records: Records) -> None:
    """One run, measured by two requests: the attempts of each are its own."""
    for name, slurm_id in (("before", "1"), ("after", "2")):
        batch = records.submit(slurm_id, name=name)
        records.done(batch, records.attempt(batch, slurm_id=slurm_id, age_s=100 - int(slurm_id)))
    answer = labctl("compare", "--all", "--by", "name", "--metric", RATE, "--json").json
    (block,) = answer["blocks"]
    assert [row["at"]["name"] for row in block["rows"]] == ["before", "after"]
    assert block["rows"][1]["verdict"]["kind"] == "no significant difference"
    together = labctl("compare", "--all", "--metric", RATE, "--json").json["blocks"][0]["rows"]
    assert [(row["n"], row["n_of"]) for row in together] == [(2, "engine loads")]


def test_bars_are_as_long_as_the_figures(labctl: Labctl, records: Records) -> None:
    four_cells(records)
    shown = labctl(
        "compare", "--all", "--plot", "--metric", RATE, "--by", "backend", "--where", "max_new_tokens=16"
    ).out
    bars = [line.count("█") + line.count("▒") for line in shown.splitlines() if "█" in line]
    assert bars == [10, 40]


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize(
    "flags", [[], ["--details"], ["--by", "backend,max_new_tokens"], ["--plot"], ["--over", "time"]]
)
def test_every_form_fits_the_terminal(records: Records, width: int, flags: list[str]) -> None:
    four_cells(records)
    batch = records.submit("1000", backend="hf", lengths=(8,))
    records.done(batch, records.attempt(batch, age_s=5))
    code, printed = on_a_terminal(["compare", "--all", "--metric", RATE, *flags], width)
    assert code == 0
    assert [line for line in lines_of(printed) if len(line) > width] == []
    if width >= 80:
        assert any(("mean" in line and "ratio" in line) or "vllm" in line for line in lines_of(printed))


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [(1.0, "1x"), (0.98765, "0.988x"), (1.0501, "1.050x"), (13.24, "13.2x"), (1234.5, "1,234x"), (0.0234, "0.0234x"),
     (0.00001, "<0.001x")],
)  # fmt: skip
def test_a_ratio_is_shown_without_an_exponent(ratio: float, shown: str) -> None:
    assert ratio_figure(ratio) == shown


def test_values_for_programs_hold_what_is_needed_to_reckon_again(labctl: Labctl, records: Records) -> None:
    four_cells(records)
    answer = labctl("compare", "--all", "--by", "backend", "--metric", RATE, "--json").json
    row = answer["blocks"][1]["rows"][1]
    assert row["values"] == [[400.0, pytest.approx(400.4), pytest.approx(400.8)]]
    assert row["ratio_interval"][0] < row["ratio"] < row["ratio_interval"][1]
    assert row["verdict"]["kind"] == "better"
    assert answer["verdicts"][1] == f"vllm is {row['verdict']['text']} than hf in throughput at max_new_tokens 16"


def test_clocks_and_drivers_that_differ_are_warned_of(labctl: Labctl, records: Records) -> None:
    batch = records.submit(dtypes=("float16", "bfloat16"))
    for task, (driver, limit_w) in enumerate((("580.1", 700.0), ("570.2", 350.0))):
        clocks = [{"index": gpu, "sm_max_mhz": 1980, "power_limit_w": limit_w} for gpu in (0, 1)]
        fingerprint = {"effective_dtype": "float16", "driver": driver, "clocks": clocks, "gpus": [{"name": "H100"}] * 2}
        attempt = records.attempt(batch, task, slurm_id=f"1000_{task}")
        records.done(batch, attempt, batch.jobs[task].runs[0], fingerprint=fingerprint)
    warnings = labctl("compare", "--json").json["warnings"]
    assert warnings == [
        "the runs also differ in driver (580.1, 570.2)",
        "the runs also differ in clocks (at most 1980 MHz, 700 W, at most 1980 MHz, 350 W)",
    ]


def test_a_metric_without_a_value_says_where_it_has_none(labctl: Labctl, records: Records) -> None:
    four_cells(records)
    told = labctl("compare", "--all", "--by", "backend", "--metric", RATE, "--metric", "mbu").err
    assert "note: no run has a value for: bandwidth share" in told
    assert "bandwidth share has no value where a step gives several tokens at once (speculative decoding)" in told


# ---------------------------------------------------------------- GPUs


def scaled(gpus: int, parallel: str, rate: float, **axes: Any) -> Cell:
    made = cell(f"{parallel}{gpus}", [rate, rate], gpus=gpus, parallel=parallel, backend="vllm", **axes)
    made.values["output_tok_s_per_gpu"] = [[rate / gpus] * 2]
    return made


def test_each_way_to_share_a_model_has_its_speed_up_and_efficiency_against_one_gpu() -> None:
    cells = [scaled(1, "tensor", 100.0), scaled(2, "tensor", 170.0), scaled(2, "pipeline", 120.0), scaled(4, "tensor", 260.0),
             scaled(4, "pipeline", 200.0), scaled(4, "tensor=2,pipeline=2", 240.0)]  # fmt: skip
    answer = compare(cells, ["gpus"], [RATE, "output_tok_s_per_gpu"])
    assert answer.by == ["gpus", "parallel"]
    speed_up, efficiency = answer.blocks
    assert [(row.at["gpus"], row.at["parallel"]) for row in speed_up.rows] == [
        (1, "tensor"), (2, "tensor"), (2, "pipeline"), (4, "tensor"), (4, "pipeline"), (4, "tensor=2,pipeline=2")
    ]  # fmt: skip
    assert [row.ratio for row in speed_up.rows] == pytest.approx([1, 1.7, 1.2, 2.6, 2.0, 2.4])
    assert [row.ratio for row in efficiency.rows] == pytest.approx([1, 0.85, 0.6, 0.65, 0.5, 0.6])
    assert not [note for note in answer.notes if "parallel follows" in note]


def test_without_one_gpu_each_way_is_compared_with_itself_on_the_fewest() -> None:
    cells = [
        scaled(2, "tensor", 170.0),
        scaled(2, "pipeline", 120.0),
        scaled(4, "tensor", 260.0),
        scaled(4, "pipeline", 180.0),
    ]
    answer = compare(cells, ["gpus"], [RATE])
    ratios = {row.run_id: row.ratio for block in answer.blocks for row in block.rows}
    assert ratios == pytest.approx({"tensor2": 1, "pipeline2": 1, "tensor4": 260 / 170, "pipeline4": 1.5})


def test_ways_to_share_a_model_are_compared_at_equal_gpus() -> None:
    cells = [
        scaled(1, "tensor", 100.0),
        scaled(2, "tensor", 170.0),
        scaled(2, "pipeline", 120.0),
        scaled(2, "data", 190.0),
    ]
    answer = compare(cells, ["parallel"], [RATE])
    ratios = {row.run_id: row.ratio for block in answer.blocks for row in block.rows}
    assert ratios == {
        "tensor1": None,
        "tensor2": 1,
        "pipeline2": pytest.approx(12 / 17),
        "data2": pytest.approx(19 / 17),
    }
    assert any("tensor1" in note for note in answer.notes)


def test_the_command_shows_speed_up_efficiency_and_throughput_per_gpu(labctl: Labctl, records: Records) -> None:
    """One GPU makes 100 tokens/s, two 150."""
    records.workspace.settings_file.write_text('[partitions.dgxh]\nprice_per_gpu_hour = "3.60 EUR"\n', encoding="utf-8")
    for gpus, rate in ((1, 100.0), (2, 150.0)):
        (job,) = records.jobs()
        asked = {**job.runs[0].definition, "gpus": gpus}
        run = replace(job.runs[0], run_id=run_id_of(asked), definition=asked)
        batch = records.submit(str(50 + gpus), planned=[replace(job, gpus=gpus, runs=[run])])
        repeat = measured(0)
        repeat.wall_s = len(repeat.samples[0].token_ids) / rate
        records.done(
            batch, records.attempt(batch, slurm_id=str(50 + gpus)), repeats=[repeat, replace(repeat, repeat=1)]
        )
    shown = labctl("compare", "--all", "--by", "gpus").out
    table = [line.split() for line in shown.splitlines()]
    header = next(line for line in shown.splitlines() if "speed-up (95% CI)" in line)
    for column in ("throughput per GPU", "cost per million tokens", "efficiency"):
        assert column in header
    one, two = (next(row for row in table if len(row) > 1 and row[1] == gpus) for gpus in ("1", "2"))
    assert "100%" in one
    assert {"150", "75", "75%"} <= set(two)
    assert "13.33" in two  # 2 GPUs x 3.60 EUR / (150 x 3600 tokens) x 1,000,000
    details = labctl("compare", "--all", "--by", "gpus", "--details").out
    assert re.search(r"throughput, .*\n.*speed-up", details)
    assert re.search(r"throughput per GPU, .*\n.*efficiency", details)
