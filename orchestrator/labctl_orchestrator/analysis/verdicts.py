"""Verdicts: a row compared with its baseline in words, "vllm is 13.2x faster (12.8-13.5) than hf". Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from labctl_orchestrator.analysis.comparison import AxisValue, Block, Comparison, Row
from labctl_orchestrator.analysis.intervals import ROUNDING
from labctl_orchestrator.analysis.metrics import ALL_METRICS, MONEY, OF_A_TEXT, OF_TASKS, figure

# The kinds of verdict.
BASELINE = "baseline"
BETTER, WORSE = "better", "worse"
# For a metric without a better direction.
DIFFERS = "differs"
NO_DIFFERENCE = "no significant difference"
MEASURED_ONCE = "measured once"
NOT_COMPARABLE = "not comparable"
NO_VALUE = "no value"

# Larger ratios are written as times, smaller ones in percent.
TOLD_IN_TIMES = 1.1


class Verdict(NamedTuple):
    """`kind` is one of this module's kinds, `text` is without a subject: "13.2x faster (12.8-13.5)"."""

    kind: str
    text: str


def kind(row: Row) -> str:
    """The kind of verdict, by the 95% interval."""
    if row.baseline is None:
        return BASELINE if row.is_baseline else NO_VALUE
    if row.low is None or row.baseline.low is None:
        return NO_VALUE
    if row.not_comparable:
        return NOT_COMPARABLE
    if row.ratio is not None:
        interval, no_difference, is_more = row.ratio_interval, 1.0, row.ratio > 1
    else:
        interval, no_difference, is_more = row.difference_interval, 0.0, (row.difference or 0.0) > 0
    if interval is None:
        return MEASURED_ONCE
    if interval[0] <= no_difference + ROUNDING and interval[1] >= no_difference - ROUNDING:
        return NO_DIFFERENCE
    better = ALL_METRICS[row.metric].better
    if not better:
        return DIFFERS
    return BETTER if is_more == (better == "higher") else WORSE


def loss_of(row: Row) -> float:
    """The loss of a significantly worse row: 0.05 for 95 tok/s after 100, or 105 ms after 100; infinity for a metric without
    ratios; 0 if it is not significantly worse."""
    if kind(row) != WORSE:
        return 0.0
    if row.ratio is None:
        return math.inf
    return 1 - row.ratio if ALL_METRICS[row.metric].better == "higher" else row.ratio - 1


def regressions(answer: Comparison, threshold: float) -> list[str]:
    """The verdicts on rows with a loss of more than the threshold (0.05 is 5%)."""
    return [
        sentence(row, row.baseline, block)
        for block in answer.blocks
        for row in block.rows
        if row.baseline is not None and loss_of(row) > threshold
    ]


def verdict(row: Row) -> Verdict:
    """The verdict on a row."""
    found = kind(row)
    return Verdict(found, _text(found, row))


def in_short(row: Row) -> str:
    """The verdict in at most three words: "faster", "not significant", "baseline"."""
    found = kind(row)
    if found in (BETTER, WORSE, DIFFERS):
        return _word(row.metric, row.ratio) if row.ratio is not None else _higher_or_lower(row)
    if found == NO_VALUE:
        return "no value" if row.low is None else "baseline without value" if row.baseline else "no baseline"
    return "not significant" if found == NO_DIFFERENCE else found


def quality_in_short(row: Row) -> str:
    """The change of a quality metric against the baseline, "perplexity +0.31% (+0.12% to +0.5%)"; "" without one."""
    if row.baseline is None or row.is_baseline:
        return ""
    if row.metric in OF_TASKS and row.difference is not None:
        return f"{ALL_METRICS[row.metric].title} {signed_with_interval(row)}"
    if row.ratio is None:
        return ""
    return f"{ALL_METRICS[row.metric].title} {percent_change(row.ratio, row.ratio_interval)}"


