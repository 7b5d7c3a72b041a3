"""Somebody else's bundle -> files in this workspace: checked whole, written beside, and put in place in one step.

They lie below `.labctl/imports/<origin>/<bundle id>/` as they lay in the workspace that they were made in, and the index is made
from them as from all other files: a run of an origin is `<run id>@<origin>`.
"""

from __future__ import annotations

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
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from labctl_orchestrator.exchange import bundle
from labctl_orchestrator.exchange.bundle import MANIFEST, MOST_BYTES, MOST_BYTES_OF_A_FILE, MOST_FILES, Manifest
from labctl_orchestrator.request.plan import run_definition
from labctl_orchestrator.store.collect import collect
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.take_files import TIME_COLUMNS
from labctl_orchestrator.store.views import HERE
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import LabctlError, WrongUseError
from labctl_workers.record import SCHEMA, Attempt, JobSpec, RunResult, run_id_of, write_json

# One file is in memory at a time. A value of JSON takes 72 bytes at most: 8 million of them 0.6 GB.
MOST_VALUES_OF_A_FILE = 8_000_000
MOST_BYTES_OF_THE_MANIFEST = 32 * 2**20
MOST_BYTES_OF_THE_DIRECTORY = 16 * 2**20
# What is made to fill a disk shrinks by up to 1,000, records by far less. Small files may shrink as they like.
MOST_SHRINKAGE = 200
SHRINKAGE_COUNTS_FROM = 64 * 2**20

_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
KNOWN_FILES = re.compile(
    rf"submissions/{_NAME}\.json"
    rf"|arrays/{_NAME}/(?:array|states|\d+)\.json|arrays/{_NAME}/attempts/{_NAME}\.json|arrays/{_NAME}/submitit/{_NAME}\.sh"
    rf"|results/[0-9a-f]{{12}}/{_NAME}\.json"
)
JOB_FILE = re.compile(r"arrays/([^/]+)/(\d+)\.json")
# What the index is made of: what is here of these, no later bundle may say otherwise.
INDEXED = re.compile(r"results/.*|arrays/[^/]+/(?:\d+|states)\.json|arrays/[^/]+/attempts/.*")
ORIGIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
STAGING = ("import-", ".partial")


@dataclass(frozen=True)
class Imported:
    """What became of one bundle: how many records are new here, were here from an earlier bundle, and are this
    workspace's own. `claimed`: the origin is the author that the bundle names; nothing verifies it."""

    origin: str
    name: str
    records: int
    new: int
    known: int
    own: int
    again: bool = False
    claimed: bool = False


class _Version(msgspec.Struct):
    labctl_bundle: int
    schema: int = 0
    labctl_version: str = "a newer one"


class _State(msgspec.Struct):
    queued_at: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    held_before_s: float | None = None
    node: str | None = None


class _Object(msgspec.Struct):
    """Any JSON object: nothing of it is read."""


@dataclass(frozen=True)
class Opened:
    """A bundle that was checked; a context manager that closes it. `content` reads one of its `names`, and checks its hash."""

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
        """Raises WrongUseError where it is not what the manifest says."""
        data = _read(self.path, self._archive, name)
        digest = hashlib.sha256(data).hexdigest()
        if digest != self.manifest.files[name].sha256:
            raise _refused(self.path, f"{name} was changed: its SHA-256 is {digest[:12]}…, not what the manifest says")
        return data

    def __enter__(self) -> Opened:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._archive.close()
        self._file.close()


# ---------------------------------------------------------------- check


def opened(path: Path) -> Opened:
    """The bundle, checked. Raises WrongUseError, with what is wrong, for a file that is not one as `labctl bundle` wrote it;
    OSError where it cannot be read."""
    # Without O_NONBLOCK, a named pipe would wait for its writer.
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: SIM115, PTH123  `Opened` closes it
    try:
        return _checked(path, file)
    except BaseException as error:
        file.close()
        if isinstance(error, (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError)):
            raise _refused(path, f"it is no bundle, or was damaged on its way: {error}") from None
        raise


