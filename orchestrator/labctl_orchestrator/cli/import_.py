"""labctl import"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from labctl_orchestrator.cli import fail
from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.exchange import import_bundle
from labctl_orchestrator.exchange.import_bundle import Imported
from labctl_orchestrator.request.paths import expand_home
from labctl_orchestrator.store import workspace
from labctl_orchestrator.store.collect import collect
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.terminal import tables
from labctl_slurm.errors import LabctlError, WrongUseError


@click.command("import")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...")
@click.option("--origin", help="Label of the imported records.  [default: the bundle's author, else the file's name]")
@click.option("--check", is_flag=True, help="Check the bundles; import nothing.")
@json_option
def command(bundles: tuple[str, ...], origin: str | None, check: bool, as_json: bool) -> int:
    """Import the records of other people's bundles.

    BUNDLE is a file from labctl bundle. Checks hashes, paths, sizes and ids first, and rejects a changed bundle. The id of an
    imported run is RUN@ORIGIN. labctl submit does not reuse imported results. Importing a bundle twice changes nothing.

    \b
    labctl import ada.labctl.zip
    labctl import class/*.labctl.zip && labctl compare --all --by origin --metric throughput
    """
    if origin is not None and len(bundles) > 1:
        raise WrongUseError("--origin labels one bundle", "import the bundles one by one, or omit --origin")
    here = workspace.find() or Workspace(Path.cwd())
    taken: list[Imported] = []
    code = 0
    for name in bundles:
        try:
            taken.append(_take(here, expand_home(name), origin, check))
        except LabctlError as error:
            code = max(code, fail(error.message, error.remedy, error.exit_code))
        except OSError as error:
            code = max(code, fail(f"{name}: {error.strerror or error}", "give a file from labctl bundle", 2))
    if taken and not check:
        collect(here, open_store(here))
    if as_json:
        print_json([asdict(one) for one in taken])
    else:
        for one in taken:
            tables.text(_summary(one, check))
            if one.claimed:
                tables.note(f"the bundle claims author {one.origin} (unverified); --origin sets another label")
    return code


def _take(here: Workspace, path: Path, origin: str | None, check: bool) -> Imported:
    with import_bundle.open_bundle(path) as found:
        label = import_bundle.origin_of(found, origin)
        claimed = origin is None and bool(found.manifest.author)
        if check:
            return Imported(label, found.manifest.name, len(found.records), 0, 0, 0, claimed=claimed)
        tables.note_new(here)
        try:
            return import_bundle.import_files(here, found, label, given=origin is not None)
        except OSError as error:
            raise LabctlError(
                f"{path.name} was not imported: {error.strerror or error}: {error.filename or here.data}",
                "no record was imported: free space or correct the folder, then import it again",
            ) from None


def _summary(one: Imported, check: bool) -> str:
    if check:
        return f"{one.origin}: {one.name}, {one.records} records, valid"
    if one.again:
        return f"{one.origin}: bundle already imported"
    parts = [f"{one.new} records imported"]
    parts += [f"{one.known} already imported from another bundle"] if one.known else []
    parts += [f"{one.own} skipped: this workspace's own"] if one.own else []
    return f"{one.origin}: {', '.join(parts)}"
