"""A hub model -> the cache, whole, verified and pinned: on the login node, before a job needs it.

huggingface_hub's own client downloads, and verifies against the hub's checksums. What is added here: which files a load needs,
one download though several ask, and what to do about each way to fail.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from labctl_orchestrator.models import hub_cache
from labctl_orchestrator.models.disk_space import left_bytes
from labctl_orchestrator.models.hub_errors import told_of
from labctl_orchestrator.models.resolve import check_id
from labctl_slurm.errors import LabctlError, PreflightError

ATTEMPTS = 4
WAIT_S = (1.0, 3.0, 10.0)  # between attempts; the client has retried by itself before
SPARE_BYTES = 1 << 30
PART = "*.????????.incomplete"  # of huggingface_hub 1.x; the plain *.incomplete of earlier ones is gone on with
FORGOTTEN_AFTER_S = 86400.0
_TEXT = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
# Other forms of the same weights: of another framework, of the model's own code, or a second copy.
_OTHER_FORMS = ("original/", "onnx/", "openvino/", "coreml/", "gguf/", "metal/")
_MOVE = "set HF_HOME to a folder with more room that nodes share, here and in env of the partition"
_LATER = "labctl fetch again goes on with what is missing; behind a proxy, set HTTPS_PROXY"

Say = Callable[[str], None]


@dataclass(frozen=True)
class HubFile:
    """A file of the repository, its size in bytes."""

    path: str
    size: int


@dataclass(frozen=True)
class Fetched:
    """What is in the cache now. `downloaded_bytes` is what was not there before."""

    model: str
    commit: str
    path: Path
    files: int
    total_bytes: int
    downloaded_bytes: int


def fetch(model: str, revision: str, into: Path, say: Say, *, verify: bool = False) -> Fetched:
    """Bring a model into the cache folder `into`, and keep what `revision` means now. `verify` hashes again what was
    verified before. Raises WrongUseError for what is no hub id, PreflightError for what the hub refuses or the disk cannot
    hold, LabctlError where the hub cannot be reached or sends something else than it announces."""
    check_id(model)
    try:
        commit = _commit(model, revision)
    except UnreachableError as error:
        return _as_it_was(model, revision, into, error, say)
    home = hub_cache.repository(into, model)
    with _turn(home, say):
        files = needed(_listed(model, commit))
        if not files:
            raise PreflightError(
                f"{model} holds no weights that an engine could load", "choose another model or revision"
            )
        snapshot = home / "snapshots" / commit
        absent = [file for file in files if not (snapshot / file.path).exists()]
        total, lacking = sum(file.size for file in files), sum(file.size for file in absent)
        _sweep(home / "blobs")
        check_space(into, lacking)
        if absent:
            say(f"{model} at {commit[:12]}: {len(absent)} files, {size_text(lacking)}, to {into}")
            _download(model, commit, absent, into, say)
        verified = home / f"labctl-verified-{commit}"
        if absent or verify or not verified.exists():
            if total >= 1 << 30:
                say(f"verifying {size_text(total)}")
            _verify(model, commit, snapshot, into, say)
            with suppress(OSError):  # a cache that others keep: it is verified again the next time
                verified.touch()
        if not hub_cache.COMMIT.fullmatch(revision):
            _keep_reference(home / "refs" / revision, commit)
    return Fetched(model, commit, snapshot, len(files), total, lacking)


def _as_it_was(model: str, revision: str, into: Path, error: LabctlError, say: Say) -> Fetched:
    """What an earlier fetch has left, where the hub cannot be asked. Raises the error where that is nothing whole."""
    cached = hub_cache.find(into, model, revision)
    if cached is None or not cached.whole:
        raise error
    say(f"{error.message}; whether {revision!r} has moved since the last fetch is not known")
    sizes = [file.stat().st_size for file in cached.path.rglob("*") if file.is_file()]
    return Fetched(model, cached.commit, cached.path, len(sizes), sum(sizes), 0)


def needed(files: Iterable[HubFile]) -> list[HubFile]:
    """What an engine loads: configuration, tokenizer, and one form of the weights, safetensors before any other."""
    own = [file for file in files if not file.path.startswith(_OTHER_FORMS)]
    safetensors = [file for file in own if file.path.endswith(".safetensors")]
    # Mistral's repositories hold their weights twice: in shards, and "consolidated".
    plain = [file for file in safetensors if not Path(file.path).name.startswith("consolidated")]
    torch = [file for file in own if file.path.endswith(".bin") and "training_args" not in file.path]
    weights = plain or safetensors or torch
    return [file for file in own if Path(file.path).suffix in _TEXT] + weights if weights else []


# ---------------------------------------------------------------- the hub


class UnreachableError(LabctlError):
    """The hub does not answer, or its answer breaks off: to try again may help."""


@contextmanager
def _asking(model: str, revision: str) -> Iterator[None]:
    """The client's errors as labctl's, each with what to do."""
    try:
        yield
    except LabctlError:
        raise
    except Exception as error:  # httpx, requests, urllib3, xet: each client has its own tree of errors
        if told := told_of(error, model, revision) or _of_status(error, model):
            raise told from None
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LabctlError(f"the disk or your quota is full: {error.strerror}", _MOVE) from None
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise  # this machine's disk, not the hub's answer
        reason = next(filter(None, map(str.strip, str(error).splitlines())), "")
        what = f"the hub did not answer for {model}: {type(error).__name__}: {reason}".rstrip(": ")
        raise UnreachableError(what, _LATER) from None


def _of_status(error: Exception, model: str) -> LabctlError | None:
    """What the hub answers to a token that it does not accept, or that may not read the model."""
    from huggingface_hub import constants

    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status == 401:
        remedy = f"make a new one at {constants.ENDPOINT}/settings/tokens"
        return PreflightError("the hub does not accept your token", remedy)
    if status == 403:
        return PreflightError(
            f"the hub refuses {model} to you (403)",
            f"look at {constants.ENDPOINT}/{model}: its terms may have to be accepted; or your token may not read it",
        )
    return None


def _commit(model: str, revision: str) -> str:
    from huggingface_hub import HfApi

    with _asking(model, revision):
        found = HfApi().model_info(model, revision=revision, timeout=10.0).sha
    if found is None:
        raise LabctlError(f"the hub names no commit of {model}", "try again")
    return found


def _listed(model: str, commit: str) -> list[HubFile]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with _asking(model, commit):
        entries = list(HfApi().list_repo_tree(model, revision=commit, recursive=True))
    return [HubFile(entry.path, entry.size) for entry in entries if isinstance(entry, RepoFile)]


def _download(model: str, commit: str, files: Sequence[HubFile], into: Path, say: Say) -> None:
    """One file after the other, in this thread: Ctrl-C ends it at once, and the client removes what is half there."""
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
                say(f"{error.message}: going on in {WAIT_S[attempt]:.0f} s with what is missing")
                time.sleep(WAIT_S[attempt])


def _verify(model: str, commit: str, snapshot: Path, into: Path, say: Say) -> None:
    """Read every file, and download once more what is not as the hub announces. Raises LabctlError where it comes so again."""
    from huggingface_hub import HfApi

    if not hasattr(HfApi, "verify_repo_checksums"):
        say("sizes alone were verified: huggingface_hub 1.1 and later verify checksums")
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
            if blob.is_relative_to(snapshot.parent.parent.resolve()):  # nothing outside this model's folder
                blob.unlink(missing_ok=True)
        names = ", ".join(file.path for file in damaged)
        if last:
            raise LabctlError(
                f"{names} came twice with another content than the hub announces, and was removed",
                "try again later; if it goes on, a proxy or the disk between here and the hub damages files",
            )
        say(f"{names}: not what the hub announces, downloading again")
        _download(model, commit, damaged, into, say)


# ---------------------------------------------------------------- the disk


@contextmanager
def _turn(home: Path, say: Say) -> Iterator[None]:
    """One fetch of a model at a time; another waits, and finds what the first has brought."""
    lock = home.parent / ".locks" / home.name / "labctl.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise LabctlError(
            f"{home.parent} cannot be written: {error.strerror}", "set HF_HOME to a folder of yours that nodes share"
        ) from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as SQLite locks: it works on network filesystems too
        except OSError:
            say("another labctl fetch brings this model: waiting for it")
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _sweep(blobs: Path) -> None:
    """Remove what killed downloads left: each writes to a file of its own, that no later one goes on with."""
    for part in blobs.glob(PART):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > FORGOTTEN_AFTER_S:
                part.unlink()


def check_space(into: Path, lacking: int) -> None:
    """Raises PreflightError where the disk of `into` cannot hold so many more bytes."""
    free = left_bytes(into)
    if lacking and free < lacking + SPARE_BYTES:
        raise PreflightError(
            f"{into} has {size_text(free)} left for you, the download needs {size_text(lacking)} and a GiB to spare",
            _MOVE,
        )


def _keep_reference(path: Path, commit: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(commit, encoding="utf-8")
    staging.replace(path)


def size_text(count: int) -> str:
    """So many bytes, as people say it."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
