"""How often does `compare` call equal things different, and how often does it find a true difference?

    python -m tests.benchmarks.false_positives [--trials N] [--csv FILE]

Pairs of runs are drawn from value = exp(mean + engine load + repeat), the two parts normal, over a grid of their standard
deviations, of repeats, engine loads and of other runs in the workspace that have 2 or 3 loads of 3 repeats (the history). Each
pair goes through `compare.compare`, as a user's comparison does; each has a partition of its own, so that one call compares many
workspaces. Pairs are of one backend, and of two. Tables in Markdown go to stdout, for docs/validation.md.

A share of N pairs has a standard error of sqrt(0.05 * 0.95 / N). What exceeds 6% is drawn again, RECHECK times as often and with
other seeds, and the second share counts: of hundreds of shares at exactly 5% the largest of the first draw says nothing.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labctl_orchestrator.analysis import verdicts
from labctl_orchestrator.analysis.compare import compare
from labctl_orchestrator.analysis.comparison import AXES, Cell, Row

RATE = "output_tok_s"
SAME: dict[str, Any] = dict.fromkeys(AXES, "same")
BETWEEN, WITHIN = (0.0, 0.01, 0.025, 0.05), (0.005, 0.01, 0.02)
REPEATS, LOADS, HISTORY = (2, 3, 5), (1, 2, 3, 5), (0, 3, 20)
TIMES = (1.03, 1.05, 1.1, 1.2)
RECHECK, RECHECK_FROM = 10, 0.06
CHUNK = 1000


@dataclass(frozen=True)
class Case:
    """A place of the grid; of unequal pairs, `loads` and `repeats` are (baseline, row)."""

    between: float
    within: float
    repeats: tuple[int, int]
    loads: tuple[int, int]
    history: int
    backends: tuple[str, str]


def drawn(rng: np.random.Generator, n: int, loads: int, repeats: int, case: Case, mean: float = 3.0) -> list[Any]:
    """n runs, each a list of loads, each a list of values."""
    of_load = rng.normal(mean, case.between, (n, loads, 1))
    values: list[Any] = np.exp(of_load + rng.normal(0, case.within, (n, loads, repeats))).tolist()
    return values


def _cell(number: int, name: str, backend: str, values: list[list[float]]) -> Cell:
    run_id = f"{number}.{name}"
    axes = {**SAME, "partition": number, "backend": backend, "dtype": name}
    return Cell(run_id, axes, {RATE: values}, {}, loads=tuple(f"{run_id}.{place}" for place in range(len(values))))


def pairs(case: Case, n: int, seed: int, times: float = 1.0) -> list[Row]:
    """The second row of n pairs, of which the second is `times` as fast as the first; compared as a workspace's runs are."""
    rng = np.random.default_rng(seed)
    first = drawn(rng, n, case.loads[0], case.repeats[0], case)
    second = drawn(rng, n, case.loads[1], case.repeats[1], case, 3.0 + math.log(times))
    history = []
    for backend in dict.fromkeys(case.backends):
        for place in range(case.history):
            values = drawn(rng, n, 2 + place % 2, 3, case, 2.0 + 0.1 * place)
            history += [_cell(number, f"history {place} of {backend}", backend, of) for number, of in enumerate(values)]
    cells = []
    for number, of_pair in enumerate(zip(first, second, strict=True)):
        for name, backend, values in zip(("first", "second"), case.backends, of_pair, strict=True):
            cells.append(_cell(number, name, backend, values))
    by = ["dtype", "backend"] if len(set(case.backends)) > 1 else ["dtype"]
    answer = compare(cells, by, [RATE], {"dtype": "first"} | ({"backend": case.backends[0]} if len(by) > 1 else {}),
                     load_history=history)  # fmt: skip
    found = [row for block in answer.blocks for row in block.rows if row.baseline is not None]
    assert len(found) == n
    return found


def share_called_different(case: Case, n: int, seed: int, times: float = 1.0) -> float:
    """The share of n pairs that are called better or worse; of a true difference those that are called better."""
    called = 0
    for start in range(0, n, CHUNK):
        rows = pairs(case, min(CHUNK, n - start), seed + start, times)
        kinds = (verdicts.BETTER, verdicts.WORSE) if times == 1 else (verdicts.BETTER,)
        called += sum(verdicts.kind(row) in kinds for row in rows)
    return called / n


