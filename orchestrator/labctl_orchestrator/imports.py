"""Somebody else's bundle -> files in this workspace, checked before the first of them is written.

They lie below `.labctl/imports/<origin>/` as they lay in the workspace that they were made in, and the index is made from them
as from all other files: a run of an origin is `<run id>@<origin>`.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from labctl_orchestrator import bundle
from labctl_orchestrator.bundle import MANIFEST
from labctl_orchestrator.tables import HERE
from labctl_orchestrator.workspace import Workspace
from labctl_slurm.errors import WrongUseError
from labctl_workers.record import SCHEMA, Attempt, JobSpec, RunResult, run_id_of, write_bytes, write_json

# All of it is held in memory while it is checked; a larger sweep goes in several bundles.
MOST_FILES = 200_000
MOST_BYTES = 2 * 2**30
MOST_BYTES_OF_THE_MANIFEST = 64 * 2**20
# What is made to fill a disk shrinks by up to 1,000, records by far less. Small files may shrink as they like.
MOST_SHRINKAGE = 200
SHRINKAGE_COUNTS_FROM = 64 * 2**20

_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
KNOWN_FILES = re.compile(
    rf"requests/{_NAME}\.json"
    rf"|batches/{_NAME}/(?:batch|states|\d+)\.json|batches/{_NAME}/attempts/{_NAME}\.json|batches/{_NAME}/submitit/{_NAME}\.sh"
    rf"|results/[0-9a-f]{{12}}/{_NAME}\.json"
)
ORIGIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(frozen=True)
class Imported:
    """What became of one bundle: how many records are new here, were here from an earlier bundle, and are this
    workspace's own."""

    origin: str
    name: str
    records: int
    new: int
    known: int
    own: int
    again: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Opened:
    """A bundle that was checked."""

    path: Path
    sha256: str
    manifest: dict[str, Any]
    files: dict[str, bytes]

    @property
    def bundle_id(self) -> str:
        return self.sha256[:12]


# ---------------------------------------------------------------- check


def opened(path: Path) -> Opened:
    """The bundle with its contents. Raises WrongUseError, with what is wrong, for a file that is not one as `labctl bundle`
    wrote it; OSError where it cannot be read."""
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            manifest = _manifest(path, archive)
            files = dict(_contents(path, archive, manifest))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise _refused(path, f"it is no bundle, or was damaged on its way: {error}") from None
    if not bundle.is_sealed(content):
        raise _refused(path, "bytes of the archive itself were changed after it was made")
    for name, data in files.items():
        _check_document(path, name, data)
    return Opened(path, hashlib.sha256(content).hexdigest(), manifest, files)


def _refused(
    path: Path, why: str, remedy: str = "ask for the bundle again: nothing of it was taken in"
) -> WrongUseError:
    return WrongUseError(f"{path.name} is refused: {why}", remedy)


