"""Served runs: what a server cannot do, and vLLM's load generator against a stand-in server that fails as a test asks.

Real servers: tests/slurm/test_served_jobs.py.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from labctl_orchestrator.analysis import doubts
from labctl_workers import children, measure
from labctl_workers.engines import foreseen, served
from labctl_workers.engines.base import Request
from labctl_workers.engines.served import ServedEngine
from labctl_workers.record import EngineCounts, JobSpec, ModelRef, Refusal, Repeat, RunSpec, Sampling
from labctl_workers.servers import transformers, vllm
from labctl_workers.servers.client import BACKEND, DETAILED, Answer, Driver, Load
from labctl_workers.workload import Size
from tests import fake_server
from tests.vllm_package import vllm_installed  # noqa: F401  a fixture

ROOT = Path(__file__).parent.parent
INSTALLED = {"torch": "2.9.0", "transformers": "5.19.0", "accelerate": "1.15.0", "vllm": "0.26.0"}


def job(**values: Any) -> JobSpec:
    asked: dict[str, Any] = {
        "job_id": "j", "partition": "dgxh", "executor": "local", "backend": "vllm", "model": ModelRef("a-llama"),
        "dtype": "float16", "device": "cuda", "gpus": 1, "runs": [], "prompt_sets": {}, "served": True,
    }  # fmt: skip
    return JobSpec(**{**asked, **values})


def kinds(asked: JobSpec, packages: dict[str, str] | None = None) -> list[str]:
    return [refusal.kind for refusal in foreseen(asked, None, packages)]


SAMPLED = RunSpec("r", {}, "p", 8, sampling=Sampling(0.7))


@pytest.mark.parametrize(
    ("asked", "packages", "kind"),
    [
        ({"backend": "staged"}, None, "no-server"),
        ({"backend": "hf", "gpus": 2}, None, "serve-one-gpu"),
        ({"backend": "hf", "runs": [SAMPLED]}, None, "serve-greedy"),
        ({"backend": "hf", "engine_options": {"cache_implementation": "static"}}, None, "serve-option"),
        ({"backend": "hf"}, {**INSTALLED, "transformers": "5.2.0"}, "transformers-too-old"),
        ({"backend": "hf"}, {k: v for k, v in INSTALLED.items() if k != "vllm"}, "client-missing"),
        ({"backend": "vllm"}, {**INSTALLED, "vllm": "0.10.2"}, "vllm-too-old"),
    ],
)
def test_what_a_server_cannot_do_is_refused_before_the_queue(
    asked: dict[str, Any], packages: dict[str, str] | None, kind: str
) -> None:
    assert kinds(job(**asked), packages) == [kind]
    assert kinds(job(**asked, served=False), packages) != [kind]


@pytest.mark.parametrize(
    "asked",
    [
        {"backend": "hf", "engine_options": {"attn_implementation": "sdpa"}},
        {"backend": "vllm", "runs": [SAMPLED], "gpus": 2, "engine_options": {"max_num_seqs": 8}},
    ],
)
def test_what_a_server_can_do_is_not_refused(asked: dict[str, Any]) -> None:
    assert kinds(job(**asked), INSTALLED) == []


def test_engine_arguments_become_options_of_the_command_line() -> None:
    arguments = {"max_model_len": 512, "enforce_eager": True, "enable_prefix_caching": False, "revision": None,
                 "compilation_config": {"level": 3}}  # fmt: skip
    assert vllm.flags(arguments) == [
        "--max-model-len", "512", "--enforce-eager", "--no-enable-prefix-caching", "--compilation-config", '{"level": 3}'
    ]  # fmt: skip


def test_a_repeat_finds_no_prompt_of_an_earlier_one_in_vllms_prefix_cache(tmp_path: Path) -> None:
    server = vllm.VllmServer(job(parallel="tensor"), tmp_path)
    server.arguments = {"enable_prefix_caching": True}

    def salts() -> list[str]:
        server.begin_repeat()
        bodies = [server.body(index, Request(0, (1,), 4), Sampling(), ignore_eos=True) for index in range(2)]
        return [body["cache_salt"] for body in bodies]

    first, second = salts(), salts()
    assert first[0] == first[1] != second[0] == second[1]
    server.arguments = {"enable_prefix_caching": False}
    assert "cache_salt" not in server.body(0, Request(0, (1,), 4), Sampling(), ignore_eos=True)


def test_repeats_that_transformers_serve_answers_from_its_cache_are_marked() -> None:
    (doubt,) = doubts.of_cache("hf", served=True, prompt_tokens=300)
    assert doubts.sentence(doubt.kind, [doubt.value]).startswith("prompts of 300 tokens")
    assert not doubts.of_cache("hf", served=True, prompt_tokens=256)
    assert not doubts.of_cache("hf", served=False, prompt_tokens=300)
    assert not doubts.of_cache("vllm", served=True, prompt_tokens=300)


# ---------------------------------------------------------------- tokens of a stream without token ids


@pytest.fixture(scope="module")
def server_of_texts(tmp_path_factory: pytest.TempPathFactory) -> transformers.TransformersServer:
    """With a byte-level tokenizer: a letter outside ASCII is several tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    hf = pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    server = transformers.TransformersServer(job(backend="hf"), tmp_path_factory.mktemp("cache"))
    server.text = SimpleNamespace(tokenizer=hf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>"))
    server.end_tokens = {len(alphabet)}
    return server


def test_a_token_without_text_of_its_own_has_the_time_of_the_next_chunk(
    server_of_texts: transformers.TransformersServer,
) -> None:
    encode = server_of_texts.text.tokenizer
    ids = [*encode("aéb")["input_ids"]]
    assert len(ids) == 4
    found = server_of_texts.tokens(["a", "é", "b", ""], [1.0, 3.0, 4.0, 4.5], 5, "stop")
    assert found.ids == [*ids, *server_of_texts.end_tokens]
    assert found.times == [1.0, 3.0, 3.0, 4.0, 4.5]
    by_length = server_of_texts.tokens(["a", "b", ""], [1.0, 2.0, 2.1], 2, "length")
    assert (by_length.ids, by_length.times) == (encode("ab")["input_ids"], [1.0, 2.0])


def test_tokens_that_the_text_does_not_tell_are_unknown_and_counted(
    server_of_texts: transformers.TransformersServer,
) -> None:
    found = server_of_texts.tokens(["a", "b", ""], [1.0, 2.0, 2.5], 5, "length")
    assert found.ids == []
    assert found.times == [1.0, 2.0, 2.5, 2.5, 2.5]


def test_an_answer_with_unknown_tokens_keeps_the_text_of_the_server(
    server_of_texts: transformers.TransformersServer, tmp_path: Path
) -> None:
    engine = ServedEngine(job(backend="hf", device="cpu"), tmp_path)
    engine.kind = server_of_texts
    chunks = {"times": [1.0, 2.0, 2.5], "texts": ["a", "b", ""], "finish_reason": "length", "prompt_tokens": 3}
    known = engine._generated(Request(0, (1, 2, 3), 5), Answer(output_tokens=2, **chunks), 0.0)
    assert (len(known.token_ids), known.text) == (2, None)
    unknown = engine._generated(Request(0, (1, 2, 3), 5), Answer(output_tokens=5, **chunks), 0.0)
    assert (unknown.token_ids, unknown.text, len(unknown.token_times)) == ([], "ab", 5)


def test_a_prompt_that_the_server_would_encode_otherwise_is_refused(
    server_of_texts: transformers.TransformersServer,
) -> None:
    ids = tuple(server_of_texts.text.tokenizer("hello")["input_ids"])
    assert server_of_texts.prompt(Request(0, ids, 8)) == "hello"
    half_a_letter = tuple(server_of_texts.text.tokenizer("é")["input_ids"][:1])
    with pytest.raises(Refusal) as caught:
        server_of_texts.prompt(Request(3, half_a_letter, 8))
    assert caught.value.kind == "prompt-encoded-otherwise"
    assert "prompt 3" in caught.value.message


# ---------------------------------------------------------------- the load generator, against a stand-in server


class FakeServer:
    """See tests.fake_server. A text is its token ids, and every prompt has those of `FakeServer.prompts`."""

    OPTIONS = frozenset[str]()
    PACKAGES = ()
    REMOVED = ("repetition_penalty",)
    COUNTERS: ClassVar[dict[str, str]] = {
        "drafts": "fake:drafts_total", "queried_tokens": "fake:queries_total", "cached_tokens": "fake:hits_total"
    }  # fmt: skip
    model = "fake"

    def __init__(self, asked: JobSpec, cache: Path) -> None:
        self.job = asked

    def prepare(self) -> Any:
        ids = {"Hello": (1, 2, 3)}
        return SimpleNamespace(encode=lambda prompts: [ids[prompt] for prompt in prompts], decode=str)

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-m", "tests.fake_server", str(port)]

    def variables(self, key: str) -> dict[str, str]:
        return {"FAKE_SERVER_KEY": key, "PYTHONPATH": str(ROOT)}

    def prompt(self, request: Request) -> list[int]:
        return list(request.token_ids)

    def begin_repeat(self) -> None:
        pass

    def body(self, index: int, request: Request, sampling: Sampling, *, ignore_eos: bool) -> dict[str, Any]:
        return {"return_token_ids": True}

    def scored(self, sequence: Sequence[int], ask: Callable[[dict[str, Any]], Any]) -> None:
        return None

    attention = None
    engine_arguments: ClassVar[dict[str, object]] = {}


def load(folder: Path) -> ServedEngine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "server_class", lambda backend: FakeServer)
        engine = ServedEngine(job(device="cpu"), folder)
    engine.load()
    return engine


