"""The interval of a ratio, by simulation through the comparison itself, against tables, and by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labctl_orchestrator.analysis import verdicts
from labctl_orchestrator.analysis.compare import compare
from labctl_orchestrator.analysis.comparison import AXES, Cell, Row
from labctl_orchestrator.analysis.intervals import Component, estimate, incomplete_beta, satterthwaite, t_975, variance

from .benchmarks.false_positives import ONE, TWO, Case, grid, pairs, share_called_different

RATE = "output_tok_s"
SAME: dict[str, object] = dict.fromkeys(AXES, "same")
# t(0.975, df): NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2.
TABLE = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    8: 2.306,
    10: 2.228,
    20: 2.086,
    30: 2.042,
    60: 2.000,
    100: 1.984,
}


@pytest.mark.parametrize(("df", "quantile"), TABLE.items())
def test_the_quantile_of_t_is_the_tables(df: int, quantile: float) -> None:
    assert round(t_975(df), 3) == quantile


def test_the_quantile_of_t_is_the_closed_form_where_there_is_one() -> None:
    assert t_975(1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-9)
    assert t_975(2) == pytest.approx(0.95 * math.sqrt(2 / (4 * 0.975 * 0.025)), rel=1e-9)


@given(st.floats(1, 1e4))
def test_a_quantile_is_never_too_near_and_falls_with_the_degrees_of_freedom(df: float) -> None:
    assert 1.9599 < t_975(df + 1) < t_975(df) * (1 + 1e-9)


def test_the_incomplete_beta_function_is_what_whole_numbers_give() -> None:
    assert incomplete_beta(0.3, 1, 1) == pytest.approx(0.3)
    assert incomplete_beta(0.2, 2, 3) == pytest.approx(1 - 0.8**4 - 4 * 0.2 * 0.8**3)  # at least 2 of 4 with 0.2 each


def test_degrees_of_freedom_are_rounded_down() -> None:
    assert t_975(3.999) == t_975(3.99) > t_975(4)
    assert t_975(119.9) == t_975(110) > t_975(120)
    assert t_975(1e9) == t_975(math.inf) == pytest.approx(1.959964, abs=1e-6)


def test_welchs_interval_by_hand() -> None:
    """Variances 1 and 4 of three samples each: se = sqrt(1/3 + 4/3), df = (5/3)^2 / ((1/9 + 16/9) / 2) = 50/17."""
    parts = [Component(variance([2.0, 3.0, 4.0]) / 3, 2), Component(variance([3.0, 5.0, 7.0]) / 3, 2)]
    assert satterthwaite(parts) == pytest.approx(50 / 17)
    found = estimate(-2.0, parts, [])
    half = t_975(50 / 17) * math.sqrt(5 / 3)
    assert found == pytest.approx((-2.0, -2 - half, -2 + half))


def test_what_repeats_add_does_not_make_an_interval_narrower() -> None:
    between = [Component(1.0, 2)]
    assert estimate(0.0, between, [Component(0.5, 50)]).high == pytest.approx(t_975(2) * math.sqrt(1.5))
    assert estimate(0.0, between, [Component(0.5, 0.1)]).high > t_975(2) * math.sqrt(1.5)  # type: ignore[operator]
    assert estimate(3.0, [Component(0.0, 4)], [Component(0.0, 4)]) == (3.0, 3.0, 3.0)


# ---------------------------------------------------------------- by simulation

# A thinned form of tests/benchmarks/false_positives.py, whose tables are in docs/validation.md. Seeds are fixed.
PAIRS = 200
MOST_BY_CHANCE = 0.05 + 4 * math.sqrt(0.05 * 0.95 / PAIRS)


def test_equal_runs_are_called_different_in_at_most_one_of_twenty_pairs() -> None:
    cases = list(grid())[::29]
    shares = {case: share_called_different(case, PAIRS, number) for number, case in enumerate(cases)}
    assert len({case.history for case in cases}) * len({case.loads for case in cases}) == 12
    assert {case: share for case, share in shares.items() if share > MOST_BY_CHANCE} == {}
    assert sum(shares.values()) / len(shares) < 0.05


def test_welchs_test_over_the_repeats_of_one_load_fails_that_bound() -> None:
    """What `compare` did before engine loads were its samples: the bound above can fail."""
    case = Case(0.025, 0.005, (3, 3), (1, 1), 0, TWO)

    def called_different(row: Row) -> bool:
        logs = [[math.log(value) for value in one.values[0]] for one in (row, row.baseline) if one]
        parts = [Component(variance(of) / len(of), len(of) - 1) for of in logs]
        found = estimate(sum(logs[0]) / 3 - sum(logs[1]) / 3, parts, [])
        return found.low is not None and found.high is not None and not found.low <= 0 <= found.high

    rows = pairs(case, PAIRS, 1)
    assert sum(map(called_different, rows)) / PAIRS > 0.6
    assert sum(verdicts.kind(row) != verdicts.NO_DIFFERENCE for row in rows) / PAIRS < MOST_BY_CHANCE


@pytest.mark.parametrize(
    "case",
    [
        Case(0.05, 0.005, (3, 3), (3, 3), 0, ONE),
        Case(0.025, 0.005, (3, 3), (1, 3), 3, ONE),
        Case(0.05, 0.005, (3, 3), (1, 1), 0, TWO),
    ],
)
def test_where_the_spread_is_measured_well_or_is_what_is_assumed_it_is_one_of_twenty(case: Case) -> None:
    assert share_called_different(case, 1000, 3) == pytest.approx(0.05, abs=0.025)


def test_a_difference_of_5_percent_is_found_by_three_loads_that_differ_by_1_percent() -> None:
    case = Case(0.01, 0.01, (3, 3), (3, 3), 3, ONE)
    assert share_called_different(case, PAIRS, 5, times=1.05) > 0.95


def paired(cells: Sequence[tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]]]) -> list[Row]:
    """The second row of each pair of cells, compared with the first: a pair is (values by load, values by load)."""
    made = [
        Cell(f"{number}{backend}", {**SAME, "backend": backend, "max_new_tokens": number}, {RATE: values}, {})
        for number, pair in enumerate(cells)
        for backend, values in zip(("hf", "vllm"), map(list, pair), strict=True)
    ]  # fmt: skip
    return [block.rows[1] for block in compare(made, ["backend"], [RATE]).blocks]


@pytest.mark.parametrize(("first", "second"), [([5.0], [10.0]), ([5.0], [9.0, 11.0]), ([4.0, 6.0], [10.0])])
def test_one_repeat_gives_no_interval_and_says_so(first: list[float], second: list[float]) -> None:
    (row, _) = paired([([first], [second])] * 2)
    assert row.ratio == pytest.approx(2.0, rel=0.03)
    assert row.ratio_interval is None
    assert verdicts.verdict(row).kind == verdicts.MEASURED_ONCE
    assert "measured only once: no interval" in verdicts.verdict(row).text


@given(
    st.lists(st.floats(0.01, 1e6), min_size=2, max_size=8),
    st.lists(st.floats(0.01, 1e6), min_size=2, max_size=8),
    st.floats(0.1, 10),
)
def test_an_interval_holds_its_ratio_and_does_not_depend_on_the_unit(
    one: list[float], other: list[float], unit: float
) -> None:
    row = paired([([one], [other])])[0]
    scaled = paired([([[unit * value for value in one]], [[unit * value for value in other]])])[0]
    assert row.ratio is not None and row.ratio_interval is not None and scaled.ratio_interval is not None
    assert row.ratio_interval[0] <= row.ratio * (1 + 1e-9)
    assert row.ratio_interval[1] >= row.ratio * (1 - 1e-9)
    assert scaled.ratio_interval == pytest.approx(row.ratio_interval, rel=1e-2)
