"""A question to what was measured, and its answer: runs -> cells -> comparison. What `labctl compare`, the report and the Python
interface share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from labctl_orchestrator import compare, measured
from labctl_orchestrator.compare import NAME, Cell, Comparison
from labctl_orchestrator.conditions import Condition, condition
from labctl_orchestrator.metrics import DEFAULT_METRICS, MONEY
from labctl_orchestrator.store import Store
from labctl_slurm.errors import WrongUseError

if TYPE_CHECKING:
    from labctl_orchestrator.cost import Price


@dataclass(frozen=True)
class Question:
    """What is asked: the axes to compare along (none: all that vary), the metrics (none: `DEFAULT_METRICS`, those of them that
    have a value), conditions, and the baseline by axis ("" as the axis: of the first compared axis that has this value)."""

    by: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    where: tuple[Condition, ...] = ()
    baseline: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        by: Sequence[str] = (),
        metrics: Sequence[str] = (),
        where: Sequence[str] = (),
        baseline: str | None = None,
    ) -> Question:
        """From words as a person writes them: an axis may be "backend,batch_size", a baseline "hf" or "backend=hf,gpus=1".
        Raises WrongUseError for a metric that there is not, or a condition of another form."""
        compare.check_metrics(metrics)
        axes = tuple(dict.fromkeys(axis.strip() for word in by for axis in word.split(",") if axis.strip()))
        return cls(axes, tuple(dict.fromkeys(metrics)), tuple(map(condition, where)), _baseline(baseline))

    @property
    def needs_prices(self) -> bool:
        return any(metric in MONEY for metric in self.metrics)


def _baseline(text: str | None) -> dict[str, str]:
    """ "hf" -> {"": "hf"}; "backend=hf,gpus=1" -> {"backend": "hf", "gpus": "1"}."""
    if text is None:
        return {}
    axis, equals, _ = text.partition("=")
    if not equals or not axis.isidentifier() or axis == "temperature":  # a sampling is written with = and , too
        return {"": text}
    return {name: value for name, _, value in (part.partition("=") for part in text.split(","))}


def cells_of(
    store: Store, run_ids: Sequence[str], question: Question, prices: Mapping[str, Price] | None = None
) -> list[Cell]:
    """The measured cells that the question is about, in the order of the runs; empty where no run has a result.

    Raises WrongUseError for an axis that there is not, and where the conditions leave no cell.
    """
    metrics = question.metrics or DEFAULT_METRICS
    named = [*question.by, *(one.axis for one in question.where), *filter(None, question.baseline)]
    found = measured.cells(store, run_ids, metrics, prices=prices or {}, by_name=NAME in named)
    if not found:
        return []
    found = compare.with_engine_options(found, named)
    kept = [cell for cell in found if all(one.holds(cell.axes[one.axis]) for one in question.where)]
    if not kept:
        said = ", ".join(f"{one.axis} {one.how} {','.join(one.values)}" for one in question.where)
        raise WrongUseError(f"no measured run is like {said}", "labctl show RUN tells its axes")
    return kept


def answer(cells: Sequence[Cell], question: Question) -> Comparison:
    """Compare the cells as the question asks. Raises WrongUseError for a baseline that none of them is."""
    metrics = question.metrics or tuple(m for m in DEFAULT_METRICS if any(cell.values[m] for cell in cells))
    return compare.compare(cells, question.by, metrics, question.baseline or None)


def asked(
    store: Store, run_ids: Sequence[str], question: Question, prices: Mapping[str, Price] | None = None
) -> Comparison:
    """`cells_of` and `answer` in one. Raises WrongUseError where no run has a result."""
    cells = cells_of(store, run_ids, question, prices)
    if not cells:
        raise WrongUseError("none of these runs has a result yet", "labctl status tells where each stands")
    return answer(cells, question)
