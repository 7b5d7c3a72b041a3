"""Runs over time: each attempt compared with those of the setup before; significant regressions. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from labctl_orchestrator.analysis import load_spread, verdicts
from labctl_orchestrator.analysis.axes import varying_axes
from labctl_orchestrator.analysis.compare import row_against
from labctl_orchestrator.analysis.comparison import Axes, Cell, Row
from labctl_orchestrator.analysis.facts import changes_of
from labctl_orchestrator.analysis.load_spread import LoadSpreads
from labctl_orchestrator.analysis.metrics import ALL_METRICS, MetricText
from labctl_slurm.errors import WrongUseError

# Facts of the answer, not of the setup.
OF_THE_ANSWER = ("tokens generated", "finish reason")
# A loss from which a note says that it is not significant.
LOOKS_WORSE_FROM = 0.05
History = tuple[str, list[tuple[str, Cell]]]


@dataclass(frozen=True)
class Point:
    """One attempt: its end (ISO 8601, UTC), its values compared with the baseline's, and its changes since the attempt before
    ("torch 2.9.0 -> 2.10.0"). The loads of `row.baseline` are the attempts of the baseline."""

    at: str
    row: Row
    changed: tuple[str, ...] = ()

    @property
    def is_regression(self) -> bool:
        """Whether it is significantly worse than its baseline."""
        return verdicts.kind(self.row) == verdicts.WORSE

    def to_json(self) -> dict[str, object]:
        against = list(self.row.baseline.loads) if self.row.baseline else []
        return {**verdicts.row_to_json(self.row), "time": self.at, "changed": list(self.changed), "against": against,
                "regression": self.is_regression}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One run in one metric, oldest attempt first; `at` are the axes on which the runs differ."""

    metric: str
    run_id: str
    at: Axes
    points: list[Point]
    metric_text: MetricText

    def to_json(self) -> dict[str, object]:
        text = {"title": self.metric_text.title, "unit": self.metric_text.unit, "better": self.metric_text.better}
        points = [point.to_json() for point in self.points]
        return {"metric": self.metric, **text, "run_id": self.run_id, "at": self.at, "points": points}


@dataclass
class Trend:
    """Runs over time; `regressions` are sentences about latest attempts that are worse than before."""

    series: list[Series]
    regressions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        return {**vars(self), "series": [one.to_json() for one in self.series]}


def trend(
    histories: Sequence[History],
    metrics: Sequence[str],
    *,
    baseline: str | None = None,
    threshold: float = 0.0,
    load_history: Sequence[Cell] = (),
) -> Trend:
    """Compare each attempt of each run with its baseline.

    The baseline is the attempts of the previous setup (versions, GPUs); in the first setup, the attempts before. `baseline` names
    another: the beginning of a time or of an attempt's id, or a version ("torch 2.9.0"). `load_history` are the workspace's runs
    with several engine loads (`load_spread`). A regression is a latest attempt that is significantly worse, by more than
    `threshold` (0.05 is 5%). Raises WrongUseError if no attempt is the baseline.
    """
    several = [(run_id, attempts) for run_id, attempts in histories if len(attempts) > 1]
    if baseline is not None and several and not any(_meant(one, baseline) for _, of_run in several for one in of_run):
        raise WrongUseError(
            f"no attempt matches the baseline: {baseline!r}",
            "give a day (2026-11-23), the id of an attempt, or a version ('torch 2.9.0')",
        )
    axes = varying_axes([attempts[-1][1] for _, attempts in histories])
    spreads = LoadSpreads([], load_history)
    series = [
        _series(metric, run_id, attempts, axes, baseline, spreads) for metric in metrics for run_id, attempts in several
    ]
    found = Trend(series)
    for one in series:
        last = one.points[-1].row
        if verdicts.loss_of(last) > threshold:
            found.regressions.append(_regression(one))
        if verdicts.kind(last) == verdicts.MEASURED_ONCE or _looks_worse(last, threshold):
            ratio = "" if last.ratio is None else f" ({verdicts.ratio_with_interval(last.ratio, last.ratio_interval)})"
            found.notes.append(f"{one.run_id}: {one.metric_text.title}{ratio} may be chance: measure more engine loads")
    found.notes += load_spread.sources(spreads.used)
    once = len(histories) - len(several)
    if once:
        found.notes.append(
            f"{once} of {len(histories)} runs have one attempt: measure them again with labctl submit --again"
        )
    return found


def _looks_worse(row: Row, threshold: float) -> bool:
    """Whether it would be a regression with a narrower interval."""
    better = ALL_METRICS[row.metric].better
    if verdicts.kind(row) != verdicts.NO_DIFFERENCE or row.ratio is None or not better:
        return False
    return (1 - row.ratio if better == "higher" else row.ratio - 1) > max(threshold, LOOKS_WORSE_FROM)


def _series(
    metric: str,
    run_id: str,
    attempts: Sequence[tuple[str, Cell]],
    axes: Sequence[str],
    baseline: str | None,
    spreads: LoadSpreads,
) -> Series:
    points = []
    for place, (at, cell) in enumerate(attempts):
        before = _baseline_of(attempts, place, baseline)
        row = row_against(metric, cell, _together(before) if before else None, spreads)
        changed = changes_of(attempts[place - 1][1].facts, cell.facts) if place else ()
        points.append(Point(at, row, changed))
    last = attempts[-1][1]
    metric_text = ALL_METRICS[metric]
    metric_text = (
        replace(metric_text, unit=last.currency + metric_text.unit)
        if metric_text.unit in ("", "/Mtok") and last.currency
        else metric_text
    )
    return Series(metric, run_id, {axis: last.axes[axis] for axis in axes}, points, metric_text)


def _baseline_of(attempts: Sequence[tuple[str, Cell]], place: int, baseline: str | None) -> list[Cell]:
    if baseline is not None:
        meant = [one for one in attempts if _meant(one, baseline)]
        return [] if attempts[place] in meant else [cell for _, cell in meant]
    earlier = [cell for _, cell in attempts[:place]]
    own = _setup(attempts[place][1])
    while earlier and _setup(earlier[-1]) == own:
        earlier.pop()
    if not earlier:  # the first setup
        return [cell for _, cell in attempts[:place]]
    setup = _setup(earlier[-1])
    start = len(earlier)
    while start and _setup(earlier[start - 1]) == setup:
        start -= 1
    return earlier[start:]


def _setup(cell: Cell) -> dict[str, str]:
    return {name: value for name, value in cell.facts.items() if name not in OF_THE_ANSWER}


def _meant(attempt: tuple[str, Cell], baseline: str) -> bool:
    at, cell = attempt
    versions = {f"{name} {value}" for name, value in cell.facts.items()}
    return at.startswith(baseline) or baseline in versions or any(load.startswith(baseline) for load in cell.loads)


def _together(cells: Sequence[Cell]) -> Cell:
    """One cell with the loads of all these."""
    values = {name: [of_load for cell in cells for of_load in cell.values[name]] for name in cells[-1].values}
    return replace(cells[-1], values=values, loads=tuple(load for cell in cells for load in cell.loads))


def _regression(series: Series) -> str:
    point = series.points[-1]
    at = ", ".join(f"{axis} {value}" for axis, value in series.at.items())
    since = next((other.changed for other in reversed(series.points) if other.changed), ())
    because = f", since {'; '.join(since)}" if since else ""
    text = verdicts.verdict(point.row).text
    return f"regression of {series.run_id}{f' ({at})' if at else ''}: {series.metric_text.title} {text}{because}"