@pytest.fixture(scope="module")
def engine(
    vllm_installed: None,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServedEngine]:
    before = set(children.descendants())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("http_proxy", "http://127.0.0.1:9")  # of a site whose nodes reach the network by a proxy
        made = load(tmp_path_factory.mktemp("cache"))
    yield made
    made.close()
    assert set(children.descendants()) <= before


def measured(
    engine: ServedEngine, requests: Sequence[Request], trace: Sequence[float] | None = None, **run: Any
) -> Repeat:
    """One repeat of these requests, as a job measures it; `trace`: their times."""
    made = measure.Requests(engine, RunSpec("r", {}, "p", 8, repeats=1, warmup=0, **run), [])
    made.sizes = [Size(request.prompt, len(request.token_ids), request.max_new_tokens) for request in requests]
    made.times_s = None if trace is None else list(trace)
    made.of = lambda repeat: list(requests)  # type: ignore[method-assign]
    return measure._generate_all(made, [], repeat=0)


def doubts_of(repeat: Repeat) -> dict[str, str]:
    """The sentence of each doubt, by kind."""
    metrics = measure.metrics_of(measure.Figures(repeat))
    seen = doubts.Serving(*(metrics[name] for name in doubts.Serving._fields))
    found = [*doubts.of_run(repeat.wall_s, None, 0, 0, "length"), *doubts.of_serving(seen)]
    return {doubt.kind: doubts.sentence(doubt.kind, [doubt.value]) for doubt in found}


