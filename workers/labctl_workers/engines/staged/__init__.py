"""Pipeline stages of a transformers model, one on each GPU, with CUDA graphs and optional compilation."""
