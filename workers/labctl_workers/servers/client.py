"""The load generator, in a process of its own: that of `vllm bench serve`, with labctl's requests and arrivals.

    python -m labctl_workers.servers.client

Each line of standard input is a Load as JSON. The answers are lines too: "ready" (at the start, and when a load is prepared; it
begins at the next line of input), "ended" (the last answer has arrived), then "done" or "failed: REASON". Connections,
concurrency and clock readings are vLLM's. It runs in the engine's environment, without a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ENDPOINT = "/v1/completions"
BACKEND = "openai"  # of vLLM's client: completions of any such server
DETAILED = "vllm-bench.json"
MAX_REASON_CHARACTERS = 500


@dataclass
class Load:
    """The requests of one repeat. `prompts` are token ids, or texts. `bodies` are fields of each request's body, added to those
    of vLLM's client without the fields `removed`. `arrivals_s` are seconds after the start; None: all at once. `concurrency`
    limits the requests in flight (None: no limit). The result goes to `folder`."""

    base_url: str
    model: str
    prompts: list[Any]
    prompt_tokens: list[int]
    max_tokens: list[int]
    bodies: list[dict[str, Any]]
    folder: str
    removed: list[str] = field(default_factory=list)
    arrivals_s: list[float] | None = None
    concurrency: int | None = None


@dataclass
class Answer:
    """What the client saw of one request. `sent_at` and `times` are readings of `time.perf_counter`; `times[i]` is that of chunk
    i, which has the text `texts[i]` and, if the server returns them, the token ids `token_ids[i]`. `lag_s`: from its arrival
    by the schedule until the client turned to it. Token counts are the server's. `error` is "" if the request succeeded."""

    sent_at: float = 0.0
    times: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    token_ids: list[list[int]] | None = None
    finish_reason: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    lag_s: float = 0.0
    error: str = ""


@dataclass
class Outcome:
    """A load's answers, in order. The window begins at `started_at` and lasts `wall_s`, as vLLM measures it; `busy_s` is how long
    the client's thread worked or waited for a CPU in it."""

    started_at: float
    wall_s: float
    busy_s: float
    answers: list[Answer]


