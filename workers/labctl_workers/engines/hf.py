"""Hugging Face transformers: its `generate`, with a device map that splits the decoder layers over the job's GPUs.

The first GPU has the embeddings and the first layers, the last one the norm and the head; hidden states go from GPU to GPU.
With device "cpu" the whole model is on the CPU.
"""

from __future__ import annotations

import functools
import gc
import resource
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from labctl_workers import hardware, stdout
from labctl_workers.engines.architectures import has_kernels
from labctl_workers.engines.base import (
    Answers,
    Generated,
    Generation,
    Request,
    announce_gpus,
    import_packages,
    in_static_batches,
    refusals_of,
)
from labctl_workers.engines.before_import import install_hint, set_bytecode_cache
from labctl_workers.engines.layers import check_layers, device_map
from labctl_workers.engines.text import Text, TextEngine, most_tokens
from labctl_workers.probe import installed_versions
from labctl_workers.record import DeviceMemory, EngineFingerprint, JobSpec, Refusal, Sampling

PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "triton", "numpy")
# Generates a batch; the callback gets the tokens of its first request.
GenerateBatch = Callable[[Sequence[Request], "Callable[[int], None] | None"], list[Generated]]


class TransformersEngine(TextEngine):
    """transformers with an explicit device map. `cache_implementation` and `disable_compile` are settings of its `generate`,
    which compiles decode steps with a static cache on one GPU."""

    OPTIONS: ClassVar[dict[str, type]] = {
        "attn_implementation": str,
        "cache_implementation": str,
        "disable_compile": bool,
    }
    PARALLEL: ClassVar[tuple[str, ...]] = ("layers",)

    def __init__(self, job: JobSpec, cache: Path) -> None:
        self.job = job
        self.cache = cache
        self.model: Any = None
        self.torch: Any = None
        self.end_tokens: set[int] = set()
        self.kv_cache_bytes: dict[str, tuple[int, int]] = {}  # of the last batch, by device: (used, reserved)
        options = dict(job.engine_options)
        self.generation_options = {
            name: options.pop(name) for name in ("cache_implementation", "disable_compile") if name in options
        }
        self.model_options = options

    @classmethod
    def foreseen(cls, job: JobSpec, config: Any, packages: Mapping[str, str] | None) -> Iterator[Refusal]:
        """See engines.base."""
        if packages is not None:
            missing = [name for name in ("torch", "transformers", "accelerate") if name not in packages]
            if missing:
                yield Refusal(
                    "engine-missing",
                    f"packages missing in the Python of partition {job.partition}: {', '.join(missing)}",
                    install_hint(job),
                )
        layers = getattr(config, "num_hidden_layers", None)
        if layers is not None:
            yield from refusals_of(lambda: check_layers(layers, job.gpus))

    # ------------------------------------------------------------ load

    def load(self) -> tuple[float, float]:
        started = time.perf_counter()
        set_bytecode_cache((self.cache / "bytecode").absolute(), "torch")
        self.before_import()
        self.torch, transformers = import_packages(self.job, "torch", "transformers")
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()  # not in a log
        self._check_devices()
        imported = time.perf_counter()
        source, revision = self.job.model.source, self.job.model.revision
        try:
            self.text = Text(source, revision, raw_prompt=self.job.raw_prompt)
            self.model, info = transformers.AutoModelForCausalLM.from_pretrained(
                source,
                revision=revision,
                dtype=getattr(self.torch, self.job.dtype),
                device_map=self._device_map(transformers, source, revision),
                output_loading_info=True,
                **self.model_options,
            )
        except (Refusal, MemoryError, self.torch.OutOfMemoryError):
            raise
        except Exception as error:  # the Hub, safetensors and the configuration have exceptions of their own
            raise _load_refusal(self.job, f"{type(error).__name__}: {error}") from error
        if info["missing_keys"]:  # transformers initialises them at random
            missing = sorted(info["missing_keys"])
            raise _load_refusal(self.job, f"the checkpoint lacks {len(missing)} weights, such as {missing[0]}")
        self._check_placement()
        self.model.eval()
        self.text.longest = most_tokens(self.model.config.get_text_config())
        self.end_tokens = self.text.end_tokens(self.model.generation_config)
        self._synchronize()
        loaded = time.perf_counter()
        self.prepare()
        announce_gpus(self.job)
        stdout.print_line(f"HF device map GPUs in use: {self.devices()}")
        return loaded - imported, imported - started + time.perf_counter() - loaded

    def before_import(self) -> None:
        """A hook for settings before torch is imported."""

    def device_map(self, skeleton: Any, tied: bool) -> dict[str, int]:
        """The GPU of each module of the model on the meta device; `tied`: head and embeddings are one tensor."""
        return device_map(skeleton, self.job.gpus, tied=tied)

    def prepare(self) -> None:
        """A hook for the loaded model. Raises Refusal where the engine cannot run it."""

    def _check_devices(self) -> None:
        if self.job.device != "cuda":
            return
        seen = self.torch.cuda.device_count() if self.torch.cuda.is_available() else 0
        if seen < self.job.gpus:
            raise Refusal(
                "torch-sees-fewer-gpus",
                f"torch {self.torch.__version__} (CUDA {self.torch.version.cuda}) sees too few GPUs:"
                f" {seen} of {self.job.gpus}",
                f"install a torch that this node's driver supports in the Python of partition {self.job.partition}",
            )
        architectures = self.torch.cuda.get_arch_list()
        capability = "{}.{}".format(*self.torch.cuda.get_device_capability(0))
        if architectures and not has_kernels(capability, architectures):
            raise Refusal(
                "no-kernel-image",
                f"torch {self.torch.__version__} has no kernels for compute capability {capability}",
                f"{install_hint(self.job)} (this torch has {', '.join(architectures)})",
            )

    def _device_map(self, transformers: Any, source: str, revision: str | None) -> dict[str, int] | None:
        """The GPU of each module, by name; None on a CPU."""
        if self.job.device != "cuda":
            return None
        config = transformers.AutoConfig.from_pretrained(source, revision=revision)
        with self.torch.device("meta"):
            skeleton = transformers.AutoModelForCausalLM.from_config(config)
        return self.device_map(skeleton, bool(config.tie_word_embeddings))

    def _check_placement(self) -> None:
        """Raises Refusal where a layer of a GPU job is on the CPU or the disk, where it is a hundred times slower."""
        placed = getattr(self.model, "hf_device_map", None) or {}
        offloaded = sorted(name for name, device in placed.items() if str(device) in ("cpu", "disk"))
        if self.job.device == "cuda" and offloaded:
            raise Refusal(
                "offloaded",
                f"model does not fit on the GPUs: {len(offloaded)} modules offloaded ({', '.join(offloaded[:3])})",
                "use more GPUs, a smaller model or a 16-bit dtype",
            )

    def devices(self) -> list[str]:
        """The devices with parameters, in order: ['cuda:0', 'cuda:1']."""
        used = {(parameter.device.type, parameter.device.index or 0) for parameter in self.model.parameters()}
        return [kind if kind == "cpu" else f"{kind}:{index}" for kind, index in sorted(used)]

    # ------------------------------------------------------------ generate

    def generate(self, requests: Sequence[Request], how: Generation) -> Answers:
        callbacks = [how.on_token]  # for the first batch alone
        generate_batch = self.batches_of(how.sampling, set() if how.ignore_eos else self.end_tokens)
        generated = in_static_batches(
            requests, how.arrivals, lambda batch: generate_batch(batch, callbacks.pop() if callbacks else None)
        )
        return lambda: generated

    def batches_of(self, sampling: Sampling, ends: set[int]) -> GenerateBatch:
        """The function that generates the batches of a repeat, one after another."""
        self._configure(sampling, ends)
        return functools.partial(self._generate_batch, ends)

    def _generate_batch(
        self, ends: set[int], batch: Sequence[Request], on_token: Callable[[int], None] | None
    ) -> list[Generated]:
        handed_at = time.perf_counter()
        inputs = self.text.tokenizer.pad({"input_ids": [list(r.token_ids) for r in batch]}, return_tensors="pt")
        prompt_tokens = inputs["attention_mask"].sum(dim=1).tolist()
        inputs = inputs.to(self._input_device())
        self.model.generation_config.max_new_tokens = max(request.max_new_tokens for request in batch)
        clock = TokenClock(on_token)
        self._synchronize()
        with self.torch.inference_mode():
            output = self.model.generate(**inputs, streamer=clock, return_dict_in_generate=True)
        self._synchronize()
        self.kv_cache_bytes = _cache_bytes(output.past_key_values)
        rows = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return [
            cut_at_end(request, row, clock.times, ends, handed_at=handed_at, prompt_tokens=counted)
            for request, row, counted in zip(batch, rows, prompt_tokens, strict=True)
        ]

    def _configure(self, sampling: Sampling, ends: set[int]) -> None:
        """Replace the checkpoint's generation settings, which may include a temperature or a penalty."""
        from transformers import GenerationConfig

        chosen: dict[str, Any] = {"do_sample": False}
        if not sampling.greedy:
            # top_k=0: the default of transformers is 50; vLLM has no such limit.
            chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
            self.torch.manual_seed(sampling.seed or 0)
        self.model.generation_config = GenerationConfig(
            eos_token_id=sorted(ends) or None,
            pad_token_id=self.text.tokenizer.pad_token_id,
            **self.generation_options,
            **chosen,
        )

    def log_probabilities(self, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float] | None:
        if not token_ids:
            return []
        # Each position predicts the next token; the prediction of the last one is not needed.
        logits = self.last_logits([*prompt, *token_ids], len(token_ids) + 1)[:-1]
        chosen = self.torch.tensor(list(token_ids), device=logits.device)
        scores = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=1)
        return [float(score) for score in scores.tolist()]

    def last_logits(self, sequence: list[int], keep: int) -> Any:
        """Logits [keep, vocabulary] in float32 of the last positions of a sequence."""
        entering = self.torch.tensor([sequence], device=self._input_device())
        with self.torch.inference_mode():
            return self.model(entering, logits_to_keep=keep, use_cache=False).logits[0].float()

    def _input_device(self) -> Any:
        return self.model.get_input_embeddings().weight.device

    def _synchronize(self) -> None:
        if self.job.device == "cuda":
            for index in range(self.job.gpus):
                self.torch.cuda.synchronize(index)

    # ------------------------------------------------------------ memory

    def reset(self) -> None:
        if self.job.device == "cuda":
            for index in range(self.job.gpus):
                self.torch.cuda.reset_peak_memory_stats(index)

    def memory(self) -> list[DeviceMemory]:
        weights = self._weights_bytes()
        on_gpus = self.job.device == "cuda"
        found = []
        for device in [f"cuda:{index}" for index in range(self.job.gpus)] if on_gpus else ["cpu"]:
            used, reserved = self.kv_cache_bytes.get(device, (0, 0))
            memory = DeviceMemory(
                device,
                weights_bytes=weights.get(device, 0),
                kv_cache_used_bytes=used,
                kv_cache_reserved_bytes=reserved,
            )
            if on_gpus:
                properties = self.torch.cuda.get_device_properties(device)
                memory.name = properties.name
                memory.peak_allocated_bytes = self.torch.cuda.max_memory_allocated(device)
                memory.peak_reserved_bytes = self.torch.cuda.max_memory_reserved(device)
                memory.device_used_bytes = hardware.used_bytes(str(properties.uuid))
            found.append(memory)
        return found

    def _weights_bytes(self) -> dict[str, int]:
        """Bytes of parameters and buffers on each device; tied tensors count once."""
        held: dict[str, int] = {}
        counted: set[int] = set()
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if tensor.data_ptr() not in counted:
                counted.add(tensor.data_ptr())
                device = str(tensor.device)
                held[device] = held.get(device, 0) + tensor.numel() * tensor.element_size()
        return held

    def read_bytes_per_step(self, context_tokens: float, requests: int) -> float | None:
        """The weights, once for each micro-batch, without the input embeddings, of which a step reads one row; a head that is
        tied to them is read whole."""
        embeddings = self.model.get_input_embeddings().weight
        head = self.model.get_output_embeddings()
        tied = head is not None and head.weight.data_ptr() == embeddings.data_ptr()
        weights = sum(self._weights_bytes().values())
        if not tied:
            weights -= embeddings.numel() * embeddings.element_size()
        config = self.model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * embeddings.element_size()
        return float(weights * self.gpus_at_once(requests) + per_token * context_tokens * requests)

    # ------------------------------------------------------------ the rest

    def fingerprint(self) -> EngineFingerprint:
        config = self.model.config
        return EngineFingerprint(
            packages=installed_versions(PACKAGES),
            effective_dtype=str(next(self.model.parameters()).dtype).removeprefix("torch."),
            cuda=self.torch.version.cuda,
            attention=getattr(config, "_attn_implementation", None),
            model_revision=getattr(config, "_commit_hash", None) or self.job.model.revision,
            model_type=config.model_type,
            devices_in_use=self.devices(),
            host_peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )

    def close(self) -> None:
        self.model = None
        gc.collect()
        if self.torch is not None and self.torch.cuda.is_available():
            self.torch.cuda.empty_cache()