ONE, TWO = ("vllm", "vllm"), ("staged", "vllm")  # whose assumed spread is 5%, the largest of the grid


def grid() -> Iterator[Case]:
    """Equal loads and repeats."""
    for between, within, repeats, loads, history, backends in itertools.product(
        BETWEEN, WITHIN, REPEATS, LOADS, HISTORY, (ONE, TWO)
    ):
        yield Case(between, within, (repeats, repeats), (loads, loads), history, backends)


def unequal() -> Iterator[Case]:
    """Unequal loads, unequal repeats, both."""
    for between, within, repeats, loads, history, backends in itertools.product(
        BETWEEN, (0.005, 0.02), ((3, 3), (2, 5)), ((1, 1), (1, 3), (2, 5)), HISTORY, (ONE, TWO)
    ):
        if repeats[0] != repeats[1] or loads[0] != loads[1]:
            yield Case(between, within, repeats, loads, history, backends)


def _share(numbered: tuple[int, Case], trials: int) -> float:
    number, case = numbered
    share = share_called_different(case, trials, 1_000_000 * number)
    if share > RECHECK_FROM:
        share = share_called_different(case, RECHECK * trials, 1_000_000 * number + 500_000)
    return share


def shares(cases: Sequence[Case], trials: int, processes: int) -> list[tuple[Case, float]]:
    with multiprocessing.Pool(processes) as pool:
        found = pool.map(functools.partial(_share, trials=trials), list(enumerate(cases)), chunksize=4)
    return list(zip(cases, found, strict=True))


def _power(case: Case, trials: int) -> list[float]:
    return [share_called_different(case, trials, 7, times) for times in TIMES]


# ---------------------------------------------------------------- tables


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print()


def _by_loads(found: Sequence[tuple[Case, float]]) -> None:
    """Lowest and highest share, by loads, and history and backends."""
    columns = list(itertools.product((ONE, TWO), HISTORY))
    head = [f"{'one backend' if of == ONE else 'two backends'}, history {history}" for of, history in columns]
    rows = []
    for loads in dict.fromkeys(case.loads for case, _ in found):
        row = [str(loads[0]) if loads[0] == loads[1] else f"{loads[0]} and {loads[1]}"]
        for of, history in columns:
            at = [share for case, share in found if (case.loads, case.history, case.backends) == (loads, history, of)]
            row.append(f"{min(at):.1%} to {max(at):.1%}")
        rows.append(row)
    table(["engine loads", *head], rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    error = math.sqrt(0.05 * 0.95 / given.trials)
    print(f"Equal pairs, {given.trials:,} a case, standard error {error:.2%} at 5%\n")
    equal = shares(list(grid()), given.trials, given.processes)
    _by_loads(equal)
    uneven = shares(list(unequal()), given.trials, given.processes)
    print("Unequal loads or repeats (2 and 5, or 3 each)\n")
    _by_loads(uneven)
    worst = max(share for _, share in (*equal, *uneven))
    print(f"{len(equal)} + {len(uneven)} cases, highest share {worst:.2%}\n")
    print("True differences: share that is found, repeats 3, spread of repeats 1%\n")
    cases = [
        Case(between, 0.01, (3, 3), (loads, loads), history, backends)
        for backends, history, between, loads in itertools.product((ONE, TWO), HISTORY, BETWEEN[1:], LOADS)
    ]
    with multiprocessing.Pool(given.processes) as pool:
        power = pool.map(functools.partial(_power, trials=given.trials // 2), cases, chunksize=1)
    rows = [
        [
            "one" if case.backends == ONE else "two", str(case.history), f"{case.between:.1%}", str(case.loads[0]),
            *(f"{share:.0%}" for share in found),
        ]
        for case, found in zip(cases, power, strict=True)
    ]  # fmt: skip
    table(["backends", "history", "spread of loads", "engine loads", *(f"{times - 1:.0%}" for times in TIMES)], rows)
    if given.csv:
        with given.csv.open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(["between", "within", "repeats", "loads", "history", "backends", "share"])
            out.writerows([*vars(case).values(), share] for case, share in (*equal, *uneven))


if __name__ == "__main__":
    main()
