"""A stand-in for tests at scale: where this folder is on a worker's PYTHONPATH, the backend "hf" only sleeps and counts.

Everything around it is real: the script, submitit, the worker, its heartbeats, its records.
"""

from labctl_workers import engines

engines.ENGINES["hf"] = "sleeping_engine:SleepingEngine"
