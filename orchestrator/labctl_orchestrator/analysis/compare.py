"""Cells -> comparison: like paired with like (see `pairs`), means, ratios with their 95% intervals, verdicts, and what may not
be compared. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from labctl_orchestrator.analysis import doubts, load_spread, pairs, verdicts
from labctl_orchestrator.analysis.comparison import (
    AXES,
    LOADS,
    REPEATS,
    TOKEN_IDS,
    TOKEN_IDS_FOLLOW_FROM,
    VARIABLE,
    Block,
    Cell,
    Comparison,
    Row,
)
from labctl_orchestrator.analysis.intervals import Estimate
from labctl_orchestrator.analysis.load_spread import LoadSpreads, Sample, Side
from labctl_orchestrator.analysis.metrics import ALL_METRICS, MONEY, OF_A_LOAD, RESERVED
from labctl_slurm.errors import WrongUseError, nearest

# A fact that differs because this axis does is no news where the axis is what is compared.
FOLLOWS_FROM = {
    "effective dtype": "dtype",
    "GPU": "partition",
    "clocks": "partition",
    "CPUs": "partition",
    "CPU model": "partition",
    "cpus_per_task": "partition",
    "mem": "partition",
    "sbatch options": "partition",
    "setup": "partition",
    "template": "partition",
    "container": "partition",
    "model commit": "model",
    "tokens generated": "max_new_tokens",
    "finish reason": "max_new_tokens",
}
# The same, but only as long as every row of one backend has the same.
FACTS_OF_A_BACKEND = ("attention", "vllm")


# From here it is told that each interval holds by itself.
MANY_VERDICTS = 20


# ---------------------------------------------------------------- axes


def varying_axes(cells: Sequence[Cell]) -> list[str]:
    """The axes on which the cells differ, but for those that only follow from another."""
    axes = axes_of(cells)
    return [axis for axis in axes if pairs.differ(cells, axis) and not pairs.follows(cells, axis, axes)]


def axes_of(cells: Sequence[Cell]) -> list[str]:
    """The axes that these cells have: `AXES`, then engine options of their own and names."""
    return [*AXES, *(axis for axis in (cells[0].axes if cells else ()) if axis not in AXES)]


def check_axes(axes: Sequence[str], known: Sequence[str] = AXES) -> None:
    """Raises WrongUseError for a word that is no axis."""
    for axis in axes:
        if axis not in known:
            raise WrongUseError(f"there is no axis {axis!r}", nearest(axis, known))


def check_metrics(metrics: Sequence[str]) -> None:
    """Raises WrongUseError for a word that is no metric."""
    for metric in metrics:
        if metric not in ALL_METRICS:
            raise WrongUseError(f"there is no metric {metric!r}", nearest(metric, ALL_METRICS))


# ---------------------------------------------------------------- the comparison


def compare(
    cells: Sequence[Cell],
    by: Sequence[str],
    metrics: Sequence[str],
    baseline: Mapping[str, Any] | None = None,
    *,
    load_history: Sequence[Cell] = (),
) -> Comparison:
    """Compare the cells along the first of the axes `by`; the others are laid out beside it, and each row is compared at its
    own value of them. Without `by`, along the axis that `pairs.axis_to_compare` finds, with all others that vary laid out.

    Only like is compared with like: a row's baseline is the cell with the first value of the compared axis that is equal on
    every other axis, but for axes that follow the compared one (see `pairs`). Where no two cells are alike, a warning names
    the axes on which they differ. `baseline` names other values, by axis, which are then the compared axes. Raises
    WrongUseError where no cell has them.

    `load_history` are other runs of the workspace with several engine loads: they show how loads spread (`load_spread`).
    """
    varying = varying_axes(cells)
    at_baseline = checked_baseline(cells, list(by) or varying, baseline) if baseline else {}
    by_itself = None if by or at_baseline else pairs.axis_to_compare(cells, varying, axes_of(cells))
    chosen = list(by) or _all_beside([by_itself[0]] if by_itself else list(at_baseline), varying)
    check_axes(chosen, axes_of(cells))
    compared = list(at_baseline) or chosen[:1]
    chosen += _options_apart(cells, compared, varying, chosen)
    found = by_itself[1] if by_itself else _pairs(cells, compared, varying, at_baseline)
    if not found and len(cells) > 1:
        chosen = [axis for axis in axes_of(cells) if axis in chosen or axis in varying]
        tables, warnings = [_Together({}, list(cells), [None] * len(cells))], [_nothing_alike(cells, compared, varying)]
    else:
        tables, warnings = _tables(cells, found, [axis for axis in varying if axis not in chosen]), []
    if len(chosen) > 1 and not at_baseline:
        at_baseline = {compared[0]: cells[0].axes[compared[0]]}
    followers = _followers(cells, found, compared)
    for of_table in tables:
        warnings += fact_warnings(of_table.compared, [*chosen, *followers])
    warnings += _of_remarks(cells)
    spreads = LoadSpreads(cells, load_history)
    blocks = [_block(metric, of_table, chosen, spreads) for metric in metrics for of_table in tables]
    warnings += _of_what_cannot_be_compared(blocks)
    notes = [_follower_note(cells, found, axis, compared) for axis in followers]
    notes += _of_cells_alone(cells, found, compared)
    notes += _of_doubts(cells, metrics)
    notes += _of_the_spread([row for block in blocks if block.metric == metrics[0] for row in block.rows])
    notes += load_spread.sources(spreads.used)
    notes += _of_many(blocks)
    notes += _of_no_values(blocks)
    return Comparison(chosen, blocks, list(dict.fromkeys(warnings)), notes, at_baseline)


def _all_beside(compared: Sequence[str], varying: Sequence[str]) -> list[str]:
    return [*compared, *(axis for axis in varying if axis not in compared)]


def _options_apart(
    cells: Sequence[Cell], compared: Sequence[str], varying: Sequence[str], chosen: Sequence[str]
) -> list[str]:
    """Options that an engine was measured with several values of tell its rows apart where backends are compared."""
    axes = axes_of(cells)
    return [
        axis
        for axis in varying
        if axis not in chosen and "backend" in compared and "backend" in pairs.leaders_of(axis, axes)
    ]


def _pairs(
    cells: Sequence[Cell], compared: Sequence[str], varying: Sequence[str], at_baseline: Mapping[str, Any]
) -> list[pairs.Pair]:
    if not varying:  # nothing but the runs themselves
        return [pairs.Pair(place, 0) for place in range(1, len(cells))]
    others = [axis for axis in varying if axis not in compared]
    return pairs.pairs(cells, compared, others, axes_of(cells), list(at_baseline.values()) if at_baseline else None)


@dataclass(frozen=True)
class _Together:
    """Cells that stand in one table, and where in it the baseline of each is; None: it has none."""

    fixed: dict[str, Any]
    cells: list[Cell]
    baselines: list[int | None]

    @property
    def compared(self) -> list[Cell]:
        """The cells that are in a pair."""
        return [cell for cell, baseline in zip(self.cells, self.baselines, strict=True) if baseline is not None]


DEFAULT = "default"


def _tables(cells: Sequence[Cell], found: Sequence[pairs.Pair], fixed_by: Sequence[str]) -> list[_Together]:
    """The cells in tables of those that are equal on the axes `fixed_by`. A cell with two baselines is in two tables."""
    tables: dict[str, list[dict[int, int | None]]] = {}  # by what is fixed: the place of each cell, and of its baseline
    fixed_of: dict[str, dict[str, Any]] = {}

    def key_of(one: Cell, other: Cell) -> str:
        fixed = {axis: one.axes[axis] if one.axes[axis] == other.axes[axis] else DEFAULT for axis in fixed_by}
        fixed_of.setdefault(repr(fixed), fixed)
        return repr(fixed)

    in_pairs: set[int] = set()
    for row, baseline in found:
        alike = tables.setdefault(key_of(cells[row], cells[baseline]), [])
        table = next((one for one in alike if one.get(row) in (None, baseline)), None)
        if table is None:
            alike.append(table := {})
        table[row] = baseline
        if table.get(baseline) is None:
            table[baseline] = baseline
        in_pairs |= {row, baseline}
    for place, cell in enumerate(cells):
        if place not in in_pairs:
            alike = tables.setdefault(key_of(cell, cell), [])
            if not alike:
                alike.append({})
            alike[0][place] = None
    for axis in fixed_by:
        if all(fixed[axis] == DEFAULT for fixed in fixed_of.values()):
            for fixed in fixed_of.values():
                del fixed[axis]
    made = [(fixed_of[key], table) for key, alike in tables.items() for table in alike]
    made.sort(key=lambda one: min(one[1]))
    return [_in_rows(cells, fixed, table) for fixed, table in made]


def _in_rows(cells: Sequence[Cell], fixed: dict[str, Any], table: Mapping[int, int | None]) -> _Together:
    """In the order of the cells, but with the cells that have one baseline together."""
    first: dict[int, int] = {}
    root = {place: place if baseline is None else baseline for place, baseline in table.items()}
    for place in sorted(table):
        first.setdefault(root[place], place)
    ordered = sorted(table, key=lambda place: (first[root[place]], place))
    at = {place: row for row, place in enumerate(ordered)}
    baselines = [None if (baseline := table[place]) is None else at[baseline] for place in ordered]
    return _Together(fixed, [cells[place] for place in ordered], baselines)


def checked_baseline(cells: Sequence[Cell], chosen: Sequence[str], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the cells have them: "64" is 64. A value without an axis ("") is of the first compared axis that has it."""
    found: dict[str, Any] = {}
    for axis, value in asked.items():
        where = [axis] if axis else list(chosen)
        if not where:
            raise WrongUseError(
                f"{value} cannot be the baseline: the measured cells differ on no axis",
                "labctl compare --all takes more runs",
            )
        if axis not in chosen and axis in axes_of(cells):
            raise WrongUseError(
                f"{axis} is not compared here", f"add --by {axis}, or choose with --where {axis}={value}"
            )
        check_axes(where, chosen or axes_of(cells))
        known = {str(cell.axes[name]): (name, cell.axes[name]) for name in reversed(where) for cell in cells}
        if str(value) not in known:
            named = axis or ", ".join(chosen)
            raise WrongUseError(f"no measured cell has {named} {value}, to be the baseline", nearest(str(value), known))
        name, own = known[str(value)]
        found[name] = own
    return found


