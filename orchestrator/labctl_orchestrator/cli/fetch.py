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
@click.option("--revision", default="main", show_default=True, help="A branch, tag or commit.")
@click.option(
    "-p", "--partition", help="Fetch into the cache that jobs of this partition use (its env may set HF_HOME)."
)
@click.option("--verify", is_flag=True, help="Read again what was verified before, too.")
@json_option
def command(model: str, revision: str, partition: str | None, verify: bool, as_json: bool) -> None:
    """Download a hub model on the login node, for nodes that have no way out.

    Into the hub's cache (HF_HOME), with progress; what is there is not downloaded again, and two at once download once.
    Checks every file against the hub's checksum, and keeps the commit: jobs of a partition with offline = true load exactly
    that, with HF_HUB_OFFLINE=1. A gated model needs its terms accepted and HF_TOKEN exported.

    \b
    labctl fetch TinyLlama/TinyLlama-1.1B-Chat-v1.0
    labctl fetch meta-llama/Llama-3.1-8B-Instruct -p dgxh
    """
    from labctl_orchestrator.models import fetch

    if resolve.is_folder(model):
        raise WrongUseError(f"{model} is a folder: there is nothing to fetch", f"submit it: --model-id {model}")
    known = settings.load(workspace.find())
    into = hub_cache.folder(known.partition(partition) if partition else None)
    if not sys.stderr.isatty():  # in a pipe or a log, a bar that is drawn again and again is noise
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

    def note(text: str) -> None:
        tables.note(visible(text))

    try:
        with contextlib.redirect_stderr(raw(sys.stderr)):  # bars move the cursor
            fetched = fetch.fetch(model, revision, into, note, verify=verify)
    except KeyboardInterrupt:
        note("what has come whole is kept, and labctl fetch again goes on with the rest")
        raise
    if as_json:
        counts = {key: getattr(fetched, key) for key in ("files", "total_bytes", "downloaded_bytes")}
        print_json({"model": fetched.model, "revision": fetched.commit, "path": str(fetched.path), **counts})
        return
    came = "downloaded and verified" if fetched.downloaded_bytes else "there already"
    size = fetch.size_text(fetched.total_bytes)
    click.echo(f"{fetched.model} at {fetched.commit}: {fetched.files} files, {size}, {came}")
    click.echo(str(fetched.path))
