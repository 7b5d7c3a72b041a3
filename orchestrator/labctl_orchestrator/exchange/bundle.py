"""A sweep in one file, to hand to somebody: its records with every raw value, its requests, jobs and scripts, and a manifest of
hashes. The same sweep makes the same bytes.

What a reader does not need is left out: logs, pickles, process ids of submissions, the folder of a local checkpoint. Home
folders, the workspace's own path and whatever looks like a token are replaced. Prompts, answers, names of nodes, Slurm's ids,
options and versions are in it: they are what was measured.
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
from labctl_orchestrator.store.workspace import Workspace, document_at
from labctl_slurm import queue
from labctl_slurm.errors import LabctlError, WrongUseError
from labctl_workers.environment import REMOVED, SECRET_SET, TOKEN, is_secret
from labctl_workers.record import SCHEMA, RunResult, read_json

# Of the bundle itself; records have a schema of their own.
FORMAT = 1
MANIFEST = "manifest.json"
SUFFIX = ".labctl.zip"
# What an import takes; a larger sweep goes in several bundles.
MOST_FILES = 65_535
MOST_BYTES = 2 * 2**30
MOST_BYTES_OF_A_FILE = 128 * 2**20


class FileHash(msgspec.Struct, frozen=True):
    sha256: str
    bytes: int = 0


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle says of itself: `name` and `author` are claims, `files` is checked. `labctl_bundle` is the format."""

    labctl_bundle: int
    schema: int
    labctl_version: str
    name: str
    author: str | None = None
    runs: int = 0
    records: int = 0
    files: dict[str, FileHash]


@dataclass(frozen=True)
class Bundle:
    """What is in a bundle that was written: its manifest, size and hash, and the records that are left out, with the reason."""

    manifest: Manifest
    bytes: int
    sha256: str
    left_out: list[str] = field(default_factory=list)


