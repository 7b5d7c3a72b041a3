"""A row against its baseline in words: "vllm is 13.2x faster (12.8-13.5) than hf at batch_size 64". Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from labctl_orchestrator.intervals import ROUNDING
from labctl_orchestrator.metrics import ALL_METRICS, MONEY, figure

if TYPE_CHECKING:
    from labctl_orchestrator.compare import Block, Row

# The kinds of verdict.
BASELINE = "baseline"
BETTER, WORSE = "better", "worse"
# Of a metric of which neither way is better.
DIFFERS = "differs"
NO_DIFFERENCE = "no difference"
ONE_REPEAT = "one repeat only"
NOT_COMPARABLE = "not comparable"
NO_VALUE = "no value"
WITHOUT_AN_ANSWER = (NOT_COMPARABLE, NO_VALUE)

# From here a ratio is told as a number of times, below it in percent.
TOLD_IN_TIMES = 1.1


class Verdict(NamedTuple):
    """`kind` is one of this module's; `text` has no subject: "13.2x faster (12.8-13.5)"."""

    kind: str
    text: str


def verdict(row: Row) -> Verdict:
    """How the row stands to its baseline, by its 95% interval."""
    if row.baseline is None:
        return Verdict(BASELINE if row.is_baseline else NO_VALUE, "the baseline" if row.is_baseline else "no baseline")
    if row.n == 0 or row.baseline.n == 0:
        return Verdict(NO_VALUE, "no value")
    if row.not_comparable:
        return Verdict(NOT_COMPARABLE, f"not comparable: {row.not_comparable}")
    if row.ratio is not None:
        return _of_a_ratio(row, row.ratio)
    return _of_a_difference(row)


def sentence(row: Row, baseline: Row, block: Block) -> str:
    """The verdict with its subject, what it is compared with, and where."""
    told = row.verdict
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


def _apart(one: dict[str, Any], other: dict[str, Any]) -> tuple[str, str]:
    differing = [axis for axis in one if one[axis] != other[axis]] or list(one)
    return tuple(" ".join(_named(axis, at[axis]) for axis in differing) for at in (one, other))  # type: ignore[return-value]


def _named(axis: str, value: Any) -> str:
    """A value that tells what it is by itself, or with its axis: "vllm", "batch_size 64"."""
    return f"{axis} {value}" if isinstance(value, int | float) or value in ("", "{}", "default") else str(value)


def _of_a_ratio(row: Row, ratio: float) -> Verdict:
    interval = row.ratio_interval
    told, is_better = _in_words(row.metric, ratio)
    if interval is None:
        return Verdict(ONE_REPEAT, f"{_times(ratio)} {told}, but measured once: no interval can be given")
    if not _leaves_out(interval, 1.0):
        if interval[0] == interval[1]:
            return Verdict(NO_DIFFERENCE, "the same in every repeat")
        span = f"{ratio_figure(ratio)}, {ratio_figure(interval[0])[:-1]}-{ratio_figure(interval[1])[:-1]}"
        return Verdict(NO_DIFFERENCE, f"no difference that these {row.compared_of} can show ({span})")
    return Verdict(BETTER if is_better else WORSE, f"{_times(ratio)} {told} ({_span(ratio, interval)})")


def _leaves_out(interval: tuple[float, float], value: float) -> bool:
    """Whether the value is outside of the interval, by more than what rounding makes of values that are all the same."""
    return interval[0] > value + ROUNDING or interval[1] < value - ROUNDING


def _of_a_difference(row: Row) -> Verdict:
    told = ALL_METRICS[row.metric]
    if row.difference is None:
        return Verdict(NO_VALUE, "no value")
    shown = signed(row.difference, told.unit)
    interval = row.difference_interval
    if interval is None:
        return Verdict(ONE_REPEAT, f"{shown}, but measured once: no interval can be given")
    span = f"{signed(interval[0], told.unit)} to {signed(interval[1], told.unit)}"
    if not _leaves_out(interval, 0.0):
        if interval[0] == interval[1]:
            return Verdict(NO_DIFFERENCE, "the same in every repeat")
        return Verdict(NO_DIFFERENCE, f"no difference that these {row.compared_of} can show ({shown}, {span})")
    higher = row.difference > 0
    text = f"{figure(abs(row.difference), told.unit)} {'higher' if higher else 'lower'} ({span})"
    if not told.better:
        return Verdict(DIFFERS, text)
    return Verdict(BETTER if higher == (told.better == "higher") else WORSE, text)


def signed(value: float, unit: str) -> str:
    """ "+1.2 s"."""
    return ("+" if value >= 0 else "-") + figure(abs(value), unit)


# ---------------------------------------------------------------- words for a ratio


def _in_words(metric: str, ratio: float) -> tuple[str, bool]:
    """(the word for this ratio, whether it is the better way)."""
    told = ALL_METRICS[metric]
    is_better = (ratio > 1) == (told.better == "higher")
    if told.unit in ("s", "tok/s"):
        return ("faster" if is_better else "slower"), is_better
    if metric in MONEY:
        return ("cheaper" if is_better else "dearer"), is_better
    return ("higher" if ratio > 1 else "lower"), is_better


def _times(ratio: float) -> str:
    """How many times as much, or as little: "13.2x"; of little "3.1%"."""
    factor = max(ratio, 1 / ratio)
    return f"{factor:.3g}x" if factor >= TOLD_IN_TIMES else f"{(factor - 1) * 100:.2g}%"


def _span(ratio: float, interval: tuple[float, float]) -> str:
    """The interval of `_times`, as that is told."""
    low, high = sorted(max(bound, 1 / bound) for bound in interval)
    if max(ratio, 1 / ratio) >= TOLD_IN_TIMES:
        return f"{low:.3g}-{high:.3g}"
    return f"{(low - 1) * 100:.2g}-{(high - 1) * 100:.2g}%"


def ratio_figure(ratio: float) -> str:
    """ "13.2x", and with a digit more near to one: "0.987x"."""
    if ratio == 1:
        return "1x"
    return f"{ratio:.3f}x" if 0.9 < ratio < 1.1 else f"{ratio:.3g}x"


def ratio_with_interval(ratio: float, interval: tuple[float, float] | None) -> str:
    """ "13.2x (12.8-13.5)"."""
    if interval is None or interval[0] == interval[1]:
        return ratio_figure(ratio)
    return f"{ratio_figure(ratio)} ({ratio_figure(interval[0])[:-1]}-{ratio_figure(interval[1])[:-1]})"
