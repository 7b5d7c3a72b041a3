"""A stand-in for the hub on the loopback: it speaks the hub's protocol to huggingface_hub's own client, and `labctl fetch` is
tested with it.

It serves folders as models, and as data sets under names such as datasets/openai/gsm8k, whole or by ranges, counts what it sends,
and can be told to fail: to cut connections, to gate a model, to send other bytes than it announces. HF_ENDPOINT points a process
at it.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin")  # what git keeps as large files: announced by their SHA-256
BLOCK = 1 << 16


@dataclass
class Repository:
    """A model: its files, the commit that main is at, and what goes wrong when it is asked for.

    `cuts` is how many downloads of a file break off, each after `cut_after` bytes of what was asked for; `other_bytes` names
    files whose next downloads (so many) come with one byte changed; `gated` is the status that a reader gets who is not let
    in (`let_in` are the tokens of those who are); `slow_s` is waited before each block of a file.
    """

    folder: Path
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    gated: int = 0
    let_in: tuple[str, ...] = ()
    cuts: Counter[str] = field(default_factory=Counter)
    cut_after: int = 100_000
    other_bytes: Counter[str] = field(default_factory=Counter)
    slow_s: float = 0.0


class Hub:
    """The server; a context manager. `sent` counts the bytes of each file that left, `asked` the downloads of each file."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.sent: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.status = 0  # of every answer, where it is not 0: a hub that is down
        self.lock = threading.Lock()
        hub = self

        class Answer(_Answer):
            pass

        Answer.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name: str, folder: Path, **faults: Any) -> Repository:
        repository = self.repositories[name] = Repository(folder, **faults)
        return repository

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Answer(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        if self.hub.status:
            self._error(self.hub.status, "", "the hub is down")
            return
        path = unquote(urlsplit(self.path).path).replace("/api/models/", "/api/")
        name = r"((?:datasets/)?[^/]+/[^/]+)"
        api = re.fullmatch(rf"/api/{name}(?:/(revision|tree|auth-check)(?:/([^/]+)(/.+)?)?)?", path)
        resolve = re.fullmatch(rf"/{name}/resolve/([^/]+)/(.+)", path)
        match = api or resolve
        repository = self.hub.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            self._error(404, "RepoNotFound", "Repository not found")
            return
        kind = match[2] if api else None
        revision = match[3] if api else match[2]
        if revision not in (None, "main", repository.commit):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif api and match[4]:  # a folder within the model: none of these has one that anybody asks for
            self._error(404, "EntryNotFound", "Entry not found")
        elif api and kind == "tree":
            self._json([_entry(repository.folder, file) for file in _files(repository.folder)])
        elif api and kind != "auth-check":
            files = [{"rfilename": str(file.relative_to(repository.folder))} for file in _files(repository.folder)]
            self._json({"id": match[1], "modelId": match[1], "sha": repository.commit, "siblings": files})
        elif self._kept_out(repository):
            self._error(repository.gated, "GatedRepo", f"Access to model {match[1]} is restricted.")
        elif api:
            self._json({})
        else:
            self._file(repository, repository.folder / match[3])

    def _kept_out(self, repository: Repository) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return bool(repository.gated) and token not in repository.let_in

    def _file(self, repository: Repository, file: Path) -> None:
        if not file.is_file():
            self._error(404, "EntryNotFound", "Entry not found")
            return
        content = file.read_bytes()
        name = str(file.relative_to(repository.folder))
        start, stop = self._range(len(content))
        whole = (start, stop) == (0, len(content))
        self.send_response(200 if whole else 206)
        self.send_header("ETag", f'"{_digest(content, name)}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        if not whole:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        with self.hub.lock:
            self.hub.asked[name] += 1
            cut = repository.cuts[name] > 0
            repository.cuts[name] -= cut
            other = repository.other_bytes[name] > 0
            repository.other_bytes[name] -= other
        if other:
            content = bytes([content[0] ^ 1]) + content[1:]
        end = min(stop, start + repository.cut_after) if cut else stop
        self._send(repository, name, content[start:end])
        if cut:
            self.close_connection = True

    def _send(self, repository: Repository, name: str, content: bytes) -> None:
        for begin in range(0, len(content), BLOCK):
            if repository.slow_s:
                time.sleep(repository.slow_s)
            block = content[begin : begin + BLOCK]
            try:
                self.wfile.write(block)
            except OSError:  # the reader has gone
                self.close_connection = True
                return
            with self.hub.lock:
                self.hub.sent[name] += len(block)

    def _range(self, size: int) -> tuple[int, int]:
        """Where what is asked for begins and ends."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return 0, size
        self.hub.ranges.append(match[0])
        return int(match[1]), min(size, int(match[2]) + 1) if match[2] else size

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(folder: Path, file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    name = str(file.relative_to(folder))
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": _git(content)}
    if file.suffix in LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _digest(content: bytes, name: str) -> str:
    return hashlib.sha256(content).hexdigest() if Path(name).suffix in LARGE else _git(content)


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
