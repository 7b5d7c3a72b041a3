"""The reference of gpu_truth.py and staged_speed.py: transformers as a person would write it, with labctl's device map and
nothing of labctl. A JSON line for each batch size."""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt = sys.argv[1:3]
new_tokens, gpus, rounds = map(int, sys.argv[3:6])
batches = [int(batch) for batch in (sys.argv[6:7] or ["1"])[0].split(",")]
config = json.load(open(f"{folder}/config.json"))  # noqa: PTH123, SIM115
layers, tied = config["num_hidden_layers"], config.get("tie_word_embeddings", False)
device_map = {
    "model.embed_tokens": 0,
    "model.rotary_emb": 0,
    "model.norm": gpus - 1,
    "lm_head": 0 if tied else gpus - 1,
}
device_map |= {f"model.layers.{i}": i * gpus // layers for i in range(layers)}
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device_map).eval()
model.generation_config.eos_token_id = None  # every round of the same length
tokenizer = AutoTokenizer.from_pretrained(folder)
for batch in batches:
    inputs = tokenizer([prompt] * batch, return_tensors="pt").to("cuda:0")
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
    print(
        json.dumps(
            {"batch": batch, "tok_s": rates, "token_ids": output[0, length:].tolist(), "peak_allocated_bytes": peaks}
        )
    )