def _block(metric: str, table: _Together, by: Sequence[str], spreads: LoadSpreads) -> Block:
    told = ALL_METRICS[metric]
    as_ratio = _has_ratios(metric, table.cells)
    samples = [load_spread.sample(cell.values.get(metric, []), as_ratio) for cell in table.cells]
    rows = [_row(metric, cell, by, sample, as_ratio) for cell, sample in zip(table.cells, samples, strict=True)]
    for row, cell in zip(rows, table.cells, strict=True):
        if cell.doubts and row.n:
            row.doubts = tuple(doubt.kind for doubt in cell.doubts if doubt.concerns(metric))
    if rows:
        _estimate(rows, samples, table.cells, table.baselines, as_ratio, spreads)
    unit = told.unit
    if metric in MONEY:
        unit = "/".join(dict.fromkeys(cell.currency for cell in table.cells if cell.currency)) + unit
    return Block(metric, table.fixed, rows, told.title, unit, told.better)


def _has_ratios(metric: str, cells: Sequence[Cell]) -> bool:
    """Whether a ratio of these cells means anything: of a figure of which one way is better, with no value of 0 or less."""
    if not ALL_METRICS[metric].better:
        return False
    return all(min(of_load) > 0 for cell in cells for of_load in cell.values.get(metric, ()) if of_load)


