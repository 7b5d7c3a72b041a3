"""A sweep as a grid."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from labctl_orchestrator import matrix, status
from labctl_orchestrator.compare import AXES
from labctl_slurm.errors import WrongUseError

from .conftest import Labctl, Records, Slurm, sacct_line, squeue_line


def run(state: str, **axes: Any) -> tuple[dict[str, Any], str]:
    return {**dict.fromkeys(AXES, ""), "model": "m", "partition": "dgxh", **axes}, state


def test_the_axis_with_the_most_values_is_across_and_values_are_in_order() -> None:
    runs = [run("done", dtype=dtype, max_new_tokens=length) for length in (256, 16, 128) for dtype in ("b", "a")]
    shown = matrix.grid(runs)
    assert (shown.across, shown.down, shown.columns) == ("max_new_tokens", ("dtype",), ["16", "128", "256"])
    assert [values for values, _ in shown.rows] == [("a",), ("b",)]


def test_an_axis_can_be_chosen_and_an_unknown_one_names_the_nearest() -> None:
    runs = [run("done", dtype=dtype, max_new_tokens=length) for length in (1, 2, 3) for dtype in ("a", "b")]
    assert matrix.grid(runs, "dtype").columns == ["a", "b"]
    with pytest.raises(WrongUseError) as caught:
        matrix.grid(runs, "dtypes")
    assert "'dtype'" in caught.value.remedy


def test_what_was_not_asked_for_is_an_empty_place() -> None:
    shown = matrix.grid([run("done", dtype="a", gpus=1), run("failed", dtype="b", gpus=2)], "gpus")
    assert [[matrix.words(cell) for cell in cells] for _, cells in shown.rows] == [["done", ""], ["", "failed"]]


def test_several_runs_in_one_place_are_counted() -> None:
    states = Counter({"done": 3, "failed": 1})
    assert matrix.words(states) == "3 done, 1 failed"
    assert matrix.words(states, letters=True) == "3D 1F"


def test_every_state_has_a_letter_of_its_own() -> None:
    states = {*status.ENDED, status.PENDING, status.RUNNING, status.SUBMITTING, status.UNKNOWN}
    assert set(matrix.LETTERS) == states
    assert len(set(matrix.LETTERS.values())) == len(states)


def test_one_run_is_a_grid_of_one() -> None:
    shown = matrix.grid([run("done")])
    assert (shown.columns, shown.rows[0][0]) == (["dgxh"], ("m",))


def test_the_command_shows_each_cell_in_words_in_a_pipe(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    batch = records.submit(dtypes=("float16", "bfloat16"), lengths=(8, 16, 32))
    records.done(batch, records.attempt(batch, 0, slurm_id="1000_0"), batch.jobs[0].runs[0])
    name = f"labctl-{batch.batch_id}"
    slurm.shows(squeue_line("1000_0", "RUNNING", name), sacct_line("1000_1", "CANCELLED by 5", name))
    head, *lines = labctl("matrix").out.splitlines()
    assert head.split() == ["dtype", "max_new_tokens", "8", "16", "32"]
    assert [line.split() for line in lines] == [
        ["bfloat16", "cancelled", "cancelled", "cancelled"],
        ["float16", "done", "running", "running"],
    ]
    told = labctl("matrix", "--json").json
    assert (told["down"], told["across"], len(told["runs"])) == (["dtype"], "max_new_tokens", 6)
