"""A vLLM worker (one process for each GPU) that reports the times of its start and its memory.

vLLM imports this module in its worker processes: its setting `worker_cls` names the class `Worker`.
"""

from __future__ import annotations

import functools
import time
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class WorkerReport:
    """A worker's memory in bytes, the seconds of the parts of its start, and its GPU; None where unknown.

    `embeddings_bytes` is 0 where a head in the same worker is tied to the embeddings: a step then reads them whole.
    `kv_token_bytes` is for one token of one sequence.
    """

    rank: int
    took_s: dict[str, float]
    weights_bytes: int | None
    embeddings_bytes: int
    kv_cache_bytes: int
    kv_blocks: int
    kv_block_tokens: int
    kv_token_bytes: float | None
    attention: str | None
    name: str = ""
    uuid: str | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None


def __getattr__(name: str) -> Any:
    """`Worker`, made on demand: its base class needs vLLM."""
    if name != "Worker":
        raise AttributeError(name)
    return worker_class()


@functools.cache
def worker_class() -> Any:
    """vLLM's own worker class for this platform, extended by `Reporting`."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Worker
    else:
        from vllm.v1.worker.gpu_worker import Worker
    return type("Worker", (Reporting, Worker), {"__module__": __name__})


class Reporting:
    """labctl's extension of vLLM's worker. The engine calls `labctl_report` and `labctl_reset_peak` by collective_rpc."""

    model_runner: Any  # attributes of vLLM's worker
    vllm_config: Any
    device: Any
    rank: int

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        answer = self._labctl_timed("load_s", "load_model", *args, **kwargs)
        if self.device.type == "cpu" and self._labctl_stage() > 0:
            # What a stage receives. vLLM allocates it in its profile run, which on a CPU it omits unless it compiles.
            runner = self.model_runner
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=self.device
            )
        return answer

    def determine_available_memory(self, *args: Any, **kwargs: Any) -> Any:
        """Profiles the model, which compiles it."""
        return self._labctl_timed("profile_s", "determine_available_memory", *args, **kwargs)

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        """Captures the CUDA graphs."""
        return self._labctl_timed("capture_s", "compile_or_warm_up_model", *args, **kwargs)

    def _labctl_timed(self, part: str, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call vLLM's method of this name, and record its seconds."""
        started = time.perf_counter()
        answer = getattr(super(), method)(*args, **kwargs)
        self.__dict__.setdefault("labctl_took_s", {})[part] = time.perf_counter() - started
        return answer

    def labctl_reset_peak(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def _labctl_stage(self) -> int:
        """The pipeline stage of this worker, from 0; the last one has the head."""
        return int(self.rank // self.vllm_config.parallel_config.tensor_parallel_size)

    def labctl_report(self) -> dict[str, object]:
        """A WorkerReport, as a dict: vLLM serialises no dataclasses."""
        import torch

        model = self.model_runner.model
        cache_config = self.vllm_config.cache_config
        kv_cache_bytes = _storage_bytes(getattr(self.model_runner, "kv_caches", None) or [])
        blocks = cache_config.num_gpu_blocks or 0
        stages = self.vllm_config.parallel_config.pipeline_parallel_size
        # On a CPU, vLLM packs the weights into memory that torch does not see.
        on_cpu = self.device.type == "cpu"
        report = WorkerReport(
            rank=self.rank,
            took_s=getattr(self, "labctl_took_s", {}),
            weights_bytes=None
            if on_cpu
            else _storage_bytes([*model.parameters(), *model.buffers(), *_adapters(model)]),
            embeddings_bytes=_untied_embeddings_bytes(model, has_head=self._labctl_stage() == stages - 1),
            kv_cache_bytes=kv_cache_bytes,
            kv_blocks=blocks,
            kv_block_tokens=cache_config.block_size,
            kv_token_bytes=kv_cache_bytes / (blocks * cache_config.block_size) if blocks else None,
            attention=_attention(self.model_runner),
        )
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            report.name = properties.name
            report.uuid = str(properties.uuid)
            report.peak_allocated_bytes = torch.cuda.max_memory_allocated()
            report.peak_reserved_bytes = torch.cuda.max_memory_reserved()
        return asdict(report)


def _untied_embeddings_bytes(model: Any, *, has_head: bool = True) -> int:
    """Bytes of the input embeddings; 0 where the head is the same tensor, or where the model has no `embed_tokens`. `has_head`:
    whether the head is in this worker."""
    modules = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    embeddings = getattr(modules.get("embed_tokens"), "weight", None)
    head = getattr(modules.get("lm_head"), "weight", None)
    if embeddings is None or (has_head and (head is None or head.data_ptr() == embeddings.data_ptr())):
        return 0
    return int(embeddings.numel() * embeddings.element_size())


def _adapters(model: Any) -> list[Any]:
    """The matrices of LoRA adapters, which vLLM keeps beside the parameters."""
    names = ("lora_a_stacked", "lora_b_stacked")
    return [held for module in model.modules() for name in names if (held := getattr(module, name, None)) is not None]


def _storage_bytes(tensors: Any) -> int:
    """Bytes of the storages of tensors and of lists of tensors, each storage once."""
    storages: dict[int, int] = {}
    left = list(tensors)
    while left:
        tensor = left.pop()
        if isinstance(tensor, (list, tuple)):
            left += tensor
        else:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _attention(runner: Any) -> str | None:
    """vLLM's name of the attention backend; None where this version has it elsewhere."""
    try:
        return str(runner.attn_groups[0][0].backend.get_name())
    except (AttributeError, IndexError, TypeError):
        return None
