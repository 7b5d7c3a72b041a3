"""vLLM's offline engine: tensor, pipeline and data parallel over the job's GPUs.

vLLM runs in its own processes: a scheduler for each copy of the model, and one for each GPU. labctl calls its steps one by one
to read the time of every token, and hands each request to a copy with the fewest requests.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import itertools
import json
import math
import os
import re
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from labctl_workers import children, hardware, stdout
from labctl_workers.engines import parallel
from labctl_workers.engines.base import (
    Answers,
    Arrivals,
    Generated,
    Generation,
    Json,
    Request,
    announce_gpus,
    first_line,
    import_packages,
    refusals_of,
)
from labctl_workers.engines.before_import import install_hint, set_bytecode_cache, set_compile_cache
from labctl_workers.engines.lora import rank_of
from labctl_workers.engines.quantization import check_cache_dtype, check_quantization
from labctl_workers.engines.text import (
    Text,
    TextEngine,
    check_window,
    generation_config,
    longest_window,
    most_tokens,
)
from labctl_workers.engines.vllm_worker import WorkerReport
from labctl_workers.probe import VLLM_DISTRIBUTIONS, installed_versions
from labctl_workers.record import (
    DeviceMemory,
    EngineCounts,
    EngineFingerprint,
    JobSpec,
    Refusal,
    Sampling,
    Scalar,
)
from labctl_workers.workload import arrive_over_time, sizes_of

PACKAGES = (*VLLM_DISTRIBUTIONS, "torch", "transformers", "tokenizers", "safetensors", "triton", "numpy", "flashinfer-python",
            "xformers", "nvidia-nccl-cu12", "nvidia-nccl-cu13")  # fmt: skip
OLDEST = (0, 10)
FIRST_WITHOUT_V0 = (0, 11)
# vLLM's release wheels: 0.20.0 is the first without code for compute capability 7.0.
FIRST_WITHOUT_VOLTA = (0, 20)
# Head sizes of vLLM's attention on the CPU.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
LARGEST_GPU_HEAD_SIZE = 256
SHORTEST_MODEL_LEN = 512
DEFAULT_MAX_NUM_SEQS = 256  # vLLM's smallest default: more requests in flight would wait in its queue
CPU_KV_CACHE_BYTES = 2**30
TASK_TOKENS = 4096  # prompts of tasks have several examples
CLOSE_WITHIN_S = 1.0


@dataclass
class VllmSettings:
    """The effective settings of the engine, and the blocks of keys and values of each worker."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    enforce_eager: bool
    prefix_caching: bool
    quantization: str | None
    kv_cache_dtype: str
    kv_blocks: int
    kv_block_tokens: int


@dataclass(kw_only=True)
class VllmFingerprint(EngineFingerprint):
    """`startup`: the seconds of the parts of the start."""

    startup: dict[str, float]
    vllm: VllmSettings