def _row(metric: str, cell: Cell, by: Sequence[str], sample: Sample | None, as_ratio: bool) -> Row:
    at = {axis: cell.axes[axis] for axis in by}
    by_load = cell.values.get(metric, [])
    currency = cell.currency if metric in MONEY else ""
    if sample is None:
        return Row(metric, cell.run_id, at, by_load, cell.loads, None, None, None, 0, REPEATS, cell.text, currency)
    values = by_load[0] if len(by_load) == 1 else [value for of_load in by_load for value in of_load]
    low, high = min(values), max(values)
    mean = load_spread.figure_of(sample, as_ratio, low, high)
    n, n_of = (sample.loads, LOADS) if sample.loads > 1 else (len(values), REPEATS)
    return Row(metric, cell.run_id, at, by_load, cell.loads, mean, low, high, n, n_of, cell.text, currency)


def row_against(metric: str, cell: Cell, baseline: Cell | None, spreads: LoadSpreads) -> Row:
    """One cell in one metric, against another where there is one, whose loads count in the spread instead of those that are
    known of its run."""
    cells = [cell] if baseline is None else [baseline, cell]
    as_ratio = _has_ratios(metric, cells)
    samples = [load_spread.sample(one.values.get(metric, []), as_ratio) for one in cells]
    rows = [_row(metric, one, [], sample, as_ratio) for one, sample in zip(cells, samples, strict=True)]
    if baseline is not None:
        _estimate(rows, samples, cells, [0, 0], as_ratio, spreads, instead=baseline)
    return rows[-1]


