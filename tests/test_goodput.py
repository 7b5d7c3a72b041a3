"""Service levels: what they are, and the requests and repeats that meet them, on times that a person can reckon with."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.analysis.goodput import good_requests, of_runs_and_attempts
from labctl_orchestrator.request.request import build
from labctl_orchestrator.request.service_levels import ServiceLevel, parse
from labctl_orchestrator.store.database import open_store
from labctl_slurm.errors import WrongUseError
from labctl_workers.record import Repeat, Sample, read_json, write_json

from .conftest import Labctl, Records, Slurm

# (ttft, tpot, e2e): the answers of test_metrics. The third has one token and so no tpot.
FOUR = [(0.1, 0.1, 0.4), (0.1, 0.3, 0.7), (0.3, None, 0.3), (0.3, 0.2, 0.7)]
FAILED = (None, None, None)


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("ttft<500ms", ServiceLevel("ttft", 0.5)),
        ("ttft_p99<500ms", ServiceLevel("ttft", 0.5, 99.0)),
        ("tpot_p90 <= 0.05s", ServiceLevel("tpot", 0.05, 90.0)),
        ("e2e_p99.9<2s", ServiceLevel("e2e", 2.0, 99.9)),
    ],
)
def test_a_service_level_is_a_latency_with_a_limit(text: str, level: ServiceLevel) -> None:
    assert parse(text) == level


@pytest.mark.parametrize(
    "text",
    ["", "ttft", "ttft<500", "ttft>500ms", "ttft<ms", "itl<5ms", "ttft_p<5ms", "ttft_p100<5ms", "ttft<0ms", "ttft<-1s"],
)
def test_another_text_is_refused_with_the_form_of_a_level(text: str) -> None:
    with pytest.raises(WrongUseError, match="not a service level") as caught:
        parse(text)
    assert "ttft_p99<500ms" in caught.value.remedy


@pytest.mark.parametrize(
    ("levels", "good"),
    [
        ("ttft<200ms", 2),  # 0.1 0.1
        ("ttft<300ms", 4),  # a latency of exactly the limit meets it
        ("tpot<150ms", 2),  # 0.1, and the answer of one token
        ("e2e<500ms", 2),  # 0.4 0.3
        ("ttft<500ms tpot<200ms", 3),
        ("ttft<200ms e2e<500ms", 1),
        # Percentiles: ttft 0.1 0.1 0.3 0.3, tpot 0.1 0.2 0.3, e2e 0.3 0.4 0.7 0.7
        ("ttft_p50<200ms", 4),  # 0.2, halfway between 0.1 and 0.3
        ("ttft_p50<199ms", 0),
        ("tpot_p90<281ms", 4),  # 0.2 + 0.8 x 0.1 = 0.28
        ("tpot_p90<279ms", 0),
        ("e2e_p99<700ms ttft<200ms", 2),
        ("e2e_p99<699ms ttft<200ms", 0),
    ],
)
def test_a_request_is_good_when_it_meets_every_level_and_its_repeat_every_percentile(levels: str, good: int) -> None:
    assert good_requests([parse(level) for level in levels.split()], FOUR) == good


def test_a_failed_request_is_not_good_and_is_in_no_percentile() -> None:
    assert good_requests([parse("ttft<1s")], [*FOUR, FAILED]) == 4
    assert good_requests([parse("ttft_p99<300ms")], [*FOUR, FAILED]) == 4
    assert good_requests([parse("tpot<1s")], [FAILED]) == 0


def repeat_of(number: int, ttfts: list[float], wall_s: float, failed: int = 0) -> Repeat:
    """A repeat of requests with these first tokens, and three more tokens 0.1 s apart; some failed."""
    samples = [
        Sample(place, 0, 11, [1, 2, 3, 4], [ttft + 0.1 * token for token in range(4)], "length", "a shard each")
        for place, ttft in enumerate(ttfts)
    ]
    samples += [
        Sample(len(ttfts) + place, 0, 11, [], [], "", "", error="connection refused") for place in range(failed)
    ]
    return Repeat(number, wall_s, samples, [])


REPEATS = [repeat_of(0, [0.1, 0.3], 4.0), repeat_of(1, [0.1, 0.2], 2.0, failed=2)]


def test_goodput_and_share_are_computed_from_the_kept_requests_of_each_repeat(records: Records) -> None:
    batch = records.submit()
    attempt = records.attempt(batch)
    records.done(batch, attempt, repeats=REPEATS)
    records.collect()
    run_id = batch.runs[0].run_id
    with closing(open_store(records.workspace)) as store:

        def of(*levels: str) -> Any:
            return of_runs_and_attempts(store, [run_id], [parse(level) for level in levels])[run_id, attempt.attempt_id]

        # Repeat 0: one of two in 4 s. Repeat 1: two of four in 2 s.
        assert of("ttft<250ms") == {"goodput": [0.25, 1.0], "good_share": [0.5, 0.5]}
        assert of("ttft_p99<250ms") == {"goodput": [0.0, 1.0], "good_share": [0.0, 0.5]}
        assert of_runs_and_attempts(store, [run_id], []) == {}


def compared(labctl: Labctl, *arguments: str) -> dict[str, list[float | None]]:
    """The mean of each row of a comparison, by metric."""
    answer = labctl("compare", *arguments, "--json").json
    return {block["metric"]: [row["mean"] for row in block["rows"]] for block in answer["blocks"]}


def two_runs(records: Records) -> None:
    batch = records.submit(name="served", lengths=(8, 16))
    attempt = records.attempt(batch)
    for run in batch.runs:
        late = 0.0 if run.max_new_tokens == 8 else 0.2
        repeats = [repeat_of(number, [0.1 + late, 0.3 + late], 4.0) for number in range(2)]
        records.done(batch, attempt, run, repeats=repeats)


def test_compare_show_and_report_take_levels_afterwards(labctl: Labctl, records: Records, tmp_path: Path) -> None:
    two_runs(records)
    assert compared(labctl, "--slo", "ttft<400ms", "--metric", "goodput", "--metric", "good requests") == {
        "goodput": [0.5, 0.25],
        "good_share": [1.0, 0.5],
    }
    assert compared(labctl, "--slo", "ttft_p99<400ms")["goodput"] == [0.5, 0.0]  # beside the default metrics
    assert "goodput" not in compared(labctl)
    (run_id, _) = (row["run_id"] for row in labctl("compare", "--json").json["blocks"][0]["rows"])
    shown = labctl("show", run_id, "--slo", "ttft<400ms").out
    assert [line.split()[-1] for line in shown.splitlines() if line.startswith("  goo")] == ["goodput", "good_share"]
    assert "goodput" not in labctl("show", run_id).out
    page = tmp_path / "page.html"
    labctl("report", "-o", page)
    assert "goodput" not in page.read_text(encoding="utf-8").partition('<script type="application/json"')[0]
    labctl("report", "--slo", "ttft<400ms", "--metric", "goodput", "-o", page)
    assert "goodput" in page.read_text(encoding="utf-8").partition('<script type="application/json"')[0]


def test_a_service_level_is_kept_with_the_submission_and_changes_no_run(
    labctl: Labctl, slurm: Slurm, checkpoint: Path, tmp_path: Path
) -> None:
    flags = ("submit", "--dry-run", "--json", "-p", "dgxh", "--model-id", checkpoint)

    def runs(*more: object) -> list[str]:
        return [run["run_id"] for batch in labctl(*flags, *more).json for job in batch["jobs"] for run in job["runs"]]

    assert runs("--slo", "ttft<500ms", "--slo", "tpot_p90<50ms") == runs()
    assert "not a service level: 'ttft'" in labctl(*flags, "--slo", "ttft").err
    file = tmp_path / "served.toml"
    file.write_text('slo = ["ttft<500ms", "tpot_p90<50ms"]\n', encoding="utf-8")
    assert runs(file) == runs()
    built = build([(str(file), {"slo": ["ttft<500ms"]})])
    assert built.slo == build([("flags", {"slo": "ttft<500ms"})]).slo == ("ttft<500ms",)


def test_a_level_of_the_submission_goes_before_one_of_labctl_toml_and_after_the_option(
    labctl: Labctl, records: Records
) -> None:
    two_runs(records)
    refused = labctl("compare", "--metric", "goodput")
    assert refused.code == 2
    assert "labctl: goodput needs a service level" in refused.err
    settings = records.workspace.settings_file
    for wrong in ('"ttft"', "3", "[3]"):
        settings.write_text(f"[defaults]\nslo = {wrong}\n", encoding="utf-8")
        refused = labctl("compare", "--metric", "goodput")
        assert refused.code == 2
        assert f"labctl: {settings} [defaults]: " in refused.err
    settings.write_text('[defaults]\nslo = "ttft<50ms"\n', encoding="utf-8")
    assert compared(labctl, "--metric", "goodput") == {"goodput": [0.0, 0.0]}
    (submission,) = records.workspace.submissions.glob("*.json")
    write_json(submission, {**read_json(submission), "request": {"slo": [3]}})
    assert labctl("compare", "--metric", "goodput").code == 2
    write_json(submission, {**read_json(submission), "request": {"slo": ["ttft<400ms"]}})
    assert compared(labctl, "--metric", "goodput") == {"goodput": [0.5, 0.25]}
    assert compared(labctl, "--metric", "goodput", "--slo", "ttft<10s") == {"goodput": [0.5, 0.5]}


def test_over_time_and_engine_loads_have_goodput_too(labctl: Labctl, records: Records) -> None:
    batch = records.submit()
    for age_s in (600, 60):
        records.done(batch, records.attempt(batch, age_s=age_s), repeats=[replace(one) for one in REPEATS])
    answer = labctl("compare", "--over", "time", "--slo", "ttft<250ms", "--metric", "goodput", "--json").json
    (series,) = answer["series"]
    assert [point["mean"] for point in series["points"]] == [0.5, 0.5]
    assert compared(labctl, "--slo", "ttft<250ms", "--metric", "good_share") == {"good_share": [0.5]}
