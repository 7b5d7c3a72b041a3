"""The warnings and notes of a comparison. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from labctl_orchestrator.analysis import accuracy, doubts, load_spread
from labctl_orchestrator.analysis.axes import axes_of, leaders_of
from labctl_orchestrator.analysis.comparison import REPEATS, Block, Cell, Row
from labctl_orchestrator.analysis.facts import unasked_differences
from labctl_orchestrator.analysis.load_spread import LoadSpreads
from labctl_orchestrator.analysis.metrics import ALL_METRICS, OF_A_LOAD, OF_TASKS
from labctl_orchestrator.analysis.pairs import Pair

# From this many verdicts on, a note reminds of false positives.
MANY_VERDICTS = 20
# More runs are counted, not named; more values are left out.
RUNS_NAMED, VALUES_NAMED = 5, 8
WIDE_SPREAD = 0.2


def warnings_of(
    cells: Sequence[Cell], compared: Iterable[Sequence[Cell]], by: Sequence[str], blocks: Sequence[Block]
) -> list[str]:
    """What may make the comparison wrong. `compared` are the paired cells of each table, `by` the axes that explain their
    differences."""
    found = []
    for of_table in compared:
        found += unasked_differences(of_table, by)
        found += _early_ends(of_table) if "max_new_tokens" in by else []
    of_remark: dict[str, list[str]] = {}
    for cell in cells:
        for remark in cell.remarks:
            of_remark.setdefault(remark, []).append(cell.run_id)
    found += [f"{_runs(run_ids)} {remark}" for remark, run_ids in of_remark.items()]
    titles: dict[str, dict[str, None]] = {}
    for block in blocks:
        for row in block.rows:
            if row.not_comparable and row.low is not None and row.baseline and row.baseline.low is not None:
                titles.setdefault(row.not_comparable, {})[block.title] = None
    found += [f"{', '.join(of_reason)} cannot be compared: {reason}" for reason, of_reason in titles.items()]
    return list(dict.fromkeys(found))


def _early_ends(cells: Sequence[Cell]) -> list[str]:
    """A warning of answers that ended before max_new_tokens, for a comparison of lengths."""
    early = [cell for cell in cells if "stop" in cell.facts.get("finish reason", "")]
    if not early:
        return []
    seen = dict.fromkeys(f"{cell.facts.get('tokens generated')} of {cell.axes['max_new_tokens']}" for cell in early)
    listed = ", ".join(list(seen)[:RUNS_NAMED])
    if len(seen) > RUNS_NAMED:
        listed += f" and others, of {len(early):,} runs,"
    return [f"answers ended before max_new_tokens ({listed} tokens): --ignore-eos generates the full length"]


def nothing_alike(cells: Sequence[Cell], compared: Sequence[str], varying: Sequence[str]) -> str:
    """The reason why no two cells form a pair."""
    differing = " and ".join(f"{axis} ({_values(cells, axis)})" for axis in varying if axis not in compared)
    along = " and ".join(compared)
    if not any(axis in varying for axis in compared):
        return f"nothing to compare: all runs have the same {along}; they differ in {differing}"
    return f"nothing to compare: runs that differ in {along} also differ in {differing}"


def _values(cells: Sequence[Cell], axis: str) -> str:
    distinct = list(dict.fromkeys(str(cell.axes[axis]) for cell in cells))
    more = f" and {len(distinct) - VALUES_NAMED} more" if len(distinct) > VALUES_NAMED else ""
    return ", ".join(distinct[:VALUES_NAMED]) + more


def _runs(run_ids: Iterable[str]) -> str:
    """The distinct runs; of many, their number."""
    distinct = list(dict.fromkeys(run_ids))
    return ", ".join(distinct) if len(distinct) <= RUNS_NAMED else f"{len(distinct):,} runs"


# ---------------------------------------------------------------- notes


def notes_of(
    cells: Sequence[Cell],
    found: Sequence[Pair],
    compared: Sequence[str],
    followers: Sequence[str],
    metrics: Sequence[str],
    blocks: Sequence[Block],
    spreads: LoadSpreads,
) -> list[str]:
    """What helps to read the comparison. `followers` are axes on which paired cells differ only because the compared ones do."""
    notes = [_of_a_follower(cells, found, axis, compared) for axis in followers]
    in_pairs = {place for pair in found for place in pair}
    alone = [cell.run_id for place, cell in enumerate(cells) if place not in in_pairs]
    if found and alone:
        notes.append(f"not compared: {_runs(alone)} (no other run differs only in {' and '.join(compared)})")
    notes += _of_questions(blocks) + _of_validity(blocks) + _of_doubts(cells, metrics)
    notes += _of_the_spread([row for block in blocks if block.metric == metrics[0] for row in block.rows])
    notes += load_spread.sources(spreads.used)
    count = sum(row.has_interval for block in blocks for row in block.rows)
    if count >= MANY_VERDICTS:
        notes.append(f"{count} pairs: of 20 pairs without a difference, up to one gets a wrong verdict by chance")
    return notes + _of_no_values(blocks)


def _of_a_follower(cells: Sequence[Cell], found: Sequence[Pair], axis: str, compared: Sequence[str]) -> str:
    """ "dtype follows the partition: float16 on dgx2, bfloat16 on dgxh"."""
    leader = next(one for one in leaders_of(axis, axes_of(cells)) if one in compared)
    places = {
        place for pair in found if cells[pair.row].axes[axis] != cells[pair.baseline].axes[axis] for place in pair
    }
    word = "on" if leader == "partition" else "with"
    seen = dict.fromkeys(f"{cells[place].axes[axis]} {word} {cells[place].axes[leader]}" for place in sorted(places))
    return f"{axis} follows the {leader}: {', '.join(seen)}"


def _of_doubts(cells: Sequence[Cell], metrics: Sequence[str]) -> list[str]:
    """A note for each kind of doubt. In tables these values have a *."""
    kinds = [kind for kind in doubts.KINDS if kind not in doubts.VALIDITY]
    concerned = {kind: [m for m in metrics if doubts.Doubt(kind, 0).concerns(m)] for kind in kinds}
    found: dict[str, dict[str, float]] = {kind: {} for kind in kinds}  # values by run id
    for cell in cells:
        for kind, value, _ in cell.doubts:
            for metric in concerned.get(kind, ()):
                if any(cell.values[metric]):
                    found[kind][cell.run_id] = value
                    break
    return [
        f"* {doubts.sentence(kind, list(of_kind.values()), f' ({_runs(of_kind)})' if len(cells) > 1 else '')}"
        for kind, of_kind in found.items()
        if of_kind
    ]


def _of_questions(blocks: Sequence[Block]) -> list[str]:
    """For each pair of runs that answered tasks: the questions that one alone answers right, with McNemar's test."""
    notes = []
    rows = [row for block in blocks if block.metric in OF_TASKS for row in block.rows if row.has_an_answer]
    for row in rows[:RUNS_NAMED]:
        if row.baseline is None or row.cell.questions is None or row.baseline.cell.questions is None:
            continue
        found = accuracy.discordant(row.cell.questions, row.baseline.cell.questions)
        notes.append(
            f"questions answered right only by {row.run_id}: {found.ours}, only by its baseline: {found.theirs},"
            f" of {len(row.cell.questions.names)} (McNemar's exact test: p = {found.p_value:.2g})"
        )
    return notes


