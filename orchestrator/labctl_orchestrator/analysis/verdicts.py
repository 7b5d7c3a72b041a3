"""A row against its baseline in words: "vllm is 13.2x faster (12.8-13.5) than hf at batch_size 64". Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from labctl_orchestrator.analysis.comparison import AxisValue, Block, Comparison, Row
from labctl_orchestrator.analysis.intervals import ROUNDING
from labctl_orchestrator.analysis.metrics import ALL_METRICS, MONEY, figure

# The kinds of verdict.
BASELINE = "baseline"
BETTER, WORSE = "better", "worse"
# Of a metric of which neither way is better.
DIFFERS = "differs"
NO_DIFFERENCE = "no significant difference"
MEASURED_ONCE = "measured once"
NOT_COMPARABLE = "not comparable"
NO_VALUE = "no value"

# From here a ratio is told as a number of times, below it in percent.
TOLD_IN_TIMES = 1.1


class Verdict(NamedTuple):
    """`kind` is one of this module's; `text` has no subject: "13.2x faster (12.8-13.5)"."""

    kind: str
    text: str


def kind(row: Row) -> str:
    """How the row stands to its baseline, by its 95% interval: one of this module's kinds."""
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
    """By what share the row is worse than its baseline, beyond the spread: 0.05 for 95 tok/s after 100, or for 105 ms after
    100; 0 where it is not worse, or may be by chance. Of figures that have no ratio, infinity where it is worse."""
    if kind(row) != WORSE:
        return 0.0
    if row.ratio is None:
        return math.inf
    return 1 - row.ratio if ALL_METRICS[row.metric].better == "higher" else row.ratio - 1


def regressions(answer: Comparison, threshold: float) -> list[str]:
    """The verdicts on rows that are worse than their baseline by more than the threshold (0.05 is 5%)."""
    return [
        sentence(row, row.baseline, block)
        for block in answer.blocks
        for row in block.rows
        if row.baseline is not None and loss_of(row) > threshold
    ]


def verdict(row: Row) -> Verdict:
    """How the row stands to its baseline, in words too."""
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


def _higher_or_lower(row: Row) -> str:
    return "higher" if (row.difference or 0.0) > 0 else "lower"


def sentence(row: Row, baseline: Row, block: Block) -> str:
    """The verdict with its subject, what it is compared with, and where."""
    told = verdict(row)
    ours, theirs = _apart(row.at, baseline.at)
    if ours == theirs:  # nothing but the run tells them apart
        ours, theirs = f"{ours} {row.run_id}".strip(), f"{theirs} {baseline.run_id}".strip()
    shared = {axis: value for axis, value in row.at.items() if baseline.at[axis] == value}
    at = ", ".join(f"{axis} {value}" for axis, value in {**block.fixed, **shared}.items())
    where = f" at {at}" if at else ""
    if told.kind in (BETTER, WORSE, DIFFERS):
        return f"{ours} is {told.text} than {theirs} in {block.title}{where}"
    if told.kind == NO_DIFFERENCE:
        return f"{ours} and {theirs} in {block.title}{where}: {told.text}"
    return f"{ours} against {theirs} in {block.title}{where}: {told.text}"


def _apart(one: Mapping[str, AxisValue], other: Mapping[str, AxisValue]) -> tuple[str, str]:
    """What each is called: by the axes on which they differ."""
    differing = [axis for axis in one if one[axis] != other[axis]]
    return _called(one, differing or list(one)), _called(other, differing or list(one))


def _called(at: Mapping[str, AxisValue], axes: Sequence[str]) -> str:
    words = [_named(axis, at[axis]) for axis in axes if at[axis] not in ("", None)]
    return " ".join(words or [f"no {axis}" for axis in axes])


def _named(axis: str, value: AxisValue) -> str:
    """A value that tells what it is by itself, or with its axis: "vllm", "batch_size 64"."""
    return f"{axis} {value}" if isinstance(value, int | float) or value in ("{}", "default") else str(value)


def _text(found: str, row: Row) -> str:
    if found == NOT_COMPARABLE:
        return f"not comparable: {row.not_comparable}"
    if row.baseline is None or found == NO_VALUE:
        return "the baseline" if found == BASELINE else "no value" if row.baseline else "no baseline"
    told, span, shown = _of_a_ratio(row, row.ratio) if row.ratio is not None else _of_a_difference(row)
    if found == MEASURED_ONCE:
        return f"{told}, but measured once: no interval can be given"
    if found == NO_DIFFERENCE:
        interval = row.ratio_interval or row.difference_interval
        if interval and interval[0] == interval[1]:
            return "the same in every repeat"
        return f"no significant difference ({shown})"
    return f"{told} ({span})"


