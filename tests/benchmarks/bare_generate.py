"""The reference of gpu_truth.py and staged_speed.py: transformers as a person would write it, with labctl's device map and
nothing of labctl."""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt, new_tokens, gpus, rounds, batch = (
    sys.argv[1],
    sys.argv[2],
    *map(int, [*sys.argv[3:6], *(sys.argv[6:7] or ["1"])]),
)
layers = json.load(open(f"{folder}/config.json"))["num_hidden_layers"]  # noqa: PTH123, SIM115
device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": gpus - 1, "lm_head": gpus - 1}
device_map |= {f"model.layers.{i}": i * gpus // layers for i in range(layers)}
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device_map).eval()
model.generation_config.eos_token_id = None  # every round of the same length
inputs = AutoTokenizer.from_pretrained(folder)([prompt] * batch, return_tensors="pt").to("cuda:0")
length = inputs["input_ids"].shape[1]
rates = []
for round_number in range(rounds + 1):  # the first warms up
    for gpu in range(gpus):
        torch.cuda.reset_peak_memory_stats(gpu)
        torch.cuda.synchronize(gpu)
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    for gpu in range(gpus):
        torch.cuda.synchronize(gpu)
    if round_number:
        rates.append(batch * new_tokens / (time.perf_counter() - started))
peaks = [torch.cuda.max_memory_allocated(gpu) for gpu in range(gpus)]
print(json.dumps({"tok_s": rates, "token_ids": output[0, length:].tolist(), "peak_allocated_bytes": peaks}))