# ---------------------------------------------------------------- against the baseline


def _estimate(
    rows: Sequence[Row],
    samples: Sequence[Sample | None],
    cells: Sequence[Cell],
    places: Sequence[int | None],
    as_ratio: bool,
    spreads: LoadSpreads,
    instead: Cell | None = None,
) -> None:
    """Set in each row how it stands to its baseline, whose place is given."""
    metric = rows[0].metric
    may_differ_in_kind = metric in (*RESERVED, *MONEY)
    for place, (row, of_baseline) in enumerate(zip(rows, places, strict=True)):
        if of_baseline is None:
            continue
        row.is_baseline = of_baseline == place
        baseline, ours, theirs = rows[of_baseline], samples[place], samples[of_baseline]
        if not row.is_baseline:
            row.baseline = baseline
            if may_differ_in_kind:
                row.not_comparable = _why_not(metric, cells[place], cells[of_baseline])
        if ours is None or theirs is None or row.not_comparable:
            continue
        if row.is_baseline:
            _put(row, Estimate(0.0), as_ratio)
            continue
        sides = Side(cells[place], row.values, ours), Side(cells[of_baseline], baseline.values, theirs)
        _put(row, load_spread.estimate(metric, *sides, as_ratio, spreads, instead), as_ratio)


def _put(row: Row, estimate: Estimate, as_ratio: bool) -> None:
    low, high = estimate.low, estimate.high
    if as_ratio:
        row.ratio = math.exp(estimate.difference)
        if low is not None and high is not None:
            row.ratio_interval = (math.exp(low), math.exp(high))
    else:
        row.difference = estimate.difference
        if low is not None and high is not None:
            row.difference_interval = (low, high)


def _why_not(metric: str, cell: Cell, baseline: Cell) -> str:
    if metric in RESERVED and cell.axes["backend"] != baseline.axes["backend"]:
        return "each engine sets memory aside in its own way (vLLM takes its KV cache ahead)"
    if metric in MONEY and cell.currency and baseline.currency and cell.currency != baseline.currency:
        return f"prices are in {cell.currency} and in {baseline.currency}"
    return ""


