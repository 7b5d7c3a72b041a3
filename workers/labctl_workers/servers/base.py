"""The interface of a server, and its process and that of the load generator.

The server listens on 127.0.0.1, on a random port. Its key is random, and only in the environment of its own processes.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import os
import re
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from labctl_workers import children
from labctl_workers.engines.base import Request
from labctl_workers.record import JobSpec, Refusal, Sampling

HOST = "127.0.0.1"
HEALTH = "/health"
ENDS_WITHIN_S = 2.0  # after SIGTERM
TAIL_LINES = 40
PR_SET_PDEATHSIG = 1  # linux/prctl.h
ACCESS_LOG = re.compile(
    rb'"(GET|POST) /\S* HTTP/1\.[01]" (200|404)'
)  # 404: of /metrics, which the load generator asks for


class Server(Protocol):
    """One engine's OpenAI-compatible server: its command, and the form of its requests.

    OPTIONS are the engine options that it takes. PACKAGES are those whose versions are recorded.
    TAKES_TOKENS: prompts are token ids, and the server gives log-probabilities of a prompt.
    COUNTERS are the names in its /metrics of the fields of EngineCounts; {} without /metrics.
    `model` is the model's name in requests, and REMOVED are the fields of vLLM's client that it refuses.
    """

    OPTIONS: ClassVar[frozenset[str]]
    PACKAGES: ClassVar[Sequence[str]]
    REMOVED: ClassVar[Sequence[str]]
    TAKES_TOKENS: ClassVar[bool]
    COUNTERS: ClassVar[Mapping[str, str]]
    model: str

    def __init__(self, job: JobSpec, cache: Path) -> None: ...

    @classmethod
    def foreseen(cls, job: JobSpec, config: Any, packages: Mapping[str, str] | None) -> Iterator[Refusal]:
        """See engines.base: what the engine can, and its server cannot."""

    def prepare(self) -> Any:
        """Check the node, set the environment and read the checkpoint; returns its tokenizer (engines.text.Text). Raises
        Refusal."""

    def command(self, port: int) -> list[str]:
        """The command that listens on this port."""

    def variables(self, key: str) -> dict[str, str]:
        """Variables of the server's environment, with the key that it asks of its clients, if it can."""

    def prompt(self, request: Request) -> list[int] | str:
        """The prompt of a request: token ids, or a text that the server encodes to the same ids. Raises Refusal where it does
        not."""

    def body(self, index: int, request: Request, sampling: Sampling, *, ignore_eos: bool) -> dict[str, Any]:
        """Fields of the body of request number `index`."""

    def begin_repeat(self) -> None:
        """Before the requests of a repeat: if the server can, it finds no prompt of an earlier repeat in its prefix cache."""

    def tokens(self, texts: Sequence[str], times: Sequence[float], count: int, finish_reason: str) -> Tokens:
        """The tokens of an answer whose chunks have no token ids: see `Tokens`. `times` are those of the chunks."""

    def scored(self, sequence: Sequence[int], ask: Callable[[dict[str, Any]], Any]) -> list[float | None] | None:
        """The log-probability of each token of the sequence given those before it (None: the first); None if unknown. `ask`
        posts a completion request, and returns the answer."""

    def longest(self) -> int:
        """The longest sequence that it takes, in tokens."""

    @property
    def attention(self) -> str | None:
        """The implementation of attention that was asked for; None: the engine's choice."""

    @property
    def engine_arguments(self) -> Mapping[str, object]:
        """The engine's arguments, which may explain a difference."""


class Tokens:
    """The ids of an answer's tokens ([]: unknown), and a clock reading for each token."""

    def __init__(self, ids: Sequence[int], times: Sequence[float]) -> None:
        self.ids = list(ids)
        self.times = list(times)


# ---------------------------------------------------------------- processes


def free_port() -> int:
    """A port that no process listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def child_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for a child that imports labctl_workers, with these variables and no proxy for HOST."""
    environment = {**os.environ, **variables}
    code = str(Path(__file__).resolve().parent.parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), code)))
    for name in ("no_proxy", "NO_PROXY"):
        environment[name] = ",".join(filter(None, (environment.get(name), HOST)))
    return environment


