"""The reference of perplexity_truth.py: transformers' own loss in the windows of its documentation, "Perplexity of fixed-length
models", and nothing of labctl. Prints the scored tokens of each document, and their negative log-likelihood.

python tests/benchmarks/bare_perplexity.py CHECKPOINT TEXT DTYPE WINDOW STRIDE [round-inputs]

round-inputs: the inputs of each quantized layer too have 8 bits, with a scale for each token, as W8A8 kernels compute.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def window_scores(model: Any, token_ids: Sequence[int], window: int, stride: int) -> tuple[float, int]:
    """(Negative log-likelihood in nats, scored tokens) of a text, from the loss that the model itself computes of its labels."""
    ids = torch.tensor([list(token_ids)], device=model.device)
    nll, tokens, previous_end = 0.0, 0, 0
    for begin in range(0, ids.size(1), stride):
        end = min(begin + window, ids.size(1))
        inputs, labels = ids[:, begin:end], ids[:, begin:end].clone()
        labels[:, : -(end - previous_end)] = -100
        counted = int((labels[:, 1:] != -100).sum())  # the model predicts no token for the first place
        if counted:
            with torch.no_grad():
                nll += float(model(inputs, labels=labels).loss) * counted
            tokens += counted
        previous_end = end
        if end == ids.size(1):
            break
    return nll, tokens


def round_inputs(module: Any, inputs: tuple[Any, ...]) -> Any:
    scale = inputs[0].abs().amax(-1, keepdim=True) / 127
    return (inputs[0] / scale).round() * scale


def main(checkpoint: str, text: str, dtype: str, window: str, stride: str, rounding: str = "") -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    for name, module in model.named_modules():
        if rounding and name.endswith("_proj"):
            module.register_forward_pre_hook(round_inputs)
    documents = Path(text).read_text(encoding="utf-8").strip().split("\n\n\n")
    scores = [window_scores(model, tokenizer(d.strip())["input_ids"], int(window), int(stride)) for d in documents]
    print(json.dumps({"nll": [nll for nll, _ in scores], "tokens": [tokens for _, tokens in scores]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