def loss_of(row: Row) -> float:
    """By what share the row is worse than its baseline, beyond the spread: 0.05 for 95 tok/s after 100, or for 105 ms after
    100; 0 where it is not worse, or may be by chance. Of figures that have no ratio, infinity where it is worse."""
    if verdicts.kind(row) != verdicts.WORSE:
        return 0.0
    if row.ratio is None:
        return math.inf
    return 1 - row.ratio if ALL_METRICS[row.metric].better == "higher" else row.ratio - 1


def regressions(answer: Comparison, threshold: float) -> list[str]:
    """The verdicts on rows that are worse than their baseline by more than the threshold (0.05 is 5%)."""
    return [
        verdicts.sentence(row, row.baseline, block)
        for block in answer.blocks
        for row in block.rows
        if row.baseline is not None and loss_of(row) > threshold
    ]


# ---------------------------------------------------------------- what has to be said with it


def _of_what_cannot_be_compared(blocks: Sequence[Block]) -> list[str]:
    reasons: dict[str, dict[str, None]] = {}
    for block in blocks:
        for row in block.rows:
            if row.not_comparable and row.n and row.baseline is not None and row.baseline.n:
                reasons.setdefault(row.not_comparable, {})[block.title] = None
    return [f"{', '.join(titles)} cannot be compared: {reason}" for reason, titles in reasons.items()]


def _followers(cells: Sequence[Cell], found: Sequence[pairs.Pair], compared: Sequence[str]) -> list[str]:
    """The axes in which cells of a pair differ because they differ on a compared one."""
    axes = axes_of(cells)
    return [
        axis
        for axis in axes
        if axis not in compared
        and not set(pairs.leaders_of(axis, axes)).isdisjoint(compared)
        and not (axis == "parallel" and all(cell.axes["gpus"] in (0, 1) for cell in cells))  # nothing is split
        and any(cells[row].axes[axis] != cells[baseline].axes[axis] for row, baseline in found)
    ]


def _follower_note(cells: Sequence[Cell], found: Sequence[pairs.Pair], axis: str, compared: Sequence[str]) -> str:
    """ "dtype follows the partition: float16 on dgx2, bfloat16 on dgxh"."""
    (leader, *_) = [one for one in pairs.leaders_of(axis, axes_of(cells)) if one in compared]
    places = dict.fromkeys(
        place
        for pair in found
        if cells[pair.row].axes[axis] != cells[pair.baseline].axes[axis]
        for place in sorted(pair)
    )
    word = "on" if leader == "partition" else "with"
    seen = _listed(f"{cells[place].axes[axis]} {word} {cells[place].axes[leader]}" for place in sorted(places))
    return f"{axis} follows the {leader}: {seen}"


def _of_cells_alone(cells: Sequence[Cell], found: Sequence[pairs.Pair], compared: Sequence[str]) -> list[str]:
    """The cells that are compared with nothing, where others are."""
    in_pairs = {place for pair in found for place in pair}
    alone = [cell.run_id for place, cell in enumerate(cells) if place not in in_pairs]
    if not (found and alone):
        return []
    return [f"no other run differs in {' and '.join(compared)} alone from: {_named_or_counted(alone)}"]


def _nothing_alike(cells: Sequence[Cell], compared: Sequence[str], varying: Sequence[str]) -> str:
    """Why nothing is compared."""
    others = [axis for axis in varying if axis not in compared]
    differing = " and ".join(f"{axis} ({_some(str(cell.axes[axis]) for cell in cells)})" for axis in others)
    along = " and ".join(compared)
    if not any(axis in varying for axis in compared):
        return f"nothing is compared: {along} is the same in all runs, which differ in {differing}"
    return f"nothing is compared: runs that differ in {along} differ in {differing} too"


