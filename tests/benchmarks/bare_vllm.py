"""The reference of vllm_truth.py: vLLM's offline API as a person would use it, with nothing of labctl.

For each line of its input, `generate BATCH TOKENS` or `steps BATCH TOKENS`, one pass; what it measured, as a line of JSON."""

import json
import statistics
import sys
import time


def generate(llm, prompt, batch, tokens):
    """By the clock around it; and by vLLM's own figures of each request, where it keeps them (disable_log_stats=False)."""
    sampling, started = greedy(tokens), time.perf_counter()
    outputs = llm.generate([prompt] * batch, sampling, use_tqdm=False)
    measured = {"took_s": time.perf_counter() - started, "token_ids": list(outputs[0].outputs[0].token_ids)}
    told = [output.metrics for output in outputs if output.metrics and output.metrics.last_token_ts]
    if told:
        measured["ttft_s"] = statistics.median(of.first_token_latency for of in told)
        measured["tpot_s"] = statistics.median((of.last_token_ts - of.first_token_ts) / (tokens - 1) for of in told)
    return measured


def steps(llm, prompt, batch, tokens):
    """By the clock at each step in which a first token comes."""
    sampling, handed, first = greedy(tokens), {}, {}
    for number in map(str, range(batch)):
        handed[number] = time.perf_counter()
        llm.llm_engine.add_request(number, prompt, sampling)
    while llm.llm_engine.has_unfinished_requests():
        outputs, now = llm.llm_engine.step(), time.perf_counter()
        for output in outputs:
            first.setdefault(output.request_id, now)
            if output.request_id == "0":
                token_ids = list(output.outputs[0].token_ids)
    return {"ttft_s": statistics.median(first[number] - handed[number] for number in handed), "token_ids": token_ids}


def greedy(tokens):
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)


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
