"""Download a Hub model into the cache on the login node, complete, verified and pinned.

huggingface_hub downloads the files and verifies their checksums. labctl selects the files that a load needs, lets one process
download at a time, and gives each error a remedy.
"""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from labctl_orchestrator.models import hub_cache
from labctl_orchestrator.models.disk_space import left_bytes
from labctl_orchestrator.models.hub_errors import hub_error
from labctl_orchestrator.models.resolve import check_id
from labctl_slurm.errors import LabctlError, PreflightError
from labctl_workers.record import atomic_replace

ATTEMPTS = 4
WAIT_S = (1.0, 3.0, 10.0)  # between attempts, each of which includes the client's own retries
SPARE_BYTES = 1 << 30
PART = "*.????????.incomplete"  # of huggingface_hub 1.x; earlier versions resume their *.incomplete files
ABANDONED_AFTER_S = 86400.0
_TEXT = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
# Folders with other forms of the same weights.
_OTHER_FORMS = ("original/", "onnx/", "openvino/", "coreml/", "gguf/", "metal/")
_MOVE = "set HF_HOME to a larger folder that nodes share, in this shell and in env of the partition"
_LATER = "run labctl fetch again to download the missing files; behind a proxy, set HTTPS_PROXY"

Say = Callable[[str], None]


@dataclass(frozen=True)
class HubFile:
    """A file of the repository; `size` in bytes."""

    path: str
    size: int


@dataclass(frozen=True)
class Fetched:
    """A model in the cache. `downloaded_bytes` counts the files that were missing before."""

    model: str
    commit: str
    path: Path
    files: int
    total_bytes: int
    downloaded_bytes: int


def fetch(model: str, revision: str, into: Path, say: Say, *, verify: bool = False) -> Fetched:
    """Download a model into the cache folder `into`, and record the commit of `revision`. `verify`: verify also a model that was
    verified before. Raises WrongUseError for an invalid Hub id, PreflightError if the Hub refuses or the disk is too small,
    LabctlError if the Hub cannot be reached or sends files with wrong checksums."""
    check_id(model)
    try:
        commit = _commit(model, revision)
    except UnreachableError as error:
        return _fetched_before(model, revision, into, error, say)
    home = hub_cache.repository(into, model)
    with _lock(home, say):
        files = needed(_listed(model, commit))
        if not files:
            raise PreflightError(
                f"model has no weights that an engine can load: {model}", "choose another model or revision"
            )
        snapshot = home / "snapshots" / commit
        absent = [file for file in files if not (snapshot / file.path).exists()]
        total, lacking = sum(file.size for file in files), sum(file.size for file in absent)
        _sweep(home / "blobs")
        check_space(into, lacking)
        if absent:
            say(f"downloading {model} at {commit[:12]}: {len(absent)} files, {size_text(lacking)}, to {into}")
            _download(model, commit, absent, into, say)
        verified = home / f"labctl-verified-{commit}"
        if absent or verify or not verified.exists():
            if total >= 1 << 30:
                say(f"verifying {size_text(total)}")
            _verify(model, commit, snapshot, into, say)
            with suppress(OSError):  # a read-only cache: the next fetch verifies it again
                verified.touch()
        if not hub_cache.COMMIT.fullmatch(revision):
            reference = home / "refs" / revision
            reference.parent.mkdir(parents=True, exist_ok=True)
            with atomic_replace(reference, "w", encoding="utf-8") as file:
                file.write(commit)
    return Fetched(model, commit, snapshot, len(files), total, lacking)


def _fetched_before(model: str, revision: str, into: Path, error: LabctlError, say: Say) -> Fetched:
    """The model as an earlier fetch left it, if the Hub is unreachable. Raises the error if it is incomplete."""
    cached = hub_cache.find(into, model, revision)
    if cached is None or not cached.complete:
        raise error
    say(f"{error.message}; cannot check whether {revision!r} has a newer commit")
    sizes = [file.stat().st_size for file in cached.path.rglob("*") if file.is_file()]
    return Fetched(model, cached.commit, cached.path, len(sizes), sum(sizes), 0)


def needed(files: Iterable[HubFile]) -> list[HubFile]:
    """The files that an engine loads: configuration, tokenizer, and one form of the weights, preferably safetensors."""
    own = [file for file in files if not file.path.startswith(_OTHER_FORMS)]
    safetensors = [file for file in own if file.path.endswith(".safetensors")]
    # Mistral's repositories contain the weights twice: in shards, and "consolidated".
    plain = [file for file in safetensors if not Path(file.path).name.startswith("consolidated")]
    torch = [file for file in own if file.path.endswith(".bin") and "training_args" not in file.path]
    weights = plain or safetensors or torch
    return [file for file in own if Path(file.path).suffix in _TEXT] + weights if weights else []


# ---------------------------------------------------------------- the Hub


class UnreachableError(LabctlError):
    """The Hub does not answer, or the connection breaks: retrying may help."""