def _of_validity(blocks: Sequence[Block]) -> list[str]:
    """A note for each kind of doubt about validity, then which runs to measure again. These doubts concern the same metrics."""
    concerned = [block.metric for block in blocks if doubts.Doubt(doubts.NOISY, 0).concerns(block.metric)]
    found: dict[str, dict[str, doubts.Doubt]] = {}  # by kind and run id
    run_ids: dict[str, None] = {}
    for block in blocks:
        for row in block.rows if block.metric in concerned[:1] else ():
            run_ids[row.run_id] = None
            for doubt in row.validity_doubts:
                found.setdefault(doubt.kind, {}).setdefault(row.run_id, doubt)
    several = len(run_ids) > 1
    notes = [
        f"* {doubts.of_validity(list(found[kind].values()), f' ({_runs(found[kind])})' if several else '')}"
        for kind in doubts.VALIDITY
        if kind in found
    ]
    again = {run_id: None for kind in doubts.TO_MEASURE_AGAIN for run_id in found.get(kind, ())}
    return [*notes, f"* to measure again: labctl retry --invalid {_names(again)}"] if again else notes


def _names(run_ids: Iterable[str]) -> str:
    """Run ids for a command line; of many none: the command takes the submission."""
    distinct = list(run_ids)
    return " ".join(distinct) if len(distinct) <= RUNS_NAMED else f"({len(distinct):,} runs)"


def _of_the_spread(rows: Sequence[Row]) -> list[str]:
    """Notes on the spread of the first metric's samples."""
    wide = [
        (row, spread)
        for row in rows
        if row.low is not None and row.high is not None and row.low != row.high
        # Most rows need no mean: it is above the lowest value.
        if not 0 < row.high - row.low < 0.9 * WIDE_SPREAD * row.low and doubts.NOISY not in row.doubts
        if row.mean and (spread := (row.high - row.low) / abs(row.mean)) > WIDE_SPREAD
    ]
    notes = []
    for row, spread in wide if len(wide) <= RUNS_NAMED else ():
        of = row.n_of if row.metric in OF_A_LOAD else REPEATS
        notes.append(
            f"the {sum(map(len, row.values))} {of} of {row.run_id} differ by up to {spread:.0%}: other work may have slowed them"
        )
    if len(wide) > RUNS_NAMED:
        widest, most = max(wide, key=lambda pair: pair[1])
        notes.append(
            f"the repeats of {len(wide):,} runs differ by more than {WIDE_SPREAD:.0%} (of {widest.run_id} by {most:.0%}):"
            " other work may have slowed them"
        )
    once = [row.run_id for row in rows if row.low == row.high and row.n == 1 and not row.has_interval]
    return notes + ([f"measured once, so the spread is unknown: {_runs(once)}"] if once else [])


def _of_no_values(blocks: Sequence[Block]) -> list[str]:
    lacking: dict[str, list[str]] = {}  # run ids by metric
    known: set[str] = set()
    for block in blocks:
        lacking.setdefault(block.metric, []).extend(row.run_id for row in block.rows if row.low is None)
        if any(row.low is not None for row in block.rows):
            known.add(block.metric)
    nowhere = [ALL_METRICS[metric].title for metric in lacking if metric not in known]
    notes = [f"no run has a value for: {', '.join(nowhere)}"] if nowhere else []
    of_some = {metric: run_ids for metric, run_ids in lacking.items() if metric in known and run_ids}
    notes += [f"no value for {ALL_METRICS[metric].title}: {_runs(run_ids)}" for metric, run_ids in of_some.items()]
    notes += [
        f"{ALL_METRICS[metric].title} has no value where {reason}"
        for metric, run_ids in lacking.items()
        if run_ids and (reason := ALL_METRICS[metric].no_value_where)
    ]
    if of_some.keys() & {"gpu_s", "job_cost"}:
        notes.append("Slurm reports the GPU time of a job some seconds after its end")
    return notes
