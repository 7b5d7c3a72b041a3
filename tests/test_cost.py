"""What a run costs: figures that a person can reckon with, at the user's own price."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest

from labctl_orchestrator.analysis.cost import Price, prices
from labctl_orchestrator.analysis.metrics import ALL_METRICS, COST_METRICS
from labctl_orchestrator.request.settings import load
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import WrongUseError
from labctl_slurm.partitions import price_of

from .conftest import Labctl, Records, measured, refused

PRICE = '[partitions.dgxh]\nprice_per_gpu_hour = "2.50 EUR"\n'


def test_a_price_is_a_number_and_the_users_own_word() -> None:
    assert price_of("2.50 EUR") == (2.5, "EUR")
    assert price_of("  3   compute credits ") == (3.0, "compute credits")
    with pytest.raises(ValueError, match="not a price"):
        price_of("2.50")


def test_cost_by_hand() -> None:
    """Two GPUs at 1.80 an hour, 500 tokens/s: a million tokens take 2,000 s, so 4,000 GPU-seconds."""
    price = Price(1.8, "EUR")
    assert price.per_million_tokens(500.0, 2) == pytest.approx(2.0)
    assert price.of_gpu_seconds(7200) == pytest.approx(3.6)


@pytest.mark.parametrize("text", ["2.50", "EUR 2.50", "-1 EUR", "free"])
def test_what_is_no_price_is_named_with_its_file(workspace: Workspace, text: str) -> None:
    workspace.settings_file.write_text(f'[partitions.dgxh]\nprice_per_gpu_hour = "{text}"\n', encoding="utf-8")
    error = refused(lambda: prices(load(workspace), ["dgxh"]), WrongUseError)
    assert str(workspace.settings_file) in error.message
    assert "2.50 EUR" in error.remedy


def measured_at(records: Records, rate: float, joules_per_token: float, slurm_id: str, partition: str = "dgxh") -> None:
    batch = records.submit(slurm_id, partition=partition, lengths=(int(rate),))
    repeat = measured(0)
    tokens = len(repeat.samples[0].token_ids)
    repeat.wall_s = tokens / rate
    repeat.energy_j = tokens * joules_per_token
    records.done(batch, records.attempt(batch, slurm_id=slurm_id), repeats=[repeat, replace(repeat, repeat=1)])
    records.states(
        batch, state="COMPLETED", queued_at="2026-01-01T10:00:00Z", started_at="2026-01-01T10:05:00Z",
        ended_at="2026-01-01T10:35:00Z",
    )  # fmt: skip


def test_every_figure_of_cost_by_hand(labctl: Labctl, records: Records) -> None:
    """Two GPUs for half an hour, after five minutes in the queue; 1,000 tokens/s at 4 J a token."""
    records.workspace.settings_file.write_text(PRICE, encoding="utf-8")
    measured_at(records, 1000.0, 4.0, "1")
    answer = labctl("compare", "--cost", "--json").json
    found = {block["metric"]: (block["rows"][0]["mean"], block["unit"]) for block in answer["blocks"]}
    assert list(found) == list(COST_METRICS)
    assert found == {
        "cost_per_mtok": (pytest.approx(2 * 1000 / 3600 * 2.5), "EUR/Mtok"),
        "tokens_per_j": (pytest.approx(0.25), "tok/J"),
        "energy_j": (16.0, "J"),
        "gpu_s": (3600.0, "s"),
        "queue_s": (300.0, "s"),
        "job_cost": (pytest.approx(2.5), "EUR"),
    }
    assert "EUR/Mtok" in labctl("compare", "--cost").out


def test_without_a_price_the_command_says_where_to_write_one(labctl: Labctl, records: Records) -> None:
    measured_at(records, 1000.0, 4.0, "1")
    answer = labctl("compare", "--cost", "--json").json
    assert answer["blocks"][0]["rows"][0]["n"] == 0
    assert ["price_per_gpu_hour" in note for note in answer["notes"]].count(True) == 1


def test_figures_that_no_run_has_are_named_and_have_no_table(labctl: Labctl, records: Records) -> None:
    measured_at(records, 1000.0, 4.0, "1")
    told = labctl("compare", "--cost")
    assert "note: no run has a value for: cost per million tokens, cost of the job" in told.err
    assert "cost per million tokens" not in told.out
    assert "GPU time of the job, lower is better" in told.out
    plotted = labctl("compare", "--cost", "--plot").out
    assert "GPU time of the job" in plotted and "cost of the job" not in plotted


def test_a_job_whose_end_slurm_has_not_told_is_named_with_the_reason(labctl: Labctl, records: Records) -> None:
    measured_at(records, 1000.0, 4.0, "1")
    batch = records.submit("2", lengths=(9,))
    (run,) = batch.jobs[0].runs
    records.done(batch, records.attempt(batch, slurm_id="2"))
    records.states(batch, state="RUNNING", queued_at="2026-01-01T10:00:00Z", started_at="2026-01-01T10:05:00Z")
    told = labctl("compare", "--all", "--by", "max_new_tokens", "--metric", "gpu_s")
    assert f"note: no value for GPU time of the job: {run.run_id}" in told.err
    assert "note: Slurm reports the GPU time of a job some seconds after its end" in told.err


def test_prices_in_two_currencies_are_not_compared(labctl: Labctl, records: Records) -> None:
    records.workspace.settings_file.write_text(
        PRICE + '[partitions.dgx2]\nprice_per_gpu_hour = "1 credit"\n', encoding="utf-8"
    )
    measured_at(records, 1000.0, 4.0, "1")
    measured_at(records, 1000.0, 4.0, "2", partition="dgx2")
    answer = labctl("compare", "--all", "--by", "partition", "--metric", "cost_per_mtok", "--json").json
    (block,) = answer["blocks"]
    assert [row["verdict"]["kind"] for row in block["rows"]] == ["baseline", "not comparable"]
    assert any("prices are in credit and in EUR" in warning for warning in answer["warnings"])
    command = ("compare", "--all", "--by", "partition", "--metric", "cost_per_mtok")
    rows = list(csv.DictReader(io.StringIO(labctl(*command, "--csv").out)))
    assert {row["partition"]: row["unit"] for row in rows} == {"dgxh": "EUR/Mtok", "dgx2": "credit/Mtok"}
    lines = labctl(*command).out.splitlines()
    for name, unit in (("dgxh", " EUR/Mtok"), ("dgx2", " credit/Mtok")):
        assert unit in next(line for line in lines if line.startswith(name))


def test_every_metric_of_cost_can_be_asked_for() -> None:
    assert set(COST_METRICS) <= set(ALL_METRICS)