def signed_with_interval(row: Row) -> str:
    """ "-0.02 (-0.045 to +0.005)", of a difference."""
    interval = row.difference_interval
    span = "" if interval is None else f" ({signed(interval[0], row.unit)} to {signed(interval[1], row.unit)})"
    return f"{signed(row.difference or 0.0, row.unit)}{span}"


def percent_change(ratio: float, interval: tuple[float, float] | None) -> str:
    """ "+0.31% (+0.12% to +0.5%)", of a ratio with its interval."""
    bounds = "" if interval is None else f" ({' to '.join(f'{(bound - 1) * 100:+.2g}%' for bound in interval)})"
    return f"{(ratio - 1) * 100:+.2g}%{bounds}"


def _higher_or_lower(row: Row) -> str:
    return "higher" if (row.difference or 0.0) > 0 else "lower"


def sentence(row: Row, baseline: Row, block: Block) -> str:
    """The verdict as a sentence, with the axis values that both rows share."""
    found = verdict(row)
    differing = [axis for axis in row.at if row.at[axis] != baseline.at[axis]]
    ours, theirs = (_called(one.at, differing or list(row.at)) for one in (row, baseline))
    if ours == theirs:  # they differ only in the run
        ours, theirs = f"{ours} {row.run_id}".strip(), f"{theirs} {baseline.run_id}".strip()
    shared = {axis: value for axis, value in row.at.items() if baseline.at[axis] == value}
    at = ", ".join(f"{axis} {value}" for axis, value in {**block.fixed, **shared}.items())
    where = f" at {at}" if at else ""
    if found.kind in (BETTER, WORSE, DIFFERS):
        return f"{ours} is {found.text} than {theirs} in {block.title}{where}"
    return f"{ours} vs {theirs} in {block.title}{where}: {found.text}"


def _called(at: Mapping[str, AxisValue], axes: Sequence[str]) -> str:
    words = [_named(axis, at[axis]) for axis in axes if at[axis] not in ("", None)]
    return " ".join(words or [f"no {axis}" for axis in axes])


def _named(axis: str, value: AxisValue) -> str:
    """A value, with its axis if it needs one: "vllm", "batch_size 64"."""
    return f"{axis} {value}" if isinstance(value, int | float) or value in ("{}", "default") else str(value)


def _text(found: str, row: Row) -> str:
    if found == NOT_COMPARABLE:
        return f"not comparable: {row.not_comparable}"
    if row.baseline is None or found == NO_VALUE:
        return "the baseline" if found == BASELINE else "no value" if row.baseline else "no baseline"
    words, span, shown = _of_a_ratio(row, row.ratio) if row.ratio is not None else _of_a_difference(row)
    if found == MEASURED_ONCE:
        return f"{words}, but measured only once: no interval"
    if found == NO_DIFFERENCE:
        interval = row.ratio_interval or row.difference_interval
        if interval and interval[0] == interval[1]:
            return "the same in every repeat"
        return f"no significant difference ({shown})"
    return f"{words} ({span})"


def _of_a_ratio(row: Row, ratio: float) -> tuple[str, str, str]:
    """("13.2x faster", its interval, both as plain ratios)."""
    same = abs(math.log(ratio)) <= ROUNDING
    words = "the same" if same else f"{_times(ratio)} {_word(row.metric, ratio)}"
    interval = row.ratio_interval
    if interval is None:
        return words, "", ""
    if row.metric in OF_A_TEXT:
        return words, _span(ratio, interval), percent_change(ratio, interval)
    plain = f"{ratio_figure(ratio)}, 95% CI {ratio_figure(interval[0])[:-1]}-{ratio_figure(interval[1])[:-1]}"
    return words, _span(ratio, interval), plain


def _of_a_difference(row: Row) -> tuple[str, str, str]:
    """("1.2 s higher", its interval, both with their signs)."""
    unit, difference = row.unit, row.difference or 0.0
    words = f"{figure(abs(difference), unit)} {_higher_or_lower(row)}" if difference else "the same"
    interval = row.difference_interval
    if interval is None:
        return words, "", ""
    span = f"{signed(interval[0], unit)} to {signed(interval[1], unit)}"
    return words, span, f"{signed(difference, unit)}, 95% CI {span}"