def _of_doubts(cells: Sequence[Cell], metrics: Sequence[str]) -> list[str]:
    """What makes figures that are shown doubtful, each kind once: a figure with a * is one of them."""
    notes = []
    for kind in doubts.KINDS:
        found = {
            cell.run_id: doubt.value
            for cell in cells
            for doubt in cell.doubts
            if doubt.kind == kind and any(doubt.concerns(metric) and any(cell.values[metric]) for metric in metrics)
        }
        if found:
            of = f" ({_named_or_counted(list(found))})" if len(cells) > 1 else ""
            notes.append(f"* {doubts.sentence(kind, list(found.values()), of)}")
    return notes


VALUES_NAMED = 8


def _some(values: Iterable[str]) -> str:
    """Each once; of many the first."""
    distinct = list(dict.fromkeys(values))
    more = f" and {len(distinct) - VALUES_NAMED} more" if len(distinct) > VALUES_NAMED else ""
    return ", ".join(distinct[:VALUES_NAMED]) + more


def _of_the_spread(rows: Sequence[Row]) -> list[str]:
    """What the samples of the first metric say of themselves."""
    wide = [(row, spread) for row in rows if (spread := _spread_of(row)) > WIDE_SPREAD]
    notes = []
    for row, spread in wide if len(wide) <= RUNS_NAMED else ():
        of = row.n_of if row.metric in OF_A_LOAD else REPEATS
        notes.append(
            f"the {sum(map(len, row.values))} {of} of {row.run_id} lie {spread:.0%} apart: was the machine busy?"
        )
    if len(wide) > RUNS_NAMED:
        widest, most = max(wide, key=lambda pair: pair[1])
        notes.append(
            f"the repeats of {len(wide):,} runs lie more than {WIDE_SPREAD:.0%} apart, of {widest.run_id} {most:.0%}: was the"
            " machine busy?"
        )
    once = [row.run_id for row in rows if row.n == 1 and not (row.ratio_interval or row.difference_interval)]
    if once:
        notes.append(f"measured once, so nothing is known of the spread: {_named_or_counted(once)}")
    return notes


WIDE_SPREAD = 0.2


def _spread_of(row: Row) -> float:
    """From the lowest value to the highest, as a share of the mean."""
    if not row.mean or row.low is None or row.high is None:
        return 0.0
    return (row.high - row.low) / abs(row.mean)


def _of_many(blocks: Sequence[Block]) -> list[str]:
    told = sum(bool(row.ratio_interval or row.difference_interval) for block in blocks for row in block.rows)
    if told < MANY_VERDICTS:
        return []
    return [
        f"each of the {told} intervals holds by itself: of things that are equal, up to one in twenty is called different"
    ]


# More runs than these are counted, not named.
RUNS_NAMED = 5


def _of_no_values(blocks: Sequence[Block]) -> list[str]:
    lacking: dict[str, list[str]] = {}  # run ids by metric
    known: set[str] = set()
    for block in blocks:
        lacking.setdefault(block.metric, []).extend(row.run_id for row in block.rows if not row.n)
        if any(row.n for row in block.rows):
            known.add(block.metric)
    nowhere = [ALL_METRICS[metric].title for metric in lacking if metric not in known]
    notes = [f"no run here has a value of: {', '.join(nowhere)}"] if nowhere else []
    of_some = {metric: run_ids for metric, run_ids in lacking.items() if metric in known and run_ids}
    for metric, run_ids in of_some.items():
        notes.append(f"no value of {ALL_METRICS[metric].title}: {_named_or_counted(run_ids)}")
    notes += [
        f"{ALL_METRICS[metric].title} has no value where {reason}"
        for metric, run_ids in lacking.items()
        if run_ids and (reason := ALL_METRICS[metric].no_value_where)
    ]
    if of_some.keys() & {"gpu_s", "job_cost"}:
        notes.append(
            "how long a job held its GPUs is known when Slurm's accounting has told its end, some seconds after it"
        )
    return notes


