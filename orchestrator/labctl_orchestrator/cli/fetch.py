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
from labctl_orchestrator.store import workspace
from labctl_orchestrator.terminal import tables
from labctl_slurm.errors import WrongUseError


@click.command("fetch")
@click.argument("model")
@click.option("--revision", default="main", show_default=True, help="Branch, tag or commit.")
@click.option("-p", "--partition", help="Download into the Hub cache that jobs of this partition use.")
@click.option("--verify", is_flag=True, help="Verify all checksums again.")
@json_option
def command(model: str, revision: str, partition: str | None, verify: bool, as_json: bool) -> None:
    """Download a Hub model on the login node.

    Use it if nodes have no network access, or to download while no GPU waits. Downloads missing files into the Hub cache
    (HF_HOME) and verifies their checksums. Jobs then load exactly this commit if offline = true is set for their partition
    (labctl.toml). For a gated model, accept its terms on the Hub and set HF_TOKEN.

    \b
    labctl fetch TinyLlama/TinyLlama-1.1B-Chat-v1.0
    labctl fetch meta-llama/Llama-3.1-8B-Instruct -p dgxh
    """
    from labctl_orchestrator.models import fetch

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
    outcome = "downloaded and verified" if fetched.downloaded_bytes else "already cached"
    size = fetch.size_text(fetched.total_bytes)
    click.echo(f"{fetched.model} at {fetched.commit}: {fetched.files} files, {size}, {outcome}")
    click.echo(str(fetched.path))
