"""The options of a comparison, and the way from runs to cells to a comparison, for `labctl compare`, the report and the Python
API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from labctl_orchestrator.analysis.axes import (
    SCALING_AXES,
    check_axes,
    engine_options,
    varying_axes,
    with_engine_options,
)
from labctl_orchestrator.analysis.cells import history, load_history, read_cells
from labctl_orchestrator.analysis.compare import checked_baseline, compare
from labctl_orchestrator.analysis.comparison import AXES, NAME, Cell, Comparison
from labctl_orchestrator.analysis.conditions import Condition, condition
from labctl_orchestrator.analysis.metrics import DEFAULT_METRICS, MONEY, OF_LEVELS, SCALING_METRICS, metric_named
from labctl_orchestrator.analysis.recommendation import NEEDED, recommendations
from labctl_orchestrator.request.service_levels import ServiceLevel
from labctl_orchestrator.store.database import Store
from labctl_slurm.errors import WrongUseError
from labctl_workers.record import Sampling

if TYPE_CHECKING:
    from labctl_orchestrator.analysis.cost import Price
    from labctl_orchestrator.analysis.trend import Trend


# Words of --by for several axes.
SHORT_FOR = {"lengths": ("input_len", "output_len")}


@dataclass(frozen=True)
class Question:
    """The options of a comparison: axes (none: labctl chooses), metrics (none: the default ones with a value),
    conditions, and the baseline by axis ("": the first compared axis with this value)."""

    by: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    where: tuple[Condition, ...] = ()
    baseline: Mapping[str, str] = field(default_factory=dict)
    baseline_text: str | None = None
    levels: tuple[ServiceLevel, ...] = ()

    def with_levels(self, levels: Sequence[ServiceLevel]) -> Question:
        """The question with these service levels. Raises WrongUseError for a metric that needs one, without one."""
        needs = next((metric for metric in self.metrics if metric in OF_LEVELS), None)
        if needs and not levels:
            raise WrongUseError(f"{needs} needs a service level", "add --slo 'ttft<500ms', or slo to labctl.toml")
        return replace(self, levels=tuple(levels))

    @classmethod
    def of(
        cls,
        by: Sequence[str] = (),
        metrics: Sequence[str] = (),
        where: Sequence[str] = (),
        baseline: str | None = None,
        *,
        over_time: bool = False,
    ) -> Question:
        """Parse options: an axis may be "backend,batch_size", a metric a title, a baseline "hf" or "backend=hf,gpus=1"; over time
        the baseline is a day, an attempt or a version. Raises WrongUseError for an unknown axis or metric, or an invalid
        condition."""
        names = tuple(dict.fromkeys(map(metric_named, metrics)))
        words = (axis.strip() for word in by for axis in word.split(","))
        axes = tuple(dict.fromkeys(axis for word in words if word for axis in SHORT_FOR.get(word, (word,))))
        conditions = tuple(map(condition, where))
        by_axis = {} if over_time else _baseline(baseline)
        _check_known_axes([*axes, *(one.axis for one in conditions), *filter(None, by_axis)])
        return cls(axes, names, conditions, by_axis, baseline)

    @property
    def needs_prices(self) -> bool:
        return any(metric in MONEY for metric in self.wanted)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The metrics, or the default ones of the compared axis; with service levels also the goodput."""
        if self.metrics:
            return self.metrics
        of_axis = SCALING_METRICS if self.by and self.by[0] in SCALING_AXES else DEFAULT_METRICS
        return (*of_axis, *(OF_LEVELS if self.levels else ()))


def _check_known_axes(axes: Sequence[str]) -> None:
    """Check axes before the database is read. Options of engines are imported only for a word that is not in AXES."""
    if any(axis not in (*AXES, NAME) for axis in axes):
        check_axes(axes, [*AXES, NAME, *sorted(engine_options())])


