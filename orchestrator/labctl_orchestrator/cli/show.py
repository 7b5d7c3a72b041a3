"""labctl show"""

from __future__ import annotations

import json
from typing import Any

import click

from labctl_orchestrator import screen, status, workspace
from labctl_orchestrator.cli import options
from labctl_orchestrator.collect import open_store
from labctl_orchestrator.screen import figure
from labctl_orchestrator.store import Store
from labctl_orchestrator.workspace import Workspace
from labctl_workers.measure import METRICS
from labctl_workers.record import read_json


@click.command("show")
@click.argument("run")
@options.json_option
def command(run: str, as_json: bool) -> None:
    """Show one run: what was asked, what came back.

    With --json, the records of all its attempts, raw values included.

    \b
    labctl show 3f9a12
    """
    here = workspace.existing()
    store = open_store(here)
    screen.refresh(here, store)
    run_id = status.one_run(store, run)
    (found,) = status.statuses(here, store, [run_id])
    results = store.rows("SELECT * FROM results WHERE run_id = ? ORDER BY ended_at", (run_id,))
    if as_json:
        records = [read_json(here.data / result["path"]) for result in results]
        options.print_json({"status": found.to_json(), "records": records})
        return
    _print_asked(store, found)
    for result in results:
        _print_result(here, store, result)


def _print_asked(store: Store, found: status.RunStatus) -> None:
    (run,) = store.rows("SELECT * FROM runs WHERE run_id = ?", (found.run_id,))
    click.echo(f"run {found.run_id}: {found.state} {found.detail}".rstrip())
    if found.remedy:
        click.echo(f"  -> {found.remedy}")
    columns = ("partition", "backend", "model", "revision", "dtype", "gpus", "max_new_tokens", "batch_size", "sampling")
    for column in columns:
        if run[column] is not None:
            click.echo(f"  {column:<15} {run[column]}")
    for prompt in json.loads(run["prompts"]):
        click.echo(f"  {'prompt':<15} {prompt}")
    if found.slurm_id:
        click.echo(f"  {'job':<15} {found.slurm_id} on {found.node or 'no node yet'}")


def _print_result(here: Workspace, store: Store, result: dict[str, Any]) -> None:
    click.echo(f"\nattempt {result['attempt_id']}: {result['status']} on {result['node']}, ended {result['ended_at']}")
    click.echo(f"  record: {here.data / result['path']}")
    if result["status"] != "done":
        click.echo(f"  {result['failure_kind']}: {result['failure']}\n  -> {result['remedy']}")
        return
    for column in ("load_s", "init_s", "warmup_s"):
        click.echo(f"  {column:<15} {figure(result[column], 's')}")
    key = (result["run_id"], result["attempt_id"])
    for repeat in store.rows("SELECT * FROM repeats WHERE run_id = ? AND attempt_id = ? ORDER BY repeat", key):
        known = {name: repeat[name] for name in METRICS if repeat[name] is not None}
        shown = ", ".join(f"{METRICS[name].title} {figure(value, METRICS[name].unit)}" for name, value in known.items())
        click.echo(f"  repeat {repeat['repeat']}: {shown}")
    _print_devices(store, key)
    texts = store.rows(
        "SELECT DISTINCT text, finish_reason FROM samples JOIN texts USING (text_id)"
        " WHERE run_id = ? AND attempt_id = ? ORDER BY repeat, request",
        key,
    )
    for text in texts:
        click.echo(f"  text ({text['finish_reason']}):\n{text['text']}")
    _print_fingerprint(json.loads(result["fingerprint"]))


def _print_devices(store: Store, key: tuple[str, str]) -> None:
    rows = store.rows(
        "SELECT device, name, max(weights_bytes) AS weights, max(peak_allocated_bytes) AS peak FROM devices"
        " WHERE run_id = ? AND attempt_id = ? GROUP BY device, name ORDER BY device",
        key,
    )
    for row in rows:
        shown = f"weights {figure(row['weights'], 'B')}, peak allocated {figure(row['peak'], 'B')}"
        click.echo(f"  {row['device']:<15} {shown} {row['name']}".rstrip())


def _print_fingerprint(fingerprint: dict[str, Any]) -> None:
    packages = ", ".join(f"{name} {version}" for name, version in fingerprint.get("packages", {}).items())
    click.echo(f"  {'versions':<15} {packages}")
    for key in ("effective_dtype", "attention", "driver", "cuda", "devices_in_use"):
        if fingerprint.get(key):
            click.echo(f"  {key:<15} {fingerprint[key]}")
