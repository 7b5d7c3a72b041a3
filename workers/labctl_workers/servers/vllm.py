"""vLLM's OpenAI-compatible server, with the engine arguments of the backend `vllm`."""

from __future__ import annotations

import importlib.util
import json
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from labctl_workers.engines import vllm as offline
from labctl_workers.engines.base import Request, import_packages, refusals_of
from labctl_workers.engines.before_import import install_hint
from labctl_workers.engines.vllm import VllmEngine
from labctl_workers.probe import VLLM_DISTRIBUTIONS, installed_versions
from labctl_workers.record import JobSpec, Refusal, Sampling
from labctl_workers.servers.base import HOST, Tokens

# The first with token ids in a stream of completions, and with one connection pool for all requests of its client.
OLDEST = (0, 11)
# The names by which requests select the model, and the model with the job's LoRA adapter.
MODEL, ADAPTER = "labctl", "labctl-lora"
# Arguments of the offline engine alone.
NOT_OF_THE_SERVER = ("worker_cls", "disable_log_stats")


class VllmServer:
    """See servers.base. Prompts are token ids, and the answer has the ids of the generated tokens."""

    OPTIONS: ClassVar[frozenset[str]] = frozenset(VllmEngine.OPTIONS)
    PACKAGES: ClassVar[Sequence[str]] = offline.PACKAGES
    REMOVED: ClassVar[Sequence[str]] = ()
    TAKES_TOKENS: ClassVar[bool] = True
    COUNTERS: ClassVar[Mapping[str, str]] = {
        "drafts": "vllm:spec_decode_num_drafts_total",
        "draft_tokens": "vllm:spec_decode_num_draft_tokens_total",
        "accepted_tokens": "vllm:spec_decode_num_accepted_tokens_total",
        "queried_tokens": "vllm:prefix_cache_queries_total",
        "cached_tokens": "vllm:prefix_cache_hits_total",
    }

    def __init__(self, job: JobSpec, cache: Path) -> None:
        self.job = job
        self.model = MODEL if job.adapter is None else ADAPTER
        self.engine = VllmEngine(job, cache)
        self.arguments: dict[str, Any] = {}
        self.cache_salt = ""

    @classmethod
    def foreseen(cls, job: JobSpec, config: Any, packages: Mapping[str, str] | None) -> Iterator[Refusal]:
        yield from VllmEngine.foreseen(job, config, packages)
        if packages is not None:
            yield from refusals_of(lambda: check_version(job, packages, "the partition's Python"))

    def prepare(self) -> Any:
        check_version(self.job, installed_versions(VLLM_DISTRIBUTIONS), sys.executable)
        self.engine.prepare_node()
        (transformers,) = import_packages(self.job, "transformers")
        config = self.engine.read_checkpoint(transformers)
        self.arguments = self.engine.arguments(config)
        return self.engine.text

    def command(self, port: int) -> list[str]:
        own = {"host": HOST, "port": port, "served_model_name": MODEL, "uvicorn_log_level": "warning"}
        if self.job.adapter is not None:
            own["lora_modules"] = f"{ADAPTER}={self.job.adapter.path}"
        return [sys.executable, "-m", *entry_point(), *flags({**self.engine_arguments, **own})]

    @property
    def attention(self) -> str | None:
        return self.job.option("attention_backend", str)

    @property
    def engine_arguments(self) -> Mapping[str, object]:
        return {name: value for name, value in self.arguments.items() if name not in NOT_OF_THE_SERVER}

    def variables(self, key: str) -> dict[str, str]:
        return {"VLLM_API_KEY": key}

    def prompt(self, request: Request) -> list[int] | str:
        return list(request.token_ids)

    def body(self, index: int, request: Request, sampling: Sampling, *, ignore_eos: bool) -> dict[str, Any]:
        own = {} if sampling.greedy else {"top_p": sampling.top_p, "seed": offline.seed_of(sampling.seed or 0, index)}
        return {
            "temperature": sampling.temperature,
            "ignore_eos": True,  # labctl's end tokens replace the tokenizer's, as offline
            "stop_token_ids": [] if ignore_eos else sorted(self.engine.end_tokens),
            "return_token_ids": True,
            **({"cache_salt": self.cache_salt} if self.arguments.get("enable_prefix_caching") else {}),
            **own,
        }

    def begin_repeat(self) -> None:
        """vLLM's prefix cache holds prompts with another salt apart."""
        self.cache_salt = secrets.token_hex(16)

    def tokens(self, texts: Sequence[str], times: Sequence[float], count: int, finish_reason: str) -> Tokens:
        raise RuntimeError("vLLM's server returned no token ids")

    def scored(self, sequence: Sequence[int], ask: Callable[[dict[str, Any]], Any]) -> list[float | None] | None:
        if len(sequence) >= int(self.arguments["max_model_len"]):
            return None
        answer = ask({"prompt": list(sequence), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0})
        scores = answer["choices"][0]["prompt_logprobs"]
        return [
            None if of is None else float(of[str(token)]["logprob"]) for token, of in zip(sequence, scores, strict=True)
        ]

    def longest(self) -> int:
        return int(self.arguments["max_model_len"])


def check_version(job: JobSpec, packages: Mapping[str, str], python: str) -> None:
    """Raises Refusal where vLLM is missing or too old to be served."""
    version = offline.version_among(job, packages, python)
    if version < OLDEST:
        number = ".".join(map(str, version))
        raise Refusal("vllm-too-old", f"served runs need vLLM 0.11 or later: {number} is installed", install_hint(job))


def entry_point() -> list[str]:
    """The server's module. vLLM announces the end of the first; the second does not start with the build for the CPU."""
    found = importlib.util.find_spec("vllm")
    folder = Path((found and found.origin) or "").parent
    if (folder / "entrypoints" / "openai" / "api_server.py").is_file():
        return ["vllm.entrypoints.openai.api_server"]
    return ["vllm.entrypoints.cli.main", "serve"]


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Engine arguments as options of the command line: a bool as --name or --no-name, an object as JSON."""
    words: list[str] = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            words += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words
