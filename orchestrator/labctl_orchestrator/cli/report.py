"""labctl report"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from labctl_orchestrator import report
from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.cli.comparison_options import comparison_options
from labctl_orchestrator.exchange import outfile
from labctl_orchestrator.report import ReportScope
from labctl_orchestrator.store import workspace
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.terminal import statuses, tables


@click.command("report")
@comparison_options
@click.option("-o", "--output", default="report.html", show_default=True, metavar="FILE", help="HTML file to write.")
@click.option("--png", "kinds", multiple=True, flag_value="png", help="Also write each chart as a PNG beside the page.")
@click.option(
    "--svg", "kinds", multiple=True, flag_value="svg", help="Also write each chart as an SVG beside the page."
)
@json_option
def command(output: str, kinds: tuple[str, ...], as_json: bool, **asked: Any) -> None:
    """Write the results as one HTML page.

    Default: the latest submission. The page has verdicts, charts, answers side by side, every value, versions, hardware and the
    commands that repeat the measurements. It loads nothing from the network. ORIGIN is the label of imported runs. Exit code 6
    if no run has a result yet.

    \b
    labctl report
    labctl report sweep-3 --by backend -o sweep-3.html --svg
    """
    report.need_vega()
    here = workspace.existing()
    path = outfile.checked_path(Path(output), here, "report.html")
    store = open_store(here)
    statuses.refresh(here, store)
    with tables.working("gathering"):
        findings = report.gather(here, store, ReportScope(**asked))
    with tables.working("drawing"):
        written = [report.write(findings, path), *report.write_pictures(findings, path, list(dict.fromkeys(kinds)))]
    if as_json:
        print_json([{"path": str(one), "bytes": size} for one, size in written])
        return
    for one, size in written:
        click.echo(f"{one}  {size / 1e6:.1f} MB" if size >= 1e5 else f"{one}  {size / 1e3:.0f} kB")