class VllmEngine(TextEngine):
    """`vllm.LLM` without prefix caching, with statistics, and with the context length that the job's runs need."""

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
        "lora": str,
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
    DEFAULTS: ClassVar[dict[str, Scalar]] = {"kv_cache_dtype": "auto", "lora": "none", "quantization": "none"}
    PARALLEL: ClassVar[tuple[str, ...]] = parallel.KINDS

    def __init__(self, job: JobSpec, cache: Path) -> None:
        self.job = job
        self.cache = cache
        self.shares = parallel.sizes_of(job.parallel, job.gpus)
        self.llm: Any = None
        self.end_tokens: set[int] = set()
        self.reports: list[WorkerReport] = []  # of each worker, by rank; those of a copy of the model together
        self.memory_bytes: dict[str, int] = {}  # of each GPU, by UUID without "GPU-"
        self.kv_blocks_used = [0] * self.shares.data  # of each copy, the maximum since the last reset
        self.batches = 1  # that were in a pipeline at the same time in the last repeat
        self.started_s: dict[str, float] = {}
        self.spared: set[int] = set()  # processes older than vLLM's
        self.steps: Any = None
        self.copies: Any = None
        self.processes: Any = None
        self.adapter: Any = None  # vLLM's LoRARequest, of every request
        self._request_count = 0

    @classmethod
    def foreseen(cls, job: JobSpec, config: Any, packages: Mapping[str, str] | None) -> Iterator[Refusal]:
        """See engines.base."""
        yield from refusals_of(lambda: check_capability(job))
        yield from refusals_of(lambda: check_cache_dtype(job))
        if packages is not None:
            yield from refusals_of(lambda: check_version(job, version_among(job, packages, "the partition's Python")))
        if config is not None:
            yield from refusals_of(lambda: check_model(job, config))
            if job.adapter is not None:
                adapter = job.adapter
                yield from refusals_of(lambda: rank_of(adapter))
            yield from refusals_of(lambda: model_len(job, _least_needed(job) + 1, most_tokens(config)))

    # ------------------------------------------------------------ load

    def load(self) -> tuple[float, float]:
        started = time.perf_counter()
        self.prepare_node()
        transformers, vllm = import_packages(self.job, "transformers", "vllm")
        known = set(vllm.EngineArgs.__dataclass_fields__)
        check_options(self.job, known, vllm.__version__)
        wanted = self.arguments(self.read_checkpoint(transformers))
        arguments = {name: value for name, value in wanted.items() if name in known}
        if self.job.adapter is not None:
            from vllm.lora.request import LoRARequest

            self.adapter = LoRARequest(self.job.adapter.name, 1, self.job.adapter.path)
        imported = time.perf_counter()
        self.spared = set(children.descendants())
        try:
            self.llm = _started(vllm, arguments)
        except (MemoryError, Refusal):
            raise
        except Exception as error:  # often only the workers' log has the cause
            raise _refusal(self.job, error) from error
        ready = time.perf_counter()
        core = self.llm.llm_engine.engine_core
        self.steps = Steps(core)
        self.copies = Copies(self.llm.llm_engine, self.shares.data)
        self.processes = Processes(set(children.descendants()) - self.spared, getattr(core, "outputs_queue", None))
        self._disable_step_statistics()
        self.reports = self._worker_reports()
        self.memory_bytes = {gpu.uuid.removeprefix("GPU-"): gpu.memory_bytes for gpu in hardware.visible_gpus()}
        # vLLM postpones some work to the first request of each copy: no run must pay for it.
        first = Request(0, (min(self.end_tokens, default=1),) * 8, 4)
        copies = self.shares.data
        self.generate([first] * copies, Generation(Arrivals(copies), ignore_eos=True))
        gc.collect()
        gc.freeze()  # collections during a run then skip all imported objects
        ended = time.perf_counter()
        load_s, profile_s, capture_s = (
            max(report.took_s.get(part, 0.0) for report in self.reports)
            for part in ("load_s", "profile_s", "capture_s")
        )
        self.started_s = {"import_s": imported - started, "start_s": ready - imported, "load_s": load_s,
                          "profile_s": profile_s, "capture_s": capture_s, "first_request_s": ended - ready}  # fmt: skip
        announce_gpus(self.job)
        stdout.print_line(f"vLLM workers in use: {[self._device(report) for report in self.reports]}")
        return load_s, ended - started - load_s

    def prepare_node(self) -> None:
        """Check this node's vLLM and GPUs, and set the environment of its processes. Raises Refusal."""
        check_version(self.job, installed_version(self.job))
        check_capability(self.job)
        check_cache_dtype(self.job)
        set_environment(self.job, self.cache)

    def read_checkpoint(self, transformers: Any) -> Any:
        """Read the tokenizer and the end tokens; returns the configuration's text part. Raises Refusal where vLLM cannot run
        the model."""
        source, revision = self.job.model.source, self.job.model.revision
        try:
            config = transformers.AutoConfig.from_pretrained(source, revision=revision)
            self.text = Text(source, revision, raw_prompt=self.job.raw_prompt)
            self.text.longest = most_tokens(config.get_text_config())
            self.end_tokens = self.text.end_tokens(generation_config(transformers, source, revision, config))
        except Exception as error:  # the Hub, the configuration and the tokenizer have exceptions of their own
            raise _refusal(self.job, error) from error
        check_model(self.job, config.get_text_config())
        return config.get_text_config()

    def arguments(self, config: Any) -> dict[str, Any]:
        """The engine's arguments, from the text part of the model's configuration."""
        check_window(self.job, most_tokens(config))
        arguments: dict[str, Any] = {
            "model": self.job.model.source,
            "revision": self.job.model.revision,
            "tensor_parallel_size": self.shares.tensor,
            **{f"{kind}_parallel_size": size for kind, size in asdict(self.shares).items() if size > 1},
            "dtype": self.job.dtype,
            "max_model_len": model_len(self.job, self._longest_run(most_tokens(config)), most_tokens(config)),
            "enable_prefix_caching": False,  # repeats have the same prompts and would measure the cache
            "disable_log_stats": False,  # else its core reports no queueing times
            "generation_config": "vllm",  # ignores the checkpoint's temperature and penalties
            "seed": 0,
            "worker_cls": "labctl_workers.engines.vllm_worker.Worker",
        }
        # Served requests that arrive over time wait in the server, not in the client.
        limited = [run.batch_size for run in self.job.runs if not (self.job.served and arrive_over_time(self.job, run))]
        in_flight = -(-max(limited, default=1) // self.shares.data)  # of each copy
        if in_flight > DEFAULT_MAX_NUM_SEQS:
            arguments["max_num_seqs"] = in_flight
        if self.job.device == "cpu":
            arguments |= self._on_a_cpu(config, arguments["max_model_len"], in_flight)
        if self.job.adapter is not None:
            arguments |= {"enable_lora": True, "max_lora_rank": rank_of(self.job.adapter)}
        own = {name: value for name, value in self.job.engine_options.items() if name != "lora"}
        return arguments | {name: json.loads(str(v)) if self.OPTIONS[name] is Json else v for name, v in own.items()}

    def _on_a_cpu(self, config: Any, tokens: int, in_flight: int) -> dict[str, Any]:
        """Arguments for a CPU: no compilation, which takes minutes, and memory for the keys and values of the runs."""
        layers = -(-config.num_hidden_layers // self.shares.pipeline)
        heads = -(-config.num_key_value_heads // self.shares.tensor)
        per_token = 2 * layers * heads * head_size(config) * 4
        return {"enforce_eager": True, "kv_cache_memory_bytes": max(CPU_KV_CACHE_BYTES, per_token * tokens * in_flight)}

    def _longest_run(self, most: int | None) -> int:
        """Tokens of the longest sequence of the job's runs, plus one: scoring generates a token after it. `most`: the model's
        longest sequence."""
        requests = (each.prompt_tokens + each.new_tokens for of_run in self.sizes() for each in of_run.sizes)
        tasks = TASK_TOKENS if any(run.tasks for run in self.job.runs) else 0
        return max([longest_window(self.job), min(tasks, most or tasks), *requests]) + 1

    def _disable_step_statistics(self) -> None:
        """Disable the server's counters in the front end, which cost milliseconds a step, and 0.5 ms a token with 256 requests.
        The core still records each request's times; labctl reads them after a repeat."""
        engine = self.llm.llm_engine
        for name in ("logger_manager", "stat_logger"):  # of current versions, of 0.10
            if getattr(engine, name, None) is not None:
                setattr(engine, name, None)
        if hasattr(engine, "log_stats"):
            engine.log_stats = False

    def _device(self, report: WorkerReport) -> str:
        return f"{self.job.device}:{report.rank}"

    def _worker_reports(self) -> list[WorkerReport]:
        reports = itertools.chain.from_iterable(self.copies.call_workers("labctl_report"))
        return [WorkerReport(**{**report, "rank": rank}) for rank, report in enumerate(reports)]

    # ------------------------------------------------------------ generate

    def generate(self, requests: Sequence[Request], how: Generation) -> Answers:
        with self.processes.refuse_if_dead():
            flights = self._generate(requests, how)
        return lambda: self._answers(flights)

    def _generate(self, requests: Sequence[Request], how: Generation) -> dict[str, Flight]:
        arrivals, params = how.arrivals, self._sampling_params(how.sampling, how.ignore_eos)
        waiting = collections.deque(enumerate(requests))
        flights: dict[str, Flight] = {}
        live: set[str] = set()
        busy: collections.Counter[int] = collections.Counter()  # the requests of each copy
        engine = self.llm.llm_engine
        self.steps.clear()
        started = time.perf_counter()
        try:
            while waiting or live:
                while waiting and len(live) < arrivals.in_flight and has_arrived(arrivals, waiting[0][0], started):
                    index, request = waiting.popleft()
                    flight = Flight(index, request, arrival_reading(arrivals, index, started))
                    if arrivals.times_s is not None:
                        flight.waited_s = time.perf_counter() - flight.handed_at
                    flight.copy = self.copies.least_busy(busy)
                    busy[flight.copy] += 1
                    request_id = self._add_request(
                        request.token_ids, params(index, request.max_new_tokens), flight.copy
                    )
                    flights[request_id] = flight
                    live.add(request_id)
                if not live:  # until the next arrival
                    time.sleep(max(0.0, arrival_reading(arrivals, waiting[0][0], started) - time.perf_counter()))
                    continue
                for output in engine.step():
                    if output.finished:
                        flights[output.request_id].output = output
                        live.discard(output.request_id)
                        busy[flights[output.request_id].copy] -= 1
                if how.on_token is not None:
                    self.steps.pass_on_tokens(flights, how.on_token)
        finally:
            if live:  # the run failed; the engine may still work
                with contextlib.suppress(Exception):
                    for copy in self.copies.in_turn():
                        engine.abort_request([request_id for request_id in live if flights[request_id].copy == copy])
        return flights

    def _answers(self, flights: dict[str, Flight]) -> list[Generated]:
        self.steps.assign_times(flights)
        self.batches = max(1, min(self.shares.pipeline, batches_at_once(flights.values())))
        for copy in range(self.shares.data):
            self._count_blocks([flight for flight in flights.values() if flight.copy == copy], copy)
        in_order = sorted(flights.values(), key=lambda flight: flight.index)
        return [flight.answer() for flight in in_order]

    def _add_request(self, token_ids: Sequence[int], params: Any, copy: int = 0) -> str:
        self._request_count += 1
        engine = self.llm.llm_engine
        self.copies.turn_to(copy)
        request_id = f"labctl-{self._request_count}"
        prompt = {"type": "token", "prompt_token_ids": list(token_ids)}
        core_id = engine.add_request(request_id, prompt, params, lora_request=self.adapter)
        self.steps.request_ids[core_id or request_id] = request_id
        return request_id

    def _sampling_params(self, sampling: Sampling, ignore_eos: bool) -> Callable[[int, int], Any]:
        """The sampling settings of request number i with so many new tokens. Each sampled request has its own seed: with one
        seed, equal prompts of a batch would get equal answers."""
        import vllm
        from vllm.sampling_params import RequestOutputKind

        shared: dict[str, Any] = {
            "ignore_eos": True,  # labctl's end tokens, the same for every engine, replace the tokenizer's
            "stop_token_ids": [] if ignore_eos else sorted(self.end_tokens),
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        if sampling.greedy:
            greedy = functools.cache(
                lambda max_tokens: vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens, **shared)
            )
            return lambda index, max_tokens: greedy(max_tokens)
        shared |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        seed = sampling.seed or 0
        return lambda index, max_tokens: vllm.SamplingParams(max_tokens=max_tokens, seed=seed_of(seed, index), **shared)

    def _count_blocks(self, flights: Iterable[Flight], copy: int = 0) -> None:
        """Update the maximum number of blocks of keys and values that a copy of the model uses at the same time."""
        if not self.reports:
            return
        size = self.reports[0].kv_block_tokens
        changes: list[tuple[float, bool, int]] = []  # at equal times, allocations sort before releases
        for flight in flights:
            held = 0
            for number, reading in enumerate(flight.token_times):  # `number` tokens of the answer have keys and values
                blocks = -(-(len(flight.request.token_ids) + number) // size)
                if blocks > held:
                    changes.append((reading, False, blocks - held))
                    held = blocks
            if flight.token_times:
                changes.append((flight.token_times[-1], True, -held))
        running = itertools.accumulate(change for _, _, change in sorted(changes))
        self.kv_blocks_used[copy] = max(self.kv_blocks_used[copy], *running, 0)

    def log_probabilities(self, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float] | None:
        """vLLM scores the answer as part of a prompt. Without enough memory the result is None, unless the log-probability of
        the first token, which needs little, is not finite."""
        import vllm

        sequence = [*prompt, *token_ids]
        config = self.llm.llm_engine.vllm_config.model_config
        if not token_ids:
            return []
        if len(sequence) >= config.max_model_len or not self._has_room_for_logits(len(sequence), config):
            first = self._first_log_probability(prompt)
            return None if math.isfinite(first) else [first]
        scored = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        scores = self._answer_to(sequence, scored).prompt_logprobs[-len(token_ids) :]
        return [float(scores[i][token].logprob) for i, token in enumerate(token_ids)]

    def _first_log_probability(self, prompt: Sequence[int]) -> float:
        """The log-probability of the likeliest first token of the answer."""
        import vllm

        likeliest = vllm.SamplingParams(max_tokens=1, temperature=0.0, logprobs=0, detokenize=False)
        (scores,) = self._answer_to(prompt, likeliest).outputs[0].logprobs
        return float(next(iter(scores.values())).logprob)

    def _answer_to(self, token_ids: Sequence[int], params: Any) -> Any:
        engine = self.llm.llm_engine
        with self.processes.refuse_if_dead():
            self.steps.clear()
            self._add_request(token_ids, params)
            while True:
                for output in engine.step():
                    if output.finished:
                        return output

    def _has_room_for_logits(self, tokens: int, config: Any) -> bool:
        """vLLM reserves no memory for the logits of a whole prompt; running out of memory would end the engine."""
        needed = 3 * 4 * tokens * config.get_vocab_size()  # float32: logits, their logarithms and a temporary copy
        for uuid in [report.uuid for report in self.reports if report.uuid and self.job.device == "cuda"]:
            used, total = hardware.used_bytes(uuid), self.memory_bytes.get(uuid.removeprefix("GPU-"))
            if used is not None and total is not None and total - used < needed:
                free = f"{needed >> 20} MiB for logits, {(total - used) >> 20} MiB free"
                print(f"cannot compute log-probabilities: {free}", file=sys.stderr, flush=True)
                return False
        return True

    # ------------------------------------------------------------ memory

    def reset(self) -> None:
        self.kv_blocks_used = [0] * self.shares.data
        self.copies.call_workers("labctl_reset_peak")
        if self.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching:
            # Repeats send the same prompts: only requests of one repeat may share a prefix.
            for _ in self.copies.in_turn():
                self.llm.llm_engine.reset_prefix_cache()

    def counts(self) -> EngineCounts:
        counts: EngineCounts = self.steps.counts()
        return counts

    def memory(self) -> list[DeviceMemory]:
        self.reports = self._worker_reports()
        return list(map(self._memory_of, self.reports))

    def _memory_of(self, report: WorkerReport) -> DeviceMemory:
        per_block = (report.kv_token_bytes or 0) * report.kv_block_tokens
        return DeviceMemory(
            self._device(report),
            name=report.name,
            weights_bytes=report.weights_bytes,
            kv_cache_used_bytes=round(
                self.kv_blocks_used[report.rank * self.shares.data // len(self.reports)] * per_block
            ),
            kv_cache_reserved_bytes=report.kv_cache_bytes,
            peak_allocated_bytes=report.peak_allocated_bytes,
            peak_reserved_bytes=report.peak_reserved_bytes,
            device_used_bytes=hardware.used_bytes(report.uuid) if report.uuid else None,
        )

    def read_bytes_per_step(self, context_tokens: float, requests: int) -> float | None:
        """The sum over the workers of all copies with requests: the weights, once for each batch in the pipeline, and keys and
        values. None with speculative decoding: a step also reads the drafting model, which vLLM does not report."""
        drafts = "speculative_config" in self.job.engine_options
        if drafts or any(report.weights_bytes is None for report in self.reports):
            return None
        copies = self.shares.data
        weights = sum((report.weights_bytes or 0) - report.embeddings_bytes for report in self.reports) / copies
        per_token = sum(report.kv_token_bytes or 0 for report in self.reports) / copies
        return float(weights * self.batches * min(copies, requests) + per_token * context_tokens * requests)

    def gpus_at_once(self, requests: int) -> int:
        """Those of one stage for each batch in a pipeline, of every copy with requests."""
        return self.shares.tensor * self.batches * min(self.shares.data, requests)

    # ------------------------------------------------------------ the rest

    def fingerprint(self) -> VllmFingerprint:
        import torch

        config = self.llm.llm_engine.vllm_config
        return VllmFingerprint(
            packages=installed_versions(PACKAGES),
            effective_dtype=str(config.model_config.dtype).removeprefix("torch."),
            cuda=None if torch.version.cuda is None else str(torch.version.cuda),
            attention=self.reports[0].attention,
            model_revision=self.job.model.revision,
            model_type=config.model_config.hf_config.model_type,
            devices_in_use=[self._device(report) for report in self.reports],
            host_peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            startup=self.started_s,
            vllm=VllmSettings(
                max_model_len=config.model_config.max_model_len,
                max_num_seqs=config.scheduler_config.max_num_seqs,
                max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
                gpu_memory_utilization=config.cache_config.gpu_memory_utilization,
                enforce_eager=config.model_config.enforce_eager,
                prefix_caching=config.cache_config.enable_prefix_caching,
                quantization=config.model_config.quantization,
                kv_cache_dtype=config.cache_config.cache_dtype,
                kv_blocks=self.reports[0].kv_blocks,
                kv_block_tokens=self.reports[0].kv_block_tokens,
            ),
        )

    def close(self) -> None:
        """Shut vLLM down, and kill the processes that are left."""
        llm, self.llm = self.llm, None
        if self.processes is not None:
            self.processes.stop_watching()
        core = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
        if core is None:
            return
        memory = children.shared_memory_of(set(children.descendants()) - self.spared)
        with contextlib.suppress(Exception):  # the core may be dead already
            try:
                core.shutdown(timeout=CLOSE_WITHIN_S)
            except TypeError:  # 0.10 has no timeout and waits five seconds
                core.shutdown()
        children.end(self.spared)
        children.remove_shared_memory(memory)


def _started(vllm: Any, arguments: dict[str, Any]) -> Any:
    """vLLM's LLM, or for several copies an object with its engine: LLM refuses data_parallel_size in one process."""
    if "data_parallel_size" not in arguments:
        return vllm.LLM(**arguments)
    from vllm.usage.usage_lib import UsageContext

    # Defaults depend on the context: those of LLM, as of the other ways to share a model.
    context = UsageContext.LLM_CLASS
    engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**arguments), usage_context=context)
    return SimpleNamespace(llm_engine=engine)


class Copies:
    """The copies of the model in vLLM's data parallelism, each with a scheduler process.

    vLLM's engine starts all of them, as its server does, and hears them all; it sends to the one in `core_engine`. vLLM's
    own example for offline use has a process and a clock for each copy, with a fixed share of the requests.
    """

    def __init__(self, engine: Any, count: int) -> None:
        self.core = engine.engine_core
        self.schedulers = list(getattr(self.core, "core_engines", ())) if count > 1 else [None]
        self.last = -1
        if len(self.schedulers) != count:
            raise Refusal(
                "no-data-parallelism",
                f"labctl cannot send requests to {count} copies of the model with this version of vLLM",
                "update vLLM, or use --parallel tensor or pipeline",
            )

    def turn_to(self, copy: int) -> None:
        """Send the next messages to this copy."""
        if len(self.schedulers) > 1:
            self.core.core_engine = self.schedulers[copy]

    def in_turn(self) -> Iterator[int]:
        """Each copy, turned to."""
        for copy in range(len(self.schedulers)):
            self.turn_to(copy)
            yield copy

    def least_busy(self, requests: Mapping[int, int]) -> int:
        """The copy with the fewest requests in flight, the next in turn among equals."""
        count = len(self.schedulers)
        last = self.last
        self.last = min(range(count), key=lambda copy: (requests[copy], (copy - last - 1) % count))
        return self.last

    def call_workers(self, method: str) -> list[list[Any]]:
        """The answers of the workers of each copy, by rank."""
        return [self.core.collective_rpc(method) for _ in self.in_turn()]


# ---------------------------------------------------------------- requests in the engine


@dataclass
class Timestamps:
    """The times of a request in vLLM's core, in seconds of its clock; the names are those of vLLM's RequestStateStats."""

    queued_ts: float = 0.0
    scheduled_ts: float = 0.0  # the first time: vLLM may preempt the request
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    arrival_time: float = 0.0  # of the front end's wall clock

    @property
    def first_token_latency(self) -> float:
        """From the request's arrival in the front end to its first token in the core; vLLM's own value ends in the front end. All
        processes of a Linux node share the monotonic clock."""
        if not (self.first_token_ts and self.arrival_time):
            return 0.0
        return self.first_token_ts - (self.arrival_time - time.time() + time.monotonic())

    def update(self, output: Any, timestamp: float) -> None:
        """Add the core's output of one step."""
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
    """A request in the engine."""

    index: int
    request: Request
    handed_at: float
    token_times: list[float] = field(default_factory=list)
    output: Any = None
    timestamps: Timestamps = field(default_factory=Timestamps)
    waited_s: float | None = None  # from its arrival until a place was free; None: no arrival time
    copy: int = 0
    first_step: int = 0  # the steps of its copy with its first and its last token
    last_step: int = 0

    def answer(self) -> Generated:
        """Raises RuntimeError where vLLM's answer has another number of tokens than its steps."""
        made = self.output.outputs[0]
        if len(made.token_ids) != len(self.token_times):
            message = f"vLLM's answer has {len(made.token_ids)} tokens, its steps had {len(self.token_times)}"
            raise RuntimeError(message)
        metrics = self.output.metrics
        if metrics is None or not metrics.last_token_ts:  # vLLM has not filled them in
            self.timestamps.arrival_time = getattr(metrics, "arrival_time", 0.0)
            metrics = self.timestamps
        times = engine_times(metrics, len(made.token_ids))
        reason = "stop" if made.finish_reason == "stop" else "length"
        waits = [wait for wait in (self.waited_s, times.queued_s) if wait is not None]
        queued_s = sum(waits) if waits else None
        return Generated(
            token_ids=list(made.token_ids),
            token_times=self.token_times,
            finish_reason=reason,
            prompt_tokens=len(self.output.prompt_token_ids),
            handed_at=self.handed_at,
            queued_s=queued_s,
            engine_ttft_s=times.ttft_s,
            engine_tpot_s=times.tpot_s,
        )


class Steps:
    """Records the core's output of each step with a clock reading; labctl evaluates them after the repeat.

    vLLM can also return the tokens of running requests at each step. But then it builds an output for each request at each step,
    unlike in its offline API; with hundreds of requests that takes longer than the step.
    """

    def __init__(self, core: Any) -> None:
        self.recorded: list[tuple[float, Any]] = []
        self.request_ids: dict[str, str] = {}  # the core's id of a request -> labctl's
        get_output = core.get_output

        def recording() -> Any:
            outputs = get_output()
            self.recorded.append((time.perf_counter(), outputs))
            return outputs

        core.get_output = recording

    def clear(self) -> None:
        self.recorded.clear()
        self.request_ids.clear()

    def assign_times(self, flights: Mapping[str, Flight]) -> None:
        """Give each request the times and steps of its tokens, and the core's timestamps."""
        steps: collections.Counter[int] = collections.Counter()  # with tokens, of each copy
        for reading, outputs in self.recorded:
            copy = getattr(outputs, "engine_index", 0)
            steps[copy] += any(output.new_token_ids for output in outputs.outputs)
            for output in outputs.outputs:
                flight = flights.get(self.request_ids.get(output.request_id, ""))
                if flight is not None:
                    if output.new_token_ids:
                        flight.last_step = steps[copy]
                        flight.first_step = flight.first_step or steps[copy]
                    flight.token_times += [reading] * len(output.new_token_ids)
                    flight.timestamps.update(output, outputs.timestamp)

    def counts(self) -> EngineCounts:
        """The sums of the scheduler's statistics."""
        stats = [outputs.scheduler_stats for _, outputs in self.recorded if outputs.scheduler_stats is not None]
        drafting = [each.spec_decoding_stats for each in stats if each.spec_decoding_stats is not None]
        lookups = [each.prefix_cache_stats for each in stats if each.prefix_cache_stats is not None]
        counts = EngineCounts()
        if drafting:
            counts.drafts = sum(each.num_drafts for each in drafting)
            counts.draft_tokens = sum(each.num_draft_tokens for each in drafting)
            counts.accepted_tokens = sum(each.num_accepted_tokens for each in drafting)
        if queried := sum(each.queries for each in lookups):  # 0 without prefix caching
            counts.queried_tokens, counts.cached_tokens = queried, sum(each.hits for each in lookups)
        return counts

    def pass_on_tokens(self, flights: Mapping[str, Flight], on_token: Callable[[int], None]) -> None:
        """Call `on_token` for the first request's tokens of the last step."""
        for output in self.recorded[-1][1].outputs if self.recorded else ():
            flight = flights.get(self.request_ids.get(output.request_id, ""))
            for token in output.new_token_ids if flight is not None and flight.index == 0 else ():
                on_token(token)


def batches_at_once(flights: Iterable[Flight]) -> int:
    """The batches that take turns in a pipeline: steps between two tokens of a request, the median of requests."""
    found = [
        (flight.last_step - flight.first_step) / (len(flight.token_times) - 1)
        for flight in flights
        if len(flight.token_times) > 1
    ]
    return round(statistics.median(found)) if found else 1


class Processes:
    """Watches vLLM's processes. If one is killed, for example by the out-of-memory killer, vLLM may never stop waiting, and
    the job would occupy its GPUs until its time limit. `answers` is the queue on which vLLM waits."""

    CHECK_EVERY_S = 1.0
    VLLM_REPORTS_WITHIN_S = 2.0

    def __init__(self, pids: Iterable[int], answers: Any) -> None:
        # By their titles: other descendants, such as compilers, may end at any time.
        named = {pid: children.name_of(pid) or "" for pid in pids}
        self.names = {pid: name for pid, name in named.items() if name.startswith("VLLM::")}
        self.answers = answers
        self.died: str | None = None
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="vllm-processes", daemon=True).start()

    def _watch(self) -> None:
        while not self._stopped.wait(self.CHECK_EVERY_S):
            gone = [pid for pid in self.names if children.name_of(pid) is None]
            if gone:
                self.died = f"{self.names[gone[0]]} (process {gone[0]})"
                if not self._stopped.wait(self.VLLM_REPORTS_WITHIN_S) and self.answers is not None:
                    self.answers.put_nowait(RuntimeError(self.died))
                return

    @contextlib.contextmanager
    def refuse_if_dead(self) -> Iterator[None]:
        """Replace any error of the block by a Refusal if one of vLLM's processes has ended."""
        try:
            yield
        except Exception as error:
            if self.died is None:
                self._stopped.wait(self.CHECK_EVERY_S)  # it may have ended just now
            if self.died is None:
                raise
            raise Refusal(
                "engine-died",
                f"vLLM process ended during the run: {self.died}",
                "see the job's log (labctl logs); if it names no reason, the node ran out of memory: use more --mem",
            ) from error

    def stop_watching(self) -> None:
        """Call it before vLLM is shut down."""
        self._stopped.set()


@dataclass(frozen=True)
class EngineTimes:
    """vLLM's own times of a request, in seconds; None where unknown."""

    queued_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None


def engine_times(metrics: Any, tokens: int) -> EngineTimes:
    """The times from vLLM's RequestStateStats or from Timestamps, of a finished request of so many tokens."""
    first, last = metrics.first_token_ts, metrics.last_token_ts
    return EngineTimes(
        metrics.scheduled_ts - metrics.queued_ts if metrics.scheduled_ts and metrics.queued_ts else None,
        metrics.first_token_latency or None,
        (last - first) / (tokens - 1) if first and last and tokens > 1 else None,
    )


def seed_of(seed: int, index: int) -> int:
    """The seed of request number `index`: torch's generator on a CPU uses only the low 32 bits of a seed."""
    return (seed * 1_000_003 + index) % 2**32


def has_arrived(arrivals: Arrivals, index: int, started: float) -> bool:
    """Whether request number `index` has arrived."""
    return arrivals.times_s is None or started + arrivals.times_s[index] <= time.perf_counter()


def arrival_reading(arrivals: Arrivals, index: int, started: float) -> float:
    """The clock reading of the arrival of request number `index`; now, if all requests wait from the start."""
    return time.perf_counter() if arrivals.times_s is None else started + arrivals.times_s[index]


# ---------------------------------------------------------------- checks


def check_capability(job: JobSpec) -> None:
    """Raises Refusal where the GPUs are too old for every vLLM that labctl supports, or for the dtype."""
    if job.device != "cuda" or job.capability is None:
        return
    capability = float(job.capability)
    if capability < 7.0:
        raise Refusal(
            "no-kernel-image",
            f"vLLM needs compute capability 7.0 or later: {_gpu(job)} has {capability}",
            "use --backend hf",
        )
    if job.dtype == "bfloat16" and capability < 8.0:
        raise Refusal(
            "no-bfloat16",
            f"bfloat16 needs compute capability 8.0 or later: {_gpu(job)} has {capability}",
            "use --dtype float16",
        )


def check_version(job: JobSpec, version: tuple[int, ...]) -> None:
    """Raises Refusal for a vLLM or an engine of it that labctl does not support, or without code for the partition's GPUs."""
    number = ".".join(map(str, version))
    if version < OLDEST:
        raise Refusal("vllm-too-old", f"vLLM is older than 0.10: {number}", install_hint(job))
    if version < FIRST_WITHOUT_V0 and os.environ.get("VLLM_USE_V1") == "0":
        raise Refusal("vllm-v0", "labctl supports only vLLM's V1 engine: VLLM_USE_V1=0 is set", "unset VLLM_USE_V1")
    if job.device != "cuda" or job.capability is None:
        return
    if 7.0 <= float(job.capability) < 7.5 and version >= FIRST_WITHOUT_VOLTA:
        raise Refusal(
            "no-kernel-image",
            f"vLLM {number} has no code for {_gpu(job)}: compute capability {job.capability} needs 0.19 or older",
            f"{install_hint(job)}; or use --backend hf",
        )


def check_model(job: JobSpec, config: Any) -> None:
    """Raises Refusal where the GPUs do not divide the model, or vLLM does not support the head size or the quantization."""
    check_quantization(job, getattr(config, "quantization_config", None))
    heads = config.num_attention_heads
    parallel.check_division(
        job.parallel,
        job.gpus,
        job.model.name,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        intermediate=getattr(config, "intermediate_size", None) or 0,
        layers=getattr(config, "num_hidden_layers", None),
    )
    size = head_size(config)
    known = size in CPU_HEAD_SIZES if job.device == "cpu" else size % 8 == 0 and size <= LARGEST_GPU_HEAD_SIZE
    if not known:
        allowed = ", ".join(map(str, CPU_HEAD_SIZES)) if job.device == "cpu" else "multiples of 8 up to 256"
        raise Refusal(
            "head-size",
            f"vLLM does not support the model's head size: {size} (supported: {allowed})",
            "use --backend hf",
        )


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _least_needed(job: JobSpec) -> int:
    """The tokens that the longest sequence of the job's runs has at least: texts count as one token, since the login node has no
    tokenizer."""
    found = (
        size
        for run in job.runs
        for size in sizes_of(
            run, [1] * len(job.prompt_sets[run.prompt_set]), job.datasets.get(run.prompt_set), lambda text: 1
        )
    )
    return max((size.prompt_tokens + size.new_tokens for size in found), default=0)


def model_len(job: JobSpec, needed: int, most: int | None) -> int:
    """vLLM's context length: the tokens that the runs need, rounded up to a power of two; runs of similar lengths then share
    compiled code. `needed` includes one token after the longest sequence. Raises Refusal if it exceeds the limit."""
    own = job.option("max_model_len", int)
    limit = own or most
    if limit is not None and needed - 1 > limit:
        what = "max_model_len" if own else f"{job.model.name}'s longest sequence"
        raise Refusal(
            "too-long",
            f"prompt and answer are too long: {needed - 1} tokens, {what} is {limit}",
            "use a smaller --max-new-tokens, --input-len or --output-len",
        )
    rounded = max(SHORTEST_MODEL_LEN, 1 << (needed - 1).bit_length())
    return rounded if limit is None else min(rounded, limit)


def check_options(job: JobSpec, known: set[str], version: str) -> None:
    """Raises Refusal for an engine option that this version of vLLM does not have."""
    for name in job.engine_options:
        if name not in known and name != "lora":
            raise Refusal(
                "unknown-option", f"vLLM {version} has no engine option {name!r}", "remove the option, or update vLLM"
            )


def _gpu(job: JobSpec) -> str:
    return f"a {job.gpu}" if job.gpu else "the partition's GPU"


def _refusal(job: JobSpec, error: Exception) -> Refusal:
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return Refusal(
        "engine-not-started",
        f"vLLM could not start {job.model.name}: {first_line(error)}",
        "read the job's log (labctl logs); if memory ran out, use a smaller --batch-size, a 16-bit dtype or another"
        " gpu_memory_utilization",
    )


# ---------------------------------------------------------------- versions and environment


def installed_version(job: JobSpec) -> tuple[int, ...]:
    """The installed vLLM's version, such as (0, 19, 1), without importing it. Raises Refusal where it is missing."""
    return version_among(job, installed_versions(VLLM_DISTRIBUTIONS), sys.executable)


def version_among(job: JobSpec, packages: Mapping[str, str], python: str) -> tuple[int, ...]:
    """vLLM's version among the packages of a Python, by distribution. Raises Refusal where it is missing."""
    found = next((packages[name] for name in VLLM_DISTRIBUTIONS if name in packages), None)
    if found is None:
        raise Refusal("engine-missing", f"vLLM is not installed in {python}", install_hint(job))
    return version_of(found)


def version_of(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 10, 2) of "0.10.2rc1+cu128"."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def set_environment(job: JobSpec, cache: Path) -> None:
    """Set environment variables for vLLM and its processes, except those that the user set.

    Compiled code is kept for the next job of this partition with the same versions.
    """
    versions = installed_versions((*VLLM_DISTRIBUTIONS, "torch", "triton"))
    kept = cache / "-".join(f"{name}{version}" for name, version in versions.items())
    wanted = {
        "VLLM_CACHE_ROOT": str(kept / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    if job.device == "cpu":
        threads = max(1, len(os.sched_getaffinity(0)) // max(1, job.gpus))
        wanted |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
        if job.engine_options.get("enforce_eager", True):
            wanted["TORCH_COMPILE_DISABLE"] = "1"  # else vLLM still compiles some parts, with a C++ compiler
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    set_compile_cache(kept)
    set_bytecode_cache((cache / "bytecode").absolute(), "vllm")
    visible = indices_of(os.environ.get("CUDA_VISIBLE_DEVICES"), hardware.visible_gpus)
    if visible is not None:
        os.environ.update({"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})


def indices_of(visible: str | None, gpus: Callable[[], list[hardware.Gpu]]) -> str | None:
    """A CUDA_VISIBLE_DEVICES of UUIDs as indices, the only form that vLLM reads; None for one of indices."""
    entries = [entry.strip() for entry in (visible or "").split(",") if entry.strip()]
    if all(entry.isdigit() for entry in entries):
        return None
    return ",".join(str(gpu.index) for gpu in gpus())
