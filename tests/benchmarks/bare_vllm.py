"""The reference of vllm_truth.py: vLLM's offline API as a person would use it, with nothing of labctl."""

import json
import statistics
import sys
import time


def main() -> None:
    from vllm import LLM, SamplingParams

    model, gpus, max_model_len, new_tokens, passes = sys.argv[1], *map(int, sys.argv[2:6])
    prompt = {"prompt_token_ids": json.loads(sys.argv[6])}
    llm = LLM(model, tensor_parallel_size=gpus, dtype="bfloat16", max_model_len=max_model_len,
              enable_prefix_caching=False, disable_log_stats=False)  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    for batch in map(int, sys.argv[7:]):
        rates, ttft, tpot = [], [], []
        for number in range(passes + 1):  # the first warms up
            started = time.perf_counter()
            outputs = llm.generate([prompt] * batch, sampling, use_tqdm=False)
            took = time.perf_counter() - started
            if number:
                rates.append(sum(len(output.outputs[0].token_ids) for output in outputs) / took)
                ttft.append(statistics.median(o.metrics.first_token_latency for o in outputs))
                spans = [o.metrics.last_token_ts - o.metrics.first_token_ts for o in outputs]
                tpot.append(statistics.median(spans) / (new_tokens - 1))
        figures = {"tok_s": rates, "ttft": ttft, "tpot": tpot}  # one value a pass
        print(json.dumps({"batch": batch, **figures, "token_ids": list(outputs[0].outputs[0].token_ids)}), flush=True)


if __name__ == "__main__":
    main()
