"""A stand-in for tests at scale: with this folder on a worker's PYTHONPATH, the backends hf and vllm only sleep and count.

Everything around it is real: the script, submitit, the worker, its heartbeats, its records.
"""

from labctl_workers import engines

for backend in ("hf", "vllm"):
    engines.ENGINES[backend] = "sleeping_engine:SleepingEngine"
