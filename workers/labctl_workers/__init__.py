"""The compute node's side of labctl: load an engine once, measure each run, write each record.

This package is copied to the node and runs in the partition's own Python, so it imports the standard library alone
(Python 3.10 or later); torch, transformers and vllm are imported by the engine that needs them, when it needs them.
"""