def write(workspace: Workspace, store: Store, title: str, run_ids: Sequence[str], author: str | None,
          file: IO[bytes]) -> Bundle:  # fmt: skip
    """Write the records of these runs, of every attempt, with what belongs to them, one file at a time: so many are in memory.
    Raises WrongUseError for runs of somebody else and for runs without a record, LabctlError where a prompt or an answer holds
    what looks like a token."""
    foreign = [run_id for run_id in run_ids if "@" in run_id]
    if foreign:
        raise WrongUseError(
            f"{foreign[0]} was imported: a bundle holds what was measured here", "hand on the bundle that it came in"
        )
    listed: dict[str, FileHash] = {}
    left_out: list[str] = []
    size = 0
    hashed = _Hashed(file)
    with zipfile.ZipFile(cast("IO[bytes]", hashed), "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name, content in _files(workspace, store, run_ids, left_out):
            if name in listed:
                continue  # what an array's jobs share
            _add(archive, name, content)
            listed[name] = FileHash(hashlib.sha256(content).hexdigest(), len(content))
            size += len(content)
            if len(listed) >= MOST_FILES or size > MOST_BYTES:
                raise WrongUseError(
                    f"{title} has more than {MOST_FILES:,} files or {MOST_BYTES:,} bytes, the most of a bundle",
                    "name fewer runs or requests, and make several bundles",
                )
        records = [name for name in listed if name.startswith("results/")]
        if not records:
            raise WrongUseError(f"{title}: no run has a record yet", "labctl status tells where each stands")
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
    return Bundle(manifest, hashed.size, hashed.digest.hexdigest(), left_out)


# ---------------------------------------------------------------- which files


def _files(
    workspace: Workspace, store: Store, run_ids: Sequence[str], left_out: list[str]
) -> Iterator[tuple[str, bytes]]:
    """Each file's name and content, some twice; the records that are left out are added to `left_out`, with the reason."""
    wanted = json.dumps(list(run_ids))
    rows = store.rows(
        "SELECT path, job_id FROM results WHERE run_id IN (SELECT value FROM json_each(?)) ORDER BY job_id, path",
        (wanted,),
    )
    jobs = list(dict.fromkeys(row["job_id"] for row in rows))
    clean = _Cleaner.of(workspace, [_checkpoint_of(workspace.data / _spec_of(job)) for job in jobs])
    for job, of_job in itertools.groupby(rows, key=operator.itemgetter("job_id")):
        name = _spec_of(job)
        spec = document_at(workspace.data / name)
        told = False
        for row in of_job:
            if not spec:
                left_out.append(f"{row['path']}: its job's file {name} is not there")
                continue
            record, problem = _record(workspace, clean, row["path"])
            if problem:
                left_out.append(f"{row['path']}: {problem}")
                continue
            yield row["path"], record
            if not told:
                yield (
                    name,
                    clean.document(name, {**spec, "model": {**spec["model"], "path": None}}),
                )  # known by its content
                yield from _of_an_array(workspace, job, set(jobs), clean)
                told = True
    for submission_id in _requests(store, set(run_ids)):
        name = f"submissions/{submission_id}.json"
        document = document_at(workspace.data / name)
        document.pop("jobs", None)  # the jobs' own files say it
        if document:
            yield name, clean.document(name, document)


def _record(workspace: Workspace, clean: _Cleaner, name: str) -> tuple[bytes, str]:
    """A record as it is handed on, and why an import would refuse it; empty where it would not."""
    path = workspace.data / name
    size = path.stat().st_size
    if size <= MOST_BYTES_OF_A_FILE:
        record = clean.document(name, read_json(path))
        size = len(record)
    if size > MOST_BYTES_OF_A_FILE:
        return b"", f"it has {size:,} bytes, more than {MOST_BYTES_OF_A_FILE:,}"
    return record, _not_a_record(record)


def _checkpoint_of(path: Path) -> str | None:
    """Where the model of a job lies."""
    spec = documents.job_at(path)
    return None if spec is None else spec.model.path


def _not_a_record(content: bytes) -> str:
    try:
        msgspec.json.decode(content, type=RunResult)
    except msgspec.DecodeError as error:
        return str(error)
    return ""


def _spec_of(job_id: str) -> str:
    array, _, task = job_id.rpartition(".")
    return f"arrays/{array}/{task}.json"


def _of_an_array(
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
        if path.name == "states.json":  # of a job that goes on, the next bundle would say otherwise
            document = {
                job: state for job, state in document.items() if job in jobs and state.get("state") in queue.ENDED
            }
        if document:
            name = str(path.relative_to(workspace.data))
            yield name, clean.document(name, document)
    for path in sorted((folder / "submitit").glob("[!.]*.sh")):  # submitit's own draft begins with a dot
        name = str(path.relative_to(workspace.data))
        yield name, clean.script(path.read_text(encoding="utf-8"))


def _requests(store: Store, run_ids: set[str]) -> list[str]:
    """Requests all of whose runs are chosen: another one's question is not this sweep's."""
    runs: dict[str, set[str]] = {}
    for submission_id, run_id in store.tuples("SELECT submission_id, run_id FROM submission_runs"):
        runs.setdefault(submission_id, set()).add(run_id)
    return sorted(submission_id for submission_id, of_request in runs.items() if of_request <= run_ids)


# ---------------------------------------------------------------- what is not handed on

# What the run's identity is made of, what was asked and what was answered: as it is, or it would be something else.
KEPT_AS_IT_IS = frozenset({"asked", "prompt_sets", "prompt", "engine_options", "samples", "tokens"})
HOME = re.compile(r"/(?:home|Users)/[^/\s\"':]+")
LEAST_OF_A_SECRET = 8


@dataclass(frozen=True)
class _Cleaner:
    """Replaces the workspace's path, where checkpoints lie, home folders and secrets in texts."""

    replaced: tuple[tuple[re.Pattern[str], str], ...]
    secrets: tuple[str, ...]

    @classmethod
    def of(cls, workspace: Workspace, checkpoints: Sequence[str | None]) -> _Cleaner:
        folders = ((str(workspace.root), "(workspace)"), (str(workspace.root.resolve()), "(workspace)"))
        models = [(path, Path(path).name) for path in set(checkpoints) if path]
        home = str(Path.home())
        known = [*folders, *models, *([(home, "~")] if home not in ("/", "") else [])]
        secrets = [value for name, value in os.environ.items() if is_secret(name) and len(value) >= LEAST_OF_A_SECRET]
        longest_first = sorted(known, key=lambda one: -len(one[0]))
        ends = r"(?=$|[/\s\"':,;)])"
        return cls(tuple((re.compile(re.escape(path) + ends), label) for path, label in longest_first), tuple(secrets))

    def document(self, name: str, document: Any) -> bytes:
        """A JSON document, cleaned. Raises LabctlError where a secret is in what has to stay as it is."""
        content = _json(self._value(document))
        text = content.decode()
        if TOKEN.search(text) or any(json.dumps(secret)[1:-1] in text for secret in self.secrets):
            raise LabctlError(
                f"{name} holds what looks like a token, in a prompt, an answer or an engine option",
                "ask for runs without it: labctl bundle takes the names of requests and runs",
            )
        return content

    def script(self, text: str) -> bytes:
        return self._text(SECRET_SET.sub(rf"\1={REMOVED}", text)).encode()

    def _value(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self._text(key): item if key in KEPT_AS_IT_IS else self._value(item) for key, item in value.items()}
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
    """A file that is only written to, in order, as a pipe is: its bytes and their hash depend on what is written alone."""

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
    """A file of the archive: of one date, by one owner."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.create_system, entry.external_attr = 3, 0o100644 << 16
    archive.writestr(entry, content)
