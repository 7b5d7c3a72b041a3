"""The Python interface: tables and comparisons that print, that a notebook shows, and that pandas takes."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import labctl_orchestrator as lab
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import LabctlError, PreflightError, SlurmError, WrongUseError

from .conftest import Labctl, Records, Slurm, refused, squeue_line
from .models import shallow, smollm2  # noqa: F401  fixtures

DOCUMENT = Path(__file__).parent.parent / "docs" / "python.md"


@pytest.fixture
def measured(records: Records, slurm: Slurm) -> Records:
    """A request of two dtypes and two lengths, and one run that failed."""
    slurm.shows()
    batch = records.submit(
        name="dtypes", dtypes=("float16", "bfloat16"), lengths=(16, 32), prompt="1 < 2 & <b>bold</b>"
    )
    for task, job in enumerate(batch.jobs):
        attempt = records.attempt(batch, task)
        for run in job.runs:
            records.done(batch, attempt, run)
    failed = records.submit("7", lengths=(7,), name="bad")
    records.failed(failed, records.attempt(failed))
    return records


class Cells(HTMLParser):
    """The texts of a table's cells, with every element closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        if tag in ("td", "th"):
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.texts[-1] += data


# ---------------------------------------------------------------- tables


def test_a_table_is_rows_columns_and_a_frame(measured: Records) -> None:
    import pandas

    table = lab.runs("dtypes")
    assert len(table) == 4
    assert {row["dtype"] for row in table} == {"float16", "bfloat16"}
    assert table[0]["dtype"] == table["dtype"][0]
    assert [row["run_id"] for row in table[1:3]] == table["run_id"][1:3]
    frame = table.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == table.columns
    with pytest.raises(KeyError, match="did you mean 'ttft_s'"):
        table["ttft"]


def test_a_table_prints_as_query_prints_it_and_is_shown_in_a_notebook(labctl: Labctl, measured: Records) -> None:
    sql = "SELECT dtype, max_new_tokens, first_prompt FROM measured_runs ORDER BY 1, 2"
    table = lab.query(sql)
    assert repr(table) == labctl("query", sql).out
    cells = Cells(table._repr_html_()).texts
    assert cells[:6] == ["dtype", "max_new_tokens", "first_prompt", "bfloat16", "16", "1 < 2 & <b>bold</b>"]
    assert "<b>" not in table._repr_html_()


def test_of_a_long_table_the_first_rows_are_shown(measured: Records) -> None:
    table = lab.query("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100) SELECT i FROM n")
    assert len(table) == 100
    assert repr(table).endswith("60\n... and 40 more rows\n")
    assert "and 40 more rows" in table._repr_html_()


def test_each_kind_of_row_has_its_function(measured: Records) -> None:
    assert (len(lab.runs()), len(lab.repeats()), len(lab.requests()), len(lab.devices())) == (4, 12, 12, 24)
    assert lab.failures()["failure_kind"] == ["gpu-out-of-memory"]
    assert len(lab.failures("dtypes")) == 0
    assert repr(lab.failures("dtypes"))
    assert lab.status("bad")["state"] == ["failed"]
    assert set(lab.status("dtypes")["state"]) == {"done"}


def test_a_query_takes_parameters_and_writes_nothing(measured: Records) -> None:
    assert len(lab.query("SELECT * FROM measured_runs WHERE max_new_tokens = ?", (16,))) == 2
    assert "refuses a statement that writes" in refused(lambda: lab.query("DELETE FROM runs"), WrongUseError).message


# ---------------------------------------------------------------- comparisons


def test_a_comparison_prints_as_the_command_prints_it(labctl: Labctl, measured: Records) -> None:
    answer = lab.compare("dtypes", by="dtype", metric="output_tok_s", where="max_new_tokens=16")
    ran = labctl("compare", "dtypes", "--by", "dtype", "--metric", "output_tok_s", "--where", "max_new_tokens=16")
    assert repr(answer) == ran.out + ran.err
    assert answer.verdicts and answer.verdicts[0] in ran.out


def test_a_comparison_is_a_table_with_intervals(measured: Records) -> None:
    table = lab.compare("dtypes", by=["dtype"], metric=["output_tok_s", "ttft_s"], baseline="bfloat16").table
    assert len(table) == 8
    row = next(row for row in table if row["dtype"] == "float16" and row["metric"] == "output_tok_s")
    assert row["ratio"] == pytest.approx(1.0)
    assert row["low"] < 1 < row["high"]
    assert (row["n"], row["unit"], row["max_new_tokens"]) == (3, "tok/s", 16)
    assert len(lab.compare("dtypes", by="dtype").to_pandas()) > 0


def test_a_comparison_is_shown_in_a_notebook_with_all_that_has_to_be_said(measured: Records) -> None:
    answer = lab.compare("dtypes", by="dtype", metric="output_tok_s")
    shown = answer._repr_html_()
    cells = Cells(shown).texts
    assert "float16" in cells and "bfloat16" in cells
    assert "Verdicts" in shown
    answer.comparison.warnings.append("<script>alert(1)</script>")
    assert "<script>" not in answer._repr_html_() and "&lt;script&gt;" in answer._repr_html_()


