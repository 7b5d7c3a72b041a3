"""The reference of vllm_truth.py: vLLM's offline API as a person would use it, with nothing of labctl.

For each line of its input, `BATCH TOKENS`, one pass; what it measured, as a line of JSON."""

import json
import statistics
import sys
import time


def main() -> None:
    from vllm import LLM, SamplingParams

    model, options, prompt = sys.argv[1], json.loads(sys.argv[2]), {"prompt_token_ids": json.loads(sys.argv[3])}
    llm = LLM(model, dtype="bfloat16", enable_prefix_caching=False, **options)
    print(json.dumps({"pass": "ready"}), flush=True)
    for line in sys.stdin:
        batch, tokens = map(int, line.split())
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        outputs = llm.generate([prompt] * batch, sampling, use_tqdm=False)
        told = {"took_s": time.perf_counter() - started, "token_ids": list(outputs[0].outputs[0].token_ids)}
        if outputs[0].metrics is not None:  # with its statistics on
            spans = [output.metrics.last_token_ts - output.metrics.first_token_ts for output in outputs]
            told["ttft_s"] = statistics.median(output.metrics.first_token_latency for output in outputs)
            told["tpot_s"] = statistics.median(spans) / (tokens - 1)
        print(json.dumps({"pass": told}), flush=True)


if __name__ == "__main__":
    main()