def _manifest(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    """The manifest, once names and sizes are such that reading is harmless."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    for name in names:
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or "\0" in name:
            raise _refused(path, f"it holds a path that leads out of it: {name!r}")
    if MANIFEST not in names:
        raise _refused(path, f"it has no {MANIFEST}", "give a file that labctl bundle wrote")
    if len(names) > MOST_FILES:
        raise _refused(path, f"it holds {len(names)} files, more than {MOST_FILES}")
    if len(set(names)) != len(names):
        raise _refused(path, "it holds a file twice")
    for entry in entries:
        if entry.filename != MANIFEST and not KNOWN_FILES.fullmatch(entry.filename):
            raise _refused(path, f"{entry.filename!r} is no file of a bundle")
        if (entry.external_attr >> 16) & 0o170000 not in (0, 0o100000):
            raise _refused(path, f"{entry.filename} is no plain file")
    _check_sizes(path, archive)
    document = _json_of(path, MANIFEST, archive.read(MANIFEST))
    if not isinstance(document.get("labctl_bundle"), int) or not isinstance(document.get("files"), dict):
        raise _refused(path, f"its {MANIFEST} is none of labctl's", "give a file that labctl bundle wrote")
    newer = document["labctl_bundle"] > bundle.FORMAT or document.get("schema", 0) > SCHEMA
    if newer:
        version = document.get("labctl_version", "a newer one")
        raise _refused(path, f"it was made by a newer labctl ({version})", "update labctl: pip install -U labctl-slurm")
    return document


def _check_sizes(path: Path, archive: zipfile.ZipFile) -> None:
    """By what the archive says of itself: more than that zipfile does not unpack."""
    entries = archive.infolist()
    total = sum(entry.file_size for entry in entries)
    packed = path.stat().st_size
    if total > MOST_BYTES or (total > SHRINKAGE_COUNTS_FROM and total > MOST_SHRINKAGE * packed):
        raise _refused(path, f"its {packed:,} bytes would unpack to {total:,}, which no sweep does")
    if archive.getinfo(MANIFEST).file_size > MOST_BYTES_OF_THE_MANIFEST:
        raise _refused(path, f"its {MANIFEST} is larger than any sweep's")


def _contents(path: Path, archive: zipfile.ZipFile, manifest: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    listed = manifest["files"]
    there = set(archive.namelist()) - {MANIFEST}
    for name in sorted(there ^ set(listed)):
        raise _refused(
            path, f"{name} is {'not in its manifest' if name in there else 'in its manifest, and is missing'}"
        )
    for name in sorted(there):
        try:
            data = archive.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise _refused(path, f"{name} was changed or damaged: {error}") from None
        digest = hashlib.sha256(data).hexdigest()
        if not isinstance(listed[name], dict) or digest != listed[name].get("sha256"):
            raise _refused(path, f"{name} was changed: its SHA-256 is {digest[:12]}…, not what the manifest says")
        yield name, data


def _check_document(path: Path, name: str, data: bytes) -> None:
    """That it is what its name says: a record of the run that its hash is of, a job whose runs are theirs."""
    if name.endswith(".sh"):
        return
    document = _json_of(path, name, data)
    try:
        if name.startswith("results/"):
            record = RunResult.from_json(document)
            _, run_id, attempt = name.split("/")
            known = (record.run_id, f"{record.attempt.attempt_id}.json") == (run_id, attempt)
            if not known or run_id_of(record.asked) != run_id:
                raise _refused(path, f"{name} is the record of another run: its id is not the hash of what was asked")
            if record.schema > SCHEMA:
                raise _refused(path, f"{name} was written by a newer labctl", "update labctl")
        elif re.fullmatch(r"batches/[^/]+/\d+\.json", name):
            for run in JobSpec.from_json(document).runs:
                if run_id_of(run.asked) != run.run_id:
                    raise _refused(path, f"{name} has a run whose id is not the hash of what was asked: {run.run_id}")
        elif "/attempts/" in name:
            Attempt.from_json(document)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise _refused(path, f"{name} is not as labctl writes it: {type(error).__name__}: {error}") from None


def _json_of(path: Path, name: str, data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"{name} is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise _refused(path, f"{name} is no JSON object")
    return document


# ---------------------------------------------------------------- whose


def origin_of(found: Opened, given: str | None) -> str:
    """Whose it is: the label that is given, else its author's, else the file's name. Raises WrongUseError for a label that
    can be none."""
    if given is not None:
        label = given
    else:
        label = found.manifest.get("author") or found.path.name.removesuffix(".zip").removesuffix(".labctl")
        label = re.sub(r"[^A-Za-z0-9._-]+", "-", str(label)).strip("-._")[:40]
    if not ORIGIN.fullmatch(label) or label.lower() == HERE:
        raise WrongUseError(
            f"{label!r} cannot be the label of a bundle: letters, digits and . _ - make one, and {HERE!r} is this workspace",
            "give --origin another, such as --origin ada",
        )
    return label


# ---------------------------------------------------------------- take in


def take_in(workspace: Workspace, found: Opened, origin: str, *, given: bool = False) -> Imported:
    """Write the bundle's files, but for records that are here already. Once however often: a bundle that was imported is left
    alone, and so is what is this workspace's own. Raises WrongUseError where a record differs from the one imported before, or
    the bundle was imported under another label than a person has `given` now."""
    records = [name for name in found.files if name.startswith("results/")]
    name = str(found.manifest.get("name", ""))
    with workspace.turn():
        before = next(iter(sorted(workspace.imports.glob(f"*/bundles/{found.bundle_id}.json"))), None)
        if before is not None and given and before.parent.parent.name != origin:
            raise _labelled_otherwise(found, before)
        if before is not None:
            return Imported(before.parent.parent.name, name, len(records), 0, len(records), 0, again=True)
        own = {record for record in records if (workspace.data / record).exists()}
        folder = workspace.imports / origin
        known = {record for record in records if _is_there(found, folder, record)}
        new = len(set(records) - own - known)
        if new:
            _write(folder, found, own | known)
        if new or known:
            about = {key: found.manifest.get(key) for key in ("name", "author", "labctl_version", "records")}
            about |= {"bundle_id": found.bundle_id, "sha256": found.sha256}
            write_json(folder / "bundles" / f"{found.bundle_id}.json", about)
    return Imported(origin, name, len(records), new, len(known - own), len(own))


def _labelled_otherwise(found: Opened, before: Path) -> WrongUseError:
    folder = before.parent.parent
    remedy = f"labctl compare {folder.name} names its runs"
    if len(list(before.parent.iterdir())) == 1:  # else others would go with it
        remedy += f"; for another label: rm -r {folder}, and import it again"
    return WrongUseError(f"{found.path.name} was imported already, as {folder.name}", remedy)


def _is_there(found: Opened, folder: Path, record: str) -> bool:
    try:
        there = (folder / record).read_bytes()
    except FileNotFoundError:
        return False
    if there != found.files[record]:
        raise _refused(
            found.path,
            f"{record} differs from the one that {folder.name}'s earlier bundle had",
            "give --origin another label, if it is another person's",
        )
    return True


def _write(folder: Path, found: Opened, left_out: set[str]) -> None:
    """Each file whole or not at all; an import that was cut off is finished by the next."""
    for name, data in found.files.items():
        if name not in left_out:
            write_bytes(folder / name, data)