def _baseline(text: str | None) -> dict[str, str]:
    """ "hf" -> {"": "hf"}; "backend=hf,gpus=1" -> {"backend": "hf", "gpus": "1"}."""
    if text is None:
        return {}
    axis, equals, _ = text.partition("=")
    if not equals or not axis.isidentifier() or axis == "temperature":  # a sampling contains = and , too
        return {"": text}
    return {name: value for name, _, value in (part.partition("=") for part in _pairs(text))}


OF_A_SAMPLING = frozenset(field.name for field in fields(Sampling))


def _pairs(text: str) -> list[str]:
    """Split at commas, but not at those of a value: "sampling=temperature=0.7,seed=1,gpus=1" are two."""
    found: list[str] = []
    for part in text.split(","):
        name, equals, _ = part.partition("=")
        if found and not (equals and name.strip().isidentifier() and name.strip() not in OF_A_SAMPLING):
            found[-1] += f",{part}"
        else:
            found.append(part.strip())
    return found


def cells_of(
    store: Store,
    run_ids: Sequence[str],
    question: Question,
    prices: Mapping[str, Price] | None = None,
    *,
    with_texts: bool = True,
) -> list[Cell]:
    """The measured cells that match the conditions, in the order of the runs; empty if no run has a result. `with_texts`: read
    their first answers. Raises WrongUseError for an unknown axis, and if no cell matches.
    """
    metrics = (*question.wanted, *(NEEDED if question.levels else ()))
    named = [*question.by, *(one.axis for one in question.where), *filter(None, question.baseline)]
    found = read_cells(
        store, run_ids, metrics, prices=prices, by_name=NAME in named, with_texts=with_texts, levels=question.levels
    )
    if not found:
        return []
    found = with_engine_options(found, named)
    if not question.where:
        return found
    kept = [cell for cell in found if all(one.holds(cell.axes[one.axis]) for one in question.where)]
    if not kept:
        said = ", ".join(f"{one.axis} {one.how} {','.join(one.values)}" for one in question.where)
        raise WrongUseError(f"no measured run matches {said}", "labctl show RUN prints the axes of a run")
    return kept


def answer(store: Store, cells: Sequence[Cell], question: Question) -> Comparison:
    """Compare the cells. The workspace's other runs with several engine loads show the spread between loads. Raises WrongUseError
    if no cell is the baseline."""
    metrics = question.metrics or tuple(m for m in question.wanted if any(cell.values[m] for cell in cells))
    needed = NEEDED if question.levels else ()
    others = load_history(store, cells, (*metrics, *needed), levels=question.levels)
    found = compare(cells, question.by, metrics, question.baseline or None, load_history=others)
    if question.levels:
        found.recommendations = recommendations(cells, list(map(str, question.levels)), others)
    return found


def at_baseline(cells: Sequence[Cell], question: Question) -> list[Cell]:
    """The cells of the question's baseline; none without one."""
    if not question.baseline:
        return []
    by = question.by or varying_axes(cells)
    found = checked_baseline(cells, by, question.baseline)
    return [cell for cell in cells if all(cell.axes[axis] == value for axis, value in found.items())]


def over_time(
    store: Store,
    run_ids: Sequence[str],
    question: Question,
    prices: Mapping[str, Price] | None = None,
    *,
    threshold: float = 0.0,
) -> Trend:
    """These runs over time, in the question's metrics; see `trend`."""
    from labctl_orchestrator.analysis.trend import trend

    metrics = question.wanted
    histories = history(store, run_ids, metrics, prices=prices, levels=question.levels)
    shown = [name for name in metrics if any(cell.values[name][0] for _, attempts in histories for _, cell in attempts)]
    runs = [attempts[-1][1] for _, attempts in histories]
    # With these runs: the loads before each attempt count (see `trend`).
    others = load_history(store, runs, shown, with_these=True, levels=question.levels)
    return trend(histories, shown, baseline=question.baseline_text, threshold=threshold, load_history=others)
