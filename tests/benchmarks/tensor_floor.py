"""Would tensor parallelism decode one sequence sooner than layers split over the GPUs? Two processes, one GPU each.

    python tests/benchmarks/tensor_floor.py FOLDER [--models tinyllama llama-2-7b] [--new-tokens 64]

For each checkpoint of FOLDER (staged_speed.py makes them): how long the all-reduces of one token take, two a layer, captured in
one CUDA graph, as torch's NCCL does them; the least time of a token with each way, weights at the GPU's full bandwidth; and what
transformers' own tensor parallel (`tp_plan="auto"`) and its layer split (`device_map`) do with `generate`, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
PROMPT = "Explain tensor parallelism now!!"
PORT = 29517
REPLAYS = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", default=["tinyllama", "llama-2-7b"])
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    import torch.multiprocessing

    for place, name in enumerate(options.models):
        checkpoint = str((options.folder / name).absolute())
        torch.multiprocessing.spawn(in_parts, (checkpoint, options.new_tokens, PORT + place), nprocs=2)
        torch.multiprocessing.spawn(in_layers, (checkpoint, options.new_tokens), nprocs=1)
    return 0


# ---------------------------------------------------------------- two processes


def in_parts(rank: int, checkpoint: str, new_tokens: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import torch

    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", rank))
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    reduced_us = all_reduces_us(torch, config["hidden_size"], 2 * config["num_hidden_layers"])
    if rank == 0:
        tell_floor(checkpoint, config, reduced_us)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, tp_plan="auto")
    took_ms = token_ms(torch, model, checkpoint, new_tokens)
    if rank == 0:
        print(f'{Path(checkpoint).name:<12} transformers, tp_plan="auto": {took_ms:.2f} ms a token', flush=True)
    torch.distributed.destroy_process_group()


def all_reduces_us(torch: Any, hidden: int, count: int) -> float:
    """Microseconds that `count` all-reduces of one hidden state take, one after the other in a captured graph."""
    state = torch.zeros(hidden, dtype=torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.distributed.all_reduce(state)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(count):
                torch.distributed.all_reduce(state)
        graph.replay()
        stream.synchronize()
        started = time.perf_counter()
        for _ in range(REPLAYS):
            graph.replay()
        stream.synchronize()
    return 1e6 * (time.perf_counter() - started) / REPLAYS


def tell_floor(checkpoint: str, config: dict[str, Any], reduced_us: float) -> None:
    sys.path.insert(0, str(ROOT / "workers"))
    from labctl_workers import hardware

    hidden, count = config["hidden_size"], 2 * config["num_hidden_layers"]
    weights = sum(path.stat().st_size for path in Path(checkpoint).glob("*.safetensors"))
    weights -= 2 * config["vocab_size"] * hidden  # a step reads one row of the embeddings
    whole_us = 1e6 * weights / (hardware.visible_gpus()[0].memory_bandwidth_bytes_s or float("nan"))
    print(
        f"{Path(checkpoint).name:<12} {count} all-reduces of {hidden} numbers: {reduced_us:.0f} us, {reduced_us / count:.1f} each"
        f"; at least {whole_us:.0f} us a token with layers split, {whole_us / 2 + reduced_us:.0f} with tensors split",
        flush=True,
    )


# ---------------------------------------------------------------- one process


def in_layers(_: int, checkpoint: str, new_tokens: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map="balanced")
    took_ms = token_ms(torch, model, checkpoint, new_tokens)
    print(f"{Path(checkpoint).name:<12} transformers, device_map: {took_ms:.2f} ms a token", flush=True)


def token_ms(torch: Any, model: Any, checkpoint: str, new_tokens: int) -> float:
    """Milliseconds of one more token, by `generate`: many tokens less one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids.to(f"cuda:{torch.cuda.current_device()}")

    def took(tokens: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    took(4)
    return 1e3 * statistics.median(took(new_tokens) - took(1) for _ in range(3)) / (new_tokens - 1)


if __name__ == "__main__":
    sys.exit(main())
