"""vLLM's worker, one process a GPU, with a watch and a mouth: what each part of the start took, what memory it holds.

Imported by vLLM itself, in its own processes: `worker_cls` of its settings names the class below.
"""

from __future__ import annotations

import functools
import time
from typing import Any


def __getattr__(name: str) -> Any:
    """`Worker`, made when vLLM asks for it: without vLLM this module has nothing to build on."""
    if name != "Worker":
        raise AttributeError(name)
    return worker_class()


@functools.cache
def worker_class() -> Any:
    """The worker class that vLLM would take here, with `Telling` before it."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Worker
    else:
        from vllm.v1.worker.gpu_worker import Worker
    return type("Worker", (Telling, Worker), {"__module__": __name__})


class Telling:
    """What labctl adds to one GPU's worker. The engine calls `labctl_report` and `labctl_reset_peak` by collective_rpc."""

    model_runner: Any  # vLLM's worker has them
    vllm_config: Any
    device: Any
    rank: int

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        return self._labctl_timed("load_s", "load_model", *args, **kwargs)

    def determine_available_memory(self, *args: Any, **kwargs: Any) -> Any:
        """A first pass over the model, which compiles it."""
        return self._labctl_timed("profile_s", "determine_available_memory", *args, **kwargs)

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        """Captures the CUDA graphs."""
        return self._labctl_timed("capture_s", "compile_or_warm_up_model", *args, **kwargs)

    def _labctl_timed(self, part: str, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call vLLM's method of this name, and keep the seconds that it took."""
        started = time.perf_counter()
        answer = getattr(super(), method)(*args, **kwargs)
        self.__dict__.setdefault("labctl_took_s", {})[part] = time.perf_counter() - started
        return answer

    def labctl_reset_peak(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def labctl_report(self) -> dict[str, Any]:
        """What this worker holds, in bytes; seconds of its start; its GPU."""
        model = self.model_runner.model
        embeddings, tied = _embeddings(model)
        cache_config = self.vllm_config.cache_config
        kv_cache_bytes = _storage_bytes(getattr(self.model_runner, "kv_caches", None) or [])
        blocks = cache_config.num_gpu_blocks or 0
        return {
            "rank": self.rank,
            "took_s": getattr(self, "labctl_took_s", {}),
            "weights_bytes": self._labctl_weights_bytes(),
            "embeddings_bytes": 0 if tied else embeddings,
            "kv_cache_bytes": kv_cache_bytes,
            "kv_blocks": blocks,
            "kv_block_tokens": cache_config.block_size,
            "kv_token_bytes": kv_cache_bytes / (blocks * cache_config.block_size) if blocks else None,
            "attention": _attention(self.model_runner),
            **self._labctl_gpu(),
        }

    def _labctl_weights_bytes(self) -> int | None:
        """None on a CPU: there vLLM packs the weights into memory of its own, out of torch's sight."""
        model = self.model_runner.model
        return None if self.device.type == "cpu" else _storage_bytes([*model.parameters(), *model.buffers()])

    def _labctl_gpu(self) -> dict[str, Any]:
        import torch

        if not torch.cuda.is_available():
            return {"name": "", "uuid": None, "peak_allocated_bytes": None, "peak_reserved_bytes": None}
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "name": properties.name,
            "uuid": str(properties.uuid),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }


def _embeddings(model: Any) -> tuple[int, bool]:
    """Bytes of the input embeddings, and whether the head is the same tensor."""
    held = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    embeddings = getattr(held.get("embed_tokens"), "weight", None)
    head = getattr(held.get("lm_head"), "weight", None)
    if embeddings is None:
        return 0, True  # not known: count everything
    tied = head is None or head.data_ptr() == embeddings.data_ptr()
    return embeddings.numel() * embeddings.element_size(), tied


def _storage_bytes(tensors: Any) -> int:
    """Bytes of the storages below tensors, each once, also where lists hold them."""
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
    """The name of the attention backend, as vLLM calls it; None where this version keeps it elsewhere."""
    try:
        return str(runner.attn_groups[0][0].backend.get_name())
    except (AttributeError, IndexError, TypeError):
        return None
