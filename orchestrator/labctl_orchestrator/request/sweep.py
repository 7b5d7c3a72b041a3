"""The combinations of a submission's axes and its [[cells]], without those that [[exclude]] rules match."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from labctl_orchestrator.request import lengths, request, sampling
from labctl_orchestrator.request.request import AXES, MAY_BE_EMPTY, SubmissionSpec
from labctl_slurm.errors import WrongUseError
from labctl_workers.engines import engine_class, normalised_options, parallel
from labctl_workers.record import Sampling, Scalar

NOTHING_LEFT = WrongUseError("the [[exclude]] rules leave no run", "remove a rule, or add a value to an axis")


@dataclass(frozen=True)
class Combination:
    """One value of each axis; `gpus` None: the partition's number. `parallel` None: the backend's default. `batch_size` None: no
    limit. `request_rate` None: the next request follows when one ends. `requests` None: the default. Lengths are in their
    canonical form."""

    partition: str
    backend: str
    model_id: str
    revision: str
    dtype: str
    gpus: int | None
    parallel: str | None
    serve: bool
    batch_size: int | None
    request_rate: float | None
    sampling: Sampling
    max_new_tokens: int
    input_len: str | None = None
    output_len: str | None = None
    prefix_len: int | None = None
    dataset: str | None = None
    requests: int | None = None
    engine_options: tuple[tuple[str, Scalar], ...] = ()

    @property
    def lengths(self) -> tuple[str | None, str | None]:
        return self.input_len, self.output_len


class Sweep:
    """The combinations of a submission (`cells`). Raises WrongUseError where its rules match all of them.

    With [[cells]], the axes count only if one of them has several values.
    """

    def __init__(self, request: SubmissionSpec) -> None:
        self.request = request
        self._rules = [
            {axis: _values(axis, getattr(rule, axis)) for axis in AXES if getattr(rule, axis)}
            for rule in request.exclude
        ]
        self._used: set[int] = set()
        axes = {axis: _values(axis, getattr(request, axis)) for axis in AXES}
        found = _product(axes, request.engine_options)
        if request.cells and len(found) == 1:
            found = []
        for picked in request.cells:
            chosen = {axis: _values(axis, getattr(picked, axis)) or axes[axis][:1] for axis in AXES}
            if picked.lengths or picked.input_len or picked.output_len:  # instead of the submission's
                chosen |= {
                    axis: _values(axis, getattr(picked, axis)) for axis in ("lengths", "input_len", "output_len")
                }
            shared = {name: choices[:1] for name, choices in request.engine_options.items()}
            found += _product(chosen, {**shared, **picked.engine_options})
        self.cells = [cell for cell in found if not self.leaves_out(cell)]
        if not self.cells:
            raise NOTHING_LEFT

    def leaves_out(self, cell: Combination) -> bool:
        """Whether an [[exclude]] rule matches the combination. Rules match resolved `auto` values and defaults too: call it again
        with these."""
        matching = {number for number, rule in enumerate(self._rules, 1) if self._matches(number, rule, cell)}
        self._used |= matching
        return bool(matching)

    def _matches(self, number: int, rule: Mapping[str, Sequence[Any]], cell: Combination) -> bool:
        if any(getattr(cell, axis) not in values for axis, values in rule.items() if axis != "parallel"):
            return False
        if "parallel" in rule and not any(_is(cell, text) for text in rule["parallel"]):
            return False
        has = normalised_options(cell.backend, dict(cell.engine_options)).items()
        return all(
            any(normalised_options(cell.backend, {name: value}).items() <= has for value in values)
            for name, values in self.request.exclude[number - 1].engine_options.items()
        )

    @property
    def idle_rules(self) -> list[int]:
        """The numbers, from 1, of rules that have not matched."""
        return [number for number, _ in enumerate(self._rules, 1) if number not in self._used]


def _values(axis: str, values: Sequence[Any]) -> Sequence[Any]:
    if axis == "sampling":
        return tuple(map(sampling.parse, values))
    if axis == "lengths":
        return tuple(map(lengths.pair, values))
    if axis in ("input_len", "output_len"):
        return tuple(lengths.canonical(axis, value) for value in values)
    return values


def _is(cell: Combination, text: str) -> bool:
    """Whether the combination has this value of `parallel`: "tensor" on any number of GPUs, "tensor=2" on two."""
    if cell.parallel is None or parallel.gpus_in(text) not in (None, cell.gpus):
        return False
    gpus = cell.gpus or 2
    return parallel.normalised(cell.parallel, gpus, "") == parallel.normalised(text, gpus, "")


def _product(axes: Mapping[str, Sequence[Any]], options: Mapping[str, Sequence[Scalar]]) -> list[Combination]:
    values = {**axes, **{axis: axes[axis] or (None,) for axis in MAY_BE_EMPTY}}
    found = []
    for option in itertools.product(*options.values()):
        for combined in itertools.product(*(values[axis] for axis in AXES)):
            cell = dict(zip(AXES, combined, strict=True))
            if (both := cell.pop("lengths")) is not None:
                cell["input_len"], cell["output_len"] = both
            # 1 without a batch size, unless requests may arrive over time at a server: at a rate, or at the times of a trace.
            over_time = cell["request_rate"] is not None or cell["dataset"] is not None
            if cell["batch_size"] is None and not (cell["serve"] and over_time):
                cell["batch_size"] = 1
            found.append(Combination(**cell, engine_options=tuple(sorted(zip(options, option, strict=True)))))
    if not axes["parallel"]:
        return found
    return [shared for cell in found if (shared := _shared(cell, axes["parallel"], axes["gpus"])) is not None]


def _shared(cell: Combination, values: Sequence[str], gpus: Sequence[int]) -> Combination | None:
    """The combination with the GPUs that its value of `parallel` needs; None if these values and GPUs do not go together.

    A value applies to the backends that have it; a backend that has none of the values has its default, once. Raises
    WrongUseError for sizes that need another number of GPUs than all of `gpus`.
    """
    own = [text for text in values if parallel.kinds_in(text) <= set(engine_class(cell.backend).PARALLEL)]
    if not own:
        return replace(cell, parallel=None) if cell.parallel == values[0] else None
    if cell.parallel is None or cell.parallel not in own:
        return None
    needed = parallel.gpus_in(cell.parallel)
    if needed is None or needed == cell.gpus:
        return cell
    if cell.gpus is None:
        return replace(cell, gpus=needed)
    request.check_parallel(cell.parallel, [cell.backend], gpus)  # of a cell with the submission's GPUs
    return None