class TokenClock:
    """A streamer of `generate` that reads the clock when the tokens of a step reach the host."""

    def __init__(self, on_token: Callable[[int], None] | None = None) -> None:
        self.times: list[float] = []
        self._on_token = on_token
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
            if self._on_token is not None:
                self._on_token(int(value.reshape(-1)[0]))
        self._prompt_seen = True  # the first call has the prompt

    def end(self) -> None:
        """Nothing is buffered."""


def _cache_bytes(cache: Any) -> dict[str, tuple[int, int]]:
    """Bytes of keys and values on each device: (used, reserved). A dynamic cache has no reserve; of a static one, the slots with
    a token are used."""
    held: dict[str, tuple[int, int]] = {}
    for layer in getattr(cache, "layers", None) or []:
        for tensor in (layer.keys, layer.values):
            if tensor is not None:
                reserved = tensor.numel() * tensor.element_size()
                slots = tensor.shape[-2]
                filled = min(slots, int(layer.get_seq_length())) if hasattr(layer, "max_cache_len") else slots
                used_before, reserved_before = held.get(str(tensor.device), (0, 0))
                used = reserved * filled // max(1, slots)
                held[str(tensor.device)] = (used_before + used, reserved_before + reserved)
    return held


def cut_at_end(
    request: Request, token_ids: list[int], times: list[float], ends: set[int], *, handed_at: float, prompt_tokens: int
) -> Generated:
    """The answer to a request in a row of a batch: up to its end token or its own length. The rest of the row is padding, or
    tokens that only longer answers of the batch needed."""
    own = token_ids[: request.max_new_tokens]
    end = next((position for position, token in enumerate(own) if token in ends), None)
    length, reason = (len(own), "length") if end is None else (end + 1, "stop")
    return Generated(own[:length], times[:length], reason, prompt_tokens, handed_at)


MAX_REASON_CHARACTERS = 300


def _load_refusal(job: JobSpec, reason: str) -> Refusal:
    print(reason, file=sys.stderr, flush=True)  # the message may have only its beginning
    return Refusal(
        "model-not-loaded",
        f"{job.model.name} could not be loaded: {textwrap.shorten(reason, MAX_REASON_CHARACTERS)}",
        "check that the folder has config.json, the tokenizer's files and safetensors weights (full reason: labctl logs)"
        if job.model.path
        else "check the model's name, the nodes' Hub cache (HF_HOME), and HF_TOKEN for a gated model",
    )