def signed(value: float, unit: str) -> str:
    """ "+1.2 s"."""
    return ("+" if value >= 0 else "-") + figure(abs(value), unit)


# ---------------------------------------------------------------- words for a ratio


def _word(metric: str, ratio: float) -> str:
    metric_text = ALL_METRICS[metric]
    is_better = (ratio > 1) == (metric_text.better == "higher")
    if metric in ("gpu_s", "queue_s"):  # no speed of anything
        return "longer" if ratio > 1 else "shorter"
    if metric_text.unit in ("s", "tok/s"):
        return "faster" if is_better else "slower"
    if metric in MONEY:
        return "cheaper" if is_better else "more expensive"
    return "higher" if ratio > 1 else "lower"


def _times(ratio: float) -> str:
    """The factor: "13.2x"; of a small one "3.1%"."""
    factor = max(ratio, 1 / ratio)
    return f"{_short(factor)}x" if factor >= TOLD_IN_TIMES else f"{_percent(factor)}%"


def _span(ratio: float, interval: tuple[float, float]) -> str:
    """The interval, in the form of `_times`."""
    low, high = sorted(max(bound, 1 / bound) for bound in interval)
    if max(ratio, 1 / ratio) >= TOLD_IN_TIMES:
        return f"{_short(low)}-{_short(high)}"
    return f"{_percent(low)}-{_percent(high)}%"


def _short(number: float) -> str:
    """Three digits, without an exponent."""
    if number >= 999.5:
        return f"{number:,.0f}"
    return f"{number:.3g}" if number >= 0.001 else "<0.001"


def _percent(factor: float) -> str:
    percent = (factor - 1) * 100
    return f"{percent:.2g}" if percent >= 0.01 else "<0.01"


def ratio_figure(ratio: float) -> str:
    """ "13.2x"; with one more digit near 1: "0.987x"."""
    if ratio == 1:
        return "1x"
    return f"{ratio:.3f}x" if 0.9 < ratio < 1.1 else f"{_short(ratio)}x"


def ratio_with_interval(ratio: float, interval: tuple[float, float] | None) -> str:
    """ "13.2x (12.8-13.5)"."""
    if interval is None or interval[0] == interval[1]:
        return ratio_figure(ratio)
    return f"{ratio_figure(ratio)} ({ratio_figure(interval[0])[:-1]}-{ratio_figure(interval[1])[:-1]})"


def sentences(answer: Comparison) -> list[str]:
    """A sentence for each row that has a baseline, in the order of the rows."""
    return [
        sentence(row, row.baseline, block)
        for block in answer.blocks
        for row in block.rows
        if row.baseline and row.has_an_answer
    ]


# ---------------------------------------------------------------- as plain values

ROW_FIELDS = (
    "run_id", "at", "values", "loads", "mean", "low", "high", "n", "n_of", "text", "currency", "is_baseline", "ratio",
    "ratio_interval", "difference", "difference_interval", "not_comparable", "doubts",
)  # fmt: skip


def row_to_json(row: Row) -> dict[str, object]:
    """The fields and the verdict as plain values; `baseline` is the baseline's run id."""
    plain: dict[str, object] = {name: getattr(row, name) for name in ROW_FIELDS}
    plain["baseline"] = row.baseline.run_id if row.baseline else None
    return {**plain, "spread": row.spread, "verdict": verdict(row)._asdict()}


def to_json(answer: Comparison) -> dict[str, object]:
    """The fields and the verdicts as plain values. `asdict` would copy every value of every row."""
    blocks = [{**vars(block), "rows": [row_to_json(row) for row in block.rows]} for block in answer.blocks]
    taken = [one.to_json() for one in answer.recommendations]
    return {**vars(answer), "blocks": blocks, "verdicts": sentences(answer), "recommendations": taken}
