"""The login node's side of labctl: ask, plan, submit, collect, compare. Never imports torch, transformers or vllm."""
