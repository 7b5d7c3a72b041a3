"""How the tests ask an engine, and what stages are held against: `model.generate`, and a plain sampler over the model's own
forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from labctl_workers.engines.base import Arrivals, Generated, Generation, Request
from labctl_workers.engines.staged.pipeline import Noise
from labctl_workers.record import Sampling

PROMPTS = [
    "hello", "Hi", "What is the capital of France?", "a b c", "x", "why is the sky so very blue today?", "12345", "ok",
]  # fmt: skip


def answers(
    engine: Any,
    prompts: Sequence[Sequence[int]],
    arrivals: Arrivals,
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling | None = None,
    ignore_eos: bool = False,
    on_token: Callable[[int], None] | None = None,
) -> list[Generated]:
    """What an engine answers to prompts of these token ids; greedy where no sampling is given. `max_new_tokens`: of all, or of
    each."""
    lengths = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    requests = [Request(n, tuple(ids), length) for n, (ids, length) in enumerate(zip(prompts, lengths, strict=True))]
    how = Generation(arrivals, sampling or Sampling(), ignore_eos, on_token)
    given: list[Generated] = engine.generate(requests, how)()
    return given


def tokens(given: Sequence[Generated]) -> list[list[int]]:
    return [answer.token_ids for answer in given]


def generated(
    engine: Any, prompts: Sequence[Sequence[int]], batch: int, new_tokens: int, sampling: Sampling | None = None
) -> list[list[int]]:
    """The engine's tokens, `batch` requests at once, every one of the length that was asked for."""
    return tokens(
        answers(engine, prompts, Arrivals(batch), max_new_tokens=new_tokens, sampling=sampling, ignore_eos=True)
    )


def model_of(checkpoint: Path, device: str, **values: Any) -> Any:
    """The checkpoint in float32 on one device, as transformers loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **values).to(device).eval()


def greedy_tokens(
    checkpoint: Path, prompts: Sequence[Sequence[int]], new_tokens: int, device: str = "cpu", **values: Any
) -> list[list[int]]:
    """`model.generate`, one prompt after another."""
    import torch

    model = model_of(checkpoint, device, **values)
    model.generation_config.eos_token_id = None
    found = []
    for token_ids in prompts:
        prompt = torch.tensor([list(token_ids)], device=device)
        whole = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new_tokens, pad_token_id=2
        )
        found.append(whole[0, prompt.shape[1] :].tolist())
    return found


def sampled_tokens(
    checkpoint: Path, prompts: Sequence[Sequence[int]], new_tokens: int, sampling: Sampling, device: str = "cpu"
) -> list[list[int]]:
    """A sampler without a cache, a batch or a graph: of each sequence alone, the whole forward for every token; the noise of
    a step is drawn for all sequences at once, as the engine draws it, on the device that the engine's last stage is on."""
    import torch

    model = model_of(checkpoint, device)
    last = torch.device(device if device == "cpu" else f"cuda:{torch.cuda.device_count() - 1}")
    noise = Noise(last, sampling.seed or 0)
    found = [list(token_ids) for token_ids in prompts]
    for _ in range(new_tokens):
        exponential = noise.draw_step(len(prompts), model.config.vocab_size).to(device)
        for row, ids in enumerate(found):
            with torch.no_grad():
                logits = model(torch.tensor([ids], device=device)).logits[0, -1].float()
            ids.append(chosen(logits, exponential[row], sampling))
    return [ids[len(token_ids) :] for ids, token_ids in zip(found, prompts, strict=True)]


def chosen(logits: Any, exponential: Any, sampling: Sampling) -> int:
    """Temperature, then transformers' own top-p, then the token whose probability is largest for its noise."""
    from transformers import TopPLogitsWarper

    scaled = logits[None] / sampling.temperature
    if sampling.top_p < 1:
        scaled = TopPLogitsWarper(sampling.top_p)(None, scaled)
    return int((scaled.softmax(-1)[0] / exponential).argmax())
