"""The same cell over time: what changed, what got worse by more than the spread, and what a CI is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from labctl_orchestrator.analysis import verdicts
from labctl_orchestrator.analysis.comparison import AXES, Cell
from labctl_orchestrator.analysis.trend import History, trend
from labctl_orchestrator.request.request import percent
from labctl_slurm.errors import WrongUseError

from .conftest import Labctl, Records, measured, refused

RATE = "output_tok_s"
Attempt = tuple[str, Sequence[float]]  # (version of torch, a value a repeat)


def history(*attempts: Attempt, metric: str = RATE, run_id: str = "a") -> History:
    cells = [
        (
            f"2026-11-{day:02}T10:00:00.000Z",
            Cell(
                run_id,
                dict.fromkeys(AXES, "same"),
                {metric: [list(values)]},
                {"torch": torch},
                loads=(f"{run_id}.{day}",),
            ),
        )
        for day, (torch, values) in enumerate(attempts, 1)
    ]
    return run_id, cells


def around(rate: float) -> list[float]:
    return [rate * 0.99, rate, rate * 1.01]


def test_an_upgrade_that_costs_more_than_the_spread_is_a_regression() -> None:
    found = trend([history(("2.9", around(100)), ("2.10", around(80)))], [RATE])
    first, second = found.series[0].points
    assert (first.row.ratio, first.changed, first.is_regression) == (None, (), False)
    assert second.row.ratio == pytest.approx(0.8)
    assert second.changed == ("torch 2.9 -> 2.10",)
    assert second.is_regression
    assert found.regressions == [
        f"regression of a: throughput {verdicts.verdict(second.row).text}, since torch 2.9 -> 2.10",
    ]


def test_a_difference_within_the_spread_is_none() -> None:
    found = trend([history(("2.9", around(100)), ("2.10", around(99.5)))], [RATE])
    assert found.regressions == []
    assert found.notes == [
        "spread between engine loads of same on same is assumed: a standard deviation of 5%; --loads 3 measures it"
    ]


def test_a_regression_below_the_threshold_is_marked_and_not_told() -> None:
    before = [("2.9", [rate, rate + 0.1, rate - 0.1]) for rate in (100.0, 100.2, 99.8)]
    attempts = history(*before, ("2.10", [97.0, 97.1, 96.9]))
    found = trend([attempts], [RATE], threshold=0.05)
    assert (found.series[0].points[-1].is_regression, found.regressions) == (True, [])
    assert len(trend([attempts], [RATE], threshold=0.02).regressions) == 1


def test_a_time_that_grows_is_a_regression_and_one_that_shrinks_is_none() -> None:
    for value, count in ((2.0, 1), (0.5, 0)):
        attempts = history(("2.9", around(1.0)), ("2.10", around(value)), metric="ttft_s")
        assert len(trend([attempts], ["ttft_s"]).regressions) == count


def test_an_attempt_is_compared_with_all_loads_of_the_setup_before_its_own() -> None:
    found = trend(
        [history(("2.9", around(100)), ("2.9", around(101)), ("2.9", around(99)), ("2.10", around(50)), ("2.10", around(50)))],
        [RATE],
    )  # fmt: skip
    points = found.series[0].points
    assert [len(point.row.baseline.loads) if point.row.baseline else 0 for point in points] == [0, 1, 2, 3, 3]
    assert points[4].is_regression


def test_engine_loads_that_differ_as_much_among_themselves_are_no_regression() -> None:
    """Repeats within a load are 0.1% apart, loads 10%: the repeats alone would call each a change."""
    steady = [[rate, rate * 1.001, rate * 0.999] for rate in (100.0, 90.0, 110.0, 95.0, 92.0)]
    found = trend([history(*(("2.9", values) for values in steady))], [RATE])
    assert found.regressions == []
    assert sum("may be chance" in note for note in found.notes) == 1  # it looks 7% worse, which four loads cannot show


def test_other_runs_show_how_loads_spread_but_not_the_load_that_is_looked_at() -> None:
    """Four loads 0.1% apart, then one 5% slower: its own deviation is not in the spread that it is held against."""
    attempts = history(*(("2.9", around(rate)) for rate in (100.0, 100.1, 99.9, 100.0, 95.0)))
    own = replace(
        attempts[1][0][1],
        values={RATE: [of_load for _, cell in attempts[1] for of_load in cell.values[RATE]]},
        loads=tuple(f"a.{day}" for day in range(1, 6)),
    )
    found = trend([attempts], [RATE], load_history=[own])
    assert [point.is_regression for point in found.series[0].points] == [False] * 4 + [True]
    other = replace(
        own, run_id="b", values={RATE: [around(rate) for rate in (10.0, 11.0, 12.0)]}, loads=("x", "y", "z")
    )
    assert trend([attempts], [RATE], load_history=[own, other]).regressions == []
    elsewhere = replace(other, axes={**other.axes, "backend": "other"})
    assert len(trend([attempts], [RATE], load_history=[own, elsewhere]).regressions) == 1


def test_one_repeat_is_no_regression_and_is_said_to_be_too_few() -> None:
    found = trend([history(("2.9", [100.0]), ("2.10", [50.0]))], [RATE])
    assert found.regressions == []
    assert found.notes == ["a: throughput (0.5x) may be chance: measure more engine loads"]


def test_a_cell_that_was_measured_once_is_told_of() -> None:
    found = trend([history(("2.9", around(100)))], [RATE])
    assert (found.series, ["1 of 1 runs have one attempt" in note for note in found.notes]) == ([], [True])


@pytest.mark.parametrize("baseline", ["2026-11-01", "torch 2.9", "a.1"])
def test_the_baseline_may_be_a_day_a_version_or_an_attempt(baseline: str) -> None:
    attempts = history(("2.9", around(100)), ("2.10", around(80)), ("2.11", around(80)))
    points = trend([attempts], [RATE], baseline=baseline).series[0].points
    assert [point.row.ratio for point in points] == [None, pytest.approx(0.8), pytest.approx(0.8)]
    error = refused(lambda: trend([attempts], [RATE], baseline="torch 3"), WrongUseError)
    assert "'torch 3'" in error.message


def test_a_share_is_written_in_percent() -> None:
    assert percent("5%") == 0.05
    assert percent(" 0.5 % ") == pytest.approx(0.005)
    for text in ("5", "-5%", "five%", ""):
        refused(lambda text=text: percent(text), WrongUseError)


# ---------------------------------------------------------------- the command


def slower(times: float) -> list[Any]:
    made = []
    for number in range(3):
        repeat = measured(number)
        (sample,) = repeat.samples
        sample.token_times_s = [times * at for at in sample.token_times_s]
        made.append(replace(repeat, wall_s=times * repeat.wall_s))
    return made


def upgraded(records: Records, times: float) -> str:
    batch = records.submit()
    for day, torch, factor in ((1, "2.9.0", 1.0), (2, "2.10.0", times)):
        versions = {"packages": {"torch": torch}, "gpus": [{"name": "NVIDIA H100"}], "effective_dtype": "bfloat16"}
        attempt = records.attempt(batch, age_s=1000 - day)
        ended_at = f"2026-01-0{day}T00:00:00.000Z"
        records.done(batch, attempt, ended_at=ended_at, fingerprint=versions, repeats=slower(factor))
    return batch.runs[0].run_id


def test_the_command_fails_on_a_regression_where_it_is_asked_to(labctl: Labctl, records: Records) -> None:
    run_id = upgraded(records, 3.0)
    ran = labctl("compare", "--over", "time", "--metric", RATE, "--fail-on-regression", "5%")
    assert ran.code == 1
    assert f"regression of {run_id}: throughput 3x slower" in ran.out
    assert "torch 2.9.0 -> 2.10.0" in ran.out
    assert labctl("compare", "--over", "time", "--metric", RATE).code == 0
    assert labctl("compare", "--over", "time", "--metric", RATE, "--fail-on-regression", "90%").code == 0


def test_the_command_tells_the_same_to_programs(labctl: Labctl, records: Records) -> None:
    upgraded(records, 3.0)
    ran = labctl("compare", "--over", "time", "--metric", RATE, "--json")
    (series,) = ran.json["series"]
    assert [point["regression"] for point in series["points"]] == [False, True]
    assert series["points"][1]["ratio"] == pytest.approx(1 / 3)
    assert len(ran.json["regressions"]) == 1


@pytest.mark.parametrize("flags", [["--by", "dtype"], ["--text"], ["--csv"], ["--plot"]])
def test_over_time_has_a_form_of_its_own(labctl: Labctl, records: Records, flags: list[str]) -> None:
    assert labctl("compare", "--over", "time", *flags).code == 2
    assert labctl("compare", "--fail-on-regression", "5").code == 2


def test_a_plain_comparison_can_fail_on_a_regression_too(labctl: Labctl, records: Records) -> None:
    for name, times in (("before", 1.0), ("after", 3.0)):
        batch = records.submit("1" if name == "before" else "2", name=name)
        attempt = records.attempt(batch, slurm_id="1" if name == "before" else "2", age_s=100 / times)
        records.done(batch, attempt, repeats=slower(times))
    flags = ["--all", "--by", "name", "--baseline", "before", "--metric", RATE]
    ran = labctl("compare", *flags, "--fail-on-regression", "5%")
    assert ran.code == 1, ran.err
    assert "regression: after is 3x slower" in " ".join(ran.err.split())
    assert labctl("compare", *flags).code == 0
