"""Goodput: the requests that meet the service levels, from the latencies of each request."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from labctl_orchestrator.analysis.metrics import OF_LEVELS
from labctl_orchestrator.request import settings
from labctl_orchestrator.request.request import FLAGS, Layer, build
from labctl_orchestrator.request.service_levels import LATENCIES, ServiceLevel, parse
from labctl_orchestrator.store.database import Store, of_runs
from labctl_orchestrator.store.workspace import Workspace
from labctl_workers.measure import percentile

# Seconds of each latency, in the order of LATENCIES. A request without an answer has no ttft, one of a single token no tpot.
Latencies = Sequence[float | None]
PLACE = {latency: place for place, latency in enumerate(LATENCIES)}
Good = dict[tuple[str, str], dict[str, list[float]]]  # (run id, attempt) -> metric -> a value a repeat
_SUBMITTED = (
    "SELECT DISTINCT json_extract(request, '$.slo') FROM submissions WHERE json_array_length(request, '$.slo') > 0 AND EXISTS"
    " (SELECT 1 FROM submission_runs WHERE submission_runs.submission_id = submissions.submission_id AND {})"
)


def levels_of(workspace: Workspace, store: Store, run_ids: Sequence[str], given: Sequence[str]) -> list[ServiceLevel]:
    """The service levels for these runs: the given ones, else those of their submissions if these agree, else those of
    labctl.toml. Raises WrongUseError for a malformed one."""
    layers: list[Layer] = [(FLAGS, {"slo": given})]
    if not given:
        these, parameters = of_runs(run_ids)
        submitted = store.tuples(_SUBMITTED.format(these), parameters)
        layers = [("submission", {"slo": json.loads(slo)}) for (slo,) in submitted]
    if not given and len(submitted) != 1:
        defaults = settings.load(workspace).defaults
        layers = [(source, {"slo": values["slo"]}) for source, values in defaults if "slo" in values]
    return [parse(text) for text in dict.fromkeys(build(layers).slo)]


def good_requests(levels: Iterable[ServiceLevel], requests: Sequence[Latencies]) -> int:
    """The number of a repeat's requests that meet every level of a request; 0 if the repeat misses a level of a percentile.

    A latency that a request does not have meets its level, as in vLLM; a request without a token meets none.
    """
    answered = [latencies for latencies in requests if latencies[PLACE["ttft"]] is not None]
    for level in levels:
        place, limit_s = PLACE[level.latency], level.limit_s
        if level.percent is None:
            continue
        known = [value for latencies in answered if (value := latencies[place]) is not None]
        if known and percentile(known, level.percent / 100) > limit_s:
            return 0
    limits = [(PLACE[level.latency], level.limit_s) for level in levels if level.percent is None]
    return sum(
        all((value := latencies[place]) is None or value <= limit_s for place, limit_s in limits)
        for latencies in answered
    )


def of_runs_and_attempts(store: Store, run_ids: Sequence[str], levels: Sequence[ServiceLevel]) -> Good:
    """The metrics `OF_LEVELS` of each repeat of these runs; none without a level."""
    good: Good = {}
    if not levels:
        return good
    these, parameters = of_runs(run_ids)
    requests: dict[tuple[str, str, int], list[Latencies]] = {}
    columns = ", ".join(LATENCIES.values())
    for run_id, attempt_id, repeat, *latencies in store.each(
        f"SELECT run_id, attempt_id, repeat, {columns} FROM samples WHERE {these}",  # noqa: S608
        parameters,
    ):
        requests.setdefault((run_id, attempt_id, repeat), []).append(latencies)
    for run_id, attempt_id, repeat, wall_s in store.each(
        f"SELECT run_id, attempt_id, repeat, wall_s FROM repeats WHERE {these} ORDER BY rowid",  # noqa: S608
        parameters,
    ):
        of_repeat = requests.get((run_id, attempt_id, repeat))
        if of_repeat and wall_s:
            count = good_requests(levels, of_repeat)
            of_attempt = good.setdefault((run_id, attempt_id), {name: [] for name in OF_LEVELS})
            of_attempt["goodput"].append(count / wall_s)
            of_attempt["good_share"].append(count / len(of_repeat))
    return good