def _end_with_parent() -> None:
    """In a new child: end it when this process is killed."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


_LIBC = ctypes.CDLL(None)


class ServerProcess:
    """A running server. Its output goes to standard error, without its access log."""

    def __init__(self, server: Server, key: str) -> None:
        self.key = key
        self.port = free_port()
        self.spared = set(children.descendants())
        command = server.command(self.port)
        print(f"server: {shlex.join(command)}", file=sys.stderr, flush=True)
        self.process = subprocess.Popen(
            command,
            env=child_environment(server.variables(key)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent,  # noqa: PLW1509  it calls one function of libc
        )
        self._tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self._closing = False
        self._copying = threading.Thread(target=self._copy, name="server-log", daemon=True)
        self._copying.start()
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def _copy(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the main thread handles them
        stream = self.process.stdout
        for line in stream or ():
            if not ACCESS_LOG.search(line):
                self._tail.append(line.decode("utf-8", "replace").strip())
                with contextlib.suppress(OSError):
                    if not self._closing:  # a server that is ended may report errors
                        os.write(2, line)

    def wait_until_healthy(self) -> None:
        """Raises Refusal where the server ends before it is healthy. The job's time limit ends the wait."""
        while True:
            self.check()
            if self.status(HEALTH) == 200:
                return
            time.sleep(0.2)

    def check(self) -> None:
        """Raises Refusal where the server has ended."""
        status = self.process.poll()
        if status is None:
            return
        self._copying.join(1.0)
        raise Refusal("server-ended", f"server ended with status {status}: {self.reason()}", SEE_THE_LOG)

    def reason(self) -> str:
        """The last line of the log that looks like an error, else the last line."""
        lines = [line for line in self._tail if line]
        errors = [line for line in lines if re.search(r"\w*(Error|Exception)\b: |error: ", line)]
        return (errors or lines or ["no output"])[-1][:200]

    def status(self, path: str) -> int | None:
        """The status of a GET request; None without an answer."""
        try:
            with self._opener.open(f"{self.url}{path}", timeout=5.0) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def counters(self) -> dict[str, int]:
        """The counters of its /metrics, each the sum over its labels; {} without an answer."""
        try:
            with self._opener.open(f"{self.url}/metrics", timeout=5.0) as answer:
                text = answer.read().decode("utf-8", "replace")
        except OSError:
            return {}
        found: collections.Counter[str] = collections.Counter()
        for name, value in re.findall(r"^(\S+_total)(?:{.*})? (\d\S*)$", text, re.MULTILINE):
            found[name] += round(float(value))
        return found

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON answer to a POST request. Raises OSError (HTTPError) and ValueError."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), headers)  # noqa: S310
        with self._opener.open(request, timeout=600.0) as answer:
            return json.load(answer)

    def close(self) -> None:
        """End the server and all its processes."""
        self._closing = True
        below = set(children.descendants()) - self.spared
        memory = children.shared_memory_of(below)
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(ENDS_WITHIN_S)
        children.end(self.spared)
        children.remove_shared_memory(memory)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)


SEE_THE_LOG = "read the job's log (labctl logs): it has the server's output"


class ChildProcess:
    """A module of labctl's with the server's key and these variables. Its output goes to standard error, if not to a pipe."""

    def __init__(
        self, words: Sequence[str], key: str, variables: Mapping[str, str], *, pipe: int | None = None
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words],
            env=child_environment({"OPENAI_API_KEY": key, **variables}),
            stdin=pipe or subprocess.DEVNULL,
            stdout=pipe or sys.stderr,
            preexec_fn=_end_with_parent,  # noqa: PLW1509  as above
        )

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self.process.poll()

    def wait(self, on_wait: Callable[[], None]) -> None:
        """Wait for its end. `on_wait` is called every second."""
        while True:
            try:
                self.process.wait(1.0)
            except subprocess.TimeoutExpired:
                on_wait()
            else:
                return

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)


class ClientProcess(ChildProcess):
    """The running load generator (servers.client). `on_wait` of its methods is called every second while labctl waits for it."""

    def __init__(self, key: str) -> None:
        variables = {"VLLM_NO_USAGE_STATS": "1"}
        super().__init__(["labctl_workers.servers.client"], key, variables, pipe=subprocess.PIPE)
        self._buffer = b""

    def send(self, line: str) -> None:
        pipe = self.process.stdin
        if pipe is None:
            raise ValueError("no pipe to the client")
        try:
            pipe.write(f"{line}\n".encode())
            pipe.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def expect(self, word: str, on_wait: Callable[[], None]) -> None:
        """Wait for this line. Raises Refusal where the client fails or ends."""
        line = self._line(on_wait)
        if line.startswith("failed: "):
            raise Refusal("client-failed", f"load generator failed: {line.removeprefix('failed: ')}", SEE_THE_LOG)
        if line != word:
            raise Refusal("client-failed", f"load generator said {line!r}, not {word!r}", SEE_THE_LOG)

    def _line(self, on_wait: Callable[[], None]) -> str:
        pipe = self.process.stdout
        if pipe is None:
            raise ValueError("no pipe from the client")
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(1.0):
                    on_wait()
                    continue
                received = os.read(pipe.fileno(), 65536)
                if not received:
                    raise self._ended()
                self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode("utf-8", "replace")

    def _ended(self) -> Refusal:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        return Refusal("client-ended", f"load generator ended with status {self.process.returncode}", SEE_THE_LOG)
