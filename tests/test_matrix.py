"""A sweep as a grid."""

from __future__ import annotations

import pytest

from labctl_orchestrator.analysis.comparison import AXES
from labctl_orchestrator.terminal import matrix
from labctl_slurm.errors import WrongUseError

from .conftest import JobArray, Labctl, Records, Slurm, refused, squeue_line


@pytest.fixture
def sweep(records: Records, slurm: Slurm) -> JobArray:
    """Three lengths by two dtypes: one done, one failed, one runs with it, three wait."""
    batch = records.submit(dtypes=("float16", "bfloat16"), lengths=(8, 16, 100), name="sweep")
    attempt = records.attempt(batch, 0)
    records.done(batch, attempt, batch.jobs[0].runs[0])
    name = f"labctl-{batch.array_id}"
    queued = squeue_line("1000_0", "RUNNING", name)
    slurm.shows(queued + squeue_line("1000_1", "PENDING", name, reason="Resources", node=""))
    return batch


def axes(**values: object) -> dict[str, object]:
    return {**dict.fromkeys(AXES, "same"), **values}


def test_the_axis_with_the_most_values_is_across_in_the_order_of_its_numbers(labctl: Labctl, sweep: JobArray) -> None:
    lines = labctl("matrix").out.splitlines()
    assert lines[0].split() == ["dtype", "max_new_tokens", "8", "16", "100"]
    states = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert states["bfloat16"] == ["pending"] * 3
    assert states["float16"][0] == "done"
    assert set(states["float16"][1:]) <= {"running", "pending"}


def test_another_axis_can_be_across(labctl: Labctl, sweep: JobArray) -> None:
    lines = labctl("matrix", "--across", "dtype").out.splitlines()
    assert lines[0].split() == ["max_new_tokens", "dtype", "bfloat16", "float16"]
    assert [line.split()[0] for line in lines[1:]] == ["8", "16", "100"]


def test_an_axis_that_there_is_not_is_refused_with_the_nearest(labctl: Labctl, sweep: JobArray) -> None:
    ran = labctl("matrix", "--across", "dtyp")
    assert ran.code == 2
    assert "dtype" in ran.err
    refused(lambda: matrix.grid([(axes(), "done")], "dtyp"), WrongUseError)


def test_asked_without_a_job_is_missing(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    records.request(name="never", lengths=(8, 16))
    slurm.shows()
    assert labctl("matrix", "never").out.splitlines()[1].split()[-2:] == ["missing", "missing"]


def test_a_place_that_was_not_asked_for_is_blank_and_one_of_several_runs_counts_them() -> None:
    runs = [
        (axes(dtype="float16", batch_size=1), "done"),
        (axes(dtype="float16", batch_size=1), "failed"),
        (axes(dtype="float16", batch_size=2), "done"),
        (axes(dtype="bfloat16", batch_size=2), "missing"),
    ]
    shown = matrix.grid(runs, "batch_size")
    cells = {values: [matrix.words(cell) for cell in row] for values, row in shown.rows}
    assert cells == {("float16",): ["1 done, 1 failed", "done"], ("bfloat16",): ["", "missing"]}
    assert matrix.words(shown.rows[-1][1][0], letters=True) == "1D 1F"


def test_every_state_has_a_letter_of_its_own() -> None:
    from labctl_orchestrator.tracking import run_status

    assert set(matrix.LETTERS) == set(run_status.ENDED) | {"pending", "running", "submitting", "suspended", "unknown"}
    assert len(set(matrix.LETTERS.values())) == len(matrix.LETTERS)


def test_json_gives_each_run_with_its_axes(labctl: Labctl, sweep: JobArray) -> None:
    told = labctl("matrix", "--json").json
    assert told["columns"] == ["8", "16", "100"]
    assert {cell["run_id"] for cell in told["runs"]} == {run.run_id for run in sweep.runs}
    assert told["runs"][0]["axes"]["max_new_tokens"] == 8


def test_axes_that_change_together_are_a_list_and_no_diagonal() -> None:
    runs = [(axes(batch_size=size, max_new_tokens=10 * size), "done") for size in (4, 1, 2)]
    shown = matrix.grid(runs)
    assert (set(shown.down), shown.across, shown.columns) == ({"batch_size", "max_new_tokens"}, "", ["state"])
    assert [dict(zip(shown.down, values, strict=True))["batch_size"] for values, _ in shown.rows] == ["1", "2", "4"]
    assert matrix.grid(runs, "batch_size").columns == ["1", "2", "4"]
