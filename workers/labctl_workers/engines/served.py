"""An engine behind its own server: requests over HTTP, from a load generator on the same node.

The server and the load generator start with the engine load, and all runs of the job use them. The clock readings are the
client's: they contain the server's front end and the network stack.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from labctl_workers import hardware, stdout
from labctl_workers.engines.base import (
    Answers,
    Arrivals,
    Generated,
    Generation,
    Request,
    ServedAnswers,
    announce_gpus,
    refusals_of,
)
from labctl_workers.engines.text import TextEngine
from labctl_workers.probe import VLLM_DISTRIBUTIONS, installed_versions
from labctl_workers.record import (
    ClientReport,
    DeviceMemory,
    EngineCounts,
    EngineFingerprint,
    JobSpec,
    Refusal,
    RunSpec,
    TaskAnswers,
)
from labctl_workers.servers import harness, server_class
from labctl_workers.servers.base import SEE_THE_LOG, ChildProcess, ClientProcess, ServerProcess
from labctl_workers.servers.client import ENDPOINT, Answer, Load, read_outcome

CLIENT = "vllm bench serve"
# A killed engine may leave a server that answers no request: how long its health may be bad while requests wait.
UNHEALTHY_FOR_S = 15.0
ENDED = ("server-ended", "client-ended")  # kinds of refusals after which no run can be measured


@dataclass(kw_only=True)
class ServedFingerprint(EngineFingerprint):
    """`client`: the load generator. `engine_arguments`: those of the engine behind the server."""

    client: str
    engine_arguments: Mapping[str, object]


class ServedEngine(TextEngine):
    """The server of the job's backend (servers), and one load generator for all runs of the job."""

    OPTIONS: ClassVar[dict[str, type]] = {}  # those of the backend's engine
    PARALLEL: ClassVar[tuple[str, ...]] = ()

    def __init__(self, job: JobSpec, cache: Path) -> None:
        self.job = job
        self.kind = server_class(job.backend)(job, cache)
        self.server: ServerProcess | None = None
        self.client: ClientProcess | None = None
        self.gpus = hardware.visible_gpus()[: job.gpus] if job.device == "cuda" else []
        self.folder = Path()
        self.unhealthy_since: float | None = None
        self.ended: Refusal | None = None
        self._counts = EngineCounts()

    @classmethod
    def foreseen(cls, job: JobSpec, config: Any, packages: Mapping[str, str] | None) -> Iterator[Refusal]:
        """See engines.base."""
        try:
            kind = server_class(job.backend)
        except Refusal as refusal:
            yield refusal
            return
        yield from kind.foreseen(job, config, packages)
        if packages is not None and any(run.tasks for run in job.runs):
            yield from refusals_of(lambda: harness.check_version(packages.get(harness.DISTRIBUTION), job.partition))

    # ------------------------------------------------------------ load

    def load(self) -> tuple[float | None, float]:
        started = time.perf_counter()
        self.text = self.kind.prepare()
        self.folder = Path(tempfile.mkdtemp(prefix="labctl-served-"))
        key = secrets.token_urlsafe(32)
        self.server = ServerProcess(self.kind, key)
        self.client = ClientProcess(key)
        self.server.wait_until_healthy()
        self.client.expect("ready", self._check)
        # The first request pays for work that servers postpone: no run must.
        first = Request(0, self.encode(["Hello"])[0], 4)
        self.generate([first], Generation(Arrivals(1), ignore_eos=True))
        announce_gpus(self.job)
        stdout.print_line(f"server: {self.job.backend} at {self.server.url}, load generator: {CLIENT}")
        return None, time.perf_counter() - started

    def _check(self) -> None:
        """While requests wait. Raises Refusal where the server has ended, or answers no health check for a while."""
        if self.server is None:
            return
        self.server.check()
        if self.server.status("/health") == 200:
            self.unhealthy_since = None
            return
        now = time.monotonic()
        self.unhealthy_since = self.unhealthy_since or now
        if now - self.unhealthy_since > UNHEALTHY_FOR_S:
            raise Refusal("server-ended", f"server does not answer: {self.server.reason()}", SEE_THE_LOG)

    # ------------------------------------------------------------ generate

    def generate(self, requests: Sequence[Request], how: Generation) -> Answers:
        if self.server is None or self.client is None:
            raise RuntimeError("the server is not loaded")
        if self.ended is not None:  # in an earlier run of the job
            raise self.ended
        load, times_s = self._load(requests, how), how.arrivals.times_s
        try:
            self.client.send(json.dumps(asdict(load)))
            self.client.expect("ready", self._check)
            counted_before = self._counted()
            energy_before = hardware.energy_j(self.gpus)
            self.client.send("go")
            self.client.expect("ended", self._check)
            energy_after = hardware.energy_j(self.gpus)
            counted_after = self._counted()
            self.client.expect("done", self._check)
        except Refusal as refusal:
            if refusal.kind in ENDED:
                self.ended = refusal
            raise
        self._counts = counts_between(counted_before, counted_after)
        outcome = read_outcome(self.folder)
        self._check_answers(outcome.answers)
        handed = [answer.sent_at for answer in outcome.answers]
        if times_s is not None:
            handed = [outcome.started_at + at for at in times_s]
        answers = [
            self._generated(request, answer, at)
            for request, answer, at in zip(requests, outcome.answers, handed, strict=True)
        ]
        if how.on_token is not None:
            for token in answers[0].token_ids:
                how.on_token(token)
        return ServedAnswers(
            answers,
            started_at=outcome.started_at,
            wall_s=outcome.wall_s,
            energy_j=None if energy_before is None or energy_after is None else energy_after - energy_before,
            client=ClientReport(
                CLIENT,
                busy_s=outcome.busy_s,
                lag_s=None if times_s is None else [answer.lag_s for answer in outcome.answers],
            ),
        )

    def _counted(self) -> dict[str, int]:
        """What the server has counted since its start, by field of EngineCounts."""
        counters = self.server.counters() if self.server is not None and self.kind.COUNTERS else {}
        return {field: counters[name] for field, name in self.kind.COUNTERS.items() if name in counters}

    def counts(self) -> EngineCounts:
        return self._counts

    def _load(self, requests: Sequence[Request], how: Generation) -> Load:
        prompts = {request.token_ids: self.kind.prompt(request) for request in dict.fromkeys(requests)}
        return Load(
            base_url=self.server.url if self.server else "",
            model=self.kind.model,
            prompts=[prompts[request.token_ids] for request in requests],
            prompt_tokens=[len(request.token_ids) for request in requests],
            max_tokens=[request.max_new_tokens for request in requests],
            bodies=[
                self.kind.body(index, request, how.sampling, ignore_eos=how.ignore_eos)
                for index, request in enumerate(requests)
            ],
            folder=str(self.folder),
            removed=list(self.kind.REMOVED),
            arrivals_s=None if how.arrivals.times_s is None else list(how.arrivals.times_s),
            concurrency=how.arrivals.in_flight if how.arrivals.in_flight < len(requests) else None,
        )

    def _check_answers(self, answers: Sequence[Answer]) -> None:
        """Raises Refusal where no request succeeded, or the server ended."""
        failed = [answer.error for answer in answers if answer.error]
        if self.server is not None and failed:
            time.sleep(1.0)  # a server whose engine died ends soon after
            self.server.check()
        if len(failed) == len(answers):
            raise Refusal("all-requests-failed", f"all {len(failed)} requests failed: {failed[0]}"[:300], SEE_THE_LOG)
        for error in list(dict.fromkeys(failed))[:5]:
            print(f"request failed ({failed.count(error)} of {len(answers)}): {error}", file=sys.stderr, flush=True)

    def _generated(self, request: Request, answer: Answer, handed_at: float) -> Generated:
        if answer.error:
            return Generated([], [], "error", len(request.token_ids), handed_at, error=answer.error)
        reason = "stop" if answer.finish_reason == "stop" else "length"
        if answer.token_ids is not None:
            ids = [token for chunk in answer.token_ids for token in chunk]
            times = [at for at, chunk in zip(answer.times, answer.token_ids, strict=True) for _ in chunk]
        else:
            found = self.kind.tokens(answer.texts, answer.times, answer.output_tokens or 0, reason)
            ids, times = found.ids, found.times
        text = None if ids else "".join(answer.texts)
        return Generated(ids, times, reason, answer.prompt_tokens or 0, handed_at, text=text)

    def log_probabilities(self, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float] | None:
        if not token_ids or self.server is None:
            return [] if not token_ids else None
        server = self.server
        scores = self.kind.scored(
            [*prompt, *token_ids], lambda body: server.post(ENDPOINT, {"model": self.kind.model, **body})
        )
        of_answer = None if scores is None else [score for score in scores[-len(token_ids) :] if score is not None]
        return of_answer if of_answer is not None and len(of_answer) == len(token_ids) else None

    def evaluate(self, run: RunSpec) -> list[TaskAnswers]:
        """The answers to the questions of the run's tasks, by lm-evaluation-harness against the server. Raises Refusal where the
        server ends."""
        if self.server is None:
            raise RuntimeError("the server is not loaded")
        sampling = run.sampling
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "do_sample": True}
        evaluation = harness.Evaluation(
            tasks=[task.to_json() for task in run.tasks],
            url=f"{self.server.url}{ENDPOINT}",
            model=self.kind.model,
            tokenizer=self.job.model.source,
            revision=self.job.model.revision,
            max_length=self.kind.longest(),
            sends_tokens=self.kind.TAKES_TOKENS,
            scores=self.kind.TAKES_TOKENS,
            seed=sampling.seed or 0,
            generation={"temperature": 0.0, "do_sample": False} if sampling.greedy else drawn,
        )
        harness.write_evaluation(self.folder, evaluation)
        (self.folder / harness.ANSWERS).unlink(missing_ok=True)
        words, variables = ["labctl_workers.servers.harness", str(self.folder)], {"TOKENIZERS_PARALLELISM": "false"}
        process = ChildProcess(words, self.server.key, variables)
        try:
            process.wait(self._check)
            return harness.read_answers(self.folder)
        except OSError:
            return [
                TaskAnswers(task.name, error=f"the harness ended with status {process.status}") for task in run.tasks
            ]
        finally:
            process.close()

    # ------------------------------------------------------------ memory and the rest

    def reset(self) -> None:
        """The server reports no peak."""
        self.kind.begin_repeat()

    def memory(self) -> list[DeviceMemory]:
        """NVML's memory of each GPU; the server reports nothing else."""
        if not self.gpus:
            return [DeviceMemory("cpu")]
        return [
            DeviceMemory(f"cuda:{index}", name=gpu.name, device_used_bytes=hardware.used_bytes(gpu.uuid))
            for index, gpu in enumerate(self.gpus)
        ]

    def read_bytes_per_step(self, context_tokens: float, requests: int) -> float | None:
        return None

    def fingerprint(self) -> ServedFingerprint:
        evaluates = any(run.tasks for run in self.job.runs)
        others = ("aiohttp", *((harness.DISTRIBUTION,) if evaluates else ()))
        return ServedFingerprint(
            packages=installed_versions((*self.kind.PACKAGES, *VLLM_DISTRIBUTIONS, *others)),
            effective_dtype=self.job.dtype,
            attention=self.kind.attention,
            model_revision=self.job.model.revision,
            client=CLIENT,
            engine_arguments=self.kind.engine_arguments,
        )

    def close(self) -> None:
        """End the load generator, and the server with all its processes."""
        if self.client is not None:
            self.client.close()
        if self.server is not None:
            self.server.close()
        self.client = self.server = None
        if self.folder.name:
            shutil.rmtree(self.folder, ignore_errors=True)


def counts_between(before: Mapping[str, int], after: Mapping[str, int]) -> EngineCounts:
    """What a server counted between two readings of its counters."""
    gained: dict[str, Any] = {field: value - before[field] for field, value in after.items() if field in before}
    counts = EngineCounts(**gained)
    if not counts.queried_tokens:  # 0 without prefix caching
        counts.queried_tokens = counts.cached_tokens = None
    return counts
