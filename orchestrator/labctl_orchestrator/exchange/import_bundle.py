"""Import a bundle: check it completely, unpack it into a temporary folder, and rename that folder into place.

The files go to `.labctl/imports/<origin>/<bundle id>/`, in the layout of a workspace. The database indexes them like all other
files; an imported run has the id `<run id>@<origin>`.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from labctl_orchestrator.exchange import bundle
from labctl_orchestrator.exchange.bundle import MANIFEST, MOST_BYTES, MOST_BYTES_OF_A_FILE, MOST_FILES, Manifest
from labctl_orchestrator.request.plan import run_definition
from labctl_orchestrator.store import documents
from labctl_orchestrator.store.collect import collect
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.take_files import IMPORTED_STATE_COLUMNS
from labctl_orchestrator.store.views import HERE
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import LabctlError, WrongUseError
from labctl_workers.record import SCHEMA, Attempt, JobSpec, RunResult, run_id_of, write_json

# One file is in memory at a time. A JSON value takes at most 72 bytes, so 8 million take 0.6 GB.
MOST_VALUES_OF_A_FILE = 8_000_000
MOST_BYTES_OF_THE_MANIFEST = 32 * 2**20
MOST_BYTES_OF_THE_DIRECTORY = 16 * 2**20
# Deflate shrinks a zip bomb up to 1,000 times, records far less. Smaller bundles have no limit.
MOST_SHRINKAGE = 200
SHRINKAGE_COUNTS_FROM = 64 * 2**20

_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
KNOWN_FILES = re.compile(
    rf"submissions/{_NAME}\.json"
    rf"|arrays/{_NAME}/(?:array|states|\d+)\.json|arrays/{_NAME}/attempts/{_NAME}\.json|arrays/{_NAME}/submitit/{_NAME}\.sh"
    rf"|results/[0-9a-f]{{12}}/{_NAME}\.json"
)
JOB_FILE = re.compile(r"arrays/([^/]+)/(\d+)\.json")
# Indexed files: a later bundle must not contradict earlier ones.
INDEXED = re.compile(r"results/.*|arrays/[^/]+/(?:\d+|states)\.json|arrays/[^/]+/attempts/.*")
ORIGIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
STAGING = ("import-", ".partial")


@dataclass(frozen=True)
class Imported:
    """An imported bundle: its records in total, `new` ones, `known` ones from earlier bundles, and this workspace's `own`.
    `again`: this bundle was imported before. `claimed`: the origin is the author that the bundle names, unverified."""

    origin: str
    name: str
    records: int
    new: int
    known: int
    own: int
    again: bool = False
    claimed: bool = False


class _ManifestVersion(msgspec.Struct):
    labctl_bundle: int
    schema: int = 0
    labctl_version: str = "unknown version"


class _AnyObject(msgspec.Struct):
    """Any JSON object."""


@dataclass(frozen=True)
class CheckedBundle:
    """An open, checked bundle: a context manager that closes it."""

    path: Path
    sha256: str
    manifest: Manifest
    names: list[str]
    _archive: zipfile.ZipFile
    _file: io.BufferedReader

    @property
    def bundle_id(self) -> str:
        return self.sha256[:12]

    @property
    def records(self) -> list[str]:
        return [name for name in self.names if name.startswith("results/")]

    def content(self, name: str) -> bytes:
        """The file of this name. Raises WrongUseError if its hash differs from the manifest."""
        data = _read(self.path, self._archive, name)
        digest = hashlib.sha256(data).hexdigest()
        if digest != self.manifest.files[name].sha256:
            raise _refused(self.path, f"{name} was changed: its SHA-256 {digest[:12]}… is not the manifest's")
        return data

    def __enter__(self) -> CheckedBundle:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()
        self._file.close()


# ---------------------------------------------------------------- check


def open_bundle(path: Path) -> CheckedBundle:
    """Open and check a bundle. Raises WrongUseError for a file that `labctl bundle` did not write, and OSError."""
    # O_NONBLOCK: opening a named pipe must not wait for its writer.
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: SIM115, PTH123  `CheckedBundle` closes it
    try:
        return _checked(path, file)
    except BaseException as error:
        file.close()
        # With a damaged offset, zipfile seeks to a negative place.
        before_start = isinstance(error, OSError) and error.errno == errno.EINVAL
        unzips = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError)
        if before_start or isinstance(error, unzips):
            raise _refused(path, f"not a bundle, or damaged: {error}") from None
        raise


def _checked(path: Path, file: io.BufferedReader) -> CheckedBundle:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise _refused(path, "not a plain file", NOT_A_BUNDLE)
    if status.st_size > MOST_BYTES:
        raise _refused(path, f"{status.st_size:,} bytes, more than {MOST_BYTES:,}")
    _check_end(path, file, status.st_size)
    file.seek(0)
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    archive = zipfile.ZipFile(file)
    manifest = _manifest(path, archive, status.st_size)
    found = CheckedBundle(path, sha256, manifest, sorted(set(archive.namelist()) - {MANIFEST}), archive, file)
    for name in sorted(set(found.names) ^ set(manifest.files)):
        raise _refused(path, f"{name} is {'not in its manifest' if name in found.names else 'missing'}")
    _check_documents(found)
    return found


NOT_A_BUNDLE = "give a file that labctl bundle wrote"


def _refused(
    path: Path, why: str, remedy: str = "ask its author for the bundle again; labctl imported no part of it"
) -> WrongUseError:
    return WrongUseError(f"{path.name} is refused: {why}", remedy)


def _check_end(path: Path, file: io.BufferedReader, size: int) -> None:
    """Check the size of the archive's directory, which zipfile would read into memory completely."""
    file.seek(max(0, size - 42))
    tail = file.read()
    end = tail[-22:]
    if len(end) < 22 or not end.startswith(b"PK\5\6") or end[20:] != b"\0\0":
        raise _refused(path, "not a bundle, or damaged: the end of a zip archive is missing")
    (directory,) = struct.unpack("<L", end[12:16])
    if directory > MOST_BYTES_OF_THE_DIRECTORY or tail.startswith(b"PK\6\7"):  # the second: ZIP64
        raise _refused(path, f"more than {MOST_FILES:,} files")