def test_what_a_command_would_say_is_an_error_with_its_remedy(measured: Records, tmp_path: Path) -> None:
    assert "did you mean 'dtype'" in refused(lambda: lab.compare("dtypes", by="dtipe"), WrongUseError).remedy
    assert "nonsense" in refused(lambda: lab.runs("nonsense"), WrongUseError).message
    assert "not a workspace" in refused(lambda: lab.runs(workspace=tmp_path / "none"), WrongUseError).message
    assert "has a result yet" in refused(lambda: lab.compare("bad"), LabctlError).message


def test_another_folders_workspace_can_be_asked(
    measured: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(lab.runs(workspace=measured.workspace.root)) == 4
    assert len(lab.compare("dtypes", by="dtype", workspace=str(measured.workspace.root)).table) > 0


def test_what_could_not_be_learnt_is_a_warning(measured: Records, slurm: Slurm) -> None:
    batch = measured.submit("8", lengths=(8,))
    record = measured.done(batch, measured.attempt(batch))
    slurm.is_silent()
    with pytest.warns(UserWarning, match="Unable to contact"):
        lab.status("dtypes")
    record.write_text("{", encoding="utf-8")
    with pytest.warns(UserWarning, match="file skipped"):
        lab.runs("dtypes")


# ---------------------------------------------------------------- submit


def test_submit_is_the_command_with_the_keys_of_a_request(
    workspace: Workspace, slurm: Slurm, checkpoint: Path, labctl: Labctl
) -> None:
    slurm.accepts(1000)
    states = lab.submit(
        partition="dgxh", model_id=str(checkpoint), dtype=["float16", "bfloat16"], max_new_tokens=16, name="two",
        engine_options={"attn_implementation": ["sdpa", "eager"]}, time="0-00:10:00",
    )  # fmt: skip
    assert len(states) == 4
    assert set(states["dtype"]) == {"float16", "bfloat16"}
    assert labctl("status", "two", "--json").json[0]["run_id"] == states[0]["run_id"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"dtipe": "float16"}, "did you mean 'dtype'"),
        ({"cells": [{"dtipe": "float16"}]}, "number 1: unknown key 'dtipe'"),
        ({"dtype": "float15"}, "did you mean"),
    ],
)
def test_a_wrong_key_is_one_clear_error(
    workspace: Workspace, checkpoint: Path, keys: dict[str, Any], said: str
) -> None:
    error = refused(lambda: lab.submit(partition="dgxh", model_id=str(checkpoint), **keys), WrongUseError)
    assert said in f"{error.message} {error.remedy}"


def test_what_preflight_refuses_is_an_error(workspace: Workspace, checkpoint: Path) -> None:
    error = refused(lambda: lab.submit(partition="local", model_id=str(checkpoint), gpus=2), LabctlError)
    assert isinstance(error, PreflightError | SlurmError)
    assert not workspace.data.exists()


def test_what_was_submitted_is_cancelled_submitted_again_and_waited_for(
    workspace: Workspace, slurm: Slurm, checkpoint: Path
) -> None:
    """Slurm cancels what scancel names, and runs nothing."""
    slurm.accepts(1000)
    slurm.answers("scancel", "")
    keys = {"model_id": str(checkpoint), "max_new_tokens": 8, "exclude": [{"max_new_tokens": 9}]}
    with pytest.warns(UserWarning, match="number 1 matches no run"):
        (asked,) = lab.submit(partition="dgxh", **keys)
    name = f"labctl-{asked['job_id'].partition('.')[0]}"
    slurm.shows(squeue_line("1000", "PENDING", name))
    assert lab.cancel()["run_id"] == [asked["run_id"]]
    slurm.shows(squeue_line("1000", "CANCELLED", name))
    assert lab.wait()["state"] == ["cancelled"]
    assert len(lab.retry(failed=True)) == 0
    slurm.accepts(1001)
    (again,) = lab.retry()
    assert (again["run_id"], again["state"], again["slurm_id"]) == (asked["run_id"], "pending", "1001")


# ---------------------------------------------------------------- loading, documentation


def test_importing_it_loads_nothing_and_using_it_no_engine() -> None:
    code = (
        "import sys, labctl_orchestrator as lab\n"
        "assert not [name for name in sys.modules if name.startswith(('labctl_', 'msgspec', 'sqlite')) "
        "and name != 'labctl_orchestrator'], sys.modules\n"
        "assert 'compare' in dir(lab) and callable(lab.compare)\n"
        "import labctl_orchestrator.analysis.compare, labctl_orchestrator.tracking.status\n"
        "assert callable(lab.compare) and callable(lab.status)\n"
        "try: lab.nothing\nexcept AttributeError: pass\nelse: raise SystemExit(1)\n"
        "assert not {'torch', 'transformers', 'vllm', 'pandas'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.model
def test_every_example_of_the_documentation_runs(
    workspace: Workspace, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, in one Python, with the real engine: what a reader would type."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # the local executor's shell
    models = Path.home() / "models"
    models.mkdir()
    (models / "smollm2").symlink_to(request.getfixturevalue("shallow"))
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 8
    said = io.StringIO()
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(said):
        for number, block in enumerate(blocks):
            exec(compile(block, f"{DOCUMENT}, example {number}", "exec"), names)
    assert "['done', 'done']" in said.getvalue()
    assert "did you mean 'dtype'" in said.getvalue()


def test_what_a_notebook_completes_is_what_is_meant_for_it() -> None:
    assert dir(lab) == sorted(lab.API)
