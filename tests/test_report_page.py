"""The page of labctl report in a real Chromium: drawn, silent, alone, usable by keyboard, legible at any width."""

from __future__ import annotations

import re
import sqlite3
import statistics
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from labctl_orchestrator import report
from labctl_orchestrator.report import ReportScope
from labctl_orchestrator.store.collect import collect
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.store.workspace import Workspace
from tests.browser import chromium, opened
from tests.models import shallow, smollm2
from tests.two_engines import write_two_engines

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = ["chromium", "shallow", "smollm2"]  # fixtures
pytestmark = pytest.mark.browser

CHARTS = (
    "throughput",
    "latency",
    "pareto",
    "memory",
    "bandwidth",
    "telemetry",
    "ratios-output_tok_s",
    "ratios-ttft_s",
    "ratios-tpot_s",
)
# The narrowest is where text is cut first.
WIDTHS = (390, *(pytest.param(width, marks=pytest.mark.nightly) for width in (820, 1440)))


@pytest.fixture(scope="module")
def workspace_of_page(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return write_two_engines(tmp_path_factory.mktemp("report") / "work")


@pytest.fixture(scope="module")
def page_file(workspace_of_page: Workspace) -> Path:
    return write_report(workspace_of_page)


def write_report(workspace: Workspace, **subject: Any) -> Path:
    path = workspace.root / "report.html"
    with closing(open_store(workspace)) as store:
        collect(workspace, store)
        report.write(report.gather(workspace, store, ReportScope(**subject)), path)
    return path


@pytest.fixture
def page(chromium: Browser, page_file: Path) -> Iterator[Page]:
    """The page at a desk's width; at the end it has said nothing and asked for nothing."""
    with opened(chromium, page_file) as (page, seen):
        yield page
        assert seen.messages == []
        assert seen.requests == [page_file.as_uri()]


def stored(workspace: Workspace, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(workspace.database)) as database:
        return database.execute(sql).fetchall()


def drawn_rows(page: Page, chart: str) -> list[dict[str, Any]]:
    """The rows that a chart was drawn from, as Vega has them."""
    rows: list[dict[str, Any]] = page.evaluate(
        """chart => {
            const view = labctlReport.views[chart].view;
            const name = labctlReport.data.charts.find((one) => one.name === chart).data;
            return view.data(name).map((row) => ({...row}));
        }""",
        chart,
    )
    return rows


# ---------------------------------------------------------------- charts


def test_every_chart_is_drawn_and_nothing_is_said_or_asked_for(page: Page) -> None:
    for chart in CHARTS:
        box = page.locator(f"#{chart}-chart svg").bounding_box()
        assert box is not None
        assert box["width"] > 200
        assert box["height"] > 60
        assert page.locator(f"#{chart}-chart svg .mark-symbol path").count() > 0


def test_what_the_charts_were_drawn_from_is_what_the_database_has(page: Page, workspace_of_page: Workspace) -> None:
    rows = {row["run"]: row for row in drawn_rows(page, "throughput")}
    asked = "SELECT run_id, batch_size, backend FROM runs JOIN results USING (run_id) WHERE max_new_tokens = 64"
    assert {(run, row["load"], row["series"]) for run, row in rows.items()} == set(stored(workspace_of_page, asked))
    measured = stored(workspace_of_page, "SELECT run_id, output_tok_s, e2e_s, peak_allocated_bytes FROM repeats")
    for chart, metric, place in (
        ("throughput", "output_tok_s", 1),
        ("pareto", "e2e_s", 2),
        ("memory", "peak_allocated_bytes", 3),
    ):
        for row in drawn_rows(page, chart):
            values = [values[place] for values in measured if values[0] == row["run"]]
            assert row[metric] == pytest.approx(statistics.geometric_mean(values))


def test_the_points_stand_where_their_values_are(page: Page) -> None:
    """From the scene, not from the data: a point's place, turned back by the chart's own scale."""
    read: list[list[float]] = page.evaluate(
        """() => {
            const view = labctlReport.views.throughput.view;
            const [x, y] = [view.scale("x"), view.scale("y")];
            const points = Array.from(document.querySelectorAll("#throughput-chart .mark-symbol path"));
            return points.map((point) => {
                const {e, f} = point.transform.baseVal.consolidate().matrix;
                return [x.invert(e), y.invert(f)];
            });
        }"""
    )
    rows = [(row["load"], row["output_tok_s"]) for row in drawn_rows(page, "throughput")]
    assert len(read) == len(rows) == 8
    for (load, rate), (x, y) in zip(sorted(rows), sorted(read), strict=True):
        assert x == pytest.approx(load, rel=1e-3)
        assert y == pytest.approx(rate, rel=1e-3)


def test_another_slice_is_picked_by_keyboard(page: Page, workspace_of_page: Workspace) -> None:
    page.locator("select[data-pick]").focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_function("document.getElementById('picked').textContent.includes('new tokens 128')")
    page.wait_for_function("labctlReport.views.throughput?.view.data('cells').length === 7")
    assert page.locator("#picked").inner_text() == "7 of 15 runs: new tokens 128"
    asked = "SELECT run_id FROM runs JOIN results USING (run_id) WHERE max_new_tokens = 128"
    assert {(row["run"],) for row in drawn_rows(page, "throughput")} == set(stored(workspace_of_page, asked))


def test_another_latency_is_picked_by_keyboard(page: Page, workspace_of_page: Workspace) -> None:
    page.locator("#latency-measure").focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_function("labctlReport.views.latency?.view.data('latencies')[0].measure === 'ttft_s'")
    for row in drawn_rows(page, "latency"):
        values = [v for (v,) in stored(workspace_of_page, f"SELECT ttft_s FROM samples WHERE run_id = '{row['run']}'")]
        assert row["q50"] == pytest.approx(statistics.median(values))
        assert row["requests"] == len(values)


def test_each_chart_has_a_text_and_its_data_as_a_table(page: Page) -> None:
    for chart in CHARTS:
        image = page.locator(f"#{chart}-chart")
        assert image.get_attribute("role") == "img"
        assert len(image.get_attribute("aria-label") or "") > 40
        page.locator(f"details[data-chart='{chart}'] summary").focus()
        page.keyboard.press("Enter")
        table = page.locator(f"details[data-chart='{chart}'] table")
        table.wait_for()
        assert table.locator("tbody tr").count() == len(drawn_rows(page, chart))
        assert table.locator("caption").inner_text()
    told = page.locator("#throughput-chart").get_attribute("aria-label") or ""
    assert "Highest: 3123 tok/s, vllm at batch size 64" in told
    first = page.locator("details[data-chart='throughput'] tbody tr").first.locator("th, td").all_inner_texts()
    row = drawn_rows(page, "throughput")[0]
    assert first[:3] == [row["run"], row["series"], str(row["load"])]
    assert float(first[3].replace(",", "")) == pytest.approx(row["output_tok_s"], rel=1e-4)


# ---------------------------------------------------------------- the table


def column(page: Page, title: str) -> list[str]:
    heads = [text.split("\n")[0].strip(" ↕↑↓") for text in page.locator("#raw thead th").all_inner_texts()]
    place = heads.index(title)
    return page.locator(f"#raw tbody tr:not([hidden]) > :nth-child({place + 1})").all_inner_texts()


def test_the_table_has_every_value_of_the_database(page: Page, workspace_of_page: Workspace) -> None:
    raw = page.evaluate("labctlReport.data.raw")
    at = {name: place for place, name in enumerate(raw["columns"])}
    read = {
        (row[at["run_id"]], row[at["repeat"]]): (row[at["output_tok_s"]], row[at["energy_j"]]) for row in raw["rows"]
    }
    expected = stored(workspace_of_page, "SELECT run_id, repeat, output_tok_s, energy_j FROM repeats")
    assert read == {
        (run, repeat + 1): (rate, energy) for run, repeat, rate, energy in expected
    }  # a person counts from 1
    shown = dict(
        zip(zip(column(page, "run"), column(page, "repeat"), strict=True), column(page, "throughput"), strict=True)
    )
    for run, repeat, rate, _ in expected:
        assert float(shown[run, str(repeat + 1)].replace(",", "")) == pytest.approx(rate, rel=1e-3)


def test_the_table_is_sorted_by_keyboard(page: Page) -> None:
    head = page.locator("#raw th[aria-sort]", has_text="throughput").first
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    rising = [float(text.replace(",", "")) for text in column(page, "throughput")]
    assert rising == sorted(rising)
    assert len(set(rising)) > 20
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(text.replace(",", "")) for text in column(page, "throughput")] == sorted(rising, reverse=True)
    page.keyboard.press("Shift+Tab")  # to the heading before it
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "none"
    batches = [int(text) for text in column(page, "batch size")]
    assert batches == sorted(batches)


