"""labctl report: what it gathers and draws, and that its page is whole, safe and repeatable (test_report_page.py opens it)."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import vl_convert

from labctl_orchestrator import report
from labctl_orchestrator.analysis import verdicts
from labctl_orchestrator.analysis.comparison import AXES, Cell
from labctl_orchestrator.models import fit
from labctl_orchestrator.models.checkpoint import Checkpoint
from labctl_orchestrator.models.fit import Gpus, Sequences
from labctl_orchestrator.report import Findings, ReportScope, charts, draw, page, timelines
from labctl_orchestrator.report.findings import MOST_PROMPTS, choices, gather, slices
from labctl_orchestrator.report.layout import Layout, asked_by, layout
from labctl_orchestrator.report.page import render
from labctl_orchestrator.report.repeat import steps, toml
from labctl_orchestrator.request import request
from labctl_orchestrator.store.collect import collect
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_workers.record import read_json
from tests.conftest import Labctl, Records, edit_json, refused
from tests.two_engines import CONFIG, NAME, PROMPTS, write_two_engines


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The records of a sweep over two engines, collected."""
    workspace = write_two_engines(tmp_path_factory.mktemp("sweep") / "work")
    with closing(open_store(workspace)) as store:
        collect(workspace, store)
    return workspace


@pytest.fixture
def two_engines(workspace: Workspace, sweep: Workspace) -> Workspace:
    """A copy of it to work in."""
    shutil.copytree(sweep.root, workspace.root, dirs_exist_ok=True)
    return workspace


def findings_of(workspace: Workspace, **subject: Any) -> Findings:
    with closing(open_store(workspace)) as store:
        collect(workspace, store)
        return gather(workspace, store, ReportScope(**subject))


def cell(**axes: Any) -> Cell:
    whole = {
        **dict.fromkeys(AXES, ""),
        "batch_size": 1,
        "max_new_tokens": 128,
        "backend": "hf",
        **axes,
    }
    return Cell(json.dumps(axes), whole, {}, {})


