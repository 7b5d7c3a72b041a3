"""labctl fetch"""

from __future__ import annotations

import contextlib
import os
import sys

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.exchange.streams import raw, visible
from labctl_orchestrator.models import hub_cache, resolve
from labctl_orchestrator.request import settings
from labctl_orchestrator.request.tasks import parse
from labctl_orchestrator.store import workspace
from labctl_orchestrator.terminal import tables
from labctl_slurm.errors import WrongUseError


@click.command("fetch")
@click.argument("model", required=False)
@click.option("--revision", default="main", show_default=True, help="Branch, tag or commit.")
@click.option("-p", "--partition", help="Download into the Hub cache that jobs of this partition use.")
@click.option(
    "--quality", multiple=True, metavar="TASK...", help="Download the data sets of a task (lm-evaluation-harness)."
)
@click.option("--verify", is_flag=True, help="Verify all checksums again.")
@json_option
def command(
    model: str | None, revision: str, partition: str | None, quality: tuple[str, ...], verify: bool, as_json: bool
) -> None:
    """Download a model from the Hub (Hugging Face).

    Run it on the login node, before the jobs: nodes may have no network access, and GPUs would be idle during the download.
    Downloads missing files into the Hub cache (HF_HOME) and verifies their checksums. If a partition has offline = true
    (labctl.toml), its jobs load exactly the commit that was downloaded. For a gated model, accept its terms on the Hub and set
    HF_TOKEN.

    \b
    labctl fetch TinyLlama/TinyLlama-1.1B-Chat-v1.0
    labctl fetch meta-llama/Llama-3.1-8B-Instruct -p dgxh
    labctl fetch --quality gsm8k -p dgxh
    """
    from labctl_orchestrator.models import fetch

    if model is None and not quality:
        raise WrongUseError("nothing to fetch", "give a model, or --quality TASK")
    if quality:
        _fetch_tasks(quality, partition)
    if model is None:
        return
    if resolve.is_folder(model):
        raise WrongUseError(f"not a Hub model but a folder: {model}", f"submit it with --model-id {model}")
    known = settings.load(workspace.find())
    into = hub_cache.folder(known.partition(partition) if partition else None)
    if not sys.stderr.isatty():  # a redrawn bar fills a log with copies
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

    def note(text: str) -> None:
        tables.note(visible(text))

    try:
        with contextlib.redirect_stderr(raw(sys.stderr)):  # bars move the cursor
            fetched = fetch.fetch(model, revision, into, note, verify=verify)
    except KeyboardInterrupt:
        note("complete files are kept; repeat the command to download the rest")
        raise
    if as_json:
        counts = {key: getattr(fetched, key) for key in ("files", "total_bytes", "downloaded_bytes")}
        print_json({"model": fetched.model, "revision": fetched.commit, "path": str(fetched.path), **counts})
        return
    click.echo(f"{'downloaded and verified' if fetched.downloaded_bytes else 'already in the cache'}: {fetched.model}")
    click.echo(str(fetched.path))


def _fetch_tasks(tasks: tuple[str, ...], partition: str | None) -> None:
    from labctl_orchestrator.preflight import hub_checks

    if partition is None:
        raise WrongUseError("--quality needs a partition: its Python has the harness", "add -p, such as -p dgxh")
    for task in map(parse, tasks):
        hub_checks.fetch_task(settings.load(workspace.find()).partition(partition), task)
        tables.note(f"fetched: the data sets of task {task.name}")