def _checked(path: Path, file: io.BufferedReader) -> Opened:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise _refused(path, "it is no plain file", "give a file that labctl bundle wrote")
    if status.st_size > MOST_BYTES:
        raise _refused(path, f"it has {status.st_size:,} bytes, more than {MOST_BYTES:,}")
    _check_end(path, file, status.st_size)
    file.seek(0)
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    archive = zipfile.ZipFile(file)
    manifest = _manifest(path, archive, status.st_size)
    found = Opened(path, sha256, manifest, sorted(set(archive.namelist()) - {MANIFEST}), archive, file)
    for name in sorted(set(found.names) ^ set(manifest.files)):
        where = "not in its manifest" if name in found.names else "in its manifest, and is missing"
        raise _refused(path, f"{name} is {where}")
    _check_documents(found)
    return found


def _refused(
    path: Path, why: str, remedy: str = "ask for the bundle again: nothing of it was taken in"
) -> WrongUseError:
    return WrongUseError(f"{path.name} is refused: {why}", remedy)


def _check_end(path: Path, file: io.BufferedReader, size: int) -> None:
    """zipfile reads the whole directory of an archive into memory: its size, which the archive's end has, is checked before."""
    file.seek(max(0, size - 42))
    tail = file.read()
    end = tail[-22:]
    if len(end) < 22 or not end.startswith(b"PK\5\6") or end[20:] != b"\0\0":
        raise _refused(path, "it is no bundle, or was damaged on its way: the end of an archive is missing")
    (directory,) = struct.unpack("<L", end[12:16])
    if directory > MOST_BYTES_OF_THE_DIRECTORY or tail.startswith(b"PK\6\7"):  # the second: a larger kind of archive
        raise _refused(path, f"it holds more than {MOST_FILES:,} files")


def _manifest(path: Path, archive: zipfile.ZipFile, packed: int) -> Manifest:
    """The manifest, once names and sizes are such that reading is harmless."""
    _check_entries(path, archive, packed)
    if archive.getinfo(MANIFEST).file_size > MOST_BYTES_OF_THE_MANIFEST:
        raise _refused(path, f"its {MANIFEST} is larger than any sweep's")
    data = _read(path, archive, MANIFEST)
    try:
        version = _decode(path, MANIFEST, data, _Version)
        if version.labctl_bundle > bundle.FORMAT or version.schema > SCHEMA:
            newer = version.labctl_version
            raise _refused(
                path, f"it was made by a newer labctl ({newer})", "update labctl: pip install -U labctl-slurm"
            )
        return _decode(path, MANIFEST, data, Manifest)
    except msgspec.ValidationError as error:
        remedy = "give a file that labctl bundle wrote"
        raise _refused(path, f"its {MANIFEST} is none of labctl's: {error}", remedy) from None


def _check_entries(path: Path, archive: zipfile.ZipFile, packed: int) -> None:
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    for name in names:
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or "\0" in name:
            raise _refused(path, f"it holds a path that leads out of it: {name!r}")
    if MANIFEST not in names:
        raise _refused(path, f"it has no {MANIFEST}", "give a file that labctl bundle wrote")
    if len(names) > MOST_FILES:
        raise _refused(path, f"it holds {len(names):,} files, more than {MOST_FILES:,}")
    if len(set(names)) != len(names):
        raise _refused(path, "it holds a file twice")
    for entry in entries:
        if entry.filename != MANIFEST and not KNOWN_FILES.fullmatch(entry.filename):
            raise _refused(path, f"{entry.filename!r} is no file of a bundle")
        if (entry.external_attr >> 16) & 0o170000 not in (0, 0o100000):
            raise _refused(path, f"{entry.filename} is no plain file")
        # The others are unpacked whole, whatever size they claim.
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _refused(path, f"{entry.filename} is packed in a way that labctl does not use")
    total = sum(entry.file_size for entry in entries)
    if total > MOST_BYTES or (total > SHRINKAGE_COUNTS_FROM and total > MOST_SHRINKAGE * packed):
        raise _refused(path, f"its {packed:,} bytes would unpack to {total:,}, which no sweep does")


