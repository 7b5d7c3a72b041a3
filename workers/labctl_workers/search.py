"""The runs that a search measures: bisection over loads, for the highest that meets the service levels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from labctl_workers.record import RunSpec, sha256_of_json

# What differs between the loads of one search; the entries of a dataset may depend on the number of requests.
LOAD_KEYS = ("request_rate", "batch_size", "requests", "prompts", "entries")


def load_of(run: RunSpec) -> float:
    """The request rate, else the concurrency."""
    return run.batch_size if run.request_rate is None else run.request_rate


def searches(runs: Sequence[RunSpec]) -> list[list[RunSpec]]:
    """The runs by their settings without the load, each in order of load."""
    found: dict[str, list[RunSpec]] = {}
    for run in runs:
        rest = {key: value for key, value in run.definition.items() if key not in LOAD_KEYS}
        found.setdefault(sha256_of_json(rest), []).append(run)
    return [sorted(alike, key=load_of) for alike in found.values()]


def bisection(runs: Sequence[RunSpec], meets: Callable[[RunSpec], bool | None]) -> Iterator[RunSpec]:
    """The next run to measure, until a run that meets the levels is next to one that does not. `meets` is None for a run that is
    not measured; then it is yielded, and must be known afterwards."""
    low, high = -1, len(runs)
    while high - low > 1:
        middle = (low + high) // 2
        if meets(runs[middle]) is None:
            yield runs[middle]
        if meets(runs[middle]):
            low = middle
        else:
            high = middle