def grid(**axes: Sequence[Any]) -> list[Cell]:
    return [cell(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


# ---------------------------------------------------------------- how it is laid out


@pytest.mark.parametrize(
    ("cells", "by"),
    [
        (grid(batch_size=[1, 2], dtype=["float16", "float32"], backend=["hf", "vllm"]), ("backend",)),
        (grid(batch_size=[1, 2], dtype=["float16", "float32"]), ("dtype",)),
        (grid(batch_size=[1, 2], max_new_tokens=[16, 32], ignore_eos=[True, False]), ("ignore_eos",)),
        (grid(batch_size=[1, 2]), ("batch_size",)),
        (grid(batch_size=[1]), ()),
    ],
)
def test_a_report_compares_by_what_a_sweep_is_mostly_about(cells: list[Cell], by: tuple[str, ...]) -> None:
    assert asked_by(cells) == by


@pytest.mark.parametrize(
    ("cells", "by", "expected"),
    [
        (
            grid(backend=["hf", "vllm"], batch_size=[1, 2], dtype=["float16", "float32"]),
            ["backend"],
            Layout(("backend",), "batch_size", ("dtype",)),
        ),
        (grid(batch_size=[1, 2], dtype=["float16", "float32"]), ["batch_size"], Layout((), "batch_size", ("dtype",))),
        (
            grid(batch_size=[1, 2], max_new_tokens=[16, 32]),
            ["batch_size"],
            Layout(("batch_size",), "max_new_tokens", ()),
        ),
        (grid(dtype=["float16", "float32"]), ["dtype"], Layout(("dtype",), "", ())),
        (
            grid(max_new_tokens=range(1, 13), batch_size=[1, 2]),
            ["max_new_tokens"],
            Layout((), "batch_size", ("max_new_tokens",)),
        ),
    ],
)
def test_one_axis_has_colours_one_runs_along_and_one_value_of_each_other_is_picked(
    cells: list[Cell], by: list[str], expected: Layout
) -> None:
    assert layout(cells, by) == expected


def test_options_of_one_backend_are_series_beside_the_others_that_have_none() -> None:
    of_each = [("hf", "{}"), ("staged", "{}"), ("staged", '{"compile": false}'), ("vllm", "{}")]
    cells = [cell(backend=name, engine_options=own, batch_size=batch) for name, own in of_each for batch in (1, 2)]
    laid_out = layout(cells, ["backend"])
    assert laid_out.picked == ()
    assert list(dict.fromkeys(map(laid_out.series_of, cells))) == [
        "hf", "staged", "staged, options compile=False", "vllm"
    ]  # fmt: skip


# ---------------------------------------------------------------- what is drawn


def test_what_is_drawn_is_what_the_database_has(two_engines: Workspace) -> None:
    found = findings_of(two_engines)
    rows = {row["run"]: row for row in draw.drawing(found, charts.PAGE).rows["cells"]}
    with closing(sqlite3.connect(two_engines.database)) as database:
        stored = database.execute(
            "SELECT run_id, output_tok_s, e2e_s, peak_allocated_bytes, mbu FROM repeats"
        ).fetchall()
        asked = dict(database.execute("SELECT run_id, batch_size FROM runs").fetchall())
    assert len(rows) == 15
    for run_id, row in rows.items():
        for place, metric in enumerate(("output_tok_s", "e2e_s", "peak_allocated_bytes", "mbu"), 1):
            values = [values[place] for values in stored if values[0] == run_id]
            assert len(values) == 5
            assert row[metric] == pytest.approx(statistics.geometric_mean(values))
            assert (row[f"{metric}_low"], row[f"{metric}_high"]) == (min(values), max(values))
        assert row["load"] == asked[run_id]


def test_the_front_has_what_no_other_run_of_its_slice_beats_in_both(two_engines: Workspace) -> None:
    found = findings_of(two_engines)
    rows = draw.drawing(found, charts.PAGE).rows["cells"]
    for row in rows:
        others = [other for other in rows if other["slice"] == row["slice"] and other is not row]
        beaten = any(
            other["e2e_s"] <= row["e2e_s"] and other["output_tok_s"] >= row["output_tok_s"] for other in others
        )
        assert row["front"] == (not beaten)
    assert 0 < sum(row["front"] for row in rows) < len(rows)


def test_latencies_are_those_of_every_request(two_engines: Workspace) -> None:
    found = findings_of(two_engines)
    with closing(sqlite3.connect(two_engines.database)) as database:
        for row in found.quantiles:
            run_id, measure = found.cells[row.cell].run_id, row.measure
            values = [v for (v,) in database.execute(f"SELECT {measure} FROM samples WHERE run_id = ?", (run_id,))]
            assert row.requests == len(values)
            assert (row.seconds["q0"], row.seconds["q100"]) == (min(values), max(values))
            assert row.seconds["q50"] == pytest.approx(statistics.median(values))


def test_memory_is_drawn_against_what_fit_predicts_for_the_run(two_engines: Workspace) -> None:
    found = findings_of(two_engines)
    model = Checkpoint("tiny-llama", "folder", CONFIG, None)
    gpus = Gpus(2, "NVIDIA H100 80GB HBM3", 85520809984, 9.0)
    for one in found.cells:
        load = Sequences(one.axes["batch_size"], 15, one.axes["max_new_tokens"], 2)
        if one.axes["backend"] == "hf":
            expected = max(memory.peak for memory in fit.by_layers(model.shape, model.bytes_of(2), load, gpus, "hf"))
            assert found.predicted_bytes[one.run_id] == expected
        else:  # its share of the GPU, whatever is asked
            assert found.predicted_bytes[one.run_id] == pytest.approx(0.92 * 85520809984, rel=0.05)
    rows = draw.drawing(found, charts.PAGE).rows["cells"]
    assert {row["run"]: row["predicted_bytes"] for row in rows} == found.predicted_bytes


def test_a_model_that_is_no_longer_here_has_no_prediction(workspace: Workspace) -> None:
    write_two_engines(workspace.root)
    (workspace.root.parent / "tiny-llama" / "config.json").unlink()
    found = findings_of(workspace)
    assert found.predicted_bytes == {}
    memory = next(chart for chart in draw.drawing(found, charts.PAGE).charts if chart.name == "memory")
    assert "no prediction" in memory.lead


def test_what_has_nothing_to_show_is_said_and_not_drawn(records: Records) -> None:
    batch = records.submit()
    records.done(batch, records.attempt(batch))
    drawn = draw.drawing(findings_of(records.workspace), charts.PAGE)
    assert [chart.name for chart in drawn.charts] == ["throughput", "latency", "pareto", "memory"]
    assert [line.partition(":")[0] for line in drawn.not_drawn] == ["No bandwidth chart", "No telemetry chart"]


def test_telemetry_is_drawn_for_marked_runs_first_as_the_records_have_it(two_engines: Workspace) -> None:
    marked = findings_of(two_engines).cells[-1]
    (path,) = two_engines.results.glob(f"{marked.run_id}/*.json")
    record = read_json(path)
    gpu = record["telemetry"]["gpus"][1]
    edit_json(
        path, telemetry={**record["telemetry"], "gpus": [{**gpu, "throttle_reasons": [0x20] * len(gpu["sm_mhz"])}]}
    )
    found = findings_of(two_engines)
    drawn = draw.drawing(found, charts.PAGE)
    chart = next(chart for chart in drawn.charts if chart.name == "telemetry")
    assert len(chart.choices) == timelines.MOST_RUNS < len(found.cells)
    (key,) = [value for value, name in chart.choices if marked.run_id[:6] in name]
    rows = [row for row in drawn.rows["telemetry"] if row["measure"] == key]
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("phase", "repeat", "label", "sample")}
    assert [row["what"] for row in kinds["phase"]] == ["loading", "warm-up", "measuring", "scoring"]
    assert [(row["t"], row["end"]) for row in kinds["repeat"]] == [
        (round(repeat["started_s"], 2), round(repeat["started_s"] + repeat["wall_s"], 2))
        for repeat in record["repeats"]
    ]
    assert [row["what"].partition(",")[0] for row in kinds["label"]] == [
        "power", "SM clock", "temperature", "utilisation", "GPU memory", "CPUs used", "resident memory",
    ]  # fmt: skip
    held = [row for row in kinds["sample"] if row.get("held")]
    assert {(row["what"], row["device"]) for row in held} == {("SM clock", "GPU 1")}
    power = [row for row in kinds["sample"] if row["what"] == "power"]
    assert len(power) <= timelines.MOST_POINTS
    assert power[0]["value"] == "110 W"
    for row in kinds["sample"]:  # each line stays in its band
        (label,) = [one for one in kinds["label"] if one["what"].startswith(f"{row['what']},")]
        assert label["at"] - timelines.FILLED - 0.001 <= row["at"] <= label["at"] + 0.001


@pytest.mark.parametrize("by", [(), ("batch_size",), ("max_new_tokens",), ("backend", "batch_size")])
@pytest.mark.parametrize("look", [charts.PAGE, charts.PICTURE], ids=["page", "picture"])
def test_vega_lite_takes_every_chart(two_engines: Workspace, by: tuple[str, ...], look: charts.Look) -> None:
    found = findings_of(two_engines, by=by)
    drawn = draw.drawing(found, look)
    assert {chart.name for chart in drawn.charts} == {
        "throughput",
        "latency",
        "pareto",
        "memory",
        "bandwidth",
        "telemetry",
    }
    for chart in (*drawn.charts, *drawn.ratios):
        spec = draw.picture(drawn, chart, draw.places_of(found, slices(found)[0]))
        assert spec["datasets"][chart.data], chart.name
        compiled = vl_convert.vegalite_to_vega(spec, vl_version=report.VEGALITE)
        assert compiled["marks"]


@pytest.fixture
def served(two_engines: Workspace) -> Findings:
    """The same runs behind a server, with service levels."""
    for path in two_engines.arrays.glob("*/[0-9].json"):
        edit_json(path, served=True)
    (submission,) = two_engines.submissions.glob("*.json")
    edit_json(submission, jobs=[{**job, "served": True} for job in read_json(submission)["jobs"]])
    two_engines.database.unlink()  # it has them without
    return findings_of(two_engines, slo=("ttft<1s",))


def test_served_runs_have_load_curves_with_fronts_and_latencies_over_a_repeat(served: Findings) -> None:
    drawn = draw.drawing(served, charts.PICTURE)
    by_name = {chart.name: chart for chart in drawn.charts}
    assert {"load-tpot", "load-ttft", "goodput", "steady"} <= by_name.keys()
    rows = drawn.rows["cells"]
    for row in rows:
        assert row["request_tok_s"] == pytest.approx(1 / row["tpot_s"])
        assert row["output_tok_s_per_gpu"] == pytest.approx(row["output_tok_s"] / 2)
        others = [other for other in rows if other["slice"] == row["slice"] and other is not row]
        for front, latency in (("front_of_tpot", "tpot_s"), ("front_of_ttft", "ttft_p99_s")):
            beaten = any(
                other[latency] <= row[latency] and other["output_tok_s_per_gpu"] >= row["output_tok_s_per_gpu"]
                for other in others
            )
            assert row[front] == (not beaten)
    for name in ("load-tpot", "load-ttft", "goodput", "steady"):
        spec = draw.picture(drawn, by_name[name], draw.places_of(served, slices(served)[0]))
        assert spec["datasets"][by_name[name].data], name
        assert vl_convert.vegalite_to_vega(spec, vl_version=report.VEGALITE)["marks"]


def test_latencies_over_a_repeat_are_those_of_the_requests_and_their_medians(served: Findings) -> None:
    drawn = draw.drawing(served, charts.PAGE)
    chart = next(chart for chart in drawn.charts if chart.name == "steady")
    assert len(chart.choices) <= 3 * report.findings.MOST_SENT_RUNS
    for key, _ in chart.choices:
        place, measure = key.split()
        at = [name for name, _ in report.findings.LATENCIES].index(measure)
        seconds = [one.seconds[at] for one in served.sent if one.cell == int(place)]
        rows = [row for row in drawn.rows["requests"] if row["measure"] == key]
        assert [row["seconds"] for row in rows if row["kind"] == "request"] == pytest.approx(seconds, abs=1e-4)
        medians = [row for row in rows if row["kind"] == "median"]
        assert medians == sorted(medians, key=lambda row: row["t"])
        assert all(min(seconds) - 1e-4 <= row["seconds"] <= max(seconds) + 1e-4 for row in medians)


def test_the_page_says_which_configuration_to_take(served: Findings) -> None:
    (first, *_) = page._lead(served)
    assert " meet ttft<1s; take " in first["text"]


def scales_of(spec: Any) -> list[dict[str, Any]]:
    """Every scale of a specification, wherever it stands."""
    if isinstance(spec, dict):
        own = [spec["scale"]] if isinstance(spec.get("scale"), dict) else []
        return own + [scale for part in spec.values() for scale in scales_of(part)]
    return [scale for part in spec for scale in scales_of(part)] if isinstance(spec, list) else []


FRONT = charts.Front(
    charts.DataColumn("e2e_s", "latency", "s"), charts.DataColumn("output_tok_s", "throughput"), "front", ""
)


@pytest.mark.parametrize("spread", [2.0, 1000.0])
def test_a_wide_range_gets_a_logarithmic_axis_and_a_narrow_one_begins_at_zero(spread: float) -> None:
    scene = charts.Scene("batch_size", (1, 2), ("hf", "vllm"))
    values = [1.0, spread]
    for spec in (
        charts.against_load(charts.PAGE, scene, charts.DataColumn("output_tok_s", "throughput"), values),
        charts.pareto(charts.PAGE, scene, FRONT, values, values),
        charts.latency(charts.PAGE, scene, values),
        charts.memory(charts.PAGE, scene, values, 1.0),
    ):
        found = [
            scale for scale in scales_of(spec) if "domain" not in scale and scale.get("base") != 2 and "zero" in scale
        ]
        logarithmic = [scale for scale in scales_of(spec) if scale.get("type") == "log"]
        if spread > charts.LOG_FROM:
            assert logarithmic
            assert all("zero" not in scale for scale in logarithmic)
        else:
            assert found
            assert not logarithmic


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4


def _luminance(colour: str) -> float:
    red, green, blue = (_linear(int(colour[at : at + 2], 16) / 255) for at in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


# What is left of red, green and blue (linear) without one kind of cone. Machado, Oliveira, Fernandes 2009, severity 1.
BLINDNESS = {
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}


def _lab(colour: str, blindness: str) -> tuple[float, float, float]:
    """CIE L*a*b* (D65) of a colour as it is seen."""
    plain = [_linear(int(colour[at : at + 2], 16) / 255) for at in (1, 3, 5)]
    red, green, blue = (
        min(1.0, max(0.0, sum(share * of for share, of in zip(row, plain, strict=True))))
        for row in BLINDNESS[blindness]
    )
    x, y, z = (
        (a * red + b * green + c * blue) / white
        for a, b, c, white in (
            (0.4124, 0.3576, 0.1805, 0.95047), (0.2126, 0.7152, 0.0722, 1.0), (0.0193, 0.1192, 0.9505, 1.08883),
        )
    )  # fmt: skip
    fx, fy, fz = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def _palettes() -> dict[str, tuple[list[str], str]]:
    css = (Path(report.__file__).parent / "page.css").read_text(encoding="utf-8")
    series = re.findall(r"--series-\d: light-dark\((#\w{6}), (#\w{6})\)", css)
    (card,) = re.findall(r"--card: light-dark\((#\w{6}), (#\w{6})\)", css)
    return {scheme: ([pair[at] for pair in series], card[at]) for at, scheme in enumerate(("light", "dark"))}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_colours_of_series_are_told_apart_by_the_colour_blind_too(scheme: str) -> None:
    colours, card = _palettes()[scheme]
    assert len(colours) == charts.MOST_SERIES
    assert min(_contrast(colour, card) for colour in colours) >= 3.0  # WCAG 2.2, 1.4.11
    for blindness in BLINDNESS:
        for one, other in itertools.combinations(colours, 2):
            apart = sum((a - b) ** 2 for a, b in zip(_lab(one, blindness), _lab(other, blindness), strict=True)) ** 0.5
            assert apart > 17, (blindness, one, other)


def test_pictures_have_the_light_colours_of_the_page() -> None:
    assert list(charts.LIGHT_SERIES) == _palettes()["light"][0]


# ---------------------------------------------------------------- what is said


def test_the_verdicts_are_those_of_labctl_compare(two_engines: Workspace, labctl: Labctl) -> None:
    found = findings_of(two_engines)
    said = labctl("compare", "--by", "backend", "--json").json
    assert verdicts.sentences(found.comparison) == said["verdicts"]
    assert json.loads(json.dumps(verdicts.to_json(found.comparison)["blocks"][0])) == said["blocks"][0]
    page = html_of(found)
    for warning in found.comparison.warnings:
        assert warning in page
    lead = "Throughput, vllm against hf: better in 7 of 7"
    assert lead in page


def html_of(found: Findings) -> str:
    return render(found, draw.drawing(found, charts.PAGE), "", ("6", "6"))


def test_runs_without_a_result_are_named(two_engines: Workspace) -> None:
    found = findings_of(two_engines)
    (missing,) = found.missing
    page = html_of(found)
    assert missing.run_id in page
    assert "1 without a result" in page


def test_a_text_of_a_model_is_shown_and_never_obeyed(two_engines: Workspace) -> None:
    page = html_of(findings_of(two_engines))
    assert "&lt;/script&gt;&lt;script&gt;window.broken = 1" in page
    assert PROMPTS[1] not in page


def test_no_more_prompts_are_told_than_there_are(two_engines: Workspace) -> None:
    found = findings_of(two_engines)
    assert 1 < len(found.prompts) <= MOST_PROMPTS
    assert '<p class="quiet">and ' not in html_of(found)
    many = replace(found, prompts=[f"prompt {n}" for n in range(MOST_PROMPTS + 3)])
    assert "and 3 more" in html_of(many)


def test_the_first_token_that_differs_is_marked(two_engines: Workspace) -> None:
    page = html_of(findings_of(two_engines))
    assert page.count("equal for 5 tokens") == 4  # two prompts, two lengths
    assert "<mark> w505</mark>" in page


def test_what_differs_in_how_it_was_measured_is_shaded(two_engines: Workspace) -> None:
    page = html_of(findings_of(two_engines))
    assert re.search(r'<tr class="differs"><th scope="row">attention</th>', page)
    assert re.search(r'<tr><th scope="row">driver</th>', page)


def test_a_sweep_of_too_many_passes_has_a_row_a_run(two_engines: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings_of(two_engines)
    rows = re.findall(r"<caption>A row per repeat", html_of(found))
    assert rows
    monkeypatch.setattr("labctl_orchestrator.report.page.MOST_REPEATS", 20)
    page = html_of(found)
    assert "A row per run, with means" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert len(data["raw"]["rows"]) == 15
    at = data["raw"]["columns"].index("output_tok_s")
    expected = statistics.geometric_mean(row.figures["output_tok_s"] or 0 for row in found.repeats if row.cell == 0)
    assert data["raw"]["rows"][0][at] == pytest.approx(expected)


def gpu_time_of(page: str) -> list[list[str]]:
    """The cells of the table of GPU time, row by row."""
    found = re.search(r"<caption>GPU time, a row per job</caption>(.*?)</table>", page, re.DOTALL)
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", found[1], re.DOTALL) if found else []
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def test_the_time_of_the_gpus_is_told_for_each_job_and_in_all(two_engines: Workspace) -> None:
    """Two jobs of two GPUs, which asked for an hour and held them for a minute: a load of 13 s, runs with a warm-up of 1.5 s."""
    head, first, second, total = gpu_time_of(html_of(findings_of(two_engines)))
    assert [cell.partition(" <small>")[0] for cell in head[6:]] == [
        "requested", "held", "loading", "warm-up", "measured", "other",
    ]  # fmt: skip
    with closing(sqlite3.connect(two_engines.database)) as database:
        measured = dict(database.execute(
            "SELECT backend, 2 * sum(wall_s) FROM repeats JOIN runs USING (run_id) GROUP BY backend"
        ))  # fmt: skip
    for row, (slurm_id, backend, runs) in zip((first, second), (("100_0", "hf", 8), ("100_1", "vllm", 7)), strict=True):
        assert row[:6] == [slurm_id, "dgxh", backend, "COMPLETED", "1", f"{runs} of 8"]
        assert row[6:10] == ["7,200", "120", "26", f"{2 * 1.5 * runs:.0f}"]
        assert float(row[10].replace(",", "")) == pytest.approx(measured[backend], abs=0.5)
    assert total[0] == "all 2 jobs"
    assert total[6:10] == ["14,400", "240", "52", "45"]


def test_of_many_jobs_forty_are_shown_and_all_are_summed(two_engines: Workspace) -> None:
    found = findings_of(two_engines)
    jobs = [found.jobs[0]._replace(slurm_id=str(place)) for place in range(50)]
    jobs[49] = jobs[49]._replace(held_gpu_s=None, rest_gpu_s=None)
    rows = gpu_time_of(html_of(replace(found, jobs=jobs)))
    assert len(rows) == 1 + 40 + 1
    assert rows[-1][0] == "all 50 jobs"
    assert rows[-1][6:8] == ["100.00", f"{49 * 120 / 3600:.2f}"]  # in hours; the one that is not known is in no sum
    page = html_of(replace(found, jobs=jobs[49:]))
    assert gpu_time_of(page)[-1][7] == "\N{EN DASH}"


def test_without_gpus_there_is_no_table_of_their_time(two_engines: Workspace) -> None:
    edit_json(two_engines.arrays / "aaaaaaaa-1" / "array.json", gpus=0)
    two_engines.database.unlink()
    found = findings_of(two_engines)
    assert found.jobs == []
    assert "GPU time" not in html_of(found)


def test_repeats_are_counted_from_one(two_engines: Workspace) -> None:
    table, values = page._raw(findings_of(two_engines))
    place = [heading.title for heading in table.columns].index("repeat")
    assert {row[place] for row in table.rows} == {"1", "2", "3", "4", "5"}
    assert {row[values["columns"].index("repeat")] for row in values["rows"]} == {1, 2, 3, 4, 5}


# ---------------------------------------------------------------- how to repeat it


def test_the_request_of_a_report_is_the_one_that_was_asked() -> None:
    asked = request.build([
        ("flags", {
            "partition": ["dgxh", "dgx2"], "backend": "vllm", "prompt": 'Say "ä\n\\"',
            "sampling": ["greedy", "temperature=0.7,seed=1"],
            "engine_options": {"max_model_len": [2048, 4096], "enforce_eager": True}, "cells": [{"partition": "dgxh", "gpus": 1}],
            "sbatch": {"exclusive": True}, "request_rate": 2.5, "repeats": 7, "name": "a b",
        })
    ])  # fmt: skip
    import msgspec

    written = tomllib.loads(toml(msgspec.to_builtins(asked)))
    assert request.build([("request.toml", written)]) == asked


def test_it_tells_versions_the_request_and_the_commands(two_engines: Workspace) -> None:
    found = findings_of(two_engines, names=(NAME,), by=("backend",), conditions=("batch_size>=4",))
    told = "\n".join(f"{step.text}\n{step.code}" for step in steps(found))
    assert "torch==2.9.0 transformers==5.0.0 vllm==0.17.0" in told
    assert 'backend = ["hf", "vllm"]' in told
    assert "labctl report 'two engines' --by backend --where 'batch_size>=4'" in told


# ---------------------------------------------------------------- the command


def test_it_writes_one_page_and_pictures_beside_it(two_engines: Workspace, labctl: Labctl) -> None:
    done = labctl("report", "-o", "out.html", "--svg", "--png", "--json")
    assert done.code == 0, done.err
    written = {Path(one["path"]).name: one["bytes"] for one in done.json}
    assert written == {path.name: path.stat().st_size for path in Path().glob("out*")}
    names = ("throughput", "latency", "pareto", "memory", "bandwidth", "telemetry", "ratios-output_tok_s")
    assert {f"out-{name}.{kind}" for name in names for kind in ("svg", "png")} < set(written)
    assert written["out.html"] < 1_500_000
    for picture in Path().glob("*.svg"):
        text = picture.read_text(encoding="utf-8")
        assert text.startswith("<svg")
        assert "var(" not in text
        assert "aria-label" in text or "<text" in text
    for picture in Path().glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_control_character_in_a_label_is_written_out(two_engines: Workspace, labctl: Labctl) -> None:
    """Vega's converter ends the process at one: in one of its own, so that the tests go on."""
    for path in two_engines.arrays.glob("*/[0-9]*.json"):
        edit_json(path, model={**read_json(path)["model"], "name": f"a\x1b\x01\ufffe{path.parent.name}"})
    done = subprocess.run(
        [sys.executable, "-c", "from labctl_orchestrator.cli import main; main()", "report", "--svg", "-o", "out.html"],
        cwd=two_engines.root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path in two_engines.root.glob("out*"):
        assert not re.search("[\x00-\x08\x0b-\x1f\ufffe]", path.read_text(encoding="utf-8")), path


def test_a_page_names_no_host_that_it_would_load_from(two_engines: Workspace, labctl: Labctl) -> None:
    assert labctl("report").code == 0
    page = Path("report.html").read_text(encoding="utf-8")
    head = page.split("<script", 1)[0]
    assert "default-src 'none'" in head
    assert not re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?(?:https?:)?//', head)


def test_a_page_that_cannot_be_written_leaves_the_one_that_was(
    two_engines: Workspace, labctl: Labctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("report.html").write_text("the one before")

    def full(self: Path, target: Path) -> Path:  # stands in for a disk without room
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(Path, "replace", full)
    done = labctl("report")
    assert done.code == 5
    assert "No space left" in done.err
    assert Path("report.html").read_text() == "the one before"
    assert [path.name for path in Path().iterdir() if path.name.startswith(".report")] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "."], "is a folder"),
        (["-o", "nowhere/report.html"], "mkdir -p nowhere"),
        (["--by", "nonsense"], "unknown axis: 'nonsense'"),
        (["--metric", "nonsense"], "unknown metric: 'nonsense'"),
        (["--where", "batch_size=3"], "no measured run matches"),
        (["--baseline", "nonsense"], "no measured run for the baseline"),
        (["unknown"], "unknown"),
    ],
)
def test_what_cannot_be_reported_is_one_line_with_its_remedy(
    two_engines: Workspace, labctl: Labctl, arguments: list[str], said: str
) -> None:
    done = labctl("report", *arguments)
    assert done.code == 2
    assert said in done.err
    assert "->" in done.err
    assert not Path("report.html").exists()


def test_without_a_result_it_says_where_the_runs_stand(records: Records, labctl: Labctl) -> None:
    records.request()
    done = labctl("report")
    assert done.code == 1
    assert "all runs ended without a result (1 missing)" in done.err


def test_too_many_runs_are_not_put_on_one_page(two_engines: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labctl_orchestrator.report.findings.MOST_RUNS", 3)
    error = refused(lambda: findings_of(two_engines))
    assert "15 runs, more than a page can show" in error.message


def test_without_vega_it_says_what_to_install(
    two_engines: Workspace, labctl: Labctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    done = labctl("report")
    assert done.code == 2
    assert "labctl-slurm[report]" in done.err


def test_runs_that_several_requests_asked_for_are_told_of_once(two_engines: Workspace) -> None:
    found = findings_of(two_engines)
    assert [one.name for one in found.asked] == [NAME]
    assert choices(found) == {"max_new_tokens": [64, 128]}
    assert replace(found.subject) == ReportScope()
