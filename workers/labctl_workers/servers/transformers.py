"""`transformers serve` with continuous batching, on one GPU or the CPU.

It takes texts, not token ids, and the sampling settings of its first request for all requests. With continuous batching it
cannot use a model that is split over GPUs. It asks for no key.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from labctl_workers.engines.base import Request, import_packages, refusals_of
from labctl_workers.engines.before_import import install_hint, set_bytecode_cache
from labctl_workers.engines.hf import PACKAGES, TransformersEngine
from labctl_workers.engines.text import Text, generation_config, most_tokens
from labctl_workers.engines.vllm import CPU_KV_CACHE_BYTES, head_size
from labctl_workers.probe import VLLM_DISTRIBUTIONS, installed_versions
from labctl_workers.record import JobSpec, Refusal, Sampling
from labctl_workers.servers.base import HOST, Tokens
from labctl_workers.workload import are_random

# The first version with an endpoint /v1/completions that labctl was tried with.
OLDEST = (5, 17)
# Its cache for keys and values on a CPU is 90% of the machine's memory unless it is given a number of blocks.
BLOCK_TOKENS = 256
CPU_BATCH_TOKENS = 1024
FEWEST_BLOCKS = 16
LONGEST = 4096  # of a model whose configuration does not say
COMMAND = "from transformers.cli.transformers import main; main()"


class TransformersServer:
    """See servers.base."""

    OPTIONS: ClassVar[frozenset[str]] = frozenset({"attn_implementation"})
    PACKAGES: ClassVar[Sequence[str]] = (*PACKAGES, "fastapi", "uvicorn")
    # Fields of vLLM's client that it answers with 422, or cannot use.
    REMOVED: ClassVar[Sequence[str]] = (
        "repetition_penalty", "logprobs", "stream_options", "ignore_eos", "max_tokens", "temperature"
    )  # fmt: skip

    TAKES_TOKENS: ClassVar[bool] = False
    COUNTERS: ClassVar[Mapping[str, str]] = {}

    def __init__(self, job: JobSpec, cache: Path) -> None:
        self.job = job
        self.cache = cache
        revision = "" if job.model.path else f"@{job.model.revision or 'main'}"
        self.model = f"{job.model.source}{revision}"
        self.text: Any = None
        self.end_tokens: set[int] = set()
        self.blocks: int | None = None

    @classmethod
    def foreseen(cls, job: JobSpec, config: Any, packages: Mapping[str, str] | None) -> Iterator[Refusal]:
        yield from TransformersEngine.foreseen(job, config, packages)
        yield from refusals_of(lambda: check_job(job))
        if packages is not None:
            yield from refusals_of(lambda: check_packages(job, packages))

    def prepare(self) -> Any:
        check_job(self.job)
        check_packages(self.job, installed_versions(("transformers", *VLLM_DISTRIBUTIONS)))
        set_bytecode_cache((self.cache / "bytecode").absolute(), "torch")
        (transformers,) = import_packages(self.job, "transformers")
        source, revision = self.job.model.source, self.job.model.revision
        self.text = Text(source, revision, raw_prompt=self.job.raw_prompt)
        config = transformers.AutoConfig.from_pretrained(source, revision=revision)
        self.text.longest = most_tokens(config.get_text_config())
        generation = generation_config(transformers, source, revision, config)
        self.end_tokens = self.text.end_tokens(generation)
        if self.job.device == "cpu":
            of = config.get_text_config()  # 1 GiB in float32
            per_block = 2 * of.num_hidden_layers * of.num_key_value_heads * head_size(of) * 4 * BLOCK_TOKENS
            self.blocks = max(FEWEST_BLOCKS, int(CPU_KV_CACHE_BYTES // per_block))
        return self.text

    def command(self, port: int) -> list[str]:
        device = "cpu" if self.job.device == "cpu" else "cuda:0"
        attention = self.attention
        return [
            sys.executable, "-c", COMMAND, "serve", self.model, "--continuous-batching", "--device", device,
            "--dtype", self.job.dtype, "--host", HOST, "--port", str(port), "--log-level", "error",
            *(["--attn-implementation", str(attention)] if attention else []),
            *(["--cb-num-blocks", str(self.blocks), "--cb-max-batch-tokens", str(CPU_BATCH_TOKENS)] if self.blocks else []),
        ]  # fmt: skip

    def variables(self, key: str) -> dict[str, str]:
        return {}

    def prompt(self, request: Request) -> list[int] | str:
        text = str(self.text.tokenizer.decode(request.token_ids, skip_special_tokens=False))
        ids = self.text.tokenizer(text)["input_ids"]
        if list(ids) != list(request.token_ids):
            raise Refusal(
                "prompt-encoded-otherwise",
                f"transformers serve encodes prompt {request.prompt} as {len(ids)} tokens, not {len(request.token_ids)}",
                "its completions take texts, not token ids: use --backend vllm, or the run without --serve",
            )
        return text

    def body(self, index: int, request: Request, sampling: Sampling, *, ignore_eos: bool) -> dict[str, Any]:
        ends = [-1] if ignore_eos or not self.end_tokens else sorted(self.end_tokens)
        settings = {"max_new_tokens": request.max_new_tokens, "do_sample": False, "eos_token_id": ends}
        return {"generation_config": json.dumps(settings)}

    def begin_repeat(self) -> None:
        """`transformers serve` has no way to empty its cache."""

    def tokens(self, texts: Sequence[str], times: Sequence[float], count: int, finish_reason: str) -> Tokens:
        """A token without text of its own (a part of a letter, the end token) has the time of the next chunk."""
        made = [(text, time) for text, time in zip(texts, times, strict=True) if text]
        ids = self._ids("".join(text for text, _ in made), finish_reason)
        own = self._texts(ids)
        if len(ids) == count and [text for text in own if text] == [text for text, _ in made]:
            left = iter(time for _, time in made)
            found: list[float | None] = [next(left) if text else None for text in own]
            following = times[-1]
            for place in range(count - 1, -1, -1):
                following = found[place] = found[place] or following
            return Tokens(ids, [time for time in found if time is not None])
        readings = [time for _, time in made][:count]
        return Tokens([], [*readings, *[times[-1]] * (count - len(readings))])

    def _ids(self, text: str, finish_reason: str) -> list[int]:
        ids = list(self.text.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [*ids, min(self.end_tokens)] if finish_reason == "stop" and len(self.end_tokens) == 1 else ids

    def _texts(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds, as the server streams it."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream([], skip_special_tokens=True)
        return [stream.step(self.text.tokenizer._tokenizer, token) or "" for token in ids]

    def scored(self, sequence: Sequence[int], ask: Callable[[dict[str, Any]], Any]) -> list[float | None] | None:
        return None

    def longest(self) -> int:
        return int(self.text.longest or LONGEST)

    @property
    def attention(self) -> str | None:
        return self.job.option("attn_implementation", str)

    @property
    def engine_arguments(self) -> Mapping[str, object]:
        return {}


def check_job(job: JobSpec) -> None:
    """Raises Refusal for what `transformers serve` cannot do."""
    if job.gpus > 1 and job.device == "cuda":
        raise Refusal(
            "serve-one-gpu",
            f"transformers serve cannot split a model over GPUs with continuous batching: {job.gpus} GPUs",
            "use --gpus 1, --backend vllm, or the run without --serve",
        )
    if any(not run.sampling.greedy for run in job.runs):
        raise Refusal(
            "serve-greedy",
            "transformers serve uses the sampling settings of its first request for all requests",
            "use --greedy, --backend vllm, or the run without --serve",
        )
    if any(are_random(run, job.datasets.get(run.prompt_set)) for run in job.runs):
        raise Refusal(
            "serve-texts",
            "transformers serve takes texts, and a random prompt is a list of token ids",
            "use --backend vllm, a dataset of prompts, or the run without --serve",
        )
    if any(run.score is not None for run in job.runs):
        raise Refusal(
            "serve-scores",
            "transformers serve gives no log-probabilities of a text",
            "use --backend vllm, or the run without --score or --serve",
        )
    other = sorted(set(job.engine_options) - TransformersServer.OPTIONS)
    if other:
        raise Refusal(
            "serve-option",
            f"transformers serve has no option {other[0]!r}",
            "remove it, or use the run without --serve",
        )


def check_packages(job: JobSpec, packages: Mapping[str, str]) -> None:
    """Raises Refusal where the server or the load generator cannot run with these packages."""
    if not any(name in packages for name in VLLM_DISTRIBUTIONS):
        raise Refusal(
            "client-missing",
            f"the load generator is vLLM's, which the Python of partition {job.partition} does not have",
            install_hint(job),
        )
    version = tuple(int(part) for part in packages.get("transformers", "0").split(".")[:2] if part.isdigit())
    if version < OLDEST:
        number = ".".join(map(str, version))
        raise Refusal(
            "transformers-too-old",
            f"served runs need transformers 5.17 or later: {number} is installed",
            install_hint(job),
        )