@contextmanager
def _asking(model: str, revision: str) -> Iterator[None]:
    """Raise the client's errors as labctl's, with remedies."""
    try:
        yield
    except LabctlError:
        raise
    except Exception as error:  # httpx, requests, urllib3 and xet have unrelated errors
        if known := hub_error(error, model, revision) or _status_error(error, model):
            raise known from None
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LabctlError(f"the disk or your quota is full: {error.strerror}", _MOVE) from None
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise  # an error of this machine's disk
        reason = next(filter(None, map(str.strip, str(error).splitlines())), "")
        what = f"the Hub did not answer for {model}: {type(error).__name__}: {reason}".rstrip(": ")
        raise UnreachableError(what, _LATER) from None


def _status_error(error: Exception, model: str) -> LabctlError | None:
    """The error for a token that the Hub rejects (401), or that may not read the model (403)."""
    from huggingface_hub import constants

    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status == 401:
        remedy = f"create a new one at {constants.ENDPOINT}/settings/tokens"
        return PreflightError("the Hub rejects your token (401)", remedy)
    if status == 403:
        return PreflightError(
            f"the Hub refuses access to {model} (403)",
            f"accept its terms at {constants.ENDPOINT}/{model}, and check that your token may read it",
        )
    return None


def _commit(model: str, revision: str) -> str:
    from huggingface_hub import HfApi

    with _asking(model, revision):
        found = HfApi().model_info(model, revision=revision, timeout=10.0).sha
    if found is None:
        raise LabctlError(f"the Hub gives no commit for {model}", "try again")
    return found


def _listed(model: str, commit: str) -> list[HubFile]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with _asking(model, commit):
        entries = list(HfApi().list_repo_tree(model, revision=commit, recursive=True))
    return [HubFile(entry.path, entry.size) for entry in entries if isinstance(entry, RepoFile)]


def _download(model: str, commit: str, files: Sequence[HubFile], into: Path, say: Say) -> None:
    """Download the files one by one in this thread, so that Ctrl-C works and the client removes a partial file."""
    from huggingface_hub import hf_hub_download

    for file in files:
        for attempt in range(ATTEMPTS):
            try:
                with _asking(model, commit):
                    hf_hub_download(model, file.path, revision=commit, cache_dir=into)
                break
            except UnreachableError as error:
                if attempt + 1 == ATTEMPTS:
                    raise
                say(f"{error.message}; next attempt in {WAIT_S[attempt]:.0f} s")
                time.sleep(WAIT_S[attempt])


def _verify(model: str, commit: str, snapshot: Path, into: Path, say: Say) -> None:
    """Verify every file, and download wrong ones again. Raises LabctlError if they are wrong twice."""
    from huggingface_hub import HfApi

    if not hasattr(HfApi, "verify_repo_checksums"):
        say("verified sizes only: checksums need huggingface_hub 1.1 or later")
        return
    for last in (False, True):
        with _asking(model, commit):
            found = HfApi().verify_repo_checksums(model, revision=commit, cache_dir=into)
        damaged = [HubFile(mismatch["path"], 0) for mismatch in found.mismatches]
        if not damaged:
            return
        for file in damaged:
            blob = (snapshot / file.path).resolve()
            (snapshot / file.path).unlink(missing_ok=True)
            if blob.is_relative_to(snapshot.parent.parent.resolve()):  # delete only files in this model's folder
                blob.unlink(missing_ok=True)
        names = ", ".join(file.path for file in damaged)
        if last:
            raise LabctlError(
                f"checksum mismatch after two downloads; labctl removed {names}",
                "try again later; if it fails again, a proxy or the disk may damage files",
            )
        say(f"checksum mismatch: {names}; downloading again")
        _download(model, commit, damaged, into, say)


# ---------------------------------------------------------------- the disk


@contextmanager
def _lock(home: Path, say: Say) -> Iterator[None]:
    """Lock the model: a second fetch waits, and then finds the files of the first."""
    lock = home.parent / ".locks" / home.name / "labctl.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        remedy = "set HF_HOME to a folder of yours that nodes share"
        raise LabctlError(f"cannot write the cache {home.parent}: {error.strerror}", remedy) from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # this kind works on network filesystems
        except OSError:
            say("another labctl fetch downloads this model: waiting for it")
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _sweep(blobs: Path) -> None:
    """Remove files of killed downloads, which no later download resumes."""
    for part in blobs.glob(PART):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > ABANDONED_AFTER_S:
                part.unlink()


def check_space(into: Path, lacking: int) -> None:
    """Raises PreflightError if the disk of `into` has no room for `lacking` bytes."""
    free = left_bytes(into)
    if lacking and free < lacking + SPARE_BYTES:
        raise PreflightError(
            f"not enough space in {into}: {size_text(free)} free, {size_text(lacking)} needed and 1 GiB to spare",
            _MOVE,
        )


def size_text(count: int) -> str:
    """Bytes as text, in MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