def test_requests_go_to_the_server_and_come_back_with_the_clients_times(engine: ServedEngine) -> None:
    requests = [Request(number % 3, (7, number), 4 + number % 3) for number in range(12)]
    repeat = measured(engine, requests, batch_size=4)
    assert [sample.token_ids for sample in repeat.samples] == [list(range(r.max_new_tokens)) for r in requests]
    assert [sample.prompt_tokens for sample in repeat.samples] == [2] * 12
    for sample in repeat.samples:
        assert sample.token_times_s == sorted(sample.token_times_s)
        assert 0 < sample.handed_s + sample.token_times_s[-1] <= repeat.wall_s
    assert repeat.client is not None
    assert 0 < repeat.client.busy_s < repeat.wall_s + 1
    in_flight = [(s.handed_s, s.handed_s + s.token_times_s[-1]) for s in repeat.samples]
    assert max(sum(a <= at < b for a, b in in_flight) for at, _ in in_flight) <= 4


def test_every_figure_of_the_clients_own_report_is_that_of_the_record(engine: ServedEngine) -> None:
    repeat = measured(engine, [Request(0, (7, 8), 5)] * 6, batch_size=2)
    report = json.loads((engine.folder / DETAILED).read_text(encoding="utf-8"))
    assert report["duration"] == repeat.wall_s
    assert (report["completed"], report["failed"]) == (6, 0)
    assert report["input_lens"] == [sample.prompt_tokens for sample in repeat.samples]
    assert report["output_lens"] == [len(sample.token_ids) for sample in repeat.samples]
    figures = measure.Figures(repeat)
    assert figures.ttft_s == pytest.approx(report["ttfts"], abs=1e-3)
    assert figures.e2e_s == pytest.approx(report["latencies"], abs=1e-3)
    for sample, gaps in zip(repeat.samples, report["itls"], strict=True):
        assert measure.itl_s(sample) == pytest.approx(gaps, abs=1e-9)
    metrics = measure.metrics_of(figures)
    assert metrics["output_tok_s"] == pytest.approx(report["output_throughput"])
    assert metrics["requests_s"] == pytest.approx(report["request_throughput"])


