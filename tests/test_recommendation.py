"""Which configuration `labctl compare` says to take under service levels."""

from __future__ import annotations

from typing import Any

import pytest

from labctl_orchestrator.analysis.comparison import AXES, Cell
from labctl_orchestrator.analysis.doubts import SATURATED, Doubt
from labctl_orchestrator.analysis.recommendation import recommendations
from labctl_orchestrator.request.service_levels import parse

from .conftest import Labctl, Records
from .test_goodput import two_runs

LEVELS = ["ttft_p99<500ms", "tpot_p90<50ms"]


def cell(run_id: str, rates: list[float], good: list[float], *, gpus: int = 2, **axes: Any) -> Cell:
    same: dict[str, Any] = {
        **dict.fromkeys(AXES), "partition": "dgxh", "backend": "vllm", "model": "m", "gpus": gpus, "served": 1,
        "input_len": "1024", "output_len": "128",
    }  # fmt: skip
    per_gpu = [[rate / gpus for rate in rates]] if gpus else [[]]
    values = {"output_tok_s": [rates], "output_tok_s_per_gpu": per_gpu, "good_share": [good]}
    return Cell(run_id, {**same, **axes}, values, {}, loads=("a",))


def test_of_the_runs_that_meet_the_levels_the_one_with_the_most_throughput_per_gpu_is_taken() -> None:
    cells = [
        cell("one-gpu", [600.0, 601.0], [1.0, 1.0], gpus=1, batch_size=16),
        cell("two-gpus", [1000.0, 1001.0], [1.0, 1.0], batch_size=16),
        cell("too-slow", [2000.0, 2001.0], [1.0, 0.99], batch_size=64),
    ]
    (found,) = recommendations(cells, LEVELS)
    assert found.taken is cells[0]
    assert (found.meeting, found.runs, found.metric) == (2, 3, "output_tok_s_per_gpu")
    (sentence,) = found.sentences
    assert sentence == (
        "2 of 3 runs meet ttft_p99<500ms, tpot_p90<50ms; take gpus 1, batch_size 16 (one-gp):"
        " of these it has the highest throughput per GPU, 600.5 tok/s/GPU"
    )


def test_without_gpus_it_is_the_throughput() -> None:
    cells = [cell("a", [5.0], [1.0], gpus=0, batch_size=1), cell("b", [9.0], [1.0], gpus=0, batch_size=4)]
    (found,) = recommendations(cells, LEVELS)
    assert (found.taken, found.metric) == (cells[1], "output_tok_s")


def test_runs_without_a_significant_difference_are_named() -> None:
    cells = [
        cell("a", [100.0, 130.0], [1.0, 1.0], batch_size=8),
        cell("b", [101.0, 131.0], [1.0, 1.0], batch_size=16),
        cell("c", [10.0, 10.1], [1.0, 1.0], batch_size=1),
    ]
    (found,) = recommendations(cells, LEVELS)
    assert (found.taken, found.alike) == (cells[1], (cells[0],))
    assert found.sentences[1] == "  no significant difference to batch_size 8 (a)"


def test_an_over_saturated_server_meets_no_level() -> None:
    fast = cell("fast", [900.0], [1.0], batch_size=None, request_rate=9.0)
    fast.doubts = (Doubt(SATURATED, 0.2),)
    cells = [cell("calm", [400.0], [1.0], request_rate=4.0), fast]
    (found,) = recommendations(cells, LEVELS)
    assert found.taken is cells[0]


def test_where_none_meets_the_levels_the_nearest_is_named() -> None:
    cells = [cell("a", [5.0], [0.2], batch_size=1), cell("b", [9.0], [0.5], batch_size=4)]
    (found,) = recommendations(cells, LEVELS)
    assert found.sentences == [
        "no run meets ttft_p99<500ms, tpot_p90<50ms; nearest: batch_size 4 (b), 50% good requests"
    ]
    (nothing,) = recommendations([cell("a", [5.0], [0.0], batch_size=1), cell("b", [9.0], [0.0], batch_size=4)], LEVELS)
    assert nothing.sentences == ["no run meets ttft_p99<500ms, tpot_p90<50ms"]


def test_each_workload_has_its_own_answer_and_offline_runs_are_none() -> None:
    lengths = {"input_len": "128", "output_len": "1024"}
    cells = [
        cell("a", [5.0], [1.0], batch_size=1),
        cell("b", [9.0], [1.0], batch_size=4),
        cell("offline", [99.0], [1.0], batch_size=4, served=0),
        cell("c", [50.0], [1.0], batch_size=1, **lengths),
        cell("d", [40.0], [1.0], batch_size=4, **lengths),
        cell("alone", [70.0], [1.0], batch_size=4, prefix_len=64),
    ]
    found = recommendations(cells, LEVELS)
    assert [one.taken for one in found] == [cells[1], cells[3]]
    assert found[1].sentences[0].startswith("2 of 2 runs with input_len 128, output_len 1024 meet ttft_p99<500ms, ")
    assert "; take batch_size 1 (c): " in found[1].sentences[0]


@pytest.mark.parametrize("text", ["ttft<500ms", "ttft_p99<500ms", "e2e_p99.9<2s"])
def test_a_level_is_written_as_it_was_given(text: str) -> None:
    assert str(parse(text)) == text


def test_compare_prints_the_configuration_to_take(labctl: Labctl, records: Records) -> None:
    two_runs(records)
    asked = ("compare", "--slo", "ttft<400ms")
    lines = [line for line in labctl(*asked).out.splitlines() if line.startswith("for ttft<400ms")]
    assert lines == [line for line in labctl(*asked, "--details").out.splitlines() if line.startswith("for ttft<400ms")]
    assert not lines  # the two runs have other lengths: other work
    assert labctl(*asked, "--json").json["recommendations"] == []
