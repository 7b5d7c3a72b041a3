"""A bundle: a sweep in one file, to pass on. It contains records with all raw values, submissions, jobs, scripts and a manifest
of hashes. The same sweep gives the same bytes.

A bundle omits logs, pickles, process ids of submissions and the paths of local checkpoints. It replaces home folders, the
workspace's path and apparent tokens. It contains prompts, answers, node names, Slurm ids, options and versions.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import operator
import os
import re
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import msgspec

from labctl_orchestrator.store import documents
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.select_runs import runs_by_submission
from labctl_orchestrator.store.workspace import Workspace, document_at
from labctl_slurm import queue
from labctl_slurm.errors import LabctlError, WrongUseError
from labctl_workers.environment import REMOVED, SECRET_SET, TOKEN, is_secret
from labctl_workers.record import SCHEMA, JobSpec, RunResult, read_json

# Version of the bundle format. Records have a schema version of their own.
FORMAT = 1
MANIFEST = "manifest.json"
SUFFIX = ".labctl.zip"
# Limits of an import. A larger sweep needs several bundles.
MOST_FILES = 65_535
MOST_BYTES = 2 * 2**30
MOST_BYTES_OF_A_FILE = 128 * 2**20


class FileHash(msgspec.Struct, frozen=True):
    sha256: str
    bytes: int = 0


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle's manifest. `name` and `author` are unverified, `files` is checked. `labctl_bundle` is the format version."""

    labctl_bundle: int
    schema: int
    labctl_version: str
    name: str
    author: str | None = None
    runs: int = 0
    records: int = 0
    files: dict[str, FileHash]


@dataclass(frozen=True)
class WrittenBundle:
    """A bundle that `write` wrote: manifest, size, hash, and a message for each record that is left out."""

    manifest: Manifest
    bytes: int
    sha256: str
    left_out: list[str] = field(default_factory=list)