def test_the_counts_of_a_repeat_are_what_the_servers_metrics_gained(engine: ServedEngine) -> None:
    """Summed over labels."""
    for _ in range(2):
        repeat = measured(engine, [Request(0, (7, 8), 2)] * 6, batch_size=2)
        assert repeat.counts == EngineCounts(queried_tokens=12, cached_tokens=6)
        assert measure.METRICS["prefix_hit_rate"].compute(repeat) == 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.server, "port", 9)  # nothing answers there
        assert engine._counted() == {}


def test_counters_that_a_server_does_not_have_are_unknown() -> None:
    zero = dict.fromkeys(("drafts", "draft_tokens", "accepted_tokens", "queried_tokens", "cached_tokens"), 0)
    more = {**zero, "drafts": 4, "draft_tokens": 12, "accepted_tokens": 6}
    assert served.counts_between(zero, more) == EngineCounts(4, 12, 6)  # without prefix caching: no queries
    assert served.counts_between({}, more) == served.counts_between(zero, {}) == EngineCounts()


def test_at_a_request_rate_requests_are_sent_at_labctls_times(engine: ServedEngine) -> None:
    repeat = measured(engine, [Request(0, (7, 8), 2)] * 40, batch_size=40, request_rate=40.0)
    arrivals = measure.arrivals_of(RunSpec("r", {}, "p", 8, batch_size=40, request_rate=40.0), 40, 0)
    assert [sample.handed_s for sample in repeat.samples] == pytest.approx(arrivals.times_s)
    assert repeat.client is not None
    assert repeat.client.lag_s is not None
    assert len(repeat.client.lag_s) == 40
    assert min(repeat.client.lag_s) >= 0
    assert "over-saturated" not in doubts_of(repeat)


def test_failed_requests_are_kept_with_their_reasons_and_named(engine: ServedEngine) -> None:
    faults = (fake_server.STATUS_500, fake_server.ERROR_IN_THE_STREAM, fake_server.NO_ANSWER)
    repeat = measured(engine, [Request(0, (fault, 1), 4) for fault in (7, *faults, 7)], batch_size=2)
    errors = [sample.error for sample in repeat.samples]
    assert (errors[0], errors[4]) == (None, None)
    assert errors[1] == 'HTTP 500 Internal Server Error: {"error": {"message": "out of memory"}}'
    assert errors[2] == "engine is dead"
    assert errors[3]
    assert measure.METRICS["failed_requests"].compute(repeat) == 3
    assert measure.METRICS["output_tokens"].compute(repeat) == 8
    assert doubts_of(repeat)["failed requests"].startswith("3 requests failed")


def test_a_run_whose_requests_all_fail_fails_with_the_first_reason(engine: ServedEngine) -> None:
    with pytest.raises(Refusal) as caught:
        measured(engine, [Request(0, (fake_server.STATUS_500,), 4)] * 3, batch_size=2)
    assert caught.value.kind == "all-requests-failed"
    assert "all 3 requests failed: HTTP 500" in caught.value.message


def test_a_server_that_cannot_keep_up_with_the_rate_is_over_saturated(engine: ServedEngine) -> None:
    """Four places with answers of 0.1 s: 40 requests a second."""
    slow = Request(0, (fake_server.FEW_PLACES, 1), 4)
    assert "over-saturated" in doubts_of(measured(engine, [slow] * 150, batch_size=150, request_rate=120.0))
    assert "over-saturated" not in doubts_of(measured(engine, [slow] * 40, batch_size=40, request_rate=20.0))