def test_the_table_is_filtered_by_keyboard(page: Page) -> None:
    page.locator("#filter").focus()
    page.keyboard.type("vllm")
    assert page.locator("#shown").inner_text() == "35 of 75 rows"
    assert set(column(page, "backend")) == {"vllm"}
    page.keyboard.press("Tab")  # to the choice of a backend
    for _ in range(4):
        if page.evaluate("document.activeElement.parentElement.textContent").startswith("batch size"):
            break
        page.keyboard.press("Tab")
    page.keyboard.type("64")
    assert page.locator("#shown").inner_text() == "5 of 75 rows"
    assert set(column(page, "batch size")) == {"64"}


def test_what_is_filtered_is_saved_as_csv(page: Page, tmp_path: Path) -> None:
    page.locator("#filter").fill("vllm")
    with page.expect_download() as saving:
        page.locator("#save").press("Enter")
    saving.value.save_as(tmp_path / "saved.csv")
    lines = (tmp_path / "saved.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("run_id,repeat,backend,")
    assert len(lines) == 1 + 35
    assert all(",vllm," in line for line in lines[1:])
    assert saving.value.suggested_filename == "two engines.csv"


# ---------------------------------------------------------------- seen by everybody


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), pytest.param(1440, "dark", marks=pytest.mark.nightly)])
def test_axe_finds_nothing_to_mend(chromium: Browser, page_file: Path, scheme: str, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with opened(chromium, page_file, width=width, scheme=scheme) as (page, _):
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        # Rows like these say nothing new to axe, and take it most of its time.
        page.evaluate("for (const row of document.querySelectorAll('tbody tr:nth-child(n+4)')) row.remove()")
        found = Axe().run(
            page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
        )
        told = [f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in found.response["violations"]]
        assert not told, "\n".join(told)
        assert any(one["id"] == "color-contrast" for one in found.response["passes"])


# Of every text of every chart: its colour and that of the card it stands on, as the browser reckons them.
COLOURS = """() => {
    const plain = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const rgb = (colour) => {
        plain.clearRect(0, 0, 1, 1);
        plain.fillStyle = colour;
        plain.fillRect(0, 0, 1, 1);
        return Array.from(plain.getImageData(0, 0, 1, 1).data).slice(0, 3);
    };
    const found = [];
    for (const figure of document.querySelectorAll("figure")) {
        const paper = rgb(getComputedStyle(figure).backgroundColor);
        for (const text of figure.querySelectorAll(".chart svg text"))
            found.push(["text", rgb(getComputedStyle(text).fill), paper]);
        for (const mark of figure.querySelectorAll(".chart svg .mark-symbol path"))
            found.push(["mark", rgb(getComputedStyle(mark).fill === "none" || getComputedStyle(mark).fill === "rgba(0, 0, 0, 0)"
                ? getComputedStyle(mark).stroke : getComputedStyle(mark).fill), paper]);
    }
    return found;
}"""


def luminance(rgb: list[int]) -> float:
    parts = [value / 255 for value in rgb]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_marks_of_charts_have_contrast(chromium: Browser, page_file: Path, scheme: str) -> None:
    """axe does not look into pictures. WCAG 2.2: 4.5 to 1 for text (1.4.3), 3 to 1 for what has to be seen (1.4.11)."""
    with opened(chromium, page_file, scheme=scheme) as (page, _):
        found = page.evaluate(COLOURS)
    assert sum(kind == "text" for kind, *_ in found) > 50
    assert sum(kind == "mark" for kind, *_ in found) > 50
    for kind, ink, paper in found:
        low, high = sorted((luminance(ink), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) >= (4.5 if kind == "text" else 3.0), (kind, ink, paper)


# What is cut, or reaches out of its place: boxes that hide what they hold, and texts of charts outside of their picture.
CUT = """() => {
    const found = [];
    const told = (element) => `${element.tagName}.${element.className}: ${element.textContent.trim().slice(0, 60)}`;
    const seen = (element) => element.checkVisibility() && !element.closest(".hidden-visually, .skip");
    for (const element of document.body.querySelectorAll("*")) {
        if (!seen(element) || element.closest("svg, script, style")) continue;
        const style = getComputedStyle(element);
        const scrolls = element.matches(".scroll");
        const hides = !scrolls && style.overflowX !== "visible" && element.scrollWidth > element.clientWidth + 1;
        if (hides) found.push("hides " + told(element));
        if (style.textOverflow === "ellipsis") found.push("cuts " + told(element));
        if (element.closest(".scroll") && !scrolls) continue;
        const box = element.getBoundingClientRect();
        if (box.width && (box.right > innerWidth + 1 || box.left < -1)) found.push("reaches out " + told(element));
    }
    for (const svg of document.querySelectorAll(".chart svg")) {
        const picture = svg.getBoundingClientRect();
        for (const text of svg.querySelectorAll("text")) {
            const box = text.getBoundingClientRect();
            if (text.textContent.includes("…")) found.push("cuts " + told(text));
            if (box.width && (box.left < picture.left - 1 || box.right > picture.right + 1 || box.top < picture.top - 1
                || box.bottom > picture.bottom + 1)) found.push("reaches out of its chart " + told(text));
        }
        for (const axis of svg.querySelectorAll("g.role-axis-label")) {
            const boxes = [...axis.querySelectorAll("text")].filter(text => getComputedStyle(text).opacity > 0).map(
                text => [text.getBoundingClientRect(), text]);
            for (const [one, text] of boxes) for (const [other, next] of boxes)
                if (text !== next && one.width && one.left < other.left && one.right > other.left && one.top < other.bottom
                    && one.bottom > other.top) found.push("runs into " + told(next) + " " + told(text));
        }
    }
    return found;
}"""


@pytest.mark.parametrize("width", WIDTHS)
def test_no_text_is_cut_and_nothing_scrolls_sideways_but_tables(chromium: Browser, page_file: Path, width: int) -> None:
    with opened(chromium, page_file, width=width) as (page, _):
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CUT) == []


def test_the_charts_follow_the_window(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_function("document.querySelector('#throughput-chart svg').getBoundingClientRect().width < 360")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_light_and_dark_are_chosen_by_keyboard_and_kept(page: Page) -> None:
    def paper() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    ink = "getComputedStyle(document.querySelector('#throughput-chart svg text')).fill"
    light, light_ink = paper(), page.evaluate(ink)
    page.locator("input[name=theme]:checked").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("input[name=theme]:checked").get_attribute("value") == "dark"
    assert paper() != light
    assert page.evaluate(ink) != light_ink
    dark = paper()
    page.evaluate("sessionStorage.setItem('again', '1')")
    assert page.evaluate("localStorage.getItem('labctl-theme')") == "dark"
    page.keyboard.press("ArrowLeft")
    assert paper() == light
    page.emulate_media(color_scheme="dark")
    assert paper() == light  # a choice is stronger than the system's
    page.keyboard.press("ArrowLeft")
    assert paper() == dark


def test_everything_that_can_be_used_is_reached_by_tab_in_its_order(page: Page) -> None:
    page.evaluate(
        """() => {
            const usable = "a[href], button, select, input, summary, [tabindex='0']";
            const seen = (one) => one.checkVisibility() && (one.type !== "radio" || one.checked);
            window.usable = Array.from(document.querySelectorAll(usable)).filter(seen);
        }"""
    )
    count = page.evaluate("usable.length")
    assert count > 50
    reached = []
    for _ in range(count):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("usable.indexOf(document.activeElement)"))
    assert reached == list(range(count))
    assert page.locator("a").first.get_attribute("href") == "#main"  # past the rest, to the report


def test_it_has_landmarks_headings_and_captions(page: Page) -> None:
    for selector in ("header", "nav", "main", "footer"):
        assert page.locator(selector).count() == 1
    assert page.locator("h1").inner_text() == "two engines"
    assert page.locator("main > section[aria-labelledby]").count() == page.locator("main h2").count() == 7
    assert page.locator("table").count() == page.locator("table > caption").count()
    assert page.locator("html").get_attribute("lang") == "en"


def test_it_prints_light_whole_and_without_what_only_a_screen_needs(chromium: Browser, page_file: Path) -> None:
    with opened(chromium, page_file, width=1440, scheme="dark") as (page, _):
        page.emulate_media(media="print", color_scheme="dark")
        page.set_viewport_size({"width": 680, "height": 960})  # A4 less its margins
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        for selector in (".bar", ".tools", "details[data-chart]"):
            assert not page.locator(selector).first.is_visible()
        for chart in ("throughput", "memory"):
            box = page.locator(f"#{chart}-chart svg").bounding_box()
            assert box is not None
            assert 0 <= box["x"] < box["x"] + box["width"] <= 681
        assert page.locator("#raw tbody tr:visible").count() == 40
        assert page.get_by_text("The first 40 rows of 75").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 680
        pdf = page.pdf(format="A4")
        assert 4 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 14


def test_a_text_of_a_model_does_nothing(page: Page) -> None:
    assert page.evaluate("window.broken") is None
    assert page.locator("#texts blockquote", has_text="Is 17 < 19? </script>").first.is_visible()


def test_without_its_script_the_page_still_tells_its_figures(chromium: Browser, page_file: Path) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert "This browser does not run scripts" in page.content()
    assert page.get_by_text("better in 7 of 7").first.is_visible()
    assert page.locator("#raw tbody tr").count() == 75
    context.close()


# ---------------------------------------------------------------- of real runs


@pytest.mark.model
def test_real_runs_give_a_page_whose_charts_have_what_was_measured(
    chromium: Browser, shallow: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, labctl: Any
) -> None:
    """Transformers on four layers of SmolLM2, on this machine's CPU, through labctl submit."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    asked = ["--model-id", shallow, "--dtype", "float32", "--dtype", "bfloat16", "--batch-size", 1, "--batch-size", 2]
    done = labctl("submit", "-p", "local", *asked, "--max-new-tokens", 4, "--repeats", 2, "--wait", "--name", "real")
    assert done.code == 0, done.err
    assert labctl("report", "real").code == 0
    file = workspace.root / "report.html"
    with opened(chromium, file) as (page, seen):
        assert seen.messages == []
        assert seen.requests == [file.as_uri()]
        rows = {(row["series"], row["load"]): row["output_tok_s"] for row in drawn_rows(page, "throughput")}
        texts = page.locator(".said").all_inner_texts()
    measured: dict[tuple[str, int], list[float]] = {}
    query = "SELECT dtype, batch_size, output_tok_s FROM repeats JOIN runs USING (run_id)"
    for dtype, batch, rate in stored(workspace, query):
        measured.setdefault((dtype, batch), []).append(rate)
    assert rows == {place: pytest.approx(statistics.geometric_mean(rates)) for place, rates in measured.items()}
    assert len(rows) == 4
    assert set(texts) <= {text for (text,) in stored(workspace, "SELECT text FROM texts")}
    assert len(texts) == 2
