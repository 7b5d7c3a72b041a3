"""The interval of a ratio, by simulation through the comparison itself, against tables, and by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labctl_orchestrator import verdicts
from labctl_orchestrator.compare import AXES, Cell, Row, compare
from labctl_orchestrator.intervals import Summary, incomplete_beta, summary, t_975, welch, with_one_spread

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


def test_welchs_interval_by_hand() -> None:
    """Means 3 and 5, variances 1 and 4, of 3 and 3: se = sqrt(1/3 + 4/3), df = (5/3)^2 / ((1/9 + 16/9) / 2) = 50/17."""
    of, to = summary([2.0, 3.0, 4.0]), summary([3.0, 5.0, 7.0])
    assert (of, to) == (Summary(3, 3.0, 1.0), Summary(3, 5.0, 4.0))
    estimate = welch(of, to)
    half = t_975(50 / 17) * math.sqrt(5 / 3)
    assert (estimate.difference, estimate.low, estimate.high) == pytest.approx((-2.0, -2 - half, -2 + half))


def test_one_load_against_several_has_the_interval_in_which_one_more_is_to_be_expected() -> None:
    estimate = with_one_spread(Summary(1, 7.0, 0.0), summary([3.0, 5.0, 7.0]))
    half = t_975(2) * math.sqrt(4 * (1 + 1 / 3))
    assert (estimate.difference, estimate.low, estimate.high) == pytest.approx((2.0, 2 - half, 2 + half))


# ---------------------------------------------------------------- by simulation


def pairs(cells: Sequence[tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]]]) -> list[Row]:
    """The second row of each pair of cells, compared with the first: a pair is (values by load, values by load)."""
    made = [
        Cell(f"{number}{backend}", {**SAME, "backend": backend, "max_new_tokens": number}, {RATE: values}, {})
        for number, pair in enumerate(cells)
        for backend, values in zip(("hf", "vllm"), map(list, pair), strict=True)
    ]  # fmt: skip
    return [block.rows[1] for block in compare(made, ["backend"], [RATE]).blocks]


def lognormal(draw: random.Random, n: int, noise: float, times: float = 1.0) -> list[list[float]]:
    return [[times * math.exp(draw.gauss(3.0, noise)) for _ in range(n)]]


@pytest.mark.parametrize("n", [3, 5, 10])
def test_of_equal_cells_the_interval_holds_one_in_95_of_100(n: int) -> None:
    draw = random.Random(n)
    rows = pairs([(lognormal(draw, n, 0.1), lognormal(draw, n, 0.1)) for _ in range(5000)])
    holds = sum(low <= 1 <= high for row in rows if row.ratio_interval for low, high in [row.ratio_interval])
    assert len(rows) == 5000
    assert holds / 5000 == pytest.approx(0.95, abs=0.02)
    called_equal = sum(row.verdict.kind == verdicts.NO_DIFFERENCE for row in rows)
    assert called_equal == holds


def test_of_engine_loads_that_differ_the_interval_holds_one_too() -> None:
    """Each load has its own level, 5% apart, and three repeats, 0.5% apart: the repeats alone would call most pairs different."""
    draw = random.Random(1)

    def cell(loads: int) -> list[list[float]]:
        levels = [math.exp(draw.gauss(3.0, 0.05)) for _ in range(loads)]
        return [lognormal(draw, 3, 0.005, level)[0] for level in levels]

    for ours, theirs in ((4, 4), (1, 5)):
        rows = pairs([(cell(theirs), cell(ours)) for _ in range(5000)])
        assert {row.n_compared for row in rows} == {(ours, theirs)}
        assert {row.compared_of for row in rows} == {"engine loads"}
        equal = sum(row.verdict.kind == verdicts.NO_DIFFERENCE for row in rows)
        assert equal / 5000 == pytest.approx(0.95, abs=0.02)
    repeats_of_one_load_each = pairs([(cell(1), cell(1)) for _ in range(1000)])
    assert sum(row.verdict.kind == verdicts.NO_DIFFERENCE for row in repeats_of_one_load_each) < 300


def test_a_difference_of_5_percent_at_2_percent_noise_is_found_by_five_repeats() -> None:
    draw = random.Random(5)
    rows = pairs([(lognormal(draw, 5, 0.02), lognormal(draw, 5, 0.02, 1.05)) for _ in range(1000)])
    assert sum(row.verdict.kind == verdicts.BETTER for row in rows) > 900
    assert sum(row.verdict.kind == verdicts.WORSE for row in rows) == 0


@pytest.mark.parametrize(("first", "second"), [([5.0], [10.0]), ([5.0], [9.0, 11.0]), ([4.0, 6.0], [10.0])])
def test_one_repeat_gives_no_interval_and_says_so(first: list[float], second: list[float]) -> None:
    (row, _) = pairs([([first], [second])] * 2)
    assert row.ratio == pytest.approx(2.0, rel=0.03)
    assert row.ratio_interval is None
    assert row.verdict.kind == verdicts.ONE_REPEAT
    assert "measured once: no interval can be given" in row.verdict.text


@given(
    st.lists(st.floats(0.01, 1e6), min_size=2, max_size=8),
    st.lists(st.floats(0.01, 1e6), min_size=2, max_size=8),
    st.floats(0.1, 10),
)
def test_an_interval_holds_its_ratio_and_does_not_depend_on_the_unit(
    one: list[float], other: list[float], unit: float
) -> None:
    row = pairs([([one], [other])])[0]
    scaled = pairs([([[unit * value for value in one]], [[unit * value for value in other]])])[0]
    assert row.ratio is not None and row.ratio_interval is not None and scaled.ratio_interval is not None
    assert row.ratio_interval[0] <= row.ratio * (1 + 1e-9)
    assert row.ratio_interval[1] >= row.ratio * (1 - 1e-9)
    assert scaled.ratio_interval == pytest.approx(row.ratio_interval, rel=1e-2)