def test_a_load_generator_that_is_the_bottleneck_is_named(engine: ServedEngine) -> None:
    flood = [Request(0, (fake_server.FLOOD, 1), 400)] * 120
    busy = doubts_of(measured(engine, flood, batch_size=16))
    assert busy["client busy"].startswith("load generator was busy for ")
    assert "it is the bottleneck, not the server" in busy["client busy"]
    late = doubts_of(measured(engine, flood, batch_size=120, request_rate=400.0))
    assert "behind the schedule" in late["client late"]
    replayed = doubts_of(measured(engine, flood, [number / 400 for number in range(120)], batch_size=120))
    assert "behind the schedule" in replayed["client late"]
    quiet = [Request(0, (7, 8), 2)] * 8
    assert "client late" not in doubts_of(measured(engine, quiet, [number / 2 for number in range(8)], batch_size=8))
    calm = doubts_of(measured(engine, [Request(0, (fake_server.FEW_PLACES, 1), 20)] * 8, batch_size=2))
    assert not {"client busy", "client late"} & calm.keys()


def test_a_short_run_is_named(engine: ServedEngine) -> None:
    repeat = measured(engine, [Request(0, (fake_server.FEW_PLACES, 1), 4)] * 4, batch_size=4)
    found = doubts_of(repeat)
    assert found["short pass"]
    assert "of the window is after the last request was sent" in found["long drain"]


def test_the_key_is_in_no_command_line(engine: ServedEngine) -> None:
    assert engine.server is not None
    key = engine.server.key
    assert len(key) >= 40
    for pid in children.descendants():
        assert key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


def kill_later(pid: int, after_s: float) -> None:
    threading.Timer(after_s, os.kill, (pid, signal.SIGKILL)).start()


def test_a_killed_server_ends_the_run_with_the_reason(engine: ServedEngine) -> None:
    """The last test of this engine."""
    assert engine.server is not None
    kill_later(engine.server.process.pid, 0.5)
    with pytest.raises(Refusal) as caught:
        measured(engine, [Request(0, (fake_server.NEVER,), 4)] * 3, batch_size=2)
    assert caught.value.kind == "server-ended"
    assert f"status {-signal.SIGKILL}" in caught.value.message
    with pytest.raises(Refusal) as again:  # of the next run of the job
        measured(engine, [Request(0, (7,), 4)], batch_size=1)
    assert again.value.kind == "server-ended"


def test_a_killed_load_generator_ends_the_run_and_leaves_no_process(
    vllm_installed: None,  # noqa: F811
    tmp_path: Path,
) -> None:
    before = set(children.descendants())
    engine = load(tmp_path)
    assert engine.client is not None
    kill_later(engine.client.process.pid, 0.5)
    with pytest.raises(Refusal) as caught:
        measured(engine, [Request(0, (fake_server.NEVER,), 4)] * 3, batch_size=2)
    assert caught.value.kind == "client-ended"
    engine.close()
    assert set(children.descendants()) <= before


def test_a_server_that_does_not_start_is_refused_with_the_last_line_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "import sys; sys.exit('torch.OutOfMemoryError: CUDA out of memory')"
    monkeypatch.setattr(FakeServer, "command", lambda self, port: [sys.executable, "-c", said])
    with pytest.raises(Refusal) as caught:
        load(tmp_path)
    assert caught.value.kind == "server-ended"
    assert "torch.OutOfMemoryError: CUDA out of memory" in caught.value.message


def test_a_client_that_demands_a_tokenizer_gets_one_that_loads_nothing(tmp_path: Path) -> None:
    """A stand-in for the client of vLLM 0.26, which asserts that there is a tokenizer and counts missing tokens with it."""

    def run(arguments: Any) -> None:
        tokenizer = client.get_tokenizer(arguments.model, tokenizer_mode="auto")
        assert tokenizer is not None
        assert len(tokenizer("a text", add_special_tokens=False).input_ids) == 1
        assert not tokenizer
        (tmp_path / DETAILED).write_text('{"duration": 1.0}', encoding="utf-8")

    client = SimpleNamespace(
        ASYNC_REQUEST_FUNCS={BACKEND: None}, add_cli_args=lambda parser: parser.add_argument("--model"), main=run
    )
    load = Load("http://127.0.0.1:1", "m", [], [], [], [], str(tmp_path))
    assert Driver(client, load, lambda word: None).drive().answers == []
