"""The reference of vllm_truth.py: vLLM's offline API as a person would use it, with nothing of labctl.

For each line of its input, `generate BATCH TOKENS` or `steps BATCH TOKENS`, one pass; what it measured, as a line of JSON."""

import json
import statistics
import sys
import time


def generate(llm, prompt, batch, tokens):
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    outputs = llm.generate([prompt] * batch, sampling, use_tqdm=False)
    return {"took_s": time.perf_counter() - started, "token_ids": list(outputs[0].outputs[0].token_ids)}


def steps(llm, prompt, batch, tokens):
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    handed, first = {}, {}
    for number in map(str, range(batch)):
        handed[number] = time.perf_counter()
        llm.llm_engine.add_request(number, prompt, sampling)
    while llm.llm_engine.has_unfinished_requests():
        outputs, now = llm.llm_engine.step(), time.perf_counter()
        for output in outputs:
            first.setdefault(output.request_id, now)
            if output.request_id == "0":
                token_ids = list(output.outputs[0].token_ids)
    return {
        "ttft_s": statistics.median(first[number] - handed[number] for number in handed),
        "token_ids": token_ids,
    }


def main():
    from vllm import LLM

    model, options, prompt = sys.argv[1], json.loads(sys.argv[2]), {"prompt_token_ids": json.loads(sys.argv[3])}
    llm = LLM(model, dtype="bfloat16", enable_prefix_caching=False, **options)
    print(json.dumps({"pass": "ready"}), flush=True)
    for line in sys.stdin:
        how, batch, tokens = line.split()
        measured = {"generate": generate, "steps": steps}[how](llm, prompt, int(batch), int(tokens))
        print(json.dumps({"pass": measured}), flush=True)


if __name__ == "__main__":
    main()
