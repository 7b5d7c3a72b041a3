"""The configuration to take under service levels: of those that meet them, the one with the highest throughput per GPU. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from labctl_orchestrator.analysis import verdicts
from labctl_orchestrator.analysis.axes import differ, varying_axes
from labctl_orchestrator.analysis.compare import compare
from labctl_orchestrator.analysis.comparison import GOOD_SHARE, Axes, Cell, Recommendation, mean_of
from labctl_orchestrator.analysis.doubts import FAILED, SATURATED
from labctl_orchestrator.analysis.metrics import RATE

# Runs that differ on one of these do different work: neither replaces the other.
WORKLOAD_AXES = (
    "origin", "model", "max_new_tokens", "input_len", "output_len", "prefix_len", "dataset", "workload_seed", "burstiness",
    "sampling", "ignore_eos", "raw_prompt", "prompt_set",
)  # fmt: skip
PER_GPU = "output_tok_s_per_gpu"
NEEDED = (RATE, PER_GPU, GOOD_SHARE)


def meets(cell: Cell) -> bool:
    """Whether all requests of all repeats are good, none failed, and the server keeps up; as `measure.meets` on the node."""
    good = [share for of_load in cell.values[GOOD_SHARE] for share in of_load]
    return bool(good) and min(good) == 1 and not {doubt.kind for doubt in cell.doubts} & {FAILED, SATURATED}


def recommendations(cells: Sequence[Cell], levels: Sequence[str], history: Sequence[Cell] = ()) -> list[Recommendation]:
    """One for each workload with several runs, in the order of the cells; of served runs alone where there are some. `cells` and
    `history` (see `compare`) have the values of NEEDED."""
    served = [cell for cell in cells if cell.axes["served"]]
    workloads: dict[str, list[Cell]] = {}
    for cell in served or cells:
        if any(cell.values[GOOD_SHARE]):
            workloads.setdefault(repr([cell.axes[axis] for axis in WORKLOAD_AXES]), []).append(cell)
    firsts = [group[0] for group in workloads.values()]
    apart = [axis for axis in WORKLOAD_AXES if axis in (*varying_axes(firsts), "output_len") and differ(firsts, axis)]
    return [
        _of_workload(group, levels, {axis: group[0].axes[axis] for axis in apart}, history)
        for group in workloads.values()
        if len(group) > 1
    ]


def _of_workload(
    group: Sequence[Cell], levels: Sequence[str], workload: Axes, history: Sequence[Cell]
) -> Recommendation:
    axes = tuple(varying_axes(group))
    metric = PER_GPU if all(any(cell.values[PER_GPU]) for cell in group) else RATE
    meeting = [cell for cell in group if meets(cell)]
    if not meeting:
        nearest = max(group, key=lambda cell: mean_of(GOOD_SHARE, cell.values[GOOD_SHARE]) or 0.0)
        some = mean_of(GOOD_SHARE, nearest.values[GOOD_SHARE])
        return Recommendation(tuple(levels), workload, axes, metric, None, (), nearest if some else None, 0, len(group))
    taken = max(meeting, key=lambda cell: mean_of(metric, cell.values[metric]) or 0.0)
    alike = tuple(_not_worse(meeting, taken, metric, history))
    return Recommendation(tuple(levels), workload, axes, metric, taken, alike, None, len(meeting), len(group))


def _not_worse(meeting: Sequence[Cell], taken: Cell, metric: str, history: Sequence[Cell]) -> list[Cell]:
    """The cells whose interval to `taken` contains no difference."""
    axes = varying_axes(meeting)
    if not axes:
        return []
    answer = compare(meeting, axes, (metric,), {axis: str(taken.axes[axis]) for axis in axes}, load_history=history)
    rows = [row for block in answer.blocks for row in block.rows]
    equal = {row.run_id for row in rows if verdicts.kind(row) == verdicts.NO_DIFFERENCE}
    return [cell for cell in meeting if cell.run_id in equal]