def _manifest(path: Path, archive: zipfile.ZipFile, packed: int) -> Manifest:
    """The manifest, after a check that names and sizes are safe to read."""
    _check_entries(path, archive, packed)
    if archive.getinfo(MANIFEST).file_size > MOST_BYTES_OF_THE_MANIFEST:
        raise _refused(path, f"{MANIFEST} has more than {MOST_BYTES_OF_THE_MANIFEST:,} bytes")
    data = _read(path, archive, MANIFEST)
    try:
        version = _document(path, MANIFEST, data, _ManifestVersion)
        if version.labctl_bundle > bundle.FORMAT or version.schema > SCHEMA:
            newer = f"made by a newer labctl ({version.labctl_version})"
            raise _refused(path, newer, "update labctl: pip install -U labctl-slurm")
        return _document(path, MANIFEST, data, Manifest)
    except ValueError as error:
        raise _refused(path, f"{MANIFEST} is invalid: {error}", NOT_A_BUNDLE) from None


def _check_entries(path: Path, archive: zipfile.ZipFile, packed: int) -> None:
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    for name in names:
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or "\0" in name:
            raise _refused(path, f"a path leads out of it: {name!r}")
    if MANIFEST not in names:
        raise _refused(path, f"it has no {MANIFEST}", NOT_A_BUNDLE)
    if len(names) > MOST_FILES:
        raise _refused(path, f"{len(names):,} files, more than {MOST_FILES:,}")
    if len(set(names)) != len(names):
        raise _refused(path, "a file name occurs twice")
    for entry in entries:
        if entry.filename != MANIFEST and not KNOWN_FILES.fullmatch(entry.filename):
            raise _refused(path, f"unknown file in it: {entry.filename!r}")
        if (entry.external_attr >> 16) & 0o170000 not in (0, 0o100000):
            raise _refused(path, f"{entry.filename} is not a plain file")
        # zipfile unpacks other methods completely, whatever size they declare.
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _refused(path, f"unsupported compression of {entry.filename}")
    total = sum(entry.file_size for entry in entries)
    if total > MOST_BYTES or (total > SHRINKAGE_COUNTS_FROM and total > MOST_SHRINKAGE * packed):
        raise _refused(path, f"its {packed:,} bytes would unpack to {total:,}")