def write(workspace: Workspace, store: Store, title: str, run_ids: Sequence[str], author: str | None,
          file: IO[bytes]) -> WrittenBundle:  # fmt: skip
    """Write the records of all attempts of these runs with their jobs, scripts and submissions. One file is in memory at a time.
    Raises WrongUseError for imported runs and if no run has a record, LabctlError for an apparent token in a prompt or answer."""
    foreign = [run_id for run_id in run_ids if "@" in run_id]
    if foreign:
        raise WrongUseError(
            f"imported runs cannot be bundled: {foreign[0]}", "share the bundle from which it was imported"
        )
    listed: dict[str, FileHash] = {}
    left_out: list[str] = []
    size = 0
    hashed = _Hashed(file)
    with zipfile.ZipFile(cast("IO[bytes]", hashed), "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name, content in _files(workspace, store, run_ids, left_out):
            if name in listed:
                continue  # jobs of an array share files
            _add(archive, name, content)
            listed[name] = FileHash(hashlib.sha256(content).hexdigest(), len(content))
            size += len(content)
            if len(listed) >= MOST_FILES or size > MOST_BYTES:
                raise WrongUseError(
                    f"bundle exceeds {MOST_FILES:,} files or {MOST_BYTES:,} bytes: {title}",
                    "make several bundles of fewer runs or submissions",
                )
        records = [name for name in listed if name.startswith("results/")]
        if not records:
            raise WrongUseError(f"no run has a record: {title}", "labctl status shows the state of each run")
        manifest = Manifest(
            labctl_bundle=FORMAT,
            schema=SCHEMA,
            labctl_version=importlib.metadata.version("labctl-slurm"),
            name=title,
            author=author,
            runs=len({name.split("/")[1] for name in records}),
            records=len(records),
            files=dict(sorted(listed.items())),
        )
        _add(archive, MANIFEST, _json(msgspec.to_builtins(manifest)))
    return WrittenBundle(manifest, hashed.size, hashed.digest.hexdigest(), left_out)


# ---------------------------------------------------------------- which files


def _files(
    workspace: Workspace, store: Store, run_ids: Sequence[str], left_out: list[str]
) -> Iterator[tuple[str, bytes]]:
    """Each file's name and content, some twice. A message for each record that cannot go in is added to `left_out`."""
    wanted = json.dumps(list(run_ids))
    rows = store.rows(
        "SELECT path, job_id FROM results WHERE run_id IN (SELECT value FROM json_each(?)) ORDER BY job_id, path",
        (wanted,),
    )
    jobs = list(dict.fromkeys(row["job_id"] for row in rows))
    specs = (documents.read_at(workspace.data / _spec_of(job), JobSpec) for job in jobs)
    used = [files for spec in specs if spec is not None for files in (spec.model, spec.adapter) if files is not None]
    clean = _Cleaner.of(workspace, {files.path for files in used if files.path})
    for job, of_job in itertools.groupby(rows, key=operator.itemgetter("job_id")):
        name = _spec_of(job)
        path = workspace.data / name
        spec = {} if documents.read_at(path, JobSpec) is None else document_at(path)
        written = 0
        for row in of_job:
            if not spec:
                left_out.append(f"{row['path']}: the file of its job is missing or invalid: {name}")
                continue
            record, problem = _record(workspace, clean, row["path"])
            if problem:
                left_out.append(f"{row['path']}: {problem}")
                continue
            yield row["path"], record
            written += 1
        if written:
            without = {key: {**spec[key], "path": None} for key in ("model", "adapter") if spec.get(key)}
            yield name, clean.document(name, {**spec, **without})
            yield from _array_files(workspace, job, set(jobs), clean)
    bundled = set(run_ids)
    for submission_id, runs in sorted(runs_by_submission(store).items()):
        if not bundled.issuperset(runs):
            continue  # it has other runs
        name = f"submissions/{submission_id}.json"
        document = document_at(workspace.data / name)
        document.pop("jobs", None)  # they have files of their own
        if document:
            yield name, clean.document(name, document)


def _record(workspace: Workspace, clean: _Cleaner, name: str) -> tuple[bytes, str]:
    """(the cleaned record, why an import would refuse it or "")."""
    path = workspace.data / name
    size = path.stat().st_size
    if size <= MOST_BYTES_OF_A_FILE:
        record = clean.document(name, read_json(path))
        size = len(record)
    if size > MOST_BYTES_OF_A_FILE:
        return b"", f"{size:,} bytes, more than {MOST_BYTES_OF_A_FILE:,}"
    try:
        msgspec.json.decode(record, type=RunResult)
    except msgspec.DecodeError as error:
        return b"", str(error)
    return record, ""


def _spec_of(job_id: str) -> str:
    array, _, task = job_id.rpartition(".")
    return f"arrays/{array}/{task}.json"


def _array_files(
    workspace: Workspace, job_id: str, jobs: Collection[str], clean: _Cleaner
) -> Iterator[tuple[str, bytes]]:
    array, _, task = job_id.rpartition(".")
    folder = workspace.arrays / array
    for path in (
        folder / "array.json",
        folder / "states.json",
        *sorted((folder / "attempts").glob(f"*.{task}.*.json")),
    ):
        document = document_at(path)
        if path.name == "states.json":  # the state of an unfinished job would contradict a later bundle
            states = documents.read_at(path, dict[str, documents.State]) or {}
            ended = {job for job, state in states.items() if state.state in queue.ENDED}
            document = {job: state for job, state in document.items() if job in jobs and job in ended}
        if document:
            name = str(path.relative_to(workspace.data))
            yield name, clean.document(name, document)
    for path in sorted((folder / "submitit").glob("[!.]*.sh")):  # submitit's drafts begin with a dot
        name = str(path.relative_to(workspace.data))
        yield name, clean.script(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- cleaning

# Values that stay unchanged: those that the run id hashes, prompts and answers.
UNCHANGED = frozenset(
    {"definition", "prompt_sets", "datasets", "texts", "prompt", "engine_options", "samples", "tokens"}
)
HOME = re.compile(r"/(?:home|Users)/[^/\s\"':]+")
SHORTEST_SECRET = 8


@dataclass(frozen=True)
class _Cleaner:
    """Replaces paths of the workspace and of checkpoints, home folders and secrets."""

    replaced: tuple[tuple[re.Pattern[str], str], ...]
    secrets: tuple[str, ...]

    @classmethod
    def of(cls, workspace: Workspace, checkpoints: Collection[str]) -> _Cleaner:
        folders = ((str(workspace.root), "(workspace)"), (str(workspace.root.resolve()), "(workspace)"))
        models = [(path, Path(path).name) for path in checkpoints]
        home = str(Path.home())
        known = [*folders, *models, *([(home, "~")] if home not in ("/", "") else [])]
        secrets = [value for name, value in os.environ.items() if is_secret(name) and len(value) >= SHORTEST_SECRET]
        longest_first = sorted(known, key=lambda one: -len(one[0]))
        ends = r"(?=$|[/\s\"':,;)])"
        return cls(tuple((re.compile(re.escape(path) + ends), label) for path, label in longest_first), tuple(secrets))

    def document(self, name: str, document: Any) -> bytes:
        """The cleaned JSON document. Raises LabctlError if a value that must stay unchanged contains a secret."""
        content = _json(self._value(document))
        text = content.decode()
        if TOKEN.search(text) or any(json.dumps(secret)[1:-1] in text for secret in self.secrets):
            raise LabctlError(
                f"possible access token in a prompt, answer or engine option: {name}",
                "give the runs or submissions to bundle by name, and leave this one out",
            )
        return content

    def script(self, text: str) -> bytes:
        return self._text(SECRET_SET.sub(rf"\1={REMOVED}", text)).encode()

    def _value(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self._text(key): item if key in UNCHANGED else self._value(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._value(item) for item in value]
        return self._text(value) if isinstance(value, str) else value

    def _text(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, REMOVED)
        if "/" in text:
            for path, label in self.replaced:
                text = path.sub(lambda _, label=label: label, text)  # type: ignore[misc]
            text = HOME.sub("~", text)
        return TOKEN.sub(REMOVED, text)


# ---------------------------------------------------------------- the archive


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n").encode()


@dataclass
class _Hashed:
    """A write-only file without seek, as zipfile treats a pipe. It counts and hashes the bytes."""

    file: IO[bytes]
    size: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Add a file with a fixed date and mode."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.create_system, entry.external_attr = 3, 0o100644 << 16
    archive.writestr(entry, content)