def _named_or_counted(run_ids: Sequence[str]) -> str:
    return _listed(run_ids) if len(run_ids) <= RUNS_NAMED else f"{len(run_ids):,} runs"


def fact_warnings(cells: Sequence[Cell], by: Sequence[str]) -> list[str]:
    """Differences that nobody asked for: not those that the compared axis makes by itself."""
    distinct = list({id(cell.facts): cell.facts for cell in cells}.values())  # the cells of a sweep share them
    names = dict.fromkeys(name for facts in distinct for name in facts if FOLLOWS_FROM.get(name) not in by)
    if any(axis in by for axis in TOKEN_IDS_FOLLOW_FROM):
        names.pop(TOKEN_IDS, None)
    warnings = []
    for name in names:
        if len({fact(facts, name) for facts in distinct}) == 1:
            continue
        seen = [fact(cell.facts, name) for cell in cells]
        if name in FACTS_OF_A_BACKEND and "backend" in by and pairs.goes_by(["backend"], cells, seen):
            continue
        warnings.append(f"the rows differ in {name} ({_listed(seen)})")
    return warnings + (_of_early_ends(cells) if "max_new_tokens" in by else [])


def fact(facts: Mapping[str, str], name: str) -> str:
    """A fact's value in words; a variable that is not among them was not set."""
    return facts.get(name, "not set" if name.startswith(VARIABLE) else "not known")


def changes_of(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    """ "torch 2.9.0 -> 2.10.0", for each of the facts that differ."""
    return tuple(
        f"{name} {fact(before, name)} -> {fact(now, name)}"
        for name in dict.fromkeys([*before, *now])
        if fact(before, name) != fact(now, name)
    )


def _of_remarks(cells: Sequence[Cell]) -> list[str]:
    """Each remark once, with the runs that it is about."""
    about: dict[str, list[str]] = {}
    for cell in cells:
        for remark in cell.remarks:
            about.setdefault(remark, []).append(cell.run_id)
    return [f"{_named_or_counted(list(dict.fromkeys(run_ids)))} {remark}" for remark, run_ids in about.items()]


def _of_early_ends(cells: Sequence[Cell]) -> list[str]:
    """Where lengths are compared: which answers are shorter than they were to be."""
    early = [cell for cell in cells if "stop" in cell.facts.get("finish reason", "")]
    if not early:
        return []
    seen = dict.fromkeys(f"{cell.facts.get('tokens generated')} of {cell.axes['max_new_tokens']}" for cell in early)
    told = _listed(list(seen)[:RUNS_NAMED])
    if len(seen) > RUNS_NAMED:
        told += f" and others, of {len(early):,} runs,"
    return [f"answers ended before their max_new_tokens ({told} tokens): --ignore-eos generates the full length"]


def _listed(values: Any) -> str:
    return ", ".join(dict.fromkeys(values))


# ---------------------------------------------------------------- engine options as axes


def with_engine_options(cells: Sequence[Cell], wanted: Sequence[str]) -> list[Cell]:
    """The cells with these engine options as axes of their own, and `engine_options` without them; "default" where one is not
    set. Raises WrongUseError for a word that is neither an axis nor an option of any of the cells."""
    import json

    if all(name in axes_of(cells) for name in wanted):
        return list(cells)
    options = [json.loads(cell.axes["engine_options"] or "{}") for cell in cells]
    present = {name for of_cell in options for name in of_cell}
    check_axes(wanted, [*axes_of(cells), *sorted(present)])
    own = [name for name in dict.fromkeys(wanted) if name not in axes_of(cells)]
    apart = []
    for cell, of_cell in zip(cells, options, strict=True):
        values = {name: of_cell.pop(name, "default") for name in own}
        rest = json.dumps(of_cell, sort_keys=True, ensure_ascii=False)
        apart.append(replace(cell, axes={**cell.axes, "engine_options": rest, **values}))
    return apart
