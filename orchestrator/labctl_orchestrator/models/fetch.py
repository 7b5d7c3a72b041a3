"""A hub model -> the cache, whole, verified and pinned: on the login node, before a job needs it.

huggingface_hub's own client downloads, several files at a time, and goes on where a connection was cut. What is added here:
which files a load needs, one download though several ask, the checksums (the client looks at sizes alone), and what to do
about each way to fail.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from labctl_orchestrator.models import hub_cache
from labctl_orchestrator.models.disk_space import left_bytes
from labctl_orchestrator.models.resolve import check_id
from labctl_slurm.errors import LabctlError, PreflightError, WrongUseError
from labctl_workers.record import read_json, write_json

ATTEMPTS = 4
WAIT_S = (1.0, 3.0, 10.0)  # between attempts; the client has retried by itself before
FILES_AT_ONCE = 4
SPARE_BYTES = 1 << 30
BLOCK_BYTES = 1 << 22
RECEIPT = "labctl-verified.json"
PART = "*.????????.incomplete"  # of huggingface_hub 1.x; the plain *.incomplete of earlier ones is gone on with
FORGOTTEN_AFTER_S = 86400.0
EXIT_INTERRUPTED = 130
_TEXT = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
# Other forms of the same weights: of another framework, of the model's own code, or a second copy.
_OTHER_FORMS = ("original/", "onnx/", "openvino/", "coreml/", "gguf/", "metal/")

Say = Callable[[str], None]


@dataclass(frozen=True)
class HubFile:
    """A file of the repository: `digest` is its SHA-256 where git keeps it as a large file, else git's own SHA-1."""

    path: str
    size: int
    digest: str


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
    with _turn(hub_cache.repository(into, model), say):
        files = needed(_listed(model, commit))
        if not files:
            raise PreflightError(
                f"{model} holds no weights that an engine could load", "choose another model or revision"
            )
        snapshot = hub_cache.repository(into, model) / "snapshots" / commit
        absent = [file for file in files if not (snapshot / file.path).exists()]
        total, lacking = sum(file.size for file in files), sum(file.size for file in absent)
        _sweep(hub_cache.repository(into, model) / "blobs")
        check_space(into, lacking)
        if absent:
            say(f"{model} at {commit[:12]}: {len(absent)} files, {size_text(lacking)}, to {into}")
            _download(model, commit, files, into, say)
        damaged = _damaged(snapshot, files, say, again=verify)
        if damaged:
            say(f"{', '.join(file.path for file in damaged)}: not what the hub announces, downloading again")
            _remove(snapshot, damaged)
            _download(model, commit, files, into, say)
            _refuse_damage(snapshot, _damaged(snapshot, damaged, say, again=True))
        if not hub_cache.COMMIT.fullmatch(revision):
            _keep_reference(hub_cache.repository(into, model) / "refs" / revision, commit)
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
    weights = (
        plain
        or safetensors
        or [file for file in own if file.path.endswith(".bin") and "training_args" not in file.path]
    )
    if not weights:
        return []
    texts = [file for file in own if Path(file.path).suffix in _TEXT]
    return texts + weights


# ---------------------------------------------------------------- the hub


def _commit(model: str, revision: str) -> str:
    from huggingface_hub import HfApi

    with _told(model, revision):
        found = HfApi().model_info(model, revision=revision, timeout=10.0).sha
    if found is None:
        raise LabctlError(f"the hub names no commit of {model}", "try again")
    return found


def _listed(model: str, commit: str) -> list[HubFile]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with _told(model, commit):
        entries = list(HfApi().list_repo_tree(model, revision=commit, recursive=True))
    return [HubFile(entry.path, entry.size, _digest(entry)) for entry in entries if isinstance(entry, RepoFile)]


def _digest(entry: Any) -> str:
    return str(entry.lfs.sha256 if entry.lfs is not None else entry.blob_id)


def _download(model: str, commit: str, files: Sequence[HubFile], into: Path, say: Say) -> None:
    from huggingface_hub import snapshot_download

    for attempt in range(ATTEMPTS):
        try:
            with _told(model, commit):
                snapshot_download(
                    model,
                    revision=commit,
                    cache_dir=into,
                    allow_patterns=[glob.escape(file.path) for file in files],
                    max_workers=FILES_AT_ONCE,
                )
            return
        except UnreachableError as error:
            if attempt + 1 == ATTEMPTS:
                raise
            say(f"{error.message}: going on in {WAIT_S[attempt]:.0f} s with what is missing")
            time.sleep(WAIT_S[attempt])


class UnreachableError(LabctlError):
    """The hub does not answer, or its answer breaks off: to try again may help."""


