"""--json: output for programs."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from labctl_orchestrator.exchange.streams import for_programs

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")


def print_json(value: Any) -> None:
    """Print a value of plain types."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False), file=for_programs(sys.stdout))