def _read(path: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    """A file of the archive, within the bounds of one file."""
    size = archive.getinfo(name).file_size
    if size > MOST_BYTES_OF_A_FILE:
        raise _refused(path, f"{name} has {size:,} bytes, more than {MOST_BYTES_OF_A_FILE:,}")
    try:
        with archive.open(name) as file:
            data = file.read(size)  # with a size, no more is unpacked than that, whatever there is
            if file.read(1):
                raise zipfile.BadZipFile("it is longer than it says")
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _refused(path, f"{name} was changed or damaged: {error}") from None
    if len(data) != size:
        raise _refused(path, f"{name} was changed or damaged: it is shorter than it says")
    return data


T = TypeVar("T")


def _decode(path: Path, name: str, data: bytes, kind: type[T]) -> T:
    """Raises WrongUseError for what is no JSON or would take too much memory, msgspec.ValidationError for other types."""
    values = sum(map(data.count, (b",", b"[", b"{")))
    if values > MOST_VALUES_OF_A_FILE:
        raise _refused(path, f"{name} holds {values:,} values, more than {MOST_VALUES_OF_A_FILE:,}")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _refused(path, f"{name} is no JSON: {error}") from None


@dataclass
class _Jobs:
    """The jobs of a bundle, by id, each with the ids of its runs; and what names a job, with where: (job, run or None, file)."""

    runs: dict[str, set[str]] = field(default_factory=dict)
    named: list[tuple[str, str | None, str]] = field(default_factory=list)


def _check_documents(found: Opened) -> None:
    """That each is what its name says, and that what is shown of a run is what its id is the hash of."""
    jobs = _Jobs()
    for name in found.names:
        data = found.content(name)
        if name.endswith(".sh"):
            continue
        try:
            _check_document(found.path, name, data, jobs)
        except (ValueError, TypeError, LookupError) as error:
            raise _refused(found.path, f"{name} is not as labctl writes it: {error}") from None
    for job, run, name in jobs.named:
        if job not in jobs.runs:
            raise _refused(found.path, f"{name} is of the job {job}, which it does not hold")
        if run is not None and run not in jobs.runs[job]:
            raise _refused(found.path, f"{name} is the record of another run: its job {job} has no run {run}")


def _check_document(path: Path, name: str, data: bytes, jobs: _Jobs) -> None:
    folder, _, file = name.rpartition("/")
    if name.startswith("results/"):
        record = _decode(path, name, data, RunResult)
        place = f"results/{record.run_id}/{record.attempt.attempt_id}.json"
        if place != name or run_id_of(record.asked) != record.run_id:
            raise _refused(path, f"{name} is the record of another run: its id is not the hash of what was asked")
        _check_record(record)
        jobs.named.append((record.attempt.job_id, record.run_id, name))
    elif match := JOB_FILE.fullmatch(name):
        job = _decode(path, name, data, JobSpec)
        if job.job_id != f"{match[1]}.{match[2]}":
            raise ValueError(f"it is of the job {job.job_id}")
        _check_runs(path, name, job)
        jobs.runs[job.job_id] = {run.run_id for run in job.runs}
    elif "/attempts/" in name:
        attempt = _decode(path, name, data, Attempt)
        _check_time(attempt.started_at)
        if file != f"{attempt.attempt_id}.json":
            raise ValueError(f"it is of the attempt {attempt.attempt_id}")
        jobs.named.append((attempt.job_id, None, name))
    elif file == "states.json":
        for job_id, state in _decode(path, name, data, dict[str, _State]).items():
            for time in (state.queued_at, state.started_at, state.ended_at):
                _check_time(time)
            if job_id.rpartition(".")[0] != folder.partition("/")[2]:
                raise ValueError(f"it is of the job {job_id}")
            jobs.named.append((job_id, None, name))
    else:
        _decode(path, name, data, _Object)


def _check_runs(path: Path, name: str, job: JobSpec) -> None:
    for run in job.runs:
        if run_id_of(run.asked) != run.run_id:
            raise _refused(path, f"{name} has a run whose id is not the hash of what was asked: {run.run_id}")
        if differ := _difference(run.asked, run_definition(job, run)):
            raise _refused(path, f"{name} shows another run than the one that was hashed: {differ}")


def _check_record(record: RunResult) -> None:
    """What the types of a record do not say. Raises ValueError."""
    if record.schema > SCHEMA:
        raise ValueError(f"it was written by a newer labctl (schema {record.schema})")
    if record.status not in ("done", "failed"):
        raise ValueError(f"its status is {record.status!r}")
    if (record.failure is None) != (record.status == "done"):
        raise ValueError(
            f"its status is {record.status}, and its failure {'is missing' if record.failure is None else 'given'}"
        )
    _check_time(record.started_at)
    _check_time(record.ended_at)
    _check_time(record.attempt.started_at)


def _check_time(time: str | None) -> None:
    if time is not None:
        datetime.fromisoformat(time)


# ---------------------------------------------------------------- whose


def origin_of(found: Opened, given: str | None) -> str:
    """Whose it is: the label that is given, else the author that it names, else the file's name. Raises WrongUseError for a
    label that can be none."""
    if given is not None:
        label = given
    else:
        label = found.manifest.author or found.path.name.removesuffix(".zip").removesuffix(".labctl")
        label = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-._")[:40]
    if not ORIGIN.fullmatch(label) or label.lower() == HERE:
        raise WrongUseError(
            f"{label!r} cannot be the label of a bundle: letters, digits and . _ - make one, and {HERE!r} is this workspace",
            "give --origin another, such as --origin ada",
        )
    return label


# ---------------------------------------------------------------- take in


def take_in(workspace: Workspace, found: Opened, origin: str, *, given: bool = False) -> Imported:
    """Put the bundle's files into the workspace, all of them or none: but for what is here already, and records that are this
    workspace's own. Nothing that is here is changed. Raises WrongUseError where the bundle disagrees with an earlier one of this
    origin, was imported under another label than a person has `given` now, or holds what this workspace cannot; OSError."""
    records, name = found.records, found.manifest.name
    claimed = not given and bool(found.manifest.author)
    with workspace.turn():
        before = next(iter(sorted(workspace.imports.glob(f"*/{found.bundle_id}/bundle.json"))), None)
        if before is not None and given and before.parent.parent.name != origin:
            raise _labelled_otherwise(found, before)
        if before is not None:
            imported_as = before.parent.parent.name
            return Imported(imported_as, name, len(records), 0, len(records), 0, again=True, claimed=claimed)
        _check_names(workspace, found)
        own = {record for record in records if (workspace.data / record).exists()}
        folder = workspace.imports / origin
        try:
            known = _known(found, folder)
        except msgspec.DecodeError as error:
            remedy = f"rm -r {folder}, and import its bundles again"
            raise LabctlError(f"an earlier import below {folder} is damaged: {error}", remedy) from None
        new = len(set(records) - own - known)
        if new:
            _put(workspace, found, folder, own | known)
    return Imported(origin, name, len(records), new, len(known & (set(records) - own)), len(own), claimed=claimed)


def _labelled_otherwise(found: Opened, before: Path) -> WrongUseError:
    folder = before.parent.parent
    remedy = f"labctl compare {folder.name} names its runs"
    if len(list(folder.iterdir())) == 1:  # else others would go with it
        remedy += f"; for another label: rm -r {folder}, and import it again"
    return WrongUseError(f"{found.path.name} was imported already, as {folder.name}", remedy)


def _check_names(workspace: Workspace, found: Opened) -> None:
    longest = os.pathconf(workspace.data, "PC_NAME_MAX")
    for name in found.names:
        if max(map(len, name.split("/"))) > longest:
            raise _refused(
                found.path, f"a name in it is longer than the {longest} bytes that {workspace.data} can hold: {name}"
            )


def _known(found: Opened, folder: Path) -> set[str]:
    """What is here from earlier bundles of this origin and is the same. Raises WrongUseError for what is not the same."""
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
                differ = _difference(
                    {job: ours[job] for job in ours.keys() & theirs}, {job: theirs[job] for job in ours.keys() & theirs}
                )
            else:
                differ = "" if earlier == data else _difference(_any(earlier), _any(data)) or "its bytes"
                known.add(name)
            if differ:
                raise _disagrees(found, folder, name, differ)
        if JOB_FILE.fullmatch(name):
            for run, seen in _shown(data):
                if differ := _difference(shown.get(run, seen), seen):
                    raise _disagrees(found, folder, f"run {run}", differ)
    return known


def _disagrees(found: Opened, folder: Path, what: str, differ: str) -> WrongUseError:
    return _refused(
        found.path,
        f"{what} differs from the one that {folder.name}'s earlier bundle had: {differ}",
        "give --origin another label, if it is another person's",
    )


def _shown(job: bytes) -> Iterator[tuple[str, dict[str, object]]]:
    """What is shown of each run of a job and is no part of its hash."""
    spec = msgspec.json.decode(job, type=JobSpec)
    for run in spec.runs:
        yield run.run_id, {"model": spec.model.name, "defaults": spec.defaults}


def _times(states: bytes) -> dict[str, dict[str, object]]:
    return {job: {key: state.get(key) for key in TIME_COLUMNS} for job, state in _any(states).items()}


def _any(data: bytes) -> Any:
    return msgspec.json.decode(data)


def _difference(earlier: Any, now: Any, where: str = "") -> str:
    """The first place in which two JSON values differ, with both values; empty where none does."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        keys = sorted(earlier.keys() | now.keys())
        return next(filter(None, (_difference(earlier.get(key), now.get(key), f"{where}.{key}") for key in keys)), "")
    if isinstance(earlier, list) and isinstance(now, list) and len(earlier) == len(now):
        places = enumerate(zip(earlier, now, strict=True))
        return next(filter(None, (_difference(*pair, f"{where}[{place}]") for place, pair in places)), "")
    if earlier == now:
        return ""
    one, other = (json.dumps(value, ensure_ascii=False)[:60] for value in (earlier, now))
    return f"{where.lstrip('.') or 'the value'} is {one} there and {other} in this one"


def _put(workspace: Workspace, found: Opened, folder: Path, left_out: set[str]) -> None:
    """Write the bundle beside, let the index read it there, and rename it into its place."""
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
        _check_index(trial, found)
        for name in left_out:
            (written / name).unlink()
        about = {"name": found.manifest.name, "author": found.manifest.author, "records": len(found.records)}
        about |= {"labctl_version": found.manifest.labctl_version, "bundle_id": found.bundle_id, "sha256": found.sha256}
        write_json(written / "bundle.json", about)
        folder.mkdir(parents=True, exist_ok=True)
        written.rename(folder / found.bundle_id)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_index(trial: Workspace, found: Opened) -> None:
    """The index itself says whether it can hold the bundle."""
    with closing(Store(trial.root / "trial.db")) as store:
        damaged = collect(trial, store).damaged
    if damaged:
        what = damaged[0].removeprefix(f"{trial.imports}/").split("/", 2)[-1]
        raise _refused(found.path, f"this labctl cannot read {what}")