def _read(path: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    """A file of the archive, at most MOST_BYTES_OF_A_FILE."""
    size = archive.getinfo(name).file_size
    if size > MOST_BYTES_OF_A_FILE:
        raise _refused(path, f"{name} has {size:,} bytes, more than {MOST_BYTES_OF_A_FILE:,}")
    try:
        with archive.open(name) as file:
            data = file.read(size)  # unpacks at most this size
            if file.read(1):
                raise zipfile.BadZipFile("longer than declared")
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _refused(path, f"{name} was changed or damaged: {error}") from None
    if len(data) != size:
        raise _refused(path, f"{name} was changed or damaged: shorter than declared")
    return data


T = TypeVar("T")


def _document(path: Path, name: str, data: bytes, kind: type[T]) -> T:
    """The JSON document. Raises WrongUseError for too many values, ValueError for an invalid document."""
    values = sum(map(data.count, (b",", b"[", b"{")))
    if values > MOST_VALUES_OF_A_FILE:
        raise _refused(path, f"{name} has {values:,} values, more than {MOST_VALUES_OF_A_FILE:,}")
    return documents.read(data, kind)


@dataclass
class _Jobs:
    """The run ids of each job of a bundle; and all references to jobs: (job id, run id or None, file)."""

    runs: dict[str, set[str]] = field(default_factory=dict)
    named: list[tuple[str, str | None, str]] = field(default_factory=list)


def _check_documents(found: CheckedBundle) -> None:
    """Check that each file belongs under its name, and that the shown configuration of each run is the hashed one."""
    jobs = _Jobs()
    for name in found.names:
        data = found.content(name)
        if name.endswith(".sh"):
            continue
        try:
            _check_document(found.path, name, data, jobs)
        except (ValueError, TypeError, LookupError) as error:
            raise _refused(found.path, f"{name} is invalid: {error}") from None
    for job, run, name in jobs.named:
        if job not in jobs.runs:
            raise _refused(found.path, f"{name} belongs to job {job}, which is missing")
        if run is not None and run not in jobs.runs[job]:
            raise _refused(found.path, f"{name} is the record of another run: its job {job} has no run {run}")


def _check_document(path: Path, name: str, data: bytes, jobs: _Jobs) -> None:
    folder, _, file = name.rpartition("/")
    if name.startswith("results/"):
        record = _document(path, name, data, RunResult)
        place = f"results/{record.run_id}/{record.attempt.attempt_id}.json"
        if place != name or run_id_of(record.definition) != record.run_id:
            raise _refused(path, f"{name} is the record of another run: its id is not the hash of its definition")
        if (record.failure is None) != (record.status == documents.DONE):
            raise ValueError(f"status {record.status} {'without' if record.failure is None else 'with'} a failure")
        jobs.named.append((record.attempt.job_id, record.run_id, name))
    elif match := JOB_FILE.fullmatch(name):
        job = _document(path, name, data, JobSpec)
        if job.job_id != f"{match[1]}.{match[2]}":
            raise ValueError(f"job id {job.job_id}")
        _check_runs(path, name, job)
        jobs.runs[job.job_id] = {run.run_id for run in job.runs}
    elif "/attempts/" in name:
        attempt = _document(path, name, data, Attempt)
        if file != f"{attempt.attempt_id}.json":
            raise ValueError(f"attempt id {attempt.attempt_id}")
        jobs.named.append((attempt.job_id, None, name))
    elif file == "states.json":
        for job_id in _document(path, name, data, dict[str, documents.State]):
            if job_id.rpartition(".")[0] != folder.partition("/")[2]:
                raise ValueError(f"job id {job_id}")
            jobs.named.append((job_id, None, name))
    else:
        _document(path, name, data, _AnyObject)


def _check_runs(path: Path, name: str, job: JobSpec) -> None:
    for run in job.runs:
        if run_id_of(run.definition) != run.run_id:
            raise _refused(path, f"{name} has a run id that is not the hash of its definition: {run.run_id}")
        if differ := _difference(run.definition, run_definition(job, run)):
            raise _refused(path, f"{name} shows another configuration than the hashed one: {differ}")


# ---------------------------------------------------------------- origin


def origin_of(found: CheckedBundle, given: str | None) -> str:
    """The label of the bundle's runs: the one that is given, else its author, else its file name. Raises WrongUseError for an
    invalid label."""
    label = given
    if label is None:
        label = found.manifest.author or found.path.name.removesuffix(".zip").removesuffix(".labctl")
        label = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-._")[:40]
    if not ORIGIN.fullmatch(label) or label.lower() == HERE:
        raise WrongUseError(
            f"invalid label of a bundle: {label!r}",
            f"give --origin up to 40 letters, digits and . _ -, except {HERE!r}; for example --origin ada",
        )
    return label


# ---------------------------------------------------------------- import


def import_files(workspace: Workspace, found: CheckedBundle, origin: str, *, given: bool = False) -> Imported:
    """Import the bundle's files, all or none, except records that exist here already. No existing file changes. Raises
    WrongUseError if the bundle contradicts an earlier one of this origin, was imported before under another label than the
    `given` one, or has names that this file system cannot store; OSError."""
    records, name = found.records, found.manifest.name
    claimed = not given and bool(found.manifest.author)
    with workspace.lock():
        before = next(iter(sorted(workspace.imports.glob(f"*/{found.bundle_id}/bundle.json"))), None)
        if before is not None:
            imported_as = before.parent.parent.name
            if given and imported_as != origin:
                raise _other_label(found, before.parent.parent)
            return Imported(imported_as, name, len(records), 0, len(records), 0, again=True, claimed=claimed)
        longest = os.pathconf(workspace.data, "PC_NAME_MAX")
        for path in found.names:
            if max(map(len, path.split("/"))) > longest:
                raise _refused(found.path, f"a file name is longer than the file system's {longest} bytes: {path}")
        own = {record for record in records if (workspace.data / record).exists()}
        folder = workspace.imports / origin
        try:
            known = _known(found, folder)
        except msgspec.DecodeError as error:
            remedy = f"run rm -r {folder}, then import its bundles again"
            raise LabctlError(f"earlier import is damaged: {folder}: {error}", remedy) from None
        new = len(set(records) - own - known)
        if new:
            _put(workspace, found, folder, own | known)
    return Imported(origin, name, len(records), new, len(known & (set(records) - own)), len(own), claimed=claimed)


def _other_label(found: CheckedBundle, folder: Path) -> WrongUseError:
    remedy = f"use its label: labctl compare {folder.name}"
    if len(list(folder.iterdir())) == 1:  # rm would delete other bundles too
        remedy += f"; or, for another label, run rm -r {folder} and import it again"
    return WrongUseError(f"{found.path.name} was imported already, as {folder.name}", remedy)


def _known(found: CheckedBundle, folder: Path) -> set[str]:
    """Files that an earlier bundle of this origin brought. Raises WrongUseError if one differs."""
    there: dict[str, list[Path]] = {}
    for path in filter(Path.is_file, folder.glob("*/*/**/*.json")):
        there.setdefault(str(path.relative_to(folder)).partition("/")[2], []).append(path)
    shown = dict(itertools.chain.from_iterable(_shown(paths[0].read_bytes()) for name, paths in there.items()
                                               if JOB_FILE.fullmatch(name)))  # fmt: skip
    known = set()
    for name in filter(INDEXED.fullmatch, found.names):
        data = found.content(name)
        for path in there.get(name, ()):
            earlier = path.read_bytes()
            if name.endswith("/states.json"):
                ours, theirs = _times(earlier), _times(data)
                both = ours.keys() & theirs
                differ = _difference({job: ours[job] for job in both}, {job: theirs[job] for job in both})
            else:
                differ = ""
                if earlier != data:
                    differ = _difference(msgspec.json.decode(earlier), msgspec.json.decode(data)) or "its bytes"
                known.add(name)
            if differ:
                raise _disagrees(found, folder, name, differ)
        if JOB_FILE.fullmatch(name):
            for run, seen in _shown(data):
                if differ := _difference(shown.get(run, seen), seen):
                    raise _disagrees(found, folder, f"run {run}", differ)
    return known


def _disagrees(found: CheckedBundle, folder: Path, what: str, differ: str) -> WrongUseError:
    return _refused(
        found.path,
        f"{what} differs from {folder.name}'s earlier bundle: {differ}",
        "if another person made it, give another label with --origin",
    )


def _shown(job: bytes) -> Iterator[tuple[str, dict[str, object]]]:
    """What labctl shows of each run of a job, but does not hash."""
    spec = msgspec.json.decode(job, type=JobSpec)
    for run in spec.runs:
        yield run.run_id, {"model": spec.model.name, "defaults": spec.defaults}


def _times(states: bytes) -> dict[str, dict[str, object]]:
    found = msgspec.json.decode(states)
    return {job: {key: state.get(key) for key in IMPORTED_STATE_COLUMNS} for job, state in found.items()}


def _difference(earlier: Any, now: Any, where: str = "") -> str:
    """The first difference of two JSON values, with both values; "" if they are equal."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        keys = sorted(earlier.keys() | now.keys())
        return next(filter(None, (_difference(earlier.get(key), now.get(key), f"{where}.{key}") for key in keys)), "")
    if isinstance(earlier, list) and isinstance(now, list) and len(earlier) == len(now):
        places = enumerate(zip(earlier, now, strict=True))
        return next(filter(None, (_difference(*pair, f"{where}[{place}]") for place, pair in places)), "")
    if earlier == now:
        return ""
    one, other = (json.dumps(value, ensure_ascii=False)[:60] for value in (earlier, now))
    return f"{where.lstrip('.') or 'the value'} was {one}, is {other}"


def _put(workspace: Workspace, found: CheckedBundle, folder: Path, left_out: set[str]) -> None:
    """Unpack the bundle into a temporary folder, index it there as a test, and rename it into place."""
    staging = Path(tempfile.mkdtemp(prefix=STAGING[0], suffix=STAGING[1], dir=workspace.data))
    try:
        trial = Workspace(staging)
        written = trial.imports / folder.name / found.bundle_id
        for name in found.names:
            target = written / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                file.write(found.content(name))
                file.flush()
                os.fsync(file.fileno())
        with closing(Store(trial.root / "trial.db")) as store:  # can a database index the bundle?
            damaged = collect(trial, store).damaged
        if damaged:
            what = damaged[0].removeprefix(f"{trial.imports}/").split("/", 2)[-1]
            raise _refused(found.path, f"this labctl cannot read {what}")
        for name in left_out:
            (written / name).unlink()
        about = {"name": found.manifest.name, "author": found.manifest.author, "records": len(found.records)}
        about |= {"labctl_version": found.manifest.labctl_version, "bundle_id": found.bundle_id, "sha256": found.sha256}
        write_json(written / "bundle.json", about)
        workspace.make_folder(folder)
        written.rename(folder / found.bundle_id)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