@contextmanager
def _told(model: str, revision: str) -> Iterator[None]:
    """The client's errors as labctl's, each with what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except LabctlError:
        raise
    except GatedRepoError as error:
        raise gated(model, constants.ENDPOINT) from error
    except RepositoryNotFoundError:
        raise PreflightError(f"the hub has no model {model}, or not for you", _spelling()) from None
    except RevisionNotFoundError:
        raise PreflightError(f"{model} has no revision {revision!r} on the hub", "correct --revision") from None
    except OfflineModeIsEnabled:
        raise WrongUseError(
            "HF_HUB_OFFLINE is set in this shell, so nothing can be fetched", "unset HF_HUB_OFFLINE"
        ) from None
    except HfHubHTTPError as error:
        raise _http(model, error, constants.ENDPOINT) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LabctlError(f"the disk or your quota is full: {error.strerror}", _MOVE) from None
        if error.errno is not None and error.filename is not None:
            raise  # this machine's disk, not the hub's answer
        raise UnreachableError(f"the download of {model} broke off: {_first_line(error)}", _LATER) from None
    except Exception as error:  # httpx, requests, urllib3, xet: each client has its own tree of errors
        raise UnreachableError(
            f"the hub did not answer: {type(error).__name__}: {_first_line(error)}", _LATER
        ) from None


_MOVE = "set HF_HOME to a folder with more room that nodes share, here and in env of the partition"
_LATER = "labctl fetch again goes on with what is missing; behind a proxy, set HTTPS_PROXY"


def gated(model: str, endpoint: str) -> PreflightError:
    """A model whose owner wants terms accepted, for somebody without a token, or whose account was not let in."""
    page = f"{endpoint}/{model}"
    if _token() is None:
        return PreflightError(
            f"{model} is gated, and no token was found",
            f"accept its terms at {page}, make a token that may read it at {endpoint}/settings/tokens, and"
            " export HF_TOKEN=hf_... in this shell (labctl writes it nowhere)",
        )
    return PreflightError(
        f"{model} is gated, and your token's account has not been let in",
        f"accept its terms at {page} (some owners take days to answer); a fine-grained token must be allowed to read gated"
        " repositories",
    )


def _http(model: str, error: Any, endpoint: str) -> LabctlError:
    status = getattr(error.response, "status_code", 0)
    if status == 401:
        return PreflightError("the hub does not accept your token", f"make a new one at {endpoint}/settings/tokens")
    if status == 403:
        return PreflightError(
            f"the hub refuses {model} to you (403)",
            f"look at {endpoint}/{model}: its terms may have to be accepted; or your token may not read it",
        )
    return UnreachableError(f"the hub answered {status or 'an error'}: {_first_line(error)}", _LATER)


def _spelling() -> str:
    private = "" if _token() else "; for a private model export HF_TOKEN"
    return f"check its spelling{private}"


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


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


def interrupted(into: Path, say: Say) -> NoReturn:
    """End this process at once, its half-written files removed. The client's threads would go on until each file is there."""
    for handle in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            part = handle.readlink()
            if part.is_relative_to(into.resolve()) and part.match(PART):
                part.unlink()
    say("interrupted; what has come whole is kept, and labctl fetch again goes on with the rest")
    os._exit(EXIT_INTERRUPTED)


def check_space(into: Path, lacking: int) -> None:
    """Raises PreflightError where the disk of `into` cannot hold so many more bytes."""
    free = left_bytes(into)
    if lacking and free < lacking + SPARE_BYTES:
        raise PreflightError(
            f"{into} has {size_text(free)} left for you, the download needs {size_text(lacking)} and a GiB to spare",
            _MOVE,
        )


def _damaged(snapshot: Path, files: Sequence[HubFile], say: Say, *, again: bool) -> list[HubFile]:
    """The files whose content is not what the hub announces. What was found right once is not read again, unless `again`
    asks for it or the file has changed since."""
    path = snapshot.parent.parent / RECEIPT
    known: Mapping[str, Any] = {} if again else _receipt(path)
    verified, damaged = dict(_receipt(path)), []
    unread = sum(file.size for file in files if known.get(file.digest) != _mark(snapshot / file.path))
    if unread >= 1 << 30:
        say(f"verifying {size_text(unread)}")
    for file in files:
        place = snapshot / file.path
        mark = _mark(place)
        if mark is not None and known.get(file.digest) == mark:
            continue
        if mark is None or not _is(place, file):
            damaged.append(file)
            verified.pop(file.digest, None)
        else:
            verified[file.digest] = mark
    with suppress(OSError):  # a cache that others keep: it is verified again the next time
        write_json(path, verified)
    return damaged


def _receipt(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (OSError, ValueError):
        return {}


def _mark(place: Path) -> list[int] | None:
    try:
        stat = place.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _is(place: Path, file: HubFile) -> bool:
    if place.stat().st_size != file.size:
        return False
    # git names a small file by the SHA-1 of "blob SIZE\0" and its content
    git = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    digest = hashlib.sha256() if len(file.digest) == 64 else git
    with place.open("rb") as content:
        while block := content.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest() == file.digest


def _remove(snapshot: Path, files: Iterable[HubFile]) -> None:
    for file in files:
        link = snapshot / file.path
        blob = link.resolve()
        link.unlink(missing_ok=True)
        if blob.is_relative_to(snapshot.parent.parent.resolve()):  # nothing outside this model's folder
            blob.unlink(missing_ok=True)


def _refuse_damage(snapshot: Path, damaged: Sequence[HubFile]) -> None:
    if not damaged:
        return
    _remove(snapshot, damaged)
    names = ", ".join(file.path for file in damaged)
    raise LabctlError(
        f"{names} came twice with another content than the hub announces, and was removed",
        "try again later; if it goes on, a proxy or the disk between here and the hub damages files",
    )


def _keep_reference(path: Path, commit: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(commit, encoding="utf-8")
    staging.replace(path)


def size_text(count: int) -> str:
    """So many bytes, as people say it."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
