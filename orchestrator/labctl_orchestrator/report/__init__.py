"""`labctl report`: settings and results in one HTML file that loads nothing, and its charts as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from labctl_orchestrator.exchange import outfile
from labctl_orchestrator.exchange.streams import visible_in
from labctl_orchestrator.report import charts, draw, page
from labctl_orchestrator.report.findings import Findings, ReportScope, gather, slices
from labctl_slurm.errors import WrongUseError

__all__ = ["Findings", "ReportScope", "gather", "need_vega", "write", "write_pictures"]

VEGALITE = "6.4"
# The entry of the script that draws, for the page.
IN_THE_PAGE = "window.vegaEmbed = vegaEmbed;"
# Three times a chart's own 72: a picture is 1860 pixels wide.
PIXELS_PER_INCH = 216


def need_vega() -> ModuleType:
    """The module vl-convert, which contains Vega. Raises WrongUseError if it is not installed."""
    try:
        import vl_convert
    except ImportError:
        raise WrongUseError(
            "package not installed: vl-convert-python",
            "pip install 'labctl-slurm[report]'",
        ) from None
    module: ModuleType = vl_convert
    return module


def write(findings: Findings, path: Path) -> tuple[Path, int]:
    """Write the page; returns its path and size in bytes. Raises OSError if that fails; an earlier file then stays as it is."""
    vega = need_vega()
    drawn = draw.drawing(findings, charts.PAGE)
    script = vega.javascript_bundle(IN_THE_PAGE, vl_version=VEGALITE)
    versions = (vega.get_vega_version(), VEGALITE)
    return _put(path, page.render(findings, drawn, script, versions).encode())


def write_pictures(findings: Findings, beside: Path, kinds: Sequence[str]) -> list[tuple[Path, int]]:
    """Write each chart of the fullest slice beside the page as <page>-<chart>.png or .svg, on white."""
    vega = need_vega()
    drawn = draw.drawing(findings, charts.PICTURE)
    fullest = draw.places_of(findings, slices(findings)[0])
    written = []
    for chart in (*drawn.charts, *drawn.ratios):
        spec = visible_in(draw.picture(drawn, chart, fullest))
        for kind in kinds:
            target = beside.with_name(f"{beside.stem}-{chart.name}.{kind}")
            if kind == "png":
                content = vega.vegalite_to_png(spec, vl_version=VEGALITE, ppi=PIXELS_PER_INCH)
            else:
                content = vega.vegalite_to_svg(spec, vl_version=VEGALITE).encode()
            written.append(_put(target, content))
    return written


def _put(path: Path, content: bytes) -> tuple[Path, int]:
    """Write atomically."""
    with outfile.output_file(path, binary=True) as file:
        file.write(content)
    return path, len(content)