def _of_a_ratio(row: Row, ratio: float) -> tuple[str, str, str]:
    """("13.2x faster", its interval, both as plain ratios)."""
    same = abs(math.log(ratio)) <= ROUNDING
    told = "the same" if same else f"{_times(ratio)} {_word(row.metric, ratio)}"
    interval = row.ratio_interval
    if interval is None:
        return told, "", ""
    plain = f"{ratio_figure(ratio)}, 95% CI {ratio_figure(interval[0])[:-1]}-{ratio_figure(interval[1])[:-1]}"
    return told, _span(ratio, interval), plain


def _of_a_difference(row: Row) -> tuple[str, str, str]:
    """("1.2 s higher", its interval, both with their signs)."""
    unit, difference = row.unit, row.difference or 0.0
    told = f"{figure(abs(difference), unit)} {_higher_or_lower(row)}" if difference else "the same"
    interval = row.difference_interval
    if interval is None:
        return told, "", ""
    span = f"{signed(interval[0], unit)} to {signed(interval[1], unit)}"
    return told, span, f"{signed(difference, unit)}, 95% CI {span}"


def signed(value: float, unit: str) -> str:
    """ "+1.2 s"."""
    return ("+" if value >= 0 else "-") + figure(abs(value), unit)


# ---------------------------------------------------------------- words for a ratio


def _word(metric: str, ratio: float) -> str:
    told = ALL_METRICS[metric]
    is_better = (ratio > 1) == (told.better == "higher")
    if metric in ("gpu_s", "queue_s"):  # no speed of anything
        return "longer" if ratio > 1 else "shorter"
    if told.unit in ("s", "tok/s"):
        return "faster" if is_better else "slower"
    if metric in MONEY:
        return "cheaper" if is_better else "dearer"
    return "higher" if ratio > 1 else "lower"


def _times(ratio: float) -> str:
    """How many times as much, or as little: "13.2x"; of little "3.1%"."""
    factor = max(ratio, 1 / ratio)
    return f"{_short(factor)}x" if factor >= TOLD_IN_TIMES else f"{_percent(factor)}%"


def _span(ratio: float, interval: tuple[float, float]) -> str:
    """The interval of `_times`, as that is told."""
    low, high = sorted(max(bound, 1 / bound) for bound in interval)
    if max(ratio, 1 / ratio) >= TOLD_IN_TIMES:
        return f"{_short(low)}-{_short(high)}"
    return f"{_percent(low)}-{_percent(high)}%"


def _short(number: float) -> str:
    """Three digits, and no exponent."""
    if number >= 999.5:
        return f"{number:,.0f}"
    return f"{number:.3g}" if number >= 0.001 else "<0.001"


def _percent(factor: float) -> str:
    percent = (factor - 1) * 100
    return f"{percent:.2g}" if percent >= 0.01 else "<0.01"


def ratio_figure(ratio: float) -> str:
    """ "13.2x", and with a digit more near to one: "0.987x"."""
    if ratio == 1:
        return "1x"
    return f"{ratio:.3f}x" if 0.9 < ratio < 1.1 else f"{_short(ratio)}x"


def ratio_with_interval(ratio: float, interval: tuple[float, float] | None) -> str:
    """ "13.2x (12.8-13.5)"."""
    if interval is None or interval[0] == interval[1]:
        return ratio_figure(ratio)
    return f"{ratio_figure(ratio)} ({ratio_figure(interval[0])[:-1]}-{ratio_figure(interval[1])[:-1]})"


def sentences(answer: Comparison) -> list[str]:
    """A sentence for each row that can be compared with its baseline, in the order of the rows."""
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
    """The fields and the verdict as plain values; `baseline` is the id of the run that it is compared with."""
    plain: dict[str, object] = {name: getattr(row, name) for name in ROW_FIELDS}
    plain["baseline"] = row.baseline.run_id if row.baseline else None
    return {**plain, "spread": row.spread, "verdict": verdict(row)._asdict()}


def to_json(answer: Comparison) -> dict[str, object]:
    """The fields and the verdicts as plain values; by hand, for `asdict` copies every value of every row."""
    blocks = [{**vars(block), "rows": [row_to_json(row) for row in block.rows]} for block in answer.blocks]
    return {**vars(answer), "blocks": blocks, "verdicts": sentences(answer)}