def main() -> None:
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # vLLM's client prints a table for each load

    def say(word: str) -> None:
        channel.write(f"{word}\n")
        channel.flush()

    from vllm.benchmarks import serve

    say("ready")
    for line in sys.stdin:
        load = Load(**json.loads(line))
        try:
            _write(Driver(serve, load, say).drive(), Path(load.folder))
        except Exception as error:
            print(f"client: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            text = " ".join(str(error).split()) or type(error).__name__
            say(f"failed: {text[:MAX_REASON_CHARACTERS]}")
        else:
            say("done")


def _write(outcome: Outcome, folder: Path) -> None:
    (folder / "outcome.json").write_text(json.dumps(asdict(outcome)), encoding="utf-8")


def read_outcome(folder: Path) -> Outcome:
    """The outcome that a client wrote."""
    outcome = Outcome(**json.loads((folder / "outcome.json").read_text(encoding="utf-8")))
    outcome.answers = [Answer(**answer) for answer in outcome.answers]  # type: ignore[arg-type]
    return outcome


class TokenPrompt(list):  # type: ignore[type-arg]
    """Token ids that know the number of their request."""

    number = 0


class TextPrompt(str):
    """A text that knows the number of its request."""

    number = 0


class NoTokenizer:
    """In the place of the tokenizer that vLLM's client would load. The server counts tokens, but vLLM 0.26 asserts that there is
    a tokenizer, even with --skip-tokenizer-init."""

    input_ids = (0,)  # of any text

    def __bool__(self) -> bool:
        return False

    def __call__(self, *_: Any, **__: Any) -> NoTokenizer:
        return self


class Driver:
    """Drives one load with `vllm.benchmarks.serve`, whose requests, arrivals, tokenizer and request function it replaces."""

    def __init__(self, serve: Any, load: Load, say: Callable[[str], None]) -> None:
        self.serve = serve
        self.load = load
        self.say = say
        self.request_of_vllm = serve.ASYNC_REQUEST_FUNCS[BACKEND]
        self.answers = [Answer() for _ in load.prompts]
        self.received: list[list[bytes]] = [[] for _ in load.prompts]
        self.seen: list[Any] = [None] * len(load.prompts)  # vLLM's own output of each request
        self.left = len(load.prompts)
        self.started_at = self.busy_before = self.busy_s = 0.0

    def drive(self) -> Outcome:
        serve = self.serve
        serve.get_samples = self.samples
        serve.get_request = self.arrivals
        serve.get_tokenizer = lambda *_, **__: NoTokenizer()
        serve.ASYNC_REQUEST_FUNCS[BACKEND] = self.request
        try:
            serve.main(self.arguments())
        finally:
            serve.ASYNC_REQUEST_FUNCS[BACKEND] = self.request_of_vllm
        detailed = json.loads((Path(self.load.folder) / DETAILED).read_text(encoding="utf-8"))
        for index, answer in enumerate(self.answers):
            self.finish(index, answer)
        return Outcome(self.started_at, float(detailed["duration"]), self.busy_s, self.answers)

    def arguments(self) -> argparse.Namespace:
        """The arguments of `vllm bench serve`; those that a version does not have are left out."""
        parser = argparse.ArgumentParser()
        self.serve.add_cli_args(parser)
        wanted: dict[str, str | None] = {
            "--backend": BACKEND,
            "--base-url": self.load.base_url,
            "--endpoint": ENDPOINT,
            "--model": self.load.model,
            "--dataset-name": "custom",
            "--num-prompts": str(len(self.load.prompts)),
            "--max-concurrency": None if self.load.concurrency is None else str(self.load.concurrency),
            "--ready-check-timeout-sec": "0",
            "--num-warmups": "0",
            "--result-dir": self.load.folder,
            "--result-filename": DETAILED,
        }
        flags = ["--disable-tqdm", "--save-result", "--save-detailed"]
        known = {name for action in parser._actions for name in action.option_strings}
        words = [flag for flag in flags if flag in known]
        for name, value in wanted.items():
            if value is not None and name in known:
                words += [name, value]
        return parser.parse_args(words)

    def samples(self, *_: Any, **__: Any) -> list[Any]:
        """labctl's requests, in the place of `get_samples`; waits for the line that begins the load."""
        made = []
        for index, (prompt, tokens, limit) in enumerate(
            zip(self.load.prompts, self.load.prompt_tokens, self.load.max_tokens, strict=True)
        ):
            own: TokenPrompt | TextPrompt = TextPrompt(prompt) if isinstance(prompt, str) else TokenPrompt(prompt)
            own.number = index
            made.append(self.serve.SampleRequest(prompt=own, prompt_len=tokens, expected_output_len=limit))
        self.say("ready")
        if not sys.stdin.readline():
            raise EOFError("labctl's worker has ended")
        return made

    async def arrivals(self, requests: Sequence[Any], *_: Any, **__: Any) -> AsyncIterator[tuple[Any, float]]:
        """The requests at labctl's times, in the place of `get_request`."""
        self.started_at = time.perf_counter()
        self.busy_before = busy_s()
        for index, request in enumerate(requests):
            if self.load.arrivals_s is not None:
                due = self.started_at + self.load.arrivals_s[index]
                while (left := due - time.perf_counter()) > 0:
                    await asyncio.sleep(left)
                self.answers[index].lag_s = time.perf_counter() - due
            yield request, float("inf")

    async def request(self, request_func_input: Any, session: Any, pbar: Any = None) -> Any:
        """vLLM's request function, with labctl's fields in the body and a copy of what the server sends."""
        index = request_func_input.prompt.number
        self.answers[index].sent_at = time.perf_counter()
        output = await self.request_of_vllm(request_func_input, _Session(session, self, index), pbar)
        self.seen[index] = output
        self.left -= 1
        if not self.left:
            self.busy_s = busy_s() - self.busy_before
            self.say("ended")
        return output

    def body(self, index: int, sent: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in sent.items() if name not in self.load.removed}
        return {**kept, **self.load.bodies[index]}

    def finish(self, index: int, answer: Answer) -> None:
        """Read the copy of what the server sent, after the window; the times are those of vLLM's client."""
        output = self.seen[index]
        chunks, usage, refused = _chunks(b"".join(self.received[index]))
        if refused or not output.success:
            answer.error = refused or answer.error or _last_line(output.error) or "request failed"
            return
        reading = answer.sent_at + output.ttft
        answer.times = [reading]
        for gap in output.itl:
            reading += gap
            answer.times.append(reading)
        if len(answer.times) != len(chunks):
            answer.error = f"the client timed {len(answer.times)} chunks, the server sent {len(chunks)}"
            return
        answer.texts = [chunk.get("text") or "" for chunk in chunks]
        if all(chunk.get("token_ids") is not None for chunk in chunks):
            answer.token_ids = [chunk["token_ids"] for chunk in chunks]
        answer.finish_reason = next((r for chunk in reversed(chunks) if (r := chunk.get("finish_reason"))), "")
        answer.prompt_tokens, answer.output_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")


class _Session:
    """aiohttp's session as vLLM's request function sees it: it changes the body, and copies the answer."""

    def __init__(self, session: Any, driver: Driver, index: int) -> None:
        self.session = session
        self.driver = driver
        self.index = index

    @contextlib.asynccontextmanager
    async def post(self, url: str, *, json: dict[str, Any], headers: dict[str, str]) -> AsyncIterator[Any]:
        body = self.driver.body(self.index, json)
        async with self.session.post(url=url, json=body, headers=headers) as response:
            if response.status != 200:
                text = " ".join((await response.text()).split())[:MAX_REASON_CHARACTERS]
                self.driver.answers[self.index].error = f"HTTP {response.status} {response.reason}: {text}"
            yield _Response(response, self.driver.received[self.index])


class _Response:
    def __init__(self, response: Any, received: list[bytes]) -> None:
        self.status = response.status
        self.reason = response.reason
        self.content = _Content(response.content, received)


class _Content:
    def __init__(self, content: Any, received: list[bytes]) -> None:
        self.content = content
        self.received = received

    async def iter_any(self) -> AsyncIterator[bytes]:
        async for part in self.content.iter_any():
            self.received.append(part)
            yield part

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self.content:
            self.received.append(part)
            yield part


def _chunks(received: bytes) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """The choices of each event that has some, the usage, and the server's error, "" without one."""
    chunks: list[dict[str, Any]] = []
    usage: dict[str, Any] = {}
    for event in received.decode("utf-8", "replace").split("\n\n"):
        data = event.strip().removeprefix("data:").strip()
        if not data.startswith("{"):
            continue
        try:
            message = json.loads(data)
        except ValueError:
            continue
        if message.get("error"):
            error = message["error"]
            return [], {}, str(error.get("message") or error) if isinstance(error, dict) else str(error)
        if message.get("choices"):
            chunks.append(message["choices"][0])
        usage = message.get("usage") or usage
    return chunks, usage, ""


def busy_s() -> float:
    """How long this thread has worked or waited for a CPU, in seconds; without the wait where Linux does not count it."""
    waited_ns = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        waited_ns = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    return time.thread_time() + waited_ns / 1e9


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:MAX_REASON_CHARACTERS] if lines else ""


if __name__ == "__main__":
    main()
